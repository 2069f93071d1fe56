"""Calibration of models that take images: vision tower, projector and language model."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import tiny_images
import torch
from conftest import plan_of
from correction_helpers import Actors, result
from safetensors.torch import load_file
from thorough import as_thorough

from engine.calibration.encoder import encoder
from engine.calibration.records import read_records
from engine.calibration.samples import Sample, make_samples
from engine.correction.files import load_sealed_tensors, merged_file, solved_file, tokens_file
from engine.correction.rules import Rule, featcal
from engine.planning.plan import Plan
from engine.storage.local_folder import LocalFolder

pytestmark = pytest.mark.usefixtures("one_thread")

FEATCAL = featcal({"alpha": 0.3, "rho": 2.0, "ridge": 0.05})
Inputs = list[list[dict[str, torch.Tensor]]]


def prepared(folder: Path, family: str) -> tuple[Plan, list[list[Sample]], Inputs]:
    config = tiny_images.make_merge(folder, family, merge_method="task_arithmetic", calibrate="featcal")
    # Longer responses of one of these experts, which are random, have image tokens.
    plan = plan_of(config, "parameters.samples_per_model=2", "calibration.generate_responses=8")
    records = read_records(plan)
    found: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    samples = make_samples(
        records,
        encoder(plan, records),
        plan,
        lambda sample, given: found.update({(sample.expert, sample.index): dict(given)}),
    )
    # The last expert has a sample without an image, too.
    last = len(samples) - 1
    if family != tiny_images.CHAT:
        samples[last].append(Sample(last, len(samples[last]), tuple(range(10, 20)), "text"))
    inputs = [[found.get((sample.expert, sample.index), {}) for sample in mine] for mine in samples]
    return plan, samples, inputs


def store(plan: Plan, state: LocalFolder, model: str) -> dict[str, torch.Tensor]:
    tensors = load_file(Path(model) / "model.safetensors")
    for name, tensor in tensors.items():
        state.write(merged_file(name), safetensors.torch.save({name: tensor}))
    return tensors


@pytest.mark.parametrize("family", ["qwen3_vl", *map(as_thorough, ("llava_onevision", tiny_images.CHAT))])
def test_all_layers_are_solved_and_bits_do_not_depend_on_actors(tmp_path: Path, family: str) -> None:
    plan, samples, inputs = prepared(tmp_path, family)
    results = []
    for name, count, cuts in (("one", 1, [range(7)]), ("three", 3, [range(2), range(2, 5), range(5, 7)])):
        state = LocalFolder(tmp_path / name)
        before = store(plan, state, plan.base.model)
        for cut in cuts:
            Actors(plan, FEATCAL, samples, state, count, inputs).run(cut)
        results.append(result(plan, state))
        # Records without a response: each expert has written one.
        written = load_sealed_tensors(state, tokens_file(0))
        assert any(len(written[str(one.index)][0]) > len(one.input_ids) for one in samples[0])
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    changed = {name for name, tensor in results[0].items() if not torch.equal(tensor, before[name])}
    for part in (
        "vis",
        "language_model",
        {"llava_onevision": "projector", tiny_images.CHAT: "mlp1"}.get(family, "merger"),
    ):
        assert any(part in name for name in changed), part
    assert not any("embed_tokens" in name or "lm_head" in name for name in changed)


def test_text_alone_leaves_the_vision_tower_as_it_is(tmp_path: Path) -> None:
    plan, samples, _ = prepared(tmp_path, "qwen3_vl")
    state = LocalFolder(tmp_path / "state")
    base = store(plan, state, plan.base.model)
    # Nothing but the text sample.
    Actors(plan, FEATCAL, [[], samples[1][-1:]], state, inputs=[[], [{}]], experts=[1]).run(range(7))
    for name, tensor in result(plan, state).items():
        assert ("visual" in name) <= torch.equal(tensor, base[name]), name
    assert any(not torch.equal(tensor, base[name]) for name, tensor in result(plan, state).items())


def test_an_expert_that_is_the_merged_model_and_its_anchor_is_returned(tmp_path: Path) -> None:
    plan, samples, inputs = prepared(tmp_path, "qwen3_vl")
    state = LocalFolder(tmp_path / "state")
    expert = store(plan, state, plan.experts[0].model)
    Actors(plan, Rule(alpha=0.3, rho=1, ridge=0.05), samples[:1], state, inputs=inputs[:1], experts=[0]).run(range(7))
    for name, tensor in result(plan, state).items():
        torch.testing.assert_close(tensor, expert[name], rtol=1e-4, atol=1e-5)
    assert all(state.exists(solved_file(name)) for name in expert if "blocks.0" in name or "layers.0" in name)
