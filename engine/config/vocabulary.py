"""The `tokenizer` of a weight-space merge's YAML: mergekit's rules for the rows of tokens in embedding and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from engine.config.yaml_text import Where, check_keys
from engine.errors import ConfigError
from engine.fields import Int, Section
from engine.untrusted import shown

# The most rows that `pad_to_multiple_of` may add.
MULTIPLE = 1 << 20
TOKENIZER_KEYS, TOKEN_KEYS = ("source", "tokens", "pad_to_multiple_of"), ("source", "force")
FORMS = "a model, {kind: zero}, or {kind: model_token, model: …} with `token` or `token_id`"


class TokenRow(Section):
    """The row of a token in the models that lack the token; with `force`, in all models.

    Attributes:
        model: The model that provides the row: 0 is the base, k the k-th expert. None: the row is zero with `zero`, and
            not given without.
        zero: The row is zero.
        token: The token of the model whose row it is. None: the same token, or that of `token_id`.
        token_id: The number of that row.
        force: The row is the same in all models, whatever rows they have.
    """

    model: int | None = None
    zero: bool = False
    token: str | None = None
    token_id: Annotated[Int, Field(ge=0)] | None = None
    force: bool = False


class TokenSettings(Section):
    """Rules for the rows of tokens by token, and the number of which the number of rows becomes a multiple."""

    tokens: dict[str, TokenRow] = Field(default_factory=dict)
    pad_to_multiple_of: Annotated[Int, Field(ge=1, le=MULTIPLE)] | None = None


def reference(model: Any) -> Any:
    """Return a model as a text, which mergekit also writes as a mapping with `model`, `lora`, `path` and `revision`."""
    if not isinstance(model, dict):
        return model
    if "path" in model:
        return f"{model['path']}@{model['revision']}" if model.get("revision") else model["path"]
    inner, lora = reference(model.get("model")), reference(model.get("lora"))
    return f"{inner}+{lora}" if lora else inner


def with_tokenizer_source(raw: dict[str, Any], where: Where) -> tuple[dict[str, Any], Any]:
    """Replace `tokenizer` by `tokenizer_source`.

    Returns:
        The config, and the value of `tokenizer`; None without one.

    Raises:
        ConfigError: Both keys are given, or `tokenizer` or its `source` has another type.
    """
    given = raw.get("tokenizer")
    if given is None:
        source = reference(raw.get("tokenizer_source"))
        raw = {key: value for key, value in raw.items() if key != "tokenizer"}
        return raw if source is None else raw | {"tokenizer_source": source}, None
    at = where(("tokenizer",))
    if not isinstance(given, dict):
        raise ConfigError(f"tokenizer is {shown(repr(given))}", at, f"a mapping with {', '.join(TOKENIZER_KEYS)}")
    if raw.get("tokenizer_source"):
        raise ConfigError("both `tokenizer` and `tokenizer_source` are given", at, "one of them")
    source = reference(given.get("source", "union"))
    if not isinstance(source, str):
        what = f"tokenizer.source is {shown(repr(given['source']))}"
        raise ConfigError(what, at, "union, base, or one of the models")
    others = {key: value for key, value in raw.items() if key != "tokenizer"}
    return others | {"tokenizer_source": source}, given


def read_tokens(given: Any, base: Any, experts: Sequence[Any], where: Where) -> TokenSettings:
    """Return the rules of a `tokenizer` that `with_tokenizer_source` accepted.

    Args:
        given: The value of `tokenizer`, or None.
        base: The base, as the config names it; None without one.
        experts: The experts' entries, in the order of `Config.models`. One of them may be the base's model once more.
        where: Returns the place of a key.

    Raises:
        ConfigError: A key is unknown, a rule or a number has another form, or a rule names a model that is not merged.
    """
    if given is None:
        return TokenSettings()
    entries = [(place, entry) for place, entry in enumerate(experts, 1) if isinstance(entry, dict)]
    named = [(entry.get(key), place) for key in ("model", "name") for place, entry in entries]
    # The first of several entries of a model.
    places = {name: place for name, place in reversed([(base, 0), *named]) if isinstance(name, str)}
    rules = given.get("tokens") or {}
    if not isinstance(rules, dict) or not all(isinstance(rule, dict) for rule in rules.values()):
        raise ConfigError("tokenizer.tokens is not a mapping", where(("tokenizer", "tokens")), "TOKEN: {source: …}")
    check_keys(given, TOKENIZER_KEYS, ("tokenizer",), where)
    read = {}
    for token, rule in rules.items():
        check_keys(rule, TOKEN_KEYS, ("tokenizer", "tokens", token), where)
        read[token] = _rule(token, rule, places, where(("tokenizer", "tokens", token)))
    multiple = given.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or not 1 <= multiple <= MULTIPLE):
        raise ConfigError(
            f"tokenizer.pad_to_multiple_of is {shown(repr(multiple))}",
            where(("tokenizer", "pad_to_multiple_of")),
            f"a whole number from 1 to {MULTIPLE:,}",
        )
    return TokenSettings(tokens=read, pad_to_multiple_of=multiple)


def _rule(token: str, rule: dict[str, Any], places: dict[str, int], at: str) -> TokenRow:
    """Return the rule of a token, from its form in the YAML."""
    source, force = rule.get("source"), rule.get("force", False)
    name = f"tokenizer.tokens.{shown(token)}"
    if not isinstance(force, bool):
        raise ConfigError(f"{name}.force is {shown(repr(force))}", at, "true or false")
    if source is None:
        return TokenRow(force=force)
    row = source if isinstance(source, dict) and {"kind", "token", "token_id"} & source.keys() else {"model": source}
    kind, other, number = row.get("kind"), row.get("token"), row.get("token_id")
    if kind == "zero":
        return TokenRow(zero=True, force=force)
    model = reference(row.get("model"))
    one = isinstance(other, str) if number is None else type(number) is int and number >= 0 and other is None
    if not isinstance(model, str) or (row is source and not (kind == "model_token" and one)):
        raise ConfigError(f"{name}.source is {shown(repr(source))}", at, FORMS)
    if model not in places:
        raise ConfigError(f"{name} takes a row of {shown(repr(model))}, which is not merged", at, "one of the models")
    return TokenRow(model=places[model], token=other, token_id=number, force=force)


def tokenizer_yaml(source: str, settings: TokenSettings, models: Sequence[str]) -> dict[str, Any]:
    """Return the value of `tokenizer` in a YAML. `models`: the base and the experts, as the YAML names them."""
    tokens: dict[str, Any] = {}
    for token, rule in settings.tokens.items():
        tokens[token] = {"force": True} if rule.force else {}
        if rule.zero:
            tokens[token]["source"] = {"kind": "zero"}
        elif rule.model is not None:
            other = {"token": rule.token, "token_id": rule.token_id}
            other = {key: value for key, value in other.items() if value is not None}
            model = models[rule.model]
            tokens[token]["source"] = {"kind": "model_token", "model": model, **other} if other else model
    multiple = settings.pad_to_multiple_of
    given = {"tokens": tokens, "pad_to_multiple_of": multiple}
    return {"source": source} | {key: value for key, value in given.items() if value}
