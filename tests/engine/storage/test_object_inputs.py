"""A merge with base, experts and calibration files in object storage: plan, record and identity."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import plan_of
from errors import refused
from object_store import Store

from actors.shard import Shard
from engine.checkpoints.find import find_model
from engine.config.reader import load_config
from engine.errors import CalibrationError, CheckpointError, InputError
from engine.output.merge_record import input_files, write_config
from engine.output.resolved_config import resolved_config
from engine.planning.open_models import open_base
from engine.planning.planner import make_plan
from engine.run.inputs import identity
from engine.storage.paths import locate


@pytest.fixture
def config(store: Store, llama_merge: Path, tmp_path: Path) -> Path:
    """The merge of `llama_merge` with everything in the store, and an unneeded optimizer state next to the base."""
    merge = store.put_all(llama_merge.parent, "a merge")
    store.put("a merge/base/optimizer.pt", b"large")
    raw = yaml.safe_load(llama_merge.read_text())
    raw["base_model"] = f"{merge}/base"
    for model in raw["models"]:
        model["name"] = model["model"]
        model["model"], model["calibration"] = f"{merge}/{model['model']}/", f"{merge}/{model['calibration']}"
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_plan_is_the_same_as_from_a_disk(config: Path, llama_merge: Path, store: Store, tmp_path: Path) -> None:
    plan, other = plan_of(config), plan_of(llama_merge)
    assert plan.merged == other.merged and plan.base_header.tensors == other.base_header.tensors
    assert [expert.model for expert in plan.experts] == [f"{store.root}/a merge/expert{k}/" for k in range(2)]
    assert [expert.calibration[0].read_bytes() for expert in plan.experts] == [
        expert.calibration[0].read_bytes() for expert in other.experts
    ]
    copied = {path.name for path in (tmp_path / "cache" / "s3" / store.bucket / "a merge" / "base").iterdir()}
    assert "model.safetensors" in copied and "optimizer.pt" not in copied
    assert open_base(plan).read(plan.merged[0]).equal(open_base(other).read(plan.merged[0]))


def test_a_record_names_the_store_and_runs_from_anywhere(
    config: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(config)
    before, inputs = identity(plan), input_files(plan)
    merge = f"{store.root}/a merge"
    assert inputs == {
        f"{merge}/base": [f"{merge}/base/model.safetensors"],
        **{f"expert{k}": [f"{merge}/expert{k}/model.safetensors", f"{merge}/expert{k}.jsonl"] for k in range(2)},
    }
    resolved = resolved_config(plan)
    assert resolved["base_model"] == f"{merge}/base"
    assert [model["calibration"] for model in resolved["models"]] == [[f"{merge}/expert{k}.jsonl"] for k in range(2)]

    # As on another machine: its cache is empty, and the files of this one are gone.
    (tmp_path / "cache").rename(tmp_path / "gone")
    monkeypatch.setenv("EXPERT_MERGING_CACHE", str(tmp_path / "elsewhere"))
    files = sorted({file for group in inputs.values() for file in group})
    digests = Shard(plan, 0).digests(files)
    assert list(digests) == files and len(set(digests.values())) == 5
    again = tmp_path / "again.yaml"
    write_config(again, plan, before.encode(), {})
    assert not before.differences(identity(plan_of(again)))
    store.put("a merge/expert0.jsonl", b'{"input_ids": [5, 6]}\n')
    assert before.differences(identity(plan_of(again))) == [f"{merge}/expert0.jsonl changed"]


def test_addresses_in_other_keys(config: Path, store: Store, llama_merge: Path) -> None:
    base = llama_merge.parent / "base"
    assert plan_of(config, f"base_model=file://{base}").base.model == str(base)
    tokenizer = plan_of(config, f"tokenizer_source={store.root}/a merge/expert0")
    assert tokenizer.tokenizer == f"{store.root}/a merge/expert0"
    assert find_model(f"file://{base}", Path("/")) == base
    for expert in ("s3://bucket/a+b", f"{store.root}/none+{store.root}/lora"):
        with pytest.raises(CheckpointError) as caught:
            plan_of(config, f"models.0.model={expert}")
        assert caught.value.where == expert.partition("+s3:")[0]


def test_a_missing_object_is_named_by_its_address(config: Path, store: Store) -> None:
    with pytest.raises(CheckpointError) as caught:
        plan_of(config, f"base_model={store.root}/none")
    assert caught.value.where == f"{store.root}/none" and "*.safetensors" in caught.value.expected
    for name in ("none.jsonl", "a merge"):
        with refused(CalibrationError, where=f"{store.root}/{name}"):
            make_plan(load_config(config, [f"models.1.calibration={store.root}/{name}"]), config.parent)
    with refused(InputError, where="s3://bucket/merged"):
        locate("s3://bucket/merged", Path("/"))
