"""Block by block: hidden states and inputs of linear layers have the bits of a whole forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_images
import torch
import transformers
from errors import refused
from image_inputs import CONTEXT, inputs_of
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from engine.errors import CheckpointError
from engine.models.blocks import BlockRun

pytestmark = pytest.mark.usefixtures("one_thread")

# With keys of the config besides `tiny.COMMON`: lists of masks by layer, Conv1D, blocks that return tuples, parallel
# attention, expert layers, a linear layer before the blocks, blocks that return several values.
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": tiny.HEAD,
    "gemma2": tiny.HEAD | {"sliding_window": 4},
    "gemma3_text": tiny.HEAD
    | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    | {"num_hidden_layers": 4},
    "gpt2": {},
    "gpt_neox": {},
    "phi": {},
    "bloom": {},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 48},
    "bamba": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "attn_layer_indices": [1],
    },
    "qwen3_moe": tiny.HEAD | tiny.MIXTURE | {"num_experts": 4, "moe_intermediate_size": 24},
}


def causal(family: str, **keys: Any) -> Any:
    config = transformers.AutoConfig.for_model(family, **(tiny.COMMON | CAUSAL.get(family, {}) | keys))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def sentences() -> list[dict[str, Any]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(3, tiny.VOCAB, (1, length))} for length in (9, 5, 12)]


def first_of(output: Any) -> Tensor:
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


def whole(model: Any, given: dict[str, Any], names: list[str]) -> dict[str, list[tuple[Tensor, Any]]]:
    """Return the input and the output of each call of these modules in one plain forward pass."""
    calls: dict[str, list[tuple[Tensor, Any]]] = {name: [] for name in names}

    def keep(name: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            calls[name].append((given.clone(), first_of(output).clone()))

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keep(name), with_kwargs=True) for name in names]
    with torch.no_grad():
        model(**given, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def check(model: Any, samples: list[dict[str, Any]]) -> BlockRun:
    """Compare a run of all parts with whole forward passes: outputs of blocks and inputs of linear layers."""
    run = BlockRun(model, samples)
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor | None]] = {}

    def observe(names: tuple[str, ...], x: Tensor) -> None:
        for name in names:
            inputs.setdefault(name, []).append(x.clone())

    linears: dict[str, Any] = {}
    for part in run.parts:
        run.step(part, run.linears(part), observe)
        linears |= run.linears(part)
        if part.block is not None:
            outputs[part.name] = [state.hidden for state in run.states]
    expected = [whole(model, given, [*linears, *outputs]) for given in samples]
    for name, states in outputs.items():
        for state, calls in zip(states, expected, strict=True):
            assert (state is None) == (not calls[name])
            # The model may change a hidden state after the block; the next block's input is compared below.
            assert state is None or state.shape == calls[name][0][1].shape
    for before, after in zip(run.parts, run.parts[1:], strict=False):
        if after.block is not None and before.block is not None:
            for state, calls in zip(outputs[before.name], expected, strict=True):
                assert state is None or torch.equal(state, calls[after.name][0][0]), after.name
    for state, calls in zip(outputs[run.parts[-1].name], expected, strict=True):
        assert state is not None and torch.equal(state, calls[run.parts[-1].name][0][1])
    for name, xs in inputs.items():
        wanted = [x for calls in expected for x, _ in calls[name]]
        assert len(xs) == len(wanted) and all(map(torch.equal, xs, wanted)), name
    return run


@pytest.mark.parametrize("family", CAUSAL)
def test_a_text_model_runs_block_by_block_with_the_bits_of_a_whole_pass(family: str) -> None:
    model = causal(family)
    run = check(model, sentences())
    assert len(run.parts) == model.config.num_hidden_layers


@pytest.mark.parametrize("family", [*tiny_images.FAMILIES, tiny_images.CHAT])
def test_towers_run_one_after_another_with_the_bits_of_a_whole_pass(tmp_path: Path, family: str) -> None:
    samples = [sample for of_expert in inputs_of(tiny_images.make_merge(tmp_path, family)) for sample in of_expert]
    if family != tiny_images.CHAT:
        samples.append({"input_ids": torch.arange(10, 17)[None]})
    model = tiny_images.make_model(family)
    if family == tiny_images.CHAT:
        model.img_context_token_id = tiny_images.tokens(family)[CONTEXT]
    run = check(model, samples)
    assert [part.block for part in run.parts] == [None, 0, 1, None, 0, 1, 2]


def test_linear_layers_with_one_input_are_observed_together() -> None:
    run = BlockRun(causal("llama"), sentences()[:1])
    seen: list[tuple[str, ...]] = []
    run.step(run.parts[0], run.linears(run.parts[0]), lambda names, _: seen.append(names))
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    assert seen == [
        tuple(f"{attention}{letter}_proj" for letter in "qkv"),
        (f"{attention}o_proj",),
        (f"{mlp}gate_proj", f"{mlp}up_proj"),
        (f"{mlp}down_proj",),
    ]


def test_the_transposed_layers_of_gpt2_are_linear_layers_and_heads_are_not() -> None:
    run = BlockRun(causal("gpt2"), [])
    assert {type(module) for module in run.linears(run.parts[0]).values()} == {Conv1D}
    names = [name for part in run.parts for name in run.linears(part)]
    assert names and not any("lm_head" in name for name in names)


def test_linear_layers_between_towers_are_observed_once(tmp_path: Path) -> None:
    samples = inputs_of(tiny_images.make_merge(tmp_path, "qwen3_vl"))[0]
    run = BlockRun(tiny_images.make_model("qwen3_vl"), samples)
    counts: dict[str, int] = {}

    def count(names: tuple[str, ...], _: Tensor) -> None:
        counts.update({name: counts.get(name, 0) + 1 for name in names})

    for part in run.parts:
        run.step(part, run.linears(part), count)
    assert set(counts.values()) == {len(samples)}
    assert {"model.visual.merger.linear_fc1", "model.visual.deepstack_merger_list.0.linear_fc2"} < counts.keys()


def test_weights_of_other_blocks_are_not_needed() -> None:
    model = causal("gemma3_text")
    given = sentences()
    expected = [whole(model, one, ["model.layers.3"])["model.layers.3"][0][1] for one in given]
    layers = [block.state_dict() for block in model.model.layers]
    model.model.layers.to("meta")
    run = BlockRun(model, given)
    for part, weights in zip(run.parts, layers, strict=True):
        block = model.get_submodule(part.name)
        block.load_state_dict(weights, assign=True)
        run.step(part)
        block.to("meta")
    for state, wanted in zip(run.states, expected, strict=True):
        assert state.hidden is not None and torch.equal(state.hidden, wanted)


def test_a_run_goes_on_from_states_that_were_kept_and_leaves_the_model_as_it_was() -> None:
    model = causal("bamba")
    before = {name: module.forward for name, module in model.named_modules()}
    run, other = BlockRun(model, sentences()), BlockRun(model, sentences())
    run.step(run.parts[0])
    other.states = list(run.states)
    for part in run.parts[1:]:
        run.step(part)
        other.step(part)
    assert all(
        one.hidden is not None and two.hidden is not None and torch.equal(one.hidden, two.hidden)
        for one, two in zip(run.states, other.states, strict=True)
    )
    assert before == {name: module.forward for name, module in model.named_modules()}


def test_a_block_that_changes_its_input_gets_the_same_one_again() -> None:
    model = causal("llama")
    run = BlockRun(model, sentences()[:1])
    run.step(run.parts[0])
    original = model.model.layers[1].forward

    def changing(hidden: Tensor, **given: Any) -> Any:
        output = original(hidden, **given)
        hidden.zero_()
        return output

    model.model.layers[1].forward = changing
    first, second = (run.forward(run.parts[1], 0).hidden for _ in range(2))
    assert first is not None and second is not None and torch.equal(first, second)


def test_a_model_without_blocks_and_one_that_repeats_a_block_are_refused() -> None:
    model = causal("llama")
    model.model.layers[1] = model.model.layers[0]
    run = BlockRun(model, sentences())
    with refused(CheckpointError, facts=["LlamaForCausalLM"]):
        run.step(run.parts[0])
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with refused(CheckpointError, facts=["LlamaForCausalLM"]):
        BlockRun(model, sentences())
