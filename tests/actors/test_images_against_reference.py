"""Merges of models that take images: by the actors as plain classes, against the in-memory reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_images
import torch
from conftest import plan_of
from image_inputs import inputs_of
from plain import Plain
from reference import Reference, Result

from engine.expert import load_target
from engine.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")
# As for language models.
TOLERANCE = 1e-4
each_family = pytest.mark.parametrize("family", [*tiny_images.FAMILIES, tiny_images.CHAT])


def largest_difference(plain: Plain, reference: Result) -> float:
    stages = plain.run()
    return float(
        max(
            np.abs(table.values[:, table.layout.columns[name]] - expected[name].numpy()).max()
            for table, expected in zip(stages, reference.stages, strict=True)
            for name in table.layout.tensors
        )
    )


@each_family
def test_a_sample_has_the_inputs_that_its_processor_makes(tmp_path: Path, family: str) -> None:
    config = tiny_images.make_merge(tmp_path / "merge", family)
    plain, wanted = Plain(plan_of(config), tmp_path), inputs_of(config)
    run = RunFolder(str(tmp_path / "plain"))
    for mine, expected in zip(plain.samples, wanted, strict=True):
        for sample, arguments in zip(mine, expected, strict=True):
            assert sample.input_ids == tuple(arguments["input_ids"][0].tolist())
            found = load_target(run.state, run.inputs(sample)).inputs
            assert found.keys() == arguments.keys() - {"input_ids", "attention_mask"}
            for name, tensor in found.items():
                torch.testing.assert_close(tensor, torch.as_tensor(arguments[name]), rtol=0, atol=1e-6)


@each_family
# A bias of keys shifts all scores of a query alike, so its gradient is nothing but rounding.
@pytest.mark.parametrize("options", [{}, {"exclude": ["vision.*k_proj.bias"]}], ids=["by-default", "all-merged"])
def test_coefficients_agree_with_the_reference(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    parameters = {"epochs": 2, "budget": 1.5}
    config = tiny_images.make_merge(tmp_path / "merge", family, parameters=parameters, **options)
    plain, reference = Plain(plan_of(config), tmp_path), Reference(config, inputs_of(config)).run()
    assert set(plain.plan.merged) == set(reference.importance)
    vision = [name for name in plain.plan.merged if "vision" in name or "visual" in name]
    assert bool(vision) == ("exclude" in options)
    assert any("projector" in name or "mlp1" in name for name in plain.plan.merged) or family.startswith("qwen")
    assert largest_difference(plain, reference) < TOLERANCE
    moved = np.abs(plain.trainer._merged.values - np.array([[e.weight] for e in plain.plan.experts]))
    assert moved.mean() > 10 * TOLERANCE, "learning must move further than the tolerance"
