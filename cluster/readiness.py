"""Whether trainer and experts fit the memory of their GPUs, which is known when their processes have started.

The driver knows how many GPUs a node has, but not how much memory, and a GPU may be a slice, or others may use it, too.
So the actors are asked before they compute. Who has `num_gpus: auto` gets more GPUs if one is too small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cluster.placement import Devices, most_gpus
from cluster.seats import Node
from cluster.watch import Lost
from engine.errors import ClusterError, GpuMemoryError
from engine.planning.costs.fitting import Role, capacity, enough_gpus, needed, remedies
from engine.planning.costs.rates import GB
from engine.planning.costs.scaling import Machines, Work, choose
from engine.planning.plan import Plan


class MoreGpus(Lost):
    """An actor with `num_gpus: auto` gets more GPUs than it was started with."""


@dataclass(frozen=True)
class Readiness:
    """The memory that the actors of an attempt need.

    Attributes:
        plan, work: The merge.
        machines: The machines as the scaling model knows them.
        nodes: The nodes.
        devices: What trainer and experts compute on.
        keep: Stores other devices for the next attempt.
        begun: The run has results, which it keeps only on the devices with which it began.
    """

    plan: Plan
    work: Work
    machines: Machines
    nodes: Sequence[Node]
    devices: Devices
    keep: Callable[[Devices], None]
    begun: bool

    def wanted(self, role: Role) -> float:
        """Return the bytes that a trainer or an expert needs on its GPUs."""
        return needed(choose(self.plan, self.work, self._with_gpus(0)).memory, role)

    def check(self, role: Role, free: Sequence[int]) -> None:
        """Check that a trainer or an expert fits its GPUs, given the free bytes of each; none if it has no GPUs.

        Raises:
            MoreGpus: It does not, and it gets more.
            ClusterError: It does not.
        """
        gpus, wanted = self._gpus(role), self.wanted(role)
        if not free or not gpus or wanted <= capacity(min(free), gpus):
            return
        has = f"{gpus:g} GPUs have" if gpus > 1 else "a GPU has"
        what = f"the {role} needs {wanted / GB:.2f} GB, and {has} {max(1, gpus) * min(free) / GB:.2f} GB free"
        if self._resources(role) == "auto" and not self.begun:
            machines = self._with_gpus(min(free))
            number = enough_gpus(self.plan, self.work, machines, role, gpus, self._most(role))
            if number is not None:
                trainer, expert = (number, self.devices.expert) if role == "trainer" else (self.devices.trainer, number)
                self.keep(replace(self.devices, trainer=float(trainer), expert=float(expert)))
                raise MoreGpus(f"{what}: it gets {number} GPUs")
        raise ClusterError(what, f"the {role}", do=self._do(role, min(free)))

    def advised(self, error: GpuMemoryError) -> ClusterError:
        """Return the error of an actor that ran out of memory, with the settings that need less than those of now."""
        role: Role = "trainer" if error.where == "trainer" else "expert"
        now = self.wanted(role) / max(1.0, self._gpus(role))
        return ClusterError(error.what, f"the {error.where}", do=self._do(role, now - 1))

    def _do(self, role: Role, free: float) -> str:
        """Return advice for GPUs with so many free bytes each."""
        gpus, most = self._gpus(role), self._most(role)
        settings = remedies(self.plan, self.work, self._with_gpus(free), role, gpus, most)
        again = "; with --fresh" if settings and self.begun else ""
        return f"set {settings}, or use larger GPUs{again}" if settings else "use larger GPUs"

    def _gpus(self, role: Role) -> float:
        return self.devices.trainer if role == "trainer" else self.devices.expert

    def _resources(self, role: Role) -> object:
        cluster = self.plan.config.cluster
        return (cluster.trainer if role == "trainer" else cluster.expert).num_gpus

    def _most(self, role: Role) -> float:
        return most_gpus(self.nodes, self.plan.config, role)

    def _with_gpus(self, free: float) -> Machines:
        """Return the machines with so many free bytes on each GPU. A trainer on the CPU may have experts on GPUs."""
        return replace(self.machines, gpus=self.machines.gpus or 1.0, gpu_memory=free)
