"""What a config uses: the rows of the table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

RANDOM = {"dare_ties", "dare_linear", "dare_ta", "della", "della_linear"}
KEYS = ("int8_mask", "embed_slerp", "out_dtype")


def features(text: str, tool: str) -> list[str]:
    """Return the features that a config uses, sorted. `tool`: see `parity.merges.of_mergekit`."""
    if tool == "moe":
        return ["mergekit-moe"]
    last = list(yaml.safe_load_all(text))[-1]
    found = {f"method {method}" for method in _methods(text)}
    found |= {feature for feature, used in _of(text, last) if used}
    found |= {key for key in KEYS if re.search(rf"\b{key}:", text)}
    found |= {"several documents"} if tool == "multi" else set()
    return sorted(found)


def random_methods(text: str) -> bool:
    """Return whether a config's values depend on random numbers: a method that draws them, and not a density of 1."""
    densities = re.findall(r"density:\s*\[?([0-9.]+)", text)
    return bool(_methods(text) & RANDOM) and (not densities or any(float(density) != 1 for density in densities))


def _methods(text: str) -> set[str]:
    return set(re.findall(r"merge_method:\s*\"?(\w+)", text))


def _of(text: str, config: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield each feature of a config's keys, and whether the config uses it."""
    block = config.get("tokenizer")
    tokenizer = block if isinstance(block, dict) else {}
    source = tokenizer.get("source", "union") if tokenizer else config.get("tokenizer_source")
    yield "tokenizer: union", source == "union"
    yield "tokenizer: base", source == "base"
    yield "tokenizer: of a model", source not in (None, "union", "base")
    yield "tokenizer: block", bool(tokenizer)
    yield "tokenizer: rules for tokens", bool(tokenizer.get("tokens"))
    template = config.get("chat_template")
    yield f"chat_template: {'auto' if template == 'auto' else 'by name'}", template is not None
    modules = config.get("modules") or {}
    slices = config.get("slices") or [one for module in modules.values() for one in module.get("slices") or []]
    yield "slices: one", len(slices) == 1
    yield "slices: stacked layers", len(slices) > 1
    yield "modules", bool(modules)
    yield "name", "name" in config
    yield "gradients", bool(re.search(r"\[[0-9., ]+,[0-9., ]+\]", re.sub(r"layer_range:.*", "", text)))
    yield "filters", "filter:" in text
    yield "MODEL+LORA", "+m/" in text
    models = config.get("models") or []
    yield "base among the models", any(model["model"] == config.get("base_model") for model in models)
