"""What ranks cost: a step together against one rank's share alone, and whether losses agree.

    torchrun --standalone --nproc_per_node=8 bench/scaling.py [TIMED_STEPS]   # 20; 0: losses only

Three trainers, one after the other: all ranks together on the global batch; every rank by itself,
as if there were no others, on its share of that batch; and every rank by itself on all of it.  The
first and the last train the same 20 batches of the run, so their losses differ by rounding alone
(bfloat16 gradients, summed by ranks or by micro-batches).  All steps are on whole sequences, unlike
a run's first ones.  Times are medians of TIMED_STEPS steps in a row, host-side agreement on the
clock included.  On GPUs a trace of rank 0 then tells which kernels the ranks add, and how long none
runs.  Environment variables override hyperparameters as they do for train_gpt.py.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor

import step_time
import timing
import train_gpt as tg
from prepare_data import with_sample

COMPARED = 20  # first steps, whose losses are compared
RUN = 8000  # steps of a run, about
NO_KERNEL = "(no kernel runs)"


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

    def batch(self, number: int) -> Tensor:
        """This rank's rows of a batch."""
        local = self.trainer.layout.local
        first = self.runtime.rank * local
        tokens = self.plan.tokens(number, range(first, first + local))
        return torch.from_numpy(tokens).to(self.runtime.device)

    def step(self, tokens: Tensor, steps_done: int) -> Tensor:
        self.runtime.agree_on(steps_done)  # as the training loop does on its clock
        lr = tg.lr_warmup(self.h, steps_done + 1)
        return self.trainer.train_step(tokens, lr, self.h.decay_per_run / RUN)

    def losses(self) -> list[float]:
        """Of the run's first steps, so call it first."""
        return [float(self.step(self.batch(i), i)) for i in range(COMPARED)]

    def milliseconds(self, timed: int) -> float:
        """A step, on one batch."""
        return timing.milliseconds(self.one_step(), self.runtime.on_cuda, repeats=timed)

    def kernels(self) -> dict[str, float]:
        """Milliseconds a step by kernel, and in which none runs; empty on a CPU."""
        if not self.runtime.on_cuda:
            return {}
        traced = step_time.kernel_times(self.one_step())
        return {**traced["kernels"], NO_KERNEL: traced["idle"]}

    def one_step(self) -> Callable[[], Tensor]:
        tokens = self.batch(COMPARED)
        return lambda: self.step(tokens, COMPARED)

    def both(self, timed: int) -> dict[str, float]:
        """Milliseconds a step without and with late QAT, which is on from now on."""
        plain = self.milliseconds(timed)
        self.trainer.optimizer.start_late_qat(self.trainer.weight_bytes())
        return {"step": plain, "step, late QAT": self.milliseconds(timed)}


def on_all(value: float, ranks: int) -> list[float]:
    """`value` of every rank, by rank."""
    values: list[float] = [value] * ranks
    if ranks > 1:
        dist.all_gather_object(values, value)
    return values


def report_times(
    log: tg.RunLog,
    h: tg.Hyperparameters,
    together: dict[str, float],
    mine: dict[str, float],
    ranks: int,
) -> None:
    """together: milliseconds of all ranks; mine: of this rank alone on its share."""
    for kind, ms in together.items():
        alone = on_all(mine[kind], ranks)
        log(
            f"{kind}: {ms:.2f} ms on {ranks} ranks, {h.train_batch_tokens} tokens; "
            f"{h.train_batch_tokens // ranks} tokens on each rank alone: "
            f"{', '.join(f'{value:.2f}' for value in alone)} ms; "
            f"overhead over the slowest {ms - max(alone):+.2f} ms"
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
    together: dict[str, float] = {}
    mine: dict[str, float] = {}

    steps = Steps(h, runtime, kernels)
    losses = steps.losses()
    traces: list[dict[str, float]] = []
    if timed:
        traces.append(steps.kernels())
        together = steps.both(timed)
        del steps  # a trainer's CUDA graphs hold its memory
        gc.collect()
        runtime.agree_on(None)  # nobody is alone while others are still together
        share = dataclasses.replace(h, train_batch_tokens=h.train_batch_tokens // ranks)
        steps = Steps(share, alone, kernels)
        traces.append(steps.kernels())
        mine = steps.both(timed)
    del steps
    gc.collect()
    runtime.agree_on(None)
    expected = Steps(h, alone, kernels).losses()

    report_times(log, h, together, mine, ranks)
    if traces:
        report_kernels(log, *traces)
    report_losses(log, losses, expected, ranks)
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
