"""Compressions on a real Ray: the output, a second start, and the same bits with any number of shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import tiny
import transformers
import yaml
from errors import refused
from tiny_mixtures import make_mixture, mixtures, save_mixture

from cluster.driver import merge
from engine.compression.config import read_compression
from engine.config.reader import read_recorded
from engine.errors import OutputError
from engine.planning.planner import make_plan

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_ray")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compress")
    save_mixture(make_mixture("olmoe"), folder / "model")
    tiny.write_calibration(folder / "data.jsonl", 4, seed=0)
    return folder


def compress(folder: Path, out: Path, **more: Any) -> bool:
    config = {"model": "model", "compress": {"experts": 0.5}, "calibration": "data.jsonl", **more}
    (folder / "compress.yaml").write_text(yaml.safe_dump(config))
    return merge(make_plan(read_compression(folder / "compress.yaml"), folder), str(out))


def test_a_model_appears_with_its_record_and_is_not_computed_twice(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert compress(folder, out) and not compress(folder, out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert {len(module.gate.weight) for module in mixtures(model)} == {4}
    rows = pyarrow.parquet.read_table(out / "merge" / "experts.parquet").to_pylist()
    assert len(rows) == 16 and sum(row["dominant"] for row in rows) == 8
    recorded = read_recorded(out / "merge" / "config.yaml")
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert set(recorded["record"]["files"]) == files
    assert json.loads((out / "merge" / "memory.json").read_text())["expert_forwards"]
    assert not out.with_name("out.run").exists()
    # The recorded config is a config, and gives the same model again.
    (folder / "again.yaml").write_text((out / "merge" / "config.yaml").read_text())
    assert not merge(make_plan(read_compression(folder / "again.yaml"), folder), str(out))
    with refused(OutputError, str(out), facts=["compress.method"]):
        compress(folder, out, compress={"experts": 0.5, "method": "m_smoe"})


def test_shards_and_files_do_not_change_the_bits(folder: Path, tmp_path: Path) -> None:
    compress(folder, tmp_path / "one", cluster={"shards": 1})
    compress(folder, tmp_path / "two", cluster={"shards": 2}, max_shard_size="20KB")
    one, two = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 1
    assert all(bool((a == b).all()) for a, b in zip(one.parameters(), two.parameters(), strict=True))
