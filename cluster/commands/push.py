"""The command `push`, which uploads a finished merge to the hub."""

from __future__ import annotations

import click

from cluster.commands.common import debug_option, guarded


@click.command()
@click.argument("out", metavar="OUT")
@click.argument("name", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Let others see a repository that is new. Default: it is private.")
@click.option("--license", "license_id", default="", metavar="ID", help="License in the card. Default: the base's.")
@click.option(
    "--base-model",
    "bases",
    multiple=True,
    metavar="OWNER/NAME",
    help="Hub id of the base or of an expert in the card; repeatable. Default: those that the merge was given.",
)
@debug_option
def push(out: str, name: str, public: bool, license_id: str, bases: tuple[str, ...], debug: bool) -> None:
    """Upload the output folder OUT of a merge to the repository OWNER/NAME of the Hugging Face hub.

    The token is that of HF_TOKEN or of `hf auth login`. Only files that the merge wrote are uploaded, and no path of
    this machine.
    """

    def run() -> None:
        from engine.output import push as hub

        hub.check_target(name)
        click.echo(f"uploaded {out} to {hub.push(out, name, click.echo, public, license_id, bases)}")

    guarded(run, debug, "the repository holds what it held before")
