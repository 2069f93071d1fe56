"""OTA with FFG beside its equation, written out element by element."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from one_tensor import Known, merged, tensor_of
from torch import Tensor

from engine.methods.arithmetic.selection import ALL, NONE, Threshold
from engine.methods.ota_ffg import PREPASSES, THRESHOLDS
from engine.methods.prepass import Group

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"a": (5, 7), "b": (40,), "c": (3, 2, 4)}
EXPERTS = 3


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


BASE = {name: normal(*shape, seed=seed) for seed, (name, shape) in enumerate(SHAPES.items())}
TAUS = {name: [normal(*shape, seed=9 * (1 + k) + len(shape)) for k in range(EXPERTS)] for name, shape in SHAPES.items()}
CURVATURES = {
    name: [1e-9 * normal(*shape, seed=99 * (1 + k) + len(shape)).square() for k in range(EXPERTS)]
    for name, shape in SHAPES.items()
}


def statistics(name: str) -> list[Known]:
    return [Known(information=curvature) for curvature in CURVATURES[name]]


def thresholds(densities: list[float]) -> list[Threshold]:
    """The result of the prepasses over all tensors."""
    own = [{"density": density} for density in densities]
    group = Group(
        {name: base.numel() for name, base in BASE.items()},
        {name: {} for name in BASE},
        dict.fromkeys(BASE, own),
    )
    with ThreadPoolExecutor(1) as pool:
        for prepass in PREPASSES:
            arrays = [
                prepass.measure(
                    tensor_of("ota_ffg", base, TAUS[name], statistics(name), known=group.known, own=own, pool=pool)
                )
                for name, base in BASE.items()
            ]
            group.known[prepass.name] = prepass.conclude(np.sum(arrays, axis=0), group)
    found: list[Threshold] = group.known[THRESHOLDS]
    return found


def written_out(name: str, densities: list[float]) -> Tensor:
    above, below = torch.zeros(SHAPES[name]).double(), torch.zeros(SHAPES[name]).double()
    for k, density in enumerate(densities):
        scores = {each: CURVATURES[each][k].double() * TAUS[each][k].double().square() for each in SHAPES}
        ranked = torch.cat([score.flatten() for score in scores.values()]).sort(descending=True).values
        kept = scores[name] >= ranked[int(density * len(ranked)) - 1]
        weight = torch.where(kept, CURVATURES[name][k].double().sqrt(), 0)
        above += weight * (BASE[name].double() + TAUS[name][k])
        below += weight
    return torch.where(below > 0, above / below, BASE[name].double())


@pytest.mark.parametrize("densities", [[0.4, 0.4, 0.4], [0.1, 0.6, 0.3], [1.0, 1.0, 0.5]])
@pytest.mark.parametrize("name", SHAPES)
def test_it_is_the_mean_by_curvature_of_the_elements_that_count(name: str, densities: list[float]) -> None:
    known = {THRESHOLDS: thresholds(densities)}
    found = merged("ota_ffg", BASE[name], TAUS[name], statistics(name), known=known)
    torch.testing.assert_close(found.double(), written_out(name, densities), rtol=0, atol=1e-5)


def test_elements_that_count_for_no_expert_keep_the_base() -> None:
    known = {THRESHOLDS: [Threshold(NONE, 0, 0)] * EXPERTS}
    assert torch.equal(merged("ota_ffg", BASE["a"], TAUS["a"], statistics("a"), known=known), BASE["a"])


def test_the_curvature_of_small_gradients_is_not_lost() -> None:
    known = {THRESHOLDS: [Threshold(ALL, 0, 0)] * 2}
    small = [Known(information=torch.full((5, 7), 3e-33)), Known(information=torch.full((5, 7), 12e-33))]
    found = merged("ota_ffg", BASE["a"], TAUS["a"][:2], small, known=known)
    expected = BASE["a"] + (TAUS["a"][0] + 2 * TAUS["a"][1]) / 3
    torch.testing.assert_close(found, expected)


def test_without_the_curvature_of_an_expert_the_models_are_averaged() -> None:
    known = {THRESHOLDS: [Threshold(ALL, 0, 0)] * EXPERTS}
    found = merged("ota_ffg", BASE["a"], TAUS["a"], [*statistics("a")[:2], Known()], known=known)
    torch.testing.assert_close(found, BASE["a"] + sum(TAUS["a"], torch.zeros(())) / EXPERTS)


def test_elements_without_curvature_are_counted_as_zeros() -> None:
    first, second = PREPASSES
    tensor = tensor_of("ota_ffg", BASE["b"], TAUS["b"], [Known()] * EXPERTS)
    counts = first.measure(tensor)
    assert counts[:, 0].tolist() == [40] * EXPERTS and counts.sum() == 40 * EXPERTS
    found = first.conclude(counts, Group({"b": 40}, {"b": {}}, {"b": [{"density": 0.5}] * EXPERTS}))
    again = tensor_of("ota_ffg", BASE["b"], TAUS["b"], [Known()] * EXPERTS, known={first.name: found})
    assert second.measure(again)[:, 0].tolist() == [40] * EXPERTS
