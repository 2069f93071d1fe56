"""A search on two simulated nodes, each of which has room for one trial at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import ray
import tiny
import yaml
from ray.cluster_utils import Cluster

import cluster.search_trials
from cluster.search import search
from cluster.session import ENVIRONMENT
from engine.config.documents import read_documents


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_all_nodes_have_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.make_merge(tmp_path / "merge", merge_method="task_arithmetic", preset=None, parameters={})
    raw: dict[str, Any] = yaml.safe_load(path.read_text())
    raw = {key: raw[key] for key in ("merge_method", "base_model", "models")}
    raw["search"] = {"space": {"models.*.parameters.weight": {"low": 0, "high": 1}}, "trials": 30}
    path.write_text(yaml.safe_dump(raw))
    proposals, pids = cluster.search_trials._Proposals, set()
    ended = proposals.on_trial_complete

    def noted(self: Any, trial_id: str, result: Any = None, error: bool = False) -> None:
        pids.add(result["pid"])
        ended(self, trial_id, result, error)

    monkeypatch.setattr(proposals, "on_trial_complete", noted)
    options = {"num_cpus": 1, "object_store_memory": 80 << 20}
    nodes = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    try:
        nodes.add_node(**options)
        nodes.wait_for_nodes()
        environment = {"env_vars": ENVIRONMENT}
        ray.init(address=nodes.address, log_to_driver=False, logging_level="error", runtime_env=environment)
        search(read_documents(path)[0], str(tmp_path / "found"))
    finally:
        ray.shutdown()
        nodes.shutdown()
    table = pyarrow.parquet.read_table(tmp_path / "found" / "trials.parquet").to_pylist()
    assert [row["state"] for row in table] == ["done"] * 30
    # A process is used again by the next trial, and a node has the CPU of one.
    assert len(pids) == 2
