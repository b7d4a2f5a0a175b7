"""Dropout acts where a policy learns and nowhere else: an answer is sampled from, and scored by, the whole model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode, and afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def drops(model: nn.Module) -> bool:
    """Whether anything in `model` is left out at random while it learns: of hidden states, adapters or attention."""
    return any(
        (isinstance(module, _DropoutNd) and module.p > 0) or getattr(module, "attention_dropout", 0) > 0
        for module in model.modules()
    )
