"""Three ways to round a trained model to the same bytes: nearest, GPTQ, steps by sensitivity.

    DATA_PATH=... TOKENIZER_PATH=... python bench/rounding.py final_model.pt nearest,gptq 0.0058
    ... python bench/rounding.py final_model.pt nearest,fisher 0.0058 [WINDOWS] [SCORED]

The third argument is grid steps, with commas between them.  Calibration takes WINDOWS (16) training
windows, scoring SCORED (24) validation windows spread over the split, enough for differences
because all ways meet the same tokens; minutes on two CPU cores.
STAGE=trained rounds the last iterate instead of the average, STAGE=blended what ships.  Both lose
little on the very grid step that late QAT had, which the run's log tells (docs/ABLATIONS.md).
For `fisher` the grid steps of rows are rescaled until the entropy is that of `nearest` at the grid
step given.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
import train_gpt as tg

Weights = dict[str, Tensor]
WAYS = ("nearest", "gptq", "fisher")
BLOCK = 128  # columns whose errors GPTQ carries to the far columns at once

# Bank -> what its matrices of the first role read, and those of the second.
INPUTS = {
    "qo_bank": ("heads", "out"),
    "kv_bank": ("heads", "heads"),
    "mlp_bank": ("up", "down"),
}


class Rounded(NamedTuple):
    """Weights on a grid, and what they take."""

    weights: Weights
    size: float  # bytes of the codes' entropy


def gptq(w_NRC: Tensor, scale_NRC: Tensor, qmax: Tensor, moments_NCC: Tensor) -> Tensor:
    """Codes (N, R, C) of w on the grid of `scale`, column by column.

    What rounding adds to the outputs is taken back by the columns that follow (Frantar et al.,
    GPTQ, 2022).  `moments` are the second moments of the inputs; 1 % of their mean diagonal is
    added.
    """
    columns = w_NRC.shape[-1]
    damping = 0.01 * moments_NCC.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-12
    damped = moments_NCC + damping * torch.eye(columns, device=w_NRC.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    w = w_NRC.clone()
    codes = torch.empty_like(w)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.empty_like(w[..., start:end])
        for j in range(start, end):
            column = w[..., j : j + 1]
            scale = scale_NRC[..., j : j + 1]
            code = tg.encode(column, scale, qmax)
            error = (column - code * scale) / upper[:, j : j + 1, j : j + 1]
            w[..., j:end] -= error * upper[:, j : j + 1, j:end]
            codes[..., j : j + 1] = code
            errors[..., j - start : j - start + 1] = error
        w[..., end:] -= errors @ upper[:, start:end, end:]
    return codes


def input_moments(h: tg.Hyperparameters, weights: Weights, windows: Tensor) -> Weights:
    """Second moments (L, C, C), summed over tokens, of what each product reads.

    `heads` is for q, k and v; the others are `out`, `up` and `down`.
    """
    sums: dict[str, list[Tensor]] = {name: [] for name in ("heads", "out", "up", "down")}
    layer = -1
    real_linear = F.linear

    def add(name: str, x: Tensor) -> None:
        gram = x.flatten(0, -2).T @ x.flatten(0, -2)
        if len(sums[name]) <= layer:
            sums[name].append(torch.zeros_like(gram))
        sums[name][layer] += gram

    def heads(x: Tensor, w: Tensor, gain: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal layer
        layer += 1
        add("heads", x)
        return tg.project_heads(x, w, gain, rotary)

    def linear(x: Tensor, w: Tensor) -> Tensor:
        if x.ndim == 3 and w.shape == (h.model_dim, h.model_dim):
            add("out", x)
        return real_linear(x, w)

    def mlp(x: Tensor, up: Tensor, down: Tensor, scale: float, slope: float) -> Tensor:
        x = tg.rms_norm(x) * scale
        post = F.leaky_relu(real_linear(x, up), slope).square()
        add("up", x)
        add("down", post)
        return post @ down

    model = tg.GPT(h, weights, tg.Kernels(heads=heads, mlp=mlp))
    F.linear = linear  # type: ignore[assignment]
    try:
        with torch.no_grad():
            for window in windows:
                layer = -1
                model.final_hidden(window[None, :-1])
    finally:
        F.linear = real_linear
    return {name: torch.stack(grams) for name, grams in sums.items()}


def squared_gradients(h: tg.Hyperparameters, weights: Weights, windows: Tensor) -> Weights:
    """Mean over windows of the squared gradient of a window's mean loss, by parameter."""
    model = tg.GPT(h, weights, tg.Kernels())
    names, parameters = zip(*model.named_parameters(), strict=True)
    means = [torch.zeros_like(p) for p in parameters]
    for window in windows:
        loss = model(window[None, :-1], window[None, 1:]).mean()
        gradients = torch.autograd.grad(loss, parameters)
        for mean, gradient in zip(means, gradients, strict=True):
            mean += gradient.square() / len(windows)
    return dict(zip(names, means, strict=True))


def on_grid(
    h: tg.Hyperparameters,
    weights: Weights,
    grid_step: float,
    change: Callable[[str, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Rounded:
    """Rounds as shipped, but for the banks of `INPUTS`.

    change: from name, int8 codes, scales and qmax of a bank to other codes and scales.
    """
    state = {}
    size = 0.0
    for name, codes, scales in tg.quantized_tensors(weights, h, grid_step):
        if name in INPUTS:
            qmax, _ = tg.export_grids(h)[name].tensors(codes.device)
            codes, scales = change(name, codes, scales, qmax)
        state[name] = tg.dequantize(codes, scales).view(weights[name].shape)
        size += tg.entropy_bits(codes) / 8
    return Rounded(state, size)


def nearest(h: tg.Hyperparameters, weights: Weights, grid_step: float) -> Rounded:
    """As shipped."""
    return on_grid(h, weights, grid_step, lambda name, codes, scales, qmax: (codes, scales))


def by_gptq(h: tg.Hyperparameters, weights: Weights, grid_step: float, moments: Weights) -> Rounded:
    """The same grid with error feedback; `moments` from `input_moments`."""

    def change(name: str, codes: Tensor, scales: Tensor, qmax: Tensor) -> tuple[Tensor, Tensor]:
        w = weights[name]
        parts = zip(
            INPUTS[name], w.chunk(2), scales.expand_as(w).chunk(2), qmax.chunk(2), strict=True
        )
        found = []
        for inputs, matrices, scale, highest in parts:
            if inputs == "down":  # stored transposed: its inputs are its rows
                found.append(gptq(matrices.mT, scale.mT, highest, moments[inputs]).mT)
            else:
                found.append(gptq(matrices, scale, highest, moments[inputs]))
        return torch.cat(found).to(torch.int8), scales

    return on_grid(h, weights, grid_step, change)


def by_fisher(h: tg.Hyperparameters, weights: Weights, size: float, fisher: Weights) -> Rounded:
    """Banks on grid steps of their own, at an entropy of `size` bytes; tables as shipped.

    A row's grid step goes with the fourth root of its mean squared gradient, which is in `fisher`.
    """

    def attempt(grid_step: float) -> Rounded:
        def change(name: str, codes: Tensor, scales: Tensor, qmax: Tensor) -> tuple[Tensor, Tensor]:
            row = fisher[name].mean(-1, keepdim=True)
            whole = row.mean(1, keepdim=True)
            relative = whole.rsqrt() * (whole / (row + 0.02 * whole)).sqrt().sqrt()
            relative = relative / fisher["mlp_bank"].mean().rsqrt()
            widest = weights[name].abs().amax(-1, keepdim=True)
            scales = torch.maximum(relative * grid_step, 0.9 * widest / qmax)
            return tg.encode(weights[name], scales, qmax).to(torch.int8), scales

        return on_grid(h, weights, grid_step, change)

    return attempt(tg.fit_grid_step(lambda grid_step: attempt(grid_step).size, size))


class Validation:
    """Windows spread over the validation split, on which weights are scored."""

    def __init__(self, h: tg.Hyperparameters, count: int):
        self.h = h
        tokens = tg.Evaluator.open(h, tg.Runtime(torch.device("cpu"))).tokens
        distance = (len(tokens) - h.train_seq_len - 1) // count
        tg.require(distance > 0, f"SCORED={count}: the validation split has fewer; lower it")
        self.windows = tokens.unfold(0, h.train_seq_len + 1, distance)[:count].long()
        table = tg.load_byte_table(h.tokenizer_path, h.vocab_size)
        self.text_bytes = sum(table.count(window.numpy()) for window in self.windows)

    @torch.no_grad()
    def bpb(self, weights: Weights) -> float:
        model = tg.GPT(self.h, weights, tg.Kernels())
        nats = [model(w[None, :-1], w[None, 1:]).double().sum() for w in self.windows]
        return float(torch.stack(nats).sum()) / math.log(2) / self.text_bytes


def main(
    path: str, ways: list[str], grid_steps: list[float], calibration: int, scored: int, stage: str
) -> None:
    h, (stages, facts) = checkpoint.load(path, os.environ)
    stages = tg.with_blend(stages, h, facts.grid_step)
    tg.require(stage in stages, f"STAGE={stage}: {path} has {', '.join(stages)}; set one of them")
    weights = stages[stage]
    plan = tg.BatchPlan(tg.open_split(h.data_path, "train"), h.train_seq_len, calibration, 1)
    windows = torch.from_numpy(plan.tokens(0, range(calibration)))
    validation = Validation(h, scored)

    floating = validation.bpb(weights)
    print(f"{stage}, float: {floating:.5f} bpb on {scored} windows")
    moments = input_moments(h, weights, windows) if "gptq" in ways else {}
    fisher = squared_gradients(h, weights, windows) if "fisher" in ways else {}
    for grid_step in grid_steps:
        plain = nearest(h, weights, grid_step)
        for way in ways:
            found = plain
            if way == "gptq":
                found = by_gptq(h, weights, grid_step, moments)
            elif way == "fisher":
                found = by_fisher(h, weights, plain.size, fisher)
            print(
                f"grid_step {grid_step:g} {way:8s} entropy {found.size:12,.0f} bytes, "
                f"{validation.bpb(weights | found.weights) - floating:+.5f} bpb",
                flush=True,
            )


def ways_in(text: str) -> list[str]:
    ways = text.split(",")
    if not set(ways) <= set(WAYS):
        raise argparse.ArgumentTypeError(f"{text!r}: choose of {', '.join(WAYS)}")
    return ways


def grid_steps_in(text: str) -> list[float]:
    grid_steps = [float(part) for part in text.split(",")]
    if not all(0 < grid_step < math.inf for grid_step in grid_steps):
        raise argparse.ArgumentTypeError(f"{text!r}: expected grid steps above 0")
    return grid_steps


def count_in(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 or more windows")
    return int(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="final_model.pt")
    parser.add_argument("ways", type=ways_in, help=f"of {', '.join(WAYS)}, with commas between")
    parser.add_argument("grid_steps", type=grid_steps_in, help="with commas between")
    parser.add_argument(
        "calibration", type=count_in, nargs="?", default=16, help="training windows"
    )
    parser.add_argument("scored", type=count_in, nargs="?", default=24, help="validation windows")
    arguments = parser.parse_args()
    try:
        main(**vars(arguments), stage=os.environ.get("STAGE", "averaged"))
    except tg.RunError as error:
        sys.exit(f"error: {error}")
