"""Patterns cover whole names; numbers are whole numbers; what hits nothing names its neighbours."""

import pytest
from pydantic import ValidationError

from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.targets import LEFT_BY_DEFAULT, Targets, matches, require_hit

NAMES = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 2, 20, 27) for p in "qkvo"]


@pytest.mark.parametrize("pattern", ["*.layers.2.*", "*layers.2*", "model.layers.2*"])
def test_layer_2_is_not_layer_20(pattern):
    assert {name.split(".")[2] for name in NAMES if matches(name, pattern)} == {"2"}


def test_a_star_before_a_number_does_not_swallow_its_first_digit():
    assert not matches("model.layers.20", "*0")
    assert matches("model.layers.0", "*0")


@pytest.mark.parametrize(
    ("name", "pattern", "hit"),
    [
        ("lm_head", "lm_head", True),
        ("model.lm_head", "lm_head", False),
        ("a.b_proj", "*.?_proj", True),
        ("a.layers.3.q", "*.layers.[0-3].q", True),
        ("a.layers.4.q", "*.layers.[!0-3].q", True),
        ("a.layers.2.q", "*.layers.[!0-3].q", False),
        ("a+b", "a+b", True),
        ("aab", "a+b", False),
    ],
)
def test_patterns_are_shell_patterns_over_the_whole_name(name, pattern, hit):
    assert matches(name, pattern) is hit


def test_a_pattern_without_a_hit_names_the_nearest():
    with pytest.raises(NotFoundError, match=r"no linear layer matches '\*\.qproj'; did you mean '\*\.q_proj'"):
        require_hit("*.qproj", NAMES, "linear layer")


def test_an_open_bracket_is_an_error_at_once():
    with pytest.raises(ValidationError, match="never closed"):
        Targets(take=("*.layers.[0-3",))


def test_one_pattern_may_stand_alone():
    assert Targets.model_validate({"take": "*.q_proj"}).take == ("*.q_proj",)


@pytest.mark.parametrize("bad", [{"take": []}, {"layers": []}, {"leave": [" "]}])
def test_empty_choices_are_refused(bad):
    with pytest.raises(ValidationError, match="empty"):
        Targets.model_validate(bad)


def test_layers_count_from_both_ends():
    assert Targets(layers=(0, -1)).layer_numbers(28) == {0, 27}


def test_a_layer_outside_the_model_is_refused():
    with pytest.raises(InvalidValueError, match="28 is not in this model, which has layers 0 to 27"):
        Targets(layers=(28,)).layer_numbers(28)


@pytest.mark.parametrize(
    "name", ["lm_head", "model.embed_tokens", "model.layers.0.mlp.gate", "a.q_proj.lora_A.default", "model.norm"]
)
def test_what_no_engine_serves_in_4_bits_is_left_by_default(name):
    assert Targets().why_left(name)


def test_gate_proj_is_not_taken_for_a_router():
    assert Targets().why_left("model.layers.0.mlp.gate_proj") is None


def test_a_role_that_is_opted_in_is_not_left_by_default():
    """The kind: a setting whose default cancels it, which only a run would have found out."""
    kept = [p for p in LEFT_BY_DEFAULT if p != "*lm_head*"]
    assert Targets.model_validate({"opt_in": "lm_head"}).leave == tuple(kept)
    assert Targets(opt_in=("lm_head",)).why_left("lm_head") is None
    assert Targets(opt_in=("router",)).why_left("model.layers.0.mlp.gate") is None
    assert Targets(opt_in=("adapter",)).why_left("q_proj.lora_A.default") is None
    assert Targets().why_left("lm_head") == "left by '*lm_head*'"
    again = Targets.model_validate(Targets(opt_in=("lm_head",)).model_dump(mode="json"))
    assert again == Targets(opt_in=("lm_head",))


def test_leave_adds_to_the_default_and_leave_only_replaces_it():
    """Kind: a cure that an error names, `leave: [x]`, took the head and the routers in by the way."""
    added = Targets.model_validate({"leave": "*.q_proj"})
    assert added.leave == (*LEFT_BY_DEFAULT, "*.q_proj")
    assert added.why_left("lm_head")
    assert added.why_left("a.q_proj")
    alone = Targets.model_validate({"leave_only": ["*.q_proj"]})
    assert alone.why_left("lm_head") is None
    assert Targets(leave_only=()).leave == ()
    for targets in (added, alone, Targets(leave_only=()), Targets(opt_in=("lm_head",), leave=("*.o_proj",))):
        assert Targets.model_validate(targets.model_dump(mode="json")) == targets
        more = targets.leaving(["x"])
        assert more.leave == (*targets.leave, "x")
        assert Targets.model_validate(more.model_dump(mode="json")) == more
    with pytest.raises(ValidationError, match="leave_only says all that is left"):
        Targets.model_validate({"leave": ["a"], "leave_only": ["b"]})
    for bad in (5, [["a"]], {"a": 1}):
        with pytest.raises(ValidationError):
            Targets.model_validate({"leave": bad})


def test_what_suites_say_without_leave_only_keeps_its_digest():
    """Ids of runs are digests of these words; a list that began with the default means and writes what it did."""
    keys = {"take", "leave", "layers", "opt_in"}
    assert Targets().model_dump(mode="json").keys() == keys
    assert Targets().leave == LEFT_BY_DEFAULT
    assert Targets(leave=(*LEFT_BY_DEFAULT, "*.down_proj")).leave == (*LEFT_BY_DEFAULT, "*.down_proj")


def test_a_role_that_is_opted_in_and_left_by_name_is_refused():
    with pytest.raises(ValidationError, match=r"opt_in: \[lm_head\] would do nothing, because leave holds"):
        Targets(leave=("*lm_head*", "*norm*"), opt_in=("lm_head",))


def test_the_tied_head_of_the_embedded_model_is_refused_where_it_is_described():
    content = {"injection": {"mode": "w4a16", "targets": {"opt_in": ["lm_head"]}}}
    with pytest.raises(ValidationError, match="lm_head shares its weight with the embedding"):
        Experiment.model_validate(content)


def test_a_head_that_training_would_not_reach_is_refused_where_it_is_described():
    head = {"mode": "w4a16", "targets": {"opt_in": ["lm_head"]}}
    for model in ({"embedded": {"tie_word_embeddings": False}}, "folder"):
        with pytest.raises(ValidationError, match=r"write apply_during: \[rollout, evaluation\]"):
            Experiment.model_validate({"model": model, "injection": head})
        Experiment.model_validate({"model": model, "injection": head | {"apply_during": ["rollout", "evaluation"]}})


def test_a_layer_that_multiplies_is_no_norm_whatever_the_module_around_it_is_called():
    """DBRX's attention lies in `norm_attn_norm`, Gemma-3n makes logits ready in `altup_unembed_projections`."""
    assert Targets().why_left("blocks.0.norm_attn_norm.attn.Wqkv", "linear", "attention") is None
    assert Targets().why_left("model.altup_unembed_projections.0", "linear", "mlp") is None
    assert Targets().why_left("blocks.0.norm_attn_norm.norm_1", "norm", "norm") == "left by '*norm*'"
    assert Targets().why_left("model.embed_tokens", "embedding", "embedding") == "left by '*embed*'"
    assert Targets(leave=("*attn*",)).why_left("blocks.0.norm_attn_norm.attn.Wqkv", "linear", "attention")
