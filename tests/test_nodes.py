"""Two nodes, each with an environment, a disk and signals of its own."""

import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from small_run import data_in, environment, program
from support import HANG, REPO, cpu_runtime, launch, refusal, tiny, train_gpt, write_shard

Node = subprocess.Popen[str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return data_in(tmp_path_factory.mktemp("data"))


def nodes(script: Path, *settings: dict[str, object]) -> list[Node]:
    """One torchrun for each dict of settings, of one rank, as on a machine of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for number, own in enumerate(settings):
        torchrun = [f"--nnodes={len(settings)}", "--nproc_per_node=1", f"--node_rank={number}"]
        torchrun += ["--master_addr=127.0.0.1", f"--master_port={port}"]
        mine: dict[str, Any] = own
        started.append(launch(script, torchrun=torchrun, **mine))
    return started


def errors_and_status(node: Node) -> tuple[list[str], int]:
    try:
        _, said = node.communicate(timeout=HANG)
    except subprocess.TimeoutExpired:
        node.kill()
        raise
    return [line for line in said.splitlines() if line.startswith(("error", "lost"))], node.wait()


@pytest.mark.parametrize("name, value", [("SEED", 7), ("ITERATIONS", 5), ("EVAL_ONLY", "none.ptz")])
def test_a_node_of_other_settings_is_refused(
    name: str, value: object, data: dict[str, Any], tmp_path: Path
) -> None:
    """Not trained with in silence, and not waited for."""
    first = environment(data, tmp_path / "a")
    started = nodes(REPO / "train_gpt.py", first, {**first, name: value})
    for node in started:
        errors, status = errors_and_status(node)
        assert status == 1 and len(errors) == 1
        assert f"rank 1: {name}=" in errors[0] and "but rank 0 has" in errors[0]
    assert not list(tmp_path.glob("a/*.log"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_node_of_other_text_is_refused(split: str, data: dict[str, Any], tmp_path: Path) -> None:
    """It would train on windows of its own, or score them."""
    other = tmp_path / "shards"
    other.mkdir()
    for path in Path(data["data_path"]).iterdir():
        content = path.read_bytes()
        tokens = memoryview(content[1024:]).cast("H").tolist()
        write_shard(other / path.name, tokens[:-80] if split in path.name else tokens)
    first = environment(data, tmp_path / "a")
    started = nodes(REPO / "train_gpt.py", first, {**first, "DATA_PATH": other})
    for node in started:
        errors, status = errors_and_status(node)
        assert status == 1 and len(errors) == 1
        assert "rank 1: SHA-256 of the" in errors[0]


def test_places_and_names_may_differ_between_nodes() -> None:
    one = tiny(output_dir="a", data_path="b", run_id="c", eval_only="d.ptz", eval_dump="e")
    other = tiny(output_dir="f", data_path="g", run_id="h", eval_only="i.ptz")
    assert train_gpt.same_on_all_ranks(one) == train_gpt.same_on_all_ranks(other)
    assert train_gpt.same_on_all_ranks(tiny()) != train_gpt.same_on_all_ranks(tiny(matrix_lr=0.02))


def test_the_rank_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [{"A": 1}, {"A": 1}, {"A": 2}]
    monkeypatch.setattr(train_gpt.Runtime, "gather", lambda self, value: found)
    message = refusal(cpu_runtime().check_alike, {"A": 1})
    assert message.startswith("rank 2: A=2, but rank 0 has 1;")


def test_a_signal_to_the_other_node_saves_what_is_trained(
    data: dict[str, Any], tmp_path: Path
) -> None:
    """torchrun kills that node's rank after 30 s, and the weights would end with it."""
    settings = environment(data, tmp_path / "out", ITERATIONS=1_000_000, TRAIN_LOG_EVERY=1)
    settings["MAX_WALLCLOCK_SECONDS"] = 0
    first, second = nodes(program(tmp_path, "train_gpt.ASK_SECONDS = 0.2"), settings, settings)
    assert first.stdout
    for line in first.stdout:
        if line.startswith("step:3/"):
            break
    second.send_signal(signal.SIGTERM)
    errors, status = errors_and_status(first)
    assert status == 1
    assert errors[0].startswith("error (rank 0): interrupted at step ")
    assert (tmp_path / "out/final_model.partial.pt").stat().st_size > 0
    errors_and_status(second)
