"""The rounding of merged weights: neighbours, mean, bits that do not depend on pieces, and the share that survives."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from engine.task_vectors import rounding
from engine.task_vectors.pieces import Piece
from engine.task_vectors.rounding import Rounding, Survival

DRAWS = 1 << 16
DTYPES = [torch.bfloat16, torch.float16]
# Of float16: normal numbers, multiples of the smallest one, and less than half of that.
VALUES = [1 + 2**-11 + 2**-20, -0.3, 3e-5, 65000.1, 2**-14 + 2**-25, 1e-7, -2e-8]


def rounded(exact: Tensor, dtype: torch.dtype, seed: int | None = 7, base: Tensor | None = None) -> Tensor:
    tensor = Rounding(torch.zeros(exact.numel()) if base is None else base, seed)
    return tensor.round(Piece("t", 0, exact.numel()), exact, dtype)[0]


def share(exact: Tensor, dtype: torch.dtype, seed: int | None, base: Tensor) -> float | None:
    return Rounding(base, seed).round(Piece("t", 0, exact.numel()), exact, dtype)[1].share


def spread(count: int) -> Tensor:
    """Numbers of both signs and all magnitudes that float16 has."""
    exponents = torch.rand(count, generator=torch.Generator().manual_seed(0)) * 42 - 27
    return torch.exp2(exponents) * torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", VALUES)
def test_a_number_becomes_one_of_its_neighbours_and_on_average_itself(dtype: torch.dtype, value: float) -> None:
    found = rounded(torch.full((DRAWS,), value), dtype).double()
    exact = float(torch.tensor(value))
    low, high = found.min().item(), found.max().item()
    assert low < exact < high and found.unique().numel() == 2
    towards = torch.nextafter(torch.tensor(low, dtype=dtype), torch.tensor(math.inf, dtype=dtype))
    assert towards.item() == high, "a number of the dtype is in between"
    up = (exact - low) / (high - low)
    assert abs(found.mean().item() - exact) < 5 * (high - low) * math.sqrt(up * (1 - up) / DRAWS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_the_dtype_stay_and_others_that_are_not_finite_are_seen(dtype: torch.dtype) -> None:
    exact = torch.cat([spread(5000).to(dtype).float(), torch.tensor([0.0, -0.0])])
    assert torch.equal(rounded(exact, dtype), exact.to(dtype))
    odd = torch.tensor([math.inf, -math.inf, math.nan, -math.nan, 3.4e38]).repeat(50)
    assert not rounded(odd, dtype).isfinite()[torch.arange(250) % 5 < 4].any()


def test_numbers_below_all_of_the_dtype_become_zero() -> None:
    assert not rounded(torch.tensor([1e-25, -1e-38, 1e-45] * 100), torch.float16).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_the_same_for_any_pieces_and_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, base = spread(1000), torch.zeros(1000)
    tensor = Rounding.of("t", base, "stochastic", 3)
    whole, survived = tensor.round(Piece("t", 0, 1000), exact, dtype)
    monkeypatch.setattr(rounding, "BLOCK", 64)
    edges = [0, 1, 17, 400, 401, 1000]
    parts = [
        tensor.round(Piece("t", start, stop), exact[start:stop], dtype) for start, stop in itertools.pairwise(edges)
    ]
    assert torch.equal(torch.cat([part for part, _ in parts]), whole)
    summed = sum((part for _, part in parts), Survival())
    assert (summed.kept, summed.change) == pytest.approx((survived.kept, survived.change), rel=1e-12)


def test_the_choices_depend_on_seed_and_tensor_and_not_on_each_other() -> None:
    exact = torch.full((DRAWS,), 1 + 2**-8)  # half way between two numbers of bfloat16
    up = {}
    for name, seed in (("a", 0), ("a", 1), ("b", 0)):
        tensor = Rounding.of(name, torch.zeros(DRAWS), "stochastic", seed)
        up[name, seed] = (tensor.round(Piece(name, 0, DRAWS), exact, torch.bfloat16)[0] > 1).double() * 2 - 1
    one, *others = up.values()
    # Products of independent signs: their mean has a standard deviation of 1/√n.
    for other in (*others, one.roll(1), one.roll(2), one.roll(64), one.roll(1 << 10)):
        assert abs((one * other).mean().item()) < 5 / math.sqrt(DRAWS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest_is_what_torch_rounds_to_and_float32_is_not_rounded(dtype: torch.dtype) -> None:
    exact = spread(5000)
    assert torch.equal(rounded(exact, dtype, seed=None), exact.to(dtype))
    assert torch.equal(rounded(exact, torch.float32), exact)


def test_the_share_that_survives() -> None:
    """Numbers of bfloat16 between 1 and 2 are 2⁻⁷ apart."""
    base = torch.ones(DRAWS, dtype=torch.bfloat16)

    def after(steps: float, seed: int | None, dtype: torch.dtype = torch.bfloat16) -> float | None:
        return share(torch.full((DRAWS,), 1 + steps * 2**-7), dtype, seed, base)

    assert after(0.25, None) == 0
    assert after(0.75, None) == pytest.approx(1 / 0.75)
    assert after(3.0, None) == 1
    assert after(0.25, None, torch.float32) == 1
    assert after(0.25, 1) == pytest.approx(1, abs=5 * math.sqrt(3 / DRAWS)), "on average"
    assert after(0.0, None) is None, "there is no change"


def test_the_share_of_normal_changes_is_the_expected_one() -> None:
    """A change of σ below half a step: E[x · round(x)] / E[x²] with x = σ·z, from the normal density φ."""
    sigma, count = 0.4, 1 << 18
    base = torch.full((count,), 1.5, dtype=torch.bfloat16)
    change = sigma * 2**-7 * torch.randn(count, generator=torch.Generator().manual_seed(1))
    density = lambda x: math.exp(-((x / sigma) ** 2) / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    expected = sum(2 * sigma * density(edge) for edge in (0.5, 1.5)) / sigma**2
    assert share(base + change, torch.bfloat16, None, base) == pytest.approx(expected, rel=0.02)
    assert share(base + change, torch.bfloat16, 5, base) == pytest.approx(1, abs=0.02)
