"""The identity of a merge: a digest of everything that decides its result."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from engine.planning.open_models import weight_files
from engine.planning.plan import ModelPlan, Plan
from engine.storage.local_folder import digest

# Keys of the config that do not influence the bits of the result.
UNDECIDING: dict[str, Any] = dict.fromkeys(("cluster", "record", "unused", "log_with", "log_dir"), True) | {
    "calibration": {"image_folder"}
}


def identity(plan: Plan) -> str:
    """Return the SHA-256 digest of everything that decides the result: the config and the input files.

    The config counts without the keys in UNDECIDING. Weight files count by name, size and modification time,
    calibration files and their images by their bytes.
    """
    models: list[ModelPlan] = [plan.base, *plan.experts, *([plan.rows] if plan.rows else [])]
    files = [(model.model, file.path) for model in models for file in weight_files(model)]
    facts = {
        "config": plan.config.model_dump(exclude=UNDECIDING, mode="json"),
        "images": [digest(Path(image)) for images in plan.images for image in images],
        # By the model's name in the config: a cached copy has another path on another machine.
        "weights": [(model, file.name, file.stat().st_size, file.stat().st_mtime_ns) for model, file in files],
        "calibration": [digest(path) for expert in plan.experts for path in expert.calibration],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
