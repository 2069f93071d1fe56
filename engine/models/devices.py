"""Placement of a model on the GPUs of its process's seat, module by module, with accelerate."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import accelerate
import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import get_balanced_memory

from engine.errors import ClusterError
from engine.sizes import FILLED

# Module name → device of the module and of its submodules.
DeviceMap = dict[str, torch.device]


DOUBLE = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}


@dataclass(frozen=True)
class Room:
    """The GPUs over which a model may be spread, and what takes memory there besides its weights.

    Attributes:
        others: The GPUs besides the model's first device.
        gradients: The parameters that have a gradient for as long as a step takes.
        activations: Bytes that the passes need on all GPUs together.
        logits: Bytes that the logits need on the GPU of the head.
    """

    others: tuple[torch.device, ...] = ()
    gradients: frozenset[str] = frozenset()
    activations: float = 0
    logits: float = 0


ONE_DEVICE = Room()


def device_map(model: Any, dtype: torch.dtype, device: torch.device, room: Room = ONE_DEVICE) -> DeviceMap:
    """Return the devices of the modules of a model without weights.

    With one device, all modules are placed on it. Otherwise they are balanced over all of the devices by the bytes of
    weights and gradients, and no block is split.

    Raises:
        ClusterError: The model does not fit on the GPUs.
    """
    if not room.others:
        return {"": device}
    gpus = device, *room.others
    free: dict[int | str, int] = {
        gpu.index: max(0, int(FILLED * torch.cuda.mem_get_info(gpu)[0] - room.activations / len(gpus))) for gpu in gpus
    }
    free[gpus[-1].index] = max(0, int(free[gpus[-1].index] - room.logits))
    # A weight with a gradient of the same size counts as one in a dtype of twice the size.
    sizes = {
        "dtype": dtype,
        "special_dtypes": dict.fromkeys(room.gradients, DOUBLE[dtype]),
        "no_split_module_classes": model._no_split_modules,
    }
    memory = get_balanced_memory(model, free | {"cpu": 0}, **sizes)
    placement = accelerate.infer_auto_device_map(model, max_memory=memory, **sizes)
    if any(not isinstance(place, int) for place in placement.values()):
        narrower = ", or use bfloat16" if dtype is torch.float32 else ""
        raise ClusterError(
            f"the model does not fit on the {len(gpus)} GPUs of its process",
            do="raise `cluster.trainer.num_gpus` and `cluster.expert.num_gpus` (of evaluate: --num-gpus)"
            f"{narrower}; run a merge with --fresh",
        )
    return {name: torch.device("cuda", place) for name, place in placement.items()}


def device_of(name: str, devices: DeviceMap) -> torch.device:
    """Return the device of the parameter or buffer `name`."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
    return next(devices[prefix] for prefix in prefixes if prefix in devices)


def dispatch(model: Any, devices: DeviceMap) -> None:
    """Move a model to its devices; with several entries in the map, add hooks that move inputs and outputs."""
    if set(devices) == {""}:
        model.to(devices[""])
    else:
        # Without force_hooks, accelerate adds none if all entries name one device, as in the tests.
        skipped = model._skip_keys_device_placement
        first = next(iter(devices.values()))
        accelerate.dispatch_model(model, devices, main_device=first, skip_keys=skipped, force_hooks=True)


def release(model: Any) -> None:
    """Take a model apart that is no longer used, so that its memory is free when the last reference to it goes.

    The hooks of several devices refer to the modules that they are on, and would keep their weights until Python
    collects such cycles.
    """
    remove_hook_from_submodules(model)
    for module in model.modules():
        module.__dict__.pop("forward", None)


def give_back() -> None:
    """Free what is no longer referenced, and give torch's unused GPU memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
