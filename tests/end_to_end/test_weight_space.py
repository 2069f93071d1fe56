"""Merges by weight-space methods through the real command line, with the config of a learned merge."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from identities import merge_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from engine.run.run_folder import check_output

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.usefixtures("warm")


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)], capture_output=True, text=True, timeout=240
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.slow
def test_the_same_config_merges_by_another_method_and_its_record_merges_again(
    llama_merge: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    ties = ("--set", "merge_method=ties", "--set", "parameters.density=0.4")
    ties += ("--set", "out_dtype=bfloat16", "--set", "rounding=stochastic")
    done = cli("merge", llama_merge, *ties, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "ties: " in done.stdout and "hidden_layers" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(out)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    base = weights(llama_merge.parent / "base")
    assert any(not torch.equal(tensor, base[name]) for name, tensor in weights(out).items())
    record = yaml.safe_load((out / "merge" / "config.yaml").read_text())
    assert record["merge_method"] == "ties" and record["parameters"]["density"] == 0.4
    hashed = [file for files in record["record"]["inputs"].values() for file in files]
    assert hashed and not any(file.endswith(".jsonl") for file in hashed)
    memory = json.loads((out / "merge" / "memory.json").read_text())
    assert {actor["role"] for actor in memory["actors"]} == {"driver", "shard 0"}
    assert {"starting", "writing", "hashing the inputs"} <= memory["seconds"].keys()
    assert "ties" in (out / "README.md").read_text()
    assert re.search(r"\bties\b", (out / "merge" / "report.html").read_text())

    again = cli("merge", llama_merge, *ties, "--out", out)
    assert again.returncode == 0 and str(out) in again.stdout and "--fresh" in again.stdout

    # The recorded config merges from any folder; three shards and small files do not change the weights.
    spread = tmp_path / "spread"
    options = ("--set", "cluster.shards=3", "--set", "max_shard_size=20KB")
    done = cli("merge", out / "merge" / "config.yaml", *options, "--out", spread)
    assert done.returncode == 0, done.stderr
    assert len(list(spread.glob("*.safetensors"))) > 2 and not (tmp_path / "spread.run").exists()
    repeated, first = weights(spread), weights(out)
    assert repeated.keys() == first.keys()
    assert all(torch.equal(repeated[name], first[name]) for name in first)
    survived = [json.loads((folder / "merge" / "rounding.json").read_text()) for folder in (out, spread)]
    assert survived[0]["tensors"] == survived[1]["tensors"] and survived[0]["rounding"] == "stochastic"
    assert survived[0]["survived"] == pytest.approx(1, abs=0.1)

    # --fresh replaces exactly what the record lists, and nothing else.
    (spread / "merge" / "evaluation.parquet").write_text("scores")
    other = ("merge", llama_merge, "--set", "merge_method=linear", "--out", spread, "--fresh")
    kept = cli(*other)
    assert kept.returncode == 2 and "'merge/evaluation.parquet'" in kept.stderr
    (spread / "merge" / "evaluation.parquet").unlink()
    done = cli(*other)
    assert done.returncode == 0, done.stderr
    files = {path.relative_to(spread).as_posix() for path in spread.rglob("*") if path.is_file()}
    assert set(yaml.safe_load((spread / "merge" / "config.yaml").read_text())["record"]["files"]) == files
    assert not [name for name in files if "-of-" in name]


@pytest.mark.slow
def test_one_model_an_expert(llama_merge: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    done = cli("merge", llama_merge, "--set", "merge_method=svd_intermediate", "--out", out)
    assert done.returncode == 0, done.stderr
    names = [entry["model"] for entry in yaml.safe_load(llama_merge.read_text())["models"]]
    for name in names:
        AutoModelForCausalLM.from_pretrained(out / name)
    assert not check_output(str(out), merge_of("another"), fresh=True), "its record lists all files"
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "merge", "README.md"])


@pytest.mark.slow
def test_thresholds_over_the_whole_model_do_not_depend_on_the_shards(llama_merge: Path, tmp_path: Path) -> None:
    options = ("merge_method=ties", "parameters.density=0.3", "parameters.trim=model", "parameters.divide_by=count")
    merged = []
    for shards in (1, 2):
        out = tmp_path / str(shards)
        wanted = [part for option in (*options, f"cluster.shards={shards}") for part in ("--set", option)]
        done = cli("merge", llama_merge, *wanted, "--out", out)
        assert done.returncode == 0, done.stderr
        assert "counting" in done.stdout, "the pass over all weights that finds the threshold"
        merged.append(weights(out))
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


@pytest.mark.slow
def test_a_stack_is_a_model_that_says_what_it_is_and_can_be_made_again(llama_merge: Path, tmp_path: Path) -> None:
    models, out, again = llama_merge.parent, tmp_path / "stack", tmp_path / "again"
    layers = [("base", [0, 3]), ("expert0", [1, 3])]
    sources = [{"model": str(models / name), "layer_range": taken} for name, taken in layers]
    config = tmp_path / "stack.yaml"
    slices = [{"sources": [source]} for source in sources]
    config.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices}))
    done = cli("merge", config, "--out", out)
    assert done.returncode == 0, done.stderr
    assert len(AutoModelForCausalLM.from_pretrained(out).model.layers) == 5
    merged, expert = weights(out), weights(models / "expert0")
    for name in (name for name in expert if ".layers.1." in name):
        assert torch.equal(merged[name.replace(".1.", ".3.")], expert[name])
    lines = json.loads((out / "merge" / "memory.json").read_text())["slices"]
    assert lines == ["layers 0 to 2: base[0:3]", "layers 3 to 4: expert0[1:3]"]
    assert all(line in (out / "merge" / "report.html").read_text() for line in lines)
    options = ("--set", "cluster.shards=2", "--set", "max_shard_size=20KB")
    done = cli("merge", out / "merge" / "config.yaml", *options, "--out", again)
    assert done.returncode == 0, done.stderr
    assert all(torch.equal(tensor, merged[name]) for name, tensor in weights(again).items())


def test_the_methods_are_listed() -> None:
    done = cli("methods")
    assert done.returncode == 0, done.stderr
    for name in ("expert_merging_pp", "adamerging", "dare_linear, dare_ta", "wudi2", "svd_intermediate", "slerp"):
        assert name in done.stdout


@pytest.mark.parametrize("method", ["linear", "wudi"])
def test_a_plan_of_a_weight_space_merge(llama_merge: Path, method: str) -> None:
    done = cli("plan", llama_merge, "--set", f"merge_method={method}")
    assert done.returncode == 0, done.stderr
    assert method in done.stdout and "hidden_layers" in done.stdout
