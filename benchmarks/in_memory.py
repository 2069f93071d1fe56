"""The straightforward implementation to compare with: all models in memory, coefficients by autograd through the merge.

Base, experts and all task vectors are held in memory. For every sample of every step, the expert runs forward as a
teacher, θ = θ₀ + Σₖ αₖ·τₖ is composed under autograd, and the backward pass reaches the coefficients. Only the memory
gauge is the engine's code. As a script on a merge.yaml (full checkpoints, `input_ids`), it prints one JSON object: the
peaks of its anonymous memory while it loads and while it steps, sampled every 20 ms, and the seconds of each step.

On a CPU, transformers memory-maps the files: an expert's weights are then no anonymous memory, although every forward
pass needs them resident. `--teachers resident`, the default, copies them into memory, as any other device would hold
them; `mapped` leaves them in the page cache.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
import transformers
import yaml
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoModelForCausalLM

from actors.memory import PeakMemory, anonymous_bytes

transformers.utils.logging.disable_progress_bar()

EXCLUDE = [".*vision.*", ".*visual.*", ".*lm_head.*", ".*norm.*", ".*embed_tokens.*", ".*bias.*"]
# The defaults of Expert Merging as published.
DEFAULTS: dict[str, Any] = {
    "weight": 0.1,
    "loss_weight": 1.0,
    "samples_per_model": 5,
    "hidden_layers": "middle",
    "hidden_weight": 1.0,
    "temperature": 1.0,
    "regularization": 5.0,
    "learning_rate": 0.5,
    "weight_decay": 1e-5,
    "max_grad_norm": 1.0,
    "gradient_accumulation": 8,
}


class InMemory:
    """Stage 1 of a merge.yaml; `windows` holds the samples of each optimiser step as (expert, index)."""

    def __init__(self, config: Path, resident: bool = True) -> None:
        raw = yaml.safe_load(config.read_text())
        self.options = DEFAULTS | raw.get("parameters", {})
        self.model = _load(config.parent / raw["base_model"], resident)
        self.experts = [_load(config.parent / entry["model"], resident) for entry in raw["models"]]
        base = dict(self.model.named_parameters())
        self.names = [name for name in base if not any(re.match(one, name) for one in raw.get("exclude", EXCLUDE))]
        self.base = {name: base[name].detach() for name in self.names}
        self.tau = []
        for expert in self.experts:
            weights = dict(expert.named_parameters())
            self.tau.append({name: weights[name].detach() - self.base[name] for name in self.names})
        own = [self.options | entry.get("parameters", {}) for entry in raw["models"]]
        self.prior = torch.tensor([options["weight"] for options in own])
        self.beta = [options["loss_weight"] for options in own]
        layers = self.options["hidden_layers"]
        self.layers = [self.model.config.num_hidden_layers // 2] if layers == "middle" else layers
        self.samples = []
        for entry, options in zip(raw["models"], own, strict=True):
            records = (config.parent / entry["calibration"]).read_text().splitlines()[: options["samples_per_model"]]
            self.samples.append([torch.tensor([json.loads(record)["input_ids"]]) for record in records])
        longest, size = max(map(len, self.samples)), self.options["gradient_accumulation"]
        order = [(k, i % len(mine)) for i in range(longest) for k, mine in enumerate(self.samples)]
        self.windows = [order[start : start + size] for start in range(0, len(order), size)]
        self.a = {name: torch.logit(self.prior).requires_grad_() for name in self.names}
        rate = self.options["learning_rate"]
        self.optimizer = torch.optim.AdamW(self.a.values(), lr=rate, weight_decay=self.options["weight_decay"])
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
            self.optimizer, T_0=50, T_mult=2, eta_min=0.1 * rate
        )

    def step(self, window: list[tuple[int, int]]) -> float:
        """Run one optimiser step and return the mean loss of its samples before the update."""
        self.optimizer.zero_grad()
        total = 0.0
        for expert, index in window:
            loss = self._loss(expert, self.samples[expert][index]) / len(window)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.a.values(), self.options["max_grad_norm"])
        self.optimizer.step()
        self.schedule.step()
        return total

    def _loss(self, expert: int, ids: Tensor) -> Tensor:
        """Return β · (L_logit + λ_hid · L_hid) + γ · R(α) of one sample."""
        wanted = {"output_hidden_states": True, "use_cache": False}
        with torch.no_grad():
            target = self.experts[expert](ids, **wanted)
        alpha = {name: torch.sigmoid(a) for name, a in self.a.items()}
        output = functional_call(self.model, self._compose(alpha), (ids,), wanted)
        temperature = self.options["temperature"]
        teacher, student = (functional.log_softmax(out.logits[0].float() / temperature, -1) for out in (target, output))
        kl = temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        hidden = [
            functional.mse_loss(output.hidden_states[i].float(), target.hidden_states[i].float()) for i in self.layers
        ]
        alignment = kl + self.options["hidden_weight"] * (sum(hidden) / len(hidden) if hidden else 0)
        pull = sum((one - self.prior).abs().sum() for one in alpha.values()) / len(alpha)
        return self.beta[expert] * alignment + self.options["regularization"] * pull

    def _compose(self, alpha: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: self.base[name] + sum(alpha[name][k] * tau[name] for k, tau in enumerate(self.tau))
            for name in self.names
        }


def _load(folder: Path, resident: bool) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().requires_grad_(False)
    if resident:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model


@click.command(help=__doc__)
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--steps", default=2, show_default=True, type=click.IntRange(min=1), help="Largest number of optimiser steps."
)
@click.option("--teachers", default="resident", show_default=True, type=click.Choice(["resident", "mapped"]))
def main(config: Path, steps: int, teachers: str) -> None:
    if hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # as the trainer does
    imported = anonymous_bytes()
    gauge = PeakMemory()
    way = InMemory(config.absolute(), teachers == "resident")
    loading = gauge.peak
    gauge.close()
    gauge = PeakMemory()
    losses, seconds = [], []
    for window in way.windows[:steps]:
        began = time.monotonic()
        losses.append(way.step(window))
        seconds.append(time.monotonic() - began)
    stepping = gauge.peak
    gauge.close()
    figures = {
        "imported_bytes": imported,
        "peak_loading_bytes": loading,
        "peak_stepping_bytes": stepping,
        "peak_anonymous_bytes": max(loading, stepping),
        "step_seconds": seconds,
        "losses": losses,
    }
    json.dump(figures, sys.stdout)


if __name__ == "__main__":
    main()
