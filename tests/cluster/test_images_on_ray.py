"""Whole merges of a vision-language model on a real Ray: the invariants of text models hold for images, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny_images
from cluster_helpers import KillOnce, result, run_merge
from conftest import plan_of
from plain import Plain

from engine.calibration.image_encoder import ImageEncoder
from engine.storage.sealed import unseal
from engine.task_vectors.coefficients import read_coefficients

pytestmark = pytest.mark.slow
# Of the families in transformers, the one with the most inputs in addition to tokens and pixels.
FAMILY = "qwen2_5_vl"
SAMPLES = 3 + 2
# The vision tower is merged, too; its gradients depend on the images alone.
OPTIONS: dict[str, Any] = {"parameters": {"budget": 1.5}, "exclude": ["vision.*k_proj.bias"]}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_images.make_merge(tmp_path_factory.mktemp("merge"), FAMILY, cluster={"shards": 1}, **OPTIONS)


class Seen:
    """Records the files in a run's folder whenever the run advances.

    Attributes:
        run: The folder of the run.
        inputs: For each call of `look`, the modification time of each file of inputs.
        targets: The keys of each file of targets.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.inputs: list[dict[str, int]] = []
        self.targets: dict[str, set[str]] = {}

    def look(self, phase: str) -> None:
        self.inputs.append({path.name: path.stat().st_mtime_ns for path in (self.run / "inputs").iterdir()})
        for path in (self.run / "targets").glob("*.safetensors"):
            if path.name not in self.targets:
                self.targets[path.name] = set(safetensors.torch.load(unseal(path.read_bytes(), str(path))))


@pytest.fixture(scope="module")
def seen(small_ray: None, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """The reference merge, with a single shard, and the files that its run stored."""
    out = tmp_path_factory.mktemp("out") / "merged"
    found = Seen(out.with_name("merged.run"))
    run_merge(plan_of(config), out, found.look)
    return found


@pytest.fixture(scope="module")
def merged(seen: Seen) -> Path:
    return seen.run.with_name("merged")


@pytest.mark.usefixtures("small_ray")
def test_it_is_what_the_plain_classes_compute(config: Path, merged: Path, tmp_path: Path) -> None:
    plan = plan_of(config)
    assert any("visual" in name for name in plan.merged)
    for stage, table in enumerate(Plain(plan, tmp_path).run(), start=1):
        models, got = read_coefficients(merged / "merge" / "coefficients.parquet", stage)
        assert models == ["expert0", "expert1"]
        assert got.layout == table.layout
        np.testing.assert_array_equal(got.values, table.values.astype(np.float32))


def test_each_sample_is_prepared_and_run_forward_once(merged: Path, seen: Seen) -> None:
    names = {f"{k}-{i}.safetensors" for k, samples in enumerate((3, 2)) for i in range(samples)}
    assert seen.inputs[0].keys() == names
    assert all(look == seen.inputs[0] for look in seen.inputs), "written once, before the first target"
    assert seen.targets.keys() == names
    assert not any(key.startswith("inputs.") for keys in seen.targets.values() for key in keys)
    figures = json.loads((merged / "merge" / "memory.json").read_text())
    assert figures["expert_forwards"] == SAMPLES, "the stages share them"
    assert not seen.run.exists(), "removed at the end of the merge"


# Starting the processes dominates the time of a merge, so other placements are tested along with faults.
@pytest.mark.usefixtures("small_ray")
def test_two_shards_and_actors_that_are_killed_change_no_bit(config: Path, merged: Path, tmp_path: Path) -> None:
    kill_once = KillOnce({"targets": "ray::Expert", "stage 1": "ray::Trainer"})
    other = run_merge(plan_of(config, "cluster.shards=2"), tmp_path / "merged", kill_once)
    assert not kill_once.missed
    assert result(other) == result(merged)


@pytest.mark.usefixtures("small_ray")
def test_a_run_that_was_stopped_goes_on_within_the_trainer_and_prepares_no_image_again(
    config: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at_the_second_target(phase: str) -> None:
        if phase == "targets" and len(list((state / "targets").iterdir())) > 1:
            raise KeyboardInterrupt

    def again(*_: object) -> None:
        raise AssertionError("prepared again")

    plan, out, state = plan_of(config, "cluster.shards=0"), tmp_path / "merged", tmp_path / "merged.run"
    with pytest.raises(KeyboardInterrupt):
        run_merge(plan, out, stop_at_the_second_target)
    assert not out.exists() and len(list((state / "inputs").iterdir())) == SAMPLES
    assert len(list((state / "targets").iterdir())) > 1
    assert not list(state.glob("stage-*.safetensors"))
    monkeypatch.setattr(ImageEncoder, "encode", again)
    run_merge(plan, out)
    assert result(out) == result(merged)
    figures = json.loads((out / "merge" / "memory.json").read_text())
    assert figures["expert_forwards"] == SAMPLES, "targets that were stored are not computed again"
    assert figures["bytes_trainer_to_shards"] == figures["bytes_shards_to_trainer"] == 0
