"""Seats on a real Ray whose node has four GPUs by declaration: what an actor is given, and what it computes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from cluster_helpers import run_merge
from conftest import local_ray, plan_of
from errors import refused

import cluster.crew
from actors.expert import Expert
from actors.gpus import Gpus
from actors.process import guarded
from actors.shard import Shard
from actors.trainer import Trainer
from cluster.crew import Crew
from cluster.ray_watch import RayWatch
from cluster.seats import Seat, Seating
from engine.errors import ClusterError
from engine.planning.plan import Plan
from engine.run.run_folder import RunFolder

GPUS = 4


@pytest.fixture(scope="module")
def gpu_ray(warm: None) -> Iterator[None]:
    """A local Ray of two CPUs with as many GPUs as declared; torch sees none of them."""
    with local_ray(GPUS):
        yield


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("gpu_ray")]


def seated_class() -> type:
    # A class of a function is pickled by value: the workers do not import this file.
    class Seated:
        """An actor that tells what it was given. `seen`: the number of GPUs that torch is to see in its process."""

        def __init__(self, plan: Plan, gpus: Gpus) -> None:
            self.gpus = gpus

        def given(self) -> tuple[float, list[str]]:
            return self.gpus.number, sorted(map(str, self.gpus.ids))

        def devices(self, seen: int, visible: str | None) -> list[str]:
            import os

            import torch

            if visible is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible
            torch.cuda.is_available = lambda: seen > 0  # type: ignore[assignment]
            torch.cuda.device_count = lambda: seen  # type: ignore[assignment]
            return [str(device) for device in self.gpus.devices()]

        def visible(self) -> str | None:
            import os

            return os.environ.get("CUDA_VISIBLE_DEVICES")

    return Seated


@pytest.fixture
def crew(llama_merge: Path, tmp_path: Path) -> Iterator[Crew]:
    plan, run = plan_of(llama_merge), RunFolder(str(tmp_path / "out"))
    run.keep_plan(plan)
    node = ray.nodes()[0]["NodeID"]
    reserved = Seat(node, 0.1, GPUS)
    with Crew(plan, run.state, Seating((), reserved, home=reserved), RayWatch(print)) as started:
        yield started


def seated(crew: Crew, number: float) -> Any:
    """An actor in a part of the reserved seat."""
    assert crew.layout.home is not None
    seat = Seat(crew.layout.home.node, 0.01, number)
    return crew._spawn(seated_class(), "an actor", seat, 0, lambda plan, _: (plan,))


@pytest.mark.parametrize(("number", "shown"), [(0, 0), (0.25, 1), (1, 1), (2, 2)])
def test_an_actor_computes_on_the_gpus_of_its_seat(crew: Crew, number: float, shown: int) -> None:
    actor = seated(crew, number)
    given, ids = ray.get(actor.given.remote())
    assert (given, len(ids)) == (number, shown)
    expected = [f"cuda:{place}" for place in range(shown)] or ["cpu"]
    assert ray.get(actor.devices.remote(shown, None)) == expected
    # Where nothing hides the other GPUs, the ids of Ray are positions among all of them.
    expected = [f"cuda:{place}" for place in map(int, ids)] or ["cpu"]
    assert ray.get(actor.devices.remote(GPUS, "0,1,2,3")) == expected


def test_actors_of_several_seats_have_different_gpus(crew: Crew) -> None:
    actors = [seated(crew, number) for number in (1, 2, 0.5, 0.5)]
    found = [ray.get(actor.devices.remote(GPUS, "0,1,2,3")) for actor in actors]
    assert found[2] == found[3] and len({*found[0], *found[1], *found[2]}) == GPUS


def test_ray_hides_the_gpus_from_an_actor_without_any(crew: Crew) -> None:
    assert ray.get(seated(crew, 0).visible.remote()) == ""


def test_ray_refuses_the_fractions_that_the_config_refuses(crew: Crew) -> None:
    with pytest.raises(ValueError, match=r"1\.5"):
        seated(crew, 1.5)


def test_a_merge_whose_gpus_torch_does_not_see_ends_before_it_computes(llama_merge: Path, tmp_path: Path) -> None:
    with refused(ClusterError, do="num_gpus", facts=[torch.__version__]):
        run_merge(plan_of(llama_merge), tmp_path / "merged")
    assert not (tmp_path / "merged.run").exists(), "nothing was computed"


# Merges whose actors have GPUs of Ray and compute on the CPU.


def on_cpu(kind: type, fails: str = "", error: str = "", share: float = 1.0, once: str = "") -> type:
    """A class of actors that have `share` of the memory they need on each GPU.

    The method `fails` raises `error`, a class of torch; with a path `once`, only while no file is there.
    """

    def start(self: Any, *arguments: Any, gpus: Gpus) -> None:
        self.count = gpus.number
        kind.__init__(self, *arguments)  # type: ignore[misc]

    def ready(self: Any, wanted: float) -> tuple[int, ...]:
        return (int(share * wanted) + 1,) * int(self.count)

    def failing(self: Any, *arguments: Any) -> Any:
        from pathlib import Path

        import torch

        if error and not (once and Path(once).exists()):
            self._process.settled = True
            torch.cuda.memory_allocated = lambda device: 0  # type: ignore[assignment]
            torch.cuda.mem_get_info = lambda device: (0, 0)  # type: ignore[assignment]
            if once:
                Path(once).touch()
            raise getattr(torch, error)("CUDA error: an illegal memory access" if once else "CUDA out of memory.")
        return getattr(kind, fails).__wrapped__(self, *arguments)

    methods = {"__init__": start, "ready": ready}
    if fails:
        methods[fails] = guarded(failing)
    return type(kind.__name__, (kind,), methods)


def test_automatic_actors_get_the_gpus_that_they_need(
    llama_merge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster.crew, "Trainer", on_cpu(Trainer, share=0.6))
    monkeypatch.setattr(cluster.crew, "Expert", on_cpu(Expert))
    monkeypatch.setattr(cluster.crew, "Shard", on_cpu(Shard))
    merged = run_merge(plan_of(llama_merge, "parameters.epochs=1"), tmp_path / "merged")
    devices = yaml.safe_load((merged / "merge" / "config.yaml").read_text())["record"]["devices"]
    assert (devices["trainer"], devices["expert"]) == (2, 1)
    assert "2 GPUs" in "".join(capsys.readouterr())


def test_memory_that_runs_out_in_a_step_ends_in_advice(
    llama_merge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.crew, "Trainer", on_cpu(Trainer, "step", "OutOfMemoryError"))
    monkeypatch.setattr(cluster.crew, "Expert", on_cpu(Expert))
    monkeypatch.setattr(cluster.crew, "Shard", on_cpu(Shard))
    with refused(ClusterError, "trainer", "cluster.trainer.num_gpus", facts=["CUDA"]) as failed:
        run_merge(plan_of(llama_merge), tmp_path / "merged")
    assert failed.value.exit_code == 3


def test_an_actor_whose_gpu_fails_is_restarted(
    llama_merge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = tmp_path / "failed"
    monkeypatch.setattr(cluster.crew, "Trainer", on_cpu(Trainer))
    monkeypatch.setattr(cluster.crew, "Expert", on_cpu(Expert, "target", "AcceleratorError", once=str(failed)))
    monkeypatch.setattr(cluster.crew, "Shard", on_cpu(Shard))
    merged = run_merge(plan_of(llama_merge, "parameters.epochs=1"), tmp_path / "merged")
    assert failed.exists() and (merged / "merge" / "coefficients.parquet").exists()
