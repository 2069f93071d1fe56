"""The Ray layer: the driver of a merge, the placement of its actors, and the communication between them."""

import os

# Under `uv run`, Ray would by default upload the working directory, models included, as a runtime environment of its
# workers. It reads the variable when it is imported. All nodes have the packages already, or a job installs them.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
