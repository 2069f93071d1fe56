"""The merge of one tensor by a weight-space method, with statistics that are at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from engine.methods.arithmetic.tensor import MergeTensor
from engine.methods.options import Value
from engine.methods.registry import get_method, preparation
from engine.statistics.moments import Moments, TensorStatistics
from engine.task_vectors.kinds import Stored
from engine.task_vectors.pieces import pieces


@dataclass(frozen=True)
class Known:
    """Statistics of one tensor."""

    of_inputs: Moments | None = None
    information: Tensor | None = None
    square: Tensor | None = None
    median: Tensor | None = None
    sequences: int = 4

    @property
    def tokens(self) -> int:
        return 0 if self.of_inputs is None else self.of_inputs.tokens

    def moments(self) -> Moments | None:
        return self.of_inputs

    def fisher(self) -> Tensor | None:
        return self.information

    def sensitivity(self, part: Literal["square", "median"]) -> Tensor | None:
        return self.square if part == "square" else self.median


def seen(inputs_IN: Tensor, as_gram: bool = True) -> Known:
    """Return the statistics of a layer that saw these inputs, the tokens as columns."""
    inputs = inputs_IN.float()
    return Known(
        Moments(
            inputs.shape[1],
            inputs.square().sum(1),
            inputs.abs().sum(1),
            (inputs_IN.double() @ inputs_IN.double().T).float() if as_gram else None,
            None if as_gram else inputs.T.contiguous(),
        )
    )


def tensor_of(
    method: str,
    base: Tensor,
    taus: Sequence[Tensor | None],
    statistics: Sequence[TensorStatistics | None] = (),
    *,
    own: Sequence[Mapping[str, Value]] = (),
    known: Mapping[str, Any] | None = None,
    is_vocabulary: bool = False,
    base_statistics: TensorStatistics | None = None,
    pool: ThreadPoolExecutor | None = None,
    **options: Any,
) -> MergeTensor:
    """Return the input of a method for one tensor. Options of experts that are not in `own` have their defaults."""
    by_name = get_method(method).by_name
    defaults = {name: option.default for name, option in by_name.items() if option.scope != "merge"}
    values = {name: option.default for name, option in by_name.items() if option.scope == "merge"} | options
    return MergeTensor(
        name="weight",
        shape=tuple(base.shape),
        base=base,
        models=tuple(f"expert{k}" for k in range(len(taus))),
        task_vectors=[None if tau is None else Stored(tau.float().reshape(-1)) for tau in taus],
        values=values,  # type: ignore[arg-type]
        own=[{**defaults, **(own[k] if own else {})} for k in range(len(taus))],  # type: ignore[dict-item]
        base_values=None,
        seed=0,
        pool=pool or ThreadPoolExecutor(1),
        threads=1,
        experts_in_all=len(taus),
        is_vocabulary=is_vocabulary,
        known=known or {},
        statistics=statistics,
        base_statistics=base_statistics,
    )


def merged(
    method: str,
    base: Tensor,
    taus: Sequence[Tensor | None],
    statistics: Sequence[TensorStatistics | None] = (),
    **options: Any,
) -> Tensor:
    """Return a method's merge of one tensor; see `tensor_of`."""
    with ThreadPoolExecutor(1) as pool:
        tensor = tensor_of(method, base.float(), taus, statistics, pool=pool, **options)
        fill = preparation(method)(tensor)
        out_N = torch.empty(base.numel())
        for piece in pieces(tensor.name, tensor.shape):
            fill(piece, out_N[piece.start : piece.stop])
    return out_N.view(base.shape)
