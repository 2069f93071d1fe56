"""Differences between the models of a plan that a user should know: of their configs, their tensors and their files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.checkpoints.headers import ModelHeader
from engine.checkpoints.match import Match
from engine.checkpoints.special_tokens import has_chat_template, unused_in_generation
from engine.config.schema import Config
from engine.planning.plan import ExpertPlan
from engine.untrusted import shown

# Keys of config.json that do not change what a model computes from tokens, and those that shapes of tensors show.
NOT_COMPUTED = {
    "_name_or_path", "_attn_implementation", "architectures", "attn_implementation", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "decoder_start_token_id", "dtype", "eos_token_id", "id2label", "initializer_factor",
    "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "max_window_layers", "model_type",
    "num_labels", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type",
    "quantization_config", "return_dict", "sep_token_id", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params", "tokenizer_class",
    "torch_dtype", "torchscript", "transformers_version", "unk_token_id", "unsloth_fixed", "unsloth_version",
    "use_cache",
}  # fmt: skip
# Three keys for the same thing: transformers before and since version 5.
ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
# The base of the rotary embedding if a config names none, as in most families.
THETA = 10000.0
# What the tensors decide, so that no config may change it.
OF_TENSORS = {"tie_word_embeddings", "vocab_size"}
# Names that a note lists.
LISTED = 3


def differences(base: ModelHeader, model: ModelHeader) -> dict[str, tuple[Any, Any]]:
    """Return the values in two config.json that change what a model computes: key → the base's value and the model's.

    Keys of a section are given as `section.key`. Keys that only one of the two has are left out, because versions of
    transformers write different ones; `rope` stands for all keys of the rotary embedding.
    """
    if base.takes_images and not model.takes_images:
        return _differences(base.text_config, model.config)
    return _differences(base.config, model.config)


def with_values_of(base: ModelHeader, donor: ModelHeader) -> ModelHeader:
    """Return the base's header with the donor's values in its config.json, where they change what a model computes.

    What the tensors decide stays: the size of the vocabulary, and whether the head is tied.
    """
    config: dict[str, Any] = json.loads(json.dumps(base.config))
    for path in differences(base, donor):
        *sections, key = path.split(".")
        ours, theirs = config, donor.config
        for section in sections:
            ours, theirs = ours[section], theirs[section]
        for name in ROPE if key == "rope" else (key,) if key not in OF_TENSORS else ():
            ours.pop(name, None)
            if name in theirs:
                ours[name] = theirs[name]
    return replace(base, config=config)


def _differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key in one:
        if key not in other or key in NOT_COMPUTED or key in ROPE or "dropout" in key or one[key] == other[key]:
            continue
        if isinstance(one[key], dict) and isinstance(other[key], dict):
            found |= {f"{key}.{inner}": values for inner, values in _differences(one[key], other[key]).items()}
        else:
            found[key] = one[key], other[key]
    ropes = _rope(one), _rope(other)
    if ropes[0] != ropes[1] and any(key in config for config in (one, other) for key in ROPE):
        found["rope"] = ropes
    return found


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the rotary embedding in one form, without those that mean nothing."""
    settings: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(key), dict):
            settings |= config[key]
    settings.setdefault("rope_theta", config.get("rope_theta", THETA))
    kind = settings.pop("type", None)
    settings.setdefault("rope_type", kind or "default")
    # Sections for images make no difference to the kind of the embedding.
    if settings["rope_type"] in ("default", "mrope"):
        del settings["rope_type"]
    return settings


def notes_on(name: str, expert: ModelHeader, base: ModelHeader, match: Match) -> tuple[str, ...]:
    """Return what a user should know about an expert of this name, as lines of text."""
    notes = list(expert.notes)
    for key, (of_base, own) in differences(base, expert).items():
        option = "" if key.rpartition(".")[2] in OF_TENSORS else f"; `config_source: {name}` takes the expert's"
        notes.append(f"{key} is {_value(own)} in its config.json, {_value(of_base)} in the output's{option}")
    if match.wrapped:
        notes.append(f"its names are read without the prefix of a wrapper, such as {match.wrapped}")
    if base.takes_images and not expert.takes_images:
        notes.append("a text model, merged into the base's language model")
    buffers = {name for name in match.absent if base.roles.get(name) == "buffer"}
    for what, names in (
        ("taken from the base", match.absent - buffers),
        ("not used", set(match.ignored)),
    ):
        if names:
            notes.append(f"{what}: {_listed(names)}")
    return tuple(notes)


def remarks_on(config: Config, base: Path, experts: Sequence[ExpertPlan]) -> tuple[tuple[str, str], ...]:
    """Return what a user should know about chat templates and the experts' responses, as lines with their subject."""
    remarks = []
    folders = {expert.name: expert.header.folder for expert in experts}
    with_template = [name for name, folder in folders.items() if has_chat_template(folder)]
    if config.tokenizer_source is None and with_template and not has_chat_template(base):
        remarks.append(
            (
                "base",
                "it has no chat template, so that neither the samples nor the output have one; "
                f"`tokenizer_source: {with_template[0]}` takes the tokenizer and the template of that expert",
            )
        )
    if config.learned and config.has_targets and config.calibration.generate_responses:
        checkpoints = [expert.header.folder for expert in experts if isinstance(expert.header, ModelHeader)]
        unused = {key for folder in {base, *checkpoints} for key in unused_in_generation(folder)}
        if unused:
            keys = ", ".join(sorted(map(shown, unused)))
            remarks.append(("experts", f"they write responses greedily, without {keys} of generation_config.json"))
    return tuple(remarks)


def _listed(names: Iterable[str]) -> str:
    first, more = sorted(names)[:LISTED], len(set(names)) - LISTED
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def _value(value: Any) -> str:
    return shown(json.dumps(value, sort_keys=True, default=str))
