"""The options searched for every method on the validation split, written as in a config, and the chosen ones.

Weight-space methods are merged once per combination of their other options, with `lambda` 1. The merged task vector is
then scaled, because the option `lambda` means θ₀ + λ·τ. Task Arithmetic's λ is its weight.
"""

from __future__ import annotations

from typing import Any

Options = dict[str, Any]

# Weight-space methods that run the experts on samples, which are drawn by seed.
SAMPLED = ("lot", "regmean", "regmean_plus_plus", "closed_form", "fisher", "lewis")

WEIGHT_SPACE: dict[str, list[Options]] = {
    "weight_average": [{}],
    "task_arithmetic": [{"weight": 1.0}],
    "ties": [{"weight": 1.0, "density": density} for density in (0.2, 0.5)],
    "dare_ties": [{"weight": 1.0, "density": density} for density in (0.2, 0.5)],
    "iso": [{}],
    "svd": [{}],
    "wudi": [{}],
    "wudi2": [{}],
    "swudi": [{"time": time, "rank": rank} for time, rank in ((300.0, 0.85), (1300.0, 0.65))],
    "swudi_a": [{"cut": cut} for cut in ("participation", "gavish_donoho")],
    "widen": [{"ratio": ratio} for ratio in (1.0, 1.5)],
    "pcb": [{"ratio": ratio, "lambda": 1.0} for ratio in (0.05, 0.1, 0.2)],
    "doge": [{}],
    "lot": [{}],
    "regmean": [{"alpha": alpha} for alpha in (0.5, 0.9, 1.0)],
    "closed_form": [{}],
    "fisher": [{}],
    "lewis": [{"weight": 1.0}],
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
SCALED |= dict.fromkeys(("wudi", "wudi2", "swudi", "swudi_a", "widen"), (0.3, 0.5, 0.7, 1.0, 1.3, 1.6, 2.0))
# `eta` scales the whole sum of doge; its default is that of models for images.
SCALED |= {"pcb": MEANS, "doge": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)}
SCALED |= dict.fromkeys(("lot", "regmean", "closed_form", "fisher", "lewis"), (0.7, 1.0, 1.3, 1.6, 2.0))
# Whole settings, without a scale afterwards: of methods that learn, and of those that are solved block by block.
FEATCAL = {"calibrate": ["featcal"]}
LEARNED: dict[str, list[Options]] = {
    "adamerging": [
        {"weight": weight, "learning_rate": rate, "epochs": epochs}
        for weight in (0.2, 0.4)
        for rate, epochs in ((0.5, 1), (0.1, 4))
    ],
    "regmean_plus_plus": [{"alpha": alpha} for alpha in (0.1, 0.9)],
    "task_arithmetic": [{"weight": weight, **FEATCAL} for weight in (0.3, 0.4)],
    "svd": [{"lambda": scale, **FEATCAL} for scale in (1.0, 1.6)],
}

# Chosen on the validation split: options and λ of weight-space methods; method and options of learned ones by name. The
# options of Expert Merging are the defaults, which were found with `choose.py --try`.
CHOSEN: dict[str, tuple[Options, float]] = {
    "weight_average": ({}, 1.0),
    "task_arithmetic": ({"weight": 1.0}, 0.4),
    "ties": ({"weight": 1.0, "density": 0.2}, 1.0),
    "dare_ties": ({"weight": 1.0, "density": 0.2}, 0.4),
    "iso": ({}, 3.0),
    "svd": ({}, 1.0),
    "wudi": ({}, 1.6),
    "wudi2": ({}, 1.6),
    "swudi": ({"time": 300.0, "rank": 0.85}, 1.0),
    "swudi_a": ({"cut": "participation"}, 1.0),
    "pcb": ({"ratio": 0.1, "lambda": 1.0}, 1.0),
    "regmean": ({"alpha": 0.9}, 1.3),
    "lot": ({}, 1.3),
    "closed_form": ({}, 1.3),
    "fisher": ({}, 2.0),
    "widen": ({"ratio": 1.5}, 0.7),
    "doge": ({}, 2.0),
}
CHOSEN_LEARNED: dict[str, tuple[str, Options]] = {
    "adamerging": ("adamerging", {"weight": 0.2, "learning_rate": 0.1, "epochs": 4}),
    "expert_merging, preset: paper": ("expert_merging", {"preset": "paper"}),
    "expert_merging_pp, preset: paper": ("expert_merging_pp", {"preset": "paper"}),
    "expert_merging, task_vectors: whole": ("expert_merging", {"task_vectors": "whole"}),
    "expert_merging_pp, task_vectors: whole": ("expert_merging_pp", {"task_vectors": "whole"}),
    "expert_merging, task_vectors: orthogonal": ("expert_merging", {"task_vectors": "orthogonal"}),
    "expert_merging_pp, task_vectors: orthogonal": ("expert_merging_pp", {"task_vectors": "orthogonal"}),
    "expert_merging": ("expert_merging", {}),
    "expert_merging_pp": ("expert_merging_pp", {}),
    "expert_merging, weight: closed_form": ("expert_merging", {"weight": "closed_form"}),
    "expert_merging_pp, weight: closed_form": ("expert_merging_pp", {"weight": "closed_form"}),
    "expert_merging, featcal": ("expert_merging", FEATCAL),
    "expert_merging_pp, featcal": ("expert_merging_pp", FEATCAL),
}
SEEDED = ("dare_ties", *SAMPLED)
