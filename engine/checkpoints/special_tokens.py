"""What the files of a folder say about its tokenizer, which is not loaded: special tokens and chat templates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from engine.checkpoints.adapter_file import CONFIG
from engine.checkpoints.find import TEMPLATES
from engine.checkpoints.headers import TEXT_SECTIONS, read_json
from engine.errors import CheckpointError
from engine.untrusted import JSON_BYTES, TOKENIZER_BYTES, parse_json, read_text

# Keys of config.json and generation_config.json, and the tokens in tokenizer_config.json whose ids they are.
IDS = {"bos_token_id": "bos_token", "eos_token_id": "eos_token", "pad_token_id": "pad_token"}

# An id as the key of a JSON object. Ids have 32 bits.
DECIMAL = re.compile("[0-9]{1,10}")

# Keys of generation_config.json that greedy decoding uses, and those that matter together with others only.
WITHOUT_EFFECT = {
    *IDS, "_from_model_config", "cache_implementation", "chat_format", "decoder_start_token_id", "early_stopping",
    "epsilon_cutoff", "eta_cutoff", "length_penalty", "max_length", "max_new_tokens", "max_window_size", "min_p",
    "output_attentions", "output_hidden_states", "output_logits", "output_scores", "temperature", "top_h", "top_k",
    "top_p", "transformers_version", "typical_p", "use_cache",
}  # fmt: skip


def has_chat_template(folder: Path) -> bool:
    """Return whether a folder's tokenizer or processor has a chat template.

    Raises:
        CheckpointError: tokenizer_config.json is not a JSON object.
    """
    files = ("chat_template.jinja", "chat_template.json", TEMPLATES)
    return any((folder / name).exists() for name in files) or bool(
        _read(folder / "tokenizer_config.json").get("chat_template")
    )


def chat_template_of(folder: Path) -> str | None:
    """Return the default chat template of a folder's tokenizer, found as transformers finds it; None if it has none.

    Raises:
        CheckpointError: A file is not JSON, not UTF-8, or too large.
    """
    file = folder / "chat_template.jinja"
    if file.exists():
        return read_text(file, JSON_BYTES, CheckpointError)
    given = _read(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(given, list):
        templates = [_mapping(one) for one in given]
        given = next((one.get("template") for one in templates if one.get("name") == "default"), None)
    return given if isinstance(given, str) else None


def unused_in_generation(folder: Path) -> set[str]:
    """Return the keys of generation_config.json that change how a model writes, which greedy decoding ignores."""
    found = _read(folder / "generation_config.json")
    neutral: tuple[Any, ...] = (None, False, 0, 1, [], {})
    return {
        key for key, value in found.items() if key not in WITHOUT_EFFECT and (value is True or value not in neutral)
    }


def with_ids_of(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with the special tokens of a folder's tokenizer.

    Raises:
        CheckpointError: a file of the tokenizer is not JSON.
    """
    ids = _of_config(folder) | special_ids(folder)
    sections = {key: config[key] for key in TEXT_SECTIONS if isinstance(config.get(key), dict)}
    inner = {key: section | {name: ids[name] for name in ids if name in section} for key, section in sections.items()}
    in_sections = {name for section in sections.values() for name in section}
    return config | inner | {name: ids[name] for name in ids if name in config or name not in in_sections}


def generation_with_ids_of(folder: Path, generation: dict[str, Any]) -> dict[str, Any]:
    """Return a generation_config.json with the special tokens of a folder's tokenizer.

    Several end tokens of the folder's own generation_config.json are kept if the tokenizer's is one of them.

    Raises:
        CheckpointError: a file of the tokenizer is not JSON.
    """
    own, ids = _read(folder / "generation_config.json"), special_ids(folder)
    chosen = _of_config(folder) | {name: own[name] for name in IDS if own.get(name) is not None}
    for name, number in ids.items():
        given = chosen.get(name)
        if given != number and not (isinstance(given, list) and number in given):
            chosen[name] = number
    return generation | chosen


def special_ids(folder: Path) -> dict[str, int]:
    """Return the ids of the tokenizer's start, end and padding token by the keys of IDS, as far as its files give them.

    Raises:
        CheckpointError: a file is not JSON.
    """
    config = _read(folder / "special_tokens_map.json") | _read(folder / "tokenizer_config.json")
    given = {key: config.get(name) for key, name in IDS.items()}
    names = {key: token.get("content") if isinstance(token, dict) else token for key, token in given.items()}
    known = _known(folder, config) if any(names.values()) else {}
    return {key: known[name] for key, name in names.items() if isinstance(name, str) and name in known}


def _known(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    """Return the ids of tokens by their text, from tokenizer_config.json and tokenizer.json."""
    file, tokenizer = folder / "tokenizer.json", {}
    if file.exists():
        tokenizer = _mapping(parse_json(read_text(file, TOKENIZER_BYTES, CheckpointError), str(file), CheckpointError))
    decoder = _mapping(config.get("added_tokens_decoder"))
    added = tokenizer.get("added_tokens")
    tokens = [_mapping(token) for token in added] if isinstance(added, list) else []
    tokens += [_mapping(token) | {"id": int(text)} for text, token in decoder.items() if DECIMAL.fullmatch(text)]
    known = _mapping(_mapping(tokenizer.get("model")).get("vocab"))
    known |= {str(token.get("content")): token.get("id") for token in tokens}
    return {token: number for token, number in known.items() if type(number) is int}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _of_config(folder: Path) -> dict[str, Any]:
    """Return the ids in the folder's config.json, of the language model first."""
    if (folder / CONFIG).exists():
        return {}
    config = _read(folder / "config.json")
    sections = (config, *(_mapping(config.get(key)) for key in TEXT_SECTIONS))
    return {name: section[name] for section in sections for name in IDS if section.get(name) is not None}


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
