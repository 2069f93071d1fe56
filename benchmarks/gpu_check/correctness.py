"""Checks that a GPU gives the results of a CPU, the same each time, and gives its memory back."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tiny
import torch
from models import Size

import engine.models.skeleton
from actors.expert import Expert
from actors.gpus import Gpus
from actors.process import ActorProcess
from engine.errors import MergeError
from engine.learning.frozen_expert import FrozenExpert
from engine.learning.learner import first_stage
from engine.learning.student import Student
from engine.learning.targets import Target
from engine.planning.plan import Plan
from engine.shards.factor_shards import FactorShards
from engine.shards.local_shards import LocalShards
from engine.shards.protocol import Shards
from engine.task_vectors.coefficients import Array, ChunkLayout, Coefficients
from gpu_check.bench import Bench
from gpu_check.inputs import CPU, Learned, Steps, dense, plan_of, relative, store_factors, targets_of, write_merge

SMALL = Size(64, 2, 176, 4, 512, tie_word_embeddings=False)
MODEL = Size(1024, 8, 2816, 8, 4096, tie_word_embeddings=False)
WHOLE = "parameters.task_vectors=whole"
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy", "numba")


def environment(bench: Bench) -> None:
    """An actor computes where it is told to, with operations that repeat themselves"""
    device = ActorProcess("check", gpus=seat(bench)).device
    bench.expect("actor on another type of device", device.type != bench.device.type, 0)
    bench.fact("versions", {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": sys.version[:7]})
    bench.fact("cores", os.cpu_count())
    if bench.on_gpu:
        free, total = torch.cuda.mem_get_info(bench.device)
        bench.fact("GPU", f"{torch.cuda.get_device_name(bench.device)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
        bench.fact("GPUs, CUDA", (torch.cuda.device_count(), torch.version.cuda))
        # Attention takes its deterministic backward pass only without warn_only.
        bench.expect("attention may not repeat itself", torch.is_deterministic_algorithms_warn_only_enabled(), 0)


def seat(bench: Bench) -> Gpus:
    """Return the GPUs of an actor on the device."""
    return Gpus(1 if bench.on_gpu else 0)


def gradients_under_load(bench: Bench) -> None:
    """Gradients that leave while their memory is used again arrive right, from several threads"""
    size = SMALL if bench.small else MODEL
    plan = plan_of(write_merge(bench.folder / "leaving", size, 2, torch.bfloat16, bench.device), WHOLE)
    layout, generator = first_stage(plan).layout, torch.Generator().manual_seed(0)
    shapes = {name: plan.base_header.tensors[name].shape for name in plan.merged}
    gradients = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}

    def collected(device: torch.device, threads: int) -> object:
        leaving = dense(plan, 4, overlap=True).gradients(layout)

        def send(name: str) -> None:
            gradient = gradients[name].to(device, copy=True)
            leaving.send(name, gradient)
            if bench.on_gpu:
                del gradient
                for _ in range(3):
                    torch.full(shapes[name], -1.0, device=device, dtype=torch.bfloat16)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(send, plan.merged))
        return leaving.collect()

    before = sys.getswitchinterval()
    exact = collected(CPU, 1)
    try:
        # As hooks of several GPUs send from several threads of autograd.
        sys.setswitchinterval(1e-6)
        counts = (1, 1) if bench.small else (1, 2, 2, 4)
        wrong = sum(not np.array_equal(collected(bench.device, threads), exact) for threads in counts)
    finally:
        sys.setswitchinterval(before)
    bench.expect(f"sums of gradients that came to the CPU wrong, of {len(counts)}", wrong, 0)


def arrivals_under_load(bench: Bench) -> None:
    """Merged tensors that arrive from eight threads while the GPU computes are the CPU's, bit for bit"""
    size = SMALL if bench.small else Size(512, 4, 1408, 8, 512, tie_word_embeddings=False)
    plan = plan_of(write_merge(bench.folder / "arriving", size, 2, torch.bfloat16, bench.device), WHOLE)
    layout, wrong, side = first_stage(plan).layout, 0, 64 if bench.small else 2048
    students = Student(plan, bench.device), Student(plan, CPU)
    shards = [LocalShards(plan, 8, overlap) for overlap in (True, False)]
    busy = torch.randn(side, side, device=bench.device)
    for turn in range(5):
        wanted = Coefficients.constant(layout, [0.1 * turn] * len(plan.experts))
        for _ in range(30):
            busy = (busy @ busy).clamp(-1, 1)
        for student, shard in zip(students, shards, strict=True):
            student.expect(shard.merge(wanted, student))
            # A pass waits for its weights.
            student.measure([Target(torch.tensor([3, 4, 5]))])
        bench.wait()
        wrong += sum(not torch.equal(students[0].whole(name).cpu(), students[1].whole(name)) for name in plan.merged)
    bench.expect("merged tensors that differ from the CPU's", wrong, 0)


def parity(bench: Bench) -> None:
    """Targets, gradients, losses and coefficients in float32 are those of a CPU"""
    for family in bench.families:
        process = ActorProcess("check", gpus=seat(bench))
        assert process.device.type == bench.device.type  # which makes operations deterministic
        try:
            family_is_alike(bench, family)
        except RuntimeError as error:
            # As an actor does: once more, with operations that may not repeat themselves.
            if not process.allow(error):
                raise
            bench.fact(f"{family}: without deterministic implementation", process.not_deterministic)
            family_is_alike(bench, family)


def family_is_alike(bench: Bench, family: str) -> None:
    plan = plan_of(tiny.make_merge(bench.folder / f"parity-{family}", family), WHOLE)
    ours, exact = (targets_of(plan, (9, 17), device) for device in (bench.device, CPU))
    pairs = [
        (a.tensors()[name], tensor)
        for a, b in zip(ours, exact, strict=True)
        for name, tensor in b.tensors().items()
        if tensor.is_floating_point()
    ]
    bench.expect(f"{family}: targets", max(relative(a.float(), b.float()) for a, b in pairs), 1e-4)
    here = Steps(plan, bench.device, dense(plan, 2, overlap=True)).take(ours, 3)
    there = Steps(plan, CPU, dense(plan, 2, overlap=False)).take(exact, 3)
    compare(bench, family, here, there)


def compare(bench: Bench, name: str, found: Learned, exact: Learned, gradient: float = 1e-3) -> None:
    bench.expect(f"{name}: coefficient gradient", relative(found.gradient, exact.gradient), gradient)
    bench.expect(f"{name}: losses", relative(found.losses, exact.losses), 2e-3)
    away = float(np.abs(found.coefficients - exact.coefficients).max())
    bench.expect(f"{name}: coefficients after 3 steps", away, max(2e-3, 2 * gradient))


def repeats(bench: Bench) -> None:
    """The same steps again, with and without overlap, in padded passes: the same bits"""
    size, tokens = (SMALL, 24) if bench.small else (MODEL, 700)
    config = write_merge(bench.folder / "repeats", size, 3, torch.bfloat16, bench.device, noise=2e-3)
    plan = plan_of(config, WHOLE)
    window = targets_of(plan, (tokens, tokens // 2, tokens // 3), bench.device)
    runs = [
        Steps(plan, bench.device, dense(plan, 4, overlap)).take(window, 2)
        for overlap in ((True, False) if bench.small else (True, False, True, True, False, True))
    ]
    bench.expect("runs that differ in a bit", sum(run.differs(runs[0]) for run in runs), 0)
    # Tells noise, 1e-7, from a race, 1e-2.
    away = max(float(np.abs(run.coefficients - runs[0].coefficients).max()) for run in runs)
    bench.fact("largest difference of their coefficients", away)


def several_devices_on_one(bench: Bench) -> None:
    """A model in parts, as over several GPUs, learns the same, and a dropped one gives its memory back"""
    plan = plan_of(tiny.make_merge(bench.folder / "parts"), "gradient_checkpointing=true", WHOLE)
    names = (
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(3)),
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    )
    parts = dict.fromkeys(names, bench.device)
    window = targets_of(plan, (9,), bench.device)
    one = Steps(plan, bench.device, dense(plan, 2, overlap=True)).take(window, 2)
    before, engine.models.skeleton.device_map = engine.models.skeleton.device_map, lambda *_, **__: parts
    try:
        spread = Steps(plan, bench.device, dense(plan, 2, overlap=True)).take(window, 2)
        bench.expect("in parts: differs in a bit", spread.differs(one), 0)
        expert = Expert(plan, 0, gpus=seat(bench))
        first = weakref.ref(expert._expert(0).model)
        expert._expert(1)
        bench.expect("in parts: an expert stays in memory beside the next", first() is not None, 0)
    finally:
        engine.models.skeleton.device_map = before


def factors(bench: Bench) -> None:
    """Matrices merged through factors learn as those from files do"""
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        name = str(dtype).removeprefix("torch.")
        size = SMALL if bench.small else Size(1024, 2, 2816, 8, 4096, tie_word_embeddings=False)
        config = write_merge(bench.folder / f"factors-{name}", size, 4, dtype, bench.device, noise=2e-3)
        plan = plan_of(config, "parameters.weight=0.2")
        state, by_lapack = store_factors(plan, bench.folder / f"state-{name}", bench.device, 4)
        bench.fact(f"{name}: matrices that LAPACK decomposed, of {len(plan.orthogonal)}", len(by_lapack))
        window = targets_of(plan, (24,) if bench.small else (96, 48), bench.device)
        rest = LocalShards(plan, 4, True, state, plan.merged_set.difference(plan.orthogonal))
        through = FactorShards(plan, plan.orthogonal, rest, state)
        ours = Steps(plan, bench.device, through)
        runs = [ours.take(window, 3) for _ in range(2)]
        bench.expect(f"{name}: a repeated run differs in a bit", runs[1].differs(runs[0]), 0)
        # Passes in bfloat16 differ more between devices than the two ways of merging do.
        device, files = CPU if dtype == torch.float32 else bench.device, LocalShards(plan, 4, False, state)
        compare(bench, f"{name} factors", runs[0], Steps(plan, device, files).take(window, 3), limit)
        sums = [in_chunks(plan, shards, on) for shards, on in ((through, bench.device), (files, CPU))]
        bench.expect(f"{name} factors: gradient in chunks", relative(*sums), limit / 2)


def in_chunks(plan: Plan, shards: Shards, device: torch.device) -> Array:
    """Return ∂L/∂α [K, C] of random weight gradients, with three chunks a tensor, whose edges lie inside rows."""
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, plan.dtype)
    leaving = shards.gradients(ChunkLayout.make(plan.numels, dict.fromkeys(plan.merged, 3)))
    for name in plan.merged:
        leaving.send(name, torch.randn(plan.base_header.tensors[name].shape, generator=generator).to(device, dtype))
    return leaving.collect()


def no_waiting(bench: Bench) -> None:
    """Gradients through factors are queued without waiting for the GPU"""
    config = write_merge(bench.folder / "waiting", SMALL if bench.small else MODEL, 2, torch.bfloat16, bench.device)
    plan = plan_of(config)
    state, _ = store_factors(plan, bench.folder / "state-waiting", bench.device, 4)
    rest = LocalShards(plan, 4, True, state, plan.merged_set.difference(plan.orthogonal))
    shards, layout = FactorShards(plan, plan.orthogonal, rest, state), first_stage(plan).layout
    student, wanted = Student(plan, bench.device), Coefficients.constant(layout, plan.priors)
    gradients = {name: torch.randn_like(student.whole(name)) for name in plan.orthogonal}
    # The first time, factors are copied to the device.
    for _ in range(2):
        with bench.waits() as of_merge:
            shards.merge(wanted, student)
        leaving = shards.gradients(layout)
        with bench.waits() as of_gradients:
            for name, gradient in gradients.items():
                leaving.send(name, gradient)
        leaving.collect()
    if not bench.on_gpu:
        return bench.skip("no_waiting")
    bench.fact(f"waits of a merge of {len(gradients)} matrices", len(of_merge))
    bench.expect(f"waits of {len(gradients)} gradients", len(of_gradients), 0)


def full_gpu(bench: Bench) -> None:
    """A GPU that others have filled gives an error with numbers, not a stack"""
    if not bench.on_gpu:
        return bench.skip("full_gpu")
    config = write_merge(bench.folder / "full", Size(4096, 2, 11008, 32, 32000), 1, torch.bfloat16, bench.device)
    plan = plan_of(config)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(bench.device)
    hold = torch.empty(max(0, free - (256 << 20)), dtype=torch.uint8, device=bench.device)
    raised: Exception | None = None
    try:
        FrozenExpert(plan, 0, bench.device)
    except (MergeError, torch.OutOfMemoryError) as error:
        raised = error
    del hold
    bench.fact("what a full GPU raises", f"{type(raised).__name__}: {raised}")
    bench.expect("a full GPU is no MergeError", not isinstance(raised, MergeError), 0)
