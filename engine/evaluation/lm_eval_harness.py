"""Tasks of lm-evaluation-harness, through its own library (the extra `eval`). Scores nothing itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError
from engine.evaluation.results import Row
from engine.untrusted import library_errors_as


@dataclass(frozen=True)
class Tasks:
    """`names` as the harness has them, of its own tasks and of those in `folder`; `limit` documents of each."""

    names: tuple[str, ...]
    folder: str | None = None
    limit: int | None = None


def check_tasks(tasks: Tasks) -> None:
    """Whether the harness has the tasks, and their data.

    Raises:
        ConfigError: it does not, or is not installed.
    """
    manager = _manager(tasks)
    unknown = [name for name in tasks.names if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"the harness has no task {unknown[0]!r}",
            "--task",
            "a name of `lm-eval ls tasks`, or of a task in --task-path",
        )
    from lm_eval.tasks import get_task_dict

    with _told():
        get_task_dict(list(tasks.names), manager)


def run_tasks(name: str, model: Any, tokenizer: Any, tasks: Tasks, batch_size: int) -> list[Row]:
    """Rows of a loaded model of transformers, called `name`; metrics are called as the harness calls them."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _told():
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks.names),
            limit=tasks.limit,
            task_manager=_manager(tasks),
            bootstrap_iters=1000,
        )
    return list(rows_of(name, results))


def rows_of(name: str, results: Any) -> Iterator[Row]:
    """What the harness returns, as rows: a figure each of every task and group, standard errors among them.

    `acc,none` is `acc`; the filter's name stays where there is one. A group counts the documents of its tasks.
    """
    counts = {task: int(found["effective"]) for task, found in results["n-samples"].items()}
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
            "lm-evaluation-harness is not installed", "--task", do="`pip install .[eval]` where this is installed from"
        ) from error
    with _told():
        return TaskManager(include_path=tasks.folder)


def _told() -> Any:
    return library_errors_as(lambda told: ConfigError(f"the harness cannot run this: {told}", "--task"))
