"""The selection of the largest elements by counting, compared with numpy's stable sort."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import cut_small
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from torch import Tensor

import engine.methods.arithmetic.tensor
from engine.methods.arithmetic.selection import ALL, NONE, Counts, Threshold, select
from engine.methods.arithmetic.sparse import EXPERTS_PER_PASS, Trimmed, counts, kept_of
from engine.methods.arithmetic.tensor import MergeTensor
from engine.task_vectors.experts import FullExpert
from engine.task_vectors.kinds import TaskVector
from engine.task_vectors.pieces import pieces

Array = npt.NDArray[np.float32]
# The smallest positive float32, a denormal.
DENORMAL = float(np.float32(1e-45))
FEW = (0.0, -0.0, 1.0, -1.0, 0.5, DENORMAL, -DENORMAL, 3e-39, 1.0 + 2**-23, -1.0 - 2**-23, 3.4e38)

pytestmark = pytest.mark.usefixtures("one_thread")

# No deadline: the first example may compile the kernels.
given_any = settings(deadline=None)


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


class Given:
    """A task vector with the given elements."""

    minus_base = False

    def __init__(self, tau_N: Array) -> None:
        self._tau_N = torch.from_numpy(tau_N.copy())

    def operand(self, start: int, stop: int, buffer_N: Tensor) -> Array:
        raise AssertionError("only blocks are read here")

    def block(self, start: int, stop: int, base_N: Tensor, out_N: Tensor) -> None:
        out_N.copy_(self._tau_N[start:stop])


def tensor_of(taus: Sequence[Array | None], pool: Executor, shape: tuple[int, ...] | None = None) -> MergeTensor:
    numel = next(len(tau) for tau in taus if tau is not None)
    vectors: list[TaskVector | None] = [None if tau is None else Given(tau) for tau in taus]
    return MergeTensor(
        name="tensor",
        shape=shape or (numel,),
        base=torch.zeros(shape or (numel,)),
        models=tuple(f"expert{k}" for k in range(len(taus))),
        task_vectors=vectors,
        values={},
        own=[{} for _ in taus],
        base_values=None,
        seed=0,
        pool=pool,
        threads=2,
        experts_in_all=len(taus),
    )


def sorted_out(tau: Array, keep: int | None) -> Array:
    """Return the task vector with only its `keep` largest elements by magnitude, of equal ones the first."""
    if keep is None:
        return tau
    order = np.argsort(-np.abs(tau), kind="stable")[:keep]
    kept = np.zeros_like(tau)
    kept[order] = tau[order]
    return kept


def trimmed(tensor: MergeTensor, densities: Sequence[float]) -> list[Array]:
    """Apply `Trimmed` to each task vector, piece by piece and block by block."""
    sparse, experts = Trimmed.within(tensor, densities), range(len(densities))
    found = np.full((len(densities), tensor.numel), np.nan, dtype=np.float32)
    # Not in the order of the tensor, since threads process pieces in any order.
    for piece in reversed(list(pieces(tensor.name, tensor.shape))):
        state = sparse.state(piece)
        for start, stop, _, tau_KB in tensor.blocks(piece, experts):
            for k in experts:
                sparse.apply(k, start, tau_KB[k], state)
            found[:, start:stop] = tau_KB
    return list(found)


def assert_sorted_out(found: Array, tau: Array, keep: int | None) -> None:
    expected = sorted_out(tau, keep)
    # Zeros of either sign are equal, whether kept or dropped.
    np.testing.assert_array_equal(found, expected)
    nonzero = np.count_nonzero(tau)
    assert np.count_nonzero(found) == (nonzero if keep is None else min(keep, nonzero))


def vectors(least: int = 1, most: int = 60) -> st.SearchStrategy[Array]:
    """Vectors with many equal values, or of any finite numbers, including denormal ones."""
    return st.one_of(
        hypothesis_numpy.arrays(np.float32, st.integers(least, most), elements=st.sampled_from(FEW).map(np.float32)),
        hypothesis_numpy.arrays(
            np.float32, st.integers(least, most), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
        ),
    )


densities = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-9, 0.25, 0.5, 1.0]))


def count_of(taus: Sequence[Array]) -> object:
    """Return the `count` argument of `select`, implemented in numpy."""

    def count(high: Counts | None) -> Counts:
        bits = [np.abs(tau).view(np.uint32) for tau in taus]
        if high is None:
            return np.stack([np.bincount(some >> 16, minlength=1 << 15) for some in bits])
        return np.stack(
            [
                np.bincount(some[some >> 16 == upper] & 0xFFFF, minlength=1 << 16)
                for some, upper in zip(bits, high, strict=True)
            ]
        )

    return count


@given_any
@given(tau=vectors(), data=st.data())
def test_select_finds_the_smallest_kept_element(tau: Array, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, len(tau)))
    (found,) = select(count_of([tau]), [keep])  # type: ignore[arg-type]
    magnitudes = np.abs(tau)
    least = np.sort(magnitudes)[::-1][keep - 1]
    above, equal = int((magnitudes > least).sum()), int((magnitudes == least).sum())
    assert found == Threshold(int(least.view(np.uint32)), keep - above, equal)
    assert 1 <= found.equal <= found.found


@pytest.mark.thorough
@given_any
@given(taus=st.lists(vectors(8, 8), min_size=1, max_size=4), data=st.data())
def test_select_tells_experts_apart(taus: list[Array], data: st.DataObject) -> None:
    keep = data.draw(st.lists(st.one_of(st.none(), st.integers(0, 8)), min_size=len(taus), max_size=len(taus)))
    together = select(count_of(taus), keep)  # type: ignore[arg-type]
    for tau, kept, found in zip(taus, keep, together, strict=True):
        if kept:
            assert [found] == select(count_of([tau]), [kept])  # type: ignore[arg-type]
        else:
            assert found == Threshold(ALL if kept is None else NONE, 0, 0)


@given_any
@given(density=densities, numel=st.integers(1, 1 << 40))
def test_density_keeps_at_least_one_and_rounds_down(density: float, numel: int) -> None:
    expected = None if density == 1 else 0 if density == 0 else max(1, math.floor(density * numel))
    assert kept_of(density, numel) == expected


@given_any
@given(taus=st.lists(vectors(23, 23), min_size=1, max_size=4), data=st.data())
def test_trimmed_keeps_the_largest_and_of_equal_ones_the_first(
    taus: list[Array], data: st.DataObject, pool: Executor
) -> None:
    wanted = data.draw(st.lists(densities, min_size=len(taus), max_size=len(taus)))
    for found, tau, density in zip(trimmed(tensor_of(taus, pool), wanted), taus, wanted, strict=True):
        assert_sorted_out(found, tau, kept_of(density, len(tau)))


@pytest.mark.thorough
@given_any
@given(
    taus=st.lists(vectors(60, 60), min_size=1, max_size=3),
    data=st.data(),
    block=st.integers(1, 16),
    blocks_of_a_piece=st.integers(1, 4),
    room=st.sampled_from([1, 2, 3, 7, 16, 64]),
    shape=st.sampled_from([(60,), (6, 10), (20, 3), (2, 5, 6), (60, 1)]),
)
def test_trimmed_over_pieces_and_blocks(
    taus: list[Array],
    data: st.DataObject,
    block: int,
    blocks_of_a_piece: int,
    room: int,
    shape: tuple[int, ...],
    pool: Executor,
) -> None:
    """Equal elements in several pieces: the number that each piece may keep is known before trimming."""
    wanted = data.draw(st.lists(densities, min_size=len(taus), max_size=len(taus)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        cut_small(monkeypatch, block, block * blocks_of_a_piece)
        monkeypatch.setattr(engine.methods.arithmetic.tensor, "ROOM", room)
        monkeypatch.setattr(engine.methods.arithmetic.tensor, "SMALLEST_BLOCK", 1)
        tensor = tensor_of(taus, pool, shape)
        assert len(list(pieces("tensor", shape))) == -(-60 // next(pieces("tensor", shape)).numel)
        results = trimmed(tensor, wanted)
    for found, tau, density in zip(results, taus, wanted, strict=True):
        assert_sorted_out(found, tau, kept_of(density, len(tau)))


@pytest.mark.parametrize("experts", [1, EXPERTS_PER_PASS, EXPERTS_PER_PASS + 1, 2 * EXPERTS_PER_PASS + 3])
def test_experts_are_counted_a_few_at_a_time(experts: int, pool: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch, 10, 30)
    generator = np.random.default_rng(experts)
    taus = [generator.integers(-3, 4, 100).astype(np.float32) for _ in range(experts)]
    tensor = tensor_of(taus, pool)
    wanted = list(generator.uniform(0.05, 0.95, experts))
    for found, tau, density in zip(trimmed(tensor, wanted), taus, wanted, strict=True):
        assert_sorted_out(found, tau, kept_of(density, 100))
    assert counts(tensor, None).sum(axis=1).tolist() == [100] * experts


def test_an_expert_without_the_tensor_counts_as_zeros(pool: Executor) -> None:
    tau = np.array([3, -1, 2, 0], dtype=np.float32)
    found = trimmed(tensor_of([None, tau], pool), [0.5, 0.5])
    assert found[0].tolist() == [0, 0, 0, 0] and found[1].tolist() == [3, 0, 2, 0]


@given_any
@given(tau=vectors(), density=st.floats(0.01, 0.99))
def test_thresholds_of_the_whole_model_keep_all_that_are_equal(tau: Array, density: float, pool: Executor) -> None:
    keep = kept_of(density, len(tau))
    tensor = tensor_of([tau], pool)
    found = tau.copy()
    sparse = Trimmed.everywhere(select(lambda high: counts(tensor, high), [keep]))
    (piece,) = pieces("tensor", tensor.shape)
    sparse.apply(0, 0, found, sparse.state(piece))
    assert keep is not None
    least = np.sort(np.abs(tau))[::-1][keep - 1]
    np.testing.assert_array_equal(found, np.where(np.abs(tau) >= least, tau, 0))


@given_any
@given(data=st.data(), parts=st.integers(2, 4))
def test_counts_of_parts_add_up(data: st.DataObject, parts: int, pool: Executor) -> None:
    """The driver sums counts over tensors and shards."""
    taus = data.draw(st.lists(vectors(1, 20), min_size=parts, max_size=parts))
    keep = data.draw(st.integers(1, sum(map(len, taus))))
    tensors = [tensor_of([tau], pool) for tau in taus]

    def count(high: Counts | None) -> Counts:
        return np.sum([counts(tensor, high) for tensor in tensors], axis=0)

    assert select(count, [keep]) == select(count_of([np.concatenate(taus)]), [keep])  # type: ignore[arg-type]


@pytest.mark.parametrize("numel", [1, 4096, 250_001])
@pytest.mark.parametrize("density", [1e-6, 0.1, 0.5, 0.9999])
def test_trimmed_of_real_files(numel: int, density: float, pool: Executor) -> None:
    """Differences of bfloat16 weights have many equal magnitudes."""
    generator = torch.Generator().manual_seed(numel)
    base = torch.randn(numel, generator=generator).bfloat16()
    expert = (base.float() + 0.05 * torch.randn(numel, generator=generator)).bfloat16()
    tau = (expert.float() - base.float()).numpy()
    checkpoint = type("Checkpoint", (), {"read": lambda self, name: expert})()
    tensor = tensor_of([tau], pool)
    vector = FullExpert(checkpoint).task_vector("tensor")  # type: ignore[arg-type]
    read = MergeTensor(**{**vars(tensor), "base": base, "task_vectors": [vector]})
    (found,) = trimmed(read, [density])
    assert_sorted_out(found, tau, kept_of(density, numel))
