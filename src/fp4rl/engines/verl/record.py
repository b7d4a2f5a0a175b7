"""What a verl run under the plug-in leaves in its `trainer.default_local_dir`, for the ledger.

fp4rl_run.json         written at the start and again after every step, whole:
    state              running, finished or failed; `why` says why it failed
    spec               the experiment, with all its defaults
    sites              the resolved table as in a run's sites.json: {"digest", "plans", "left_out"}
    result             as in a run's result.json, without evaluations: seed, digests, versions (verl's among them),
                       steps asked and done, and the summary of the evidence
fp4rl_metrics.jsonl    one object a step, `step` and verl's metrics under verl's names, those of the plug-in (fp4rl/...)
                       and validation (val-core/...) among them
fp4rl_evidence.jsonl   one object a line, of the kinds of a run's evidence.jsonl: what acted, site by site

Times in seconds and losses are verl's own. Steps that a resumed run takes again are dropped first.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from fp4rl.lab.files import append_line, dumps, read_lines, write_lines, write_whole
from fp4rl.lab.provenance import code_digest, versions
from fp4rl.spec.digest import digest
from fp4rl.spec.evidence import Evidence
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.records import VERSION, RunResult, Sites, Summary

RUN, METRICS, EVIDENCE = "fp4rl_run.json", "fp4rl_metrics.jsonl", "fp4rl_evidence.jsonl"


class RunRecord:
    """The files of one verl run of `steps` steps in all, which begins after the step `begun` (0 for a fresh one)."""

    def __init__(self, folder: Path, experiment: Experiment, sites: Sites, *, steps: int, begun: int = 0) -> None:
        self.folder, self._experiment, self._sites = folder, experiment, sites
        self._steps, self._done = steps, begun
        folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, EVIDENCE):  # of steps that are taken again, and of a run that was here before
            kept = [line for line in read_lines(folder / name) if begun and line.get("step", 0) <= begun]
            write_lines(folder / name, kept)

    def add(self, lines: Iterable[Evidence]) -> None:
        """Append lines of evidence."""
        for line in lines:
            append_line(self.folder / EVIDENCE, {"kind": line.kind} | line.as_json())

    def step(self, step: int, metrics: Mapping[str, Any], summary: Summary) -> None:
        """Append the numbers of a step, and write the state of the run after it."""
        numbers = {name: float(value) for name, value in metrics.items() if _is_number(value)}
        append_line(self.folder / METRICS, {"step": step, **numbers})
        self._done = step
        self.write("finished" if step >= self._steps else "running", summary)

    def write(self, state: Literal["running", "finished", "failed"], summary: Summary, why: str | None = None) -> None:
        """Write the state of the run."""
        result = RunResult(
            version=VERSION,
            seed=self._experiment.seed,
            spec_digest=digest(self._experiment),
            code_digest=code_digest(),
            versions=versions("verl"),
            evidence=summary,
            steps_asked=self._steps,
            steps_done=self._done,
        )
        content = {
            "state": state,
            "why": why,
            "spec": self._experiment.model_dump(mode="json"),
            "sites": self._sites.as_json(),
            "result": result.as_json(),
        }
        write_whole(self.folder / RUN, dumps(content) + "\n")


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str)
