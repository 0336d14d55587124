"""Claims about the training loop: warm-up, graphs, clock, micro-batches, faults, golden losses.

After a change that is meant to alter the losses, write the golden file again and commit it:

    python tests/test_training.py --regenerate
"""

import dataclasses
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import cpu_runtime, tiny, train_gpt, write_shard
from torch import Tensor

from train_gpt import BatchPlan, ByteTable, Evaluator, Hyperparameters, RunError, Runtime, Trainer

GOLDEN = Path(__file__).with_name("golden_losses.json")
VOCAB = 64  # of `tiny`


def text(length: int, seed: int) -> list[int]:
    """Documents that count up by their own stride, with one token in eight replaced."""
    generator = np.random.Generator(np.random.PCG64(seed))
    tokens: list[int] = []
    while len(tokens) < length:
        start, stride, size = generator.integers((60, 5, 40)) + (0, 1, 10)
        body = 2 + (start + stride * np.arange(size)) % (VOCAB - 2)
        noise = generator.integers(2, VOCAB, size)
        tokens += [1, *np.where(generator.random(size) < 0.125, noise, body).tolist()]
    return tokens[:length]


def new_plan(h: Hyperparameters, folder: Path) -> BatchPlan:
    shards = [
        train_gpt.read_shard(write_shard(folder / f"fineweb_train_{i:06}.bin", text(3000 + i, i)))
        for i in range(2)
    ]
    return BatchPlan(shards, h.train_seq_len, h.train_batch_tokens // h.train_seq_len, h.seed)


def new_evaluator(h: Hyperparameters, runtime: Runtime) -> Evaluator:
    """One byte a token."""
    boundary = np.arange(VOCAB) == train_gpt.BOS_ID
    table = ByteTable((~boundary).astype(np.int64), np.zeros(VOCAB, dtype=bool), boundary)
    return Evaluator(h, runtime, np.array(text(300, 9), dtype=np.uint16), table)


def new_trainer(h: Hyperparameters, runtime: Runtime | None = None) -> Trainer:
    return Trainer(h, runtime or cpu_runtime(), train_gpt.Kernels())


class Run:
    """`train` on generated data, and what it printed."""

    def __init__(self, h: Hyperparameters, folder: Path, runtime: Runtime | None = None):
        runtime = runtime or cpu_runtime()
        log = train_gpt.RunLog(folder / "train.log")
        self.trainer = new_trainer(h, runtime)
        evaluator = new_evaluator(h, runtime)
        self.stages, self.facts = train_gpt.train(
            h, runtime, log, evaluator, self.trainer, new_plan(h, folder)
        )
        self.lines = (folder / "train.log").read_text().splitlines()


def losses_of(h: Hyperparameters, folder: Path, steps: int) -> list[float]:
    """Training losses at full precision, by the steps of `train` with a fixed schedule."""
    trainer, plan = new_trainer(h), new_plan(h, folder)
    losses = []
    for step in range(steps):
        tokens = torch.from_numpy(plan.tokens(step, range(plan.batch_seqs)))
        lr = train_gpt.lr_scale(h, train_gpt.progress_of(h, step, 0.0))
        losses.append(float(trainer.train_step(tokens, lr, h.decay_per_run / h.iterations)))
    return losses


# Warm-up


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all that training changes or depends on."""
    optimizer = trainer.optimizer
    state: dict[str, Tensor] = {f"weight {n}": p for n, p in trainer.model.named_parameters()}
    state |= {f"master {n}": t for n, t in optimizer.masters().items()}
    state |= {f"mean {n}": t for n, t in trainer.average.mean.items()}
    for bank in optimizer.banks:
        state |= {f"padded {bank.name}": bank.padded, f"momentum {bank.name}": bank.momentum}
    state |= {
        "adamw mean": optimizer.mean,
        "adamw square": optimizer.square,
        "adamw steps": optimizer.steps,
        "torch rng": torch.get_rng_state(),
        "numpy rng": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),  # type: ignore
        "average count": torch.tensor(trainer.average.count),
    }
    return {name: t.detach().clone() for name, t in state.items()}


def test_warm_up_leaves_every_state_bit_equal() -> None:
    h = tiny()
    trainer = new_trainer(h)
    before, rounding = state_of(trainer), []
    inner = trainer.train_step

    def recording(*args: Any) -> Tensor:
        rounding.append(trainer.optimizer.qat_step is not None)
        return inner(*args)

    trainer.train_step = recording  # type: ignore
    trainer.warm_up(new_evaluator(h, cpu_runtime()))
    assert set(rounding) == {False, True}, "warm-up ran no step, or none before or after late QAT"
    after = state_of(trainer)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert trainer.optimizer.qat_step is None
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_warmed_up_run_has_the_losses_of_a_cold_one(tmp_path: Path) -> None:
    h = tiny()
    warm, cold = new_trainer(h), new_trainer(h)
    warm.warm_up(new_evaluator(h, cpu_runtime()))
    plan = new_plan(h, tmp_path)
    for step in range(4):
        tokens = torch.from_numpy(plan.tokens(step, range(plan.batch_seqs)))
        losses = [float(trainer.train_step(tokens, 0.5)) for trainer in (warm, cold)]
        assert losses[0] == losses[1]


# Graphs


def compiled(backend: str = "eager") -> Runtime:
    return cpu_runtime(compile_backend=backend)


SMALL: dict[str, Any] = dict(num_layers=2, xsa_layers=1, ve_layers=1)
SCHEDULED: dict[str, Any] = SMALL | dict(  # validation, averaging and late QAT in a few steps
    iterations=8, warmdown_fraction=1.0, swa_threshold=0.6, qat_threshold=0.4, val_loss_every=3
)


def test_no_graph_is_compiled_on_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_up, h = Trainer.warm_up, tiny(**SCHEDULED)
    plain = Run(h, tmp_path / "plain")
    with ExitStack() as stack:

        def then_forbid(self: Trainer, evaluator: Evaluator) -> None:
            warm_up(self, evaluator)
            stack.enter_context(torch.compiler.set_stance("fail_on_recompile"))

        monkeypatch.setattr(Trainer, "warm_up", then_forbid)
        run = Run(h, tmp_path / "graphs", compiled())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled at all"
    assert run.facts["graphs_compiled_on_clock"] == 0
    assert run.facts["qat_steps"] >= 2 and run.facts["swa_steps"] >= 2
    assert any("val_bpb" in line for line in run.lines)
    losses = [r.facts["final_train_loss"] for r in (plain, run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_graphs_compiled_on_the_clock_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "warm_up", lambda self, evaluator: None)
    run = Run(tiny(**SMALL, iterations=1, qat_threshold=0.0), tmp_path, compiled())
    assert run.facts["graphs_compiled_on_clock"] > 0


# Micro-batches and layout


@pytest.mark.parametrize("micro_batch_tokens", [32, 64, 128])
def test_micro_batches_change_no_loss(micro_batch_tokens: int, tmp_path: Path) -> None:
    whole = losses_of(tiny(), tmp_path, 5)
    parts = losses_of(tiny(micro_batch_tokens=micro_batch_tokens), tmp_path, 5)
    assert new_trainer(tiny(micro_batch_tokens=micro_batch_tokens)).micro == 256 // (
        micro_batch_tokens
    )
    assert parts == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    ("sequences", "most", "ranks", "expected"),
    [
        (8, 8, 1, (8, 8, 1)),
        (8, 3, 1, (8, 8, 4)),  # 3 does not divide 8: 2 at once
        (8, 1, 2, (8, 4, 4)),
        (12, 5, 3, (12, 4, 1)),
        (7, 6, 1, (7, 7, 7)),  # prime
        (384, 48, 8, (384, 48, 1)),  # the submitted run
        (384, 48, 1, (384, 384, 8)),
    ],
)
def test_batch_layout_divides_the_batch_evenly(
    sequences: int, most: int, ranks: int, expected: tuple[int, int, int]
) -> None:
    h = tiny(train_batch_tokens=32 * sequences, micro_batch_tokens=32 * most)
    assert train_gpt.batch_layout(h, ranks) == expected


@pytest.mark.parametrize(("sequences", "ranks"), [(8, 3), (1, 2), (12, 8)])
def test_a_batch_that_ranks_cannot_share_is_refused_by_name(sequences: int, ranks: int) -> None:
    h = tiny(train_batch_tokens=32 * sequences)
    with pytest.raises(RunError, match=rf"TRAIN_BATCH_TOKENS={32 * sequences}\b.*{ranks} ranks"):
        train_gpt.batch_layout(h, ranks)


# The clock


class FakeClock:
    """Stands in for the module `time`: moves when told, and by 1 ns at every look."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        self.now += 1e-9
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def slow(self, function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return function(*args, **kwargs)

        return timed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """A step takes 0.1 s, a validation 5 s, the warm-up 60 s."""
    fake = FakeClock()
    monkeypatch.setattr(train_gpt, "time", fake)
    monkeypatch.setattr(Trainer, "train_step", fake.slow(Trainer.train_step, 0.1))
    monkeypatch.setattr(Trainer, "warm_up", fake.slow(lambda self, evaluator: None, 60.0))
    monkeypatch.setattr(Evaluator, "score", fake.slow(Evaluator.score, 5.0))
    return fake


@pytest.mark.parametrize("cap", [1.05, 2.99])
def test_training_ends_inside_the_cap_and_uses_it(
    cap: float, tmp_path: Path, clock: FakeClock
) -> None:
    run = Run(tiny(iterations=10_000, max_wallclock_seconds=cap), tmp_path)
    assert cap - 0.51 < run.facts["wallclock_seconds"] <= cap
    assert run.facts["step_stop"] == round(run.facts["wallclock_seconds"] / 0.1)
    assert run.facts["step_avg_ms"] == pytest.approx(100, abs=0.1)


def test_a_capped_run_still_warms_down_averages_and_rounds(
    tmp_path: Path, clock: FakeClock
) -> None:
    run = Run(
        tiny(
            iterations=10_000,
            max_wallclock_seconds=8.0,
            warmdown_fraction=0.6,
            swa_threshold=0.2,
            qat_threshold=0.15,
        ),
        tmp_path,
    )
    assert run.facts["swa_steps"] >= 4 and run.facts["qat_steps"] >= 3
    assert run.facts["swa_steps"] >= run.facts["qat_steps"]


def test_the_clock_stops_for_validation_and_warm_up(tmp_path: Path, clock: FakeClock) -> None:
    run = Run(tiny(iterations=6, max_wallclock_seconds=3.0, val_loss_every=2), tmp_path)
    assert run.facts["step_stop"] == 6
    assert run.facts["wallclock_seconds"] == pytest.approx(0.6)
    assert sum("val_bpb" in line for line in run.lines) == 2
    assert clock.now > 160


def test_without_a_cap_only_the_steps_count(tmp_path: Path, clock: FakeClock) -> None:
    run = Run(tiny(iterations=7), tmp_path)
    assert run.facts["step_stop"] == 7


@pytest.mark.parametrize("cap", [1e-10, 0.05])
def test_a_cap_shorter_than_a_step_still_ends_cleanly(
    cap: float, tmp_path: Path, clock: FakeClock
) -> None:
    run = Run(tiny(iterations=7, max_wallclock_seconds=cap), tmp_path)
    assert run.facts["step_stop"] <= 2


# The loop


def test_a_signal_after_the_ranks_have_agreed_counts_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that acted on it at once would wait for the others forever."""
    agree, rounds = Runtime.agree_on, []

    def interrupting(self: Runtime, value: Any) -> Any:
        agreed = agree(self, value)
        if isinstance(value, tuple):
            rounds.append(value)
            if len(rounds) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        return agreed

    monkeypatch.setattr(Runtime, "agree_on", interrupting)
    before = signal.getsignal(signal.SIGTERM)
    run = Run(tiny(iterations=8), tmp_path)
    assert run.facts["interrupted"] and run.facts["step_stop"] == 3
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("iterations", "clock"), [(8, 0.0), (10**6, 0.5)])
def test_the_decay_of_a_run_adds_up_to_decay_per_run(
    iterations: int, clock: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decays: list[float] = []
    step = Trainer.train_step

    def recording(self: Trainer, tokens: Tensor, lr: float, decay: float = 0.0) -> Tensor:
        decays.append(decay)
        return step(self, tokens, lr, decay)

    monkeypatch.setattr(Trainer, "warm_up", lambda self, evaluator: None)
    monkeypatch.setattr(Trainer, "train_step", recording)
    h = tiny(iterations=iterations, decay_per_run=40.0, max_wallclock_seconds=clock)
    Run(h, tmp_path)
    assert decays[0] == pytest.approx(0.0, abs=0.1), "before the first step nothing is over"
    assert min(decays) >= 0
    if clock:
        assert 20 < sum(decays) <= 40, "the last step was decided on before the clock ran out"
    else:
        assert decays[1:] == pytest.approx([5.0] * 7)


def test_the_log_names_every_step_and_the_averages_are_its_mean(tmp_path: Path) -> None:
    h = tiny(iterations=8, warmdown_fraction=1.0, swa_threshold=0.6, qat_threshold=0.0)
    masters: list[dict[str, Tensor]] = []
    step = Trainer.train_step

    def recording(self: Trainer, tokens: Tensor, lr: float, decay: float = 0.0) -> Tensor:
        loss = step(self, tokens, lr, decay)
        whole = {n: t.detach().clone() for n, t in self.optimizer.masters().items()}
        masters.append(whole if lr < 0.6 else {})
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", recording)
        patch.setattr(Trainer, "warm_up", lambda self, evaluator: None)
        run = Run(h, tmp_path)
    states = [state for state in masters if state]
    assert len(masters) == 8 and run.facts["swa_steps"] == len(states) == 4
    for name, mean in run.stages["averaged"].items():
        expected = torch.stack([s[name].double() for s in states]).mean(0)
        torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-6, msg=name)
        assert torch.equal(run.stages["trained"][name], states[-1][name]), name
    steps = [line.split()[0] for line in run.lines if line.startswith("step:")]
    assert steps == [f"step:{i}/8" for i in range(1, 9)]


def test_without_averaging_the_averaged_weights_are_the_trained_ones(tmp_path: Path) -> None:
    run = Run(tiny(iterations=3, swa_threshold=0.0, qat_threshold=0.0), tmp_path)
    assert run.facts["swa_steps"] == run.facts["qat_steps"] == 0
    for name, weight in run.stages["trained"].items():
        assert torch.equal(run.stages["averaged"][name], weight)


# A loss that is not finite


def diverging(
    monkeypatch: pytest.MonkeyPatch, at: int, bad: float = float("nan"), loss_too: bool = True
) -> dict[int, dict[str, Tensor]]:
    """From step `at` on one gradient and, perhaps, the loss are `bad`; returns the weights after
    each step."""
    step, gradients = Trainer.train_step, Trainer.loss_and_gradients
    masters = dict[int, dict[str, Tensor]]()

    def failing(self: Trainer, tokens: Tensor) -> list[Tensor]:
        loss, *rest = gradients(self, tokens)
        if len(masters) + 1 >= at:
            rest[2].view(-1)[5] = bad
            loss = loss + bad if loss_too else loss
        return [loss, *rest]

    def recording(self: Trainer, *args: Any) -> Tensor:
        loss = step(self, *args)
        masters[len(masters) + 1] = {
            n: t.clone() for n, t in self.optimizer.masters().items()
        }
        return loss

    monkeypatch.setattr(Trainer, "warm_up", lambda self, evaluator: None)
    monkeypatch.setattr(Trainer, "loss_and_gradients", failing)
    monkeypatch.setattr(Trainer, "train_step", recording)
    return masters


def obtain(h: Hyperparameters, folder: Path) -> str:
    """The message with which training ends; `folder` gets its shards and what it saves."""
    h = dataclasses.replace(h, data_path=str(folder), output_dir=str(folder))
    write_shard(folder / "fineweb_train_000000.bin", text(3000, 0))
    runtime, log = cpu_runtime(), train_gpt.RunLog(folder / "train.log")
    with pytest.raises(RunError) as caught:
        train_gpt.obtain_weights(h, runtime, log, new_evaluator(h, runtime), train_gpt.Kernels())
    return str(caught.value)


@pytest.mark.parametrize("loss_too", [True, False], ids=["loss", "gradient-alone"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_ends_the_run_with_its_step_the_losses_before_and_a_state(
    bad: float, loss_too: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masters = diverging(monkeypatch, 8, bad, loss_too)
    message = obtain(tiny(iterations=12, train_log_every=3), tmp_path)
    found = re.match(r"step 8: the loss is nan \(before: (.*)\); lower MATRIX_LR", message)
    assert found and len(masters) == 8, message
    logged = (tmp_path / "train.log").read_text().splitlines()
    found_losses = [re.match(r"step:\d+/12 train_loss:(\S+)", line) for line in logged]
    losses = [float(m[1]) for m in found_losses if m]
    assert [float(part) for part in found[1].split(", ")] == losses[2:7], "the last five"
    path = tmp_path / "final_model.partial.pt"
    assert f"RESUME_FROM={path}" in message
    saved = torch.load(path, weights_only=True)
    assert saved["facts"]["fault"] in message
    for name, weight in saved["stages"]["trained"].items():
        assert torch.equal(weight, masters[7][name]), "the last good step's weights are kept"


def test_a_fault_while_averaging_leaves_the_average_of_good_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masters = diverging(monkeypatch, 7)
    h = tiny(iterations=8, warmdown_fraction=1.0, swa_threshold=0.6, qat_threshold=0.0)
    obtain(h, tmp_path)
    saved = torch.load(tmp_path / "final_model.partial.pt", weights_only=True)
    assert saved["facts"]["swa_steps"] == 3
    for name, weight in saved["stages"]["averaged"].items():
        assert bool(weight.isfinite().all()), name
        mean = torch.stack([masters[step][name].double() for step in (5, 6, 6)]).mean(0)
        torch.testing.assert_close(weight.double(), mean, rtol=1e-5, atol=1e-6, msg=name)


def test_a_state_that_is_not_finite_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = Trainer.train_step, iter(range(1, 100))

    def poisoning(self: Trainer, *args: Any) -> Tensor:
        loss = step(self, *args)
        if next(calls) == 5:
            self.optimizer.flat_master.fill_(float("nan"))
            loss = loss + float("nan")
        return loss

    monkeypatch.setattr(Trainer, "warm_up", lambda self, evaluator: None)
    monkeypatch.setattr(Trainer, "train_step", poisoning)
    message = obtain(tiny(iterations=12), tmp_path)
    assert message.startswith("step 5") and message.endswith("no finite weights left")
    assert not (tmp_path / "final_model.partial.pt").exists()


def test_a_run_that_truly_diverges_is_reported_and_not_packed(tmp_path: Path) -> None:
    message = obtain(tiny(iterations=50, embed_lr=1e30, scalar_lr=1e30), tmp_path)
    assert re.match(r"step \d+: the loss is (nan|inf)", message)


# The line on a terminal


def test_on_a_terminal_training_shows_its_progress_and_the_log_stays_as_it_is(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    h = tiny(iterations=60, train_log_every=50)
    plain = Run(h, tmp_path / "plain")
    assert "\r" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = Run(h, tmp_path / "terminal")
    pattern = (r"step:(\d+)/60 loss:\d\.\d{4} bpb:(\d\.\d{3}) 100\.0ms 2,560 tokens/s "
               r"left:(\d)s")  # fmt: skip
    lines = re.findall(r"\033\[K([^\r\n]*)\r", capsys.readouterr().out)
    matches = [re.fullmatch(pattern, line) for line in lines]
    assert len(lines) >= 4 and all(matches), lines
    for match in matches:
        assert match and int(match[3]) == round((60 - int(match[1])) / 10)
    assert shown.lines == plain.lines
    assert not any("tokens/s" in line for line in shown.lines)


def test_the_progress_line_counts_the_flops_of_the_model() -> None:
    """The card at 70.1 ms a step of 98,304 tokens: 370 TFLOP/s of an H100's 989."""
    h = Hyperparameters(train_batch_tokens=98_304, iterations=1600)
    evaluator = SimpleNamespace(h=h, targets=1000, text_bytes=2600,
                                runtime=Runtime(torch.device("cuda")))  # fmt: skip
    queue = train_gpt.StepQueue(evaluator, train_gpt.RunLog(None))  # type: ignore[arg-type]
    queue.ends.append(70.1)
    queue.pace = 0.0701
    line = queue.status(1000, 2.0)
    assert "MFU:37% left:42s" in line and "1,402,340 tokens/s" in line
    assert f"bpb:{2 / math.log(2) / 2.6:.3f}" in line


# Legality


def test_training_reads_no_validation_shard_and_trains_on_no_token_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation during training reads the split that was opened before; its shard is gone."""
    h = tiny(data_path=str(tmp_path), output_dir=str(tmp_path), iterations=30, val_loss_every=7)
    marked = 63  # only in the validation split
    for i in range(2):
        tokens = [min(token, marked - 1) for token in text(3000, i)]
        write_shard(tmp_path / f"fineweb_train_{i:06}.bin", tokens)
    val = write_shard(tmp_path / "fineweb_val_000000.bin", [1, *[marked] * 300])
    (split,) = train_gpt.open_split(h.data_path, "val")
    boundary = np.arange(VOCAB) == train_gpt.BOS_ID
    table = ByteTable((~boundary).astype(np.int64), np.zeros(VOCAB, dtype=bool), boundary)
    evaluator = Evaluator(h, cpu_runtime(), split.copy(), table)
    val.unlink()
    opened, seen = list[Path](), list[Tensor]()
    read, step, warm_up = train_gpt.read_shard, Trainer.train_step, Trainer.warm_up

    def recording(self: Trainer, tokens: Tensor, lr: float, decay: float = 0.0) -> Tensor:
        seen.append(tokens)
        return step(self, tokens, lr, decay)

    def then_clear(self: Trainer, evaluator: Evaluator) -> None:
        warm_up(self, evaluator)
        seen.clear()  # random tokens, and undone

    monkeypatch.setattr(train_gpt, "read_shard", lambda path: (opened.append(path), read(path))[1])
    monkeypatch.setattr(Trainer, "train_step", recording)
    monkeypatch.setattr(Trainer, "warm_up", then_clear)
    log = train_gpt.RunLog(tmp_path / "train.log")
    train_gpt.obtain_weights(h, cpu_runtime(), log, evaluator, train_gpt.Kernels())
    assert sum("val_bpb" in line for line in log.path.read_text().splitlines()) == 4  # type: ignore
    assert sorted(path.name for path in opened) == [f"fineweb_train_{i:06}.bin" for i in range(2)]
    assert len(seen) == 30
    assert not any(bool((tokens == marked).any()) for tokens in seen)


# Golden losses


def golden_losses(folder: Path) -> list[float]:
    """With every tuned number spelled out: a new default is no reason for a new file."""
    h = tiny(
        num_layers=3, iterations=20, matrix_lr=0.025, embed_lr=0.035, scalar_lr=0.025,
        decay_per_run=0.8, muon_momentum=0.99, muon_momentum_warmup_start=0.92,
        muon_momentum_warmup_steps=4, muon_beta2=0.95, beta1=0.9, beta2=0.95, adam_eps=1e-8,
        grad_clip_norm=0.3, warmdown_fraction=0.6, warmdown_iters=0, embed_init_std=0.005,
        qk_gain_init=1.5, rope_base=10_000.0, logit_softcap=30.0, mlp_slope=0.0, seed=1337,
    )  # fmt: skip
    return losses_of(h, folder, 20)


def test_twenty_steps_repeat_the_golden_losses(tmp_path: Path) -> None:
    expected = json.loads(GOLDEN.read_text())["losses"]
    losses = golden_losses(tmp_path)
    assert len(expected) == 20
    assert losses == pytest.approx(expected, abs=1e-4)


def test_the_golden_losses_fall() -> None:
    losses = json.loads(GOLDEN.read_text())["losses"]
    assert np.mean(losses[-3:]) < 0.95 * losses[0]


if __name__ == "__main__":
    if sys.argv[1:] != ["--regenerate"]:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        content = {"torch": torch.__version__, "losses": golden_losses(Path(folder))}
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")
