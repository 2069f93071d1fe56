"""Compare ways to decompose an adapter's task vector: the product as a matrix, and the two factors alone.

Both run in turns in one process, on one thread, as on a shard. Seconds are CPU seconds of the thread, the median of the
rounds. The distance is the relative norm between the leading parts of both and those of float64.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from report import Report, Target, json_option, print_table
from torch import Tensor

from engine.methods.arithmetic.matrices import Parts, leading, leading_of_product


def timed(decompose: Callable[[], Parts]) -> tuple[float, Tensor]:
    """Return the CPU seconds of a decomposition, and the matrix [m, n] of its parts in float64."""
    began = time.thread_time()
    u, s, vt = decompose()
    seconds = time.thread_time() - began
    return seconds, (u.double() * s.double()) @ vt.double()


@click.command()
@click.option("--rows", default=1024, show_default=True)
@click.option("--columns", default=2752, show_default=True)
@click.option("--rank", default=16, show_default=True, help="Rank of the adapter.")
@click.option("--rounds", default=3, show_default=True)
@json_option("a temporary folder")
def main(rows: int, columns: int, rank: int, rounds: int, path: Path | None) -> None:
    """Decompose one adapter in both ways and print seconds, their ratio and distances."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, generator=generator) for size in ((rows, rank), (rank, columns)))
    exact = left.double() @ right.double()
    ways = {
        "the product": lambda: leading(left @ right, rank),
        "the factors": lambda: leading_of_product(left, right, rank),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    distance = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for way, decompose in ways.items():
            taken, matrix = timed(decompose)
            seconds[way].append(taken)
            distance[way] = float((matrix - exact).norm() / exact.norm())
    medians = {way: statistics.median(taken) for way, taken in seconds.items()}
    ratio = medians["the product"] / medians["the factors"]
    cells = {way: [f"{medians[way]:.4f}", f"{distance[way]:.1e}"] for way in ways}
    print_table(f"an adapter of rank {rank}, {rows} × {columns}", ["seconds", "distance"], cells)
    settings = {"rows": rows, "columns": columns, "rank": rank, "rounds": rounds}
    report = Report(settings, time_ratios={"factors / product": 1 / ratio})
    report.targets.append(Target("seconds of the factors / of the product", 1 / ratio, 1 / 100))
    report.finish(path or Path(tempfile.gettempdir()) / "expert-merging-results" / "decompositions.json")


if __name__ == "__main__":
    main()
