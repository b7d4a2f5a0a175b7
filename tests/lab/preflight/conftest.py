"""Subjects of preflights: a suite, or arms over the embedded model that is not warmed up."""

import json

import pytest
import yaml

from fp4rl.cli.described import runs_described
from fp4rl.lab.preflight.rows import Subject
from fp4rl.spec.load import load_spec
from planted import small

SMALL = small.SMALL | {"model": {"embedded": {"warm_up_steps": 0}}, "evaluation": {"count": 8}}


@pytest.fixture
def subject(tmp_path):
    """`subject(base={...}, a={...}, ...)` -> a Subject of these arms; `suite` holds other keys of the suite."""

    def described(base=None, suite=None, report_to=(), **arms):
        file = tmp_path / "suite.yaml"
        content = {"suite": "trial", "base": SMALL | (base or {}), "arms": arms or {"a": {}}, **(suite or {})}
        file.write_text(yaml.safe_dump(content))
        loaded = load_spec(file)
        return Subject(loaded, runs_described(loaded, "trial"), tmp_path / "runs", report_to)

    return described


@pytest.fixture
def rows():
    """`rows(check, subject)` -> the rows of one check of a group's table, by its name."""

    def of(group, name, subject):
        return next(check for check in group.CHECKS if check.name == name).rows(subject)

    return of


@pytest.fixture
def folder(tmp_path):
    """`folder(config)` -> an arm over a folder that holds a configuration and nothing else."""

    def made(config):
        place = tmp_path / config["model_type"]
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps(config))
        return {"model": {"path": str(place)}}

    return made
