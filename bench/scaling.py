"""What ranks cost: a step together against one rank's share alone, and whether losses agree.

    torchrun --standalone --nproc_per_node=8 bench/scaling.py [TIMED_STEPS]   # 20; 0: losses only

Three trainers, one after the other: all ranks together on the global batch; every rank by itself,
as if there were no others, on its share of that batch; and every rank by itself on all of it.  The
first and the last train the same 20 steps of the run, so their losses differ by rounding alone
(bfloat16 gradients, summed by ranks or by micro-batches).  Times are wall clocks of TIMED_STEPS
steps in a row, host-side agreement on the clock included.  Environment variables override
hyperparameters as they do for train_gpt.py.
"""
from __future__ import annotations

import dataclasses
import gc
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

import train_gpt as tg
from prepare_data import with_sample

COMPARED, RUN = 20, 8000  # steps whose losses are compared, of a run of about so many
WARM = 3  # steps before a clock starts


def on_all(value: float, world: int) -> list[float]:
    """`value` of every rank, by rank."""
    values: list[float] = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


class Steps:
    """The run's steps, on the batches of its plan, under one runtime: together or alone."""

    def __init__(self, h: tg.Hyperparameters, runtime: tg.Runtime, kernels: tg.Kernels):
        self.h, self.runtime, self.trainer = h, runtime, tg.Trainer(h, runtime, kernels)
        self.plan = tg.BatchPlan(tg.open_split(h.data_path, "train"), h.train_seq_len,
                                 h.train_batch_tokens // h.train_seq_len, h.seed)
        self.trainer.warm_up(SimpleNamespace(warm_up=lambda model: None))  # nothing is scored

    def batch(self, number: int) -> torch.Tensor:
        """This rank's rows of a batch."""
        first = self.runtime.rank * self.trainer.local
        rows = range(first, first + self.trainer.local)
        return torch.from_numpy(self.plan.tokens(number, rows)).to(self.runtime.device)

    def step(self, tokens: torch.Tensor, number: int) -> torch.Tensor:
        self.runtime.agree_on(number)  # as the training loop does on its clock
        warmth = min(1.0, (number + 1) / max(1, self.h.lr_warmup_steps))
        return self.trainer.train_step(tokens, warmth, self.h.decay_per_run / RUN)

    def losses(self) -> list[float]:
        """Of the run's first steps, so call it first."""
        return [float(self.step(self.batch(i), i)) for i in range(COMPARED)]

    def milliseconds(self, timed: int) -> float:
        """Wall clock of a step, the mean of `timed` in a row."""
        tokens = self.batch(COMPARED)
        for i in range(WARM + timed):
            if i == WARM:
                synchronize(self.runtime)
                began = time.perf_counter()
            self.step(tokens, COMPARED + i)
        synchronize(self.runtime)
        return (time.perf_counter() - began) / timed * 1e3

    def both(self, timed: int) -> list[float]:
        """Milliseconds a step without and with late QAT, which is on from now on."""
        plain = self.milliseconds(timed)
        self.trainer.optimizer.start_qat(self.trainer.weight_bytes())
        return [plain, self.milliseconds(timed)]


def synchronize(runtime: tg.Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()


def main(timed: int) -> None:
    h = with_sample(tg.Hyperparameters.from_env(os.environ))
    runtime = tg.Runtime.start(h, os.environ)
    world, alone = runtime.world_size, dataclasses.replace(runtime, rank=0, world_size=1)
    log = tg.RunLog(Path(os.devnull) if runtime.rank == 0 else None)
    kernels = tg.choose_kernels(h, runtime, log)
    share = dataclasses.replace(h, train_batch_tokens=h.train_batch_tokens // world)
    steps = Steps(h, runtime, kernels)
    losses, together = steps.losses(), steps.both(timed) if timed else []
    mine: list[float] = []
    for alone_h in (share, h) if timed else (h,):
        del steps  # a trainer's CUDA graphs hold its memory
        gc.collect()
        runtime.agree_on(None)  # nobody is alone while others are still together
        steps = Steps(alone_h, alone, kernels)
        mine = mine or (steps.both(timed) if timed else [])
    expected = steps.losses()
    apart = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    for i, late in enumerate(("", ", late QAT") if timed else ()):
        shares = on_all(mine[i], world)
        log(f"step{late}: {together[i]:.2f} ms on {world} ranks, {h.train_batch_tokens} tokens; "
            f"{share.train_batch_tokens} tokens on each rank alone: "
            f"{', '.join(f'{ms:.2f}' for ms in shares)} ms; "
            f"overhead over the slowest {together[i] - max(shares):+.2f} ms")
    for i, (a, b) in enumerate(zip(losses, expected, strict=True), 1):
        log(f"loss of step {i}: {world} ranks {a:.5f}, one rank {b:.5f}, {a - b:+.5f}")
    log(f"largest difference of {COMPARED} losses: {apart:.5f} nats")
    if runtime.device.type == "cuda":
        log(f"peak memory: {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
    except tg.RunError as error:
        sys.exit(f"error: {error}")
