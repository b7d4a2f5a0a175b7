"""What a verl run under the plug-in leaves in its `trainer.default_local_dir`, for the ledger.

fp4rl_metrics.jsonl    one object a step: `step`, and the numbers that verl logs under verl's own names, those of the
                       plug-in (fp4rl/...) and of validation (val-core/...) among them
fp4rl_evidence.jsonl   one object a line, of the kinds of a run's evidence.jsonl: what acted; a run that broke off ends
                       with the line that says why
fp4rl_run.json         written last, whole: `spec.records.EngineRun`. Its presence means that the run is finished

Steps that a resumed run takes again are dropped first.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fp4rl.lab.files import append_line, dumps, read_lines, write_lines, write_whole
from fp4rl.lab.provenance import code_digest, versions
from fp4rl.spec.evidence import Evidence
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.records import ENGINE_METRICS, ENGINE_RUN, EngineRun, Sites, Summary, read_evidence

EVIDENCE = "fp4rl_evidence.jsonl"


class RunRecord:
    """The files of one verl run of `steps` steps in all, which begins after the step `begun` (0 for a fresh one)."""

    def __init__(self, folder: Path, experiment: Experiment, sites: Sites, *, steps: int, begun: int = 0) -> None:
        self.folder, self._experiment, self._sites, self._steps = folder, experiment, sites, steps
        self._done, self._started = begun, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ENGINE_RUN).unlink(missing_ok=True)
        for name in (ENGINE_METRICS, EVIDENCE):
            kept = [line for line in read_lines(folder / name) if begun and line.get("step", 0) <= begun]
            write_lines(folder / name, kept)

    def steps(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield the steps that were kept, each with its metrics."""
        for line in read_lines(self.folder / ENGINE_METRICS):
            yield line.pop("step"), {name: float(value) for name, value in line.items()}  # "nan" is a number again

    def evidence(self) -> Iterator[Evidence]:
        """Yield the lines of evidence that were kept."""
        yield from (line for line in map(read_evidence, read_lines(self.folder / EVIDENCE)) if line is not None)

    def add(self, lines: Iterable[Evidence]) -> None:
        """Append lines of evidence."""
        for line in lines:
            append_line(self.folder / EVIDENCE, {"kind": line.kind} | line.as_json())

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the numbers of a step."""
        append_line(self.folder / ENGINE_METRICS, {"step": step, **numbers(metrics)})
        self._done = step

    def finish(self, summary: Summary) -> None:
        """Write the record of the whole run."""
        run = EngineRun(
            engine="verl",
            spec=self._experiment.model_dump(mode="json"),
            seed=self._experiment.seed,
            code_digest=code_digest(),
            versions=versions("verl"),
            steps_asked=self._steps,
            steps_done=self._done,
            sites=self._sites,
            evidence=tuple(read_lines(self.folder / EVIDENCE)),
            summary=summary,
            wall_s=round(time.monotonic() - self._started, 3),
        )
        content = run.model_dump(mode="json", by_alias=True, exclude_none=True)
        write_whole(self.folder / ENGINE_RUN, dumps(content) + "\n")


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are numbers, as verl logs them: also NumPy's and torch's."""
    floats: dict[str, float] = {}
    for name, value in metrics.items():
        if not isinstance(value, str | bytes):
            try:
                floats[name] = float(value)
            except (TypeError, ValueError):
                continue
    return floats
