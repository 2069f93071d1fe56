"""What the commands share: options, the reading of the config, the plan, and exit codes.

torch and Ray are imported when a command needs them, so that `--help` and `plan` start fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from engine.config.documents import Document, read_documents
from engine.errors import ConfigError, MergeError, OutputError, RunError
from engine.planning.plan import Plan
from engine.planning.planner import make_plan
from engine.run.place import check_apart
from engine.storage.paths import is_uri, locate

# The exit code after Ctrl-C or SIGTERM.
INTERRUPTED = 130
config_argument = click.argument("config", required=False, type=click.Path(path_type=Path))
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY.SUB=VALUE", help="Override one key of the config; repeatable."
)
strict_option = click.option(
    "--strict", is_flag=True, help="Refuse keys and parameters that nothing reads, for mergekit's methods too."
)
kept_option = click.option(
    "--intermediate-dir",
    "-I",
    "kept",
    metavar="FOLDER",
    help="Of a config with several documents: folder or URI in which the other outputs are kept.",
)
dtype_option = click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Dtype of the computation; auto: the dtype of the weights.",
)
remote_code_option = click.option(
    "--trust-remote-code", is_flag=True, help="Allow Python code in the models' folders to run."
)
address_option = click.option(
    "--address", help="Address of a running Ray cluster. Default: RAY_ADDRESS, else this machine is used alone."
)
fresh_option = click.option(
    "--fresh",
    is_flag=True,
    help="Discard the state of an earlier start and replace an earlier output. Resumes a start with --fresh.",
)
OUT = "merged"
debug_option = click.option("--debug", is_flag=True, help="Show tracebacks and the output of the actors.")


def target_of(out: str) -> str:
    """Return the output as an absolute path or a URI."""
    if not out:
        raise ConfigError("the output has no name", "--out", "a folder, or an s3:// or gs:// URI")
    return out if is_uri(out) else str(locate(out, Path.cwd(), OutputError))


def kept_at(folder: str | None) -> str | None:
    """Return the folder for the other outputs of a config with several documents, as `target_of` does."""
    return None if folder is None else target_of(folder)


def documents_of(path: Path | None, overrides: tuple[str, ...], strict: bool) -> list[Document]:
    """Return the documents of a config; without a path, of merge.yaml in the working directory."""
    path = path or _default_config()
    if not os.path.isfile(path):  # noqa: PTH113 - false, not an error, for a name that no file can have
        raise ConfigError("no such config file", str(path.absolute()))
    return read_documents(path, overrides, strict)


def plan_of(document: Document, target: str) -> Plan:
    """Return the plan of the merge into `target`, in which no input may lie."""
    config = document.path.absolute()
    made = make_plan(document.config({}), config.parent)
    check_apart(made, target, config)
    return made


def _default_config() -> Path:
    here = Path("merge.yaml")
    if not here.is_file():
        raise ConfigError(
            "no config was given, and there is no merge.yaml in this folder",
            str(Path.cwd()),
            do="give a config; `init` writes one, and `make demo` in a checkout shows a whole merge",
        )
    click.echo(f"config: {here.absolute()}")
    return here


def _check_working_directory() -> None:
    """Check that the working directory exists, which relative paths and Ray need."""
    try:
        Path.cwd()
    except OSError as error:
        what = f"the working directory cannot be used: {error.strerror}"
        raise ConfigError(what, os.environ.get("PWD", "."), do="change to an existing folder") from error


def stop(number: int, frame: Any) -> NoReturn:
    """Raise KeyboardInterrupt; a handler of signals."""
    raise KeyboardInterrupt


def guarded(run: Callable[[], None], debug: bool, stopped: str = "nothing was written") -> None:
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
