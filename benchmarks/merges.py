"""Measures nothing: runs merges by the project's own command line, and reads what they tell of themselves.

`merge/memory.json` has the peak anonymous memory of every process and the bytes that moved, `merge/metrics.parquet`
the seconds of every step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet

from engine.config.schema import Config

ROOT = Path(__file__).resolve().parent.parent
# A merge of ours on its own Ray, whatever cluster the shell knows; and models are folders, so no hub is asked.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"HF_HUB_OFFLINE": "1"}
# Tokens that samples share a pass with, where a merge is not told otherwise.
BATCH_TOKENS: int = Config.model_fields["batch_tokens"].default


@dataclass(frozen=True)
class Merged:
    """What a finished merge told."""

    memory: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def seconds(self) -> list[float]:
        """Of each optimiser step."""
        return list({(row["stage"], row["step"]): row["seconds"] for row in self.rows}.values())

    @property
    def window(self) -> float:
        """Samples of an optimiser step, on average."""
        return len(self.rows) / len(self.seconds)

    def peaks(self) -> dict[str, int]:
        """Peak anonymous bytes by kind of actor; of several shards or experts the highest."""
        found: dict[str, int] = {}
        for actor in self.memory["actors"]:
            kind = actor["role"].partition(" ")[0]
            found[kind] = max(found.get(kind, 0), actor["peak_anonymous_bytes"])
        return found


def samples_for(experts: int, window: int, steps: int) -> int:
    """Samples of each expert with which there are at least so many optimiser steps of whole windows."""
    return -(-steps * window // experts)


def arguments(config: Path, out: Path, settings: Sequence[str]) -> list[str]:
    return ["merge", str(config), "--out", str(out), *(part for one in settings for part in ("--set", one))]


def run(config: Path, out: Path, settings: Sequence[str]) -> Merged:
    """A merge in a process of its own, as a user starts it."""
    command = [sys.executable, str(ROOT / "cli.py"), *arguments(config, out, settings)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return read(out)


def read(out: Path) -> Merged:
    record = out / "merge"
    rows = pyarrow.parquet.read_table(record / "metrics.parquet").to_pylist()
    return Merged(json.loads((record / "memory.json").read_text()), rows)
