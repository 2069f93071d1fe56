from __future__ import annotations

import pytest
import torch

from engine.methods.arithmetic.damping import damp

TAU = torch.tensor([[1.0, -2.0, 4.0], [0.5, 8.0, -1.0]])


def test_inputs_keep_a_share_by_their_size() -> None:
    found = damp(TAU, torch.tensor([10.0, 5.0, 0.0]), 0.4)
    torch.testing.assert_close(found, torch.tensor([[0.4, -1.4, 4.0], [0.2, 5.6, -1.0]]))


@pytest.mark.parametrize(
    ("sizes", "omega"), [([1.0, 2.0, 3.0], 1.0), ([0.0, 0.0, 0.0], 0.2)], ids=["omega is 1", "no inputs"]
)
def test_nothing_is_damped(sizes: list[float], omega: float) -> None:
    assert torch.equal(damp(TAU, torch.tensor(sizes), omega), TAU)


def test_the_number_of_tokens_is_of_no_matter() -> None:
    sizes = torch.tensor([0.25, 2.0, 1.0])
    assert torch.equal(damp(TAU, sizes, 0.2), damp(TAU, 64 * sizes, 0.2))
