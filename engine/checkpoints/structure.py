"""What the tensors of a model's files are: which parameter of the model, or which part of one, and its role.

Files of one model may spell a parameter differently: as on the hub or as in memory, with or without the prefix of a
wrapper. Models are therefore compared through parameters. `engine.models.names` finds the structure from the model
that transformers builds. Where all names are those of common families, `by_names` gives the same without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Role(StrEnum):
    """What a tensor is for, if it is not an ordinary weight. A buffer is not a parameter, and is never merged."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    POSITION = "position"
    BUFFER = "buffer"


@dataclass(frozen=True)
class Place:
    """Position of a file's tensor in a module: a parameter or buffer, and the first element of the tensor in it."""

    parameter: str
    start: int = 0


@dataclass(frozen=True)
class Structure:
    """What the tensors of a model's files are, by their names in the files.

    Attributes:
        places: Place of each tensor. A tensor that is no part of the model has a place of its own name.
        roles: Role of each tensor that has one.
        unused: Tensors that the model does not read from its files, such as the rotary frequencies of old files.
        wrapped: Tensors that have their place only without the prefix of a wrapper.
        unknown: Tensors that are no part of the model, as far as the model is known.
    """

    places: Mapping[str, Place]
    roles: Mapping[str, Role] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    wrapped: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()


# Buffers that older versions of transformers saved. Models compute them.
BUFFERS = re.compile(
    r".*(\.inv_freq|rotary_emb\.(cos|sin)_cached|\.masked_bias|\.causal_mask|\.attn\.bias|position_ids)$"
)

# Parts of names that wrappers of a module insert: torch.compile, FSDP, checkpointing; DataParallel and PEFT in front.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_IN_FRONT = re.compile(r"^(?:module\.|base_model\.model\.)+")

_DECODER = r"(?:(?:model|language_model)\.)*"
_LAYER = rf"{_DECODER}layers\.\d+\."
# Names of the common families, each with its role. A model with other names is built to find the roles.
_KNOWN = (
    (Role.BUFFER, re.compile(r"(.*\.)?(rotary_(pos_)?emb\.inv_freq|position_ids)")),
    (Role.EMBEDDING, re.compile(rf"{_DECODER}embed_tokens\.weight")),
    (Role.HEAD, re.compile(rf"{_DECODER}lm_head\.weight")),
    (Role.NORM, re.compile(rf"{_DECODER}(layers\.\d+\.(self_attn\.)?)?\w*norm\.weight")),
    (None, re.compile(rf"{_LAYER}(self_attn|mlp)\.\w+_proj\.(weight|bias)")),
    (None, re.compile(r"(model\.)?(visual|vision_tower|vision_model)\..*")),
    (None, re.compile(rf"{_LAYER}(mlp|block_sparse_moe)\.(gate|experts\.\d+\.(w[123]|\w+_proj))\.weight")),
)
# Names that are likely to have a role, for models that cannot be built without code of their own.
_LIKELY = (
    (Role.BUFFER, BUFFERS),
    (Role.HEAD, re.compile(r"(.*\.)?(lm_head|embed_out|output)\.weight")),
    (Role.EMBEDDING, re.compile(r"(.*\.)?(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight")),
)


def without_wrappers(name: str) -> str:
    """Return a tensor's name without the prefixes of wrappers such as DataParallel, FSDP, torch.compile and PEFT."""
    return _IN_FRONT.sub("", _WRAPPERS.sub("", name))


def by_names(names: Iterable[str]) -> tuple[Structure, bool]:
    """Return the structure that the names alone tell, and whether all of them are names of common families."""
    plain = {name: without_wrappers(name) for name in names}
    roles, certain = {}, True
    for name, short in plain.items():
        role, known = _role_by_name(short)
        certain &= known
        if role:
            roles[name] = role
    return Structure(
        places={name: Place(short) for name, short in plain.items()},
        roles=roles,
        unused=frozenset(name for name, role in roles.items() if role is Role.BUFFER),
        wrapped=frozenset(name for name, short in plain.items() if name != short),
    ), certain


def _role_by_name(name: str) -> tuple[Role | None, bool]:
    """Return the role of a tensor, and whether its name leaves no doubt."""
    for certain, kinds in ((True, _KNOWN), (False, _LIKELY)):
        for role, pattern in kinds:
            if pattern.fullmatch(name):
                return role, certain
    return None, False
