"""The end check: means over samples, the share of the divergence that a merge removed, and experts that are lost."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from conftest import plan_of

from engine.calibration.samples import Sample
from engine.learning.end_check import BASE, LOST, MERGED, PRIOR, Distance, distances, end_check, lost_lines, preflight

# In the order of an epoch, in which the samples of the expert with fewer come again.
SAMPLES = [Sample(k, i, (1, 2), f"file{k}:{i}", 1.0) for k, i in ((0, 0), (1, 0), (0, 1), (1, 0))]


def losses(*kl: float) -> np.ndarray:
    return np.array([(value, value / 10) for value in kl])


def test_each_sample_counts_once() -> None:
    table = end_check(
        {BASE: losses(1, 4, 3, 4), PRIOR: losses(1, 1, 1, 1), MERGED: losses(0.5, 3, 0.5, 3)}, SAMPLES, "ab"
    )
    assert [(row["point"], row["model"], row["sample"], row["kl"]) for row in table.to_pylist()] == [
        *(("base", "a", 0, 1), ("base", "a", 1, 3), ("base", "b", 0, 4)),
        *(("prior", "a", 0, 1), ("prior", "a", 1, 1), ("prior", "b", 0, 1)),
        *(("merged", "a", 0, 0.5), ("merged", "a", 1, 0.5), ("merged", "b", 0, 3)),
    ]
    np.testing.assert_allclose(table["hidden"].to_numpy(), table["kl"].to_numpy() / 10)
    assert distances(table) == [Distance("a", 2.0, 0.5), Distance("b", 4.0, 3.0)]
    assert [one.removed for one in distances(table)] == [0.75, 0.25]


def test_an_expert_is_lost_if_little_is_removed() -> None:
    found = [
        Distance("kept", 1.0, 1 - LOST - 1e-9),
        Distance("lost", 1.0, 1 - LOST + 1e-9),
        Distance("farther", 1.0, 2.0),
    ]
    assert [one.is_lost for one in found] == [False, True, True]


def test_an_expert_like_the_base_has_nothing_to_lose() -> None:
    same = Distance("same", 1e-9, 0.1)
    assert math.isnan(same.removed) and not same.is_lost


def test_lines_name_the_lost_and_the_step_that_follows(llama_merge: Path) -> None:
    kept, lost = Distance("kept", 1.0, 0.25), Distance("gone", 1.0, 0.99)
    assert lost_lines([Distance("same", 0.0, 0.0)], plan_of(llama_merge)) == []
    (line,) = lost_lines([kept], plan_of(llama_merge))
    assert "75%" in line
    of_all, of_one = lost_lines([kept, lost], plan_of(llama_merge, "calibrate=[featcal]"))
    assert of_all.startswith("before featcal") and "1% to 75%" in of_all
    assert of_one.startswith("gone ") and "1%" in of_one and "loss_weight" in of_one


def test_a_damaged_point_leaves_the_expert_out(tmp_path: Path) -> None:
    table = end_check({BASE: losses(1, 4, 3, 4), MERGED: losses(1, 4, 3, 4)}, SAMPLES, "ab")
    pyarrow.parquet.write_table(table.slice(0, 5), tmp_path / "cut.parquet")
    found = distances(pyarrow.parquet.read_table(tmp_path / "cut.parquet"))
    assert [(one.model, one.removed) for one in found] == [("a", pytest.approx(0))]


@pytest.mark.parametrize(
    ("third", "named"),
    [
        # KL, hidden loss, certainty of the base and of the expert on its samples.
        ((0.9, 0.1, 0.5, 0.6), []),
        ((0.9, 0.1, 0.5, 0.3), []),
        ((9.0, 0.1, 0.5, 0.2), ["c"]),
        ((0.2, 0.1, 0.10, 0.04), []),
        ((0.01, 0.0, 0.5, 0.5), ["c"]),
        ((0.03, 0.0, 0.5, 0.5), []),
    ],
)
def test_broken_experts_and_those_like_the_base_are_named(third: tuple[float, ...], named: list[str]) -> None:
    samples = [Sample(k, 0, (1, 2), f"file{k}:0") for k in range(3)]
    table = end_check({BASE: np.array([(1.0, 0.1, 0.5, 0.5), (0.8, 0.1, 0.5, 0.5), third])}, samples, "abc")
    assert [line.partition(":")[0] for line in preflight(table)] == named


def test_one_expert_alone_is_like_the_base_at_the_same_predictions() -> None:
    samples = [Sample(0, 0, (1, 2), "file0:0")]
    for kl, count in ((0.0, 1), (1e-6, 1), (1e-3, 0)):
        table = end_check({BASE: np.array([(kl, 0.0, 0.5, 0.5)])}, samples, "a")
        assert len(preflight(table)) == count
