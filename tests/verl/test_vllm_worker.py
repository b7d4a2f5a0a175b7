"""verl's own extension of vLLM's worker with the plug-in's, in a worker of vLLM for CPUs, fed by verl's own transfer.

The oracle is vLLM: the log-probabilities that its kernels compute. transformers computes the same ones with the same
weights and inputs rounded by the experiment's own sites.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl")
pytest.importorskip("vllm", reason="vLLM for CPUs is not installed here; make test-verl makes an environment with it")

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worker")
    environment = os.environ | {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu"}
    command = [sys.executable, "-W", "ignore", str(HERE / "vllm_program.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("mode", ["w4a8", "w4a4", "kv_cache"])
def test_the_engine_holds_the_stream_and_computes_what_the_model_does(found, mode):
    """Each mode is tried with weights of its own: a refresh that was lost would show too."""
    run = found[mode]
    assert run["tensors"] == 26
    assert len(run["apart"]) == run["answered"] > 200
    assert sum(each < 1e-4 for each in run["apart"]) >= 0.99 * len(run["apart"])


def test_without_the_plug_ins_rounding_it_does_not(found):
    assert sum(each < 1e-4 for each in found["unrounded"]["apart"]) < 0.1 * found["unrounded"]["answered"]
    assert found["unrounded"]["tokens"] == {}


@pytest.mark.parametrize("mode, sites", [("w4a8", 14), ("w4a4", 14), ("kv_cache", 16)])
def test_every_site_rounds_what_every_token_gives_it(found, mode, sites):
    tokens = found[mode]["tokens"]
    assert len(tokens) == sites
    assert {count for points in tokens.values() for count in points.values()} == {found[mode]["computed"]}
    kinds = {point for points in tokens.values() for point in points}
    assert kinds == ({"input", "kv_cache"} if mode == "kv_cache" else {"input"})
