"""The hooks of verl that the plug-in uses, on the version that is installed; a missing or changed one is named."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("verl")

from fp4rl.engines.verl import contract
from fp4rl.spec.errors import CheckFailed


def test_every_hook_is_there_with_the_parameters_that_were_checked():
    assert contract.require() in contract.VERSIONS


def test_so_are_the_hooks_of_its_vllm_rollout():
    pytest.importorskip("vllm")
    code = "import verl; from fp4rl.engines.verl import contract as c; print(c.require(c.ROLLOUT_HOOKS))"
    known = os.environ | {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=known, capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["0.9.1"], done.stderr[-2000:]


def test_every_stream_of_the_installed_engine_is_wrapped_by_the_plugin():
    import importlib

    theirs = getattr(importlib.import_module(contract.ENGINE[0]), contract.ENGINE[1])
    public = {name for name in dir(theirs) if "per_tensor" in name and not name.startswith("_")}
    assert public == contract.STREAMS
    from fp4rl.engines.verl.engine import Engine

    assert all(name in vars(Engine) for name in public)


def test_a_missing_symbol_and_other_parameters_are_named():
    good = contract.HOOKS[0]
    with pytest.raises(CheckFailed, match=r"verl has no verl\.workers\.engine\.base\.EngineRegistry\.enroll"):
        contract.require((replace(good, name="EngineRegistry.enroll"),))
    with pytest.raises(CheckFailed, match=r"verl has no verl\.workers\.motor\.base"):
        contract.require((replace(good, module="verl.workers.motor.base"),))
    with pytest.raises(CheckFailed, match=r"takes \(model_type, backend, device, vendor\), not \(model_type\)"):
        contract.require((replace(good, parameters=("model_type",)),))


def test_another_version_is_refused(monkeypatch):
    import verl

    monkeypatch.setattr(verl, "__version__", "0.10.0.dev0")
    with pytest.raises(CheckFailed, match=r"verl 0\.10\.0\.dev0 is installed, and its hooks were checked on 0\.9\.1"):
        contract.require()


def test_a_stream_that_is_not_wrapped_is_refused():
    class Tomorrow:
        def get_per_tensor_param(self): ...

        def get_per_tensor_param_compressed(self): ...

    with pytest.raises(
        CheckFailed, match=r"Tomorrow\.get_per_tensor_param_compressed streams weights, and the plug-in"
    ):
        contract.require_streams_known(Tomorrow)


def test_the_core_is_imported_without_trl():
    """And so is all that a worker of verl imports of this package."""
    rooms = "rl.stream rl.health.monitor rl.verify inject.attach noise.perturb lab.files engines.verl.watch cli.main"
    code = f"import importlib, sys\nfor room in {rooms.split()!r}: importlib.import_module(f'fp4rl.{{room}}')\n"
    found = subprocess.run([sys.executable, "-c", code + "assert 'trl' not in sys.modules"], capture_output=True)
    assert found.returncode == 0, found.stderr.decode()[-2000:]
