"""The fits of a plan's layers beside a dense least-squares solution over the inputs, and what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import pytest
import torch
from conftest import plan_of
from one_tensor import Known, seen
from plain import task_vectors

from engine.methods.prepass import Prepass
from engine.methods.registry import _PREPASSES
from engine.planning.plan import Plan
from engine.shards.orthogonal import orthogonalise, with_orthogonal
from engine.shards.prepasses import measured
from engine.shards.projections import fit_layers
from engine.shards.statistics import MergeStatistics
from engine.statistics.files import StatisticsWriter
from engine.statistics.fits import (
    LEAST,
    LayerFit,
    described,
    starting_coefficients,
    total_residual,
    write_fits,
)
from engine.statistics.moments import Moments
from engine.storage.local_folder import LocalFolder
from engine.task_vectors.streams import TaskVectors

pytestmark = pytest.mark.usefixtures("one_thread")

Array = npt.NDArray[np.float64]
Q, DOWN = (f"model.layers.{number}.{part}.weight" for number, part in ((0, "self_attn.q_proj"), (1, "mlp.down_proj")))
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
TOKENS = (30, 50)
FACTS = {"base": {}, "model": {}, "data": "0" * 64, "sequences": 2, "tokens": 9, "dtype": "float32"}


def inputs(plan: Plan, name: str, k: int) -> torch.Tensor:
    """Return what a layer of expert k saw, a token a row, with directions that matter more than others."""
    features = plan.base_header.tensors[name].shape[1]
    drawn = torch.randn(TOKENS[k], features, generator=torch.Generator().manual_seed(7 * k + len(name)))
    return drawn * torch.linspace(0.1, 2, features)


@pytest.fixture(scope="module", params=["whole", "orthogonal"])
def plan(request: pytest.FixtureRequest, llama_merge: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A learned merge whose first expert has inputs of two layers, and whose second has those of one."""
    folders = [tmp_path_factory.mktemp(f"expert{k}") for k in range(2)]
    options = [
        "parameters.weight=closed_form",
        *(f"models.{k}.statistics={folder}" for k, folder in enumerate(folders)),
    ]
    options += [f"parameters.task_vectors={request.param}", *(f"models.{k}.parameters={{}}" for k in range(2))]
    plan = plan_of(llama_merge, *options)
    for k, folder in enumerate(folders):
        writer = StatisticsWriter(LocalFolder(folder))
        for name in (Q, DOWN):
            # No token of the second expert's samples reaches the other layer.
            x = inputs(plan, name, k)[: 0 if (name, k) == (DOWN, 1) else None]
            writer.moments([((name,), Moments(len(x), x.square().sum(0), x.abs().sum(0), x.T @ x))])
        writer.finish(**FACTS, kinds=("activations", "gram"))
    return plan


def dense(streams: TaskVectors, name: str) -> list[Array]:
    base = streams.base.read(name)
    found = []
    for task_vector in streams.of(name):
        out = torch.zeros(base.numel())
        if task_vector is not None:
            task_vector.block(0, base.numel(), base.reshape(-1).float(), out)
        found.append(out.view(base.shape).double().numpy())
    return found


def least_squares(used: Sequence[Array], own: Sequence[Array], xs: dict[int, Array]) -> tuple[Array, float, float]:
    """Return argmin Σₖ ‖(Σⱼ αⱼ·usedⱼ − ownₖ)·Xₖᵀ‖²/Nₖ, its value at 0, and the share of that which is left."""
    columns = [np.concatenate([(tau @ x.T).ravel() / len(x) ** 0.5 for x in xs.values()]) for tau in used]
    wanted = np.concatenate([(own[k] @ x.T).ravel() / len(x) ** 0.5 for k, x in xs.items()])
    matrix = np.stack(columns, axis=1)
    alpha = np.linalg.lstsq(matrix, wanted, rcond=None)[0]
    energy = float(wanted @ wanted)
    return alpha, energy, float(np.sum((matrix @ alpha - wanted) ** 2)) / energy


def check(plan: Plan, own: TaskVectors, used: TaskVectors) -> dict[str, LayerFit]:
    found = fit_layers(plan, own, used, MergeStatistics(plan, None), plan.merged)
    assert set(found) == {Q, DOWN}
    for name, experts in ((Q, (0, 1)), (DOWN, (0,))):
        xs = {k: inputs(plan, name, k).double().numpy() for k in experts}
        alpha, energy, residual = least_squares(dense(used, name), dense(own, name), xs)
        assert found[name].coefficients == pytest.approx(alpha, rel=1e-4, abs=1e-4)
        assert found[name].energy == pytest.approx(energy, rel=1e-5)
        assert found[name].residual == pytest.approx(residual, abs=1e-5)
    return found


def test_the_fits_are_the_least_squares_over_the_inputs(plan: Plan) -> None:
    own = task_vectors(plan)
    found = check(plan, own, own)
    assert 0 < found[Q].residual < 1
    # Of the second expert's inputs nothing is known: the first one's task vector alone meets all outputs.
    assert found[DOWN].coefficients == pytest.approx((1, 0), abs=1e-3) and found[DOWN].residual < 1e-5


def test_orthogonal_task_vectors_are_fitted_to_the_experts_own_outputs(plan: Plan, tmp_path: Path) -> None:
    own, state = task_vectors(plan), LocalFolder(tmp_path)
    orthogonalise(plan, own, state, plan.orthogonal)
    used = with_orthogonal(plan, own, state)
    assert (check(plan, own, used)[Q] == check(plan, own, own)[Q]) == (not plan.orthogonal)


def test_tensors_that_are_no_layers_have_no_fit(plan: Plan) -> None:
    own = task_vectors(plan)
    assert fit_layers(plan, own, own, MergeStatistics(plan, None), [NORM, EMBEDDING]) == {}


class Recorded:
    """Statistics that record on how many threads sums of torch run when they are read."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.threads = plan, set[int]()

    def of_experts(self, name: str, indices: Sequence[int]) -> list[Known]:
        self.threads.add(torch.get_num_threads())
        return [seen(inputs(self.plan, name, k).T.double()) for k in indices]


def test_sums_do_not_depend_on_the_number_of_threads(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Prepass("threads", "", lambda tensor: np.array([float(torch.get_num_threads())]), lambda *_: None)
    monkeypatch.setitem(_PREPASSES, "linear", (threads,))
    tensors: list[Any] = [type("Tensor", (), {"name": name}) for name in "abc"]
    torch.set_num_threads(2)
    try:
        found = []
        for number in (1, 3):
            streams, statistics = task_vectors(plan, number), Recorded(plan)
            found.append(fit_layers(plan, streams, streams, statistics, [Q, DOWN]))  # type: ignore[arg-type]
            assert statistics.threads == {1}
            assert measured(plan, "linear", 0, tensors, number) == {name: np.array([1.0]) for name in "abc"}
        assert found[0] == found[1] and set(found[0]) == {Q, DOWN}
    finally:
        torch.set_num_threads(1)


FITS = {
    "a": LayerFit((0.5, 0.25), 3.0, 0.2),
    "b": LayerFit((-0.5, 1.5), 1.0, 0.6),
    "c": LayerFit((0.0, 0.0), 0.0, 0.0),
}


def test_the_total_is_weighted_by_the_energy() -> None:
    assert total_residual(FITS) == pytest.approx((3 * 0.2 + 1 * 0.6) / 4)
    assert total_residual({"c": FITS["c"]}) == 0
    assert "70.0%" in described(FITS) and "3 linear" in described(FITS)
    assert "%" not in described({})


def test_learning_starts_within_its_bounds() -> None:
    priors, start = starting_coefficients(FITS)
    assert start == {"a": [0.5, 0.25], "b": [LEAST, 1 - LEAST], "c": [LEAST, LEAST]}
    assert priors == pytest.approx([(0.5 + 2 * LEAST) / 3, (0.25 + 1) / 3])
    assert starting_coefficients({}) == ([], {})


def test_the_file_has_a_row_for_each_layer_and_expert(tmp_path: Path) -> None:
    write_fits(tmp_path / "layers.parquet", FITS, ["x", "y"])
    table = pyarrow.parquet.read_table(tmp_path / "layers.parquet")
    assert table.column_names == ["tensor", "model", "coefficient", "energy", "residual"]
    rows = [tuple(row.values()) for row in table.to_pylist()]
    assert rows[:3] == [("a", "x", 0.5, 3.0, 0.2), ("a", "y", 0.25, 3.0, 0.2), ("b", "x", -0.5, 1.0, 0.6)]
    assert rows[4:] == [("c", "x", 0.0, 0.0, 0.0), ("c", "y", 0.0, 0.0, 0.0)]
