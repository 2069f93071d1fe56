"""How much of a merge survives the rounding to the output's dtype: kept with each weight file, recorded at the end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from engine.checkpoints.headers import FLOATS
from engine.errors import DamagedError
from engine.planning.differences import LOW
from engine.planning.plan import Plan
from engine.storage.folder import Folder
from engine.storage.sealed import read_sealed, write_sealed
from engine.task_vectors.rounding import Survival, add_survivals

# Subfolder of the state.
FOLDER = "rounding"
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_STORED = TypeAdapter(dict[str, tuple[_Finite, _Finite]])


def keep_survival(state: Folder, file: str, survived: Mapping[str, Survival]) -> None:
    """Store what survived of the merged tensors of a weight file, which has this name in the output."""
    content = {name: [survival.kept, survival.change] for name, survival in survived.items()}
    write_sealed(state, f"{FOLDER}/{file}.json", json.dumps(content).encode())


def load_survival(state: Folder, file: str) -> dict[str, Survival] | None:
    """Return what `keep_survival` stored for a file, or None if it is missing or damaged."""
    try:
        content = _STORED.validate_json(read_sealed(state, f"{FOLDER}/{file}.json"))
    except (FileNotFoundError, DamagedError, ValueError):
        return None
    return {name: Survival(kept, change) for name, (kept, change) in content.items()}


def survived_of(state: Folder, files: Iterable[str]) -> dict[str, Survival]:
    """Return what survived of each merged tensor, over the named files; the outputs of several models are added."""
    found: dict[str, Survival] = {}
    for file in files:
        add_survivals(found, load_survival(state, file) or {})
    return found


def survival_record(plan: Plan, survived: Mapping[str, Survival]) -> dict[str, Any]:
    """Return the contents of merge/rounding.json: the share that survived of the whole merge and of each tensor."""
    shares = {name: survived[name].share for name in plan.merged if name in survived}
    return {"rounding": plan.config.rounding, "survived": _share(survived), "tensors": shares}


def low_survival(plan: Plan, survived: Mapping[str, Survival]) -> str | None:
    """Return what to tell a user whose merge survives to a small share only, or None."""
    share = _share(survived)
    if share is None or share >= LOW or plan.config.rounding == "stochastic":
        return None
    dtypes = sorted({FLOATS[plan.out_dtype(name)] for name in plan.merged} - {"float32"})
    return (
        f"rounding to {' and '.join(dtypes)} keeps {share:.0%} of what the merge changes in the base; "
        "`out_dtype: float32` keeps all of it, `rounding: stochastic` all of it on average"
    )


def _share(survived: Mapping[str, Survival]) -> float | None:
    return sum(survived.values(), Survival()).share
