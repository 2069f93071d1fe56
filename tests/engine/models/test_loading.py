"""Configs from strangers: no field makes transformers fetch or import code."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import tiny_images
import torch
import transformers
from errors import refused

from engine.checkpoints.headers import read_model_header
from engine.errors import CheckpointError
from engine.models.loading import load_config_like, load_generation_config, load_model_config
from engine.models.skeleton import build_skeleton

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


def test_a_generation_config_loads_no_second_model(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"use_mtp": True, "max_new_tokens": 7}))
    generation = load_generation_config(tmp_path)
    assert not generation.use_mtp and generation.max_new_tokens == 7


@pytest.mark.parametrize("auto_map", [{}, {"auto_map": {"AutoConfig": "code.Config"}}], ids=["plain", "own code"])
@pytest.mark.parametrize("kind", [["llama"], {"a": 1}, 7, None, "unknown"], ids=repr)
def test_a_model_type_that_is_none_is_refused(
    llama_merge: Path, tmp_path: Path, kind: Any, auto_map: dict[str, Any]
) -> None:
    folder = with_keys(llama_merge.parent / "base", tmp_path / "model", model_type=kind, **auto_map)
    with refused(CheckpointError, where=str(folder), do="`trust_remote_code: true`" if auto_map else ""):
        load_model_config(folder)
