"""The merges of one file: YAML documents, of which one may use the output of another by its `name`, as in mergekit.

Documents may stand in any order. The one without a name is the merge into the output.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from engine.config.reader import BYTES, apply_override, parse_config
from engine.config.schema import Config
from engine.config.yaml_text import parse_all
from engine.errors import ConfigError
from engine.untrusted import read_text, shown

# The keys whose values name a model, at any depth.
MODEL_KEYS = ("base_model", "model", "tokenizer_source", "source")
# Of the keys of a tokenizer, values with a meaning of their own.
TOKENIZERS, MEANINGS = ("tokenizer_source", "source"), ("base", "union")
# A config in Python: a path, a YAML text, or keys and values. What errors call the last two: a name in the working
# directory, to which their paths are relative.
Given = str | os.PathLike[str] | Mapping[str, Any]
GIVEN = Path("the config")
# Characters of a name, which also names a folder, and its most bytes.
NAME, NAME_BYTES = re.compile(r"[\w][\w .-]*"), 200


@dataclass(frozen=True)
class Document:
    """One merge of a file.

    Attributes:
        name: Its name in the file; None for the merge into the output.
        uses: The names of the documents whose outputs are its models.
        raw: Its keys and values, with the overrides and without the name.
        path, node: The file, and the document's YAML nodes, from which errors take line numbers.
        strict: See `load_config`.
    """

    name: str | None
    uses: frozenset[str]
    raw: dict[str, Any]
    path: Path
    node: yaml.Node
    strict: bool

    @property
    def label(self) -> str:
        """How messages name the merge."""
        return "the last merge" if self.name is None else f"the merge {self.name!r}"

    def config(self, places: Mapping[str, str]) -> Config:
        """Return the config of the merge. `places`: the folder or URI of each document's output, by name.

        Raises:
            ConfigError: See `load_config`.
        """
        return parse_config(with_models(self.raw, places), self.path, self.node, self.strict)


def read_documents(path: Path, overrides: Sequence[str] = (), strict: bool = False) -> list[Document]:
    """Return the merges of a file, each after those that it uses; the last is the merge into the output.

    Args:
        path: The file.
        overrides: `key.sub=value` for every merge, or `NAME.key.sub=value` for the one of that name.
        strict: See `load_config`.

    Raises:
        ConfigError: The file cannot be read or is not valid; two merges have one name, more than one has none, or they
            use each other in a circle.
    """
    return parse_documents(read_text(path, BYTES, ConfigError, "the config"), path, overrides, strict)


def given_documents(config: Given, overrides: Mapping[str, Any] | None = None, strict: bool = False) -> list[Document]:
    """Return the merges of a config that Python code gives; see `read_documents`.

    Args:
        config: The path of a file; a YAML text, of at least two lines; or the keys and values. Paths in the last two
            are relative to the working directory.
        overrides: New values by key, such as `parameters.epochs`.
        strict: See `load_config`.

    Raises:
        ConfigError: See `read_documents`; or a value is of a type that a YAML does not have.
    """
    texts = [f"{key}={_dumped(value, flow=True)}" for key, value in (overrides or {}).items()]
    if isinstance(config, Mapping):
        read = parse_documents(_dumped(config), GIVEN, texts, strict)
        # Nobody has seen the lines of this text.
        return [replace(one, node=yaml.ScalarNode("", "")) for one in read]
    if isinstance(config, str) and "\n" in config:
        return parse_documents(config, GIVEN, texts, strict)
    if not os.path.isfile(config):  # noqa: PTH113 - false, not an error, for a name that no file can have
        raise ConfigError("no such config file", str(Path(config).absolute()))
    return read_documents(Path(config), texts, strict)


def _dumped(value: Any, flow: bool = False) -> str:
    """Return a value as YAML; `flow`: on one line."""
    try:
        return yaml.safe_dump(_plain(value), default_flow_style=flow, sort_keys=False, allow_unicode=True, width=2**31)
    except yaml.YAMLError as error:
        what = f"a value cannot be written as YAML: {shown(str(error.args[-1]))}"
        raise ConfigError(what, str(GIVEN), "texts, numbers, true, false, None, lists and mappings") from error


def _plain(value: Any) -> Any:
    """Return a value with paths as texts, and with tuples and mappings of all types as lists and dictionaries."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def parse_documents(text: str, path: Path, overrides: Sequence[str] = (), strict: bool = False) -> list[Document]:
    """Return the merges of a YAML text; see `read_documents`. `path`: the file that errors name."""
    parsed = parse_all(text, str(path))
    parsed = [(raw, node) for raw, node in parsed if raw is not None] or parsed
    raws: dict[str | None, dict[str, Any]] = {}
    nodes: dict[str | None, yaml.Node] = {}
    for raw, node in parsed:
        where = f"{path}:{node.start_mark.line + 1}"
        if not isinstance(raw, dict):
            raise ConfigError("the config is not a mapping of keys to values", where, "keys such as `merge_method: …`")
        name = _name(raw, where) if len(parsed) > 1 else None
        if name in raws:
            what = "two documents have no `name`" if name is None else f"two documents have the name {name!r}"
            raise ConfigError(what, where, do="give each document a `name` of its own; one may have none")
        raws[name], nodes[name] = {key: value for key, value in raw.items() if key != "name"}, node
    if not raws:
        raise ConfigError("the config is not a mapping of keys to values", str(path), "keys such as `merge_method: …`")
    for override in overrides:
        _override(raws, override)
    names = [name for name in raws if name is not None]
    uses = {name: frozenset(_used(raw, names)) for name, raw in raws.items()}
    documents = [Document(name, uses[name], raws[name], path, nodes[name], strict) for name in _ordered(uses, path)]
    # Where all have names, the last one of the file that no other uses is the merge into the output.
    return [*documents[:-1], replace(documents[-1], name=None)]


def with_models(value: Any, names: Mapping[str, str]) -> Any:
    """Return a config with other names of its models; a name in `names` may be followed by +ADAPTER."""
    if isinstance(value, list):
        return [with_models(inner, names) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _renamed(inner, names) if _is_model(key, inner) else with_models(inner, names)
        for key, inner in value.items()
    }


def _is_model(key: str, value: Any) -> bool:
    return key in MODEL_KEYS and isinstance(value, str) and not (key in TOKENIZERS and value in MEANINGS)


def _renamed(model: str, names: Mapping[str, str]) -> str:
    found = next((name for name in names if model == name or model.startswith(f"{name}+")), None)
    return model if found is None else names[found] + model[len(found) :]


def _used(value: Any, names: Sequence[str]) -> set[str]:
    """Return which names of documents the models of a config are."""
    if isinstance(value, list):
        return {name for inner in value for name in _used(inner, names)}
    if not isinstance(value, dict):
        return set()
    found = {name for inner in value.values() for name in _used(inner, names)}
    models = [inner for key, inner in value.items() if _is_model(key, inner)]
    return found | {name for name in names if any(model == name or model.startswith(f"{name}+") for model in models)}


def _name(raw: dict[str, Any], where: str) -> str | None:
    name = raw.get("name")
    if name is None:
        return None
    if not isinstance(name, str) or not NAME.fullmatch(name) or len(name.encode()) > NAME_BYTES:
        what = "letters, digits, spaces, dots and dashes, as it also names a folder"
        raise ConfigError(f"the `name` of a document is {shown(repr(name))}", where, what)
    return name


def _override(raws: Mapping[str | None, dict[str, Any]], override: str) -> None:
    named = [name for name in raws if name is not None and override.startswith(f"{name}.")]
    if named:
        longest = max(named, key=len)
        apply_override(raws[longest], override[len(longest) + 1 :])
    else:
        for raw in raws.values():
            apply_override(raw, override)


def _ordered(uses: Mapping[str | None, frozenset[str]], path: Path) -> list[str | None]:
    """Return the names so that each follows those that it uses, and the merge into the output is the last."""
    try:
        ordered = list(TopologicalSorter({name: sorted(of) for name, of in uses.items()}).static_order())
    except CycleError as error:
        circle = ", ".join(str(name) for name in error.args[1])
        raise ConfigError(
            f"the documents use each other in a circle: {circle}", str(path), do="let one of them use other models"
        ) from error
    unused = [name for name in uses if not any(name in of for of in uses.values())]
    last = None if None in uses else unused[-1]
    return [*(name for name in ordered if name != last), last]
