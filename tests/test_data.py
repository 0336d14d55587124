"""Claims about shards, the batch plan, the prefetcher and the byte tables."""

import itertools
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import small_run
import support
import torch

import train_gpt
from train_gpt import BatchPlan, RunError, open_split, prefetch, read_shard

# Shards


def test_a_shard_returns_the_tokens_that_were_written(tmp_path: Path) -> None:
    tokens = [1, 0, 65_535, 256, 255, 7, 1]
    assert read_shard(support.write_shard(tmp_path / "a.bin", tokens)).tolist() == tokens


def test_shards_written_by_prepare_data_are_read_back(tmp_path: Path) -> None:
    import prepare_data

    tokens = np.arange(1000, dtype=np.uint16) * 61
    prepare_data.write_shard(tmp_path / "a.bin", tokens)
    assert (tmp_path / "a.bin").read_bytes() == support.write_shard(
        tmp_path / "b.bin", tokens).read_bytes()  # fmt: skip
    assert np.array_equal(read_shard(tmp_path / "a.bin"), tokens)


def test_a_shard_is_mapped_and_not_read_into_memory(tmp_path: Path) -> None:
    path = support.write_shard(tmp_path / "a.bin", range(10))
    shard = read_shard(path)
    assert not shard.flags.writeable
    with path.open("r+b") as file:  # a later change of the file shows in the array
        file.seek(1024 + 2 * 3)
        file.write(np.array([777], dtype="<u2").tobytes())
    assert shard.tolist() == [0, 1, 2, 777, 4, 5, 6, 7, 8, 9]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells a mapping's advice")
def test_a_shard_is_not_read_ahead(tmp_path: Path) -> None:
    path = support.write_shard(tmp_path / "a.bin", range(10))
    shard = read_shard(path)
    assert len(shard) == 10
    mapping = Path("/proc/self/smaps").read_text().split(str(path))[1]
    flags = next(line for line in mapping.splitlines() if line.startswith("VmFlags"))
    assert "rr" in flags.split(), "the kernel would read ahead of random windows"


def shard_refusal(path: Path) -> str:
    message = support.refusal(read_shard, path)
    assert message.startswith(f"{path}: ")
    assert "prepare_data.py" in message
    return message


def test_a_shard_of_another_magic_is_refused(tmp_path: Path) -> None:
    message = shard_refusal(support.write_shard(tmp_path / "a.bin", [1, 2], magic=20240521))
    assert "20240520" in message and "20240521" in message


def test_a_shard_of_another_version_is_refused(tmp_path: Path) -> None:
    message = shard_refusal(support.write_shard(tmp_path / "a.bin", [1, 2], version=2))
    assert "version 1" in message and "[20240520, 2]" in message


@pytest.mark.parametrize("claimed", [0, 1, 3, 1_000_000, -1])
def test_a_shard_whose_size_is_not_its_count_is_refused(tmp_path: Path, claimed: int) -> None:
    message = shard_refusal(support.write_shard(tmp_path / "a.bin", [1, 2], count=claimed))
    assert f"found {1024 + 4}" in message
    assert f"expected {1024 + 2 * claimed} bytes" in message


@pytest.mark.parametrize("size", [0, 1, 12, 1023])
def test_a_file_shorter_than_a_header_is_refused(tmp_path: Path, size: int) -> None:
    whole = support.write_shard(tmp_path / "a.bin", range(100)).read_bytes()
    (tmp_path / "short.bin").write_bytes(whole[:size])
    shard_refusal(tmp_path / "short.bin")


@pytest.mark.parametrize("size", [1024, 1025, 1223])
def test_a_truncated_shard_is_refused_with_both_sizes(tmp_path: Path, size: int) -> None:
    whole = support.write_shard(tmp_path / "a.bin", range(100)).read_bytes()
    (tmp_path / "short.bin").write_bytes(whole[:size])
    message = shard_refusal(tmp_path / "short.bin")
    assert "1224" in message and f"found {size}" in message


def test_a_missing_shard_is_refused_with_the_reason(tmp_path: Path) -> None:
    assert "No such file" in shard_refusal(tmp_path / "absent.bin")


def test_a_folder_in_place_of_a_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").mkdir()
    shard_refusal(tmp_path / "a.bin")


def test_a_shard_of_no_tokens_is_read_as_empty(tmp_path: Path) -> None:
    assert read_shard(support.write_shard(tmp_path / "a.bin", [])).size == 0


def test_a_split_is_its_own_shards_in_name_order(tmp_path: Path) -> None:
    for number in np.random.default_rng(0).permutation(12).tolist():
        support.write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", [number, 50])
    support.write_shard(tmp_path / "fineweb_val_000000.bin", [99])
    assert [s.tolist() for s in open_split(str(tmp_path), "train")] == [[n, 50] for n in range(12)]
    assert [s.tolist() for s in open_split(str(tmp_path), "val")] == [[99]]


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_data_folder_is_refused_with_pattern_and_remedy(
    tmp_path: Path, split: str
) -> None:
    message = support.refusal(open_split, str(tmp_path), split)
    assert f"DATA_PATH={tmp_path}" in message
    assert f"found no fineweb_{split}_NNNNNN.bin; " in message
    assert "DATA_PATH=sample" in message


LOOK_ALIKES = [
    "fineweb_{}_0000000.bin",
    "fineweb_{}_00000.bin",
    "fineweb_{}_bytes_000000.bin",
    "fineweb_{}_000000 (1).bin",
    "fineweb_{}_000000(1).bin",
    "fineweb_{}_000000-copy.bin",
    "fineweb_{}_000000.bin.bin",
    "fineweb_{}_000000.bin.part",
    "fineweb_{}_000000.BIN",
    "fineweb_{}_000000.bin~",
    "fineweb_{}_00000a.bin",
    "fineweb_{}_-00001.bin",
    "fineweb_{}_ 00000.bin",
    "fineweb_{}_\u0660\u0660\u0660\u0660\u0660\u0660.bin",
    "fineweb_{}_000000\n.bin",
    "fineweb_{}_.bin",
    "fineweb_{}.bin",
    "FINEWEB_{}_000000.BIN",
    "FineWeb_{}_000000.bin",
    "._fineweb_{}_000000.bin",
    "xfineweb_{}_000000.bin",
    "my_fineweb_{}_000000.bin",
    "{}_000000.bin",
]


@pytest.mark.parametrize("pattern", LOOK_ALIKES)
@pytest.mark.parametrize("split", ["train", "val"])
def test_what_only_looks_like_a_shard_is_named_and_not_read(
    split: str, pattern: str, tmp_path: Path
) -> None:
    """Tokens beside it are read alone; it may hold anything, here what no shard holds."""
    name = pattern.format(split)
    (tmp_path / name).write_bytes(b"bytes of each token")
    message = support.refusal(lambda: open_split(str(tmp_path), split)).replace("\\n", "\n")
    assert f"found no fineweb_{split}_NNNNNN.bin, only {name!r}".replace("\\n", "\n") in message
    assert "which are no shards" in message
    support.write_shard(tmp_path / f"fineweb_{split}_000000.bin", [5, 6])
    assert [shard.tolist() for shard in open_split(str(tmp_path), split)] == [[5, 6]]
    assert train_gpt.misnamed_shards(str(tmp_path)) == [name]


def test_upper_case_letters_of_a_split_are_no_split(tmp_path: Path) -> None:
    for name in ("fineweb_VAL_000000.bin", "fineweb_Val_000000.bin"):
        support.write_shard(tmp_path / name, [5, 6])
    assert "fineweb_VAL_000000.bin" in support.refusal(open_split, str(tmp_path), "val")
    assert len(train_gpt.misnamed_shards(str(tmp_path))) == 2


def test_other_files_beside_shards_are_not_named(tmp_path: Path) -> None:
    for name in ("manifest.json", "README.md", "docs.jsonl", "cabin.txt", "fineweb.model"):
        (tmp_path / name).write_text("x")
    support.write_shard(tmp_path / "fineweb_val_000000.bin", [5, 6])
    support.write_shard(tmp_path / "fineweb_train_999999.bin", [5, 6])
    assert train_gpt.misnamed_shards(str(tmp_path)) == []
    assert train_gpt.misnamed_shards(str(tmp_path / "absent")) == []


def test_the_log_names_look_alikes_and_the_score_is_without_them(tmp_path: Path) -> None:
    data = small_run.data_in(tmp_path)
    scores = [small_run.run_here(data, tmp_path / "clean").scores["packed"]]
    names = ["fineweb_train_000000 (1).bin", "fineweb_val_000000 (1).bin",
             "fineweb_val_0000001.bin", "fineweb_val_bytes_000000.bin"]  # fmt: skip
    for name in names:
        split = "train" if "train" in name else "val"
        shutil.copy(tmp_path / f"shards/fineweb_{split}_000000.bin", tmp_path / "shards" / name)
    scores.append(small_run.run_here(data, tmp_path / "more").scores["packed"])
    assert scores[0].tokens == scores[1].tokens == 999
    assert scores[0].nats == scores[1].nats
    log = (tmp_path / "more/train.log").read_text().splitlines()
    notes = [line for line in log if line.endswith("its name is not that of a shard")]
    start = f"note: {tmp_path}/shards/"
    assert [line.removeprefix(start).split(" is not read as tokens:")[0] for line in notes] == names
    assert "not that of a shard" not in "".join(clean_notes(tmp_path / "clean/train.log"))


def clean_notes(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith("note:")]


@pytest.mark.parametrize("change", ["first", "last", "swapped", "split otherwise", "shorter"])
@pytest.mark.parametrize("size", [7, (1 << 20) + 5])
def test_another_text_of_the_same_size_has_another_digest(size: int, change: str) -> None:
    tokens = np.random.default_rng(0).integers(0, 1000, 2 * size).astype(np.uint16)
    shards = [tokens[:size], tokens[size:]]
    changed = [shard.copy() for shard in shards]
    if change == "first":
        changed[0][0] ^= 1
    elif change == "last":
        changed[1][-1] ^= 1
    elif change == "swapped":
        changed.reverse()
    elif change == "split otherwise":
        changed = [tokens[: size - 1], tokens[size - 1 :]]
    else:
        changed[1] = changed[1][:-1]
    assert train_gpt.digest_of(changed) != train_gpt.digest_of(shards)
    assert train_gpt.digest_of([shard.copy() for shard in shards]) == train_gpt.digest_of(shards)


def test_any_token_of_a_split_changes_its_digest() -> None:
    tokens = np.zeros(3 << 20, dtype=np.uint16)
    whole = train_gpt.digest_of([tokens])
    for place in np.random.default_rng(0).integers(0, len(tokens), 12):
        changed = tokens.copy()
        changed[place] = 1
        assert train_gpt.digest_of([changed]) != whole, place


def test_a_shard_on_disk_has_the_digest_of_its_tokens(tmp_path: Path) -> None:
    path = support.write_shard(tmp_path / "a.bin", range(3000))
    assert train_gpt.digest_of([read_shard(path)]) == train_gpt.digest_of(
        [np.arange(3000, dtype=np.uint16)]
    )


def test_a_token_id_outside_the_vocabulary_is_refused() -> None:
    tokens = np.array([[1, 63], [2, 64]])
    train_gpt.check_vocabulary(tokens, 65, "here")
    with pytest.raises(RunError, match=r"here: token id 64 .*VOCAB_SIZE=64"):
        train_gpt.check_vocabulary(tokens, 64, "here")


# Batch plan


def numbered_shards(*lengths: int) -> list[np.ndarray]:
    """Shards in which every token tells where it stands: no two tokens of all are equal."""
    starts = np.cumsum([0, *lengths])
    return [np.arange(a, b, dtype=np.uint16) for a, b in itertools.pairwise(starts)]


def plan_of(lengths: tuple[int, ...] = (203, 70, 400), seq_len: int = 8, batch: int = 6,
            seed: int = 3) -> BatchPlan:  # fmt: skip
    return BatchPlan(numbered_shards(*lengths), seq_len, batch, seed)


def epoch_windows(plan: BatchPlan, epoch: int) -> list[tuple[int, int]]:
    per_epoch = plan.windows_per_epoch
    return [plan.window(epoch * per_epoch + i) for i in range(per_epoch)]


@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_a_batch_is_the_same_for_any_ranks_and_micro_batches(world: int, micro: int) -> None:
    reference = plan_of()
    local = 6 // world
    ranks = [plan_of() for _ in range(world)]  # every rank has its own plan
    for step in (0, 1, 5, 40, 2):
        whole = reference.tokens(step, range(6))
        parts = []
        for rank, plan in enumerate(ranks):
            rows = torch.from_numpy(plan.tokens(step, range(rank * local, (rank + 1) * local)))
            parts += rows.chunk(micro)
        assert np.array_equal(torch.cat(parts).numpy(), whole)
        assert whole.shape == (6, 9)
        assert whole.dtype == np.int64


def test_a_window_is_consecutive_tokens_of_one_shard() -> None:
    shards = numbered_shards(203, 70, 400)
    plan = plan_of()
    for step in range(50):
        for i, row in enumerate(plan.tokens(step, range(6))):
            shard, start = plan.window(step * 6 + i)
            assert start >= 0
            assert start + 9 <= len(shards[shard])
            assert row.tolist() == [int(shards[shard][start + j]) for j in range(9)]


@pytest.mark.parametrize("lengths", [(203, 70, 400), (16,), (17, 5, 16), (1000,), (24, 24, 24)])
def test_every_window_of_an_epoch_is_used_exactly_once(lengths: tuple[int, ...]) -> None:
    plan = plan_of(lengths)
    for epoch in range(3):
        windows = epoch_windows(plan, epoch)
        assert len(set(windows)) == len(windows) == plan.windows_per_epoch
        predicted = [(s, start + j) for s, start in windows for j in range(1, 9)]
        assert len(set(predicted)) == len(predicted), "no token is a target twice"


def test_an_epoch_leaves_out_less_than_two_windows_of_each_shard() -> None:
    lengths = (203, 70, 400)
    plan = plan_of(lengths)
    for epoch in range(4):
        windows = epoch_windows(plan, epoch)
        for shard, length in enumerate(lengths):
            used = 8 * sum(s == shard for s, _ in windows)
            assert length - 2 * 8 < used <= length - 1


def test_no_row_of_an_epoch_comes_twice() -> None:
    plan = plan_of()
    steps = plan.windows_per_epoch // 6
    rows = np.concatenate([plan.tokens(step, range(6)) for step in range(steps)])
    assert len({tuple(row) for row in rows}) == 6 * steps


def test_a_batch_across_two_epochs_takes_its_rows_from_both() -> None:
    plan = plan_of()
    per_epoch = plan.windows_per_epoch
    assert per_epoch % 6, "the shapes must make a batch straddle the epochs"
    step = per_epoch // 6
    expected = [plan_of().window(step * 6 + i) for i in range(6)]
    got = plan_of().tokens(step, range(6))
    shards = numbered_shards(203, 70, 400)
    assert [r[0] for r in got.tolist()] == [int(shards[s][t]) for s, t in expected]
    assert {(step * 6 + i) // per_epoch for i in range(6)} == {0, 1}


def test_epochs_differ_in_order_and_in_where_they_cut_the_text() -> None:
    plan = plan_of((4000,))
    first, second = epoch_windows(plan, 0), epoch_windows(plan, 1)
    assert first != second
    cuts = {tuple(sorted({start % 8 for _, start in epoch_windows(plan, e)})) for e in range(12)}
    assert all(len(cut) == 1 for cut in cuts), "within an epoch windows do not overlap"
    assert len(cuts) > 3


def test_a_batch_draws_from_all_shards_in_no_order() -> None:
    plan = plan_of((4000, 4000, 4000), batch=64)
    for step in range(3):
        windows = [plan.window(step * 64 + i) for i in range(64)]
        assert {shard for shard, _ in windows} == {0, 1, 2}
        follows = sum(b[0] == a[0] and b[1] == a[1] + 8 for a, b in itertools.pairwise(windows))
        assert follows <= 3


def test_the_plan_depends_on_the_seed_alone() -> None:
    a, b, other = plan_of(), plan_of(), plan_of(seed=4)
    b.tokens(300, range(6))  # reading ahead or back must not change what a batch is
    for step in (0, 7, 200):
        assert np.array_equal(a.tokens(step, range(6)), b.tokens(step, range(6)))
    assert not np.array_equal(a.tokens(0, range(6)), other.tokens(0, range(6)))


def test_a_shard_without_a_whole_window_is_skipped() -> None:
    plan = plan_of((7, 100, 3, 16))
    assert {shard for shard, _ in epoch_windows(plan, 0)} == {1, 3}


def test_shards_without_a_window_are_refused_with_the_length() -> None:
    with pytest.raises(RunError, match=r"at least one of 16 tokens, found 15.*TRAIN_SEQ_LEN"):
        plan_of((15, 3))


# Prefetch


def test_prefetch_yields_what_the_plan_reads() -> None:
    for rows in (range(6), range(2, 4)):
        loader = prefetch(plan_of(), rows, 65_536, torch.device("cpu"))
        for step in range(40):
            batch = next(loader)
            assert batch.tokens.dtype == torch.int64 and not batch.fault
            assert np.array_equal(batch.tokens.numpy(), plan_of().tokens(step, rows))
        loader.close()


def test_prefetch_reads_ahead_but_not_without_bound() -> None:
    asked: list[int] = []

    class Watched(BatchPlan):
        def tokens(self, step: int, rows: range) -> np.ndarray:
            asked.append(step)
            return super().tokens(step, rows)

    loader = prefetch(Watched(numbered_shards(400), 8, 4, 0), range(4), 65_536, torch.device("cpu"))
    next(loader)
    patience = time.monotonic() + support.HANG
    while len(asked) < 3 and time.monotonic() < patience:
        time.sleep(0.01)
    time.sleep(0.1)
    loader.close()
    assert 3 <= len(asked) <= 10
    assert asked == list(range(len(asked)))


def test_prefetch_ends_its_thread_when_its_consumer_stops() -> None:
    before = set(threading.enumerate())
    loader = prefetch(plan_of(), range(6), 65_536, torch.device("cpu"))
    next(loader)
    mine = set(threading.enumerate()) - before
    assert mine
    loader.close()
    for thread in mine:
        thread.join(timeout=support.HANG)
        assert not thread.is_alive()


def test_prefetch_raises_the_error_of_its_thread() -> None:
    class Broken(BatchPlan):
        def tokens(self, step: int, rows: range) -> np.ndarray:
            if step == 2:
                raise OSError("the disk is gone")
            return super().tokens(step, rows)

    loader = prefetch(Broken(numbered_shards(400), 8, 4, 0), range(4), 65_536, torch.device("cpu"))
    next(loader)
    next(loader)
    with pytest.raises(OSError, match="the disk is gone"):
        next(loader)


def test_prefetch_tells_of_a_token_outside_the_vocabulary() -> None:
    """Its batch is zeros: training goes on until all ranks know of it."""
    loader = prefetch(plan_of((400,)), range(6), 300, torch.device("cpu"))
    batches = [next(loader) for _ in range(60)]
    loader.close()
    read = [plan_of((400,)).tokens(step, range(6)) for step in range(60)]
    assert {bool(tokens.max() >= 300) for tokens in read} == {True, False}
    for step, (batch, tokens) in enumerate(zip(batches, read, strict=True)):
        if tokens.max() < 300:
            assert batch.fault == "" and np.array_equal(batch.tokens.numpy(), tokens)
            continue
        assert batch.fault.startswith(f"training batch {step}: token id {tokens.max()} found, ")
        assert "VOCAB_SIZE=300" in batch.fault and not batch.tokens.any()
