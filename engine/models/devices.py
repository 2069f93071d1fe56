"""A model over the GPUs that its process sees, module by module, by accelerate. Knows no merging and no files."""

from __future__ import annotations

from typing import Any

import accelerate
import torch
from accelerate.utils import get_balanced_memory

from engine.errors import RunError

# Name of a module → where it and all that is in it are.
DeviceMap = dict[str, torch.device]


def device_map(model: Any, dtype: torch.dtype, device: torch.device) -> DeviceMap:
    """Where each module of a model without weights goes: all of it to `device`, or over all GPUs that are visible, as
    many bytes on each, whole blocks together.

    Raises:
        RunError: it does not fit them.
    """
    if device.type == "cpu" or torch.cuda.device_count() < 2:
        return {"": device}
    whole = model._no_split_modules
    room = get_balanced_memory(model, dtype=dtype, no_split_module_classes=whole)
    found = accelerate.infer_auto_device_map(model, max_memory=room, dtype=dtype, no_split_module_classes=whole)
    if any(not isinstance(where, int) for where in found.values()):
        raise RunError(
            f"the model does not fit the {torch.cuda.device_count()} GPUs of its process",
            do="ask for more by `num_gpus` in the config's `cluster`, or use `dtype: bfloat16`",
        )
    return {name: torch.device("cuda", where) for name, where in found.items()}


def device_of(name: str, devices: DeviceMap) -> torch.device:
    """Where the parameter or buffer of that name is."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
    return next(devices[prefix] for prefix in prefixes if prefix in devices)


def dispatch(model: Any, devices: DeviceMap) -> None:
    """Move what is not there yet to its device, and have what comes in and goes out of each module follow."""
    if set(devices) == {""}:
        model.to(devices[""])
    else:
        # Forced, as hooks are what makes several devices one model, whichever devices they are.
        skipped = model._skip_keys_device_placement
        accelerate.dispatch_model(model, devices, skip_keys=skipped, force_hooks=True)
