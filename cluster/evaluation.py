"""Evaluations: checks of all inputs, then one job per model, in this process or as tasks on Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import torch

from actors.gpus import Gpus
from cluster.progress import Progress
from cluster.ray_watch import RayWatch
from cluster.seats import Node
from cluster.session import actor_options, connect, nodes
from cluster.watch import until_done
from engine.checkpoints.find import ModelName
from engine.errors import ClusterError, ConfigError, RunError
from engine.evaluation.items import DataSet, unique
from engine.evaluation.lm_eval_harness import Tasks, check_tasks, run_tasks
from engine.evaluation.measure import Evaluation
from engine.evaluation.results import Row
from engine.evaluation.subject import Options, Reader, Subject, named
from engine.machine import usable_cpus
from engine.models.devices import Room, give_back, release
from engine.models.loading import check_tokenizer, load_tokenizer

MORE = "give the model more GPUs with --num-gpus, or larger ones"


@dataclass(frozen=True)
class EvaluationJob:
    """A model, reported under `name`, to be evaluated on data sets and tasks by one process.

    `model` has names that are valid on every node. `experts` are the names of the experts to which data sets and tasks
    belong. `of_expert`: the model is such an expert, evaluated on what belongs to it alone.
    """

    name: str
    model: ModelName
    data: tuple[DataSet, ...]
    tasks: Tasks
    options: Options
    experts: Mapping[str, str] = field(default_factory=dict)
    of_expert: bool = False


def make_jobs(
    models: Sequence[str], data: Sequence[DataSet], experts: Sequence[str], tasks: Tasks, options: Options
) -> list[EvaluationJob]:
    """Check all inputs and return a job for each model, and for each expert that is none of them.

    `experts`: none, one for all data sets and tasks, one for each data set, or one for each data set and each task.
    Experts are evaluated on the data sets and tasks that belong to them, except texts.

    Raises:
        ConfigError: there is nothing to evaluate on, or the number of experts is wrong.
        CheckpointError: a model or an expert cannot be loaded, or an expert differs in size.
        CalibrationError: a model cannot process a record.
    """
    if not data and not tasks.names:
        raise ConfigError("there is nothing to evaluate on", "--data", "at least one --data or --task")
    if len(experts) not in {0, 1, len(data), len(data) + len(tasks.names)}:
        raise ConfigError(
            f"{len(experts)} experts for {len(data)} files and {len(tasks.names)} tasks",
            "--expert",
            "one for all, or one per --data in the same order, followed by one per --task or none",
        )
    if tasks.names:
        check_tasks(tasks)
    jobs = _jobs(models, data, experts, tasks, options)
    texts = {one.expert for job in jobs for one in job.data if one.expert and one.kind == "text"}
    others = {expert: Subject(expert, options) for expert in texts}
    for job in jobs:
        subject = Subject(job.model, options)
        for one in job.data:
            with Reader(subject, one) as reader:
                for item in one.items:
                    reader.check(item)
            if one.expert in others:
                subject.check_alike(others[one.expert])
        if job.tasks.names:
            check_tokenizer(subject.folder, options.remote_code)
    return jobs


def _jobs(
    models: Sequence[str], data: Sequence[DataSet], experts: Sequence[str], tasks: Tasks, options: Options
) -> list[EvaluationJob]:
    """Return the jobs of `make_jobs`, once their models are found."""
    places = {one: named(one, Path.cwd(), options.remote_code) for one in dict.fromkeys((*models, *experts))}
    sets = [*(one.name for one in data), *tasks.names]
    expert_of = dict(zip(sets, [*experts] * len(sets) if len(experts) == 1 else experts, strict=False))
    mine = tuple(replace(one, expert=places[expert_of[one.name]]) if one.name in expert_of else one for one in data)
    evaluated = {places[model] for model in models}
    others = {places[expert]: expert for expert in experts if places[expert] not in evaluated}
    names = unique([*models, *others.values()])
    called = {place: name for place, name in zip((*map(places.get, models), *others), names, strict=True) if place}
    owners = {one: called[places[expert]] for one, expert in expert_of.items()}
    jobs = [
        EvaluationJob(name, places[model], mine, tasks, options, owners)
        for name, model in zip(names, models, strict=False)
    ]
    for place in others:
        own = tuple(one for one in mine if one.expert == place and one.kind != "text")
        its_tasks = replace(tasks, names=tuple(one for one in tasks.names if owners.get(one) == called[place]))
        if own or its_tasks.names:
            jobs.append(EvaluationJob(called[place], place, own, its_tasks, options, owners, of_expert=True))
    return jobs


def evaluate(jobs: Sequence[EvaluationJob], address: str | None, debug: bool, num_gpus: int | None = None) -> list[Row]:
    """Run all jobs and return their rows, model by model.

    A single model on a machine with at most one GPU is evaluated in this process, then its experts; several on Ray.

    Args:
        jobs: The jobs, from `make_jobs`.
        address: The address of a running Ray cluster; None uses RAY_ADDRESS or starts Ray on this machine.
        debug: Show the workers' own output.
        num_gpus: GPUs per model; None is one if there are any.

    Raises:
        ClusterError: the cluster cannot be reached, or no node has the GPUs.
        CheckpointError: a model's logits are not finite.
        RunError: the evaluation failed.
    """
    with Progress() as progress:
        alone = sum(not job.of_expert for job in jobs) == 1 and torch.cuda.device_count() < 2
        if alone and num_gpus is None and not (address or os.environ.get("RAY_ADDRESS") or ray.is_initialized()):
            return _run_all(jobs, progress)
        with connect(address, debug):
            gpus = num_gpus if num_gpus is not None else int(any(node.gpus for node in nodes()))
            return _on_ray(spread(jobs, gpus, nodes()), gpus, progress)


def _run_all(jobs: Sequence[EvaluationJob], progress: Progress) -> list[Row]:
    """Run the jobs in this process, one after the other."""
    rows, before, seat = list[Row](), 0, Gpus(int(torch.cuda.is_available()))
    progress.phase("evaluating", sum(map(_parts, jobs)))
    for job in jobs:

        def done(number: int, before: int = before) -> None:
            progress.advance("evaluating", before + number)

        rows += _run(job, seat, done)
        before += _parts(job)
        give_back()
    return rows


def _run(job: EvaluationJob, seat: Gpus, done: Callable[[int], None] = lambda _: None) -> list[Row]:
    """Run one job in this process. `done` is called with the number of completed parts (see `_parts`)."""
    devices, subject, rows = seat.devices(), Subject(job.model, job.options), list[Row]()
    _load(subject, devices, job.name)
    try:
        evaluation, expert, loaded = Evaluation(subject, devices[0]), None, None
        for number, one in enumerate(job.data, start=1):
            wanted = one.expert if one.kind == "text" else None
            if wanted is not None and wanted != loaded:
                # Free the previous expert before the next is loaded.
                if expert is not None:
                    release(expert.model)
                expert = None
                give_back()
                expert, loaded = Subject(wanted, job.options), wanted
                _load(expert, devices, str(expert.folder))
            rows += evaluation.measure(job.name, one, expert if wanted else None)
            done(number)
        if job.tasks.names:
            # The harness calls the tokenizer in this process, without limits.
            tokenizer = load_tokenizer(subject.folder, job.options.remote_code)
            rows += run_tasks(job.name, subject.model, tokenizer, job.tasks, job.options.batch_size)
            done(_parts(job))
    except torch.OutOfMemoryError as error:
        smaller = "lower --batch-size" if job.options.batch_size > 1 else "shorten the records"
        raise RunError(
            f"the GPU memory does not suffice for the batches of {job.name}", do=f"{smaller}, or {MORE}"
        ) from error
    return [replace(row, expert=job.experts.get(row.data)) for row in rows]


def _load(subject: Subject, devices: Sequence[torch.device], name: str) -> None:
    """Load the weights of a model, which is `name` in the error."""
    try:
        subject.load(devices[0], Room(tuple(devices[1:])))
    except torch.OutOfMemoryError as error:
        raise RunError(f"the GPU memory does not suffice for the weights of {name}", do=MORE) from error


def _parts(job: EvaluationJob) -> int:
    """Return the number of parts of a job: its data sets, and all of its tasks together."""
    return len(job.data) + bool(job.tasks.names)


def spread(jobs: Sequence[EvaluationJob], gpus: int, nodes: Sequence[Node]) -> list[EvaluationJob]:
    """Return the jobs, split by data set if the nodes have GPUs for several jobs per model."""
    shares = max(1, int(sum(node.gpus for node in nodes) / gpus / len(jobs))) if gpus else 1
    split = []
    for job in jobs:
        parts = [replace(job, data=job.data[place::shares]) for place in range(shares)]
        # The tasks of the harness belong to the first part.
        parts[1:] = [replace(part, tasks=Tasks(())) for part in parts[1:]]
        split += [part for part in parts if part.data or part.tasks.names]
    return split


def _on_ray(jobs: Sequence[EvaluationJob], gpus: int, progress: Progress) -> list[Row]:
    """Run each job as a Ray task, and return the rows in the order of the jobs."""
    cpus = task_cpus(nodes(), gpus, len(jobs))
    task = ray.remote(_task).options(num_cpus=cpus, num_gpus=gpus, **actor_options())
    ask: Callable[[Any, int], Any] = lambda task, place: task.remote(jobs[place], gpus)  # noqa: E731
    results: dict[int, list[Row]] = {}
    watch = RayWatch(progress.say)
    progress.phase("evaluating", len(jobs))

    def attempt() -> None:
        missing = [place for place in range(len(jobs)) if place not in results]
        # Ray starts a task when its CPUs and GPUs are free, so all of them are submitted at once.
        for place, rows in watch.hand_out(missing, [task] * len(missing), ask, "evaluating"):
            results[place] = rows
            progress.advance("evaluating", len(results), jobs[place].name)

    until_done(attempt, lambda: len(results), progress.say)
    return [row for place in range(len(jobs)) for row in results[place]]


def _task(job: EvaluationJob, gpus: int) -> list[Row]:
    """Run a job in a Ray worker, with the GPUs and as many threads as CPUs that Ray assigned."""
    given = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(max(1, min(int(given), usable_cpus())))
    return _run(job, Gpus(gpus, tuple(ray.get_gpu_ids())))


def task_cpus(nodes: Sequence[Node], gpus: int, tasks: int) -> int:
    """Return the CPUs of a task such that all tasks can run at the same time, at least 1.

    Raises:
        ClusterError: no node has the CPU and the GPUs of a task.
    """
    usable = [node for node in nodes if node.cpus >= 1]
    able = [node for node in usable if node.gpus >= gpus]
    if not able:
        most = int(max((node.gpus for node in usable), default=0))
        raise ClusterError(
            f"no node has a CPU and {gpus} GPUs",
            "the cluster",
            do=f"lower --num-gpus to {most} at most" if usable else "add a node with a CPU for tasks",
        )
    share = sum(node.cpus for node in able) // tasks
    return int(max(1, min(share, *(node.cpus for node in able))))
