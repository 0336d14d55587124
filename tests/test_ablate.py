"""bench/ablate.py: what is asked for is run, and every run leaves a row."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import REPO, TINY, train_gpt, write_shard

sys.path.insert(0, str(REPO / "bench"))
import ablate

BASE = ablate.Result({"trained": 1.21, "averaged": 1.2, "packed": 1.205}, 70.0, 10, 123_456, 1)


def test_an_argument_is_name_prediction_and_settings() -> None:
    variant = ablate.parse("qk 4 (-0.004): QK_GAIN_INIT=4 SEED=7")
    assert variant == ("qk 4", "-0.004", {"QK_GAIN_INIT": "4", "SEED": "7"})
    assert ablate.parse("base") == ("base", "", {})


@pytest.mark.parametrize("argument", ["", ": A=1", "name: A", "name: =1"])
def test_an_argument_that_is_none_is_refused(argument: str) -> None:
    with pytest.raises(train_gpt.RunError, match="expected"):
        ablate.parse(argument)


def test_a_row_has_a_cell_for_every_column() -> None:
    columns = ablate.HEADER.splitlines()[0].count("|")
    other = BASE._replace(scores={**BASE.scores, "packed": 1.2, "sliding": 1.18})
    for result, base in ((BASE, None), (other, BASE), ("out of memory", BASE)):
        line = ablate.row(ablate.parse("a (0): SEED=1"), result, base)
        assert line.count("|") == columns, line
    assert "| -0.0050 | 1.1800 |" in ablate.row(ablate.parse("a"), other, BASE)


def test_runs_append_their_rows_and_a_failure_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    for split, count in (("train", 2000), ("val", 400)):
        tokens = generator.integers(2, TINY["vocab_size"], count)
        write_shard(tmp_path / f"data/fineweb_{split}_000000.bin", tokens)
    ones = np.ones(TINY["vocab_size"], np.int64)
    byte_table = train_gpt.ByteTable(ones, ones < 0, ones < 0)
    monkeypatch.setattr(train_gpt, "load_byte_table", lambda path, size: byte_table)
    settings: dict[str, Any] = {
        **TINY, "preset": "smoke", "iterations": 3, "eval_stride": 0,
        "data_path": tmp_path / "data", "output_dir": tmp_path / "out",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name.upper(), str(value))
    table = tmp_path / "TABLE.md"
    table.write_text("# Before\n")
    arguments = ["base", "longer (-0.1): ITERATIONS=6", "no budget (0): ARTIFACT_BYTES=95000"]
    ablate.main(arguments, table)
    lines = table.read_text().splitlines()
    assert lines[0] == "# Before" and lines[2] == ablate.HEADER.splitlines()[0]
    base, longer, failed = (line.split(" | ") for line in lines[4:])
    assert base[0] == "| base" and base[9] == "3" and longer[9] == "6"
    packed, longer_packed = float(base[5]), float(longer[5])
    assert float(longer[6]) == pytest.approx(longer_packed - packed, abs=2e-4)
    assert "failed: export" in failed[3]
    assert torch.load(tmp_path / "out/final_model.partial.pt", weights_only=True)


def test_a_misspelt_setting_is_refused_before_any_run(tmp_path: Path) -> None:
    with pytest.raises(train_gpt.RunError, match="ITERATIONS"):
        ablate.main(["base", "x: ITERATION=3"], tmp_path / "TABLE.md")
    assert not (tmp_path / "TABLE.md").exists()
