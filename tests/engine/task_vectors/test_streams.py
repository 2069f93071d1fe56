"""Streams over small checkpoints, compared with dense references in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import cut_small
from errors import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerance import assert_within, bound
from torch import Tensor

from engine.checkpoints.adapters import LoraPair
from engine.checkpoints.headers import read_file_header
from engine.checkpoints.tensors import Checkpoint
from engine.errors import CheckpointError
from engine.sizes import GROUP
from engine.task_vectors.coefficients import TensorCoefficients, chunk_edges
from engine.task_vectors.experts import AdapterExpert, ExpertWeights, FullExpert
from engine.task_vectors.kinds import Operand, TaskVector, as_operand
from engine.task_vectors.pieces import Piece, blocks, pieces
from engine.task_vectors.streams import TaskVectors
from engine.task_vectors.sums import inner_products, mean_magnitudes, merge_piece

Array = npt.NDArray[np.float64]

SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "one": (1,),
    "vector": (37,),
    "matrix": (11, 6),
    "wide": (5, 40),
    "cube": (3, 4, 5),
}
ADAPTED = ("matrix", "wide")
SCALING, RANK = 0.75, 3


@dataclass(frozen=True)
class ModelSet:
    """Files of a base, full experts and adapters; `dense` has the task vectors in float64, None where they are zero."""

    folder: Path
    base: Checkpoint
    experts: list[tuple[str, ExpertWeights]]
    dense: dict[str, list[Array | None]]

    def task_vectors(self, threads: int = 1, dtype: torch.dtype = torch.float32) -> TaskVectors:
        return TaskVectors(self.base, self.experts, dtype, threads)

    def vectors(self, name: str) -> list[TaskVector | None]:
        return [expert.task_vector(name) for _, expert in self.experts]


def noise(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def saved(folder: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder, read_file_header(folder / "model.safetensors"))


def make_model_set(folder: Path, dtype: torch.dtype, kinds: Sequence[str] = ("full", "adapter")) -> ModelSet:
    folder.mkdir()
    base = {name: noise(shape, seed, dtype) for seed, (name, shape) in enumerate(SHAPES.items())}
    experts: list[tuple[str, ExpertWeights]] = []
    dense: dict[str, list[Array | None]] = {name: [None] * len(kinds) for name in SHAPES}
    for k, kind in enumerate(kinds):
        if kind == "full":
            full = {name: (one + 0.1 * noise(tuple(one.shape), 50 + 100 * k)).to(dtype) for name, one in base.items()}
            experts.append((f"full{k}", FullExpert(saved(folder / f"expert{k}", full))))
            for name in SHAPES:
                dense[name][k] = full[name].double().numpy() - base[name].double().numpy()
            continue
        factors, pairs = {}, {}
        for seed, name in enumerate(ADAPTED):
            # The second weight is stored as [in, out], so its product is transposed.
            rows, columns = SHAPES[name] if name == "matrix" else SHAPES[name][::-1]
            a, b = noise((RANK, columns), 70 + seed + 100 * k, dtype), noise((rows, RANK), 80 + seed + 100 * k, dtype)
            factors |= {f"{name}.a": a, f"{name}.b": b}
            pairs[name] = LoraPair(f"{name}.a", f"{name}.b", SCALING, transposed=name == "wide")
            product = SCALING * b.double().numpy() @ a.double().numpy()
            dense[name][k] = product.T if name == "wide" else product
        experts.append((f"adapter{k}", AdapterExpert(saved(folder / f"expert{k}", factors), pairs)))
    return ModelSet(folder, saved(folder / "base", base), experts, dense)


@pytest.fixture(scope="module")
def model_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, ModelSet]:
    folder = tmp_path_factory.mktemp("model_sets")
    return {dtype: make_model_set(folder / str(dtype), dtype) for dtype in (torch.float32, torch.bfloat16)}


@pytest.fixture
def model_set(model_sets: dict[torch.dtype, ModelSet]) -> ModelSet:
    return model_sets[torch.float32]


# Elements of a block and of a piece: a piece of one block, of several, and of several with a partial one.
@pytest.fixture(
    params=[(4, 4), *(pytest.param(size, marks=pytest.mark.thorough) for size in ((13, 30), (48, 100))), None],
    ids=lambda size: f"block-{size[0] if size else 'whole'}",
)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks and pieces, so that tensors have several; None keeps the default sizes."""
    if request.param is not None:
        cut_small(monkeypatch, *request.param)


def merged(
    base: Tensor, vectors: Sequence[TaskVector | None], wanted: TensorCoefficients, dtype: torch.dtype
) -> Tensor:
    """Merge a whole tensor piece by piece."""
    out_N = torch.full((base.numel(),), torch.nan, dtype=dtype)
    for piece in pieces("any", base.shape):
        merge_piece(piece, base, vectors, wanted, out_N[piece.start : piece.stop])
    return out_N.view(base.shape)


def products_of(gradient: Tensor, base: Tensor, vectors: Sequence[TaskVector | None], edges: tuple[int, ...]) -> Array:
    """Compute the inner products with a whole gradient piece by piece."""
    gradient_N = gradient.reshape(-1)
    return sum(
        (
            inner_products(piece, gradient_N[piece.start : piece.stop], base, vectors, edges)
            for piece in pieces("any", base.shape)
        ),
        np.zeros((len(vectors), len(edges) - 1)),
    )


def all_pieces(names: Sequence[str] = tuple(SHAPES)) -> list[Piece]:
    return [piece for name in names for piece in pieces(name, SHAPES[name])]


def coefficients(name: str, chunks: int, experts: int = 2) -> TensorCoefficients:
    edges = chunk_edges(math.prod(SHAPES[name]), chunks)
    values = np.random.default_rng(chunks).uniform(0.1, 0.9, (experts, len(edges) - 1)).astype(np.float32)
    return TensorCoefficients(edges, values)


def dense_merge(model_set: ModelSet, name: str, wanted: TensorCoefficients) -> Array:
    total = model_set.base.read(name).double().numpy().copy()
    for k, tau in enumerate(model_set.dense[name]):
        if tau is not None:
            total += np.repeat(wanted.values[k].astype(np.float64), np.diff(wanted.edges)).reshape(tau.shape) * tau
    return total


def dense_products(model_set: ModelSet, name: str, gradient: Tensor, edges: tuple[int, ...]) -> Array:
    products = np.zeros((len(model_set.experts), len(edges) - 1))
    for k, tau in enumerate(model_set.dense[name]):
        if tau is not None:
            elementwise = (gradient.double().numpy() * tau).reshape(-1)
            products[k] = [elementwise[start:stop].sum() for start, stop in pairwise(edges)]
    return products


def products_error(gradient: Array, taus: Sequence[Array | None], edges: tuple[int, ...]) -> Array:
    """Return the error bound of each chunk's sum of products in float32, in any order; its partial sums grow to ‖·‖₂.

    In addition to the sums, a product is rounded twice, and an element of a task vector takes RANK products, their sums
    and two factors.
    """
    scale = np.zeros((len(taus), len(edges) - 1))
    for k, tau in enumerate(taus):
        if tau is not None:
            elementwise = (gradient.reshape(-1) * tau.reshape(-1)) ** 2
            scale[k] = [math.sqrt(elementwise[start:stop].sum()) for start, stop in pairwise(edges)]
    return np.array([bound(int(n) + 2 * RANK + 4, 1) for n in np.diff(edges)]) * scale


@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_merged_tensors_are_the_dense_sum(
    model_sets: dict[torch.dtype, ModelSet], dtype: torch.dtype, name: str, chunks: int
) -> None:
    model_set, wanted = model_sets[dtype], coefficients(name, chunks)
    result = merged(model_set.base.read(name), model_set.vectors(name), wanted, torch.float32)
    np.testing.assert_allclose(result.numpy(), dense_merge(model_set, name, wanted), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_inner_products_are_the_dense_ones_chunk_by_chunk(
    model_sets: dict[torch.dtype, ModelSet], dtype: torch.dtype, name: str, chunks: int
) -> None:
    model_set, edges = model_sets[dtype], coefficients(name, chunks).edges
    gradient = noise(SHAPES[name], 99, dtype)
    products = products_of(gradient, model_set.base.read(name), model_set.vectors(name), edges)
    assert products.dtype == np.float64
    error = products_error(gradient.double().numpy(), model_set.dense[name], edges)
    assert_within(products, dense_products(model_set, name, gradient, edges), error)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_mean_magnitudes_are_the_dense_ones(
    model_sets: dict[torch.dtype, ModelSet], dtype: torch.dtype, name: str
) -> None:
    model_set = model_sets[dtype]
    base_magnitude, magnitudes = mean_magnitudes(model_set.base.read(name), model_set.vectors(name))
    wanted = [0.0 if tau is None else np.abs(tau).mean() for tau in model_set.dense[name]]
    assert base_magnitude == pytest.approx(model_set.base.read(name).double().abs().mean().item(), rel=1e-5)
    np.testing.assert_allclose(magnitudes, wanted, rtol=1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_the_result_is_rounded_once_to_the_requested_dtype(model_set: ModelSet) -> None:
    wanted = coefficients("matrix", 3)
    arguments = model_set.base.read("matrix"), model_set.vectors("matrix"), wanted
    exact = merged(*arguments, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(merged(*arguments, dtype), exact.to(dtype))
    asked = dict.fromkeys(all_pieces(["matrix"]), wanted)
    for found, rounded in [
        (model_set.task_vectors(dtype=torch.bfloat16).merge_all(asked), exact.bfloat16()),
        (model_set.task_vectors().merge_all(asked, torch.float16), exact.half()),
    ]:
        assert torch.equal(torch.cat(list(found.values())), rounded.reshape(-1))


def test_a_small_task_vector_is_not_lost_beside_a_large_base() -> None:
    base = torch.full((1000,), 1000.0)
    expert = base + 2.0**-13  # the last bit of a float32 near 1000
    gradient = torch.ones(1000)
    tau = FullVector(expert)
    assert products_of(gradient, base, [tau], (0, 1000)).item() == 1000 * 2.0**-13
    assert mean_magnitudes(base, [tau])[1].item() == 2.0**-13


class FullVector:
    """The task vector of a full expert in memory."""

    minus_base = True

    def __init__(self, expert_N: Tensor) -> None:
        self.expert_N = expert_N

    def operand(self, start: int, stop: int, buffer_N: Tensor) -> Operand:
        return as_operand(buffer_N.copy_(self.expert_N[start:stop]))

    def block(self, start: int, stop: int, base_N: Tensor, out_N: Tensor) -> None:
        out_N.copy_(self.expert_N[start:stop] - base_N)


def test_tensors_without_a_task_vector_keep_the_base_s_values() -> None:
    base, wanted = noise((6, 5), 1), TensorCoefficients((0, 30), np.full((2, 1), 0.5, dtype=np.float32))
    assert torch.equal(merged(base, [None, None], wanted, torch.float32), base)
    np.testing.assert_array_equal(products_of(noise((6, 5), 2), base, [None, None], (0, 30)), np.zeros((2, 1)))
    assert mean_magnitudes(base, [None, None])[1].tolist() == [0, 0]


def test_an_empty_tensor_has_no_pieces_and_no_magnitude() -> None:
    assert list(pieces("empty", (0, 3))) == list(pieces("empty", (3, 0))) == []
    assert mean_magnitudes(torch.empty(0, 3), [FullVector(torch.empty(0))]) == (0.0, np.zeros(1))


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((), [(0, 1)]),
        ((25,), [(0, 10), (10, 20), (20, 25)]),
        ((4, 5), [(0, 10), (10, 20)]),  # two whole rows a block
        ((3, 4), [(0, 8), (8, 12)]),
        ((3, 2, 4), [(0, 8), (8, 16), (16, 24)]),
        ((2, 12), [(0, 10), (10, 20), (20, 24)]),  # a row does not fit
        ((0, 4), []),
        ((4, 0), []),
    ],
)
def test_blocks_are_whole_rows_where_these_fit(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], wanted: list[tuple[int, int]]
) -> None:
    cut_small(monkeypatch, block=10, piece=10)
    assert list(blocks(shape)) == wanted


@settings(deadline=None, max_examples=300)
@given(
    shape=st.lists(st.integers(0, 12), max_size=3).map(tuple),
    block=st.integers(1, 40),
    piece=st.integers(1, 200),
)
def test_pieces_and_blocks_cover_every_shape_once(shape: tuple[int, ...], block: int, piece: int) -> None:
    numel, row = math.prod(shape), shape[-1] if shape else 1
    with pytest.MonkeyPatch.context() as monkeypatch:
        cut_small(monkeypatch, block, piece)
        cut, whole = list(pieces("w", shape)), list(blocks(shape))
        within = [list(blocks(shape, one.start, one.stop)) for one in cut]
    assert [place for one in cut for place in range(one.start, one.stop)] == list(range(numel))
    assert all(one.name == "w" and 0 < one.numel == one.stop - one.start <= max(piece, block) for one in cut)
    assert [one for some in within for one in some] == whole, "pieces are whole blocks"
    assert [place for start, stop in whole for place in range(start, stop)] == list(range(numel))
    assert all(stop - start <= block for start, stop in whole)
    if 0 < row <= block:
        assert all(start % row == stop % row == 0 for start, stop in whole), "blocks are whole rows"
    # Pieces are as large as allowed.
    assert len(cut) <= 1 or all(one.numel > piece - block for one in cut[:-1])


EVERY_KIND = ("full", "adapter", "full", "adapter", "adapter", "full", "adapter", "full", "full")


@pytest.fixture(scope="module")
def large_model_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, ModelSet]:
    """Nine experts, more than two groups; for most tensors, some experts in between have no task vector."""
    folder = tmp_path_factory.mktemp("large_model_sets")
    assert len(EVERY_KIND) > 2 * GROUP
    return {dtype: make_model_set(folder / str(dtype), dtype, EVERY_KIND) for dtype in (torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("experts", range(1, 10))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_any_number_of_experts_merges_and_gives_gradients_as_the_dense_sums(
    large_model_sets: dict[torch.dtype, ModelSet], dtype: torch.dtype, experts: int
) -> None:
    large_set = large_model_sets[dtype]
    model_set = ModelSet(
        large_set.folder,
        large_set.base,
        large_set.experts[:experts],
        {name: taus[:experts] for name, taus in large_set.dense.items()},
    )
    for name, shape in SHAPES.items():
        wanted, slope = coefficients(name, 7, experts), noise(shape, 99, dtype)
        arguments = model_set.base.read(name), model_set.vectors(name)
        result = merged(*arguments, wanted, torch.float32)
        np.testing.assert_allclose(result.numpy(), dense_merge(model_set, name, wanted), rtol=2e-6, atol=4e-6)
        products = products_of(slope, *arguments, wanted.edges)
        assert products.shape == (experts, len(wanted.edges) - 1)
        error = products_error(slope.double().numpy(), model_set.dense[name], wanted.edges)
        assert_within(products, dense_products(model_set, name, slope, wanted.edges), error, name)


@settings(deadline=None, max_examples=100)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 9)),
    block=st.integers(1, 30),
    piece=st.integers(1, 60),
    changed=st.lists(st.booleans(), min_size=1, max_size=9),
    data=st.data(),
)
def test_chunks_may_cut_through_blocks_and_pieces_anywhere(
    shape: tuple[int, int], block: int, piece: int, changed: list[bool], data: st.DataObject
) -> None:
    numel, generator = math.prod(shape), np.random.default_rng(len(changed))
    cuts = data.draw(st.sets(st.integers(1, max(1, numel - 1)), max_size=6))
    edges = (0, *sorted(cuts - {numel}), numel)
    base, slope = noise(shape, 1), noise(shape, 2)
    taus = [generator.normal(0, 0.1, numel).astype(np.float32) if has_tau else None for has_tau in changed]
    vectors = [None if tau is None else FullVector(base.reshape(-1) + torch.from_numpy(tau)) for tau in taus]
    values = generator.uniform(0, 1, (len(changed), len(edges) - 1)).astype(np.float32)
    with pytest.MonkeyPatch.context() as monkeypatch:
        cut_small(monkeypatch, block, piece)
        result = merged(base, vectors, TensorCoefficients(edges, values), torch.float32)
        products = products_of(slope, base, vectors, edges)
    # The float32 differences, since the experts were rounded when they were made.
    exact = [None if tau is None else (tau.expert_N - base.reshape(-1)).double().numpy() for tau in vectors]
    total, flat = base.reshape(-1).double().numpy().copy(), slope.reshape(-1).double().numpy()
    dense = np.zeros_like(products)
    for k, tau in enumerate(exact):
        if tau is not None:
            total += np.repeat(values[k].astype(np.float64), np.diff(edges)) * tau
            dense[k] = [(flat * tau)[start:stop].sum() for start, stop in pairwise(edges)]
    np.testing.assert_allclose(result.reshape(-1).numpy(), total, rtol=1e-6, atol=2e-6)
    assert_within(products, dense, products_error(flat, exact, edges))


@pytest.mark.parametrize("experts", [1, GROUP, 2 * GROUP + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_experts_equal_to_the_base_leave_its_bits(dtype: torch.dtype, experts: int) -> None:
    base = noise((13, 17), 3, dtype)
    values = np.random.default_rng(0).uniform(0, 1, (experts, 5)).astype(np.float32)
    wanted = TensorCoefficients(chunk_edges(base.numel(), 5), values)
    equal = [FullVector(base.reshape(-1).clone()) for _ in range(experts)]
    assert torch.equal(merged(base, equal, wanted, dtype).view(torch.uint8), base.view(torch.uint8))
    np.testing.assert_array_equal(products_of(noise((13, 17), 4), base, equal, wanted.edges), np.zeros((experts, 5)))


def shifted(tensor_N: Tensor, offset: int) -> Tensor:
    """Return a copy of the elements that begins `offset` elements after an aligned address."""
    memory = torch.empty(tensor_N.numel() + offset, dtype=tensor_N.dtype)
    memory[offset:] = tensor_N
    return memory[offset:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_the_bits_do_not_depend_on_where_output_and_gradient_lie(
    large_model_sets: dict[torch.dtype, ModelSet], dtype: torch.dtype
) -> None:
    large_set = large_model_sets[dtype]
    for name in ("vector", "matrix", "wide"):
        wanted = coefficients(name, 5, len(large_set.experts))
        arguments, slope_N = (
            (large_set.base.read(name), large_set.vectors(name)),
            noise(SHAPES[name], 99, dtype).reshape(-1),
        )
        for piece in pieces(name, SHAPES[name]):
            results: list[tuple[Tensor, Array]] = []
            for offset in (0, 1, 2, 3, 7):
                out_N = shifted(torch.full((piece.numel,), torch.nan, dtype=dtype), offset)
                merge_piece(piece, *arguments, wanted, out_N)
                part_N = shifted(slope_N[piece.start : piece.stop], offset)
                results.append((out_N, inner_products(piece, part_N, *arguments, wanted.edges)))
            for out_N, products in results[1:]:
                assert torch.equal(out_N, results[0][0])
                np.testing.assert_array_equal(products, results[0][1])


@pytest.fixture
def _threads_set_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads_set_back")
def test_blocks_of_full_size_have_the_same_bits_on_any_threads_and_at_any_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors are large enough for torch to split an operation over threads and to choose another algorithm."""
    monkeypatch.setattr("engine.task_vectors.pieces.PIECE", 1 << 17)
    shape, edges = (1000, 901), (0, 70_001, 300_000, 1000 * 901)
    base = noise(shape, 0)
    experts = [(f"e{k}", FullExpert(saved(tmp_path / f"e{k}", {"w": base + noise(shape, k + 1)}))) for k in range(5)]
    model_set = ModelSet(tmp_path, saved(tmp_path / "base", {"w": base}), [*experts], {})
    todo, slope_N = list(pieces("w", shape)), noise(shape, 99).reshape(-1)
    assert len(todo) > 3
    wanted = TensorCoefficients(edges, np.random.default_rng(0).uniform(0, 1, (5, 3)).astype(np.float32))
    answers = []
    for threads, caller, offset in [(1, 1, 0), (1, 4, 0), (2, 2, 1), (4, 1, 3)]:
        # The caller's number of intra-op threads must not matter either.
        torch.set_num_threads(caller)
        streams, tensor_N = model_set.task_vectors(threads), shifted(torch.full((base.numel(),), torch.nan), offset)
        for merging in [
            streams.pool.submit(streams.merge, one, wanted, tensor_N[one.start : one.stop]) for one in todo
        ]:
            merging.result()
        slopes = {one: shifted(slope_N[one.start : one.stop], offset) for one in todo}
        parts = np.stack(list(streams.gradients_all(slopes, {"w": edges}).values()))
        answers.append((tensor_N, parts, streams.inspect(["w"])["w"].magnitudes))
        assert streams.pool.submit(torch.get_num_threads).result() == 1
    for tensor_N, *sums in answers[1:]:
        assert torch.equal(tensor_N, answers[0][0])
        for some, first in zip(sums, answers[0][1:], strict=True):
            np.testing.assert_array_equal(some, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_the_bits_depend_neither_on_threads_nor_on_other_requests(
    model_sets: dict[torch.dtype, ModelSet], dtype: torch.dtype
) -> None:
    model_set = model_sets[dtype]
    wanted = {piece: coefficients(piece.name, 3) for piece in all_pieces()}
    edges = {piece.name: one.edges for piece, one in wanted.items()}
    slopes = {piece: noise(SHAPES[piece.name], 99).reshape(-1)[piece.start : piece.stop] for piece in wanted}

    def together(threads: int) -> tuple[dict[Piece, Tensor], dict[Piece, Array], dict[str, Array]]:
        streams = model_set.task_vectors(threads)
        inspected = {name: one.magnitudes for name, one in streams.inspect(SHAPES).items()}
        return streams.merge_all(wanted), streams.gradients_all(slopes, edges), inspected

    alone = model_set.task_vectors()
    for tensors, products, magnitudes in (together(1), together(3)):
        assert list(tensors) == list(products) == all_pieces() and list(magnitudes) == list(SHAPES)
        for piece in wanted:
            assert torch.equal(tensors[piece], alone.merge_all({piece: wanted[piece]})[piece])
            one = alone.gradients_all({piece: slopes[piece]}, edges)[piece]
            np.testing.assert_array_equal(products[piece], one)
        for name in SHAPES:
            np.testing.assert_array_equal(magnitudes[name], alone.inspect([name])[name].magnitudes)


@pytest.mark.usefixtures("small_blocks")
def test_reading_changes_neither_the_files_nor_what_is_mapped(model_set: ModelSet) -> None:
    checkpoints = [model_set.base, *(expert.checkpoint for _, expert in model_set.experts)]  # type: ignore[attr-defined]
    files = sorted(model_set.folder.rglob("*.safetensors"))
    before = [file.read_bytes() for file in files]
    mapped = [{name: one.read(name).clone() for name in one.tensors} for one in checkpoints]
    task_vectors = model_set.task_vectors(threads=3)
    wanted = {piece: coefficients(piece.name, 2) for piece in all_pieces()}
    slopes = {piece: noise((piece.numel,), 99) for piece in wanted}
    kept = {piece: slope.clone() for piece, slope in slopes.items()}
    for _ in range(2):
        task_vectors.inspect(SHAPES)
        for tensor in task_vectors.merge_all(wanted).values():
            tensor.zero_()  # a returned tensor belongs to the caller
        task_vectors.gradients_all(slopes, {piece.name: one.edges for piece, one in wanted.items()})
    assert [file.read_bytes() for file in files] == before
    for checkpoint, tensors in zip(checkpoints, mapped, strict=True):
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    assert all(torch.equal(slopes[piece], kept[piece]) for piece in slopes)


Spoil = Callable[[dict[str, dict[str, Tensor]]], None]


def inspect_spoiled(folder: Path, spoil: Spoil) -> dict[str, Array]:
    """Inspect a base, a full expert and an adapter after `spoil` has changed their tensors."""
    models = {
        "base": {"good": noise((4, 3), 1), "w": noise((6, 5), 2), "steps": torch.arange(4)},
        "math": {"good": noise((4, 3), 3), "w": noise((6, 5), 4), "steps": torch.arange(4)},
        "code": {"a": noise((2, 5), 5), "b": noise((6, 2), 6)},
    }
    spoil(models)
    checkpoints = {name: saved(folder / name, tensors) for name, tensors in models.items()}
    experts: list[tuple[str, ExpertWeights]] = [
        ("math", FullExpert(checkpoints["math"])),
        ("code", AdapterExpert(checkpoints["code"], {"w": LoraPair("a", "b", 1.0, False)})),
    ]
    inspected = TaskVectors(checkpoints["base"], experts, torch.float32, threads=2).inspect(["good", "w", "steps"])
    return {name: one.magnitudes for name, one in inspected.items()}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 17, -1])
@pytest.mark.parametrize(
    ("model", "tensor", "owner"), [("base", "w", "base"), ("math", "w", "'math'"), ("code", "a", "'code'")]
)
def test_a_weight_that_is_not_finite_is_named_with_tensor_and_model(
    tmp_path: Path, value: float, place: int, model: str, tensor: str, owner: str
) -> None:
    def spoil(models: dict[str, dict[str, Tensor]]) -> None:
        flat = models[model][tensor].view(-1)
        flat[place % len(flat)] = value

    with refused(CheckpointError, where=owner, facts=["'w'", "NaN"]):
        inspect_spoiled(tmp_path, spoil)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("model", ["base", "math"])
def test_infinities_of_both_signs_do_not_hide_each_other(tmp_path: Path, model: str) -> None:
    def spoil(models: dict[str, dict[str, Tensor]]) -> None:
        models[model]["w"][0, 0], models[model]["w"][5, 4] = math.inf, -math.inf

    with refused(CheckpointError, where="base" if model == "base" else "'math'", facts=["'w'", "infinite"]):
        inspect_spoiled(tmp_path, spoil)


def test_integers_are_not_checked_and_have_no_task_vector(tmp_path: Path) -> None:
    def spoil(models: dict[str, dict[str, Tensor]]) -> None:
        models["base"]["steps"] += torch.iinfo(torch.int64).max - 8
        models["math"]["steps"].fill_(torch.iinfo(torch.int64).min)

    assert inspect_spoiled(tmp_path, spoil)["steps"].tolist() == [0, 0]


def test_large_finite_weights_are_accepted(tmp_path: Path) -> None:
    def spoil(models: dict[str, dict[str, Tensor]]) -> None:
        # Some checkpoints store their attention mask as a buffer of the lowest float.
        for model in ("base", "math"):
            models[model]["good"].fill_(torch.finfo(torch.float32).min)

    assert inspect_spoiled(tmp_path, spoil)["good"].tolist() == [0, 0]


def test_a_missing_tensor_raises_at_its_request(model_set: ModelSet) -> None:
    with pytest.raises(KeyError, match="absent"):
        model_set.task_vectors().inspect(["absent"])


@pytest.fixture(autouse=True)
def _threads_as_they_were() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads, "only the pool's own threads are set to one"
