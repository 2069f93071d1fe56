"""What decides a result is known by name: a change to it is noticed at the start, on a resume, and at the end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hostile_inputs
import pytest
import tiny
import torch
from conftest import plan_of
from errors import refused
from hypothesis import given
from hypothesis import strategies as st
from identities import record_of

from engine.calibration.samples import Sample
from engine.errors import InputError, OutputError
from engine.learning import frozen_expert
from engine.planning.plan import Plan
from engine.run.identity import Identity, InputFile, decode
from engine.run.inputs import PACKAGES, identity
from engine.run.preparation import check_inputs, settle
from engine.run.run_folder import RunFolder, check_output, open_run
from engine.storage.local_folder import LocalFolder, digest

Change = Callable[[Path], object]


@pytest.fixture
def folder(llama_merge: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(llama_merge.parent, tmp_path / "merge")
    tiny.save_tokenizer(folder / "base")
    return folder


def plan_in(folder: Path, *overrides: str) -> Plan:
    plan, _ = check_inputs(plan_of(folder / "merge.yaml", *overrides))
    return plan


def edit(name: str, **values: object) -> Change:
    """Return a change of keys of a JSON file, which may be missing."""

    def change(folder: Path) -> None:
        path = folder / name
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | values))

    return change


def replaced(name: str, old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        before = (folder / name).read_text()
        assert old in before
        (folder / name).write_text(before.replace(old, new))

    return change


def other_weights(folder: Path) -> None:
    """Overwrite weights in place, with the size and the time of modification that they had."""
    path = folder / "expert0" / "model.safetensors"
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-100:] = bytes(100)
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, tuple[str, Change]] = {
    "config of the base": ("base/config.json", edit("base/config.json", rms_norm_eps=1e-2)),
    "config of an expert": ("expert0/config.json", edit("expert0/config.json", attention_bias=False, note="x")),
    "chat template": ("base/chat_template.jinja", replaced("base/chat_template.jinja", "{", " {")),
    "tokens swapped": ("base/tokenizer.json", replaced("base/tokenizer.json", '"w1"', '"v1"')),
    "tokenizer's config": ("base/tokenizer_config.json", edit("base/tokenizer_config.json", padding_side="left")),
    "generation config": ("expert0/generation_config.json", edit("expert0/generation_config.json", top_k=9)),
    "processor": ("base/preprocessor_config.json", edit("base/preprocessor_config.json", a=1)),
    "weights": ("expert0/model.safetensors", other_weights),
    "calibration": ("expert1.jsonl", replaced("expert1.jsonl", "\n", "\n\n")),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_input_is_named(folder: Path, kind: str) -> None:
    name, change = CHANGES[kind]
    before = identity(plan_in(folder))
    assert not before.differences(identity(plan_in(folder)))
    change(folder)
    (difference,) = before.differences(identity(plan_in(folder)))
    assert str(folder / name) in difference


def test_the_rounding_decides(folder: Path) -> None:
    (difference,) = identity(plan_in(folder)).differences(identity(plan_in(folder, "rounding=stochastic")))
    assert "rounding" in difference


def test_an_adapter_s_config_decides(folder: Path) -> None:
    hostile_inputs.adapter(folder)
    before = identity(plan_in(folder))
    edit("expert1/adapter_config.json", lora_alpha=400)(folder)
    (difference,) = before.differences(identity(plan_in(folder)))
    assert str(folder / "expert1" / "adapter_config.json") in difference


def test_files_that_decide_nothing_do_not_count(folder: Path) -> None:
    before = identity(plan_in(folder))
    for name in ("base/README.md", "expert0/training_args.bin", "expert0/optimizer.pt", "expert0/modeling_own.py"):
        (folder / name).write_text("other")
    assert not before.differences(identity(plan_in(folder)))


def test_options_and_versions_are_named_with_their_values(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(plan_in(folder))
    undeciding = ["cluster.shards=3", "cluster.wait=1", "cluster.trainer.num_gpus=0"]
    assert not before.differences(identity(plan_in(folder, *undeciding)))
    for option, value in (("seed", "1"), ("parameters.kappa", "2.0"), ("models.0.parameters.weight", "0.3")):
        (difference,) = before.differences(identity(plan_in(folder, f"{option}={value}")))
        assert option in difference and value in difference
    monkeypatch.setattr("engine.run.inputs.version", lambda package: f"{package} of tomorrow")
    assert len(before.differences(identity(plan_in(folder)))) == len(PACKAGES)
    assert {"torch", "transformers", "tokenizers", "numpy", "numba"} <= before.versions.keys()


def test_the_version_of_mergekit_decides_where_its_library_merges(folder: Path) -> None:
    assert "mergekit" not in identity(plan_in(folder)).versions
    for method, decides in (("linear", False), ("karcher", True)):
        plan = plan_of(folder / "merge.yaml", f"merge_method={method}")
        assert ("mergekit" in identity(plan).versions) == decides


def test_the_order_of_experts_and_further_images_count(folder: Path) -> None:
    plan = plan_in(folder)
    image = folder / "image.png"
    image.write_bytes(b"pixels")
    seen = replace(plan, images=((str(image),), ()))
    assert identity(plan).differences(identity(seen))
    moved = folder / "elsewhere.png"
    shutil.copy(image, moved)
    assert not identity(seen).differences(identity(replace(plan, images=((str(moved),), ()))))
    moved.write_bytes(b"others")
    assert identity(seen).differences(identity(replace(plan, images=((str(moved),), ()))))


def test_weights_whose_content_is_known_may_be_copied_but_not_changed(folder: Path) -> None:
    plan, path = plan_in(folder), folder / "expert0" / "model.safetensors"
    before, content = identity(plan), path.read_bytes()
    known = before.with_digests({str(path): hashlib.sha256(content).hexdigest()})
    path.unlink()
    path.write_bytes(content)
    assert before.differences(identity(plan)), "not known yet"
    assert not known.differences(identity(plan))
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert known.differences(identity(plan)) == [f"{path} changed"]
    path.unlink()
    assert known.differences(identity(plan)) == [f"{path} is gone"]


def test_the_commit_of_a_hub_repository_decides_not_the_copy_on_a_machine(folder: Path, tmp_path: Path) -> None:
    file = folder / "expert0" / "model.safetensors"
    snapshot = replace(InputFile(file.stat().st_size, (), None), path=file)
    assert snapshot.is_as(replace(snapshot, path=tmp_path / "on another machine"))
    assert not snapshot.is_as(replace(snapshot, size=1))


texts = st.text(max_size=5)
numbers = st.integers(0, 2**62)
files = st.builds(InputFile, numbers, st.lists(numbers, max_size=3).map(tuple), st.none() | st.just("ab" * 32))


identities = st.builds(
    Identity,
    st.dictionaries(texts, texts),
    st.dictionaries(texts, texts),
    st.dictionaries(texts, files, max_size=4),
)


@pytest.mark.thorough
@given(identities)
def test_an_identity_is_what_its_encoding_says(one: Identity) -> None:
    again = decode(one.encode(), "here")
    assert again == one and not one.changed_files(again) and not one.differences(again)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"options": 1, "versions": {}, "files": {}}',
        b'{"options": {"a": 1}, "versions": {}, "files": {}}',
        b'{"options": {}, "versions": {}, "files": {"a": ""}}',
        b'{"options": {}, "versions": {}, "files": {"a": "1"}}',
        b'{"options": {}, "versions": {}, "files": {"a": 1}}',
        b"[" * 100_000,
    ],
)
def test_other_content_is_no_identity(content: bytes) -> None:
    with refused(InputError, where="here"):
        decode(content, "here")


def begun(plan: Plan, out: Path) -> None:
    """Leave the state of a run that stopped after its first target."""
    with open_run(str(out), identity(plan), fresh=False) as run:
        run.state.write(run.target(Sample(0, 0, (1, 2), "x.jsonl:1")), b"a target")


def test_the_plan_the_records_and_the_identity_are_of_the_same_files(folder: Path) -> None:
    made = plan_of(folder / "merge.yaml")
    plan, records, now = settle(made)
    assert replace(plan, images=()) == made and list(map(len, records)) == [4, 3] and now == identity(plan)


def test_a_model_and_its_adapter_may_lie_below_a_folder_with_a_plus(folder: Path) -> None:
    hostile_inputs.adapter(folder)
    moved = folder.rename(folder.with_name("a+b"))
    config = moved / "merge.yaml"
    plan = plan_of(config, "merge_method=linear", "models.0.model=expert0+expert1")
    assert plan.experts[0].adapter is not None
    assert settle(plan)[0] == plan


@pytest.mark.parametrize(
    ("kind", "file"),
    [("config of the base", "base"), ("config of an expert", "expert0"), ("shape of an expert", "expert0")],
)
def test_a_model_that_changes_after_the_plan_was_made_is_named(folder: Path, kind: str, file: str) -> None:
    plan = plan_of(folder / "merge.yaml")
    if kind in CHANGES:
        CHANGES[kind][1](folder)
    else:
        tiny.save(tiny.make_expert(tiny.make_model(), seed=1), folder / "expert0", torch.bfloat16)
    with refused(InputError, where="inputs", do="again", facts=[f"{folder / file} changed"]) as caught:
        settle(plan)
    assert caught.value.what.count(" changed") == 1


def test_records_that_change_while_they_are_checked_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, own = plan_of(folder / "merge.yaml"), folder / "base" / "preprocessor_config.json"
    for change, difference in (
        (lambda: tiny.write_calibration(folder / "expert1.jsonl", 3, seed=9), f"{folder / 'expert1.jsonl'} changed"),
        (lambda: own.write_text("{}"), f"{own} is new"),
        (own.unlink, f"{own} is gone"),
    ):
        monkeypatch.setattr(frozen_expert, "check_models", lambda plan, change=change: change())
        with refused(InputError, where="inputs", do="again", facts=[difference]):
            settle(plan)


def test_a_stopped_run_is_not_resumed_with_other_inputs(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun(plan_in(folder), out)
    before = {path: path.read_bytes() for path in RunFolder(str(out)).state.path.rglob("*") if path.is_file()}  # type: ignore[attr-defined]
    CHANGES["config of the base"][1](folder)
    for _ in range(2):
        with (
            refused(InputError, do="--fresh", facts=[str(folder / "base" / "config.json")]) as caught,
            open_run(str(out), identity(plan_in(folder)), fresh=False),
        ):
            pass
    assert caught.value.exit_code == 2 and all(path.read_bytes() == data for path, data in before.items())
    with open_run(str(out), identity(plan_in(folder)), fresh=True) as run:
        assert not run.stored_targets()


def test_the_state_of_another_merge_says_what_differs(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun(plan_in(folder), out)
    other = identity(plan_in(folder, "parameters.kappa=2"))
    with refused(OutputError, do="--fresh", facts=["parameters.kappa", "1.0", "2.0"]), open_run(str(out), other, False):
        pass


def test_an_output_of_another_merge_says_what_differs(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = record_of(identity(plan_in(folder)), [])
    for name, text in record.items():
        LocalFolder(out).write(name, text.encode())
    assert check_output(str(out), identity(plan_in(folder)), fresh=False)
    CHANGES["tokens swapped"][1](folder)
    with refused(OutputError, do="--fresh", facts=[str(folder / "base" / "tokenizer.json")]):
        check_output(str(out), identity(plan_in(folder)), fresh=False)


def test_an_input_that_changes_during_a_run_ends_it_and_its_state(folder: Path, tmp_path: Path) -> None:
    plan, out = plan_in(folder), tmp_path / "out"
    path = folder / "expert0" / "model.safetensors"
    hashed = {str(path): digest(path)}
    with open_run(str(out), identity(plan), fresh=False) as run:
        run.state.write(run.target(Sample(0, 0, (1, 2), "x.jsonl:1")), b"a target")
        run.check_unchanged(plan, hashed)
        assert run.identity.digests.items() >= hashed.items()
    os.utime(path)
    with open_run(str(out), identity(plan), fresh=False) as run:
        assert run.stored_targets() and run.identity.digests.items() >= hashed.items()
        run.check_unchanged(plan)
        CHANGES["weights"][1](folder)
        with refused(InputError, do="same command", facts=[str(path)]):
            run.check_unchanged(plan)
    with open_run(str(out), identity(plan), fresh=False) as run:
        assert not run.stored_targets(), "they may be those of either input"
