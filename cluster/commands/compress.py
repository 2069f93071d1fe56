"""The command `compress`, which makes a mixture of experts smaller."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import click

from cluster.commands.common import (
    address_option,
    debug_option,
    fresh_option,
    guarded,
    set_option,
    stop,
    target_of,
)
from cluster.progress import busy
from engine.compression.config import read_compression
from engine.compression.families import experts_kept, number_of_experts
from engine.errors import ConfigError
from engine.planning.planner import make_plan
from engine.run.place import check_apart, check_place


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--out", required=True, metavar="FOLDER", help="Output folder, or its s3:// or gs:// URI.")
@set_option
@address_option
@fresh_option
@debug_option
def compress(config: Path, out: str, overrides: tuple[str, ...], **how: Any) -> None:
    """Write a mixture of experts with fewer experts, those of a group merged into one.

    CONFIG names the model, the method, and a file of calibration samples. docs/compress.md describes it.
    """

    def run() -> None:
        signal.signal(signal.SIGTERM, stop)
        target = target_of(out)
        check_place(target)
        if not os.path.isfile(config):  # noqa: PTH113 - false, not an error, for a name that no file can have
            raise ConfigError("no such config file", str(config.absolute()))
        path = config.absolute()
        made = make_plan(read_compression(path, overrides), path.parent)
        check_apart(made, target, path)
        assert made.config.compress is not None
        before, kept = number_of_experts(made.base_header), experts_kept(made.base_header, made.config.compress)
        with busy("loading"):
            from cluster.driver import merge
        done = merge(made, target, **how)
        what = f"{kept} of {before} experts a layer"
        click.echo(f"wrote the model with {what} into {target}" if done else f"{target} already holds it, with {what}")

    guarded(run, how["debug"], "run the same command to resume")
