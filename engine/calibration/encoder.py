"""A part of the house that has no words of its own yet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

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
    """What makes tokens of these records: the base's own way, by its files or those of `tokenizer_source`.

    Raises:
        CheckpointError: what is needed for it cannot be read.
    """
    folder = base_folder(plan)
    words = find_model(plan.tokenizer, ROOT) if plan.tokenizer else folder
    everyone = [record for mine in records for record in mine]
    return encoder_of(plan.base_header, folder, words, plan.dtype, plan.config.trust_remote_code, everyone)


def encoder_of(
    header: ModelHeader, folder: Path, words: Path, dtype_name: str, code: bool, records: Sequence[Record]
) -> Encoder:
    """See `encoder`: of the model in `folder`, by the tokenizer in `words`. `code`: what comes with them may run."""
    fields, images = {record.field for record in records}, any(record.images for record in records)
    if header.takes_images:
        config, dtype = load_model_config(folder, code), getattr(torch, dtype_name)
        if is_original(config):
            return ChatEncoder(config, load_tokenizer(words, code), folder, dtype)
        if images:
            return ImageEncoder(load_processor(words, code), dtype)
    config = header.config
    names = [f"{kind}_token_{number}" for kind in ("image", "video") for number in ("id", "index")]
    seen = {number for name in names if type(number := config.get(name)) is int}
    return TextEncoder(load_tokenizer(words, code) if fields != {"input_ids"} else None, seen)
