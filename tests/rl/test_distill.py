"""Distillation to the teacher: the exact KL over the vocabulary, its gradient, and chunks that change nothing."""

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from fp4rl.rl.reference import teacher_kl
from fp4rl.spec.errors import InvalidValueError


def pair(seed=0, answers=3, tokens=5, vocabulary=7):
    random = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(answers, tokens, vocabulary, generator=random) * 2 for _ in range(2))
    mask = (torch.arange(tokens) < torch.tensor([[5], [2], [4]])).float()
    return student.requires_grad_(), teacher, mask


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_divergence_is_torchs_own(direction):
    student, teacher, mask = pair()
    log_s, log_t = log_softmax(student, -1), log_softmax(teacher, -1)
    ahead, behind = (log_t, log_s) if direction == "forward" else (log_s, log_t)
    expected = kl_div(behind, ahead, log_target=True, reduction="none").sum(-1) * mask
    assert torch.allclose(teacher_kl(student, teacher, mask, direction), expected, atol=1e-6)


def test_the_forward_gradient_is_student_minus_teacher_probabilities():
    student, teacher, mask = pair()
    teacher_kl(student, teacher, mask).sum().backward()
    expected = (student.detach().softmax(-1) - teacher.softmax(-1)) * mask.unsqueeze(-1)
    assert torch.allclose(student.grad, expected, atol=1e-6)


def test_two_coins_have_their_hand_worked_divergences():
    # teacher 1/2, 1/2; student 3/4, 1/4. forward: .5 ln(2/3) + .5 ln 2; reverse: .75 ln 1.5 + .25 ln .5
    student, teacher = torch.tensor([[[0.75, 0.25]]]).log(), torch.tensor([[[0.5, 0.5]]]).log()
    assert teacher_kl(student, teacher, torch.ones(1, 1)).item() == pytest.approx(0.143841, abs=1e-5)
    assert teacher_kl(student, teacher, torch.ones(1, 1), "reverse").item() == pytest.approx(0.130812, abs=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_change_neither_value_nor_gradient(direction, chunk):
    (whole, teacher, mask), (cut, _, _) = pair(), pair()
    kl_whole = teacher_kl(whole, teacher, mask, direction)
    kl_cut = teacher_kl(cut, teacher, mask, direction, chunk_tokens=chunk)
    kl_whole.sum().backward()
    kl_cut.sum().backward()
    assert torch.allclose(kl_whole, kl_cut, atol=1e-6)
    assert torch.allclose(whole.grad, cut.grad, atol=1e-6)


def test_heads_turn_hidden_states_into_logits_and_get_their_gradient():
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 4, generator=random).requires_grad_()
    weight = torch.randn(6, 4, generator=random).requires_grad_()
    teacher = torch.randn(2, 3, 6, generator=random)
    kl = teacher_kl(hidden, teacher, torch.ones(2, 3), heads=(lambda h: h @ weight.T, lambda t: t), chunk_tokens=2)
    kl.sum().backward()
    logits = (hidden.detach() @ weight.detach().T).requires_grad_()
    teacher_kl(logits, teacher, torch.ones(2, 3)).sum().backward()
    assert torch.allclose(weight.grad, torch.einsum("btv,bth->vh", logits.grad, hidden.detach()), atol=1e-5)
    assert torch.allclose(hidden.grad, logits.grad @ weight.detach(), atol=1e-5)


def test_descending_the_divergence_makes_the_student_the_teacher():
    for direction in ("forward", "reverse"):
        student, teacher, mask = pair()
        before = teacher_kl(student, teacher, mask, direction).sum().item()
        optimizer = torch.optim.Adam([student], lr=0.1)
        for _ in range(100):
            optimizer.zero_grad()
            teacher_kl(student, teacher, mask, direction).sum().backward()
            optimizer.step()
        assert teacher_kl(student, teacher, mask, direction).sum().item() < before / 50


def test_a_temperature_divides_the_logits_of_both():
    student, teacher, mask = pair()
    assert torch.allclose(
        teacher_kl(student, teacher, mask, temperature=2.0), teacher_kl(student / 2, teacher / 2, mask)
    )


def test_the_teacher_gets_no_gradient():
    student, teacher, mask = pair()
    teacher.requires_grad_()
    teacher_kl(student, teacher, mask).sum().backward()
    assert teacher.grad is None


def test_masked_positions_give_zero_whatever_stands_there():
    student, teacher, mask = pair()
    broken = teacher.masked_fill(mask.unsqueeze(-1) == 0, float("nan"))
    kl = teacher_kl(student, broken, mask)
    assert kl.isfinite().all()
    assert not kl[mask == 0].any()
    empty = teacher_kl(student, teacher, torch.zeros_like(mask))
    empty.sum().backward()
    assert not empty.any()
    assert not student.grad.any()


def test_a_token_both_rule_out_adds_nothing_and_leaves_the_gradient_finite():
    student, teacher, mask = pair()
    gone = torch.zeros(7).index_fill(0, torch.tensor([6]), -torch.inf)
    for direction in ("forward", "reverse"):
        kl = teacher_kl(student + gone, teacher + gone, mask, direction)
        (gradient,) = torch.autograd.grad(kl.sum(), student)
        assert torch.allclose(kl, teacher_kl(student[..., :6], teacher[..., :6], mask, direction), atol=1e-6)
        assert gradient.isfinite().all()


def test_half_precision_logits_are_compared_in_float32():
    student, teacher, mask = pair()
    assert teacher_kl(student.bfloat16(), teacher.bfloat16(), mask).dtype == torch.float32


def test_mistakes_name_their_cure():
    student, teacher, mask = pair()
    with pytest.raises(InvalidValueError, match="score the same tokens"):
        teacher_kl(student, teacher[:, 1:], mask)
    with pytest.raises(InvalidValueError, match="vocabularies of 7 and 6"):
        teacher_kl(student, teacher[..., :6], mask)
    with pytest.raises(InvalidValueError, match="above 0"):
        teacher_kl(student, teacher, mask, temperature=0.0)
