"""The trainer's view of shard actors over Ray: buckets of bounded size, with a bounded number in flight.

A step moves one gradient out and one set of merged tensors in, whatever the number of experts and shards. The object
store holds a few buckets at a time, not a model. A separate thread communicates while the model computes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

import ray
from torch import Tensor

from engine.checkpoints.headers import BYTES, SAFETENSORS
from engine.codec import Packed, pack_all, unpack_all
from engine.planning.plan import Plan, in_order_of_use, slices
from engine.shards.protocol import Arrivals, Gradients, InFlightLimit, PieceSink, coefficient_gradient
from engine.sizes import IN_FLIGHT, WINDOW_BYTES, bucket_bytes
from engine.task_vectors.coefficients import Array, ChunkLayout, Coefficients
from engine.task_vectors.pieces import Piece, pieces
from engine.transfers import Fetch, on_gpu, to_cpu

Bucket = tuple[Piece, ...]


class RemoteShards:
    """`engine.shards.protocol.Shards` over shard actors, each with its slice of the merged tensors.

    `names` are the tensors that are merged there; None: all merged tensors.
    """

    def __init__(self, plan: Plan, handles: Sequence[Any], names: Collection[str] | None = None) -> None:
        self.handles = list(handles)
        self.experts = len(plan.experts)
        owned = slices(plan, len(self.handles), names)
        self.owner = {name: shard for shard, some in enumerate(owned) for name in some}
        self.pieces = {name: list(pieces(name, plan.base_header.tensors[name].shape)) for name in self.owner}
        item = BYTES[SAFETENSORS[plan.dtype]]
        self.bucket_bytes = bucket_bytes(len(self.handles), item)
        # Alternating between the shards, so that all of them are busy.
        turns = zip_longest(*(self._buckets(names, item) for names in owned))
        self._merged = [(shard, bucket) for turn in turns for shard, bucket in enumerate(turn) if bucket]
        self.thread = ThreadPoolExecutor(1, "exchange")
        self.sent = self.received = 0

    def merge(self, coefficients: Coefficients, model: PieceSink) -> Arrivals:
        """See `Shards.merge`."""
        requests: list[Any] = []

        def receive(number: int) -> None:
            while len(requests) < min(len(self._merged), number + IN_FLIGHT * len(self.handles)):
                shard, bucket = self._merged[len(requests)]
                wanted = {piece.name: coefficients.of(piece.name) for piece in bucket}
                requests.append(self.handles[shard].merge.remote(bucket, wanted))
            packed: Mapping[Piece, Packed] = ray.get(requests[number])
            requests[number] = None  # lets Ray free the bucket
            self.received += sum(one.nbytes for one in packed.values())
            for piece, tensor in unpack_all(packed).items():
                buffer = model.buffer(piece)
                try:
                    buffer.copy_(tensor)
                finally:
                    model.put(piece, buffer)

        arrivals = defaultdict(list)
        for number, (_, bucket) in enumerate(self._merged):
            arrived = self.thread.submit(receive, number)
            for name in dict.fromkeys(piece.name for piece in bucket):
                arrivals[name].append(arrived)
        return arrivals

    def gradients(self, layout: ChunkLayout) -> Gradients:
        """See `Shards.gradients`."""
        return _RemoteGradients(self, layout)

    def traffic(self) -> dict[str, int]:
        """See `Shards.traffic`."""
        return {"bytes_to_shards": self.sent, "bytes_from_shards": self.received}

    def _buckets(self, names: Sequence[str], item: int) -> Iterator[Bucket]:
        bucket: list[Piece] = []
        filled = 0
        for piece in (piece for name in in_order_of_use(names) for piece in self.pieces[name]):
            if bucket and filled + piece.numel * item > self.bucket_bytes:
                yield tuple(bucket)
                bucket, filled = [], 0
            bucket.append(piece)
            filled += piece.numel * item
        if bucket:
            yield tuple(bucket)


class _RemoteGradients:
    """`engine.shards.protocol.Gradients` of one step: buckets of weight gradients out, coefficient gradients in."""

    def __init__(self, shards: RemoteShards, layout: ChunkLayout) -> None:
        self._shards, self._layout = shards, layout
        self._window = InFlightLimit(WINDOW_BYTES)
        self._posted: list[Future[None]] = []
        self._open: dict[int, dict[Piece, Tensor]] = defaultdict(dict)
        self._requests: dict[int, list[Any]] = defaultdict(list)

    def send(self, name: str, gradient: Tensor) -> None:
        nbytes = gradient.nbytes
        self._window.enter(nbytes)
        posted = self._shards.thread.submit(self._post, name, to_cpu(gradient), nbytes, on_gpu(gradient))
        posted.add_done_callback(lambda _: self._window.leave(nbytes))
        self._posted.append(posted)

    def collect(self) -> Array:
        for posted in self._posted:
            posted.result()
        for shard in range(len(self._shards.handles)):
            self._ship(shard)
        # A tensor belongs to one shard, and its pieces are shipped in order, so the order of the sums is fixed.
        requests = (request for of_shard in self._requests.values() for request in of_shard)
        parts = ((piece.name, part) for request in requests for piece, part in ray.get(request).items())
        return coefficient_gradient(self._layout, self._shards.experts, parts)

    def _post(self, name: str, fetch: Fetch, nbytes: int, lent: bool) -> None:
        shard, limit = self._shards.owner[name], self._shards.bucket_bytes
        for piece in self._shards.pieces[name]:
            with fetch(piece.start, piece.stop) as part_N:
                if (
                    piece in self._open[shard]
                    or sum(one.nbytes for one in self._open[shard].values()) + part_N.nbytes > limit
                ):
                    self._ship(shard)
                # A buffer that was lent for a copy from a GPU is needed again before the bucket is full.
                self._open[shard][piece] = part_N.clone() if lent else part_N
        if nbytes > limit:
            # The rest is a view, which would keep the whole gradient in memory until the next tensor arrives.
            self._ship(shard)

    def _ship(self, shard: int) -> None:
        bucket = pack_all(self._open.pop(shard, {}))
        if not bucket:
            return
        if len(self._requests[shard]) >= IN_FLIGHT:
            ray.wait([self._requests[shard][-IN_FLIGHT]])
        edges = {piece.name: self._layout.edges_of[piece.name] for piece in bucket}
        self._requests[shard].append(self._shards.handles[shard].gradients.remote(bucket, edges))
        self._shards.sent += sum(one.nbytes for one in bucket.values())
