"""The tensors of a merge that learns nothing: for each, its options' values, its task vectors, and how its pieces come.

Between a plan and the methods; knows which tensor is which, and no arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

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
from engine.task_vectors.streams import TaskVectors


class WeightSpace:
    """Base and experts, and what the plan's method does with them."""

    def __init__(self, plan: Plan, streams: TaskVectors) -> None:
        self._plan, self._streams = plan, streams
        self._prepare = preparation(plan.config.merge_method)

    def tensor(self, name: str, thresholds: Sequence[Threshold] | None = None, only: int | None = None) -> MergeTensor:
        """A merged tensor as a method sees it; `only`: with this one of the experts.

        Raises:
            ConfigError: an option that has no default has no value for this tensor.
        """
        plan, recipe = self._plan, self._plan.config.recipe
        assert recipe is not None
        values, own, base_values = resolve(plan, name)
        experts = range(len(plan.experts)) if only is None else [only]
        task_vectors = self._streams.of(name)
        return MergeTensor(
            name=name,
            shape=plan.base_header.tensors[name].shape,
            base=self._streams.base.read(name),
            models=tuple(plan.experts[k].name for k in experts),
            task_vectors=[task_vectors[k] for k in experts],
            values=values,
            own=[own[k] for k in experts],
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
        """How a tensor of the output is computed, in `dtype` (the file's if None)."""
        name = entry.name

        def prepare() -> Fill:
            if name in self._plan.merged_set:
                return self._prepare(self.tensor(name, thresholds, only))
            self._check_buffer(name)
            return copy_of(self._streams.base.read(name))

        return TensorJob(name, entry.shape, dtype or self._streams.base.read(name).dtype, prepare)

    def _check_buffer(self, name: str) -> None:
        """What is no float cannot be merged, so all have to agree on it.

        Raises:
            CheckpointError: an expert has other numbers.
        """
        base = self._streams.base.read(name)
        if base.is_floating_point():
            return
        for model, expert in self._streams.experts:
            other = expert.stored(name)
            if other is not None and not torch.equal(other, base.reshape(-1)):
                raise CheckpointError(
                    f"{name!r} is no float, and differs from the base's", f"expert {model!r}", "the same numbers"
                )


def model_thresholds(plan: Plan, count: Callable[[Counts | None], Counts]) -> list[Threshold] | None:
    """Of each expert's whole task vector, where `trim` asks for them; `count` as in `select`, over all tensors."""
    if "trim" not in get_method(plan.config.merge_method).by_name:
        return None
    resolved = {name: resolve(plan, name) for name in plan.merged}
    if all(values["trim"] != "model" for values, _, _ in resolved.values()):
        return None
    total = sum(plan.numels.values())
    kept = [
        sum(float(own[k]["density"]) * plan.numels[name] for name, (_, own, _) in resolved.items()) / total
        for k in range(len(plan.experts))
    ]
    return select(count, [kept_of(density, total) for density in kept])


def resolve(plan: Plan, tensor: str) -> tuple[dict[str, Value], list[dict[str, Value]], dict[str, Value] | None]:
    """The options' values for a tensor: one each, those of each expert, those of the base where it is a model.

    The model's own settings come first, then the slice's, then the top level's, then the default.

    Raises:
        ConfigError: an option that has no default has no value.
    """
    recipe, method = plan.config.recipe, get_method(plan.config.merge_method)
    assert recipe is not None

    def value(option: Option, *scopes: Settings) -> Value:
        found = option.resolve((*scopes, recipe.slice, recipe.top), tensor, plan.depths[tensor])
        if found is None and option.required:
            raise ConfigError(
                f"{method.name} needs a value of {option.name!r} for every model", tensor, do=f"give {option.name}"
            )
        return found  # type: ignore[return-value]  # None is the default of some of mergekit's options

    of_merge = [option for option in method.options if option.scope == "merge"]
    of_models = [option for option in method.options if option.scope != "merge"]
    own = [{option.name: value(option, mine) for option in of_models} for mine in recipe.models]
    of_base = [option for option in of_models if option.scope == "model"]
    base = None
    # As in mergekit a base that is not listed is a model, too; where nothing says its weight, it is only the base.
    told = method.name not in NATIVE or any(option.name in {**recipe.top, **recipe.slice} for option in of_base)
    if recipe.base is not None or (told and not recipe.baseless):
        settings = recipe.base.settings if recipe.base else {}
        base = {option.name: value(option, settings) for option in of_base}
    return {option.name: value(option) for option in of_merge}, own, base
