"""A calibration without Ray: the calls of its actors, one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
import yaml
from conftest import plan_of
from torch import Tensor

from engine.calibration.samples import Sample
from engine.correction.files import LayerGroup, end_part, load_calibrated, merged_file
from engine.correction.rules import Rule
from engine.correction.streams import Streams, given_of, solve_group
from engine.learning.frozen_expert import FrozenExpert
from engine.planning.plan import Plan
from engine.storage.folder import Folder

CPU = torch.device("cpu")
Batches = Sequence[Sequence[Mapping[str, Tensor]]]


def make_models(folder: Path, base: Any, experts: int, scale: float = 0.1) -> Plan:
    """Save a base, and experts that differ in every weight but embedding and head; return the plan of a merge."""
    kept = {id(part.weight) for part in (base.get_input_embeddings(), base.get_output_embeddings())}
    base.save_pretrained(folder / "base")
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    models = []
    for k in range(experts):
        torch.manual_seed(k + 1)
        with torch.no_grad():
            for parameter in base.parameters():
                if id(parameter) not in kept:
                    parameter.add_(torch.randn_like(parameter) * scale)
        base.save_pretrained(folder / f"expert{k}")
        base.load_state_dict(start)
        models.append({"model": f"expert{k}", "parameters": {"weight": 1 / experts}})
    config = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    (folder / "merge.yaml").write_text(yaml.safe_dump(config))
    return plan_of(folder / "merge.yaml")


def samples_of(plan: Plan, lengths: Sequence[int], vocabulary: int) -> list[list[Sample]]:
    torch.manual_seed(7)
    return [
        [
            Sample(k, index, tuple(torch.randint(3, vocabulary, (length,)).tolist()), f"{k}:{index}")
            for index, length in enumerate(lengths)
        ]
        for k in range(len(plan.experts))
    ]


def store_mean(plan: Plan, state: Folder, models: Sequence[str] = ()) -> None:
    """Store the mean of models, by default of the experts, as the merged model."""
    folders = models or [expert.model for expert in plan.experts]
    for name in plan.base_header.tensors:
        tensors = [safetensors.torch.load_file(Path(folder) / "model.safetensors")[name] for folder in folders]
        mean = torch.stack([tensor.double() for tensor in tensors]).mean(0).float()
        state.write(merged_file(name), safetensors.torch.save({name: mean}))


class Actors:
    """Expert actors that take the calls in turns; each holds the streams of one expert at a time."""

    def __init__(
        self,
        plan: Plan,
        rule: Rule,
        samples: Sequence[Sequence[Sample]],
        state: Folder,
        count: int = 1,
        inputs: Sequence[Sequence[Mapping[str, Tensor]]] | None = None,
        experts: Sequence[int] | None = None,
    ) -> None:
        self._experts = range(len(plan.experts)) if experts is None else experts
        self._plan, self._rule, self._samples, self._state = plan, rule, samples, state
        self._inputs = inputs or [[{} for _ in of_expert] for of_expert in samples]
        self._held: list[tuple[int, Streams] | None] = [None] * count
        self._calls = 0

    def run(self, parts: Sequence[int]) -> None:
        for number in parts:
            shares = {k: self._streams(k).contribute(number) for k in self._experts}
            groups: dict[LayerGroup, list[int]] = {}
            for k, of_expert in shares.items():
                for group in of_expert.groups:
                    groups.setdefault(group, []).append(k)
            for group, experts in groups.items():
                solve_group(self._plan, self._rule, number, group, experts, self._state)
            end_part(self._state, number, next(iter(shares.values())).parts)

    def _streams(self, k: int) -> Streams:
        seat = self._calls % len(self._held)
        self._calls += 1
        held = self._held[seat]
        if held is None or held[0] != k:
            given = given_of(
                self._samples[k], self._inputs[k], k, self._state, lambda: FrozenExpert(self._plan, k, CPU)
            )
            held = self._held[seat] = k, Streams(self._plan, self._rule, k, given, self._state, CPU)
        return held[1]


def result(plan: Plan, state: Folder) -> dict[str, Tensor]:
    return {name: load_calibrated(state, name) for name in plan.base_header.tensors}


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
