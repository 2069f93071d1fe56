"""Merges of every family that takes images, and of mixtures of experts, from YAML to a folder that loads and computes.

Two families run through the real command line; the others share one Ray, because only the start of processes differs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import tiny
import tiny_images
import torch
import transformers
import yaml
from cluster_helpers import run_merge
from conftest import plan_of
from hostile import Server, refused
from image_inputs import from_chat, from_processor
from reference import to_module
from safetensors.torch import load_file
from test_cli import cli
from thorough import as_thorough, thorough_but
from torch import Tensor

from engine.models.loading import load_processor
from engine.task_vectors.coefficients import read_coefficients

MIXTURES = ("qwen3_moe", "mixtral")
BY_COMMAND = ("internvl", tiny_images.CHAT)
OTHERS = tuple(family for family in tiny_images.FAMILIES if family not in BY_COMMAND)
IMAGES, WHOLE, VIDEOS = (f"{name}_config.json" for name in ("preprocessor", "processor", "video_preprocessor"))
# Files of a checkpoint for its processor and its code, without those of the tokenizer.
PROCESSOR = {
    "internvl": {IMAGES, WHOLE, VIDEOS},
    "qwen2_vl": {IMAGES},
    "qwen2_5_vl": {IMAGES},
    "qwen3_vl": {IMAGES, VIDEOS},
    "llava_onevision": {IMAGES, WHOLE, VIDEOS},
    "gemma3": {IMAGES, WHOLE},
    tiny_images.CHAT: {IMAGES, "configuration_internvl_chat.py", "conversation.py", "modeling_internvl_chat.py"},
}
# Logits are of the order of 1; the merged weights differ from the reference in their last bits.
LOGITS = 1e-4
FEW: dict[str, Any] = {"merge_method": "expert_merging", "samples": (2, 1), "cluster": {"shards": 1}}


@dataclass(frozen=True)
class Made:
    """A finished merge: its model family, config and output folder."""

    family: str
    config: Path
    out: Path

    @property
    def base(self) -> Path:
        return self.config.parent / "base"

    @property
    def card(self) -> str:
        return (self.out / "README.md").read_text(encoding="utf-8")

    def load(self, **options: Any) -> Any:
        """Load the merge with the class and the options that the model card names."""
        line = re.search(r'^model = (\w+)\.from_pretrained\("PATH-OF-THIS-FOLDER"(.*)\)$', self.card, re.MULTILINE)
        assert line is not None
        if line[2]:
            assert line[2] == ", trust_remote_code=True"
            options["trust_remote_code"] = True
        return getattr(transformers, line[1]).from_pretrained(self.out, **options)

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Return the inputs of a forward pass on one sample with an image, prepared by the processor in `folder`."""
        if self.family in MIXTURES:
            return {"input_ids": torch.arange(3, 15)[None]}
        record = json.loads((self.config.parent / "expert0.json").read_text())[0]
        make = from_chat if self.family == tiny_images.CHAT else from_processor
        return make(folder, record, self.config.parent)

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        if self.family == tiny_images.CHAT:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.base, trust_remote_code=True)
            model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        logits: Tensor = model.eval()(**self.arguments(self.base)).logits
        return logits


# A merge takes a quarter of a minute to start its processes. Only the most special family is in the fast set.
@pytest.fixture(scope="module", params=thorough_but([tiny_images.CHAT], (*BY_COMMAND, *OTHERS, *MIXTURES)))
def made(request: pytest.FixtureRequest, warm: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A merge of each family; read-only."""
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    inputs, out = folder / "inputs", folder / "merged"
    make = tiny.make_merge if family in MIXTURES else tiny_images.make_merge
    if family in BY_COMMAND:
        config = make(inputs, family, samples=(2, 1))
        if family == "internvl":
            give_two_files(config)
        done = cli("merge", config, "--out", out)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    else:
        config = make(inputs, family, **FEW)
        request.getfixturevalue("small_ray")
        run_merge(plan_of(config), out)
    return Made(family, config, out)


def give_two_files(config: Path) -> None:
    """Give the second expert two calibration files in a subfolder; their images are next to the config."""
    folder = config.parent
    (folder / "data").mkdir()
    for name, seed in (("first", 5), ("second", 6)):
        tiny_images.write_records(folder, name, 2, seed).rename(folder / "data" / f"{name}.json")
    raw = yaml.safe_load(config.read_text())
    options = {"max_patches": 1}
    first = {"path": "data/first.json", "samples": 1, "loss_weight": 0.5, "image_options": options}
    raw["models"][1]["calibration"] = [first, "data/second.json"]
    config.write_text(yaml.safe_dump(raw, sort_keys=False))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def by_hand(made: Made) -> dict[str, Tensor]:
    """Compute the merged tensors, by their names in files: base plus sum of coefficients times task vectors."""
    record = made.out / "merge" / "coefficients.parquet"
    stage = max(pyarrow.parquet.read_table(record)["stage"].to_pylist())
    names, table = read_coefficients(record, stage)
    base, *experts = (tensors_of(made.config.parent / name) for name in ("base", *names))
    merged = dict(base)
    for name in table.layout.tensors:
        edges, values = table.of(name).edges, table.of(name).values
        whole = base[name].flatten().double()
        for k, expert in enumerate(experts):
            tau = expert[name].flatten().double() - base[name].flatten().double()
            for chunk, (start, end) in enumerate(pairwise(edges)):
                whole[start:end] += float(values[k, chunk]) * tau[start:end]
        merged[name] = whole.view(base[name].shape)
    return merged


def fresh_model(made: Made, tensors: dict[str, Tensor]) -> Any:
    """Return a model of the family's own class, filled with tensors by their names in files."""
    model = tiny.make_model(made.family) if made.family in MIXTURES else tiny_images.make_model(made.family)
    named = to_module({name: tensor.float() for name, tensor in tensors.items()}, model.config.model_type)
    model.load_state_dict(named)
    return model


def test_the_files_hold_the_base_and_the_sum_of_task_vectors(made: Made) -> None:
    written, expected, base = tensors_of(made.out), by_hand(made), tensors_of(made.base)
    assert list(written) == list(base), "under the names of published files"
    merged = plan_of(made.config).merged_set
    assert merged < set(base)
    for name, tensor in written.items():
        if name in merged:
            torch.testing.assert_close(tensor.double(), expected[name], atol=1e-6, rtol=0)
            assert not torch.equal(tensor, base[name])
        else:
            assert torch.equal(tensor, base[name]), f"{name} is the base's, bit for bit"


def test_it_loads_by_the_class_that_its_card_names(made: Made) -> None:
    model, info = made.load(output_loading_info=True)
    assert {what: list(found) for what, found in info.items() if found} == {}
    own = {tiny_images.CHAT: "InternVLChatModel"} | dict.fromkeys(MIXTURES, "ForCausalLM")
    assert type(model).__name__.endswith(own.get(made.family, "ForConditionalGeneration"))
    expected = to_module(tensors_of(made.out), model.config.model_type)
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name
    assert json.loads((made.out / "config.json").read_text()) == json.loads((made.base / "config.json").read_text())


def test_its_logits_are_those_of_a_model_filled_by_hand(made: Made) -> None:
    logits, expected = made.logits(made.load()), made.logits(fresh_model(made, by_hand(made)))
    assert logits.isfinite().all()
    torch.testing.assert_close(logits, expected, atol=LOGITS, rtol=0)
    base = made.logits(fresh_model(made, tensors_of(made.base)))
    assert (logits - base).abs().max() > 100 * LOGITS, "the merge must change the logits"


def test_the_files_of_the_processor_are_in_the_output(made: Made) -> None:
    names = {path.name for path in made.out.iterdir()}
    assert PROCESSOR.get(made.family, set()) | {"tokenizer.json", "chat_template.jinja"} <= names
    assert not (made.family != tiny_images.CHAT and [name for name in names if name.endswith(".py")])
    for path in made.base.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            assert (made.out / path.name).read_bytes() == path.read_bytes(), path.name
    processes = made.family not in (*MIXTURES, tiny_images.CHAT)
    assert ("processor = AutoProcessor" in made.card) == processes
    assert ("tokenizer = AutoTokenizer" in made.card) != processes
    if processes:
        assert load_processor(made.out).image_token_id == load_processor(made.base).image_token_id
    ours, theirs = made.arguments(made.out), made.arguments(made.base)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


AWAY = """
import sys, torch, transformers
model = transformers.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
with torch.no_grad():
    torch.save(model.eval()(**torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@contextmanager
def moved_away(folder: Path) -> Iterator[None]:
    away = folder.rename(folder.with_name("away"))
    try:
        yield
    finally:
        away.rename(folder)


@pytest.mark.slow
@pytest.mark.parametrize("made", [tiny_images.CHAT], indirect=True)
def test_its_code_is_its_own_when_the_inputs_are_gone(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = made.logits(made.load())
    torch.save(made.arguments(made.base), tmp_path / "given.pt")
    # An empty cache, so that code copied by an earlier load cannot hide a file missing from the folder.
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with moved_away(made.config.parent):
        command = [sys.executable, "-c", AWAY, made.out, tmp_path / "given.pt", tmp_path / "logits.pt"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("made", [as_thorough("internvl")], indirect=True)
def test_tasks_of_one_expert_and_the_config_of_the_output(made: Made, tmp_path: Path) -> None:
    rows = pyarrow.parquet.read_table(made.out / "merge" / "metrics.parquet").to_pylist()
    seen = {(row["model"], row["sample"]) for row in rows}
    # One sample of the first file, and both of the second.
    assert seen == {("expert0", 0), ("expert0", 1), ("expert1", 0), ("expert1", 1), ("expert1", 2)}
    config = made.out / "merge" / "config.yaml"
    written = yaml.safe_load(config.read_text())
    first, second = written["models"][1]["calibration"]
    data = made.config.parent / "data"
    assert first["path"] == str(data / "first.json") and str(data / "second.json") in str(second)
    assert (first["samples"], first["loss_weight"], first["image_options"]) == (1, 0.5, {"max_patches": 1})
    inputs = written["record"]["inputs"]["expert1"]
    images = {str(made.config.parent / f"{name}_images" / "0.png") for name in ("first", "second")}
    assert images <= inputs.keys() and str(made.config.parent / "first_images" / "1.jpg") not in inputs

    plans = [cli("plan", path, cwd=tmp_path) for path in (made.config, config)]
    for done in plans:
        assert done.returncode == 0, done.stderr
    # Meanwhile other programs may have written to the disk.
    first, second = (re.sub(r"free: .*", "", done.stdout) for done in plans)
    assert first == second
    assert re.search(r"expert forwards +5\b", first)


def without_code(folder: Path) -> tuple[Path, list[str]]:
    return tiny_images.make_merge(folder, tiny_images.CHAT, trust_remote_code=False), ["`trust_remote_code: true`"]


def without_vision(folder: Path) -> tuple[Path, list[str]]:
    config = tiny.make_merge(folder)
    data = tiny_images.write_records(folder, "seen", 1, 0)
    shutil.copy(data, folder / "expert1.json")
    raw = yaml.safe_load(config.read_text())
    raw["models"][1]["calibration"] = "expert1.json"
    config.write_text(yaml.safe_dump(raw, sort_keys=False))
    return config, ["expert1.json record 1", "has images"]


def without_response(folder: Path) -> tuple[Path, list[str]]:
    config = tiny_images.make_merge(folder, "qwen2_5_vl", parameters={"loss_tokens": "response"})
    return config, ["expert0.json record 2", "response", "`calibration.generate_responses`"]


@pytest.mark.parametrize("make", [without_code, without_vision, without_response])
def test_wrong_input_is_refused_before_any_actor_starts(merger: Server, tmp_path: Path, make: Any) -> None:
    config, facts = make(tmp_path / "merge")
    refused(merger.run("merge", str(config), "--out", str(tmp_path / "out"), cwd=config.parent), facts, prepared=True)
