"""The survey of an expert: what one reading gives, what is stored of it, and what happens to it after a fault."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import plan_of
from errors import refused
from object_store import Store
from plain import task_vectors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.expert import Expert
from actors.shard import Shard
from engine.errors import CheckpointError, DamagedError
from engine.methods.arithmetic.matrices import leading_parts
from engine.planning.costs import flops
from engine.planning.open_models import weight_files
from engine.planning.plan import Plan
from engine.run.contents import strangers_in_state
from engine.shards import orthogonal, parts, survey
from engine.shards.orthogonal import file_name, orthogonalise
from engine.shards.parts import compute_parts, load_parts, load_surveyed, parts_file, record_file, tensor_groups
from engine.shards.survey import Survey
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder
from engine.storage.object_folder import ObjectFolder

CPU = torch.device("cpu")
ORTHOGONAL = "parameters.task_vectors=orthogonal"
Q = "model.layers.0.self_attn.q_proj.weight"
pytestmark = pytest.mark.usefixtures("small_groups")


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have several groups of tensors."""
    monkeypatch.setattr(parts, "MATRICES_PER_CALL", 4)
    monkeypatch.setattr(parts, "ELEMENTS_PER_GROUP", 4000)


@pytest.fixture
def mixed(make_merge: Callable[..., Path]) -> Path:
    """The config of three experts: two checkpoints, of which one leaves a matrix as it is, and an adapter."""
    config = make_merge(experts=3, sharded=True)
    shutil.rmtree(config.parent / "expert2")
    torch.manual_seed(0)
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(config.parent / "base")
    peft.get_peft_model(base, options).save_pretrained(str(config.parent / "expert2"))
    for file in (config.parent / "expert1").glob("*.safetensors"):
        tensors = load_file(file)
        if Q in tensors:
            (of_base,) = (t[Q] for f in (config.parent / "base").glob("*.safetensors") if Q in (t := load_file(f)))
            save_file(tensors | {Q: of_base}, file, metadata={"format": "pt"})
    return config


def surveyed(plan: Plan, state: Folder, k: int) -> Survey:
    one = Survey(plan, k, CPU, threads=2)
    one.read(range(len(tensor_groups(plan))), state)
    return one


def survey_all(plan: Plan, state: Folder) -> None:
    for k in range(len(plan.experts)):
        surveyed(plan, state, k)


def files_of(state: Folder, plan: Plan) -> dict[str, bytes]:
    return {name: state.read(file_name(name)) for name in plan.orthogonal}


def made(plan: Plan, state: Folder, threads: int = 2) -> dict[str, bytes]:
    """Make the task vectors orthogonal, group by group, and return the files."""
    wanted = set(plan.orthogonal)
    for group in tensor_groups(plan):
        orthogonalise(plan, task_vectors(plan, threads), state, [name for name in group if name in wanted])
    return files_of(state, plan)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["orthogonal", "whole"])
def test_one_reading_gives_magnitudes_hashes_and_parts(mixed: Path, tmp_path: Path, kind: str) -> None:
    plan, state = plan_of(mixed, f"parameters.task_vectors={kind}"), LocalFolder(tmp_path / "state")
    streams, groups = task_vectors(plan), tensor_groups(plan)
    assert len(groups) > 3 and [name for group in groups for name in group] == list(plan.base_header.tensors)
    expected = streams.inspect(plan.base_header.tensors)
    for k, expert in enumerate(plan.experts):
        surveyed(plan, state, k)
        digests: dict[str, str] = {}
        for number, group in enumerate(groups):
            record = load_surveyed(state, k, number, len(group))
            assert record is not None
            digests |= record.digests
            for name, magnitude in zip(group, record.magnitudes, strict=True):
                assert magnitude == expected[name].magnitudes[k], name
            found = load_parts(plan, state, k, number)
            if plan.orthogonal and found is not None:
                for name in set(group) & set(plan.orthogonal):
                    base, rank = streams.base.read(name), min(plan.base_header.tensors[name].shape) // 3
                    # On the pool, whose operations have one thread, as the survey's.
                    task_vector = streams.experts[k][1].task_vector(name)
                    own = streams.pool.submit(leading_parts, task_vector, base, rank).result()
                    assert (name in found) == (own is not None)
                    assert own is None or all(map(torch.equal, found[name], own))
            else:
                assert not state.exists(parts_file(k, number))
        paths = {file.address: file.path for file in weight_files(expert)}
        assert digests == {file: hashlib.sha256(path.read_bytes()).hexdigest() for file, path in paths.items()}
    assert strangers_in_state(state) == []


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_stored_parts_give_the_same_files_and_are_removed(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(mixed, ORTHOGONAL)
    expected = made(plan, LocalFolder(tmp_path / "without"))
    state = LocalFolder(tmp_path / "state")
    survey_all(plan, state)
    assert len(state.names("parts")) > 4
    monkeypatch.setattr(orthogonal, "compute_parts", None)  # no expert is decomposed again
    assert made(plan, state, threads=1) == expected
    assert state.names("parts") == set()


CHANGES: dict[str, Callable[[LocalFolder, str, str], object]] = {
    "parts cut": lambda state, file, record: state.write(file, state.read(file)[:-1]),
    "parts of another bit": lambda state, file, record: state.write(
        file, (data := state.read(file))[:-1] + bytes([data[-1] ^ 1])
    ),
    "parts empty": lambda state, file, record: state.write(file, b""),
    "parts missing": lambda state, file, record: state.remove(file),
    "record cut": lambda state, file, record: state.write(record, state.read(record)[:-1]),
    "record missing": lambda state, file, record: state.remove(record),
    "both missing": lambda state, file, record: [*map(state.remove, (file, record))],
}


@pytest.mark.parametrize("change", CHANGES)
def test_damaged_parts_are_computed_again_with_the_same_bits(
    make_merge: Callable[..., Path], tmp_path: Path, change: str
) -> None:
    plan, state = plan_of(make_merge(experts=3), ORTHOGONAL), LocalFolder(tmp_path / "state")
    expected = made(plan, LocalFolder(tmp_path / "without"))
    survey_all(plan, state)
    number = next(n for n, group in enumerate(tensor_groups(plan)) if Q in group)
    CHANGES[change](state, parts_file(1, number), record_file(1, number))
    assert load_parts(plan, state, 1, number) is None and load_parts(plan, state, 0, number) is not None
    assert made(plan, state) == expected


def test_a_survey_that_was_cut_off_goes_on(
    make_merge: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, whole, state = plan_of(make_merge(sharded=True), ORTHOGONAL), *map(LocalFolder, (tmp_path / "a", tmp_path))
    survey_all(plan, whole)
    count = len(tensor_groups(plan))
    read: list[str] = []
    measure = Survey._measure

    def measured(self: Survey, name: str) -> object:
        read.append(name)
        return measure(self, name)

    monkeypatch.setattr(Survey, "_measure", measured)
    Survey(plan, 0, CPU, threads=1).read([0, 1], state)
    # The process died; its calls are repeated in another one, one of them after it was stored.
    again = Survey(plan, 0, CPU, threads=2)
    for groups in ([0, 1], range(2, count)):
        again.read(groups, state)
    assert sorted(read) == sorted(plan.base_header.tensors), "no tensor is read twice"
    for name in state.names("survey") | state.names("parts"):
        assert state.read(name) == whole.read(name), name
    state.write(record_file(0, 1), b"")
    Survey(plan, 0, CPU, threads=1).read([1], state)
    assert state.read(record_file(0, 1)) == whole.read(record_file(0, 1)), "a damaged record is written again"


@pytest.mark.parametrize("owner", ["expert1", "base"])
def test_a_weight_that_is_not_finite_is_refused_by_tensor_and_model(
    make_merge: Callable[..., Path], tmp_path: Path, owner: str
) -> None:
    config = make_merge()
    path = config.parent / owner / "model.safetensors"
    tensors = load_file(path)
    tensors[Q][3, 5] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    plan, state = plan_of(config, ORTHOGONAL), LocalFolder(tmp_path / "state")
    where = "the base" if owner == "base" else "expert 'expert1'"
    with refused(CheckpointError, where=where, facts=[Q]):
        surveyed(plan, state, 1)
    files = [file.address for file in weight_files(plan.base)]
    if owner == "base":
        with refused(CheckpointError, where=where, facts=[Q]):
            Shard(plan, 0, state).check_base(files)
    else:
        surveyed(plan, state, 0)
        expected = {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}
        assert Shard(plan, 0, state).check_base(files) == expected


def test_it_works_in_object_storage(llama_merge: Path, store: Store, tmp_path: Path) -> None:
    plan = plan_of(llama_merge, ORTHOGONAL)
    expected = made(plan, LocalFolder(tmp_path / "without"))
    state = ObjectFolder(f"{store.root}/a run{store.options}")
    survey_all(plan, state)
    assert len(state.names("parts")) == 2 * sum(
        not set(group).isdisjoint(plan.orthogonal) for group in tensor_groups(plan)
    )
    assert made(plan, state) == expected
    assert state.names("parts") == set() and strangers_in_state(state) == []
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()], "no copies stay in the cache"


def test_an_actor_surveys_and_computes_targets_in_any_order(
    llama_merge: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, state = plan_of(llama_merge, ORTHOGONAL), LocalFolder(tmp_path / "state")
    numbers = range(len(tensor_groups(plan)))
    actor = Expert(plan, 0)
    found = [actor.survey(k, numbers, state) for k in (0, 1)]
    assert [sorted(records) for records in found] == [list(numbers)] * 2
    monkeypatch.setattr(survey, "compute_parts", None)
    assert Expert(plan, 1).survey(0, numbers, state) == found[0], "what is stored is not computed again"
    inspected = Shard(plan, 0, state).orthogonalise(plan.orthogonal)
    assert set(inspected) == set(plan.orthogonal)
    again = Shard(plan, 0, state).orthogonalise(plan.orthogonal)
    for name, inspection in inspected.items():
        assert (inspection.magnitudes > 0).all()
        np.testing.assert_array_equal(inspection.magnitudes, again[name].magnitudes)


def test_a_record_of_other_tensors_is_refused(llama_merge: Path, tmp_path: Path) -> None:
    plan, state = plan_of(llama_merge), LocalFolder(tmp_path / "state")
    surveyed(plan, state, 0)
    count = len(tensor_groups(plan)[0])
    assert load_surveyed(state, 0, 0, count) is not None and load_surveyed(state, 1, 0, count) is None
    with refused(DamagedError, where=record_file(0, 0)):
        load_surveyed(state, 0, 0, count + 1)


def counted(call: Callable[..., Any], most: list[int]) -> Callable[..., Any]:
    """Return the call, which notes in `most` how many of its calls run at the same time."""
    running, lock = list[None](), threading.Lock()

    def wrapped(*arguments: Any) -> Any:
        with lock:
            running.append(None)
            most.append(len(running))
        try:
            time.sleep(0.01)
            return call(*arguments)
        finally:
            with lock:
                running.pop()

    return wrapped


@pytest.mark.parametrize("at_once", [1, 2])
def test_matrices_in_memory_are_bounded_by_bytes_and_not_by_threads(
    make_merge: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    plan, state = plan_of(make_merge(), ORTHOGONAL), LocalFolder(tmp_path / "state")
    largest = 4 * max(plan.numels[name] for name in plan.orthogonal)
    monkeypatch.setattr(flops, "DECOMPOSING_BYTES", at_once * flops.SVD_COPIES * largest)
    assert [flops.decompositions(plan, cpus) for cpus in (0.5, 1, 96)] == [1, 1, at_once]
    assert flops.orthogonal_bytes(plan, 96) == flops.orthogonal_bytes(plan, at_once)
    surveys, stores = list[int](), list[int]()
    monkeypatch.setattr(survey, "compute_parts", counted(compute_parts, surveys))
    monkeypatch.setattr(orthogonal, "_orthogonal", counted(orthogonal._orthogonal, stores))
    for k in range(2):
        Survey(plan, k, CPU, threads=8).read(range(len(tensor_groups(plan))), state)
    made(plan, state, threads=8)
    assert max(surveys) == max(stores) == at_once


class Gpu:
    """Stands for a GPU: tensors that are moved to it are marked, and stay on the CPU."""

    type = "cuda"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_on_a_gpu_the_task_vector_is_moved_there_and_its_parts_back(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(mixed, ORTHOGONAL)
    streams, gpu, moved = task_vectors(plan), Gpu(), list[torch.Size]()
    to = torch.Tensor.to

    def fake(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if gpu in arguments:
            moved.append(tensor.shape)
            return tensor
        return to(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", fake)
    for k, (_, expert) in enumerate(streams.experts):
        task_vector, base = expert.task_vector(Q), streams.base.read(Q)
        moved.clear()
        on_gpu = compute_parts(plan, task_vector, base, gpu)  # type: ignore[arg-type]
        on_cpu = compute_parts(plan, task_vector, base, CPU)
        assert (on_gpu is None) == (on_cpu is None) == (k == 1)
        if on_gpu is not None and on_cpu is not None:
            assert all(map(torch.equal, on_gpu, on_cpu))
            assert moved == ([(base.shape[0], 4), (4, base.shape[1])] if k == 2 else [base.shape])
    state = LocalFolder(tmp_path / "state")
    orthogonalise(plan, streams, state, plan.orthogonal, device=gpu)  # type: ignore[arg-type]
    assert files_of(state, plan) == made(plan, LocalFolder(tmp_path / "other"))
