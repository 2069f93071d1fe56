"""The command `methods`, a list."""

from __future__ import annotations

import click


@click.command()
def methods() -> None:
    """List the merge methods and their options."""
    from engine.methods.catalog import print_methods

    print_methods()
