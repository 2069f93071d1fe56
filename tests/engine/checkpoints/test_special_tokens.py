"""Start, end and padding tokens, chat templates and settings of generation, as a folder's files give them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers

from engine.checkpoints.special_tokens import (
    generation_with_ids_of,
    has_chat_template,
    special_ids,
    unused_in_generation,
    with_ids_of,
)

EOS = {"eos_token_id": 7}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer whose end token is w1, number 7."""
    tiny.save_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.eos_token = "w1"
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def put(folder: Path, name: str, **keys: Any) -> None:
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | keys))


def test_ids_are_those_of_the_loaded_tokenizer(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert special_ids(folder) == {key: getattr(tokenizer, key) for key in IDS} == IDS | {"eos_token_id": 7}
    (folder / "tokenizer.json").unlink()
    put(folder, "tokenizer_config.json", added_tokens_decoder={"9": {"content": "w1"}}, eos_token={"content": "w1"})
    assert special_ids(folder) == {"eos_token_id": 9}
    put(folder, "tokenizer_config.json", added_tokens_decoder={"9" * 5000: {"content": "w1"}})
    assert special_ids(folder) == {}
    (folder / "tokenizer_config.json").unlink()
    assert special_ids(folder) == {}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (IDS | {"x": 1}, IDS | {"x": 1, "eos_token_id": 7}),
        (
            {"text_config": {"eos_token_id": 2}},
            {"text_config": {"eos_token_id": 7}, "bos_token_id": 1, "pad_token_id": 0},
        ),
        (
            {"text_config": IDS | {"x": 1}, "eos_token_id": 2},
            {"text_config": IDS | {"x": 1, "eos_token_id": 7}, "eos_token_id": 7},
        ),
    ],
)
def test_a_config_gets_the_ids_where_it_has_them(
    folder: Path, config: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert with_ids_of(folder, config) == expected


@pytest.mark.parametrize(("own", "eos"), [(None, 7), (2, 7), ([2, 3], 7), ([2, 7], [2, 7]), (7, 7)])
def test_several_end_tokens_are_kept_if_the_tokenizers_is_one_of_them(folder: Path, own: Any, eos: Any) -> None:
    if own is not None:
        put(folder, "generation_config.json", eos_token_id=own, num_beams=4)
    expected = IDS | {"eos_token_id": eos, "temperature": 0.5}
    assert generation_with_ids_of(folder, {"eos_token_id": 3, "temperature": 0.5}) == expected


def test_without_readable_tokens_the_folders_configs_decide(tmp_path: Path) -> None:
    put(tmp_path, "config.json", text_config={"eos_token_id": 5}, bos_token_id=4)
    put(tmp_path, "generation_config.json", eos_token_id=[5, 6])
    assert with_ids_of(tmp_path, IDS) == {"bos_token_id": 4, "eos_token_id": 5, "pad_token_id": 0}
    assert generation_with_ids_of(tmp_path, IDS) == {"bos_token_id": 4, "eos_token_id": [5, 6], "pad_token_id": 0}


@pytest.mark.parametrize(
    "wrong",
    [[], 7, {"eos_token": ["w1"]}, {"eos_token": {"content": {}}}, {"added_tokens_decoder": [1], "eos_token": "w9"}],
)
def test_values_of_other_types_are_no_tokens(folder: Path, wrong: Any) -> None:
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    if isinstance(wrong, dict):
        (folder / "tokenizer_config.json").write_text(json.dumps(wrong))
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [1, wrong], "model": {"vocab": [["w1", 1]]}}))
    assert special_ids(folder) == {}


@pytest.mark.parametrize(
    ("files", "has"),
    [
        ({}, False),
        ({"tokenizer_config.json": '{"chat_template": null}'}, False),
        ({"tokenizer_config.json": '{"chat_template": "{{ messages }}"}'}, True),
        ({"chat_template.jinja": ""}, True),
        ({"chat_template.json": "{}"}, True),
    ],
)
def test_where_a_chat_template_may_stand(tmp_path: Path, files: dict[str, str], has: bool) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert has_chat_template(tmp_path) is has


def test_settings_that_greedy_decoding_ignores(tmp_path: Path) -> None:
    put(tmp_path, "generation_config.json", **IDS, num_beams=4, do_sample=True, temperature=0.5, stop_strings=["x"])
    put(
        tmp_path, "generation_config.json", repetition_penalty=1.0, num_return_sequences=1, use_cache=True, min_length=0
    )
    assert unused_in_generation(tmp_path) == {"num_beams", "do_sample", "stop_strings"}
