"""The expert actor: holds one frozen expert at a time on its device, and stores targets of calibration samples."""

from __future__ import annotations

from actors.process import ActorProcess, Report
from engine.calibration.samples import Sample
from engine.learning.frozen_expert import FrozenExpert
from engine.learning.targets import load_target, save_target
from engine.planning.plan import Plan
from engine.storage.folder import Folder


class Expert:
    """Computes targets with the expert of each sample. Has no state that a restart would lose.

    `index` is the actor's own number; `threads`: see `ActorProcess`.
    """

    def __init__(self, plan: Plan, index: int, threads: int | None = None) -> None:
        self._process = ActorProcess(f"expert {index}", threads)
        self._plan, self._forwards = plan, 0
        self._held: tuple[int, FrozenExpert] | None = None

    def target(self, sample: Sample, folder: Folder, name: str, inputs: str | None = None) -> int:
        """Compute the target of a sample and store it, unless an earlier attempt at the same call has stored it.

        Args:
            folder: The state folder of the run.
            name: File of the target in it.
            inputs: File of the sample's pixel inputs in it, if the sample has any.

        Returns:
            The size of the target's file in bytes.
        """
        if folder.exists(name):
            return folder.size(name)
        target = self._expert(sample.expert).target(sample, load_target(folder, inputs).inputs if inputs else None)
        self._forwards += 1
        return save_target(target, folder, name)

    def report(self) -> Report:
        """Return the memory figures of the process, and the number of forward passes."""
        return self._process.report(forwards=self._forwards)

    def _expert(self, index: int) -> FrozenExpert:
        # Loaded in a call and not in __init__: an error raised in a call reaches the driver unchanged.
        if self._held is None or self._held[0] != index:
            self._held = None  # freed first, so that memory never holds two experts
            self._held = index, FrozenExpert(self._plan, index, self._process.device)
        return self._held[1]
