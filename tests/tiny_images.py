"""Tiny random models that take images, with experts, processors, images and calibration files.

The folders have the same files, under the same names, as published checkpoints. torchvision is not needed.
"""

from __future__ import annotations

import atexit
import copy
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import tiny
import torch
import transformers
import yaml
from PIL import Image, ImageDraw
from remote_internvl.configuration_internvl_chat import InternVLChatConfig
from remote_internvl.modeling_internvl_chat import InternVLChatModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

REMOTE = Path(__file__).parent / "remote_internvl"
FIRST = ("<pad>", "<s>", "</s>", "<unk>", "user:", "assistant:", "system:")
# Size of the vocabulary, and number of plain words (w0, w1, …) that all families have.
VOCAB, WORDS = 80, 60
TEXT = tiny.COMMON | {"vocab_size": VOCAB, "max_position_embeddings": 256}
HIDDEN = TEXT["hidden_size"]
# Pixels: a tile is 4 x 4 patches.
SIDE, PATCH = 28, 7
# Formats and sizes (width, height) of calibration images.
SUFFIXES, SIZES = (".png", ".jpg"), ((60, 40), (40, 56), (84, 30), (28, 28), (33, 77))
SQUARE = {"height": SIDE, "width": SIDE}
GRIDS = [[height, width] for height in (SIDE, 2 * SIDE) for width in (SIDE, 2 * SIDE)]
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TILES = VISION | {"image_size": SIDE, "patch_size": PATCH}
SIGLIP = TILES | {"model_type": "siglip_vision_model", "vision_use_head": False}
QWEN_MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_TOP = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
QWEN_TEXT = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2}
QWEN_VISION_2 = QWEN_VISION | {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": HIDDEN}
# The smallest and largest area that an image is resized to: 4 and 16 tokens.
QWEN_IMAGE = {"patch_size": PATCH, "merge_size": 2, "size": {"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2}}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }} {% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}PLACE{% else %}{{ part['text'] }}{% endif %} "
    "{% endfor %}{% endif %}</s> {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class _Family:
    """The contents of a family's checkpoints.

    Attributes:
        place: The chat template's text for an image.
        marks: The tokenizer's special tokens; by name if the processor gets them from the tokenizer by name.
        text, vision, top: Parts of config.json. In `top`, a special token stands for its id.
        image, processor, video: The processor's files; None for a file that the family does not have.
    """

    config: type
    place: str
    marks: Sequence[str] | dict[str, str]
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    image: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] | None = None
    video: dict[str, Any] | None = None

    @property
    def tokens(self) -> dict[str, int]:
        """The vocabulary: token → id."""
        first = [*FIRST, *(self.marks.values() if isinstance(self.marks, dict) else self.marks)]
        return {token: i for i, token in enumerate([*first, *(f"w{i}" for i in range(VOCAB - len(first)))])}


_FAMILIES = {
    "internvl": _Family(
        config=transformers.InternVLConfig,
        place="<IMG_CONTEXT>",
        marks={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        text={"model_type": "qwen2"},
        vision=TILES,
        top={"image_token_id": "<IMG_CONTEXT>", "image_seq_length": 4},
        # The processor's class cuts tiles in spite of this.
        image={"image_processor_type": "GotOcr2ImageProcessorFast", "size": SQUARE, "max_patches": 4}
        | {"crop_to_patches": False},
        processor={"image_seq_length": 4},
        video={"video_processor_type": "InternVLVideoProcessor", "size": SQUARE},
    ),
    "qwen2_vl": _Family(
        config=transformers.Qwen2VLConfig,
        place=QWEN_PLACE,
        marks=QWEN_MARKS,
        text=QWEN_TEXT,
        # In this family, `hidden_size` is the hidden size of the language model.
        vision=QWEN_VISION | {"embed_dim": 16, "mlp_ratio": 2, "hidden_size": HIDDEN},
        top=QWEN_TOP,
        image={"image_processor_type": "Qwen2VLImageProcessor"} | QWEN_IMAGE,
    ),
    "qwen2_5_vl": _Family(
        config=transformers.Qwen2_5_VLConfig,
        place=QWEN_PLACE,
        marks=QWEN_MARKS,
        text=QWEN_TEXT,
        vision=QWEN_VISION_2 | {"window_size": SIDE, "fullatt_block_indexes": [1]},
        top=QWEN_TOP,
        image={"image_processor_type": "Qwen2VLImageProcessor"} | QWEN_IMAGE,
    ),
    "qwen3_vl": _Family(
        config=transformers.Qwen3VLConfig,
        place=QWEN_PLACE,
        marks=QWEN_MARKS,
        text=tiny.HEAD | {"rope_parameters": QWEN_TEXT["rope_parameters"] | {"mrope_interleaved": True}},
        vision=QWEN_VISION_2 | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        top=QWEN_TOP,
        image={"image_processor_type": "Qwen2VLImageProcessorFast"} | QWEN_IMAGE,
        video={"video_processor_type": "Qwen3VLVideoProcessor"} | QWEN_IMAGE,
    ),
    "llava_onevision": _Family(
        config=transformers.LlavaOnevisionConfig,
        place="<image>",
        marks=("<image>", "<video>"),
        text={"model_type": "qwen2"},
        # Larger patches, because each is a token.
        vision=SIGLIP | {"patch_size": 2 * PATCH},
        top={"image_token_index": "<image>", "video_token_index": "<video>", "image_grid_pinpoints": GRIDS},
        image={"image_processor_type": "LlavaOnevisionImageProcessor", "size": SQUARE, "image_grid_pinpoints": GRIDS},
        processor={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        video={"video_processor_type": "LlavaOnevisionVideoProcessor", "size": SQUARE},
    ),
    "gemma3": _Family(
        config=transformers.Gemma3Config,
        place="<start_of_image>",
        marks={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        text=tiny.HEAD
        | {"query_pre_attn_scalar": 8, "sliding_window": 16}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        vision=SIGLIP,
        top={
            "mm_tokens_per_image": 4,
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
            "image_token_index": "<image_soft_token>",
        },
        image={"image_processor_type": "Gemma3ImageProcessor", "size": SQUARE},
        processor={"image_seq_length": 4},
    ),
}
FAMILIES = tuple(_FAMILIES)
CHAT = "internvl_chat"
_FAMILIES[CHAT] = _Family(
    config=InternVLChatConfig,
    place="<image>\n",
    marks=("<img>", "</img>", "<IMG_CONTEXT>"),
    text={"architectures": ["Qwen2ForCausalLM"]},
    vision=TILES,
    top={
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        },
        "force_image_size": SIDE,
        "max_dynamic_patch": 4,
    },
    # As in the published checkpoints, whose own code prepares the images.
    image={"feature_extractor_type": "CLIPFeatureExtractor", "size": SIDE, "crop_size": SIDE, "resample": 3}
    | {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
)


def tokens(family: str) -> dict[str, int]:
    """Return the family's vocabulary: token → id."""
    return _FAMILIES[family].tokens


def make_model(family: str, seed: int = 0, tied: bool = False) -> Any:
    """Make a model of FAMILIES or CHAT with weights large enough for its blocks to affect the output.

    `tied`: embedding and head.
    """
    config = _make_config(family, tied)
    torch.manual_seed(seed)
    if family == CHAT:
        model: Any = InternVLChatModel(config)
    else:
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model.eval()


def make_expert(base: Any, seed: int, scale: float = 0.05) -> Any:
    """Return the base with noise on every weight, vision and projector included, except head and embedding."""
    expert = copy.deepcopy(base)
    torch.manual_seed(seed)
    kept = {id(part.weight) for part in (expert.get_input_embeddings(), expert.get_output_embeddings())}
    with torch.no_grad():
        for parameter in expert.parameters():
            if id(parameter) not in kept:
                parameter.add_(torch.randn_like(parameter) * scale)
    return expert


def save(model: Any, folder: Path, family: str) -> Path:
    """Save as a published checkpoint: weights under their published names, processor, and for CHAT its code."""
    model.save_pretrained(folder)
    if _FAMILIES[family].vision.get("model_type") == SIGLIP["model_type"]:
        _rename(folder / "model.safetensors", "vision_tower.", "vision_tower.vision_model.")
    if family == CHAT:
        for file in REMOTE.glob("*.py"):
            shutil.copy(file, folder)
    save_processor(folder, family)
    return folder


def save_processor(folder: Path, family: str) -> None:
    """Save a word tokenizer with the family's special tokens and chat template, and the files of its processor."""
    folder.mkdir(parents=True, exist_ok=True)
    made = _FAMILIES[family]
    inner = Tokenizer(models.WordLevel(made.tokens, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = made.marks if isinstance(made.marks, dict) else list(made.marks)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=marks,
    )
    tokenizer.chat_template = TEMPLATE.replace("PLACE", made.place)
    tokenizer.save_pretrained(folder)
    own = {} if family == CHAT else {"processor_class": made.config.__name__.replace("Config", "Processor")}
    files = {"preprocessor": made.image, "processor": made.processor, "video_preprocessor": made.video}
    for name, content in files.items():
        if content is not None:
            (folder / f"{name}_config.json").write_text(json.dumps(content | own, indent=2), encoding="utf-8")


def draw(path: Path, seed: int, size: tuple[int, int] = (60, 40)) -> Path:
    """Draw random shapes over a gradient, and save in the format of the path's suffix; `size` is (width, height)."""
    chance = random.Random(seed)
    colours = [tuple(chance.randrange(256) for _ in range(3)) for _ in range(8)]
    ramps = [Image.linear_gradient("L").rotate(90 * turns).resize(size) for turns in range(3)]
    picture = Image.blend(Image.merge("RGB", ramps), Image.new("RGB", size, colours[0]), 0.5)
    pen = ImageDraw.Draw(picture)
    for number, colour in enumerate(colours[1:]):
        left, top = chance.randrange(size[0]), chance.randrange(size[1])
        box = (left, top, left + chance.randint(1, size[0] // 2), top + chance.randint(1, size[1] // 2))
        (pen.ellipse if number % 2 else pen.rectangle)(box, fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def write_records(folder: Path, name: str, samples: int, seed: int) -> Path:
    """Write `name`.json in the format of the published dataset, with images of different sizes; return its path."""
    chance = random.Random(seed)
    records: list[dict[str, Any]] = []
    for i in range(samples):
        image = folder / f"{name}_images" / f"{i}{SUFFIXES[i % len(SUFFIXES)]}"
        draw(image, chance.randrange(2**32), SIZES[i % len(SIZES)])
        record = {"image_path": str(image.relative_to(folder)), "question": _words(chance)}
        if i % 2 == 0:
            record["response"] = _words(chance)
        records.append(record | {"question_id": i, "task_name": name})
    path = folder / f"{name}.json"
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


@cache
def _models(family: str, experts: int, samples: tuple[int, ...]) -> Path:
    """Return a folder with a base, its experts and their records, made once per process; callers copy it."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    base = make_model(family)
    save(base, folder / "base", family)
    for k in range(experts):
        save(make_expert(base, seed=k + 1), folder / f"expert{k}", family)
        write_records(folder, f"expert{k}", samples[k], seed=k)
    return folder


def make_merge(folder: Path, family: str, experts: int = 2, samples: Sequence[int] = (3, 2, 3), **config: Any) -> Path:
    """Write a base, its experts, calibration files with images and a merge.yaml; return the path of merge.yaml."""
    shutil.copytree(_models(family, experts, tuple(samples[:experts])), folder, dirs_exist_ok=True)
    # The random numbers that a test draws next do not depend on whether the models were there already.
    torch.manual_seed(experts)
    listed = []
    for k in range(experts):
        listed.append(
            {"model": f"expert{k}", "calibration": f"expert{k}.json", "parameters": {"weight": 0.2 + 0.1 * k}}
        )
    defaults: dict[str, Any] = {"merge_method": "expert_merging_pp", "preset": "paper", "base_model": "base"}
    defaults["models"] = listed
    defaults |= {"trust_remote_code": True} if family == CHAT else {}
    # As in `tiny.make_merge`: the coefficients change a little at every step.
    parameters = {"learning_rate": 0.1, "gradient_accumulation": 3, "hidden_layers": [1, 2], "regularization": 0.5}
    merged = {**defaults, "parameters": parameters | config.pop("parameters", {}), **config}
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(merged, sort_keys=False), encoding="utf-8")
    return path


def _make_config(family: str, tied: bool) -> Any:
    """Return the config, with ids in place of the tokens in `_FAMILIES`."""
    made = _FAMILIES[family]
    tokens = made.tokens
    top = {key: tokens[value] if isinstance(value, str) else value for key, value in made.top.items()}
    text = TEXT | made.text | {"tie_word_embeddings": tied}
    name = "llm_config" if family == CHAT else "text_config"
    # A copy, because configs keep and change their arguments.
    parts = copy.deepcopy({name: text, "vision_config": made.vision, **top})
    return made.config(**parts, tie_word_embeddings=tied)


def _rename(file: Path, old: str, new: str) -> None:
    """Rename tensors to the prefix of published files, which transformers restores only on models loaded with it."""
    tensors = safetensors.torch.load(file.read_bytes())
    affected = {name for name in tensors if name.startswith(old) and not name.startswith(new)}
    renamed = {new + name.removeprefix(old) if name in affected else name: tensors[name] for name in tensors}
    safetensors.torch.save_file(renamed, file, metadata={"format": "pt"})


def _words(chance: random.Random) -> str:
    return " ".join(f"w{chance.randrange(WORDS)}" for _ in range(chance.randint(2, 5)))
