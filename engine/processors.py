"""The processor that belongs to a model's folder: its tokenizer and what prepares its images. Knows no records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from engine.headers import read_json
from engine.model import check_tokenizer_files, load_model_config, own_code, reading

CONFIGS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def load_processor(folder: Path, remote_code: bool = False) -> Any:
    """What makes a model's inputs of text and images, for a model that takes images.

    With torchvision as AutoProcessor has it; without, its images are prepared by PIL, and videos not at all.

    Raises:
        CheckpointError: there is none, or transformers cannot read it.
    """
    check_tokenizer_files(folder)
    found = {name: read_json(folder / name) for name in CONFIGS if (folder / name).exists()}
    do = "add the files of its processor (preprocessor_config.json, tokenizer, chat template) to the folder"
    do = next((told for name in found if (told := own_code(folder, name, remote_code))), do)
    kind: Any = PROCESSOR_MAPPING.get(type(load_model_config(folder, remote_code)), None)
    with reading("its processor cannot be read", folder, do):
        own = kind is not None and not is_torchvision_available()
        kind = _without_videos(kind) if own else transformers.AutoProcessor
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code)


def _without_videos(kind: Any) -> type[Any]:
    """A processor class that needs no processor of videos, all of which need torchvision."""

    def get_attributes(_: type[Any]) -> list[str]:
        return [name for name in kind.get_attributes() if name != "video_processor"]

    return type(kind.__name__, (kind,), {"get_attributes": classmethod(get_attributes)})
