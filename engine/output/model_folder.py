"""The files of a merged model, which `from_pretrained` loads: tensors by weight file, and the files beside the weights.

The distribution of tensors over files depends on the base alone, so a file has the same bytes whichever shard writes
it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from engine.checkpoints.find import COMPANIONS, check_file, check_inside, is_chat_template, tokenizer_files
from engine.checkpoints.headers import BYTES, read_json
from engine.checkpoints.special_tokens import generation_with_ids_of, with_ids_of
from engine.checkpoints.writer import OutputFile, OutputTensor
from engine.planning.layout.vocabulary import new_tokenizer
from engine.planning.plan import Plan

# Config keys of how the machine that saved a model computed it. A name of a hub repository would make transformers
# fetch code.
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?")


def output_files(plan: Plan, limit: int | None = None) -> list[OutputFile]:
    """Return the output's weight files: the base's tensors in their order.

    A file has at most `limit` bytes (default: the config's `max_shard_size`), or a single larger tensor.
    """
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


def write_companions(
    folder: Path, plan: Plan, base_folder: Path, files: list[OutputFile], tokenizer_folder: Path | None = None
) -> None:
    """Write config.json with the output's dtype and, for several weight files, the index; copy the base's other files.

    config.json names no implementation of attention or experts, so that transformers chooses one where it loads the
    model.

    If `tokenizer_folder` is given, tokenizer files are copied from there, and the configs name its special tokens. The
    plan's chat template replaces those of the tokenizer.

    Raises:
        CheckpointError: a file to copy is not regular, or is a link out of its folder.
    """
    config = _without_implementations(plan.base_header.config)
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
    code = sorted(path.name for path in base_folder.glob("*.py")) if plan.config.trust_remote_code else []
    tokenizer = tokenizer_folder or base_folder
    made = new_tokenizer(plan)
    keep = lambda name: plan.chat_template is None or not is_chat_template(name)  # noqa: E731
    copied = [] if made else list(filter(keep, tokenizer_files(tokenizer)))
    for names, source in (((*COMPANIONS, *code), base_folder), (copied, tokenizer)):
        for path in (source / name for name in names if os.path.lexists(source / name)):
            # Checked with the folder by `plan`, and again here, since the folder may have changed.
            check_inside(path.parent, source)
            check_file(path, source)
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    for name in filter(keep, made):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(made[name])
    if tokenizer_folder is not None:
        _write_ids(folder, tokenizer_folder)
    if plan.chat_template is not None and (made or copied):
        _write_chat_template(folder, plan.chat_template)


def _write_ids(folder: Path, tokenizer: Path) -> None:
    """Set the start, end and padding tokens in the output's configs to those of its tokenizer."""
    write_json(folder / "config.json", with_ids_of(tokenizer, read_json(folder / "config.json")))
    generation = folder / "generation_config.json"
    if generation.exists() or (tokenizer / "generation_config.json").exists():
        given = read_json(generation) if generation.exists() else {}
        write_json(generation, generation_with_ids_of(tokenizer, given))


def _write_chat_template(folder: Path, text: str) -> None:
    """Write the chat template of the output's tokenizer, where transformers 5 writes it."""
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    file = folder / "tokenizer_config.json"
    if file.exists() and "chat_template" in (config := read_json(file)):
        write_json(file, {key: value for key, value in config.items() if key != "chat_template"})


def _without_implementations(config: Any) -> Any:
    """Return a config without the implementations, in all of its sections."""
    if not isinstance(config, dict):
        return config
    return {key: _without_implementations(value) for key, value in config.items() if not _IMPLEMENTATION.fullmatch(key)}


def write_json(path: Path, data: object) -> None:
    """Write indented JSON that ends with a newline."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
