"""Compare ways to make the task vectors of one matrix of K experts orthogonal: by matrix products, and by LAPACK.

Both sides decompose the same matrices in turns in one process, each on one thread, as on a shard: K leading parts and
the two nearest isometries. Seconds are CPU seconds of the thread. LAPACK decomposes `--sampled` of the K experts, and
their seconds count K / sampled times. The experts have slowly falling singular values (σᵢ ~ i^-0.7) and a part in
common, and are rounded to bfloat16. With `--exact` the distance of τ⊥ to float64 is measured, which takes long.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import click
import torch
from report import Report, Target, json_option, print_table
from torch import Tensor

from engine.methods.arithmetic import matrices
from engine.methods.arithmetic.matrices import Parts, leading, orthogonal_parts

T = TypeVar("T")


def experts(rows: int, columns: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    smaller = min(rows, columns)
    base = (normal(rows, columns) * 0.02).bfloat16().float()
    common = normal(rows, smaller // 16) @ normal(smaller // 16, columns)
    taus = []
    for _ in range(count):
        left, right = (torch.linalg.qr(normal(side, smaller))[0] for side in (rows, columns))
        tau = (left * torch.arange(1, smaller + 1) ** -0.7) @ right.T
        tau = tau / tau.norm() + common / common.norm() / 2
        taus.append((base + tau * (0.01 * base.norm() / tau.norm())).bfloat16().float() - base)
    return taus


def timed(work: Callable[..., T], *inputs: object) -> tuple[float, T]:
    began = time.thread_time()
    found = work(*inputs)
    return time.thread_time() - began, found


def by_lapack(work: Callable[..., T], *inputs: object) -> T:
    """Return what `work` returns where no matrix is large enough for matrix products."""
    sides = matrices.LEADING_SIDE, matrices.ISOMETRY_SIDE
    matrices.LEADING_SIDE = matrices.ISOMETRY_SIDE = 2**62
    try:
        return work(*inputs)
    finally:
        matrices.LEADING_SIDE, matrices.ISOMETRY_SIDE = sides


def all_of(taus: Sequence[Tensor], rank: int) -> Parts:
    return orthogonal_parts([leading(tau, rank) for tau in taus])


def distance(found: Parts, exact: Parts, count: int) -> float:
    """Return the largest relative distance ‖τ⊥ₖ - exact τ⊥ₖ‖ / ‖exact τ⊥ₖ‖ of the experts."""
    rank, farthest = len(exact[1]) // count, 0.0
    for k in range(count):
        mine = slice(k * rank, (k + 1) * rank)
        one, other = ((u[:, mine].double() * s[mine].double()) @ v[mine].double() for u, s, v in (found, exact))
        farthest = max(farthest, float((one - other).norm() / other.norm()))
    return farthest


@click.command()
@click.option("--rows", default=1024, show_default=True)
@click.option("--columns", default=1024, show_default=True)
@click.option("--experts", "count", default=8, show_default=True)
@click.option("--rounds", default=1, show_default=True)
@click.option("--sampled", default=1, show_default=True, help="Experts that LAPACK decomposes in each round.")
@click.option("--exact", is_flag=True, help="Decompose all in float64, too, and in float32 by LAPACK.")
@json_option("a temporary folder")
def main(rows: int, columns: int, count: int, rounds: int, sampled: int, exact: bool, path: Path | None) -> None:
    """Decompose one matrix of K experts in both ways and print seconds, their ratio and distances."""
    torch.set_num_threads(1)
    taus, rank, fallbacks = experts(rows, columns, count), min(rows, columns) // count, [0]

    def fell_back() -> None:
        fallbacks[0] += 1

    steps = ("leading parts", "nearest isometries", "all")
    seconds: dict[str, dict[str, list[float]]] = {way: {step: [] for step in steps} for way in ("products", "LAPACK")}
    for _ in range(rounds):
        spent, parts = zip(*(timed(leading, tau, rank, fell_back) for tau in taus), strict=True)
        lapack = [timed(by_lapack, leading, tau, rank)[0] for tau in taus[:sampled]]
        both, found = timed(orthogonal_parts, parts, fell_back)
        both_lapack = timed(by_lapack, orthogonal_parts, parts)[0]
        for way, first, second in (
            ("products", sum(spent), both),
            ("LAPACK", sum(lapack) * count / sampled, both_lapack),
        ):
            for step, taken in zip(steps, (first, second, first + second), strict=True):
                seconds[way][step].append(taken)
    medians = {way: {step: statistics.median(taken) for step, taken in of.items()} for way, of in seconds.items()}
    cells = {way: [f"{medians[way][step]:.2f}" for step in steps] for way in medians}
    cells["LAPACK / products"] = [f"{medians['LAPACK'][step] / medians['products'][step]:.1f}" for step in steps]
    print_table(f"{count} experts of {rows} × {columns}, r = {rank}: CPU seconds", list(steps), cells)
    print(f"matrices that fell back to LAPACK: {fallbacks[0]}")
    settings = {"rows": rows, "columns": columns, "experts": count, "rounds": rounds, "sampled": sampled}
    ratio = medians["products"]["all"] / medians["LAPACK"]["all"]
    report = Report(settings, time_ratios={"products / LAPACK": ratio}, other={"fallbacks": float(fallbacks[0])})
    report.targets.append(Target("seconds of matrix products / of LAPACK", ratio, 1 / 8))
    if exact:
        wide = by_lapack(all_of, [tau.double() for tau in taus], rank)
        today = by_lapack(all_of, taus, rank)
        print(f"distance of τ⊥ to float64 by LAPACK in float32: {distance(today, wide, count):.1e}")
        report.targets.append(Target("distance of τ⊥ to float64", distance(found, wide, count), 1e-4))
    report.finish(path or Path(tempfile.gettempdir()) / "expert-merging-results" / "matrices.json")


if __name__ == "__main__":
    main()
