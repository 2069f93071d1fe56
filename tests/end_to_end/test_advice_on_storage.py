"""Advice about disks and object storage is right: followed, the same command or function succeeds.

The tests hold against tests/golden/messages.txt: a new `do` of the storage needs a test, or an entry that names the
test that follows it, or says why none does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from advice import Advice
from conftest import plan_of
from identities import merge_of
from object_store import Store

import engine.storage.address
import engine.storage.cache
import engine.storage.lease
from engine.errors import MergeError
from engine.run.reuse import open_cache
from engine.run.run_folder import check_output, open_run
from engine.run.state import StageState
from engine.storage.cache import fetch
from engine.storage.content_cache import ContentCache
from engine.storage.local_folder import LocalFolder, check_creatable
from engine.storage.paths import open_folder
from engine.storage.private import check_private

ELSEWHERE = {
    "{do}, {AGAIN}": "here; a full disk in test_full_disk.py",
    "{do}": "the address here; places of an output in test_advice_on_results.py and test_advice_on_outputs.py",
    "remove the link, or give another --out": "test_advice_on_outputs.py",
}
FOLLOWED = (
    "give another folder as `cache`, or `off`",
    "{ADVICE[self.scheme]}{resume}",
    "{AGAIN}",
    "{error.do}",
    "give another --out, in a folder where no other user can write",
    "run the same command again",
    "wait until it ends, or use another --out",
    "wait until that run ends",
)
THIS = merge_of("this")
OTHER = 65534


def test_every_advice_has_a_test() -> None:
    advice = Advice(__name__, ELSEWHERE)
    advice.followed(*FOLLOWED)
    advice.check()


@contextmanager
def advice() -> Iterator[Callable[[], str]]:
    """Check that the block fails, and yield a function that then returns the advice of its error."""
    with pytest.raises(MergeError) as caught:
        yield lambda: caught.value.do


def test_after_a_failure_of_the_disk_the_same_command_goes_on(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("in the way")
    with advice() as do:
        LocalFolder(tmp_path / "there").write("x", b"1")
    assert "correct this, then run the same command" in do()
    (tmp_path / "there").unlink()
    LocalFolder(tmp_path / "there").write("x", b"1")


def test_in_another_folder_a_file_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with advice():
        check_creatable(tmp_path / "file" / "x", "give another --out")
    check_creatable(tmp_path / "new" / "x", "give another --out")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("way", ["wait until it ends", "use another --out"])
def test_a_folder_in_use_is_free_later_and_another_is_now(tmp_path: Path, way: str) -> None:
    with ExitStack() as first:
        run = first.enter_context(open_run(str(tmp_path / "out"), THIS, fresh=False))
        run.state.write("stage-1.safetensors", b"a result")
        with advice() as do, open_run(str(tmp_path / "out"), THIS, fresh=False):
            pass
        assert way in do()
        if "wait" in way:
            first.close()
        with open_run(str(tmp_path / ("out" if "wait" in way else "another")), THIS, fresh=False):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_in_a_folder_of_one_s_own_a_run_begins(tmp_path: Path) -> None:
    (tmp_path / "out.run").mkdir()
    os.chown(tmp_path / "out.run", OTHER, OTHER)
    with advice() as do:
        check_private(tmp_path / "out.run")
    assert "in a folder where no other user can write" in do()
    (tmp_path / "own").mkdir(mode=0o700)
    check_private(tmp_path / "own" / "out.run")


def test_a_damaged_state_is_discarded_with_fresh(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with open_run(out, THIS, fresh=False) as run:
        run.save_stage(1, StageState(1, {}), [{"stage": 1, "step": 0, "model": "math", "kl": 0.5}])
        (name,) = run.state.names("metrics")
        run.state.write(name, b"damaged")
        with advice() as do:
            run.metrics()
    assert "--fresh discards the run's whole state" in do()
    with open_run(out, THIS, fresh=True) as run:
        assert run.metrics() == []


def test_another_folder_is_a_cache_and_off_is_none(tmp_path: Path, llama_merge: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    config = plan_of(llama_merge).config

    def opened(cache: str) -> ContentCache | None:
        return open_cache(config.model_copy(update={"cache": cache}), print)

    with advice() as do:
        opened(str(tmp_path / "mine"))
    assert "another folder as `cache`, or `off`" in do()
    assert opened(str(tmp_path / "another")) is not None and opened("off") is None


# Object storage.


@pytest.fixture
def data(store: Store) -> str:
    """The address of a file."""
    store.put("data/x.jsonl", b"{}")
    return f"{store.root}/data/x.jsonl"


def fetched(uri: str) -> bytes:
    """Fetch a file as a new process does."""
    engine.storage.address._file_system.cache_clear()
    return fetch(uri).read_bytes()


def test_an_address_that_is_corrected_is_found(data: str) -> None:
    with advice() as do:
        fetched(data.replace("bucket-", "other-"))
    assert do().startswith("check the address")
    assert fetched(data) == b"{}"


def test_an_endpoint_is_given_where_the_advice_says(store: Store, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{store.url}/nowhere")
    with advice() as do:
        fetched(data)
    found = re.search(r"the endpoint \((\w+)\)", do())
    assert found is not None
    monkeypatch.setenv(found[1], store.url)
    assert fetched(data) == b"{}"


def test_a_port_is_given_as_the_option_of_the_advice(store: Store, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    place = store.url.removeprefix("http://")
    with advice() as do:
        fetched(data.replace(store.bucket, f"{place}/{store.bucket}"))
    found = re.search(r"a host and a port by (\?\S+)", do())
    assert found is not None
    assert fetched(f"{data}{found[1].replace('HOST:PORT', place)}&scheme=http") == b"{}"


@pytest.mark.parametrize("given", ["in the address", "nowhere"])
@pytest.mark.parametrize("way", ["variables", "file"])
def test_credentials_are_given_where_the_advice_says(
    store: Store, data: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str, way: str
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with store.fault("refuse-unsigned"):
        with advice() as do:
            fetched(data if given == "nowhere" else data.replace("s3://", "s3://key:secret@"))
        found = re.search(r"(AWS_ACCESS_KEY_ID) and (AWS_SECRET_ACCESS_KEY), (~/\.aws)", do())
        assert found is not None
        if way == "variables":
            monkeypatch.setenv(found[1], "key")
            monkeypatch.setenv(found[2], "secret")
        else:
            Path(found[3]).expanduser().mkdir()
            keys = f"[default]\n{found[1].lower()} = key\n{found[2].lower()} = secret\n"
            (Path(found[3]).expanduser() / "credentials").write_text(keys)
        assert fetched(data) == b"{}"


def test_an_object_that_changed_is_copied_by_the_same_command(
    store: Store, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = engine.storage.cache._facts

    def then_change(*arguments: Any) -> dict[str, Any]:
        before = facts(*arguments)
        store.put("data/x.jsonl", b'{"text": "w1"}')
        return before

    with monkeypatch.context() as patch, advice() as do:
        patch.setattr(engine.storage.cache, "_facts", then_change)
        fetched(data)
    assert do() == "run the same command again"
    assert fetched(data) == b'{"text": "w1"}'


def test_a_run_that_the_storage_refused_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.storage.lease, "SETTLING", 0)
    out = f"{store.root}/merged"
    with open_run(out, THIS, fresh=False) as run:
        run.state.write("stage-1.safetensors", b"a result")
    with store.fault("refuse-all"), advice() as do, open_run(out, THIS, fresh=False):
        pass
    assert "check the address" in do() and "run the same command again" in do()
    with open_run(out, THIS, fresh=False) as run:
        assert run.state.read("stage-1.safetensors") == b"a result"


def test_after_the_run_that_took_over_the_same_command_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.storage.lease, "SETTLING", 0)
    monkeypatch.setattr(engine.storage.lease, "RENEWAL", 0.05)
    out = f"{store.root}/merged"
    with open_run(out, THIS, fresh=False) as run:
        run.state.write("stage-1.safetensors", b"a result")
        open_folder(run.state.where).write("lock", b"another's")
        with advice() as do:
            run.held()
    assert do() == "wait until that run ends"
    run.state.remove("lock")
    assert not check_output(out, THIS, fresh=False)
    with open_run(out, THIS, fresh=False) as run:
        assert run.state.read("stage-1.safetensors") == b"a result"
