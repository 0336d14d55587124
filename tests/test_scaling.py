"""Claims about bench/scaling.py: ranks together and alone train the same steps, and are timed."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import REPO, FakeClock, completed, cpu_runtime, tiny, train_gpt, write_shard

sys.path.insert(0, str(REPO / "bench"))
import scaling


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of two ranks on a model of two layers."""
    data = tmp_path_factory.mktemp("scaling")
    write_shard(data / "fineweb_train_000000.bin", [(7 * i + i // 64) % 64 for i in range(9000)])
    settings: dict[str, Any] = dict(
        PRESET="smoke", DATA_PATH=data, VOCAB_SIZE=64, NUM_LAYERS=2, MODEL_DIM=32, MLP_HIDDEN=48,
        VE_DIM=8, TRAIN_SEQ_LEN=32, TRAIN_BATCH_TOKENS=256, EVAL_STRIDE=32, LR_WARMUP_STEPS=0,
        OMP_NUM_THREADS=1,
    )  # fmt: skip
    done = completed(REPO / "bench/scaling.py", 2, ranks=2, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_kernels_that_ranks_add_come_first(tmp_path: Path) -> None:
    log = train_gpt.RunLog(tmp_path / "a.log")
    together = {"gemm": 40.0, "ncclReduceScatter": 0.7, "muon": 1.0, scaling.NO_KERNEL: 0.6}
    scaling.report_kernels(log, together, {"gemm": 40.1, "muon": 2.0, scaling.NO_KERNEL: 0.5})
    lines = (tmp_path / "a.log").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["-1.000", "+0.700", "-0.100", "+0.100"]
    assert "0.700 together  ncclReduceScatter" in lines[1] and lines[3].endswith("(no kernel runs)")


def test_two_ranks_and_one_have_the_same_twenty_losses(output: list[str]) -> None:
    found = [re.search(r"step (\d+): 2 ranks (\S+), one rank (\S+),", line) for line in output]
    rows = [(int(m[1]), float(m[2]), float(m[3])) for m in found if m]
    assert [number for number, _, _ in rows] == list(range(1, 21))
    assert rows[-1][1] < 0.99 * rows[0][1], "nothing is learned"
    assert all(together == pytest.approx(one, abs=1e-4) for _, together, one in rows)
    largest = max(abs(together - one) for _, together, one in rows)
    assert float(output[-1].split()[-2]) == pytest.approx(largest, abs=2e-5)


def test_a_step_together_is_compared_with_the_slowest_alone(output: list[str]) -> None:
    timed = [line for line in output if line.startswith("step")]
    assert [line.split(":")[0] for line in timed] == ["step", "step, late QAT"]
    for line in timed:
        assert "256 tokens; 128 tokens on each rank alone" in line
        assert f"{scaling.ROUNDS} times in turn" in line
        numbers = [float(number) for number in re.findall(r"([+-]?\d+\.\d\d)\b", line)]
        together, *alone, over, least, most, update = numbers
        assert len(alone) == 2 and min(together, *alone) > 0
        assert least <= over <= most
        assert abs(update) < together


def round_of(together: list[tuple[float, float]], alone: list[tuple[float, float]]) -> Any:
    """Of pairs of a rank's step and update."""
    return scaling.Round([scaling.Times(*t) for t in together], [scaling.Times(*t) for t in alone])


def test_the_overhead_is_that_of_rounds_not_of_medians(tmp_path: Path) -> None:
    """Ranks that slow down together, by more than they cost, change it by nothing."""
    rounds = [
        round_of([(67.5, 3.0), (67.5, 1.9)], [(66.0, 2.0), (67.0, 2.1)]),
        round_of([(70.0, 1.8), (70.0, 3.0)], [(69.4, 2.0), (68.0, 2.0)]),
        round_of([(69.0, 3.0), (69.0, 1.8)], [(68.0, 2.0), (68.6, 2.0)]),
    ]
    scaling.report_times(train_gpt.RunLog(tmp_path / "a.log"), "step", rounds, 200)
    assert (tmp_path / "a.log").read_text() == (
        "step: 69.00 ms on 2 ranks, 200 tokens; 100 tokens on each rank alone: 68.00, 68.00 ms; "
        "overhead over the slowest, 3 times in turn: +0.50 ms (+0.40 to +0.60), -0.20 of it in the "
        "update\n"
    )


def test_the_slowest_rank_tells_what_the_update_costs() -> None:
    """The others' updates hold their wait for it."""
    found = round_of([(70.0, 4.5), (70.0, 2.5)], [(66.0, 2.0), (69.5, 2.0)])
    assert found.slowest == 1
    assert found.overhead == scaling.Times(pytest.approx(0.5), pytest.approx(0.5))


@pytest.fixture
def steps(tmp_path: Path) -> scaling.Steps:
    """Of one rank on a CPU."""
    write_shard(tmp_path / "fineweb_train_000000.bin", [i % 64 for i in range(9000)])
    h, runtime = tiny(data_path=str(tmp_path)), cpu_runtime()
    return scaling.Steps(h, runtime, train_gpt.choose_kernels(h, runtime, train_gpt.RunLog(None)))


def test_a_timed_step_moves_no_weight(steps: scaling.Steps) -> None:
    steps.losses()
    before = {name: t.clone() for name, t in steps.trainer.optimizer.masters().items()}
    losses = [steps.still_step(steps.batch(20))() for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]
    after = steps.trainer.optimizer.masters()
    assert all(torch.equal(after[name], t) for name, t in before.items())


def test_the_update_is_a_part_of_the_step(
    steps: scaling.Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that forward and backward move by 3 s, and the update by 2."""
    clock = FakeClock()
    monkeypatch.setattr(scaling.timing, "time", clock)
    trainer = steps.trainer
    monkeypatch.setattr(trainer, "gradients", clock.slow(trainer.gradients, 3))
    monkeypatch.setattr(trainer.optimizer, "update", clock.slow(trainer.optimizer.update, 2))
    found = steps.times(steps.batch(20), timed=2)
    assert found == scaling.Times(pytest.approx(5e3), pytest.approx(2e3))
