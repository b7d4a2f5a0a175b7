"""Switches injection and noise together by phase, and checks that neither changes the master weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from fp4rl.inject.attach import Attachment
from fp4rl.noise.evidence import NoiseEvidence, require_drawn, require_noise, summary
from fp4rl.noise.perturb import perturb
from fp4rl.noise.schedule import ScheduleProgress, StageLog
from fp4rl.rl.agreement import require_alike
from fp4rl.rl.sharding import is_sharded, whole
from fp4rl.rl.verify import Record, rounded, weights_unchanged
from fp4rl.spec.evidence import NoiseStages
from fp4rl.spec.injection import Phase
from fp4rl.spec.noise import Noise
from fp4rl.spec.precision import PrecisionSchedule, Stage
from fp4rl.spec.records import NoiseSummary

# Operands are compared with their rounded masters in the first 3 steps, then in every 10th: it rounds all weights once.
_CHECKED_STEPS, _CHECKED_EVERY = 3, 10


@dataclass
class Phases:
    """The phases of one model under one injection and one noise; it begins in training.

    `record` receives evidence. A rollout that changes the master weights raises CheckFailed, and so does described
    noise that did not act.
    """

    model: nn.Module
    attachment: Attachment | None
    noise: Noise | None
    _: KW_ONLY
    seed: int
    total_steps: int
    record: Record
    sigma: float = 0.0
    stages: StageLog = field(default_factory=StageLog)
    _noise_seen: list[NoiseEvidence] = field(default_factory=list)  # one for each rollout, its weights pooled
    _called: set[tuple[Phase, tuple[Stage, ...]]] = field(default_factory=set)
    _step: int | None = None  # of training, from its rollout on
    _rounded: dict[str, int] = field(default_factory=dict)  # values by point, before the step
    _to_check: int | None = None  # the step whose training is still to be compared with its masters

    def __post_init__(self) -> None:
        self.progress = ScheduleProgress.of(self.noise, self.total_steps) if self.noise is not None else None
        self._switch("training")

    @contextmanager
    def rollout(self, step: int, data_epochs: float = 0.0) -> Iterator[None]:
        """Switch to the rollout of `step` (counted from 0): its injection, and new noise on the clean weights.

        `data_epochs`: passes over the training problems so far, which an epoch-aware schedule follows.
        """
        self._step = step
        if self.schedule is not None and self.attachment is not None:
            self._rounded = self.attachment.values_rounded()
        with weights_unchanged(self.model, "rollout", step, self.record) as digest, self.reference("rollout"):
            if not is_sharded(self.model):  # then there is one copy, and each process has another part of it
                require_alike(digest, f"step {step}: the weights")
            with self._noisy(step, data_epochs), whole(self.model, self.attachment):
                yield
                # While the noise is still on, since it is part of the policy that sampled.
                self._to_check = self._require_rounded(step)
            self.require_calls("rollout")

    @property
    def schedule(self) -> PrecisionSchedule | None:
        """How the precision changes over the steps, if it does."""
        return self.attachment.table.injection.schedule if self.attachment is not None else None

    def precision(self) -> dict[str, float]:
        """Return, of each point whose precision changes, lambda at this step and the values rounded in it so far."""
        if self.schedule is None or self.attachment is None:
            return {}
        counts, points = self.attachment.values_rounded(), self.schedule.points
        shares = {f"injection/{point}_share": own.share(self._step) for point, own in points.items()}
        since = {point: counts.get(point, 0) - self._rounded.get(point, 0) for point in points}
        return shares | {f"injection/{point}_rounded": float(count) for point, count in since.items()}

    @property
    def scores_with_noise(self) -> bool:
        """Whether the loss uses the log-probabilities that the noisy sampler gave."""
        return self.noise is not None and self.noise.logprobs == "noisy"

    @contextmanager
    def reference(self, phase: Phase = "reference") -> Iterator[None]:
        """Switch to the precision of a frozen policy: unquantized, or that of another `phase`."""
        self._switch(phase)
        try:
            yield
        finally:
            self._switch("training")

    @contextmanager
    def as_sampled(self, step: int) -> Iterator[None]:
        """Switch to the sampler of `step` again: injection as in rollouts, and the same noise."""
        assert self.noise is not None
        with self.reference("rollout"), self._perturbed(self.noise, step):
            yield

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """Switch to the unquantized model, leaving no trace in counters or random states."""
        before = self.attachment.state_dict() if self.attachment is not None else {}
        with self.reference():
            yield
        if self.attachment is not None:
            self.attachment.load_state_dict(before)

    def weights_changed(self) -> None:
        """Drop cached rounded weights; to be called after every optimizer step and every load."""
        if self.attachment is not None:
            self.attachment.invalidate()

    def require_calls(self, phase: Phase) -> None:
        """Raise CheckFailed, once a phase and stage of precision, for a site that should act and did not. Training's
        operands are compared with their masters once in each step whose rollout was."""
        if self.attachment is None:
            return
        now = phase, self.schedule.stage(self._step) if self.schedule is not None else ()
        if now not in self._called:
            self._called.add(now)
            self.attachment.require_calls()
        if phase == "training" and self._to_check is not None:
            with whole(self.model, self.attachment):
                self._require_rounded(self._to_check)
            self._to_check = None

    def _require_rounded(self, step: int) -> int | None:
        """Compare operands with their rounded masters in the first steps, every tenth and where the precision enters
        another stage; return the step if it did."""
        new = self.schedule is not None and self.schedule.stage(step) != self.schedule.stage(max(step - 1, 0))
        if self.attachment is None or not (step < _CHECKED_STEPS or step % _CHECKED_EVERY == 0 or new):
            return None
        self.record(rounded(self.attachment, step))
        return step

    def noise_summary(self) -> NoiseSummary | None:
        """Return a summary of the whole run's noise, None without noise: largest sigma, shares of weights changed."""
        if self.noise is None:
            return None
        seen = self._noise_seen
        return NoiseSummary(
            rollouts=len(seen),
            noisy_rollouts=sum(rollout.share_changed > 0 for rollout in seen),
            largest_sigma=max((rollout.sigma for rollout in seen), default=0.0),
            largest_realised=max((rollout.realised for rollout in seen), default=0.0),
            mean_share_changed=sum(rollout.share_changed for rollout in seen) / max(len(seen), 1),
        )

    def state(self) -> dict[str, Any]:
        """Return, for JSON, the state that a resumed run needs to end like an uninterrupted one."""
        return {
            "noise": [asdict(rollout) for rollout in self._noise_seen],
            "stages": self.stages.ran,
            "course": [p.epoch, p.begun, p.length.numerator, p.length.denominator] if (p := self.progress) else None,
            "injection": self.attachment.state_dict() if self.attachment is not None else {},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a `state`, after its weights were loaded."""
        self._noise_seen = [NoiseEvidence(**rollout) for rollout in state["noise"]]
        self.stages = StageLog([(sigma, count) for sigma, count in state["stages"]])
        if self.progress is not None:
            epoch, begun, *length = state["course"]
            self.progress = replace(self.progress, epoch=epoch, begun=begun, length=Fraction(*length))
        if self.attachment is not None:
            self.attachment.load_state_dict(state["injection"])

    def _switch(self, phase: Phase) -> None:
        if self.attachment is not None:
            self.attachment.set_phase(phase, self._step)

    @contextmanager
    def _noisy(self, step: int, data_epochs: float) -> Iterator[None]:
        if self.noise is None or self.progress is None:
            yield
            return
        self.progress = self.progress.at(step, data_epochs)
        self.sigma = self.progress.sigma(self.noise, step)
        with self._perturbed(self.noise, step) as evidence:
            yield
        self.stages.note(self.sigma)
        if evidence:
            self._noise_seen.append(_pooled(evidence))
        self.record(summary(evidence, self.sigma, step))
        require_drawn(evidence, self.sigma)

    @contextmanager
    def _perturbed(self, noise: Noise, step: int) -> Iterator[list[NoiseEvidence]]:
        # Seeded by (seed, step), so that a resumed run and every rank draw the same noise.
        generator = torch.Generator().manual_seed((self.seed << 24) + step)
        share = step / self.total_steps
        try:
            with perturb(self.model, noise, self.sigma, generator=generator, share=share) as evidence:
                self.weights_changed()
                yield evidence
        finally:
            self.weights_changed()

    def finish(self) -> None:
        """Check at the end of a run that the described noise acted, and that a control's did not."""
        if self.noise is None:
            return
        missed = self.stages.missed(self.noise.schedule, self.total_steps)
        self.record(NoiseStages(ran=tuple(self.stages.ran), missed=missed))
        require_noise(self.noise, [[rollout] for rollout in self._noise_seen])


def _pooled(evidence: Sequence[NoiseEvidence]) -> NoiseEvidence:
    """Return the noisy weights of one rollout pooled into one: their largest noise, and the share changed of all."""
    elements = sum(weight.elements for weight in evidence)
    return replace(
        max(evidence, key=lambda weight: weight.sigma),
        name="all",
        layer=None,
        realised=max(weight.realised for weight in evidence),
        share_changed=sum(weight.share_changed * weight.elements for weight in evidence) / elements,
        elements=elements,
    )
