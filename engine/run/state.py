"""Formats of a run's state: plan and samples as JSON, arrays and the learner as safetensors; never code.

What is read is checked like any input from outside, since anyone may write to a bucket. `engine.storage.sealed` adds
the checksum of a file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import pydantic
import pydantic_core
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError

from engine.calibration.samples import Sample
from engine.config.resources import Use
from engine.errors import InputError
from engine.learning.learner import LearnerState
from engine.planning.plan import Plan
from engine.storage.folder import Folder
from engine.storage.sealed import read_sealed, refuse
from engine.untrusted import parse_json

T = TypeVar("T")
PLAN = "plan.json"
# No machine has more CPUs.
MOST_THREADS = 1 << 14


@dataclass(frozen=True)
class StageState:
    """The progress of a stage: completed optimiser steps, and the learner's state after them (None before any)."""

    steps: int
    learner: LearnerState | None


@contextmanager
def decoding(where: str) -> Iterator[None]:
    """Raise DamagedError, which names the file `where`, for content that cannot be what a run wrote."""
    try:
        yield
    except (InputError, SafetensorError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        refuse(where)


@cache
def _types(kind: Any) -> Any:
    return pydantic.TypeAdapter(kind)


def _encode(value: Any) -> bytes:
    # By default, NaN and infinity would turn into null; a model's config may contain them.
    return json.dumps(pydantic_core.to_jsonable_python(value, inf_nan_mode="constants")).encode()


def encode_plan(plan: Plan) -> bytes:
    """Return the plan as JSON."""
    return _encode(plan)


def load_plan(state: Folder, digest: str) -> Plan:
    """Return the plan that `RunFolder.keep_plan` stored. `digest` is the `plan_digest` of the driver's plan.

    The digest does not come from the folder, so no one who may write there can change which files a node reads, or
    whether code of a model may run.

    Raises:
        DamagedError: the file is missing, damaged, or not the driver's plan.
    """
    where = f"{state.where}/{PLAN}"
    try:
        content = read_sealed(state, PLAN)
    except FileNotFoundError:
        refuse(where)
    if hashlib.sha256(content).hexdigest() != digest:
        refuse(where)
    with decoding(where):
        plan: Plan = _types(Plan).validate_python(json.loads(content))
    return plan


def plan_digest(plan: Plan) -> str:
    """Return the SHA-256 of the stored plan in hexadecimal."""
    return hashlib.sha256(encode_plan(plan)).hexdigest()


def encode_samples(samples: list[list[Sample]]) -> bytes:
    """Return the samples as JSON."""
    return _encode(samples)


def decode_samples(content: bytes, plan: Plan, where: str) -> list[list[Sample]]:
    """Return the samples that `encode_samples` encoded.

    Raises:
        DamagedError: the content cannot be samples of this plan.
    """
    with decoding(where):
        raw = parse_json(content.decode(), where, InputError)
        samples: list[list[Sample]] = _types(list[list[Sample]]).validate_python(raw)
        if len(samples) != len(plan.experts):
            raise ValueError
        for k, of_expert in enumerate(samples):
            if not all(_fits(sample, plan, k, index) for index, sample in enumerate(of_expert)):
                raise ValueError
    return samples


def decode_samples_of(content: bytes, plan: Plan, k: int, where: str) -> list[Sample]:
    """Return the samples of one list that `encode_samples` encoded, as those of expert k of this plan.

    Raises:
        DamagedError: the content cannot be samples of this plan.
    """
    with decoding(where):
        raw = parse_json(content.decode(), where, InputError)
        (found,) = _types(list[list[Sample]]).validate_python(raw)
        samples = [replace(sample, expert=k) for sample in found]
        if not all(_fits(sample, plan, k, index) for index, sample in enumerate(samples)):
            raise ValueError
    return samples


def _fits(sample: Sample, plan: Plan, k: int, index: int) -> bool:
    """Return whether this can be sample `index` of expert k."""
    ids = sample.input_ids
    vocabulary = plan.base_header.vocab_size or max(ids, default=0) + 1
    return (
        (sample.expert, sample.index) == (k, index)
        and bool(ids)
        and 0 <= min(ids) <= max(ids) < vocabulary
        and min(sample.generate, sample.cut) >= 0
        and sample.tokens <= plan.config.calibration.max_length
        and all(0 <= start <= stop <= sample.tokens for start, stop in sample.masked_spans)
        and 0 <= sample.loss_weight < math.inf
    )


def decode_devices(content: bytes, where: str) -> dict[str, Any]:
    """Return the devices of a run: GPUs of trainer and expert, CPU threads, types of GPUs, and what follows from them.

    Raises:
        DamagedError: the content cannot be these.
    """
    with decoding(where):
        raw = parse_json(content.decode(), where, InputError)
        trainer, expert, threads, kinds = (raw[key] for key in ("trainer", "expert", "threads", "kinds"))
        if not (0 <= trainer < math.inf and 0 <= expert < math.inf and 0 < threads <= MOST_THREADS):
            raise ValueError
        limits = {name: raw[name] for name in ("batch_tokens", "logit_bytes")}
        if not all(type(most) is int and most > 0 for most in limits.values()):
            raise ValueError
        if raw["factors"] not in get_args(Use) or raw["gradients"] not in ("accumulate", "stream"):
            raise ValueError
        given = {"trainer": trainer, "expert": expert, "threads": int(threads), "kinds": [*map(str, kinds)]}
        return given | {name: raw[name] for name in ("factors", "gradients")} | limits


def decode_names(content: bytes, where: str) -> dict[str, list[str]]:
    """Return lists of names by kind.

    Raises:
        DamagedError: the content is something else.
    """
    with decoding(where):
        raw = parse_json(content.decode(), where, InputError)
        names: dict[str, list[str]] = _types(dict[str, list[str]]).validate_python(raw)
    return names


def encode_stage(state: StageState) -> bytes:
    """Return the state of a stage as safetensors; the number of steps is a tensor of its own."""
    tensors = {f"learner.{name}": tensor for name, tensor in (state.learner or {}).items()}
    content: bytes = safetensors.torch.save(tensors | {"steps": torch.tensor(state.steps)})
    return content


def decode_stage(content: bytes, where: str) -> StageState:
    """Return the state that `encode_stage` encoded. Its tensors are checked by `Learner.restore`.

    Raises:
        DamagedError: the content cannot be the state of a stage.
    """
    with decoding(where):
        tensors = safetensors.torch.load(content)
        count = tensors.pop("steps")
        if count.shape or count.is_floating_point() or count.item() < 0:
            raise ValueError
        learner = {name.removeprefix("learner."): tensor for name, tensor in tensors.items()}
    return StageState(int(count), learner or None)


def encode_array(array: npt.NDArray[Any]) -> bytes:
    """Return a numeric array as safetensors."""
    content: bytes = safetensors.numpy.save({"array": np.ascontiguousarray(array)})
    return content


def decode_array(content: bytes, where: str) -> npt.NDArray[Any]:
    """Return the array that `encode_array` encoded.

    Raises:
        DamagedError: the content is no such array, or has numbers that are not finite.
    """
    with decoding(where):
        array: npt.NDArray[Any] = safetensors.numpy.load(content)["array"]
        if not np.isfinite(array).all():
            raise ValueError
    return array


def decode_rows(content: bytes, where: str) -> list[dict[str, Any]]:
    """Return rows of metrics from JSON.

    Raises:
        DamagedError: the content is no list of rows of plain values.
    """
    with decoding(where):
        rows: list[dict[str, Any]] = _types(list[dict[str, str | int | float | None]]).validate_python(
            parse_json(content.decode(), where, InputError)
        )
    return rows
