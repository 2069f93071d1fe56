"""Differences between two config.json that change what a model computes, in any spelling of transformers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import plan_of

from engine.checkpoints.headers import ModelHeader, TensorHeader
from engine.checkpoints.match import Match
from engine.planning.differences import differences, notes_on, with_values_of

PLAIN = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6, "sliding_window": None}
GEMMA, NEOX, QWEN = ({"model_type": name} for name in ("gemma3_text", "gpt_neox", "qwen2"))
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}


def header(config: dict[str, Any]) -> ModelHeader:
    return ModelHeader(Path("there"), config, {"w": TensorHeader("w", (1,), "F32", "f")})


def found(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    return {".".join(keys) for keys in differences(header(PLAIN | one), header(PLAIN | other))}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rope_theta": 1e4}, {}),
        ({"rope_theta": 1e6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ({"rope_scaling": None, "rope_theta": 10000}, {"rope_parameters": {"rope_theta": 10000.0}}),
        ({"rope_scaling": {"type": "yarn", **YARN}}, {"rope_scaling": {"rope_type": "yarn", **YARN}}),
        (
            {"rope_scaling": {"type": "yarn", **YARN}},
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN}},
        ),
        (
            GEMMA
            | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            GEMMA
            | {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                }
            },
        ),
        ({"eos_token_id": 2, "dtype": "float32"}, {"eos_token_id": 3, "torch_dtype": "bfloat16"}),
        ({"attention_dropout": 0.0, "use_cache": True}, {"attention_dropout": 0.1, "use_cache": False}),
        ({"new_key": 1}, {"architectures": None}),
        # As transformers 4 and 5 write them.
        (GEMMA, GEMMA | {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
        (NEOX | {"rotary_pct": 0.25}, NEOX | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}),
        (QWEN | {"sliding_window": 4096, "use_sliding_window": False}, QWEN | {"sliding_window": None}),
        ({}, {"mlp_bias": False, "head_dim": 128}),
    ],
)
def test_spellings_and_keys_without_effect_are_no_difference(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert found(one, other) == found(other, one) == set()


@pytest.mark.parametrize(
    ("one", "other", "keys"),
    [
        ({"rope_theta": 1e4}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"rope"}),
        ({}, {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope"}),
        ({}, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN}}, {"rope"}),
        ({"max_position_embeddings": 128}, {"max_position_embeddings": 256}, {"max_position_embeddings"}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"tie_word_embeddings"}),
        ({"vocab_size": 64}, {"vocab_size": 72}, {"vocab_size"}),
        ({}, {"rms_norm_eps": 1e-5, "sliding_window": 4096}, {"rms_norm_eps", "sliding_window"}),
        ({"vision_config": {"image_size": 28}}, {"vision_config": {"image_size": 56}}, {"vision_config.image_size"}),
        ({"text_config": {"rope_theta": 1e4}}, {"text_config": {"rope_theta": 1e6}}, {"text_config.rope"}),
        ({}, {"mlp_bias": True}, {"mlp_bias"}),
        ({}, {"tie_word_embeddings": True}, {"tie_word_embeddings"}),
        (GEMMA, GEMMA | {"rope_theta": 1e5, "rope_local_base_freq": 1e4}, {"rope"}),
    ],
)  # fmt: skip
def test_what_changes_the_computation_is_a_difference(
    one: dict[str, Any], other: dict[str, Any], keys: set[str]
) -> None:
    assert found(one, other) == found(other, one) == keys


def test_a_text_model_is_compared_with_the_language_model() -> None:
    base = header({"vision_config": {}, "rms_norm_eps": 7, "text_config": PLAIN})
    assert set(differences(base, header(PLAIN | {"rms_norm_eps": 1e-5}))) == {("rms_norm_eps",)}


def test_notes_name_values_prefixes_and_tensors() -> None:
    match = Match(absent=frozenset("abcde"), ignored=("z",), wrapped="module.w")
    expert = header(PLAIN | {"rope_theta": 1e6})
    lines = notes_on("math", expert, header(PLAIN), match)
    assert len(lines) == 4
    text = "\n".join(lines)
    assert all(
        part in text for part in ("1000000.0", "10000.0", "config_source: math", "module.w", "a, b, c and 2 more", "z")
    )
    assert notes_on("math", header(PLAIN), header(PLAIN), Match()) == ()


def save(folder: Path, name: str, **keys: Any) -> None:
    (folder / name).write_text(
        json.dumps((json.loads((folder / name).read_text()) if (folder / name).exists() else {}) | keys)
    )


def test_settings_of_generation_are_named_once(llama_merge: Path, tmp_path: Path) -> None:
    merge = shutil.copytree(llama_merge.parent, tmp_path / "merge") / "merge.yaml"
    on = "calibration.generate_responses=4"
    assert plan_of(merge, on).notes == []
    for model, settings in (("expert0", {"num_beams": 4}), ("expert1", {"num_beams": 2, "repetition_penalty": 1.1})):
        save(merge.parent / model, "generation_config.json", **settings)
    ((owner, note),) = plan_of(merge, on).notes
    assert owner == "experts" and "num_beams, repetition_penalty" in note
    assert plan_of(merge, "calibration.generate_responses=0").notes == []


def test_a_chat_template_that_only_an_expert_has_is_named_with_its_option(llama_merge: Path, tmp_path: Path) -> None:
    merge = shutil.copytree(llama_merge.parent, tmp_path / "merge") / "merge.yaml"
    tiny.save_tokenizer(merge.parent / "expert1")
    assert plan_of(merge).notes == []
    (merge.parent / "base" / "chat_template.jinja").unlink()
    ((owner, note),) = plan_of(merge).notes
    found = re.search("`tokenizer_source: (.+?)`", note)
    assert owner == "base" and found is not None
    plan = plan_of(merge, f"tokenizer_source={found[1]}")
    assert plan.notes == [] and plan.tokenizer == str(merge.parent / "expert1")


def test_values_are_taken_whatever_their_keys_and_sections() -> None:
    base = header(PLAIN | {"rope_theta": 1e4, "vocab_size": 64, "a.b": {"c.d": 1}, "dtype": "float32"})
    donor = header(PLAIN | {"rope_parameters": {"rope_theta": 1e6}, "vocab_size": 72, "a.b": {"c.d": 2}, "more": 1})
    expected = PLAIN | {"rope_parameters": {"rope_theta": 1e6}, "vocab_size": 64, "a.b": {"c.d": 2}, "dtype": "float32"}
    assert with_values_of(base, donor).config == expected
    assert "rope_theta" in base.config, "the base's header is not changed"
