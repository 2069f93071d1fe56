"""The objective of a search: records, a metric of each file, and what is minimised."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.calibration.records import Record, read_file
from engine.checkpoints.adapters import AdapterHeader
from engine.checkpoints.find import ModelName
from engine.config.search.settings import OF_SEVERAL, REDUCTION, Search, Term
from engine.errors import ConfigError
from engine.evaluation.items import DataSet, Item, make_item, names_of, unique
from engine.planning.plan import ExpertPlan, Plan
from engine.storage.cache import fetch
from engine.storage.paths import is_uri, locate

# The metrics of a kind of records, the first of which is the default, and those of which more is better.
OF_KIND = {
    "text": ("perplexity",),
    "response": ("loss", "exact_match", "f1", "perplexity"),
    "choice": ("accuracy_likelihood", "accuracy"),
}
DISTANCES = ("kl", "top1_agreement", "hidden_distance", "hidden_relative")
MORE_IS_BETTER = {"exact_match", "f1", "accuracy", "accuracy_likelihood", "top1_agreement"}
GENERATED = {"exact_match", "f1", "accuracy"}


@dataclass(frozen=True)
class ObjectivePart:
    """A part of the objective: a metric on a data set; `data.expert` is the model with which texts are compared."""

    data: DataSet
    metric: str
    weight: float

    @property
    def name(self) -> str:
        """Its name in the table of trials."""
        return f"{self.data.name}: {self.metric}"

    @property
    def generates(self) -> bool:
        """Whether the model has to generate answers."""
        return self.metric in GENERATED

    def cost(self, value: float) -> float:
        """Return what is minimised."""
        return -self.weight * value if self.metric in MORE_IS_BETTER else self.weight * value


@dataclass(frozen=True)
class Objective:
    """The parts of the objective; `rungs` shares of their records are scored one after the other.

    `several`: each part is an objective of its own. If not, the objective is their weighted mean.
    """

    parts: tuple[ObjectivePart, ...]
    rungs: int
    several: bool

    @property
    def count(self) -> int:
        """The number of objectives."""
        return len(self.parts) if self.several else 1

    def records(self, part: ObjectivePart, rung: int) -> int:
        """Return the number of records of a part that are scored up to a rung, from 0; at least 1."""
        share = int(REDUCTION ** (self.rungs - 1 - rung))
        return max(1, math.ceil(len(part.data.items) / share))

    def total(self, trials: int, ends: bool) -> int:
        """Return the number of records that trials score: all, or what is left if a third goes on after a rung."""
        per_rung = [sum(self.records(part, rung) for part in self.parts) for rung in range(self.rungs)]
        if not ends:
            return trials * per_rung[-1]
        more = zip(per_rung, [0, *per_rung[:-1]], strict=True)
        return sum((now - before) * -(-trials // REDUCTION**rung) for rung, (now, before) in enumerate(more))

    def scores(self, metrics: Mapping[str, float]) -> list[float]:
        """Return what is minimised, from the metrics of all parts by name."""
        costs = [part.cost(metrics[part.name]) for part in self.parts]
        return costs if self.several else [sum(costs) / sum(part.weight for part in self.parts)]


def read_objective(search: Search, plan: Plan, config: Path) -> Objective:
    """Read the records of the objective. Paths are relative to the folder of the config.

    Raises:
        ConfigError: An expert is unknown or has no data, or a metric is none of the records.
        CalibrationError: A file cannot be read, or a record is invalid.
    """
    at = f"{config}: search.objective"
    experts = {expert.name: expert for expert in plan.experts}
    found: list[tuple[str, list[Record], Term]] = []
    if search.objective == "kl":
        for given, expert in zip(plan.config.models, plan.experts, strict=True):
            files = [file.path for file in given.calibration]
            if not files:
                raise ConfigError(
                    f"expert {expert.name!r} has no `calibration`, on which the merged model is compared with it",
                    at,
                    "`calibration: FILE` with records of its domain, or an `objective` with `data`",
                )
            records = [record for file in files for record in read_file(_located(file, config.parent))]
            found.append((expert.name, records, Term(data=files[0], expert=expert.name)))
    else:
        for name, term in zip(names_of([term.data for term in search.objective]), search.objective, strict=True):
            if term.expert is not None and term.expert not in experts:
                raise ConfigError(f"there is no expert {term.expert!r}", at, f"one of {', '.join(experts)}")
            found.append((name, read_file(_located(term.data, config.parent)), term))
    if search.rungs > 1:
        # A rung has the first records, which should be like the others.
        for _, records, _ in found:
            random.Random(plan.config.seed).shuffle(records)
    parts = []
    for name, (_, records, term) in zip(unique([name for name, *_ in found]), found, strict=True):
        metric = _metric(term, records, at)
        distance = metric in DISTANCES
        items = tuple(Item((record,)) if distance else make_item(record) for record in records[: search.records])
        expert_name = model_name(experts[term.expert], plan) if distance and term.expert else None
        parts.append(ObjectivePart(DataSet(name, items, expert_name), metric, term.weight))
    return Objective(tuple(parts), search.rungs, search.algorithm in OF_SEVERAL)


def _metric(term: Term, records: Sequence[Record], at: str) -> str:
    kind = make_item(records[0]).kind
    known = (*OF_KIND[kind], *(DISTANCES if term.expert else ()))
    metric = term.metric or ("kl" if term.expert else known[0])
    if metric not in known:
        do = "name the `expert` with which the model is compared" if metric in DISTANCES else ""
        raise ConfigError(f"{metric!r} is no metric of {term.data}", at, f"one of {', '.join(known)}", do)
    other = next((record for record in records if make_item(record).kind != kind), None)
    if other is not None and metric not in DISTANCES:
        raise ConfigError(f"the file has records of several kinds: {other.where}", at, f"{kind} records alone")
    return metric


def model_name(expert: ExpertPlan, plan: Plan) -> ModelName:
    """Return an expert by names that are valid on every node."""
    if isinstance(expert.header, AdapterHeader):
        return ModelName(plan.base.model, expert.model)
    return ModelName(expert.model, expert.adapter.model if expert.adapter is not None else None)


def part_of(part: ObjectivePart, start: int, stop: int) -> DataSet:
    """Return the records of a part from `start` to `stop`."""
    return replace(part.data, items=part.data.items[start:stop])


def _located(file: str, folder: Path) -> Path:
    return fetch(file) if is_uri(file) else locate(file, folder, ConfigError)
