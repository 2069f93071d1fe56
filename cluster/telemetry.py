"""Telemetry of a running merge: gauges on the cluster's metrics ports, and experiment trackers.

Ray exports the gauges as `ray_expert_merging_…`. The trackers are those of accelerate. Both show the phases of the
merge by name, and the metrics rows of its steps.
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
# Trackers that write files on the driver's node.
WRITE_FILES = ("aim", "dvclive", "tensorboard")
# Ray drops a gauge that was not set within two of its intervals of 10 seconds, and a step may take longer.
REPEAT_SECONDS = 5.0
# Columns of merge/metrics.parquet with values per sample, and those with values per step by the name of their gauge.
OF_SAMPLES = ("kl", "hidden", "entropy")
OF_STEP = {
    "regularization": "regularization",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "seconds": "step_seconds",
}
GAUGES = {
    "step": ("stage", "Last optimiser step of a stage, from 0."),
    "kl": ("stage", "Logit loss, mean over the samples of the last step."),
    "hidden": ("stage", "Hidden loss, mean over the samples of the last step."),
    "entropy": ("stage", "Entropy of the predictions, mean over the samples of the last step."),
    "regularization": ("stage", "Regularization towards the prior at the last step."),
    "grad_norm": ("stage", "Gradient norm of the coefficients at the last step, before clipping."),
    "learning_rate": ("stage", "Learning rate of the last step."),
    "step_seconds": ("stage", "Duration of the last step in the trainer, in seconds."),
    "phase_parts": ("phase", "Number of parts of a phase."),
    "phase_parts_done": ("phase", "Completed parts of a phase."),
    "phase_seconds": ("phase", "Duration of a phase, in seconds."),
    "bytes": ("direction", "Bytes moved so far."),
}


def check_trackers(config: Config, out: str) -> None:
    """Check, before anything starts, that the trackers are installed and have a folder to write to.

    Raises:
        ConfigError: a package is not installed, or a tracker that writes files needs `log_dir` because `out` is a URI.
    """
    installed = {str(name) for name in get_available_trackers()}
    if missing := [name for name in config.log_with if name not in installed]:
        raise ConfigError(
            f"not installed: {', '.join(missing)}",
            "log_with",
            do=f"run `pip install {' '.join(missing)}`, or remove them from log_with",
        )
    if (
        is_uri(out)
        and config.log_dir is None
        and (writing := [name for name in config.log_with if name in WRITE_FILES])
    ):
        raise ConfigError(
            f"{', '.join(writing)} cannot write next to {out}", "log_with", do="set `log_dir` to a folder that is kept"
        )


class Telemetry:
    """The gauges and trackers of one merge while the context lasts.

    `run` is the name of the run, of letters, digits, `_` and `-`. A restarted run has the same name. `gauges`: Ray is
    connected, and exports the gauges.

    Raises:
        ConfigError: a tracker does not start.
        RunError: a tracker fails later.
    """

    def __init__(self, run: str, config: Config, out: str, gauges: bool = True) -> None:
        self._run, self._log_with = run, config.log_with
        self._log_dir = as_path(config.log_dir or f"{out}.logs")
        self._trackers: dict[str, Any] = {}
        self._leaving = ExitStack()
        self._gauges = _Gauges(run, GAUGES if gauges else {})
        self._totals: dict[str, int] = {}
        # The number of the last step over all stages, and values that will be logged with the next step.
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
        """Begin a phase of `total` parts, of which `done` were completed before. A part of `stage N` is a step."""
        self._totals[name] = total
        if (stage := re.fullmatch(r"stage (\d+)", name)) and done:
            self._number = self._over_stages(int(stage[1]), done - 1)
        self._gauges.set("phase_parts", total, name)
        self.advance(name, done)

    def advance(self, name: str, done: int) -> None:
        """Report that `done` parts of the phase are complete."""
        self._gauges.set("phase_parts_done", done, name)

    def phase_seconds(self, name: str, seconds: float) -> None:
        """Report the duration of a phase."""
        self._gauges.set("phase_seconds", seconds, name)
        self._waiting[f"seconds/{_key(name)}"] = seconds

    def bytes(self, direction: str, total: int) -> None:
        """Report the total bytes moved in a direction since the run began."""
        self._gauges.set("bytes", total, direction)
        self._waiting[f"bytes/{_key(direction)}"] = total

    def step(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Report an optimiser step by its rows of merge/metrics.parquet. The phase of its stage must have begun."""
        first = rows[0]
        stage, step = first["stage"], first["step"]
        values = {key: fmean(row[key] for row in rows) for key in OF_SAMPLES if first.get(key) is not None}
        values |= {name: first[key] for key, name in OF_STEP.items()}
        for name, value in {"step": step, **values}.items():
            self._gauges.set(name, value, str(stage))
        self._log(self._over_stages(stage, step), values)

    def _over_stages(self, stage: int, step: int) -> int:
        """Return the number of a step over both stages, which have equally many steps."""
        return (stage - 1) * self._totals[f"stage {stage}"] + step

    def _log(self, number: int, values: Mapping[str, float]) -> None:
        """Send the values of a step and the waiting ones to the trackers.

        Values between steps wait for the next step, because some trackers refuse a number that does not increase.
        """
        self._number, logged, self._waiting = number, {**values, **self._waiting}, {}
        if logged:
            advice = "run the same command to resume, without the tracker if it fails again"
            for name, tracker in self._trackers.items():
                with _tracker_errors_as(RunError, name, advice):
                    tracker.log(logged, step=number)

    def _finish(self, name: str) -> None:
        with _tracker_errors_as(RunError, name, "check the tracker: the last values may be missing"):
            self._trackers.pop(name).finish()


class _Gauges:
    """The gauges of one run: of `gauges`, name, tag and description. A thread repeats their last values."""

    def __init__(self, run: str, gauges: Mapping[str, tuple[str, str]]) -> None:
        self._run = run
        self._gauges = {
            name: Gauge(f"expert_merging_{name}", about, ("run", tag)) for name, (tag, about) in gauges.items()
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
        """Set the value of a gauge for one stage, phase or direction, if there are gauges."""
        if name not in self._gauges:
            return
        self._values[name, tag] = value
        self._gauges[name].set(value, {"run": self._run, GAUGES[name][0]: tag})

    def _repeat(self) -> None:
        while not self._left.wait(REPEAT_SECONDS):
            for (name, tag), value in tuple(self._values.items()):
                self._gauges[name].set(value, {"run": self._run, GAUGES[name][0]: tag})


def _started(name: str, run: str, log_dir: Path) -> Any:
    """Start a tracker, which continues its record of this run if it can."""
    PartialState()  # accelerate's trackers ask it whether they are in the main process; this is the only process
    with _tracker_errors_as(ConfigError, name, "fix the cause, or remove the tracker from log_with"):
        where, options = _place(name, run, log_dir)
        tracker = LOGGER_TYPE_TO_CLASS[name](where, **options)
        tracker.start()
    return tracker


def _place(name: str, run: str, log_dir: Path) -> tuple[str, dict[str, Any]]:
    """Return the first argument of a tracker (project or run name) and the options that make it resume the run.

    aim, clearml and comet_ml cannot resume: a restarted merge is another run of the same name.
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
    """Return the id of the MLflow run of this name, or None. MLflow chooses the ids itself."""
    import mlflow

    runs = mlflow.search_runs(
        experiment_names=[os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)],
        filter_string=f"attributes.run_name = '{run}'",
        max_results=1,
        output_format="list",
    )
    return str(runs[0].info.run_id) if runs else None


@contextmanager
def _tracker_errors_as(error_type: Callable[..., Exception], name: str, do: str) -> Iterator[None]:
    """Raise `error_type` for any exception that a tracker raises."""
    try:
        yield
    except Exception as error:
        raise error_type(f"the tracker {name} failed: {type(error).__name__}: {error}", "log_with", do=do) from error


def _key(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
