"""The option values of a weight-space merge: of each tensor, its method and what the config sets for it."""

from __future__ import annotations

from engine.errors import ConfigError
from engine.methods.options import Option, Settings, Value
from engine.methods.registry import NATIVE
from engine.planning.plan import Plan, experts_of, method_at, slice_of


def check_settings(plan: Plan) -> None:
    """Check the option values of every merged tensor, as its shard will read them.

    Raises:
        ConfigError: a required option has no value, or values do not go together.
    """
    for name in plan.merged:
        values, method = resolve(plan, name), method_at(plan, name)
        if plan.layout is not None and values[0].get("trim") == "model":
            raise ConfigError(
                "a merge by slices or modules has no task vectors of whole models to trim",
                "parameters.trim",
                "`tensor`",
                "set `trim: tensor`",
            )
        if method.check is not None:
            method.check(name, [plan.experts[k].name for k in experts_of(plan, name)], *values)


def resolve(plan: Plan, tensor: str) -> tuple[dict[str, Value], list[dict[str, Value]], dict[str, Value] | None]:
    """Return the option values of a tensor: those of the merge, of each of its experts, and of the base.

    The values of the base are None if it takes no part as a model. A value is looked up in the model's settings, the
    slice's, the module's, the top level's, and the defaults, in this order. As in mergekit, filters of a model's values
    see the tensor's name in that model, whose layer may have another number.

    Raises:
        ConfigError: a required option has no value.
    """
    recipe, method, part, origin = (
        plan.config.recipe,
        method_at(plan, tensor),
        slice_of(plan, tensor),
        plan.origin(tensor),
    )
    assert recipe is not None
    shared = (part.settings, recipe.modules.get(part.module, {}), recipe.top)

    def value(option: Option, name: str, *scopes: Settings) -> Value:
        resolved = option.resolve((*scopes, *shared), name, origin.depth)
        if resolved is None and option.required:
            each = "" if option.scope == "merge" else " for every model"
            raise ConfigError(
                f"{method.name} needs a value of {option.name!r}{each}",
                tensor,
                do=f"set `{option.name}` in `parameters`",
            )
        return resolved  # type: ignore[return-value]  # None is the default of some of mergekit's options

    of_models = [option for option in method.options if option.scope != "merge"]
    of_base = [option for option in of_models if option.scope == "model"]
    experts: list[dict[str, Value]] = []
    base: dict[str, Value] | None = None
    for place, source in enumerate(part.sources):
        if origin.sources is not None and place not in origin.sources:
            continue
        name = origin.name_in(source.layers)
        if place == part.base:
            base = {option.name: value(option, name, source.settings) for option in of_base}
        else:
            experts.append({option.name: value(option, name, source.settings) for option in of_models})
    # As in mergekit, a base that is not listed among the models counts as one if the config sets one of its options.
    # The methods of mergekit's library always count it.
    set_for_all = {name for settings in shared for name in settings}
    counts = method.name not in NATIVE or any(option.name in set_for_all for option in of_base)
    if part.base is None and part.has_base and counts:
        base = {option.name: value(option, tensor) for option in of_base}
    return (
        {option.name: value(option, tensor) for option in method.options if option.scope == "merge"},
        experts,
        base,
    )
