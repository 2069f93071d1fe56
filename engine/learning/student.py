"""The student: the model with the merged weights, its losses against targets, and the gradient of the merged tensors.

The student holds one model and one gradient, whatever the number of experts; the trainer has the coefficients, the
shards have the task vectors. The forward pass runs while merged tensors still arrive, and gradients leave during the
backward pass, as soon as they are final.
Letters in tensor names: B samples of a pass, T tokens, C tokens that count in the losses, P a part of these, H hidden
features, V vocabulary, N elements of a piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from engine.errors import RunError
from engine.learning.losses import entropy_loss, hidden_loss, logit_loss, relative_hidden_loss
from engine.learning.targets import Target
from engine.models.devices import ONE_DEVICE, Room
from engine.models.forward import arguments, blocks_of, decode, language_model, rebuild_logits
from engine.models.skeleton import build_skeleton, load_weights, part_of
from engine.planning.open_models import load_base_config, open_base
from engine.planning.plan import Plan
from engine.shards.protocol import Arrivals, Gradients
from engine.sizes import LOGIT_BYTES
from engine.task_vectors.pieces import Piece
from engine.transfers import RING, computed, on_gpu, start_copy


@dataclass(frozen=True)
class Losses:
    """The losses of one sample, before weighting: L_logit and L_hid, or the mean entropy.

    With a target of an expert, `entropy` is None; without one (AdaMerging), `kl` and `hidden` are 0. `certainties`: see
    `Student.measure`; None if they were not asked for.
    """

    kl: float
    hidden: float
    entropy: float | None = None
    certainties: tuple[float, float] | None = None


class Student:
    """The model that is being merged, and the `PieceSink` of its merged tensors.

    Merged tensors are not initialised: they must be written with `buffer` and `put`, or announced with `expect`, before
    the first pass. `logit_bytes`: bytes of logits in memory at a time; None: `LOGIT_BYTES`.
    """

    def __init__(
        self, plan: Plan, device: torch.device, room: Room = ONE_DEVICE, logit_bytes: int | None = None
    ) -> None:
        self._logit_bytes = logit_bytes
        self.plan, self.device, self.dtype = plan, device, getattr(torch, plan.dtype)
        base = open_base(plan)
        config = load_base_config(plan)
        self.model, places = build_skeleton(config, plan.base_header.tensors, self.dtype, base.folder)

        if plan.config.gradients != "stream":
            room = replace(room, gradients=frozenset(places[name].parameter for name in plan.merged))

        def weight(name: str) -> Tensor | None:
            return None if name in plan.merged_set else base.read(name)

        load_weights(self.model, places, self.dtype, device, base.folder, weight, room)
        named = dict(self.model.named_parameters())
        # Parameter → names of the merged tensors that it consists of.
        self._parts: dict[str, list[str]] = {}
        for name in plan.merged:
            self._parts.setdefault(places[name].parameter, []).append(name)
        self._parameters = {parameter: named[parameter].requires_grad_() for parameter in self._parts}
        self._places = places
        self._arriving: dict[str, Sequence[Future[None]]] = {}
        # On GPUs: events of the copies of merged pieces by tensor, and of the last pass by GPU.
        self._copies: dict[str, list[Any]] = {name: [] for name in plan.merged}
        self._passed: dict[torch.device, Any] = {}
        self._leaving: Gradients | None = None
        self._watch_blocks()
        self._watch_gradients()
        self._note_pass()

    def _watch_blocks(self) -> None:
        """Make each block wait for its own weights before it runs, and apply gradient checkpointing if configured."""
        outside = set(self.plan.merged)
        for block in blocks_of(self.model):
            inside = {id(parameter) for parameter in block.parameters()}
            holding = [name for name, parameter in self._parameters.items() if id(parameter) in inside]
            names = [name for parameter in holding for name in self._parts[parameter]]
            outside.difference_update(names)
            block.register_forward_pre_hook(lambda *_, names=names: self._await(names))
            if self.plan.config.gradient_checkpointing:
                # Nothing in a model in evaluation mode is random.
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        self._outside_blocks = sorted(outside)
        self._vocabulary = language_model(self.model).get_output_embeddings().weight.shape[0]

    def _watch_gradients(self) -> None:
        """Make each gradient leave as soon as it is final."""
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._leave(name))

    def buffer(self, piece: Piece) -> Tensor:
        """See `PieceSink.buffer`: the model's own memory on a CPU, pinned memory for a copy to a GPU."""
        slot_N = self._slot(piece)
        return RING.take(piece.numel, self.dtype) if on_gpu(slot_N) else slot_N

    def put(self, piece: Piece, merged_N: Tensor) -> None:
        """See `PieceSink.put`."""
        slot_N = self._slot(piece)
        if on_gpu(slot_N):
            # The last pass still reads the weights that are overwritten here.
            copied = start_copy(slot_N, merged_N, self._passed[slot_N.device])
            self._copies[piece.name].append(copied)
            RING.give(merged_N, copied)

    def whole(self, name: str) -> Tensor:
        """See `PieceSink.whole`."""
        return self._part(self._parameters[self._places[name].parameter].detach(), name)

    def expect(self, arriving: Arrivals) -> None:
        """Make the next pass wait for each merged tensor until it has arrived."""
        self._arriving = dict(arriving)

    def accumulate(self, samples: Sequence[tuple[Target, float]], leaving: Gradients | None = None) -> list[Losses]:
        """Add the gradient of the weighted losses to that of the merged tensors, in one forward and one backward pass.

        The loss of a (target, weight) is weight · (L_logit + λ_hid · L_hid), or, without an expert's outputs,
        weight · mean over tokens of H(softmax(z)): AdaMerging, arXiv 2310.02575.

        Args:
            leaving: Receives the accumulated gradients as they become final; the parameters keep none. None: the
                gradients stay on the parameters.

        Returns:
            The losses of each sample, before weighting.

        Raises:
            RunError: A loss is not finite.
        """
        last_BTH, layers = self._forward([target for target, _ in samples])
        slope_BTH = torch.zeros_like(last_BTH)
        roots, losses = [(last_BTH, slope_BTH)], []
        for row, (target, weight) in enumerate(samples):
            loss, hidden, slope_CH = self._sample_losses(last_BTH, layers, row, target, weight)
            slope_BTH[row, _index(target, slope_BTH.device)] = slope_CH
            roots.append((hidden, torch.full_like(hidden, weight * self.plan.config.parameters.hidden_weight)))
            losses.append((loss, hidden))
        self._backward([(root, slope) for root, slope in roots if root.requires_grad], leaving)
        self._note_pass()
        return self._read(losses, [target for target, _ in samples])

    @torch.no_grad()
    def measure(self, targets: Sequence[Target], certain: bool = False) -> list[Losses]:
        """Return the losses of samples in one forward pass, without a gradient.

        With `certain`, also the certainties of the model and of the expert: 1 − H(softmax(z)) / ln V, means over the
        tokens. One that always predicts the same token is at 1, one that takes all tokens for equally likely at 0.

        Raises:
            RunError: A loss is not finite.
        """
        last_BTH, layers = self._forward(targets)
        each = [self._sample_losses(last_BTH, layers, row, target, 0.0) for row, target in enumerate(targets)]
        pairs = [self._certainties(last_BTH[row], one) if certain else None for row, one in enumerate(targets)]
        self._note_pass()
        losses = self._read([(loss, hidden) for loss, hidden, _ in each], targets)
        return [
            one if pair is None else replace(one, certainties=(float(pair[0]), float(pair[1])))
            for one, pair in zip(losses, pairs, strict=True)
        ]

    def _certainties(self, last_TH: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Return the certainties of the model and of the expert on a sample, scalars; see `measure`."""
        last_CH = last_TH[_index(target, last_TH.device)]
        most = len(last_CH) * math.log(self._vocabulary)
        ours, theirs = torch.zeros((), device=last_CH.device), torch.zeros((), device=last_CH.device)
        for part in self._in_parts(len(last_CH)):
            ours += entropy_loss(rebuild_logits(self.model, last_CH[None, part])[0])[0]
            theirs += entropy_loss(self._expert_logits(target, part, last_CH.device))[0]
        return 1 - ours / most, 1 - theirs / most

    def _read(self, losses: Sequence[tuple[Tensor, Tensor]], targets: Sequence[Target]) -> list[Losses]:
        """Return the losses of a pass as numbers. Outside of the model's code, this alone waits for a GPU."""
        device = losses[-1][0].device
        flat = [one.detach().to(device, non_blocking=True) for pair in losses for one in pair]
        numbers = torch.stack(flat).tolist()
        if not all(map(math.isfinite, numbers)):
            raise not_finite("loss of the merged model", self.dtype)
        pairs = zip(numbers[::2], numbers[1::2], targets, strict=True)
        return [Losses(one, hid) if target.has_expert else Losses(0.0, hid, one) for one, hid, target in pairs]

    def _forward(self, targets: Sequence[Target]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the last hidden state and those of all layers, after all announced weights have arrived."""
        self._await(self._outside_blocks)
        states = self._decode(targets)
        if self._arriving:
            # The model uses weights of a block without calling the block: the pass may have run on unfilled memory.
            self._await(list(self._arriving))
            states = self._decode(targets)
        return states

    def _sample_losses(
        self, last_BTH: Tensor, layers: tuple[Tensor, ...], row: int, target: Target, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses of the sample in a row of the pass, and a gradient.

        These are L_logit or the mean entropy, L_hid with its graph, and `scale` times the gradient [C, H] of the first.
        """
        loss, slope_CH = self._logit_loss(last_BTH[row, _index(target, last_BTH.device)], target, scale)
        states = {layer: layers[layer][row, _index(target, layers[layer].device)] for layer in target.hidden_CH}
        return loss, self._hidden_loss(states, target), slope_CH

    def _backward(self, roots: Sequence[tuple[Tensor, Tensor]], leaving: Gradients | None) -> None:
        # Set only here: the gradients that `_logit_loss` adds to a merged head are not final before this pass.
        self._leaving = leaving
        torch.autograd.backward([root for root, _ in roots], [slope for _, slope in roots])
        if leaving is not None:
            for name, parameter in self._parameters.items():
                if parameter.grad is not None:
                    self._leave(name)
        self._leaving = None

    def _decode(self, targets: Sequence[Target]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the last hidden state and those of all layers, without computing logits.

        Shorter samples are padded on the right, where causal attention does not look. A sample with pixel inputs has a
        pass of its own.
        """
        assert len(targets) == 1 or not any(target.inputs for target in targets)
        ids_BT = pad_sequence([target.input_ids_T for target in targets], batch_first=True)
        mask_BT = pad_sequence([torch.ones_like(target.input_ids_T) for target in targets], batch_first=True)
        ids_BT, mask_BT = (tensor.to(self.device, non_blocking=True) for tensor in (ids_BT, mask_BT))
        return decode(self.model, arguments(ids_BT, mask_BT, targets[0].inputs))

    def _hidden_loss(self, student_CH: dict[int, Tensor], target: Target) -> Tensor:
        """Return L_hid of a sample, as the option `hidden_loss` defines it."""
        expert_CH = {layer: tensor.to(student_CH[layer].device) for layer, tensor in target.hidden_CH.items()}
        if self.plan.config.parameters.hidden_loss == "mse":
            return hidden_loss(student_CH, expert_CH)
        # Without the first token, an attention sink: its state is hundreds of times larger and would dominate the loss.
        counted = target.counted_C
        rest = slice(1 if counted is None or counted[0] == 0 else 0, None)
        return relative_hidden_loss(
            {layer: tensor[rest] for layer, tensor in student_CH.items()},
            {layer: tensor[rest] for layer, tensor in expert_CH.items()},
        )

    def _logit_loss(self, last_CH: Tensor, target: Target, scale: float) -> tuple[Tensor, Tensor]:
        """Return L_logit of a sample (its mean entropy without an expert's outputs), and a gradient [C, H].

        The gradient is that of `scale` · loss in the last hidden state; a merged head accumulates its gradient itself.
        The logits are computed in parts of at most `logit_bytes`.
        """
        temperature, tokens = self.plan.config.parameters.temperature, last_CH.shape[0]
        mean, slope_CH = torch.zeros((), device=last_CH.device), torch.zeros_like(last_CH)
        for part in self._in_parts(tokens):
            hidden_PH = last_CH[part].detach().requires_grad_(torch.is_grad_enabled())
            logits_PV = rebuild_logits(self.model, hidden_PH[None])[0]
            if target.has_expert:
                loss, slope_PV = logit_loss(logits_PV, self._expert_logits(target, part, last_CH.device), temperature)
            else:
                loss, slope_PV = entropy_loss(logits_PV)
            mean += loss / tokens
            if not torch.is_grad_enabled():
                continue
            torch.autograd.backward(logits_PV, slope_PV.mul_(scale / tokens).to(logits_PV.dtype))
            assert hidden_PH.grad is not None
            slope_CH[part] = hidden_PH.grad
        return mean, slope_CH

    def _in_parts(self, tokens: int) -> Iterator[slice]:
        """Yield parts of the tokens whose logits have at most `logit_bytes`."""
        rows = max(1, (self._logit_bytes or LOGIT_BYTES) // (4 * self._vocabulary))
        for start in range(0, tokens, rows):
            yield slice(start, min(start + rows, tokens))

    @torch.no_grad()
    def _expert_logits(self, target: Target, part: slice, device: torch.device) -> Tensor:
        """Return zₖ(x) of a part of the tokens, [P, V]: the stored logits, or rebuilt by the head of both models."""
        if target.logits_CV is not None:
            return target.logits_CV[part].to(device)
        assert target.last_hidden_CH is not None
        return rebuild_logits(self.model, target.last_hidden_CH[None, part].to(device))[0]

    def _slot(self, piece: Piece) -> Tensor:
        """Return the model's memory of a piece, [N]."""
        return self.whole(piece.name).view(-1)[piece.start : piece.stop]

    def _part(self, whole: Tensor, name: str) -> Tensor:
        """Return the part of a parameter, or of its gradient, that is the merged tensor `name`."""
        return part_of(whole, self._places[name], self.plan.base_header.tensors[name].shape)

    def _await(self, names: Iterable[str]) -> None:
        for name in names:
            for arrival in self._arriving.pop(name, ()):
                arrival.result()
            copies, self._copies[name] = self._copies[name], []
            for copied in copies:
                copied.wait(torch.cuda.current_stream(self.whole(name).device))

    def _note_pass(self) -> None:
        """Note how far the streams of the GPUs must be before merged tensors may be overwritten."""
        on = {parameter.device for parameter in self._parameters.values() if on_gpu(parameter)}
        self._passed = {device: computed(device) for device in on}

    def _leave(self, parameter: str) -> None:
        if self._leaving is None:
            return
        whole = self._parameters[parameter]
        gradient, whole.grad = whole.grad, None
        assert gradient is not None
        gradient = gradient.contiguous()
        for name in self._parts[parameter]:
            self._leaving.send(name, self._part(gradient, name))


def not_finite(what: str, dtype: torch.dtype) -> RunError:
    """Return the error for a loss, or a gradient, that is not finite in the dtype of the passes."""
    wider = "" if dtype is torch.float32 else ", or use `dtype: float32`"
    return RunError(f"the {what} is not finite", do=f"lower `learning_rate` or `weight`{wider}, and run with --fresh")


def _index(target: Target, device: torch.device) -> slice | Tensor:
    """Return the positions of a sample that count in its losses. Padding never counts."""
    counted = target.counted_C
    return slice(len(target.input_ids_T)) if counted is None else counted.to(device, non_blocking=True)
