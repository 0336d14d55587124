"""The record folder: what the rules ask for is in it, and it runs where the challenge puts it."""

import ast
import datetime
import json
import re
import sys
from pathlib import Path

from support import CARD_IN_SMALL, ENTRY, REPO, challenge_tree, completed


def test_the_folder_runs_from_the_challenges_root(tmp_path: Path) -> None:
    """On the challenge's data paths, which are the program's defaults."""
    entry = challenge_tree(tmp_path)
    script = entry.relative_to(tmp_path) / "train_gpt.py"
    done = completed(script, cwd=tmp_path, OUTPUT_DIR=entry, **CARD_IN_SMALL)
    assert done.returncode == 0, done.stderr
    report = json.loads((entry / "submission.json").read_text())
    assert report["step_stop"] == 3 and f"val_bpb:{report['val_bpb']:.8f}" in done.stdout
    assert "step:3/3" in (entry / "train.log").read_text()
    size = (entry / "train_gpt.py").stat().st_size + (entry / "final_model.ptz").stat().st_size
    assert report["bytes_total"] == size < 16_000_000


def test_the_program_imports_only_what_the_requirements_name() -> None:
    tree = ast.parse((REPO / "train_gpt.py").read_text())
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    required = set(re.findall(r"^(\w+)[<>=]", (REPO / "requirements.txt").read_text(), re.M))
    assert required == {"torch", "numpy", "sentencepiece", "zstandard"}
    # Triton comes with torch; FlashAttention and the sample's builder are used where they exist.
    allowed = required | {"triton", "flash_attn_interface", "prepare_data", "record"}
    packages = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert packages <= allowed, packages - allowed


def test_the_folder_holds_what_the_rules_ask_for() -> None:
    assert all((REPO / name).stat().st_size > 0 for name in ENTRY)
    report = json.loads((REPO / "submission.json").read_text())
    for key in ("author", "name", "blurb", "track", "dataset", "hardware", "pytorch_version"):
        assert report[key] and isinstance(report[key], str), key
    assert "github_id" in report
    datetime.date.fromisoformat(report["date"])


def test_the_committed_seeds_are_below_the_cap_in_bytes() -> None:
    report = json.loads((REPO / "submission.json").read_text())
    assert sorted(map(str, report["seeds"])) == sorted(report["seed_results"])
    for result in report["seed_results"].values():
        assert result["artifact_bytes"] < 16_000_000
        assert result["val_bpb"] < result["val_loss"]
