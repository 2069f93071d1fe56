"""Steps after a merge on a real Ray: in order, with statistics of the base, and the bits of the plain classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from cluster_helpers import run_merge
from conftest import plan_of
from correction_helpers import Actors
from safetensors.torch import load_file
from torch import Tensor

from actors.shard import Shard
from engine.calibration.encoder import encoder
from engine.calibration.records import read_records
from engine.calibration.samples import Sample, make_samples
from engine.checkpoints.writer import OutputFile, OutputTensor
from engine.correction.files import merged_file
from engine.correction.rules import rule_of
from engine.learning.frozen_expert import FrozenExpert
from engine.learning.statistics import collect
from engine.output.model_folder import output_files
from engine.planning.plan import Plan
from engine.shards.statistics import folder_name
from engine.statistics.files import Statistics
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_ray")]

BLOCKS = tiny.COMMON["num_hidden_layers"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_merge(tmp_path_factory.mktemp("merge"), parameters={"samples_per_model": 3}, dtype=torch.bfloat16)


def samples_of(plan: Plan) -> list[list[Sample]]:
    records = read_records(plan)
    return make_samples(records, encoder(plan, records), plan)


def statistics_of_base(plan: Plan, folder: Folder) -> None:
    every = [(sample, {}) for of_expert in samples_of(plan) for sample in of_expert]
    model = FrozenExpert(plan, None, torch.device("cpu"))
    collect(model, every, ("activations",), folder, {"base": {}, "model": {}})


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model.safetensors")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_steps_around_the_solution_of_layers_have_the_bits_of_the_plain_classes(config: Path, tmp_path: Path) -> None:
    options = "merge_method=task_arithmetic", "calibrate=[svc, featcal, aim]"
    plan, state = plan_of(config, *options), LocalFolder(tmp_path / "state")
    statistics_of_base(plan, state.child(folder_name(None)))
    shard, rule = Shard(plan, 0, state), rule_of(plan)
    assert rule is not None
    for name in plan.merged:
        # Not rounded before the end.
        tensor = plan.base_header.tensors[name]
        exact = OutputTensor(name, tensor.shape, "F32", 4 * tensor.numel)
        shard.combine(state, OutputFile(merged_file(name), (exact,)))
    Actors(plan, rule, samples_of(plan), state).run(range(BLOCKS))
    (tmp_path / "plain").mkdir()
    (file,) = output_files(plan)
    shard.calibrated(LocalFolder(tmp_path / "plain"), file)
    wanted = weights(tmp_path / "plain")
    assert set(plan.merged) == set(plan.base_header.tensors)
    assert {tensor.dtype for tensor in wanted.values()} == {torch.bfloat16}
    for shards in (1, 3):
        out = run_merge(plan_of(config, *options, f"cluster.shards={shards}"), tmp_path / f"by{shards}")
        assert equal(weights(out), wanted)


def test_a_learned_merge_collects_the_statistics_of_the_base(config: Path, tmp_path: Path) -> None:
    options = "merge_method=expert_merging", "out_dtype=float32"
    learned = weights(run_merge(plan_of(config, *options), tmp_path / "learned"))
    plan = plan_of(config, *options, "calibrate={method: aim, omega: 0.25}")
    damped = weights(run_merge(plan, tmp_path / "damped"))
    statistics_of_base(plan, LocalFolder(tmp_path / "statistics"))
    known, base = Statistics(LocalFolder(tmp_path / "statistics")), weights(Path(plan.base.model))
    changed = 0
    for name, merged in learned.items():
        moments = known.of(name, merged.shape).moments() if name in plan.merged else None
        if moments is None:
            assert torch.equal(damped[name], merged), name
            continue
        share = moments.absolute_I.double() / moments.absolute_I.max()
        expected = base[name].double() + (merged.double() - base[name].double()) * (1 - 0.75 * share)
        torch.testing.assert_close(damped[name].double(), expected, rtol=0, atol=1e-7)
        changed += not torch.equal(damped[name], merged)
    assert changed == 7 * BLOCKS
