"""A transformers model without its weights, and the one place where names in files meet the module's parameters.

A model is built on the meta device and filled tensor by tensor, so that nothing is allocated twice. Knows no merging.
Letters in tensor names: B batch, T tokens, H hidden features, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_outputs import BaseModelOutputWithPast

from engine.errors import CheckpointError

# Config keys that say nothing about what a model computes from a hidden state.
NOT_COMPUTED = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "transformers_version",
    "use_cache",
}  # fmt: skip

transformers.logging.set_verbosity_error()


def load_model_config(folder: Path) -> Any:
    """The folder's configuration as transformers reads it.

    Raises:
        CheckpointError: transformers does not know the model type, or its code would have to come with the checkpoint.
    """
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"transformers cannot read its config.json: {_first_line(error)}", str(folder)) from error


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer.

    Raises:
        CheckpointError: there is none, or transformers cannot read it.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ImportError) as error:
        raise CheckpointError(
            f"its tokenizer cannot be read: {_first_line(error)}",
            str(folder),
            do="add the tokenizer's files to the base's folder, or give calibration records as `input_ids`",
        ) from error


def build_skeleton(folder: Path, names: Iterable[str], dtype: torch.dtype) -> tuple[Any, dict[str, str]]:
    """A causal language model on the meta device, and file tensor name → parameter or buffer name of the module.

    Where the config ties the head to the embedding and the files hold both, the model is built untied, as both count.

    Raises:
        CheckpointError: no such architecture, a tensor without a partner in the module, or the other way round.
    """
    config = load_model_config(folder)
    names = list(names)
    model = _build(config, dtype, folder)
    partners = match_names(model, names, folder)
    if set(partners.values()) & set(model.all_tied_weights_keys):
        config.tie_word_embeddings = False
        model = _build(config, dtype, folder)
        partners = match_names(model, names, folder)
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


def fill(model: Any, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Give the module its parameters and buffers by the module's names, without a copy where none is needed."""
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not empty, f"not filled: {empty}"
    model.requires_grad_(False)
    model.to(device)


def rebuild_logits(model: Any, last_hidden_BTH: Tensor) -> Tensor:
    """Logits [B, T, V] from the last hidden state, by the model's own forward pass behind its decoder.

    The decoder is replaced for the one call, so that whatever an architecture does to its logits (scaling, capping)
    is done here too.
    """
    decoder = model.base_model
    output = BaseModelOutputWithPast(last_hidden_state=last_hidden_BTH)
    replaced: Callable[..., Any] = lambda *args, **kwargs: output  # noqa: E731
    decoder.forward = replaced
    try:
        ids_BT = torch.zeros(last_hidden_BTH.shape[:2], dtype=torch.long, device=last_hidden_BTH.device)
        logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    finally:
        del decoder.forward
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


def _build(config: Any, dtype: torch.dtype, folder: Path) -> Any:
    try:
        # Buffers (rotary frequencies) are in no file: they are computed here, not left on the meta device.
        with accelerate.init_empty_weights(include_buffers=False):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(f"transformers cannot build this model: {_first_line(error)}", str(folder)) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
