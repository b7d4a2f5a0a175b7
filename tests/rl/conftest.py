"""Small experiments that still go the whole way: a warmed-up embedded model, real rollouts, real updates."""

from pathlib import Path

import pytest
import torch

from fp4rl.rl import events
from fp4rl.rl.inputs import warmed_up
from fp4rl.rl.train import train
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.frozen import Record
from fp4rl.spec.load import merge
from planted import small

SMALL = small.SMALL | {
    "evaluation": {
        "count": 24,
        "max_new_tokens": 6,
        "profiles": ["full", "deployment"],
        "deployment": "compressed_tensors",
    },
}
NOISE = {"schedule": {"kind": "constant", "sigma": 0.05}}
ARMS = {
    "bf16": {},
    "w4a16": {"injection": {"mode": "w4a16", "deployment": "compressed_tensors"}},
    "w4a16+aqn": {"injection": {"mode": "w4a16", "deployment": "compressed_tensors"}, "noise": NOISE},
    "w4a4": {"injection": {"mode": "w4a4", "deployment": "compressed_tensors"}},
}


class Heard:
    """Everything that a run emitted."""

    def __init__(self):
        self.steps, self.evaluations, self.records, self.sites, self.lines = [], [], [], [], []

    def __call__(self, event):
        match event:
            case events.StepDone(step, metrics):
                self.steps.append((step, metrics))
            case events.Evaluated(evaluation):
                self.evaluations.append(evaluation)
            case events.SitesResolved(sites):
                self.sites.append(sites.as_json())
            case events.Message(line, False):
                self.lines.append(line)
            case Record():
                self.records.append({"kind": event.kind} | event.as_json())

    def of(self, kind):
        return [record for record in self.records if record["kind"] == kind]


@pytest.fixture(scope="session")
def model_cache(shared_tmp) -> Path:
    """Of two workers that ask for a model at once, one makes it and the other waits (`models.tiny.cached`)."""
    folder = shared_tmp / "models-of-rl"
    folder.mkdir(exist_ok=True)  # a test that runs alone links to it before any model is made
    return folder


@pytest.fixture(scope="session")
def experiment():
    """`experiment(arm, training={...})` -> a small Experiment of that arm."""

    def described(arm="bf16", **changes):
        return Experiment.model_validate(merge(merge(SMALL, ARMS[arm]), changes))

    return described


@pytest.fixture
def start_folder(model_cache, experiment) -> Path:
    """The folder that runs of `experiment` start from; the cache may hold other models too."""
    described = experiment("bf16")
    return warmed_up(described.model.embedded, described.task, model_cache)


@pytest.fixture
def heard():
    """For a run that fails: `run(experiment, heard=heard)`."""
    return Heard()


@pytest.fixture
def run(model_cache, tmp_path):
    """`run(experiment)` -> (Trained, Heard)."""

    def go(described, name="run", heard=None):
        torch.set_num_threads(1)
        heard = heard or Heard()
        return train(described, tmp_path / name, model_cache, heard), heard

    return go
