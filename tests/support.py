"""Small valid inputs that the test files share; importing it puts the repository on the path."""

import dataclasses
import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import train_gpt  # noqa: E402

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
torch.set_num_threads(1)  # small tensors: more threads only add start-up time and noise

TINY: dict[str, Any] = {
    "run_id": "tiny", "device": "cpu", "vocab_size": 64, "num_layers": 4, "model_dim": 32,
    "num_heads": 4, "num_kv_heads": 2, "mlp_hidden": 48, "rope_dims": 4, "xsa_layers": 2,
    "key_shift": 1, "gate_dims": 8, "lr_warmup_steps": 0,
    "ve_layers": 2, "ve_dim": 8, "train_seq_len": 32, "train_batch_tokens": 256,
    "micro_batch_tokens": 256, "val_batch_size": 128, "eval_stride": 8, "iterations": 6,
    "warmup_steps": 1, "max_wallclock_seconds": 0.0, "val_loss_every": 0, "train_log_every": 1,
    "zstd_level": 3,
}  # fmt: skip


def tiny(**overrides: Any) -> train_gpt.Hyperparameters:
    """The smoke preset shrunk until a CPU step takes milliseconds; validated."""
    values = {**train_gpt.PRESETS["smoke"], "preset": "smoke", **TINY, **overrides}
    return train_gpt.Hyperparameters(**values)


def tiny_weights(h: train_gpt.Hyperparameters, seed: int = 0) -> dict[str, torch.Tensor]:
    """float32 weights none of which is at its initial value, so that every path matters."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: w + 0.1 * torch.randn(w.shape, generator=generator)
        for name, w in train_gpt.initial_weights(h).items()
    }


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal grouped-query attention from its definition: q (B,T,H,E), k and v (B,T,K,E)."""
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q, k) / q.shape[-1] ** 0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshe->bthe", scores.masked_fill(future, -torch.inf).softmax(-1), v)


def tiny_model(
    h: train_gpt.Hyperparameters, dtype: torch.dtype = torch.float32, seed: int = 0
) -> train_gpt.GPT:
    """A model in which no parameter is zero or one, hence no block is the identity."""
    weights = {name: w.to(dtype) for name, w in tiny_weights(h, seed).items()}
    return train_gpt.GPT(h, weights, train_gpt.Kernels(plain_attention))


def cpu_runtime(**overrides: Any) -> train_gpt.Runtime:
    """One process on the CPU, nothing compiled."""
    return dataclasses.replace(train_gpt.Runtime(torch.device("cpu")), **overrides)


def write_shard(
    path: Path, tokens: Iterable[int], *, magic: int = 20240520, version: int = 1,
    count: int | None = None,
) -> Path:  # fmt: skip
    """A token shard as the challenge defines it, spelled out independently of the product."""
    ids = [int(token) for token in tokens]
    header = [magic, version, len(ids) if count is None else count] + [0] * 253
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<256i", *header) + struct.pack(f"<{len(ids)}H", *ids))
    return path
