"""Make the plan of a merge from its config and file headers.

Mismatches between base and experts are reported here, before any weight is read and any process is started.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.checkpoints.adapters import AdapterHeader, check_merged, is_adapter, read_adapter_header
from engine.checkpoints.find import check_folder, find_model, portable, split_adapter
from engine.checkpoints.headers import FLOATS, ModelHeader, main_dtype, read_model_header
from engine.checkpoints.match import NO_EXCEPTIONS
from engine.checkpoints.special_tokens import special_ids
from engine.checkpoints.structure import Role
from engine.checkpoints.vocabulary import with_vocabulary
from engine.config.schema import LEARNED_EXCLUDES, Config, ExpertConfig
from engine.errors import CalibrationError, CheckpointError, ConfigError, InputError
from engine.planning.chat_templates import find_chat_template
from engine.planning.costs.trainers import check_trainers
from engine.planning.differences import notes_on, remarks_on, with_values_of
from engine.planning.factors import check_directions
from engine.planning.layout.stacking import as_deep_as, check_recipe, is_stacked, lay_out
from engine.planning.layout.vocabulary import check_rules, plan_vocabulary
from engine.planning.matching import match
from engine.planning.plan import ExpertPlan, ModelPlan, Plan
from engine.planning.structures import Structures, check_names, without_tied_head
from engine.storage.cache import fetch
from engine.storage.paths import is_uri, locate
from engine.untrusted import cpu_limit


def make_plan(config: Config, config_folder: Path) -> Plan:
    """Find every model, read its headers, and check that the experts match the base.

    Args:
        config: The config.
        config_folder: The folder to which its paths are relative.

    Raises:
        CheckpointError: A model is missing or invalid, or an expert does not match the base.
        CalibrationError: A calibration file is missing.
        ConfigError: An option does not fit the models.
    """
    check_trainers(config)
    config = _located(config, config_folder)
    base_model, base_folder, base_adapter = _find_base(config, config_folder)
    base = without_tied_head(read_model_header(base_folder))
    tokenizer = _tokenizer(config, config_folder)
    tokens = tokenizer[1] if tokenizer else base_folder
    if (source := _config_source(config, base, config_folder)) is not None:
        base = with_values_of(base, source)
    structures = Structures(base, required=config.uses_samples)
    check_names(base, structures.base)
    base = replace(base, roles=structures.base.roles)
    adapter = _plan_adapter(base_adapter, base, structures, config_folder)
    base_plan = ModelPlan(portable(base_model, base_folder, config_folder), base, adapter=adapter)
    experts = tuple(_plan_expert(config, expert, base, tokens, structures, config_folder) for expert in config.models)
    check_recipe(config, experts)
    config = _with_task_vectors(config, experts)
    vocabulary, layout = plan_vocabulary(config, base, experts, tokenizer[1] if tokenizer else None), None
    if config.recipe is not None and is_stacked(config.recipe, base, experts):
        layout, experts = lay_out(config, base_plan, experts)
        layout = replace(layout, header=with_vocabulary(layout.header, vocabulary))
    header = layout.header if layout is not None else base
    merged = tuple(name for name in _merged(config, header) if layout is None or name in layout.origins)
    if not merged:
        patterns = ", ".join(config.exclude)
        raise ConfigError("`exclude` leaves no tensor to merge", do=f"remove some of the patterns: {patterns}")
    _check_effects(config, merged, experts)
    for model in (part for expert in experts for part in (expert, expert.adapter) if part is not None):
        if isinstance(model.header, AdapterHeader):
            check_merged(model.header, merged, config.exclude)
    _check_budget(config, [header.tensors[name].numel for name in merged])
    plan = Plan(
        config=config,
        base=replace(base_plan, header=with_vocabulary(base, vocabulary)),
        experts=experts,
        merged=merged,
        dtype=config.dtype or _dtype(config, base),
        hidden_layers=_hidden_layers(config, base) if config.learned else (),
        tokenizer=tokenizer[0] if tokenizer else None,
        vocabulary=vocabulary,
        chat_template=find_chat_template(config, base_folder, experts),
        layout=layout,
        remarks=remarks_on(config, base_folder, experts),
    )
    check_directions(plan)
    check_rules(plan)
    return plan


def _with_task_vectors(config: Config, experts: Sequence[ExpertPlan]) -> Config:
    """Return the config with a kind of task vectors in place of `auto`."""
    if config.parameters.task_vectors != "auto":
        return config
    kind = "orthogonal" if any(expert.kind == "adapter" for expert in experts) else "swudi"
    return config.model_copy(update={"parameters": config.parameters.model_copy(update={"task_vectors": kind})})


def _find_base(config: Config, config_folder: Path) -> tuple[str, Path, str | None]:
    """Return the model of the base, its folder, and the model of the adapter on top of it, if there is one."""
    model, adapter = split_adapter(config.base_model, config_folder)
    folder = find_model(model, config_folder)
    if is_adapter(folder):
        raise CheckpointError("the base is an adapter", str(folder), "a full checkpoint")
    if adapter and config.uses_samples:
        raise _adapter_refused(config.base_model)
    return model, folder, adapter


def _dtype(config: Config, base: ModelHeader) -> str:
    """Return the dtype of the computation: the base's, or bfloat16 for float16, where small gradients become 0."""
    own = main_dtype(base)
    return "bfloat16" if config.uses_samples and own == "float16" else own


def _located(config: Config, config_folder: Path) -> Config:
    """Return the config with its folders as absolute paths."""
    located: dict[str, Any] = {}
    if config.log_dir:
        located["log_dir"] = str(locate(config.log_dir, config_folder, ConfigError))
    if config.cache not in (None, "off") and not is_uri(config.cache):
        located["cache"] = str(locate(config.cache, config_folder, ConfigError))
    if config.base_statistics and not is_uri(config.base_statistics):
        located["base_statistics"] = str(locate(config.base_statistics, config_folder, ConfigError))
    located["models"] = tuple(
        one.model_copy(
            update={
                key: str(locate(given, config_folder, ConfigError))
                for key, given in (("statistics", one.statistics), ("optimizer_state", one.optimizer_state))
                if given and not is_uri(given)
            }
        )
        for one in config.models
    )
    images = locate(config.calibration.image_folder or ".", config_folder, ConfigError)
    located["calibration"] = config.calibration.model_copy(update={"image_folder": str(images)})
    return config.model_copy(update=located)


def _merged(config: Config, base: ModelHeader) -> tuple[str, ...]:
    """Return the names of the float tensors that no pattern of `exclude` matches."""
    slow = ConfigError(
        "matching the regular expressions with the tensor names takes too long", "exclude", do="simplify the patterns"
    )
    with cpu_limit(slow):
        return tuple(
            name
            for name, tensor in base.tensors.items()
            if tensor.dtype in FLOATS
            and tensor.numel
            and not _is_left_out(base.roles.get(name), config)
            and not any(re.match(pattern, name) for pattern in config.exclude)
        )


def _is_left_out(role: Role | None, config: Config) -> bool:
    """Return whether tensors of a role are not merged: buffers never, and by default only ordinary weights are.

    With an `exclude` of the user's own, only names decide.
    """
    return role is not None and (role is Role.BUFFER or config.exclude == LEARNED_EXCLUDES)


def _check_effects(config: Config, merged: Sequence[str], experts: Sequence[ExpertPlan]) -> None:
    """Refuse an expert of which nothing would be merged."""
    for expert in experts:
        header, adapter = expert.header, expert.adapter
        if isinstance(header, AdapterHeader) or (adapter is not None and isinstance(adapter.header, AdapterHeader)):
            continue
        if expert.match.absent.issuperset(merged):
            own = next(iter(header.tensors), "")
            raise CheckpointError(
                f"the expert has none of the {len(merged)} merged tensors (it has {own!r}, the base {merged[0]!r}), "
                "so that nothing of it would be merged",
                f"expert {expert.name!r} ({header.folder})",
                "an expert with the base's tensors",
                "remove the expert from `models`, or save it with the base's names",
            )


def _check_budget(config: Config, numels: Sequence[int]) -> None:
    """Refuse a budget of stage 2 that can give no tensor a chunk, or more chunks than there are elements.

    Between these bounds the chunks depend on the importance, which is known after stage 1 alone.
    """
    if config.stages != 2:
        return
    budget, count = config.parameters.budget, len(numels)
    # Of ⌊B·N · share⌋ chunks. All shares are 1/N with κ = 0; else a single tensor may have all of the importance.
    least = 1.0 if config.parameters.kappa == 0 else 1 / count
    if budget < least * (1 - 1e-9):
        raise ConfigError(
            f"with a budget of {budget:g}, none of the {count} merged tensors can get a chunk to learn",
            "parameters.budget",
            f"at least {least:.3g}, better 1 or more",
            "raise `budget`, or use `merge_method: expert_merging`, which has no second stage",
        )
    if budget * count > sum(numels):
        raise ConfigError(
            f"with a budget of {budget:g}, the {count} merged tensors would get {int(budget * count):,} chunks, but "
            f"have {sum(numels):,} elements",
            "parameters.budget",
            f"at most {sum(numels) / count:.3g}",
            "lower `budget`",
        )


def _plan_expert(
    config: Config,
    expert: ExpertConfig,
    base: ModelHeader,
    tokenizer: Path,
    structures: Structures,
    config_folder: Path,
) -> ExpertPlan:
    files = expert.calibration if config.uses_samples else ()
    calibration = tuple(_calibration_file(expert.name, file.path, config_folder) for file in files)
    model, adapter_name = split_adapter(expert.model, config_folder)
    folder = find_model(model, config_folder)
    baseless = config.recipe is not None and config.recipe.baseless
    on_base = folder == base.folder and split_adapter(config.base_model, config_folder)[1] is None
    if adapter_name and on_base and not baseless:
        model, adapter_name = adapter_name, None
        folder = find_model(model, config_folder)
        if not is_adapter(folder):
            raise CheckpointError("the model after the + is not an adapter", str(folder))
    header: ModelHeader | AdapterHeader
    matched = NO_EXCEPTIONS
    notes: tuple[str, ...] = ()
    if is_adapter(folder):
        if baseless:
            raise CheckpointError("an adapter needs a base", str(folder), do="set `base_model`")
        header = read_adapter_header(folder, base, structures.tensor)
    else:
        header = read_model_header(folder)
        like = base if config.recipe is None or config.recipe.plain else as_deep_as(base, header)
        found = structures if like is base else Structures(like, required=False)
        matched = match(expert.name, header, like, config, tokenizer, found)
        any_rows = config.tokenizer_source is not None and not config.learned
        notes = notes_on(expert.name, header, base, matched, any_rows)
    if adapter_name and config.uses_samples:
        raise _adapter_refused(expert.model)
    return ExpertPlan(
        model=portable(model, folder, config_folder),
        header=header,
        name=expert.name,
        weight=config.weight(expert),
        loss_weight=config.loss_weight(expert),
        calibration=calibration,
        samples=config.samples_per_model(expert),
        match=matched,
        adapter=_plan_adapter(adapter_name, base, structures, config_folder),
        notes=notes,
    )


def _plan_adapter(
    adapter: str | None, base: ModelHeader, structures: Structures, config_folder: Path
) -> ModelPlan | None:
    """Return the plan of an adapter on top of a checkpoint, or None without a name."""
    if not adapter:
        return None
    where = find_model(adapter, config_folder)
    if not is_adapter(where):
        raise CheckpointError("the model after the + is not an adapter", str(where))
    return ModelPlan(portable(adapter, where, config_folder), read_adapter_header(where, base, structures.tensor))


def _adapter_refused(model: str) -> ConfigError:
    return ConfigError(
        "methods that run models do not support an adapter of a model other than the base",
        model,
        do="merge model and adapter into one checkpoint first",
    )


def _tokenizer(config: Config, config_folder: Path) -> tuple[str, Path] | None:
    """Return the model that provides the output's tokenizer and its folder, or None if it is the base."""
    source = config.tokenizer_source
    if source == "union" and config.learned:
        raise ConfigError(
            "a learned merge has no union of vocabularies", "tokenizer_source", "`base`, or one of the models"
        )
    if source in (None, "base", "union", config.base_model):
        return None
    named = {model.name: model.model for model in config.models}
    model, _ = split_adapter(named.get(str(source), str(source)), config_folder)
    folder = find_model(model, config_folder)
    check_folder(folder)
    special_ids(folder)  # read when the output is written; a fault in its files is found before the work
    return portable(model, folder, config_folder), folder


def _config_source(config: Config, base: ModelHeader, config_folder: Path) -> ModelHeader | None:
    """Return the expert whose values the output's config.json gets, or None if it is the base's.

    Raises:
        ConfigError: `config_source` names no expert, or one that has no config.json of the base's kind.
    """
    if config.config_source in (None, "base"):
        return None
    models = {model.name: model.model for model in config.models}
    model = models.get(str(config.config_source))
    folder = find_model(model, config_folder) if model else None
    header = None if folder is None or is_adapter(folder) else read_model_header(folder)
    if header is None or not header.is_same_architecture(base):
        raise ConfigError(
            f"`config_source` is {config.config_source!r}",
            "config_source",
            f"`base`, or the name of an expert that is a full checkpoint of the base's kind: {', '.join(models)}",
        )
    return header


def _calibration_file(expert: str, path: str, config_folder: Path) -> Path:
    try:
        file = fetch(path, ()) if is_uri(path) else locate(path, config_folder)
        if os.path.isfile(file):  # noqa: PTH113 - returns False for impossible names, where Path.is_file raises
            return file
        where = str(file)
    except InputError as error:
        where = str(error)
    raise CalibrationError(f"no such calibration file, given for expert {expert!r}", where)


def _hidden_layers(config: Config, base: ModelHeader) -> tuple[int, ...]:
    """Return S as indices into `hidden_states`: 0 is the embedding output, i the output of block i."""
    last = base.num_layers
    if last is None:
        raise CheckpointError("config.json does not give the number of blocks", str(base.folder), "num_hidden_layers")
    chosen = config.parameters.hidden_layers
    if chosen == "middle":
        return (last // 2,)
    if chosen == "all":
        return tuple(range(last + 1))
    outside = [index for index in chosen if not 0 <= index <= last]
    if outside:
        raise ConfigError(
            f"`hidden_layers` contains {outside[0]}",
            str(base.folder),
            f"indices 0 to {last}, as the model has {last} blocks",
        )
    return tuple(sorted(set(chosen)))
