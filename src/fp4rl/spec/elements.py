"""The small floating-point types that values are rounded to: OCP Microscaling Formats (MX) v1.0, OCP 8-bit Floating
Point v1.0 (E4M3, E5M2)."""

from dataclasses import dataclass
from math import frexp

from fp4rl.spec.errors import InvalidValueError


@dataclass(frozen=True)
class Element:
    """A small floating-point type: sign, exponent, mantissa, subnormals; `largest` is its greatest finite magnitude.

    With one exponent bit the grid is even: Element("INT4", 1, 2, 3.5) holds the integers -7 to 7 in units of one half.
    Raises InvalidValueError where `largest` is not on the grid.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: float

    def __post_init__(self) -> None:
        if self.exponent_bits < 1 or self.mantissa_bits < 0 or self.largest <= 0:
            raise InvalidValueError(f"{self.name}: an element has an exponent bit at least and a largest value above 0")
        steps = self.largest / 2.0 ** (self.max_exponent - self.mantissa_bits)
        room = self.min_exponent <= self.max_exponent < self.min_exponent + 2**self.exponent_bits - 1
        if steps != int(steps) or not room:
            raise InvalidValueError(
                f"{self.name}: {self.largest:g} is no value of {self.exponent_bits} exponent and {self.mantissa_bits} "
                "mantissa bits"
            )

    @property
    def bits(self) -> int:
        """Bits of one code, its sign among them."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal magnitude; below it the grid is even (subnormals)."""
        return 2 - (1 << (self.exponent_bits - 1))

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest magnitude: 2 for E2M1 (6 = 1.5 * 2^2)."""
        return frexp(self.largest)[1] - 1

    @property
    def smallest(self) -> float:
        """The smallest magnitude above zero."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    def grid(self) -> tuple[float, ...]:
        """Return every magnitude, from 0 to `largest`; its position is the code without the sign."""
        steps = 2**self.mantissa_bits
        values = [i * self.smallest for i in range(steps)]
        for exponent in range(self.min_exponent, self.max_exponent + 1):
            values += [(1 + i / steps) * 2.0**exponent for i in range(steps)]
        return tuple(v for v in values if v <= self.largest)


E2M1 = Element("E2M1", 2, 1, 6.0)
E2M3 = Element("E2M3", 2, 3, 7.5)
E3M2 = Element("E3M2", 3, 2, 28.0)
E4M3 = Element("E4M3", 4, 3, 448.0)
E5M2 = Element("E5M2", 5, 2, 57344.0)
E8M7 = Element("BF16", 8, 7, (2 - 2**-7) * 2.0**127)
