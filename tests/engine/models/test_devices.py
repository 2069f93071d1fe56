"""A model on several devices: the device map, and the same bits with and without hooks. All devices are one CPU."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import tiny
import torch
from conftest import plan_of
from errors import refused
from fake_cuda import Cuda, fake_cuda
from fake_gpus import FakeGpus
from peft_adapters import adapters

from actors.expert import Expert
from actors.trainer import Trainer, WindowSample
from engine.calibration.samples import Sample
from engine.checkpoints.adapters import AdapterHeader
from engine.codec import pack_all
from engine.errors import ClusterError
from engine.learning.frozen_expert import FrozenExpert
from engine.learning.learner import first_stage
from engine.learning.targets import load_target
from engine.models import skeleton
from engine.models.devices import DeviceMap, Room, device_map, device_of
from engine.models.loading import load_model_config
from engine.models.skeleton import build_skeleton, load_weights
from engine.planning.open_models import open_base
from engine.planning.plan import Plan
from engine.shards.local_shards import LocalShards
from engine.sizes import FILLED
from engine.storage.local_folder import LocalFolder

CPU = torch.device("cpu")
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "model.rotary_emb")


@pytest.fixture(scope="module")
def plan(llama_merge: Path) -> Plan:
    return plan_of(llama_merge, "gradient_checkpointing=true")


def test_with_one_device_the_map_has_one_entry(plan: Plan) -> None:
    model, _ = build_skeleton(
        load_model_config(open_base(plan).folder), plan.base_header.tensors, torch.float32, open_base(plan).folder
    )
    assert device_map(model, torch.float32, CPU) == {"": CPU}


def test_the_gpus_of_a_seat_get_whole_blocks_each(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    model, places = build_skeleton(
        load_model_config(open_base(plan).folder), plan.base_header.tensors, torch.float32, open_base(plan).folder
    )
    partners = [place.parameter for place in places.values()]
    gpus = FakeGpus(monkeypatch, 8, free=100_000)
    seat = torch.device("cuda", 2), torch.device("cuda", 5)
    devices = device_map(model, torch.float32, seat[0], Room(seat[1:]))
    assert {device_of(partner, devices) for partner in partners} == {*seat}
    assert device_of("model.embed_tokens.weight", devices) == seat[0]
    for block in range(3):
        inside = [p for p in partners if p.startswith(f"model.layers.{block}.")]
        assert len({device_of(partner, devices) for partner in inside}) == 1
    gpus.free[2] = gpus.free[5] = 100
    with refused(ClusterError, do="`cluster.trainer.num_gpus`", facts=["2 GPUs"]):
        device_map(model, torch.float32, seat[0], Room(seat[1:]))


def test_gradients_activations_and_logits_take_their_room(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    model, places = build_skeleton(
        load_model_config(open_base(plan).folder), plan.base_header.tensors, torch.float32, open_base(plan).folder
    )
    weights = {place.parameter: plan.base_header.tensors[name].nbytes for name, place in places.items()}
    gradients = frozenset(places[name].parameter for name in plan.merged)
    total = sum(nbytes * (2 if name in gradients else 1) for name, nbytes in weights.items())
    FakeGpus(monkeypatch, 2, free=total)
    seat = torch.device("cuda", 0), torch.device("cuda", 1)
    room = Room(seat[1:], gradients)

    def used(room: Room) -> set[torch.device]:
        devices = device_map(model, torch.float32, seat[0], room)
        return {device_of(name, devices) for name in weights}

    assert used(room) == {*seat}
    beyond = (2 * FILLED - 1) * total + 1000
    for lacking in (replace(room, activations=beyond), replace(room, logits=beyond)):
        with refused(ClusterError, do="num_gpus"):
            used(lacking)
    FakeGpus(monkeypatch, 2, free=(sum(weights.values()) + total) / 4 / FILLED)
    assert used(replace(room, gradients=frozenset())) == {*seat}
    with refused(ClusterError, do="num_gpus"):
        used(room)


def test_a_model_of_one_device_stays_there_whatever_else_is_visible(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeGpus(monkeypatch, 8)
    model, _ = build_skeleton(
        load_model_config(open_base(plan).folder), plan.base_header.tensors, torch.float32, open_base(plan).folder
    )
    assert device_map(model, torch.float32, torch.device("cuda", 3)) == {"": torch.device("cuda", 3)}


@pytest.mark.parametrize("parts", [None, dict.fromkeys((*PARTS, "lm_head"), CPU)], ids=["one", "several"])
def test_an_expert_is_freed_when_the_next_one_is_loaded(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, parts: DeviceMap | None
) -> None:
    """At once, and not when Python collects cycles: memory never holds two experts."""
    if parts is not None:
        monkeypatch.setattr("engine.models.skeleton.device_map", lambda *args: parts)
    expert, folder = Expert(plan, 0), LocalFolder(tmp_path)
    expert.target(Sample(0, 0, (5, 9, 11, 3), "here"), folder, "0")
    assert expert._held is not None
    weights = [weakref.ref(parameter) for parameter in expert._held[1].model.parameters()]
    load, alive = skeleton.load_weights, []

    def watched(*args: Any) -> None:
        alive.append(sum(weight() is not None for weight in weights))
        load(*args)

    monkeypatch.setattr("engine.learning.frozen_expert.load_weights", watched)
    monkeypatch.setattr(gc, "collect", lambda: 0)
    expert.target(Sample(1, 0, (5, 9, 11, 3), "here"), folder, "1")
    assert alive == [0]
    again = FrozenExpert(plan, 1, CPU).target(Sample(1, 0, (5, 9, 11, 3), "here"))
    assert torch.equal(load_target(folder, "1").input_ids_T, again.input_ids_T)


def test_unused_gpu_memory_is_given_back(plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeGpus(monkeypatch, 1)
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    expert = Expert(plan, 0)
    for k in range(2):
        expert.target(Sample(k, 0, (5, 9, 11, 3), "here"), LocalFolder(tmp_path), str(k))
    assert len(emptied) == 2, "before each of the experts"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """The CPU is taken for a GPU that weights are copied to."""
    cuda = fake_cuda(monkeypatch, buffers=3, nbytes=64)
    monkeypatch.setattr("engine.transfers.BUFFER", 64)
    monkeypatch.setattr("engine.transfers.on_gpu", lambda tensor: False)
    for module in ("engine.transfers", "engine.models.skeleton", "engine.learning.frozen_expert"):
        monkeypatch.setattr(f"{module}.is_gpu", lambda device: True)
    return cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_several_threads_read_the_weights_for_a_gpu(
    tmp_path: Path, request: pytest.FixtureRequest, family: str, dtype: torch.dtype
) -> None:
    plan = plan_of(tiny.make_merge(tmp_path / "merge", family))
    base, readers = open_base(plan), set[str]()

    def read(name: str) -> torch.Tensor:
        readers.add(threading.current_thread().name.partition("_")[0])
        return base.read(name)

    def loaded() -> dict[str, torch.Tensor]:
        config = load_model_config(base.folder)
        model, places = build_skeleton(config, plan.base_header.tensors, dtype, base.folder)
        load_weights(model, places, dtype, CPU, base.folder, read)
        return dict(model.state_dict())

    wanted = loaded()
    assert readers == {threading.current_thread().name}
    readers.clear()
    cuda: Cuda = request.getfixturevalue("gpu")
    found = loaded()
    assert readers == {"weights"} and len(cuda.pinned) <= 3
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == one.dtype and torch.equal(found[name], one) for name, one in wanted.items())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads it
def test_an_adapter_s_factors_are_multiplied_on_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    config = tiny.make_merge(tmp_path / "merge")
    adapters(config, 2)
    plan, products, addmm = plan_of(config), [], torch.addmm
    wanted = FrozenExpert(plan, 0, CPU).model.state_dict()
    request.getfixturevalue("gpu")
    monkeypatch.setattr(torch, "addmm", lambda *given: products.append(given) or addmm(*given))
    found = FrozenExpert(plan, 0, CPU).model.state_dict()
    header = plan.experts[0].header
    assert isinstance(header, AdapterHeader) and len(products) == len(header.pairs) > 0
    for name, one in wanted.items():
        torch.testing.assert_close(found[name], one, rtol=1e-5, atol=1e-6)


def test_several_devices_give_the_same_target_and_the_same_step(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sample(0, 0, (5, 9, 11, 3), "here")
    dispatched = []
    dispatch = accelerate.dispatch_model
    monkeypatch.setattr(accelerate, "dispatch_model", lambda *a, **k: (dispatched.append(1), dispatch(*a, **k)))

    def computed() -> tuple[dict[str, torch.Tensor], object]:
        target = FrozenExpert(plan, 0, CPU).target(sample).tensors()
        trainer = Trainer(plan, LocalShards(plan, threads=1, overlap=False), lambda packed: packed)
        window = [WindowSample(sample, pack_all(target))]
        first = trainer.step(first_stage(plan), None, 0, window)
        second = trainer.step(first_stage(plan), first.state, 1, window)
        return target, [row | {"seconds": 0} for row in (*first.rows, *second.rows)]

    one = computed()
    assert not dispatched
    parts = dict.fromkeys((*PARTS, "lm_head"), CPU)
    monkeypatch.setattr("engine.models.skeleton.device_map", lambda *args: parts)
    several = computed()
    assert len(dispatched) == 2, "the expert's and the trainer's"
    assert one[1] == several[1]
    assert one[0].keys() == several[0].keys() and all(torch.equal(one[0][k], several[0][k]) for k in one[0])
