"""The parts of the quickstart that no other test runs; `make demo` takes too long for the test suite."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from conftest import plan_of

from engine.planning.open_models import open_base, open_expert

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
