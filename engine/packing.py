"""Numbers of few bits: the codec of singular vectors on disk.

A vector is cut into blocks of BLOCK elements. An element of b bits is (code − (2ᵇ − 1)/2)·s, with the scale s of its
block in bfloat16. Letters: V vectors, N elements of each, G blocks, C bytes of a vector's codes. torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Halves = NDArray[np.uint16]

BLOCK = 128
MOST_BITS = 8
# The scales that are tried, as shares of that at which the largest element of a block is the largest level.
SHARES = np.linspace(0.2, 1.0, 17, dtype=np.float32)
# Elements that are coded at a time.
NUMEL = 1 << 22


@dataclass(frozen=True)
class PackedGroup:
    """Consecutive vectors with as many bits: `bits` an element, and the number of `vectors`."""

    bits: int
    vectors: int

    def nbytes(self, length: int) -> int:
        """Return the bytes of codes and scales of vectors of a length."""
        return self.vectors * (code_bytes(length, self.bits) + 2 * blocks(length))


@dataclass(frozen=True)
class Packing:
    """A matrix that is stored as groups of vectors.

    Attributes:
        name: The start of the names of its tensors; see `codes_name`.
        groups: The groups, in order.
        length: N.
        transposed: The vectors are its columns, not its rows.
    """

    name: str
    groups: tuple[PackedGroup, ...]
    length: int
    transposed: bool

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(group.nbytes(self.length) for group in self.groups)

    @property
    def stored(self) -> dict[str, tuple[tuple[int, int], str]]:
        """Shape and dtype, as numpy has it, of each tensor in the file; the dtype of bfloat16's bits is `<u2`."""
        found: dict[str, tuple[tuple[int, int], str]] = {}
        for index, group in enumerate(self.groups):
            found[codes_name(self.name, index)] = (group.vectors, code_bytes(self.length, group.bits)), "|u1"
            found[scales_name(self.name, index)] = (group.vectors, blocks(self.length)), "<u2"
        return found

    def matrix(self, read: Callable[[str], NDArray[Any]]) -> Floats:
        """Return the matrix, float32.

        Args:
            read: Returns a tensor of the file: codes, uint8, or scales, the bits of bfloat16 as uint16.
        """
        parts = [
            decode(read(codes_name(self.name, index)), read(scales_name(self.name, index)), self.length, group.bits)
            for index, group in enumerate(self.groups)
        ]
        whole = np.concatenate(parts)
        return np.ascontiguousarray(whole.T) if self.transposed else whole


def codes_name(name: str, group: int) -> str:
    """Return the name of the codes of a group, [V, C] uint8."""
    return f"{name}.{group}.codes"


def scales_name(name: str, group: int) -> str:
    """Return the name of the scales of a group, [V, G] bfloat16."""
    return f"{name}.{group}.scales"


def code_bytes(length: int, bits: int) -> int:
    """Return C, the bytes of the codes of a vector."""
    return -(-length * bits // 8)


def blocks(length: int) -> int:
    """Return G, the blocks of a vector."""
    return -(-length // BLOCK)


def encode(values_VN: Floats, bits: int) -> tuple[Bytes, Halves]:
    """Return codes, [V, C], and scales, the bits of bfloat16, [V, G], of finite vectors.

    Of the scales that are tried, each block has the one with the least squared error.
    """
    count, length = values_VN.shape
    codes_VC = np.empty((count, code_bytes(length, bits)), np.uint8)
    scales_VG = np.empty((count, blocks(length)), np.uint16)
    step = max(1, NUMEL // max(1, length))
    for start in range(0, count, step):
        own = slice(start, start + step)
        codes_VC[own], scales_VG[own] = _encode(values_VN[own], bits)
    return codes_VC, scales_VG


def decode(codes_VC: Bytes, scales_VG: Halves, length: int, bits: int) -> Floats:
    """Return the vectors, [V, N], that `encode` stored."""
    found_VN = np.empty((len(codes_VC), length), np.float32)
    step = max(1, NUMEL // max(1, length))
    for start in range(0, len(codes_VC), step):
        own = slice(start, start + step)
        bits_VNb = np.unpackbits(codes_VC[own], axis=1, count=length * bits).reshape(-1, length, bits)
        code_VN = (bits_VNb << np.arange(bits, dtype=np.uint8)).sum(2, dtype=np.float32)
        scale_VN = np.repeat(_floats(scales_VG[own]), BLOCK, axis=1)[:, :length]
        found_VN[own] = (code_VN - (2**bits - 1) / 2) * scale_VN
    return found_VN


def _encode(values_VN: Floats, bits: int) -> tuple[Bytes, Halves]:
    count, length = values_VN.shape
    top = np.float32((2**bits - 1) / 2)
    padded_VGB = np.zeros((count, blocks(length), BLOCK), np.float32)
    padded_VGB.reshape(count, -1)[:, :length] = values_VN
    largest_VG1 = np.abs(padded_VGB).max(2, keepdims=True)
    best_VG1 = np.full_like(largest_VG1, np.inf)
    scale_VG1, code_VGB = np.zeros_like(largest_VG1), np.zeros(padded_VGB.shape, np.uint8)
    inside_GB = (np.arange(blocks(length) * BLOCK) < length).reshape(-1, BLOCK)
    for share in SHARES:
        tried_VG1 = _floats(_halves(largest_VG1 * (share / top)))
        inverse_VG1 = np.divide(1, tried_VG1, out=np.zeros_like(tried_VG1), where=tried_VG1 > 0)
        own_VGB = np.clip(np.round(padded_VGB * inverse_VG1 + top), 0, 2 * top)
        error_VGB = np.where(inside_GB, (own_VGB - top) * tried_VG1 - padded_VGB, 0)
        error_VG1 = np.square(error_VGB).sum(2, keepdims=True)
        better_VG1 = error_VG1 < best_VG1
        best_VG1, scale_VG1 = np.where(better_VG1, error_VG1, best_VG1), np.where(better_VG1, tried_VG1, scale_VG1)
        code_VGB = np.where(better_VG1, own_VGB, code_VGB).astype(np.uint8)
    code_VN = code_VGB.reshape(count, -1)[:, :length]
    bits_VNb = (code_VN[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(bits_VNb.reshape(count, -1), axis=1), _halves(scale_VG1[:, :, 0])


def _halves(values: Floats) -> Halves:
    """Return the bits of the nearest bfloat16 of finite values."""
    word = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype(np.uint16)


def _floats(halves: Halves) -> Floats:
    found: Floats = (halves.astype(np.uint32) << 16).view(np.float32)
    return found
