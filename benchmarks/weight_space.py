"""Compare weight-space merges with mergekit's on the same files: peak anonymous memory and time, by K and method.

Each merge is a `python cli.py merge`, or a `mergekit-yaml`, of the same YAML. In a round, the
variants run one after the other on the same cores, with all inputs in the page cache; the next round reverses their
order. A figure is the median of the rounds; a ratio is the median of the rounds' ratios. Every method and K is measured
with one shard on two cores. The K of `--timed` gets several rounds, and also two shards, and one shard on one core.
mergekit's ties takes minutes: it gets one round, and none on one core. slerp and passthrough merge one model (K is 1),
and these and model_stock are measured at one K, in float32 and bfloat16, also on Ray.

`merge` is the time of the merge alone. For this engine it is the seconds in merge/memory.json without the start of
processes and the SHA-256 of the inputs; for mergekit it is its command's function, timed in its own process without the
imports. `whole` is the time of the command. This engine forces its files to the disk, mergekit does not.

Memory is the shard's own gauge, and RssAnon of mergekit's process and its children every 20 ms. At the largest K, the
benchmark also measures mergekit with output files of this engine's size, and all processes of this engine together,
the driver too; and one shard on a model whose tensors are twice as large. The outputs of both sides are compared.

`--own` measures the methods that mergekit lacks instead: the peak of a shard over K, and the time next to task
arithmetic. Most of them hold some whole matrices, so that larger tensors take more. Those that need statistics get
random ones.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import merges
import models
import random_statistics
import yaml
from models import SIZES, Models, Size
from report import Report, Target, console, in_mb, json_option, print_table
from safetensors import safe_open

from engine.methods.registry import get_method

SHAPES = {
    "large": Size(1024, 14, 2816, 16, 32000),
    "large-wide": Size(2048, 4, 2816, 16, 32000),
    "own": Size(1024, 2, 2816, 16, 8000),
    "tiny": SIZES["tiny"],
    "tiny-wide": Size(256, 2, 352, 4, 1024),
}
METHODS: dict[str, dict[str, float]] = {
    "linear": {"weight": 1.0},
    "task_arithmetic": {"weight": 0.3},
    "ties": {"weight": 1.0, "density": 0.2},
}
# Methods that are measured as whole commands, with the parameters at the top of the config.
COMMANDS: dict[str, dict[str, float]] = {"passthrough": {}, "slerp": {"t": 0.4}, "model_stock": {}}
ONE_EXPERT = ("passthrough", "slerp")
# Methods that mergekit lacks, beside the first one. `doge` holds the task vectors of a matrix of all K experts.
OWN: dict[str, dict[str, float]] = {
    "task_arithmetic": {"weight": 0.3},
    "checkpoint_average": {},
    "pcb": {},
    "widen": {},
    "swudi": {},
    "swudi_a": {},
    "doge": {"steps": 20},
    "lot": {},
    "regmean": {},
    "closed_form": {},
    "fisher": {},
    "lewis": {"weight": 1.0},
    "ota_ffg": {},
    "rcp": {},
}
ALL_EXPERTS = ("doge",)
SLOW = "ties"  # in mergekit
# Size of output files, small enough that two shards both have work. mergekit counts float32 elements.
FILE_MB = {"large": 200, "own": 50, "tiny": 1}
PEAK_PART, FLAT = 1 / 3, 1.05
# Largest ratio of our time to mergekit's; of two shards on two cores to one shard on one core.
LIMITS = {"linear": 1.0, "task_arithmetic": 1.0, "ties": 1 / 5} | dict.fromkeys(COMMANDS, 1.0)
TWO_SHARDS = 1 / 1.6
SAMPLE_SECONDS = 0.02
DIFFERENT = 1e-6  # difference of two weights that is more than rounding
# `mergekit-yaml`, printing the seconds that it took without its imports.
SAID = "seconds of the merge: "
MERGEKIT = f"""
import time
from mergekit.scripts.run_yaml import main
began = time.monotonic()
main(standalone_mode=False)
print("{SAID}", time.monotonic() - began)
"""


@dataclass(frozen=True)
class Way:
    """A variant of a merge: the number of shards (0: mergekit) and of cores, and whether it starts Ray."""

    shards: int
    cores: int
    small_files: bool = True
    ray: bool = False

    def command(self, config: Path, out: Path, file_mb: int) -> list[str]:
        if self.shards:
            settings = [f"cluster.shards={self.shards}", f"max_shard_size={file_mb}MB"]
            address = ["--address", "local"] if self.ray else []
            return [sys.executable, str(merges.ROOT / "cli.py"), *merges.arguments(config, out, settings), *address]
        # The models have no tokenizer to copy.
        given = [str(config), str(out), "--quiet", "--no-copy-tokenizer"]
        limit = ["--out-shard-size", f"{file_mb * 10**6 // 4}"] if self.small_files else []
        return [sys.executable, "-c", MERGEKIT, *given, *limit]


ONE, ON_RAY, TWO, ONE_CORE, THEIRS, THEIRS_ONE_CORE, THEIRS_FILES = (
    "one shard", "one shard on Ray", "two shards", "one shard, one core", "mergekit", "mergekit, one core",
    "mergekit, small files",
)  # fmt: skip
WAYS = {
    ONE: Way(1, 2),
    ON_RAY: Way(1, 2, ray=True),
    TWO: Way(2, 2),
    ONE_CORE: Way(1, 1),
    THEIRS: Way(0, 2, small_files=False),
    THEIRS_ONE_CORE: Way(0, 1, small_files=False),
    THEIRS_FILES: Way(0, 2),
}
# The variant of mergekit with the same number of cores.
AGAINST = {ONE: THEIRS, ON_RAY: THEIRS, TWO: THEIRS, ONE_CORE: THEIRS_ONE_CORE}


@dataclass(frozen=True)
class Figures:
    """Seconds of the merge, of hashing and of the whole command, peak bytes, CPU seconds; the rest is start-up."""

    merge: float
    hashing: float
    whole: float
    peak: int
    cpu: float


@dataclass(frozen=True)
class Random(Models):
    """Random models of this benchmark's sizes; experts differ from the base in every tensor."""

    own_heads: bool = True

    @property
    def shape(self) -> Size:
        return SHAPES[self.size]

    def config(self, path: Path, method: str, experts: int) -> Path:
        """Write a YAML that this engine and mergekit both read; mergekit's linear and passthrough take no base."""
        own = METHODS.get(method, {})
        entries = [{"model": str(self.expert(k)), "parameters": own} for k in range(experts)]
        base = {} if method in ("linear", "passthrough") else {"base_model": str(self.base())}
        needs = get_method(method)
        if needs.statistics:
            entries = [entry | {"statistics": str(self.statistics(k))} for k, entry in enumerate(entries)]
        if needs.base_statistics:
            base["base_statistics"] = str(self.statistics(None))
        config = {"merge_method": method, **base, "models": entries, "dtype": self.dtype}
        config["parameters"] = {} if own else (COMMANDS | OWN).get(method, {})
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    def statistics(self, index: int | None) -> Path:
        """Return a folder of random statistics of an expert, or of the base (None), written when it is first used."""
        name, model = ("base", self.base()) if index is None else (f"expert{index:03}", self.expert(index))
        seed = 0 if index is None else index + 1
        return models.once(
            self.folder / "statistics" / name, lambda folder: random_statistics.write(folder, self.base(), model, seed)
        )

    def read(self, experts: int) -> None:
        """Read all files into the page cache."""
        buffer = memoryview(bytearray(1 << 23))
        for folder in (self.base(), *(self.expert(k) for k in range(experts))):
            with open(folder / "model.safetensors", "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def anonymous(pid: int) -> int:
    """Return the anonymous bytes of a process and its children, as actors/memory.py counts them; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        listed = " ".join(file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:
        return 0
    nbytes = next((int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:")), 0)
    return nbytes + sum(anonymous(int(child)) for child in listed.split())


def execute(command: Sequence[str], cores: int, gauge: bool) -> tuple[float, float, int, str]:
    """Run a command on `cores` cores. Return its seconds, its CPU seconds, with `gauge` its peak bytes, its output.

    CPU seconds are those of the command and of all processes below it that it has waited for.
    """
    cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))
    peak, used, began = 0, children_cpu(), time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            ["taskset", "-c", cpus, *command], env=merges.ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT
        )
        while gauge and process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(SAMPLE_SECONDS)
        code = process.wait()
        seconds = time.monotonic() - began
        output.seek(0)
        text = output.read()
    if code:
        raise click.ClickException(f"{' '.join(command)} ended with {code}:\n{text}")
    return seconds, children_cpu() - used, peak, text


def children_cpu() -> float:
    """Return the CPU seconds of all ended child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(way: Way, config: Path, out: Path, file_mb: int) -> Figures:
    whole, cpu, peak, text = execute(way.command(config, out, file_mb), way.cores, gauge=not way.shards)
    os.sync()  # pending writes of one merge must not slow down the next
    if not way.shards:
        merge = next(float(line.removeprefix(SAID)) for line in text.splitlines() if line.startswith(SAID))
        return Figures(merge, 0.0, whole, peak, cpu)
    memory = json.loads((out / "merge" / "memory.json").read_text())
    seconds = dict(memory["seconds"])
    hashing, _ = seconds.pop("hashing the inputs"), seconds.pop("starting")
    peaks = [actor["peak_anonymous_bytes"] for actor in memory["actors"] if actor["role"] == "shard 0"]
    return Figures(sum(seconds.values()), hashing, whole, peaks[0], cpu)


@contextmanager
def temporary(made: Random, method: str, k: int) -> Iterator[tuple[Path, Path]]:
    """Yield a temporary folder for outputs, and a config in it."""
    with tempfile.TemporaryDirectory(dir=made.workdir) as folder:
        yield Path(folder), made.config(Path(folder) / "merge.yaml", method, k)


def compare(report: Report, ours: Path, theirs: Path, name: str) -> None:
    """Add the largest difference of two outputs, and the number of elements that differ, to the report."""

    def tensors(folder: Path) -> dict[str, Any]:
        files = [safe_open(path, framework="pt") for path in folder.glob("*.safetensors")]
        return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping

    mine, others = tensors(ours), tensors(theirs)
    if mine.keys() != others.keys():
        raise click.ClickException(f"{ours} and {theirs} have different tensors: {mine.keys() ^ others.keys()}")
    apart = ((mine[n].get_tensor(n) - others[n].get_tensor(n)).abs() for n in mine)
    most, count = zip(*((one.max().item(), (one > DIFFERENT).sum().item()) for one in apart), strict=True)
    report.other |= {f"largest difference, {name}": max(most), f"elements that differ, {name}": float(sum(count))}


def measure(
    report: Report, made: Random, method: str, k: int, ways: Sequence[str], rounds: int
) -> dict[str, list[Figures]]:
    """Return the figures of each variant, one per round."""
    figures_of: dict[str, list[Figures]] = {way: [] for way in ways}
    for number in range(rounds):
        with temporary(made, method, k) as (folder, config):
            made.read(k)
            for way in ways if number % 2 == 0 else ways[::-1]:
                out = folder / way.replace(" ", "-")
                figures_of[way].append(figures := run(WAYS[way], config, out, FILE_MB[made.size]))
                seconds = f"merge {figures.merge:.2f} s, whole {figures.whole:.2f} s, CPU {figures.cpu:.2f} s"
                console.print(f"K={k} {method} {made.dtype}, {way}: {seconds}")
                if way not in (ONE, THEIRS):
                    shutil.rmtree(out)
            compare(report, *(folder / way.replace(" ", "-") for way in (ONE, THEIRS)), f"{named(method, made)}, K={k}")
    return figures_of


def named(method: str, made: Random) -> str:
    """Return the name of a method in the report, with the dtype if it is measured in several."""
    return f"{method} in {made.dtype}" if method in COMMANDS else method


def ratio(found: Mapping[str, Sequence[Figures]], one: str, other: str, what: str) -> float:
    """Return the median over the rounds of `one` / `other`."""
    pairs = zip(found[one], found[other], strict=True)
    return statistics.median(getattr(a, what) / getattr(b, what) for a, b in pairs)


def add_times(report: Report, found: Mapping[str, Sequence[Figures]], method: str, k: int) -> None:
    """Print the table of one method and K, and add its ratios and targets to the report."""
    rows = {}
    for way, rounds in found.items():
        merge, hashing, whole = (
            statistics.median(getattr(f, w) for f in rounds) for w in ("merge", "hashing", "whole")
        )
        starts = statistics.median(f.whole - f.merge - f.hashing for f in rounds)
        cpu = statistics.median(f.cpu for f in rounds)
        report.other |= {f"{way}, {method}, K={k}, merge s": merge, f"{way}, {method}, K={k}, whole s": whole}
        against, ratios = AGAINST.get(way), []
        for what in ("merge", "whole", "cpu") if against in found else ():
            name = f"{way} / {against}, {method}, K={k}, {what}"
            report.time_ratios[name] = value = ratio(found, way, str(against), what)
            ratios.append(f"{1 / value:.2f}")
            most = LIMITS[method.partition(" ")[0]]
            limit = min(TWO_SHARDS, most) if way == TWO else most
            if way not in (ONE_CORE, ON_RAY) and what != "cpu":
                report.targets.append(Target(name, value, limit))
        rows[way] = [*(f"{seconds:.2f}" for seconds in (merge, starts, hashing, whole, cpu)), *ratios]
    for other in (ONE_CORE, ONE) if TWO in found else ():
        for what in ("merge", "whole"):
            name = f"{TWO} / {other}, {method}, K={k}, {what}"
            report.time_ratios[name] = value = ratio(found, TWO, other, what)
            if (other, what) == (ONE_CORE, "merge"):
                report.targets.append(Target(name, value, TWO_SHARDS))
    columns = ["merge", "starts", "hashing", "whole", "CPU", "mergekit / it, merge", "whole", "CPU"]
    print_table(f"seconds, {method}, K={k}, rounds: {len(next(iter(found.values())))}", columns, rows)


def add_memory(report: Report, counts: Sequence[int]) -> None:
    """Print the table of the peaks, and add its targets to the report."""
    high = counts[-1]
    ours, theirs = "{}: shard, K={}", "{}: mergekit, K={}"
    rows = {}
    for method in METHODS:
        shard = [report.memory[ours.format(method, k)] for k in counts]
        wide = report.memory[f"{method}: shard, larger tensors"]
        beside = [report.other[theirs.format(method, k)] for k in counts]
        rows[f"{method}: shard"] = [*map(in_mb, shard), in_mb(wide)]
        rows[f"{method}: mergekit"] = [*map(in_mb, beside), "–"]
        rows[f"{method}: mergekit / shard"] = [*(f"{b / a:.2f}" for a, b in zip(shard, beside, strict=True)), "–"]
        report.targets += [
            Target(f"{method}: shard, max / min over K", max(shard) / min(shard), FLAT),
            Target(f"{method}: shard, larger tensors / as they are, K={counts[0]}", wide / shard[0], FLAT),
            Target(f"{method}: shard / mergekit, K={high}", shard[-1] / beside[-1], PEAK_PART),
        ]
        if small := report.other.get(f"{method}: {THEIRS_FILES}, K={high}"):
            report.other[f"{method}: shard / {THEIRS_FILES}, K={high}"] = shard[-1] / small
    columns = [*(f"K={k}" for k in counts), f"K={counts[0]}, larger tensors"]
    print_table("peak anonymous memory, MB", columns, rows)


def measure_more_memory(report: Report, made: Random, wide: Random, low: int, high: int) -> None:
    """Measure, outside the rounds, the shard on larger tensors, mergekit with small files, and all of our processes."""
    file_mb = FILE_MB[made.size]
    for method in METHODS:
        with temporary(wide, method, low) as (folder, config):
            report.memory[f"{method}: shard, larger tensors"] = run(WAYS[ONE], config, folder / "out", file_mb).peak
        if method != SLOW:
            with temporary(made, method, high) as (folder, config):
                figures = run(WAYS[THEIRS_FILES], config, folder / "out", file_mb)
                report.other[f"{method}: {THEIRS_FILES}, K={high}"] = figures.peak
    with temporary(made, "linear", high) as (folder, config):
        _, _, peak, _ = execute(WAYS[ONE].command(config, folder / "out", file_mb), WAYS[ONE].cores, gauge=True)
        report.other[f"linear: all processes of ours, K={high}"] = peak


def measure_own(made: Random, counts: Sequence[int], chosen: Sequence[str], path: Path | None) -> None:
    """Measure the methods that mergekit lacks, or the chosen ones of them, with one shard, once for each K."""
    make(made, counts[-1])
    first, rows = next(iter(OWN)), {}
    methods = [method for method in OWN if not chosen or method in (first, *chosen)]
    settings = {method: OWN[method] for method in methods}
    report = Report({"experts": counts, "methods": settings, "elements": sum(made.elements().values())})
    seconds: dict[str, list[float]] = {}
    for method in methods:
        peaks, seconds[method] = [], []
        for k in counts:
            with temporary(made, method, k) as (folder, config):
                made.read(k)
                figures = run(WAYS[ONE], config, folder / "out", FILE_MB[made.size])
            peaks.append(figures.peak)
            seconds[method].append(figures.merge)
            report.memory[f"{method}: shard, K={k}"] = figures.peak
            report.time_ratios[f"{method} / {first}, K={k}"] = figures.merge / seconds[first][len(peaks) - 1]
            console.print(f"K={k} {method}: {in_mb(figures.peak)} MB, merge {figures.merge:.2f} s")
        rows[method] = [*map(in_mb, peaks), *(f"{each:.2f}" for each in seconds[method])]
        if method not in ALL_EXPERTS:
            report.targets.append(Target(f"{method}: shard, max / min over K", max(peaks) / min(peaks), FLAT))
    print_table("one shard", [*(f"MB, K={k}" for k in counts), *(f"s, K={k}" for k in counts)], rows)
    report.finish(path or made.workdir / "results" / "weight_space_own.json")


@click.command(help=__doc__)
@click.option("--workdir", default=models.WORKDIR, show_default=True, type=click.Path(path_type=Path))
@click.option("--experts", "-k", multiple=True, default=[2, 4, 8], show_default=True, type=click.IntRange(1))
@click.option(
    "--timed", default=4, show_default=True, help="The K that is measured in all variants and in several rounds."
)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--commands", is_flag=True, help="Only the methods that are measured as whole commands.")
@click.option("--own", is_flag=True, help="Only the methods that mergekit lacks; about five minutes.")
@click.option("--only", multiple=True, type=click.Choice(list(OWN)), help="Of --own: this method; repeatable.")
@click.option("--small", is_flag=True, help="A trial of a few minutes: a tiny model, K=2, one round.")
@json_option()
def main(
    workdir: Path,
    experts: tuple[int, ...],
    timed: int,
    rounds: int,
    commands: bool,
    own: bool,
    only: tuple[str, ...],
    small: bool,
    path: Path | None,
) -> None:
    counts, timed, rounds = ([2], 2, 1) if small else (sorted(set(experts)), timed, rounds)
    if own:
        measure_own(Random(workdir.absolute(), "tiny" if small else "own"), counts, only, path)
        return
    if len(os.sched_getaffinity(0)) < 2:
        raise click.ClickException("the benchmark needs two cores")
    size = "tiny" if small else "large"
    made, wide = (Random(workdir.absolute(), name) for name in (size, f"{size}-wide"))
    half = Random(workdir.absolute(), size, "bfloat16")
    for one, count in (
        (made, timed if commands else counts[-1]),
        (half, timed),
        *([] if commands else [(wide, counts[0])]),
    ):
        make(one, count)
    settings = {"experts": counts, "timed": timed, "rounds": rounds, "methods": METHODS, "file_mb": FILE_MB[size]}
    sizes = {one.size: {"parameters": sum(one.elements().values()), "largest": max(one.elements().values())}
             for one in ([made] if commands else [made, wide])}  # fmt: skip
    report = Report(settings | {"sizes": sizes, "dtype": made.dtype})
    console.print(report.settings)
    path = path or workdir / "results" / "weight_space.json"
    for method in COMMANDS:
        for one in (made, half):
            k = 1 if method in ONE_EXPERT else timed
            add_times(report, measure(report, one, method, k, [ONE, ON_RAY, THEIRS], rounds), named(method, one), k)
            report.save(path)
    for method in () if commands else METHODS:
        for k in counts:
            ways = [ONE, THEIRS] if k != timed else [way for way in WAYS if way not in (THEIRS_FILES, ON_RAY)]
            if method == SLOW:
                ways = [way for way in ways if way != THEIRS_ONE_CORE]
            found = measure(report, made, method, k, ways, rounds if k == timed and method != SLOW else 1)
            report.memory[f"{method}: shard, K={k}"] = max(figures.peak for figures in found[ONE])
            report.other[f"{method}: mergekit, K={k}"] = max(figures.peak for figures in found[THEIRS])
            add_times(report, found, method, k)
            report.save(path)
    if not commands:
        measure_more_memory(report, made, wide, counts[0], counts[-1])
        add_memory(report, counts)
    shown = {what: value for what, value in report.other.items() if not what.endswith(" s")}  # already in the tables
    for what, value in {**report.time_ratios, **shown}.items():
        console.print(f"{what}: {in_mb(value)} MB" if isinstance(value, int) else f"{what}: {value:.4g}")
    report.finish(path)


def make(made: Random, experts: int) -> None:
    """Write the models, after checking that the disk has room for them and for the outputs."""
    made.workdir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(made.workdir).free
    if free < (wanted := 4 * sum(made.elements().values()) * (experts + 4)):
        raise click.ClickException(
            f"{made.workdir} has {free / 1e9:.1f} GB free; the benchmark needs {wanted / 1e9:.1f} GB"
        )
    for index in range(experts):
        made.expert(index)


if __name__ == "__main__":
    main()
