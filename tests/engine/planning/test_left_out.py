"""The share of an expert's squared change that is not merged: estimates against exact sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from conftest import plan_of
from peft_adapters import build

from engine.planning import differences as module
from engine.planning.differences import left_out, left_out_lines
from engine.planning.plan import Plan


def plan(folder: Path, **keys: Any) -> Plan:
    tiny.write_calibration(folder / "c.jsonl", 1, seed=0)
    entry = {"model": "tuned", "calibration": "c.jsonl"}
    raw = {"merge_method": "expert_merging", "base_model": "base", "models": [entry], **keys}
    (folder / "merge.yaml").write_text(yaml.safe_dump(raw))
    return plan_of(folder / "merge.yaml")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sampled", [False, True])
def test_the_share_is_that_of_the_squared_differences(
    tmp_path: Path, dtype: torch.dtype, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sampled:
        for name, value in {"RANGE": 64, "TENSORS": 8}.items():
            monkeypatch.setattr(module, name, value)
    base, tuned = tiny.make_model(), tiny.make_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if "embed" in name else 0.1))
    tiny.save(base, tmp_path / "base", dtype, sharded=True)
    tiny.save(tuned, tmp_path / "tuned", dtype)
    made = plan(tmp_path)
    ours, theirs = base.to(dtype).state_dict(), tuned.to(dtype).state_dict()
    change = {name: float((theirs[name].double() - ours[name].double()).square().sum()) for name in ours}
    exact = sum(value for name, value in change.items() if name not in made.merged) / sum(change.values())
    assert exact > 0.3
    [(name, share)] = left_out(made)
    assert (name, share) == ("tuned", pytest.approx(exact, rel=0.1 if sampled else 1e-4))
    [line] = left_out_lines(made, left_out(made))
    assert line.startswith("tuned: ") and "exclude: []" in line
    assert left_out(plan(tmp_path, exclude=[])) == []


def plan_with_same(folder: Path, base: Any) -> Plan:
    tiny.save(base, folder / "tuned")
    return plan(folder)


def test_an_expert_that_changes_merged_tensors_only_leaves_nothing_out(tmp_path: Path) -> None:
    base = tiny.make_model()
    tiny.save(base, tmp_path / "base")
    assert left_out(plan_with_same(tmp_path, base)) == []
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight.add_(1)
    tiny.save(base, tmp_path / "tuned")
    made = plan(tmp_path)
    assert left_out(made) == [("tuned", 0.0)] and "exclude" not in left_out_lines(made, left_out(made))[0]


def test_factors_of_an_adapter_count_without_their_product(tmp_path: Path) -> None:
    built = build(tmp_path, tiny.make_model(), r=2, lora_alpha=4, target_modules=["q_proj", "embed_tokens"])
    built.adapter.rename(tmp_path / "tuned")
    change = {
        name: float((built.merged_tensors[name].double() - tensor.double()).square().sum())
        for name, tensor in built.base_tensors.items()
    }
    embedding = change["model.embed_tokens.weight"]
    [(name, share)] = left_out(plan(tmp_path))
    assert 0 < embedding < sum(change.values())
    assert (name, share) == ("tuned", pytest.approx(embedding / sum(change.values()), rel=1e-4))
