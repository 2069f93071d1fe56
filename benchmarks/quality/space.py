"""The options that are searched for every method, on validation data only. Each is written as it stands in a config.

Methods that learn nothing are merged once with `lambda` 1 for every other option, and their sum of task vectors is then
scaled: θ₀ + λ·τ is what their option `lambda` says. Task Arithmetic's λ is its weight.
"""

from __future__ import annotations

from typing import Any

Options = dict[str, Any]

WEIGHT_SPACE: dict[str, list[Options]] = {
    "weight_average": [{}],
    "task_arithmetic": [{"weight": 1.0}],
    "ties": [{"weight": 1.0, "density": density} for density in (0.2, 0.5)],
    "dare_ties": [{"weight": 1.0, "density": density} for density in (0.2, 0.5)],
    "iso": [{}],
    "svd": [{}],
    "wudi": [{}],
    "wudi2": [{}],
}
SUMS = (0.2, 0.3, 0.4, 0.5, 0.6)
MEANS = (0.7, 1.0, 1.3, 1.6, 2.0, 3.0, 4.0)
SCALED = {
    "weight_average": (1.0,),
    "task_arithmetic": SUMS,
    "ties": MEANS,
    "dare_ties": SUMS,
    "iso": MEANS,
    "svd": MEANS,
}
SCALED |= {"wudi": (0.3, 0.5, 0.7, 1.0, 1.3, 1.6, 2.0), "wudi2": (0.3, 0.5, 0.7, 1.0, 1.3, 1.6, 2.0)}
LEARNED: dict[str, list[Options]] = {
    "adamerging": [
        {"weight": weight, "learning_rate": rate, "epochs": epochs}
        for weight in (0.2, 0.4)
        for rate, epochs in ((0.5, 1), (0.1, 4))
    ],
}

# What validation chose: of methods that learn nothing the options and λ, of the others method and options by a name. Of
# Expert Merging they are the defaults, to which `choose.py --try` led.
CHOSEN: dict[str, tuple[Options, float]] = {
    "weight_average": ({}, 1.0),
    "task_arithmetic": ({"weight": 1.0}, 0.4),
    "ties": ({"weight": 1.0, "density": 0.2}, 1.0),
    "dare_ties": ({"weight": 1.0, "density": 0.2}, 0.4),
    "iso": ({}, 3.0),
    "svd": ({}, 1.6),
    "wudi": ({}, 1.6),
    "wudi2": ({}, 1.6),
}
CHOSEN_LEARNED: dict[str, tuple[str, Options]] = {
    "adamerging": ("adamerging", {"weight": 0.2, "learning_rate": 0.1, "epochs": 4}),
    "expert_merging, preset: paper": ("expert_merging", {"preset": "paper"}),
    "expert_merging_pp, preset: paper": ("expert_merging_pp", {"preset": "paper"}),
    "expert_merging, task_vectors: whole": ("expert_merging", {"task_vectors": "whole"}),
    "expert_merging_pp, task_vectors: whole": ("expert_merging_pp", {"task_vectors": "whole"}),
    "expert_merging": ("expert_merging", {}),
    "expert_merging_pp": ("expert_merging_pp", {}),
}
SEEDED = ("dare_ties",)
