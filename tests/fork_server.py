"""Python processes that start with PyTorch imported, for the tests, which start 260 of them.

Importing it takes 3 s of a processor.  So a server imports it once and forks a process for every
call of `interpreter()`, an executable that stands in for `sys.executable`.  It takes the command
lines of python and of torchrun's ranks, [-u] SCRIPT or [-u] -m MODULE and their arguments.  The
process has its own arguments, environment, working folder, standard input and outputs; signals
reach it, and it ends by Python's own ending.  What Python and PyTorch read as they start it shares
with the server: no PYTHON* variable and no OMP_NUM_THREADS changes it.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import functools
import gc
import io
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

INT = 4  # bytes of a number between the two
CLIENT = """\
import os, select, signal, socket, sys
signals = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]
signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until they can be passed on
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = repr((sys.argv[1:], dict(os.environ), os.getcwd())).encode()
socket.send_fds(server, [len(request).to_bytes({INT}, "big")], [0, 1, 2])
server.sendall(request)

def received():
    number = server.recv({INT})
    if not number:
        sys.exit("the fork server has gone")
    return int.from_bytes(number, "big", signed=True)

process = received()
caught, written = socket.socketpair()
written.setblocking(False)
signal.set_wakeup_fd(written.fileno())  # a handler would not run while select waits
for number in signals:
    signal.signal(number, lambda *_: None)
signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
ready = []
while server not in ready:
    ready, _, _ = select.select([server, caught], [], [])
    if caught in ready:
        for number in caught.recv(64):
            try:
                os.kill(process, number)
            except ProcessLookupError:
                pass
status = received()
if status < 0:  # it was ended by a signal: so is this process
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


starting = threading.Lock()  # tests call from several threads; one server is enough


def interpreter() -> Path:
    """The executable.  Its server starts with the first call and ends with this process."""
    with starting:
        return start()


@functools.cache
def start() -> Path:
    """Starts the server: the executable."""
    folder = tempfile.TemporaryDirectory()
    address = f"{folder.name}/socket"
    client = Path(folder.name, "python")
    first_line = f'#!/usr/bin/env -S "{sys.executable}" -IS\n'  # whose path may have spaces
    client.write_text(first_line + CLIENT.format(address=address, INT=INT))
    client.chmod(0o700)
    command = [sys.executable, __file__, address]
    kept = ("PATH", "HOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    server = subprocess.Popen(
        command,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,  # its end tells the server that this process has ended
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the tests
    )
    assert server.stdin and server.stdout

    def end() -> None:
        server.terminate()
        server.wait()
        folder.cleanup()

    atexit.register(end)
    assert server.stdout.readline() == b"ready\n", "the server did not start"
    return client


def next_request(address: str) -> tuple[list[str], dict[str, str], str]:
    """Arguments, environment and folder of a process that is to run: this one, by then forked."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)
        client, _ = listener.accept()
        if os.fork() == 0:
            break
        client.close()

    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(client, INT, 3)
    with client.makefile("rb") as file:
        request = ast.literal_eval(file.read(int.from_bytes(size, "big")).decode())
    process = os.fork()
    if process:
        watch(process, client)
    client.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return request


def tell(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # it may have gone
        client.sendall(number.to_bytes(INT, "big", signed=True))


def watch(process: int, client: socket.socket) -> None:
    """Tells the client how the process ends; a process whose client was killed is killed, too."""
    tell(client, process)
    ended = os.pidfd_open(process)
    ready, _, _ = select.select([ended, client], [], [])
    if ended not in ready:
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    tell(client, os.waitstatus_to_exitcode(status))
    os._exit(0)


# The script runs at this module's top level: so Python itself ends the process by what it raises.
if __name__ == "__main__":
    import torch.distributed.run  # noqa: F401

    gc.freeze()  # what the processes share; their last collection would copy it
    import triton.language  # noqa: F401  # after that, as it tells of what is not collected

    arguments, environment, folder = next_request(sys.argv[1])
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if arguments[0] == "-u":
        raw = open(1, "wb", buffering=0, closefd=False)  # noqa: SIM115
        sys.stdout = io.TextIOWrapper(raw, sys.stdout.encoding, write_through=True)
        del arguments[0]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = folder
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        path = Path(folder, arguments[0])
        sys.path[0] = str(path.resolve().parent)
        main = types.ModuleType("__main__")
        main.__file__ = str(path)
        sys.modules["__main__"] = main
        exec(compile(path.read_bytes(), str(path), "exec"), main.__dict__)
