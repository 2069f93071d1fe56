"""The merged weights in a model: targets in, losses and the gradient of the merged tensors out.

It holds one model and one gradient, whatever the number of experts: the coefficients are the trainer's affair, the task
vectors the shards'. It computes with what has arrived and lets go of what is final, so that both can travel meanwhile.
Letters in tensor names: B samples of a pass, T tokens, C those whose losses count, P some of them, H hidden features, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from engine.codec import to_cpu
from engine.errors import RunError
from engine.learning.losses import entropy_loss, hidden_loss, logit_loss, relative_hidden_loss
from engine.learning.targets import Target
from engine.models.forward import arguments, blocks_of, decode, language_model, rebuild_logits
from engine.models.loading import load_model_config
from engine.models.skeleton import build_skeleton, load_weights, part_of
from engine.planning.open_models import open_base
from engine.planning.plan import Plan
from engine.shards.protocol import Arrivals, Gradients
from engine.sizes import LOGIT_BYTES
from engine.task_vectors.pieces import Piece


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
        config = load_model_config(base.folder, plan.config.trust_remote_code)
        self.model, places = build_skeleton(config, plan.base_header.tensors, self.dtype, base.folder)

        def weight(name: str) -> Tensor | None:
            return None if name in plan.merged_set else base.read(name)

        load_weights(self.model, places, self.dtype, device, base.folder, weight)
        named = dict(self.model.named_parameters())
        # Parameter → the merged tensors that it is, or that are parts of it.
        self._parts: dict[str, list[str]] = {}
        for name in plan.merged:
            self._parts.setdefault(places[name].parameter, []).append(name)
        self._parameters = {parameter: named[parameter].requires_grad_() for parameter in self._parts}
        self._places = places
        self._arriving: dict[str, Sequence[Future[None]]] = {}
        self._leaving: Gradients | None = None
        self._watch_blocks()
        self._watch_gradients()

    def _watch_blocks(self) -> None:
        """Have each block wait for its own weights before it computes; it may be told to compute twice, too."""
        everywhere = set(self.plan.merged)
        for block in blocks_of(self.model):
            inside = {id(parameter) for parameter in block.parameters()}
            holding = [name for name, parameter in self._parameters.items() if id(parameter) in inside]
            names = [name for parameter in holding for name in self._parts[parameter]]
            everywhere.difference_update(names)
            block.register_forward_pre_hook(lambda *_, names=names: self._await(names))
            if self.plan.config.gradient_checkpointing:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        self._outside_blocks = sorted(everywhere)
        self._vocabulary = language_model(self.model).get_output_embeddings().weight.shape[0]

    def _watch_gradients(self) -> None:
        """Have each gradient leave when it is final."""
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._leave(name))

    def buffer(self, piece: Piece) -> Tensor:
        """See `PieceSink.buffer`: the model's own memory, or memory from which a GPU can copy."""
        if self._slot(piece).is_cuda:
            return torch.empty(piece.numel, dtype=self.dtype, pin_memory=True)
        return self._slot(piece)

    def put(self, piece: Piece, merged_N: Tensor) -> None:
        """See `PieceSink.put`."""
        if self._slot(piece).is_cuda:
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
        last_BTH, layers = self._forward([target for target, _ in samples])
        slope_BTH = torch.zeros_like(last_BTH)
        roots, losses = [(last_BTH, slope_BTH)], []
        for row, (target, weight) in enumerate(samples):
            own = row, _rows(target)
            loss, hidden, slope_CH = self._sample_losses(last_BTH, layers, own, target, weight)
            slope_BTH[own] = slope_CH
            roots.append((hidden, torch.full_like(hidden, weight * self.plan.config.parameters.hidden_weight)))
            losses.append(loss)
        self._backward([(root, slope) for root, slope in roots if root.requires_grad], leaving)
        return losses

    @torch.no_grad()
    def measure(self, targets: Sequence[Target]) -> list[Losses]:
        """The losses of samples in one forward pass; nothing is added to any gradient.

        Raises:
            RunError: a loss is not finite.
        """
        last_BTH, layers = self._forward(targets)
        return [
            self._sample_losses(last_BTH, layers, (row, _rows(target)), target, 0.0)[0]
            for row, target in enumerate(targets)
        ]

    def _forward(self, targets: Sequence[Target]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The last hidden state and those of all layers, of the merged weights that were announced."""
        self._await(self._outside_blocks)
        found = self._decode(targets)
        if self._arriving:
            # A model that uses a block's weights without calling the block: what it computed with is not known.
            self._await(list(self._arriving))
            found = self._decode(targets)
        return found

    def _sample_losses(
        self,
        last_BTH: Tensor,
        layers: tuple[Tensor, ...],
        own: tuple[int, slice | Tensor],
        target: Target,
        scale: float,
    ) -> tuple[Losses, Tensor, Tensor]:
        """A sample's losses; the hidden one as autograd knows it, and `scale` times the other's gradient [C, H]."""
        loss, slope_CH = self._logit_loss(last_BTH[own], target, scale)
        hidden = self._hidden_loss({index: layers[index][own] for index in target.hidden_CH}, target)
        if not (loss.isfinite() and hidden.isfinite()):
            raise RunError(
                "the loss of the merged model is not finite",
                do="lower `learning_rate` or the weights, or use float32",
            )
        kl, entropy = (loss.item(), None) if target.has_expert else (0.0, loss.item())
        return Losses(kl, hidden.item(), entropy), hidden, slope_CH

    def _backward(self, roots: Sequence[tuple[Tensor, Tensor]], leaving: Gradients | None) -> None:
        # Not before: the parts of a head's gradient that `_logit_loss` left on it were not final.
        self._leaving = leaving
        torch.autograd.backward([root for root, _ in roots], [slope for _, slope in roots])
        if leaving is not None:
            for name, parameter in self._parameters.items():
                if parameter.grad is not None:
                    self._leave(name)
        self._leaving = None

    def _decode(self, targets: Sequence[Target]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The last hidden state and those of all layers; no logits.

        Shorter samples are filled up behind, where no token looks; one with more inputs than its tokens is alone.
        """
        assert len(targets) == 1 or not any(target.inputs for target in targets)
        ids_BT = pad_sequence([target.input_ids_T for target in targets], batch_first=True)
        mask_BT = pad_sequence([torch.ones_like(target.input_ids_T) for target in targets], batch_first=True)
        ids_BT, mask_BT = ids_BT.to(self.device), mask_BT.to(self.device)
        return decode(self.model, arguments(ids_BT, mask_BT, targets[0].inputs))

    def _hidden_loss(self, student_CH: dict[int, Tensor], target: Target) -> Tensor:
        """L_hid of a sample."""
        expert_CH = {index: tensor.to(student_CH[index].device) for index, tensor in target.hidden_CH.items()}
        if self.plan.config.parameters.hidden_loss == "mse":
            return hidden_loss(student_CH, expert_CH)
        # The first token only gathers attention: its state is hundreds of times larger, and says nothing of the text.
        counted = target.counted_C
        some = slice(1 if counted is None or counted[0] == 0 else 0, None)
        return relative_hidden_loss(
            {index: tensor[some] for index, tensor in student_CH.items()},
            {index: tensor[some] for index, tensor in expert_CH.items()},
        )

    def _logit_loss(self, last_CH: Tensor, target: Target, scale: float) -> tuple[Tensor, Tensor]:
        """L_logit of a sample, or its mean entropy where no expert said anything to it.

        And `scale` times its gradient by the last hidden state [C, H]. Some tokens at a time; the gradient of a head
        that is merged is left on it.
        """
        temperature, tokens = self.plan.config.parameters.temperature, last_CH.shape[0]
        rows = max(1, LOGIT_BYTES // (4 * self._vocabulary))
        mean, slope_CH = torch.zeros((), device=last_CH.device), torch.zeros_like(last_CH)
        for start in range(0, tokens, rows):
            some = slice(start, min(start + rows, tokens))
            hidden_PH = last_CH[some].detach().requires_grad_(torch.is_grad_enabled())
            logits_PV = rebuild_logits(self.model, hidden_PH[None])[0]
            if target.has_expert:
                loss, slope_PV = logit_loss(logits_PV, self._expert_logits(target, some, last_CH.device), temperature)
            else:
                loss, slope_PV = entropy_loss(logits_PV)
            mean += loss / tokens
            if not torch.is_grad_enabled():
                continue
            torch.autograd.backward(logits_PV, slope_PV.mul_(scale / tokens).to(logits_PV.dtype))
            assert hidden_PH.grad is not None
            slope_CH[some] = hidden_PH.grad
        return mean, slope_CH

    @torch.no_grad()
    def _expert_logits(self, target: Target, some: slice, device: torch.device) -> Tensor:
        """zₖ(x) of some tokens [P, V]: as they came, or from the last hidden state through the head that both share."""
        if target.logits_CV is not None:
            return target.logits_CV[some].to(device)
        assert target.last_hidden_CH is not None
        return rebuild_logits(self.model, target.last_hidden_CH[None, some].to(device))[0]

    def _slot(self, piece: Piece) -> Tensor:
        """The model's own memory of a piece."""
        whole = self._parameters[self._places[piece.name].parameter].detach()
        return self._part(whole, piece.name).view(-1)[piece.start : piece.stop]

    def _part(self, whole: Tensor, name: str) -> Tensor:
        """The merged tensor `name` in its parameter, or in the gradient of that."""
        return part_of(whole, self._places[name], self.plan.base_header.tensors[name].shape)

    def _await(self, names: Iterable[str]) -> None:
        for name in names:
            for arrival in self._arriving.pop(name, ()):
                arrival.result()

    def _leave(self, parameter: str) -> None:
        if self._leaving is None:
            return
        whole = self._parameters[parameter]
        gradient, whole.grad = whole.grad, None
        assert gradient is not None
        gradient = gradient.contiguous()
        for name in self._parts[parameter]:
            part = self._part(gradient, name)
            self._leaving.send(name, to_cpu(part), part.nbytes)


def _rows(target: Target) -> slice | Tensor:
    """The places of a sample's row whose losses count; what is filled up behind it never does."""
    return slice(len(target.input_ids_T)) if target.counted_C is None else target.counted_C
