"""What ranks cost: a step together against one rank's share alone, and whether losses agree.

    torchrun --standalone --nproc_per_node=8 bench/scaling.py [TIMED_STEPS]   # 20; 0: losses only

Three trainers: all ranks together on the global batch; every rank by itself, as if there were no
others, on its share of that batch; and every rank by itself on all of it.  The first and the last
train the same 20 batches of the run, so their losses differ by rounding alone (bfloat16 gradients,
summed by ranks or by micro-batches).  All steps are on whole sequences, unlike a run's first ones.

The first two are timed in turn, ROUNDS times each: a GPU that warms up slows down by more than
ranks cost (67.5 to 69.6 ms within seconds, docs/RESULTS.md).  Timed steps have the same tokens of
the rank and move no weight, so that together and alone the values are alike: near its power limit
a GPU's clock may depend on what it multiplies.  A time is the median of TIMED_STEPS steps in a row,
host-side agreement on the clock included.  On GPUs a trace of rank 0 then tells which kernels the
ranks add, and how long none runs.  Environment variables override hyperparameters as they do for
train_gpt.py.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor

import step_time
import timing
import train_gpt as tg
from prepare_data import with_sample

COMPARED = 20  # first steps, whose losses are compared
ROUNDS = 5  # times in turn
RUN = 8000  # steps of a run, about
NO_KERNEL = "(no kernel runs)"


class Times(NamedTuple):
    """Milliseconds of one rank."""

    step: float
    update: float  # of that, the optimizer with its collectives and the wait for slower ranks


class Steps:
    """The run's steps, on the batches of its plan, under one runtime: together or alone."""

    def __init__(self, h: tg.Hyperparameters, runtime: tg.Runtime, kernels: tg.Kernels):
        self.h = h
        self.runtime = runtime
        self.trainer = tg.Trainer(h, runtime, kernels)
        shards = tg.open_split(h.data_path, "train")
        self.plan = tg.BatchPlan(shards, h.train_seq_len, self.trainer.layout.sequences, h.seed)
        no_evaluation = SimpleNamespace(warm_up=lambda model: None)
        self.trainer.warm_up(no_evaluation)  # type: ignore[arg-type]
        self.pending = tg.PendingLosses(tg.Clock(runtime), lambda *_: None)
        self.updates: list[timing.Mark] = []  # when the update of each step began
        update = self.trainer.update

        def marked_update(sums: list[Tensor]) -> Tensor:
            self.updates.append(timing.now(runtime.on_cuda))
            return update(sums)

        self.trainer.update = marked_update  # type: ignore[method-assign]

    def batch(self, number: int) -> Tensor:
        """This rank's rows of a batch."""
        local = self.trainer.layout.local
        first = self.runtime.rank * local
        tokens = self.plan.tokens(number, range(first, first + local))
        return torch.from_numpy(tokens).to(self.runtime.device)

    def step(self, tokens: Tensor, number: int, lr: float, decay: float) -> Tensor:
        """As the training loop does it: agrees on the clock, and is two steps ahead at most."""
        self.runtime.agree_on(number)
        loss = self.trainer.train_step(tokens, lr, decay)
        self.pending.push(number, loss)
        return loss

    def losses(self) -> list[float]:
        """Of the run's first steps, so call it first."""
        found = []
        for i in range(COMPARED):
            lr = tg.lr_warmup(self.h, i + 1)
            found.append(float(self.step(self.batch(i), i, lr, self.h.decay_per_run / RUN)))
        return found

    def still_step(self, tokens: Tensor) -> Callable[[], Tensor]:
        """A step that moves no weight, so that every one has the same values to compute."""
        return lambda: self.step(tokens, COMPARED, 0.0, 0.0)

    def times(self, tokens: Tensor, timed: int) -> Times:
        """Of `timed` steps in a row on these tokens; the medians."""
        on_cuda = self.runtime.on_cuda
        ends = timing.ends(self.still_step(tokens), on_cuda, repeats=timed)
        updates = self.updates[-timed:]
        self.updates.clear()
        return Times(
            step=timing.median_between(ends, ends[1:]),
            update=timing.median_between(updates, ends[1:]),
        )

    def kernels(self, tokens: Tensor) -> dict[str, float]:
        """Milliseconds a step by kernel, and in which none runs; empty on a CPU."""
        if not self.runtime.on_cuda:
            return {}
        traced = step_time.kernel_times(self.still_step(tokens))
        return {**traced["kernels"], NO_KERNEL: traced["idle"]}

    def start_late_qat(self) -> None:
        self.trainer.optimizer.start_late_qat(self.trainer.weight_bytes())


def on_all(value: Times, ranks: int) -> list[Times]:
    """`value` of every rank, by rank."""
    values = [value] * ranks
    if ranks > 1:
        dist.all_gather_object(values, value)
    return values


class Round(NamedTuple):
    """All ranks together, then each alone, by rank."""

    together: list[Times]
    alone: list[Times]

    @property
    def slowest(self) -> int:
        """The rank that the others wait for when together, so that it waits for none."""
        return max(range(len(self.alone)), key=lambda rank: self.alone[rank].step)

    @property
    def overhead(self) -> Times:
        """What the slowest rank takes more when together, in the whole step and in its update."""
        together, alone = self.together[self.slowest], self.alone[self.slowest]
        return Times(together.step - alone.step, together.update - alone.update)


def timed_in_turn(together: Steps, alone: Steps, batch: Tensor, timed: int) -> list[Round]:
    """Rounds of `timed` steps each on this rank's rows, first all ranks together, then each alone.

    Nobody is alone while others are still together: the ranks wait for each other in between.
    """
    runtime = together.runtime
    rounds = []
    for _ in range(ROUNDS):
        ours = together.times(batch, timed)
        runtime.agree_on(None)
        mine = alone.times(batch, timed)
        rounds.append(Round(on_all(ours, runtime.world_size), on_all(mine, runtime.world_size)))
    return rounds


def report_times(log: tg.RunLog, kind: str, rounds: Sequence[Round], tokens: int) -> None:
    """tokens: of a step together.  The overhead is that of the middle round, with its range."""
    ranks = len(rounds[0].alone)
    together = statistics.median(r.together[r.slowest].step for r in rounds)
    alone = [statistics.median(r.alone[rank].step for r in rounds) for rank in range(ranks)]
    overheads = sorted((r.overhead for r in rounds), key=lambda overhead: overhead.step)
    middle = overheads[len(overheads) // 2]
    log(
        f"{kind}: {together:.2f} ms on {ranks} ranks, {tokens} tokens; {tokens // ranks} tokens on "
        f"each rank alone: {', '.join(f'{ms:.2f}' for ms in alone)} ms; overhead over the slowest, "
        f"{len(rounds)} times in turn: {middle.step:+.2f} ms ({overheads[0].step:+.2f} to "
        f"{overheads[-1].step:+.2f}), {middle.update:+.2f} of it in the update"
    )


def report_kernels(log: tg.RunLog, together: dict[str, float], alone: dict[str, float]) -> None:
    """The kernels, most first, that a step together spends more or less on; ms a step by name."""
    more = {name: together.get(name, 0.0) - alone.get(name, 0.0) for name in together | alone}
    for name in sorted(more, key=lambda name: -abs(more[name]))[:16]:
        log(f"{more[name]:+7.3f} ms  {together.get(name, 0.0):7.3f} together  {name[:90]}")


def report_losses(log: tg.RunLog, losses: list[float], expected: list[float], ranks: int) -> None:
    pairs = list(zip(losses, expected, strict=True))
    for step, (found, one) in enumerate(pairs, 1):
        log(
            f"loss of step {step}: {ranks} ranks {found:.5f}, one rank {one:.5f}, "
            f"{found - one:+.5f}"
        )
    apart = max(abs(found - one) for found, one in pairs)
    log(f"largest difference of {COMPARED} losses: {apart:.5f} nats")


def main(timed: int) -> None:
    h = with_sample(tg.Hyperparameters.from_env(os.environ))
    runtime = tg.Runtime.start(h, os.environ)
    ranks = runtime.world_size
    alone = dataclasses.replace(runtime, rank=0, world_size=1)
    log = tg.RunLog(Path(os.devnull) if runtime.rank == 0 else None)
    kernels = tg.choose_kernels(h, runtime, log)

    together = Steps(h, runtime, kernels)
    losses = together.losses()
    if timed:
        share = dataclasses.replace(h, train_batch_tokens=h.train_batch_tokens // ranks)
        mine = Steps(share, alone, kernels)
        mine.losses()  # weights as those of the ranks together, from as many steps
        tokens = h.train_batch_tokens
        batch = together.batch(COMPARED)
        report_times(log, "step", timed_in_turn(together, mine, batch, timed), tokens)
        traces = together.kernels(batch), mine.kernels(batch)
        together.start_late_qat()
        mine.start_late_qat()
        report_times(log, "step, late QAT", timed_in_turn(together, mine, batch, timed), tokens)
        report_kernels(log, *traces)
        del mine
    del together  # a trainer's CUDA graphs hold its memory
    gc.collect()
    report_losses(log, losses, Steps(h, alone, kernels).losses(), ranks)
    if runtime.on_cuda:
        log(f"peak memory: {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        count = sys.argv[1] if len(sys.argv) > 1 else "20"
        tg.require(count.isdecimal(), f"TIMED_STEPS={count}: expected a whole number")
        main(int(count))
    except tg.RunError as error:
        sys.exit(f"error: {error}")
