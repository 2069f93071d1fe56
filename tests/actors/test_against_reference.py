"""Stage 1, importance and stage 2 by the actors as plain classes, against the in-memory reference."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from conftest import cut_small, plan_of
from plain import Plain
from reference import Reference, Result
from thorough import as_thorough, thorough_but

from engine.task_vectors.coefficients import Coefficients

pytestmark = pytest.mark.usefixtures("one_thread")
# Both sides compute in float32; the optimiser's normalised steps scale up the rounding of a gradient.
TOLERANCE = 1e-4
# How a gradient is held: options by ids of tests.
HELD: dict[str, Any] = {
    "stream": as_thorough({"gradients": "stream"}),
    "checkpointing": as_thorough({"gradient_checkpointing": True}),
    "both-with-all-merged": {"gradients": "stream", "gradient_checkpointing": True, "exclude": []},
}


def largest_difference(stages: list[Coefficients], reference: Result) -> float:
    differences = [
        np.abs(table.values[:, table.layout.columns[name]] - expected[name].numpy()).max()
        for table, expected in zip(stages, reference.stages, strict=True)
        for name in table.layout.tensors
    ]
    return float(max(differences))


@pytest.mark.parametrize(
    ("family", "tied"),
    thorough_but(
        [("llama", False), ("gemma3", True), ("qwen3_moe", False)], itertools.product(tiny.FAMILIES, [False, True])
    ),
)
def test_coefficients_importance_and_chunks_agree_with_the_reference(tmp_path: Path, family: str, tied: bool) -> None:
    # One family repeats its samples; for the others, the architecture is the point.
    parameters = {"epochs": 2 if family == "llama" else 1, "budget": 1.5}
    config = tiny.make_merge(tmp_path / "merge", family, tied=tied, sharded=tied, parameters=parameters)
    plain, reference = Plain(plan_of(config), tmp_path), Reference(config).run()
    stages = plain.run()

    assert largest_difference(stages, reference) < TOLERANCE
    layout = stages[1].layout
    assert list(layout.tensors) != [] and set(layout.tensors) == set(reference.importance)
    expected = [reference.importance[name] for name in layout.tensors]
    np.testing.assert_allclose(plain.importance, expected, rtol=1e-4)
    chunks = {
        name: len(layout.edges_of[name]) - 1 for name, on in zip(layout.tensors, layout.learned, strict=True) if on
    }
    assert chunks == {name: count for name, count in reference.chunks.items() if count}
    assert max(chunks.values()) > 1, "the budget must give some tensor several chunks"
    moved = np.abs(stages[1].values - np.array([[e.weight] for e in plain.plan.experts]))
    assert moved[:, layout.learned_columns].mean() > 10 * TOLERANCE, "learning must move further than the tolerance"


@pytest.mark.parametrize(
    "parameters",
    [
        {"start": "stage1", "fixed": "stage1", "budget": 0.9},
        as_thorough({"temperature": 2.0, "hidden_layers": [], "regularization": 0.0}),
        {"hidden_layers": [0, 3], "hidden_weight": 0.3, "kappa": 0.5, "budget": 2.5, "gradient_accumulation": 8},
    ],
    ids=["start-and-fixed-at-stage-1", "logits-only", "layers-and-kappa"],
)
def test_options_mean_what_the_method_says(tmp_path: Path, parameters: dict[str, object]) -> None:
    config = tiny.make_merge(tmp_path / "merge", experts=3, parameters=parameters)
    stages = Plain(plan_of(config), tmp_path).run()
    assert largest_difference(stages, Reference(config).run()) < TOLERANCE


def test_an_expert_s_own_weight_and_loss_weight_are_used(tmp_path: Path) -> None:
    config = tiny.make_merge(tmp_path / "merge", parameters={"loss_weight": 0.5})
    text = config.read_text().replace("weight: 0.2\n", "weight: 0.2\n    loss_weight: 3.0\n")
    config.write_text(text)
    assert "loss_weight: 3.0" in text
    stages = Plain(plan_of(config), tmp_path).run()
    assert largest_difference(stages, Reference(config).run()) < TOLERANCE


@pytest.mark.parametrize("options", HELD.values(), ids=list(HELD))
@pytest.mark.parametrize(("family", "tied"), thorough_but([("gemma3", True)], [("llama", False), ("gemma3", True)]))
def test_how_the_gradient_is_held_changes_nothing_beyond_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, tied: bool, options: dict[str, object]
) -> None:
    # Small limits, so that tensors and logits are cut into several blocks and pieces as in real models.
    cut_small(monkeypatch, block=200, piece=500)
    monkeypatch.setattr("engine.learning.student.LOGIT_BYTES", 4 * 4 * tiny.VOCAB)
    config = tiny.make_merge(tmp_path / "merge", family, tied=tied, parameters={"budget": 1.5}, **options)
    stages = Plain(plan_of(config), tmp_path).run()
    assert largest_difference(stages, Reference(config).run()) < TOLERANCE


def test_gradient_checkpointing_gives_the_same_bits(tmp_path: Path) -> None:
    config = tiny.make_merge(tmp_path / "merge", parameters={"budget": 1.5})
    first, second = Plain(plan_of(config), tmp_path).run()
    again = Plain(plan_of(config, "gradient_checkpointing=true"), tmp_path).run()
    assert first.same_as(again[0]) and second.same_as(again[1])


def move_heads(folder: Path, experts: int = 2) -> None:
    """Give each expert an embedding and a head of its own."""
    for k in range(experts):
        path, generator = folder / f"expert{k}" / "model.safetensors", torch.Generator().manual_seed(k)
        tensors = safetensors.torch.load_file(path)
        for name, tensor in tensors.items():
            if "embed_tokens" in name or "lm_head" in name:
                tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("tied", "exclude", "gradients"),
    thorough_but(
        [(True, [], "accumulate"), (False, ["model.layers.*"], "stream")],
        itertools.product([False, True], [[], ["model.layers.*"]], ["accumulate", "stream"]),
    ),
)
def test_head_and_embedding_may_be_merged_some_tokens_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, exclude: list[str], gradients: str
) -> None:
    monkeypatch.setattr("engine.learning.student.LOGIT_BYTES", 4 * 4 * tiny.VOCAB)
    config = tiny.make_merge(tmp_path / "merge", tied=tied, exclude=exclude, gradients=gradients)
    move_heads(config.parent)
    plan = plan_of(config)
    stages = Plain(plan, tmp_path).run()
    assert largest_difference(stages, Reference(config).run()) < TOLERANCE
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & plan.merged_set:
        columns = stages[0].layout.columns[name]
        moved = np.abs(stages[0].values[:, columns] - np.array([[expert.weight] for expert in plan.experts]))
        assert moved.max() > 10 * TOLERANCE, name


def test_a_head_alone_may_be_merged(tmp_path: Path) -> None:
    """Only the head has a gradient then, and the backward pass stops there."""
    config = tiny.make_merge(tmp_path / "merge", exclude=["model.*"])
    move_heads(config.parent)
    plan = plan_of(config)
    assert plan.merged == ("lm_head.weight",)
    assert largest_difference(Plain(plan, tmp_path).run(), Reference(config).run()) < TOLERANCE
