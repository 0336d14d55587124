"""Every attention kernel that imports: checked against float32 math, then timed.

    python bench/attention.py [SEQUENCES]        # seconds on one H100; a CPU takes 1 sequence

Shapes are the model's (48 x 2048 tokens, 4 query heads, 2 key/value heads of width 128) unless
environment variables override the hyperparameters.  TFLOP/s counts the causal half: 2 products
forward and 5 backward of 2 * B * H * T^2 / 2 * E operations each.
"""
from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import train_gpt as tg


def flex(h: tg.Hyperparameters, runtime: tg.Runtime) -> tg.Attend:
    """FlexAttention with a causal block mask; compiled on CUDA, plain math on a CPU."""
    length = h.train_seq_len
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length,
                             device=runtime.device.type)
    kernel = runtime.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return kernel(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return attend


def run(attend: tg.Attend, tensors: list[Tensor]) -> list[Tensor]:
    """Output and the gradients of q, k, v."""
    q, k, v = (t.detach().requires_grad_() for t in tensors[:3])
    y = attend(q, k, v)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), tensors[3].to(y.dtype))]


def milliseconds(function: Callable[[], object], runtime: tg.Runtime) -> float:
    """Median of ten calls on a synchronised clock, after three warm ones."""
    times = []
    for i in range(13):
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 3:
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def main(sequences: int) -> None:
    h = tg.Hyperparameters.from_env(os.environ)
    runtime = tg.Runtime.start(h, {})
    cuda = runtime.device.type == "cuda"
    candidates = tg.attention_candidates() if cuda else {"sdpa": tg.sdpa()}
    candidates["flex"] = flex(h, runtime)
    generator = torch.Generator(runtime.device).manual_seed(0)

    def inputs(count: int) -> list[Tensor]:
        heads = (h.num_heads, h.num_kv_heads, h.num_kv_heads, h.num_heads)
        return [torch.randn(count, h.train_seq_len, n, h.head_dim, generator=generator,
                            device=runtime.device).to(runtime.dtype) for n in heads]

    small, full = inputs(1), inputs(sequences)
    exact = run(tg.sdpa(SDPBackend.MATH), [t.float() for t in small])
    product = sequences * h.num_heads * h.train_seq_len**2 * h.head_dim / 1e9  # GFLOP, causal
    print(f"{'kernel':8s} {'error':>9s} {'forward':>10s} {'fwd+bwd':>10s} {'TFLOP/s':>16s}")
    for name, attend in candidates.items():
        try:
            pairs = zip(run(attend, small), exact, strict=True)
            error = max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)
            with torch.no_grad():
                forward = milliseconds(lambda f=attend: f(*full[:3]), runtime)
            both = milliseconds(lambda f=attend: run(f, full), runtime)
        except Exception as problem:  # a kernel that this machine cannot run is a row as well
            print(f"{name:8s} refused: {type(problem).__name__}: {str(problem)[:80]}")
            continue
        rates = f"{2 * product / forward:6.1f} / {7 * product / both:6.1f}"
        print(f"{name:8s} {error:9.1e} {forward:7.2f} ms {both:7.2f} ms {rates:>16s}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 48)
