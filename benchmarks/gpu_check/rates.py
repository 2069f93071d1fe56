"""Memory and rates of a GPU, beside those that the scaling model assumes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from models import Size
from safetensors import safe_open

from engine.learning.student import Student
from engine.methods.arithmetic.decompositions import leading_parts_by_products, nearest_isometry
from engine.models.forward import language_model
from engine.planning.costs.rates import GB, Prediction
from engine.planning.costs.scaling import TRAINER_BYTES, Machines, Work, predict
from engine.planning.plan import Plan
from engine.shards.factor_shards import FactorShards
from engine.shards.local_shards import LocalShards
from gpu_check.bench import Bench
from gpu_check.inputs import Steps, dense, ids, plan_of, store_factors, targets_of, write_merge

TINY = Size(64, 2, 176, 4, 512, tie_word_embeddings=False)
# Blocks of a Llama of 7 billion parameters, of which it has 32.
SLICE, HALF = (Size(4096, blocks, 11008, 32, 32000, tie_word_embeddings=False) for blocks in (4, 2))
WHOLE = "parameters.task_vectors=whole"


def slice_of_a_model(bench: Bench) -> None:
    """Four blocks of a 7B model in bfloat16, two experts: memory and seconds of a step as the scaling model says"""
    config = write_merge(bench.folder / "slice", TINY if bench.small else SLICE, 2, torch.bfloat16, bench.device)
    vocabulary = TINY.vocab_size if bench.small else SLICE.vocab_size
    stream, checkpointing = ("gradients=stream",), ("gradient_checkpointing=true",)
    ways = [(16, (*stream, *checkpointing))] if bench.small else []
    for tokens, more in ways or [(512, ()), (2048, ()), (2048, checkpointing), (512, stream)]:
        plan = plan_of(config, WHOLE, "parameters.gradient_accumulation=2", *more)
        name = " ".join((f"T={tokens}", *more))
        bench.start_peak()
        window = targets_of(plan, (tokens,), bench.device)
        bench.fact(f"{name}: expert, GB", bench.peak() / GB)
        bench.start_peak()
        steps = Steps(plan, bench.device, dense(plan, os.cpu_count() or 1, overlap=True))
        steps.take(window, 1)
        began = time.perf_counter()
        steps.take(window, 2)
        seconds = (time.perf_counter() - began) / 2
        said = predicted(plan, tokens)
        bench.fact(f"{name}: a step, s; the model's", (round(seconds, 4), round(said.step.total, 4)))
        if bench.on_gpu:
            bench.expect(f"{name}: memory over the model's", bench.peak() / (said.memory.trainer - TRAINER_BYTES), 1.15)
        del steps
    passes_of_a_model(bench, plan_of(config, WHOLE), vocabulary)


def predicted(plan: Plan, tokens: int) -> Prediction:
    """Return the scaling model's estimate for one sample of each expert on a node with one GPU."""
    samples = len(plan.experts)
    work = Work(tokens, samples, steps=1, passes=1, pass_tokens=samples * tokens)
    return predict(plan, work, Machines(1, os.cpu_count() or 1, 1, 128e9, 141e9), "trainer")


def passes_of_a_model(bench: Bench, plan: Plan, vocabulary: int) -> None:
    """Print the rate of forward and backward passes, which `GPU_FLOPS` and `LAYER_SECONDS` assume."""
    student = Student(plan, bench.device)
    parameters = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    elements, layers = sum(map(torch.numel, parameters)), plan.base_header.num_layers or 1
    body = language_model(student.model).model
    for tokens in (8,) if bench.small else (192, 512, 2048):
        inputs = torch.tensor([ids(tokens, vocabulary, 1)], device=bench.device)

        def passed(inputs: torch.Tensor = inputs) -> None:
            body(inputs, use_cache=False).last_hidden_state.float().mean().backward()
            for parameter in parameters:
                parameter.grad = None

        seconds = bench.seconds(passed)
        rates = round(6 * tokens * elements / seconds / 1e12, 3), round(seconds / layers * 1e3, 3)
        bench.fact(f"forward and backward of {tokens} tokens: TFLOP/s, ms a layer", rates)


def step_with_factors(bench: Bench) -> None:
    """A step of eight experts through factors takes its passes and two products with the factors"""
    size, experts = (TINY, 3) if bench.small else (HALF, 8)
    config = write_merge(bench.folder / "eight", size, experts, torch.bfloat16, bench.device)
    plan = plan_of(config, "parameters.weight=0.2", f"parameters.gradient_accumulation={experts}")
    tokens = 16 if bench.small else 512
    began = time.perf_counter()
    state, by_lapack = store_factors(plan, bench.folder / "eight-state", bench.device, os.cpu_count() or 1)
    bench.fact(f"decomposing {experts * len(plan.orthogonal)} matrices, s", time.perf_counter() - began)
    bench.fact("of which LAPACK decomposed", len(by_lapack))
    window = targets_of(plan, (tokens,), bench.device)
    rest = LocalShards(plan, 2, True, state, plan.merged_set.difference(plan.orthogonal))
    shards = FactorShards(plan, plan.orthogonal, rest, state)
    bench.start_peak()
    steps = Steps(plan, bench.device, shards)
    whole = bench.seconds(lambda: steps.take(window, 1))
    weighted = [(target, 1 / len(window)) for target in window]
    passes = bench.seconds(lambda: steps.student.accumulate(weighted))
    said = predicted(plan, tokens)
    bench.fact("a step, s; its passes; the model's", tuple(round(s, 4) for s in (whole, passes, said.step.total)))
    if bench.on_gpu:
        name = plan.orthogonal[0]
        base, one = shards.on(bench.device, name)
        product = bench.seconds(lambda: torch.addmm(base, one.left_mR, one.right_Rn), 10)
        flops = 2 * base.numel() * one.left_mR.shape[1]
        bench.fact("product with factors, TFLOP/s", flops / product / 1e12)
        products = 2 * sum(2 * plan.numels[m] * min(plan.base_header.tensors[m].shape) for m in plan.orthogonal)
        bench.expect("a step over passes and products", whole / (passes + products * product / flops), 1.6)
        bench.expect("memory over the model's", bench.peak() / (said.memory.trainer - TRAINER_BYTES), 1.15)


def moving(bench: Bench) -> None:
    """Copies between the CPU and the device, and page-locking"""
    count = 1 << (16 if bench.small else 27)
    device = torch.empty(count, device=bench.device, dtype=torch.bfloat16)
    began = time.perf_counter()
    host = bench.pinned(count, torch.bfloat16)
    bench.fact("page-locking, GB/s", 2 * count / (time.perf_counter() - began) / GB)
    pageable = torch.ones(count, dtype=torch.bfloat16)
    ways: dict[str, Callable[[], object]] = {
        "to the CPU, pinned": lambda: host.copy_(device, non_blocking=True),
        "to the device, pinned": lambda: device.copy_(host, non_blocking=True),
        "to the device, pageable": lambda: device.copy_(pageable),
    }
    for name, copy in ways.items():
        bench.fact(f"{name}, GB/s", 2 * count / bench.seconds(copy) / GB)


def reading(bench: Bench) -> None:
    """Weights from a file to the device: straight, from mapped memory, and through pinned memory"""
    config = write_merge(bench.folder / "slice", TINY if bench.small else SLICE, 2, torch.bfloat16, bench.device)
    file = config.parent / "expert1" / "model.safetensors"
    nbytes, staging = file.stat().st_size, bench.pinned(64 << 20, torch.uint8)

    def straight() -> None:
        with safe_open(file, "pt", device=str(bench.device)) as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                opened.get_tensor(name)

    def mapped() -> None:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                opened.get_tensor(name).to(bench.device, copy=True)

    def staged() -> None:
        target = torch.empty(len(staging), dtype=torch.uint8, device=bench.device)
        with file.open("rb", buffering=0) as raw:
            while count := raw.readinto(memoryview(staging.numpy())):
                target[:count].copy_(staging[:count], non_blocking=True)
                bench.wait()

    ways = {"safe_open to the device": straight, "mapped, then copied": mapped, "through pinned memory": staged}
    for name, read in ways.items():
        drop_cached(file)
        began = time.perf_counter()
        read()
        bench.wait()
        first = time.perf_counter() - began
        again = bench.seconds(read, 2)
        bench.fact(f"{name}, GB/s: from disk, cached", (round(nbytes / first / GB, 2), round(nbytes / again / GB, 2)))


def drop_cached(file: Path) -> None:
    """Let the system forget the file's pages, so that the next reading comes from the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def linear_algebra(bench: Bench) -> None:
    """Decompositions by matrix products are exact on the device, and faster than LAPACK's"""
    torch.set_float32_matmul_precision("highest")
    experts, (rows, columns) = 8, (192, 520) if bench.small else (4096, 11008)
    rank = rows // experts
    generator = torch.Generator(bench.device).manual_seed(0)

    def orthonormal(count: int, width: int) -> torch.Tensor:
        random = torch.randn(count, width, generator=generator, device=bench.device)
        return torch.linalg.qr(random)[0]

    values = torch.arange(1, rows + 1, device=bench.device).float() ** -0.7
    tau = (orthonormal(rows, rows) * values) @ orthonormal(columns, rows).T
    parts = leading_parts_by_products(tau, rank)
    bench.expect("leading parts did not converge", parts is None, 0)
    if parts is not None:
        missed = 1 - float(parts[1].double().square().sum() / values[:rank].double().square().sum())
        bench.expect("leading parts: energy missed", missed, 1e-5)
    bench.fact(
        f"{rank} leading parts of {rows} x {columns}, s", bench.seconds(lambda: leading_parts_by_products(tau, rank), 1)
    )
    many = torch.cat([orthonormal(columns, rank) for _ in range(experts)], 1).T.contiguous()
    nearest = nearest_isometry(many)
    bench.expect("nearest isometry did not converge", nearest is None, 0)
    if nearest is not None:
        eye = torch.eye(len(many), device=bench.device)
        bench.expect("nearest isometry: not orthogonal by", float((nearest @ nearest.T - eye).abs().max()), 1e-4)
    bench.fact(f"nearest isometry of {len(many)} x {columns}, s", bench.seconds(lambda: nearest_isometry(many), 1))
    for dtype in (torch.float32, torch.float64):
        square = (tau @ tau.T).to(dtype)
        bench.fact(f"eigh of {rows}, {dtype}, s", bench.seconds(lambda s=square: torch.linalg.eigh(s), 1))
    if bench.on_gpu:
        cut = tau[:, :rows].contiguous()
        bench.fact(f"svd of {rows} x {rows}, s", bench.seconds(lambda: torch.linalg.svd(cut, full_matrices=False), 1))
    left, right, base = (
        torch.randn(shape, generator=generator, device=bench.device).bfloat16()
        for shape in ((rows, rows), (rows, columns), (rows, columns))
    )
    merge = bench.seconds(lambda: torch.addmm(base, left, right), 10)
    bench.fact(
        "merge by addmm: TFLOP/s, ms", (round(2 * rows * rows * columns / merge / 1e12, 3), round(merge * 1e3, 3))
    )
    project = bench.seconds(lambda: ((base @ right.T) * left).sum(0, dtype=torch.float64), 10)
    bench.fact("coefficient gradient, ms", project * 1e3)
