"""Folders on a disk and in object storage: whole files or none, whoever dies or is in the way; copies in the cache."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from object_store import Store

import engine.storage.cache
import engine.storage.lease
import engine.storage.object_folder
from engine.errors import CheckpointError, InputError, OutputError, StorageError
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
    """A process that runs the script, and has come to where it prints a line."""
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(LONG)
    assert process.stdout is not None
    process.stdout.close()


def test_what_is_a_uri_and_what_a_path() -> None:
    assert is_uri("s3://bucket/a") and is_uri("gs://bucket")
    assert not any(map(is_uri, ["file:///a", "/a", "a/b", "owner/name@main", "http://a/b", "s3:/a", "C:\\a"]))
    assert as_path("file:///a%20b/c") == Path("/a b/c") and as_path("/a%20b") == Path("/a%20b")
    assert open_folder("file:///a/b") == open_folder(Path("/a/b")) == LocalFolder(Path("/a/b"))
    assert open_folder("s3://bucket/a/") == ObjectFolder("s3://bucket/a")


def test_a_file_is_there_with_what_was_written(folder: Folder) -> None:
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


def test_what_is_removed_is_gone_and_nothing_there_is_no_error(folder: Folder) -> None:
    for name in ("a/b", "a/c/d", "e", "lock", "ab"):
        folder.write(name, b"x")
    folder.remove("a")
    assert folder.names() == {"e", "lock", "ab"}
    for name in ("a", "e", "e", "none", "none/at/all"):
        folder.remove(name)
    assert folder.names() == {"lock", "ab"}
    folder.remove("")
    assert folder.names() == {"lock"}, "a lock is its holder's to remove"
    open_folder(f"{folder.where}-none").remove("")


def test_a_file_takes_its_name_when_it_is_whole(folder: Folder) -> None:
    folder.write("name", b"earlier")
    with folder.create("name") as out:
        assert [out.write(part) for part in (b"a", memoryview(b"bc"), bytearray(), b"d" * 100)] == [1, 2, 0, 100]
        assert folder.read("name") == b"earlier" and folder.names() == {"name"}
    assert folder.read("name") == b"abc" + b"d" * 100
    with folder.create("empty"):
        pass
    assert folder.read("empty") == b""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_what_was_there_before(folder: Folder, error: type[BaseException]) -> None:
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


def test_two_writers_of_one_name_do_not_meet(folder: Folder) -> None:
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
    """Contents by name; no name is that of another's folder."""
    found = draw(st.dictionaries(NAMES, st.binary(max_size=50), min_size=1, max_size=5))
    apart = {name for name in found if not any(other.startswith(f"{name}/") for other in found)}
    return {name: found[name] for name in apart if name.split("/")[0] != "lock" and not name.endswith(".part")}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files())
def test_any_names_and_any_contents_on_a_disk(tmp_path: Path, files: dict[str, bytes]) -> None:
    check_all(LocalFolder(tmp_path), files)


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


def test_a_killed_writer_leaves_what_was_there_before(folder: Folder) -> None:
    folder.write("name", b"earlier")
    kill(start(WRITER, folder.where))
    assert folder.names() == {"name"} and folder.read("name") == b"earlier"
    if isinstance(folder, LocalFolder):
        assert len(list(folder.path.iterdir())) == 2
        with folder.locked():
            assert {path.name for path in folder.path.iterdir()} == {"name", "lock"}, "what it left is swept away"


def faulty(number: int) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def refusing(number: int) -> Callable[..., Any]:
    """An open file whose `write` fails."""

    def get(self: Any, name: str) -> Any:
        found = object.__getattribute__(self, name)
        return SimpleNamespace(write=faulty(number)) if name == "file" else found

    return get


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, ["No space left on device", "bytes are free", "free some room and run the same command"]),
        (errno.EDQUOT, ["Disk quota exceeded", "free some room and run the same command"]),
        (errno.EROFS, ["Read-only file system", "put that right and run the same command: it goes on from here"]),
        (errno.EIO, ["Input/output error"]),
    ],
)
@pytest.mark.parametrize("act", ["fsync", "write"])
def test_what_a_disk_refuses_is_told_and_leaves_what_was_there_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, told: list[str], act: str
) -> None:
    folder = LocalFolder(tmp_path)
    folder.write("name", b"earlier")
    with monkeypatch.context() as patched:
        if act == "fsync":
            patched.setattr(os, "fsync", faulty(number))
        else:
            patched.setattr(engine.storage.folder.RawFile, "__getattribute__", refusing(number))
        with pytest.raises(StorageError) as caught:
            folder.write("name", b"new")
    assert caught.value.where == str(tmp_path / "name") and caught.value.exit_code == 4
    assert all(part in str(caught.value) for part in told)
    assert [path.name for path in tmp_path.iterdir()] == ["name"] and folder.read("name") == b"earlier"


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="Not a directory") as caught:
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
        print(error)
    assert folder.read("state") == b"earlier" * 1000
    assert [path.name for path in Path(sys.argv[1]).iterdir()] == ["state"]
    folder.write("state", b"later" * 1000)
    assert folder.read("state") == b"later" * 1000
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" -c "$3" "$1"'
    unshare = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, textwrap.dedent(FULL)]
    if subprocess.run([*unshare[:4], 'mount -t tmpfs tmpfs "$1"', "sh", str(tmp_path)], check=False).returncode:
        pytest.skip("this machine lets no file system be mounted")
    done = subprocess.run(unshare, check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"{tmp_path}/state: the disk refuses: No space left on device; ")
    assert "bytes are free" in done.stdout and "free some room and run the same command" in done.stdout


# Object storage.


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.storage.object_folder, "PART", 6 * MIB)


@pytest.mark.usefixtures("small_parts")
def test_a_file_of_many_parts_arrives_whole(store: Store, tmp_path: Path) -> None:
    folder = open_folder(f"{store.root}/a")
    with folder.create("big") as out:
        for number in range(25):
            out.write(bytes([number]) * MIB)
    wanted = hashlib.sha256(b"".join(bytes([number]) * MIB for number in range(25))).hexdigest()
    assert hashlib.sha256(store.get("a/big")).hexdigest() == wanted
    assert not list((tmp_path / "cache" / "uploads").iterdir()), "nothing of it stays on this machine"


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("fault", ["refuse-writes", "refuse-part-2"])
def test_what_the_storage_refuses_is_told_and_leaves_what_was_there_before(store: Store, fault: str) -> None:
    folder = open_folder(f"{store.root}/a")
    folder.write("name", b"earlier")
    with store.fault(fault), pytest.raises(StorageError, match="ACCESS_DENIED") as caught:
        folder.write("name", b"x" * 20 * MIB)
    assert caught.value.where == f"{store.root}/a/name" and caught.value.exit_code == 4
    assert "AWS_ACCESS_KEY_ID" in caught.value.do and "run the same command" in caught.value.do
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


def test_a_writer_that_is_killed_while_it_sends_leaves_what_was_there_before(store: Store) -> None:
    folder = open_folder(f"{store.root}/a")
    folder.write("name", b"earlier")
    with store.fault("slow-parts"):
        kill(start(SENDER, folder.where))
    assert folder.names() == {"name"} and folder.read("name") == b"earlier"


@pytest.mark.usefixtures("small_parts")
def test_an_interrupt_while_it_sends_comes_when_the_file_is_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, connection = open_folder(f"{store.root}/a"), Address.connection

    def interrupted(address: Address) -> AbstractContextManager[Any]:
        time.sleep(0.5)  # until the other thread waits for this one
        os.kill(os.getpid(), signal.SIGINT)
        return connection(address)

    with store.fault("slow-parts"), monkeypatch.context() as patched:
        patched.setattr(Address, "connection", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder.write("name", b"x" * 8 * MIB)
    assert folder.size("name") == 8 * MIB


def test_errors_of_the_storage_name_the_address(store: Store) -> None:
    with pytest.raises(StorageError, match="NO_SUCH_BUCKET"):
        open_folder("s3://no-such-bucket/a").write("name", b"")
    with store.fault("refuse-all"):
        folder = open_folder(f"{store.root}/a")
        for act in (folder.read, folder.exists, folder.size, folder.names, folder.remove):
            with pytest.raises(StorageError, match=r"ACCESS_DENIED|403") as caught:
                act("name")
            assert caught.value.where == f"{store.root}/a/name"


@pytest.mark.slow
def test_no_answer_is_told_within_seconds(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match="NETWORK_CONNECTION"):
        open_folder("s3://bucket/a?region=us-east-1").exists("name")
    with pytest.raises(InputError, match="UNAVAILABLE"):
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
    ("uri", "told"),
    [
        ("s3://key:secret@bucket/a", "a secret in the address"),
        ("s3:///a", "names no bucket"),
        ("gs://", "names no bucket"),
        ("s3://../a", "names no bucket"),
        ("s3://bucket/a?bogus=1", "bogus"),
    ],
)
def test_an_address_at_fault(uri: str, told: str) -> None:
    with pytest.raises((InputError, StorageError), match=told) as caught:
        open_folder(uri).exists("name")
    assert "key:secret" not in str(caught.value)


# The lease.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.storage.lease, "RENEWAL", 0.05)
    monkeypatch.setattr(engine.storage.lease, "SETTLING", 0.05)
    # Whoever is alive is seen at once; on a busy machine it may not be for long.
    monkeypatch.setattr(engine.storage.lease, "PATIENCE", 200)


class Flaky(LocalFolder):
    """A folder that refuses a write now and then."""

    refusals = 0

    def write(self, name: str, data: bytes) -> None:
        if Flaky.refusals:
            Flaky.refusals -= 1
            raise StorageError("no", self.where)
        super().write(name, data)


@pytest.mark.usefixtures("quick")
def test_a_lease_is_one_s_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flaky, "refusals", 0)
    first, second = Lease(Flaky(tmp_path)), Lease(LocalFolder(tmp_path))
    assert first.take()
    first.held()
    Flaky.refusals = 2  # a storage that is away for a while does not end it
    assert not second.take()
    with pytest.raises(StorageError, match="another run has taken over"):
        second.held()
    assert Flaky.refusals == 0 and first.end()
    (tmp_path / "lock").unlink()
    third = Lease(LocalFolder(tmp_path))
    assert third.take() and third.end()


@pytest.mark.usefixtures("quick")
def test_a_lease_that_nobody_renews_is_taken_over_and_its_holder_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.storage.lease, "PATIENCE", 3)
    (tmp_path / "lock").write_bytes(b"of one that died")
    lease = Lease(LocalFolder(tmp_path))
    assert lease.take()
    (tmp_path / "lock").write_bytes(b"of one that found it silent")
    with pytest.raises(StorageError, match="another run has taken over"):
        lease.held()
    assert not lease.end()
    assert (tmp_path / "lock").read_bytes() == b"of one that found it silent"


def test_of_two_that_take_a_lease_at_once_the_last_one_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.storage.lease, "SETTLING", 0)
    monkeypatch.setattr(engine.storage.lease.time, "sleep", lambda _: (tmp_path / "lock").write_bytes(b"another's"))
    assert not Lease(LocalFolder(tmp_path)).take()
    assert (tmp_path / "lock").read_bytes() == b"another's"


@pytest.mark.usefixtures("quick")
def test_a_folder_is_held_by_one(folder: Folder) -> None:
    with folder.locked() as held:
        held()
        with pytest.raises(OutputError, match="another merge is writing to this folder"), folder.locked():
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
    found = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def test_a_folder_is_copied_once_and_what_changed_again(store: Store, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "sub/more.json", "optimizer.pt", "README.md"):
        store.put(f"models/a/{name}", name.encode())
    store.put("models/ab/config.json", b"of another")
    patterns = ["*.json", "*.safetensors"]
    copy = fetch(f"{store.root}/models/a/", patterns)
    assert copy == tmp_path / "cache" / "s3" / store.bucket / "models" / "a"
    before = times(copy)
    assert before.keys() == {"config.json", "model.safetensors", "sub/more.json"}
    assert all((copy / name).read_bytes() == name.encode() for name in before)
    assert all(time % 10**9 == 0 for _, time in before.values()), "the time of the object, in whole seconds"
    assert fetch(f"{store.root}/models/a", patterns) == copy and times(copy) == before

    store.put("models/a/config.json", b"longer than before")
    store.delete("models/a/sub/more.json")
    (copy / "model.safetensors").write_bytes(b"tampered with")
    fetch(f"{store.root}/models/a", patterns)
    after = times(copy)
    assert after.keys() == {"config.json", "model.safetensors"}
    assert (copy / "config.json").read_bytes() == b"longer than before"
    assert (copy / "model.safetensors").read_bytes() == b"model.safetensors"
    assert fetch(f"{store.root}/models/a") == copy and len(times(copy)) == 4, "without patterns it is all"


def test_one_object_is_copied(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.storage.cache, "CHUNK", 7)
    store.put("data/math.jsonl", b"lines" * 10)
    store.put("data/more/code.jsonl", b"")
    for patterns in (None, ()):
        assert fetch(f"{store.root}/data/math.jsonl", patterns).read_bytes() == b"lines" * 10
    assert fetch(f"{store.root}/data/more/code.jsonl{store.options}").read_bytes() == b""
    assert len(store.gets()) >= 1
    with pytest.raises(InputError, match="there is no such object"):
        fetch(f"{store.root}/data", ())
    assert {path.name for path in (tmp_path / "cache" / "s3").iterdir()} > {store.bucket}, "another endpoint is apart"


def test_several_at_once_copy_once(store: Store) -> None:
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
def test_a_name_that_leads_out_is_refused(store: Store, tmp_path: Path, name: str) -> None:
    store.put("model/config.json", b"{}")
    store.put(name, b"evil")
    with pytest.raises(CheckpointError, match="no path below a folder"):
        fetch(f"{store.root}/model", error_type=CheckpointError)
    with pytest.raises(InputError, match=r"no path below a folder|no such object"):
        fetch(f"{store.root}/{name}")
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))
    assert not Address.of("s3://bucket/a?x=../../b").local.is_relative_to("s3/bucket/a")
    assert ".." not in Address.of("s3://bucket/a?x=/../../b").local.parts


def test_what_cannot_be_copied_is_told(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no such object") as caught:
        fetch(f"{store.root}/none", ["*.json"])
    assert caught.value.where == f"{store.root}/none" and caught.value.expected == "objects *.json"
    with pytest.raises(InputError, match="NO_SUCH_BUCKET") as caught:
        fetch("s3://no-such-bucket/a")
    assert caught.value.exit_code == 2 and "AWS_ENDPOINT_URL" in caught.value.do
    store.put("model/config.json", b"{}")
    with store.fault("refuse-all"), pytest.raises(CheckpointError, match=r"ACCESS_DENIED|403"):
        fetch(f"{store.root}/model", error_type=CheckpointError)
    (tmp_path / "cache" / "s3").mkdir(parents=True)
    (tmp_path / "cache" / "s3" / store.bucket).write_text("in the way")
    with pytest.raises(StorageError, match="Not a directory"):
        fetch(f"{store.root}/model")


@pytest.mark.parametrize("change", ["gone", "longer"])
def test_an_object_that_changes_meanwhile_is_told(store: Store, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    store.put("model/config.json", b"{}")
    facts = engine.storage.cache._facts

    def then_change(*arguments: Any) -> dict[str, Any]:
        found = facts(*arguments)
        store.delete("model/config.json") if change == "gone" else store.put("model/config.json", b"{   }")
        return found

    monkeypatch.setattr(engine.storage.cache, "_facts", then_change)
    with pytest.raises(InputError, match="changed while it was copied"):
        fetch(f"{store.root}/model")
    target = engine.storage.cache.cache_folder() / "s3" / store.bucket
    assert not [path for path in target.rglob("*") if path.is_file()]


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("EXPERT_MERGING_CACHE", raising=False)
    assert engine.storage.cache.cache_folder() == tmp_path / ".cache" / "expert-merging"
    monkeypatch.setenv("EXPERT_MERGING_CACHE", "~/mine")
    assert engine.storage.cache.cache_folder() == tmp_path / "mine"
    assert shutil.disk_usage(tmp_path).free > 0
