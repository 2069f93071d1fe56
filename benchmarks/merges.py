"""Run merges through the command line and read their records; used by the benchmarks.

`merge/memory.json` holds the peak anonymous memory of every process and the bytes transferred; `merge/metrics.parquet`
holds the seconds of every optimiser step.
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

from engine.planning.schedule import CPU_TOKENS

ROOT = Path(__file__).resolve().parent.parent
# Merges start a Ray of their own even if the shell names a cluster. Models are folders, so no hub is needed. A merge
# uses nothing that another one computed, unless its config names a cache.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
    "HF_HUB_OFFLINE": "1",
    "EXPERT_MERGING_RUN_CACHE": "off",
}
# Default number of tokens per pass.
BATCH_TOKENS = CPU_TOKENS


@dataclass(frozen=True)
class Merged:
    """The records of a finished merge: `memory` of merge/memory.json, `rows` of merge/metrics.parquet."""

    memory: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def seconds(self) -> list[float]:
        """Seconds of each optimiser step."""
        return list({(row["stage"], row["step"]): row["seconds"] for row in self.rows}.values())

    @property
    def window(self) -> float:
        """Mean number of samples per optimiser step."""
        return len(self.rows) / len(self.seconds)

    def peaks(self) -> dict[str, int]:
        """Return the peak anonymous bytes by kind of actor, the highest of several shards or experts."""
        peak_of: dict[str, int] = {}
        for actor in self.memory["actors"]:
            kind = actor["role"].partition(" ")[0]
            peak_of[kind] = max(peak_of.get(kind, 0), actor["peak_anonymous_bytes"])
        return peak_of


def samples_for(experts: int, window: int, steps: int) -> int:
    """Return the number of samples per expert that fill at least `steps` whole windows."""
    return -(-steps * window // experts)


def arguments(config: Path, out: Path, settings: Sequence[str]) -> list[str]:
    """Return the arguments of `cli.py` for a merge with these `--set` overrides."""
    return ["merge", str(config), "--out", str(out), *(part for setting in settings for part in ("--set", setting))]


def run(config: Path, out: Path, settings: Sequence[str]) -> Merged:
    """Run a merge in a process of its own, as a user does, and return its records."""
    command = [sys.executable, str(ROOT / "cli.py"), *arguments(config, out, settings)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return read(out)


def read(out: Path) -> Merged:
    """Read the records of a finished merge."""
    record = out / "merge"
    rows = pyarrow.parquet.read_table(record / "metrics.parquet").to_pylist()
    return Merged(json.loads((record / "memory.json").read_text()), rows)
