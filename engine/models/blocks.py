"""A model run part by part over all samples, so that one block works at a time and only hidden states are kept.

A model has towers, such as a vision tower and a language model, and a tower has a stack of blocks. Of each sample, the
arguments of its tower and the hidden state before the next block are kept. To run a block, the tower's own forward pass
runs, in which earlier blocks return what they are given, this block gets the kept hidden state, and the pass ends where
the next block starts. So masks, position embeddings, and whatever a tower does between its blocks are the model's own,
and every hidden state has the bits of a whole forward pass. Before the next tower, the earlier ones run once more as a
whole, for they may use the outputs of several of their blocks. Weights of blocks that do not run are not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from engine.errors import CheckpointError
from engine.models.forward import outermost_lists, replaced

CPU = torch.device("cpu")
# Called with the names of the modules that saw an input, and the input [..., I]; it is not to be changed.
Observe = Callable[[tuple[str, ...], Tensor], None]


@dataclass(frozen=True)
class ModelPart:
    """A part of a model that runs at a time: a block, or what is between a tower and the one before.

    Attributes:
        name: Name of the block in the model, or of the tower.
        tower: Index of the tower.
        block: Index of the block in its tower; None for what is between.
    """

    name: str
    tower: int
    block: int | None


@dataclass(frozen=True)
class SampleState:
    """What is kept of a sample.

    Attributes:
        call: The arguments of the tower; None for a sample that does not use it.
        hidden: The hidden state before the next block; None before the first, whose input the tower computes.
        items: The number of values that the tower's blocks return; None if it is a hidden state alone, in no tuple.
    """

    call: tuple[tuple[Any, ...], dict[str, Any]] | None
    hidden: Tensor | None = None
    items: int | None = None


@dataclass(frozen=True)
class _Tower:
    name: str
    module: Any
    blocks: Sequence[Any]


class BlockRun:
    """A run of samples through a model, part by part.

    Args:
        model: A model in evaluation mode.
        samples: The arguments of a forward pass of each sample, one sequence each.
        device: The device of the model's inputs. Between two parts, what is kept is in the machine's memory.

    Attributes:
        parts: The parts in order. Every sample goes through all of them with `step`, or with `forward`.
        states: What is kept of each sample. May be replaced by an earlier run's after the same part.
    """

    def __init__(self, model: Any, samples: Sequence[Mapping[str, Any]], device: torch.device = CPU) -> None:
        self.model, self.device = model, device
        self._towers = _towers(model)
        self._given = [dict(sample) for sample in samples]
        self.restart()
        self.parts: list[ModelPart] = []
        for index, tower in enumerate(self._towers):
            names = {id(module): name for name, module in tower.module.named_modules()}
            if tower.module is not model:
                self.parts.append(ModelPart(tower.name, index, None))
            for number, block in enumerate(tower.blocks):
                inside = names[id(block)]
                self.parts.append(ModelPart(f"{tower.name}.{inside}" if tower.name else inside, index, number))

    def restart(self) -> None:
        """Put all samples before the first part again."""
        self.states = [SampleState(((), given)) for given in self._given]

    def step(self, part: ModelPart, modules: Mapping[str, Any] | None = None, observe: Observe | None = None) -> None:
        """Run all samples through a part; see `forward`."""
        for index in range(len(self.states)):
            self.states[index] = self.forward(part, index, modules, observe)

    @torch.no_grad()
    def forward(
        self, part: ModelPart, index: int, modules: Mapping[str, Any] | None = None, observe: Observe | None = None
    ) -> SampleState:
        """Return the state of sample `index` after a part, without replacing it in `states`.

        Args:
            part: The part that follows the one after which `states[index]` was.
            index: Index of the sample.
            modules: Modules to observe, by name; see `linears`.
            observe: Called with each input of these modules, in order of first use. Modules that get the same tensor
                are named together.

        Raises:
            CheckpointError: the model does not call its blocks one after another.
        """
        with _observed(modules or {}, observe) as started:
            if part.block is None:
                return self._enter(part, index, started)
            state = self.states[index]
            started()
            return state if state.call is None else self._block(part, state)

    @torch.no_grad()
    def before(self, part: ModelPart, index: int) -> SampleState:
        """Return the state of sample `index` before a block, with the hidden state also if the block is the first."""
        tower, state = self._towers[part.tower], self.states[index]
        if state.call is None or state.hidden is not None:
            return state
        reached: list[Tensor] = []
        with ExitStack() as changed, suppress(_Reached):
            for block in tower.blocks:
                changed.enter_context(replaced(block, _end_before(block, reached)))
            self._call(tower.module, state.call)
        return SampleState(state.call, reached[0].to(CPU))

    def linears(self, part: ModelPart) -> dict[str, Any]:
        """Return the linear layers of a part by name, without output heads. Conv1D's weight is transposed.

        Those between towers are all outside the blocks of the towers; of these, `forward` observes the ones that run.
        """
        heads = {
            id(head)
            for module in self.model.modules()
            if isinstance(module, transformers.PreTrainedModel) and (head := module.get_output_embeddings()) is not None
        }
        blocks = {id(inside) for tower in self._towers for block in tower.blocks for inside in block.modules()}
        found = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and id(module) not in heads
        }
        if part.block is None:
            return {name: module for name, module in found.items() if id(module) not in blocks}
        return {name: module for name, module in found.items() if name.startswith(f"{part.name}.")}

    def _enter(self, part: ModelPart, index: int, started: Callable[[], None]) -> SampleState:
        """Run the model up to a tower, and return the tower's arguments.

        What runs after the start of the tower before is observed: earlier parts have been, on the way to that one.
        """
        reached: list[SampleState] = []

        def stop(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                # A sample without an image goes past the vision tower.
                reached.append(SampleState(_moved((args, kwargs), CPU) if number == part.tower else None))
                raise _Reached

            return forward

        def start(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                started()
                return original(*args, **kwargs)

            return forward

        with ExitStack() as changed, suppress(_Reached):
            for number, tower in enumerate(self._towers):
                if number == part.tower - 1:
                    changed.enter_context(replaced(tower.module, start(tower.module.forward)))
                elif number >= part.tower:
                    changed.enter_context(replaced(tower.module, stop(number)))
            self._call(self.model, ((), self._given[index]))
        return reached[0] if reached else SampleState(None)

    def _block(self, part: ModelPart, state: SampleState) -> SampleState:
        """Run a sample through a block, and on to where the next block starts."""
        tower, number = self._towers[part.tower], part.block
        assert number is not None and state.call is not None
        first: list[Any] = []
        reached: list[Tensor] = []
        ran: list[Any] = []

        def before(block: Any) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                first.append(args[0] if args else kwargs[_hidden_name(block)])
                # Nothing uses what earlier blocks return, but the tower may unpack it.
                return first[0] if state.items is None else (first[0], *[None] * (state.items - 1))

            return forward

        def this(block: Any, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if state.hidden is not None:
                    # A copy, which the block may change, with the alignment that torch gives every tensor.
                    hidden = state.hidden.to(self.device, copy=True)
                    args, kwargs = (
                        ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {_hidden_name(block): hidden})
                    )
                ran.append(output := original(*args, **kwargs))
                if block is tower.blocks[-1]:
                    reached.append(output if isinstance(output, Tensor) else output[0])
                    raise _Reached
                return output

            return forward

        with ExitStack() as changed, suppress(_Reached):
            for place, block in enumerate(tower.blocks):
                made = before(block) if place < number else _end_before(block, reached)
                changed.enter_context(replaced(block, this(block, block.forward) if place == number else made))
            self._call(tower.module, state.call)
        if len(ran) != 1 or not reached or len(first) != number:
            raise _refusal(self.model, "does not call its blocks one after another")
        return SampleState(state.call, reached[0].to(CPU), None if isinstance(ran[0], Tensor) else len(ran[0]))

    def _call(self, module: Any, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        args, kwargs = _moved(call, self.device)
        return module(*args, **kwargs, **({"use_cache": False} if module is self.model else {}))


class _Reached(Exception):
    """The forward pass has come to where it is to end."""


def _end_before(block: Any, reached: list[Tensor]) -> Callable[..., Any]:
    """Return a forward pass of a block that keeps the hidden state that it is given, and ends the whole pass."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        reached.append(args[0] if args else kwargs[_hidden_name(block)])
        raise _Reached

    return forward


def _moved(call: Any, device: torch.device) -> Any:
    """Return arguments with all their tensors on a device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), call)


def _hidden_name(block: Any) -> str:
    """Return the name of a block's first argument, its hidden state."""
    return next(name for name in signature(type(block).forward).parameters if name != "self")


@contextmanager
def _observed(modules: Mapping[str, Any], observe: Observe | None) -> Iterator[Callable[[], None]]:
    """Observe the inputs of modules within the context, once the function that it yields has been called."""
    # Inputs are held to the end, so that modules with the same one are known, and no other gets its memory.
    seen: dict[int, tuple[Tensor, int, list[str]]] = {}
    active: list[bool] = []

    def hook(name: str) -> Callable[..., None]:
        def before(_: Any, args: tuple[Tensor, ...]) -> None:
            if active:
                seen.setdefault(id(args[0]), (args[0], args[0]._version, []))[2].append(name)

        return before

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield lambda: active.append(True)
        for x, version, names in seen.values():
            assert x._version == version, f"the input of {names[0]} was changed in place"
            if observe is not None:
                observe(tuple(dict.fromkeys(names)), x)
    finally:
        for handle in handles:
            handle.remove()


def _towers(model: Any) -> list[_Tower]:
    """Return the towers of a model: the parts of it that each contain blocks, the language model last.

    The blocks of a tower are those of its longest outermost module list; other lists have small parts between blocks.
    """
    lists = outermost_lists(model)
    if not lists:
        raise _refusal(model, "has no blocks")
    name, module = "", model
    while True:
        inner = [
            (f"{name}.{child_name}" if name else child_name, child)
            for child_name, child in module.named_children()
            if any(part in lists for part in child.modules())
        ]
        if len(inner) != 1 or inner[0][1] in lists:
            break
        name, module = inner[0]
    if any(child in lists for _, child in inner):
        inner = [("", model)]
    embedding = model.get_input_embeddings()
    inner.sort(key=lambda named: any(part is embedding for part in named[1].modules()))
    return [_Tower(name, tower, list(_longest(outermost_lists(tower)))) for name, tower in inner]


def _longest(lists: Sequence[Any]) -> Any:
    return max(lists, key=len)


def _refusal(model: Any, what: str) -> CheckpointError:
    return CheckpointError(
        f"{type(model).__name__} {what}",
        str(model.config.name_or_path),
        "a model with a list of blocks that follow each other",
        "to merge such models, use a method that needs no statistics",
    )
