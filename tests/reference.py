"""A reference implementation of Expert Merging and Expert Merging++: all models in memory, gradients by autograd.

Written in plain torch and float32 from the paper (arXiv 2509.25712), independently of the engine.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

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


# Names in files → names of modules in transformers 5; the first match applies.
RENAMED = [
    (r"language_model\.model\.", "model.language_model."),
    (r"language_model\.lm_head\.", "lm_head."),
    (r"vision_tower\.vision_model\.", "model.vision_tower."),
    (r"(multi_modal_projector|vision_tower|visual|image_newline)", r"model.\1"),
]
FLAT = [(r"visual\.", "model.visual."), (r"model\.", "model.language_model.")]
# A matrix of an expert of a mixture → the fused parameter that contains it, and its position there.
FUSED = {
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0),
    "w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0),
}  # fmt: skip


def module_name(name: str, model_type: str) -> str:
    renamings = {"qwen2_vl": FLAT, "qwen2_5_vl": FLAT, "internvl_chat": []}.get(model_type, RENAMED)
    for pattern, new in renamings:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", new, name)
    return name


def to_module(tensors: dict[str, torch.Tensor], model_type: str) -> dict[str, torch.Tensor]:
    """Convert the tensors of files to those of the module: renamed, with the experts of mixtures fused."""
    found: dict[str, torch.Tensor] = {}
    mixtures: dict[str, dict[int, dict[int, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        expert = re.match(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight$", name)
        if expert is None:
            found[module_name(name, model_type).replace(".block_sparse_moe.", ".mlp.")] = tensor
            continue
        fused, place = FUSED[expert[3]]
        mixture = mixtures.setdefault(f"{expert[1]}.mlp.experts.{fused}", {})
        mixture.setdefault(int(expert[2]), {})[place] = tensor
    for name, mixture in mixtures.items():
        found[name] = torch.stack(
            [torch.cat([parts[p] for p in sorted(parts)]) for _, parts in sorted(mixture.items())]
        )
    return found


class Reference:
    """A merge of a config.

    Args:
        config: The YAML.
        inputs: For each expert and sample, the arguments of a forward pass; None reads token ids from the files.
        places: For each expert and sample, the positions whose losses count; None counts all.
    """

    def __init__(self, config: Path, inputs=None, places=None) -> None:
        raw = yaml.safe_load(config.read_text())
        self.options = DEFAULTS | raw.get("parameters", {})
        own = [model.get("parameters", {}) for model in raw["models"]]
        self.prior = torch.tensor([o.get("weight", self.options["weight"]) for o in own])
        self.beta = [o.get("loss_weight", self.options["loss_weight"]) for o in own]
        folders = [config.parent / name for name in (raw["base_model"], *(model["model"] for model in raw["models"]))]
        self.model, *experts = (self._load(folder) for folder in folders)
        self.type = self.model.config.model_type
        base, *files = (self._files(folder) for folder in folders)
        self.names = [name for name in base if not any(re.match(p, name) for p in raw.get("exclude", EXCLUDE))]
        # Tensors that are not merged are needed too, for fused parameters of which only a part is merged.
        self.base = base
        self.tau = {n: torch.stack([file[n] - base[n] for file in files]) for n in self.names}
        text = getattr(self.model.config, "text_config", None) or getattr(self.model.config, "llm_config", None)
        blocks = (text or self.model.config).num_hidden_layers
        layers = self.options["hidden_layers"]
        self.layers = [blocks // 2] if layers == "middle" else layers
        self.samples = []
        for k, (model, expert) in enumerate(zip(raw["models"], experts, strict=True)):
            given = inputs[k] if inputs else self._token_ids(config.parent / model["calibration"])
            mine = []
            for i, arguments in enumerate(given):
                with torch.no_grad():
                    output = expert(**arguments, output_hidden_states=True)
                which = places[k][i] if places else slice(None)
                mine.append((arguments, [output.hidden_states[i] for i in self.layers], output.logits, which))
            self.samples.append(mine)

    def _token_ids(self, file: Path):
        lines = file.read_text().splitlines()[: self.options["samples_per_model"]]
        return [{"input_ids": torch.tensor([json.loads(line)["input_ids"]])} for line in lines]

    @staticmethod
    def _files(folder: Path) -> dict[str, torch.Tensor]:
        parts = [load_file(file) for file in sorted(folder.glob("model*.safetensors"))]
        return {name: tensor.float() for part in parts for name, tensor in part.items()}

    @staticmethod
    def _load(folder: Path):
        config = json.loads((folder / "config.json").read_text())
        kind = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
        code = "auto_map" in config
        kind = AutoModel if code else kind
        model = kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=code)
        if code:
            words = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
            model.img_context_token_id = words.convert_tokens_to_ids("<IMG_CONTEXT>")
        return model.eval().requires_grad_(False)

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
        arguments, hidden, logits, which = self.samples[k][i]
        output = functional_call(self.model, self.compose(alpha), (), {**arguments, "output_hidden_states": True})
        both = (logits[:, which], output.logits[:, which])
        teacher, student = (functional.log_softmax(z / o["temperature"], -1) for z in both)
        kl = o["temperature"] ** 2 * (teacher.exp() * (teacher - student)).sum(-1).mean()
        pairs = zip(self.layers, hidden, strict=True)
        mse = [((output.hidden_states[layer] - h)[:, which] ** 2).mean() for layer, h in pairs]
        return self.beta[k] * (kl + o["hidden_weight"] * (sum(mse) / len(mse) if mse else 0))

    def compose(self, alpha):
        merged = dict(self.base)
        for name in self.names:
            tau = self.tau[name].flatten(1)
            parts = pieces(tau.shape[1], alpha[name].shape[1])
            delta = torch.cat([alpha[name][:, s] @ tau[:, part] for s, part in enumerate(parts)])
            merged[name] = self.base[name] + delta.view_as(self.base[name])
        return to_module(merged, self.type)
