"""Whole tensors that an adapter saves beside its factors: copies of the base's, or tensors that were trained.

PEFT saves embedding and head whole if they are targets of LoRA or were resized, and the modules of `modules_to_save`.
Values are compared from the bytes of the files, without torch and in bounded memory.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engine.checkpoints.adapter_file import WEIGHTS, AdapterFile, merge_with_peft
from engine.checkpoints.headers import FLOATS, TensorHeader
from engine.checkpoints.ranges import Floats, Ranges
from engine.checkpoints.structure import Role, by_names
from engine.checkpoints.vocabulary import has_tokens_for_rows, untie
from engine.errors import CheckpointError

# Elements that are compared at a time.
BLOCK = 1 << 20


def trained_whole(file: AdapterFile) -> dict[str, str]:
    """Return the whole tensors that differ from the base's: base tensor → name in the adapter's file.

    Raises:
        CheckpointError: the base has no such tensor, or one of another shape.
    """
    changed = {}
    for name, stored in file.parts.whole.items():
        target, tensor = file.target(name), file.tensors[stored]
        base = file.base.tensors.get(target)
        if base is None:
            what = f"the tensor {stored!r} is neither part of a LoRA pair nor a tensor of the base"
            raise CheckpointError(what, str(file.folder / WEIGHTS))
        if tensor.shape != base.shape:
            resized = tensor.shape[1:] == base.shape[1:] and has_tokens_for_rows(file.base, target)
            do = "merge it with peft, use the result as the expert with its tokenizer, and set `tokenizer_source`"
            raise CheckpointError(
                f"the adapter saves {target!r} whole, with shape {tensor.shape}",
                str(file.folder / WEIGHTS),
                f"the base's shape {base.shape}",
                f"{do}: {merge_with_peft(file, tensor.shape[0])}" if resized else "",
            )
        if not {tensor.dtype, base.dtype} <= FLOATS.keys():
            what = f"the tensor {stored!r} has dtype {tensor.dtype}, the base's {base.dtype}"
            raise CheckpointError(what, str(file.folder / WEIGHTS), f"one of {', '.join(FLOATS)}")
        if not is_copy(file.folder, tensor, file.base.folder, base):
            changed[target] = stored
    return changed


def drop_tied_head(file: AdapterFile) -> None:
    """Remove the head from the adapter's parts if the base ties it to the embedding, and both change alike.

    Raises:
        CheckpointError: the base ties them, and the adapter changes them differently.
    """
    text, roles = file.base.text_config, file.base.roles
    tied = text.get("tie_word_embeddings", file.base.config.get("tie_word_embeddings")) is not False
    embedding = next((name for name, role in roles.items() if role is Role.EMBEDDING), None)
    if not tied or embedding is None or Role.HEAD in roles.values():
        return
    modules = {*file.parts.factors, *(name.removesuffix(".weight") for name in file.parts.whole)}
    known = by_names(f"{module}.weight" for module in modules)[0].roles
    head = next((name.removesuffix(".weight") for name, role in known.items() if role is Role.HEAD), "")
    own = next((module for module in modules if file.target(f"{module}.weight") == embedding), "")
    factors, whole = file.parts.factors, file.parts.whole
    if not (
        _same_factors(file, file.base.tensors[embedding], factors.get(own), factors.get(head))
        and _same_values(file, embedding, whole.get(f"{own}.weight"), whole.get(f"{head}.weight"))
    ):
        raise CheckpointError(
            "the adapter changes embedding and head differently, but the base ties them: both are one tensor",
            str(file.folder),
            "an adapter of a model whose embedding and head are two tensors, or the same change of both",
            f"write a copy of the base with two tensors, and use it as `base_model`: {untie(file.base)}",
        )
    factors.pop(head, None)
    whole.pop(f"{head}.weight", None)


def _same_factors(
    file: AdapterFile, tied: TensorHeader, embedding: dict[str, str] | None, head: dict[str, str] | None
) -> bool:
    """Return whether the factors of embedding and head have the same product; those of an embedding are transposed."""
    if embedding is None or head is None:
        return embedding is head
    if embedding.keys() != head.keys():
        return False
    with Ranges(file.folder, file.tensors) as ranges:
        for side, name in embedding.items():
            one, other = file.tensors[name], file.tensors[head["B" if side == "A" else "A"]]
            # Factors are smaller than the tensor that they change.
            if (
                one.shape != other.shape[::-1]
                or one.numel > tied.numel
                or not {one.dtype, other.dtype} <= FLOATS.keys()
            ):
                return False
            values, others = (ranges.read(each.name, 0, each.numel).reshape(each.shape) for each in (one, other))
            if not np.array_equal(values.T, others):
                return False
    return True


def _same_values(file: AdapterFile, tied: str, embedding: str | None, head: str | None) -> bool:
    """Return whether whole copies of embedding and head are equal; without a copy, the base's tensor counts."""
    base = (file.base.folder, file.base.tensors[tied])
    one, other = ((file.folder, file.tensors[name]) if name else base for name in (embedding, head))
    return one is other or is_copy(*one, *other)


def is_copy(folder: Path, copy: TensorHeader, of_folder: Path, of: TensorHeader) -> bool:
    """Return whether a float tensor is a copy of another: equal, also after rounding to the dtype of the copy."""
    if copy.shape != of.shape or not {copy.dtype, of.dtype} <= FLOATS.keys():
        return False
    with Ranges(folder, {copy.name: copy}) as copies, Ranges(of_folder, {of.name: of}) as others:
        for start in range(0, copy.numel, BLOCK):
            stop = min(start + BLOCK, copy.numel)
            values = others.read(of.name, start, stop)
            values = values if copy.dtype == of.dtype else _rounded(values, copy.dtype)
            if not np.array_equal(copies.read(copy.name, start, stop), values):
                return False
    return True


def _rounded(values_N: Floats, dtype: str) -> Floats:
    """Return float32 values [N] after rounding to another dtype."""
    if dtype == "F32":
        return values_N
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values_N.astype(np.float16).astype(np.float32)
    # To the nearest bfloat16, ties to even.
    bits = values_N.view(np.uint32)
    rounded: Floats = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return rounded
