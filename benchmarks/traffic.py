"""Measure the bytes between trainer and shards per optimiser step, in Ray's object store, and of a token's targets.

Merges run in this process on a local Ray, over K and the number of shards. The trainer counts the bytes it sends and
receives (merge/memory.json); M is the bytes of the merged tensors. A thread queries the bytes in use in the object
store every 20 ms, with the call that Ray's dashboard makes to the raylet. Ray keeps unreferenced objects for up to a
second; here it is configured to free them at once, so that the peak is the memory in use at the same time. An object
that lives for less than the time between two queries may be missed, so the table shows the number of queries (looks),
the longest time between two of them, and the total that passed through the store. Objects below 100 KB are not put into
the store.
"""

from __future__ import annotations

import io
import os
import tempfile
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import click
import grpc
import merges
import models
import ray
from models import Models
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc
from report import Report, Target, console, in_mb, json_option, print_table

import cli
from engine.planning.schedule import passes

INTERVAL_SECONDS = 0.02
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TOKEN_ID_BYTES = 8


class StorePeak:
    """Sample the object store of the single-node Ray that this process starts, for the duration of the context."""

    def __init__(self) -> None:
        self.peak = self.through = self.looks = 0
        self.longest_gap = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="store-peak", daemon=True)

    def __enter__(self) -> StorePeak:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not ray.is_initialized():
            if self._stop.wait(INTERVAL_SECONDS):
                return
        node = ray.nodes()[0]
        request = node_manager_pb2.GetNodeStatsRequest(include_memory_info=False)
        with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
            raylet = node_manager_pb2_grpc.NodeManagerServiceStub(channel)
            before = time.monotonic()
            while not self._stop.wait(max(0.0, before + INTERVAL_SECONDS - time.monotonic())):
                try:
                    stats = raylet.GetNodeStats(request, timeout=30).store_stats
                except grpc.RpcError:
                    return  # the merge has ended and shut Ray down
                now = time.monotonic()
                self.longest_gap, before = max(self.longest_gap, now - before), now
                self.peak = max(self.peak, stats.object_store_bytes_used)
                self.through = max(self.through, stats.cumulative_created_bytes)
                self.looks += 1


def run(config: Path, out: Path, settings: list[str]) -> tuple[merges.Merged, StorePeak]:
    """Run a merge through the command line in this process."""
    output = io.StringIO()
    with StorePeak() as store, redirect_stdout(output), redirect_stderr(output):
        try:
            cli.main(merges.arguments(config, out, settings), standalone_mode=False)
        except SystemExit as end:
            raise click.ClickException(f"the merge ended with {end.code}:\n{output.getvalue()}") from end
    return merges.read(out), store


def measure(
    report: Report, made: Models, k: int, what: str, settings: list[str], samples: int, tokens: int
) -> list[str]:
    """Run one merge, add its figures to the report, and return them as cells of the table."""
    with tempfile.TemporaryDirectory(dir=made.workdir) as folder:
        parameters = {"gradient_accumulation": report.settings["window"]}
        config = made.write_merge(Path(folder) / "merge.yaml", k, samples, tokens, parameters)
        began = time.monotonic()
        merged, store = run(config, Path(folder) / "out", settings)
        console.print(f"{what}: {time.monotonic() - began:.0f} s")
    memory, steps = merged.memory, len(merged.seconds)
    size = memory["bytes_merged"]
    out, into = (memory[key] / steps for key in ("bytes_trainer_to_shards", "bytes_shards_to_trainer"))
    report.memory[f"{what}: out of the trainer a step"] = int(out)
    report.memory[f"{what}: into the trainer a step"] = int(into)
    report.other[f"{what}: peak of the object store"] = store.peak
    report.other[f"{what}: bytes that passed through the object store"] = store.through
    report.other[f"{what}: longest time between two looks at the store, s"] = store.longest_gap
    streams = "gradients=stream" in settings
    limit = len(passes([tokens] * round(merged.window), merges.BATCH_TOKENS)) + 1 if streams else 2
    moved = Target(f"{what}: moved a step / M", (out + into) / size, limit)
    report.targets.append(moved)
    token = memory["bytes_targets"] / (k * samples * tokens)
    report.memory[f"K={k}: targets of a token"] = int(token)
    parts = [in_mb(size), str(steps), in_mb(out), in_mb(into), f"{moved.value:.4f}", f"{limit:g}"]
    looks = f"{store.looks} / {store.longest_gap * 1000:.0f} ms"
    return [*parts, in_mb(store.peak), in_mb(store.through), in_mb(memory["bytes_targets"]), looks]


def target_bytes(made: Models) -> int:
    """Return the bytes of a token's target: middle hidden state, last hidden state (own head: logits), token id."""
    last = made.shape.vocab_size if made.own_heads else made.shape.hidden_size
    return (made.shape.hidden_size + last) * BYTES[made.dtype] + TOKEN_ID_BYTES


@click.command(help=__doc__)
@models.options
@click.option("--experts", "-k", multiple=True, default=[2, 8, 32], show_default=True, type=click.IntRange(1))
@click.option("--shards", multiple=True, default=[0, 1, 2, 4], show_default=True, type=click.IntRange(0))
@click.option(
    "--stream/--no-stream",
    default=True,
    help="Measure gradients=stream as well, with the smallest number of shards above 0.",
)
@click.option("--window", default=8, show_default=True, type=click.IntRange(1), help="Samples per optimiser step.")
@click.option("--steps", default=2, show_default=True, type=click.IntRange(1), help="Least number of optimiser steps.")
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(2), help="Tokens per sample.")
@json_option()
def main(
    workdir: Path,
    size: str,
    dtype: str,
    own_heads: bool,
    experts: tuple[int, ...],
    shards: tuple[int, ...],
    stream: bool,
    window: int,
    steps: int,
    tokens: int,
    path: Path | None,
) -> None:
    # The raylet that this process starts frees an object as soon as it is unreferenced.
    os.environ["RAY_free_objects_period_milliseconds"] = "0"  # noqa: SIM112 - Ray's own spelling
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["EXPERT_MERGING_RUN_CACHE"] = "off"
    made = Models(workdir.absolute(), size, dtype, own_heads)
    counts, placements = sorted(set(experts)), sorted(set(shards))
    ways: dict[str, list[str]] = {f"shards={count}": [f"cluster.shards={count}"] for count in placements}
    some = [count for count in placements if count]
    if stream and some:
        ways[f"shards={some[0]} stream"] = [f"cluster.shards={some[0]}", "gradients=stream"]
    chosen: dict[str, Any] = {"experts": counts, "ways": ways, "window": window, "steps": steps, "tokens": tokens}
    report = Report(made.describe() | chosen)
    console.print(report.settings)
    path = path or made.workdir / "results" / "traffic.json"
    rows: dict[str, list[str]] = {}
    for k in counts:
        for way, settings in ways.items():
            what = f"K={k} {way}"
            rows[what] = measure(report, made, k, what, settings, merges.samples_for(k, window, steps), tokens)
        report.save(path)
    columns = [
        "M",
        "steps",
        "out a step",
        "in a step",
        "/ M",
        "limit",
        "store peak",
        "passed",
        "targets",
        "looks / longest gap",
    ]
    print_table("bytes between trainer and shards, and in the object store; MB", columns, rows)
    expected = target_bytes(made)
    for k in counts:
        token = report.memory[f"K={k}: targets of a token"]
        report.targets.append(
            Target(f"K={k}: bytes of a token's targets / of its hidden states", token / expected, 1.0)
        )
        console.print(f"K={k}: {token} bytes of targets a token; hidden states and token take {expected}")
    report.finish(path)


if __name__ == "__main__":
    main()
