"""Runs on Ray and in a Slurm array: nothing lost, nothing twice, the numbers of this machine's own processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from fp4rl.cli.main import main
from fp4rl.lab import heartbeat
from fp4rl.lab.folders import all_runs, finished_runs
from planted.small import SMALL

SUITE = {
    "suite": "elsewhere",
    "seeds": [0, 1],
    "base": SMALL
    | {
        "training": SMALL["training"] | {"steps": 12, "save_freq": 2},
        "evaluation": {"count": 24, "profiles": ["full"]},
    },
    "arms": {"bf16": {}, "w4a4": {"start": {"arm": "bf16"}, "injection": {"mode": "w4a4"}}},
}
PROGRAM = "from fp4rl.cli.main import entry; entry()"


def start(popen, spec, root, *words):
    return popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, "run", str(spec), "--runs", str(root), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def written(tmp_path, **training):
    spec = tmp_path / "elsewhere.yaml"
    base = SUITE["base"] | {"training": SUITE["base"]["training"] | training}
    spec.write_text(yaml.safe_dump(SUITE | {"base": base}))
    return spec


def numbers(root):
    """What each run measured and saved, by run id; times left out."""
    found = {}
    for run in finished_runs(root):
        steps = run.metrics().items()
        metrics = {s: {k: v for k, v in values.items() if not k.startswith("time/")} for s, values in steps}
        result = run.result()
        found[run.run_id] = (metrics, [e.as_json() for e in result.evaluations], result.evidence.final_files)
    return json.loads(json.dumps(found))


def attempts(run):
    return len((run.path / "attempts.jsonl").read_text().splitlines())


def begun(root, step, process):
    """Wait for a run that has done `step` steps and is not finished; return it."""
    until = time.monotonic() + 400
    while process.poll() is None and time.monotonic() < until:
        for run in all_runs(root):
            if not run.finished and max(run.metrics(), default=0) >= step:
                return run
        time.sleep(0.05)
    raise AssertionError(process.communicate(timeout=30)[0])


@pytest.mark.slow
def test_a_worker_of_ray_that_is_killed_in_mid_run_loses_nothing_and_repeats_nothing(tmp_path, popen):
    pytest.importorskip("ray")
    spec = written(tmp_path)
    local = start(popen, spec, tmp_path / "local")
    said = local.communicate(timeout=900)[0]
    assert local.returncode == 0, said

    root = tmp_path / "ray"
    process = start(popen, spec, root, "--executor", "ray", "--jobs", "2")
    killed = begun(root, 3, process)
    os.kill(heartbeat.read(killed.path).pid, signal.SIGKILL)
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 0, said
    assert "its worker was lost (1 time)" in " ".join(said.split())
    assert "resumed from the checkpoint after step" in (killed.path / "log.txt").read_text()
    assert {run.run_id: attempts(run) for run in all_runs(root)} == {
        run.run_id: 2 if run.run_id == killed.run_id else 1 for run in all_runs(tmp_path / "local")
    }
    assert numbers(root) == numbers(tmp_path / "local")


@pytest.mark.slow
def test_ctrl_c_ends_runs_on_ray_after_their_step_and_they_go_on_here(tmp_path, popen):
    pytest.importorskip("ray")
    spec, root = written(tmp_path, steps=250, save_freq=0), tmp_path / "ray"
    process = start(popen, spec, root, "--executor", "ray", "--jobs", "2")
    run = begun(root, 3, process)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 130, said
    assert said.rstrip().endswith("fp4rl: stopped; the same command continues where it left off")
    assert "Traceback" not in said
    done = max(run.metrics())
    process = start(popen, spec, root)
    begun(root, done + 1, process)
    process.kill()
    process.communicate()
    assert f"resumed from the checkpoint after step {done}" in (run.path / "log.txt").read_text()


FAKE_SBATCH = """#!/usr/bin/env bash
# Runs an array here, index by index, and gives its id, as sbatch --parsable does.
set -u
for word; do
  case $word in
    --array=*) range=${word#--array=} ;;
    --*) ;;
    *) script=$word ;;
  esac
done
echo "$*" >> "$SBATCH_LOG"
for index in $(seq ${range%-*} ${range#*-}); do
  SLURM_ARRAY_TASK_ID=$index bash "$script" >> "$SBATCH_LOG.out" 2>&1 || echo "index $index failed" >> "$SBATCH_LOG"
done
echo "$((100 + $(wc -l < "$SBATCH_LOG")));cluster"
"""


def test_a_slurm_array_is_sound_bash_with_an_array_for_each_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec, file = written(tmp_path), "array.sh"
    assert main(["plan", spec.name, "seeds=[3,5]", "--runs", "my runs", "--slurm", file]) == 0
    assert "bash array.sh" in capsys.readouterr().out
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
    (tmp_path / "sbatch").write_text('#!/usr/bin/env bash\necho "$@" >> calls; echo 41\n')
    (tmp_path / "sbatch").chmod(0o755)
    own = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "array.sh", "--time=9"], check=True, env=own, stdout=subprocess.DEVNULL)
    assert (tmp_path / "calls").read_text().splitlines() == [
        "--parsable --array=0-1 --time=9 array.sh",
        "--parsable --array=2-3 --dependency=afterany:41 --time=9 array.sh",
    ]
    assert main(["plan", spec.name, "--slurm", str(tmp_path / "no" / "file")]) == 2


@pytest.mark.slow
def test_an_array_that_is_submitted_again_runs_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec, log = written(tmp_path, steps=2), tmp_path / "sbatch.log"
    (tmp_path / "sbatch").write_text(FAKE_SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    assert main(["plan", spec.name, "--runs", "array", "--slurm", "array.sh"]) == 0
    own = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SBATCH_LOG": str(log)}
    for _ in range(2):
        subprocess.run(["bash", "array.sh"], check=True, env=own, timeout=600)
        assert "failed" not in log.read_text(), (tmp_path / "sbatch.log.out").read_text()
        assert [attempts(run) for run in all_runs(tmp_path / "array")] == [1] * 4
    assert main(["run", spec.name, "--runs", "local"]) == 0
    assert numbers(tmp_path / "array") == numbers(tmp_path / "local")
