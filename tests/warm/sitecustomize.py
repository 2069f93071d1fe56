"""Pass the start of a Ray worker or of `cli.py` on to the server of `server.py`.

Python imports a module of this name at its start, before it runs a script. This one does nothing unless a server runs;
see `warm_processes.py`.
"""

import array
import json
import os
import signal
import socket
import sys
from pathlib import Path

SCRIPTS = ("default_worker.py", "cli.py")


def _pass_on(server: socket.socket, arguments: list[str]) -> None:
    """Have the script run with this process's environment, folder and standard streams, and end as it ends."""
    request = json.dumps([arguments, dict(os.environ), str(Path.cwd())]).encode()
    streams = array.array("i", [0, 1, 2])
    server.sendmsg([len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    server.sendall(request)
    with server.makefile() as answers:
        child = int(answers.readline())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: os.kill(child, number))
        Path(f"{os.environ['WARM_SERVER']}.{os.getpid()}").write_text(str(child))
        code = int(answers.readline())
    if code < 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _start() -> None:
    arguments = [each for each in sys.orig_argv[1:] if each != "-u"]
    if "WARM_SERVER" in os.environ and arguments and Path(arguments[0]).name in SCRIPTS:
        with socket.socket(socket.AF_UNIX) as server:
            try:
                server.connect(os.environ["WARM_SERVER"])
            except (FileNotFoundError, ConnectionRefusedError):
                return  # the server has ended, so the script runs here
            _pass_on(server, arguments)


_start()
