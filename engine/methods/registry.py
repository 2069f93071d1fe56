"""All methods by name: the learned ones, the weight-space methods of this package, and those of mergekit's library.

Importing this module does not import torch; a method imports its arithmetic when a merge starts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.methods import (
    checkpoint_average,
    closed_form,
    dare,
    doge,
    fisher,
    iso,
    learned,
    lewis,
    linear,
    lot,
    mergekit_library,
    model_stock,
    ota_ffg,
    passthrough,
    pcb,
    rcp,
    regmean,
    regmean_plus_plus,
    slerp,
    svd,
    swudi,
    task_arithmetic,
    ties,
    weight_average,
    widen,
    wudi,
)
from engine.methods.options import Method, Option
from engine.methods.prepass import Prepass

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
        (checkpoint_average.METHOD, checkpoint_average.prepare),
        (ties.METHOD, ties.prepare),
        (dare.LINEAR, dare.prepare_linear),
        (dare.TIES, dare.prepare_ties),
        (iso.METHOD, iso.prepare),
        (svd.METHOD, svd.prepare),
        (svd.INTERMEDIATE, svd.prepare_intermediate),
        (wudi.METHOD, wudi.prepare),
        (wudi.SECOND, wudi.prepare),
        (widen.METHOD, widen.prepare),
        (pcb.METHOD, pcb.prepare),
        (doge.METHOD, doge.prepare),
        (swudi.METHOD, swudi.prepare),
        (swudi.ADAPTIVE, swudi.prepare),
        (lot.METHOD, lot.prepare),
        (regmean.METHOD, regmean.prepare),
        (regmean_plus_plus.METHOD, regmean_plus_plus.prepare),
        (closed_form.METHOD, closed_form.prepare),
        (fisher.METHOD, fisher.prepare),
        (lewis.METHOD, lewis.prepare),
        (ota_ffg.METHOD, ota_ffg.prepare),
        (rcp.METHOD, rcp.prepare),
        (passthrough.METHOD, passthrough.prepare),
        (slerp.METHOD, slerp.prepare),
        (model_stock.METHOD, model_stock.prepare),
    )
}

# What a method has to know of the whole model first.
_PREPASSES: dict[str, tuple[Prepass, ...]] = {
    ties.METHOD.name: ties.PREPASSES,
    fisher.METHOD.name: fisher.PREPASSES,
    lewis.METHOD.name: lewis.PREPASSES,
    pcb.METHOD.name: pcb.PREPASSES,
    doge.METHOD.name: doge.PREPASSES,
    closed_form.METHOD.name: closed_form.PREPASSES,
    ota_ffg.METHOD.name: ota_ffg.PREPASSES,
}

LEARNED = {method.name: method for method in learned.METHODS}
NATIVE = {name: method for name, (method, _) in _NATIVE.items()}
MERGEKIT, INSTALL = mergekit_library.NAMES, mergekit_library.INSTALL
ALIASES = {alias: method.name for method in NATIVE.values() for alias in method.aliases}
# Methods of this package that mergekit has under the same name.
_OF_BOTH = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "passthrough", "slerp", "model_stock")
# All names that a config may contain and that are known without mergekit's library.
NAMES = (*LEARNED, *NATIVE, *ALIASES, *MERGEKIT)


def has_mergekit() -> bool:
    """Return whether mergekit's library is installed."""
    return importlib.util.find_spec("mergekit") is not None


def find_method(name: str) -> Method | None:
    """Return the method with this name or alias, or None if it is unknown or its library is not installed."""
    name = ALIASES.get(name, name)
    method = LEARNED.get(name) or NATIVE.get(name)
    return method or (mergekit_library.method(name) if has_mergekit() else None)


def is_mergekits(method: Method) -> bool:
    """Return whether mergekit has a method of this name too, so that a config may have been written for mergekit."""
    return method.name in _OF_BOTH or not (method.learned or method.name in NATIVE)


def get_method(name: str) -> Method:
    """Return the method with this name or alias, which must exist, as in a config that has been read."""
    method = find_method(name)
    assert method is not None, name
    return method


def known_options() -> dict[str, Option]:
    """Return all options of learned and native methods, by name.

    A config may keep options of one method when it is run with another.
    """
    return {option.name: option for method in (*LEARNED.values(), *NATIVE.values()) for option in method.options}


def preparation(name: str) -> Prepare:
    """Return the `prepare` function of a weight-space method."""
    if name in _NATIVE:
        return _NATIVE[name][1]
    return mergekit_library.preparation(name)


def prepasses(name: str) -> tuple[Prepass, ...]:
    """Return the prepasses of a weight-space method, in their order."""
    return _PREPASSES.get(name, ())


def check_inputs(name: str, models: list[str], has_base: bool) -> None:
    """Check that a weight-space method accepts these models, with or without a base.

    Raises:
        ConfigError: the method needs a base or another number of models, or mergekit's library refuses the models.
    """
    method = get_method(name)
    if method.base == "required" and not has_base:
        raise ConfigError(f"{name} requires a base", "base_model", "the model that the experts were fine-tuned from")
    count = len(models) + has_base
    if count < method.least or (method.most is not None and count > method.most):
        wanted = f"at least {method.least}" if method.most is None else f"{method.most}"
        raise ConfigError(f"{name} takes another number of models than {count}, the base included", "models", wanted)
    if name not in NATIVE:
        mergekit_library.check_models(name, models, has_base)
