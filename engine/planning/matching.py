"""Match the tensors of an expert to those of the base, using file headers.

Learned methods require equal names and shapes. For weight-space methods, these differences are accepted:

- a head that is tied to the embedding in one of the two checkpoints
- buffers
- tensors that one of the two lacks, with `on_missing: base`
- rows of tokens that only one of the two has, with `tokenizer_source`
"""

from __future__ import annotations

import re
from pathlib import Path

from engine.checkpoints.headers import FLOATS, ModelHeader
from engine.checkpoints.match import Match
from engine.checkpoints.vocabulary import EMBEDDINGS, HEADS, check_tokens, has_tokens_for_rows
from engine.config.schema import Config
from engine.errors import CheckpointError

# Buffers that older versions of transformers saved. Models compute them.
BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|\.masked_bias|\.attn\.bias|position_ids)$")


def match(name: str, expert: ModelHeader, base: ModelHeader, config: Config, tokenizer: Path) -> Match:
    """Match the tensors of an expert to those of the base.

    Args:
        name: The expert's name, for errors.
        expert: The expert's header.
        base: The base's header.
        config: The config; its method and options decide which differences are accepted.
        tokenizer: Folder of the output's tokenizer.

    Raises:
        CheckpointError: Architecture, vocabulary, tensor names, shapes or kinds of dtype differ.
    """
    where = f"expert {name!r} ({expert.folder})"
    if expert.architecture != base.architecture:
        architecture = f"that of the base, {base.architecture}"
        raise CheckpointError(f"the architecture is {expert.architecture}", where, architecture)
    _check_vocabulary(expert, base, config, tokenizer, where)
    matched = _names(expert, base, config, where)
    for tensor in base.tensors.values():
        if tensor.name in matched.absent:
            continue
        other = expert.tensors[matched.renamed.get(tensor.name, tensor.name)]
        resized = tensor.shape[1:] == other.shape[1:] and bool(tensor.shape) and has_tokens_for_rows(base, tensor.name)
        if other.shape != tensor.shape and not (resized and config.tokenizer_source):
            raise CheckpointError(f"{tensor.name!r} has shape {other.shape}", where, f"the base's {tensor.shape}")
        if (other.dtype in FLOATS) != (tensor.dtype in FLOATS):
            kind = "a float type" if tensor.dtype in FLOATS else "no float type"
            raise CheckpointError(f"{tensor.name!r} is {other.dtype}", where, f"{kind}, like the base's {tensor.dtype}")
    return matched


def _check_vocabulary(expert: ModelHeader, base: ModelHeader, config: Config, tokenizer: Path, where: str) -> None:
    if expert.vocab_size == base.vocab_size and not config.tokenizer_source:
        return
    if expert.vocab_size != base.vocab_size and (config.learned or not config.tokenizer_source):
        raise CheckpointError(
            f"the vocabulary has {expert.vocab_size} tokens",
            where,
            f"{base.vocab_size} tokens, as in the base",
            "set `tokenizer_source` to `base` or to a model; tokens that it lacks are dropped"
            if not config.learned
            else "use a weight-space method with `tokenizer_source: base`, which drops tokens that the base lacks",
        )
    check_tokens(expert, base, tokenizer, where)


def _names(expert: ModelHeader, base: ModelHeader, config: Config, where: str) -> Match:
    lacking = [tensor for tensor in base.tensors if tensor not in expert.tensors]
    added = [tensor for tensor in expert.tensors if tensor not in base.tensors]
    renamed, absent, ignored = {}, set(), []
    if not config.learned:
        for tensor in list(lacking):
            embedding = next((name for name in expert.tensors if EMBEDDINGS.match(name)), None)
            if BUFFERS.match(tensor) or config.on_missing == "base":
                absent.add(tensor)
            elif HEADS.match(tensor) and embedding and expert.config.get("tie_word_embeddings") is not False:
                renamed[tensor] = embedding
            else:
                continue
            lacking.remove(tensor)
        for tensor in list(added):
            tied = HEADS.match(tensor) and expert.config.get("tie_word_embeddings") is not False
            if BUFFERS.match(tensor) or tied or config.on_missing == "base":
                ignored.append(tensor)
                added.remove(tensor)
    if lacking or added:
        parts = [f"lacks {len(lacking)} of the base's tensors (first: {lacking[0]!r})"] if lacking else []
        parts += [f"has {len(added)} tensors that the base lacks (first: {added[0]!r})"] if added else []
        raise CheckpointError(
            f"the expert {' and '.join(parts)}",
            where,
            f"the {len(base.tensors)} tensors of the base",
            "" if config.learned else "set `on_missing: base` to use the base's tensors and drop those that it lacks",
        )
    return Match(renamed, frozenset(absent), tuple(ignored))
