"""A callback of transformers' Trainer, TRL's included, that merges the checkpoints of a training at its end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cluster.api import merge_given
from cluster.commands.common import target_of
from cluster.results import MergeResult
from engine.config.documents import Document, Given, given_documents, with_models
from engine.errors import RunError
from engine.run.place import check_place

# The model of a config that stands for the trained one.
TRAINED = "trained"
# The plain mean of the checkpoints of a training.
AVERAGE = {"merge_method": "weight_average"}


class MergeCallback(TrainerCallback):  # type: ignore[misc]
    """Merges when a training is done, in its main process.

    In the config, the model `trained` is the last checkpoint of the training, or the best one with
    `load_best_model_at_end`; `checkpoint-100` is the one of that step. Without `models`, `slices` and `modules`, the
    models are all checkpoints that the training has kept, the oldest first.

    Args:
        config: The config, as `cluster.merge` takes it. The default averages the checkpoints.
        out: The output folder or URI; None is `merged` in the output folder of the training.
        overrides, address, fresh, debug: See `cluster.merge`.

    Attributes:
        merged: What `cluster.merge` returns; None until then, and in all processes but the main one.

    Raises:
        InputError: At the start of the training, the config is wrong; at its end, see `cluster.merge`.
        RunError: The training has not saved its last step.
    """

    def __init__(
        self,
        config: Given = AVERAGE,
        out: str | os.PathLike[str] | None = None,
        overrides: Mapping[str, Any] | None = None,
        *,
        address: str | None = None,
        fresh: bool = False,
        debug: bool = False,
    ) -> None:
        self._config, self._out, self._overrides = config, out, overrides
        self._address, self._fresh, self._debug = address, fresh, debug
        self.merged: MergeResult | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Check the text of the config and the place of the output, before any time is spent."""
        if state.is_world_process_zero:
            check_place(self._target(args))
            for document in self._documents({TRAINED: str(_checkpoint(args, 0))}):
                document.config({})

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Have the last step saved, whatever the training's own strategy: this runs at the end of every training."""
        if control.should_training_stop and not _checkpoint(args, state.global_step).is_dir():
            control.should_save = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Merge."""
        if not state.is_world_process_zero:
            return
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        trained = Path(best or _checkpoint(args, state.global_step)).absolute()
        if not trained.is_dir():
            do = "set save_strategy to 'steps' or 'epoch' in the TrainingArguments"
            raise RunError("the training has saved no checkpoint of its last step", str(trained), do=do)
        kept = {path.name: str(path) for path in sorted(trained.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step)}
        documents = self._documents({**kept, TRAINED: str(trained)})
        self.merged = merge_given(documents, self._target(args), None, self._address, self._fresh, self._debug)

    def _target(self, args: TrainingArguments) -> str:
        return target_of(os.fspath(self._out or Path(args.output_dir) / "merged"))

    def _documents(self, places: Mapping[str, str]) -> Sequence[Document]:
        """Return the merges of the config with the checkpoints in place of their names."""
        checkpoints = [{"model": place} for name, place in places.items() if name != TRAINED or len(places) == 1]
        return [
            replace(one, raw=with_models(_listing(one.raw, checkpoints), places))
            for one in given_documents(self._config, self._overrides)
        ]


def _listing(raw: dict[str, Any], models: list[dict[str, str]]) -> dict[str, Any]:
    return raw if {"models", "slices", "modules"} & raw.keys() else raw | {"models": models}


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1
