"""The layers and modules of a model, by the names of its tensors and by its config.json.

A layer's tensors have its number after the same prefix, such as `model.layers.3.`. A model with several stacks of
layers, such as one that takes images, has modules, which have the names that mergekit's configs use.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.checkpoints.headers import TEXT_SECTIONS, ModelHeader
from engine.errors import ConfigError

_NUMBERED = re.compile(r"(.*?)\.(\d+)\.(.+)")
# Tensors without a layer that come before the layers: embeddings. Norms, heads and poolers come after them.
_BEFORE = re.compile(r"emb(?!ed_out)|\bwte\b|\bwpe\b|relative_pe|inv_freq|patch|\bconv\d|(ln|norm)_pre\b|\.slopes")

TEXT, VISION, PROJECTOR, DEFAULT = "text_decoder", "vision_tower", "multi_modal_projector", "default"
_PROJECTORS = re.compile(
    r"(^|\.)(multi_modal_projector|mm_projector|connector|aligner|merger|deepstack_merger_list|mlp1)\."
)
_VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|vision_encoder|image_encoder|audio_tower)\.")
# Other names that mergekit has for a module.
_ALIASES = {"vision_model": VISION}

# Keys of config.json with the number of layers, and lists in it that name layers by their numbers.
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "depth")
# Those of the two stacks of an encoder-decoder model.
_COUNTS_OF = {
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
_NUMBERS = ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "hybrid_layer_ids")
# Parts of the names of lists with an entry per layer.
_PER_LAYER = ("layer", "block", "pattern", "heads", "multipliers")
# Model types whose layers are all of one kind. Those of others may differ by position, which stacking changes.
_UNIFORM = {
    "falcon", "gemma", "gpt2", "gpt_neox", "granite", "internlm2", "llama", "mistral", "mixtral", "olmo2", "phi",
    "phi3", "stablelm", "starcoder2",
}  # fmt: skip


@dataclass(frozen=True)
class Stack:
    """The tensors of a module, in the order of the base's files.

    Attributes:
        before: Names of those that come before the layers.
        prefix: The prefix of the layers' names; empty if the module has none.
        layers: Of each layer, the names after its number.
        after: Names of those that come after the layers.
        others: Prefixes of other stacks among these.
    """

    before: tuple[str, ...]
    prefix: str
    layers: tuple[tuple[str, ...], ...]
    after: tuple[str, ...]
    others: tuple[str, ...] = ()


def stack_of(names: Iterable[str], count: int | None) -> Stack:
    """Return the stack of a module's tensors. `count`: the number of its layers, if the config says it.

    Layers beyond that number are left out, such as those that predict further tokens.
    """
    names = list(names)
    numbered = {name: match for name in names if (match := _NUMBERED.fullmatch(name))}
    found: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for match in numbered.values():
        found[match[1]][int(match[2])].append(match[3])
    sizes = {
        prefix: sum(map(len, layers.values()))
        for prefix, layers in found.items()
        if set(layers) == {*range(len(layers))}
    }
    prefix = max(sizes, key=lambda one: (len(found[one]) == count, sizes[one]), default="")
    layers = tuple(tuple(found[prefix][index]) for index in range(len(found[prefix]))) if prefix else ()
    if count is not None and count < len(layers):
        layers = layers[:count]
    others = [name for name in names if name not in numbered or numbered[name][1] != prefix]
    before = tuple(name for name in others if _BEFORE.search(name))
    after = tuple(name for name in others if not _BEFORE.search(name))
    return Stack(before, prefix, layers, after, tuple(one for one in sizes if one != prefix and len(found[one]) > 1))


def modules_of(model: ModelHeader, keys: Sequence[str]) -> dict[str, list[str]]:
    """Return the tensors of each module that `keys` name.

    Raises:
        ConfigError: the model has no module of that name.
    """
    found: dict[str, list[str]] = {key: [] for key in keys}
    for name in model.tensors:
        own = _module(model, name)
        for key in keys:
            if key != DEFAULT and (_ALIASES.get(key, key) == own or (own == TEXT and f".{key}." in f".{name}")):
                found[key].append(name)
                break
        else:
            if DEFAULT in found:
                found[DEFAULT].append(name)
    empty = [key for key in keys if not found[key]]
    if empty:
        names = dict.fromkeys(_module(model, name) for name in model.tensors)
        raise ConfigError(
            f"the model has no module {empty[0]!r}",
            f"modules.{empty[0]}",
            ", ".join(names if model.takes_images else [DEFAULT]),
            "use these names, or `default` for all tensors that no other module has",
        )
    return found


def _module(model: ModelHeader, tensor: str) -> str:
    """Return the module of a tensor; a text model has the one of a language model."""
    if model.takes_images and _PROJECTORS.search(tensor):
        return PROJECTOR
    return VISION if model.takes_images and _VISION.search(tensor) else TEXT


def depth_of(model: ModelHeader, module: str) -> int | None:
    """Return the number of layers of a module as config.json gives it."""
    if _ALIASES.get(module, module) == VISION and model.takes_images:
        section = model.config["vision_config"]
        return next((section[key] for key in _COUNTS if type(section.get(key)) is int), None)
    return model.num_layers if module in ("", DEFAULT, TEXT) else None


def deeper(base: ModelHeader, stack: Stack, count: int) -> ModelHeader:
    """Return the base's header as it would be with another number of layers. Further ones are as the last."""
    tensors = {}
    for name, tensor in base.tensors.items():
        match = _NUMBERED.fullmatch(name)
        if match is None or match[1] != stack.prefix or int(match[2]) < count:
            tensors[name] = tensor
    roles = {name: role for name, role in base.roles.items() if name in tensors}
    last = len(stack.layers) - 1
    for index in range(len(stack.layers), count):
        for rest in stack.layers[last]:
            like, name = f"{stack.prefix}.{last}.{rest}", f"{stack.prefix}.{index}.{rest}"
            tensors[name] = replace(base.tensors[like], name=name)
            roles |= {name: base.roles[like]} if like in base.roles else {}
    return replace(base, tensors=tensors, roles=roles)


def with_kinds(model: ModelHeader) -> dict[str, Any]:
    """Return a model's config.json with the kinds of its layers where it leaves them to their position.

    These are the lists that transformers fills in, such as `layer_types`.
    """
    section = _section(model.config, TEXT)
    lists = (key for key, value in section.items() if isinstance(value, list))
    if section.get("model_type") in _UNIFORM or any("layer" in key for key in lists):
        return model.config
    from engine.models.loading import with_defaults

    kinds = {
        key: value
        for key, value in with_defaults(section, model.folder).items()
        if "layer" in key and key not in section and isinstance(value, list) and len(value) == model.num_layers
    }
    if section is model.config:
        return model.config | kinds
    return {key: value | kinds if value is section else value for key, value in model.config.items()}


def stacked_config(
    config: dict[str, Any], module: str, count: int, taken: Sequence[tuple[dict[str, Any], int]]
) -> dict[str, Any]:
    """Return a config.json with the number of layers of a module, and its lists with an entry per layer.

    Args:
        config: The base's config.json.
        module: The module.
        count: The number of layers of that module in the base.
        taken: For each layer of the output, the config.json of the model that it comes from and its number there.
    """
    config = json.loads(json.dumps(config))
    section = _section(config, module)
    counts = _COUNTS_OF.get(module, _COUNTS)
    for key, value in list(section.items()):
        if key in counts and value == count:
            section[key] = len(taken)
        elif key in _NUMBERS and isinstance(value, list):
            section[key] = [new for new, (of, old) in enumerate(taken) if old in (_section(of, module).get(key) or ())]
        elif isinstance(value, list) and len(value) == count and any(part in key for part in _PER_LAYER):
            lists = [_section(of, module).get(key) for of, _ in taken]
            section[key] = [
                own[old] if isinstance(own, list) and old < len(own) else value[min(old, count - 1)]
                for own, (_, old) in zip(lists, taken, strict=True)
            ]
    return config


def _section(config: dict[str, Any], module: str) -> dict[str, Any]:
    """Return the section of config.json about a module: the language model's, or the vision tower's."""
    keys = ("vision_config",) if _ALIASES.get(module, module) == VISION else TEXT_SECTIONS
    return next((config[key] for key in keys if isinstance(config.get(key), dict)), config)
