"""The plan of a merge as immutable data, and how its tensors are ordered and divided among shards."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from engine.checkpoints.adapters import AdapterHeader
from engine.checkpoints.headers import BYTES, FLOATS, SAFETENSORS, ModelHeader
from engine.checkpoints.match import NO_EXCEPTIONS, Match
from engine.checkpoints.vocabulary import Vocabulary, has_tokens_for_rows, is_matrix
from engine.config.recipe import Slice
from engine.config.schema import CalibrationFile, Config, ExpertConfig
from engine.config.slices import described
from engine.methods.options import Method
from engine.methods.registry import get_method
from engine.storage.paths import is_uri


@dataclass(frozen=True)
class ModelPlan:
    """A model's location, valid on any node (an absolute path, a URI, or a hub id with its commit), and its header.

    `adapter` is an adapter on top of a checkpoint, as in mergekit's model+lora.
    """

    model: str
    header: ModelHeader | AdapterHeader
    adapter: ModelPlan | None = field(default=None, kw_only=True)

    @property
    def address(self) -> str:
        """The location of the model, and of its adapter after a +."""
        return self.model if self.adapter is None else f"{self.model}+{self.adapter.model}"


@dataclass(frozen=True)
class ExpertPlan(ModelPlan):
    """An expert θₖ.

    Attributes:
        name: The label of the expert in all outputs.
        weight: The prior ᾱₖ. None: to be searched (`weight: auto`).
        loss_weight: βₖ.
        calibration: The calibration files.
        samples: Number of calibration samples.
        match: How the expert's tensors correspond to the base's.
        notes: Differences from the base that a user should know.
    """

    name: str
    weight: float | None
    loss_weight: float
    calibration: tuple[Path, ...]
    samples: int
    match: Match = NO_EXCEPTIONS
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The source of the task vector: a checkpoint, an adapter, or both."""
        if self.adapter is not None:
            return "checkpoint and adapter"
        return "adapter" if isinstance(self.header, AdapterHeader) else "checkpoint"

    def tokenizer_folder(self, base: Path) -> Path:
        """Return the folder of the expert's tokenizer: its own, or that of the base for an adapter of the base."""
        return self.header.folder if isinstance(self.header, ModelHeader) else base

    def located(self, given: ExpertConfig) -> tuple[CalibrationFile, ...]:
        """Return the calibration files with absolute paths or URIs; none for a weight-space method."""
        pairs = zip(given.calibration, self.calibration, strict=False)
        return tuple(file if is_uri(file.path) else file.model_copy(update={"path": str(path)}) for file, path in pairs)


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the output comes from.

    Attributes:
        slice: The slice, as an index into the slices of the config.
        depth: Its relative depth in the slice, from 0 to 1, for settings that vary over layers.
        name: Its name in the base, or the prefix of the names of its layers.
        offset: The number of its layer in the slice; None if it has no layer.
        rest: The part of its name after the number of the layer.
        sources: The sources of the slice that take part, as indices into these; None for all.
        base: The expert that is the base of the slice, or that provides files and shapes; None for the plan's base.
        base_name: The name of the tensor there, as the plan's base would call it.
    """

    slice: int
    depth: float
    name: str
    offset: int | None = None
    rest: str = ""
    sources: tuple[int, ...] | None = None
    base: int | None = None
    base_name: str = ""

    def name_in(self, layers: tuple[int, int] | None) -> str:
        """Return the tensor's name in a source of which the slice takes these layers (None: all of them)."""
        if self.offset is None:
            return self.name
        return f"{self.name}.{self.offset + (layers[0] if layers else 0)}.{self.rest}"


@dataclass(frozen=True)
class Layout:
    """The tensors of an output that has other layers than the base, or whose modules are merged from other models.

    Attributes:
        header: The header of the output, under the base's folder.
        origins: Where each of its tensors comes from; those that are not here are the base's.
    """

    header: ModelHeader
    origins: Mapping[str, Origin]


@dataclass(frozen=True)
class MergedDocument:
    """Another merge of the same config file, whose output is a model of this one, or of such a merge.

    Attributes:
        name: Its name in the file.
        place: The folder or URI of its output.
        config: Its resolved config, as YAML.
        identity: The identity of the merge, encoded.
    """

    name: str
    place: str
    config: str
    identity: str


@dataclass(frozen=True)
class Plan:
    """The plan of a merge.

    Attributes:
        config: The config, with absolute paths.
        base: The base θ₀.
        experts: The experts θₖ, in the order of the config.
        merged: Names of the merged tensors ℓ, in the order of the base's files.
        dtype: The dtype of the merged model during computation, as torch names it.
        hidden_layers: S as indices into `hidden_states`.
        tokenizer: The model that provides the output's tokenizer, valid on any node. None: the base.
        vocabulary: The rows of embedding and head; the base's header has its number of rows. None: those of the base.
        chat_template: The text of the output's chat template. None: that of its tokenizer.
        layout: The tensors of the output, if they are not the base's. The experts' matches then have its names.
        images: Image files of each expert's samples, filled in after its records have been read.
        remarks: Notes on several models: what they are on, and a line of text.
        documents: The other merges of the config file that this one builds on, in the order in which they were made.
    """

    config: Config
    base: ModelPlan
    experts: tuple[ExpertPlan, ...]
    merged: tuple[str, ...]
    dtype: str
    hidden_layers: tuple[int, ...]
    tokenizer: str | None = None
    vocabulary: Vocabulary | None = None
    chat_template: str | None = None
    layout: Layout | None = None
    images: tuple[tuple[str, ...], ...] = ()
    remarks: tuple[tuple[str, str], ...] = ()
    documents: tuple[MergedDocument, ...] = ()

    @property
    def base_header(self) -> ModelHeader:
        """The header of the output: the base's, or that of the layout."""
        assert isinstance(self.base.header, ModelHeader)
        return self.layout.header if self.layout is not None else self.base.header

    @property
    def notes(self) -> list[tuple[str, str]]:
        """What a user should know about the models: the name of each, and a line of text."""
        of_experts = [(expert.name, note) for expert in self.experts for note in expert.notes]
        of_tokens = [("vocabulary", note) for note in self.vocabulary.notes] if self.vocabulary else []
        made = [(document.name, "a merge of the same file, see merge/config.yaml") for document in self.documents]
        of_base = (("base", note) for note in self.base_header.notes)
        return [*of_base, *of_experts, *of_tokens, *self.remarks, *made]

    @property
    def stacked(self) -> list[str]:
        """The slices of a merge that the config describes by `slices` or `modules`, a line each."""
        recipe = self.config.recipe
        if recipe is None or recipe.plain:
            return []
        return described(recipe, [expert.name for expert in self.experts])

    @property
    def described_models(self) -> str:
        """The number of the models that are merged, in words; a base that is listed among them counts."""
        recipe = self.config.recipe
        sources = [one.expert for part in recipe.slices for one in part.sources] if recipe is not None else []
        count = len(self.experts) + (None in sources)
        return f"{count} {'expert' if recipe is None else 'model'}{'s' if count != 1 else ''}"

    @property
    def priors(self) -> list[float]:
        """The prior ᾱₖ of every expert. All must be known."""
        weights = [expert.weight for expert in self.experts]
        known = [weight for weight in weights if weight is not None]
        assert len(known) == len(weights), "the search for the prior is not done"
        return known

    @property
    def resolved(self) -> Config:
        """The config with every path absolute, so that it means the same in any folder."""
        experts = [
            given.model_copy(
                update={
                    "model": expert.address,
                    "calibration": expert.located(given),
                }
            )
            for given, expert in zip(self.config.models, self.experts, strict=True)
        ]
        tokenizer = {"tokenizer_source": self.tokenizer} if self.tokenizer else {}
        paths = {"base_model": self.base.address, "models": tuple(experts)}
        return self.config.model_copy(update=paths | tokenizer)

    @cached_property
    def merged_set(self) -> frozenset[str]:
        """`merged` as a set."""
        return frozenset(self.merged)

    @cached_property
    def numels(self) -> dict[str, int]:
        """Number of elements nₗ of each merged tensor."""
        return {name: self.base_header.tensors[name].numel for name in self.merged}

    def origin(self, name: str) -> Origin:
        """Return where a merged tensor comes from."""
        if self.layout is not None:
            return self.layout.origins[name]
        return Origin(0, self.depths[name], name, base_name=name)

    @cached_property
    def depths(self) -> dict[str, float]:
        """Relative depth of each tensor's layer, from 0 to 1, for settings that vary over layers; 0 outside layers."""
        places = {name: re.match(r"(.*?)\.(\d+)\.", name) for name in self.base_header.tensors}
        counts: dict[str, int] = {}
        for place in places.values():
            if place:
                counts[place[1]] = max(counts.get(place[1], 0), int(place[2]) + 1)
        return {
            name: 0.0 if not place else int(place[2]) / (count - 1) if (count := counts[place[1]]) > 1 else 1.0
            for name, place in places.items()
        }

    @cached_property
    def orthogonal(self) -> tuple[str, ...]:
        """Names of the matrices whose task vectors are made to fit together: made orthogonal, or shares of SWUDI.

        Empty if coefficients multiply whole task vectors, or are not learned.
        """
        if not self.config.learned or self.config.parameters.task_vectors == "whole":
            return ()
        return self.matrices

    @cached_property
    def matrices(self) -> tuple[str, ...]:
        """Names of the merged tensors that map features to features."""
        header = self.base_header
        return tuple(n for n in self.merged if is_matrix(header.tensors[n].shape, has_tokens_for_rows(header, n)))

    @cached_property
    def matrix_set(self) -> frozenset[str]:
        """`matrices` as a set."""
        return frozenset(self.matrices)

    @cached_property
    def orthogonal_set(self) -> frozenset[str]:
        """`orthogonal` as a set."""
        return frozenset(self.orthogonal)

    @property
    def merged_bytes(self) -> int:
        """M: bytes of the merged tensors in the run's dtype. An optimiser step moves M bytes in each direction."""
        return sum(self.numels.values()) * BYTES[SAFETENSORS[self.dtype]]

    def out_dtype(self, name: str) -> str:
        """Return the dtype of a tensor in the output, as safetensors names it.

        Without `out_dtype` and `dtype`, a tensor keeps the dtype that it has in the base. Types other than floats are
        always kept.
        """
        in_base = self.base_header.tensors[name].dtype
        chosen = self.config.out_dtype or self.config.dtype
        return SAFETENSORS[chosen] if chosen and in_base in FLOATS else in_base


def slice_of(plan: Plan, tensor: str) -> Slice:
    """Return the slice of the config that a tensor belongs to."""
    assert plan.config.recipe is not None
    return plan.config.recipe.slices[plan.origin(tensor).slice]


def method_at(plan: Plan, tensor: str) -> Method:
    """Return the method by which a tensor is merged."""
    return get_method(slice_of(plan, tensor).merge_method or plan.config.merge_method)


def experts_of(plan: Plan, tensor: str) -> list[int]:
    """Return the experts that are merged into a tensor, in the order of its slice; its base is not one of them."""
    part, places = slice_of(plan, tensor), plan.origin(tensor).sources
    return [
        source.expert
        for place, source in enumerate(part.sources)
        if source.expert is not None and place != part.base and (places is None or place in places)
    ]


def in_order_of_use(names: Iterable[str]) -> list[str]:
    """Return tensor names with their numbers sorted as numbers, so that block 2 comes before block 10."""
    return sorted(names, key=lambda name: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", name)])


def slices(plan: Plan, count: int, names: Collection[str] | None = None) -> list[tuple[str, ...]]:
    """Divide the named merged tensors (None: all) into `count` slices of about equal size.

    Each slice is in the order of the base's files, and may be empty. The largest tensor goes first, each to the
    smallest slice so far (list scheduling).
    """
    loads, owner = [0] * count, {}
    for name in sorted(plan.merged if names is None else names, key=lambda name: (-plan.numels[name], name)):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += plan.numels[name]
    return [tuple(name for name in plan.merged if owner.get(name) == index) for index in range(count)]
