"""What survives the rounding of a merge: recorded, told where it is little, and more where the advice is followed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from conftest import plan_of
from weight_space import known, read

from actors.shard import Shard
from engine.learning.learner import first_stage
from engine.output.model_folder import output_files
from engine.output.survival import load_survival, low_survival, survival_record, survived_of
from engine.planning.differences import LOW
from engine.planning.plan import Plan
from engine.storage.local_folder import LocalFolder
from engine.storage.sealed import write_sealed
from engine.task_vectors.coefficients import Coefficients
from engine.task_vectors.rounding import Survival

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models in bfloat16, whose weights are 0.15 large, so that their neighbours are 0.001 away."""
    return tiny.make_merge(tmp_path_factory.mktemp("small"), dtype=torch.bfloat16)


def merged(plan: Plan, folder: Path, shards: int = 1) -> dict[str, Survival]:
    """Write the output of a merge, learned or not, to a folder, and return what survived."""
    state, output = LocalFolder(folder / "state"), LocalFolder(folder / "output")
    workers = [Shard(plan, index, state) for index in range(shards)]
    files, learned = output_files(plan), plan.config.learned
    found = {} if learned else known(plan, workers)
    for index, file in enumerate(files):
        worker = workers[index % shards]
        if learned:
            values = Coefficients.constant(first_stage(plan).layout, plan.priors)
            names = [tensor.name for tensor in file.tensors if tensor.name in plan.merged_set]
            worker.write(output, file, {name: values.of(name) for name in names})
        else:
            worker.combine(output, file, found)
    return survived_of(state, [file.name for file in files])


SMALL = ("merge_method=task_arithmetic", "models.0.parameters.weight=0.003", "models.1.parameters.weight=0.003")


def test_little_survives_in_bfloat16_and_what_the_message_advises_keeps_it(config: Path, tmp_path: Path) -> None:
    before = plan_of(config, *SMALL)
    survived = merged(before, tmp_path / "before")
    assert survived.keys() == before.merged_set
    record, message = survival_record(before, survived), low_survival(before, survived)
    assert record["rounding"] == "nearest" and record["survived"] < LOW
    assert message is not None and "bfloat16" in message and f"{record['survived']:.0%}" in message
    base = read(config.parent / "base")
    options = [yaml.safe_load(option) for option in re.findall(r"`(.+?)`", message)]
    assert len(options) == 2
    for number, option in enumerate(options):
        ((key, value),) = option.items()
        after = plan_of(config, *SMALL, f"{key}={value}")
        found = merged(after, tmp_path / str(number))
        record = survival_record(after, found)
        assert record["survived"] == pytest.approx(1, abs=0.05) and low_survival(after, found) is None
        written = read(tmp_path / str(number) / "output")
        assert any(not torch.equal(written[name].float(), base[name].float()) for name in after.merged)


def test_large_changes_survive_without_a_message(config: Path, tmp_path: Path) -> None:
    plan = plan_of(config, "merge_method=task_arithmetic", "parameters.weight=1.0")
    survived = merged(plan, tmp_path)
    assert survival_record(plan, survived)["survived"] == pytest.approx(1, abs=0.05)
    assert low_survival(plan, survived) is None


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear", "expert_merging"])
def test_stochastic_bits_are_the_same_for_any_shards_and_files(config: Path, tmp_path: Path, method: str) -> None:
    options = (f"merge_method={method}", "parameters.weight=0.3", "rounding=stochastic")
    options += ("parameters.density=0.5", "parameters.task_vectors=whole")
    written, survived = [], []
    for shards, size in ((1, "5GB"), (3, "20KB")):
        plan, folder = plan_of(config, *options, f"max_shard_size={size}", "seed=5"), tmp_path / str(shards)
        survived.append(merged(plan, folder, shards))
        written.append(read(folder / "output"))
    assert survived[0] == survived[1]
    assert all(torch.equal(written[0][name], written[1][name]) for name in written[0])
    other = plan_of(config, *options, "seed=6")
    merged(other, tmp_path / "other")
    assert any(
        not torch.equal(tensor, written[0][name]) for name, tensor in read(tmp_path / "other" / "output").items()
    )


def test_the_record_of_a_merge_that_changes_nothing_has_no_share(config: Path) -> None:
    plan = plan_of(config)
    nothing = {name: Survival() for name in plan.merged}
    assert survival_record(plan, nothing)["survived"] is None and low_survival(plan, nothing) is None


@pytest.mark.parametrize("content", [b"[]", b'{"a": 1}', b'{"a": [1]}', b'{"a": [NaN, 1]}', b"\xff", b"[" * 10**5])
def test_a_damaged_record_of_a_file_is_none(tmp_path: Path, content: bytes) -> None:
    folder = LocalFolder(tmp_path)
    assert load_survival(folder, "x") is None
    write_sealed(folder, "rounding/x.json", content)
    assert load_survival(folder, "x") is None
