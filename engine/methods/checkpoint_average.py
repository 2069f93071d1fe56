"""Checkpoint average: the checkpoints of one training run, averaged with the weights of a schedule.

Sources: Tian et al., WSM, arXiv 2507.17634 (weights that stand for a decay of the learning rate); Li et al., Model
Merging in Pre-training of Large Language Models, arXiv 2505.12082 (the plain mean of the last checkpoints);
Yu and Choi, Metrics-Weighted Averaging, arXiv 2504.18580 (weights by loss or step with one exponent; its formula was
known from its abstract alone, so that `metric` is after its idea, and may differ from it in form).
Formula: θ = Σᵢ wᵢ·θᵢ over the last n = `window` models in the order of the config, oldest first, Σᵢ wᵢ = 1.
With a decay curve d that falls from d(0) = 1 to d(1) = 0, wᵢ = d((i − 1)/n) − d(i/n), i = 1 … n: what was learned
between two checkpoints then counts as much as if the learning rate had decayed along d; Megatron-LM's tool for WSM has
the same weights. `linear` (d = 1 − x) gives equal weights, as `uniform` does; `cosine`: d = (1 + cos πx)/2;
`minus_sqrt`: d = 1 − √x. `metric`: wᵢ ∝ sᵢ^power with sᵢ = 1/loss (`by: loss`) or the step (`by: step`).
Options: `schedule` (uniform), `window` (0, which means all models), `by` (loss), `power` (1.0); per model `metric`, its
loss or its step; a step that is not given is the last number in the model's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.methods.options import Method, Option, Settings

if TYPE_CHECKING:
    from engine.methods.arithmetic.tensor import MergeTensor
    from engine.task_vectors.pipeline import Fill

_DECAYS: dict[str, Callable[[float], float]] = {
    "uniform": lambda x: 1 - x,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
}
SCHEDULE = Option("schedule", "uniform", "the weights of the checkpoints", kind=str, choices=(*_DECAYS, "metric"))
WINDOW = Option("window", 0, "number of checkpoints that count, the last ones; 0 means all", kind=int, low=0)
BY = Option("by", "loss", "what `metric` is, for `schedule: metric`", kind=str, choices=("loss", "step"))
POWER = Option("power", 1.0, "exponent of the metric, for `schedule: metric`", low=0, high=100)
METRIC = Option("metric", 0.0, "the checkpoint's loss or step, for `schedule: metric`", "expert", low=0)


def weights(models: Sequence[str], values: Settings, own: Sequence[Settings], where: str = "") -> list[float]:
    """Return wᵢ of each checkpoint, zero for those outside of the window.

    Args:
        models: Names of the checkpoints, oldest first.
        values: The options of the merge.
        own: The options of each checkpoint.
        where: What an error names.

    Raises:
        ConfigError: With `schedule: metric`, a checkpoint has no loss above zero, or no step.
    """
    count = min(int(values["window"]) or len(models), len(models))
    before = len(models) - count
    if values["schedule"] != "metric":
        decay = _DECAYS[str(values["schedule"])]
        shares = [decay(i / count) - decay((i + 1) / count) for i in range(count)]
    else:
        scores = [_score(model, values, mine, where) for model, mine in zip(models[before:], own[before:], strict=True)]
        # Divided by the largest, so that no power overflows.
        powers = [(score / max(scores)) ** float(values["power"]) for score in scores]
        shares = [power / math.fsum(powers) for power in powers]
    return [0.0] * before + shares


def _score(model: str, values: Settings, own: Settings, where: str) -> float:
    metric = float(own["metric"])
    numbers = re.findall(r"\d+", model)
    if values["by"] == "step" and not metric and numbers:
        metric = float(numbers[-1])
    if metric <= 0:
        raise ConfigError(
            f"the checkpoint {model!r} has no {values['by']} above zero, by which `schedule: metric` weights it",
            where,
            do="set `metric` in the `parameters` of each model, or choose another `schedule`",
        )
    return 1 / metric if values["by"] == "loss" else metric


METHOD = Method(
    "checkpoint_average",
    "the checkpoints of one training run, averaged with the weights of a schedule (WSM, PMA, after MWA)",
    "Tian et al., WSM, arXiv 2507.17634; Li et al., arXiv 2505.12082; Yu and Choi, arXiv 2504.18580",
    "θ = Σᵢ wᵢ·θᵢ, wᵢ = d((i − 1)/n) − d(i/n)",
    (SCHEDULE, WINDOW, BY, POWER, METRIC),
    base="optional",
    check=lambda tensor, models, values, own, base: weights(models, values, own, tensor),
)


def prepare(tensor: MergeTensor) -> Fill:
    """Return the tensor's `Fill`: one pass over every checkpoint. For errors see `weights`."""
    return tensor.sum_of_models(0.0, weights(tensor.models, tensor.values, tensor.own, tensor.name))
