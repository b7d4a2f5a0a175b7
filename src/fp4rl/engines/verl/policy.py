"""A model inside an engine of verl, under one experiment: injected before it is sharded, streamed to the rollouts.

Everything here is PyTorch alone. The engine says when the model is built, sharded, read and sent.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fp4rl.inject.adapted import MergedState
from fp4rl.inject.attach import Attachment, attach
from fp4rl.inject.linear import LinearState
from fp4rl.inject.packed import CodesState
from fp4rl.inject.probe import expected
from fp4rl.inject.site import KEY, SiteState
from fp4rl.noise.evidence import NoiseEvidence, require_drawn, summary
from fp4rl.noise.perturb import perturb
from fp4rl.noise.schedule import ScheduleProgress
from fp4rl.rl.stream import weight_stream
from fp4rl.rl.verify import sites, weights_digest, weights_unchanged
from fp4rl.sites.walk import plain_name
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.evidence import Evidence, Injected, Rounded
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.points import Phase
from fp4rl.spec.records import Sites
from fp4rl.spec.words import counted

# In these first streams of a phase, and every tenth, masters are hashed and values compared with a second rounding.
_CHECKED_STREAMS, _CHECKED_EVERY = 3, 10


@dataclass(frozen=True)
class Streamed:
    """One stream of weights: what was sent, rounded (sites and elements) and compared by value, and its noise."""

    step: int
    phase: Phase
    tensors: int
    sites: int
    elements: int
    compared: int
    sigma: float
    realised: float
    share_changed: float
    noisy_weights: int


@dataclass(frozen=True)
class Report:
    """What one worker tells of its policy: numbers of the model, and what happened since its last report."""

    sites: Sites
    active: Mapping[str, int]
    trainable: int
    counts: Mapping[str, int]
    streamed: Streamed | None
    evidence: tuple[Evidence, ...]
    rows: tuple[Injected, ...] = ()
    final_weights: str | None = None


@dataclass
class Policy:
    """One model of a worker. `frozen` is a reference: it is never trained nor sent.

    `dtype` is what the sharded model computes in; its own parameters may be FP32 masters of that.
    """

    model: nn.Module
    experiment: Experiment
    frozen: bool
    dtype: torch.dtype = torch.float32
    streamed: Streamed | None = None
    evidence: list[Evidence] = field(default_factory=list)
    phase_of_streams: Phase = "rollout"
    _streams: Counter[Phase] = field(default_factory=Counter)
    _booked: dict[str, int] = field(default_factory=dict)
    _proven: bool = False

    def __post_init__(self) -> None:
        injection = self.experiment.injection
        before = self.trainable
        nothing = injection is None or injection.is_nothing
        self.attachment: Attachment | None = None if nothing else attach(self.model, injection)  # type: ignore[arg-type]
        if self.trainable != before:
            raise CheckFailed(f"injection changed what is trained: {before} parameters before, {self.trainable} after")
        self.enter(self._home)

    @property
    def trainable(self) -> int:
        """The number of trained values."""
        return sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)

    @property
    def _home(self) -> Phase:
        return "reference" if self.frozen else "training"

    def shard(self, dtype: torch.dtype) -> None:
        """Take note that the model is sharded now, and computes in `dtype`. Raises InvalidValueError for another one
        than the experiment's: trainer and rollouts would round different numbers."""
        described = self.experiment.model.dtype
        if dtype != getattr(torch, described):
            raise InvalidValueError(
                f"verl computes in {str(dtype).removeprefix('torch.')}, and model.dtype is {described};"
                " make them equal (actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype)"
            )
        self.dtype = dtype
        self.enter(self._home)

    def enter(self, phase: Phase) -> None:
        """Switch to a phase."""
        if self.attachment is not None:
            self.attachment.set_phase(phase)

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Switch to a phase for a while: to `reference`, the frozen policy, which a model without its adapters is."""
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(self._home)

    def stream_as(self, phase: Phase) -> None:
        """Let the streams from here on be those of `phase`: rollout, or evaluation, which has no noise."""
        self.phase_of_streams = phase

    @property
    def states(self) -> tuple[SiteState, ...]:
        """The states of the sites."""
        return tuple(self.attachment.states.values()) if self.attachment is not None else ()

    @property
    def acts(self) -> bool:
        """Whether the experiment does anything to this model; without it verl's own streams are right."""
        return self.attachment is not None or self.experiment.noise is not None

    @torch.no_grad()
    def stream(self, step: int, total: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that rollouts compute with after `step` of `total` steps, as `weight_stream` does.

        The noise is on while the stream is read, and gone with its end, whole or broken off. Raises CheckFailed where a
        site that acts was not rounded, where a value is another than its master rounds to, and where a master changed.
        """
        phase, before = self.phase_of_streams, self._elements("weight")
        checked = self._streams[phase] < _CHECKED_STREAMS or self._streams[phase] % _CHECKED_EVERY == 0
        self._streams[phase] += 1
        for part in (part for part in self.model.modules() if isinstance(part, FSDPModule)):
            part.reshard()  # what is still gathered has the weights of before the last update
        tensors = compared = 0
        noise: list[NoiseEvidence] = []
        sigma = 0.0
        try:
            with ExitStack() as held:
                if checked:
                    held.enter_context(weights_unchanged(self.model, phase, step, self.evidence.append))
                self.enter(phase)
                if phase == "rollout":
                    sigma, noise = held.enter_context(self._noisy(step, total))
                by_weight = self._sites_by_weight() if checked else {}
                for name, value in weight_stream(self.model):
                    if name in by_weight:
                        compared += _require_rounding(name, value, *by_weight[name])
                    tensors += 1
                    yield name, value
            rounded = self._require_all_rounded(phase, before)
        finally:
            self.enter(self._home)
        if compared:
            self.evidence.append(Rounded(phase=phase, sites=compared, step=step))
        elements = sum(self._elements("weight").values()) - sum(before.values())
        self.streamed = Streamed(step, phase, tensors, rounded, elements, compared, sigma, *_pooled(noise))

    def report(self, *, trained: bool, last: bool) -> "Report":
        """Return what happened since the last report. Raises CheckFailed, after a step that `trained`, for a site that
        should have acted in training and did not. `last`: with every counter, and the digest of the weights."""
        if trained and not self._proven and self.attachment is not None:
            self.attachment.require_calls()
            self._proven = True
        lines, self.evidence = tuple(self.evidence), []
        table = self.attachment.table if self.attachment is not None else None
        return Report(
            sites=sites(self.attachment),
            active=table.active_sites("training") if table is not None else {},
            trainable=self.trainable,
            counts=self._counts(),
            streamed=self.streamed,
            evidence=lines,
            rows=tuple(self.attachment.evidence()) if last and self.attachment is not None else (),
            final_weights=weights_digest(self.model, self.dtype) if last else None,
        )

    def _counts(self) -> dict[str, int]:
        """Return `phase/point` -> elements rounded since the last call."""
        before, self._booked = self._booked, {}
        for row in self.attachment.evidence() if self.attachment is not None else ():
            key = f"{row.phase}/{row.point}"
            self._booked[key] = self._booked.get(key, 0) + row.elements
        since = {key: count - before.get(key, 0) for key, count in self._booked.items()}
        return {key: count for key, count in since.items() if count}

    def _elements(self, point: str) -> dict[str, int]:
        """Return site -> elements rounded so far, in all phases."""
        states = self.attachment.states.items() if self.attachment is not None else ()
        return {
            name: sum(m.elements for (_, own, _), m in state.meters.items() if own == point) for name, state in states
        }

    def _require_all_rounded(self, phase: Phase, before: dict[str, int]) -> int:
        now = self._elements("weight")
        if self.attachment is None:
            return 0
        active = [name for name, state in self.attachment.states.items() if "weight" in self._points(state, phase)]
        missed = [name for name in active if now[name] == before[name]]
        if missed:
            raise CheckFailed(
                f"weight stream ({phase}): {len(missed)} of {counted(len(active), 'site')} were sent as they are: "
                f"{', '.join(missed[:4])}{' ...' if len(missed) > 4 else ''}"
            )
        return len(active)

    def _points(self, state: Any, phase: Phase) -> frozenset[str]:
        injection = self.experiment.injection
        active = injection.apply_during.active(phase) if injection is not None else frozenset()
        return active.intersection(state.plan.points())

    def _sites_by_weight(self) -> dict[str, tuple[LinearState, Any]]:
        """Return name in the stream -> state and module, for weights whose rounding can be computed again."""
        by_name: dict[str, tuple[LinearState, Any]] = {}
        for path, module in self.model.named_modules():
            state = module.__dict__.get(KEY)
            adapted = hasattr(module, "lora_A") or path.endswith("base_layer")
            if not isinstance(state, LinearState) or isinstance(state, CodesState) or state.has_errors("weight"):
                continue
            # Q(W) + BA is no rounding of one matrix
            if (
                state.plan.weight is not None
                and state.plan.weight.rounding != "stochastic"
                and state.weight_on
                and adapted == isinstance(state, MergedState)
            ):
                by_name[plain_name(f"{path}.weight")] = state, module
        return by_name

    @contextmanager
    def _noisy(self, step: int, total: int) -> Iterator[tuple[float, list[NoiseEvidence]]]:
        noise = self.experiment.noise
        if noise is None:
            yield 0.0, []
            return
        sigma = ScheduleProgress.of(noise, total).sigma(noise, step)
        generator = torch.Generator().manual_seed((self.experiment.seed << 24) + step)
        share = min(step / total, 1.0)
        with perturb(self.model, noise, sigma, generator=generator, share=share, dtype=self.dtype) as evidence:
            if self.attachment is not None:
                self.attachment.invalidate()
            yield sigma, evidence
        self.evidence.append(summary(evidence, sigma, step))
        require_drawn(evidence, sigma)


def _require_rounding(name: str, value: Tensor, state: LinearState, module: Any) -> int:
    """Raise CheckFailed where a streamed value is not what its master rounds to now by numerics alone."""
    wanted = expected(state, "weight", state.master(module).detach())
    sent = state.as_used(value)
    if not torch.equal(sent, wanted):
        differing = int((sent != wanted).sum())
        raise CheckFailed(f"weight stream: {name} is not its master rounded; {differing} of {value.numel()} differ")
    return 1


def _pooled(noise: list[NoiseEvidence]) -> tuple[float, float, int]:
    """Return the realised noise (root mean square), the share of values that it changed, and the number of weights."""
    elements = sum(each.elements for each in noise)
    if not elements:
        return 0.0, 0.0, 0
    power = sum(each.realised**2 * each.elements for each in noise) / elements
    return power**0.5, sum(each.share_changed * each.elements for each in noise) / elements, len(noise)
