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
| out of memory in evaluation | test_eval.py `test_out_of_memory_...` |
| no GPU | here |
| too old torch | here |
| read-only folder | here, and test_run.py "unwritable output" |
| no record.py beside the program | here |

What the field feeds it, by the numbers of issue 18; the first seven were wrong and silent.

| number, fault | test |
|---|---|
| 1 bytes of any tokenizer | test_bytes.py `..._bytes_are_those_of_...`, `..._official_...` |
| 1 a tokenizer trained without a space | test_prepare_data.py `..._pieces_for_space_and_bytes` |
| 2 shards that are no shards | test_data.py `..._looks_like_a_shard_...`, `..._look_alikes_...` |
| 3 RESUME_FROM: settings of the weights | test_resume.py `..._bare_resume_...`, test_run.py |
| 3 RESUME_FROM: conflicts | test_resume.py `..._refused_by_name`, `..._conflict_...` |
| 3 RESUME_FROM: code, data, seeds | test_resume.py `..._record_states_...`, `..._resumes_...` |
| 4 seeds on other data | test_other_data.py `test_seeds_of_...`, test_seeds.py, test_data.py |
| 5 another tokenizer, with a manifest | test_other_data.py `..._manifest_does_not_name_...` |
| 5 another tokenizer, without one | test_other_data.py `..._foreign_tokenizer_...` |
| 6 two runs in one folder | test_lock.py |
| 7 odd results, numbers that are no JSON | test_odd_results.py |
| 8 token ids beyond the vocabulary | test_bad_tokens.py, test_data.py `test_prefetch_tells_...` |
| 9 output, disk or terminal that goes away | test_lost_terminal.py |
| 9 a rank that waits and is ended | test_resume.py `test_two_ranks_refuse_...` |
| 10 text in other encodings and forms, twins | test_text_input.py |
| 11 odd launches, seeds, splits, dumps, names | test_launch.py |
| 12 GPUs that fused layers do not run on | test_kernel_choice.py |
| 13 Windows | test_launch.py `test_on_windows_...`, test_prepare_data.py |
| 14 versions of torch | test_launch.py `..._same_torch`, `test_ci_installs_...`; here |
| 15 an artifact of exactly the budget | test_pack.py `..._exactly_the_budget_...` |
| 15 no lr warm-up | test_training.py `test_lr_rises_...` |
| 15 a slow machine | test_run.py `test_a_capped_run_...`, by a clock that counts looks |
"""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    CARD_IN_SMALL,
    EARLIER,
    REPO,
    RESULTS,
    challenge_tree,
    completed,
    cpu_runtime,
    errors_of,
    refusal,
    tiny,
    train_gpt,
)

from train_gpt import load_checkpoint, settings_of_process

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


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a copy of the program in a tree that holds its data."""
    folder = challenge_tree(tmp_path_factory.mktemp("tree"))
    (tree_of(folder) / "hook").mkdir()
    (tree_of(folder) / "hook/sitecustomize.py").write_text(REFUSING)
    return folder


def tree_of(entry: Path) -> Path:
    return entry.parents[2]


def start(entry: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    """The program, as a user starts it from the root of the tree."""
    return completed(entry / "train_gpt.py", cwd=tree_of(entry), **CARD_IN_SMALL | settings)


def check_refusal(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """It failed with one line of error that holds every part."""
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    errors = errors_of(done.stderr)
    assert len(errors) == 1, done.stderr
    assert [part for part in parts if part not in errors[0]] == [], errors[0]


def refusing(entry: Path, read: object = "/no/", write: object = "/no/") -> dict[str, object]:
    """Settings under which paths that begin so may not be read, or not be written."""
    return {"PYTHONPATH": tree_of(entry) / "hook", "REFUSE_READ": read, "REFUSE_WRITE": write}


def test_a_shard_that_may_not_be_read_is_named_with_the_reason(entry: Path) -> None:
    shard = "data/datasets/fineweb10B_sp1024/fineweb_val_000000.bin"
    done = start(entry, **refusing(entry, read="data/datasets"))
    check_refusal(done, shard, "Permission denied", "prepare_data.py")


def test_a_folder_that_may_not_be_written_keeps_what_it_holds(entry: Path, tmp_path: Path) -> None:
    """The run ends with one message."""
    before = RESULTS[:2] + RESULTS[3:]
    for name in before:
        (tmp_path / name).write_text(EARLIER)
    done = start(entry, OUTPUT_DIR=tmp_path, **refusing(entry, write=tmp_path))
    check_refusal(done, str(tmp_path), "Permission denied", "OUTPUT_DIR")
    assert {path.name for path in tmp_path.iterdir()} == set(before)
    assert all(path.read_text() == EARLIER for path in tmp_path.iterdir())


def test_a_tokenizer_of_another_vocabulary_is_refused(entry: Path) -> None:
    done = start(entry, VOCAB_SIZE=400)
    check_refusal(done, "TOKENIZER_PATH=", "expected VOCAB_SIZE=400", "found 300")


def test_a_gpu_is_asked_for_where_there_is_none(entry: Path, tmp_path: Path) -> None:
    done = start(entry, DEVICE="cuda", CUDA_VISIBLE_DEVICES="", OUTPUT_DIR=tmp_path)
    check_refusal(done, "DEVICE=cuda", "found 0 GPUs", "DEVICE=cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", ["2.10.1+cu128", "2.9.0", "1.13.1"])
def test_an_old_torch_is_refused_first_and_by_its_version(version: str, tmp_path: Path) -> None:
    """It has no torch.nn, torch.distributed or anything else that the program would import."""
    installed = Path(torch.__file__).parent
    package = tmp_path / "torch"
    shutil.copytree(installed / "_vendor", package / "_vendor")
    shutil.copy(installed / "torch_version.py", package)
    (package / "__init__.py").write_text(
        f"from .torch_version import TorchVersion\n__version__ = TorchVersion({version!r})\n"
    )
    (package / "version.py").write_text(f"__version__ = {version!r}\n")
    done = completed(REPO / "train_gpt.py", PYTHONPATH=tmp_path)
    check_refusal(done, f"torch is {version}", "2.11 to 2.14", "requirements.txt")


def test_the_sample_is_refused_where_nothing_can_build_it(entry: Path, tmp_path: Path) -> None:
    """README's folder for records/ holds no prepare_data.py."""
    done = start(entry, PRESET="smoke", OUTPUT_DIR=tmp_path)
    check_refusal(done, "DATA_PATH=sample", "prepare_data.py", "copy it there")


def test_a_sample_that_cannot_be_written_is_told_where_it_lies(entry: Path, tmp_path: Path) -> None:
    """Another OUTPUT_DIR is no remedy: the sample is beside the program."""
    folder = entry.with_name("only_read")
    folder.mkdir()
    for name in ("train_gpt.py", "prepare_data.py"):
        shutil.copy(REPO / name, folder)
    settings = dict(PRESET="smoke", OUTPUT_DIR=tmp_path)
    done = start(folder, **settings, **refusing(entry, write=folder))
    check_refusal(done, f"DATA_PATH=sample: cannot be built in {folder}/data", "Permission denied")
    assert "OUTPUT_DIR" not in done.stderr


def test_a_record_py_that_does_not_import_leaves_the_run_whole(entry: Path, tmp_path: Path) -> None:
    folder = entry.with_name("broken")
    folder.mkdir()
    shutil.copy(entry / "train_gpt.py", folder)
    (folder / "record.py").write_text("def x(:\n")
    done = start(folder, OUTPUT_DIR=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"train.log", "final_model.pt", "final_model.ptz"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert "invalid syntax" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize("name", [b"caf\xe9", "\u65e5\u672c".encode()])
def test_a_path_of_any_bytes_is_read_and_logged(name: bytes, entry: Path, tmp_path: Path) -> None:
    """In an encoding that has none of its letters: tokenizer, shards, a look-alike and results."""
    folder = tmp_path / os.fsdecode(name)
    shutil.copytree(tree_of(entry) / "data", folder)
    shards = folder / "datasets/fineweb10B_sp1024"
    (shards / "fineweb_val_000000 (1).bin").write_text("")
    paths = {
        "DATA_PATH": shards,
        "TOKENIZER_PATH": folder / "tokenizers/fineweb_1024_bpe.model",
        "OUTPUT_DIR": folder / "out",
        "PYTHONIOENCODING": "ascii",
    }
    done = start(entry, **paths)
    assert done.returncode == 0, done.stderr
    assert "is not read as tokens" in done.stdout
    again = completed(entry / "record.py", folder / "out", PYTHONIOENCODING="ascii")
    assert again.returncode == 0, again.stderr


# Artifacts


@pytest.fixture(scope="module")
def artifact_file(entry: Path) -> Path:
    """Of a complete run without record.py beside the program."""
    folder = entry.with_name("alone")
    folder.mkdir()
    shutil.copy(entry / "train_gpt.py", folder)
    done = start(folder, OUTPUT_DIR=folder)
    assert done.returncode == 0, done.stderr
    return folder / "final_model.ptz"


def test_the_program_alone_trains_packs_and_scores(artifact_file: Path) -> None:
    """It leaves its result, which record.py can merge later, and no submission.json."""
    folder = artifact_file.parent
    assert {path.name for path in folder.iterdir()} == {
        "train_gpt.py", "train.log", "train_seed1337.log", "final_model.pt", "final_model.ptz",
        "result_seed1337.json", "run.lock",
    }  # fmt: skip
    result = json.loads((folder / "result_seed1337.json").read_text())
    assert result["bytes_model"] == artifact_file.stat().st_size


@pytest.mark.parametrize("fault", ["truncated", "tampered", "foreign", "missing"])
def test_an_artifact_that_is_not_whole_is_refused(
    fault: str, artifact_file: Path, entry: Path, tmp_path: Path
) -> None:
    content = artifact_file.read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    faulty = {"truncated": content[:-9], "tampered": bytes(changed), "foreign": b"PK\x03\x04" * 99}
    if fault in faulty:
        (tmp_path / "bad.ptz").write_bytes(faulty[fault])
    done = start(entry, EVAL_ONLY=tmp_path / "bad.ptz", OUTPUT_DIR=tmp_path / "out")
    message = {"foreign": "not", "missing": "No such file"}.get(fault, "SHA-256")
    check_refusal(done, f"{tmp_path}/bad.ptz", message)


# What a run that diverged has saved


@pytest.fixture(scope="module")
def diverged(entry: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The settings of a run whose loss is nan from step 5 on, and its message."""
    data, out = tree_of(entry) / "data", tmp_path_factory.mktemp("diverged")
    settings: dict[str, Any] = dict(
        vocab_size=300,
        data_path=str(data / "datasets/fineweb10B_sp1024"),
        tokenizer_path=str(data / "tokenizers/fineweb_1024_bpe.model"),
        train_log_every=2,
        output_dir=str(out),
    )
    for name in RESULTS:
        (out / name).write_text(EARLIER)
    step, count = train_gpt.Trainer.train_step, iter(range(1, 100))

    def diverging(*arguments: Any, **options: Any) -> torch.Tensor:
        return step(*arguments, **options) + (math.nan if next(count) == 5 else 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Trainer, "warm_up", lambda self, evaluator: None)
        patch.setattr(train_gpt.Trainer, "train_step", diverging)
        message = refusal(train_gpt.run, tiny(**settings), cpu_runtime())
    return settings, message


def test_a_run_that_diverges_names_its_step_and_what_it_saved(
    diverged: tuple[dict[str, Any], str],
) -> None:
    settings, message = diverged
    assert "step 5: the loss is nan" in message
    assert f"RESUME_FROM={settings['output_dir']}/final_model.partial.pt" in message
    for name in RESULTS:
        assert (Path(settings["output_dir"]) / name).read_text() == EARLIER, name


def test_what_a_diverged_run_saved_can_be_packed_and_scored(
    diverged: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    settings, _ = diverged
    saved = f"{settings['output_dir']}/final_model.partial.pt"
    env = {"RESUME_FROM": saved, "OUTPUT_DIR": str(tmp_path), "DEVICE": "cpu"}
    h, checkpoint = load_checkpoint(settings_of_process(env), cpu_runtime(), env)
    train_gpt.run(h, cpu_runtime(), checkpoint)
    report = json.loads((tmp_path / "submission.json").read_text())
    assert report["recipe"]["whole_run"] is False
    assert math.isfinite(report["val_bpb"]) and (tmp_path / "final_model.ptz").stat().st_size > 0
