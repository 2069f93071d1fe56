"""The actors of a merge: where `ray.remote` is applied, and where they are told to start again after a death.

No actor keeps what a call would need from an earlier one, so Ray may start any of them again and repeat the call.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.expert import Expert
from actors.process import Report, usable_cpus
from actors.shard import Shard
from actors.trainer import Trainer
from cluster.exchange import RemoteShards
from cluster.placement import Bundle, Placement
from cluster.session import answer, await_nodes, first_answer, home_of, reserved
from engine.calibration import Sample
from engine.codec import Packed, pack_all
from engine.expert import load_target
from engine.plan import Plan
from engine.run_folder import load_plan
from engine.shards import LocalShards, Shards

# How often a dead actor is started again, and a call that it took with it repeated: a fault that repeats must end.
RESTARTS = 3

Arguments = Callable[[Plan], tuple[Any, ...]]


class Crew:
    """Makes and dismisses the actors of one merge; `say` is told what is being waited for."""

    def __init__(self, plan: Plan, plan_file: Path, placement: Placement, say: Callable[[str], None]) -> None:
        self._plan, self._plan_file, self._placement, self._say = plan, plan_file, placement, say
        self._wait = plan.config.cluster.wait
        run = uuid.uuid4().hex
        self._shard_names = [f"shard-{index}-{run}" for index in range(len(placement.shards))]
        await_nodes([placement.trainer, *placement.experts[:1], *placement.shards[:1]], self._wait, say)
        self.trainer_beside = placement.beside
        self._trainer_bundle, self._shard_bundles = placement.trainer, placement.shards
        if placement.together and not placement.within_trainer:
            self._trainer_bundle = home_of(placement.trainer)
            home = {kind: amount for kind, amount in self._trainer_bundle.items() if kind not in placement.trainer}
            self._shard_bundles = tuple(bundle | home for bundle in placement.shards)

    @contextmanager
    def shards(self) -> Iterator[list[Any]]:
        """The shards, while the context lasts."""
        bundles = self._shard_bundles
        with reserved(bundles, self._wait, self._say) as group:
            shards = [
                self._spawn(Shard, group, index, bundle, _with_index(index), name)
                for index, (bundle, name) in enumerate(zip(bundles, self._shard_names, strict=True))
            ]
            yield shards
            _kill(shards)

    @contextmanager
    def experts(self, wanted: int) -> Iterator[list[Any]]:
        """Actors for so many experts, while the context lasts: as many as fit at a time."""
        bundles = self._placement.experts[:wanted]
        if not bundles:
            yield []
            return
        with reserved(bundles, self._wait, self._say) as group:
            actors = [self._spawn(Expert, group, i, bundle, _with_index(i)) for i, bundle in enumerate(bundles)]
            yield actors
            # What a method returned belongs to the driver: it outlives the actor.
            _kill(actors)

    @contextmanager
    def trainer(self) -> Iterator[Any]:
        """The trainer, while the context lasts; the shards must be there."""
        bundle = self._trainer_bundle
        # By name, not by handle: a handle among the arguments would be one more thing to lose before a restart.
        names = [] if self._placement.within_trainer else self._shard_names
        with reserved([bundle], self._wait, self._say) as group:
            trainer = self._spawn(Trainer, group, 0, bundle, lambda plan: (plan, _shards_named(plan, names), ray.get))
            yield trainer
            _kill([trainer])

    def targets(
        self, experts: Sequence[Any], wanted: Sequence[Sequence[tuple[Sample, Path]]], done: Callable[[int], None]
    ) -> tuple[dict[tuple[int, int], Any], list[Report]]:
        """References to the targets of the wanted samples by (expert, index), and what the actors said of themselves.

        One that is done with an expert takes the next, without a new process. `done` is told the bytes of each target
        as it is there.
        """
        references: dict[tuple[int, int], Any] = {}
        waiting, free = deque(wanted), deque(experts)
        pending: dict[Any, Any] = {}
        while waiting or pending:
            while waiting and free:
                actor = free.popleft()
                for sample, path in waiting.popleft():
                    size, target = actor.target.options(num_returns=2).remote(sample, path)
                    references[sample.expert, sample.index] = target
                    pending[size] = actor
            size, nbytes = first_answer(list(pending), self._say, "computing targets")
            actor = pending.pop(size)
            done(nbytes)
            if actor not in pending.values():
                free.append(actor)
        reports = [answer(actor.report.remote(), self._say, "computing targets") for actor in experts]
        return references, reports

    def _spawn(
        self,
        kind: type,
        group: PlacementGroup,
        index: int,
        bundle: Bundle,
        arguments: Arguments,
        name: str | None = None,
    ) -> Any:
        where = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
        remote = ray.remote(_planned(kind)).options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            scheduling_strategy=where,
            name=name,
        )
        return remote.remote(self._plan_file, arguments)


def stored_target(path: Path) -> Any:
    """A reference to a target that an earlier start of this run computed."""
    return ray.remote(_load).options(num_cpus=0, max_retries=RESTARTS).remote(path)


def _load(path: Path) -> dict[str, Packed]:
    return pack_all(load_target(path).tensors())


def _planned(kind: type) -> type:
    """The actor class, with its arguments made from the plan where it runs.

    A plan is too large to travel with the call that makes an actor: Ray would put it into the object store, where an
    actor that is started again may not find it.
    """

    def start(self: Any, plan_file: Path, arguments: Arguments) -> None:
        kind.__init__(self, *arguments(load_plan(plan_file)))  # type: ignore[misc]

    return type(kind.__name__, (kind,), {"__init__": start})


def _shards_named(plan: Plan, names: Sequence[str]) -> Shards:
    """The shards of those names; without names, the task vectors in this process."""
    if not names:
        return LocalShards(plan, usable_cpus(), overlap=torch.cuda.is_available())
    return RemoteShards(plan, [ray.get_actor(name) for name in names])


def _with_index(index: int) -> Arguments:
    """Plan and index. A closure, which travels by value: by name it would make a shard import this module and, with
    it, all that experts and trainer need.
    """
    return lambda plan: (plan, index)


def _kill(actors: Sequence[Any]) -> None:
    for actor in actors:
        ray.kill(actor)
