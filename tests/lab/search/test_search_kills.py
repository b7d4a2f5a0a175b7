"""A real search that is killed at five random moments goes on, and chooses and measures what one does that is not."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fp4rl.lab.search.records import FILE, Added, Book, Chosen, Decided, Judged, Measured, Proposed

SPACE = {
    "search": "killed",
    "base": {
        "model": {"embedded": {"warm_up_steps": 60}},
        "task": {"name": "arithmetic", "difficulty": 1, "train_count": 64},
        "injection": {"mode": "w4a4", "deployment": "compressed_tensors"},
        "training": {
            "train_batch_size": 4,
            "mini_batch_size": 2,
            "rollout_n": 4,
            "max_response_length": 32,
            "overlong_buffer": {"len": 8},
            "filter_groups": {"metric": "reward"},
        },
        "evaluation": {"deployment": "compressed_tensors"},
    },
    "stages": {"bf16": {"injection": "none", "training": {"steps": 2}}},
    "space": {
        "begin": [{"name": "fresh"}, {"name": "bf16", "set": {"start": {"arm": "bf16"}}}],
        "training.lr": [2e-4, 8e-4],
    },
    "screening": {"rungs": [2], "seeds": [0, 1], "count": 16},
    "final": {"seeds": [11, 12], "count": 16, "margin": 0.05},
}
PROGRAM = "from fp4rl.cli.main import entry; entry()"
TIMES = {"step_s", "run_s", "cpu_s", "gpu_s", "wall_s"}


def start(popen, space, root):
    with space.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM, "search", str(space), "--runs", str(root)]
        return popen([*command, "--budget", "9h"], stdout=subprocess.DEVNULL, stderr=log, start_new_session=True)


def finish(popen, space, root):
    assert start(popen, space, root).wait(timeout=1500) == 0, space.with_suffix(".log").read_text()[-3000:]


def untimed(value):
    """A value without what the clock measured, however deep it stands."""
    if isinstance(value, dict):
        return {key: untimed(own) for key, own in value.items() if key not in TIMES}
    return value


def decisions(root):
    """All that was proposed, measured and decided, in order, without the clock; the runs of the final by their ids."""
    kinds = (Proposed, Measured, Added, Decided, Chosen, Judged)
    book = Book.read(root / "killed" / FILE)
    made = [untimed(line.model_dump(mode="json")) for line in book.lines if isinstance(line, kinds)]
    return made, sorted(run.name for run in (root / "killed-final").iterdir() if (run / "result.json").is_file())


def lines(root):
    """How many lines the search and its runs have written: how far it is, on whichever machine."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in (name for name in names if name.endswith(".jsonl")):
            with contextlib.suppress(FileNotFoundError):  # a run that starts over removes what it had
                total += Path(folder, name).read_bytes().count(b"\n")
    return total


def kill_after(process, root, more):
    """Kill a search once it has written so many lines more; return whether it was still going on."""
    goal = lines(root) + more
    while process.poll() is None and lines(root) < goal:
        time.sleep(0.05)
    going_on = process.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return going_on


@pytest.mark.slow
def test_a_search_killed_at_five_random_moments_ends_like_one_that_never_was(tmp_path, popen):
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump(SPACE))
    finish(popen, space, tmp_path / "whole")
    whole, drawn = lines(tmp_path / "whole"), random.Random(20261128)
    for _ in range(5):  # together they are never further than the end
        process, more = start(popen, space, tmp_path / "killed"), drawn.randint(1, whole // 6)
        assert kill_after(process, tmp_path / "killed", more), "it ended before its kill"
    finish(popen, space, tmp_path / "killed")
    assert decisions(tmp_path / "killed") == decisions(tmp_path / "whole")
    recipes = [(tmp_path / root / "killed" / "recipe.yaml").read_text() for root in ("whole", "killed")]
    assert recipes[0] == recipes[1]
