"""The GPUs of an actor's seat, as devices of torch."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.errors import ClusterError


@dataclass(frozen=True)
class Gpus:
    """The GPUs of an actor's seat: how many it requested, and the ids of those that Ray has assigned.

    A fraction is a part of one GPU, which other actors use, too.
    """

    number: float = 0
    ids: tuple[int | str, ...] = ()

    def devices(self) -> tuple[torch.device, ...]:
        """Return the seat's devices: its GPUs, or the CPU if it has none, whatever GPUs the process sees.

        Raises:
            ClusterError: torch sees fewer GPUs than the seat has.
        """
        if not self.number:
            return (torch.device("cpu"),)
        wanted, seen = math.ceil(self.number), torch.cuda.device_count() if torch.cuda.is_available() else 0
        if seen < wanted:
            raise _not_seen(wanted, seen)
        # Ray shows an actor its own GPUs alone, unless RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES is set.
        places = range(wanted) if seen == wanted or not self.ids else _places(self.ids)
        return tuple(torch.device("cuda", place) for place in places)


NO_GPUS = Gpus()


def _places(ids: Sequence[int | str]) -> list[int]:
    """Return the positions of GPUs, by Ray's ids, among those that the process sees.

    The ids are entries of CUDA_VISIBLE_DEVICES where that was set for the node, else numbers of the node's GPUs.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    listed = [entry.strip() for entry in visible.split(",")] if visible else []
    return sorted(listed.index(str(one)) if str(one) in listed else int(one) for one in ids)


def _not_seen(wanted: int, seen: int) -> ClusterError:
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    if seen:
        do = "set num_gpus of `cluster.trainer` and `cluster.expert` to 1 if these are MIG slices, of which a process "
        do += "sees one; otherwise give each node that number with --num-gpus of `ray start`"
    else:
        do = "install a torch for CUDA that the driver of the node supports, or set num_gpus of `cluster.trainer` and "
        do += "`cluster.expert` to 0"
    return ClusterError(
        f"an actor has {wanted} GPUs of Ray, but torch {torch.__version__}, {build}, sees {seen}",
        f"node {os.uname().nodename}",
        f"{wanted} GPUs",
        f"{do}; with --fresh if the run has begun",
    )
