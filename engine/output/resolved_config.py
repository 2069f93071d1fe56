"""The config with all defaults and absolute paths, as an output stores it, and the versions of the software."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from engine import __version__
from engine.config.mergekit_yaml import as_yaml
from engine.planning.plan import Plan

PACKAGES = ("torch", "transformers", "ray", "safetensors", "numpy", "numba")


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the packages that compute the result."""
    packages = {package: version(package) for package in PACKAGES}
    return {"python": platform.python_version(), "expert-merging": __version__, **packages}


def resolved_config(plan: Plan) -> dict[str, Any]:
    """Return the keys of the config with every default filled in and every path absolute: it runs from any folder."""
    return as_yaml(plan.resolved)
