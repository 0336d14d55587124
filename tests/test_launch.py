"""Launches that cannot work: one line, before anything starts."""

import itertools
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_run import check_one_error, completed_run, data_in, leave_no_room_for, run_here
from support import EARLIER, REPO, errors_of, refusal, tiny, train_gpt, write_shard

RANKS: dict[str, str] = dict(
    RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return data_in(tmp_path_factory.mktemp("data"))


# torchrun's variables


def test_without_the_variables_a_process_is_alone() -> None:
    assert train_gpt.launch_of({}) == (0, 0, 1)


@pytest.mark.parametrize(
    ("rank", "local", "world"), [(0, 0, 1), (0, 0, 2), (9, 1, 16), (15, 7, 16)]
)
def test_all_of_the_variables_give_the_place(rank: int, local: int, world: int) -> None:
    env = RANKS | dict(RANK=str(rank), LOCAL_RANK=str(local), WORLD_SIZE=str(world))
    assert train_gpt.launch_of(env) == (rank, local, world)


def subsets() -> Iterator[tuple[str, ...]]:
    """Some of the variables, but neither none nor all."""
    for size in range(1, len(RANKS)):
        yield from itertools.combinations(RANKS, size)


@pytest.mark.parametrize("names", subsets(), ids="+".join)
def test_some_of_the_variables_are_refused(names: tuple[str, ...]) -> None:
    """The message names what is missing, and what to unset."""
    message = refusal(train_gpt.launch_of, {name: RANKS[name] for name in names})
    missing = [name for name in RANKS if name not in names]
    assert message.startswith(" ".join(missing) + ": missing or empty beside")
    assert message.endswith("start it with torchrun, or unset " + " ".join(names))


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", RANKS)
def test_an_empty_variable_is_refused(name: str, alone: bool) -> None:
    message = refusal(train_gpt.launch_of, {name: ""} if alone else RANKS | {name: ""})
    assert name in message.split(":")[0].split() and "torchrun" in message


@pytest.mark.parametrize("text", ["x", "-1", "1.0", " 1", "0x1", "\u00b2", "nan"])
@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_a_variable_that_is_no_number_is_refused(name: str, text: str) -> None:
    message = refusal(train_gpt.launch_of, RANKS | {name: text})
    assert message.startswith(f"{name}={text!r}: expected a whole number; start it with torchrun")


@pytest.mark.parametrize(
    ("rank", "local", "world"), [(0, 0, 0), (1, 0, 1), (2, 0, 2), (9, 0, 8), (0, 1, 2), (1, 2, 8)]
)
def test_a_rank_outside_the_world_is_refused(rank: int, local: int, world: int) -> None:
    env = RANKS | dict(RANK=str(rank), LOCAL_RANK=str(local), WORLD_SIZE=str(world))
    message = refusal(train_gpt.launch_of, env)
    assert message.startswith(f"RANK={rank}, WORLD_SIZE={world}: not a rank of that many")


@pytest.mark.parametrize("port", ["0", "65536", "99999999999"])
def test_a_port_that_cannot_be_is_refused(port: str) -> None:
    message = refusal(train_gpt.launch_of, RANKS | dict(MASTER_PORT=port))
    assert message.startswith(f"MASTER_PORT={port}: expected 1 to 65535")


ODD_LAUNCHES: list[dict[str, str]] = [
    {"RANK": "abc"}, {"RANK": "1"}, {"RANK": ""}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "2"},
    RANKS | {"RANK": "\u00b2"}, RANKS | {"RANK": "2"}, {"MASTER_ADDR": "127.0.0.1"},
]  # fmt: skip


@pytest.mark.parametrize("variables", ODD_LAUNCHES, ids=str)
def test_an_odd_launch_ends_in_one_line_before_it_starts(
    variables: dict[str, Any], data: dict[str, Any], tmp_path: Path
) -> None:
    done = completed_run(REPO / "train_gpt.py", data, tmp_path, **variables)
    check_one_error(done, "torchrun")
    assert done.stdout == "" and not list(tmp_path.iterdir())


def test_a_port_in_use_ends_in_one_line(data: dict[str, Any], tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        variables: dict[str, Any] = RANKS | dict(MASTER_PORT=port)
        done = completed_run(REPO / "train_gpt.py", data, tmp_path, **variables)
    check_one_error(done, f"MASTER_ADDR=127.0.0.1, MASTER_PORT={port}", "EADDRINUSE", "free port")
    assert not list(tmp_path.iterdir())


# Compilers


@pytest.mark.parametrize(
    ("backend", "reason"),
    [("inductor", "InvalidCxxCompiler: No working C++ compiler"), ("tvm", "ImportError: ")],
)
def test_a_compiler_that_is_not_there_ends_in_one_line(
    backend: str, reason: str, data: dict[str, Any], tmp_path: Path
) -> None:
    nothing_cached = dict(CXX=tmp_path / "none", TORCHINDUCTOR_CACHE_DIR=tmp_path / "cache")
    settings = dict(COMPILE_BACKEND=backend, **nothing_cached)
    done = completed_run(REPO / "train_gpt.py", data, tmp_path, **settings)
    check_one_error(
        done, f"COMPILE_BACKEND={backend}: cannot compile here ({reason}", "COMPILE_BACKEND=none"
    )


def test_only_what_a_compiler_raises_is_a_compilers_fault() -> None:
    assert train_gpt.compiler_fault(RuntimeError("a bug")) == ""


# Settings


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_a_seed_that_torch_and_numpy_take_is_taken(seed: int) -> None:
    h = train_gpt.Hyperparameters.from_env({"SEED": str(seed)})
    assert h.seed == seed
    train_gpt.initial_weights(tiny(seed=seed))
    shard = train_gpt.np.zeros(9999, dtype="uint16")
    train_gpt.BatchPlan([shard], 32, 8, seed).tokens(0, range(8))


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1, 2**64, 10**30])
def test_a_seed_beyond_the_range_is_refused(seed: int) -> None:
    message = refusal(train_gpt.Hyperparameters.from_env, {"SEED": str(seed)})
    assert message == f"SEED={seed}: set it within 0 to {2**63 - 1}"


def test_the_baselines_initial_std_has_its_name_here() -> None:
    message = refusal(train_gpt.Hyperparameters.from_env, {"TIED_EMBED_INIT_STD": "0.005"})
    assert message == "TIED_EMBED_INIT_STD='0.005': not a setting here; set EMBED_INIT_STD"


LABELS = [
    ("data/sample_sp64", 64, "sample"),
    ("sample_sp64/", 64, "sample"),
    ("resampled_web", 64, "proxy"),
    ("my_sample", 64, "proxy"),
    ("sample", 64, "proxy"),
    ("sample_sp64_new", 64, "proxy"),
    ("sample_sp1024", 64, "proxy"),
    ("sample_sp64/web", 64, "proxy"),
    ("fineweb10B_sp64", 64, "proxy"),
]


@pytest.mark.parametrize(("path", "vocab_size", "label"), LABELS)
def test_only_the_built_in_samples_folder_is_labelled_sample(
    path: str, vocab_size: int, label: str
) -> None:
    h = tiny(data_path=path, vocab_size=vocab_size)
    assert train_gpt.dataset_label(h, 100_000) == label


def test_the_built_in_sample_is_where_the_label_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    import prepare_data

    monkeypatch.setattr(prepare_data, "build", lambda root, name, size, *rest: (
        root / f"datasets/{name}_sp{size}", root / "tiny.model"))  # fmt: skip
    h = prepare_data.with_sample(tiny(data_path="sample"))
    assert train_gpt.dataset_label(h, 100_000) == "sample"


# Files and data


def test_a_validation_split_of_bos_only_is_refused(data: dict[str, Any], tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    write_shard(shards / "fineweb_train_000000.bin", range(2, 290))
    for count in (2, 500):
        write_shard(shards / "fineweb_val_000000.bin", [1] * count)
        mine = data | {"data_path": str(shards)}
        message = refusal(run_here, mine, tmp_path / "out")
        assert message == f"{shards}/fineweb_val_*.bin: no text; build it again"
    assert not list((tmp_path / "out").glob("*.log"))


@pytest.mark.parametrize("tokens", [[], [1], [7]])
def test_a_validation_split_without_a_target_is_refused(
    tokens: list[int], data: dict[str, Any], tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    write_shard(shards / "fineweb_val_000000.bin", tokens)
    message = refusal(run_here, data | {"data_path": str(shards)}, tmp_path / "out")
    assert message.startswith("validation split: expected at least 2 tokens")


@pytest.mark.parametrize("name", ["folder", "file/losses.npz", "nowhere/losses.npz", "folder/."])
def test_a_dump_that_cannot_be_written_is_refused_first(
    name: str, data: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    dump = str(tmp_path / name)
    message = refusal(lambda: run_here(data, tmp_path / "out", eval_dump=dump))
    assert message.startswith(f"EVAL_DUMP={dump}: expected a file in a folder that exists")
    assert not list((tmp_path / "out").glob("*.log"))


def test_a_dump_into_a_folder_that_is_only_read_is_refused_first(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    dump = str(tmp_path / "losses.npz")
    message = refusal(lambda: run_here(data, tmp_path / "out", eval_dump=dump))
    assert message.startswith(f"EVAL_DUMP={dump}: expected a file in a folder that exists and can")


def test_a_dump_into_the_new_output_folder_is_written(data: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_here(data, out, eval_dump=str(out / "losses.npz"))
    assert (out / "losses.npz").stat().st_size > 0


def test_a_dump_that_fills_its_disk_is_named(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another OUTPUT_DIR would not help, and the artifact is there to be scored again."""
    leave_no_room_for("losses.npz", monkeypatch)
    dump = tmp_path / "losses.npz"
    message = refusal(lambda: run_here(data, tmp_path, eval_dump=str(dump)))
    assert message.startswith(f"EVAL_DUMP={dump}: cannot be written (No space left on device)")
    artifact = tmp_path / "final_model.partial.ptz"
    assert f"EVAL_ONLY={artifact} or RESUME_FROM" in message and artifact.stat().st_size > 0


NAMES = ["train.log", "train_seed1337.log", "result_seed1337.json", "submission.json",
         "final_model.pt", "final_model.ptz", "final_model.partial.pt"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_in_place_of_a_result_is_refused_first(
    name: str, data: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text(EARLIER)
    message = refusal(run_here, data, tmp_path)
    assert message.startswith(f"{tmp_path / name}: is a folder") and "OUTPUT_DIR" in message
    assert {path.name for path in tmp_path.iterdir()} == {name, "notes.txt", "run.lock"}


# Windows

ON_WINDOWS = """
import runpy, sys
import collections, concurrent.futures, contextlib, copy, dataclasses, difflib, functools, hashlib
import importlib.util, io, itertools, json, mmap, pathlib, platform, re, signal, struct, time
class NoImport:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "fcntl", "numpy", "sentencepiece", "zstandard", "triton"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, NoImport())
sys.platform = "win32"
runpy.run_path("train_gpt.py", run_name="__main__")
"""


def test_on_windows_one_line_comes_before_any_import() -> None:
    """Of what a Windows machine may lack: torch, fcntl."""
    command = [sys.executable, "-c", ON_WINDOWS]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == errors_of(done.stderr)
    assert "Windows" in done.stderr and "Linux or macOS" in done.stderr


# What was tested is what is said


def test_message_and_requirements_allow_the_same_torch() -> None:
    (row,) = [
        line for line in (REPO / "requirements.txt").read_text().splitlines()
        if line.startswith("torch")
    ]  # fmt: skip
    assert row.split("#")[0].strip() == "torch>=2.11,<2.15"
    assert "expected 2.11 to 2.14" in (REPO / "train_gpt.py").read_text()
    assert "`torch is ..., expected 2.11 to 2.14`" in (REPO / "docs/USAGE.md").read_text()
    for tried in ("2.11 on CUDA", "2.13 on CPUs", "2.14.1 on a CPU"):
        assert tried in (REPO / "requirements.txt").read_text()


def test_ci_installs_the_small_torch_first() -> None:
    lines = (REPO / ".ci/run").read_text().splitlines()
    installs = [line for line in lines if "pip install" in line]
    assert "torch==2.13.*" in installs[0] and "tests/requirements.txt" in installs[1]


@pytest.mark.parametrize("name", ["README.md", "docs/USAGE.md"])
def test_the_words_name_the_systems_and_what_was_not_tried(name: str) -> None:
    text = (REPO / name).read_text()
    assert "any machine" not in text
    assert "Linux" in text and "macOS" in text and "untested" in text


def test_git_ignores_the_lock_of_a_run() -> None:
    assert "run.lock" in (REPO / ".gitignore").read_text().splitlines()
