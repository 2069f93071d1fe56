"""The algorithm over the cluster: targets, stage 1, importance, stage 2, write. Holds references and small tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.trainer import WindowSample
from cluster.combine import Combine
from cluster.crew import Crew, stored_target
from cluster.placement import arrange, place_shards
from cluster.progress import Progress, step_note
from cluster.run import Run
from cluster.session import answer, connect, nodes
from engine.calibration import Sample, needs_tokenizer, read_records, tokenize, training_order, windows
from engine.checkpoint import open_base
from engine.codec import Packed, pack_all
from engine.coefficients import Array, Coefficients
from engine.expert import Target
from engine.importance import stage_2_layout
from engine.model import build_skeleton, load_tokenizer
from engine.plan import Plan
from engine.record import write_record
from engine.run_folder import RunFolder, StageState, check_output, identity, open_run
from engine.scaling import Work
from engine.task_vectors import Inspection
from engine.training import Learner, Stage, first_stage, second_stage
from engine.writer import OutputFile

Targets = Mapping[tuple[int, int], Any]


def merge(plan: Plan, out: Path, address: str | None = None, fresh: bool = False, debug: bool = False) -> bool:
    """Merge by the plan into the folder `out`; False where that very merge is there already. Raises MergeError."""
    samples = prepare(plan) if plan.config.learned else []
    plan_identity = identity(plan)
    if check_output(out, plan_identity, fresh):
        if RunFolder(out).folder.exists():  # a driver that died after its last act but one
            with open_run(out, plan_identity, fresh=False) as run:
                run.discard()
        return False
    with open_run(out, plan_identity, fresh) as run, connect(address, debug), Progress() as progress:
        if plan.config.unused:
            progress.say(f"not used by {plan.config.merge_method}: {', '.join(plan.config.unused)}")
        if plan.config.learned:
            Merge(plan, samples, run, progress).run(plan_identity)
        else:
            crew = Crew(plan, run.keep_plan(plan), place_shards(nodes(), plan.config), progress.say)
            Combine(plan, run, crew, progress).run(plan_identity)
    return True


def prepare(plan: Plan) -> list[list[Sample]]:
    """What can be known before any actor starts: names that meet the module's, and the samples' tokens.

    Raises:
        CheckpointError, CalibrationError: naming the tensor or the record at fault.
    """
    records = read_records(plan)
    folder = open_base(plan).folder
    build_skeleton(folder, plan.base_header.tensors, getattr(torch, plan.dtype))
    return tokenize(records, load_tokenizer(folder) if needs_tokenizer(records) else None, plan)


def _unlabelled(sample: Sample) -> dict[str, Packed]:
    return pack_all(Target.unlabelled(torch.tensor(sample.input_ids)).tensors())


class Merge(Run):
    """One merge by a method that learns coefficients."""

    def __init__(self, plan: Plan, samples: Sequence[Sequence[Sample]], run: RunFolder, progress: Progress) -> None:
        work = Work.of(plan.config, [[len(sample.input_ids) for sample in mine] for mine in samples])
        super().__init__(
            plan, run, Crew(plan, run.keep_plan(plan), arrange(nodes(), plan, work), progress.say), progress
        )
        self.samples = samples

    def run(self, plan_identity: str) -> None:
        """The whole algorithm."""
        self._say_cuts()
        stored, wanted = self._stored_and_wanted()
        with self.crew.shards() as shards, ExitStack() as learning:
            trainer = learning.enter_context(self.crew.trainer()) if self.crew.trainer_beside else None
            with self.crew.experts(len(wanted)) as experts:
                magnitudes = self._inspect(shards)
                targets = self._targets(experts, stored, wanted)
            trainer = trainer or learning.enter_context(self.crew.trainer())
            stages = [self._learn(trainer, first_stage(self.plan), targets)]
            importance = None
            if self.plan.config.stages == 2:
                options = self.plan.config.parameters
                layout, importance = stage_2_layout(stages[0], magnitudes, options.budget, options.kappa)
                stages.append(self._learn(trainer, second_stage(self.plan, layout, stages[0]), targets))
            self.report(trainer)
            learning.close()
            folder = self._write(shards, stages[-1])
            digests = self.digests(shards)
            for shard in shards:
                self.report(shard)
        write_record(folder, self.plan, plan_identity, digests, stages, importance, self.folder.metrics())
        self.write_memory(folder, forwards=self.forwards_before, target_bytes=self.target_bytes)
        self.folder.finish()

    def _write(self, shards: Sequence[Any], coefficients: Coefficients) -> Path:
        """The output by the shards, tensor by tensor, in a folder that is not the output yet."""
        folder = self.folder.start_output()

        def ask(shard: Any, file: OutputFile) -> Any:
            wanted = {t.name: coefficients.of(t.name) for t in file.tensors if t.name in self.plan.merged_set}
            return shard.write.remote(folder, file, wanted)

        self.write_files(shards, folder, ask)
        return folder

    def _inspect(self, shards: Sequence[Any]) -> Array:
        """sₖ,ₗ = mean |τₖ,ₗ| [K, L] of the merged tensors; every weight of every model is read, and must be finite."""
        names = list(self.plan.base_header.tensors)
        asked = [shard.inspect.remote(names[index :: len(shards)]) for index, shard in enumerate(shards)]
        found: dict[str, Inspection] = {}
        for part in self.answers("reading every weight once", asked):
            found |= part
        return np.stack([found[name].magnitudes for name in self.plan.merged], axis=1)

    def _stored_and_wanted(self) -> tuple[dict[Sample, Path], list[list[tuple[Sample, Path]]]]:
        """Targets that an earlier start of this run left, and those still to compute, of each expert that has any."""
        if not self.plan.config.labelled:
            return {}, []
        paths = {sample: self.folder.target(sample) for mine in self.samples for sample in mine}
        stored = {sample: path for sample, path in paths.items() if path.exists()}
        missing = [[(s, paths[s]) for s in mine if s not in stored] for mine in self.samples]
        return stored, [mine for mine in missing if mine]

    def _targets(self, experts: Sequence[Any], stored: Mapping[Sample, Path], wanted: Sequence[Any]) -> Targets:
        """References to every sample's target; each is computed once in the life of a run."""
        self.forwards_before = self.target_bytes = 0
        if not self.plan.config.labelled:
            samples = [sample for mine in self.samples for sample in mine]
            return {(sample.expert, sample.index): ray.put(_unlabelled(sample)) for sample in samples}
        self.progress.phase("targets", sum(map(len, self.samples)), len(stored))
        self.forwards_before = count = len(stored)
        self.target_bytes = sum(path.stat().st_size for path in stored.values())

        def done(nbytes: int) -> None:
            nonlocal count
            count += 1
            self.target_bytes += nbytes
            self.progress.advance(count)

        computed, reports = self.crew.targets(experts, wanted, done)
        self.reports += reports
        return computed | {(sample.expert, sample.index): stored_target(path) for sample, path in stored.items()}

    def _learn(self, trainer: Any, stage: Stage, targets: Targets) -> Coefficients:
        """One stage: an optimiser step a window, its state kept after each."""
        parameters = self.plan.config.parameters
        order = training_order([len(mine) for mine in self.samples], parameters.epochs)
        steps = windows(order, parameters.gradient_accumulation)
        state = self.folder.load_stage(stage.number) or StageState(0, None)
        self.progress.phase(f"stage {stage.number}", len(steps), state.steps)
        reference = ray.put(stage)
        for number in range(state.steps, len(steps)):
            window = [WindowSample(k, i, targets[k, i], self.samples[k][i].tokens) for k, i in steps[number]]
            asked = trainer.step.remote(reference, state.learner, number, window)
            step = answer(asked, self.progress.say, "taking a step")
            state = StageState(number + 1, step.state)
            self.folder.save_stage(stage.number, state, step.rows)
            self.progress.advance(number + 1, step_note(step.rows))
        learner = Learner(parameters, stage)
        assert state.learner is not None
        learner.restore(state.learner)
        return learner.coefficients

    def _say_cuts(self) -> None:
        for s in (s for mine in self.samples for s in mine if s.cut):
            self.progress.say(f"{s.where}: cut to max_length {len(s.input_ids)}, {s.cut} tokens left out")
