"""An evaluation: every input checked, then each model put to its data, here or as tasks on Ray. Knows no measures."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch

from cluster.placement import Node
from cluster.progress import Progress
from cluster.session import connect, nodes
from cluster.watch import Watch, until_done
from engine.checkpoints.find import find_model, portable
from engine.errors import ClusterError, ConfigError, RunError
from engine.evaluation.items import DataSet, unique
from engine.evaluation.lm_eval_harness import Tasks, check_tasks, run_tasks
from engine.evaluation.measure import Evaluation
from engine.evaluation.results import Row
from engine.evaluation.subject import Options, Reader, Subject
from engine.machine import usable_cpus
from engine.models.loading import load_tokenizer


@dataclass(frozen=True)
class EvaluationJob:
    """What one process does: a model, called `name`, on some data. `model` is as any node finds it."""

    name: str
    model: str
    data: tuple[DataSet, ...]
    tasks: Tasks
    options: Options


def make_jobs(
    models: Sequence[str], data: Sequence[DataSet], experts: Sequence[str], tasks: Tasks, options: Options
) -> list[EvaluationJob]:
    """A job for each model, everything checked. `experts`: none, one for all data, or one for each.

    Raises:
        InputError: naming the option, the model or the record at fault.
    """
    if not data and not tasks.names:
        raise ConfigError("there is nothing to evaluate on", "--data", "a file, or a --task")
    if len(experts) not in {0, 1, len(data)}:
        raise ConfigError(
            f"{len(experts)} experts for {len(data)} files",
            "--expert",
            "one for all --data, or one for each in its order",
        )
    if tasks.names:
        check_tasks(tasks)
    against = [_portable(one) for one in experts]
    against *= len(data) if len(against) == 1 else 1
    sets = tuple(replace(one, expert=expert) for one, expert in zip(data, against, strict=True)) if against else data
    named = zip(unique(models), models, strict=True)
    jobs = [EvaluationJob(name, _portable(model), tuple(sets), tasks, options) for name, model in named]
    others = {one.expert: Subject(one.expert, options) for one in sets if one.expert and one.kind == "text"}
    for job in jobs:
        subject = Subject(job.model, options)
        for one in sets:
            reader = Reader(subject, one)
            for item in one.items:
                reader.check(item)
            if one.expert in others:
                subject.check_alike(others[one.expert])
        if tasks.names:
            load_tokenizer(subject.folder, options.remote_code)
    return jobs


def evaluate(jobs: Sequence[EvaluationJob], address: str | None, debug: bool, num_gpus: int | None = None) -> list[Row]:
    """The figures of all jobs, each model's together; `num_gpus` are a model's, by default one where there are any.

    One model on a machine with one GPU or none is put to its data in this process, more on Ray.

    Raises:
        MergeError: the cluster or the run is at fault.
    """
    with Progress() as progress:
        alone = len(jobs) == 1 and torch.cuda.device_count() < 2
        if alone and num_gpus is None and not (address or os.environ.get("RAY_ADDRESS")):
            progress.phase("evaluating", _parts(jobs[0]))
            return _run(jobs[0], lambda done: progress.advance("evaluating", done))
        with connect(address, debug):
            gpus = num_gpus if num_gpus is not None else int(any(node.gpus for node in nodes()))
            return _on_ray(spread(jobs, gpus, nodes()), gpus, progress)


def _run(job: EvaluationJob, done: Callable[[int], None] = lambda _: None) -> list[Row]:
    """One job, in this process; `done` is told how many of its files and lists of tasks are."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject, rows = Subject(job.model, job.options), list[Row]()
    try:
        subject.load(device)
        evaluation, expert, loaded = Evaluation(subject, device), None, None
        for number, one in enumerate(job.data, start=1):
            wanted = one.expert if one.kind == "text" else None
            if wanted is not None and wanted != loaded:
                # The earlier one goes before the next comes.
                expert = None
                expert, loaded = Subject(wanted, job.options), wanted
                expert.load(device)
            rows += evaluation.measure(job.name, one, expert if wanted else None)
            done(number)
        if job.tasks.names:
            tokenizer = load_tokenizer(subject.folder, job.options.remote_code)
            rows += run_tasks(job.name, subject.model, tokenizer, job.tasks, job.options.batch_size)
            done(_parts(job))
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"the GPU's memory does not do for {job.name}", do="lower --batch-size, or give it more GPUs by --num-gpus"
        ) from error
    return rows


def _parts(job: EvaluationJob) -> int:
    return len(job.data) + bool(job.tasks.names)


def spread(jobs: Sequence[EvaluationJob], gpus: int, there: Sequence[Node]) -> list[EvaluationJob]:
    """The jobs, a model's files apart where the nodes have GPUs for more of them at a time."""
    shares = max(1, int(sum(node.gpus for node in there) / gpus / len(jobs))) if gpus else 1
    found = []
    for job in jobs:
        parts = [replace(job, data=job.data[place::shares]) for place in range(shares)]
        # The harness's tasks go with the first, or alone.
        parts[1:] = [replace(part, tasks=Tasks(())) for part in parts[1:]]
        found += [part for part in parts if part.data or part.tasks.names]
    return found


def _on_ray(jobs: Sequence[EvaluationJob], gpus: int, progress: Progress) -> list[Row]:
    """A task for each job; the figures in their order."""
    cpus = task_cpus(nodes(), gpus, len(jobs))
    task = ray.remote(_task).options(num_cpus=cpus, num_gpus=gpus)
    ask: Callable[[Any, int], Any] = lambda task, place: task.remote(jobs[place])  # noqa: E731
    found: dict[int, list[Row]] = {}
    watch = Watch(progress.say)
    progress.phase("evaluating", len(jobs))

    def attempt() -> None:
        missing = [place for place in range(len(jobs)) if place not in found]
        # Ray places a task wherever its CPUs and GPUs are free, so all of them are handed out at once.
        for place, rows in watch.hand_out(missing, [task] * len(missing), ask, "evaluating"):
            found[place] = rows
            progress.advance("evaluating", len(found), jobs[place].name)

    until_done(attempt, lambda: len(found), progress.say)
    return [row for place in range(len(jobs)) for row in found[place]]


def _task(job: EvaluationJob) -> list[Row]:
    """A job in a worker of Ray's, on the CPUs that it was given."""
    given = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(max(1, min(int(given), usable_cpus())))
    return _run(job)


def task_cpus(there: Sequence[Node], gpus: int, tasks: int) -> int:
    """CPUs of a task: as many as all can have at a time.

    Raises:
        ClusterError: no node has what one asks for.
    """
    able = [node for node in there if node.cpus >= 1 and node.gpus >= gpus]
    if not able:
        most = max((node.gpus for node in there), default=0)
        raise ClusterError(
            f"no node has a CPU and {gpus} GPUs", "the cluster", do=f"lower --num-gpus: the most of a node is {most:g}"
        )
    share = sum(node.cpus for node in able) // tasks
    return int(max(1, min(share, *(node.cpus for node in able))))


def _portable(model: str) -> str:
    return portable(model, find_model(model, Path.cwd()), Path.cwd())
