"""RCP-Merging beside its votes, counted sample by sample."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from conftest import plan_of
from one_tensor import Known, merged
from torch import Tensor
from transformers import AutoModelForCausalLM
from weight_space import combine, read

from engine.calibration.samples import Sample
from engine.learning.frozen_expert import FrozenExpert
from engine.learning.statistics import collect
from engine.storage.local_folder import LocalFolder

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE, EXPERTS = (12, 40), 3


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


BASE = normal(*SHAPE, seed=0)
TAUS = [normal(*SHAPE, seed=1 + k) for k in range(EXPERTS)]
SQUARE = 1e-4 * normal(*SHAPE, seed=9).square()


def sensitivities(samples: int, d: int) -> Tensor:
    """g∘θ of each sample, with elements of no gradient at all."""
    values = normal(samples, *SHAPE, seed=20 + d) - 0.5
    return torch.where(normal(*SHAPE, seed=30 + d) < -1, 0, values)


def known(samples: int) -> list[Known]:
    medians = [sensitivities(samples, d).sort(dim=0).values[samples // 2] for d in (1, 2)]
    return [Known(square=SQUARE), *(Known(median=median) for median in medians)]


@pytest.mark.parametrize("samples", [1, 4, 5])
@pytest.mark.parametrize("penalty", [0.0, 1000.0])
def test_an_element_is_added_where_most_samples_vote_for_it(samples: int, penalty: float) -> None:
    expected = BASE + TAUS[0]
    for d in (1, 2):
        votes = torch.zeros(SHAPE, dtype=torch.int64)
        for value in sensitivities(samples, d):
            votes += torch.where(value + penalty * (SQUARE * (TAUS[0] - TAUS[d]).square()) <= 0, 1, -1)
        assert 0.1 < float((votes > 0).float().mean()) < 0.9
        expected = expected + TAUS[d] * (votes > 0)
    found = merged("rcp", BASE, TAUS, known(samples), penalty=penalty)
    # Where a rounding decided otherwise, an element of a task vector were missing.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_elements_without_gradients_are_added() -> None:
    found = merged("rcp", BASE, TAUS, [Known()] * EXPERTS)
    torch.testing.assert_close(found, BASE + sum(TAUS, torch.zeros(())))


def test_an_element_that_matters_to_reasoning_alone_is_kept() -> None:
    found = merged("rcp", BASE, TAUS, [Known(square=SQUARE), Known(), Known()])
    torch.testing.assert_close(found, BASE + TAUS[0])


def test_experts_that_change_nothing_leave_the_reasoning_model() -> None:
    found = merged("rcp", BASE, [TAUS[0], None, None], known(5))
    torch.testing.assert_close(found, BASE + TAUS[0])


def test_the_tensor_is_read_by_its_statistics_alone() -> None:
    """The votes are element by element, so the rows of a tensor are merged as the tensor is."""
    rows = slice(3, 7)
    parts = [
        Known(*(None, None), *(None if one is None else one[rows] for one in (of.square, of.median))) for of in known(5)
    ]
    found = merged("rcp", BASE[rows], [tau[rows] for tau in TAUS], parts)
    assert torch.equal(found, merged("rcp", BASE, TAUS, known(5))[rows])


def test_a_merge_of_models_is_that_of_the_votes_of_their_samples(tmp_path: Path) -> None:
    """Two domain experts put into a reasoning model, beside the gradients of transformers' own loss."""
    config = tiny.make_merge(tmp_path / "merge", experts=EXPERTS)
    ids = [[(5, 9, 33, 12), (3, 8, 2), (17, 3, 3, 30)], [(4, 6, 5), (40, 41)], [(7, 8, 9), (1, 2, 3), (9, 9, 2, 6)]]
    options = ["merge_method=rcp", "exclude=[]", "parameters.penalty=1e7"]
    plan = plan_of(config, *options, *(f"models.{k}.statistics={tmp_path / str(k)}" for k in range(EXPERTS)))
    for k, own in enumerate(ids):
        given = [(Sample(k, index, tokens, "here"), {}) for index, tokens in enumerate(own)]
        model = FrozenExpert(plan, k, torch.device("cpu"))
        collect(model, given, ["sensitivity"], LocalFolder(tmp_path / str(k)), {"base": {}, "model": {}})

    base = dict(AutoModelForCausalLM.from_pretrained(config.parent / "base").named_parameters())
    models = [AutoModelForCausalLM.from_pretrained(config.parent / f"expert{k}").eval() for k in range(EXPERTS)]
    weights = [{name: one.detach() for name, one in model.named_parameters()} for model in models]
    scores: list[list[dict[str, Tensor]]] = []
    for model, own in zip(models, ids, strict=True):
        scores.append([])
        for tokens in map(torch.tensor, own):
            loss = model(tokens[None], labels=tokens[None]).loss
            model.zero_grad()
            loss.backward()
            scores[-1].append({name: one.grad * one.detach() for name, one in model.named_parameters()})

    one, two = (read(combine(plan, tmp_path / f"by {shards}", shards)) for shards in (1, 2))
    assert one.keys() == two.keys() == base.keys()
    added = 0
    for name, found in one.items():
        assert torch.equal(found, two[name])
        square = sum(score[name].square() for score in scores[0]) / len(ids[0])
        expected, unsure = weights[0][name].clone(), torch.zeros_like(found, dtype=torch.bool)
        for d in (1, 2):
            votes = torch.zeros_like(found)
            harm = 1e7 * square * (weights[0][name] - weights[d][name]).square()
            for sample in scores[d]:
                votes += torch.where(sample[name] + harm <= 0, 1, -1)
                # Both are computed by float32: one may decide otherwise where the terms cancel.
                unsure |= (harm > 0) & ((sample[name] + harm).abs() < 1e-3 * harm)
            expected += (weights[d][name] - base[name].detach()) * (votes > 0)
            added += int((votes > 0).sum())
        assert float(unsure.float().mean()) < 0.02
        torch.testing.assert_close(found[~unsure], expected[~unsure], rtol=0, atol=1e-6)
    assert 0.1 < added / sum(map(torch.numel, one.values())) / 2 < 0.9
