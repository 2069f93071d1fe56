"""Packing of tensors: every dtype and shape survives transport, and no more than the tensor's bytes travel."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from engine.codec import Packed, pack, pack_all, unpack, unpack_all
from engine.task_vectors.pieces import Piece

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
    torch.complex64,
]
SHAPES = [(), (1,), (5,), (3, 4), (2, 3, 4), (0,), (0, 3), (3, 0, 2)]


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(int(np.prod(shape))).reshape(shape) % 7).to(dtype)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*flat)


def travelled(packed: Packed) -> Packed:
    """Return the packed tensor as another process receives it."""
    arrived: Packed = pickle.loads(pickle.dumps(packed, protocol=5))
    return arrived


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tensor_arrives_as_it_left(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = numbers(shape, dtype)
    packed = pack(tensor)
    assert packed.data.dtype == np.uint8 and packed.data.ndim == 1
    assert packed.nbytes == tensor.numel() * tensor.element_size()
    assert same_bytes(unpack(travelled(packed)), tensor)
    assert same_bytes(unpack(packed), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_special_numbers_keep_their_bits(dtype: torch.dtype) -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 3.0e38]).to(dtype)
    assert same_bytes(unpack(travelled(pack(tensor))), tensor)


VIEWS = {
    "rows": lambda whole: whole[10:12],
    "columns": lambda whole: whole[:, 3:5],
    "transposed": lambda whole: whole[:4].T,
    "every-other": lambda whole: whole[::2, 1],
    "one": lambda whole: whole[3, 3],
    "expanded": lambda whole: whole[:1].expand(3, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_only_the_bytes_of_a_view_travel(view: object, dtype: torch.dtype) -> None:
    tensor = view(numbers((1000, 100), dtype))  # type: ignore[operator]
    packed = pack(tensor)
    assert packed.nbytes == tensor.numel() * tensor.element_size()
    assert len(pickle.dumps(packed, protocol=5)) < packed.nbytes + 1000
    assert same_bytes(unpack(travelled(packed)), tensor)


def test_a_parameter_and_its_gradient_travel_without_their_graph() -> None:
    parameter = torch.nn.Parameter(numbers((3, 4), torch.float32))
    (parameter**2).sum().backward()
    assert parameter.grad is not None
    assert not unpack(travelled(pack(parameter))).requires_grad
    assert same_bytes(unpack(travelled(pack(parameter))), parameter.detach())
    assert same_bytes(unpack(travelled(pack(parameter.grad))), parameter.grad)


def test_packing_a_contiguous_tensor_copies_nothing() -> None:
    tensor = numbers((8, 8), torch.float32)
    assert pack(tensor).data.ctypes.data == tensor.data_ptr()
    assert pack(tensor[2:4]).data.ctypes.data == tensor[2:4].data_ptr()


@pytest.fixture
def _torch_warns_every_time() -> Iterator[None]:
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.usefixtures("_torch_warns_every_time")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unpacking_a_read_only_array_is_silent_and_copies_nothing(dtype: torch.dtype) -> None:
    tensor = numbers((3, 4), dtype)
    packed = travelled(pack(tensor))
    packed.data.setflags(write=False)
    with pytest.warns(UserWarning, match="not writable"):
        torch.from_numpy(packed.data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unpacked = unpack(packed)
    assert unpacked.data_ptr() == packed.data.ctypes.data
    assert same_bytes(unpacked, tensor)


def test_several_tensors_keep_their_names_and_order() -> None:
    tensors = {"b": numbers((3,), torch.bfloat16), "a": numbers((), torch.int64), "c": numbers((0, 2), torch.float32)}
    packed = pack_all(tensors)
    unpacked = unpack_all(packed)
    assert list(packed) == list(unpacked) == ["b", "a", "c"]
    assert all(same_bytes(unpacked[name], tensor) for name, tensor in tensors.items())


def test_pieces_of_tensors_keep_their_keys_and_share_their_memory() -> None:
    whole = numbers((100,), torch.float32)
    parts = {Piece("w", start, start + 40): whole[start : start + 40] for start in (40, 0)}
    packed = pack_all(parts)
    assert [value.data.ctypes.data for value in packed.values()] == [part.data_ptr() for part in parts.values()]
    arrived = unpack_all({piece: travelled(value) for piece, value in packed.items()})
    assert list(arrived) == [Piece("w", 40, 80), Piece("w", 0, 40)]
    assert all(same_bytes(arrived[piece], part) for piece, part in parts.items())
