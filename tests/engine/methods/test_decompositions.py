"""Decompositions by matrix products, compared with float64: leading parts, nearest isometries, and both together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.methods.arithmetic import decompositions, matrices
from engine.methods.arithmetic.decompositions import inverse_of_positive, leading_parts_by_products, nearest_isometry

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, COLUMNS, RANK = 192, 320, 24
LARGEST_ERROR = 1e-4


@pytest.fixture(autouse=True)
def by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decompose these small matrices as large ones are."""
    monkeypatch.setattr(matrices, "LEADING_SIDE", 1)
    monkeypatch.setattr(matrices, "ISOMETRY_SIDE", 1)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def with_values(values: Tensor, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """Return a float32 matrix [rows, columns] with these singular values."""
    count = len(values)
    return ((orthonormal(rows, count, seed) * values) @ orthonormal(columns, count, seed + 100).T).float()


def decay(power: float) -> Tensor:
    return torch.arange(1, ROWS + 1, dtype=torch.float64) ** -power


def dominant() -> Tensor:
    values = decay(0.7)
    values[0] = 60  # with 100, rounding decides on some CPUs whether the products converge
    return values


def clustered() -> Tensor:
    values = torch.full((ROWS,), 0.3, dtype=torch.float64)
    values[:RANK] = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64).repeat_interleave(RANK // 3)
    return values


def experts(count: int, columns: int = COLUMNS) -> list[Tensor]:
    """Return task vectors of experts in bfloat16: a part that they have in common, and one of slowly falling values."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(ROWS, columns, generator=generator) * 0.02).bfloat16().float()
    common = with_values(decay(0.7)[:12], columns=columns, seed=50)
    taus = []
    for k in range(count):
        tau = with_values(decay(0.7), columns=columns, seed=k)
        tau = tau / tau.norm() + common / common.norm() / 2
        taus.append((base + tau * (0.01 * base.norm() / tau.norm())).bfloat16().float() - base)
    return taus


def cut(parts: tuple[Tensor, ...]) -> Tensor:
    u, s, vt = (part.double() for part in parts)
    return (u * s) @ vt


def exact(tau: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(tau.double(), full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def assert_orthonormal(rows: Tensor) -> None:
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-5)


MATRICES: dict[str, Callable[[], Tensor]] = {
    "slow decay": lambda: with_values(decay(0.7)),
    "fast decay": lambda: with_values(decay(2)),
    "tall": lambda: with_values(decay(0.7)).T,
    "square": lambda: with_values(decay(0.7), columns=ROWS),
    "one dominant direction": lambda: with_values(dominant()),
    "clusters": lambda: with_values(clustered()),
    "a rank below r": lambda: with_values(decay(0.7)[:5]),
    "a rank of one": lambda: with_values(decay(0.7)[:1]),
    "zero columns": lambda: torch.cat([with_values(decay(0.7)), torch.zeros(ROWS, 40)], dim=1),
    "zero rows": lambda: torch.cat([torch.zeros(60, COLUMNS), with_values(decay(0.7))]),
    "tiny": lambda: with_values(decay(0.7)) * 1e-8,
    "huge": lambda: with_values(decay(0.7)) * 1e20,
    "an expert in bfloat16": lambda: experts(1)[0],
}


@pytest.mark.parametrize("case", MATRICES)
def test_leading_parts_are_those_of_float64(case: str) -> None:
    tau, lapack = MATRICES[case](), []
    parts = matrices.leading(tau, RANK, lambda: lapack.append(case))
    wanted = exact(tau, RANK)
    assert not lapack
    assert len(parts[1]) == min(RANK, int(torch.linalg.matrix_rank(tau)))
    assert apart(cut(parts), cut(wanted)) < LARGEST_ERROR
    torch.testing.assert_close(
        parts[1].double(), wanted[1][: len(parts[1])], rtol=1e-4, atol=1e-6 * float(wanted[1][0])
    )
    assert_orthonormal(parts[0].T)
    assert_orthonormal(parts[2])
    assert all(part.dtype == torch.float32 for part in parts)


def test_a_cut_between_equal_values_keeps_as_much_as_any() -> None:
    values = decay(0.7)
    values[RANK - 4 : RANK + 4] = values[RANK]
    tau = with_values(values)
    parts = leading_parts_by_products(tau, RANK)
    assert parts is not None
    left_out = (tau.double() - cut(parts)).norm()
    torch.testing.assert_close(left_out, values[RANK:].square().sum().sqrt(), rtol=1e-5, atol=0)


def test_the_same_matrix_gives_the_same_bits() -> None:
    tau = with_values(decay(0.7))
    first, second = leading_parts_by_products(tau, RANK), leading_parts_by_products(tau.clone(), RANK)
    assert first is not None and second is not None
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e-35, 1e35])
def test_no_parts_of_numbers_out_of_range(value: float) -> None:
    tau = torch.full((ROWS, COLUMNS), value)
    assert leading_parts_by_products(tau, RANK) is None
    assert nearest_isometry(tau * value) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_an_error(value: float) -> None:
    tau = with_values(decay(0.7))
    tau[3, 5] = value
    with pytest.raises(torch.linalg.LinAlgError):
        matrices.leading(tau, RANK)


def test_lapack_decomposes_what_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompositions, "ANGLE", 0.0)
    tau, lapack = with_values(decay(0.7)), []
    parts = matrices.leading(tau, RANK, lambda: lapack.append("leading"))
    assert lapack == ["leading"] and apart(cut(parts), cut(exact(tau, RANK))) < LARGEST_ERROR


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (1, 1), (4000, 3)])
def test_narrow_matrices_have_parts(shape: tuple[int, int]) -> None:
    tau = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert apart(cut(matrices.leading(tau, 1)), cut(exact(tau, 1))) < 1e-5


def isometry(matrix: Tensor) -> Tensor:
    p, _, qt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return p @ qt


@pytest.mark.parametrize("columns", [ROWS, COLUMNS])
@pytest.mark.parametrize("lowest", [1.0, 0.3, 0.05, 1e-3, 2e-4])
def test_nearest_isometries_are_those_of_float64(lowest: float, columns: int) -> None:
    matrix = with_values(
        torch.logspace(0.4, 0, ROWS, dtype=torch.float64) * lowest ** torch.linspace(0, 1, ROWS), columns=columns
    )
    found = nearest_isometry(matrix)
    assert found is not None and found.dtype == torch.float32
    # The rounding of the matrix itself moves the direction of a singular value d by 2⁻²⁴/d.
    assert apart(found, isometry(matrix)) < LARGEST_ERROR


@pytest.mark.parametrize("rest", [0, 1e-7])
def test_a_few_null_directions_are_left_out(rest: float) -> None:
    values = torch.linspace(2, 1, ROWS, dtype=torch.float64)
    values[-3:] = rest
    matrix = with_values(values)
    found = nearest_isometry(matrix)
    assert found is not None
    p, _, qt = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert apart(found, p[:, :-3] @ qt[:-3]) < LARGEST_ERROR


def test_no_isometry_of_a_matrix_with_many_null_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompositions, "PROBES", 16)
    values = torch.ones(ROWS, dtype=torch.float64)
    values[-30:] = 1e-7
    assert nearest_isometry(with_values(values)) is None


@pytest.mark.parametrize("count", [256, 600, 1100])
def test_the_inverse_of_a_positive_matrix(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(count, 2 * count, generator=generator, dtype=torch.float64)
    matrix = a @ a.T
    inverse = inverse_of_positive(matrix)
    assert inverse is not None
    torch.testing.assert_close(inverse @ matrix, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-10)
    matrix[-1, -1] = -1
    assert inverse_of_positive(matrix) is None


@pytest.mark.parametrize("columns", [ROWS, COLUMNS])
def test_orthogonal_task_vectors_of_experts_are_those_of_float64(columns: int) -> None:
    taus, lapack = experts(8, columns), []
    say: Callable[[], None] = lambda: lapack.append("")  # noqa: E731
    left, values, right = matrices.orthogonal_parts([matrices.leading(tau, RANK, say) for tau in taus], say)
    assert not lapack
    parts = [exact(tau, RANK) for tau in taus]
    near_left, near_right = (
        isometry(torch.cat([u for u, *_ in parts], dim=1)),
        isometry(torch.cat([v for *_, v in parts])),
    )
    for k, (_, s, _) in enumerate(parts):
        mine = slice(k * RANK, (k + 1) * RANK)
        wanted = (near_left[:, mine] * s) @ near_right[mine]
        assert apart(cut((left[:, mine], values[mine], right[mine])), wanted) < LARGEST_ERROR


def test_equal_experts_share_their_directions() -> None:
    tau, lapack = experts(1)[0], []
    parts = matrices.leading(tau, RANK)
    left, values, right = matrices.orthogonal_parts([parts, parts], lambda: lapack.append("null directions"))
    assert not lapack, "null directions are few beside the probes"
    for mine in (slice(RANK), slice(RANK, None)):
        assert apart(cut((left[:, mine], values[mine], right[mine])), cut(exact(tau, RANK)) / 2) < LARGEST_ERROR


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)], ids=str)
def test_a_matrix_for_which_lapack_does_not_converge_is_decomposed_in_float64(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(matrices, "LEADING_SIDE", 1 << 30)
    monkeypatch.setattr(matrices, "ISOMETRY_SIDE", 1 << 30)
    taus = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]

    def parts() -> list[Tensor]:
        left, values, right = matrices.orthogonal_parts([matrices.leading(tau, 20) for tau in taus])
        return [left * values @ right, values]

    wanted, svd = parts(), torch.linalg.svd

    def failing(matrix: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(matrix, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    for found, one in zip(parts(), wanted, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    with pytest.raises(torch.linalg.LinAlgError):
        matrices.leading(torch.full(shape, torch.nan), 20)
