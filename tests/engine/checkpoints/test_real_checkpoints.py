"""Differences between real checkpoints: tied heads, old buffers, missing and added tensors, vocabularies, dtypes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import plan_of
from errors import refused
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from weight_space import VOCABULARY, entries, noise, ours, write_arrays, write_config

from engine.errors import CheckpointError, ConfigError, MergeError
from engine.methods import registry
from engine.run.preparation import check_heads

EMBEDDING, HEAD, HIGH = "embed_tokens.weight", "lm_head.weight", "layers.0.high.weight"
WEIGHTS = entries({"weight": 0.5}, {"weight": 0.25})


def edit(folder: Path, config: dict[str, Any] | None = None, **changes: Tensor | None) -> None:
    """Replace tensors of a model folder (None: remove them), and keys of its config.json."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, file)
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))


def vocabulary(folder: Path, tokens: list[str]) -> None:
    Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0])).save(
        str(folder / "tokenizer.json")
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_arrays(tmp_path, experts=2)
    return tmp_path


def arithmetic(folder: Path, **keys: Any) -> Path:
    return write_config(folder, merge_method="task_arithmetic", base_model="base", models=WEIGHTS, **keys)


def expected(folder: Path, name: str, experts: tuple[Tensor, ...] = ()) -> Tensor:
    base = load_file(folder / "base" / "model.safetensors")[name].float()
    tensors = experts or tuple(load_file(folder / f"expert{k}" / "model.safetensors")[name].float() for k in range(2))
    return base + sum(weight * (tensor - base) for weight, tensor in zip((0.5, 0.25), tensors, strict=True))


def test_models_may_have_different_dtypes(tmp_path: Path) -> None:
    write_arrays(tmp_path, experts=2, dtypes=(torch.bfloat16, torch.float16, torch.float32))
    merged = ours(arithmetic(tmp_path, out_dtype="float32"))
    assert all(torch.allclose(tensor, expected(tmp_path, name), atol=1e-6) for name, tensor in merged.items())
    assert {tensor.dtype for tensor in ours(arithmetic(tmp_path)).values()} == {torch.bfloat16}


def test_an_expert_without_a_head_uses_its_embedding(folder: Path) -> None:
    edit(folder / "expert1", **{HEAD: None})
    experts = load_file(folder / "expert0" / "model.safetensors"), load_file(folder / "expert1" / "model.safetensors")
    merged = ours(arithmetic(folder))[HEAD]
    torch.testing.assert_close(merged, expected(folder, HEAD, (experts[0][HEAD], experts[1][EMBEDDING])))
    edit(folder / "expert1", {"tie_word_embeddings": False})
    with refused(CheckpointError, do="on_missing: base", facts=["expert1", "lacks 1", repr(HEAD)]):
        plan_of(arithmetic(folder))


def test_a_head_that_only_an_expert_has_is_ignored_if_it_is_tied(folder: Path) -> None:
    for model in ("base", "expert0"):
        edit(folder / model, **{HEAD: None})
    plan = plan_of(arithmetic(folder))
    assert plan.experts[1].match.ignored == (HEAD,) and HEAD not in plan.merged
    with refused(CheckpointError, where="expert1", do="'tie_word_embeddings', False", facts=[repr(HEAD)]):
        check_heads(plan)
    check_heads(plan_of(arithmetic(folder, on_missing="base")))
    edit(folder / "expert1", **{HEAD: load_file(folder / "expert1" / "model.safetensors")[EMBEDDING]})
    check_heads(plan_of(arithmetic(folder)))


@pytest.mark.parametrize("name", ["layers.0.rotary_emb.inv_freq", "h.0.attn.masked_bias", "embed.position_ids"])
@pytest.mark.parametrize("owner", ["base", "expert0"])
def test_buffers_of_older_versions_are_optional(folder: Path, name: str, owner: str) -> None:
    buffer = torch.arange(4)
    edit(folder / owner, **{name: buffer})
    merged = ours(arithmetic(folder))
    assert (name in merged) == (owner == "base")
    if owner == "base":
        assert torch.equal(merged[name], buffer)


@pytest.mark.parametrize("learned", [False, True])
def test_a_missing_or_added_tensor_is_refused_or_with_on_missing_replaced_by_the_base(
    folder: Path, learned: bool
) -> None:
    edit(folder / "expert1", **{HIGH: None, "adapter.weight": torch.ones(3)})
    with refused(CheckpointError, do="on_missing: base", facts=[HIGH, "'adapter.weight'", "expert1"]):
        plan_of(arithmetic(folder))
    merged = ours(arithmetic(folder, on_missing="base"))
    base = load_file(folder / "base" / "model.safetensors")[HIGH]
    expert0 = load_file(folder / "expert0" / "model.safetensors")[HIGH]
    torch.testing.assert_close(merged[HIGH], base + 0.5 * (expert0 - base))
    assert "adapter.weight" not in merged
    linear = write_config(folder, merge_method="linear", base_model="base", models=WEIGHTS, on_missing="base")
    torch.testing.assert_close(ours(linear)[HIGH], (0.5 * expert0 + 0.25 * base) / 0.75)


@pytest.mark.parametrize("rows", [VOCABULARY + 3, VOCABULARY - 2])
def test_another_vocabulary_is_refused_or_with_tokenizer_source_cut_or_filled(folder: Path, rows: int) -> None:
    tokens = [f"t{i}" for i in range(VOCABULARY + 3)]
    own = {name: noise((rows, 7), seed) for seed, name in enumerate((EMBEDDING, HEAD))}
    edit(folder / "expert0", {"vocab_size": rows}, **own)
    with refused(CheckpointError, do="tokenizer_source", facts=["expert0", f"{rows} tokens", str(VOCABULARY)]):
        plan_of(arithmetic(folder))
    source = {"tokenizer_source": "base"}
    with refused(CheckpointError, where=str(folder / "base"), facts=["tokenizer"]):
        plan_of(arithmetic(folder, **source))
    vocabulary(folder / "base", tokens[:VOCABULARY])
    vocabulary(folder / "expert0", tokens[:rows])
    vocabulary(folder / "expert1", tokens[:VOCABULARY])
    merged, base = ours(arithmetic(folder, **source)), load_file(folder / "base" / "model.safetensors")
    other = load_file(folder / "expert1" / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        shared = torch.cat([own[name][:VOCABULARY], base[name][rows:]])
        torch.testing.assert_close(merged[name], expected(folder, name, (shared, other[name])))
    vocabulary(folder / "expert0", tokens[:2][::-1] + tokens[2:rows])
    merged = ours(arithmetic(folder, **source))[HEAD]
    shared = torch.cat([own[HEAD][[1, 0]], own[HEAD][2:VOCABULARY], base[HEAD][rows:]])
    torch.testing.assert_close(merged, expected(folder, HEAD, (shared, other[HEAD])))


def test_integer_tensors_are_kept_and_must_agree(folder: Path) -> None:
    for k, model in enumerate(("base", "expert0", "expert1")):
        edit(folder / model, counts=torch.tensor([3, 2**40 + (k == 2)]), flags=torch.tensor([True, False]))
    with refused(CheckpointError, where="'expert1'", facts=["'counts'"]):
        ours(arithmetic(folder))
    edit(folder / "expert1", counts=torch.tensor([3, 2**40]))
    merged = ours(arithmetic(folder))
    assert merged["counts"].tolist() == [3, 2**40] and merged["flags"].tolist() == [True, False]
    edit(folder / "expert1", counts=torch.tensor([3.0, 4.0]))
    with refused(CheckpointError, facts=["'expert1'", "'counts'", "F32", "I64"]):
        plan_of(arithmetic(folder))


def test_a_weight_that_is_not_finite_is_named(folder: Path) -> None:
    edit(folder / "expert1", **{HIGH: torch.full((17, 11), torch.inf)})
    with refused(MergeError, where=HIGH, facts=["NaN"]):
        ours(arithmetic(folder))


def test_excluded_tensors_are_the_bases(folder: Path) -> None:
    merged = ours(arithmetic(folder, exclude=[r".*high.*"]))
    assert torch.equal(merged[HIGH], load_file(folder / "base" / "model.safetensors")[HIGH])
    assert not torch.equal(merged[EMBEDDING], load_file(folder / "base" / "model.safetensors")[EMBEDDING])


def test_tokenizer_source_may_name_a_model(folder: Path) -> None:
    for model in ("base", "expert1"):
        vocabulary(folder / model, [f"t{i}" for i in range(VOCABULARY)])
    plan = plan_of(arithmetic(folder, tokenizer_source="expert1"))
    assert plan.tokenizer == str(folder / "expert1")
    assert plan_of(arithmetic(folder, tokenizer_source="base")).tokenizer is None


@pytest.mark.parametrize("rows", [VOCABULARY + 2, VOCABULARY - 3])
def test_the_output_may_have_the_vocabulary_of_an_expert(folder: Path, rows: int) -> None:
    tokens = [f"t{i}" for i in range(VOCABULARY + 2)]
    own = {name: noise((rows, 7), seed) for seed, name in enumerate((EMBEDDING, HEAD))}
    edit(folder / "expert1", {"vocab_size": rows}, **own)
    for model, count in (("base", VOCABULARY), ("expert0", VOCABULARY), ("expert1", rows)):
        vocabulary(folder / model, tokens[:count])
    config = arithmetic(folder, tokenizer_source="expert1")
    plan, merged = plan_of(config), ours(config)
    assert plan.base_header.vocab_size == rows and plan.tokenizer == str(folder / "expert1")
    base, other = (load_file(folder / name / "model.safetensors") for name in ("base", "expert0"))
    for name in (EMBEDDING, HEAD):
        shared = min(rows, VOCABULARY)
        theta, first, second = base[name][:shared], other[name][:shared], own[name][:shared]
        torch.testing.assert_close(merged[name][:shared], theta + 0.5 * (first - theta) + 0.25 * (second - theta))
        # Rows of tokens that no other model has are the expert's, whatever its weight.
        torch.testing.assert_close(merged[name][shared:], own[name][shared:])
    # A token that the base lacks has the mean of the experts' rows there.
    vocabulary(folder / "base", [*tokens[: VOCABULARY - 5], "other", *tokens[VOCABULARY - 4 : VOCABULARY]])
    first, second = other[HEAD][VOCABULARY - 5], own[HEAD][VOCABULARY - 5]
    theta = (first + second) / 2
    merged = ours(arithmetic(folder, tokenizer_source="expert1"))
    torch.testing.assert_close(merged[HEAD][VOCABULARY - 5], theta + 0.5 * (first - theta) + 0.25 * (second - theta))


def test_without_mergekit_its_methods_are_refused_with_the_command_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "has_mergekit", lambda: False)
    with refused(ConfigError, do='pip install ".[mergekit]"', facts=["'nuslerp'"]):
        plan_of(write_config(folder, merge_method="nuslerp", base_model="base", models=WEIGHTS))
    assert plan_of(arithmetic(folder)).merged


def test_a_slice_of_layers_that_the_model_lacks_is_refused(folder: Path) -> None:
    slices = [{"sources": [{"model": "expert0", "layer_range": layers}]} for layers in ([0, 2], [1, 9])]
    with refused(ConfigError, where="slices.1.sources.0", facts=["8", "expert0"]):
        plan_of(write_config(folder, merge_method="task_arithmetic", base_model="base", slices=slices))
