"""One question, one answer: whatever is wrong with a run, `report` and `compare` say the same of it.

Kind: two pipelines for one question. Every kind of objection, and every gap in the evidence, goes through both verbs.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from fp4rl.cli.main import main
from fp4rl.lab.compare.fairness import Kind, Objection

Change = Callable[[dict[str, Any]], None]
QUANTIZED = {"mode": "w4a16", "deployment": "compressed_tensors"}
TWO_ARMS: dict[str, Any] = {
    "arms": {"bf16": {"evaluation": {"profiles": ["full", "w4a16", "w4a4"]}}, "w4a16": {"injection": QUANTIZED}},
    "comparisons": [
        {
            "question": "Does training under W4A16 beat quantizing afterwards?",
            "treatment": "w4a16@deployment",
            "control": "bf16@w4a16",
            "factors": ["injection"],
        }
    ],
}


def last(key: str, value: Any) -> Change:
    """Another condition of the last evaluation as deployed."""

    def change(result: dict[str, Any]) -> None:
        (found,) = [e for e in result["evaluations"] if e["last"] and e["profile"]["name"] == "deployment"]
        place = found if key in ("n", "step") else found["profile"]
        place[key] = value

    return change


def summary(key: str, value: Any) -> Change:
    return lambda result: result["evidence"].update({key: value})


def top(key: str, value: Any) -> Change:
    return lambda result: result.update({key: value})


def without_last(profile: str) -> Change:
    def change(result: dict[str, Any]) -> None:
        kept = [e for e in result["evaluations"] if not (e["last"] and e["profile"]["name"] == profile)]
        result["evaluations"] = kept

    return change


FAULTS: list[tuple[Kind, Change]] = [
    ("precision", last("precision", "w8a8")),
    ("precision", last("sites_digest", "another-table")),
    ("noise", last("noise", "on")),
    ("scorer", last("scorer", "another")),
    ("scorer", last("scorer", None)),
    ("token limit", last("max_new_tokens", 7)),
    ("sampling", last("sampling", "4 samples")),
    ("items", last("items_digest", "another")),
    ("items", last("n", 7)),
    ("step", last("step", 7)),
    ("step", top("steps_done", 7)),
    ("step", without_last("deployment")),
    ("seeds", top("seed", 1)),
    ("code", top("code_digest", "another")),
    ("code", top("versions", {"torch": "0.1"})),
    ("inputs", summary("inputs", {"start model": "another"})),
    ("inputs", summary("processes", 2)),
    ("evidence", without_last("full")),
    ("evidence", summary("sites", 0)),
    ("evidence", summary("master_unharmed", False)),
    ("evidence", summary("weights_changed", 0.0)),
    ("identical", summary("final_weights", "same")),
]
GAPS: dict[str, Callable[[dict[str, Any]], dict[str, Any] | None]] = {
    "no quantized call was counted": lambda line: None if line["kind"] == "injection" else line,
    "was rounded at 13 of 14 sites": lambda line: (
        line | ({"points": {"weight": 14}} if line["kind"] == "acting" else {})
    ),
    "rounding changed no weight": lambda line: line | ({"missed": 1} if line["kind"] == "injection" else {}),
    "its master weights were changed": lambda line: line | ({"unharmed": False} if line["kind"] == "master" else {}),
    "no check of its live policy": lambda line: None if line["kind"] == "live_equals_fresh" else line,
    "its live policy differed": lambda line: (
        line | ({"max_difference": "nan"} if line["kind"] == "live_equals_fresh" else {})
    ),
}


def answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[Any], list[Any]]:
    """(refusals, verdict) of every question, as `report` and as `compare` give them."""
    capsys.readouterr()
    main(["report", str(folder), "--json"])
    reported = json.loads(capsys.readouterr().out)["questions"]
    main(["compare", folder.name, "--runs", str(folder.parent), "--json"])
    compared = json.loads(capsys.readouterr().out)
    refused = [list(dict.fromkeys(Objection(**o).sentence() for o in one["objections"])) for one in compared]
    return (
        [(one["refused"], one["verdict"]) for one in reported],
        [(sentences, one["verdict"]) for sentences, one in zip(refused, compared, strict=True)],
    )


def run_of(folder: Path, arm: str, seed: int = 0) -> Path:
    return next(folder.glob(f"{arm}-s{seed}-*"))


def rewrite(run: Path, change: Change) -> None:
    content = json.loads((run / "result.json").read_text())
    change(content)
    (run / "result.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the suite is kept that `answered` copies."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def answered(make_trial, kept, tmp_path, capsys):
    """Two arms with nothing wrong, of which both verbs have said so: the ledger holds them before anything changes."""
    if not (kept / "trial").is_dir():
        (clean,), (compared,) = answers(make_trial(**TWO_ARMS).write(), capsys)
        assert clean == compared
        assert clean[0] == []
        assert (tmp_path / "ledger.db").is_file()
        shutil.copytree(tmp_path, kept, dirs_exist_ok=True)
    else:
        shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    return tmp_path / "trial"


def test_every_kind_of_objection_is_walked_through():
    kinds = {kind for literal in get_args(Kind) for kind in get_args(literal)}
    assert kinds == {kind for kind, _ in FAULTS} | {"spec", "missing"}


@pytest.mark.parametrize(("kind", "change"), FAULTS)
def test_a_fault_in_a_result_gets_one_answer(answered, capsys, kind, change):
    rewrite(run_of(answered, "w4a16"), change)
    if kind == "identical":
        rewrite(run_of(answered, "bf16"), change)
    reported, compared = answers(answered, capsys)
    assert reported == compared
    assert reported[0][0]
    assert reported[0][1] is None


@pytest.mark.parametrize("gap", GAPS)
def test_a_gap_in_the_evidence_gets_one_answer_though_the_result_is_as_it_was(answered, capsys, gap):
    file = run_of(answered, "w4a16") / "evidence.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    if "13 of 14" in gap:
        first = next(line["site"] for line in lines if line["kind"] == "injection")
        lines = [line for line in lines if line.get("site") != first]
        lines += [{"kind": "acting", "phase": phase, "points": {}} for phase in ("rollout", "training")]
    kept = [changed for line in lines if (changed := GAPS[gap](line)) is not None]
    file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    reported, compared = answers(answered, capsys)
    assert reported == compared
    assert gap in reported[0][0][0]


@pytest.mark.parametrize(
    "change",
    [
        {"arms": TWO_ARMS["arms"] | {"w4a16": {"injection": QUANTIZED, "training": {"lr": 1e-3}}}},
        {"comparisons": [TWO_ARMS["comparisons"][0] | {"factors": []}]},
        {"comparisons": [TWO_ARMS["comparisons"][0] | {"treatment": "bf16@full", "factors": ["noise"]}]},
    ],
    ids=["more than the factor", "nothing declared", "another factor"],
)
def test_a_difference_in_the_specs_gets_one_answer(make_trial, capsys, change):
    reported, compared = answers(make_trial(**TWO_ARMS | change).write(), capsys)
    assert reported == compared


@pytest.mark.parametrize("fault", ["missing", "unfinished", "without_evidence"])
def test_runs_that_are_not_there_get_one_answer_and_count_in_the_family(make_trial, capsys, fault):
    whole = make_trial(suite="whole").write()
    reported, compared = answers(whole, capsys)
    assert reported == compared
    folder = make_trial(suite="part").write(**{fault: [("w4a16+aqn", seed) for seed in range(3)]})
    reported, compared = answers(folder, capsys)
    assert reported == compared
    assert reported[1][0]
    assert reported[0][1]["comparisons"] == 3


def test_the_run_whose_last_full_evaluation_was_deleted(make_trial, capsys):
    """The case that was found: `report` refused three questions, `compare` said "better, p = 0.001"."""
    folder = make_trial().write()
    rewrite(run_of(folder, "w4a16"), without_last("full"))
    reported, compared = answers(folder, capsys)
    assert reported == compared
    refusal = f"trial/{run_of(folder, 'w4a16').name} lacks evidence: no evaluation of full at the last step"
    assert [refused for refused, _ in reported] == [[refusal]] * 3
