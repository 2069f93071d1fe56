"""Functions that corrupt the folder of a tiny merge: config, JSON, headers, records, adapters, tokenizers.

Each takes the merge's folder first; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from thorough import as_thorough
from torch import Tensor

Spoil = Callable[[Path], Any]
# By name: the function that corrupts the folder, and the facts that the message must contain.
Cases = dict[str, tuple[Spoil, list[str]]]
MB = 1 << 20
RECORD = '{"input_ids": [7, 8]}\n'
Q = "model.layers.1.self_attn.q_proj.weight"
MODELS = ("base", "expert0", "expert1")


def cases(thorough: Collection[str] = (), every: int = 1, **kinds: Cases) -> pytest.MarkDecorator:
    """Parametrise a test by cases, with "kind, name" as ids.

    Those whose names are in `thorough` are marked so, and all but every `every`-th.
    """
    named = {f"{kind}, {name}": (name, case) for kind, cases in kinds.items() for name, case in cases.items()}
    assert set(thorough) <= {name for name, _ in named.values()}
    values = [
        as_thorough(case) if name in thorough or number % every else case
        for number, (name, case) in enumerate(named.values())
    ]
    return pytest.mark.parametrize(("spoil", "facts"), values, ids=list(named))


def put(folder: Path, name: str, content: str | bytes) -> None:
    """Write a file, replacing any file, link or folder of that name."""
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
    """Move a file out of the model's folder and leave a link to it."""
    (folder / name).rename(folder / "outside")
    link(folder, name, "../outside")


def add(folder: Path, text: str) -> None:
    """Append lines to the config."""
    put(folder, "merge.yaml", f"{(folder / 'merge.yaml').read_text()}{text}\n")


def edit(folder: Path, **keys: Any) -> None:
    """Set top-level keys of the config."""
    config = yaml.safe_load((folder / "merge.yaml").read_text()) | keys
    put(folder, "merge.yaml", yaml.safe_dump(config, sort_keys=False))


def expert(folder: Path, **keys: Any) -> None:
    """Set keys of the second expert."""
    models = yaml.safe_load((folder / "merge.yaml").read_text())["models"]
    edit(folder, models=[models[0], models[1] | keys])


def weight_space(folder: Path, **keys: Any) -> None:
    """Write a config of a weight-space method; a key set to None is left out."""
    models = [{"model": "expert0"}, {"model": "expert1"}]
    keys = {"merge_method": "linear", "base_model": "base", "models": models} | keys
    put(folder, "merge.yaml", yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))


def layers(folder: Path, layer_range: Any) -> None:
    """Write a config of one slice with this `layer_range`."""
    weight_space(folder, models=None, slices=[{"sources": [{"model": "expert0", "layer_range": layer_range}]}])


def bomb(key: str) -> str:
    """Return YAML in which `key` expands to nine levels of nine aliases each."""
    rows = ["record:", "  a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    return "\n".join([*rows, f"{key}: *a8"])


def merge_keys() -> str:
    """Return YAML of mappings that each merge the previous one ten times."""
    rows = ["record:", "  b0: &b0 {k: 1}"]
    rows += [f"  b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 10)}]}}" for i in range(1, 12)]
    return "\n".join(rows)


def many_models(extra: str = "") -> str:
    """Return a config of 100,000 models, or of 10,000 that each have the lines `extra`."""
    head = "merge_method: expert_merging\nbase_model: base\nmodels:\n"
    return head + "".join(f"- model: m{i}\n{extra}" for i in range(100_000 if not extra else 10_000))


def edit_json(folder: Path, name: str, **changes: Any) -> None:
    """Set keys of a JSON file."""
    put(folder, name, json.dumps(json.loads((folder / name).read_text()) | changes))


def edit_configs(folder: Path, **changes: Any) -> None:
    """Set keys of config.json alike in all models, so that they still match each other."""
    for model in MODELS:
        edit_json(folder, f"{model}/config.json", **changes)


def index(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda weights: None, text: str = "") -> None:
    """Store the second expert as one file and an index whose weight map is changed, or which is `text`."""
    weights: dict[str, Any] = dict.fromkeys(load_file(folder / "expert1" / "model.safetensors"), "a.safetensors")
    (folder / "expert1" / "model.safetensors").rename(folder / "expert1" / "a.safetensors")
    change(weights)
    put(folder, "expert1/model.safetensors.index.json", text or json.dumps({"weight_map": weights}))


def named_twice(folder: Path) -> None:
    """Write an index that assigns a tensor to a file that does not hold it."""
    tensors = load_file(folder / "expert1" / "model.safetensors")
    index(folder, lambda weights: weights.update({Q: "b.safetensors"}))
    save_file({"other": tensors[Q]}, folder / "expert1" / "b.safetensors")


def weights(folder: Path, header: Any, data: int = 8, length: int | None = None) -> None:
    """Write the second expert's weights: a header, which claims `length` bytes, and `data` bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = struct.pack("<Q", len(text) if length is None else length)
    put(folder, "expert1/model.safetensors", start + text + bytes(data))


def tensor(shape: Any = (2,), offsets: Any = (0, 8), dtype: str = "F32") -> dict[str, Any]:
    """Return the entry of a tensor in a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def integers(folder: Path) -> None:
    """Store one tensor of the second expert as int32."""
    path = folder / "expert1" / "model.safetensors"
    save_file({name: t.int() if name == Q else t for name, t in load_file(path).items()}, path)


def calibration(folder: Path, content: str | bytes, name: str = "x.jsonl") -> None:
    """Write the second expert's calibration file."""
    put(folder, name, content)
    expert(folder, calibration=name)


def table(folder: Path, columns: Any, **options: Any) -> None:
    """Write the second expert's calibration file as parquet."""
    content = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pyarrow.parquet.write_table(content, folder / "x.parquet", **options)
    expert(folder, calibration="x.parquet")


def cut_table(folder: Path, first: int, last: int) -> None:
    """Write a parquet file that keeps only the bytes from `first` to `last`."""
    table(folder, {"text": [f"a{i}" for i in range(10_000)]})
    content = (folder / "x.parquet").read_bytes()
    put(folder, "x.parquet", b"PAR1" + content[first:last])


def repeated(value: str, count: int) -> pa.DictionaryArray:
    """Return a column of one value, which takes little space in the file."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([value]))


def messages_bomb(folder: Path) -> None:
    """Write less than a kilobyte of parquet that expands to one chat of 20,000 messages of a megabyte each."""
    parts = [repeated("user", 20_000), repeated("a" * 10**6, 20_000)]
    chat = pa.ListArray.from_arrays([0, 20_000], pa.StructArray.from_arrays(parts, ["role", "content"]))
    options = {"store_schema": False, "compression": "zstd", "dictionary_pagesize_limit": 2**30}
    table(folder, {"messages": chat}, **options)
    assert (folder / "x.parquet").stat().st_size < 1000


def no_text(folder: Path) -> None:
    """Write a column of strings that are not UTF-8."""
    buffers = [None, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe")]
    table(folder, {"text": pa.Array.from_buffers(pa.string(), 1, buffers)})


PREFIX = "base_model.model.model.layers.1.self_attn.q_proj."


def adapter(folder: Path, change: Callable[[dict[str, Tensor]], Any] = lambda pair: None, **config: Any) -> None:
    """Turn the second expert into a LoRA adapter of one module, with changes to its config and its factors."""
    for name in ("model.safetensors", "config.json"):
        (folder / "expert1" / name).unlink()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    put(folder, "expert1/adapter_config.json", json.dumps({k: v for k, v in config.items() if v != "left out"}))
    pair = {f"{PREFIX}lora_A.weight": torch.ones(2, 32), f"{PREFIX}lora_B.weight": torch.ones(32, 2)}
    change(pair)
    save_file(pair, folder / "expert1" / "adapter_model.safetensors")


def factors(**shapes: tuple[int, ...]) -> Callable[[dict[str, Tensor]], Any]:
    """Return a change that gives the factors A and B these shapes."""
    return lambda pair: pair.update(
        {f"{PREFIX}lora_{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    )


def text_record(folder: Path) -> None:
    calibration(folder, '{"text": "w1"}\n')


def tokenizer_config(folder: Path, **changes: Any) -> None:
    edit_json(folder, "base/tokenizer_config.json", **changes)
    text_record(folder)


def tokenizer(folder: Path, **changes: Any) -> None:
    edit_json(folder, "base/tokenizer.json", **changes)
    text_record(folder)


def cut_tokens(folder: Path) -> None:
    """Let the tokenizer map a word to an id outside the vocabulary."""
    put(folder, "base/tokenizer.json", (folder / "base" / "tokenizer.json").read_text().replace('"w1": 7', '"w1": 700'))
    text_record(folder)


def template(folder: Path, text: str | bytes) -> None:
    put(folder, "base/chat_template.jinja", text)
    calibration(folder, '{"question": "w1"}\n')


def own_code(folder: Path, **changes: Any) -> None:
    """Give the models code of their own, which would leave a file if it ran."""
    edit_configs(folder, **changes)
    for model in MODELS:
        put(folder, f"{model}/evil.py", f"open({str(folder / 'ran')!r}, 'w').close()\n")
