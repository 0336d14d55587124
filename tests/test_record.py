"""The record folder: what the rules ask for is in it, and it runs where the challenge puts it."""

import ast
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import sentencepiece
from support import REPO, write_shard

FOLDER = ["README.md", "record.py", "requirements.txt", "submission.json", "train.log",
          "train_gpt.py"]  # fmt: skip
SMALL = dict(  # everything else is the card's
    VOCAB_SIZE=300, NUM_LAYERS=4, MODEL_DIM=64, NUM_HEADS=4, NUM_KV_HEADS=2, MLP_HIDDEN=96,
    ROPE_DIMS=8, XSA_LAYERS=2, VE_DIM=16, TRAIN_SEQ_LEN=64, TRAIN_BATCH_TOKENS=512, ITERATIONS=3,
    VAL_BATCH_SIZE=1024, WARMUP_STEPS=1, EVAL_STRIDE=16, DEVICE="cpu", OMP_NUM_THREADS=1,
)  # fmt: skip


def challenge_tree(root: Path) -> Path:
    """The challenge's repository with its data, and this folder as a record in it."""
    generator = np.random.Generator(np.random.PCG64(0))
    texts = [" ".join(generator.choice(["river", "stone", "lantern", "violet", "engine"], 40))
             + f" {i}." for i in range(300)]  # fmt: skip
    (root / "data/tokenizers").mkdir(parents=True)
    (root / "texts.txt").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "texts.txt"), vocab_size=300, model_type="bpe", byte_fallback=True,
        model_prefix=str(root / "data/tokenizers/fineweb_1024_bpe"), minloglevel=2,
    )  # fmt: skip
    tokenizer = root / "data/tokenizers/fineweb_1024_bpe.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    tokens = [t for text in texts for t in (1, *processor.encode(text))]
    for split, part in (("train", tokens[1000:]), ("val", tokens[:1000])):
        write_shard(root / f"data/datasets/fineweb10B_sp1024/fineweb_{split}_000000.bin", part)
    record = root / "records/track_10min_16mb/2026-01-01_card"
    record.mkdir(parents=True)
    for name in FOLDER:
        shutil.copy(REPO / name, record)
    return record


def test_a_copy_of_the_folder_runs_from_the_challenges_root_on_its_data_paths(
    tmp_path: Path,
) -> None:
    record = challenge_tree(tmp_path)
    keep = ("PATH", "HOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYENV_VERSION", "TMPDIR")
    env = {k: os.environ[k] for k in keep if k in os.environ}
    env |= {k: str(v) for k, v in SMALL.items()} | {"OUTPUT_DIR": str(record)}
    script = record.relative_to(tmp_path) / "train_gpt.py"
    done = subprocess.run([sys.executable, str(script)], env=env, cwd=tmp_path, timeout=100,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((record / "submission.json").read_text())
    assert report["step_stop"] == 3 and f"val_bpb:{report['val_bpb']:.8f}" in done.stdout
    assert "step:3/3" in (record / "train.log").read_text()
    size = (record / "train_gpt.py").stat().st_size + (record / "final_model.ptz").stat().st_size
    assert report["bytes_total"] == size < 16_000_000


def test_the_program_imports_only_what_the_requirements_name() -> None:
    tree = ast.parse((REPO / "train_gpt.py").read_text())
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }  # fmt: skip
    required = set(re.findall(r"^(\w+)[<>=]", (REPO / "requirements.txt").read_text(), re.M))
    assert required == {"torch", "numpy", "sentencepiece", "zstandard"}
    # Triton comes with torch; FlashAttention and the sample's builder are used where they exist.
    allowed = required | {"triton", "flash_attn_interface", "prepare_data", "record"}
    packages = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert packages <= allowed, packages - allowed


def test_the_folder_holds_what_the_rules_ask_for() -> None:
    assert all((REPO / name).stat().st_size > 0 for name in FOLDER)
    report = json.loads((REPO / "submission.json").read_text())
    for key in ("author", "name", "blurb", "track", "dataset", "hardware", "pytorch_version"):
        assert report[key] and isinstance(report[key], str), key
    assert "github_id" in report
    datetime.date.fromisoformat(report["date"])
    for result in report["seed_results"].values():
        assert result["artifact_bytes"] < 16_000_000
        assert result["val_bpb"] < result["val_loss"]
    assert sorted(map(str, report["seeds"])) == sorted(report["seed_results"])
