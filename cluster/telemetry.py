"""What others may look at while a merge runs: gauges on the cluster's metrics ports, and trackers of experiments.

Ray exports the gauges (as `ray_expert_merging_…`); accelerate has the trackers. Knows nothing of the merge but the
names of its phases and the rows of its steps.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from ray.util.metrics import Gauge

from engine.config.schema import Config
from engine.errors import ConfigError, RunError
from engine.storage.paths import as_path, is_uri

PROJECT = "expert-merging"


WRITE_FILES = ("aim", "dvclive", "tensorboard")


# Ray forgets a gauge that was not set within two of its intervals of ten seconds, and a step may take longer.
REPEAT_SECONDS = 5.0


# Of a row of merge/metrics.parquet: what is each sample's own, and what is the whole step's.
OF_SAMPLES = ("kl", "hidden", "entropy")


OF_STEP = {
    "regularization": "regularization",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "seconds": "step_seconds",
}


GAUGES = {
    "step": ("stage", "Optimiser step of a stage that was taken last, from 0."),
    "kl": ("stage", "Logit loss, mean over the samples of the last step."),
    "hidden": ("stage", "Hidden loss, mean over the samples of the last step."),
    "entropy": ("stage", "Entropy of the predictions, mean over the samples of the last step."),
    "regularization": ("stage", "Pull of the coefficients back to the prior, at the last step."),
    "grad_norm": ("stage", "Norm of the coefficients' gradient at the last step, before it is clipped."),
    "learning_rate": ("stage", "Learning rate of the last step."),
    "step_seconds": ("stage", "Seconds of the last step in the trainer."),
    "phase_parts": ("phase", "Parts of a phase."),
    "phase_parts_done": ("phase", "Parts of a phase that are done."),
    "phase_seconds": ("phase", "Seconds that a phase took."),
    "bytes": ("direction", "Bytes moved so far."),
}


def check_trackers(config: Config, out: str) -> None:
    """Fail before anything is started if a tracker is not there, or has nowhere to write.

    Raises:
        ConfigError: a package is not installed, or a folder for logs is missing beside an output that is no folder.
    """
    installed = {str(name) for name in get_available_trackers()}
    if missing := [name for name in config.log_with if name not in installed]:
        raise ConfigError(
            f"not installed: {', '.join(missing)}", "log_with", do=f"pip install {' '.join(missing)}, or leave it out"
        )
    if (
        is_uri(out)
        and config.log_dir is None
        and (writing := [name for name in config.log_with if name in WRITE_FILES])
    ):
        raise ConfigError(
            f"{', '.join(writing)} cannot write beside {out}", "log_with", do="give `log_dir`, a folder that stays"
        )


class Telemetry:
    """One merge as gauges and trackers show it, while the context lasts; Ray must be connected.

    `run` names the merge, and is the same when it is started again: letters, digits, `_` and `-`.

    Raises:
        ConfigError: a tracker does not start.
        RunError: a tracker fails later.
    """

    def __init__(self, run: str, config: Config, out: str) -> None:
        self._run, self._log_with = run, config.log_with
        self._log_dir = as_path(config.log_dir or f"{out}.logs")
        self._trackers: dict[str, Any] = {}
        self._leaving = ExitStack()
        self._gauges = _Gauges(run)
        self._totals: dict[str, int] = {}
        # The number of the last step over all stages, and what is still to be logged with a step.
        self._number, self._waiting = 0, dict[str, float]()

    def __enter__(self) -> Telemetry:
        with ExitStack() as leaving:
            leaving.enter_context(self._gauges)
            for name in dict.fromkeys(self._log_with):
                self._trackers[name] = _started(name, self._run, self._log_dir)
                leaving.callback(self._finish, name)
            self._leaving = leaving.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._leaving:
            self._log(self._number, {})

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Begin a phase of `total` parts, of which `done` were done before; `stage 1` and `stage 2` have steps."""
        self._totals[name] = total
        if (stage := re.fullmatch(r"stage (\d+)", name)) and done:
            self._number = self._over_stages(int(stage[1]), done - 1)
        self._gauges.set("phase_parts", total, name)
        self.advance(name, done)

    def advance(self, name: str, done: int) -> None:
        """`done` parts of the phase are done."""
        self._gauges.set("phase_parts_done", done, name)

    def phase_seconds(self, name: str, seconds: float) -> None:
        """A phase took so long."""
        self._gauges.set("phase_seconds", seconds, name)
        self._waiting[f"seconds/{_key(name)}"] = seconds

    def bytes(self, direction: str, total: int) -> None:
        """So many bytes moved in this direction since the run began."""
        self._gauges.set("bytes", total, direction)
        self._waiting[f"bytes/{_key(direction)}"] = total

    def step(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """An optimiser step was taken, by its rows of merge/metrics.parquet; the phase of its stage has begun."""
        first = rows[0]
        stage, step = first["stage"], first["step"]
        values = {key: fmean(row[key] for row in rows) for key in OF_SAMPLES if first.get(key) is not None}
        values |= {name: first[key] for key, name in OF_STEP.items()}
        for name, value in {"step": step, **values}.items():
            self._gauges.set(name, value, str(stage))
        self._log(self._over_stages(stage, step), values)

    def _over_stages(self, stage: int, step: int) -> int:
        """The number of a step when those of stage 2 are counted on after stage 1's; both have as many."""
        return (stage - 1) * self._totals[f"stage {stage}"] + step

    def _log(self, number: int, values: Mapping[str, float]) -> None:
        """Tell the trackers, with what waited for a step: some refuse a number that is not above their last."""
        self._number, told, self._waiting = number, {**values, **self._waiting}, {}
        if told:
            for name, tracker in self._trackers.items():
                with _told(name, RunError, "start it again, perhaps without the tracker: it goes on from here"):
                    tracker.log(told, step=number)

    def _finish(self, name: str) -> None:
        with _told(name, RunError, "what was logged last may be missing there"):
            self._trackers.pop(name).finish()


class _Gauges:
    """The gauges of one run, set again and again while the context lasts, with their last values."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges = {
            name: Gauge(f"expert_merging_{name}", about, ("run", tag)) for name, (tag, about) in GAUGES.items()
        }
        self._values: dict[tuple[str, str], float] = {}
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()

    def set(self, name: str, value: float, tag: str) -> None:
        """The gauge's value for one stage, phase or direction."""
        self._values[name, tag] = value
        self._gauges[name].set(value, {"run": self._run, GAUGES[name][0]: tag})

    def _repeat(self) -> None:
        while not self._left.wait(REPEAT_SECONDS):
            for (name, tag), value in tuple(self._values.items()):
                self._gauges[name].set(value, {"run": self._run, GAUGES[name][0]: tag})


def _started(name: str, run: str, log_dir: Path) -> Any:
    """A tracker that goes on with what it has of this run, where it can."""
    PartialState()  # accelerate's trackers ask it whether they are in the main process, and this is the only one
    with _told(name, ConfigError, "see what it says, or leave it out"):
        where, options = _place(name, run, log_dir)
        tracker = LOGGER_TYPE_TO_CLASS[name](where, **options)
        tracker.start()
    return tracker


def _place(name: str, run: str, log_dir: Path) -> tuple[str, dict[str, Any]]:
    """What a tracker is told first, its project or the run, and what more lets it find the run again.

    aim, clearml and comet_ml do not: started again, they have another run of the same name.
    """
    if name in ("aim", "tensorboard"):
        return run, {"logging_dir": log_dir}
    if name == "mlflow":
        return PROJECT, {"run_name": run, "run_id": _mlflow_run(run)}
    options: dict[str, dict[str, Any]] = {
        "dvclive": {"dir": str(log_dir / run), "resume": True},
        "swanlab": {"id": run, "experiment_name": run, "resume": "allow"},
        "trackio": {"name": run, "resume": "allow"},
        "wandb": {"id": run, "name": run, "resume": "allow"},
    }
    return PROJECT, options.get(name, {})


def _mlflow_run(run: str) -> str | None:
    """MLflow chooses the ids of its runs itself: that of the run of this name, if there is one."""
    import mlflow

    found = mlflow.search_runs(
        experiment_names=[os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)],
        filter_string=f"attributes.run_name = '{run}'",
        max_results=1,
        output_format="list",
    )
    return str(found[0].info.run_id) if found else None


@contextmanager
def _told(name: str, kind: Callable[..., Exception], do: str) -> Iterator[None]:
    """What a tracker raises, and it may raise anything, as an error of ours."""
    try:
        yield
    except Exception as error:
        raise kind(f"the tracker {name} failed: {type(error).__name__}: {error}", "log_with", do=do) from error


def _key(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
