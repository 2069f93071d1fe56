"""Shared fixtures. Access to the model hub is switched off."""

from __future__ import annotations

import gc
import os
import signal
import threading

os.environ["HF_HUB_OFFLINE"] = "1"
# A shell without job control starts its background processes with this signal ignored, and they pass that on.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Many threads share few cores in tests, so waiting threads must not spin. Takes effect only before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# As in actors, whose first product of matrices may be that of another test here.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# No merge finds what another one computed, unless a test says so.
os.environ["EXPERT_MERGING_RUN_CACHE"] = "off"

from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path

import hostile
import object_store
import pytest
import tiny
import torch
from object_store import Store
from warm_processes import warm_server

import actors.process
from engine.config.reader import load_config
from engine.planning.plan import Plan
from engine.planning.planner import make_plan
from engine.task_vectors import pieces, sums

# While tests are collected, all objects stay. Looking for garbage among them takes a tenth of the time of the imports.
gc.disable()
# Seconds. A test that waits this long has found a deadlock.
LONG = 30


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Let the garbage collector run, and pass over what was imported."""
    gc.freeze()
    gc.enable()


def plan_of(config: Path, *overrides: str) -> Plan:
    return make_plan(load_config(config, overrides), config.parent)


def cut_small(monkeypatch: pytest.MonkeyPatch, block: int, piece: int) -> None:
    """Set the maximum elements of a block and of a piece, so that small tensors have several."""
    for module in (pieces, sums):
        monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(pieces, "PIECE", piece)
    # A thread's buffers are allocated at first use, with the size set at that time.
    monkeypatch.setattr(sums, "_threads", sums._PerThread())


def begun(call: Callable[[], object]) -> Future[object]:
    """Start the call in a thread, give it time to finish or to block, and return its future."""
    future = Future[object]()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised by future.result()
            future.set_exception(error)

    # A daemon, so that a call that never ends fails its test only.
    threading.Thread(target=run, daemon=True).start()
    wait([future], timeout=0.05)
    return future


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Limit torch to one thread: tiny models gain nothing from a second one, and wait for it on a busy machine."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(actors.process, "usable_cpus", lambda: 1)
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama_merge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """merge.yaml of two full Llama experts. Read-only."""
    return tiny.make_merge(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def make_merge(tmp_path: Path) -> Callable[..., Path]:
    """`tiny.make_merge` into a temporary folder of the test."""
    return lambda **options: tiny.make_merge(tmp_path / "merge", **options)


@pytest.fixture(scope="session")
def forks() -> Iterator[dict[str, str]]:
    with warm_server() as environment:
        yield environment


@pytest.fixture(scope="module")
def warm(forks: dict[str, str]) -> Iterator[None]:
    """The processes of merges that the module's tests start are forked from a server, see `warm_processes`."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in forks.items():
            monkeypatch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def warm_libraries() -> Iterator[None]:
    """Like `warm`, but each process imports the engine that was shipped to it with a job."""
    with warm_server(engine=False) as environment, pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield


@contextmanager
def local_ray(gpus: int | None = None) -> Iterator[None]:
    """A local Ray with two CPUs and as many GPUs as declared; None: those that Ray finds."""
    import ray

    from cluster.session import ENVIRONMENT

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=gpus,
            include_dashboard=False,
            object_store_memory=120 << 20,
            log_to_driver=False,
            logging_level="error",
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def small_ray(warm: None) -> Iterator[None]:
    """A local Ray with two CPUs, shared by the tests of a module."""
    with local_ray():
        yield


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """URL of an S3 server, shared by all tests of a process."""
    with object_store.serving() as url:
        yield url


@pytest.fixture
def store(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """A new bucket of the server, and an empty cache."""
    return object_store.new_store(server, monkeypatch, tmp_path / "cache")


@pytest.fixture(scope="session")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hostile.Server]:
    """The command line, in a process that forks for each command."""
    with hostile.server(tmp_path_factory.mktemp("home")) as started:
        yield started


@pytest.fixture(scope="session")
def merger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hostile.Server]:
    """Like `planner`, with the modules of a merge imported before the fork. A command fails if it starts Ray."""
    with hostile.server(tmp_path_factory.mktemp("home"), prepared=True) as started:
        yield started
