"""slerp, model_stock and passthrough against mergekit's own functions, with tensors in all directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import plan_of
from errors import refused
from weight_space import Tensors, entries, noise, ours, worst, write_checkpoint, write_config

import engine.methods.arithmetic.tensor
from engine.errors import ConfigError

SHAPES = {"matrix": (30, 40), "wide": (3, 700), "vector": (50,), "convolution": (4, 5, 6), "scalar": (), "row": (1, 9)}
# The other model, from the base and a tensor that is orthogonal to it on average.
DIRECTIONS = {
    "near": lambda base, other: base + 0.1 * other,
    "far": lambda base, other: 0.2 * base + other,
    "at threshold": lambda base, other: base + 0.0316 * other,
    "equal": lambda base, other: base,
    "longer": lambda base, other: 3 * base,
    "opposite": lambda base, other: -base,
    "zero": lambda base, other: 0 * base,
    "tiny": lambda base, other: 1e-12 * other,
}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def tensors(request: pytest.FixtureRequest, tmp_path: Path) -> list[Tensors]:
    """The tensors of the base and three experts, which are written to the folders of the test."""
    models: list[Tensors] = [{} for _ in range(4)]
    for number, (shape, size) in enumerate(SHAPES.items()):
        for name, other in DIRECTIONS.items():
            base = noise(size, number, 0.3)
            drawn = [noise(size, 100 * k + number, 0.3) for k in (1, 2, 3)]
            for model, tensor in zip(models, [base, other(base, drawn[0]), *drawn[1:]], strict=True):
                model[f"layers.0.{shape}.{name.replace(' ', '_')}"] = tensor.to(request.param)
        models[0][f"zero.{shape}"] = torch.zeros(size, dtype=request.param)
        for model in models[1:]:
            model[f"zero.{shape}"] = noise(size, number, 0.3).to(request.param)
    for name, model in zip(("base", "expert0", "expert1", "expert2"), models, strict=True):
        write_checkpoint(tmp_path / name, model)
    return models


def expected(method: str, models: list[Tensors], parameters: dict[str, Any], base: bool = True) -> Tensors:
    """What mergekit's function of a method computes in float64: the angle of opposed vectors needs it."""
    merge = pytest.importorskip("mergekit.merge_methods").merge_state_dicts
    named = {f"model{k}": {name: tensor.double() for name, tensor in model.items()} for k, model in enumerate(models)}
    merged: Tensors = merge(named, method, parameters=parameters, base="model0" if base else None)
    return merged


@pytest.fixture(params=["whole", "cut"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that hold all rows, or that end within the long ones."""
    if request.param == "cut":
        monkeypatch.setattr(engine.methods.arithmetic.tensor, "ROOM", 256)
        monkeypatch.setattr(engine.methods.arithmetic.tensor, "SMALLEST_BLOCK", 64)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    ("method", "experts", "parameters"),
    [
        ("slerp", 1, {"t": 0.3}),
        ("slerp", 1, {"t": 1.2}),
        ("model_stock", 3, {}),
        ("model_stock", 2, {"filter_wise": True}),
    ],
    ids=str,
)
def test_they_are_mergekits(
    method: str, experts: int, parameters: dict[str, Any], tensors: list[Tensors], tmp_path: Path
) -> None:
    keys = {"merge_method": method, "base_model": "base", "parameters": parameters, "out_dtype": "float32"}
    found = ours(write_config(tmp_path, models=entries(*[{}] * experts), **keys))
    for name, tensor in expected(method, tensors[: experts + 1], parameters).items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-6, atol=1e-6)


def test_a_model_that_passes_through_is_copied_or_scaled(tensors: list[Tensors], tmp_path: Path) -> None:
    keys = {"merge_method": "passthrough", "models": entries({}, first=1)}
    found = ours(write_config(tmp_path, **keys))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors[2].items()) and len(found) > 9
    scale = [{"filter": "near", "value": 0.0}, {"filter": "far", "value": -2}, {"value": None}]
    found = ours(write_config(tmp_path, **keys, parameters={"scale": scale}, out_dtype="float32"))
    factors = {name: {"near": 0, "far": -2}.get(name.rpartition(".")[2], 1) for name in found}
    assert worst(found, {name: tensors[2][name].float() * factor for name, factor in factors.items()}) == 0


@pytest.mark.parametrize(
    ("method", "experts", "base", "wanted"),
    [("slerp", 2, True, "2"), ("model_stock", 1, True, "at least 3"), ("passthrough", 2, False, "1")],
)
def test_another_number_of_models_is_refused(
    method: str, experts: int, base: bool, wanted: str, tensors: list[Tensors], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"base_model": "base"} if base else {}
    with refused(ConfigError, where="models", facts=[method, wanted, str(experts + base)]):
        plan_of(write_config(tmp_path, merge_method=method, models=entries(*[{}] * experts), **keys))
