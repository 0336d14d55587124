"""Claims about bench/pack.py and bench/checkpoint.py: their numbers are those of the files."""

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    REPO,
    TINY,
    byte_table,
    completed,
    cpu_runtime,
    refusal,
    tiny,
    tiny_model,
    tiny_weights,
    train_gpt,
    write_shard,
)

sys.path.insert(0, str(REPO / "bench"))
import checkpoint
import pack

FACTS = train_gpt.TrainingFacts(
    step_stop=3, wallclock_seconds=1.0, seed=1, qat_steps=0, step_avg_ms=1.0, swa_steps=0,
    grid_step=0.0, train_shards=1, train_tokens=1, train_digest="7a1e", code_sha256="c0de",
    final_train_loss=2.0, interrupted=False,
    graphs_compiled_on_clock=0, fault="",
)  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of the tiny model."""
    h = tiny()
    stages = {"trained": tiny_weights(h, seed=1), "averaged": tiny_weights(h)}
    path = tmp_path / "final_model.pt"
    train_gpt.save_checkpoint(path, h, stages, FACTS)
    return path


def column(table: str, head: str) -> dict[str, str]:
    """Cells of a column of right-aligned cells, by tensor."""
    first, *rows = table.splitlines()[:-1]
    end = first.index(head) + len(head)
    start = len(first[: end - len(head)].rstrip())
    return {row.split()[0]: row[start:end].strip() for row in rows}


def test_the_settings_are_those_of_the_training(saved: Path) -> None:
    h, (stages, facts) = checkpoint.load(saved, {"DATA_PATH": "none", "EVAL_STRIDE": "32"})
    assert train_gpt.architecture_of(h) == train_gpt.architecture_of(tiny())
    assert h.seed == tiny().seed and h.data_path == "none" and h.eval_stride == 32
    assert "SEED=9" in refusal(checkpoint.load, saved, {"SEED": "9"})
    assert stages.keys() == {"trained", "averaged"} and facts == FACTS
    expected = tiny_weights(tiny())
    assert all(torch.equal(stages["averaged"][name], w) for name, w in expected.items())


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "final_model.pt"
    path.write_bytes(b"nothing")
    assert "not the final_model.pt of a run" in refusal(checkpoint.load, path, {})


def test_the_bytes_of_all_tensors_fill_the_artifact() -> None:
    h = tiny()
    artifact = train_gpt.pack(tiny_weights(h), h, 0.02)
    table = pack.table(artifact)
    sizes = {name: int(cell.replace(",", "")) for name, cell in column(table, "bytes").items()}
    assert sizes.keys() == train_gpt.parameter_table(h).keys()
    header = len(artifact) - sum(sizes.values()) - train_gpt.HASHED_FROM
    assert 100 < header < 2000
    assert table.splitlines()[-1].startswith(f"{len(artifact):,} bytes; all codes: zstd ")


def test_the_entropy_is_that_of_the_codes() -> None:
    h = tiny()
    weights = tiny_weights(h)
    found = column(pack.table(train_gpt.pack(weights, h, 0.02)), "entropy")
    coded = {name: codes for name, codes, _ in train_gpt.quantized_tensors(weights, h, 0.02)}
    assert {name for name, cell in found.items() if cell} == coded.keys()
    for name, codes in coded.items():
        bits = train_gpt.entropy_bits(codes) / codes.numel()
        assert float(found[name]) == pytest.approx(bits, abs=6e-4)


def test_the_error_is_that_of_the_weights_that_are_read_back() -> None:
    h = tiny()
    weights = tiny_weights(h)
    artifact = train_gpt.pack(weights, h, 0.02)
    found = column(pack.table(artifact, weights), "error")
    _, state = train_gpt.unpack(artifact)
    for name, w in weights.items():
        error = float((state[name] - w).square().sum() / w.square().sum())
        assert float(found[name]) == pytest.approx(error, rel=0.06)


def test_an_artifact_is_shown_with_digest_and_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    h = tiny()
    path = tmp_path / "final_model.ptz"
    path.write_bytes(train_gpt.pack(tiny_weights(h), h, 0.02))
    pack.main(str(path), [])
    out = capsys.readouterr().out
    digest = hashlib.sha256(path.read_bytes()[train_gpt.HASHED_FROM :]).hexdigest()
    assert f"SHA-256 {digest}" in out and f"model_dim:{h.model_dim}" in out


def test_a_checkpoint_is_packed_for_each_budget_less_the_code(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    h = tiny()
    artifact = train_gpt.pack(tiny_weights(h), h, 0.02)
    code = train_gpt.SOURCE.stat().st_size
    budgets = []

    def pack_to_budget(state: Any, h: Any, budget: int, log: Any) -> bytes:
        budgets.append(budget)
        return artifact

    monkeypatch.setattr(train_gpt, "pack_to_budget", pack_to_budget)
    for name, text in dict(PRESET="smoke", DATA_PATH="none", EVAL_STRIDE="32").items():
        monkeypatch.setenv(name, text)
    pack.main(str(saved), [0.125, 1.5])
    assert budgets == [125_000 - code, 1_500_000 - code]
    out = capsys.readouterr().out
    total = f"{len(artifact) + code:,}"
    assert re.search(rf"^budget 0.125 MB: bytes_total {total} \(OVER\), 0.\d s$", out, re.M)
    assert re.search(rf"^budget 1.5 MB: bytes_total {total} \(within\), 0.\d s$", out, re.M)


def test_a_checkpoint_is_packed_as_a_user_does_it(saved: Path) -> None:
    settings = dict(PRESET="smoke", DATA_PATH="none", DEVICE="cpu", EVAL_STRIDE=32)
    done = completed(REPO / "bench/pack.py", saved, **settings)
    assert done.returncode == 0, done.stderr
    assert "budget 16.0 MB: bytes_total" in done.stdout and "(within)" in done.stdout
    assert "val_bpb" not in done.stdout, "there is no validation data"


def test_a_damaged_artifact_is_refused_in_one_line(tmp_path: Path) -> None:
    h = tiny()
    path = tmp_path / "final_model.ptz"
    path.write_bytes(train_gpt.pack(tiny_weights(h), h, 0.02)[:-1])
    assert "truncated or damaged" in refusal(pack.main, str(path), [])


def test_weights_are_scored_where_there_is_validation_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "fineweb_val_000000.bin", [2 + i % 50 for i in range(200)])
    table = byte_table(TINY["vocab_size"], size=3)
    monkeypatch.setattr(train_gpt, "load_byte_table", lambda path, vocab_size: table)
    h = tiny(data_path=str(tmp_path))
    evaluator = train_gpt.Evaluator.open(h, cpu_runtime())
    bpb = evaluator.score(tiny_model(h)).bpb
    words = pack.scorer(h, cpu_runtime())(tiny_weights(h))
    assert float(words.removeprefix(" val_bpb ")) == pytest.approx(bpb, abs=2e-5)
