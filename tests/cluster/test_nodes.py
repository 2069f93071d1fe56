"""A merge on three simulated nodes is bit-identical to one on a single node."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import ray
import tiny
import tiny_images
from cluster_helpers import result, run_merge
from conftest import plan_of
from ray.cluster_utils import Cluster
from thorough import as_thorough

from cluster.session import ENVIRONMENT, nodes


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    "make",
    [
        partial(tiny.make_merge, experts=2, sharded=True, parameters={"budget": 1.5}),
        as_thorough(partial(tiny_images.make_merge, family="qwen2_5_vl", exclude=[], parameters={"budget": 1.5})),
    ],
    ids=["text", "images"],
)
def test_three_nodes_give_the_same_bits_as_one(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    config = make(tmp_path / "merge")
    for count in (1, 3):
        options = {"num_cpus": 2, "object_store_memory": 80 << 20}
        cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
        try:
            for _ in range(count - 1):
                cluster.add_node(**options)
            cluster.wait_for_nodes()
            environment = {"env_vars": ENVIRONMENT}
            ray.init(address=cluster.address, log_to_driver=False, logging_level="error", runtime_env=environment)
            assert len(nodes()) == count
            run_merge(plan_of(config, f"cluster.shards={count}"), tmp_path / f"on-{count}")
        finally:
            ray.shutdown()
            cluster.shutdown()
    one, three = tmp_path / "on-1", tmp_path / "on-3"
    assert (three / "merge" / "memory.json").read_text().count('"shard ') == 3, "a shard on every node"
    assert result(one) == result(three)
