"""The embedded model is small, repeatable to the bit, and learns what it is shown."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fp4rl.models.tiny import build, one_thread, warm_up
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.model import Embedded
from fp4rl.tasks.arithmetic import Arithmetic

TOKENIZER = build_tokenizer()
TASK = Arithmetic()
SHORT = Embedded(warm_up_steps=6, warm_up_batch_size=16)
EXAMPLES = TASK.demonstrations(96)


def warmed(recipe, examples=EXAMPLES, on_step=None):
    model = build(recipe, TOKENIZER)
    warm_up(model, TOKENIZER, examples, recipe, on_step)
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def greedy_accuracy(model, problems) -> float:
    batch = TOKENIZER([problem.prompt for problem in problems], return_tensors="pt", padding=True)
    kept = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    ids = model.generate(**kept, max_new_tokens=48, do_sample=False)[:, batch["input_ids"].shape[1] :]
    texts = TOKENIZER.batch_decode(ids, skip_special_tokens=True)
    return sum(TASK.score(p, text).strict for p, text in zip(problems, texts, strict=True)) / len(problems)


def test_it_has_a_tenth_to_half_a_million_weights():
    assert 100_000 <= sum(weight.numel() for weight in build(SHORT, TOKENIZER).parameters()) <= 500_000


@pytest.mark.parametrize("size, least, most", [("m", 1e6, 4e6), ("l", 30e6, 100e6)])
def test_larger_sizes_have_the_weights_that_they_promise(size, least, most):
    """By hand: four products of attention, three biases, three products of the MLP, two norms; the embedding once."""
    recipe, words = Embedded(size=size), len(TOKENIZER)
    wide, inner = recipe.hidden_size, recipe.intermediate_size
    layer = 4 * wide**2 + 3 * wide + 3 * wide * inner + 2 * wide
    counted = recipe.num_layers * layer + wide + words * wide
    assert counted == sum(weight.numel() for weight in build(recipe, TOKENIZER).parameters())
    assert least <= counted <= most


def test_a_warm_up_on_an_accelerator_is_the_same_computation_there(monkeypatch):
    on_cpu, there = warmed(SHORT), build(SHORT, TOKENIZER)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cpu"))
    warm_up(there, TOKENIZER, EXAMPLES, SHORT.model_copy(update={"warm_up_on": "accelerator"}))
    assert same(on_cpu, dict(there.named_parameters()))


def test_without_an_accelerator_the_largest_size_is_refused_with_the_cure(monkeypatch):
    recipe = Embedded(size="l", hidden_size=32, num_heads=1, num_layers=1, intermediate_size=32)
    model = build(recipe, TOKENIZER)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
    with pytest.raises(InvalidValueError, match=r"warm_up_on: accelerator, and torch has none here; write cpu"):
        warm_up(model, TOKENIZER, EXAMPLES, recipe)


def test_every_linear_layer_divides_into_blocks_of_32_along_its_inputs():
    linears = [module for module in build(SHORT, TOKENIZER).modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 2 * 7 + 1
    assert all(linear.in_features % 32 == 0 for linear in linears)


def test_it_is_born_from_its_seed_alone_and_leaves_the_global_generator_where_it_was():
    before = torch.random.get_rng_state()
    first = dict(build(SHORT, TOKENIZER).named_parameters())
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)
    assert same(first, dict(build(SHORT, TOKENIZER).named_parameters()))
    other = dict(build(SHORT.model_copy(update={"seed": 1}), TOKENIZER).named_parameters())
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_a_warm_up_is_repeatable_to_the_bit_and_depends_on_the_seed_and_the_examples():
    first = warmed(SHORT)
    assert same(first, warmed(SHORT))
    assert not same(first, warmed(SHORT.model_copy(update={"seed": 1})))
    assert not same(first, warmed(SHORT, TASK.demonstrations(96, sloppy=0.0)))


def test_a_warm_up_computes_on_one_thread_whatever_it_was_given_and_gives_them_back():
    # sums split over threads round differently; at this size that shows only after many steps
    threads: set[int] = set()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        second = warmed(SHORT, on_step=lambda _step, _loss: threads.add(torch.get_num_threads()))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == {1}
    assert same(warmed(SHORT), second)


def test_threads_are_given_back_after_an_exception_too():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), one_thread():
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_the_loss_counts_the_solution_and_its_end_alone():
    model = build(SHORT, TOKENIZER)
    prompt, solution = EXAMPLES[0]
    losses: list[float] = []
    one = SHORT.model_copy(update={"warm_up_steps": 1, "warm_up_batch_size": 1})
    text = TOKENIZER(f"{prompt} {solution}", return_tensors="pt")["input_ids"]
    ids = torch.cat([text, torch.tensor([[TOKENIZER.eos_token_id]])], dim=1)
    start = len(TOKENIZER(prompt)["input_ids"])
    with torch.no_grad():
        logps = model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
    expected = -logps.gather(-1, ids[0, start:, None]).mean().item()
    warm_up(model, TOKENIZER, EXAMPLES[:1], one, lambda _step, loss: losses.append(loss))
    assert losses == pytest.approx([expected], rel=1e-5)


def test_padding_changes_no_weight():
    # two examples of different length in one batch: the gradient is that of both alone, weighted by their tokens
    both = [min(EXAMPLES, key=lambda e: len(e[1])), max(EXAMPLES, key=lambda e: len(e[1]))]
    losses: dict[int, float] = {}
    for size, examples in ((2, both), (1, both[:1]), (3, both[1:])):
        recipe = SHORT.model_copy(update={"warm_up_steps": 1, "warm_up_batch_size": min(size, 2)})
        model = build(recipe, TOKENIZER)
        warm_up(model, TOKENIZER, examples, recipe, lambda _s, loss, size=size: losses.update({size: loss}))
    tokens = [len(TOKENIZER(f" {solution}")["input_ids"]) + 1 for _, solution in both]
    weighted = (losses[1] * tokens[0] + losses[3] * tokens[1]) / sum(tokens)
    assert losses[2] == pytest.approx(weighted, rel=1e-5)


def test_on_step_is_told_every_step_and_the_loss_falls():
    seen: list[tuple[int, float]] = []
    recipe = SHORT.model_copy(update={"warm_up_steps": 40})
    warmed(recipe, on_step=lambda step, loss: seen.append((step, loss)))
    assert [step for step, _ in seen] == list(range(1, 41))
    assert seen[-1][1] < 0.5 * seen[0][1]


def test_no_steps_need_no_examples_and_some_steps_do():
    assert same(
        warmed(SHORT.model_copy(update={"warm_up_steps": 0}), []), dict(build(SHORT, TOKENIZER).named_parameters())
    )
    with pytest.raises(InvalidValueError, match="no examples to warm up on"):
        warmed(SHORT, [])


@pytest.mark.parametrize("knob", [{"hidden_size": 48}, {"num_heads": 3}, {"warm_up_lr": 0}, {"layers": 2}])
def test_a_recipe_that_cannot_be_is_refused(knob):
    with pytest.raises(ValidationError):
        Embedded(**knob)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_full_warm_up_ends_in_the_middle(seed):
    recipe = Embedded(seed=seed)
    model = build(recipe, TOKENIZER)
    loss = warm_up(model, TOKENIZER, TASK.demonstrations(recipe.examples_needed), recipe)
    assert loss < 0.1
    assert 0.2 < greedy_accuracy(model, TASK.problems("test", 500)) < 0.8
