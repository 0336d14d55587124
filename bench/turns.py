"""Runs that share GPUs train one after another; the next ones start and compile meanwhile.

    torchrun --standalone --nproc_per_node=2 bench/turns.py    # train_gpt.py, in turn with others

bench/ablate.py and bench/ladder.py do the same with IN_TURN=1.  Start, compilation and scores take
47 of the 106 s of a run of 800 steps on an H100, and leave the GPU idle most of the time.

A run that ends by the clock (MAX_WALLCLOCK_SECONDS) would lose steps to others that compile or
score on its GPU.  So it trains alone: while none of them does.
"""

from __future__ import annotations

import datetime
import fcntl
import functools
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_gpt as tg

LONGEST_WAIT = datetime.timedelta(days=7)


def turn_files(env: Mapping[str, str]) -> list[Path]:
    """One for each GPU that this run's ranks on this node use, in an order that all runs share.

    A user's runs lock them while they train.  The system unlocks those of a run that dies.
    """
    ranks = int(env.get("LOCAL_WORLD_SIZE", "1"))
    numbers = env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(ranks)))
    folder = Path(tempfile.gettempdir())
    name = f"training_of_{os.getuid()}_on_gpu"
    return sorted(folder / f"{name}_{number}.lock" for number in numbers.split(",")[:ranks])


def lock_all(files: Sequence[IO[str]], how: int) -> None:
    """In their order, so that no two runs wait for each other."""
    for file in files:
        fcntl.flock(file, how)


def take_turns(locks: Sequence[Path]) -> None:
    """From now on this process warms up at once, but trains while it holds all of the `locks`.

    Of several ranks the first is to do so: the others wait for it before their first step.  The
    log's warm-up is without the wait.
    """
    warm_up = tg.warm_up
    train = tg.train
    turn = [lock.open("w") for lock in locks]
    # Shared by those that start or score.
    others = [lock.with_suffix(".others").open("w") for lock in locks]
    lock_all(others, fcntl.LOCK_SH)

    def warm_up_and_wait(trainer: tg.Trainer, *arguments: Any) -> None:
        warm_up(trainer, *arguments)
        lock_all(others, fcntl.LOCK_UN)
        lock_all(turn, fcntl.LOCK_EX)
        if trainer.h.max_wallclock_seconds > 0:
            lock_all(others, fcntl.LOCK_EX)

    def train_and_give_way(*arguments: Any) -> Any:
        try:
            return train(*arguments)
        finally:
            lock_all(others, fcntl.LOCK_SH)
            lock_all(turn, fcntl.LOCK_UN)

    tg.warm_up = warm_up_and_wait
    tg.train = train_and_give_way


def wait_as_long_as_it_takes() -> None:
    """Ranks that wait for the first one would give up after 30 minutes, and end the run."""
    join = tg.dist.init_process_group
    tg.dist.init_process_group = functools.partial(join, timeout=LONGEST_WAIT)


if __name__ == "__main__":
    wait_as_long_as_it_takes()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        take_turns(turn_files(os.environ))
    tg.main()
