"""Prepasses: sums and collections over a whole model, the same for any number of shards, for each group of tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import plan_of
from weight_space import combine, entries, known, make_models, read, task_vectors, write_arrays, write_config

from actors.shard import Shard
from engine.methods import registry, task_arithmetic
from engine.methods.arithmetic.tensor import MergeTensor
from engine.methods.prepass import Array, Group, Prepass
from engine.task_vectors.pipeline import Fill

pytestmark = pytest.mark.usefixtures("one_thread")

Install = Callable[..., list[MergeTensor]]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Give methods prepasses, and return the tensors that `prepare` of task_arithmetic is called with."""

    def give(**prepasses: tuple[Prepass, ...]) -> list[MergeTensor]:
        prepared: list[MergeTensor] = []

        def prepare(tensor: MergeTensor) -> Fill:
            prepared.append(tensor)
            return task_arithmetic.prepare(tensor)

        for method, passes in prepasses.items():
            monkeypatch.setitem(registry._PREPASSES, method, passes)
        monkeypatch.setitem(registry._NATIVE, "task_arithmetic", (task_arithmetic.METHOD, prepare))
        return prepared

    return give


def squares(tensor: MergeTensor) -> Array:
    """Return ‖τₖ‖² of each expert, float64."""
    return np.array([float(tensor.task_vector(k).double().square().sum()) for k in range(len(tensor.models))])


NORM = Prepass("norm", "norms", squares, lambda total, group: np.sqrt(total))
SHARE = Prepass(
    "share",
    "shares of the norm",
    lambda tensor: squares(tensor) / tensor.known["norm"] ** 2,
    lambda found, group: found,
    gather=True,
)
COUNT = Prepass(
    "count", "counts", lambda tensor: np.array([tensor.numel, 1]), lambda total, group: (total.tolist(), group.numel)
)


def test_results_do_not_depend_on_the_shards(install: Install, tmp_path: Path) -> None:
    prepared = install(task_arithmetic=(COUNT, NORM, SHARE))
    write_arrays(tmp_path)
    config = write_config(tmp_path, merge_method="task_arithmetic", base_model="base", models=entries({}, {}, {}))
    plan = plan_of(config)
    ((key, found),) = known(plan, [Shard(plan, 0)]).items()
    assert key == ("task_arithmetic", (0, 1, 2))
    count, numels = sum(plan.numels.values()), plan.numels
    assert found["count"] == ([count, len(numels)], count)
    taus = task_vectors(plan)
    total = np.zeros(3)
    for name in plan.merged:  # in this order, whatever the shards
        total = total + [float(tau.double().square().sum()) for tau in taus[name]]
    assert np.array_equal(found["norm"], np.sqrt(total))
    assert list(found["share"]) == list(plan.merged)
    assert np.allclose(sum(found["share"].values()), 1)
    for shards in (2, 3):
        (again,) = known(plan, [Shard(plan, index) for index in range(shards)]).values()
        assert again["count"] == found["count"] and np.array_equal(again["norm"], found["norm"])
        assert all(np.array_equal(again["share"][name], share) for name, share in found["share"].items())
    combine(plan, tmp_path / "out")
    assert prepared and all(np.array_equal(tensor.known["norm"], found["norm"]) for tensor in prepared)


def test_a_prepass_that_no_tensor_wants_does_not_run(install: Install, tmp_path: Path) -> None:
    never = Prepass("never", "", lambda tensor: pytest.fail("measured"), lambda *_: None, wanted=lambda values: False)
    prepared = install(task_arithmetic=(never,))
    write_arrays(tmp_path)
    config = write_config(tmp_path, merge_method="task_arithmetic", base_model="base", models=entries({}, {}, {}))
    combine(plan_of(config), tmp_path / "out")
    assert prepared and all(tensor.known == {} for tensor in prepared)


def test_slices_with_other_methods_or_experts_are_groups_of_their_own(install: Install, tmp_path: Path) -> None:
    prepared = install(task_arithmetic=(COUNT,), linear=(NORM,))
    make_models(tmp_path, experts=2)

    def part(layer: int, *experts: int, **more: Any) -> dict[str, Any]:
        sources = [
            {"model": f"expert{k}", "layer_range": [layer, layer + 1], "parameters": {"weight": 1.0}} for k in experts
        ]
        base = [{"model": "base", "layer_range": [layer, layer + 1], "parameters": {"weight": 1.0}}]
        return {"sources": base + sources} | more

    parts = [part(0, 0, 1), part(1, 1), part(2, 0, 1, merge_method="linear")]
    plan = plan_of(write_config(tmp_path, merge_method="task_arithmetic", base_model="base", slices=parts))
    found = known(plan, [Shard(plan, 0), Shard(plan, 1)])
    assert {key: set(results) for key, results in found.items()} == {
        ("task_arithmetic", (0, 1)): {"count"},
        ("task_arithmetic", (1,)): {"count"},
        ("linear", (0, 1)): {"norm"},
    }
    numels = [found["task_arithmetic", experts]["count"] for experts in ((0, 1), (1,))]
    assert [of[0][0] for of in numels] == [of[1] for of in numels]
    combine(plan, tmp_path / "out", shards=2)
    for tensor in prepared:
        assert tensor.known["count"] == numels[len(tensor.models) == 1]


def test_one_model_per_expert_has_the_results_of_all_experts(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(svd_intermediate=(NORM,))
    prepared: list[MergeTensor] = []
    method, prepare = registry._NATIVE["svd_intermediate"]
    monkeypatch.setitem(
        registry._NATIVE, "svd_intermediate", (method, lambda tensor: prepared.append(tensor) or prepare(tensor))
    )
    write_arrays(tmp_path)
    config = write_config(tmp_path, merge_method="svd_intermediate", base_model="base", models=entries({}, {}, {}))
    plan = plan_of(config)
    combine(plan, tmp_path / "out", only=1)
    assert read(tmp_path / "out").keys() >= set(plan.merged)
    assert {(tensor.models, len(tensor.known["norm"])) for tensor in prepared} == {(("expert1",), 3)}


def test_means_are_taken_over_elements() -> None:
    group = Group(
        {"a": 1, "b": 3},
        {"a": {"ratio": 1.0}, "b": {"ratio": 0.0}},
        {"a": [{"density": 1.0}, {"density": 0.5}], "b": [{"density": 0.0}, {"density": 0.5}]},
    )
    assert group.numel == 4 and group.experts == 2
    assert group.mean("ratio") == 0.25 and group.means("density") == [0.25, 0.5]
