"""What the trainer's process says to the shards over Ray: buckets of bounded size, a bounded number in flight.

A step moves one gradient out and one set of merged tensors in, whatever the number of experts and shards; what waits in
the object store is a few buckets, not a model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import ray
from torch import Tensor

from engine.codec import pack, unpack_all
from engine.coefficients import Array, Coefficients, Layout
from engine.headers import BYTES
from engine.plan import SAFETENSORS, Plan, slices

BUCKET_BYTES = 64 << 20
# Per shard: one that it works on and one that is on its way.
IN_FLIGHT = 2

Bucket = tuple[str, ...]


class RemoteShards:
    """`engine.task_vectors.Shards` over shard actors, each with its slice of the merged tensors."""

    def __init__(self, plan: Plan, handles: Sequence[Any]) -> None:
        self._handles = list(handles)
        self._buckets = list(interleaved_buckets(plan, len(self._handles)))
        self._sent = self._received = 0

    def merge(self, coefficients: Coefficients, put: Callable[[str, Tensor], None]) -> None:
        """See `Shards.merge`."""

        def ask(shard: int, bucket: Bucket) -> Any:
            return self._handles[shard].merge.remote({name: coefficients.of(name) for name in bucket})

        for packed in self._answers(ask):
            self._received += sum(one.nbytes for one in packed.values())
            for name, tensor in unpack_all(packed).items():
                put(name, tensor)

    def gradients(self, layout: Layout, take: Callable[[str], Tensor]) -> Array:
        """See `Shards.gradients`."""

        def ask(shard: int, bucket: Bucket) -> Any:
            packed = {name: pack(take(name)) for name in bucket}
            self._sent += sum(one.nbytes for one in packed.values())
            return self._handles[shard].gradients.remote({name: layout.edges_of[name] for name in bucket}, packed)

        parts = {name: part for answer in self._answers(ask) for name, part in answer.items()}
        return np.concatenate([parts[name] for name in layout.tensors], axis=1)

    def traffic(self) -> dict[str, int]:
        """See `Shards.traffic`."""
        return {"bytes_to_shards": self._sent, "bytes_from_shards": self._received}

    def _answers(self, ask: Callable[[int, Bucket], Any]) -> Iterator[Any]:
        """The answers about all buckets in their order, with a bounded number of questions open at each shard."""
        waiting: deque[tuple[int, Any]] = deque()
        opened = [0] * len(self._handles)

        def oldest() -> Any:
            shard, reference = waiting.popleft()
            opened[shard] -= 1
            return ray.get(reference)

        for shard, bucket in self._buckets:
            while opened[shard] >= IN_FLIGHT:
                yield oldest()
            waiting.append((shard, ask(shard, bucket)))
            opened[shard] += 1
        while waiting:
            yield oldest()


def interleaved_buckets(plan: Plan, shards: int) -> Iterator[tuple[int, Bucket]]:
    """Each shard's slice in buckets of at most BUCKET_BYTES (or one tensor), the shards in turn."""
    size = BYTES[SAFETENSORS[plan.dtype]]
    for turn in zip_longest(*(_buckets(plan, names, size) for names in slices(plan, shards))):
        yield from ((shard, bucket) for shard, bucket in enumerate(turn) if bucket)


def _buckets(plan: Plan, names: Sequence[str], size: int) -> Iterator[Bucket]:
    bucket: list[str] = []
    filled = 0
    for name in names:
        nbytes = plan.numels[name] * size
        if bucket and filled + nbytes > BUCKET_BYTES:
            yield tuple(bucket)
            bucket, filled = [], 0
        bucket.append(name)
        filled += nbytes
    if bucket:
        yield tuple(bucket)
