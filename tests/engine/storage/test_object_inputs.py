"""A merge whose base, experts and calibration files are in object storage: found, recorded, and the same anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import plan_of
from object_store import Store

from actors.shard import Shard
from engine.checkpoints.find import find_model
from engine.config.reader import load_config
from engine.errors import CalibrationError, CheckpointError, InputError
from engine.output.merge_record import input_files, write_config
from engine.output.resolved_config import resolved_config
from engine.planning.open_models import open_base
from engine.planning.planner import make_plan
from engine.run.identity import identity
from engine.storage.paths import locate


@pytest.fixture
def config(store: Store, llama_merge: Path, tmp_path: Path) -> Path:
    """The merge of `llama_merge` with everything in the store, and an optimizer's state that nobody needs beside it."""
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
    assert [one.calibration[0].read_bytes() for one in plan.experts] == [
        one.calibration[0].read_bytes() for one in other.experts
    ]
    copied = {path.name for path in (tmp_path / "cache" / "s3" / store.bucket / "a merge" / "base").iterdir()}
    assert "model.safetensors" in copied and "optimizer.pt" not in copied
    assert open_base(plan).read(plan.merged[0]).equal(open_base(other).read(plan.merged[0]))


def test_a_record_names_the_store_and_runs_from_anywhere(
    config: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(config)
    this, words = identity(plan), input_files(plan)
    merge = f"{store.root}/a merge"
    assert words == {
        f"{merge}/base": [f"{merge}/base/model.safetensors"],
        **{f"expert{k}": [f"{merge}/expert{k}/model.safetensors", f"{merge}/expert{k}.jsonl"] for k in range(2)},
    }
    resolved = resolved_config(plan)
    assert resolved["base_model"] == f"{merge}/base"
    assert [model["calibration"] for model in resolved["models"]] == [[f"{merge}/expert{k}.jsonl"] for k in range(2)]

    # Another machine: nothing is in its cache, and nothing of this one's may be used.
    (tmp_path / "cache").rename(tmp_path / "gone")
    monkeypatch.setenv("EXPERT_MERGING_CACHE", str(tmp_path / "elsewhere"))
    files = sorted({file for mine in words.values() for file in mine})
    digests = Shard(plan, 0).digests(files)
    assert list(digests) == files and len(set(digests.values())) == 5
    again = tmp_path / "again.yaml"
    write_config(again, plan, this, {})
    assert identity(plan_of(again)) == this
    store.put("a merge/expert0.jsonl", b'{"input_ids": [5, 6]}\n')
    assert identity(plan_of(again)) != this


def test_addresses_among_other_words(config: Path, store: Store, llama_merge: Path) -> None:
    base = llama_merge.parent / "base"
    assert plan_of(config, f"base_model=file://{base}").base.model == str(base)
    tokenizer = plan_of(config, f"tokenizer_source={store.root}/a merge/expert0")
    assert tokenizer.tokenizer == f"{store.root}/a merge/expert0"
    assert find_model(f"file://{base}", Path("/")) == base
    for expert in ("s3://bucket/a+b", f"{store.root}/none+{store.root}/lora"):
        with pytest.raises(CheckpointError) as caught:
            plan_of(config, f"models.0.model={expert}")
        assert caught.value.where == expert.partition("+s3:")[0]


def test_what_is_not_there_is_told_by_its_address(config: Path, store: Store) -> None:
    with pytest.raises(CheckpointError, match="no such object") as caught:
        plan_of(config, f"base_model={store.root}/none")
    assert caught.value.where == f"{store.root}/none" and "*.safetensors" in caught.value.expected
    for name in ("none.jsonl", "a merge"):
        with pytest.raises(CalibrationError, match=f"{store.root}/{name}: there is no such object"):
            make_plan(load_config(config, [f"models.1.calibration={store.root}/{name}"]), config.parent)
    with pytest.raises(InputError, match="cannot stand here"):
        locate("s3://bucket/merged", Path("/"))
