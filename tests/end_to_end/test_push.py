"""Merges are uploaded to a stand-in of the hub: what the merge wrote, and no path of this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import hub as hubs
import huggingface_hub
import pytest
import tiny
import yaml
from advice import Advice
from click.testing import CliRunner, Result
from conftest import plan_of
from huggingface_hub import constants
from recorded_merges import write_merge

import cli
from engine.report.merge_folder import Merged
from engine.report.page import write_report
from engine.run.contents import write_manifest
from engine.storage.local_folder import LocalFolder

ADVICE = Advice(__name__, {})
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Of huggingface_hub about its own call of httpx, when it uploads a large file.
    pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a merge, in whose files libraries wrote where they found them. Read-only."""
    work = tmp_path_factory.mktemp("made") / "work"
    config = tiny.make_merge(work)
    out = work / "merged"
    shutil.copytree(work / "base", out)
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        content = json.loads((out / name).read_text())
        (out / name).write_text(json.dumps(content | {key: str(work / "base")}))
    write_merge(plan_of(config), out)
    write_report([str(out)], out / "merge" / "report.html")
    folder = LocalFolder(out)
    write_manifest(folder, folder, folder, set())
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "merged")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[hubs.Hub]:
    with hubs.stand_in(monkeypatch) as hub:
        yield hub


def push(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, ["push", *map(str, arguments)])


def advice_of(ended: Result, code: int = 2) -> str:
    assert ended.exit_code == code and not isinstance(ended.exception, AssertionError), ended.output
    return ended.stderr.partition("\n  do: ")[2].strip()


def test_what_the_merge_wrote_is_uploaded_without_paths(made: Path, out: Path, hub: hubs.Hub, tmp_path: Path) -> None:
    (out / "notes.txt").write_text("my own")
    ended = push(out, "lab/merged", "--license", "apache-2.0", "--base-model", "owner/base")
    assert ended.exit_code == 0 and "--license" not in ended.output, ended.output
    files = hub.repositories["lab/merged"]
    left_out = {"merge/identity.json", "merge/files.json", "notes.txt"}
    assert files.keys() - {".gitattributes"} == LocalFolder(out).names() - left_out
    assert hub.private == {"lab/merged"} and hub.commits == 1 and f"{hub.address}/lab/merged" in ended.stdout
    inputs = str(made.parent)
    assert inputs in (out / "merge/config.yaml").read_text() and inputs in (out / "config.json").read_text()
    for name, content in files.items():
        assert inputs.encode() not in content and str(tmp_path).encode() not in content, name
    assert files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("apache-2.0", ["owner/base"])
    assert 'from_pretrained("lab/merged")' in card.content and "vllm serve lab/merged" in card.content
    copy = tmp_path / "copy"
    for name, content in files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    assert Merged.read(str(copy)).config == Merged.read(str(out)).config


@ADVICE.followed("{do}")
def test_a_repository_that_holds_a_merge_gets_the_new_one_whole(out: Path, hub: hubs.Hub) -> None:
    files = hub.repositories["alice/merged"] = {"merge/config.yaml": b"", "mine.txt": b"mine"}
    files |= dict.fromkeys(("model-00001-of-00002.safetensors", "model.safetensors.index.json"), b"old")
    lacks = push(out, "alice/merged", "--public")
    assert lacks.exit_code == 0 and "--license" in lacks.output and "--base-model" in lacks.output
    assert files["mine.txt"] == b"mine" and b"old" not in files.values()
    hub.broken = True
    before = dict(files)
    assert advice_of(push(out, "alice/merged"), code=4).startswith("run the same command again") and files == before


@pytest.mark.parametrize("name", ["merged", "a/b/c", "alice/", "../x"])
def test_a_name_that_is_none_is_refused(out: Path, hub: hubs.Hub, name: str) -> None:
    assert push(out, name).exit_code == 2 and not hub.repositories


@ADVICE.followed("unset HF_HUB_OFFLINE", "set HF_TOKEN, or run `hf auth login`")
def test_the_advice_on_tokens_is_right(out: Path, hub: hubs.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert advice_of(push(out, "alice/merged")) == "unset HF_HUB_OFFLINE"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "HF_TOKEN" in advice_of(push(out, "alice/merged"))


@ADVICE.followed("set HF_TOKEN to a token that can write", "give another name")
def test_what_cannot_be_written_is_refused_before_a_merge(
    out: Path, hub: hubs.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = push(out, "bob/merged")
    assert other.exit_code == 2 and "alice, lab" in other.stderr
    hub.repositories["alice/other"] = {"thesis.txt": b""}
    assert advice_of(push(out, "alice/other")) == "give another name"
    monkeypatch.setenv("HF_TOKEN", hubs.READER)
    merge = ["merge", str(out.parent / "merge.yaml"), "--push-to-hub", "alice/merged"]
    assert "that can write" in advice_of(CliRunner().invoke(cli.main, merge))
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert "HF_TOKEN" in advice_of(push(out, "alice/merged"), code=4)
    monkeypatch.setenv("HF_TOKEN", hubs.TOKEN)
    assert push(out, "alice/merged").exit_code == 0


@ADVICE.followed("restore them, or merge again into another folder, and push that")
def test_only_what_the_merge_wrote_is_uploaded(out: Path, hub: hubs.Hub) -> None:
    assert push(out.parent, "alice/merged").exit_code == 2
    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(b"mine")
    ended = push(out, "alice/merged")
    assert "restore them" in advice_of(ended) and "'model.safetensors'" in ended.stderr
    (out / "model.safetensors").unlink()
    (out / "elsewhere").write_bytes(weights)
    (out / "model.safetensors").symlink_to(out / "elsewhere")
    assert push(out, "alice/merged").exit_code == 2 and not hub.repositories
    (out / "model.safetensors").unlink()
    (out / "model.safetensors").write_bytes(weights)
    (out / "merge" / "report.html").write_text("another report")
    assert push(out, "alice/merged").exit_code == 0
    assert "merge/report.html" not in hub.repositories["alice/merged"]
    yaml.safe_load(hub.repositories["alice/merged"]["merge/config.yaml"])


@pytest.mark.slow
def test_a_merge_is_uploaded_when_it_is_done(hub: hubs.Hub, tmp_path: Path) -> None:
    tiny.make_merge(tmp_path / "work")
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("expert0", "expert1")]
    config = {"merge_method": "linear", "base_model": "base", "models": models}
    (tmp_path / "work" / "linear.yaml").write_text(yaml.safe_dump(config))
    command = ["merge", tmp_path / "work" / "linear.yaml", "--out", tmp_path / "out", "--push-to-hub", "alice/merged"]
    for said in ("merged 2 models", "already holds"):
        ended = CliRunner().invoke(cli.main, [*map(str, command)])
        assert ended.exit_code == 0 and said in ended.output, ended.output
    files = hub.repositories["alice/merged"]
    assert "model.safetensors" in files and hub.commits == 2
    assert [name for name, content in files.items() if str(tmp_path).encode() in content] == []


def test_every_advice_is_followed() -> None:
    ADVICE.check()
