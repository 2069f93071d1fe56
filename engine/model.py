"""A transformers model without its weights, filled with them, and run with and without its head.

A model is built on the meta device and filled tensor by tensor, so that nothing is allocated twice. Knows no merging.
Letters in tensor names: B batch, T tokens, H hidden features, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from engine.devices import DeviceMap, device_of, dispatch
from engine.errors import CheckpointError
from engine.headers import TEXT_SECTIONS, TensorHeader, read_json
from engine.names import Place, Places, check_filled, match_names, tied_weights
from engine.untrusted import TOKENIZER_BYTES, check_regular, foreign, in_memory

# Config keys that say nothing about what a model computes from a hidden state.
NOT_COMPUTED = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
    "transformers_version", "use_cache",
}  # fmt: skip

transformers.logging.set_verbosity_error()


def load_model_config(folder: Path, remote_code: bool = False) -> Any:
    """The folder's configuration as transformers reads it. `remote_code`: code that comes with it may run.

    Raises:
        CheckpointError: transformers does not know the model type, or does not take the configuration.
    """
    own = own_code(folder, "config.json", remote_code)
    if own and read_json(folder / "config.json").get("model_type") not in CONFIG_MAPPING:
        raise CheckpointError("transformers has no such model, and code beside it may not run", str(folder), do=own)
    what = "transformers cannot read its config.json"
    # What code loads for itself is its own affair.
    bound = (
        nullcontext() if remote_code else in_memory(CheckpointError(f"{what}: it takes too much memory", str(folder)))
    )
    with reading(what, folder), bound:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code)


def load_config_like(own: Any, folder: Path) -> Any:
    """An expert's configuration, where the base's is `own`: of the same class where that comes from the base's code.

    No code but the base's is ever run, whatever an expert's folder has of it, or wherever it points to for it.

    Raises:
        CheckpointError: see `load_model_config`.
    """
    if not _is_remote(own):
        return load_model_config(folder)
    with reading("the base's code cannot read its config.json", folder):
        config = type(own).from_dict(read_json(folder / "config.json"))
    config.auto_map, config.name_or_path = own.auto_map, own.name_or_path
    return config


def load_generation_config(folder: Path) -> Any:
    """How the folder's model writes; None where it does not say.

    Raises:
        CheckpointError: transformers does not take it.
    """
    if not (folder / "generation_config.json").exists():
        return None
    with reading("transformers cannot read its generation_config.json", folder):
        return transformers.GenerationConfig.from_pretrained(folder)


def load_tokenizer(folder: Path, remote_code: bool = False) -> Any:
    """The folder's tokenizer. `remote_code`: code that comes with it may run.

    Raises:
        CheckpointError: there is none, or transformers cannot read it.
    """
    check_tokenizer_files(folder)
    do = "add the tokenizer's files to the base's folder, or give calibration records as `input_ids`"
    do = own_code(folder, "tokenizer_config.json", remote_code) or do
    with reading("its tokenizer cannot be read", folder, do):
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code)


def check_tokenizer_files(folder: Path) -> None:
    """Refuse what is no regular file of a tokenizer's size.

    Raises:
        CheckpointError: naming the file.
    """
    for path in folder.iterdir():
        if path.name.startswith(("tokenizer", "vocab", "merges", "chat_template", "special_tokens", "added_tokens")):
            check_regular(path, TOKENIZER_BYTES, CheckpointError)


def build_skeleton(
    config: Any, tensors: Mapping[str, TensorHeader], dtype: torch.dtype, folder: Path
) -> tuple[Any, Places]:
    """A model that writes text, and maybe sees, on the meta device, and file tensor name → its place in the module.

    Where the config ties the head to the embedding and the files hold both, the model is built untied, as both count.
    `folder` is that of config and tensors, for the messages.

    Raises:
        CheckpointError: no such architecture, a tensor without a partner in the module or of another shape, or a
        parameter without a tensor.
    """
    model = _build(config, dtype, folder)
    places = match_names(model, tensors, folder)
    if {place.parameter for place in places.values()} & set(tied_weights(model)):
        # In composite models the whole's and the language model's config say it, and either may decide.
        for section in (config, *(getattr(config, key, config) for key in TEXT_SECTIONS)):
            section.tie_word_embeddings = False
        model = _build(config, dtype, folder)
        places = match_names(model, tensors, folder)
    check_filled(model, places, tensors, folder)
    return model.eval(), places


def fill(
    model: Any, places: Places, devices: DeviceMap, dtype: torch.dtype, weight: Callable[[str], Tensor | None]
) -> None:
    """Give the module its parameters and buffers, without a copy where none is needed.

    `weight`: file tensor name → the tensor, its floats of `dtype`; None: a float that is filled in later.
    """
    state, parts = model.state_dict(), defaultdict[str, list[str]](list)
    for name, place in places.items():
        parts[place.parameter].append(name)
    tensors = {}
    for parameter, names in parts.items():
        device, empty = device_of(parameter, devices), state[parameter]
        found = {name: weight(name) for name in names}
        only = found[names[0]]
        if only is not None and only.shape == empty.shape:
            tensors[parameter] = only.to(device)
            continue
        # Not the module's own type: code that came with a checkpoint may have built a part of it in another.
        whole = torch.empty(empty.shape, dtype=dtype, device=device)
        for name, tensor in found.items():
            if tensor is not None:
                part_of(whole, places[name], tensor.shape).copy_(tensor)
        tensors[parameter] = whole
    model.load_state_dict(tensors, strict=False, assign=True)
    if tied_weights(model):
        model.tie_weights()
    unfilled = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not unfilled, f"not filled: {unfilled}"
    model.requires_grad_(False)
    dispatch(model, devices)


def part_of(whole: Tensor, place: Place, shape: Sequence[int]) -> Tensor:
    """What of a parameter is a tensor of a file: a view of the tensor's shape."""
    return whole.view(-1)[place.start : place.start + math.prod(shape)].view(*shape)


def arguments(ids_BT: Tensor, mask_BT: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a forward pass takes: token ids, and a processor's other outputs `inputs`, on the device of the ids.

    Tokens that an expert wrote behind its prompt are text, so marks of tokens [B, T'] go on with 0.
    """
    device, length = ids_BT.device, ids_BT.shape[1]
    others = {name: tensor.to(device) for name, tensor in inputs.items()}
    for name, tensor in others.items():
        if name.endswith("token_type_ids"):
            others[name] = torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]))
    return {"input_ids": ids_BT, "attention_mask": mask_BT, **others}


def decode(model: Any, given: Mapping[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The last hidden state [B, T, H], as the head gets it, and those of all layers; no logits."""
    reached: list[Tensor] = []

    def head(last_BTH: Tensor, *_: Any) -> Tensor:
        reached.append(last_BTH)
        return last_BTH[..., :1]

    with _replaced(speaker(model).get_output_embeddings(), head):
        output = model(**given, output_hidden_states=True, use_cache=False, return_dict=True)
    return reached[-1], output.hidden_states


def rebuild_logits(model: Any, last_hidden_BTH: Tensor) -> Tensor:
    """Logits [B, T, V] from the last hidden state, by the model's own forward pass behind its decoder.

    The decoder is replaced for the one call, so that whatever an architecture does to its logits (scaling, capping)
    is done here too.
    """
    output = _Reached(last_hidden_state=last_hidden_BTH)
    ids_BT = torch.zeros(last_hidden_BTH.shape[:2], dtype=torch.long, device=last_hidden_BTH.device)
    talking = speaker(model)
    with _replaced(talking.base_model, lambda *args, **kwargs: output):
        logits: Tensor = talking(input_ids=ids_BT, use_cache=False).logits
    return logits


def speaker(model: Any) -> Any:
    """The module that makes logits of what its decoder says: the model, or within code of its own a language model."""
    for module in model.modules():
        head = module.get_output_embeddings() if isinstance(module, transformers.PreTrainedModel) else None
        if head is not None and any(child is head for child in module.children()):
            return module
    raise AssertionError("a model that writes text has an output head")


class _Reached(BaseModelOutputWithPast):  # type: ignore[misc]
    """A decoder's output that has nothing more to say than its last hidden state."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """The module with another forward pass."""
    # A model over several devices has a forward of its own there, that of its hooks.
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def blocks_of(model: Any) -> list[Any]:
    """The blocks that the model is a sequence of: what stands in its outermost lists of modules."""
    inside: set[int] = set()
    found = []
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and id(module) not in inside:
            inside.update(id(part) for part in module.modules())
            found += list(module)
    return found


def head_names(model: Any) -> list[str]:
    """The module's names of everything between the last hidden state and the logits that has weights."""
    own = {id(parameter) for parameter in speaker(model).get_output_embeddings().parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in own]


def computes_alike(one: Any, other: Any) -> bool:
    """Whether two configurations describe the same computation."""

    def essence(config: Any) -> dict[str, Any]:
        return {key: value for key, value in config.to_dict().items() if key not in NOT_COMPUTED}

    return essence(one) == essence(other)


def _build(config: Any, dtype: torch.dtype, folder: Path) -> Any:
    remote = _is_remote(config)
    if remote:
        kind = transformers.AutoModelForCausalLM
        kind = kind if kind.__name__ in config.auto_map else transformers.AutoModel
    elif type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        kind = transformers.AutoModelForImageTextToText
    else:
        kind = transformers.AutoModelForCausalLM
    # Buffers (rotary frequencies) are in no file: they are computed here, not left on the meta device.
    with reading("transformers cannot build this model", folder), accelerate.init_empty_weights(include_buffers=False):
        return kind.from_config(config, dtype=dtype, trust_remote_code=remote)


def _is_remote(config: Any) -> bool:
    """Whether a configuration is of code that came with a checkpoint; it is only if that was allowed to run."""
    return type(config).__module__.startswith("transformers_modules.")


def reading(what: str, folder: Path, do: str = "") -> AbstractContextManager[None]:
    """What transformers raises over the folder's files, as a fault of theirs."""
    return foreign(lambda told: CheckpointError(f"{what}: {told}", str(folder), do=do), StrictDataclassError)


def own_code(folder: Path, file: str, allowed: bool) -> str:
    """What to do where a file says that the model comes with code, and that may not run."""
    own = not allowed and (folder / file).exists() and "auto_map" in read_json(folder / file)
    return "`trust_remote_code: true` lets code from the model's folder run; look at it first" if own else ""
