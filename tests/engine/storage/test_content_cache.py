"""The cache of computed files: what comes out is what went in, or nothing; and nothing else is touched."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest
from errors import refused
from object_store import Store
from thorough import as_thorough

from engine.errors import ConfigError
from engine.storage.content_cache import MARKER, ContentCache, summary
from engine.storage.folder import Folder
from engine.storage.local_folder import LocalFolder
from engine.storage.paths import open_folder

MUCH = 1 << 40
CONTENT = b"a target" * 100


def key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def cache_in(where: Path | str, limit: int = MUCH, copies: int = MUCH) -> ContentCache:
    """A new view of a cache, as another process has it."""
    return ContentCache(str(where), limit, copies)


@pytest.fixture
def state(tmp_path: Path) -> LocalFolder:
    folder = LocalFolder(tmp_path / "state")
    folder.write("targets/0-0.safetensors", CONTENT)
    return folder


@pytest.fixture
def root(tmp_path: Path, state: LocalFolder) -> Path:
    """The folder of a cache with one entry."""
    cache_in(tmp_path / "cache").give("targets", key("a"), state, "targets/0-0.safetensors")
    return tmp_path / "cache"


def entry(root: Path) -> Path:
    (found,) = root.glob("targets/*")
    return found


@pytest.mark.parametrize("place", ["disk", as_thorough("objects")])
def test_another_run_gets_the_same_bytes(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    where, folders = str(tmp_path / "cache"), [LocalFolder(tmp_path / "one"), LocalFolder(tmp_path / "other")]
    if place == "objects":
        store: Store = request.getfixturevalue("store")
        where = f"{store.root}/cache"
    one, other = folders
    one.write("targets/0-0.safetensors", CONTENT)
    first = cache_in(where)
    first.give("targets", key("a"), one, "targets/0-0.safetensors")
    first.write("priors", key("b"), b"small")
    second = cache_in(where)
    assert second.take("targets", key("a"), other, "targets/3-1.safetensors") == hashlib.sha256(CONTENT).hexdigest()
    assert second.read("priors", key("b")) == b"small"
    assert second.take("targets", key("other"), other, "targets/3-2.safetensors") is None
    assert second.read("targets", key("b")) is None, "a key is one of its kind"
    assert {name: other.read(name) for name in other.names()} == {"targets/3-1.safetensors": CONTENT}
    assert {kind: (count, size) for kind, (count, size, _) in summary(second.entries()).items()} == {
        "targets": (1, len(CONTENT)),
        "priors": (1, 5),
    }
    assert len(cache_in(where).clear()) == 2 and cache_in(where).entries() == []


def test_files_of_one_disk_are_linked_and_replacing_one_leaves_the_other(
    root: Path, state: LocalFolder, tmp_path: Path
) -> None:
    assert entry(root).samefile(state.path / "targets" / "0-0.safetensors")
    state.write("targets/0-0.safetensors", b"computed again")
    assert entry(root).read_bytes() == CONTENT
    other = LocalFolder(tmp_path / "other")
    cache_in(root).take("targets", key("a"), other, "t")
    other.remove("t")
    assert entry(root).read_bytes() == CONTENT
    assert root.stat().st_mode & 0o077 == 0, "other users read nothing"


@pytest.mark.parametrize("damage", ["truncated", "changed", "gone", "a link", "a folder"])
def test_a_damaged_or_lost_entry_is_none(damage: str, root: Path, tmp_path: Path) -> None:
    cache, path, other = cache_in(root), entry(root), LocalFolder(tmp_path / "other")
    assert cache.has("targets", key("a"))
    # A new file: the old one is the state's, too.
    content = path.read_bytes()
    path.unlink()
    outside = tmp_path / "outside"
    outside.write_bytes(content)
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "changed":
        path.write_bytes(content[:-1] + b"?")
    elif damage == "a link":
        path.symlink_to(outside)
    elif damage == "a folder":
        path.mkdir()
    assert cache.take("targets", key("a"), other, "t") is None
    assert cache.read("targets", key("a")) is None
    assert other.names() == set() and outside.read_bytes() == content
    if damage in ("truncated", "changed"):
        assert not path.exists()
    # Computed again, it takes its place.
    other.write("t", content)
    if damage != "a folder":
        cache_in(root).give("targets", key("a"), other, "t")
        assert cache_in(root).read("targets", key("a")) == content


def test_another_content_of_a_key_replaces_the_first(root: Path, state: LocalFolder) -> None:
    state.write("targets/0-0.safetensors", b"computed again")
    cache_in(root).give("targets", key("a"), state, "targets/0-0.safetensors")
    assert entry(root).read_bytes() == b"computed again"


def test_what_is_not_used_longest_is_removed_first(tmp_path: Path, state: LocalFolder) -> None:
    root = tmp_path / "cache"
    for number in range(4):
        state.write(f"{number}", bytes([number]) * 1000)
        cache_in(root).give("targets", key(f"{number}"), state, f"{number}")
    for number, path in enumerate(sorted(root.glob("targets/*"), key=lambda path: path.read_bytes())):
        os.utime(path, (number + 1, number + 1))
    assert cache_in(root).read("targets", key("0")) is not None  # used now
    cache_in(root, limit=2000).trim()
    assert {path.read_bytes()[0] for path in root.glob("targets/*")} == {0, 3}
    assert {path.read_bytes()[0] for path in state.path.iterdir() if path.is_file()} == {0, 1, 2, 3}
    assert [entry.name for entry in cache_in(root).clear(older_than=3600)] != []
    assert {path.read_bytes()[0] for path in root.glob("targets/*")} == {0}


@pytest.mark.parametrize("name", ["targets", "metrics"])
def test_a_link_out_of_the_folder_is_refused(name: str, root: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    kept = [mine / f"{key('a')}-{key('b')}", mine / f".{'b' * 32}.part"]
    for path in kept:
        path.touch()
        os.utime(path, (0, 0))
    if (root / name).exists():
        (root / name).rename(tmp_path / "before")
    (root / name).symlink_to(mine)
    with refused(ConfigError, do="`cache`", facts=[name]):
        cache_in(root)
    (root / name).unlink()
    (root / "other").symlink_to(mine)
    cache_in(root).trim()
    assert sorted(mine.iterdir()) == sorted(kept)


def test_nothing_but_entries_is_removed(root: Path) -> None:
    others = [root / "notes.txt", root / "targets" / "notes.txt", root / "mine" / f"{key('a')}-{key('b')}"]
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.write_text("mine")
    cache_in(root, limit=0).trim()
    cache_in(root).clear()
    assert [other.read_text() for other in others] == ["mine"] * 3
    assert {path.name for path in root.glob("targets/*")} == {"notes.txt"}


@pytest.mark.parametrize("name", ["notes.txt", MARKER])
def test_a_folder_of_something_else_is_not_used(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text('{"format": 0}')
    with refused(ConfigError, where=str(tmp_path / "mine"), do="cache"):
        cache_in(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [name]


def test_from_another_disk_files_are_copied_up_to_a_bound(
    tmp_path: Path, state: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    cache = cache_in(tmp_path / "cache", copies=1000)
    for name in ("a", "b"):
        cache.give("targets", key(name), state, "targets/0-0.safetensors")
    other: Folder = open_folder(tmp_path / "other")
    taken = [cache_in(tmp_path / "cache").take("targets", key(name), other, name) for name in ("a", "b")]
    assert [sha256 is not None for sha256 in taken] == [True, False]
    assert other.read("a") == CONTENT and not entry(tmp_path / "cache").samefile(tmp_path / "other" / "a")


def test_many_runs_give_take_and_trim_at_once(tmp_path: Path) -> None:
    names = [f"{number}" for number in range(20)]
    wrong: list[object] = []

    def run(index: int) -> None:
        cache, folder = (
            cache_in(tmp_path / "cache", limit=12_000 if index % 2 else MUCH),
            LocalFolder(tmp_path / f"{index}"),
        )
        for name in names:
            folder.write(name, name.encode() * 500)
            cache.give("targets", key(name), folder, name)
            if index % 2:
                cache.trim()
            sha256 = cache.take("targets", key(name), folder, f"taken-{name}")
            if sha256 is not None and folder.read(f"taken-{name}") != name.encode() * 500:
                wrong.append((index, name))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    cache = cache_in(tmp_path / "cache")
    found = [cache.read("targets", key(name)) for name in names]
    assert all(content in (None, name.encode() * 500) for name, content in zip(names, found, strict=True))
    assert not list((tmp_path / "cache").rglob(".*.part"))
