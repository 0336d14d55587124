"""Train, average, quantise, pack and score one small GPT for Parameter Golf, in one file.

The task: the lowest bits per byte (bpb) on FineWeb's validation split from at most 16,000,000
bytes of code plus packed weights, trained for at most 600 s on 8 x H100.  Measured so far: 1.1339
bpb sliding, 1.1542 plain, in 15,844,119 bytes or less, on the larger proxy corpus (not FineWeb),
after 180 s or 2,748 steps of 98,304 tokens on 1 x H200 with torch 2.11, n = 3 (`submission.json`),
with momentum 0.95.

    torchrun --standalone --nproc_per_node=8 train_gpt.py                     # the submitted run
    PRESET=smoke torchrun --standalone --nproc_per_node=1 train_gpt.py        # three minutes, CPU
    EVAL_ONLY=final_model.ptz torchrun ... train_gpt.py                       # score an artifact
    RESUME_FROM=final_model.pt torchrun ... train_gpt.py                      # pack and score again

Every number that matters is a field of `Hyperparameters`; an environment variable of the same name
in capitals overrides it.  PRESET=frontier is the default card plus the extensions that measured
better in runs of 180 s.  The file follows the data.  Sections:
1 constants, 2 hyperparameters, 3 runtime, 4 data, 5 model, 6 kernels, 7 quantizer, 8 optimizer and
schedules, 9 weight averaging, 10 pack and unpack, 11 bytes of the text, 12 evaluation, 13 training,
14 stages and main.

Shapes: B sequences, T positions, M = B T tokens, D model width, H query heads, K key/value heads,
E head width, F MLP width, V vocabulary, L layers, N matrices of a bank, R rows, C columns or the
channels that the docstring names.  A name that ends in `_BTD` has that shape.  Only around
`linear_relu2` are M, N, K the sizes of a matrix product.
Units unless said otherwise: nats per token, bits per UTF-8 byte, seconds, bytes.
`pg#65` is pull request 65 of the challenge's repository.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import mmap
import os
import platform
import re
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

# Ctrl-C while torch is imported ends the process without a word; `main` sets its own handlers.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Tested before what these lack is imported.
if sys.platform == "win32":
    sys.exit("error: this is Windows, expected Linux or macOS; use WSL or a rented machine")

import torch

if torch.__version__ < (2, 11):  # type: ignore[operator]
    sys.exit(f"error: torch is {torch.__version__}, expected 2.11 to 2.14: see requirements.txt")

import fcntl
import resource

import numpy as np
import sentencepiece
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # CPU builds of torch come without Triton: then no kernel of section 6 runs
    triton = None
    tl = None
    TensorDescriptor = None

# ---- 1. Constants -------------------------------------------------------------------------------
SOURCE = Path(__file__).resolve()

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_BYTES = 256 * 4
BOS_ID = 1  # starts every document

ARTIFACT_MAGIC = b"PGOLFGPT"
ARTIFACT_VERSION = 1

GET_DATA = (
    "`python prepare_data.py fineweb --vocab VOCAB_SIZE`, for fineweb_case with --case-marks, gets "
    "it; or set DATA_PATH=sample"
)


class RunError(Exception):
    """A user's mistake.

    The message says what was found, what was expected and how to fix it; `main` shows it without a
    traceback.
    """


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


read_once = functools.cache(Path.read_bytes)


def own_code() -> bytes:
    """This file as the run's first look found it: it may be edited or deleted on the way."""
    return read_once(SOURCE)


def own_digest() -> str:
    return hashlib.sha256(own_code()).hexdigest()


def require(holds: object, message: str) -> None:
    if not holds:
        raise RunError(message)


# ---- 2. Hyperparameters -------------------------------------------------------------------------
T = TypeVar("T")
BELOW_ONE = 1 - 1e-9  # the largest decay factor that still forgets
FLOAT32_MAX = torch.finfo(torch.float32).max  # torch answers more with a traceback, or with nan


def setting(
    default: T,
    low: float = 0,
    high: float = FLOAT32_MAX,
    *,
    choices: tuple[str, ...] = (),
    architecture: bool = False,
    per_run: bool = False,
    trains: bool = True,
    of_process: bool = False,
) -> T:
    """A field of `Hyperparameters` with all that the program must know of it.

    low, high: the bounds of a number, both allowed.
    choices: the strings that are allowed; none named allows all.
    architecture: the packed weights mean something else without it, so the artifact stores it.
    per_run: it changes no score, so results that differ in it alone are merged as seeds.
    trains: another value gives other weights, so RESUME_FROM keeps the one of the training.
    of_process: RESUME_FROM takes it from the environment, not from its checkpoint.
    """
    facts = dict(low=low, high=high, choices=choices)
    roles = dict(architecture=architecture, per_run=per_run, trains=trains, of_process=of_process)
    return dataclasses.field(default=default, metadata=facts | roles)


def of_model(default: T, low: float = 0, high: float = FLOAT32_MAX) -> T:
    """A setting that belongs to the artifact's architecture."""
    return setting(default, low, high, architecture=True)


def label(
    default: T, low: float = 0, high: float = FLOAT32_MAX, choices: tuple[str, ...] = ()
) -> T:
    """It names, places or reports a run.

    Results that differ in it are merged as seeds: data are told apart by digests, not by paths.
    """
    return setting(default, low, high, choices=choices, per_run=True, trains=False)


def process(default: T, choices: tuple[str, ...] = ()) -> T:
    """A label of how and where this process runs, which no checkpoint brings along."""
    return setting(default, choices=choices, per_run=True, trains=False, of_process=True)


def scoring(default: T, low: float = 0, high: float = FLOAT32_MAX) -> T:
    """A setting of what comes after training: packing and evaluation."""
    return setting(default, low, high, trains=False)


@dataclass(frozen=True)
class Hyperparameters:
    """All numbers of a run.  The defaults are the `card` preset, the submitted configuration."""

    # Run
    preset: str = setting("card", per_run=True)  # card | frontier | frontier_plain | smoke
    run_id: str = label("card")  # label in the log and in submission.json
    seed: int = setting(1337, high=2**63 - 1, per_run=True)  # weights and batch order
    device: str = process("auto", choices=("auto", "cpu", "cuda"))
    compile_backend: str = process("auto")  # auto: inductor on CUDA, none on a CPU
    data_path: str = label("./data/datasets/fineweb10B_sp1024")  # folder of shards, or `sample`
    tokenizer_path: str = label("./data/tokenizers/fineweb_1024_bpe.model")  # SentencePiece
    output_dir: str = process(".")  # train.log, submission.json, final_model.pt, final_model.ptz
    eval_only: str = process("")  # path of an artifact to score; nothing is trained
    resume_from: str = process("")  # path of saved float weights to pack and score, no training
    # What SIGTERM or Ctrl-C does in training: save and end, or finish the run with what there is.
    on_interrupt: str = process("save", choices=("save", "finish"))

    # Model: 32.4M parameters, which 16 MB hold at 3.9 bits a weight
    vocab_size: int = of_model(1024, low=2)  # of the tokenizer; embeddings are tied
    num_layers: int = of_model(11, low=2)  # 0 to 4 encode, 6 to 10 decode: U-Net skips join them
    model_dim: int = of_model(512, low=1)  # width of the residual stream
    num_heads: int = of_model(4, low=1)  # of width 128: better and faster than 8 of 64
    num_kv_heads: int = of_model(2, low=1)  # grouped-query attention, 2 query heads a group
    mlp_hidden: int = of_model(2048, low=1)  # 16 x 128: whole GEMM tiles
    mlp_slope: float = of_model(0.5, high=1)  # of the activation's negative side; 0: plain relu^2
    rope_dims: int = of_model(64)  # of each head's 128; the rest carries no position
    key_shift: int = of_model(0, high=1)  # 1: key dims without RoPE come from the previous token
    rope_base: float = of_model(10_000.0, low=1e-12)  # longest wavelength over 2 pi, tokens
    # SmearGate blends the previous token in; this many dims of a token set how much.
    smear_dims: int = of_model(12, low=2)
    gate_dims: int = of_model(0)  # inputs of the gate on each head's output; 0: no gates
    xsa_layers: int = of_model(4)  # last layers whose attention drops the token's own value
    ve_layers: int = of_model(2, low=1)  # last layers that add the value embedding to V
    ve_dim: int = of_model(128, low=1)  # of the shared value embedding, projected to V's width
    # Logits x become logit_softcap tanh((x + logit_shift) / logit_width), which bounds them and so
    # steadies early training.  Most tokens are unlikely, so low logits get more room than high
    # ones.  But for a constant, which softmax ignores, it is modded-nanogpt's
    # 23 sigmoid((x + 5) / 7.5).
    logit_softcap: float = of_model(11.5, low=1e-12)
    logit_shift: float = of_model(5.0, low=-FLOAT32_MAX)
    logit_width: float = of_model(15.0, low=1e-12)
    qk_gain_init: float = setting(4.0)  # per-head sharpness of the attention logits
    embed_init_std: float = setting(0.005)  # near-uniform first predictions by the tied head

    # Optimizer
    matrix_lr: float = setting(0.03)  # Muon, spectral norm per update
    embed_lr: float = setting(0.02)  # AdamW, tables
    scalar_lr: float = setting(0.01)  # AdamW, gains and gates
    # Weight decay of the whole run; a step decays by its lr * this * its share of the run.
    decay_per_run: float = setting(160.0)
    # The best one rises with batch and steps: 0.97 for the official run by extrapolation, 0.95 for
    # 3,200 steps of 98,304 tokens, less for shorter runs (docs/LADDER.md).
    muon_momentum: float = setting(0.97, high=BELOW_ONE)
    # Momentum starts here and rises linearly over so many steps: without, 0.002 bpb worse.
    muon_momentum_warmup_start: float = setting(0.92, high=BELOW_ONE)
    muon_momentum_warmup_steps: int = setting(320)
    # NorMuon, decay per step of the mean squares that equalise the neurons of an update.
    muon_beta2: float = setting(0.95, high=BELOW_ONE)
    beta1: float = setting(0.9, high=BELOW_ONE)  # AdamW, decay of the mean gradient per step
    beta2: float = setting(0.95, high=BELOW_ONE)  # AdamW, of its square; short, as the run is
    adam_eps: float = setting(1e-8, low=1e-12)  # AdamW, floor of the root mean square gradient
    grad_clip_norm: float = setting(0.3)  # global L2 norm; 0: no clipping

    # Schedule
    iterations: int = setting(20_000, low=1)  # steps; this or the clock ends the run
    max_wallclock_seconds: float = setting(600.0)  # training clock; 0: no cap
    train_batch_tokens: int = setting(786_432, low=1)  # per step, over all ranks
    train_seq_len: int = of_model(2048, low=1)  # tokens of context, in training and evaluation
    # Training sequences are cut into such short ones in the first `early_fraction` of the run:
    # faster, as attention is a third of a step, and better even at equal steps (docs/LADDER.md).
    # 0: never.
    early_seq_len: int = setting(1024)
    early_fraction: float = setting(0.5, 0, 1)
    # Most tokens that one rank runs at once; it changes no gradient but by rounding.
    micro_batch_tokens: int = setting(98_304, trains=False)
    lr_warmup_steps: int = setting(30)  # from 0; without, the tied table jumps at first
    warmdown_fraction: float = setting(0.85, 1e-12, 1)  # of the run: lr falls linearly to 0
    warmdown_iters: int = setting(0)  # the same in steps; 0: use the fraction
    swa_threshold: float = setting(0.2)  # average the masters while the lr scale is below
    qat_threshold: float = setting(0.15)  # round the working weights while it is below
    # Untimed steps on random tokens that compile each graph; they are undone bit for bit.
    warmup_steps: int = setting(2, low=1, trains=False)

    # Export, evaluation and log
    artifact_bytes: int = scoring(16_000_000)  # code plus packed weights stay below
    # What is packed: 0 is the last iterate, 1 the average, between them a blend.  0.15 is better
    # than 0.3 by 0.0013 after 3,200 steps of 393,216 tokens (docs/ABLATIONS.md, "The blend").
    swa_share: float = scoring(0.15, 0, 1)
    # Quantisation step of the first and last layer, relative to the other layers.
    int8_step_ratio: float = scoring(0.7)
    # The same of the tied table; 0: each row gets the step that its own maximum needs.
    tok_emb_step_ratio: float = scoring(0.0)
    ve_emb_step_ratio: float = scoring(0.0)  # of the value embedding
    zstd_level: int = scoring(22, low=1, high=22)  # the highest; packing takes seconds
    eval_stride: int = scoring(64)  # new tokens scored per sliding window; 0: plain only
    val_batch_size: int = scoring(524_288, low=1)  # tokens per evaluation batch, over all ranks
    eval_dump: str = process("")  # path: per-token losses of the last evaluation (NumPy .npz)
    val_loss_every: int = label(1000)  # steps; 0: only at the end
    train_log_every: int = label(200, low=1)  # steps

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def softcap(self) -> Softcap:
        return Softcap(self.logit_softcap, self.logit_shift, self.logit_width)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Hyperparameters:
        """Preset plus overrides.  A name that looks like a setting but is none is refused."""
        return cls(**preset_of(env) | overrides(env))

    def __post_init__(self) -> None:
        """Raises RunError for the first value or combination that cannot run."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str):
                choices = field.metadata["choices"]
                allowed = not choices or value in choices
                self.check(field.name, allowed, f"set {' or '.join(choices)}")
            else:
                low, high = field.metadata["low"], field.metadata["high"]
                self.check(field.name, low <= value <= high, f"set it within {low} to {high}")
        self.check_divides("num_heads", "model_dim")
        self.check_divides("num_kv_heads", "num_heads")
        self.check_divides("train_seq_len", "train_batch_tokens")
        if self.early_fraction and 0 < self.early_seq_len < self.train_seq_len:
            self.check_divides("early_seq_len", "train_seq_len", ", or set 0 for none")
        self.check_at_most("train_seq_len", "micro_batch_tokens")
        self.check_at_most("eval_stride", "train_seq_len")
        self.check_at_most("rope_dims", "head_dim")
        self.check_at_most("gate_dims", "model_dim")
        self.check_at_most("smear_dims", "model_dim")
        self.check_at_most("xsa_layers", "num_layers")
        self.check_at_most("ve_layers", "num_layers")
        self.check("rope_dims", self.rope_dims % 2 == 0, "must be even")
        one_source = not (self.eval_only and self.resume_from)
        self.check("eval_only", one_source, "unset it or RESUME_FROM")
        count = self.parameters()
        remedy = f"{count:,} weights need 1 bit each; raise it or lower MLP_HIDDEN"
        self.check("artifact_bytes", count // 8 < self.artifact_bytes, remedy)

    def check(self, name: str, holds: bool, remedy: str) -> None:
        require(holds, f"{name.upper()}={getattr(self, name)!r}: {remedy}")

    def check_divides(self, name: str, other: str, alternative: str = "") -> None:
        whole = getattr(self, other)
        divides = whole % getattr(self, name) == 0
        self.check(name, divides, f"must divide {other.upper()}={whole}{alternative}")

    def check_at_most(self, name: str, other: str) -> None:
        most = getattr(self, other)
        self.check(name, getattr(self, name) <= most, f"must not exceed {other.upper()}={most}")

    def parameters(self) -> int:
        """Number of trained parameters, from the shapes alone."""
        return sum(math.prod(row.shape) for row in parameter_table(self).values())


ARCHITECTURE = tuple(
    field.name for field in dataclasses.fields(Hyperparameters) if field.metadata["architecture"]
)

# RESUME_FROM takes these from the environment, all others from its checkpoint.
OF_THIS_PROCESS = tuple(
    field.name for field in dataclasses.fields(Hyperparameters) if field.metadata["of_process"]
)

# A checkpoint has all of these: the default of a missing one need not be what trained it.
OF_TRAINING = tuple(
    field.name for field in dataclasses.fields(Hyperparameters) if field.metadata["trains"]
)

PRESETS: dict[str, dict[str, Any]] = {
    "card": {},
    # The card plus what pays but is none of its named techniques.
    "frontier": dict(
        run_id="frontier",
        vocab_size=8192,  # of case-marked text: pieces go to words, not to their capital twins
        data_path="./data/datasets/fineweb_case_sp8192",
        tokenizer_path="./data/tokenizers/fineweb_case_8192_bpe.model",
        mlp_hidden=1536,
        key_shift=1,  # in the 64 dims of a head that carry no position
        gate_dims=12,
        tok_emb_step_ratio=0.5,
        ve_emb_step_ratio=2.0,
    ),
    # The same code at a size for a CPU, with a minute of training at most.
    "smoke": dict(
        run_id="smoke",
        data_path="sample",
        tokenizer_path="",
        output_dir="./smoke_run",
        num_layers=4,
        model_dim=128,
        num_heads=4,
        num_kv_heads=2,
        mlp_hidden=352,
        rope_dims=8,
        xsa_layers=2,
        ve_dim=32,
        muon_momentum=0.95,
        iterations=300,
        max_wallclock_seconds=60.0,
        train_seq_len=256,
        early_seq_len=128,
        train_batch_tokens=4096,
        val_batch_size=16_384,
        val_loss_every=100,
        train_log_every=20,
    ),
}

# The frontier on the published shards of 8192 pieces, which have no case marks.
PRESETS["frontier_plain"] = PRESETS["frontier"] | dict(
    run_id="frontier_plain",
    data_path="./data/datasets/fineweb10B_sp8192",
    tokenizer_path="./data/tokenizers/fineweb_8192_bpe.model",
)

# Settings of the challenge's baseline that mean nothing here -> what to set instead.
RETIRED = {
    "MLP_MULT": "MLP_HIDDEN",
    "TIED_EMBED_LR": "EMBED_LR",
    "HEAD_LR": "EMBED_LR",
    "TIED_EMBED_INIT_STD": "EMBED_INIT_STD",
    "WEIGHT_DECAY": "DECAY_PER_RUN",
    "MUON_BACKEND_STEPS": "nothing: Polar Express has five",
    "TIE_EMBEDDINGS": "nothing: they are always tied",
}


def settings_of_process(env: Mapping[str, str]) -> Hyperparameters:
    """What it takes to read RESUME_FROM's checkpoint, whose own settings are not known yet."""
    chosen = preset_of(env) | overrides(env)
    return Hyperparameters(**{name: chosen[name] for name in OF_THIS_PROCESS if name in chosen})


def settings_of_weights(saved: Mapping[str, Any], env: Mapping[str, str]) -> Hyperparameters:
    """The settings that RESUME_FROM's checkpoint was trained with.

    A variable in `env` wins where it changes only what comes after training.  Raises RunError for
    one that would have trained other weights.
    """
    chosen = overrides(env)
    values = preset_of(env)
    for field in dataclasses.fields(Hyperparameters):
        name = field.name
        if name in OF_THIS_PROCESS or name not in saved:  # a setting of scoring may be younger
            continue
        values[name] = saved[name]
        value = chosen.get(name, saved[name])
        require(
            value == saved[name] or not field.metadata["trains"],
            f"{name.upper()}={value!r}: RESUME_FROM={env['RESUME_FROM']} was trained with "
            f"{saved[name]!r}; unset it or set {name.upper()}={saved[name]}",
        )
    return Hyperparameters(**values | chosen)


def preset_of(env: Mapping[str, str]) -> dict[str, Any]:
    preset = env.get("PRESET", "card")
    require(preset in PRESETS, f"PRESET={preset!r}: unknown; set one of {', '.join(PRESETS)}")
    return dict(PRESETS[preset])


def overrides(env: Mapping[str, str]) -> dict[str, Any]:
    """Values by field.  Raises RunError for what looks like a setting but is none."""
    # Annotations are strings in this file, so a field's type is the name of its type.
    fields = dataclasses.fields(Hyperparameters)
    kinds = {field.name.upper(): str(field.type) for field in fields}
    values = {}
    for name, text in env.items():
        if name in kinds:
            values[name.lower()] = parse_override(name, text, kinds[name])
            continue
        if name in RETIRED:
            raise RunError(f"{name}={text!r}: not a setting here; set {RETIRED[name]}")
        close = difflib.get_close_matches(name, kinds, n=1, cutoff=0.9)
        if name.upper() in kinds:
            close = [name.upper()]
        if close:
            raise RunError(f"{name}={text!r}: unknown variable; did you mean {close[0]}?")
    return values


def parse_override(name: str, text: str, kind: str) -> int | float | str:
    """`text` as int, float or str.  Raises RunError with the variable, the value and the fix."""
    if kind == "str":
        return text
    with contextlib.suppress(ValueError):
        value = int(text) if kind == "int" else float(text)
        if 0 <= value < math.inf:
            return value
    raise RunError(f"{name}={text!r}: expected a finite {kind} of at least 0; set one or unset it")


# ---- 3. Runtime ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Runtime:
    """Where this process stands among the ranks, and what it computes on."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    compile_backend: str = "none"

    @classmethod
    def start(cls, h: Hyperparameters, env: Mapping[str, str]) -> Runtime:
        """Joins torchrun's process group, if there is one, and claims the device."""
        rank, local_rank, world_size = launch_of(env)
        gpus = torch.cuda.device_count()
        on_cuda = gpus > 0 if h.device == "auto" else h.device == "cuda"
        # Asking for the list imports the compiler, which takes 2 s.
        known = h.compile_backend in ("auto", "none", "inductor")
        require(
            known or h.compile_backend in torch.compiler.list_backends(()),
            f"COMPILE_BACKEND={h.compile_backend!r}: set auto, none or inductor",
        )
        require(
            not on_cuda or local_rank < gpus,
            f"DEVICE={h.device}, LOCAL_RANK={local_rank}: found {gpus} GPUs; "
            "lower --nproc_per_node or set DEVICE=cpu",
        )
        backend = h.compile_backend
        if backend == "auto":
            backend = "inductor" if on_cuda else "none"
        if on_cuda:
            torch.cuda.set_device(local_rank)
        if world_size > 1:
            collectives = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
            try:
                dist.init_process_group(collectives)
            except (RuntimeError, ValueError) as error:
                raise RunError(
                    f"MASTER_ADDR={env['MASTER_ADDR']}, MASTER_PORT={env['MASTER_PORT']}: the "
                    f"{world_size} processes do not meet there ({str(error).splitlines()[0]}); "
                    "start all of them with torchrun, or set a free port"
                ) from None
        device = f"cuda:{local_rank}" if on_cuda else "cpu"
        return cls(torch.device(device), rank, world_size, backend)

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of working weights and activations."""
        return torch.bfloat16 if self.on_cuda else torch.float32

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """`function` as one graph per set of static shapes, or unchanged on a bare CPU."""
        if self.compile_backend == "none":
            return function
        # Inductor's mix_order_reduction makes RMS-norm backward 6 ms slower (pytorch #179494).
        torch._inductor.config.triton.mix_order_reduction = False
        torch._dynamo.config.recompile_limit = 64
        announce_operators()
        inductor_options = options if self.compile_backend == "inductor" else None
        return torch.compile(
            function,
            backend=self.compile_backend,
            dynamic=False,
            fullgraph=True,
            options=inductor_options,
        )

    def agree_on(self, value: Any) -> Any:
        """Rank 0's `value` on every rank; host-side, so the GPU's queue is not drained."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def check_alike(self, facts: Mapping[str, Any]) -> None:
        """Raises RunError if a rank has others: every node has its own environment and disk."""
        first, *others = self.gather(dict(facts))
        for rank, found in enumerate(others, 1):
            for name, value in first.items():
                require(
                    found.get(name) == value,
                    f"rank {rank}: {name}={found.get(name)!r}, but rank 0 has {value!r}; start "
                    "every node with the same settings, train_gpt.py and data",
                )

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` itself, summed over ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor


def same_on_all_ranks(h: Hyperparameters) -> dict[str, Any]:
    """What must not differ between ranks: every setting but names and places, and the code."""
    own = ("preset", "run_id", "data_path", "tokenizer_path", "output_dir", "eval_dump",
           "resume_from")  # fmt: skip
    values = {name.upper(): value for name, value in asdict(h).items() if name not in own}
    values["EVAL_ONLY"] = bool(h.eval_only)  # the file itself is read by rank 0
    return values | {"SHA-256 of train_gpt.py": own_digest()}


def launch_of(env: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, local rank, world size) of torchrun's variables; all of them or none are set.

    Raises RunError for anything else: a process that takes itself for the only one would train and
    write beside the others.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    present = [name for name in names if name in env]
    if not present:
        return 0, 0, 1
    remedy = "start it with torchrun, or unset " + " ".join(present)
    missing = [name for name in names if not env.get(name)]
    require(not missing, f"{' '.join(missing)}: missing or empty beside {present[0]}; {remedy}")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        require(env[name].isdecimal(), f"{name}={env[name]!r}: expected a whole number; {remedy}")
    rank, local_rank, world_size = (int(env[name]) for name in names[:3])
    port = int(env["MASTER_PORT"])
    require(0 < port < 1 << 16, f"MASTER_PORT={port}: expected 1 to 65535; {remedy}")
    inside = local_rank <= rank < world_size
    require(inside, f"RANK={rank}, WORLD_SIZE={world_size}: not a rank of that many; {remedy}")
    return rank, local_rank, world_size


class RunLog:
    """Lines to the terminal and to a file, by rank 0 alone; the file alone reproduces the run."""

    CLEAR_LINE = "\033[K"

    def __init__(self, path: Path | None, head: str = ""):
        self.path = path
        self.terminal = path is not None and sys.stdout.isatty()
        self.tenth = -1  # of the work that `progress` last reported
        self.unwritten = b""  # what a full disk has not taken yet
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(head)

    def __call__(self, line: str) -> None:
        if not self.path:
            return
        line = line.encode(errors="backslashreplace").decode()  # names of files may hold any byte
        self.unwritten += line.encode() + b"\n"
        # A full disk must not end the training: the next line tries again, and `RunFiles.finish`
        # raises if the disk is still full at the end.
        with contextlib.suppress(OSError):
            self.flush()
        if self.terminal:  # what progress left there goes
            line = self.CLEAR_LINE + line
        self.show(line + "\n")

    def flush(self) -> None:
        """Writes all lines to the file.  Raises OSError if it takes no more."""
        if self.path and self.unwritten:
            with self.path.open("ab", buffering=0) as file:
                while self.unwritten:
                    self.unwritten = self.unwritten[file.write(self.unwritten) :]

    def show(self, text: str) -> None:
        """On standard output, as long as somebody reads it: a run goes on after `| head`."""
        try:
            print(text, end="", flush=True)
        except OSError:
            self.terminal = False
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def progress(self, line: str, share: float = 0.0) -> None:
        """On a terminal a line that the next one overwrites, elsewhere one for each tenth."""
        tenth = int(10 * share)
        if self.terminal:
            self.show(self.CLEAR_LINE + line + "\r")
        elif tenth != self.tenth:
            self(line)
        self.tenth = tenth


def write_atomic(path: Path, content: bytes) -> None:
    """Either the whole new file or the old one: temporary file, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:  # a full disk needs the room for what comes next
        temporary.unlink(missing_ok=True)
        raise


# ---- 4. Data ------------------------------------------------------------------------------------
def read_shard(path: Path) -> np.ndarray:
    """Memory-mapped uint16 tokens of one shard.  Raises RunError if it is not a whole shard."""
    try:
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be mapped ({error}); {GET_DATA}") from None
    # Windows are drawn at random: without this a cold batch of 48 took 800 ms, with it 1 ms.
    pages.madvise(mmap.MADV_RANDOM)
    magic, version, count = struct.unpack("<3i", pages[:12].ljust(12, b"\0"))
    expected = SHARD_HEADER_BYTES + 2 * count
    whole = (magic, version, len(pages)) == (SHARD_MAGIC, SHARD_VERSION, expected) and count >= 0
    require(
        whole,
        f"{path}: expected {expected} bytes of magic {SHARD_MAGIC}, version {SHARD_VERSION}, "
        f"found {len(pages)} of {[magic, version]}; {GET_DATA}",
    )
    return np.frombuffer(pages, dtype="<u2", offset=SHARD_HEADER_BYTES)


def is_shard(name: str) -> bool:
    """Six digits exactly: a second download, or bytes per token beside the tokens, is no shard."""
    return re.fullmatch(r"fineweb_(train|val)_[0-9]{6}\.bin", name) is not None


def misnamed_shards(data_path: str) -> list[str]:
    """Names of the files that look like shards and are not read as such."""
    folder = Path(data_path)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    alike = [name for name in names if re.search(r"^fineweb_|\.bin\b", name, re.IGNORECASE)]
    return [name for name in alike if not is_shard(name)]


def shard_paths(data_path: str, split: str) -> list[Path]:
    """The shards of `split` (train or val), in name order."""
    paths = sorted(Path(data_path).glob(f"fineweb_{split}_*.bin"))
    return [path for path in paths if is_shard(path.name)]


def open_split(data_path: str, split: str) -> list[np.ndarray]:
    """The tokens of each shard of `split`.  Raises RunError if there is none."""
    paths = shard_paths(data_path, split)
    others = "".join(f" {name!r}" for name in misnamed_shards(data_path)[:3])
    require(
        paths,
        f"DATA_PATH={data_path}: found no fineweb_{split}_NNNNNN.bin"
        f"{others and f', only{others}, which are no shards'}; {GET_DATA}",
    )
    return [read_shard(path) for path in paths]


def digest_of(shards: list[np.ndarray]) -> str:
    """SHA-256 of the tokens of a split, in their order.

    Of a shard in a split of more than 2^28 tokens it takes 256 blocks of 4,096, evenly spread: 16
    GB of training text would take a minute, and another text differs in every block.
    """
    whole = sum(map(len, shards)) <= 1 << 28  # half a second
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(struct.pack("<q", len(shard)))
        if whole or len(shard) <= 1 << 20:
            digest.update(shard.data)
            continue
        for first in np.linspace(0, len(shard) - 4096, 256).astype(int):
            digest.update(shard[first : first + 4096].tobytes())
    return digest.hexdigest()


def read_manifest(data_path: str) -> dict[str, Any]:
    """The manifest.json that prepare_data.py writes beside shards; empty if there is none."""
    try:
        manifest = json.loads((Path(data_path) / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def check_tokenizer(h: Hyperparameters) -> None:
    """Raises RunError if the manifest of the shards names another tokenizer than TOKENIZER_PATH."""
    stated = read_manifest(h.data_path).get("tokenizer")
    if isinstance(stated, dict) and stated.get("sha256") is not None:
        stated = stated["sha256"]
        found = file_digest(Path(h.tokenizer_path))
    elif isinstance(stated, str) and len(stated) == 32:  # manifests before version 2
        model = Path(h.tokenizer_path).read_bytes()
        found = hashlib.blake2b(model, digest_size=16).hexdigest()
    else:  # no manifest, or one of another program: the check of documents remains
        return
    require(
        stated == found,
        f"TOKENIZER_PATH={h.tokenizer_path}: its digest is {found}, but manifest.json in "
        f"DATA_PATH={h.data_path} names {stated}; set the tokenizer of these shards",
    )


def vocabulary_fault(tokens: np.ndarray, vocab_size: int, source: str) -> str:
    """Why `tokens` cannot be of the vocabulary; empty if they can."""
    highest = int(tokens.max(initial=0))
    if highest < vocab_size:
        return ""
    return (
        f"{source}: token id {highest} found, expected less than VOCAB_SIZE={vocab_size}; "
        "use the shards of this vocabulary"
    )


def check_vocabulary(tokens: np.ndarray, vocab_size: int, source: str) -> None:
    fault = vocabulary_fault(tokens, vocab_size, source)
    require(not fault, fault)


class BatchPlan:
    """Windows of all shards, shuffled by the seed; every epoch has an offset and order of its own.

    Batch i is the same (batch_seqs, T+1) tokens for any number of ranks, which read their rows.
    """

    def __init__(self, shards: list[np.ndarray], seq_len: int, batch_seqs: int, seed: int):
        self.shards = shards
        self.seq_len = seq_len
        self.batch_seqs = batch_seqs
        self.seed = seed
        # One window fewer than fit: every epoch starts at another offset below seq_len.
        windows = [max(0, len(shard) // seq_len - 1) for shard in shards]
        self.starts = np.cumsum([0, *windows])  # number of each shard's first window
        self.windows_per_epoch = int(self.starts[-1])
        require(
            self.windows_per_epoch,
            f"training shards: expected at least one of {2 * seq_len} tokens, found "
            f"{max(map(len, shards))}; lower TRAIN_SEQ_LEN or add text",
        )
        self.digest = digest_of(shards)
        self.current_epoch = functools.lru_cache(maxsize=1)(self.epoch)

    def epoch(self, number: int) -> tuple[int, np.ndarray]:
        """Offset of all windows, in tokens, and the order of the windows."""
        generator = np.random.Generator(np.random.PCG64([self.seed, number]))
        offset = int(generator.integers(self.seq_len))
        return offset, generator.permutation(self.windows_per_epoch)

    def window(self, position: int) -> tuple[int, int]:
        """(shard, first token) of the window at `position` of the endless shuffled sequence."""
        number, index = divmod(position, self.windows_per_epoch)
        offset, order = self.current_epoch(number)
        shard = int(np.searchsorted(self.starts, order[index], side="right")) - 1
        return shard, offset + int(order[index] - self.starts[shard]) * self.seq_len

    def tokens(self, step: int, rows: range) -> np.ndarray:
        """Rows of batch `step`: (len(rows), T+1) int64, inputs and targets overlapping."""
        windows = []
        for row in rows:
            shard, first = self.window(step * self.batch_seqs + row)
            windows.append(self.shards[shard][first : first + self.seq_len + 1])
        return np.stack(windows, dtype=np.int64)


class Batch(NamedTuple):
    """One rank's part of a batch."""

    tokens: Tensor  # (rows, T+1) int64
    fault: str  # why it cannot be trained on, and then `tokens` are zeros; empty if it can


def prefetch(
    plan: BatchPlan, rows: range, vocab_size: int, device: torch.device, depth: int = 4
) -> Generator[Batch]:
    """This rank's rows of batches 0, 1, 2 ... on `device`, read `depth` ahead by one thread."""

    def read(step: int) -> Batch:
        tokens = plan.tokens(step, rows)
        fault = vocabulary_fault(tokens, vocab_size, f"training batch {step}")
        if fault:
            tokens = np.zeros_like(tokens)
        batch = torch.from_numpy(tokens)
        return Batch(batch.pin_memory() if device.type == "cuda" else batch, fault)

    with ThreadPoolExecutor(1) as reader:
        pending = collections.deque(reader.submit(read, step) for step in range(depth))
        for step in itertools.count(depth):
            pending.append(reader.submit(read, step))
            batch = pending.popleft().result()
            yield batch._replace(tokens=batch.tokens.to(device, non_blocking=True))


# ---- 5. Model -----------------------------------------------------------------------------------
RMS_EPS = 1e-6
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B,T,H,E), k and v (B,T,K,E) -> (B,T,H,E)
Fill = Callable[[Tensor, torch.Generator], Tensor]  # writes starting values into a tensor
# w (N,R,C), grid step (0-d), qmax and step ratio (N,1,1) -> w on the grid
Round = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Role(NamedTuple):
    """What one matrix per layer of a bank is for."""

    name: str
    # It writes to the residual stream, and starts at zero so that blocks start as the identity.
    # A matrix that reads it starts orthogonal (every record since pg#198).
    writes: bool = False
    # It is stored (in, out), so that it has the shape of the bank's other role.
    transposed: bool = False


class Grid(NamedTuple):
    """How a parameter, seen as N matrices (N, R, C), is rounded for the artifact (section 7)."""

    qmax: tuple[int, ...]  # largest code of each matrix: 31 for int6, 127 for int8
    step_ratio: tuple[float, ...]  # row scales are at least this * grid step; 0: no such floor

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """qmax and step_ratio as (N, 1, 1) float32."""
        qmax = torch.tensor(self.qmax, dtype=torch.float32, device=device)
        ratio = torch.tensor(self.step_ratio, dtype=torch.float32, device=device)
        return qmax.view(-1, 1, 1), ratio.view(-1, 1, 1)

    def shard(self, rank: int, world_size: int) -> Grid:
        """The grid of one rank's ceil(N / world_size) matrices; padding gets ones."""
        per_rank = math.ceil(len(self.qmax) / world_size)
        mine = slice(rank * per_rank, (rank + 1) * per_rank)
        padding = (1,) * (per_rank * world_size - len(self.qmax))
        return Grid((self.qmax + padding)[mine], (self.step_ratio + padding)[mine])


class ParameterRow(NamedTuple):
    """All that the program must know of one parameter."""

    shape: tuple[int, ...]
    group: str  # optimizer and learning rate: matrix (Muon), embed or scalar (AdamW)
    fill: Fill  # its starting value
    grid: Grid | None = None  # None: the artifact stores it in float16
    roles: tuple[Role, ...] = ()  # of a bank: first one role for all layers, then the next


def normal(std: float) -> Fill:
    return lambda w, generator: w.normal_(std=std, generator=generator)


def constant(value: float) -> Fill:
    return lambda w, generator: w.fill_(value)


def keep_embedding_out(w: Tensor, generator: torch.Generator) -> Tensor:
    """resid_mix (L, 2, D): all of the stream, nothing of the embedding."""
    w[:, 0] = 1.0
    return w


def fill_bank(*roles: Role) -> Fill:
    def fill(w: Tensor, generator: torch.Generator) -> Tensor:
        for role, matrices_of_role in zip(roles, w.chunk(len(roles)), strict=True):
            if role.writes:
                continue
            for matrix in matrices_of_role:
                nn.init.orthogonal_(matrix, generator=generator)
        return w

    return fill


def parameter_table(h: Hyperparameters) -> dict[str, ParameterRow]:
    """Every parameter, a row each; starting values, optimizer groups and grids derive from it.

    Matrices of one shape form a bank, a 3-D parameter, so that the optimizer treats them as one
    batch.  To add a parameter, add its row here and use it in `GPT`.
    """
    layers = h.num_layers
    dim = h.model_dim
    kv_dim = h.kv_dim

    def bank(rows: int, columns: int, *roles: Role) -> ParameterRow:
        outer = (0, layers - 1)  # the first and the last layer are int8
        qmax = tuple(127 if layer in outer else 31 for layer in range(layers))
        ratio = tuple(h.int8_step_ratio if layer in outer else 1.0 for layer in range(layers))
        grid = Grid(qmax * len(roles), ratio * len(roles))
        shape = (len(roles) * layers, rows, columns)
        return ParameterRow(shape, "matrix", fill_bank(*roles), grid, roles)

    table = {
        "tok_emb": ParameterRow(
            (h.vocab_size, dim),
            "embed",
            normal(h.embed_init_std),
            Grid((127,), (h.tok_emb_step_ratio,)),
        ),
        "ve_emb": ParameterRow(
            (h.vocab_size, h.ve_dim), "embed", normal(0.01), Grid((127,), (h.ve_emb_step_ratio,))
        ),
        "qo_bank": bank(dim, dim, Role("q"), Role("o", writes=True)),
        "kv_bank": bank(kv_dim, dim, Role("k"), Role("v")),
        "mlp_bank": bank(h.mlp_hidden, dim, Role("up"), Role("down", writes=True, transposed=True)),
        "ve_proj": ParameterRow(
            (1, kv_dim, h.ve_dim), "matrix", constant(0.0), Grid((127,), (0.0,))
        ),
        "smear_gate": ParameterRow((dim,), "scalar", constant(0.0)),
        "smear_token": ParameterRow((h.smear_dims,), "scalar", constant(0.0)),
        "resid_mix": ParameterRow((layers, 2, dim), "scalar", keep_embedding_out),
        "attn_scale": ParameterRow((layers, dim), "scalar", constant(1.0)),
        "mlp_scale": ParameterRow((layers, dim), "scalar", constant(1.0)),
        "q_gain": ParameterRow((layers, h.num_heads), "scalar", constant(h.qk_gain_init)),
        "skip_weight": ParameterRow((layers // 2, dim), "scalar", constant(1.0)),
        "ve_scale": ParameterRow((h.ve_layers,), "scalar", constant(0.1)),
    }
    if h.gate_dims:
        gates = (layers, h.num_heads, h.gate_dims)
        table["attn_gate"] = ParameterRow(gates, "scalar", constant(0.0))
    return table


def export_grids(h: Hyperparameters) -> dict[str, Grid]:
    """The grid of every rounded parameter; a parameter without one is stored in float16."""
    return {name: row.grid for name, row in parameter_table(h).items() if row.grid}


def initial_weights(h: Hyperparameters) -> dict[str, Tensor]:
    """float32 starting point from the seed."""
    generator = torch.Generator().manual_seed(h.seed)
    table = parameter_table(h)
    return {name: row.fill(torch.zeros(row.shape), generator) for name, row in table.items()}


class LayerPlan(NamedTuple):
    """What one layer of the forward pass is made of."""

    number: int  # of its matrices in the banks and its rows in the vectors
    depth_scale: float  # factor on the normed input of attention and MLP
    saves_skip: bool  # encoder half: a decoder layer gets its output
    skip: int | None  # decoder half: row of skip_weight; None: it gets no skip
    value_embedding: int | None  # row of ve_scale; None: it adds no value embedding
    excludes_self: bool  # XSA


Plan = tuple[LayerPlan, ...]  # the layers in the order in which they run


def depth_scale(index: int) -> float:
    """Deeper layers read a smaller input, which damps what they add (pg#315)."""
    return (index + 1) ** -0.5


def layer_plan(h: Hyperparameters) -> Plan:
    """Each layer once."""
    half = h.num_layers // 2
    decoder = h.num_layers - half  # its first layer; with an odd number one layer is in no half

    def row_of(layer: int, first: int) -> int | None:
        """Row of a vector that only layers from `first` on have."""
        return layer - first if layer >= first else None

    return tuple(
        LayerPlan(
            number=i,
            depth_scale=depth_scale(i),
            saves_skip=i < half,
            skip=row_of(i, decoder),
            value_embedding=row_of(i, h.num_layers - h.ve_layers),
            excludes_self=i >= h.num_layers - h.xsa_layers,
        )
        for i in range(h.num_layers)
    )


def rms_norm(x: Tensor) -> Tensor:
    """Unit root mean square over the last dimension, statistics in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_EPS)).to(x.dtype)


def rotary_table(length: int, dims: int, base: float, device: torch.device) -> Tensor:
    """cos and sin, stacked: (2, T, 1, dims/2) float32."""
    frequency = base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()))[:, :, None, :]


def apply_rotary(x_BTHE: Tensor, table: Tensor) -> Tensor:
    """Rotates the first dims of every head and leaves the others: partial RoPE (pg#315)."""
    half = table.shape[-1]
    cos, sin = table.to(x_BTHE.dtype)
    a, b, rest = x_BTHE.split((half, half, x_BTHE.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), dim=-1)


def project_heads(
    x_BTD: Tensor, w_CD: Tensor, gain_H: Tensor, rotary: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and rotated q (B,T,H,E) and k (B,T,K,E), and v, from C = (H + 2K) E projections.

    With q and k normed, attention logits cannot grow with the weights; `gain_H` sharpens them.
    """
    heads = len(gain_H)
    width = x_BTD.shape[-1] // heads
    qkv = F.linear(x_BTD, w_CD).unflatten(-1, (-1, width))
    kv_heads = (qkv.shape[2] - heads) // 2
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
    q = apply_rotary(rms_norm(q), rotary) * gain_H[:, None]
    k = apply_rotary(rms_norm(k), rotary)
    return q, k, v


def shift_keys(k_BTKE: Tensor, rotated: int) -> Tensor:
    """Keys whose dims after the first `rotated` come from the previous token.

    A query then finds what followed an earlier token like its own in one layer instead of two
    (modded-nanogpt's key offset).
    """
    now, before = k_BTKE.split((rotated, k_BTKE.shape[-1] - rotated), dim=-1)
    return torch.cat((now, F.pad(before, (0, 0, 0, 0, 1, 0))[:, :-1]), dim=-1)


def add_value_embedding(v_BTKE: Tensor, ve_BTC: Tensor, scale: Tensor) -> Tensor:
    """Values plus the token's row of a table of its own (pg#374)."""
    return v_BTKE + (scale * ve_BTC).view(v_BTKE.shape)


def sdpa(*backends: SDPBackend) -> Attend:
    """PyTorch's attention through one of `backends`; none named leaves the choice to PyTorch."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(list(backends)) if backends else contextlib.nullcontext():
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return y.transpose(1, 2)

    return attend


def exclude_self(y_BTHE: Tensor, v_BTKE: Tensor) -> Tensor:
    """XSA (pg#287): each head's output less its part along the token's own value.

    The residual stream holds the token already; attention then brings only what others say.
    """
    y = y_BTHE.unflatten(2, (v_BTKE.shape[2], -1)).float()  # (B, T, K, H/K, E)
    v = v_BTKE[:, :, :, None].float()  # (B, T, K, 1, E)
    along = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp_min(1e-6)
    return (y - along * v).to(y_BTHE.dtype).view(y_BTHE.shape)


def gate_heads(y_BTHE: Tensor, x_BTD: Tensor, gate_HC: Tensor) -> Tensor:
    """Each head's output times a factor from the first C dims of x, 1 at first (modded-nanogpt)."""
    factor_BTH = 2 * torch.sigmoid(F.linear(x_BTD[..., : gate_HC.shape[1]], gate_HC))
    return y_BTHE * factor_BTH[..., None]


def relu2_mlp(x_BTD: Tensor, up_FD: Tensor, down_FD: Tensor, scale: float, slope: float) -> Tensor:
    """leaky_relu(scale norm(x) up^T)^2 down (So et al., Primer, 2021; the slope: pg#493)."""
    return F.leaky_relu(F.linear(rms_norm(x_BTD) * scale, up_FD), slope).square() @ down_FD


def has_previous(inputs_BT: Tensor) -> Tensor:
    """(B, T, 1) bool: the previous token is in the window and of the same document."""
    first = torch.arange(inputs_BT.shape[1], device=inputs_BT.device) == 0
    return ((inputs_BT != BOS_ID) & ~first)[..., None]


def smear_factor(x_BTD: Tensor, token_C: Tensor) -> Tensor:
    """(B, T, 1), 1 at first: how much of the one before a token takes (modded-nanogpt)."""
    return 2 * torch.sigmoid(x_BTD[..., : len(token_C)] @ token_C)[..., None]


def smear(x_BTD: Tensor, gate_D: Tensor, token_C: Tensor, inputs_BT: Tensor) -> Tensor:
    """SmearGate (pg#65): blends the previous token's embedding into each token's.

    The share has a value per dimension, times a factor from the token's first C dims.  Nothing is
    taken across the start of a document, nor from before the window.
    """
    previous = F.pad(x_BTD, (0, 0, 1, 0))[:, :-1]
    share = has_previous(inputs_BT) * torch.sigmoid(gate_D) * smear_factor(x_BTD, token_C)
    return x_BTD + share * (previous - x_BTD)


class Softcap(NamedTuple):
    """Bounds logits x by height tanh((x + shift) / width) (Gemma 2: no shift, width = height)."""

    height: float
    shift: float
    width: float


def token_losses(x_BTD: Tensor, table_VD: Tensor, targets_BT: Tensor, cap: Softcap) -> Tensor:
    """float32 losses (B, T) from normed hidden states."""
    logits = F.linear(x_BTD, table_VD).float()
    logits = cap.height * torch.tanh((logits + cap.shift) / cap.width)
    losses = F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="none")
    return losses.view(targets_BT.shape)


def mean_token_loss(x_BTD: Tensor, table_VD: Tensor, targets_BT: Tensor, cap: Softcap) -> Tensor:
    """Their float32 mean, 0-d: the plain twin of FusedLoss."""
    return token_losses(x_BTD, table_VD, targets_BT, cap).mean()


class Kernels(NamedTuple):
    """The functions that have more than one implementation, as chosen at start-up (section 6)."""

    attend: Attend = sdpa()
    heads: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = project_heads
    mlp: Callable[[Tensor, Tensor, Tensor, float, float], Tensor] = relu2_mlp
    mean_loss: Callable[[Tensor, Tensor, Tensor, Softcap], Tensor] = mean_token_loss
    round: Round | None = None  # late QAT's; None: `fake_quantize`, the plain one of section 7


class Shared(NamedTuple):
    """What all layers of one forward pass read; the tuples hold one matrix per layer."""

    embedded_BTD: Tensor  # input of the first layer; every layer mixes some of it in again
    value_embedding_BTC: Tensor
    rotary: Tensor  # (2, T, 1, rope_dims / 2): cos and sin
    qkv_CD: tuple[Tensor, ...]  # C = (H + 2 K) E
    out_DD: tuple[Tensor, ...]
    up_FD: tuple[Tensor, ...]
    down_FD: tuple[Tensor, ...]


class GPT(nn.Module):
    """Decoder of L layers with U-Net skips.  Its parameters are those of `parameter_table`.

    `attention` and `feed_forward` have one convention: they get the residual stream x_BTD, the
    layer's plan and what all layers share, norm x themselves and return what is to be added to it.
    """

    def __init__(self, h: Hyperparameters, weights: Mapping[str, Tensor], kernels: Kernels):
        super().__init__()
        self.h = h
        self.kernels = kernels
        self.plan = layer_plan(h)
        for name in parameter_table(h):
            self.register_parameter(name, nn.Parameter(weights[name].clone()))

    if TYPE_CHECKING:  # nn.Module declares attributes as Tensor or Module; ours are parameters

        def __getattr__(self, name: str) -> Any: ...

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """float32 loss of each target in nats, (B, T)."""
        return self.losses(self.final_hidden(inputs_BT), targets_BT)

    def final_hidden(self, inputs_BT: Tensor) -> Tensor:
        """Residual stream after the last layer, (B, T, D)."""
        shared = self.shared(inputs_BT)
        x = shared.embedded_BTD
        skips: list[Tensor] = []
        for layer in self.plan:
            x = self.run_layer(x, layer, shared, skips)
        return x

    def run_layer(self, x: Tensor, layer: LayerPlan, shared: Shared, skips: list[Tensor]) -> Tensor:
        """The stream behind the layer; `skips` is the stack on which layers leave theirs."""
        x = self.mix_in(x, layer, shared, skips)
        x = x + self.attention(x, layer, shared)
        x = x + self.feed_forward(x, layer, shared)
        if layer.saves_skip:
            skips.append(x)
        return x

    def shared(self, inputs_BT: Tensor) -> Shared:
        """Embeds the tokens and splits the banks into one matrix per layer."""
        x = rms_norm(F.embedding(inputs_BT, self.tok_emb))
        x = smear(x, self.smear_gate, self.smear_token, inputs_BT)
        # Projecting the table before the look-up is the same value at V/(B*T) of the work.
        ve = F.embedding(inputs_BT, F.linear(self.ve_emb, self.ve_proj[0]))
        rotary = rotary_table(x.shape[1], self.h.rope_dims, self.h.rope_base, x.device)
        w_q, w_o = self.qo_bank.chunk(2)
        w_k, w_v = self.kv_bank.chunk(2)
        up, down = self.mlp_bank.chunk(2)
        # Output scales fold into the matrices, and q, k, v become one product per layer.
        out = w_o * self.attn_scale[:, :, None]
        down = down * self.mlp_scale[:, None]
        qkv = torch.cat((w_q, w_k, w_v), 1)
        # unbind, unlike indexing, has one backward kernel for all layers.
        return Shared(x, ve, rotary, qkv.unbind(0), out.unbind(0), up.unbind(0), down.unbind(0))

    def mix_in(self, x: Tensor, layer: LayerPlan, shared: Shared, skips: list[Tensor]) -> Tensor:
        """The layer's input: the stream, the embedding and, in the decoder half, a skip."""
        keep = self.resid_mix[layer.number, 0]
        mixed = self.resid_mix[layer.number, 1] * shared.embedded_BTD
        if layer.skip is not None:  # the last encoder layer's goes to the first decoder layer
            mixed += keep * self.skip_weight[layer.skip] * skips.pop()
        return keep * x + mixed

    def attention(self, x_BTD: Tensor, layer: LayerPlan, shared: Shared) -> Tensor:
        """What attention adds to the stream, (B, T, D)."""
        normed = rms_norm(x_BTD) * layer.depth_scale
        q, k, v = self.heads(normed, layer, shared)
        y = self.kernels.attend(q, k, v)  # (B, T, H, E)
        if layer.excludes_self:
            y = exclude_self(y, v)
        if self.h.gate_dims:
            y = gate_heads(y, normed, self.attn_gate[layer.number])
        return F.linear(y.flatten(2), shared.out_DD[layer.number])

    def heads(
        self, normed_BTD: Tensor, layer: LayerPlan, shared: Shared
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (B,T,H,E), k and v (B,T,K,E) as attention takes them."""
        i = layer.number
        q, k, v = self.kernels.heads(normed_BTD, shared.qkv_CD[i], self.q_gain[i], shared.rotary)
        if self.h.key_shift:
            k = shift_keys(k, self.h.rope_dims)
        if layer.value_embedding is not None:
            scale = self.ve_scale[layer.value_embedding]
            v = add_value_embedding(v, shared.value_embedding_BTC, scale)
        return q, k, v

    def feed_forward(self, x_BTD: Tensor, layer: LayerPlan, shared: Shared) -> Tensor:
        up = shared.up_FD[layer.number]
        down = shared.down_FD[layer.number]
        return self.kernels.mlp(x_BTD, up, down, layer.depth_scale, self.h.mlp_slope)

    def losses(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """float32 losses (B, T) from the final hidden states; the head is the tied table."""
        return token_losses(rms_norm(x_BTD), self.tok_emb, targets_BT, self.h.softcap)

    def mean_loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """float32 mean of the losses, 0-d: all that training needs."""
        x = rms_norm(self.final_hidden(inputs_BT))
        return self.kernels.mean_loss(x, self.tok_emb, targets_BT, self.h.softcap)


# ---- 6. Kernels ---------------------------------------------------------------------------------
# Fast twins of four functions of the model and of late QAT's rounding, for CUDA; skip this section
# on first reading.
jit = triton.jit if triton else lambda function: function
SM_COUNT = 132  # of an H100 or H200; with more programs than these, some would wait
HEAD_ROWS = 16  # tokens that one program of the kernel for heads takes
LOSS_VALUES = 32  # logits that one thread of `softcap_loss_kernel` holds
LOSS_REGISTERS = 64  # most registers of such a thread, so that more programs run at once


class Tiling(NamedTuple):
    """How a product is cut up for the programs that compute it."""

    rows: int  # of the output tile that a program computes at a time
    columns: int
    depth: int  # of the product, loaded at a time
    warps: int
    stages: int  # of loads under way
    programs: int  # resident on one SM


# Widths of n x 128 leave no partial tile.  bench/products.py times others.
RELU2_TILING = Tiling(128, 128, 64, warps=8, stages=3, programs=2)


def attention_candidates() -> dict[str, Attend]:
    """Kernels for CUDA, on an H100 the fastest first; FlashAttention-3 only where it imports."""
    candidates = {
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "flash": sdpa(SDPBackend.FLASH_ATTENTION),
    }
    with contextlib.suppress(ImportError):
        from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]

        return {"fa3": lambda q, k, v: flash_attn_func(q, k, v, causal=True)} | candidates
    return candidates


@jit
def linear_relu2_kernel(  # type: ignore[no-untyped-def]
    a_desc, b_desc, scales, post_desc, out_desc, SLOPE: tl.constexpr, BACKWARD: tl.constexpr
):
    """Forward: out = leaky_relu(a b^T * scale)^2.  BACKWARD: out = a b^T * scale * derivative.

    The derivative is 2 leaky_relu(u) times 1 or SLOPE, where u is what the forward pass squared.
    The square `post` gives |leaky_relu(u)|, but not the sign of u, so the forward pass writes that
    sign into the square's lowest bit: 1 if u is not negative.  Nothing else is stored.

    Each program takes one output tile after another.  It finishes a tile in quarters: the smaller
    output buffer leaves shared memory for loads.  Where an SM holds two programs, one multiplies
    while the other stores its tile.
    """
    # The lowest bit of the output, seen in float32: bfloat16 is the upper half of a float32.
    SIGN_BIT: tl.constexpr = 1 << 16 if out_desc.dtype == tl.bfloat16 else 1
    BLOCK_M: tl.constexpr = a_desc.block_shape[0]
    BLOCK_N: tl.constexpr = b_desc.block_shape[0]
    QUARTER: tl.constexpr = BLOCK_N // 4
    columns = tl.cdiv(out_desc.shape[1], BLOCK_N)
    tiles = tl.cdiv(out_desc.shape[0], BLOCK_M) * columns

    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m = (tile // columns) * BLOCK_M
        n = (tile % columns) * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, a_desc.shape[1], a_desc.block_shape[1]):
            total = tl.dot(a_desc.load([m, k]), b_desc.load([n, k]).T, total)
        rows = m + tl.arange(0, BLOCK_M)
        scale = tl.load(scales + rows, mask=rows < out_desc.shape[0], other=0.0)[:, None]

        # Triton cannot slice: columns are split in halves by making the half the last dimension.
        halves = tl.split(total.reshape(BLOCK_M, 2, 2 * QUARTER).permute(0, 2, 1))
        for i in tl.static_range(4):
            half = halves[i // 2].reshape(BLOCK_M, 2, QUARTER).permute(0, 2, 1)
            part = tl.split(half)[i % 2] * scale
            column = n + i * QUARTER
            if BACKWARD:
                post = post_desc.load([m, column]).to(tl.float32)
                positive = (post.to(tl.int32, bitcast=True) & SIGN_BIT) != 0
                part *= tl.sqrt(post) * tl.where(positive, 2.0, -2 * SLOPE)
            else:  # low bits are cut, not rounded: a carry could turn NaN into a number
                sign = ~(part.to(tl.int32, bitcast=True) >> 31) & SIGN_BIT
                part = tl.maximum(part, SLOPE * part)
                bits = (part * part).to(tl.int32, bitcast=True) & (-2 * SIGN_BIT)
                part = (bits | sign).to(tl.float32, bitcast=True)
            out_desc.store([m, column], part.to(out_desc.dtype))


@torch.library.custom_op("golf::linear_relu2", mutates_args=())
def linear_relu2(
    a_MK: Tensor, b_NK: Tensor, scale_M: Tensor, slope: float, post_MN: Tensor | None = None
) -> Tensor:
    """leaky_relu(a b^T scale)^2; given that as `post`, instead a b^T scale times the derivative."""
    out_MN = a_MK.new_empty(len(a_MK), len(b_NK))
    tiling = RELU2_TILING

    def tiles_of(tensor: Tensor, block: list[int]) -> Any:
        return TensorDescriptor.from_tensor(tensor.contiguous(), block)

    quarter = [tiling.rows, tiling.columns // 4]
    a = tiles_of(a_MK, [tiling.rows, tiling.depth])
    b = tiles_of(b_NK, [tiling.columns, tiling.depth])
    out = tiles_of(out_MN, quarter)
    post = out  # forward: not read
    backward = post_MN is not None
    if post_MN is not None:
        post = tiles_of(post_MN, quarter)
    tiles = math.ceil(len(a_MK) / tiling.rows) * math.ceil(len(b_NK) / tiling.columns)
    linear_relu2_kernel[(min(tiles, tiling.programs * SM_COUNT),)](
        a,
        b,
        scale_M,
        post,
        out,
        slope,
        backward,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return out_MN


@linear_relu2.register_fake
def _(
    a_MK: Tensor, b_NK: Tensor, scale_M: Tensor, slope: float, post_MN: Tensor | None = None
) -> Tensor:
    return a_MK.new_empty(len(a_MK), len(b_NK))


class FusedMLP(torch.autograd.Function):
    """`relu2_mlp` with two fused products.

    The norm becomes a factor per row in the first product, so that no normed input is written.
    Only the squared activation is stored; backward recovers the derivative from it.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_BTD: Tensor, up_FD: Tensor, down_FD: Tensor, depth_scale: float, slope: float
    ) -> Tensor:
        ctx.depth_scale = depth_scale
        ctx.slope = slope
        x_MD = x_BTD.flatten(0, 1)
        scale_M = depth_scale * torch.rsqrt(x_MD.float().square().mean(-1) + RMS_EPS)
        post_MF = linear_relu2(x_MD, up_FD, scale_M, slope)
        ctx.save_for_backward(x_MD, up_FD, down_FD, scale_M, post_MF)
        return (post_MF @ down_FD).view_as(x_BTD)

    @staticmethod
    def backward(ctx: Any, dy_BTD: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x_MD, up_FD, down_FD, scale_M, post_MF = ctx.saved_tensors
        dy_MD = dy_BTD.flatten(0, 1)
        # Gradient before the activation, times the norm's scale, which dx and dup both need.
        du_MF = linear_relu2(dy_MD, down_FD, scale_M, ctx.slope, post_MF)
        dx_MD = (du_MF @ up_FD).float()
        x32 = x_MD.float()
        # The norm takes out the part of the gradient along x.
        inverse_rms_M = scale_M / ctx.depth_scale
        along = (dx_MD * x32).mean(-1, keepdim=True) * inverse_rms_M.square()[:, None]
        dx = (dx_MD - along * x32).to(x_MD.dtype).view_as(dy_BTD)
        return dx, du_MF.T @ x_MD, post_MF.T @ dy_MD, None, None


@jit
def heads_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    qkv,
    gain,
    rotary,
    q,
    k,
    v,
    dqkv,
    dgain,
    T,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """RMS norm, partial RoPE and gain for one head of ROWS tokens.

    Forward: reads qkv, gain and rotary, writes q and k; v, dqkv and dgain are not touched.
    BACKWARD: q, k and v are gradients and are read too; writes dqkv and this program's part of
    dgain.  HALF is half of the rotated dims; programs are (tokens / ROWS, heads of dqkv or q, k).
    """
    head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    dim = tl.arange(0, WIDTH)[None, :]
    raw = (token * (HEADS + 2 * KV_HEADS) + head) * WIDTH
    if head >= HEADS + KV_HEADS:  # values have a gradient, and nothing else to do
        value = (token * KV_HEADS + head - HEADS - KV_HEADS) * WIDTH
        tl.store(dqkv + raw + dim, tl.load(v + value + dim))
    else:
        rotated_head = k + (token * KV_HEADS + head - HEADS) * WIDTH
        scale = 1.0
        if head < HEADS:
            rotated_head = q + (token * HEADS + head) * WIDTH
            scale = tl.load(gain + head).to(tl.float32)
        x = tl.load(qkv + raw + dim).to(tl.float32)
        square = tl.sum(x * x, 1, keep_dims=True) / WIDTH + 1e-6  # RMS_EPS
        scale *= tl.rsqrt(square)

        # Dim d < HALF turns with its partner d + HALF; backward turns by the opposite angle.
        source = rotated_head if BACKWARD else qkv + raw
        rotated = dim < 2 * HALF
        angle = rotary + token % T * HALF + dim % HALF
        cos = tl.load(angle, mask=rotated, other=1.0)
        sin = tl.load(angle + T * HALF, mask=rotated, other=0.0)
        sin = tl.where((dim < HALF) == BACKWARD, sin, -sin)
        partner = source + tl.where(dim < HALF, dim + HALF, dim - HALF)
        turned = tl.load(source + dim).to(tl.float32) * cos
        turned += tl.load(partner, mask=rotated, other=0.0).to(tl.float32) * sin

        if BACKWARD:
            along = tl.sum(turned * x, 1, keep_dims=True)
            dx = (turned - x * (along / (WIDTH * square))) * scale
            tl.store(dqkv + raw + dim, dx.to(dqkv.dtype.element_ty))
            if head < HEADS:
                tl.store(dgain + tl.program_id(0) * HEADS + head, tl.sum(along * tl.rsqrt(square)))
        else:
            tl.store(rotated_head + dim, (turned * scale).to(q.dtype.element_ty))


class HeadSizes(NamedTuple):
    """What the kernel for heads must know of its arguments."""

    tokens: int  # M = B * T
    length: int  # T
    half: int  # half of the rotated dims
    heads: int
    kv_heads: int

    @classmethod
    def of(cls, qkv_MC: Tensor, gain_H: Tensor, rotary: Tensor, width: int) -> HeadSizes:
        heads = len(gain_H)
        kv_heads = (qkv_MC.shape[1] // width - heads) // 2
        return cls(len(qkv_MC), rotary.shape[1], rotary.shape[3], heads, kv_heads)


@torch.library.custom_op("golf::norm_rotate", mutates_args=())
def norm_rotate(
    qkv_MC: Tensor, gain_H: Tensor, rotary: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """q (M, H*E) and k (M, K*E) from raw projections (M, C); E is `width`."""
    size = HeadSizes.of(qkv_MC, gain_H, rotary, width)
    q = qkv_MC.new_empty(size.tokens, size.heads * width)
    k = qkv_MC.new_empty(size.tokens, size.kv_heads * width)
    heads_kernel[(size.tokens // HEAD_ROWS, size.heads + size.kv_heads)](
        qkv_MC, gain_H, rotary, q, k, qkv_MC, q, k, *size[1:], width, HEAD_ROWS, False
    )
    return q, k


@norm_rotate.register_fake
def _(qkv_MC: Tensor, gain_H: Tensor, rotary: Tensor, width: int) -> tuple[Tensor, Tensor]:
    size = HeadSizes.of(qkv_MC, gain_H, rotary, width)
    q = qkv_MC.new_empty(size.tokens, size.heads * width)
    return q, qkv_MC.new_empty(size.tokens, size.kv_heads * width)


@torch.library.custom_op("golf::norm_rotate_backward", mutates_args=())
def norm_rotate_backward(
    qkv_MC: Tensor,
    gain_H: Tensor,
    rotary: Tensor,
    width: int,
    dq_MHE: Tensor,
    dk_MKE: Tensor,
    dv_MKE: Tensor,
) -> tuple[Tensor, Tensor]:
    """dqkv (M, C) and parts (M / HEAD_ROWS, H) whose sum is dgain."""
    size = HeadSizes.of(qkv_MC, gain_H, rotary, width)
    dqkv = torch.empty_like(qkv_MC)
    parts = rotary.new_empty(size.tokens // HEAD_ROWS, size.heads)
    gradients = [dq_MHE.contiguous(), dk_MKE.contiguous(), dv_MKE.contiguous()]
    heads_kernel[(size.tokens // HEAD_ROWS, size.heads + 2 * size.kv_heads)](
        qkv_MC, gain_H, rotary, *gradients, dqkv, parts, *size[1:], width, HEAD_ROWS, True
    )
    return dqkv, parts


@norm_rotate_backward.register_fake
def _(qkv_MC: Tensor, gain_H: Tensor, rotary: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv_MC), rotary.new_empty(len(qkv_MC) // HEAD_ROWS, len(gain_H))


class FusedHeads(torch.autograd.Function):
    """`project_heads` with one product for the three projections, in backward too."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_BTD: Tensor, w_CD: Tensor, gain_H: Tensor, rotary: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.width = x_BTD.shape[-1] // len(gain_H)
        x_MD = x_BTD.flatten(0, 1)
        qkv_MC = x_MD @ w_CD.T
        q, k = norm_rotate(qkv_MC, gain_H, rotary, ctx.width)
        v = qkv_MC[:, -k.shape[1] :]
        ctx.save_for_backward(x_MD, w_CD, gain_H, rotary, qkv_MC)
        return tuple(y.view(*x_BTD.shape[:2], -1, ctx.width) for y in (q, k, v))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x_MD, w_CD, gain_H, rotary, qkv_MC = ctx.saved_tensors
        dqkv_MC, parts = norm_rotate_backward(qkv_MC, gain_H, rotary, ctx.width, *gradients)
        dx_BTD = (dqkv_MC @ w_CD).view(*gradients[0].shape[:2], -1)
        return dx_BTD, dqkv_MC.T @ x_MD, parts.sum(0).to(gain_H.dtype), None


@jit
def softcap_loss_kernel(  # type: ignore[no-untyped-def]
    logits,
    targets,
    losses,
    HEIGHT: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of one row of raw logits, which it overwrites by the gradient of the mean loss.

    A program holds its whole row in registers, so that logits are read once and written once.  It
    counts in bits, since the GPU's exponential has base 2.
    """
    BITS: tl.constexpr = 1.4426950408889634  # of a nat
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < V
    target = column == tl.load(targets + row).to(tl.int32)
    place = logits + row.to(tl.int64) * V + column
    raw = tl.load(place, mask=inside, other=0.0).to(tl.float32)

    # tanh(x) = 1 - 2 / (exp(2x) + 1); a squared root takes fewer instructions than a division.
    root = tl.rsqrt(tl.exp2((raw + SHIFT) * (2 * BITS / WIDTH)) + 1)
    tanh = 1 - 2 * (root * root)
    tanh_of_target = tl.sum(tl.where(target, tanh, 0.0), 0)
    capped = tl.where(inside, (HEIGHT * BITS) * tanh, float("-inf"))
    top = tl.max(capped, 0)
    power = tl.exp2(capped - top)
    total = tl.sum(power, 0)
    bits = top + tl.log2(total) - (HEIGHT * BITS) * tanh_of_target
    tl.store(losses + row, bits / BITS)

    # (softmax - one-hot) times the softcap's slope, in an order that keeps one value per logit.
    share = (HEIGHT / WIDTH) / tl.num_programs(0)  # of a row in the mean, times the steepest slope
    gradient = power * (1 - tanh * tanh) * (share / total)
    gradient -= tl.where(target, share * (1 - tanh_of_target * tanh_of_target), 0.0)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=inside)


@torch.library.custom_op("golf::softcap_loss", mutates_args=())
def softcap_loss(
    x_MD: Tensor, table_VD: Tensor, targets_M: Tensor, height: float, shift: float, width: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (M,) in float32, and their mean's gradients by x and by the table."""
    vocabulary = len(table_VD)
    logits_MV = x_MD @ table_VD.T
    losses_M = x_MD.new_empty(len(x_MD), dtype=torch.float32)
    block = triton.next_power_of_2(vocabulary)
    warps = min(max(block // (32 * LOSS_VALUES), 1), 32)
    softcap_loss_kernel[(len(x_MD),)](
        logits_MV,
        targets_M.contiguous(),
        losses_M,
        height,
        shift,
        width,
        vocabulary,
        block,
        num_warps=warps,
        maxnreg=LOSS_REGISTERS,  # unbounded, fewer programs run at once: 1.28 ms instead of 1.09
    )
    dlogits_MV = logits_MV  # the kernel has overwritten them
    return losses_M, dlogits_MV @ table_VD, dlogits_MV.T @ x_MD


@softcap_loss.register_fake
def _(
    x_MD: Tensor, table_VD: Tensor, targets_M: Tensor, *cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    losses_M = x_MD.new_empty(len(x_MD), dtype=torch.float32)
    return losses_M, x_MD.new_empty(x_MD.shape), table_VD.new_empty(table_VD.shape)


class FusedLoss(torch.autograd.Function):
    """`mean_token_loss` whose forward pass makes the gradients too, as the logits are at hand.

    Logits exist once, in the model's dtype, and only until then.  Backward scales the gradients.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_BTD: Tensor, table_VD: Tensor, targets_BT: Tensor, cap: Softcap
    ) -> Tensor:
        losses_M, dx_MD, dtable_VD = softcap_loss(
            x_BTD.flatten(0, 1), table_VD, targets_BT.flatten(), *cap
        )
        ctx.save_for_backward(dx_MD.view_as(x_BTD), dtable_VD)
        return losses_M.mean()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        dx_BTD, dtable_VD = ctx.saved_tensors
        return dx_BTD * dloss, dtable_VD * dloss, None, None


@jit
def scale_in_kernel(x, floor):  # type: ignore[no-untyped-def]
    """`short_scale(x)`, but not below `floor`."""
    short = (x.to(tl.int32, bitcast=True) + 128) & -256
    return tl.maximum(short.to(tl.float32, bitcast=True), floor)


@jit
def on_grid(w, scale, qmax):  # type: ignore[no-untyped-def]
    """`encode` and `dequantize` of a row.

    Next to 1.5 * 2^23 float32 holds only integers, so the sum is rounded to one, half to even as
    `torch.round` does.  A code is far below the 2^22 up to which that works: a scale is at least
    0.6 of what the row's widest weight needs.  A weight that is no number stays none, so that the
    loss tells of it.
    """
    nan: tl.constexpr = tl.PropagateNan.ALL
    codes = (tl.div_rn(w, scale) + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(codes, -qmax, nan), qmax, nan) * scale


@jit
def cost_in_kernel(w, scale, floor, qmax, price):  # type: ignore[no-untyped-def]
    """Rate-distortion cost of a row, as in `row_scales`."""
    error = w - on_grid(w, scale, qmax)
    return tl.sum(error * error, 0) - price * tl.log2(tl.div_rn(scale, floor))


@jit
def round_rows_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    weights,
    rounded,
    grid_step,
    qmaxes,
    step_ratios,
    price_of_square,
    ROWS,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CLIPS: tl.constexpr,
):
    """One row of one matrix of ROWS rows, read once: all clips are tried in registers."""
    row = tl.program_id(0).to(tl.int64)
    matrix = row // ROWS
    column = tl.arange(0, BLOCK)
    w = tl.load(weights + row * WIDTH + column, mask=column < WIDTH, other=0.0)
    qmax = tl.load(qmaxes + matrix)
    floor = tl.load(grid_step) * tl.load(step_ratios + matrix)
    floor = scale_in_kernel(tl.maximum(floor, 1e-30), 0.0)  # never 0, for rows of zeros
    widest = tl.div_rn(tl.max(tl.abs(w), 0), qmax)
    scale = scale_in_kernel(widest * CLIPS[0], floor)
    if scale > floor:  # else all clips, of which the first is the largest, give the floor
        price = floor * floor * price_of_square
        lowest = cost_in_kernel(w, scale, floor, qmax, price)
        for i in tl.static_range(1, len(CLIPS)):
            clipped = scale_in_kernel(widest * CLIPS[i], floor)
            cost = cost_in_kernel(w, clipped, floor, qmax, price)
            better = cost < lowest  # not on a tie, as argmin
            scale = tl.where(better, clipped, scale)
            lowest = tl.where(better, cost, lowest)
    tl.store(rounded + row * WIDTH + column, on_grid(w, scale, qmax), mask=column < WIDTH)


def round_rows(w_NRC: Tensor, grid_step: Tensor, qmax: Tensor, step_ratio: Tensor) -> Tensor:
    """`fake_quantize` in one pass; qmax and step_ratio are (N, 1, 1).

    It gives the bits of its twin.  Only where two clips of a row cost the same, up to the order of
    the sum, may it take the other.  `quantize` gives back either bit for bit: once a row is
    rounded, its own scale is the largest that is tried and has no error, so it is the cheapest.
    """
    count, rows, width = w_NRC.shape
    w_NRC = w_NRC.contiguous()
    rounded = torch.empty_like(w_NRC)
    block = 1 << (width - 1).bit_length()
    round_rows_kernel[(count * rows,)](
        w_NRC,
        rounded,
        grid_step,
        qmax,
        step_ratio,
        math.log(2) / 6 * width,
        rows,
        width,
        block,
        CLIP_RATIOS,
        num_warps=min(max(1, block // 512), 8),  # one warp sums without shared memory
        enable_fp_fusion=False,  # products and sums are rounded one by one, as by torch
    )
    return rounded


def announce_operators() -> None:
    """Tells Inductor of the custom operators before it compiles anything.

    It learns of one when it first compiles it, and from then on fuses what comes before it in
    another way.  Told first, every process builds the same kernels.
    """
    from torch._inductor.lowering import add_needs_realized_inputs

    golf = torch.ops.golf
    operators = (
        golf.linear_relu2,
        golf.norm_rotate,
        golf.norm_rotate_backward,
        golf.softcap_loss,
    )
    add_needs_realized_inputs([operator.default for operator in operators])


def choose_kernels(h: Hyperparameters, runtime: Runtime, log: RunLog) -> Kernels:
    """The first attention and, if they run, the fused layers that agree with float32 math.

    Nothing is chosen by timing, so that results repeat bit for bit.
    """
    if not runtime.on_cuda:
        log("attention:sdpa, plain layers (the only ones on a CPU)")
        return Kernels()
    name, attend, error = first_correct_attention(h, runtime.device, log)
    fused = fused_layers_run(h, runtime.device, log)
    layers = "fused" if fused else "plain"
    log(f"attention:{name} relative_error:{error:.1e}, {layers} layers")
    if not fused:
        return Kernels(attend)
    return Kernels(attend, FusedHeads.apply, FusedMLP.apply, FusedLoss.apply, round_rows)


def fused_layers_run(h: Hyperparameters, device: torch.device, log: RunLog) -> bool:
    """Whether the fused layers are correct on this GPU: they are run, as GPUs differ.

    They are made for Hopper.  Later GPUs have some of its instructions and less shared memory.
    """
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False
    try:
        require(triton, "Triton is not installed")
        sizes = h.mlp_hidden % 8 == 0 and h.model_dim % 8 == 0 and seq_lens(h)[0] % HEAD_ROWS == 0
        require(sizes, "a width or a sequence's length is no multiple of what a tile needs")
        require(h.head_dim & (h.head_dim - 1) == 0, f"a head of {h.head_dim} dims is no power of 2")
        error = fused_error(h, device)
        require(error < 3e-2, f"relative error {error:.1e}")
    except Exception as problem:  # what this GPU, driver or version does not run
        log(f"fused layers refused ({type(problem).__name__}: {str(problem)[:120]})")
        return False
    return True


def fused_error(h: Hyperparameters, device: torch.device) -> float:
    """Largest relative error of the fused layers' outputs and gradients on one random sequence."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, device=device)

    dim = h.model_dim
    x = random(1, h.train_seq_len, dim)
    qkv = random(dim + 2 * h.kv_dim, dim, scale=dim**-0.5)
    gain = 1 + 0.1 * random(h.num_heads)
    up, down = (random(h.mlp_hidden, dim, scale=dim**-0.5) for _ in range(2))
    rotary = rotary_table(h.train_seq_len, h.rope_dims, h.rope_base, device)
    table = random(h.vocab_size, dim, scale=3 * dim**-0.5)  # some tokens are likely
    shape = (1, h.train_seq_len)
    targets = torch.randint(h.vocab_size, shape, generator=generator, device=device)

    def heads(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, qkv, gain: torch.cat(function(x, qkv, gain, rotary), 2)

    def mlp(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, up, down: function(x, up, down, 0.5, h.mlp_slope)

    def loss(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, table: function(x, table, targets, h.softcap)

    errors = [
        twin_error(heads(FusedHeads.apply), heads(project_heads), [x, qkv, gain]),
        twin_error(mlp(FusedMLP.apply), mlp(relu2_mlp), [x, up, down]),
        twin_error(loss(FusedLoss.apply), loss(mean_token_loss), [x, table]),
        rounding_error(torch.stack([up, 9 * up])),
    ]
    return float(np.max(errors))  # nan if one is: Python's max may drop it


def rounding_error(w_NRC: Tensor) -> float:
    """Share of rows that `round_rows` rounds unlike its twin, plus 1 if rounding again moves any.

    A few may differ, as the cheaper of two clips is decided by a sum's last bits.  But what export
    rounds again must not move at all.
    """
    qmax, step_ratio = Grid((31,) * len(w_NRC), (1.0,) * len(w_NRC)).tensors(w_NRC.device)
    grid_step = w_NRC.square().mean().sqrt() / 10  # so only the smaller rows fit the code range
    found = round_rows(w_NRC, grid_step, qmax, step_ratio)
    differ = found != fake_quantize(w_NRC, grid_step, qmax, step_ratio)
    again = fake_quantize(found, grid_step, qmax, step_ratio)
    return float(differ.any(-1).float().mean()) + float(not torch.equal(found, again))


def twin_error(fast: Callable[..., Any], plain: Callable[..., Any], inputs: list[Tensor]) -> float:
    """Largest relative error, in bfloat16, of output and gradients against `plain` in float32.

    It is nan if any number is.
    """

    def results(function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        # Both get the values that bfloat16 holds.
        leaves = [tensor.bfloat16().to(dtype).requires_grad_() for tensor in inputs]
        y = function(*leaves)
        dy = torch.randn(
            y.shape, generator=torch.Generator(y.device).manual_seed(1), device=y.device
        )
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.bfloat16().to(dtype))]

    found = results(fast, torch.bfloat16)
    exact = results(plain, torch.float32)
    errors = [(a.float() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)]
    return float(torch.stack(errors).max())


def first_correct_attention(
    h: Hyperparameters, device: torch.device, log: RunLog
) -> tuple[str, Attend, float]:
    """Name, function and relative error.  Raises RunError if no candidate is correct here."""
    for name, attend in attention_candidates().items():
        try:
            error = attention_error(h, attend, device)
            require(error < 2e-2, f"relative error {error:.1e}")  # bf16 lands near 3e-3
            return name, attend, error
        except Exception as problem:  # a kernel that this driver, GPU or version does not run
            log(f"attention:{name} refused ({type(problem).__name__}: {str(problem)[:120]})")
    raise RunError("attention: no kernel is correct on this GPU; set DEVICE=cpu")


def attention_error(h: Hyperparameters, attend: Attend, device: torch.device) -> float:
    """Largest relative error of output and gradients on two random sequences of each length.

    Of two tokens at least: one by itself gives q and k no gradient, and zeros no relative error.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(length: int, heads: int) -> Tensor:
        return torch.randn(2, length, heads, h.head_dim, generator=generator, device=device)

    errors = []
    for length in seq_lens(h):
        counts = (h.num_heads, h.num_kv_heads, h.num_kv_heads)
        inputs = [random(max(length, 2), heads) for heads in counts]
        errors.append(twin_error(attend, sdpa(SDPBackend.MATH), inputs))
    return float(np.max(errors))  # nan if one is: Python's max may drop it


# ---- 7. Quantizer -------------------------------------------------------------------------------
# One grid serves late QAT and export.  All rows of all layers share one grid step, the distance
# between two codes.  Theory says so: an entropy-coded uniform quantiser is near the
# rate-distortion bound if weights of equal sensitivity share one step, and the rate is then
# log2(sigma / step) + 2 bits a weight (Gish & Pierce, 1968).  The byte budget decides the step.
#
# GPTQ-lite (pg#414) is what remains for a row whose largest weight is out of the code range at that
# step: its scale is raised, and of a few clips the one with the least cost is taken.
CLIP_RATIOS = (1.0, 0.92, 0.84, 0.75, 0.6)  # of the row's largest magnitude
ZSTD_OVERHEAD = 1.013  # expected: zstd's bytes over the codes' entropy; the exporter measures it


def matrices(w: Tensor) -> Tensor:
    """A parameter as (N, R, C); a table is one matrix."""
    return w.reshape(-1, *w.shape[-2:])


def short_scale(x: Tensor) -> Tensor:
    """`x` to 16 significant bits: code times scale is exact, so rounding again changes nothing."""
    return ((x.view(torch.int32) + 128) & -256).view(torch.float32)


def encode(w_NRC: Tensor, scale_NR1: Tensor, qmax: Tensor) -> Tensor:
    """Integer codes in [-qmax, qmax], still float32."""
    return torch.clamp(torch.round(w_NRC / scale_NR1), -qmax, qmax)


def dequantize(codes_NRC: Tensor, scale_NR1: Tensor) -> Tensor:
    """float32 weights; one rounding, so the same on every device."""
    return codes_NRC.float() * scale_NR1


def row_scales(w_NRC: Tensor, floor: Tensor, qmax: Tensor) -> Tensor:
    """(N, R, 1) float32 scales: the clip of least rate-distortion cost, never below `floor`.

    The cost of a row is its squared error minus lambda * log2(scale) per weight.  `floor` is the
    scale that the byte budget pays for, so lambda is such that `floor` itself is optimal for a row
    that it can hold: d(s^2/12)/ds = lambda * d(log2 s)/ds gives lambda = floor^2 * ln 2 / 6.
    """
    widest = w_NRC.abs().amax(-1, keepdim=True) / qmax
    floor = short_scale(floor.clamp_min(1e-30))  # never 0, for rows of zeros
    price = floor.square() * (math.log(2) / 6 * w_NRC.shape[-1])
    scales = torch.stack([torch.maximum(short_scale(widest * clip), floor) for clip in CLIP_RATIOS])

    def cost(scale: Tensor) -> Tensor:
        error = (w_NRC - dequantize(encode(w_NRC, scale, qmax), scale)).square()
        return error.sum(-1, keepdim=True) - price * torch.log2(scale / floor)

    best = torch.stack([cost(scale) for scale in scales]).argmin(0, keepdim=True)
    return scales.gather(0, best)[0]


def quantize(
    w_NRC: Tensor, grid_step: Tensor, qmax: Tensor, step_ratio: Tensor
) -> tuple[Tensor, Tensor]:
    """int8 codes (N, R, C) and float32 row scales (N, R, 1) on the grid of `grid_step` (0-d)."""
    scale = row_scales(w_NRC, grid_step * step_ratio, qmax)
    return encode(w_NRC, scale, qmax).to(torch.int8), scale


def fake_quantize(w_NRC: Tensor, grid_step: Tensor, qmax: Tensor, step_ratio: Tensor) -> Tensor:
    """Exactly the float32 weights that packing `w` and reading them back would give."""
    return dequantize(*quantize(w_NRC, grid_step, qmax, step_ratio))


def entropy_bits(codes_NRC: Tensor) -> float:
    """Order-0 entropy of the codes in bits, each matrix with its own frequencies."""
    n = len(codes_NRC)
    zero = torch.arange(128, 256 * n, 256, device=codes_NRC.device).view(-1, 1, 1)  # bin of code 0
    counts = torch.bincount((codes_NRC + zero).flatten(), minlength=256 * n).view(n, 256).double()
    frequency = counts / counts.sum(1, keepdim=True)
    return float(-(counts * torch.log2(frequency.clamp_min(1e-300))).sum())


def fit_grid_step(size_of: Callable[[float], float], target: float) -> float:
    """Smallest grid step whose size in bytes is at most `target`; by bisection, as sizes fall."""
    low, high = -80.0, 24.0  # log2: from where the code range decides, to all codes zero
    for _ in range(26):
        middle = (low + high) / 2
        if size_of(2.0**middle) <= target:
            high = middle
        else:
            low = middle
    return 2.0**high


# ---- 8. Optimizer and schedules -----------------------------------------------------------------
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # since 2.13
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def progress_of(h: Hyperparameters, step: int, elapsed: float) -> float:
    """Share of the run that is over, in [0, 1]: of the steps or of the clock, the larger."""
    return min(1.0, max(step / h.iterations, elapsed / (h.max_wallclock_seconds or math.inf)))


def lr_scale(h: Hyperparameters, progress: float, total_steps: float = 0.0) -> float:
    """1, then linearly to 0 over the warm-down.

    `total_steps` turns WARMDOWN_ITERS into a share of a run that the clock will end.
    """
    fraction = h.warmdown_fraction
    if h.warmdown_iters:
        fraction = h.warmdown_iters / (total_steps or h.iterations)
    return min(1.0, (1.0 - progress) / min(1.0, fraction))


LONG_STEP = 0.01  # of a run; what takes longer is a pause, unless the run's steps are about as long


class StepPlan(NamedTuple):
    """What the schedules say of one step."""

    progress: float  # share of the run that is over before it
    lr: float  # factor on all learning rates, of the warm-down alone
    decay: float  # times each group's learning rate: what the step takes off the weights
    seq_len: int  # tokens of the sequences that it trains on


def plan_step(
    h: Hyperparameters, steps_done: int, elapsed: float, progress_before: float
) -> StepPlan:
    """For the step after `steps_done`, `elapsed` seconds into the run.

    A time-bound run does not know its length in steps, so what decides is its progress.  In a
    pause the clock goes on.  The step after it decays the weights as a long step at most: the decay
    of half a run at once would turn the sign of the matrices.
    """
    progress = progress_of(h, steps_done, elapsed)
    total_steps = steps_done / progress if progress else h.iterations
    share = progress - progress_before
    if steps_done > 1 and progress > steps_done / h.iterations:  # the clock decides
        usual = progress_before / (steps_done - 1)
        share = min(share, max(LONG_STEP, 2 * usual))
    decay = h.decay_per_run * share
    return StepPlan(progress, lr_scale(h, progress, total_steps), decay, seq_len_at(h, progress))


def seq_len_at(h: Hyperparameters, progress: float) -> int:
    """Tokens of a training sequence: short ones first (pg#2014)."""
    shortens = 0 < h.early_seq_len < h.train_seq_len
    return h.early_seq_len if shortens and progress < h.early_fraction else h.train_seq_len


def seq_lens(h: Hyperparameters) -> list[int]:
    """The length at the start of a run, then TRAIN_SEQ_LEN; one if they are the same."""
    return sorted({seq_len_at(h, 0.0), h.train_seq_len})


def lr_warmup(h: Hyperparameters, step: int) -> float:
    """Factor of step 1, 2, ...: linear from 0 to 1 over the warm-up."""
    return min(1.0, step / (h.lr_warmup_steps or 1))


def muon_momentum(h: Hyperparameters, steps_done: Tensor) -> Tensor:
    """Rises linearly over the warm-up; a tensor, so that a captured graph follows the steps."""
    share = steps_done / max(1, h.muon_momentum_warmup_steps)
    start = h.muon_momentum_warmup_start
    return start + (h.muon_momentum - start) * share.clamp(max=1)


# a, b, c of each step x <- a x + b (x x^T) x + c (x x^T)^2 x, for a norm below 1/1.02
POLAR_EXPRESS = (
    (8.15656, -22.48329, 15.87877),
    (4.04293, -2.80892, 0.50002),
    (3.89167, -2.77248, 0.50607),
    (3.28575, -2.36813, 0.46449),
    (2.34654, -1.70978, 0.42324),
)


def orthogonalize(g_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """The polar factor U V^T of each matrix, nearly: all singular values become about 1.

    A batched Newton-Schulz iteration (Jordan et al., Muon, 2024) with the steps of Polar Express
    (Amsel et al., 2025); zeros stay zero.
    """
    tall = g_NRC.shape[-2] > g_NRC.shape[-1]
    x = g_NRC.mT if tall else g_NRC  # the smaller Gram matrix
    x = (x / (1.02 * x.square().sum((-2, -1), keepdim=True).sqrt() + 1e-7)).to(dtype)
    identity = torch.eye(x.shape[-2], dtype=dtype, device=x.device)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = (a * identity + b * gram + c * (gram @ gram)) @ x  # baddbmm would copy its addend
    return x.mT if tall else x


def normalize_neurons(update: Tensor, mean_square: Tensor, beta2: float) -> Tensor:
    """NorMuon (Li et al., 2025): neurons of an update divided by their running RMS.

    A neuron is a row of a tall update (n, R, C) or a column of a wide one; orthogonalisation has
    already equalised the other side.  `mean_square` is (n, R, 1) or (n, 1, C), updated in place.
    """
    along = -1 if mean_square.shape[-1] == 1 else -2
    mean_square.lerp_(update.square().mean(along, keepdim=True), 1 - beta2)
    return update * mean_square.clamp_min(1e-12).rsqrt()


def muon_update(
    grad: Tensor,
    bank: Bank,
    clip: Tensor,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    beta2: float,
    dtype: torch.dtype,
) -> None:
    """Nesterov momentum, orthogonalisation and decoupled decay of a shard (n, R, C), in place."""
    g = grad.float().nan_to_num(0, 0, 0) * clip
    bank.momentum.lerp_(g, 1 - momentum)
    update = orthogonalize(torch.lerp(g, bank.momentum, momentum), dtype).float()
    even = normalize_neurons(update, bank.mean_square, beta2)
    # The norm of the whole update stays as it was.
    before = update.square().sum((-2, -1), keepdim=True)
    after = even.square().sum((-2, -1), keepdim=True).clamp_min(1e-12)  # padding stays 0
    scale = (before / after).sqrt() * bank.update_scale
    bank.master.mul_(1 - lr * decay).sub_(lr * scale * even)


class Bank(NamedTuple):
    """One Muon bank on this rank: n = ceil(N / ranks) matrices of a padded bank."""

    name: str
    parameter: nn.Parameter  # (N, R, C) working weights, the first rows of `padded`
    padded: Tensor  # (n * ranks, R, C), receives the all-gather
    master: Tensor  # (n, R, C) float32
    momentum: Tensor  # (n, R, C) float32
    mean_square: Tensor  # (n, R, 1), or (n, 1, C) if wide, float32: of each neuron's update
    update_scale: Tensor  # (n, 1, 1) float32: sqrt(max(1, fan_out / fan_in))

    @classmethod
    def create(
        cls, name: str, row: ParameterRow, parameter: nn.Parameter, runtime: Runtime
    ) -> Bank:
        """Moves the working weights into the padded tensor and takes this rank's masters."""
        matrices_in_bank, rows, columns = parameter.shape
        per_rank = math.ceil(matrices_in_bank / runtime.world_size)
        padded = parameter.data.new_zeros(per_rank * runtime.world_size, rows, columns)
        padded[:matrices_in_bank] = parameter.data
        parameter.data = padded[:matrices_in_bank]
        mine = slice(runtime.rank * per_rank, (runtime.rank + 1) * per_rank)
        master = padded[mine].float().clone()  # float() alone would alias float32 weights
        neurons = master[:, :, :1] if rows >= columns else master[:, :1]
        mean_square = torch.zeros_like(neurons)
        scales = [max(1.0, ratio) ** 0.5 for ratio in fan_ratios(row, len(padded))]
        update_scale = torch.tensor(scales[mine], device=runtime.device).view(-1, 1, 1)
        momentum = torch.zeros_like(master)
        return cls(name, parameter, padded, master, momentum, mean_square, update_scale)

    def reduce(self, grad: Tensor, runtime: Runtime) -> tuple[Tensor, Any]:
        """This rank's (n, R, C) of the gradient, summed over ranks once the returned work ends."""
        if runtime.world_size == 1:
            return grad, None
        missing = len(self.padded) - len(grad)
        # Where none is missing, F.pad would copy the bank all the same.
        whole = F.pad(grad, (0, 0, 0, 0, 0, missing)) if missing else grad.contiguous()
        shard = torch.empty_like(self.master, dtype=whole.dtype)
        return shard, reduce_scatter(shard, whole, async_op=True)

    def publish(self, weights: Tensor, runtime: Runtime) -> Any:
        """This rank's (n, R, C) become working weights on all ranks once the work ends."""
        if runtime.world_size == 1:
            self.padded.copy_(weights)
            return None
        return all_gather(self.padded, weights.to(self.padded.dtype), async_op=True)


def fan_ratios(row: ParameterRow, padded: int) -> list[float]:
    """fan_out / fan_in of each matrix of a bank and, up to `padded` matrices, of its padding."""
    count, rows, columns = row.shape
    transposed = [role.transposed for role in row.roles or (Role(""),)]
    per_role = count // len(transposed)
    ratios = [columns / rows if t else rows / columns for t in transposed for _ in range(per_role)]
    return ratios + ratios[-1:] * (padded - count)


def adamw_update(
    grad: Tensor,
    mean: Tensor,
    mean_square: Tensor,
    master: Tensor,
    clip: Tensor,
    lr: Tensor,
    decay: Tensor,
    steps_done: Tensor,
    h: Hyperparameters,
) -> None:
    """In-place AdamW (Loshchilov & Hutter, 2019) of a flat vector; `lr` per element."""
    g = grad.nan_to_num(0, 0, 0) * clip
    mean.lerp_(g, 1 - h.beta1)
    mean_square.lerp_(g.square(), 1 - h.beta2)
    root = (mean_square / (1 - h.beta2**steps_done)).sqrt() + h.adam_eps
    master.mul_(1 - lr * decay).sub_(lr * mean / (1 - h.beta1**steps_done) / root)


class FlatAdamW:
    """AdamW on all parameters outside banks, as one flat vector, the same on every rank."""

    def __init__(self, parameters: dict[str, nn.Parameter], lrs: dict[str, float]):
        self.parameters = parameters
        self.master = torch.cat([p.detach().float().flatten() for p in parameters.values()])
        self.masters = self.split(self.master)
        self.mean = torch.zeros_like(self.master)
        self.mean_square = torch.zeros_like(self.master)
        self.lr = torch.cat([torch.full_like(self.masters[n].flatten(), lrs[n]) for n in lrs])
        # The gradients and, behind them, the loss: so they need one collective.
        self.received = self.master.new_zeros(len(self.master) + 1)
        self.grad = self.received[:-1]
        self.grads = self.split(self.grad)
        self.loss = self.received[-1]

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a vector laid out like `master`, by name of the parameter."""
        pieces = flat.split([p.numel() for p in self.parameters.values()])
        views = zip(self.parameters.items(), pieces, strict=True)
        return {name: piece.view(p.shape) for (name, p), piece in views}

    def reduce(self, grads: Mapping[str, Tensor], loss: Tensor, runtime: Runtime) -> None:
        """Sums gradients and loss over ranks, into `grad` and `loss`."""
        torch._foreach_copy_(list(self.grads.values()), [grads[name] for name in self.parameters])
        self.loss.copy_(loss)
        runtime.sum(self.received)

    def publish(self, weights: Mapping[str, Tensor]) -> None:
        """These become the working weights."""
        torch._foreach_copy_(
            list(self.parameters.values()), [weights[name] for name in self.parameters]
        )


class LateQAT:
    """Late in the run, working weights are masters rounded to the grid of the export.

    The straight-through gradient of rounding is the identity.  So rounding belongs where weights
    are written, and the model's graph does not change when it starts.
    """

    def __init__(self, h: Hyperparameters, runtime: Runtime, round: Round | None = None):
        self.runtime = runtime
        self.round = round or fake_quantize
        self.on = False
        self.grid_step = torch.zeros((), device=runtime.device)
        # Of this rank's matrices.  Made once: copying numbers to the device stops the host.
        self.grids: dict[str, tuple[Tensor, Tensor]] = {}
        self.sharded = set[str]()  # names of banks; other parameters are whole on every rank
        for name, row in parameter_table(h).items():
            if row.grid is None:
                continue
            grid = row.grid
            if row.group == "matrix":
                grid = grid.shard(runtime.rank, runtime.world_size)
                self.sharded.add(name)
            self.grids[name] = grid.tensors(runtime.device)

    def step_or_zero(self) -> float:
        """The grid step, 0 while it is off."""
        return float(self.grid_step) if self.on else 0.0

    def rounded(self, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`masters`, some or all, on the grid where they have one."""
        weights = dict(masters)
        for name, master in masters.items():
            if name in self.grids:
                w = self.round(matrices(master), self.grid_step, *self.grids[name])
                weights[name] = w.view_as(master)
        return weights

    def start(self, masters: Mapping[str, Tensor], weight_bytes: float) -> float:
        """Turns it on, on the grid whose entropy fills `weight_bytes`; returns the grid step."""

        def size_of(grid_step: float) -> float:
            self.grid_step.fill_(grid_step)
            replicated_bits = torch.zeros((), dtype=torch.float64)
            sharded_bits = torch.zeros((), dtype=torch.float64)
            for name, grid in self.grids.items():
                codes, _ = quantize(matrices(masters[name]), self.grid_step, *grid)
                bits = sharded_bits if name in self.sharded else replicated_bits
                bits += entropy_bits(codes)
            return float(replicated_bits + self.runtime.sum(sharded_bits)) / 8

        grid_step = self.runtime.agree_on(fit_grid_step(size_of, weight_bytes))
        self.grid_step.fill_(grid_step)
        self.on = True
        return grid_step


class Optimizer:
    """Muon on the banks, sharded over ranks; AdamW on the rest, the same on every rank.

    float32 masters live here and the model holds working weights, which `working` makes from
    them.  Gradients are summed over ranks here too, without a DDP wrapper.  On CUDA the masters of
    every rank start from weights already rounded to bfloat16.
    """

    def __init__(self, model: GPT, h: Hyperparameters, runtime: Runtime):
        self.model = model
        self.h = h
        self.runtime = runtime
        parameters = dict(model.named_parameters())
        table = parameter_table(h)
        assert parameters.keys() == table.keys(), "a parameter is in no group or has no tensor"
        self.names = list(parameters)
        self.banks = [
            Bank.create(name, row, parameters[name], runtime)
            for name, row in table.items()
            if row.group == "matrix"
        ]
        lr_of = {"embed": h.embed_lr, "scalar": h.scalar_lr}
        lrs = {name: lr_of[row.group] for name, row in table.items() if row.group in lr_of}
        self.small = FlatAdamW({name: parameters[name] for name in lrs}, lrs)
        self.late_qat = LateQAT(h, runtime, model.kernels.round)
        # On the device, where a captured graph reads their current value.
        self.lr = self.scalar()  # schedule's factor on all learning rates
        self.decay = self.scalar()  # weight decay of this step, before its lr
        self.steps_done = self.scalar()
        self.muon_update = runtime.compile(muon_update)
        self.adamw_update = runtime.compile(adamw_update)

    def scalar(self) -> Tensor:
        return torch.zeros((), device=self.runtime.device)

    @torch.no_grad()
    def update(self, loss: Tensor, grads: list[Tensor]) -> Tensor:
        """One step, on the device alone: reduce, clip, step, write back.

        loss: this rank's part of the global mean loss (0-d); grads: its gradients, in the order of
        `model.parameters()`.  Returns the loss over all ranks, or nan if it or a gradient is not
        finite: then no weight has moved.
        """
        shards = self.reduce(loss, dict(zip(self.names, grads, strict=True)))
        norm = self.gradient_norm(shards)
        finite = norm.isfinite()
        clip = self.clip_factor(norm)
        lr = self.lr * finite
        pending = self.move_banks(shards, clip, lr)
        self.move_small(clip, lr)
        wait_for(pending)
        return torch.where(finite, self.small.loss, torch.nan)

    def reduce(self, loss: Tensor, grads: Mapping[str, Tensor]) -> list[Tensor]:
        """Sums over ranks: returns this rank's shard of each bank; the rest is in `small`."""
        shards = []
        pending = []
        for bank in self.banks:
            shard, work = bank.reduce(grads[bank.name], self.runtime)
            shards.append(shard)
            pending.append(work)
        self.small.reduce(grads, loss, self.runtime)
        wait_for(pending)
        return shards

    def gradient_norm(self, shards: list[Tensor]) -> Tensor:
        """L2 norm of the whole gradient, 0-d."""
        norms = torch.stack(torch._foreach_norm(shards, 2, torch.float32))
        return (self.runtime.sum(norms.square().sum()) + self.small.grad.square().sum()).sqrt()

    def clip_factor(self, norm: Tensor) -> Tensor:
        """At most 1, and 0 for an infinite norm, where nothing may move: inf / inf counts as 0."""
        most = self.h.grad_clip_norm or math.inf
        return (most / (norm + 1e-6)).clamp(max=1.0).nan_to_num()

    def move_banks(self, shards: list[Tensor], clip: Tensor, lr: Tensor) -> list[Any]:
        """Muon on this rank's shards; `lr` is 0 where nothing may move.

        The all-gather of a bank runs while the next one moves.  Returns those under way.
        """
        h = self.h
        matrix_lr = lr * h.matrix_lr
        momentum = muon_momentum(h, self.steps_done)
        pending = []
        for bank, shard in zip(self.banks, shards, strict=True):
            self.muon_update(
                shard, bank, clip, matrix_lr, momentum, self.decay, h.muon_beta2, self.runtime.dtype
            )
            weights = self.working({bank.name: bank.master})
            pending.append(bank.publish(weights[bank.name], self.runtime))
        return pending

    def move_small(self, clip: Tensor, lr: Tensor) -> None:
        """AdamW on the parameters outside banks; `lr` is 0 where nothing may move."""
        small = self.small
        self.steps_done += 1
        self.adamw_update(
            small.grad,
            small.mean,
            small.mean_square,
            small.master,
            clip,
            lr * small.lr,
            self.decay,
            self.steps_done,
            self.h,
        )
        small.publish(self.working(small.masters))

    def working(self, masters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Working weights of some or all masters: on the export grid if late QAT is on."""
        return self.late_qat.rounded(masters) if self.late_qat.on else masters

    def start_late_qat(self, weight_bytes: float) -> float:
        """Rounds from the next step on; returns the grid step."""
        return self.late_qat.start(self.masters(), weight_bytes)

    def masters(self) -> dict[str, Tensor]:
        """This rank's float32 masters by parameter name; of a bank, its shard."""
        return {bank.name: bank.master for bank in self.banks} | self.small.masters

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole parameters from tensors laid out like `masters()`."""
        whole = {name: tensor.clone() for name, tensor in tensors.items()}
        for bank in self.banks:
            if self.runtime.world_size > 1:
                whole[bank.name] = bank.master.new_empty(bank.padded.shape)
                all_gather(whole[bank.name], tensors[bank.name])
            whole[bank.name] = whole[bank.name][: len(bank.parameter)]
        return {name: whole[name] for name in self.names}

    def snapshot(self) -> Callable[[], None]:
        """Copies all state of model and optimizer for warm-up; the result puts it back."""
        tensors = [self.small.master, self.small.mean, self.small.mean_square, self.steps_done]
        tensors += [parameter.data for parameter in self.model.parameters()]
        for bank in self.banks:
            tensors += [bank.padded, bank.master, bank.momentum, bank.mean_square]
        saved = [tensor.clone() for tensor in tensors]
        late_qat = self.late_qat.on

        def restore() -> None:
            torch._foreach_copy_(tensors, saved)
            self.late_qat.on = late_qat

        return restore


def wait_for(works: list[Any]) -> None:
    """Waits for collectives; None stands for one that was not needed."""
    for work in works:
        if work is not None:
            work.wait()


# ---- 9. Weight averaging ------------------------------------------------------------------------
Stages = dict[str, dict[str, Tensor]]  # trained, averaged, blended -> weights by name


class RunningMean:
    """Tight SWA: the float32 mean of the masters over all steps late enough; one pass a step."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.mean = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.count = 0

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor]) -> None:
        self.count += 1
        newest = [tensors[name] for name in self.mean]
        torch._foreach_lerp_(list(self.mean.values()), newest, self.weight_of_newest())

    def weight_of_newest(self) -> float:
        return 1 / self.count


# ---- 10. Pack and unpack ------------------------------------------------------------------------
# The artifact: 8 bytes magic, 4 version, 32 SHA-256 of all that follows, 4 length of the header,
# the header (zstd of JSON: architecture; of each tensor its name, shape, kind and the lengths of
# its frames), then the zstd frames in that order.  A tensor of kind `codes` has a frame of row
# scales and one of codes per matrix, so that the entropy coder adapts to each; one of kind
# `float16` has one frame.  Values are little-endian.
HASHED_FROM = 44  # first byte after magic, version and digest


def quantized_tensors(
    state: Mapping[str, Tensor], h: Hyperparameters, grid_step: float
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, int8 codes (N, R, C), float32 scales (N, R, 1)) of every tensor that has a grid."""
    for name, grid in export_grids(h).items():
        w = matrices(state[name])
        step = torch.tensor(grid_step, device=w.device)
        codes, scales = quantize(w, step, *grid.tensors(w.device))
        yield name, codes, scales


def pack(state: Mapping[str, Tensor], h: Hyperparameters, grid_step: float) -> bytes:
    """The artifact's bytes; the same input always gives the same bytes."""
    coded = {
        name: [scales, *codes] for name, codes, scales in quantized_tensors(state, h, grid_step)
    }
    plain = {name: [w.half()] for name, w in state.items() if name not in coded}
    parts = coded | plain

    def compress(content: bytes) -> bytes:
        return zstandard.ZstdCompressor(level=h.zstd_level).compress(content)

    def compress_tensor(part: Tensor) -> bytes:
        return compress(part.cpu().numpy().tobytes())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        frames = {name: list(pool.map(compress_tensor, parts[name])) for name in state}
    entries = [
        {
            "name": name,
            "shape": list(w.shape),
            "frames": [len(frame) for frame in frames[name]],
            "kind": "codes" if name in coded else "float16",
        }
        for name, w in state.items()
    ]
    header = {"architecture": architecture_of(h), "tensors": entries}
    packed_header = compress(json.dumps(header, separators=(",", ":")).encode())
    body = struct.pack("<I", len(packed_header)) + packed_header
    body += b"".join(itertools.chain.from_iterable(frames.values()))
    version = struct.pack("<I", ARTIFACT_VERSION)
    return ARTIFACT_MAGIC + version + hashlib.sha256(body).digest() + body


def architecture_of(h: Hyperparameters) -> dict[str, Any]:
    """The settings without which the weights mean something else."""
    return {name: getattr(h, name) for name in ARCHITECTURE}


def read_frames(artifact: bytes, source: str) -> tuple[dict[str, Any], dict[str, list[bytearray]]]:
    """Header and, by tensor, its decompressed frames.

    Raises RunError, naming `source`, for anything but a whole artifact of this version.
    """
    require(
        artifact[:8] == ARTIFACT_MAGIC,
        f"{source}: not an artifact of this program: expected {ARTIFACT_MAGIC!r}, "
        f"found {artifact[:8]!r}; name the final_model.ptz of a run",
    )
    version = int.from_bytes(artifact[8:12], "little")
    require(
        version == ARTIFACT_VERSION or len(artifact) < 12,
        f"{source}: expected format version {ARTIFACT_VERSION}, found {version}; "
        "use the train_gpt.py that wrote it",
    )
    body = artifact[HASHED_FROM:]
    require(
        hashlib.sha256(body).digest() == artifact[12:HASHED_FROM],
        f"{source}: truncated or damaged, its SHA-256 does not match; "
        "copy it again or repack with RESUME_FROM",
    )
    stream = io.BytesIO(body)

    def read(length: int) -> bytearray:
        return bytearray(zstandard.ZstdDecompressor().decompress(stream.read(length)))

    (header_length,) = struct.unpack("<I", stream.read(4))
    header = json.loads(read(header_length))
    frames = {
        entry["name"]: [read(length) for length in entry["frames"]] for entry in header["tensors"]
    }
    return header, frames


def decode_codes(frames: list[bytearray], shape: list[int]) -> tuple[Tensor, Tensor]:
    """int8 codes (N, R, C) and float32 scales (N, R, 1) of a tensor of kind `codes`."""
    scales = torch.frombuffer(frames[0], dtype=torch.float32).view(-1, shape[-2], 1)
    codes = torch.frombuffer(bytearray().join(frames[1:]), dtype=torch.int8)
    return codes.view(-1, *shape[-2:]), scales


def unpack(artifact: bytes, source: str = "artifact") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Architecture and float32 weights.  Raises RunError for anything but a whole artifact."""
    header, frames = read_frames(artifact, source)
    state = {}
    for entry in header["tensors"]:
        name, shape = entry["name"], entry["shape"]
        if entry["kind"] == "codes":
            w = dequantize(*decode_codes(frames[name], shape))
        else:
            w = torch.frombuffer(frames[name][0], dtype=torch.float16).float()
        state[name] = w.view(shape)
    return header["architecture"], state


def with_blend(stages: Stages, h: Hyperparameters, grid_step: float) -> Stages:
    """`stages` and, if late QAT had a grid step, the weights that go on its grid: `blended`.

    They are the last iterate, moved some of the way to the average.
    """
    if not grid_step:
        return stages
    averaged = stages["averaged"]
    blended = {
        name: torch.lerp(w, averaged[name], h.swa_share) for name, w in stages["trained"].items()
    }
    return stages | {"blended": blended}


def pack_stages(
    stages: Stages,
    h: Hyperparameters,
    grid_step: float,
    budget: int,
    log: Callable[[str], None],
) -> bytes:
    """The artifact, under `budget` bytes, of the stages of `with_blend`.

    Late QAT has trained the last iterate as it is on the grid of `grid_step`, so rounding it there
    costs almost nothing.  On a grid step 2 % larger or smaller that gain is lost.  The blend keeps
    most codes of the last iterate.  The average by itself lost 0.004 bpb (docs/ABLATIONS.md, "The
    blend").
    The average is packed, on the grid that fills the budget, if the blend's grid does not fit or if
    there was no late QAT (0).
    """
    if grid_step:
        blended = stages["blended"]
        check_packable(blended, h)
        artifact, _ = pack_trial(blended, h, grid_step, budget, log)
        if len(artifact) < budget:
            return artifact
        log("note: the grid of late QAT does not fit; the average is packed on a coarser one")
    return pack_to_budget(stages["averaged"], h, budget, log)


def coded_bytes(state: Mapping[str, Tensor], h: Hyperparameters, grid_step: float) -> float:
    """Entropy of all codes."""
    return sum(entropy_bits(codes) for _, codes, _ in quantized_tensors(state, h, grid_step)) / 8


def pack_trial(
    state: Mapping[str, Tensor],
    h: Hyperparameters,
    grid_step: float,
    budget: int,
    log: Callable[[str], None],
) -> tuple[bytes, float]:
    """The artifact on one grid, logged, and the entropy of its codes in bytes."""
    entropy = coded_bytes(state, h, grid_step)
    artifact = pack(state, h, grid_step)
    log(
        f"pack grid_step:{grid_step:.6g} entropy_bytes:{entropy:.0f} "
        f"packed_bytes:{len(artifact)} budget:{budget}"
    )
    return artifact, entropy


def pack_to_budget(
    state: Mapping[str, Tensor], h: Hyperparameters, budget: int, log: Callable[[str], None]
) -> bytes:
    """The artifact with the smallest grid step that stays under `budget` bytes.

    Entropy predicts the size and each trial packing corrects the prediction; a packing that is too
    large doubles the margin.  At most twelve trials.  Raises RunError if the weights are not finite
    or nothing fits.
    """
    check_packable(state, h)
    best = b""
    overhead = (1 - 1 / ZSTD_OVERHEAD) * budget  # bytes over the entropy of the codes
    margin = 0.0005  # share of the budget that is left free
    for _ in range(12):
        target = budget * (1 - margin) - overhead
        grid_step = fit_grid_step(lambda step: coded_bytes(state, h, step), target)
        blob, entropy = pack_trial(state, h, grid_step, budget, log)
        fits = len(blob) < budget
        if fits and len(blob) > len(best):
            best = blob
        full = len(blob) >= (0.997 - margin) * budget
        finest = entropy < 0.99 * target  # the code range allows nothing finer
        if fits and (full or finest):
            return best
        overhead = len(blob) - entropy
        if not fits:
            margin *= 2
    require(best, f"export: nothing fits {budget} bytes; RESUME_FROM with more ARTIFACT_BYTES")
    return best


def check_packable(state: Mapping[str, Tensor], h: Hyperparameters) -> None:
    """Raises RunError for a weight that its format cannot hold."""
    grids = export_grids(h)
    for name, w in state.items():
        highest = math.inf if name in grids else torch.finfo(torch.float16).max
        require(
            torch.isfinite(w).all() and w.abs().max() <= highest,
            f"export: {name} is not finite in its format; set lower learning rates",
        )


# ---- 11. Bytes of the text ----------------------------------------------------------------------
SPACE = "\u2581"  # SentencePiece's mark of a leading space
CASE_MARKS = "\ue001\ue002\ue003\ue004"  # set by prepare_data.py for capitals; they count no bytes
FINEWEB_VAL_BYTES = 151_080_363  # of the published split: pg#543's tokens * loss / ln 2 / bpb
# SHA-256 of the official tokenizers: they keep the number of the rule, whatever decoding gives.
OFFICIAL_TOKENIZERS = {
    "849ea920119b5135ace5016137e82ab397738fc29d723d5f9a6b74c4e31af191",  # fineweb_1024_bpe.model
    "d76de35070ed9feb76afe3a7efc3a1a0e91e9aa4978360ecdc7fbc22a9725512",  # fineweb_4096_bpe.model
    "4e979c92754cc9d7bdebd9dfe5edf3fc0b41b38714b394e4297fa851e3afd516",  # fineweb_8192_bpe.model
}
REPLACEMENT = "\ufffd"  # what SentencePiece decodes each byte to that is part of no character


class ByteTable(NamedTuple):
    """The challenge's rule: UTF-8 bytes that a target token adds to the text (arrays of V).

    A piece counts without its leading mark, and the mark counts 1 unless the previous token is a
    boundary.  The rule is exact if pieces hold a space only in front and nothing is unknown.
    Case marks, alone or within a piece, count 0: the text is the one before they were set.
    """

    base: np.ndarray  # int64, without the leading space; a byte-fallback token is 1
    leading_space: np.ndarray  # bool, counted unless the previous token is a boundary
    boundary: np.ndarray  # bool, control, unknown and unused tokens
    decoder: Any = None  # the SentencePieceProcessor; without it the rule cannot be checked
    official: bool = False  # one of the challenge's own tokenizers
    case_marked: bool = False  # its pieces include the case marks

    def count(self, tokens: np.ndarray) -> int:
        """Bytes of tokens[1:], each given its predecessor."""
        counts = np.bincount(tokens[1:], minlength=len(self.base))
        after_boundary = tokens[1:][self.boundary[tokens[:-1]]]
        uncounted = self.leading_space[after_boundary].sum()
        return int(counts @ (self.base + self.leading_space) - uncounted)


def load_byte_table(tokenizer_path: str, vocab_size: int) -> ByteTable:
    """From a SentencePiece model.  RunError if missing, of another vocabulary or another BOS."""
    path = Path(tokenizer_path)
    try:
        # Not by its path, which SentencePiece takes in UTF-8 alone; no bytes are a model to it.
        model = path.read_bytes() or b"no model"
        decoder = sentencepiece.SentencePieceProcessor(model_proto=model)
        digest = file_digest(path)
    except (RuntimeError, OSError):
        raise RunError(
            f"TOKENIZER_PATH={tokenizer_path}: missing or not a SentencePiece model; {GET_DATA}"
        ) from None
    require(
        decoder.vocab_size() == vocab_size,
        f"TOKENIZER_PATH={tokenizer_path}: expected VOCAB_SIZE={vocab_size} pieces, "
        f"found {decoder.vocab_size()}; set both to the same vocabulary",
    )
    require(
        decoder.bos_id() == BOS_ID,
        f"TOKENIZER_PATH={tokenizer_path}: expected BOS id {BOS_ID}, found {decoder.bos_id()}; "
        "documents could not be told apart: train the tokenizer with that id, then encode again",
    )

    ids = list(range(vocab_size))
    pieces = decoder.id_to_piece(ids)
    kinds = [decoder.is_control(ids), decoder.is_unknown(ids), decoder.is_unused(ids)]
    boundary = np.any(kinds, axis=0)
    spaced = np.array([piece.startswith(SPACE) for piece in pieces])
    case_marked = {"\ue001", "\ue002", "\ue004"} <= set(pieces)  # U+E003 only in others' ones
    sizes = np.array([utf8_size(piece.removeprefix(SPACE), case_marked) for piece in pieces])
    sizes[decoder.is_byte(ids)] = 1
    sizes[boundary] = 0
    official = digest in OFFICIAL_TOKENIZERS
    return ByteTable(sizes, spaced & ~boundary, boundary, decoder, official, case_marked)


def utf8_size(text: str, case_marked: bool) -> int:
    """UTF-8 bytes of `text`, of which case marks, 3 bytes each, stand for none."""
    marks = sum(map(text.count, CASE_MARKS)) if case_marked else 0
    return len(text.encode()) - 3 * marks


def occurrences(tokens: np.ndarray, pattern: list[int]) -> int:
    """How often the ids of `pattern` follow each other in `tokens`."""
    last = max(0, len(tokens) - len(pattern) + 1)
    found = np.ones(last, dtype=bool)
    for offset, token in enumerate(pattern):
        found &= tokens[offset : offset + last] == token
    return int(found.sum())


def spelling(decoder: Any, character: str) -> list[int]:
    """Ids of the byte tokens that spell `character`; -1, no token, if the model has none."""
    ids = [decoder.piece_to_id(f"<0x{byte:02X}>") for byte in character.encode()]
    return [token if decoder.is_byte(token) else -1 for token in ids]


def decoded_bytes(tokens: np.ndarray, table: ByteTable) -> tuple[int, int]:
    """UTF-8 bytes of the text of tokens[1:], and how many byte tokens spell no character.

    SentencePiece decodes document by document; where that does not give the text back, the count
    is set right.  Byte tokens that spell U+2581 stand for a space.  The dummy space that encoding
    adds is no text, but decoding leaves it if byte tokens spell it, or if it stands at the end
    (treat_whitespace_as_suffix), where a space of the text is dropped from the front instead.  A
    byte that belongs to no character, as where a text was cut, decodes to the three of U+FFFD: it
    counts 1, as it did in the text.
    """
    decoder = table.decoder
    dummy = decoder.normalize("a")
    size = replaced = 0
    documents = np.split(tokens, np.flatnonzero(tokens == BOS_ID))
    for start in range(0, len(documents), 512):
        batch = [document.tolist() for document in documents[start : start + 512]]
        for text in decoder.decode(batch):
            size += utf8_size(text, table.case_marked) - 2 * text.count(SPACE)
            replaced += text.count(REPLACEMENT)
            if dummy.endswith(SPACE) and text.endswith((" ", SPACE)):
                size -= 1

    if dummy.startswith(SPACE):
        size -= occurrences(tokens, [BOS_ID, *spelling(decoder, SPACE)])
    if dummy.endswith(SPACE):
        size += int(table.leading_space[tokens[1:][tokens[:-1] == BOS_ID]].sum())
    if replaced:  # less those that are characters of the text, spelled in bytes or within pieces
        replaced -= occurrences(tokens, spelling(decoder, REPLACEMENT))
        for token, times in enumerate(np.bincount(tokens).tolist()):
            if times and not decoder.is_byte(token):
                replaced -= times * decoder.decode([token]).count(REPLACEMENT)

    first = int(tokens[0])  # no target
    first_size = utf8_size(decoder.decode([first]), table.case_marked)
    if decoder.is_byte(first):
        first_size = 1
    return size - 2 * replaced - first_size, replaced


def explain_difference(tokens: np.ndarray, table: ByteTable, difference: int) -> str:
    """The decoded bytes minus the rule's, split by cause."""
    decoder = table.decoder
    ids = list(range(len(table.base)))
    counts = np.bincount(tokens[1:], minlength=len(ids))

    left_out = np.flatnonzero(table.boundary & ~np.array(decoder.is_control(ids))).tolist()
    shown = sum(int(counts[i]) * len(decoder.decode([i]).encode()) for i in left_out)
    marks = np.array([piece[1:].count(SPACE) for piece in decoder.id_to_piece(ids)])
    marks[table.boundary] = 0
    parts = {
        "unknown tokens, of no bytes by the rule": shown,
        "spaces within or behind pieces, of 3 bytes by the rule": -2 * int(counts @ marks),
        "spaces in 3 byte tokens": -2 * occurrences(tokens, spelling(decoder, SPACE)),
    }
    rest = difference - sum(parts.values())
    parts["the dummy space of each document and spaces beside control or unknown tokens"] = rest
    return ", ".join(f"{size:+,} for {cause}" for cause, size in parts.items() if size)


def count_text_bytes(tokens: np.ndarray, table: ByteTable) -> tuple[int, str | None]:
    """UTF-8 bytes of the text of tokens[1:], and a line for the log where they need a word.

    They are those that decoding gives, whatever the tokenizer; but for the official tokenizers
    those of the rule, by which the challenge compares.  Takes about 10 s for 62M tokens.
    """
    by_rule = table.count(tokens)
    if table.decoder is None:
        return by_rule, None

    decoded, stray = decoded_bytes(tokens, table)
    notes = []
    if decoded != by_rule:
        reasons = explain_difference(tokens, table, decoded - by_rule)
        used = "the rule, as the tokenizer is official" if table.official else "the decoded text"
        notes.append(
            f"the tokens decode to {decoded:,} bytes, the challenge's rule counts {by_rule:,} "
            f"({reasons}); val_bytes and val_bpb are by {used}"
        )
    if stray:
        notes.append(
            f"{stray:,} byte tokens spell no character and count 1 each: "
            "a document was cut, or the tokenizer is another one's"
        )
    used_bytes = by_rule if table.official else decoded
    return used_bytes, "; ".join(notes) or None


def stated_by_manifest(data_path: str) -> tuple[int, list[str]] | None:
    """Bytes of the validation text and the SHA-256 of each shard; None if it states no such."""
    try:
        split = read_manifest(data_path)["splits"]["val"]
        return int(split["bytes"]), [shard["sha256"] for shard in split["shards"]]
    except (LookupError, TypeError, ValueError):
        return None


def original_bytes(h: Hyperparameters, tokens: np.ndarray, counted: int) -> tuple[int, str]:
    """UTF-8 bytes of the original text of a case-marked split, and a line for the log: the proof.

    The `counted` bytes of the pieces are right if prepare_data.py asserted them against the text,
    which the manifest of these very shards states.  Other programs put bytes per token beside the
    shards, some of a text before a normaliser: the smaller number divides.
    RunError if what is stated is of other shards or of another text.
    """
    folder = Path(h.data_path)
    manifest = stated_by_manifest(h.data_path)
    if manifest:
        stated, digests = manifest
        found = [file_digest(path) for path in shard_paths(h.data_path, "val")]
        require(
            (found, counted) == (digests, stated),
            f"{folder}/manifest.json states {stated:,} bytes of text for other shards than these, "
            f"of {counted:,} bytes by the tokenizer's pieces; build the case-marked shards again",
        )
        return counted, f"manifest.json proves val_bytes {counted:,} for these shards"

    beside = sorted(folder.glob("fineweb_val_bytes_*.bin"))
    if not beside:
        return counted, (
            f"neither manifest.json nor fineweb_val_bytes_*.bin proves val_bytes {counted:,}, "
            "which are by the tokenizer's pieces alone"
        )
    sizes = np.concatenate([read_shard(path) for path in beside])
    stated = int(sizes[1:].sum(dtype=np.int64))
    require(
        len(sizes) == len(tokens) and abs(stated - counted) < counted / 1000,
        f"{beside[0]}: states {stated:,} bytes for {len(sizes):,} tokens, expected {len(tokens):,} "
        f"of {counted:,} bytes by the tokenizer's pieces; fetch shards and bytes again",
    )
    return min(stated, counted), (
        f"fineweb_val_bytes_*.bin state {stated:,} bytes of text, the tokenizer's pieces count "
        f"{counted:,}; val_bpb is by the smaller number"
    )


def foreign_tokenizer(tokens: np.ndarray, table: ByteTable) -> str | None:
    """A line for the log if the shards seem to be of another tokenizer, else None.

    Encoding what a document decodes to gives its tokens again, but for a dummy space that stays in
    the text.  With another tokenizer of the same size, tokens decode to fragments that it would
    never encode so.
    """
    decoder = table.decoder
    if decoder is None:
        return None
    sample = tokens[: 1 << 17]
    control = np.array(decoder.is_control(list(range(len(table.base)))))
    parts = np.split(sample, np.flatnonzero(control[sample]))
    # The first part has no beginning, the last one may be cut; unknown text has no tokens.
    known = [part[1:] for part in parts[1:-1] if not table.boundary[part[1:]].any()]
    known = [document for document in known if len(document)]
    edge = 0
    if not known:  # blocks then, less what a cut changes at their ends
        runs = np.split(sample, np.flatnonzero(table.boundary[sample]))
        known = [run[i : i + 256] for run in runs for i in range(1, len(run) - 32, 256)]
        edge = 8

    same = 0
    for ids in known:
        again = np.array(decoder.encode(decoder.decode(ids.tolist())), dtype=ids.dtype)
        same += ids[edge : len(ids) - edge].tobytes() in again.tobytes()
    if same >= 0.8 * len(known):
        return None
    return (
        f"only {same} of {len(known)} validation documents give their tokens again when their text "
        "is encoded with TOKENIZER_PATH; if the shards are of another tokenizer, val_bpb is wrong"
    )


# ---- 12. Evaluation -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Score:
    """Sums over a split."""

    nats: float
    tokens: int  # that were scored
    text_bytes: int  # UTF-8 bytes that they stand for
    seconds: float  # taken

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        return self.nats / math.log(2) / self.text_bytes

    def __str__(self) -> str:
        return f"val_loss:{self.loss:.8f} val_bpb:{self.bpb:.8f} eval_time:{self.seconds:.1f}s"


class WindowGroup(NamedTuple):
    """Windows that score the same number of targets."""

    starts: range  # first token of each window
    scored: int  # last targets of each window that count


class CutShort(Exception):
    """A signal came while a split was scored."""


class Evaluator:
    """Scores every token after the first exactly once, from its past only.

    Plain windows do not overlap.  Sliding windows start `stride` apart and score their last
    `stride` targets, the first window all of its own; so T - stride tokens or more precede a
    target, where the split has so many.  Sums are float64.
    """

    def __init__(self, h: Hyperparameters, runtime: Runtime, tokens: np.ndarray, table: ByteTable):
        self.h = h
        self.runtime = runtime
        self.targets = len(tokens) - 1
        require(self.targets > 0, "validation split: expected at least 2 tokens; build it again")
        self.text_bytes, bytes_note = count_text_bytes(tokens, table)
        self.notes = [note for note in (bytes_note, foreign_tokenizer(tokens, table)) if note]
        self.val_digest = hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest()
        self.dataset = dataset_label(h, self.text_bytes)
        self.tokens = torch.from_numpy(tokens.astype(np.int32)).to(runtime.device)
        batch_tokens = min(h.val_batch_size // runtime.world_size, h.micro_batch_tokens)
        # Windows at once.  No split has more windows than targets.
        self.rows = max(1, min(batch_tokens // h.train_seq_len, self.targets))
        self.dump: dict[str, np.ndarray] = {}  # nats of each target by kind of window, if asked for
        # Two graphs; the first serves all windows.  `deterministic`: Inductor times no kernels,
        # since another choice gives another sum.
        self.hidden = runtime.compile(GPT.final_hidden, deterministic=True)
        self.losses = runtime.compile(GPT.losses, deterministic=True)

    @classmethod
    def open(cls, h: Hyperparameters, runtime: Runtime) -> Evaluator:
        """Of the validation split and the tokenizer that `h` names, both checked."""
        tokens = np.concatenate(open_split(h.data_path, "val"))
        check_vocabulary(tokens, h.vocab_size, f"{h.data_path}/fineweb_val_*.bin")
        table = load_byte_table(h.tokenizer_path, h.vocab_size)
        check_tokenizer(h)
        evaluator = cls(h, runtime, tokens, table)
        if table.case_marked:
            evaluator.text_bytes, proof = original_bytes(h, tokens, evaluator.text_bytes)
            evaluator.notes.append(f"the tokenizer is case-marked; {proof}")
        require(evaluator.text_bytes, f"{h.data_path}/fineweb_val_*.bin: no text; build it again")
        return evaluator

    @torch.no_grad()
    def score(
        self,
        model: GPT,
        stride: int = 0,
        log: RunLog | None = None,
        signals: list[int] | None = None,
    ) -> Score:
        """Plain (stride 0) or sliding windows over the whole split; with `log`, tells how far.

        Given the list of `received_signals`, it raises CutShort, on all ranks, soon after one of
        them has received any.
        """
        began = time.perf_counter()
        # Batches are padded with windows past the end, whose targets land behind the last one.
        past_end = self.targets + 1
        nats = torch.zeros(past_end + 1, dtype=torch.float64, device=self.tokens.device)
        scored_tokens = torch.zeros((), dtype=torch.float64, device=self.tokens.device)
        for starts, scored in self.window_groups(stride):
            mine = starts[self.runtime.rank :: self.runtime.world_size]
            left = mine
            while left and not signals:
                position, losses = self.last_losses(model, left, scored)
                nats[position.clamp(max=past_end)] = losses.double()
                scored_tokens += (position <= self.targets).sum()
                left = left[len(losses) :]
                if log and len(mine) > 1:  # the first sliding window is a group by itself
                    self.tell(log, time.perf_counter() - began, 1 - len(left) / len(mine))

        nats = self.runtime.sum(nats)[1:past_end]  # the first token is no target
        scored_tokens = self.runtime.sum(scored_tokens)
        if signals is not None and scored_tokens < self.targets:
            raise CutShort
        assert int(scored_tokens) == self.targets, f"{scored_tokens} scored, not {self.targets}"
        if log and self.h.eval_dump:
            kind = "sliding" if stride else "plain"
            self.dump[kind] = nats.to(torch.float32).cpu().numpy()
        total = float(nats.sum())
        return Score(total, self.targets, self.text_bytes, time.perf_counter() - began)

    def window_groups(self, stride: int) -> list[WindowGroup]:
        """All windows of the split; a range may end with one that is not full."""
        T = self.h.train_seq_len
        end = self.targets
        if stride in (0, T):
            return [WindowGroup(range(0, end, T), T)]
        first = WindowGroup(range(0, end, end), T)
        others = range(stride, max(end - T, 0) + stride, stride)
        return [first, WindowGroup(others, stride)]

    def last_losses(self, model: GPT, starts: range, scored: int) -> tuple[Tensor, Tensor]:
        """Positions and losses (B, scored) of the last targets of the next B = `rows` windows."""
        T = self.h.train_seq_len
        device = self.tokens.device
        first = starts.start + starts.step * torch.arange(self.rows, device=device)
        position = first[:, None] + torch.arange(T + 1, device=device)
        window = self.tokens[position.clamp(max=self.targets)].long()
        try:
            hidden = self.hidden(model, window[:, :-1])[:, -scored:]
            return position[:, -scored:], self.losses(model, hidden, window[:, -scored:])
        except torch.cuda.OutOfMemoryError:
            require(
                self.rows > 1,
                f"evaluation: one window of TRAIN_SEQ_LEN={T} needs more GPU memory than is free; "
                "free some, set EVAL_ONLY or RESUME_FROM",
            )
        # Outside the handler, whose exception still holds the tensors that filled the memory.
        self.rows //= 2
        return self.last_losses(model, starts, scored)

    def tell(self, log: RunLog, spent: float, share: float) -> None:
        """Progress of an evaluation that will take more than 10 s in all."""
        if spent > max(2, 10 * share):
            left = spent / share - spent
            log.progress(f"eval:{share:.0%} seconds:{spent:.0f} left:{left:.0f}", share)

    def warm_up(self, model: GPT) -> None:
        """Compiles the evaluation graphs: scores dummy tokens, of which every rank has windows."""
        dummy = copy.copy(self)
        dummy.targets = (self.runtime.world_size + 1) * self.h.train_seq_len
        dummy.tokens = self.tokens.new_zeros(dummy.targets + 1)
        for stride in {0, self.h.eval_stride}:
            dummy.score(model, stride)


def dataset_label(h: Hyperparameters, text_bytes: int) -> str:
    """What the validation split is.  FineWeb's is told by its size in bytes.

    That size is the same for all vocabularies but for a few kB of what a tokenizer does not know.
    """
    if Path(h.data_path).name == f"sample_sp{h.vocab_size}":  # as prepare_data.py calls it
        return "sample"
    if abs(text_bytes / FINEWEB_VAL_BYTES - 1) < 1e-3:
        return f"fineweb10B_sp{h.vocab_size}"
    return "proxy"


# ---- 13. Training -------------------------------------------------------------------------------
class BatchLayout(NamedTuple):
    """How the sequences of a step divide."""

    sequences: int  # a step, over all ranks
    local: int  # of each rank
    micro: int  # micro-batches of each rank


def batch_layout(h: Hyperparameters, world_size: int) -> BatchLayout:
    """The fewest micro-batches that MICRO_BATCH_TOKENS allows.  Raises RunError if uneven."""
    sequences = h.train_batch_tokens // h.train_seq_len
    require(
        sequences % world_size == 0,
        f"TRAIN_BATCH_TOKENS={h.train_batch_tokens}: {sequences} sequences do not divide over "
        f"{world_size} ranks; set a multiple of {h.train_seq_len} x {world_size} or change "
        "--nproc_per_node",
    )
    local = sequences // world_size
    most = h.micro_batch_tokens // h.train_seq_len
    counts = (n for n in range(1, local + 1) if local % n == 0 and local // n <= most)
    return BatchLayout(sequences, local, next(counts))


def weight_budget(h: Hyperparameters) -> int:
    """Bytes that the cap leaves to the packed weights; the rest is this file's code."""
    return h.artifact_bytes - len(own_code())


def load_model(
    h: Hyperparameters, runtime: Runtime, state: Mapping[str, Tensor], kernels: Kernels
) -> GPT:
    """A fresh model with the given float32 weights as working weights."""
    weights = {name: w.to(runtime.device, runtime.dtype) for name, w in state.items()}
    return GPT(h, weights, kernels)


def loss_share(model: GPT, tokens: Tensor, share: float, seq_len: int) -> Tensor:
    """Mean loss over a micro-batch (b, T+1), times its share of the global batch.

    Its rows are cut into sequences of `seq_len`, which do not see each other.
    """
    inputs = tokens[:, :-1].reshape(-1, seq_len)
    targets = tokens[:, 1:].reshape(-1, seq_len)
    return model.mean_loss(inputs, targets) * share


def capture(function: Callable[..., Any], pool: Any, *held: Tensor) -> Callable[..., Any]:
    """CUDA graph of `function(*held)`, which has run before.

    Launching a step's kernels one by one takes the host longer than the GPU needs to run some of
    them; a graph is one launch.  Calls overwrite the arguments `held` and the earlier results.
    Graphs of one memory `pool` share their temporaries: no two may run at once, and a run of one
    may overwrite the results of those captured after it.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.empty_cache()  # leaves the pool what the launched kernels used
    mode = "thread_local"  # NCCL's thread may run
    with torch.cuda.graph(graph, pool=pool, capture_error_mode=mode):
        results = function(*held)

    def replay(*arguments: Tensor) -> Any:
        for tensor, new in zip(held, arguments, strict=True):
            tensor.copy_(new)
        graph.replay()
        return results

    return replay


@dataclass
class StepGraphs:
    """CUDA graphs of the parts of a step; a part without one is launched kernel by kernel.

    Those of the update read the tensors into which that of the gradients writes.
    """

    gradients: Callable[[Tensor], list[Tensor]] | None = None
    update: Callable[[], Tensor] | None = None
    update_late_qat: Callable[[], Tensor] | None = None


class Trainer:
    """Model, optimizer and averages, and the one `train_step` that warm-up and training share."""

    def __init__(self, h: Hyperparameters, runtime: Runtime, kernels: Kernels):
        self.h = h
        self.runtime = runtime
        self.model = load_model(h, runtime, initial_weights(h), kernels)
        self.optimizer = Optimizer(self.model, h, runtime)
        self.average = RunningMean(self.optimizer.masters())
        self.layout = batch_layout(h, runtime.world_size)
        first = runtime.rank * self.layout.local
        self.rows = range(first, first + self.layout.local)  # of every batch, this rank's
        self.loss = runtime.compile(loss_share)
        self.seq_len = h.train_seq_len  # of the steps from now on
        self.graph_pool = torch.cuda.graph_pool_handle() if runtime.on_cuda else None
        # By the plan of the model's layers, which candidates of bench/candidates.py change in the
        # run, and by `seq_len`.
        self.graphs = collections.defaultdict[tuple[Plan, int], StepGraphs](StepGraphs)
        self.qat_steps = 0
        self.graphs_warmed_up = 0  # compiled by the end of the warm-up

    def train_step(
        self, tokens: Tensor, lr: float, decay: float = 0.0, spoiled: bool = False
    ) -> Tensor:
        """One optimizer step on this rank's (local, T+1) tokens; the global mean loss, 0-d.

        `spoiled`: these are no tokens to train on.  The loss is nan then on all ranks, which so
        learn of it together, and no weight moves.
        """
        sums: list[Tensor] = []
        for micro_batch in tokens.chunk(self.layout.micro):
            new = self.gradients(micro_batch)
            if self.layout.micro > 1:  # micro-batches add up in float32
                new = [tensor.to(torch.float32, copy=True) for tensor in new]
            sums = list(torch._foreach_add(sums, new)) if sums else new
        if spoiled:
            torch._foreach_mul_(sums, math.nan)
        self.optimizer.lr.fill_(lr)
        self.optimizer.decay.fill_(decay)
        self.qat_steps += self.optimizer.late_qat.on
        return self.update(sums)

    @property
    def step_graphs(self) -> StepGraphs:
        """Those of the steps as they are now."""
        return self.graphs[self.model.plan, self.seq_len]

    def gradients(self, tokens: Tensor) -> list[Tensor]:
        graph = self.step_graphs.gradients
        return graph(tokens) if graph else self.loss_and_gradients(tokens)

    def loss_and_gradients(self, tokens: Tensor) -> list[Tensor]:
        """Share of the global mean loss of one micro-batch, then its gradient by parameter."""
        share = 1.0 / (self.layout.micro * self.runtime.world_size)
        loss = self.loss(self.model, tokens, share, self.seq_len)
        return [loss.detach(), *torch.autograd.grad(loss, list(self.model.parameters()))]

    def update(self, sums: list[Tensor]) -> Tensor:
        """The optimizer's step; a graph of it reads the tensors that it was captured with."""
        graphs = self.step_graphs
        graph = graphs.update_late_qat if self.optimizer.late_qat.on else graphs.update
        return graph() if graph else self.optimizer.update(sums[0], sums[1:])

    def capture(self, tokens: Tensor) -> None:
        """CUDA graphs of what has run before: forward and backward of one micro-batch, and the
        update as it is now, with or without late QAT.

        Collectives and sums of micro-batches come between the two, so the update is captured only
        where there are none.
        """
        graphs = self.step_graphs
        if not graphs.gradients:
            micro_batch = tokens.chunk(self.layout.micro)[0].clone()
            graphs.gradients = capture(self.loss_and_gradients, self.graph_pool, micro_batch)
        if self.layout.micro > 1 or self.runtime.world_size > 1:
            return
        sums = self.gradients(tokens)
        update = capture(lambda: self.optimizer.update(sums[0], sums[1:]), self.graph_pool)
        if self.optimizer.late_qat.on:
            graphs.update_late_qat = update
        else:
            graphs.update = update

    def warm_up(self, evaluator: Evaluator) -> None:
        """Compiles and runs every graph on random tokens, then undoes it bit for bit."""
        device = self.runtime.device
        restore = self.optimizer.snapshot()
        generator = torch.Generator(device).manual_seed(self.runtime.rank)
        devices = [device] if self.runtime.on_cuda else []
        with torch.random.fork_rng(devices):
            self.warm_up_steps(generator)
            self.optimizer.start_late_qat(self.weight_bytes())
            self.warm_up_steps(generator)
            evaluator.warm_up(self.model)
        restore()
        self.average = RunningMean(self.optimizer.masters())
        self.qat_steps = 0
        self.graphs_warmed_up = graphs_compiled()

    def warm_up_steps(self, generator: torch.Generator) -> None:
        """Steps on sequences of every length, those of TRAIN_SEQ_LEN last.

        All are launched before the first is captured, as a graph keeps its memory from then on.
        """
        h = self.h
        shape = (self.layout.local, h.train_seq_len + 1)
        for number in range(h.warmup_steps):
            for length in seq_lens(h):
                self.seq_len = length
                tokens = torch.randint(
                    h.vocab_size, shape, generator=generator, device=generator.device
                )
                self.train_step(tokens, 1.0)
            if number == 0 and self.runtime.on_cuda:
                for length in seq_lens(h):
                    self.seq_len = length
                    self.capture(tokens)

    def stages(self) -> Stages:
        """Whole float32 weights of the last iterate and of the average, if there is one."""
        trained = self.optimizer.gather(self.optimizer.masters())
        averaged = trained
        if self.average.count:
            averaged = self.optimizer.gather(self.average.mean)
        return {"trained": trained, "averaged": averaged}

    def weight_bytes(self) -> float:
        """Entropy of codes, in bytes, that fills the cap."""
        rounded_names = self.optimizer.late_qat.grids
        parameters = self.model.named_parameters()
        floats = sum(2 * p.numel() for name, p in parameters if name not in rounded_names)
        return (weight_budget(self.h) - floats) / ZSTD_OVERHEAD


class Clock:
    """Seconds of training.  It stands still while anything else is done."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.total = 0.0  # up to the latest stop
        self.began: float | None = None

    def start(self) -> None:
        self.began = time.perf_counter()

    def stop(self) -> None:
        """When the device has done everything that is queued."""
        if self.runtime.on_cuda:
            torch.cuda.synchronize()
        self.total = self.elapsed()
        self.began = None

    def elapsed(self) -> float:
        if self.began is None:
            return self.total
        return self.total + time.perf_counter() - self.began


class QueuedStep(NamedTuple):
    """A step that the host has launched and the device may not have done."""

    number: int
    loss: Tensor  # on the host; valid once the event has come
    done: torch.cuda.Event | None  # None on a CPU, where it is done already


class PendingLosses:
    """Losses of queued steps.

    The host stays at most two steps ahead of the device, so that the device never waits for Python,
    and only losses of finished steps are read, so that reading does not wait for the device.
    """

    AHEAD = 2

    def __init__(self, clock: Clock, report: Callable[[int, float, float, float], None]):
        self.clock = clock
        self.report = report  # gets step, loss, the clock at its end and seconds a step
        self.queue = collections.deque[QueuedStep]()
        self.ends = collections.deque[float](maxlen=17)  # clock at the ends of the latest steps
        self.latest = collections.deque[float](maxlen=5)  # finite losses
        self.fault = ""  # of the first step whose loss is not finite

    def push(self, step: int, loss: Tensor) -> None:
        """Queues the copy of a loss to the host and waits for the steps too far behind it."""
        if not self.clock.runtime.on_cuda:
            self.queue.append(QueuedStep(step, loss, None))
            self.land()
            return
        on_host = torch.empty((), pin_memory=True).copy_(loss, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self.queue.append(QueuedStep(step, on_host, done))
        self.land(self.AHEAD)

    def land(self, in_flight: int = 0) -> None:
        """Waits until at most so many steps are queued, and reports those that have ended."""
        while len(self.queue) > in_flight:
            step = self.queue.popleft()
            if step.done:
                step.done.synchronize()
            self.ends.append(self.clock.elapsed())
            loss = float(step.loss)
            if math.isfinite(loss):
                self.latest.append(loss)
                self.report(step.number, loss, self.ends[-1], self.seconds_per_step())
            elif not self.fault:
                before = ", ".join(f"{value:.4f}" for value in self.latest)
                self.fault = (
                    f"step {step.number}: the loss is {loss} (before: {before}); "
                    "lower MATRIX_LR, EMBED_LR or SCALAR_LR"
                )

    def seconds_per_step(self) -> float:
        """Mean over the latest steps; 0 before two have ended."""
        if len(self.ends) < 2:
            return 0.0
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)

    def projected_end(self, more: int) -> float:
        """Clock at which the device will have finished what is queued and `more` steps."""
        return self.clock.elapsed() + (len(self.queue) + more) * self.seconds_per_step()


class TrainingLines:
    """The lines on training: as the challenge prints them, and a live one on a terminal."""

    def __init__(self, evaluator: Evaluator, log: RunLog):
        self.h = evaluator.h
        self.runtime = evaluator.runtime
        self.log = log
        # As if training tokens stood for as many bytes as those of validation.
        self.bpb_per_nat = evaluator.targets / evaluator.text_bytes / math.log(2)
        self.previous_end = 0.0  # clock at the end of the step before

    def step(self, step: int, loss: float, end: float, seconds: float) -> None:
        """Called for every step that has ended; `seconds` is the mean of the latest ones."""
        another_second = int(end) > int(self.previous_end)
        self.previous_end = end
        if step <= 10 or step % self.h.train_log_every == 0:
            self.report(step, f"train_loss:{loss:.4f}", end)
        elif self.log.terminal and another_second and seconds:
            self.log.progress(self.status(step, loss, end, seconds))

    def report(self, step: int, what: str, clock: float) -> None:
        average_ms = clock * 1e3 / step
        self.log(
            f"step:{step}/{self.h.iterations} {what} train_time:{clock * 1e3:.0f}ms "
            f"step_avg:{average_ms:.2f}ms"
        )

    def validation(self, step: int, score: Score, clock: float) -> None:
        self.report(step, f"val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f}", clock)

    def status(self, step: int, loss: float, clock: float, seconds: float) -> str:
        """`seconds` is the mean duration of a step."""
        h = self.h
        tokens_per_second = h.train_batch_tokens / seconds
        progress = progress_of(h, step, clock)
        left = clock / progress - clock
        mfu = ""
        if self.runtime.on_cuda:
            # Per token 6 a weight and attention's causal half.  989e12 a second is what NVIDIA
            # states for an H100 SXM in dense bfloat16.
            attended = h.num_layers * seq_len_at(h, progress) * h.model_dim
            per_token = 6 * (h.parameters() + attended)
            share = per_token * tokens_per_second / 989e12 / self.runtime.world_size
            mfu = f"MFU:{share:.0%} "
        return (
            f"step:{step}/{h.iterations} loss:{loss:.4f} bpb:{loss * self.bpb_per_nat:.3f} "
            f"{seconds * 1e3:.1f}ms {tokens_per_second:,.0f} tokens/s {mfu}left:{left:.0f}s"
        )


def ending_signals() -> list[signal.Signals]:
    """Ctrl-C, `kill`, and the end of the terminal, less those that the caller has ignored.

    nohup has the last ignored, and a shell the first of what a script starts in the background.
    """
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]


ASK_SECONDS = 5.0  # of the clock, between looks at signals of all ranks; torchrun kills after 30


@contextlib.contextmanager
def received_signals() -> Iterator[list[int]]:
    """Signals that would end the process end up in the list instead."""
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in ending_signals()
    }
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@dataclass
class TrainingFacts:
    """What is reported of a training run; saved with its weights."""

    step_stop: int
    wallclock_seconds: float
    seed: int
    qat_steps: int
    step_avg_ms: float
    swa_steps: int
    grid_step: float  # late QAT's; 0: it was never on
    train_shards: int
    train_tokens: int
    train_digest: str  # of the training split
    code_sha256: str  # of the program that trained
    final_train_loss: float | None
    interrupted: bool
    graphs_compiled_on_clock: int
    fault: str  # empty: none

    def __str__(self) -> str:
        return " ".join(f"{name}:{value}" for name, value in asdict(self).items() if value != "")


def warm_up(trainer: Trainer, evaluator: Evaluator, log: RunLog) -> None:
    """Outside of `received_signals`: there is nothing to save yet."""
    began = time.perf_counter()
    trainer.warm_up(evaluator)
    log(f"warm-up:{time.perf_counter() - began:.1f}s graphs:{graphs_compiled()}")


def train(
    h: Hyperparameters,
    runtime: Runtime,
    log: RunLog,
    evaluator: Evaluator,
    trainer: Trainer,
    plan: BatchPlan,
    signals: list[int],
) -> tuple[Stages, TrainingFacts]:
    """The loop under the clock, after the warm-up; `signals` are those of `received_signals`."""
    optimizer = trainer.optimizer
    loader = prefetch(plan, trainer.rows, h.vocab_size, runtime.device)
    clock = Clock(runtime)
    lines = TrainingLines(evaluator, log)
    losses = PendingLosses(clock, lines.step)
    step = 0
    progress = 0.0
    interrupted = False
    asked = 0.0  # when the other ranks were last asked for signals
    data_fault = ""

    runtime.agree_on(None)  # all ranks are ready
    clock.start()
    while step < h.iterations and not losses.fault:
        # All ranks follow rank 0's clock.  Of the two steps that it projects, one is margin.
        end, elapsed, interrupted = runtime.agree_on(
            (losses.projected_end(2), clock.elapsed(), bool(signals))
        )
        if elapsed - asked > ASK_SECONDS:  # a node can be stopped by itself
            asked = elapsed
            interrupted = any(runtime.gather(interrupted or bool(signals)))
        out_of_time = 0 < h.max_wallclock_seconds < end
        if step > 0 and (interrupted or out_of_time):
            break

        if h.val_loss_every and step and step % h.val_loss_every == 0:
            validate(step, evaluator, trainer.model, losses, lines, signals)

        batch = next(loader)
        now = plan_step(h, step, elapsed, progress)
        progress = now.progress
        step += 1
        switch_on(trainer, now, step, log)
        lr = now.lr * lr_warmup(h, step)
        loss = trainer.train_step(batch.tokens, lr, now.decay, spoiled=bool(batch.fault))
        data_fault = data_fault or batch.fault
        if now.lr < h.swa_threshold:
            trainer.average.update(optimizer.masters())
        losses.push(step, loss)
    losses.land()
    clock.stop()

    loader.close()
    data_faults = [fault for fault in runtime.gather(data_fault) if fault]
    losses.fault = data_faults[0] if data_faults else losses.fault
    facts = training_facts(trainer, plan, clock, losses, step, interrupted)
    log(f"training {facts}")
    return trainer.stages(), facts


def switch_on(trainer: Trainer, now: StepPlan, step: int, log: RunLog) -> None:
    """What changes on the way and is due before this step: the sequences' length and late QAT."""
    optimizer = trainer.optimizer
    if now.seq_len != trainer.seq_len:
        trainer.seq_len = now.seq_len
        log(f"sequence_length:{now.seq_len} step:{step} progress:{now.progress:.4f}")
    if now.lr < trainer.h.qat_threshold and not optimizer.late_qat.on:
        grid_step = optimizer.start_late_qat(trainer.weight_bytes())
        log(f"late_qat:on step:{step} lr_scale:{now.lr:.4f} grid_step:{grid_step:.6g}")


def validate(
    step: int,
    evaluator: Evaluator,
    model: GPT,
    losses: PendingLosses,
    lines: TrainingLines,
    signals: list[int],
) -> None:
    """The training clock stands still for it.

    A signal cuts it short: it may take longer than the 30 s after which torchrun kills.
    """
    losses.land()
    losses.clock.stop()
    with contextlib.suppress(CutShort):
        score = evaluator.score(model, signals=signals)
        lines.validation(step, score, losses.clock.total)
    losses.clock.start()


def training_facts(
    trainer: Trainer,
    plan: BatchPlan,
    clock: Clock,
    losses: PendingLosses,
    step: int,
    interrupted: bool,
) -> TrainingFacts:
    return TrainingFacts(
        step_stop=step,
        wallclock_seconds=round(clock.total, 3),
        seed=trainer.h.seed,
        qat_steps=trainer.qat_steps,
        step_avg_ms=round(clock.total * 1e3 / step, 3),
        swa_steps=trainer.average.count,
        grid_step=trainer.optimizer.late_qat.step_or_zero(),
        train_shards=len(plan.shards),
        train_tokens=sum(map(len, plan.shards)),
        train_digest=plan.digest,
        code_sha256=own_digest(),
        final_train_loss=losses.latest[-1] if losses.latest else None,
        interrupted=interrupted,
        graphs_compiled_on_clock=graphs_compiled() - trainer.graphs_warmed_up,
        fault=losses.fault,
    )


def graphs_compiled() -> int:
    """By this process, so far; none while nothing has imported the compiler."""
    if "torch._dynamo" not in sys.modules:
        return 0
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ---- 14. Stages and main ------------------------------------------------------------------------
class RunFiles:
    """What a run writes into OUTPUT_DIR.

    Until everything has been scored, names hold `.partial`, so that a run which fails leaves the
    files of the one before alone.
    """

    PARTIAL = ".partial"

    def __init__(self, h: Hyperparameters):
        self.h = h
        self.folder = Path(h.output_dir)
        self.log = self.partial(f"{self.kind}.log")
        self.weights = self.partial("final_model.pt")
        self.artifact = self.partial("final_model.ptz")
        self.weights_fault = ""  # why they could not be saved
        if h.eval_only:
            self.artifact = Path(h.eval_only)

    @property
    def kind(self) -> str:
        if self.h.eval_only:
            return "eval"
        if self.h.resume_from:
            return "resume"
        return f"train_seed{self.h.seed}"

    def partial(self, name: str) -> Path:
        path = self.folder / name
        return path.with_suffix(self.PARTIAL + path.suffix)

    @contextlib.contextmanager
    def locked(self, runtime: Runtime) -> Iterator[None]:
        """Keeps every other run out of the folder.  Raises RunError if another one is in it.

        The system drops the lock with the process, however that ends; the file itself says nothing.
        """
        if runtime.rank:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "run.lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RunError(
                    f"OUTPUT_DIR={self.folder}: in use by {file.read() or 'another run'}; "
                    "set another OUTPUT_DIR, or start all ranks by one torchrun"
                ) from None
            except OSError:  # some network file systems have no locks: the run goes on without
                yield
                return
            file.truncate(0)
            began = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {platform.node()} since {began}")
            file.flush()
            yield

    def check_names(self) -> None:
        """Raises RunError if a folder has the name of a file that is written at the end."""
        names = ("train.log", "submission.json", f"result_seed{self.h.seed}.json", "final_model.pt",
                 "final_model.ptz", f"{self.kind}.log")  # fmt: skip
        for path in (self.weights, *(self.folder / name for name in names)):
            require(not path.is_dir(), f"{path}: is a folder; move it or set another OUTPUT_DIR")

    def check_space(self) -> None:
        """Raises RunError if what a training run writes does not fit on the disk."""
        # Two stages in float32; the artifact, of 2 bytes a weight at most; the log and the results.
        artifact = min(self.h.artifact_bytes, 2 * self.h.parameters())
        needed = 8 * self.h.parameters() + artifact + 2_000_000
        disk = shutil.disk_usage(self.folder)  # all zeros: it does not tell
        require(
            disk.free > needed or not disk.total,
            f"OUTPUT_DIR={self.folder}: {disk.free:,} bytes are free, the run may write "
            f"{needed:,}; free space or set another OUTPUT_DIR",
        )

    def finish(self, log: RunLog) -> None:
        """Gives the files that this run wrote their names.  Raises OSError if the disk is full."""
        log.flush()
        written = [self.log]
        if not self.h.eval_only:
            written.append(self.artifact)
        if not self.h.eval_only and not self.h.resume_from:
            if not self.weights_fault:
                written.append(self.weights)
            write_atomic(self.folder / "train.log", self.log.read_bytes())
        for path in written:
            os.replace(path, path.with_name(path.name.replace(self.PARTIAL, "")))


class Session(NamedTuple):
    """What all stages of a run share."""

    h: Hyperparameters
    runtime: Runtime
    files: RunFiles
    log: RunLog
    evaluator: Evaluator
    environment: dict[str, Any]  # versions and hardware
    kernels: Kernels


class RunResult(NamedTuple):
    """What a run came to."""

    scores: dict[str, Score]  # trained, averaged, blended, packed, sliding; those that there are
    facts: TrainingFacts | None  # None: an artifact was scored
    bytes_code: int
    bytes_model: int


def run(h: Hyperparameters, runtime: Runtime, checkpoint: Checkpoint | None = None) -> RunResult:
    """The stages: train or load, pack, score what is on disk, report."""
    files = RunFiles(h)
    with files.locked(runtime):
        session = open_session(h, runtime, files)
        scores: dict[str, Score] = {}
        facts = None
        if not h.eval_only:
            checkpoint = checkpoint or train_and_save(session)
            facts = checkpoint.facts
            with resumable(session):
                stages = with_blend(checkpoint.stages, h, facts.grid_step)
                for stage, state in stages.items():
                    model = load_model(h, runtime, state, session.kernels)
                    scores[stage] = score(session, model, f"stage:{stage}")
                write_artifact(session, stages, facts.grid_step)
        with resumable(session):
            bytes_model = score_from_disk(session, scores)
            result = RunResult(scores, facts, len(own_code()), bytes_model)
            if runtime.rank == 0:
                report(session, result)
        return result


@contextlib.contextmanager
def resumable(session: Session) -> Iterator[None]:
    """An interrupt or a full disk in here ends with a message that names the saved weights."""
    weights = session.h.resume_from or session.files.weights
    fault = session.files.weights_fault
    resume = fault or f"RESUME_FROM={weights} packs and scores it"
    try:
        yield
    except KeyboardInterrupt:
        require(session.h.eval_only, f"interrupted: {resume}")
        raise
    except OSError as error:
        require(session.h.eval_only, f"{message_of(error)}; {'' if fault else 'then '}{resume}")
        raise


def open_session(h: Hyperparameters, runtime: Runtime, files: RunFiles) -> Session:
    """Opens and checks all that the run reads; only then its log, so that a run which cannot start
    leaves the last one's files alone."""
    trains = not (h.eval_only or h.resume_from)
    if trains:
        batch_layout(h, runtime.world_size)  # refuses what does not divide
    files.check_names()
    if trains and runtime.rank == 0:
        files.check_space()
    if h.eval_dump and runtime.rank == 0:
        dump = Path(h.eval_dump).absolute()
        require(
            dump.parent.is_dir() and os.access(dump.parent, os.W_OK) and not dump.is_dir(),
            f"EVAL_DUMP={h.eval_dump}: expected a file in a folder that exists and can be written; "
            "make the folder, or name a file in another",
        )
    evaluator = Evaluator.open(h, runtime)
    facts = same_on_all_ranks(h) | {"SHA-256 of the validation tokens": evaluator.val_digest}
    runtime.check_alike(facts)
    settings = json.dumps(asdict(h), indent=1)
    head = f"{own_code().decode()}\n{'=' * 80}\n{settings}\n"
    log = RunLog(files.log if runtime.rank == 0 else None, head)
    environment = environment_facts(runtime)
    log(json.dumps(environment))
    log(
        f"dataset:{evaluator.dataset} val_tokens:{evaluator.targets} "
        f"val_bytes:{evaluator.text_bytes} model_params:{h.parameters()} "
        f"world_size:{runtime.world_size} seed:{h.seed}"
    )
    for name in misnamed_shards(h.data_path):
        log(f"note: {h.data_path}/{name} is not read as tokens: its name is not that of a shard")
    for note in evaluator.notes:
        log(f"note: {note}")
    kernels = choose_kernels(h, runtime, log)
    return Session(h, runtime, files, log, evaluator, environment, kernels)


def environment_facts(runtime: Runtime) -> dict[str, Any]:
    """Versions and hardware, for the log and the submission."""
    hardware = f"{os.cpu_count()}-core CPU"
    if runtime.on_cuda:
        hardware = f"{runtime.world_size} x {torch.cuda.get_device_name()}"
    modules = (torch, np, zstandard, sentencepiece)
    return {
        "hardware": hardware,
        "python": sys.version.split()[0],
        **{module.__name__: module.__version__ for module in modules},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if runtime.on_cuda else None,
    }


class Checkpoint(NamedTuple):
    """The weights of a training run and all that the record must say of it."""

    stages: Stages
    facts: TrainingFacts


def train_and_save(session: Session) -> Checkpoint:
    """Trains.  Raises RunError, with the weights on disk, if that ended in a fault or early."""
    h = session.h
    shards = open_split(h.data_path, "train")
    if sum(map(len, shards)) <= 1 << 28:  # under a second; larger splits are checked on the way
        for shard in shards:
            check_vocabulary(shard, h.vocab_size, f"{h.data_path}/fineweb_train_*.bin")
    plan = BatchPlan(shards, h.train_seq_len, h.train_batch_tokens // h.train_seq_len, h.seed)
    session.runtime.check_alike({"SHA-256 of the training tokens": plan.digest})
    trainer = Trainer(h, session.runtime, session.kernels)
    warm_up(trainer, session.evaluator, session.log)
    with received_signals() as signals:  # torchrun sends a Ctrl-C twice
        stages, facts = train(
            h, session.runtime, session.log, session.evaluator, trainer, plan, signals
        )
        if h.on_interrupt == "finish":  # as it does, also where the loop no longer looked
            signals.clear()
        finite = all(bool(w.isfinite().all()) for w in stages["averaged"].values())
        if session.runtime.rank == 0 and finite:
            goes_on = not facts.fault and (not facts.interrupted or h.on_interrupt == "finish")
            save_weights(session, Checkpoint(stages, facts), goes_on)
    lost = session.files.weights_fault if finite else "no finite weights left"
    weights = session.files.weights
    if facts.fault:
        kept = f"RESUME_FROM={weights} scores what it left"
        raise RunError(f"{facts.fault}; {lost or kept}")
    if facts.interrupted and h.on_interrupt == "save":
        message = f"interrupted at step {facts.step_stop}: RESUME_FROM={weights} scores it"
        if lost:
            message = f"interrupted at step {facts.step_stop}: {lost}"
        raise RunError(message)
    with resumable(session):
        if signals and not facts.interrupted:  # after the loop had looked for the last time
            raise KeyboardInterrupt
    return Checkpoint(stages, facts)


def save_weights(session: Session, checkpoint: Checkpoint, goes_on: bool) -> None:
    """Into the run's folder.  Where they do not fit, a run that goes on does so without them."""
    files = session.files
    try:
        save_checkpoint(files.weights, session.h, *checkpoint)
    except OSError as error:
        with contextlib.suppress(OSError):
            files.weights.unlink(missing_ok=True)  # of an earlier run
        files.weights_fault = f"the weights could not be saved ({error.strerror})"
        if goes_on:
            session.log(f"note: {files.weights_fault}; the run goes on without them")
            if (files.folder / "final_model.pt").exists():
                session.log(f"note: {files.folder}/final_model.pt is an earlier run's")
        return
    if checkpoint.facts.interrupted and goes_on:
        session.log(f"note: RESUME_FROM={files.weights} scores it if this run is ended as well")


def save_checkpoint(path: Path, h: Hyperparameters, stages: Stages, facts: TrainingFacts) -> None:
    content = io.BytesIO()
    torch.save({"settings": asdict(h), "facts": asdict(facts), "stages": stages}, content)
    write_atomic(path, content.getvalue())


def load_checkpoint(
    h: Hyperparameters, runtime: Runtime, env: Mapping[str, str]
) -> tuple[Hyperparameters, Checkpoint]:
    """RESUME_FROM's weights, and the settings that they were trained with in place of `h`.

    Raises RunError if it is no checkpoint, or if `env` overrides what was trained.
    """
    content = io.BytesIO(read_file(h.resume_from, "RESUME_FROM", runtime))
    try:
        saved = torch.load(content, map_location=runtime.device, weights_only=True)
        stages = {name: dict(saved["stages"][name]) for name in ("trained", "averaged")}
        checkpoint = Checkpoint(stages, TrainingFacts(**saved["facts"]))
        settings = dict(saved["settings"])
    except Exception:
        raise RunError(
            f"RESUME_FROM={h.resume_from}: not the final_model.pt of a run of this version"
        ) from None
    missing = set(OF_TRAINING) - settings.keys()
    unknown = settings.keys() - {field.name for field in dataclasses.fields(Hyperparameters)}
    check_version(f"RESUME_FROM={h.resume_from}", missing | unknown)
    h = settings_of_weights(settings, env)
    shapes = {name: row.shape for name, row in parameter_table(h).items()}
    for stage in checkpoint.stages.values():
        found = {name: tuple(w.shape) for name, w in stage.items()}
        require(found == shapes, f"RESUME_FROM={h.resume_from}: weights and settings disagree")
    return h, checkpoint


def read_file(path: str | Path, variable: str, runtime: Runtime) -> bytes:
    """Read by rank 0 for all ranks: other nodes need no copy."""
    try:
        content = Path(path).read_bytes() if runtime.rank == 0 else b""
        return runtime.agree_on(content)
    except OSError as error:
        raise RunError(
            f"{variable}={path}: cannot be read ({error.strerror}); name a file that a run has "
            "written"
        ) from None


def check_version(source: str, unlike: set[str]) -> None:
    """Raises RunError if there are settings that a file or this program lacks."""
    names = " ".join(sorted(map(str.upper, unlike)))
    require(
        not unlike,
        f"{source}: of another version of this program, which differs in {names}; use the "
        "train_gpt.py that wrote it",
    )


def check_architecture(h: Hyperparameters, architecture: Mapping[str, Any], source: str) -> None:
    """Raises RunError if an artifact is of another architecture than `h`, or of another version."""
    check_version(source, set(architecture) ^ set(ARCHITECTURE))
    other = [
        f"{name.upper()}={architecture[name]}"
        for name in ARCHITECTURE
        if architecture[name] != getattr(h, name)
    ]
    require(not other, f"{source}: holds a model of another shape; set {' '.join(other)}")


def score(session: Session, model: GPT, label: str, stride: int = 0) -> Score:
    result = session.evaluator.score(model, stride, session.log)
    session.log(f"{label} {result}")
    return result


def write_artifact(session: Session, stages: Stages, grid_step: float) -> None:
    """Packs; by rank 0."""
    if session.runtime.rank:
        return
    began = time.perf_counter()
    budget = weight_budget(session.h)
    artifact = pack_stages(stages, session.h, grid_step, budget, session.log)
    write_atomic(session.files.artifact, artifact)
    seconds = time.perf_counter() - began
    session.log(f"pack_time:{seconds:.1f}s, from the weights alone: no token was read")


def score_from_disk(session: Session, scores: dict[str, Score]) -> int:
    """Adds the scores of a fresh model made from the artifact's bytes; returns their number."""
    h = session.h
    runtime = session.runtime
    artifact = session.files.artifact
    content = read_file(artifact, "EVAL_ONLY", runtime)
    architecture, state = unpack(content, str(artifact))
    check_architecture(h, architecture, str(artifact))
    model = load_model(h, runtime, state, session.kernels)
    scores["packed"] = score(session, model, "final_int6_zstd_roundtrip_exact")
    if h.eval_stride:
        label = f"final_int6_zstd_sliding_exact stride:{h.eval_stride}"
        scores["sliding"] = score(session, model, label, h.eval_stride)
    if h.eval_dump and runtime.rank == 0:
        archive = io.BytesIO()
        np.savez(archive, **session.evaluator.dump)  # type: ignore[arg-type]
        try:
            write_atomic(Path(h.eval_dump), archive.getvalue())
        except OSError as error:
            raise RunError(
                f"EVAL_DUMP={h.eval_dump}: cannot be written ({error.strerror}); give it space or "
                f"name another file, then score again with EVAL_ONLY={artifact} or RESUME_FROM"
            ) from None
    return len(content)


def report(session: Session, result: RunResult) -> None:
    """The last lines of the log, the result of this seed, and the final names of all files."""
    log = session.log
    if result.facts:
        write_result(session, result, result.facts)
    best = result.scores.get("sliding", result.scores["packed"])
    gibibytes = torch.cuda.max_memory_reserved() / 2**30
    log(f"peak_gpu_memory:{gibibytes:.2f}GiB")
    log(
        f"val_bpb:{best.bpb:.8f} dataset:{session.evaluator.dataset} "
        f"bytes_total:{result.bytes_code + result.bytes_model} "
        f"(code {result.bytes_code} + model {result.bytes_model}, cap {session.h.artifact_bytes})"
    )
    session.files.finish(log)


def write_result(session: Session, result: RunResult, facts: TrainingFacts) -> None:
    """result_seed<N>.json and, where record.py is beside this file, submission.json."""
    h = session.h
    folder = session.files.folder
    scores = {stage: asdict(score) for stage, score in result.scores.items()}
    fields = dataclasses.fields(h)
    same_for_all_seeds = [field.name for field in fields if not field.metadata["per_run"]]
    # Results whose recipes are equal are merged as seeds.  Data are told apart by content.
    recipe = {name: getattr(h, name) for name in same_for_all_seeds} | {
        "code": facts.code_sha256,
        "packing_code": own_digest(),
        "dataset": session.evaluator.dataset,
        "train_tokens": facts.train_tokens,
        "train_digest": facts.train_digest,
        "val_tokens": result.scores["packed"].tokens,
        "val_digest": session.evaluator.val_digest,
        "hardware": session.environment["hardware"],
        "whole_run": not (facts.interrupted or facts.fault),
    }
    content = {
        "settings": asdict(h),
        "recipe": recipe,
        "dataset": session.evaluator.dataset,
        "model_params": h.parameters(),
        "environment": session.environment,
        "training": asdict(facts),
        "code_sha256": facts.code_sha256,
        "bytes_code": result.bytes_code,
        "bytes_model": result.bytes_model,
        "time": time.time(),
        "scores": scores,
    }
    # The seed is that of the training, whatever SEED is where RESUME_FROM goes on with it.
    write_atomic(folder / f"result_seed{facts.seed}.json", json.dumps(content).encode())
    if importlib.util.find_spec("record") is None:  # this file alone trains and scores as well
        return
    try:
        from record import write_submission

        write_submission(folder, os.environ, session.log)
    except Exception as problem:  # no reason to leave a finished run unfinished
        session.log(
            f"note: submission.json was not written ({type(problem).__name__}: {problem}); "
            f"mend that and run `python record.py {folder}`"
        )


def interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def open_streams() -> None:
    """Standard streams that were closed at the start lead nowhere from here on.

    Python has None for them, and the next file that is opened would get their number.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack a letter of a file's name
        sys.stdout.reconfigure(errors="backslashreplace")


def main() -> None:
    """Exits with 0, or with 1 and one message on stderr."""
    open_streams()
    try:
        for number in ending_signals():  # outside of training each of them is a Ctrl-C
            signal.signal(number, interrupt)
        own_code()  # read before reading the data takes its time
        resumes = bool(os.environ.get("RESUME_FROM"))
        settings_from = settings_of_process if resumes else Hyperparameters.from_env
        h = settings_from(os.environ)
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(OSError, ValueError):  # a mapped shard keeps its file open
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        runtime = Runtime.start(h, os.environ)
        runtime.check_alike({"RESUME_FROM": resumes})  # only those that resume receive the file
        checkpoint = None
        if resumes:
            h, checkpoint = load_checkpoint(h, runtime, os.environ)
        if h.data_path == "sample":
            require(
                importlib.util.find_spec("prepare_data"),
                "DATA_PATH=sample: prepare_data.py, which builds it, is not beside train_gpt.py; "
                "copy it there, or name a folder of shards",
            )
            from prepare_data import with_sample

            try:
                h = with_sample(h)  # the paths of the built-in corpus, which is built if missing
            except OSError as error:
                raise RunError(
                    f"DATA_PATH=sample: cannot be built in {SOURCE.parent}/data ({error}); give it "
                    "space, or copy train_gpt.py and prepare_data.py to where it has some"
                ) from None
        run(h, runtime, checkpoint)
        if dist.is_initialized():
            dist.destroy_process_group()
    except (RunError, OSError, RuntimeError, KeyboardInterrupt) as error:
        rank = os.environ.get("RANK") or "0"  # may be no number: that is a mistake, too
        for number in ending_signals():  # torchrun ends the ranks that wait for rank 0 to speak
            signal.signal(number, signal.SIG_IGN if rank == "0" else signal.SIG_DFL)
        lost_a_rank = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
        no_compiler = compiler_fault(error)
        if isinstance(error, RuntimeError) and not (lost_a_rank or no_compiler):
            raise  # a bug, not a collective whose peer has gone
        if rank != "0":  # most faults meet all ranks: rank 0 speaks first
            time.sleep(2)
        kind = "lost a rank" if lost_a_rank else "error"
        with contextlib.suppress(OSError):  # standard error may have gone with its terminal
            message = no_compiler or message_of(error)
            print(f"{kind} (rank {rank}): {message}", file=sys.stderr, flush=True)
        os._exit(1)  # at once: the other ranks may be inside collectives, and torchrun ends them


def compiler_fault(error: BaseException) -> str:
    """What to do about a compiler that is not there or does not work; empty for other errors."""
    compiler = sys.modules.get("torch._dynamo.exc")
    if compiler is None or not isinstance(error, compiler.BackendCompilerFailed):
        return ""
    reason = error.inner_exception
    if isinstance(reason, torch.OutOfMemoryError):
        return ""
    backend = os.environ.get("COMPILE_BACKEND", "auto")
    lines = str(reason).splitlines() or [""]
    return (
        f"COMPILE_BACKEND={backend}: cannot compile here ({type(reason).__name__}: {lines[0]}); "
        "mend that, or set COMPILE_BACKEND=none"
    )


def message_of(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"{error}; give it space, or another OUTPUT_DIR"
    return str(error).splitlines()[0] if str(error) else "interrupted"


if __name__ == "__main__":
    main()
