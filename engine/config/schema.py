"""The keys of a config with their types, bounds and defaults: a superset of mergekit's.

`engine.config.reader` reads a YAML into a `Config` and writes the error messages. `Config.parameters` has the options
of the learned methods (Expert Merging, arXiv 2509.25712), `Config.recipe` those of weight-space methods
(`engine.methods.options`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from engine.config.recipe import WeightSpaceSettings
from engine.config.resources import GPUS, NUM_GPUS, SHARDS, WAIT, Cluster, GradientUse
from engine.config.search.settings import Search
from engine.fields import ByteSize, Float, Int, Listed, Pattern, Section
from engine.methods.compression import Compression
from engine.methods.corrections import CORRECTIONS, Corrections
from engine.methods.learned import ModelParameters, Parameters
from engine.methods.options import SAMPLES, Method, Statistic
from engine.methods.registry import get_method

# The trackers of accelerate, named like their packages.
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")

# The most characters of an expert's name, as of a file's.
NAME = 255
# The most records of a calibration file, and tokens of a text.
RECORDS, TOKENS = 1_000_000, 10_000_000

# Keys that accept several kinds of values, with the text that error messages show as expected.
UNIONS: dict[int | str, str] = {
    "name": f"a text that is not blank, of at most {NAME} characters",
    "weight": "a number, auto or closed_form",
    "hidden_layers": "middle, all, or a list of indices into hidden_states",
    "num_gpus": NUM_GPUS,
    "batch_tokens": f"auto, or a whole number from 1 to {TOKENS:,}",
    "shards": f"auto, or a whole number from 0 to {SHARDS:,}",
    "trainers": f"auto, or a whole number from 1 to {GPUS:,}",
    "hang": f"auto, or a number of seconds above 0 and of at most {WAIT:,}",
    "max_shard_size": "a number of bytes, or a string such as 5GB",
    "cache_size": "a number of bytes, or a string such as 50GB",
    "experts": "a number of experts from 1, or a share of them between 0 and 1",
    "objective": "kl, or a list of mappings with `data`",
    "parallel": "auto, or a whole number from 1 to 1,000",
    "log_with": f"one or a list of {', '.join(TRACKERS)}",
}

# Fields that are not keys of the YAML: `engine.config.reader` fills them in.
INTERNAL = ("recipe", "unused", "collect", "collect_base", "compress")

LEARNED_EXCLUDES = (".*vision.*", ".*visual.*", ".*lm_head.*", ".*norm.*", ".*embed_tokens.*", ".*bias.*")


def _name(value: str) -> str:
    if not value.strip() or len(value) > NAME:
        raise ValueError(UNIONS["name"])
    return value


def _tracker(value: str) -> str:
    if value not in TRACKERS:
        raise ValueError(f"one of {', '.join(TRACKERS)}")
    return value


def _cache(value: Any) -> Any:
    """Return what YAML reads as false as the text `off` again."""
    return "off" if value is False else value


def as_files(value: Any) -> Any:
    """Return a single path or mapping as a list, and each path as a mapping."""
    listed = [value] if isinstance(value, str | dict) else value
    if not isinstance(listed, list):
        return listed
    return [{"path": entry} if isinstance(entry, str) else entry for entry in listed]


def _option(value: Any) -> Any:
    parts = value.values() if isinstance(value, dict) else [value]
    if not all(isinstance(part, bool | int | float | str) for part in parts):
        raise ValueError("a number, a string, true or false, or a mapping to these")
    return value


Dtype = Literal["float32", "bfloat16", "float16"]
Text = Annotated[str, Field(min_length=1)]
# Options of an image processor, named as in transformers or in the model's own configuration.
ImageOptions = dict[str, Annotated[Any, AfterValidator(_option)]]


def last_part(model: str) -> str:
    """Return `math` for `owner/math`, `../experts/math/`, `owner/math@revision` and `s3://bucket/math?region=x`."""
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)@.+", model)
    if "://" in model:
        model = model.partition("?")[0]
    return (hub[1] if hub else model).rstrip("/").rpartition("/")[2] or model


class CalibrationFile(Section):
    """A calibration file of an expert, serialised as its path alone if it has no options.

    Attributes:
        path: The file.
        samples: Number of records taken from this file. Files without it share the expert's `samples_per_model`.
        loss_weight: Replaces the expert's `loss_weight`.
        image_options: Take precedence over `calibration.image_options`.
    """

    path: Text
    samples: Annotated[Int, Field(ge=1, le=RECORDS)] | None = None
    loss_weight: Annotated[Float, Field(ge=0, le=1e6)] | None = None
    image_options: ImageOptions = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> Any:
        given = {key: value for key, value in handler(self).items() if value not in (None, {})}
        return self.path if set(given) == {"path"} else given


# A calibration as a YAML may have it.
Files = str | CalibrationFile | list[str | CalibrationFile]


class ExpertConfig(Section):
    """An entry of `models`.

    Attributes:
        model: The path, URI or hub id of a checkpoint, or of a LoRA adapter of the base.
        name: Labels the expert in all outputs. Default: the last part of the path.
        calibration: A file with records of the expert's domain, or a list of files. Learned methods need it, and
            methods that use statistics, unless `statistics` is given.
        statistics: The folder of the expert's statistics (`python cli.py stats`).
        optimizer_state: The state of Adam at the end of the expert's training (`optimizer.pt`, or safetensors), whose
            squared gradients take the place of its Fisher information. Methods that use this alone need no samples.
        parameters: Options of this model, which take precedence over those of the merge.
    """

    model: Text
    name: Annotated[str, AfterValidator(_name)] = Field(default_factory=lambda given: last_part(given.get("model", "")))
    calibration: Annotated[tuple[CalibrationFile, ...], BeforeValidator(as_files, json_schema_input_type=Files)] = ()
    statistics: Text | None = None
    optimizer_state: Text | None = None
    parameters: ModelParameters = ModelParameters()

    def knows(self, kinds: Iterable[Statistic]) -> bool:
        """Return whether these statistics follow from files, and not from samples."""
        return self.statistics is not None or (self.optimizer_state is not None and set(kinds) <= {"fisher"})


class Calibration(Section):
    """Options that turn records into calibration samples.

    Attributes:
        max_length: Tokens of the longest sample; longer ones are cut.
        shuffle: Permute the records of each file before the first ones are taken.
        generate_responses: Tokens of the response that each expert first writes to its prompts; 0 for none.
        image_options: Options of the image processor, named as in transformers or in the model's own configuration.
        image_folder: Searched for images that are not next to their data file. None: the config's folder.
    """

    max_length: Annotated[Int, Field(ge=2, le=TOKENS)] = 2048
    shuffle: bool = False
    generate_responses: Annotated[Int, Field(ge=0, le=TOKENS)] = 64
    image_options: ImageOptions = Field(default_factory=dict)
    image_folder: Text | None = None


class Config(Section):
    """The config of a merge with all defaults filled in. docs/config.md describes the keys.

    Attributes:
        merge_method: The method: `python cli.py methods` lists them.
        base_model: The path, URI or hub id of the model from which the experts were fine-tuned.
        preset: Defaults of the learned methods' options (`engine.methods.learned.PRESETS`).
        models: The experts.
        parameters: Options of the method.
        exclude: Regular expressions; tensors whose names match keep the base's values.
        calibration: How records become calibration samples.
        calibrate: Steps after the merge (`engine.methods.corrections`).
        base_statistics: The folder of the base's statistics, where a method uses them. None: they are collected on the
            samples of all experts.
        dtype: The dtype of the merged model during computation. None: the base's, bfloat16 for float16.
        out_dtype: The dtype of the written weights. None: `dtype` if given, else that of each tensor.
        rounding: How merged weights are rounded to the output's dtype.
        max_shard_size: Maximum bytes of an output file, unless a single tensor is larger; also a text such as 5GB.
        tokenizer_source: The model that provides the output's tokenizer, `base` or `union`. None: the base, unchecked.
        chat_template: `auto`, a name or Jinja. None: that of the output's tokenizer.
        config_source: The expert whose config.json provides the values that change what a model computes.
        on_missing: `base`: the base provides tensors that an expert lacks.
        seed: Seed of `shuffle`, of random masks and of stochastic rounding.
        batch_tokens: Maximum tokens of a forward and backward pass, padding included.
        gradients: How the passes of a window become one gradient.
        gradient_checkpointing: Compute activations again in the backward pass instead of storing them.
        trust_remote_code: Allow Python code in a model's folder to run.
        cluster: Resources of the actors, rates of the machines, and times to wait.
        log_with: Trackers that log every step. They do not change the result.
        log_dir: The folder of those trackers that write files.
        cache: A folder or URI of what merges have computed, which others use again (`engine.run.reuse`), or `off`.
            None: that of the environment, or a folder of this user's.
        cache_size: The bytes that the cache may take; also a text such as 50GB.
        search: The search of `python cli.py search`. Other commands take the config as it is without.
        record: Versions and hashes that a merge wrote into merge/config.yaml. Ignored, so that this file is a config.
        recipe, unused: INTERNAL: the settings of a weight-space method, and the given keys that it does not use.
        collect, collect_base: INTERNAL: the statistics that are written instead of a merge (`python cli.py stats`), and
            whether those of the base are, too.
        compress: INTERNAL: how the base is made smaller instead of a merge (`python cli.py compress`).
    """

    merge_method: Text
    base_model: Text
    preset: Literal["paper", "paper/internvl", "paper/qwen2-vl", "paper/mistral"] | None = None
    models: tuple[ExpertConfig, ...]
    parameters: Parameters = Parameters()
    exclude: tuple[Pattern, ...] = LEARNED_EXCLUDES
    calibration: Calibration = Calibration()
    calibrate: Corrections = ()
    base_statistics: Text | None = None
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    max_shard_size: Annotated[ByteSize, Field(ge=1)] = 5_000_000_000
    tokenizer_source: Text | None = None
    chat_template: Text | None = None
    config_source: Text | None = None
    on_missing: Literal["error", "base"] = "error"
    seed: Annotated[Int, Field(ge=0, lt=2**63)] = 0
    # These three are not in `cluster`, because they may change the last bits of a result and so are part of its
    # identity.
    batch_tokens: Annotated[Int, Field(ge=1, le=TOKENS)] | Literal["auto"] = "auto"
    gradients: GradientUse = "auto"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    cluster: Cluster = Cluster()
    log_with: Listed[Annotated[str, AfterValidator(_tracker)]] = ()
    log_dir: Text | None = None
    cache: Annotated[Text, BeforeValidator(_cache, json_schema_input_type=Literal[False] | Text)] | None = None
    cache_size: Annotated[ByteSize, Field(ge=0)] = 50_000_000_000
    search: Search | None = None
    record: dict[str, Any] | None = None
    recipe: WeightSpaceSettings | None = None
    unused: tuple[str, ...] = ()
    collect: tuple[Statistic, ...] = ()
    collect_base: bool = False
    compress: Compression | None = None

    def weight(self, expert: ExpertConfig) -> float | None:
        """Return the prior ᾱₖ of an expert, or None for one that the merge finds (`auto`, `closed_form`)."""
        own = expert.parameters.weight
        weight = self.parameters.weight if own is None else own
        return None if isinstance(weight, str) else weight

    def loss_weight(self, expert: ExpertConfig) -> float:
        """Return the loss weight βₖ of an expert."""
        loss_weight = expert.parameters.loss_weight
        return self.parameters.loss_weight if loss_weight is None else loss_weight

    def samples_per_model(self, expert: ExpertConfig) -> int:
        """Return the number of calibration samples of an expert."""
        if self.recipe is not None:
            index = next(index for index, one in enumerate(self.models) if one.name == expert.name)
            return int(SAMPLES.resolve([*self.recipe.settings_of(index), self.recipe.top], "", 0.0) or 1)
        return expert.parameters.samples_per_model or self.parameters.samples_per_model

    @property
    def learned(self) -> bool:
        """Whether the method learns coefficients; if not, it is a weight-space method."""
        return self.recipe is None

    @property
    def has_targets(self) -> bool:
        """Whether the losses compare with targets of the experts. AdaMerging uses the merged model's outputs alone."""
        return self.merge_method != "adamerging"

    @property
    def closed_form(self) -> bool:
        """Whether learning starts at the coefficients that least squares on the layers' outputs give."""
        return self.learned and self.parameters.weight == "closed_form"

    @property
    def stages(self) -> int:
        """Number of learning stages: 2 for Expert Merging++, 1 for the other learned methods."""
        return 2 if self.merge_method == "expert_merging_pp" else 1

    @property
    def spectral(self) -> bool:
        """Whether chunks of matrices in stage 2 are groups of singular directions."""
        return self.stages == 2 and self.parameters.chunks != "contiguous"

    @property
    def methods(self) -> list[Method]:
        """The methods of the merge, those of slices and the steps after it included."""
        parts = self.recipe.slices if self.recipe is not None else ()
        names = dict.fromkeys([self.merge_method, *(part.merge_method for part in parts if part.merge_method)])
        return [*map(get_method, names), *(CORRECTIONS[one.method] for one in self.calibrate)]

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The statistics that must be known of every expert."""
        needed: list[Statistic] = ["gram"] if self.closed_form else []
        needed += [kind for method in self.methods for kind in method.statistics]
        return self.collect or tuple(dict.fromkeys(needed))

    @property
    def statistics_of_base(self) -> tuple[Statistic, ...]:
        """The statistics that must be known of the base."""
        if self.collect:
            return self.collect if self.collect_base else ()
        return tuple(dict.fromkeys(kind for method in self.methods for kind in method.base_statistics))

    @property
    def uses_samples(self) -> bool:
        """Whether models run on calibration samples."""
        given = all(one.statistics for one in self.models)
        collected = bool(self.statistics and not given) or bool(self.statistics_of_base and not self.base_statistics)
        return self.learned or collected or any(method.by_blocks for method in self.methods)
