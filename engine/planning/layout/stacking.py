"""The layout of a merge by slices and modules: from which layer of which model every tensor of the output comes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from engine.checkpoints.adapters import AdapterHeader
from engine.checkpoints.headers import ModelHeader, TensorHeader
from engine.checkpoints.match import Match
from engine.checkpoints.structure import Role
from engine.config.recipe import Slice, Source, WeightSpaceSettings
from engine.config.schema import Config
from engine.errors import CheckpointError, ConfigError
from engine.methods.registry import check_inputs, get_method
from engine.planning.layout.layers import (
    DEFAULT,
    TEXT,
    Stack,
    deeper,
    depth_of,
    modules_of,
    stack_of,
    stacked_config,
    with_kinds,
)
from engine.planning.plan import ExpertPlan, Layout, ModelPlan, Origin
from engine.untrusted import listed


def is_stacked(recipe: WeightSpaceSettings, base: ModelHeader, experts: Sequence[ExpertPlan]) -> bool:
    """Return whether the output needs a layout: not if one slice merges all layers of every model into the base."""
    only = recipe.slices[0]
    if len(recipe.slices) > 1 or only.module not in ("", DEFAULT):
        return True
    if only.merge_method or (only.base is not None and only.sources[only.base].expert is not None):
        return True
    depths = {base.num_layers, *(one.header.num_layers for one in experts if isinstance(one.header, ModelHeader))}
    return any(one.layers is not None and {one.layers[0], one.layers[1]} - {0} != depths for one in only.sources)


def check_recipe(config: Config, experts: Sequence[ExpertPlan]) -> None:
    """Check the settings of a weight-space method against the models.

    Raises:
        ConfigError: a method does not take the models of its slice, or an expert's name cannot name a folder.
    """
    recipe = config.recipe
    if recipe is None:
        return
    names = [expert.name for expert in experts]
    for part in recipe.slices:
        own = [
            names[one.expert] for place, one in enumerate(part.sources) if one.expert is not None and place != part.base
        ]
        check_inputs(part.merge_method or config.merge_method, own, part.has_base)
    unfit = [name for name in names if not re.fullmatch(r"[\w.-]+", name) or name in (".", "..", "merge")]
    if unfit and get_method(config.merge_method).outputs == "experts":
        raise ConfigError(
            f"the expert's name {unfit[0]!r} cannot name a folder", "models", do="give the expert another `name`"
        )


def as_deep_as(base: ModelHeader, expert: ModelHeader) -> ModelHeader:
    """Return the base's header with as many layers as an expert has, for a comparison of the two."""
    count = expert.num_layers
    if count is None or count == base.num_layers:
        return base
    return deeper(base, stack_of(_of_text(base), base.num_layers), count)


def lay_out(config: Config, base: ModelPlan, experts: Sequence[ExpertPlan]) -> tuple[Layout, tuple[ExpertPlan, ...]]:
    """Return the layout of the output, and the experts with matches of its tensors.

    Raises:
        ConfigError: a slice has layers that its models lack, or `modules` does not fit the model.
        CheckpointError: layers of a slice have other tensors than its base.
    """
    header = base.header
    assert config.recipe is not None and isinstance(header, ModelHeader)
    if get_method(config.merge_method).outputs != "one":
        raise ConfigError(
            f"{config.merge_method} writes a model for each expert, of the base's layers",
            "merge_method",
            "one slice with all layers of every model",
            "list the models under `models`, or use another method",
        )
    stacking = _Stacking(config, header, [_with_checkpoint(expert, base) for expert in experts])
    keys = list(dict.fromkeys(part.module for part in config.recipe.slices))
    if keys in ([""], [DEFAULT]):
        _check_one_stack(header)
    members = {"": list(header.tensors)} if keys == [""] else modules_of(header, keys)
    for key, names in members.items():
        stacking.add_module(key, stack_of(names, depth_of(header, key)))
    return stacking.layout(), stacking.experts_in_output()


class _Stacking:
    """A layout while it is made, one module after the other."""

    def __init__(self, config: Config, base: ModelHeader, experts: Sequence[ExpertPlan]) -> None:
        assert config.recipe is not None
        self._recipe, self._base, self._experts = config.recipe, base, experts
        self._keep, self._method = config.on_missing == "base", config.merge_method
        self._tensors: dict[str, TensorHeader] = {}
        self._roles: dict[str, Role] = {}
        self._origins: dict[str, Origin] = {}
        self._config = base.config
        self._stacks: dict[tuple[int | None, str], Stack] = {}
        self._configs: dict[int | None, dict[str, Any]] = {}
        # For each expert, the tensors of the output that it takes part in, with the base's names for its own tensors.
        self._names: list[dict[str, str]] = [{} for _ in experts]
        self._members: set[str] = set()

    def add_module(self, key: str, stack: Stack) -> None:
        """Add the tensors of a module by its slices: those before its layers, its layers, and those after them."""
        slices = [(index, part) for index, part in enumerate(self._recipe.slices) if part.module == key]
        inside = f"{stack.prefix}." if stack.prefix else None
        self._members |= {
            *stack.before,
            *stack.after,
            *(name for name in self._base.tensors if inside and name.startswith(inside)),
        }
        (first, opening), (last, closing) = slices[0], slices[-1]
        for name in stack.before if stack.prefix else (*stack.before, *stack.after):
            self._add(name, Origin(first, 0.0, name))
        taken: list[tuple[dict[str, Any], int]] = []
        for index, part in slices if stack.prefix else ():
            self._check(index, part, stack)
            start, length = self._range(part, stack)
            lead = _lead(part)
            for offset in range(length):
                depth = offset / (length - 1) if length > 1 else 1.0
                for rest in self._rests(lead.expert, stack, start + offset):
                    origin = Origin(index, depth, stack.prefix, offset, rest)
                    self._add(f"{stack.prefix}.{len(taken)}.{rest}", origin)
                taken.append((self._config_of(lead.expert), start + offset))
        # As in mergekit: not more models than the first slice has.
        few = tuple(range(min(len(opening.sources), len(closing.sources))))
        needed = get_method(closing.merge_method or self._method).base == "required"
        sources = None if needed and closing.base is not None and closing.base not in few else few
        for name in stack.after if stack.prefix else ():
            self._add(name, Origin(last, 0.0, name, sources=sources))
        if stack.prefix and ([number for _, number in taken] != [*range(len(stack.layers))] or len(slices) > 1):
            self._config = with_kinds(replace(self._base, config=self._config))
            self._config = stacked_config(self._config, key, len(stack.layers), taken)

    def layout(self) -> Layout:
        """Return the layout. Tensors of modules that are not listed are left out, as by mergekit, or the base's."""
        others = [name for name in self._base.tensors if name not in self._members]
        kept = {name: self._base.tensors[name] for name in others if self._keep}
        roles = {name: role for name, role in self._base.roles.items() if name in kept} | self._roles
        notes = list(self._base.notes)
        if others:
            what = "are the base's" if self._keep else "are left out; `on_missing: base` takes them from the base"
            notes.append(f"the tensors of modules that are not listed {what}: {listed(others)}")
        header = replace(self._base, config=self._config, tensors=self._tensors | kept, roles=roles, notes=tuple(notes))
        return Layout(header, self._origins)

    def experts_in_output(self) -> tuple[ExpertPlan, ...]:
        """Return the experts with headers and matches by the names of the output."""
        return tuple(self._in_output(expert, names) for expert, names in zip(self._experts, self._names, strict=True))

    def _in_output(self, expert: ExpertPlan, names: Mapping[str, str]) -> ExpertPlan:
        match, adapter = expert.match, expert.adapter
        absent = {name for name in self._origins if name not in names or names[name] in match.absent}
        renamed = {name: match.renamed.get(own, own) for name, own in names.items()}
        parts = {name: match.parts[own] for name, own in names.items() if own in match.parts}
        changed: Match = replace(match, renamed=renamed, parts=parts, absent=frozenset(absent))
        if adapter is not None:
            assert isinstance(adapter.header, AdapterHeader)
            adapter = replace(adapter, header=_renamed(adapter.header, names))
        return replace(expert, match=changed, adapter=adapter)

    def _add(self, name: str, origin: Origin) -> None:
        """Add a tensor of the output, unless neither the slice's base nor the plan's has it."""
        part = self._recipe.slices[origin.slice]
        lead = _lead(part)
        own = origin.name_in(lead.layers or part.sources[0].layers)
        header = self._header(lead.expert)
        base = lead.expert if lead.expert is not None and self._has(lead.expert, own) else None
        if own not in header.tensors or (base is None and own not in self._base.tensors):
            return
        dtype = header.tensors[own].dtype if base is None else self._own(base, own).dtype
        self._tensors[name] = replace(header.tensors[own], name=name, file="", dtype=dtype)
        self._origins[name] = replace(origin, base=base, base_name=own)
        if own in header.roles:
            self._roles[name] = header.roles[own]
        for place, source in enumerate(part.sources):
            takes_part = origin.sources is None or place in origin.sources
            if source.expert is not None and takes_part and self._fits(source, origin, self._tensors[name]):
                self._names[source.expert][name] = origin.name_in(source.layers)
        if base is not None:
            self._names[base][name] = own

    def _has(self, expert: int, name: str) -> bool:
        return bool(self._experts[expert].match.names(name))

    def _own(self, expert: int, name: str) -> TensorHeader:
        """Return a tensor of an expert's files, or the first part of one."""
        model = self._experts[expert]
        assert isinstance(model.header, ModelHeader)
        return model.header.tensors[model.match.names(name)[0]]

    def _fits(self, source: Source, origin: Origin, tensor: TensorHeader) -> bool:
        """Return whether a source has the tensor in its layer; not if it may be missing there.

        Raises:
            CheckpointError: it lacks the tensor, or has one of another shape.
        """
        assert source.expert is not None
        own = origin.name_in(source.layers)
        found = self._header(source.expert).tensors.get(own)
        if found is not None and (found.shape == tensor.shape or origin.offset is None):
            return True
        if found is None and self._keep:
            return False
        raise CheckpointError(
            f"the model has no tensor {own!r}" if found is None else f"{own!r} has shape {found.shape}",
            f"expert {self._experts[source.expert].name!r} ({self._experts[source.expert].header.folder})",
            f"a tensor of shape {tensor.shape}, as in the layer that it is merged with",
            "merge layers of the same kind",
        )

    def _header(self, expert: int | None) -> ModelHeader:
        """Return the base's header with as many layers as an expert (None: the base) has."""
        return self._base if expert is None else self._headers[expert]

    @cached_property
    def _headers(self) -> list[ModelHeader]:
        return [
            as_deep_as(self._base, expert.header) for expert in self._experts if isinstance(expert.header, ModelHeader)
        ]

    def _rests(self, expert: int | None, stack: Stack, layer: int) -> Sequence[str]:
        """Return the parts after the number of the names of a layer's tensors, in an expert or in the base."""
        key = (expert, stack.prefix)
        if key not in self._stacks:
            inside = [name for name in self._header(expert).tensors if name.startswith(f"{stack.prefix}.")]
            self._stacks[key] = stack_of(inside, None)
        return self._stacks[key].layers[layer]

    def _config_of(self, expert: int | None) -> dict[str, Any]:
        if expert not in self._configs:
            header = self._base if expert is None else self._experts[expert].header
            assert isinstance(header, ModelHeader)
            self._configs[expert] = with_kinds(header)
        return self._configs[expert]

    def _range(self, part: Slice, stack: Stack) -> tuple[int, int]:
        """Return the first layer of a slice in its base, and its number of layers."""
        layers = _lead(part).layers or part.sources[0].layers
        return (layers[0], layers[1] - layers[0]) if layers else (0, len(stack.layers))

    def _where(self, index: int) -> str:
        """Return the place of a slice in the config."""
        module = self._recipe.slices[index].module
        number = sum(part.module == module for part in self._recipe.slices[:index])
        return f"modules.{module}.slices.{number}" if module else f"slices.{number}"

    def _check(self, index: int, part: Slice, stack: Stack) -> None:
        """Check that every model of a slice has the layers, and that a base which is not listed has a range."""
        for place, source in enumerate(part.sources):
            model = self._base if source.expert is None else self._experts[source.expert].header
            assert isinstance(model, ModelHeader)
            count = depth_of(model, part.module) or len(stack.layers)
            if source.layers is not None and source.layers[1] > count:
                raise ConfigError(
                    f"the slice takes the layers {source.layers[0]} to {source.layers[1] - 1}, "
                    f"but the model has {count}",
                    f"{self._where(index)}.sources.{place}.layer_range ({model.folder})",
                    f"[first, end] with end <= {count}",
                    "correct the numbers, or name the model that the file was made for",
                )
        if part.has_base and part.base is None and len({source.layers for source in part.sources}) > 1:
            raise ConfigError(
                "the slice takes different layers of its models, and does not say which of the base",
                self._where(index),
                "the base among the sources",
                "list the base there with its `layer_range`",
            )


def _check_one_stack(model: ModelHeader) -> None:
    """Check that slices without `modules` can only mean one stack of layers."""
    stack = stack_of(model.tensors, model.num_layers)
    if not stack.others and not model.takes_images:
        return
    parts = {part for other in stack.others for part in other.split(".")}
    own = TEXT if model.takes_images else next((one for one in stack.prefix.split(".") if one not in parts), DEFAULT)
    raise ConfigError(
        "the model has modules with layers of their own",
        "slices",
        "`modules`",
        f"put the slices under `modules: {{{own}: {{slices: […]}}}}`",
    )


def _with_checkpoint(expert: ExpertPlan, base: ModelPlan) -> ExpertPlan:
    """Return an expert that is an adapter as its checkpoint with the adapter, which has layers of its own."""
    if not isinstance(expert.header, AdapterHeader):
        return expert
    adapter = ModelPlan(expert.model, expert.header)
    return replace(expert, model=base.model, header=base.header, adapter=adapter)


def _lead(part: Slice) -> Source:
    """Return the source that decides which tensors a layer has: the base, or without one the first model."""
    if part.base is not None:
        return part.sources[part.base]
    return Source(expert=None) if part.has_base else part.sources[0]


def _renamed(header: AdapterHeader, names: Mapping[str, str]) -> AdapterHeader:
    """Return an adapter's header by the names of the output."""
    return replace(
        header,
        pairs={name: header.pairs[own] for name, own in names.items() if own in header.pairs},
        whole={name: header.whole[own] for name, own in names.items() if own in header.whole},
    )


def _of_text(base: ModelHeader) -> list[str]:
    return modules_of(base, [TEXT])[TEXT]
