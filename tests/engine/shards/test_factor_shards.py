"""Shards by factors: merges, gradients and coefficients as with dense task vectors, and what stays on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from conftest import plan_of
from errors import refused
from fake_cuda import Cuda, fake_cuda
from peft_adapters import adapters
from plain import Plain, Received, task_vectors
from safetensors.torch import load_file
from thorough import as_thorough
from torch import Tensor

from actors.shard import Shard
from actors.trainer import Step, Trainer, WindowSample
from engine.checkpoints.writer import OutputFile, OutputTensor
from engine.config.resources import Use
from engine.errors import ConfigError
from engine.learning.learner import LearnerState, Stage, second_stage
from engine.planning.factors import decomposed, directions, factor_bytes, factored
from engine.planning.plan import Plan
from engine.run.run_folder import RunFolder
from engine.shards.factor_shards import FactorShards
from engine.shards.local_shards import LocalShards
from engine.shards.orthogonal import orthogonalise, with_orthogonal
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder
from engine.task_vectors.coefficients import Array, ChunkLayout, Coefficients
from engine.task_vectors.kinds import Product
from engine.transfers import DoubleBuffer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads it
KINDS = ("orthogonal", "adapters")


def given(make_merge: Callable[..., Path], kind: str, *overrides: str, **options: object) -> Plan:
    """Return the plan of a merge whose task vectors have factors, with norms, which have none."""
    config = make_merge(exclude=[".*embed.*", ".*head.*"], **options)
    if kind == "adapters":
        adapters(config, 3)
    return plan_of(config, f"parameters.task_vectors={'orthogonal' if kind == 'orthogonal' else 'whole'}", *overrides)


@pytest.fixture(params=[(kind, dtype) for kind in KINDS for dtype in ("float32", "bfloat16")], ids="-".join)
def plan(request: pytest.FixtureRequest, make_merge: Callable[..., Path]) -> Plan:
    kind, dtype = request.param
    return given(make_merge, kind, experts=3, dtype=getattr(torch, dtype))


def shards(plan: Plan, folder: Path, use: Use) -> LocalShards | FactorShards:
    state, through = LocalFolder(folder / use), factored(plan, on_gpu=False, use=use)
    orthogonalise(plan, task_vectors(plan), state, decomposed(plan), through)
    rest = LocalShards(plan, 1, overlap=False, state=state, names=plan.merged_set.difference(through))
    return FactorShards(plan, through, rest, state) if through else rest


def table_of(plan: Plan) -> Coefficients:
    layout = ChunkLayout.make(plan.numels, {name: i % 4 for i, name in enumerate(plan.merged)}, directions(plan))
    return Coefficients(layout, np.random.default_rng(0).uniform(0.1, 0.9, (len(plan.experts), layout.width)))


def gradient(shards: LocalShards | FactorShards, plan: Plan, layout: ChunkLayout, times: int = 1) -> Array:
    generator, leaving = torch.Generator().manual_seed(0), shards.gradients(layout)
    for name in plan.merged:
        shape = plan.base_header.tensors[name].shape
        for _ in range(times):
            leaving.send(name, torch.randn(shape, generator=generator).to(getattr(torch, plan.dtype)))
    return leaving.collect()


def test_merges_and_gradients_are_those_of_dense_task_vectors(plan: Plan, tmp_path: Path) -> None:
    table, merged, gradients = table_of(plan), {}, {}
    for use in ("always", "never"):
        ours, received = shards(plan, tmp_path, use), Received(plan)
        merged[use] = received.all_of(ours.merge(table, received))
        gradients[use] = gradient(ours, plan, table.layout)
        assert ours.traffic() == {"bytes_to_shards": 0, "bytes_from_shards": 0}
    through = factored(plan, on_gpu=False, use="always")
    assert 0 < len(through) < len(plan.merged)
    error = {"float32": 1e-6, "bfloat16": 2e-2}[plan.dtype]
    streams = task_vectors(plan)
    for name in plan.merged:
        change, wanted = (merged[use][name].float() - streams.base.read(name).reshape(-1).float() for use in merged)
        assert (change - wanted).norm() <= error * max(float(wanted.norm()), 1e-3), name
    found, exact = gradients["always"], gradients["never"]
    assert np.linalg.norm(found - exact) <= error * np.linalg.norm(exact)


def test_sums_of_all_matrices_are_read_at_once(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, moved, cpu = shards(plan, tmp_path, "always"), [], Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: (moved.append(tensor.shape), cpu(tensor))[1])
    assert gradient(ours, plan, table_of(plan).layout).any()
    assert len(moved) == 1


def test_gradients_sent_several_times_add_up(plan: Plan, tmp_path: Path) -> None:
    layout, ours = table_of(plan).layout, shards(plan, tmp_path, "always")
    generator, leaving = torch.Generator().manual_seed(0), ours.gradients(layout)
    name = factored(plan, on_gpu=False, use="always")[0]
    slopes = [torch.randn(plan.base_header.tensors[name].shape, generator=generator) for _ in range(3)]
    for slope in slopes:
        leaving.send(name, slope)
    each = []
    for slope in slopes:
        alone = ours.gradients(layout)
        alone.send(name, slope)
        each.append(alone.collect())
    np.testing.assert_array_equal(leaving.collect(), each[0] + each[1] + each[2])


@pytest.mark.parametrize("kind", KINDS)
def test_learned_coefficients_are_those_of_dense_task_vectors(
    make_merge: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    config = make_merge(experts=2, samples=(2, 2), parameters={"budget": 2.0, "epochs": 2})
    if kind == "adapters":
        adapters(config, 2)
    plan = plan_of(config, f"parameters.task_vectors={'orthogonal' if kind == 'orthogonal' else 'whole'}")
    found, wanted = (Plain(plan, tmp_path / use, use).run() for use in ("always", "never"))
    for one, other in zip(found, wanted, strict=True):
        assert one.layout == other.layout
        np.testing.assert_allclose(one.values, other.values, rtol=0, atol=1e-6)


def test_factors_that_fit_stay_on_the_device_and_others_are_copied_for_each_use(
    make_merge: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is torch's `meta`, which has no memory and no values; the rest is as on a GPU."""
    plan, device = plan_of(make_merge(experts=2), "parameters.task_vectors=orthogonal"), torch.device("meta")
    ours, cuda = shards(plan, tmp_path, "always"), fake_cuda(monkeypatch)
    assert isinstance(ours, FactorShards)
    pinned: list[int] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor.nbytes) or tensor)
    first, *others = plan.merged

    def size(name: str) -> int:
        return factor_bytes(plan, [name]) + 4 * plan.numels[name]

    # What is copied for each use has two places on the device, each for the largest with its parts aligned.
    places = 2 * (max(map(size, plan.merged)) + 3 * 256)
    free = [10_000_000 + size(first) + places]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free[0], 80_000_000_000))
    ours.room = 10_000_000
    for name in (first, first, *others, *others):
        base, factors = ours.on(device, name)
        assert base.device == factors.left_mR.device == factors.right_Rn.device == device
        if name == first:
            free[0] = 10_000_000
    assert sum(pinned) == sum(map(size, others)), "each was pinned once, at its first use"
    received = Received(plan)
    received.tensors = {name: tensor.to(device) for name, tensor in received.tensors.items()}
    before = len(cuda.copies[device].work)
    ours.merge(table_of(plan), received)
    assert sum(pinned) == sum(map(size, others))
    assert len(cuda.copies[device].work) - before == 2 * 3 * len(others), "each is copied once, after what it waits for"


class Multiplied:
    """The work that a buffer's groups are for: a product that is computed when its stream gets to it."""

    def __init__(self, buffer: DoubleBuffer, cuda: Cuda) -> None:
        self.buffer, self.found = buffer, list[float]()
        self.stream = cuda.late_stream(torch.device("cpu"))

    def queue(self, key: int, group: list[Tensor], following: tuple[int, list[Tensor]]) -> None:
        one, other = self.buffer.get(key, group, following)
        self.stream.add(lambda: self.found.append(float((one * other).sum())))


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 3, 2, 1, 0] * 2, [0, 2, 1, 3, 0, 0, 1], [3] * 4], ids=str)
def test_the_next_group_is_copied_while_a_product_reads_another(
    monkeypatch: pytest.MonkeyPatch, order: list[int]
) -> None:
    cuda = fake_cuda(monkeypatch)
    groups = [[torch.full((3, 2), float(number + 1)), torch.ones(3, 2)] for number in range(4)]
    products = Multiplied(DoubleBuffer(torch.device("cpu"), DoubleBuffer.nbytes([24, 24])), cuda)
    for number, key in enumerate(order):
        following = min(key + 1, 3) if number < len(order) // 2 else max(key - 1, 0)
        products.queue(key, groups[key], (following, groups[following]))
    copies = cuda.copies[torch.device("cpu")]
    assert not products.found, "nothing has waited"
    products.stream.run(len(products.stream.work))
    copies.run(len(copies.work))
    assert products.found == [6.0 * (key + 1) for key in order]


def test_in_the_order_of_use_a_product_waits_for_no_later_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = fake_cuda(monkeypatch)
    groups = [[torch.full((3, 2), float(number + 1)), torch.ones(3, 2)] for number in range(4)]
    products = Multiplied(DoubleBuffer(torch.device("cpu"), DoubleBuffer.nbytes([24, 24])), cuda)
    copies = cuda.copies
    for key in range(3):
        products.queue(key, groups[key], (key + 1, groups[key + 1]))
        products.stream.run(len(products.stream.work))
        (stream,) = copies.values()
        assert products.found[-1] == 6.0 * (key + 1) and stream.left() == 2 * 2, "the next copies are under way"


@pytest.fixture(params=[(kind, dtype) for kind in KINDS for dtype in ("float32", "bfloat16")], ids="-".join)
def along(request: pytest.FixtureRequest, make_merge: Callable[..., Path]) -> Plan:
    """A plan whose matrices have chunks of singular directions."""
    kind, dtype = request.param
    return given(make_merge, kind, "parameters.chunks=spectral", experts=3, dtype=getattr(torch, dtype))


def directions_of(plan: Plan, folder: Path, name: str) -> list[tuple[Array, Array]]:
    """Return the factors of each expert's stored directions in float64, with no columns for one that has none."""
    streams = with_orthogonal(plan, task_vectors(plan), LocalFolder(folder / "auto"))
    found = []
    for product, shape in ((one, plan.base_header.tensors[name].shape) for one in streams.of(name)):
        assert product is None or isinstance(product, Product)
        factors = (
            (torch.zeros(shape[0], 0), torch.zeros(0, shape[1])) if product is None else (product.left, product.right)
        )
        found.append((factors[0].double().numpy(), factors[1].double().numpy()))
    return found


def test_directions_are_singular_and_in_the_order_of_their_values(along: Plan, tmp_path: Path) -> None:
    shards(along, tmp_path, "auto")
    counts, error = directions(along), {"float32": 1e-5, "bfloat16": 2e-2}[along.dtype]
    assert counts and set(counts) < along.merged_set
    for name, count in counts.items():
        ranks = [left.shape[1] for left, _ in directions_of(along, tmp_path, name)]
        assert max(ranks) == count
        for left, right in directions_of(along, tmp_path, name):
            values = np.linalg.norm(left, axis=0)
            assert (np.diff(values) <= error * values[:-1]).all()
            for side in (left / values, right.T):
                np.testing.assert_allclose(side.T @ side, np.eye(len(values)), rtol=0, atol=error)
            np.testing.assert_allclose(np.linalg.svd(left @ right)[1][: len(values)], values, rtol=2 * error)
    if not along.orthogonal:
        assert len(set(ranks)) > 1, "adapters of different ranks"
        streams = task_vectors(along)
        for (left, right), own in zip(directions_of(along, tmp_path, name), streams.of(name), strict=True):
            assert isinstance(own, Product)
            tau = (own.left @ own.right).double().numpy()
            assert np.linalg.norm(left @ right - tau) <= error * np.linalg.norm(tau)


def test_merges_gradients_and_output_are_the_sums_over_directions(along: Plan, tmp_path: Path) -> None:
    table, ours, received = table_of(along), shards(along, tmp_path, "auto"), Received(along)
    assert table.layout.spectral == set(directions(along))
    merged, found = received.all_of(ours.merge(table, received)), gradient(ours, along, table.layout)
    writer, entries = Shard(along, 0, LocalFolder(tmp_path / "auto")), []
    for name in along.merged:
        shape = along.base_header.tensors[name].shape
        entries.append(OutputTensor(name, shape, "F32", 4 * along.numels[name]))
    wanted = {name: table.of(name) for name in along.merged}
    writer.write(LocalFolder(tmp_path), OutputFile("model.safetensors", tuple(entries)), wanted)
    written, generator = load_file(tmp_path / "model.safetensors"), torch.Generator().manual_seed(0)
    error, streams = {"float32": 1e-5, "bfloat16": 2e-2}[along.dtype], task_vectors(along)
    for name in along.merged:
        shape = along.base_header.tensors[name].shape
        slope = torch.randn(shape, generator=generator).to(getattr(torch, along.dtype)).double().numpy()
        if name not in table.layout.spectral:
            continue
        columns, change = table.layout.columns[name], np.zeros(shape)
        exact = np.zeros(found[:, columns].shape)
        for k, (left, right) in enumerate(directions_of(along, tmp_path, name)):
            for s, (a, b) in enumerate(pairwise(table.of(name).edges)):
                change += table.values[k, columns][s] * (left[:, a:b] @ right[a:b])
                exact[k, s] = (slope * (left[:, a:b] @ right[a:b])).sum()
        base = streams.base.read(name).double().numpy()
        in_trainer = merged[name].double().numpy().reshape(shape) - base
        in_output = written[name].double().numpy() - base
        assert np.linalg.norm(in_trainer - change) <= error * np.linalg.norm(change)
        assert np.linalg.norm(in_output - change) <= 1e-5 * np.linalg.norm(change)
        assert np.linalg.norm(found[:, columns] - exact) <= error * np.linalg.norm(exact)


@pytest.mark.parametrize("chunks", ["spectral", as_thorough("direction")])
@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_of_directions_are_learned_and_go_on_from_any_step(
    make_merge: Callable[..., Path], tmp_path: Path, kind: str, chunks: str
) -> None:
    parameters = {"budget": 2.0, "epochs": 2, "regularization": 0.0, "weight_decay": 0.0}
    plan = given(make_merge, kind, f"parameters.chunks={chunks}", experts=3, samples=(2, 2, 2), parameters=parameters)
    plain = Plain(plan, tmp_path)
    first, table = plain.run()
    counts, layout = directions(plan), table.layout
    assert isinstance(plain.shards, FactorShards)
    assert first.layout.spectral == frozenset() and layout.spectral == set(counts)
    stage, moved = second_stage(plan, layout, first), table.values
    start = stage.start
    several = []
    for name, count in counts.items():
        columns, edges = layout.columns[name], layout.edges_of[name]
        assert edges[-1] == count
        if not layout.learned[layout.tensors.index(name)]:
            continue
        several += [name] if len(edges) > 2 else []
        assert chunks == "spectral" or edges == tuple(range(count + 1))
        for k, rank in enumerate(plain.shards.on(torch.device("cpu"), name)[1].ranks):
            used = np.array(edges[:-1]) < rank
            assert (moved[k, columns][used] != start[k, columns][used]).all()
            np.testing.assert_allclose(moved[k, columns][~used], start[k, columns][~used], rtol=1e-12)
    assert several
    plain.trainer = cast(Trainer, Restarted(plan, RunFolder(str(tmp_path / "plain")).state))
    assert plain.learn(stage).same_as(table)


class Restarted:
    """A trainer that is started anew, with new shards, for every step."""

    def __init__(self, plan: Plan, state: Folder) -> None:
        self.plan, self.state = plan, state

    def step(
        self, stage: Stage, state: LearnerState | None, number: int, window: Sequence[WindowSample], others: object
    ) -> Step:
        through = factored(self.plan, on_gpu=False, use="auto")
        names = self.plan.merged_set.difference(through)
        rest = LocalShards(self.plan, 1, overlap=False, state=self.state, names=names)
        ours = FactorShards(self.plan, through, rest, self.state)
        return Trainer(self.plan, ours, lambda target: target).step(stage, state, number, window)


@pytest.mark.parametrize(
    ("kind", "overrides", "where", "do"),
    [
        ("orthogonal", ["cluster.factors=never"], "cluster.factors", "cluster.factors"),
        ("checkpoints", ["parameters.task_vectors=whole"], "parameters.chunks", "task_vectors: orthogonal"),
        ("orthogonal", ["exclude=['.*proj.*', '.*embed.*', '.*head.*']"], "parameters.chunks", "chunks: contiguous"),
    ],
)
def test_directions_that_no_tensor_has_are_refused(
    llama_merge: Path, kind: str, overrides: list[str], where: str, do: str
) -> None:
    given = [f"parameters.task_vectors={'orthogonal' if kind == 'orthogonal' else 'whole'}", *overrides]
    for chunks in ("spectral", "direction"):
        with refused(ConfigError, where=where, do=do, facts=[chunks]):
            plan_of(llama_merge, *given, f"parameters.chunks={chunks}")
    plan_of(llama_merge, *given, "parameters.chunks=spectral", "merge_method=expert_merging")
    plan_of(llama_merge, *given, "parameters.chunks=contiguous")


def test_matrices_with_directions_are_merged_through_factors_on_any_device(llama_merge: Path) -> None:
    plan = plan_of(llama_merge, "parameters.task_vectors=orthogonal", "parameters.chunks=spectral")
    assert set(factored(plan, on_gpu=False, use="auto")) == set(directions(plan)) == plan.orthogonal_set
    assert directions(plan_of(llama_merge, "parameters.task_vectors=orthogonal")) == {}
