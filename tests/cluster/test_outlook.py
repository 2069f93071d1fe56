"""`plan --with-stats`: what statistics of experts foretell, for configs of any method, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from advice import Advice
from click.testing import CliRunner, Result
from conftest import plan_of
from errors import refused
from recorded_merges import write_merge
from safetensors.torch import load_file, save_file

import cli
import cluster
from cluster import outlook
from cluster.outlook import foretell
from cluster.results import MergeResult
from engine.errors import CheckpointError, ConfigError
from engine.statistics.files import StatisticsWriter
from engine.statistics.fits import Fits, total_residual
from engine.statistics.moments import Moments
from engine.storage.content_cache import VARIABLE
from engine.storage.local_folder import LocalFolder, digest

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, WEIGHTS = 20, "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a learned merge whose models have statistics of all linear layers."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    config = tiny.make_merge(tmp_path / "merge")
    plan = plan_of(config)
    for k in range(2):
        (tmp_path / "merge" / f"statistics{k}").mkdir()
        writer = StatisticsWriter(LocalFolder(tmp_path / "merge" / f"statistics{k}"))
        for number, name in enumerate(plan.merged):
            drawn = torch.Generator().manual_seed(100 * k + number)
            x = torch.randn(TOKENS, plan.base_header.tensors[name].shape[1], generator=drawn)
            writer.moments([((name,), Moments(TOKENS, x.square().sum(0), x.abs().sum(0), x.T @ x))])
        of = {kind: {WEIGHTS: digest(config.parent / model / WEIGHTS)} for kind, model in of_models(k).items()}
        facts = {"data": "0" * 64, "sequences": 2, "tokens": TOKENS, "dtype": "float32"}
        writer.finish(**of, **facts, kinds=("activations", "gram"))
    raw = yaml.safe_load(config.read_text())
    for k, model in enumerate(raw["models"]):
        model["statistics"] = f"statistics{k}"
    config.write_text(yaml.safe_dump(raw))
    return config.parent


def of_models(k: int) -> dict[str, str]:
    return {"base": "base", "model": f"expert{k}"}


def run(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(cli.main, ["plan", str(folder / "merge.yaml"), "--with-stats", *options])


def rows(output: str) -> dict[str, list[str]]:
    """Return the cells of the rows of the tables by their first cell."""
    lines = (line.split() for line in output.splitlines())
    return {words[0]: words[1:] for words in lines if len(words) >= 4}


def test_the_residuals_are_of_kinds_of_parts_and_of_all(folder: Path) -> None:
    done = run(folder)
    assert done.exit_code == 0, done.output
    fits = foretell(plan_of(folder / "merge.yaml"))
    energy = sum(fit.energy for fit in fits.values())

    def cells(some: Fits) -> list[str]:
        change = sum(fit.energy for fit in some.values()) / energy
        left = total_residual(some)
        of_left = change * left / total_residual(fits)
        return [str(len(some)), f"{change:.1%}", f"{left:.1%}", f"{of_left:.1%}"]

    found = rows(done.output)
    kinds = {name.split(".")[-2] for name in fits}
    assert len(kinds) == 7
    for kind in kinds:
        assert found[kind] == cells({name: fit for name, fit in fits.items() if f".{kind}." in name})
    assert found["all"] == cells(fits)
    blocks = [line.split() for line in done.output.splitlines() if line.strip().startswith("block ")]
    for number, words in enumerate(blocks):
        assert words == ["block", str(number), *cells({n: f for n, f in fits.items() if f".layers.{number}." in n})]
    assert len(blocks) == 3
    for k in range(2):
        mine = np.array([fit.coefficients[k] for fit in fits.values()])
        assert found[f"expert{k}"][-3:] == [f"{value:.3f}" for value in (mine.mean(), mine.min(), mine.max())]
    assert f"keeps {1 - total_residual(fits):.1%} of what the experts change" in done.output


@pytest.mark.parametrize("method", ["ties", "closed_form", "expert_merging"])
def test_the_method_does_not_matter(folder: Path, method: str) -> None:
    config = folder / "merge.yaml"
    assert foretell(plan_of(config, f"merge_method={method}")) == foretell(plan_of(config))


def test_from_python_the_text_has_what_is_foretold(folder: Path) -> None:
    config = folder / "merge.yaml"
    plain, whole = cluster.plan(config).text, cluster.plan(config, with_stats=True).text
    assert whole.startswith(plain) and f"{total_residual(foretell(plan_of(config))):.1%}" in whole
    merged = MergeResult(str(write_merge(plan_of(config), folder / "merged", fits=foretell(plan_of(config)))))
    assert merged.layers is not None and merged.layers.num_rows == 2 * len(foretell(plan_of(config)))


def test_hashes_are_taken_from_those_of_earlier_merges(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(folder / "merge.yaml")
    foretell(plan)
    monkeypatch.setattr(outlook, "digest", lambda path: pytest.fail(f"{path} was read"))
    foretell(plan)


ADVICE = Advice(__name__, {"run `python cli.py stats CONFIG --out DIR`": "test_fits_on_ray.py, which runs it"})


def test_every_advice_is_followed() -> None:
    ADVICE.check()


def test_a_model_without_statistics_is_named(folder: Path) -> None:
    with refused(ConfigError, where="--with-stats", facts=["expert1"], do="stats"):
        foretell(plan_of(folder / "merge.yaml", "models.1.statistics=null"))
    done = run(folder, "--set", "models.1.statistics=null")
    assert done.exit_code == 2 and "expert1" in done.stderr


def swapped(folder: Path) -> None:
    config = folder / "merge.yaml"
    text = config.read_text().replace("statistics0", "x").replace("statistics1", "statistics0")
    config.write_text(text.replace("statistics: x", "statistics: statistics1"))


def changed(folder: Path) -> None:
    weights = load_file(folder / "base" / WEIGHTS)
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "base" / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(("change", "kind"), [(swapped, "model"), (changed, "base")])
def test_statistics_of_other_models_are_refused(folder: Path, change: Callable[[Path], None], kind: str) -> None:
    foretell(plan_of(folder / "merge.yaml"))
    change(folder)
    with refused(CheckpointError, where="statistics.json", facts=[f"another {kind}"]):
        foretell(plan_of(folder / "merge.yaml"))


def test_a_weight_that_is_not_finite_is_named(folder: Path) -> None:
    path, name = folder / "expert1" / WEIGHTS, "model.layers.1.mlp.up_proj.weight"
    weights = load_file(path)
    weights[name][2, 3] = torch.nan
    before = digest(path)
    save_file(weights, path, metadata={"format": "pt"})
    header = folder / "statistics1" / "statistics.json"
    header.write_text(header.read_text().replace(before, digest(path)))
    with refused(CheckpointError, where="expert1", facts=[name]):
        foretell(plan_of(folder / "merge.yaml"))


def test_a_merge_of_slices_has_no_base_to_compare_with(folder: Path) -> None:
    config = folder / "slices.yaml"
    part = {"sources": [{"model": "expert0", "layer_range": [0, 2]}]}
    config.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": [part]}))
    with refused(ConfigError, where="--with-stats", facts=["slices"]):
        foretell(plan_of(config))


def test_a_config_of_several_merges_is_refused(folder: Path) -> None:
    config = folder / "merge.yaml"
    text = config.read_text()
    config.write_text(f"name: one\n{text}---\n{text}")
    done = run(folder)
    assert done.exit_code == 2 and "several merges" in done.stderr


def test_experts_of_a_mixture_are_one_kind() -> None:
    names = [f"model.layers.{b}.mlp.experts.{e}.w1.weight" for b in range(4) for e in range(3)] + ["projector.weight"]
    groups = dict(outlook._groups(names))
    assert {title: len(some) for title, some in groups.items()} == {
        "w1": 12,
        "projector": 1,
        "blocks 0 to 1": 6,
        "block 2": 3,
        "block 3": 3,
        "all": 13,
    }
