"""Merging from Python: what the functions take and return, and on whose Ray they run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import tiny
import torch
import yaml
from errors import refused

import cluster
from cluster.session import ENVIRONMENT, actor_options, connect
from engine.errors import ClusterError, ConfigError, OutputError

TIES = {"merge_method": "ties", "parameters": {"weight": 0.5, "density": 0.6}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a base, two experts and a merge.yaml of TIES."""
    tiny.make_merge(tmp_path, **TIES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_config_is_a_path_a_text_or_keys_and_values(folder: Path) -> None:
    keys = yaml.safe_load((folder / "merge.yaml").read_text())
    keys["models"] = tuple({**entry, "model": Path(entry["model"])} for entry in keys["models"])
    given = [folder / "merge.yaml", "merge.yaml", (folder / "merge.yaml").read_text(), keys]
    plans = [cluster.plan(config, {"parameters.density": 0.25}).plan for config in given]
    assert all(one.config == plans[0].config and one.experts == plans[0].experts for one in plans)
    assert plans[0].config.recipe is not None and plans[0].config.recipe.top["density"] == 0.25


def test_a_plan_is_the_text_of_the_command_and_estimates(folder: Path) -> None:
    learned = cluster.plan("merge.yaml", {"merge_method": "expert_merging"}, nodes=2, cpus=4, gpus=0, memory=64)
    assert learned.seconds is not None and learned.seconds > 0
    assert "2 x 4 CPUs" in learned.text and str(learned) == repr(learned) == learned.text
    assert cluster.plan("merge.yaml").seconds is None


def test_errors_are_raised_and_not_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with refused(ConfigError, where="missing.yaml"):
        cluster.plan("missing.yaml")
    with refused(ConfigError, facts=["object"]):
        cluster.plan({"merge_method": object()})
    with refused(OutputError, where="base"):
        cluster.merge("merge.yaml", out="base")
    assert capsys.readouterr() == ("", "")


def test_nothing_and_numbers_below_one_are_refused(folder: Path, tmp_path: Path) -> None:
    with refused(ConfigError, facts=["models"]):
        cluster.evaluate([], "data.jsonl")
    with refused(ConfigError, facts=["runs"]):
        cluster.report([], out=tmp_path / "report.html")
    with refused(ConfigError, facts=["limit"]):
        cluster.evaluate("base", "data.jsonl", limit=0)
    with refused(ConfigError, facts=["output"]):
        cluster.merge("merge.yaml", out="")
    assert not (tmp_path / "report.html").exists()


def test_a_merge_returns_what_it_recorded_and_changes_no_handler(folder: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGVTALRM)}
    made = cluster.merge("merge.yaml", out="out")
    assert made.made and made.path == str(folder / "out")
    assert made.seconds and made.memory is not None and made.coefficients is None and made.evaluation is None
    model = made.model(dtype=torch.bfloat16)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.bfloat16
    assert made.tokenizer().chat_template
    assert not cluster.merge("merge.yaml", out="out").made
    assert handlers == {number: signal.getsignal(number) for number in handlers}
    (folder / "texts.jsonl").write_text('{"text": "w1 w2 w3"}\n')
    scores = cluster.evaluate(made, "texts.jsonl", out="out/merge/evaluation.parquet")
    assert scores.value(made.path, "texts", "perplexity") > 1 and scores.path == "out/merge/evaluation.parquet"
    with pytest.raises(KeyError):
        scores.value(made.path, "texts", "accuracy")
    again = type(made)(made.path)
    assert again.evaluation is not None and len(again.evaluation) == len(scores.table)
    assert cluster.report([made], "page.html") == folder / "page.html"


@pytest.mark.slow
def test_a_ray_that_is_connected_is_used_and_stays_connected(folder: Path, small_ray: None) -> None:
    with refused(ClusterError, do="ray.shutdown()"), connect("127.0.0.1:6379"):
        pass
    first, second = yaml.safe_load((folder / "merge.yaml").read_text())["models"]
    options = {"merge_method": "expert_merging", "parameters": {"epochs": 1}, "cache": "off"}
    made = cluster.merge("merge.yaml", "one", options | {"models": [first]})
    assert made.coefficients is not None and made.priors == {"expert0": pytest.approx(0.2)}
    more = cluster.merge({"models": [second]}, "two", extend=made)
    assert more.priors == {"expert0": pytest.approx(0.2), "expert1": pytest.approx(0.3)}
    assert ray.is_initialized()


def test_actors_on_somebody_elses_ray_get_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    of_job: dict[str, Any] = {}
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env=of_job))
    monkeypatch.setattr(os, "environ", dict(ENVIRONMENT))
    assert actor_options() == {}
    del os.environ["MALLOC_TRIM_THRESHOLD_"]
    assert actor_options() == {"runtime_env": {"env_vars": ENVIRONMENT}}
    of_job["env_vars"] = ENVIRONMENT
    assert actor_options() == {}
