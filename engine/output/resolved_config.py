"""The config with all defaults and absolute paths, as an output stores it, and the versions of the software."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from engine import __version__
from engine.config.mergekit_yaml import as_yaml
from engine.config.schema import CalibrationFile, Config, ExpertConfig
from engine.planning.plan import ExpertPlan, Plan
from engine.storage.paths import is_uri

PACKAGES = ("torch", "transformers", "ray", "safetensors", "numpy", "numba")


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the packages that compute the result."""
    packages = {package: version(package) for package in PACKAGES}
    return {"python": platform.python_version(), "expert-merging": __version__, **packages}


def resolved_config(plan: Plan) -> dict[str, Any]:
    """Return the keys of the config with every default filled in and every path absolute: it runs from any folder."""
    return as_yaml(resolved(plan))


def resolved(plan: Plan) -> Config:
    """Return the config with every path absolute."""
    paths = {"base_model": plan.base.model, "models": []}
    experts = [
        given.model_copy(
            update={
                "model": expert.model if expert.adapter is None else f"{expert.model}+{expert.adapter.model}",
                "calibration": located(given, expert),
            }
        )
        for given, expert in zip(plan.config.models, plan.experts, strict=True)
    ]
    tokenizer = {"tokenizer_source": plan.tokenizer} if plan.tokenizer else {}
    return plan.config.model_copy(update=paths | {"models": tuple(experts)} | tokenizer)


def located(given: ExpertConfig, expert: ExpertPlan) -> tuple[CalibrationFile, ...]:
    """Return the calibration files of an expert with absolute paths or URIs; none for a weight-space method."""
    pairs = zip(given.calibration, expert.calibration, strict=False)
    return tuple(file if is_uri(file.path) else file.model_copy(update={"path": str(path)}) for file, path in pairs)
