"""Fixtures that many tests share. Nothing here may reach a model hub."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny

from engine.config import load_config
from engine.plan import Plan, make_plan


def plan_of(config: Path, *overrides: str) -> Plan:
    return make_plan(load_config(config, overrides), config.parent)


@pytest.fixture(scope="session")
def llama_merge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """merge.yaml of two full Llama experts; read only."""
    return tiny.make_merge(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def make_merge(tmp_path: Path) -> Callable[..., Path]:
    """`tiny.make_merge` into a folder of the test's own."""
    return lambda **options: tiny.make_merge(tmp_path / "merge", **options)


@pytest.fixture(scope="module")
def small_ray() -> Iterator[None]:
    """A Ray of this module's own on two CPUs."""
    import ray

    from cluster.session import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=120 << 20,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()
