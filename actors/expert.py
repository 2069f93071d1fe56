"""The expert actor: one frozen expert after the other on its device; samples in, targets out. No mathematics."""

from __future__ import annotations

from actors.process import ActorProcess, Report
from engine.calibration.samples import Sample
from engine.learning.frozen_expert import FrozenExpert
from engine.learning.targets import load_target, save_target
from engine.planning.plan import Plan
from engine.storage.folder import Folder


class Expert:
    """Whichever expert a sample is of. It keeps nothing that counts, so it may be started again at any time."""

    def __init__(self, plan: Plan, index: int) -> None:
        self._process = ActorProcess(f"expert {index}")
        self._plan, self._forwards = plan, 0
        self._held: tuple[int, FrozenExpert] | None = None

    def target(self, sample: Sample, folder: Folder, name: str, inputs: str | None = None) -> int:
        """Write the target of one sample to `name` in the folder, where it outlives process and node; its file `inputs`
        there, if it has one, holds what the sample has beside its tokens.

        Returns its bytes. A target that is there already is that of an earlier try of the same call.
        """
        if folder.exists(name):
            return folder.size(name)
        target = self._expert(sample.expert).target(sample, load_target(folder, inputs).inputs if inputs else None)
        self._forwards += 1
        return save_target(target, folder, name)

    def report(self) -> Report:
        """Memory, and how often the expert ran forward."""
        return self._process.report(forwards=self._forwards)

    def _expert(self, index: int) -> FrozenExpert:
        # Loaded by a call, not at the start: what a call raises reaches the driver as it is.
        if self._held is None or self._held[0] != index:
            self._held = None  # first, so that there are never two
            self._held = index, FrozenExpert(self._plan, index, self._process.device)
        return self._held[1]
