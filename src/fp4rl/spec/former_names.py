"""Names that keys and values had before: files and runs that hold them are read on, and runs keep their ids.

A former deployment preset is read as the deployment that computes what it computed, never as a later one of its name.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from fp4rl.spec.errors import InvalidValueError

THRESHOLDS = {"harm": "accuracy_drop_watch"}
"""Keys of `health.thresholds`: the name that stands in digests and in older files -> the present name."""
PRESETS = {name: name for name in ("ocp", "ascend950", "ascend950_uos", "ascend950_moe")} | {
    "vllm": "compressed_tensors",
    "vllm_ascend": "vllm_ascend_floor",
    "modelopt": "vllm_blackwell_rceil",
}
"""Values of the former key `preset` -> the deployment that computes the same, which in digests has the former name."""
_CHANGED = {
    "vllm": "that is what it computed: inputs by the rule `even`, as emulations do. A Blackwell GPU rounds inputs by "
    "`rceil`: for it write deployment: vllm_blackwell",
    "vllm_ascend": "the rules that it had, weights by floor and nearest_even, which no packer writes: msModelSlim "
    "packs 4-7 % of the weights otherwise. For its rules write deployment: vllm_ascend",
    "modelopt": "the rules that it had, with ties to the even code. ModelOpt packs them toward zero: for that write "
    "deployment: modelopt",
}
_FIRST_THRESHOLDS = {present: first for first, present in THRESHOLDS.items()}
_FIRST_PRESETS = {present: first for first, present in PRESETS.items()}


def renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return `values` with those keys renamed that `names` holds."""
    return {names.get(key, key): value for key, value in values.items()}


def with_present_names(spec: Any) -> Any:
    """Return an experiment that an older version wrote, as plain values with the present names of its keys."""
    return in_present_words(_thresholds_renamed(spec, THRESHOLDS))


def with_first_names(spec: Any) -> Any:
    """Return a description, as plain values, with each renamed key and value under its first name, for digests."""
    spec = _thresholds_renamed(spec, _FIRST_THRESHOLDS)
    if not isinstance(spec, Mapping):
        return spec
    first = {key: _first(value) if key in ("injection", "evaluation") else value for key, value in spec.items()}
    rollout = first.get("rollout")
    if isinstance(rollout, Mapping) and set(rollout) == {"engine"}:
        del first["rollout"]
        first["sampler"] = rollout["engine"]
    return first


def in_present_words(content: Any) -> Any:
    """Return the content of a file, a fragment or an override with `deployment` where it says `preset`, and
    `rollout.engine` where it says `sampler`."""
    if isinstance(content, list | tuple):
        return type(content)(in_present_words(part) for part in content)
    if not isinstance(content, Mapping):
        return content
    return dict(_present(key, value, content) for key, value in content.items())


def of_deployment(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of one description with `deployment` in place of the former `preset`.

    Raises InvalidValueError where it holds both.
    """
    former, named = content.get("preset"), content.get("deployment")
    if former is not None and named is not None:
        raise InvalidValueError("preset: is the former name of deployment; name deployment alone")
    if "preset" in content:
        return {k: v for k, v in content.items() if k != "preset"} | {"deployment": _deployments(former) or named}
    return {**content, "deployment": PRESETS[named]} if named == "vllm" else dict(content)


def renamings(content: Any) -> Iterator[str]:
    """Yield a sentence for each former name in the content of a file, and what changed with it."""
    if isinstance(content, list | tuple):
        for part in content:
            yield from renamings(part)
    elif isinstance(content, Mapping):
        for key, value in content.items():
            if _is_former(key, value) or (_last(key) == "deployment" and value == "vllm"):
                names = value if isinstance(value, list | tuple) else (value,)
                yield from (renaming(name, _last(key)) for name in names if name is not None)
            elif _is_former(key, value, "sampler"):
                yield "sampler is now rollout.engine"
            else:
                yield from renamings(value)


def renaming(name: str, key: str = "preset") -> str:
    """Return what a former name is read as, and why."""
    now = PRESETS.get(name, name)
    head = f"preset {name} is now deployment" if key == "preset" else f"{key} {name} is a former name"
    return f"{head}: {now}" + (f" ({_CHANGED[name]})" if name in _CHANGED else "")


def _present(key: Any, value: Any, beside: Mapping[str, Any]) -> tuple[Any, Any]:
    if _is_former(key, value):
        present = f"{str(key)[: -len('preset')]}deployment"
        if beside.get(present) is None:
            return present, _deployments(value)
    if _is_former(key, value, "sampler"):
        head = str(key)[: -len("sampler")]
        return (f"{head}rollout", {"engine": value}) if isinstance(value, str) else (f"{head}rollout.engine", value)
    if _last(key) == "deployment" and value == "vllm":
        return key, PRESETS[value]
    if key == "factors" and isinstance(value, list | tuple):
        return key, [_factor(factor) for factor in value]
    return key, in_present_words(value)


def _last(key: Any) -> str:
    return "" if "*" in str(key) else str(key).rpartition(".")[2]


def _is_former(key: Any, value: Any, name: str = "preset") -> bool:
    names = value if isinstance(value, list | tuple) else (value,)
    return _last(key) == name and all(each is None or isinstance(each, str) for each in names)


def _deployments(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_deployments(name) for name in value]
    return PRESETS.get(value, value) if isinstance(value, str) else value


def _factor(factor: Any) -> Any:
    head, dot, last = str(factor).rpartition(".")
    present = {"preset": "deployment", "sampler": "rollout.engine"}
    return f"{head}{dot}{present[last]}" if last in present else factor


def _first(part: Any) -> Any:
    """Return an injection, or an evaluation with its injections, with `preset` where it names a first deployment."""
    if not isinstance(part, Mapping):
        return part
    first = {
        key: {name: _first(own) for name, own in value.items()} if key == "injections" else value
        for key, value in part.items()
    }
    named = first.get("deployment", "")
    if named is None or named in _FIRST_PRESETS:
        del first["deployment"]
        first["preset"] = _FIRST_PRESETS[named] if named else None
    return first


def _thresholds_renamed(spec: Any, names: Mapping[str, str]) -> Any:
    health = spec.get("health") if isinstance(spec, Mapping) else None
    if not isinstance(health, Mapping) or not isinstance(health.get("thresholds"), Mapping):
        return spec
    return {**spec, "health": {**health, "thresholds": renamed(health["thresholds"], names)}}
