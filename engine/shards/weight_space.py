"""The tensors of a weight-space merge: per tensor its option values, its task vectors and its job in the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.checkpoints.structure import Role
from engine.checkpoints.vocabulary import has_tokens_for_rows, is_gathered
from engine.checkpoints.writer import OutputTensor
from engine.errors import CheckpointError, ConfigError
from engine.methods.arithmetic.selection import Counts, Threshold, select
from engine.methods.arithmetic.sparse import kept_of
from engine.methods.arithmetic.tensor import MergeTensor
from engine.methods.options import Method, Option, Settings, Value
from engine.methods.registry import NATIVE, get_method, preparation
from engine.planning.layout.vocabulary import models_at
from engine.planning.plan import Plan, experts_of, slice_of
from engine.shards.gathered_rows import GatheredRows
from engine.task_vectors.kinds import TaskVector
from engine.task_vectors.pipeline import Fill, TensorJob, copy_of
from engine.task_vectors.rounding import Rounding
from engine.task_vectors.streams import TaskVectors


class WeightSpace:
    """The weight-space merge of a plan: base and experts as streams, and the arithmetic of the plan's method."""

    def __init__(self, plan: Plan, streams: TaskVectors) -> None:
        self._plan, self._streams = plan, streams
        self._rows: dict[str, GatheredRows] = {}

    def tensor(self, name: str, thresholds: Sequence[Threshold] | None = None, only: int | None = None) -> MergeTensor:
        """Return the `MergeTensor` of a merged tensor.

        Args:
            name: The tensor's name.
            thresholds: The experts' thresholds over the whole model; see `model_thresholds`.
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
            thresholds=thresholds,
        )

    def _task_vector(self, expert: int, name: str) -> TaskVector | None:
        return self._streams.experts[expert][1].task_vector(name)

    def job(
        self,
        entry: OutputTensor,
        dtype: torch.dtype | None,
        thresholds: Sequence[Threshold] | None,
        only: int | None,
    ) -> TensorJob:
        """Return the job of an output tensor, in `dtype` (default: the base's dtype of the tensor).

        See `tensor` for `thresholds` and `only`.
        """
        name, config = entry.name, self._plan.config
        base = self._base(name)
        merged = name in self._plan.merged_set

        def prepare() -> Fill:
            if merged:
                method = method_at(self._plan, name)
                if not experts_of(self._plan, name) and method.base == "required":
                    return copy_of(base)
                return preparation(method.name)(self.tensor(name, thresholds, only))
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


def method_at(plan: Plan, tensor: str) -> Method:
    """Return the method by which a tensor is merged."""
    return get_method(slice_of(plan, tensor).merge_method or plan.config.merge_method)


def model_thresholds(plan: Plan, count: Callable[[Counts | None], Counts]) -> list[Threshold] | None:
    """Return each expert's threshold over the whole model, or None if no tensor has `trim: model`.

    `count` counts magnitudes over all merged tensors; see `select`.
    """
    if "trim" not in get_method(plan.config.merge_method).by_name:
        return None
    resolved = {name: resolve(plan, name) for name in plan.merged}
    if all(values.get("trim") != "model" for values, _, _ in resolved.values()):
        return None
    total = sum(plan.numels.values())
    kept = [
        sum(float(values[k]["density"]) * plan.numels[name] for name, (_, values, _) in resolved.items()) / total
        for k in range(len(plan.experts))
    ]
    return select(count, [kept_of(density, total) for density in kept])


def check_settings(plan: Plan) -> None:
    """Check the option values of every merged tensor, as its shard will read them.

    Raises:
        ConfigError: a required option has no value, or values do not go together.
    """
    for name in plan.merged:
        values, method = resolve(plan, name), method_at(plan, name)
        if plan.layout is not None and values[0].get("trim") == "model":
            raise ConfigError(
                "a merge by slices or modules has no task vectors of whole models to trim",
                "parameters.trim",
                "`tensor`",
                "set `trim: tensor`",
            )
        if method.check is not None:
            method.check(name, [plan.experts[k].name for k in experts_of(plan, name)], *values)


def resolve(plan: Plan, tensor: str) -> tuple[dict[str, Value], list[dict[str, Value]], dict[str, Value] | None]:
    """Return the option values of a tensor: those of the merge, of each of its experts, and of the base.

    The values of the base are None if it takes no part as a model. A value is looked up in the model's settings, the
    slice's, the module's, the top level's, and the defaults, in this order. As in mergekit, filters of a model's values
    see the tensor's name in that model, whose layer may have another number.

    Raises:
        ConfigError: a required option has no value.
    """
    recipe, method, part, origin = (
        plan.config.recipe,
        method_at(plan, tensor),
        slice_of(plan, tensor),
        plan.origin(tensor),
    )
    assert recipe is not None
    shared = (part.settings, recipe.modules.get(part.module, {}), recipe.top)

    def value(option: Option, name: str, *scopes: Settings) -> Value:
        resolved = option.resolve((*scopes, *shared), name, origin.depth)
        if resolved is None and option.required:
            each = "" if option.scope == "merge" else " for every model"
            raise ConfigError(
                f"{method.name} needs a value of {option.name!r}{each}",
                tensor,
                do=f"set `{option.name}` in `parameters`",
            )
        return resolved  # type: ignore[return-value]  # None is the default of some of mergekit's options

    of_models = [option for option in method.options if option.scope != "merge"]
    of_base = [option for option in of_models if option.scope == "model"]
    experts: list[dict[str, Value]] = []
    base: dict[str, Value] | None = None
    for place, source in enumerate(part.sources):
        if origin.sources is not None and place not in origin.sources:
            continue
        name = origin.name_in(source.layers)
        if place == part.base:
            base = {option.name: value(option, name, source.settings) for option in of_base}
        else:
            experts.append({option.name: value(option, name, source.settings) for option in of_models})
    # As in mergekit, a base that is not listed among the models counts as one if the config sets one of its options.
    # The methods of mergekit's library always count it.
    set_for_all = {name for settings in shared for name in settings}
    counts = method.name not in NATIVE or any(option.name in set_for_all for option in of_base)
    if part.base is None and part.has_base and counts:
        base = {option.name: value(option, tensor) for option in of_base}
    return (
        {option.name: value(option, tensor) for option in method.options if option.scope == "merge"},
        experts,
        base,
    )
