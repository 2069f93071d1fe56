"""The command `compress-delta`, which stores the task vectors of a checkpoint in few bits."""

from __future__ import annotations

import signal
from pathlib import Path

import click

from cluster.commands.common import debug_option, guarded, stop, target_of
from cluster.progress import busy
from engine.checkpoints.adapters import is_adapter
from engine.checkpoints.find import find_model, portable
from engine.checkpoints.headers import ModelHeader, read_model_header
from engine.errors import CheckpointError, OutputError
from engine.methods.compression import BITS, SIZE, Bits, parse_bits
from engine.planning.structures import without_tied_head
from engine.run.place import check_place
from engine.storage.paths import is_uri


def _bits(context: click.Context, parameter: click.Parameter, value: str) -> Bits:
    try:
        return parse_bits(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.argument("expert")
@click.option("--base", required=True, help="The base that the checkpoint was trained from: a folder, URI or hub id.")
@click.option("--out", required=True, metavar="FOLDER", help="Output folder; one that does not exist, or is empty.")
@click.option(
    "--bits",
    default=BITS,
    show_default=True,
    metavar="BITS:PARTS,…",
    callback=_bits,
    help="Bits of the leading singular parts, of those that follow, and so on; the last group takes what is left.",
)
@click.option(
    "--size",
    default=SIZE,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Most bytes of a matrix, as a share of those in 16 bits.",
)
@debug_option
def compress_delta(expert: str, base: str, out: str, bits: Bits, size: float, debug: bool) -> None:
    """Store what the checkpoint EXPERT changes in its base, in few bits.

    A config names the folder as an expert, like an adapter. docs/compress.md describes it. It is lossy.
    """

    def run() -> None:
        signal.signal(signal.SIGTERM, stop)
        target = target_of(out)
        if is_uri(target):
            raise OutputError("the output is an address", target, "a folder")
        check_place(target)
        own, theirs = _header(expert), _header(base)
        with busy("loading"):
            from engine.compression.deltas import write_deltas
        with busy("compressing"):
            done = write_deltas(own, theirs, Path(target), bits, size, portable(base, theirs.folder, Path.cwd()))
        from rich.filesize import decimal

        share = f"{decimal(done.after)} for a checkpoint of {decimal(done.before)}"
        click.echo(f"wrote the task vectors into {target}: {share}, relative error of the matrices {done.error:.1%}")

    guarded(run, debug)


def _header(model: str) -> ModelHeader:
    folder = find_model(model, Path.cwd())
    if is_adapter(folder):
        raise CheckpointError("the model is an adapter", str(folder), "a full checkpoint")
    return without_tied_head(read_model_header(folder))
