"""Importance of the merged tensors, and the numbers of chunks that follow from it: stage 2 of Expert Merging++.

Source: Expert Merging, arXiv 2509.25712, importance-guided layer chunking; the published code lacks this step.
Letters: K experts, L merged tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from engine.errors import ConfigError
from engine.task_vectors.coefficients import Array, ChunkLayout, Coefficients


def importance(alpha_KL: Array, magnitude_KL: Array, numel_L: Array) -> Array:
    """Return Iₗ = Norm(Σₖ |αₖ,ₗ| · sₖ,ₗ · nₗ), Norm = divide by the sum over ℓ; [L], sums to 1.

    `magnitude_KL` is sₖ,ₗ = mean |τₖ,ₗ|. If every expert equals the base, all tensors get 1/L.
    """
    raw_L = (np.abs(alpha_KL) * magnitude_KL * numel_L).sum(axis=0)
    total = raw_L.sum()
    return np.asarray(raw_L / total) if total > 0 else np.full(len(raw_L), 1 / len(raw_L))


def allocate_chunks(importance_L: Array, budget: float, kappa: float) -> list[int]:
    """Return mₗ = ⌊B·N · Iₗ^κ / Σⱼ Iⱼ^κ⌋, [L]; `budget` B is a multiple of the number of merged tensors N."""
    # Relative to the largest importance: otherwise a large κ underflows all of them to 0.
    powered_L = (importance_L / importance_L.max()) ** kappa
    share_L = powered_L / powered_L.sum()
    # 1e-9 keeps a whole number that rounding made smaller: uniform importance at B = 1 gives 1 chunk, not 0.
    return [math.floor(budget * len(share_L) * share + 1e-9) for share in share_L]


def stage_2_layout(
    stage_1: Coefficients,
    magnitude_KL: Array,
    budget: float,
    kappa: float,
    directions: Mapping[str, int] = MappingProxyType({}),
    each: bool = False,
) -> tuple[ChunkLayout, Array]:
    """Return the chunk layout of stage 2, given the coefficients of stage 1, and the importance [L] of the tensors.

    Args:
        stage_1: The coefficients of stage 1.
        magnitude_KL: mean |τₖ,ₗ|.
        budget: B, a multiple of the number of tensors.
        kappa: κ, the exponent of the importance.
        directions: The tensors whose chunks are groups of singular directions, with the number of these.
        each: Each direction of a tensor that gets a chunk is a chunk.

    Raises:
        ConfigError: The budget is so small that no tensor gets a chunk.
    """
    numels: Mapping[str, int] = {name: edges[-1] for name, edges in stage_1.layout.edges_of.items()}
    numel_L = np.array(list(numels.values()), dtype=np.float64)
    scores_L = importance(stage_1.per_tensor(), magnitude_KL, numel_L)
    chunks = allocate_chunks(scores_L, budget, kappa)
    if not any(chunks):
        raise ConfigError(
            f"with a budget of {budget}, no tensor gets a chunk to learn",
            "parameters.budget",
            "1 or more, which is always sufficient",
            "raise `budget`, and run with --fresh",
        )
    wanted = dict(zip(numels, chunks, strict=True))
    if each:
        wanted |= {name: count for name, count in directions.items() if wanted[name]}
    return ChunkLayout.make(numels, wanted, directions), scores_L


def write_importance(path: Path, layout: ChunkLayout, importance_L: Array, numels: Mapping[str, int]) -> None:
    """Write merge/importance.parquet: one row per merged tensor; `chunks` is 0 if its coefficient is fixed."""
    chunks = [len(edges) - 1 if learned else 0 for edges, learned in zip(layout.edges, layout.learned, strict=True)]
    table = pa.table(
        {
            "tensor": pa.array(layout.tensors, pa.string()),
            "numel": pa.array([numels[name] for name in layout.tensors], pa.int64()),
            "importance": pa.array(importance_L, pa.float64()),
            "chunks": pa.array(chunks, pa.int32()),
        }
    )
    pyarrow.parquet.write_table(table, path)
