"""Streams over small hand-written checkpoints against dense references in float64."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import engine.task_vectors
from engine.checkpoint import AdapterExpert, Checkpoint, Expert, FullExpert, TaskVector
from engine.coefficients import Coefficients, Layout, TensorCoefficients, chunk_edges
from engine.errors import CheckpointError
from engine.headers import read_file_header
from engine.lora import LoraPair
from engine.task_vectors import LocalShards, TaskVectors, blocks, inner_products, mean_magnitudes, merge_tensor

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
class House:
    """A base, a full expert and an adapter in files; `dense` are their task vectors in float64, None where zero."""

    folder: Path
    base: Checkpoint
    experts: list[tuple[str, Expert]]
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


def make_house(folder: Path, dtype: torch.dtype) -> House:
    base = {name: noise(shape, seed, dtype) for seed, (name, shape) in enumerate(SHAPES.items())}
    full = {name: (tensor + 0.1 * noise(tensor.shape, 50)).to(dtype) for name, tensor in base.items()}
    factors, pairs = {}, {}
    dense: dict[str, list[Array | None]] = {
        name: [full[name].double().numpy() - base[name].double().numpy(), None] for name in SHAPES
    }
    for seed, name in enumerate(ADAPTED):
        # The second weight is stored as [in, out]: its product comes transposed.
        rows, columns = SHAPES[name] if name == "matrix" else SHAPES[name][::-1]
        a, b = noise((RANK, columns), 70 + seed, dtype), noise((rows, RANK), 80 + seed, dtype)
        factors |= {f"{name}.a": a, f"{name}.b": b}
        pairs[name] = LoraPair(f"{name}.a", f"{name}.b", SCALING, transposed=name == "wide")
        product = SCALING * b.double().numpy() @ a.double().numpy()
        dense[name][1] = product.T if name == "wide" else product
    folder.mkdir()
    experts: list[tuple[str, Expert]] = [
        ("full", FullExpert(saved(folder / "full", full))),
        ("adapter", AdapterExpert(saved(folder / "adapter", factors), pairs)),
    ]
    return House(folder, saved(folder / "base", base), experts, dense)


@pytest.fixture(scope="module")
def houses(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, House]:
    folder = tmp_path_factory.mktemp("houses")
    return {dtype: make_house(folder / str(dtype), dtype) for dtype in (torch.float32, torch.bfloat16)}


@pytest.fixture
def house(houses: dict[torch.dtype, House]) -> House:
    return houses[torch.float32]


@pytest.fixture(params=[4, 13, 48, None], ids=lambda size: f"block-{size or 'whole'}")
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Tensors larger than a block; the whole-tensor block is the default one."""
    if request.param is not None:
        set_block(monkeypatch, request.param)
    size: int | None = request.param
    return size


def set_block(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(engine.task_vectors, "BLOCK", size)
    # A thread's buffers are made at its first use, of the size that holds then.
    monkeypatch.setattr(engine.task_vectors, "_scratch", threading.local())


def coefficients(name: str, chunks: int) -> TensorCoefficients:
    edges = chunk_edges(math.prod(SHAPES[name]), chunks)
    values = np.random.default_rng(chunks).uniform(0.1, 0.9, (2, len(edges) - 1)).astype(np.float32)
    return TensorCoefficients(edges, values)


def dense_merge(house: House, name: str, wanted: TensorCoefficients) -> Array:
    merged = house.base.read(name).double().numpy().copy()
    for k, tau in enumerate(house.dense[name]):
        if tau is not None:
            merged += np.repeat(wanted.values[k].astype(np.float64), np.diff(wanted.edges)).reshape(tau.shape) * tau
    return merged


def dense_products(house: House, name: str, gradient: Tensor, edges: tuple[int, ...]) -> Array:
    products = np.zeros((2, len(edges) - 1))
    for k, tau in enumerate(house.dense[name]):
        if tau is not None:
            elementwise = (gradient.double().numpy() * tau).reshape(-1)
            products[k] = [elementwise[start:stop].sum() for start, stop in pairwise(edges)]
    return products


@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("block_size")
def test_merged_tensors_are_the_dense_sum(
    houses: dict[torch.dtype, House], dtype: torch.dtype, name: str, chunks: int
) -> None:
    house, wanted = houses[dtype], coefficients(name, chunks)
    merged = merge_tensor(house.base.read(name), house.vectors(name), wanted, torch.float32)
    assert merged.dtype == torch.float32 and tuple(merged.shape) == SHAPES[name]
    np.testing.assert_allclose(merged.numpy(), dense_merge(house, name, wanted), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("block_size")
def test_inner_products_are_the_dense_ones_chunk_by_chunk(
    houses: dict[torch.dtype, House], dtype: torch.dtype, name: str, chunks: int
) -> None:
    house, edges = houses[dtype], coefficients(name, chunks).edges
    gradient = noise(SHAPES[name], 99, dtype)
    products = inner_products(gradient, house.base.read(name), house.vectors(name), edges)
    assert products.dtype == np.float64
    np.testing.assert_allclose(products, dense_products(house, name, gradient, edges), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("block_size")
def test_mean_magnitudes_are_the_dense_ones(houses: dict[torch.dtype, House], dtype: torch.dtype, name: str) -> None:
    house = houses[dtype]
    base_magnitude, magnitudes = mean_magnitudes(house.base.read(name), house.vectors(name))
    wanted = [0.0 if tau is None else np.abs(tau).mean() for tau in house.dense[name]]
    assert base_magnitude == pytest.approx(house.base.read(name).double().abs().mean().item(), rel=1e-5)
    np.testing.assert_allclose(magnitudes, wanted, rtol=1e-5)


def test_the_result_is_rounded_once_to_the_dtype_asked_for(house: House) -> None:
    wanted = coefficients("matrix", 3)
    arguments = house.base.read("matrix"), house.vectors("matrix"), wanted
    exact = merge_tensor(*arguments, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(merge_tensor(*arguments, dtype), exact.to(dtype))
    merged = house.task_vectors(dtype=torch.bfloat16).merge({"matrix": wanted})["matrix"]
    assert torch.equal(merged, exact.bfloat16())
    assert torch.equal(house.task_vectors().merge({"matrix": wanted}, torch.float16)["matrix"], exact.half())


def test_a_small_task_vector_is_not_lost_beside_a_large_base() -> None:
    base = torch.full((1000,), 1000.0)
    expert = base + 2.0**-13  # the last bit of a float32 near 1000
    gradient = torch.ones(1000)
    tau = FullVector(expert)
    assert inner_products(gradient, base, [tau], (0, 1000)).item() == 1000 * 2.0**-13
    assert mean_magnitudes(base, [tau])[1].item() == 2.0**-13


class FullVector:
    """The task vector of a full expert that lies in memory."""

    def __init__(self, expert_N: Tensor) -> None:
        self._expert_N = expert_N

    def block(self, start: int, stop: int, base_N: Tensor, out_N: Tensor) -> None:
        out_N.copy_(self._expert_N[start:stop] - base_N)


def test_tensors_without_a_task_vector_stay_the_base_s() -> None:
    base, wanted = noise((6, 5), 1), TensorCoefficients((0, 30), np.full((2, 1), 0.5, dtype=np.float32))
    assert torch.equal(merge_tensor(base, [None, None], wanted, torch.float32), base)
    np.testing.assert_array_equal(inner_products(noise((6, 5), 2), base, [None, None], (0, 30)), np.zeros((2, 1)))
    assert mean_magnitudes(base, [None, None])[1].tolist() == [0, 0]


def test_an_empty_tensor_is_merged_into_an_empty_tensor() -> None:
    base, vector = torch.empty(0, 3), FullVector(torch.empty(0))
    merged = merge_tensor(base, [vector], TensorCoefficients((0,), np.zeros((1, 0), dtype=np.float32)), torch.float32)
    assert tuple(merged.shape) == (0, 3)
    assert mean_magnitudes(base, [vector]) == (0.0, np.zeros(1))


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
    monkeypatch.setattr(engine.task_vectors, "BLOCK", 10)
    assert list(blocks(shape)) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("block_size")
def test_the_bits_depend_neither_on_threads_nor_on_what_else_is_asked_for(
    houses: dict[torch.dtype, House], dtype: torch.dtype
) -> None:
    house = houses[dtype]
    wanted = {name: coefficients(name, 3) for name in SHAPES}
    edges = {name: one.edges for name, one in wanted.items()}
    slopes = {name: noise(shape, 99) for name, shape in SHAPES.items()}

    def together(threads: int) -> tuple[dict[str, Tensor], dict[str, Array], dict[str, Array]]:
        task_vectors = house.task_vectors(threads)
        inspected = {name: one.magnitudes for name, one in task_vectors.inspect(SHAPES).items()}
        return task_vectors.merge(wanted), task_vectors.gradients(edges, slopes), inspected

    alone = house.task_vectors()
    for merged, products, magnitudes in (together(1), together(3)):
        assert list(merged) == list(products) == list(magnitudes) == list(SHAPES)
        for name in SHAPES:
            assert torch.equal(merged[name], alone.merge({name: wanted[name]})[name])
            one = alone.gradients({name: edges[name]}, {name: slopes[name]})[name]
            np.testing.assert_array_equal(products[name], one)
            np.testing.assert_array_equal(magnitudes[name], alone.inspect([name])[name].magnitudes)


def test_reading_changes_neither_the_files_nor_what_is_mapped(house: House) -> None:
    checkpoints = [house.base, *(expert.checkpoint for _, expert in house.experts)]  # type: ignore[attr-defined]
    files = sorted(house.folder.rglob("*.safetensors"))
    before = [file.read_bytes() for file in files]
    mapped = [{name: one.read(name).clone() for name in one.tensors} for one in checkpoints]
    task_vectors = house.task_vectors(threads=3)
    wanted = {name: coefficients(name, 2) for name in SHAPES}
    slopes = {name: noise(shape, 99) for name, shape in SHAPES.items()}
    kept = {name: slope.clone() for name, slope in slopes.items()}
    for _ in range(2):
        task_vectors.inspect(SHAPES)
        for merged in task_vectors.merge(wanted).values():
            merged.zero_()  # what is given away is the caller's
        task_vectors.gradients({name: one.edges for name, one in wanted.items()}, slopes)
    assert [file.read_bytes() for file in files] == before
    for checkpoint, tensors in zip(checkpoints, mapped, strict=True):
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    assert all(torch.equal(slopes[name], kept[name]) for name in slopes)


Spoil = Callable[[dict[str, dict[str, Tensor]]], None]


def inspect_spoiled(folder: Path, spoil: Spoil) -> dict[str, Array]:
    """Inspect a base, a full expert and an adapter after `spoil` has had its way with their tensors."""
    models = {
        "base": {"good": noise((4, 3), 1), "w": noise((6, 5), 2), "steps": torch.arange(4)},
        "math": {"good": noise((4, 3), 3), "w": noise((6, 5), 4), "steps": torch.arange(4)},
        "code": {"a": noise((2, 5), 5), "b": noise((6, 2), 6)},
    }
    spoil(models)
    checkpoints = {name: saved(folder / name, tensors) for name, tensors in models.items()}
    experts: list[tuple[str, Expert]] = [
        ("math", FullExpert(checkpoints["math"])),
        ("code", AdapterExpert(checkpoints["code"], {"w": LoraPair("a", "b", 1.0, False)})),
    ]
    found = TaskVectors(checkpoints["base"], experts, torch.float32, threads=2).inspect(["good", "w", "steps"])
    return {name: one.magnitudes for name, one in found.items()}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 17, -1])
@pytest.mark.parametrize(
    ("model", "tensor", "owner"), [("base", "w", "the base"), ("math", "w", "expert 'math'"), ("code", "a", "'code'")]
)
def test_a_weight_that_is_not_finite_is_named_with_tensor_and_model(
    tmp_path: Path, value: float, place: int, model: str, tensor: str, owner: str
) -> None:
    def spoil(models: dict[str, dict[str, Tensor]]) -> None:
        flat = models[model][tensor].view(-1)
        flat[place % len(flat)] = value

    with pytest.raises(CheckpointError) as caught:
        inspect_spoiled(tmp_path, spoil)
    assert "'w'" in caught.value.what and owner in caught.value.where


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("model", ["base", "math"])
def test_infinities_of_both_signs_do_not_hide_each_other(tmp_path: Path, model: str) -> None:
    def spoil(models: dict[str, dict[str, Tensor]]) -> None:
        models[model]["w"][0, 0], models[model]["w"][5, 4] = math.inf, -math.inf

    with pytest.raises(CheckpointError, match="'w' has a weight that is NaN or infinite"):
        inspect_spoiled(tmp_path, spoil)


def test_integers_are_not_checked_and_have_no_task_vector(tmp_path: Path) -> None:
    def spoil(models: dict[str, dict[str, Tensor]]) -> None:
        models["base"]["steps"] += torch.iinfo(torch.int64).max - 8
        models["math"]["steps"].fill_(torch.iinfo(torch.int64).min)

    assert inspect_spoiled(tmp_path, spoil)["steps"].tolist() == [0, 0]


def test_large_finite_weights_are_accepted(tmp_path: Path) -> None:
    def spoil(models: dict[str, dict[str, Tensor]]) -> None:
        # Some checkpoints keep their attention mask as a buffer of the lowest float.
        for model in ("base", "math"):
            models[model]["good"].fill_(torch.finfo(torch.float32).min)

    assert inspect_spoiled(tmp_path, spoil)["good"].tolist() == [0, 0]


def test_a_missing_tensor_raises_where_it_is_asked_for(house: House) -> None:
    with pytest.raises(KeyError, match="absent"):
        house.task_vectors().inspect(["absent"])


@pytest.fixture
def layout() -> Layout:
    numels = {name: math.prod(shape) for name, shape in SHAPES.items()}
    return Layout.make(numels, {"scalar": 1, "one": 0, "vector": 4, "matrix": 2, "wide": 3, "cube": 1})


@pytest.mark.usefixtures("block_size")
def test_local_shards_put_every_merged_tensor(house: House, layout: Layout) -> None:
    table = Coefficients(layout, np.random.default_rng(0).uniform(0, 1, (2, layout.width)))
    shards, received = LocalShards(house.task_vectors(threads=2)), dict[str, Tensor]()
    shards.merge(table, received.__setitem__)
    assert list(received) == list(SHAPES)
    for name, tensor in received.items():
        assert torch.equal(tensor, house.task_vectors().merge({name: table.of(name)})[name])
        np.testing.assert_allclose(tensor.numpy(), dense_merge(house, name, table.of(name)), rtol=1e-6, atol=2e-6)


@pytest.mark.usefixtures("block_size")
def test_local_shards_gather_the_gradients_in_the_layout_s_columns(house: House, layout: Layout) -> None:
    taken: list[str] = []

    def take(name: str) -> Tensor:
        taken.append(name)
        return noise(SHAPES[name], 99)

    shards = LocalShards(house.task_vectors(threads=2))
    gradients = shards.gradients(layout, take)
    assert gradients.shape == (2, layout.width)
    assert sorted(taken) == sorted(SHAPES)
    for name, edges in layout.edges_of.items():
        wanted = dense_products(house, name, noise(SHAPES[name], 99), edges)
        np.testing.assert_allclose(gradients[:, layout.columns[name]], wanted, rtol=1e-5, atol=1e-5)
    assert shards.traffic() == {"bytes_to_shards": 0, "bytes_from_shards": 0}


def test_the_gradient_is_that_of_the_merge(house: House, layout: Layout) -> None:
    """⟨G, θ(α + ε) − θ(α)⟩ = Σ ε · ∂L/∂α: the merge is linear, so the two streams must agree."""
    shards, generator = LocalShards(house.task_vectors()), np.random.default_rng(0)
    start = Coefficients(layout, generator.uniform(0.2, 0.8, (2, layout.width)))
    step = generator.uniform(-1, 1, (2, layout.width))
    slopes = {name: noise(shape, 99) for name, shape in SHAPES.items()}

    def loss(table: Coefficients) -> float:
        total: list[float] = []
        shards.merge(table, lambda name, tensor: total.append((tensor.double() * slopes[name]).sum().item()))
        return sum(total)

    moved = loss(Coefficients(layout, start.values + step)) - loss(start)
    assert moved == pytest.approx((shards.gradients(layout, slopes.__getitem__) * step).sum(), rel=1e-4)


@pytest.fixture(autouse=True)
def _threads_as_they_were() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads, "only the pool's own threads are set to one"
