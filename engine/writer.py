"""The merged model as a folder that `from_pretrained` loads: files of tensors, written one tensor at a time.

How tensors are spread over files depends on the base alone, so the bytes are the same whoever writes them. Knows no
Ray; the driver decides which shard writes which file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.headers import BYTES, FLOATS
from engine.plan import Plan
from engine.storage import Folder

# What a model folder holds beside weights and config.json, as transformers' tokenizers and processors name it.
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*",
)  # fmt: skip
COMPANIONS = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "LICENSE*",
)  # fmt: skip


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of an output file: `dtype` as safetensors writes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file of the output."""

    name: str
    tensors: tuple[OutputTensor, ...]


def output_files(plan: Plan, limit: int | None = None) -> list[OutputFile]:
    """The base's tensors in their order, in files of at most `limit` (else `max_shard_size`) bytes, or one tensor."""
    limit = limit or plan.config.max_shard_size
    groups: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in plan.base_header.tensors.values():
        dtype = plan.out_dtype(tensor.name)
        nbytes = tensor.numel * BYTES.get(dtype, 1)
        if groups[-1] and filled + nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(OutputTensor(tensor.name, tensor.shape, dtype, nbytes))
        filled += nbytes
    if len(groups) == 1:
        return [OutputFile("model.safetensors", tuple(groups[0]))]
    names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    return [OutputFile(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def write_file(folder: Folder, file: OutputFile, parts: Callable[[OutputTensor], Iterable[Tensor]]) -> None:
    """Write one safetensors file, asking for its tensors one after the other, each in parts; no two are held at once.
    It is there whole or not at all.

    The library's own writer wants all of a file's tensors in memory. The format is a length, a JSON header, the bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in file.tensors:
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [end, end + entry.nbytes]}
        end += entry.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with folder.create(file.name) as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for entry in file.tensors:
            written = 0
            for part in parts(entry):
                value = part.contiguous().reshape(-1)
                if value.nbytes:
                    written += out.write(value.view(torch.uint8).numpy().data)
            assert written == entry.nbytes, entry.name


def write_companions(
    folder: Path, plan: Plan, base_folder: Path, files: list[OutputFile], tokenizer_folder: Path | None = None
) -> None:
    """config.json with the output's dtype, the index where there are several files, and the base's other files; those
    of a tokenizer are of `tokenizer_folder` where it is given.
    """
    config = dict(plan.base_header.config)
    chosen = plan.config.out_dtype or plan.config.dtype
    if chosen:
        config.pop("torch_dtype", None)
        config["dtype"] = chosen
    write_json(folder / "config.json", config)
    if len(files) > 1:
        weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
        total = sum(tensor.nbytes for file in files for tensor in file.tensors)
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    companions = (*COMPANIONS, "*.py") if plan.config.trust_remote_code else COMPANIONS
    for patterns, source in ((companions, base_folder), (TOKENIZER, tokenizer_folder or base_folder)):
        for path in (path for pattern in patterns for path in sorted(source.glob(pattern))):
            if path.is_file() and path.suffix not in (".safetensors", ".bin"):
                shutil.copyfile(path, folder / path.name)


def write_json(path: Path, data: object) -> None:
    """Readable JSON with a newline at its end."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def torch_dtype(code: str) -> torch.dtype | None:
    """The torch type of a float that safetensors calls `code`; None for what is no float of ours."""
    return getattr(torch, FLOATS[code]) if code in FLOATS else None
