"""Whole merges on the Ray that is connected, and what of them must not depend on the placement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cluster.driver import attempt, prepare
from cluster.progress import Progress
from engine.plan import Plan
from engine.run_folder import identity, open_run


def run_merge(plan: Plan, out: Path, each_step: Callable[[str], None] | None = None) -> Path:
    """Merge on the Ray that is connected; `each_step` is called with a phase's name as it advances."""
    samples = prepare(plan)
    with open_run(str(out), identity(plan), fresh=False) as run, Progress() as progress:
        if each_step is not None:
            advance = progress.advance

            def watched(name: str, done: int, note: str = "") -> None:
                advance(name, done, note)
                each_step(name)

            progress.advance = watched  # type: ignore[method-assign]
        run.keep_plan(plan)
        attempt(plan, samples, run, progress, identity(plan))
    return out


def result(out: Path) -> dict[str, bytes]:
    """What must not depend on who computed it: weights, coefficients and importance, byte for byte."""
    files = [*out.glob("*.safetensors"), *out.glob("merge/coefficients.parquet"), *out.glob("merge/importance.parquet")]
    assert len(files) >= 2
    return {path.name: path.read_bytes() for path in files}
