"""What an unknown key or method may stand for."""

from __future__ import annotations

from typing import Any

import pytest
from errors import refused

from engine.config.documents import given_documents
from engine.config.unknown_keys import nearest_method
from engine.errors import ConfigError

OURS: dict[str, Any] = {
    "merge_method": "expert_merging",
    "base_model": "base",
    "models": [{"model": "a", "calibration": "a.jsonl"}],
}


@pytest.mark.parametrize(
    ("keys", "meant"),
    [
        ({"epochs": 3}, "'parameters.epochs'"),
        ({"epoch": 3}, "'parameters.epochs'"),
        ({"trainers": 2}, "'cluster.trainers'"),
        ({"parameters": {"max_length": 8}}, "'calibration.max_length'"),
        ({"parameters": {"epoch": 8}}, "'epochs'"),
        ({"cluster": {"trainer": {"shards": 1}}}, "'cluster.shards'"),
        ({"calibraton": {}}, "'calibration'"),
        ({"models": [*OURS["models"], {"model": "b", "weight": 1}]}, "'models.1.parameters.weight'"),
        ({"merge_method": "iso", "parameters": {"out_dtype": "float32"}}, "'out_dtype' at the top level"),
        ({"merge_method": "iso", "parameters": {"lamda": 1}}, "'lambda'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_key_is_named_with_the_section_that_it_belongs_to(keys: dict[str, Any], meant: str) -> None:
    with refused(ConfigError, do=meant):
        given_documents(OURS | keys)[0].config({})


def test_a_key_that_is_like_no_other_gets_the_list_of_keys() -> None:
    with refused(ConfigError, do="trust_remote_code"):
        given_documents(OURS | {"zzz": 3})[0].config({})


def test_what_mergekit_ignores_is_listed_with_its_place() -> None:
    config = given_documents(OURS | {"merge_method": "ties", "parameters": {"weight": 1}, "epochs": 3, "density": 1})[0]
    assert ["'parameters.epochs'" in one or "'parameters.density'" in one for one in config.config({}).unused][-2:] == [
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("expert_merging++", "expert_merging_pp"),
        ("Expert Merging++", "expert_merging_pp"),
        ("TIES", "ties"),
        ("task-arithmetic", "task_arithmetic"),
        ("ada_merging", "adamerging"),
        ("qqq", None),
    ],
)
def test_a_method_is_found_by_the_name_that_its_paper_uses(name: str, meant: str | None) -> None:
    assert nearest_method(name) == meant
