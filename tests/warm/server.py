"""A server that forks once per requested script, after it has imported what the scripts import.

Of a merge of tiny models, nearly all of the time goes into importing torch and transformers, once in the process of the
driver and once in that of each actor, and into compiling the same kernels in each.

A request comes from `sitecustomize.py`: a script with its arguments, environment, folder and standard streams. For each
the server forks twice: a child that answers with the exit code, and its child, which returns from `accepted` and runs
the script. Ray is not imported here, because what it imports starts threads, which a fork would not copy.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from pathlib import Path

import numpy as np

LIBRARIES = (
    "accelerate",
    "numba",
    "pyarrow.parquet",
    "pydantic",
    "transformers.conversion_mapping",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
)
ENGINE = (
    "cli",
    "actors.expert",
    "actors.shard",
    "actors.trainer",
    "cluster.driver",
    "engine.evaluation.measure",
    "engine.output.model_folder",
    "engine.report.page",
    "engine.run.preparation",
    "engine.run.run_folder",
)


def compile_kernels() -> None:
    """Run the sums over task vectors once for each dtype that has its own kernels."""
    import torch

    from engine.task_vectors.coefficients import TensorCoefficients
    from engine.task_vectors.kinds import Stored
    from engine.task_vectors.pieces import Piece
    from engine.task_vectors.sums import inner_products, merge_piece

    torch.set_num_threads(1)  # else threads start, which a fork would not copy
    piece, base, coefficients = (
        Piece("tensor", 0, 4),
        torch.zeros(4),
        TensorCoefficients((0, 4), np.zeros((1, 1), np.float32)),
    )
    for dtype in (torch.float32, torch.bfloat16):
        task_vectors = [Stored(torch.zeros(4, dtype=dtype))]
        merge_piece(piece, base, task_vectors, coefficients, torch.empty(4))
        inner_products(piece, torch.zeros(4), base, task_vectors, coefficients.edges)


def accepted(address: str) -> list[str]:
    """Serve requests until standard input ends; return in the processes that run a script, with its arguments."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended children are reaped by the system
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(128)
        print("ready", flush=True)
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
            client, _ = server.accept()
            if not os.fork():
                break
            client.close()
        else:
            sys.exit()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    header, ancillary, *_ = client.recvmsg(8, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    with client.makefile("rb") as received:
        arguments, environment, folder = json.loads(received.read(int.from_bytes(header, "big")))
    child = os.fork()
    if child:
        _answer(client, child)
    client.close()
    for number, stream in enumerate(array.array("i", ancillary[0][2])):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    return arguments


def _answer(client: socket.socket, child: int) -> None:
    """Send the process id of the child, and its exit code when it has ended."""
    for stream in range(3):
        os.close(stream)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):
        client.sendall(f"{child}\n".encode())
        client.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    address, what = sys.argv[1:]
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    for module in LIBRARIES + (ENGINE if what == "engine" else ()):
        importlib.import_module(module)
    if what == "engine":
        compile_kernels()
    script, *rest = accepted(address)
    # The code of a submitted job is found by PYTHONPATH.
    sys.path[:1] = [str(Path(script).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [script, *rest]
    runpy.run_path(script, run_name="__main__")
