"""A run that was interrupted and goes on ends like one that never was: bit-equal metrics, evaluations and evidence."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch
import yaml

from fp4rl.lab import work
from fp4rl.lab.folders import all_runs, run_folder
from fp4rl.lab.matrix import single
from fp4rl.lab.work import execute_run
from fp4rl.rl import checkpoints
from fp4rl.rl import session as session_room
from fp4rl.rl.checkpoints import EVERY_S, SaveClock
from fp4rl.rl.events import Interrupted
from fp4rl.rl.inputs import inputs
from fp4rl.rl.trainer import Trainer
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.experiment import Experiment

STEPS = 4
HARD = {  # everything that has a state of its own
    "training": {
        "steps": STEPS,
        "save_freq": 1,
        "lr": 2e-3,
        "lr_scheduler": "cosine",
        "filter_groups": {"enable": True, "max_num_gen_batches": 2},
    },
    "evaluation": {"count": 8, "profiles": ["deployment"]},
    "noise": {"schedule": {"kind": "geometric", "sigma_start": 0.05, "sigma_end": 0.01, "num_stages": 3}},
    "injection": {
        "mode": "w4a16",
        "deployment": "compressed_tensors",
        "errors": [{"kind": "relative", "scale": 0.01, "targets": {"take": ["*down_proj"]}}],
    },
}


class Killed(BaseException):
    """Not an Exception: nothing may catch it, like a kill."""


@pytest.fixture
def carried(experiment, model_cache, tmp_path, monkeypatch):
    """`carried(name, stop_at=None)` -> the folder after a run below `tmp_path/name`; it may be interrupted."""

    def go(name, stop_at=None, described=None, interrupted=lambda: False, **changes):
        torch.set_num_threads(1)
        (tmp_path / name).mkdir(exist_ok=True)
        if not (tmp_path / name / "models").exists():
            (tmp_path / name / "models").symlink_to(model_cache)
        planned = single(described or experiment("bf16", **{**HARD, **changes}), "trial")
        with monkeypatch.context() as patch:
            if stop_at is not None:
                patch.setattr(Trainer, "_sample", _interrupting(Trainer._sample, stop_at))
            try:
                return execute_run(planned, tmp_path / name, interrupted=interrupted)
            except (Killed, Interrupted):
                return run_folder(tmp_path / name, planned.suite, planned.run_id)

    return go


def _interrupting(sample, step):
    def interrupted(self, problems):
        if self.step == step:
            raise Killed
        return sample(self, problems)

    return interrupted


@pytest.fixture(scope="module")
def kept():
    """The uninterrupted run's numbers, made once."""
    return {}


def numbers(folder):
    metrics = {
        step: {name: value for name, value in values.items() if not name.startswith("time/")}
        for step, values in folder.metrics().items()
    }
    items = {f"{step}-{name}": folder.items(step, name).to_pylist() for step, name in folder.item_sets()}
    marks_aside = [str(line) for line in folder.evidence() if line.kind not in ("checkpoint", "reused")]
    return json.dumps([metrics, str(folder.result().evaluations), str(folder.result().evidence), items, marks_aside])


def whole(carried, kept):
    if not kept:
        kept["folder"] = carried("whole")
        kept["numbers"] = numbers(kept["folder"])
    return kept["numbers"]


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_an_interrupted_run_ends_in_the_same_bits(carried, kept, stop_at):
    whole(carried, kept)
    broken = carried("broken", stop_at)
    assert not broken.finished
    folder = carried("broken")
    assert numbers(folder) == kept["numbers"]
    resumed = f"resumed from the checkpoint after step {stop_at}"
    assert (resumed in (folder.path / "log.txt").read_text()) == (stop_at > 0)


@pytest.mark.slow
def test_a_precision_that_changes_goes_on_at_its_step(carried):
    schedule = {"weight": {"before": "mxfp8", "from_step": 1, "over": 2}}
    injection = HARD["injection"] | {"schedule": schedule}
    whole = carried("whole", injection=injection)
    shares = [values["injection/weight_share"] for values in whole.metrics().values()]
    assert shares == [0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert not carried("broken", 2, injection=injection).finished
    assert numbers(carried("broken", injection=injection)) == numbers(whole)


@pytest.mark.parametrize("step", [2, STEPS])
def test_ctrl_c_keeps_a_checkpoint_after_the_step_and_the_run_goes_on_in_the_same_bits(carried, kept, tmp_path, step):
    """What interrupts a run with the defaults, which asked for no checkpoint at all."""
    whole(carried, kept)
    without = HARD["training"] | {"save_freq": 0}

    def in_that_step():
        return any(max(run.metrics(), default=0) == step - 1 for run in all_runs(tmp_path / "broken"))

    broken = carried("broken", interrupted=in_that_step, training=without)
    assert (broken.finished, max(broken.metrics())) == (False, step)
    assert list(checkpoints.all_of(broken.path / "checkpoints")) == [step]
    folder = carried("broken", training=without)
    assert f"resumed from the checkpoint after step {step}" in (folder.path / "log.txt").read_text()
    assert numbers(folder) == kept["numbers"]
    assert not (folder.path / "checkpoints").exists()


def test_fp32_copies_of_the_weights_go_on_in_the_same_bits(carried):
    """What the optimizer holds besides the model: with updates too small to be seen in one step of bfloat16."""
    half = {"model": {"dtype": "bfloat16"}, "training": HARD["training"] | {"lr": 1e-4, "steps": 3}}
    whole = carried("whole", **half)
    carried("broken", 2, **half)
    folder = carried("broken", **half)
    assert "resumed from the checkpoint after step 2" in (folder.path / "log.txt").read_text()
    assert numbers(folder) == numbers(whole)


def test_a_checkpoint_is_due_by_the_time_since_the_last_and_what_it_took():
    times = iter([0.0, EVERY_S - 1, EVERY_S / 10, EVERY_S, EVERY_S, EVERY_S + 60, EVERY_S + 60 + 1199, EVERY_S + 1260])
    clock = SaveClock(lambda: next(times))
    assert not clock.due(last=False)
    assert clock.due(last=True)
    assert clock.due(last=False)
    clock.begin()
    clock.end()  # it took a minute: twenty minutes until the next
    assert not clock.due(last=False)
    assert clock.due(last=False)


def test_of_the_checkpoints_those_stay_that_something_goes_back_to(tmp_path):
    """The newest two whatever they are for, and as many of those at multiples of save_freq as a rollback needs."""
    for step in (2, 4, 5, 6, 7, 8, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 5:  # never completed
            checkpoints.complete(tmp_path / f"checkpoint-{step}", step, "code", {})
    checkpoints.rotate(tmp_path, every=2, keep=3)
    assert sorted(checkpoints.all_of(tmp_path)) == [4, 6, 8, 9]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in (4, 6, 8, 9)]
    checkpoints.rotate(tmp_path, every=0, keep=2)
    assert sorted(checkpoints.all_of(tmp_path)) == [8, 9]


def test_a_damaged_checkpoint_is_left_out_and_the_one_before_it_is_taken(carried, kept):
    whole(carried, kept)
    broken = carried("broken", 3)
    (newest, *_) = sorted((broken.path / "checkpoints").iterdir(), key=lambda p: -int(p.name.rpartition("-")[2]))
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    folder = carried("broken")
    log = (folder.path / "log.txt").read_text()
    assert f"checkpoint {newest.name} is left out: its file model.safetensors is damaged" in log
    assert "resumed from the checkpoint after step 2" in log
    assert numbers(folder) == kept["numbers"]


@pytest.mark.slow
def test_without_a_good_checkpoint_the_run_starts_over(carried, kept):
    whole(carried, kept)
    broken = carried("broken", 3)
    for path in (broken.path / "checkpoints").iterdir():
        (path / checkpoints.STATE).write_text("{")
    folder = carried("broken")
    assert "starting over from the seed" in (folder.path / "log.txt").read_text()
    assert numbers(folder) == kept["numbers"]


@pytest.mark.slow
def test_a_checkpoint_of_other_code_is_not_gone_on_from(carried, monkeypatch):
    carried("broken", 3)
    monkeypatch.setattr(work, "code_digest", lambda: "other")
    folder = carried("broken")
    assert "other code wrote it" in (folder.path / "log.txt").read_text()
    assert "resumed" not in (folder.path / "log.txt").read_text()


@pytest.mark.slow
def test_a_forgotten_state_would_be_noticed(carried, kept, monkeypatch):
    """The plant: a resume that does not put the stream of problems back."""
    whole(carried, kept)
    carried("broken", 3)
    real = session_room.TrainingSession.on_begin

    def forgetful(self, trainer):
        real(self, trainer)
        self.stream.position = 0

    monkeypatch.setattr(session_room.TrainingSession, "on_begin", forgetful)
    assert numbers(carried("broken")) != kept["numbers"]


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(carried, kept, monkeypatch):
    whole(carried, kept)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(session_room, "complete", full)
        with pytest.raises(CheckFailed, match=r"the disk of .* is full; make room") as caught:
            carried("broken")
    assert "\n" not in str(caught.value)
    assert numbers(carried("broken")) == kept["numbers"]


@pytest.mark.slow
def test_ten_kills_in_the_middle_of_a_run_change_nothing(tmp_path, popen, experiment):
    """kill -9 of the process that trains, at ten moments drawn by chance inside its steps."""
    changes = {**HARD, "training": {**HARD["training"], "steps": 60}}
    spec = tmp_path / "run.yaml"
    spec.write_text(yaml.safe_dump(experiment("bf16", **changes).model_dump(mode="json")))
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from fp4rl.lab.matrix import single\nfrom fp4rl.lab.work import execute_run\n"
        "from fp4rl.spec.load import load_spec\n"
        "print(execute_run(single(load_spec(sys.argv[1]), 'trial'), Path(sys.argv[2])).path)\n"
    )

    def start(root):
        with (tmp_path / "err.txt").open("w") as err:
            return popen([sys.executable, "-W", "ignore", "-c", program, spec, root], stderr=err)

    def finished(root):
        assert start(root).wait(timeout=600) == 0, (tmp_path / "err.txt").read_text()
        (found,) = all_runs(root)
        return found

    want = numbers(finished(tmp_path / "whole"))
    chance, kills = random.Random(0), 0
    root = tmp_path / "killed"
    root.mkdir()
    (root / "models").symlink_to(tmp_path / "whole" / "models")
    while kills < 10:
        process, before = start(root), _steps(root)
        while process.poll() is None and _steps(root) <= before:  # not during the imports
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.3))
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills == 10
    assert numbers(finished(root)) == want


def _steps(root):
    """A clock that moves with every step: the size of what is written; a run that starts over removes what it had."""
    files = [run.path / "metrics.jsonl" for run in all_runs(root)]
    total = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


@pytest.fixture
def with_files(start_folder, experiment, tmp_path, monkeypatch):
    """An experiment that points to files, and these by the name of the input."""
    model = shutil.copytree(start_folder, tmp_path / "model")
    data, source = tmp_path / "train.jsonl", tmp_path / "my_reward.py"
    data.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(40)))
    source.write_text("def length(completion, **_):\n    return len(completion) % 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    described = experiment("bf16").model_dump() | {
        "model": {"path": str(model)},
        "task": {"name": "gsm8k", "path": str(data)},
        "evaluation": {"count": 4, "profiles": ["full"], "max_new_tokens": 8},
    }
    described["training"] |= {"save_freq": 1, "reward": "my_reward.length"}
    files = {"start model": model / "config.json", "problems": data, "reward's source": source}
    return Experiment.model_validate(described), files


def test_what_changed_behind_its_path_is_not_gone_on_with(with_files, carried):
    """Inputs that a description only points to: a resume on others is refused with the cure, the same ones go on."""
    described, files = with_files
    broken = carried("broken", 1, described)
    assert not broken.finished
    for name, file in files.items():
        before = file.read_text()
        file.write_text(before.replace("39", "40").replace("% 7", "% 5") + "\n")
        with pytest.raises(
            InvalidValueError, match=rf"changed since the checkpoint after step 1 .*{name} .*delete .*broken"
        ):
            carried("broken", described=described)
        file.write_text(before)
    folder = carried("broken", described=described)
    assert "resumed from the checkpoint after step 1" in (folder.path / "log.txt").read_text()
    assert set(folder.result().evidence.inputs) == set(files)


def test_the_base_of_an_adapter_and_the_modules_beside_a_reward_are_inputs_too(tmp_path, monkeypatch, experiment):
    """Contents at second hand: an adapter names its base, a reward imports from its own package."""
    base, adapter, package = (tmp_path / name for name in ("base", "adapter", "rewards_of_mine"))
    for folder in (base, adapter, package):
        folder.mkdir()
    (base / "model.safetensors").write_bytes(b"these")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    for name in ("__init__", "exact", "words"):
        (package / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    described = experiment("bf16", training={"reward": "rewards_of_mine.exact.score"})
    first = inputs(described, adapter)
    (package / "words.py").write_text("WORDS = ()")
    second = inputs(described, adapter)
    assert first["start model"] == second["start model"]
    assert first["reward's source"] != second["reward's source"]
    (base / "model.safetensors").write_bytes(b"those")
    assert inputs(described, adapter)["start model"] != first["start model"]
