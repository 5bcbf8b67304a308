"""Exact arithmetic on int64 fixed-point numbers: what is multiplied by a fraction can be divided by it, bit for bit.

A number x is the integer round(x 2^52). Sums of such integers cancel exactly. A product with n/d < 1 loses information,
log2(d/n) bits of it, which an ``Entropy`` keeps (Maclaurin, Duvenaud, Adams 2015, section 3 and algorithm 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError

LARGEST_DENOMINATOR = 1 << 16
_WORD = 32  # bits that leave an auxiliary integer at a time
_ROOM = 1 << 62


@dataclass(frozen=True)
class FixedPoint:
    """Fixed-point numbers with ``fraction_bits`` bits after the point, in int64 tensors of the number's shape.

    They reach to ``limit`` = 2^(62 - fraction_bits), so that the sum of two of them is still an int64. Numbers of
    float32 from 2^-29 on (with 52 bits) are exact; others are rounded by at most 2^-(fraction_bits + 1).
    """

    fraction_bits: int = 52

    def __post_init__(self) -> None:
        bits = self.fraction_bits
        if not isinstance(bits, int) or isinstance(bits, bool) or not 16 <= bits <= 60:
            raise InputError(f"fraction_bits={bits!r}: write the number of bits after the point, from 16 to 60")

    @property
    def limit(self) -> float:
        """What the absolute value of every number must stay below; ``encode`` does not check it."""
        return 2.0 ** (62 - self.fraction_bits)

    def encode(self, x: Tensor) -> Tensor:
        """The nearest fixed-point numbers, ties to even."""
        return (x.double() * 2.0**self.fraction_bits).round_().long()

    def decode(self, c: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """The nearest floating-point numbers: always the same for the same integers."""
        return (c.double() * 2.0**-self.fraction_bits).to(dtype)


def fractions(x: Tensor, limit: int = LARGEST_DENOMINATOR) -> tuple[Tensor, Tensor]:
    """Numerators and denominators (int64) of fractions near ``x`` in (0, 1), elementwise.

    The last convergent of each continued fraction with a denominator d <= ``limit``, which is within 1 / (d limit) of
    x; 0.9 becomes 9/10. Outside of (0, 1), and closer to its ends than 1 / ``limit``, n is no number in [1, d - 1].
    """
    rest = x.detach().double()
    one, zero = torch.ones_like(rest), torch.zeros_like(rest)
    n_before, d_before, n, d = one, zero, zero, one
    going = (rest > 0) & (rest < 1)
    n = torch.where(going, n, -one)
    # Denominators grow at least as the Fibonacci numbers do.
    for _ in range(math.ceil(math.log(limit * 5**0.5) / math.log((1 + 5**0.5) / 2)) + 1):
        turned = 1 / rest
        whole = turned.floor()
        n_next, d_next = whole * n + n_before, whole * d + d_before
        going = going & (d_next <= limit)
        n_before, d_before = torch.where(going, n, n_before), torch.where(going, d, d_before)
        n, d = torch.where(going, n_next, n), torch.where(going, d_next, d)
        rest = turned - whole
    return n.long(), d.long()


@dataclass(frozen=True)
class Ratio:
    """A fraction n/d in (0, 1) to multiply by: two numbers, or two int64 tensors that broadcast, one per element.

    ``smallest`` is the numerator and denominator of the smallest one, which loses the most bits.
    """

    n: int | Tensor
    d: int | Tensor
    smallest: tuple[int, int]
    largest_d: int

    @staticmethod
    def of(n: int, d: int) -> Ratio:
        """One fraction for all elements."""
        return Ratio(n, d, (n, d), d)

    @staticmethod
    def elementwise(n: Tensor, d: Tensor) -> Ratio:
        """A fraction for each element."""
        # Two fractions with denominators up to 2^16 are 2^-32 apart or the same: float64 tells them apart.
        least = int((n.double() / d.double()).argmin())
        return Ratio(n, d, (int(n.flatten()[least]), int(d.flatten()[least])), int(d.max()))


class Entropy:
    """The information that products of one int64 tensor with fractions lose, so that they can be undone in reverse.

    An auxiliary integer per element takes the remainder of the division by d in, and gives the digit that the product
    with n has room for out; it grows by log2(d/n) bits per product. ``bound`` says how far, exactly and without a look
    at the elements; where the next product might overflow, the low 32 bits of every element move to a stack.

    Memory: 8 bytes per element, and log2(d/n) bits per product and element. Cost: two integer divisions by d or n
    per product and element. A product differs from c n/d by at most d units of the last place.
    """

    def __init__(self, like: Tensor) -> None:
        self.aux = torch.zeros_like(like, dtype=torch.int64)
        self.bound = 1  # 0 <= aux < bound
        self.products = 0
        self._words: list[tuple[int, int, Tensor]] = []

    def multiply(self, c: Tensor, ratio: Ratio) -> Tensor:
        """About c n/d, int64; |c| < 2^62."""
        n, d = ratio.n, ratio.d
        if self.bound * ratio.largest_d > _ROOM:
            self._push()
        c, digit = _divided(c, d)
        self.aux, digit = _divided(self.aux * d + digit, n)
        least_n, its_d = ratio.smallest
        self.bound = -(-self.bound * its_d // least_n)
        self.products += 1
        return c * n + digit

    def divide(self, c: Tensor, ratio: Ratio) -> Tensor:
        """What the last product that was not undone yet was made of; ``ratio`` is the one it was made with."""
        n, d = ratio.n, ratio.d
        c, digit = _divided(c, n)
        self.aux, digit = _divided(self.aux * n + digit, d)
        least_n, its_d = ratio.smallest
        self.bound = self.bound * least_n // its_d  # undoes the ceiling exactly, as d > n
        self.products -= 1
        if self._words and self._words[-1][0] == self.products:
            self._pop()
        return c * d + digit

    def copy(self) -> Entropy:
        """One that goes its own way; memory is shared."""
        twin = object.__new__(Entropy)
        twin.aux, twin.bound, twin.products, twin._words = self.aux, self.bound, self.products, [*self._words]
        return twin

    def empty(self) -> Tensor:
        """Whether all products have been undone and nothing is left of them, a bool tensor of shape ()."""
        return ~self.aux.any() if not self.products and not self._words else self.aux.new_zeros((), dtype=torch.bool)

    @property
    def bits(self) -> float:
        """Bits per element that are held."""
        return _WORD * len(self._words) + math.log2(self.bound)

    @property
    def nbytes(self) -> int:
        """Bytes of the auxiliary integers and the stack."""
        return 8 * self.aux.numel() + sum(word.numel() * word.element_size() for _, _, word in self._words)

    def _push(self) -> None:
        low = (self.aux & ((1 << _WORD) - 1)) - (1 << (_WORD - 1))
        self._words.append((self.products, self.bound, low.to(torch.int32)))
        self.aux = self.aux >> _WORD
        self.bound = -(-self.bound >> _WORD)

    def _pop(self) -> None:
        _, self.bound, low = self._words.pop()
        self.aux = (self.aux << _WORD) + (low.long() + (1 << (_WORD - 1)))


def _divided(c: Tensor, d: int | Tensor) -> tuple[Tensor, Tensor]:
    """The floored quotient and the remainder in [0, d), also of negative numbers."""
    quotient = torch.div(c, d, rounding_mode="floor")
    return quotient, c - quotient * d
