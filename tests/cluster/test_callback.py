"""The callback of a Trainer: merges of the trained model with others, and of the checkpoints of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from errors import refused
from safetensors.torch import load_file

from cluster.callback import MergeCallback
from engine.errors import ConfigError, OutputError, RunError

IDS = list(range(3, 12))
# The trained model's changes alone.
ALL = {"merge_method": "task_arithmetic", "parameters": {"weight": 1.0}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a base."""
    tiny.save(tiny.make_model(), tmp_path / "base")
    tiny.save_tokenizer(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(callback: MergeCallback, more: Any = (), **options: Any) -> None:
    """Train the base for three steps."""
    given = {
        "max_steps": 3,
        "learning_rate": 0.1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    arguments = transformers.TrainingArguments("training", **given)
    model = transformers.AutoModelForCausalLM.from_pretrained("base")
    records = [{"input_ids": IDS, "labels": IDS}] * 8
    transformers.Trainer(model, arguments, train_dataset=records, callbacks=[*more, callback]).train()


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(path) / "model.safetensors")


@pytest.mark.slow
def test_the_trained_model_is_an_expert_even_if_the_training_saves_nothing(folder: Path) -> None:
    callback = MergeCallback(ALL | {"base_model": "base", "models": [{"model": "trained"}]}, out="merged")
    train(callback, save_strategy="no")
    assert callback.merged is not None and callback.merged.path == str(folder / "merged")
    trained, merged = weights("training/checkpoint-3"), weights("merged")
    assert all(torch.allclose(merged[name], trained[name], atol=1e-6) for name in trained)
    assert any(not torch.equal(merged[name], one) for name, one in weights("base").items())


@pytest.mark.slow
def test_without_a_config_the_checkpoints_that_were_kept_are_averaged(folder: Path) -> None:
    callback = MergeCallback()
    train(callback, save_strategy="steps", save_steps=1, save_total_limit=2)
    kept = [weights(f"training/checkpoint-{step}") for step in (2, 3)]
    merged = weights("training/merged")
    assert all(torch.allclose(merged[name], (kept[0][name] + kept[1][name]) / 2, atol=1e-6) for name in merged)


@pytest.mark.slow
def test_what_is_wrong_is_found_before_the_training(folder: Path) -> None:
    with refused(ConfigError, do="weight_average"):
        train(MergeCallback({"merge_method": "weight-average"}))
    with refused(OutputError):
        train(MergeCallback(out="/proc/merged"))
    assert not list(folder.glob("training/checkpoint-*"))


@pytest.mark.slow
def test_a_training_whose_last_step_is_not_saved_is_said_to_need_a_strategy(folder: Path) -> None:
    class Unsaved(transformers.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            for path in folder.glob("training/checkpoint-*"):
                path.rename(folder / f"moved-{len(list(folder.iterdir()))}")

    with refused(RunError, where="checkpoint-3", do="save_strategy"):
        train(MergeCallback(), more=[Unsaved()])
    train(callback := MergeCallback(fresh=True), save_strategy="steps", save_steps=1)
    assert callback.merged is not None


def test_other_processes_than_the_main_one_do_nothing(folder: Path) -> None:
    callback, state = MergeCallback({"merge_method": "none"}), transformers.TrainerState()
    arguments = transformers.TrainingArguments("training", use_cpu=True, report_to="none")
    state.is_world_process_zero = False
    callback.on_train_begin(arguments, state, transformers.TrainerControl())
    callback.on_train_end(arguments, state, transformers.TrainerControl())
    assert callback.merged is None and not (folder / "training" / "merged").exists()
