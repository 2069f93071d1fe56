"""The methods as a table for a person, and as docs/methods.md: both from the registry, so that neither can be wrong
alone.

`python -m engine.methods.catalog > docs/methods.md` writes the page. Knows nothing but names, options and docstrings.
"""

from __future__ import annotations

from collections.abc import Iterable

import rich.box
import rich.console
import rich.table

from engine.methods.mergekit_library import INSTALL
from engine.methods.mergekit_library import NAMES as MERGEKIT
from engine.methods.options import Method, Option
from engine.methods.registry import LEARNED, NATIVE, find_method, has_mergekit

HEAD = """# Methods

Written by `python -m engine.methods.catalog`; a test holds it to the code. `python cli.py methods` prints the same.

A config names one by `merge_method`; the same config runs with another, as parameters that only other methods have are
left out, which the run says. Where an option is looked up: the model's own `parameters`, the slice's, the top level's,
the default. A setting is a value; a list, which is a gradient over the layers (embeddings, final norm and head have the
first); `{filter, value}` for tensors whose name contains the filter; or a list of those, of which the first that fits
counts.

Methods that learn nothing run over the shards alone: no calibration, no GPU. They merge every tensor of numbers that
`exclude` lets through (by default all), in float32, and round once to the output's type: `out_dtype`, else `dtype`,
else the base's. Their semantics are those of mergekit 0.1.5 where it has the method, but for these: mergekit computes
in the type that all inputs promote to, or `dtype`, and writes that; of elements that are equal at a threshold it keeps
any, this engine the first; random masks are this engine's own; `tokenizer_source: base` cuts no rows that only pad the
vocabulary.
"""


def _default(option: Option) -> str:
    if option.required:
        return "needed"
    return str(option.default).lower() if isinstance(option.default, bool) else str(option.default)


def _whose(option: Option) -> str:
    return {"merge": "", "expert": "an expert", "model": "a model"}[option.scope]


def _section(method: Method) -> Iterable[str]:
    aliases = f" (also `{'`, `'.join(method.aliases)}`)" if method.aliases else ""
    yield f"### `{method.name}`{aliases}\n"
    yield f"{method.summary[0].upper()}{method.summary[1:]}.\n"
    yield f"`{method.formula}`  \n{method.source}.\n"
    notes = []
    if method.base == "optional":
        notes.append("`base_model` may be left out.")
    if method.outputs == "experts":
        notes.append("The output folder holds one model folder an expert.")
    if method.whole:
        notes.append("A few whole matrices stand in a shard's memory at a time, whatever the number of experts.")
    if notes:
        yield " ".join(notes) + "\n"
    if method.options:
        yield "| option | default | one | |\n|---|---|---|---|"
        for option in method.options:
            choices = f" ({', '.join(option.choices)})" if option.choices else ""
            yield f"| `{option.name}` | {_default(option)} | {_whose(option)} | {option.about}{choices} |"
        yield ""


def page() -> str:
    """docs/methods.md."""
    parts = [HEAD, "## Learned\n"]
    for method in LEARNED.values():
        parts += _section(method)
    parts.append("## Native\n")
    for method in NATIVE.values():
        parts += _section(method)
    parts.append("## By mergekit's library\n")
    parts.append(
        f"After `{INSTALL}`; options are mergekit's. Each tensor stands whole in memory, of base and experts.\n"
    )
    parts.append("| method | |\n|---|---|")
    parts += [f"| `{name}` | {about} |" for name, about in MERGEKIT.items()]
    return "\n".join(parts) + "\n"


def print_methods(console: rich.console.Console | None = None) -> None:
    """Every method in one line, with its options and their defaults."""
    console = console or rich.console.Console(highlight=False, soft_wrap=True)
    table = rich.table.Table(box=rich.box.SIMPLE)
    for column in ("method", "what it does", "options = defaults"):
        table.add_column(column, overflow="fold")
    known = [*LEARNED.values(), *NATIVE.values()]
    if has_mergekit():
        known += [method for name in MERGEKIT if (method := find_method(name)) is not None]
    for method in known:
        options = " ".join(f"{option.name}={_default(option)}" for option in method.options)
        names = ", ".join((method.name, *method.aliases))
        table.add_row(names, method.summary, options)
    if not has_mergekit():
        for name, about in MERGEKIT.items():
            table.add_row(name, about, f"mergekit's: {INSTALL}")
    console.print(table)


if __name__ == "__main__":
    print(page(), end="")
