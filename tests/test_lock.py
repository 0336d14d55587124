"""Claims about two runs in one OUTPUT_DIR: the second is refused, and nothing stays locked."""

import errno
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_run import (
    check_one_error,
    check_whole,
    completed_run,
    data_in,
    environment,
    program,
    run_here,
)
from support import (
    EARLIER,
    HANG,
    REPO,
    RESULTS,
    cpu_runtime,
    errors_of,
    launch,
    refusal,
    tiny,
    train_gpt,
    wait_for,
)

SCRIPT = REPO / "train_gpt.py"
LONG: dict[str, Any] = dict(ITERATIONS=100_000, TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=0)
Data = dict[str, Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return data_in(tmp_path_factory.mktemp("data"))


def started(
    data: Data, out: Path, ranks: int = 1, script: Path = SCRIPT, **settings: Any
) -> subprocess.Popen[str]:
    """A run in the folder that has logged its first step and would go on for hours."""
    mine: dict[str, Any] = environment(data, out, **LONG | settings)
    process = launch(script, ranks=ranks, cwd=out, fresh=True, **mine)
    assert process.stdout
    for line in process.stdout:
        if line.startswith("step:1/"):
            return process
    raise AssertionError(wait_for(process).stderr)


@contextmanager
def running(data: Data, out: Path, ranks: int = 1, **settings: Any) -> Iterator[int]:
    """Such a run meanwhile: its process number.  It must end as if nothing had been."""
    process = started(data, out, ranks, **settings)
    try:
        yield process.pid
    finally:
        process.terminate()
        done = wait_for(process)
    assert any("interrupted at step" in line for line in errors_of(done.stderr)), done.stderr


def process_in(lock: Path) -> int:
    match = re.match(
        r"process (\d+) on \S+ since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d$", lock.read_text()
    )
    assert match, lock.read_text()
    return int(match[1])


# Refused


def test_what_would_be_a_second_run_in_a_folder_is_refused(data: Data, tmp_path: Path) -> None:
    """Another seed, the same command, a resume and a scoring, while the first one trains."""
    earlier = tmp_path / "earlier"
    run_here(data, earlier)
    out = tmp_path / "out"
    out.mkdir()
    for name in RESULTS:
        (out / name).write_text(EARLIER)
    seconds: list[dict[str, Any]] = [
        dict(SEED=2),
        {},
        dict(RESUME_FROM=earlier / "final_model.pt"),
        dict(EVAL_ONLY=earlier / "final_model.ptz", EVAL_STRIDE=0),
    ]
    with running(data, out) as first:
        before = {path.name for path in out.iterdir()}
        for settings in seconds:
            mine: dict[str, Any] = environment(data, out, **settings)
            if "RESUME_FROM" in settings:
                mine = {"OUTPUT_DIR": out, "DEVICE": "cpu", **settings}
            done = wait_for(launch(SCRIPT, cwd=out, **mine))
            check_one_error(done, f"OUTPUT_DIR={out}: in use by process {first} on ",
                            "set another OUTPUT_DIR", "torchrun")  # fmt: skip
            assert "step:" not in done.stdout
        assert process_in(out / "run.lock") == first, "a refused run signs nothing"
        assert {path.name for path in out.iterdir()} == before
    for name in RESULTS:
        assert (out / name).read_text() == EARLIER, name


def test_a_relative_path_and_a_link_are_the_same_folder(data: Data, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    files = train_gpt.RunFiles(tiny(**data, output_dir=str(tmp_path / "out")))
    with files.locked(cpu_runtime()):
        for name in ("out/../out", "out/", "./out", "link"):
            message = refusal(run_here, data, f"{tmp_path}/{name}")
            assert f"in use by process {os.getpid()} on " in message


def test_of_one_command_started_thrice_one_run_ends_whole(data: Data, tmp_path: Path) -> None:
    """As where a process is started for every GPU, and torchrun is forgotten."""
    mine: dict[str, Any] = environment(data, tmp_path, **LONG | dict(ON_INTERRUPT="finish"))
    processes = [launch(SCRIPT, cwd=tmp_path, fresh=True, **mine) for _ in range(3)]
    patience = time.monotonic() + HANG
    while sum(process.poll() is None for process in processes) > 1:
        assert time.monotonic() < patience
        time.sleep(0.05)
    (winner,) = [process for process in processes if process.poll() is None]
    assert winner.stdout
    assert any(line.startswith("step:1/") for line in winner.stdout)
    winner.terminate()
    done = {process.pid: wait_for(process) for process in processes}
    assert done.pop(winner.pid).returncode == 0
    for refused in done.values():
        check_one_error(refused, f"OUTPUT_DIR={tmp_path}: in use by ")
    check_whole(tmp_path)
    assert process_in(tmp_path / "run.lock") == winner.pid


def test_a_second_run_of_two_ranks_is_refused(data: Data, tmp_path: Path) -> None:
    with running(data, tmp_path) as first:
        done = completed_run(SCRIPT, data, tmp_path, ranks=2)
        line, *others = errors_of(done.stderr)
        assert line.startswith(f"error (rank 0): OUTPUT_DIR={tmp_path}: in use by process {first} ")
        # torchrun may end rank 1 before it waits for rank 0.
        assert others in ([], ["error (rank 1): interrupted"]), done.stderr
        assert done.returncode == 1 and "[rank1]" not in done.stderr


# Not refused


def test_two_ranks_are_one_run_which_a_second_run_respects(data: Data, tmp_path: Path) -> None:
    with running(data, tmp_path, ranks=2) as torchrun:
        children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
        rank_0 = process_in(tmp_path / "run.lock")
        assert str(rank_0) in children
        assert f"process {rank_0} on" in refusal(run_here, data, tmp_path)


def test_two_folders_hold_two_runs_at_once(data: Data, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with running(data, tmp_path / "a"):
        run_here(data, tmp_path / "a/within")  # of the other run's folder
    check_whole(tmp_path / "a/within")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_ended_leaves_no_lock(
    number: signal.Signals, data: Data, tmp_path: Path
) -> None:
    process = started(data, tmp_path)
    process.send_signal(number)
    assert wait_for(process).returncode != 0
    assert process_in(tmp_path / "run.lock") == process.pid, "the file stays and says nothing"
    run_here(data, tmp_path)
    assert process_in(tmp_path / "run.lock") == os.getpid()


def test_a_rank_that_was_killed_leaves_no_lock(data: Data, tmp_path: Path) -> None:
    process = started(data, tmp_path, ranks=2)
    os.kill(process_in(tmp_path / "run.lock"), signal.SIGKILL)
    assert wait_for(process).returncode != 0
    run_here(data, tmp_path)


def test_a_child_that_outlives_a_run_holds_no_lock(data: Data, tmp_path: Path) -> None:
    """A program that a run has started does not inherit the file."""
    change = (
        "import subprocess\n"
        "began = train_gpt.open_session\n"
        "def with_child(*arguments):\n"
        "    subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL,\n"
        "                     stderr=subprocess.DEVNULL)\n"
        "    return began(*arguments)\n"
        "train_gpt.open_session = with_child\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    process = started(data, out, script=program(tmp_path, change))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    wait_for(process)
    run_here(data, out)
    alive = [int(child) for child in children if Path(f"/proc/{child}").exists()]
    assert alive, "the child must have outlived the run"
    for child in alive:
        os.kill(child, signal.SIGKILL)


def test_a_run_that_is_refused_for_its_settings_leaves_no_lock(data: Data, tmp_path: Path) -> None:
    foreign = data | {"tokenizer_path": "/no.model"}
    assert "TOKENIZER_PATH" in refusal(run_here, foreign, tmp_path)
    run_here(data, tmp_path)


@pytest.mark.parametrize("content", ["", "process 1 on elsewhere since 1970-01-01", "\0" * 9])
def test_a_lock_file_by_itself_refuses_nothing(content: str, data: Data, tmp_path: Path) -> None:
    """As a crash of the machine leaves it, or a copy of the folder."""
    (tmp_path / "run.lock").write_text(content)
    run_here(data, tmp_path)
    assert process_in(tmp_path / "run.lock") == os.getpid()


def test_two_seeds_after_each_other_share_a_folder(data: Data, tmp_path: Path) -> None:
    for seed in (1, 2):
        run_here(data, tmp_path, seed=seed)
    assert {path.name for path in tmp_path.glob("result_seed*")} == {
        "result_seed1.json", "result_seed2.json"
    }  # fmt: skip


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_ends_no_run(
    code: int, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(train_gpt.fcntl, "flock", no_locks)
    run_here(data, tmp_path)
    check_whole(tmp_path)
