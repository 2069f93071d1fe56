"""States of real optimizers, in the forms in which trainers save them, and files that are none."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from advice import Advice, found, refusal
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.statistics.optimizer_state import squared_gradients

BETA = 0.9
ADVICE = Advice(__name__, {})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.first = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.second = nn.Linear(4, 4)
        self.unused = nn.Linear(2, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.second(self.norm(self.first(self.embed(ids))))
        return hidden


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def by_decay(model: nn.Module) -> Any:
    """The groups of the Trainer of transformers: with weight decay, and without."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]


def trained(groups: Callable[[nn.Module], Any]) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Tensor]]:
    """A model, its optimizer after three steps, and the mean of squares, computed from the gradients."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2, betas=(0.8, BETA))
    expected: dict[str, Tensor] = {}
    for step in range(3):
        optimizer.zero_grad()
        model(torch.tensor([step, 1, 4])).square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                before = expected.get(name, torch.zeros_like(parameter))
                expected[name] = BETA * before + (1 - BETA) * parameter.grad.square()
        optimizer.step()
    return model, optimizer, {name: tensor.detach() for name, tensor in expected.items()}


def agree(read: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(read) == set(expected) and "unused.weight" not in read
    for name, tensor in expected.items():
        assert read[name].dtype == torch.float32
        torch.testing.assert_close(read[name], tensor)


@pytest.mark.parametrize(
    "groups",
    [lambda model: model.named_parameters(), lambda model: model.parameters(), by_decay],
    ids=["names", "one group", "by decay"],
)
@pytest.mark.parametrize("place", [None, "optimizer", "optimizer_state_dict"])
def test_a_state_by_numbers(groups: Callable[[nn.Module], Any], place: str | None, tmp_path: Path) -> None:
    model, optimizer, expected = trained(groups)
    state = optimizer.state_dict()
    torch.save(state if place is None else {place: state, "step": 3}, tmp_path / "optimizer.pt")
    agree(dict(squared_gradients(tmp_path / "optimizer.pt", shapes(model))), expected)


@pytest.mark.parametrize("wrapper", ["", "module.", "_fsdp_wrapped_module.", "_orig_mod."])
def test_a_state_by_names(wrapper: str, tmp_path: Path) -> None:
    model, _, expected = trained(by_decay)
    state = {f"{wrapper}{name}": {"step": 3, "exp_avg_sq": tensor} for name, tensor in expected.items()}
    torch.save({"state": state, "param_groups": []}, tmp_path / "optimizer.bin")
    agree(dict(squared_gradients(tmp_path / "optimizer.bin", shapes(model))), expected)


def test_safetensors(tmp_path: Path) -> None:
    model, _, expected = trained(by_decay)
    tensors = {f"{name}.exp_avg_sq": tensor for name, tensor in expected.items()}
    tensors |= {f"{name}.exp_avg": -tensor for name, tensor in expected.items()}
    save_file(tensors, tmp_path / "state.safetensors")
    agree(dict(squared_gradients(tmp_path / "state.safetensors", shapes(model))), expected)


class Opened:
    """Opens a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    torch.save({"state": Opened(tmp_path / "ran")}, tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError) as caught:
        list(squared_gradients(tmp_path / "optimizer.pt", {}))
    assert caught.value.do and not (tmp_path / "ran").exists()


def flattened(path: Path) -> None:
    """The partition of one process, as ZeRO keeps it."""
    torch.save({"optimizer_state_dict": {"base_optimizer_state": {"state": {0: torch.ones(40)}}}}, path)


def quantized(path: Path) -> None:
    torch.save({"state": {0: {"state1": torch.ones(4), "exp_avg_sq": torch.ones(4, dtype=torch.uint8)}}}, path)


def unnamed(path: Path) -> None:
    """The state by numbers of a model that has one more parameter."""
    torch.save({"state": {0: {"exp_avg_sq": torch.ones(4)}}, "param_groups": [{"params": [0, 1]}]}, path)


@ADVICE.followed("do: {CONVERT}")
@pytest.mark.parametrize("write", [flattened, quantized, unnamed, lambda path: path.write_bytes(b"no archive")])
def test_the_advice_leads_to_a_file_that_is_read(write: Callable[[Path], Any], tmp_path: Path) -> None:
    model, optimizer, expected = trained(lambda model: model.parameters())
    write(tmp_path / "optimizer.pt")
    error = refusal(lambda: list(squared_gradients(tmp_path / "optimizer.pt", shapes(model))))
    assert found("`(exp_avg_sq)`.* by the names of the parameters, as safetensors", error)
    saved = {
        f"{name}.exp_avg_sq": optimizer.state[parameter]["exp_avg_sq"]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }
    save_file(saved, tmp_path / "state.safetensors")
    agree(dict(squared_gradients(tmp_path / "state.safetensors", shapes(model))), expected)


def legacy(state: Any, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def pickled(state: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(state))


@ADVICE.followed("do: {AGAIN}, or {CONVERT}")
@pytest.mark.parametrize("write", [legacy, pickled])
def test_a_file_that_is_no_zip_archive_can_be_saved_again(write: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    model, optimizer, expected = trained(lambda model: model.named_parameters())
    path = tmp_path / "optimizer.pt"
    write(optimizer.state_dict(), path)
    error = refusal(lambda: list(squared_gradients(path, shapes(model))))
    assert "zip archive" in error.what and "mmap" not in str(error)
    assert found("`(torch.load)` or `(pickle.load)`.* by `(torch.save)` again", error)
    loaded = torch.load(path, weights_only=False) if write is legacy else pickle.loads(path.read_bytes())
    torch.save(loaded, path)
    agree(dict(squared_gradients(path, shapes(model))), expected)


@pytest.mark.parametrize("content", [b"", b"P", b"no archive", pickle.dumps({"state": {}})])
def test_the_message_on_a_file_that_is_no_zip_archive(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").write_bytes(content)
    error = refusal(lambda: list(squared_gradients(tmp_path / "optimizer.pt", {})))
    assert "zip archive" in error.what and "mmap" not in str(error)


def test_every_advice_is_followed() -> None:
    ADVICE.check()


BROKEN: list[Callable[[Path], Any]] = [
    flattened,
    quantized,
    lambda path: path.write_bytes(b"no archive"),
    lambda path: path.write_bytes(pickle.dumps({"state": {}})),
    lambda path: path.mkdir(),
    lambda path: None,
    lambda path: torch.save([1, 2], path),
    lambda path: torch.save({"state": {}, "param_groups": []}, path),
]


@pytest.mark.parametrize("write", BROKEN)
def test_files_that_are_no_state(write: Callable[[Path], Any], tmp_path: Path) -> None:
    write(tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError):
        list(squared_gradients(tmp_path / "optimizer.pt", shapes(Model())))


def test_the_state_of_another_model(tmp_path: Path) -> None:
    model, optimizer, expected = trained(by_decay)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = shapes(model) | {"first.weight": (4, 5)}
    with pytest.raises(CheckpointError):
        list(squared_gradients(tmp_path / "optimizer.pt", other))
    save_file({"other.exp_avg_sq": torch.ones(2)}, tmp_path / "other.safetensors")
    save_file({"first.weight.exp_avg_sq": -expected["first.weight"]}, tmp_path / "negative.safetensors")
    save_file({"first.weight.exp_avg_sq": expected["first.weight"] / 0}, tmp_path / "infinite.safetensors")
    save_file(expected, tmp_path / "no_squares.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    for name in ("other", "negative", "infinite", "no_squares", "cut"):
        with pytest.raises(CheckpointError):
            list(squared_gradients(tmp_path / f"{name}.safetensors", shapes(model)))
