"""The command `evaluate`: its arguments and options."""

from __future__ import annotations

import signal
from typing import Any

import click

from cluster.commands.common import debug_option, dtype_option, guarded, remote_code_option, stop


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--data", "files", multiple=True, metavar="FILE", help="File with records (.json, .jsonl, .parquet); repeatable."
)
@click.option(
    "--expert",
    "experts",
    multiple=True,
    metavar="MODEL",
    help="Model to which a data set belongs: one for all --data, or one per --data in the same order, and per --task.",
)
@click.option(
    "--out",
    default="evaluation.parquet",
    show_default=True,
    help="Parquet file for the results, a path or s3:// or gs:// URI.",
)
@click.option(
    "--record",
    is_flag=True,
    help="Write the scores also into each MODEL that is the output of a merge, for its report and its model card.",
)
@click.option("--limit", type=click.IntRange(1), help="Use only the first records of each file and task.")
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Records per forward pass.")
@click.option(
    "--max-new-tokens",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    help="Maximum tokens of a generated answer.",
)
@click.option(
    "--max-length", default=2048, show_default=True, type=click.IntRange(1), help="Maximum tokens of a record."
)
@dtype_option
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="Task of lm-evaluation-harness; repeatable.")
@click.option(
    "--task-path",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, resolve_path=True),
    help="Folder with your own tasks for the harness.",
)
@click.option("--num-gpus", type=click.IntRange(0), help="GPUs per model. Default: one if there are any.")
@click.option(
    "--address", help="Address of a running Ray cluster. Default: RAY_ADDRESS, else Ray starts here if needed."
)
@remote_code_option
@debug_option
def evaluate(**options: Any) -> None:
    """Evaluate models on records and on tasks.

    MODEL is a folder, a URI or a hub id, or a LoRA adapter: BASE+ADAPTER, or ADAPTER alone where it names its base.

    Records with a `response`: exact_match and f1 of the generated answer, loss and perplexity of the response. Records
    with `choices` and `answer`: accuracy by generation and by likelihood. Other records: perplexity, and with --expert
    kl, top1_agreement, hidden_distance and hidden_relative. docs/evaluate.md defines the metrics.
    """

    def run() -> None:
        signal.signal(signal.SIGTERM, stop)
        from cluster.evaluate_command import EvaluateOptions, evaluate_and_print

        evaluate_and_print(EvaluateOptions(**options))

    guarded(run, options["debug"])
