"""Whole merges by the methods that use statistics, by one shard and by several, from folders of statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import plan_of
from weight_space import MATRICES, SHAPES, Tensors, entries, noise, ours, task_vectors, write_arrays, write_config

from engine.statistics.files import StatisticsWriter
from engine.statistics.moments import Moments
from engine.storage.local_folder import LocalFolder

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS, TOKENS = 3, 40
METHODS: dict[str, dict[str, Any]] = {
    "lot": {},
    "regmean": {"alpha": 0.5},
    "closed_form": {},
    "fisher": {},
    "lewis": {"weight": 1.0},
    "ota_ffg": {"density": 0.3},
    "rcp": {"penalty": 0.01},
}


def inputs(name: str, model: int) -> torch.Tensor:
    return noise((TOKENS, SHAPES[name][1]), 31 * model + len(name))


def write_statistics(folder: Path, model: int) -> str:
    """Write the moments of three layers and what gradients tell of all tensors of a model, and return the folder."""
    folder.mkdir()
    writer = StatisticsWriter(LocalFolder(folder))
    for name in MATRICES:
        x = inputs(name, model)
        writer.moments([((name,), Moments(TOKENS, x.square().sum(0), x.abs().sum(0), x.T @ x))])
    writer.fisher({name: noise(shape, 77 * model + len(name)).square() for name, shape in SHAPES.items()})
    values = {name: noise(shape, 78 * model + len(name)) for name, shape in SHAPES.items()}
    writer.sensitivity({name: (value.square(), value) for name, value in values.items()})
    kinds = ("activations", "gram", "fisher", "sensitivity")
    writer.finish(base={}, model={}, data="0" * 64, sequences=4, tokens=TOKENS, dtype="float32", kinds=kinds)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("statistics")
    write_arrays(made, EXPERTS)
    for model in range(EXPERTS + 1):
        write_statistics(made / f"statistics{model}", model)
    return made


def merge(folder: Path, method: str, shards: int) -> Tensors:
    models = [
        entry | {"statistics": str(folder / f"statistics{1 + k}")} for k, entry in enumerate(entries(*[{}] * EXPERTS))
    ]
    options = {"merge_method": method, "base_model": "base", "parameters": METHODS[method], "dtype": "float32"}
    base = {"base_statistics": str(folder / "statistics0")} if method == "lewis" else {}
    return ours(write_config(folder, models=models, **options, **base), shards)


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_shards_does_not_matter(method: str, folder: Path) -> None:
    one, three = merge(folder, method, 1), merge(folder, method, 3)
    assert one.keys() == three.keys() == SHAPES.keys()
    for name in SHAPES:
        assert torch.equal(one[name], three[name]), name


@pytest.mark.parametrize("method", ["lot", "regmean", "closed_form"])
def test_layers_are_fitted_better_than_by_their_mean(method: str, folder: Path) -> None:
    models = [{"model": f"expert{k}"} for k in range(EXPERTS)]
    taus = task_vectors(plan_of(write_config(folder, merge_method="task_arithmetic", base_model="base", models=models)))
    merged = merge(folder, method, 1)
    before = ours(write_config(folder, merge_method="weight_average", base_model="base", models=models))
    for name in MATRICES:
        own = [inputs(name, 1 + k) for k in range(EXPERTS)]

        def left(weight: torch.Tensor, name: str = name, own: list[torch.Tensor] = own) -> float:
            # The base is the mean of the experts less the mean of their task vectors.
            tau = weight - (before[name] - sum(taus[name]) / EXPERTS)
            return sum(float((x @ (tau - each).T).square().sum()) for x, each in zip(own, taus[name], strict=True))

        assert left(merged[name]) < left(before[name])
