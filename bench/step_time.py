"""Milliseconds per training step on one GPU, by phase and by kernel group, beside a roofline.

    python bench/step_time.py [OUT.json]          # about a minute on one H100, warm cache

Shape: one rank's share of the submitted run, 48 x 2048 tokens a step; environment variables
override hyperparameters as they do for train_gpt.py.  Phases are CUDA-event medians; `host gap`
is the step's time on a synchronised clock less the time in which some kernel ran.
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

# Group -> substrings of kernel names, first match wins.  Roofline in ms at 98,304 tokens, from
# the arithmetic of the model at 800 TFLOP/s dense bf16 and 3.0 TB/s.
GROUPS: dict[str, tuple[tuple[str, ...], float]] = {
    "attention": (("flash", "cudnn", "sdpa", "fmha"), 9.9),
    "matrix products": (("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk", "mm_"), 18.6),
    "elementwise and norms": (("triton", "elementwise", "reduce", "cat", "vectorized"), 13.7),
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


def kernel_times(function, steps: int = 3) -> dict[str, float]:
    """Device milliseconds per call of `function` by kernel name."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            function()
        torch.cuda.synchronize()
    return {e.key: e.self_device_time_total / 1e3 / steps for e in profiler.key_averages()
            if e.self_device_time_total > 0}


def group_of(kernel: str) -> str:
    name = kernel.lower()
    return next(g for g, (keys, _) in GROUPS.items() if any(k in name for k in keys))


def measure() -> dict:
    """Every figure of the table, as written to JSON."""
    overrides = {"TRAIN_BATCH_TOKENS": "98304", **os.environ}
    h = tg.Hyperparameters.from_env(overrides)
    runtime = tg.Runtime.start(h, {})
    log = tg.RunLog(Path("/dev/null"))
    trainer = tg.Trainer(h, runtime, tg.choose_attention(h, runtime, log))
    tokens = torch.randint(h.vocab_size, (trainer.local, h.train_seq_len + 1), device="cuda")
    parameters = list(trainer.model.parameters())

    began = time.perf_counter()
    trainer.train_step(tokens, 1.0, 0.95)
    torch.cuda.synchronize()
    compile_seconds = time.perf_counter() - began

    def forward():
        return trainer.loss(trainer.model, tokens, 1.0)

    gradients = list(torch.autograd.grad(forward(), parameters))
    step = lambda: trainer.train_step(tokens, 1.0, 0.95)  # noqa: E731
    result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "tokens": tokens[:, 1:].numel(), "compile_seconds": compile_seconds,
        "forward": median_ms(forward),
        "forward_backward": median_ms(lambda: torch.autograd.grad(forward(), parameters)),
        "optimizer": median_ms(
            lambda: trainer.optimizer.step(tokens.new_zeros(()), 1.0, 0.95, gradients)),
        "step": median_ms(step),
    }
    trainer.optimizer.start_qat(trainer.weight_bytes())
    step()
    result["step_with_qat"] = median_ms(step)
    trainer.optimizer.qat_step = None
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        step()
    host_done = time.perf_counter() - began
    torch.cuda.synchronize()
    result["step_wall"] = (time.perf_counter() - began) / 20 * 1e3
    result["host_issue"] = host_done / 20 * 1e3
    kernels = kernel_times(step)
    result["kernels"] = dict(sorted(kernels.items(), key=lambda item: -item[1]))
    result["busy"] = sum(kernels.values())
    result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def table(result: dict) -> str:
    """What a person reads: phases, kernel groups against the roofline, the longest kernels."""
    backward = result["forward_backward"] - result["forward"]
    lines = [f"{result['device']}, torch {result['torch']}, {result['tokens']} tokens a step"]
    for name, ms in (("forward", result["forward"]), ("backward", backward),
                     ("optimizer", result["optimizer"]), ("step (events)", result["step"]),
                     ("step with late QAT", result["step_with_qat"]),
                     ("step (wall)", result["step_wall"]),
                     ("host gap", result["step_wall"] - result["busy"]),
                     ("host issue", result["host_issue"])):
        lines.append(f"{name:24s}{ms:8.2f} ms")
    tokens_a_second = result["tokens"] / result["step_wall"] * 1e3
    lines.append(f"{tokens_a_second / 1e6:.3f}M tokens/s, first step (compilation) "
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
