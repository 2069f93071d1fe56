"""Measure the time of an optimiser step next to its unavoidable parts and to the in-memory implementation.

All sides run in one process tree, round after round; the results are medians of the rounds' ratios:
- `plain`: forward and backward passes of the same window's samples, one at a time, through the same model, with the
  same losses by autograd over all tokens at once, without any merging. `plain, shared`: the same with the samples in as
  few passes as a step makes (`batch_tokens`), which separates the gain of sharing passes from the cost of merging.
- `read`: one streaming read of one expert's merged bytes, block by block through the memory map into a buffer that
  stays in the cache, by as many threads as the engine uses; and the same by read() of the file.
- the in-memory implementation (in_memory.py) in a process of its own, at the same K and over the same samples.
The step is the trainer actor's, called as a plain class, with the task vectors in its own process.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import click
import merges
import models
import torch
from models import Models
from report import Report, Target, console, json_option, print_table
from torch import Tensor
from torch.nn import functional
from trainer_memory import in_memory

from actors.expert import Expert
from actors.trainer import Trainer, WindowSample
from engine.calibration.records import read_records
from engine.calibration.samples import make_samples
from engine.calibration.text_encoder import TextEncoder
from engine.codec import pack_all, unpack_all
from engine.config.reader import load_config
from engine.learning.learner import Learner, first_stage
from engine.learning.losses import hidden_loss
from engine.learning.targets import Target as ExpertTarget
from engine.learning.targets import load_tensors
from engine.machine import usable_cpus
from engine.planning.open_models import open_expert
from engine.planning.plan import Plan
from engine.planning.planner import make_plan
from engine.planning.schedule import pass_limit, passes
from engine.shards.local_shards import LocalShards
from engine.sizes import BLOCK
from engine.storage.paths import open_folder
from engine.task_vectors.experts import FullExpert

# Largest ratios: step / plain at K=4; slope per expert / one read; step / in-memory step; two stages / two runs.
PLAIN_K4, SLOPE_READS, MEMORY_K8, MEMORY_K32, RUN_K8 = 1.3, 2.0, 1 / 2, 1 / 5, 1 / 3


def seconds(act: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


class Bench:
    """A trainer over K experts and one window of samples with their targets."""

    def __init__(self, config: Path, window: int, scratch: Path, overrides: Sequence[str] = ()) -> None:
        self.plan: Plan = make_plan(load_config(config, overrides), config.parent)
        samples = make_samples(read_records(self.plan), TextEncoder(None), self.plan)
        chosen = [mine[i] for i in range(len(samples[0])) for mine in samples][:window]
        expert, folder = Expert(self.plan, 0), open_folder(scratch)
        for s in sorted(chosen, key=_by_expert):
            expert.target(s, folder, f"{s.expert}-{s.index}")
        targets = {s: pack_all(load_tensors(folder, [f"{s.expert}-{s.index}"])) for s in chosen}
        self.window = [WindowSample(s, targets[s]) for s in chosen]
        self.trainer = Trainer(self.plan, LocalShards(self.plan, usable_cpus(), overlap=False), lambda target: target)
        self.stage, self.state = first_stage(self.plan), None
        self.coefficients = Learner(self.plan.config.parameters, self.stage).coefficients

    def step(self) -> None:
        step = self.trainer.step(self.stage, self.state, 0, self.window)
        self.state = step.state

    def streams(self) -> None:
        """Run the parts of a step that depend on K: the re-merge and the gradients of the coefficients."""
        student, shards = self.trainer._student, self.trainer._shards
        student.expect({})
        wait([one for several in shards.merge(self.coefficients, student).values() for one in several])
        leaving = shards.gradients(self.stage.layout)
        for name in self.plan.merged:
            gradient = student._parameters[student._places[name].parameter].detach()  # the values do not matter
            leaving.send(name, gradient)
        leaving.collect()

    def plain(self, limit: int) -> None:
        """Run plain forward and backward passes over samples of one length, up to `limit` tokens per pass."""
        student = self.trainer._student
        for places in passes([one.sample.tokens for one in self.window], limit):
            packed = [unpack_all(self.window[place].target) for place in places]
            targets = [ExpertTarget.from_tensors(tensors) for tensors in packed]
            ids_BT = torch.stack([target.input_ids_T for target in targets])
            output = student.model(input_ids=ids_BT, output_hidden_states=True, use_cache=False)
            loss = torch.zeros(())
            for row, target in enumerate(targets):
                logits_TV = target.logits_CV
                if logits_TV is None:
                    with torch.no_grad():
                        logits_TV = student.model.get_output_embeddings()(target.last_hidden_CH)
                ours, theirs = (functional.log_softmax(z.float(), -1) for z in (output.logits[row], logits_TV))
                loss = loss + functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
                loss = loss + hidden_loss({i: output.hidden_states[i][row] for i in target.hidden_CH}, target.hidden_CH)
            (loss / len(self.window)).backward()
        for parameter in student.model.parameters():
            parameter.grad = None


class Reader:
    """Reads one expert's merged tensors once from beginning to end, with several threads."""

    def __init__(self, plan: Plan) -> None:
        expert = open_expert(plan.experts[0])
        assert isinstance(expert, FullExpert)
        self.tensors = [expert.checkpoint.read(name).reshape(-1) for name in plan.merged]
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors)
        self.file = expert.checkpoint.folder / "model.safetensors"
        self.pool = ThreadPoolExecutor(usable_cpus(), initializer=torch.set_num_threads, initargs=(1,))

    def through_map(self) -> None:
        list(self.pool.map(_scan, self.tensors))

    def through_read(self) -> None:
        threads = usable_cpus()
        list(
            self.pool.map(
                lambda part: _read(self.file, part * self.nbytes // threads, self.nbytes // threads), range(threads)
            )
        )


def _scan(tensor: Tensor) -> None:
    block = torch.empty(BLOCK, dtype=tensor.dtype)
    for part in tensor.split(BLOCK):
        block[: part.numel()].copy_(part)


def _read(file: Path, start: int, nbytes: int) -> None:
    buffer = memoryview(bytearray(1 << 20))
    with open(file, "rb", buffering=0) as opened:
        opened.seek(start)
        while nbytes > 0:
            nbytes -= opened.readinto(buffer[: min(len(buffer), nbytes)])


def _by_expert(sample: Any) -> int:
    return int(sample.expert)


def beside_plain(
    report: Report, made: Models, counts: list[int], rounds: int, window: int, tokens: int, overrides: Sequence[str]
) -> None:
    """Compare the step with `plain`, and its slope over K with one read of an expert."""
    with tempfile.TemporaryDirectory(dir=made.workdir) as folder:
        benches = {}
        for k in counts:
            config = _merge(made, Path(folder) / f"{k}.yaml", k, window, tokens)
            benches[k] = Bench(config, window, Path(folder), overrides)
            benches[k].step()
        low, high = counts[0], counts[-1]
        reader = Reader(benches[low].plan)
        reader.through_map()
        rows: dict[str, list[float]] = {}
        for _ in range(rounds):
            limits = {"plain": 1, "plain, shared": pass_limit(benches[low].plan.config, on_gpu=False)}
            plain = {name: seconds(partial(benches[low].plain, limit)) for name, limit in limits.items()}
            steps = {k: seconds(benches[k].step) for k in counts}
            measured = {f"{name} s": took for name, took in plain.items()}
            measured |= {f"step s, K={k}": step for k, step in steps.items()}
            measured |= {
                f"step / {name}, K={k}": step / took for name, took in plain.items() for k, step in steps.items()
            }
            if low != high:
                # The streams are also timed alone: the rest of a step is long, and its noise larger than the slope.
                least = {k: min(seconds(benches[k].streams) for _ in range(3)) for k in (low, high)}
                reads = [min(seconds(act) for _ in range(5)) for act in (reader.through_map, reader.through_read)]
                slopes = {"step": steps[high] - steps[low], "streams": least[high] - least[low]}
                measured |= {"read (map) s": reads[0], "read (file) s": reads[1]}
                for part, difference in slopes.items():
                    slope = difference / (high - low)
                    measured |= {f"slope of {part} an expert s": slope}
                    measured |= {f"slope of {part} / read (map)": slope / reads[0]}
                    measured |= {f"slope of {part} / read (file)": slope / reads[1]}
            for name, value in measured.items():
                rows.setdefault(name, []).append(value)
    medians = {name: statistics.median(values) for name, values in rows.items()}
    spread = {
        name: [f"{medians[name]:.4g}", f"{min(values):.4g}", f"{max(values):.4g}"] for name, values in rows.items()
    }
    print_table(f"a step of {window} samples of {tokens} tokens, {rounds} rounds", ["median", "least", "most"], spread)
    report.other |= {name: value for name, value in medians.items() if name.endswith(" s") or " s," in name}
    report.time_ratios |= {name: value for name, value in medians.items() if "/" in name}
    if 4 in counts:
        report.targets.append(Target("step / plain, K=4", medians["step / plain, K=4"], PLAIN_K4))
    for part in ("step", "streams"):
        if low != high:
            report.targets.append(
                Target(f"slope of {part} / read through the map", medians[f"slope of {part} / read (map)"], SLOPE_READS)
            )


def beside_memory(
    report: Report, made: Models, k: int, limit: float, window: int, tokens: int, steps: int, overrides: Sequence[str]
) -> None:
    """Compare the median step of the in-memory implementation, without its first, with ours at the same K."""
    with tempfile.TemporaryDirectory(dir=made.workdir) as folder:
        config = _merge(made, Path(folder) / "merge.yaml", k, window * (steps + 1), tokens)
        bench = Bench(config, window, Path(folder), overrides)
        bench.step()
        ours = [seconds(bench.step) for _ in range(steps)]
        theirs = in_memory(config, steps + 1, "resident", gives_back=False)["step_seconds"][1:]
        ours += [seconds(bench.step) for _ in range(steps)]
    ratio = statistics.median(ours) / statistics.median(theirs)
    console.print(f"K={k}: ours {sorted(ours)}, in memory {sorted(theirs)}")
    report.time_ratios[f"step / in-memory step, K={k}"] = ratio
    report.targets.append(Target(f"step / in-memory step, K={k}", ratio, limit))


def whole_run(report: Report, made: Models, window: int, tokens: int, samples: int, overrides: Sequence[str]) -> None:
    """Compare a whole Expert Merging++ run of the command line with two whole runs of the in-memory implementation."""
    with tempfile.TemporaryDirectory(dir=made.workdir) as folder:
        config = made.write_merge(Path(folder) / "merge.yaml", 8, samples, tokens, {"gradient_accumulation": window})
        settings = ["merge_method=expert_merging_pp", "cluster.shards=0", *overrides]
        merged: list[merges.Merged] = []
        ours = seconds(lambda: merged.append(merges.run(config, Path(folder) / "out", settings)))
        figures: list[dict[str, Any]] = []
        theirs = sum(
            seconds(lambda: figures.append(in_memory(config, 10**6, "resident", gives_back=False))) for _ in range(2)
        )
    learning, in_steps = sum(merged[0].seconds), sum(sum(one["step_seconds"]) for one in figures)
    console.print(
        f"two stages, K=8, {samples} samples an expert: ours {ours:.1f} s, of which steps {learning:.1f} s; "
        f"in memory {theirs:.1f} s, of which steps {in_steps:.1f} s"
    )
    report.other |= {"two stages s": ours, "two stages, steps alone s": learning}
    report.other |= {"two in-memory runs s": theirs, "two in-memory runs, steps alone s": in_steps}
    report.time_ratios |= {"two stages / two in-memory runs": ours / theirs, "their steps alone": learning / in_steps}
    report.targets.append(
        Target("two stages / two in-memory runs, K=8, process starts and output included", ours / theirs, RUN_K8)
    )
    report.targets.append(Target("two stages / two in-memory runs, K=8, steps alone", learning / in_steps, RUN_K8))


def _merge(made: Models, path: Path, k: int, samples: int, tokens: int) -> Path:
    return made.write_merge(path, k, -(-samples // k), tokens)


@click.command(help=__doc__)
@models.options
@click.option("--experts", "-k", multiple=True, default=[4, 8, 16, 32], show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1))
@click.option("--window", default=8, show_default=True, type=click.IntRange(1), help="Samples per optimiser step.")
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(2), help="Tokens per sample.")
@click.option(
    "--samples", default=10, show_default=True, type=click.IntRange(1), help="Samples per expert in the whole run."
)
@click.option("--set", "overrides", multiple=True, help="Override a key of the config, as with `cli.py merge`.")
@click.option("--without-memory", is_flag=True, help="Leave out the in-memory implementation.")
@json_option()
def main(
    workdir: Path,
    size: str,
    dtype: str,
    own_heads: bool,
    experts: tuple[int, ...],
    rounds: int,
    window: int,
    tokens: int,
    samples: int,
    overrides: tuple[str, ...],
    without_memory: bool,
    path: Path | None,
) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    made = Models(workdir.absolute(), size, dtype, own_heads)
    counts = sorted(set(experts))
    settings = {"experts": counts, "rounds": rounds, "window": window, "tokens": tokens, "set": list(overrides)}
    report = Report(made.describe() | settings)
    console.print(report.settings)
    path = path or made.workdir / "results" / "step_time.json"
    beside_plain(report, made, counts, rounds, window, tokens, overrides)
    report.save(path)
    if not without_memory:
        for k, limit in ((8, MEMORY_K8), (32, MEMORY_K32)):
            if k in counts:
                beside_memory(report, made, k, limit, window, tokens, 3, overrides)
                report.save(path)
        if 8 in counts:
            whole_run(report, made, window, tokens, samples, overrides)
    report.finish(path)


if __name__ == "__main__":
    main()
