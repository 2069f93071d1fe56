"""The file of an adapter, or of compressed task vectors: what its tensors are, and which of the base they change.

PEFT writes it, and so do trainers that build on PEFT, some with names of their own. For adapters that only PEFT can
merge, messages name a command, which tests run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.checkpoints.headers import FLOATS, ModelHeader, TensorHeader, read_file_header, read_json
from engine.checkpoints.vocabulary import load_command
from engine.errors import CheckpointError
from engine.packing import MOST_BITS, PackedGroup, Packing, codes_name
from engine.untrusted import SHOWN, shown

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Of compressed task vectors (docs/compress.md), which `engine.compression.deltas` writes.
DELTA, DELTA_WEIGHTS = "delta_config.json", "delta_model.safetensors"
FORMAT = {"format": "delta_come", "version": 1}
SIDES = ("left", "right")
OF_BASE = "use the base that the task vectors were compressed with, or compress them again"

# A tensor's name is PREFIX, the module, and the tensor's place in it. Trainers that save a state dict themselves leave
# the adapter's own name in, and the wrappers of torch.compile, FSDP and activation checkpointing.
PREFIX = "base_model.model."
WRAPPERS = re.compile(r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(embedding_)?(?P<side>[AB])(\.(?!(weight|bias)$)(?P<adapter>[^.]+))?(\.weight)?"
)
SAVED = re.compile(r"\.base_layer(?=\.)|\.modules_to_save(\.(?P<adapter>[^.]+)(?=\.))?(?=\.)")

# Prefixes of the language model, which differ between the names of modules and those in files.
LANGUAGE_MODEL = re.compile(r"^((model|language_model|transformer)\.)+")


@dataclass(frozen=True)
class Parts:
    """The tensors of an adapter's file by what they are.

    Attributes:
        factors: By module, the names of its factors: side A or B → name in the file.
        whole: Whole tensors of the model: name in the model → name in the file.
    """

    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's folder, its config, the tensors of its file, and the base that it changes.

    `in_model` returns the base's tensor for a name that the model gives a parameter, None if there is none.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorHeader]
    base: ModelHeader
    in_model: Callable[[str], str | None] = lambda name: None

    @cached_property
    def parts(self) -> Parts:
        """The tensors by what they are.

        Raises:
            CheckpointError: a tensor is not part of a LoRA adapter, or the file holds several adapters or no factors.
        """
        parts, adapters, where = Parts(), set[str | None](), str(self.folder / WEIGHTS)
        for name in self.tensors:
            inner = WRAPPERS.sub("", name)
            factor = FACTOR.fullmatch(inner)
            if not inner.startswith(PREFIX) or (factor is None and ".lora_" in inner):
                raise CheckpointError(f"the tensor {shown(repr(name), 4 * SHOWN)} is not part of a LoRA pair", where)
            place, key = parts.whole, SAVED.sub("", inner)
            if factor is not None:
                place, key = parts.factors.setdefault(factor["module"].removeprefix(PREFIX), {}), factor["side"]
            adapters |= {found["adapter"] for found in (factor, *SAVED.finditer(inner)) if found is not None}
            if place.setdefault(key.removeprefix(PREFIX), name) != name or len(adapters - {None}) > 1:
                raise CheckpointError(
                    f"the file holds several adapters, or a tensor twice: {shown(repr(name), 4 * SHOWN)}",
                    where,
                    "the tensors of one adapter",
                    'save one with peft, and use FOLDER/NAME: `save_pretrained("FOLDER", selected_adapters=["NAME"])`',
                )
        if not parts.factors:
            raise CheckpointError("the adapter has no LoRA pair", where)
        return parts

    @cached_property
    def _names(self) -> dict[str, str]:
        """The base's tensor names by full name, and by the name without language model prefixes where that is unique.

        An adapter uses names of modules, and in multimodal models these differ from the names in the files:
        `model.language_model.layers…` in the module, `language_model.model.layers…` or `model.layers…` in files. An
        adapter of a text model lacks the prefix that the language model has in a multimodal base.
        """
        counts = Counter(map(_short, self.base.tensors))
        unique = {_short(name): name for name in self.base.tensors if counts[_short(name)] == 1}
        return unique | {name: name for name in self.base.tensors}

    def target(self, name: str) -> str:
        """Return the base's name for a tensor of the model; `name` itself if the base has no such tensor."""
        found = self._names.get(name) or self._names.get(_short(name)) or self.in_model(name)
        return found or name


def read_deltas(
    folder: Path, base: ModelHeader
) -> tuple[dict[str, TensorHeader], dict[str, tuple[str, str]], dict[str, str]]:
    """Read the header of compressed task vectors, and check it against the base.

    Returns:
        The tensors, with the factors of matrices as packed ones; the names of both factors, left and right, by the
        base's tensor; and the names of whole tensors by the base's.

    Raises:
        CheckpointError: It is of another format, damaged, or of another base.
    """
    config, where = read_json(folder / DELTA), str(folder / DELTA_WEIGHTS)
    if any(config.get(key) != value for key, value in FORMAT.items()):
        given = ", ".join(f"{key} {config.get(key)!r}" for key in FORMAT)
        wanted = ", ".join(f"{key} {value!r}" for key, value in FORMAT.items())
        raise CheckpointError(f"the task vectors have {shown(given)}", str(folder / DELTA), wanted)
    bits = config.get("bits")
    if not isinstance(bits, list) or not all(type(one) is int and 1 <= one <= MOST_BITS for one in bits):
        what = f"`bits` is {shown(repr(bits))}"
        raise CheckpointError(what, str(folder / DELTA), f"a list of numbers of 1 to {MOST_BITS}")
    stored = read_file_header(folder / DELTA_WEIGHTS)
    factors = dict[str, dict[str, TensorHeader]]()
    for name, tensor in base.tensors.items():
        for side, length in zip(SIDES, tensor.shape if len(tensor.shape) == 2 else (), strict=False):
            if (found := _packed(f"{name}.{side}", length, side == "left", bits, stored, where)) is not None:
                factors.setdefault(name, {})[side] = found
    known = {own for sides in factors.values() for one in sides.values() if one.packed for own in one.packed.stored}
    whole = {name: name for name in stored if name not in known}
    for name in whole:
        changed, own = base.tensors.get(name), stored[name]
        if changed is None or changed.shape != own.shape or not {own.dtype, changed.dtype} <= FLOATS.keys():
            given = f"{own.dtype} of shape {own.shape}"
            wanted = f"the base's {changed.dtype} of shape {changed.shape}" if changed else "a tensor of the base"
            raise CheckpointError(f"the tensor {shown(repr(name), 4 * SHOWN)} is {given}", where, wanted, OF_BASE)
    for name, sides in factors.items():
        if name in whole or len({one.packed.groups for one in sides.values() if one.packed}) > 1 or len(sides) < 2:
            raise CheckpointError(f"the factors of {name!r} are not a pair", where, do=OF_BASE)
    tensors = {one.name: one for sides in factors.values() for one in sides.values()}
    pairs = {name: (sides["left"].name, sides["right"].name) for name, sides in factors.items()}
    return tensors | {name: stored[name] for name in whole}, pairs, whole


def _packed(
    name: str, length: int, transposed: bool, bits: list[int], stored: dict[str, TensorHeader], where: str
) -> TensorHeader | None:
    """Return the header of a factor with vectors of a length, or None if the file has none of this name."""
    groups = list[PackedGroup]()
    while (codes := stored.get(codes_name(name, len(groups)))) is not None and len(groups) < len(bits):
        groups.append(PackedGroup(bits[len(groups)], codes.shape[0] if codes.shape else 0))
    if not groups:
        return None
    packing = Packing(name, tuple(groups), length, transposed)
    for own, (shape, dtype) in packing.stored.items():
        tensor, wanted = stored.get(own), "U8" if dtype == "|u1" else "BF16"
        if tensor is None or (tensor.shape, tensor.dtype) != (shape, wanted):
            found = "missing" if tensor is None else f"{tensor.dtype} of shape {tensor.shape}"
            raise CheckpointError(f"the tensor {own!r} is {found}", where, f"{wanted} of shape {shape}", OF_BASE)
    rank = sum(group.vectors for group in groups)
    return TensorHeader(name, (length, rank) if transposed else (rank, length), "F32", DELTA_WEIGHTS, packing)


def merge_with_peft(file: AdapterFile, rows: int | None = None) -> str:
    """Return a command that merges an adapter into its base and writes a full checkpoint beside the adapter.

    `rows` is the number of tokens to which the embedding was resized for the training, if it was.
    """
    trained_on = file.config.get("base_model_name_or_path")
    if file.base.takes_images and isinstance(trained_on, str) and not any(map(_in_multimodal, file.tensors)):
        # Under the names of a text model, peft would find no module of a multimodal model, and change nothing.
        model = f"t.AutoModelForCausalLM.from_pretrained({trained_on!r})"
    else:
        model = load_command(file.base)
    adapter, out = str(file.folder), f"{file.folder}-merged"
    resize, tokenizer = f"m.resize_token_embeddings({rows}); " if rows else "", ""
    if rows and (file.folder / "tokenizer_config.json").exists():
        tokenizer = f"; t.AutoTokenizer.from_pretrained({adapter!r}).save_pretrained({out!r})"
    return (
        f'python -c "import peft, transformers as t; m = {model}; {resize}'
        f'peft.PeftModel.from_pretrained(m, {adapter!r}).merge_and_unload().save_pretrained({out!r}){tokenizer}"'
    )


def _in_multimodal(name: str) -> bool:
    return "language_model" in name or "visual" in name or "vision" in name


def _short(name: str) -> str:
    return LANGUAGE_MODEL.sub("", name)
