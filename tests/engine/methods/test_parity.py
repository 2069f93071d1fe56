"""Merges compared with mergekit's of the same YAML; TIES and DARE compared with their papers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import cut_small, plan_of
from errors import refused
from peft_adapters import build
from thorough import as_thorough, thorough_but
from torch import Tensor
from weight_space import (
    BESIDE_MERGEKIT,
    Tensors,
    combine,
    configs_read_once,
    difference,
    entries,
    make_models,
    mergekits,
    ours,
    read,
    task_vectors,
    worst,
    write_arrays,
    write_config,
)

import engine.methods.arithmetic.tensor
from engine.errors import ConfigError
from engine.methods.arithmetic.sparse import Thinned
from engine.planning.open_models import open_task_vectors
from engine.shards.weight_space import WeightSpace

pytest.importorskip("mergekit")
pytestmark = BESIDE_MERGEKIT

Record = Callable[[str, object], None]
# Difference of float32 sums in different orders, for weights of about one.
CLOSE = 1e-6


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """Return a function that attaches a number to the test's report."""
    return lambda name, value: request.node.user_properties.append((name, value))


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    with configs_read_once():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a Llama of three layers and three experts, float32."""
    return make_models(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("one-layer"), layers=1, experts=2)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as `models`, in bfloat16."""
    return make_models(tmp_path_factory.mktemp("bfloat16"), dtype=torch.bfloat16)


def assert_same(config: Path, record: Record) -> Tensors:
    found, expected = ours(config), mergekits(config)
    apart = worst(found, expected)
    record("apart", apart)
    assert apart <= CLOSE
    return found


def apart_at_thresholds(found: Tensors, expected: Tensors, record: Record) -> int:
    """Return the number of elements that differ by more than rounding, and record it."""
    worst(found, expected)
    apart = {name: (found[name] - expected[name]).abs() for name in expected}
    record("apart", max(some[some <= CLOSE].max().item() for some in apart.values()))
    record("thresholds", total := sum(int((some > CLOSE).sum()) for some in apart.values()))
    return total


W = [{"weight": 0.7}, {"weight": -0.25}, {"weight": 0.4}]
LINEAR: dict[str, dict[str, Any]] = {
    "no-base": {"models": entries(*W)},
    "no-base-sum": {"models": entries(*W), "parameters": {"normalize": False}},
    "base-listed": {
        "base_model": "base",
        "models": [{"model": "base", "parameters": {"weight": 0.6}}, *entries(*W)],
    },
    "base-listed-last": {
        "base_model": "base",
        "models": [*entries(*W), {"model": "base", "parameters": {"weight": 0.6}}],
        "parameters": {"normalize": False},
    },
    "base-not-listed": {"base_model": "base", "models": entries({}, {"weight": 2}), "parameters": {"weight": 0.5}},
    "one-model": {"models": entries({"weight": 0.3}), "parameters": {"normalize": True}},
    "base-is-a-model": {"models": [*entries(*W[:2]), {"model": "base", "parameters": {"weight": 1}}]},
    "gradients": {"models": entries({"weight": [0, 1]}, {"weight": [1, 0.2, 0.5]}, {"weight": 0.1})},
}
TASK_ARITHMETIC: dict[str, dict[str, Any]] = {
    "plain": {"models": entries(*W)},
    "normalized": {"models": entries(*W), "parameters": {"normalize": True}},
    "lambda": {"models": entries(*W), "parameters": {"lambda": 0.35, "normalize": True}},
    "sum-of-weights-zero": {
        "models": entries({"weight": 0.5}, {"weight": -0.5}),
        "parameters": {"normalize": True},
    },
    "base-listed": {
        "models": [{"model": "base", "parameters": {"weight": 3}}, *entries(*W)],
        "parameters": {"int8_mask": True},
    },
    "top-weight": {"models": entries({}, {"weight": 0.2}, {}), "parameters": {"weight": 0.5, "lambda": -1}},
    "one-expert": {"models": entries({"weight": 1}), "parameters": {"lambda": 1}},
}


@pytest.mark.parametrize("case", LINEAR)
def test_linear(case: str, models: Path, record: Record) -> None:
    assert_same(write_config(models, merge_method="linear", dtype="float32", **LINEAR[case]), record)


@pytest.mark.parametrize("case", TASK_ARITHMETIC)
def test_task_arithmetic(case: str, models: Path, record: Record) -> None:
    keys = {"merge_method": "task_arithmetic", "base_model": "base", "dtype": "float32"}
    assert_same(write_config(models, **keys, **TASK_ARITHMETIC[case]), record)


POSITIVE, MIXED = (0.7, 0.2, 0.4), (1.0, -0.5, 0.3)
TIES_CASES: list[tuple[tuple[float, ...], dict[str, Any]]] = [
    *((POSITIVE, {"density": density}) for density in (0.0, 0.001, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)),
    *((MIXED, {"density": density}) for density in (0.1, 0.5, 1.0)),
    ((0.5, -0.5, 0.0), {"density": 0.7}),
    (MIXED, {"density": 0.4, "normalize": False}),
    (POSITIVE, {"density": 0.4, "lambda": 1.7, "int8_mask": True}),
    (MIXED, {"density": 0.6, "rescale": True}),
    (POSITIVE, {"density": 0.05, "rescale": True, "normalize": False, "lambda": 0.3}),
]


@pytest.mark.parametrize(
    ("weights", "top"),
    thorough_but([(POSITIVE, {"density": 0.3}), (MIXED, {"density": 0.5}), TIES_CASES[-2]], TIES_CASES),
    ids=str,
)
def test_ties(weights: tuple[float, ...], top: dict[str, Any], models: Path, record: Record) -> None:
    config = write_config(
        models,
        merge_method="ties",
        base_model="base",
        models=entries(*({"weight": weight} for weight in weights)),
        parameters=top,
        dtype="float32",
    )
    found, expected = ours(config), mergekits(config)
    # Among elements of equal magnitude mergekit keeps any, this engine the first ones.
    assert apart_at_thresholds(found, expected, record) <= 1e-5 * sum(one.numel() for one in found.values())


def test_ties_of_each_expert_and_layer(models: Path, record: Record) -> None:
    config = write_config(
        models,
        merge_method="ties",
        base_model="base",
        models=entries(
            {"weight": 0.4, "density": [0.2, 0.9]},
            {"weight": [1, 0.1], "density": [{"filter": "mlp", "value": 0.05}, {"value": 0.6}]},
            {"weight": 0.3, "density": 1},
        ),
        parameters={"rescale": [True, False]},
        dtype="float32",
    )
    assert apart_at_thresholds(ours(config), mergekits(config), record) == 0


def test_ties_differs_from_mergekit_only_where_elements_are_equal(halves: Path, record: Record) -> None:
    """Differences of bfloat16 weights often have equal magnitudes; which of them are kept is not specified."""
    config = write_config(
        halves,
        merge_method="ties",
        base_model="base",
        models=entries({"weight": 0.5, "density": 0.3}, {"weight": 0.8, "density": 0.6}),
        dtype="float32",
    )
    found, expected = ours(config), mergekits(config)
    assert apart_at_thresholds(found, expected, record) > 0
    for name, taus in task_vectors(plan_of(config)).items():
        equal = torch.zeros_like(taus[0], dtype=torch.bool)
        for tau, density in zip(taus, (0.3, 0.6), strict=True):
            ordered = tau.abs().flatten().sort(descending=True).values
            equal |= tau.abs() == ordered[int(density * tau.numel()) - 1]
        apart = (found[name] - expected[name]).abs()
        assert not apart[~equal].gt(CLOSE).any(), name


@pytest.fixture
def our_masks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], dict[str, int]]:
    """Make mergekit use this engine's masks of a YAML; the returned counter counts the thinned task vectors."""

    def inject(config: Path) -> dict[str, int]:
        from mergekit import sparsify

        plan, used = plan_of(config), {"thinned": 0}
        recipe = WeightSpace(plan, open_task_vectors(plan, 1))
        seeds: dict[bytes, int] = {}
        for name, taus in task_vectors(plan).items():
            seeds |= {tau.numpy().tobytes(): s for tau, s in zip(taus, recipe.tensor(name).seeds(), strict=True)}
        assert len(seeds) == len(plan.merged) * len(plan.experts)

        def bernoulli(tensor: Tensor, density: float, rescale_norm: Any = None) -> Tensor:
            if density >= 1:
                return tensor
            used["thinned"] += 1
            mask = np.ones(tensor.numel(), dtype=np.float32)
            thinned = Thinned([seeds[tensor.numpy().tobytes()]], [density])
            thinned.apply(0, 0, mask, np.zeros(0, dtype=np.int64))
            return sparsify.rescaled_masked_tensor(tensor, torch.from_numpy(mask).view(tensor.shape), rescale_norm)

        monkeypatch.setattr(sparsify, "bernoulli", bernoulli)
        return used

    return inject


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize(
    ("densities", "top"),
    [
        ((1.0, 1.0, 1.0), {}),
        as_thorough(((1.0, 1.0, 1.0), {"normalize": True, "lambda": 0.4})),
        as_thorough(((0.5, 0.1, 0.9), {})),
        as_thorough(((0.5, 0.1, 0.9), {"rescale": False})),
        ((0.3, 1.0, 0.0), {"normalize": True}),
        ((0.2, 0.4, 0.6), {"lambda": 1.5, "rescale": True, "normalize": False}),
    ],
    ids=str,
)
def test_dare(
    method: str,
    densities: tuple[float, ...],
    top: dict[str, Any],
    models: Path,
    our_masks: Callable[[Path], dict[str, int]],
    record: Record,
) -> None:
    own = [{**settings, "density": density} for settings, density in zip(W, densities, strict=True)]
    keys = {"merge_method": method, "base_model": "base", "dtype": "float32", "parameters": top}
    config = write_config(models, **keys, models=entries(*own))
    used = our_masks(config)
    found = assert_same(config, record)
    assert used["thinned"] == len(found) * sum(density < 1 for density in densities)


@pytest.mark.parametrize(
    "top",
    [
        {"weight": [0.1, 0.9]},
        {"weight": [0, 1, 0.5, 0.2], "lambda": [2, 1]},
        {"weight": [{"filter": "mlp", "value": 0.7}, {"filter": "self_attn", "value": [0.1, 0.5]}, {"value": 0.2}]},
        {"weight": [{"filter": "q_proj", "value": 0.7}, {"filter": "*", "value": 0.3}, {"value": 9}]},
        {"weight": [{"filter": "layers.1.", "value": 0.9}, {"filter": "norm", "value": 0.4}, {"value": 0.1}]},
        {"weight": {"value": 0.25}},
        {"weight": 0.5, "normalize": [True, False]},
        {"weight": 0.5, "normalize": [{"filter": "lm_head", "value": True}], "lambda": {"filter": "up", "value": 3}},
        {"weight": "3e-1", "lambda": ["1e0", 2]},
    ],
    ids=str,
)
@pytest.mark.parametrize("depth", ["models", as_thorough("one_layer")])
def test_settings_of_layers_and_names(
    top: dict[str, Any], depth: str, request: pytest.FixtureRequest, record: Record
) -> None:
    folder = request.getfixturevalue(depth)
    keys = {"merge_method": "task_arithmetic", "base_model": "base", "dtype": "float32"}
    assert_same(write_config(folder, **keys, models=entries({}, {}), parameters=top), record)


MLP = [{"filter": "mlp", "value": 0.9}]
SOURCES = entries({"weight": MLP}, {"weight": [{"filter": "attn", "value": 0.7}]}, {})
SCOPES: dict[str, dict[str, Any]] = {
    "model-over-top": {"models": SOURCES, "parameters": {"weight": 0.25}},
    "slice-over-top": {"slices": {"weight": {"filter": "norm", "value": 0.5}}, "parameters": {"weight": 0.2}},
    "slice-only": {"slices": {"weight": 0.3, "lambda": 0.5}},
    "slice-of-gradients": {"slices": {"weight": [0, 1]}, "parameters": {"normalize": True, "lambda": [1, 2]}},
    "slice-without": {"slices": {}, "parameters": {"weight": [0.2, 0.6]}},
    "a-models-own-lambda-counts-for-nothing": {
        "models": entries({"weight": 0.4, "lambda": 7}, {"weight": 0.2}),
        "parameters": {"lambda": 0.5},
    },
}


@pytest.mark.parametrize("case", SCOPES)
def test_a_models_settings_come_before_its_slices_and_these_before_the_top(
    case: str, models: Path, record: Record
) -> None:
    keys = dict(SCOPES[case])
    if "slices" in keys:
        sources = [{**one, "layer_range": [0, 3]} for one in ({"model": "base"}, *SOURCES)]
        keys["slices"] = [{"sources": sources, "parameters": keys["slices"]}]
    fixed = {"merge_method": "task_arithmetic", "base_model": "base", "dtype": "float32"}
    assert_same(write_config(models, **fixed, **keys), record)


def test_slices_of_linear_without_a_base(models: Path, record: Record) -> None:
    sources = [{**one, "layer_range": [0, 3]} for one in entries({"weight": [0, 1]}, {"weight": [1, 0]})]
    assert_same(write_config(models, merge_method="linear", slices=[{"sources": sources}], dtype="float32"), record)


@pytest.mark.parametrize(
    "kind",
    [
        as_thorough({"family": "llama", "tied": True}),
        as_thorough({"family": "llama", "sharded": True}),
        as_thorough({"family": "qwen2"}),
        {"family": "qwen2", "tied": True, "sharded": True},
        as_thorough({"family": "gemma2", "tied": True}),
        as_thorough({"family": "qwen3"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_kinds_of_checkpoints(method: str, kind: dict[str, Any], tmp_path: Path, record: Record) -> None:
    folder = make_models(tmp_path, experts=2, layers=2, **kind)
    config = write_config(
        folder, merge_method=method, base_model="base", models=entries({}, {}), parameters={"weight": [0.2, 0.7]}
    )
    assert_same(config, record)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_an_expert_with_a_tied_head_of_a_base_without(
    method: str, models: Path, tmp_path: Path, record: Record
) -> None:
    make_models(tmp_path, tied=True, experts=1)
    folders = {"base": models / "base", "expert0": models / "expert0", "expert1": tmp_path / "expert0"}
    for name, folder in folders.items():
        if not (tmp_path / "mixed").exists():
            (tmp_path / "mixed").mkdir()
        (tmp_path / "mixed" / name).symlink_to(folder)
    keys = {"merge_method": method, "base_model": "base", "dtype": "float32", "parameters": {"weight": 0.4}}
    found = assert_same(write_config(tmp_path / "mixed", **keys, models=entries({}, {})), record)
    assert "lm_head.weight" in found


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
@pytest.mark.parametrize(
    ("source", "out"),
    [
        as_thorough(("models", "bfloat16")),
        ("models", "float16"),
        ("halves", "bfloat16"),
        as_thorough(("halves", "float16")),
        as_thorough(("halves", "float32")),
    ],
)
def test_output_dtypes(method: str, source: str, out: str, request: pytest.FixtureRequest, record: Record) -> None:
    """Both compute in float32 and round once, so results differ by one rounding step at most."""
    config = write_config(
        request.getfixturevalue(source),
        merge_method=method,
        base_model="base",
        # With these weights, sums of bfloat16 numbers are rarely half-way between two bfloat16 numbers.
        models=entries({"weight": 0.3171}, {"weight": 0.2237}),
        parameters={"weight": 0.6913},
        dtype="float32",
        out_dtype=out,
    )
    found, expected = ours(config), mergekits(config)
    worst(found, expected)
    bits = {"bfloat16": 8, "float16": 11, "float32": 24}[out]
    rounded = 0
    for name, tensor in expected.items():
        apart = (found[name].double() - tensor.double()).abs()
        limit = (tensor.double().abs() * 2.0 ** (1 - bits) + CLOSE * 2.0 ** (1 - bits)).clamp(min=CLOSE)
        assert not (apart > limit).any(), name
        rounded += int((apart > CLOSE).sum())
    record("rounded", rounded)
    assert rounded <= 1e-3 * sum(tensor.numel() for tensor in expected.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_alone_is_the_outputs(dtype: str, models: Path) -> None:
    """mergekit rounds its inputs and every step to `dtype`; this engine rounds only the result, so it is closer."""
    keys = {"merge_method": "task_arithmetic", "base_model": "base", "models": entries(*W)}
    found, rough = (by(write_config(models, **keys, dtype=dtype)) for by in (ours, mergekits))
    exact = mergekits(write_config(models, **keys, dtype="float32"))
    bits = {"bfloat16": 8, "float16": 11}[dtype]
    for name, tensor in exact.items():
        assert found[name].dtype == rough[name].dtype == getattr(torch, dtype), name
        assert difference(found[name], tensor) <= 2.0**-bits * tensor.abs().max().item() + CLOSE, name
        assert difference(found[name], tensor) <= difference(rough[name], tensor), name
        # Half a rounding step for an input and each of six operations, on numbers up to twice the result.
        assert difference(found[name], rough[name]) <= 8 * 2.0**-bits * 2 * tensor.abs().max().item(), name


def test_without_dtype_a_checkpoints_own_stays(halves: Path) -> None:
    """mergekit's linear computes in float32 for any input dtype and rounds once, as this engine does."""
    config = write_config(halves, merge_method="linear", models=entries({"weight": 0.3}, {"weight": 0.7}))
    found, expected = ours(config), mergekits(config)
    worst(found, expected)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for name, tensor in expected.items():
        apart = (found[name].double() - tensor.double()).abs()
        assert not (apart > 2.0**-7 * tensor.double().abs()).any(), name
        assert (apart > 0).double().mean() < 0.01, name


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """Return a folder with the models and an adapter that fits all of them."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapted")
    for model in ("base", "expert0", "expert1"):
        (folder / model).symlink_to(models / model)
    model = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32)
    built = build(folder / "built", model, r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    built.adapter.rename(folder / "adapter")
    return folder


# Raised by transformers when mergekit merges the adapter with peft.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("carrier", ["base", "expert0"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_a_model_with_an_adapter(method: str, carrier: str, adapted: Path, record: Record) -> None:
    config = write_config(
        adapted,
        merge_method=method,
        base_model="base",
        models=[{"model": f"{carrier}+adapter"}, {"model": "expert1"}],
        parameters={"weight": 0.4},
        dtype="float32",
    )
    found, expected = ours(config), mergekits(config, lora_merge_cache=str(adapted / "cache"))
    apart = worst(found, expected)
    record("apart", apart)
    assert apart <= CLOSE


LIBRARY: dict[str, tuple[str, dict[str, Any]]] = {
    "slerp": ("slerp", {"models": entries({}), "parameters": {"t": 0.3}}), "slerp-gradient": ("slerp", {"models":
    entries({}), "parameters": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]}}), "slerp-base-last":
    ("slerp", {"models": [*entries({}), {"model": "base"}], "parameters": {"t": 0.3}}), "nuslerp": ("nuslerp",
    {"models": entries({"weight": 0.6}, {"weight": 0.2})}), "nuslerp-no-base": ("nuslerp", {"base_model": None,
    "models": entries({"weight": 0.6}, {"weight": 0.2})}), "nuslerp-rows": (
        "nuslerp", {"models": entries({"weight": 1}, {"weight": 2}), "parameters": {"nuslerp_flatten": False,
        "nuslerp_row_wise": True}},
    ),
    "multislerp": ("multislerp", {"models": entries(*W)}),
    "multislerp-no-base": ("multislerp", {"base_model": None, "models": entries({"weight": 1}, {"weight": 0.5})}),
    "karcher": ("karcher", {"base_model": None, "models": entries({}, {}, {})}),
    "karcher-base": ("karcher", {"models": entries({}, {}), "parameters": {"max_iter": 4}}),
    "model_stock": ("model_stock", {"models": entries({}, {}, {})}),
    "model_stock-filters": ("model_stock", {"models": entries({}, {}), "parameters": {"filter_wise": True}}),
    "sce": ("sce", {"models": entries({}, {}, {})}),
    "sce-top": ("sce", {"models": entries({}, {}, {}), "parameters": {"select_topk": 0.2, "int8_mask": True}}),
    "della": ("della", {"models": entries(*W), "parameters": {"density": 1}}),
    "della_linear": ("della_linear", {"models": entries(*W), "parameters": {"density": 1.0, "lambda": 0.6}}),
    "breadcrumbs": ("breadcrumbs", {"models": entries(*W), "parameters": {"density": 0.6, "gamma": 0.05}}),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"models": entries(*W), "parameters": {"density": 0.6}}),
    "nearswap": ("nearswap", {"models": entries({}), "parameters": {"t": 0.02}}),
    "ram": ("ram", {"models": entries({}, {}, {}), "parameters": {"epsilon": 0.03}}),
    "ramplus_tl": ("ramplus_tl", {"models": entries({}, {}, {}), "parameters": {"epsilon": 0.03}}),
    "arcee_fusion": ("arcee_fusion", {"models": entries({})}),
    "passthrough": ("passthrough", {"base_model": None, "models": entries({}), "parameters": {"scale": [0.5, 2]}}),
}  # fmt: skip


@pytest.mark.parametrize("case", thorough_but([case for case in LIBRARY if "-" not in case], LIBRARY))
def test_methods_of_mergekits_library(case: str, models: Path, record: Record) -> None:
    method, keys = LIBRARY[case]
    keys = {"base_model": "base"} | keys
    keys = {key: value for key, value in keys.items() if value is not None}
    assert_same(write_config(models, merge_method=method, dtype="float32", **keys), record)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "slerp", "iso"])
def test_the_bits_do_not_depend_on_shards_and_files(method: str, models: Path, tmp_path: Path) -> None:
    experts = entries(*[{}] if method == "slerp" else [{}, {}])
    parameters = {"slerp": {"t": 0.4}, "iso": {}}.get(method, {"weight": 0.4})
    if method in ("ties", "dare_ties"):
        parameters["density"] = 0.3
    keys = {"merge_method": method, "base_model": "base", "models": experts, "parameters": parameters}
    config = write_config(models, **keys)
    split = write_config(models, **keys, max_shard_size=20_000)
    one, two = (combine(plan_of(split), tmp_path / f"{shards}", shards) for shards in (1, 2))
    files = sorted(path.name for path in one.iterdir())
    assert len(files) > 3 and files == sorted(path.name for path in two.iterdir())
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    whole, parts = ours(config), read(one)
    assert set(whole) == set(parts)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties"])
def test_the_bits_do_not_depend_on_blocks_and_pieces(
    method: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(
        models,
        merge_method=method,
        base_model="base",
        models=entries({}, {}, {}),
        parameters={"weight": 0.4, **({"density": 0.3, "rescale": False} if "ties" in method else {})},
    )
    whole = ours(config)
    cut_small(monkeypatch, 128, 512)
    monkeypatch.setattr(engine.methods.arithmetic.tensor, "ROOM", 512)
    monkeypatch.setattr(engine.methods.arithmetic.tensor, "SMALLEST_BLOCK", 64)
    cut = read(combine(plan_of(config), config.with_suffix(".cut")))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def paper_ties(base: Tensors, taus: dict[str, list[Tensor]], density: float, scale: float) -> Tensors:
    """TIES-Merging, Algorithm 1: top-k of whole task vectors, elected signs, disjoint means; in float64."""
    names = list(taus)
    flat_KN = torch.stack(
        [torch.cat([taus[name][k].double().flatten() for name in names]) for k in range(len(taus[names[0]]))]
    )
    kept = max(1, int(density * flat_KN.shape[1]))
    least = flat_KN.abs().topk(kept, dim=1).values[:, -1:]
    trimmed = torch.where(flat_KN.abs() >= least, flat_KN, 0)
    sign = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agree = trimmed.sign() == sign
    mean = (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
    parts = mean.split([taus[name][0].numel() for name in names])
    return {name: base[name] + scale * part.view(base[name].shape) for name, part in zip(names, parts, strict=True)}


@pytest.mark.parametrize("density", [0.01, 0.2, 0.8])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_ties_of_the_paper(density: float, shards: int, weight: float, tmp_path: Path, record: Record) -> None:
    base, _ = write_arrays(tmp_path, experts=4)
    config = write_config(
        tmp_path,
        merge_method="ties",
        base_model="base",
        models=entries({}, {}, {}, {}),
        parameters={"weight": weight, "density": density, "lambda": 0.7, "trim": "model", "divide_by": "count"},
    )
    expected = paper_ties(base, task_vectors(plan_of(config)), density, 0.7 * weight)
    apart = worst({name: tensor.double() for name, tensor in ours(config, shards).items()}, expected)
    record("apart", apart)
    assert apart <= CLOSE


def test_ties_of_the_paper_keeps_all_that_are_equal(tmp_path: Path) -> None:
    """Many bfloat16 differences are equal to the threshold; all of them are kept, in every tensor."""
    base, _ = write_arrays(tmp_path, experts=3, dtypes=[torch.bfloat16])
    config = write_config(
        tmp_path,
        merge_method="ties",
        base_model="base",
        models=entries({}, {}, {}),
        parameters={"weight": 1, "density": 0.4, "trim": "model", "divide_by": "count"},
        dtype="float32",
    )
    taus = task_vectors(plan_of(config))
    flat = torch.cat([taus[name][0].flatten() for name in taus]).abs()
    least = flat.sort(descending=True).values[int(0.4 * len(flat)) - 1]
    assert (flat >= least).sum() > int(0.4 * len(flat))
    floats = {name: tensor.float() for name, tensor in base.items()}
    expected = paper_ties(floats, taus, 0.4, 1.0)
    assert worst({name: tensor.double() for name, tensor in ours(config).items()}, expected) <= CLOSE


@pytest.mark.parametrize("setting", [{"filter": "mlp", "value": "model"}, ["model", "tensor"]], ids=str)
def test_trim_may_differ_by_tensor(setting: Any, models: Path) -> None:
    """A tensor with `trim: tensor` does not depend on the threshold of the whole model."""
    keys = {"merge_method": "ties", "base_model": "base", "models": entries({}, {})}
    top = {"weight": 0.5, "density": 0.3}
    mixed = ours(write_config(models, **keys, parameters=top | {"trim": setting}))
    of_model, of_tensor = (
        ours(write_config(models, **keys, parameters=top | {"trim": trim})) for trim in ("model", "tensor")
    )
    by_model = {"layers.2." not in name if isinstance(setting, list) else "mlp" in name: name for name in mixed}
    assert set(by_model) == {True, False}
    for name, tensor in mixed.items():
        whole = "layers.2." not in name if isinstance(setting, list) else "mlp" in name
        assert torch.equal(tensor, (of_model if whole else of_tensor)[name]), name


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_scaled_as_in_the_paper(method: str, tmp_path: Path) -> None:
    """τ̂ = m∘τ/(1 − p): every element is dropped or scaled by 1/density."""
    base, experts = write_arrays(tmp_path, experts=1)
    config = write_config(
        tmp_path,
        merge_method=method,
        base_model="base",
        models=entries({"weight": 1, "density": 0.4}),
        parameters={"rescale_by": "density"},
    )
    dropped = numel = 0
    for name, tensor in ours(config).items():
        tau = experts[0][name] - base[name]
        grown = base[name] + tau / 0.4
        gone = tensor == base[name]
        assert difference(torch.where(gone, grown, tensor), grown) <= CLOSE, name
        dropped, numel = dropped + int(gone.sum()), numel + gone.numel()
    # Within five standard deviations of 0.6·n.
    assert abs(dropped - 0.6 * numel) < 5 * (0.24 * numel) ** 0.5


def test_weights_of_linear_that_sum_to_zero_are_refused(models: Path) -> None:
    config = write_config(models, merge_method="linear", models=entries({"weight": 1}, {"weight": -1}))
    with refused(ConfigError, where="weight", do="normalize: false", facts=["zero"]):
        ours(config)
