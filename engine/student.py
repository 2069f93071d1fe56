"""The merged weights in a model: targets in, losses and the gradient of the merged tensors out.

It holds one model and one gradient, whatever the number of experts: the coefficients are the trainer's affair, the task
vectors the shards'. Letters in tensor names: B batch (1), T tokens, H hidden features, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.alignment import hidden_loss, logit_loss
from engine.checkpoint import open_base
from engine.errors import RunError
from engine.expert import Target
from engine.model import build_skeleton, fill, rebuild_logits
from engine.plan import Plan


@dataclass(frozen=True)
class Losses:
    """The two alignment losses of one sample, before their weights."""

    kl: float
    hidden: float


class Student:
    """The model that is being merged; `put` its merged tensors before the first sample."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device, self.dtype = plan, device, getattr(torch, plan.dtype)
        base = open_base(plan)
        self.model, partners = build_skeleton(base.folder, plan.base_header.tensors, self.dtype)
        tensors = {}
        for name, partner in partners.items():
            if name in plan.merged_set:
                tensors[partner] = torch.empty(plan.base_header.tensors[name].shape, dtype=self.dtype, device=device)
            else:
                weight = base.read(name)
                # A view of the file where nothing has to change: what is never merged is never copied.
                tensors[partner] = weight.to(device, self.dtype) if weight.is_floating_point() else weight.to(device)
        fill(self.model, tensors, device)
        named = dict(self.model.named_parameters())
        self._merged = {name: named[partners[name]].requires_grad_() for name in plan.merged}

    @torch.no_grad()
    def put(self, name: str, tensor: Tensor) -> None:
        """Copy a merged tensor into the model's own buffer."""
        self._merged[name].copy_(tensor)

    def take(self, name: str) -> Tensor:
        """Give up the gradient of a merged tensor; zeros where no sample reached it."""
        parameter = self._merged[name]
        gradient, parameter.grad = parameter.grad, None
        return torch.zeros_like(parameter) if gradient is None else gradient

    def accumulate(self, target: Target, loss_weight: float, share: float) -> Losses:
        """Add `share` times the gradient of βₖ · (L_logit + λ_hid · L_hid) of one sample to the merged tensors'.

        Raises:
            RunError: the loss is not finite.
        """
        parameters = self.plan.config.parameters
        ids_BT = target.input_ids_T.to(self.device)[None]
        output = self.model(
            input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), output_hidden_states=True, use_cache=False
        )
        kl = logit_loss(output.logits[0], self._expert_logits(target), parameters.temperature)
        hidden = hidden_loss(
            {index: output.hidden_states[index][0] for index in target.hidden_TH},
            {index: tensor.to(self.device) for index, tensor in target.hidden_TH.items()},
        )
        loss = loss_weight * (kl + parameters.hidden_weight * hidden)
        if not loss.isfinite():
            raise RunError(
                "the loss of the merged model is not finite", do="lower `learning_rate` or the weights, or use float32"
            )
        torch.autograd.backward(share * loss)
        return Losses(kl.item(), hidden.item())

    @torch.no_grad()
    def _expert_logits(self, target: Target) -> Tensor:
        """zₖ(x) [T, V]: as it came, or from the expert's last hidden state through the head that both share."""
        if target.logits_TV is not None:
            return target.logits_TV.to(self.device)
        assert target.last_hidden_TH is not None
        return rebuild_logits(self.model, target.last_hidden_TH.to(self.device)[None])[0]
