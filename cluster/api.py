"""Merging from Python: `from cluster import merge, plan, evaluate, report`. docs/python.md shows them at work.

Each function does what the command of its name does, and raises a `MergeError` where that prints an error.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.console

from cluster.commands.common import kept_at, plan_of, target_of
from cluster.commands.plan import plan_alone, print_on
from cluster.evaluate_command import EvaluateOptions, evaluated
from cluster.results import EvaluationResult, MergeResult, PlannedMerge
from engine.config.documents import Document, Given, given_documents
from engine.errors import ConfigError
from engine.run.place import check_place

# The columns of the printed plan: wide enough that no row of its tables is folded.
WIDTH = 160


Model = str | os.PathLike[str] | MergeResult


def merge(
    config: Given,
    out: str | os.PathLike[str] = "merged",
    overrides: Mapping[str, Any] | None = None,
    *,
    address: str | None = None,
    fresh: bool = False,
    extend: Model | None = None,
    intermediate_dir: str | os.PathLike[str] | None = None,
    strict: bool = False,
    debug: bool = False,
) -> MergeResult:
    """Merge the experts of a config into one model folder. The same call resumes a merge that was interrupted.

    A process that is connected to Ray, such as that of a notebook, uses this Ray and stays connected. Without one, a
    learned merge starts Ray on this machine and ends it again.

    Args:
        config: The path of a YAML; its text, of at least two lines; or its keys and values. Relative paths in the last
            two are relative to the working directory.
        out: The output folder, or its s3:// or gs:// URI.
        overrides: New values of keys, such as `{"parameters.epochs": 4, "models.0.name": "math"}`.
        address: The address of a running Ray cluster; None uses RAY_ADDRESS, else this machine alone.
        fresh: Discard the state of an earlier start, and replace an earlier merge.
        extend: An earlier merge, whose experts are merged with those of the config.
        intermediate_dir: Of a config with several documents: the folder or URI in which the other outputs are kept.
        strict: Refuse keys and parameters that nothing reads, for mergekit's methods too.
        debug: Show the output of the actors.

    Raises:
        InputError: The config, a model, a calibration file or the output folder is wrong.
        ClusterError: The cluster cannot be reached or lacks resources, or the output's disk lacks space.
        RunError: The merge failed; its state is kept.
    """
    target = target_of(os.fspath(out))
    check_place(target)
    kept = kept_at(None if intermediate_dir is None else os.fspath(intermediate_dir))
    documents = given_documents(config, overrides, strict)
    if extend is None:
        return merge_given(documents, target, kept, address, fresh, debug)
    from cluster.driver import merge as merge_by
    from cluster.extension import plan_extended

    made = plan_extended(documents, target_of(*_texts(extend)), target)
    return MergeResult(target, merge_by(made, target, address, fresh, debug))


def plan(
    config: Given,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    nodes: int = 1,
    cpus: float | None = None,
    gpus: int | None = None,
    memory: float | None = None,
    gpu_memory: float | None = None,
    with_stats: bool = False,
    strict: bool = False,
) -> PlannedMerge:
    """Check a config and its inputs, and estimate the merge. Reads file headers and a small sample of the weights.

    Args:
        config, overrides, strict: See `merge`.
        out: The output folder of the merge, which is checked as well; None checks none.
        nodes: Number of equal nodes.
        cpus, gpus: Those of a node; None: those of this machine.
        memory, gpu_memory: Memory of a node and of a GPU, in GB; None: that of this machine.
        with_stats: Tell what the statistics of the models foretell, too, which reads all weights.

    Raises:
        InputError: The config, a model, statistics or a calibration file is wrong.
    """
    target = target_of("merged" if out is None else os.fspath(out))
    if out is not None:
        check_place(target)
    machines = {"nodes": nodes, "cpus": cpus, "gpus": gpus, "memory": memory, "gpu_memory": gpu_memory}
    text = io.StringIO()
    console = rich.console.Console(
        file=text, width=WIDTH, force_jupyter=False, highlight=False, soft_wrap=True, markup=False, emoji=False
    )
    documents = given_documents(config, overrides, strict)
    if len(documents) == 1 or with_stats:
        made = plan_alone(documents, target)
        estimates = print_on(console, made, machines, target, with_stats)
        return PlannedMerge(made, estimates, text.getvalue())
    from engine.output.outline import outlined, places_of

    places = places_of(documents, target, None)
    with outlined(documents, documents[0].path.absolute().parent) as outlines:
        for document, made in zip(documents, outlines.plans, strict=True):
            console.print(document.label)
            estimates = print_on(console, made, machines, places[document.name] if document.name else target)
    return PlannedMerge(made, estimates, text.getvalue())


def evaluate(
    models: Model | Sequence[Model],
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    *,
    experts: Model | Sequence[Model] = (),
    tasks: str | Sequence[str] = (),
    task_path: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    max_length: int = 2048,
    dtype: str = "auto",
    num_gpus: int | None = None,
    address: str | None = None,
    trust_remote_code: bool = False,
    debug: bool = False,
) -> EvaluationResult:
    """Evaluate models on files with records, and on tasks of lm-evaluation-harness. docs/evaluate.md has the metrics.

    Args:
        models: One or several models: a folder, a URI, a hub id, or what `merge` returned.
        data: One or several files with records (.json, .jsonl, .parquet).
        experts: The models with which texts are compared: one for all data, or one per file.
        tasks, task_path: Tasks of lm-evaluation-harness, and a folder with your own.
        out: Parquet file for the results, a path or URI; None writes none.
        limit: Use only the first records of each file and task.
        batch_size: Records per forward pass.
        max_new_tokens, max_length: Maximum tokens of a generated answer, and of a record.
        dtype: Dtype of the computation; `auto` is that of the weights.
        num_gpus: GPUs per model; None is one if there are any.
        address: The address of a running Ray cluster; see `merge`.
        trust_remote_code: Allow Python code in the models' folders to run.
        debug: Show the output of the workers.

    Raises:
        InputError: A model, a file or the place of the results is wrong.
        ClusterError: The cluster cannot be reached, or no node has the GPUs.
        RunError: The evaluation failed.
    """
    given = EvaluateOptions(
        models=_texts(models),
        files=_texts(data),
        experts=_texts(experts),
        out=None if out is None else os.fspath(out),
        limit=limit,
        tasks=_texts(tasks),
        task_path=None if task_path is None else os.fspath(task_path),
        num_gpus=num_gpus,
        address=address,
        debug=debug,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    from engine.evaluation.results import as_table

    return EvaluationResult(as_table(evaluated(given)), given.out)


def report(
    runs: Model | Sequence[Model],
    out: str | os.PathLike[str] = "report.html",
    *,
    evaluations: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Write an HTML report of one or several merges, and return its absolute path.

    Args:
        runs: The output folders of merges, their URIs, or what `merge` returned.
        out: The file for the page.
        evaluations: Files with scores that `evaluate` has written, which are shown as well.

    Raises:
        ConfigError: A folder is not the output of a merge, or a file is damaged.
        OutputError: The file exists and is not a report, or cannot be created.
    """
    from engine.report.page import report_on

    given = _texts(runs)
    if not given:
        raise ConfigError("there are no runs", "report", "at least one")
    report_on(given, Path(out), [Path(one) for one in _texts(evaluations)])
    return Path(out).absolute()


def merge_given(
    documents: Sequence[Document], target: str, kept: str | None, address: str | None, fresh: bool, debug: bool
) -> MergeResult:
    """Make the merges of a config; see `merge`."""
    if len(documents) > 1:
        from cluster.documents import merge_documents

        return MergeResult(target, merge_documents(documents, target, kept, print, address, fresh, debug))
    made = plan_of(documents[0], target)
    from cluster.driver import merge as merge_by

    return MergeResult(target, merge_by(made, target, address, fresh, debug))


def _texts(given: Model | Sequence[Model]) -> tuple[str, ...]:
    """Return one or several models or files as paths, URIs or hub ids."""
    if isinstance(given, str | os.PathLike | MergeResult):
        given = [given]
    return tuple(one.path if isinstance(one, MergeResult) else os.fspath(one) for one in given)
