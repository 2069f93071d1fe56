"""The command `plan`, which checks and estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.commands.common import (
    OUT,
    config_argument,
    debug_option,
    documents_of,
    guarded,
    kept_at,
    kept_option,
    plan_of,
    set_option,
    strict_option,
    target_of,
)
from engine.config.documents import Document
from engine.errors import ConfigError
from engine.planning.plan import Plan
from engine.run.place import check_place

if TYPE_CHECKING:
    from rich.console import Console

    from engine.planning.costs.rates import Prediction


@click.command()
@config_argument
@click.option("--out", help=f"Output folder or URI of the merge, which is checked as well. Default: {OUT}.")
@set_option
@click.option("--nodes", default=1, show_default=True, type=click.IntRange(1), help="Number of equal nodes.")
@click.option(
    "--cpus", type=click.FloatRange(1), help="CPUs per node. Default for this and the next three: as on this machine."
)
@click.option("--gpus", type=click.IntRange(0), help="GPUs per node.")
@click.option("--memory", type=click.FloatRange(0, min_open=True), help="Memory per node in GB.")
@click.option("--gpu-memory", type=click.FloatRange(0, min_open=True), help="Memory per GPU in GB.")
@click.option(
    "--with-stats", is_flag=True, help="Tell what the `statistics` of the models foretell, which reads all weights."
)
@kept_option
@strict_option
@debug_option
def plan(
    config: Path | None,
    out: str | None,
    overrides: tuple[str, ...],
    kept: str | None,
    strict: bool,
    with_stats: bool,
    **machines: Any,
) -> None:
    """Check CONFIG and its inputs, and estimate the merge.

    Reads file headers and a small sample of the weights. The estimates are disk space, memory, traffic, time, and the
    share of each expert's change that is not merged.
    """

    def run() -> None:
        target = target_of(out or OUT)
        if out is not None:  # else a plan can be made where nothing can be written
            check_place(target)
        documents = documents_of(config, overrides, strict)
        if len(documents) == 1 or with_stats:
            made = plan_alone(documents, target)
            of_search = _of_search(documents[0], made)
            print_on(None, made, machines, target, with_stats)
            for line in of_search:
                click.echo(line)
            return
        from engine.output.outline import outlined, places_of

        places = places_of(documents, target, kept_at(kept))
        with outlined(documents, documents[0].path.absolute().parent) as outlines:
            for document, made in zip(documents, outlines.plans, strict=True):
                click.echo(document.label)
                print_on(None, made, machines, places[document.name] if document.name else target)

    guarded(run, machines.pop("debug"))


def plan_alone(documents: Sequence[Document], target: str) -> Plan:
    """Return the plan of the merge into `target` of a config of one merge.

    Raises:
        ConfigError: The config has several, of which models may not be there yet.
    """
    if len(documents) > 1:
        raise ConfigError("a config of several merges", str(documents[0].path), "with --with-stats, a config of one")
    return plan_of(documents[0], target)


def _of_search(document: Document, made: Plan) -> list[str]:
    """Check the search of a config, if it has one, and return the lines that describe it."""
    if made.config.search is None:
        return []
    from engine.search.outlook import search_lines

    return search_lines(document, made.config.search, made)


def print_on(
    console: Console | None, made: Plan, machines: Mapping[str, Any], target: str, with_stats: bool = False
) -> Prediction | None:
    """Print a plan on a console or stdout, of a learned merge with estimates on the given machines; return these.

    `with_stats`: print what the statistics of the models foretell, too.
    """
    estimates = _print_plan(console, made, machines, target)
    if with_stats:
        from cluster.outlook import foretell

        foretell(made, console)
    return estimates


def _print_plan(console: Console | None, made: Plan, machines: Mapping[str, Any], target: str) -> Prediction | None:
    from engine.calibration.records import read_records
    from engine.calibration.samples import about_tokens
    from engine.planning.costs.rates import GB
    from engine.planning.costs.scaling import Machines
    from engine.planning.summary import print_plan, print_weight_space_plan

    if not made.config.learned:
        print_weight_space_plan(made, target, console)
        return None
    given = {name: value for name, value in machines.items() if value is not None}
    given |= {name: value * GB for name, value in given.items() if name.endswith("memory")}
    return print_plan(made, about_tokens(made, read_records(made)), replace(Machines.here(), **given), target, console)
