"""The contents of merge/memory.json: processes, traffic and times of a merge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import AwareDatetime, Field

# The most starts of a run, phases of a start, of which a page shows the times, and lines about the weights.
STARTS, PHASES, DOUBTS = 1_000, 1_000, 10_000
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class UsedGpu:
    """A GPU of a process in merge/memory.json."""

    name: str
    peak_allocated_bytes: int
    peak_reserved_bytes: int


@dataclass(frozen=True)
class Actor:
    """One process in merge/memory.json, and the GPUs that it used."""

    role: str
    pid: int
    peak_anonymous_bytes: int
    gpus: tuple[UsedGpu, ...] = ()


@dataclass(frozen=True)
class PhaseTimes:
    """A phase in merge/memory.json, from `begin` to `end` in seconds since the start of the run that it belongs to."""

    name: str
    begin: Seconds
    end: Seconds


@dataclass(frozen=True)
class StartTimes:
    """A start of the run in merge/memory.json: date and time, seconds at work, and its phases, which may overlap."""

    began: AwareDatetime
    seconds: Seconds
    phases: Annotated[tuple[PhaseTimes, ...], Field(max_length=PHASES)]


@dataclass(frozen=True)
class Memory:
    """The contents of merge/memory.json: memory in bytes, traffic in bytes, times.

    `seconds` is by phase in the last start. `lost_attempts` were repeated in it. `left_out` is the share of each
    expert's squared change that is in tensors that are not merged. `doubts` is what the weights say against the merge.
    `reused` is what other merges had computed. Earlier versions wrote no more than `seconds`.
    """

    actors: Annotated[tuple[Actor, ...], Field(min_length=1)]
    bytes_trainer_to_shards: int
    bytes_shards_to_trainer: int
    bytes_merged: int
    bytes_targets: int
    expert_forwards: int
    seconds: dict[str, float]
    not_deterministic: tuple[str, ...] = ()
    decompositions_by_lapack: int = 0
    starts: Annotated[tuple[StartTimes, ...], Field(max_length=STARTS)] = ()
    lost_attempts: int = 0
    left_out: dict[str, Share] = field(default_factory=dict)
    doubts: Annotated[tuple[str, ...], Field(max_length=DOUBTS)] = ()
    reused: dict[str, int] = field(default_factory=dict)

    @property
    def at_work(self) -> float | None:
        """Seconds that all starts of the run were at work, or None if that is not recorded."""
        return sum(start.seconds for start in self.starts) if self.starts else None

    @property
    def stopped(self) -> float:
        """Seconds between the starts of the run, in which nothing was at work."""
        pairs = zip(self.starts, self.starts[1:], strict=False)
        return sum(max(0.0, (b.began - a.began).total_seconds() - a.seconds) for a, b in pairs)
