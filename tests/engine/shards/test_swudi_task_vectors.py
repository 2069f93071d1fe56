"""Task vectors of SWUDI under learned coefficients: their sum is the method's merge, however they are stored."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import plan_of
from peft_adapters import adapters
from plain import Plain, Received, task_vectors
from safetensors.torch import load_file
from weight_space import combine, read

from engine.planning.factors import factored
from engine.planning.plan import Plan
from engine.shards.factor_shards import FactorShards
from engine.shards.local_shards import LocalShards
from engine.shards.orthogonal import TASK_VECTOR_SCALE, orthogonalise, with_orthogonal
from engine.shards.protocol import Shards
from engine.storage.local_folder import LocalFolder
from engine.task_vectors.coefficients import ChunkLayout, Coefficients

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads it
SWUDI = "parameters.task_vectors=swudi"
Q = "model.layers.0.self_attn.q_proj.weight"


def merged(plan: Plan, folder: Path, through: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return the merge with all coefficients 1/TASK_VECTOR_SCALE; matrices in `through` are stored as factors."""
    state = LocalFolder(folder)
    orthogonalise(plan, task_vectors(plan), state, plan.orthogonal, through)
    names = plan.merged_set.difference(through)
    shards: Shards = LocalShards(plan, threads=1, overlap=False, state=state, names=names)
    if through:
        shards = FactorShards(plan, through, shards, state)
    layout, received = ChunkLayout.make(plan.numels, dict.fromkeys(plan.merged, 1)), Received(plan)
    one = Coefficients.constant(layout, [1 / TASK_VECTOR_SCALE] * len(plan.experts))
    return received.all_of(shards.merge(one, received))


@pytest.mark.parametrize("use", ["never", "always"])
def test_with_one_common_weight_their_sum_is_swudi_a(make_merge: Callable[..., Path], tmp_path: Path, use: str) -> None:
    config = make_merge(experts=3)
    adapters(config, 3)
    plan = plan_of(config, SWUDI)
    through = factored(plan, on_gpu=False, use="always") if use == "always" else ()
    assert set(through) <= set(plan.orthogonal) == plan.merged_set and bool(through) == (use == "always")
    of_swudi = read(combine(plan_of(config, "merge_method=swudi_a"), tmp_path / "swudi"))
    base = load_file(config.parent / "base" / "model.safetensors")
    found = merged(plan, tmp_path / "state", through)
    assert found.keys() == plan.merged_set
    for name, tensor in found.items():
        change = (of_swudi[name] - base[name]).norm()
        distance = (tensor.view(base[name].shape) - of_swudi[name]).norm()
        assert distance <= 1e-5 * change + 1e-6 * base[name].norm(), name
        assert bool(change) == bool("q_proj" in name or "down_proj" in name)


def test_an_expert_with_the_base_s_matrices_has_no_share(make_merge: Callable[..., Path], tmp_path: Path) -> None:
    config = make_merge(experts=2)
    shutil.copy(config.parent / "base" / "model.safetensors", config.parent / "expert1" / "model.safetensors")
    plan, state = plan_of(config, SWUDI), LocalFolder(tmp_path)
    orthogonalise(plan, task_vectors(plan), state, plan.orthogonal)
    streams = with_orthogonal(plan, task_vectors(plan), state)
    base = streams.base.read(Q)
    first, second = streams.of(Q)
    assert first is not None and second is None
    # The only expert that changes the matrix keeps its leading parts: half of them, as there are two experts.
    own, found = torch.empty(base.numel()), torch.empty(base.numel())
    task_vectors(plan).of(Q)[0].block(0, base.numel(), base.reshape(-1).float(), own)  # type: ignore[union-attr]
    first.block(0, base.numel(), base.reshape(-1).float(), found)
    u, s, vt = torch.linalg.svd(own.view(base.shape), full_matrices=False)
    half = len(s) // 2
    wanted = TASK_VECTOR_SCALE * (u[:, :half] * s[:half]) @ vt[:half]
    assert (found.view(base.shape) - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("chunks", ["contiguous", "spectral"])
def test_coefficients_over_them_are_learned_to_the_same_bits(
    make_merge: Callable[..., Path], tmp_path: Path, chunks: str
) -> None:
    plan = plan_of(make_merge(parameters={"budget": 1.5}), SWUDI, f"parameters.chunks={chunks}", "gradients=stream")
    plain = Plain(plan, tmp_path / "once")
    tables = plain.run()
    assert all(((table.values > 0) & (table.values < 1)).all() for table in tables)
    assert not tables[0].same_as(Coefficients.constant(tables[0].layout, plan.priors)), "something was learned"
    again = Plain(plan, tmp_path / "again")
    again.start(trainers=2)
    assert all(one.same_as(table) for one, table in zip(again.run(), tables, strict=True))
