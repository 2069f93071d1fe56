"""Expert Merging and Expert Merging++ the straightforward way: every model in memory, gradients by autograd.

Written from the method's page alone, in plain torch and float32, and sharing no line with the engine.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoModelForCausalLM

EXCLUDE = [".*vision.*", ".*visual.*", ".*lm_head.*", ".*norm.*", ".*embed_tokens.*", ".*bias.*"]
DEFAULTS = {
    "weight": 0.1, "loss_weight": 1.0, "hidden_layers": "middle", "hidden_weight": 1.0, "temperature": 1.0,
    "regularization": 5.0, "learning_rate": 0.5, "weight_decay": 1e-5, "max_grad_norm": 1.0, "gradient_accumulation": 8,
    "epochs": 1, "samples_per_model": 5, "budget": 1.1, "kappa": 1.0, "fixed": "prior", "start": "prior",
}  # fmt: skip


@dataclass
class Result:
    stages: list[dict[str, torch.Tensor]]  # of each stage: tensor → [K, chunks]
    importance: dict[str, float]
    chunks: dict[str, int]


def pieces(n: int, m: int) -> list[slice]:
    size = math.ceil(n / max(1, m))
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


class Reference:
    def __init__(self, config: Path) -> None:
        raw = yaml.safe_load(config.read_text())
        self.options = DEFAULTS | raw.get("parameters", {})
        own = [model.get("parameters", {}) for model in raw["models"]]
        self.prior = torch.tensor([o.get("weight", self.options["weight"]) for o in own])
        self.beta = [o.get("loss_weight", self.options["loss_weight"]) for o in own]
        self.model = self._load(config.parent / raw["base_model"])
        experts = [self._load(config.parent / model["model"]) for model in raw["models"]]
        base = dict(self.model.named_parameters())
        self.names = [name for name in base if not any(re.match(p, name) for p in raw.get("exclude", EXCLUDE))]
        self.base = {name: base[name].detach() for name in self.names}
        self.tau = {
            n: torch.stack([dict(e.named_parameters())[n].detach() - self.base[n] for e in experts]) for n in self.names
        }
        blocks = self.model.config.num_hidden_layers
        layers = self.options["hidden_layers"]
        self.layers = [blocks // 2] if layers == "middle" else layers
        self.samples = []
        for model, expert in zip(raw["models"], experts, strict=True):
            lines = (config.parent / model["calibration"]).read_text().splitlines()
            mine = []
            for line in lines[: self.options["samples_per_model"]]:
                ids = torch.tensor([json.loads(line)["input_ids"]])
                with torch.no_grad():
                    output = expert(ids, output_hidden_states=True)
                mine.append((ids, [output.hidden_states[i] for i in self.layers], output.logits))
            self.samples.append(mine)

    @staticmethod
    def _load(folder: Path):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)

    def run(self) -> Result:
        ones = dict.fromkeys(self.names, 1)
        start = dict.fromkeys(self.names, self.prior[:, None])
        first = self.stage(ones, start, start)
        count = {name: self.base[name].numel() for name in self.names}
        score = {
            n: (first[n][:, 0].abs() * self.tau[n].abs().flatten(1).mean(1)).sum().item() * count[n] for n in self.names
        }
        total = sum(score.values())
        importance = {name: value / total for name, value in score.items()}
        powered = {name: value ** self.options["kappa"] for name, value in importance.items()}
        budget = self.options["budget"] * len(self.names)
        chunks = {name: math.floor(budget * powered[name] / sum(powered.values())) for name in self.names}
        spread = lambda table: {n: table[n][:, :1].expand(-1, len(pieces(count[n], chunks[n]))) for n in self.names}  # noqa: E731
        sources = {"prior": spread(start), "stage1": spread(first)}
        second = self.stage(chunks, sources[self.options["start"]], sources[self.options["fixed"]])
        return Result(
            [first, second], importance, {n: len(pieces(count[n], chunks[n])) if chunks[n] else 0 for n in self.names}
        )

    def stage(self, chunks, start, fixed):
        o = self.options
        learned = [name for name in self.names if chunks[name] > 0]
        a = {name: torch.logit(start[name].clone()).requires_grad_() for name in learned}
        optimizer = torch.optim.AdamW(a.values(), lr=o["learning_rate"], weight_decay=o["weight_decay"])
        schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
            optimizer, T_0=50, T_mult=2, eta_min=0.1 * o["learning_rate"]
        )
        longest = max(map(len, self.samples))
        order = [(k, i % len(mine)) for i in range(longest) for k, mine in enumerate(self.samples)] * o["epochs"]
        width = sum(a[name].shape[1] for name in learned)
        prior = torch.sigmoid(torch.logit(self.prior))[:, None]
        for begin in range(0, len(order), o["gradient_accumulation"]):
            window = order[begin : begin + o["gradient_accumulation"]]
            optimizer.zero_grad()
            for k, i in window:
                alpha = {n: torch.sigmoid(a[n]) if n in a else fixed[n] for n in self.names}
                loss = self.loss(alpha, k, i)
                loss = loss + o["regularization"] * sum((alpha[n] - prior).abs().sum() for n in learned) / width
                (loss / len(window)).backward()
            torch.nn.utils.clip_grad_norm_(a.values(), o["max_grad_norm"])
            optimizer.step()
            schedule.step()
        return {n: torch.sigmoid(a[n]).detach() if n in a else fixed[n] for n in self.names}

    def loss(self, alpha, k, i):
        o = self.options
        ids, hidden, logits = self.samples[k][i]
        output = functional_call(self.model, self.compose(alpha), (ids,), {"output_hidden_states": True})
        teacher, student = (functional.log_softmax(z / o["temperature"], -1) for z in (logits, output.logits))
        kl = o["temperature"] ** 2 * (teacher.exp() * (teacher - student)).sum(-1).mean()
        mse = [((output.hidden_states[layer] - h) ** 2).mean() for layer, h in zip(self.layers, hidden, strict=True)]
        return self.beta[k] * (kl + o["hidden_weight"] * (sum(mse) / len(mse) if mse else 0))

    def compose(self, alpha):
        merged = {}
        for name in self.names:
            tau = self.tau[name].flatten(1)
            parts = pieces(tau.shape[1], alpha[name].shape[1])
            delta = torch.cat([alpha[name][:, s] @ tau[:, part] for s, part in enumerate(parts)])
            merged[name] = self.base[name] + delta.view_as(self.base[name])
        return merged
