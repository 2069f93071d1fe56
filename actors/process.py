"""The process of an actor: devices, number of threads, deterministic algorithms and memory figures."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from actors.gpus import NO_GPUS, Gpus
from actors.memory import PeakMemory, peak_pinned_bytes
from engine.machine import usable_cpus

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Report:
    """Figures of an actor for merge/memory.json.

    `counts` are those of its role, such as forward passes; `not_deterministic` is an operation for which the process
    gave up that repeated runs have the same bits, or empty.
    """

    role: str
    pid: int
    peak_anonymous_bytes: int
    counts: dict[str, int]
    not_deterministic: str = ""
    peak_pinned_bytes: int = 0


class ActorProcess:
    """Settings and figures of this process. `role` names the actor in merge/memory.json.

    `threads` is the number of CPU threads of an operation; None: the CPUs that the process may use. `gpus` are those of
    the actor's seat.
    """

    def __init__(self, role: str, threads: int | None = None, gpus: Gpus = NO_GPUS) -> None:
        self.role, self.not_deterministic, self._gpus = role, "", gpus
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
            # Some operations, such as the backward passes of attention, use their deterministic kernel only without
            # warn_only. The same precision in all actors: a trainer rebuilds an expert's logits bit for bit.
            torch.use_deterministic_algorithms(True)
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        return devices

    @property
    def device(self) -> torch.device:
        """The first of `devices`."""
        return self.devices[0]

    def report(self, **counts: int) -> Report:
        """Return the figures of this process so far."""
        return Report(self.role, self.memory.pid, self.memory.peak, counts, self.not_deterministic, peak_pinned_bytes())

    def allow(self, error: RuntimeError) -> bool:
        """Allow operations without a deterministic implementation if an error is of such a one; return whether."""
        refused = re.match(r"(.+?) does not have a deterministic implementation", str(error))
        if refused is None or torch.is_deterministic_algorithms_warn_only_enabled():
            return False
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.not_deterministic = refused[1]
        return True


class OnDevices(Protocol):
    """An actor that computes on the devices of its process."""

    _process: ActorProcess

    def forget(self) -> None:
        """Drop models and half-done work, so that a call that failed can be repeated."""


Actor = TypeVar("Actor", bound=OnDevices)


def guarded(
    call: Callable[Concatenate[Actor, Arguments], Result],
) -> Callable[Concatenate[Actor, Arguments], Result]:
    """Return a method that is repeated once if an operation in it has no deterministic implementation."""

    @wraps(call)
    def on_devices(self: Actor, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return call(self, *args, **kwargs)
        except RuntimeError as error:
            if not self._process.allow(error):
                raise
        # Outside the handler, whose error holds the tensors of the failed call.
        self.forget()
        return call(self, *args, **kwargs)

    return on_devices
