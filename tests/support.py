"""What the test files share: models, inputs, clocks, runs.  Puts the repository on the path."""

import dataclasses
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import fork_server
import numpy as np
import sentencepiece
import torch
from hypothesis import settings
from torch import Tensor

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import train_gpt  # noqa: E402

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
torch.set_num_threads(1)  # small tensors: more threads only add start-up time and noise

# Settings and models

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


def tiny_weights(h: train_gpt.Hyperparameters, seed: int = 0) -> dict[str, Tensor]:
    """float32 weights none of which is at its initial value, so that every path matters."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: w + 0.1 * torch.randn(w.shape, generator=generator)
        for name, w in train_gpt.initial_weights(h).items()
    }


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
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


def write_back(optimizer: train_gpt.Optimizer) -> None:
    """A step with a learning rate of 0: the working weights follow the masters, which stay."""
    parameters = list(optimizer.model.parameters())
    loss = torch.zeros((), device=parameters[0].device)
    optimizer.lr.zero_()
    assert optimizer.update(loss, [torch.ones_like(p) for p in parameters]).isfinite()


def cpu_runtime(**overrides: Any) -> train_gpt.Runtime:
    """One process on the CPU, nothing compiled."""
    return dataclasses.replace(train_gpt.Runtime(torch.device("cpu")), **overrides)


# Numbers


@contextmanager
def in_float64() -> Iterator[None]:
    """A float64 model rounds nothing to float32 in here, so that it can be held to 1e-9.

    Where it asks for float32 it gets float64: `x.float()`, and the positions of a rotary table."""
    arange = torch.arange

    def wide_arange(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return arange(*args, **kwargs)

    with (
        mock.patch.object(Tensor, "float", Tensor.double),
        mock.patch.object(torch, "arange", wide_arange),
    ):
        yield


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class FakeClock:
    """Stands in for the module `time`: moves when told, and by `tick` at every look."""

    def __init__(self, tick: float = 1e-9) -> None:
        self.now, self.tick = 100.0, tick

    def perf_counter(self) -> float:
        self.now += self.tick
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def slow(self, function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        """`function`, taking so long by this clock."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return function(*args, **kwargs)

        return timed


# Data


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


def byte_table(vocab_size: int, size: int = 1) -> train_gpt.ByteTable:
    """Every token stands for `size` bytes and has no leading space; BOS stands for none."""
    boundary = np.arange(vocab_size) == train_gpt.BOS_ID
    return train_gpt.ByteTable(
        base=np.where(boundary, 0, size),
        leading_space=np.zeros(vocab_size, dtype=bool),
        boundary=boundary,
    )


def uneven_byte_table(vocab_size: int) -> train_gpt.ByteTable:
    """Tokens of 1 to 5 bytes, each third with a leading space; ids below 4 are boundaries."""
    ids = np.arange(vocab_size)
    boundary = ids < 4
    return train_gpt.ByteTable(
        base=np.where(boundary, 0, ids % 5 + 1),
        leading_space=(ids % 3 == 0) & ~boundary,
        boundary=boundary,
    )


def train_tokenizer(path: Path, texts: Iterable[str], vocab_size: int) -> Any:
    """Trains a SentencePiece model with byte fallback at `path` (.model); its processor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(path.with_suffix("")),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def refusal(function: Callable[..., Any], *args: Any) -> str:
    """The one line with which a call is refused."""
    try:
        function(*args)
    except train_gpt.RunError as error:
        message = str(error)
        assert "\n" not in message
        return message
    raise AssertionError("nothing was refused")


# Runs

HANG = 300  # seconds: no run here takes so long; a rank whose peer has gone waits for 30 minutes
EARLIER = '{"of": "an earlier run"}'  # what a failed run must leave as it is
RESULTS = ("train.log", "submission.json", "final_model.pt", "final_model.ptz")


def launch(
    script: Path,
    *arguments: object,
    ranks: int = 1,
    torchrun: Sequence[str] = (),
    cwd: Path = REPO,
    fresh: bool = False,
    **settings: object,
) -> subprocess.Popen[str]:
    """A script as a user starts it, with these settings only.

    torchrun starts it, with the options `torchrun`, if there are any or if there are ranks.  A
    process is forked from the fork server's, unless it is to be `fresh`: then the number of the
    returned one is its own.  PYTHONPATH needs a fresh one, as Python reads it when it starts.
    """
    kept = ("PATH", "HOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYENV_VERSION", "TMPDIR")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {name: str(value) for name, value in settings.items()}
    python = sys.executable
    if not fresh and "PYTHONPATH" not in settings:
        python = environment["PYTHON_EXEC"] = str(fork_server.interpreter())  # torchrun's ranks
    command = [python]
    if ranks > 1:
        torchrun = ["--standalone", f"--nproc_per_node={ranks}"]
    if torchrun:
        command += ["-m", "torch.distributed.run", *torchrun]
    command += [str(script), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=cwd, stdout=pipe, stderr=pipe, text=True)


def wait_for(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """The process when it has ended.  One that hangs is ended and fails its test."""
    try:
        stdout, stderr = process.communicate(timeout=HANG)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks then
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def completed(script: Path, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`launch`, waited for."""
    return wait_for(launch(script, *arguments, **options))


def errors_of(stderr: str) -> list[str]:
    """The lines with which the program says what ended it."""
    return [line for line in stderr.splitlines() if line.startswith("error")]


ENTRY = ["README.md", "record.py", "requirements.txt", "submission.json", "train.log",
         "train_gpt.py"]  # fmt: skip
CARD_IN_SMALL = dict(  # everything else is the card's
    VOCAB_SIZE=300, NUM_LAYERS=4, MODEL_DIM=64, NUM_HEADS=4, NUM_KV_HEADS=2, MLP_HIDDEN=96,
    ROPE_DIMS=8, XSA_LAYERS=2, VE_DIM=16, TRAIN_SEQ_LEN=64, TRAIN_BATCH_TOKENS=512, ITERATIONS=3,
    VAL_BATCH_SIZE=1024, WARMUP_STEPS=1, EVAL_STRIDE=16, DEVICE="cpu", OMP_NUM_THREADS=1,
)  # fmt: skip


def challenge_tree(root: Path) -> Path:
    """The challenge's repository with its data, and this folder as an entry in it: its path."""
    generator = np.random.Generator(np.random.PCG64(0))
    words = ["river", "stone", "lantern", "violet", "engine"]
    texts = [" ".join(generator.choice(words, 40)) + f" {i}." for i in range(300)]
    processor = train_tokenizer(root / "data/tokenizers/fineweb_1024_bpe.model", texts, 300)
    tokens = [t for text in texts for t in (1, *processor.encode(text))]
    shards = root / "data/datasets/fineweb10B_sp1024"
    write_shard(shards / "fineweb_train_000000.bin", tokens[1000:])
    write_shard(shards / "fineweb_val_000000.bin", tokens[:1000])
    entry = root / "records/track_10min_16mb/2026-01-01_card"
    entry.mkdir(parents=True)
    for name in ENTRY:
        shutil.copy(REPO / name, entry)
    return entry
