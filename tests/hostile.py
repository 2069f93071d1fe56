"""Commands with hostile input, each in a process of its own that is measured.

A process that has imported what a plan imports forks once a command; that saves the start of Python, and the rest is as
in `python cli.py`. Run as a script it is that process, else its other end.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Of the processor; of memory at the most; and after which a command is killed, however busy the machine is.
SECONDS, MEMORY, LONG = 10, 1 << 30, 100

# What the process has that forks.
PLAN = (
    "cli",
    "engine.calibration.samples",
    "engine.planning.scaling",
    "engine.planning.summary",
    "pyarrow.parquet",
    "safetensors",
)
MERGE = ("cluster.driver", "ray", "transformers.models.llama.modeling_llama")


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (of a signal: negative), what it printed, seconds of the processor and peak memory
    in bytes.

    `loaded`: which heavy modules it had imported at its end. `left`: what it left of files, beside its own folder and
    at home, and of processes.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    peak: int
    loaded: list[str]
    left: list[str]


def refused(ended: Ended, words: list[str], prepared: bool = False) -> None:
    """The command ended as it has to for input that is wrong, and its message has these words. `prepared`: by a server
    of that kind, where Ray is imported and may not start.
    """
    assert ended.code == 2, ended
    assert (ended.stdout, ended.left) == ("", [])
    assert prepared or "ray" not in ended.loaded
    assert ended.stderr.startswith("error: ") and ended.stderr.count("error: ") == 1
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr) < 2500 and len(ended.stderr.splitlines()) <= 11, ended.stderr
    assert [word for word in words if word not in ended.stderr] == [], ended.stderr
    assert ended.seconds < SECONDS and ended.peak < MEMORY, ended


class Server:
    """The other end of the process that forks."""

    def __init__(self, home: Path, prepared: bool) -> None:
        self.home = home
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "HOME": str(home)}
        environment = {key: value for key, value in environment.items() if key not in ("HF_HOME", "XDG_CACHE_HOME")}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *(["prepared"] if prepared else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, *arguments: str, cwd: Path) -> Ended:
        """`python cli.py` with these arguments."""
        assert self.process.stdin is not None and self.process.stdout is not None
        before = _found(cwd.parent, self.home)
        self.process.stdin.write(json.dumps([arguments, str(cwd)]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        answer["left"] += sorted(f"{path}: {what}" for path, what in _found(cwd.parent, self.home) ^ before)
        return Ended(**answer)


@contextlib.contextmanager
def server(home: Path, prepared: bool = False) -> Iterator[Server]:
    """A server for as long as the context lasts; `prepared`: it has imported what a merge imports, and Ray may not
    start.
    """
    made = Server(home, prepared)
    with made.process:
        yield made
        assert made.process.stdin is not None
        made.process.stdin.close()


def _found(*folders: Path) -> set[tuple[str, tuple[int, ...]]]:
    """What there is and what would tell a change of it, without opening anything or following a link."""
    paths = [path for folder in folders for path in folder.rglob("*")]
    facts = {path: path.lstat() for path in paths}
    return {(str(path), (fact.st_mode, fact.st_size, fact.st_mtime_ns)) for path, fact in facts.items()}


def _command(arguments: list[str], cwd: str, to: Path) -> None:
    """What the forked process does; it does not return."""
    import cli

    code: Any = 1
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(to / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.chdir(cwd)
    os.setsid()
    try:
        cli.main(arguments)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 - what Python does at the end of a process
        traceback.print_exc()
    loaded = sorted({"torch", "ray", "transformers"} & set(sys.modules))
    (to / "loaded").write_text(json.dumps(loaded))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _answer(arguments: list[str], cwd: str, to: Path) -> dict[str, Any]:
    (to / "loaded").write_text("[]")
    began = time.monotonic()
    child = os.fork()
    if not child:
        _command(arguments, cwd, to)
    while not (found := os.wait4(child, os.WNOHANG))[0]:
        if time.monotonic() - began > LONG:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    left = []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
        left = ["a process"]
    return {
        "code": os.waitstatus_to_exitcode(found[1]),
        "stdout": (to / "stdout").read_text(encoding="utf-8", errors="replace"),
        "stderr": (to / "stderr").read_text(encoding="utf-8", errors="replace"),
        "seconds": found[2].ru_utime + found[2].ru_stime,
        "peak": found[2].ru_maxrss * 1024,
        "loaded": json.loads((to / "loaded").read_text()),
        "left": left,
    }


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("Ray was started for input that is wrong")


def _serve(prepared: bool) -> None:
    sys.path.insert(0, str(ROOT))
    for name in (*PLAN, *(MERGE if prepared else ())):
        importlib.import_module(name)
    if prepared:
        sys.modules["ray"].init = _refuse  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            print(json.dumps(_answer(*json.loads(line), Path(folder))), flush=True)


if __name__ == "__main__":
    _serve("prepared" in sys.argv)
