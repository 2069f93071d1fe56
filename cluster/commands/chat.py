"""The command `chat`: a conversation with one model, or with two side by side."""

from __future__ import annotations

import io
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from cluster.commands.common import debug_option, dtype_option, guarded, remote_code_option
from engine.errors import MergeError

if TYPE_CHECKING:
    from rich.console import Console

    from engine.evaluation.chat import Answer, Conversation

# Seconds between two updates of the terminal.
UPDATE = 0.1
HELP = "/reset begins a new conversation, Ctrl-C ends an answer, Ctrl-D ends the chat."


@click.command()
@click.argument("model")
@click.option("--against", metavar="MODEL", help="A second model, which answers the same questions beside the first.")
@click.option("--system", default="", metavar="TEXT", help="System message, for models whose chat template takes one.")
@click.option(
    "--max-new-tokens", default=512, show_default=True, type=click.IntRange(1), help="Maximum tokens of an answer."
)
@dtype_option
@remote_code_option
@debug_option
def chat(
    model: str, against: str | None, system: str, max_new_tokens: int, dtype: str, trust_remote_code: bool, debug: bool
) -> None:
    """Talk to MODEL in the terminal; with --against, to two models side by side.

    MODEL is a folder, a URI or a hub id of a checkpoint or a LoRA adapter, or CHECKPOINT+ADAPTER. Answers are sampled
    as the model's generation_config.json says. Questions are read from stdin, a line each. /reset begins a new
    conversation.
    """

    def run() -> None:
        import rich.console

        console = rich.console.Console(highlight=False, markup=False, emoji=False)
        names = [model] if against is None else [model, against]
        with console.status("loading"):
            conversations = _load(names, system, max_new_tokens, dtype, trust_remote_code)
        if console.is_terminal:
            console.print(HELP)
        for name, one in zip(names, conversations, strict=True):
            if not one.has_template:
                console.print(f"{name} has no chat template: it continues each question as a text")
        _talk(console, names, conversations)

    guarded(run, debug)


def _load(names: list[str], system: str, most: int, dtype: str, trust_remote_code: bool) -> list[Conversation]:
    """Return a conversation with each model: on a GPU each if there are several, else on the only GPU or the CPU."""
    import torch

    from engine.evaluation.chat import Conversation
    from engine.evaluation.subject import Options

    options = Options(max_new_tokens=most, dtype=dtype, remote_code=trust_remote_code)
    gpus = torch.cuda.device_count()
    devices = [torch.device("cuda", place % gpus) if gpus else torch.device("cpu") for place in range(len(names))]
    return [Conversation(name, options, device, system) for name, device in zip(names, devices, strict=True)]


def _talk(console: Console, names: list[str], conversations: list[Conversation]) -> None:
    """Answer the lines of stdin until it ends."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # of bytes that are no text
    while (question := _read(console)) is not None:
        if question == "/reset":
            for one in conversations:
                one.reset()
        elif question:
            try:
                for one in conversations:
                    one.check(question)
            except MergeError as error:
                console.print(f"error: {error}")
                continue
            _show(console, names, [one.ask(question) for one in conversations])


def _read(console: Console) -> str | None:
    """Return the next line of stdin without white space around it, or None at its end."""
    try:
        return input("> " if console.is_terminal and sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _show(console: Console, names: list[str], answers: list[Answer]) -> None:
    """Print the answers while they are written, side by side if there are two; where no terminal is, when complete."""
    import rich.live

    live = rich.live.Live(console=console, auto_refresh=False, vertical_overflow="visible")
    with live:
        while True:
            done = all(answer.done for answer in answers)
            try:
                if done or console.is_terminal:
                    live.update(_page(names, answers), refresh=True)
                if done:
                    break
                time.sleep(UPDATE)
            except KeyboardInterrupt:
                for answer in answers:
                    answer.stop()
    if not console.is_terminal:
        console.print()  # rich ends a line on terminals alone
    for answer in answers:
        answer.future.result()


def _page(names: list[str], answers: list[Answer]) -> Any:
    import rich.table
    import rich.text

    if len(answers) == 1:
        return rich.text.Text(answers[0].text.strip())
    table = rich.table.Table(expand=True)
    for name in names:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(rich.text.Text(answer.text.strip()) for answer in answers))
    return table
