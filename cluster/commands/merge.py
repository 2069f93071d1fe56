"""The command `merge`, of one document or several."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import click

from cluster.commands.common import (
    OUT,
    address_option,
    config_argument,
    debug_option,
    documents_of,
    fresh_option,
    guarded,
    kept_at,
    kept_option,
    plan_of,
    set_option,
    stop,
    strict_option,
    target_of,
)
from cluster.progress import busy
from engine.config.documents import Document
from engine.planning.plan import Plan
from engine.run.place import check_place


@click.command()
@config_argument
@click.option("--out", default=OUT, show_default=True, help="Output folder, or its s3:// or gs:// URI.")
@set_option
@address_option
@fresh_option
@click.option(
    "--extend",
    metavar="RUN",
    help="Output of an earlier merge: merge its experts and those of CONFIG, and compute only what is new.",
)
@kept_option
@strict_option
@click.option(
    "--push-to-hub",
    "hub_name",
    metavar="OWNER/NAME",
    help="Then upload the output to this repository of the Hugging Face hub, as `push` does.",
)
@debug_option
def merge(
    config: Path | None,
    out: str,
    overrides: tuple[str, ...],
    extend: str | None,
    kept: str | None,
    strict: bool,
    hub_name: str | None,
    **how: Any,
) -> None:
    """Merge the experts of CONFIG into one model folder.

    CONFIG defaults to merge.yaml in the current folder.
    """

    def run() -> None:
        # Set first, so that SIGTERM at any later time raises KeyboardInterrupt, as Ctrl-C does.
        signal.signal(signal.SIGTERM, stop)
        target = target_of(out)
        check_place(target)
        if hub_name is not None:
            from engine.output.push import check_target, push

            check_target(hub_name)
        documents = documents_of(config, overrides, strict)
        if len(documents) > 1 and extend is None:
            with busy("loading"):
                from cluster.documents import merge_documents

            made = f"{len(documents)} documents"
            done = merge_documents(documents, target, kept_at(kept), click.echo, **how)
        else:
            plan = _plan(documents, target, extend)
            with busy("loading"):
                from cluster.driver import merge as merge_by

            made, done = plan.described_models, merge_by(plan, target, **how)
        if done:
            click.echo(f"merged {made} into {target}")
        else:
            click.echo(f"{target} already holds this merge; use --fresh to redo it")
        if hub_name is not None:
            click.echo(f"uploaded {out} to {push(target, hub_name, click.echo)}")

    guarded(run, how["debug"], "run the same command to resume")


def _plan(documents: list[Document], target: str, extend: str | None) -> Plan:
    """Return the plan of a merge; with `extend`, of that output's merge and the models of the config."""
    if extend is None:
        return plan_of(documents[0], target)
    from cluster.extension import plan_extended

    return plan_extended(documents, target_of(extend), target)
