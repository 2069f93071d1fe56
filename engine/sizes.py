"""Sizes that bound memory: what is worked on, what travels and what stands at one time. Knows nothing else."""

from __future__ import annotations

# Elements of a block at most, and experts that a kernel goes through side by side. The least time by measurement:
# smaller blocks cost more calls, larger ones leave the cache.
BLOCK = 1 << 18


GROUP = 4


# Elements of a piece at most: what one thread does at a time, and the least that travels.
PIECE = 1 << 22


# Elements that a weight-space method has of all experts at a time, and of one at least: 4 MiB, what a core's cache
# holds.
ROOM, SMALLEST_BLOCK = 1 << 20, 1 << 12


# Bytes under way between a trainer and its shards, but never less than IN_FLIGHT pieces a shard: one that a shard works
# on and one that is on its way.
WINDOW_BYTES = 128 << 20


IN_FLIGHT = 2


# Bytes of the float32 logits that stand at one time: those of all tokens would be a trainer's largest tensor.
LOGIT_BYTES = 32 << 20


# Matrices of which a shard makes the task vectors orthogonal in one call.
MATRICES_PER_CALL = 8


def bucket_bytes(shards: int, item: int) -> int:
    """Bytes that travel at once at most, with so many shards and so many bytes an element."""
    return max(WINDOW_BYTES // (IN_FLIGHT * shards), PIECE * item)
