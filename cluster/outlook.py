"""What the statistics of a config's experts foretell of its merge (`python cli.py plan --with-stats`).

The layers are fitted in this process, from the base, the experts and the folders of statistics that the config names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import rich.box
import rich.console
import rich.table

from cluster.progress import busy
from engine.errors import ConfigError
from engine.machine import usable_cpus
from engine.planning.open_models import open_task_vectors, weight_files
from engine.planning.plan import Plan
from engine.report.charts import BLOCK, ends
from engine.run.inputs import identity
from engine.run.keys import digest_key
from engine.run.reuse import open_cache
from engine.shards.projections import fit_layers
from engine.shards.statistics import MergeStatistics, check_given
from engine.statistics.fits import Fits, described, total_residual
from engine.storage.local_folder import digest

# Into how many parts the blocks are divided.
PARTS = 3


def foretell(plan: Plan, console: rich.console.Console | None = None) -> Fits:
    """Fit the layers of a plan, print what the fits foretell on a console or stdout, and return them.

    Raises:
        ConfigError: A model of the config has no statistics, or the output has other layers than the base.
        CheckpointError: The statistics are of other models or damaged, or a weight is not finite.
    """
    console = console or rich.console.Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    with busy("fitting the layers"):
        fits = _fits(plan, console)
    if fits:
        console.print(_residuals(fits))
        console.print(_coefficients(fits, [expert.name for expert in plan.experts]))
    foretold = described(fits)
    console.print(f"{foretold[0].upper()}{foretold[1:]}.")
    return fits


def _fits(plan: Plan, console: rich.console.Console) -> Fits:
    config = plan.config
    if config.recipe is not None and (config.recipe.baseless or not config.recipe.plain):
        raise ConfigError(
            "the layers of the output are not those of a base, with which experts are compared",
            "--with-stats",
            "`models` and a `base_model`, without `slices` and `modules`",
        )
    without = next((given.name for given in config.models if given.statistics is None), None)
    if without is not None:
        raise ConfigError(
            f"expert {without!r} has no statistics",
            "--with-stats",
            "`statistics: FOLDER` of every model",
            "run `python cli.py stats CONFIG --out DIR`, and give each model `statistics: DIR/NAME`",
        )
    # Whatever the method needs, the fits need Gram matrices of every expert.
    plan = replace(plan, config=config.model_copy(update={"collect": ("gram",), "collect_base": False}))
    digests = _digests(plan, console)
    for k in range(len(plan.experts)):
        check_given(plan, k, digests)
    own = open_task_vectors(plan, usable_cpus())
    return fit_layers(plan, own, own, MergeStatistics(plan, None), plan.merged)


def _digests(plan: Plan, console: rich.console.Console) -> dict[str, str]:
    """Return the SHA-256 of all weight files by address, those that a merge has already hashed from the cache."""
    cache, files = open_cache(plan.config, console.print), identity(plan).files

    def sha256(address: str) -> str:
        key, file = digest_key(address, files[address]), files[address]
        known = cache.read("digests", key) if cache is not None else None
        found = known.decode() if known is not None and len(known) == 64 else digest(file.path)
        if cache is not None and known is None:
            cache.write("digests", key, found.encode())
        return found

    addresses = [file.address for model in (plan.base, *plan.experts) for file in weight_files(model)]
    with ThreadPoolExecutor(usable_cpus(), "digests") as pool:
        return dict(zip(addresses, pool.map(sha256, addresses), strict=True))


def _residuals(fits: Fits) -> rich.table.Table:
    """Return a table of the residual of kinds of layers, of parts of the model, and of all layers."""
    table = rich.table.Table(box=rich.box.SIMPLE)
    table.add_column("layers")
    for head in ("number", "share of the change", "residual", "share of all left"):
        table.add_column(head, justify="right")
    energy, left = sum(fit.energy for fit in fits.values()), total_residual(fits)
    for title, names in _groups(list(fits)):
        some = {name: fits[name] for name in names}
        share = sum(fit.energy for fit in some.values()) / energy if energy else 0.0
        residual = total_residual(some)
        of_left = share * residual / left if left else 0.0
        table.add_row(title, str(len(some)), f"{share:.1%}", f"{residual:.1%}", f"{of_left:.1%}")
    return table


def _groups(names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield kinds of layers, parts of the model by the numbers of its blocks, and all layers, each with a title."""
    blocks = {name: match for name in names if (match := BLOCK.fullmatch(name))}
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) if name in blocks else name, []).append(name)
    yield from zip(ends(list(kinds)), kinds.values(), strict=True)
    numbers = sorted({int(match["block"]) for match in blocks.values()})
    for part in np.array_split(np.array(numbers, dtype=int), PARTS):
        if len(part):
            inside = [name for name, match in blocks.items() if part[0] <= int(match["block"]) <= part[-1]]
            yield f"block {part[0]}" if len(part) == 1 else f"blocks {part[0]} to {part[-1]}", inside
    yield "all", list(names)


def _coefficients(fits: Fits, experts: Sequence[str]) -> rich.table.Table:
    """Return a table of the experts' coefficients in closed form."""
    table = rich.table.Table(box=rich.box.SIMPLE)
    table.add_column("expert", overflow="fold")
    for head in ("mean coefficient", "smallest", "largest"):
        table.add_column(head, justify="right")
    for name, values in zip(experts, np.array([fit.coefficients for fit in fits.values()]).T, strict=True):
        table.add_row(name, *(f"{value:.3f}" for value in (values.mean(), values.min(), values.max())))
    return table
