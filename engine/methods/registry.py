"""Every method by its name: those of this package, those that are learned, and what mergekit's library may add.

Knows what methods are called and take; a method's arithmetic is in its own file, and is imported when a merge starts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.methods import (
    dare,
    iso,
    learned,
    linear,
    mergekit_library,
    svd,
    task_arithmetic,
    ties,
    weight_average,
    wudi,
)
from engine.methods.options import Method, Option

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill

    Prepare = Callable[[MergeTensor], Fill]


_NATIVE: dict[str, tuple[Method, Prepare]] = {
    method.name: (method, prepare)
    for method, prepare in (
        (linear.METHOD, linear.prepare),
        (weight_average.METHOD, weight_average.prepare),
        (task_arithmetic.METHOD, task_arithmetic.prepare),
        (ties.METHOD, ties.prepare),
        (dare.LINEAR, dare.prepare_linear),
        (dare.TIES, dare.prepare_ties),
        (iso.METHOD, iso.prepare),
        (svd.METHOD, svd.prepare),
        (svd.INTERMEDIATE, svd.prepare_intermediate),
        (wudi.METHOD, wudi.prepare),
        (wudi.SECOND, wudi.prepare),
    )
}


LEARNED = {method.name: method for method in learned.METHODS}


NATIVE = {name: method for name, (method, _) in _NATIVE.items()}


MERGEKIT, INSTALL = mergekit_library.NAMES, mergekit_library.INSTALL


ALIASES = {alias: method.name for method in NATIVE.values() for alias in method.aliases}


# Every name that a config may give, as far as it is known without mergekit's library.
NAMES = (*LEARNED, *NATIVE, *ALIASES, *MERGEKIT)


def has_mergekit() -> bool:
    """Whether mergekit's library is installed."""
    return importlib.util.find_spec("mergekit") is not None


def find_method(name: str) -> Method | None:
    """The method of that name or alias; None where there is none, or only in a library that is not installed."""
    name = ALIASES.get(name, name)
    found = LEARNED.get(name) or NATIVE.get(name)
    return found or (mergekit_library.method(name) if has_mergekit() else None)


def get_method(name: str) -> Method:
    """The method of a name that a config was read with."""
    method = find_method(name)
    assert method is not None, name
    return method


def known_options() -> dict[str, Option]:
    """Every option of every method of ours: a config may keep those of one method when it is run by another."""
    return {option.name: option for method in (*LEARNED.values(), *NATIVE.values()) for option in method.options}


def preparation(name: str) -> Prepare:
    """The arithmetic of a method that learns nothing."""
    if name in _NATIVE:
        return _NATIVE[name][1]
    return mergekit_library.preparation(name)


def check_inputs(name: str, models: list[str], has_base: bool) -> None:
    """Whether a method takes so many models, with or without a base.

    Raises:
        ConfigError: it does not.
    """
    method = get_method(name)
    if method.base == "required" and not has_base:
        raise ConfigError(f"{name} needs a base", "base_model", "the model that the experts were fine-tuned from")
    if name not in NATIVE:
        mergekit_library.check_models(name, models, has_base)
