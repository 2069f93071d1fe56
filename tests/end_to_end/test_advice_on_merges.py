"""Advice about the arithmetic of a merge is right: followed, the merge has the right result."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
import yaml
from advice import Advice, begins, found, refusal
from conftest import plan_of
from fake_gpus import FakeGpus
from plain import Plain
from recorded_merges import learned
from thorough import as_thorough
from weight_space import Tensors, entries, make_models, ours, read, write_arrays, write_checkpoint, write_config

from actors.gpus import Gpus
from cluster.placement import Devices
from cluster.seats import Node
from engine.learning.frozen_expert import check_models
from engine.models.devices import Room, device_map
from engine.models.skeleton import build_skeleton
from engine.planning.open_models import load_base_config, open_base
from engine.planning.plan import Plan
from engine.shards.settings import check_settings

ADVICE = Advice(
    __name__,
    elsewhere={
        "set `metric` in the `parameters` of each model": "test_a_checkpoint_without_a_loss_is_refused_when_planned",
        "statistics of another {kind}": "tests/cluster/test_statistics_on_ray.py",
        "the statistics have no {missing[0]}": "tests/cluster/test_statistics_on_ray.py",
        "use a method that needs no statistics": "no other method runs a model block by block",
        "set `hidden_layers: []`": "test_hidden_states_of_several_streams_are_refused_and_can_be_left_out",
    },
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_advice_is_followed_or_has_a_reason() -> None:
    ADVICE.check()


# Learning


@ADVICE.followed("no tensor gets a chunk to learn")
def test_a_budget_of_which_no_tensor_gets_a_chunk_is_raised(llama_merge: Path, tmp_path: Path) -> None:
    before = plan_of(llama_merge, "parameters.budget=0.05")
    error = refusal(lambda: learned(before, budget=0.05))
    found("raise `budget`", error)
    sufficient = re.match(r"[\d.]+", error.expected)
    assert sufficient is not None
    after = plan_of(llama_merge, f"parameters.budget={sufficient[0]}")
    stages, _ = learned(after, budget=float(sufficient[0]))
    assert any(stages[1].layout.learned)
    begins(tmp_path / "merged", before, error, after)


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge in float16 of four equal experts. One of them is finite in float16, all of them together are not."""
    folder = tmp_path_factory.mktemp("alike")
    parameters = {"epochs": 1, "gradient_accumulation": 1, "hidden_layers": [], "weight": 0.05}
    made = {"merge_method": "expert_merging", "parameters": parameters}
    config = tiny.make_merge(folder, experts=4, samples=(1, 1, 1, 1), **made, dtype=torch.float32)
    expert = tiny.make_expert(transformers.AutoModelForCausalLM.from_pretrained(folder / "base"), seed=1, scale=1.8)
    written = yaml.safe_load(config.read_text())
    for model in written["models"]:
        tiny.save(expert, folder / model["model"])
        del model["parameters"]
    config.write_text(yaml.safe_dump(written | {"dtype": "float16"}))
    return config


@ADVICE.followed("lower `learning_rate` or `weight`")
@pytest.mark.parametrize(
    ("spoil", "what", "lower"),
    [
        ({"learning_rate": 10.0}, "loss", {"learning_rate": 0.1}),
        as_thorough(({"weight": 0.99}, "loss", {"weight": 0.05})),
        # In float16 the gradient of the hidden states overflows before the loss does.
        ({"hidden_layers": [1, 2], "weight": 0.25}, "gradient", None),
    ],
    ids=["learning rate", "weight", "gradient"],
)
def test_learning_is_finite_with_what_the_advice_names(
    alike: Path, tmp_path: Path, spoil: dict[str, Any], what: str, lower: dict[str, float] | None
) -> None:
    def learn(dtype: str, parameters: dict[str, Any]) -> Plan:
        (tmp_path / dtype / str(len(list(tmp_path.iterdir())))).mkdir(parents=True)
        plan = plan_of(alike, f"dtype={dtype}", *(f"parameters.{key}={value}" for key, value in parameters.items()))
        assert np.isfinite(Plain(plan, max((tmp_path / dtype).iterdir())).run()[-1].values).all()
        return plan

    error = refusal(lambda: learn("float16", spoil))
    assert what in error.what
    before = plan_of(alike, *(f"parameters.{key}={value}" for key, value in spoil.items()))
    begins(tmp_path / "merged", before, error, learn(found("`dtype: (.+?)`", error)[1], spoil))
    if lower is not None:
        assert f"`{next(iter(lower))}`" in error.do
        begins(tmp_path / "lowered", before, error, learn("float16", spoil | lower))


# Weight-space methods


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    write_arrays(tmp_path, experts=2)
    return tmp_path


def mean(folder: Path, *weights: float) -> Tensors:
    """Return the sum of the experts with these weights."""
    models = [read(folder / f"expert{k}") for k in range(len(weights))]
    return {name: sum(w * model[name] for w, model in zip(weights, models, strict=True)) for name in models[0]}


def is_near(merged: Tensors, expected: Tensors) -> bool:
    return all(torch.allclose(merged[name].float(), expected[name].float(), rtol=1e-3) for name in expected)


@ADVICE.followed("the weights sum to zero")
def test_weights_that_sum_to_zero_are_changed_or_not_normalized(arrays: Path) -> None:
    def merged(first: float, second: float, **parameters: Any) -> Tensors:
        models = entries({"weight": first}, {"weight": second})
        return ours(write_config(arrays, merge_method="linear", models=models, parameters=parameters))

    error = refusal(lambda: merged(0.5, -0.5))
    assert "change the weights" in error.do
    assert is_near(merged(0.5, -0.25), mean(arrays, 2, -1))
    option = yaml.safe_load(found("`(.+?)` in `parameters`", error)[1])
    assert is_near(merged(0.5, -0.5, **option), mean(arrays, 0.5, -0.5))


@ADVICE.followed("needs a value of {option.name}")
@pytest.mark.parametrize(("method", "settings"), [("slerp", [{}]), ("nuslerp", [{"weight": 1.0}, {}])])
def test_an_option_that_a_method_requires_is_set(arrays: Path, method: str, settings: list[dict[str, float]]) -> None:
    pytest.importorskip("mergekit")
    keys = {"merge_method": method, "base_model": "base", "models": entries(*settings)}
    error = refusal(lambda: ours(write_config(arrays, **keys)))
    option = found("set `(.+?)` in `parameters`", error)[1]
    merged = ours(write_config(arrays, **keys, parameters={option: 1.0}))
    if method == "slerp":
        assert is_near(merged, read(arrays / "expert0")), "with t = 1 it is the other model"


@ADVICE.followed("the merged tensor has a NaN or infinite weight")
def test_a_merged_weight_is_finite_with_what_the_advice_names(arrays: Path, tmp_path: Path) -> None:
    def config(weight: float, **keys: Any) -> Path:
        parameters = {"normalize": False}
        models = entries({"weight": weight}, {"weight": weight})
        return write_config(arrays, merge_method="linear", models=models, parameters=parameters, **keys)

    before = config(1e7, out_dtype="float16")
    error = refusal(lambda: ours(before))
    assert "lower `weight`" in error.do
    option = yaml.safe_load(found("`(out_dtype: .+?)`", error)[1])
    for after, weight in ((config(0.5, out_dtype="float16"), 0.5), (config(1e7, **option), 1e7)):
        assert is_near(ours(after), mean(arrays, weight, weight))
        begins(tmp_path / "out" / after.stem, plan_of(before), error, plan_of(after))


@ADVICE.followed("check the models' weights")
def test_a_weight_of_the_base_that_is_not_finite_is_mended(arrays: Path) -> None:
    keys = {"merge_method": "linear", "base_model": "base", "models": entries({}), "exclude": [".*norm.*"]}
    whole = read(arrays / "base")
    spoilt = {name: torch.full_like(tensor, torch.nan) for name, tensor in whole.items() if "norm" in name}
    (arrays / "base").rename(arrays / "whole")
    write_checkpoint(arrays / "base", whole | spoilt)
    error = refusal(lambda: ours(write_config(arrays, **keys)))
    assert error.where in spoilt and "weights" in error.do and "out_dtype" not in error.do
    write_checkpoint(arrays / "mended", whole)
    (arrays / "base").rename(arrays / "spoilt")
    (arrays / "mended").rename(arrays / "base")
    assert is_near(
        ours(write_config(arrays, **keys)), read(arrays / "expert0") | {name: whole[name] for name in spoilt}
    )


# Models


@ADVICE.followed("no output head that is a single linear layer")
def test_a_model_without_a_linear_head_merges_by_a_weight_space_method(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = transformers.AutoConfig.for_model("bert", **tiny.COMMON | {"num_hidden_layers": 1}, is_decoder=True)
    for name in ("base", "expert0"):
        transformers.AutoModelForCausalLM.from_config(options).save_pretrained(tmp_path / name)
    tiny.write_calibration(tmp_path / "expert0.jsonl", 1, seed=0)
    models = [{"model": "expert0", "calibration": "expert0.jsonl", "parameters": {"weight": 0.5}}]
    config = tmp_path / "merge.yaml"
    config.write_text(yaml.safe_dump({"merge_method": "expert_merging", "base_model": "base", "models": models}))
    error = refusal(lambda: check_models(plan_of(config)))
    assert "weight-space method" in error.do
    del models[0]["calibration"]
    config.write_text(yaml.safe_dump({"merge_method": "linear", "base_model": "base", "models": models}))
    assert is_near(ours(config), read(tmp_path / "expert0"))


@ADVICE.followed("an actor has {wanted} GPUs of Ray")
def test_torch_for_cuda_is_installed_or_no_gpu_is_requested(monkeypatch: pytest.MonkeyPatch, llama_merge: Path) -> None:
    FakeGpus(monkeypatch, 0)
    error = refusal(Gpus(1).devices)
    assert "install a torch for CUDA" in error.do
    keys = re.findall(r"`(cluster\..+?)`", error.do)
    config = plan_of(llama_merge, *(f"{key}.num_gpus={found('to ([0-9])', error)[1]}" for key in keys)).config
    seats = Devices.of([Node(8, 4)], config)
    assert {Gpus(number).devices() for number in (seats.trainer, seats.expert)} == {(torch.device("cpu"),)}
    FakeGpus(monkeypatch, 1)
    assert Gpus(1).devices() == (torch.device("cuda", 0),)
    slice_of_mig = refusal(Gpus(2).devices)
    assert Gpus(int(found("to ([0-9])", slice_of_mig)[1])).devices() == (torch.device("cuda", 0),)
    assert "--num-gpus" in slice_of_mig.do, "a node that declares more GPUs than it has"


@ADVICE.followed("the model does not fit on the")
def test_a_model_that_is_too_large_fits_on_more_gpus_or_in_bfloat16(
    llama_merge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs of 60 kB each, of which two hold the model of 129 kB in bfloat16 alone."""
    FakeGpus(monkeypatch, 8, free=60_000)

    def places(count: int, *overrides: str) -> None:
        plan = plan_of(llama_merge, *overrides)
        dtype, folder = getattr(torch, plan.dtype), open_base(plan).folder
        model, _ = build_skeleton(load_base_config(plan), plan.base_header.tensors, dtype, folder)
        first, *others = (torch.device("cuda", place) for place in range(count))
        assert {place.type for place in device_map(model, dtype, first, Room(tuple(others))).values()} == {"cuda"}

    error = refusal(lambda: places(2))
    keys = re.findall(r"`(cluster\..+?)`", error.do)
    plan = plan_of(llama_merge, *(f"{key}=6" for key in keys))
    assert plan.config.cluster.trainer.num_gpus == plan.config.cluster.expert.num_gpus == 6
    places(6)
    places(2, f"dtype={found('use (.+?);', error)[1]}")


# Slices


@ADVICE.followed("no task vectors of whole models to trim")
def test_slices_are_trimmed_by_tensor(tmp_path: Path) -> None:
    folder = make_models(tmp_path, experts=2)
    sources = [{"model": model, "layer_range": [0, 2]} for model in ("expert0", "expert1")]
    fixed: dict[str, Any] = {"merge_method": "ties", "base_model": "base", "slices": [{"sources": sources}]}

    def check(**options: Any) -> None:
        check_settings(plan_of(write_config(folder, **fixed, parameters={"density": 0.5, **options})))

    error = refusal(lambda: check(trim="model"))
    key, value = found(r"set `(\w+): (\w+)`", error).groups()
    check(**{key: value})
