"""Whole merges on a real Ray: invariants, and bit-identical results for every placement and after faults."""

from __future__ import annotations

import json
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet
import pytest
import safetensors.torch
import tiny
import torch
import yaml
from cluster_helpers import KillOnce, result, run_merge
from conftest import plan_of
from errors import refused
from peft_adapters import adapters
from plain import Plain, Received
from thorough import as_thorough, thorough_but
from transformers import AutoModelForCausalLM

from actors.trainer import WindowSample
from cluster.driver import merge
from cluster.processes import OneMachine
from engine.config.resources import Use
from engine.errors import InputError
from engine.planning.differences import left_out
from engine.planning.preflight import doubts, remarks
from engine.shards.parts import tensor_groups
from engine.task_vectors.coefficients import Coefficients, read_coefficients

pytestmark = pytest.mark.usefixtures("small_ray")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"parameters": {"budget": 1.5}, "cluster": {"shards": 1}}
    return tiny.make_merge(tmp_path_factory.mktemp("merge"), sharded=True, **options)


@pytest.fixture(scope="module")
def merged(small_ray: None, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference merge, with a single shard."""
    return run_merge(plan_of(config), tmp_path_factory.mktemp("out") / "merged")


def test_it_is_what_the_plain_classes_compute(config: Path, merged: Path, tmp_path: Path) -> None:
    plain = Plain(plan_of(config), tmp_path)
    expected = plain.run()
    for stage, table in enumerate(expected, start=1):
        models, got = read_coefficients(merged / "merge" / "coefficients.parquet", stage)
        assert models == ["expert0", "expert1"]
        assert got.layout == table.layout
        np.testing.assert_array_equal(got.values, table.values.astype(np.float32))
    checked = pyarrow.parquet.read_table(merged / "merge" / "end_check.parquet").to_pylist()
    nothing = Coefficients.constant(expected[-1].layout, [0.0, 0.0])
    for point, coefficients in (("base", nothing), ("merged", expected[-1])):
        rows = {(row["model"], row["sample"]): (row["kl"], row["hidden"]) for row in checked if row["point"] == point}
        window = [
            WindowSample(sample, plain.targets[k, i]) for k in range(2) for i, sample in enumerate(plain.samples[k])
        ]
        for item, losses in zip(window, plain.trainer.measure(coefficients, window), strict=True):
            found = rows.pop((f"expert{item.sample.expert}", item.sample.index))
            assert found == pytest.approx((losses.kl, losses.hidden), rel=1e-4)
        assert not rows


@pytest.mark.slow
def test_a_prior_is_found_kept_and_recorded(config: Path, tmp_path: Path) -> None:
    own = [f"models.{k}.parameters.weight=null" for k in range(2)]
    options = [*own, "parameters.weight=auto", "parameters.hidden_loss=relative", "merge_method=expert_merging"]
    plain = Plain(plan_of(config, *options), tmp_path)
    (expected,) = plain.run()
    merged = run_merge(plan_of(config, *options), tmp_path / "merged")
    _, got = read_coefficients(merged / "merge" / "coefficients.parquet", 1)
    np.testing.assert_array_equal(got.values, expected.values.astype(np.float32))
    written = yaml.safe_load((merged / "merge" / "config.yaml").read_text())
    assert written["parameters"]["weight"] == "auto"
    checked = pyarrow.parquet.read_table(merged / "merge" / "end_check.parquet")
    assert list(dict.fromkeys(checked["point"].to_pylist())) == ["base", "prior", "merged"]
    assert written["record"]["priors"] == dict(zip(["expert0", "expert1"], plain.plan.priors, strict=True))
    limits = {"batch_tokens": 192, "logit_bytes": 32 << 20}
    devices = {
        "trainer": 0,
        "expert": 0,
        "threads": 2,
        "kinds": [],
        "factors": "auto",
        "gradients": "accumulate",
    } | limits
    assert written["record"]["devices"] == devices


def test_an_expert_that_is_the_base_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.make_merge(tmp_path / "merge", merge_method="expert_merging", parameters={"epochs": 1})
    shutil.copytree(config.parent / "base", config.parent / "expert1", dirs_exist_ok=True)
    plan, out = plan_of(config), tmp_path / "merged"
    merge(plan, str(out))
    (line,) = doubts(plan)
    said, page = capsys.readouterr().out, (out / "merge" / "report.html").read_text()
    assert f"warning: {line}" in said and "warning: expert1: " in said and "warning: expert0" not in said
    assert json.loads((out / "merge" / "memory.json").read_text())["doubts"] == [line]
    assert page.count("expert1 has the base") == 1 and "% to" not in said


def test_adamerging_reads_experts_but_never_runs_them_for_one_coefficient_each(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("merge_method=adamerging", "parameters.granularity=task", "parameters.epochs=3")
    plan = plan_of(config, *options)
    (unused,) = remarks(plan, left_out(plan), [])
    assert "adamerging: " in unused and "hidden_layers" in unused
    out = run_merge(plan, tmp_path / "merged")
    assert "entropy" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(out)
    _, table = read_coefficients(out / "merge" / "coefficients.parquet", 1)
    assert np.all(np.ptp(table.values, axis=1) == 0) and len(set(table.values[:, 0])) == len(table.values)
    rows = pyarrow.parquet.read_table(out / "merge" / "metrics.parquet").to_pylist()
    assert all(row["entropy"] > 0 and row["kl"] == 0 for row in rows)
    memory = json.loads((out / "merge" / "memory.json").read_text())
    assert memory["expert_forwards"] == memory["bytes_targets"] == 0
    experts = [actor["role"] for actor in memory["actors"] if actor["role"].startswith("expert")]
    assert experts == ["expert 0"], "one actor surveys both experts, one after the other"
    assert "entropy" in (out / "README.md").read_text()


def test_a_merge_that_learns_nothing_has_the_same_bits_on_ray_and_on_this_machine(config: Path, tmp_path: Path) -> None:
    options = ("merge_method=ties", "parameters.density=0.4", "parameters.trim=model", "max_shard_size=20KB")
    plan = plan_of(config, *options, "cluster.shards=2")
    on_ray, here = run_merge(plan, tmp_path / "ray"), run_merge(plan, tmp_path / "here", hosts=OneMachine())
    assert result(on_ray) == result(here)


@pytest.mark.slow
def test_an_input_that_changes_during_a_merge_ends_it(config: Path, tmp_path: Path) -> None:
    """The experts are mapped into memory by their file, so the replaced one is what the learning used."""
    folder = shutil.copytree(config.parent, tmp_path / "in")
    expert = next(folder.glob("expert0/*.safetensors"))

    def replace_it(phase: str) -> None:
        if phase == "stage 1":
            data = expert.read_bytes()
            (folder / "new").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            (folder / "new").replace(expert)

    with refused(InputError, do="same command", facts=[str(expert)]) as caught:
        run_merge(plan_of(folder / config.name), tmp_path / "merged", replace_it)
    assert caught.value.exit_code == 2 and not (tmp_path / "merged").exists()
    assert not (tmp_path / "merged.run" / "identity.json").exists(), "it is not resumed"


@pytest.fixture(scope="module", params=["never", "always"])
def factors(request: pytest.FixtureRequest) -> Use:
    return request.param


@pytest.fixture(scope="module")
def orthogonal(small_ray: None, config: Path, factors: Use, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merge over orthogonal task vectors, with two shards."""
    settings = [f"cluster.factors={factors}", "parameters.task_vectors=orthogonal", "cluster.shards=2"]
    return run_merge(plan_of(config, *settings), tmp_path_factory.mktemp("out") / "merged")


@pytest.mark.slow
def test_orthogonal_task_vectors_are_learned_over_and_written(
    config: Path, orthogonal: Path, factors: Use, tmp_path: Path
) -> None:
    plan, merged = plan_of(config, "parameters.task_vectors=orthogonal"), orthogonal
    plain = Plain(plan, tmp_path, factors)
    tables = plain.run()
    for stage, table in enumerate(tables, start=1):
        _, got = read_coefficients(merged / "merge" / "coefficients.parquet", stage)
        assert got.layout == table.layout, "the chunks depend on the orthogonal task vectors"
        np.testing.assert_array_equal(got.values, table.values.astype(np.float32))
    written, received = safetensors.torch.load_file(merged / "model.safetensors"), Received(plan)
    for name, tensor in received.all_of(plain.shards.merge(tables[-1], received)).items():
        if factors == "never":
            assert torch.equal(written[name].flatten(), tensor)
        else:
            # The trainer sums over all experts in one product, a shard expert by expert.
            torch.testing.assert_close(written[name].flatten(), tensor, rtol=0, atol=1e-6)
    moved = json.loads((merged / "merge" / "memory.json").read_text())["bytes_trainer_to_shards"]
    assert (moved == 0) == (factors == "always"), "factors are on the trainer's device"


@pytest.mark.slow
@pytest.mark.parametrize("factors", ["always"], indirect=True, scope="module")
@pytest.mark.parametrize(
    "phase", thorough_but(["reading the experts"], ["reading the experts", "orthogonal task vectors", "stage 1"])
)
def test_a_stop_between_readings_and_damage_give_the_same_bits(
    config: Path, orthogonal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], phase: str
) -> None:
    def stop(reached: str) -> None:
        if reached == phase:
            raise KeyboardInterrupt

    plan = plan_of(config, "parameters.task_vectors=orthogonal", "cluster.shards=1", "cluster.factors=always")
    with pytest.raises(KeyboardInterrupt):
        run_merge(plan, tmp_path / "merged", stop)
    run = tmp_path / "merged.run"
    stored = {folder: sorted((run / folder).glob("*")) for folder in ("parts", "survey", "orthogonal")}
    surveyed, groups = [path.name for path in stored["survey"]], len(tensor_groups(plan))
    if phase == "reading the experts":
        # One expert is surveyed. Its actor may have gone on to the other one before it was stopped.
        assert {f"0-{group}.json" for group in range(groups)} <= set(surveyed) and stored["parts"]
    if phase == "stage 1":
        assert not stored["parts"] and len(stored["orthogonal"]) == len(plan.orthogonal), "removed after their use"
        stored["orthogonal"][0].unlink()
    for path in stored["parts"][:1]:
        path.write_bytes(path.read_bytes()[:-1])
    damaged = run / "survey" / "0-1.json"
    damaged.write_bytes(b"")
    (run / "magnitudes.safetensors").unlink(missing_ok=True)
    capsys.readouterr()
    run_merge(plan, tmp_path / "merged")
    assert result(tmp_path / "merged") == result(orthogonal)
    printed = capsys.readouterr().out
    assert sum(str(damaged) in line for line in printed.splitlines()) == 1
    read = f"reading the experts: {2 * groups} ({len(surveyed) - 1} done before)"
    assert read in printed, "what is stored is not read again"
    figures = json.loads((tmp_path / "merged" / "merge" / "memory.json").read_text())
    assert figures["expert_forwards"] == 7
    written, before = (
        yaml.safe_load((out / "merge" / "config.yaml").read_text()) for out in (tmp_path / "merged", orthogonal)
    )
    assert written["record"]["inputs"] == before["record"]["inputs"], "the hashes of the inputs"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads a deprecated attribute
@pytest.mark.parametrize(
    ("task_vectors", "chunks"),
    [("orthogonal", "spectral"), as_thorough(("orthogonal", "direction")), as_thorough(("whole", "spectral"))],
)
def test_coefficients_of_directions_are_learned_and_written(
    config: Path, tmp_path: Path, task_vectors: str, chunks: str
) -> None:
    """With a stop in stage 2, from which the run goes on. Whole task vectors are those of adapters."""
    config = shutil.copytree(config.parent, tmp_path / "in") / config.name
    if task_vectors == "whole":
        adapters(config, 2)
    options = (f"parameters.task_vectors={task_vectors}", f"parameters.chunks={chunks}", "cluster.shards=2")
    plan, kill = plan_of(config, *options), KillOnce({"stage 2": "ray::Trainer"})
    plain = Plain(plan, tmp_path)
    tables = plain.run()
    merged = run_merge(plan, tmp_path / "merged", kill)
    assert not kill.missed
    for stage, table in enumerate(tables, start=1):
        _, got = read_coefficients(merged / "merge" / "coefficients.parquet", stage)
        assert got.layout == table.layout and bool(got.layout.spectral) == (stage == 2)
        np.testing.assert_array_equal(got.values, table.values.astype(np.float32))
    written, received = safetensors.torch.load_file(merged / "model.safetensors"), Received(plan)
    for name, tensor in received.all_of(plain.shards.merge(tables[-1], received)).items():
        torch.testing.assert_close(written[name].flatten(), tensor, rtol=1e-5, atol=1e-6)


def test_the_output_loads_and_holds_the_merge(config: Path, merged: Path) -> None:
    plan = plan_of(config)
    _, table = read_coefficients(merged / "merge" / "coefficients.parquet", 2)
    written = safetensors.torch.load_file(merged / "model.safetensors")
    sources = [config.parent / name for name in ("base", "expert0", "expert1")]
    base, *experts = (
        {k: v for f in sorted(s.glob("*.safetensors")) for k, v in safetensors.torch.load_file(f).items()}
        for s in sources
    )
    assert set(written) == set(base)
    for name, tensor in written.items():
        if name not in plan.merged_set:
            assert torch.equal(tensor, base[name]), f"{name} is bit-identical to the base's"
            continue
        edges, values = table.of(name).edges, table.of(name).values
        expected = base[name].flatten().double()
        for k, expert in enumerate(experts):
            tau = expert[name].flatten().double() - base[name].flatten().double()
            for chunk, (start, end) in enumerate(pairwise(edges)):
                expected[start:end] += float(values[k, chunk]) * tau[start:end]
        torch.testing.assert_close(tensor.flatten().double(), expected, atol=1e-6, rtol=0)
    model = AutoModelForCausalLM.from_pretrained(merged)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in written.items())


def test_figures_hold_the_laws(config: Path, merged: Path) -> None:
    figures = json.loads((merged / "merge" / "memory.json").read_text())
    steps = {
        (row["stage"], row["step"])
        for row in pyarrow.parquet.read_table(merged / "merge" / "metrics.parquet").to_pylist()
    }
    assert len(steps) == 6
    assert figures["bytes_trainer_to_shards"] == len(steps) * figures["bytes_merged"], "each gradient once per step"
    merges = len(steps) + len(("base", "merged"))
    assert figures["bytes_shards_to_trainer"] == merges * figures["bytes_merged"], "once per step, and to be measured"
    assert figures["expert_forwards"] == 7, "once for each sample; the stages share them"
    assert [actor["role"] for actor in figures["actors"]] == [
        "driver",
        "expert 0",
        "trainer",
        "shard 0",
    ], "a single process for both experts"
    assert all(actor["peak_anonymous_bytes"] > 0 for actor in figures["actors"])
    assert all(actor["peak_pinned_bytes"] == 0 for actor in figures["actors"]), "no GPU"
    assert not merged.with_name("merged.run").exists(), "removed at the end of the merge"


def test_two_shards_give_the_same_bits_as_one(config: Path, merged: Path, tmp_path: Path) -> None:
    other = run_merge(plan_of(config, "cluster.shards=2"), tmp_path / "merged")
    assert result(other) == result(merged)


def test_task_vectors_within_the_trainer_give_the_same_bits_and_move_nothing(
    config: Path, merged: Path, tmp_path: Path
) -> None:
    other = run_merge(plan_of(config, "cluster.shards=0"), tmp_path / "merged")
    assert result(other) == result(merged)
    figures = json.loads((other / "merge" / "memory.json").read_text())
    assert figures["bytes_trainer_to_shards"] == figures["bytes_shards_to_trainer"] == 0
    assert [actor["role"] for actor in figures["actors"]][-2:] == ["trainer", "shard 0"], "a shard writes the files"


@pytest.mark.slow
def test_a_streamed_gradient_moves_once_a_pass(config: Path, merged: Path, tmp_path: Path) -> None:
    options = ["gradients=stream", "gradient_checkpointing=true", "merge_method=expert_merging", "cluster.shards=3"]
    options.append("batch_tokens=1")  # one pass for each sample
    other = run_merge(plan_of(config, *options), tmp_path / "merged")
    figures = json.loads((other / "merge" / "memory.json").read_text())
    rows = pyarrow.parquet.read_table(other / "merge" / "metrics.parquet").to_pylist()
    steps = {row["step"] for row in rows}
    assert len(rows) > len(steps) > 1
    assert figures["bytes_trainer_to_shards"] == len(rows) * figures["bytes_merged"]
    merges = len(steps) + len(("base", "merged"))
    assert figures["bytes_shards_to_trainer"] == merges * figures["bytes_merged"]
    (_, got), (_, plain) = (read_coefficients(out / "merge" / "coefficients.parquet", 1) for out in (other, merged))
    np.testing.assert_allclose(got.values, plain.values, atol=1e-4)


@pytest.mark.slow
def test_actors_that_are_killed_are_replaced_with_the_same_bits(
    config: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_once = KillOnce({"targets": "ray::Expert", "stage 1": "ray::Trainer", "stage 2": "ray::Shard"})
    other = run_merge(plan_of(config), tmp_path / "merged", kill_once)
    assert not kill_once.missed
    assert result(other) == result(merged)
    said = capsys.readouterr().out
    assert all(f"{name} died and is started again" in said for name in ("an expert's actor", "the trainer", "shard 0"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "victim", "name"),
    [
        ("targets", "ray::Expert", "an expert's actor"),
        as_thorough(("stage 1", "ray::Trainer", "the trainer")),
        as_thorough(("stage 2", "ray::Shard", "shard 0")),
    ],
)
def test_actors_that_hang_are_named_and_replaced_with_the_same_bits(
    config: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], phase: str, victim: str, name: str
) -> None:
    stop_once = KillOnce({phase: victim}, signal.SIGSTOP)
    other = run_merge(plan_of(config, "cluster.hang=15"), tmp_path / "merged", stop_once)
    assert not stop_once.missed
    assert result(other) == result(merged)
    (line,) = [line for line in "".join(capsys.readouterr()).splitlines() if "hangs" in line]
    assert f"{name} on node" in line
    deadline = time.monotonic() + 30
    while any(map(psutil.pid_exists, stop_once.killed[phase])) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(psutil.pid_exists, stop_once.killed[phase])), "an actor that hangs is killed"


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(config: Path, merged: Path, tmp_path: Path) -> None:
    def stop_in_stage_2(phase: str) -> None:
        if phase == "stage 2":
            raise KeyboardInterrupt

    plan = plan_of(config)
    with pytest.raises(KeyboardInterrupt):
        run_merge(plan, tmp_path / "merged", stop_in_stage_2)
    assert not (tmp_path / "merged").exists()
    assert (tmp_path / "merged.run" / "stage-2.safetensors").exists()
    run_merge(plan, tmp_path / "merged")
    assert result(tmp_path / "merged") == result(merged)
    figures = json.loads((tmp_path / "merged" / "merge" / "memory.json").read_text())
    assert figures["expert_forwards"] == 7, "stored targets are not computed again"
    metrics = [p.joinpath("merge/metrics.parquet") for p in (merged, tmp_path / "merged")]
    one, other = (pyarrow.parquet.read_table(path).drop(["seconds"]) for path in metrics)
    assert one.equals(other)


@pytest.mark.slow
def test_a_damaged_state_is_computed_again_with_the_same_bits(
    config: Path, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop_after_writing(phase: str) -> None:
        if phase == "writing":
            raise KeyboardInterrupt

    plan, run = plan_of(config), tmp_path / "merged.run"
    with pytest.raises(KeyboardInterrupt):
        run_merge(plan, tmp_path / "merged", stop_after_writing)
    damaged = {"samples.json", "magnitudes.safetensors", "targets/1-0.safetensors", "stage-1.safetensors"}
    damaged |= {"stage-2.safetensors", "output/model.safetensors"}
    for name, cut in zip(sorted(damaged), (0, 5, 100, 200, 1, 300), strict=True):
        (run / name).write_bytes((run / name).read_bytes()[:cut])
    run_merge(plan, tmp_path / "merged")
    assert result(tmp_path / "merged") == result(merged)
    printed = capsys.readouterr().out.splitlines()
    said = {name: sum(str(run / name) in line for line in printed) for name in damaged}
    assert said == dict.fromkeys(damaged, 1)
    figures = json.loads((tmp_path / "merged" / "merge" / "memory.json").read_text())
    assert figures["expert_forwards"] == 7, "six targets are kept, and the damaged one is computed again"
