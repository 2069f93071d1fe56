"""`chat_template`: `auto`, a name or Jinja, in the plan, in the samples, and in the output as transformers reads it."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import transformers
from conftest import plan_of
from errors import refused
from tiny import make_merge

from engine.calibration.encoder import bounded_encoder
from engine.calibration.records import Record
from engine.checkpoints.special_tokens import chat_template_of
from engine.config.mergekit_yaml import as_yaml
from engine.config.reader import parse_config
from engine.errors import CheckpointError, ConfigError
from engine.output.model_folder import output_files, write_companions
from engine.planning import chat_templates
from engine.planning.open_models import base_folder
from engine.planning.plan import Plan
from engine.run.inputs import identity

OTHER = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
NAMED = {name: (files("mergekit._data") / f"chat_templates/{name}.jinja").read_text() for name in chat_templates.NAMES}


@pytest.fixture
def merge(tmp_path: Path) -> Path:
    """A base with a template, one expert with another one in an old tokenizer_config.json, and one without files."""
    config = make_merge(tmp_path, merge_method="linear")
    (tmp_path / "expert0" / "tokenizer_config.json").write_text(json.dumps({"chat_template": f"{OTHER}\n"}))
    return config


def written(plan: Plan, folder: Path) -> Path:
    folder.mkdir()
    write_companions(folder, plan, base_folder(plan), output_files(plan))
    return folder


def with_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)


def test_auto_is_the_most_frequent_template_of_the_models(merge: Path) -> None:
    folder = merge.parent
    own = (folder / "base" / "chat_template.jinja").read_text()
    assert plan_of(merge).chat_template is None
    first = plan_of(merge, "chat_template=auto")
    assert first.chat_template == own.strip() != OTHER
    with_template(folder / "expert1", f"  {OTHER}")
    second = plan_of(merge, "chat_template=auto")
    assert second.chat_template == OTHER and chat_template_of(folder / "expert0") == f"{OTHER}\n"
    assert identity(first).options != identity(second).options
    shutil.rmtree(folder / "base")
    make_merge(folder, merge_method="linear")
    with_template(folder / "base", own)
    # Without a base, its template does not count.
    models = [{"model": str(folder / name)} for name in ("base", "expert1", "expert0")]
    raw = {"merge_method": "linear", "chat_template": "auto", "models": models}
    assert chat_templates.find_chat_template(parse_config(raw, merge), folder, plan_of(merge).experts) == OTHER


@pytest.mark.parametrize("name", [*chat_templates.NAMES])
def test_a_name_is_mergekits_template(merge: Path, name: str) -> None:
    assert plan_of(merge, f"chat_template={name}").chat_template == NAMED[name]


@pytest.mark.parametrize("text", ["chatmll", "../chatml", "{{ messages }}", "one\ntwo", "x" * 300, "true {} but short"])
def test_what_is_no_template_is_refused(merge: Path, text: str) -> None:
    config = parse_config({"merge_method": "linear", "models": [{"model": "x"}], "chat_template": text}, merge)
    with refused(ConfigError, where="chat_template", facts=["auto", "chatml", "Jinja"]):
        chat_templates.find_chat_template(config, merge.parent / "base", ())


def test_without_mergekit_a_name_is_refused_with_the_command_to_install_it(
    merge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_templates, "has_mergekit", lambda: False)
    with refused(ConfigError, where="chat_template", do="pip install", facts=["'chatml'"]):
        plan_of(merge, "chat_template=chatml")
    assert plan_of(merge, "chat_template=auto").chat_template


def test_a_template_that_cannot_be_read_is_refused(merge: Path) -> None:
    (merge.parent / "expert1" / "chat_template.jinja").write_bytes(b"\xff{{")
    with refused(CheckpointError, where="chat_template.jinja", facts=["UTF-8"]):
        plan_of(merge, "chat_template=auto")


def test_the_template_replaces_those_of_the_output_s_tokenizer(merge: Path, tmp_path: Path) -> None:
    base = merge.parent / "base"
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ old }}"}))
    before = written(plan_of(merge), tmp_path / "before")
    assert isinstance(transformers.AutoTokenizer.from_pretrained(before).chat_template, dict)
    plan = plan_of(merge, f"chat_template={json.dumps(OTHER)}")
    after = written(plan, tmp_path / "after")
    assert transformers.AutoTokenizer.from_pretrained(after).chat_template == OTHER
    assert "old" not in (after / "tokenizer_config.json").read_text()
    again = parse_config(as_yaml(plan.resolved), merge)
    assert again.chat_template == OTHER and plan_of(merge, f"chat_template={json.dumps(OTHER)}") == plan
    # A folder without a tokenizer gets no template.
    for file in base.glob("*token*"):
        file.unlink()
    shutil.rmtree(base / "additional_chat_templates")
    (base / "chat_template.jinja").unlink()
    assert not (written(plan, tmp_path / "none") / "chat_template.jinja").exists()


def test_samples_of_a_learned_merge_go_through_the_template(tmp_path: Path) -> None:
    merge = make_merge(tmp_path)
    chat = Record("x.jsonl:1", {"messages": [{"role": "user", "content": "w1 w2"}]}, 1.0)
    ids = []
    for given in (None, "{% for m in messages %}{{ m['content'] }} w9{% endfor %}"):
        plan = plan_of(merge, *([f"chat_template={json.dumps(given)}"] if given else []))
        with bounded_encoder(plan, [[chat]]) as encoder:
            ids.append(encoder.encode(chat).input_ids)
    assert ids[1] == [7, 8, 15] != ids[0]
