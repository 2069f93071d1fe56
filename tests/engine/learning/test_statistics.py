"""Statistics of tiny models against plain forward and backward passes of the models that transformers loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_images
import torch
from conftest import plan_of
from plain import Plain
from thorough import thorough_but
from transformers import AutoModelForCausalLM

from engine.calibration.samples import Sample
from engine.learning import statistics as statistics_module
from engine.learning.frozen_expert import FrozenExpert
from engine.learning.statistics import MomentSums, collect, digest_of
from engine.learning.targets import load_target
from engine.models.skeleton import part_of
from engine.run.run_folder import RunFolder
from engine.statistics.files import Statistics
from engine.storage.local_folder import LocalFolder

CPU = torch.device("cpu")
SAMPLES = [Sample(0, 0, (5, 9, 33, 12, 7, 41), "here"), Sample(0, 1, (3, 8, 2), "here")]
GIVEN = [(sample, {}) for sample in SAMPLES]
FACTS = {"base": {}, "model": {}}


def inputs_of(model: torch.nn.Module, given: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the inputs of each linear layer in whole forward passes, by the name of its weight."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            hook = lambda _, args, name=name: seen.setdefault(f"{name}.weight", []).append(args[0])  # noqa: E731
            handles.append(layer.register_forward_pre_hook(hook))
    with torch.no_grad():
        for arguments in given:
            model(**arguments)
    for handle in handles:
        handle.remove()
    return {name: torch.cat([x.reshape(-1, x.shape[-1]) for x in parts]) for name, parts in seen.items()}


@pytest.mark.parametrize("k", [0, None], ids=["expert", "base"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_moments_are_those_of_whole_forward_passes(tmp_path: Path, family: str, k: int | None) -> None:
    plan = plan_of(tiny.make_merge(tmp_path / "merge", family, experts=1))
    folder = LocalFolder(tmp_path / "statistics")
    header = collect(FrozenExpert(plan, k, CPU), GIVEN, ["gram"], folder, FACTS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merge" / ("base" if k is None else "expert0")).eval()
    expected = inputs_of(model, [{"input_ids": torch.tensor([sample.input_ids])} for sample in SAMPLES])
    statistics = Statistics(folder)
    assert header.tokens == 9 and header.sequences == 2
    names = {name for name in expected if name in plan.base_header.tensors and "lm_head" not in name}
    assert set(header.moments) == names and names
    for name in names:
        x_NI, moments = expected[name], statistics.of(name, plan.base_header.tensors[name].shape).moments()
        assert moments is not None and moments.tokens == len(x_NI)
        torch.testing.assert_close(moments.gram(), x_NI.T @ x_NI)
        torch.testing.assert_close(moments.square_I, x_NI.square().sum(0))
        torch.testing.assert_close(moments.absolute_I, x_NI.abs().sum(0))
    first = "model.layers.0.self_attn."
    keys = {header.moments[f"{first}{name}_proj.weight"].key for name in "qkv"}
    assert len(keys) == 1, "query, key and value have one input"


def test_activations_alone_have_no_gram_matrix(tmp_path: Path) -> None:
    plan = plan_of(tiny.make_merge(tmp_path / "merge", experts=1))
    header = collect(FrozenExpert(plan, 0, CPU), GIVEN, ["activations"], LocalFolder(tmp_path / "s"), FACTS)
    assert {entry.form for entry in header.moments.values()} == {"diagonal"}


@pytest.mark.parametrize("counts", [[1, 1], [1, 4], [3, 1, 2], [9]])
def test_a_gram_matrix_does_not_depend_on_whether_inputs_were_kept_first(counts: list[int]) -> None:
    parts, sums = [torch.randn(count, 8) for count in counts], MomentSums(8, gram=True)
    for part in parts:
        sums.add(part)
    moments = sums.moments()
    assert (moments.inputs_NI is None) == (sum(counts) > 4)
    gram = torch.zeros(8, 8)
    for part in parts:
        gram = gram.addmm(part.T, part)
    torch.testing.assert_close(moments.gram(), gram)


def test_the_fisher_information_is_the_mean_square_of_each_sequence_s_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The most likely label instead of a sampled one, so that the reference needs no random numbers.
    monkeypatch.setattr(torch, "multinomial", lambda p, count, generator: p.argmax(-1, keepdim=True))
    plan = plan_of(tiny.make_merge(tmp_path / "merge", experts=1, tied=True))
    folder = LocalFolder(tmp_path / "s")
    collect(FrozenExpert(plan, 0, CPU), GIVEN, ["fisher"], folder, FACTS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merge" / "expert0").eval()
    expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for sample in SAMPLES:
        model.zero_grad()
        logits = model(torch.tensor([sample.input_ids])).logits[0]
        torch.nn.functional.cross_entropy(logits, logits.argmax(-1), reduction="sum").backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad.square() / len(SAMPLES)
    statistics = Statistics(folder)
    assert set(statistics.header.fisher) == set(plan.base_header.tensors)
    for name, tensor in expected.items():
        fisher = statistics.of(name, tensor.shape).fisher()
        torch.testing.assert_close(fisher, tensor, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_sensitivities_are_gradients_times_weights_sample_by_sample(tmp_path: Path, family: str) -> None:
    plan = plan_of(tiny.make_merge(tmp_path / "merge", family, experts=1))
    samples = [*SAMPLES, Sample(0, 2, (4,), "here"), Sample(0, 3, (17, 3, 3, 30), "here"), Sample(0, 4, (8, 1), "here")]
    for count in (4, 5):
        folder = LocalFolder(tmp_path / f"s{count}")
        expert = FrozenExpert(plan, 0, CPU)
        collect(expert, [(sample, {}) for sample in samples[:count]], ["sensitivity"], folder, FACTS)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merge" / "expert0").eval()
        rows: dict[str, list[torch.Tensor]] = {name: [] for name, _ in model.named_parameters()}
        for sample in samples[:count]:
            model.zero_grad()
            ids = torch.tensor([sample.input_ids])
            if ids.shape[1] > 1:
                model(ids, labels=ids).loss.backward()
            for name, parameter in model.named_parameters():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                rows[name].append((gradient * parameter).detach())
        found = Statistics(folder)
        assert set(found.header.sensitivity) == set(plan.base_header.tensors)
        for name, place in expert.places.items():
            shape = plan.base_header.tensors[name].shape
            values = torch.stack([part_of(row, place, shape) for row in rows[place.parameter]])
            square, median = (found.of(name, shape).sensitivity(part) for part in ("square", "median"))
            torch.testing.assert_close(square, values.square().mean(0), rtol=1e-4, atol=1e-12)
            torch.testing.assert_close(median, values.sort(dim=0).values[count // 2], rtol=1e-4, atol=1e-8)


def test_sensitivities_have_the_same_bits_whatever_fits_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tiny.make_merge(tmp_path / "merge", experts=1, tied=True))
    found = []
    for most in (1 << 30, 20000, 3000):
        monkeypatch.setattr(statistics_module, "SENSITIVITIES", most)
        folder = LocalFolder(tmp_path / str(most))
        header = collect(FrozenExpert(plan, 0, CPU), GIVEN, ["sensitivity"], folder, FACTS)
        found.append((Statistics(folder), len(header.files)))
    assert [files for _, files in found] == sorted({files for _, files in found})
    for name, tensor in plan.base_header.tensors.items():
        for part in ("square", "median"):
            first, *others = (statistics.of(name, tensor.shape).sensitivity(part) for statistics, _ in found)
            assert all(torch.equal(first, other) for other in others), name


def test_repeated_statistics_have_the_same_bits(tmp_path: Path) -> None:
    plan = plan_of(tiny.make_merge(tmp_path / "merge", experts=1))
    folders = [LocalFolder(tmp_path / name) for name in "ab"]
    for folder in folders:
        collect(FrozenExpert(plan, 0, CPU), GIVEN, ["fisher"], folder, FACTS)
    assert Statistics(folders[0]).header == Statistics(folders[1]).header


def test_the_digest_of_data_tells_tokens_and_inputs_apart() -> None:
    image = {"pixel_values": torch.ones(2, 2)}
    variants = [
        GIVEN,
        GIVEN[:1],
        [(Sample(0, 0, (5, 9), "here"), {}), GIVEN[1]],
        [(SAMPLES[0], image), GIVEN[1]],
        [(SAMPLES[0], {"pixel_values": torch.ones(4, 1)}), GIVEN[1]],
    ]
    assert len({digest_of(variant) for variant in variants}) == len(variants)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_state_of_a_training_is_its_fisher_information(tmp_path: Path, family: str) -> None:
    plan = plan_of(tiny.make_merge(tmp_path / "merge", family, experts=1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merge" / "expert0")
    decayed = [[one for one in model.parameters() if (one.dim() > 1) == large] for large in (True, False)]
    optimizer = torch.optim.AdamW([{"params": parameters} for parameters in decayed])
    ids = torch.tensor([SAMPLES[0].input_ids])
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    # By the names of the files, which are those of the module or of its parts.
    names = {parameter: name for name, parameter in model.named_parameters()}
    squares = {names[parameter]: state["exp_avg_sq"] for parameter, state in optimizer.state.items()}
    expert, folder = FrozenExpert(plan, 0, CPU), LocalFolder(tmp_path / "s")
    header = collect(expert, [], ["fisher"], folder, FACTS, tmp_path / "optimizer.pt")
    assert header.data != collect(expert, [], [], LocalFolder(tmp_path / "none"), FACTS).data
    assert header.sequences == 0 and header.kinds == ("fisher",)
    statistics, found = Statistics(folder), dict[str, list[tuple[int, torch.Tensor]]]()
    for name, place in expert.places.items():
        fisher = statistics.of(name, plan.base_header.tensors[name].shape).fisher()
        assert fisher is not None, name
        found.setdefault(place.parameter, []).append((place.start, fisher.reshape(-1)))
    assert set(found) == set(squares)
    for name, parts in found.items():
        whole = torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])])
        assert torch.equal(whole, squares[name].reshape(-1))


@pytest.mark.parametrize("family", thorough_but(["qwen2_vl", "internvl"], tiny_images.FAMILIES))
def test_moments_of_a_model_that_takes_images_are_those_of_whole_forward_passes(tmp_path: Path, family: str) -> None:
    """Vision tower and projector included; the last sample has no image."""
    plan = plan_of(tiny_images.make_merge(tmp_path / "merge", family, experts=1, exclude=[]))
    plain = Plain(plan, tmp_path)
    run = RunFolder(str(tmp_path / "plain"))
    samples = [*plain.samples[0], Sample(0, 9, (5, 9, 33, 12), "here")]
    given = [(one, load_target(run.state, run.inputs(one)).inputs if one.inputs else {}) for one in samples]
    expert, folder = FrozenExpert(plan, 0, CPU), LocalFolder(tmp_path / "statistics")
    expected = inputs_of(expert.model, [expert.given(sample, inputs) for sample, inputs in given])
    header = collect(expert, given, ["gram"], folder, FACTS)
    statistics = Statistics(folder)
    assert any("vis" in name for name in header.moments)
    for name, entry in header.moments.items():
        x_NI = expected[expert.places[name].parameter]
        moments = statistics.of(name, plan.base_header.tensors[name].shape).moments()
        assert moments is not None and entry.tokens == len(x_NI)
        torch.testing.assert_close(moments.gram(), x_NI.T @ x_NI, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", thorough_but(["qwen2_vl"], tiny_images.FAMILIES))
def test_weights_that_a_sample_does_not_use_have_no_sensitivity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """As those of a vision tower, of samples without images."""
    plan = plan_of(tiny_images.make_merge(tmp_path / "merge", family, experts=1, exclude=[]))
    plain = Plain(plan, tmp_path)
    seen = plain.samples[0][0]
    run = RunFolder(str(tmp_path / "plain"))
    images = load_target(run.state, run.inputs(seen)).inputs
    found = []
    # All tensors at once, and the vision tower alone in many groups.
    for most, samples in ((1 << 30, [(seen, images), *GIVEN]), (60_000, [(seen, images), *GIVEN]), (1 << 30, GIVEN)):
        monkeypatch.setattr(statistics_module, "SENSITIVITIES", most)
        folder = LocalFolder(tmp_path / str(len(found)))
        collect(FrozenExpert(plan, 0, CPU), samples, ["sensitivity"], folder, FACTS)
        found.append(Statistics(folder))
    at_once = found[0]
    towers = [name for name in at_once.header.sensitivity if "vis" in name]
    assert towers
    for name in at_once.header.sensitivity:
        shape = plan.base_header.tensors[name].shape
        one, other, text = (of.of(name, shape).sensitivity("square") for of in found)
        assert one is not None and torch.equal(one, other), name
        assert name not in towers or not text.any()
    assert any(bool(at_once.of(n, plan.base_header.tensors[n].shape).sensitivity("square").any()) for n in towers)
