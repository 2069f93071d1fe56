"""Calibration of whole models, against a reference that runs whole models and solves in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from correction_helpers import Actors, loaded, make_models, result, samples_of, store_mean
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from engine.calibration.samples import Sample
from engine.correction.files import solved_file
from engine.correction.rules import Rule, featcal, regmean_plus_plus
from engine.planning.plan import Plan
from engine.storage.local_folder import LocalFolder

pytestmark = pytest.mark.usefixtures("one_thread")

FEATCAL = featcal({"alpha": 0.3, "rho": 2.0, "ridge": 0.05})
LENGTHS = (9, 12, 7)
Array = np.ndarray[Any, Any]


def base_of(family: str) -> Any:
    extra = tiny.HEAD | {"sliding_window": 4} if family == "gemma3_text" else {}
    config = transformers.AutoConfig.for_model(family, **(tiny.COMMON | extra | {"num_hidden_layers": 2}))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def made(folder: Path, family: str = "llama", experts: int = 2) -> tuple[Plan, LocalFolder, list[list[Sample]]]:
    plan = make_models(folder, base_of(family), experts)
    state = LocalFolder(folder / "state")
    store_mean(plan, state)
    return plan, state, samples_of(plan, LENGTHS, tiny.VOCAB)


def inputs_of(model: Any, samples: Sequence[Sample], names: Sequence[str]) -> dict[str, Array]:
    """Return the inputs [N, I] of modules in whole forward passes, float64."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args: seen[name].append(args[0].reshape(-1, args[0].shape[-1]).double())

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    with torch.no_grad():
        for sample in samples:
            model(input_ids=torch.tensor([sample.input_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(xs).numpy() for name, xs in seen.items()}


def parameters(model: Any, name: str) -> tuple[Array, Array | None]:
    module = model.get_submodule(name)
    weight = module.weight.detach().double().numpy()
    bias = getattr(module, "bias", None)
    return weight.T if isinstance(module, Conv1D) else weight, None if bias is None else bias.detach().double().numpy()


def reference(plan: Plan, samples: Sequence[Sequence[Sample]], merged: Any, rule: Rule, blocks: str) -> None:
    """Calibrate `merged` in place by the paper's equations, block by block, with whole passes of all models."""
    base, experts = loaded(Path(plan.base.model)), [loaded(Path(expert.model)) for expert in plan.experts]
    for number in range(2):
        inside = {
            name: module
            for name, module in merged.named_modules()
            if name.startswith(f"{blocks}.{number}.") and getattr(module, "weight", None) is not None
        }
        s = [inputs_of(merged, mine, list(inside)) for mine in samples]
        e = [inputs_of(model, mine, list(inside)) for model, mine in zip(experts, samples, strict=True)]
        solved = {}
        for name, module in inside.items():
            own = [parameters(model, name) for model in experts]
            (w_merged, b_merged), (w_base, b_base) = parameters(merged, name), parameters(base, name)
            anchor = rule.rho * w_merged + (1 - rule.rho) * w_base
            if module.weight.dim() == 1:
                solved[name] = norm(module, [one[name] for one in s], own, anchor, b_merged, b_base, rule)
                continue
            above, left = rule.ridge * anchor, rule.ridge * np.eye(anchor.shape[1])
            right, below = np.zeros(len(anchor)), rule.ridge
            for (weight, _), x_s, x_e in zip(own, (one[name] for one in s), (one[name] for one in e), strict=True):
                x_t, count = rule.alpha * x_e + (1 - rule.alpha) * x_s, len(x_s)
                scale = 1 / np.linalg.norm(x_s.T @ x_s / count)
                above = above + scale * weight @ (x_t.T @ x_s / count)
                left = left + scale * x_s.T @ x_s / count
            found = above @ np.linalg.inv(left)
            for (weight, bias), x_s, x_e in zip(own, (one[name] for one in s), (one[name] for one in e), strict=True):
                x_t, scale = rule.alpha * x_e + (1 - rule.alpha) * x_s, 1 / np.linalg.norm(x_s.T @ x_s / len(x_s))
                right = right + scale * ((0 if bias is None else bias) + weight @ x_t.mean(0) - found @ x_s.mean(0))
                below += scale
            if b_merged is None or b_base is None:
                solved[name] = found, None
            else:
                solved[name] = found, (right + rule.ridge * (rule.rho * b_merged + (1 - rule.rho) * b_base)) / below
        with torch.no_grad():
            for name, (weight, bias) in solved.items():
                module = inside[name]
                module.weight.copy_(torch.from_numpy(weight.T if isinstance(module, Conv1D) else weight))
                if bias is not None:
                    module.bias.copy_(torch.from_numpy(bias))


def norm(
    module: Any, xs: list[Array], own: list[Any], anchor: Array, b_merged: Any, b_base: Any, rule: Rule
) -> tuple[Array, Array | None]:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if b_merged is None:
        zs = [x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) for x in xs]
        energies = [(z**2).mean(0) for z in zs]
        above = sum(energy * weight for energy, (weight, _) in zip(energies, own, strict=True)) + rule.ridge * anchor
        return above / (sum(energies) + rule.ridge), None
    zs = [(x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) for x in xs]
    b_anchor = rule.rho * b_merged + (1 - rule.rho) * b_base
    weight, bias = np.empty_like(anchor), np.empty_like(anchor)
    for d in range(len(anchor)):
        left, right = rule.ridge * np.eye(2), rule.ridge * np.array([anchor[d], b_anchor[d]])
        for z, (w, b) in zip(zs, own, strict=True):
            moments = np.array([[(z[:, d] ** 2).mean(), z[:, d].mean()], [z[:, d].mean(), 1]])
            left, right = left + moments, right + moments @ [w[d], b[d]]
        weight[d], bias[d] = np.linalg.solve(left, right)
    return weight, bias


@pytest.mark.parametrize(("family", "blocks"), [("llama", "model.layers"), ("gpt2", "transformer.h")])
def test_a_model_is_calibrated_as_by_whole_passes_and_dense_solves(tmp_path: Path, family: str, blocks: str) -> None:
    plan, state, samples = made(tmp_path, family)
    merged = loaded(Path(plan.base.model))
    merged.load_state_dict(result(plan, state), strict=False)
    before = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    Actors(plan, FEATCAL, samples, state).run(range(2))
    reference(plan, samples, merged, FEATCAL, blocks)
    found = result(plan, state)
    names = {name if name in found else name.removeprefix("transformer.") for name in merged.state_dict()}
    assert found.keys() <= names | {"lm_head.weight"}
    for name, tensor in merged.state_dict().items():
        ours = found.get(name, found.get(name.removeprefix("transformer.")))
        if ours is not None:
            torch.testing.assert_close(
                ours, tensor, rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
        if f"{blocks}." in name and tensor.is_floating_point():
            assert not torch.equal(tensor, before[name])


def test_bits_depend_on_neither_the_number_of_actors_nor_on_interruptions(tmp_path: Path) -> None:
    plan, state, samples = made(tmp_path, experts=3)
    Actors(plan, FEATCAL, samples, state).run(range(2))
    expected = result(plan, state)
    for name in state.names("calibrated"):
        state.remove(name)
    Actors(plan, FEATCAL, samples, state, count=2).run(range(1))
    # Other actors, which have nothing but the files.
    Actors(plan, FEATCAL, samples, state, count=3).run(range(1, 2))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in result(plan, state).items())


def test_one_expert_on_the_merged_stream_without_a_ridge_is_returned(tmp_path: Path) -> None:
    plan, state, _ = made(tmp_path, experts=1)
    store_mean(plan, state, [plan.base.model])
    samples = samples_of(plan, [40] * 8, tiny.VOCAB)
    Actors(plan, Rule(alpha=0, rho=1, ridge=0), samples, state).run(range(2))
    base, expert = (loaded(Path(model.model)).state_dict() for model in (plan.base, plan.experts[0]))
    for name, tensor in result(plan, state).items():
        expected = expert if ".layers." in name else base
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
        assert state.exists(solved_file(name)) == (".layers." in name)


def test_regmean_plus_plus_solves_on_the_inputs_of_each_experts_block_in_the_merged_stream(tmp_path: Path) -> None:
    plan, state, _ = made(tmp_path)
    samples = samples_of(plan, [30] * 4, tiny.VOCAB)
    merged = loaded(Path(plan.base.model))
    merged.load_state_dict(result(plan, state), strict=False)
    experts = [loaded(Path(expert.model)) for expert in plan.experts]
    Actors(plan, regmean_plus_plus(0.9), samples, state).run(range(2))
    for number in range(2):
        own = [model.model.layers[number] for model in experts]
        linears = [name for name, module in own[0].named_modules() if isinstance(module, torch.nn.Linear)]
        mean, sums = merged.model.layers[number], dict[str, tuple[Array, Array]]()
        for block, mine in zip(own, samples, strict=True):
            # The merged model, with the expert's block in the place of its own.
            merged.model.layers[number] = block
            for name, x in inputs_of(merged, mine, [f"model.layers.{number}.{name}" for name in linears]).items():
                gram = x.T @ x / len(x)
                gram = 0.9 * gram + 0.1 * np.diag(np.diag(gram))
                above, below = sums.get(name, (0, 0))
                sums[name] = above + parameters(merged, name)[0] @ gram, below + gram
        merged.model.layers[number] = mean
        with torch.no_grad():
            for name, (above, below) in sums.items():
                merged.get_submodule(name).weight.copy_(torch.from_numpy(above @ np.linalg.inv(below)))
    for name, tensor in result(plan, state).items():
        torch.testing.assert_close(tensor, merged.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_a_strong_ridge_gives_the_anchor(tmp_path: Path) -> None:
    plan, state, samples = made(tmp_path)
    merged, base = result(plan, state), loaded(Path(plan.base.model)).state_dict()
    Actors(plan, Rule(alpha=0.3, rho=2.0, ridge=1e7), samples, state).run(range(2))
    for name, tensor in result(plan, state).items():
        expected = 2 * merged[name] - base[name] if ".layers." in name else merged[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-3)
