"""Merges that share a cache: the same bits as without, and nothing computed twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_helpers import result, run_merge
from conftest import plan_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_ray", "one_thread")]
SAMPLES, STEPS = 7, 3
OPTIONS = ("parameters.task_vectors=orthogonal", "models.1.parameters.weight=auto", "calibration.generate_responses=2")


class Merges:
    """Merges of one config into outputs of their own, with one cache or without any."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.config, self.folder, self.count = config, folder, 0

    def merge(self, *overrides: str, cache: str = "cache") -> Path:
        self.count += 1
        where = "off" if cache == "off" else str(self.folder / cache)
        plan = plan_of(self.config, *OPTIONS, f"cache={where}", *overrides)
        return run_merge(plan, self.folder / f"merged{self.count}")

    def entries(self, kind: str) -> list[Path]:
        return sorted((self.folder / "cache" / kind).iterdir())


def figures(out: Path) -> tuple[int, dict[str, Any]]:
    memory = json.loads((out / "merge" / "memory.json").read_text())
    return memory["expert_forwards"], memory["reused"]


@pytest.fixture
def merges(make_merge: Callable[..., Path], tmp_path: Path) -> Merges:
    return Merges(make_merge(), tmp_path)


def test_another_option_of_stage_2_computes_stage_2_alone(merges: Merges) -> None:
    first = merges.merge()
    assert figures(first) == (SAMPLES, {})
    second = merges.merge("parameters.budget=3")
    forwards, reused = figures(second)
    assert forwards == 0
    matrices = reused.pop("matrices of task vectors")
    assert matrices > 10
    assert reused == {"prepared samples": SAMPLES, "targets": SAMPLES, "priors": 1, "optimiser steps": STEPS}
    assert result(second) == result(merges.merge("parameters.budget=3", cache="off"))
    # The same merge once more: no step at all. Another dtype of the output: neither.
    again = merges.merge("out_dtype=bfloat16")
    assert figures(again)[1]["optimiser steps"] == 2 * STEPS
    assert (again / "merge" / "metrics.parquet").read_bytes() == (first / "merge" / "metrics.parquet").read_bytes()


@pytest.mark.thorough
def test_another_loss_weight_searches_the_prior_in_what_was_measured(merges: Merges) -> None:
    merges.merge("merge_method=expert_merging")
    other = ("merge_method=expert_merging", "models.0.parameters.loss_weight=3")
    again = merges.merge(*other)
    assert figures(again) == (0, figures(again)[1]) and figures(again)[1]["priors"] == 1
    assert without_importance(again) == without_importance(merges.merge(*other, cache="off"))


def test_damaged_and_lost_entries_are_computed_again(merges: Merges) -> None:
    first = merges.merge()
    for number, path in enumerate(path for kind in ("targets", "factors", "steps") for path in merges.entries(kind)):
        content = path.read_bytes()
        path.unlink()  # the first one stays as it is where it is linked
        if number % 2:
            path.write_bytes(content[: len(content) // 2])
    assert result(merges.merge()) == result(first)
    third = merges.merge()
    assert result(third) == result(first) and figures(third)[0] == 0


@pytest.mark.thorough
def test_more_epochs_go_on_from_fewer(merges: Merges) -> None:
    only = "merge_method=expert_merging"
    merges.merge(only)
    more = merges.merge(only, "parameters.epochs=3")
    assert figures(more)[1]["optimiser steps"] > 0
    assert without_importance(more) == without_importance(merges.merge(only, "parameters.epochs=3", cache="off"))


@pytest.mark.thorough
def test_of_an_expert_more_the_targets_and_the_survey_are_computed(
    make_merge: Callable[..., Path], tmp_path: Path
) -> None:
    three = make_merge(experts=3)
    raw = yaml.safe_load(three.read_text())
    two = three.with_name("two.yaml")
    two.write_text(yaml.safe_dump(raw | {"models": raw["models"][:2]}))
    whole = ("merge_method=expert_merging", "parameters.task_vectors=whole")
    merges = Merges(two, tmp_path)
    merges.merge(*whole)
    merges.config = three
    more = merges.merge(*whole)
    forwards, reused = figures(more)
    assert (forwards, reused["targets"]) == (5, SAMPLES) and reused["surveyed groups of tensors"] > 0
    assert without_importance(more) == without_importance(merges.merge(*whole, cache="off"))


def without_importance(out: Path) -> dict[str, bytes]:
    files = [*out.glob("*.safetensors"), out / "merge" / "coefficients.parquet"]
    return {path.name: path.read_bytes() for path in files}
