"""One entry adds an algorithm, a reward or a check; a forgotten piece is an error where the table is read."""

import importlib
import sys

import pytest

import fp4rl.rl.health.checks
import fp4rl.rl.rollout  # noqa: F401
from fp4rl.rl import losses, rewards
from fp4rl.rl.objective import loss_rule
from fp4rl.rl.rewards import reward_named
from fp4rl.spec import algorithms, health
from fp4rl.spec.algorithms import ALGORITHMS, Algorithm
from fp4rl.spec.errors import InvalidValueError, require_names
from fp4rl.spec.training import Training

SOFT = {**ALGORITHMS, "new": Algorithm("me", clipping="soft")}
PLANTED = {
    "a clipping without a formula": (
        ("fp4rl.spec.algorithms", "ALGORITHMS", SOFT, "fp4rl.rl.losses"),
        "clipping: soft can be described but has no function",
    ),
    "an estimator without a formula": (
        ("fp4rl.spec.algorithms", "ADV_ESTIMATORS", (*algorithms.ADV_ESTIMATORS, "median"), "fp4rl.rl.rollout"),
        "adv_estimator: median can be described but has no function",
    ),
    "a check without a record": (
        ("fp4rl.spec.health", "CHECKS", (*health.CHECKS, "boredom"), "fp4rl.rl.health.checks"),
        "health check: boredom can be described but has no function",
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_forgotten_piece_is_an_error_at_import(planted, monkeypatch):
    (table, name, value, reader), message = PLANTED[planted]
    monkeypatch.setattr(f"{table}.{name}", value)
    monkeypatch.delitem(sys.modules, reader)
    with pytest.raises(InvalidValueError, match=message):
        importlib.import_module(reader)


def test_an_aggregation_that_is_none_is_an_error_where_it_is_named():
    with pytest.raises(ValueError, match="me: no loss_agg_mode 'token_mean'"):
        Algorithm("me", loss_agg_mode="token_mean")


def test_what_has_a_function_but_no_name_is_an_error_too():
    with pytest.raises(InvalidValueError, match="kl_loss_type: k4 has a function but cannot be described"):
        require_names("kl_loss_type", ["k1", "k4"], ["k1"])


def test_an_algorithm_is_one_entry(monkeypatch):
    """Loss, bounds, advantage and what the recipe comes to all follow the entry."""
    entry = Algorithm("here", ratio_level="sequence", clip_ratio_high=0.5, norm_adv_by_std=False, kl_loss_coef=0.01)
    for module in ("fp4rl.rl.losses", "fp4rl.spec.training"):
        monkeypatch.setattr(f"{module}.ALGORITHMS", {**ALGORITHMS, "mine": entry})
    recipe = Training().model_copy(update={"algorithm": "mine"})
    rule = loss_rule(recipe)
    assert (rule.ratio_level, rule.clip_ratio_high, rule.kl_loss_coef) == ("sequence", 0.5, 0.01)
    assert recipe.effective()["norm_adv_by_std"] is False
    assert rule.clipping in losses.CLIPPINGS


def test_a_reward_is_one_entry(monkeypatch):
    monkeypatch.setattr(
        rewards, "REWARDS", {**rewards.REWARDS, "brevity": lambda: lambda completion, **_: -len(completion)}
    )
    assert reward_named("brevity")(completion="four") == -4
    with pytest.raises(InvalidValueError, match=r"write accuracy, math_verify, .*, brevity, or the path"):
        reward_named("nothing")


def test_the_dual_clip_is_a_key_of_a_recipe_and_reaches_the_loss():
    assert loss_rule(Training(clip_ratio_c=3.0)).clip_ratio_c == 3.0
    assert loss_rule(Training()).clip_ratio_c is None
    assert "clip_ratio_c" not in Training().model_dump()
    assert Training(clip_ratio_c=3.0).effective()["clip_ratio_c"] == 3.0
    with pytest.raises(ValueError, match="cispo has no ratio that it could bound"):
        Training(algorithm="cispo", clip_ratio_c=3.0)
    with pytest.raises(ValueError, match="greater than 1"):
        Training(clip_ratio_c=1.0)


@pytest.mark.parametrize("kind", ["k1+", "k3+", "abs+", "low_var_kl+"])
def test_the_estimators_with_the_gradient_of_k2_can_be_asked_for(kind):
    assert loss_rule(Training(kl_loss_coef=0.1, kl_loss_type=kind)).kl_loss_type == kind
