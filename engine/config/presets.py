"""The defaults that a config takes from its `preset`, or from its method."""

from __future__ import annotations

from typing import Any

from engine.methods.learned import ADAMERGING, PRESETS

# `calibration` of every preset and of adamerging: responses are taken from the records and not generated.
AS_GIVEN = {"generate_responses": 0}


def with_defaults(raw: dict[str, Any], merge_method: str) -> dict[str, Any]:
    """Return the keys of a config with the defaults of its preset or of its method filled in; given keys win."""
    preset = raw.get("preset")
    if merge_method == "adamerging":
        parameters = ADAMERGING
    elif isinstance(preset, str) and preset in PRESETS:
        parameters = PRESETS[preset]
    else:
        return raw
    defaults = {"parameters": parameters, "calibration": AS_GIVEN}
    sections = {key: raw.get(key) or {} for key in defaults}
    return raw | {key: defaults[key] | given for key, given in sections.items() if isinstance(given, dict)}
