"""A process of tests/fork_server.py starts and ends as one of a new interpreter does."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fork_server import interpreter
from support import HANG

SCRIPT = """\
import atexit, os, signal, sys, threading, time
print(__name__, __file__, sys.argv, sys.path[0], os.getcwd(), dict(os.environ), input())
print("warned", file=sys.stderr)
atexit.register(print, "at the end")
threading.Thread(target=lambda: print("of a thread", time.sleep(0.1))).start()
"""
ENDS = {  # the script's last line
    "end": "",
    "status": "sys.exit(3)",
    "message": "sys.exit('error: refused')",
    "exception": "raise ValueError('a bug')",
    "Ctrl-C": "raise KeyboardInterrupt",
    "signal": "os.kill(os.getpid(), signal.SIGTERM)",
    "kill": "sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)",
    "at once": "sys.stdout.flush(); os._exit(4)",
}


def outcome(python: object, arguments: list[str], folder: Path) -> tuple[int, str, str]:
    """Status and what it wrote, without the server's lines in a traceback."""
    done = subprocess.run(
        [str(python), *arguments],
        env={"A": "\u00e9 '", "LC_CTYPE": "C.UTF-8"},  # which Python would set itself
        cwd=folder,
        input="read\n",
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    lines = done.stderr.splitlines()
    servers = [i for i, line in enumerate(lines) if "fork_server.py" in line]
    said = [line for i, line in enumerate(lines) if i not in servers and i - 1 not in servers]
    return done.returncode, done.stdout, "\n".join(said)


@pytest.mark.parametrize("end", ENDS)
def test_it_starts_and_ends_as_a_new_interpreter(end: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/run.py").write_text(f"{SCRIPT}{ENDS[end]}\n")
    arguments = ["-u", "a/run.py", "x", ""]
    found = outcome(interpreter(), arguments, tmp_path)
    assert found == outcome(sys.executable, arguments, tmp_path)
    assert "'A': \"\u00e9 '\"" in found[1] and "warned" in found[2]


def test_a_module_starts_as_a_new_interpreters(tmp_path: Path) -> None:
    (tmp_path / "tool.py").write_text(SCRIPT)
    arguments = ["-m", "tool", "-x"]
    found = outcome(interpreter(), arguments, tmp_path)
    assert found == outcome(sys.executable, arguments, tmp_path)


def waiting(folder: Path) -> tuple[subprocess.Popen[str], int]:
    """A process that waits, and the number of what was forked for it."""
    script = f"import os, time\nprint(os.getpid(), flush=True)\ntime.sleep({HANG})\n"
    (folder / "wait.py").write_text(script)
    pipe = subprocess.PIPE
    command = [str(interpreter()), "wait.py"]
    process = subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_it(number: signal.Signals, tmp_path: Path) -> None:
    process, forked = waiting(tmp_path)
    process.send_signal(number)
    _, said = process.communicate(timeout=HANG)
    assert process.returncode == -number
    assert ("KeyboardInterrupt" in said) == (number == signal.SIGINT)
    assert not Path(f"/proc/{forked}").exists()


def test_it_is_killed_with_what_stands_for_it(tmp_path: Path) -> None:
    process, forked = waiting(tmp_path)
    process.kill()
    process.communicate(timeout=HANG)
    patience = time.monotonic() + HANG
    while Path(f"/proc/{forked}").exists():
        assert time.monotonic() < patience
        time.sleep(0.01)
    assert process.returncode == -signal.SIGKILL
