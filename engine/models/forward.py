"""A part of the house that has no words of its own yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from engine.models.internvl import for_generation, is_original


def written(model: Any, given: Mapping[str, Any], count: int) -> Tensor:
    """What a model writes behind its prompts, at most `count` tokens [B, T], the likeliest one by one.

    `given` is what its forward pass takes; shorter prompts are filled up at their beginning.
    """
    ids_BT: Tensor = given["input_ids"]
    if is_original(model.config):
        given = for_generation(given)
    written_BT: Tensor = model.generate(**given, max_new_tokens=count, do_sample=False)
    # From embeddings, as InternVL's own code has it, only what is new comes back.
    length = ids_BT.shape[1]
    return written_BT[:, length:] if torch.equal(written_BT[:, :length], ids_BT) else written_BT


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

    with _replaced(language_model(model).get_output_embeddings(), head):
        output = model(**given, output_hidden_states=True, use_cache=False, return_dict=True)
    return reached[-1], output.hidden_states


def rebuild_logits(model: Any, last_hidden_BTH: Tensor) -> Tensor:
    """Logits [B, T, V] from the last hidden state, by the model's own forward pass behind its decoder.

    The decoder is replaced for the one call, so that whatever an architecture does to its logits (scaling, capping)
    is done here too.
    """
    output = _DecoderOutput(last_hidden_state=last_hidden_BTH)
    ids_BT = torch.zeros(last_hidden_BTH.shape[:2], dtype=torch.long, device=last_hidden_BTH.device)
    talking = language_model(model)
    with _replaced(talking.base_model, lambda *args, **kwargs: output):
        logits: Tensor = talking(input_ids=ids_BT, use_cache=False).logits
    return logits


def language_model(model: Any) -> Any:
    """The module that makes logits of what its decoder says: the model, or within code of its own a language model."""
    for module in model.modules():
        head = module.get_output_embeddings() if isinstance(module, transformers.PreTrainedModel) else None
        if head is not None and any(child is head for child in module.children()):
            return module
    raise AssertionError("a model that writes text has an output head")


class _DecoderOutput(BaseModelOutputWithPast):  # type: ignore[misc]
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
    own = {id(parameter) for parameter in language_model(model).get_output_embeddings().parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in own]
