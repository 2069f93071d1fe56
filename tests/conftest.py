"""Fixtures that many tests share. Nothing here may reach a model hub."""

from __future__ import annotations

import os
import threading

os.environ["HF_HUB_OFFLINE"] = "1"
# Several processes of several threads share few cores here: those that wait must not spin. Before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path

import hostile
import object_store
import pytest
import tiny
import torch
from object_store import Store

import actors.process
from engine.config.reader import load_config
from engine.planning.plan import Plan
from engine.planning.planner import make_plan
from engine.task_vectors import pieces, sums

# Seconds. Nothing takes as long; a test that waits for it has found a deadlock.
LONG = 30


def plan_of(config: Path, *overrides: str) -> Plan:
    return make_plan(load_config(config, overrides), config.parent)


def cut_small(monkeypatch: pytest.MonkeyPatch, block: int, piece: int) -> None:
    """Give small tensors several blocks and pieces, of so many elements at most."""
    for module in (pieces, sums):
        monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(pieces, "PIECE", piece)
    # A thread's buffers are made at its first use, of the size that holds then.
    monkeypatch.setattr(sums, "_threads", sums._PerThread())


def begun(call: Callable[[], object]) -> Future[object]:
    """The call in a thread of its own, which has had time to come to its end or to where it must wait."""
    future = Future[object]()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            future.set_exception(error)

    # A daemon: should it never end, the test fails and the tests go on.
    threading.Thread(target=run, daemon=True).start()
    wait([future], timeout=0.05)
    return future


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Operations of tiny models gain nothing from a second thread, and wait long for it on a busy machine."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(actors.process, "usable_cpus", lambda: 1)
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(before)


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


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Where a server of object storage of this module's own answers."""
    with object_store.serving() as url:
        yield url


@pytest.fixture
def store(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """A bucket of it, and a cache of what is read from there."""
    return object_store.new_store(server, monkeypatch, tmp_path / "cache")


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hostile.Server]:
    """The command line in a process that is forked for each command."""
    with hostile.server(tmp_path_factory.mktemp("home")) as started:
        yield started


@pytest.fixture(scope="module")
def merger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hostile.Server]:
    """The same, which has imported what a merge imports, and in which Ray may not start."""
    with hostile.server(tmp_path_factory.mktemp("home"), prepared=True) as started:
        yield started
