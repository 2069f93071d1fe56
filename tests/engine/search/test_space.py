"""The space of a search: which keys of a config it means, and the configs of trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from errors import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.documents import read_documents
from engine.config.search.dimensions import Dimension, read_dimension
from engine.errors import ConfigError
from engine.search.space import Space
from engine.search.study import Study

RANGE = {"low": 0.0, "high": 1.0}


def space(folder: Path, keys: dict[str, Any], models: int = 2, **config: Any) -> Space:
    """The space of a config of models that are never read."""
    raw: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "base"}
    raw["models"] = [{"model": f"e{k}", "parameters": {"weight": 0.5}} for k in range(models)]
    raw |= {"search": {"space": keys, "trials": 3} | config.pop("search", {})} | config
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    document = read_documents(path)[0]
    search = document.config({}).search
    assert search is not None
    made = Space.of(document, search)
    made.check()
    return made


def test_a_star_stands_for_each_expert(tmp_path: Path) -> None:
    made = space(tmp_path, {"models.*.parameters.weight": RANGE}, models=3)
    assert list(made.places) == [f"models.{k}.parameters.weight" for k in range(3)]
    config = made.config({"models.1.parameters.weight": 0.25})
    assert config.recipe is not None
    assert [config.recipe.settings_of(k)[0]["weight"] for k in range(3)] == [0.5, 0.25, 0.5]


def test_stars_stand_for_filters_and_values_over_the_layers(tmp_path: Path) -> None:
    weight = [{"filter": "mlp", "value": [0.1, 0.2, 0.3]}, {"value": 0.4}]
    made = space(tmp_path, {"parameters.lambda.0.value.*": RANGE}, parameters={"lambda": weight})
    assert list(made.places) == [f"parameters.lambda.0.value.{at}" for at in range(3)]
    config = made.config({"parameters.lambda.0.value.2": 0.75})
    assert config.recipe is not None
    assert config.recipe.top["lambda"] == [{"filter": "mlp", "value": [0.1, 0.2, 0.75]}, {"value": 0.4}]


def test_an_option_of_one_of_the_methods_belongs_to_the_space(tmp_path: Path) -> None:
    keys = {"merge_method": ["task_arithmetic", "ties"], "parameters.density": RANGE}
    assert space(tmp_path, keys).config({"merge_method": "ties", "parameters.density": 0.5}).merge_method == "ties"


def test_the_values_of_the_config_come_first_where_they_are_in_the_space(tmp_path: Path) -> None:
    assert space(tmp_path, {"models.*.parameters.weight": RANGE}).given() == {
        "models.0.parameters.weight": 0.5,
        "models.1.parameters.weight": 0.5,
    }
    assert space(tmp_path, {"models.*.parameters.weight": {"low": 0.6, "high": 1}}).given() is None
    assert space(tmp_path, {"parameters.lambda": RANGE}).given() is None


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"base_model": ["a", "b"]},
        {"models.0.model": ["a", "b"]},
        {"parameters": [1, 2]},
        {"parameters.lambda": {"low": 1, "high": 1}},
        {"parameters.lambda": {"low": 0, "high": float("inf")}},
        {"parameters.lambda": {"low": 0, "high": 1, "log": True}},
        {"parameters.lambda": {"low": 0.5, "high": 1, "integer": True}},
        {"parameters.lambda": {"low": 0, "high": 1, "steps": 3}},
        {"parameters.lambda": [1]},
        {"parameters.lambda": [1, 1]},
        {"parameters.lambda": [1, [2]]},
        {"parameters.lambda": 1},
        {"slices.*.merge_method": ["ties", "linear"]},
        {"models.5.parameters.weight": RANGE},
        {"models.*.parameters.weight": RANGE, "models.0.parameters.weight": RANGE},
        # No option of the method, or none at all.
        {"parameters.density": RANGE},
        {"parameters.lamda": RANGE},
        {"merge_method": ["ties", "no_such_method"]},
        # Out of the option's bounds.
        {"merge_method": ["ties", "task_arithmetic"], "parameters.density": {"low": 0.5, "high": 1.5}},
    ],
    ids=str,
)
def test_a_space_that_is_none_is_refused(tmp_path: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        space(tmp_path, keys)
    assert str(tmp_path / "merge.yaml") in caught.value.where
    assert caught.value.expected or caught.value.do or caught.value.what


@pytest.mark.parametrize(
    "search",
    [
        {"trials": 0},
        {"objective": []},
        {"objective": [{"metric": "loss"}]},
        {"algorithm": "grid"},
        {"algorithm": "nsga2", "objective": [{"data": "one.jsonl"}]},
        {"algorithm": "nsga3", "rungs": 2},
        {"parallel": 0},
        {"rungs": 9},
    ],
    ids=str,
)
def test_settings_that_are_none_are_refused(tmp_path: Path, search: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        space(tmp_path, {"parameters.lambda": RANGE}, search=search)
    assert str(tmp_path / "merge.yaml") in caught.value.where


def test_cmaes_takes_numbers_alone(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"merge_method": ["ties", "task_arithmetic"]}
    with refused(ConfigError, do="tpe"):
        space(tmp_path, keys, search={"algorithm": "cmaes"})
    space(tmp_path, keys, search={"algorithm": "tpe"})


def test_algorithms_of_several_objectives_need_several(tmp_path: Path) -> None:
    keys, part = {"parameters.lambda": RANGE}, {"data": "one.jsonl"}
    with refused(ConfigError, do="tpe"):
        space(tmp_path, keys, search={"algorithm": "nsga2", "objective": [part]})
    space(tmp_path, keys, search={"algorithm": "tpe", "objective": [part]})
    space(tmp_path, keys, search={"algorithm": "nsga2", "objective": [part, {"data": "two.jsonl"}]})


numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.tuples(numbers, numbers).filter(lambda pair: pair[0] < pair[1]), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_what_is_proposed_lies_in_the_space(
    tmp_path_factory: pytest.TempPathFactory, ends: tuple[float, float], with_list: bool, seed: int
) -> None:
    low, high = ends
    keys: dict[str, Any] = {"parameters.lambda": {"low": low, "high": high}}
    keys |= {"parameters.normalize": [True, False]} if with_list else {}
    made = space(tmp_path_factory.mktemp("space"), keys, search={"algorithm": "random"})
    search = read_documents(made.document.path)[0].config({}).search
    assert search is not None
    study = Study(made, search, seed, 1)
    for number in range(3):
        values = study.ask(number)
        assert values.keys() == keys.keys()
        assert all(made.dimensions[name].has(value) for name, value in values.items())
        assert made.config(values).merge_method == "task_arithmetic"


@given(st.integers(-1000, 1000), st.integers(1, 1000))
def test_a_range_of_whole_numbers_has_whole_numbers(low: int, more: int) -> None:
    dimension = read_dimension({"low": low, "high": low + more, "integer": True}, "key", "here")
    assert dimension == Dimension(low=low, high=low + more, integer=True)
    assert dimension.has(low) and dimension.has(low + more) and not dimension.has(low + 0.5)
