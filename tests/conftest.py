"""Shared settings: the repository on the path, one torch thread, `gpu` tests only where one is."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")
    torch.set_num_threads(1)
    # Started by nohup, tests and the runs that they start would ignore SIGHUP.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # Started by a script in the background, they would ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No graph, counter or recompile limit of one test reaches another."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
