"""Evidence shows rounding, not calls: for every phase or profile, point and site that should act."""

import pytest

from fp4rl.spec.injection import Injection
from planted.records import gaps_of

PROVEN = [{"kind": "master", "unharmed": True}, {"kind": "live_equals_fresh", "max_difference": 0.0}]
SUMMARY = {"sites": 3, "master_unharmed": True}
ERROR = "relative@matmul/forward"


def rows(points, phases=("rollout", "training"), sites=3, **seen):
    return [
        {"kind": "injection", "phase": phase, "site": f"s{i}", "point": point, "calls": 9, "elements": 640}
        | {"share_changed": 0.9, "looks": 4, "missed": 0}
        | seen
        for phase in phases
        for point in points
        for i in range(sites)
    ]


def acting(points, phases=("rollout", "training"), sites=3, **beside):
    return [{"kind": "acting", "phase": phase, "points": dict.fromkeys(points, sites)} | beside for phase in phases]


def found(injection, lines):
    spec = {"injection": Injection.model_validate(injection).model_dump(mode="json"), "noise": None}
    return gaps_of(spec, SUMMARY, [*PROVEN, *lines])


@pytest.mark.parametrize(
    "injection, points",
    [
        ("w4a4", ["weight", "input"]),
        ({"kv_cache": "mxfp8"}, ["kv_cache"]),
        ({"errors": [{"kind": "relative"}]}, [ERROR]),
        ({"by_pattern": {"*": {"weight": "mxfp4"}}}, ["weight"]),
    ],
)
def test_what_a_spec_asks_for_and_a_run_shows_is_no_gap(injection, points):
    assert found(injection, [*rows(points), *acting(points)]) == ()
    assert found(injection, rows(points)) == ()  # a run of older code, which recorded no table of what was to act
    for phase in ("rollout", "training"):
        other = {"rollout": "training", "training": "rollout"}[phase]
        assert found(injection, rows(points, phases=[other])) == (f"no quantized call was counted during {phase}",)


@pytest.mark.parametrize("injection, point", [({"kv_cache": "mxfp8"}, "kv_cache"), ({"errors": [{}]}, ERROR)])
def test_a_point_beside_others_is_asked_for_too(injection, point):
    did = "was rounded" if point == "kv_cache" else "acted"
    both = {"mode": "w4a16", **injection}
    assert found(both, [*rows(["weight", point]), *acting(["weight", point])]) == ()
    assert found(both, [*rows(["weight"]), *acting(["weight", point])]) == tuple(
        f"{point} {did} at 0 of 3 sites during {phase}" for phase in ("rollout", "training")
    )
    assert found(both, rows(["weight"])) == tuple(
        f"{point} {did} at 0 of 1 site during {phase}" for phase in ("rollout", "training")
    )


def test_w4a4_without_a_row_of_inputs_is_a_gap():
    assert found("w4a4", rows(["weight"]))[0] == "input was rounded at 0 of 1 site during rollout"


def test_a_site_without_a_row_is_a_gap():
    lines = [*rows(["weight"], sites=2), *acting(["weight"])]
    assert found("w4a16", lines)[1] == "weight was rounded at 2 of 3 sites during training"


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("phase", ["rollout", "training"])
def test_a_phase_or_a_site_that_was_called_and_not_rounded_is_a_gap(phase, older):
    lines = rows(["weight"])
    idle = [row for row in lines if row["phase"] == phase][1:]
    for row in idle:
        row |= {"share_changed": 0.0, "missed": 4}
    if older:
        lines = [row | {"missed": None} for row in lines]
    assert found("w4a16", lines) == (f"rounding changed no weight at 2 of 3 sites during {phase}",)


def test_a_single_look_that_missed_is_a_gap_though_others_saw_a_change():
    lines = rows(["weight"])
    lines[0] |= {"missed": 1, "share_changed": 0.7}
    assert found("w4a16", lines) == ("rounding changed no weight at 1 of 3 sites during rollout",)


def test_what_lies_on_the_grid_is_no_gap():
    assert found("w4a16", rows(["weight"], share_changed=0.0)) == ()


def test_an_error_that_meets_some_values_is_there_and_one_that_meets_none_is_not():
    error = {"errors": [{"kind": "saturation", "scale": 50.0}]}
    lines = rows(["saturation@matmul/forward"], share_changed=0.0)
    assert len(found(error, lines)) == 2
    lines[0] |= {"share_changed": 1e-5}
    assert found(error, lines) == ("saturation@matmul/forward changed nothing during training",)


@pytest.mark.parametrize(
    "injection, point, row",
    [
        ({"grad_input": "mxfp8"}, "grad_input", "grad_input"),
        ({"errors": [{"when": "backward"}]}, "relative@matmul/backward", "relative@matmul/backward:grad_weight"),
    ],
)
def test_what_acts_in_the_backward_is_asked_of_training_alone_and_of_the_sites_that_have_a_gradient(
    injection, point, row
):
    table = acting([point], phases=["training"])
    assert found(injection, [*rows([row], phases=["training"], sites=1), *table]) == ()
    assert found(injection, table) == ("no quantized call was counted during training",)


def test_an_injection_of_nothing_that_quantized_is_a_gap():
    assert found("none", []) == ("3 sites were quantized, but its spec injects nothing",)


def test_every_point_of_an_evaluation_is_asked_for():
    """An evaluation in BF16 under the label w4a4: as many calls as ever, and nothing rounded."""
    profile = {"name": "w4a4", "sites_digest": "aaaa"}
    judged = {"kind": "evaluation", "step": 8, "profile": profile}
    beside = {"profile": "w4a4", "step": 8}
    table = acting(["weight", "input"], phases=["evaluation"], **beside)
    lines = rows(["weight", "input"], phases=["evaluation"], **beside)
    assert found("none", [judged, *table, *lines])[1:] == ()
    where = "while it was judged as w4a4 at step 8"
    assert found("none", [judged, *table, *lines[:3]])[1:] == (f"input was rounded at 0 of 3 sites {where}",)
    idle = [row | {"missed": 2, "share_changed": 0.0} for row in lines]
    assert found("none", [judged, *table, *idle])[1:] == (
        f"rounding changed no input at 3 of 3 sites {where}",
        f"rounding changed no weight at 3 of 3 sites {where}",
    )
    assert found("none", [judged])[1:] == (f"no quantized call was counted {where}",)
    nothing = {**profile, "sites_digest": None}
    assert found("none", [judged | {"profile": nothing}])[1:] == ()


def test_transforms_that_a_spec_names_must_be_recorded_with_what_they_changed():
    spec = {"model": {"transforms": [{"name": "smooth"}]}}
    line = {"kind": "transformed", "transforms": [{"name": "smooth"}]}

    def gaps(spec, *lines):
        return gaps_of(spec, {"master_unharmed": True}, [*PROVEN, *lines])

    assert gaps(spec, line | {"difference": 1e-6}) == ()
    assert gaps(spec | {"start": {"arm": "a"}}, line) == ()  # its start came so
    assert gaps(spec, line) == ("no difference of the logits before and after its transforms is recorded",)
    assert gaps(spec) == ("its start model went through nothing, and its spec names smooth",)
    assert gaps({}, line) == ("its start model went through smooth, and its spec names nothing",)
