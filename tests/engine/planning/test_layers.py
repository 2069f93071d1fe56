"""Layers and modules by the names of tensors, and config.json of a model with other layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_images
from errors import refused
from thorough import thorough_but

from engine.checkpoints.headers import ModelHeader, TensorHeader, read_model_header
from engine.errors import ConfigError
from engine.planning.layout.layers import deeper, depth_of, modules_of, stack_of, stacked_config, with_kinds


def header(*names: str, **config: Any) -> ModelHeader:
    return ModelHeader(Path("/m"), config, {name: TensorHeader(name, (2,), "F32", "") for name in names})


def test_what_comes_before_and_after_the_layers_is_as_mergekit_has_it() -> None:
    definitions = pytest.importorskip("mergekit.architecture.json_definitions")
    wrong, layers = [], ["model.layers.0.x", "model.layers.1.x"]
    for architecture in definitions.JSON_ARCHITECTURES:
        for key, module in architecture.modules.items():
            parts = module.architecture.definition
            if not parts.layer_templates.weights or key == "multi_modal_projector":
                continue
            for weights, place in ((parts.pre_weights, "before"), (parts.post_weights, "after")):
                names = [one.name for one in weights if "${" not in one.name and ".0." not in one.name]
                found = getattr(stack_of([*names, *layers], 2), place)
                wrong += [(architecture.expected_model_type, place, name) for name in names if name not in found]
    assert wrong == []


def test_experts_of_a_mixture_and_other_numbers_are_no_layers() -> None:
    names = [f"model.layers.{i}.mlp.experts.{e}.up.weight" for i in range(2) for e in range(3)]
    stack = stack_of(["model.embed_tokens.weight", "score.0.weight", *names, "lm_head.weight"], 2)
    assert (stack.prefix, len(stack.layers)) == ("model.layers", 2)
    assert stack.layers[1] == tuple(f"mlp.experts.{e}.up.weight" for e in range(3))
    assert (stack.before, stack.after) == (("model.embed_tokens.weight",), ("score.0.weight", "lm_head.weight"))
    assert stack.others == ()
    both = [f"{part}.block.{i}.x" for part in ("encoder", "decoder") for i in range(2)]
    assert {(one := stack_of(both, 2)).prefix, *one.others} == {"encoder.block", "decoder.block"}


def test_layers_beyond_the_number_of_the_config_are_left_out() -> None:
    stack = stack_of([f"model.layers.{i}.x" for i in range(4)], 3)
    assert len(stack.layers) == 3 and stack.after == ()


def test_a_deeper_model_has_further_layers_like_the_last() -> None:
    base = header("model.embed_tokens.weight", "model.layers.0.a", "model.layers.1.b", num_hidden_layers=2)
    stack = stack_of(base.tensors, 2)
    assert list(deeper(base, stack, 4).tensors)[3:] == ["model.layers.2.b", "model.layers.3.b"]
    assert list(deeper(base, stack, 1).tensors) == ["model.embed_tokens.weight", "model.layers.0.a"]


def test_lists_of_layers_follow_the_layers() -> None:
    config: dict[str, Any] = {
        "num_hidden_layers": 3,
        "layer_types": ["a", "b", "c"],
        "mlp_only_layers": [0, 2],
        "eos_token_id": [1, 2, 3],
        "vision_config": {"depth": 3},
    }
    other = config | {"layer_types": ["x", "y", "z"], "mlp_only_layers": [1]}
    taken = [(config, 0), (config, 2), (other, 1), (other, 2)]
    made = stacked_config(config, "default", 3, taken)
    assert made == config | {
        "num_hidden_layers": 4,
        "layer_types": ["a", "c", "y", "z"],
        "mlp_only_layers": [0, 1, 2],
    }
    tower = stacked_config(config, "vision_tower", 3, taken[:2])
    assert tower == config | {"vision_config": {"depth": 2}}


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers", "n_layers"])
def test_the_number_of_layers_has_the_key_of_the_config(key: str) -> None:
    base = header(**{key: 2})
    assert base.num_layers == 2
    assert stacked_config(base.config, "", 2, [(base.config, 0)] * 5) == {key: 5}


def test_kinds_of_layers_that_follow_from_their_position_are_written(tmp_path: Path) -> None:
    tiny.save(tiny.make_model("gemma2"), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    kinds = config.pop("layer_types")
    path.write_text(json.dumps(config))
    assert with_kinds(read_model_header(tmp_path))["layer_types"] == kinds and len(set(kinds)) == 2


def test_the_stacks_of_an_encoder_and_a_decoder_have_keys_of_their_own() -> None:
    config = {"num_layers": 2, "num_decoder_layers": 2}
    assert stacked_config(config, "decoder", 2, [(config, 0)] * 3) == config | {"num_decoder_layers": 3}
    assert stacked_config(config, "encoder", 2, [(config, 0)] * 3) == config | {"num_layers": 3}


MODULES = ("text_decoder", "vision_tower", "multi_modal_projector")


@pytest.mark.parametrize("family", thorough_but(["qwen2_vl"], ["qwen2_vl", "qwen3_vl", "gemma3", "internvl"]))
def test_a_model_with_images_has_modules(family: str, tmp_path: Path) -> None:
    model = read_model_header(tiny_images.save(tiny_images.make_model(family), tmp_path, family))
    found = modules_of(model, MODULES)
    assert sum(map(len, found.values())) == len(model.tensors)
    depths = {key: len(stack_of(found[key], depth_of(model, key)).layers) for key in MODULES[:2]}
    assert depths == {"text_decoder": 3, "vision_tower": 2}
    assert not any("vision" in name or "visual" in name for name in found["text_decoder"])


def test_modules_that_a_model_lacks_are_refused_by_their_names() -> None:
    with refused(ConfigError, where="modules.vision_tower", facts=["default"]):
        modules_of(header("model.layers.0.x"), ["default", "vision_tower"])
