"""Runs that share GPUs train one after another."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pytest
from small_run import data_in, environment
from support import REPO, launch, tiny, wait_for
from support import train_gpt as tg

sys.path.insert(0, str(REPO / "bench"))
import turns

SOON = 0.3  # seconds in which something would have happened


@contextmanager
def another_run(lock: Path, how: int) -> Iterator[IO[str]]:
    """It holds the lock until it ends or gives it back."""
    with lock.open("w") as file:
        fcntl.flock(file, how)
        yield file


def is_free(file: IO[str], how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True


class Run:
    """A run in a thread of its own, which says where it is and trains until it is told to end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float, fails: bool = False):
        self.warm, self.training, self.may_end = (threading.Event() for _ in range(3))
        self.fails = fails
        self.trainer = tg.Trainer.__new__(tg.Trainer)
        self.trainer.h = tiny(max_wallclock_seconds=seconds)
        monkeypatch.setattr(tg.Trainer, "warm_up", lambda *_: None)
        monkeypatch.setattr(tg, "warm_up", tg.warm_up)  # so that it comes back after the test
        monkeypatch.setattr(tg, "train", self.train)
        self.thread = threading.Thread(target=self.run)

    def log(self, line: str) -> None:
        assert line.startswith("warm-up:")
        self.warm.set()

    def train(self, trainer: Any) -> None:
        self.training.set()
        assert self.may_end.wait(60)
        if self.fails:
            raise tg.RunError("loss is nan")

    def run(self) -> None:
        with suppress(tg.RunError):
            tg.warm_up(self.trainer, None, self.log)
            tg.train(self.trainer)

    def end(self) -> None:
        self.may_end.set()
        self.thread.join(60)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    """Starts a run that takes turns by those locks."""
    runs: list[Run] = []

    def started(locks: list[Path], seconds: float = 0.0, fails: bool = False) -> Run:
        runs.append(Run(monkeypatch, seconds, fails))
        turns.take_turns(locks)
        runs[-1].thread.start()
        return runs[-1]

    yield started
    for run in runs:
        run.end()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("held", [0, 1])
def test_a_run_warms_up_at_once_and_trains_when_the_other_has(
    start: Callable[..., Run], tmp_path: Path, held: int, fails: bool
) -> None:
    """On whichever of its two GPUs the other trains."""
    locks = [tmp_path / "gpu_0.lock", tmp_path / "gpu_1.lock"]
    with another_run(locks[held], fcntl.LOCK_EX) as other:
        run = start(locks, fails=fails)
        assert run.warm.wait(60)
        assert not run.training.wait(SOON)
        fcntl.flock(other, fcntl.LOCK_UN)
        assert run.training.wait(60)
        assert not is_free(other, fcntl.LOCK_EX)
        run.end()
        assert is_free(other, fcntl.LOCK_EX), "it has given way"


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_run_by_the_clock_trains_while_no_other_starts_or_scores(
    start: Callable[..., Run], tmp_path: Path, seconds: float
) -> None:
    alone = seconds > 0
    with another_run(tmp_path / "gpu.others", fcntl.LOCK_SH) as other:
        run = start([tmp_path / "gpu.lock"], seconds)
        assert run.warm.wait(60)
        assert run.training.wait(SOON) != alone
        fcntl.flock(other, fcntl.LOCK_UN)
        assert run.training.wait(60)
        assert is_free(other, fcntl.LOCK_SH) != alone, "another may not start meanwhile"
        run.end()
        assert is_free(other, fcntl.LOCK_SH)
        assert not is_free(other, fcntl.LOCK_EX), "it scores"


def test_no_run_starts_beside_one_that_trains_by_the_clock(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    lock = tmp_path / "gpu.lock"
    timed = start([lock], 60.0)
    assert timed.training.wait(60)
    began = threading.Event()

    def begin() -> None:
        with lock.with_suffix(".others").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            began.set()

    thread = threading.Thread(target=begin)
    thread.start()
    assert not began.wait(SOON)
    timed.end()
    assert began.wait(60)
    thread.join(60)


@pytest.mark.parametrize(
    ("env", "gpus"),
    [
        ({}, "0"),
        ({"LOCAL_WORLD_SIZE": "2"}, "01"),
        ({"CUDA_VISIBLE_DEVICES": "3"}, "3"),
        ({"CUDA_VISIBLE_DEVICES": "3,1,2", "LOCAL_WORLD_SIZE": "2"}, "13"),
    ],
)
def test_a_run_takes_the_turns_of_the_gpus_that_it_uses(env: dict[str, str], gpus: str) -> None:
    """In one order for all runs: else two could wait for each other."""
    assert [path.stem[-1] for path in turns.turn_files(env)] == list(gpus)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_rank_waits_and_the_program_runs(tmp_path: Path, rank: str) -> None:
    """bench/turns.py hands over to train_gpt.py, which refuses this setting by its own message."""
    command = [sys.executable, str(REPO / "bench/turns.py")]
    env = {"TMPDIR": str(tmp_path), "LOCAL_RANK": rank, "NUM_LAYERS": "1", "PATH": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "NUM_LAYERS" in done.stderr and "Traceback" not in done.stderr
    files = sorted(path.suffix for path in tmp_path.iterdir())
    assert files == ([".lock", ".others"] if rank == "0" else [])


IMPATIENT = """
import datetime, runpy, sys
import torch.distributed.distributed_c10d as c10d
c10d.default_pg_timeout = datetime.timedelta(seconds=4)  # in place of 30 minutes
runpy.run_path({script!r}, run_name="__main__")
"""


def test_ranks_wait_for_their_turn_longer_than_torch_waits_for_a_rank(tmp_path: Path) -> None:
    script = tmp_path / "impatient.py"
    script.write_text(IMPATIENT.format(script=str(REPO / "bench/turns.py")))
    out = tmp_path / "out"
    out.mkdir()
    settings = environment(data_in(tmp_path), out, TMPDIR=tmp_path)
    log = out / "train_seed1337.partial.log"
    with another_run(tmp_path / f"training_of_{os.getuid()}_on_gpu_0.lock", fcntl.LOCK_EX) as other:
        process = launch(script, ranks=2, cwd=out, **settings)
        for _ in range(600):
            if process.poll() is not None or (log.exists() and "warm-up:" in log.read_text()):
                break
            time.sleep(0.1)
        time.sleep(6)  # in turn
        assert process.poll() is None, process.communicate()
        fcntl.flock(other, fcntl.LOCK_UN)
        done = wait_for(process)
    assert done.returncode == 0, done.stderr
