"""How an expert's tensors meet the base's: the same names and shapes, or what real checkpoints have instead.

From headers alone. What is let pass for methods that learn nothing: a head that is tied to the embedding in one of the
two files, buffers that are no weights, tensors that an expert lacks where the user lets the base stand for them, rows
of tokens that only one of the two has where the user names whose tokens count.
"""

from __future__ import annotations

import re
from pathlib import Path

from engine.checkpoints.headers import FLOATS, ModelHeader
from engine.checkpoints.match import Match
from engine.checkpoints.vocabulary import EMBEDDINGS, HEADS, check_tokens, has_tokens_for_rows
from engine.config.schema import Config
from engine.errors import CheckpointError

# Saved by older versions of transformers, and computed anew by every model.
BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|\.masked_bias|\.attn\.bias|position_ids)$")


def match(name: str, expert: ModelHeader, base: ModelHeader, config: Config, tokenizer: Path) -> Match:
    """How the tensors of the expert called `name` meet the base's; `tokenizer` is the folder of the output's.

    Raises:
        CheckpointError: another architecture, vocabulary, set of tensors, shape or kind of number, with what would
        help.
    """
    where = f"expert {name!r} ({expert.folder})"
    if expert.architecture != base.architecture:
        raise CheckpointError(f"its architecture is {expert.architecture}", where, f"the base's: {base.architecture}")
    _check_vocabulary(expert, base, config, tokenizer, where)
    found = _names(expert, base, config, where)
    for tensor in base.tensors.values():
        if tensor.name in found.absent:
            continue
        other = expert.tensors[found.renamed.get(tensor.name, tensor.name)]
        resized = tensor.shape[1:] == other.shape[1:] and bool(tensor.shape) and has_tokens_for_rows(base, tensor.name)
        if other.shape != tensor.shape and not (resized and config.tokenizer_source):
            raise CheckpointError(f"{tensor.name!r} has shape {other.shape}", where, f"the base's {tensor.shape}")
        if (other.dtype in FLOATS) != (tensor.dtype in FLOATS):
            raise CheckpointError(f"{tensor.name!r} is {other.dtype}", where, f"a float, as the base's {tensor.dtype}")
    return found


def _check_vocabulary(expert: ModelHeader, base: ModelHeader, config: Config, tokenizer: Path, where: str) -> None:
    if expert.vocab_size == base.vocab_size and not config.tokenizer_source:
        return
    if expert.vocab_size != base.vocab_size and (config.learned or not config.tokenizer_source):
        raise CheckpointError(
            f"its vocabulary has {expert.vocab_size} tokens",
            where,
            f"the base's {base.vocab_size}: task vectors need one",
            "`tokenizer_source: base` (or a model) says whose tokens the output has, and leaves out the others"
            if not config.learned
            else "a method that learns nothing can cut them, with `tokenizer_source: base`",
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
        parts += [f"has {len(added)} that the base does not have (first: {added[0]!r})"] if added else []
        raise CheckpointError(
            f"it {' and '.join(parts)}",
            where,
            f"the base's {len(base.tensors)} tensors",
            "" if config.learned else "`on_missing: base` takes the base's for it, and leaves out what the base lacks",
        )
    return Match(renamed, frozenset(absent), tuple(ignored))
