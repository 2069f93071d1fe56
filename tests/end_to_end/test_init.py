"""`init` writes a config that plans, from options or answers, and replaces no file."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import tiny
import yaml
from click.testing import CliRunner, Result
from thorough import thorough_but

import cli
from engine.config.json_schema import config_schema
from engine.methods.registry import LEARNED, NATIVE

MODELS = ("--base", "base", "--expert", "expert0", "--expert", "expert1")
DATA = ("--data", "expert0.jsonl", "--data", "expert1.jsonl")
METHODS = [name for name in (*LEARNED, *NATIVE) if name not in ("passthrough", "slerp")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.make_merge(folder).unlink()
    return folder


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with links to models and records."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, answers: str | None = None) -> Result:
    return CliRunner().invoke(cli.main, arguments, input=answers)


def uncommented(text: str) -> str:
    """The config with its commented options in force."""
    lines = [
        line.removeprefix("# ") if line.startswith(("# parameters:", "#   ")) else line for line in text.splitlines()
    ]
    return "\n".join(lines)


@pytest.mark.parametrize("method", thorough_but(("expert_merging_pp", "ties", "rcp"), METHODS))
def test_options_give_a_config_that_plans_as_it_is_and_with_its_comments(folder: Path, method: str) -> None:
    done = run("init", *MODELS, *(DATA if {**LEARNED, **NATIVE}[method].runs_models else ()), "--method", method)
    assert done.exit_code == 0, done.output
    text = (folder / "merge.yaml").read_text()
    assert yaml.safe_load(text)["merge_method"] == method
    schema = text.splitlines()[0].partition("$schema=")[2]
    assert (folder / schema).is_file()
    (folder / "merge.yaml").write_text(uncommented(text))
    options = yaml.safe_load(uncommented(text)).get("parameters", {})
    assert set(options) == set({**LEARNED, **NATIVE}[method].by_name)
    planned = run("plan", "merge.yaml")
    assert planned.exit_code == 0, planned.output
    assert [
        error.message for error in jsonschema.Draft7Validator(config_schema()).iter_errors(yaml.safe_load(text))
    ] == []


def test_answers_give_the_same_config_as_options(folder: Path) -> None:
    asked = run("init", answers="\nbase\nexpert0\nexpert1\n\nexpert0.jsonl\nexpert1.jsonl\n")
    assert asked.exit_code == 0, asked.output
    assert run("init", *MODELS, *DATA, "other.yaml").exit_code == 0
    assert (folder / "merge.yaml").read_text() == (folder / "other.yaml").read_text()


def test_paths_are_those_of_the_configs_folder(folder: Path) -> None:
    (folder / "configs").mkdir()
    done = run("init", *MODELS, "--method", "ties", "configs/merge.yaml")
    assert done.exit_code == 0, done.output
    config = yaml.safe_load((folder / "configs" / "merge.yaml").read_text())
    assert config["base_model"] == "../base" and config["models"][1]["model"] == "../expert1"


def test_no_file_is_replaced(folder: Path) -> None:
    (folder / "merge.yaml").write_text("mine")
    done = run("init", *MODELS, *DATA)
    assert done.exit_code == 2 and (folder / "merge.yaml").read_text() == "mine"
    (folder / "merge.yaml").unlink()
    assert run("init", *MODELS, *DATA).exit_code == 0


def test_a_config_that_does_not_plan_is_written_if_its_author_says_so(folder: Path) -> None:
    wrong = ("init", "--base", "base", "--expert", "missing", "--data", "expert0.jsonl")
    assert run(*wrong).exit_code == 2 and not (folder / "merge.yaml").exists()
    asked = "ties\nbase\nmissing\n\n"
    assert run("init", answers=f"{asked}n\n").exit_code == 0 and not (folder / "merge.yaml").exists()
    assert run("init", answers=f"{asked}y\n").exit_code == 0
    assert yaml.safe_load((folder / "merge.yaml").read_text())["models"] == [{"model": "missing"}]


def test_without_answers_it_names_the_options(folder: Path) -> None:
    done = run("init", answers="")
    assert done.exit_code == 2 and all(option in done.output for option in ("--base", "--expert", "--data", "--method"))
    done = run("init", *MODELS, *DATA[:2])
    assert done.exit_code == 2 and "--data" in done.output
    assert not (folder / "merge.yaml").exists()


def test_the_folder_is_made_and_data_that_is_not_used_is_named(folder: Path) -> None:
    given = ("--base", "base", "--expert", "expert0", "--method", "ties", "--data", "expert0.jsonl")
    done = run("init", "new/deep/merge.yaml", *given)
    assert done.exit_code == 0 and "expert0.jsonl" in done.output
    assert (folder / "new" / "deep" / "merge.yaml").is_file()
