"""Filling a batch: what reaches the loss are whole groups whose answers differ, in order, and no others."""

import itertools
from dataclasses import replace

import pytest
import torch

from fp4rl.rl.fill import Filler, PromptStream, reward_accuracy
from fp4rl.rl.generate import Generation
from fp4rl.rl.rewards import Part, Rewarder
from fp4rl.rl.rollout import Rollout
from fp4rl.spec.task import Problem, Score
from fp4rl.spec.training import Training

N = 4
PROBLEMS = [Problem(f"p{i}", f"q{i}", "yes", "yes", "train") for i in range(40)]


def filler(mixed, groups=3, function=None, uneven=False, **changes):
    """Problems whose number is in `mixed` get two right answers of four; odd others four, even others none. `uneven`:
    of each four the last answer is a token longer."""
    recipe = Training.model_validate({"rollout_n": N, "overlong_buffer": {"enable": False}, **changes})
    scorer = lambda problem, text: Score(text == "yes", text == "yes", True)  # noqa: E731
    stream = PromptStream(PROBLEMS, seed=0)
    numbers = {}

    def sample(problems):
        texts = []
        for place, problem in enumerate(problems):
            number = numbers.setdefault(problem.id, len(numbers))
            right = place % N < 2 if number in mixed else number % 2
            texts.append("yes" if right else "no")
        last = [uneven and place % N == N - 1 for place in range(len(problems))]
        # the length says which problem it was
        ids = [[7] * (1 + numbers[p.id] + longer) for p, longer in zip(problems, last, strict=True)]
        answers = [Generation(row, text, True) for row, text in zip(ids, texts, strict=True)]
        return Rollout(tuple(problems), tuple([1] for _ in problems), tuple(answers))

    return Filler(recipe, stream, Rewarder(scorer, (Part("of.mine", function) if function else Part(),)), groups).fill(
        sample
    )


def groups_of(filled):
    return [len(answer.generation.tokens) - 1 for answer in filled.answers][::N]


def test_groups_without_spread_never_reach_the_loss():
    filled = filler(mixed={1, 4, 5, 7})
    assert groups_of(filled) == [1, 4, 5]
    rewards = torch.tensor([answer.reward for answer in filled.answers]).view(-1, N)
    assert (rewards.std(-1) > 0).all()


def test_at_the_cap_it_trains_on_what_there_is_and_says_so():
    filled = filler(mixed={1})
    assert groups_of(filled) == [1]
    assert "1 of 3 groups have spread in score (accuracy) after 3 generations" in filled.report()
    assert filled.metrics(N)["sampling/trained_groups"] == 1
    # The answers of the problems number 0, 1, ..., 8 have 1, 2, ..., 9 tokens; those that were dropped cost as much.
    assert filled.metrics(N)["tokens/rollout"] == N * 45


def test_with_nothing_to_learn_from_there_is_no_answer_and_no_crash():
    filled = filler(mixed=set())
    assert filled.answers == ()
    assert "no update in this step" in filled.report()


def test_without_the_filter_every_group_reaches_the_loss_once():
    filled = filler(mixed={1}, filter_groups={"enable": False})
    assert groups_of(filled) == [0, 1, 2]
    assert filled.metrics(N)["sampling/gen_batches"] == 1


def test_a_start_that_cannot_teach_anything_is_said():
    """With and without a filter; one group with spread is enough."""
    off = {"filter_groups": {"enable": False}}
    assert "none of the 9 groups of answers has any spread" in filler(mixed=set()).without_spread(N)
    assert "none of the 3 groups of answers has any spread in its rewards (mean 0.333" in filler(
        mixed=set(), **off
    ).without_spread(N)
    assert filler(mixed={1}).without_spread(N) is filler(mixed={1}, **off).without_spread(N) is None


ALL_ON = {"enable": True, "len": 2, "penalty_factor": 0.5}


@pytest.mark.parametrize("filtered", [{"enable": False}, {"enable": True, "metric": "acc"}])
def test_groups_that_earn_one_and_the_same_are_counted_whatever_the_filter_looks_at(filtered):
    """Kind: a signal that only one setting logs. Neither the filter nor an overlong penalty hides a constant reward."""
    long = {"max_response_length": 3, "overlong_buffer": ALL_ON, "filter_groups": filtered}
    constant = filler({0, 1, 2}, function=lambda **_: 1.0, **long).metrics(N)
    assert (constant["reward/no_spread"], constant["rollout/groups"], constant["rollout/answers"]) == (1.0, 3.0, 12.0)
    assert filler({0, 1}, **long).metrics(N)["reward/no_spread"] == pytest.approx(1 / 3)


def test_how_often_and_how_hard_long_answers_are_punished_is_logged():
    """By hand: groups of 1, 2 and 3 tokens under a cap of 3 with a buffer of 2 lose 0, 1/2 and 2/2 of 0.5."""
    found = filler({0, 1, 2}, max_response_length=3, overlong_buffer=ALL_ON).metrics(N)
    assert found["overlong/share"] == pytest.approx(2 / 3)
    assert found["overlong/mean_penalty"] == pytest.approx(-(0 + 0.25 + 0.5) / 3)
    assert found["reward/mean"] == pytest.approx(found["accuracy/rollout"] + found["overlong/mean_penalty"])
    assert filler({0, 1, 2}).metrics(N)["overlong/share"] == 0.0


def by_hand(rewards, accuracy):
    """Pearson's correlation of two groups of four, each value less its group's mean; plain Python."""

    def centred(values):
        groups = [values[:4], values[4:]]
        return [value - sum(group) / 4 for group in groups for value in group]

    x, y = centred(rewards), centred(accuracy)
    return sum(a * b for a, b in zip(x, y, strict=True)) / (sum(a * a for a in x) * sum(b * b for b in y)) ** 0.5


RIGHT = [1.0, 0, 0, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    "rewards, expected",
    [
        (RIGHT, 1.0),
        ([-3 * r + 5 for r in RIGHT], -1.0),
        # a group that earns more as a whole says nothing: by hand (-.5 + .5) / sqrt(1 * 1) of the first group alone
        ([1.0, 1, 0, 0, 9, 9, 9, 9], 0.0),
        ([0.1, 0.2, 0.3, 0.4, 0.9, 0.1, 0.5, 0.5], None),
    ],
)
def test_how_reward_goes_with_accuracy_within_a_group(rewards, expected):
    found = reward_accuracy(torch.tensor(rewards), torch.tensor(RIGHT), N)["reward/accuracy_correlation"]
    assert found == pytest.approx(by_hand(rewards, RIGHT) if expected is None else expected, abs=1e-6)


def test_an_answer_that_was_not_judged_takes_no_part_and_equal_ones_correlate_with_nothing():
    """By hand: of three judged answers (1, 0, 0 and right, wrong, wrong) all agree, whatever the fourth would say."""
    nan = float("nan")
    judged = reward_accuracy(torch.tensor([1.0, 0, 0, nan]), torch.tensor([1.0, 0, 0, 1]), N)
    assert judged == {"reward/accuracy_correlation": pytest.approx(1.0)}
    for rewards, accuracy in (([0.1] * 4, RIGHT[:4]), (RIGHT[:4], [1.0] * 4), ([nan] * 4, RIGHT[:4])):
        assert reward_accuracy(torch.tensor(rewards), torch.tensor(accuracy), N) == {}


def test_a_reward_of_the_wrong_sign_is_logged_as_what_it_is():
    assert filler({0, 1, 2}).metrics(N)["reward/accuracy_correlation"] == pytest.approx(1.0)
    wrong = filler({0, 1, 2}, function=lambda completion, **_: -float(completion == "yes")).metrics(N)
    assert wrong["reward/accuracy_correlation"] == pytest.approx(-1.0)
    assert "reward/accuracy_correlation" not in filler(set()).metrics(N)


TURNS = itertools.count()


def alternating(**_):
    return float(next(TURNS) % 2)


def test_the_filter_follows_the_reward_and_says_what_it_looked_at():
    """A filter that looks at another metric than what is learned: by default it is the reward's own score."""
    assert groups_of(filler(mixed=set(), function=alternating)) == [0, 1, 2]
    by_accuracy = filler(mixed=set(), function=alternating, filter_groups={"metric": "acc"})
    assert by_accuracy.answers == ()
    assert "0 of 3 groups have spread in acc (the task) after 3 generations" in by_accuracy.report()
    assert by_accuracy.without_spread(N) == (
        "in 9 of the 9 groups the rewards differ, but the filter kept none of them, for want of spread in acc (the "
        "task): set training.filter_groups.metric to score or reward"
    )


def test_the_filter_does_not_take_the_overlong_punishment_for_a_difference_in_score():
    """The punishment alone is no spread in score; `reward` counts it."""
    punished = {"max_response_length": 12, "overlong_buffer": {"enable": True, "len": 11}}
    assert filler(mixed=set(), uneven=True, **punished).answers == ()
    by_reward = filler(mixed=set(), uneven=True, **punished, filter_groups={"metric": "reward"})
    assert groups_of(by_reward) == [0, 1, 2]


def test_the_answers_kept_for_people_are_the_first_two_of_two_problems_and_long_ones_are_cut():
    generation = filler({0, 1, 2, 3}).generations[0]
    kept = generation.sample(N)
    of = generation.rollout.problems
    assert [answer.problem_id for answer in kept] == [of[0].id, of[0].id, of[N].id, of[N].id]
    assert [(answer.completion, answer.strict) for answer in kept] == [("yes", True)] * 4
    assert kept[0].gold == "yes"
    assert kept[2].tokens == 2  # the second problem's answers have two tokens
    long = Rollout(of[:1], ([1],), (Generation([7], "x" * 2500, True),))
    (answer,) = replace(generation, rollout=long).sample(N)
    assert answer.completion == "x" * 2000 + " [500 more characters]"
