"""A few optimizer steps on this process's share of every batch, everything of interest saved.

torchrun --standalone --nproc_per_node=N tests/ranks.py OUT.pt     (or `results` in one process)
"""

import os
import sys
from typing import Any

import numpy as np
import torch
from support import byte_table, in_float64, tiny, tiny_model, train_gpt

PLAIN_STEPS, QAT_STEPS, SEQUENCES = 20, 2, 6  # which 1, 2 and 3 ranks divide
LAYOUT: dict[str, int] = dict(  # 8 matrices a bank and 1 of ve_proj: padded over 3 ranks
    train_batch_tokens=SEQUENCES * 32, micro_batch_tokens=SEQUENCES * 32, early_seq_len=16
)


def tokens_of(step: int, vocab_size: int) -> torch.Tensor:
    """Learnable rows: each counts up by its own stride."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(2, vocab_size, (SEQUENCES, 1), generator=generator)
    stride = torch.randint(1, 4, (SEQUENCES, 1), generator=generator)
    return 2 + (start + stride * torch.arange(33)) % (vocab_size - 2)


def evaluate(runtime: train_gpt.Runtime) -> dict[str, Any]:
    """Sums and per-token losses of a split in float64, plain and sliding."""
    h = tiny(eval_dump="kept")
    tokens = np.random.default_rng(0).integers(1, h.vocab_size, 13 * h.train_seq_len + 5)
    table = byte_table(h.vocab_size)
    with in_float64():
        evaluator = train_gpt.Evaluator(h, runtime, tokens.astype(np.uint16), table)
        model = tiny_model(h, torch.float64)
        nats = [evaluator.score(model, s, train_gpt.RunLog(None)).nats for s in (0, h.eval_stride)]
    return {"nats": nats, "dump": {k: torch.from_numpy(v) for k, v in evaluator.dump.items()}}


def results(runtime: train_gpt.Runtime) -> dict[str, Any]:
    """Losses of all steps and the whole tensors that they leave."""
    h = tiny(**LAYOUT)
    trainer = train_gpt.Trainer(h, runtime, train_gpt.Kernels())
    optimizer = trainer.optimizer
    local = trainer.layout.local
    mine = slice(runtime.rank * local, (runtime.rank + 1) * local)
    losses, lengths = [], []

    def step(number: int) -> None:
        tokens = tokens_of(number, h.vocab_size)[mine]
        trainer.seq_len = train_gpt.seq_len_at(h, number / PLAIN_STEPS)
        lengths.append(trainer.seq_len)
        losses.append(float(trainer.train_step(tokens, 0.5)))

    def state() -> list[torch.Tensor]:
        return [
            t.detach().clone() for t in (*trainer.model.parameters(), *optimizer.masters().values())
        ]

    for number in range(PLAIN_STEPS):
        step(number)
        trainer.average.update(optimizer.masters())
    out: dict[str, Any] = {
        "lengths": lengths,
        "masters": optimizer.gather(optimizer.masters()),
        "averaged": optimizer.gather(trainer.average.mean),
        "working": {n: p.detach().clone() for n, p in trainer.model.named_parameters()},
        "padding": max(b.padded.shape[0] - b.parameter.shape[0] for b in optimizer.banks),
    }
    out |= evaluate(runtime)
    restore, before = optimizer.snapshot(), state()
    step(PLAIN_STEPS)
    losses.pop()
    restore()
    out["restored"] = all(map(torch.equal, before, state()))
    out["grid_step"] = optimizer.start_late_qat(6000.0)
    for number in range(PLAIN_STEPS, PLAIN_STEPS + QAT_STEPS):
        step(number)
    return out | {"losses": losses, "qat_masters": optimizer.gather(optimizer.masters())}


def main() -> None:
    h = tiny(**LAYOUT)
    runtime = train_gpt.Runtime.start(h, os.environ)
    mine = results(runtime)
    if runtime.rank == 0:
        torch.save(mine, sys.argv[1])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
