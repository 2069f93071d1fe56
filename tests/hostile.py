"""Run commands on hostile input, each in a forked process whose time, memory and leftovers are measured.

Run as a script, this module is a server that has imported the modules of `plan` and forks once per command, which saves
the start of Python; otherwise a command runs as with `python cli.py`. Imported, it is the client of that server.
"""

from __future__ import annotations

import contextlib
import gc
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
# Limits of CPU time (seconds) and memory (bytes); seconds of wall time after which a command is killed.
SECONDS, MEMORY, LONG = 10, 1 << 30, 100
# CPU seconds that the import of torch and transformers may take, in a command whose server has not imported them.
IMPORTS = 10
# Modules that the server imports before it forks.
PLAN = (
    "cli",
    "engine.calibration.samples",
    "engine.planning.costs.scaling",
    "engine.planning.summary",
    "engine.report.page",
    "pyarrow.parquet",
    "safetensors",
)
MERGE = (
    "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "PIL.PpmImagePlugin",
    "PIL.TiffImagePlugin",
    "PIL.WebPImagePlugin",
    "cluster.driver",
    "cluster.evaluation",
    "engine.evaluation.results",
    "ray",
    "transformers.conversion_mapping",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "transformers.models.qwen2_vl.processing_qwen2_vl",
)


@dataclass(frozen=True)
class Ended:
    """The outcome of a command.

    Attributes:
        code: Exit code; negative for a signal.
        stdout: Text printed to stdout.
        stderr: Text printed to stderr.
        seconds: CPU seconds.
        peak: Peak memory in bytes.
        loaded: Heavy modules (torch, ray, transformers) imported by the end.
        left: Files changed in the parent of the working directory or in the home folder, and processes still running.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    peak: int
    loaded: list[str]
    left: list[str]


def refused(ended: Ended, facts: list[str], prepared: bool = False, memory: int = MEMORY) -> None:
    """Assert that the command refused its input: exit code 2, one short message with `facts`, nothing left behind.

    Args:
        ended: The outcome of the command.
        facts: Texts that must each occur in the message: files, keys, names, numbers. Not prose.
        prepared: The server was started with `prepared`, so Ray is imported, but must not start.
        memory: Limit of the peak memory in bytes, if the command has another limit of its own than most.
    """
    assert ended.code == 2, ended
    assert (ended.stdout, ended.left) == ("", [])
    assert prepared or "ray" not in ended.loaded
    assert ended.stderr.startswith("error: ") and ended.stderr.count("error: ") == 1
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr) < 2500 and len(ended.stderr.splitlines()) <= 11, ended.stderr
    assert [fact for fact in facts if fact not in ended.stderr] == [], ended.stderr
    seconds = SECONDS if prepared or "torch" not in ended.loaded else SECONDS + IMPORTS
    assert ended.seconds < seconds and ended.peak < memory, ended


class Server:
    """The client of a server process that forks once per command."""

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
        """Run `python cli.py` with these arguments in `cwd`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        before = _files(cwd.parent, self.home)
        self.process.stdin.write(json.dumps([arguments, str(cwd)]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        answer["left"] += sorted(f"{path}: {facts}" for path, facts in _files(cwd.parent, self.home) ^ before)
        return Ended(**answer)


@contextlib.contextmanager
def server(home: Path, prepared: bool = False) -> Iterator[Server]:
    """Start a server for the duration of the context.

    Args:
        home: The home folder of the commands.
        prepared: Import the modules of `merge` as well, and fail if a command starts Ray.
    """
    started = Server(home, prepared)
    with started.process:
        yield started
        assert started.process.stdin is not None
        started.process.stdin.close()


def _files(*folders: Path) -> set[tuple[str, tuple[int, ...]]]:
    """Return the paths below `folders` with mode, size and mtime, without opening a file or following a link."""
    paths = [path for folder in folders for path in folder.rglob("*")]
    stats = {path: path.lstat() for path in paths}
    return {(str(path), (stat.st_mode, stat.st_size, stat.st_mtime_ns)) for path, stat in stats.items()}


def _command(arguments: list[str], cwd: str, to: Path) -> None:
    """Run the command line in the forked process, with its output redirected to files in `to`; does not return."""
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
    except BaseException:  # noqa: BLE001 - as Python does for an uncaught exception
        traceback.print_exc()
    loaded = sorted({"torch", "ray", "transformers"} & set(sys.modules))
    (to / "loaded").write_text(json.dumps(loaded))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _answer(arguments: list[str], cwd: str, to: Path) -> dict[str, Any]:
    """Fork, run the command, kill what remains of its process group, and return the fields of `Ended`."""
    (to / "loaded").write_text("[]")
    began = time.monotonic()
    child = os.fork()
    if not child:
        _command(arguments, cwd, to)
    while not (waited := os.wait4(child, os.WNOHANG))[0]:
        if time.monotonic() - began > LONG:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    left = []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
        left = ["a process"]
    return {
        "code": os.waitstatus_to_exitcode(waited[1]),
        "stdout": (to / "stdout").read_text(encoding="utf-8", errors="replace"),
        "stderr": (to / "stderr").read_text(encoding="utf-8", errors="replace"),
        "seconds": waited[2].ru_utime + waited[2].ru_stime,
        "peak": waited[2].ru_maxrss * 1024,
        "loaded": json.loads((to / "loaded").read_text()),
        "left": left,
    }


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("Ray was started although the input is wrong")


def _serve(prepared: bool) -> None:
    sys.path.insert(0, str(ROOT))
    for name in (*PLAN, *(MERGE if prepared else ())):
        importlib.import_module(name)
    if prepared:
        sys.modules["ray"].init = _refuse  # type: ignore[attr-defined]
        # Built at the first call, from hundreds of regular expressions.
        sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("llama")
    # The garbage collector of a child then neither visits nor copies the objects of the server.
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            print(json.dumps(_answer(*json.loads(line), Path(folder))), flush=True)


if __name__ == "__main__":
    _serve("prepared" in sys.argv)
