"""Merges through the real command line, from YAML to a folder that loads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pyarrow.parquet
import pytest
import tiny
import torch
import yaml
from cluster_helpers import stopped
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("warm")


def cli(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, ROOT / "cli.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=cwd,
        env=environment,
        check=False,
    )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with merge.yaml: a full expert with chat prompts, and a LoRA adapter with text."""
    folder = tmp_path_factory.mktemp("mixed")
    base = tiny.make_model("qwen3", tied=True)
    tiny.save(base, folder / "base", torch.bfloat16)
    tiny.save_tokenizer(folder / "base")
    tiny.save(tiny.make_expert(base, seed=1), folder / "full", torch.bfloat16)
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated name of transformers
        peft.get_peft_model(base, options).save_pretrained(folder / "adapter")
    questions = [{"question": "w1 w2 w3"}, {"question": "w4 w5", "response": "w6"}, {"question": "w7 " * 60}]
    (folder / "full.json").write_text(json.dumps(questions))
    (folder / "adapter.jsonl").write_text(
        "".join(json.dumps({"text": f"w{i} w{i + 1} w{i + 2} w9"}) + "\n" for i in range(4))
    )
    config = {
        "merge_method": "expert_merging_pp",
        "base_model": "base",
        "models": [
            {"model": "full", "calibration": "full.json", "parameters": {"weight": 0.4}},
            {"model": "adapter", "calibration": "adapter.jsonl", "parameters": {"weight": 0.3}},
        ],
        "parameters": {"gradient_accumulation": 4, "budget": 1.5},
        "calibration": {"max_length": 40, "generate_responses": 5},
        "out_dtype": "float32",
    }
    (folder / "merge.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_a_merge_from_yaml_to_a_model_that_answers(mixed: Path) -> None:
    done = cli("merge", "--out", "result", cwd=mixed)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"config: {mixed / 'merge.yaml'}" in done.stdout
    assert any("2 experts" in line and str(mixed / "result") in line for line in done.stdout.splitlines())
    assert re.search(r"full\.json record 3: .*max_length 40\b.*\d+ tokens", done.stdout)
    out = mixed / "result"
    expected = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md", "merge"}
    assert expected <= {path.name for path in out.iterdir()}
    record = {"config.yaml", "coefficients.parquet", "importance.parquet", "metrics.parquet", "memory.json"}
    record |= {"report.html", "identity.json", "files.json", "rounding.json", "coefficients.png", "end_check.parquet"}
    assert {path.name for path in (out / "merge").iterdir()} == record
    assert not (mixed / "result.run").exists()

    model = AutoModelForCausalLM.from_pretrained(out)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}, "out_dtype"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.generate(**tokenizer("w1 w2", return_tensors="pt"), max_new_tokens=3).shape[1] > 2
    rows = pyarrow.parquet.read_table(out / "merge" / "metrics.parquet").to_pylist()
    assert {row["model"] for row in rows} == {"full", "adapter"} and {row["stage"] for row in rows} == {1, 2}
    card = (out / "README.md").read_text()
    assert "Expert Merging++" in card and "from_pretrained" in card and "| adapter | adapter | 0.3 |" in card
    record_of = yaml.safe_load((out / "merge" / "config.yaml").read_text())["record"]
    assert record_of["versions"]["torch"] == torch.__version__
    assert all(
        re.fullmatch("[0-9a-f]{64}", digest) for files in record_of["inputs"].values() for digest in files.values()
    )

    assert set(record_of["files"]) == {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}

    again = cli("merge", "--out", "result", cwd=mixed)
    assert again.returncode == 0 and str(out) in again.stdout and "--fresh" in again.stdout
    other = cli("merge", "--out", "result", "--set", "seed=1", cwd=mixed)
    assert other.returncode == 2 and str(out) in other.stderr and "--fresh" in other.stderr


@pytest.mark.slow
def test_a_weight_that_is_not_finite_is_found_and_nothing_is_left(tmp_path: Path) -> None:
    config = tiny.make_merge(tmp_path / "merge", experts=2)
    expert = AutoModelForCausalLM.from_pretrained(tmp_path / "merge" / "expert1")
    with torch.no_grad():
        expert.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    tiny.save(expert, tmp_path / "merge" / "expert1")
    done = cli("merge", config, "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert "expert 'expert1'" in done.stderr and "'model.layers.1.mlp.up_proj.weight'" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merge"]


@pytest.mark.slow
def test_missing_resources_are_reported_with_numbers(tmp_path: Path) -> None:
    config = tiny.make_merge(tmp_path / "merge", experts=2)
    wanted = ("--set", "cluster.trainer.num_gpus=4", "--set", "cluster.wait=2")
    done = cli("merge", config, "--out", tmp_path / "out", *wanted)
    assert done.returncode == 3, done.stderr
    facts = ["trainer", "4 GPUs", "1 node", "0 GPUs", "num_gpus"]
    assert [fact for fact in facts if fact not in done.stderr] == [], done.stderr
    assert "0 of 2 s" in done.stdout


def test_no_cluster_at_an_address(tmp_path: Path) -> None:
    config = tiny.make_merge(tmp_path / "merge", experts=2)
    done = cli("merge", config, "--out", tmp_path / "out", "--address", "127.0.0.1:1")
    assert done.returncode == 3, done.stderr
    assert "127.0.0.1:1" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merge"]


@pytest.mark.slow
def test_a_stopped_merge_is_resumed_by_the_same_command(tmp_path: Path) -> None:
    config = tiny.make_merge(tmp_path / "merge", merge_method="expert_merging", parameters={"epochs": 8})
    command = [sys.executable, ROOT / "cli.py", "merge", config, "--out", tmp_path / "out"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    code, message = stopped(command, environment)
    assert code == 130, message
    assert "stopped" in message and "Traceback" not in message
    assert not (tmp_path / "out").exists() and (tmp_path / "out.run" / "stage-1.safetensors").exists()
    done = cli("merge", config, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert re.search(r"targets: 7 \(7 done before\)", done.stdout)
    assert re.search(r"stage 1: \d+ \(\d+ done before\)", done.stdout)
    assert re.search(r"stage 1, step \d+ of 22; 7 of 7 targets", done.stdout)
    assert json.loads((tmp_path / "out" / "merge" / "memory.json").read_text())["expert_forwards"] == 7
    record = tmp_path / "out" / "merge"
    assert pyarrow.parquet.read_table(record / "coefficients.parquet")["stage"].unique().to_pylist() == [1]
    assert not (record / "importance.parquet").exists(), "stage 1 alone has no importance"
