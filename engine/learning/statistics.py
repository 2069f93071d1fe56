"""The statistics of a model on samples: moments of its layers' inputs, Fisher information, and sensitivities.

The moments are collected block by block, so that the sums of one block are in memory at a time. Letters: B batch (1),
T tokens, V vocabulary, N tokens of all samples, I input features, S samples, E elements of some tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.calibration.samples import Sample
from engine.learning.frozen_expert import FrozenExpert
from engine.methods.options import Statistic
from engine.models.blocks import BlockRun
from engine.models.skeleton import part_of
from engine.sizes import PIECE, SENSITIVITIES
from engine.statistics.files import StatisticsHeader, StatisticsWriter
from engine.statistics.moments import Moments
from engine.statistics.optimizer_state import squared_gradients
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder
from engine.task_vectors.rounding import seed_of

# Elements of the Fisher information in one file.
FILE_NUMEL = 1 << 28
Inputs = Mapping[str, Tensor]


def collect(
    model: FrozenExpert,
    samples: Sequence[tuple[Sample, Inputs]],
    kinds: Sequence[Statistic],
    folder: Folder,
    facts: Mapping[str, Any],
    optimizer_state: Path | None = None,
) -> StatisticsHeader:
    """Collect the statistics of a model on samples, and write them to a folder.

    Every sum is float32 and in the order of the samples.

    Args:
        model: The expert, or the base.
        samples: The samples with their pixel inputs.
        kinds: What is collected.
        folder: The folder.
        facts: `base` and `model` of `StatisticsHeader`.
        optimizer_state: The state of the model's training, whose squared gradients are then its Fisher information.

    Returns:
        The header of the files.

    Raises:
        CheckpointError: The model does not run block by block, or see `squared_gradients`.
    """
    given, writer = [model.given(sample, inputs) for sample, inputs in samples], StatisticsWriter(folder)
    if {"activations", "gram"} & set(kinds):
        _collect_moments(model, given, "gram" in kinds, writer)
    data = digest_of(samples)
    if "fisher" in kinds and optimizer_state is None:
        _collect_fisher(model, given, writer)
    elif "fisher" in kinds and optimizer_state is not None:
        shapes = {name: tuple(parameter.shape) for name, parameter in model.model.named_parameters()}
        _write_fisher(model, dict(squared_gradients(optimizer_state, shapes)), writer)
        state = LocalFolder(optimizer_state.parent).digest(optimizer_state.name)
        data = hashlib.sha256(f"{data}{state}".encode()).hexdigest()
    if "sensitivity" in kinds:
        _collect_sensitivity(model, given, writer)
    return writer.finish(
        **facts,
        data=data,
        sequences=len(samples),
        tokens=sum(arguments["input_ids"].shape[1] for arguments in given),
        dtype=str(model.dtype).removeprefix("torch."),
        kinds=tuple(kinds),
    )


def digest_of(samples: Sequence[tuple[Sample, Inputs]]) -> str:
    """Return the SHA-256 of the tokens of samples, the lengths of their responses, and their pixel inputs."""
    found = hashlib.sha256()
    for sample, inputs in samples:
        found.update(json.dumps([sample.input_ids, sample.generate, sorted(inputs)]).encode())
        for name in sorted(inputs):
            tensor = inputs[name].contiguous()
            found.update(json.dumps([str(tensor.dtype), tensor.shape]).encode())
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


class MomentSums:
    """Sums of moments over samples. The inputs are kept until a Gram matrix takes less; see `Moments`."""

    def __init__(self, features: int, gram: bool) -> None:
        self._tokens, self._inputs = 0, list[Tensor]()
        self._gram: Tensor | None = None
        self._square, self._absolute = torch.zeros(2, features)
        self._most = features // 2 if gram else -1

    def add(self, x_NI: Tensor) -> None:
        """Add the inputs of one sample."""
        x_NI = x_NI.to(torch.float32, copy=True)
        self._tokens += len(x_NI)
        self._square += x_NI.square().sum(0).cpu()
        self._absolute += x_NI.abs().sum(0).cpu()
        if self._most < 0:
            return
        self._inputs.append(x_NI)
        if self._tokens > self._most:
            for kept in self._inputs:
                self._gram = kept.T @ kept if self._gram is None else self._gram.addmm_(kept.T, kept)
            self._inputs = []

    def moments(self) -> Moments:
        """Return the moments of all samples."""
        inputs = torch.cat(self._inputs).cpu() if self._inputs else None
        gram = None if self._gram is None else self._gram.cpu()
        return Moments(self._tokens, self._square, self._absolute, gram, inputs)


def _collect_moments(
    model: FrozenExpert, given: Sequence[Mapping[str, Any]], gram: bool, writer: StatisticsWriter
) -> None:
    """Write the moments of the inputs of all linear layers, a file for each block."""
    weights = {place.parameter: name for name, place in model.places.items() if not place.start}
    run = BlockRun(model.model, given, model.device)
    for part in run.parts:
        sums: dict[tuple[str, ...], MomentSums] = {}

        def observe(layers: tuple[str, ...], x: Tensor, sums: dict[tuple[str, ...], MomentSums] = sums) -> None:
            names = tuple(weights[f"{layer}.weight"] for layer in layers if f"{layer}.weight" in weights)
            if names:
                sums.setdefault(names, MomentSums(x.shape[-1], gram)).add(x.reshape(-1, x.shape[-1]))

        layers = {name: layer for name, layer in run.linears(part).items() if isinstance(layer, torch.nn.Linear)}
        run.step(part, layers, observe)
        writer.moments([(names, each.moments()) for names, each in sums.items()])


def _collect_fisher(model: FrozenExpert, given: Sequence[Mapping[str, Any]], writer: StatisticsWriter) -> None:
    """Write the mean of (∂ log p(y|x)/∂θ)² over samples, y sampled from the model at every position.

    One backward pass for each sample, since the square of a sum is not the sum of squares.
    """
    squares: dict[str, Tensor] = {}
    handles = []

    def hook(name: str, parameter: Tensor) -> Any:
        def add(_: Tensor) -> None:
            assert parameter.grad is not None
            squares[name].add_(parameter.grad.float().square())
            parameter.grad = None

        register: Any = parameter.register_post_accumulate_grad_hook
        return register(add)

    for name, parameter in model.model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
            squares[name] = torch.zeros(parameter.shape, device=parameter.device)
            handles.append(hook(name, parameter))
    for index, arguments in enumerate(given):
        with torch.enable_grad():
            logits_BTV = model.model(**arguments, use_cache=False, return_dict=True).logits
            log_probabilities_TV = logits_BTV[0].float().log_softmax(-1)
            # On the CPU, so that the labels do not depend on the kind of device's random numbers.
            generator = torch.Generator().manual_seed(seed_of(f"fisher\0{index}") % 2**63)
            labels_T1 = torch.multinomial(log_probabilities_TV.detach().exp().cpu(), 1, generator=generator)
            log_probabilities_TV.gather(1, labels_T1.to(log_probabilities_TV.device)).sum().backward()
    for handle in handles:
        handle.remove()
    model.model.requires_grad_(False)
    _write_fisher(model, {name: square / len(given) for name, square in squares.items()}, writer)


def _write_fisher(model: FrozenExpert, of_parameters: Mapping[str, Tensor], writer: StatisticsWriter) -> None:
    """Write the Fisher information of parameters by the names of the files' tensors, some of them to each file."""
    tensors, numel = dict[str, Tensor](), 0
    for name, place in model.places.items():
        if place.parameter not in of_parameters:
            continue
        shape = model.plan.base_header.tensors[name].shape
        tensors[name] = part_of(of_parameters[place.parameter], place, shape).cpu()
        numel += tensors[name].numel()
        if numel > FILE_NUMEL:
            writer.fisher(tensors)
            tensors, numel = {}, 0
    writer.fisher(tensors)


def _collect_sensitivity(model: FrozenExpert, given: Sequence[Mapping[str, Any]], writer: StatisticsWriter) -> None:
    """Write mean square and median over samples of g∘θ, g the gradient of the mean loss of a sample's next tokens.

    A median needs the values of all samples, so the samples pass once for each group of tensors whose values fit in
    memory, a large tensor in parts.
    """
    most = max(1, SENSITIVITIES // len(given))
    for names in _groups(model, most):
        shapes = [model.plan.base_header.tensors[name].shape for name in names]
        numels = [math.prod(shape) for shape in shapes]
        squares, medians = [], []
        for start in range(0, max(1, sum(numels)), most):
            values_SE = _sensitivities(model, given, names, start, min(start + most, sum(numels)))
            square_E = torch.zeros(values_SE.shape[1])
            for values_E in values_SE:
                square_E.addcmul_(values_E, values_E)
            squares.append(square_E.div_(len(given)))
            for part_SE in torch.split(values_SE, PIECE, dim=1):
                median_E = part_SE.to(model.device).kthvalue(len(given) // 2 + 1, dim=0).values
                medians.append(median_E.cpu())
        parts = (torch.split(torch.cat(each), numels) for each in (squares, medians))
        whole = zip(names, shapes, *parts, strict=True)
        writer.sensitivity({name: (square.view(shape), median.view(shape)) for name, shape, square, median in whole})


def _groups(model: FrozenExpert, most: int) -> Iterator[list[str]]:
    """Yield the names of all tensors of floats, in groups of at most that many elements, or of one tensor."""
    parameters, group, numel = _parameters(model), list[str](), 0
    for name, place in model.places.items():
        if place.parameter in parameters:
            own = math.prod(model.plan.base_header.tensors[name].shape)
            if group and numel + own > most:
                yield group
                group, numel = [], 0
            group.append(name)
            numel += own
    if group:
        yield group


def _parameters(model: FrozenExpert) -> dict[str, Tensor]:
    """Return the parameters of floats by name, a tied one by each of its names."""
    named = model.model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if parameter.is_floating_point()}


def _sensitivities(
    model: FrozenExpert, given: Sequence[Mapping[str, Any]], names: Sequence[str], start: int, stop: int
) -> Tensor:
    """Return g∘θ [S, E], float32, of the elements from `start` to `stop` of these tensors one after the other."""
    known, places = _parameters(model), [model.places[name] for name in names]
    shapes = [model.plan.base_header.tensors[name].shape for name in names]
    parameters = {place.parameter: known[place.parameter] for place in places}
    values_SE = torch.zeros(len(given), stop - start)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for values_E, arguments in zip(values_SE, given, strict=True):
        with torch.enable_grad():
            logits_BTV = model.model(**arguments, use_cache=False, return_dict=True).logits
            next_T1 = arguments["input_ids"][0, 1:, None]
            chosen_T1 = logits_BTV[0, :-1].float().log_softmax(-1).gather(1, next_T1.to(logits_BTV.device))
            loss = -chosen_T1.sum() / max(1, len(chosen_T1))
        # Samples without images have no gradients of a vision tower, which may be all that the group has.
        if not loss.requires_grad:
            continue
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        gradients = {name: gradient.contiguous() for name, gradient in zip(parameters, found, strict=True)}
        products = [
            part_of(gradients[place.parameter], place, shape).float()
            * part_of(parameters[place.parameter].detach(), place, shape).float()
            for place, shape in zip(places, shapes, strict=True)
        ]
        values_E.copy_(torch.cat([product.reshape(-1).cpu() for product in products])[start:stop])
    model.model.requires_grad_(False)
    return values_SE
