"""Prepasses: what a method has to know of a whole model before it can merge a tensor. Free of torch.

A prepass measures an array of every tensor, on the shards. The driver sums or gathers the arrays and concludes a result
from them, which later prepasses and the method's `prepare` find in `MergeTensor.known` by the name of the prepass.
Letters: K experts, R rows of counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from engine.methods.options import Value

if TYPE_CHECKING:
    from engine.methods.arithmetic.selection import Counts, Found
    from engine.methods.arithmetic.tensor import MergeTensor

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Group:
    """The tensors that one method merges from the same experts: a whole model, if the config has no slices.

    Attributes:
        numels: Number of elements of each tensor, by name, in the order of the plan.
        values: Values of the options with scope `merge`, by tensor.
        own: Values of the options with scope `expert` or `model`, by tensor and expert.
        known: Results of the prepasses so far.
    """

    numels: dict[str, int] = field(default_factory=dict)
    values: dict[str, dict[str, Value]] = field(default_factory=dict)
    own: dict[str, Sequence[dict[str, Value]]] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Number of elements of all tensors."""
        return sum(self.numels.values())

    @property
    def experts(self) -> int:
        """Number of experts K."""
        return len(next(iter(self.own.values())))

    def means(self, option: str) -> list[float]:
        """Return the mean over all elements of each expert's value of an option."""
        sums = [
            sum(float(own[k][option]) * self.numels[name] for name, own in self.own.items())
            for k in range(self.experts)
        ]
        return [total / self.numel for total in sums]

    def mean(self, option: str) -> float:
        """Return the mean over all elements of the value of an option of the merge."""
        return sum(float(values[option]) * self.numels[name] for name, values in self.values.items()) / self.numel


def _always(values: dict[str, Value]) -> bool:
    return True


@dataclass(frozen=True)
class Prepass:
    """A pass over all tensors of a model.

    Attributes:
        name: The name of its result.
        about: What progress calls it.
        measure: Returns an array of one tensor. Only elements of its task vectors and results of earlier prepasses may
            decide about it, so that it does not depend on the shards.
        conclude: Returns the result, from the sum of the arrays over the tensors of a group, or with `gather` from the
            arrays by tensor name. Runs in the driver. Floats are summed in the order of the plan.
        gather: The arrays are not summed.
        wanted: Whether values of the options with scope `merge` need it. A group has it if those of any tensor do.
        counts: `measure` itself uses all threads and returns large tables: it runs for one tensor at a time.
    """

    name: str
    about: str
    measure: Callable[[MergeTensor], Array]
    conclude: Callable[[Any, Group], Any]
    gather: bool = False
    wanted: Callable[[dict[str, Value]], bool] = _always
    counts: bool = False


def selection(
    name: str,
    count: Callable[[MergeTensor, Counts | None], Counts],
    keep: Callable[[Counts, Group], Sequence[int | None]],
    wanted: Callable[[dict[str, Value]], bool] = _always,
) -> tuple[Prepass, Prepass]:
    """Return the prepasses that find thresholds over all tensors of a group, exactly, by two rounds of counting.

    Args:
        name: The name of the result, a `Threshold` for each row of counts.
        count: Counts the elements of a tensor, [R, bins]; see `arithmetic.selection.select`.
        keep: Returns how many elements to keep, per row (None: all), from the counts by upper bits.
        wanted: See `Prepass`.
    """
    first = f"{name} by upper bits"

    def upper(counts: Counts, group: Group) -> Found:
        from engine.methods.arithmetic.selection import upper_bits

        return upper_bits(counts, keep(counts, group))

    def lower(counts: Counts, group: Group) -> Any:
        from engine.methods.arithmetic.selection import thresholds

        return thresholds(counts, group.known[first])

    return (
        Prepass(first, f"{name}: counting", lambda tensor: count(tensor, None), upper, wanted=wanted, counts=True),
        Prepass(
            name,
            f"{name}: counting again",
            lambda tensor: count(tensor, tensor.known[first].high),
            lower,
            wanted=wanted,
            counts=True,
        ),
    )
