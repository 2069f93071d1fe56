"""A run's state: formats without code, damage that is found and computed again, and content that no run wrote."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile_inputs
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import plan_of
from errors import refused
from identities import merge_of
from safetensors import SafetensorError

from engine.calibration.samples import Sample
from engine.errors import DamagedError
from engine.learning.targets import Target, load_target, load_tensors, save_target
from engine.planning.plan import Plan
from engine.run.preparation import check_inputs, prepare
from engine.run.run_folder import RunFolder, open_run
from engine.run.state import StageState, encode_plan, load_plan, plan_digest
from engine.storage.local_folder import LocalFolder
from engine.storage.sealed import seal, write_sealed

SAMPLES = [[Sample(0, 0, (1, 2, 3), "x.jsonl:1", masked_spans=((0, 1),))], [Sample(1, 0, (4, 5), "y.jsonl:1")]]
LEARNER = {"a": torch.ones(2, 3, dtype=torch.float64)}
ROWS = [{"stage": 1, "step": 0, "model": "math", "kl": 0.5, "entropy": None}]
CODE = b"cposix\nsystem\n(S'touch ran'\ntR."


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    with open_run(str(tmp_path / "out"), merge_of("this"), fresh=False) as opened:
        opened.said = []  # type: ignore[attr-defined]
        opened.say = opened.said.append  # type: ignore[attr-defined]
        yield opened


def damage(content: bytes, kind: str) -> bytes:
    return {
        "empty": b"",
        "cut": content[: len(content) // 2],
        "one byte cut": content[:-1],
        "one bit": content[:-1] + bytes([content[-1] ^ 1]),
        "longer": content + b" ",
        "zeros": bytes(len(content)),
        "a pickle": CODE,
        "a sealed pickle": seal(CODE),
        "sealed nonsense": seal(b"\xff{}"),
        "sealed nothing": seal(b""),
        "deep": seal(b"[" * 100_000),
        "huge": seal((2**60).to_bytes(8, "little") + b"{}"),
    }[kind]


KINDS = (
    "empty", "cut", "one byte cut", "one bit", "longer", "zeros", "a pickle", "a sealed pickle", "sealed nonsense",
    "sealed nothing", "deep", "huge",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_reported_and_never_used(
    run: Any, llama_merge: Path, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = plan_of(llama_merge)
    run.keep_samples(SAMPLES)
    run.save_stage(1, StageState(1, LEARNER), ROWS)
    run.keep("magnitudes", np.ones((2, 3)))
    name = run.name()
    assert run.samples(plan) == SAMPLES and run.load_stage(1).steps == 1 and run.kept("magnitudes", (2, 3)) is not None
    assert run.said == []
    files = ("samples.json", "stage-1.safetensors", "magnitudes.safetensors", "name", "metrics/1-000001.json")
    whole = {file: run.state.read(file) for file in files}

    def found(file: str, read: Callable[[], Any]) -> None:
        run.state.write(file, damage(whole[file], kind))
        run.said.clear()
        assert read() is None
        assert len(run.said) == 1 and file in run.said[0]
        run.state.write(file, whole[file])

    found("samples.json", lambda: run.samples(plan))
    found("stage-1.safetensors", lambda: run.load_stage(1))
    found("magnitudes.safetensors", lambda: run.kept("magnitudes", (2, 3), "again"))
    found("metrics/1-000001.json", lambda: run.load_stage(1))
    for file, read in (
        ("magnitudes.safetensors", lambda: run.kept("magnitudes", (2, 3))),
        ("metrics/1-000001.json", run.metrics),
    ):
        run.state.write(file, damage(whole[file], kind))
        with refused(DamagedError, where=file, do="--fresh") as caught:
            read()
        assert caught.value.exit_code == 4
    if "sealed" not in kind:
        run.state.write("name", damage(whole["name"], kind))
        assert run.name() != name
    assert not (tmp_path / "ran").exists()


def test_no_format_is_a_pickle(run: Any, llama_merge: Path) -> None:
    run.keep_plan(plan_of(llama_merge))
    run.keep_samples(SAMPLES)
    run.save_stage(1, StageState(1, LEARNER), ROWS)
    run.keep("prior", np.ones(9))
    save_target(Target(torch.tensor([1, 2])), run.state, "targets/0-0.safetensors")
    run.keep_devices({"trainer": 1, "expert": 1, "threads": 8, "kinds": []})
    for name in run.state.names() - {"lock"}:
        with pytest.raises(pickle.UnpicklingError):
            pickle.loads(run.state.read(name))
    with pytest.raises(SafetensorError):
        run.keep("objects", np.array([object()]))


def changed(**values: Any) -> list[list[Sample]]:
    return [[dataclasses.replace(SAMPLES[0][0], **values)], SAMPLES[1]]


@pytest.mark.parametrize(
    "samples",
    [
        [],
        SAMPLES[:1],
        SAMPLES[::-1],
        changed(index=1),
        changed(input_ids=()),
        changed(input_ids=(-1, 2)),
        changed(input_ids=(10**9,)),
        changed(input_ids=(1,) * 100_000),
        changed(generate=-1),
        changed(generate=10**9),
        changed(cut=-1),
        changed(masked_spans=((0, 10**12),)),
        changed(masked_spans=((2, 1),)),
        changed(loss_weight=-1.0),
        changed(loss_weight=math.nan),
        changed(loss_weight=math.inf),
    ],
)
def test_samples_that_this_plan_cannot_have_are_prepared_again(
    run: Any, llama_merge: Path, samples: list[list[Sample]]
) -> None:
    run.keep_samples(samples)
    assert run.samples(plan_of(llama_merge)) is None
    assert len(run.said) == 1 and "samples.json" in run.said[0]


def test_samples_without_their_pixel_inputs_are_prepared_again(run: Any, llama_merge: Path) -> None:
    plan, samples = plan_of(llama_merge), changed(inputs=True)
    name = run.inputs(samples[0][0])
    pixels = Target(torch.tensor([1]), inputs={"pixel_values": torch.ones(2)})
    run.keep_samples(samples)
    assert run.samples(plan) is None
    save_target(pixels, run.state, name)
    assert run.samples(plan) == samples
    run.state.write(name, run.state.read(name)[:-1])
    assert run.samples(plan) is None


DEVICES: dict[str, Any] = {"trainer": 1.0, "expert": 0.25, "threads": 8, "kinds": ["H100"]}
DEVICES |= {"factors": "auto", "gradients": "stream", "batch_tokens": 4096, "logit_bytes": 1 << 30}


def test_devices_are_kept(run: Any) -> None:
    assert run.load_devices() is None
    run.keep_devices(DEVICES)
    assert run.load_devices() == DEVICES


@pytest.mark.parametrize(
    "given",
    [{}, [], {"trainer": 1}]
    + [DEVICES | {key: value} for key in ("trainer", "expert", "threads") for value in (-1, "many", None, math.inf)]
    + [
        DEVICES | {"threads": 10**9},
        DEVICES | {"threads": math.nan},
        DEVICES | {"kinds": 3},
        DEVICES | {"factors": "some"},
        *(DEVICES | {key: value} for key in ("batch_tokens", "logit_bytes") for value in (0, -1, 1.5, True, None)),
        DEVICES | {"gradients": "auto"},
    ],
)
def test_devices_that_no_run_has_are_refused(run: Any, given: Any) -> None:
    run.keep_devices(given)
    with refused(DamagedError, where="devices.json", do="--fresh"):
        run.load_devices()


def test_damaged_samples_are_prepared_again_alike(run: Any, llama_merge: Path) -> None:
    plan, records = check_inputs(plan_of(llama_merge))
    first = prepare(plan, records, run)
    run.state.write("samples.json", b"")
    assert prepare(plan, records, run) == first == run.samples(plan)


@pytest.mark.parametrize("state", [StageState(2, LEARNER), StageState(0, LEARNER)])
def test_a_state_needs_the_metrics_of_all_its_steps(run: Any, state: StageState) -> None:
    run.save_stage(1, state, ROWS)
    found = run.load_stage(1)
    assert found is None if state.steps == 2 else found is not None


def plans(config: Path) -> Iterator[Plan]:
    yield plan_of(config)
    own = ["models.0.parameters.weight=null", "parameters.weight=auto", "cluster.trainer.labels={a: b}"]
    yield plan_of(config, *own, "max_shard_size=1MB", "log_with=wandb", "calibration.image_options={a: 1, b: true}")
    yield plan_of(config, "merge_method=ties", "models.1.parameters={weight: 0.2, density: [0.1, 0.9]}")
    plan = plan_of(config)
    odd = {"nan": math.nan, "inf": -math.inf, "big": 10**40, "none": None, "nested": [{"a": [1, 2.5, "x"]}]}
    header = dataclasses.replace(plan.base_header, config=plan.base_header.config | odd)
    yield dataclasses.replace(plan, base=dataclasses.replace(plan.base, header=header), images=(("/a b", "/c"), ()))


def test_a_plan_is_the_same_after_it_was_stored(run: Any, make_merge: Callable[..., Path]) -> None:
    config = make_merge()
    stored = list(plans(config))
    hostile_inputs.adapter(config.parent)
    for plan in (*stored, plan_of(config)):
        run.keep_plan(plan)
        loaded = load_plan(run.state, plan_digest(plan))
        # By text, because NaN differs from itself.
        assert repr(loaded) == repr(plan)
        assert encode_plan(loaded) == encode_plan(plan)


def test_a_plan_that_is_not_the_driver_s_is_refused(run: Any, llama_merge: Path) -> None:
    """Who may write to the bucket could else allow code of a model to run on the nodes."""
    plan = plan_of(llama_merge)
    digest = plan_digest(plan)
    with refused(DamagedError, where="plan.json"):
        load_plan(run.state, digest)
    changed = json.loads(encode_plan(plan))
    changed["config"]["trust_remote_code"] = True
    for content in (seal(json.dumps(changed).encode()), seal(encode_plan(plan))[:-1], CODE, b""):
        run.state.write("plan.json", content)
        with refused(DamagedError, where="plan.json", do="--fresh"):
            load_plan(run.state, digest)


IDS = torch.tensor([1, 2, 3])


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"input_ids": IDS.float()},
        {"input_ids": IDS[None]},
        {"input_ids": -IDS},
        {"input_ids": IDS, "counted": torch.tensor([3])},
        {"input_ids": IDS, "counted": torch.tensor([0.5])},
        {"input_ids": IDS, "logits": torch.ones(2, 8)},
        {"input_ids": IDS, "last_hidden": torch.ones(3)},
        {"input_ids": IDS, "hidden.1": torch.ones(3, 4, dtype=torch.int64)},
        {"input_ids": IDS, "hidden.x": torch.ones(3, 4)},
        {"input_ids": IDS, "counted": torch.tensor([0, 2]), "logits": torch.ones(3, 8)},
    ],
)
def test_tensors_that_are_no_target_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder = LocalFolder(tmp_path)
    write_sealed(folder, "x", safetensors.torch.save(tensors))
    with refused(DamagedError, where=f"{tmp_path}/x"):
        load_target(folder, "x")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_target_is_refused(tmp_path: Path, kind: str) -> None:
    folder = LocalFolder(tmp_path)
    save_target(Target(IDS, last_hidden_CH=torch.ones(3, 4)), folder, "x")
    folder.write("x", damage(folder.read("x"), kind))
    with refused(DamagedError, where=f"{tmp_path}/x"):
        load_target(folder, "x")


def test_a_shard_finds_damaged_targets(llama_merge: Path, tmp_path: Path) -> None:
    from actors.shard import Shard

    shard, folder = Shard(plan_of(llama_merge), 0), LocalFolder(tmp_path)
    for name in ("good", "bad"):
        save_target(Target(IDS), folder, name)
    folder.write("bad", folder.read("bad")[:-1])
    assert shard.damaged(folder, ["good", "bad"]) == {"good": False, "bad": True}


def test_token_ids_beyond_the_vocabulary_are_found(run: Any, llama_merge: Path) -> None:
    from actors.shard import Shard

    plan = plan_of(llama_merge)
    most, samples = plan.base_header.vocab_size, changed(inputs=True)
    assert most is not None
    shard, name = Shard(plan, 0), run.inputs(samples[0][0])
    run.keep_samples(samples)
    for last, damaged in ((most - 1, False), (most, True)):
        save_target(Target(torch.tensor([1, last]), inputs={"pixel_values": torch.ones(2)}), run.state, name)
        assert shard.damaged(run.state, [name]) == {name: damaged}
        assert (run.samples(plan) is None) == damaged
    with refused(DamagedError, where=name, do="--fresh"):
        load_tensors(run.state, [name], most)
