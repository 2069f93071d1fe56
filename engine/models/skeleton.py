"""Models built on the meta device and then filled with weights tensor by tensor, so that nothing is allocated twice."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import Tensor
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from engine.checkpoints.headers import TEXT_SECTIONS, TensorHeader
from engine.checkpoints.structure import Place
from engine.models.devices import ONE_DEVICE, DeviceMap, Room, device_map, device_of, dispatch
from engine.models.forward import language_model
from engine.models.internvl import set_image_token
from engine.models.loading import greedy, is_remote, load_generation_config, reading
from engine.models.names import Places, check_filled, match_names, tied_weights
from engine.transfers import is_gpu, moved

# Threads that read weights and copy them to GPUs.
READERS = 8


def build_skeleton(
    config: Any, tensors: Mapping[str, TensorHeader], dtype: torch.dtype, folder: Path
) -> tuple[Any, Places]:
    """Build a causal or image-text-to-text model on the meta device.

    If the config ties the head to the embedding but the files hold both, the model is built untied, because the two
    tensors may differ. `folder` holds the config and the tensors; it is named in errors.

    Returns:
        The model in evaluation mode, and the place of each tensor in it, by its name in the files.

    Raises:
        CheckpointError: transformers cannot build the architecture, a tensor matches no parameter or has another shape,
            or a parameter has no tensor.
    """
    model = _build(config, dtype, folder)
    places = match_names(model, tensors, folder)
    if {place.parameter for place in places.values()} & set(tied_weights(model)):
        for section in sections(config):
            section.tie_word_embeddings = False
        model = _build(config, dtype, folder)
        places = match_names(model, tensors, folder)
    check_filled(model, places, tensors, folder)
    return model.eval(), places


def sections(config: Any) -> list[Any]:
    """Return the configs that may decide whether the head is tied: the outer one, and that of the language model."""
    return [config, *(getattr(config, key, config) for key in TEXT_SECTIONS)]


def build_generation_skeleton(
    config: Any, tensors: Mapping[str, TensorHeader], dtype: torch.dtype, folder: Path
) -> tuple[Any, Places]:
    """Build a model as `build_skeleton` does, which decodes greedily with the end tokens of the folder's files.

    Raises:
        CheckpointError: See `build_skeleton` and `load_generation_config`.
    """
    model, places = build_skeleton(config, tensors, dtype, folder)
    language, of_folder = language_model(model), load_generation_config(folder)
    language.generation_config = greedy(language.generation_config) if of_folder is None else of_folder
    return model, places


def load_weights(
    model: Any,
    places: Places,
    dtype: torch.dtype,
    device: torch.device,
    tokenizer_folder: Path,
    read: Callable[[str], Tensor | None],
    room: Room = ONE_DEVICE,
) -> None:
    """Fill a skeleton with weights, on `device` and the other GPUs of `room`, ready to run forward.

    Args:
        read: See `fill`.
        tokenizer_folder: Folder of the tokenizer that gives an original InternVL model the id of its image token.

    Raises:
        ClusterError: The model does not fit on the GPUs.
        CheckpointError: See `set_image_token`.
    """
    fill(model, places, device_map(model, dtype, device, room), dtype, read)
    set_image_token(model, tokenizer_folder)


def fill(
    model: Any, places: Places, devices: DeviceMap, dtype: torch.dtype, read: Callable[[str], Tensor | None]
) -> None:
    """Set all parameters and buffers of a module with `set_weights`. Parameters require no gradient afterwards."""
    set_weights(model, places, devices, dtype, read)
    unfilled = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not unfilled, f"not filled: {unfilled}"
    model.requires_grad_(False)
    dispatch(model, devices)


def set_weights(
    model: Any, places: Places, devices: DeviceMap, dtype: torch.dtype, read: Callable[[str], Tensor | None]
) -> None:
    """Set the parameters and buffers of a module that have places, without a copy where none is needed.

    `read` returns the tensor of a name in the files, or None for a float tensor that is filled in later. Floats are
    converted to `dtype`. For GPUs, several threads call it and copy at a time.
    """
    state, parts = model.state_dict(), defaultdict[str, list[str]](list)
    for name, place in places.items():
        parts[place.parameter].append(name)

    def filled(parameter: str) -> Tensor:
        device, empty = device_of(parameter, devices), state[parameter]
        names = parts[parameter]
        weights = {name: read(name) for name in names}
        only = weights[names[0]]
        if only is not None and only.shape == empty.shape:
            return moved(only, device, dtype)
        # Not `empty.dtype`: a model's own code may build a part of the module in another dtype than the run's.
        whole = torch.empty(empty.shape, dtype=dtype, device=device)
        for name, tensor in weights.items():
            if tensor is not None:
                part_of(whole, places[name], tensor.shape).copy_(moved(tensor, device, dtype))
        return whole

    if any(is_gpu(device) for device in devices.values()):
        # A copy from a file waits for its pages, thread by thread.
        with ThreadPoolExecutor(READERS, "weights", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            tensors = dict(zip(parts, pool.map(filled, parts), strict=True))
    else:
        tensors = {parameter: filled(parameter) for parameter in parts}
    model.load_state_dict(tensors, strict=False, assign=True)
    if tied_weights(model):
        model.tie_weights()


def part_of(whole: Tensor, place: Place, shape: Sequence[int]) -> Tensor:
    """Return the part of a parameter that is a file's tensor, as a view of the shape of that tensor."""
    return whole.view(-1)[place.start : place.start + math.prod(shape)].view(*shape)


def build_module(config: Any, folder: Path) -> Any:
    """Build a causal or image-text-to-text model wholly on the meta device, buffers included, to look at its modules.

    Raises:
        CheckpointError: transformers cannot build the architecture.
    """
    return _build(config, torch.float32, folder, buffers=False)


def _build(config: Any, dtype: torch.dtype, folder: Path, buffers: bool = True) -> Any:
    remote = is_remote(config)
    if remote:
        kind = transformers.AutoModelForCausalLM
        kind = kind if kind.__name__ in config.auto_map else transformers.AutoModel
    elif type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        kind = transformers.AutoModelForImageTextToText
    else:
        kind = transformers.AutoModelForCausalLM
    # Buffers such as rotary frequencies are in no file, so they are computed here instead of left on the meta device.
    empty = accelerate.init_empty_weights(include_buffers=not buffers)
    # Every weight is filled in later. Without initial values, parameters that share a weight are not tied either.
    with reading("transformers cannot build this model", folder), empty, no_init_weights():
        model = kind.from_config(config, dtype=dtype, trust_remote_code=remote)
        model.tie_weights()
    return model
