"""Merges that are solved block by block, on a real Ray: the bits of the plain classes, with any actors and faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import tiny
import tiny_images
import torch
from cluster_helpers import KillOnce, result, run_merge
from conftest import plan_of
from correction_helpers import Actors
from correction_helpers import result as calibrated
from safetensors.torch import load_file
from torch import Tensor
from weight_space import combine

from cluster.by_blocks import PHASE
from engine.calibration.encoder import encoder
from engine.calibration.records import read_records
from engine.calibration.samples import make_samples
from engine.correction.files import merged_file
from engine.correction.rules import rule_of
from engine.planning.plan import Plan
from engine.storage.local_folder import LocalFolder

pytestmark = pytest.mark.usefixtures("small_ray")

BLOCKS = tiny.COMMON["num_hidden_layers"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_merge(tmp_path_factory.mktemp("merge"), parameters={"samples_per_model": 3})


def expected(plan: Plan, merged: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return what the plain classes make of a merged model."""
    rule, state, records = rule_of(plan), LocalFolder(folder), read_records(plan)
    assert rule is not None
    for name, tensor in merged.items():
        state.write(merged_file(name), safetensors.torch.save({name: tensor}))
    samples = make_samples(records, encoder(plan, records), plan)
    Actors(plan, rule, samples, state).run(range(BLOCKS))
    return calibrated(plan, state)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("method", ["featcal", pytest.param("regmean_plus_plus", marks=pytest.mark.slow)])
def test_a_merge_has_the_bits_of_the_plain_classes_also_after_actors_were_killed(
    config: Path, tmp_path: Path, method: str
) -> None:
    own = ["merge_method=task_arithmetic", "calibrate=featcal"] if method == "featcal" else [f"merge_method={method}"]
    plan = plan_of(config, *own)
    merged = load_file(combine(plan, tmp_path / "merged") / "model.safetensors")
    wanted = expected(plan, merged, tmp_path / "state")
    assert not equal(wanted, merged)
    kill = KillOnce({PHASE: "ray::Expert"})
    out = run_merge(plan_of(config, *own, "cluster.shards=2"), tmp_path / "out", kill)
    assert not kill.missed
    assert equal(load_file(out / "model.safetensors"), wanted)


@pytest.mark.slow
def test_a_merge_that_was_stopped_goes_on_where_it_was(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(config, "merge_method=task_arithmetic", "calibrate=featcal", "max_shard_size=20KB")
    whole = run_merge(plan, tmp_path / "whole")
    seen: list[str] = []

    def stop(phase: str) -> None:
        seen.append(phase)
        if seen.count(PHASE) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_merge(plan, tmp_path / "out", stop)
    state = LocalFolder(tmp_path / "out.run")
    damaged = sorted(state.names("merged"))[0]
    state.write(damaged, state.read(damaged)[:-1] + b"\1")
    capsys.readouterr()
    assert result(run_merge(plan, tmp_path / "out")) == result(whole)
    said = capsys.readouterr().out
    assert f"{PHASE}: {BLOCKS} (2 done before)" in said and damaged in said


@pytest.mark.slow
def test_a_learned_merge_is_calibrated_too(config: Path, tmp_path: Path) -> None:
    learned = load_file(run_merge(plan_of(config), tmp_path / "learned") / "model.safetensors")
    plan = plan_of(config, "calibrate=featcal")
    out = run_merge(plan, tmp_path / "out")
    assert equal(load_file(out / "model.safetensors"), expected(plan, learned, tmp_path / "state"))


@pytest.mark.slow
def test_all_towers_of_a_model_that_takes_images_are_calibrated(tmp_path: Path) -> None:
    given = tiny_images.make_merge(tmp_path / "merge", "qwen3_vl", merge_method="task_arithmetic")
    plans = [plan_of(given, "parameters.samples_per_model=2", f"calibrate={steps}") for steps in ("[]", "featcal")]
    merged, solved = (
        load_file(run_merge(plan, tmp_path / str(number)) / "model.safetensors") for number, plan in enumerate(plans)
    )
    changed = {name for name, tensor in solved.items() if not torch.equal(tensor, merged[name])}
    for part in ("visual.blocks.1.", "visual.merger.", "language_model.layers.2."):
        assert any(part in name for name in changed), part
    assert all(bool(tensor.isfinite().all()) for tensor in solved.values())
