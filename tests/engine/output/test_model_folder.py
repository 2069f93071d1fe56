"""The output's files: bits after reading back, distribution of tensors by the base alone, and the companion files."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from conftest import plan_of
from errors import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from engine.checkpoints.headers import BYTES, FLOATS, ModelHeader, TensorHeader, read_model_header
from engine.checkpoints.writer import OutputFile, OutputTensor, torch_dtype, write_file
from engine.config.reader import parse_config
from engine.errors import CheckpointError
from engine.output.model_folder import output_files, write_companions
from engine.planning.plan import ModelPlan, Plan
from engine.storage.local_folder import LocalFolder

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TENSORS = {
    "embed.weight": ((10, 4), "F32"),
    "layers.0.weight": ((4, 4), "F32"),
    "layers.0.bias": ((4,), "BF16"),
    "layers.1.weight": ((4, 4), "F16"),
    "steps": ((3,), "I64"),
    "scalar": ((), "F32"),
}
SIZES = {
    "embed.weight": 160,
    "layers.0.weight": 64,
    "layers.0.bias": 8,
    "layers.1.weight": 32,
    "steps": 24,
    "scalar": 4,
}


def plan_with(config: Mapping[str, Any] | None = None, **options: Any) -> Plan:
    """A plan over a base of TENSORS whose config.json is `config`; `options` are the merge's."""
    raw = {"merge_method": "expert_merging", "base_model": "base", **options}
    raw.setdefault("models", [{"model": "expert", "calibration": "x.jsonl"}])
    tensors = {name: TensorHeader(name, shape, dtype, "model.safetensors") for name, (shape, dtype) in TENSORS.items()}
    base = ModelPlan("base", ModelHeader(Path("base"), dict(config or {}), tensors))
    merged = ("layers.0.weight", "layers.1.weight")
    return Plan(parse_config(raw, Path("merge.yaml")), base, (), merged, "float32", (1,))


def entry(name: str, tensor: Tensor, code: str) -> OutputTensor:
    return OutputTensor(name, tuple(tensor.shape), code, tensor.nbytes)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def named_tensors(draw: st.DrawFn) -> dict[str, tuple[Tensor, str]]:
    """Tensors of random bytes."""
    names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
    tensors = {}
    for name in draw(st.lists(names, unique=True, max_size=6)):
        code = draw(st.sampled_from(sorted(TORCH)))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        size = math.prod(shape) * TORCH[code].itemsize
        content = (
            [byte % 2 for byte in range(size)] if code == "BOOL" else draw(st.binary(min_size=size, max_size=size))
        )
        data = torch.tensor(list(content), dtype=torch.uint8)
        tensors[name] = (data.view(TORCH[code]).reshape(shape) if size else torch.empty(shape, dtype=TORCH[code]), code)
    return tensors


@settings(deadline=None, max_examples=80)
@given(named_tensors(), st.integers(1, 30))
def test_tensors_written_in_parts_are_read_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[Tensor, str]], size: int
) -> None:
    folder = tmp_path_factory.mktemp("written")
    file = OutputFile("model.safetensors", tuple(entry(name, *tensor) for name, tensor in tensors.items()))

    def parts(one: OutputTensor) -> list[Tensor]:
        flat = tensors[one.name][0].reshape(-1)
        return [flat[start : start + size] for start in range(0, len(flat), size)]

    write_file(LocalFolder(folder), file, parts)
    with safe_open(folder / file.name, framework="pt") as read:
        assert set(read.keys()) == set(tensors)
        assert read.metadata() == {"format": "pt"}
        for name, (tensor, code) in tensors.items():
            found = read.get_tensor(name)
            assert read.get_slice(name).get_dtype() == code
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert bits(found) == bits(tensor)


@pytest.mark.parametrize("length", range(1, 10))
def test_the_data_begin_at_a_multiple_of_eight_bytes(tmp_path: Path, length: int) -> None:
    tensor = torch.arange(3.0)
    write_file(LocalFolder(tmp_path), OutputFile("x", (entry("n" * length, tensor, "F32"),)), lambda _: [tensor])
    content = (tmp_path / "x").read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert header % 8 == 0
    assert len(content) == 8 + header + 12
    assert json.loads(content[8 : 8 + header])["n" * length]["data_offsets"] == [0, 12]


def test_tensors_are_requested_once_in_order_and_their_parts_one_by_one(tmp_path: Path) -> None:
    asked: list[str] = []
    alive: list[weakref.ref[Tensor]] = []

    def parts(one: OutputTensor) -> Iterator[Tensor]:
        asked.append(one.name)
        for row in range(2):
            # Only the previous part may still be referenced, by the loop that is about to release it.
            assert sum(part() is not None for part in alive) <= 1
            part = torch.full((3,), len(asked) + row / 10)
            alive.append(weakref.ref(part))
            yield part

    names = ["b", "a", "c"]
    file = OutputFile("x", tuple(OutputTensor(name, (2, 3), "F32", 24) for name in names))
    write_file(LocalFolder(tmp_path), file, parts)
    assert asked == names
    with safe_open(tmp_path / "x", framework="pt") as read:
        for number, name in enumerate(names, start=1):
            wanted = torch.tensor([[number], [number + 0.1]]).expand(2, 3)
            assert torch.equal(read.get_tensor(name), wanted)


@pytest.mark.parametrize("rows", [1, 3])
def test_parts_that_are_not_the_whole_tensor_are_refused(tmp_path: Path, rows: int) -> None:
    file = OutputFile("x", (entry("not-whole", torch.zeros(2, 3), "F32"),))
    with pytest.raises(AssertionError, match="not-whole"):
        write_file(LocalFolder(tmp_path), file, lambda _: [torch.zeros(rows, 3)])
    assert list(tmp_path.iterdir()) == [], "the incomplete file is removed"


def test_a_view_is_written_in_its_own_order(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    write_file(LocalFolder(tmp_path), OutputFile("x", (entry("view", whole[1:3].T, "F32"),)), lambda _: [whole[1:3].T])
    with safe_open(tmp_path / "x", framework="pt") as read:
        assert torch.equal(read.get_tensor("view"), whole[1:3].T)


def test_a_small_base_is_one_file_in_its_order() -> None:
    (file,) = output_files(plan_with())
    assert file.name == "model.safetensors"
    assert [(one.name, one.shape, one.dtype) for one in file.tensors] == [(n, *TENSORS[n]) for n in TENSORS]
    assert {one.name: one.nbytes for one in file.tensors} == SIZES


@pytest.mark.parametrize(
    ("limit", "groups"),
    [
        (292, [[*TENSORS]]),
        (291, [["embed.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight", "steps"], ["scalar"]]),
        (160, [["embed.weight"], ["layers.0.weight", "layers.0.bias", "layers.1.weight", "steps", "scalar"]]),
        (72, [["embed.weight"], ["layers.0.weight", "layers.0.bias"], ["layers.1.weight", "steps", "scalar"]]),
        (1, [[name] for name in TENSORS]),
    ],
)
def test_files_are_filled_up_to_their_limit_or_hold_one_tensor(limit: int, groups: list[list[str]]) -> None:
    files = output_files(plan_with(), limit)
    assert [[one.name for one in file.tensors] for file in files] == groups
    if len(groups) > 1:
        count = len(groups)
        assert [file.name for file in files] == [
            f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)
        ]


def test_files_depend_on_the_base_alone() -> None:
    others = [
        plan_with(merge_method="expert_merging_pp"),
        plan_with(models=[{"model": f"e{k}", "calibration": "x.jsonl"} for k in range(5)], seed=9),
        plan_with(parameters={"budget": 3.0}, cluster={"shards": 7}),
    ]
    for limit in (1, 100, 10**9):
        assert all(output_files(other, limit) == output_files(plan_with(), limit) for other in others)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"F32": "F32", "BF16": "BF16", "F16": "F16"}),
        ({"dtype": "bfloat16"}, {"F32": "BF16", "BF16": "BF16", "F16": "BF16"}),
        ({"dtype": "bfloat16", "out_dtype": "float16"}, {"F32": "F16", "BF16": "F16", "F16": "F16"}),
        ({"out_dtype": "float32"}, {"F32": "F32", "BF16": "F32", "F16": "F32"}),
    ],
    ids=str,
)
def test_floats_are_written_in_the_requested_dtype_and_others_unchanged(
    options: dict[str, str], wanted: dict[str, str]
) -> None:
    (file,) = output_files(plan_with(**options))
    for one in file.tensors:
        own = TENSORS[one.name][1]
        assert one.dtype == wanted.get(own, own)
        assert one.nbytes == math.prod(one.shape) * BYTES[one.dtype]


def test_dtypes_of_torch_by_their_codes() -> None:
    assert {code: torch_dtype(code) for code in FLOATS} == {code: TORCH[code] for code in FLOATS}
    assert torch_dtype("I64") is None


def test_several_files_have_an_index_and_one_has_none(tmp_path: Path) -> None:
    plan = plan_with()
    write_companions(tmp_path, plan, tmp_path, output_files(plan))
    assert not (tmp_path / "model.safetensors.index.json").exists()
    files = output_files(plan, 160)
    write_companions(tmp_path, plan, tmp_path, files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(SIZES.values())}
    assert index["weight_map"] == {one.name: file.name for file in files for one in file.tensors}


def test_a_folder_of_several_files_is_a_valid_checkpoint(tmp_path: Path) -> None:
    plan = plan_with({"model_type": "llama"})
    files = output_files(plan, 72)
    for file in files:
        write_file(LocalFolder(tmp_path), file, lambda one: [torch.ones(one.shape, dtype=TORCH[one.dtype])])
    write_companions(tmp_path, plan, tmp_path, files)
    header = read_model_header(tmp_path)
    assert {name: (one.shape, one.dtype) for name, one in header.tensors.items()} == TENSORS
    assert list(header.tensors) == list(TENSORS)


@pytest.mark.parametrize(
    ("options", "config", "wanted"),
    [
        ({}, {"torch_dtype": "float16", "x": 1}, {"torch_dtype": "float16", "x": 1}),
        ({}, {"dtype": "float32"}, {"dtype": "float32"}),
        ({"dtype": "bfloat16"}, {"torch_dtype": "float32", "x": 1}, {"dtype": "bfloat16", "x": 1}),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"dtype": "bfloat16", "out_dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "float32"}),
    ],
)
def test_the_config_names_the_dtype_of_the_output(
    tmp_path: Path, options: dict[str, str], config: dict[str, Any], wanted: dict[str, Any]
) -> None:
    plan = plan_with(config, **options)
    write_companions(tmp_path, plan, tmp_path, output_files(plan))
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == wanted
    assert plan.base_header.config == config


def test_the_config_names_no_implementation(tmp_path: Path) -> None:
    keys = {"attn_implementation": "owner/kernel", "_attn_implementation": "eager", "experts_implementation": "eager"}
    config = {
        "x": 1,
        "attention_bias": False,
        **keys,
        "text_config": {"y": [2], "_experts_implementation": "z", **keys},
    }
    plan = plan_with(config)
    write_companions(tmp_path, plan, tmp_path, output_files(plan))
    wanted = {"x": 1, "attention_bias": False, "text_config": {"y": [2]}}
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == wanted


def test_companion_files_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    companions = [
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json",
        "generation_config.json", "preprocessor_config.json", "processor_config.json", "LICENSE", "LICENSE.txt",
        "tekken.json", "qwen.tiktoken", "tokenizer.model.v3", "additional_chat_templates/tools.jinja",
    ]  # fmt: skip
    others = [
        "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
        "training_args.bin", "optimizer.pt", "modeling_custom.py", "README.md", "tokenizer.safetensors", "vocab.bin",
        "tokenizer.env", "chat_template.html", "vocab.secret", "id_rsa.model", "LICENSE.key", "tokenizer",
        "additional_chat_templates/secret.env", "tokenizer.model.vx",
    ]  # fmt: skip
    (base / "additional_chat_templates").mkdir()
    for name in companions + others:
        (base / name).write_bytes(name.encode())
    (base / "tokenizer.d").mkdir()
    plan = plan_with({"model_type": "llama"})
    write_companions(out, plan, base, output_files(plan))
    copied = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert copied | {"config.json": b""} == {name: name.encode() for name in companions} | {"config.json": b""}


@pytest.mark.parametrize("name", ["vocab.bpe", "tokenizer_config.json", "LICENSE", "chat_template.jinja"])
@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_links_out_of_a_folder_are_not_copied(tmp_path: Path, name: str, own_tokenizer: bool) -> None:
    base, out, tokenizer = (tmp_path / folder for folder in ("base", "out", "tokenizer"))
    for folder in (base, out, tokenizer):
        folder.mkdir()
    (tmp_path / "secret").write_text("PRIVATE KEY")
    source = tokenizer if own_tokenizer and name != "LICENSE" else base
    (source / name).symlink_to(tmp_path / "secret")
    plan = plan_with({"model_type": "llama"})
    with refused(CheckpointError, where=str(source / name), do="link", facts=[str(tmp_path / "secret")]):
        write_companions(out, plan, base, output_files(plan), tokenizer if own_tokenizer else None)
    assert not (out / name).exists()


def test_links_inside_a_folder_are_copied_as_files(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    (base / "real.json").write_text("{}")
    (base / "vocab.json").symlink_to("real.json")
    plan = plan_with({"model_type": "llama"})
    write_companions(out, plan, base, output_files(plan))
    assert (out / "vocab.json").read_text() == "{}" and not (out / "vocab.json").is_symlink()


def test_a_real_base_is_written_whole(llama_merge: Path, tmp_path: Path) -> None:
    plan = plan_of(llama_merge)
    base_folder = plan.base_header.folder
    files = output_files(plan, 20_000)
    assert len(files) > 2
    with safe_open(base_folder / "model.safetensors", framework="pt") as base:
        reader: Callable[[str], Tensor] = base.get_tensor
        for file in files:
            write_file(LocalFolder(tmp_path), file, lambda one: [reader(one.name)])
        write_companions(tmp_path, plan, base_folder, files)
        written = read_model_header(tmp_path)
        assert list(written.tensors) == list(plan.base_header.tensors)
        for name, tensor in written.tensors.items():
            with safe_open(tmp_path / tensor.file, framework="pt") as read:
                assert torch.equal(read.get_tensor(name), base.get_tensor(name))
    assert (tmp_path / "tokenizer.json").read_bytes() == (base_folder / "tokenizer.json").read_bytes()


def test_the_configs_name_the_special_tokens_of_the_tokenizer_that_is_written(tmp_path: Path) -> None:
    base, out, tokenizer = (tmp_path / folder for folder in ("base", "out", "tokenizer"))
    for folder in (base, out, tokenizer):
        folder.mkdir()
    tiny.save_tokenizer(tokenizer)
    changed = transformers.AutoTokenizer.from_pretrained(tokenizer)
    changed.eos_token = "w1"
    changed.save_pretrained(tokenizer)
    (base / "generation_config.json").write_text('{"eos_token_id": 2, "max_new_tokens": 9}')
    plan = plan_with({"model_type": "llama", "eos_token_id": 2})
    write_companions(out, plan, base, output_files(plan), tokenizer)
    assert transformers.AutoConfig.from_pretrained(out).eos_token_id == 7
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert (generation.eos_token_id, generation.pad_token_id, generation.max_new_tokens) == (7, 0, 9)
    assert transformers.AutoTokenizer.from_pretrained(out).eos_token_id == 7
