"""The command line: parses arguments, calls the engine or the cluster, and turns errors into exit codes.

torch and Ray are imported when a command needs them, so that `--help` and `plan` start fast.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import click

from engine import __version__
from engine.config.documents import Document, read_documents
from engine.errors import ConfigError, MergeError, OutputError, RunError
from engine.planning.plan import Plan
from engine.planning.planner import make_plan
from engine.run.place import check_apart, check_place
from engine.storage.paths import is_uri, locate

QUICKSTART = Path(__file__).resolve().parent / "examples" / "quickstart"
# The exit code after Ctrl-C or SIGTERM.
INTERRUPTED = 130
_config = click.argument("config", required=False, type=click.Path(path_type=Path))
_set = click.option(
    "--set", "overrides", multiple=True, metavar="KEY.SUB=VALUE", help="Override one key of the config; repeatable."
)
_strict = click.option(
    "--strict", is_flag=True, help="Refuse keys and parameters that nothing reads, for mergekit's methods too."
)
_kept = click.option(
    "--intermediate-dir",
    "-I",
    "kept",
    metavar="FOLDER",
    help="Of a config with several documents: folder or URI in which the other outputs are kept.",
)
_OUT = "merged"
_debug = click.option("--debug", is_flag=True, help="Show tracebacks and the output of the actors.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="expert-merging")
def main() -> None:
    """Merge fine-tuned experts of one base model on Ray."""


@main.command()
@_config
@click.option("--out", default=_OUT, show_default=True, help="Output folder, or its s3:// or gs:// URI.")
@_set
@click.option(
    "--address", help="Address of a running Ray cluster. Default: RAY_ADDRESS, else this machine is used alone."
)
@click.option(
    "--fresh",
    is_flag=True,
    help="Discard the state of an earlier start and replace an earlier merge. Resumes a start with --fresh.",
)
@_kept
@_strict
@_debug
def merge(
    config: Path | None, out: str, overrides: tuple[str, ...], kept: str | None, strict: bool, **how: Any
) -> None:
    """Merge the experts of CONFIG into one model folder.

    CONFIG defaults to merge.yaml in the current folder, else to the bundled quickstart.
    """

    def run() -> None:
        # Set first, so that SIGTERM at any later time raises KeyboardInterrupt, as Ctrl-C does.
        signal.signal(signal.SIGTERM, _stop)
        target = _target(out)
        check_place(target)
        documents = _documents(config, overrides, strict)
        if len(documents) > 1:
            from cluster.documents import merge_documents

            made = f"{len(documents)} documents"
            done = merge_documents(documents, target, _kept_at(kept), click.echo, **how)
        else:
            plan = _plan(documents[0], target)
            from cluster.driver import merge as merge_by

            made, done = plan.described_models, merge_by(plan, target, **how)
        if done:
            click.echo(f"merged {made} into {target}")
        else:
            click.echo(f"{target} already holds this merge; use --fresh to redo it")

    _guarded(run, how["debug"], "run the same command to resume")


@main.command()
@_config
@click.option("--out", help=f"Output folder or URI of the merge, which is checked as well. Default: {_OUT}.")
@_set
@click.option("--nodes", default=1, show_default=True, type=click.IntRange(1), help="Number of equal nodes.")
@click.option(
    "--cpus", type=click.FloatRange(1), help="CPUs per node. Default for this and the next three: as on this machine."
)
@click.option("--gpus", type=click.IntRange(0), help="GPUs per node.")
@click.option("--memory", type=click.FloatRange(0, min_open=True), help="Memory per node in GB.")
@click.option("--gpu-memory", type=click.FloatRange(0, min_open=True), help="Memory per GPU in GB.")
@_kept
@_strict
@_debug
def plan(
    config: Path | None, out: str | None, overrides: tuple[str, ...], kept: str | None, strict: bool, **machines: Any
) -> None:
    """Check CONFIG and its inputs, and estimate the merge.

    Reads file headers and a small sample of the weights. The estimates are disk space, memory, traffic, time, and the
    share of each expert's change that is not merged.
    """

    def run() -> None:
        target = _target(out or _OUT)
        if out is not None:  # else a plan can be made where nothing can be written
            check_place(target)
        documents = _documents(config, overrides, strict)
        if len(documents) == 1:
            _print(_plan(documents[0], target), machines, target)
            return
        from engine.output.outline import outlined, places_of

        places = places_of(documents, target, _kept_at(kept))
        with outlined(documents, documents[0].path.absolute().parent) as outlines:
            for document, made in zip(documents, outlines.plans, strict=True):
                click.echo(document.label)
                _print(made, machines, places[document.name] if document.name else target)

    _guarded(run, machines.pop("debug"))


@main.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--data", "files", multiple=True, metavar="FILE", help="File with records (.json, .jsonl, .parquet); repeatable."
)
@click.option(
    "--expert",
    "experts",
    multiple=True,
    metavar="MODEL",
    help="Model with which texts are compared: one for all --data, or one per --data in the same order.",
)
@click.option(
    "--out",
    default="evaluation.parquet",
    show_default=True,
    help="Parquet file for the results, a path or s3:// or gs:// URI.",
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
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Dtype of the computation; auto: the dtype of the weights.",
)
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
@click.option("--trust-remote-code", is_flag=True, help="Allow Python code in the models' folders to run.")
@_debug
def evaluate(**options: Any) -> None:
    """Evaluate models on records and on tasks.

    MODEL is a folder, a URI or a hub id.

    Records with a `response`: exact_match and f1 of the generated answer, loss and perplexity of the response. Records
    with `choices` and `answer`: accuracy by generation and by likelihood. Other records: perplexity, and with --expert
    kl, top1_agreement, hidden_distance and hidden_relative. docs/evaluate.md defines the metrics.
    """

    def run() -> None:
        signal.signal(signal.SIGTERM, _stop)
        from cluster.evaluate_command import EvaluateOptions, evaluate_and_print

        evaluate_and_print(EvaluateOptions(**options))

    _guarded(run, options["debug"])


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--out", default="report.html", show_default=True, type=click.Path(path_type=Path), help="File for the page."
)
@click.option(
    "--evaluation",
    "evaluations",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Scores written by `evaluate`, in addition to RUN/merge/evaluation.parquet; repeatable.",
)
@_debug
def report(runs: tuple[str, ...], out: Path, evaluations: tuple[Path, ...], debug: bool) -> None:
    """Write an HTML report of one or several merges.

    RUN is the output folder of a merge, or its URI. The report shows coefficients, losses, memory and time.
    """

    def run() -> None:
        from engine.report.page import report_on

        report_on(runs, out, evaluations)
        click.echo(f"wrote {out}")

    _guarded(run, debug)


@main.command()
def methods() -> None:
    """List the merge methods and their options."""
    from engine.methods.catalog import print_methods

    print_methods()


def _target(out: str) -> str:
    """Return the output as an absolute path or a URI."""
    return out if is_uri(out) else str(locate(out, Path.cwd(), OutputError))


def _kept_at(folder: str | None) -> str | None:
    return None if folder is None else _target(folder)


def _documents(path: Path | None, overrides: tuple[str, ...], strict: bool) -> list[Document]:
    path = path or _default_config()
    if not os.path.isfile(path):  # noqa: PTH113 - false, not an error, for a name that no file can have
        raise ConfigError("no such config file", str(path.absolute()))
    return read_documents(path, overrides, strict)


def _plan(document: Document, target: str) -> Plan:
    """Return the plan of the merge into `target`, in which no input may lie."""
    config = document.path.absolute()
    made = make_plan(document.config({}), config.parent)
    check_apart(made, target, config)
    return made


def _print(made: Plan, machines: Mapping[str, Any], target: str) -> None:
    """Print a plan; of a learned merge with estimates on the given machines."""
    from engine.calibration.records import read_records
    from engine.calibration.samples import about_tokens
    from engine.planning.costs.rates import GB
    from engine.planning.costs.scaling import Machines
    from engine.planning.summary import print_plan, print_weight_space_plan

    if not made.config.learned:
        print_weight_space_plan(made, target)
        return
    given = {name: value for name, value in machines.items() if value is not None}
    given |= {name: value * GB for name, value in given.items() if name.endswith("memory")}
    print_plan(made, about_tokens(made, read_records(made)), replace(Machines.here(), **given), target)


def _default_config() -> Path:
    here = Path("merge.yaml")
    if here.is_file():
        click.echo(f"config: {here.absolute()}")
        return here
    if not (QUICKSTART / "merge.yaml").is_file():
        raise ConfigError(
            "there is no merge.yaml here, and this installation has no quickstart",
            str(Path.cwd()),
            do="give a config, or run cli.py in a checkout, which contains examples/quickstart",
        )
    if not (QUICKSTART / "base" / "config.json").is_file():
        fetched = subprocess.run([sys.executable, str(QUICKSTART / "fetch_base.py")], check=False)
        if fetched.returncode:
            raise ConfigError(
                "there is no merge.yaml here, and the base of the bundled quickstart could not be fetched",
                str(Path.cwd()),
                do="give a config, or fix the cause shown above",
            )
    click.echo(f"config: {QUICKSTART / 'merge.yaml'} (the bundled quickstart; there is no merge.yaml here)")
    return QUICKSTART / "merge.yaml"


def _check_working_directory() -> None:
    """Check that the working directory exists, which relative paths and Ray need."""
    try:
        Path.cwd()
    except OSError as error:
        what = f"the working directory cannot be used: {error.strerror}"
        raise ConfigError(what, os.environ.get("PWD", "."), do="change to an existing folder") from error


def _stop(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _guarded(run: Callable[[], None], debug: bool, stopped: str = "nothing was written") -> None:
    """Call `run`, and exit with the code of its error. `stopped` is printed after Ctrl-C or SIGTERM."""
    try:
        _check_working_directory()
        run()
    except MergeError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        # A file cannot be read or written, such as on a full disk: the run failed, and its state is kept.
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(RunError.exit_code)
    except KeyboardInterrupt:
        click.echo(f"stopped; {stopped}", err=True)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
