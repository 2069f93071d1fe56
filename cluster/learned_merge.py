"""A merge by a learned method on a cluster: targets, stage 1, importance, stage 2, output.

Source: Expert Merging, arXiv 2509.25712. AdaMerging (arXiv 2310.02575) minimises an entropy and needs no targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from cluster.attempt import Attempt
from cluster.by_blocks import solve_blocks
from cluster.crew import Crew
from cluster.placement import Devices, check_memory, machines
from cluster.progress import Progress
from cluster.ray_watch import RayWatch
from cluster.readiness import Readiness
from cluster.seats import Seating
from cluster.session import nodes
from cluster.stages import Stages
from cluster.statistics import collect_statistics
from cluster.targets import SURVEY, TargetComputation
from cluster.trainer_seats import arrange_trainers
from cluster.trainers import Trainers
from engine.calibration.samples import Sample
from engine.checkpoints.writer import OutputFile
from engine.correction.rules import rule_of
from engine.errors import GpuMemoryError
from engine.learning.end_check import distances, lost_lines
from engine.learning.importance import stage_2_layout
from engine.learning.learner import first_stage, second_stage, with_priors
from engine.output.merge_record import write_record
from engine.planning.costs.disk import check_disk, disk_needs
from engine.planning.costs.patience import patience
from engine.planning.costs.scaling import Work
from engine.planning.costs.trainers import with_gradients
from engine.planning.factors import decomposed, directions
from engine.planning.open_models import weight_files
from engine.planning.plan import Plan
from engine.planning.schedule import CPU_TOKENS
from engine.run.inputs import identity
from engine.run.keys import Computing, Keys
from engine.run.run_folder import RunFolder
from engine.shards.parts import PARTS, tensor_groups
from engine.statistics.fits import Fits, described, starting_coefficients
from engine.task_vectors.coefficients import Array, Coefficients
from engine.task_vectors.streams import Inspection

Samples = Sequence[Sequence[Sample]]


class LearnedMerge(Attempt):
    """One attempt at a merge by a learned method."""

    def __init__(self, plan: Plan, samples: Samples, folder: RunFolder, progress: Progress, losses: int = 0) -> None:
        super().__init__(plan, folder, progress, RayWatch(progress.say), losses)
        self.samples = samples

    def run(self) -> None:
        """Run the merge to its end, from the state in the run folder."""
        for s in (s for of_expert in self.samples for s in of_expert if s.cut):
            self.progress.say(f"{s.where}: cut to max_length {len(s.input_ids)}, {s.cut} tokens left out")
        if self.folder.computed():
            self.progress.say(self._resumed())
        seats = self._layout()
        try:
            self._merge(seats)
        except GpuMemoryError as error:
            raise self._readiness.advised(error) from error

    def _merge(self, seats: Seating) -> None:
        """Compute and write the result with actors in these seats."""
        computing, reuse = Computing(asdict(self._readiness.devices), seats.factored), self.folder.reuse
        reuse.bring(Keys(self.plan, self.folder.identity), self.samples, computing)
        if reused := reuse.said():
            self.progress.say(reused)
        try:
            self._compute(seats, computing)
        finally:
            # Also after an error or a stop: another merge may need what is complete.
            if not self.folder.identity.changed_files(identity(self.plan)):
                reuse.keep(Keys(self.plan, self.folder.identity), self.samples, computing)
        self._record()

    def _compute(self, seats: Seating, computing: Computing) -> None:
        """Learn the coefficients, and write the weights."""
        with Crew(self.plan, self.folder.state, seats, self.watch) as crew:
            trainer = None if self._in_turns else crew.trainer()
            asked = self._ask(trainer)
            kept = self._kept_magnitudes()
            self._targets = targets = self._experts(crew, survey=kept is None)
            self._check(asked)
            targets.begin()
            magnitudes = self._magnitudes(crew, targets) if kept is None else kept
            self._digests = self.digests(crew.shards)
            if self.plan.config.statistics or self.plan.config.statistics_of_base:
                targets.all_stored()
                collect_statistics(self, crew, self.samples, self._digests)
            self._fits = fits = self._fit_layers(crew)
            if not crew.layout.overlap:
                targets.all_stored()
            # Without a seat of its own, the trainer starts after the experts.
            if trainer is None:
                trainer = crew.trainer()
                self._check(self._ask(trainer))
            trainers = Trainers(self, crew, targets, trainer)
            training = Stages(self, self.samples, trainers, targets, computing)
            training.preflight()
            priors, start = starting_coefficients(fits)
            self.plan = with_priors(self.plan, priors) if fits else training.find_prior()
            self._stages = [training.stage(first_stage(self.plan, start))]
            self._importance = None
            if self.plan.config.stages == 2:
                self.progress.phase("importance", 1)
                options = self.plan.config.parameters
                along, each = directions(self.plan), options.chunks == "direction"
                first = self._stages[0]
                layout, importance = stage_2_layout(first, magnitudes, options.budget, options.kappa, along, each)
                self._importance = importance
                self.progress.advance("importance", 1)
                self._stages.append(training.stage(second_stage(self.plan, layout, first)))
            self._checked = training.end_check(self._stages[-1])
            trainers.end()
            self._write(crew, self._stages[-1])
            for shard in crew.shards:
                self.report(shard)

    def _record(self) -> None:
        """Write the record of the merge, and complete the output."""
        metrics = self.folder.metrics()
        files = self.weight_files()
        self.folder.check_unchanged(self.plan)
        encoded, devices = self.folder.identity.encode(), self.folder.load_devices()
        results = self._digests, self._stages, self._importance, metrics, files, devices, self._fits, self._checked
        write_record(self.folder.composed, self.plan, encoded, *results)
        self.reports[:0] = self._targets.reports
        by_lapack = sum(report.counts.get("by_lapack", 0) for report in self.reports)
        if by_lapack:
            self.progress.say(f"matrix products did not converge for {by_lapack} matrices, which LAPACK decomposed")
        self.finish(forwards=self._computed, target_bytes=self._targets.nbytes)
        for line in lost_lines(distances(self._checked), self.plan) if self._checked is not None else ():
            self.progress.say(line)

    def _resumed(self) -> str:
        """Return what this attempt goes on from: the stage and its step, and the targets and files that are kept."""
        work = Work.of(self.plan.config, self._tokens, CPU_TOKENS)  # any limit: only the number of steps is used
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

        def find() -> tuple[Devices, Seating]:
            alive = nodes()
            if kept is None:
                devices = Devices.of(alive, config, self._tokens)
            else:
                devices = Devices(**kept | {"kinds": tuple(kept["kinds"])})
            return devices, arrange_trainers(devices.among(alive), self.plan, self._work(devices), devices)

        devices, layout = self.await_layout(find)
        devices = replace(devices, gradients=layout.gradients, logit_bytes=layout.logit_bytes)
        plan, work = with_gradients(self.plan, layout.gradients), self._work(devices)
        asked, trainers = config.cluster.trainers, 1 + len(layout.others)
        if asked != "auto" and asked > trainers:
            self.progress.say(
                f"of {asked} trainers, {trainers} have a seat and passes (`gradients: {plan.config.gradients}`)"
            )
        there = nodes()
        check_memory(there, plan, work, devices)
        stored = self.folder.has_task_vectors(self.plan)
        check_disk(disk_needs(self.plan, self._tokens, layout.factored, stored), self.folder.out)
        estimated = machines(there, config, devices)
        self.bound(patience(plan, estimated, len(layout.shards), work, self._tokens))
        keep: Callable[[Devices], None] = lambda devices: self.folder.keep_devices(asdict(devices))  # noqa: E731
        keep(devices)
        begun = self.folder.computed()
        self._readiness = Readiness(plan, work, estimated, devices.among(there), devices, keep, begun)
        self._in_turns = not layout.beside or layout.at_home > 0
        return layout

    @property
    def _tokens(self) -> list[list[int]]:
        return [[sample.tokens for sample in of_expert] for of_expert in self.samples]

    def _work(self, devices: Devices) -> Work:
        return Work.of(self.plan.config, self._tokens, devices.batch_tokens)

    def _ask(self, trainer: Any) -> Any:
        """Ask the trainer, if there is one with GPUs, whether these have the memory that it needs; see `_check`."""
        asked = trainer is not None and self._readiness.devices.trainer > 0
        return trainer.ready.remote(self._readiness.wanted("trainer")) if asked else None

    def _check(self, asked: Any) -> None:
        """Check the answer of the trainer.

        Raises:
            MoreGpus, ClusterError: See `Readiness.check`.
        """
        if asked is not None:
            self._readiness.check("trainer", self.watch.answer(asked, "starting the trainer"))

    def _check_expert(self, free: Sequence[int]) -> None:
        """Check that an expert fits its GPUs, and the trainer too if it starts on these after the experts."""
        self._readiness.check("expert", free)
        if self._in_turns:
            self._readiness.check("trainer", free)

    def _experts(self, crew: Crew, survey: bool) -> TargetComputation:
        """Start the experts whose targets are not stored yet, or, with `survey`, that are not wholly surveyed yet.

        A target is computed once in the life of a run.
        """
        wanted = self.samples if self.plan.config.has_targets else []
        stored = self._intact_targets(crew) if wanted else set()
        self._computed = len(stored.difference(self.folder.reused().get("targets", [])))
        missing = [[sample for sample in samples if self.folder.target(sample) not in stored] for samples in wanted]
        surveyed = self.folder.surveyed(self.plan) if survey else {}
        groups = range(len(tensor_groups(self.plan)) if survey else 0)
        unread = [[group for group in groups if (k, group) not in surveyed] for k in range(len(self.plan.experts))]
        if survey:
            self.progress.phase(SURVEY, len(groups) * len(unread), len(surveyed))
        self.progress.phase("targets", sum(map(len, wanted)), len(stored))
        needed = self._readiness.wanted("expert")
        targets = TargetComputation(self, crew, missing, len(stored), unread, surveyed, needed, self._check_expert)
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

    def _kept_magnitudes(self) -> Array | None:
        """Return the magnitudes that an earlier start stored, if the orthogonal task vectors are stored, too."""
        shape = (len(self.plan.experts), len(self.plan.merged))
        kept = self.folder.kept("magnitudes", shape, "the weights are read again")
        return kept if self.folder.has_task_vectors(self.plan) else None

    def _magnitudes(self, crew: Crew, targets: TargetComputation) -> Array:
        """Return sₖ,ₗ = mean |τₖ,ₗ| of the merged tensors, [K, L]; with orthogonal task vectors, compute these first.

        The shards read the base while the experts are surveyed. What is read is hashed, too.

        Raises:
            CheckpointError: a weight is not finite.
        """
        files = [file.address for file in weight_files(self.plan.base)]
        check = lambda shard, share: shard.check_base.remote(share)  # noqa: E731
        digests: dict[str, str] = self.dealt("reading the base", crew.shards, files, check)
        surveyed, groups = targets.surveyed(), tensor_groups(self.plan)
        found = {name: np.zeros(len(self.plan.experts)) for group in groups for name in group}
        for (k, group), record in surveyed.items():
            digests |= record.digests
            for name, magnitude in zip(groups[group], record.magnitudes, strict=True):
                found[name][k] = magnitude
        self.folder.check_unchanged(self.plan, digests)
        found |= {name: one.magnitudes for name, one in self._orthogonal(crew, targets, groups).items()}
        magnitudes = np.stack([found[name] for name in self.plan.merged], axis=1)
        self.folder.keep("magnitudes", magnitudes)
        return magnitudes

    def _orthogonal(
        self, crew: Crew, targets: TargetComputation, groups: Sequence[Sequence[str]]
    ) -> dict[str, Inspection]:
        """Store the task vectors of all matrices (`orthogonalise`), group by group, and return their statistics.

        This runs on the shards. If the experts compute on GPUs, it runs in their seats when these are free.
        """
        wanted = frozenset(decomposed(self.plan))
        matrices = [some for group in groups if (some := [name for name in group if name in wanted])]
        if not matrices:
            return {}
        workers = crew.shards
        if any(seat.gpus for seat in crew.layout.experts):
            targets.all_stored()
            workers = crew.shards_of_experts(len(matrices))
        through = frozenset(crew.layout.factored)
        ask = lambda shard, names: shard.orthogonalise.remote(names, through.intersection(names))  # noqa: E731
        phase = "singular directions"
        if self.plan.orthogonal:
            shares = self.plan.config.parameters.task_vectors == "swudi"
            phase = "task vectors of SWUDI" if shares else "orthogonal task vectors"
        done = self.spread(phase, workers, matrices, ask)
        for shard in workers if workers is not crew.shards else ():
            self.report(shard)
            crew.dismiss(shard)
        self.folder.state.remove(PARTS)
        return {name: inspection for group in done for name, inspection in group.items()}

    def _fit_layers(self, crew: Crew) -> Fits:
        """Return the coefficients of the layers by the experts' statistics (`weight: closed_form`); else none."""
        if not self.plan.config.closed_form:
            return {}
        ask = lambda shard, names: shard.fit.remote(names)  # noqa: E731
        parts = self.spread("fitting layers", crew.shards, tensor_groups(self.plan), ask)
        found = {name: fit for part in parts for name, fit in part.items()}
        fits = {name: found[name] for name in self.plan.merged if name in found}
        self.progress.say(described(fits))
        return fits

    def _write(self, crew: Crew, coefficients: Coefficients) -> None:
        """Write the output's files on the shards, tensor by tensor, in the run's folder for the output."""
        rule = rule_of(self.plan)
        folder = self.folder.weights if rule is None else self.folder.state

        def ask(shard: Any, file: OutputFile) -> Any:
            wanted = {t.name: coefficients.of(t.name) for t in file.tensors if t.name in self.plan.merged_set}
            return shard.write.remote(folder, file, wanted)

        if rule is not None:
            solve_blocks(self, crew, self.samples, rule, ask)
        self.folder.start_output(self.weight_files())
        self.write_files(crew.shards, ask if rule is None else self.write_solved)
