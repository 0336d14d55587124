"""Token ids that the vocabulary does not have: found at the start, or what was trained is saved."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import PIECES, check_one_error, completed_run, data_in, program, run_here, tokens_in
from support import EARLIER, RESULTS, cpu_runtime, errors_of, refusal, tiny, train_gpt, write_shard

BAD = 999
UNCHECKED = "train_gpt.check_vocabulary = lambda tokens, vocab_size, source: None"  # as if large


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return data_in(tmp_path_factory.mktemp("data"))


def spoiled_data(folder: Path, data: dict[str, Any], row: int) -> dict[str, Any]:
    """The data with a bad token in the row, counted over all batches, that training reads."""
    shard = train_gpt.read_shard(Path(data["data_path"]) / "fineweb_train_000000.bin")
    tokens = np.array(shard)
    plan = train_gpt.BatchPlan([tokens], 64, 8, seed=1337)
    _, first = plan.window(row)
    tokens[first + 30] = BAD
    write_shard(folder / "shards/fineweb_train_000000.bin", tokens)
    val = train_gpt.read_shard(Path(data["data_path"]) / "fineweb_val_000000.bin")
    write_shard(folder / "shards/fineweb_val_000000.bin", val)
    return data | {"data_path": str(folder / "shards")}


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    stages: dict[str, dict[str, torch.Tensor]] = torch.load(path, weights_only=True)["stages"]
    return stages["trained"]


@pytest.mark.parametrize("row", [17, 22], ids=["rank 0 meets it", "rank 1 meets it"])
def test_a_bad_token_of_one_rank_saves_what_both_trained(
    row: int, data: dict[str, Any], tmp_path: Path
) -> None:
    """It is in the third batch: the weights are those of a run that ends after two."""
    spoiled = spoiled_data(tmp_path, data, row)
    out, shorter = tmp_path / "out", tmp_path / "shorter"
    out.mkdir()
    shorter.mkdir()
    for name in RESULTS:
        (out / name).write_text(EARLIER)
    settings: dict[str, object] = dict(ITERATIONS=20, MAX_WALLCLOCK_SECONDS=0)
    done = completed_run(program(tmp_path, UNCHECKED), spoiled, out, ranks=2, **settings)
    assert done.returncode != 0
    errors = errors_of(done.stderr)
    saved = out / "final_model.partial.pt"
    assert errors and len(set(re.sub(r"rank \d", "", line) for line in errors)) == 1, done.stderr
    for part in (
        "training batch 2",
        f"token id {BAD}",
        f"VOCAB_SIZE={PIECES}",
        f"RESUME_FROM={saved}",
    ):
        assert part in errors[0]
    assert "LR" not in errors[0]
    assert all((out / name).read_text() == EARLIER for name in RESULTS)

    two = program(tmp_path, UNCHECKED + STOP_AFTER_TWO)
    done = completed_run(two, data, shorter, ranks=2, **settings)
    expected = weights_of(shorter / "final_model.partial.pt")
    found = weights_of(saved)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


STOP_AFTER_TWO = """
step, count = train_gpt.Trainer.train_step, [0]
def counted(*arguments, **options):
    count[0] += 1
    if count[0] == 4:  # of them two are the warm-up's
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*arguments, **options)
train_gpt.Trainer.train_step = counted
"""


def test_what_a_bad_token_left_can_be_scored(data: dict[str, Any], tmp_path: Path) -> None:
    spoiled = spoiled_data(tmp_path, data, 12)
    out = tmp_path / "out"
    out.mkdir()
    saved = str(out / "final_model.partial.pt")
    batch = "training batch 1: token id 999"
    done = completed_run(program(tmp_path, UNCHECKED), spoiled, out)
    check_one_error(done, batch, f"RESUME_FROM={saved}")
    script = program(tmp_path)
    done = completed_run(script, data, out, RESUME_FROM=saved)
    assert done.returncode == 0, done.stderr
    assert "val_bpb:" in done.stdout.splitlines()[-1]


def test_a_bad_token_in_a_small_split_is_found_at_the_start(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that no step would have read."""
    spoiled = spoiled_data(tmp_path, data, 60)
    monkeypatch.setattr(train_gpt, "train", None)  # not reached
    message = refusal(run_here, spoiled, tmp_path / "out")
    assert f"token id {BAD}" in message and f"VOCAB_SIZE={PIECES}" in message
    assert "fineweb_train_*.bin" in message
    assert not (tmp_path / "out/final_model.partial.pt").exists()


def test_a_bad_token_in_validation_is_found_before_a_log_is_made(
    data: dict[str, Any], tmp_path: Path
) -> None:
    spoiled = spoiled_data(tmp_path, data, 60)
    tokens = tokens_in(tmp_path / "again")[:900]
    write_shard(tmp_path / "shards/fineweb_val_000000.bin", [*tokens, PIECES, 5])
    message = refusal(run_here, spoiled, tmp_path / "out")
    assert f"token id {PIECES}" in message and "fineweb_val_*.bin" in message
    assert not list((tmp_path / "out").glob("*.log"))


@pytest.mark.parametrize("highest", [0, 299])
def test_tokens_of_the_vocabulary_have_no_fault(highest: int) -> None:
    tokens = np.array([0, highest], dtype=np.uint16)
    assert train_gpt.vocabulary_fault(tokens, 300, "here") == ""
    assert train_gpt.vocabulary_fault(tokens[:0], 300, "here") == ""


@pytest.mark.parametrize("lowest_bad", [300, 65535])
def test_the_first_id_beyond_the_vocabulary_is_a_fault(lowest_bad: int) -> None:
    fault = train_gpt.vocabulary_fault(np.array([1, lowest_bad], dtype=np.uint16), 300, "here")
    assert fault.startswith(f"here: token id {lowest_bad} found, expected less than VOCAB_SIZE=300")


def test_a_bad_batch_is_zeros_and_the_next_one_is_whole(data: dict[str, Any]) -> None:
    shard = train_gpt.read_shard(Path(data["data_path"]) / "fineweb_train_000000.bin")
    tokens = np.array(shard)
    plan = train_gpt.BatchPlan([tokens], 64, 8, seed=1)
    clean = [plan.tokens(step, range(8)) for step in range(3)]
    _, first = plan.window(9)
    tokens[first + 5] = BAD
    loader = train_gpt.prefetch(plan, range(8), PIECES, torch.device("cpu"))
    batches = [next(loader) for _ in range(3)]
    loader.close()
    assert [bool(batch.fault) for batch in batches] == [False, True, False]
    assert "training batch 1" in batches[1].fault and not batches[1].tokens.any()
    assert torch.equal(batches[0].tokens, torch.from_numpy(clean[0]))
    assert torch.equal(batches[2].tokens, torch.from_numpy(clean[2]))


@pytest.mark.parametrize("micro", [1, 2])
def test_a_spoiled_step_has_no_loss_and_moves_no_weight(micro: int) -> None:
    h = tiny(micro_batch_tokens=256 // micro)
    trainer = train_gpt.Trainer(h, cpu_runtime(), train_gpt.Kernels())
    before = {name: w.clone() for name, w in trainer.optimizer.masters().items()}
    tokens = torch.zeros((8, 33), dtype=torch.int64)
    loss = trainer.train_step(tokens, 1.0, 0.1, spoiled=True)
    assert loss.isnan()
    after = trainer.optimizer.masters()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.train_step(tokens + 1, 1.0, 0.1).isfinite()
    assert not all(torch.equal(before[name], after[name]) for name in before)
