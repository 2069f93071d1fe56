"""A transformers model without its weights, and the one place where names in files meet the module's parameters.

A model is built on the meta device and filled tensor by tensor, so that nothing is allocated twice. Knows no merging.
Letters in tensor names: B batch, T tokens, H hidden features, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_outputs import BaseModelOutputWithPast

from engine.devices import DeviceMap, dispatch
from engine.errors import CheckpointError
from engine.headers import TensorHeader, read_json
from engine.untrusted import TOKENIZER_BYTES, check_regular, foreign, in_memory

# Config keys that say nothing about what a model computes from a hidden state.
NOT_COMPUTED = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "transformers_version",
    "use_cache",
}  # fmt: skip

transformers.logging.set_verbosity_error()


def load_model_config(folder: Path, remote_code: bool = False) -> Any:
    """The folder's configuration as transformers reads it. `remote_code`: code that comes with it may run.

    Raises:
        CheckpointError: transformers does not know the model type, or does not take the configuration.
    """
    what = "transformers cannot read its config.json"
    # What code loads for itself is its own affair.
    bound = (
        nullcontext() if remote_code else in_memory(CheckpointError(f"{what}: it takes too much memory", str(folder)))
    )
    with _reading(what, folder, _own_code(folder, "config.json", remote_code)), bound:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code)


def load_generation_config(folder: Path) -> Any:
    """How the folder's model writes; None where it does not say.

    Raises:
        CheckpointError: transformers does not take it.
    """
    if not (folder / "generation_config.json").exists():
        return None
    with _reading("transformers cannot read its generation_config.json", folder):
        return transformers.GenerationConfig.from_pretrained(folder)


def load_tokenizer(folder: Path, remote_code: bool = False) -> Any:
    """The folder's tokenizer. `remote_code`: code that comes with it may run.

    Raises:
        CheckpointError: there is none, or transformers cannot read it.
    """
    for path in folder.iterdir():
        if path.name.startswith(("tokenizer", "vocab", "merges", "chat_template", "special_tokens", "added_tokens")):
            check_regular(path, TOKENIZER_BYTES, CheckpointError)
    do = "add the tokenizer's files to the base's folder, or give calibration records as `input_ids`"
    do = _own_code(folder, "tokenizer_config.json", remote_code) or do
    with _reading("its tokenizer cannot be read", folder, do):
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=remote_code)


def build_skeleton(
    folder: Path, tensors: Mapping[str, TensorHeader], dtype: torch.dtype, remote_code: bool = False
) -> tuple[Any, dict[str, str]]:
    """A causal language model on the meta device, and file tensor name → parameter or buffer name of the module.

    Where the config ties the head to the embedding and the files hold both, the model is built untied, as both count.
    `remote_code`: code that comes with the model may run.

    Raises:
        CheckpointError: no such architecture, a tensor without a partner in the module or of another shape, or a
        parameter without a tensor.
    """
    config = load_model_config(folder, remote_code)
    model = _build(config, dtype, folder, remote_code)
    partners = match_names(model, tensors, folder)
    if set(partners.values()) & set(model.all_tied_weights_keys):
        config.tie_word_embeddings = False
        model = _build(config, dtype, folder, remote_code)
        partners = match_names(model, tensors, folder)
    state = model.state_dict()
    for name, partner in partners.items():
        if tuple(state[partner].shape) != tensors[name].shape:
            wanted = f"{tuple(state[partner].shape)}, as config.json says"
            raise CheckpointError(f"{name!r} has shape {tensors[name].shape}", str(folder), wanted)
    filled = set(partners.values()) | set(model.all_tied_weights_keys)
    unfilled = [name for name, _ in model.named_parameters() if name not in filled]
    if unfilled:
        raise CheckpointError(f"no tensor in its files fills the model's parameter {unfilled[0]!r}", str(folder))
    return model.eval(), partners


def match_names(model: Any, names: Iterable[str], folder: Path) -> dict[str, str]:
    """File tensor name → parameter or buffer name. Tensors that the architecture is known to ignore are left out.

    transformers keeps the table of renamings an architecture went through; this is the only place that asks it.

    Raises:
        CheckpointError: a tensor without a partner, or one that the module holds in another form (fused, transposed).
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state = model.state_dict()
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    partners = {}
    for name in names:
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if converted is not None:
            raise CheckpointError(
                f"the tensor {name!r} is stored in another form than the module's {renamed!r}",
                str(folder),
                "one tensor of the file for one parameter of the module",
            )
        if renamed in state:
            partners[name] = renamed
        elif not any(re.search(pattern, renamed) for pattern in ignored):
            raise CheckpointError(
                f"the tensor {name!r} has no partner in the model",
                str(folder),
                f"a parameter of {type(model).__name__}",
            )
    return partners


def fill(model: Any, tensors: dict[str, Tensor], devices: DeviceMap) -> None:
    """Give the module its parameters and buffers by the module's names, without a copy where none is needed."""
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not empty, f"not filled: {empty}"
    model.requires_grad_(False)
    dispatch(model, devices)


def rebuild_logits(model: Any, last_hidden_BTH: Tensor) -> Tensor:
    """Logits [B, T, V] from the last hidden state, by the model's own forward pass behind its decoder.

    The decoder is replaced for the one call, so that whatever an architecture does to its logits (scaling, capping)
    is done here too.
    """
    decoder = model.base_model
    output = BaseModelOutputWithPast(last_hidden_state=last_hidden_BTH)
    replaced: Callable[..., Any] = lambda *args, **kwargs: output  # noqa: E731
    own = decoder.__dict__.get("forward")
    decoder.forward = replaced
    try:
        ids_BT = torch.zeros(last_hidden_BTH.shape[:2], dtype=torch.long, device=last_hidden_BTH.device)
        logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    finally:
        # A model over several devices has a forward of its own there, that of its hooks.
        del decoder.forward
        if own is not None:
            decoder.forward = own
    return logits


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
    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has an output head"
    own = {id(parameter) for parameter in head.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in own]


def computes_alike(one: Any, other: Any) -> bool:
    """Whether two configurations describe the same computation."""

    def essence(config: Any) -> dict[str, Any]:
        return {key: value for key, value in config.to_dict().items() if key not in NOT_COMPUTED}

    return essence(one) == essence(other)


def _build(config: Any, dtype: torch.dtype, folder: Path, remote_code: bool) -> Any:
    # Buffers (rotary frequencies) are in no file: they are computed here, not left on the meta device.
    with _reading("transformers cannot build this model", folder), accelerate.init_empty_weights(include_buffers=False):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=remote_code)


def _reading(what: str, folder: Path, do: str = "") -> AbstractContextManager[None]:
    """What transformers raises over the folder's files, as a fault of theirs."""
    return foreign(lambda told: CheckpointError(f"{what}: {told}", str(folder), do=do), StrictDataclassError)


def _own_code(folder: Path, file: str, allowed: bool) -> str:
    """What to do where a file says that the model comes with code, and that may not run."""
    own = not allowed and (folder / file).exists() and "auto_map" in read_json(folder / file)
    return "`trust_remote_code: true` lets code from the model's folder run; look at it first" if own else ""
