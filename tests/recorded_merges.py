"""Write output folders as merges do, with the engine's own writers, without running a merge."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from engine.calibration.samples import Sample
from engine.learning.end_check import BASE, MERGED, end_check
from engine.learning.importance import stage_2_layout
from engine.output.merge_record import write_record
from engine.planning.factors import directions
from engine.planning.plan import Plan
from engine.statistics.fits import NO_FITS, Fits
from engine.task_vectors.coefficients import ChunkLayout, Coefficients

# (stage, step, expert, sample) → kl: two steps a stage, in which the second expert has one sample, seen twice.
SEEN = ((1, 0, 0, 0), (1, 0, 1, 0), (1, 1, 0, 1), (1, 1, 1, 0), (2, 0, 0, 0), (2, 0, 1, 0), (2, 1, 0, 1), (2, 1, 1, 0))
MEMORY: dict[str, Any] = {
    "actors": [
        {"role": "driver", "pid": 10, "peak_anonymous_bytes": 300_000_000},
        {"role": "trainer", "pid": 11, "peak_anonymous_bytes": 1_500_000_000},
        {"role": "expert 0", "pid": 12, "peak_anonymous_bytes": 700_000_000},
        {"role": "shard 0", "pid": 13, "peak_anonymous_bytes": 200_000_000},
    ],
    "bytes_trainer_to_shards": 4_000_000,
    "bytes_shards_to_trainer": 5_000_000,
    "bytes_merged": 1_000_000,
    "bytes_targets": 30_000,
    "expert_forwards": 3,
    "seconds": {"stage 1": 1.0, "stage 2": 2.0},
    # The second start goes on with stage 1, a minute after the first was stopped.
    "starts": [
        {
            "began": "2026-01-31T12:00:00+00:00",
            "seconds": 5.0,
            "phases": [
                {"name": "targets", "begin": 0.5, "end": 2.0},
                {"name": "stage 1", "begin": 1.0, "end": 5.0},
            ],
        },
        {
            "began": "2026-01-31T12:01:05+00:00",
            "seconds": 4.0,
            "phases": [
                {"name": "stage 1", "begin": 0.5, "end": 1.5},
                {"name": "stage 2", "begin": 1.5, "end": 3.5},
            ],
        },
    ],
}


SURVIVED = {"rounding": "nearest", "survived": 0.6712, "tensors": {"model.layers.0.mlp.up_proj.weight": 0.6}}


def learned(plan: Plan, budget: float = 3.0, seed: int = 0) -> tuple[list[Coefficients], Any]:
    """Return coefficients of both stages, near the priors, and the importance that stage 2 is based on."""
    generator = np.random.default_rng(seed)
    experts, priors = len(plan.experts), np.array(plan.priors)
    first = ChunkLayout.make(plan.numels, dict.fromkeys(plan.numels, 1))
    noise = generator.normal(0, 0.03, (experts, first.width))
    stage_1 = Coefficients(first, priors[:, None] + noise)
    magnitudes = generator.uniform(0.1, 1, (experts, len(first.tensors)))
    along, each = directions(plan), plan.config.parameters.chunks == "direction"
    second, importance = stage_2_layout(stage_1, magnitudes, budget, 1.0, along, each)
    values = np.repeat(priors[:, None], second.width, axis=1)
    values[:, second.learned_columns] += generator.normal(0, 0.05, (experts, int(second.learned_columns.sum())))
    return [stage_1, Coefficients(second, values)], importance


def rows(plan: Plan, scale: float = 1.0) -> list[dict[str, Any]]:
    """Return rows of metrics.parquet: kl is `scale` times 1, 2, 3, … in the order of SEEN, hidden a tenth of it."""
    same = {"entropy": None, "regularization": 0.1, "grad_norm": 1.0, "learning_rate": 0.5, "seconds": 0.1}
    return [
        {"stage": stage, "step": step, "model": plan.experts[k].name, "sample": i, **same}
        | {"kl": scale * n, "hidden": scale * n / 10}
        for n, (stage, step, k, i) in enumerate(SEEN, 1)
    ]


def checked(plan: Plan, merged: float) -> pa.Table:
    """Return an end check: KL 2 of the base from each expert, 0.5 of the merge from the first, `merged` from others."""
    samples = [Sample(k, 0, (1, 2), f"file{k}:0") for k in range(len(plan.experts))]
    losses = {BASE: [[2.0, 0.2]] * len(samples), MERGED: [[0.5, 0.1]] + [[merged, 0.1]] * (len(samples) - 1)}
    tables = {point: np.array(values) for point, values in losses.items()}
    return end_check(tables, samples, [expert.name for expert in plan.experts])


def write_merge(
    plan: Plan,
    out: Path,
    scale: float = 1.0,
    seed: int = 0,
    fits: Fits = NO_FITS,
    end: pa.Table | None = None,
) -> Path:
    """Write the `merge/` folder of an output, as after a merge in two stages."""
    (out / "merge").mkdir(parents=True)
    stages, importance = learned(plan, seed=seed)
    digests = defaultdict(lambda: "0" * 64)
    write_record(out, plan, b"identity", digests, stages, importance, rows(plan, scale), fits=fits, checked=end)
    (out / "merge" / "memory.json").write_text(json.dumps(MEMORY))
    (out / "merge" / "rounding.json").write_text(json.dumps(SURVIVED))
    return out
