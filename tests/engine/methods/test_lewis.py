"""LEWIS beside the steps of its paper, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from one_tensor import Known, merged, seen, tensor_of
from torch import Tensor

from engine.methods.lewis import DENSITIES, PREPASSES
from engine.methods.prepass import Group

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, EXPERTS, INPUTS, TOKENS = 4, 2, 6, 30
KINDS = {"attention.query.weight": 5, "mlp.up.weight": 9}
(PREPASS,) = PREPASSES


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Model:
    """Weights and inputs of two layers in each block, of a base and its experts."""

    def __init__(self) -> None:
        self.base, self.taus, self.inputs = {}, {}, {}
        for seed, (block, kind) in enumerate((block, kind) for block in range(LAYERS) for kind in KINDS):
            name, rows = f"layers.{block}.{kind}", KINDS[kind]
            self.base[name] = normal(rows, INPUTS, seed=seed).float()
            self.taus[name] = [0.2 * normal(rows, INPUTS, seed=100 * (1 + k) + seed).float() for k in range(EXPERTS)]
            self.inputs[name] = [normal(INPUTS, TOKENS, seed=7000 + 100 * k + seed) for k in range(EXPERTS + 1)]

    def group(self, **options: float) -> Group:
        values = {"least_density": 0.5, "most_density": 0.8} | options
        return Group(
            {name: base.numel() for name, base in self.base.items()},
            dict.fromkeys(self.base, values),  # type: ignore[arg-type]
            dict.fromkeys(self.base, [{}] * EXPERTS),  # type: ignore[arg-type]
        )

    def measured(self) -> dict[str, np.ndarray]:
        return {
            name: PREPASS.measure(
                tensor_of(
                    "lewis", base, self.taus[name], [seen(x) for x in self.inputs[name][1:]],
                    base_statistics=seen(self.inputs[name][0]),
                )
            )
            for name, base in self.base.items()
        }  # fmt: skip


def written_out(model: Model, expert: int, low: float, high: float) -> dict[str, float]:
    """The published steps: per kind, the change of importance divided by its sum over layers; then min to max."""

    def importance(weight: Tensor, inputs: Tensor) -> float:
        return float((weight.double().abs() * inputs.square().mean(1).sqrt()).norm())

    table = {}
    for kind in KINDS:
        names = [f"layers.{block}.{kind}" for block in range(LAYERS)]
        delta = {
            name: abs(
                importance(model.base[name].double() + model.taus[name][expert], model.inputs[name][1 + expert])
                - importance(model.base[name], model.inputs[name][0])
            )
            for name in names
        }
        table |= {name: value / sum(delta.values()) for name, value in delta.items()}
    least, most = min(table.values()), max(table.values())
    return {name: low + (value - least) / (most - least) * (high - low) for name, value in table.items()}


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.8), (0.0, 1.0), (0.9, 0.2)])
def test_densities_follow_from_the_change_of_importance(low: float, high: float) -> None:
    model = Model()
    found = PREPASS.conclude(model.measured(), model.group(least_density=low, most_density=high))
    for expert in range(EXPERTS):
        expected = written_out(model, expert, low, high)
        assert {name: own[expert] for name, own in found.items()} == pytest.approx(expected, abs=1e-5)


def test_without_changes_the_density_is_the_middle() -> None:
    model = Model()
    same = {name: np.full(EXPERTS, 3.0) for name in model.base}
    assert {value for own in PREPASS.conclude(same, model.group()).values() for value in own} == {0.65}
    none = {name: np.zeros(EXPERTS) for name in model.base}
    assert {value for own in PREPASS.conclude(none, model.group()).values() for value in own} == {0.65}


def test_tensors_without_moments_have_no_density_of_theirs() -> None:
    base, taus = normal(4, seed=1).float(), [normal(4, seed=2), normal(4, seed=3)]
    norm = PREPASS.measure(tensor_of("lewis", base, taus, [Known()] * 2, base_statistics=Known()))
    assert np.isnan(norm).all()
    model = Model()
    arrays = model.measured() | {"norm.weight": norm}
    group = model.group()
    assert PREPASS.conclude(arrays, group)["norm.weight"] == [None, None]
    # One expert saw no token, such as one of a mixture of experts.
    name = next(iter(model.base))
    arrays[name][1] = np.nan
    found = PREPASS.conclude(arrays, group)[name]
    assert found[0] is not None and found[1] is None


def test_it_merges_as_ties_with_these_densities() -> None:
    model = Model()
    name = next(iter(model.base))
    own = [{"weight": 1.0, "density": 0.3}, {"weight": 2.0, "density": 0.4}]
    found = merged("lewis", model.base[name], model.taus[name], own=own, known={DENSITIES: {"weight": [0.6, None]}})
    as_ties = [own[0] | {"density": 0.6}, own[1]]
    assert torch.equal(found, merged("ties", model.base[name], model.taus[name], own=as_ties))
