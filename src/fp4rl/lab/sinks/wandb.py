"""Weights & Biases, online or offline as its own settings say."""

from collections.abc import Mapping
from typing import Any

from fp4rl.lab.folders import RunFolder


class WandbSink:
    """One W&B run per run folder, in the project named after the suite; its files lie in the run folder."""

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
            # The terminal is the suite's: no banner, no summary of every run, and nothing of it taken over.
            settings=wandb.Settings(silent=True, console="off"),
        )
        # A step of W&B's own must never go back, and what is logged to an earlier one is dropped; ours is a metric.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()
