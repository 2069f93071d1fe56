"""LoRA adapters built by peft: task vectors equal peft's own merge, and everything else is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_images
import torch
from errors import refused
from peft_adapters import Built, assert_equals_peft, build, cuts, gpt2
from reference import module_name
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoints.adapter_file import CONFIG, PREFIX, WEIGHTS
from engine.checkpoints.tensors import Checkpoint
from engine.errors import CheckpointError
from engine.task_vectors.experts import AdapterExpert

Q = "model.layers.1.self_attn.q_proj"
FACTOR = f"{PREFIX}{Q}.lora_A.weight"


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        (6, {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}),
        (21, {"r": 4, "lora_alpha": 3, "target_modules": "all-linear"}),
        (6, {"r": 5, "lora_alpha": 8, "use_rslora": True, "target_modules": ["k_proj", "up_proj"]}),
        (
            9,
            {
                "r": 4,
                "lora_alpha": 8,
                "target_modules": ["q_proj", "v_proj", "gate_proj"],
                "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 3, "layers.2.mlp.gate_proj": 6},
            },
        ),
        (
            6,
            {
                "r": 4,
                "lora_alpha": 8,
                "target_modules": ["q_proj", "v_proj"],
                "alpha_pattern": {r"layers\.[02]\.self_attn\.q_proj": 1, "v_proj": 20, "proj": 99},
            },
        ),
        (
            6,
            {
                "r": 4,
                "lora_alpha": 8,
                "use_rslora": True,
                "target_modules": ["q_proj", "v_proj"],
                "rank_pattern": {"^model.layers.1.self_attn.q_proj": 3, "0.self_attn.v_proj": 1},
                "alpha_pattern": {"q_proj": 5, "self_attn.q_proj": 7},
            },
        ),
        (2, {"r": 4, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]}),
        (3, {"r": 4, "target_modules": r".*layers\.\d\.mlp\.up_proj", "lora_dropout": 0.1}),
        (3, {"r": 4, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"], "task_type": "CAUSAL_LM"}),
        (3, {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
        (3, {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
        (3, {"r": 40, "lora_alpha": 1, "target_modules": ["down_proj"]}),
    ],
    ids=str,
)
def test_a_llama_adapter_equals_peft(tmp_path: Path, changed: int, options: dict[str, Any]) -> None:
    assert_equals_peft(build(tmp_path, tiny.make_model(), **options), changed)


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        (2, {"r": 4, "lora_alpha": 6}),
        (6, {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj"]}),
        (2, {"r": 3, "target_modules": ["c_fc"], "fan_in_fan_out": True, "use_rslora": True}),
        (4, {"r": 4, "target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 2}, "alpha_pattern": {"c_fc": 9}}),
    ],
    ids=str,
)
def test_a_gpt2_adapter_equals_peft(tmp_path: Path, changed: int, options: dict[str, Any]) -> None:
    assert_equals_peft(build(tmp_path, gpt2(), **options), changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_half_precision_are_multiplied_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    built = build(tmp_path, tiny.make_model(), dtype, r=4, target_modules=["q_proj", "down_proj"])
    assert_equals_peft(built, 6)


@pytest.mark.parametrize(
    ("changed", "make", "targets"),
    [
        (4, tiny.make_model, ["embed_tokens", "q_proj"]),
        (4, tiny.make_model, ["lm_head", "q_proj"]),
        (3, lambda: gpt2(tied=False), ["wte", "c_attn"]),
        (2, lambda: tiny.make_model(tied=False), ["embed_tokens", "lm_head"]),
    ],
)
@pytest.mark.parametrize("save", ["factors only", "default"])
def test_an_adapter_of_embedding_or_head_equals_peft(
    tmp_path: Path, changed: int, make: Callable[[], Any], targets: list[str], save: str
) -> None:
    # By default, peft writes an unchanged copy of the base's embedding or head next to the factors.
    options = {"save_embedding_layers": False} if save == "factors only" else {}
    assert_equals_peft(build(tmp_path, make(), r=4, lora_alpha=8, target_modules=targets, save=options), changed)


def test_a_gpt2_adapter_with_a_linear_module_too_is_right_or_refused(tmp_path: Path) -> None:
    # peft writes fan_in_fan_out of the last module, the head: false, although c_proj is a square Conv1D.
    targets = ["attn.c_proj", "lm_head"]
    built = build(tmp_path, gpt2(tied=False), r=4, target_modules=targets, save={"save_embedding_layers": False})
    assert json.loads((built.adapter / CONFIG).read_text())["fan_in_fan_out"] is False
    try:
        built.header()
    except CheckpointError as error:
        assert "fan_in_fan_out" in error.what  # noqa: PT017
    else:
        assert_equals_peft(built, 3)


def test_a_task_vector_may_be_read_in_any_order_and_again(tmp_path: Path) -> None:
    built = build(tmp_path, tiny.make_model(), r=4, target_modules=["q_proj"])
    header = built.header()
    vector = AdapterExpert(Checkpoint(built.adapter, header.tensors), header.pairs, header.whole).task_vector(
        f"{Q}.weight"
    )
    assert vector is not None
    base = built.base_tensors[f"{Q}.weight"].reshape(-1)
    out, again = torch.empty(base.numel()), torch.empty(base.numel())
    vector.block(0, base.numel(), base, out)
    for start, stop in reversed(cuts(base.numel(), 45)):
        vector.block(start, stop, base[start:stop], again[start:stop])
    torch.testing.assert_close(out, again, rtol=0, atol=1e-6)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A plain adapter of rank 4; read only."""
    return build(tmp_path_factory.mktemp("lora"), tiny.make_model(), r=4, target_modules=["q_proj"])


@pytest.fixture
def built(plain: Built, tmp_path: Path) -> Built:
    """A copy of the plain adapter, which a test may damage."""
    adapter = shutil.copytree(plain.adapter, tmp_path / "adapter")
    return replace(plain, adapter=adapter)


def check_refused(built: Built, where: str = "", do: str = "", *, facts: Iterable[str] = ()) -> None:
    """Check that the adapter is refused: `where` is relative to its folder."""
    with refused(CheckpointError, where=str(built.adapter / where), do=do, facts=facts):
        built.header()


def edit_config(built: Built, **changes: Any) -> None:
    path = built.adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(built: Built, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(built.adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, built.adapter / WEIGHTS)


def test_the_undamaged_adapter_is_accepted(built: Built) -> None:
    assert_equals_peft(built, 3)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"peft_type": None}, "peft_type None"),
        ({"a_later_variant": True}, "a_later_variant"),
        ({"a_later_variant": {"on": 1}}, "a_later_variant"),
    ],
)
def test_a_variant_is_refused_by_its_name(built: Built, changes: dict[str, Any], name: str) -> None:
    edit_config(built, **changes)
    check_refused(built, CONFIG, do="merge_and_unload", facts=[name])


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_replication": [[0, 2], [1, 3]]},
        {"lora_bias": True},
        {"megatron_config": {"a": 1}},
        {"alora_invocation_tokens": [5]},
        {"peft_type": "PROMPT_TUNING"},
        {"peft_type": "XLORA"},
    ],
)
def test_a_variant_that_peft_cannot_merge_either_is_refused_without_that_advice(
    built: Built, changes: dict[str, Any]
) -> None:
    edit_config(built, **changes)
    with refused(CheckpointError, CONFIG, facts=[*changes]) as caught:
        built.header()
    assert caught.value.do == ""


def test_an_unknown_key_that_is_switched_off_is_accepted(built: Built) -> None:
    edit_config(built, a_later_variant=False, another=None, a_third=[], a_fourth=0)
    assert_equals_peft(built, 3)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"r": 5}, ["(4, 32)", "rank 5", CONFIG]),
        ({"rank_pattern": {"q_proj": 2}}, ["(4, 32)", "rank 2", CONFIG]),
        ({"r": 0}, ["rank 0", "`r`"]),
        ({"r": "many"}, ["rank 'many'", "`r`"]),
        ({"r": None}, ["rank None", "`r`"]),
        ({"r": float("inf")}, ["rank inf", "`r`"]),
        ({"lora_alpha": None}, ["alpha None", "`lora_alpha`"]),
        ({"rank_pattern": {"(": 2}}, ["rank_pattern"]),
        ({"rank_pattern": ["q_proj"]}, ["rank_pattern"]),
        ({"alpha_pattern": {"q_proj": "x"}}, ["alpha 'x'", "`lora_alpha`"]),
    ],
    ids=str,
)
def test_an_invalid_rank_or_scale_is_refused(built: Built, changes: dict[str, Any], facts: list[str]) -> None:
    edit_config(built, **changes)
    check_refused(built, facts=facts)


def test_an_empty_pair_is_refused(built: Built) -> None:
    edit_config(built, r=0)
    edit_tensors(
        built, lambda t: t.update({n: x[:0] if "lora_A" in n else x[:, :0].contiguous() for n, x in t.items()})
    )
    check_refused(built, facts=["rank 0"])


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_one_factor_without_the_other_is_refused(built: Built, factor: str) -> None:
    edit_tensors(built, lambda tensors: tensors.pop(f"{PREFIX}{Q}.{factor}.weight"))
    check_refused(built, WEIGHTS, facts=[repr(Q)])


def test_a_target_that_the_base_lacks_is_named(built: Built) -> None:
    def move(tensors: dict[str, Tensor]) -> None:
        for factor in ("lora_A", "lora_B"):
            tensors[f"{PREFIX}{Q.replace('.1.', '.7.')}.{factor}.weight"] = tensors.pop(f"{PREFIX}{Q}.{factor}.weight")

    edit_tensors(built, move)
    check_refused(built, do="base", facts=["'model.layers.7.self_attn.q_proj.weight'"])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (FACTOR, (4, 16)),
        (FACTOR, (4,)),
        (FACTOR, (4, 8, 4)),
        (FACTOR, ()),
        (FACTOR.replace("_A", "_B"), (32, 5)),
        (FACTOR.replace("_A", "_B"), (16, 4)),
        (FACTOR.replace("_A", "_B"), (128,)),
    ],
)
def test_factors_that_do_not_fit_the_base_are_named(built: Built, name: str, shape: tuple[int, ...]) -> None:
    edit_tensors(built, lambda tensors: tensors.update({name: torch.ones(shape)}))
    check_refused(built, facts=[Q, str(shape), "expected: "])


@pytest.mark.parametrize(
    "name",
    [f"{PREFIX}{Q}.lora_magnitude_vector", f"{PREFIX}{Q}.lora_B.bias", f"{Q}.lora_A.weight", f"{PREFIX}lm_head.bias"],
)
def test_a_tensor_other_than_a_factor_is_named(built: Built, name: str) -> None:
    edit_tensors(built, lambda tensors: tensors.update({name: torch.ones(2)}))
    check_refused(built, WEIGHTS, facts=[repr(name)])


def test_an_adapter_without_tensors_is_refused(built: Built) -> None:
    edit_tensors(built, lambda tensors: tensors.clear())
    check_refused(built, WEIGHTS)


def test_a_pickled_adapter_is_refused(built: Built) -> None:
    (built.adapter / WEIGHTS).rename(built.adapter / "adapter_model.bin")
    check_refused(built, do="save_pretrained", facts=[WEIGHTS])


def test_a_truncated_adapter_is_named(built: Built) -> None:
    path = built.adapter / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    check_refused(built, WEIGHTS, facts=["safetensors file"])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"peft_type": "LORA"'])
def test_an_invalid_adapter_config_is_named(built: Built, content: str) -> None:
    (built.adapter / CONFIG).write_text(content)
    check_refused(built, CONFIG, facts=["JSON"])


@pytest.mark.parametrize("family", tiny_images.FAMILIES)
def test_an_adapter_of_a_multimodal_model_uses_module_names_that_differ_from_the_files(
    tmp_path: Path, family: str
) -> None:
    model = tiny_images.make_model(family)
    options = {"r": 4, "lora_alpha": 8, "target_modules": r".*language_model.*(q_proj|down_proj)|.*projector.*linear_1"}
    built = build(tmp_path, model, **options)
    tiny_images.save(model, built.base, family)
    files = load_file(built.base / "model.safetensors")
    merged = {name: built.merged_tensors[module_name(name, model.config.model_type)] for name in files}
    projectors = sum(name.endswith("projector.linear_1.weight") for name in files)
    assert_equals_peft(replace(built, base_tensors=files, merged_tensors=merged), 6 + projectors)
