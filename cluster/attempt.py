"""What every merge on a cluster does, whatever its method: ask the shards, hash the inputs, gather memory figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from actors.process import ActorProcess, Report
from cluster.progress import Progress
from cluster.watch import Task, Watch
from engine.checkpoints.find import ROOT, find_model
from engine.checkpoints.writer import OutputFile
from engine.output.merge_record import input_files
from engine.output.model_folder import output_files, write_companions, write_json
from engine.planning.open_models import base_folder
from engine.planning.plan import Plan
from engine.report.page import write_report
from engine.run.run_folder import RunFolder


class Attempt:
    """One attempt at a merge on a connected cluster: its plan, its folder, and what its actors said of themselves."""

    def __init__(self, plan: Plan, folder: RunFolder, progress: Progress) -> None:
        self.plan, self.folder, self.progress = plan, folder, progress
        self.watch = Watch(progress.say)
        self.process = ActorProcess("driver")
        self.reports: list[Report] = []

    def write_files(self, shards: Sequence[Any], ask: Callable[[Any, OutputFile], Any], expert: str = "") -> None:
        """The output's weight files by the shards, each the next one when it is done, and what stands beside them; in
        a folder of an expert's name where the method makes a model an expert. Files that are there are not made again.
        """
        files = output_files(self.plan)
        under = [replace(file, name=f"{expert}/{file.name}") if expert else file for file in files]
        there = self.folder.written()
        missing = [file for file in under if file.name not in there]
        self.spread(f"writing {expert}".strip(), shards, missing, ask, len(files) - len(missing))
        tokenizer = find_model(self.plan.tokenizer, ROOT) if self.plan.tokenizer else None
        folder = self.folder.composed / expert
        folder.mkdir(exist_ok=True)
        write_companions(folder, self.plan, base_folder(self.plan), files, tokenizer)

    def digests(self, shards: Sequence[Any]) -> dict[str, str]:
        """SHA-256 of the inputs' weight and calibration files, by path or URI."""
        files = sorted({file for mine in input_files(self.plan).values() for file in mine})
        return self.dealt("hashing the inputs", shards, files, lambda shard, mine: shard.digests.remote(mine))

    def dealt(
        self, phase: str, shards: Sequence[Any], items: Sequence[str], ask: Callable[[Any, Sequence[str]], Any]
    ) -> dict[str, Any]:
        """What the shards say of the items, each of its share of them."""
        asked = [ask(shard, items[index :: len(shards)]) for index, shard in enumerate(shards)]
        return {item: said for part in self.answers(phase, asked) for item, said in part.items()}

    def answers(self, phase: str, asked: Sequence[Any]) -> list[Any]:
        """The values of references that make a phase, in their order."""
        self.progress.phase(phase, len(asked))
        answers = []
        for reference in asked:
            answers.append(self.watch.answer(reference, phase))
            self.progress.advance(phase, len(answers))
        return answers

    def report(self, actor: Any) -> None:
        """Keep what an actor says of its memory."""
        self.reports.append(self.watch.answer(actor.report.remote(), "asking for memory figures"))

    def finish(self, **more: int) -> None:
        """merge/memory.json and merge/report.html, and with them the output is whole."""
        write_json(self.folder.composed / "merge" / "memory.json", self._memory(**more))
        write_report([str(self.folder.composed)], self.folder.composed / "merge" / "report.html")
        self.folder.finish()

    def _memory(self, **more: int) -> dict[str, Any]:
        """Memory by actor, what was moved and computed, and seconds by phase."""
        reports = [self.process.report(), *self.reports]
        counts = sum((Counter(report.counts) for report in reports), Counter(more))
        return {
            "actors": [
                {"role": report.role, "pid": report.pid, "peak_anonymous_bytes": report.peak_anonymous_bytes}
                for report in reports
            ],
            "bytes_trainer_to_shards": counts["bytes_to_shards"],
            "bytes_shards_to_trainer": counts["bytes_from_shards"],
            "bytes_merged": self.plan.merged_bytes,
            "bytes_targets": counts["target_bytes"],
            "expert_forwards": counts["forwards"],
            "seconds": self.progress.seconds,
        }

    def spread(
        self,
        phase: str,
        workers: Sequence[Any],
        tasks: Sequence[Task],
        ask: Callable[[Any, Task], Any],
        done_before: int = 0,
    ) -> list[Any]:
        """Ask the workers to do all tasks, each the next one when it is done with one; what they say, in any order."""
        self.progress.phase(phase, len(tasks) + done_before, done_before)
        answers: list[Any] = []
        for _, answer in self.watch.hand_out(tasks, workers, ask, phase):
            answers.append(answer)
            self.progress.advance(phase, done_before + len(answers))
        return answers
