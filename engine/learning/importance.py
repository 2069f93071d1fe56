"""Importance of every merged tensor, and how many chunks it earns: what turns Expert Merging into Expert Merging++.

Pure mathematics on small tables. Source: Expert Merging, arXiv 2509.25712, importance-guided layer chunking; the
published code leaves this step out. Letters: K experts, L merged tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from engine.errors import ConfigError
from engine.task_vectors.coefficients import Array, ChunkLayout, Coefficients


def importance(alpha_KL: Array, magnitude_KL: Array, numel_L: Array) -> Array:
    """Iₗ = Norm(Σₖ |αₖ,ₗ| · sₖ,ₗ · nₗ), Norm = divide by the sum over ℓ; [L], sums to 1.

    `magnitude_KL` is sₖ,ₗ = mean |τₖ,ₗ|. Where every expert equals the base, nothing is more important than anything
    else: all tensors get 1/L.
    """
    raw_L = (np.abs(alpha_KL) * magnitude_KL * numel_L).sum(axis=0)
    total = raw_L.sum()
    return np.asarray(raw_L / total) if total > 0 else np.full(len(raw_L), 1 / len(raw_L))


def allocate_chunks(importance_L: Array, budget: float, kappa: float) -> list[int]:
    """mₗ = ⌊B·N · Iₗ^κ / Σⱼ Iⱼ^κ⌋, [L]; `budget` B is a multiple of the number of merged tensors N."""
    # Relative to the largest, so that a large κ cannot take them all below the smallest number there is.
    powered_L = (importance_L / importance_L.max()) ** kappa
    share_L = powered_L / powered_L.sum()
    # A share that is a whole number up to rounding is that number: uniform importance at B = 1 gives 1 chunk, not 0.
    return [math.floor(budget * len(share_L) * share + 1e-9) for share in share_L]


def stage_2_layout(
    stage_1: Coefficients, magnitude_KL: Array, budget: float, kappa: float
) -> tuple[ChunkLayout, Array]:
    """The layout of stage 2 from what stage 1 learned, and the importance behind it.

    Raises:
        ConfigError: the budget is so small that nothing is left to learn.
    """
    numels: Mapping[str, int] = {name: edges[-1] for name, edges in stage_1.layout.edges_of.items()}
    numel_L = np.array(list(numels.values()), dtype=np.float64)
    scores_L = importance(stage_1.per_tensor(), magnitude_KL, numel_L)
    chunks = allocate_chunks(scores_L, budget, kappa)
    if not any(chunks):
        raise ConfigError(
            f"a budget of {budget} gives no tensor a coefficient to learn", "parameters.budget", do="raise `budget`"
        )
    return ChunkLayout.make(numels, dict(zip(numels, chunks, strict=True))), scores_L


def write_importance(path: Path, layout: ChunkLayout, importance_L: Array) -> None:
    """merge/importance.parquet: a row a merged tensor; `chunks` 0 where its coefficient is fixed."""
    chunks = [len(edges) - 1 if learned else 0 for edges, learned in zip(layout.edges, layout.learned, strict=True)]
    table = pa.table(
        {
            "tensor": pa.array(layout.tensors, pa.string()),
            "numel": pa.array([edges[-1] for edges in layout.edges], pa.int64()),
            "importance": pa.array(importance_L, pa.float64()),
            "chunks": pa.array(chunks, pa.int32()),
        }
    )
    pyarrow.parquet.write_table(table, path)
