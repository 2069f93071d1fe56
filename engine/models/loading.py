"""Configs, generation configs, tokenizers and processors of a model folder, loaded by transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from engine.bounded_process import LIMITS, Fault, bounded
from engine.checkpoints.headers import read_json
from engine.errors import CheckpointError
from engine.untrusted import TOKENIZER_BYTES, check_regular, library_errors_as, memory_limit

transformers.logging.set_verbosity_error()

# Config keys that do not change what a model computes from a hidden state.
NOT_COMPUTED = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
    "transformers_version", "use_cache",
}  # fmt: skip
# Implementations that are part of transformers. Any other name, such as that of a hub repository or of a package, would
# make transformers fetch or import code; then its default for the architecture is used.
ATTENTIONS = {"eager", "sdpa"}
EXPERTS = {"eager", "batched_mm", "grouped_mm"}
CONFIGS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def load_model_config(folder: Path, remote_code: bool = False) -> Any:
    """Return the config of a model folder. `remote_code` allows code in the folder to run.

    Raises:
        CheckpointError: transformers does not know the model type, or rejects the config.
    """
    advice = own_code(folder, "config.json", remote_code)
    kind = read_json(folder / "config.json").get("model_type") if advice else None
    if advice and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise CheckpointError(
            "transformers does not know this type of model, and code in its folder is not allowed to run",
            str(folder),
            do=advice,
        )
    what = "transformers cannot read its config.json"
    # No limit on code that is allowed to run: it may import large libraries.
    bound = (
        nullcontext()
        if remote_code
        else memory_limit(CheckpointError(f"{what}: it takes too much memory", str(folder)))
    )
    with reading(what, folder), bound:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code)
        _choose_implementations(config)
    # Left in config.json by a merge into 16 bits; `engine.checkpoints.headers` refuses weights that are quantized.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def with_defaults(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the content of a config.json, or of a section that names its type, with all values that it leaves out.

    It is returned as it is if transformers does not know its type, or rejects it. `folder` is that of config.json.
    """
    if not is_known(content):
        return dict(content)
    what = "transformers cannot read its config.json"
    try:
        with reading(what, folder), memory_limit(CheckpointError(f"{what}: it takes too much memory", str(folder))):
            full = CONFIG_MAPPING[content["model_type"]].from_dict(copy.deepcopy(dict(content))).to_dict()
    except CheckpointError:
        return dict(content)
    plain: dict[str, Any] = json.loads(json.dumps(full, default=str))
    return plain


def with_content(config: Any, content: Mapping[str, Any]) -> Any:
    """Return a config of the same class with another content of config.json.

    Raises:
        CheckpointError: transformers rejects the content.
    """
    with reading("transformers cannot read the values of `config_source`", Path(str(config.name_or_path))):
        changed = type(config).from_dict(dict(content))
    _choose_implementations(changed)
    if is_remote(config):
        changed.auto_map, changed.name_or_path = config.auto_map, config.name_or_path
    return changed


def _choose_implementations(config: Any) -> None:
    """Remove implementations from a config and its sections that are not part of transformers."""
    # Each value as the config has it: setting it for a config also sets it for all of its sections.
    parts = [part for part in vars(config).values() if isinstance(part, transformers.PretrainedConfig)]
    for name, known in (("_attn_implementation_internal", ATTENTIONS), ("_experts_implementation_internal", EXPERTS)):
        value = getattr(config, name, None)
        if not isinstance(value, str) or value not in known:
            setattr(config, name, None)
    for part in parts:
        _choose_implementations(part)


def load_config_like(base: Any, folder: Path) -> Any:
    """Return the config of an expert's folder, given the config of its base.

    If the base's config class comes from code in the base's folder, the expert's config is read with that class. Code
    in an expert's folder, or code that its config refers to, never runs.

    Raises:
        CheckpointError: See `load_model_config`.
    """
    if not is_remote(base):
        return load_model_config(folder)
    with reading("the base's code cannot read its config.json", folder):
        config = type(base).from_dict(read_json(folder / "config.json"))
        _choose_implementations(config)
    config.auto_map, config.name_or_path = base.auto_map, base.name_or_path
    return config


def load_generation_config(folder: Path) -> Any:
    """Return the generation config of a model folder for greedy decoding, or None if it has no file of that kind.

    Raises:
        CheckpointError: transformers rejects the file.
    """
    if not (folder / "generation_config.json").exists():
        return None
    with reading("transformers cannot read its generation_config.json", folder):
        return greedy(transformers.GenerationConfig.from_pretrained(folder))


def greedy(given: Any) -> Any:
    """Return a generation config with the special tokens of another, and none of its settings.

    Beams, penalties, stop strings and several sequences would change the responses, and a second model for drafts would
    be loaded from the place that a setting names.
    """
    stops = given.eos_token_id if isinstance(given.eos_token_id, list) else [given.eos_token_id]
    padding = given.pad_token_id if given.pad_token_id is not None else (stops or [None])[0]
    return transformers.GenerationConfig(
        bos_token_id=given.bos_token_id, eos_token_id=given.eos_token_id, pad_token_id=0 if padding is None else padding
    )


def load_tokenizer(folder: Path, remote_code: bool = False) -> Any:
    """Return the tokenizer of a model folder. `remote_code` allows code in the folder to run.

    Raises:
        CheckpointError: The folder has no tokenizer, or transformers cannot read it.
    """
    check_tokenizer_files(folder)
    do = "add the tokenizer's files to the base's folder, or give the calibration records as `input_ids`"
    do = own_code(folder, "tokenizer_config.json", remote_code) or do
    with reading("its tokenizer cannot be read", folder, do):
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code)


def check_tokenizer(folder: Path, remote_code: bool = False) -> None:
    """Check in a child process that the tokenizer of a model folder can be loaded, within limits of time and memory.

    Raises:
        CheckpointError: See `load_tokenizer`; or the limits are exceeded.
    """

    def load() -> None:
        load_tokenizer(folder, remote_code)

    bounded(load, beyond_limits(folder))


def check_tokenizer_files(folder: Path) -> None:
    """Check that a folder's files are regular files, and those of its tokenizer at most `TOKENIZER_BYTES` large.

    A tokenizer's class decides which files it opens.

    Raises:
        CheckpointError: A file is larger, or is not a regular file.
    """
    for path in folder.iterdir():
        if path.name.startswith(("tokenizer", "vocab", "merges", "chat_template", "special_tokens", "added_tokens")):
            check_regular(path, TOKENIZER_BYTES, CheckpointError)
        elif path.exists() and not path.is_dir():
            check_regular(path, None, CheckpointError)


def computes_alike(one: Any, other: Any) -> bool:
    """Return whether two configs describe the same computation: equal but for the keys in `NOT_COMPUTED`."""

    def computed(config: Any) -> dict[str, Any]:
        return {key: value for key, value in config.to_dict().items() if key not in NOT_COMPUTED}

    return computed(one) == computed(other)


def is_known(config: Mapping[str, Any]) -> bool:
    """Return whether transformers has a model of the type that a config.json names."""
    model_type = config.get("model_type")
    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def is_remote(config: Any) -> bool:
    """Return whether a config's class comes from code in a model folder, which was then allowed to run."""
    return type(config).__module__.startswith("transformers_modules.")


def reading(what: str, folder: Path, do: str = "") -> AbstractContextManager[None]:
    """Return a context in which exceptions of transformers become a `CheckpointError` about the folder."""

    def error(message: str) -> CheckpointError:
        return CheckpointError(f"{what}: {message}", str(folder), do=do)

    return library_errors_as(error, StrictDataclassError)


def beyond_limits(folder: Path) -> Fault:
    """Return the error of a model folder whose tokenizer or processor exceeds the limits of a child process."""
    do = "replace the files of its tokenizer, such as by those of the model that it was made from"
    return lambda fails: CheckpointError(f"its tokenizer {fails}", str(folder), LIMITS, do)


def own_code(folder: Path, file: str, allowed: bool) -> str:
    """Return advice for the user if `file` refers to code of the model that is not allowed to run, else ''."""
    refused = not allowed and (folder / file).exists() and "auto_map" in read_json(folder / file)
    return "read the code in the model's folder, then allow it with `trust_remote_code: true`" if refused else ""


def load_processor(folder: Path, remote_code: bool = False) -> Any:
    """Return the processor of a model that takes images: text and images to the arguments of a forward pass.

    With torchvision this is what `AutoProcessor` loads. Without torchvision, images are processed by PIL, and videos
    are not supported.

    Raises:
        CheckpointError: The folder has no processor, or transformers cannot read it.
    """
    check_tokenizer_files(folder)
    # Each file is read, so that an error in its JSON is reported with the name of the file.
    files = {name: read_json(folder / name) for name in CONFIGS if (folder / name).exists()}
    do = "add the files of its processor (preprocessor_config.json, tokenizer, chat template) to the folder"
    do = next((advice for name in files if (advice := own_code(folder, name, remote_code))), do)
    kind: Any = PROCESSOR_MAPPING.get(type(load_model_config(folder, remote_code)), None)
    with reading("its processor cannot be read", folder, do):
        without_videos = kind is not None and not is_torchvision_available()
        kind = _without_videos(kind) if without_videos else transformers.AutoProcessor
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code)


def _without_videos(kind: Any) -> type[Any]:
    """Return a subclass of a processor class without its video processor; all of these need torchvision."""

    def get_attributes(_: type[Any]) -> list[str]:
        return [name for name in kind.get_attributes() if name != "video_processor"]

    return type(kind.__name__, (kind,), {"get_attributes": classmethod(get_attributes)})
