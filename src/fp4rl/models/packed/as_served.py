"""What a packed checkpoint is served as: weights as they are stored, inputs rounded as it says, by a kernel's rule."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4rl.models.load import base_of, names_in_memory, skeleton
from fp4rl.models.packed.folder import PackedFolder, opened
from fp4rl.models.packed.weight import StoredWeight
from fp4rl.models.site_tensors import tensors_of
from fp4rl.sites.walk import Site, walk
from fp4rl.spec.deployment import deployment_named
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.formats import Format, describe
from fp4rl.spec.targets import Targets


@dataclass(frozen=True)
class InputsAsServed:
    """The injection, as a mapping of its keys, that rounds inputs as a checkpoint's engine does; None: none are.

    `words` say what that is.
    """

    injection: dict[str, Any] | None
    words: str


def packed_at(folder: Path) -> PackedFolder | None:
    """Return what is packed in a model folder, of an adapter in its base; None for unpacked weights."""
    return opened(base_of(folder) or folder)


def inputs_as_served(folder: Path, deployment: str | None = None) -> InputsAsServed:
    """Return how the inputs of packed layers are rounded where the checkpoint is served, under the rules of
    `deployment`, else of whoever loads the layout.

    Raises InvalidValueError for a folder that is not packed, and for inputs in a format that is not known here.
    """
    packed = packed_at(folder)
    if packed is None:
        raise InvalidValueError(f"{folder}: its weights are not packed, so they are stored as no format; take full")
    if deployment is not None and deployment_named(deployment).left_alone("input"):
        return InputsAsServed(None, f"{deployment} leaves inputs as they are")
    model = skeleton(folder)
    sites = dict(_formats_by_site(model, packed, deployment))
    formats = Counter(fmt for fmt, _ in sites.values() if fmt is not None)
    if not formats:
        return InputsAsServed(None, f"{packed.method} leaves inputs as they are")
    usual = formats.most_common(1)[0][0]
    content: dict[str, Any] = {"input": describe(usual), "fused_groups": "free"}
    if {site for site, _ in _taken(model)} != set(sites):
        content["targets"] = {"take": list(sites), "leave_only": []}
    content["by_pattern"] = [
        {"pattern": name, "input": "none" if fmt is None else describe(fmt)}
        for name, (fmt, _) in sites.items()
        if fmt != usual
    ]
    rules = {rule for fmt, rule in sites.values() if fmt is not None}
    if len(rules) == 1 and (rule := rules.pop()) is not None:
        content["deployment"] = rule
    names = " and ".join(dict.fromkeys(fmt.name for fmt in formats))
    return InputsAsServed(content, f"inputs {names}, weights as {packed.method} stores them")


def _taken(model: Any) -> Iterator[tuple[str, Site]]:
    for site in walk(model):
        if site.kind in ("linear", "experts") and Targets().why_left(site.name, site.role, site.part) is None:
            yield site.name, site


def _formats_by_site(
    model: Any, packed: PackedFolder, deployment: str | None
) -> Iterator[tuple[str, tuple[Format | None, str | None]]]:
    """Yield each site of packed weights with the format of its inputs under the rules of a deployment, and that."""
    base = getattr(model, "get_base_model", lambda: model)()
    names = names_in_memory(base, packed.tensors)
    in_memory = {names[name]: tensor for name, tensor in packed.tensors.items()}
    for site in walk(model):
        if site.kind not in ("linear", "experts"):
            continue
        try:
            tensors = [tensor for matrix in tensors_of(site, in_memory, packed.path) for tensor in matrix]
        except NotFoundError:  # a tied head, or an adapter's matrix
            continue
        weights = [tensor for tensor in tensors if isinstance(tensor, StoredWeight)]
        if weights:
            yield site.name, _of_site(site, weights, packed, deployment)


def _of_site(
    site: Site, weights: list[StoredWeight], packed: PackedFolder, deployment: str | None
) -> tuple[Format | None, str | None]:
    said = {weight.unread_input for weight in weights} - {None}
    if said:
        raise InvalidValueError(
            f"{site.name}: its inputs are rounded to {said.pop()}, which is no format here; take full"
        )
    formats = {weight.input for weight in weights}
    if len(formats) > 1:
        raise InvalidValueError(
            f"{site.name}: its experts' inputs have several formats, which one product cannot; take full"
        )
    fmt = formats.pop()
    rule = deployment or (None if fmt is None else _usual_rule(packed, fmt))
    return (deployment_named(rule).at("input", fmt) if fmt is not None and rule else fmt), rule


def _usual_rule(packed: PackedFolder, fmt: Format) -> str | None:
    """Return the deployment that a layout is made for."""
    if packed.method.startswith("AscendV1"):
        return "vllm_ascend_dualscale" if fmt.coarse else "vllm_ascend"
    return "compressed_tensors" if packed.method.startswith("compressed-tensors") else None


def packed_note(folder: Path) -> str | None:
    """Return what whoever measures or trains a packed folder should know; None for unpacked weights."""
    packed = packed_at(folder)
    if packed is None:
        return None
    weights = packed.weights.values()
    count, total = (
        sum(weight.elements for weight in weights),
        sum(tensor.elements for tensor in packed.tensors.values()),
    )
    inputs = " and ".join(sorted({weight.input.name for weight in weights if weight.input is not None}))
    served = f"; served with {inputs} inputs, which `full` leaves as they are and `eval -p stored` rounds"
    return (
        f"{folder} is packed ({packed.method}): {count:,} of {total:,} values were decoded and lie on its grid; what "
        f"rounding took from them is lost{served if inputs else ''}"
    )
