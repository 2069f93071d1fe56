"""The connection to Ray: which runtime environments Ray builds, and what happens if it cannot build one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from errors import refused
from ray.exceptions import RuntimeEnvSetupError

import cluster.session
from engine.errors import ClusterError


@pytest.mark.parametrize(("given", "enabled"), [(None, "False"), ("1", "True")])
def test_uv_run_does_not_make_ray_upload_the_working_directory(given: str | None, enabled: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ENABLE_UV_RUN_RUNTIME_ENV"}
    environment |= {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": given} if given else {}
    code = "import cluster, ray._private.ray_constants as constants; print(constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV)"
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == enabled


@pytest.mark.parametrize("address", [None, "auto"])
def test_a_runtime_environment_that_ray_cannot_build_is_an_error_of_the_cluster(
    monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    def init(**options: Any) -> None:
        raise RuntimeEnvSetupError("the package has 620 MiB")

    monkeypatch.setattr(cluster.session.ray, "init", init)
    with (
        refused(ClusterError, do="RAY_ENABLE_UV_RUN_RUNTIME_ENV", facts=["620 MiB"]),
        cluster.session.connect(address),
    ):
        pass
