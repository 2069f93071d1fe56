"""Frozen experts and skeletons against models that `from_pretrained` loads from the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from conftest import plan_of
from errors import refused
from thorough import thorough_but
from transformers import AutoModelForCausalLM

from engine.calibration.samples import Sample
from engine.checkpoints.headers import read_model_header
from engine.errors import CheckpointError
from engine.learning.frozen_expert import FrozenExpert
from engine.learning.student import Student
from engine.learning.targets import load_target, save_target
from engine.models.forward import rebuild_logits
from engine.models.loading import load_model_config
from engine.models.names import Place, match_names
from engine.models.skeleton import build_skeleton, fill
from engine.storage.local_folder import LocalFolder

CPU = torch.device("cpu")
SAMPLE = Sample(0, 0, (5, 9, 33, 12, 7, 41), "here")


def truth(folder: Path, dtype: torch.dtype = torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(torch.tensor([SAMPLE.input_ids]), output_hidden_states=True)


@pytest.mark.parametrize("family", thorough_but(["llama", "gemma3", "qwen3_moe"], tiny.FAMILIES))
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_target_holds_the_outputs_of_the_loaded_expert(tmp_path: Path, family: str, tied: bool) -> None:
    plan = plan_of(tiny.make_merge(tmp_path / "merge", family, experts=1, tied=tied, sharded=True))
    target = FrozenExpert(plan, 0, CPU).target(SAMPLE)
    expected = truth(tmp_path / "merge" / "expert0")
    assert target.logits_CV is None, "the head is the base's, so the last hidden state is enough"
    for index in (1, 2):
        assert torch.equal(target.hidden_CH[index], expected.hidden_states[index][0])
    student = Student(plan, CPU)
    assert torch.equal(rebuild_logits(student.model, target.last_hidden_CH[None])[0], expected.logits[0])


def test_a_bfloat16_target_holds_the_outputs_of_the_loaded_expert(tmp_path: Path) -> None:
    plan = plan_of(tiny.make_merge(tmp_path / "merge", "gemma2", experts=1, dtype=torch.bfloat16))
    assert plan.dtype == "bfloat16"
    target = FrozenExpert(plan, 0, CPU).target(SAMPLE)
    expected = truth(tmp_path / "merge" / "expert0", torch.bfloat16)
    assert torch.equal(target.hidden_CH[2], expected.hidden_states[2][0])
    assert target.last_hidden_CH is not None and target.last_hidden_CH.dtype == torch.bfloat16


def test_a_target_holds_the_logits_if_the_head_differs_from_the_base_s(tmp_path: Path) -> None:
    config = tiny.make_merge(tmp_path / "merge", experts=1)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "merge" / "base")
    expert = tiny.make_expert(base, seed=1)
    with torch.no_grad():
        expert.lm_head.weight[3, 4] += 0.5
    tiny.save(expert, tmp_path / "merge" / "expert0")
    target = FrozenExpert(plan_of(config), 0, CPU).target(SAMPLE)
    assert target.last_hidden_CH is None
    assert torch.equal(target.logits_CV, truth(tmp_path / "merge" / "expert0").logits[0])


def test_a_target_holds_the_logits_if_the_head_is_merged(tmp_path: Path) -> None:
    config = tiny.make_merge(tmp_path / "merge", experts=1, exclude=[".*norm.*"])
    target = FrozenExpert(plan_of(config), 0, CPU).target(SAMPLE)
    assert target.last_hidden_CH is None and target.logits_CV is not None


def test_a_target_holds_the_logits_if_the_config_differs_from_the_base_s(tmp_path: Path) -> None:
    config = tiny.make_merge(tmp_path / "merge", "gemma2", experts=1)
    path = tmp_path / "merge" / "expert0" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"final_logit_softcapping": 5.0}))
    target = FrozenExpert(plan_of(config), 0, CPU).target(SAMPLE)
    assert target.last_hidden_CH is None
    assert torch.equal(target.logits_CV, truth(tmp_path / "merge" / "expert0").logits[0])


def test_an_expert_generates_its_response_greedily(tmp_path: Path) -> None:
    plan = plan_of(tiny.make_merge(tmp_path / "merge", experts=1))
    target = FrozenExpert(plan, 0, CPU).target(Sample(0, 0, SAMPLE.input_ids, "here", generate=4))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merge" / "expert0").eval()
    ids = torch.tensor([SAMPLE.input_ids])
    for _ in range(4):
        with torch.no_grad():
            best = model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, best[None, None]], dim=1)
        if best == model.config.eos_token_id:
            break
    assert target.input_ids_T.tolist() == ids[0].tolist()
    assert target.hidden_CH[1].shape[0] == ids.shape[1]


def test_a_target_survives_its_file(tmp_path: Path) -> None:
    plan = plan_of(tiny.make_merge(tmp_path / "merge", experts=1, parameters={"hidden_layers": [0, 3]}))
    target = FrozenExpert(plan, 0, CPU).target(SAMPLE)
    folder = LocalFolder(tmp_path)
    assert save_target(target, folder, "target") == folder.size("target")
    read = load_target(folder, "target")
    assert read.tensors().keys() == target.tensors().keys()
    assert all(torch.equal(read.tensors()[name], tensor) for name, tensor in target.tensors().items())


def test_a_tied_config_beside_another_head_in_the_file_is_built_untied(tmp_path: Path) -> None:
    config = tiny.make_merge(tmp_path / "merge", experts=1, tied=True)
    for name in ("base", "expert0"):
        path = tmp_path / "merge" / name / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        tensors["lm_head.weight"] = torch.randn(tiny.VOCAB, 32, generator=torch.Generator().manual_seed(5))
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
    plan = plan_of(config)
    student = Student(plan, CPU)
    head = student.model.lm_head.weight
    assert torch.equal(head, tensors["lm_head.weight"])
    assert not torch.equal(head, student.model.get_input_embeddings().weight)


def test_unmatched_tensors_and_parameters_are_named(tmp_path: Path) -> None:
    folder = tiny.save(tiny.make_model(), tmp_path / "model")
    tensors = read_model_header(folder).tensors
    norm = tensors.pop("model.norm.weight")
    with refused(CheckpointError, where=str(folder), facts=["'model.norm.weight'", "32 elements"]):
        build_skeleton(load_model_config(folder), tensors, torch.float32, folder)
    more = {"model.norm.weight": norm, "model.layers.0.extra.weight": norm}
    with refused(CheckpointError, where=str(folder), facts=["'model.layers.0.extra.weight'", "LlamaForCausalLM"]):
        build_skeleton(load_model_config(folder), tensors | more, torch.float32, folder)


def test_a_shape_that_differs_from_the_configs_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tiny.make_model(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with refused(CheckpointError, where=str(folder), facts=[".mlp.", "config.json"]) as caught:
        build_skeleton(load_model_config(folder), read_model_header(folder).tensors, torch.float32, folder)
    assert "64" in caught.value.expected


def test_former_names_of_an_architecture_are_matched(tmp_path: Path) -> None:
    folder = tiny.save(tiny.make_model(), tmp_path / "model")
    model, _ = build_skeleton(load_model_config(folder), read_model_header(folder).tensors, torch.float32, folder)
    tensors = read_model_header(folder).tensors
    up = tensors["model.layers.0.mlp.up_proj.weight"]
    old = {"layers.0.mlp.up_proj.weight": up, "model.layers.0.self_attn.rotary_emb.inv_freq": up}
    assert match_names(model, old, folder) == {
        "layers.0.mlp.up_proj.weight": Place("model.layers.0.mlp.up_proj.weight")
    }


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tiny.make_model(), tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "no_such_model"}')
    with refused(CheckpointError, where=str(folder), facts=["no_such_model"]):
        build_skeleton(load_model_config(folder), {}, torch.float32, folder)


def test_logits_that_are_not_finite_are_refused_by_the_sample(tmp_path: Path) -> None:
    plan = plan_of(tiny.make_merge(tmp_path / "merge", experts=1))
    expert = FrozenExpert(plan, 0, CPU)
    with torch.no_grad():
        expert.model.get_parameter("model.norm.weight").data = torch.full((32,), float("inf"))
    with refused(CheckpointError, where="here", facts=["not finite"]):
        expert.target(SAMPLE)


def test_unfilled_parameters_have_the_run_s_dtype(tmp_path: Path) -> None:
    """The code of a checkpoint may build its language model in the dtype of that model's own config."""
    folder = tiny.save(tiny.make_model(), tmp_path / "model")
    model, places = build_skeleton(load_model_config(folder), read_model_header(folder).tensors, torch.float32, folder)
    model.model.layers[1].to(torch.bfloat16)
    fill(model, places, {"": CPU}, torch.float32, lambda name: None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
