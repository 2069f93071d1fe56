"""What every merge on a cluster does, whatever its method: ask the shards, hash the inputs, gather memory figures."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from actors.process import Process, Report
from cluster.crew import Crew
from cluster.progress import Progress
from cluster.session import answer, first_answer
from engine.checkpoint import open_base
from engine.headers import find_model
from engine.plan import Plan
from engine.record import input_files
from engine.run_folder import RunFolder
from engine.writer import OutputFile, output_files, write_companions, write_json

Task = TypeVar("Task")


class Run:
    """One merge on a connected cluster: its plan, its folder, its actors, and what they said of themselves."""

    def __init__(self, plan: Plan, folder: RunFolder, crew: Crew, progress: Progress) -> None:
        self.plan, self.folder, self.crew, self.progress = plan, folder, crew, progress
        self.process = Process("driver")
        self.reports: list[Report] = []
        self.seconds: dict[str, float] = {}

    def write_files(
        self, shards: Sequence[Any], folder: Path, ask: Callable[[Any, OutputFile], Any], phase: str = "writing"
    ) -> None:
        """The output's files by the shards, each the next one when it is done, and what stands beside them."""
        files = output_files(self.plan)
        self._spread(phase, shards, files, ask)
        tokenizer = find_model(self.plan.tokenizer, Path.cwd()) if self.plan.tokenizer else None
        write_companions(folder, self.plan, open_base(self.plan).folder, files, tokenizer)

    def digests(self, shards: Sequence[Any]) -> dict[Path, str]:
        """SHA-256 of the inputs' weight and calibration files."""
        files = sorted({file for mine in input_files(self.plan).values() for file in mine})
        asked = [shard.digests.remote(files[index :: len(shards)]) for index, shard in enumerate(shards)]
        return {file: digest for part in self.answers("hashing the inputs", asked) for file, digest in part.items()}

    def answers(self, phase: str, asked: Sequence[Any]) -> list[Any]:
        """The values of references that make a phase, in their order."""
        began = time.monotonic()
        self.progress.phase(phase, len(asked))
        answers = []
        for reference in asked:
            answers.append(answer(reference, self.progress.say, phase))
            self.progress.advance(len(answers))
        self.seconds[phase] = time.monotonic() - began
        return answers

    def report(self, actor: Any) -> None:
        """Keep what an actor says of its memory."""
        self.reports.append(answer(actor.report.remote(), self.progress.say, "asking for memory figures"))

    def write_memory(self, folder: Path, **more: int) -> None:
        """merge/memory.json: memory by actor, what was moved and computed, and seconds by phase."""
        reports = [self.process.report(), *self.reports]
        counts = sum((Counter(report.counts) for report in reports), Counter(more))
        memory = {
            "actors": [
                {"role": report.role, "pid": report.pid, "peak_anonymous_bytes": report.peak_anonymous_bytes}
                for report in reports
            ],
            "bytes_trainer_to_shards": counts["bytes_to_shards"],
            "bytes_shards_to_trainer": counts["bytes_from_shards"],
            "bytes_merged": self.plan.merged_bytes,
            "bytes_targets": counts["target_bytes"],
            "expert_forwards": counts["forwards"],
            "seconds": self.seconds,
        }
        write_json(folder / "merge" / "memory.json", memory)

    def _spread(
        self, phase: str, workers: Sequence[Any], tasks: Sequence[Task], ask: Callable[[Any, Task], Any]
    ) -> None:
        """Ask the workers to do all tasks, each the next one when it is done with one."""
        began = time.monotonic()
        self.progress.phase(phase, len(tasks))
        waiting, free = deque(tasks), deque(workers)
        busy: dict[Any, Any] = {}
        while waiting or busy:
            while waiting and free:
                worker = free.popleft()
                busy[ask(worker, waiting.popleft())] = worker
            done, _ = first_answer(list(busy), self.progress.say, phase)
            free.append(busy.pop(done))
            self.progress.advance(len(tasks) - len(waiting) - len(busy))
        self.seconds[phase] = time.monotonic() - began
