"""`merge --extend`: its plan is that of one config with all models, and the advice of its errors is right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from advice import Advice, refusal
from conftest import plan_of
from recorded_merges import write_merge

from cluster.extension import plan_extended
from engine.config.documents import read_documents
from engine.output.merge_record import write_config
from engine.planning.plan import Plan
from engine.run.inputs import identity
from engine.storage.local_folder import digest

ADVICE = Advice(__name__, {})
NEW = {"model": "expert2", "calibration": "expert2.jsonl", "parameters": {"weight": 0.4}}


@pytest.fixture
def folder(make_merge: Callable[..., Path]) -> Path:
    """The folder of three models, whose merge.yaml has all, and `run`, the output of a merge of the first two."""
    config = make_merge(experts=3)
    first = yaml.safe_load(config.read_text())
    (config.parent / "two.yaml").write_text(yaml.safe_dump(first | {"models": first["models"][:2]}))
    record(config.parent / "two.yaml", config.parent / "run")
    return config.parent


def record(config: Path, out: Path) -> None:
    """Write the record of a merge as if it had been run."""
    plan = plan_of(config)
    write_merge(plan, out)
    now = identity(plan)
    known = now.with_digests({name: digest(file.path) for name, file in now.files.items()})
    write_config(out / "merge" / "config.yaml", plan, known.encode(), {})


def extended(folder: Path, config: dict[str, Any] | list[dict[str, Any]], run: str = "run") -> Plan:
    path = folder / "more.yaml"
    path.write_text(yaml.safe_dump_all(config if isinstance(config, list) else [config]))
    return plan_extended(read_documents(path), str(folder / run), str(folder / "out"))


def test_the_plan_is_that_of_a_config_with_all_models(folder: Path) -> None:
    made, whole = extended(folder, {"models": [NEW]}), plan_of(folder / "merge.yaml")
    assert not identity(made).differences(identity(whole))
    assert [expert.name for expert in made.experts] == ["expert0", "expert1", "expert2"]
    more = extended(folder, {"base_model": "base", "models": [NEW], "parameters": {"epochs": 3}})
    assert more.config.parameters == whole.config.parameters.model_copy(update={"epochs": 3})


@ADVICE.followed("give the output of a merge")
def test_the_output_of_a_merge_is_extended(folder: Path) -> None:
    assert "output of a merge" in refusal(lambda: extended(folder, {"models": [NEW]}, "base")).do
    extended(folder, {"models": [NEW]})


@ADVICE.followed("leave out `base_model`")
def test_the_base_is_that_of_the_run(folder: Path) -> None:
    shutil.copytree(folder / "base", folder / "another")
    assert "`base_model`" in refusal(lambda: extended(folder, {"base_model": "another", "models": [NEW]})).do
    extended(folder, {"models": [NEW]})


@ADVICE.followed("leave it out, or give a new one another `name`")
def test_an_expert_of_the_run_is_left_out_or_has_another_name(folder: Path) -> None:
    again = NEW | {"model": "expert1"}
    assert "leave it out" in refusal(lambda: extended(folder, {"models": [again, NEW]})).do
    extended(folder, {"models": [NEW]})
    extended(folder, {"models": [again | {"name": "again"}]})


@ADVICE.followed("restore it, or {ONE}")
def test_a_changed_input_is_restored_or_merged_anew(folder: Path) -> None:
    data = folder / "expert0.jsonl"
    content = data.read_text()
    data.write_text(content + json.dumps({"input_ids": [5, 6]}) + "\n")
    error = refusal(lambda: extended(folder, {"models": [NEW]}))
    assert str(data) in str(error) and "all models" in error.do
    plan_of(folder / "merge.yaml")
    data.write_text(content)
    extended(folder, {"models": [NEW]})


@ADVICE.followed("{ONE}")
@pytest.mark.parametrize("fault", ["a weight-space merge", "several documents"])
def test_what_cannot_be_extended_is_merged_from_one_config(fault: str, folder: Path) -> None:
    if fault == "several documents":
        documents = [{"name": "first", "models": [NEW]}, {"models": [{"model": "first"}]}]
        error = refusal(lambda: extended(folder, documents))
    else:
        raw = {"merge_method": "ties", "base_model": "base", "models": [{"model": "expert0"}], "parameters": {}}
        raw["parameters"] = {"density": 0.5, "weight": 1.0}
        (folder / "ties.yaml").write_text(yaml.safe_dump(raw))
        plan = plan_of(folder / "ties.yaml")
        (folder / "ties" / "merge").mkdir(parents=True)
        write_config(folder / "ties" / "merge" / "config.yaml", plan, identity(plan).encode(), {})
        error = refusal(lambda: extended(folder, {"models": [NEW]}, "ties"))
    assert "all models" in error.do
    plan_of(folder / "merge.yaml")


def test_a_config_without_new_models_is_refused(folder: Path) -> None:
    for config in ({"parameters": {"epochs": 2}}, {"models": []}, {"models": "expert2"}):
        refusal(lambda config=config: extended(folder, config))  # type: ignore[misc]


def test_every_advice_is_followed() -> None:
    ADVICE.check()
