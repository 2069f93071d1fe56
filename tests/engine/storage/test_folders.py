"""Folders on a disk and in object storage: complete files or none, errors, locks, and copies in the cache."""

from __future__ import annotations

import ast
import errno
import hashlib
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import LONG
from errors import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from object_store import Store

import engine.storage.cache
import engine.storage.lease
import engine.storage.object_folder
from engine.checkpoints.find import find_model
from engine.errors import CheckpointError, InputError, MergeError, OutputError, StorageError
from engine.storage.address import Address
from engine.storage.cache import fetch
from engine.storage.folder import Folder
from engine.storage.lease import Lease
from engine.storage.local_folder import LocalFolder
from engine.storage.object_folder import ObjectFolder
from engine.storage.paths import as_path, is_uri, open_folder

MIB = 1 << 20


@pytest.fixture(params=["disk", "objects"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "disk":
        return open_folder(tmp_path / "folder")
    store: Store = request.getfixturevalue("store")
    return open_folder(f"{store.root}/a/folder")


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a process that runs the script, and wait until it prints a line."""
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(LONG)
    assert process.stdout is not None
    process.stdout.close()


def test_uris_and_paths() -> None:
    assert is_uri("s3://bucket/a") and is_uri("gs://bucket")
    assert not any(map(is_uri, ["file:///a", "/a", "a/b", "owner/name@main", "http://a/b", "s3:/a", "C:\\a"]))
    assert as_path("file:///a%20b/c") == Path("/a b/c") and as_path("/a%20b") == Path("/a%20b")
    assert open_folder("file:///a/b") == open_folder(Path("/a/b")) == LocalFolder(Path("/a/b"))
    assert open_folder("s3://bucket/a/") == ObjectFolder("s3://bucket/a")


def test_a_file_has_the_content_that_was_written(folder: Folder) -> None:
    assert not folder.exists("a/b") and folder.names() == set()
    for missing in (folder.read, folder.size):
        with pytest.raises(FileNotFoundError):
            missing("a/b")
    folder.write("a/b", b"one")
    folder.write("a/c", b"")
    assert folder.read("a/b") == b"one" and folder.size("a/b") == 3 and folder.read("a/c") == b""
    folder.write("a/b", b"other")
    assert folder.read("a/b") == b"other"
    assert folder.exists("a/b") and not folder.exists("a")
    assert folder.names() == folder.names("a") == {"a/b", "a/c"} and folder.names("none") == set()
    child = folder.child("a")
    assert child.where == f"{folder.where}/a" and child.read("b") == b"other" and child.names() == {"b", "c"}
    again = pickle.loads(pickle.dumps(folder))
    assert again == folder and again.read("a/b") == b"other"


def test_a_digest_is_that_of_the_whole_file(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.storage.object_folder, "CHUNK", 1000)
    content = bytes(range(256)) * 20
    folder.write("a/b", content)
    assert folder.digest("a/b") == hashlib.sha256(content).hexdigest()
    with pytest.raises(FileNotFoundError):
        folder.digest("none")


def test_files_and_folders_are_removed_and_missing_ones_are_no_error(folder: Folder) -> None:
    for name in ("a/b", "a/c/d", "e", "lock", "ab"):
        folder.write(name, b"x")
    folder.remove("a")
    assert folder.names() == {"e", "lock", "ab"}
    for name in ("a", "e", "e", "none", "none/at/all"):
        folder.remove(name)
    assert folder.names() == {"lock", "ab"}
    folder.remove("")
    assert folder.names() == {"lock"}, "only the holder removes the lock"
    open_folder(f"{folder.where}-none").remove("")


def test_a_file_takes_its_name_when_it_is_complete(folder: Folder) -> None:
    folder.write("name", b"earlier")
    with folder.create("name") as out:
        assert [out.write(part) for part in (b"a", memoryview(b"bc"), bytearray(), b"d" * 100)] == [1, 2, 0, 100]
        assert folder.read("name") == b"earlier" and folder.names() == {"name"}
    assert folder.read("name") == b"abc" + b"d" * 100
    with folder.create("empty"):
        pass
    assert folder.read("empty") == b""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_keeps_the_earlier_file(folder: Folder, error: type[BaseException]) -> None:
    folder.write("there", b"earlier")

    def write(name: str) -> None:
        with folder.create(name) as out:
            out.write(b"half" * 1000)
            raise error

    for name in ("there", "new"):
        with pytest.raises(error):
            write(name)
    assert folder.names() == {"there"} and folder.read("there") == b"earlier"
    if isinstance(folder, LocalFolder):
        assert [path.name for path in folder.path.iterdir()] == ["there"]


def test_two_writers_of_one_name_do_not_interfere(folder: Folder) -> None:
    with ExitStack() as late:
        second = late.enter_context(folder.create("name"))
        with folder.create("name") as first:
            first.write(b"first, ")
            second.write(b"second, ")
            first.write(b"whole")
        assert folder.read("name") == b"first, whole"
        second.write(b"whole")
        assert folder.read("name") == b"first, whole"
    assert folder.read("name") == b"second, whole" and folder.names() == {"name"}


PARTS = st.text(st.characters(exclude_characters="/\0?", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
NAMES = st.lists(PARTS.filter(lambda part: part.strip(".")), min_size=1, max_size=3).map("/".join)


@st.composite
def files(draw: st.DrawFn) -> dict[str, bytes]:
    """Contents by name; no name is a folder of another name."""
    contents = draw(st.dictionaries(NAMES, st.binary(max_size=50), min_size=1, max_size=5))
    apart = {name for name in contents if not any(other.startswith(f"{name}/") for other in contents)}
    return {name: contents[name] for name in apart if name.split("/")[0] != "lock" and not name.endswith(".part")}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files())
def test_any_names_and_any_contents_on_a_disk(tmp_path: Path, files: dict[str, bytes]) -> None:
    check_all(LocalFolder(tmp_path), files)


@pytest.mark.thorough
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files())
def test_any_names_and_any_contents_in_object_storage(store: Store, files: dict[str, bytes]) -> None:
    check_all(open_folder(store.root), files)


def check_all(folder: Folder, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        folder.write(name, data)
    assert folder.names() == files.keys()
    assert {name: folder.read(name) for name in files} == files
    assert all(folder.exists(name) and folder.size(name) == len(data) for name, data in files.items())
    assert all(folder.names(name.rpartition("/")[0]) >= {name} for name in files)
    folder.remove("")
    assert folder.names() == set()


WRITER = """
    import sys, time
    from engine.storage.paths import open_folder
    with open_folder(sys.argv[1]).create("name") as out:
        out.write(b"half" * 1000)
        print("there", flush=True)
        time.sleep(60)
"""


def test_a_killed_writer_keeps_the_earlier_file(folder: Folder) -> None:
    folder.write("name", b"earlier")
    kill(start(WRITER, folder.where))
    assert folder.names() == {"name"} and folder.read("name") == b"earlier"
    if isinstance(folder, LocalFolder):
        assert len(list(folder.path.iterdir())) == 2
        with folder.locked():
            assert {path.name for path in folder.path.iterdir()} == {"name", "lock"}, "its temporary file is swept away"


def faulty(number: int) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def refusing(number: int) -> Callable[..., Any]:
    """Return a `__getattribute__` for RawFile with a `file` whose `write` fails."""

    def get(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        return SimpleNamespace(write=faulty(number)) if name == "file" else value

    return get


@pytest.mark.parametrize(
    ("number", "is_full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EROFS, False), (errno.EIO, False)]
)
@pytest.mark.parametrize("act", ["fsync", "write"])
def test_an_error_of_the_disk_is_reported_and_keeps_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_full: bool, act: str
) -> None:
    folder = LocalFolder(tmp_path)
    folder.write("name", b"earlier")
    with monkeypatch.context() as patched:
        if act == "fsync":
            patched.setattr(os, "fsync", faulty(number))
        else:
            patched.setattr(engine.storage.folder.RawFile, "__getattribute__", refusing(number))
        with refused(StorageError, do="same command", facts=[os.strerror(number)]) as caught:
            folder.write("name", b"new")
    assert caught.value.where == str(tmp_path / "name") and caught.value.exit_code == 4
    assert ("free disk space" in caught.value.do) == is_full
    # The free bytes are of no use where a quota is the limit.
    assert bool(re.search(r"[\d,]+ bytes", caught.value.what)) == (number == errno.ENOSPC)
    assert [path.name for path in tmp_path.iterdir()] == ["name"] and folder.read("name") == b"earlier"


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with refused(StorageError, facts=[os.strerror(errno.ENOTDIR)]) as caught:
        LocalFolder(tmp_path / "file").write("a/b", b"x")
    assert caught.value.where == str(tmp_path / "file" / "a" / "b")


FULL = """
    import sys
    from pathlib import Path
    from engine.errors import StorageError
    from engine.storage.paths import open_folder
    folder = open_folder(sys.argv[1])
    folder.write("state", b"earlier" * 1000)
    try:
        with folder.create("state") as out:
            for _ in range(100):
                out.write(b"x" * 50_000)
    except StorageError as error:
        print(repr((error.what, error.where, error.do)))
    assert folder.read("state") == b"earlier" * 1000
    assert [path.name for path in Path(sys.argv[1]).iterdir()] == ["state"]
    folder.write("state", b"later" * 1000)
    assert folder.read("state") == b"later" * 1000
"""


def test_a_full_disk(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" -c "$3" "$1"'
    unshare = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, textwrap.dedent(FULL)]
    if subprocess.run([*unshare[:4], 'mount -t tmpfs tmpfs "$1"', "sh", str(tmp_path)], check=False).returncode:
        pytest.skip("file systems cannot be mounted on this machine")
    done = subprocess.run(unshare, check=True, capture_output=True, text=True)
    what, where, do = ast.literal_eval(done.stdout)
    assert os.strerror(errno.ENOSPC) in what and re.search(r"[\d,]+ bytes", what)
    assert where == f"{tmp_path}/state" and "free disk space" in do and "same command" in do


# Object storage.


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.storage.object_folder, "PART", 6 * MIB)


@pytest.mark.usefixtures("small_parts")
def test_a_file_of_many_parts_is_uploaded_completely(store: Store, tmp_path: Path) -> None:
    folder = open_folder(f"{store.root}/a")
    with folder.create("big") as out:
        for number in range(25):
            out.write(bytes([number]) * MIB)
    wanted = hashlib.sha256(b"".join(bytes([number]) * MIB for number in range(25))).hexdigest()
    assert hashlib.sha256(store.get("a/big")).hexdigest() == wanted
    assert not list((tmp_path / "cache" / "uploads").iterdir()), "no file is left on this machine"


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("fault", ["refuse-writes", "refuse-part-2"])
def test_a_failed_upload_is_reported_and_keeps_the_earlier_file(store: Store, fault: str) -> None:
    folder = open_folder(f"{store.root}/a")
    folder.write("name", b"earlier")
    with store.fault(fault), refused(StorageError, do="same command", facts=["ACCESS_DENIED"]) as caught:
        folder.write("name", b"x" * 20 * MIB)
    assert caught.value.where == f"{store.root}/a/name" and caught.value.exit_code == 4
    assert "AWS_ACCESS_KEY_ID" in caught.value.do
    assert "Request ID" not in str(caught.value)
    assert folder.names() == {"name"} and folder.read("name") == b"earlier"


SENDER = """
    import sys, threading
    import engine.storage.object_folder
    engine.storage.object_folder.PART = 6 << 20
    threading.Timer(0.8, lambda: print("there", flush=True)).start()
    engine.storage.paths.open_folder(sys.argv[1]).write("name", b"x" * (60 << 20))
    assert False, "the parts should have been slow"
"""


def test_a_writer_killed_during_the_upload_keeps_the_earlier_file(store: Store) -> None:
    folder = open_folder(f"{store.root}/a")
    folder.write("name", b"earlier")
    with store.fault("slow-parts"):
        kill(start(SENDER, folder.where))
    assert folder.names() == {"name"} and folder.read("name") == b"earlier"


@pytest.mark.usefixtures("small_parts")
def test_an_interrupt_during_the_upload_is_raised_after_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, connection = open_folder(f"{store.root}/a"), Address.connection

    def interrupted(address: Address) -> AbstractContextManager[Any]:
        time.sleep(0.5)  # until the main thread waits for this one
        os.kill(os.getpid(), signal.SIGINT)
        return connection(address)

    with store.fault("slow-parts"), monkeypatch.context() as patched:
        patched.setattr(Address, "connection", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder.write("name", b"x" * 8 * MIB)
    assert folder.size("name") == 8 * MIB


def test_storage_errors_name_the_address(store: Store) -> None:
    with refused(StorageError, where="s3://no-such-bucket/a/name", facts=["NO_SUCH_BUCKET"]):
        open_folder("s3://no-such-bucket/a").write("name", b"")
    with store.fault("refuse-all"):
        folder = open_folder(f"{store.root}/a")
        for act in (folder.read, folder.exists, folder.size, folder.names, folder.remove):
            with pytest.raises(StorageError, match=r"ACCESS_DENIED|403") as caught:
                act("name")
            assert caught.value.where == f"{store.root}/a/name"


@pytest.mark.slow
def test_an_unreachable_endpoint_is_reported_within_seconds(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with refused(StorageError, facts=["NETWORK_CONNECTION"]):
        open_folder("s3://bucket/a?region=us-east-1").exists("name")
    with refused(InputError, facts=["UNAVAILABLE"]):
        fetch("gs://anonymous@bucket/a?endpoint_override=127.0.0.1:1&scheme=http&retry_limit_seconds=1")


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", ""])
def test_an_endpoint_is_given_by_the_environment_or_in_the_address(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    if name:
        monkeypatch.setenv(name, store.url)
    folder = open_folder(f"{store.root}/a/b/{'' if name else store.options}")
    folder.child("c").write("d", b"x")
    assert store.keys() == {"a/b/c/d"}
    assert folder.names() == {"c/d"}


@pytest.mark.parametrize(
    ("uri", "error_type", "facts"),
    [
        ("s3://key:hush@bucket/a", InputError, ["AWS_ACCESS_KEY_ID"]),
        ("s3:///a", InputError, ["s3://bucket/path"]),
        ("gs://", InputError, ["gs://bucket/path"]),
        ("s3://../a", InputError, ["s3://bucket/path"]),
        ("s3://bucket/a?bogus=1", InputError, ["region"]),
        ("s3://bucket/a?region=x&secret_key=hush", InputError, ["AWS_ACCESS_KEY_ID"]),
        ("s3://bucket/a?endpoint_override=key:hush@host", InputError, ["AWS_ACCESS_KEY_ID"]),
        ("s3://key:hu/sh@bucket/a", InputError, ["AWS_ACCESS_KEY_ID"]),
        ("s3://key%3Ahush@bucket/a", InputError, ["AWS_ACCESS_KEY_ID"]),
        ("gs://bucket/a?access_token=hush", InputError, ["GOOGLE_APPLICATION_CREDENTIALS"]),
    ],
)
def test_an_invalid_address_is_refused(uri: str, error_type: type[MergeError], facts: list[str]) -> None:
    with refused(error_type, facts=facts) as caught:
        open_folder(uri).exists("name")
    assert not re.search(r"hu/?sh", str(caught.value))


# The lease.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.storage.lease, "RENEWAL", 0.05)
    monkeypatch.setattr(engine.storage.lease, "SETTLING", 0.05)
    # A renewal is seen at once; on a busy machine it may take long to come.
    monkeypatch.setattr(engine.storage.lease, "PATIENCE", 200)


class Flaky(LocalFolder):
    """A folder whose next `refusals` writes fail."""

    refusals = 0

    def write(self, name: str, data: bytes) -> None:
        if Flaky.refusals:
            Flaky.refusals -= 1
            raise StorageError("no", self.where)
        super().write(name, data)


@pytest.mark.usefixtures("quick")
def test_a_lease_has_one_holder_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flaky, "refusals", 0)
    first, second = Lease(Flaky(tmp_path)), Lease(LocalFolder(tmp_path))
    assert first.take()
    first.held()
    Flaky.refusals = 2  # storage failures do not end the lease
    assert not second.take()
    with pytest.raises(StorageError) as caught:
        second.held()
    assert caught.value.where == str(tmp_path)
    assert Flaky.refusals == 0 and first.end()
    (tmp_path / "lock").unlink()
    third = Lease(LocalFolder(tmp_path))
    assert third.take() and third.end()


@pytest.mark.usefixtures("quick")
def test_a_lease_without_renewals_is_taken_over_and_its_holder_notices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.storage.lease, "PATIENCE", 3)
    (tmp_path / "lock").write_bytes(b"dead holder")
    lease = Lease(LocalFolder(tmp_path))
    assert lease.take()
    (tmp_path / "lock").write_bytes(b"new holder")
    with pytest.raises(StorageError) as caught:
        lease.held()
    assert caught.value.where == str(tmp_path)
    assert not lease.end()
    assert (tmp_path / "lock").read_bytes() == b"new holder"


def test_of_two_simultaneous_writers_the_last_holds_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.storage.lease, "SETTLING", 0)
    monkeypatch.setattr(engine.storage.lease.time, "sleep", lambda _: (tmp_path / "lock").write_bytes(b"another's"))
    assert not Lease(LocalFolder(tmp_path)).take()
    assert (tmp_path / "lock").read_bytes() == b"another's"


@pytest.mark.usefixtures("quick")
def test_a_locked_folder_is_refused_to_others(folder: Folder) -> None:
    with folder.locked() as held:
        held()
        with refused(OutputError, where=folder.where, do="--out"), folder.locked():
            pass
        folder.write("name", b"x")
    assert folder.names() - {"lock"} == {"name"}
    with folder.locked():
        folder.remove("")
    assert folder.names() == set()
    if isinstance(folder, LocalFolder):
        assert not folder.path.exists()


# Copies in the cache.


def times(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def test_a_folder_is_copied_once_and_changed_files_again(store: Store, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "sub/more.json", "optimizer.pt", "README.md"):
        store.put(f"models/a/{name}", name.encode())
    store.put("models/ab/config.json", b"of another")
    patterns = ["*.json", "*.safetensors"]
    copy = fetch(f"{store.root}/models/a/", patterns)
    assert copy == tmp_path / "cache" / "s3" / store.bucket / "models" / "a"
    before = times(copy)
    assert before.keys() == {"config.json", "model.safetensors", "sub/more.json"}
    assert all((copy / name).read_bytes() == name.encode() for name in before)
    assert all(time % 10**9 == 0 for _, time in before.values()), "the object's time, in whole seconds"
    assert fetch(f"{store.root}/models/a", patterns) == copy and times(copy) == before

    store.put("models/a/config.json", b"longer than before")
    store.delete("models/a/sub/more.json")
    (copy / "model.safetensors").write_bytes(b"tampered with")
    fetch(f"{store.root}/models/a", patterns)
    after = times(copy)
    assert after.keys() == {"config.json", "model.safetensors"}
    assert (copy / "config.json").read_bytes() == b"longer than before"
    assert (copy / "model.safetensors").read_bytes() == b"model.safetensors"
    assert fetch(f"{store.root}/models/a") == copy and len(times(copy)) == 4, "without patterns, all objects are copied"


def test_leftovers_of_a_training_are_not_copied(store: Store, tmp_path: Path) -> None:
    names = {"config.json", "model.safetensors", "additional_chat_templates/tools.jinja"}
    leftovers = ("checkpoint-500/model.safetensors", "consolidated.safetensors", "trainer_state.json")
    for name in (*names, *leftovers, "global_step10/a.safetensors", "optimizer.safetensors", "original/params.json"):
        store.put(f"models/b/{name}", b"x")
    assert times(find_model(f"{store.root}/models/b", tmp_path)).keys() == names


def test_one_object_is_copied(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.storage.cache, "CHUNK", 7)
    store.put("data/math.jsonl", b"lines" * 10)
    store.put("data/more/code.jsonl", b"")
    for patterns in (None, ()):
        assert fetch(f"{store.root}/data/math.jsonl", patterns).read_bytes() == b"lines" * 10
    assert fetch(f"{store.root}/data/more/code.jsonl{store.options}").read_bytes() == b""
    assert len(store.gets()) >= 1
    with pytest.raises(InputError) as caught:
        fetch(f"{store.root}/data", ())
    assert caught.value.where == f"{store.root}/data"
    assert {path.name for path in (tmp_path / "cache" / "s3").iterdir()} > {store.bucket}, (
        "another endpoint has its own folder"
    )


def test_concurrent_calls_copy_once(store: Store) -> None:
    for number in range(5):
        store.put(f"model/{number}.json", b"x" * 1000)
    threads = [threading.Thread(target=fetch, args=(f"{store.root}/model",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    gets = [path for path in store.gets() if store.bucket in path]
    assert sorted(gets) == sorted(f"/{store.bucket}/model/{number}.json" for number in range(5))


@pytest.mark.parametrize("name", ["model/../../evil", "model//evil", "model/./evil", "model/.."])
def test_a_name_that_leads_out_of_the_cache_is_refused(store: Store, tmp_path: Path, name: str) -> None:
    store.put("model/config.json", b"{}")
    store.put(name, b"evil")
    with refused(CheckpointError, where=f"{store.root}/model", facts=[repr(name.removeprefix("model/"))]):
        fetch(f"{store.root}/model", error_type=CheckpointError)
    with refused(InputError, where=store.root):
        fetch(f"{store.root}/{name}")
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))
    assert not Address.of("s3://bucket/a?region=../../b").local.is_relative_to("s3/bucket/a")
    assert ".." not in Address.of("s3://bucket/a?region=/../../b").local.parts


def test_a_failed_copy_is_reported(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError) as caught:
        fetch(f"{store.root}/none", ["*.json"])
    assert caught.value.where == f"{store.root}/none" and "*.json" in caught.value.expected
    with refused(InputError, do="AWS_ENDPOINT_URL", facts=["NO_SUCH_BUCKET"]) as caught:
        fetch("s3://no-such-bucket/a")
    assert caught.value.exit_code == 2 and "same command" not in caught.value.do
    store.put("model/config.json", b"{}")
    with store.fault("refuse-all"), pytest.raises(CheckpointError, match=r"ACCESS_DENIED|403"):
        fetch(f"{store.root}/model", error_type=CheckpointError)
    (tmp_path / "cache" / "s3").mkdir(parents=True)
    (tmp_path / "cache" / "s3" / store.bucket).write_text("in the way")
    with refused(StorageError, facts=[os.strerror(errno.ENOTDIR)]):
        fetch(f"{store.root}/model")


@pytest.mark.parametrize("change", ["gone", "longer"])
def test_an_object_that_changes_during_the_copy_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    store.put("model/config.json", b"{}")
    facts = engine.storage.cache._facts

    def then_change(*arguments: Any) -> dict[str, Any]:
        before = facts(*arguments)
        store.delete("model/config.json") if change == "gone" else store.put("model/config.json", b"{   }")
        return before

    monkeypatch.setattr(engine.storage.cache, "_facts", then_change)
    with refused(InputError, where=f"{store.root}/model/config.json", do="same command"):
        fetch(f"{store.root}/model")
    target = engine.storage.cache.cache_folder() / "s3" / store.bucket
    assert not [path for path in target.rglob("*") if path.is_file()]


def test_the_folder_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("EXPERT_MERGING_CACHE", raising=False)
    assert engine.storage.cache.cache_folder() == tmp_path / ".cache" / "expert-merging"
    monkeypatch.setenv("EXPERT_MERGING_CACHE", "~/mine")
    assert engine.storage.cache.cache_folder() == tmp_path / "mine"
    assert shutil.disk_usage(tmp_path).free > 0
