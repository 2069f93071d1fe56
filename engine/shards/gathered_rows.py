"""Tensors with a row per token, in the order of the output's tokens: rows of base and experts, gathered block by block.

No tensor is put together as a whole. Letters: R rows of the output, H elements of a row, N elements of a range of the
flattened tensor, n rows of a range, M models (the base and the experts).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.checkpoints.vocabulary import FILLED, MEAN, ZERO, Vocabulary
from engine.sizes import BLOCK
from engine.task_vectors.experts import AdapterExpert, CheckpointWithAdapter, ExpertWeights
from engine.task_vectors.kinds import FromOperand, Operand, TaskVector, as_operand

Indices = npt.NDArray[np.int64]


class GatheredRows:
    """One tensor of the base and of each expert, with the rows of a vocabulary.

    Args:
        vocabulary: The vocabulary.
        name: The tensor's name.
        base: The base's own tensor.
        experts: The experts.
    """

    def __init__(self, vocabulary: Vocabulary, name: str, base: Tensor, experts: Sequence[ExpertWeights]) -> None:
        width = base[0].numel()
        self._sources, in_base_rows = [_Rows(base.reshape(-1, width), None)], set()
        for model, expert in enumerate(experts, 1):
            # All of an adapter comes on top of the base, whole tensors included.
            own_N = None if isinstance(expert, AdapterExpert) else expert.stored(name)
            adapter = expert.adapter if isinstance(expert, CheckpointWithAdapter) else expert
            added = adapter.task_vector(name) if isinstance(adapter, AdapterExpert) else None
            if own_N is None:
                in_base_rows.add(model)
            self._sources.append(_Rows((base if own_N is None else own_N).reshape(-1, width), added))
        self._unchanged = {model for model in in_base_rows if self._sources[model].added is None}
        self._gather = vocabulary.gather(in_base_rows)
        self._shape, self.dtype = (vocabulary.rows, *base.shape[1:]), base.dtype
        self._filled: dict[int, Tensor] = {}
        self._filling = threading.Lock()

    @property
    def base(self) -> Tensor:
        """The base's tensor, of which elements are computed where they are read."""
        return cast(Tensor, _Lazy(self, self._shape))

    @property
    def task_vectors(self) -> list[TaskVector | None]:
        """τₖ of every expert; None if its tensor equals the base's."""
        experts = range(1, len(self._sources))
        return [None if model in self._unchanged else _Gathered(self, model) for model in experts]

    def read(self, model: int, start: int, stop: int, out_N: Tensor) -> None:
        """Write elements `start` to `stop` of a model's flattened tensor to `out_N` [N], float32."""
        width = self._sources[0].own_RH.shape[1]
        first, last = start // width, -(-stop // width)
        rows_nH = self._rows(model, first, last)
        out_N.copy_(rows_nH.reshape(-1)[start - first * width : stop - first * width])

    def _rows(self, model: int, first: int, last: int, padded: bool = True) -> Tensor:
        """Return rows `first` to `last` of a model, [n, H] float32; without `padded`, those of no token are zero."""
        gather, width = self._gather, self._sources[0].own_RH.shape[1]
        own_n, model_n = gather.own_MR[model, first:last], gather.model_R[first:last]
        out_nH = torch.zeros(last - first, width)
        self._sources[model].put(out_nH, np.flatnonzero(own_n >= 0), own_n)
        other_n = np.where(own_n < 0, model_n, ZERO)
        for donor in np.unique(other_n):
            chosen = np.flatnonzero(other_n == donor)
            if donor == MEAN:
                out_nH[chosen] = self._mean(chosen + first)
            elif donor == FILLED and padded:
                out_nH[chosen] = self._fill(model)
            elif donor >= 0:
                self._sources[donor].put(out_nH, chosen, gather.row_R[first:last])
        return out_nH

    def _mean(self, rows: Indices) -> Tensor:
        """Return the mean of rows over the models that have them, [n, H] float32, summed in the order of the models."""
        sum_nH = torch.zeros(len(rows), self._sources[0].own_RH.shape[1])
        count_n1 = torch.zeros(len(rows), 1)
        for model in self._gather.counted:
            own_n = self._gather.own_MR[model][rows]
            chosen = np.flatnonzero(own_n >= 0)
            part_nH = torch.zeros_like(sum_nH)
            self._sources[model].put(part_nH, chosen, own_n)
            sum_nH += part_nH
            count_n1[chosen] += 1
        return sum_nH / count_n1

    def _fill(self, model: int) -> Tensor:
        """Return the mean of a model's rows that belong to tokens, [H] float32; it is computed once."""
        with self._filling:
            if model not in self._filled:
                rows, width = len(self._gather.model_R), self._sources[0].own_RH.shape[1]
                size, total_H = max(1, BLOCK // width), torch.zeros(width, dtype=torch.float64)
                for first in range(0, rows, size):
                    total_H += self._rows(model, first, min(first + size, rows), padded=False).sum(
                        0, dtype=torch.float64
                    )
                count = int((self._gather.model_R != FILLED).sum())
                self._filled[model] = (total_H / count).float()
            return self._filled[model]


@dataclass(frozen=True)
class _Rows:
    """A model's own tensor [R, H], in its file's dtype and order of rows, and what an adapter adds to it."""

    own_RH: Tensor
    added: TaskVector | None

    def put(self, out_nH: Tensor, places: Indices, row_n: npt.NDArray[np.int32]) -> None:
        """Write row `row_n[place]` of this tensor to each of the places of `out_nH`, float32."""
        if not len(places):
            return
        rows = row_n[places]
        first, count = int(rows[0]), len(places)
        together = np.array_equal(rows, np.arange(first, first + count)) and places[-1] - places[0] == count - 1
        if together and self.added is None:  # most blocks; without a copy in between
            out_nH[places[0] : places[-1] + 1] = self.own_RH[first : first + count]
            return
        found_nH = self.own_RH[torch.from_numpy(rows.astype(np.int64))].float()
        if self.added is not None:
            width = self.own_RH.shape[1]
            # A task vector is read in ranges, and the rows of most tokens are together in both vocabularies.
            for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1):
                own_N, start = found_nH[part[0] : part[-1] + 1].reshape(-1), int(rows[part[0]]) * width
                added_N = torch.empty_like(own_N)
                self.added.block(start, start + len(own_N), own_N, added_N)
                own_N += added_N
        out_nH[torch.from_numpy(places)] = found_nH


class _Gathered(FromOperand):
    """τ of a model's gathered tensor."""

    def __init__(self, rows: GatheredRows, model: int) -> None:
        self._rows, self._model = rows, model

    def operand(self, start: int, stop: int, buffer_N: Tensor) -> Operand:
        self._rows.read(self._model, start, stop, buffer_N)
        return as_operand(buffer_N)


class _Lazy:
    """The base's gathered tensor, as far as the arithmetic reads one: its shape and dtype, and ranges of elements."""

    is_meta = False

    def __init__(self, rows: GatheredRows, shape: Sequence[int]) -> None:
        self._rows, self.shape, self.dtype = rows, torch.Size(shape), rows.dtype

    def is_floating_point(self) -> bool:
        return True

    def numel(self) -> int:
        return self.shape.numel()

    def reshape(self, shape: int) -> _Lazy:
        assert shape == -1
        return _Lazy(self._rows, [self.numel()])

    def float(self) -> Tensor:
        """Return the whole tensor, float32, for methods that need it."""
        return self[0 : self.numel()].view(self.shape)

    def __getitem__(self, elements: slice) -> Tensor:
        """Return a range of the flattened tensor, float32."""
        out_N = torch.empty(elements.stop - elements.start)
        self._rows.read(0, elements.start, elements.stop, out_N)
        return out_N
