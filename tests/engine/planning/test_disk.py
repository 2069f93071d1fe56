"""Disk space: the bytes of a merge against what a merge stores, and the refusal of a disk that lacks room."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from conftest import plan_of
from errors import refused
from plain import task_vectors
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import cluster.driver
import cluster.session
from engine.calibration.samples import Sample
from engine.config.reader import collected, load_config
from engine.errors import ClusterError
from engine.learning.frozen_expert import FrozenExpert
from engine.learning.statistics import collect
from engine.planning.costs import disk
from engine.planning.costs.disk import DiskNeeds, DiskRoom, check_disk, disk_needs, shortage
from engine.planning.planner import make_plan
from engine.shards.orthogonal import FOLDER, orthogonalise
from engine.storage.local_folder import LocalFolder


def full(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(disk, "shutil", SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=free)))


def weights(plan: Any) -> int:
    return sum(tensor.nbytes for tensor in plan.base_header.tensors.values())


def test_needs_of_the_output_and_the_targets(llama_merge: Path) -> None:
    plan = plan_of(llama_merge, "parameters.task_vectors=whole", "parameters.hidden_layers=[1, 2]")
    hidden = plan.base_header.text_config["hidden_size"]
    needs = disk_needs(plan, [[10, 20], [5]])
    assert needs == DiskNeeds(weights(plan), 0, 35 * 3 * hidden * 4)
    assert needs.total == needs.output + needs.targets
    assert disk_needs(plan_of(llama_merge, "out_dtype=bfloat16")).output == weights(plan) // 2


def test_a_merged_head_makes_targets_of_logits(llama_merge: Path) -> None:
    plan = plan_of(llama_merge, "exclude=[]", "parameters.hidden_layers=[]")
    assert disk_needs(plan, [[7]]).targets == 7 * plan.base_header.vocab_size * 4


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads a deprecated attribute
@pytest.mark.parametrize("adapter", [False, True])
def test_needs_of_orthogonal_task_vectors_are_what_is_stored(
    make_merge: Callable[..., Path], tmp_path: Path, adapter: bool
) -> None:
    config = make_merge()
    if adapter:
        target = config.parent / "expert1"
        shutil.rmtree(target)
        options = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        base = AutoModelForCausalLM.from_pretrained(config.parent / "base")
        peft.get_peft_model(base, options).save_pretrained(target)
    plan = plan_of(config, "parameters.task_vectors=orthogonal")
    orthogonalise(plan, task_vectors(plan), LocalFolder(tmp_path / "state"), plan.orthogonal)
    files = list((tmp_path / "state" / FOLDER).iterdir())
    stored = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert disk_needs(plan).orthogonal == stored > 0
    assert disk_needs(plan).parts > 0 == disk_needs(plan, stored=True).parts, "they are removed when these are stored"


def test_a_model_per_expert(llama_merge: Path) -> None:
    plan = plan_of(llama_merge, "merge_method=svd_intermediate")
    assert disk_needs(plan) == DiskNeeds(2 * weights(plan))


def test_what_a_disk_lacks_is_said_with_numbers() -> None:
    needs = DiskNeeds(3_000_000, 2_000_000, 1_000)
    assert shortage(needs, DiskRoom(free=5_001_000, held=0)) == ""
    assert shortage(needs, DiskRoom(free=1_000, held=5_000_000)) == "", "an earlier start has stored the rest"
    line = shortage(needs, DiskRoom(free=4_000_000, held=20_000))
    assert all(number in line for number in ("5.0 MB", "20.0 kB", "4.0 MB", "3.0 MB", "2.0 MB", "1.0 kB"))


def test_what_an_earlier_start_has_stored_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "out.run" / "targets").mkdir(parents=True)
    (tmp_path / "out.run" / "targets" / "0-0").write_bytes(bytes(600))
    out = tmp_path / "out"
    full(monkeypatch, 400)
    held = DiskRoom.of(str(out))
    assert held is not None and held.free == 400 and held.held >= 600
    assert DiskRoom.of("s3://bucket/out") is None
    check_disk(DiskNeeds(1000), str(out))
    with refused(ClusterError, where=str(out), do="--out", facts=["400 bytes"]):
        check_disk(DiskNeeds(100_000), str(out))
    check_disk(DiskNeeds(100_000), "s3://bucket/out")


def test_a_merge_is_refused_before_ray_and_leaves_nothing(
    llama_merge: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster.session, "connect", lambda *_: pytest.fail("Ray was started"))
    full(monkeypatch, 1000)
    with refused(ClusterError, where=str(tmp_path / "out"), do="free disk", facts=["1.0 kB"]):
        cluster.driver.merge(plan_of(llama_merge), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_is_solved_block_by_block_stores_the_model_what_is_solved_and_the_shares_of_a_layer(
    llama_merge: Path,
) -> None:
    options = "merge_method=task_arithmetic", "calibrate=featcal"
    plan = plan_of(llama_merge, *options)
    needs = disk_needs(plan)
    # Hidden size 32, 16 rows of keys and values, 48 features of the MLP; 2 experts, float32.
    squares = 6 * 32**2 + 48**2
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + squares
    assert needs.blocks == needs.output + 4 * (sum(plan.numels.values()) + 2 * layer)
    assert needs.total == needs.output + needs.blocks
    assert disk_needs(plan_of(llama_merge)).blocks == 0
    # Until the end, merged tensors are float32.
    halves = disk_needs(plan_of(llama_merge, *options, "out_dtype=bfloat16"))
    assert (halves.output, halves.blocks) == (needs.output // 2, needs.blocks)


def test_steps_on_single_tensors_need_no_disk(llama_merge: Path) -> None:
    options = "merge_method=task_arithmetic", "calibrate=svc"
    assert disk_needs(plan_of(llama_merge, *options)) == disk_needs(plan_of(llama_merge, options[0]))


@pytest.mark.parametrize("kinds", [("activations",), ("gram",), ("fisher",), ("sensitivity",), ("gram", "fisher")])
def test_needs_of_statistics_are_what_is_collected(llama_merge: Path, tmp_path: Path, kinds: tuple[Any, ...]) -> None:
    config = collected(load_config(llama_merge), kinds, False, "config")
    plan, sample = make_plan(config, llama_merge.parent), Sample(0, 0, (5, 9, 33, 12, 7, 41), "here")
    needs = disk_needs(plan, [[6 * 40], [6]])
    many = [(replace(sample, index=index), {}) for index in range(40)]
    collect(FrozenExpert(plan, 0, torch.device("cpu")), many, kinds, LocalFolder(tmp_path), {"base": {}, "model": {}})
    stored = sum(tensor.nbytes for file in tmp_path.glob("*.safetensors") for tensor in load_file(file).values())
    assert needs == DiskNeeds(0, statistics=len(plan.experts) * stored)
