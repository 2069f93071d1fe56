"""Groups and merged experts against dense references, written from the papers' equations."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.compression.grouping import cosines, kmeans_groups, nearest_groups, pseudo_groups, ream_distances
from engine.compression.layers import group_layer, merge_group, router_rows
from engine.compression.merging import (
    GatedExpert,
    matching,
    subspace_mean,
    unit_distances,
    weight_products,
    weighted_mean,
)
from engine.compression.usage import LayerUse, activation_distances
from engine.methods.compression import Compression

EXPERTS, UNITS, FEATURES, TOP = 6, 5, 4, 2


class Dense:
    """A mixture whose router takes the softmax of all logits, and sums the best experts by their scores."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.count = EXPERTS
        self.router = torch.randn(EXPERTS, FEATURES, generator=generator)
        shapes = (UNITS, FEATURES), (UNITS, FEATURES), (FEATURES, UNITS)
        self.experts = [
            GatedExpert(*(torch.randn(*shape, generator=generator) for shape in shapes)) for _ in range(EXPERTS)
        ]
        self.inputs = [torch.randn(length, FEATURES, generator=generator) for length in (9, 4, 12)]

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = x_TH @ self.router.T
        scores = logits.softmax(-1)
        weights, chosen = scores.topk(TOP)
        return logits, scores, weights, chosen

    def units(self, expert: int, x_TH: Tensor) -> Tensor:
        one = self.experts[expert]
        return F.silu(x_TH @ one.gate.T) * (x_TH @ one.up.T)

    def output(self, expert: int, units_TI: Tensor) -> Tensor:
        return units_TI @ self.experts[expert].down.T

    def of(self, expert: int, x_TH: Tensor) -> Tensor:
        return self.output(expert, self.units(expert, x_TH))


def close(found: Any, expected: Any) -> None:
    """Check that both are equal as float32, in which experts are merged."""
    torch.testing.assert_close(torch.as_tensor(found).float(), torch.as_tensor(expected).float())


def test_statistics_are_those_of_every_token_and_expert() -> None:
    dense = Dense()
    use = LayerUse(dense, dense.inputs, outputs=True)
    x_TH = torch.cat(dense.inputs)
    logits, scores, weights, chosen = dense.route(x_TH)
    outputs = torch.stack([dense.of(expert, x_TH) for expert in range(EXPERTS)])
    for expert in range(EXPERTS):
        tokens = [(t, k) for t in range(len(x_TH)) for k in range(TOP) if chosen[t, k] == expert]
        assert use.counts_E[expert] == len(tokens)
        mean = sum(float(weights[t, k] * outputs[expert, t].norm()) for t, k in tokens) / max(len(tokens), 1)
        assert use.saliency_E[expert] == pytest.approx(mean, rel=1e-5)
    close(use.outputs_EH, (outputs * scores.T[:, :, None]).mean(1))
    close(use.logits_EE, logits.T @ logits)
    alike = F.cosine_similarity(outputs[:, None], outputs[None], dim=-1).mean(-1)
    close(use.alike_EE, alike)


def test_without_outputs_the_router_alone_is_asked() -> None:
    dense = Dense()
    use = LayerUse(dense, dense.inputs, outputs=False)
    assert use.counts_E.sum() == TOP * sum(map(len, dense.inputs))
    assert not use.saliency_E.any() and not use.alike_EE.any()


def test_activation_distances_are_those_of_unit_vectors_over_all_tokens() -> None:
    dense = Dense()
    x_TH = torch.cat(dense.inputs)
    found = activation_distances(dense, dense.inputs, 1, 4)
    ours, theirs = (F.normalize(dense.units(expert, x_TH), dim=0) for expert in (1, 4))
    close(found, torch.cdist(ours.T, theirs.T))


def test_a_unit_without_activations_is_as_far_from_all_others() -> None:
    ours, theirs = torch.zeros(1, 3), torch.tensor([[3.0, 0, 4], [0, 0, 0]])
    found = unit_distances(ours @ theirs.T, ours.square().sum(1), theirs.square().sum(1))
    close(found, [[1.0, 0.0]])


def test_distances_of_ream_are_the_mean_of_outputs_and_router() -> None:
    generator = np.random.default_rng(0)
    outputs, logits = generator.normal(size=(4, 3)), generator.normal(size=(50, 4))
    found = ream_distances(outputs, logits.T @ logits)
    unit = logits / np.linalg.norm(logits, axis=0)
    apart = np.array([[np.linalg.norm(unit[:, i] - unit[:, j]) for j in range(4)] for i in range(4)])
    for i, j in itertools.product(range(4), repeat=2):
        cosine = outputs[i] @ outputs[j] / np.linalg.norm(outputs[i]) / np.linalg.norm(outputs[j])
        assert found[i, j] == pytest.approx(1 - ((1 + cosine) / 2 + 1 - apart[i, j] / apart.max()) / 2, abs=1e-6)


def test_the_most_salient_experts_absorb_their_neighbours_up_to_the_size() -> None:
    place = np.array([0.0, 0.1, 0.2, 5.0, 5.1, 9.0])
    distance = np.abs(place[:, None] - place)
    saliency = np.array([3.0, 1, 1, 9, 2, 4])
    # 3 first, which takes up to two others, and leaves nothing near to 5 and 0 but what is farther.
    assert pseudo_groups(distance, saliency, 3, 2) == ((0, 1), (3, 4), (5, 2))
    assert pseudo_groups(distance, saliency, 3, 4) == ((0,), (3, 4, 2, 1), (5,))


def test_experts_join_the_most_similar_of_the_most_used() -> None:
    similarity = np.eye(5)
    similarity[1, 0] = similarity[2, 4] = 0.5
    similarity[3, [0, 4]] = 0.3  # of equally similar ones the first
    assert nearest_groups(similarity, np.array([5.0, 1, 2, 0, 4]), 2) == ((0, 1, 3), (4, 2))


def test_clusters_of_points_are_found_and_led_by_the_most_used() -> None:
    points = np.array([[0.0, 0], [10, 0], [0, 1], [10, 1], [5, 20]])
    assert kmeans_groups(points, np.array([1.0, 3, 2, 0, 0]), 3) == ((1, 3), (2, 0), (4,))


def test_equal_points_give_as_many_clusters_as_are_asked_for() -> None:
    groups = kmeans_groups(np.zeros((6, 2)), np.arange(6.0), 4)
    assert len(groups) == 4 and sorted(itertools.chain(*groups)) == list(range(6))


@pytest.mark.parametrize("method", ["ream", "m_smoe", "sub_moe"])
def test_as_many_groups_as_experts_change_nothing(method: Any) -> None:
    dense = Dense()
    found = group_layer(dense, dense.inputs, Compression(method=method, experts=EXPERTS), EXPERTS)
    assert found.groups == tuple((expert,) for expert in range(EXPERTS))


@pytest.mark.parametrize("method", ["ream", "m_smoe", "sub_moe"])
def test_experts_of_different_ranges_stay_apart(method: Any) -> None:
    dense = Dense()
    found = group_layer(dense, dense.inputs, Compression(method=method, experts=2, group_size=3), 2, ranges=2)
    assert [sorted(group) for group in found.groups] == [[0, 1, 2], [3, 4, 5]]


def test_the_matching_is_the_cheapest_of_all_orders() -> None:
    cost = torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = min(itertools.permutations(range(5)), key=lambda order: sum(cost[i, j] for i, j in enumerate(order)))
    assert tuple(matching(cost).tolist()) == best


@pytest.mark.parametrize("alignment", ["activations", "weights"])
def test_permuted_units_are_put_back_into_order(alignment: Any) -> None:
    dense, order = Dense(), torch.tensor([3, 0, 4, 1, 2])
    dense.experts[5] = dense.experts[2].in_order(order)
    settings = Compression(method="m_smoe", experts=5, align=alignment)
    merged = merge_group(dense, dense.inputs, settings, dense.experts.__getitem__, (2, 5), (0.25, 0.75))
    for name in ("gate", "up", "down"):
        close(getattr(merged, name), getattr(dense.experts[2], name))


def test_weight_matching_gives_the_least_distance_of_all_weights() -> None:
    ours, theirs = Dense(0).experts[0], Dense(1).experts[0]
    found = matching(weight_products(ours, theirs))

    def apart(order: Any) -> float:
        return float((ours.units - theirs.in_order(torch.tensor(order)).units).square().sum())

    assert apart(found.tolist()) == pytest.approx(min(map(apart, itertools.permutations(range(UNITS)))))


def test_the_mean_is_weighted_by_the_shares() -> None:
    dense, shares = Dense(), (0.5, 0.3, 0.2)
    chosen = [dense.experts[expert] for expert in (0, 2, 3)]
    found = weighted_mean(chosen, shares)
    for name in ("gate", "up", "down"):
        expected = sum(share * getattr(one, name).double() for one, share in zip(chosen, shares, strict=True))
        close(getattr(found, name).double(), expected)


@pytest.mark.parametrize("rank", [0.4, 1.0])
def test_the_subspace_mean_is_that_of_the_right_singular_vectors(rank: float) -> None:
    dense, shares = Dense(), (0.7, 0.3)
    chosen = [dense.experts[expert] for expert in (1, 4)]
    found = subspace_mean(chosen, shares, rank)
    for name in ("gate", "up", "down"):
        left, values, right = np.linalg.svd(np.hstack([getattr(one, name).double().numpy() for one in chosen]), False)
        kept = round(rank * len(values))
        halves = np.split(right[:kept], 2, axis=1)
        merged = shares[0] * halves[0] + shares[1] * halves[1]
        close(getattr(found, name).double(), left[:, :kept] @ np.diag(values[:kept]) @ merged)


def test_the_rows_of_the_router_are_the_dominant_ones_or_the_mean() -> None:
    dense = Dense()
    found = group_layer(dense, dense.inputs, Compression(method="m_smoe", experts=2), 2)
    assert torch.equal(router_rows(dense.router, found, "m_smoe"), dense.router[[group[0] for group in found.groups]])
    means = [
        sum(
            dense.router[expert] * (use / sum(found.counts_E[list(group)]))
            for expert, use in zip(group, found.counts_E[list(group)], strict=True)
        )
        for group in found.groups
    ]
    close(router_rows(dense.router, found, "sub_moe").double(), torch.stack(means).double())


def test_cosines_of_a_zero_vector_are_zero() -> None:
    vectors = np.array([[3.0, 0], [0, 0], [1, 1]])
    found = cosines(vectors @ vectors.T)
    assert found[1].tolist() == [0, 1, 0] and found[0, 2] == pytest.approx(2**-0.5)
