"""The identity of a merge from its plan: options, versions, and what its input files are now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine import __version__
from engine.checkpoints.find import ROOT, deciding_files, find_model
from engine.methods.registry import NATIVE
from engine.planning.open_models import weight_files
from engine.planning.plan import ModelPlan, Plan
from engine.run.identity import Identity, InputFile
from engine.statistics.files import HEADER
from engine.storage.cache import fetch
from engine.storage.local_folder import digest
from engine.storage.paths import is_uri

# Keys of the config that do not influence the bits of the result.
UNDECIDING: dict[str, Any] = {"calibration": {"image_folder"}} | dict.fromkeys(
    ("cluster", "record", "search", "unused", "log_with", "log_dir", "cache", "cache_size"), True
)
# Packages whose version may decide bits: of token ids, of pixel inputs, of sums.
PACKAGES = ("torch", "transformers", "tokenizers", "pillow", "numpy", "numba")
# Start of the names of images; no path, hub id or address begins so.
IMAGE = "image "


def identity(plan: Plan) -> Identity:
    """Return the identity of a merge: the config without the keys in UNDECIDING, versions, and input files.

    Weights are not read. All other files are hashed: those of the models that decide the result, calibration, images.
    """
    options = plan.resolved.model_dump(exclude=UNDECIDING, mode="json")
    recipe = plan.config.recipe
    methods = {part.merge_method or plan.config.merge_method for part in recipe.slices} if recipe is not None else set()
    library = ("mergekit",) if methods - set(NATIVE) else ()
    versions = {"expert-merging": __version__, **{package: version(package) for package in (*PACKAGES, *library)}}
    if plan.chat_template is not None:  # with `auto`, those of the models decide
        options |= {"chat_template.sha256": hashlib.sha256(plan.chat_template.encode()).hexdigest()}
    if plan.vocabulary is not None:
        options |= {"vocabulary.sha256": plan.vocabulary.digest}
    return Identity(dict(_flat(options)), versions, dict(_files(plan)))


def _files(plan: Plan) -> Iterator[tuple[str, InputFile]]:
    """Yield the input files that are there, by name."""
    adapters = [model.adapter for model in (plan.base, *plan.experts) if model.adapter is not None]
    models: list[ModelPlan] = [plan.base, *plan.experts, *adapters]
    for model in models:
        yield from ((file.address, _stat(file.path, file.model)) for file in weight_files(model) if file.path.is_file())
        yield from _companions(model.model, plan, model is plan.base)
    if plan.tokenizer:
        yield from _companions(plan.tokenizer, plan, copied=True)
    for given, expert in zip(plan.config.models, plan.experts, strict=True):
        for place, path in zip(expert.located(given), expert.calibration, strict=True):
            if path.is_file():
                yield place.path, _hashed(path, place.path)
    for folder in (plan.config.base_statistics, *(given.statistics for given in plan.config.models)):
        if folder is not None:
            # It has the SHA-256 of the other files.
            header = f"{folder.rstrip('/')}/{HEADER}"
            file = fetch(header) if is_uri(header) else Path(header)
            if file.is_file():
                yield header, _hashed(file, header)
    for state in (given.optimizer_state for given in plan.config.models):
        if state is not None and Path(state).is_file():
            yield state, _stat(Path(state), state)
    for expert, images in zip(plan.experts, plan.images, strict=False):
        for number, image in enumerate(images):
            # By its number: the folder of the images may be another one on another machine.
            if Path(image).is_file():
                yield f"{IMAGE}{number} of {expert.name}", _hashed(Path(image), image)


def _companions(model: str, plan: Plan, copied: bool) -> Iterator[tuple[str, InputFile]]:
    folder = find_model(model, ROOT)
    for name in deciding_files(folder, copied, plan.config.trust_remote_code):
        yield f"{model.rstrip('/')}/{name}", _hashed(folder / name, model)


def _hashed(path: Path, model: str) -> InputFile:
    return replace(_stat(path, model), sha256=digest(path))


def _stat(path: Path, model: str) -> InputFile:
    """Return the size and stamp of a file. `model` is the model that it belongs to, or its own path or URI."""
    found = path.stat()
    stamps = (found.st_mtime_ns, found.st_ino, found.st_ctime_ns)
    stamp = stamps[:1] if is_uri(model) else stamps if Path(model).is_absolute() else ()
    return InputFile(found.st_size, stamp, None, path)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested mappings and lists by their path, as JSON."""
    if isinstance(value, dict | list) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, json.dumps(value)
