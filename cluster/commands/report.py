"""The command `report` on finished merges."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.commands.common import debug_option, guarded


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--out", default="report.html", show_default=True, type=click.Path(path_type=Path), help="File for the page."
)
@click.option(
    "--evaluation",
    "evaluations",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Scores written by `evaluate`, in addition to RUN/merge/evaluation.parquet; repeatable.",
)
@debug_option
def report(runs: tuple[str, ...], out: Path, evaluations: tuple[Path, ...], debug: bool) -> None:
    """Write an HTML report of one or several merges.

    RUN is the output folder of a merge, or its URI. The report shows coefficients, losses, memory and time.
    """

    def run() -> None:
        from engine.report.page import report_on

        report_on(runs, out, evaluations)
        click.echo(f"wrote {out}")

    guarded(run, debug)
