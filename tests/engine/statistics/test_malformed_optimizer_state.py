"""Files of `torch.save` with values of wrong types in the place of an optimizer's state: each is refused."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from advice import refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import CheckpointError
from engine.statistics.optimizer_state import squared_gradients

SHAPES: dict[str, tuple[int, ...]] = {"w": (2, 2), "b": (2,)}


def of_two() -> dict[str, Any]:
    """The state of a model with the parameters of SHAPES."""
    state = {0: {"step": 3, "exp_avg_sq": torch.ones(2, 2)}, 1: {"step": 3, "exp_avg_sq": torch.ones(2)}}
    return {"state": state, "param_groups": [{"params": [0, 1], "param_names": ["w", "b"]}]}


def refused(state: Any, path: Path) -> CheckpointError:
    torch.save(state, path)
    error = refusal(lambda: list(squared_gradients(path, SHAPES)))
    assert isinstance(error, CheckpointError)
    assert error.what and error.where == str(path) and error.expected and error.do
    return error


GROUPS: list[Any] = [
    None,
    5,
    [5],
    [{"params": 5}],
    [{"params": None}],
    [{"params": "01"}],
    [{"params": {0: 1, 1: 2}}],
    [{"params": torch.tensor([0, 1])}],
    [{"params": [[0], {1: 2}]}],
    [{"params": [0.0, 1.0]}],
    [{"params": [False, True]}],
    [{"params": [torch.tensor(0), torch.tensor(1)]}],
    [{"params": [0, 1], "param_names": 5}],
    [{"params": [0, 1], "param_names": "wb"}],
    [{"params": [0, 1], "param_names": [0, 1]}],
    [{"params": [0, 1], "param_names": [["w"], ["b"]]}],
    [{"params": [0, 1], "param_names": ["w", None]}],
]


@pytest.mark.parametrize("groups", GROUPS, ids=range(len(GROUPS)))
def test_groups_that_do_not_list_parameters(groups: Any, tmp_path: Path) -> None:
    assert "`param_groups`" in refused(of_two() | {"param_groups": groups}, tmp_path / "optimizer.pt").what


SQUARES: list[Any] = [
    None,
    1.0,
    [[1.0, 1.0], [1.0, 1.0]],
    torch.ones(2, 2, device="meta"),
    torch.ones(2, 2).to_sparse(),
    torch.ones(2, 2, dtype=torch.int64),
    torch.ones(2, 2, dtype=torch.complex64),
    torch.ones(2, 2).to(torch.float8_e4m3fn),
    torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
]


@pytest.mark.parametrize("squares", SQUARES, ids=range(len(SQUARES)))
@pytest.mark.parametrize("by_name", [True, False])
def test_squares_that_are_no_dense_tensor_of_floats(squares: Any, by_name: bool, tmp_path: Path) -> None:
    saved = of_two()
    saved["state"][0]["exp_avg_sq"] = squares
    if by_name:
        saved = {"state": {"w": saved["state"][0], "b": saved["state"][1]}}
    what = refused(saved, tmp_path / "optimizer.pt").what
    assert what.startswith(("w." if by_name else "0.") + "exp_avg_sq") and "dispatch" not in what


@pytest.mark.parametrize("key", [1.0, True, None, (1,), b"b", "b"], ids=repr)
def test_states_by_neither_names_nor_numbers(key: Any, tmp_path: Path) -> None:
    saved = of_two()
    saved["state"][key] = saved["state"].pop(1)
    assert "neither names alone nor numbers alone" in refused(saved, tmp_path / "optimizer.pt").what


def test_attributes_in_a_file_do_not_replace_methods(tmp_path: Path) -> None:
    saved = OrderedDict(of_two())
    state = saved["state"][0] = OrderedDict(saved["state"][0])
    tensor: Any = state["exp_avg_sq"]
    for value, names in ((saved, ["get", "keys"]), (state, ["get", "keys"]), (tensor, ["float", "is_floating_point"])):
        for name in names:
            setattr(value, name, 5)
    torch.save(saved, tmp_path / "optimizer.pt")
    read = dict(squared_gradients(tmp_path / "optimizer.pt", SHAPES))
    assert set(read) == {"w", "b"} and torch.equal(read["w"], torch.ones(2, 2))


TENSORS = st.sampled_from([torch.ones(2), torch.ones(2, 2), torch.ones(2, device="meta"), torch.ones(2, 2).to_sparse()])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4)
KEYS = (
    st.integers(0, 2) | st.sampled_from(["state", "param_groups", "params", "param_names", "exp_avg_sq", "w"]) | PLAIN
)
ANYTHING = st.recursive(
    PLAIN | TENSORS,
    lambda parts: (
        st.lists(parts, max_size=3) | st.tuples(parts, parts) | st.dictionaries(KEYS.filter(hash), parts, max_size=3)
    ),
    max_leaves=6,
)
QUICK = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@QUICK
@given(st.data())
def test_a_state_with_anything_in_the_place_of_a_part_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    saved: Any = {"optimizer": of_two()}
    part = saved
    while True:
        key = data.draw(st.sampled_from(list(part) if isinstance(part, dict) else range(len(part))))
        if not isinstance(part[key], dict | list) or data.draw(st.integers(0, 3)) == 0:
            break
        part = part[key]
    part[key] = data.draw(ANYTHING)
    torch.save(saved, tmp_path / "optimizer.pt")
    with suppress(CheckpointError):
        for name, tensor in squared_gradients(tmp_path / "optimizer.pt", SHAPES):
            assert torch.equal(tensor, torch.ones(SHAPES[name]))


def test_a_cut_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "optimizer.pt"
    torch.save(of_two(), path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in parts if name.endswith("/data.pkl"))
    for size in range(len(parts[name])):
        with zipfile.ZipFile(path, "w") as archive:
            for other, content in parts.items():
                archive.writestr(other, content[:size] if other == name else content)
        refusal(lambda: list(squared_gradients(path, SHAPES)))
