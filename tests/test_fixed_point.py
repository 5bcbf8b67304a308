"""Fixed-point integers: products with fractions are undone bit for bit, and hold as many bits as they must."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import memmeta as mm
from memmeta.fixed_point import Entropy, FixedPoint, Ratio, fractions

MOMENTA = [0.5, 0.8, 0.9, 0.95, 0.98, 0.99]


def ratio_of(x: float) -> Ratio:
    n, d = fractions(torch.tensor(x, dtype=torch.float64))
    return Ratio.of(int(n), int(d))


def integers(seed: int, size: int = 50, bits: int = 61) -> Tensor:
    """Numbers of both signs up to 2^bits, the largest and smallest among them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-(2**bits), 2**bits, (size,), generator=generator)
    return torch.cat([drawn, torch.tensor([0, 1, -1, 2**bits - 1, -(2**bits)])])


def maclaurin(beta: float) -> tuple[int, int]:
    """The fraction that the code of Maclaurin, Duvenaud, Adams (2015) takes for a momentum."""
    d = 2**16 // int(beta + 1)
    return int(beta * d + 1), d


@pytest.mark.parametrize("bits", [16, 40, 52, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_rounded_to_the_nearest(dtype: torch.dtype, bits: int) -> None:
    fixed, generator = FixedPoint(bits), torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=generator, dtype=dtype).clamp(-3, 3)
    c = fixed.encode(x)
    assert c.dtype == torch.int64
    assert float((fixed.decode(c) - x.double()).abs().max()) <= 2.0 ** -(bits + 1) + 4 * torch.finfo(torch.float64).eps
    assert fixed.decode(c, dtype).dtype == dtype
    assert torch.equal(fixed.encode(-x), -c)


def test_float32_is_exact_from_2_to_the_minus_29_on() -> None:
    fixed, generator = FixedPoint(), torch.Generator().manual_seed(0)
    mantissa = 1 + torch.rand(1000, generator=generator, dtype=torch.float32)
    for exponent in range(-29, 9):
        x = mantissa * 2.0**exponent
        assert torch.equal(fixed.decode(fixed.encode(x), torch.float32), x)


@pytest.mark.parametrize("bits", [15, 61, 52.0, True, "52"])
def test_other_numbers_of_bits_are_refused(bits: object) -> None:
    with pytest.raises(mm.InputError, match=r"fraction_bits=.*from 16 to 60"):
        FixedPoint(bits)  # pyright: ignore[reportArgumentType]


def test_limits() -> None:
    assert [FixedPoint(bits).limit for bits in (52, 40, 60)] == [1024.0, 2.0**22, 4.0]


@pytest.mark.parametrize(
    ("x", "n", "d"),
    [
        (0.5, 1, 2),
        (0.9, 9, 10),
        (0.95, 19, 20),
        (0.98, 49, 50),
        (0.999, 999, 1000),
        (0.152, 19, 125),
        (2**-15, 1, 2**15),
    ],
)
def test_decimals_are_themselves(x: float, n: int, d: int) -> None:
    for dtype in (torch.float32, torch.float64):
        found = fractions(torch.tensor(x, dtype=dtype))
        assert (int(found[0]), int(found[1])) == (n, d)
    assert n / d == x


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(2**-16, 1 - 2**-15, exclude_min=True), st.sampled_from([2**16, 2**20]))
def test_fractions_are_near(x: float, limit: int) -> None:
    n, d = (int(part) for part in fractions(torch.tensor(x, dtype=torch.float64), limit))
    assert 1 <= n < d <= limit
    assert math.gcd(n, d) == 1
    assert abs(n / d - x) <= 1 / (d * limit) + 2**-53


def test_fractions_of_many_numbers_are_those_of_each() -> None:
    x = torch.rand(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    n, d = fractions(x)
    assert n.shape == d.shape == x.shape
    for index in range(0, 120, 7):
        alone = fractions(x.flatten()[index])
        assert (int(alone[0]), int(alone[1])) == (int(n.flatten()[index]), int(d.flatten()[index]))


@pytest.mark.parametrize("x", [0.0, 1.0, -0.5, 1.5, math.nan, math.inf, 1e-6, 1 - 1e-6])
def test_what_no_fraction_is_near_to_has_none(x: float) -> None:
    n, d = fractions(torch.tensor(x, dtype=torch.float64))
    assert not 1 <= int(n) < int(d)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(2**-16, 1 - 2**-15, exclude_min=True) | st.sampled_from(MOMENTA), min_size=1, max_size=150),
    st.integers(0, 1000),
)
def test_any_sequence_of_products_and_sums_is_undone(momenta: list[float], seed: int) -> None:
    ratios = [ratio_of(x) for x in momenta]
    start = integers(seed)
    c, entropy, path = start, Entropy(start), []
    for t, ratio in enumerate(ratios):
        path.append(c)
        before, c = c, entropy.multiply(c, ratio)
        exact = [int(x) * int(ratio.n) for x in before.tolist()]
        assert all(abs(x * int(ratio.d) - y) <= int(ratio.d) ** 2 for x, y in zip(c.tolist(), exact, strict=True))
        assert int(entropy.aux.min()) >= 0
        assert int(entropy.aux.max()) < entropy.bound <= 2**62
        c = c + integers(t, bits=50)
    for t in reversed(range(len(ratios))):
        c = entropy.divide(c - integers(t, bits=50), ratios[t])
        assert torch.equal(c, path[t])
    assert bool(entropy.empty())
    assert entropy.bound == 1


def test_fractions_per_element() -> None:
    generator = torch.Generator().manual_seed(0)
    c = integers(0, 35).view(2, 20)
    entropy, path, ratios = Entropy(c), [], []
    for _ in range(300):
        x = 0.3 + 0.69 * torch.rand(20, generator=generator, dtype=torch.float64)
        ratios.append(Ratio.elementwise(*fractions(x)))
        path.append(c)
        c = entropy.multiply(c, ratios[-1])
        assert int(entropy.aux.max()) < entropy.bound
    assert entropy.bits > 32  # something was pushed
    for before, ratio in zip(reversed(path), reversed(ratios), strict=True):
        c = entropy.divide(c, ratio)
        assert torch.equal(c, before)
    assert bool(entropy.empty())


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("fraction", [lambda x: ratio_of(x), lambda x: Ratio.of(*maclaurin(x))], ids=["ours", "2^16"])
def test_bits_are_what_information_theory_asks_for(fraction: Callable[[float], Ratio], momentum: float) -> None:
    """From the first push on, whose constant is the word per element that there is anyway."""
    ratio = fraction(momentum)
    c = integers(0, 20)
    entropy = Entropy(c)
    steps = math.ceil(50 / math.log2(1 / momentum))
    for _ in range(steps):
        c = entropy.multiply(c, ratio)
    held, products = entropy.bits, entropy.products
    for _ in range(steps):
        c = entropy.multiply(c, ratio)
    wanted = math.log2(int(ratio.d) / int(ratio.n))
    assert (entropy.bits - held) / (entropy.products - products) == pytest.approx(wanted, rel=0.01)
    assert entropy.nbytes <= c.numel() * (8 + 2 * steps * wanted / 8)


def test_the_numbers_of_maclaurin_et_al() -> None:
    """Their fractions, their bits per step, and how much less that is than a snapshot of 32 bits."""
    for momentum, n, bits, less in ((0.9, 58983, 0.152, 211), (0.98, 64226, 0.0291, 1098)):
        assert maclaurin(momentum) == (n, 65536)
        assert math.log2(1 / momentum) == pytest.approx(bits, abs=5e-4)
        assert 32 / math.log2(1 / momentum) == pytest.approx(less, abs=0.6)
        assert math.log2(65536 / n) == pytest.approx(bits, abs=5e-4)


def test_products_are_those_of_maclaurin_et_al_while_nothing_is_pushed() -> None:
    """Their auxiliary integers are Python's, without end."""
    n, d = maclaurin(0.9)
    c = integers(0)
    entropy, theirs = Entropy(c), [(x, 0) for x in c.tolist()]
    for _ in range(250):
        c = entropy.multiply(c, Ratio.of(n, d))
        for index, (x, aux) in enumerate(theirs):
            aux = aux * d + x % d
            theirs[index] = (x // d * n + aux % n, aux // n)
    assert c.tolist() == [x for x, _ in theirs]
    assert entropy.aux.tolist() == [aux for _, aux in theirs]


def test_a_copy_goes_its_own_way() -> None:
    ratio, start = ratio_of(0.5), integers(0)
    c, entropy = start, Entropy(start)
    for _ in range(100):
        c = entropy.multiply(c, ratio)
    for _ in range(2):
        back, twin = c, entropy.copy()
        for _ in range(100):
            back = twin.divide(back, ratio)
        assert torch.equal(back, start)
        assert bool(twin.empty())
        assert not bool(entropy.empty())
