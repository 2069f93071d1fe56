"""Forward passes: greedy generation, hidden states without logits, and logits from a hidden state.

Letters in tensor names: B batch, T tokens, H hidden features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from engine.errors import CheckpointError
from engine.models.internvl import for_generation, is_original


def written(model: Any, given: Mapping[str, Any], count: int) -> Tensor:
    """Return the tokens [B, T], int64, that a model generates after its prompts by greedy decoding, at most `count`.

    `given` holds the arguments of a forward pass; shorter prompts are padded on the left.
    """
    ids_BT: Tensor = given["input_ids"]
    if is_original(model.config):
        given = for_generation(given)
    output_BT: Tensor = model.generate(**given, max_new_tokens=count, do_sample=False)
    # InternVL's own code generates from embeddings; `generate` then returns the new tokens without the prompt.
    length = ids_BT.shape[1]
    return output_BT[:, length:] if torch.equal(output_BT[:, :length], ids_BT) else output_BT


def arguments(ids_BT: Tensor, mask_BT: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of a forward pass, on the device of the token ids.

    `inputs` are the processor's other outputs, such as pixel inputs. Token type ids [B, T'] among them are padded with
    0 (text) to T tokens, because tokens that an expert generated after its prompt are text.
    """
    device, length = ids_BT.device, ids_BT.shape[1]
    others = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
    for name, tensor in others.items():
        if name.endswith("token_type_ids"):
            others[name] = torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]))
    return {"input_ids": ids_BT, "attention_mask": mask_BT, **others}


def decode(model: Any, given: Mapping[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run forward without computing logits.

    Returns:
        The last hidden state [B, T, H], as the output head receives it, and the hidden states of all layers.
    """
    reached: list[Tensor] = []

    def head(last_BTH: Tensor, *_: Any) -> Tensor:
        reached.append(last_BTH)
        return last_BTH[..., :1]

    with replaced(language_model(model).get_output_embeddings(), head):
        output = model(**given, output_hidden_states=True, use_cache=False, return_dict=True)
    return reached[-1], output.hidden_states


def rebuild_logits(model: Any, last_hidden_BTH: Tensor) -> Tensor:
    """Return the logits [B, T, V] of a last hidden state, computed by the model's own forward pass.

    Only the decoder is replaced during the call, so that all that the architecture does to its logits (scaling,
    capping) is applied. Models name their decoder differently, and some call a part of their base model (OPT).
    """
    output = _DecoderOutput(last_hidden_state=last_hidden_BTH)
    ids_BT = torch.zeros(last_hidden_BTH.shape[:2], dtype=torch.long, device=last_hidden_BTH.device)
    language = language_model(model)
    head = language.get_output_embeddings()
    with ExitStack() as changed:
        for module in {*decoders(language), language.base_model, language.get_decoder()} - {language, head}:
            changed.enter_context(replaced(module, lambda *args, **kwargs: output))
        logits: Tensor = language(input_ids=ids_BT, use_cache=False).logits
    return logits


def language_model(model: Any) -> Any:
    """Return the submodule that owns the output head: the model itself, or its language model.

    Raises:
        CheckpointError: There is none, or more than a linear layer is between the last hidden state and the logits, as
            in encoders that are used as decoders.
    """
    for module in model.modules():
        head = module.get_output_embeddings() if isinstance(module, transformers.PreTrainedModel) else None
        if head is not None and any(child is head for child in module.children()):
            others = {child for child in module.children() if any(True for _ in child.parameters())}
            if others <= {head, *decoders(module)}:
                return module
    raise CheckpointError(
        f"{type(model).__name__} has no output head that is a single linear layer",
        str(model.config.name_or_path),
        "a causal language model",
        "to merge such models, use a weight-space method",
    )


def decoders(language: Any) -> list[Any]:
    """Return the parts of a language model that contain its embedding: the decoder."""
    embedding = language.get_input_embeddings()
    return [child for child in language.children() if embedding in set(child.modules())]


class _DecoderOutput(BaseModelOutputWithPast):  # type: ignore[misc]
    """A decoder output in which all fields but the last hidden state are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward pass of a module within the context."""
    # On several devices, accelerate's hooks have put a `forward` into the instance's dict; it is restored.
    hooked = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if hooked is not None:
            module.forward = hooked


def blocks_of(model: Any) -> list[Any]:
    """Return the blocks of a model: the items of its outermost module lists, in order."""
    return [block for one in outermost_lists(model) for block in one]


def outermost_lists(model: Any) -> list[Any]:
    """Return the module lists of a model that are in no other one, in order."""
    inside: set[int] = set()
    lists = []
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and id(module) not in inside:
            inside.update(id(part) for part in module.modules())
            lists.append(module)
    return lists


def head_names(model: Any) -> list[str]:
    """Return the names, in the module, of all parameters between the last hidden state and the logits."""
    parameters = {id(parameter) for parameter in language_model(model).get_output_embeddings().parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in parameters]
