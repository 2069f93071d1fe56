"""Task vectors of a checkpoint on disk in few bits: their singular parts, the leading ones with more bits.

delta_config.json        format, bits of the groups, the base, and how far the task vectors are off
delta_model.safetensors  codes and scales of both factors of each matrix that changed; other tensors that changed, whole

Source: Delta-CoMe, arXiv 2406.08903: mixed precision by singular values. There, calibration samples decide how vectors
are rounded (GPTQ); here, the left factors are fitted by least squares to what rounding left of the right ones, which
needs no samples. Letters: m rows and n columns of a matrix, r singular parts.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.checkpoints.adapter_copies import is_copy
from engine.checkpoints.adapter_file import DELTA, DELTA_WEIGHTS, FORMAT, SIDES
from engine.checkpoints.headers import FLOATS, ModelHeader, TensorHeader
from engine.checkpoints.structure import Role
from engine.checkpoints.tensors import Checkpoint
from engine.checkpoints.writer import OutputFile, OutputTensor, write_file
from engine.errors import CheckpointError, OutputError
from engine.methods.arithmetic.matrices import leading
from engine.methods.compression import Bits
from engine.packing import PackedGroup, Packing, codes_name, decode, encode, scales_name
from engine.storage.local_folder import LocalFolder

# Roles of matrices that are no linear layers of blocks; they are stored whole, as in the paper.
APART = (Role.EMBEDDING, Role.HEAD, Role.POSITION)


@dataclass(frozen=True)
class Written:
    """What was written: the bytes of the expert's tensors and of the file, and ‖τ̂ − τ‖ / ‖τ‖ over all matrices."""

    before: int
    after: int
    error: float


def groups_of(shape: Sequence[int], bits: Bits, size: float) -> tuple[PackedGroup, ...]:
    """Return the groups of a matrix's singular parts, the leading ones first, that take at most a share of its bytes.

    Args:
        shape: m and n.
        bits: Bits and number of parts of each group; None: as many as there is space for.
        size: The share of the matrix in 16 bits. There is one part at least.
    """
    left, rank, found = 2 * size * math.prod(shape), min(shape), list[PackedGroup]()
    for own, wanted in bits:
        each = sum(PackedGroup(own, 1).nbytes(length) for length in shape)
        count = min(rank, math.inf if wanted is None else wanted, max(0, int(left // each)))
        if count == 0 and not found and rank:
            count = 1
        if count:
            found.append(PackedGroup(own, int(count)))
        left, rank = left - count * each, rank - int(count)
    return tuple(found)


def write_deltas(
    expert: ModelHeader, base: ModelHeader, out: Path, bits: Bits, size: float, name_of_base: str
) -> Written:
    """Write the task vectors of a checkpoint into a new folder, which appears when it is complete.

    One matrix is in memory at a time, with its decomposition.

    Args:
        expert: The header of the checkpoint.
        base: The header of its base.
        out: The folder, which must not exist or be empty.
        bits: See `groups_of`.
        size: See `groups_of`.
        name_of_base: What the config calls the base.

    Raises:
        CheckpointError: The checkpoint has other tensors than the base, none that changed, or weights that are not
            finite.
        OutputError: The folder is not empty, or cannot be written.
    """
    _check_alike(expert, base)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError("the output exists already", str(out), "a folder that does not exist, or is empty")
    writer = _Writer(expert, base, bits, size)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    except OSError as error:
        raise OutputError(f"the folder cannot be made: {error.strerror}", str(out)) from error
    try:
        write_file(LocalFolder(temporary), OutputFile(DELTA_WEIGHTS, tuple(writer.tensors)), writer.parts)
        # Of groups that no matrix has room for, the bits are listed as well.
        about = {"bits": [own for own, _ in bits], "size": size, "error": writer.error}
        config = {**FORMAT, "base_model_name_or_path": name_of_base, **about}
        LocalFolder(temporary).write(DELTA, (json.dumps(config, indent=1) + "\n").encode())
        temporary.chmod(0o777 & ~_umask())
        temporary.replace(out)
    except OSError as error:
        raise OutputError(f"the folder cannot be written: {error.strerror}", str(out)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    before = sum(tensor.nbytes for tensor in expert.tensors.values())
    return Written(before, sum(tensor.nbytes for tensor in writer.tensors), writer.error)


class _Writer:
    """The tensors of the file, and what each holds."""

    def __init__(self, expert: ModelHeader, base: ModelHeader, bits: Bits, size: float) -> None:
        self._expert, self._base = (Checkpoint(header.folder, header.tensors) for header in (expert, base))
        self._packings: dict[str, tuple[Packing, ...]] = {}
        self.tensors: list[OutputTensor] = []
        self._ready: dict[str, Tensor] = {}
        self._squares = np.zeros(2)
        for name, tensor in expert.tensors.items():
            if tensor.dtype not in FLOATS or is_copy(expert.folder, tensor, base.folder, base.tensors[name]):
                continue  # masks and counts are never merged
            groups = groups_of(tensor.shape, bits, size) if self._is_matrix(tensor, base) else ()
            packings = tuple(
                Packing(f"{name}.{side}", groups, length, side == "left")
                for side, length in zip(SIDES, tensor.shape if groups else (), strict=False)
            )
            if not packings or sum(packing.nbytes for packing in packings) >= tensor.nbytes:
                self.tensors.append(OutputTensor(name, tensor.shape, tensor.dtype, tensor.nbytes))
                continue
            self._packings |= {own: packings for packing in packings for own in packing.stored}
            for packing in packings:
                for own, (shape, dtype) in packing.stored.items():
                    code = "U8" if dtype == "|u1" else "BF16"
                    self.tensors.append(OutputTensor(own, shape, code, math.prod(shape) * (1 if code == "U8" else 2)))
        if not self.tensors:
            raise CheckpointError("the checkpoint is the base: no tensor has changed", str(expert.folder))

    @property
    def error(self) -> float:
        """‖τ̂ − τ‖ / ‖τ‖ over the matrices that were written so far."""
        return float(np.sqrt(self._squares[0] / self._squares[1])) if self._squares[1] else 0.0

    def parts(self, entry: OutputTensor) -> Iterator[Tensor]:
        """Yield a tensor of the file."""
        if entry.name not in self._packings:
            stored = self._expert.read(entry.name)
            if not bool(stored.isfinite().all()):
                raise _not_finite(entry.name, self._expert)
            yield stored
            return
        if entry.name not in self._ready:
            self._pack(self._packings[entry.name])
        yield self._ready.pop(entry.name)

    def _is_matrix(self, tensor: TensorHeader, base: ModelHeader) -> bool:
        return len(tensor.shape) == 2 and base.roles.get(tensor.name) not in APART and tensor.numel > 0

    def _pack(self, packings: tuple[Packing, ...]) -> None:
        """Compress a matrix, and keep the tensors of both factors until they are written."""
        left, right = packings
        name = left.name.removesuffix(f".{SIDES[0]}")
        tau_mn = self._expert.read(name).float() - self._base.read(name).float()
        if not bool(tau_mn.isfinite().all()):
            raise _not_finite(name, self._expert)
        ready, approximation_mn = compress(tau_mn, left, right)
        self._ready |= ready
        self._squares += [_square(approximation_mn - tau_mn), _square(tau_mn)]


def compress(tau_mn: Tensor, left: Packing, right: Packing) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of both factors of a matrix, and their product [m, n], float32, as a reader computes it.

    τ ≈ L̂ᵀ·R̂ with R = √Σ·Vᵀ [r, n], rounded to R̂, and L = argmin ‖Lᵀ·R̂ − τ‖, rounded to L̂. Parts that τ does not have
    are zero.
    """
    rank = sum(group.vectors for group in left.groups)
    _, values_r, directions_rn = leading(tau_mn, rank) if tau_mn.any() else _nothing(tau_mn)
    right_rn = torch.zeros(rank, tau_mn.shape[1])
    right_rn[: len(values_r)] = values_r.sqrt()[:, None] * directions_rn
    tensors, rounded_rn = _rounded(right, right_rn)
    gram_rr, wanted_rm = rounded_rn.double() @ rounded_rn.double().T, rounded_rn.double() @ tau_mn.double().T
    left_rm = (torch.linalg.pinv(gram_rr, hermitian=True) @ wanted_rm).float()
    own, rounded_rm = _rounded(left, left_rm)
    return tensors | own, rounded_rm.T @ rounded_rn


def _rounded(packing: Packing, vectors: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the codes and scales of a factor's vectors, and the vectors that these are."""
    tensors, parts, start = dict[str, Tensor](), [], 0
    for index, group in enumerate(packing.groups):
        own = np.ascontiguousarray(vectors[start : start + group.vectors].numpy())
        codes, scales = encode(own, group.bits)
        tensors[codes_name(packing.name, index)] = torch.from_numpy(codes)
        tensors[scales_name(packing.name, index)] = torch.from_numpy(scales).view(torch.bfloat16)
        parts.append(torch.from_numpy(decode(codes, scales, packing.length, group.bits)))
        start += group.vectors
    return tensors, torch.cat(parts)


def _check_alike(expert: ModelHeader, base: ModelHeader) -> None:
    """Check that both have the same tensors, of float dtypes where they can differ."""
    for name in (*expert.tensors, *base.tensors):
        own, theirs = expert.tensors.get(name), base.tensors.get(name)
        if own is None or theirs is None or own.shape != theirs.shape:
            found = "missing" if own is None else f"of shape {own.shape}"
            wanted = "no such tensor" if theirs is None else f"shape {theirs.shape}, as in the base"
            raise CheckpointError(f"the tensor {name!r} is {found}", str(expert.folder), wanted)
        if (own.dtype in FLOATS) != (theirs.dtype in FLOATS):
            what = f"the tensor {name!r} has dtype {own.dtype}, the base's {theirs.dtype}"
            raise CheckpointError(what, str(expert.folder), f"one of {', '.join(FLOATS)}")


def _not_finite(name: str, checkpoint: Checkpoint) -> CheckpointError:
    return CheckpointError(f"the tensor {name!r} has values that are not finite", str(checkpoint.folder))


def _nothing(tau_mn: Tensor) -> tuple[Any, Tensor, Tensor]:
    return None, torch.zeros(0), torch.zeros(0, tau_mn.shape[1])


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
