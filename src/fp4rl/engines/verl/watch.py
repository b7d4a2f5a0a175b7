"""What the driver of a verl run makes of its workers' reports: proof that all acted, metrics, health, the record."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp4rl.engines.verl.beyond import beyond_weights
from fp4rl.engines.verl.policy import Report, Streamed
from fp4rl.engines.verl.record import RunRecord, numbers
from fp4rl.rl.health.findings import ORDER
from fp4rl.rl.health.monitor import Monitor, action
from fp4rl.rl.inputs import of_model, pointed_at
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.evidence import Evidence, HealthFinding, Injected, RolloutNoise
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.records import HealthSummary, NoiseSummary, Summary

Say = Callable[[str], None]


@dataclass
class RunWatch:
    """Follows a run of `steps` steps that begins after `begun`; `say` prints one line."""

    experiment: Experiment
    folder: Path
    steps: int
    begun: int
    say: Say
    stopped: bool = False
    _record: RunRecord | None = None
    _next: Streamed | None = None  # what the rollouts of the next step sample with
    _noise: list[RolloutNoise] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._monitor = Monitor(self.experiment.health)

    def opened(self, reports: Sequence[Report]) -> None:
        """Take the reports after the first stream of weights, before any step; the record begins here."""
        first = _alike(reports)
        self._record = RunRecord(self.folder, self.experiment, first.sites, steps=self.steps, begun=self.begun)
        for step, metrics in self._record.steps():  # of a run that is resumed
            self._monitor.observe(step, metrics)
        self._noise += [line for line in self._record.evidence() if isinstance(line, RolloutNoise)]
        self._take(reports)
        self._require_streamed(self.begun)
        plans, left = first.sites.plans or (), first.sites.left_out
        self.say(
            f"fp4rl: {len(plans)} sites on each of {len(reports)} ranks, {len(left)} left out, "
            f"{first.trainable} parameters trained, {self.folder}"
        )

    def stepped(self, step: int, reports: Sequence[Report]) -> dict[str, float]:
        """Take the reports after the step and the stream that followed it; return the step's own metrics."""
        sampled, first = self._next, _alike(reports)
        self._take(reports)
        self._require_streamed(step)
        self._require_trained(step, reports)
        self._require_rolled(step, reports)
        metrics: dict[str, float] = {
            "fp4rl/sites": len(first.sites.plans or ()),
            "fp4rl/ranks": len(reports),
            "fp4rl/trainable": first.trainable,
        }
        for key in sorted({key for report in reports for key in report.counts}):
            metrics[f"fp4rl/elements/{key}"] = sum(report.counts.get(key, 0) for report in reports)
        return metrics | (_of_stream(sampled) if sampled is not None else {})

    def resynced(self, reports: Sequence[Report]) -> None:
        """Take the reports after a stream for or after a validation."""
        self._take(reports)

    def judged(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Judge the health of a step by all its metrics; return the verdict as metrics, and write both down."""
        findings = self._monitor.observe(step, numbers(metrics))
        for finding in findings:
            self.say(f"fp4rl: {finding}")
        verdict = {
            "fp4rl/health/state": float(ORDER[self._monitor.state]),
            "fp4rl/health/alarms": float(len(self._monitor.alarms)),
        }
        self._require_record().add(HealthFinding(**vars(finding)) for finding in findings)
        self._require_record().step(step, {**metrics, **verdict})
        if action(findings) != "note":  # there is no way back to a checkpoint inside verl: a rollback stops too
            self.stopped = True
            self.say(f"fp4rl: the run ends after step {step}, as health.policies says")
        return verdict

    def closed(self, reports: Sequence[Report]) -> None:
        """Take the last reports, with all counters, and finish the record."""
        self._take(reports)
        rows = _summed([report.rows for report in reports])
        calls: dict[str, int] = {}
        for row in rows:
            calls[row.phase] = calls.get(row.phase, 0) + row.calls
        first = _alike(reports)
        record = self._require_record()
        record.add(rows)
        alarms = tuple(HealthFinding(**vars(finding)) for finding in self._monitor.alarms)
        summary = Summary(
            sites=len(first.sites.plans or ()),
            calls=calls,
            masters_unchanged=True,
            inputs=_inputs(self.experiment),
            final_weights=first.final_weights,
            noise=self._noise_summary(),
            health=HealthSummary(state="alarm" if alarms else self._monitor.state, alarms=alarms),
            processes=len(reports),
        )
        record.finish(summary)

    def failed(self, line: Evidence) -> None:
        """Write down why the run broke off."""
        if self._record is not None:
            self._record.add([line])

    def _require_record(self) -> RunRecord:
        if self._record is None:
            raise CheckFailed("a step was taken before any weights were streamed to the rollouts")
        return self._record

    def _take(self, reports: Sequence[Report]) -> None:
        first = reports[0]
        self._require_record().add(first.evidence)  # the others say the same of their parts of the weights
        self._noise += [line for line in first.evidence if isinstance(line, RolloutNoise)]
        if first.streamed is not None and first.streamed.phase == "rollout":
            self._next = first.streamed

    def _require_streamed(self, step: int) -> None:
        """Raise CheckFailed unless the rollouts have rounded, noisy weights of after `step`."""
        injection, noise, sent = self.experiment.injection, self.experiment.noise, self._next
        if (injection is None or injection.is_nothing) and noise is None:
            return
        if sent is None:
            raise CheckFailed("no weights were streamed by the plug-in: rollouts would sample with unrounded ones")
        if sent.step != step:
            raise CheckFailed(f"the rollouts hold the weights of after step {sent.step}, and {step} steps are done")
        rounds = injection is not None and "weight" in injection.apply_during.active("rollout")
        if rounds and injection is not None and injection.weight is not None and not sent.elements:
            raise CheckFailed(
                "the stream rounded no value of any weight, and the experiment rounds weights in rollouts"
            )
        if noise is not None and not sent.noisy_weights:
            raise CheckFailed("the stream put noise on no weight, and the experiment has noise")

    def _require_trained(self, step: int, reports: Sequence[Report]) -> None:
        """Raise CheckFailed where a point that acts in training rounded nothing on some rank in this step."""
        for rank, report in enumerate(reports):
            for point, number in report.active.items():
                if number and not report.counts.get(f"training/{point}"):
                    raise CheckFailed(
                        f"step {step}: {point} acts at {number} sites in training, and rank {rank} rounded no value"
                    )

    def _require_rolled(self, step: int, reports: Sequence[Report]) -> None:
        """Raise CheckFailed where the rollout engines rounded nothing of what they round themselves in this step."""
        for point in beyond_weights(self.experiment, "rollout"):
            if not any(report.counts.get(f"rollout/{point}") for report in reports):
                raise CheckFailed(f"step {step}: {point} acts in rollouts, and verl's rollout engines rounded no value")

    def _noise_summary(self) -> NoiseSummary | None:
        if self.experiment.noise is None:
            return None
        sizes = [max((layer.realised for layer in line.layers), default=0.0) for line in self._noise]
        return NoiseSummary(
            rollouts=len(self._noise),
            noisy_rollouts=sum(line.share_changed > 0 for line in self._noise),
            largest_sigma=max((line.sigma for line in self._noise), default=0.0),
            largest_realised=max(sizes, default=0.0),
            mean_share_changed=sum(line.share_changed for line in self._noise) / max(len(self._noise), 1),
        )


def _inputs(experiment: Experiment) -> dict[str, str]:
    """Return the digests of what the run was made from, as runs of TRL record them."""
    path = experiment.model.path
    start = {"start model": of_model(Path(path))} if path is not None and Path(path).is_dir() else {}
    return start | pointed_at(experiment)


def _of_stream(sent: Streamed) -> dict[str, float]:
    return {
        "fp4rl/stream/step": sent.step,
        "fp4rl/stream/tensors": sent.tensors,
        "fp4rl/stream/sites": sent.sites,
        "fp4rl/stream/elements": sent.elements,
        "fp4rl/stream/compared": sent.compared,
        "fp4rl/noise/sigma": sent.sigma,
        "fp4rl/noise/realised": sent.realised,
        "fp4rl/noise/share_changed": sent.share_changed,
        "fp4rl/noise/weights": sent.noisy_weights,
    }


def _alike(reports: Sequence[Report]) -> Report:
    """Return the first report. Raises CheckFailed where the workers are not under the same injection."""
    if not reports:
        raise CheckFailed("no worker reported: the plug-in was not applied")
    for rank, report in enumerate(reports):
        if (report.sites.digest, report.trainable) != (reports[0].sites.digest, reports[0].trainable):
            raise CheckFailed(f"rank {rank} has other sites or trained parameters than rank 0: not one policy")
        if report.final_weights != reports[0].final_weights:
            raise CheckFailed(f"rank {rank} ended with other weights than rank 0: not one policy")
    return reports[0]


def _summed(ranks: Sequence[Sequence[Injected]]) -> list[Injected]:
    """Return the counters of all ranks added up, shares and errors as their means. Raises CheckFailed for a point that
    acted on one rank and not on another: of a rollout engine that got no problem, its weights alone did."""
    tables = [{(row.phase, row.site, row.point): row for row in rows} for rows in ranks]
    summed = []
    for key, row in {key: row for table in reversed(tables) for key, row in table.items()}.items():
        same = [table.get(key) for table in tables]
        by_engines = row.phase in ("rollout", "evaluation") and row.point != "weight"
        if not all(same) and not by_engines:
            raise CheckFailed(f"rank {same.index(None)} did not round {row.site} ({row.point}) during {row.phase}")
        known = [each for each in same if each is not None]
        more = {
            name: sum(getattr(each, name) or 0 for each in known) for name in ("calls", "elements", "looks", "missed")
        }
        means = {name: _mean([getattr(each, name) for each in known]) for name in ("share_changed", "relative_error")}
        summed.append(row.extended(**more, **means))
    return summed


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
