"""Claims about bench/eval_table.py: its groups partition the split, its bpb follow from sums."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import REPO, completed, train_gpt, uneven_byte_table

sys.path.insert(0, str(REPO / "bench"))
import eval_table  # noqa: E402
import prepare_data

TOKENS = np.array([5, 1, 7, 8, 9, 1, 4, 1, 6, 6, 7, 5, 9], dtype=np.uint16)
TABLE = uneven_byte_table(10)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_bytes_of_the_tokens_sum_to_those_of_the_split() -> None:
    sizes = eval_table.bytes_of(TOKENS, TABLE)
    assert sizes.sum() == TABLE.count(TOKENS)
    assert sizes.tolist() == [TABLE.count(TOKENS[i : i + 2]) for i in range(len(TOKENS) - 1)]


def test_a_document_reaches_from_its_bos_to_the_next() -> None:
    assert eval_table.document_lengths(TOKENS).tolist() == [4, 4, 4, 4, 2, 2, 6, 6, 6, 6, 6, 6]


def test_a_row_holds_the_bits_per_byte_of_its_tokens() -> None:
    groups = np.array([1, 2, 3, 4, 7, 8])
    nats, sizes = np.arange(1.0, 7.0, dtype=np.float32), np.array([1, 2, 3, 0, 5, 6])
    rows = eval_table.table_by("what", groups, {"plain": nats, "sliding": nats / 2}, sizes)
    head, _, *body = map(cells, rows.splitlines())
    assert head == ["what", "tokens", "bytes", "plain bpb", "sliding bpb"]
    assert [row[:3] for row in body] == [
        ["1 to 1", "1", "1"], ["2 to 3", "2", "5"], ["4 to 7", "2", "5"], ["8 to 15", "1", "6"],
        ["all", "6", "17"]]  # fmt: skip
    for row, expected in zip(body, (1 / 1, 5 / 5, 9 / 5, 6 / 6, 21 / 17), strict=True):
        plain, sliding = map(float, row[3:])
        assert plain == pytest.approx(expected / np.log(2), abs=5e-5)
        assert sliding == pytest.approx(plain / 2, abs=1e-4)


def tables(dump: Path, losses: int) -> subprocess.CompletedProcess[str]:
    """What it prints for a dump of so many equal losses."""
    np.savez(dump, plain=np.full(losses, 2.0, dtype=np.float32))
    return completed(REPO / "bench/eval_table.py", dump, PATH="", DATA_PATH="sample")


def test_the_tables_of_a_dump_of_the_sample(tmp_path: Path) -> None:
    h = prepare_data.with_sample(train_gpt.Hyperparameters(data_path="sample"))
    tokens = np.concatenate(train_gpt.open_split(h.data_path, "val"))
    done = tables(tmp_path / "losses.npz", len(tokens) - 1)
    assert done.returncode == 0, done.stderr
    size = train_gpt.load_byte_table(h.tokenizer_path, h.vocab_size).count(tokens)
    bpb = 2.0 * (len(tokens) - 1) / np.log(2) / size
    total = f"| all | {len(tokens) - 1:,} | {size:,} | {bpb:.4f} |"
    assert done.stdout.count(total) == 2
    position = done.stdout.split("\n\n")[0].splitlines()[2:-1]
    assert cells(position[0])[0] == "1 to 1" and cells(position[-1])[0] == "2,048 to 4,095"


def test_a_dump_of_another_split_is_refused_with_both_sizes(tmp_path: Path) -> None:
    done = tables(tmp_path / "losses.npz", 123)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "plain holds 123 losses, expected" in done.stderr and "DATA_PATH=" in done.stderr
