"""Checkpoints as they are found: tied heads, old buffers, missing and added tensors, other vocabularies and types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import plan_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from weight_space import VOCABULARY, entries, noise, ours, write_arrays, write_config

from engine.errors import CheckpointError, ConfigError, MergeError
from engine.methods import registry

EMBEDDING, HEAD, HIGH = "embed_tokens.weight", "lm_head.weight", "layers.0.high.weight"
WEIGHTS = entries({"weight": 0.5}, {"weight": 0.25})


def edit(folder: Path, config: dict[str, Any] | None = None, **changes: Tensor | None) -> None:
    """Change tensors of a model folder (None: remove), and its config.json."""
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
def house(tmp_path: Path) -> Path:
    write_arrays(tmp_path, experts=2)
    return tmp_path


def arithmetic(house: Path, **keys: Any) -> Path:
    return write_config(house, merge_method="task_arithmetic", base_model="base", models=WEIGHTS, **keys)


def expected(house: Path, name: str, experts: tuple[Tensor, ...] = ()) -> Tensor:
    base = load_file(house / "base" / "model.safetensors")[name].float()
    found = experts or tuple(load_file(house / f"expert{k}" / "model.safetensors")[name].float() for k in range(2))
    return base + sum(w * (one - base) for w, one in zip((0.5, 0.25), found, strict=True))


def test_every_model_may_have_a_type_of_its_own(tmp_path: Path) -> None:
    write_arrays(tmp_path, experts=2, dtypes=(torch.bfloat16, torch.float16, torch.float32))
    found = ours(arithmetic(tmp_path, out_dtype="float32"))
    assert all(torch.allclose(tensor, expected(tmp_path, name), atol=1e-6) for name, tensor in found.items())
    assert {tensor.dtype for tensor in ours(arithmetic(tmp_path)).values()} == {torch.bfloat16}


def test_a_head_that_only_the_base_has_is_the_experts_embedding(house: Path) -> None:
    edit(house / "expert1", **{HEAD: None})
    experts = load_file(house / "expert0" / "model.safetensors"), load_file(house / "expert1" / "model.safetensors")
    found = ours(arithmetic(house))[HEAD]
    torch.testing.assert_close(found, expected(house, HEAD, (experts[0][HEAD], experts[1][EMBEDDING])))
    edit(house / "expert1", {"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=rf"lacks 1 of the base's tensors \(first: '{HEAD}'\)"):
        plan_of(arithmetic(house))


def test_a_head_that_only_an_expert_has_is_left_out_unless_it_is_its_own(house: Path) -> None:
    for model in ("base", "expert0"):
        edit(house / model, **{HEAD: None})
    plan = plan_of(arithmetic(house))
    assert plan.experts[1].match.ignored == (HEAD,) and HEAD not in plan.merged
    edit(house / "expert1", {"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=rf"has 1 that the base does not have \(first: '{HEAD}'\)"):
        plan_of(arithmetic(house))


@pytest.mark.parametrize("name", ["layers.0.rotary_emb.inv_freq", "h.0.attn.masked_bias", "embed.position_ids"])
@pytest.mark.parametrize("owner", ["base", "expert0"])
def test_buffers_of_older_versions_may_be_missing_and_may_be_there(house: Path, name: str, owner: str) -> None:
    buffer = torch.arange(4)
    edit(house / owner, **{name: buffer})
    found = ours(arithmetic(house))
    assert (name in found) == (owner == "base")
    if owner == "base":
        assert torch.equal(found[name], buffer)


@pytest.mark.parametrize("learned", [False, True])
def test_a_missing_or_an_added_tensor_is_named_or_the_base_stands_for_it(house: Path, learned: bool) -> None:
    edit(house / "expert1", **{HIGH: None, "adapter.weight": torch.ones(3)})
    with pytest.raises(CheckpointError) as caught:
        plan_of(arithmetic(house))
    message = str(caught.value)
    assert all(part in message for part in (HIGH, "'adapter.weight'", "expert1", "on_missing: base"))
    found = ours(arithmetic(house, on_missing="base"))
    base = load_file(house / "base" / "model.safetensors")[HIGH]
    one = load_file(house / "expert0" / "model.safetensors")[HIGH]
    torch.testing.assert_close(found[HIGH], base + 0.5 * (one - base))
    assert "adapter.weight" not in found
    linear = write_config(house, merge_method="linear", base_model="base", models=WEIGHTS, on_missing="base")
    torch.testing.assert_close(ours(linear)[HIGH], (0.5 * one + 0.25 * base) / 0.75)


@pytest.mark.parametrize("rows", [VOCABULARY + 3, VOCABULARY - 2])
def test_another_vocabulary_is_refused_with_both_sizes_and_cut_or_filled_when_asked(house: Path, rows: int) -> None:
    tokens = [f"t{i}" for i in range(VOCABULARY + 3)]
    own = {name: noise((rows, 7), seed) for seed, name in enumerate((EMBEDDING, HEAD))}
    edit(house / "expert0", {"vocab_size": rows}, **own)
    with pytest.raises(CheckpointError) as caught:
        plan_of(arithmetic(house))
    message = str(caught.value)
    assert f"has {rows} tokens" in message and f"base's {VOCABULARY}" in message and "tokenizer_source: base" in message
    asked = {"tokenizer_source": "base"}
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        plan_of(arithmetic(house, **asked))
    vocabulary(house / "base", tokens[:VOCABULARY])
    vocabulary(house / "expert0", tokens[:rows])
    vocabulary(house / "expert1", tokens[:VOCABULARY])
    found, base = ours(arithmetic(house, **asked)), load_file(house / "base" / "model.safetensors")
    other = load_file(house / "expert1" / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        shared = torch.cat([own[name][:VOCABULARY], base[name][rows:]])
        torch.testing.assert_close(found[name], expected(house, name, (shared, other[name])))
    vocabulary(house / "expert0", tokens[:2][::-1] + tokens[2:rows])
    with pytest.raises(CheckpointError, match=r"its token 't.' has the number"):
        plan_of(arithmetic(house, **asked))


def test_numbers_that_are_no_floats_are_kept_and_have_to_agree(house: Path) -> None:
    for k, model in enumerate(("base", "expert0", "expert1")):
        edit(house / model, counts=torch.tensor([3, 2**40 + (k == 2)]), flags=torch.tensor([True, False]))
    with pytest.raises(CheckpointError, match=r"expert 'expert1': 'counts' is no float, and differs"):
        ours(arithmetic(house))
    edit(house / "expert1", counts=torch.tensor([3, 2**40]))
    found = ours(arithmetic(house))
    assert found["counts"].tolist() == [3, 2**40] and found["flags"].tolist() == [True, False]
    edit(house / "expert1", counts=torch.tensor([3.0, 4.0]))
    with pytest.raises(CheckpointError, match="'counts' is F32"):
        plan_of(arithmetic(house))


def test_a_weight_that_is_not_finite_is_named(house: Path) -> None:
    edit(house / "expert1", **{HIGH: torch.full((17, 11), torch.inf)})
    with pytest.raises(MergeError, match=f"{HIGH}: the merged tensor has a weight that is NaN or infinite"):
        ours(arithmetic(house))


def test_what_exclude_names_stays_the_bases(house: Path) -> None:
    found = ours(arithmetic(house, exclude=[r".*high.*"]))
    assert torch.equal(found[HIGH], load_file(house / "base" / "model.safetensors")[HIGH])
    assert not torch.equal(found[EMBEDDING], load_file(house / "base" / "model.safetensors")[EMBEDDING])


def test_the_tokenizer_may_be_one_of_the_models(house: Path) -> None:
    for model in ("base", "expert1"):
        vocabulary(house / model, [f"t{i}" for i in range(VOCABULARY)])
    plan = plan_of(arithmetic(house, tokenizer_source="expert1"))
    assert plan.tokenizer == str(house / "expert1")
    assert plan_of(arithmetic(house, tokenizer_source="base")).tokenizer is None


@pytest.mark.parametrize("rows", [VOCABULARY + 2, VOCABULARY - 3])
def test_the_output_may_have_the_tokens_of_a_model(house: Path, rows: int) -> None:
    tokens = [f"t{i}" for i in range(VOCABULARY + 2)]
    own = {name: noise((rows, 7), seed) for seed, name in enumerate((EMBEDDING, HEAD))}
    edit(house / "expert1", {"vocab_size": rows}, **own)
    for model, count in (("base", VOCABULARY), ("expert0", VOCABULARY), ("expert1", rows)):
        vocabulary(house / model, tokens[:count])
    config = arithmetic(house, tokenizer_source="expert1")
    plan, found = plan_of(config), ours(config)
    assert plan.base_header.vocab_size == rows and plan.tokenizer == str(house / "expert1")
    base, other = (load_file(house / name / "model.safetensors") for name in ("base", "expert0"))
    for name in (EMBEDDING, HEAD):
        shared = min(rows, VOCABULARY)
        old, one, two = base[name][:shared], other[name][:shared], own[name][:shared]
        torch.testing.assert_close(found[name][:shared], old + 0.5 * (one - old) + 0.25 * (two - old))
        # No other model has these tokens, so nothing is between them and the one that has.
        torch.testing.assert_close(found[name][shared:], own[name][shared:])
    vocabulary(house / "base", [*tokens[: VOCABULARY - 5], "other", *tokens[VOCABULARY - 4 : VOCABULARY]])
    with pytest.raises(CheckpointError, match=r"the base .*: its token 'other' has the number"):
        plan_of(config)


def test_without_mergekit_its_methods_say_what_to_install(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "has_mergekit", lambda: False)
    with pytest.raises(
        ConfigError, match=r"'slerp' is mergekit's, which is not installed\n.*pip install \"\.\[mergekit\]\""
    ):
        plan_of(write_config(house, merge_method="slerp", base_model="base", models=WEIGHTS))
    assert plan_of(arithmetic(house)).merged


def test_layer_stacking_is_refused_by_name(house: Path) -> None:
    def stacked(*ranges: list[int]) -> Path:
        slices = [{"sources": [{"model": "expert0", "layer_range": layers}]} for layers in ranges]
        return write_config(house, merge_method="task_arithmetic", base_model="base", slices=slices)

    for ranges in ([[0, 2], [1, 2]], [[1, 2]], [[0, 9]]):
        with pytest.raises(ConfigError, match="layer-stacking slices"):
            plan_of(stacked(*ranges))
