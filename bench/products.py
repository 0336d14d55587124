"""The MLP's products with a squared activation, tile by tile, beside the same products in cuBLAS.

    python bench/products.py        # about a minute on one H100; each tiling compiles twice

Forward is leaky_relu(x up^T)^2, backward dy down^T times the derivative; cuBLAS does the product
alone.  Shapes are the card's (98,304 tokens, 512 x 2048) unless environment variables override the
hyperparameters.  The first tiling is the one in train_gpt.py; a row says so where another tiling
gives other bits.

Why tiles matter here: the product is short, 8 steps of depth 64.  What follows it, in backward with
four waits for `post`, takes as long as the product itself.  Where a processor holds two programs,
one computes while the other waits.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import timing
import train_gpt as tg

SHARED_BYTES = 227 * 1024  # of a processor of an H100, for all programs that it holds

TILINGS = (
    tg.RELU2_TILING,
    tg.Tiling(256, 128, 64, warps=8, stages=4, programs=1),
    tg.Tiling(256, 128, 64, warps=8, stages=3, programs=1),
    tg.Tiling(128, 256, 64, warps=8, stages=4, programs=1),
    tg.Tiling(128, 256, 64, warps=8, stages=3, programs=1),
    tg.Tiling(128, 128, 64, warps=4, stages=3, programs=2),
    tg.Tiling(128, 128, 64, warps=4, stages=2, programs=2),
    tg.Tiling(128, 128, 32, warps=4, stages=4, programs=2),
    tg.Tiling(64, 256, 64, warps=4, stages=2, programs=2),
)


def shared_bytes(tiling: tg.Tiling) -> int:
    """Of one program in bfloat16: stages of both inputs, a quarter of post and of the output.

    Loads and stores that are still under way need some more.
    """
    inputs = tiling.stages * (tiling.rows + tiling.columns) * tiling.depth
    return 2 * (inputs + 2 * tiling.rows * tiling.columns // 4)


def random(h: tg.Hyperparameters) -> list[Tensor]:
    """x, weights and scale, of the sizes that training has."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    rows = h.micro_batch_tokens
    weights = normal(h.mlp_hidden, h.model_dim) / h.model_dim**0.5
    return [normal(rows, h.model_dim).bfloat16(), weights.bfloat16(), 0.5 + normal(rows).abs()]


def main() -> None:
    tg.require(torch.cuda.is_available(), "no GPU: there is nothing to time")
    h = tg.Hyperparameters.from_env(os.environ)
    a, b, scale = random(h)
    post = tg.linear_relu2(a, b, scale, h.mlp_slope)
    passes = (
        ("forward", None, post),
        ("backward", post, tg.linear_relu2(a, b, scale, h.mlp_slope, post)),
    )
    cublas = 1e3 * timing.milliseconds(lambda: a @ b.T, on_cuda=True)
    print(f"{torch.cuda.get_device_name()}: cuBLAS, the product alone {cublas:.0f} us")
    for tiling in TILINGS:
        words = []
        tg.RELU2_TILING = tiling
        for name, given, expected in passes:
            run = functools.partial(tg.linear_relu2, a, b, scale, h.mlp_slope, given)
            try:
                same = torch.equal(run(), expected)
                us = 1e3 * timing.milliseconds(run, on_cuda=True)
                words.append(f"{name} {us:4.0f} us{'' if same else ' (other bits)'}")
            except Exception as problem:  # one that does not fit is a row as well
                words.append(f"{name} refused: {type(problem).__name__}")
        print(*tiling, *words, sep="  ", flush=True)


if __name__ == "__main__":
    try:
        main()
    except tg.RunError as error:
        sys.exit(f"error: {error}")
