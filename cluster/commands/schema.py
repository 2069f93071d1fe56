"""The command `schema`, which prints the JSON schema of a config."""

from __future__ import annotations

import click


@click.command()
def schema() -> None:
    """Print the JSON schema of a config, with which editors complete and check it.

    docs/config.md says how an editor finds it.
    """
    from engine.config.json_schema import as_text, config_schema

    click.echo(as_text(config_schema()), nl=False)
