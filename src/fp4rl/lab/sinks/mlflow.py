"""MLflow, at the tracking address that MLflow's own settings name."""

import re
import time
from collections.abc import Mapping
from typing import Any

from fp4rl.lab.folders import RunFolder

_NOT_ALLOWED = re.compile(r"[^\w\-. /:]")
_MOST_PER_CALL = 1000  # the limit of log_batch


class MlflowSink:
    """One MLflow run per run folder, in the experiment named after the suite."""

    def __init__(self, run: RunFolder, spec: Mapping[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        known = self._client.get_experiment_by_name(run.suite)
        experiment = known.experiment_id if known else self._client.create_experiment(run.suite)
        before = self._client.search_runs([experiment], f"attributes.run_name = '{run.run_id}'", max_results=1)
        if before:  # a run that goes on after it was interrupted
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

    def close(self) -> None:
        self._client.set_terminated(self.mlflow_run_id)


def allowed_name(name: str) -> str:
    """MLflow allows letters, digits and `_-. /:` in a key; other characters become `_x40_`, so no two names collide."""
    return _NOT_ALLOWED.sub(lambda match: f"_x{ord(match[0]):x}_", name)
