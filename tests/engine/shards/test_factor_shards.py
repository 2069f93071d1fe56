"""Shards by factors: merges, gradients and coefficients as with dense task vectors, and what stays on a device."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from conftest import plan_of
from plain import Plain, Received, task_vectors
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.config.schema import Use
from engine.planning.factors import factor_bytes, factored
from engine.planning.plan import Plan
from engine.shards.factor_shards import FactorShards
from engine.shards.local_shards import LocalShards
from engine.shards.orthogonal import orthogonalise
from engine.storage.local_folder import LocalFolder
from engine.task_vectors.coefficients import Array, ChunkLayout, Coefficients

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads it
KINDS = ("orthogonal", "adapters")


def adapters(config: Path, experts: int) -> None:
    """Replace all experts by adapters of some matrices, of different ranks."""
    for k in range(experts):
        target = config.parent / f"expert{k}"
        shutil.rmtree(target)
        torch.manual_seed(k)
        options = peft.LoraConfig(r=2 + k, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        base = AutoModelForCausalLM.from_pretrained(config.parent / "base")
        peft.get_peft_model(base, options).save_pretrained(target)


@pytest.fixture(params=[(kind, dtype) for kind in KINDS for dtype in ("float32", "bfloat16")], ids="-".join)
def plan(request: pytest.FixtureRequest, make_merge: Callable[..., Path]) -> Plan:
    kind, dtype = request.param
    # With norms, which have no factors.
    config = make_merge(experts=3, exclude=[".*embed.*", ".*head.*"], dtype=getattr(torch, dtype))
    if kind == "adapters":
        adapters(config, 3)
    return plan_of(config, f"parameters.task_vectors={'orthogonal' if kind == 'orthogonal' else 'whole'}")


def shards(plan: Plan, folder: Path, use: Use) -> LocalShards | FactorShards:
    state, through = LocalFolder(folder / use), factored(plan, on_gpu=False, use=use)
    orthogonalise(plan, task_vectors(plan), state, plan.orthogonal, through)
    rest = LocalShards(plan, 1, overlap=False, state=state, names=plan.merged_set.difference(through))
    return FactorShards(plan, through, rest, state) if through else rest


def table_of(plan: Plan) -> Coefficients:
    layout = ChunkLayout.make(plan.numels, {name: i % 4 for i, name in enumerate(plan.merged)})
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
    ours = shards(plan, tmp_path, "always")
    assert isinstance(ours, FactorShards)
    pinned: list[int] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor.nbytes) or tensor)
    first, *others = plan.merged

    def size(name: str) -> int:
        return factor_bytes(plan, [name]) + 4 * plan.numels[name]

    free = [10_000_000 + size(first)]
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
    ours.merge(table_of(plan), received)
    assert sum(pinned) == sum(map(size, others))
