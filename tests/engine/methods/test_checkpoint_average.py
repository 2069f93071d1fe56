"""Averages of checkpoints: the weights beside tables, patterns of folders, and merges beside sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from errors import refused
from hypothesis import given
from hypothesis import strategies as st
from weight_space import entries, ours, worst, write_arrays, write_config

from engine.config.reader import load_config
from engine.errors import ConfigError
from engine.methods.checkpoint_average import METHOD, weights
from engine.methods.options import Settings

DEFAULTS: dict[str, Any] = {name: option.default for name, option in METHOD.by_name.items()}


def of(count: int, metrics: tuple[float, ...] = (), names: tuple[str, ...] = (), **values: Any) -> list[float]:
    own: list[Settings] = [{"metric": metric} for metric in metrics or [0.0] * count]
    return weights(names or tuple(f"step-{i}" for i in range(1, count + 1)), DEFAULTS | values, own)


# Computed by hand from the formulas.
TABLE: list[tuple[dict[str, Any], list[float]]] = [
    ({"count": 4}, [0.25] * 4),
    ({"count": 4, "schedule": "linear"}, [0.25] * 4),
    ({"count": 6, "schedule": "minus_sqrt"}, [0.4082, 0.1691, 0.1298, 0.1094, 0.0964, 0.0871]),
    ({"count": 3, "schedule": "cosine"}, [0.25, 0.5, 0.25]),
    ({"count": 5, "window": 2}, [0, 0, 0, 0.5, 0.5]),
    ({"count": 2, "window": 7}, [0.5, 0.5]),
    ({"count": 3, "schedule": "metric", "metrics": (2.0, 1.0, 0.5)}, [1 / 7, 2 / 7, 4 / 7]),
    ({"count": 2, "schedule": "metric", "metrics": (2.0, 1.0), "power": 2.0}, [0.2, 0.8]),
    ({"count": 2, "schedule": "metric", "by": "step", "metrics": (100.0, 300.0)}, [0.25, 0.75]),
    ({"count": 2, "schedule": "metric", "by": "step", "names": ("run-2-step-100", "run-2-step-300")}, [0.25, 0.75]),
]


@pytest.mark.parametrize(("options", "expected"), TABLE, ids=str)
def test_weights(options: dict[str, Any], expected: list[float]) -> None:
    assert of(**options) == pytest.approx(expected, abs=5e-5)


@given(st.integers(1, 40), st.integers(0, 50), st.sampled_from(["uniform", "linear", "cosine", "minus_sqrt", "metric"]))
def test_weights_sum_to_one_and_are_zero_before_the_window(count: int, window: int, schedule: str) -> None:
    found = of(count, window=window, schedule=schedule, by="step")
    assert sum(found) == pytest.approx(1) and min(found) >= 0
    assert all(weight == 0 for weight in found[: max(0, count - (window or count))])


@pytest.mark.parametrize("power", [0.0, 100.0])
def test_no_power_overflows(power: float) -> None:
    assert sum(of(2, schedule="metric", metrics=(1e-300, 1e300), power=power)) == pytest.approx(1)


def test_a_checkpoint_without_a_loss_is_refused_when_planned(tmp_path: Path) -> None:
    write_arrays(tmp_path, experts=2)
    keys: dict[str, Any] = {"merge_method": "checkpoint_average", "parameters": {"schedule": "metric"}}
    with refused(ConfigError, facts=["expert0", "metric"]):
        ours(write_config(tmp_path, models=entries({}, {"metric": 1}), **keys))
    # What the message advises.
    ours(write_config(tmp_path, models=entries({"metric": 2}, {"metric": 1}), **keys))


def test_a_merge_is_the_weighted_sum(tmp_path: Path) -> None:
    base, experts = write_arrays(tmp_path, experts=3)
    keys = {"models": entries({}, {}, {}), "parameters": {"schedule": "minus_sqrt"}, "dtype": "float32"}
    expected = {
        name: torch.stack(
            [w * expert[name].double() for w, expert in zip(of(3, schedule="minus_sqrt"), experts, strict=True)]
        )
        .sum(0)
        .float()
        for name in base
    }
    assert worst(ours(write_config(tmp_path, merge_method="checkpoint_average", **keys)), expected) < 1e-6
    one = {"models": entries({}, {}, {}), "parameters": {"window": 1}}
    found = ours(write_config(tmp_path, merge_method="checkpoint_average", **one))
    assert all(torch.equal(tensor, experts[2][name]) for name, tensor in found.items())


def test_a_pattern_stands_for_the_folders_that_match(tmp_path: Path) -> None:
    for step in (1000, 500, 2000):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-9.txt").touch()
    config = tmp_path / "merge.yaml"
    config.write_text(
        "merge_method: checkpoint_average\nmodels:\n"
        "  - model: run/checkpoint-*\n    parameters: {metric: 2}\n  - model: last\n    parameters: {metrik: 1}\n"
    )
    with refused(ConfigError, facts=["metrik", "merge.yaml:6"]):  # the line as written
        load_config(config)
    config.write_text(config.read_text().replace("metrik", "metric"))
    found = [expert.model for expert in load_config(config).models]
    assert found == ["run/checkpoint-500", "run/checkpoint-1000", "run/checkpoint-2000", "last"]


@pytest.mark.parametrize("pattern", ["run/checkpoint-*", "s3://bucket/run/checkpoint-*"])
def test_a_pattern_without_a_folder_is_refused(pattern: str, tmp_path: Path) -> None:
    config = tmp_path / "merge.yaml"
    config.write_text(f"merge_method: checkpoint_average\nmodels:\n  - model: {pattern}\n")
    with refused(ConfigError, facts=[pattern, "merge.yaml:3"]):
        load_config(config)


def test_the_options_of_a_storage_are_no_pattern(tmp_path: Path) -> None:
    config = tmp_path / "merge.yaml"
    config.write_text("merge_method: checkpoint_average\nmodels:\n  - model: s3://bucket/run?region=x\n")
    assert [expert.model for expert in load_config(config).models] == ["s3://bucket/run?region=x"]


def test_a_folder_with_such_a_name_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1]").mkdir()
    config = tmp_path / "merge.yaml"
    config.write_text("merge_method: checkpoint_average\nmodels:\n  - model: a[1]\n")
    assert [expert.model for expert in load_config(config).models] == ["a[1]"]
