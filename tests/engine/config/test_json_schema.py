"""The JSON schema of a config accepts what the reader accepts, and refuses unknown keys where the reader does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from engine.config.documents import given_documents
from engine.config.json_schema import as_text, config_schema
from engine.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = config_schema()
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)
MODELS = [{"model": "a", "calibration": "a.jsonl"}]
OURS: dict[str, Any] = {"merge_method": "expert_merging", "base_model": "base", "models": MODELS}
ISO: dict[str, Any] = {"merge_method": "iso", "base_model": "base", "models": [{"model": "a"}]}
TIES = ISO | {"merge_method": "ties"}
SLICES = [{"sources": [{"model": "a", "layer_range": ["0", 2.0]}], "parameters": {"scale": 2}, "note": 1}]


def texts() -> dict[str, str]:
    """The configs in the repository: examples, mergekit's published ones, and those of the documentation."""
    files = [*ROOT.glob("examples/**/*.yaml"), *ROOT.glob("benchmarks/**/*.yaml"), *ROOT.glob("tests/parity/configs/*")]
    found = {path.name: path.read_text(encoding="utf-8") for path in files}
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        found |= {f"{page.name} {number}": block for number, block in enumerate(blocks) if "merge_method" in block}
    return found


def accepted(config: Any) -> bool:
    """Whether the reader accepts all merges of a config."""
    try:
        return all(document.config({}) for document in given_documents(config))
    except ConfigError:
        return False


def test_the_published_copy_is_up_to_date() -> None:
    published = (ROOT / "docs" / "merge.schema.json").read_text(encoding="utf-8")
    assert published == as_text(SCHEMA), "python cli.py schema > docs/merge.schema.json"
    jsonschema.Draft7Validator.check_schema(SCHEMA)


def test_every_config_in_the_repository_that_the_reader_accepts_is_valid() -> None:
    known = {name: text for name, text in texts().items() if accepted(text)}
    assert len(known) > 100
    faults = {
        (name, error.json_path, error.message[:200])
        for name, text in known.items()
        for document in yaml.safe_load_all(text)
        if document is not None
        for error in VALIDATOR.iter_errors(document)
    }
    assert faults == set()


@pytest.mark.parametrize(
    "config",
    [
        OURS | {"parameters": {"weight_decay": "1e-5", "epochs": "8", "hidden_layers": [0, -1], "density": 0.5}},
        OURS | {"seed": 7.0, "max_shard_size": "5GB", "log_with": "wandb", "gradient_checkpointing": "yes"},
        OURS | {"calibration": {"shuffle": 1, "image_options": {"size": {"longest_edge": 3}}}},
        OURS | {"models": [{"model": "a", "calibration": [{"path": "a.json", "samples": 2}, "b.json"]}]},
        OURS | {"cluster": {"trainer": {"num_gpus": 0.5, "labels": {"zone": "a"}}, "hang": "auto", "shards": 0}},
        OURS | {"name": "one", "models": [{"model": "a", "calibration": "a.json", "parameters": {"density": 1}}]},
        ISO | {"parameters": {"lambda": [1, 2], "epochs": 3}, "preset": "paper", "batch_tokens": "auto"},
        ISO | {"base_model": {"model": {"path": "base"}, "lora": "l"}, "parameters": None},
        TIES | {"parameters": {"density": [{"filter": "mlp", "value": [0.5, "1e-1"], "note": 1}, {"value": 1}]}},
        TIES | {"paramters": {}, "models": [{"model": "a", "wieght": 1, "parameters": {"weight": 1, "x": 3}}]},
        {"merge_method": "passthrough", "slices": SLICES, "base_model": None, "tokenizer": {"source": "a", "x": 1}},
        {"merge_method": "passthrough", "modules": {"default": {"slices": SLICES}}, "tokenizer_source": None},
    ],
    ids=str,
)
def test_forms_that_the_reader_accepts_are_valid(config: dict[str, Any]) -> None:
    assert accepted(config)
    assert [error.message for error in VALIDATOR.iter_errors(config)] == []


@pytest.mark.parametrize(
    ("config", "place"),
    [
        (OURS | {"epochs": 3}, "epochs"),
        (OURS | {"parameters": {"epoch": 3}}, "epoch"),
        (OURS | {"parameters": {"epochs": "many"}}, "many"),
        (OURS | {"merge_method": "expert_merging_pp", "parameters": {"chunks": "round"}}, "round"),
        (OURS | {"models": [*MODELS, {"model": "b", "wieght": 1}]}, "wieght"),
        (OURS | {"models": [*MODELS, {"model": "b", "parameters": {"epochs": 1}}]}, "epochs"),
        (OURS | {"cluster": {"trainer": {"num_gpu": 1}}}, "num_gpu"),
        (OURS | {"calibration": {"max_len": 1}}, "max_len"),
        (OURS | {"merge_method": "expert_merging++"}, "expert_merging++"),
        (OURS | {"dtype": "float64"}, "float64"),
        (ISO | {"modles": []}, "modles"),
        (ISO | {"parameters": {"lambada": 1}}, "lambada"),
        (ISO | {"models": [{"model": "a", "parameters": {"lambada": 1}}]}, "lambada"),
        (TIES | {"parameters": {"density": 2}}, "2"),
        (TIES | {"calibration": {"max_len": 1}}, "max_len"),
        ({key: value for key, value in OURS.items() if key != "models"}, "models"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_reader_refuses_is_not_valid(config: dict[str, Any], place: str) -> None:
    assert not accepted(config)
    errors = [inner for error in VALIDATOR.iter_errors(config) for inner in (error, *error.context)]
    assert any(place in error.message for error in errors)


def test_keys_and_options_are_described() -> None:
    described = {key for key, one in SCHEMA["properties"].items() if one.get("description")}
    assert {"merge_method", "exclude", "slices", "cluster", "seed", "record"} <= described
    options = SCHEMA["definitions"]["options of expert_merging_pp"]["properties"]
    assert all(len(one["description"]) > 5 for one in options.values()) and options["epochs"]["default"] == 8
    assert "trainers" in json.dumps(SCHEMA["definitions"]["Cluster"]["properties"]["trainers"])
