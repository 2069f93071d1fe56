"""What a run takes from a cache and keeps there, with files of any content."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import plan_of
from identities import ON_CPU

from engine.calibration.records import Record
from engine.calibration.samples import Sample
from engine.planning.plan import Plan
from engine.run.inputs import identity
from engine.run.keys import Computing, Keys
from engine.run.run_folder import RunFolder, open_run
from engine.run.state import StageState
from engine.storage.local_folder import digest
from engine.storage.sealed import write_sealed

SAMPLES = [[Sample(0, 0, (5, 6), "a:1"), Sample(0, 1, (7, 8), "a:2")], [Sample(1, 0, (5, 6), "b:1")]]
TARGETS = {f"targets/{name}.safetensors" for name in ("0-0", "0-1", "1-0")}
ON = Computing(ON_CPU, ())
STEPS = [f"{number:064x}" for number in range(10)]


@pytest.fixture
def plan(llama_merge: Path, tmp_path: Path) -> Plan:
    return plan_of(llama_merge, f"cache={tmp_path / 'cache'}")


@pytest.fixture
def begin(plan: Plan, tmp_path: Path) -> Iterator[Callable[..., tuple[RunFolder, Keys]]]:
    """Begin a run with a new output, which ends with the test, and return its keys as well."""
    with ExitStack() as runs:

        def begin(name: str, plan: Plan = plan) -> tuple[RunFolder, Keys]:
            now = identity(plan)
            known = now.with_digests({name: digest(file.path) for name, file in now.files.items()})
            run = runs.enter_context(open_run(str(tmp_path / name), known, fresh=False))
            run.share(plan.config)
            return run, Keys(plan, run.identity)

        yield begin


def compute(run: RunFolder, names: Sequence[str] = sorted(TARGETS)) -> None:
    for name in names:
        write_sealed(run.state, name, f"the target {name}".encode())


def take_steps(run: RunFolder, count: int) -> dict[int, StageState]:
    states = {}
    for steps in range(1, count + 1):
        states[steps] = StageState(steps, {"a": torch.tensor([float(steps)])})
        run.save_stage(1, states[steps], [{"step": steps, "kl": 0.5}])
    return states


def test_another_run_has_the_targets_and_has_computed_nothing(begin: Callable[..., tuple[RunFolder, Keys]]) -> None:
    run, keys = begin("one")
    compute(run)
    run.reuse.keep(keys, SAMPLES, ON)
    other, its = begin("other")
    other.reuse.bring(its, SAMPLES, ON)
    assert other.stored_targets() == TARGETS
    assert {name: other.state.read(name) for name in TARGETS} == {name: run.state.read(name) for name in TARGETS}
    assert other.reuse.counts == {"targets": 3}
    # Nothing is lost if it ends now, and other devices may still be chosen for it.
    assert run.computed() and not other.computed()
    other.forget(["targets/0-0.safetensors"], "computed again")
    compute(other, ["targets/0-0.safetensors"])
    assert not other.computed(), "only what is in no cache counts"
    take_steps(other, 1)
    assert other.computed()


def test_an_expert_more_needs_its_own_targets_alone(begin: Callable[..., tuple[RunFolder, Keys]], plan: Plan) -> None:
    fewer = replace(plan, config=plan.config.model_copy(update={"models": plan.config.models[:1]}))
    run, keys = begin("one", replace(fewer, experts=plan.experts[:1]))
    compute(run, [name for name in TARGETS if "/0-" in name])
    run.reuse.keep(keys, SAMPLES[:1], ON)
    other, its = begin("other")
    other.reuse.bring(its, SAMPLES, ON)
    assert other.stored_targets() == {name for name in TARGETS if "/0-" in name}


def test_prepared_samples_get_the_loss_weights_of_this_merge(begin: Callable[..., tuple[RunFolder, Keys]]) -> None:
    with_pixels = [[replace(SAMPLES[0][0], inputs=True), SAMPLES[0][1]], SAMPLES[1]]
    run, keys = begin("one")
    compute(run, ["inputs/0-0.safetensors"])
    run.reuse.keep(keys, with_pixels, ON)
    other, its = begin("other")
    records = [[Record(f"moved:{i}", {}, 0.25) for i in range(len(mine))] for mine in SAMPLES]
    wanted = [
        [replace(sample, where=f"moved:{i}", loss_weight=0.25) for i, sample in enumerate(mine)] for mine in with_pixels
    ]
    assert other.reuse.samples(its, records) == wanted
    assert other.state.read("inputs/0-0.safetensors") == run.state.read("inputs/0-0.safetensors")
    assert other.reuse.samples(its, [[*records[0], records[0][0]], records[1]]) == [None, wanted[1]]


def test_a_stage_goes_on_from_the_most_steps_of_which_all_metrics_are_there(
    begin: Callable[..., tuple[RunFolder, Keys]], tmp_path: Path
) -> None:
    run, _ = begin("one")
    states = take_steps(run, 4)
    run.reuse.keep_steps(1, STEPS[:4], {2: states[2], 4: states[4]})

    def taken(name: str, keys: Sequence[str]) -> int:
        other, _ = begin(name)
        other.reuse.bring_steps(1, keys)
        state = other.load_stage(1)
        assert state is None or len(other.metrics()) == state.steps
        return state.steps if state is not None else 0

    assert taken("longer", STEPS) == 4
    assert taken("shorter", STEPS[:3]) == 2
    assert taken("another", [*STEPS[:3], STEPS[9], STEPS[4]]) == 2
    assert taken("none", STEPS[5:]) == 0
    for entry in (tmp_path / "cache" / "metrics").glob(f"{STEPS[2]}-*"):
        entry.unlink()
    assert taken("without metrics", STEPS) == 2


def test_a_run_goes_on_without_a_cache_that_fails(begin: Callable[..., tuple[RunFolder, Keys]], tmp_path: Path) -> None:
    run, keys = begin("one")
    compute(run)
    said: list[str] = []
    run.say = said.append
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("mine")
    run.reuse.keep(keys, SAMPLES, ON)
    run.reuse.bring(keys, SAMPLES, ON)
    run.reuse.trim()
    assert len(said) == 1 and not run.reuse.on
    assert (tmp_path / "cache").read_text() == "mine" and run.stored_targets() == TARGETS


def test_weights_that_were_hashed_are_known_until_they_change(make_merge: Callable[..., Path], tmp_path: Path) -> None:
    config = make_merge()
    plan = plan_of(config, f"cache={tmp_path / 'cache'}")
    weights = config.parent / "expert0" / "model.safetensors"
    with open_run(str(tmp_path / "one"), identity(plan), fresh=False) as run:
        run.share(plan.config)
        known = run.identity.with_digests({str(weights): digest(weights)})
        run.reuse.keep_digests(known, [str(weights)])
    with open_run(str(tmp_path / "other"), identity(plan), fresh=False) as run:
        run.share(plan.config)
        assert run.identity.digests.get(str(weights)) == digest(weights)
        assert str(config.parent / "expert1" / "model.safetensors") not in run.identity.digests
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with open_run(str(tmp_path / "third"), identity(plan), fresh=False) as run:
        run.share(plan.config)
        assert str(weights) not in run.identity.digests
