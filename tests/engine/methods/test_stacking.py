"""Merges by slices and modules, compared with mergekit's of the same YAML: the plan of every tensor, and its values."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import tiny
import tiny_images
import torch
import transformers
import yaml
from conftest import plan_of
from errors import refused
from hypothesis import given
from hypothesis import strategies as st
from peft_adapters import build
from safetensors.torch import load_file
from thorough import as_thorough
from transformers import AutoModelForCausalLM
from weight_space import (
    BESIDE_MERGEKIT,
    combine,
    configs_read_once,
    make_models,
    mergekits,
    ours,
    read,
    worst,
    write_config,
)

from engine.config.mergekit_yaml import as_yaml
from engine.errors import CheckpointError, ConfigError
from engine.methods.registry import get_method
from engine.output.card import write_weight_space_card
from engine.output.model_folder import output_files, write_companions
from engine.planning.open_models import base_folder
from engine.planning.plan import Plan, experts_of, slice_of
from engine.shards.settings import resolve

pytest.importorskip("mergekit")
pytestmark = BESIDE_MERGEKIT

LAYERS = 4
# Difference of float32 sums in different orders, for weights of about one.
CLOSE = 1e-6


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    with configs_read_once():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of four layers and two experts, float32."""
    return make_models(tmp_path_factory.mktemp("stacked"), layers=LAYERS, experts=2)


Planned = dict[str, tuple[dict[str, Any], dict[str, tuple[str, dict[str, Any]]]]]


def planned_by_mergekit(config: Path) -> Planned:
    """Return what mergekit plans: of each tensor the options, and of each model its tensor and options."""
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import _model_out_config
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    given, options = MergeConfiguration.model_validate(yaml.safe_load(config.read_text())), MergeOptions(quiet=True)
    LoaderCache().setup(options)
    architecture = get_architecture_info(given, options)
    planner = MergePlanner(given, architecture, options, _model_out_config(given, architecture))
    planner._plan()
    found: Planned = {}
    for weight, merge in planner._tensors:
        inputs = merge.gather_tensors.weight_info
        found[weight.name] = (
            dict(merge.parameters.items()),
            {
                Path(str(model)).name: (inputs[model].name, dict(merge.input_parameters[model].items()))
                for model in merge.model_order
                if model in inputs.data
            },
        )
    return found


def planned(plan: Plan) -> Planned:
    """Return what this engine plans, in the same form."""
    found: Planned = {}
    for name in plan.merged:
        values, own, of_base = resolve(plan, name)
        part, origin = slice_of(plan, name), plan.origin(name)
        models: dict[str, tuple[str, dict[str, Any]]] = {}
        options = iter(own)
        for place, source in enumerate(part.sources):
            if origin.sources is not None and place not in origin.sources:
                continue
            model = plan.base.model if source.expert is None else plan.experts[source.expert].model
            given = (of_base or {}) if place == part.base else next(options)
            models[Path(model).name] = (origin.name_in(source.layers), given)
        if part.base is None and part.has_base:
            models[Path(plan.base.model).name] = (name, of_base or {})
        assert len(own) == len(experts_of(plan, name))
        found[name] = (values, models)
    return found


def assert_planned_alike(config: Path) -> None:
    plan, theirs = plan_of(config), planned_by_mergekit(config)
    mine = planned(plan)
    assert set(mine) == set(theirs)
    based = all(part.has_base for part in plan.config.recipe.slices) if plan.config.recipe else False
    for name, (values, models) in theirs.items():
        if based and "base" not in models:
            continue  # mergekit cuts the base off a longer last slice, and refuses the tensor when it comes to it
        own_values, own_models = mine[name]
        assert_alike(own_values, values, name)
        assert set(own_models) == set(models), name
        for model, (tensor, options) in models.items():
            own_tensor, own_options = own_models[model]
            assert own_tensor == tensor
            assert_alike(own_options, options, name)


def assert_alike(own: dict[str, Any], theirs: dict[str, Any], name: str) -> None:
    """Compare values of options; native methods have further ones."""
    same = {key: own[key] for key in theirs}
    assert same == theirs or same == pytest.approx(theirs), name


def source(model: str, first: int, last: int, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, last], **({"parameters": parameters} if parameters else {})}


NUMBERS = st.sampled_from([0, 0.25, 0.5, 1])
FILTERS = st.sampled_from(["mlp", "self_attn", "*", "layers.1.", "norm", "lm_head"])
GRADIENTS = st.lists(NUMBERS, min_size=1, max_size=4)
SETTINGS = (
    NUMBERS
    | GRADIENTS
    | st.lists(
        st.fixed_dictionaries({"value": NUMBERS | GRADIENTS}, optional={"filter": FILTERS}), min_size=1, max_size=3
    )
)
# Of each method the options with a setting, those that are yes or no, and whether it has a base.
METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...], bool]] = {
    "linear": (("weight",), ("normalize",), False),
    "passthrough": (("scale",), (), False),
    "slerp": (("t",), (), True),
    "ties": (("weight", "density", "lambda"), ("normalize", "int8_mask"), True),
    "dare_linear": (("weight", "density", "lambda"), ("normalize", "rescale"), True),
    "breadcrumbs": (("weight", "density", "gamma"), ("normalize",), True),
    "model_stock": ((), ("filter_wise",), True),
    "nuslerp": (("weight",), ("nuslerp_flatten",), True),
}
COUNTS = {"passthrough": 1, "slerp": 2, "model_stock": 3, "nuslerp": 3}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Configs of one to three slices that mergekit accepts, with settings at every level."""
    method = draw(st.sampled_from(sorted(METHODS)))
    numbers, switches, based = METHODS[method]
    parameters = st.fixed_dictionaries(
        {}, optional=dict.fromkeys(numbers, SETTINGS) | dict.fromkeys(switches, st.booleans())
    )
    slices = []
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(1, LAYERS))
        listed = draw(st.permutations(["base", "expert0", "expert1"]))[: COUNTS.get(method, draw(st.integers(1, 3)))]
        if based and "base" not in listed:
            listed[draw(st.integers(0, len(listed) - 1))] = "base"
        starts = [draw(st.integers(0, LAYERS - length)) for _ in listed]
        sources = [
            source(model, first, first + length, **draw(parameters))
            for model, first in zip(listed, starts, strict=True)
        ]
        slices.append({"sources": sources, "parameters": draw(parameters)})
    top = draw(parameters) | {name: draw(NUMBERS) for name in numbers}
    config = {"merge_method": method, "parameters": top} | ({"base_model": "base"} if based else {})
    if draw(st.booleans()):
        return config | {"modules": {"default": {"slices": slices, "parameters": draw(parameters)}}}
    return config | {"slices": slices}


@pytest.mark.parametrize("examples", [25, as_thorough(200)])
def test_every_tensor_has_the_sources_and_options_that_mergekit_gives_it(models: Path, examples: int) -> None:
    @hypothesis.settings(deadline=None, max_examples=examples, derandomize=True)
    @given(configs())
    def check(config: dict[str, Any]) -> None:
        path = write_config(models, **config)
        try:
            assert_planned_alike(path)
        finally:
            path.unlink()

    check()


def test_the_plan_and_the_card_say_what_was_stacked_and_the_recorded_config_stacks_it_again(
    models: Path, tmp_path: Path
) -> None:
    plan = plan_of(write_config(models, **STACKS["overlapping, with a scale"], dtype="float32"))
    assert plan.stacked == ["layers 0 to 2: base[0:3]", "layers 3 to 5: expert0[1:4]"]
    write_weight_space_card(tmp_path / "README.md", plan, get_method("passthrough"), defaultdict(str))
    card = (tmp_path / "README.md").read_text().replace("\\", "")
    assert all(line in card for line in plan.stacked)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(as_yaml(plan.resolved)))
    assert plan_of(again).layout == plan.layout


STACKS: dict[str, dict[str, Any]] = {
    "overlapping, with a scale": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [source("base", 0, 3)]},
            {"sources": [source("expert0", 1, 4, scale=[{"filter": "o_proj", "value": 0.5}, {"value": 1}])]},
        ],
    },
    "a part of the layers, of other ranges": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": [{"sources": [source("expert0", 0, 2, weight=0.7), source("base", 1, 3), source("expert1", 2, 4)]}],
        "parameters": {"weight": [0.2, 0.6]},
    },
    "the base of a slice": {
        "merge_method": "slerp",
        "base_model": "base",
        "slices": [
            {"sources": [source("base", 0, 2), source("expert0", 0, 2)], "parameters": {"t": 0.3}},
            {
                "sources": [source("base", 1, 4), source("expert1", 1, 4)],
                "base_model": "expert1",
                "parameters": {"t": [0, 1]},
            },
        ],
    },
    "more models in the last slice": {
        "merge_method": "linear",
        "slices": [
            {"sources": [source("expert0", 0, 1, weight=1)]},
            {"sources": [source("expert1", 0, 1, weight=2), source("base", 2, 3, weight=1)]},
        ],
    },
    "only the base": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "base", "parameters": {"weight": 0.5}}],
        "parameters": {"weight": 1, "density": 0.5},
    },
}


@pytest.mark.parametrize("case", STACKS)
def test_the_values_are_mergekits(case: str, models: Path) -> None:
    config = write_config(models, **STACKS[case], dtype="float32")
    mine = ours(config, shards=2)
    assert worst(mine, mergekits(config)) <= CLOSE


def test_the_output_is_a_model_of_as_many_layers(models: Path) -> None:
    config = write_config(models, **STACKS["overlapping, with a scale"], dtype="float32")
    plan, theirs = plan_of(config), config.with_suffix(".mergekit")
    folder = combine(plan, config.with_suffix(".whole"))
    write_companions(folder, plan, base_folder(plan), output_files(plan))
    mergekits(config)
    mine, other = (json.loads((one / "config.json").read_text()) for one in (folder, theirs))
    assert mine["num_hidden_layers"] == other["num_hidden_layers"] == 6
    found = [AutoModelForCausalLM.from_pretrained(one)(torch.arange(7)[None]).logits for one in (folder, theirs)]
    assert torch.allclose(*found, atol=1e-5)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Gemma 3 that takes images, and an expert."""
    folder = tmp_path_factory.mktemp("images")
    base = tiny_images.make_model("gemma3")
    tiny_images.save(base, folder / "base", "gemma3")
    tiny_images.save(tiny_images.make_expert(base, 1), folder / "expert0", "gemma3")
    return folder


MODULES: dict[str, Any] = {
    "text_decoder": {
        "models": [{"model": "base", "parameters": {"weight": [0, 1]}}, {"model": "expert0"}],
        "parameters": {"weight": 0.3},
    },
    "vision_tower": {"models": [{"model": "expert0"}, {"model": "base", "parameters": {"weight": [1, 0]}}]},
    "multi_modal_projector": {"models": [{"model": "expert0"}]},
}


@pytest.mark.parametrize("keys", [list(MODULES), ["text_decoder"]])
def test_modules_have_models_and_settings_of_their_own(images: Path, keys: list[str]) -> None:
    modules = {key: MODULES[key] for key in keys}
    fixed: dict[str, Any] = {"merge_method": "linear", "parameters": {"weight": 1.0}, "dtype": "float32"}
    config = write_config(images, **fixed, modules=modules)
    assert worst(ours(config), mergekits(config)) <= CLOSE


def test_the_base_provides_modules_that_are_not_listed_if_it_is_asked_to(images: Path) -> None:
    config = write_config(
        images,
        merge_method="linear",
        base_model="base",
        modules={"text_decoder": {"models": [{"model": "expert0"}]}},
        parameters={"weight": 1.0},
        on_missing="base",
    )
    plan, base = plan_of(config), load_file(images / "base" / "model.safetensors")
    mine = read(combine(plan, config.with_suffix(".ours")))
    assert set(mine) == set(base) and any("not listed" in note for _, note in plan.notes)
    others = [name for name in base if not name.startswith("language_model.")]
    assert others and all(torch.equal(mine[name], base[name]) for name in others)


def test_slices_of_a_model_with_images_are_those_of_a_module(images: Path) -> None:
    slices = [{"sources": [source("base", 0, 2)]}, {"sources": [source("expert0", 1, 3)]}]
    with refused(ConfigError, do="modules: {text_decoder: {slices: […]}}"):
        plan_of(write_config(images, merge_method="passthrough", slices=slices))
    others: dict[str, Any] = {key: {"models": [{"model": "base"}]} for key in list(MODULES)[1:]}
    config = write_config(
        images, merge_method="passthrough", modules={"text_decoder": {"slices": slices}, **others}, dtype="float32"
    )
    plan = plan_of(config)
    assert plan.base_header.num_layers == 4 and len(plan.base_header.text_config["layer_types"]) == 4
    expert = load_file(images / "expert0" / "model.safetensors")
    mine = read(combine(plan, config.with_suffix(".ours")))
    last = "language_model.model.layers.3.mlp.up_proj.weight"
    assert torch.equal(mine[last], expert[last.replace("3", "2")])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in peft
def test_an_adapter_on_the_base_is_part_of_the_base(models: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(models / "base")
    build(tmp_path, base, r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]).adapter.rename(models / "adapter")
    keys: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "base+adapter", "dtype": "float32"}
    listed = [{"model": model, "parameters": {"weight": 0.4}} for model in ("expert0", "expert1+adapter")]
    config = write_config(models, **keys, models=listed)
    mine = ours(config, shards=2)
    assert worst(mine, mergekits(config, lora_merge_cache=str(tmp_path / "cache"))) <= CLOSE
    stacked = write_config(
        models,
        merge_method="passthrough",
        slices=[{"sources": [source("base+adapter", 0, 2)]}, {"sources": [source("expert1", 1, 4)]}],
        dtype="float32",
    )
    assert worst(ours(stacked), mergekits(stacked, lora_merge_cache=str(tmp_path / "cache"))) <= CLOSE
    # An adapter in a slice has the layers of its checkpoint, which may not be those of the slice's base.
    across: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "base", "parameters": {"weight": 0.5}}
    sources = [source("base", 0, 2), source("base+adapter", 2, 4)]
    moved = write_config(models, **across, slices=[{"sources": sources}], dtype="float32")
    found = ours(moved)
    assert worst(found, mergekits(moved, lora_merge_cache=str(tmp_path / "cache"))) <= CLOSE
    alone = write_config(models, **across, slices=[{"sources": [sources[0], source("adapter", 2, 4)]}], dtype="float32")
    assert worst(ours(alone), found) == 0
    # Without a base, the first model may be an adapter's checkpoint.
    baseless = write_config(
        models, merge_method="passthrough", slices=[{"sources": [one]} for one in sources], dtype="float32"
    )
    assert worst(ours(baseless), mergekits(baseless, lora_merge_cache=str(tmp_path / "cache"))) <= CLOSE


def test_models_of_other_depths_share_a_stack(models: Path, tmp_path: Path) -> None:
    """The expert has layers that the base lacks."""
    shutil.copytree(models / "expert0", tmp_path / "base")
    make_models(tmp_path / "deep", layers=LAYERS + 2, experts=0)
    shutil.move(tmp_path / "deep" / "base", tmp_path / "expert")
    slices = [
        {"sources": [source("base", 0, 3), source("expert", 3, 6)]},
        {"sources": [source("expert", 4, 6, weight=0.5)]},
    ]
    config = write_config(tmp_path, merge_method="linear", slices=slices, parameters={"weight": 1.0}, dtype="float32")
    assert worst(ours(config), mergekits(config)) <= CLOSE


def test_layers_of_another_kind_are_stacked_but_not_merged(tmp_path: Path) -> None:
    """The first layer is dense, the others are mixtures."""
    kinds = {"mlp_only_layers": [0], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = transformers.Qwen3MoeConfig(**tiny.COMMON, **tiny.HEAD, **kinds)
    tiny.save(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "base")
    kept, other = [source("base", 0, 2)], [source("base", 0, 1), {**source("base", 1, 2), "name": "next"}]
    fixed: dict[str, Any] = {"merge_method": "linear", "parameters": {"weight": 1.0}}
    with refused(CheckpointError, do="same kind", facts=["'next'", "mlp"]):
        plan_of(write_config(tmp_path, **fixed, slices=[{"sources": other}]))
    plan = plan_of(write_config(tmp_path, **fixed, slices=[{"sources": kept}, {"sources": kept}]))
    assert plan.base_header.config["mlp_only_layers"] == [0, 2]
    folder = combine(plan, tmp_path / "out")
    write_companions(folder, plan, base_folder(plan), output_files(plan))
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert len(model.model.layers) == 4 and not any(found.values())


def test_a_base_beyond_the_number_of_models_of_the_first_slice_is_not_in_the_last_tensors(models: Path) -> None:
    """As in mergekit, for methods that need no base."""
    last = [source("expert1", 1, 3, weight=0.5), source("base", 1, 3, weight=0.4)]
    config = write_config(
        models,
        merge_method="linear",
        base_model="base",
        slices=[{"sources": [source("expert0", 0, 2, weight=0.3)]}, {"sources": last}],
        parameters={"normalize": False},
        dtype="float32",
    )
    assert worst(ours(config), mergekits(config)) <= CLOSE


def test_a_slice_may_have_a_method_of_its_own(models: Path) -> None:
    """This is no key of mergekit's."""
    halves = [[source("base", 0, 2), source("expert0", 0, 2)], [source("base", 2, 4), source("expert1", 2, 4)]]
    both = [
        {"sources": halves[0], "parameters": {"t": 0.3}},
        {"sources": halves[1], "merge_method": "task_arithmetic", "parameters": {"weight": 0.7}},
    ]
    fixed: dict[str, Any] = {"merge_method": "slerp", "base_model": "base", "dtype": "float32"}
    mine = ours(write_config(models, **fixed, slices=both))
    one = ours(write_config(models, **fixed, slices=[both[0], {"sources": halves[1], "parameters": {"t": 0.3}}]))
    other = ours(
        write_config(
            models,
            **fixed | {"merge_method": "task_arithmetic"},
            slices=[{"sources": half, "parameters": {"weight": 0.7}} for half in halves],
        )
    )
    for name, tensor in mine.items():
        layer = re.search(r"layers\.(\d)", name)
        after = layer is None and "embed" not in name
        assert torch.equal(tensor, (other if after or (layer and int(layer[1]) > 1) else one)[name]), name
