"""Configs from strangers: no field makes transformers fetch or import code."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import tiny_images
import torch
import transformers
from errors import refused

from engine.checkpoints.headers import read_model_header
from engine.checkpoints.tensors import Checkpoint
from engine.errors import CheckpointError
from engine.models.forward import arguments, written
from engine.models.loading import load_config_like, load_model_config
from engine.models.skeleton import build_generation_skeleton, build_skeleton, load_weights

FOREIGN = ("owner/kernel", "kernels-community/flash-attn", "flash_attention_2", "nonsense", {"": "owner/kernel"}, 1)


def implementations(config: Any) -> list[Any]:
    """The implementations of a config and its sections."""
    sections = [part for part in vars(config).values() if isinstance(part, transformers.PretrainedConfig)]
    own = [config._attn_implementation, config._experts_implementation]
    return own + [each for section in sections for each in implementations(section)]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses that the test connected to or looked up."""
    asked: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        asked.append(arguments)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


def with_keys(folder: Path, target: Path, **keys: Any) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).symlink_to(path)
    (target / "config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    sections = [config, *(value for value in config.values() if isinstance(value, dict) and "model_type" in value)]
    for section in sections:
        section.update(keys)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("value", FOREIGN, ids=repr)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_an_implementation_that_is_not_part_of_transformers_is_not_used(
    llama_merge: Path, tmp_path: Path, offline: list[Any], key: str, value: Any
) -> None:
    base = llama_merge.parent / "base"
    config = load_model_config(with_keys(base, tmp_path / "model", **{key: value}))
    tensors = read_model_header(base).tensors
    model, _ = build_skeleton(config, tensors, torch.float32, base)
    plain, _ = build_skeleton(load_model_config(base), tensors, torch.float32, base)
    assert implementations(model.config) == implementations(plain.config)
    assert offline == []


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_sections_of_a_config_are_treated_alike(tmp_path: Path, key: str) -> None:
    family = next(iter(tiny_images.FAMILIES))
    (tmp_path / "base").mkdir()
    base = tiny_images.save(tiny_images.make_model(family), tmp_path / "base", family)
    config = load_model_config(with_keys(base, tmp_path / "model", **{key: "owner/kernel"}))
    assert "owner/kernel" not in implementations(config)


@pytest.mark.parametrize("value", ["eager", "sdpa"])
def test_an_implementation_of_transformers_is_kept(llama_merge: Path, tmp_path: Path, value: str) -> None:
    base = llama_merge.parent / "base"
    config = load_model_config(with_keys(base, tmp_path / "model", attn_implementation=value))
    model, _ = build_skeleton(config, read_model_header(base).tensors, torch.float32, base)
    assert model.config._attn_implementation == value
    assert load_config_like(config, tmp_path / "model")._attn_implementation == value


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"return_dict_in_generate": True, "output_scores": True},
        {"stop_strings": ["w1"]},
        {"num_return_sequences": 2, "do_sample": True, "temperature": 0.6},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "length_penalty": 2.0},
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 3},
        {"suppress_tokens": [*range(4, 60)], "forced_eos_token_id": 2},
        {"use_mtp": True, "max_new_tokens": 7, "max_length": 2},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_a_model_decodes_greedily_whatever_its_generation_config_says(
    tmp_path: Path, llama_merge: Path, settings: dict[str, Any]
) -> None:
    folder = shutil.copytree(llama_merge.parent / "base", tmp_path / "model")
    tokens = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(tokens | settings))
    header = read_model_header(folder)
    model, places = build_generation_skeleton(load_model_config(folder), header.tensors, torch.float32, folder)
    load_weights(model, places, torch.float32, torch.device("cpu"), folder, Checkpoint(folder, header.tensors).read)
    ids = torch.tensor([[5, 6, 7]])
    greedy = []
    for _ in range(4):
        greedy.append(int(model(torch.cat([ids, torch.tensor([greedy])], 1).long()).logits[0, -1].argmax()))
        if greedy[-1] in (2, 3):
            break
    assert written(model, arguments(ids, torch.ones_like(ids), {}), 4).tolist() == [greedy]


@pytest.mark.parametrize("auto_map", [{}, {"auto_map": {"AutoConfig": "code.Config"}}], ids=["plain", "own code"])
@pytest.mark.parametrize("kind", [["llama"], {"a": 1}, 7, None, "unknown"], ids=repr)
def test_a_model_type_that_is_none_is_refused(
    llama_merge: Path, tmp_path: Path, kind: Any, auto_map: dict[str, Any]
) -> None:
    folder = with_keys(llama_merge.parent / "base", tmp_path / "model", model_type=kind, **auto_map)
    with refused(CheckpointError, where=str(folder), do="`trust_remote_code: true`" if auto_map else ""):
        load_model_config(folder)
