"""The `search` section of a config: what `python cli.py search` varies, and how it scores a merge."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from engine.fields import Float, Int, Section

Algorithm = Literal["tpe", "cmaes", "nsga2", "nsga3", "random"]
# Those that find the trade-offs between several objectives; the others minimise one.
OF_SEVERAL = ("nsga2", "nsga3")
# A rung has this many times the records of the one before, as in the paper of ASHA (arXiv 1810.05934).
REDUCTION = 3
Text = Annotated[str, Field(min_length=1)]
Value = bool | int | float | str


class Term(Section):
    """A part of the objective.

    Attributes:
        data: A file with records: a path or a URI.
        metric: The metric, of those that `evaluate` prints. None: `kl` with an expert; without, `loss` of responses,
            `accuracy_likelihood` of choices and `perplexity` of texts.
        expert: The name of the expert with which the merged model is compared.
        weight: Its weight in the sum of all parts, in which a metric of which more is better is negative.
    """

    data: Text
    metric: Text | None = None
    expert: Text | None = None
    weight: Annotated[Float, Field(gt=0, le=1e6)] = 1.0


class Search(Section):
    """The search for the values of keys of the config with which the merge scores best.

    Attributes:
        space: The keys that are varied, as `--set` names them, and the values or the range of each. A * stands for each
            entry of a list, or each key of a mapping.
        objective: `kl`, the mean KL divergence of the merged model to each expert on the expert's `calibration` files;
            or a list of parts.
        trials: The number of merges that are scored.
        algorithm: What proposes the values.
        rungs: The number of times that a trial is scored, on three times as many records each time. All but the best
            third of the trials end before the last one (ASHA). 1: all trials are scored on all records.
        records: The maximum number of records of a file that are scored.
        parallel: The trials at a time. auto: one per GPU, or one per node without GPUs.
        batch_size: Records per forward pass.
        max_new_tokens: Maximum tokens of an answer, for metrics of generated answers.
    """

    space: dict[str, Any]
    objective: Literal["kl"] | tuple[Term, ...] = "kl"
    trials: Annotated[Int, Field(ge=1, le=100_000)]
    algorithm: Algorithm = "tpe"
    rungs: Annotated[Int, Field(ge=1, le=8)] = 1
    records: Annotated[Int, Field(ge=1, le=1_000_000)] | None = None
    parallel: Annotated[Int, Field(ge=1, le=1000)] | Literal["auto"] = "auto"
    batch_size: Annotated[Int, Field(ge=1, le=100_000)] = 16
    max_new_tokens: Annotated[Int, Field(ge=1, le=1_000_000)] = 64
