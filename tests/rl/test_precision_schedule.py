"""Runs whose precision changes: each stage is, bit for bit, a run of that precision, and the judge sees what acted."""

import pytest

from fp4rl.lab.gaps import gaps
from fp4rl.spec.evidence import Injected
from fp4rl.spec.records import read_evidence

_EVALUATION = {"count": 4, "profiles": ["deployment"]}
_TIMES = ("time/", "injection/")


def scheduled(**own):
    return {"mode": "w4a4", "deployment": "compressed_tensors", "schedule": {"input": own}}


@pytest.fixture
def of(run, experiment):
    """`of(injection)` -> (trained, heard, experiment) of a run of 4 steps."""

    def go(injection, name, steps=4, **changes):
        training = {"steps": steps, **changes}
        described = experiment("w4a4", training=training, evaluation=_EVALUATION)
        described = described.model_validate(described.model_dump() | {"injection": injection})
        return *run(described, name), described

    return go


def numbers(heard):
    return [{k: v for k, v in values.items() if not k.startswith(_TIMES)} for _, values in heard.steps]


def test_a_schedule_that_begins_at_its_end_changes_no_number(of):
    plain, plain_heard, _ = of({"mode": "w4a4", "deployment": "compressed_tensors"}, "plain")
    noop, noop_heard, _ = of(scheduled(before="mxfp8", from_step=0), "noop")
    assert noop.evidence.final_weights == plain.evidence.final_weights
    assert numbers(noop_heard) == numbers(plain_heard)


def test_each_stage_is_a_run_of_its_precision_and_its_evidence_is_judged_by_value(of):
    before, before_heard, _ = of({"mode": "w4a8", "deployment": "compressed_tensors"}, "w4a8")
    trained, heard, described = of(scheduled(before="mxfp8", from_step=2, over=1), "changing")
    after, after_heard, _ = of({"mode": "w4a4", "deployment": "compressed_tensors"}, "w4a4")
    assert numbers(heard)[:2] == numbers(before_heard)[:2]
    assert numbers(heard)[2] != numbers(before_heard)[2]
    assert numbers(heard)[0] != numbers(after_heard)[0]
    assert len({run.evidence.final_weights for run in (before, trained, after)}) == 3
    assert heard.evaluations[0].profile == after_heard.evaluations[0].profile
    assert heard.evaluations[0].items == after_heard.evaluations[0].items  # of the start, in what is deployed
    assert [values["injection/input_share"] for _, values in heard.steps] == [0.0, 0.0, 0.5, 1.0]
    assert all(values["injection/input_rounded"] > 0 for _, values in heard.steps)
    lines = [read_evidence(record) for record in heard.records]
    judged = described.model_dump(mode="json"), trained.evidence
    assert gaps(*judged, lines) == ()
    for stage, steps in (("before", "0 to 1"), ("blend", "2 to 2"), (None, "3 to 3")):
        silent = [
            line
            for line in lines
            if not (
                isinstance(line, Injected) and line.profile is None and line.point == "input" and line.stage == stage
            )
        ]
        assert gaps(*judged, silent) == tuple(
            f"no quantized call was counted for input during {phase}, steps {steps}"
            for phase in ("rollout", "training")
        )
    few = [
        line.extended(stage="before") if isinstance(line, Injected) and line.stage == "blend" else line
        for line in lines
    ]
    assert "no quantized call was counted for input during rollout, steps 2 to 2" in gaps(*judged, few)


def test_inputs_that_are_rounded_from_some_step_on_count_nothing_before(of):
    _, plain_heard, _ = of({"mode": "w4a16", "deployment": "compressed_tensors"}, "w4a16", steps=2)
    trained, heard, described = of(scheduled(from_step=1), "changing", steps=2)
    assert numbers(heard)[0] == numbers(plain_heard)[0]
    assert [values["injection/input_rounded"] > 0 for _, values in heard.steps] == [False, True]
    lines = [read_evidence(record) for record in heard.records]
    assert gaps(described.model_dump(mode="json"), trained.evidence, lines) == ()
    never = described.model_dump(mode="json")
    never["injection"]["schedule"]["input"]["from_step"] = 5
    assert gaps(never, trained.evidence, lines) == tuple(
        f"input was rounded during {phase} in the stage `after`, which its schedule does not have"
        for phase in ("rollout", "training")
    )
