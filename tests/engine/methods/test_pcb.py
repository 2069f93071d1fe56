"""PCB-Merging beside a dense reference over the flattened model, which is written from the paper's equations."""

from __future__ import annotations

import math
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import plan_of
from one_tensor import tensor_of
from torch import Tensor
from weight_space import (
    Tensors,
    combine,
    difference,
    entries,
    ours,
    read,
    write_arrays,
    write_checkpoint,
    write_config,
)

from engine.methods.arithmetic.selection import Threshold
from engine.methods.pcb import _ordered, _value, prepare
from engine.task_vectors.pieces import pieces

pytestmark = pytest.mark.usefixtures("one_thread")


def scaled(x: Tensor) -> Tensor:
    span = x.max() - x.min()
    return (x - x.min()) / span if span > 0 else torch.zeros_like(x)


def at_place(x: Tensor, place: int) -> Tensor:
    return x.sort().values[place]


def reference(base: Tensors, experts: list[Tensors], ratio: float, clamp: float, factor: float) -> Tensors:
    """Return the merge, in float64 over vectors of all elements."""
    flat = torch.cat([base[name].double().flatten() for name in base])
    taus = [torch.cat([expert[name].double().flatten() for name in base]) - flat for expert in experts]
    size, total = len(flat), sum(taus, torch.zeros_like(flat))
    numerator, divisor = torch.zeros_like(flat), torch.zeros_like(flat)
    for tau in taus:
        sizes = tau.abs()
        u = sizes.clamp(at_place(sizes, int(size * clamp)), at_place(sizes, int(size * (1 - clamp) - 1)))
        beta = torch.exp(len(taus) * scaled(u) ** 2) * torch.tanh(tau * total)
        share = scaled(beta.clamp_min(at_place(beta, min(int(size * (1 - ratio)), size - 1))))
        numerator += share * tau.sign() * u
        divisor += share
    merged = flat + factor * numerator / divisor.clamp_min(1e-12)
    parts = merged.split([tensor.numel() for tensor in base.values()])
    return {name: part.view(base[name].shape) for name, part in zip(base, parts, strict=True)}


def config_of(folder: Path, experts: int, **parameters: Any) -> Path:
    return write_config(
        folder, merge_method="pcb", base_model="base", models=entries(*[{}] * experts), parameters=parameters
    )


@pytest.mark.parametrize(
    "options", [{}, {"ratio": 0.4, "clamp": 0.02, "lambda": 0.9}, {"ratio": 1.0, "clamp": 0.0}], ids=str
)
def test_the_merge_is_that_of_the_reference(options: dict[str, float], tmp_path: Path) -> None:
    base, experts = write_arrays(tmp_path, experts=3)
    chosen = {"ratio": 0.1, "clamp": 1e-4, "lambda": 1.2} | options
    wanted = reference(base, experts, chosen["ratio"], chosen["clamp"], chosen["lambda"])
    found = ours(config_of(tmp_path, 3, **options))
    changed = sum(int((tensor - base[name]).count_nonzero()) for name, tensor in wanted.items())
    assert 0 < changed <= 3 * math.ceil(chosen["ratio"] * sum(tensor.numel() for tensor in base.values()))
    for name, tensor in wanted.items():
        assert difference(found[name], tensor) <= 1e-6, name


def test_bits_do_not_depend_on_shards(tmp_path: Path) -> None:
    write_arrays(tmp_path, experts=3)
    plan = plan_of(config_of(tmp_path, 3), "max_shard_size=1KB")
    one, three = (read(combine(plan, tmp_path / f"out{shards}", shards)) for shards in (1, 3))
    assert len(one) == len(three) and all(torch.equal(tensor, three[name]) for name, tensor in one.items())


def test_the_scores_of_many_experts_are_finite(tmp_path: Path) -> None:
    """exp(K) is infinite in float32 from K = 89 on."""
    base, (expert,) = write_arrays(tmp_path, experts=1)
    config = write_config(
        tmp_path,
        merge_method="pcb",
        base_model="base",
        models=[{"model": "expert0", "name": f"e{k}"} for k in range(100)],
    )
    found = ours(config)
    for name, tensor in reference(base, [expert] * 100, 0.1, 1e-4, 1.2).items():
        assert difference(found[name], tensor) <= 1e-6, name


def test_experts_that_equal_the_base_change_nothing(tmp_path: Path) -> None:
    base, _ = write_arrays(tmp_path, experts=1)
    write_checkpoint(tmp_path / "expert1", base)
    found = ours(
        write_config(tmp_path, merge_method="pcb", base_model="base", models=[{"model": "expert1"}], parameters={})
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in base.items())


def test_numbers_are_mapped_in_order() -> None:
    values = np.array([-np.inf, -3.4e38, -1.5, -1e-45, -0.0, 0.0, 1e-45, 2.0, 3.4e38, np.inf], dtype=np.float32)
    keys = _ordered(values)
    assert (keys[1:] >= keys[:-1]).all() and keys[4] == keys[5] and len(set(keys.tolist())) == 9
    assert np.array_equal(_value(keys), values)


def peak_of_a_merge(experts: int) -> int:
    """Return the most bytes of NumPy arrays that the merge of a block has at a time. The block itself is torch's."""
    base = torch.zeros(1 << 16)
    taus = [torch.full_like(base, 1.0 + k) for k in range(experts)]
    bounds = [Threshold(0, 1, 1)] * experts + [Threshold(0x40000000, 1, 1)] * experts
    known = {"quantiles of sizes": bounds, "quantiles of scores": bounds}
    with ThreadPoolExecutor(1) as pool:
        tensor = tensor_of("pcb", base, taus, known=known, pool=pool, **{"lambda": 1.0})
        fill, out_N = prepare(tensor), torch.empty_like(base)
        (piece,) = pieces(tensor.name, tensor.shape)
        fill(piece, out_N)
        tracemalloc.start()
        try:
            fill(piece, out_N)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


def test_memory_does_not_grow_with_the_experts() -> None:
    assert peak_of_a_merge(8) <= 1.01 * peak_of_a_merge(2)
