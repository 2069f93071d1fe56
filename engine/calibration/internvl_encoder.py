"""Encode records for OpenGVLab's original InternVL checkpoints, which bring their own code.

The prompt follows the checkpoint's conversation template. An image becomes tiles of one size, and a thumbnail if there
are several tiles.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from engine.calibration.forms import called
from engine.calibration.image_encoder import PLACE, check_known, kept, placed, spans, texts
from engine.calibration.images import read_image
from engine.calibration.records import Record
from engine.calibration.samples import Encoded
from engine.calibration.text_encoder import in_common, messages_of, taking, without_template
from engine.errors import CalibrationError
from engine.models.internvl import CONTEXT, END, START, context_token
from engine.models.loading import reading
from engine.untrusted import shown

# Options of images, named as in config.json, and their values if it does not give them.
OPTIONS = {"min_dynamic_patch": 1, "max_dynamic_patch": 12, "use_thumbnail": True}

# Maximum tiles of an image. The number of candidate grids grows with its square.
TILES = 1000

# Mean and standard deviation of the pixels per channel, those of ImageNet.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ChatEncoder:
    """Encoder of chats with and without images.

    Args:
        config: The checkpoint's config.
        tokenizer: The tokenizer.
        folder: The folder of the checkpoint's code.
        dtype: The dtype of the pixels.

    Raises:
        CheckpointError: The folder has no conversation template, or the tokenizer no image token.
    """

    def __init__(self, config: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
        self._config, self._tokenizer, self._dtype = config, tokenizer, dtype
        with reading("the model has no conversation.py with get_conv_template", folder):
            self._conversation = get_class_from_dynamic_module("conversation.get_conv_template", str(folder))
        vision = config.vision_config
        self._size = config.force_image_size or vision.image_size
        # Tokens per tile: the patches of the tile after the projector's downsampling.
        self._tokens = int((self._size // vision.patch_size) ** 2 * config.downsample_ratio**2)
        self._context = context_token(tokenizer, folder)

    def encode(self, record: Record) -> Encoded:
        """Encode a record. See `Encoder.encode`."""
        tiles = [self._tiles(read_image(path, record.where), record) for path in record.images]
        answer, is_prompt = None, False
        if record.field == "input_ids":
            ids = list(record.fields["input_ids"])
        else:
            with taking("tokenizer or conversation template", record):
                ids, answer, is_prompt = self._tokenize(record, [len(tile) for tile in tiles])
        marks_T = torch.tensor(ids) == self._context
        if int(marks_T.sum()) != self._tokens * sum(map(len, tiles)):
            raise CalibrationError(
                f"the record has {int(marks_T.sum())} image tokens",
                record.where,
                f"{self._tokens * sum(map(len, tiles))}, as for its {len(record.images)} image(s)",
            )
        # The model's forward pass requires at least one tile. It ignores tiles with the flag 0.
        pixels = torch.cat(tiles) if tiles else torch.zeros(1, 3, self._size, self._size)
        flags = torch.full((len(pixels),), int(bool(tiles)))
        inputs = {"pixel_values": kept(pixels, self._dtype), "image_flags": flags}
        return Encoded(ids, is_prompt, answer, spans(marks_T), inputs)

    def _tokenize(self, record: Record, tiles: list[int]) -> tuple[list[int], int | None, bool]:
        """Return the token ids, the index of the answer's first token, and whether the record is a prompt."""
        if record.field in ("text", "prompt"):
            encoded = without_template(self._tokenizer, record)
            return list(encoded.input_ids), encoded.response, encoded.is_prompt
        if record.fields.get("tools") or any(called(messages_of(record))):
            raise CalibrationError("the record has tools, but the model's conversation template has none", record.where)
        messages = [(message["role"], texts(message["content"], PLACE)) for message in placed(record)]
        answered = messages[-1][0] == "assistant"
        prompt = self._prompt(messages[:-1] if answered else messages, True, tiles)
        prompt_ids = list(self._tokenizer(prompt).input_ids)
        if not answered:
            return prompt_ids, None, True
        ids = list(self._tokenizer(self._prompt(messages, False, tiles)).input_ids)
        return ids, in_common(prompt_ids, ids), False

    def _prompt(self, messages: list[tuple[str, str]], is_open: bool, tiles: list[int]) -> str:
        """Return the conversation as text. `is_open`: it ends where the assistant's next message begins."""
        conversation = self._conversation(self._config.template)
        system = getattr(self._config, "system_message", None)
        if system is not None:
            conversation.system_message = system
        for role, text in messages:
            if role == "system":
                conversation.system_message = text
            else:
                conversation.append_message(conversation.roles[role == "assistant"], text)
        if is_open:
            conversation.append_message(conversation.roles[1], None)
        prompt: str = conversation.get_prompt()
        for count in tiles:
            prompt = prompt.replace(PLACE, f"{START}{CONTEXT * (self._tokens * count)}{END}", 1)
        return prompt

    def _tiles(self, image: Image.Image, record: Record) -> Tensor:
        """Return the tiles of an image, [tiles, 3, size, size] float32, resized with PIL as in the model's training."""
        given = record.image_options
        check_known(given, OPTIONS, "InternVL", record.where)
        options = {name: getattr(self._config, name, default) for name, default in OPTIONS.items()} | dict(given)
        least, most, thumbnail = options.values()
        if type(least) is not int or type(most) is not int or not 1 <= least <= most <= TILES:
            raise CalibrationError(
                f"`image_options` gives {shown(repr(least))} to {shown(repr(most))} tiles per image",
                record.where,
                f"1 <= min_dynamic_patch <= max_dynamic_patch <= {TILES}",
            )
        if not isinstance(thumbnail, bool):
            raise CalibrationError(f"use_thumbnail is {shown(repr(thumbnail))}", record.where, "true or false")
        with taking("image processor", record):
            prepared = self._prepare(
                image,
                crop_to_patches=True,
                min_patches=least,
                max_patches=most,
                return_tensors="pt",
            )
        pixels: Tensor = prepared["pixel_values"]
        # The processor appends a thumbnail if there are several tiles.
        return pixels if thumbnail or len(pixels) == 1 else pixels[:-1]

    @cached_property
    def _prepare(self) -> Any:
        # Imported only if there are images to prepare.
        from transformers import GotOcr2ImageProcessorPil

        side = {"height": self._size, "width": self._size}
        return GotOcr2ImageProcessorPil(size=side, image_mean=MEAN, image_std=STD, resample=Image.Resampling.BICUBIC)
