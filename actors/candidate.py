"""The process of a search's trials: one loaded model, into whose memory the merge of each trial is streamed."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

from actors.gpus import Gpus
from actors.process import ActorProcess
from engine.evaluation.measure import Evaluation, figures
from engine.evaluation.subject import Options, Reader, Subject
from engine.planning.plan import Plan
from engine.search.merged_model import MergedModel
from engine.search.objective import Objective, part_of


class Candidate:
    """The model of trials, merged and scored one after the other.

    The base and the experts are memory-mapped, so that a node holds them once for all of its candidates.

    Args:
        objective: What is scored.
        options: Options of the evaluations.
        threads: Threads of the merge and of the model.
        gpus: The GPUs of the seat, of which the first is used.
    """

    def __init__(self, objective: Objective, options: Options, threads: int, gpus: Gpus) -> None:
        self._process = ActorProcess("trial", threads, gpus)
        self._objective, self._options, self._threads = objective, options, threads
        self._stack = ExitStack()
        self._model: MergedModel | None = None
        self._experts: dict[str, Subject] = {}
        self._sums: list[defaultdict[str, float]] = []
        self._done: list[int] = []

    def load(self, plan: Plan) -> None:
        """Load the model of the plan of a trial, and the experts, unless they are loaded.

        Raises:
            CheckpointError: A model cannot be loaded.
        """
        if self._model is None or not self._model.fits(plan):
            self._load(plan)

    def merge(self, plan: Plan) -> None:
        """Merge the plan of a trial into the model.

        Raises:
            RunError: A merged weight is not finite.
        """
        assert self._model is not None
        self._model.merge(plan, self._threads)
        self._sums = [defaultdict(float) for _ in self._objective.parts]
        self._done = [0] * len(self._objective.parts)

    def score(self, rung: int) -> dict[str, float]:
        """Score the records up to a rung, from 0, and return the metrics by the names of the parts.

        Raises:
            CheckpointError: The logits are not finite.
        """
        metrics = {}
        for place, part in enumerate(self._objective.parts):
            stop, sums = self._objective.records(part, rung), self._sums[place]
            data, expert = part_of(part, self._done[place], stop), self._experts.get(part.name)
            if data.items:
                found = self._evaluation.sums("the merge", data, self._readers[place], expert, part.generates)
                for name, value in found.items():
                    sums[name] += value
            self._done[place] = stop
            of_part = {name: value for name, value, _ in figures(part_of(part, 0, stop), sums, expert is not None)}
            metrics[part.name] = of_part[part.metric]
        return metrics

    def _load(self, plan: Plan) -> None:
        self._stack.close()
        self._stack, self._model, device = ExitStack(), None, self._process.device
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._model = MergedModel(plan, folder, self._options, device)
        self._evaluation = Evaluation(self._model, device, keeps=True)
        self._readers = [self._stack.enter_context(Reader(self._model, part.data)) for part in self._objective.parts]
        for part in self._objective.parts:
            if part.data.expert is not None and part.name not in self._experts:
                expert = Subject(part.data.expert, self._options)
                self._model.check_alike(expert)
                expert.load(device)
                self._experts[part.name] = expert

    def close(self) -> None:
        """End the processes of the tokenizers, and remove the files beside the weights."""
        self._stack.close()
