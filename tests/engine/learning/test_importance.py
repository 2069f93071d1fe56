"""Importance and chunks against numbers computed by hand, and their invariants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import pytest
from errors import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.learning.importance import allocate_chunks, importance, stage_2_layout, write_importance
from engine.task_vectors.coefficients import ChunkLayout, Coefficients

Array = npt.NDArray[np.float64]

QUICK = settings(deadline=None, max_examples=150)

# Two experts, three tensors: Σₖ |α|·s·n = (0.5·2 + 0.1·10)·10, (0.25·4 + 0.2·5)·20 and (0·1 + 0.4·0)·30 = 20, 40, 0.
ALPHA = np.array([[0.5, 0.25, 0.0], [0.1, -0.2, 0.4]])
MAGNITUDE = np.array([[2.0, 4.0, 1.0], [10.0, 5.0, 0.0]])
NUMEL = np.array([10.0, 20.0, 30.0])


def scores(minimum: float = 0.0) -> st.SearchStrategy[Array]:
    """Return a strategy for importances that sum to 1."""
    raw = st.lists(st.floats(minimum, 1000), min_size=1, max_size=12).filter(lambda values: sum(values) > 1e-3)
    return raw.map(lambda values: np.array(values) / np.sum(values))


budgets = st.floats(0.05, 8)
kappas = st.sampled_from([0.0, 0.5, 1.0, 1.7, 2.0, 3.0])


def stage_1(alpha: Array = ALPHA, numels: tuple[int, ...] = (10, 20, 30)) -> Coefficients:
    names = dict(zip("abc", numels, strict=True))
    return Coefficients(ChunkLayout.make(names, dict.fromkeys(names, 1)), alpha)


def test_importance_by_hand() -> None:
    np.testing.assert_allclose(importance(ALPHA, MAGNITUDE, NUMEL), [1 / 3, 2 / 3, 0], rtol=1e-15)


def test_importance_of_experts_that_equal_the_base_is_uniform() -> None:
    np.testing.assert_array_equal(importance(ALPHA, np.zeros((2, 3)), NUMEL), [1 / 3] * 3)


@QUICK
@given(st.data())
def test_importance_sums_to_one_and_is_nowhere_negative(data: st.DataObject) -> None:
    experts, tensors = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))

    def table(low: float, high: float) -> Array:
        size = experts * tensors
        values = st.lists(st.floats(low, high, allow_subnormal=False), min_size=size, max_size=size)
        return np.array(data.draw(values)).reshape(experts, tensors)

    numel = np.array(data.draw(st.lists(st.integers(1, 10**9), min_size=tensors, max_size=tensors)), dtype=np.float64)
    found = importance(table(-2, 2), table(0, 10), numel)
    assert found.shape == (tensors,)
    assert found.sum() == pytest.approx(1)
    assert (found >= 0).all()


@pytest.mark.parametrize("factor", [2.0**-40, 0.1, 3.0, 1e6])
@pytest.mark.parametrize("scaled", ["coefficients", "magnitudes", "elements"])
def test_importance_does_not_depend_on_scale(factor: float, scaled: str) -> None:
    factors = [factor if scaled == one else 1.0 for one in ("coefficients", "magnitudes", "elements")]
    found = importance(ALPHA * factors[0], MAGNITUDE * factors[1], NUMEL * factors[2])
    np.testing.assert_allclose(found, importance(ALPHA, MAGNITUDE, NUMEL), rtol=1e-12)


@pytest.mark.parametrize(
    ("scores_L", "budget", "kappa", "chunks"),
    [
        ([0.5, 0.3, 0.2], 1.1, 1.0, [1, 0, 0]),  # 1.65, 0.99, 0.66
        ([0.5, 0.3, 0.2], 4.0, 1.0, [6, 3, 2]),  # 6, 3.6, 2.4
        ([0.5, 0.3, 0.2], 1.1, 2.0, [2, 0, 0]),  # 2.171, 0.782, 0.347
        ([0.5, 0.3, 0.2], 1.1, 0.0, [1, 1, 1]),  # 1.1 each
        ([0.64, 0.36, 0.0], 7 / 3, 0.5, [4, 3, 0]),  # 7 · 8/14 and 7 · 6/14: whole numbers, up to rounding
        ([1.0, 0.0], 1.5, 1.0, [3, 0]),
        ([1.0], 0.9, 1.0, [0]),
    ],
)
def test_allocation_by_hand(scores_L: list[float], budget: float, kappa: float, chunks: list[int]) -> None:
    assert allocate_chunks(np.array(scores_L), budget, kappa) == chunks


@QUICK
@given(scores(), budgets, kappas)
def test_the_chunks_stay_within_the_budget(scores_L: Array, budget: float, kappa: float) -> None:
    chunks = allocate_chunks(scores_L, budget, kappa)
    assert all(count >= 0 for count in chunks)
    assert sum(chunks) <= budget * len(scores_L) + 1e-8


@QUICK
@given(scores(), budgets, kappas)
def test_a_more_important_tensor_never_gets_fewer_chunks(scores_L: Array, budget: float, kappa: float) -> None:
    chunks = np.array(allocate_chunks(scores_L, budget, kappa))
    assert (np.diff(chunks[np.argsort(scores_L, kind="stable")]) >= 0).all()


@QUICK
@given(scores(), budgets)
def test_kappa_zero_is_uniform_even_for_tensors_without_importance(scores_L: Array, budget: float) -> None:
    assert len(set(allocate_chunks(scores_L, budget, 0.0))) == 1


@QUICK
@given(scores(), budgets, st.sampled_from([0.0, 1.0, 2.0]), st.integers(-20, 20))
def test_allocation_does_not_depend_on_scale(scores_L: Array, budget: float, kappa: float, power: int) -> None:
    assert allocate_chunks(scores_L * 2.0**power, budget, kappa) == allocate_chunks(scores_L, budget, kappa)


def test_a_budget_of_one_gives_uniform_tensors_one_chunk_each_whatever_their_number() -> None:
    for count in range(1, 300):
        assert allocate_chunks(np.full(count, 1 / count), 1.0, 1.0) == [1] * count


@pytest.mark.parametrize("kappa", [3.0, 50.0, 500.0])
def test_a_large_kappa_sharpens_and_does_not_underflow(kappa: float) -> None:
    scores_L = np.append(np.full(1000, 0.5 / 1000), [0.5 / 2, 0.5 / 2])
    chunks = allocate_chunks(scores_L, 1.0, kappa)
    assert sum(chunks[:-2]) == 0
    assert chunks[-2] == chunks[-1] and sum(chunks) >= 1000
    assert allocate_chunks(np.full(1000, 1 / 1000), 1.0, kappa) == [1] * 1000


def test_stage_2_end_to_end_by_hand() -> None:
    layout, scores_L = stage_2_layout(stage_1(), MAGNITUDE, budget=2.0, kappa=1.0)  # 6 · (1/3, 2/3, 0) = 2, 4, 0
    np.testing.assert_allclose(scores_L, [1 / 3, 2 / 3, 0], rtol=1e-15)
    assert layout.tensors == ("a", "b", "c")
    assert layout.edges == ((0, 5, 10), (0, 5, 10, 15, 20), (0, 30))
    assert layout.learned == (True, True, False)


def test_chunks_along_directions_are_allocated_by_the_same_importance(tmp_path: Path) -> None:
    # 2, 4 and 0 chunks, as above.
    layout, scores_L = stage_2_layout(stage_1(), MAGNITUDE, 2.0, 1.0, {"b": 6, "c": 5})
    assert layout.edges == ((0, 5, 10), (0, 2, 4, 6), (0, 5))
    assert layout.learned == (True, True, False) and layout.spectral == {"b", "c"}
    few, _ = stage_2_layout(stage_1(), MAGNITUDE, 2.0, 1.0, {"b": 3})
    assert few.edges == ((0, 5, 10), (0, 1, 2, 3), (0, 30)), "at most one chunk a direction"
    each, _ = stage_2_layout(stage_1(), MAGNITUDE, 2.0, 1.0, {"b": 6, "c": 5}, each=True)
    assert each.edges == ((0, 5, 10), tuple(range(7)), (0, 5)) and each.learned == (True, True, False)
    write_importance(tmp_path / "importance.parquet", layout, scores_L, {"a": 10, "b": 20, "c": 30})
    table = pyarrow.parquet.read_table(tmp_path / "importance.parquet")
    assert (table["numel"].to_pylist(), table["chunks"].to_pylist()) == ([10, 20, 30], [2, 3, 0])


def test_stage_2_of_experts_that_equal_the_base_has_one_chunk_a_tensor() -> None:
    layout, scores_L = stage_2_layout(stage_1(), np.zeros((2, 3)), budget=1.1, kappa=1.0)
    np.testing.assert_array_equal(scores_L, [1 / 3] * 3)
    assert layout == ChunkLayout.make({"a": 10, "b": 20, "c": 30}, {"a": 1, "b": 1, "c": 1})


@pytest.mark.parametrize(("alpha", "magnitude", "budget"), [(ALPHA, MAGNITUDE, 0.4), (ALPHA, np.zeros((2, 3)), 0.9)])
def test_a_budget_that_gives_no_chunk_is_a_config_error(alpha: Array, magnitude: Array, budget: float) -> None:
    with refused(ConfigError, where="parameters.budget", do="`budget`", facts=[f"{budget}"]):
        stage_2_layout(stage_1(alpha), magnitude, budget, kappa=1.0)


def test_the_importance_file_has_its_schema_and_the_actual_numbers_of_chunks(tmp_path: Path) -> None:
    # 18 · (1/3, 2/3, 0) = 6, 12, 0. Chunks of ⌈10/6⌉ = ⌈20/12⌉ = 2 elements yield 5 and 10 of them.
    layout, scores_L = stage_2_layout(stage_1(), MAGNITUDE, budget=6.0, kappa=1.0)
    path = tmp_path / "importance.parquet"
    write_importance(path, layout, scores_L, {"a": 10, "b": 20, "c": 30})
    assert [(field.name, str(field.type)) for field in pyarrow.parquet.read_schema(path)] == [
        ("tensor", "string"),
        ("numel", "int64"),
        ("importance", "double"),
        ("chunks", "int32"),
    ]
    assert pyarrow.parquet.read_table(path).to_pydict() == {
        "tensor": ["a", "b", "c"],
        "numel": [10, 20, 30],
        "importance": scores_L.tolist(),
        "chunks": [5, 10, 0],
    }
