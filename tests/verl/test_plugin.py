"""The plug-in as verl loads it: silent without an experiment, and a refusal of one line wherever it is not applied."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl")

HERE = Path(__file__).parent
LOADS = "import verl; from verl.workers.engine.base import EngineRegistry as R; "


def python(code, **environment):
    known = os.environ | {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu"}
    known["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=known | environment, capture_output=True, text=True
    )


@pytest.fixture
def spec(tmp_path):
    file = tmp_path / "spec.yaml"
    file.write_text("injection: w4a16\nmodel: {path: m, dtype: bfloat16}\nengine: verl\n")
    return str(file)


def test_it_is_an_entry_point_that_does_nothing_without_an_experiment():
    found = python(LOADS + "print({k for keys in R._engines['language_model'].values() for k in keys})")
    assert found.returncode == 0, found.stderr[-2000:]
    assert "fp4rl" not in found.stdout


def test_under_an_experiment_it_registers_engine_and_trainer(spec):
    code = LOADS + (
        "from verl.trainer.ppo.v1 import get_trainer_cls; import verl.workers.engine\n"
        "print(R.get_engine_cls('language_model', 'fsdp2').__module__, get_trainer_cls('fp4rl').__module__)\n"
        "print(sorted(k[0] for k in R._engines['language_model']['fsdp2'] if isinstance(k, tuple)))"
    )
    found = python(code, FP4RL_VERL_SPEC=spec)
    assert found.returncode == 0, found.stderr[-2000:]
    lines = found.stdout.strip().splitlines()[-2:]
    assert lines == ["fp4rl.engines.verl.engine fp4rl.engines.verl.trainer", "['cpu', 'cuda', 'npu']"]


@pytest.mark.parametrize("mode, module", [("w4a16", "verl."), ("w4a8", "fp4rl.engines.verl.replica")])
def test_vllm_is_replaced_where_rollouts_round_inputs(spec, mode, module):
    pytest.importorskip("vllm")
    Path(spec).write_text(Path(spec).read_text().replace("w4a16", mode))
    code = (
        LOADS + "from verl.workers.rollout.replica import get_rollout_replica_class as g; print(g('vllm').__module__)"
    )
    done = python(code, FP4RL_VERL_SPEC=spec)
    assert done.stdout.strip().splitlines()[-1:][0].startswith(module), done.stderr[-2000:]


@pytest.mark.parametrize(
    "plant, why",
    [
        ("import verl.workers.engine.base as m; del m.EngineRegistry.register", "verl has no verl.workers.engine.base"),
        ("import verl as m; m.__version__ = '0.8.0'", "verl 0.8.0 is installed, and its hooks were checked on 0.9.1"),
        (
            "import verl.workers.engine.fsdp.transformer_impl as m\n"
            "m.FSDPEngineWithLMHead.get_per_tensor_param_tomorrow = lambda self: None",
            "get_per_tensor_param_tomorrow streams weights, and the plug-in does not wrap it",
        ),
        ("import os; os.environ['VERL_ENGINE_VENDOR'] = 'nvidia'", "VERL_ENGINE_VENDOR is nvidia"),
        ("import os; os.environ['FP4RL_VERL_SPEC'] = 'gone.yaml'", "gone.yaml: no such file"),
    ],
    ids=["a missing symbol", "another version", "an unwrapped stream", "another vendor", "no experiment there"],
)
def test_what_keeps_it_from_being_applied_ends_the_process_with_one_line(spec, plant, why):
    """verl hides exceptions of plug-ins at DEBUG, so that a run would go on without it."""
    load = "from importlib.metadata import entry_points\n[e] = entry_points(group='verl.plugins', name='fp4rl')\n"
    load += "try:\n    e.load()\nexcept Exception:\n    print('hidden')"
    found = python(
        f"import os; spec = os.environ.pop('FP4RL_VERL_SPEC')\nimport verl\nos.environ['FP4RL_VERL_SPEC'] = "
        f"spec\n{plant}\nimport sys; sys.modules.pop('fp4rl.engines.verl.plugin', None)\n{load}",
        FP4RL_VERL_SPEC=spec,
    )
    assert found.returncode == 1
    assert "hidden" not in found.stdout
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("fp4rl: the plug-in for verl is not applied: ")
    assert why in last


def test_an_engine_under_another_trainer_is_refused(spec):
    code = LOADS + (
        "import verl.workers.engine\n"
        "R.new('language_model', 'fsdp2', model_config=1, engine_config=1, optimizer_config=1, checkpoint_config=1)"
    )
    found = python(code, FP4RL_VERL_SPEC=spec)
    assert "write trainer.v1.trainer_mode=fp4rl" in found.stderr.strip().splitlines()[-1]
