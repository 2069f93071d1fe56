"""Advice about files of several merges is right: followed, all merges of the file can be planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from advice import Advice, refusal
from weight_space import make_models

from engine.config.documents import read_documents
from engine.output.outline import outlined, places_of

ADVICE = Advice(
    __name__,
    elsewhere={
        "give another --out, or --fresh to replace it": "test_merges_of_one_file.py: test_merges_are_resumed_made_once",
    },
)
OURS: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "expert0"}, {"model": "expert1"}]}
LAST: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "first"}, {"model": "expert1"}]}
FIRST = OURS | {"name": "first"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"), experts=2, layers=1)


def plan(models: Path, *documents: dict[str, Any], kept: str | None = None) -> None:
    """Plan all merges of a file."""
    path = models / "merge.yaml"
    path.write_text("---\n".join(map(yaml.safe_dump, documents)))
    read = read_documents(path)
    places_of(read, str(models / "out"), kept)
    with outlined(read, models) as outlines:
        assert len(outlines.plans) == len(documents)


def test_every_advice_is_followed_or_has_a_reason() -> None:
    ADVICE.check()


def test_documents_get_names(models: Path) -> None:
    assert "`name`" in refusal(lambda: plan(models, OURS, LAST)).do
    plan(models, FIRST, LAST)


def test_a_circle_is_cut(models: Path) -> None:
    circle = LAST | {"name": "second"}
    error = refusal(lambda: plan(models, FIRST | {"models": [{"model": "second"}]}, circle, LAST))
    assert "other models" in error.do
    plan(models, FIRST, circle, LAST | {"models": [{"model": "second"}, {"model": "first"}]})


@ADVICE.followed("keep it with `--intermediate-dir FOLDER`, or remove it")
def test_an_output_that_no_other_uses_is_kept_or_not_made(models: Path) -> None:
    assert "--intermediate-dir" in refusal(lambda: plan(models, FIRST, OURS)).do
    plan(models, FIRST, OURS, kept=str(models / "kept"))
    plan(models, OURS)


@ADVICE.followed("use another method in this document")
def test_a_method_with_many_outputs_is_not_used_by_others(models: Path) -> None:
    many = FIRST | {"merge_method": "svd_intermediate", "base_model": "base"}
    assert "another method" in refusal(lambda: plan(models, many, LAST)).do
    plan(models, many | {"merge_method": "svd"}, LAST)
