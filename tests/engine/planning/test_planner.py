"""The plan: merged tensors, dtypes, models and slices, and the mismatches of base and experts found in headers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import tiny
import torch
from conftest import plan_of
from errors import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoints.headers import ModelHeader, TensorHeader
from engine.config.schema import Config
from engine.errors import CalibrationError, CheckpointError, ConfigError, MergeError
from engine.planning.factors import stored_dtype
from engine.planning.plan import ModelPlan, Plan, in_order_of_use, slices

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)
LINEAR = [
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]  # fmt: skip
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def config(llama_merge: Path, tmp_path: Path) -> Path:
    """Return a writable copy of the merge.yaml of two Llama experts and of its models."""
    return shutil.copytree(llama_merge.parent, tmp_path / "merge") / "merge.yaml"


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    changed = {key: value for key, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(changed))


def test_a_plan_says_where_everything_is(llama_merge: Path) -> None:
    plan = plan_of(llama_merge)
    folder = llama_merge.parent.resolve()
    assert plan.base.model == str(folder / "base")
    assert [(e.name, e.model, e.kind, e.weight, e.loss_weight, e.calibration, e.samples) for e in plan.experts] == [
        (
            f"expert{k}",
            str(folder / f"expert{k}"),
            "checkpoint",
            pytest.approx(0.2 + 0.1 * k),
            1.0,
            (folder / f"expert{k}.jsonl",),
            5,
        )
        for k in range(2)
    ]
    assert plan.base_header.folder == folder / "base"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_by_default_the_weights_of_the_blocks_linear_layers_are_merged(tmp_path: Path, family: str) -> None:
    config = tiny.make_merge(tmp_path / "merge", family, experts=1)
    plan = plan_of(config)
    assert sorted(plan.merged) == sorted(f"model.layers.{i}.{name}.weight" for i in range(3) for name in LINEAR)
    assert list(plan.merged) == [name for name in plan.base_header.tensors if name in plan.merged_set]
    tensors = load_file(config.parent / "base" / "model.safetensors")
    assert plan.numels == {name: tensors[name].numel() for name in plan.merged}
    assert plan.merged_bytes == sum(tensors[name].nbytes for name in plan.merged)


@pytest.mark.parametrize(
    ("exclude", "count"),
    [
        ("[]", 30),
        ("[norm]", 30),
        ("['.*norm']", 23),
        ("[lm_head]", 29),
        (r"['.*layers\.[01]\.']", 12),
        ("['.*q_proj', '.*k_proj']", 24),
    ],
)
def test_patterns_match_from_the_start_of_a_name(llama_merge: Path, exclude: str, count: int) -> None:
    assert len(plan_of(llama_merge, f"exclude={exclude}").merged) == count


def test_tensors_that_are_no_floats_or_empty_are_not_merged(config: Path) -> None:
    for model in ("base", "expert0", "expert1"):
        edit_tensors(
            config.parent / model, lambda t: t.update(a=torch.ones(3, dtype=torch.int64), b=torch.ones(0), c=t[Q] * 1)
        )
    plan = plan_of(config)
    assert {"a", "b", "c"} & plan.merged_set == {"c"}
    assert plan.out_dtype("a") == "I64"
    assert plan_of(config, "out_dtype=float16").out_dtype("a") == "I64"


def test_excludes_that_leave_nothing_are_a_fault(llama_merge: Path) -> None:
    with refused(ConfigError, do=".*weight, .*bias", facts=["`exclude`"]):
        plan_of(llama_merge, "exclude=['.*weight', '.*bias']")


@pytest.mark.parametrize(
    ("stored", "dtype", "out"),
    # Small gradients become 0 in float16.
    [("float32", "float32", "F32"), ("bfloat16", "bfloat16", "BF16"), ("float16", "bfloat16", "F16")],
)
def test_the_dtype_is_by_default_the_base_checkpoints(tmp_path: Path, stored: str, dtype: str, out: str) -> None:
    plan = plan_of(tiny.make_merge(tmp_path / "merge", experts=1, dtype=getattr(torch, stored)))
    assert (plan.dtype, plan.out_dtype(Q), stored_dtype(plan)) == (dtype, out, "F32" if dtype == "float32" else "BF16")
    assert plan.merged_bytes == sum(plan.numels.values()) * getattr(torch, dtype).itemsize


def test_float16_is_computed_in_where_the_config_says_so_with_a_remark(tmp_path: Path) -> None:
    config = tiny.make_merge(tmp_path / "merge", experts=1, dtype=torch.float16)
    plan = plan_of(config, "dtype=float16")
    assert (plan.dtype, plan.out_dtype(Q)) == ("float16", "F16")
    ((_, remark),) = plan.remarks
    assert "`dtype: bfloat16`" in remark and "`out_dtype: float16`" in remark
    advised = plan_of(config, "dtype=bfloat16", "out_dtype=float16")
    assert (advised.dtype, advised.out_dtype(Q), advised.remarks) == ("bfloat16", "F16", ())


@pytest.mark.parametrize(
    ("overrides", "dtype", "out"),
    [
        (["dtype=bfloat16"], "bfloat16", "BF16"),
        (["out_dtype=float16"], "float32", "F16"),
        (["dtype=bfloat16", "out_dtype=float32"], "bfloat16", "F32"),
    ],
)
def test_a_dtype_of_the_config_goes_first(llama_merge: Path, overrides: list[str], dtype: str, out: str) -> None:
    plan = plan_of(llama_merge, *overrides)
    assert (plan.dtype, plan.out_dtype(Q), plan.out_dtype("lm_head.weight")) == (dtype, out, out)


def test_the_dtype_is_the_one_of_most_bytes(config: Path) -> None:
    edit_tensors(config.parent / "base", lambda t: t.update({n: x.half() for n, x in t.items() if "mlp" in n}))
    assert plan_of(config).dtype == "float32"
    edit_tensors(config.parent / "base", lambda t: t.update({n: x.half() for n, x in t.items() if "layers" in n}))
    plan = plan_of(config)
    assert (plan.dtype, plan.out_dtype(Q), plan.out_dtype("lm_head.weight")) == ("bfloat16", "F16", "F32")


def test_a_base_without_floats_is_a_fault(config: Path) -> None:
    for model in ("base", "expert0", "expert1"):
        edit_tensors(config.parent / model, lambda t: t.update({n: x.double() for n, x in t.items()}))
    with refused(MergeError):
        plan_of(config)


@pytest.mark.parametrize(
    ("given", "indices"),
    [("middle", (1,)), ("all", (0, 1, 2, 3)), ("[3, 0, 3]", (0, 3)), ("[]", ()), ("[2]", (2,))],
)
def test_hidden_layers_are_indices_into_hidden_states(llama_merge: Path, given: str, indices: tuple[int, ...]) -> None:
    assert plan_of(llama_merge, f"parameters.hidden_layers={given}").hidden_layers == indices


@pytest.mark.parametrize("given", ["[4]", "[1, 4, 9]", "[-1]"])
def test_hidden_layers_out_of_range_are_a_fault(llama_merge: Path, given: str) -> None:
    with refused(ConfigError, facts=["`hidden_layers`", "-1" if "-" in given else "4", "0 to 3", "3 blocks"]):
        plan_of(llama_merge, f"parameters.hidden_layers={given}")


def test_a_base_without_its_number_of_blocks_is_a_fault(config: Path) -> None:
    edit_config(config.parent / "base", num_hidden_layers=None)
    with refused(CheckpointError, where=str(config.parent / "base"), facts=["config.json", "num_hidden_layers"]):
        plan_of(config)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda t: t.pop(Q), ["lacks 1 ", repr(Q)]),
        (lambda t: t.update(extra=torch.ones(2)), ["has 1 ", "'extra'"]),
        (lambda t: t.update(renamed=t.pop(Q)), ["lacks 1 ", repr(Q), "has 1 ", "'renamed'"]),
        (lambda t: [t.pop(name) for name in list(t) if "layers.2" in name], ["lacks 9 ", "'model.layers.2."]),
        (lambda t: t.update({Q: t[Q][:16].contiguous()}), [repr(Q), "(16, 32)", "(32, 32)"]),
        (lambda t: t.update({Q: t[Q].T[None].contiguous()}), [repr(Q), "(1, 32, 32)"]),
        (lambda t: t.update({"lm_head.weight": torch.ones(65, 32)}), ["'lm_head.weight'", "(65, 32)"]),
        (lambda t: t.update({Q: t[Q].to(torch.int8)}), [repr(Q), "I8", "F32"]),
    ],
    ids=["lacks", "adds", "renames", "fewer blocks", "shape", "dimensions", "excluded tensor", "type"],
)
def test_an_expert_with_other_tensors_is_refused(config: Path, change: Any, facts: list[str]) -> None:
    edit_tensors(config.parent / "expert1", change)
    with refused(CheckpointError, facts=facts) as caught:
        plan_of(config)
    assert caught.value.where == f"expert 'expert1' ({(config.parent / 'expert1').resolve()})"


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"model_type": "mistral"}, ["LlamaForCausalLM (mistral)"]),
        ({"model_type": None, "architectures": None}, ["? (?)"]),
        ({"vocab_size": 65}, ["65 tokens", "64", "`tokenizer_source: base`"]),
    ],
)
def test_an_expert_of_another_architecture_is_refused(config: Path, changes: dict[str, Any], facts: list[str]) -> None:
    edit_config(config.parent / "expert0", **changes)
    with refused(CheckpointError, where="expert 'expert0' (", facts=facts):
        plan_of(config)


@pytest.mark.parametrize("architectures", [None, [], ["FSDPLlamaForCausalLM"]], ids=str)
def test_the_type_of_a_model_counts_not_the_names_of_its_classes(config: Path, architectures: Any) -> None:
    edit_config(config.parent / "expert0", architectures=architectures)
    assert plan_of(config).merged


@pytest.mark.parametrize("architectures", [5, {"a": 1}, True])
def test_an_architecture_that_is_none_is_a_fault(config: Path, architectures: Any) -> None:
    edit_config(config.parent / "expert0", architectures=architectures)
    with refused(CheckpointError, facts=["expert0"]):
        plan_of(config)


def test_floats_of_different_precision_fit(config: Path) -> None:
    edit_tensors(config.parent / "expert0", lambda t: t.update({n: x.bfloat16() for n, x in t.items()}))
    plan = plan_of(config)
    assert plan.dtype == "float32" and isinstance(plan.experts[0].header, ModelHeader)
    assert plan.experts[0].header.tensors[Q].dtype == "BF16"


def test_experts_may_be_cut_into_other_files_than_the_base(config: Path) -> None:
    folder = config.parent / "expert0"
    shutil.rmtree(folder)
    tiny.save(tiny.make_expert(tiny.make_model(), seed=1), folder, sharded=True)
    plan = plan_of(config)
    assert isinstance(plan.experts[0].header, ModelHeader)
    assert set(plan.experts[0].header.tensors) == set(plan.base_header.tensors)


@pytest.mark.parametrize("file", ["none.jsonl", "base", "~no-such-user/a.jsonl", "x" * 300])
def test_a_missing_calibration_file_is_reported_with_its_expert(llama_merge: Path, file: str) -> None:
    with refused(CalibrationError, where=file.partition("/")[0], facts=["'expert1'"]):
        plan_of(llama_merge, f'models.1.calibration="{file}"')


@pytest.mark.parametrize("key", ["base_model", "models.0.model"])
def test_a_missing_model_is_reported(llama_merge: Path, key: str) -> None:
    with refused(CheckpointError) as caught:
        plan_of(llama_merge, f"{key}=../none")
    assert caught.value.where == str(llama_merge.parent.parent.resolve() / "none")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token": "\\ud800"}'])
@pytest.mark.parametrize("method", ["linear", "expert_merging"])
def test_a_tokenizer_source_with_damaged_files_is_refused(
    llama_merge: Path, tmp_path: Path, name: str, content: str, method: str
) -> None:
    folder = shutil.copytree(llama_merge.parent / "base", tmp_path / "source")
    (folder / name).write_text(content)
    with refused(CheckpointError, where=str(folder / name)):
        plan_of(llama_merge, f"tokenizer_source={folder}", f"merge_method={method}")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "vocab.bpe"])
def test_a_tokenizer_source_with_a_link_out_of_it_is_refused(llama_merge: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/etc/passwd")
    with refused(CheckpointError, where=str(tmp_path / name), do="link", facts=["/etc/passwd"]):
        plan_of(llama_merge, f"tokenizer_source={tmp_path}")


def write_adapter(folder: Path) -> None:
    folder.mkdir()
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(options))
    module = f"base_model.model.{Q.removesuffix('.weight')}"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(32, 2)}
    save_file(factors, folder / "adapter_model.safetensors")


def test_the_tokenizer_of_a_model_with_an_adapter_is_that_of_the_model(config: Path) -> None:
    write_adapter(config.parent / "adapter")
    plan = plan_of(config, "tokenizer_source=expert0+adapter")
    assert plan.tokenizer == str(config.parent / "expert0")


def test_the_kind_of_task_vectors_follows_from_the_experts_unless_it_is_given(config: Path) -> None:
    write_adapter(config.parent / "adapter")

    def kind(*overrides: str) -> str:
        return plan_of(config, *overrides).config.parameters.task_vectors

    automatic = "parameters.task_vectors=auto"
    assert kind(automatic) == "swudi"
    assert kind(automatic, "models.0.model=adapter") == "orthogonal"
    assert kind("parameters.task_vectors=swudi", "models.0.model=adapter") == "swudi"
    assert kind("parameters.task_vectors=whole") == "whole"


def test_an_adapter_may_be_an_expert_and_not_a_base(config: Path) -> None:
    write_adapter(config.parent / "adapter")
    plan = plan_of(config, "models.0.model=adapter")
    assert [expert.kind for expert in plan.experts] == ["adapter", "checkpoint"]
    assert plan.merged == plan_of(config).merged
    with refused(CheckpointError, where=str(config.parent / "adapter")):
        plan_of(config, "base_model=adapter")


def test_a_plan_names_a_hub_model_with_its_commit(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = config.parent.parent / "cache"
    repository = cache / "models--owner--name"
    (repository / "snapshots").mkdir(parents=True)
    (config.parent / "expert0").rename(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    plan = plan_of(config, "models.0.model=owner/name@main")
    assert (plan.experts[0].model, plan.experts[0].name) == (f"owner/name@{commit}", "name")


def plan_over(numels: list[int]) -> Plan:
    """Return a plan over tensors of these sizes, without files."""
    tensors = {f"t{i}": TensorHeader(f"t{i}", (numel,), "F32", "model.safetensors") for i, numel in enumerate(numels)}
    expert = {"model": "e", "name": "e", "calibration": ["e.jsonl"]}
    config = Config.model_validate({"merge_method": "expert_merging", "base_model": "b", "models": [expert]})
    base = ModelPlan("b", ModelHeader(Path("b"), {}, tensors))
    return Plan(config, base, experts=(), merged=tuple(tensors), dtype="float32", hidden_layers=())


@PROPERTY
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=40), st.integers(1, 12))
def test_slices_hold_every_tensor_once_in_order_and_are_balanced(numels: list[int], count: int) -> None:
    plan = plan_over(numels)
    parts = slices(plan, count)
    assert len(parts) == count
    assert sorted(name for part in parts for name in part) == sorted(plan.merged)
    assert all(list(part) == [name for name in plan.merged if name in part] for part in parts)
    loads = [sum(plan.numels[name] for name in part) for part in parts]
    assert max(loads) - min(loads) <= max(numels)


def test_slices_of_equal_tensors_are_equal() -> None:
    assert [len(part) for part in slices(plan_over([7] * 12), 4)] == [3, 3, 3, 3]
    assert slices(plan_over([5, 9]), 3) == [("t1",), ("t0",), ()]


def test_slices_do_not_depend_on_anything_but_the_tensors(llama_merge: Path) -> None:
    plan = plan_of(llama_merge)
    assert slices(plan, 3) == slices(plan_of(llama_merge, "seed=5"), 3)
    assert slices(plan, 1) == [plan.merged]


def test_names_are_in_the_order_of_the_blocks() -> None:
    wanted = [
        "model.embed_tokens.weight",
        *(f"model.layers.{block}.{part}.weight" for block in range(23) for part in ("mlp.up_proj", "self_attn.q_proj")),
        "model.norm.weight",
    ]
    # Files often list block 10 before block 2.
    assert sorted(wanted) != wanted
    assert in_order_of_use(sorted(wanted)) == wanted


@PROPERTY
@given(st.lists(st.text(alphabet="ab.01٣²½Ⅷ9é", max_size=8) | st.text(max_size=6), max_size=12))
def test_any_names_have_an_order_that_depends_on_nothing_else(names: list[str]) -> None:
    ordered = in_order_of_use(names)
    assert sorted(ordered) == sorted(names)
    assert in_order_of_use(ordered) == ordered
    # Equal numbers that are written differently (07 and 7) keep the given order.
    if len({re.sub(r"\d+", lambda number: str(int(number[0])), name) for name in names}) == len(set(names)):
        assert in_order_of_use(sorted(names)) == ordered


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["parameters.budget=0.04"], ["0.04", "21", "0.0476"]),
        (["parameters.budget=0.99", "parameters.kappa=0"], ["0.99", "21", "at least 1"]),
        (["parameters.budget=1e6"], ["1e+06", "21,000,000"]),
    ],
    ids=["no chunk", "no chunk if all are alike", "more chunks than elements"],
)
def test_a_budget_that_no_importance_can_satisfy(llama_merge: Path, overrides: list[str], facts: list[str]) -> None:
    with refused(ConfigError, where="parameters.budget", do="`budget`", facts=facts):
        plan_of(llama_merge, *overrides)
    plan_of(llama_merge, *overrides, "merge_method=expert_merging")


@pytest.mark.parametrize("overrides", [["budget=0.05"], ["budget=1", "kappa=0"]])
def test_a_budget_that_some_importance_satisfies(llama_merge: Path, overrides: list[str]) -> None:
    plan_of(llama_merge, *(f"parameters.{override}" for override in overrides))
