"""Two steps of verl's own `main_ppo` with verl's own vLLM rollout, which rounds inputs by the plug-in's worker.

The environment of `make test-verl` has vLLM for CPUs beside verl 0.9.1; without it these are skipped.
"""

import pytest

pytest.importorskip("verl")
pytest.importorskip("vllm", reason="vLLM for CPUs is not installed here; make test-verl makes an environment with it")

import launched
import tiny

ON_CPU = (  # what vLLM for CPUs has not: memory to give back, and more than one engine a machine that takes it all
    "actor_rollout_ref.rollout.name=vllm",
    "+actor_rollout_ref.rollout.enable_sleep_mode=False",
    "actor_rollout_ref.rollout.free_cache_engine=False",
    "actor_rollout_ref.rollout.enable_prefix_caching=False",
    "actor_rollout_ref.rollout.max_model_len=128",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    tiny.model(folder / "model", head_dim=64)
    spec = tiny.experiment(folder, injection="w4a8")
    return launched.main_ppo(folder, "trainer.test_freq=2", *ON_CPU, spec=spec)


def test_it_ends_well(run):
    assert run.code == 0, run.log[-6000:]
