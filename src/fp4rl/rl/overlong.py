"""DAPO's soft punishment of answers that are too long."""

import torch
from torch import Tensor

from fp4rl.spec.errors import InvalidValueError


def soft_overlong_penalty(
    lengths: Tensor, max_response_length: int, buffer_len: int, penalty_factor: float = 1.0
) -> Tensor:
    """Compute DAPO's soft punishment (arXiv 2503.14476, eq. 13), in [-penalty_factor, 0], to be *added* to the reward.

        0                                        up to max_response_length - buffer_len tokens
        -penalty_factor * (tokens over) / buffer_len          inside the buffer
        -penalty_factor                          at max_response_length and beyond

    lengths [answers], in tokens. verl's `overlong_buffer_cfg` and TRL's `get_soft_overlong_punishment` give the same
    numbers. Raises InvalidValueError when the buffer does not fit: with buffer_len = max_response_length every answer
    is punished, and a buffer that begins below the usual length teaches the policy to skip steps.
    """
    if not 0 < buffer_len < max_response_length:
        raise InvalidValueError(
            f"overlong buffer of {buffer_len} tokens does not fit below max_response_length {max_response_length}: "
            "take about a quarter of it"
        )
    over = lengths.to(torch.float32) - (max_response_length - buffer_len)
    return -penalty_factor * (over / buffer_len).clamp(0.0, 1.0)
