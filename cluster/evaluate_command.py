"""The command `evaluate`: its options, and the run from data files to printed results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.evaluation.results import Row


@dataclass(frozen=True)
class EvaluateOptions:
    """The arguments and options of `evaluate`, by the names that the command line has for them.

    Raises:
        ConfigError: There is no model, or a number is below 1.
    """

    models: tuple[str, ...]
    files: tuple[str, ...]
    experts: tuple[str, ...]
    out: str | None
    limit: int | None
    tasks: tuple[str, ...]
    task_path: str | None
    num_gpus: int | None
    address: str | None
    debug: bool
    batch_size: int
    max_new_tokens: int
    max_length: int
    dtype: str
    trust_remote_code: bool
    record: bool = False

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("there are no models", "evaluate", "at least one")
        for name in ("limit", "batch_size", "max_new_tokens", "max_length"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"{name} is {number}", "evaluate", "at least 1")


def evaluate_and_print(given: EvaluateOptions) -> None:
    """Evaluate models, write the results and print them. Raises what `cluster.evaluation.make_jobs` raises."""
    from engine.evaluation.tables import print_results
    from engine.output.scores import outputs_among, record_scores

    outputs = outputs_among(given.models) if given.record else []
    rows = evaluated(given)
    print_results(rows)
    for output in outputs:
        shown = record_scores(rows, output)
        click.echo(
            f"wrote the scores into {output.where}: merge/evaluation.parquet" + (" and README.md" if shown else "")
        )
        if not shown:
            click.echo("README.md was changed since the merge and stays as it is")


def evaluated(given: EvaluateOptions) -> list[Row]:
    """Evaluate models and return the results, which are also written to `out`, if it is given.

    Raises what `cluster.evaluation.make_jobs` raises.
    """
    from engine.evaluation.items import read_data
    from engine.evaluation.results import results_file, save_results

    file = None if given.out is None else results_file(given.out)
    data = read_data(given.files, given.limit)
    from cluster.evaluation import evaluate as evaluate_by
    from cluster.evaluation import make_jobs
    from engine.evaluation.lm_eval_harness import Tasks
    from engine.evaluation.subject import Options

    options = Options(given.batch_size, given.max_new_tokens, given.max_length, given.dtype, given.trust_remote_code)
    tasks = Tasks(given.tasks, given.task_path, given.limit)
    jobs = make_jobs(given.models, data, given.experts, tasks, options)
    rows = evaluate_by(jobs, given.address, given.debug, given.num_gpus)
    if file is not None:
        save_results(rows, *file)
    return rows
