"""A learned merge on nodes with other numbers of CPUs: the same bits in targets, coefficients and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from conftest import plan_of
from plain import Plain

import actors.process
from actors.expert import Expert
from actors.trainer import Trainer
from engine.shards.local_shards import LocalShards
from engine.storage.local_folder import LocalFolder

# torch divides the sum of a whole tensor among its threads from 2¹⁵ elements on: here 300 · 128.
WIDE = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "max_position_embeddings": 512}


def write_merge(folder: Path) -> Path:
    folder.mkdir()
    base = tiny.make_model()
    tiny.save(base, folder / "base")
    for k in range(2):
        tiny.save(tiny.make_expert(base, seed=k + 1), folder / f"expert{k}")
        tiny.write_calibration(folder / f"expert{k}.jsonl", 1, seed=k, length=300)
    models = [{"model": f"expert{k}", "calibration": f"expert{k}.jsonl"} for k in range(2)]
    # The losses and task vectors of the defaults; one stage, a prior, and few steps save time.
    parameters: Mapping[str, Any] = {"weight": 0.3, "epochs": 2, "loss_tokens": "all"}
    config = {"merge_method": "expert_merging", "base_model": "base", "models": models, "parameters": parameters}
    (folder / "merge.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder / "merge.yaml"


def test_the_number_of_cpus_does_not_change_a_bit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key, value in WIDE.items():
        monkeypatch.setitem(tiny.COMMON, key, value)
    config = write_merge(tmp_path / "merge")
    before, found = torch.get_num_threads(), []
    try:
        for cpus in (1, 3):
            monkeypatch.setattr(actors.process, "usable_cpus", lambda cpus=cpus: cpus)
            run = Plain(plan_of(config), tmp_path / f"run{cpus}")
            (coefficients,) = run.run()
            assert torch.get_num_threads() == cpus
            losses = [(row["kl"], row["hidden"], row["grad_norm"]) for row in run.rows]
            found.append((coefficients.values, run.targets, losses))
    finally:
        torch.set_num_threads(before)
    (values, targets, losses), (other_values, other_targets, other_losses) = found
    for of_sample, tensors in targets.items():
        for name, packed in tensors.items():
            np.testing.assert_array_equal(other_targets[of_sample][name].data, packed.data)
    assert other_losses == losses
    np.testing.assert_array_equal(other_values, values)


def test_actors_have_the_threads_of_their_run(llama_merge: Path) -> None:
    before, plan = torch.get_num_threads(), plan_of(llama_merge)
    try:
        Expert(plan, 0, 3)
        assert torch.get_num_threads() == 3
        Trainer(plan, LocalShards(plan, threads=1, overlap=False), lambda target: target, threads=5)
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(before)


def test_an_actor_keeps_its_threads_after_a_survey(llama_merge: Path, tmp_path: Path) -> None:
    """Torch gives a new thread, here the actor's, the number that any thread has set last when it first needs one."""
    before, plan = torch.get_num_threads(), plan_of(llama_merge)

    def act() -> int:
        Expert(plan, 0, 3).survey(0, [0], LocalFolder(tmp_path))
        return torch.get_num_threads()

    try:
        with ThreadPoolExecutor(1) as actor:
            assert actor.submit(act).result() == 3
    finally:
        torch.set_num_threads(before)
