"""The Ray layer: the driver of a merge, the placement of its actors, and the communication between them.

`from cluster import merge, plan, evaluate, report` is the interface for Python; see `cluster.api`.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.api import evaluate, merge, plan, report

__all__ = ["evaluate", "merge", "plan", "report"]

# Under `uv run`, Ray would by default upload the working directory, models included, as a runtime environment of its
# workers. It reads the variable when it is imported. All nodes have the packages already, or a job installs them.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


def __getattr__(name: str) -> Any:
    """Return a function of the interface, whose imports a process that only imports the package does without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cluster import api

    return getattr(api, name)
