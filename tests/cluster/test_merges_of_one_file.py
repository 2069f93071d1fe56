"""The merges of one file: resumed, made once, recorded, removed at the end, and refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from errors import refused
from parity.merges import write
from weight_space import make_models, read

import cluster.documents
import cluster.driver
from cluster.documents import merge_documents
from engine.config.documents import Document, read_documents
from engine.errors import ConfigError, MergeError, OutputError
from engine.output.outline import outlined, places_of
from engine.planning.planner import make_plan

FIRST = {
    "name": "first",
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "expert0"}, {"model": "expert1"}],
    "parameters": {"weight": 0.5, "density": 0.5},
}
SECOND = {"name": "second", "merge_method": "linear", "models": [{"model": "first"}, {"model": "expert2"}]}
LAST = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": [{"model": "first"}, {"model": "second"}],
    "tokenizer_source": "second",
    "out_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_models(tmp_path_factory.mktemp("models"), layers=2)
    for model in ("base", "expert0", "expert1", "expert2"):
        tiny.save_tokenizer(folder / model)
    return folder


def written(models: Path, *documents: dict[str, Any], overrides: tuple[str, ...] = ()) -> list[Document]:
    path = models / "merge.yaml"
    path.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return read_documents(path, overrides)


def test_a_plan_from_outlines_is_the_plan_of_the_outputs(models: Path, tmp_path: Path) -> None:
    documents = written(models, FIRST | {"out_dtype": "bfloat16", "max_shard_size": "20KB"}, SECOND, LAST)
    places = {"first": str(tmp_path / "first"), "second": str(tmp_path / "second")}
    with outlined(documents, models) as outlines:
        planned = outlines.plans
    first = planned[0]
    write(first, tmp_path / "first")
    real = make_plan(documents[1].config(places), models)
    header, outline = real.base_header, planned[1].base_header
    assert len(list((tmp_path / "first").glob("*.safetensors"))) > 1
    assert outline.tensors == header.tensors and planned[1].merged == real.merged
    assert {tensor.dtype for tensor in outline.tensors.values()} == {"BF16"}


@pytest.mark.parametrize(
    ("documents", "facts"),
    [
        ((FIRST, SECOND | {"models": [{"model": "first"}, {"model": "nothing"}]}, LAST), ["'second'", "nothing"]),
        (
            (FIRST | {"merge_method": "svd_intermediate", "parameters": {}}, SECOND, LAST),
            ["'first'", "svd_intermediate"],
        ),
        ((FIRST, SECOND, LAST | {"base_model": "first", "models": [{"model": "second+first"}]}), ["first"]),
    ],
)
def test_a_fault_in_any_merge_is_found_before_the_first(
    models: Path,
    tmp_path: Path,
    documents: tuple[dict[str, Any], ...],
    facts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster.documents, "merge", lambda *_: pytest.fail("a merge has begun"))
    with refused(MergeError, facts=facts) as caught:
        merge_documents(written(models, *documents), str(tmp_path / "out"), None, print)
    assert "/expert-merging-" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_an_output_that_nobody_would_see_is_refused(models: Path, tmp_path: Path) -> None:
    documents = written(models, FIRST, SECOND, LAST | {"models": [{"model": "first"}], "tokenizer_source": "first"})
    with refused(ConfigError, do="--intermediate-dir", facts=["'second'"]):
        places_of(documents, str(tmp_path / "out"), None)
    kept = places_of(documents, str(tmp_path / "out"), str(tmp_path / "kept"))
    assert kept == {name: str(tmp_path / "kept" / name) for name in ("first", "second")}


@pytest.mark.slow
def test_merges_are_resumed_made_once_and_removed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, documents = tmp_path / "out", written(models, LAST, SECOND, FIRST)
    begun: list[str] = []
    merge = cluster.documents.merge

    def until_second(plan: Any, place: str, *rest: Any) -> bool:
        begun.append(Path(place).name)
        if begun[-1] == "second":
            raise KeyboardInterrupt
        return merge(plan, place, *rest)

    made: list[tuple[str, bool]] = []

    def listed(plan: Any, place: str, *rest: Any) -> bool:
        made.append((Path(place).name, merge(plan, place, *rest)))
        return made[-1][1]

    monkeypatch.setattr(cluster.documents, "merge", until_second)
    with pytest.raises(KeyboardInterrupt):
        merge_documents(documents, str(out), None, print)
    assert begun == ["first", "second"] and not out.exists()
    monkeypatch.setattr(cluster.documents, "merge", listed)
    assert merge_documents(documents, str(out), None, print)
    assert made == [("first", False), ("second", True), ("out", True)]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    # The same merges again, and from the recorded config: the outputs of the others are neither needed nor made.
    made.clear()
    assert not merge_documents(documents, str(out), None, print)
    assert made == []
    record = out / "merge" / "config.yaml"
    assert [one.get("name") for one in yaml.safe_load_all(record.read_text())] == ["first", "second", None]
    kept = tmp_path / "kept"
    assert merge_documents(read_documents(record), str(tmp_path / "again"), str(kept), print)
    assert sorted(path.name for path in kept.iterdir()) == ["first", "second"]
    ours, again = read(out), read(tmp_path / "again")
    assert ours.keys() == again.keys() and all((ours[name] == again[name]).all() for name in ours)

    # What another merge of the file would change is refused before any work, and replaced with `fresh`.
    made.clear()
    other = written(models, FIRST | {"parameters": {"weight": 0.5, "density": 0.4}}, SECOND, LAST)
    with refused(OutputError, where=str(out), do="--fresh", facts=["first", "density"]):
        merge_documents(other, str(out), None, print)
    assert made == []
    (tmp_path / "out.documents" / "first").mkdir(parents=True)
    (tmp_path / "out.documents" / "notes").write_text("mine")
    assert merge_documents(other, str(out), None, print, fresh=True)
    assert [name for name, _ in made] == ["first", "second", "out"]
    assert [path.name for path in (tmp_path / "out.documents").iterdir()] == ["notes"]
