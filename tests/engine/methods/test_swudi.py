"""SWUDI beside the objective that it minimises, and of adapters beside their dense products."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.methods.arithmetic.tensor import MergeTensor
from engine.methods.registry import get_method, preparation
from engine.task_vectors.kinds import Product, Stored, TaskVector
from engine.task_vectors.pieces import pieces

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, COLUMNS, RANK, EXPERTS = 24, 40, 6, 3


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def factors(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Return the factors of adapters whose inputs overlap: B [ROWS, RANK] and A [RANK, COLUMNS]."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(RANK, COLUMNS, generator=generator)
    return [
        (
            torch.randn(ROWS, RANK, generator=generator),
            torch.randn(RANK, COLUMNS, generator=generator) + 0.5 * common,
        )
        for _ in range(EXPERTS)
    ]


def merged(pool: ThreadPoolExecutor, method: str, task_vectors: list[TaskVector | None], **options: Any) -> Tensor:
    """Return τ of a method for a matrix [ROWS, COLUMNS], with a base of zeros."""
    values = {name: option.default for name, option in get_method(method).by_name.items()} | options
    models = tuple(map(str, range(len(task_vectors))))
    tensor = MergeTensor(
        "weight", (ROWS, COLUMNS), torch.zeros(ROWS, COLUMNS), models, task_vectors, values, [{}] * len(models), None,
        0, pool, 1, len(models),
    )  # fmt: skip
    out_N = torch.empty(ROWS * COLUMNS)
    fill = preparation(method)(tensor)
    for piece in pieces("weight", (ROWS, COLUMNS)):
        fill(piece, out_N[piece.start : piece.stop])
    return out_N.view(ROWS, COLUMNS)


def objective(tau: Tensor, taus: list[Tensor]) -> float:
    """Return WUDI's loss, Σₖ ‖(τ − τₖ)·τₖᵀ‖² / ‖τₖ‖²."""
    return sum(float(((tau - own).double() @ own.double().T).norm() ** 2 / own.double().norm() ** 2) for own in taus)


OPTIONS = [
    ("swudi", {}),
    ("swudi", {"rank": 0.2, "start": "mean"}),
    ("swudi_a", {"start": "zero"}),
    ("swudi_a", {"cut": "gavish_donoho"}),
]


@pytest.mark.parametrize(("method", "options"), OPTIONS, ids=str)
def test_adapters_are_merged_as_their_products(method: str, options: dict[str, Any], pool: ThreadPoolExecutor) -> None:
    pairs = [*factors(), None]
    products = [None if pair is None else Product(*pair) for pair in pairs]
    stored = [None if pair is None else Stored((pair[0] @ pair[1]).reshape(-1)) for pair in pairs]
    found, expected = (merged(pool, method, kinds, **options) for kinds in (products, stored))
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_the_flow_reaches_the_minimum(pool: ThreadPoolExecutor) -> None:
    taus = [left @ right for left, right in factors()]
    kinds: list[TaskVector | None] = [Stored(tau.reshape(-1)) for tau in taus]
    at = [objective(merged(pool, "swudi", kinds, rank=1.0, time=time), taus) for time in (0.0, 1.0, 30.0, 1e6)]
    assert at == sorted(at, reverse=True) and at[-1] < at[0]
    least = merged(pool, "swudi", kinds, rank=1.0, time=1e6)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        other = least + 1e-2 * least.norm() * torch.nn.functional.normalize(
            torch.randn(ROWS * COLUMNS, generator=generator), dim=0
        ).view(ROWS, COLUMNS)
        assert objective(other, taus) >= at[-1]
    gradient_descent = merged(pool, "wudi", kinds, steps=300, learning_rate=1e-2)
    assert at[-1] <= objective(gradient_descent, taus)


def test_a_short_time_is_that_of_eulers_method(pool: ThreadPoolExecutor) -> None:
    taus = [(left @ right).double() for left, right in factors()]
    kinds: list[TaskVector | None] = [Stored(tau.float().reshape(-1)) for tau in taus]
    c = sum(tau.T @ tau / tau.norm() ** 2 for tau in taus)
    d = sum(tau @ tau.T @ tau / tau.norm() ** 2 for tau in taus)
    tau = torch.zeros_like(taus[0])
    for _ in range(2000):
        tau = tau + 1e-3 * (d - tau @ c)
    found = merged(pool, "swudi", kinds, rank=1.0, time=2.0, start="zero")
    assert float((found - tau).norm() / tau.norm()) < 1e-3


@pytest.mark.parametrize("factor", [0, 1])
def test_a_factor_that_is_not_finite_is_an_error(factor: int, pool: ThreadPoolExecutor) -> None:
    pairs = factors()
    pairs[1][factor][2, 3] = torch.nan
    with pytest.raises(CheckpointError) as caught:
        merged(pool, "swudi", [Product(*pair) for pair in pairs])
    assert "'1'" in str(caught.value)
