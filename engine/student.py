"""The merged weights in a model: targets in, losses and the gradient of the merged tensors out.

It holds one model and one gradient, whatever the number of experts: the coefficients are the trainer's affair, the task
vectors the shards'. It computes with what has arrived and lets go of what is final, so that both can travel meanwhile.
Letters in tensor names: B samples of a pass, T tokens, P some of the tokens, H hidden features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from engine.alignment import entropy_loss, hidden_loss, logit_loss
from engine.checkpoint import open_base
from engine.codec import to_cpu
from engine.devices import device_map, device_of
from engine.errors import RunError
from engine.expert import Target
from engine.model import blocks_of, build_skeleton, fill, rebuild_logits
from engine.plan import Plan
from engine.shards import Arrivals, Gradients
from engine.sizes import LOGIT_BYTES
from engine.task_vectors import Piece


@dataclass(frozen=True)
class Losses:
    """The losses of one sample, before their weights: the two of the alignment with its expert, or the mean entropy.

    `entropy` is None where there is an expert to align with; where there is none, the other two are 0.
    """

    kl: float
    hidden: float
    entropy: float | None = None


class Student:
    """The model that is being merged; `put` its merged tensors before the first sample."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device, self.dtype = plan, device, getattr(torch, plan.dtype)
        base = open_base(plan)
        self.model, partners = build_skeleton(
            base.folder, plan.base_header.tensors, self.dtype, plan.config.trust_remote_code
        )
        devices = device_map(self.model, self.dtype, device)
        tensors = {}
        for name, partner in partners.items():
            device = device_of(partner, devices)
            if name in plan.merged_set:
                tensors[partner] = torch.empty(plan.base_header.tensors[name].shape, dtype=self.dtype, device=device)
            else:
                weight = base.read(name)
                # A view of the file where nothing has to change: what is never merged is never copied.
                tensors[partner] = weight.to(device, self.dtype) if weight.is_floating_point() else weight.to(device)
        fill(self.model, tensors, devices)
        named = dict(self.model.named_parameters())
        self._merged = {name: named[partners[name]].requires_grad_() for name in plan.merged}
        self._arriving: dict[str, Sequence[Future[None]]] = {}
        self._leaving: Gradients | None = None
        self._watch_blocks()
        self._watch_gradients()

    def _watch_blocks(self) -> None:
        """Have each block wait for its own weights before it computes; it may be told to compute twice, too."""
        everywhere = set(self.plan.merged)
        for block in blocks_of(self.model):
            inside = {id(parameter) for parameter in block.parameters()}
            names = [name for name, parameter in self._merged.items() if id(parameter) in inside]
            everywhere.difference_update(names)
            block.register_forward_pre_hook(lambda *_, names=names: self._await(names))
            if self.plan.config.gradient_checkpointing:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        self._outside_blocks = sorted(everywhere)

    def _watch_gradients(self) -> None:
        """Have each gradient leave when it is final."""
        for name, parameter in self._merged.items():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._leave(name))

    def room(self, piece: Piece) -> Tensor:
        """See `Model.room`: the model's own memory, or memory from which a GPU can copy."""
        if self._merged[piece.name].is_cuda:
            return torch.empty(piece.numel, dtype=self.dtype, pin_memory=True)
        return self._slot(piece)

    def put(self, piece: Piece, merged_N: Tensor) -> None:
        """See `Model.put`."""
        if self._merged[piece.name].is_cuda:
            self._slot(piece).copy_(merged_N, non_blocking=True)

    def expect(self, arriving: Arrivals) -> None:
        """Compute with each merged tensor no sooner than it is there."""
        self._arriving = dict(arriving)

    def accumulate(self, samples: Sequence[tuple[Target, float]], leaving: Gradients | None = None) -> list[Losses]:
        """Add the gradient of Σ weight · (L_logit + λ_hid · L_hid) over (target, weight) to the merged tensors'.

        A target without labels counts weight · mean over tokens of H(softmax(z)) instead: AdaMerging, arXiv 2310.02575.

        One forward and one backward pass for all samples: weights are read, and their gradient written, once. With
        `leaving`, the sums leave as they become final, and are none afterwards.

        Raises:
            RunError: a loss is not finite.
        """
        self._await(self._outside_blocks)
        output = self._decode([target for target, _ in samples])
        if self._arriving:
            # A model that uses a block's weights without calling the block: what it computed with is not known.
            self._await(list(self._arriving))
            output = self._decode([target for target, _ in samples])
        last_BTH = output.last_hidden_state
        slope_BTH = torch.zeros_like(last_BTH)
        roots, losses = [(last_BTH, slope_BTH)], []
        for row, (target, weight) in enumerate(samples):
            own = row, slice(len(target.input_ids_T))
            loss = self._logit_loss(last_BTH[own], target, weight, slope_BTH[own])
            hidden = hidden_loss(
                {index: output.hidden_states[index][own] for index in target.hidden_TH},
                {index: tensor.to(output.hidden_states[index].device) for index, tensor in target.hidden_TH.items()},
            )
            if not (loss.isfinite() and hidden.isfinite()):
                raise RunError(
                    "the loss of the merged model is not finite",
                    do="lower `learning_rate` or the weights, or use float32",
                )
            roots.append((hidden, torch.full_like(hidden, weight * self.plan.config.parameters.hidden_weight)))
            kl, entropy = (loss.item(), None) if target.labelled else (0.0, loss.item())
            losses.append(Losses(kl, hidden.item(), entropy))
        self._backward([(root, slope) for root, slope in roots if root.requires_grad], leaving)
        return losses

    def _backward(self, roots: Sequence[tuple[Tensor, Tensor]], leaving: Gradients | None) -> None:
        # Not before: the parts of a head's gradient that `_logit_loss` left on it were not final.
        self._leaving = leaving
        torch.autograd.backward([root for root, _ in roots], [slope for _, slope in roots])
        if leaving is not None:
            for name, parameter in self._merged.items():
                if parameter.grad is not None:
                    self._leave(name)
        self._leaving = None

    def _decode(self, targets: Sequence[Target]) -> Any:
        """Hidden states of all layers; no logits. Shorter samples are filled up behind, where no token looks."""
        ids_BT = pad_sequence([target.input_ids_T for target in targets], batch_first=True)
        mask_BT = pad_sequence([torch.ones_like(target.input_ids_T) for target in targets], batch_first=True)
        return self.model.base_model(
            input_ids=ids_BT.to(self.device),
            attention_mask=mask_BT.to(self.device),
            output_hidden_states=True,
            use_cache=False,
        )

    def _logit_loss(self, last_TH: Tensor, target: Target, scale: float, slope_TH: Tensor) -> Tensor:
        """L_logit of a sample, or its mean entropy where no expert said anything to it.

        `scale` times its gradient by the last hidden state goes to `slope_TH`. Some tokens at a time; the gradient of a
        head that is merged is left on it.
        """
        temperature, tokens = self.plan.config.parameters.temperature, last_TH.shape[0]
        rows = max(1, LOGIT_BYTES // (4 * self.model.get_output_embeddings().weight.shape[0]))
        mean = torch.zeros((), device=last_TH.device)
        for start in range(0, tokens, rows):
            some = slice(start, min(start + rows, tokens))
            hidden_PH = last_TH[some].detach().requires_grad_()
            logits_PV = rebuild_logits(self.model, hidden_PH[None])[0]
            if target.labelled:
                loss, slope_PV = logit_loss(logits_PV, self._expert_logits(target, some, last_TH.device), temperature)
            else:
                loss, slope_PV = entropy_loss(logits_PV)
            mean += loss / tokens
            torch.autograd.backward(logits_PV, slope_PV.mul_(scale / tokens).to(logits_PV.dtype))
            assert hidden_PH.grad is not None
            slope_TH[some] = hidden_PH.grad
        return mean

    @torch.no_grad()
    def _expert_logits(self, target: Target, some: slice, device: torch.device) -> Tensor:
        """zₖ(x) of some tokens [P, V]: as they came, or from the last hidden state through the head that both share."""
        if target.logits_TV is not None:
            return target.logits_TV[some].to(device)
        assert target.last_hidden_TH is not None
        return rebuild_logits(self.model, target.last_hidden_TH[None, some].to(device))[0]

    def _slot(self, piece: Piece) -> Tensor:
        """The model's own memory of a piece."""
        slot: Tensor = self._merged[piece.name].detach().view(-1)[piece.start : piece.stop]
        return slot

    def _await(self, names: Iterable[str]) -> None:
        for name in names:
            for arrival in self._arriving.pop(name, ()):
                arrival.result()

    def _leave(self, name: str) -> None:
        if self._leaving is None:
            return
        parameter = self._merged[name]
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self._leaving.send(name, to_cpu(gradient), gradient.nbytes)
