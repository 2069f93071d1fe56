"""Sizes that bound memory and traffic: blocks, pieces, buckets and the number in flight."""

from __future__ import annotations

from collections.abc import Sequence

# Maximum elements of a block, and experts that a kernel processes side by side. Fastest as measured: smaller blocks
# need more calls, larger ones leave the cache.
BLOCK = 1 << 18
GROUP = 4

# Maximum elements of a piece: the unit of work of a thread, and the smallest unit of transport.
PIECE = 1 << 22

# Elements that a weight-space method holds of all experts at a time, and the minimum of one expert. ROOM float32
# elements are 4 MiB, which fits a core's cache.
ROOM, SMALLEST_BLOCK = 1 << 20, 1 << 12

# Bytes in flight between a trainer and its shards, but never less than IN_FLIGHT pieces per shard: one that the shard
# works on and one in transit.
WINDOW_BYTES = 128 << 20
IN_FLIGHT = 2

# Bytes of float32 logits in memory at a time, and at most on a GPU. The logits of all tokens would be the trainer's
# largest tensor; on a GPU, the calls for many small parts take longer than their products.
LOGIT_BYTES, GPU_LOGIT_BYTES = 32 << 20, 1 << 30

# Bytes of targets that stay on the trainer's GPU between epochs.
TARGET_BYTES = 1 << 30

# Gradients of samples times weights that are in memory at a time, of which medians over the samples are taken.
SENSITIVITIES = 1 << 30

# Smaller side of matrices that are decomposed by matrix products: for leading parts, and for nearest isometries. LAPACK
# is as quick for smaller ones (measured on two kinds of matrices, one thread).
LEADING_SIDE, ISOMETRY_SIDE = 512, 1024

# Matrices whose parts are in one file and are made orthogonal in one call; elements of such a group of tensors if there
# are fewer matrices; groups of one expert that are surveyed in one call.
MATRICES_PER_CALL = 8
ELEMENTS_PER_GROUP = 1 << 29
GROUPS_PER_CALL = 4

# Bytes that the decompositions of a process hold at a time, if one matrix does not take more.
DECOMPOSING_BYTES = 8 << 30

# Of the free memory of each of several GPUs, what a model fills: blocks are whole, and an allocator leaves gaps.
FILLED = 0.95


def are_few(rank: int, shape: Sequence[int], side: int = LEADING_SIDE) -> bool:
    """Return whether matrix products find so many leading parts of a matrix in less time than LAPACK finds all.

    Measured: at most 0.3 of the smaller side, and of the larger one 0.2 (0.15 below a side of 1024).
    """
    smaller, larger = min(shape), max(shape)
    return smaller >= side and rank <= min(0.3 * smaller, (0.2 if smaller >= ISOMETRY_SIDE else 0.15) * larger)


def gpu_logit_bytes(room: float) -> int:
    """Return the bytes of logits at a time on a GPU, where `room` bytes are free for them."""
    limit = GPU_LOGIT_BYTES
    while limit > max(room, LOGIT_BYTES):
        limit //= 2
    return limit


def bucket_bytes(shards: int, item: int) -> int:
    """Return the maximum bytes of one bucket for `shards` shards and `item` bytes per element."""
    return max(WINDOW_BYTES // (IN_FLIGHT * shards), PIECE * item)
