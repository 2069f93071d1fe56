"""The expert actor: one frozen expert on its device; samples in, targets out. State and calls, no mathematics."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from actors.process import Process, Report
from engine.calibration import Sample
from engine.codec import Packed, pack_all
from engine.expert import FrozenExpert, save_target
from engine.plan import Plan


class Expert:
    """Expert `index` of the plan. It keeps nothing between samples, so it may be started again at any time."""

    def __init__(self, plan: Plan, index: int) -> None:
        self._process = Process(f"expert {plan.experts[index].name}")
        self._plan, self._index, self._forwards = plan, index, 0

    def target(self, sample: Sample, path: Path) -> tuple[int, dict[str, Packed]]:
        """The target of one sample and its bytes; also written to `path`, where it outlives process and node."""
        target = self._expert.target(sample)
        self._forwards += 1
        save_target(target, path)
        packed = pack_all(target.tensors())
        return sum(one.nbytes for one in packed.values()), packed

    def report(self) -> Report:
        """Memory, and how often the expert ran forward."""
        return self._process.report(forwards=self._forwards)

    @cached_property
    def _expert(self) -> FrozenExpert:
        # Loaded at the first call, not at the start: what a call raises reaches the driver as it is.
        return FrozenExpert(self._plan, self._index, self._process.device)
