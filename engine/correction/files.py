"""The files of a calibration in the state of a run: the merged model, hidden states, shares, and solved tensors.

    merged/     a file per tensor of the merged model, as shards write it: merged ones float32, others as in the output
    calibrated/tokens/      token ids of an expert's samples, with the responses that it generated
    calibrated/streams/     hidden states of an expert's samples before a part
    calibrated/shares/      an expert's share in the equations of the layers of a part, and the list of them
    calibrated/solved/      solved tensors, float32
    calibrated/parts        the number of parts that are solved, and of all

Names contain hashes, since a tensor's name in a checkpoint may be any text (`../..`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from torch import Tensor

from engine.errors import DamagedError
from engine.storage.folder import Folder
from engine.storage.sealed import read_sealed, refuse, write_sealed

FOLDER, MERGED = "calibrated", "merged"
SOLVED_PARTS = f"{FOLDER}/parts"


@dataclass(frozen=True)
class SolvedLayer:
    """A linear layer, or a norm, that is solved.

    Attributes:
        name: Its name in the model.
        weight, bias: The names of its tensors in the output; None for a bias that is not solved.
        transposed: Whether its weight is [I, O].
    """

    name: str
    weight: str
    bias: str | None = None
    transposed: bool = False


@dataclass(frozen=True)
class LayerGroup:
    """Linear layers that share an input and are solved at a time, or one norm."""

    layers: tuple[SolvedLayer, ...]
    is_norm: bool = False

    @property
    def key(self) -> str:
        """A name for files."""
        return _hash("\n".join(layer.name for layer in self.layers))


@dataclass(frozen=True)
class Contribution:
    """The groups of layers of a part in which an expert has stored its shares, and the number of parts of the model."""

    groups: tuple[LayerGroup, ...]
    parts: int


_CONTRIBUTION, _PARTS = TypeAdapter(Contribution), TypeAdapter(tuple[int, int])


def merged_file(name: str) -> str:
    """Return the file of a tensor of the merged model."""
    return f"{MERGED}/{_hash(name)}.safetensors"


def solved_file(name: str) -> str:
    """Return the file of a solved tensor."""
    return f"{FOLDER}/solved/{_hash(name)}.safetensors"


def tokens_file(expert: int) -> str:
    """Return the file of the token ids of an expert's samples."""
    return f"{FOLDER}/tokens/{expert}.safetensors"


def stream_file(expert: int, part: int) -> str:
    """Return the file of the hidden states of an expert's samples before a part."""
    return f"{FOLDER}/streams/{expert}-{part}.safetensors"


def shares_folder(part: int) -> str:
    """Return the folder of all shares in a part."""
    return f"{FOLDER}/shares/{part}"


def share_file(part: int, expert: int, group: LayerGroup) -> str:
    """Return the file of an expert's share in the equations of a group."""
    return f"{shares_folder(part)}/{expert}-{group.key}.safetensors"


def save_contribution(state: Folder, part: int, expert: int, contribution: Contribution) -> None:
    """Store what an expert has shares in, which marks the shares as complete."""
    write_sealed(state, _list_file(part, expert), _CONTRIBUTION.dump_json(contribution))


def load_contribution(state: Folder, part: int, expert: int) -> Contribution | None:
    """Return what an expert has stored shares in, or None if they are not complete."""
    try:
        return _CONTRIBUTION.validate_json(read_sealed(state, _list_file(part, expert)))
    except (FileNotFoundError, DamagedError, ValueError):
        return None


def end_part(state: Folder, part: int, parts: int) -> None:
    """Note that a part is solved, of `parts` in all, and remove the shares in it."""
    write_sealed(state, SOLVED_PARTS, json.dumps([part + 1, parts]).encode())
    state.remove(shares_folder(part))


def load_solved_parts(state: Folder) -> tuple[int, int | None]:
    """Return the number of parts that are solved, and of all parts if it is known.

    Raises:
        DamagedError: the file is damaged.
    """
    try:
        done, parts = _PARTS.validate_json(read_sealed(state, SOLVED_PARTS))
    except FileNotFoundError:
        return 0, None
    except ValueError:
        refuse(f"{state.where}/{SOLVED_PARTS}")
    return done, parts


def save_tensors(state: Folder, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a sealed file."""
    write_sealed(
        state, name, safetensors.torch.save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
    )


def load_sealed_tensors(state: Folder, name: str) -> dict[str, Tensor]:
    """Read a file that `save_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedError: the file is damaged.
    """
    content = read_sealed(state, name)
    return _loaded(content, f"{state.where}/{name}")


def load_merged(state: Folder, name: str) -> Tensor:
    """Return a tensor of the merged model, as it was before the calibration.

    Raises:
        DamagedError: the file is damaged.
    """
    file = merged_file(name)
    where = f"{state.where}/{file}"
    tensors = _loaded(state.read(file), where)
    return tensors[name] if name in tensors else refuse(where)


def load_calibrated(state: Folder, name: str) -> Tensor:
    """Return a tensor of the merged model: solved, float32, if it is, else as it was."""
    file = solved_file(name)
    return load_sealed_tensors(state, file)["tensor"] if state.exists(file) else load_merged(state, name)


def _loaded(content: bytes, where: str) -> dict[str, Tensor]:
    """Return the tensors in a safetensors file, which `where` names in the error."""
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError):
        refuse(where)
    # Cloned: the alignment of a buffer varies, and the last bit of a matrix product depends on it.
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _list_file(part: int, expert: int) -> str:
    return f"{shares_folder(part)}/{expert}.json"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
