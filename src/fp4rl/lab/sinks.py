"""Export of a run's numbers: TensorBoard always, Weights & Biases and MLflow on request."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fp4rl.lab.folders import RunFolder
from fp4rl.lab.status import status_of
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest

_NOT_ALLOWED = re.compile(r"[^\w\-. /:]")  # in a key of MLflow
_MOST_PER_CALL = 1000  # the limit of MLflow's log_batch


class Sink(Protocol):
    """Exports the numbers of each step, exactly as logged, to the last bit of a float64."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Export the numbers of one step."""

    def close(self, *, failed: bool = False) -> None:
        """Write what is buffered, and end the run there."""


class TensorBoardSink:
    """Event files in the run's folder `tensorboard/`.

    Scalars are written as tensors of float64 with the scalar plugin's metadata: the usual `simple_value` is a float32,
    and would export another number than was logged.

    The writer and its thread start with the first step: while the trainer is made, accelerate empties and refills the
    whole environment, and a thread that reads the environment meanwhile crashes the process.

    When a run goes back to an earlier step (a rollback, a resume), a start of session is written, at which TensorBoard
    drops everything from that step on.
    """

    def __init__(self, run: RunFolder) -> None:
        self._folder = run.path / "tensorboard"
        self._writer: Any = None
        self._latest: tuple[int, set[str]] = (-1, set())  # the last step, and the names that it has

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Export the numbers of one step."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.scalar.metadata import create_summary_metadata
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        from tensorboard.util.tensor_util import make_tensor_proto

        latest, names = self._latest
        back = step < latest or (step == latest and not names.isdisjoint(values))
        if self._writer is None or back:
            self._writer = self._writer or EventFileWriter(str(self._folder))
            self._writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        self._latest = (step, set(values) | (names if step == latest and not back else set()))
        shown_as_scalar = create_summary_metadata(display_name=None, description="")
        exported = [
            Summary.Value(tag=name, tensor=make_tensor_proto(np.float64(value)), metadata=shown_as_scalar)
            for name, value in values.items()
        ]
        self._writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=exported)))
        self._writer.flush()

    def close(self, *, failed: bool = False) -> None:  # noqa: ARG002
        """Write what is buffered, and end the run there."""
        if self._writer is not None:
            self._writer.close()


class _WandbSink:
    """One W&B run per run folder, in the project named after the suite; its files are in the run folder."""

    def __init__(self, run: RunFolder, spec: Mapping[str, Any]) -> None:
        import wandb

        run.path.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=run.suite,
            id=run.run_id,
            name=run.run_id,
            dir=str(run.path),
            config=dict(spec),
            resume="allow",
            # Nothing on the terminal: no banner, no summary of every run, no capturing of its output.
            settings=wandb.Settings(silent=True, console="off"),
        )
        # W&B drops what is logged for an earlier step than the last one, so the step is a metric of its own here.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self, *, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


class _MlflowSink:
    """One MLflow run per run folder, in the experiment named after the suite."""

    def __init__(self, run: RunFolder, spec: Mapping[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        known = self._client.get_experiment_by_name(run.suite)
        experiment = known.experiment_id if known else self._client.create_experiment(run.suite)
        before = self._client.search_runs([experiment], f"attributes.run_name = '{run.run_id}'", max_results=1)
        if before:  # a run that resumes after an interruption
            self.mlflow_run_id: str = before[0].info.run_id
            self._client.update_run(self.mlflow_run_id, status="RUNNING")
            return
        self.mlflow_run_id = self._client.create_run(experiment, run_name=run.run_id).info.run_id
        for key, value in spec.items():
            self._client.log_param(self.mlflow_run_id, key, str(value)[:6000])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(allowed_name(name), float(value), now, step) for name, value in values.items()]
        for start in range(0, len(metrics), _MOST_PER_CALL):
            self._client.log_batch(self.mlflow_run_id, metrics=metrics[start : start + _MOST_PER_CALL])

    def close(self, *, failed: bool = False) -> None:
        self._client.set_terminated(self.mlflow_run_id, "FAILED" if failed else "FINISHED")


def allowed_name(name: str) -> str:
    """Return a name as MLflow allows it: other characters than letters, digits and `_-. /:` become `_x40_`."""
    return _NOT_ALLOWED.sub(lambda match: f"_x{ord(match[0]):x}_", name)


_BY_NAME: dict[str, Callable[[RunFolder, Mapping[str, Any]], Sink]] = {"wandb": _WandbSink, "mlflow": _MlflowSink}
_EXTRAS = {"tensorboard": "train"}


def require_sinks(names: Sequence[str]) -> None:
    """Check names of sinks. Raises `InvalidValueError` for an unknown one, `NotFoundError` for a missing package."""
    for name in names:
        if name not in _BY_NAME and name != "tensorboard":
            raise InvalidValueError(f"no sink {name!r}" + nearest(name, ("tensorboard", *_BY_NAME)))
        if find_spec(name) is None:
            raise NotFoundError(f"the sink {name!r} needs its package: pip install 'fp4rl[{_EXTRAS.get(name, name)}]'")


class Sinks:
    """A context manager over all sinks of a run.

    `metrics.jsonl` is the record. A sink that fails during the run (a server that is gone) is left out from then on and
    named in `failures`, since missing curves are no reason to lose hours of training.
    """

    def __init__(self, run: RunFolder, names: Sequence[str] = (), spec: Mapping[str, Any] | None = None) -> None:
        """Open TensorBoard and the sinks `names` ("wandb", "mlflow"). Raises what `require_sinks` raises."""
        require_sinks(("tensorboard", *names))
        self.failures: dict[str, str] = {}
        self._open: dict[str, Sink] = {"tensorboard": TensorBoardSink(run)}
        for name in dict.fromkeys(names):
            if name in _BY_NAME:
                self._open[name] = _BY_NAME[name](run, spec or {})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Export the numbers of one step."""
        self._each(lambda sink: sink.log(step, values))

    def close(self, *, failed: bool = False) -> None:
        """Write what is buffered, and end the run there, as one that `failed` or one that did not."""
        self._each(lambda sink: sink.close(failed=failed))
        self._open.clear()

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self._open.items()):
            try:
                call(sink)
            except Exception as error:  # whatever a client library raises
                if name == "tensorboard":
                    raise
                self.failures[name] = f"{type(error).__name__}: {error}"
                del self._open[name]

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


def close_left_open(suite: Path) -> None:
    """End, in MLflow, what runs of this suite's folder that have died left open there; those that live stay.

    W&B marks such runs as crashed by itself, and files need no closing.
    """
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name(suite.name)
    left = client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'") if experiment else []
    for run in left:
        folder = RunFolder(suite / run.info.run_name)
        if not folder.finished and status_of(folder, None).word != "running":
            client.set_terminated(run.info.run_id, "KILLED")
