"""Models, plans and targets for the checks, and optimiser steps on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import transformers
import yaml
from models import NOT_MERGED, Size
from safetensors.torch import save_file

from engine.calibration.samples import Sample
from engine.config.reader import load_config
from engine.learning.frozen_expert import FrozenExpert
from engine.learning.learner import Learner, first_stage
from engine.learning.student import Student
from engine.learning.targets import Target
from engine.planning.open_models import open_task_vectors
from engine.planning.plan import Plan
from engine.planning.planner import make_plan
from engine.shards.local_shards import LocalShards
from engine.shards.orthogonal import orthogonalise
from engine.shards.protocol import Shards
from engine.storage.local_folder import LocalFolder

CPU = torch.device("cpu")
# Deviations of weights and of experts from the base.
SCALE, NOISE = 0.02, 3e-4


def write_merge(
    folder: Path, size: Size, experts: int, dtype: torch.dtype, device: torch.device, noise: float = NOISE
) -> Path:
    """Write a random Llama, experts of it and a merge.yaml, unless they are there; return the yaml's path.

    Values are of no matter here, so that the device makes them: a GPU takes seconds where a CPU takes minutes.
    """
    if (folder / "merge.yaml").exists():
        return folder / "merge.yaml"
    config = transformers.LlamaConfig(
        **asdict(size), num_key_value_heads=size.num_attention_heads, max_position_embeddings=4096, pad_token_id=0
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], dtype
    with torch.device("meta"):
        tensors = transformers.LlamaForCausalLM(config).state_dict()
    if size.tie_word_embeddings:
        del tensors["lm_head.weight"]
    generator = torch.Generator(device).manual_seed(0)

    def random(shape: torch.Size, scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32) * scale

    base = {
        name: torch.ones(meta.shape, dtype=dtype) if "norm" in name else random(meta.shape, SCALE).to(CPU, dtype)
        for name, meta in tensors.items()
    }
    entries = []
    for k in (None, *range(experts)):
        mine = base if k is None else {
            name: tensor if any(part in name for part in NOT_MERGED)
            else (tensor.to(device) + random(tensor.shape, noise)).to(CPU, dtype)
            for name, tensor in base.items()
        }  # fmt: skip
        model = folder / ("base" if k is None else f"expert{k}")
        model.mkdir(parents=True)
        save_file(mine, model / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(model)
        if k is not None:
            (folder / f"expert{k}.jsonl").write_text('{"input_ids": [5, 6, 7]}\n')
            entries.append({"model": f"expert{k}", "calibration": f"expert{k}.jsonl"})
    keys = {"merge_method": "expert_merging", "base_model": "base", "models": entries}
    (folder / "merge.yaml").write_text(yaml.safe_dump(keys))
    return folder / "merge.yaml"


def plan_of(config: Path, *overrides: str) -> Plan:
    """Return the plan of a merge whose window of samples is one pass."""
    return make_plan(load_config(config, ("parameters.weight=0.3", "batch_tokens=8192", *overrides)), config.parent)


def ids(count: int, vocabulary: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, vocabulary, (count,), generator=generator).tolist())


def targets_of(plan: Plan, lengths: Sequence[int], device: torch.device) -> list[Target]:
    """Return the targets of one sample of each length for every expert, computed on the device."""
    vocabulary, found = plan.base_header.vocab_size or 64, []
    for k in range(len(plan.experts)):
        expert = FrozenExpert(plan, k, device)
        for i, length in enumerate(lengths):
            found.append(expert.target(Sample(k, i, ids(length, vocabulary, 100 * k + i), f"{k}/{i}")))
        del expert
    return found


@dataclass(frozen=True)
class Learned:
    """What some optimiser steps gave: ∂L/∂α of the first step [K, C], coefficients [K, C], losses [steps · samples]."""

    gradient: npt.NDArray[np.float64]
    coefficients: npt.NDArray[np.float64]
    losses: npt.NDArray[np.float64]

    def differs(self, other: Learned) -> bool:
        """Return whether any bit differs."""
        pairs = zip((self.gradient, self.losses), (other.gradient, other.losses), strict=True)
        return not all(np.array_equal(a, b) for a, b in pairs) or bool((self.coefficients != other.coefficients).any())


class Steps:
    """Optimiser steps of a plan on a device, as the trainer takes them."""

    def __init__(self, plan: Plan, device: torch.device, shards: Shards) -> None:
        self.plan, self.shards, self.student = plan, shards, Student(plan, device)

    def take(self, window: Sequence[Target], steps: int) -> Learned:
        """Take steps from the prior, all on the same window, whose samples are padded to one pass."""
        stage = first_stage(self.plan)
        learner, gradients, losses = Learner(self.plan.config.parameters, stage), [], []
        samples = [(target, 1 / len(window)) for target in window]
        for _ in range(steps):
            self.student.expect(self.shards.merge(learner.coefficients, self.student))
            leaving = self.shards.gradients(stage.layout)
            found = self.student.accumulate(samples, leaving)
            losses += [value for loss in found for value in (loss.kl, loss.hidden)]
            gradients.append(leaving.collect())
            learner.step(gradients[-1])
        return Learned(gradients[0], learner.coefficients.values, np.array(losses))


def dense(plan: Plan, threads: int, overlap: bool) -> LocalShards:
    """Return shards of whole task vectors in this process."""
    return LocalShards(plan, threads, overlap)


def store_factors(plan: Plan, folder: Path, device: torch.device, threads: int) -> tuple[LocalFolder, list[str]]:
    """Decompose all matrices on the device and store their factors; return the state, and what LAPACK had to do."""
    state = LocalFolder(folder)
    streams = open_task_vectors(plan, threads)
    return state, orthogonalise(plan, streams, state, plan.orthogonal, plan.orthogonal, device)


def relative(found: object, exact: object) -> float:
    """Return the distance of two arrays over the norm of the second."""
    a, b = (np.asarray(one, dtype=np.float64) for one in (found, exact))
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))
