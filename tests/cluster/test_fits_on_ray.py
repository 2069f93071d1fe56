"""Coefficients in closed form on a real Ray: where learning starts, and what the output records of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tiny
from advice import found, refusal
from click.testing import CliRunner
from cluster_helpers import KillOnce, result, run_merge
from conftest import plan_of

import cli
from cluster.outlook import foretell
from engine.report.merge_folder import Merged
from engine.statistics.fits import LEAST, write_fits

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_ray")]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge in one stage whose experts have no priors of their own, and which learns in small steps."""
    options = {"merge_method": "expert_merging", "parameters": {"learning_rate": 0.001}}
    path = tiny.make_merge(tmp_path_factory.mktemp("merge"), **options)
    path.write_text(path.read_text().replace("weight: 0.", "loss_weight: 0."))
    return path


@pytest.fixture(scope="module")
def once(small_ray: None, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "merged"
    return run_merge(plan_of(config, "parameters.weight=closed_form", "cluster.shards=1"), out)


def test_neither_shards_nor_an_interruption_change_the_bits(config: Path, once: Path, tmp_path: Path) -> None:
    kill = KillOnce({"fitting layers": "ray::Shard", "stage 1": "ray::Trainer"})
    plan = plan_of(config, "parameters.weight=closed_form", "cluster.shards=2")
    assert result(run_merge(plan, tmp_path / "merged", kill)) == result(once)
    assert kill.missed == set()


class Stopped(Exception):
    """The end of a merge that goes on later."""


@pytest.mark.parametrize("at", ["fitting layers", "writing"])
def test_a_merge_that_was_stopped_goes_on_to_the_same_bits(config: Path, once: Path, tmp_path: Path, at: str) -> None:
    def stop(phase: str) -> None:
        if phase == at:
            raise Stopped

    plan = plan_of(config, "parameters.weight=closed_form")
    with pytest.raises(Stopped):
        run_merge(plan, tmp_path / "merged", stop)
    assert result(run_merge(plan, tmp_path / "merged")) == result(once)


def test_the_record_has_the_fits_and_learning_starts_at_them(once: Path) -> None:
    rows = pyarrow.parquet.read_table(once / "merge" / "layers.parquet").to_pylist()
    merged = Merged.read(str(once))
    layout, values = merged.stages[1].layout, merged.stages[1].values
    assert {row["tensor"] for row in rows} == set(layout.tensors), "every merged tensor of the tiny model is a layer"
    assert all(0 <= row["residual"] <= 1 and row["energy"] > 0 for row in rows)
    for k in range(2):
        mine = np.array([row["coefficient"] for row in rows if row["model"] == f"expert{k}"])
        start = np.clip(mine, LEAST, 1 - LEAST)
        assert merged.prior(f"expert{k}") == pytest.approx(start.mean())
        # Three steps of AdamW on a, α = σ(a), of the learning rate at most.
        np.testing.assert_allclose(values[k], start, atol=3 * 0.001 / 4, rtol=0)
        assert np.ptp(start) > 0.1
    assert "linear layers" in (once / "README.md").read_text()
    assert "merge/layers.parquet" in (once / "merge" / "config.yaml").read_text()


def test_given_statistics_and_the_weight_space_method_have_the_same_fits(
    config: Path, once: Path, tmp_path: Path
) -> None:
    """The statistics are those to which the advice of `plan --with-stats` leads."""
    error = refusal(lambda: foretell(plan_of(config)))
    command = found(r"`python cli.py (stats CONFIG --out DIR)`.*`statistics: DIR/NAME`", error)[1]
    statistics = tmp_path / "statistics"
    done = CliRunner().invoke(cli.main, command.replace("CONFIG", str(config)).replace("DIR", str(statistics)).split())
    assert done.exit_code == 0, done.output
    given = [f"models.{k}.statistics={statistics / f'expert{k}'}" for k in range(2)]
    foretold = foretell(plan_of(config, *given))
    again = run_merge(plan_of(config, "parameters.weight=closed_form", *given), tmp_path / "again")
    assert result(again) == result(once)
    other = run_merge(plan_of(config, "merge_method=closed_form", *given), tmp_path / "closed_form")
    tables = [pyarrow.parquet.read_table(out / "merge" / "layers.parquet") for out in (once, other)]
    assert tables[0].equals(tables[1])
    write_fits(tmp_path / "layers.parquet", foretold, ["expert0", "expert1"])
    assert tables[0].equals(pyarrow.parquet.read_table(tmp_path / "layers.parquet"))
