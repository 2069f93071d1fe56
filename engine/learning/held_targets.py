"""The targets of a trainer's samples: fetched ahead and, on a GPU, kept between epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.codec import Packed, unpack_all
from engine.learning.targets import Target
from engine.sizes import TARGET_BYTES
from engine.transfers import to_gpu

# The expert and the index of a sample.
Key = tuple[int, int]


class HeldTargets:
    """Fetches targets by their references.

    Token ids and positions stay on the CPU, where they are looked at. On a CPU, no target is kept.

    Args:
        pull: Fetches the tensors of a target by its reference.
        device: The device of the student.
        room: Bytes of targets that are kept.
    """

    def __init__(
        self, pull: Callable[[Any], Mapping[str, Packed]], device: torch.device, room: int = TARGET_BYTES
    ) -> None:
        self._pull, self._device = pull, device
        self._room = 0 if device.type == "cpu" else room
        self._kept: dict[Key, Target] = {}
        self._ahead: dict[Key, Future[Target]] = {}
        self._thread = ThreadPoolExecutor(1, "targets")

    def get(self, key: Key, reference: Any) -> Target:
        """Return the target of a sample."""
        if key in self._kept:
            return self._kept[key]
        ahead = self._ahead.pop(key, None)
        target = self._fetch(reference) if ahead is None else ahead.result()
        nbytes = sum(tensor.nbytes for tensor in target.tensors().values())
        if nbytes <= self._room:
            self._room -= nbytes
            self._kept[key] = target
        return target

    def prepare(self, wanted: Mapping[Key, Any]) -> None:
        """Start to fetch targets, given by their references. An error is raised when the target is used."""
        for key, reference in wanted.items():
            if key not in self._kept and key not in self._ahead:
                self._ahead[key] = self._thread.submit(self._fetch, reference)

    def _fetch(self, reference: Any) -> Target:
        tensors = unpack_all(self._pull(reference))
        if self._device.type == "cpu":
            # Cloned: the alignment of a received buffer varies, and the last bit of a matrix product depends on it.
            return Target.from_tensors({name: tensor.clone() for name, tensor in tensors.items()})
        target = Target.from_tensors(tensors)
        return replace(
            target,
            hidden_CH={layer: to_gpu(tensor, self._device) for layer, tensor in target.hidden_CH.items()},
            last_hidden_CH=self._moved(target.last_hidden_CH),
            logits_CV=self._moved(target.logits_CV),
            inputs={name: to_gpu(tensor, self._device) for name, tensor in target.inputs.items()},
        )

    def _moved(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else to_gpu(tensor, self._device)
