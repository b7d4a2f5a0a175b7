"""One packed weight: the tensors that it lies in, and its values as the library of its layout decodes them.

    code * scale                        MX: exact
    code * (scale / global_scale)       NVFP4 of compressed-tensors, decoded in BF16
    code * (scale * scale_2)            NVFP4 of ModelOpt, in FP32
    (code * scale) * dual_scale         dual scales of AscendV1, in FP32

The two NVFP4 layouts round differently in the last bit, so each is multiplied out in its own order.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fp4rl.models.shards import StoredTensor
from fp4rl.numerics.blocks import Grouping
from fp4rl.numerics.levels import Levels
from fp4rl.numerics.packing import Packed, Quantized, decode, dequantize, unpack
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import E2M1, Format

PIECE = 1 << 20  # values decoded at once
_NEIGHBOURS = 4  # numbers on either side of a reciprocal that are tried
CODES, SCALES, FACTOR, COARSE = "codes", "scales", "factor", "coarse"
CODE_DTYPES = {4: torch.uint8, 8: torch.float8_e4m3fn}
SCALE_DTYPES = {"e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight that `name` calls in the files of the unquantized model, of `shape` there.

    `fmt` says element, block and kind of scale: the rule that chose the scales is not stored. `input` is what the
    checkpoint says of the inputs of its matmul, None for unrounded ones; `unread_input` says what no format here has.
    `parts`: codes, scales, and factor or coarse where the layout has them. `decoded_in` is the dtype that the layout's
    library decodes in, None for the one that is asked for; `multiplier`: scales are multiplied by the factor, not
    divided. `transposed`: codes are [..., out, in], while the unquantized tensor is [..., in, out].
    """

    name: str
    fmt: Format
    input: Format | None
    parts: Mapping[str, StoredTensor]
    unread_input: str | None = None
    decoded_in: torch.dtype | None = None
    multiplier: bool = False
    transposed: bool = False

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape of the codes, one a value, as they are stored."""
        codes = self.parts[CODES].shape
        if self.transposed:  # gpt-oss: [experts, out, groups, bytes]
            return (*codes[:-2], codes[-2] * codes[-1] * 2)
        return (*codes[:-1], codes[-1] * (2 if self.fmt.element.bits == 4 else 1))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the unquantized tensor."""
        packed = self.packed_shape
        return (*packed[:-2], packed[-1], packed[-2]) if self.transposed else packed

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that `rows` and `read` give values in."""
        return self.decoded_in or torch.float32

    @property
    def elements(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """What its values take."""
        return self.elements * self.dtype.itemsize

    def quantized(self, dtype: torch.dtype = torch.bfloat16) -> Packed | Quantized:
        """Return codes and scales as `numerics.packing` has them, of values in `dtype`; 4-bit codes stay packed.

        Raises InvalidValueError for a scale that is no number. The factor of a layout that multiplies by it is the
        reciprocal here, so that `numerics` may differ from `values` in the last bit.
        """
        codes, scales, coarse = (self._whole(part) for part in (CODES, SCALES, COARSE))
        assert codes is not None
        assert scales is not None
        shape = self.packed_shape
        bytes_of_row = shape[-1] // (2 if self.fmt.element.bits == 4 else 1)
        codes, scales = codes.view(*shape[:-1], bytes_of_row), scales.view(*shape[:-1], -1)
        factor = self.factor
        return self._packed(
            codes, scales, coarse, factor if factor is None or not self.multiplier else 1 / factor, dtype
        )

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return the unquantized tensor [shape], as the layout's library decodes it; raises what `quantized` does."""
        rows, columns = prod(self.packed_shape[:-1]), self.packed_shape[-1]
        out, first = torch.empty(rows, columns, dtype=dtype), 0
        for piece in self._pieces(max(PIECE // max(columns, 1), 1), self.decoded_in or dtype):
            out[first : first + len(piece)] = piece
            first += len(piece)
        whole = out.view(self.packed_shape)
        return whole.transpose(-1, -2).contiguous() if self.transposed else whole

    def read(self) -> Tensor:
        """Return the whole unquantized tensor."""
        return self.values(self.dtype)

    def rows(self, at_once: int) -> Iterator[Tensor]:
        """Yield the tensor as [rows, columns] in pieces of at most `at_once` rows, as `StoredTensor.rows` does."""
        if self.transposed:
            yield from torch.split(self.read().flatten(0, -2), at_once)
        else:
            yield from self._pieces(at_once, self.dtype)

    @property
    def factor(self) -> Tensor | None:
        """The tensor's own FP32 number, [], as it is stored; None where the layout has none."""
        stored = self.parts.get(FACTOR)
        if stored is None:
            return None
        factor = stored.read().float().reshape(())
        if not (factor.isfinite() and factor > 0):
            raise InvalidValueError(f"{stored.file}: {stored.name} is {float(factor):g}, not a number above 0")
        return factor

    def divides_to(self, expected: Tensor) -> bool:
        """Return whether codes and scales give those very values where scales are divided by the factor.

        Only of a layout that multiplies: the factor is one of the numbers whose reciprocal may have been stored.
        """
        if not self.multiplier or tuple(expected.shape) != self.shape:
            return False
        stored = self.quantized(expected.dtype)
        assert isinstance(stored, Packed)
        assert stored.factor is not None
        steps = torch.arange(-_NEIGHBOURS, _NEIGHBOURS + 1, dtype=torch.int32)
        factors = (stored.factor.view(torch.int32) + steps).view(torch.float32)
        return any(torch.equal(dequantize(replace(stored, factor=factor)), expected) for factor in factors)

    def _pieces(self, at_once: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield values [at most `at_once` rows, columns] in the order of the codes."""
        count, factor = prod(self.packed_shape[:-1]), self.factor
        each = [self._rows_of(part, at_once, count) for part in (CODES, SCALES, COARSE)]
        for codes, scales, coarse in zip(*each, strict=True):
            assert codes is not None
            assert scales is not None
            coarse = None if coarse is None else coarse.unsqueeze(-1)
            if self.multiplier and factor is not None:
                yield multiplied(self._packed(codes, scales, None, None, torch.float32), factor).to(dtype)
            else:
                yield dequantize(self._packed(codes, scales, coarse, factor, dtype))

    def _rows_of(self, part: str, at_once: int, count: int) -> Iterator[Tensor | None]:
        stored = self.parts.get(part)
        if stored is None:
            return iter([None] * -(-count // at_once))
        return stored.rows(at_once, columns=stored.elements // max(count, 1))

    def _whole(self, part: str) -> Tensor | None:
        return self.parts[part].read() if part in self.parts else None

    def _packed(
        self, codes: Tensor, scales: Tensor, coarse: Tensor | None, factor: Tensor | None, dtype: torch.dtype
    ) -> Packed | Quantized:
        self._require_numbers(SCALES, scales == 255 if self.fmt.scale == "e8m0" else ~scales.float().isfinite())
        levels = Levels(self.fmt, dtype, coarse)
        if self.fmt.element.bits == 4:
            return Packed(codes, scales, factor, levels, codes.shape[-1] * 2)
        self._require_numbers(CODES, ~codes.float().isfinite())
        return Quantized(codes.view(torch.uint8), scales, factor, levels)

    def _require_numbers(self, part: str, bad: Tensor) -> None:
        if bool(bad.any()):
            stored = self.parts[part]
            raise InvalidValueError(f"{stored.file}: {stored.name} holds {int(bad.sum())} {part} that are no numbers")


def multiplied(stored: Packed | Quantized, factor: Tensor) -> Tensor:
    """Return values in float32 as ModelOpt decodes them: code * (scale * factor)."""
    one_a_byte = unpack(stored) if isinstance(stored, Packed) else stored
    grouping = Grouping.of(one_a_byte.codes.shape, stored.levels.fmt)
    scale = grouping.scales_inside(stored.scales.float() * factor)
    return grouping.join(decode(grouping.split(one_a_byte.codes), E2M1, torch.float32) * scale)


Stored = StoredTensor | StoredWeight
"""What files hold under one name of the unquantized model."""


def checked(folder: Path, weight: StoredWeight) -> StoredWeight:
    """Return the weight; InvalidValueError, in one line, where its parts do not fit its format and one another."""
    codes, scales, fmt = weight.parts[CODES], weight.parts[SCALES], weight.fmt
    for part, known in ((codes, CODE_DTYPES[fmt.element.bits]), (scales, SCALE_DTYPES[fmt.scale])):
        if part.dtype != known:
            raise InvalidValueError(
                f"{folder}: {part.name} is of {_word(part.dtype)}; {fmt.name} has {_word(known)} here"
            )
    assert fmt.block is not None
    if len(codes.shape) < 2:
        raise InvalidValueError(f"{folder}: {codes.name} is {list(codes.shape)}, not a matrix")
    *rows, columns = weight.packed_shape
    wanted = [*rows, -(-columns // fmt.block[1])]
    if list(scales.shape) != wanted:
        raise InvalidValueError(
            f"{folder}: {scales.name} is {list(scales.shape)}, but {codes.name} of {[*rows, columns]} values in groups "
            f"of {fmt.block[1]} needs {wanted}"
        )
    if (factor := weight.parts.get(FACTOR)) is not None and factor.elements != 1:
        raise InvalidValueError(f"{folder}: {factor.name} is {list(factor.shape)}, not one number")
    coarse = weight.parts.get(COARSE)
    if coarse is not None and fmt.coarse is not None:
        wanted = [*rows, -(-columns // fmt.coarse.columns), 1]
        if list(coarse.shape) != wanted:
            raise InvalidValueError(
                f"{folder}: {coarse.name} is {list(coarse.shape)}; for {fmt.coarse.columns} columns {wanted} is needed"
            )
    return weight


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def required(folder: Path, tensors: Mapping[str, StoredTensor], name: str, why: str) -> StoredTensor:
    """Return a tensor of the files; InvalidValueError, saying what needs it, where it is missing."""
    if name not in tensors:
        raise InvalidValueError(f"{folder}: {name} is missing, which {why} needs; copy the checkpoint anew")
    return tensors[name]
