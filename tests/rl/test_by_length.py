"""Answers of like length share a micro-batch: no row leaves its update, and no micro-batch is wider than it must be."""

import torch

from fp4rl.rl.rollout import by_length
from fp4rl.rl.trainer import Trainer

# prompt lengths and answer lengths of two updates of two micro-batches, two rows each; the last row is under no mask
PROMPTS = [3, 1, 2, 3, 1, 1, 3, 2]
ANSWERS = [1, 6, 2, 5, 4, 1, 1, 0]


def micro_batches():
    found = []
    for first in range(0, 8, 2):
        rows = torch.arange(first, first + 2)
        prompts, answers = torch.tensor(PROMPTS)[rows], torch.tensor(ANSWERS)[rows]
        mask = (torch.arange(6) < answers.unsqueeze(-1)).long()
        prompt_mask = (torch.arange(2, -1, -1) < prompts.unsqueeze(-1)).long()
        found.append(
            {
                "advantages": rows.float(),
                "prompt_ids": prompt_mask * (rows + 1).unsqueeze(-1),
                "prompt_mask": prompt_mask,
                "completion_ids": mask * (rows + 1).unsqueeze(-1),
                "completion_mask": mask,
            }
        )
    return found


def test_rows_stay_whole_and_in_their_update_in_the_order_of_their_tokens():
    found = by_length(micro_batches(), 2)
    assert [batch["advantages"].int().tolist() for batch in found] == [[0, 2], [1, 3], [5, 7], [6, 4]]
    for batch in found:
        rows = batch["advantages"].long()
        assert batch["completion_mask"].sum(-1).tolist() == [ANSWERS[row] for row in rows]
        assert batch["prompt_mask"].sum(-1).tolist() == [PROMPTS[row] for row in rows]
        assert (batch["completion_ids"] == batch["completion_mask"] * (rows + 1).unsqueeze(-1)).all()
        assert (batch["prompt_ids"] == batch["prompt_mask"] * (rows + 1).unsqueeze(-1)).all()


def test_every_micro_batch_is_as_wide_as_its_longest_row():
    found = by_length(micro_batches(), 2)
    assert [batch["completion_ids"].shape[1] for batch in found] == [2, 6, 1, 4]
    assert [batch["prompt_mask"].shape[1] for batch in found] == [3, 3, 2, 3]
    (nothing,) = by_length([{name: value[1:] for name, value in micro_batches()[3].items()}], 1)
    assert nothing["completion_mask"].tolist() == [[0]], "a batch without any answer keeps a column"


def test_an_update_of_one_micro_batch_keeps_its_order():
    found = by_length(micro_batches(), 1)
    assert [batch["advantages"].int().tolist() for batch in found] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_the_trainer_learns_from_micro_batches_in_that_order(run, experiment, monkeypatch):
    tokens, widths = [], []
    real = Trainer._compute_loss

    def seen(self, model, inputs):
        answers = inputs["completion_mask"].sum(-1)
        tokens.append((answers + inputs["prompt_mask"].sum(-1)).tolist())
        widths.append((int(answers.max()), inputs["completion_mask"].shape[1]))
        return real(self, model, inputs)

    monkeypatch.setattr(Trainer, "_compute_loss", seen)
    run(experiment("bf16", training={"steps": 1, "mini_batch_size": 4, "micro_batch_size": 4}))
    assert [len(rows) for rows in tokens] == [4] * 4
    in_order = [count for rows in tokens for count in rows]
    assert in_order == sorted(in_order)
    assert all(longest == width for longest, width in widths)
