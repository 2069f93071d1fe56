"""Untrusted input: irregular files, ambiguous JSON, limits on time and memory, library errors, remote code."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers.dynamic_module_utils
from conftest import plan_of
from errors import refused
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.untrusted
from engine.errors import CalibrationError, CheckpointError, ConfigError, InputError
from engine.learning.frozen_expert import FrozenExpert, check_models
from engine.learning.student import Student
from engine.models.loading import load_generation_config, load_tokenizer
from engine.output.model_folder import output_files, write_companions
from engine.run.inputs import identity
from engine.untrusted import (
    check_regular,
    cpu_limit,
    library_errors_as,
    memory_limit,
    open_regular,
    parse_json,
    read_text,
    shown,
)

CPU = torch.device("cpu")
FAULT = CheckpointError("too much", "here")


def test_a_text_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("é" * 5, encoding="utf-8")
    assert read_text(path, 10, InputError) == "é" * 5
    with refused(ConfigError, where=str(path), facts=["the config", "10 bytes", "at most 9"]):
        read_text(path, 9, ConfigError, "the config")


def test_an_irregular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, fact in (
        ("pipe", "pipe"),
        (".", "directory"),
        ("none", os.strerror(errno.ENOENT)),
        ("loop", os.strerror(errno.ELOOP)),
        ("a\0b", "null byte"),
        ("x" * 300, os.strerror(errno.ENAMETOOLONG)),
    ):
        with (
            refused(CalibrationError, where=str(tmp_path / name), facts=["the file", fact]),
            open_regular(tmp_path / name, None, CalibrationError),
        ):
            raise AssertionError("it was opened")
    with refused(InputError, where="/dev/zero", facts=["device"]):
        check_regular(Path("/dev/zero"), None, InputError)


@pytest.mark.thorough
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_valid_json_is_parsed_or_could_not_be_written(value: Any) -> None:
    text = json.dumps(value)
    try:
        assert json.dumps(parse_json(text, "here", InputError)) == text
    except InputError:
        with pytest.raises(UnicodeEncodeError):
            json.dumps(value, ensure_ascii=False).encode()


@pytest.mark.parametrize("depth", [99, 100, 101, 102, 5000])
@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a":', "}"), ('[1,{"a":', "}]")])
def test_json_is_refused_from_a_depth_on(depth: int, start: str, end: str) -> None:
    levels = depth * (start.count("[") + start.count("{"))
    text = start * depth + "1" + end * depth
    if levels <= engine.untrusted.DEPTH:
        assert parse_json(text, "here", InputError)
    else:
        with refused(InputError, where="here", facts=["JSON"]):
            parse_json(text, "here", InputError)


def test_many_shallow_parts_are_not_deep() -> None:
    assert len(parse_json("[" + "[1,{}]," * 500 + "[]]", "here", InputError)) == 501


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ('{"a": 1, "b": 2, "a": 1}', ["'a'", "twice"]),
        ('[{"b": {"\\u0061": 1, "a": 2}}]', ["'a'", "twice"]),
        ('{"' + "x" * 500 + '": 1, "' + "x" * 500 + '": 1}', ["'" + "x" * 78 + "…", "twice"]),
        ('"\\ud800"', ["surrogates"]),
        ('{"\\uDC00": 1}', ["surrogates"]),
        ("1" * 5000, ["digits"]),
    ],
)
def test_ambiguous_or_invalid_json_is_refused(text: str, facts: list[str]) -> None:
    with refused(InputError, where="here", facts=["JSON", *facts]):
        parse_json(text, "here", InputError)


def test_a_surrogate_pair_is_a_character() -> None:
    assert parse_json('"\\ud83d\\ude00"', "here", InputError) == "😀"


@pytest.mark.parametrize(
    ("text", "as_shown"),
    [("a b", "a b"), ("a\nb", "'a\\nb'"), ("\x1b[31m", "'\\x1b[31m'"), ("é", "é"), ("x" * 80, "x" * 80)],
)
def test_a_text_is_shown_on_one_line(text: str, as_shown: str) -> None:
    assert shown(text) == as_shown
    assert shown("x" * 500) == "x" * 79 + "…"


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_work_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.untrusted, "SECONDS", 0.05)
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(CheckpointError) as caught, cpu_limit(FAULT):
        spin(30)
    assert caught.value is FAULT
    with cpu_limit(FAULT):
        pass
    spin(0.2)
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_threads_other_than_the_main_one_have_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.untrusted, "SECONDS", 0.01)
    done = []

    def work() -> None:
        with cpu_limit(FAULT):
            spin(0.1)
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


def test_work_that_needs_too_much_memory_is_stopped() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(CheckpointError) as caught, memory_limit(FAULT):
        # Far more, because threads of earlier tests that end meanwhile give address space back.
        bytearray(engine.untrusted.MEMORY * 16)
    assert caught.value is FAULT
    with memory_limit(FAULT):
        assert bytearray(engine.untrusted.MEMORY // 4)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


class Panic(BaseException):
    pass


Panic.__name__ = "PanicException"


@pytest.mark.parametrize(
    "error", [ValueError("a\n  b"), Exception("a b"), KeyError("a b"), Panic("a b"), OSError("a b")]
)
def test_exceptions_of_libraries_become_errors_of_the_input(error: BaseException) -> None:
    with pytest.raises(CheckpointError) as caught, library_errors_as(make_fault):
        raise error
    assert caught.value.where == "here" and caught.value.what.strip("'") == "a b"


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), SystemExit(3), FAULT, StopIteration()])
def test_exceptions_that_are_not_about_the_input_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, library_errors_as(make_fault):
        raise error
    assert caught.value is error


def make_fault(message: str) -> CheckpointError:
    return CheckpointError(message, "here")


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class Config(LlamaConfig):
    model_type = "strange"

class Model(LlamaForCausalLM):
    config_class = Config

class Tokenizer(PreTrainedTokenizerFast):
    pass

Path({marker!r}).touch()
"""
OWN = {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """merge.yaml of models with code of their own, which creates the file `ran` next to it when it runs."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    config = tiny.make_merge(tmp_path / "merge", experts=1)
    for model in ("base", "expert0"):
        folder = config.parent / model
        (folder / "strange.py").write_text(CODE.format(marker=str(config.parent / "ran")))
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(described | {"model_type": "strange", "auto_map": OWN}))
    tokenizer = config.parent / "base" / "tokenizer_config.json"
    own = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "strange.Tokenizer"]}}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | own))
    return config


def test_code_of_a_model_does_not_run_and_the_option_is_named(strange: Path) -> None:
    plan = plan_of(strange)
    with refused(CheckpointError, facts=["`trust_remote_code: true`"]):
        check_models(plan)
    with refused(CheckpointError, facts=["`trust_remote_code: true`"]):
        load_tokenizer(strange.parent / "base")
    assert not (strange.parent / "ran").exists()


def test_code_of_a_model_runs_where_the_option_says_so_and_goes_with_the_output(strange: Path, tmp_path: Path) -> None:
    plan = plan_of(strange, "trust_remote_code=true")
    check_models(plan)
    assert (strange.parent / "ran").exists()
    assert type(Student(plan, CPU).model).__name__ == type(FrozenExpert(plan, 0, CPU).model).__name__ == "Model"
    assert type(load_tokenizer(strange.parent / "base", remote_code=True)).__name__ == "Tokenizer"
    out = tmp_path / "out"
    out.mkdir()
    write_companions(out, plan, strange.parent / "base", output_files(plan))
    assert (out / "strange.py").exists()


def test_the_option_counts_in_a_runs_identity(llama_merge: Path) -> None:
    first, second = (identity(plan_of(llama_merge, f"trust_remote_code={value}")) for value in ("false", "true"))
    assert not first.differences(identity(plan_of(llama_merge))) and first.differences(second)


@pytest.mark.parametrize(
    "content", ['{"max_new_tokens": -1}', '{"max_new_tokens": "x"}', '{"cache_implementation": "x"}']
)
def test_an_invalid_generation_config_is_refused(tmp_path: Path, content: str) -> None:
    assert load_generation_config(tmp_path) is None
    (tmp_path / "generation_config.json").write_text(content)
    with refused(CheckpointError, facts=["generation_config.json", str(tmp_path)]):
        load_generation_config(tmp_path)
