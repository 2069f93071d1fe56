"""The process of an actor: devices, number of threads, deterministic algorithms and memory figures."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from actors.gpus import NO_GPUS, Gpus
from actors.memory import PeakMemory, peak_pinned_bytes
from engine.errors import GpuMemoryError
from engine.machine import usable_cpus
from engine.planning.costs.rates import GB

# Seconds within which the GPU memory of a process that was killed comes back, and those between two looks at it.
SETTLING, LOOK_EVERY = 10.0, 0.5
# The exit code of a process whose GPU has failed.
FAILED = 70
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class GpuPeak:
    """The peak bytes of a GPU that torch has allocated, and reserved, in one process; `name` is the GPU's model."""

    name: str
    allocated: int
    reserved: int


@dataclass(frozen=True)
class Report:
    """Figures of an actor for merge/memory.json.

    `counts` are those of its role, such as forward passes; `not_deterministic` is an operation for which the process
    gave up that repeated runs have the same bits, or empty; `gpus` are those of its seat.
    """

    role: str
    pid: int
    peak_anonymous_bytes: int
    counts: dict[str, int]
    not_deterministic: str = ""
    peak_pinned_bytes: int = 0
    gpus: tuple[GpuPeak, ...] = ()


class ActorProcess:
    """Settings and figures of this process. `role` names the actor in merge/memory.json.

    `threads` is the number of CPU threads of an operation; None: the CPUs that the process may use. `gpus` are those of
    the actor's seat.
    """

    def __init__(self, role: str, threads: int | None = None, gpus: Gpus = NO_GPUS) -> None:
        self.role, self.not_deterministic, self._gpus = role, "", gpus
        # Whether a call has ended well, and whether GPU memory may come back before the next one.
        self.settled = self._waits = False
        self.memory = PeakMemory()
        # Ray sets the number of threads to that of the reserved CPUs, which depends on the placement. Sums inside an
        # operation depend on the number of threads, and results must not depend on the placement.
        torch.set_num_threads(threads or usable_cpus())
        # Torch gives a thread its number when the thread first needs it, and takes the last that any thread has set.
        # Without this call, that would be the 1 of a pool that has worked before.
        torch.get_num_threads()
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS is not deterministic
        # Else MKL's products of matrices depend on the number of threads on some CPUs. Read before the first product.
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
        # As `use_deterministic_algorithms`, which also sets torch's compiler and for that imports it, for seconds.
        torch.set_deterministic_debug_mode("warn")
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
            torch.set_deterministic_debug_mode("error")
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        return devices

    @property
    def device(self) -> torch.device:
        """The first of `devices`."""
        return self.devices[0]

    def report(self, **counts: int) -> Report:
        """Return the figures of this process so far."""
        peaks = tuple(
            GpuPeak(
                torch.cuda.get_device_name(device),
                torch.cuda.max_memory_allocated(device),
                torch.cuda.max_memory_reserved(device),
            )
            for device in self._gpus_in_use()
        )
        memory, failed = self.memory, self.not_deterministic
        return Report(self.role, memory.pid, memory.peak, counts, failed, peak_pinned_bytes(), peaks)

    def free(self, wanted: float) -> tuple[int, ...]:
        """Return the free bytes of each GPU of the seat, as soon as together they are `wanted` or SETTLING is over.

        Without GPUs, the result is empty. The memory of a process that was killed comes back some seconds after Ray has
        given its GPU to the next one.

        Raises:
            ClusterError: See `Gpus.devices`.
        """
        if self.device.type == "cpu":
            return ()
        began = time.monotonic()
        while True:
            free = tuple(_free(device) for device in self.devices)
            if sum(free) >= wanted or time.monotonic() - began >= SETTLING:
                return free
            time.sleep(LOOK_EVERY)

    def can_repeat(self, error: RuntimeError) -> bool:
        """Return whether a call that failed may succeed if it is repeated.

        It may if an operation has no deterministic implementation, which is then allowed; or if the process's first
        call ran out of GPU memory, which another process may still be giving back. If the GPU has failed, this process
        ends, since nothing on the GPU can be used any more; Ray then starts another.

        Raises:
            GpuMemoryError: The GPU memory does not suffice.
        """
        if is_out_of_memory(error):
            if self.settled:
                raise self._lacking(error) from error
            self.settled = self._waits = True
            return True
        if isinstance(error, torch.AcceleratorError) or str(error).startswith(("CUDA error", "CUDA driver error")):
            print(f"{self.role}: {error}", file=sys.stderr, flush=True)
            os._exit(FAILED)
        refused = re.match(r"(.+?) does not have a deterministic implementation", str(error))
        if refused is None or torch.is_deterministic_algorithms_warn_only_enabled():
            return False
        torch.set_deterministic_debug_mode("warn")
        self.not_deterministic = refused[1]
        return True

    def await_memory(self) -> None:
        """Wait for memory that may come back, after a call that ran out of it."""
        if self._waits:
            self._waits = False
            time.sleep(SETTLING)

    def _gpus_in_use(self) -> list[torch.device]:
        """Return the GPUs of the seat; none before `devices` was read without an error."""
        return [device for device in self.__dict__.get("devices", ()) if device.type == "cuda"]

    def _lacking(self, error: RuntimeError) -> GpuMemoryError:
        gpus = self._gpus_in_use()
        used, free = (sum(map(of_gpu, gpus)) / GB for of_gpu in (torch.cuda.memory_allocated, _free))
        what = f"ran out of GPU memory with {used:.1f} GB in use and {free:.1f} GB free: {str(error).splitlines()[0]}"
        return GpuMemoryError(what, self.role)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error of torch says that GPU memory, or pinned memory for it, does not suffice."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return str(error).startswith(("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))


def _free(device: torch.device) -> int:
    """Return the free bytes of a GPU; 0 if there is no room even for torch's own state."""
    try:
        return torch.cuda.mem_get_info(device)[0]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return 0


class OnDevices(Protocol):
    """An actor that computes on the devices of its process."""

    _process: ActorProcess

    def forget(self) -> None:
        """Drop models and half-done work, so that a call that failed can be repeated."""


Actor = TypeVar("Actor", bound=OnDevices)


def guarded(
    call: Callable[Concatenate[Actor, Arguments], Result],
) -> Callable[Concatenate[Actor, Arguments], Result]:
    """Return a method of an actor that is repeated where `ActorProcess.can_repeat` says so."""

    @wraps(call)
    def on_devices(self: Actor, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        while True:
            try:
                result = call(self, *args, **kwargs)
            except RuntimeError as error:
                if not self._process.can_repeat(error):
                    raise
            else:
                self._process.settled = True
                return result
            # Outside the handler, whose error holds the tensors of the failed call.
            self.forget()
            self._process.await_memory()

    return on_devices
