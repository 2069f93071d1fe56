"""Whole tiny mixtures made smaller, without Ray: the calls of its actors, one after another."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import tiny_mixtures
import torch
import yaml
from errors import refused
from tiny_mixtures import FAMILIES, make_mixture, pair_up, save_mixture

from engine.checkpoints.writer import write_file
from engine.compression.compressor import Compressor
from engine.compression.config import read_compression
from engine.compression.model import CompressedModel
from engine.errors import CheckpointError
from engine.output.model_folder import output_files, write_companions
from engine.planning.planner import make_plan
from engine.storage.local_folder import LocalFolder

METHODS = ("ream", "m_smoe", "sub_moe")
LENGTHS = (37, 41, 50)


def given() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, tiny.VOCAB, (1, length), generator=generator) for length in LENGTHS]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def plan_of(folder: Path, **compress: Any) -> Any:
    tiny.write_calibration(folder / "data.jsonl", 3, seed=0)
    config = {"model": "model", "compress": {"experts": 0.5, **compress}, "calibration": "data.jsonl"}
    (folder / "compress.yaml").write_text(yaml.safe_dump(config))
    return make_plan(read_compression(folder / "compress.yaml"), folder)


def compressed(folder: Path, out: str = "out", anew: bool = False, **compress: Any) -> Path:
    """Compress the model in a folder. `anew`: with a new actor for every part."""
    plan, state = plan_of(folder, **compress), LocalFolder(folder / f"{out}.run")
    actor = Compressor(plan, given(), state, torch.device("cpu"))
    for part in range(actor.parts):
        if anew:
            actor = Compressor(plan, given(), state, torch.device("cpu"))
        actor.compress(part)
    model, target = CompressedModel(plan, state), folder / out
    target.mkdir()
    files = output_files(model.smaller)
    for file in files:
        write_file(LocalFolder(target), file, lambda entry: model.parts(entry.name))
    write_companions(target, model.smaller, folder / "model", files)
    return target


def loaded(folder: Path) -> Any:
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return torch.cat([model(**one).logits[0] for one in given()])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_the_experts_of_every_family_load_and_run(family: str, fused: bool, tmp_path: Path) -> None:
    save_mixture(make_mixture(family), tmp_path / "model", fused)
    out = compressed(tmp_path)
    model = loaded(out)
    assert all(len(module.gate.weight) == 4 for module in tiny_mixtures.mixtures(model))
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_give_the_model_bit_for_bit(family: str, method: str, tmp_path: Path) -> None:
    save_mixture(make_mixture(family), tmp_path / "model")
    out = compressed(tmp_path, method=method, experts=8)
    before, after = weights(tmp_path / "model"), weights(out)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(loaded(tmp_path / "model")), logits(loaded(out)))


@pytest.mark.parametrize(("method", "permuted"), [("ream", True), ("m_smoe", True), ("sub_moe", False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_experts_are_found_and_merged_without_loss(
    family: str, method: str, permuted: bool, tmp_path: Path
) -> None:
    # One expert a token: of two, a pair would have been chosen where now two different experts are.
    more = {"n_group": 1} if family == "deepseek_v3" else {}
    model = pair_up(make_mixture(family, experts=8, top=1, **more), permuted=permuted)
    save_mixture(model, tmp_path / "model")
    # Without this bound, REAM lets the most salient expert absorb several others.
    out = compressed(tmp_path, method=method, group_size=2)
    torch.testing.assert_close(logits(loaded(out)), logits(model), rtol=1e-4, atol=1e-5)


def test_a_restart_and_another_order_of_calls_give_the_same_bits(tmp_path: Path) -> None:
    save_mixture(make_mixture("deepseek_v3"), tmp_path / "model")
    outs = [compressed(tmp_path, str(anew), anew) for anew in (False, True)]
    digests = {hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest() for out in outs}
    assert len(digests) == 1


def test_fused_and_split_files_give_the_same_model(tmp_path: Path) -> None:
    model = make_mixture("mixtral")
    outs = []
    for fused in (False, True):
        (folder := tmp_path / str(fused)).mkdir()
        save_mixture(model, folder / "model", fused)
        outs.append(loaded(compressed(folder)))
    assert torch.equal(logits(outs[0]), logits(outs[1]))


def test_later_layers_see_the_compressed_ones_in_sequence(tmp_path: Path) -> None:
    save_mixture(make_mixture("qwen3_moe"), tmp_path / "model")
    first, second = (compressed(tmp_path, str(sequential), sequential=sequential) for sequential in (False, True))
    one, other = weights(first), weights(second)
    in_first = [name for name in one if "layers.0." in name]
    assert all(torch.equal(one[name], other[name]) for name in in_first)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("method", "weight", "value"),
    [(method, "down_proj", float("nan")) for method in METHODS]
    + [(method, "gate_up_proj", 1e38) for method in ("ream", "sub_moe")],  # m_smoe does not run the experts
)
def test_experts_that_are_not_finite_are_refused(method: str, weight: str, value: float, tmp_path: Path) -> None:
    model = make_mixture("olmoe")
    with torch.no_grad():
        getattr(tiny_mixtures.mixtures(model)[1].experts, weight)[3].fill_(value)
    save_mixture(model, tmp_path / "model")
    with refused(CheckpointError, "model", facts=["model.layers.1.mlp"]):
        compressed(tmp_path, method=method)
