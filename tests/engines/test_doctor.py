"""`fp4rl doctor`: what it says is so, and a machine that computes wrongly is found by value."""

import json
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fp4rl.cli.main import main
from fp4rl.engines.doctor import checks, machine

CPU = torch.device("cpu")


def told(capsys, *words):
    code = main(["doctor", *words])
    return code, capsys.readouterr()


def test_it_tells_devices_packages_and_extras(capsys):
    code, said = told(capsys, "--json")
    facts = json.loads(said.out)
    assert code == 0
    assert facts["devices"][0]["kind"] == "cpu"
    assert {"float32", "bfloat16", "float64"} <= set(facts["devices"][0]["dtypes"])
    assert facts["packages"]["torch"] == version("torch")
    assert all(check["passed"] for check in facts["checks"])
    engines = {engine["name"]: engine["version"] for engine in facts["engines"]}
    assert engines["transformers"] == version("transformers")
    assert set(engines) == {"transformers", "vllm"}
    train = next(extra for extra in facts["extras"] if extra["name"] == "train")
    assert train["versions"]["trl"] == version("trl")


def test_it_fits_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, said = told(capsys)
    assert code == 0
    assert all(len(line) <= 80 for line in said.out.splitlines())


def test_every_extra_that_enables_something_is_listed():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(machine.EXTRAS) == set(project["optional-dependencies"]) - {"dev"}


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(machine, "requires", lambda _: ['trl<2 ; extra == "train"', 'no-such-one>1; extra == "train"'])
    train = next(extra for extra in machine.extras() if extra.name == "train")
    assert (set(train.versions), train.missing) == ({"trl"}, ("no-such-one",))


def test_a_dtype_without_a_matmul_is_left_out(monkeypatch):
    multiply = torch.Tensor.__matmul__

    def refusing(a, b):
        if a.dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return multiply(a, b) * (2 if a.dtype == torch.float16 else 1)

    monkeypatch.setattr(torch.Tensor, "__matmul__", refusing)
    dtypes = next(machine.devices()).dtypes
    assert "float32" in dtypes
    assert not {"bfloat16", "float16"} & set(dtypes)


def broken():
    return [check.name for check in checks.checks(CPU) if not check.passed]


def test_a_sound_machine_passes_and_every_check_is_counted():
    assert broken() == []
    assert len(list(checks.checks(CPU))) == checks.PER_DEVICE


def test_a_kernel_that_rounds_one_value_wrongly_is_found(monkeypatch, capsys):
    sound = checks.fake_quantize

    def off_by_one_value(x, fmt, **rest):
        made = sound(x, fmt, **rest)
        if fmt.name == "mxfp8" and x.numel() > 1000:
            made.view(-1)[777] *= 2
        return made

    monkeypatch.setattr(checks, "fake_quantize", off_by_one_value)
    assert "kernels equal their definition, cpu" in broken()
    code, said = told(capsys)
    assert code == 1
    assert "1 of 524288 values differ" in said.out
    assert "checks failed" in said.err


@pytest.mark.parametrize("operand", ["grad_input", "grad_weight"])
def test_a_gradient_whose_operand_is_not_rounded_is_found(operand, monkeypatch):
    from fp4rl.inject.site import SiteState

    sound = SiteState.gradient
    monkeypatch.setattr(SiteState, "gradient", lambda self, p, g: g if p == operand else sound(self, p, g))
    assert broken() == ["gradients, cpu"]
