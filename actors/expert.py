"""The expert actor: one expert at a time, whose weights it surveys, and which it runs on calibration samples.

It stores targets of samples, or statistics, or what calibrates a merged model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.gpus import NO_GPUS, Gpus
from actors.process import ActorProcess, Report, guarded
from engine.calibration.samples import Sample
from engine.compression.compressor import Compressor
from engine.correction.files import Contribution, LayerGroup
from engine.correction.rules import Rule
from engine.correction.streams import Streams, given_of, solve_group
from engine.learning.frozen_expert import FrozenExpert
from engine.learning.statistics import collect
from engine.learning.targets import load_target, save_target
from engine.machine import usable_cpus
from engine.methods.options import Statistic
from engine.models.devices import Room, give_back, release
from engine.planning.plan import Plan
from engine.shards.parts import Surveyed
from engine.shards.survey import Survey
from engine.statistics.files import HEADER
from engine.storage.folder import Folder


class Expert:
    """Surveys experts and computes targets with the expert of each sample. A restart loses nothing that is needed.

    `index` is the actor's own number; `threads` and `gpus`: see `ActorProcess`.
    """

    def __init__(self, plan: Plan, index: int, threads: int | None = None, gpus: Gpus = NO_GPUS) -> None:
        self._process = ActorProcess(f"expert {index}", threads, gpus)
        self._plan, self._forwards, self._by_lapack = plan, 0, 0
        self._held: tuple[int | None, FrozenExpert] | None = None
        self._survey: Survey | None = None
        self._streams: Streams | None = None
        self._compressor: Compressor | None = None

    @guarded
    def ready(self, wanted: float) -> tuple[int, ...]:
        """Return the free bytes of each GPU of the seat, as soon as they are `wanted`; see `ActorProcess.free`."""
        return self._process.free(wanted)

    @guarded
    def survey(self, index: int, groups: Sequence[int], folder: Folder) -> dict[int, Surveyed]:
        """Read these groups of an expert's tensors once, store what they give in the state, and return it by group.

        Raises:
            CheckpointError: a weight is not finite.
        """
        if self._survey is None or self._survey.index != index:
            self.forget()
            self._survey = Survey(self._plan, index, self._process.device, usable_cpus())
        before = len(self._survey.by_lapack)
        surveyed = self._survey.read(groups, folder)
        self._by_lapack += len(self._survey.by_lapack) - before
        return surveyed

    @guarded
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

    @guarded
    def statistics(
        self,
        index: int | None,
        samples: Sequence[tuple[Sample, str | None]],
        kinds: Sequence[Statistic],
        state: Folder,
        name: str,
        facts: Mapping[str, Any],
    ) -> None:
        """Collect the statistics of an expert, or of the base (None), unless an earlier attempt at the call has.

        Args:
            index: The expert.
            samples: The samples, each with the file of its pixel inputs in the state, if it has any.
            kinds: What is collected.
            state: The state folder of the run.
            name: The folder in it.
            facts: See `engine.learning.statistics.collect`.
        """
        folder = state.child(name)
        if folder.exists(HEADER):
            return
        given = [(sample, load_target(state, inputs).inputs if inputs else {}) for sample, inputs in samples]
        training = None if index is None else self._plan.config.models[index].optimizer_state
        collect(self._expert(index), given, kinds, folder, facts, None if training is None else Path(training))
        self._forwards += len(given)

    @guarded
    def contribute(
        self, index: int, part: int, samples: Sequence[tuple[Sample, str | None]], rule: Rule, state: Folder
    ) -> Contribution:
        """Store the shares of an expert in the equations of a part of the merged model; see `Streams.contribute`.

        Args:
            index: The expert.
            part: The part.
            samples: The expert's samples, each with the file of its pixel inputs in the state, if it has any.
            rule: How layers are solved.
            state: The state folder of the run.
        """
        if self._streams is None or self._streams.index != index:
            self.forget()
            own, files = zip(*samples, strict=True)
            inputs = [load_target(state, name).inputs if name else {} for name in files]
            given = given_of(own, inputs, index, state, lambda: self._expert(index))
            self.forget()  # the expert that has generated responses
            self._streams = Streams(self._plan, rule, index, given, state, self._process.device)
        contribution = self._streams.contribute(part)
        self._forwards += len(samples)
        return contribution

    @guarded
    def solve(self, part: int, group: LayerGroup, experts: Sequence[int], rule: Rule, state: Folder) -> None:
        """Solve layers of a part from the shares of experts; see `solve_group`."""
        solve_group(self._plan, rule, part, group, experts, state)

    @guarded
    def compress(self, part: int, samples: Sequence[Sample], state: Folder) -> int:
        """Compress the layer of experts of a part of the base, and return the number of parts; see `Compressor`."""
        if self._compressor is None:
            self.forget()
            given = given_of(samples, [{}] * len(samples), 0, state, lambda: self._expert(None))
            self._compressor = Compressor(self._plan, given, state, self._process.device)
        self._compressor.compress(part)
        self._forwards += len(samples)
        return self._compressor.parts

    def report(self) -> Report:
        """Return the memory figures, the forward passes, and the number of decompositions that LAPACK had to make."""
        return self._process.report(forwards=self._forwards, by_lapack=self._by_lapack)

    def forget(self) -> None:
        """Drop the expert that is held, and its survey, and free their memory."""
        if self._held is not None:
            release(self._held[1].model)
        self._held = self._survey = self._streams = self._compressor = None
        give_back()

    def _expert(self, index: int | None) -> FrozenExpert:
        # Loaded in a call and not in __init__: an error raised in a call reaches the driver unchanged.
        if self._held is None or self._held[0] != index:
            self.forget()  # first, so that memory never holds two experts
            device, *others = self._process.devices
            self._held = index, FrozenExpert(self._plan, index, device, Room(tuple(others)))
        return self._held[1]
