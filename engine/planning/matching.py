"""Match the tensors of an expert to those of the base, using file headers.

Tensors are matched through the parameters of the model, whatever names the files give them. For all methods, these
differences are accepted:

- names as on the hub, as in memory, or with the prefix of a wrapper
- a head that is tied to the embedding in one of the two checkpoints
- buffers
- a text model as an expert of a model that takes images, which has its language model
- rows of tokens, with `tokenizer_source`: in any order for a weight-space method, at the end for a learned one
- rows of tokens at the end of a text model's vocabulary
- tensors that one of the two lacks, with `on_missing: base`
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from engine.checkpoints.headers import FLOATS, ModelHeader, TensorHeader
from engine.checkpoints.match import Match, Part
from engine.checkpoints.structure import Role, Structure
from engine.checkpoints.vocabulary import check_tokens, has_tokens_for_rows
from engine.config.schema import Config
from engine.errors import CheckpointError
from engine.planning.structures import Structures


def match(
    name: str, expert: ModelHeader, base: ModelHeader, config: Config, tokenizer: Path, structures: Structures
) -> Match:
    """Match the tensors of an expert to those of the base.

    Args:
        name: The expert's name, for errors.
        expert: The expert's header.
        base: The base's header.
        config: The config; its method and options decide which differences are accepted.
        tokenizer: Folder of the output's tokenizer.
        structures: The structures of the base and its experts.

    Raises:
        CheckpointError: Architecture, vocabulary, tensor names, shapes or kinds of dtype differ.
    """
    where = f"expert {name!r} ({expert.folder})"
    text = structures.language(expert)
    if not text and not expert.is_same_architecture(base):
        architecture = f"that of the base, {base.architecture}"
        raise CheckpointError(f"the architecture is {expert.architecture}", where, architecture)
    _check_vocabulary(expert, base, config, tokenizer, bool(text), where)
    matched = _Matching(expert, base, *structures.pair(expert), config, text, where).match()
    for tensor in base.tensors.values():
        for other in (expert.tensors[name] for name in matched.names(tensor.name)):
            if (other.dtype in FLOATS) != (tensor.dtype in FLOATS):
                kind = f"one of {', '.join(FLOATS)}" if tensor.dtype in FLOATS else f"none of {', '.join(FLOATS)}"
                expected = f"{kind}: the base's is {tensor.dtype}"
                raise CheckpointError(f"{tensor.name!r} is {other.dtype}", where, expected)
        if tensor.name in matched.absent or tensor.name in matched.parts:
            continue
        other = expert.tensors[matched.names(tensor.name)[0]]
        resized = tensor.shape[1:] == other.shape[1:] and bool(tensor.shape) and has_tokens_for_rows(base, tensor.name)
        if other.shape != tensor.shape and not (resized and (config.tokenizer_source or text)):
            raise CheckpointError(f"{other.name!r} has shape {other.shape}", where, f"the base's {tensor.shape}")
    return matched


def _check_vocabulary(
    expert: ModelHeader, base: ModelHeader, config: Config, tokenizer: Path, text: bool, where: str
) -> None:
    if expert.vocab_size == base.vocab_size and not config.tokenizer_source:
        return
    if config.tokenizer_source and not config.learned:
        return  # see `engine.planning.layout.vocabulary`
    # The trainer has the base's rows, so that a learned method cannot take those of another model.
    if expert.vocab_size != base.vocab_size and not ((text or config.tokenizer_source) and tokenizer == base.folder):
        raise CheckpointError(
            f"the vocabulary has {expert.vocab_size} tokens",
            where,
            f"{base.vocab_size} tokens, as in the base",
            "set `tokenizer_source: base`; tokens that the base lacks are dropped"
            if config.learned
            else "set `tokenizer_source` to `base` or to a model; tokens that it lacks are dropped",
        )
    check_tokens(expert, base, tokenizer, where)


@dataclass(frozen=True)
class _Matching:
    """An expert and the base, with their structures, while they are matched.

    `text` has the parameters of the base's language model if the expert is a text model; else it is empty.
    """

    expert: ModelHeader
    base: ModelHeader
    base_structure: Structure
    structure: Structure
    config: Config
    text: frozenset[str]
    where: str

    def match(self) -> Match:
        """Return the match; see the function `match`."""
        renamed: dict[str, str] = {}
        parts: dict[str, tuple[Part, ...]] = {}
        absent, lacking, used = set(self.base_structure.unused), [], set[str]()
        by_parameter = self._by_parameter()
        for tensor in self.base.tensors.values():
            if tensor.name in absent:
                continue
            found = self._found(tensor, by_parameter)
            if not found and (embedding := self._tied_embedding(tensor.name)):
                found = [Part(embedding, 0, self.expert.tensors[embedding].numel)]
            if not found:
                lacking.append(tensor.name)
            elif len(found) == 1 and found[0].stop - found[0].start == self.expert.tensors[found[0].name].numel:
                renamed |= {tensor.name: found[0].name} if found[0].name != tensor.name else {}
            else:
                parts[tensor.name] = tuple(found)
            used |= {part.name for part in found}
        ignored = [name for name in self.expert.tensors if name not in used and name in self.structure.unused]
        added = [name for name in self.expert.tensors if name not in used and name not in self.structure.unused]
        tied = {name: embedding for name in added if (embedding := self._spare_head(name))}
        added = [name for name in added if name not in tied]
        outside = {name for name in lacking if self.base_structure.places[name].parameter not in self.text}
        if self.text:
            absent |= outside
            lacking = [name for name in lacking if name not in outside]
        if self.config.on_missing == "base":
            absent |= set(lacking)
            ignored += [*added, *tied]
            lacking, added, tied = [], [], {}
        if lacking or added:
            raise self._refusal(lacking, added)
        wrapped = min(self.structure.wrapped & used, default="")
        return Match(renamed, parts, frozenset(absent), (*ignored, *tied), tied, wrapped)

    def _by_parameter(self) -> Mapping[str, list[Part]]:
        """Return the expert's tensors by parameter, as parts of the flattened parameter, in order."""
        found: dict[str, list[Part]] = defaultdict(list)
        for name, place in self.structure.places.items():
            if name not in self.structure.unused:
                found[place.parameter].append(Part(name, place.start, place.start + self.expert.tensors[name].numel))
        for parts in found.values():
            parts.sort(key=lambda part: part.start)
            if any(one.stop > other.start for one, other in pairwise(parts)):
                raise CheckpointError(
                    f"{parts[0].name!r} and {parts[1].name!r} are the same parameter of the model", self.where
                )
        return found

    def _found(self, tensor: TensorHeader, by_parameter: Mapping[str, list[Part]]) -> list[Part]:
        """Return the parts of the expert's tensors that are the base's tensor; none if they are not all there."""
        place = self.base_structure.places[tensor.name]
        candidates = by_parameter.get(place.parameter, [])
        if len(candidates) == 1 and candidates[0].start == place.start == 0:
            only = self.expert.tensors[candidates[0].name]
            if len(only.shape) == len(tensor.shape):
                # The same tensor; a different shape is reported as such.
                return [Part(only.name, 0, only.numel)]
        start, stop = place.start, place.start + tensor.numel
        # In order and without overlap: a mixture may have thousands.
        first = bisect_right(candidates, start, key=lambda part: part.stop)
        last = bisect_left(candidates, stop, key=lambda part: part.start)
        found = [
            Part(part.name, max(start, part.start) - part.start, min(stop, part.stop) - part.start)
            for part in candidates[first:last]
        ]
        return found if sum(part.stop - part.start for part in found) == tensor.numel else []

    def _tied_embedding(self, tensor: str) -> str | None:
        """Return the expert's embedding, if a tensor of the base is a head and the expert's head is tied to it."""
        if self.base_structure.roles.get(tensor) is not Role.HEAD or not _ties(self.expert):
            return None
        shape = self.base.tensors[tensor].shape[1:]
        return self._embedding(shape)

    def _spare_head(self, tensor: str) -> str | None:
        """Return the expert's embedding, if a tensor is a head of a shape that the embedding could be tied to."""
        if self.structure.roles.get(tensor) is not Role.HEAD or len(self.expert.tensors[tensor].shape) != 2:
            return None
        return self._embedding(self.expert.tensors[tensor].shape[1:])

    def _embedding(self, features: tuple[int, ...]) -> str | None:
        names = (name for name, role in self.structure.roles.items() if role is Role.EMBEDDING)
        return next((name for name in names if features and self.expert.tensors[name].shape[1:] == features), None)

    def _refusal(self, lacking: list[str], added: list[str]) -> CheckpointError:
        parts = [f"lacks {len(lacking)} of the base's tensors (first: {lacking[0]!r})"] if lacking else []
        parts += [f"has {len(added)} tensors that the base lacks (first: {added[0]!r})"] if added else []
        if len(lacking) == len(self.base.tensors):
            do = "save the expert with the base's names"
        else:
            do = "set `on_missing: base` to use the base's tensors and drop those that it lacks"
        what, expected = f"the expert {' and '.join(parts)}", f"the {len(self.base.tensors)} tensors of the base"
        return CheckpointError(what, self.where, expected, do)


def _ties(model: ModelHeader) -> bool:
    """Return whether a model's head may be tied to its embedding."""
    return all(section.get("tie_word_embeddings") is not False for section in (model.config, model.text_config))
