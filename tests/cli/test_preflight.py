"""`fp4rl preflight`, and the preflight of `fp4rl run`: who is stopped, who goes on, and where it is said."""

import json
import re
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from fp4rl.cli import preflight as verb
from fp4rl.cli.described import runs_described
from fp4rl.cli.main import main
from fp4rl.lab import catalogue
from fp4rl.lab.folders import all_runs
from fp4rl.lab.preflight.preflight import EVERY, at_stake, keep_passed, passed_before
from fp4rl.lab.preflight.rows import Check, Row, Subject
from fp4rl.spec.experiment import Suite
from planted import small

SMALL = small.SMALL | {"evaluation": {"count": 8, "max_new_tokens": 6}}
SUITE = {"suite": "mine", "seeds": [0], "base": SMALL, "arms": {"a": {}, "b": {"training": {"lr": 1e-4}}}}
PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "preflight.md"


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """`told(verb, *words, suite=...)` -> exit code, stdout, stderr of a command line beside suite.yaml."""
    monkeypatch.chdir(tmp_path)

    def run(*words, suite=SUITE):
        Path("suite.yaml").write_text(yaml.safe_dump(suite))
        code = main(list(words))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def failing(monkeypatch):
    """A check that needs nothing and fails."""
    fails = Check("planted", ("P01",), lambda _: iter([Row("fail", "2 of 3", "3 of 3", "make it three")]))
    monkeypatch.setattr("fp4rl.lab.preflight.settings.CHECKS", (fails,))


def test_a_row_takes_two_lines_of_80_columns_and_more_of_them_show_more_words(told, monkeypatch):
    shown = {}
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        code, out, _ = told("preflight", "suite.yaml", "--static")
        assert code == 0
        lines = out.splitlines()
        assert max(map(len, lines)) <= width
        heads = [n for n, line in enumerate(lines) if re.match(r"(pass|warn|fail|waits) ", line)]
        assert max(b - a for a, b in pairwise(heads)) <= 2
        shown[width] = len(" ".join(lines).split())
    assert shown[120] >= shown[80]


def test_json_has_the_keys_of_its_page_and_every_word(told):
    code, out, _ = told("preflight", "suite.yaml", "--static", "--json")
    assert code == 0
    document = json.loads(out)
    described = {
        key for cell in re.findall(r"^\| (`.*?) \|", PAGE.read_text(), re.M) for key in re.findall(r"`(.*?)`", cell)
    }
    assert {*document} == {key for key in described if re.fullmatch("suite|counts|rows", key)}
    assert {f"rows[].{key}" for key in document["rows"][0]} == {key for key in described if "[]" in key}
    assert document["counts"] == {v: sum(r["verdict"] == v for r in document["rows"]) for v in document["counts"]}
    assert not any("…" in row["measured"] for row in document["rows"])


def test_a_check_that_fails_ends_with_1_and_a_bad_description_with_2(told, failing):
    code, out, err = told("preflight", "suite.yaml", "--static")
    assert code == 1
    assert "fail  planted      2 of 3; make it three; expected 3 of 3" in out
    assert err == "fp4rl: preflight: 1 check failed: planted\n"
    assert told("preflight", "suite.yaml", "training.stepz=3")[0] == 2


def test_a_run_is_not_begun_where_a_check_fails(told, failing, in_process):
    code, _, err = told("run", "suite.yaml", "--arm", "a")
    assert code == 1
    assert "preflight, planted: 2 of 3; make it three; --skip-preflight runs it all the same, and says so" in err
    assert not list(all_runs(Path("runs")))


def test_a_run_without_its_preflight_says_so_wherever_its_numbers_are(told, in_process, failing, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert told("run", "suite.yaml", "--arm", "a", "--skip-preflight")[0] == 0
    monkeypatch.setattr("fp4rl.lab.preflight.settings.CHECKS", ())
    assert told("run", "suite.yaml", "--arm", "b")[0] == 0
    results = {run.result().arm: run.result() for run in all_runs(Path("runs"))}
    assert {arm: result.preflight for arm, result in results.items()} == {"a": "skipped", "b": None}
    assert "preflight skipped" in told("show", results["a"].run_id)[1]
    assert "preflight" not in told("show", results["b"].run_id)[1]
    states = [line for line in told("runs")[1].splitlines() if "preflight" in line]
    assert len(states) == 1
    assert {row["arm"]: row["preflight"] for row in json.loads(told("runs", "--json")[1])} == {
        "a": "skipped",
        "b": None,
    }
    assert "The preflight was skipped of a" in " ".join(told("report", "mine")[1].split())
    runs = {run["arm"]: run["preflight"] for run in json.loads(told("report", "mine", "--json")[1])["runs"]}
    assert runs == {"a": "skipped", "b": None}
    _, out, _ = told("compare", "b@full", "a@full", "--factor", "training.lr")
    assert f"the preflight of mine/{results['a'].run_id} was skipped" in " ".join(out.split())


def subject(tmp_path, warm_up_steps=60, **training):
    base = SMALL | {"training": small.SMALL["training"] | training}
    suite = Suite.model_validate(SUITE | {"base": base | {"model": {"embedded": {"warm_up_steps": warm_up_steps}}}})
    return Subject(suite, runs_described(suite, "mine"), tmp_path / "runs")


def test_all_is_looked_at_where_enough_is_at_stake(tmp_path):
    """300 steps together and 75 an arm, or 20 of a model of one's own; two arms of one seed here. The quickstart has
    360; many short candidates of a search are not worth seconds each."""
    assert at_stake(subject(tmp_path, steps=149).runs) == ("nothing",)
    assert at_stake(subject(tmp_path, steps=150).runs) == EVERY
    quickstart = catalogue.described("quickstart")
    assert at_stake(runs_described(quickstart, "quickstart")) == EVERY
    many = [replace(run, arm=f"c{n}") for n in range(16) for run in subject(tmp_path, steps=20).runs]
    assert at_stake(many) == ("nothing",)
    short = subject(tmp_path, steps=20).runs
    model = short[0].experiment.model.model_copy(update={"path": "m"})
    own = [replace(run, experiment=run.experiment.model_copy(update={"model": model})) for run in short]
    assert at_stake(own) == EVERY
    assert at_stake(short) == ("nothing",)


@pytest.mark.parametrize("cores", [1, 2])
def test_start_models_are_made_before_weights_are_looked_at_and_their_steps_are_shown(tmp_path, monkeypatch, cores):
    """A warm-up takes longer than all checks, and a bar that stands still tells nothing. One core does it here."""
    seen, begun = [], []

    @contextmanager
    def progress():
        yield lambda stage, done, total: seen.append((stage, done, total))

    def weights(own):
        begun.append(list((own.root / "models").glob("tiny-*/model.safetensors")))
        yield Row("pass", "", "")

    def never(*_):
        raise AssertionError("warmed up in this process")

    monkeypatch.setattr(verb, "progress", progress)
    monkeypatch.setattr(verb, "cores", lambda: cores)
    monkeypatch.setattr("fp4rl.lab.preflight.preflight.checks", lambda needs: (Check(needs, ("P01",), weights),))
    if cores > 1:
        monkeypatch.setattr("fp4rl.models.tiny.warm_up", never)
    rows = verb.looked_at(subject(tmp_path, warm_up_steps=3), EVERY)
    assert [row.check for row in rows] == [*EVERY]
    assert len(begun[2]) == 1
    warm_up = [("warm-up", step, 3) for step in (1, 2, 3)]
    assert seen == [("preflight", 1, 3), ("preflight", 2, 3), *warm_up, ("preflight", 3, 3)]


def test_what_passed_once_is_not_looked_at_again_until_something_changes(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(verb, "looked_at", lambda _, levels: looked.append(levels) or [])
    long = subject(tmp_path, steps=500)
    screen = verb.console(stderr=True)
    for _ in range(2):
        assert verb.checked_first(long, screen, skip=False) == [*long.runs]
    rest = replace(long, runs=long.runs[1:])  # what is left of an interrupted suite
    assert passed_before(rest)
    verb.checked_first(subject(tmp_path, steps=501), screen, skip=False)
    assert looked == [EVERY, ("nothing",), EVERY]
    monkeypatch.setattr("fp4rl.lab.preflight.preflight.code_digest", lambda: "other")
    verb.checked_first(long, screen, skip=False)
    assert looked[-1] == EVERY


def test_a_kept_file_that_is_damaged_is_no_pass(tmp_path):
    own = subject(tmp_path, steps=500)
    keep_passed(own, [])
    assert passed_before(own)
    (own.root / "mine" / "preflight.json").write_text("{")
    assert not passed_before(own)
