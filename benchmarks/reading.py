"""Measure the bytes of checkpoints that a learned merge reads from the disk, by phase.

The phases of a merge over orthogonal task vectors run in one process, with the actors as plain classes; the optimiser
steps are left out. What is read is `read_bytes` of /proc/self/io, which counts the blocks that came from the disk, not
what the page cache gave. Before each turn (an expert's work in its actor, or a call of a shard) the pages of the
checkpoints are dropped from the cache, so that a turn pays for everything that it does not read itself. This stands for
models that do not fit into the cache together. The bytes of the base and of the experts are measured in runs of their
own, in which only these files are dropped; they are given as multiples of the files' size.

Linux only. The models must be on a disk, not in memory (tmpfs).
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import models
from models import Models
from report import Report, Target, json_option, print_table

from actors.expert import Expert
from actors.shard import Shard
from engine.calibration.records import read_records
from engine.calibration.samples import make_samples
from engine.calibration.text_encoder import TextEncoder
from engine.config.reader import load_config
from engine.output.model_folder import output_files
from engine.planning.open_models import weight_files
from engine.planning.plan import Plan
from engine.planning.planner import make_plan
from engine.shards.parts import tensor_groups
from engine.sizes import GROUPS_PER_CALL
from engine.storage.paths import open_folder
from engine.task_vectors.coefficients import ChunkLayout, Coefficients

MADV_RANDOM, MADV_DONTNEED = 1, 4
libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
# Largest multiples of their size that are read of the experts before the first optimiser step, and by the output.
LEARNING, WRITING = 1.02, 1.02


def read_bytes() -> int:
    """Return the bytes that this process has caused to be read from disks."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def drop(files: Sequence[Path]) -> None:
    """Drop the pages of files from this process and from the page cache, and switch off reading ahead in its maps.

    Otherwise a page that is touched would bring in megabytes, which are most of a small model.
    """
    names = {str(file.resolve()) for file in files}
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        place, _, rest = line.partition(" ")
        if rest.split(maxsplit=4)[-1].strip() in names:
            start, stop = (int(text, 16) for text in place.split("-"))
            for advice in (MADV_DONTNEED, MADV_RANDOM):
                libc.madvise(start, stop - start, advice)
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class Turns:
    """Counts the bytes that are read in each phase, after dropping `files` from the cache at the start of each turn."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files, self.read = files, defaultdict[str, int](int)

    @contextmanager
    def turn(self, phase: str) -> Iterator[None]:
        drop(self.files)
        before = read_bytes()
        yield
        self.read[phase] += read_bytes() - before


def run(plan: Plan, turns: Turns, scratch: Path) -> None:
    """Run the phases that read checkpoints, in the order of `LearnedMerge`."""
    state, shard = open_folder(scratch / "state"), Shard(plan, 0, open_folder(scratch / "state"))
    samples, groups = make_samples(read_records(plan), TextEncoder(None), plan), tensor_groups(plan)
    with turns.turn("reading the base"):
        shard.check_base([file.address for file in weight_files(plan.base)])
    for k in range(len(plan.experts)):
        expert = Expert(plan, 0)
        with turns.turn("reading the experts and computing targets"):
            for first in range(0, len(groups), GROUPS_PER_CALL):
                expert.survey(k, range(len(groups))[first : first + GROUPS_PER_CALL], state)
            for sample in samples[k]:
                expert.target(sample, state, f"targets/{k}-{sample.index}.safetensors")
    wanted = set(plan.orthogonal)
    for group in groups:
        with turns.turn("orthogonal task vectors"):
            shard.orthogonalise([name for name in group if name in wanted])
    write(plan, turns, shard, scratch)


def write(plan: Plan, turns: Turns, shard: Shard, scratch: Path) -> None:
    layout = ChunkLayout.make(plan.numels, dict.fromkeys(plan.merged, 1))
    coefficients = Coefficients.constant(layout, [0.3] * len(plan.experts))
    for file in output_files(plan):
        with turns.turn("writing"):
            shard.write(open_folder(scratch / "out"), file, {name: coefficients.of(name) for name in plan.merged})


def measured(config: Path, whose: str, act: Callable[[Plan, Turns, Path], None]) -> dict[str, float]:
    """Return the multiples of the size of the base or the experts that each phase reads."""
    plan = make_plan(load_config(config, ["parameters.task_vectors=orthogonal"]), config.parent)
    chosen = [plan.base] if whose == "the base" else plan.experts
    files = [file.path for model in chosen for file in weight_files(model)]
    for file in (file.path for model in (plan.base, *plan.experts) for file in weight_files(model)):
        file.read_bytes()  # the files that are not measured stay in the cache
    os.sync()  # pages that are not on the disk yet could not be dropped
    turns, size = Turns(files), sum(file.stat().st_size for file in files)
    with tempfile.TemporaryDirectory(dir=config.parent) as scratch:
        act(plan, turns, Path(scratch))
    return {phase: nbytes / size for phase, nbytes in turns.read.items()}


@click.command(help=__doc__)
@models.options
@click.option("--experts", "-k", default=4, show_default=True, type=click.IntRange(min=2))
@json_option("a temporary folder")
def main(workdir: Path, size: str, dtype: str, own_heads: bool, experts: int, path: Path | None) -> None:
    made = Models(workdir.absolute(), size, dtype, own_heads)
    made.base()
    with tempfile.TemporaryDirectory(dir=made.workdir) as folder:
        config = made.write_merge(Path(folder) / "merge.yaml", experts, samples=2, tokens=16)
        found = {whose: measured(config, whose, run) for whose in ("the experts", "the base")}
    report = Report({**made.describe(), "experts": experts})
    phases = list(found["the experts"])
    for whose, of_phase in found.items():
        of_phase["before the first step"] = sum(of_phase[phase] for phase in phases if phase != "writing")
        report.other |= {f"{whose}: {phase}": value for phase, value in of_phase.items()}
    rows = {phase: [f"{found[whose][phase]:.2f}" for whose in found] for phase in found["the base"]}
    print_table(f"multiples of their size read from the disk, K={experts}", list(found), rows)
    of_experts = found["the experts"]
    report.targets.append(Target("experts, before the first step", of_experts["before the first step"], LEARNING))
    report.targets.append(Target("experts, writing", of_experts["writing"], WRITING))
    report.finish(path or workdir / "results" / "reading.json")


if __name__ == "__main__":
    main()
