"""QK norm, partial RoPE and gain as one Triton kernel each way: a candidate for train_gpt.py.

    python bench/heads.py                 # check against project_heads and time both, on one H100

In the whole step it was worth 2.1 ms of 69.5 (RESULTS.md).  It reads the packed projections and, in
backward, writes their gradient packed, so that one product each way serves q, k and v.
"""
from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
import triton.language as tl
from torch import Tensor

import train_gpt as tg

HEADS_ROWS = 32  # tokens a program; divides the sequence length


@tg.jit
def heads_kernel(  # noqa: PLR0913
    qkv, gain, rotary, q, k, v, dqkv, dgain, T, HALF: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr,
):
    """RMS norm, partial RoPE and gain for one head of ROWS tokens: from qkv to q and k.
    BACKWARD: from the gradients in q, k and v to dqkv and this program's part of dgain."""
    head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    dim = tl.arange(0, E)[None, :]
    raw = (token * (H + 2 * K) + head) * E
    if head >= H + K:  # values have a gradient, and nothing else to do
        tl.store(dqkv + raw + dim, tl.load(v + (token * K + head - H - K) * E + dim))
    else:
        if head < H:
            side = q + (token * H + head) * E
            scale = tl.load(gain + head).to(tl.float32)
        else:
            side = k + (token * K + head - H) * E
            scale = 1.0
        x = tl.load(qkv + raw + dim).to(tl.float32)
        scale *= tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / E + 1e-6)
        source = side if BACKWARD else qkv + raw
        rotated = dim < 2 * HALF
        partner = source + tl.where(dim < HALF, dim + HALF, dim - HALF)
        angle = rotary + token % T * HALF + dim % HALF
        sin = tl.load(angle + T * HALF, mask=rotated, other=0.0)
        sin = tl.where((dim < HALF) == BACKWARD, sin, -sin)  # the gradient turns back
        turned = (tl.load(source + dim).to(tl.float32) * tl.load(angle, mask=rotated, other=1.0)
                  + tl.load(partner, mask=rotated, other=0.0).to(tl.float32) * sin)
        if BACKWARD:
            share = tl.sum(turned * x, 1, keep_dims=True)
            square = tl.sum(x * x, 1, keep_dims=True) + E * 1e-6
            dx = (turned - x * (share / square)) * scale
            tl.store(dqkv + raw + dim, dx.to(dqkv.dtype.element_ty))
            if head < H:
                part = tl.sum(share * tl.rsqrt(square / E))
                tl.store(dgain + tl.program_id(0) * H + head, part)
        else:
            tl.store(side + dim, (turned * scale).to(q.dtype.element_ty))


def norm_rotate_outputs(qkv_MC: Tensor, gain_H: Tensor, rotary: Tensor, width: int,
                        grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    (M, C), H = qkv_MC.shape, len(gain_H)
    if grads:
        return qkv_MC.new_empty(M, C), rotary.new_empty(M // HEADS_ROWS, H)
    return qkv_MC.new_empty(M, H * width), qkv_MC.new_empty(M, (C - H * width) // 2)


@torch.library.custom_op("golf::norm_rotate", mutates_args=())
def norm_rotate(qkv_MC: Tensor, gain_H: Tensor, rotary: Tensor, width: int,
                grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """q (M, H*E) and k (M, K*E) from raw projections; E is `width`.  With `grads` of q, k and v:
    instead dqkv (M, C) and parts (M / HEADS_ROWS, H) whose sum is dgain."""
    H, (_, T, _, half) = len(gain_H), rotary.shape
    K = (qkv_MC.shape[1] // width - H) // 2
    outputs = norm_rotate_outputs(qkv_MC, gain_H, rotary, width, grads)
    dq, dk, dv = [g.contiguous() for g in grads] or (*outputs, qkv_MC)
    heads_kernel[(len(qkv_MC) // HEADS_ROWS, H + K * (2 if grads else 1))](
        qkv_MC, gain_H, rotary, dq, dk, dv, *outputs, T, half, H, K, width, HEADS_ROWS, bool(grads))
    return outputs


norm_rotate.register_fake(norm_rotate_outputs)


class FusedHeads(torch.autograd.Function):
    """`project_heads` with one product for the three projections, in backward too."""
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, w_CD: Tensor, gain_H: Tensor,
                rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv_MC = x_MD @ w_CD.T
        q, k = norm_rotate(qkv_MC, gain_H, rotary, x_MD.shape[1] // len(gain_H), [])
        ctx.save_for_backward(x_MD, w_CD, gain_H, rotary, qkv_MC)
        return q, k, qkv_MC[:, -k.shape[1]:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, w_CD, gain_H, rotary, qkv_MC = ctx.saved_tensors
        dqkv_MC, parts = norm_rotate(qkv_MC, gain_H, rotary, x_MD.shape[1] // len(gain_H),
                                     list(grads))
        return dqkv_MC @ w_CD, dqkv_MC.T @ x_MD, parts.sum(0).to(gain_H.dtype), None


def fused_heads(x_BTD: Tensor, w_CD: Tensor, gain_H: Tensor,
                rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, T, D = x_BTD.shape
    q, k, v = (y.view(B, T, -1, D // len(gain_H)) for y in FusedHeads.apply(
        x_BTD.flatten(0, 1), w_CD, gain_H, rotary))
    return q, k, v


def milliseconds(function: Any, x: Tensor, w: Tensor, gain: Tensor, rotary: Tensor) -> float:
    """Median of forward and backward, compiled, as a CUDA graph: launches do not count."""
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    leaves = [t.detach().requires_grad_() for t in (x, w, gain)]

    def both(_: Tensor) -> list[Tensor]:
        y = compiled(*leaves, rotary)
        return list(torch.autograd.grad(y, leaves, [torch.ones_like(t) for t in y]))

    both(x)
    replay = tg.capture(both, torch.zeros(1, device="cuda"))
    argument = torch.zeros(1, device="cuda")
    return triton.testing.do_bench(lambda: replay(argument), return_mode="median")


def main() -> None:
    h = tg.Hyperparameters.from_env(os.environ)
    torch._inductor.config.triton.mix_order_reduction = False
    rows = h.micro_batch_tokens // h.train_seq_len
    x = torch.randn(rows, h.train_seq_len, h.model_dim, device="cuda").bfloat16()
    w = torch.randn(h.model_dim + 2 * h.kv_dim, h.model_dim, device="cuda").mul(0.05).bfloat16()
    gain = torch.rand(h.num_heads, device="cuda").bfloat16()
    rotary = tg.rotary_table(h.train_seq_len, h.rope_dims, h.rope_base, x.device)
    for a, b in zip(fused_heads(x, w, gain, rotary), tg.project_heads(x, w, gain, rotary),
                    strict=True):
        print(f"relative difference {float((a - b).float().norm() / b.float().norm()):.1e}")
    for function in (fused_heads, tg.project_heads):
        ms = milliseconds(function, x, w, gain, rotary)
        print(f"{function.__name__:14s} {ms:6.3f} ms a layer, {h.num_layers * ms:6.2f} ms a step")


if __name__ == "__main__":
    main()
