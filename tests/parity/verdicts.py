"""Every config through both programs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from parity.comparison import compare
from parity.merges import of_engine, of_mergekit
from parity.models import make_models
from parity.table import BOTH_REFUSE, HERE, REFUSED, index


def verdicts(work: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and the verdict of each config, merged by both programs below `work`.

    mergekit's results and the models stay there for the next call; this engine's are removed.
    """
    for name in names:
        make_models(work, index(), [name])
        entry, config = index()[name], work / f"{name}.yaml"
        shutil.copyfile(HERE / "configs" / config.name, config)
        theirs, ours = work / "mergekit" / name, work / "engine" / name
        wanted, own = of_mergekit(config, entry["tool"], theirs), of_engine(config, ours)
        if own.fault:
            verdict = f"fault: {own.said}"
        elif not wanted.ok:
            verdict = BOTH_REFUSE if not own.ok else f"accepted, and {BOTH_REFUSE}"
        else:
            verdict = compare(config, ours, theirs).verdict if own.ok else REFUSED
        shutil.rmtree(ours)
        yield name, verdict
