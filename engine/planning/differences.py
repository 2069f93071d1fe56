"""Differences between the models of a plan that a user should know: of configs, tensors, files, and of what is merged.

`left_out` estimates how much of an expert's change `exclude` leaves at the base's values. It and
`engine.planning.preflight` alone read weights, a bounded sample: a few ranges of every tensor, more of embeddings and
heads, because often only some rows change. A sum over all weights would read every file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoints.adapters import AdapterHeader
from engine.checkpoints.find import ROOT, find_model
from engine.checkpoints.headers import FLOATS, ModelHeader
from engine.checkpoints.match import Match, Part
from engine.checkpoints.ranges import Ranges
from engine.checkpoints.special_tokens import has_chat_template, unused_in_generation
from engine.checkpoints.structure import Role
from engine.checkpoints.vocabulary import is_gathered
from engine.config.schema import Config
from engine.planning.plan import ExpertPlan, Plan
from engine.untrusted import listed, shown

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
# Keys for the same thing: transformers before and since version 5.
ROPE = ("rope_local_base_freq", "rope_parameters", "rope_scaling", "rope_theta")
# The base of the rotary embedding if a config names none, as in most families.
THETA = 10000.0
# Stands for the value of a key that a config leaves out and whose default is not known.
MISSING = object()
# What the tensors decide, so that no config may change it.
OF_TENSORS = {"tie_word_embeddings", "vocab_size"}

# Elements of a range; ranges of a tensor, and of one whose rows are tokens; the most tensors of which ranges are read.
RANGE, RANGES, TOKEN_RANGES, TENSORS = 4096, 2, 64, 200
# Roles of tensors whose rows are tokens.
TOKENS = (Role.EMBEDDING, Role.HEAD)
# The share above which a user is warned.
WARNING = 0.1
# The share of the change that is left after rounding, below which a user is told.
LOW = 0.9


def differences(base: ModelHeader, model: ModelHeader) -> dict[tuple[str, ...], tuple[Any, Any]]:
    """Return the values in two config.json that change what a model computes: key → the base's value and the model's.

    A key of a section follows the section's own; `rope` stands for all keys of the rotary embedding. A key that one of
    the two leaves out has the default of transformers, and is no difference if transformers does not know the model.
    """
    text = base.takes_images and not model.takes_images
    one, other = base.text_config if text else base.config, model.config
    if one == other:
        return {}
    from engine.models.loading import with_defaults

    return _differences(one, other, with_defaults(one, base.folder), with_defaults(other, model.folder))


def with_values_of(base: ModelHeader, donor: ModelHeader) -> ModelHeader:
    """Return the base's header with the donor's values in its config.json, where they change what a model computes.

    What the tensors decide stays: the size of the vocabulary, and whether the head is tied.
    """
    config: dict[str, Any] = json.loads(json.dumps(base.config))
    for *sections, key in differences(base, donor):
        ours, theirs = config, donor.config
        for section in sections:
            ours, theirs = ours[section], theirs[section]
        for name in ROPE if key == "rope" else (key,) if key not in OF_TENSORS else ():
            ours.pop(name, None)
            if name in theirs:
                ours[name] = theirs[name]
    return replace(base, config=config)


def _differences(
    one: dict[str, Any], other: dict[str, Any], full_one: dict[str, Any], full_other: dict[str, Any]
) -> dict[tuple[str, ...], tuple[Any, Any]]:
    """Return the differences of two sections; `full_one` and `full_other` are the same sections with all defaults."""
    found: dict[tuple[str, ...], tuple[Any, Any]] = {}
    for key in dict.fromkeys((*one, *other)):
        if key in NOT_COMPUTED or key in ROPE or "dropout" in key or one.get(key, MISSING) == other.get(key, MISSING):
            continue
        values = full_one.get(key, one.get(key, MISSING)), full_other.get(key, other.get(key, MISSING))
        if isinstance(one.get(key), dict) and isinstance(other.get(key), dict):
            inner = _differences(one[key], other[key], *(value if isinstance(value, dict) else {} for value in values))
            found |= {(key, *keys): pair for keys, pair in inner.items()}
        elif MISSING not in values and values[0] != values[1]:
            found[(key,)] = values
    ropes = _rope(full_one or one), _rope(full_other or other)
    if ropes[0] != ropes[1] and any(key in config for config in (one, other, full_one, full_other) for key in ROPE):
        found[("rope",)] = ropes
    return found


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the rotary embedding in one form; by kind of attention, if each kind has its own."""
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and parameters and all(isinstance(own, dict) for own in parameters.values()):
        return {kind: _plain_rope(own) for kind, own in parameters.items()}
    settings = {"rope_theta": config.get("rope_theta", THETA)}
    for section in (config.get("rope_scaling"), parameters):
        settings |= section if isinstance(section, dict) else {}
    if "rope_local_base_freq" not in config:
        return _plain_rope(settings)
    local = {"rope_theta": config["rope_local_base_freq"]}
    return {"full_attention": _plain_rope(settings), "sliding_attention": local}


def _plain_rope(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of one rotary embedding without those that mean nothing to text."""
    kind = settings.get("rope_type", settings.get("type", "default"))
    # How positions of images are turned makes no difference to text.
    plain = {key: value for key, value in settings.items() if key not in ("type", "rope_type") and "mrope" not in key}
    return plain if kind in ("default", "mrope") else plain | {"rope_type": kind}


def notes_on(
    name: str, expert: ModelHeader, base: ModelHeader, match: Match, any_rows: bool = False
) -> tuple[str, ...]:
    """Return what a user should know about an expert of this name, as lines of text.

    `any_rows`: the output's vocabulary is planned later, so that the base's says nothing about it.
    """
    notes, text = list(expert.notes), base.takes_images and not expert.takes_images
    for keys, (of_base, own) in differences(base, expert).items():
        key = ".".join(keys)
        if any_rows and keys[-1] == "vocab_size":
            continue
        option = "" if keys[-1] in OF_TENSORS or text else f"; `config_source: {name}` takes the expert's"
        notes.append(f"{key} is {_value(own)} in its config.json, {_value(of_base)} in the output's{option}")
    if match.wrapped:
        notes.append(f"its names are read without the prefix of a wrapper, such as {match.wrapped}")
    if text:
        notes.append("a text model, merged into the base's language model")
    buffers = {name for name in match.absent if base.roles.get(name) == "buffer"}
    for what, names in (
        ("taken from the base", match.absent - buffers),
        ("not used", set(match.ignored)),
    ):
        if names:
            notes.append(f"{what}: {listed(sorted(names))}")
    return tuple(notes)


def remarks_on(config: Config, base: Path, experts: Sequence[ExpertPlan]) -> tuple[tuple[str, str], ...]:
    """Return what a user should know about dtype, chat templates and responses, as lines with their subject."""
    remarks = []
    if config.learned and config.dtype == "float16":
        remarks.append(
            (
                "dtype",
                "in float16, small gradients become 0; `dtype: bfloat16` with `out_dtype: float16` learns without this",
            )
        )
    folders = {expert.name: expert.header.folder for expert in experts}
    with_template = [name for name, folder in folders.items() if has_chat_template(folder)]
    if not (config.tokenizer_source or config.chat_template) and with_template and not has_chat_template(base):
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


def _value(value: Any) -> str:
    return shown(json.dumps(value, sort_keys=True, default=str))


def left_out(plan: Plan) -> list[tuple[str, float]]:
    """Return for each expert its name, and the estimated share of its squared change that is not merged.

    The share is Σ ‖τ‖² over the tensors that are not merged, divided by that over all tensors.
    An expert that does not change is left out, and so is one with weights that are not finite, which a merge refuses.
    Nothing is read if every float parameter is merged, and in a merge by slices there is no such share.
    """
    if plan.layout is not None or plan.base.adapter is not None:
        return []  # the tensors are not those of the base's files
    header, shares = plan.base_header, []
    floats = {name for name, tensor in header.tensors.items() if tensor.dtype in FLOATS and tensor.numel}
    excluded = [name for name in header.tensors if name in floats and name not in plan.merged_set]
    excluded = [name for name in excluded if header.roles.get(name) is not Role.BUFFER]
    if not excluded:
        return []
    for expert in plan.experts:
        outside, inside = (_squared_change(plan, expert, names) for names in (excluded, plan.merged))
        if np.isfinite(outside + inside) and outside + inside > 0:
            shares.append((expert.name, outside / (outside + inside)))
    return shares


def left_out_lines(plan: Plan, shares: Sequence[tuple[str, float]]) -> list[str]:
    """Return the shares as lines for the user, with the option for those that are large."""
    option = "`exclude: []` merges all tensors" if plan.config.exclude else "merge the whole expert"
    return [
        f"{name}: about {share:.1%} of its squared change is in tensors that are not merged"
        + (f"; warning: the merged model lacks this part, {option}" if share > WARNING else "")
        for name, share in shares
    ]


def _squared_change(plan: Plan, expert: ExpertPlan, names: Sequence[str]) -> float:
    """Return the estimate of Σ ‖τ‖² over the named tensors."""
    if isinstance(expert.header, AdapterHeader):
        mine = [name for name in names if name in expert.header.pairs]
        with Ranges(_folder(expert.model), expert.header.tensors) as factors:
            return sum(_squared_product(expert.header, factors, name) for name in mine)
    total = 0.0
    with Ranges(_folder(plan.base.model), plan.base_header.tensors) as base, _opened(expert) as own:
        known = [name for name in names if expert.match.names(name)]
        if plan.vocabulary is not None:  # their rows do not correspond
            known = [name for name in known if not is_gathered(plan.base_header, name)]
        tokens = [name for name in known if plan.base_header.roles.get(name) in TOKENS]
        others = [name for name in known if name not in tokens]
        # Evenly spaced, so that every depth of the model counts.
        for group in (tokens, others):
            chosen = group[:: -(-len(group) // TENSORS) or 1]
            change = sum(_squared_difference(plan.base_header, expert, base, own, name) for name in chosen)
            sizes = (sum(plan.base_header.tensors[name].numel for name in part) for part in (group, chosen))
            total += change * next(sizes) / max(1, next(sizes))
    return total


def _opened(expert: ExpertPlan) -> Ranges:
    assert isinstance(expert.header, ModelHeader)
    return Ranges(_folder(expert.model), expert.header.tensors)


def _folder(model: str) -> Path:
    return find_model(model, ROOT)


def _squared_difference(header: ModelHeader, expert: ExpertPlan, base: Ranges, own: Ranges, name: str) -> float:
    """Return the estimate of ‖θₖ − θ₀‖² of one tensor: the mean over the ranges times the number of elements."""
    assert isinstance(expert.header, ModelHeader)
    source = expert.match.names(name)[0]
    parts = expert.match.parts.get(name) or (Part(source, 0, expert.header.tensors[source].numel),)
    if any(expert.header.tensors[part.name].dtype not in FLOATS for part in parts):
        return 0.0
    numel = min(header.tensors[name].numel, sum(part.stop - part.start for part in parts))
    ranges = TOKEN_RANGES if header.roles.get(name) in TOKENS else RANGES
    squares, count = 0.0, 0
    for start, stop in _ranges(numel, ranges):
        first = 0
        for part in parts:
            low, high = max(start, first), min(stop, first + part.stop - part.start)
            if low < high:
                shift = part.start - first
                difference = own.read(part.name, low + shift, high + shift) - base.read(name, low, high)
                squares += float(np.square(difference, dtype=np.float64).sum())
                count += high - low
            first += part.stop - part.start
    return squares / max(1, count) * numel


def _ranges(numel: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield at most `count` ranges of at most RANGE elements, evenly spaced; the whole tensor if they cover it."""
    if numel <= count * RANGE:
        yield 0, numel
        return
    for index in range(count):
        start = int((index + 0.5) * numel / count) - RANGE // 2
        yield start, start + RANGE


def _squared_product(header: AdapterHeader, factors: Ranges, name: str) -> float:
    """Return ‖scaling · B·A‖² = scaling² · ⟨BᵀB, AAᵀ⟩ of one pair."""
    pair = header.pairs[name]
    a, b = (factors.read(one, 0, header.tensors[one].numel) for one in (pair.a, pair.b))
    a_RI, b_OR = a.reshape(header.tensors[pair.a].shape), b.reshape(header.tensors[pair.b].shape)
    return float(pair.scaling**2 * np.sum((b_OR.T @ b_OR) * (a_RI @ a_RI.T), dtype=np.float64))
