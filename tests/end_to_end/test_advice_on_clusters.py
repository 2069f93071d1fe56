"""Advice about nodes, trackers and failures of actors is right: followed, the merge gets what it needs."""

from __future__ import annotations

import importlib
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from advice import Advice, begins, found, refusal
from click.testing import CliRunner
from conftest import plan_of
from ray.exceptions import ActorDiedError, OutOfDiskError, OutOfMemoryError, RayTaskError

import cli
import cluster.ray_watch
import cluster.session
import cluster.telemetry
import cluster.watch
from cluster.commands.common import guarded
from cluster.placement import Devices, arrange, check_memory, lay_out, lay_out_shards, machines
from cluster.ray_watch import RayWatch
from cluster.seats import KIND, Node
from cluster.telemetry import Telemetry, check_trackers
from cluster.watch import until_done
from engine.config.schema import TRACKERS, Config
from engine.errors import MergeError
from engine.planning.costs.patience import patience
from engine.planning.costs.scaling import Machines, Work, choose
from engine.planning.plan import Plan

ADVICE = Advice(
    __name__,
    elsewhere={
        "Ray cannot build a runtime environment": "test_what_makes_ray_build_an_environment_is_unset",
        "{self._do(role, min(free))}": "test_every_setting_suffices_alone_or_all_together in test_fitting.py",
        "{self._do(role, now - 1)}": "test_an_actor_that_ran_out_of_memory_is_told_what_needs_less",
    },
)
WORK = Work(tokens=10, samples=8, steps=4, passes=1, pass_tokens=40)


def test_every_advice_is_followed_or_has_a_reason() -> None:
    ADVICE.check()


@pytest.fixture
def plan(llama_merge: Path) -> Plan:
    return plan_of(llama_merge)


# Nodes


def labelled(number: int, cpus: float, gpus: float, **labels: str) -> Node:
    return Node(cpus, gpus, 1e10, f"n{number}", labels)


SMALL, LARGE = labelled(0, 8, 2, zone="a"), labelled(1, 8, 4, zone="b", pool="large")


@ADVICE.followed("no node fits the {role}")
@pytest.mark.parametrize(
    ("spoil", "change", "more"),
    [
        ("cluster.trainer.num_gpus=4", "2", LARGE),
        ("cluster.expert.num_gpus=4", "2", LARGE),
        ("cluster.labels={zone: b}", "{zone: a}", LARGE),
        ("cluster.trainer.labels={pool: large}", "{}", LARGE),
    ],
)
def test_nodes_are_added_or_the_key_of_the_advice_is_changed(
    llama_merge: Path, spoil: str, change: str, more: Node
) -> None:
    def place(nodes: list[Node], override: str) -> None:
        plan = plan_of(llama_merge, override)
        lay_out(nodes, plan, Devices.of(nodes, plan.config))

    error = refusal(lambda: place([SMALL], spoil))
    assert error.do.startswith("add such nodes")
    place([SMALL, more], spoil)
    keys = re.findall("`(.+?)`", error.do)
    assert spoil.partition("=")[0] in keys
    place([SMALL], f"{spoil.partition('=')[0]}={change}")


def test_a_node_with_cpus_is_added(plan: Plan) -> None:
    error = refusal(lambda: lay_out_shards([Node(0, 0, id="head")], plan))
    assert error.do == "add such nodes"
    lay_out_shards([Node(0, 0, id="head"), SMALL], plan)


def test_a_run_that_keeps_its_number_of_gpus_is_begun_again(llama_merge: Path) -> None:
    """Its state keeps the numbers, so that lowering one in the config changes nothing."""
    began = Devices.of([LARGE], plan_of(llama_merge, "cluster.trainer.num_gpus=4").config)
    lowered = plan_of(llama_merge, "cluster.trainer.num_gpus=2")
    error = refusal(lambda: lay_out([SMALL], lowered, began))
    assert "--fresh" in error.do and "num_gpus" not in error.do
    lay_out([SMALL], lowered, Devices.of([SMALL], lowered.config))


@ADVICE.followed("the run began on GPUs of type")
def test_gpus_of_the_type_of_the_run_are_added_or_it_is_begun_again(plan: Plan) -> None:
    def node(number: int, kind: str) -> Node:
        return Node(8, 1, 1e10, f"n{number}", {KIND: kind})

    began = Devices.of([node(0, "H100")], plan.config)
    later = [node(1, "A100")]
    error = refusal(lambda: began.among(later))
    assert "add nodes" in error.do and "--fresh" in error.do
    more = [*later, node(2, "H100")]
    seats = arrange(began.among(more), plan, WORK, began)
    assert seats.trainer is not None and seats.trainer.node == "n2"
    anew = Devices.of(later, plan.config)
    arrange(anew.among(later), plan, WORK, anew)


@ADVICE.followed("the merged weights and their gradient take")
def test_the_weights_fit_with_each_option_of_the_advice(monkeypatch: pytest.MonkeyPatch, llama_merge: Path) -> None:
    monkeypatch.setattr("engine.planning.costs.scaling.WINDOW_BYTES", 1000)  # smaller than the gradient of a tiny model

    def check(memory: float, *overrides: str) -> None:
        check_memory([Node(8, 0, memory, "n0")], plan_of(llama_merge, *overrides), WORK, Devices(0, 0))

    plan = plan_of(llama_merge)
    needed = choose(plan, WORK, machines([SMALL], plan.config, Devices(0, 0))).memory.model
    error = refusal(lambda: check(needed - 1))
    options = re.findall("`(.+?: .+?)`", error.do)
    assert len(options) == 2
    overrides = [option.replace(": ", "=") for option in options]
    for override in overrides:
        check(needed - 1, override)
    assert "larger node" in error.do
    check(needed)
    last = refusal(lambda: check(1, *overrides))
    assert not any(option in last.do for option in options), "both are set already"


# Trackers


def config(*log_with: str, **keys: Any) -> Config:
    models = [{"model": "expert", "calibration": "expert.jsonl"}]
    given = {"merge_method": "expert_merging", "base_model": "base", "models": models, "log_with": log_with, **keys}
    return Config.model_validate(given)


@ADVICE.followed("not installed: ")
@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_is_installed_or_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """Each package is a name with metadata, as accelerate looks for it."""

    def available() -> list[str]:
        importlib.invalidate_caches()
        return [one for one in TRACKERS if getattr(accelerate.utils.imports, f"is_{one}_available")()]

    monkeypatch.setattr(cluster.telemetry, "get_available_trackers", available)
    if name not in available():
        for package in found("`pip install (.+?)`", refusal(lambda: check_trackers(config(name), "out")))[1].split():
            (tmp_path / package).mkdir()
            (tmp_path / package / "__init__.py").touch()
            (tmp_path / f"{package}-1.0.dist-info").mkdir()
            (tmp_path / f"{package}-1.0.dist-info" / "METADATA").write_text(f"Name: {package}\nVersion: 1.0\n")
        monkeypatch.syspath_prepend(tmp_path)
    check_trackers(config(name), "out")
    check_trackers(config(), "out")


@ADVICE.followed("set `log_dir` to a folder that is kept")
@pytest.mark.usefixtures("gauges")
def test_files_of_a_tracker_are_in_the_folder_that_is_set(tmp_path: Path) -> None:
    error = refusal(lambda: check_trackers(config("tensorboard"), "s3://bucket/out"))
    set_one = config("tensorboard", **{found("set `(.+?)`", error)[1]: str(tmp_path / "logs")})
    check_trackers(set_one, "s3://bucket/out")
    with Telemetry("run", set_one, "s3://bucket/out") as telemetry:
        telemetry.phase_seconds("targets", 1.0)
    assert any(path.is_file() for path in (tmp_path / "logs").rglob("*"))


@pytest.fixture
def gauges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gauges that nobody reads."""
    monkeypatch.setattr(cluster.telemetry, "Gauge", lambda *about: SimpleNamespace(set=lambda value, tags: None))


class Tracker:
    """A tracker of which one method fails."""

    fails = ""

    def __init__(self, project: str, **options: Any) -> None:
        self.logged: list[dict[str, float]] = []

    def _call(self, name: str) -> None:
        if name == self.fails:
            raise TimeoutError(name)

    def start(self) -> None:
        self._call("start")

    def log(self, values: dict[str, float], step: int) -> None:
        self._call("log")

    def finish(self) -> None:
        self._call("finish")


@ADVICE.followed("the tracker {name} failed")
@pytest.mark.usefixtures("gauges")
@pytest.mark.parametrize(
    ("fails", "advice"),
    [
        ("start", "fix the cause, or remove the tracker from log_with"),
        ("log", "run the same command to resume, without the tracker if it fails again"),
        ("finish", "check the tracker"),
    ],
)
def test_a_merge_goes_on_without_a_tracker_that_fails(
    monkeypatch: pytest.MonkeyPatch, llama_merge: Path, tmp_path: Path, fails: str, advice: str
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Tracker)

    def run(plan: Plan) -> None:
        with Telemetry("run", plan.config, "out") as telemetry:
            telemetry.phase_seconds("targets", 1.0)

    monkeypatch.setattr(Tracker, "fails", fails)
    before, after = plan_of(llama_merge, "log_with=wandb"), plan_of(llama_merge)
    error = refusal(lambda: run(before))
    assert advice in error.do
    run(after)
    begins(tmp_path / "out", before, error, after)
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "fails", "")
        run(before)


# Failures of actors


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Return a function that waits for an actor that fails with an error of Ray."""

    def wait(error: Exception) -> None:
        def get(reference: str) -> None:
            raise error

        fake = SimpleNamespace(wait=lambda references, **options: (references[:1], []), get=get, nodes=list)
        monkeypatch.setattr(cluster.ray_watch, "ray", fake)
        RayWatch(print).answer("reference", "merging")

    return wait


@ADVICE.followed("an actor failed while {what}")
def test_with_debug_the_place_in_the_actor_is_shown(failing: Callable[[Exception], None]) -> None:
    def run() -> None:
        failing(RayTaskError("step", "File shard.py, line 7", KeyError("x")))

    option = found("run with (--debug)", refusal(run))[1]
    assert option in {name for parameter in cli.merge.params for name in parameter.opts}
    with pytest.raises(MergeError) as shown:
        guarded(run, debug=True)
    assert "File shard.py, line 7" in "".join(traceback.format_exception(shown.value))


@ADVICE.followed("an actor died while {what}")
def test_with_debug_an_actor_prints_to_the_terminal(
    failing: Callable[[Exception], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    option = found("run with --(debug)", refusal(lambda: failing(ActorDiedError())))[1]
    shown: list[bool] = []
    monkeypatch.setattr(cluster.session, "_check_machine", lambda: None)
    monkeypatch.setattr(cluster.session, "_say_if_slow", lambda say: None)
    monkeypatch.setattr(cluster.session.ray, "init", lambda log_to_driver, **options: shown.append(log_to_driver))
    with cluster.session.connect(None, **{option: True}):
        pass
    assert shown == [True]


@ADVICE.followed("the disk to which Ray's object store spills is full")
def test_ray_starts_with_the_options_of_the_advice(failing: Callable[[Exception], None]) -> None:
    from ray.scripts.scripts import start

    options = set(re.findall(r"--[\w-]+", refusal(lambda: failing(OutOfDiskError())).do))
    assert len(options) == 2
    assert options <= {name for parameter in start.params for name in parameter.opts}


@ADVICE.followed("a node ran out of memory")
def test_plan_shows_the_memory_of_each_process(
    failing: Callable[[Exception], None], llama_merge: Path, plan: Plan
) -> None:
    command = found("see `(.+?)` for the memory per process", refusal(lambda: failing(OutOfMemoryError("killed"))))[1]
    done = CliRunner().invoke(cli.main, [command, str(llama_merge)])
    assert done.exit_code == 0, done.output
    for role in ("trainer", "expert", "shard"):
        assert re.search(rf"{role} memory .*\d GB", done.output)
    small, large = Node(8, 0, 1e9, "n0"), Node(64, 0, 1e12, "n1")
    began = Devices.of([small], plan.config)
    assert arrange(began.among([large]), plan, WORK, began).threads == 8


@ADVICE.followed("attempts in a row made no progress")
def test_a_run_whose_machines_are_slow_is_given_more_time(
    monkeypatch: pytest.MonkeyPatch, llama_merge: Path, tmp_path: Path
) -> None:
    """A result comes after 5,000 s, in steps of 5 s."""
    before, now = plan_of(llama_merge), 0.0

    def attempt(plan: Plan) -> str:
        began = now

        def wait(references: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
            nonlocal now
            now += 5 if timeout else 0
            return (references[:1], []) if now - began > 5000 else ([], references)

        fake = SimpleNamespace(wait=wait, get=lambda reference: "done", nodes=list)
        monkeypatch.setattr(cluster.ray_watch, "ray", fake)
        bound = patience(plan, Machines(1, 8, 0, None), 1, WORK)
        answer: str = RayWatch(lambda line: None, bound).answer("reference", "waiting")
        return answer

    monkeypatch.setattr(cluster.watch, "time", SimpleNamespace(monotonic=lambda: now))
    error = refusal(lambda: until_done(lambda: attempt(before), lambda: "here", print))
    seconds = re.search(r"no result for (\d+) s", error.what)
    assert seconds is not None
    after = plan_of(llama_merge, f"{found('raise `(.+?)`', error)[1]}={10 * int(seconds[1])}")
    assert until_done(lambda: attempt(after), lambda: "here", print) == "done"
    begins(tmp_path / "out", before, error, after)
