"""Wrong input through the command line: exit code 2, one clear message, no traceback, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import cli

ROOT = Path(cli.__file__).resolve().parent
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(llama_merge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a merge, to be spoilt, and the working directory; Ray may not start."""
    import ray

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Ray was started for input that is wrong")

    monkeypatch.setattr(ray, "init", refuse)
    folder = shutil.copytree(llama_merge.parent, tmp_path / "in")
    monkeypatch.chdir(folder)
    return folder


def edit_yaml(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = yaml.safe_load((folder / "merge.yaml").read_text())
    change(config)
    (folder / "merge.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def index_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    weights = dict.fromkeys(load_file(folder.parent / "x.safetensors"), "../x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def for_all_models(folder: Path, change: Callable[[Path], Any]) -> None:
    for model in ("base", "expert0", "expert1"):
        change(folder / model)


def everything(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def run(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli.main, list(arguments))


def told(result: click.testing.Result, code: int = 2) -> str:
    """The one message on stderr of a run that ended with `code`."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 4, "one or a few lines"
    return result.stderr


# What is spoilt, and the words that the message must have; all of it is in config and headers, so `plan` finds it too.
PLANNED: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "unknown key": (
        lambda f: edit_yaml(f, lambda c: c["parameters"].update(temprature=2)),
        ["merge.yaml:", "unknown key 'parameters.temprature'", "did you mean 'temperature'?"],
    ),
    "unknown key with a dash": (
        lambda f: edit_yaml(f, lambda c: c["parameters"].update({"learning-rate": 2})),
        ["merge.yaml:", "unknown key 'parameters.learning-rate'", "'learning_rate'"],
    ),
    "wrong type": (
        lambda f: edit_yaml(f, lambda c: c["parameters"].update(temperature=[1])),
        ["merge.yaml:", "parameters.temperature is [1]", "expected: "],
    ),
    "not YAML": (lambda f: (f / "merge.yaml").write_text("a: [\n"), ["merge.yaml:", "not valid YAML"]),
    "impossible date": (lambda f: (f / "merge.yaml").write_text("a: 2020-13-45\n"), ["merge.yaml", "YAML"]),
    "not UTF-8": (lambda f: (f / "merge.yaml").write_bytes(b"\xff"), ["merge.yaml", "UTF-8"]),
    "empty config": (lambda f: (f / "merge.yaml").write_text(""), ["merge.yaml", "not a mapping"]),
    "other method": (
        lambda f: edit_yaml(f, lambda c: c.update(merge_method="tie")),
        ["merge.yaml:1: there is no method 'tie'", "did you mean 'ties'?"],
    ),
    "prior of 1": (
        lambda f: edit_yaml(f, lambda c: c["models"][1]["parameters"].update(weight=1.0)),
        ["merge.yaml:", "the prior of expert 'expert1' is 1", "above 0 and below 1"],
    ),
    "duplicate names": (
        lambda f: edit_yaml(f, lambda c: c["models"][1].update(name="expert0")),
        ["merge.yaml:", "two experts are called 'expert0'"],
    ),
    "no calibration": (
        lambda f: edit_yaml(f, lambda c: c["models"][1].pop("calibration")),
        ["merge.yaml:", "'expert1' has no calibration"],
    ),
    "hidden layers out of range": (
        lambda f: edit_yaml(f, lambda c: c["parameters"].update(hidden_layers=[1, 4])),
        ["hidden_layers names 4", "indices 0 to 3"],
    ),
    "exclude leaves nothing": (lambda f: edit_yaml(f, lambda c: c.update(exclude=[".*"])), ["`exclude` leaves no"]),
    "missing calibration file": (lambda f: (f / "expert1.jsonl").unlink(), ["'expert1'", "expert1.jsonl"]),
    "missing model folder": (
        lambda f: edit_yaml(f, lambda c: c["models"][0].update(model="./expert7")),
        ["expert7", "no such model folder"],
    ),
    "home of nobody": (
        lambda f: edit_yaml(f, lambda c: c["models"][0].update(model="~no-such-user/expert7")),
        ["~no-such-user/expert7"],
    ),
    "unknown hub id": (
        lambda f: edit_yaml(f, lambda c: c["models"][0].update(model="nobody/none-of-this-name")),
        ["nobody/none-of-this-name", "the hub does not give it"],
    ),
    "no config.json": (lambda f: (f / "expert0" / "config.json").unlink(), ["expert0/config.json", "cannot be read"]),
    "config.json not JSON": (
        lambda f: (f / "base" / "config.json").write_text("{"),
        ["base/config.json", "not valid JSON"],
    ),
    "truncated weights": (
        lambda f: truncate(f / "expert1" / "model.safetensors"),
        ["expert1/model.safetensors", "not a whole safetensors file"],
    ),
    "no weights": (lambda f: (f / "expert1" / "model.safetensors").unlink(), ["expert1", "no safetensors weights"]),
    "index outside the folder": (
        lambda f: index_outside(f / "expert1"),
        ["model.safetensors.index.json", "outside the model's folder: '../x.safetensors'"],
    ),
    "expert lacks a tensor": (
        lambda f: edit_tensors(f / "expert0", lambda t: t.pop(Q)),
        ["expert 'expert0'", "lacks 1", Q],
    ),
    "expert has another shape": (
        lambda f: edit_tensors(f / "expert0", lambda t: t.update({Q: torch.ones(32, 16)})),
        ["expert 'expert0'", Q, "(32, 16)", "(32, 32)"],
    ),
    "other architecture": (
        lambda f: tiny.save(tiny.make_model("qwen2"), f / "expert0"),
        ["expert 'expert0'", "Qwen2ForCausalLM", "LlamaForCausalLM"],
    ),
    "other vocabulary": (
        lambda f: edit_json(f / "expert1" / "config.json", vocab_size=80),
        ["expert 'expert1'", "80", "64"],
    ),
    "adapter of a variant": (
        lambda f: (f / "expert0" / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true}'),
        ["adapter_config.json", "DoRA"],
    ),
    "empty calibration": (lambda f: (f / "expert0.jsonl").write_text(""), ["'expert0'", "no calibration records"]),
    "record without a field": (
        lambda f: (f / "expert0.jsonl").write_text('{"input_ids": [7]}\n{"words": 1}\n'),
        ["expert0.jsonl:2", "no usable field; it has words"],
    ),
    "record that is no JSON": (
        lambda f: (f / "expert0.jsonl").write_text('{"input_ids": [7]}\n\n{"input_ids": [7}\n'),
        ["expert0.jsonl:3", "not valid JSON"],
    ),
}

# What needs the model's class or its tokenizer, which `merge` builds before any actor starts.
PREPARED: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "tensor without a partner": (
        lambda f: for_all_models(f, lambda m: edit_tensors(m, lambda t: t.update({"model.extra": torch.ones(2)}))),
        ["'model.extra' has no partner in the model", "LlamaForCausalLM"],
    ),
    "parameter without a tensor": (
        lambda f: for_all_models(f, lambda m: edit_tensors(m, lambda t: t.pop(Q))),
        ["no tensor in its files fills", Q],
    ),
    "unknown model type": (
        lambda f: for_all_models(f, lambda m: edit_json(m / "config.json", model_type="none_of_this_name")),
        ["base", "none_of_this_name"],
    ),
    "ids outside the vocabulary": (
        lambda f: (f / "expert0.jsonl").write_text('{"input_ids": [7, 64]}\n'),
        ["expert0.jsonl:1", "64"],
    ),
    "text without a tokenizer": (
        lambda f: [
            (f / "expert0.jsonl").write_text('{"text": "w1"}\n'),
            *(path.unlink() for path in (f / "base").glob("tokenizer*")),
        ],
        ["its tokenizer cannot be read"],
    ),
    "chat without a template": (
        lambda f: [
            (f / "expert0.jsonl").write_text('{"messages": [{"role": "user", "content": "w1"}]}\n'),
            (f / "base" / "chat_template.jinja").unlink(),
        ],
        ["expert0.jsonl:1", "no chat template"],
    ),
    "text that is no Unicode": (
        lambda f: (f / "expert0.jsonl").write_text('{"text": "\\ud800"}\n'),
        ["expert0.jsonl:1"],
    ),
}


@pytest.mark.parametrize("fault", [*PLANNED, *PREPARED])
def test_wrong_input_is_told_before_anything_starts_and_leaves_nothing(folder: Path, fault: str) -> None:
    spoil, words = (PLANNED | PREPARED)[fault]
    spoil(folder)
    before = everything(folder.parent)
    message = told(run("merge", "merge.yaml", "--out", "../out"))
    assert [word for word in words if word not in message] == [], message
    assert everything(folder.parent) == before


@pytest.mark.parametrize("fault", PLANNED)
def test_a_plan_tells_the_same_as_a_merge(folder: Path, fault: str) -> None:
    PLANNED[fault][0](folder)
    before = everything(folder.parent)
    assert told(run("plan", "merge.yaml")) == told(run("merge", "merge.yaml", "--out", "../out"))
    assert everything(folder.parent) == before


@pytest.mark.parametrize("config", ["none.yaml", "base", "none/merge.yaml"])
def test_a_missing_config_is_told_with_its_whole_path(folder: Path, config: str) -> None:
    for command in ("merge", "plan"):
        assert f"{folder / config}: no such config file" in told(run(command, config))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parameters.weigth=0.2", ["unknown key 'parameters.weigth'", "'weight'"]),
        ("models.7.name=x", ["--set models.7.name=x"]),
        ("seed", ["--set seed", "key.sub=value"]),
        ("models.0.parameters.weight=0", ["the prior of expert 'expert0' is 0"]),
        ("calibration.max_length=0", ["calibration.max_length is 0"]),
    ],
)
def test_a_wrong_override_is_told(folder: Path, override: str, words: list[str]) -> None:
    message = told(run("merge", "merge.yaml", "--out", "../out", "--set", override))
    assert [word for word in words if word not in message] == [], message
    assert not (folder.parent / "out").exists()


def occupy(out: Path, record: str | bytes | None) -> None:
    """An output folder that holds a file, and where `record` is given the config that a merge leaves."""
    (out / "merge").mkdir(parents=True)
    (out / "thesis.txt").write_text("years of work")
    if record is not None:
        (out / "merge" / "config.yaml").write_bytes(record if isinstance(record, bytes) else record.encode())


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (None, "something that is no merge"),
        ("record: {identity: another}\n", "another merge"),
        ("", "another merge"),
        ("[]", "another merge"),
        ("{", "another merge"),
        ("record: lost", "another merge"),
        (b"\xff", "another merge"),
    ],
)
def test_an_output_folder_that_holds_something_else_is_left_as_it_is(folder: Path, record: Any, problem: str) -> None:
    out = folder.parent / "out"
    occupy(out, record)
    before = everything(folder.parent)
    message = told(run("merge", "merge.yaml", "--out", str(out)))
    assert message.startswith(f"error: {out}: the output folder is in use") and problem in message
    assert everything(folder.parent) == before


def test_fresh_does_not_replace_what_is_no_merge(folder: Path) -> None:
    out = folder.parent / "out"
    occupy(out, None)
    before = everything(folder.parent)
    assert "something that is no merge" in told(run("merge", "merge.yaml", "--out", str(out), "--fresh"))
    assert everything(folder.parent) == before


@pytest.mark.parametrize("out", ["merge.yaml", "base", "merge.yaml/out", "~no-such-user/out"])
def test_an_output_that_cannot_be_a_folder_of_ours_is_told(folder: Path, out: str) -> None:
    before = everything(folder.parent)
    assert out.rpartition("/")[2] in told(run("merge", "merge.yaml", "--out", out))
    assert everything(folder.parent) == before


def test_the_state_of_another_merge_is_kept(folder: Path) -> None:
    state = folder.parent / "out.run"
    (state / "targets").mkdir(parents=True)
    (state / "targets" / "0-0.safetensors").write_text("hours of work")
    (state / "identity").write_text("another")
    message = told(run("merge", "merge.yaml", "--out", "../out"))
    assert "the state of another merge" in message and "--fresh" in message
    assert (state / "identity").read_text() == "another"
    assert (state / "targets" / "0-0.safetensors").read_text() == "hours of work"
    assert not (folder.parent / "out").exists()


def test_an_unknown_option_is_told(folder: Path) -> None:
    result = run("merge", "--no-such-option")
    assert (result.exit_code, result.stdout) == (2, "") and "--no-such-option" in result.stderr


def process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("fault", "arguments"),
    [
        ("unknown key", ["merge.yaml"]),
        ("truncated weights", []),
        ("ids outside the vocabulary", ["merge.yaml"]),
    ],
)
def test_the_real_command_ends_with_2(llama_merge: Path, tmp_path: Path, fault: str, arguments: list[str]) -> None:
    folder = shutil.copytree(llama_merge.parent, tmp_path / "in")
    spoil, words = (PLANNED | PREPARED)[fault]
    spoil(folder)
    before = everything(tmp_path)
    ended = process(str(ROOT / "cli.py"), "merge", *arguments, "--out", "../out", cwd=folder)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and ended.stderr.count("error: ") == 1
    assert "Traceback" not in ended.stderr and len(ended.stderr.splitlines()) <= 4, ended.stderr
    assert [word for word in words if word not in ended.stderr] == []
    assert ended.stdout == ("" if arguments else f"config: {folder / 'merge.yaml'}\n")
    assert everything(tmp_path) == before


def test_debug_shows_the_traceback(llama_merge: Path, tmp_path: Path) -> None:
    ended = process(str(ROOT / "cli.py"), "merge", str(tmp_path / "none.yaml"), "--debug", cwd=llama_merge.parent)
    assert ended.returncode != 0
    assert "Traceback" in ended.stderr and "no such config file" in ended.stderr


@pytest.mark.parametrize("arguments", [["plan", "merge.yaml"], ["plan"], ["--help"], ["merge", "--help"]])
def test_plan_and_help_import_neither_torch_nor_ray(llama_merge: Path, arguments: list[str]) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import cli\n"
        "try: cli.main(sys.argv[2:])\n"
        "except SystemExit as ended: code = ended.code\n"
        "print('exit', code, 'imported', sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    ended = process("-c", code, str(ROOT), *arguments, cwd=llama_merge.parent)
    assert ended.stdout.splitlines()[-1] == "exit 0 imported []", ended.stderr
    assert ended.stderr == ""


def test_a_plan_prints_its_tables_and_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    before = everything(folder.parent)
    result = run("plan", "merge.yaml")
    assert (result.exit_code, result.stderr) == (0, "")
    rows = {row.split("  ")[0].strip(): row for row in map(str.strip, result.stdout.splitlines())}
    assert "expert_merging_pp" in rows["method"]
    assert "LlamaForCausalLM (llama), 3 blocks" in rows["base"] and str(folder / "base") in rows["base"]
    assert "21 merged of 30" in rows["tensors"]
    assert "1, 2" in rows["hidden layers"]
    assert "7, once for all stages" in rows["expert forwards"]
    assert "3 a stage, 2 stages" in rows["optimiser steps"]
    assert rows["expert0"].split()[1:5] == ["checkpoint", "0.2", "1", "4"]
    assert rows["expert1"].split()[1:5] == ["checkpoint", "0.3", "1", "3"]
    assert rows["expert1"].endswith(str(folder / "expert1"))
    assert everything(folder.parent) == before


def test_a_plan_cuts_nothing_off_on_a_narrow_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = "".join(run("plan", "merge.yaml").stdout.split())
    assert f"{folder / 'base'}:LlamaForCausalLM(llama),3blocks" in printed
    assert str(folder / "expert0") in printed and "…" not in printed
