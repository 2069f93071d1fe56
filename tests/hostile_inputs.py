"""What spoils the folder of a tiny merge: config, JSON, headers, records, adapters, tokenizers.

Each function takes that folder; nothing comes from outside.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

Spoil = Callable[[Path], Any]
# What is spoilt, and the words that the message must have.
Cases = dict[str, tuple[Spoil, list[str]]]
MB = 1 << 20
RECORD = '{"input_ids": [7, 8]}\n'
Q = "model.layers.1.self_attn.q_proj.weight"
MODELS = ("base", "expert0", "expert1")


def cases(**kinds: Cases) -> pytest.MarkDecorator:
    """One test a case, called by its kind and name."""
    found = {f"{kind}, {name}": case for kind, cases in kinds.items() for name, case in cases.items()}
    return pytest.mark.parametrize(("spoil", "words"), found.values(), ids=list(found))


def put(folder: Path, name: str, content: str | bytes) -> None:
    """A file with this content in the place of whatever was there."""
    path = folder / name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


def make_folder(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()


def link(folder: Path, name: str, target: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


def move_out(folder: Path, name: str) -> None:
    """The file lies beside the model's folder, which has a link to it."""
    (folder / name).rename(folder / "outside")
    link(folder, name, "../outside")


def add(folder: Path, text: str) -> None:
    """More lines at the end of the config."""
    put(folder, "merge.yaml", f"{(folder / 'merge.yaml').read_text()}{text}\n")


def edit(folder: Path, **keys: Any) -> None:
    config = yaml.safe_load((folder / "merge.yaml").read_text()) | keys
    put(folder, "merge.yaml", yaml.safe_dump(config, sort_keys=False))


def expert(folder: Path, **keys: Any) -> None:
    """Keys of the second expert."""
    models = yaml.safe_load((folder / "merge.yaml").read_text())["models"]
    edit(folder, models=[models[0], models[1] | keys])


def weight_space(folder: Path, **keys: Any) -> None:
    """A config of a method that learns nothing."""
    models = [{"model": "expert0"}, {"model": "expert1"}]
    keys = {"merge_method": "linear", "base_model": "base", "models": models} | keys
    put(folder, "merge.yaml", yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))


def layers(folder: Path, found: Any) -> None:
    weight_space(folder, models=None, slices=[{"sources": [{"model": "expert0", "layer_range": found}]}])


def bomb(key: str) -> str:
    """Nine levels of nine aliases each."""
    rows = ["record:", "  a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    return "\n".join([*rows, f"{key}: *a8"])


def merge_keys() -> str:
    """Mappings, each of which takes all of the one before ten times."""
    rows = ["record:", "  b0: &b0 {k: 1}"]
    rows += [f"  b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 10)}]}}" for i in range(1, 12)]
    return "\n".join(rows)


def many_models(extra: str = "") -> str:
    head = "merge_method: expert_merging\nbase_model: base\nmodels:\n"
    return head + "".join(f"- model: m{i}\n{extra}" for i in range(100_000 if not extra else 10_000))


def edit_json(folder: Path, name: str, **changes: Any) -> None:
    put(folder, name, json.dumps(json.loads((folder / name).read_text()) | changes))


def edit_configs(folder: Path, **changes: Any) -> None:
    """config.json of all models alike, so that they still fit each other."""
    for model in MODELS:
        edit_json(folder, f"{model}/config.json", **changes)


def index(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda weights: None, text: str = "") -> None:
    """The second expert in one file and an index, whose weight map is changed."""
    weights: dict[str, Any] = dict.fromkeys(load_file(folder / "expert1" / "model.safetensors"), "a.safetensors")
    (folder / "expert1" / "model.safetensors").rename(folder / "expert1" / "a.safetensors")
    change(weights)
    put(folder, "expert1/model.safetensors.index.json", text or json.dumps({"weight_map": weights}))


def named_twice(folder: Path) -> None:
    """Another file than the index says holds the tensor, too."""
    tensors = load_file(folder / "expert1" / "model.safetensors")
    index(folder, lambda weights: weights.update({Q: "b.safetensors"}))
    save_file({"other": tensors[Q]}, folder / "expert1" / "b.safetensors")


def weights(folder: Path, header: Any, data: int = 8, length: int | None = None) -> None:
    """The second expert's weights: a header, and so many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = struct.pack("<Q", len(text) if length is None else length)
    put(folder, "expert1/model.safetensors", start + text + bytes(data))


def tensor(shape: Any = (2,), offsets: Any = (0, 8), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def integers(folder: Path) -> None:
    path = folder / "expert1" / "model.safetensors"
    save_file({name: t.int() if name == Q else t for name, t in load_file(path).items()}, path)


def calibration(folder: Path, content: str | bytes, name: str = "x.jsonl") -> None:
    put(folder, name, content)
    expert(folder, calibration=name)


def table(folder: Path, columns: Any, **options: Any) -> None:
    made = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pyarrow.parquet.write_table(made, folder / "x.parquet", **options)
    expert(folder, calibration="x.parquet")


def cut_table(folder: Path, first: int, last: int) -> None:
    table(folder, {"text": [f"a{i}" for i in range(10_000)]})
    content = (folder / "x.parquet").read_bytes()
    put(folder, "x.parquet", b"PAR1" + content[first:last])


def repeated(value: str, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([value]))


def messages_bomb(folder: Path) -> None:
    """Less than a kilobyte, which is one chat of 20,000 messages of a megabyte each."""
    parts = [repeated("user", 20_000), repeated("a" * 10**6, 20_000)]
    chat = pa.ListArray.from_arrays([0, 20_000], pa.StructArray.from_arrays(parts, ["role", "content"]))
    options = {"store_schema": False, "compression": "zstd", "dictionary_pagesize_limit": 2**30}
    table(folder, {"messages": chat}, **options)
    assert (folder / "x.parquet").stat().st_size < 1000


def no_text(folder: Path) -> None:
    """A column of texts that are none."""
    buffers = [None, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe")]
    table(folder, {"text": pa.Array.from_buffers(pa.string(), 1, buffers)})


PREFIX = "base_model.model.model.layers.1.self_attn.q_proj."


def adapter(folder: Path, change: Callable[[dict[str, Tensor]], Any] = lambda pair: None, **config: Any) -> None:
    """The second expert as a LoRA adapter of one module, with keys of its config and its factors changed."""
    for name in ("model.safetensors", "config.json"):
        (folder / "expert1" / name).unlink()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    put(folder, "expert1/adapter_config.json", json.dumps({k: v for k, v in config.items() if v != "left out"}))
    pair = {f"{PREFIX}lora_A.weight": torch.ones(2, 32), f"{PREFIX}lora_B.weight": torch.ones(32, 2)}
    change(pair)
    save_file(pair, folder / "expert1" / "adapter_model.safetensors")


def factors(**shapes: tuple[int, ...]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda pair: pair.update(
        {f"{PREFIX}lora_{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    )


def then(*steps: Spoil) -> Spoil:
    """One after the other."""

    def spoil(folder: Path) -> None:
        for step in steps:
            step(folder)

    return spoil


def text_record(folder: Path) -> None:
    calibration(folder, '{"text": "w1"}\n')


def tokenizer_config(folder: Path, **changes: Any) -> None:
    edit_json(folder, "base/tokenizer_config.json", **changes)
    text_record(folder)


def tokenizer(folder: Path, **changes: Any) -> None:
    edit_json(folder, "base/tokenizer.json", **changes)
    text_record(folder)


def cut_tokens(folder: Path) -> None:
    """A tokenizer that gives a word a number beyond the vocabulary."""
    put(folder, "base/tokenizer.json", (folder / "base" / "tokenizer.json").read_text().replace('"w1": 7', '"w1": 700'))
    text_record(folder)


def template(folder: Path, text: str | bytes) -> None:
    put(folder, "base/chat_template.jinja", text)
    calibration(folder, '{"question": "w1"}\n')


def own_code(folder: Path, **changes: Any) -> None:
    """Models that come with code, which would leave a file if it ran."""
    edit_configs(folder, **changes)
    for model in MODELS:
        put(folder, f"{model}/evil.py", f"open({str(folder / 'ran')!r}, 'w').close()\n")
