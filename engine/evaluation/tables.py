"""Scores as tables, one per metric: models down, data sets across, their mean, and per cent of the experts' scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import rich.box
import rich.console
import rich.table

from engine.evaluation.results import Row

_Get = Callable[[str], str]

# Metrics of which more is better, and 0 the least, so that a share of another score means something; those of
# lm-evaluation-harness included. A filter of the harness follows a comma.
SCORES = {
    *("exact_match", "f1", "accuracy", "accuracy_likelihood"),
    *("acc", "acc_norm", "acc_mutual_info", "em", "bleu", "pass@1", "rouge1", "rouge2", "rougeL"),
}


@dataclass(frozen=True)
class MetricTable:
    """The values of one metric.

    Attributes:
        metric: The metric.
        models: The models, in the order of the rows.
        data: The data sets, in the order of the columns.
        rows: The rows, by model and data set.
        experts: The models to which data sets belong, by data set.
    """

    metric: str
    models: tuple[str, ...]
    data: tuple[str, ...]
    rows: Mapping[tuple[str, str], Row]
    experts: Mapping[str, str]

    def value(self, model: str, data: str) -> float | None:
        """Return a value, or None if the model was not evaluated on the data set."""
        row = self.rows.get((model, data))
        return None if row is None else row.value

    def mean(self, model: str) -> float | None:
        """Return the mean over several data sets; None if the model lacks one of them, or for standard errors."""
        values = [self.rows[model, one].value for one in self.data if (model, one) in self.rows]
        if len(values) < max(2, len(self.data)) or "_stderr" in self.metric:
            return None
        return sum(values) / len(values)

    def of_experts(self, model: str) -> float | None:
        """Return the mean, over the data sets that have an expert, of the model's score in per cent of the expert's.

        None without such data sets, if the model lacks one of them, or if less of the metric is better. A data set on
        which its expert scores 0 does not count.
        """
        if self.metric.partition(",")[0] not in SCORES:
            return None
        pairs = [(self.value(model, one), self.value(expert, one)) for one, expert in self.experts.items()]
        shares = [(own, best) for own, best in pairs if best]
        if not shares or any(own is None for own, _ in shares):
            return None
        return 100 * sum((own or 0.0) / best for own, best in shares) / len(shares)

    def head(self) -> list[str]:
        """Return the headings of the columns: the metric, the data sets with their experts, their mean and share."""
        sets = [f"{one}\n(expert: {self.experts[one]})" if one in self.experts else one for one in self.data]
        return [self.metric, *sets, *self._more()]

    def lines(self) -> Iterator[list[str]]:
        """Yield the lines of the table as texts."""
        more = self._more()
        for model in self.models:
            yield [model, *(_text(self.value(model, one)) for one in self.data), *(get(model) for get in more.values())]

    def _more(self) -> dict[str, _Get]:
        """Return the columns that follow the data sets, without those that are empty."""
        columns: dict[str, _Get] = {
            "mean": lambda model: _text(self.mean(model)),
            "of the experts": lambda model: _text(self.of_experts(model), ".1f", "%"),
        }
        return {name: get for name, get in columns.items() if any(map(get, self.models))}


def tables_of(rows: Sequence[Row]) -> list[MetricTable]:
    """Return a table per metric, in the order of the rows."""
    tables = []
    for metric in dict.fromkeys(row.metric for row in rows):
        mine = [row for row in rows if row.metric == metric]
        models, data = (tuple(dict.fromkeys(names)) for names in zip(*((r.model, r.data) for r in mine), strict=True))
        experts = {row.data: row.expert for row in mine if row.expert is not None}
        tables.append(MetricTable(metric, models, data, {(row.model, row.data): row for row in mine}, experts))
    return tables


def _text(value: float | None, form: str = ".4g", unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def print_results(rows: Sequence[Row]) -> None:
    """Print a table per metric."""
    console = rich.console.Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    for one in tables_of(rows):
        table = rich.table.Table(box=rich.box.SIMPLE)
        for place, name in enumerate(one.head()):
            table.add_column(name, justify="right" if place else "left", overflow="fold")
        for line in one.lines():
            table.add_row(*line)
        console.print(table)
