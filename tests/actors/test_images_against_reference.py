"""Merges of models that take images, by the actors as plain classes, against the in-memory reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_images
import torch
from conftest import plan_of
from image_inputs import inputs_of
from plain import Plain
from reference import Reference, Result
from thorough import as_thorough, thorough_but
from torch.func import functional_call
from torch.nn.functional import pad

from engine.learning.targets import load_target
from engine.run.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")
# The same as for language models.
TOLERANCE = 1e-4
each_family = pytest.mark.parametrize("family", thorough_but(["qwen2_vl"], [*tiny_images.FAMILIES, tiny_images.CHAT]))


def largest_difference(plain: Plain, reference: Result) -> float:
    stages = plain.run()
    return float(
        max(
            np.abs(table.values[:, table.layout.columns[name]] - expected[name].numpy()).max()
            for table, expected in zip(stages, reference.stages, strict=True)
            for name in table.layout.tensors
        )
    )


@each_family
def test_a_sample_has_the_inputs_that_its_processor_makes(tmp_path: Path, family: str) -> None:
    config = tiny_images.make_merge(tmp_path / "merge", family)
    plain, wanted = Plain(plan_of(config), tmp_path), inputs_of(config)
    run = RunFolder(str(tmp_path / "plain"))
    for samples, expected in zip(plain.samples, wanted, strict=True):
        for sample, arguments in zip(samples, expected, strict=True):
            assert sample.input_ids == tuple(arguments["input_ids"][0].tolist())
            inputs = load_target(run.state, run.inputs(sample)).inputs
            assert inputs.keys() == arguments.keys() - {"input_ids", "attention_mask"}
            for name, tensor in inputs.items():
                torch.testing.assert_close(tensor, torch.as_tensor(arguments[name]), rtol=0, atol=1e-6)


@each_family
# A bias of the keys shifts all scores of a query equally, so its gradient is only rounding noise.
@pytest.mark.parametrize(
    "options", [as_thorough({}), {"exclude": ["vision.*k_proj.bias"]}], ids=["by-default", "all-merged"]
)
def test_coefficients_agree_with_the_reference(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    # One family repeats its samples; for the others, the architecture is the point.
    parameters = {"epochs": 2 if family == "qwen2_5_vl" else 1, "budget": 1.5}
    config = tiny_images.make_merge(tmp_path / "merge", family, parameters=parameters, **options)
    plain, reference = Plain(plan_of(config), tmp_path), Reference(config, inputs_of(config)).run()
    assert set(plain.plan.merged) == set(reference.importance)
    vision = [name for name in plain.plan.merged if "vision" in name or "visual" in name]
    assert bool(vision) == ("exclude" in options)
    assert any("projector" in name or "mlp1" in name for name in plain.plan.merged) or family.startswith("qwen")
    assert largest_difference(plain, reference) < TOLERANCE
    moved = np.abs(plain.trainer._merged.values - np.array([[e.weight] for e in plain.plan.experts]))
    assert moved.mean() > 10 * TOLERANCE, "learning must move further than the tolerance"


@pytest.mark.parametrize("loss_tokens", ["text", "response"])
@pytest.mark.parametrize("family", thorough_but(["qwen2_vl"], ["qwen2_vl", "gemma3", tiny_images.CHAT]))
@pytest.mark.parametrize("method", ["expert_merging_pp", as_thorough("adamerging")])
def test_losses_may_count_some_tokens_alone(tmp_path: Path, family: str, loss_tokens: str, method: str) -> None:
    """Gemma 3's head is merged here, so that its targets hold logits."""
    parameters = {"loss_tokens": loss_tokens}
    exclude = {"exclude": ["vision"]} if family == "gemma3" else {}
    config = tiny_images.make_merge(tmp_path / "merge", family, parameters=parameters, merge_method=method, **exclude)
    for file in config.parent.glob("expert*.json"):
        records = [record | {"response": "w9 w8 w7"} for record in json.loads(file.read_text())]
        file.write_text(json.dumps(records))
    inputs, places = inputs_of(config), []
    tokens = tiny_images.tokens(family)
    seen = tokens[{"gemma3": "<image_soft_token>", "qwen2_vl": "<|image_pad|>"}.get(family, "<IMG_CONTEXT>")]
    for expert_inputs in inputs:
        ids = [arguments["input_ids"][0].tolist() for arguments in expert_inputs]
        text = [[place for place, token in enumerate(row) if token != seen] for row in ids]
        response = [[place for place in range(len(row)) if place >= row.index(tokens["assistant:"])] for row in ids]
        places.append(text if loss_tokens == "text" else response)
    assert all(
        0 < len(row) < arguments["input_ids"].shape[1] for row, arguments in zip(places[0], inputs[0], strict=True)
    )
    plain = Plain(plan_of(config), tmp_path)
    reference = (Entropy if method == "adamerging" else Reference)(config, inputs, places)
    assert largest_difference(plain, reference.run()) < TOLERANCE


class Entropy(Reference):
    """The reference with the mean entropy as its loss and without a second stage."""

    def loss(self, alpha: dict[str, torch.Tensor], k: int, i: int) -> torch.Tensor:
        arguments, _, _, which = self.samples[k][i]
        logits = functional_call(self.model, self.compose(alpha), (), arguments).logits[0, which]
        return self.beta[k] * torch.distributions.Categorical(logits=logits).entropy().mean()

    def run(self) -> Result:
        start = dict.fromkeys(self.names, self.prior[:, None])
        return Result([self.stage(dict.fromkeys(self.names, 1), start, start)], {}, {})


@each_family
def test_an_expert_generates_a_response_to_an_image(tmp_path: Path, family: str) -> None:
    config = tiny_images.make_merge(tmp_path / "merge", family, calibration={"generate_responses": 4})
    plain, inputs = Plain(plan_of(config), tmp_path), inputs_of(config)
    model = Reference._load(config.parent / "expert0")
    sample, arguments = plain.samples[0][1], dict(inputs[0][1])
    assert sample.generate == 4 and not plain.samples[0][0].generate
    target = load_target(RunFolder(str(tmp_path / "plain")).state, "targets/0-1.safetensors")
    ids = arguments["input_ids"][0].tolist()
    for _ in range(len(target.input_ids_T) - len(ids)):
        # Token type ids are padded with 0, that of text.
        types = {n: pad(t, (0, len(ids) - t.shape[1])) for n, t in arguments.items() if n.endswith("type_ids")}
        given = arguments | types | {"input_ids": torch.tensor([ids])}
        given.pop("attention_mask", None)
        with torch.no_grad():
            ids.append(int(model(**given).logits[0, -1].argmax()))
    assert len(target.input_ids_T) > len(sample.input_ids) and target.input_ids_T.tolist() == ids


def test_an_expert_may_have_records_with_and_without_images(tmp_path: Path) -> None:
    config = tiny_images.make_merge(tmp_path / "merge", "qwen2_vl", samples=(3, 3), parameters={"epochs": 2})
    for file in config.parent.glob("expert*.json"):
        records = json.loads(file.read_text())
        del records[1]["image_path"]
        file.write_text(json.dumps(records))
    plain = Plain(plan_of(config), tmp_path)
    assert [sample.inputs for sample in plain.samples[0]] == [True, False, True]
    assert largest_difference(plain, Reference(config, inputs_of(config)).run()) < TOLERANCE


def test_only_the_base_s_code_runs_whatever_an_expert_s_folder_holds(tmp_path: Path) -> None:
    """Experts are often saved without the code that their config names, or their config names another repository."""
    config = tiny_images.make_merge(tmp_path / "merge", tiny_images.CHAT)
    reference = Reference(config, inputs_of(config)).run()
    for k, folder in enumerate(config.parent / f"expert{k}" for k in range(2)):
        for file in folder.glob("*.py"):
            file.write_text("raise SystemExit('no code of an expert is run')") if k else file.unlink()
        made = json.loads((folder / "config.json").read_text())
        made["auto_map"] = {name: f"owner/name--{where}" for name, where in made["auto_map"].items()}
        (folder / "config.json").write_text(json.dumps(made))
    plain = Plain(plan_of(config), tmp_path)
    assert largest_difference(plain, reference) < TOLERANCE
