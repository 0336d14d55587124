"""Claims about bench/timing.py: the median of calls in a row, on either clock."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import REPO, FakeClock

sys.path.insert(0, str(REPO / "bench"))
import timing


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(timing, "time", fake)
    return fake


def calls_of(clock: FakeClock, *seconds: float) -> Any:
    """A function that takes so long at its first, second, ... call."""
    left = iter(seconds)

    def call() -> str:
        clock.now += next(left)
        return "done"

    return call


def test_a_time_is_the_median_of_the_calls_after_warm_ones(clock: FakeClock) -> None:
    call = calls_of(clock, 90.0, 50.0, 0.002, 7.0, 0.004, 0.003, 0.001)
    found = timing.milliseconds(call, on_cuda=False, repeats=5, warm=2)
    assert found == pytest.approx(3.0, abs=1e-4)


def test_one_call_gives_its_result_and_its_seconds(clock: FakeClock) -> None:
    result, seconds = timing.seconds(calls_of(clock, 2.5))
    assert result == "done" and seconds == pytest.approx(2.5)


def test_on_a_gpu_events_are_read_once_all_calls_are_queued(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def elapsed_time(self, end: Any) -> float:
            assert done, "read before the GPU was done"
            return (end.at - self.at) * 1e3

    cuda = SimpleNamespace(Event=Event, synchronize=lambda: done.append(True))
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=cuda))
    call = calls_of(clock, 9.0, 0.002, 0.004, 0.003)
    assert timing.milliseconds(call, True, repeats=3, warm=1) == pytest.approx(3.0)
    assert done == [True]


@pytest.mark.gpu
def test_a_sleep_of_the_gpu_is_timed() -> None:
    cycles = 20_000_000  # at 1 to 2 GHz
    found = timing.milliseconds(lambda: torch.cuda._sleep(cycles), on_cuda=True, repeats=5)
    assert 5 < found < 40
