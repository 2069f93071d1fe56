"""Tasks of lm-evaluation-harness, run and scored by its own library (the extra `eval`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError
from engine.evaluation.results import Row
from engine.untrusted import library_errors_as


@dataclass(frozen=True)
class Tasks:
    """The names of tasks of the harness or of task files in `folder`, and the number of documents used of each."""

    names: tuple[str, ...]
    folder: str | None = None
    limit: int | None = None


def check_tasks(tasks: Tasks) -> None:
    """Check that the harness can load the tasks and their data.

    Raises:
        ConfigError: it cannot, or it is not installed.
    """
    manager = _manager(tasks)
    unknown = [name for name in tasks.names if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"the harness has no task {unknown[0]!r}",
            "--task",
            "a name listed by `lm-eval ls tasks`, or a task in --task-path",
        )
    from lm_eval.tasks import get_task_dict

    with _harness_errors():
        get_task_dict(list(tasks.names), manager)


def run_tasks(name: str, model: Any, tokenizer: Any, tasks: Tasks, batch_size: int) -> list[Row]:
    """Run the tasks on a loaded transformers model, and return rows under `name` with the harness's metric names."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _harness_errors():
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks.names),
            limit=tasks.limit,
            task_manager=_manager(tasks),
            bootstrap_iters=1000,
        )
    return list(rows_of(name, results))


def rows_of(name: str, results: Any) -> Iterator[Row]:
    """Yield a row for each metric of every task and group in the harness's results, standard errors included.

    `acc,none` becomes `acc`; the name of any other filter is kept. A group counts the documents of its tasks.
    """
    counts = {task: int(samples["effective"]) for task, samples in results["n-samples"].items()}
    parts = results.get("group_subtasks", {})
    for task, figures in results["results"].items():
        count = counts.get(task, sum(counts.get(part, 0) for part in parts.get(task, ())))
        for metric, value in figures.items():
            if isinstance(value, int | float) and "," in metric:
                yield Row(name, task, metric.removesuffix(",none"), float(value), count)


def _manager(tasks: Tasks) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "lm-evaluation-harness is not installed", "--task", do='run `pip install ".[eval]"` in the checkout'
        ) from error
    with _harness_errors():
        return TaskManager(include_path=tasks.folder)


def _harness_errors() -> Any:
    return library_errors_as(lambda message: ConfigError(f"the harness cannot run the tasks: {message}", "--task"))
