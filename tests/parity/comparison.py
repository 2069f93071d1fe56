"""A model folder of this engine compared with mergekit's of the same config."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from parity.features import random_methods
from parity.merges import AS_IS, FLOAT32, quiet
from parity.models import tensors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

# Largest difference of float32 sums in different orders, for weights of about one.
CLOSE = 1e-6
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
SAMPLE = "Models are merged <|im_start|>user"


@dataclass(frozen=True)
class Comparison:
    """How two merges of a config differ.

    Attributes:
        differences: What differs in names, shapes, dtypes, config.json and tokenizer, in words.
        known: Differences that docs/mergekit.md describes: `names`, `dtypes`, `rounded adapters`.
        worst: The largest difference of any element in float32; None where a known difference or a random method, which
            draws other numbers, changes the values.
        at_threshold: Whether each element that differs is one of several of a task vector that are equal in size at the
            threshold of `density`, of which mergekit keeps any and this engine the first.
    """

    differences: tuple[str, ...]
    known: tuple[str, ...]
    worst: float | None
    at_threshold: bool = False

    @property
    def verdict(self) -> str:
        """`equal`, `equal but for …` with the known differences, or what differs."""
        wrong = list(self.differences)
        if self.worst is not None and self.worst > CLOSE and not self.at_threshold:
            wrong.append(f"values by up to {self.worst:.1g}")
        if wrong:
            return f"differs: {'; '.join(wrong)}"
        return f"equal but for {' and '.join(self.known)}" if self.known else "equal"


def compare(config: Path, ours: Path, theirs: Path) -> Comparison:
    """Compare the results of a config in two folders, each with one as it is and one in float32."""
    text = config.read_text(encoding="utf-8")
    mine, other = (tensors(folder / AS_IS) for folder in (ours, theirs))
    known = []
    renamed = mine.keys() != other.keys() and _in_memory(ours / AS_IS) == _in_memory(theirs / AS_IS)
    if renamed:
        # mergekit merges the experts of a mixture as one tensor, so that only the values of the others are the same.
        known.append("names")
    differences = [] if renamed else _names(mine, other)
    differences += _shapes(mine, other)
    if dtypes := _dtypes(mine, other):
        # mergekit computes arcee_fusion in float32, whatever the config's dtype, and writes that.
        arcee = "arcee_fusion" in text and {tensor.dtype for tensor in other.values()} == {torch.float32}
        known += ["dtypes"] if arcee else []
        differences += [] if arcee else dtypes
    differences += _configs(ours / AS_IS, theirs / AS_IS)
    with quiet():
        differences += _tokenizers(ours / AS_IS, theirs / AS_IS)
    if random_methods(text):
        return Comparison(tuple(differences), tuple(known), None)
    step = max(torch.finfo(tensor.dtype).eps for tensor in other.values() if tensor.is_floating_point())
    mine, other = (tensors(folder / FLOAT32) for folder in (ours, theirs))
    both = {name: (mine[name], other[name]) for name in mine if _comparable(mine[name], other.get(name))}
    worst = max((float((a.double() - b.double()).abs().max()) for a, b in both.values() if a.numel()), default=0.0)
    size = max((float(a.abs().max()) for a, _ in both.values() if a.numel()), default=0.0)
    if CLOSE < worst <= text.count("+m/") * step * size:
        # mergekit rounds a model with its adapter to the model's dtype before it merges.
        return Comparison(tuple(differences), (*known, "rounded adapters"), None)
    at_threshold = worst > CLOSE and _at_threshold(yaml.safe_load(text), config.parent, both)
    return Comparison(tuple(differences), tuple(known), worst, at_threshold)


def _in_memory(folder: Path) -> set[str]:
    """Return the names that the tensors of a model have in memory."""
    with quiet():
        return set(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def _comparable(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and one.is_floating_point()


def _names(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    found = []
    if lacking := sorted(theirs.keys() - ours.keys()):
        found.append(f"{len(lacking)} tensors less ({lacking[0]})")
    if more := sorted(ours.keys() - theirs.keys()):
        found.append(f"{len(more)} tensors more ({more[0]})")
    return found


def _shapes(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    other = [name for name in sorted(ours.keys() & theirs.keys()) if ours[name].shape != theirs[name].shape]
    return [f"{len(other)} shapes ({n}: {list(ours[n].shape)} for {list(theirs[n].shape)})" for n in other[:1]]


def _dtypes(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    pairs = Counter((ours[name].dtype, theirs[name].dtype) for name in ours.keys() & theirs.keys())
    return [f"{own} for {other} of {count} tensors" for (own, other), count in pairs.items() if own != other]


def _configs(ours: Path, theirs: Path) -> list[str]:
    def read(folder: Path) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = config.pop("torch_dtype", None) or config.get("dtype")
        return {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}

    own, other = read(ours), read(theirs)
    changed = [key for key in sorted({*own, *other}) if own.get(key) != other.get(key)]
    return [f"config.json: {key} {str(own.get(key))[:40]} for {str(other.get(key))[:40]}" for key in changed]


def _tokenizers(ours: Path, theirs: Path) -> list[str]:
    def load(folder: Path) -> Any:
        there = any((folder / name).exists() for name in TOKENIZERS)
        return AutoTokenizer.from_pretrained(folder) if there else None

    own, other = load(ours), load(theirs)
    if other is None:
        return []
    if own is None:
        return ["no tokenizer"]
    facts = {
        "vocabulary": lambda tokenizer: tokenizer.get_vocab(),
        "special tokens": lambda tokenizer: tokenizer.special_tokens_map,
        "chat template": lambda tokenizer: (tokenizer.chat_template or "").strip(),
        "token ids": lambda tokenizer: tokenizer(SAMPLE)["input_ids"],
    }
    return [f"another {name}" for name, fact in facts.items() if fact(own) != fact(other)]


def _at_threshold(config: dict[str, Any], folder: Path, both: dict[str, tuple[Tensor, Tensor]]) -> bool:
    """Return whether every element that differs is at the threshold of a task vector, with others of its size."""
    part = (config.get("modules") or {}).get("default", config)
    slices = part.get("slices") or []
    entries = part.get("models") or (slices[0]["sources"] if len(slices) == 1 else [])
    if not entries or not config.get("base_model"):
        return False
    base = tensors(folder / config["base_model"])
    top = (config.get("parameters") or {}).get("density", 1.0)
    experts = [
        (tensors(folder / entry["model"]), (entry.get("parameters") or {}).get("density", top))
        for entry in entries
        if entry["model"] != config["base_model"]
    ]
    for name, (ours, theirs) in both.items():
        differs = (ours - theirs).abs() > CLOSE
        if differs.any():
            if not all(name in expert for expert, _ in experts):
                return False  # an adapter, whose task vector is a product
            # Output and experts may have more tokens than the base. Then the threshold is one of the tensor with their
            # rows, so that any size that occurs more than once may be it.
            rows = len(base[name])
            own = [(expert[name][:rows].float(), density) for expert, density in experts]
            sizes = [((tensor - base[name].float()).abs(), density) for tensor, density in own]
            more = len(ours) > rows
            tied = torch.stack([_tied(size, [density] if more else density) for size, density in sizes]).any(dim=0)
            differs, beyond = differs[:rows], differs[rows:]
            if beyond.any():
                return False
            if (differs & ~tied).any():
                return False
    return True


def _tied(sizes: Tensor, density: Any) -> Tensor:
    """Return where a task vector has the size of its threshold, and other elements with the same size."""
    flat = sizes.flatten()
    if isinstance(density, list):  # as of a gradient, of which any size between its ends may be the threshold
        values, counts = flat.unique(return_counts=True)
        return torch.isin(sizes, values[counts > 1])
    kept = {int(density * flat.numel()), int(density * flat.numel()) + 1}
    thresholds = [flat.topk(count).values[-1] for count in kept if 1 <= count < flat.numel()]
    return torch.isin(sizes, torch.stack(thresholds)) if thresholds else torch.zeros_like(sizes, dtype=torch.bool)
