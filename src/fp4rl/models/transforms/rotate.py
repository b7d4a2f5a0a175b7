"""Rotations of a model's weights: of its residual stream, and of the values of its heads.

With Q orthogonal and an RMS norm of weight 1, norm(x Q) = norm(x) Q. So the embedding E becomes E Q, whatever writes
into the stream W becomes Q^T W, and whatever reads it through a norm of weight g becomes W diag(g) Q: every logit stays
what it was. Between values and output projection there is no norm, and attention only averages values: V becomes R^T V,
and a head's columns of O become O R.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fp4rl.models.transforms.structure import structure_of
from fp4rl.numerics.levels import hadamard

_AT_ONCE = 2**24  # values that are in float64 at a time


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q = diag(signs) (H kron odd) of a width n = 2^k m: Sylvester's Hadamard matrix of 2^k over
    its root, and a random orthogonal matrix of the odd m. `signs` [n], `odd` [m, m]; float64."""

    signs: Tensor
    odd: Tensor

    @classmethod
    def drawn(cls, width: int, generator: torch.Generator) -> "Rotation":
        """Draw signs and odd part."""
        odd = width // (width & -width)
        signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
        q, r = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))
        return cls(signs, (q * r.diagonal().sign()).contiguous())

    def of_rows(self, x: Tensor) -> Tensor:
        """Return x Q for `x` [..., n], computed in float64, in its dtype and on its device."""
        rows = x.reshape(-1, len(self.signs))
        turned = [self._turned(part) for part in torch.split(rows, max(1, _AT_ONCE // len(self.signs)))]
        return torch.cat(turned).view(x.shape)

    def of_columns(self, x: Tensor) -> Tensor:
        """Return Q^T x for `x` [n, columns], or [n]."""
        return self.of_rows(x.t()).t().contiguous() if x.ndim > 1 else self.of_rows(x)

    def _turned(self, rows: Tensor) -> Tensor:
        odd = self.odd.to(rows.device)
        wide = (rows.double() * self.signs.to(rows.device)).view(len(rows), -1, len(odd)) @ odd  # [rows, 2^k, m]
        powers = wide.shape[1]
        turned = hadamard(wide.mT.reshape(-1, powers)).view(len(rows), len(odd), powers).mT
        return turned.reshape(rows.shape).to(rows.dtype)


@torch.no_grad()
def rotate_residual(model: Any, seed: int) -> None:
    """Rotate the residual stream of a causal model in place; a head tied to the embedding is untied.

    Raises InvalidValueError for a model whose structure is not known.
    """
    structure = structure_of(model)
    untie(model)
    embedding = model.get_input_embeddings()
    rotation = Rotation.drawn(embedding.weight.shape[-1], torch.Generator().manual_seed(seed))
    embedding.weight.copy_(rotation.of_rows(embedding.weight))
    for path, sites in structure.readers.items():
        gain: Tensor = model.get_submodule(path).weight
        for linear in map(structure.linear, sites):
            linear.weight.copy_(rotation.of_rows(linear.weight.double() * gain.double()))
        gain.fill_(1.0)
    for linear in map(structure.linear, structure.writers):
        linear.weight.copy_(rotation.of_columns(linear.weight))
        if linear.bias is not None:
            linear.bias.copy_(rotation.of_columns(linear.bias))


@torch.no_grad()
def rotate_heads(model: Any, seed: int) -> None:
    """Rotate the values of every head in place, by another matrix in every layer.

    Raises InvalidValueError for a model whose structure is not known, or whose values share a matrix with queries.
    """
    generator = torch.Generator().manual_seed(seed)
    for heads in list(structure_of(model).heads()):
        rotation = Rotation.drawn(heads.width, generator)
        for values in (heads.v.weight, heads.v.bias):
            if values is not None:
                by_head = values.view(heads.kv_heads, heads.width, -1)
                values.copy_(rotation.of_rows(by_head.mT).mT.reshape(values.shape))
        heads.o.weight.copy_(rotation.of_rows(heads.by_head(heads.o.weight)).flatten(1))


def untie(model: Any) -> None:
    """Give the head a copy of the embedding's weight where they share one, and say so in the configuration."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), embedding.weight.requires_grad)
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False
