"""WIDEN beside a dense reference that is written column by column, as in the paper."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from weight_space import Tensors, difference, entries, ours, write_arrays, write_checkpoint, write_config

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = ("embed_tokens.weight", "lm_head.weight")


def scores(changes: list[list[float]], ratio: float, calibration: float) -> list[list[float]]:
    """Return sₖⱼ from Δₖⱼ: ranks, their softmax over the experts, and the weight of important features."""
    ranks = []
    for mine in changes:
        order = sorted(range(len(mine)), key=lambda j: mine[j])
        ranks.append([(order.index(j) + 1) / len(mine) for j in range(len(mine))])
    found = []
    for mine in ranks:
        share = [math.exp(mine[j]) / sum(math.exp(other[j]) for other in ranks) for j in range(len(mine))]
        found.append(
            [
                calibration if 2 * round(r * len(mine)) > ratio * (len(mine) + 1) else s
                for r, s in zip(mine, share, strict=True)
            ]
        )
    return found


def reference(base: Tensor, experts: list[Tensor], rows_are_tokens: bool, ratio: float, calibration: float) -> Tensor:
    own = base.double()
    taus = [expert.double() - own for expert in experts]
    if base.dim() != 2:
        weights = scores([tau.abs().flatten().tolist() for tau in taus], ratio, calibration)
        return own + sum(
            tau * torch.tensor(weight, dtype=torch.float64).view_as(own)
            for tau, weight in zip(taus, weights, strict=True)
        )
    columns = own if rows_are_tokens else own.T
    moved = [expert.double() if rows_are_tokens else expert.double().T for expert in experts]
    lengths = [[abs(float(c.norm() - b.norm())) for b, c in zip(columns, one, strict=True)] for one in moved]
    angles = [
        [1 - float(torch.dot(b, c) / (b.norm() * c.norm())) for b, c in zip(columns, one, strict=True)] for one in moved
    ]
    both = [scores(each, ratio, calibration) for each in (lengths, angles)]
    result = columns.clone()
    for k, one in enumerate(moved):
        for j in range(len(columns)):
            result[j] += (one[j] - columns[j]) * (both[0][k][j] + both[1][k][j]) / 2
    return result if rows_are_tokens else result.T


@pytest.mark.parametrize("options", [{}, {"ratio": 1.4, "calibration": 0.7}], ids=str)
def test_the_merge_is_that_of_the_reference(options: dict[str, Any], tmp_path: Path) -> None:
    base, experts = write_arrays(tmp_path, experts=3)
    config = write_config(
        tmp_path,
        merge_method="widen",
        base_model="base",
        models=entries({}, {}, {}),
        parameters=options,
        dtype="float32",
    )
    found: Tensors = ours(config)
    chosen = {"ratio": 1.0, "calibration": 1.0} | options
    for name, tensor in base.items():
        wanted = reference(tensor, [expert[name] for expert in experts], name in VOCABULARY, **chosen)
        assert difference(found[name], wanted) <= 1e-6, name


def test_columns_of_zeros_have_no_direction(tmp_path: Path) -> None:
    base, experts = write_arrays(tmp_path, experts=2)
    empty = {name: tensor.clone() for name, tensor in base.items()}
    for tensor in empty.values():
        if tensor.dim():
            tensor[..., 0] = 0
    write_checkpoint(tmp_path / "empty", empty)
    config = write_config(tmp_path, merge_method="widen", base_model="empty", models=entries({}, {}))
    found = ours(config)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert any(not torch.equal(found[name], empty[name]) for name in experts[1])
