"""A part of the house that has no words of its own yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.attempt import Attempt
from cluster.crew import Crew
from cluster.placement import Devices, Seating, arrange, check_memory
from cluster.progress import Progress
from cluster.session import await_layout, nodes
from cluster.stages import Stages
from cluster.targets import TargetComputation
from engine.calibration.samples import Sample
from engine.checkpoints.writer import OutputFile
from engine.learning.importance import stage_2_layout
from engine.learning.learner import first_stage, second_stage
from engine.output.merge_record import write_record
from engine.planning.plan import Plan
from engine.planning.scaling import Work
from engine.run.run_folder import RunFolder
from engine.sizes import MATRICES_PER_CALL
from engine.task_vectors.coefficients import Array, Coefficients
from engine.task_vectors.streams import Inspection

Samples = Sequence[Sequence[Sample]]


class LearnedMerge(Attempt):
    """One attempt at a merge by a method that learns coefficients."""

    def __init__(self, plan: Plan, samples: Samples, folder: RunFolder, progress: Progress) -> None:
        super().__init__(plan, folder, progress)
        self.samples = samples

    def run(self, plan_identity: str) -> None:
        """The whole algorithm."""
        for s in (s for mine in self.samples for s in mine if s.cut):
            self.progress.say(f"{s.where}: cut to max_length {len(s.input_ids)}, {s.cut} tokens left out")
        with Crew(self.plan, self.folder.state, self._layout(), self.watch) as crew:
            trainer = crew.trainer() if crew.layout.beside else None
            targets = self._targets(crew)
            magnitudes = self._magnitudes(crew)
            if not crew.layout.overlap:
                targets.all_stored()
            trainer = trainer or crew.trainer()
            learning = Stages(self, self.samples, crew, trainer, targets)
            self.plan = learning.find_prior()
            stages = [learning.stage(first_stage(self.plan))]
            importance = None
            if self.plan.config.stages == 2:
                self.progress.phase("importance", 1)
                options = self.plan.config.parameters
                layout, importance = stage_2_layout(stages[0], magnitudes, options.budget, options.kappa)
                self.progress.advance("importance", 1)
                stages.append(learning.stage(second_stage(self.plan, layout, stages[0])))
            self.report(trainer)
            crew.dismiss(trainer)
            self._write(crew, stages[-1])
            digests = self.digests(crew.shards)
            for shard in crew.shards:
                self.report(shard)
        metrics = self.folder.metrics()
        write_record(self.folder.composed, self.plan, plan_identity, digests, stages, importance, metrics)
        self.reports[:0] = targets.reports
        self.finish(forwards=targets.before, target_bytes=targets.nbytes)

    def _layout(self) -> Seating:
        """Seats on the nodes that there are, or that come within `cluster.wait` seconds."""
        config, kept = self.plan.config, self.folder.kept("devices")
        work = Work.of(config, [[len(sample.input_ids) for sample in mine] for mine in self.samples])

        def find() -> tuple[Devices, Seating]:
            there = nodes()
            devices = Devices.of(there, config) if kept is None else Devices(*map(float, kept))
            return devices, arrange(there, self.plan, work, devices)

        devices, layout = await_layout(find, config.cluster.wait, self.progress.say)
        check_memory(nodes(), self.plan, work, devices)
        self.folder.keep("devices", np.array([devices.trainer, devices.expert]))
        return layout

    def _targets(self, crew: Crew) -> TargetComputation:
        """The targets, each computed once in the life of a run; experts are at work on those that are not there."""
        wanted = self.samples if self.plan.config.has_targets else []
        there = self.folder.stored_targets() if wanted else set()
        missing = [[sample for sample in mine if self.folder.target(sample) not in there] for mine in wanted]
        self.progress.phase("targets", sum(map(len, wanted)), len(there))
        targets = TargetComputation(self, crew, missing, len(there))
        targets.nbytes += sum(map(self.folder.state.size, there))
        return targets

    def _magnitudes(self, crew: Crew) -> Array:
        """sₖ,ₗ = mean |τₖ,ₗ| [K, L] of the merged tensors; every weight of every model is read, and must be finite.

        Where task vectors are to be orthogonal they are made so here, and it is these that are measured.
        """
        kept = self.folder.kept("magnitudes")
        if kept is not None:
            return kept
        names = list(self.plan.base_header.tensors)
        ask = lambda shard, mine: shard.inspect.remote(mine)  # noqa: E731
        found: dict[str, Inspection] = self.dealt("reading every weight once", crew.shards, names, ask)
        matrices = self.plan.orthogonal
        some = [matrices[first : first + MATRICES_PER_CALL] for first in range(0, len(matrices), MATRICES_PER_CALL)]
        make = lambda shard, names: shard.orthogonalise.remote(names)  # noqa: E731
        for made in self.spread("orthogonal task vectors", crew.shards, some, make) if some else ():
            found |= made
        magnitudes = np.stack([found[name].magnitudes for name in self.plan.merged], axis=1)
        self.folder.keep("magnitudes", magnitudes)
        return magnitudes

    def _write(self, crew: Crew, coefficients: Coefficients) -> None:
        """The output by the shards, tensor by tensor, in a folder that is not the output yet."""
        self.folder.start_output()

        def ask(shard: Any, file: OutputFile) -> Any:
            wanted = {t.name: coefficients.of(t.name) for t in file.tensors if t.name in self.plan.merged_set}
            return shard.write.remote(self.folder.weights, file, wanted)

        self.write_files(crew.shards, ask)
