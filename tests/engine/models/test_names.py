"""Places of tensors in the module: those that `from_pretrained` uses, or an error that names the tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import tiny
import tiny_images
import torch
import transformers
from errors import refused
from thorough import thorough_but
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.core_model_loading import MergeModulelist, Transpose, WeightConverter

import engine.models.names
from engine.checkpoints.headers import TensorHeader, read_model_header
from engine.errors import CheckpointError
from engine.models.loading import load_model_config
from engine.models.names import Place, Places, check_filled, match_names, positions_of
from engine.models.skeleton import build_skeleton, fill, part_of

MIXTURES = ("qwen3_moe", "mixtral")
EXPERTS = 4
mixture = pytest.mark.parametrize("family", MIXTURES)
# Name in the files of an expert's first projection in the second block.
GATE = {
    "qwen3_moe": "model.layers.1.mlp.experts.{}.gate_proj.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.{}.w1.weight",
}
# The module's parameter that holds it, of shape [EXPERTS, 2 · ROWS, 32].
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
ROWS = {"qwen3_moe": 24, "mixtral": 48}


def built(folder: Path, tensors: dict[str, TensorHeader] | None = None) -> tuple[Any, Places]:
    """Return the module on the meta device, and the places of `tensors`, by default of all tensors in the folder."""
    config = load_model_config(folder, remote_code=True)
    tensors = read_model_header(folder).tensors if tensors is None else tensors
    return build_skeleton(config, tensors, torch.float32, folder)


def weights(folder: Path) -> dict[str, Tensor]:
    files = [safetensors.torch.load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


def filled(folder: Path) -> dict[str, Tensor]:
    """Return the state of the module with all tensors in their places."""
    model, places = built(folder)
    tensors = weights(folder)
    assert places.keys() == tensors.keys()
    fill(model, places, {"": torch.device("cpu")}, torch.float32, tensors.__getitem__)
    state: dict[str, Tensor] = model.state_dict()
    return state


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", thorough_but(["llama", "qwen3_moe"], tiny.FAMILIES))
def test_tensors_of_language_models_are_where_from_pretrained_puts_them(
    tmp_path: Path, family: str, tied: bool
) -> None:
    tiny.save(tiny.make_model(family, tied), tmp_path, sharded=True)
    assert_same(filled(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", thorough_but(["gemma3", "internvl"], tiny_images.FAMILIES))
def test_tensors_of_models_with_images_are_where_from_pretrained_puts_them(
    tmp_path: Path, family: str, tied: bool
) -> None:
    tiny_images.save(tiny_images.make_model(family, tied=tied), tmp_path, family)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert_same(filled(tmp_path), theirs)


def test_tensors_of_a_model_with_its_own_code_are_where_they_were(tmp_path: Path) -> None:
    model = tiny_images.make_model(tiny_images.CHAT)
    tiny_images.save(model, tmp_path, tiny_images.CHAT)
    assert_same(filled(tmp_path), model.state_dict())


@mixture
def test_each_experts_projection_is_a_distinct_part_of_a_parameter(tmp_path: Path, family: str) -> None:
    model = tiny.make_model(family)
    model.save_pretrained(tmp_path)
    _, places = built(tmp_path)
    names = [name for name in places if ".experts." in name]
    assert len(names) == 3 * EXPERTS * tiny.COMMON["num_hidden_layers"]
    assert all(GATE[family].format(number) in names for number in range(EXPERTS))
    held, state = weights(tmp_path), model.state_dict()
    covered: dict[str, int] = {}
    for name in names:
        part = part_of(state[places[name].parameter], places[name], held[name].shape)
        assert torch.equal(part, held[name]), name
        covered[places[name].parameter] = covered.get(places[name].parameter, 0) + part.numel()
    assert len({places[name] for name in names}) == len(names), "places are unique"
    assert covered == {name: state[name].numel() for name in covered}
    assert len(covered) == 2 * tiny.COMMON["num_hidden_layers"]
    assert [name for name, place in places.items() if place.start and name not in names] == []


@mixture
def test_files_with_the_modules_own_names_work(tmp_path: Path, family: str) -> None:
    model = tiny.make_model(family)
    model.save_pretrained(tmp_path, save_original_format=False)
    _, places = built(tmp_path)
    assert places == {name: Place(name) for name in model.state_dict()}
    assert_same(filled(tmp_path), model.state_dict())


@pytest.mark.parametrize("family", thorough_but(["gemma3", "internvl"], tiny_images.FAMILIES))
def test_files_with_the_modules_own_names_work_for_models_with_images(tmp_path: Path, family: str) -> None:
    model = tiny_images.make_model(family)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert_same(filled(tmp_path), model.state_dict())


@mixture
@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ("missing", [repr(GATE_UP), "{held} elements", "{whole} elements"]),
        ("all missing", [repr(GATE_UP), "{whole} elements"]),
        ("one too many", ["GATE 4", "4 experts", "config.json"]),
        ("a thousandth", ["GATE 1000", "4 experts", "config.json"]),
        ("wrong shape", ["GATE 2", "(24, 31)", "({rows}, 32)", "4 experts"]),
        ("turned", ["GATE 2", "(32, 24)", "({rows}, 32)", "4 experts"]),
        ("flat", ["GATE 2", "(768,)", "({rows}, 32)"]),
        ("of all", ["GATE 2", "(4, 24, 32)", "({rows}, 32)"]),
        ("unknown projection", ["'model.layers.1.mlp.experts.0.z_proj.weight'", "ForCausalLM"]),
    ],
)
def test_an_incomplete_mixture_is_refused_by_the_name_of_the_tensor(
    tmp_path: Path, family: str, change: str, facts: list[str]
) -> None:
    tiny.make_model(family).save_pretrained(tmp_path)
    tensors = dict(read_model_header(tmp_path).tensors)
    gate = GATE[family].format
    one = tensors[gate(2)]
    shapes = {"wrong shape": (24, 31), "turned": (32, 24), "flat": (768,), "of all": (4, 24, 32)}
    if change in shapes:
        tensors[gate(2)] = replace(one, shape=shapes[change])
    elif change == "missing":
        del tensors[gate(2)]
    elif change == "all missing":
        up = "up_proj" if family == "qwen3_moe" else "w3"
        gone = {gate(n).replace("gate_proj", name).replace("w1", name) for n in range(4) for name in ("w1", up)}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in gone | set(map(gate, range(4)))}
    elif change == "unknown projection":
        tensors["model.layers.1.mlp.experts.0.z_proj.weight"] = one
    else:
        name = gate(4 if change == "one too many" else 1000)
        tensors[name] = replace(one, name=name)
    rows = ROWS[family]
    whole = EXPERTS * 2 * rows * 32
    numbers = {"rows": rows, "whole": whole, "held": whole - rows * 32}
    wanted = [repr(gate(int(fact.split()[1]))) if fact.startswith("GATE") else fact.format(**numbers) for fact in facts]
    with refused(CheckpointError, where=str(tmp_path), facts=wanted):
        built(tmp_path, tensors)


@mixture
def test_a_tensor_that_is_stored_under_two_names_is_refused(tmp_path: Path, family: str) -> None:
    model = tiny.make_model(family)
    model.save_pretrained(tmp_path)
    tensors = dict(read_model_header(tmp_path).tensors)
    shape = tuple(model.state_dict()[GATE_UP].shape)
    tensors[GATE_UP] = TensorHeader(GATE_UP, shape, "F32", "model.safetensors")
    whole = math.prod(shape)
    with refused(CheckpointError, facts=[repr(GATE_UP), f"{2 * whole} elements", f"{whole} elements"]):
        built(tmp_path, tensors)


TALL = {"rope_parameters": tiny_images.QWEN_TEXT["rope_parameters"] | {"mrope_interleaved": True}}
EXPERTS_OF_QWEN = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def turning() -> Any:
    """Return a Qwen3-VL-MoE, whose files hold the experts' projections transposed."""
    vision = tiny_images.QWEN_VISION_2 | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = tiny_images.TEXT | tiny.HEAD | EXPERTS_OF_QWEN | TALL
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def joining() -> Any:
    """Return an OLMo hybrid, whose module joins three convolutions of the files."""
    return AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("olmo_hybrid", **tiny.COMMON))


def splitting() -> Any:
    """Return an HRM, whose module splits tensors of the files."""
    return AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("hrm_text", **tiny.COMMON))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (turning, "model.language_model.layers.0.mlp.experts.down_proj"),
        (joining, "linear_attn.k_conv1d.weight"),
        (splitting, "attn.gqkv_proj.weight"),
    ],
    ids=["turned", "joined", "split"],
)
def test_tensors_that_are_no_contiguous_part_of_a_parameter_are_refused(
    tmp_path: Path, make: Callable[[], Any], name: str
) -> None:
    make().save_pretrained(tmp_path)
    with refused(CheckpointError, where=str(tmp_path), facts=[name, "contiguous"]):
        built(tmp_path)


@pytest.mark.parametrize(
    "operations", [[Transpose(0, 1)], [MergeModulelist(1)], [MergeModulelist(0), Transpose(1, 2)], []], ids=str
)
def test_any_other_operation_than_stacking_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operations: list[Any]
) -> None:
    tiny.make_model("qwen3_moe").save_pretrained(tmp_path)
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    converter = WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", operations=[Transpose(0, 1)])
    converter.operations = operations
    monkeypatch.setattr(engine.models.names, "get_model_conversion_mapping", lambda model: [converter])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tensors = {name: TensorHeader(name, (32, 24), "F32", "model.safetensors")}
    with refused(CheckpointError, where=str(tmp_path), facts=[repr(name), "contiguous"]):
        match_names(model, tensors, tmp_path)


def test_every_parameter_that_is_not_tied_must_be_filled() -> None:
    module = torch.nn.Linear(2, 3, bias=False)
    model = SimpleNamespace(named_parameters=module.named_parameters, all_tied_weights_keys={})
    header = {"w": TensorHeader("w", (3, 2), "F32", "f"), "v": TensorHeader("v", (1, 2), "F32", "f")}
    check_filled(model, {"w": Place("weight")}, header, Path("there"))
    with refused(CheckpointError, where="there", facts=["'weight'", "2 elements", "6 elements"]):
        check_filled(model, {"v": Place("weight")}, header, Path("there"))
    with refused(CheckpointError, where="there", facts=["'weight'", "6 elements"]):
        check_filled(model, {}, header, Path("there"))
    tied = SimpleNamespace(named_parameters=module.named_parameters, all_tied_weights_keys={"weight": "other"})
    check_filled(tied, {}, header, Path("there"))


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, n_positions=40), 40),
        (transformers.GPTJConfig(n_embd=8, n_head=2, n_layer=1, n_positions=40, rotary_dim=4), 40),
        (transformers.OPTConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, ffn_dim=8), 2048),
        (transformers.XGLMConfig(d_model=8, attention_heads=2, num_layers=1, ffn_dim=8), None),
        (transformers.BloomConfig(hidden_size=8, n_head=2, n_layer=1), None),
        (transformers.RwkvConfig(hidden_size=8, num_hidden_layers=2), None),
        (transformers.LlamaConfig(**tiny.COMMON), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_has_as_many_positions_as_its_table(config: Any, most: int | None) -> None:
    model = AutoModelForCausalLM.from_config(config)
    assert positions_of(model) == most
    if most == 40:
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.ones(1, 41, dtype=torch.long))
