"""Every row of the fault table: a clear message, the right exit status, no hang, nothing lost.

| fault | test |
|---|---|
| corrupt, short, foreign shard | test_data.py `..._shard_...`, test_run.py "short shard" |
| unreadable shard | here |
| missing or foreign tokenizer | test_data.py, test_run.py "missing tokenizer" |
| vocabulary mismatch | test_data.py, test_run.py "foreign train token", here |
| indivisible world size | test_run.py `..._two_ranks_cannot_share...`, test_training.py |
| non-finite loss at step k | test_training.py `..._not_finite_...`; what it saves is scored here |
| one of two ranks killed | test_run.py `..._killed_...` |
| full disk at export | test_run.py `..._full_disk_...` |
| truncated, tampered, foreign artifact | test_pack.py, and whole runs here |
| artifact of another shape | test_run.py `..._another_architecture...` |
| out of memory in evaluation | test_eval.py `..._runs_out_of_memory...` |
| no GPU | here |
| too old torch | here |
| read-only folder | here, and test_run.py "unwritable output" |
| no record.py beside the program | here |
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import REPO, cpu_runtime, tiny, train_gpt
from test_record import SMALL, challenge_tree

from train_gpt import RunError

# Root may read and write everything, so refusals come from the interpreter: a hook that sees every
# file being opened.
REFUSING = """
import errno, os, sys
def refuse(event, arguments):
    if event not in ("open", "os.mkdir", "os.rename") or not isinstance(arguments[0], str):
        return
    path, writes = arguments[0], event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    if path.startswith(os.environ["REFUSE_WRITE" if writes else "REFUSE_READ"]):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
sys.addaudithook(refuse)
"""
EARLIER = "of an earlier run"


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the program in a tree that holds its data."""
    folder = challenge_tree(tmp_path_factory.mktemp("tree"))
    (folder.parents[2] / "hook").mkdir()
    (folder.parents[2] / "hook/sitecustomize.py").write_text(REFUSING)
    return folder


def start(folder: Path, tree: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    """The program in `folder`, as a user starts it from the root of `tree`."""
    keep = ("PATH", "HOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYENV_VERSION", "TMPDIR")
    env = {k: os.environ[k] for k in keep if k in os.environ}
    env |= {k: str(v) for k, v in (SMALL | settings).items()}
    return subprocess.run([sys.executable, str(folder / "train_gpt.py")], env=env, cwd=tree,
                          text=True, capture_output=True, timeout=100, check=False)  # fmt: skip


def check_refusal(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """It failed with one line of error that holds every part."""
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, done.stderr
    assert [part for part in parts if part not in errors[0]] == [], errors[0]


def refusing(record: Path, read: object = "/no/", write: object = "/no/") -> dict[str, object]:
    """Settings under which paths that begin so may not be read, or not be written."""
    return {"PYTHONPATH": record.parents[2] / "hook", "REFUSE_READ": read, "REFUSE_WRITE": write}


def test_a_shard_that_may_not_be_read_is_named_with_the_reason(record: Path) -> None:
    shard = "data/datasets/fineweb10B_sp1024/fineweb_val_000000.bin"
    done = start(record, record.parents[2], **refusing(record, read="data/datasets"))
    check_refusal(done, shard, "Permission denied", "prepare_data.py")


def test_a_folder_that_may_not_be_written_ends_the_run_and_keeps_what_is_there(
    record: Path, tmp_path: Path
) -> None:
    for name in ("train.log", "submission.json", "final_model.ptz"):
        (tmp_path / name).write_text(EARLIER)
    done = start(record, record.parents[2], OUTPUT_DIR=tmp_path, **refusing(record, write=tmp_path))
    check_refusal(done, str(tmp_path), "Permission denied", "OUTPUT_DIR")
    assert {path.name for path in tmp_path.iterdir()} == {
        "train.log", "submission.json", "final_model.ptz"}  # fmt: skip
    assert all(path.read_text() == EARLIER for path in tmp_path.iterdir())


def test_a_tokenizer_of_another_vocabulary_is_refused(record: Path) -> None:
    done = start(record, record.parents[2], VOCAB_SIZE=400)
    check_refusal(done, "TOKENIZER_PATH=", "expected VOCAB_SIZE=400", "found 300")


def test_a_gpu_is_asked_for_where_there_is_none(record: Path, tmp_path: Path) -> None:
    nowhere = dict(DEVICE="cuda", CUDA_VISIBLE_DEVICES="", OUTPUT_DIR=tmp_path)
    done = start(record, record.parents[2], **nowhere)
    check_refusal(done, "DEVICE=cuda", "found 0 GPUs", "DEVICE=cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", ["2.10.1+cu128", "2.9.0", "1.13.1"])
def test_an_old_torch_is_refused_by_its_version_before_anything_else(
    version: str, tmp_path: Path
) -> None:
    """It has no torch.nn, torch.distributed or anything else that the program would import."""
    torch_folder, package = Path(torch.__file__).parent, tmp_path / "torch"
    shutil.copytree(torch_folder / "_vendor", package / "_vendor")
    shutil.copy(torch_folder / "torch_version.py", package)
    (package / "__init__.py").write_text(
        f"from .torch_version import TorchVersion\n__version__ = TorchVersion({version!r})\n"
    )
    (package / "version.py").write_text(f"__version__ = {version!r}\n")
    done = subprocess.run([sys.executable, str(REPO / "train_gpt.py")], text=True, timeout=60,
                          env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)},
                          capture_output=True, check=False)  # fmt: skip
    check_refusal(done, f"torch is {version}", "2.11 to 2.13", "requirements.txt")


# Artifacts


@pytest.fixture(scope="module")
def artifact(record: Path) -> Path:
    """Of a complete run without record.py beside the program."""
    folder = record.parents[2] / "alone"
    folder.mkdir()
    shutil.copy(record / "train_gpt.py", folder)
    done = start(folder, record.parents[2], OUTPUT_DIR=folder)
    assert done.returncode == 0, done.stderr
    return folder / "final_model.ptz"


def test_the_program_alone_trains_packs_and_scores(artifact: Path) -> None:
    assert {path.name for path in artifact.parent.iterdir()} == {
        "train_gpt.py", "train.log", "train_seed1337.log", "final_model.pt", "final_model.ptz"
    }


@pytest.mark.parametrize("fault", ["truncated", "tampered", "foreign", "missing"])
def test_an_artifact_that_is_not_whole_is_refused(
    fault: str, artifact: Path, record: Path, tmp_path: Path
) -> None:
    content = artifact.read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    faulty = {"truncated": content[:-9], "tampered": bytes(changed), "foreign": b"PK\x03\x04" * 99}
    if fault in faulty:
        (tmp_path / "bad.ptz").write_bytes(faulty[fault])
    paths = dict(EVAL_ONLY=tmp_path / "bad.ptz", OUTPUT_DIR=tmp_path / "out")
    done = start(record, record.parents[2], **paths)
    message = {"foreign": "not", "missing": "No such file"}.get(fault, "SHA-256")
    check_refusal(done, f"{tmp_path}/bad.ptz", message)


# What a run that diverged has saved


def test_the_weights_kept_before_a_fault_can_be_packed_and_scored(
    record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, step, count = record.parents[2], train_gpt.Trainer.train_step, iter(range(1, 100))
    settings: dict[str, Any] = dict(
        vocab_size=300, data_path=str(tree / "data/datasets/fineweb10B_sp1024"),
        tokenizer_path=str(tree / "data/tokenizers/fineweb_1024_bpe.model"), train_log_every=2,
        output_dir=str(tmp_path),
    )  # fmt: skip
    results = ("train.log", "submission.json", "final_model.pt", "final_model.ptz")
    for name in results:
        (tmp_path / name).write_text(EARLIER)
    monkeypatch.setattr(train_gpt.Trainer, "warm_up", lambda self, evaluator: None)
    monkeypatch.setattr(
        train_gpt.Trainer, "train_step",
        lambda *a: step(*a) + (math.nan if next(count) == 5 else 0.0))  # fmt: skip
    with pytest.raises(RunError, match="step 5: the loss is nan") as caught:
        train_gpt.run(tiny(**settings), cpu_runtime())
    for name in results:
        assert (tmp_path / name).read_text() == EARLIER, name
    saved = tmp_path / "final_model.partial.pt"
    assert f"RESUME_FROM={saved}" in str(caught.value)
    out = tmp_path / "out"
    train_gpt.run(tiny(**settings | {"resume_from": str(saved), "output_dir": str(out)}),
                  cpu_runtime())  # fmt: skip
    report = json.loads((out / "submission.json").read_text())
    assert report["recipe"]["whole_run"] is False
    assert math.isfinite(report["val_bpb"]) and (out / "final_model.ptz").stat().st_size > 0
