"""Terminals that go away, full disks and signals: a run goes on, or saves what it has."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_run import (
    check_one_error,
    check_whole,
    completed_run,
    data_in,
    in_shell,
    leave_no_room_for,
    program,
    run_here,
)
from support import EARLIER, RESULTS, refusal, tiny, train_gpt

RunLog = train_gpt.RunLog


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return data_in(tmp_path_factory.mktemp("data"))


# Standard streams

GONE = {
    "read once": "$RUN | head -1",
    "both read once": "$RUN 2>&1 | head -1",
    "closed": "$RUN >&-",
    "all closed": "$RUN <&- >&- 2>&-",
    "both full": "$RUN > /dev/full 2>&1",
}


@pytest.mark.parametrize("name", GONE)
def test_a_run_ends_whole_without_its_output(
    name: str, data: dict[str, Any], tmp_path: Path
) -> None:
    done = in_shell(GONE[name], data, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    check_whole(tmp_path)
    log = (tmp_path / "train.log").read_text()
    assert "step:3/3" in log and "final_int6_zstd_sliding_exact" in log


@pytest.mark.parametrize("where", ["2>&-", "2> /dev/full"])
def test_a_mistake_has_its_status_without_standard_error(
    where: str, data: dict[str, Any], tmp_path: Path
) -> None:
    done = in_shell(f"$RUN {where}", data, tmp_path, ITERATIONS="many")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout and not list(tmp_path.iterdir())


def test_a_closed_output_does_not_lead_into_files(data: dict[str, Any], tmp_path: Path) -> None:
    """The next file that a process opens gets the number of a stream that is closed."""
    script = program(tmp_path, WRITE_AT_SCORING)
    command = f"{{ $(echo $RUN | cut -d ' ' -f 1) {script}; }} >&- 2>&-"
    done = in_shell(command, data, tmp_path)
    assert done.returncode == 0
    check_whole(tmp_path)
    for path in tmp_path.glob("*"):
        if path.is_file() and path != script:
            assert b"STRAY" not in path.read_bytes(), path


WRITE_AT_SCORING = """
unpack = train_gpt.unpack
def writing(*arguments):
    for number in (1, 2):
        try:
            os.write(number, b"STRAY")
        except OSError:
            pass
    return unpack(*arguments)
train_gpt.unpack = writing
"""


@pytest.mark.parametrize("error", [BrokenPipeError, OSError])
def test_a_terminal_that_goes_away_is_written_to_once(
    error: type[OSError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Gone:
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            calls.append(text)
            raise error

        def flush(self) -> None:
            pass

    monkeypatch.setattr("sys.stdout", Gone())
    log = RunLog(tmp_path / "a.log")
    log("one")
    log.progress("half", 0.5)
    log("two")
    assert len(calls) == 1 and not log.terminal
    assert (tmp_path / "a.log").read_text() == "one\nhalf\ntwo\n"


# Full disks


def fill(path: Path) -> Callable[[], None]:
    """`path` takes no more until what is returned is called."""
    kept = path.with_name("kept")
    path.rename(kept)
    path.symlink_to("/dev/full")

    def free() -> None:
        path.unlink()
        kept.rename(path)

    return free


def test_lines_that_a_full_disk_refuses_are_written_later(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    log = RunLog(path, "head\n")
    log("one")
    free = fill(path)
    log("two")
    log("three \u00e9")
    with pytest.raises(OSError, match="No space left"):
        log.flush()
    free()
    assert path.read_text() == "head\none\n"
    log("four")
    assert path.read_text() == "head\none\ntwo\nthree \u00e9\nfour\n"


def test_a_disk_that_takes_a_part_of_a_line_gets_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No byte is written twice."""
    opened = Path.open

    class Small:
        def __init__(self, file: Any):
            self.file = file

        def __enter__(self) -> "Small":
            return self

        def __exit__(self, *arguments: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> int:
            if room[0] == 0:
                raise OSError(28, "No space left on device")
            part = content[: room[0]]
            room[0] -= len(part)
            return int(self.file.write(part))

    room = [0]
    log = RunLog(tmp_path / "a.log")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *a, **k: Small(opened(*a, **k)))
        room[0] = 5
        log("first line")
        room[0] = 4
        log("second")
    assert (tmp_path / "a.log").read_bytes() == b"first lin"
    log.flush()
    assert (tmp_path / "a.log").read_bytes() == b"first line\nsecond\n"


def test_a_log_on_a_full_disk_loses_no_training(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills in training and has space again when packing begins."""
    step, pack = train_gpt.Trainer.train_step, train_gpt.pack_to_budget
    filled: list[Callable[[], None]] = []

    def full_from_here(*arguments: Any, **options: Any) -> Any:
        if not filled:
            filled.append(fill(tmp_path / "train_seed1337.partial.log"))
        return step(*arguments, **options)

    def space_again(*arguments: Any) -> bytes:
        filled[0]()
        return pack(*arguments)

    monkeypatch.setattr(train_gpt.Trainer, "warm_up", lambda self, evaluator: None)
    monkeypatch.setattr(train_gpt.Trainer, "train_step", full_from_here)
    monkeypatch.setattr(train_gpt, "pack_to_budget", space_again)
    run_here(data, tmp_path)
    check_whole(tmp_path)
    log = (tmp_path / "train.log").read_text()
    assert [f"step:{i}/6 train_loss" in log for i in range(1, 7)] == [True] * 6


def test_a_disk_that_stays_full_is_told_with_the_weights(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = train_gpt.pack_to_budget

    def full_from_here(*arguments: Any) -> bytes:
        fill(tmp_path / "train_seed1337.partial.log")
        return pack(*arguments)

    for name in RESULTS:
        (tmp_path / name).write_text(EARLIER)
    monkeypatch.setattr(train_gpt, "pack_to_budget", full_from_here)
    message = refusal(run_here, data, tmp_path)
    saved = tmp_path / "final_model.partial.pt"
    assert "No space left on device" in message and "OUTPUT_DIR" in message
    assert f"RESUME_FROM={saved}" in message and saved.stat().st_size > 0
    for name in ("train.log", "final_model.pt", "final_model.ptz"):
        assert (tmp_path / name).read_text() == EARLIER, name


def test_weights_that_do_not_fit_do_not_end_the_run(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It packs and scores what it has, and leaves no weights of an earlier run as its own."""
    (tmp_path / "final_model.partial.pt").write_text(EARLIER)
    leave_no_room_for("final_model.partial.pt", monkeypatch)
    result = run_here(data, tmp_path)
    log = (tmp_path / "train.log").read_text()
    assert "note: the weights could not be saved (No space left on device)" in log
    assert f"note: {tmp_path}/final_model.pt" not in log, "there is none of an earlier run"
    assert result.bytes_model == (tmp_path / "final_model.ptz").stat().st_size > 0
    assert not list(tmp_path.glob("*.pt"))


def test_weights_that_are_not_saved_are_not_named(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_no_room_for("final_model.partial.pt", monkeypatch)
    monkeypatch.setattr(train_gpt, "write_artifact", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    message = refusal(run_here, data, tmp_path)
    assert message == "interrupted: the weights could not be saved (No space left on device)"


@pytest.mark.usefixtures("own_signals")
def test_weights_that_an_interrupt_cannot_save_are_told(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no weights of an earlier run are left in their place."""
    (tmp_path / "final_model.partial.pt").write_text(EARLIER)
    struck_in_step(monkeypatch, signal.SIGTERM)
    leave_no_room_for("final_model.partial.pt", monkeypatch)
    message = refusal(run_here, data, tmp_path)
    assert message.startswith("interrupted at step ")
    assert message.endswith(": the weights could not be saved (No space left on device)")
    assert not list(tmp_path.glob("*.pt"))


def test_weights_that_are_not_saved_are_not_offered_on_a_full_disk(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(train_gpt, "write_atomic", full)
    message = refusal(run_here, data, tmp_path)
    assert message.endswith("OUTPUT_DIR; the weights could not be saved (No space left on device)")


def test_a_run_without_its_weights_tells_whose_are_there(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "final_model.pt").write_text(EARLIER)
    leave_no_room_for("final_model.partial.pt", monkeypatch)
    run_here(data, tmp_path)
    log = (tmp_path / "train.log").read_text()
    assert f"note: {tmp_path}/final_model.pt is an earlier run's" in log
    assert (tmp_path / "final_model.pt").read_text() == EARLIER


def test_a_write_that_fails_gives_its_room_back(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    (tmp_path / "a.bin.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        train_gpt.write_atomic(path, b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]
    assert path.read_bytes() == b"old"


def test_a_disk_too_small_for_the_weights_is_refused_first(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 2_000_000
    usage = SimpleNamespace(free=free, total=free)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    message = refusal(run_here, data, tmp_path)
    assert message.startswith(f"OUTPUT_DIR={tmp_path}: {free:,} bytes are free")
    assert not list(tmp_path.glob("*.log"))


@pytest.mark.parametrize("total, free, budget", [(0, 0, 16_000_000), (10**8, 10**8, 10**15)])
def test_a_disk_that_tells_nothing_or_has_room_is_taken(
    total: int, free: int, budget: int, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems of users' programs have no sizes; a budget is no size of an artifact."""
    usage = SimpleNamespace(free=free, total=total)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    train_gpt.RunFiles(tiny(**data, artifact_bytes=budget)).check_space()


def test_a_file_name_that_is_no_unicode_can_be_logged(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "a.log")
    log(os.fsdecode(b"fineweb_\xff.bin"))
    assert (tmp_path / "a.log").read_text() == "fineweb_\\udcff.bin\n"


# Signals in training


@pytest.fixture
def own_signals() -> Iterator[None]:
    """The handlers of pytest are there again afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def struck_in_step(patch: pytest.MonkeyPatch, number: int, when: int = 3) -> None:
    step, count = train_gpt.Trainer.train_step, iter(range(1, 100))

    def struck(*arguments: Any, **options: Any) -> Any:
        if next(count) == when:
            os.kill(os.getpid(), number)
        return step(*arguments, **options)

    patch.setattr(train_gpt.Trainer, "warm_up", lambda self, evaluator: None)
    patch.setattr(train_gpt.Trainer, "train_step", struck)


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_training_saves_what_is_trained(
    number: int, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    struck_in_step(monkeypatch, number)
    message = refusal(run_here, data, tmp_path)
    saved = tmp_path / "final_model.partial.pt"
    assert message == f"interrupted at step 3: RESUME_FROM={saved} scores it"
    assert saved.stat().st_size > 0


def struck_in_the_last_step(patch: pytest.MonkeyPatch) -> None:
    struck_in_step(patch, signal.SIGTERM, when=6)


def struck_while_weights_are_gathered(patch: pytest.MonkeyPatch) -> None:
    stages = train_gpt.Trainer.stages

    def struck(self: train_gpt.Trainer) -> train_gpt.Stages:
        os.kill(os.getpid(), signal.SIGTERM)
        return stages(self)

    patch.setattr(train_gpt.Trainer, "stages", struck)


def struck_before_weights_are_saved(patch: pytest.MonkeyPatch) -> None:
    train = train_gpt.train

    def struck(*arguments: Any) -> Any:
        trained = train(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        return trained

    patch.setattr(train_gpt, "train", struck)


AT_THE_END = [
    struck_in_the_last_step, struck_while_weights_are_gathered, struck_before_weights_are_saved
]  # fmt: skip


@pytest.fixture(params=AT_THE_END)
def struck_at_the_end(
    request: pytest.FixtureRequest, own_signals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal that comes when the loop has looked for signals for the last time."""
    signal.signal(signal.SIGTERM, train_gpt.interrupt)  # as main sets it
    request.param(monkeypatch)


@pytest.mark.usefixtures("struck_at_the_end")
def test_a_signal_at_the_end_of_training_ends_the_run_with_whole_weights(
    data: dict[str, Any], tmp_path: Path
) -> None:
    message = refusal(run_here, data, tmp_path)
    saved = tmp_path / "final_model.partial.pt"
    assert message == f"interrupted: RESUME_FROM={saved} packs and scores it"
    facts = torch.load(saved, weights_only=True)["facts"]
    assert facts["step_stop"] == 6 and not facts["interrupted"]


@pytest.mark.usefixtures("struck_at_the_end")
def test_a_signal_at_the_end_of_training_may_finish_the_run(
    data: dict[str, Any], tmp_path: Path
) -> None:
    result = run_here(data, tmp_path, on_interrupt="finish")
    assert result.facts and not result.facts.interrupted
    check_whole(tmp_path)


@pytest.mark.usefixtures("own_signals")
def test_a_hangup_in_training_may_finish_the_run(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    struck_in_step(monkeypatch, signal.SIGHUP)
    result = run_here(data, tmp_path, on_interrupt="finish")
    assert result.facts and result.facts.step_stop == 3 and result.facts.interrupted
    check_whole(tmp_path)
    saved = tmp_path / "final_model.partial.pt"  # its name until the run has ended
    log = (tmp_path / "train.log").read_text()
    assert f"note: RESUME_FROM={saved} scores it if this run is ended as well" in log


@pytest.mark.usefixtures("own_signals")
def test_under_nohup_a_hangup_is_ignored(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    assert signal.SIGHUP not in train_gpt.ending_signals()
    struck_in_step(monkeypatch, signal.SIGHUP)
    result = run_here(data, tmp_path)
    assert result.facts and result.facts.step_stop == 6 and not result.facts.interrupted
    check_whole(tmp_path)


HANG_UP = """
step = train_gpt.Trainer.train_step
def struck(*arguments, **options):
    os.kill(os.getpid(), signal.SIGHUP)
    return step(*arguments, **options)
train_gpt.Trainer.train_step = struck
train_gpt.Trainer.warm_up = lambda self, evaluator: None
"""


@pytest.mark.parametrize("nohup", ["", "nohup"])
def test_the_program_heeds_a_hangup_unless_nohup_is_there(
    nohup: str, data: dict[str, Any], tmp_path: Path
) -> None:
    script = program(tmp_path, HANG_UP)
    python = "$(echo $RUN | cut -d ' ' -f 1)"
    done = in_shell(f"{nohup} {python} {script}", data, tmp_path)
    if nohup:
        assert done.returncode == 0, done.stderr
        check_whole(tmp_path)
    else:
        check_one_error(done, "interrupted at step 1: RESUME_FROM=")


@pytest.mark.usefixtures("own_signals")
def test_a_second_signal_does_not_lose_what_is_saved(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun passes a Ctrl-C on that its processes have had already."""
    save = train_gpt.save_checkpoint

    def struck(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    struck_in_step(monkeypatch, signal.SIGINT)
    monkeypatch.setattr(train_gpt, "save_checkpoint", struck)
    message = refusal(run_here, data, tmp_path)
    assert message.startswith("interrupted at step 3: RESUME_FROM=")
    assert (tmp_path / "final_model.partial.pt").stat().st_size > 0


@pytest.mark.usefixtures("own_signals")
def test_a_first_signal_while_saving_leaves_the_weights(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = train_gpt.save_checkpoint

    def struck(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments)

    monkeypatch.setattr(train_gpt, "save_checkpoint", struck)
    message = refusal(run_here, data, tmp_path)
    saved = tmp_path / "final_model.partial.pt"
    assert message == f"interrupted: RESUME_FROM={saved} packs and scores it"
    assert saved.stat().st_size > 0


# Signals after training

STRUCK = """
function = train_gpt.{name}
def struck(*arguments):
    os.kill(os.getpid(), signal.{signal})
    return function(*arguments)
train_gpt.{name} = struck
"""
LATE = [("pack", "SIGINT"), ("score_from_disk", "SIGHUP"), ("write_result", "SIGTERM")]


@pytest.mark.parametrize(("name", "number"), LATE)
def test_a_signal_after_training_names_weights_that_work(
    name: str, number: str, data: dict[str, Any], tmp_path: Path
) -> None:
    for file in RESULTS:
        (tmp_path / file).write_text(EARLIER)
    saved = tmp_path / "final_model.partial.pt"
    script = program(tmp_path, STRUCK.format(name=name, signal=number))
    done = completed_run(script, data, tmp_path)
    check_one_error(done, f"interrupted: RESUME_FROM={saved} packs and scores it")
    assert all((tmp_path / file).read_text() == EARLIER for file in RESULTS)
    again = completed_run(program(tmp_path), data, tmp_path, RESUME_FROM=saved)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1].startswith("val_bpb:")


def test_a_resumed_run_that_is_struck_names_the_file_it_read(
    data: dict[str, Any], tmp_path: Path
) -> None:
    first = tmp_path / "first"
    first.mkdir()
    assert completed_run(program(tmp_path), data, first).returncode == 0
    weights = first / "final_model.pt"
    script = program(tmp_path, STRUCK.format(name="pack_to_budget", signal="SIGTERM"))
    done = completed_run(script, data, tmp_path, RESUME_FROM=weights)
    check_one_error(done, f"RESUME_FROM={weights}")
