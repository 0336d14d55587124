"""Every attention kernel that imports: checked against float32 math, then timed.

    python bench/attention.py [SEQUENCES]        # seconds on one H100; a CPU takes 1 sequence

Shapes are the model's (48 x 2048 tokens, 4 query heads, 2 key/value heads of width 128) unless
environment variables override the hyperparameters; TRAIN_SEQ_LEN=1024 times the short sequences of
the first half of a run.  The error is the one by which train_gpt.py refuses a kernel: the largest
relative one of output and gradients in bfloat16.  TFLOP/s counts the causal half: 2 products
forward and 5 backward of 2 * B * H * T^2 / 2 * E operations each.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import timing
import train_gpt as tg


def flex(h: tg.Hyperparameters, runtime: tg.Runtime) -> tg.Attend:
    """FlexAttention with a causal block mask; compiled on CUDA, plain math on a CPU."""
    length = h.train_seq_len

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    mask = create_block_mask(causal, None, None, length, length, device=runtime.device.type)
    kernel = runtime.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return kernel(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return attend


def random_heads(h: tg.Hyperparameters, runtime: tg.Runtime, sequences: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, (B, T, heads, E)."""
    generator = torch.Generator(runtime.device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        shape = (sequences, h.train_seq_len, heads, h.head_dim)
        values = torch.randn(shape, generator=generator, device=runtime.device)
        return values.to(runtime.dtype)

    return [normal(n) for n in (h.num_heads, h.num_kv_heads, h.num_kv_heads, h.num_heads)]


def row(
    h: tg.Hyperparameters, runtime: tg.Runtime, name: str, attend: tg.Attend, inputs: list[Tensor]
) -> str:
    """Error and times of one kernel."""
    q, k, v = (tensor.requires_grad_() for tensor in inputs[:3])
    dy = inputs[3]

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(q, k, v), (q, k, v), dy)

    error = tg.attention_error(h, attend, runtime.device)
    forward_ms = timing.milliseconds(forward, runtime.on_cuda, repeats=10)
    both_ms = timing.milliseconds(forward_backward, runtime.on_cuda, repeats=10)
    product = len(q) * h.num_heads * h.train_seq_len**2 * h.head_dim / 1e9  # GFLOP, causal
    rates = f"{2 * product / forward_ms:6.1f} / {7 * product / both_ms:6.1f}"
    return f"{name:8s} {error:9.1e} {forward_ms:7.2f} ms {both_ms:7.2f} ms {rates:>16s}"


def main(sequences: int) -> None:
    h = tg.Hyperparameters.from_env(os.environ | {"EARLY_FRACTION": "0"})  # one length
    runtime = tg.Runtime.start(h, {})
    candidates = tg.attention_candidates() if runtime.on_cuda else {"sdpa": tg.sdpa()}
    candidates["flex"] = flex(h, runtime)
    inputs = random_heads(h, runtime, sequences)
    print(f"{'kernel':8s} {'error':>9s} {'forward':>10s} {'fwd+bwd':>10s} {'TFLOP/s':>16s}")
    for name, attend in candidates.items():
        try:
            line = row(h, runtime, name, attend, inputs)
        except Exception as problem:  # a kernel that this machine cannot run is a row as well
            line = f"{name:8s} refused: {type(problem).__name__}: {str(problem)[:80]}"
        print(line, flush=True)


if __name__ == "__main__":
    try:
        count = sys.argv[1] if len(sys.argv) > 1 else "48"
        tg.require(count.isdecimal() and int(count) > 0, f"SEQUENCES={count}: expected 1 or more")
        main(int(count))
    except tg.RunError as error:
        sys.exit(f"error: {error}")
