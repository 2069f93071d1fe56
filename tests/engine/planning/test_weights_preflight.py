"""Experts that are equal, opposed, copies of the base or of another model are named, by a sample of their weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from conftest import plan_of
from peft_adapters import adapters
from safetensors.torch import load_file, save_file

from engine.checkpoints.adapter_file import WEIGHTS
from engine.planning import preflight as module
from engine.planning.preflight import doubts

Experts = dict[str, Any]


def lines(folder: Path, experts: Experts, **keys: Any) -> list[tuple[list[str], str]]:
    """Return the experts that each line names, and what it is about."""
    for name, expert in experts.items():
        tiny.save(expert, folder / name)
        tiny.write_calibration(folder / f"{name}.jsonl", 1, seed=0)
    models = [{"model": name, "calibration": f"{name}.jsonl"} for name in experts]
    raw = {"merge_method": "expert_merging", "base_model": "base", "models": models, **keys}
    (folder / "merge.yaml").write_text(yaml.safe_dump(raw))
    return [_read(line, experts) for line in doubts(plan_of(folder / "merge.yaml"))]


def _read(line: str, experts: Experts) -> tuple[list[str], str]:
    about = next(word for word in ("same", "opposite", "fine-tuned", "right model") if word in line)
    return [name for name in experts if name in line.replace(":", "").split()], about


def moved(base: Any, expert: Any, factor: float) -> Any:
    """Return a model with `factor` times the task vector of an expert."""
    other = tiny.make_model()
    state = {name: start + factor * (expert.state_dict()[name] - start) for name, start in base.state_dict().items()}
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("few", [False, True])
def test_equal_and_opposed_experts_are_named(tmp_path: Path, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if few:
        monkeypatch.setattr(module, "TENSORS", 5)
        monkeypatch.setattr(module, "RANGE", 64)
    base = tiny.make_model()
    tiny.save(base, tmp_path / "base")
    x, y = (tiny.make_expert(base, seed, scale=0.01) for seed in (1, 2))
    half, opposed = moved(base, x, 0.5), moved(base, x, -1.0)
    assert lines(tmp_path, {"x": x, "y": y}) == []
    assert lines(tmp_path, {"x": x, "y": y, "z": half}) == [(["x", "z"], "same")]
    # One line for each expert, however many are equal to it.
    assert lines(tmp_path, {"x": x, "y": x, "z": half}) == [(["x", "y"], "same"), (["x", "z"], "same")]
    assert lines(tmp_path, {"x": x, "y": opposed}) == [(["x", "y"], "opposite")]
    assert lines(tmp_path, {"x": x, "y": base}) == [(["y"], "right model")]
    assert lines(tmp_path, {"x": x, "y": x}, merge_method="task_arithmetic") == []


def test_an_expert_that_is_no_fine_tuned_base_is_named(tmp_path: Path) -> None:
    base = tiny.make_model()
    tiny.save(base, tmp_path / "base")
    other = tiny.make_model(seed=5)
    assert lines(tmp_path, {"x": tiny.make_expert(base, 1, scale=0.01), "y": other}) == [(["y"], "fine-tuned")]


def test_adapters_are_compared_by_their_products(tmp_path: Path) -> None:
    config = tiny.make_merge(tmp_path, merge_method="expert_merging")
    adapters(config, 2)
    assert doubts(plan_of(config)) == []
    shutil.copytree(tmp_path / "expert0", tmp_path / "expert1", dirs_exist_ok=True)
    assert [_read(line, {"expert0": None, "expert1": None}) for line in doubts(plan_of(config))] == [
        (["expert0", "expert1"], "same")
    ]
    path = tmp_path / "expert1" / WEIGHTS
    save_file({name: -factor if "lora_B" in name else factor for name, factor in load_file(path).items()}, path)
    assert [_read(line, {"expert0": None, "expert1": None})[1] for line in doubts(plan_of(config))] == ["opposite"]


def test_weights_that_are_not_finite_are_no_cosine(tmp_path: Path) -> None:
    base = tiny.make_model()
    tiny.save(base, tmp_path / "base")
    broken = tiny.make_expert(base, seed=1)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight.fill_(torch.inf)
    assert lines(tmp_path, {"a": broken, "b": broken}) == []
