"""DOGE beside a dense reference that is written from the paper's loss, with gradients by automatic differentiation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import plan_of
from torch import Tensor
from weight_space import MATRICES, Tensors, combine, difference, entries, ours, read, write_arrays, write_config

pytestmark = pytest.mark.usefixtures("one_thread")

DEFAULTS = {"eta": 0.07, "density": 0.3, "subspace": 6.0, "steps": 400, "learning_rate": 1e-4, "lambda": 1.0}


def loss_of(taus: list[Tensor], lambdas: list[Tensor], delta: Tensor) -> Tensor:
    """Return Σₖ Σ over rows of the squared sum over columns of τₖ∘(τₖ − Σⱼ λⱼ·(τⱼ + Δ))."""
    merged = sum((factor * (tau + delta) for factor, tau in zip(lambdas, taus, strict=True)), torch.zeros_like(delta))
    return torch.stack([(tau * (tau - merged)).sum(dim=1).square().sum() for tau in taus]).sum()


def correction(taus: list[Tensor], lambdas: list[Tensor], options: dict[str, Any]) -> Tensor:
    smaller = min(taus[0].shape)
    own = torch.cat([torch.linalg.svd(tau, full_matrices=False)[0][:, : smaller // len(taus)] for tau in taus], dim=1)
    basis = torch.linalg.svd(own, full_matrices=False)[0][:, : int(smaller / options["subspace"])]
    outside = torch.eye(len(taus[0]), dtype=torch.float64) - basis @ basis.T
    delta = torch.zeros_like(taus[0]).requires_grad_()
    optimizer = torch.optim.Adam([delta], lr=options["learning_rate"])
    for _ in range(options["steps"]):
        (gradient,) = torch.autograd.grad(loss_of(taus, lambdas, delta), delta)
        delta.grad = outside @ gradient
        optimizer.step()
    return delta.detach()


def reference(base: Tensors, experts: list[Tensors], options: dict[str, Any]) -> Tensors:
    """Return the merge, in float64."""
    taus = {name: [expert[name].double() - base[name].double() for expert in experts] for name in base}
    masks = []
    for k in range(len(experts)):
        sizes = torch.cat([taus[name][k].flatten() for name in MATRICES]).abs()
        masks.append(sizes.sort().values[-int(options["density"] * len(sizes))])
    result = {}
    for name, own in taus.items():
        if name in MATRICES:
            lambdas = [options["eta"] / tau.norm() for tau in own]
            delta = correction(own, lambdas, options)
            total = sum(
                (
                    factor * (tau + delta) * (tau.abs() >= least)
                    for factor, tau, least in zip(lambdas, own, masks, strict=True)
                ),
                torch.zeros_like(delta),
            )
        else:
            total = sum(own, torch.zeros_like(own[0])) / len(own)
        result[name] = base[name].double() + options["lambda"] * total
    return result


def config_of(folder: Path, count: int, **options: Any) -> Path:
    return write_config(
        folder, merge_method="doge", base_model="base", models=entries(*[{}] * count), parameters=options
    )


# The smaller side of a matrix has to have a gap between the singular values where a basis ends.
@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"steps": 20}, {"steps": 100, "learning_rate": 1e-3, "density": 0.6, "eta": 0.2, "subspace": 3.0}],
    ids=str,
)
def test_the_merge_is_that_of_the_reference(options: dict[str, Any], tmp_path: Path) -> None:
    base, experts = write_arrays(tmp_path, experts=3)
    wanted = reference(base, experts, DEFAULTS | options)
    found = ours(config_of(tmp_path, 3, **options))
    for name, tensor in wanted.items():
        assert difference(found[name], tensor) <= 2e-6, name


def test_the_correction_lowers_the_interference_outside_of_the_shared_directions(tmp_path: Path) -> None:
    base, experts = write_arrays(tmp_path, experts=3)
    name = "layers.0.high.weight"
    taus = [expert[name].double() - base[name].double() for expert in experts]
    lambdas = [0.07 / tau.norm() for tau in taus]
    total = sum(lambdas, torch.zeros(()))
    options = {"density": 1.0, "learning_rate": 1e-3}
    merged = [ours(config_of(tmp_path, 3, steps=steps, **options))[name].double() for steps in (0, 200)]
    # Without masks, the merges differ by Λ·Δ.
    delta = (merged[1] - merged[0]) / total
    assert delta.abs().max() > 1e-3
    assert loss_of(taus, lambdas, delta) < loss_of(taus, lambdas, torch.zeros_like(delta))
    assert float(torch.linalg.matrix_rank(delta, tol=1e-4)) > 0


def test_bits_do_not_depend_on_shards(tmp_path: Path) -> None:
    write_arrays(tmp_path, experts=3)
    plan = plan_of(config_of(tmp_path, 3, steps=5), "max_shard_size=1KB")
    one, three = (read(combine(plan, tmp_path / f"out{shards}", shards)) for shards in (1, 3))
    assert len(one) == len(three) and all(torch.equal(tensor, three[name]) for name, tensor in one.items())


def test_equal_experts_share_their_directions(tmp_path: Path) -> None:
    """The nearest basis of equal experts has no more directions than one of them."""
    base, (expert,) = write_arrays(tmp_path, experts=1)
    config = write_config(
        tmp_path,
        merge_method="doge",
        base_model="base",
        models=[{"model": "expert0", "name": f"e{k}"} for k in range(8)],
        parameters={"steps": 30, "density": 1.0},
    )
    assert all(tensor.isfinite().all() for tensor in ours(config).values())
    assert expert.keys() == base.keys()
