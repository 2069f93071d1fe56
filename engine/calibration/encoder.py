"""Choose the encoder for a model and its records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.calibration.bounded_encoder import BoundedEncoder
from engine.calibration.image_encoder import ImageEncoder
from engine.calibration.internvl_encoder import ChatEncoder
from engine.calibration.records import Record, Records
from engine.calibration.samples import Encoder
from engine.calibration.text_encoder import TextEncoder
from engine.checkpoints.find import ROOT, find_model
from engine.checkpoints.headers import ModelHeader
from engine.models.internvl import is_original
from engine.models.loading import load_model_config, load_processor, load_tokenizer
from engine.planning.open_models import base_folder
from engine.planning.plan import Plan


def encoder(plan: Plan, records: Records) -> Encoder:
    """Return the encoder of a merge, with the tokenizer and processor of the base or of `tokenizer_source`.

    Raises:
        CheckpointError: A file of the tokenizer, the processor or the model's own code is missing or invalid.
    """
    folder, tokenizer = base_folder(plan), tokenizer_folder(plan)
    flat = [record for of_expert in records for record in of_expert]
    code = plan.config.trust_remote_code
    return encoder_of(plan.base_header, folder, tokenizer, plan.dtype, code, flat, plan.chat_template)


def bounded_encoder(plan: Plan, records: Records) -> BoundedEncoder:
    """Return `encoder(plan, records)` in a child process with limits on time and memory.

    Raises:
        CheckpointError: See `encoder`; or loading exceeds the limits.
    """
    return BoundedEncoder(lambda: encoder(plan, records), tokenizer_folder(plan))


def tokenizer_folder(plan: Plan) -> Path:
    """Return the folder of the tokenizer and processor of a merge."""
    return find_model(plan.tokenizer, ROOT) if plan.tokenizer else base_folder(plan)


def encoder_of(
    header: ModelHeader,
    folder: Path,
    tokenizer: Path,
    dtype_name: str,
    code: bool,
    records: Sequence[Record],
    chat_template: str | None = None,
) -> Encoder:
    """Return the encoder of a model.

    Args:
        header: The model's header.
        folder: The model's folder.
        tokenizer: The folder of tokenizer and processor.
        dtype_name: The dtype of float inputs, as torch names it.
        code: Whether Python code in these folders may run.
        records: The records to encode. A tokenizer or processor is loaded only if they need it.
        chat_template: Replaces the chat template of tokenizer and processor.

    Raises:
        CheckpointError: See `encoder`.
    """
    fields, images = {record.field for record in records}, any(record.images for record in records)
    if header.takes_images:
        config, dtype = load_model_config(folder, code), getattr(torch, dtype_name)
        if is_original(config):
            return ChatEncoder(config, load_tokenizer(tokenizer, code), folder, dtype)
        if images:
            return ImageEncoder(_with_template(load_processor(tokenizer, code), chat_template), dtype)
    config = header.config
    names = [f"{kind}_token_{number}" for kind in ("image", "video") for number in ("id", "index")]
    seen = {number for name in names if type(number := config.get(name)) is int}
    if fields == {"input_ids"}:
        return TextEncoder(None, seen)
    return TextEncoder(_with_template(load_tokenizer(tokenizer, code), chat_template), seen)


def _with_template(loaded: Any, chat_template: str | None) -> Any:
    """Return a tokenizer or a processor with another chat template (None: as it is)."""
    if chat_template is not None:
        loaded.chat_template = chat_template
    return loaded
