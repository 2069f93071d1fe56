"""Where the statistics of a merge's models are: in folders that the config names, or in the run's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import PurePosixPath

from engine.errors import CheckpointError
from engine.methods.options import Statistic
from engine.planning.open_models import weight_files
from engine.planning.plan import ModelPlan, Plan
from engine.statistics.files import AGAIN, HEADER, Statistics, StatisticsHeader, read_header
from engine.statistics.moments import TensorStatistics
from engine.storage.folder import Folder
from engine.storage.paths import open_folder

# Subfolder of the run's state.
FOLDER = "statistics"


def folder_name(k: int | None) -> str:
    """Return the folder of the statistics of expert k, or of the base (None), in the run's state."""
    return f"{FOLDER}/{'base' if k is None else k}"


def given_folder(plan: Plan, k: int | None) -> str | None:
    """Return the folder that the config names for the statistics of expert k, or of the base (None)."""
    return plan.config.base_statistics if k is None else plan.config.models[k].statistics


class MergeStatistics:
    """The statistics of all models of a merge, opened when first needed."""

    def __init__(self, plan: Plan, state: Folder | None) -> None:
        self._plan, self._state = plan, state
        self._opened = cache(self._open)

    def of_experts(self, name: str, indices: Sequence[int]) -> list[TensorStatistics | None]:
        """Return the statistics of a tensor of these experts; none if the merge needs none."""
        return [self._of(k, name) for k in indices] if self._plan.config.statistics else []

    def of_base(self, name: str) -> TensorStatistics | None:
        """Return the statistics of a tensor of the base; None if the merge needs none."""
        return self._of(None, name) if self._plan.config.statistics_of_base else None

    def _of(self, k: int | None, name: str) -> TensorStatistics:
        return self._opened(k).of(name, self._plan.base_header.tensors[name].shape)

    def _open(self, k: int | None) -> Statistics:
        given = given_folder(self._plan, k)
        if given is not None:
            return Statistics(open_folder(given))
        assert self._state is not None
        return Statistics(self._state.child(folder_name(k)))


def kinds_of(plan: Plan, k: int | None) -> tuple[Statistic, ...]:
    """Return the statistics that a merge needs of expert k, or of the base (None)."""
    return plan.config.statistics_of_base if k is None else plan.config.statistics


def model_of(plan: Plan, k: int | None) -> ModelPlan:
    """Return expert k, or the base (None)."""
    return plan.base if k is None else plan.experts[k]


def hashes(model: ModelPlan, digests: Mapping[str, str]) -> dict[str, str]:
    """Return the SHA-256 of a model's weight files by their names; `digests`: those of files by path or URI."""
    return {PurePosixPath(file.address).name: digests[file.address] for file in weight_files(model)}


def check_given(plan: Plan, k: int | None, digests: Mapping[str, str]) -> StatisticsHeader:
    """Check that the statistics that the config names for a model are of this model and base, and hold what is needed.

    Raises:
        CheckpointError: They are not.
    """
    folder = given_folder(plan, k)
    assert folder is not None
    header, model, where = read_header(open_folder(folder)), model_of(plan, k), f"{folder}/{HEADER}"
    for kind, recorded, given in (("base", header.base, plan.base), ("model", header.model, model)):
        if sorted(recorded.values()) != sorted(hashes(given, digests).values()):
            raise CheckpointError(
                f"statistics of another {kind}",
                where,
                f"those of {given.address}, by the SHA-256 of its weights",
                AGAIN,
            )
    has = {*header.kinds, *(["activations"] if "gram" in header.kinds else [])}
    missing = [kind for kind in kinds_of(plan, k) if kind not in has]
    if missing:
        do = f"{AGAIN}, with --kinds {','.join([*header.kinds, *missing])}"
        raise CheckpointError(f"the statistics have no {missing[0]}", where, ", ".join(kinds_of(plan, k)), do)
    return header
