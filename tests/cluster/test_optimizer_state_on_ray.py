"""A merge on a real Ray by the squared gradients of the experts' trainings, without any samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from cluster_helpers import run_merge
from conftest import plan_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from cluster.driver import merge
from engine.config.reader import collected, load_config
from engine.planning.planner import make_plan

pytestmark = pytest.mark.usefixtures("small_ray")

DENSITY = 0.4


def trained(folder: Path, seed: int) -> dict[str, Tensor]:
    """Write optimizer.pt, as the Trainer of transformers does, and return the means of squares by name."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    groups = [[one for one in model.parameters() if (one.dim() > 1) == large] for large in (True, False)]
    optimizer = torch.optim.AdamW([{"params": parameters} for parameters in groups])
    ids = torch.randint(3, 50, (1, 12), generator=torch.Generator().manual_seed(seed))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return {name: optimizer.state[one]["exp_avg_sq"] for name, one in model.named_parameters()}


def test_states_of_trainings_take_the_place_of_samples(tmp_path: Path) -> None:
    config = tiny.make_merge(tmp_path / "merge", experts=2)
    folders = [config.parent / f"expert{k}" for k in range(2)]
    squares = [trained(folder, k) for k, folder in enumerate(folders)]
    options = ["merge_method=ota_ffg", "exclude=[]", f"parameters.density={DENSITY}", "cluster.shards=2"]
    options += [f"models.{k}.calibration=[]" for k in range(2)]
    states = [f"models.{k}.optimizer_state={folder / 'optimizer.pt'}" for k, folder in enumerate(folders)]
    out = run_merge(plan_of(config, *options, *states), tmp_path / "out")
    # As statistics to be published, they give the same bits.
    wanted = collected(load_config(config, [*options, *states]), ("fisher",), False, "config")
    assert merge(make_plan(wanted, config.parent), str(tmp_path / "statistics"))
    given = [f"models.{k}.statistics={tmp_path / 'statistics' / folder.name}" for k, folder in enumerate(folders)]
    same = run_merge(plan_of(config, *options, *given), tmp_path / "same")
    assert (same / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    merged = safetensors.torch.load_file(out / "model.safetensors")
    base, *experts = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (config.parent / "base", *folders)
    )
    above = {name: torch.zeros(tensor.shape) for name, tensor in base.items()}
    below = {name: torch.zeros(tensor.shape) for name, tensor in base.items()}
    for expert, square in zip(experts, squares, strict=True):
        scores = {name: square[name].sqrt() * (expert[name].float() - base[name].float()).abs() for name in base}
        ranked = torch.cat([score.flatten() for score in scores.values()]).sort(descending=True).values
        for name, score in scores.items():
            weight = torch.where(score >= ranked[int(DENSITY * len(ranked)) - 1], square[name].sqrt(), 0)
            above[name] += weight * (expert[name].float() - base[name].float())
            below[name] += weight
    for name, tensor in base.items():
        expected = tensor.float() + torch.where(below[name] > 0, above[name] / below[name], 0)
        torch.testing.assert_close(merged[name].float(), expected.to(merged[name].dtype).float(), rtol=0, atol=1e-6)
