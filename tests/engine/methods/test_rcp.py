"""RCP-Merging beside its votes, counted sample by sample."""

from __future__ import annotations

import pytest
import torch
from one_tensor import Known, merged
from torch import Tensor

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
