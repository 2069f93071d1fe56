"""Wrong input through the command line: exit code 2, one message, no traceback, and nothing left behind."""

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
from identities import merge_of
from safetensors.torch import load_file, save_file
from thorough import as_thorough, thorough_but
from torch import Tensor

import cli
from engine.storage.sealed import seal

ROOT = Path(cli.__file__).resolve().parent
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(llama_merge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder of a merge, for the test to corrupt, as the working directory; Ray must not start."""
    import ray

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Ray was started although the input is wrong")

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
    """Move the weights out of the folder, and write an index that refers to them."""
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    weights = dict.fromkeys(load_file(folder.parent / "x.safetensors"), "../x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def for_all_models(folder: Path, change: Callable[[Path], Any]) -> None:
    for model in ("base", "expert0", "expert1"):
        change(folder / model)


def everything(folder: Path) -> dict[Path, bytes | None]:
    """Return the contents of all files below a folder, and None for its folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def run(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli.main, list(arguments))


def message_of(result: click.testing.Result, code: int = 2) -> str:
    """Return the only message on stderr of a command, which must have ended with `code`."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 4, "one or a few lines"
    return result.stderr


# By name: the function that corrupts the folder, and the facts that the message must contain. These faults are in the
# config and in the headers of files, so `plan` finds them as well.
PLANNED: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "unknown key": (
        lambda f: edit_yaml(f, lambda c: c["parameters"].update(temprature=2)),
        ["merge.yaml:20", "'parameters.temprature'", "'temperature'"],
    ),
    "unknown key with a dash": (
        lambda f: edit_yaml(f, lambda c: c["parameters"].update({"learning-rate": 2})),
        ["merge.yaml:20", "'parameters.learning-rate'", "'learning_rate'"],
    ),
    "wrong type": (
        lambda f: edit_yaml(f, lambda c: c["parameters"].update(temperature=[1])),
        ["merge.yaml:20", "parameters.temperature", "[1]", "expected: "],
    ),
    "not YAML": (lambda f: (f / "merge.yaml").write_text("a: [\n"), ["merge.yaml:2", "YAML", "stream end"]),
    "impossible date": (lambda f: (f / "merge.yaml").write_text("a: 2020-13-45\n"), ["merge.yaml", "YAML", "month"]),
    "not UTF-8": (lambda f: (f / "merge.yaml").write_bytes(b"\xff"), ["merge.yaml", "UTF-8"]),
    "empty config": (lambda f: (f / "merge.yaml").write_text(""), ["merge.yaml", "mapping", "merge_method"]),
    "other method": (
        lambda f: edit_yaml(f, lambda c: c.update(merge_method="tie")),
        ["merge.yaml:1", "'tie'", "'ties'"],
    ),
    "prior of 1": (
        lambda f: edit_yaml(f, lambda c: c["models"][1]["parameters"].update(weight=1.0)),
        ["merge.yaml:9", "'expert1'", "1.0", "`weight`"],
    ),
    "duplicate names": (
        lambda f: edit_yaml(f, lambda c: c["models"][1].update(name="expert0")),
        ["merge.yaml:9", "'expert0'", "`name`"],
    ),
    "no calibration": (
        lambda f: edit_yaml(f, lambda c: c["models"][1].pop("calibration")),
        ["merge.yaml:9", "'expert1'", "calibration", ".parquet"],
    ),
    "hidden layers out of range": (
        lambda f: edit_yaml(f, lambda c: c["parameters"].update(hidden_layers=[1, 4])),
        ["hidden_layers", " 4", "0 to 3"],
    ),
    "exclude leaves nothing": (lambda f: edit_yaml(f, lambda c: c.update(exclude=[".*"])), ["exclude", ".*"]),
    "missing calibration file": (
        lambda f: (f / "expert1.jsonl").unlink(),
        ["in/expert1.jsonl", "'expert1'", "calibration file"],
    ),
    "missing model folder": (
        lambda f: edit_yaml(f, lambda c: c["models"][0].update(model="./expert7")),
        ["in/expert7", "model folder", "config.json"],
    ),
    "home of nobody": (
        lambda f: edit_yaml(f, lambda c: c["models"][0].update(model="~no-such-user/expert7")),
        ["'~no-such-user/expert7'", "home directory"],
    ),
    "unknown hub id": (
        lambda f: edit_yaml(f, lambda c: c["models"][0].update(model="nobody/none-of-this-name")),
        ["nobody/none-of-this-name", "hub", "in/nobody/none-of-this-name"],
    ),
    "no config.json": (lambda f: (f / "expert0" / "config.json").unlink(), ["expert0/config.json", "No such file"]),
    "config.json not JSON": (
        lambda f: (f / "base" / "config.json").write_text("{"),
        ["base/config.json", "JSON", "column 2"],
    ),
    "truncated weights": (
        lambda f: truncate(f / "expert1" / "model.safetensors"),
        ["expert1/model.safetensors", "safetensors file", "incomplete metadata"],
    ),
    "no weights": (
        lambda f: (f / "expert1" / "model.safetensors").unlink(),
        ["in/expert1", "model.safetensors.index.json"],
    ),
    "index outside the folder": (
        lambda f: index_outside(f / "expert1"),
        ["expert1/model.safetensors.index.json", "outside", "'../x.safetensors'"],
    ),
    "expert lacks a tensor": (
        lambda f: edit_tensors(f / "expert0", lambda t: t.pop(Q)),
        ["expert 'expert0'", " 1 ", Q, " 30 "],
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
        ["expert 'expert1'", "80", "64", "`tokenizer_source: base`"],
    ),
    "adapter of a variant": (
        lambda f: (f / "expert0" / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true}'),
        ["expert0/adapter_config.json", "use_dora", "merge_and_unload"],
    ),
    "empty calibration": (
        lambda f: (f / "expert0.jsonl").write_text(""),
        ["in/expert0.jsonl", "'expert0'", "calibration records"],
    ),
    "record without a field": (
        lambda f: (f / "expert0.jsonl").write_text('{"input_ids": [7]}\n{"words": 1}\n'),
        ["expert0.jsonl:2", "words", "input_ids, messages, question, text"],
    ),
    "record that is no JSON": (
        lambda f: (f / "expert0.jsonl").write_text('{"input_ids": [7]}\n\n{"input_ids": [7}\n'),
        ["expert0.jsonl:3", "JSON", "column 17"],
    ),
}

# These faults show with the model's class or its tokenizer, which `merge` builds before any actor starts.
PREPARED: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "tensor without a partner": (
        lambda f: for_all_models(f, lambda m: edit_tensors(m, lambda t: t.update({"model.extra": torch.ones(2)}))),
        ["in/base", "'model.extra'", "LlamaForCausalLM"],
    ),
    "parameter without a tensor": (
        lambda f: for_all_models(f, lambda m: edit_tensors(m, lambda t: t.pop(Q))),
        ["in/base", f"parameter '{Q}'"],
    ),
    "unknown model type": (
        lambda f: for_all_models(f, lambda m: edit_json(m / "config.json", model_type="none_of_this_name")),
        ["in/base", "transformers", "none_of_this_name"],
    ),
    "ids outside the vocabulary": (
        lambda f: (f / "expert0.jsonl").write_text('{"input_ids": [7, 64]}\n'),
        ["expert0.jsonl:1", "7 to 64"],
    ),
    "text without a tokenizer": (
        lambda f: [
            (f / "expert0.jsonl").write_text('{"text": "w1"}\n'),
            *(path.unlink() for path in (f / "base").glob("tokenizer*")),
        ],
        ["in/base", "tokenizer", "`input_ids`"],
    ),
    "chat without a template": (
        lambda f: [
            (f / "expert0.jsonl").write_text('{"messages": [{"role": "user", "content": "w1"}]}\n'),
            (f / "base" / "chat_template.jinja").unlink(),
        ],
        ["expert0.jsonl:1", "chat template"],
    ),
    "text that is no Unicode": (
        lambda f: (f / "expert0.jsonl").write_text('{"text": "\\ud800"}\n'),
        ["expert0.jsonl:1", "JSON", "surrogates"],
    ),
    "weights that sum to zero": (
        lambda f: edit_yaml(
            f,
            lambda c: [
                c.update(merge_method="linear"),
                *(model.update(parameters={"weight": w}) for model, w in zip(c["models"], (-1, 1), strict=True)),
            ],
        ),
        ["lm_head.weight", "weights", "normalize: false"],
    ),
}


@pytest.mark.parametrize("fault", [*PLANNED, *PREPARED])
def test_wrong_input_is_refused_before_anything_starts_and_leaves_nothing(folder: Path, fault: str) -> None:
    spoil, facts = (PLANNED | PREPARED)[fault]
    spoil(folder)
    before = everything(folder.parent)
    message = message_of(run("merge", "merge.yaml", "--out", "../out"))
    assert [fact for fact in facts if fact not in message] == [], message
    assert everything(folder.parent) == before


@pytest.mark.parametrize("fault", thorough_but(list(PLANNED)[::4], PLANNED))
def test_a_plan_and_a_merge_refuse_with_the_same_message(folder: Path, fault: str) -> None:
    PLANNED[fault][0](folder)
    before = everything(folder.parent)
    assert message_of(run("plan", "merge.yaml")) == message_of(run("merge", "merge.yaml", "--out", "../out"))
    assert everything(folder.parent) == before


@pytest.mark.parametrize("config", ["none.yaml", "base", "none/merge.yaml"])
def test_a_missing_config_is_reported_with_its_whole_path(folder: Path, config: str) -> None:
    for command in ("merge", "plan"):
        message = message_of(run(command, config))
        assert message.startswith(f"error: {folder / config}: ") and "config file" in message


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        ("parameters.weigth=0.2", ["merge.yaml", "'parameters.weigth'", "'weight'"]),
        ("models.7.name=x", ["--set models.7.name=x: ", " 7 "]),
        ("seed", ["--set seed: ", "key.sub=value"]),
        ("models.0.parameters.weight=0", ["merge.yaml", "'expert0'", " 0.0", "`weight`"]),
        ("calibration.max_length=0", ["merge.yaml", "calibration.max_length", " 0", "expected: "]),
    ],
)
def test_a_wrong_override_is_refused(folder: Path, override: str, facts: list[str]) -> None:
    message = message_of(run("merge", "merge.yaml", "--out", "../out", "--set", override))
    assert [fact for fact in facts if fact not in message] == [], message
    assert not (folder.parent / "out").exists()


def occupy(out: Path, record: str | bytes | None) -> None:
    """Make an output folder that holds a file and, if `record` is given, the config that a merge writes."""
    (out / "merge").mkdir(parents=True)
    (out / "thesis.txt").write_text("years of work")
    if record is not None:
        (out / "merge" / "config.yaml").write_bytes(record if isinstance(record, bytes) else record.encode())


@pytest.mark.parametrize(
    "record",
    [
        None,
        "record: {identity: another}\n",
        "",
        "[]",
        "{",
        "record: lost",
        b"\xff",
    ],
)
def test_an_output_folder_that_holds_something_else_is_left_as_it_is(folder: Path, record: Any) -> None:
    out = folder.parent / "out"
    occupy(out, record)
    before = everything(folder.parent)
    message = message_of(run("merge", "merge.yaml", "--out", str(out)))
    assert message.startswith(f"error: {out}: ") and "--out" in message
    # Only another merge may be replaced, and nothing that it did not write.
    assert "--fresh" not in message
    assert everything(folder.parent) == before


def test_fresh_does_not_replace_a_folder_that_is_no_merge(folder: Path) -> None:
    out = folder.parent / "out"
    occupy(out, None)
    before = everything(folder.parent)
    message = message_of(run("merge", "merge.yaml", "--out", str(out), "--fresh"))
    assert message.startswith(f"error: {out}: ") and "--out" in message and "--fresh" not in message
    assert everything(folder.parent) == before


@pytest.mark.parametrize("out", ["merge.yaml", "base", "merge.yaml/out", "~no-such-user/out", "base/out", "a" * 252])
def test_an_output_that_cannot_be_a_new_folder_is_refused(folder: Path, out: str) -> None:
    before = everything(folder.parent)
    for command in ("plan", "merge"):
        assert out.rpartition("/")[2][:100] in message_of(run(command, "merge.yaml", "--out", out))
    assert everything(folder.parent) == before


@pytest.mark.parametrize("out", [".", "..", "/", "/proc", "base", "math"])
@pytest.mark.parametrize("command", ["plan", "merge"])
def test_inputs_and_strangers_are_safe_from_an_output(folder: Path, command: str, out: str) -> None:
    """The base is itself a merge, an expert is called math.run, and --fresh is given."""
    (folder / "base" / "merge").mkdir()
    (folder / "base" / "merge" / "config.yaml").write_text("record: {files: [config.json, model.safetensors]}")
    (folder / "expert0").rename(folder / "math.run")
    edit_yaml(folder, lambda config: config["models"][0].update(model="math.run"))
    before = everything(folder.parent)
    fresh = ["--fresh"] if command == "merge" else []
    message = message_of(run(command, "merge.yaml", "--out", out, *fresh))
    assert "--out" in message and "--fresh" not in message
    assert everything(folder.parent) == before


def test_a_plan_without_out_is_one_for_the_default_output_of_merge(folder: Path) -> None:
    (folder / "base").rename(folder / "merged")
    edit_yaml(folder, lambda config: config.update(base_model="merged"))
    for command in ("plan", "merge"):
        assert str(folder / "merged") in message_of(run(command, "merge.yaml"))
    assert run("plan", "merge.yaml", "--out", "other").exit_code == 0


@pytest.mark.parametrize("fresh", [False, True])
def test_a_state_folder_of_somebody_else_is_untouched(folder: Path, fresh: bool) -> None:
    (folder / "merged.run" / "ckpt").mkdir(parents=True)
    (folder / "merged.run" / "ckpt" / "step1.bin").write_text("months of work")
    before = everything(folder.parent)
    message = message_of(run("merge", "merge.yaml", *(["--fresh"] if fresh else [])))
    assert message.startswith(f"error: {folder / 'merged.run'}: ") and "ckpt/step1.bin" in message
    assert everything(folder.parent) == before


def test_the_state_of_another_merge_is_kept(folder: Path) -> None:
    state = folder.parent / "out.run"
    (state / "targets").mkdir(parents=True)
    (state / "targets" / "0-0.safetensors").write_text("hours of work")
    (state / "identity.json").write_bytes(seal(merge_of("another").encode()))
    before = everything(state)
    (state / "expert-merging-run.json").write_text('{"format": 1}')
    message = message_of(run("merge", "merge.yaml", "--out", "../out"))
    assert message.startswith(f"error: {state}: ") and "--fresh" in message
    assert everything(state).items() >= before.items()
    assert not (folder.parent / "out").exists()


def test_an_unknown_option_is_reported(folder: Path) -> None:
    result = run("merge", "--no-such-option")
    assert (result.exit_code, result.stdout) == (2, "") and "--no-such-option" in result.stderr


def process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize(
    ("fault", "arguments"),
    [
        ("unknown key", ["merge.yaml"]),
        ("truncated weights", []),
        as_thorough(("ids outside the vocabulary", ["merge.yaml"])),
    ],
)
def test_the_real_command_ends_with_2(llama_merge: Path, tmp_path: Path, fault: str, arguments: list[str]) -> None:
    folder = shutil.copytree(llama_merge.parent, tmp_path / "in")
    spoil, facts = (PLANNED | PREPARED)[fault]
    spoil(folder)
    before = everything(tmp_path)
    ended = process(str(ROOT / "cli.py"), "merge", *arguments, "--out", "../out", cwd=folder)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and ended.stderr.count("error: ") == 1
    assert "Traceback" not in ended.stderr and len(ended.stderr.splitlines()) <= 4, ended.stderr
    assert [fact for fact in facts if fact not in ended.stderr] == [], ended.stderr
    assert ended.stdout == ("" if arguments else f"config: {folder / 'merge.yaml'}\n")
    assert everything(tmp_path) == before


def test_debug_shows_the_traceback(llama_merge: Path, tmp_path: Path) -> None:
    ended = process(str(ROOT / "cli.py"), "merge", str(tmp_path / "none.yaml"), "--debug", cwd=llama_merge.parent)
    assert ended.returncode != 0
    assert "Traceback" in ended.stderr and str(tmp_path / "none.yaml") in ended.stderr


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
    assert "3 per stage, 2 stages" in rows["optimiser steps"]
    assert "the output" in rows["disk"] and "targets" in rows["disk"] and "free" in rows["disk"]
    assert "900 s" in next(row for row in rows.values() if "cluster.hang" in row)
    assert rows["expert0"].split()[1:5] == ["checkpoint", "0.2", "1", "4"]
    assert rows["expert1"].split()[1:5] == ["checkpoint", "0.3", "1", "3"]
    assert rows["expert1"].endswith(str(folder / "expert1"))
    assert everything(folder.parent) == before


def test_a_plan_cuts_nothing_off_on_a_narrow_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = "".join(run("plan", "merge.yaml").stdout.split())
    assert f"{folder / 'base'}:LlamaForCausalLM(llama),3blocks" in printed
    assert str(folder / "expert0") in printed and "…" not in printed
