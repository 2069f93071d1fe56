"""A part of the house that has no words of its own yet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.models.loading import load_tokenizer

MODEL_TYPE = "internvl_chat"


START, CONTEXT, END = "<img>", "<IMG_CONTEXT>", "</img>"


def is_original(config: Any) -> bool:
    """Whether a model's configuration is that of such a checkpoint."""
    return bool(config.model_type == MODEL_TYPE)


def for_generation(given: Mapping[str, Any]) -> dict[str, Any]:
    """A forward pass's arguments as `generate` takes them: without the flags, and tiles only where they count."""
    flags = given["image_flags"]
    pixels = given["pixel_values"] if flags.all() else None
    return {name: value for name, value in given.items() if name != "image_flags"} | {"pixel_values": pixels}


def set_image_token(model: Any, folder: Path) -> None:
    """Tell such a model which token stands for a part of an image, as its own chat does; `folder` has its tokenizer."""
    if is_original(model.config):
        model.img_context_token_id = context_token(load_tokenizer(folder, remote_code=True), folder)


def context_token(tokenizer: Any, folder: Path) -> int:
    """The id of the token that stands for a part of an image.

    Raises:
        CheckpointError: the tokenizer has none.
    """
    found = tokenizer.convert_tokens_to_ids(CONTEXT)
    if found is None or found == tokenizer.unk_token_id:
        raise CheckpointError(f"its tokenizer has no token {CONTEXT}", str(folder))
    return int(found)
