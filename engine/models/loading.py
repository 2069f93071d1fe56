"""A part of the house that has no words of its own yet."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from engine.checkpoints.headers import read_json
from engine.errors import CheckpointError
from engine.untrusted import TOKENIZER_BYTES, check_regular, library_errors_as, memory_limit

# Config keys that say nothing about what a model computes from a hidden state.
NOT_COMPUTED = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
    "transformers_version", "use_cache",
}  # fmt: skip


def load_model_config(folder: Path, remote_code: bool = False) -> Any:
    """The folder's configuration as transformers reads it. `remote_code`: code that comes with it may run.

    Raises:
        CheckpointError: transformers does not know the model type, or does not take the configuration.
    """
    own = own_code(folder, "config.json", remote_code)
    if own and read_json(folder / "config.json").get("model_type") not in CONFIG_MAPPING:
        raise CheckpointError("transformers has no such model, and code beside it may not run", str(folder), do=own)
    what = "transformers cannot read its config.json"
    # What code loads for itself is its own affair.
    bound = (
        nullcontext()
        if remote_code
        else memory_limit(CheckpointError(f"{what}: it takes too much memory", str(folder)))
    )
    with reading(what, folder), bound:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code)


def load_config_like(own: Any, folder: Path) -> Any:
    """An expert's configuration, where the base's is `own`: of the same class where that comes from the base's code.

    No code but the base's is ever run, whatever an expert's folder has of it, or wherever it points to for it.

    Raises:
        CheckpointError: see `load_model_config`.
    """
    if not is_remote(own):
        return load_model_config(folder)
    with reading("the base's code cannot read its config.json", folder):
        config = type(own).from_dict(read_json(folder / "config.json"))
    config.auto_map, config.name_or_path = own.auto_map, own.name_or_path
    return config


def load_generation_config(folder: Path) -> Any:
    """How the folder's model writes; None where it does not say.

    Raises:
        CheckpointError: transformers does not take it.
    """
    if not (folder / "generation_config.json").exists():
        return None
    with reading("transformers cannot read its generation_config.json", folder):
        return transformers.GenerationConfig.from_pretrained(folder)


def load_tokenizer(folder: Path, remote_code: bool = False) -> Any:
    """The folder's tokenizer. `remote_code`: code that comes with it may run.

    Raises:
        CheckpointError: there is none, or transformers cannot read it.
    """
    check_tokenizer_files(folder)
    do = "add the tokenizer's files to the base's folder, or give calibration records as `input_ids`"
    do = own_code(folder, "tokenizer_config.json", remote_code) or do
    with reading("its tokenizer cannot be read", folder, do):
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code)


def check_tokenizer_files(folder: Path) -> None:
    """Refuse what is no regular file of a tokenizer's size.

    Raises:
        CheckpointError: naming the file.
    """
    for path in folder.iterdir():
        if path.name.startswith(("tokenizer", "vocab", "merges", "chat_template", "special_tokens", "added_tokens")):
            check_regular(path, TOKENIZER_BYTES, CheckpointError)


def computes_alike(one: Any, other: Any) -> bool:
    """Whether two configurations describe the same computation."""

    def essence(config: Any) -> dict[str, Any]:
        return {key: value for key, value in config.to_dict().items() if key not in NOT_COMPUTED}

    return essence(one) == essence(other)


def is_remote(config: Any) -> bool:
    """Whether a configuration is of code that came with a checkpoint; it is only if that was allowed to run."""
    return type(config).__module__.startswith("transformers_modules.")


def reading(what: str, folder: Path, do: str = "") -> AbstractContextManager[None]:
    """What transformers raises over the folder's files, as a fault of theirs."""
    return library_errors_as(lambda told: CheckpointError(f"{what}: {told}", str(folder), do=do), StrictDataclassError)


def own_code(folder: Path, file: str, allowed: bool) -> str:
    """What to do where a file says that the model comes with code, and that may not run."""
    own = not allowed and (folder / file).exists() and "auto_map" in read_json(folder / file)
    return "`trust_remote_code: true` lets code from the model's folder run; look at it first" if own else ""


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
