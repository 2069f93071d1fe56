"""SWUDI beside the objective that it minimises, of adapters beside their dense products, and as a sum over experts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.methods.arithmetic.matrices import leading, leading_of_product, swudi_parts
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


def merged(
    pool: ThreadPoolExecutor,
    method: str,
    task_vectors: list[TaskVector | None],
    shape: tuple[int, int] = (ROWS, COLUMNS),
    **options: Any,
) -> Tensor:
    """Return τ of a method for a matrix, with a base of zeros."""
    values = {name: option.default for name, option in get_method(method).by_name.items()} | options
    models = tuple(map(str, range(len(task_vectors))))
    tensor = MergeTensor(
        "weight", shape, torch.zeros(shape), models, task_vectors, values, [{}] * len(models), None,
        0, pool, 1, len(models),
    )  # fmt: skip
    out_N = torch.empty(math.prod(shape))
    fill = preparation(method)(tensor)
    for piece in pieces("weight", shape):
        fill(piece, out_N[piece.start : piece.stop])
    return out_N.view(shape)


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


def shares(taus: list[Tensor]) -> list[Tensor]:
    """Return τ̃ₖ = τₖ·(1 − C·P + Cₖ·P) of the experts in SWUDI-A, in float64, by the eigenvectors of the whole C."""
    taus = [tau.double() for tau in taus]
    grams = [tau.T @ tau / tau.norm() ** 2 for tau in taus]
    c = torch.stack(grams).sum(dim=0)
    values, vectors = torch.linalg.eigh(c)
    values = values.clamp_min(0)
    count = math.ceil(float(values.sqrt().sum() ** 2 / values.sum()) * (1 - 1e-6))
    q = vectors[:, -count:]
    p = q / values[-count:] @ q.T
    return [tau - tau @ c @ p + tau @ gram @ p for tau, gram in zip(taus, grams, strict=True)]


def found_shares(parts: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    left, values, right = swudi_parts(parts)
    assert left.dtype == values.dtype == right.dtype == torch.float32
    ends = [sum(len(s) for _, s, _ in parts[: k + 1]) for k in range(len(parts))]
    own = [slice(end - len(s), end) for end, (_, s, _) in zip(ends, parts, strict=True)]
    return [(left[:, mine] * values[mine]) @ right[mine] for mine in own]


def experts(case: str) -> list[Tensor]:
    first, second, third = (left @ right for left, right in factors())
    return {
        "any": [first, second, third],
        "one": [first],
        "equal": [first, first, second],
        "all equal": [first, first, first],
        "multiples": [first, 3 * first, second],
        "opposite": [first, -first, second],
        "of other sizes": [1e-3 * first, second, 1e3 * third],
        "common inputs": [first, torch.randn(ROWS, ROWS, generator=torch.Generator().manual_seed(2)) @ first],
    }[case]


CASES = ["any", "one", "equal", "all equal", "multiples", "opposite", "of other sizes", "common inputs"]


@pytest.mark.parametrize("case", CASES)
def test_the_shares_of_experts_are_those_of_the_formula(case: str) -> None:
    taus = experts(case)
    found = found_shares([leading(tau, RANK) for tau in taus])
    for one, wanted, tau in zip(found, shares(taus), taus, strict=True):
        assert float((one - wanted).norm() / tau.norm()) < 1e-5


def test_the_share_of_one_expert_is_its_task_vector() -> None:
    (tau,) = experts("one")
    (found,) = found_shares([leading(tau, RANK)])
    assert float((found - tau).norm() / tau.norm()) < 1e-5


def test_equal_experts_have_equal_shares_that_are_one_task_vector_where_eigenvalues_count() -> None:
    u, _, vt = torch.linalg.svd(experts("one")[0], full_matrices=False)
    s = torch.tensor([1, 0.8, 0.6, 0.2, 0.05, 0.02])
    tau = (u[:, :RANK] * s) @ vt[:RANK]
    # (Σσ)²/Σσ² = 3.5: the two smallest do not count.
    counted = vt[:4]
    for one in found_shares([leading(tau, RANK)] * EXPERTS):
        wanted = tau - tau @ counted.T @ counted * (1 - 1 / EXPERTS)
        assert float((one - wanted).norm() / tau.norm()) < 1e-5


def test_the_shares_add_up_to_swudi_a(pool: ThreadPoolExecutor) -> None:
    pairs = factors()
    products: list[TaskVector | None] = [Product(*pair) for pair in pairs]
    wanted = merged(pool, "swudi_a", products)
    found = torch.stack(found_shares([leading_of_product(*pair, RANK) for pair in pairs])).sum(dim=0)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_more_ranks_than_inputs_have_the_shares_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(3)
    taus = [torch.randn(5, 4, generator=generator) for _ in range(6)]
    for one, wanted in zip(found_shares([leading(tau, 4) for tau in taus]), shares(taus), strict=True):
        assert float((one - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize(("method", "rows"), [("swudi", 130), ("swudi_a", 130), ("swudi_a", 700)])
def test_a_large_matrix_is_merged_as_in_float64(method: str, rows: int, pool: ThreadPoolExecutor) -> None:
    """Matrices of many columns are decomposed in float32; their experts do, or do not, span all inputs."""
    columns, generator = 600, torch.Generator().manual_seed(4)
    falling = torch.arange(1, columns + 1) ** -0.7
    taus = [torch.randn(rows, columns, generator=generator) * falling for _ in range(EXPERTS)]
    exact = [tau.double() for tau in taus]
    c = sum(tau.T @ tau / tau.norm() ** 2 for tau in exact)
    d = sum(tau @ (tau.T @ tau) / tau.norm() ** 2 for tau in exact)
    values, vectors = torch.linalg.eigh(c)
    values = torch.where(values > 1e-8, values, 0)
    count = math.ceil(0.85 * columns) if method == "swudi" else math.ceil(values.sqrt().sum() ** 2 / values.sum())
    reached = -torch.expm1(-300 * values) if method == "swudi" else torch.ones_like(values)
    factors = torch.where(values > 0, reached / values, 0)
    factors[: columns - count] = 0
    start = sum(exact)
    wanted = start + ((d - start @ c) @ vectors * factors) @ vectors.T
    found = merged(pool, method, [Stored(tau.reshape(-1)) for tau in taus], shape=(rows, columns))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4
