"""YAML texts of bounded size, without tags, aliases in a circle, keys given twice or characters that cannot be seen.

The text of a chat template may be long and have several lines; `check_texts` refuses such a text elsewhere.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from engine.errors import UNSEEN, ConfigError
from engine.untrusted import shown

Location = tuple[int | str, ...]
# Returns the place of a key: FILE:LINE where the line is known.
Where = Callable[[Location], str]

# Bounds of a config: values (an alias counts as all values it refers to), nesting depth, characters of a number, of a
# value (enough for any path) and of a chat template.
VALUES, DEPTH, DIGITS, TEXT, TEMPLATE = 100_000, 40, 1000, 4096, 1 << 18

NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
MERGE = "tag:yaml.org,2002:merge"
KEYS = {"tag:yaml.org,2002:str", MERGE}
# The top-level key whose text may be long, and the characters of such a text that are no letters.
LONG, LINES = "chat_template", "\n\t"


class _Loader(yaml.SafeLoader):
    """Loader of YAML without tags and of bounded size, which refuses a key that is given twice.

    `values` is the maximum number of values. `plain`: refuse invisible characters.
    """

    def __init__(self, text: str, values: int = VALUES, plain: bool = True) -> None:
        super().__init__(text)
        self._values, self._plain = values, plain
        self._depth = 0
        # Number of values below each completed node, itself included.
        self._sizes: dict[yaml.Node, int] = {}
        self._total = 0
        self._in_key = False

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise _fault(f"the tag {shown(event.tag)} is not supported", event)
        if self._depth == DEPTH:
            raise _fault(f"values are nested deeper than {DEPTH} levels", event)
        self._depth += 1
        before = self._total
        self._in_key = isinstance(parent, yaml.MappingNode) and index is None
        node = super().compose_node(parent, index)
        assert node is not None
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if node not in self._sizes:
                raise _fault(f"the alias {event.anchor!r} refers to a value that contains it", event)
            self._total += self._sizes[node]
        else:
            self._total += 1
            self._sizes[node] = self._total - before
        if self._total > self._values:
            raise _fault(f"the config has more than {self._values:,} values", event)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        most = DIGITS if node.tag in NUMBERS else TEXT if self._in_key else TEMPLATE
        if fault := _text_fault(node.value, most, None if not self._plain else "" if self._in_key else LINES):
            raise _fault(fault, node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in KEYS:
                raise _fault("a key is not a string", key)
            if key.value in seen and key.tag != MERGE:
                raise _fault(f"the key {key.value!r} is given twice", key)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def parse(text: str, where: str, values: int = VALUES, plain: bool = True) -> tuple[Any, yaml.Node | None]:
    """Return the value of the YAML text of one document, and its root node; see `parse_all`.

    Raises:
        ConfigError: There are several documents.
    """
    found = parse_all(text, where, values, plain)
    if len(found) > 1:
        line = found[1][1].start_mark.line + 1
        raise ConfigError("there is another document", f"{where}:{line}" if where else "", "a single YAML document")
    return found[0] if found else (None, None)


def parse_all(text: str, where: str, values: int = VALUES, plain: bool = True) -> list[tuple[Any, yaml.Node]]:
    """Return the value of each document of a YAML text and its root node.

    Args:
        text: The text.
        where: The file that errors name.
        values: The maximum number of values in all documents.
        plain: Refuse invisible characters.

    Raises:
        ConfigError: The text is not YAML, or exceeds a bound.
    """
    found: list[tuple[Any, yaml.Node]] = []
    try:
        loader = _Loader(text, values, plain)
        while loader.check_node():
            node = loader.get_node()
            assert node is not None
            found.append((loader.construct_document(node), node))
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"not valid YAML: {problem}", f"{where}:{mark.line + 1}" if mark else where) from error
    return found


def check_keys(section: Mapping[str, Any], known: Sequence[str], at: Location, where: Where) -> None:
    """Check that a section of a config, at the place `at`, has no other keys than those that are known.

    Raises:
        ConfigError: It has.
    """
    for key in section:
        if key not in known:
            name = ".".join(shown(str(part)) for part in (*at, key))
            raise ConfigError(f"unknown key {name!r}", where((*at, key)), f"one of {', '.join(known)}")


def check_texts(value: Any, where: Where, at: Location = ()) -> None:
    """Check that no text of a config but a chat template is long or has several lines.

    Raises:
        ConfigError: A text is longer than any path, or has a line break or a tab.
    """
    if at == (LONG,):
        return
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            check_texts(inner, where, (*at, key))
    elif isinstance(value, str) and (fault := _text_fault(value, TEXT, "")):
        raise ConfigError(fault, where(at))


def set_value(raw: Any, names: Sequence[int | str], value: Any, at: str) -> None:
    """Set the value of a key of a config, in place. `names`: the keys to it, numbers for places in a list.

    Raises:
        ConfigError: The config has no place for it; `at` is what the error names.
    """
    *parents, last = names
    target = raw
    for key in parents:
        if isinstance(target, dict) and isinstance(key, str):
            target = target.setdefault(key, {})
        elif isinstance(target, list) and isinstance(key, int) and key < len(target):
            target = target[key]
        else:
            raise ConfigError(f"the config has no {key!r} to set a value in", at)
    try:
        target[last] = value
    except (TypeError, IndexError) as error:
        raise ConfigError(f"the config has no place for {last!r}", at) from error


def _text_fault(text: str, most: int, lines: str | None) -> str:
    """Return what is wrong with a text, or nothing.

    `lines`: the invisible characters that are allowed; None for all.
    """
    if len(text) > most:
        return f"a value has {len(text):,} characters, more than {most:,}"
    unseen = (char for char in text if lines is not None and char not in lines and unicodedata.category(char) in UNSEEN)
    found = next(unseen, None)
    return f"a value contains the character {found!r}" if found else ""


def _fault(problem: str, at: Any) -> yaml.MarkedYAMLError:
    """Return the error for a problem at an event or a node."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)
