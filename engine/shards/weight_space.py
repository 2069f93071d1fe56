"""The tensors of a weight-space merge: per tensor its option values, its task vectors and its job in the pipeline."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.checkpoints.structure import Role
from engine.checkpoints.vocabulary import has_tokens_for_rows, is_gathered
from engine.checkpoints.writer import OutputTensor
from engine.errors import CheckpointError
from engine.machine import usable_memory
from engine.methods.arithmetic.tensor import MergeTensor
from engine.methods.registry import preparation
from engine.planning.costs.flops import work_bytes
from engine.planning.layout.vocabulary import models_at
from engine.planning.plan import Plan, experts_of, method_at, slice_of
from engine.shards.gathered_rows import GatheredRows
from engine.shards.prepasses import NOTHING, Known, group_of
from engine.shards.settings import resolve
from engine.shards.statistics import MergeStatistics
from engine.sizes import DECOMPOSING_BYTES
from engine.storage.folder import Folder
from engine.task_vectors.kinds import TaskVector
from engine.task_vectors.pipeline import Fill, SharedMemory, TensorJob, copy_of
from engine.task_vectors.rounding import Rounding
from engine.task_vectors.streams import TaskVectors


class WeightSpace:
    """The weight-space merge of a plan: base and experts as streams, and the arithmetic of the plan's method.

    `state` is the folder of the run's state, in which statistics are, if the method uses any.
    """

    def __init__(self, plan: Plan, streams: TaskVectors, state: Folder | None = None) -> None:
        self._plan, self._streams = plan, streams
        self._statistics = MergeStatistics(plan, state)
        self._rows: dict[str, GatheredRows] = {}
        shards = plan.config.cluster.shards
        here = shards if isinstance(shards, int) and shards else 1  # one a node by default
        # What else runs on the machine, such as experts, has the other half of its memory.
        self._memory = SharedMemory(max(DECOMPOSING_BYTES, usable_memory() // (2 * here)))

    def tensor(self, name: str, known: Known = NOTHING, only: int | None = None) -> MergeTensor:
        """Return the `MergeTensor` of a merged tensor.

        Args:
            name: The tensor's name.
            known: Results of prepasses; see `known_of`.
            only: Index of an expert: the tensor then has this expert alone.

        Raises:
            ConfigError: a required option has no value for this tensor.
        """
        plan, origin = self._plan, self._plan.origin(name)
        part = slice_of(plan, name)
        values, expert_values, base_values = resolve(plan, name)
        indices, rows = experts_of(plan, name), self._gathered(name)
        chosen = range(len(indices)) if only is None else [only]
        task_vectors = [self._task_vector(k, name) for k in indices] if rows is None else rows.task_vectors
        return MergeTensor(
            name=name,
            shape=plan.base_header.tensors[name].shape,
            base=self._base(name),
            models=tuple(plan.experts[indices[k]].name for k in chosen),
            task_vectors=[None if indices[k] == origin.base else task_vectors[k] for k in chosen],
            values=values,
            own=[expert_values[k] for k in chosen],
            base_values=base_values,
            seed=plan.config.seed,
            pool=self._streams.pool,
            threads=self._streams.threads,
            experts_in_all=len(indices),
            has_base=part.has_base,
            base_place=part.base,
            is_vocabulary=has_tokens_for_rows(plan.base_header, name),
            known=known.get(group_of(plan, name), {}),
            statistics=self._statistics.of_experts(name, [indices[k] for k in chosen]),
            base_statistics=self._statistics.of_base(name),
        )

    def _task_vector(self, expert: int, name: str) -> TaskVector | None:
        return self._streams.experts[expert][1].task_vector(name)

    def job(
        self,
        entry: OutputTensor,
        dtype: torch.dtype | None,
        known: Known,
        only: int | None,
    ) -> TensorJob:
        """Return the job of an output tensor, in `dtype` (default: the base's dtype of the tensor).

        See `tensor` for `known` and `only`.
        """
        name, config = entry.name, self._plan.config
        base = self._base(name)
        merged = name in self._plan.merged_set

        def prepare() -> Fill:
            if merged:
                method = method_at(self._plan, name)
                if not experts_of(self._plan, name) and method.base == "required":
                    return copy_of(base)
                with self._memory.take(work_bytes(self._plan, name)):
                    return preparation(method.name)(self.tensor(name, known, only))
            self._check_buffer(name)
            return copy_of(base)

        rounding = Rounding.of(name, base, config.rounding, config.seed) if merged else None
        return TensorJob(name, entry.shape, dtype or base.dtype, prepare, rounding)

    def _base(self, name: str) -> Tensor:
        """Return the base's tensor, with the rows of the output's tokens."""
        rows = self._gathered(name)
        return self._streams.base.read(name) if rows is None else rows.base

    def _gathered(self, name: str) -> GatheredRows | None:
        """Return a tensor whose rows the plan's vocabulary decides; None for all others."""
        plan, streams = self._plan, self._streams
        if plan.vocabulary is None or not is_gathered(plan.base_header, name):
            return None
        if name not in self._rows:
            experts = [streams.experts[k][1] for k in experts_of(plan, name)]
            vocabulary = plan.vocabulary.of(models_at(plan, name), slice_of(plan, name).counts_base)
            self._rows[name] = GatheredRows(vocabulary, name, streams.base.read(name), experts)
        return self._rows[name]

    def _check_buffer(self, name: str) -> None:
        """Check that a parameter that is not of a float dtype is equal in base and experts, since it cannot be merged.

        Raises:
            CheckpointError: an expert has other values.
        """
        base = self._streams.base.read(name)
        if base.is_floating_point() or self._plan.base_header.roles.get(name) is Role.BUFFER:
            return
        for model, expert in self._streams.experts:
            other = expert.stored(name)
            if other is not None and not torch.equal(other, base.reshape(-1)):
                raise CheckpointError(
                    f"{name!r} has a dtype that cannot be merged, and its values differ from the base's",
                    f"expert {model!r}",
                    "the base's values",
                )
