"""`compare` refuses every kind of unfair pair, says what differs, and gives no word it has not earned."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fp4rl.lab.compare.comparison import Answer, Question, answer_all, checked
from fp4rl.lab.compare.differing import differences, factor_of, undeclared
from fp4rl.lab.compare.recorded import named_side
from fp4rl.lab.compare.sides import At
from fp4rl.lab.ledger.query import spread_of_run
from fp4rl.lab.ledger.record import record_new
from fp4rl.lab.ledger.store import Ledger
from fp4rl.lab.runs import read_run
from fp4rl.spec.digest import digest
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from planted.records import gaps_of, line

W4A4 = {"injection": {"mode": "w4a4", "weight": "mxfp4", "input": "mxfp4"}}
QUANTIZED = {"sites": 14, "calls": {"training": 9, "rollout": 9}, "master_unharmed": True}
NONE = {"sites": 0, "calls": {}, "master_unharmed": True}
PROVEN = [{"kind": "master", "unharmed": True}, {"kind": "live_equals_fresh", "max_difference": 0.0}]
Ask = Callable[..., Answer]


def answered(ledger: Ledger, questions: list[Question], force: bool = False) -> list[Answer]:
    with ledger.reading() as connection:
        sides = [
            [named_side(connection, ledger.root, name, At(q.step, q.score)) for name in (q.treatment, q.control)]
            for q in questions
        ]
        asked = [(question, *pair) for question, pair in zip(questions, sides, strict=True)]
        answers = answer_all(asked, lambda run: spread_of_run(connection, run), force=force)
    return [checked(answer) for answer in answers]


@pytest.fixture
def ask(make_run, opened, tmp_path: Path) -> Ask:
    """Record all runs, then compare w4a4 with bf16 (or what is named) in the injection."""

    def answer(treatment: str = "w4a4", control: str = "bf16", force: bool = False, **asked: Any) -> Answer:
        ledger: Ledger = opened(tmp_path / "ledger.db")
        record_new(ledger, tmp_path / "runs")
        question = Question(treatment, control, **({"factors": ("injection",)} | asked))
        return answered(ledger, [question], force=force)[0]

    return answer


@pytest.fixture
def two_arms(make_run) -> Callable[..., None]:
    """Three seeds of bf16 and of w4a4; what is given changes the w4a4 runs."""

    def make(**change: Any) -> None:
        spec = W4A4 | change.pop("spec", {})
        for seed in range(3):
            make_run("bf16", seed, 0.70 + 0.01 * seed, evidence={"sites": 0, "calls": {}, "master_unharmed": True})
            make_run("w4a4", seed, 0.60 + 0.01 * seed, **{"spec": spec, "evidence": QUANTIZED} | change)

    return make


def _kinds(compared: Answer) -> set[str]:
    return {objection.kind for objection in compared.objections}


def test_a_fair_pair_gets_its_word(two_arms, ask: Ask):
    two_arms()
    compared = ask()
    assert compared.objections == compared.marks == ()
    assert compared.verdict is not None
    assert compared.verdict.word == "worse"
    assert compared.verdict.difference == pytest.approx(-10)
    assert compared.verdict.seeds == (3, 3)


def test_specs_that_differ_in_more_than_the_declared_factor_are_refused(two_arms, ask: Ask):
    two_arms(spec={"training": {"lr": 1e-3}})
    compared = ask()
    assert _kinds(compared) == {"spec"}
    assert compared.objections[0].sentence() == "the specs also differ in training.lr: 0.001 against 0.0004"
    assert compared.verdict is None
    assert ask(factors=("injection", "training.lr")).comparable


def test_a_factor_does_not_cover_keys_that_only_begin_like_it(two_arms, ask: Ask):
    two_arms(spec={"training": {"lr_warmup_steps": 9}})
    assert _kinds(ask(factors=("injection", "training.lr"))) == {"spec"}


def test_without_a_declared_factor_one_may_differ_and_no_more(two_arms, ask: Ask):
    two_arms()
    assert ask(factors=()).comparable
    assert undeclared(differences({"noise": {"a": 1}, "injection": None}, {"noise": None, "injection": {"b": 1}}), ())


@pytest.mark.parametrize(
    "change, kind",
    [
        ({"precision": "full"}, "precision"),
        ({"sites_digest": "bbbb"}, "precision"),
        ({"noise": "on"}, "noise"),
        ({"scorer": "flexible"}, "scorer"),
        ({"max_new_tokens": 64}, "token limit"),
        ({"sampling": "8 samples"}, "sampling"),
        ({"items_digest": "qqqq"}, "items"),
        ({"items_digest": None}, "items"),
    ],
)
def test_numbers_measured_differently_are_refused(two_arms, ask: Ask, change: dict[str, Any], kind: str):
    two_arms(profile=change)
    compared = ask()
    assert _kinds(compared) == {kind}
    (key,) = change
    assert f"the evaluation's {key} differs" in compared.objections[0].sentence()


def test_a_precision_may_differ_where_that_is_the_question(two_arms, ask: Ask):
    two_arms(profile={"precision": "full", "sites_digest": None})
    assert not ask().comparable
    assert ask(factors=("injection", "precision")).comparable


def test_labels_are_compared_by_what_acted(two_arms, make_run, ask: Ask):
    """Kind: a label that says what was described; what did not act makes no other number."""
    for seed in range(3):
        for arm, said in (("plain", "full"), ("errors", "clean: no errors in evaluation"), ("w", "w4a16")):
            make_run(arm, seed, 0.5 + 0.01 * seed, profile={"precision": said, "sites_digest": None}, evidence=NONE)
    assert ask("errors", "plain", factors=()).comparable
    assert _kinds(ask("w", "plain", factors=())) == {"precision"}


@pytest.fixture
def evaluated(make_run) -> Callable[..., dict[str, Any]]:
    """The `evaluations` of a result that holds one number, as `make_run` would write it but for what is given."""
    profile = make_run("example", suite="examples").result().evaluations[-1].profile.as_json()

    def result(step: int = 30, n: int = 40, last: bool = True) -> dict[str, Any]:
        return {"evaluations": [{"step": step, "last": last, "profile": profile, "n": n, "strict": 0.5}]}

    return result


def test_another_number_of_answers_is_refused(two_arms, evaluated, ask: Ask):
    two_arms(**evaluated(n=20))
    assert _kinds(ask()) == {"items"}


def test_another_step_is_refused(two_arms, evaluated, ask: Ask):
    two_arms(**evaluated(step=20))
    compared = ask()
    assert _kinds(compared) == {"step", "evidence"}
    assert compared.objections[0].sentence() == "the evaluated step differs: 20 against 30"


def test_a_run_that_stopped_early_is_refused(two_arms, ask: Ask):
    two_arms(steps_done=20)
    assert [o.sentence() for o in ask().objections] == [
        "a run of w4a4 stopped early: 20 steps done against 30 asked for"
    ]


def test_a_run_that_lacks_the_number_is_not_left_out_in_silence(make_run, two_arms, evaluated, ask: Ask):
    two_arms()
    make_run("w4a4", 7, spec=W4A4, evidence=QUANTIZED, **evaluated(step=20, last=False))
    compared = ask()
    assert _kinds(compared) == {"step"}
    assert "was not evaluated there" in compared.objections[0].what


def test_results_of_other_code_are_refused(two_arms, ask: Ask):
    two_arms(code_digest="dddd")
    assert _kinds(ask()) == {"code"}


def test_results_of_other_libraries_are_refused(two_arms, ask: Ask):
    two_arms(versions={"torch": "2.9", "python": "3.12"})
    (objection,) = ask().objections
    assert (objection.kind, objection.sentence()) == ("code", "torch's version differs: 2.9 against 2.13")


def of_two_engines(make_run, **verl: Any) -> None:
    """Three seeds of one recipe under TRL (w4a4) and under verl; what is given changes the latter."""
    for seed in range(3):
        usual = {"spec": W4A4, "evidence": QUANTIZED | {"processes": 1}, "versions": {"torch": "2.13", "trl": "1.16"}}
        make_run("w4a4", seed, 0.70 + 0.01 * seed, **usual)
        other = {
            "spec": W4A4 | {"engine": "verl"},
            "evidence": QUANTIZED | {"processes": 2},
            "versions": {"torch": "2.11", "verl": "0.9.1"},
            "evaluated_with": {"torch": "2.13", "trl": "1.16"},
        }
        make_run("verl", seed, 0.60 + 0.01 * seed, **other | verl)


def test_two_engines_are_a_factor_that_must_be_declared(make_run, ask: Ask):
    of_two_engines(make_run)
    said = [objection.sentence() for objection in ask("verl", factors=(), control="w4a4").objections]
    assert said[0] == "the specs differ in engine: verl against none"
    assert {"verl's version differs: 0.9.1 against none", "the number of processes differs: 2 against 1"} < {*said}
    (objection,) = ask("verl", "w4a4", factors=("engine",)).objections
    assert objection.what == "the number of processes differs"
    assert ask("verl", "w4a4", factors=("engine", "processes")).comparable


def test_of_two_engines_the_same_libraries_must_have_evaluated(make_run, ask: Ask):
    of_two_engines(make_run, evaluated_with={"torch": "2.12", "trl": "1.16"})
    (objection,) = ask("verl", "w4a4", factors=("engine", "processes")).objections
    assert objection.sentence() == "torch's version differs: 2.12 against 2.13"


@pytest.mark.parametrize(
    ("made", "what"),
    [
        ({"inputs": {"start model": "bbbb", "problems": "p"}, "processes": 1}, "the start model differs"),
        ({"inputs": {"start model": "aaaa", "problems": "q"}, "processes": 1}, "the problems differs"),
        ({"inputs": {"start model": "aaaa", "problems": "p"}, "processes": 2}, "the number of processes differs"),
        ({"inputs": {"start model": "aaaa"}, "processes": 1}, "the problems differs"),
    ],
)
def test_runs_made_from_other_files_are_refused(make_run, ask: Ask, made: dict[str, Any], what: str):
    usual = {"inputs": {"start model": "aaaa", "problems": "p"}, "processes": 1}
    for seed in range(3):
        make_run("bf16", seed, 0.7 + 0.01 * seed, evidence={"sites": 0, "calls": {}, "master_unharmed": True} | usual)
        make_run("w4a4", seed, 0.6 + 0.01 * seed, spec=W4A4, evidence=QUANTIZED | made)
    compared = ask()
    assert _kinds(compared) == {"inputs"}
    assert what in compared.objections[0].sentence()
    covering = {"the start model differs": "model.path", "the problems differs": "task"}.get(what)
    if covering:
        assert ask(factors=("injection", covering)).comparable


def of_stages(make_run, start=("a0", "a1", "a2"), link=None):
    """Two arms whose seeds each start from a run of their own; `start` and `link` are those of w4a4."""
    for seed in range(3):
        for arm, share, begun, linked, more in (
            ("bf16", 0.7, f"a{seed}", {"arm": "first", "digest": "d" * 12}, {"evidence": NONE}),
            ("w4a4", 0.6, start[seed], link or {"arm": "first", "digest": "d" * 12}, {"evidence": QUANTIZED}),
        ):
            spec = {"start": linked} | (W4A4 if arm == "w4a4" else {})
            evidence = more["evidence"] | {"inputs": {"start model": begun}}
            make_run(arm, seed, share + 0.01 * seed, spec=spec, evidence=evidence)


def test_stages_are_one_factor_and_their_weights_are_compared_seed_by_seed(make_run, ask: Ask):
    of_stages(make_run)
    assert ask().comparable


def test_a_start_of_other_weights_is_no_fair_pair_unless_it_is_the_question(make_run, ask: Ask):
    of_stages(make_run, start=("a0", "a1", "b2"))
    assert ask().refused == ("the start model of seed 2 differs: b2 against a2",)
    assert ask(factors=("injection", "start")).comparable


def test_another_start_is_named_as_the_factor_it_is(make_run, ask: Ask):
    of_stages(make_run, start=("b0", "b1", "b2"), link={"arm": "second", "digest": "e" * 12})
    assert {"spec", "inputs"} == _kinds(ask())
    assert ask(factors=("injection", "start")).comparable
    assert factor_of("start.digest") == "start"
    assert factor_of("training.distillation.teacher.arm") == "training.distillation.teacher"


def test_a_recipe_under_two_names_is_no_treatment(make_run, ask: Ask):
    for seed in range(3):
        for arm in ("bf16", "noise"):
            make_run(arm, seed, 0.5 + 0.01 * seed, evidence={"sites": 0, "calls": {}, "master_unharmed": True})
    (objection,) = ask("noise", factors=("noise",), margin=1.0).objections
    assert "the sides do not differ in noise, nor in anything else" in objection.what


def test_a_margin_named_after_the_runs_reaches_nothing(two_arms, ask: Ask):
    two_arms()
    asked = ask(margin=20.0, declared=True).verdict
    later = ask(margin=20.0).verdict
    assert (asked.word, later.word) == ("reaches", None)
    assert "where the suite fixed it beforehand" in later.why
    assert ask().verdict.word == "worse"  # a difference needs no margin


def test_a_side_may_be_named_by_the_beginning_of_its_run(two_arms, ask: Ask):
    two_arms()
    assert [one.run.seed for one in ask("w4a4-s1", "bf16-s1").treatment.runs] == [1]
    with pytest.raises(InvalidValueError, match="3 runs begin with 'w4a4-'"):
        ask("w4a4-", "bf16")


def test_a_seed_counts_once_a_side(make_run, ask: Ask):
    for seed in range(2):
        for arm in ("bf16", "again"):
            run = make_run(arm, seed, 0.5 + 0.01 * seed, evidence={"sites": 0, "calls": {}, "master_unharmed": True})
        make_run("w4a4", seed, 0.6, spec=W4A4, evidence=QUANTIZED)
    described = {key: value for key, value in run.spec().items() if key != "seed"}
    compared = ask(control=digest(described))
    assert _kinds(compared) == {"seeds"}
    assert "seed 0 counts 2 times" in compared.objections[0].what


@pytest.mark.parametrize(
    "evidence, gap",
    [
        (
            {"sites": 14, "calls": {"training": 9}, "master_unharmed": True},
            "no quantized call was counted during rollout",
        ),
        ({"sites": 0, "calls": {}, "master_unharmed": True}, "no site is recorded as quantized"),
        (QUANTIZED | {"master_unharmed": False}, "its master weights were changed"),
    ],
)
def test_a_run_without_its_evidence_is_refused(two_arms, ask: Ask, evidence: dict[str, Any], gap: str):
    two_arms(evidence=evidence)
    compared = ask()
    assert _kinds(compared) == {"evidence"}
    assert gap in compared.objections[0].sentence()


def test_a_foreign_log_has_no_evidence(make_run, two_arms, ask: Ask):
    two_arms()
    make_run("verl", 0, 0.6, imported={"dialect": "verl"})
    assert "evidence" in _kinds(ask("verl"))


def test_anyway_shows_the_difference_and_labels_it(two_arms, ask: Ask):
    two_arms(profile={"scorer": "flexible"})
    compared = ask(force=True)
    assert compared.verdict is not None
    assert compared.verdict.word is None
    assert "not comparable" in compared.verdict.why
    assert compared.verdict.low is not None


def test_refused_comparisons_still_count_in_the_family(two_arms, make_run, opened, tmp_path: Path):
    two_arms()
    make_run("odd", 0, 0.5, spec=W4A4, evidence=QUANTIZED, profile={"scorer": "x"})
    ledger = opened(tmp_path / "ledger.db")
    record_new(ledger, tmp_path / "runs")
    asked = [Question("w4a4", "bf16", ("injection",)), Question("odd", "bf16", ("injection",))]
    first, second = answered(ledger, asked)
    assert first.verdict is not None
    assert second.verdict is None
    assert first.verdict.comparisons == 2
    assert first.verdict.p_family == pytest.approx(2 * (first.verdict.p or 0))


def test_an_arm_of_two_experiments_is_no_set_of_repeats(make_run, two_arms, ask: Ask):
    two_arms()
    make_run("w4a4", 9, 0.6, spec=W4A4 | {"training": {"lr": 1e-3}})
    with pytest.raises(InvalidValueError, match="2 different experiments, which are no repeats"):
        ask()


def test_an_arm_of_two_suites_asks_for_the_suite(make_run, two_arms, ask: Ask):
    two_arms()
    make_run("bf16", 0, suite="other")
    with pytest.raises(InvalidValueError, match="is in the suites other, trial; write other/bf16"):
        ask()
    assert ask("trial/w4a4", "trial/bf16").comparable


def test_unknown_names_and_profiles_come_with_the_nearest(two_arms, ask: Ask):
    two_arms()
    with pytest.raises(NotFoundError, match="did you mean 'trial/w4a4'"):
        ask("trial/w4a5")
    with pytest.raises(NotFoundError, match="not evaluated as 'deploy'; did you mean 'deployment'"):
        ask("w4a4@deploy")
    with pytest.raises(NotFoundError, match="no evaluation at step 7; there are: 0, 30"):
        ask(step=7)


def test_a_side_is_not_compared_with_itself(two_arms, ask: Ask):
    two_arms()
    with pytest.raises(InvalidValueError, match="the same numbers of the same runs"):
        ask("bf16", "trial/bf16")


def test_one_seed_an_arm_gets_the_band_of_the_repeats_in_the_ledger(make_run, two_arms, ask: Ask):
    two_arms()
    make_run("lone", 0, 0.62, spec=W4A4 | {"training": {"lr": 1e-3}}, evidence=QUANTIZED)
    compared = ask("lone", factors=("injection", "training.lr"))
    assert compared.verdict is not None
    assert (compared.verdict.word, compared.verdict.interval) == (None, "run-to-run band")
    assert "1.00 points run-to-run SD" in compared.verdict.why


def test_where_every_answer_is_wrong_there_is_no_word_and_it_says_why(make_run, ask: Ask):
    for seed in range(2):
        make_run("bf16", seed, [0] * 8, evidence=NONE)
        make_run("w4a4", seed, [0] * 8, spec=W4A4, evidence=QUANTIZED)
    compared = ask()
    assert (compared.word, compared.checks.two_way, compared.checks.bootstrap) == ("no verdict", None, None)
    assert "no seed differs from another within its arm, so chance cannot be measured" in compared.sentence()


def test_items_give_the_cross_checks_over_seeds_and_problems(make_run, ask: Ask):
    rng = np.random.default_rng(0)
    for seed in range(4):
        make_run("bf16", seed, (rng.random(40) < 0.4).tolist(), evidence={"sites": 0, "master_unharmed": True})
        make_run("w4a4", seed, (rng.random(40) < 0.9).tolist(), spec=W4A4, evidence=QUANTIZED)
    compared = ask()
    assert compared.verdict is not None
    assert compared.checks.two_way is not None
    assert compared.checks.bootstrap is not None
    assert compared.checks.two_way.value == pytest.approx(compared.verdict.difference)
    assert compared.checks.bootstrap.low > 0
    assert compared.checks.checkpoints is None


def test_two_single_runs_get_mcnemar_as_a_test_of_two_checkpoints(make_run, ask: Ask):
    make_run("bf16", 0, [True] * 20 + [False] * 20, evidence={"sites": 0, "master_unharmed": True})
    make_run("w4a4", 0, [True] * 10 + [False] * 30, spec=W4A4, evidence=QUANTIZED)
    compared = ask()
    assert compared.verdict is not None
    assert compared.verdict.word is None
    assert compared.checks.checkpoints is not None
    assert (compared.checks.checkpoints.gained, compared.checks.checkpoints.lost) == (0, 10)


def test_noise_that_changed_nothing_is_a_gap():
    spec = {"noise": {"schedule": {}}}
    still = [{"kind": "noise", "share_changed": 0.0}, *PROVEN]
    assert gaps_of(spec, {"sites": 0}, still) == ("its noise was never effective: no weight changed in any rollout",)
    real = [{"kind": "noise", "share_changed": 0.3}, *PROVEN]
    assert gaps_of(spec, {"sites": 0}, real) == ()
    assert gaps_of({"noise": None}, {"sites": 0}, real) == ("noise was put on weights, but its spec asks for none",)
    control = {"noise": {"control": "sigma_zero"}}
    assert gaps_of(control, {"sites": 0}, still) == ()
    assert gaps_of(control, {"sites": 0}, real) == ("the control without noise changed weights",)


def test_a_run_that_never_held_its_live_policy_against_the_saved_one_lacks_evidence():
    assert gaps_of({}, {"sites": 0}, PROVEN[:1]) == ("no check of its live policy against the saved one is recorded",)


def test_an_evaluation_under_a_site_table_that_rounded_nothing_is_a_gap():
    profile = {"name": "w4a16", "sites_digest": "aaaa"}
    judged = {"kind": "evaluation", "step": 30, "profile": profile}
    full = {"kind": "evaluation", "step": 30, "profile": {"name": "full", "sites_digest": None}}
    row = {"kind": "injection", "phase": "evaluation", "profile": "w4a16", "step": 30, "point": "weight", "calls": 5}
    assert gaps_of({}, {"sites": 0}, [judged, full, row, *PROVEN]) == ()
    missing = ("no quantized call was counted while it was judged as w4a16 at step 30",)
    for other in ({"step": 0}, {"profile": "w4a4"}, {"calls": 0}):
        assert gaps_of({}, {"sites": 0}, [judged, full, row | other, *PROVEN]) == missing


def test_a_live_policy_that_differs_from_the_saved_one_is_a_gap_also_when_it_is_no_number():
    for difference in (0.5, "nan", "inf"):
        lines = [{"kind": "master", "unharmed": True}, {"kind": "live_equals_fresh", "max_difference": difference}]
        assert gaps_of({}, {"sites": 0}, lines) == ("its live policy differed from the saved one",)


def test_what_an_evaluation_rounded_does_not_stand_in_for_the_training():
    place = {"kind": "injection", "point": "weight", "site": "a", "calls": 9}
    older = {"share_changed": 0.0, "missed": None}
    lines = [*PROVEN, *(place | {"phase": phase} | older for phase in ("rollout", "training"))]
    judged = place | {"phase": "evaluation", "profile": "w4a16", "share_changed": 0.9}
    spec = {"injection": {"weight": "mxfp4"}}
    assert gaps_of(spec, QUANTIZED, [*lines, judged]) == (
        "rounding changed no weight at 1 of 1 site during rollout",
        "rounding changed no weight at 1 of 1 site during training",
    )


@pytest.fixture
def of_values(make_run, ask: Ask) -> Callable[..., Answer]:
    """Two arms of two seeds with one site table, whose digests are given by arm and seed; then they are compared."""

    def make(key: str, weights: dict[str, Any], answers: dict[str, Any], **control: Any) -> Answer:
        for arm, described in (("with", {"training": {key: "k2"}}), ("without", control.get("spec", {}))):
            for seed in range(2):
                digests = {"final_weights": weights[arm][seed]} if weights else {}
                summary = {"sites": 0, "calls": {}, "master_unharmed": True} | digests
                run = make_run(arm, seed, 0.5 + 0.01 * seed, spec=described, evidence=summary)
                judged = {"kind": "evaluation", "step": 30, "strict": 0.5 + 0.01 * seed}
                judged |= {"profile": {"name": "deployment", "sites_digest": None}}
                run.add_evidence(line(**judged | ({"answers_digest": answers[arm][seed]} if answers else {})))
        return ask("with", "without", factors=(f"training.{key}",))

    return make


ANSWERS = {"with": ["a", "b"], "without": ["c", "d"]}
WEIGHTS = {"with": ["w", "v"], "without": ["u", "t"]}


@pytest.mark.parametrize(
    "weights, answers, what",
    [
        ({"with": ["w", "v"], "without": ["w", "v"]}, ANSWERS, "the final weights are bit-identical (seed 0, 1)"),
        ({"with": ["w", "v"], "without": ["w", "t"]}, ANSWERS, "the final weights are bit-identical (seed 0)"),
        (WEIGHTS, {"with": ["a", "b"], "without": ["a", "b"]}, "every answer is the same on both sides"),
        ({}, {"with": ["a", "b"], "without": ["a", "b"]}, "every answer is the same on both sides"),
    ],
)
def test_a_knob_wired_to_nothing_is_refused_by_value(of_values, weights, answers, what: str):
    """Kind: two names for one thing; whatever the descriptions say, the weights or the answers are the same bits."""
    compared = of_values("kl_loss_type", weights, answers)
    assert _kinds(compared) == {"identical"}
    assert what in compared.objections[0].sentence()
    assert compared.verdict is None


def test_one_seed_that_answers_alike_is_no_identity(of_values):
    alike = {"with": ["a", "b"], "without": ["a", "d"]}
    assert of_values("kl_loss_type", WEIGHTS, alike).comparable


def test_a_rounding_that_costs_no_answer_is_a_result(make_run, ask: Ask):
    """Other site tables on the two sides: that both give the same answers is what was asked."""
    for seed in range(2):
        for arm, name, table in (("bf16", "full", None), ("bf16x", "w8a8", "aaaa")):
            change = {"name": name, "precision": name, "sites_digest": table}
            summary = {"sites": 0, "calls": {}, "master_unharmed": True, "final_weights": f"{arm}{seed}"}
            run = make_run(arm, seed, 0.5 + 0.01 * seed, profile=change, evidence=summary, suite=arm)
            judged = {"kind": "evaluation", "step": 30, "profile": {"name": name, "sites_digest": None}}
            run.add_evidence(line(**judged | {"strict": 0.5 + 0.01 * seed, "answers_digest": f"same{seed}"}))
    assert ask("bf16x/bf16x@w8a8", "bf16/bf16@full", factors=("precision",)).comparable


def test_a_treatment_of_evaluations_alone_leaves_the_weights_alone(make_run, ask: Ask):
    """Kind: a treatment that acts in one phase only; the same weights are then what it must end in."""
    alone = {"injection": {"weight": "mxfp4", "apply_during": {"weight": ["evaluation"]}}}
    for seed in range(2):
        summary = {"calls": {}, "master_unharmed": True, "final_weights": f"w{seed}"}
        make_run("bf16", seed, 0.7 + 0.01 * seed, profile={"sites_digest": None}, evidence=summary | {"sites": 0})
        run = make_run("later", seed, 0.6 + 0.01 * seed, spec=alone, evidence=summary | {"sites": 14})
        profile = {"name": "deployment", "sites_digest": "aaaa"}
        own = {"strict": 0.6 + 0.01 * seed, "answers_digest": f"b{seed}"}
        run.add_evidence(line("evaluation", step=30, profile=profile, **own))
        row = {"point": "weight", "site": "a", "calls": 9, "share_changed": 0.9, "looks": 1}
        run.add_evidence(line("injection", phase="evaluation", profile="deployment", step=30, **row))
    assert ask("later", "bf16", factors=("injection", "precision")).objections == ()


def test_an_injection_that_its_spec_leaves_out_of_training_has_no_gap_there():
    """Kind: a treatment that acts in evaluations alone; it was refused as 'its spec injects nothing'."""
    spec = {"injection": {"weight": "mxfp4", "apply_during": {"weight": ["evaluation"]}}}
    judged = {"kind": "evaluation", "step": 30, "profile": {"name": "deployment", "sites_digest": "aaaa"}}
    place = {"kind": "injection", "point": "weight", "site": "a", "calls": 9, "share_changed": 0.9}
    row = place | {"phase": "evaluation", "profile": "deployment", "step": 30}
    assert gaps_of(spec, {"sites": 14}, [judged, row, *PROVEN]) == ()
    assert gaps_of(spec, {"sites": 14}, [judged, row, place | {"phase": "training"}, *PROVEN]) == (
        "sites were rounded during training, which its spec leaves out",
    )
    assert gaps_of(spec, {"sites": 14}, PROVEN) == (
        "its spec injects in evaluations alone, and none was made under the injection",
    )
    assert gaps_of({}, {"sites": 14}, PROVEN) == ("14 sites were quantized, but its spec injects nothing",)


NOW, ONCE = "3a37afb21d02", "4d2c04c1ea1f"  # what nvfp4_w4a4 rounds, with a factor for fused weights and for each


@pytest.mark.parametrize(
    ("tables", "factors"),
    [
        ((ONCE, ONCE), ()),
        ((ONCE, NOW), ()),
        ((ONCE, NOW), ("precision",)),
        ((ONCE, ONCE), ("evaluation.profiles",)),
        ((ONCE, ONCE), ("injection",)),
    ],
    ids=["all old", "one old", "one old, precision may differ", "profiles may differ", "injections may differ"],
)
def test_records_of_a_mode_that_meant_other_formats_are_refused(make_run, ask: Ask, tables, factors):
    """The same profile, description and run id: only the digest of what was rounded tells."""
    judged = {"name": "nvfp4_w4a4", "precision": "nvfp4_w4a4"}
    for seed, table in enumerate(tables):
        made = [
            make_run("bf16", seed, share + 0.01 * seed, suite=suite, profile=judged | {"sites_digest": digest})
            for suite, share, digest in (("earlier", 0.7, table), ("later", 0.6, NOW))
        ]
        assert made[0].run_id == made[1].run_id
    compared = ask("later/bf16@nvfp4_w4a4", "earlier/bf16@nvfp4_w4a4", factors=factors)
    listed = ", ".join(sorted({*tables}))
    said = [objection.sentence() for objection in compared.objections if objection.kind == "precision"]
    assert said == [f"the evaluation's sites_digest differs: {NOW} against {listed}"]
    assert compared.verdict is None


def test_a_run_without_one_of_its_evaluations_is_refused_as_in_the_report(two_arms, make_run, ask: Ask):
    """Kind: two pipelines for one question; the report has always refused such a run."""
    two_arms()
    run = make_run("w4a4", 3, 0.63, spec=W4A4 | {"evaluation": {"profiles": ["deployment", "full"]}})
    assert read_run(run).gaps == ("no evaluation of full at the last step",)
    compared = ask("trial/" + run.run_id)
    assert [o.treatment for o in compared.objections if o.kind == "evidence"] == [
        "no evaluation of full at the last step"
    ]


def test_nothing_recorded_is_a_gap():
    assert gaps_of({}, {}, []) == ("it left no evidence",)


def test_a_side_whose_training_moved_few_weights_is_marked(two_arms, ask: Ask):
    """A run that could not move its weights counted like any other; its log alone said so."""
    said = "training changed 1.92% of the weights: take model.master_dtype: float32"
    two_arms(evidence=QUANTIZED | {"hardly_moved": said})
    found = ask()
    assert [mark.endswith(f"is hardly trained: {said}") for mark in found.marks] == [True] * 3
    assert found.as_dict()["marks"] == found.marks


def test_without_the_folders_the_verdict_stands_and_the_missing_cross_checks_are_named(
    make_run, ask: Ask, opened, tmp_path: Path
):
    for seed in range(2):
        make_run("bf16", seed, [True, False] * 20, evidence=NONE)
        make_run("w4a4", seed, [True] * 10 + [False] * 30, spec=W4A4, evidence=QUANTIZED)
    there = ask()
    assert there.checks.two_way is not None
    shutil.rmtree(tmp_path / "runs")
    away = ask()
    assert (away.verdict, away.checks.two_way, len(away.checks.unread)) == (there.verdict, None, 4)
