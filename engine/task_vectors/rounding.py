"""Rounding of merged weights to the dtype of the output, and how much of the merge survives it.

bfloat16 has 8 significant bits. Where a merge changes a weight by less than half the distance to the next number of
the output's dtype, rounding to the nearest returns the base's weight. Stochastic rounding takes one of the two
neighbours at random, the nearer one more often, so that the mean over many weights is the exact one.
Letters: N elements of a piece, B of a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.compiled import compiled
from engine.sizes import BLOCK
from engine.task_vectors.pieces import Piece

# Multipliers of SplitMix64 (Steele, Lea and Flood 2014), whose i-th number needs none of the others.
_STEP, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class Survival:
    """How much of a change Δ = θ − θ₀ is left in the written weights θ̂; θ is the merged tensor before it is rounded.

    Attributes:
        kept: ⟨θ̂ − θ₀, Δ⟩.
        change: ⟨Δ, Δ⟩.
    """

    kept: float = 0.0
    change: float = 0.0

    def __add__(self, other: Survival) -> Survival:
        return Survival(self.kept + other.kept, self.change + other.change)

    @property
    def share(self) -> float | None:
        """⟨θ̂ − θ₀, Δ⟩ / ⟨Δ, Δ⟩: 1 if all of the change is left, 0 if none; None without a change."""
        return self.kept / self.change if self.change else None


@dataclass(frozen=True)
class Rounding:
    """The rounding of one merged tensor.

    Attributes:
        base: The base's tensor.
        seed: The 64-bit seed of stochastic rounding; None rounds to the nearest.
    """

    base: Tensor
    seed: int | None = None

    @classmethod
    def of(cls, name: str, base: Tensor, how: str, seed: int) -> Rounding:
        """Return the rounding of the tensor `name` by the `rounding` and `seed` of a config."""
        # No name contains a NUL, so that no method draws from the same seed.
        return cls(base, seed_of(f"{seed}\0{name}\0\0rounding") if how == "stochastic" else None)

    def round(self, piece: Piece, exact_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Survival]:
        """Return a piece [N] of the merged tensor in `dtype`, and what survives of its change.

        `exact_N` is float32, and is returned itself if that is the dtype. The bits do not depend on how the tensor is
        divided into pieces. An element that is infinite or NaN stays one of the two.
        """
        base_N = self.base.reshape(-1)[piece.start : piece.stop]
        seed = None if dtype == torch.float32 else self.seed
        out_N = exact_N.to(dtype) if seed is None else torch.empty(piece.numel, dtype=dtype)
        sums = np.zeros(2)
        for start in range(0, piece.numel, BLOCK):
            exact_B, out_B = exact_N[start : start + BLOCK], out_N[start : start + BLOCK]
            if seed is not None:
                bits_B, rounded_B = exact_B.view(torch.int32).numpy(), out_B.view(torch.int16).numpy()
                first = np.uint64(piece.start + start)
                round_at_random(bits_B, rounded_B, np.uint64(seed), first, dtype == torch.float16)
            base_B = base_N[start : start + BLOCK].float()
            add_survival(sums, exact_B.numpy(), base_B.numpy(), out_B.float().numpy())
        return out_N, Survival(float(sums[0]), float(sums[1]))


def add_survivals(survived: dict[str, Survival], more: Mapping[str, Survival]) -> None:
    """Add what survived of more elements to `survived`, by tensor."""
    for name, survival in more.items():
        survived[name] = survived.get(name, Survival()) + survival


def seed_of(text: str) -> int:
    """Return a 64-bit seed that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _round_at_random(bits_B: Any, out_B: Any, seed: Any, first: Any, half: bool) -> None:
    """Write the float32 numbers with these bits to `out_B` as the bits of bfloat16 or, with `half`, of float16.

    A number between two neighbours becomes the one farther from 0 with a probability of its distance from the other,
    measured in the distance of the two: so many of the bits that are dropped are below as many random bits. Element i
    takes random number `first` + i of the seed.
    """
    for i in range(bits_B.shape[0]):
        random = seed + (first + np.uint64(i)) * _STEP
        random = (random ^ (random >> np.uint64(30))) * _FIRST
        random = (random ^ (random >> np.uint64(27))) * _SECOND
        random = random ^ (random >> np.uint64(31))
        bits = np.uint64(np.uint32(bits_B[i]))
        magnitude = bits & np.uint64(0x7FFFFFFF)
        if not half:
            # The upper half of a float32. An infinity stays one; a NaN becomes one.
            magnitude = min(magnitude, np.uint64(0x7F800000))
            rounded = (magnitude + (random >> np.uint64(48))) >> np.uint64(16)
        elif magnitude >= np.uint64(0x47800000):
            rounded = np.uint64(0x7C00)  # 2¹⁶ and more, infinite and NaN
        elif magnitude >= np.uint64(0x38800000):
            # 2⁻¹⁴ and more: 13 bits fewer, and an exponent that counts from −15 instead of −127.
            rounded = ((magnitude + (random >> np.uint64(51))) >> np.uint64(13)) - np.uint64(112 << 10)
        elif magnitude < np.uint64(0x20000000):
            rounded = np.uint64(0)  # below 2⁻⁶³
        else:
            # Multiples of 2⁻²⁴, to which float32's 24 significant bits are shifted.
            shift = np.uint64(126) - (magnitude >> np.uint64(23))
            significant = (magnitude & np.uint64(0x7FFFFF)) | np.uint64(0x800000)
            rounded = (significant + (random >> (np.uint64(64) - shift))) >> shift
        out_B[i] = np.uint16(rounded | ((bits >> np.uint64(16)) & np.uint64(0x8000)))


def _add_survival(sums: Any, exact_B: Any, base_B: Any, out_B: Any) -> None:
    """Add ⟨out − base, exact − base⟩ and ⟨exact − base, exact − base⟩ to `sums` [2]; float32 arrays, float64 sums."""
    kept, change = 0.0, 0.0
    for i in range(exact_B.shape[0]):
        base = np.float64(base_B[i])
        delta = np.float64(exact_B[i]) - base
        kept += (np.float64(out_B[i]) - base) * delta
        change += delta * delta
    sums[0] += kept
    sums[1] += change


# Compiled at the first call. The GIL is released.
round_at_random = compiled(_round_at_random)
add_survival = compiled(_add_survival)
