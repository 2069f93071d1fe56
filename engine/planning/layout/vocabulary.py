"""Plan the vocabulary of a weight-space merge with `tokenizer_source`: its tokens, and their rows in every model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.checkpoints.find import ROOT, find_model
from engine.checkpoints.headers import ModelHeader
from engine.checkpoints.match import NO_EXCEPTIONS, Match
from engine.checkpoints.vocabulary import LACKING, PADDING, ZERO, RowRule, Vocabulary, check_ids, is_gathered, packed
from engine.config.schema import Config
from engine.config.vocabulary import TokenRow
from engine.errors import CheckpointError, ConfigError
from engine.methods.registry import INSTALL, has_mergekit
from engine.models.vocabularies import (
    Tokenizers,
    Tokens,
    Vocabularies,
    are_alike,
    has_tokenizer,
    made_vocabularies,
    plain_vocabularies,
)
from engine.planning.plan import ExpertPlan, Plan, experts_of, slice_of
from engine.untrusted import listed, shown

RULES = "tokenizer.tokens"


@dataclass(frozen=True)
class _Model:
    """A model of the merge: its name, its tokens, the number of its rows, and the row of each token of the output."""

    name: str
    tokens: Tokens
    limit: int
    own_R: npt.NDArray[np.int32]
    complete: bool


def plan_vocabulary(
    config: Config, base: ModelHeader, experts: Sequence[ExpertPlan], tokenizer: Path | None
) -> Vocabulary | None:
    """Return the vocabulary of a merge; None if every model has its rows already, or if none is asked for.

    Args:
        config: The config.
        base: The base's header.
        experts: The experts, with their tensors matched to the base's.
        tokenizer: The folder of the model that `tokenizer_source` names, if that is not the base.

    Raises:
        CheckpointError: A tokenizer is missing, cannot be read, or does not fit the rows of its model.
        ConfigError: A rule for a token cannot be followed, or a new tokenizer is needed and mergekit is not installed.
    """
    recipe = config.recipe
    if recipe is None or config.tokenizer_source is None:
        return None
    asked = _asked(config, base.folder, experts, tokenizer)
    found = _read(asked, _limit(base, base, NO_EXCEPTIONS))
    check_ids(found.output, asked.source or base.folder)
    size = max(found.output.values(), default=-1) + 1
    size += -size % (recipe.tokens.pad_to_multiple_of or 1)
    models = list(_models(found, size, base, experts))
    with_base = recipe.slices[0].counts_base
    rules = []
    for token, rule in recipe.tokens.tokens.items():
        number = found.output[token]
        if rule.force or any(model.own_R[number] < 0 for model in models[0 if with_base else 1 :]):
            rules.append(_rule(token, number, rule, models))
    whole_R = np.arange(size)
    fits = all(model.limit == size and model.complete and np.array_equal(model.own_R, whole_R) for model in models)
    if fits and base.vocab_size == size and not any(rule.force for rule in rules):
        return None
    own = tuple(packed(model.own_R) for model in models)
    notes = (*_in_no_model(found, models), *_without_tokenizer(found, experts))
    return Vocabulary(size, own, tuple(rules), with_base, found.digest, notes)


def models_at(plan: Plan, tensor: str) -> list[int]:
    """Return the base of a tensor and the experts that are merged into it, counted as in a `Vocabulary`."""
    base = plan.origin(tensor).base
    return [0 if base is None else 1 + base, *(1 + expert for expert in experts_of(plan, tensor))]


def check_rules(plan: Plan) -> None:
    """Check that the rules for tokens take rows of models that are merged into embedding and head.

    Raises:
        ConfigError: One does not; see `Vocabulary.of`.
    """
    if plan.vocabulary is not None:
        for name in plan.merged:
            if is_gathered(plan.base_header, name):
                plan.vocabulary.of(models_at(plan, name), slice_of(plan, name).counts_base)


def new_tokenizer(plan: Plan) -> dict[str, bytes]:
    """Return the files of the output's tokenizer by name; none if it is that of a model.

    Raises:
        CheckpointError: It cannot be made again, or the tokenizers changed.
    """
    if plan.vocabulary is None or not plan.vocabulary.tokenizer:
        return {}
    folder = plan.base_header.folder
    tokenizer = find_model(plan.tokenizer, ROOT) if plan.tokenizer else None
    asked = _asked(plan.config, folder, plan.experts, tokenizer)
    made = made_vocabularies(asked)
    if made.digest != plan.vocabulary.tokenizer:
        raise CheckpointError(
            "a tokenizer of the models changed during the merge", str(folder), do="run the same command again"
        )
    return made.files


def _asked(config: Config, base: Path, experts: Sequence[ExpertPlan], tokenizer: Path | None) -> Tokenizers:
    assert config.recipe is not None
    models = dict.fromkeys((base, *(expert.tokenizer_folder(base) for expert in experts)))
    # A union of equal tokenizers is one of them.
    source = None if config.tokenizer_source == "union" and not are_alike(models) else tokenizer or base
    return Tokenizers(base, tuple(models), source, tuple(config.recipe.tokens.tokens), config.trust_remote_code)


def _read(asked: Tokenizers, limit: int) -> Vocabularies:
    """Return the vocabularies, of a new tokenizer if none of the models' fits. `limit` is the base's number of rows."""
    lacking = asked.source or asked.base
    if not has_tokenizer(lacking):
        raise CheckpointError("the model has no tokenizer", str(lacking), "the files of a tokenizer, for the output")
    plain = plain_vocabularies(asked)
    # As in mergekit, tokens of the base's own tokenizer that have no row are removed from it.
    if plain is not None and (asked.source != asked.base or max(plain.output.values(), default=0) < limit):
        return plain
    if not has_mergekit():
        raise ConfigError(
            "the tokenizer of this merge has to be made by mergekit, which is not installed",
            "tokenizer_source",
            do=INSTALL,
        )
    return made_vocabularies(asked)


def _models(found: Vocabularies, size: int, base: ModelHeader, experts: Sequence[ExpertPlan]) -> Iterator[_Model]:
    """Yield the base and the experts. A model without a tokenizer has the base's, and an adapter the base's rows."""
    otherwise = found.models.get(base.folder, found.output)

    def model(name: str, header: ModelHeader, match: Match) -> _Model:
        tokens, limit = found.models.get(header.folder, otherwise), _limit(header, base, match)
        own_R = np.full(size, PADDING, dtype="<i4")
        for token, number in found.output.items():
            own = tokens.get(token, LACKING)
            own_R[number] = own if own < limit else LACKING
        return _Model(name, tokens, limit, own_R, not any(is_gathered(base, tensor) for tensor in match.absent))

    yield (first := model("the base", base, NO_EXCEPTIONS))
    for expert in experts:
        header = expert.header
        yield model(f"expert {expert.name!r}", header, expert.match) if isinstance(header, ModelHeader) else first


def _limit(header: ModelHeader, base: ModelHeader, match: Match) -> int:
    """Return the number of rows that a model has for tokens, in its config.json and in its tensors."""
    whole = [tensor for tensor in base.tensors if is_gathered(base, tensor) and tensor not in match.parts]
    names = [name for tensor in whole for name in match.names(tensor)]
    rows = [header.tensors[name].shape[0] for name in names if header.tensors[name].shape]
    return min(rows if header.vocab_size is None else [header.vocab_size, *rows], default=0)


def _rule(token: str, number: int, rule: TokenRow, models: Sequence[_Model]) -> RowRule:
    """Return the rule for a token of the output."""
    if rule.zero:
        return RowRule(number, ZERO, 0, rule.force)
    name = shown(repr(token))
    if rule.model is None:
        raise ConfigError(
            f"the token {name} is not in every model, and nothing says which row it has there", RULES, "a `source`"
        )
    model = models[rule.model]
    if rule.token_id is not None:
        row = rule.token_id if rule.token_id < model.limit else LACKING
    elif rule.token is not None:
        row = model.tokens.get(rule.token, LACKING)
    else:
        row = int(model.own_R[number])
    if not 0 <= row < model.limit or not model.complete:
        other = rule.token_id if rule.token_id is not None else shown(repr(rule.token or token))
        raise ConfigError(f"the token {name} is to have the row of {other} of {model.name}, which has none", RULES)
    return RowRule(number, rule.model, row, rule.force)


def _in_no_model(found: Vocabularies, models: Sequence[_Model]) -> Iterator[str]:
    """Yield a note on the tokens that no model has."""
    has_R = np.any([model.own_R >= 0 for model in models], axis=0)
    tokens = sorted(
        (token for token, number in found.output.items() if not has_R[number]), key=found.output.__getitem__
    )
    if tokens:
        names = listed([shown(repr(token)) for token in tokens])
        yield f"no model has a row for {names}, so that it is zero unless a rule says otherwise"


def _without_tokenizer(found: Vocabularies, experts: Sequence[ExpertPlan]) -> Iterator[str]:
    """Yield a note on the experts that have no tokenizer of their own."""
    full = [expert for expert in experts if isinstance(expert.header, ModelHeader)]
    names = [expert.name for expert in full if expert.header.folder not in found.models]
    if names:
        yield f"without a tokenizer that can be read, and taken to have the base's tokens: {listed(names)}"
