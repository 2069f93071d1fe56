"""The config of a merge as typed, frozen data: its keys, their types, bounds and defaults; a superset of mergekit's.

Knows nothing of YAML, files, checkpoints, torch or Ray; `engine.config.reader` reads one and words its faults. Defaults
are those of the method's page (Expert Merging, arXiv 2509.25712). Options of the methods that learn nothing are
settings (`engine.methods.options`), kept in `Config.recipe`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from engine.fields import Float, Int, Section, not_bool
from engine.methods.learned import ModelParameters, Parameters

# The trackers that accelerate knows; each is the name of its package too.
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")


# Keys that take one of several kinds of value, and what they take.
UNIONS: dict[int | str, str] = {
    "weight": "a number, or auto",
    "hidden_layers": "middle, all, or a list of indices into hidden_states",
    "num_gpus": "auto, or a number of at least 0",
    "shards": "auto, or a whole number of at least 0",
    "max_shard_size": "a number of bytes, or a text such as 5GB",
    "log_with": f"one or a list of {', '.join(TRACKERS)}",
}


# Fields that no YAML has: `engine.config.reader` fills them in.
INTERNAL = ("recipe", "unused")


LEARNED_EXCLUDES = (".*vision.*", ".*visual.*", ".*lm_head.*", ".*norm.*", ".*embed_tokens.*", ".*bias.*")


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return value


def _tracker(value: str) -> str:
    if value not in TRACKERS:
        raise ValueError("there is no such tracker")
    return value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _files(value: Any) -> Any:
    """A path or a mapping as a list of one, and each path as a mapping."""
    listed = [value] if isinstance(value, str | dict) else value
    return [{"path": one} if isinstance(one, str) else one for one in listed] if isinstance(listed, list) else listed


def _option(value: Any) -> Any:
    parts = value.values() if isinstance(value, dict) else [value]
    if not all(isinstance(part, bool | int | float | str) for part in parts):
        raise ValueError("a number, a text, true or false, or a mapping to these is expected")
    return value


def _bytes(value: Any) -> Any:
    """5GB as in transformers: powers of 1000."""
    if isinstance(value, str) and (found := re.fullmatch(r"(\d+)\s*([KMGT]?)B?", value.strip(), flags=re.IGNORECASE)):
        return int(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")
    return not_bool(value)


Pattern = Annotated[str, AfterValidator(_pattern)]


Dtype = Literal["float32", "bfloat16", "float16"]


# Of an image processor, by the names that transformers or the model's own configuration have for them.
ImageOptions = dict[str, Annotated[Any, AfterValidator(_option)]]


def _last_part(model: str) -> str:
    """`math` of `owner/math`, `../experts/math/`, `owner/math@revision` and `s3://bucket/math?region=x`."""
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)@.+", model)
    if "://" in model:
        model = model.partition("?")[0]
    return (hub[1] if hub else model).rstrip("/").rpartition("/")[2] or model


class CalibrationFile(Section):
    """A file of an expert's samples, written as its path where it has no options of its own.

    `samples` are taken of this file; files without share the expert's. `loss_weight` counts instead of the expert's,
    and `image_options` before the whole config's.
    """

    path: Annotated[str, Field(min_length=1)]
    samples: Annotated[Int, Field(ge=1)] | None = None
    loss_weight: Annotated[Float, Field(ge=0)] | None = None
    image_options: ImageOptions = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> Any:
        given = {key: value for key, value in handler(self).items() if value not in (None, {})}
        return self.path if set(given) == {"path"} else given


class ExpertConfig(Section):
    """One entry of `models`: a checkpoint or an adapter, by path or hub id."""

    model: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)] = Field(default_factory=lambda given: _last_part(given.get("model", "")))
    calibration: Annotated[tuple[CalibrationFile, ...], BeforeValidator(_files)] = ()
    parameters: ModelParameters = ModelParameters()


class Calibration(Section):
    """How samples are made from records."""

    max_length: Annotated[Int, Field(ge=2)] = 2048
    shuffle: bool = False
    generate_responses: Annotated[Int, Field(ge=0)] = 64
    image_options: ImageOptions = Field(default_factory=dict)
    # Where images are looked for that are not beside their data file; None: in the config's folder.
    image_folder: Annotated[str, Field(min_length=1)] | None = None


class ActorResources(Section):
    """What one actor asks of the cluster; auto: one GPU where there are any. `labels`: those of Ray's nodes."""

    num_gpus: Literal["auto"] | Annotated[Float, Field(ge=0)] = "auto"
    labels: dict[str, str] = Field(default_factory=dict)


class Rates(Section):
    """How fast the machines are; None: not known to the user, so a default for the kind of device stands in.

    They choose what runs where and what `plan` foretells; they change no result. GB are 1e9 bytes.
    """

    compute_tflops: Annotated[Float, Field(gt=0)] | None = None
    # What the device that computes reads and writes of its own memory.
    memory_gbs: Annotated[Float, Field(gt=0)] | None = None
    # Bytes of checkpoints that one core streams through.
    stream_gbs: Annotated[Float, Field(gt=0)] | None = None
    # Between processes of a node, and between nodes.
    exchange_gbs: Annotated[Float, Field(gt=0)] | None = None
    network_gbs: Annotated[Float, Field(gt=0)] | None = None
    disk_gbs: Annotated[Float, Field(gt=0)] | None = None


class Cluster(Section):
    """Resources, how fast they are, and how long to wait for them in seconds.

    `shards`: 0 keeps the streams over the task vectors in the trainer's process.
    """

    expert: ActorResources = ActorResources()
    trainer: ActorResources = ActorResources()
    shards: Literal["auto"] | Annotated[Int, Field(ge=0)] = "auto"
    # Of the nodes that may be used at all.
    labels: dict[str, str] = Field(default_factory=dict)
    rates: Rates = Rates()
    wait: Annotated[Float, Field(ge=0)] = 600


class ListedBase(Section):
    """The base as one of `models`: its place among them and its settings."""

    place: int
    settings: dict[str, Any]


class WeightSpaceSettings(Section):
    """What a method that learns nothing is told: settings by precedence, the models' first, then the slice's, the
    top's.

    `models` in the order of `Config.models`; `base`: None where it is not listed among them; `baseless`: there is none,
    and the first model only lends its files and shapes; `layers`: of a whole-model slice, to be checked against the
    model.
    """

    models: tuple[dict[str, Any], ...]
    top: dict[str, Any] = Field(default_factory=dict)
    slice: dict[str, Any] = Field(default_factory=dict)
    base: ListedBase | None = None
    baseless: bool = False
    layers: int | None = None


class Config(Section):
    """A whole merge, as the user wrote it, with every default filled in."""

    merge_method: Annotated[str, Field(min_length=1)]
    base_model: Annotated[str, Field(min_length=1)]
    # Whose defaults the learned methods' options have: those of the published command line, or ours.
    preset: Literal["paper"] | None = None
    models: Annotated[tuple[ExpertConfig, ...], Field(min_length=1)]
    parameters: Parameters = Parameters()
    exclude: tuple[Pattern, ...] = LEARNED_EXCLUDES
    calibration: Calibration = Calibration()
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    # Bytes of an output file at most, or one tensor.
    max_shard_size: Annotated[Int, BeforeValidator(_bytes), Field(ge=1)] = 5_000_000_000
    # Whose tokenizer the output has; None: the base's, unchecked.
    tokenizer_source: Annotated[str, Field(min_length=1)] | None = None
    # What stands for a tensor that an expert lacks; only of methods that learn nothing.
    on_missing: Literal["error", "base"] = "error"
    seed: Annotated[Int, Field(ge=0, lt=2**63)] = 0
    # Not in `cluster`: these may change the last bits of a result, so they count among what decides it.
    batch_tokens: Annotated[Int, Field(ge=1)] = 192
    gradients: Literal["accumulate", "stream"] = "accumulate"
    gradient_checkpointing: bool = False
    # Whether Python code in a model's folder may run.
    trust_remote_code: bool = False
    cluster: Cluster = Cluster()
    # Who is told of every step, and the folder of those trackers that write files. They change no result.
    log_with: Annotated[tuple[Annotated[str, AfterValidator(_tracker)], ...], BeforeValidator(_listed)] = ()
    log_dir: Annotated[str, Field(min_length=1)] | None = None
    # What a merge wrote of itself beside its config (versions, hashes); ignored, so that merge/config.yaml runs again.
    record: dict[str, Any] | None = None
    # See INTERNAL: the settings of a method that learns nothing, and the keys that are not the method's.
    recipe: WeightSpaceSettings | None = None
    unused: tuple[str, ...] = ()

    def weight(self, expert: ExpertConfig) -> float | None:
        """The prior ᾱₖ: the expert's own weight, else the top level's; None where it is to be found (auto)."""
        own = expert.parameters.weight
        weight = self.parameters.weight if own is None else own
        return None if weight == "auto" else weight

    def loss_weight(self, expert: ExpertConfig) -> float:
        """βₖ: the expert's own, else the top level's."""
        own = expert.parameters.loss_weight
        return self.parameters.loss_weight if own is None else own

    def samples_per_model(self, expert: ExpertConfig) -> int:
        """How many calibration samples the expert has."""
        return expert.parameters.samples_per_model or self.parameters.samples_per_model

    @property
    def learned(self) -> bool:
        """Whether coefficients are learned."""
        return self.recipe is None

    @property
    def has_targets(self) -> bool:
        """Whether experts say what is learned: their targets. Else the merged model's own predictions do."""
        return self.merge_method != "adamerging"

    @property
    def stages(self) -> int:
        """2 for Expert Merging++, 1 for the others that learn."""
        return 2 if self.merge_method == "expert_merging_pp" else 1
