"""Names in files and in modules: every tensor of a file has its place in the module, or is told by its name."""

from __future__ import annotations

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
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.core_model_loading import MergeModulelist, Transpose, WeightConverter

import engine.models.names
from engine.checkpoints.headers import TensorHeader, read_model_header
from engine.errors import CheckpointError
from engine.models.loading import load_model_config
from engine.models.names import Place, Places, check_filled, match_names
from engine.models.skeleton import build_skeleton, fill, part_of

MIXTURES = ("qwen3_moe", "mixtral")
EXPERTS = 4
mixture = pytest.mark.parametrize("family", MIXTURES)
# What one expert's first projection is called in a file, of the second block.
GATE = {
    "qwen3_moe": "model.layers.1.mlp.experts.{}.gate_proj.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.{}.w1.weight",
}


def built(folder: Path, tensors: dict[str, TensorHeader] | None = None) -> tuple[Any, Places]:
    """The module on the meta device, and the places of the folder's tensors, or of these."""
    config = load_model_config(folder, remote_code=True)
    tensors = read_model_header(folder).tensors if tensors is None else tensors
    return build_skeleton(config, tensors, torch.float32, folder)


def weights(folder: Path) -> dict[str, Tensor]:
    files = [safetensors.torch.load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


def filled(folder: Path) -> dict[str, Tensor]:
    """The state of the module with all tensors in their places."""
    model, places = built(folder)
    found: dict[str, Tensor] = weights(folder)
    assert places.keys() == found.keys()
    fill(model, places, {"": torch.device("cpu")}, torch.float32, found.__getitem__)
    state: dict[str, Tensor] = model.state_dict()
    return state


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def told(call: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tensors_of_language_models_are_where_from_pretrained_puts_them(
    tmp_path: Path, family: str, tied: bool
) -> None:
    tiny.save(tiny.make_model(family, tied), tmp_path, sharded=True)
    assert_same(filled(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", tiny_images.FAMILIES)
def test_tensors_of_models_with_images_are_where_from_pretrained_puts_them(
    tmp_path: Path, family: str, tied: bool
) -> None:
    tiny_images.save(tiny_images.make_model(family, tied=tied), tmp_path, family)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert_same(filled(tmp_path), theirs)


def test_tensors_of_a_model_of_its_own_code_are_where_they_were(tmp_path: Path) -> None:
    model = tiny_images.make_model(tiny_images.CHAT)
    tiny_images.save(model, tmp_path, tiny_images.CHAT)
    assert_same(filled(tmp_path), model.state_dict())


@mixture
def test_each_experts_projection_is_a_part_of_its_own(tmp_path: Path, family: str) -> None:
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
    assert {len({places[name] for name in names})} == {len(names)}, "no two have one place"
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


@pytest.mark.parametrize("family", tiny_images.FAMILIES)
def test_files_with_the_modules_own_names_work_for_models_with_images(tmp_path: Path, family: str) -> None:
    model = tiny_images.make_model(family)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert_same(filled(tmp_path), model.state_dict())


@mixture
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", ["no tensor in its files fills the model's parameter 'model.layers.1.mlp.experts.gate_up_proj'"]),
        ("all missing", ["fills the model's parameter 'model.layers.1.mlp.experts.gate_up_proj'"]),
        ("one too many", ["GATE 4", "each of 4 experts, as config.json says"]),
        ("a thousandth", ["GATE 1000", "each of 4 experts"]),
        ("wrong shape", ["GATE 2", "has shape (24, 31)", "32) for each of 4 experts"]),
        ("turned", ["GATE 2", "has shape (32, 24)", "32) for each"]),
        ("flat", ["GATE 2", "has shape (768,)"]),
        ("of all", ["GATE 2", "has shape (4, 24, 32)"]),
        ("unknown projection", ["model.layers.1.mlp.experts.0.z_proj.weight", "no partner"]),
    ],
)
def test_a_mixture_that_is_not_whole_is_told_by_the_tensor(
    tmp_path: Path, family: str, change: str, words: list[str]
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
    message = told(lambda: built(tmp_path, tensors))
    wanted = [gate(int(word.split()[1])) if word.startswith("GATE") else word for word in words]
    assert [word for word in wanted if word not in message] == [], message


@mixture
def test_a_tensor_that_is_twice_there_under_two_names_is_told(tmp_path: Path, family: str) -> None:
    model = tiny.make_model(family)
    model.save_pretrained(tmp_path)
    tensors = dict(read_model_header(tmp_path).tensors)
    whole = "model.layers.1.mlp.experts.gate_up_proj"
    tensors[whole] = TensorHeader(whole, tuple(model.state_dict()[whole].shape), "F32", "model.safetensors")
    assert whole in told(lambda: built(tmp_path, tensors))


TALL = {"rope_parameters": tiny_images.QWEN_TEXT["rope_parameters"] | {"mrope_interleaved": True}}
EXPERTS_OF_QWEN = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def turning() -> Any:
    """Qwen3-VL-MoE, whose files have the experts' projections the other way round."""
    vision = tiny_images.QWEN_VISION_2 | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = tiny_images.TEXT | tiny.HEAD | EXPERTS_OF_QWEN | TALL
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def joining() -> Any:
    """OLMo hybrid, three of whose convolutions are one in the module."""
    return AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("olmo_hybrid", **tiny.COMMON))


def splitting() -> Any:
    """HRM, of whose tensors each is several in the module."""
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
def test_tensors_that_are_no_part_of_a_parameter_are_told(tmp_path: Path, make: Callable[[], Any], name: str) -> None:
    make().save_pretrained(tmp_path)
    message = told(lambda: built(tmp_path))
    assert name in message and "is stored in another form than the module's" in message
    assert message.startswith(str(tmp_path))


@pytest.mark.parametrize(
    "operations", [[Transpose(0, 1)], [MergeModulelist(1)], [MergeModulelist(0), Transpose(1, 2)], []], ids=str
)
def test_any_other_operation_than_stacking_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operations: list[Any]
) -> None:
    tiny.make_model("qwen3_moe").save_pretrained(tmp_path)
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    converter = WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", operations=[Transpose(0, 1)])
    converter.operations = operations
    monkeypatch.setattr(engine.models.names, "get_model_conversion_mapping", lambda model: [converter])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tensors = {name: TensorHeader(name, (32, 24), "F32", "model.safetensors")}
    assert name in told(lambda: match_names(model, tensors, tmp_path))


def test_what_is_left_out_must_be_what_the_architecture_ignores() -> None:
    module = torch.nn.Linear(2, 3, bias=False)
    model = SimpleNamespace(named_parameters=module.named_parameters, all_tied_weights_keys={})
    header = {"w": TensorHeader("w", (3, 2), "F32", "f"), "v": TensorHeader("v", (1, 2), "F32", "f")}
    check_filled(model, {"w": Place("weight")}, header, Path("there"))
    assert "2 of 6 elements" in told(lambda: check_filled(model, {"v": Place("weight")}, header, Path("there")))
    assert "'weight'" in told(lambda: check_filled(model, {}, header, Path("there")))
    tied = SimpleNamespace(named_parameters=module.named_parameters, all_tied_weights_keys={"weight": "other"})
    check_filled(tied, {}, header, Path("there"))
