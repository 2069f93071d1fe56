"""The process of an actor: devices, number of threads, deterministic algorithms and memory figures."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

import torch

from actors.gpus import NO_GPUS, Gpus
from actors.memory import PeakMemory
from engine.machine import usable_cpus


@dataclass(frozen=True)
class Report:
    """Figures of an actor for merge/memory.json; `counts` are those of its role, such as forward passes."""

    role: str
    pid: int
    peak_anonymous_bytes: int
    counts: dict[str, int]


class ActorProcess:
    """Settings and figures of this process. `role` names the actor in merge/memory.json.

    `threads` is the number of CPU threads of an operation; None: the CPUs that the process may use. `gpus` are those of
    the actor's seat.
    """

    def __init__(self, role: str, threads: int | None = None, gpus: Gpus = NO_GPUS) -> None:
        self.role, self._gpus = role, gpus
        self.memory = PeakMemory()
        # Ray sets the number of threads to that of the reserved CPUs, which depends on the placement. Sums inside an
        # operation depend on the number of threads, and results must not depend on the placement.
        torch.set_num_threads(threads or usable_cpus())
        # Torch gives a thread its number when the thread first needs it, and takes the last that any thread has set.
        # Without this call, that would be the 1 of a pool that has worked before.
        torch.get_num_threads()
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS is not deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - the stubs lack it

    @cached_property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices of the seat. The first is that of the inputs, and the default of CUDA in the calling thread.

        Raises:
            ClusterError: See `Gpus.devices`.
        """
        # Looked up in a call and not in __init__: an error raised in a call reaches the driver unchanged.
        devices = self._gpus.devices()
        if devices[0].type == "cuda":
            torch.cuda.set_device(devices[0])
        return devices

    @property
    def device(self) -> torch.device:
        """The first of `devices`."""
        return self.devices[0]

    def report(self, **counts: int) -> Report:
        """Return the figures of this process so far."""
        return Report(self.role, self.memory.pid, self.memory.peak, counts)
