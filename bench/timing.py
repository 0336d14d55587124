"""The clocks of the other tools: the median of many calls, and one call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

T = TypeVar("T")
Mark = torch.cuda.Event | float  # a moment: on the device's clock, or in seconds on the host's


def milliseconds(
    function: Callable[[], object], on_cuda: bool, repeats: int = 20, warm: int = 3
) -> float:
    """Median time from the end of one call to the end of the next, of `repeats` calls in a row."""
    marks = ends(function, on_cuda, repeats, warm)
    return median_between(marks, marks[1:])


def ends(
    function: Callable[[], object], on_cuda: bool, repeats: int = 20, warm: int = 3
) -> list[Mark]:
    """The end of the last of `warm` calls, then of each of `repeats` more, all in a row.

    Nothing waits between the calls, so the host may run ahead of the GPU, as it does in training;
    where the GPU waits for the host, that time counts.
    """
    for _ in range(warm):
        function()
    marks = [now(on_cuda)]
    for _ in range(repeats):
        function()
        marks.append(now(on_cuda))
    if on_cuda:
        torch.cuda.synchronize()
    return marks


def now(on_cuda: bool) -> Mark:
    """On a GPU, the moment at which it has done what is queued."""
    if not on_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Mark, end: Mark) -> float:
    """Milliseconds."""
    if isinstance(start, float) and isinstance(end, float):
        return (end - start) * 1e3
    return start.elapsed_time(end)  # type: ignore[union-attr,arg-type]


def median_between(starts: Iterable[Mark], ends: Iterable[Mark]) -> float:
    """Median of the milliseconds from each start to the end at its place, as far as both go."""
    return statistics.median(map(between, starts, ends))


def seconds(function: Callable[[], T], on_cuda: bool = False) -> tuple[T, float]:
    """The result of one call and how long it took, the GPU's work included."""
    began = time.perf_counter()
    result = function()
    if on_cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - began
