"""The run's folders, on a disk and in object storage: locks, states left by a stop, and the finished output."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import object_store
import pytest
import torch
from conftest import plan_of
from errors import refused
from identities import merge_of, record_of
from thorough import as_thorough

import engine.storage.lease
from engine.calibration.samples import Sample
from engine.errors import DamagedError, OutputError, RunError, StorageError
from engine.evaluation.results import Row, save_results
from engine.run.contents import MANIFEST
from engine.run.identity import Identity
from engine.run.ownership import MARKER, RECORD, RECORDED_IDENTITY, SCORES, mark
from engine.run.run_folder import RunFolder, check_output, open_run
from engine.run.state import StageState, load_plan, plan_digest
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder
from engine.storage.object_folder import ObjectFolder
from engine.storage.paths import open_folder
from engine.storage.sealed import seal

ROWS = [{"stage": 1, "step": 0, "model": "math", "kl": 0.5}]
MODEL = ["model.safetensors"]
FILES = ["model.safetensors", "config.json", "tokenizer.json"]
THIS, OTHER, THIRD = map(merge_of, ("this", "other", "third"))


@dataclass(frozen=True)
class Place:
    """An output, and the folder that contains it and the state of its run."""

    out: str
    parent: Folder

    @property
    def on_disk(self) -> bool:
        return isinstance(self.parent, LocalFolder)

    @property
    def output(self) -> Folder:
        return open_folder(self.out)

    def holds(self, *names: str) -> bool:
        """Return whether output and run consist of exactly these files, on a disk without other folders."""
        folders = {path.name for path in self.parent.path.iterdir()} if isinstance(self.parent, LocalFolder) else set()
        return self.parent.names() == set(names) and folders <= {name.partition("/")[0] for name in names}


# In the fast set, the tests with the fixture `objects` are those of object storage.
@pytest.fixture(params=["disk", as_thorough("objects")])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    parent = tmp_path / "parent"
    parent.mkdir()
    if request.param == "disk":
        return Place(str(parent / "merged"), LocalFolder(parent))
    monkeypatch.setattr(engine.storage.lease, "RENEWAL", 0.1)
    monkeypatch.setattr(engine.storage.lease, "SETTLING", 0)
    store = object_store.new_store(request.getfixturevalue("server"), monkeypatch, tmp_path / "cache")
    return Place(f"{store.root}/parent/merged", ObjectFolder(f"{store.root}/parent"))


@pytest.fixture
def objects(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Place:
    monkeypatch.setattr(engine.storage.lease, "SETTLING", 0)
    store = object_store.new_store(server, monkeypatch, tmp_path / "cache")
    return Place(f"{store.root}/merged", ObjectFolder(store.root))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "merged"


def record(folder: Folder, merge: Identity) -> None:
    """Mark an output as this merge."""
    for file, text in record_of(merge, FILES).items():
        folder.write(file, text.encode())


def complete(folder: Folder, merge: Identity) -> None:
    """Write an output of this merge with all of its files."""
    for file in FILES:
        folder.write(file, b"of the merge")
    record(folder, merge)


def computed(run: RunFolder) -> None:
    """Store a target, as a merge does that has begun to compute."""
    run.state.write(run.target(Sample(0, 0, (1, 2), "x.jsonl:1")), b"a target")


@pytest.mark.parametrize("fresh", [False, True])
def test_a_missing_or_empty_folder_may_be_used(place: Place, fresh: bool) -> None:
    assert not check_output(place.out, THIS, fresh)
    if place.on_disk:
        Path(place.out).mkdir()
        assert not check_output(place.out, THIS, fresh)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "merge/notes.txt"])
def test_a_folder_that_holds_something_else_is_refused_even_with_fresh(place: Place, name: str, fresh: bool) -> None:
    place.output.write(name, b"mine")
    with refused(OutputError, where=place.out, do="--out") as caught:
        check_output(place.out, THIS, fresh)
    assert caught.value.where == place.out and caught.value.exit_code == 2
    assert "--fresh" not in caught.value.do and place.output.read(name) == b"mine"


def test_a_file_in_place_of_the_output_folder_is_refused(disk: Path) -> None:
    disk.write_text("mine")
    with refused(OutputError, where=str(disk), do="--out") as caught:
        check_output(str(disk), THIS, fresh=True)
    assert "--fresh" not in caught.value.do


def test_a_complete_merge_is_not_repeated_without_fresh(place: Place) -> None:
    complete(place.output, THIS)
    assert check_output(place.out, THIS, fresh=False)
    assert not check_output(place.out, THIS, fresh=True)


def test_a_complete_merge_that_lost_a_file_is_not_taken_for_done(place: Place) -> None:
    complete(place.output, THIS)
    place.output.remove("model.safetensors")
    with refused(OutputError, where=place.output.where, do="--fresh", facts=["'model.safetensors'"]):
        check_output(place.out, THIS, fresh=False)
    assert not check_output(place.out, THIS, fresh=True)


@pytest.mark.parametrize(
    "content",
    [
        b"record: {identity: other}",
        b"record: {}",
        b"record: text",
        b"record: [identity]",
        b"record:",
        b"merge_method: expert_merging",
        b"- a list",
        b"",
        b"not: [valid",
        b"\xff\xfe",
    ],
)
def test_another_merge_is_refused_without_fresh(disk: Path, content: bytes) -> None:
    LocalFolder(disk).write(RECORD, content)
    with refused(OutputError, where=str(disk), do="--fresh"):
        check_output(str(disk), THIS, fresh=False)
    assert not check_output(str(disk), THIS, fresh=True)


def test_a_run_folder_is_next_to_its_output(place: Place) -> None:
    with open_run(place.out, THIS, fresh=False) as run:
        assert run.out == place.out and run.state.where == f"{place.out}.run"
        assert place.holds(*(f"merged.run/{name}" for name in ("claim.json", "identity.json", "lock", MARKER)))
        run.start_output(MODEL)
        assert run.weights.where == (f"{place.out}.run/output" if place.on_disk else place.out)
        assert run.composed.is_dir()


def test_options_of_an_address_stay_at_its_end() -> None:
    run = RunFolder("s3://bucket/a/merged?region=x")
    assert run.state.where == "s3://bucket/a/merged.run?region=x"
    assert run.weights.where == run.out == "s3://bucket/a/merged?region=x"


@pytest.mark.parametrize(
    ("out", "instead"),
    [
        ("s3://bucket", "s3://bucket/folder"),
        ("s3://bucket/", "s3://bucket/folder"),
        ("gs://bucket?scheme=http", "gs://bucket/folder?scheme=http"),
    ],
)
def test_a_whole_bucket_is_no_output(out: str, instead: str) -> None:
    with refused(OutputError, where=out) as caught:
        check_output(out, THIS, fresh=True)
    assert caught.value.expected == instead


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_computed_nothing_leaves_nothing_behind(place: Place, fails: bool, llama_merge: Path) -> None:
    def begin() -> None:
        with open_run(place.out, THIS, fresh=False) as run:
            run.keep_plan(plan_of(llama_merge))
            run.keep_devices({"trainer": 0, "expert": 0, "threads": 2, "kinds": []})
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            begin()
    else:
        begin()
    assert place.holds()


def test_a_run_that_failed_keeps_its_log_until_the_next_start(place: Place) -> None:
    log = RunFolder(place.out).log

    def fail(error: BaseException) -> None:
        with open_run(place.out, THIS, fresh=False):
            assert not log.exists()
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("an actor died")
            raise error

    for error, kept in ((RunError("x"), True), (KeyboardInterrupt(), False)):
        with pytest.raises(type(error)):
            fail(error)
        assert log.exists() == kept


def test_a_run_with_results_is_kept_for_the_next_start(place: Place) -> None:
    with open_run(place.out, THIS, fresh=False) as run:
        assert not run.computed()
        computed(run)
        assert run.computed()
        run.save_stage(1, StageState(1, {"a": torch.ones(2)}), ROWS)
        run.keep("magnitudes", np.eye(3, dtype=np.float32))
    assert RunFolder(place.out).exists()
    with open_run(place.out, THIS, fresh=False) as run:
        assert run.stored_targets() == {run.target(Sample(0, 0, (), ""))} == {"targets/0-0.safetensors"}
        assert run.state.read(run.target(Sample(0, 0, (), ""))) == b"a target"
        assert run.load_stage(1) is not None
        assert run.metrics() == ROWS
        kept = run.kept("magnitudes", (3, None))
        assert kept is not None and kept.dtype == np.float32 and np.array_equal(kept, np.eye(3))
        assert run.kept("others", ()) is None


def test_every_sample_has_its_own_target_file(disk: Path) -> None:
    run = RunFolder(str(disk))
    names = {run.target(Sample(expert, index, (), "")) for expert in range(12) for index in range(12)}
    assert len(names) == 144
    assert all(name.startswith("targets/") for name in names)


def test_the_plan_is_kept_in_the_run_s_state(place: Place, llama_merge: Path) -> None:
    plan = plan_of(llama_merge)
    with open_run(place.out, THIS, fresh=False) as run:
        run.keep_plan(plan)
        assert load_plan(run.state, plan_digest(plan)) == plan


def test_the_state_of_another_merge_is_refused_and_kept(place: Place) -> None:
    with open_run(place.out, OTHER, fresh=False) as run:
        computed(run)
    before = run.state.names()
    with refused(OutputError, where=run.state.where, do="--fresh"), open_run(place.out, THIS, fresh=False):
        pass
    assert run.state.names() == before
    with open_run(place.out, OTHER, fresh=False) as again:
        assert again.stored_targets() == {"targets/0-0.safetensors"}


def test_a_state_with_a_damaged_identity_is_kept_until_fresh(place: Place) -> None:
    with open_run(place.out, THIS, fresh=False) as run:
        computed(run)
    run.state.write("identity.json", b"")
    for _ in range(2):
        with refused(DamagedError, where="identity.json", do="--fresh") as caught, open_run(place.out, THIS, False):
            pass
        assert "same command" not in caught.value.do and run.stored_targets()
    with open_run(place.out, THIS, fresh=True) as run:
        assert not run.stored_targets()


def test_fresh_discards_the_state_of_an_earlier_start(place: Place) -> None:
    with open_run(place.out, OTHER, fresh=False) as run:
        computed(run)
        run.save_stage(1, StageState(1, {}), ROWS)
        run.start_output(MODEL)
        run.weights.write("model.safetensors", b"of the other")
    with open_run(place.out, THIS, fresh=True) as run:
        assert run.state.names() == {"claim.json", "identity.json", "lock", MARKER} and place.output.names() == set()
        assert run.load_stage(1) is None and run.metrics() == [] and run.written() == set()
        computed(run)
    with open_run(place.out, THIS, fresh=False) as run:
        assert run.stored_targets() == {"targets/0-0.safetensors"}


def test_state_without_an_identity_is_discarded(place: Place) -> None:
    """A process that lost its connection may still write after its run has ended."""
    run = RunFolder(place.out)
    mark(run.state)
    computed(run)
    if place.on_disk:
        run.weights.write("model.safetensors", b"of whatever")
    with open_run(place.out, THIS, fresh=False) as run:
        assert run.stored_targets() == set() and run.written() == set()


def contents(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read(name) for name in folder.names()}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "ckpt/step1.bin", "lock", "targets/0-0.safetensors", "identity.json"])
def test_a_state_folder_that_is_not_ours_is_refused_and_untouched(place: Place, name: str, fresh: bool) -> None:
    state = RunFolder(place.out).state
    state.write(name, b"months of work")
    before = contents(place.parent)
    for act in (check_output, open_run):
        with refused(OutputError, where=state.where, do="--out", facts=[repr(name), MARKER]) as caught:
            result = act(place.out, THIS, fresh)
            result.__enter__() if not isinstance(result, bool) else None
        assert "--fresh" not in caught.value.do
    assert contents(place.parent) == before


def test_a_state_folder_of_folders_and_links_is_refused_and_untouched(disk: Path) -> None:
    state = disk.with_name("merged.run")
    for make in (lambda: (state / "empty").mkdir(), lambda: (state / "link").symlink_to("/nowhere")):
        state.mkdir()
        make()
        with refused(OutputError, where=str(state)), open_run(str(disk), THIS, fresh=True):
            pass
        assert len(list(state.iterdir())) == 1
        for path in state.iterdir():
            path.unlink() if path.is_symlink() else path.rmdir()
        state.rmdir()


@pytest.mark.parametrize("link", [False, True])
def test_a_file_or_a_link_in_place_of_the_state_folder_is_refused(disk: Path, link: bool) -> None:
    state, other = disk.with_name("merged.run"), disk.with_name("other")
    other.mkdir()
    state.symlink_to(other) if link else state.write_text("mine")
    with refused(OutputError, where=str(state), do="--out"), open_run(str(disk), THIS, fresh=True):
        pass
    assert state.is_symlink() == link and not list(other.iterdir())


def test_an_object_in_place_of_the_state_folder_is_refused(objects: Place) -> None:
    objects.parent.write("merged.run", b"mine")
    with refused(OutputError, where="merged.run", do="--out"), open_run(objects.out, THIS, fresh=True):
        pass
    assert objects.holds("merged.run")


@pytest.mark.parametrize("marker", [b'{"format": 999}', b"{}", b"[]", b"", b"\xff"])
def test_a_state_of_another_format_is_refused_and_untouched(place: Place, marker: bytes) -> None:
    state = RunFolder(place.out).state
    state.write(MARKER, marker)
    state.write("targets/0-0.safetensors", b"hours of work")
    before = contents(place.parent)
    with refused(OutputError, where=state.where), open_run(place.out, THIS, fresh=True):
        pass
    assert contents(place.parent) == before


def test_an_empty_folder_for_the_state_is_used(disk: Path) -> None:
    disk.with_name("merged.run").mkdir()
    with open_run(str(disk), THIS, fresh=False) as run:
        computed(run)
    assert run.exists()


def test_the_marker_is_written_first_and_removed_last(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(place.parent)
    acts: list[tuple[str, str]] = []
    for act in ("write", "remove"):
        inner = getattr(kind, act)

        def watched(self: Any, name: str, *rest: Any, act: str = act, inner: Callable[..., Any] = inner) -> None:
            if self.where.endswith(".run") and name != "lock":
                acts.append((act, name))
            inner(self, name, *rest)

        monkeypatch.setattr(kind, act, watched)
    with open_run(place.out, THIS, fresh=False) as run:
        computed(run)
        assert acts[0] == ("write", MARKER)
        acts.clear()
        run.discard()
        removed = list(acts)
    assert removed[0] == ("remove", "identity.json") and removed[-2:] == [("remove", "claim.json"), ("remove", MARKER)]


def test_a_state_that_was_half_removed_is_not_resumed(place: Place) -> None:
    with open_run(place.out, THIS, fresh=False) as run:
        computed(run)
        run.state.remove("identity.json")
    with open_run(place.out, THIS, fresh=False) as run:
        assert run.stored_targets() == set()


def try_to_open(out: str, fresh: bool) -> None:
    with refused(OutputError, where=RunFolder(out).state.where) as caught, open_run(out, THIS, fresh=fresh):
        pass
    assert "--fresh" not in caught.value.do


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_of_the_same_process_is_not_joined(place: Place, fresh: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine the first run may not renew its lease for a while.
    monkeypatch.setattr(engine.storage.lease, "PATIENCE", 200)
    with open_run(place.out, THIS, fresh=False) as run:
        computed(run)
        try_to_open(place.out, fresh)
        thread_failed: list[BaseException] = []

        def in_a_thread() -> None:
            try:
                try_to_open(place.out, fresh)
            except BaseException as error:
                thread_failed.append(error)
                raise

        thread = threading.Thread(target=in_a_thread)
        thread.start()
        thread.join()
        assert not thread_failed
        assert run.stored_targets() == {"targets/0-0.safetensors"}


# Imports storage alone: the imports of a run folder take seconds.
HOLD = """
import sys
import engine.storage.lease, engine.storage.object_folder, engine.storage.paths
engine.storage.lease.RENEWAL, engine.storage.lease.SETTLING = 0.1, 0
state = engine.storage.paths.open_folder(sys.argv[1])
with state.locked():
    state.write("expert-merging-run.json", b'{"format": 1}')
    state.write("identity.json", bytes.fromhex(sys.argv[2]))
    state.write("targets/0-0.safetensors", b"a target")
    print("held", flush=True)
    input()
"""


def hold(place: Place) -> subprocess.Popen[str]:
    """Start another process that holds the lock of the run."""
    command = [sys.executable, "-c", HOLD, RunFolder(place.out).state.where, seal(THIS.encode()).hex()]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    return other


def test_a_run_of_another_process_is_not_joined_until_it_ends(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.storage.lease, "PATIENCE", 200)
    with hold(place) as other:
        for fresh in (False, True):
            try_to_open(place.out, fresh)
        other.communicate("\n")
    with open_run(place.out, THIS, fresh=False) as run:
        assert run.stored_targets() == {"targets/0-0.safetensors"}


def test_the_run_of_a_killed_process_is_taken_over(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.storage.lease, "PATIENCE", 3)
    with hold(place) as other:
        other.kill()
    with open_run(place.out, THIS, fresh=False) as run:
        assert run.stored_targets() == {"targets/0-0.safetensors"}
        run.save_stage(1, StageState(1, {}), ROWS)


def test_a_run_that_was_taken_over_stops_writing(objects: Place) -> None:
    run = RunFolder(objects.out)

    def go_on() -> None:
        with open_run(objects.out, THIS, fresh=False) as run:
            computed(run)
            run.state.write("lock", b"another's")
            for act in (lambda: run.start_output(MODEL), run.finish, run.discard):
                with refused(StorageError, where=run.state.where):
                    act()
            run.save_stage(1, StageState(1, {}), ROWS)

    with refused(StorageError, where=run.state.where) as caught:
        go_on()
    assert caught.value.exit_code == 4
    assert run.load_stage(1) is None and run.metrics() == []
    assert run.state.read("lock") == b"another's" and run.stored_targets() == {"targets/0-0.safetensors"}


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    out = str(tmp_path / "file" / "merged")
    with refused(OutputError, where=out), open_run(out, THIS, fresh=False):
        pass


def test_a_storage_that_refuses_is_an_output_error(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.storage.lease, "SETTLING", 0)
    store = object_store.new_store(server, monkeypatch, tmp_path)
    with store.fault("refuse-all"), refused(OutputError, facts=["ACCESS_DENIED"]):
        check_output(f"{store.root}/merged", THIS, fresh=False)
    assert not check_output("s3://no-such-bucket/merged", THIS, fresh=False)
    with (
        refused(OutputError, facts=["NO_SUCH_BUCKET"]),
        open_run("s3://no-such-bucket/merged", THIS, fresh=False),
    ):
        pass


def test_the_last_saved_state_of_a_stage_is_loaded(place: Place) -> None:
    with open_run(place.out, THIS, fresh=False) as run:
        assert run.load_stage(1) is None
        for steps in (1, 2, 3):
            learner = {"a": torch.full((2, 3), float(steps), dtype=torch.float64), "step": torch.tensor(steps)}
            run.save_stage(1, StageState(steps, learner), ROWS)
        run.save_stage(2, StageState(1, {"a": torch.zeros(1)}), ROWS)
        found = run.load_stage(1)
        assert found is not None and found.steps == 3
        assert found.learner is not None and found.learner["step"] == 3
        assert torch.equal(found.learner["a"], torch.full((2, 3), 3.0, dtype=torch.float64))
        second = run.load_stage(2)
        assert second is not None and second.steps == 1


def test_a_half_written_state_is_ignored(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_run(str(disk), THIS, fresh=False) as run:
        run.save_stage(1, StageState(1, {"a": torch.ones(1)}), ROWS)
        with monkeypatch.context() as patched:
            patched.setattr("os.fsync", full)
            with refused(StorageError, facts=[os.strerror(errno.ENOSPC)]):
                run.save_stage(1, StageState(2, {"a": torch.zeros(1)}), ROWS)
        found = run.load_stage(1)
        assert found is not None and found.steps == 1


def test_metrics_are_ordered_by_stage_and_step_and_a_repeated_step_counts_once(disk: Path) -> None:
    with open_run(str(disk), THIS, fresh=False) as run:
        for stage in (2, 1):
            for steps in (*range(12, 0, -1), 5):
                rows = [{"stage": stage, "step": steps - 1, "sample": sample} for sample in range(2)]
                run.save_stage(stage, StageState(steps, None), rows)
        run.save_stage(1, StageState(3, None), [{"stage": 1, "step": 2, "sample": 7}])
        found = [(row["stage"], row["step"], row["sample"]) for row in run.metrics()]
    wanted = [(stage, step, sample) for stage in (1, 2) for step in range(12) for sample in range(2)]
    wanted[4:6] = [(1, 2, 7)]
    assert found == wanted


def test_a_restart_keeps_only_complete_weight_files_of_this_run(place: Place) -> None:
    with open_run(place.out, THIS, fresh=False) as run:
        run.start_output(["model-00001-of-00002.safetensors", "math/model.safetensors"])
        run.weights.write("model-00001-of-00002.safetensors", b"whole")
        run.weights.child("math").write("model.safetensors", b"whole")
        (run.composed / "config.json").write_text("{}")
        (run.composed / "merge" / "half.parquet").write_text("half")
        if place.on_disk:
            (run.composed / f".{'0' * 32}.part").write_text("of a writer that died")
    with open_run(place.out, THIS, fresh=False) as run:
        run.start_output(MODEL)
        assert run.written() == {"model-00001-of-00002.safetensors", "math/model.safetensors"}
        assert run.weights.names() == run.written()
        assert not [path for path in run.composed.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
        assert place.output.names() == (set() if place.on_disk else run.written())
    assert not check_output(place.out, THIS, fresh=False)
    assert not check_output(place.out, THIS, fresh=True)


def finish(place: Place, content: bytes, **files: str) -> None:
    with open_run(place.out, THIS, fresh=True) as run:
        computed(run)
        run.start_output(MODEL)
        run.weights.write("model.safetensors", content)
        (run.composed / "config.json").write_text("{}")
        (run.composed / "tokenizer.json").write_text("{}")
        for name, text in (record_of(THIS, [*FILES, *files]) | files).items():
            (run.composed / name).write_text(text)
        run.finish()
    assert not run.composed.exists() and not run.exists()


OUTPUT = tuple(
    f"merged/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", *record_of(THIS, []))
)


def test_a_finished_run_leaves_only_its_output(place: Place) -> None:
    if place.on_disk:
        Path(place.out).mkdir()
    finish(place, b"new")
    assert place.holds(*OUTPUT)
    assert check_output(place.out, THIS, fresh=False)


def test_partial_files_of_dead_writers_are_not_in_the_output(disk: Path) -> None:
    place = Place(str(disk), LocalFolder(disk.parent))
    finish(place, b"new", **{f".{'0' * 32}.part": "of a shard that was killed"})
    assert {path.name for path in disk.iterdir()} == {"config.json", "merge", "model.safetensors", "tokenizer.json"}


def test_a_finished_run_replaces_an_earlier_merge_completely(place: Place) -> None:
    more = "model-00007-of-00007.safetensors"
    finish(place, b"old", **{more: "of the old one", RECORD: record_of(THIS, [*FILES, more])[RECORD]})
    finish(place, b"new")
    assert place.holds(*OUTPUT)
    assert place.output.read("model.safetensors") == b"new"


def test_on_a_disk_the_earlier_merge_stays_until_the_new_one_is_complete(disk: Path) -> None:
    place = Place(str(disk), LocalFolder(disk.parent))
    finish(place, b"old")
    with open_run(place.out, THIS, fresh=False) as run:
        computed(run)
        run.start_output(MODEL)
        run.weights.write("model.safetensors", b"new")
        assert place.output.read("model.safetensors") == b"old"
    assert place.output.read("model.safetensors") == b"old"


@pytest.mark.parametrize("name", ["thesis.txt", "merge/evaluation.parquet", "model.safetensors.bak", "own/a.txt"])
def test_fresh_replaces_no_folder_that_holds_more_than_the_merge(place: Place, name: str) -> None:
    finish(place, b"old")
    place.output.write(name, b"years of work")
    before = contents(place.parent)
    with refused(OutputError, where=place.out, do="--out", facts=[repr(name)]) as caught:
        check_output(place.out, OTHER, fresh=True)
    assert "--fresh" not in caught.value.do
    with refused(OutputError, where=place.out, do="--out") as caught:
        check_output(place.out, OTHER, fresh=False)
    assert "--fresh" not in caught.value.do
    assert contents(place.parent) == before
    assert check_output(place.out, THIS, fresh=False), "it holds this merge all the same"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_fresh_replaces_no_file_that_was_changed_after_the_merge(place: Place, name: str) -> None:
    finish(place, b"old")
    whole = place.output.read(name)
    place.output.write(name, b"a week of training")
    before = contents(place.parent)
    with refused(OutputError, where=place.out, do="move", facts=[repr(name)]):
        check_output(place.out, OTHER, fresh=True)
    assert contents(place.parent) == before
    place.output.write(name, whole)
    assert not check_output(place.out, OTHER, fresh=True), "a copy of what the merge wrote"
    with open_run(place.out, OTHER, fresh=True) as run:
        computed(run)
        place.output.write(name, b"a week of training")
        with refused(OutputError, where=place.out, do="same command", facts=[repr(name)]):
            run.start_output(MODEL)
            run.finish()
        assert place.output.read(name) == b"a week of training"
        place.output.remove(name)
        run.start_output(MODEL)
        run.finish()


def test_a_file_of_the_user_in_the_state_is_neither_removed_nor_passed_over(place: Place) -> None:
    with open_run(place.out, THIS, fresh=False) as run:
        computed(run)
        run.start_output(MODEL)
        for name in ("notes.txt", "targets/notes.txt"):
            run.state.write(name, b"mine")
        run.weights.write("model.safetensors", b"new")
        run.finish()
    state = RunFolder(place.out).state
    kept = {name: state.read(name) for name in state.names() - {"lock"}}
    assert kept == {"notes.txt": b"mine", "targets/notes.txt": b"mine"}
    with refused(OutputError, where=state.where, facts=["'notes.txt'", "'targets/notes.txt'"]):
        check_output(place.out, THIS, fresh=True)


def test_a_file_of_the_user_in_the_state_of_a_stopped_run_is_named(place: Place) -> None:
    with open_run(place.out, THIS, fresh=False) as run:
        computed(run)
    run.state.write("notes.txt", b"mine")
    for fresh in (False, True):
        with refused(OutputError, where=run.state.where, do="move", facts=["'notes.txt'"]):
            check_output(place.out, THIS, fresh)
    run.state.remove("notes.txt")
    with open_run(place.out, THIS, fresh=False) as run:
        assert run.stored_targets()


def test_fresh_replaces_the_scores_of_the_earlier_merge(place: Place) -> None:
    finish(place, b"old")
    save_results([Row("merged", "math", "f1", 0.5, 3)], place.output, SCORES)
    assert check_output(place.out, THIS, fresh=False), "it holds this merge all the same"
    assert not check_output(place.out, OTHER, fresh=True)
    with open_run(place.out, OTHER, fresh=True) as run:
        computed(run)
        run.start_output(MODEL)
        run.weights.write("model.safetensors", b"new")
        run.finish()
    assert not place.output.exists(SCORES) and place.output.read("model.safetensors") == b"new"


def test_a_link_to_scores_is_somebody_else_s(disk: Path) -> None:
    place = Place(str(disk), LocalFolder(disk.parent))
    finish(place, b"old")
    save_results([Row("merged", "math", "f1", 0.5, 3)], place.parent, "mine.parquet")
    (disk / SCORES).symlink_to("../../mine.parquet")
    with refused(OutputError, where=str(disk), facts=[repr(SCORES)]):
        check_output(str(disk), OTHER, fresh=True)


@pytest.mark.parametrize("name", [MANIFEST, RECORDED_IDENTITY])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_folder_in_place_of_a_file_about_the_output_is_not_read(
    disk: Path, name: str, make: Callable[[Path], None]
) -> None:
    finish(Place(str(disk), LocalFolder(disk.parent)), b"old")
    (disk / name).unlink()
    make(disk / name)
    with refused(OutputError, where=str(disk)):
        check_output(str(disk), OTHER, fresh=False)


def test_fresh_names_folders_and_links_that_the_merge_did_not_write(disk: Path) -> None:
    place = Place(str(disk), LocalFolder(disk.parent))
    finish(place, b"old")
    for make in (lambda: (disk / "own").mkdir(), lambda: (disk / "link").symlink_to("..")):
        make()
        (added,) = {path.name for path in disk.iterdir()} & {"own", "link"}
        with refused(OutputError, where=str(disk), facts=[repr(added)]):
            check_output(str(disk), OTHER, fresh=True)
        (disk / added).unlink() if added == "link" else (disk / added).rmdir()
    assert not check_output(str(disk), OTHER, fresh=True)


@pytest.mark.parametrize("files", ["[model.safetensors, ../mine]", "[model.safetensors, 7]", "text", "{a: 1}"])
def test_a_record_that_lists_no_names_of_its_files_is_not_replaced(place: Place, files: str) -> None:
    place.output.write(RECORD, f"record: {{identity: old, files: {files}}}".encode())
    place.output.write("model.safetensors", b"old")
    with refused(OutputError, where=place.out, facts=["'model.safetensors'"]):
        check_output(place.out, THIS, fresh=True)


@pytest.mark.parametrize("fresh", [False, True])
def test_what_came_into_the_output_s_place_during_a_run_is_not_replaced(place: Place, fresh: bool) -> None:
    if fresh:
        finish(place, b"old")

    def merge() -> None:
        with open_run(place.out, OTHER, fresh=fresh) as run:
            computed(run)
            place.output.write("mine.txt", b"mine")
            run.start_output(MODEL)
            run.weights.write("model.safetensors", b"new")
            (run.composed / RECORD).write_text("record: {identity: other, files: [model.safetensors]}")
            run.finish()

    with refused(OutputError, where=place.out, do="same command", facts=["'mine.txt'"]):
        merge()
    assert place.output.read("mine.txt") == b"mine" and RunFolder(place.out).exists()
    if fresh:
        assert place.output.read("model.safetensors") == b"old"
    place.output.remove("mine.txt")
    with open_run(place.out, OTHER, fresh=fresh) as run:
        assert run.stored_targets()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("identity", [THIS, OTHER])
def test_a_run_with_fresh_is_resumed_with_and_without_fresh(place: Place, identity: Identity, again: bool) -> None:
    finish(place, b"old")
    with open_run(place.out, identity, fresh=True) as run:
        computed(run)
    assert not check_output(place.out, identity, fresh=again)
    with open_run(place.out, identity, fresh=again) as run:
        assert run.stored_targets() == {"targets/0-0.safetensors"}
        run.start_output(MODEL)
        run.weights.write("model.safetensors", b"new")
        (run.composed / RECORD).write_text("record: {files: [model.safetensors]}")
        run.finish()
    assert place.output.names() == {"model.safetensors", RECORD, MANIFEST} and not RunFolder(place.out).exists()
    assert place.output.read("model.safetensors") == b"new"


def test_a_run_with_fresh_does_not_replace_another_merge_than_it_began_with(place: Place) -> None:
    finish(place, b"old")
    with open_run(place.out, OTHER, fresh=True) as run:
        computed(run)
    record(place.output, THIRD)
    with refused(OutputError, where=place.out, do="--fresh"):
        check_output(place.out, OTHER, fresh=False)


def test_fresh_discards_the_state_of_a_start_without_fresh(place: Place) -> None:
    with open_run(place.out, THIS, fresh=False) as run:
        computed(run)
    with open_run(place.out, THIS, fresh=True) as run:
        assert run.stored_targets() == set()


@pytest.mark.parametrize(("identity", "fresh"), [(OTHER, False), (OTHER, True), (THIRD, True)])
def test_a_stop_between_the_renames_loses_neither_merge(disk: Path, identity: Identity, fresh: bool) -> None:
    place = Place(str(disk), LocalFolder(disk.parent))
    finish(place, b"old")
    with open_run(place.out, OTHER, fresh=True) as run:
        computed(run)
        run.start_output(MODEL)
        run.weights.write("model.safetensors", b"new")
        disk.rename(run.composed.with_name("replaced"))
    assert not check_output(place.out, identity, fresh)
    with open_run(place.out, identity, fresh) as run:
        assert place.output.read("model.safetensors") == b"old"
        assert bool(run.stored_targets()) == (identity == OTHER)
        run.start_output(MODEL)
        run.weights.write("model.safetensors", b"new")
        (run.composed / RECORD).write_text("record: {files: [model.safetensors]}")
        run.finish()
    assert place.holds("merged/model.safetensors", f"merged/{RECORD}", f"merged/{MANIFEST}")


def test_an_incomplete_output_is_removed_by_the_names_that_its_run_wrote(objects: Place) -> None:
    with open_run(objects.out, THIS, fresh=False) as run:
        computed(run)
        run.start_output(MODEL)
        run.weights.write("model.safetensors", b"half")
        objects.output.write("mine.safetensors", b"mine")
        assert run.written() == {"model.safetensors"}
    with refused(OutputError, where=objects.out, facts=["'mine.safetensors'"]):
        check_output(objects.out, OTHER, fresh=True)
    with open_run(objects.out, OTHER, fresh=True):
        assert objects.output.names() == {"mine.safetensors"}


@pytest.fixture
def acts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The writes and removals in an output in object storage, in their order."""
    found: list[tuple[str, str]] = []
    for act in ("write", "remove"):
        inner = getattr(ObjectFolder, act)

        def watched(
            self: ObjectFolder, name: str, *rest: Any, act: str = act, inner: Callable[..., Any] = inner
        ) -> None:
            if self.where.endswith("/merged"):
                found.append((act, name))
            inner(self, name, *rest)

        monkeypatch.setattr(ObjectFolder, act, watched)
    return found


def test_in_object_storage_marker_files_are_removed_first_and_written_last(
    objects: Place, acts: list[tuple[str, str]]
) -> None:
    finish(objects, b"old", **{"README.md": "a card"})
    written = [name for act, name in acts if act == "write"]
    assert written[0] == "model.safetensors" and set(written[1:-2]) == {
        "README.md",
        "tokenizer.json",
        RECORDED_IDENTITY,
        MANIFEST,
    }
    assert written[-2:] == ["config.json", RECORD]
    acts.clear()
    with open_run(objects.out, OTHER, fresh=True) as run:
        computed(run)
        assert acts == [], "the earlier merge is unchanged while the new one learns"
        run.start_output(MODEL)
    assert acts[:2] == [("remove", RECORD), ("remove", "config.json")]
    assert objects.output.names() == set()


@pytest.mark.parametrize("name", [RECORD, as_thorough("config.json"), as_thorough("tokenizer.json")])
def test_a_run_resumes_after_a_stop_during_the_removal_of_an_earlier_merge(
    objects: Place, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    finish(objects, b"old")
    remove = ObjectFolder.remove

    def stop(self: ObjectFolder, what: str) -> None:
        if what == name and self.where == objects.out:
            raise KeyboardInterrupt
        remove(self, what)

    def begin() -> None:
        with open_run(objects.out, OTHER, fresh=True) as run:
            computed(run)
            run.start_output(MODEL)

    with monkeypatch.context() as patched:
        patched.setattr(ObjectFolder, "remove", stop)
        with pytest.raises(KeyboardInterrupt):
            begin()
    assert not check_output(objects.out, OTHER, fresh=True)
    with open_run(objects.out, OTHER, fresh=False) as run:
        assert run.stored_targets() and run.written() == set()
        run.start_output(MODEL)
        assert objects.output.names() == set()


@pytest.mark.parametrize("name", ["tokenizer.json", as_thorough("config.json"), as_thorough(RECORD)])
def test_a_run_resumes_after_a_stop_during_the_upload_of_the_output(
    objects: Place, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write = ObjectFolder.write

    def stop(self: ObjectFolder, what: str, data: bytes) -> None:
        if what == name and self.where == objects.out:
            raise KeyboardInterrupt
        write(self, what, data)

    with monkeypatch.context() as patched:
        patched.setattr(ObjectFolder, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            finish(objects, b"new")
    assert not objects.output.exists(RECORD)
    assert not check_output(objects.out, THIS, fresh=False)
    with open_run(objects.out, THIS, fresh=False) as run:
        run.start_output(MODEL)
        assert run.written() == {"model.safetensors"}
    finish(objects, b"new")
    assert objects.holds(*OUTPUT)
