"""Claims about the training loop: warm-up, graphs, lengths, clock, faults, golden losses.

After a change that is meant to alter the losses, write the golden file again and commit it:

    python tests/test_training.py --regenerate
"""

import dataclasses
import itertools
import json
import math
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support import (
    FakeClock,
    byte_table,
    cpu_runtime,
    in_float64,
    refusal,
    tiny,
    tiny_model,
    train_gpt,
    write_shard,
)
from test_loop import WHOLE
from torch import Tensor

from train_gpt import BatchPlan, Evaluator, Hyperparameters, Runtime, Trainer

GOLDEN = Path(__file__).with_name("golden_losses.json")
VOCAB = 64  # of `tiny`


def counting_tokens(length: int, seed: int) -> list[int]:
    """Documents that count up by their own stride, with one token in eight replaced."""
    generator = np.random.Generator(np.random.PCG64(seed))
    tokens: list[int] = []
    while len(tokens) < length:
        start, stride, size = generator.integers((60, 5, 40)) + (0, 1, 10)
        body = 2 + (start + stride * np.arange(size)) % (VOCAB - 2)
        noise = generator.integers(2, VOCAB, size)
        tokens += [1, *np.where(generator.random(size) < 0.125, noise, body).tolist()]
    return tokens[:length]


def write_train_shards(folder: Path, most: int = VOCAB) -> list[Path]:
    """Two shards of tokens below `most`."""
    paths = []
    for i in range(2):
        tokens = [min(token, most - 1) for token in counting_tokens(3000 + i, i)]
        paths.append(write_shard(folder / f"fineweb_train_{i:06}.bin", tokens))
    return paths


def new_plan(h: Hyperparameters, folder: Path) -> BatchPlan:
    shards = [train_gpt.read_shard(path) for path in write_train_shards(folder)]
    return BatchPlan(shards, h.train_seq_len, h.train_batch_tokens // h.train_seq_len, h.seed)


def new_evaluator(h: Hyperparameters, runtime: Runtime) -> Evaluator:
    tokens = np.array(counting_tokens(300, 9), dtype=np.uint16)
    return Evaluator(h, runtime, tokens, byte_table(VOCAB))


def new_trainer(h: Hyperparameters, runtime: Runtime | None = None) -> Trainer:
    return Trainer(h, runtime or cpu_runtime(), train_gpt.Kernels())


def new_session(h: Hyperparameters, evaluator: Evaluator) -> train_gpt.Session:
    """What the stages of a run share; its log is train.log in OUTPUT_DIR."""
    files = train_gpt.RunFiles(h)
    log = train_gpt.RunLog(files.folder / "train.log")
    return train_gpt.Session(h, cpu_runtime(), files, log, evaluator, {}, train_gpt.Kernels())


class Run:
    """`train` on generated data, and what it printed."""

    def __init__(self, h: Hyperparameters, folder: Path, runtime: Runtime | None = None):
        runtime = runtime or cpu_runtime()
        log = train_gpt.RunLog(folder / "train.log")
        self.trainer = new_trainer(h, runtime)
        evaluator = new_evaluator(h, runtime)
        plan = new_plan(h, folder)
        train_gpt.warm_up(self.trainer, evaluator, log)
        with train_gpt.received_signals() as signals:
            self.stages, self.facts = train_gpt.train(
                h, runtime, log, evaluator, self.trainer, plan, signals
            )
        self.lines = (folder / "train.log").read_text().splitlines()


def losses_of(h: Hyperparameters, folder: Path, steps: int) -> list[float]:
    """Training losses at full precision, by the steps of `train` with a fixed schedule."""
    trainer, plan = new_trainer(h), new_plan(h, folder)
    losses = []
    for step in range(steps):
        tokens = torch.from_numpy(plan.tokens(step, range(plan.batch_seqs)))
        progress = train_gpt.progress_of(h, step, 0.0)
        lr = train_gpt.lr_scale(h, progress)
        trainer.seq_len = train_gpt.seq_len_at(h, progress)
        losses.append(float(trainer.train_step(tokens, lr, h.decay_per_run / h.iterations)))
    return losses


class Step(NamedTuple):
    """What a training step was given, and the masters that it left."""

    tokens: Tensor
    lr: float
    decay: float
    masters: dict[str, Tensor]
    seq_len: int


def recorded_steps(patch: pytest.MonkeyPatch) -> list[Step]:
    """Every training step from now on, without those of the warm-up, which are undone."""
    step, warm_up = Trainer.train_step, Trainer.warm_up
    steps: list[Step] = []

    def recording(
        self: Trainer, tokens: Tensor, lr: float, decay: float = 0.0, **options: Any
    ) -> Tensor:
        loss = step(self, tokens, lr, decay, **options)
        masters = {n: t.detach().clone() for n, t in self.optimizer.masters().items()}
        steps.append(Step(tokens, lr, decay, masters, self.seq_len))
        return loss

    def then_forget(self: Trainer, evaluator: Evaluator) -> None:
        warm_up(self, evaluator)
        steps.clear()

    patch.setattr(Trainer, "train_step", recording)
    patch.setattr(Trainer, "warm_up", then_forget)
    return steps


def without_warm_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Trainer, "warm_up", lambda self, evaluator: None)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Every training step of this test; there is no warm-up."""
    without_warm_up(monkeypatch)
    return recorded_steps(monkeypatch)


# Warm-up


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all that training changes or depends on."""
    optimizer = trainer.optimizer
    state: dict[str, Tensor] = {f"weight {n}": p for n, p in trainer.model.named_parameters()}
    state |= {f"master {n}": t for n, t in optimizer.masters().items()}
    state |= {f"mean {n}": t for n, t in trainer.average.mean.items()}
    for bank in optimizer.banks:
        state |= {f"padded {bank.name}": bank.padded, f"momentum {bank.name}": bank.momentum}
        state[f"mean square {bank.name}"] = bank.mean_square
    state |= {
        "adamw mean": optimizer.small.mean,
        "adamw square": optimizer.small.mean_square,
        "steps done": optimizer.steps_done,
        "torch rng": torch.get_rng_state(),
        "numpy rng": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),  # type: ignore
        "average count": torch.tensor(trainer.average.count),
    }
    return {name: t.detach().clone() for name, t in state.items()}


@pytest.mark.parametrize(("early", "lengths"), [(0, [32]), (16, [16, 32])])
def test_warm_up_leaves_every_state_bit_equal(early: int, lengths: list[int]) -> None:
    h = tiny(early_seq_len=early)
    trainer = new_trainer(h)
    before, kinds = state_of(trainer), set()
    inner = trainer.train_step

    def recording(*args: Any) -> Tensor:
        kinds.add((trainer.seq_len, trainer.optimizer.late_qat.on))
        return inner(*args)

    trainer.train_step = recording  # type: ignore
    trainer.warm_up(new_evaluator(h, cpu_runtime()))
    assert kinds == set(itertools.product(lengths, (False, True))), "before and after late QAT"
    after = state_of(trainer)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not trainer.optimizer.late_qat.on and trainer.qat_steps == 0
    assert trainer.seq_len == h.train_seq_len
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


TWO_LAYERS: dict[str, Any] = dict(num_layers=2, xsa_layers=1, ve_layers=1)
SCHEDULED: dict[str, Any] = TWO_LAYERS | dict(  # validation, averaging and late QAT in a few steps
    iterations=8, warmdown_fraction=1.0, swa_threshold=0.6, qat_threshold=0.4, val_loss_every=3
)


short_until = pytest.mark.parametrize(
    ("early", "until"),
    [(0, 0.0), (16, 0.5), (16, 0.8)],  # all whole, longer before late QAT, longer after it
)


@short_until
def test_no_graph_is_compiled_on_the_clock(
    early: int, until: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = tiny(**SCHEDULED, early_seq_len=early, early_fraction=until)
    warm_up = Trainer.warm_up
    plain = Run(h, tmp_path / "plain")
    with ExitStack() as stack:

        def then_forbid(self: Trainer, evaluator: Evaluator) -> None:
            warm_up(self, evaluator)
            stack.enter_context(torch.compiler.set_stance("fail_on_recompile"))

        monkeypatch.setattr(Trainer, "warm_up", then_forbid)
        run = Run(h, tmp_path / "graphs", compiled())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled at all"
    assert run.facts.graphs_compiled_on_clock == 0
    assert run.facts.qat_steps >= 2 and run.facts.swa_steps >= 2
    assert any("val_bpb" in line for line in run.lines)
    assert any("sequence_length:32" in line for line in run.lines) == bool(early)
    losses = [r.facts.final_train_loss for r in (plain, run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_graphs_compiled_on_the_clock_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_warm_up(monkeypatch)
    run = Run(tiny(**TWO_LAYERS, iterations=1, qat_threshold=0.0), tmp_path, compiled())
    assert run.facts.graphs_compiled_on_clock > 0


def fake_capture(function: Callable[..., Any], pool: object, *held: Tensor) -> Callable[..., Any]:
    """A CUDA graph as a CPU can play it: fixed tensors go in and come out.

    Like the capture of one, it leaves no trace of the run that finds out what comes out.
    """
    results = function(*held)

    def replay(*arguments: Tensor) -> Any:
        for tensor, new in zip(held, arguments, strict=True):
            tensor.copy_(new)
        new_results = function(*held)
        if isinstance(new_results, Tensor):
            return results.copy_(new_results)
        for result, new in zip(results, new_results, strict=True):
            result.copy_(new)
        return results

    return replay


Kind = tuple[int, int]  # of a step: layers in their order, tokens of a sequence


class CapturedRun(Run):
    """A run whose steps are `fake_capture`s, each replayed only in steps of its own kind."""

    POOL = object()

    def __init__(self, h: Hyperparameters, folder: Path, patch: pytest.MonkeyPatch):
        self.launched = set[Kind]()  # kernel by kernel
        self.replayed = set[Kind]()  # after the warm-up
        warm_up_steps = Trainer.warm_up_steps
        loss_and_gradients = Trainer.loss_and_gradients

        def launch(trainer: Trainer, tokens: Tensor) -> list[Tensor]:
            self.launched.add((len(trainer.model.plan), trainer.seq_len))
            return loss_and_gradients(trainer, tokens)

        def as_on_cuda(trainer: Trainer, generator: torch.Generator) -> None:
            trainer.graph_pool = self.POOL  # type: ignore[assignment]
            with patch.context() as warming_up:
                warming_up.setattr(Runtime, "on_cuda", True)
                warming_up.setattr(train_gpt, "capture", self.capture_for(trainer))
                warm_up_steps(trainer, generator)
            self.replayed.clear()

        patch.setattr(Trainer, "warm_up_steps", as_on_cuda)
        patch.setattr(Trainer, "loss_and_gradients", launch)
        super().__init__(h, folder)

    def capture_for(self, trainer: Trainer) -> Callable[..., Any]:
        def kind() -> Kind:
            return len(trainer.model.plan), trainer.seq_len

        def capture(
            function: Callable[..., Any], pool: object, *held: Tensor
        ) -> Callable[..., Any]:
            assert pool is self.POOL, "a graph with temporaries of its own"
            every = {(kind()[0], length) for length in train_gpt.seq_lens(trainer.h)}
            assert every <= self.launched, "a length is launched beside the memory of a graph"
            captured = kind()
            replay = fake_capture(function, pool, *held)

            def of_its_kind(*arguments: Tensor) -> Any:
                assert kind() == captured
                self.replayed.add(captured)
                return replay(*arguments)

            return of_its_kind

        return capture

    def check(self, plain: Run, captured: set[Kind], replayed: set[Kind]) -> None:
        """Graphs of these kinds, with and without late QAT, which train what steps without do."""
        graphs = self.trainer.graphs
        assert {(len(plan), length) for plan, length in graphs} == captured
        assert self.replayed == replayed
        for part in graphs.values():
            assert part.gradients and part.update and part.update_late_qat
        assert self.facts.qat_steps >= 2
        for name, weight in plain.stages["trained"].items():
            torch.testing.assert_close(self.stages["trained"][name], weight, msg=name)


@short_until
def test_graphs_of_one_length_are_not_used_for_another(
    early: int, until: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured, the update reads gradients from where the graph of its own length left them."""
    h = tiny(iterations=8, warmdown_fraction=1.0, qat_threshold=0.4, early_seq_len=early,
             early_fraction=until)  # fmt: skip
    plain = Run(h, tmp_path / "plain")
    run = CapturedRun(h, tmp_path / "graphs", monkeypatch)
    kinds = {(4, 16), (4, 32)} if early else {(4, 32)}
    run.check(plain, captured=kinds, replayed=kinds)


# Short sequences first


def documents(rows: int) -> Tensor:
    """(rows, 33) tokens with a start of a document amid the first row."""
    tokens = torch.randint(2, VOCAB, (rows, 33), generator=torch.Generator().manual_seed(0))
    tokens[0, 9] = train_gpt.BOS_ID
    return tokens


def check_alone(model: train_gpt.GPT, length: int) -> None:
    """Loss and gradients of short sequences are the mean of what each gives alone."""
    tokens = documents(2)

    def with_gradients(loss: Tensor) -> list[Tensor]:
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    with in_float64():
        alone = [
            model.mean_loss(row[None, t : t + length], row[None, t + 1 : t + length + 1])
            for row in tokens
            for t in range(0, 32, length)
        ]
        expected = with_gradients(0.25 * torch.stack(alone).mean())
        found = with_gradients(train_gpt.loss_share(model, tokens, 0.25, length))
        whole = train_gpt.loss_share(model, tokens, 0.25, 32)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert abs(whole - found[0]) > 1e-4, "a whole sequence has the same loss"


@pytest.mark.parametrize("length", [1, 8, 16])
def test_short_sequences_are_trained_on_as_if_each_were_alone(length: int) -> None:
    """Attention, the key shift and SmearGate take nothing from before them."""
    check_alone(tiny_model(tiny(), torch.float64), length)


def test_no_sequence_changes_a_loss_of_another() -> None:
    model = tiny_model(tiny(), torch.float64)
    model.kernels = model.kernels._replace(mean_loss=train_gpt.token_losses)  # without the mean
    tokens = documents(2)
    with in_float64(), torch.no_grad():
        before = train_gpt.loss_share(model, tokens, 1.0, 16)
        assert before.shape == (4, 16)
        for t in range(33):
            changed = tokens.clone()
            changed[0, t] = 2 if tokens[0, t] != 2 else 3
            moved = (train_gpt.loss_share(model, changed, 1.0, 16) - before).abs() > 1e-12
            assert moved.any(1).tolist() == [t <= 16, t >= 16, False, False], "16 is its target"


@pytest.mark.parametrize("until", [0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    "bound",
    [dict(iterations=10), dict(iterations=10**6, max_wallclock_seconds=1.0)],
    ids=["steps", "time"],
)
def test_sequences_grow_at_a_progress_whatever_bounds_the_run(
    bound: dict[str, Any], until: float, tmp_path: Path, clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    steps = recorded_steps(monkeypatch)
    run = Run(tiny(**bound, early_seq_len=16, early_fraction=until), tmp_path)
    lengths = [step.seq_len for step in steps]
    short = min(round(10 * until), len(lengths))
    assert len(lengths) >= 8 and lengths == [16] * short + [32] * (len(lengths) - short)
    assert {step.tokens.shape for step in steps} == {(8, 33)}, "a step keeps its tokens"
    changes = [line[:-2] for line in run.lines if line.startswith("sequence_length:")]
    grown = f"sequence_length:32 step:{short + 1} progress:{until:.2f}"
    assert changes == ["sequence_length:16 step:1 progress:0.00", grown][: 1 + (until < 1)]


def test_a_step_trains_on_its_length_and_scores_are_of_whole_sequences(
    tmp_path: Path, steps: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those on the way as well."""
    seen = list[tuple[bool, tuple[int, ...]]]()
    final_hidden = train_gpt.GPT.final_hidden

    def noting(model: train_gpt.GPT, inputs_BT: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), tuple(inputs_BT.shape)))
        return final_hidden(model, inputs_BT)

    monkeypatch.setattr(train_gpt.GPT, "final_hidden", noting)
    Run(tiny(early_seq_len=16, val_loss_every=1), tmp_path)
    trained = [shape for training, shape in seen if training]
    assert trained == [(16, 16)] * 3 + [(8, 32)] * 3
    assert {shape[1] for training, shape in seen if not training} == {32}
    assert seen[1][0] is False, "no score between the first two steps"


@pytest.mark.parametrize("settings", WHOLE, ids=str)
def test_without_short_sequences_a_run_is_bit_for_bit_one_that_cannot_have_them(
    settings: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(model: train_gpt.GPT, tokens: Tensor, share: float, seq_len: int) -> Tensor:
        return model.mean_loss(tokens[:, :-1], tokens[:, 1:]) * share

    run = Run(tiny(**settings), tmp_path / "whole")
    short = Run(tiny(early_seq_len=16), tmp_path / "short").stages["trained"]
    monkeypatch.setattr(train_gpt, "loss_share", without)
    plain = Run(tiny(), tmp_path / "plain").stages["trained"]
    assert all(torch.equal(run.stages["trained"][name], plain[name]) for name in plain)
    assert not any("sequence_length" in line for line in run.lines)
    assert not torch.equal(short["qo_bank"], plain["qo_bank"])


# Micro-batches and layout


@pytest.mark.parametrize("early", [0, 16])
@pytest.mark.parametrize("micro_batch_tokens", [32, 64, 128])
def test_micro_batches_change_no_loss(micro_batch_tokens: int, early: int, tmp_path: Path) -> None:
    """Of whole sequences, and of short ones and the whole ones after them."""
    whole = losses_of(tiny(early_seq_len=early), tmp_path, 5)
    h = tiny(early_seq_len=early, micro_batch_tokens=micro_batch_tokens)
    parts = losses_of(h, tmp_path, 5)
    assert new_trainer(h).layout.micro == 256 // micro_batch_tokens
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
    message = refusal(train_gpt.batch_layout, h, ranks)
    assert re.search(rf"TRAIN_BATCH_TOKENS={32 * sequences}\b.*{ranks} ranks", message)


# The clock


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
    assert cap - 0.51 < run.facts.wallclock_seconds <= cap
    assert run.facts.step_stop == round(run.facts.wallclock_seconds / 0.1)
    assert run.facts.step_avg_ms == pytest.approx(100, abs=0.1)


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
    assert run.facts.swa_steps >= 4 and run.facts.qat_steps >= 3
    assert run.facts.swa_steps >= run.facts.qat_steps


def test_the_clock_stops_for_validation_and_warm_up(tmp_path: Path, clock: FakeClock) -> None:
    run = Run(tiny(iterations=6, max_wallclock_seconds=3.0, val_loss_every=2), tmp_path)
    assert run.facts.step_stop == 6
    assert run.facts.wallclock_seconds == pytest.approx(0.6)
    assert sum("val_bpb" in line for line in run.lines) == 2
    assert clock.now > 160


def test_without_a_cap_only_the_steps_count(tmp_path: Path, clock: FakeClock) -> None:
    run = Run(tiny(iterations=7), tmp_path)
    assert run.facts.step_stop == 7


@pytest.mark.parametrize("cap", [1e-10, 0.05])
def test_a_cap_shorter_than_a_step_still_ends_cleanly(
    cap: float, tmp_path: Path, clock: FakeClock
) -> None:
    run = Run(tiny(iterations=7, max_wallclock_seconds=cap), tmp_path)
    assert run.facts.step_stop <= 2


# The loop


def test_a_signal_after_the_ranks_agreed_counts_at_the_next_step(
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
    assert run.facts.interrupted and run.facts.step_stop == 3
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_in_validation_cuts_it_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take longer than the 30 s after which torchrun kills."""
    without_warm_up(monkeypatch)
    last_losses, windows = Evaluator.last_losses, []

    def struck(self: Evaluator, model: train_gpt.GPT, starts: range, scored: int) -> Any:
        windows.append(starts)
        os.kill(os.getpid(), signal.SIGTERM)
        return last_losses(self, model, starts, scored)

    monkeypatch.setattr(Evaluator, "last_losses", struck)
    run = Run(tiny(iterations=8, val_loss_every=2), tmp_path)
    assert run.facts.interrupted and run.facts.step_stop == 3
    assert len(windows) == 1 and len(windows[0]) > 4, "one batch of several"
    assert not any("val_loss" in line for line in run.lines)


def test_a_validation_that_another_rank_cut_short_is_cut_short_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the other rank has not scored is missing in the sum, which all ranks know."""
    monkeypatch.setattr(Runtime, "sum", lambda self, tensor: tensor)
    h = tiny()
    evaluator = new_evaluator(h, cpu_runtime(world_size=2))
    model = tiny_model(h)
    with pytest.raises(train_gpt.CutShort):
        evaluator.score(model, signals=[])
    with pytest.raises(AssertionError, match="scored, not 299"):
        evaluator.score(model)


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (0, [1, 1, 1, 1, 1, 1, 1, 0.5]),
        (4, [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.5]),
        (16, [k / 16 for k in (1, 2, 3, 4, 5, 6, 7)] + [0.5 * 8 / 16]),  # beyond the warm-down
    ],
)
def test_lr_rises_linearly_over_the_warm_up_steps(
    warmup: int, expected: list[float], tmp_path: Path, steps: list[Step]
) -> None:
    Run(tiny(iterations=8, lr_warmup_steps=warmup, warmdown_fraction=0.25), tmp_path)
    assert [step.lr for step in steps] == pytest.approx(expected)


def test_the_first_step_of_a_warm_up_moves_weights_by_its_share(tmp_path: Path) -> None:
    moved = []
    for warmup in (0, 4):
        h = tiny(iterations=1, lr_warmup_steps=warmup, qat_threshold=0.0, grad_clip_norm=0.0)
        trained = Run(h, tmp_path).stages["trained"]
        start = train_gpt.initial_weights(h)
        moved.append({name: trained[name] - start[name] for name in start})
    for name, whole in moved[0].items():
        torch.testing.assert_close(moved[1][name], whole / 4, rtol=1e-2, atol=1e-6, msg=name)
    assert all(bool(moved[0][name].any()) for name in ("tok_emb", "qo_bank"))


def test_the_decay_of_a_run_adds_up_to_decay_per_run(tmp_path: Path, steps: list[Step]) -> None:
    Run(tiny(iterations=8, decay_per_run=40.0), tmp_path)
    decays = [step.decay for step in steps]
    assert decays[0] == 0.0, "before the first step nothing is over"
    assert decays[1:] == pytest.approx([5.0] * 7)


def test_the_decay_follows_the_clock_where_that_ends_the_run(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = recorded_steps(monkeypatch)
    Run(tiny(iterations=10**6, decay_per_run=40.0, max_wallclock_seconds=2.0), tmp_path)
    decays = [step.decay for step in steps]
    assert decays[0] == pytest.approx(0.0, abs=1e-3)
    assert decays[1:] == pytest.approx([2.0] * (len(decays) - 1), rel=1e-3), "0.1 of 2 s"
    assert 34 < sum(decays) <= 40, "the last step was decided on before the clock ran out"


def test_the_log_names_every_step(tmp_path: Path) -> None:
    run = Run(tiny(iterations=8), tmp_path)
    logged = [line.split()[0] for line in run.lines if line.startswith("step:")]
    assert logged == [f"step:{i}/8" for i in range(1, 9)]


def test_the_averages_are_the_mean_of_the_last_steps(tmp_path: Path, steps: list[Step]) -> None:
    h = tiny(iterations=8, warmdown_fraction=1.0, swa_threshold=0.6, qat_threshold=0.0)
    run = Run(h, tmp_path)
    averaged = [step.masters for step in steps if step.lr < 0.6]
    assert len(steps) == 8 and run.facts.swa_steps == len(averaged) == 4
    for name, mean in run.stages["averaged"].items():
        expected = torch.stack([masters[name].double() for masters in averaged]).mean(0)
        torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-6, msg=name)
        assert torch.equal(run.stages["trained"][name], averaged[-1][name]), name


def test_without_averaging_the_averages_are_the_trained_weights(tmp_path: Path) -> None:
    run = Run(tiny(iterations=3, swa_threshold=0.0, qat_threshold=0.0), tmp_path)
    assert run.facts.swa_steps == run.facts.qat_steps == 0
    for name, weight in run.stages["trained"].items():
        assert torch.equal(run.stages["averaged"][name], weight)


def test_the_facts_hold_the_grid_step_that_late_qat_trained_on(tmp_path: Path) -> None:
    budget = train_gpt.SOURCE.stat().st_size + 20_000
    h = tiny(iterations=8, warmdown_fraction=1.0, qat_threshold=0.6, artifact_bytes=budget)
    run = Run(h, tmp_path)
    (line,) = (line for line in run.lines if line.startswith("late_qat:on"))
    assert line.endswith(f"grid_step:{run.facts.grid_step:.6g}") and run.facts.grid_step > 1e-3
    assert Run(tiny(iterations=3, qat_threshold=0.0), tmp_path).facts.grid_step == 0.0


def test_late_qat_gets_what_code_and_float16_leave_of_the_cap() -> None:
    h = tiny(artifact_bytes=1_000_000)
    table = train_gpt.parameter_table(h).values()
    in_float16 = sum(math.prod(row.shape) for row in table if row.grid is None)
    left = 1_000_000 - train_gpt.SOURCE.stat().st_size - 2 * in_float16
    assert new_trainer(h).weight_bytes() == pytest.approx(left / 1.013)
    assert 0 < in_float16 < h.parameters() / 3


# A loss that is not finite


def diverging(
    steps: list[Step],
    patch: pytest.MonkeyPatch,
    at: int,
    bad: float = math.nan,
    loss_too: bool = True,
) -> None:
    """From step `at` on one gradient and, perhaps, the loss are `bad`."""
    gradients = Trainer.loss_and_gradients

    def failing(self: Trainer, tokens: Tensor) -> list[Tensor]:
        loss, *rest = gradients(self, tokens)
        if len(steps) + 1 >= at:
            rest[2].view(-1)[5] = bad
            loss = loss + bad if loss_too else loss
        return [loss, *rest]

    patch.setattr(Trainer, "loss_and_gradients", failing)


def obtain(h: Hyperparameters, folder: Path) -> str:
    """The message with which training ends; `folder` gets its shards and what it saves."""
    h = dataclasses.replace(h, data_path=str(folder), output_dir=str(folder))
    write_shard(folder / "fineweb_train_000000.bin", counting_tokens(3000, 0))
    return refusal(train_gpt.train_and_save, new_session(h, new_evaluator(h, cpu_runtime())))


class Fault(NamedTuple):
    """A run that ended because something was not finite at step 8."""

    message: str
    steps: list[Step]
    log: list[str]
    saved: Path


@pytest.fixture(
    scope="module",
    params=[(bad, loss_too) for bad in (math.nan, math.inf) for loss_too in (True, False)],
    ids=lambda param: f"{param[0]}-{'loss' if param[1] else 'gradient-alone'}",
)
def fault(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fault:
    folder = tmp_path_factory.mktemp("fault")
    with pytest.MonkeyPatch.context() as patch:
        without_warm_up(patch)
        steps = recorded_steps(patch)
        diverging(steps, patch, 8, *request.param)
        message = obtain(tiny(iterations=12, train_log_every=3), folder)
    log = (folder / "train.log").read_text().splitlines()
    return Fault(message, steps, log, folder / "final_model.partial.pt")


def test_what_is_not_finite_ends_the_run_with_its_step(fault: Fault) -> None:
    assert fault.message.startswith("step 8: the loss is nan (before: ")
    assert "; lower MATRIX_LR" in fault.message
    assert len(fault.steps) == 8


def test_a_fault_is_told_with_the_losses_before_it(fault: Fault) -> None:
    told = re.search(r"\(before: (.*)\)", fault.message)
    logged = [re.match(r"step:\d+/12 train_loss:(\S+)", line) for line in fault.log]
    losses = [float(m[1]) for m in logged if m]
    assert told and [float(part) for part in told[1].split(", ")] == losses[2:7], "the last five"


def test_a_fault_leaves_the_weights_of_the_last_good_step(fault: Fault) -> None:
    assert f"RESUME_FROM={fault.saved}" in fault.message
    saved = torch.load(fault.saved, weights_only=True)
    assert saved["facts"]["fault"] in fault.message
    for name, weight in saved["stages"]["trained"].items():
        assert torch.equal(weight, fault.steps[6].masters[name]), name


def test_a_fault_while_averaging_leaves_the_good_average(
    tmp_path: Path, steps: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging(steps, monkeypatch, 7)
    h = tiny(iterations=8, warmdown_fraction=1.0, swa_threshold=0.6, qat_threshold=0.0)
    obtain(h, tmp_path)
    saved = torch.load(tmp_path / "final_model.partial.pt", weights_only=True)
    assert saved["facts"]["swa_steps"] == 3
    for name, weight in saved["stages"]["averaged"].items():
        assert bool(weight.isfinite().all()), name
        mean = torch.stack([steps[i].masters[name].double() for i in (4, 5, 5)]).mean(0)
        torch.testing.assert_close(weight.double(), mean, rtol=1e-5, atol=1e-6, msg=name)


def test_a_state_that_is_not_finite_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = Trainer.train_step, iter(range(1, 100))

    def poisoning(self: Trainer, *args: Any, **options: Any) -> Tensor:
        loss = step(self, *args, **options)
        if next(calls) == 5:
            self.optimizer.small.master.fill_(float("nan"))
            loss = loss + float("nan")
        return loss

    without_warm_up(monkeypatch)
    monkeypatch.setattr(Trainer, "train_step", poisoning)
    message = obtain(tiny(iterations=12), tmp_path)
    assert message.startswith("step 5") and message.endswith("no finite weights left")
    assert not (tmp_path / "final_model.partial.pt").exists()


def test_a_run_that_truly_diverges_is_reported_and_not_packed(tmp_path: Path) -> None:
    message = obtain(tiny(iterations=50, embed_lr=1e30, scalar_lr=1e30), tmp_path)
    assert re.match(r"step \d+: the loss is (nan|inf)", message)


# The line on a terminal


def test_a_terminal_shows_progress_that_the_log_does_not_hold(
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


def lines_of_the_card() -> train_gpt.TrainingLines:
    """Of 1,600 steps of 98,304 tokens on an H100."""
    h = Hyperparameters(train_batch_tokens=98_304, iterations=1600)
    evaluator = SimpleNamespace(h=h, targets=1000, text_bytes=2600,
                                runtime=Runtime(torch.device("cuda")))  # fmt: skip
    return train_gpt.TrainingLines(evaluator, train_gpt.RunLog(None))  # type: ignore[arg-type]


def test_the_progress_line_counts_the_flops_of_the_model() -> None:
    """The card at 70.1 ms a step: 370 TFLOP/s of an H100's 989."""
    lines = lines_of_the_card()
    line = lines.status(1000, 2.0, clock=70.1, seconds=0.0701)
    assert "MFU:37% left:42s" in line and "1,402,340 tokens/s" in line
    assert f"bpb:{2 / math.log(2) / 2.6:.3f}" in line


@pytest.mark.parametrize(("step", "share"), [(1, 35), (799, 35), (800, 40), (1599, 40)])
def test_the_flops_are_those_of_sequences_as_long_as_they_are_then(step: int, share: int) -> None:
    """At 66 ms a step: 341 TFLOP/s of 1,024 tokens, 393 of 2,048."""
    line = lines_of_the_card().status(step, 2.0, clock=0.066 * step, seconds=0.066)
    assert f" MFU:{share}% " in line


# Legality


MARKED = VOCAB - 1  # stands in the validation split alone


class Legality(NamedTuple):
    """A training during which its validation shard was gone."""

    opened: list[str]
    steps: list[Step]
    log: list[str]


@pytest.fixture(scope="module")
def legality(tmp_path_factory: pytest.TempPathFactory) -> Legality:
    """Validation during training has the split that was read before the shard was deleted."""
    folder = tmp_path_factory.mktemp("legality")
    h = tiny(data_path=str(folder), output_dir=str(folder), iterations=30, val_loss_every=7)
    write_train_shards(folder, most=MARKED)
    val = write_shard(folder / "fineweb_val_000000.bin", [1, *[MARKED] * 300])
    (split,) = train_gpt.open_split(h.data_path, "val")
    evaluator = Evaluator(h, cpu_runtime(), split.copy(), byte_table(VOCAB))
    val.unlink()
    opened, read = list[str](), train_gpt.read_shard

    def noting(path: Path) -> np.ndarray:
        opened.append(path.name)
        return read(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "read_shard", noting)
        steps = recorded_steps(patch)
        train_gpt.train_and_save(new_session(h, evaluator))
    return Legality(opened, steps, (folder / "train.log").read_text().splitlines())


def test_training_reads_no_validation_shard(legality: Legality) -> None:
    assert sorted(legality.opened) == [f"fineweb_train_{i:06}.bin" for i in range(2)]


def test_training_trains_on_no_token_of_validation(legality: Legality) -> None:
    assert len(legality.steps) == 30
    assert not any(bool((step.tokens == MARKED).any()) for step in legality.steps)


def test_validation_in_training_needs_no_shard_any_more(legality: Legality) -> None:
    assert sum("val_bpb" in line for line in legality.log) == 4


# Golden losses


def golden_losses(folder: Path) -> list[float]:
    """With every tuned number spelled out: a new default is no reason for a new file."""
    h = tiny(
        num_layers=3, iterations=20, matrix_lr=0.025, embed_lr=0.035, scalar_lr=0.025,
        decay_per_run=0.8, muon_momentum=0.99, muon_momentum_warmup_start=0.92,
        muon_momentum_warmup_steps=4, muon_beta2=0.95, beta1=0.9, beta2=0.95, adam_eps=1e-8,
        grad_clip_norm=0.3, warmdown_fraction=0.6, warmdown_iters=0, embed_init_std=0.005,
        qk_gain_init=1.5, rope_base=10_000.0, logit_softcap=30.0, logit_shift=0.0,
        logit_width=30.0, mlp_slope=0.0, seed=1337,
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
