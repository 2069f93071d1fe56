"""A merge by a learned method on a cluster: targets, stage 1, importance, stage 2, output.

Source: Expert Merging, arXiv 2509.25712. AdaMerging (arXiv 2310.02575) minimises an entropy and needs no targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cluster.attempt import Attempt
from cluster.crew import Crew
from cluster.placement import Devices, Seating, arrange, check_memory, machines
from cluster.progress import Progress
from cluster.session import await_layout, nodes
from cluster.stages import Stages
from cluster.targets import TargetComputation
from engine.calibration.samples import Sample
from engine.checkpoints.writer import OutputFile
from engine.learning.importance import stage_2_layout
from engine.learning.learner import first_stage, second_stage
from engine.output.merge_record import write_record
from engine.planning.disk import check_disk, disk_needs
from engine.planning.patience import patience
from engine.planning.plan import Plan
from engine.planning.scaling import Work
from engine.run.run_folder import RunFolder
from engine.shards.orthogonal import FOLDER, file_name
from engine.sizes import MATRICES_PER_CALL
from engine.task_vectors.coefficients import Array, Coefficients
from engine.task_vectors.streams import Inspection

Samples = Sequence[Sequence[Sample]]


class LearnedMerge(Attempt):
    """One attempt at a merge by a learned method."""

    def __init__(self, plan: Plan, samples: Samples, folder: RunFolder, progress: Progress, losses: int = 0) -> None:
        super().__init__(plan, folder, progress, losses)
        self.samples = samples

    def run(self) -> None:
        """Run the merge to its end, from the state in the run folder."""
        for s in (s for of_expert in self.samples for s in of_expert if s.cut):
            self.progress.say(f"{s.where}: cut to max_length {len(s.input_ids)}, {s.cut} tokens left out")
        if self.folder.computed():
            self.progress.say(self._resumed())
        with Crew(self.plan, self.folder.state, self._layout(), self.watch) as crew:
            trainer = crew.trainer() if crew.layout.beside else None
            targets = self._targets(crew)
            magnitudes = self._magnitudes(crew)
            digests = self.digests(crew.shards)
            if not crew.layout.overlap:
                targets.all_stored()
            # Without a seat of its own, the trainer starts after the experts.
            trainer = trainer or crew.trainer()
            training = Stages(self, self.samples, crew, trainer, targets)
            self.plan = training.find_prior()
            stages = [training.stage(first_stage(self.plan))]
            importance = None
            if self.plan.config.stages == 2:
                self.progress.phase("importance", 1)
                options = self.plan.config.parameters
                layout, importance = stage_2_layout(stages[0], magnitudes, options.budget, options.kappa)
                self.progress.advance("importance", 1)
                stages.append(training.stage(second_stage(self.plan, layout, stages[0])))
            self.report(trainer)
            crew.dismiss(trainer)
            self._write(crew, stages[-1])
            for shard in crew.shards:
                self.report(shard)
        metrics = self.folder.metrics()
        files = self.weight_files()
        self.folder.check_unchanged(self.plan)
        identity = self.folder.identity.encode()
        devices = self.folder.load_devices()
        write_record(self.folder.composed, self.plan, identity, digests, stages, importance, metrics, files, devices)
        self.reports[:0] = targets.reports
        self.finish(forwards=targets.before, target_bytes=targets.nbytes)

    def _resumed(self) -> str:
        """Return what this attempt goes on from: the stage and its step, and the targets and files that are kept."""
        work = Work.of(self.plan.config, [[len(sample.input_ids) for sample in mine] for mine in self.samples])
        number, state = 1, self.folder.load_stage(1)
        if state is not None and state.steps == work.steps and self.plan.config.stages == 2:
            number, state = 2, self.folder.load_stage(2)
        parts = [f"resuming at stage {number}, step {state.steps if state else 0} of {work.steps}"]
        if self.plan.config.has_targets:
            parts.append(f"{len(self.folder.stored_targets())} of {work.samples} targets kept")
        written = len(self.folder.written())
        if written:
            parts.append(f"{written} of {len(self.weight_files())} weight files kept")
        return "; ".join(parts)

    def _layout(self) -> Seating:
        """Return seats on the nodes that are alive, or that join within `cluster.wait` seconds."""
        config, kept = self.plan.config, self.folder.load_devices()
        work = Work.of(config, [[len(sample.input_ids) for sample in of_expert] for of_expert in self.samples])

        def find() -> tuple[Devices, Seating]:
            alive = nodes()
            devices = Devices.of(alive, config) if kept is None else Devices(**kept | {"kinds": tuple(kept["kinds"])})
            return devices, arrange(devices.among(alive), self.plan, work, devices)

        devices, layout = await_layout(find, config.cluster.wait, self.progress.say)
        check_memory(nodes(), self.plan, work, devices)
        tokens = [[sample.tokens for sample in of_expert] for of_expert in self.samples]
        check_disk(disk_needs(self.plan, tokens, layout.factored), self.folder.out)
        self.bound(patience(self.plan, machines(nodes(), config, devices), len(layout.shards), work))
        self.folder.keep_devices(asdict(devices))
        return layout

    def _targets(self, crew: Crew) -> TargetComputation:
        """Start the experts whose targets are not stored yet. A target is computed once in the life of a run."""
        wanted = self.samples if self.plan.config.has_targets else []
        stored = self._intact_targets(crew) if wanted else set()
        missing = [[sample for sample in samples if self.folder.target(sample) not in stored] for samples in wanted]
        self.progress.phase("targets", sum(map(len, wanted)), len(stored))
        targets = TargetComputation(self, crew, missing, len(stored))
        targets.nbytes += sum(map(self.folder.state.size, stored))
        return targets

    def _intact_targets(self, crew: Crew) -> set[str]:
        """Return the names of the stored targets, which the shards check. Damaged ones are removed."""
        stored = sorted(self.folder.stored_targets())
        if not stored:
            return set()
        ask = lambda shard, share: shard.damaged.remote(self.folder.state, share)  # noqa: E731
        damaged = self.dealt("checking targets", crew.shards, stored, ask)
        self.folder.forget([name for name in stored if damaged[name]], "the target is computed again")
        return {name for name in stored if not damaged[name]}

    def _magnitudes(self, crew: Crew) -> Array:
        """Return sₖ,ₗ = mean |τₖ,ₗ| of the merged tensors, [K, L]; with orthogonal task vectors, compute these first.

        Reads every weight of every model once.

        Raises:
            CheckpointError: a weight is not finite.
        """
        shape = (len(self.plan.experts), len(self.plan.merged))
        kept = self.folder.kept("magnitudes", shape, "the weights are read again")
        orthogonal = {file_name(name) for name in self.plan.orthogonal}
        if kept is not None and orthogonal <= self.folder.state.names(FOLDER):
            return kept
        names = list(self.plan.base_header.tensors)
        ask = lambda shard, share: shard.inspect.remote(share)  # noqa: E731
        inspections: dict[str, Inspection] = self.dealt("reading every weight once", crew.shards, names, ask)
        matrices = self.plan.orthogonal
        groups = [matrices[first : first + MATRICES_PER_CALL] for first in range(0, len(matrices), MATRICES_PER_CALL)]
        through = frozenset(crew.layout.factored)
        orthogonalise = lambda shard, group: shard.orthogonalise.remote(group, through.intersection(group))  # noqa: E731
        for done in self.spread("orthogonal task vectors", crew.shards, groups, orthogonalise) if groups else ():
            inspections |= done
        magnitudes = np.stack([inspections[name].magnitudes for name in self.plan.merged], axis=1)
        self.folder.keep("magnitudes", magnitudes)
        return magnitudes

    def _write(self, crew: Crew, coefficients: Coefficients) -> None:
        """Write the output's files on the shards, tensor by tensor, in the run's folder for the output."""
        self.folder.start_output(self.weight_files())

        def ask(shard: Any, file: OutputFile) -> Any:
            wanted = {t.name: coefficients.of(t.name) for t in file.tensors if t.name in self.plan.merged_set}
            return shard.write.remote(self.folder.weights, file, wanted)

        self.write_files(crew.shards, ask)
