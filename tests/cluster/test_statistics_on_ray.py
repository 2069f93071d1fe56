"""Statistics on a real Ray: collected within a merge, written by `stats`, and used again by a merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from advice import Advice
from cluster_helpers import run_merge
from conftest import plan_of
from errors import refused

from cluster.driver import merge
from engine.config.reader import collected, load_config
from engine.errors import CheckpointError
from engine.methods.options import Statistic
from engine.planning.planner import make_plan
from engine.statistics.files import HEADER, Statistics
from engine.storage.local_folder import LocalFolder

ADVICE = Advice(
    __name__,
    {
        # Other faults of the files, for which the advice is the same.
        "the file has {size} bytes": "test_a_damaged_file_is_refused_and_computed_again",
        "there are no statistics": "test_a_damaged_file_is_refused_and_computed_again",
        "not a header of statistics": "test_a_damaged_file_is_refused_and_computed_again",
        "the file has no tensor": "test_a_damaged_file_is_refused_and_computed_again",
        "expected: float32 of shape": "test_a_damaged_file_is_refused_and_computed_again",
        "has a NaN or infinite value": "test_a_damaged_file_is_refused_and_computed_again",
        "a file of the statistics is missing": "test_a_damaged_file_is_refused_and_computed_again",
        "expected: those of a weight of shape": "test_a_damaged_file_is_refused_and_computed_again",
    },
)

KINDS: tuple[Statistic, ...] = ("gram", "fisher", "sensitivity")


def each_on_ray(test: Any) -> Any:
    """Mark a test that needs Ray."""
    return pytest.mark.slow(pytest.mark.usefixtures("small_ray")(test))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_merge(tmp_path_factory.mktemp("merge"), experts=2)


@pytest.fixture(scope="module")
def published(small_ray: None, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The statistics of base and experts."""
    out = tmp_path_factory.mktemp("out") / "statistics"
    given = collected(load_config(config), KINDS, True, "config")
    assert merge(make_plan(given, config.parent), str(out))
    return out


def again(config: Path, folder: Path, *kinds: str) -> Path:
    """Compute the statistics, as `python cli.py stats` does, and return their folder."""
    out = folder / "statistics"
    merge(make_plan(collected(load_config(config), kinds or ("gram",), False, "config"), config.parent), str(out))
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "model.safetensors")


def given(published: Path) -> list[str]:
    return [f"models.{k}.statistics={published / f'expert{k}'}" for k in range(2)]


@each_on_ray
@pytest.mark.parametrize("method", ["lot", "rcp"])
def test_published_statistics_give_the_bits_of_a_merge_that_collects_its_own(
    config: Path, published: Path, tmp_path: Path, method: str
) -> None:
    own = run_merge(plan_of(config, f"merge_method={method}", "cluster.shards=2"), tmp_path / "own")
    again = run_merge(plan_of(config, f"merge_method={method}", *given(published)), tmp_path / "again")
    assert weights(own).keys() == weights(again).keys()
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(own).items())
    base = weights(config.parent / "base")
    assert any(not torch.equal(tensor, base[name]) for name, tensor in weights(own).items())


@each_on_ray
def test_a_second_merge_uses_those_of_the_first_again(config: Path, tmp_path: Path) -> None:
    cache = f"cache={tmp_path / 'cache'}"
    first = run_merge(plan_of(config, "merge_method=lot", cache), tmp_path / "first")
    second = run_merge(plan_of(config, "merge_method=regmean", cache), tmp_path / "second")
    alone = run_merge(plan_of(config, "merge_method=regmean"), tmp_path / "alone")
    memory = [json.loads((out / "merge" / "memory.json").read_text()) for out in (first, second)]
    assert [figures["expert_forwards"] > 0 for figures in memory] == [True, False]
    assert memory[1]["reused"]["models' statistics"] == 2
    assert weights(second).keys() == weights(alone).keys()
    assert all(torch.equal(tensor, weights(alone)[name]) for name, tensor in weights(second).items())


@each_on_ray
def test_they_tell_what_they_are_of(config: Path, published: Path) -> None:
    headers = {name: Statistics(LocalFolder(published / name)).header for name in ("base", "expert0", "expert1")}
    assert {path.name for path in published.iterdir()} == {*headers, "merge"}
    assert headers["expert0"].base == headers["expert1"].base == headers["base"].model
    assert headers["expert0"].model != headers["expert1"].model
    assert headers["base"].sequences == headers["expert0"].sequences + headers["expert1"].sequences
    plan = make_plan(collected(load_config(config), KINDS, True, "config"), config.parent)
    assert not merge(plan, str(published)), "they are there already"


def test_every_advice_is_followed() -> None:
    ADVICE.check()


@each_on_ray
def test_statistics_of_another_expert_are_refused_and_computed_again(
    config: Path, published: Path, tmp_path: Path
) -> None:
    swapped = [f"models.{k}.statistics={published / f'expert{1 - k}'}" for k in range(2)]
    with refused(CheckpointError, where=HEADER, facts=["another model"], do="cli.py stats"):
        run_merge(plan_of(config, "merge_method=lot", *swapped), tmp_path / "merged")
    run_merge(plan_of(config, "merge_method=lot", *given(again(config, tmp_path))), tmp_path / "merged")


@each_on_ray
def test_statistics_without_what_a_method_needs_are_refused_and_computed_again(config: Path, tmp_path: Path) -> None:
    out = again(config, tmp_path / "first", "activations")
    with refused(CheckpointError, where=HEADER, facts=["gram"], do="--kinds activations,gram") as caught:
        run_merge(plan_of(config, "merge_method=lot", *given(out)), tmp_path / "merged")
    kinds = caught.value.do.rpartition("--kinds ")[2].split(",")
    run_merge(plan_of(config, "merge_method=lot", *given(again(config, tmp_path, *kinds))), tmp_path / "merged")


@each_on_ray
@ADVICE.followed("the file is not the one that statistics.json lists")
def test_a_damaged_file_is_refused_and_computed_again(config: Path, published: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(published, tmp_path / "copy")
    (file, *_) = sorted((copy / "expert1").glob("moments-*"))
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    with refused(CheckpointError, where=file.name, do="cli.py stats"):
        run_merge(plan_of(config, "merge_method=lot", *given(copy)), tmp_path / "merged")
    run_merge(plan_of(config, "merge_method=lot", *given(again(config, tmp_path))), tmp_path / "merged")
