"""Compare SWUDI, the closed form of WUDI's objective, with the gradient descent of WUDI v2: CPU seconds and objective.

Every method merges the same matrices of K experts in turns in one process, on one thread, as on a shard; seconds are
CPU seconds of the thread. Experts fine-tuned in full have slowly falling singular values and a part in common, and are
rounded to bfloat16, as in `matrices.py`; adapters have factors of rank `--rank`, whose rows have a part in common. The
objective is that of WUDI, Σₖ ‖(τ − τₖ)·τₖᵀ‖²_F / ‖τₖ‖²_F, in float64, as a share of that of the sum of all τₖ,
from which all start. It should be no larger than WUDI v2's; a share of 1e-4 counts as none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch
from matrices import experts as full_experts
from matrices import timed
from report import Report, Target, json_option, print_table
from torch import Tensor

from engine.methods.arithmetic.tensor import MergeTensor
from engine.methods.registry import get_method, preparation
from engine.task_vectors.kinds import Product, Stored, TaskVector
from engine.task_vectors.pieces import pieces
from engine.task_vectors.sums import whole

SHAPES = ((576, 576), (1536, 576), (576, 1536))
THEIRS = "wudi2"
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    THEIRS: (THEIRS, {}),
    "swudi": ("swudi", {}),
    "swudi, rank 1": ("swudi", {"rank": 1.0}),
    "swudi, rank 1, time 1e4": ("swudi", {"rank": 1.0, "time": 1e4}),
    "swudi_a": ("swudi_a", {}),
    "swudi_a, gavish_donoho": ("swudi_a", {"cut": "gavish_donoho"}),
}
# With their defaults, the ways that have targets: to be this many times faster, at no larger objective.
OURS = ("swudi", "swudi_a")
FASTER, NONE = 20.0, 1e-4


def adapters(rows: int, columns: int, count: int, rank: int) -> list[TaskVector]:
    """Return adapters whose product has a hundredth of the norm of a matrix with elements of 0.02."""
    generator = torch.Generator().manual_seed(0)
    common, found = torch.randn(rank, columns, generator=generator), list[TaskVector]()
    for _ in range(count):
        left, right = (torch.randn(*size, generator=generator) for size in ((rows, rank), (rank, columns)))
        right += 0.5 * common
        scale = 0.01 * 0.02 * (rows * columns) ** 0.5 / float((left @ right).norm())
        found.append(Product(left * scale, right))
    return found


def merge(method: str, options: dict[str, Any], shape: tuple[int, int], taus: Sequence[TaskVector]) -> Tensor:
    """Return the merged task vector."""
    values = {name: option.default for name, option in get_method(method).by_name.items()} | options
    names = tuple(map(str, range(len(taus))))
    with ThreadPoolExecutor(1) as pool:
        tensor = MergeTensor(
            "weight", shape, torch.zeros(shape), names, taus, values, [{}] * len(taus), None, 0, pool, 1, len(taus)
        )
        fill, merged = preparation(method)(tensor), torch.empty(shape)
        for piece in pieces("weight", shape):
            fill(piece, merged.view(-1)[piece.start : piece.stop])
    return merged


def objective(tau: Tensor, taus: Sequence[Tensor]) -> float:
    """Return the objective of WUDI."""
    return sum(float(((tau.double() - own) @ own.T).norm() ** 2 / own.norm() ** 2) for own in map(Tensor.double, taus))


@click.command(help=__doc__)
@click.option("--experts", "count", default=5, show_default=True, type=click.IntRange(2))
@click.option("--rank", default=16, show_default=True, type=click.IntRange(1))
@click.option("--side", default=576, show_default=True, help="Smaller side of the matrices.")
@json_option("a temporary folder")
def main(count: int, rank: int, side: int, path: Path | None) -> None:
    torch.set_num_threads(1)
    report = Report({"experts": count, "rank": rank, "side": side, "ways": list(WAYS)})
    for kind in ("full", f"rank {rank}"):
        for rows, columns in [(side * a // 576, side * b // 576) for a, b in SHAPES]:
            shape, name = (rows, columns), f"{kind}, {rows} × {columns}"
            if kind == "full":
                taus: list[TaskVector] = [Stored(tau.reshape(-1)) for tau in full_experts(rows, columns, count)]
            else:
                taus = adapters(rows, columns, count, rank)
            dense = [whole(tau, torch.zeros(shape)) for tau in taus]
            start = objective(torch.stack(dense).sum(0), dense)
            seconds, reached, rows_of = {}, {}, {}
            for way, (method, options) in WAYS.items():
                seconds[way], tau = timed(merge, method, options, shape, taus)
                reached[way] = objective(tau, dense) / start
                faster = seconds[THEIRS] / seconds[way]
                rows_of[way] = [f"{seconds[way]:.2f}", f"{faster:.1f}", f"{reached[way]:.2g}"]
                report.other |= {f"{way}, {name}, objective": reached[way]}
                if way != THEIRS:
                    report.time_ratios[f"{way} / {THEIRS}, {name}"] = 1 / faster
                if way in OURS:
                    report.targets += [
                        Target(f"{way} / {THEIRS}, {name}, seconds", 1 / faster, 1 / FASTER),
                        Target(f"{way}, {name}, objective", reached[way], max(reached[THEIRS], NONE)),
                    ]
            print_table(f"{count} experts, {name}", ["CPU seconds", f"{THEIRS} / it", "objective / of Σ τ"], rows_of)
    report.finish(path or Path(tempfile.gettempdir()) / "expert-merging-results" / "closed_forms.json")


if __name__ == "__main__":
    main()
