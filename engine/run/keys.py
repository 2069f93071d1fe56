"""Keys of what a merge computes: the SHA-256 of all that decides its bits, and of nothing else.

An option counts unless it is listed here as one that a computation does not read, so a new option at worst computes
something again. Models count by the SHA-256 of their files, wherever these are; where one is not known, there is no
key. Like the identity of a run, a key has the versions of the packages that compute; unlike it, also the kind of
processor and this program's own sources, since a cache outlives them and may be used by several machines.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from engine.calibration.samples import Sample
from engine.checkpoints.find import TEMPLATES
from engine.learning.learner import PRIORS
from engine.machine import processor, usable_cpus
from engine.planning.factors import decomposed
from engine.planning.open_models import weight_files
from engine.planning.plan import ModelPlan, Plan
from engine.run.identity import Identity, InputFile
from engine.run.inputs import IMAGE
from engine.shards.statistics import kinds_of
from engine.storage.content_cache import FORMAT

# Keys of the config that decide nothing of what is computed with models: their place (their files count), the output's
# own, and those for which something else stands in a key: `dtype` for the plan's, `calibration` for the samples.
NEVER = (
    *("base_model", "models", "preset", "seed", "calibration", "dtype"),
    *("calibrate", "base_statistics", "collect", "collect_base", "compress", "search"),
    *("out_dtype", "rounding", "max_shard_size", "tokenizer_source", "chat_template"),
)
# Options that stage 2 alone reads, those of the optimiser, and those of the steps and their losses.
SECOND = ("budget", "kappa", "chunks", "fixed", "start")
OPTIMISER = ("learning_rate", "weight_decay", "max_grad_norm", "regularization", "granularity")
LOSSES = ("hidden_loss", "hidden_weight", "temperature", "hidden_layers")
# What stands in a key as the samples of each window with their loss weights, as priors, and as the merged tensors.
ORDER = ("samples_per_model", "epochs", "gradient_accumulation", "loss_weight", "weight", "loss_tokens")
PASSES = ("batch_tokens", "gradients", "gradient_checkpointing")


def _parameters(*names: str) -> tuple[str, ...]:
    return tuple(f"parameters.{name}" for name in names)


# Keys of the config that each computation does not read, besides NEVER.
UNREAD = {
    "targets": (
        *("merge_method", "exclude", *PASSES),
        *_parameters(*SECOND, *OPTIMISER, *LOSSES, *ORDER, "task_vectors"),
    ),
    "statistics": ("merge_method", "exclude", "recipe", "parameters", *PASSES),
    "task vectors": ("merge_method", "exclude", *PASSES, *_parameters(*SECOND, *OPTIMISER, *LOSSES, *ORDER)),
    "prior": ("merge_method", "exclude", *_parameters(*SECOND, *OPTIMISER, *ORDER, "hidden_weight")),
    "stage 1": ("merge_method", "exclude", *_parameters(*SECOND, *ORDER)),
}


@dataclass(frozen=True)
class Computing:
    """What a merge computes on.

    Attributes:
        devices: The fields of `Devices` (`cluster.placement`), which a run keeps.
        factored: The matrices that the trainer merges through factors.
    """

    devices: Mapping[str, Any]
    factored: Sequence[str]

    @property
    def expert(self) -> list[Any]:
        """The kind of device of an expert. How many there are decides no bits."""
        gpu = self.devices["expert"] > 0
        return [sorted(self.devices["kinds"]) if gpu else [], processor(), self.devices["threads"]]

    @property
    def trainer(self) -> list[Any]:
        """The kind of device of a trainer, and how it divides its passes."""
        gpu = self.devices["trainer"] > 0
        passes = [self.devices[name] for name in ("batch_tokens", "logit_bytes", "gradients")]
        return [sorted(self.devices["kinds"]) if gpu else [], processor(), self.devices["threads"], *passes]


@dataclass(frozen=True)
class Keys:
    """The keys of one merge. A key is None where the SHA-256 of a file that it needs is not known."""

    plan: Plan
    identity: Identity
    # The keys of the targets that were asked for, by expert and index.
    _targets: dict[tuple[int, int], str | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def samples(self, k: int) -> str | None:
        """Return the key of the samples of expert k, without their loss weights."""
        plan, config, expert = self.plan, self.plan.config, self.plan.experts[k]
        places = expert.located(config.models[k])
        files = [[self._file(place.path), place.samples or 0, place.image_options] for place in places]
        images = [self._file(f"{IMAGE}{number} of {expert.name}") for number in range(len(self._images(k)))]
        calibration = config.calibration.model_dump(exclude={"image_folder"}, mode="json")
        # The order of the records is drawn from the seed and the number of the expert.
        drawn = [config.seed, k] if config.calibration.shuffle else []
        tokens = [self._option("chat_template"), self._option("vocabulary"), config.parameters.loss_tokens]
        of_models = [self._files_of(model) for model in (plan.tokenizer, plan.base.model) if model is not None]
        counts = [expert.samples, plan.base_header.vocab_size or 0, plan.dtype, config.trust_remote_code]
        return self._key("samples", files, images, calibration, drawn, tokens, of_models, counts, processor())

    def inputs(self, k: int, index: int) -> str | None:
        """Return the key of the pixel inputs of a sample."""
        return self._key("inputs", self.samples(k), index)

    def target(self, sample: Sample, computing: Computing) -> str | None:
        """Return the key of a sample's target."""
        # Whether the output head, or what it may be tied to, is merged decides what a target holds.
        outside = [name for name in self.plan.merged if not re.search(r"\.\d+\.", name)]
        given = [sample.input_ids, sample.generate, sample.masked_spans]
        inputs = self.inputs(sample.expert, sample.index) if sample.inputs else ""
        layers, expert = self.plan.hidden_layers, self._experts[sample.expert]
        return self._key("targets", self._options("targets"), expert, given, inputs, layers, outside, computing.expert)

    def statistics(self, k: int | None, samples: Sequence[Sample], computing: Computing) -> str | None:
        """Return the key of the statistics of expert k, or of the base (None), on these samples."""
        given = [[one.input_ids, one.generate] for one in samples]
        inputs = [self.inputs(one.expert, one.index) for one in samples if one.inputs]
        model = "base" if k is None else self._experts[k]
        kinds = kinds_of(self.plan, k)
        training = None if k is None else self.plan.config.models[k].optimizer_state
        state = "" if training is None else self._file(training)
        return self._key(
            "statistics", self._options("statistics"), model, given, inputs, kinds, state, computing.expert
        )

    def survey(self, k: int, names: Sequence[str], computing: Computing) -> str | None:
        """Return the key of the survey of a group of tensors of expert k, none of which is decomposed."""
        options = self._options("task vectors")
        return self._key("survey", options, self._experts[k], names, computing.expert, usable_cpus())

    def task_vectors(self, computing: Computing) -> Mapping[str, str | None]:
        """Return the keys of the stored task vectors, by the name of the matrix.

        All experts decide each of them: the rank of a part is the smaller side by their number.
        """
        wanted = decomposed(self.plan)
        common, through = self._set(computing), frozenset(computing.factored)
        return {name: self._key("task vectors", common, name, name in through) for name in wanted}

    def magnitudes(self, computing: Computing) -> str | None:
        """Return the key of the magnitudes of all experts' task vectors."""
        through = [name for name in decomposed(self.plan) if name in {*computing.factored}]
        return self._key("magnitudes", self._set(computing), self.plan.merged, decomposed(self.plan), through)

    def prior(self, windows: Sequence[Sequence[Sample]], computing: Computing) -> str | None:
        """Return the key of the losses of each sample for all candidates for the prior. `windows`: the samples."""
        given = ["auto" if expert.weight is None else expert.weight for expert in self.plan.experts]
        seen = [[[s.expert, s.index, self._target_of(s, computing)] for s in window] for window in windows]
        return self._key("prior", self._learning("prior", computing), given, PRIORS, seen)

    def steps(
        self,
        windows: Sequence[Sequence[Sample]],
        computing: Computing,
        before: str | None = "",
        start: Sequence[Sequence[float]] = (),
    ) -> list[str]:
        """Return the keys of the states after each step of a stage; none where a file's SHA-256 is not known.

        Each follows from the one before, so that a stage of more steps goes on from one of fewer.

        Args:
            windows: The samples of each step.
            computing: What the merge computes on.
            before: Of stage 2, the key of the last state of stage 1; None if that is not known. Empty for stage 1.
            start: Of stage 1, where the coefficients start, if not at the priors.
        """
        named = [expert.name for expert in self.plan.experts]
        own: list[Any] = [[name, self._option(f"parameters.{name}")] for name in SECOND] if before else []
        own += [["start", start]] if start else []
        key = self._key("stage", self._learning("stage 1", computing), self.plan.priors, named, before, own)
        keys: list[str] = []
        for window in windows:
            seen = self._window(window, computing)
            key = self._key("step", key, seen) if seen is not None and key is not None else None
            if key is None:
                return []
            keys.append(key)
        return keys

    def _window(self, window: Sequence[Sample], computing: Computing) -> list[Any] | None:
        """Return what decides the losses of a window of samples; None if a file's SHA-256 is not known."""
        found = [(s.expert, s.index, self._target_of(s, computing), s.loss_weight) for s in window]
        return None if any(target is None for _, _, target, _ in found) else [*map(list, found)]

    def _target_of(self, sample: Sample, computing: Computing) -> str | None:
        # Epochs come to each sample many times.
        place = sample.expert, sample.index
        if place not in self._targets:
            self._targets[place] = self.target(sample, computing)
        return self._targets[place]

    def _learning(self, name: str, computing: Computing) -> list[Any]:
        """Return what decides every step of a stage, or the search for the prior, besides samples and priors."""
        plan, along = self.plan, decomposed(self.plan)
        entropy = not plan.config.has_targets
        own = [plan.merged, computing.factored, along, plan.hidden_layers, entropy]
        return [self._options(name), self._set(computing), own, computing.trainer]

    def _set(self, computing: Computing) -> list[Any]:
        """Return what decides the task vectors of the set of experts."""
        return [self._options("task vectors"), self._experts, computing.expert, usable_cpus()]

    def _options(self, name: str) -> list[Any]:
        """Return the options that a computation reads, with the dtype, and the base."""
        unread = {*NEVER, *UNREAD[name]}
        read = {
            path: value
            for path, value in self.identity.options.items()
            if unread.isdisjoint(_and_above(path)) and path.partition(".")[0] not in unread
        }
        return [sorted(read.items()), self.plan.dtype, self._base]

    def _option(self, name: str) -> list[tuple[str, str]]:
        return sorted((path, text) for path, text in self.identity.options.items() if name in _and_above(path))

    @cached_property
    def _base(self) -> list[Any]:
        return self._model(self.plan.base)

    @cached_property
    def _experts(self) -> list[list[Any]]:
        return [[expert.kind, self._model(expert)] for expert in self.plan.experts]

    def _model(self, model: ModelPlan) -> list[Any]:
        """Return the SHA-256 of a model's files by name, without the folder in which they are."""
        weights = [[file.path.name, self._file(file.address)] for file in weight_files(model)]
        own = [self._files_of(each.model) for each in (model, model.adapter) if each is not None]
        return [weights, own]

    def _files_of(self, model: str) -> list[list[str | None]]:
        """Return the SHA-256 of the files beside a model's weights, by name."""
        folder = f"{model.rstrip('/')}/"
        inside = {name.removeprefix(folder): name for name in self.identity.files if name.startswith(folder)}
        # Other models, and calibration files, may lie in folders below this one.
        own = [short for short in inside if "/" not in short or short.startswith(f"{TEMPLATES}/")]
        return [[short, self._file(inside[short])] for short in sorted(own) if inside[short] not in self._apart]

    @cached_property
    def _apart(self) -> frozenset[str]:
        """Names of weight files, and of the states of trainings, which few computations read."""
        models = (self.plan.base, *self.plan.experts)
        states = [given.optimizer_state for given in self.plan.config.models if given.optimizer_state is not None]
        return frozenset([*states, *(file.address for model in models for file in weight_files(model))])

    def _images(self, k: int) -> Sequence[str]:
        return self.plan.images[k] if k < len(self.plan.images) else ()

    def _file(self, name: str) -> str | None:
        file = self.identity.files.get(name)
        return None if file is None else file.sha256

    def _key(self, kind: str, *parts: Any) -> str | None:
        """Return the SHA-256 of the parts, the sources and the versions; None if a part is None or has one inside."""
        return None if _has_none(parts) else _hashed([kind, sources(), sorted(self.identity.versions.items()), parts])


def digest_key(name: str, file: InputFile) -> str:
    """Return the key of the SHA-256 of a weight file as it is now: of its place, its size and its stamp."""
    return _hashed(["digest", name, file.size, file.stamp])


@cache
def sources() -> str:
    """Return the SHA-256 of the sources of this program, which may change without its version."""
    root, found = Path(__file__).resolve().parents[2], hashlib.sha256()
    for path in sorted(path for package in ("engine", "actors", "cluster") for path in (root / package).rglob("*.py")):
        content = path.read_bytes()
        found.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return found.hexdigest()


def _hashed(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()


def _and_above(path: str) -> Iterable[str]:
    """Return the path of an option and of the sections that contain it."""
    parts = path.split(".")
    return {".".join(parts[: depth + 1]) for depth in range(len(parts))}


def _has_none(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_none, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_none, value))
    return value is None
