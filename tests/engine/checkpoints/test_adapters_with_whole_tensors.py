"""Adapters as trainers save them: with whole tensors beside the factors, other names, tied embeddings, and no LoRA.

What is accepted equals peft's model; what is refused names a command, which these tests run.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import tiny_images
import torch
import transformers
import yaml
from conftest import plan_of
from errors import refused
from peft_adapters import IDS, Built, assert_equals_peft, build, gpt2
from safetensors.torch import load_file, save_file
from thorough import as_thorough, thorough_but
from torch import Tensor
from weight_space import combine, write_config

from engine.checkpoints.adapter_copies import is_copy
from engine.checkpoints.adapter_file import CONFIG, PREFIX, WEIGHTS
from engine.checkpoints.adapters import read_adapter_header
from engine.checkpoints.headers import read_file_header, read_model_header
from engine.checkpoints.tensors import Checkpoint
from engine.errors import CheckpointError
from engine.learning.frozen_expert import FrozenExpert
from engine.task_vectors.experts import AdapterExpert

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ = {"r": 4, "target_modules": ["q_proj"]}


def run(command: str) -> None:
    """Run the Python of a command `… python -c "CODE"` that a message names, in this process."""
    found = re.search(r'python -c "([^"]+)"', command)
    assert found is not None, command
    with warnings.catch_warnings():
        # Of peft and transformers about each other.
        warnings.simplefilter("ignore")
        exec(found[1], {})


def write(folder: Path, method: str) -> Path:
    """Write a config that merges the folder's adapter into its base, and return its path."""
    tiny.write_calibration(folder / "c.jsonl", 2, seed=0)
    models = [{"model": "adapter", "calibration": "c.jsonl"} if method == "expert_merging" else {"model": "adapter"}]
    config = {"merge_method": method, "base_model": "base", "models": models}
    (folder / "merge.yaml").write_text(yaml.safe_dump(config))
    return folder / "merge.yaml"


def logits_of(built: Built) -> Tensor:
    """Return the logits of the base with the engine's task vectors."""
    header, model = built.header(), transformers.AutoModelForCausalLM.from_pretrained(built.base)
    expert = AdapterExpert(Checkpoint(built.adapter, header.tensors), header.pairs, header.whole)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            task_vector, base_N, out_N = expert.task_vector(name), parameter.view(-1), torch.empty(parameter.numel())
            if task_vector is not None:
                task_vector.block(0, len(base_N), base_N, out_N)
                base_N.add_(out_N)
        logits: Tensor = model(torch.tensor([IDS])).logits
    return logits


def told(value: Any) -> str:
    """Return the id of a case, which is the same in every process."""
    if callable(value):
        return str(value.__name__)
    return ",".join(sorted(value)) if isinstance(value, set) else str(value)


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        (Q_PROJ | {"modules_to_save": ["embed_tokens", "lm_head"]}, {EMBEDDING, HEAD}),
        ({"r": 4, "target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}, {EMBEDDING}),
        (Q_PROJ | {"modules_to_save": ["model.norm"]}, {"model.norm.weight"}),
        (
            Q_PROJ | {"modules_to_save": ["0.mlp"]},
            {f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
        ),
    ],
    ids=told,
)
def test_whole_modules_equal_peft(tmp_path: Path, options: dict[str, Any], whole: set[str]) -> None:
    built = build(tmp_path, tiny.make_model(), **options)
    assert built.header().whole.keys() == whole
    assert_equals_peft(built, 3 + ("lm_head" in options["target_modules"]))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_equal_peft(tmp_path: Path, bias: str) -> None:
    built = build(tmp_path, tiny.make_model("qwen2"), r=4, target_modules=["q_proj"], bias=bias)
    assert len(built.header().whole) == (9 if bias == "all" else 3)
    assert_equals_peft(built, 3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_the_base_count_as_unchanged(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    built = build(tmp_path, tiny.make_model(tied=tied), dtype, {"save_embedding_layers": True}, **Q_PROJ)
    assert f"{PREFIX}{HEAD}" in load_file(built.adapter / WEIGHTS)
    assert built.header().whole == {}
    assert_equals_peft(built, 3)


def test_a_base_layer_is_compared_by_value(tmp_path: Path) -> None:
    """The rows of new tokens are often initialised before LoRA is added to the embedding."""

    def new_rows(adapted: Any) -> None:
        adapted.get_input_embeddings().base_layer.weight[60:] = 0.5

    built = build(tmp_path, tiny.make_model(), r=4, target_modules=["q_proj", "embed_tokens"], change=new_rows)
    assert built.header().whole.keys() == {EMBEDDING}
    assert_equals_peft(built, 4)


def renamed(built: Built, change: Callable[[str], str]) -> None:
    tensors = load_file(built.adapter / WEIGHTS)
    save_file({change(name): tensor for name, tensor in tensors.items()}, built.adapter / WEIGHTS)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: re.sub(r"(lora_\w+|modules_to_save)", r"\1.mine", name),
        lambda name: re.sub(r"(layers\.\d)", r"\1._orig_mod._checkpoint_wrapped_module", f"_orig_mod.{name}"),
        lambda name: name.replace("modules_to_save.", ""),
        lambda name: name.replace("norm.modules_to_save.", "norm."),
    ],
)
def test_names_of_a_state_dict_that_peft_did_not_write(tmp_path: Path, change: Callable[[str], str]) -> None:
    options = {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["model.norm"]}
    built = build(tmp_path, tiny.make_model(), **options)
    renamed(built, lambda name: change(name.replace("model.norm.", "model.norm.modules_to_save.")))
    assert built.header().whole.keys() == {"model.norm.weight"}
    assert_equals_peft(built, 4)


def test_a_file_of_two_adapters_is_refused(tmp_path: Path) -> None:
    built, config = build(tmp_path, tiny.make_model(), **Q_PROJ), peft.LoraConfig(**Q_PROJ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(tiny.make_model(), config, "one")
        adapted.add_adapter("two", config)
    both = {name: tensor for name, tensor in adapted.state_dict().items() if "lora_" in name}
    save_file(both, built.adapter / WEIGHTS)
    with refused(CheckpointError, WEIGHTS, do='selected_adapters=["NAME"]', facts=[".two."]):
        built.header()
    adapted.save_pretrained(tmp_path / "saved", selected_adapters=["two"])
    assert len(read_adapter_header(tmp_path / "saved" / "two", read_model_header(built.base)).pairs) == 3


def test_a_module_that_was_to_be_saved_but_is_not_there_is_refused(tmp_path: Path) -> None:
    built = build(tmp_path, tiny.make_model(), **Q_PROJ)
    config = json.loads((built.adapter / CONFIG).read_text()) | {"modules_to_save": ["lm_head"]}
    (built.adapter / CONFIG).write_text(json.dumps(config))
    with refused(CheckpointError, WEIGHTS, do=CONFIG, facts=["'lm_head'"]):
        built.header()


def test_a_whole_tensor_of_another_kind_is_refused(tmp_path: Path) -> None:
    built = build(tmp_path, tiny.make_model(), **Q_PROJ, modules_to_save=["lm_head"])
    tensors = load_file(built.adapter / WEIGHTS)
    save_file(tensors | {f"{PREFIX}{HEAD}": tensors[f"{PREFIX}{HEAD}"].int()}, built.adapter / WEIGHTS)
    with refused(CheckpointError, WEIGHTS, facts=["I32", HEAD]):
        built.header()


ENSURE = {"ensure_weight_tying": True}
BOTH = ["embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    "options",
    [
        Q_PROJ,
        Q_PROJ | ENSURE | {"modules_to_save": BOTH},
        Q_PROJ | ENSURE | {"modules_to_save": ["embed_tokens"]},
        ENSURE | {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=told,
)
def test_a_tied_base_takes_equal_changes_of_embedding_and_head(tmp_path: Path, options: dict[str, Any]) -> None:
    built = build(tmp_path, tiny.make_model(tied=True), lora_alpha=8, **options)
    torch.testing.assert_close(logits_of(built), built.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny.make_model, Q_PROJ | {"modules_to_save": BOTH}),
        (tiny.make_model, Q_PROJ | {"modules_to_save": ["embed_tokens"]}),
        (tiny.make_model, Q_PROJ | {"modules_to_save": ["lm_head"]}),
        (tiny.make_model, {"r": 4, "target_modules": ["q_proj", "lm_head"]}),
        (tiny.make_model, {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}),
        (tiny.make_model, {"r": 4, "target_modules": ["q_proj", *BOTH]}),
        (gpt2, {"r": 4, "target_modules": ["c_attn", "lm_head"]}),
        (gpt2, {"r": 4, "target_modules": ["c_attn", "wte"]}),
    ],
    ids=told,
)
def test_other_changes_need_a_base_that_is_not_tied(
    tmp_path: Path, make: Callable[..., Any], options: dict[str, Any]
) -> None:
    built = build(tmp_path, make(tied=True), **options)
    with refused(CheckpointError, str(built.adapter), do="`base_model`") as caught:
        built.header()
    run(caught.value.do)
    untied = Built(
        tmp_path / "base-untied", *(getattr(built, f) for f in ("adapter", "base_tensors", "merged_tensors", "logits"))
    )
    torch.testing.assert_close(logits_of(untied), built.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "dtypes", [(a, b) for a in ("float32", "bfloat16", "float16") for b in ("float32", "bfloat16", "float16")]
)
def test_a_copy_may_have_another_dtype(tmp_path: Path, dtypes: tuple[str, str]) -> None:
    base_dtype, copy_dtype = (getattr(torch, name) for name in dtypes)
    torch.manual_seed(0)
    base = torch.randn(7, 5).to(base_dtype)
    other = base.to(copy_dtype, copy=True)
    other[6, 4] += 0.5
    save_file({"x": torch.ones(3), "base": base}, tmp_path / "base.safetensors")
    save_file({"copy": base.to(copy_dtype), "other": other}, tmp_path / "copy.safetensors")
    of = read_file_header(tmp_path / "base.safetensors")["base"]
    copies = read_file_header(tmp_path / "copy.safetensors")
    assert is_copy(tmp_path, copies["copy"], tmp_path, of)
    assert not is_copy(tmp_path, copies["other"], tmp_path, of)


@pytest.mark.parametrize("family", thorough_but(["internvl", "qwen3_vl"], tiny_images.FAMILIES))
def test_an_adapter_of_the_text_model_fits_a_multimodal_base(tmp_path: Path, family: str) -> None:
    model = tiny_images.make_model(family)
    tiny_images.save(model, tmp_path / "base", family)
    built = build(tmp_path / "text", model, r=4, target_modules=r".*language_model.*(q_proj|down_proj)")
    expected = read_adapter_header(built.adapter, read_model_header(tmp_path / "base"))
    renamed(
        built, lambda name: re.sub(r"model\.(model\.)?language_model\.(model\.)?layers", "model.model.layers", name)
    )
    assert all(name.startswith("base_model.model.model.layers.") for name in load_file(built.adapter / WEIGHTS))
    assert (
        read_adapter_header(built.adapter, read_model_header(tmp_path / "base")).pairs.keys() == expected.pairs.keys()
    )


@pytest.mark.parametrize("published", [False, True], ids=["of the module", "as published"])
@pytest.mark.parametrize("family", ["gemma3", as_thorough("llava_onevision")])
def test_an_adapter_may_change_a_vision_tower_by_either_name(tmp_path: Path, family: str, published: bool) -> None:
    model = tiny_images.make_model(family)
    built = build(tmp_path, model, r=4, target_modules=["q_proj", "fc1"])
    tiny_images.save(model, tmp_path / "base", family)
    if published:
        renamed(built, lambda name: name.replace("vision_tower.encoder", "vision_tower.vision_model.encoder"))
    keys = {"merge_method": "task_arithmetic", "base_model": "base"}
    path = write_config(tmp_path, **keys, models=[{"model": "adapter", "parameters": {"weight": 1.0}}])
    out = combine(plan_of(path), tmp_path / "out")
    shutil.copy(tmp_path / "base" / "config.json", out)
    merged = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).state_dict()
    towers = [name for name in built.merged_tensors if name.endswith("fc1.weight")]
    assert towers and not torch.equal(merged[towers[0]], model.state_dict()[towers[0]])
    for name, tensor in built.merged_tensors.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(**Q_PROJ, use_dora=True),
        peft.LoraConfig(**Q_PROJ, init_lora_weights="pissa"),
        peft.LoraConfig(**Q_PROJ, init_lora_weights="olora"),
        peft.LoraConfig(**Q_PROJ, trainable_token_indices=[5, 6]),
        peft.LoHaConfig(r=4, target_modules=["q_proj"]),
        peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=lambda config: str(config.peft_type),
)
def test_what_is_refused_merges_with_the_command_of_the_message(tmp_path: Path, config: peft.PeftConfig) -> None:
    built = build(tmp_path, tiny.make_model(), config=config)
    with refused(CheckpointError, CONFIG, do="merge_and_unload") as caught:
        built.header()
    run(caught.value.do)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter-merged")
    torch.testing.assert_close(merged(torch.tensor([IDS])).logits, built.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("own", ["the multimodal model", "its text model"])
def test_an_adapter_for_a_multimodal_base_merges_with_the_command_of_the_message(tmp_path: Path, own: str) -> None:
    model = tiny_images.make_model("llava_onevision")
    tiny_images.save(model, tmp_path / "base", "llava_onevision")
    trained_on = model
    if own == "its text model":
        trained_on = transformers.Qwen2ForCausalLM(model.config.text_config).float()
        trained_on.model.load_state_dict(model.model.language_model.state_dict())
        trained_on.lm_head.load_state_dict(model.lm_head.state_dict())
    dora = peft.LoraConfig(r=4, target_modules=r".*layers.*q_proj", use_dora=True)
    built = build(tmp_path / "of", trained_on, config=dora)
    config = json.loads((built.adapter / CONFIG).read_text()) | {"base_model_name_or_path": str(built.base)}
    (built.adapter / CONFIG).write_text(json.dumps(config))
    with refused(CheckpointError, CONFIG, do="merge_and_unload") as caught:
        read_adapter_header(built.adapter, read_model_header(tmp_path / "base"))
    run(caught.value.do)
    built.adapter.with_name("adapter-merged").rename(tmp_path / "adapter")
    kind = transformers.AutoModelForImageTextToText if trained_on is model else transformers.AutoModelForCausalLM
    merged = kind.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(merged(torch.tensor([IDS])).logits, built.logits, rtol=0, atol=1e-4)
    plan = plan_of(write(tmp_path, "task_arithmetic"))
    assert plan.experts[0].kind == "checkpoint"


def test_a_resized_embedding_merges_with_the_command_of_the_message(tmp_path: Path) -> None:
    base = tiny.make_model()
    tiny.save(base, tmp_path / "base")
    base.resize_token_embeddings(72, mean_resizing=False)
    built = build(tmp_path / "resized", base, save={"save_embedding_layers": True}, **Q_PROJ)
    tiny.save_tokenizer(built.adapter)
    with refused(CheckpointError, WEIGHTS, do="`tokenizer_source`", facts=["(72, 32)", "(64, 32)"]) as caught:
        read_adapter_header(built.adapter, read_model_header(tmp_path / "base"))
    run(caught.value.do)
    out = tmp_path / "resized" / "adapter-merged"
    merged = transformers.AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(merged(torch.tensor([IDS])).logits, built.logits, rtol=0, atol=1e-4)
    assert (out / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("make", "options", "kept"),
    [
        (tiny.make_model, Q_PROJ | {"modules_to_save": ["embed_tokens"]}, EMBEDDING),
        (tiny.make_model, Q_PROJ | {"modules_to_save": ["model.norm", "lm_head"]}, HEAD),
        (tiny.make_model, {"r": 4, "target_modules": ["lm_head"]}, HEAD),
        # Left out by its role: no default pattern has its name.
        (
            lambda: gpt2(tied=False),
            {"r": 4, "target_modules": ["c_attn"], "modules_to_save": ["wte"]},
            "transformer.wte.weight",
        ),
    ],
    ids=told,
)
def test_a_tensor_that_exclude_keeps_is_refused_with_another_exclude(
    tmp_path: Path, make: Callable[[], Any], options: dict[str, Any], kept: str
) -> None:
    build(tmp_path, make(), **options)
    config = write(tmp_path, "expert_merging")
    with refused(CheckpointError, str(tmp_path / "adapter"), do="exclude", facts=[repr(kept)]) as caught:
        plan_of(config)
    found = re.search("`exclude: (.+)`", caught.value.do)
    assert found is not None
    assert kept in plan_of(config, f"exclude={found[1]}").merged
    assert kept in plan_of(write(tmp_path, "task_arithmetic")).merged


def test_a_whole_embedding_is_merged_and_read_by_the_expert(tmp_path: Path) -> None:
    built = build(tmp_path, tiny.make_model(), **Q_PROJ, modules_to_save=["embed_tokens", "lm_head"])
    expert = FrozenExpert(plan_of(write(tmp_path, "expert_merging"), "exclude=[]"), 0, torch.device("cpu"))
    logits = expert.model(torch.tensor([IDS])).logits
    torch.testing.assert_close(logits, built.logits, rtol=0, atol=1e-4)
