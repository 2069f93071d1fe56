"""Experts are matched to the base through the parameters of the model, whatever names their files give the tensors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import tiny_images
import torch
import transformers
import yaml
from conftest import plan_of
from errors import refused
from thorough import thorough_but
from torch import Tensor
from weight_space import combine, ours, read

from engine.checkpoints.headers import ModelHeader
from engine.errors import CheckpointError, ConfigError
from engine.learning.frozen_expert import FrozenExpert, check_models
from engine.learning.student import Student
from engine.planning.open_models import load_base_config
from engine.planning.plan import Plan
from engine.run.preparation import check_heads

LEARNED, ARITHMETIC = {"merge_method": "expert_merging"}, {"merge_method": "task_arithmetic"}
methods = pytest.mark.parametrize("method", [LEARNED, ARITHMETIC], ids=lambda method: method["merge_method"])


def write(folder: Path, method: dict[str, Any], *experts: str, **keys: Any) -> Path:
    """Write a merge.yaml of `base` and the experts, each with weight 0.5, and return its path."""
    models = []
    for expert in experts:
        tiny.write_calibration(folder / f"{expert}.jsonl", 2, seed=1)
        models.append({"model": expert, "calibration": f"{expert}.jsonl", "parameters": {"weight": 0.5}})
    if method is ARITHMETIC:
        for model in models:
            del model["calibration"]
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump({"base_model": "base", "models": models, **method, **keys}))
    return path


def rename(folder: Path, new: Callable[[str], str], **more: Tensor) -> None:
    file = folder / "model.safetensors"
    tensors = {new(name): tensor for name, tensor in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(tensors | more, file, metadata={"format": "pt"})


def logits(model: Any, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return the logits of `model` and of the plan's only expert on the same tokens."""
    ids = torch.arange(5, 15)[None]
    frozen = FrozenExpert(plan, 0, torch.device("cpu")).model
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits, frozen(input_ids=ids).logits


def check_merged(folder: Path, base: dict[str, Tensor], tuned: dict[str, Tensor], kind: Any) -> None:
    """Check that a weight-space merge of half of one expert is half way, loaded by transformers."""
    merged = ours(write(folder, ARITHMETIC, "tuned"))
    assert merged.keys() == read(folder / "base").keys(), "the output has the base's names"
    shutil.copytree(folder / "base", folder / "out")
    safetensors.torch.save_file(merged, folder / "out" / "model.safetensors", metadata={"format": "pt"})
    loaded = kind.from_pretrained(folder / "out", dtype=torch.float32).state_dict()
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor, (base[name] + tuned[name]) / 2)


@pytest.mark.parametrize("own_names", ["base", "tuned"])
@pytest.mark.parametrize(
    "family", thorough_but(["gemma3", "internvl"], ["qwen2_5_vl", "gemma3", "internvl", "llava_onevision"])
)
def test_names_of_the_hub_and_of_the_modules_are_the_same_parameters(
    tmp_path: Path, family: str, own_names: str
) -> None:
    base = tiny_images.make_model(family)
    tuned = tiny_images.make_expert(base, 1)
    tiny_images.save(base, tmp_path / "base", family)
    base.save_pretrained(tmp_path / "base", save_original_format=own_names != "base")
    tuned.save_pretrained(tmp_path / "tuned", save_original_format=own_names != "tuned")
    plan = plan_of(write(tmp_path, LEARNED, "tuned"))
    assert len(plan.experts[0].match.renamed) > len(plan.merged)
    torch.testing.assert_close(*logits(tuned, plan), rtol=0, atol=0)
    check_merged(tmp_path, base.state_dict(), tuned.state_dict(), transformers.AutoModelForImageTextToText)


@pytest.mark.parametrize("own_names", ["base", "tuned"])
def test_experts_of_a_mixture_may_be_one_tensor_or_many(tmp_path: Path, own_names: str) -> None:
    base = tiny.make_model("qwen3_moe")
    tuned = tiny.make_expert(base, 1)
    base.save_pretrained(tmp_path / "base", save_original_format=own_names != "base")
    tuned.save_pretrained(tmp_path / "tuned", save_original_format=own_names != "tuned")
    plan = plan_of(write(tmp_path, LEARNED, "tuned"))
    assert len(plan.experts[0].match.parts) == 3 * (2 if own_names == "base" else 3 * 4)
    torch.testing.assert_close(*logits(tuned, plan), rtol=0, atol=0)
    check_merged(tmp_path, base.state_dict(), tuned.state_dict(), transformers.AutoModelForCausalLM)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=2)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def bloom() -> Any:
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, eos_token_id=2)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("make", [gpt2, bloom])
@pytest.mark.parametrize("bare", ["base", "tuned"])
def test_the_prefix_of_the_base_model_may_be_missing(tmp_path: Path, bare: str, make: Callable[[], Any]) -> None:
    base = make()
    tuned = tiny.make_expert(base, 1)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)} if make is gpt2 else {}
    rename(tmp_path / bare, lambda name: name.removeprefix("transformer."), **masks)
    plan = plan_of(write(tmp_path, LEARNED, "tuned"))
    outside = ("attn.bias", "wte", "wpe", "ln_", "word_embeddings", "layernorm")
    assert not any(part in name for name in plan.merged for part in outside)
    assert sum("c_attn.weight" in name or "query_key_value.weight" in name for name in plan.merged) == 2
    torch.testing.assert_close(*logits(tuned, plan), rtol=0, atol=0)
    check_merged(tmp_path, base.state_dict(), tuned.state_dict(), transformers.AutoModelForCausalLM)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod."])
def test_the_prefix_of_a_wrapper_is_read_past_in_an_expert_and_refused_in_the_base(tmp_path: Path, prefix: str) -> None:
    base = tiny.make_model()
    tuned = tiny.make_expert(base, 1)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    rename(tmp_path / "tuned", lambda name: prefix + name)
    plan = plan_of(write(tmp_path, LEARNED, "tuned"))
    assert plan.experts[0].match.wrapped.startswith(prefix)
    torch.testing.assert_close(*logits(tuned, plan), rtol=0, atol=0)
    check_merged(tmp_path, base.state_dict(), tuned.state_dict(), transformers.AutoModelForCausalLM)
    rename(tmp_path / "base", lambda name: prefix + name)
    with refused(CheckpointError, where="base", do="save_pretrained", facts=[prefix]):
        plan_of(write(tmp_path, ARITHMETIC, "tuned"))


def test_a_parameter_under_two_names_is_refused(tmp_path: Path) -> None:
    base = tiny.make_model()
    base.save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "tuned")
    more = safetensors.torch.load_file(tmp_path / "tuned" / "model.safetensors")["model.norm.weight"].clone()
    rename(tmp_path / "tuned", str, **{"module.model.norm.weight": more})
    with refused(CheckpointError, where="tuned", facts=["'module.model.norm.weight'", "'model.norm.weight'"]):
        plan_of(write(tmp_path, ARITHMETIC, "tuned"))


@methods
@pytest.mark.parametrize(
    ("family", "old"),
    [
        ("codegen", {"transformer.h.0.attn.causal_mask": torch.ones(1, 1, 8, 8).tril().to(torch.uint8)}),
        ("falcon", {"transformer.h.0.self_attention.maybe_rotary.inv_freq": torch.ones(4)}),
    ],
)
def test_buffers_of_older_files_do_not_count(
    tmp_path: Path, family: str, old: dict[str, Tensor], method: dict[str, Any]
) -> None:
    keys = tiny.COMMON | ({"rotary_dim": 4} if family == "codegen" else {})
    config = transformers.AutoConfig.for_model(family, **keys)
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tuned = tiny.make_expert(base, 1)
    for owners in (("base",), ("base", "tuned"), ("tuned",)):
        base.save_pretrained(tmp_path / "base")
        tuned.save_pretrained(tmp_path / "tuned")
        for number, owner in enumerate(owners, 1):
            rename(tmp_path / owner, str, **{name: tensor * number for name, tensor in old.items()})
        plan = plan_of(write(tmp_path, method, "tuned"))
        assert old.keys().isdisjoint(plan.merged)
        if method is LEARNED:
            torch.testing.assert_close(*logits(tuned, plan), rtol=0, atol=0)
            check_models(plan)
        else:
            merged = read(combine(plan, tmp_path / f"out of {len(owners)} {owners[0]}"))
            assert all(torch.equal(merged.get(name, tensor), tensor) for name, tensor in old.items())
            assert old.keys().isdisjoint(merged) == ("base" not in owners)


@methods
@pytest.mark.parametrize("owners", [("base",), ("tuned",), ("base", "tuned")], ids=str)
def test_rotary_frequencies_in_files_are_not_merged(
    tmp_path: Path, owners: tuple[str, ...], method: dict[str, Any]
) -> None:
    base = tiny.make_model()
    tuned = tiny.make_expert(base, 1)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    for number, owner in enumerate(owners, 1):
        rename(tmp_path / owner, str, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4) * number})
    plan = plan_of(write(tmp_path, method, "tuned"))
    assert not any("inv_freq" in name for name in plan.merged)
    if method is LEARNED:
        torch.testing.assert_close(*logits(tuned, plan), rtol=0, atol=0)
    else:
        merged = ours(write(tmp_path, method, "tuned"))
        kept = {name: tensor for name, tensor in merged.items() if "inv_freq" in name}
        assert len(kept) == ("base" in owners)
        assert all(torch.equal(tensor, torch.ones(4)) for tensor in kept.values())


# Config of the text model that is the language model of each family.
TEXTS = {
    "gemma3": transformers.Gemma3TextConfig,
    "internvl": transformers.Qwen2Config,
    "llava_onevision": transformers.Qwen2Config,
    "qwen2_5_vl": transformers.Qwen2Config,
    "qwen3_vl": transformers.Qwen3Config,
}


def text_of(base: Any, family: str) -> Any:
    """Return the language model of a model with images as a model of its own."""
    others = {"model_type", "dtype", "layer_types" if family.startswith("qwen") else ""}
    keys = {key: value for key, value in base.config.text_config.to_dict().items() if key not in others}
    for key in ("mrope_section", "mrope_interleaved"):
        keys["rope_parameters"].pop(key, None)
    text = transformers.AutoModelForCausalLM.from_config(TEXTS[family](**keys), dtype=torch.float32)
    text.model.load_state_dict(base.model.language_model.state_dict())
    text.lm_head.load_state_dict(base.lm_head.state_dict())
    return text


@pytest.mark.parametrize("family", thorough_but(["gemma3", "internvl"], TEXTS))
def test_a_text_model_is_an_expert_of_a_model_with_images(tmp_path: Path, family: str) -> None:
    base = tiny_images.make_model(family)
    tiny_images.save(base, tmp_path / "base", family)
    tuned = tiny.make_expert(text_of(base, family), 1)
    tuned.save_pretrained(tmp_path / "tuned")
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 999}))
    plan = plan_of(write(tmp_path, LEARNED, "tuned"))
    assert not any("rope" in note for _, note in plan.notes)
    # A text model's config is none for a model with images.
    assert any("999" in note for _, note in plan.notes) and not any("config_source" in note for _, note in plan.notes)
    absent = plan.experts[0].match.absent
    outside = ("vis", "projector", "newline", "mlp1")
    assert absent and all(any(part in name for part in outside) for name in absent)
    torch.testing.assert_close(*logits(tuned, plan), rtol=1e-5, atol=1e-5)
    merged = ours(write(tmp_path, ARITHMETIC, "tuned"))
    before = read(tmp_path / "base")
    changed = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert changed and not changed & absent
    with refused(CheckpointError, where="tuned"):
        rename(tmp_path / "tuned", lambda name: name.replace("layers.1", "layers.7"))
        plan_of(write(tmp_path, ARITHMETIC, "tuned"))


def test_the_base_header_knows_the_roles_of_a_family_with_other_names(tmp_path: Path) -> None:
    base = gpt2()
    base.save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "tuned")
    header = plan_of(write(tmp_path, ARITHMETIC, "tuned")).base_header
    assert isinstance(header, ModelHeader)
    assert header.roles["transformer.wte.weight"] == "embedding"
    assert header.roles["transformer.wpe.weight"] == "position"
    assert header.roles["transformer.ln_f.weight"] == header.roles["transformer.h.0.ln_1.bias"] == "norm"


def tied(folder: Path) -> tuple[Any, Any]:
    """Save a base that writes its tied head out, and an expert that does not; return the two."""
    base = tiny.make_model("llama", tied=True)
    tuned = tiny.make_expert(base, 1)
    base.save_pretrained(folder / "base")
    tuned.save_pretrained(folder / "tuned")
    return base, tuned


@methods
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("owner", ["base", "tuned"])
def test_a_tied_head_may_be_written_out(tmp_path: Path, owner: str, flag: bool, method: dict[str, Any]) -> None:
    base, tuned = tied(tmp_path)
    path = tmp_path / owner / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": flag}))
    model = base if owner == "base" else tuned
    rename(tmp_path / owner, str, **{"lm_head.weight": model.lm_head.weight.detach().clone()})
    plan = plan_of(write(tmp_path, method, "tuned"))
    check_heads(plan)
    if method is LEARNED:
        torch.testing.assert_close(*logits(tuned, plan), rtol=0, atol=0)
    else:
        written = owner == "base" and not flag
        assert ("lm_head.weight" in ours(write(tmp_path, method, "tuned"))) == written


def test_a_tied_head_that_is_written_out_stays_tied(tmp_path: Path) -> None:
    tied(tmp_path)
    random = {"merge_method": "dare_linear", "parameters": {"density": 0.5}, "exclude": ["lm_head"]}
    expected = ours(write(tmp_path, random, "tuned"))
    for folder in (tmp_path / "base", tmp_path / "tuned"):
        embedding = safetensors.torch.load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        rename(folder, str, **{"lm_head.weight": embedding.clone()})
    path = write(tmp_path, random, "tuned")
    plan, found = plan_of(path), read(combine(plan_of(path), tmp_path / "out"))
    check_heads(plan)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert any(owner == "base" and "lm_head.weight" in note for owner, note in plan.notes)


def test_a_head_that_is_not_tied_is_merged_although_it_equals_the_embedding(tmp_path: Path) -> None:
    base = tiny.make_model()
    base.lm_head.load_state_dict(base.model.embed_tokens.state_dict())
    base.save_pretrained(tmp_path / "base")
    tuned = tiny.make_expert(base, 1)
    torch.nn.init.normal_(tuned.lm_head.weight)
    tuned.save_pretrained(tmp_path / "tuned")
    merged = ours(write(tmp_path, ARITHMETIC, "tuned"))
    torch.testing.assert_close(merged["lm_head.weight"], torch.lerp(base.lm_head.weight, tuned.lm_head.weight, 0.5))


@methods
def test_a_head_that_is_not_the_embedding_needs_a_base_with_a_head(tmp_path: Path, method: dict[str, Any]) -> None:
    _, tuned = tied(tmp_path)
    head = torch.randn(tiny.VOCAB, tiny.COMMON["hidden_size"])
    rename(tmp_path / "tuned", str, **{"lm_head.weight": head})
    plan = plan_of(write(tmp_path, method, "tuned"))
    with refused(CheckpointError, where="tuned", do="`base_model`", facts=["'lm_head.weight'"]) as caught:
        check_heads(plan)
    # The advice, taken.
    command = re.search(r'python -c "(.+)"', caught.value.do)
    assert command is not None
    exec(command[1], {})
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "base-untied").rename(tmp_path / "base")
    plan = plan_of(write(tmp_path, method, "tuned"))
    check_heads(plan)
    assert not plan.experts[0].match.ignored and not plan.experts[0].match.renamed
    tuned.lm_head.weight = torch.nn.Parameter(head)
    if method is LEARNED:
        torch.testing.assert_close(*logits(tuned, plan), rtol=0, atol=0)


def test_an_expert_that_would_change_nothing_is_refused(tmp_path: Path) -> None:
    base = tiny.make_model()
    base.save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "tuned")
    rename(tmp_path / "tuned", lambda name: f"student.{name}")
    with refused(CheckpointError, where="tuned", do="names", facts=["'student."]):
        plan_of(write(tmp_path, ARITHMETIC, "tuned"))
    with refused(CheckpointError, where="tuned", facts=["'student."]) as caught:
        plan_of(write(tmp_path, ARITHMETIC, "tuned", on_missing="base"))
    assert "on_missing" not in caught.value.do


@methods
def test_an_expert_s_rope_is_said_and_can_be_taken(tmp_path: Path, method: dict[str, Any]) -> None:
    base = tiny.make_model()
    tuned = tiny.make_expert(base, 1)
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
    tuned.config.rope_parameters = rope
    tuned.config.max_position_embeddings = 512
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    notes = plan_of(write(tmp_path, method, "tuned")).notes
    assert {(owner, note.split()[0]) for owner, note in notes} == {
        ("tuned", "max_position_embeddings"),
        ("tuned", "rope"),
    }
    assert all("config_source: tuned" in note and "1" in note for _, note in notes)
    plan = plan_of(write(tmp_path, method, "tuned", config_source="tuned"))
    assert plan.notes == [] and plan.base_header.config["rope_parameters"] == rope
    config = load_base_config(plan)
    assert (config.rope_parameters["rope_theta"], config.max_position_embeddings) == (1e6, 512)
    if method is LEARNED:
        student = Student(plan, torch.device("cpu")).model
        assert student.config.rope_parameters["rope_type"] == "yarn"
        given, wanted = (
            student.model.rotary_emb,
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").model.rotary_emb,
        )
        torch.testing.assert_close(given.inv_freq, wanted.inv_freq)
        # Nothing is left that the expert computes differently, so its targets need no logits.
        assert FrozenExpert(plan, 0, torch.device("cpu"))._base_gives_logits


@pytest.mark.parametrize("source", ["other", "adapter"])
def test_a_config_source_is_a_full_expert(tmp_path: Path, source: str) -> None:
    base = tiny.make_model()
    base.save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "tuned")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with refused(ConfigError, where="config_source", facts=[repr(source), "tuned"]):
        plan_of(write(tmp_path, ARITHMETIC, "tuned", "adapter", config_source=source))


def resized(model: Any, rows: int) -> Any:
    """Return the model with another number of rows in embedding and head; new rows are random."""
    torch.manual_seed(3)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.mark.parametrize("rows", [tiny.VOCAB - 4, tiny.VOCAB + 8])
def test_a_learned_merge_takes_experts_with_more_or_fewer_rows(tmp_path: Path, rows: int) -> None:
    base = tiny.make_model()
    tuned = resized(tiny.make_expert(base, 1), rows)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    tiny.save_tokenizer(tmp_path / "base")
    tiny.save_tokenizer(tmp_path / "tuned")
    with refused(CheckpointError, where="tuned", do="tokenizer_source: base", facts=[f"{rows} tokens"]):
        plan_of(write(tmp_path, LEARNED, "tuned"))
    plan = plan_of(write(tmp_path, LEARNED, "tuned", tokenizer_source="base"))
    check_models(plan)
    wanted, given = logits(tuned, plan)
    both = min(rows, tiny.VOCAB)
    assert given.shape[-1] == tiny.VOCAB
    torch.testing.assert_close(given[..., :both], wanted[..., :both])


def test_a_text_expert_may_lack_the_tokens_of_images(tmp_path: Path) -> None:
    base = tiny_images.make_model("llava_onevision")
    tiny_images.save(base, tmp_path / "base", "llava_onevision")
    tuned = resized(text_of(base, "llava_onevision"), tiny_images.VOCAB - 8)
    tuned.save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned" / "tokenizer.json").write_text((tmp_path / "base" / "tokenizer.json").read_text())
    plan = plan_of(write(tmp_path, LEARNED, "tuned"))
    check_models(plan)
    wanted, given = logits(tuned, plan)
    torch.testing.assert_close(given[..., : tiny_images.VOCAB - 8], wanted, rtol=1e-5, atol=1e-5)
    assert ours(write(tmp_path, ARITHMETIC, "tuned"))["language_model.model.embed_tokens.weight"].shape == (
        tiny_images.VOCAB,
        tiny_images.HIDDEN,
    )


@methods
def test_with_on_missing_an_expert_may_lack_tensors_and_have_others(tmp_path: Path, method: dict[str, Any]) -> None:
    base = tiny.make_model()
    tuned = tiny.make_expert(base, 1)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    name, file = "model.layers.0.mlp.up_proj.weight", tmp_path / "tuned" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors[name]
    safetensors.torch.save_file(tensors | {"v_head.summary.weight": torch.ones(1, 32)}, file)
    with refused(CheckpointError, where="tuned", do="on_missing: base", facts=[repr(name), "'v_head.summary.weight'"]):
        plan_of(write(tmp_path, method, "tuned"))
    plan = plan_of(write(tmp_path, method, "tuned", on_missing="base"))
    match = plan.experts[0].match
    assert (match.absent, match.ignored) == ({name}, ("v_head.summary.weight",))
    assert len(plan.notes) == 2
    if method is LEARNED:
        check_models(plan)
        tuned.load_state_dict({name: base.state_dict()[name]}, strict=False)
        torch.testing.assert_close(*logits(tuned, plan), rtol=0, atol=0)


def test_float_buffers_of_the_architecture_are_the_base_s(tmp_path: Path) -> None:
    keys = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24}
    keys |= {"first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 8}
    config = transformers.Glm4MoeConfig(**(tiny.COMMON | keys))
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tuned = tiny.make_expert(base, 1)
    buffer = "model.layers.1.mlp.gate.e_score_correction_bias"
    tuned.get_buffer(buffer).copy_(torch.arange(4))
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    for method in (LEARNED, ARITHMETIC):
        plan = plan_of(write(tmp_path, method, "tuned", exclude=[]))
        assert buffer in plan.base_header.tensors and buffer not in plan.merged
    assert torch.equal(ours(write(tmp_path, ARITHMETIC, "tuned"))[buffer], base.get_buffer(buffer))
    # The expert itself runs with its own.
    torch.testing.assert_close(*logits(tuned, plan_of(write(tmp_path, LEARNED, "tuned"))), rtol=0, atol=0)
