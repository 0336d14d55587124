"""Runs in small for the tests of faults: in this process, or in one that is changed before."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import (
    CARD_IN_SMALL,
    HANG,
    REPO,
    RESULTS,
    cpu_runtime,
    errors_of,
    launch,
    tiny,
    train_gpt,
    train_tokenizer,
    wait_for,
    write_shard,
)

PIECES = 300  # of the tokenizer
WORDS = ["river", "stone", "lantern", "violet", "engine"]
Done = subprocess.CompletedProcess[str]


def tokens_in(folder: Path) -> list[int]:
    """Documents as tokens of tiny.model, a tokenizer that is trained in `folder`."""
    generator = np.random.Generator(np.random.PCG64(0))
    texts = [" ".join(generator.choice(WORDS, 40)) + f" {i}." for i in range(200)]
    processor = train_tokenizer(folder / "tiny.model", texts, PIECES)
    return [token for text in texts for token in (1, *processor.encode(text))]


def data_in(folder: Path) -> dict[str, Any]:
    """Settings, as fields, of data that are made in `folder`."""
    tokens = tokens_in(folder)
    write_shard(folder / "shards/fineweb_train_000000.bin", tokens[1000:])
    write_shard(folder / "shards/fineweb_val_000000.bin", tokens[:1000])
    return {
        "vocab_size": PIECES,
        "data_path": str(folder / "shards"),
        "tokenizer_path": str(folder / "tiny.model"),
    }


def run_here(data: dict[str, Any], out: Path, **settings: Any) -> train_gpt.RunResult:
    """A whole run in this process."""
    return train_gpt.run(tiny(**data, output_dir=str(out), **settings), cpu_runtime())


def environment(data: dict[str, Any], out: Path, **settings: object) -> dict[str, object]:
    """The same settings as environment variables, for the card in small."""
    named = {name.upper(): value for name, value in data.items()}
    return {**CARD_IN_SMALL, **named, "OUTPUT_DIR": out, **settings}


def program(folder: Path, change: str = "") -> Path:
    """A script that is train_gpt.py with `change`, a piece of Python, made to it before main."""
    path = folder / "changed.py"
    path.write_text(
        f"import os, signal, sys\nsys.path.insert(0, {str(REPO)!r})\nimport train_gpt\n"
        f"{change}\ntrain_gpt.main()\n"
    )
    return path


def completed_run(
    script: Path, data: dict[str, Any], out: Path, ranks: int = 1, **settings: Any
) -> Done:
    return wait_for(launch(script, ranks=ranks, cwd=out, **environment(data, out, **settings)))


def in_shell(command: str, data: dict[str, Any], out: Path, **settings: object) -> Done:
    """A command of bash, in which $RUN is the program; a pipe fails with its first part."""
    variables = {name: str(value) for name, value in environment(data, out, **settings).items()}
    variables |= {"PATH": os.environ["PATH"], "RUN": f"{sys.executable} {REPO / 'train_gpt.py'}"}
    shell = ["bash", "-o", "pipefail", "-c", command]
    return subprocess.run(shell, env=variables, cwd=out, capture_output=True, text=True,
                          timeout=HANG)  # fmt: skip


def leave_no_room_for(name: str, patch: pytest.MonkeyPatch) -> None:
    """The disk has no room for a file of that name, and room for all else."""
    write = train_gpt.write_atomic

    def other_files(path: Path, content: bytes) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    patch.setattr(train_gpt, "write_atomic", other_files)


def check_whole(out: Path) -> None:
    """Every file of a finished run is there, and none of an unfinished one."""
    for name in (*RESULTS, "train_seed1337.log", "result_seed1337.json"):
        assert (out / name).stat().st_size > 0, name
    assert not list(out.glob("*.partial.*"))
    assert not list(out.glob("*.tmp"))
    assert (out / "train.log").read_text().splitlines()[-1].startswith("val_bpb:")


def check_one_error(done: Done, *parts: str) -> None:
    """It failed with one line that holds every part, and without a traceback."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    errors = errors_of(done.stderr)
    assert len(errors) == 1, done.stderr
    assert [part for part in parts if part not in errors[0]] == [], errors[0]
