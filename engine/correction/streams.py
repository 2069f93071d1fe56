"""The work of an actor that calibrates a merged model: hidden states of an expert's samples, and shares in equations.

Two streams go through the blocks: the samples in the merged model, solved so far, and in the expert. A part takes two
kinds of calls, which any actor can do from the files in the state: `Streams.contribute` for each expert, and then
`solve_group` for each group of layers. The bits of the result depend on neither the actors nor their order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.calibration.samples import Sample
from engine.correction.files import (
    Contribution,
    LayerGroup,
    SolvedLayer,
    load_calibrated,
    load_contribution,
    load_merged,
    load_sealed_tensors,
    save_contribution,
    save_tensors,
    share_file,
    solved_file,
    stream_file,
    tokens_file,
)
from engine.correction.partial_model import PartialModel, Read, is_norm, normalised
from engine.correction.rules import Rule
from engine.correction.sums import Affine, InputSums, NormSums, added, anchor_of, solve_linear, solve_norm
from engine.errors import CheckpointError, DamagedError
from engine.learning.frozen_expert import FrozenExpert, config_of, weight_of
from engine.models.blocks import SampleState
from engine.models.forward import arguments
from engine.planning.open_models import load_base_config, open_base, open_expert
from engine.planning.plan import Plan
from engine.storage.folder import Folder
from engine.task_vectors.experts import FullExpert

Names = tuple[str, ...]


class Streams:
    """The samples of expert `index` in the merged model and in the expert.

    Args:
        plan: The plan.
        rule: How layers are solved.
        index: k.
        given: The arguments of a forward pass over each of the expert's samples; see `given_of`.
        state: The folder of the run's state, with the merged model.
        device: The device of the forward passes.
    """

    def __init__(
        self,
        plan: Plan,
        rule: Rule,
        index: int,
        given: Sequence[Mapping[str, Any]],
        state: Folder,
        device: torch.device,
    ) -> None:
        self.plan, self.rule, self.index, self.state, self._count = plan, rule, index, state, len(given)
        self._device = device
        base, source = open_base(plan), open_expert(plan.experts[index])
        config, folder = load_base_config(plan), base.folder
        self._read_expert: Read = lambda name: weight_of(base, source, name)
        self._merged = PartialModel(
            plan, config, folder, base.folder, lambda name: load_calibrated(state, name), given, device
        )
        self._expert: PartialModel | None = None
        if rule.own_blocks or rule.has_expert_stream:
            folder = source.checkpoint.folder if isinstance(source, FullExpert) else base.folder
            own = config_of(plan, plan.experts[index], config, folder)
            self._expert = PartialModel(plan, own, folder, base.folder, self._read_expert, given, device)
        # The part that the streams are before, and the expert's states after it, if these are known.
        self._at, self._ahead = 0, list[SampleState]()

    def contribute(self, number: int) -> Contribution:
        """Store the expert's shares in the equations of part `number`, and return the groups of layers that it has.

        All parts before have been solved. Nothing is done if the shares are stored.

        Raises:
            CheckpointError: the inputs of a layer are not finite, or the model does not run block by block.
        """
        stored = load_contribution(self.state, number, self.index)
        if stored is not None:
            return stored
        self._go_to(number)
        contribution = Contribution(self._observe(number), len(self._merged.run.parts))
        save_contribution(self.state, number, self.index, contribution)
        return contribution

    def _go_to(self, number: int) -> None:
        """Bring the streams before a part: from memory, from the file of that part or of the one before, or anew."""
        if self._at not in (number - 1, number):
            self._ahead = []
            self._at = next((at for at in (number, number - 1) if self._restore(at)), 0)
        while self._at < number:
            self._advance()
            if self._at == number:
                self._keep()

    def _advance(self) -> None:
        part = self._merged.run.parts[self._at]
        self._merged.load(part)
        self._merged.run.step(part)
        self._merged.drop(part)
        if self._expert is not None and self.rule.has_expert_stream:
            if self._ahead:
                self._expert.run.states = self._ahead
            else:
                self._expert.load(part)
                self._expert.run.step(part)
                self._expert.drop(part)
        self._ahead = []
        self._at += 1

    def _keep(self) -> None:
        """Store the streams, and remove those of an earlier part: another actor can go on from these."""
        tensors = {}
        for letter, model in self._models():
            for place, state in enumerate(model.run.states):
                if state.hidden is not None:
                    tensors[f"{letter}.{place}"] = state.hidden
                    tensors[f"{letter}.{place}.items"] = torch.tensor(-1 if state.items is None else state.items)
        save_tensors(self.state, stream_file(self.index, self._at), tensors)
        self.state.remove(stream_file(self.index, self._at - 1))

    def _restore(self, number: int) -> bool:
        """Bring the streams before part `number` from its file, and return whether there is one."""
        for _, model in self._models():
            model.run.restart()
        if number <= 0:
            return True
        try:
            tensors = load_sealed_tensors(self.state, stream_file(self.index, number))
        except (FileNotFoundError, DamagedError):
            return False
        tower = self._merged.run.parts[number].tower
        for letter, model in self._models():
            for part in model.run.parts[:number]:
                # The arguments of a tower are computed again by the towers before it, which are solved.
                if part.tower == tower and part.block is None:
                    model.load(part)
                    model.run.step(part)
                    model.drop(part)
            for place, state in enumerate(model.run.states):
                if (hidden := tensors.get(f"{letter}.{place}")) is not None:
                    items = int(tensors[f"{letter}.{place}.items"])
                    model.run.states[place] = replace(state, hidden=hidden, items=None if items < 0 else items)
        return True

    def _models(self) -> list[tuple[str, PartialModel]]:
        """Return the models that have a stream, with a letter each."""
        expert = [("e", self._expert)] if self._expert is not None and self.rule.has_expert_stream else []
        return [("s", self._merged), *expert]

    def _observe(self, number: int) -> tuple[LayerGroup, ...]:
        """Run the samples through a part, store the shares of its layers, and return their groups."""
        rule, part = self.rule, self._merged.run.parts[number]
        watched = self._expert if rule.own_blocks and self._expert is not None else self._merged
        modules, layers = watched.modules(part, rule)
        linear: dict[Names, InputSums] = {}
        norms: dict[str, NormSums] = {}
        self._ahead = []
        if not layers and part.block is None:
            return ()
        working = [model for model in (None if rule.own_blocks else self._merged, self._expert) if model is not None]
        for model in working:
            model.load(part)
        for place in range(self._count):
            seen: dict[Names, Tensor] = {}

            def observe(names: Names, x: Tensor, seen: dict[Names, Tensor] = seen) -> None:
                for name in (name for name in names if is_norm(modules[name])):
                    norms.setdefault(name, NormSums()).add(normalised(modules[name], x))
                if shared := tuple(name for name in names if not is_norm(modules[name])):
                    seen[shared] = x

            if rule.own_blocks:
                watched.run.states[place] = self._merged.run.before(part, place)
            watched.run.forward(part, place, modules, observe)
            others = self._inputs_of_expert(number, place, layers)
            for names, x in seen.items():
                linear.setdefault(names, InputSums()).add(x, others.get(names), rule)
        for model in working:
            model.drop(part)
        groups = [
            self._store(number, LayerGroup(tuple(layers[name] for name in names)), linear[names]) for names in linear
        ]
        return *groups, *(self._store(number, LayerGroup((layers[name],), True), norms[name]) for name in norms)

    def _inputs_of_expert(self, number: int, place: int, layers: Mapping[str, SolvedLayer]) -> dict[Names, Tensor]:
        """Run a sample of the expert's own stream through a part; return the inputs of its linear layers."""
        if self._expert is None or not self.rule.has_expert_stream:
            return {}
        part = self._expert.run.parts[number]
        found, named = dict[Names, Tensor](), dict(self._expert.model.named_modules())
        modules = {name: named[name] for name in layers if not is_norm(named[name])}
        self._ahead.append(self._expert.run.forward(part, place, modules, found.__setitem__))
        return found

    def _store(self, number: int, group: LayerGroup, sums: InputSums | NormSums) -> LayerGroup:
        """Store the expert's share in the equations of a group."""
        layers = {layer.name: affine(self._read_expert, layer, self._device) for layer in group.layers}
        share = sums.share(layers, self.rule) if isinstance(sums, InputSums) else sums.share(*layers.values())
        if not all(bool(tensor.isfinite().all()) for tensor in share.values()):
            raise CheckpointError(
                f"the inputs of {group.layers[0].name!r} are not finite on its calibration samples",
                f"expert {self.plan.experts[self.index].name!r}",
            )
        save_tensors(self.state, share_file(number, self.index, group), share)
        return group


def given_of(
    samples: Sequence[Sample],
    inputs: Sequence[Mapping[str, Tensor]],
    index: int,
    state: Folder,
    load: Callable[[], FrozenExpert],
) -> list[dict[str, Any]]:
    """Return the arguments of a forward pass over each sample of expert `index`, on the CPU.

    If a sample asks for a response, the expert, which `load` returns, generates it, once in the life of a run.
    `inputs` are the pixel inputs of each sample.
    """
    ids = [torch.tensor([sample.input_ids]) for sample in samples]
    if any(sample.generate for sample in samples):
        name = tokens_file(index)
        if not state.exists(name):
            written = [load().given(*pair)["input_ids"] for pair in zip(samples, inputs, strict=True)]
            save_tensors(state, name, {str(place): ids_BT for place, ids_BT in enumerate(written)})
        stored = load_sealed_tensors(state, name)
        ids = [stored[str(place)] for place in range(len(samples))]
    return [arguments(ids_BT, torch.ones_like(ids_BT), own) for ids_BT, own in zip(ids, inputs, strict=True)]


def solve_group(plan: Plan, rule: Rule, number: int, group: LayerGroup, experts: Sequence[int], state: Folder) -> None:
    """Solve the layers of a group of part `number` from the shares of experts, and store their tensors.

    `experts` are those with a share, in their order. Tensors that are stored are not solved again.
    """
    names = [name for layer in group.layers for name in (layer.weight, layer.bias) if name is not None]
    if all(state.exists(solved_file(name)) for name in names):
        return
    base = open_base(plan)
    anchors = {
        layer.name: anchor_of(affine(lambda name: load_merged(state, name), layer), affine(base.read, layer), rule)
        for layer in group.layers
    }
    total = added(load_sealed_tensors(state, share_file(number, k, group)) for k in experts)
    if group.is_norm:
        solved = {name: solve_norm(total, anchor, rule) for name, anchor in anchors.items()}
    else:
        solved = solve_linear(total, anchors, rule)
    for layer in group.layers:
        found = solved[layer.name]
        weight = found.weight.T if layer.transposed else found.weight
        save_tensors(state, solved_file(layer.weight), {"tensor": weight})
        if layer.bias is not None and found.bias is not None:
            save_tensors(state, solved_file(layer.bias), {"tensor": found.bias})


def affine(read: Read, layer: SolvedLayer, device: torch.device | None = None) -> Affine:
    """Return the weight, [O, I], and the bias of a layer in float32, on the CPU or a device."""

    def get(name: str) -> Tensor:
        return read(name).to(device or "cpu", torch.float32)

    weight = get(layer.weight)
    return Affine(weight.T if layer.transposed else weight, None if layer.bias is None else get(layer.bias))
