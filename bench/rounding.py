"""Three ways to round a trained model to the same bytes: nearest, GPTQ, steps by sensitivity.

    DATA_PATH=... TOKENIZER_PATH=... python bench/rounding.py final_model.pt nearest,gptq 0.0058
    ... python bench/rounding.py final_model.pt nearest,fisher 0.0058 [WINDOWS] [SCORED]

Calibration takes WINDOWS (16) training windows, scoring SCORED (24) validation windows spread over
the split, enough for differences because all ways meet the same tokens; minutes on two CPU cores.
STAGE=trained rounds the last iterate instead of the average: on the very step that late QAT had,
which the run's log tells, it may lose nothing (docs/ABLATIONS.md).
For `fisher` the row steps are rescaled until the entropy is that of `nearest` at the step given.
"""
from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt as tg
from prepare_data import with_sample

Weights = dict[str, Tensor]


def gptq(w_NRC: Tensor, scale_NRC: Tensor, qmax: Tensor, moments_NCC: Tensor) -> Tensor:
    """Codes (N, R, C) of w on the grid of `scale`, column by column; what rounding adds to the
    outputs is taken back by the columns that follow (Frantar et al., GPTQ, 2022).  `moments` are
    the second moments of the inputs; 1 % of their mean diagonal is added."""
    columns = w_NRC.shape[-1]
    damping = 0.01 * moments_NCC.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-12
    damped = moments_NCC + damping * torch.eye(columns, device=w_NRC.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    w, codes = w_NRC.clone(), torch.empty_like(w_NRC)
    for start in range(0, columns, 128):  # far columns are corrected once a block
        end = min(start + 128, columns)
        errors = torch.empty_like(w[..., start:end])
        for j in range(start, end):
            scale = scale_NRC[..., j : j + 1]
            code = tg.encode(w[..., j : j + 1], scale, qmax)
            codes[..., j : j + 1] = code
            error = (w[..., j : j + 1] - code * scale) / upper[:, j : j + 1, j : j + 1]
            w[..., j:end] -= error * upper[:, j : j + 1, j:end]
            errors[..., j - start : j - start + 1] = error
        w[..., end:] -= errors @ upper[:, start:end, end:]
    return codes


def input_moments(h: tg.Hyperparameters, weights: Weights, windows: Tensor) -> dict[str, Tensor]:
    """Second moments (L, C, C), summed over tokens, of what each product reads: `heads` for q, k
    and v, `out`, `up`, `down`."""
    sums: dict[str, list[Tensor]] = {name: [] for name in ("heads", "out", "up", "down")}
    layer = -1

    def add(name: str, x: Tensor) -> None:
        gram = x.flatten(0, -2).T @ x.flatten(0, -2)
        if len(sums[name]) <= layer:
            sums[name].append(torch.zeros_like(gram))
        sums[name][layer] += gram

    def heads(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal layer
        layer += 1
        add("heads", x)
        return real_heads(x, *rest)

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

    real_heads, real_linear = tg.project_heads, F.linear
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
        for mean, gradient in zip(means, torch.autograd.grad(loss, parameters), strict=True):
            mean += gradient.square() / len(windows)
    return dict(zip(names, means, strict=True))


def nearest(h: tg.Hyperparameters, weights: Weights, step: float) -> tuple[Weights, float]:
    """Rounded weights and the bytes of their entropy, as shipped."""
    rounded, size = {}, 0.0
    for name, codes, scales in tg.rounded(weights, h, step):
        rounded[name] = tg.dequantize(codes, scales).view(weights[name].shape)
        size += tg.entropy_bits(codes) / 8
    return rounded, size


def by_gptq(h: tg.Hyperparameters, weights: Weights, step: float,
            moments: dict[str, Tensor]) -> tuple[Weights, float]:
    """The same grid with error feedback; `moments` from `input_moments`."""
    rounded, size, layers = {}, 0.0, h.num_layers
    roles = {"qo_bank": ("heads", "out"), "kv_bank": ("heads", "heads"), "mlp_bank": ("up", "down")}
    for name, codes, scales in tg.rounded(weights, h, step):
        if name in roles:
            qmax = tg.export_grids(h)[name].tensors(codes)[0]
            halves = []
            for half, role in zip((slice(layers), slice(layers, None)), roles[name], strict=True):
                w, scale = weights[name][half], scales[half].expand_as(weights[name][half])
                if role == "down":  # stored transposed: its inputs are its rows
                    halves.append(gptq(w.mT, scale.mT, qmax[half], moments[role]).mT)
                else:
                    halves.append(gptq(w, scale, qmax[half], moments[role]))
            codes = torch.cat(halves).to(torch.int8)
        rounded[name] = tg.dequantize(codes, scales).view(weights[name].shape)
        size += tg.entropy_bits(codes) / 8
    return rounded, size


def by_fisher(h: tg.Hyperparameters, weights: Weights, size: float,
              fisher: Weights) -> tuple[Weights, float]:
    """Banks on row steps that go with the fourth root of the row's mean squared gradient, at
    an entropy of `size` bytes; tables as shipped."""
    def attempt(step: float) -> tuple[Weights, float]:
        rounded, total = {}, 0.0
        for name, codes, scales in tg.rounded(weights, h, step):
            if name in ("qo_bank", "kv_bank", "mlp_bank"):
                row = fisher[name].mean(-1, keepdim=True)
                whole = row.mean(1, keepdim=True)
                relative = whole.rsqrt() * (whole / (row + 0.02 * whole)).sqrt().sqrt()
                relative = relative / fisher["mlp_bank"].mean().rsqrt()
                widest = weights[name].abs().amax(-1, keepdim=True)
                qmax = tg.export_grids(h)[name].tensors(codes)[0]
                scales = torch.maximum(relative * step, 0.9 * widest / qmax)
                codes = tg.encode(weights[name], scales, qmax).to(torch.int8)
            rounded[name] = tg.dequantize(codes, scales).view(weights[name].shape)
            total += tg.entropy_bits(codes) / 8
        return rounded, total

    low, high = -14.0, 0.0  # log2 of the step
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (low, middle) if attempt(2.0**middle)[1] <= size else (middle, high)
    return attempt(2.0**high)


def main(path: str, ways: list[str], steps: list[float], calibration: int, scored: int,
         stage: str) -> None:
    saved = torch.load(path, map_location="cpu", weights_only=True)
    h = dataclasses.replace(with_sample(tg.Hyperparameters.from_env(os.environ)),
                            **saved["architecture"])
    weights = {name: w.float() for name, w in saved["stages"][stage].items()}
    plan = tg.BatchPlan(tg.open_split(h.data_path, "train"), h.train_seq_len, calibration, 1)
    windows = torch.from_numpy(plan.tokens(0, range(calibration)))
    split = np.concatenate(tg.open_split(h.data_path, "val"))
    stride = (len(split) - h.train_seq_len - 1) // scored
    validation = torch.from_numpy(np.stack(
        [split[i * stride :][: h.train_seq_len + 1].astype(np.int64) for i in range(scored)]))
    table = tg.load_byte_table(h.tokenizer_path, h.vocab_size)
    bits_per_byte = h.train_seq_len * scored / sum(
        table.count(row.numpy()) for row in validation) / np.log(2)

    def loss(state: Weights) -> float:
        model = tg.GPT(h, {**weights, **state}, tg.Kernels())
        with torch.no_grad():
            rows = [model(row[None, :-1], row[None, 1:]).double().mean() for row in validation]
        return float(torch.stack(rows).mean())

    floating = loss({})
    print(f"{stage}, float: {floating * bits_per_byte:.5f} bpb on {scored} windows")
    moments = input_moments(h, weights, windows) if "gptq" in ways else {}
    fisher = squared_gradients(h, weights, windows) if "fisher" in ways else {}
    for step in steps:
        entropy = nearest(h, weights, step)[1]
        makers: dict[str, Callable[[], tuple[Weights, float]]] = {
            "nearest": lambda step=step: nearest(h, weights, step),
            "gptq": lambda step=step: by_gptq(h, weights, step, moments),
            "fisher": lambda entropy=entropy: by_fisher(h, weights, entropy, fisher)}
        for way in ways:
            state, size = makers[way]()
            print(f"step {step:g} {way:8s} entropy {size:12,.0f} bytes, "
                  f"{(loss(state) - floating) * bits_per_byte:+.5f} bpb", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(","), [float(x) for x in sys.argv[3].split(",")],
         *[int(x) for x in (sys.argv[4:] + ["16", "24"][len(sys.argv) - 4 :])],
         stage=os.environ.get("STAGE", "averaged"))
