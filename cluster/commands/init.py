"""The command `init`, which asks for the models and writes a config."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from cluster.commands.common import debug_option, guarded, plan_of, target_of
from engine.config.documents import parse_documents
from engine.errors import ConfigError, MergeError, OutputError
from engine.methods.options import Method, Option
from engine.methods.registry import LEARNED, NATIVE
from engine.storage.local_folder import check_creatable
from engine.storage.paths import is_uri

METHODS = {**LEARNED, **NATIVE}
DEFAULT = "expert_merging_pp"
SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "merge.schema.json"
# The value of an option that has no default: halfway between two models.
REQUIRED = 0.5


@click.command()
@click.argument("config", default="merge.yaml", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--base", metavar="MODEL", help="Folder, URI or hub id of the model that the experts were fine-tuned from."
)
@click.option("--expert", "experts", multiple=True, metavar="MODEL", help="Checkpoint or LoRA adapter; repeatable.")
@click.option(
    "--data",
    "files",
    multiple=True,
    metavar="FILE",
    help="Records of an expert's domain, for methods that run on samples; once for each --expert, in the same order.",
)
@click.option("--method", type=click.Choice(list(METHODS)), help=f"Merge method.  [default: {DEFAULT}]")
@debug_option
def init(
    config: Path, base: str | None, experts: tuple[str, ...], files: tuple[str, ...], method: str | None, debug: bool
) -> None:
    """Write a commented CONFIG (merge.yaml) and check it.

    Asks for what no option gives. No file is replaced.
    """

    def run() -> None:
        place = config.absolute()
        if os.path.lexists(place):
            raise OutputError("the file exists", str(place), do="give another name, or remove the file")
        check_creatable(place, "give another name")
        asked = not (base and experts)
        chosen = METHODS[method or (_ask("method", DEFAULT, type=click.Choice(list(METHODS))) if asked else DEFAULT)]
        of_base = base or _ask("base model (folder, URI or hub id)")
        models = list(experts) or _ask_each("expert {} (a checkpoint or adapter; nothing to end)")
        data = list(files) if chosen.runs_models else []
        if len(data) < len(files):
            click.echo(f"not used by {chosen.name}, which takes no data: {', '.join(files)}")
        if chosen.runs_models and not data:
            data = [_ask(f"records of the domain of {model} (.json, .jsonl or .parquet)") for model in models]
        if chosen.runs_models and len(data) != len(models):
            what = f"{len(models)} experts and {len(data)} files with records"
            raise ConfigError(what, "--data", "one file for each expert, in the same order")
        given = [_from(place.parent, one) for one in (of_base, *models, *data)]
        text = commented(chosen, given[0], given[1 : len(models) + 1], given[len(models) + 1 :], place)
        if not _checked(text, place, asked):
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("x", encoding="utf-8") as file:
            file.write(text)
        click.echo(f"wrote {config}; next:")
        click.echo(f"  python cli.py plan {config}                  what the merge takes")
        click.echo(f"  python cli.py merge {config} --out merged    merge")

    guarded(run, debug)


def commented(method: Method, base: str, experts: Sequence[str], files: Sequence[str], place: Path) -> str:
    """Return the text of a config, with the options of its method and their defaults as comments.

    Args:
        method: The method.
        base, experts, files: Models, and for a method that runs them on samples a file with records for each expert.
        place: The file that the text is for.
    """
    lines = []
    if SCHEMA.is_file():
        lines.append(f"# yaml-language-server: $schema={os.path.relpath(SCHEMA, place.parent)}")
    lines += [
        "# docs/config.md describes every key, docs/methods.md every method. Relative paths start in this folder.",
        f"merge_method: {method.name}    # {method.summary}",
        f"base_model: {_yaml(base)}",
        "models:",
    ]
    for number, expert in enumerate(experts):
        lines.append(f"  - model: {_yaml(expert)}")
        if method.runs_models:
            lines.append(
                f"    calibration: {_yaml(files[number])}    # records of the expert's domain, with or without answers"
            )
        per_model = [option for option in method.options if option.scope != "merge"]
        if per_model and not number:
            lines.append(f"    # parameters: {{{per_model[0].name}: …}}    # of this model alone")
    required = [option for option in method.options if option.required]
    lines += ["", *(f"parameters:\n  {option.name}: {REQUIRED}    # {option.about}" for option in required[:1])]
    optional = [option for option in method.options if not option.required]
    if optional:
        lines += ["# Options of the method, with their defaults.", *(["# parameters:"] if not required else [])]
        keys = [f"#   {option.name}: {_default(option)}" for option in optional]
        width = max(map(len, keys))
        lines += [f"{key:{width}}  # {option.about}" for key, option in zip(keys, optional, strict=True)]
    lines += [
        "",
        "# dtype: bfloat16        # of the computation; default: the base's",
        "# out_dtype: bfloat16    # of the written weights; default: each tensor's",
    ]
    return "\n".join(lines) + "\n"


def _checked(text: str, place: Path, asked: bool) -> bool:
    """Plan the merge of a config. If that fails, ask whether to write it; raise the error if nobody is asked."""
    try:
        (document,) = parse_documents(text, place)
        made = plan_of(document, target_of(str(place.parent / "merged")))
    except MergeError as error:
        if not asked:
            raise
        click.echo(f"error: {error}", err=True)
        return click.confirm("write the config all the same?", default=False)
    click.echo(f"checked: {made.described_models}, {len(made.merged)} tensors to merge")
    return True


def _ask(question: str, default: str | None = None, **options: Any) -> str:
    """Return the answer to a question.

    Raises:
        ConfigError: The input has ended.
    """
    try:
        answer: str = click.prompt(question, default=default, **options)
    except click.Abort as error:
        do = "give --base, --expert, --data and --method, or run the command in a terminal"
        raise ConfigError(f"no answer to the question for the {question}", "the input", do=do) from error
    return answer


def _ask_each(question: str) -> list[str]:
    """Return the answers to a question that is asked until there is none."""
    answers: list[str] = []
    while answer := _ask(question.format(len(answers) + 1), default="" if answers else None, show_default=False):
        answers.append(answer)
    return answers


def _from(folder: Path, given: str) -> str:
    """Return a path that is relative to the working directory as one relative to a folder; all else as it is."""
    if is_uri(given) or folder == Path.cwd() or Path(given).is_absolute() or not os.path.exists(given):  # noqa: PTH110
        return given
    return os.path.relpath(given, folder)


def _yaml(text: str) -> str:
    return yaml.safe_dump(text, width=2**31, allow_unicode=True).removesuffix("...\n").strip()


def _default(option: Option) -> str:
    return _yaml(option.default) if isinstance(option.default, str) else str(option.default).lower()
