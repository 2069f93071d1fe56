"""OpenGVLab's original InternVL checkpoints, which bring their own code: image token and generation arguments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.bounded_process import bounded
from engine.errors import CheckpointError
from engine.models.loading import beyond_limits, load_tokenizer

MODEL_TYPE = "internvl_chat"
START, CONTEXT, END = "<img>", "<IMG_CONTEXT>", "</img>"


def is_original(config: Any) -> bool:
    """Return whether a config is that of an original InternVL checkpoint."""
    return bool(config.model_type == MODEL_TYPE)


def for_generation(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward pass as `generate` takes them.

    `image_flags` is removed. The pixels are None for a sample without images, whose only tile is a dummy with flag 0.
    """
    flags = given["image_flags"]
    pixels = given["pixel_values"] if flags.all() else None
    return {name: value for name, value in given.items() if name != "image_flags"} | {"pixel_values": pixels}


def set_image_token(model: Any, folder: Path) -> None:
    """Set the id of the image token in an original InternVL model, from the tokenizer in `folder`.

    InternVL's own `chat` sets it before its forward passes, which are called directly here. Other models are left as
    they are.

    Raises:
        CheckpointError: The tokenizer cannot be loaded within the limits of a child process, or has no image token.
    """
    if is_original(model.config):
        model.img_context_token_id = bounded(
            lambda: context_token(load_tokenizer(folder, remote_code=True), folder), beyond_limits(folder)
        )


def context_token(tokenizer: Any, folder: Path) -> int:
    """Return the id of the token that stands for a part of an image.

    Raises:
        CheckpointError: The tokenizer has no such token.
    """
    token = tokenizer.convert_tokens_to_ids(CONTEXT)
    if token is None or token == tokenizer.unk_token_id:
        raise CheckpointError(f"its tokenizer has no token {CONTEXT}", str(folder))
    return int(token)
