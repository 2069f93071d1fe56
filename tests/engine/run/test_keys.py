"""Keys of what a merge computes: they change with all that may change its bits, and with nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import plan_of
from hypothesis import given, settings
from hypothesis import strategies as st
from identities import ON_CPU
from plain import Plain
from thorough import thorough_but

from engine.calibration.samples import Sample
from engine.config.schema import INTERNAL, Config
from engine.learning.learner import first_stage
from engine.methods.learned import Parameters
from engine.planning.factors import decomposed, factored
from engine.planning.plan import Plan
from engine.planning.schedule import training_order, windows
from engine.run.identity import Identity
from engine.run.inputs import identity
from engine.run.keys import Computing, Keys
from engine.storage.local_folder import digest

SAMPLES, TARGETS, STATISTICS, VECTORS, MAGNITUDES, PRIOR, FIRST, SECOND = (
    *("samples", "targets", "statistics", "task vectors", "magnitudes", "prior", "stage 1", "stage 2"),
)
STEPS, LEARNING = {FIRST, SECOND}, {PRIOR, FIRST, SECOND}
MODELS = {TARGETS, STATISTICS, VECTORS, MAGNITUDES, PRIOR, FIRST, SECOND}
# What each key of the config changes. Of several values, each is tried.
CHANGES: dict[str, set[str]] = {
    "parameters.weight=0.4": LEARNING,  # of experts that have none of their own
    "parameters.loss_weight=0.5": STEPS,
    "parameters.samples_per_model=2": {SAMPLES, *LEARNING},
    "parameters.task_vectors=whole": {VECTORS, MAGNITUDES, *LEARNING},
    "parameters.hidden_layers=[1]": {TARGETS, *LEARNING},
    "parameters.hidden_loss=relative": LEARNING,
    "parameters.hidden_weight=0.5": STEPS,
    "parameters.temperature=3": LEARNING,
    "parameters.loss_tokens=text": {SAMPLES},  # the rest by the samples
    "parameters.regularization=0.25": STEPS,
    "parameters.learning_rate=0.2": STEPS,
    "parameters.weight_decay=0.1": STEPS,
    "parameters.max_grad_norm=0.001": STEPS,
    "parameters.gradient_accumulation=2": LEARNING,
    "parameters.epochs=2": STEPS,
    "parameters.budget=2": {SECOND},
    "parameters.kappa=2": {SECOND},
    "parameters.chunks=spectral": {SECOND},
    "parameters.fixed=stage1": {SECOND},
    "parameters.start=stage1": {SECOND},
    "merge_method=expert_merging": set(),
    "exclude=['.*norm.*', '.*embed_tokens.*', '.*lm_head.*', '.*down_proj.*']": {MAGNITUDES, *LEARNING},
    "calibration.max_length=64": {SAMPLES},
    "calibration.shuffle=true": {SAMPLES},
    "calibration.generate_responses=3": {SAMPLES},
    "calibration.image_options.max_patches=2": {SAMPLES},
    "dtype=bfloat16": {SAMPLES, *MODELS},
    "out_dtype=bfloat16": set(),
    "max_shard_size=20KB": set(),
    "rounding=stochastic": set(),
    "tokenizer_source=expert0": {SAMPLES},
    "chat_template=chatml": {SAMPLES},
    "config_source=expert0": MODELS,
    "on_missing=base": MODELS,
    "seed=1": set(),
    "batch_tokens=64": LEARNING,
    "gradients=stream": LEARNING,
    "gradient_checkpointing=true": LEARNING,
    "trust_remote_code=true": {SAMPLES, *MODELS},
    "cluster.shards=1": set(),
    "log_with=tensorboard": set(),
    "log_dir=logs": set(),
    "cache=off": set(),
    "cache_size=1GB": set(),
    "calibrate=svc": set(),
    "base_statistics=folder": set(),
    "models.0.name=other": STEPS,  # the rows of the metrics have the names
}
# One of each kind of change.
QUICK = [
    *("parameters.loss_weight=0.5", "parameters.samples_per_model=2", "parameters.task_vectors=whole"),
    *("parameters.hidden_layers=[1]", "parameters.temperature=3", "parameters.learning_rate=0.2"),
    *("parameters.budget=2", "calibration.shuffle=true", "dtype=bfloat16", "out_dtype=bfloat16", "cache=off"),
]
# Options that forbid some of the others, or without which some of these have no effect.
ALONE = {"parameters.chunks=spectral", "merge_method=expert_merging", "config_source=expert0"}
# Of other methods; the models, whose files count; and what is not a setting.
OTHERS = {
    "parameters.granularity",
    "base_model",
    "models",
    "preset",
    "parameters",
    "calibration",
    "cluster",
    "record",
    "search",
}


def known(plan: Plan) -> Identity:
    """Return the identity of a merge with the SHA-256 of all files."""
    now = identity(plan)
    return now.with_digests({name: digest(file.path) for name, file in now.files.items()})


def samples_of(plan: Plan) -> list[list[Sample]]:
    return [
        [Sample(k, i, (5 + k, 6, 7 + i), f"{k}:{i}", loss_weight=expert.loss_weight) for i in range(expert.samples)]
        for k, expert in enumerate(plan.experts)
    ]


def steps_of(plan: Plan, epochs: int | None = None) -> list[list[Sample]]:
    samples, options = samples_of(plan), plan.config.parameters
    order = training_order([len(mine) for mine in samples], epochs or options.epochs)
    return [[samples[k][i] for k, i in window] for window in windows(order, options.gradient_accumulation)]


def computing(plan: Plan, **devices: object) -> Computing:
    return Computing(ON_CPU | devices, factored(plan, True, "auto"))


def all_keys(plan: Plan, identity: Identity | None = None, on: Computing | None = None) -> dict[str, object]:
    keys, on = Keys(plan, identity or known(plan)), on or computing(plan)
    steps = steps_of(plan)
    first = keys.steps(steps, on)
    vectors = keys.task_vectors(on)
    return {
        SAMPLES: [keys.samples(k) for k in range(len(plan.experts))],
        TARGETS: [keys.target(mine[0], on) for mine in samples_of(plan)],
        STATISTICS: [keys.statistics(k, samples_of(plan)[k][:1], on) for k in range(len(plan.experts))],
        VECTORS: vectors[next(name for name in vectors if "q_proj" in name)] if vectors else "none",
        MAGNITUDES: keys.magnitudes(on),
        PRIOR: keys.prior(steps_of(plan, 1), on),
        FIRST: first[-1] if first else None,
        SECOND: (keys.steps(steps, on, first[-1]) or [None])[-1] if first else None,
    }


def changed(before: dict[str, object], after: dict[str, object]) -> set[str]:
    return {kind for kind in before if before[kind] != after[kind]}


@pytest.fixture(scope="module")
def make_plan(llama_merge: Path) -> Callable[..., Plan]:
    def make(*overrides: str) -> Plan:
        # The experts' own priors would hide the common one.
        common = ("models.0.parameters={}", "models.1.parameters={}", "parameters.weight=0.3")
        return plan_of(llama_merge, *common, "parameters.task_vectors=orthogonal", *overrides)

    return make


def test_every_key_of_the_config_is_in_the_table() -> None:
    given = {change.partition("=")[0] for change in CHANGES} | OTHERS
    fields = {f"parameters.{name}" for name in Parameters.model_fields} | set(Config.model_fields)
    fields -= {*INTERNAL}
    sections = {change.partition(".")[0] for change in CHANGES}
    assert fields - given - sections == set()


def test_the_state_of_a_training_decides_the_statistics_alone(llama_merge: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_merge.parent, tmp_path / "merge")
    plan = plan_of(folder / llama_merge.name)
    state = folder / "expert0" / "optimizer.pt"
    state.write_bytes(b"a state")
    trained = plan_of(folder / llama_merge.name, f"models.0.optimizer_state={state}")
    before, now = all_keys(plan), all_keys(trained)
    assert changed(before, now) == {STATISTICS} and None not in before[STATISTICS]  # type: ignore[operator]
    state.write_bytes(b"another")
    assert changed(now, all_keys(trained)) == {STATISTICS}
    # Nobody hashes it before the merge, so that its statistics are not reused.
    on = computing(trained)
    assert Keys(trained, identity(trained)).statistics(0, [], on) is None


@pytest.mark.parametrize("change", thorough_but(QUICK, CHANGES))
def test_a_key_changes_with_the_options_that_its_computation_reads(change: str, make_plan: Callable[..., Plan]) -> None:
    assert changed(all_keys(make_plan()), all_keys(make_plan(change))) == CHANGES[change]


@pytest.mark.thorough
@settings(max_examples=15, deadline=None)
@given(st.sets(st.sampled_from(sorted(CHANGES.keys() - ALONE)), min_size=2, max_size=4))
def test_several_options_change_what_each_of_them_changes(make_plan: Callable[..., Plan], changes: set[str]) -> None:
    wanted = set().union(*(CHANGES[change] for change in changes))
    assert changed(all_keys(make_plan()), all_keys(make_plan(*sorted(changes)))) == wanted


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_stages_with_one_key_have_the_same_bits(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    def learn(index: int, *overrides: str) -> tuple[object, np.ndarray]:
        plan = make_plan("parameters.gradient_accumulation=3", *overrides)
        run = Plain(plan, tmp_path / f"{index}")
        on = Computing(ON_CPU, factored(plan, False, "auto"))  # as `Plain` computes
        return all_keys(plan, on=on)[FIRST], run.learn(first_stage(plan)).values

    key, values = learn(0)
    same = set()
    for index, change in enumerate(change for change in CHANGES if FIRST not in CHANGES[change]):
        again, other = learn(index + 1, change)
        if again == key and SAMPLES not in CHANGES[change]:  # here, all merges have the same samples in their keys
            same.add(change)
            np.testing.assert_array_equal(other, values, err_msg=change)
    assert {"parameters.budget=2", "parameters.start=stage1", "merge_method=expert_merging", "seed=1"} <= same


def test_more_epochs_go_on_from_fewer(make_plan: Callable[..., Plan]) -> None:
    few, many = make_plan("parameters.epochs=2"), make_plan("parameters.epochs=5")
    one, other = (Keys(plan, known(plan)).steps(steps_of(plan), computing(plan)) for plan in (few, many))
    assert len(set(other)) == len(other) > len(one)
    full = sum(len(step) == few.config.parameters.gradient_accumulation for step in steps_of(few))
    assert one[:full] == other[:full]


def test_steps_from_other_coefficients_have_other_keys(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    starts: list[tuple[list[float], ...]] = [(), ([0.3, 0.4], [0.5, 0.6]), ([0.4, 0.3], [0.5, 0.6])]
    found = [Keys(plan, known(plan)).steps(steps_of(plan), computing(plan), "", start) for start in starts]
    assert len({key for keys in found for key in keys}) == len(starts) * len(found[0])


def test_devices_that_compute_other_bits_have_other_keys(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    before = all_keys(plan)
    steps = changed(before, all_keys(plan, on=computing(plan, batch_tokens=64)))
    assert steps == LEARNING
    assert changed(before, all_keys(plan, on=computing(plan, threads=4))) == MODELS
    gpu = computing(plan, expert=1.0, kinds=["H200"])
    assert changed(before, all_keys(plan, on=gpu)) == MODELS
    assert all_keys(plan, on=gpu) == all_keys(plan, on=computing(plan, expert=2.0, kinds=["H200"]))


def test_models_count_by_their_content_alone(llama_merge: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_merge.parent, tmp_path / "moved")
    here, there = plan_of(llama_merge), plan_of(tmp_path / "moved" / "merge.yaml")
    before = all_keys(here)
    assert all_keys(there) == before
    for folder, expected in (("expert1", MODELS), ("base", {SAMPLES, *MODELS})):
        path = tmp_path / "moved" / folder / ("model.safetensors" if folder == "expert1" else "config.json")
        content = path.read_bytes()
        if folder == "base":
            path.write_text(json.dumps(json.loads(content) | {"note": 1}))
        else:
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        changed_plan = plan_of(tmp_path / "moved" / "merge.yaml")
        after = all_keys(changed_plan)
        assert changed(before, after) >= expected - {VECTORS}  # of whole task vectors, none are stored
        if folder == "expert1":
            assert before[TARGETS][0] == after[TARGETS][0], "the other expert's"  # type: ignore[index]
        path.write_bytes(content)


def test_an_expert_more_leaves_the_targets_of_the_others(tmp_path: Path, make_merge: Callable[..., Path]) -> None:
    three = plan_of(make_merge(experts=3, parameters={"task_vectors": "orthogonal"}))
    config = three.config
    two = replace(three, config=config.model_copy(update={"models": config.models[:2]}), experts=three.experts[:2])
    before, after = all_keys(two), all_keys(three)
    for kind in (SAMPLES, TARGETS):
        assert after[kind][:2] == before[kind]  # type: ignore[index]
    # Joint over all experts, whose number is that of the parts of a matrix.
    assert decomposed(two) and changed(before, after) == {SAMPLES, *MODELS}


def test_without_the_sha_256_of_a_file_there_is_no_key(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    weights = known(plan)
    unknown = Identity(weights.options, weights.versions, {**weights.files, **_without(weights, "expert1/model")})
    keys = all_keys(plan, unknown)
    assert keys[SAMPLES] == all_keys(plan)[SAMPLES]
    assert keys[TARGETS] == [all_keys(plan)[TARGETS][0], None]  # type: ignore[index]
    assert {keys[kind] for kind in (VECTORS, MAGNITUDES, PRIOR, FIRST, SECOND)} == {None}


def _without(of: Identity, part: str) -> dict[str, object]:
    return {name: replace(file, sha256=None) for name, file in of.files.items() if part in name}
