"""The command `search`: the best of many merges."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cluster.commands.common import (
    address_option,
    config_argument,
    debug_option,
    documents_of,
    fresh_option,
    guarded,
    set_option,
    stop,
    strict_option,
    target_of,
)
from cluster.progress import busy
from engine.errors import ConfigError
from engine.run.place import check_place

# The trials that are printed; the table in the output has all.
SHOWN = 10


@click.command()
@config_argument
@click.option("--out", default="search", show_default=True, help="Output folder, or its s3:// or gs:// URI.")
@set_option
@address_option
@fresh_option
@strict_option
@debug_option
def search(config: Path | None, out: str, overrides: tuple[str, ...], strict: bool, **how: Any) -> None:
    """Search for the best merge that CONFIG declares under `search`.

    The output has the table of trials (trials.parquet), the config of the best one (best.yaml), and its merge (merged).
    The same command goes on with a search that was interrupted, or with more `search.trials`. CONFIG defaults to
    merge.yaml in the current folder.
    """

    def run() -> None:
        signal.signal(signal.SIGTERM, stop)
        target = target_of(out)
        check_place(target)
        documents = documents_of(config, overrides, strict)
        if len(documents) > 1:
            raise ConfigError("a config of several merges", str(documents[0].path), "a config of one")
        with busy("loading"):
            from cluster.search import search as search_by
        search_by(documents[0], target, print_table=print_trials, **how)
        click.echo(f"merged the best trial into {target}/merged; its config is {target}/best.yaml")

    guarded(run, how["debug"], "run the same command to resume")


def print_trials(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the best trials of a table."""
    from rich.console import Console
    from rich.table import Table

    scored = [row for row in rows if row["state"] == "done"]
    hidden = ("state", "best", "front", "rungs", "why")
    table = Table(*(name for name in rows[0] if name not in hidden))
    for row in sorted(scored, key=lambda row: (row["score"], row["number"]))[:SHOWN]:
        table.add_row(*(_text(value) for name, value in row.items() if name not in hidden))
    ended = {state: sum(row["state"] == state for row in rows) for state in ("done", "stopped", "failed")}
    Console(highlight=False).print(table)
    click.echo(", ".join(f"{count} {state}" for state, count in ended.items() if count))


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
