"""The parts that all merges share: distributing work over the shards, writing files, hashing inputs, memory figures."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

from actors.process import ActorProcess, Report
from cluster.placement import Devices, lay_out_shards
from cluster.progress import Progress
from cluster.seats import Node, Seating
from cluster.watch import Task, Watch
from engine.checkpoints.find import ROOT, find_model
from engine.checkpoints.writer import OutputFile
from engine.errors import ClusterError
from engine.methods.registry import get_method
from engine.output.card import add_memory
from engine.output.merge_record import input_files
from engine.output.model_folder import output_files, write_companions, write_json
from engine.output.survival import low_survival, survival_record, survived_of
from engine.planning.open_models import base_folder
from engine.planning.plan import Plan
from engine.report.page import write_report
from engine.run.run_folder import RunFolder
from engine.run.starts import read_doubts, read_left_out, read_starts
from engine.sizes import LOGIT_BYTES
from engine.storage.folder import Folder

# Times that the bound of a wait is doubled.
MOST_DOUBLINGS = 3
# Seconds between two lines while nodes are awaited.
SAY_EVERY = 5.0
Found = TypeVar("Found")


class Attempt:
    """One attempt at a merge: its plan, its run folder, the watch of its actors, and their memory reports.

    `losses` is the number of attempts before this one.
    """

    def __init__(self, plan: Plan, folder: RunFolder, progress: Progress, watch: Watch, losses: int = 0) -> None:
        self.plan, self.folder, self.progress, self.watch, self._losses = plan, folder, progress, watch, losses
        self.process = ActorProcess("driver")
        # One model, or one per expert in a folder of its name.
        method = None if plan.config.learned else get_method(plan.config.merge_method)
        each = method is not None and method.outputs == "experts"
        self.models = [expert.name for expert in plan.experts] if each else [""]
        self.reports: list[Report] = []

    def weight_files(self) -> list[str]:
        """Return the names of all weight files of the output."""
        return [named(model, file).name for model in self.models for file in output_files(self.plan)]

    def bound(self, patience: float) -> None:
        """Bound every wait for results; after each loss the bound is doubled, since machines may be slow, not hung."""
        self.watch.patience = patience * 2 ** min(self._losses, MOST_DOUBLINGS)

    def await_layout(self, find: Callable[[], Found]) -> Found:
        """Call `find` until it raises no ClusterError, and return its result. In the meantime nodes may join.

        Raises:
            ClusterError: the last error of `find`, after `cluster.wait` seconds.
        """
        wait, began = self.plan.config.cluster.wait, time.monotonic()
        while True:
            try:
                return find()
            except ClusterError as error:
                waited = time.monotonic() - began
                if waited >= wait:
                    raise
                self.progress.say(f"waiting for nodes ({waited:.0f} of {wait:g} s): {error.what}")
                time.sleep(min(SAY_EVERY, max(0.1, wait - waited)))

    def seats(self, alive: Sequence[Node]) -> Seating:
        """Return seats of shards, and of experts if models run. A run keeps the devices of its experts."""
        config = self.plan.config
        if not config.uses_samples:
            return lay_out_shards(alive, self.plan)
        kept = self.folder.load_devices()
        # There is no trainer to decide these two.
        new = replace(Devices.of(alive, config), gradients="accumulate", logit_bytes=LOGIT_BYTES)
        devices = new if kept is None else Devices(**kept | {"kinds": tuple(kept["kinds"])})
        layout = lay_out_shards(devices.among(alive), self.plan, devices)
        self.folder.keep_devices(asdict(devices))
        return layout

    def write_files(self, shards: Sequence[Any], ask: Callable[[Any, OutputFile], Any], expert: str = "") -> None:
        """Write the weight files of the output on the shards, and the files beside them.

        Files that an earlier attempt wrote are kept.

        Args:
            shards: The shard actors.
            ask: Calls a shard to write one file, and returns the reference.
            expert: The name of an expert, for a method whose output is one model per expert; also the model's folder.
        """
        files = output_files(self.plan)
        mine = [named(expert, file) for file in files]
        written = self.folder.written() & {file.name for file in mine}
        written = self.intact(shards, self.folder.weights, sorted(written))
        missing = [file for file in mine if file.name not in written]
        self.spread(f"writing {expert}".strip(), shards, missing, ask, len(files) - len(missing))
        tokenizer = find_model(self.plan.tokenizer, ROOT) if self.plan.tokenizer else None
        folder = self.folder.composed / expert
        folder.mkdir(exist_ok=True)
        write_companions(folder, self.plan, base_folder(self.plan), files, tokenizer)

    def write_solved(self, shard: Any, file: OutputFile) -> Any:
        """Call a shard to write one file of a model that was solved block by block, and return the reference."""
        return shard.calibrated.remote(self.folder.weights, file)

    def intact(self, shards: Sequence[Any], folder: Folder, names: Sequence[str]) -> set[str]:
        """Return those of the files in a folder that are as an earlier attempt's shards wrote them; remove the others.

        `names` are the names of the files.
        """
        if not names:
            return set()
        ask = lambda shard, share: shard.incomplete.remote(folder, share)  # noqa: E731
        incomplete = self.dealt("checking written files", shards, names, ask)
        for name in (name for name in names if incomplete[name]):
            self.progress.say(f"{folder.where}/{name}: damaged; the file is written again")
            folder.remove(name)
        return {name for name in names if not incomplete[name]}

    def digests(self, shards: Sequence[Any]) -> dict[str, str]:
        """Return the SHA-256 of the input files by path or URI; the shards compute those that are not known yet.

        Raises:
            InputError: an input is not as it was when the run began.
        """
        files = {file for of_model in input_files(self.plan).values() for file in of_model}
        known = self.folder.identity.digests
        missing, hashed = sorted(files - known.keys()), dict[str, str]()
        if missing:
            hashed = self.dealt("hashing the inputs", shards, missing, lambda shard, share: shard.digests.remote(share))
        self.folder.check_unchanged(self.plan, hashed)
        self.folder.reuse.keep_digests(self.folder.identity, sorted(files))
        return known | hashed

    def dealt(
        self, phase: str, shards: Sequence[Any], items: Sequence[str], ask: Callable[[Any, Sequence[str]], Any]
    ) -> dict[str, Any]:
        """Deal the items to the shards in equal shares, and return their results by item."""
        references = [ask(shard, items[index :: len(shards)]) for index, shard in enumerate(shards)]
        return {item: value for part in self.answers(phase, references) for item, value in part.items()}

    def answers(self, phase: str, references: Sequence[Any]) -> list[Any]:
        """Return the values of the references in order, reported as one phase."""
        self.progress.phase(phase, len(references))
        answers = []
        for reference in references:
            answers.append(self.watch.answer(reference, phase))
            self.progress.advance(phase, len(answers))
        return answers

    def report(self, actor: Any) -> None:
        """Store the memory report of an actor."""
        self.reports.append(self.watch.answer(actor.report.remote(), "asking for memory figures"))

    def finish(self, **more: int) -> None:
        """Write the last figures and the report into `merge/`, and complete the output; `more` adds to the counts."""
        record, survived = self.folder.composed / "merge", survived_of(self.folder.state, self.weight_files())
        write_json(record / "rounding.json", survival_record(self.plan, survived))
        if low := low_survival(self.plan, survived):
            self.progress.say(low)
        memory = self._memory(**more)
        write_json(record / "memory.json", memory)
        add_memory(self.folder.composed / "README.md", memory)
        write_report([str(self.folder.composed)], record / "report.html")
        self.folder.finish()

    def _not_deterministic(self) -> list[str]:
        """Return the operations for which an actor gave up that repeated runs have the same bits, and say so."""
        found = sorted({report.not_deterministic for report in self.reports if report.not_deterministic})
        if found:
            self.progress.say(
                f"not deterministic on these GPUs: {', '.join(found)}; another run may differ in the last bits"
            )
        return found

    def _memory(self, **more: int) -> dict[str, Any]:
        """Return the contents of merge/memory.json: memory by actor, bytes moved, forward passes, times."""
        reports = [self.process.report(), *self.reports]
        counts = sum((Counter(report.counts) for report in reports), Counter(more))
        return {
            "actors": [_figures(report) for report in reports],
            "bytes_trainer_to_shards": counts["bytes_to_shards"],
            "bytes_shards_to_trainer": counts["bytes_from_shards"],
            "bytes_merged": self.plan.merged_bytes,
            **({"slices": self.plan.stacked} if self.plan.stacked else {}),
            "bytes_targets": counts["target_bytes"],
            "expert_forwards": counts["forwards"],
            "reused": self.folder.reuse.counts,
            "decompositions_by_lapack": counts["by_lapack"],
            "not_deterministic": self._not_deterministic(),
            "seconds": self.progress.seconds,
            "starts": read_starts(self.folder.state),
            "lost_attempts": self._losses,
            "left_out": read_left_out(self.folder.state),
            "doubts": read_doubts(self.folder.state),
        }

    def spread(
        self,
        phase: str,
        workers: Sequence[Any],
        tasks: Sequence[Task],
        ask: Callable[[Any, Task], Any],
        done_before: int = 0,
    ) -> list[Any]:
        """Distribute the tasks over the workers as they become free, and return the results in any order."""
        self.progress.phase(phase, len(tasks) + done_before, done_before)
        answers: list[Any] = []
        for _, answer in self.watch.hand_out(tasks, workers, ask, phase):
            answers.append(answer)
            self.progress.advance(phase, done_before + len(answers))
        return answers


def _figures(report: Report) -> dict[str, Any]:
    """Return the figures of a process in merge/memory.json."""
    figures = {
        "role": report.role,
        "pid": report.pid,
        "peak_anonymous_bytes": report.peak_anonymous_bytes,
        "peak_pinned_bytes": report.peak_pinned_bytes,
    }
    gpus = [
        {"name": gpu.name, "peak_allocated_bytes": gpu.allocated, "peak_reserved_bytes": gpu.reserved}
        for gpu in report.gpus
    ]
    return figures | ({"gpus": gpus} if gpus else {})


def named(model: str, file: OutputFile) -> OutputFile:
    """Return the file under the name that it has in the output, in the folder of its model if there are several."""
    return replace(file, name=f"{model}/{file.name}") if model else file
