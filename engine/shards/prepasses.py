"""The prepasses of a weight-space merge: arrays measured on the shards, results concluded in the driver.

A tensor belongs to a group, those that are merged by its method from its experts; see `engine.methods.prepass`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any

import numpy as np
import torch

from engine.methods.arithmetic.tensor import MergeTensor
from engine.methods.prepass import Array, Group
from engine.methods.registry import prepasses
from engine.planning.plan import Plan, experts_of, method_at
from engine.shards.settings import resolve
from engine.task_vectors.pipeline import in_order

# A group: the name of a method, and the experts.
Key = tuple[str, tuple[int, ...]]
# Results of prepasses, by group and name.
Known = Mapping[Key, Mapping[str, Any]]
NOTHING: Known = {}

# Calls the shards to measure tensors for a prepass: its method, its place among those of the method, the tensors, and
# the results so far. Returns the arrays of each shard, by tensor.
Measure = Callable[[str, int, Sequence[str], Known], Iterable[Mapping[str, Array]]]


def group_of(plan: Plan, tensor: str) -> Key:
    """Return the group of a tensor."""
    return method_at(plan, tensor).name, tuple(experts_of(plan, tensor))


def known_of(plan: Plan, measure: Measure) -> Known:
    """Return the results of all prepasses that the plan's methods and option values need."""
    groups: dict[Key, Group] = {}
    for name in plan.merged:
        key = group_of(plan, name)
        if key[1] and prepasses(key[0]):
            group = groups.setdefault(key, Group())
            group.numels[name] = plan.numels[name]
            group.values[name], group.own[name], _ = resolve(plan, name)
    known = {key: group.known for key, group in groups.items()}
    for method in dict.fromkeys(method for method, _ in groups):
        for index, prepass in enumerate(prepasses(method)):
            those = [
                group
                for (of, _), group in groups.items()
                if of == method and any(map(prepass.wanted, group.values.values()))
            ]
            names = [name for group in those for name in group.numels]
            parts = (
                {name: array for part in measure(method, index, names, known) for name, array in part.items()}
                if names
                else {}
            )
            for group in those:
                arrays = {name: parts[name] for name in group.numels if name in parts}
                whole = arrays if prepass.gather else reduce(np.add, arrays.values())
                group.known[prepass.name] = prepass.conclude(whole, group)
    return known


def measured(plan: Plan, method: str, index: int, tensors: Iterable[MergeTensor], threads: int) -> dict[str, Array]:
    """Return what a prepass measures of tensors, by name, at most `threads` of them at a time.

    Whole numbers that are to be summed are summed here, under the name of the first tensor of each group.
    """
    prepass, found, firsts = prepasses(method)[index], {}, dict[Key, str]()
    at_a_time = 1 if prepass.counts else threads

    def call(tensor: MergeTensor) -> Callable[[], tuple[str, Array]]:
        return lambda: (tensor.name, prepass.measure(tensor))

    # As in `stream`: a measurement may wait for work in the tensor's pool, so it runs in a thread of its own, with one
    # intra-op thread, since its sums must not depend on the number of threads.
    with ThreadPoolExecutor(at_a_time, "measure", initializer=torch.set_num_threads, initargs=(1,)) as conductors:
        for name, array in in_order(map(call, tensors), conductors, at_a_time - 1):
            if prepass.gather or not np.issubdtype(array.dtype, np.integer):
                found[name] = array
            elif (first := firsts.setdefault(group_of(plan, name), name)) in found:
                found[first] += array
            else:
                found[first] = array
    return found
