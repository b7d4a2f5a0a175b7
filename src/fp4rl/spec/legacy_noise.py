"""Noise settings of the verl fork (`...noise_injection.KEY`), read as a `Noise`, with a warning for each trap."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from fp4rl.spec.errors import InvalidValueError, nearest
from fp4rl.spec.load import parse
from fp4rl.spec.noise import Noise

FAMILY = "noise_injection"
EPOCHS = "total_epochs"  # the trainer's own key, which an epoch-aware fade is made for
_KEYS = (
    *("enabled", "sigma_start", "sigma_end", "num_stages", "epoch_aware", "stages_per_epoch"),
    *("layer_types", "target_modules", "exclude_patterns", "target_layers", "layer_sigma_config"),
)
_COMPUTED = ("sigma_trend", "total_steps", "epoch_ranges", "steps_per_epoch", "current_step")
_SIGMA_KEYS = ("enabled", "default_multiplier", "layer_multipliers", "zone_schedule")
_ZONE_KEYS = ("enabled", "edge_layers", "middle_layers", "phase_boundary_ratio")
_ZONE_FACTORS = ("early_edge_mult", "late_edge_mult", "early_middle_mult", "late_middle_mult")
_KINDS = {"rmsnorm": "norm", "linear": "linear"}
_NEVER = ("lm_head", "embed_tokens")  # never take noise here


def noise_of(settings: Mapping[str, Any]) -> tuple[Noise | None, tuple[str, ...]]:
    """Return the noise that the settings describe, None where it was off, and lines for what they did not do.

    `settings` are plain values by dotted key. Raises InvalidValueError for what is unknown or has no counterpart here.
    """
    old = _nested(settings)
    _require_known(old, _KEYS, FAMILY)
    if not old.get("enabled"):
        return None, (f"{FAMILY}.enabled is false: no noise",)
    epochs = next((value for key, value in settings.items() if key.endswith(EPOCHS)), None)
    factors, factor_lines = _multipliers(old)
    content = {"schedule": _schedule(old, epochs), "targets": _targets(old), "multipliers": factors}
    return parse(Noise, content, FAMILY), (*_traps(old), *factor_lines)


def require_word(key: str, word: Any, known: Collection[str]) -> None:
    """Raise InvalidValueError, with the nearest, for a word that the fork did not know under `key`."""
    if word not in known:
        raise InvalidValueError(f"{key} {word!r} is unknown{nearest(str(word), known)}")


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part after `noise_injection` as nested keys; the rollout's own copy joins it with an underscore."""
    nested: dict[str, Any] = {}
    for path, value in settings.items():
        if FAMILY not in path:
            continue
        *above, last = path.partition(FAMILY)[2].lstrip("._").split(".")
        here = nested
        for part in above:
            here = here.setdefault(part, {})
        here[last] = value
    return nested


def _require_known(content: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(content, Mapping):
        raise InvalidValueError(f"{where}: expected keys, found {content!r}")
    for key in content:
        if key in _COMPUTED:
            raise InvalidValueError(
                f"{where}.{key} was computed by the trainer; write sigma_start, sigma_end and num_stages"
            )
        if key not in known:
            raise InvalidValueError(f"{where}: the verl fork had no {key!r}{nearest(str(key), known)}")


def _schedule(old: Mapping[str, Any], epochs: Any) -> dict[str, Any]:
    for key in ("sigma_start", "sigma_end"):
        if old.get(key) is None:
            raise InvalidValueError(f"{FAMILY}.{key} is not set, and its default differed by version; name it")
    fade = {"sigma_start": old["sigma_start"], "sigma_end": old["sigma_end"]}
    if not old.get("epoch_aware"):
        return {"kind": "geometric", **fade, "num_stages": old.get("num_stages", 10)}
    if epochs is None:
        raise InvalidValueError(f"{FAMILY}.epoch_aware fades once an epoch; name trainer.{EPOCHS} as well")
    return {"kind": "epoch_aware", **fade, "epochs": epochs, "stages_per_epoch": old.get("stages_per_epoch", 5)}


def _targets(old: Mapping[str, Any]) -> dict[str, Any]:
    types = old.get("layer_types") or ["rmsnorm"]
    for word in types:
        require_word(f"{FAMILY}.layer_types", word, _KINDS)
    left = [f"*{word}*" for word in old.get("exclude_patterns") or [] if word not in _NEVER]
    taken = old.get("target_modules") or []
    if taken and list(taken) != ["post_attention_layernorm"]:
        raise InvalidValueError(
            f"{FAMILY}.target_modules {taken} has no counterpart; name in exclude_patterns what it leaves out"
        )
    if taken:  # only the norm between attention and MLP
        left = [*dict.fromkeys([*left, "*input_layernorm*"])]
    return {"kinds": [_KINDS[word] for word in types], "final_norm": not taken, "leave": left}


def _multipliers(old: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    config, layers = old.get("layer_sigma_config") or {}, old.get("target_layers")
    _require_known(config, _SIGMA_KEYS, f"{FAMILY}.layer_sigma_config")
    if not config.get("enabled", bool(config)):
        only = {"by_layer": {int(layer): 1.0 for layer in layers}, "others": 0.0} if layers is not None else {}
        return only, ()
    if layers is not None:
        raise InvalidValueError(f"{FAMILY}: target_layers and layer_sigma_config both choose layers; keep one")
    others = config.get("default_multiplier", 1.0)
    by_layer = {int(layer): float(value) for layer, value in (config.get("layer_multipliers") or {}).items()}
    zones = config.get("zone_schedule") or {}
    if not zones.get("enabled", bool(zones)):
        return {"by_layer": by_layer, "others": others}, ()
    multipliers, lines = _zones(zones, float(others))
    return {"by_layer": by_layer, "zones": multipliers, "others": others}, lines


def _zones(zones: Mapping[str, Any], usual: float) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the zones (both ends of the model, and the middle), each with a factor for the start and for the rest."""
    where = f"{FAMILY}.layer_sigma_config.zone_schedule"
    _require_known(zones, (*_ZONE_KEYS, *_ZONE_FACTORS), where)
    edge, middle = zones.get("edge_layers") or [], zones.get("middle_layers") or []
    if not edge or not middle or sorted([*edge, *middle]) != list(range(len(edge) + len(middle))):
        raise InvalidValueError(f"{where}: edge_layers and middle_layers must name every layer once")
    first, last = sum(layer < min(middle) for layer in edge), sum(layer > max(middle) for layer in edge)
    if first + last != len(edge) or not first or not last:
        raise InvalidValueError(
            f"{where}: edge_layers must be the layers at both ends, middle_layers those between them"
        )
    share = (first + 0.5) / (len(edge) + len(middle))  # half a layer beyond, so that a float cannot fall short
    line = f"the edge was {first} layers at the start and {last} at the end; here both ends have {first}"
    factors = {zone: _factor(zones, zone, usual) for zone in ("edge", "middle")}
    return {"edge_share": share, **factors}, ((line,) if first != last else ())


def _factor(zones: Mapping[str, Any], zone: str, usual: float) -> dict[str, Any]:
    early, late = (float(zones.get(f"{part}_{zone}_mult", usual)) for part in ("early", "late"))
    changes = {"later": late, "changes_at": zones.get("phase_boundary_ratio", 0.5)}
    return {"value": early, **(changes if late != early else {})}


def _traps(old: Mapping[str, Any]) -> Iterator[str]:
    if old.get("epoch_aware"):
        yield "the epoch-aware mode drew no noise at all (it asked for its own silent interval); here it fades"
    else:
        yield "some versions never advanced the step, so that sigma stayed 0; here it follows the schedule"
    if old.get("layer_sigma_config"):
        yield "the factors of layers never reached the rollout in some versions; here they do"
    yield "noise of earlier steps stayed in weights that were not sent again (LoRA); here every rollout begins clean"
    yield "some versions kept the noise in validation; here it is in rollouts alone"
    yield "norms of queries and keys took noise as well; for that write noise.targets.qk_norms: true"
