"""Milliseconds per training step on one GPU, by phase and by kernel group, beside a roofline.

    python bench/step_time.py [OUT.json]          # about a minute on one H100, warm cache

Shape: one rank's share of the submitted run, 48 x 2048 tokens a step; environment variables
override hyperparameters as they do for train_gpt.py.  Forward and forward + backward are CUDA-event
medians, launched kernel by kernel and as the CUDA graph that training replays; `step` and the
evaluation forward are wall clocks of 20 in a row; the optimizer's time is the step's less the
graph's; the host gap is the time in a trace of ten steps in a row in which no kernel ran.
"""
from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_gpt as tg

TRAIN_GFLOP = 0.275  # per token: 6 for each of 32.3M weights in products, 0.081 attention
# Group -> substrings of kernel names, first match wins.  Roofline in ms at 98,304 tokens, from
# the arithmetic of the model at 800 TFLOP/s dense bf16 and 3.0 TB/s.
GROUPS: dict[str, tuple[tuple[str, ...], float]] = {
    "attention": (("flash", "cudnn", "sdpa", "fmha"), 9.9),
    "products with relu^2": (("relu2",), 5.7),
    "heads": (("heads_kernel",), 3.1),
    "matrix products": (("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk", "mm_"), 18.2),
    "elementwise and norms": (("triton", "elementwise", "reduce", "cat", "vectorized"), 9.0),
    "memory": (("memcpy", "memset", "copy"), 0.3),
    "other": (("",), 0.0),
}


def median_ms(function, repeats: int = 20) -> float:
    """Median CUDA-event time of `function`, after three warm calls."""
    times = []
    for i in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def wall_ms(function, repeats: int = 20) -> float:
    """Wall-clock milliseconds per call, `repeats` in a row, after three warm calls."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats * 1e3


def kernel_times(function, steps: int = 10) -> dict:
    """From a trace of `steps` calls in a row on a warm device, per call: milliseconds by kernel
    name, kernels, milliseconds from the first kernel to the last, and those when none ran."""
    warm, activities = 5, [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(warm + steps):
            function()
        torch.cuda.synchronize()
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in profiler.events()
                   if e.device_type == torch.autograd.DeviceType.CUDA)
    spans = spans[len(spans) * warm // (warm + steps):]  # every call has the same kernels
    kernels: dict[str, float] = {}
    busy, until = 0.0, spans[0][0]
    for start, end, name in spans:
        kernels[name] = kernels.get(name, 0.0) + (end - start) / 1e3 / steps
        busy += max(0.0, end - max(start, until)) / 1e3 / steps
        until = max(until, end)
    span = (until - spans[0][0]) / 1e3 / steps
    return {"kernels": dict(sorted(kernels.items(), key=lambda item: -item[1])),
            "launches": len(spans) / steps, "span": span, "idle": span - busy}


def group_of(kernel: str) -> str:
    name = kernel.lower()
    return next(g for g, (keys, _) in GROUPS.items() if any(k in name for k in keys))


def measure() -> dict:
    """Every figure of the table, as written to JSON."""
    overrides = {"TRAIN_BATCH_TOKENS": "98304", **os.environ}
    h = tg.Hyperparameters.from_env(overrides)
    runtime = tg.Runtime.start(h, {})
    log = tg.RunLog(Path("/dev/null"))
    trainer = tg.Trainer(h, runtime, tg.choose_kernels(h, runtime, log))
    tokens = torch.randint(h.vocab_size, (trainer.local, h.train_seq_len + 1), device="cuda")
    parameters = list(trainer.model.parameters())

    def forward():
        return trainer.loss(trainer.model, tokens, 1.0)

    def step():
        return trainer.train_step(tokens, 1.0)

    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "tokens": tokens[:, 1:].numel(), "compile_seconds": time.perf_counter() - began,
        "forward": median_ms(forward),
        "forward_backward": median_ms(lambda: torch.autograd.grad(forward(), parameters)),
    }
    losses = torch.no_grad()(runtime.compile(tg.GPT.forward))

    def evaluate():
        return losses(trainer.model, tokens[:, :-1], tokens[:, 1:])

    result["eval_forward"] = wall_ms(evaluate)
    result["evaluation"] = kernel_times(evaluate)
    trainer.capture(tokens)
    result["graph"] = median_ms(lambda: trainer.gradients(tokens))
    result["step"] = wall_ms(step)
    trainer.optimizer.start_qat(trainer.weight_bytes())
    step()
    trainer.capture(tokens)
    result["step_with_qat"] = wall_ms(step)
    trainer.optimizer.qat_step = None
    result |= kernel_times(step)
    result["peak_memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return result


def table(result: dict) -> str:
    """What a person reads: phases, kernel groups against the roofline, the longest kernels."""
    backward = result["forward_backward"] - result["forward"]
    lines = [f"{result['device']}, torch {result['torch']}, {result['tokens']} tokens and "
             f"{result['launches']:.0f} kernels a step"]
    for name, ms in (("forward", result["forward"]), ("backward", backward),
                     ("forward + backward, graph", result["graph"]),
                     ("optimizer", result["step"] - result["graph"]),
                     ("step", result["step"]), ("step with late QAT", result["step_with_qat"]),
                     ("host gap", result["idle"]), ("step, traced", result["span"]),
                     ("evaluation forward", result["eval_forward"])):
        lines.append(f"{name:26s}{ms:8.2f} ms")
    rate, scored = (result["tokens"] / result[n] / 1e3 for n in ("step", "eval_forward"))
    lines.append(f"training {rate:.3f}M tokens/s, {TRAIN_GFLOP * rate * 1e3:.0f} TFLOP/s; "
                 f"evaluation {scored:.2f}M tokens/s; first step (compilation) "
                 f"{result['compile_seconds']:.1f} s, peak {result['peak_memory_gib']:.1f} GiB")
    sums = dict.fromkeys(GROUPS, 0.0)
    for kernel, ms in result["kernels"].items():
        sums[group_of(kernel)] += ms
    for group, ms in sums.items():
        lines.append(f"{group:24s}{ms:8.2f} ms   roofline {GROUPS[group][1]:.1f}")
    for kernel, ms in list(result["kernels"].items())[:40]:
        lines.append(f"  {ms:7.3f} ms  {kernel[:100]}")
    return "\n".join(lines)


if __name__ == "__main__":
    measured = measure()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(measured, indent=1))
    print(table(measured))
