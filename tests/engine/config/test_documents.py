"""Files of several merges: their order, the models that are other merges, and overrides of one or of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from errors import refused

from engine.config.documents import Document, read_documents
from engine.errors import ConfigError

PLACES = {"one": "/made/one", "two": "/made/two", "three": "/made/three"}


def merge(*models: str, **keys: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": model} for model in models], **keys}


def read(tmp_path: Path, *documents: Any, overrides: tuple[str, ...] = ()) -> list[Document]:
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return read_documents(path, overrides)


def test_each_merge_follows_those_that_it_uses_and_the_output_is_the_last(tmp_path: Path) -> None:
    first, second = merge("x", "y", name="one"), merge("one", "y", name="two")
    documents = read(tmp_path, merge("two", "one"), second, first)
    assert [document.name for document in documents] == ["one", "two", None]
    assert [set(document.uses) for document in documents] == [set(), {"one"}, {"one", "two"}]
    # Where all have names, the output is the last one that no other uses.
    named = read(tmp_path, merge("two", "one", name="three"), second, first)
    assert [document.name for document in named] == ["one", "two", None]


def test_one_document_is_the_output_whatever_its_name(tmp_path: Path) -> None:
    (document,) = read(tmp_path, merge("x", "y", name="any name / of mine"))
    assert document.name is None and len(document.config({}).models) == 2


def test_a_name_stands_for_the_output_wherever_a_model_may_be_named(tmp_path: Path) -> None:
    source = {"model": "one", "layer_range": [0, 2]}
    last = {
        "merge_method": "ties",
        "base_model": "two",
        "tokenizer_source": "three",
        "slices": [{"sources": [source, source | {"model": "two+adapter"}, source | {"model": "ones"}]}],
    }
    *_, document = read(tmp_path, *(merge("x", "y", name=name) for name in PLACES), last)
    assert document.uses == set(PLACES)
    config = document.config(PLACES)
    assert (config.base_model, config.tokenizer_source) == ("/made/two", "/made/three")
    assert [model.model for model in config.models] == ["/made/one", "/made/two+adapter", "ones"]


@pytest.mark.parametrize("name", ["base", "union"])
def test_a_tokenizer_may_be_the_bases_or_a_union_whatever_the_names_of_merges(tmp_path: Path, name: str) -> None:
    tokenizer = {"source": name, "tokens": {"a": {"source": "y"}}}
    first, last = merge("x", "y", name=name, tokenizer_source=name), merge(name, "y", tokenizer=tokenizer)
    *_, document = read(tmp_path, last, first)
    config = document.config({name: "/made"})
    assert config.tokenizer_source == name and [model.model for model in config.models] == ["/made", "y"]


def test_overrides_are_of_all_merges_or_of_one(tmp_path: Path) -> None:
    given = ("seed=3", "one.seed=4", "two.x.seed=5")
    documents = read(
        tmp_path,
        merge("x", "y", name="one"),
        merge("x", "y", name="two"),
        merge("x", "y", name="two.x"),
        merge("one", "two", "two.x"),
        overrides=given,
    )
    seeds = {document.name: document.config(PLACES | {"two.x": "/made/x"}).seed for document in documents}
    assert seeds == {"one": 4, "two": 3, "two.x": 5, None: 3}


@pytest.mark.parametrize(
    ("documents", "facts"),
    [
        ([merge("x"), merge("y")], ["`name`"]),
        ([merge("x", name="one"), merge("y", name="one"), merge("one")], ["'one'"]),
        ([merge("two", name="one"), merge("one", name="two"), merge("one")], ["one", "two"]),
        ([merge("one", name="one"), merge("one")], ["one"]),
        ([merge("x", name="../one"), merge("y")], ["'../one'"]),
        ([merge("x", name=".one"), merge("y")], ["'.one'"]),
        ([merge("x", name="a" * 300), merge("y")], ["aaa"]),
        ([merge("x", name=7), merge("y")], ["7"]),
        ([merge("x", name="one"), ["one"]], []),
    ],
    ids=str,
)
def test_documents_that_make_no_order_are_refused(tmp_path: Path, documents: list[Any], facts: list[str]) -> None:
    with refused(ConfigError, where=str(tmp_path / "merge.yaml"), facts=facts):
        read(tmp_path, *documents)


def test_a_fault_has_the_line_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text("name: one\nmerge_method: linear\nmodels: [{model: x}]\n---\nmerge_method: linier\nmodels: []\n")
    *_, last = read_documents(path)
    with refused(ConfigError, where=f"{path}:5", do="linear"):
        last.config({})
