"""The table of coefficients: chunks, columns, parametrisation and parquet form."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from errors import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import bound

from engine.errors import RunError
from engine.task_vectors.coefficients import (
    ChunkLayout,
    Coefficients,
    chunk_edges,
    logit,
    read_coefficients,
    sigmoid,
    write_coefficients,
)

QUICK = settings(deadline=None, max_examples=200)


def example() -> Coefficients:
    layout = ChunkLayout.make({"a": 10, "b": 7, "c": 3}, {"a": 2, "b": 0, "c": 3})
    return Coefficients(layout, np.arange(12, dtype=np.float64).reshape(2, 6) / 16)


@QUICK
@given(numel=st.integers(1, 5000), chunks=st.integers(1, 6000))
def test_chunks_are_contiguous_and_cover_the_tensor(numel: int, chunks: int) -> None:
    edges = chunk_edges(numel, chunks)
    assert edges[0] == 0 and edges[-1] == numel
    assert all(start < end for start, end in pairwise(edges))


@QUICK
@given(numel=st.integers(1, 5000), chunks=st.integers(1, 6000))
def test_chunks_have_the_rounded_up_size_and_only_the_last_is_shorter(numel: int, chunks: int) -> None:
    sizes = [end - start for start, end in pairwise(chunk_edges(numel, chunks))]
    size = math.ceil(numel / chunks)
    assert all(one == size for one in sizes[:-1])
    assert 0 < sizes[-1] <= size


@QUICK
@given(numel=st.integers(1, 5000), chunks=st.integers(1, 6000))
def test_the_count_is_that_of_chunks_of_that_size_and_never_above_the_requested_one(numel: int, chunks: int) -> None:
    count = len(chunk_edges(numel, chunks)) - 1
    assert count == math.ceil(numel / math.ceil(numel / chunks)) <= min(numel, chunks)


@pytest.mark.parametrize(
    ("numel", "chunks", "edges"),
    [
        (10, 1, (0, 10)),
        (10, 2, (0, 5, 10)),
        (10, 3, (0, 4, 8, 10)),
        (10, 6, (0, 2, 4, 6, 8, 10)),  # chunks of 2 elements: five suffice
        (3, 9, (0, 1, 2, 3)),
        (1, 1, (0, 1)),
    ],
)
def test_chunk_edges_by_hand(numel: int, chunks: int, edges: tuple[int, ...]) -> None:
    assert chunk_edges(numel, chunks) == edges


def test_a_layout_cuts_each_tensor_and_leaves_those_without_chunks_fixed() -> None:
    layout = example().layout
    assert layout.tensors == ("a", "b", "c")
    assert layout.edges_of == {"a": (0, 5, 10), "b": (0, 7), "c": (0, 1, 2, 3)}
    assert layout.learned == (True, False, True)
    assert layout.learned_columns.tolist() == [True, True, False, True, True, True]


def test_chunks_of_directions_count_these_and_there_are_no_more_chunks() -> None:
    layout = ChunkLayout.make({"a": 10, "b": 70, "c": 80}, {"a": 2, "b": 2, "c": 9}, {"b": 5, "c": 3})
    assert layout.edges_of == {"a": (0, 5, 10), "b": (0, 3, 5), "c": (0, 1, 2, 3)}
    table = Coefficients(layout, np.arange(14, dtype=np.float64).reshape(2, 7))
    assert [table.of(name).spectral for name in layout.tensors] == [False, True, True]
    assert table.of("b").of_directions(1, 4).tolist() == [9, 9, 9, 10]
    assert table.of("b").of_directions(0, 2).tolist() == [2, 2]
    assert not table.same_as(Coefficients(ChunkLayout(layout.tensors, layout.edges, layout.learned), table.values))


@QUICK
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 9)), min_size=1, max_size=8))
def test_the_columns_of_a_layout_run_over_the_tensors_and_their_chunks(tensors: list[tuple[int, int]]) -> None:
    names = [f"t{i}" for i in range(len(tensors))]
    layout = ChunkLayout.make(
        dict(zip(names, (numel for numel, _ in tensors), strict=True)),
        dict(zip(names, (chunks for _, chunks in tensors), strict=True)),
    )
    columns = [column for name in names for column in range(layout.width)[layout.columns[name]]]
    assert columns == list(range(layout.width))
    for name, (numel, chunks) in zip(names, tensors, strict=True):
        assert len(range(layout.width)[layout.columns[name]]) == len(chunk_edges(numel, max(1, chunks))) - 1
        assert (layout.learned_columns[layout.columns[name]] == (chunks > 0)).all()
    assert layout.learned_columns.shape == (layout.width,)


def test_constant_coefficients_are_each_expert_s_weight() -> None:
    table = Coefficients.constant(example().layout, [0.25, 0.5])
    assert table.values.dtype == np.float64
    np.testing.assert_array_equal(table.values, [[0.25] * 6, [0.5] * 6])


@pytest.mark.parametrize(
    ("tensor", "edges", "values"),
    [
        ("a", (0, 5, 10), [[0, 1], [6, 7]]),
        ("b", (0, 7), [[2], [8]]),
        ("c", (0, 1, 2, 3), [[3, 4, 5], [9, 10, 11]]),
    ],
)
def test_the_coefficients_of_one_tensor(tensor: str, edges: tuple[int, ...], values: list[list[float]]) -> None:
    wanted = example().of(tensor)
    assert wanted.edges == edges
    assert wanted.values.dtype == np.float32
    np.testing.assert_array_equal(wanted.values, np.array(values) / 16)


def test_one_value_per_tensor_is_the_mean_of_its_chunks() -> None:
    np.testing.assert_allclose(example().per_tensor() * 16, [[0.5, 2, 4], [6.5, 8, 10]], rtol=1e-15)


def test_spread_repeats_the_value_of_a_tensor_over_its_chunks() -> None:
    one_each = ChunkLayout.make({"a": 10, "b": 7, "c": 3}, {"a": 1, "b": 1, "c": 1})
    stage_1 = Coefficients(one_each, np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]))
    spread = stage_1.spread(example().layout)
    assert spread.layout == example().layout
    np.testing.assert_array_equal(spread.values, [[0.1, 0.1, 0.2, 0.3, 0.3, 0.3], [0.4, 0.4, 0.5, 0.6, 0.6, 0.6]])


def test_same_as_tells_values_and_layouts_apart() -> None:
    table = example()
    moved = Coefficients(table.layout, np.nextafter(table.values, 1))
    recut = Coefficients(ChunkLayout(table.layout.tensors, table.layout.edges, (True, True, True)), table.values)
    assert table.same_as(example())
    assert not table.same_as(moved)
    assert not table.same_as(recut)


@QUICK
@given(st.floats(1e-9, 1 - 1e-9))
def test_sigmoid_undoes_logit(alpha: float) -> None:
    assert sigmoid(logit(np.array([alpha]))).item() == pytest.approx(alpha, rel=1e-12)


@QUICK
@given(st.floats(-15, 15))
def test_logit_undoes_sigmoid(a: float) -> None:
    assert logit(sigmoid(np.array([a]))).item() == pytest.approx(a, abs=1e-8)


def test_sigmoid_by_hand() -> None:
    # numpy's exp is within 4 units of the last place, 8u, on any processor; ln 3, the sum and the quotient are rounded.
    error = bound(12, 1, torch.float64)
    np.testing.assert_allclose(sigmoid(np.array([0.0, math.log(3), -math.log(3)])), [0.5, 0.75, 0.25], rtol=error)


def test_the_parquet_file_has_the_schema_of_the_design(tmp_path: Path) -> None:
    path = tmp_path / "coefficients.parquet"
    write_coefficients(path, [example()], ["math", "code"])
    assert [(field.name, str(field.type)) for field in pyarrow.parquet.read_schema(path)] == [
        ("stage", "int8"),
        ("model", "string"),
        ("tensor", "string"),
        ("chunk", "int32"),
        ("start", "int64"),
        ("end", "int64"),
        ("value", "float"),
        ("learned", "bool"),
    ]
    assert pa.types.is_float32(pyarrow.parquet.read_schema(path).field("value").type)


def test_the_parquet_file_has_a_row_a_coefficient(tmp_path: Path) -> None:
    path = tmp_path / "coefficients.parquet"
    write_coefficients(path, [example()], ["math", "code"])
    rows = [tuple(row.values()) for row in pyarrow.parquet.read_table(path).to_pylist()]
    assert len(rows) == 12
    assert rows[:4] == [
        (1, "math", "a", 0, 0, 5, 0 / 16, True),
        (1, "math", "a", 1, 5, 10, 1 / 16, True),
        (1, "math", "b", 0, 0, 7, 2 / 16, False),
        (1, "math", "c", 0, 0, 1, 3 / 16, True),
    ]
    assert rows[-1] == (1, "code", "c", 2, 2, 3, 11 / 16, True)


@settings(deadline=None, max_examples=30)
@given(
    chunks=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    models=st.lists(st.text(min_size=1, max_size=9, alphabet="aZ0-._ é/"), min_size=1, max_size=4, unique=True),
    along=st.integers(0, 5),
    data=st.data(),
)
def test_both_stages_come_back_from_parquet(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[int], models: list[str], along: int, data: st.DataObject
) -> None:
    numels = {f"layers.{i}.weight": 12 + i for i in range(len(chunks))}
    directions = dict.fromkeys(list(numels)[:along], 4)
    layouts = [
        ChunkLayout.make(numels, dict.fromkeys(numels, 1)),
        ChunkLayout.make(numels, dict(zip(numels, chunks, strict=True)), directions),
    ]
    assert [layout.spectral for layout in layouts] == [frozenset(), frozenset(directions)]
    tables = []
    for layout in layouts:
        size = len(models) * layout.width
        values = data.draw(st.lists(st.floats(0.001, 0.999), min_size=size, max_size=size))
        tables.append(Coefficients(layout, np.array(values).reshape(len(models), layout.width)))
    path = tmp_path_factory.mktemp("parquet") / "coefficients.parquet"
    write_coefficients(path, tables, models)
    for stage, table in enumerate(tables, start=1):
        names, read = read_coefficients(path, stage)
        assert names == models
        assert read.layout == table.layout
        np.testing.assert_array_equal(read.values, table.values.astype(np.float32))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_stage_that_the_file_does_not_have_is_named(tmp_path: Path, stage: int) -> None:
    path = tmp_path / "coefficients.parquet"
    write_coefficients(path, [example()], ["math", "code"])
    with refused(RunError, where="coefficients.parquet", facts=[f"stage {stage}"]):
        read_coefficients(path, stage)
