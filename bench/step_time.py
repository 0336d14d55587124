"""Milliseconds per training step on one GPU, by phase and by kernel group, beside a roofline.

    python bench/step_time.py [OUT.json]          # about a minute on one H100, warm cache

Shape: one rank's share of the submitted run, 48 x 2048 tokens a step, and one row for its short
sequences, 96 x 1024; environment variables override hyperparameters as they do for train_gpt.py.
Times are medians of 20 calls in a row by CUDA events.  Forward and forward + backward are launched
kernel by kernel; `graph` is the CUDA graph of both that training replays.  The optimizer's time is
the step's less the graph's; the host gap is the time in a trace of ten steps in a row in which no
kernel ran.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import timing
import train_gpt as tg

DENSE_TFLOPS, MEMORY_TBPS = 800.0, 3.0  # what products and copies reach on an H100
PEAK_TFLOPS = 989.0  # its dense bfloat16 peak, by which MFU is counted

# Group -> substrings of kernel names, first match wins.
GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("flash", "cudnn", "sdpa", "fmha"),
    "products with relu^2": ("relu2",),
    "heads": ("heads_kernel",),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk", "mm_"),
    "elementwise and norms": (
        "triton",
        "softcap_loss",
        "elementwise",
        "reduce",
        "cat",
        "vectorized",
    ),
    "memory": ("memcpy", "memset", "copy"),
    "other": ("",),
}


class Work(NamedTuple):
    """What a token costs in one training step, forward and backward."""

    attention: float  # floating-point operations
    relu2_products: float  # of the two products with relu^2 in their epilogue
    products: float  # of all others
    heads: float  # bytes that norm, RoPE and gain of q and k must move
    elementwise: float  # bytes of the rest, fused as far as can be

    @classmethod
    def of(cls, h: tg.Hyperparameters) -> Work:
        layers = h.num_layers
        width = h.model_dim
        qkv = width + 2 * h.kv_dim
        weights = layers * width * (qkv + width + 2 * h.mlp_hidden) + h.vocab_size * width
        relu2_products = 4 * layers * width * h.mlp_hidden
        # Two products over half the window on average; backward has five where forward has two.
        attention = 3.5 * layers * 2 * h.train_seq_len * width
        # Forward reads and writes q and k.  Backward reads them and the gradients of q, k and v,
        # and writes the latter three.
        heads = 2 * layers * (3 * (width + h.kv_dim) + 2 * qkv)
        # 24 passes over a layer's residual stream; the logits are read and written once.
        elementwise = 2 * (24 * layers * width + 2 * h.vocab_size)
        return cls(attention, relu2_products, 6 * weights - relu2_products, heads, elementwise)

    @property
    def operations(self) -> float:
        return self.attention + self.relu2_products + self.products

    def rooflines(self, tokens: int) -> dict[str, float]:
        """Group -> the least milliseconds of a step of so many tokens."""
        per_operation = tokens / DENSE_TFLOPS / 1e9
        per_byte = tokens / MEMORY_TBPS / 1e9
        return {
            "attention": self.attention * per_operation,
            "products with relu^2": self.relu2_products * per_operation,
            "heads": self.heads * per_byte,
            "matrix products": self.products * per_operation,
            "elementwise and norms": self.elementwise * per_byte,
            "memory": 0.3,
            "other": 0.0,
        }


gpu_ms = functools.partial(timing.milliseconds, on_cuda=True)


def kernel_times(function: Callable[[], object], steps: int = 10) -> dict[str, Any]:
    """From a trace of `steps` calls in a row on a warm device, per call.

    Milliseconds by kernel name, kernels, milliseconds from the first kernel to the last, and those
    when none ran.
    """
    warm = 5
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(warm + steps):
            function()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    spans = spans[len(spans) * warm // (warm + steps) :]  # every call has the same kernels

    kernels: dict[str, float] = {}
    busy = 0.0
    first = spans[0][0]
    until = first
    for start, end, name in spans:
        kernels[name] = kernels.get(name, 0.0) + (end - start) / 1e3 / steps
        busy += max(0.0, end - max(start, until)) / 1e3 / steps
        until = max(until, end)
    span = (until - first) / 1e3 / steps
    return {
        "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1])),
        "launches": len(spans) / steps,
        "span": span,
        "idle": span - busy,
    }


def group_of(kernel: str) -> str:
    name = kernel.lower()
    return next(group for group, keys in GROUPS.items() if any(key in name for key in keys))


def measure() -> dict[str, Any]:
    """Every figure of the table, as written to JSON."""
    overrides = {"TRAIN_BATCH_TOKENS": "98304", **os.environ}
    h = tg.Hyperparameters.from_env(overrides)
    runtime = tg.Runtime.start(h, {})
    kernels = tg.choose_kernels(h, runtime, tg.RunLog(Path(os.devnull)))
    trainer = tg.Trainer(h, runtime, kernels)
    one_batch = f"TRAIN_BATCH_TOKENS={h.train_batch_tokens}: expected one micro-batch; lower it"
    tg.require(trainer.layout.micro == 1, one_batch)
    shape = (trainer.layout.local, h.train_seq_len + 1)
    tokens = torch.randint(h.vocab_size, shape, device=runtime.device)
    parameters = list(trainer.model.parameters())
    losses = torch.no_grad()(runtime.compile(tg.GPT.forward))

    def forward() -> Tensor:
        return trainer.loss(trainer.model, tokens, 1.0, h.train_seq_len)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), parameters)

    def evaluate() -> Tensor:
        return losses(trainer.model, tokens[:, :-1], tokens[:, 1:])

    def step() -> Tensor:
        return trainer.train_step(tokens, 1.0)

    _, compile_seconds = timing.seconds(step, on_cuda=True)
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tokens": tokens[:, 1:].numel(),
        "work": Work.of(h)._asdict(),
        "compile_seconds": compile_seconds,
        "forward": gpu_ms(forward),
        "forward_backward": gpu_ms(forward_backward),
        "eval_forward": gpu_ms(evaluate),
        "evaluation": kernel_times(evaluate),
    }
    trainer.capture(tokens)
    result["graph"] = gpu_ms(lambda: trainer.gradients(tokens))
    result["step"] = gpu_ms(step)
    late_qat = trainer.optimizer.late_qat
    trainer.optimizer.start_late_qat(trainer.weight_bytes())
    step()
    trainer.capture(tokens)
    result["step_with_qat"] = gpu_ms(step)
    late_qat.on = False
    result |= kernel_times(step)
    result["peak_memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
    # A run launches both lengths before it captures one, so this adds nothing to its peak.
    trainer.seq_len = tg.seq_lens(h)[0]
    if trainer.seq_len < h.train_seq_len:
        step()
        trainer.capture(tokens)
        result["step_short"] = gpu_ms(step)
    return result


def table(result: dict[str, Any]) -> str:
    """What a person reads: phases, kernel groups against the roofline, the longest kernels."""
    lines = [
        f"{result['device']}, torch {result['torch']}, {result['tokens']} tokens and "
        f"{result['launches']:.0f} kernels a step"
    ]
    phases = {
        "forward": result["forward"],
        "backward": result["forward_backward"] - result["forward"],
        "forward + backward, graph": result["graph"],
        "optimizer": result["step"] - result["graph"],
        "step": result["step"],
        "step with late QAT": result["step_with_qat"],
        "host gap": result["idle"],
        "step, traced": result["span"],
        "evaluation forward": result["eval_forward"],
    }
    if "step_short" in result:
        phases["step, short sequences"] = result["step_short"]
    lines += [f"{name:26s}{ms:8.2f} ms" for name, ms in phases.items()]
    trained = result["tokens"] / result["step"] / 1e3  # million tokens a second
    scored = result["tokens"] / result["eval_forward"] / 1e3
    work = Work(**result["work"])
    rate = work.operations * trained / 1e6  # TFLOP/s
    lines.append(
        f"training {trained:.3f}M tokens/s, {rate:.0f} TFLOP/s, MFU {rate / PEAK_TFLOPS:.1%}; "
        f"evaluation {scored:.2f}M tokens/s; first step (compilation) "
        f"{result['compile_seconds']:.1f} s, peak {result['peak_memory_gib']:.1f} GiB"
    )

    sums = dict.fromkeys(GROUPS, 0.0)
    for kernel, ms in result["kernels"].items():
        sums[group_of(kernel)] += ms
    for group, roofline in work.rooflines(result["tokens"]).items():
        lines.append(f"{group:24s}{sums[group]:8.2f} ms   roofline {roofline:.1f}")
    for kernel, ms in list(result["kernels"].items())[:40]:
        lines.append(f"  {ms:7.3f} ms  {kernel[:100]}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    tg.require(torch.cuda.is_available(), "no GPU: there is nothing to time")
    if arguments:
        folder = Path(arguments[0]).parent
        tg.require(folder.is_dir(), f"{arguments[0]}: make its folder first")
    measured = measure()
    if arguments:
        Path(arguments[0]).write_text(json.dumps(measured, indent=1))
    print(table(measured))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except tg.RunError as error:
        sys.exit(f"error: {error}")
