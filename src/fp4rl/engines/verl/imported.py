"""Take a finished verl run in as a run of the ledger: its record as it is, its final weights evaluated here.

What is evaluated are the weights that verl saved, and only where they are, bit for bit, those that it trained last.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from fp4rl.lab.files import damage_named, read_lines, write_lines
from fp4rl.lab.folders import RunFolder, run_folder
from fp4rl.lab.guards import locked
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.provenance import code_digest, versions
from fp4rl.lab.runner import keep_suite
from fp4rl.spec.errors import CheckFailed, InvalidValueError, NotFoundError, require_finite, shown
from fp4rl.spec.evidence import Evidence, LiveCheck, Warned
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.load import parse
from fp4rl.spec.records import ENGINE_METRICS, ENGINE_RUN, VERSION, EngineRun, RunResult, Summary, read_engine_run

OnItems = Callable[[str, int, int], None]
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class VerlRun:
    """A finished verl run as its folder holds it."""

    folder: Path
    experiment: Experiment
    record: EngineRun
    metrics: tuple[Mapping[str, Any], ...]

    def planned(self, suite: str | None = None, arm: str | None = None) -> PlannedRun:
        """Return it as the run of an arm; it has the id that the arm of a suite with `engine: verl` has.

        By default suite and arm are those of its record, else its folder and `run`.
        """
        suite = suite or self.record.suite or self.folder.resolve().name
        return PlannedRun(suite, arm or self.record.arm or "run", self.record.seed, self.experiment)


def is_verl_run(path: Path) -> bool:
    """Return whether `path` is the folder of a verl run under the plug-in, or its record."""
    return path.name == ENGINE_RUN or any((path / name).is_file() for name in (ENGINE_RUN, ENGINE_METRICS))


def read_verl_run(path: Path) -> VerlRun:
    """Read the files in a run's `trainer.default_local_dir`.

    Raises InvalidValueError for a run that is not finished, and for files that are damaged.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / ENGINE_RUN).is_file():
        raise InvalidValueError(
            f"{folder}: no {ENGINE_RUN}, so this run of verl is not finished; its {ENGINE_METRICS} is a log like others"
        )
    with damage_named(folder / ENGINE_RUN) as file:
        record = read_engine_run(json.loads(file.read_text(encoding="utf-8")))
        record.lines  # noqa: B018 - damage shows now
    experiment = parse(Experiment, {**record.spec, "engine": record.engine, "seed": record.seed}, str(file))
    with damage_named(folder / ENGINE_METRICS) as file:
        metrics = tuple(read_lines(file))
        for number, row in enumerate(metrics, 1):
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise ValueError(f"line {number} has no step: {shown(row)}")
    return VerlRun(folder, experiment, record, metrics)


def saved_weights(run: VerlRun) -> Path:
    """Return the folder of the final weights in Hugging Face's form. Raises NotFoundError, with the way to make one."""
    actor = run.folder / f"global_step_{run.record.steps_done}" / "actor"
    # with adapters verl's `huggingface` holds weights under peft's names, which no tool reads
    folders = [actor / "lora_adapter"]
    if run.experiment.model.lora is None:
        folders.append(actor / "huggingface")
    for folder in folders:
        if any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
            return folder
    from fp4rl.models.fit import joining_shards

    joining = joining_shards(actor)
    cure = (
        f"write them by `{joining}` (in bfloat16 alone) and name that folder with --model"
        if joining
        else "name their folder with --model; verl keeps it with actor.checkpoint.save_contents=[model,hf_model]"
    )
    raise NotFoundError(f"{actor}: the weights after the last step are not here in Hugging Face's form; {cure}")


def take_in(run: VerlRun, planned: PlannedRun, root: Path, weights: Path, on_items: OnItems) -> tuple[RunFolder, bool]:
    """Write the run folder below `root`, with an evaluation of `weights`; return it, and whether it was there already.

    Raises InvalidValueError where the same experiment is here with other final weights, and CheckFailed where `weights`
    are not what was trained last, before anything is written.
    """
    folder, trained = run_folder(root, planned.suite, planned.run_id), run.record.summary.final_weights
    if folder.finished:
        if folder.result().evidence.final_weights != trained:
            raise InvalidValueError(
                f"{folder.key} is here already with other weights; remove {folder.path} to replace it"
            )
        return folder, True
    with _on_its_base(weights, run.experiment) as weights:
        proof = _require_trained(weights, run.experiment, trained)
        return _taken_in(run, planned, root, weights, proof, on_items)


def _taken_in(
    run: VerlRun, planned: PlannedRun, root: Path, weights: Path, proof: tuple[Evidence, ...], on_items: OnItems
) -> tuple[RunFolder, bool]:
    folder = run_folder(root, planned.suite, planned.run_id)
    with locked(folder):
        for left in folder.path.iterdir():  # of an import that was interrupted
            if left.name != ".lock":
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        spec = run.experiment.model_dump(mode="json")
        folder.write_spec(yaml.safe_dump(spec, sort_keys=False))
        folder.write_sites(run.record.sites)
        write_lines(folder.path / "metrics.jsonl", run.metrics)
        for line in (*run.record.lines, *proof):
            folder.add_evidence(line)
        shutil.copytree(weights, folder.path / "final")
        summary = _evaluate(run, folder, folder.path / "final", root, on_items)
        if not (root / planned.suite / "suite.yaml").is_file() and planned.arm == "run":
            keep_suite(root, planned.suite, spec)
        folder.write_result(_result(run.record, planned, folder, summary))
    return folder, False


@contextmanager
def _on_its_base(weights: Path, experiment: Experiment) -> Iterator[Path]:
    """Yield the folder, or a copy of an adapter that names the experiment's model as its base: verl's names none."""
    config = weights / "adapter_config.json"
    if not config.is_file() or (content := json.loads(config.read_text()))["base_model_name_or_path"] is not None:
        yield weights
        return
    with TemporaryDirectory() as scratch:
        copy = shutil.copytree(weights, Path(scratch) / "adapter")
        content["base_model_name_or_path"] = str(Path(experiment.model.path or "").absolute())
        (copy / config.name).write_text(json.dumps(content))
        yield copy


def _require_trained(weights: Path, experiment: Experiment, trained: str | None) -> tuple[Evidence, ...]:
    """Return the proof that the folder holds what was trained last; none where the run recorded no digest of that."""
    import torch

    from fp4rl.rl.verify import weights_digest

    if trained is None:
        return ()
    # peft holds adapters in float32; the record is of their copies in the model's dtype
    digest = weights_digest(_opened(weights, experiment), getattr(torch, experiment.model.dtype))
    if digest != trained:
        raise CheckFailed(
            f"{weights} does not hold the weights that verl trained last (digest {digest}, recorded {trained}); name "
            "their folder with --model. verl's model merger writes bfloat16: of a float32 run save hf_model instead"
        )
    return (LiveCheck(max_difference=0.0, compared="weights"),)


def _opened(folder: Path, experiment: Experiment) -> Any:
    """Load a model as it is trained: of a multimodal one the text alone."""
    from fp4rl.rl.verify import load_saved
    from fp4rl.sites.modalities import freeze_other_modules

    model, _ = load_saved(folder, experiment.model.dtype, None, experiment.model.experts_implementation)
    freeze_other_modules(model)
    return model


def _evaluate(run: VerlRun, folder: RunFolder, weights: Path, root: Path, on_items: OnItems) -> Summary:
    """Evaluate the start and the final weights as `fp4rl run` does, into the folder; return the summary, with the share
    of the weights that training changed."""
    from fp4rl.rl.evaluate import evaluation_runner
    from fp4rl.rl.inputs import of_model, start_folder
    from fp4rl.rl.verify import share_changed

    experiment, summary, runner = run.experiment, run.record.summary, evaluation_runner(run.experiment)
    start = start_folder(experiment.model, experiment.task, root / "models")
    steps = {0: start, run.record.steps_done: weights}
    if not start.is_dir() or of_model(start) != summary.inputs.get("start model"):
        steps.pop(0)
        line = f"step 0 is not evaluated: {start} is not here as the run began with it"
        folder.add_evidence(Warned(line=line))
    elif experiment.model.lora is None:  # a fresh adapter is drawn where it is trained
        share = share_changed(_opened(start, experiment), _opened(weights, experiment), folder.add_evidence)
        summary = summary.extended(weights_changed=share)
    for step, model in steps.items():
        last = model is weights
        for evaluation in runner.run(model, experiment.model.dtype, step, last, on_items, folder.add_evidence):
            folder.write_items(step, evaluation.profile.name, [asdict(item) for item in evaluation.items])
            folder.add_evidence(evaluation.summary())
    return summary


def _result(record: EngineRun, planned: PlannedRun, folder: RunFolder, summary: Summary) -> RunResult:
    """Return the result: verl's own, completed by what was evaluated here, and with what."""
    own, here = record.code_digest, code_digest()
    result = RunResult(
        version=VERSION,
        run_id=planned.run_id,
        suite=planned.suite,
        arm=planned.arm,
        seed=planned.seed,
        spec_digest=planned.spec_digest,
        code_digest=own if own == here else f"{own}, evaluated by {here}",
        versions=record.versions,
        evaluated_with=versions(),
        evaluations=folder.evaluations(),
        evidence=summary,
        steps_asked=record.steps_asked,
        steps_done=record.steps_done,
        wall_s=record.wall_s,
    )
    require_finite("result", result.as_json())
    return result
