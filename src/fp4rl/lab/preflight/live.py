"""Checks on a model with its weights: its masters across forwards, rounding that acts, noise that its dtype holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fp4rl.inject.adapted import adapter_of
from fp4rl.inject.attach import Attachment, attach
from fp4rl.inject.evidence import master_digest
from fp4rl.lab.estimates import shapes_of
from fp4rl.lab.preflight.rows import Check, Row, Subject, merged
from fp4rl.models.load import base_of, load
from fp4rl.models.packed.as_served import packed_at
from fp4rl.noise.warnings import noise_warnings
from fp4rl.rl.inputs import start_folder
from fp4rl.rl.lora import with_lora
from fp4rl.spec.errors import CheckFailed, UserError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.model import Embedded
from fp4rl.spec.points import PHASES
from fp4rl.spec.words import counted

LARGEST = 100_000_000  # weights of a model that is loaded here: on a CPU a larger one takes longer than this may
NOT_HERE = "no weights to read"
_TOKENS = 16
Look = Callable[[Experiment, Any], Iterator[Row]]


class Interrupting(Exception):
    """Raised inside a forward to see what it leaves behind."""


def without_weights(experiment: Experiment) -> str | None:
    """Return why the weights of an experiment are not looked at here; None where they are."""
    path = experiment.model.path
    if path is None:
        return None
    number = _size(base_of(Path(path)) or Path(path))
    if number is None:
        return f"{NOT_HERE} in {path}"
    return f"{number / 1e9:.2g}e9 weights are too many to be loaded here" if number > LARGEST else None


def _size(folder: Path) -> int | None:
    """Return the number of weights of a folder, of packed ones as they are decoded; None where none are here."""
    if shapes := shapes_of(folder):
        return sum(map(prod, shapes.values()))
    packed = packed_at(folder) if any(folder.glob("*.safetensors")) else None
    return sum(tensor.elements for tensor in packed.tensors.values()) if packed is not None else None


@lru_cache(maxsize=2)
def loaded(folder: Path, dtype: str, experts: Any, lora: Any) -> Any:
    """Return the model of a folder with its weights, and a fresh adapter where there is to be one."""
    model, _ = load(folder, dtype, experts)
    if lora is not None:
        model = with_lora(model, lora, folder)
    return model.eval()


def model_of(experiment: Experiment, root: Path) -> Any:
    """Return the model that a run starts from; the embedded one is warmed up and kept below `root`, as by a run."""
    spec = experiment.model
    return loaded(start_of(experiment, root), spec.dtype, spec.experts_implementation, spec.lora)


def warmed_up(subject: Subject, on_warm_up: Callable[[int, int], None]) -> None:
    """Make the start models that are not there yet, the longest part; `on_warm_up` is called with (step, steps)."""
    for own in subject.arms.values():
        with suppress(UserError, CheckFailed):  # a check meets it again, and says it
            if without_weights(own) is None:
                start_of(own, subject.root, on_warm_up)


def start_of(experiment: Experiment, root: Path, on_warm_up: Callable[[int, int], None] = lambda *_: None) -> Path:
    """Return the folder that a run starts from; `on_warm_up` is called with (step, steps)."""
    steps = (experiment.model.embedded or Embedded()).warm_up_steps
    return start_folder(experiment.model, experiment.task, root / "models", lambda step, _: on_warm_up(step, steps))


def of_weights(look: Look, applies: Callable[[Experiment], bool]) -> Callable[[Subject], Iterator[Row]]:
    """Return a check that looks at each arm's start where it applies; it waits where that cannot be loaded here."""

    def rows(subject: Subject) -> Iterator[tuple[str, Row]]:
        for arm, own in subject.arms.items():
            if applies(own):
                if (why := without_weights(own)) is not None:
                    yield arm, Row("waits", why, "weights of this run's start, in its first steps")
                else:
                    yield from ((arm, row) for row in look(own, model_of(own, subject.root)))

    return lambda subject: merged(rows(subject))


def _rounds(experiment: Experiment) -> bool:
    return experiment.injection is not None and not experiment.injection.is_nothing


def masters(experiment: Experiment, model: Any) -> Iterator[Row]:
    """Hash the master weights around a forward without gradient, a checkpointed one, and one that an error ends."""
    assert experiment.injection is not None
    expected = "the same bits after each"
    changed, forwards = [], {"without gradient": _plain, "checkpointed": _checkpointed, "interrupted": _interrupted}
    with attached(model, experiment) as attachment:
        before = master_digest(model)
        for name, forward in forwards.items():
            forward(model, attachment)
            if (after := master_digest(model)) != before:
                changed.append(name)
                before = after
    model.zero_grad(set_to_none=True)
    if changed:
        yield Row(
            "fail", f"master weights changed in a forward {', '.join(changed)}", expected, "nothing may write them"
        )
    else:
        yield Row("pass", f"masters {before} after forwards {', '.join(forwards)}", expected)


@contextmanager
def attached(model: Any, experiment: Experiment) -> Iterator[Attachment]:
    """Yield an experiment's injection, attached to a model for a while."""
    assert experiment.injection is not None
    # A packed base would leave rounded weights behind; `copy` gives the same numbers.
    with attach(model, experiment.injection.model_copy(update={"frozen_base": "copy"})) as attachment:
        yield attachment


def _ids(model: Any) -> Tensor:
    return torch.arange(1, _TOKENS + 1).remainder(model.config.get_text_config().vocab_size).unsqueeze(0)


def _logits(model: Any, ids: Tensor) -> Tensor:
    made: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return made


def _plain(model: Any, attachment: Attachment) -> None:
    attachment.set_phase("rollout")
    with torch.no_grad():
        _logits(model, _ids(model))


def _checkpointed(model: Any, attachment: Attachment) -> None:
    attachment.set_phase("training")
    made = checkpoint(lambda ids: _logits(model, ids), _ids(model), use_reentrant=False)
    assert isinstance(made, Tensor)
    torch.autograd.backward(made.square().mean())


def _interrupted(model: Any, attachment: Attachment) -> None:
    def stop(*_: Any) -> None:
        raise Interrupting

    attachment.set_phase("training")
    last = attachment.table.plans[-1]
    called = adapter_of(model, last.site) if last.merged else None  # it computes the sum, and calls no base layer
    hook = (called or model.get_submodule(last.site.path)).register_forward_hook(stop)
    try:
        _logits(model, _ids(model))
    except Interrupting:
        return
    finally:
        hook.remove()
    raise CheckFailed("the last site of the injection was not called in a forward")


def rounded(experiment: Experiment, model: Any) -> Iterator[Row]:
    """Compare the logits under the injection with those without, in each phase that it acts in; count its elements."""
    expected = "other logits than unrounded ones, and elements at every site"
    with torch.no_grad():
        full = _logits(model, _ids(model))
        with attached(model, experiment) as attachment:
            phases = [phase for phase in PHASES if attachment.table.active_sites(phase)]
            apart = {}
            for phase in phases:
                attachment.set_phase(phase)
                apart[phase] = float((_logits(model, _ids(model)) - full).abs().max())
                if "errors" not in attachment.table.active_sites(phase):
                    attachment.require_calls()
            elements = sum(row.elements for row in attachment.evidence())
    still = [phase for phase, distance in apart.items() if not distance > 0]
    if still or not elements:
        where = f"the logits of {', '.join(still)}" if still else "0 elements rounded, so they"
        yield Row(
            "fail", f"{where} are those of the unrounded model", expected, "see `fp4rl sites` for what acts where"
        )
        return
    most = ", ".join(f"{phase} {distance:.2g}" for phase, distance in apart.items())
    yield Row("pass", f"logits off by up to: {most}; {counted(elements, 'element')}", expected)


def adapter(_: Experiment, model: Any) -> Iterator[Row]:
    """Compare the logits of a start that is an adapter with those of its base: equal ones are the base's own."""
    with torch.no_grad():
        own = _logits(model, _ids(model))
        with model.disable_adapter():
            apart = float((_logits(model, _ids(model)) - own).abs().max())
    expected = "a start that is not its own base"
    cure = "" if apart > 0 else "the adapter was never trained, or not saved: start from another folder"
    yield Row("pass" if apart > 0 else "fail", f"logits of adapter and base are {apart:.2g} apart", expected, cure)


def _adapts(experiment: Experiment) -> bool:
    path = experiment.model.path
    return path is not None and base_of(Path(path)) is not None


def resolution(experiment: Experiment, model: Any) -> Iterator[Row]:
    """Compute, from the model's own weights, how many of them each sigma of the schedule changes."""
    assert experiment.noise is not None
    lines = [*noise_warnings(model, experiment.noise, experiment.training.steps)]
    expected = "5 % of the weights or more change at each sigma"
    yield from (Row("warn", line, expected, "noise.precision: float32") for line in lines)
    if not lines:
        kept = "in float32" if experiment.noise.precision == "float32" else f"in {experiment.model.dtype}"
        yield Row("pass", f"noise is kept {kept}", expected)


CHECKS = (
    Check("adapter", ("P18",), of_weights(adapter, _adapts)),
    Check("masters", ("P09",), of_weights(masters, _rounds)),
    Check("rounded", ("P10",), of_weights(rounded, _rounds)),
    Check("resolution", ("P05",), of_weights(resolution, lambda own: own.noise is not None)),
)
