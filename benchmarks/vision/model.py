"""A small InternVL of transformers with a word tokenizer, its folder's files, and the inputs of pictures with texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import CELL, GRID, SIDE, WORDS
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForImageTextToText, InternVLConfig, PreTrainedTokenizerFast

PLACES = GRID**2  # image tokens of a picture: one a cell, as the projector joins 2 x 2 patches
START, END, CONTEXT, VIDEO = MARKS = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
VOCABULARY = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *MARKS, "user:", "assistant:", *WORDS))}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<IMG_CONTEXT> {% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %} </s> {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT = {"model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
TEXT |= {"vocab_size": len(VOCABULARY), "eos_token_id": VOCABULARY["</s>"], "pad_token_id": 0, "bos_token_id": None}
VISION = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": SIDE, "patch_size": CELL // 2}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
Row = tuple[Image.Image, str, str]


def build() -> Any:
    """Return a model with random weights, in float32."""
    config = InternVLConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=VOCABULARY[CONTEXT],
        image_seq_length=PLACES,
        tie_word_embeddings=True,
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config.update(eos_token_id=VOCABULARY["</s>"], pad_token_id=0)
    return model


def save_processor(folder: Path) -> None:
    """Save the tokenizer, the chat template and the processor's configs to a model folder."""
    inner = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("start_image", "end_image", "context_image", "video"), MARKS, strict=True))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={f"{name}_token": mark for name, mark in names.items()},
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    square = {"size": {"height": SIDE, "width": SIDE}}
    files = {
        "preprocessor": {"image_processor_type": "GotOcr2ImageProcessorFast", "max_patches": 1} | square | HALF,
        "processor": {"image_seq_length": PLACES},
        "video_preprocessor": {"video_processor_type": "InternVLVideoProcessor"} | square,
    }
    for name, content in files.items():
        whole = content | {"processor_class": "InternVLProcessor"}
        (folder / f"{name}_config.json").write_text(json.dumps(whole, indent=2), encoding="utf-8")


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Return pictures as the processor does: [B, 3, 64, 64] in float32, from -1 to 1."""
    stacked_BHWC = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1


def encode(question: str, answer: str) -> tuple[list[int], int]:
    """Return the token ids of one chat about a picture, and the index at which its answer starts."""
    prompt = f"user: {START} {' '.join([CONTEXT] * PLACES)} {END} {question} </s> assistant:"
    ids = [VOCABULARY[word] for word in f"{prompt} {answer} </s>".split()]
    return ids, len(prompt.split())


def inputs(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return the padded inputs of a batch of (picture, question, answer), with labels on the answers only."""
    encoded = [encode(question, answer) for _, question, answer in rows]
    width = max(len(ids) for ids, _ in encoded)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, -100)
    for b, (ids, start) in enumerate(encoded):
        ids_BT[b, : len(ids)] = torch.tensor(ids)
        mask_BT[b, : len(ids)] = 1
        labels_BT[b, start : len(ids)] = torch.tensor(ids[start:])
    images = pixels([image for image, _, _ in rows])
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT, "pixel_values": images}
