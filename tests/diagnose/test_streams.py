"""What a scan reads: texts as tokens, kurtosis piece by piece, inputs of named modules."""

import math

import pytest
import torch
from torch import nn

from fp4rl.diagnose.calibration import calibrate, from_tokens
from fp4rl.diagnose.dynamics import excess_kurtosis, power_sums
from fp4rl.diagnose.texts import texts_of
from fp4rl.sites.observe import observe
from fp4rl.spec.errors import InvalidValueError, NotFoundError


def test_a_kurtosis_from_pieces_is_that_of_the_whole():
    values = torch.randn(10_001, generator=torch.Generator().manual_seed(0)).double() ** 3 + 0.7
    merged = excess_kurtosis(sum(power_sums(piece) for piece in values.split(977)))
    deviation = values - values.mean()
    assert merged == pytest.approx(float((deviation**4).mean() / values.var(correction=0) ** 2 - 3), rel=1e-10)
    assert math.isnan(excess_kurtosis(power_sums(torch.zeros(3))))


def test_gaussian_values_have_no_excess_kurtosis():
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    assert abs(excess_kurtosis(power_sums(values))) < 0.05


class Words:
    pad_token_id = 0

    def __call__(self, text):
        return {"input_ids": [len(word) for word in text.split()]}


def test_calibration_counts_texts_and_tokens_and_masks_padding():
    found = calibrate(Words(), ["aa b", "ccc", "  "], batch_size=2)
    assert (found.texts, found.tokens) == (2, 3)
    (batch,) = found.batches
    assert batch.ids.tolist() == [[3, 0], [2, 1]]
    assert batch.mask.tolist() == [[1, 0], [1, 1]]
    assert found.described()["few"] is True


def test_the_digest_of_a_calibration_depends_on_its_tokens():
    assert from_tokens([[1, 2]]).digest == from_tokens([[1, 2]], batch_size=1).digest != from_tokens([[2, 1]]).digest


def test_empty_calibration_text_and_a_tokenizer_without_padding_are_refused_with_the_cure():
    with pytest.raises(InvalidValueError, match="text=FILE"):
        calibrate(Words(), ["", "  "])
    tokenizer = Words()
    tokenizer.pad_token_id = None
    with pytest.raises(InvalidValueError, match=r"no pad token; set tokenizer\.pad_token"):
        calibrate(tokenizer, ["a b"])


def test_a_text_of_few_lines_is_cut_into_thirty_two_pieces(tmp_path):
    file = tmp_path / "story.txt"
    file.write_text(" ".join(f"w{i}" for i in range(320)))
    pieces = texts_of(file)
    assert len(pieces) == 32
    assert " ".join(pieces).split() == file.read_text().split()
    file.write_text("\n \n")
    with pytest.raises(InvalidValueError, match="empty"):
        texts_of(file)
    with pytest.raises(NotFoundError, match="no such file"):
        texts_of(tmp_path / "gone.txt")


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.q(x) + self.k(x))


def test_one_pass_shows_the_inputs_of_all_modules_without_the_padding():
    model, x = Two(), torch.randn(2, 5, 3)
    seen, expected = {}, model(x)
    with observe(
        model, ["q", "k", "out"], on_input=lambda name, tokens: seen.setdefault(name, []).append(tokens)
    ) as eye:
        eye.mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
        got = model(x)
    assert torch.equal(got, expected)
    assert torch.equal(seen["q"][0], torch.cat([x[0], x[1, :2]]))
    assert seen["q"][0] is seen["k"][0]  # shared work for a shared input
    assert seen["out"][0].shape == (7, 4)
    assert not model._modules["q"]._forward_pre_hooks


def test_a_module_that_is_not_there_is_named_and_no_hook_stays():
    model = Two()
    with pytest.raises(NotFoundError, match="did you mean 'out'"), observe(model, ["q", "outt"], on_input=print):
        pass
    assert not model.q._forward_pre_hooks
