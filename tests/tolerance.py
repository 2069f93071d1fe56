"""How far a computation may lie from its closed form by rounding alone, on any processor and in any order of its sums.

Source: Higham, Accuracy and Stability of Numerical Algorithms, chapters 3 and 4. With u, half of a dtype's eps, n
roundings make at most n·u of the absolute terms' sum; as they go either way, about √n·u (Higham and Mary 2019). Of
terms of either sign the partial sums grow as √n too: their scale is then the terms' Euclidean norm, not their absolute
sum. What a decomposition makes of a matrix is what an exact one makes of a matrix n·u·‖A‖₂ away.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]


def unit(dtype: torch.dtype = torch.float32) -> float:
    """u, the largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def bound(roundings: int, scale: float, dtype: torch.dtype = torch.float32, safety: float = 4.0) -> float:
    """What so many roundings of numbers up to `scale` add up to: n·u·scale, or safety·√n·u·scale where that is less."""
    return min(roundings, safety * math.sqrt(roundings)) * unit(dtype) * scale


def moved(matrix: Array, generator: np.random.Generator, dtype: torch.dtype = torch.float32) -> Array:
    """The matrix n·u·‖A‖₂ away in a random direction: what a stable decomposition in `dtype` may have seen instead."""
    noise = generator.normal(size=matrix.shape)
    away = max(matrix.shape) * unit(dtype) * np.linalg.norm(matrix, 2)
    found: Array = matrix + away / np.linalg.norm(noise, 2) * noise
    return found


def assert_within(found: npt.ArrayLike, wanted: npt.ArrayLike, limit: npt.ArrayLike, what: str = "") -> None:
    """Every element is at most its `limit` away from what is wanted; NaN is not."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape, what
    apart, limits = np.broadcast_arrays(np.abs(found - wanted), np.asarray(limit, np.float64))
    far = ~(apart <= limits)
    assert not far.any(), f"{what}: {far.sum()} of {far.size} are too far, by {apart[far].max()} ({limits[far].min()})"
