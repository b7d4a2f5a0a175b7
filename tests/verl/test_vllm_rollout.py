"""Two steps of verl's own `main_ppo` with verl's own vLLM rollout, which rounds inputs by the plug-in's worker.

The environment of `make test-verl` has vLLM for CPUs beside verl 0.9.1; without it these are skipped.
"""

import pytest

pytest.importorskip("verl")
pytest.importorskip("vllm", reason="vLLM for CPUs is not installed here; make test-verl makes an environment with it")

import launched
import tiny

from fp4rl.engines.verl.record import EVIDENCE
from fp4rl.lab.files import read_lines
from fp4rl.lab.foreign.reader import read_steps

WIDTHS = 2 * (64 * 5 + 256 + 96)  # what goes into q, k, v, gate and up, into o, and into down of both layers
ON_CPU = (  # vLLM for CPUs has no memory to give back
    "actor_rollout_ref.rollout.name=vllm",
    "+actor_rollout_ref.rollout.enable_sleep_mode=False",
    "actor_rollout_ref.rollout.free_cache_engine=False",
    "actor_rollout_ref.rollout.enable_prefix_caching=False",
    "actor_rollout_ref.rollout.max_model_len=128",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    tiny.model(folder / "model", for_vllm=True)
    spec = tiny.experiment(folder, injection="w4a8")
    return launched.main_ppo(folder, "trainer.test_freq=2", *ON_CPU, spec=spec)


@pytest.fixture(scope="module")
def by_step(run):
    assert run.code == 0, run.log[-6000:]
    return read_steps(run.folder / "log.txt")[1].in_order()


def test_both_engines_rounded_the_inputs_of_every_token_that_they_computed(by_step):
    """Eight answers a step: of each all but the last token is computed, after its prompt."""
    assert sorted(by_step) == [1, 2]
    for step in by_step.values():
        tokens = 8 * (step["prompt_length/mean"] + step["response_length/mean"] - 1)
        assert step["fp4rl/elements/rollout/input"] == tokens * WIDTHS
        assert step["fp4rl/elements/training/input"] > 0


def test_verls_own_comparison_of_both_engines_is_of_one_policy(by_step):
    for step in by_step.values():
        assert step["rollout_corr/log_ppl_abs_diff"] < 0.02  # in bfloat16, of 5.6


def test_rollouts_and_validation_are_counted_apart_at_every_site(run):
    lines = [line for line in read_lines(run.left / EVIDENCE) if line.get("point") == "input"]
    by_phase = {
        phase: {line["site"] for line in lines if line["phase"] == phase} for phase in ("rollout", "evaluation")
    }
    assert all(len(sites) == 14 for sites in by_phase.values())
    assert all(line["calls"] > 0 and line["elements"] > 0 and not line.get("missed") for line in lines)
