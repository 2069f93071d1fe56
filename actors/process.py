"""What every actor does when its process starts: its device, its threads, its memory figure. Knows no Ray."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from actors.memory import PeakMemory
from engine.machine import usable_cpus


@dataclass(frozen=True)
class Report:
    """What an actor says of itself for merge/memory.json; the trainer's and the experts' own counts in `counts`."""

    role: str
    pid: int
    peak_anonymous_bytes: int
    counts: dict[str, int]


class ActorProcess:
    """This process as an actor sees it. `role` is the name under which it appears in merge/memory.json."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.memory = PeakMemory()
        # Ray hides the GPUs that an actor did not ask for, so what is visible is ours.
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Ray gives a worker as many threads as it reserved CPUs, which a placement may change; sums inside an operation
        # depend on the number of threads, and results must not depend on the placement.
        torch.set_num_threads(usable_cpus())
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may not repeat itself
        torch.use_deterministic_algorithms(True, warn_only=True)
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - the stubs lack it

    def report(self, **counts: int) -> Report:
        """The figures of this process so far."""
        return Report(self.role, self.memory.pid, self.memory.peak, counts)
