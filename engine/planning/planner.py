"""What a merge will do: tensors, shapes, bytes, and where each model is; from config and file headers alone.

Every mismatch between base and experts is found here, before any weight is read and any process started. Knows neither
torch nor Ray.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.checkpoints.adapters import AdapterHeader, is_adapter, read_adapter_header
from engine.checkpoints.find import find_model, portable
from engine.checkpoints.headers import FLOATS, ModelHeader, main_dtype, read_model_header
from engine.checkpoints.match import NO_EXCEPTIONS
from engine.checkpoints.vocabulary import with_rows_of
from engine.config.schema import Config, ExpertConfig
from engine.errors import CalibrationError, CheckpointError, ConfigError, InputError
from engine.methods.registry import NATIVE, check_inputs
from engine.planning.matching import match
from engine.planning.plan import ExpertPlan, ModelPlan, Plan
from engine.storage.cache import fetch
from engine.storage.paths import is_uri, locate
from engine.untrusted import cpu_limit


def make_plan(config: Config, config_folder: Path) -> Plan:
    """Find every model, read its headers and check that the experts fit the base.

    Raises:
        CheckpointError, CalibrationError, ConfigError: naming the model, the file or the tensor at fault.
    """
    config = _located(config, config_folder)
    base_folder = find_model(config.base_model, config_folder)
    if is_adapter(base_folder):
        raise CheckpointError("the base is an adapter", str(base_folder), "a full checkpoint")
    base = read_model_header(base_folder)
    tokenizer, rows = _tokenizer(config, config_folder), None
    if tokenizer is not None and not config.learned and not is_adapter(tokenizer[1]):
        donor = read_model_header(tokenizer[1])
        rows = ModelPlan(tokenizer[0], donor) if donor.vocab_size != base.vocab_size else None
        base = with_rows_of(base, donor, tokenizer[1])
    tokens = tokenizer[1] if tokenizer else base_folder
    experts = tuple(_plan_expert(config, expert, base, tokens, config_folder) for expert in config.models)
    _check_recipe(config, base, experts)
    merged = _merged(config, base)
    if not merged:
        raise ConfigError("`exclude` leaves no tensor to merge", do=f"its patterns: {', '.join(config.exclude)}")
    return Plan(
        config=config,
        base=ModelPlan(portable(config.base_model, base_folder, config_folder), base),
        experts=experts,
        merged=merged,
        dtype=config.dtype or main_dtype(base),
        hidden_layers=_hidden_layers(config, base) if config.learned else (),
        tokenizer=tokenizer[0] if tokenizer else None,
        rows=rows,
    )


def _located(config: Config, config_folder: Path) -> Config:
    """The config with its folders as absolute paths."""
    found: dict[str, Any] = {}
    if config.log_dir:
        found["log_dir"] = str(locate(config.log_dir, config_folder, ConfigError))
    images = locate(config.calibration.image_folder or ".", config_folder, ConfigError)
    found["calibration"] = config.calibration.model_copy(update={"image_folder": str(images)})
    return config.model_copy(update=found)


def _merged(config: Config, base: ModelHeader) -> tuple[str, ...]:
    """The floats that `exclude` does not name."""
    slow = ConfigError(
        "its regular expressions take too long on the tensors' names", "exclude", do="write simpler ones"
    )
    with cpu_limit(slow):
        return tuple(
            name
            for name, tensor in base.tensors.items()
            if tensor.dtype in FLOATS and tensor.numel and not any(re.match(one, name) for one in config.exclude)
        )


def _plan_expert(
    config: Config, expert: ExpertConfig, base: ModelHeader, tokenizer: Path, config_folder: Path
) -> ExpertPlan:
    wanted = expert.calibration if config.learned else ()
    calibration = tuple(_calibration_file(expert.name, file.path, config_folder) for file in wanted)
    model, adapter_name = _model_and_adapter(expert.model, config_folder)
    folder = find_model(model, config_folder)
    if adapter_name and folder == base.folder:
        model, adapter_name = adapter_name, None
        folder = find_model(model, config_folder)
        if not is_adapter(folder):
            raise CheckpointError("what follows the + is no adapter", str(folder))
    header: ModelHeader | AdapterHeader
    found, adapter = NO_EXCEPTIONS, None
    if is_adapter(folder):
        if config.recipe is not None and config.recipe.baseless:
            raise CheckpointError("an adapter needs a base", str(folder), do="give `base_model`")
        header = read_adapter_header(folder, base)
    else:
        header = read_model_header(folder)
        found = match(expert.name, header, base, config, tokenizer)
    if adapter_name:
        if config.learned:
            raise ConfigError(
                "an adapter of another model than the base is not supported here",
                expert.model,
                do="merge the two first",
            )
        where = find_model(adapter_name, config_folder)
        adapter = ModelPlan(portable(adapter_name, where, config_folder), read_adapter_header(where, base))
    return ExpertPlan(
        model=portable(model, folder, config_folder),
        header=header,
        name=expert.name,
        weight=config.weight(expert),
        loss_weight=config.loss_weight(expert),
        calibration=calibration,
        samples=config.samples_per_model(expert),
        match=found,
        adapter=adapter,
    )


def _model_and_adapter(model: str, config_folder: Path) -> tuple[str, str | None]:
    """The two parts of mergekit's model+lora, unless the + belongs to a folder's name."""
    if is_uri(model):
        # What follows a + is a part of the name, unless it is a URI too.
        parts = re.split(r"\+(?=[a-z0-9]+://)", model, maxsplit=1)
        return parts[0], parts[1] if len(parts) > 1 else None
    if "+" not in model or os.path.isdir(locate(model, config_folder, CheckpointError)):  # noqa: PTH112
        return model, None
    first, _, second = model.partition("+")
    return first, second


def _tokenizer(config: Config, config_folder: Path) -> tuple[str, Path] | None:
    """Whose tokenizer the output has, and its folder; None: the base's."""
    source = config.tokenizer_source
    if source in (None, "base", config.base_model):
        return None
    named = {model.name: model.model for model in config.models}
    model = named.get(str(source), str(source))
    folder = find_model(model, config_folder)
    return portable(model, folder, config_folder), folder


def _check_recipe(config: Config, base: ModelHeader, experts: Sequence[ExpertPlan]) -> None:
    """What the settings of a method that learns nothing ask of the models."""
    recipe = config.recipe
    if recipe is None:
        if config.on_missing != "error":
            raise ConfigError(
                f"`on_missing: {config.on_missing}` is of methods that learn nothing", config.merge_method
            )
        return
    if recipe.layers is not None and recipe.layers != base.num_layers:
        raise ConfigError(
            f"layer-stacking slices are not supported: this has {recipe.layers} layers, the model {base.num_layers}",
            "slices",
            f"layer_range: [0, {base.num_layers}]",
        )
    names = [expert.name for expert in experts]
    check_inputs(config.merge_method, names, not recipe.baseless)
    unfit = [name for name in names if not re.fullmatch(r"[\w.-]+", name) or name in (".", "..", "merge")]
    if unfit and NATIVE.get(config.merge_method) and NATIVE[config.merge_method].outputs == "experts":
        raise ConfigError(f"the expert's name {unfit[0]!r} cannot be a folder's", "models", do="give it another `name`")


def _calibration_file(expert: str, path: str, config_folder: Path) -> Path:
    try:
        found = fetch(path, ()) if is_uri(path) else locate(path, config_folder)
        if os.path.isfile(found):  # noqa: PTH113 - false, not an error, for a name that no file can have
            return found
        where = str(found)
    except InputError as error:
        where = str(error)
    raise CalibrationError(f"expert {expert!r} has no such calibration file", where)


def _hidden_layers(config: Config, base: ModelHeader) -> tuple[int, ...]:
    """S as indices into `hidden_states`: 0 is the embedding output, i the output of block i."""
    last = base.num_layers
    if last is None:
        raise CheckpointError("config.json does not say how many blocks the model has", str(base.folder))
    chosen = config.parameters.hidden_layers
    if chosen == "middle":
        return (last // 2,)
    if chosen == "all":
        return tuple(range(last + 1))
    outside = [index for index in chosen if not 0 <= index <= last]
    if outside:
        raise ConfigError(f"hidden_layers names {outside[0]}", str(base.folder), f"indices 0 to {last}: {last} blocks")
    return tuple(sorted(set(chosen)))
