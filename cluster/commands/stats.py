"""The command `stats`, which writes the statistics of a config's models."""

from __future__ import annotations

import signal
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
from engine.config.reader import collected
from engine.errors import ConfigError
from engine.planning.planner import make_plan
from engine.run.place import check_apart, check_place

KINDS = ("activations", "gram", "fisher", "sensitivity")
OUT = "statistics"


def _kinds(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    given = tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))
    if not given:
        raise click.BadParameter(f"give at least one of {', '.join(KINDS)}")
    if unknown := [kind for kind in given if kind not in KINDS]:
        raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(KINDS)}")
    return given


@click.command()
@config_argument
@click.option("--out", default=OUT, show_default=True, help="Output folder, or its s3:// or gs:// URI.")
@click.option(
    "--kinds",
    default="gram",
    show_default=True,
    callback=_kinds,
    help="What is collected, separated by commas: activations, gram (activations included), fisher, sensitivity.",
)
@click.option("--base", "with_base", is_flag=True, help="Collect those of the base as well, on all samples.")
@set_option
@address_option
@fresh_option
@strict_option
@debug_option
def stats(
    config: Path | None,
    out: str,
    kinds: tuple[Any, ...],
    with_base: bool,
    overrides: tuple[str, ...],
    strict: bool,
    **how: Any,
) -> None:
    """Write the statistics of the experts of CONFIG, which later merges of any method can use.

    An expert runs on the samples of its `calibration`. Each gets a folder of its name in the output, which can be
    published with the model; `models[].statistics` of a config names it. CONFIG defaults to merge.yaml in the current
    folder.
    """

    def run() -> None:
        signal.signal(signal.SIGTERM, stop)
        target = target_of(out)
        check_place(target)
        documents = documents_of(config, overrides, strict)
        if len(documents) > 1:
            raise ConfigError("a config of several merges", str(documents[0].path), "a config of one")
        path = documents[0].path.absolute()
        given = collected(documents[0].config({}), kinds, with_base, str(path))
        made = make_plan(given, path.parent)
        check_apart(made, target, path)
        with busy("loading"):
            from cluster.driver import merge
        done = merge(made, target, **how)
        what = f"statistics of {len(made.experts)} experts"
        click.echo(f"wrote the {what} into {target}" if done else f"{target} already holds these {what}")

    guarded(run, how["debug"], "run the same command to resume")
