"""Arms that take weights from other arms: by which description, in which order, and what is refused."""

import pytest

from fp4rl.lab.matrix import planned, single
from fp4rl.spec.digest import digest
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.linked import described
from fp4rl.spec.load import arm_contents

ARMS = {
    "qad": {
        "start": {"arm": "bf16"},
        "injection": "w4a4",
        "training": {"distillation": {"teacher": {"arm": "bf16"}}},
    },
    "later": {"start": {"arm": "qad"}, "injection": "w4a4"},
    "alone": {"injection": "w4a4"},
    "bf16": {},
}


def suite(arms=ARMS, **more):
    return Suite.model_validate({"suite": "staged", "arms": arms, "seeds": [3, 4], **more})


def ids(arms=ARMS):
    return {(run.arm, run.seed): run.run_id for run in planned(suite(arms))}


def test_each_run_stands_behind_those_of_its_seed_that_it_takes_from():
    runs = planned(suite())
    assert [run.arm for run in runs] == ["alone", "bf16", "qad", "later"] * 2
    by_id = {run.run_id: run for run in runs}
    for run in runs:
        assert {(by_id[needed].arm, by_id[needed].seed) for needed in run.needs.values()} == {
            "qad": {("bf16", run.seed)},
            "later": {("qad", run.seed)},
        }.get(run.arm, set())


def test_a_changed_start_changes_the_ids_of_all_that_follow_and_of_no_other():
    before, after = ids(), ids(ARMS | {"bf16": {"training": {"lr": 1e-3}}})
    assert {arm for arm, seed in before if before[arm, seed] != after[arm, seed]} == {"bf16", "qad", "later"}


def test_the_link_is_the_digest_of_the_start_without_its_seed_and_the_same_at_every_seed():
    arms = dict(arm_contents(suite()))
    assert arms["qad"].start.digest == digest(described(arms["bf16"]))
    assert arms["later"].start.digest == digest(described(arms["qad"]))
    assert len({digest(described(run.experiment)) for run in planned(suite()) if run.arm == "qad"}) == 1
    written = arms["later"].model_dump(mode="json")
    assert digest(Experiment.model_validate(written)) == digest(arms["later"])


def test_an_arm_is_taken_at_the_same_values_of_the_axes():
    arms = {"b": {"start": {"arm": "a"}, "injection": "w4a4"}, "a": {}}
    runs = planned(suite(arms, axes={"training.lr": [1e-3, 2e-3]}))
    starts = {run.arm: run.experiment.start.arm for run in runs if run.experiment.start}
    assert starts == {"b+lr=0.001": "a+lr=0.001", "b+lr=0.002": "a+lr=0.002"}


def test_arms_without_links_keep_their_ids_beside_arms_with_them():
    assert ids({"alone": ARMS["alone"], "bf16": {}}).items() <= ids().items()


@pytest.mark.parametrize(
    ("arms", "why"),
    [
        ({"b": {"start": {"arm": "bf61"}}, "bf16": {"injection": "w4a4"}}, "start.arm: no arm is called 'bf61'; did"),
        (
            {"a": {"start": {"arm": "b"}}, "b": {"start": {"arm": "a"}}},
            "in a circle: (a <- b <- a|b <- a <- b)",
        ),
        ({"a": {"start": {"arm": "a"}}}, "in a circle: a <- a"),
        ({"a": {"start": {"arm": "b"}}, "b": {"model": "models/m"}}, "built from another model"),
        (
            {"a": {"start": {"arm": "b"}, "model": {"lora": {}}}, "b": {"model": {"lora": {"rank": 8}}}},
            "ends with an adapter; drop model.lora",
        ),
        ({"a": {"start": {"arm": "b", "digest": "0" * 12}}, "b": {}}, "digest 0+ is not that of b, .*leave it out"),
        ({"a": {"start": {}}, "b": {}}, "exactly one of `arm` and `run`"),
        ({"a": {"start": {"arm": "b", "run": "x"}}, "b": {}}, "exactly one of `arm` and `run`"),
        ({"a": {"training": {"distillation": {"teacher": {}}}}, "b": {}}, "exactly one of `arm` and `path`"),
        ({"a": {"training": {"distillation": {"teacher": {"amr": "b"}}}}, "b": {}}, "teacher.amr.*did you mean"),
        ({"a": {"training": {"distillation": {"teacher": "liev"}}}, "b": {}}, "teacher: .*'liev'"),
    ],
)
def test_what_cannot_be_linked_is_refused_by_name(arms, why):
    with pytest.raises(InvalidValueError, match=why):
        planned(suite(arms))


def test_an_experiment_of_its_own_has_no_arms():
    with pytest.raises(InvalidValueError, match=r"start.arm bf16: this is one experiment .*start.run"):
        single(Experiment.model_validate({"start": {"arm": "bf16"}}), "mine")
