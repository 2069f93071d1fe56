"""The tensors of a weight-space merge: per tensor its option values, its task vectors and its job in the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.checkpoints.structure import Role
from engine.checkpoints.vocabulary import has_tokens_for_rows
from engine.checkpoints.writer import OutputTensor
from engine.errors import CheckpointError, ConfigError
from engine.methods.arithmetic.selection import Counts, Threshold, select
from engine.methods.arithmetic.sparse import kept_of
from engine.methods.arithmetic.tensor import MergeTensor
from engine.methods.options import Option, Settings, Value
from engine.methods.registry import NATIVE, get_method, preparation
from engine.planning.plan import Plan
from engine.task_vectors.pipeline import Fill, TensorJob, copy_of
from engine.task_vectors.rounding import Rounding
from engine.task_vectors.streams import TaskVectors


class WeightSpace:
    """The weight-space merge of a plan: base and experts as streams, and the arithmetic of the plan's method."""

    def __init__(self, plan: Plan, streams: TaskVectors) -> None:
        self._plan, self._streams = plan, streams
        self._prepare = preparation(plan.config.merge_method)

    def tensor(self, name: str, thresholds: Sequence[Threshold] | None = None, only: int | None = None) -> MergeTensor:
        """Return the `MergeTensor` of a merged tensor.

        Args:
            name: The tensor's name.
            thresholds: The experts' thresholds over the whole model; see `model_thresholds`.
            only: Index of an expert: the tensor then has this expert alone.

        Raises:
            ConfigError: a required option has no value for this tensor.
        """
        plan, recipe = self._plan, self._plan.config.recipe
        assert recipe is not None
        values, expert_values, base_values = resolve(plan, name)
        experts = range(len(plan.experts)) if only is None else [only]
        task_vectors = self._streams.of(name)
        return MergeTensor(
            name=name,
            shape=plan.base_header.tensors[name].shape,
            base=self._streams.base.read(name),
            models=tuple(plan.experts[k].name for k in experts),
            task_vectors=[task_vectors[k] for k in experts],
            values=values,
            own=[expert_values[k] for k in experts],
            base_values=base_values,
            seed=plan.config.seed,
            pool=self._streams.pool,
            threads=self._streams.threads,
            experts_in_all=len(plan.experts),
            has_base=not recipe.baseless,
            base_place=recipe.base.place if recipe.base else None,
            is_vocabulary=has_tokens_for_rows(plan.base_header, name),
            thresholds=thresholds,
        )

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
        base = self._streams.base.read(name)
        merged = name in self._plan.merged_set

        def prepare() -> Fill:
            if merged:
                return self._prepare(self.tensor(name, thresholds, only))
            self._check_buffer(name)
            return copy_of(base)

        rounding = Rounding.of(name, base, config.rounding, config.seed) if merged else None
        return TensorJob(name, entry.shape, dtype or base.dtype, prepare, rounding)

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


def model_thresholds(plan: Plan, count: Callable[[Counts | None], Counts]) -> list[Threshold] | None:
    """Return each expert's threshold over the whole model, or None if no tensor has `trim: model`.

    `count` counts magnitudes over all merged tensors; see `select`.
    """
    if "trim" not in get_method(plan.config.merge_method).by_name:
        return None
    resolved = {name: resolve(plan, name) for name in plan.merged}
    if all(values["trim"] != "model" for values, _, _ in resolved.values()):
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
    method = get_method(plan.config.merge_method)
    for name in plan.merged:
        values = resolve(plan, name)
        if method.check is not None:
            method.check(name, *values)


def resolve(plan: Plan, tensor: str) -> tuple[dict[str, Value], list[dict[str, Value]], dict[str, Value] | None]:
    """Return the option values of a tensor: those of the merge, of each expert, and of the base.

    The values of the base are None if it takes no part as a model. A value is looked up in the model's settings, the
    slice's, the top level's, and the defaults, in this order.

    Raises:
        ConfigError: a required option has no value.
    """
    recipe, method = plan.config.recipe, get_method(plan.config.merge_method)
    assert recipe is not None

    def value(option: Option, *scopes: Settings) -> Value:
        resolved = option.resolve((*scopes, recipe.slice, recipe.top), tensor, plan.depths[tensor])
        if resolved is None and option.required:
            each = "" if option.scope == "merge" else " for every model"
            raise ConfigError(
                f"{method.name} needs a value of {option.name!r}{each}",
                tensor,
                do=f"set `{option.name}` in `parameters`",
            )
        return resolved  # type: ignore[return-value]  # None is the default of some of mergekit's options

    of_merge = [option for option in method.options if option.scope == "merge"]
    of_models = [option for option in method.options if option.scope != "merge"]
    expert_values = [{option.name: value(option, settings) for option in of_models} for settings in recipe.models]
    of_base = [option for option in of_models if option.scope == "model"]
    base = None
    # As in mergekit, a base that is not listed among the models counts as one if the config sets one of its options.
    # The methods of mergekit's library always count it.
    base_is_model = method.name not in NATIVE or any(
        option.name in {**recipe.top, **recipe.slice} for option in of_base
    )
    if recipe.base is not None or (base_is_model and not recipe.baseless):
        settings = recipe.base.settings if recipe.base else {}
        base = {option.name: value(option, settings) for option in of_base}
    return {option.name: value(option) for option in of_merge}, expert_values, base
