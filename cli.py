"""The command line. Each command is a file of cluster/commands."""

from __future__ import annotations

import click

from cluster.commands.cache import cache
from cluster.commands.chat import chat
from cluster.commands.compress import compress
from cluster.commands.compress_delta import compress_delta
from cluster.commands.evaluate import evaluate
from cluster.commands.init import init
from cluster.commands.merge import merge
from cluster.commands.methods import methods
from cluster.commands.plan import plan
from cluster.commands.push import push
from cluster.commands.report import report
from cluster.commands.schema import schema
from cluster.commands.search import search
from cluster.commands.stats import stats
from engine import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="expert-merging")
def main() -> None:
    """Merge fine-tuned experts of one base model on Ray."""


for command in (
    init,
    merge,
    plan,
    stats,
    search,
    compress,
    compress_delta,
    evaluate,
    chat,
    report,
    push,
    methods,
    schema,
    cache,
):
    main.add_command(command)

if __name__ == "__main__":
    main()
