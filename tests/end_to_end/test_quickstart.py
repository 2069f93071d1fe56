"""The parts of the quickstart that no other test runs; `make demo` takes too long for the test suite."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import plan_of

from engine.planning.factors import decomposed
from engine.planning.open_models import open_base, open_expert, open_task_vectors
from engine.shards.orthogonal import orthogonalise, with_orthogonal
from engine.storage.paths import open_folder

QUICKSTART = Path(__file__).parent.parent.parent / "examples" / "quickstart"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(QUICKSTART)


@pytest.mark.parametrize("script", sorted(path.stem for path in QUICKSTART.glob("*.py")))
def test_every_script_finds_what_it_imports(script: str) -> None:
    assert importlib.import_module(script).__doc__
    assert Path(sys.modules[script].__file__ or "").parent == QUICKSTART


def test_one_model_is_set_from_any_coefficients(llama_merge: Path) -> None:
    from merged_models import MergedModels

    plan = plan_of(llama_merge)
    models, base = MergedModels(plan), open_base(plan)
    before = {name: base.read(name).clone() for name in plan.base_header.tensors}
    for k, expert in enumerate(plan.experts):
        weights = dict(models.set(models.expert(k)).named_parameters())
        for name in plan.merged:
            torch.testing.assert_close(weights[name].detach(), open_expert(expert).checkpoint.read(name))
    weights = dict(models.set(models.constant([0.0] * len(plan.experts))).named_parameters())
    for name, tensor in before.items():
        assert torch.equal(weights[name], tensor), name
        assert torch.equal(base.read(name), tensor), "the file is unchanged"


def test_orthogonal_task_vectors_are_those_of_a_merge(llama_merge: Path, tmp_path: Path) -> None:
    from merged_models import MergedModels

    plan = plan_of(llama_merge, "parameters.task_vectors=orthogonal")
    models, state = MergedModels(plan, tmp_path / "models"), open_folder(tmp_path / "merge")
    streams = open_task_vectors(plan, 1)
    orthogonalise(plan, streams, state, decomposed(plan))
    streams, one = with_orthogonal(plan, streams, state), models.constant([1.0, 0.0])
    for name, weight in models.set(one).named_parameters():
        if name in plan.orthogonal_set:
            change = weight.detach().flatten() - streams.base.read(name).flatten()
            task_vector = streams.experts[0][1].task_vector(name)
            assert task_vector is not None
            tau = torch.empty_like(change)
            task_vector.block(0, len(tau), streams.base.read(name).float().flatten(), tau)
            torch.testing.assert_close(change, tau, atol=1e-5, rtol=1e-4)


def test_scores_are_those_of_one_chat_at_a_time(llama_merge: Path) -> None:
    from merged_models import MergedModels
    from scoring import score_rows

    model = MergedModels(plan_of(llama_merge)).model
    random = torch.Generator().manual_seed(1)
    chats = [[3, 5, 8, *torch.randint(60, (length,), generator=random).tolist()] for length in (9, 4, 6, 4)]
    rows = [(chat, len(chat) - 2) for chat in chats]
    # The model's own answers are right, another one is not.
    rows.append(([*chats[0][:-2], *greedy(model, chats[0][:-2], 2)], len(chats[0]) - 2))
    losses = [torch.log_softmax(model(torch.tensor([chat])).logits[0, -3:-1], -1) for chat, _ in rows]
    expected = -torch.stack([loss[[0, 1], chat[-2:]].sum() for loss, (chat, _) in zip(losses, rows, strict=True)])
    scored = score_rows(model, rows)
    right = sum(greedy(model, chat[:-2], 2) == chat[-2:] for chat, _ in rows)
    assert scored.exact_match == 100 * right / len(rows) > 0
    assert scored.loss == pytest.approx(expected.sum().item() / (2 * len(rows)), rel=1e-4)


def greedy(model: Any, ids: list[int], tokens: int) -> list[int]:
    """Return the most likely next tokens."""
    ids = list(ids)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-tokens:]
