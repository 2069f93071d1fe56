"""The actors of a merge: the application of `ray.remote`, with restarts and retries.

No actor depends on state from an earlier call, so Ray may restart any of them and retry the call.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.expert import Expert
from actors.gpus import Gpus
from actors.shard import Shard
from actors.trainer import Trainer
from cluster.ray_watch import RayWatch
from cluster.remote_shards import RemoteShards
from cluster.seats import Node, Seat, Seating
from cluster.session import actor_options, nodes, reserved
from cluster.trainer_seats import reserved_place
from cluster.watch import Watch
from engine.codec import Packed, pack_all
from engine.learning.targets import load_tensors
from engine.machine import usable_cpus
from engine.models.devices import Room
from engine.planning.costs.trainers import with_gradients
from engine.planning.plan import Plan
from engine.run.state import load_plan, plan_digest
from engine.shards.factor_shards import FactorShards
from engine.shards.local_shards import LocalShards
from engine.shards.protocol import Shards
from engine.storage.folder import Folder

# Restarts of a dead actor, and retries of its call. Bounded, so that a repeating fault ends the run.
RESTARTS = 3
# Seconds in which an actor starts if its seat is free.
SEATING = 60.0
Arguments = Callable[[Plan, Folder], tuple[Any, ...]]


class Crew:
    """Starts and dismisses the actors of one merge, each in its seat. On exit, the context dismisses all of them.

    `state` is the folder from which the actors load the plan.
    """

    def __init__(self, plan: Plan, state: Folder, layout: Seating, watch: Watch) -> None:
        self.layout, self._state, self._watch = layout, state, watch
        self._digest = plan_digest(plan)
        self._reservation = reserved(layout.reserved, plan.config.cluster.wait, watch.say)
        run = uuid.uuid4().hex
        self._shard_names = [f"shard-{index}-{run}" for index in range(len(layout.shards))]
        self._alive: list[Any] = []
        self.shards: list[Any] = []

    def __enter__(self) -> Crew:
        self._group = self._reservation.__enter__()
        for index, (seat, name) in enumerate(zip(self.layout.shards, self._shard_names, strict=True)):
            self.shards.append(self._spawn(Shard, f"shard {index}", seat, index, _shard(index), name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in list(self._alive):
            self.dismiss(actor)
        self._reservation.__exit__(kind, error, trace)

    @property
    def seats(self) -> int:
        """The number of experts that can run at the same time."""
        return len(self.layout.experts)

    def expert(self, index: int) -> Any:
        """Start the expert actor in the seat of that index."""
        threads = self.layout.threads
        return self._in_seat(Expert, "an expert's actor", index, lambda plan, _: (plan, index, threads))

    def shards_of_experts(self, count: int) -> list[Any]:
        """Start at most `count` shards in the seats of the experts, and return those that have started.

        Such a shard may use the GPU of the seat. The experts must be dismissed. A seat that another job occupies is
        left out; the first one is reserved.
        """
        label = "a shard in an expert's seat"
        return self._started(count, lambda i: self._in_seat(Shard, label, i, _shard(len(self.shards) + i)))

    def experts(self, count: int) -> list[Any]:
        """Start at most `count` expert actors, and return those that have started; see `shards_of_experts`."""
        return self._started(count, self.expert)

    def _started(self, count: int, start: Callable[[int], Any]) -> list[Any]:
        started = [start(index) for index in range(min(count, self.seats))]
        calls = {actor.report.remote(): actor for actor in started[1:]}
        if calls:
            _, late = ray.wait(list(calls), num_returns=len(calls), timeout=SEATING)
            for call in late:
                self.dismiss(calls[call])
                started.remove(calls[call])
        return started

    def trainer(self, index: int = 0) -> Any:
        """Start a trainer, the first one in its home. The shards must be running, and for the others no expert."""
        layout = self.layout
        assert layout.trainer is not None
        seat = layout.others[index - 1] if index else layout.trainer
        place = reserved_place(layout, index - 1) if index else len(layout.shards)
        # By name, not by handle: a handle among the arguments is one more object that can be lost before a restart.
        names = [] if layout.within_trainer else self._shard_names
        threads, factored, room, gradients = layout.threads, layout.factored, layout.room, layout.gradients
        on_gpu, limits = seat.gpus > 0, (layout.batch_tokens, layout.logit_bytes)
        of_step = Room(activations=layout.activations, logits=layout.logits)

        def arguments(plan: Plan, state: Folder) -> tuple[Any, ...]:
            shards = _trainer_shards(plan, state, names, factored, room, on_gpu)
            decided = with_gradients(plan, gradients)
            return decided, shards, _puller(plan, state), ray.get, threads, index, *limits, of_step

        return self._spawn(Trainer, f"trainer {index}" if index else "the trainer", seat, place, arguments)

    def dismiss(self, actor: Any) -> None:
        """Kill an actor. The driver owns the objects that its methods returned, so they outlive it."""
        self._alive.remove(actor)
        self._watch.gone(actor)
        ray.kill(actor)

    def _in_seat(self, kind: type, label: str, index: int, arguments: Arguments) -> Any:
        layout, home = self.layout, len(self.layout.shards)
        # With seats beside the trainer, that of the first expert is reserved; the others wait until theirs is free.
        at_home = not layout.beside or index >= len(layout.experts) - layout.at_home
        first = home + (layout.home is not None)
        place = home if at_home else (first if index == 0 else None)
        return self._spawn(kind, label, layout.experts[index], place, arguments)

    def _spawn(
        self, kind: type, label: str, seat: Seat, place: int | None, arguments: Arguments, name: str | None = None
    ) -> Any:
        if place is None:
            where: Any = NodeAffinitySchedulingStrategy(seat.node, soft=False)
        else:
            where = PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=place)
        remote = ray.remote(_planned(kind, seat.gpus)).options(
            num_cpus=seat.cpus,
            num_gpus=seat.gpus,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            scheduling_strategy=where,
            name=name,
            **actor_options(),
        )
        actor = remote.remote(self._state, self._digest, arguments)
        self._alive.append(actor)
        self._watch.on(actor, seat.node, label)
        return actor


class RayCluster:
    """The connected Ray as the `Hosts` of shards."""

    def nodes(self) -> list[Node]:
        """See `cluster.session.nodes`."""
        return nodes()

    def watch(self, say: Callable[[str], None]) -> Watch:
        """Return a watch of actors."""
        return RayWatch(say)

    def crew(self, plan: Plan, state: Folder, layout: Seating, watch: Watch) -> Crew:
        """Return a context with an actor for each seat of a shard."""
        return Crew(plan, state, layout, watch)


def _planned(kind: type, gpus: float) -> type:
    """Return the actor class with an `__init__` that loads the plan on the actor's own node, for a seat with GPUs.

    A plan is too large for the arguments of an actor: Ray would put it into the object store, where a restarted actor
    may not find it.
    """

    def start(self: Any, state: Folder, digest: str, arguments: Arguments) -> None:
        assigned = Gpus(gpus, tuple(ray.get_gpu_ids()))
        kind.__init__(self, *arguments(load_plan(state, digest), state), gpus=assigned)  # type: ignore[misc]

    return type(kind.__name__, (kind,), {"__init__": start})


def _trainer_shards(
    plan: Plan, state: Folder, names: Sequence[str], factored: Sequence[str], room: float, on_gpu: bool
) -> Shards:
    """Return the trainer's shards: factors of the matrices `factored`, and for all other tensors the shard actors.

    Without `names` of shard actors, the other tensors are streamed within this process, too. `room`: see
    `FactorShards`; `on_gpu`: the trainer computes on a GPU.
    """
    others = plan.merged_set.difference(factored)
    rest: Shards
    if names:
        rest = RemoteShards(plan, [ray.get_actor(name) for name in names], others)
    else:
        rest = LocalShards(plan, usable_cpus(), on_gpu, state, others)
    return FactorShards(plan, factored, rest, state, room) if factored else rest


def _puller(plan: Plan, state: Folder) -> Callable[[Any], Mapping[str, Packed]]:
    """Return a function that fetches a target by its reference: the names of its files, or the target itself."""

    def pull(reference: Any) -> Mapping[str, Packed]:
        if isinstance(reference, tuple):
            return pack_all(load_tensors(state, reference, plan.base_header.vocab_size))
        packed: Mapping[str, Packed] = reference
        return packed

    return pull


def _shard(index: int) -> Arguments:
    """Return the arguments of a shard as a closure.

    A closure is pickled by value. A module-level function would be pickled by name, and a shard would import this
    module and with it all imports of experts and trainer.
    """
    return lambda plan, state: (plan, index, state)
