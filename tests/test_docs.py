"""What the words say is what the files hold: numbers, commands, sizes, defaults."""

import dataclasses
import errno
import json
import os
import re
from typing import Any

import pytest
from support import REPO, train_gpt

SOURCE = (REPO / "train_gpt.py").read_text()
README = (REPO / "README.md").read_text()
LOG = (REPO / "train.log").read_text()
SUBMISSION: dict[str, Any] = json.loads((REPO / "submission.json").read_text())
P_TIME = {"train_batch_tokens": 98_304, "max_wallclock_seconds": 180.0}  # what that run overrides


def logged_settings() -> dict[str, Any]:
    """The resolved hyperparameters in the committed log, which follow its copy of the source."""
    text = LOG.split("=" * 80 + "\n", 1)[1]
    settings: dict[str, Any] = json.JSONDecoder().raw_decode(text)[0]
    return settings


def test_the_defaults_are_those_of_the_committed_run() -> None:
    settings = logged_settings()
    fields = dataclasses.fields(train_gpt.Hyperparameters)
    assert settings == {field.name: field.default for field in fields} | P_TIME


def test_the_committed_log_and_submission_are_of_one_run() -> None:
    sliding = re.search(r"^final_int6_zstd_sliding_exact .*val_bpb:(\S+)", LOG, re.M)
    plain = re.search(r"^final_int6_zstd_roundtrip_exact .*val_bpb:(\S+)", LOG, re.M)
    assert sliding and float(sliding[1]) == pytest.approx(SUBMISSION["val_bpb"], abs=1e-8)
    assert plain and float(plain[1]) == pytest.approx(SUBMISSION["val_bpb_roundtrip"], abs=1e-8)
    assert f"bytes_total:{SUBMISSION['bytes_total']} " in LOG
    assert SUBMISSION["bytes_total"] < 16_000_000
    assert SUBMISSION["dataset"] in ("proxy", "fineweb10B_sp1024")
    assert SUBMISSION["graphs_compiled_on_clock"] == 0


@pytest.mark.parametrize("text", [README, SOURCE[:2000]], ids=["README", "docstring"])
def test_the_result_in_words_is_the_submission(text: str) -> None:
    for key in ("val_bpb", "val_bpb_roundtrip"):
        assert f"{SUBMISSION[key]:.4f}" in text, key
    assert f"{SUBMISSION['bytes_total']:,}" in text
    assert SUBMISSION["dataset"] in text


def test_ci_calls_the_test_command_of_the_readme() -> None:
    command = next(line for line in README.splitlines() if "pytest" in line)
    assert command in (REPO / ".ci" / "run").read_text().splitlines()


def test_every_name_in_the_readme_exists() -> None:
    table = README.split("## What is in it")[1].split("## Hyperparameters")[0]
    for name in re.findall(r"\| (?:[^|]*) \| ((?:`[\w.]+`(?:, )?)+) \|", table):
        for part in re.findall(r"`([\w.]+)`", name):
            value: Any = train_gpt
            for attribute in part.split("."):
                value = getattr(value, attribute, None)
            assert part == "train_gpt.py" or value is not None, part
    fields = {field.name.upper() for field in dataclasses.fields(train_gpt.Hyperparameters)}
    settings = README.split("## Hyperparameters")[1].split("## Legality")[0]
    named = set(re.findall(r"`([A-Z][A-Z_]{3,})`", settings))
    assert len(named) > 15
    assert named <= fields


def test_every_message_in_the_readme_is_one_of_the_program() -> None:
    joined = re.sub(r'"\s*\n\s*f?"', "", SOURCE + (REPO / "record.py").read_text())
    joined = re.sub(r"\{[^{}\n]*\}", "...", joined.replace("{', '.join(other[:5])}", "..."))
    system = {os.strerror(errno.ENOSPC), os.strerror(errno.EACCES), "CUDA out of memory"}
    table = README.split("## Messages and remedies")[1].split("## Lineage")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 20
    absent = [m for m in messages if m not in system and any(
        part.strip() not in joined for part in m.split("..."))]  # fmt: skip
    assert absent == []


def test_the_picture_of_the_readme_is_there_and_small() -> None:
    (picture,) = re.findall(r"!\[[^\]]*\]\((\S+)\)", README)
    assert 10_000 < (REPO / picture).stat().st_size < 150_000


def test_the_program_stays_one_readable_file() -> None:
    lines = SOURCE.splitlines()
    assert len(lines) <= 1500
    assert max(map(len, lines)) <= 100
    sections = re.findall(r"^# ---- (\d+)\. ", SOURCE, re.M)
    assert sections == [str(n) for n in range(1, 14)]
