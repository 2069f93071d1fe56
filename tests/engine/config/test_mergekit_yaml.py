"""mergekit's forms of a YAML, their translation to `Config`, and the place of every fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from errors import refused
from hypothesis import given
from hypothesis import strategies as st

from engine.config.mergekit_yaml import as_yaml
from engine.config.reader import load_config, parse_config
from engine.config.schema import Config
from engine.errors import ConfigError
from engine.methods.options import DENSITY, Option

HEAD = {"merge_method": "ties", "base_model": "b"}
MODELS: list[dict[str, Any]] = [{"model": "x", "parameters": {"weight": 0.3}}, {"model": "y"}]


def parse(**keys: Any) -> Config:
    return parse_config(HEAD | {"models": MODELS} | keys, Path("merge.yaml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "merge.yaml"
    path.write_text(text)
    return path


def test_a_base_among_the_models_is_no_expert_but_has_settings() -> None:
    models = [{"model": "x"}, {"model": "b", "parameters": {"weight": 0.5}}, {"model": "y"}]
    config = parse(merge_method="linear", models=models)
    assert [model.model for model in config.models] == ["x", "y"]
    assert config.recipe is not None
    (only,) = config.recipe.slices
    assert (only.base, only.sources[1].expert, only.sources[1].settings) == (1, None, {"weight": 0.5})


def test_without_a_base_the_first_model_lends_its_files() -> None:
    raw = {"merge_method": "linear", "models": [{"model": "x"}, {"model": "y"}]}
    config = parse_config(raw, Path("merge.yaml"))
    assert config.recipe is not None and config.recipe.baseless
    assert config.base_model == "x" and len(config.models) == 2


def test_slices_share_experts_and_have_settings_of_their_own() -> None:
    slices = [
        {
            "sources": [
                {"model": "x", "layer_range": [0, 4], "parameters": {"weight": 1}},
                {"model": "b", "layer_range": [2, 6]},
            ],
            "parameters": {"density": 0.5},
        },
        {"sources": [{"model": "y", "layer_range": [3, 5]}, {"model": "x", "layer_range": [0, 2]}]},
    ]
    config = parse_config(HEAD | {"slices": slices, "parameters": {"lambda": 2}}, Path("merge.yaml"))
    assert [model.model for model in config.models] == ["x", "y"]
    assert config.recipe is not None and config.recipe.top == {"lambda": 2}
    one, other = config.recipe.slices
    assert [(s.expert, s.layers, s.settings) for s in one.sources] == [(0, (0, 4), {"weight": 1}), (None, (2, 6), {})]
    assert (one.base, one.settings, other.base, other.has_base) == (1, {"density": 0.5}, None, True)
    assert [(s.expert, s.layers) for s in other.sources] == [(1, (3, 5)), (0, (0, 2))]


def test_a_model_may_be_a_mapping_as_mergekit_writes_it() -> None:
    base = {"model": {"path": "o/b", "revision": "v1"}, "lora": {"path": "l"}}
    listed = [{"model": {"model": {"path": "x", "revision": None}, "lora": None}}, {"model": base}]
    config = parse(base_model=base, models=listed)
    assert (config.base_model, [model.model for model in config.models]) == ("o/b@v1+l", ["x"])


@pytest.mark.parametrize(("given", "layers"), [([0, 2], (0, 2)), (["1", 3.0], (1, 3))])
def test_the_numbers_of_layers_may_be_texts_and_floats_as_mergekit_takes_them(given: Any, layers: Any) -> None:
    slices = [{"sources": [{"model": "x", "layer_range": given}]}]
    config = parse_config({"merge_method": "passthrough", "slices": slices}, Path("merge.yaml"))
    assert config.recipe is not None and config.recipe.slices[0].sources[0].layers == layers
    for wrong in ([0, True], [0, 2.5], [0, "two"], [-1, 2], [2, 2]):
        with refused(ConfigError, facts=["layer_range"]):
            parse_config(
                {"merge_method": "passthrough", "slices": [{"sources": [{"model": "x", "layer_range": wrong}]}]},
                Path("m"),
            )


def test_the_same_model_twice_in_a_slice_is_two_experts() -> None:
    sources = [{"model": "x", "layer_range": [0, 2]}, {"model": "x", "layer_range": [2, 4]}]
    config = parse_config(HEAD | {"slices": [{"sources": sources}, {"sources": sources}]}, Path("merge.yaml"))
    assert [(model.model, model.name) for model in config.models] == [("x", "x"), ("x", "x-2")]


def test_a_base_that_is_a_model_like_others_takes_part_in_a_slice_if_it_is_listed() -> None:
    source = {"model": "x", "layer_range": [0, 2]}
    slices = [{"sources": [source]}, {"sources": [{"model": "b", "layer_range": [0, 2]}]}]
    config = parse_config({"merge_method": "linear", "base_model": "b", "slices": slices}, Path("merge.yaml"))
    assert config.recipe is not None and [part.has_base for part in config.recipe.slices] == [False, True]


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_slice_has_a_base_of_its_own(method: str) -> None:
    sources = [{"model": "x", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 2]}]
    slices = [{"sources": sources, "base_model": "x"}, {"sources": sources}]
    config = parse_config({"merge_method": method, "base_model": "b", "slices": slices}, Path("merge.yaml"))
    assert [model.model for model in config.models] == ["x", "b"]
    assert config.recipe is not None
    assert [[s.expert for s in part.sources] for part in config.recipe.slices] == [[0, 1], [0, None]]
    assert [part.base for part in config.recipe.slices] == [0, 1]


@pytest.mark.parametrize("method", ["dare_ta", "dare_linear"])
def test_an_alias_is_the_method(method: str) -> None:
    assert parse(merge_method=method).merge_method == "dare_linear"


def test_learning_options_of_the_same_config_are_ignored_and_listed() -> None:
    models = [{"model": "x", "calibration": "x.jsonl", "parameters": {"loss_weight": 2}}, {"model": "y"}]
    cluster = {"trainers": 2, "shards": 3}
    config = parse(models=models, parameters={"budget": 1, "density": 0.5}, batch_tokens=7, cluster=cluster)
    assert set(config.unused) == {"budget", "loss_weight", "batch_tokens", "cluster.trainers"}
    learned = {"merge_method": "expert_merging", "base_model": "b", "models": [{"model": "x", "calibration": "x"}]}
    other = parse_config(learned | {"parameters": {"density": 0.5, "epochs": 2}}, Path("merge.yaml"))
    assert other.unused == ("density",) and other.parameters.epochs == 2 and other.learned


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("parameters: {density: 1.5}", ["parameters.density", "1.5"]),
        ("parameters: {density: [0.5, high]}", ["parameters.density", "'high'"]),
        ("parameters: {density: [0.5, {value: 1}]}", ["parameters.density", "{filter, value}"]),
        ("parameters: {density: []}", ["parameters.density"]),
        ("parameters: {density: {filter: mlp}}", ["parameters.density", "`value`"]),
        ("parameters: {normalize: 3}", ["parameters.normalize", "3", "bool"]),
        ("parameters: {trim: all}", ["parameters.trim", "'all'", "tensor, model"]),
        ("parameters: {weight: true}", ["parameters.weight", "True", "float"]),
        ("tokenizer: union", ["'union'", "tokens"]),
        ("tokenizer: {source: [x]}", ["tokenizer.source", "['x']"]),
        ("tokenizer: {tokens: [a]}", ["tokenizer.tokens"]),
        ("tokenizer: {tokens: {a: b}}", ["tokenizer.tokens"]),
        ("tokenizer: {tokens: {a: {source: z}}}", ["tokenizer.tokens.a", "'z'"]),
        ("tokenizer: {tokens: {a: {source: x, force: 1}}}", ["tokenizer.tokens.a.force", "1"]),
        ("tokenizer: {tokens: {a: {source: {kind: none}}}}", ["tokenizer.tokens.a", "model_token"]),
        ("tokenizer: {tokens: {a: {source: {kind: model_token, model: x}}}}", ["tokenizer.tokens.a", "`token_id`"]),
        ("tokenizer: {tokens: {a: {source: {kind: model_token, model: x, token_id: -1}}}}", ["tokenizer.tokens.a"]),
        ("tokenizer: {pad_to_multiple_of: 0}", ["pad_to_multiple_of", "0"]),
        ("recipe: {}", ["'recipe'"]),
        ("slices: []", ["`models`", "`slices`"]),
        ("on_missing: zero", ["on_missing", "'zero'"]),
    ],
)
def test_a_fault_is_reported_with_its_place(tmp_path: Path, text: str, facts: list[str]) -> None:
    path = write(tmp_path, f"merge_method: ties\nbase_model: b\n{text}\nmodels: [{{model: x}}]\n")
    with refused(ConfigError, facts=[f"{path}:3: ", *facts]):
        load_config(path)


def test_a_config_of_mergekit_moe_is_named(tmp_path: Path) -> None:
    path = write(
        tmp_path, "base_model: b\ngate_mode: hidden\nexperts:\n- source_model: x\n  positive_prompts: [code]\n"
    )
    with refused(ConfigError, where=f"{path}:2", do="mergekit-moe", facts=["merge_method"]):
        load_config(path)


def test_a_fault_of_one_model_is_reported_at_that_model(tmp_path: Path) -> None:
    text = "merge_method: ties\nbase_model: b\nmodels:\n- model: x\n- model: y\n  parameters: {density: -1}\n"
    path = write(tmp_path, text)
    with refused(ConfigError, where=f"{path}:6", facts=["models.1.parameters.density", "-1"]):
        load_config(path)


@pytest.mark.parametrize(
    ("setting", "tensor", "depth", "value"),
    [
        (0.5, "any", 0.7, 0.5),
        ("1e-1", "any", 0, 0.1),
        ([0, 1], "any", 0.25, 0.25),
        ([0, 1, 0], "any", 0.75, 0.5),
        ([0.3], "any", 1.0, 0.3),
        ({"filter": "mlp", "value": 0.5}, "layers.0.mlp.up", 0, 0.5),
        ({"filter": "mlp", "value": 0.5}, "layers.0.attn.q", 0, 1.0),
        ([{"filter": "mlp", "value": [0, 1]}, {"value": 0.2}], "layers.0.mlp.up", 0.5, 0.5),
        ([{"filter": "mlp", "value": [0, 1]}, {"value": 0.2}], "layers.0.attn.q", 0.5, 0.2),
        ([{"filter": "*", "value": 0.9}, {"value": 0.2}], "layers.0.attn.q", 0.5, 0.9),
    ],
)
def test_settings(setting: Any, tensor: str, depth: float, value: float) -> None:
    DENSITY.check(setting)
    assert DENSITY.resolve([None, {"density": setting}], tensor, depth) == pytest.approx(value)


def test_the_first_scope_that_says_a_value_counts() -> None:
    scopes = [{"density": {"filter": "mlp", "value": 0.1}}, {"density": 0.2}, {"density": 0.3}]
    assert DENSITY.resolve(scopes, "mlp", 0) == 0.1
    assert DENSITY.resolve(scopes, "attn", 0) == 0.2
    assert DENSITY.resolve([], "attn", 0) == 1.0


def test_gradients_of_words_are_steps() -> None:
    option = Option("mode", "a", "", kind=str)
    assert [option.resolve([{"mode": ["a", "b", "c"]}], "t", depth) for depth in (0, 0.49, 0.5, 0.99, 1)] == list(
        "aabbc"
    )


def test_rules_for_tokens_are_read_and_written_again() -> None:
    tokens: dict[str, Any] = {
        "a": {"source": "y", "force": True},
        "b": {"source": {"kind": "zero"}},
        "c": {"source": {"kind": "model_token", "model": "b", "token": "d"}},
        "e": {"source": {"kind": "model_token", "model": "x", "token_id": 0}},
        "f": {"force": True},
        "g": {},
    }
    tokenizer = {"source": "union", "tokens": tokens, "pad_to_multiple_of": 16}
    config = parse(tokenizer=tokenizer)
    assert config.recipe is not None and config.tokenizer_source == "union"
    models = {token: rule.model for token, rule in config.recipe.tokens.tokens.items()}
    assert models == {"a": 2, "b": None, "c": 0, "e": 1, "f": None, "g": None}
    written = as_yaml(config)
    assert written["tokenizer"] == tokenizer
    assert "tokenizer_source" not in written
    assert parse_config(yaml.safe_load(yaml.safe_dump(written)), Path("again.yaml")).recipe == config.recipe
    for value, source in ({"source": "base"}, "base"), ({}, "union"), (None, None):
        config = parse(tokenizer=value)
        assert config.tokenizer_source == source and "tokenizer" not in as_yaml(config)
    # mergekit takes a mapping for a model in all of these places.
    y = {"model": {"path": "y"}}
    mapped = {"a": {"source": y, "force": True}, "c": {"source": {"kind": "model_token", "model": y, "token": "d"}}}
    config = parse(tokenizer={"source": y, "tokens": mapped})
    assert config.recipe is not None and config.tokenizer_source == parse(tokenizer_source=y).tokenizer_source == "y"
    assert {rule.model for rule in config.recipe.tokens.tokens.values()} == {2}
    with refused(ConfigError, facts=["tokenizer.tokens.a.source"]):
        parse(tokenizer={"tokens": {"a": {"source": {"model": "y", "token": "b"}}}})
    with refused(ConfigError, facts=["`tokenizer`", "`tokenizer_source`"]):
        parse(tokenizer={}, tokenizer_source="base")


def test_a_rule_counts_experts_as_the_config_does_where_the_base_is_listed_twice() -> None:
    sources = [
        {"model": model, "layer_range": layers} for model, layers in (("b", [0, 2]), ("b", [2, 4]), ("x", [0, 2]))
    ]
    tokenizer = {"source": "base", "tokens": {"a": {"source": "x"}, "c": {"source": "b"}}}
    raw = HEAD | {"merge_method": "linear", "slices": [{"sources": sources}], "tokenizer": tokenizer}
    config = parse_config(raw, Path("merge.yaml"))
    assert [expert.model for expert in config.models] == ["b", "x"] and config.recipe is not None
    assert {token: rule.model for token, rule in config.recipe.tokens.tokens.items()} == {"a": 2, "c": 0}


scalars = st.floats(0, 1) | st.integers(0, 1)
gradients = st.lists(scalars, min_size=1, max_size=4)
settings = (
    scalars
    | gradients
    | st.lists(
        st.fixed_dictionaries(
            {"value": scalars | gradients}, optional={"filter": st.sampled_from(["mlp", "*", "q_proj"])}
        ),
        min_size=1,
        max_size=3,
    )
)
parameters = st.fixed_dictionaries({}, optional={"density": settings, "weight": settings})


sources = st.fixed_dictionaries(
    {"model": st.sampled_from(["/m/b", "/m/0", "/m/1", "/n/0"])}, optional={"parameters": parameters}
)
slices = st.fixed_dictionaries(
    {"sources": st.lists(st.tuples(sources, st.integers(0, 3)), min_size=1, max_size=3)},
    optional={
        "parameters": parameters,
        "base_model": st.just("/m/b"),
        "merge_method": st.sampled_from(["linear", "ties"]),
    },
)
modules = st.fixed_dictionaries(
    {},
    optional={
        "default": st.lists(slices, min_size=1, max_size=2),
        "vision_tower": st.lists(sources, min_size=1, max_size=2),
    },
)


def sliced(part: dict[str, Any]) -> dict[str, Any]:
    """Return a slice with ranges of two layers, and with its base among its sources."""
    listed = [one | {"layer_range": [first, first + 2]} for one, first in part["sources"]]
    if part.get("base_model") and all(one["model"] != "/m/b" for one in listed):
        listed.append({"model": "/m/b", "layer_range": [0, 2]})
    return part | {"sources": listed}


@hypothesis.settings(deadline=None)
@given(
    st.lists(sources, min_size=1, max_size=3) | st.lists(slices, min_size=1, max_size=3).map(tuple) | modules,
    parameters,
    st.booleans(),
)
def test_a_recipe_written_as_yaml_is_the_same_recipe(given: Any, top: dict[str, Any], base: bool) -> None:
    raw: dict[str, Any] = {"merge_method": "ties" if base else "linear", "parameters": {} if not base else top}
    raw |= {"base_model": "/m/b"} if base else {}
    if isinstance(given, list):
        raw["models"] = given
    elif isinstance(given, tuple):
        raw["slices"] = [*map(sliced, given)]
    elif given:
        raw["modules"] = {
            name: {"slices": [*map(sliced, parts)]} if name == "default" else {"models": parts, "parameters": {}}
            for name, parts in given.items()
        }
    else:
        return
    try:
        config = parse_config(raw, Path("merge.yaml"))
    except ConfigError:
        # An option that the method lacks, or a base that it needs.
        hypothesis.reject()
    text = yaml.safe_dump(as_yaml(config), sort_keys=False)
    again = parse_config(yaml.safe_load(text), Path("again.yaml"))
    assert again.model_dump() == config.model_dump() | {"unused": again.unused}
