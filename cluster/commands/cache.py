"""The command `cache`, which lists and empties what merges keep for each other."""

from __future__ import annotations

import time
from pathlib import Path

import click

from cluster.commands.common import debug_option, guarded, target_of

DAY = 86_400.0


@click.command()
@click.option("--folder", help="Folder or URI of the cache. Default: that of merges whose config has no `cache`.")
@click.option("--clear", is_flag=True, help="Remove all entries.")
@click.option(
    "--older-than", type=click.FloatRange(0), metavar="DAYS", help="Remove the entries not used for so many days."
)
@debug_option
def cache(folder: str | None, clear: bool, older_than: float | None, debug: bool) -> None:
    """List what merges keep for each other, and remove it."""
    guarded(lambda: _run(folder, clear, older_than), debug, "some entries may be left")


def _run(folder: str | None, clear: bool, older_than: float | None) -> None:
    import rich.console
    import rich.table
    from rich.filesize import decimal

    from engine.storage.content_cache import OFF, ContentCache, default_place, summary
    from engine.storage.paths import is_uri, open_folder

    where = target_of(folder) if folder is not None else default_place()
    # An empty folder would become a cache.
    if where == OFF or not ((is_uri(where) or Path(where).is_dir()) and open_folder(where).entries()):
        click.echo("there is no cache" if where == OFF else f"{where}: there is no cache")
        return
    kept = ContentCache(where, 0, 0)
    if clear or older_than is not None:
        removed = kept.clear(0.0 if clear else DAY * (older_than or 0.0))
        click.echo(f"removed {len(removed):,} entries, {decimal(sum(entry.size for entry in removed))}")
    table = rich.table.Table("kind", "entries", "size", "last used", box=None, pad_edge=False)
    entries = kept.entries()
    for kind, (count, nbytes, used) in summary(entries).items():
        table.add_row(kind, f"{count:,}", decimal(nbytes), time.strftime("%Y-%m-%d %H:%M", time.localtime(used)))
    click.echo(f"{where}: {len(entries):,} entries, {decimal(sum(entry.size for entry in entries))}")
    if entries:
        rich.console.Console(highlight=False, soft_wrap=True).print(table)
