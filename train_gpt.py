"""Train, average, quantise, pack and score one small GPT for Parameter Golf, in one file.

The task: the lowest bits per byte (bpb) on FineWeb's validation split from at most 16,000,000
bytes of code plus packed weights, trained for at most 600 s on 8 x H100.  Measured so far: 1.1387
bpb sliding, 1.1582 plain, in 15,987,128 bytes, on the proxy corpus (not FineWeb), after 180 s or
2,492 steps of 98,304 tokens on 1 x H100 with torch 2.11, n = 1 (`train.log`, `submission.json`).

    torchrun --standalone --nproc_per_node=8 train_gpt.py                     # the submitted run
    PRESET=smoke torchrun --standalone --nproc_per_node=1 train_gpt.py        # two minutes, CPU
    EVAL_ONLY=final_model.ptz torchrun ... train_gpt.py                       # score an artifact
    RESUME_FROM=final_model.pt torchrun ... train_gpt.py                      # pack and score again

Every number that matters is a field of `Hyperparameters`; a variable of that name in capitals
overrides it.  PRESET=frontier adds to the card, the default, all else that pays.  Sections:
1 constants, 2 hyperparameters, 3 runtime, 4 data, 5 quantizer, 6 kernels, 7 model, 8 optimizer,
9 averaging, 10 pack and unpack, 11 evaluation, 12 training, 13 report.

Shapes: B sequences, T positions, D model width, H query heads, K key/value heads, E head width,
V vocabulary, L layers, N matrices of a bank, R rows, C columns; a name ending in `_BTD` has that
shape.  Units unless said otherwise: nats per token, bits per UTF-8 byte, seconds, bytes.
"""
from __future__ import annotations

import collections
import contextlib
import copy
import difflib
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if torch.__version__ < (2, 11):  # type: ignore[operator]  # it may lack what is imported next
    sys.exit(f"error: torch is {torch.__version__}, expected 2.11 to 2.13: see requirements.txt")
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
except ImportError:  # builds of torch for the CPU come without it
    triton = tl = TensorDescriptor = None

# ---- 1. Constants of the challenge's formats ----------------------------------------------------
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 256 * 4
BOS_ID, SPACE = 1, "\u2581"  # start of every document; SentencePiece's mark of a leading space
ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGOLFGPT", 1
FINEWEB_VAL_BYTES = 151_080_363  # of the published split: pg#543's tokens * loss / ln 2 / bpb
GET_DATA = "`python prepare_data.py fineweb --vocab VOCAB_SIZE` gets it; or set DATA_PATH=sample"
SOURCE = Path(__file__).resolve()

class RunError(Exception):
    """A mistake the user can mend: what, where, expected, found, remedy.  Never a traceback."""
def require(holds: object, message: str) -> None:
    if not holds:
        raise RunError(message)

# ---- 2. Hyperparameters -------------------------------------------------------------------------
RETIRED = dict(  # names of the challenge's baseline that mean nothing here -> what to set instead
    MLP_MULT="MLP_HIDDEN", TIED_EMBED_LR="EMBED_LR", HEAD_LR="EMBED_LR",
    WEIGHT_DECAY="DECAY_PER_RUN", MUON_BACKEND_STEPS="nothing: Polar Express has five",
    TIE_EMBEDDINGS="nothing: they are always tied")

@dataclass(frozen=True)
class Hyperparameters:
    """All numbers of a run.  The defaults are the `card` preset, the submitted configuration."""
    # Run
    preset: str = "card"  # card | frontier | smoke
    run_id: str = "card"  # label in the log and in submission.json
    seed: int = 1337  # weights and batch order
    device: str = "auto"  # auto | cpu | cuda
    compile_backend: str = "auto"  # auto: inductor on CUDA, none on a CPU
    data_path: str = "./data/datasets/fineweb10B_sp1024"  # folder of shards, or `sample`
    tokenizer_path: str = "./data/tokenizers/fineweb_1024_bpe.model"  # SentencePiece
    output_dir: str = "."  # train.log, submission.json, final_model.pt, final_model.ptz
    eval_only: str = ""  # path of an artifact to score; nothing is trained
    resume_from: str = ""  # path of saved float weights to pack and score; nothing is trained
    on_interrupt: str = "save"  # SIGTERM or Ctrl-C in training: save and end, or finish the run
    # Model: 32.4M parameters, which 16 MB hold at 3.9 bits a weight
    vocab_size: int = 1024  # of the tokenizer; embeddings are tied
    num_layers: int = 11  # 5 encode, 6 decode: U-Net skips join them
    model_dim: int = 512  # width of the residual stream
    num_heads: int = 4  # of width 128: better and faster than 8 of 64 (ABLATIONS.md)
    num_kv_heads: int = 2  # grouped-query attention, 2 query heads a group
    mlp_hidden: int = 2048  # 16 x 128: whole GEMM tiles
    mlp_slope: float = 0.5  # of the activation's negative side; 0: plain relu^2
    rope_dims: int = 32  # of each head's 128; the rest carries no position
    smear_dims: int = 12  # inputs of each token's factor on its SmearGate
    key_shift: int = 0  # 1: those other dims of a key come from the token before
    gate_dims: int = 0  # inputs of the gate on each head's output; 0: no gates
    rope_base: float = 10_000.0  # longest wavelength over 2 pi, tokens
    xsa_layers: int = 4  # last layers whose attention drops the token's own value
    ve_layers: int = 2  # last layers that add the value embedding to V
    ve_dim: int = 128  # of the shared value embedding, projected to the KV width
    logit_softcap: float = 30.0  # logits end within +-30, which steadies early training
    qk_gain_init: float = 4.0  # per-head sharpness of the attention logits
    embed_init_std: float = 0.005  # near-uniform first predictions through the tied head
    # Optimizer
    matrix_lr: float = 0.03  # Muon, spectral norm per update
    embed_lr: float = 0.02  # AdamW, tables
    scalar_lr: float = 0.01  # AdamW, gains and gates
    decay_per_run: float = 160.0  # weight decay x steps, times lr: 0.1 if there are 1,600 steps
    muon_momentum: float = 0.95  # runs at 0.99 ended 0.03 to 0.07 bpb higher (ABLATIONS.md)
    muon_momentum_warmup_start: float = 0.92  # from here linearly: without, 0.002 bpb worse
    muon_momentum_warmup_steps: int = 320  # until then
    muon_beta2: float = 0.95  # NorMuon, decay per step of the mean squares that even an update
    beta1: float = 0.9  # AdamW, decay of the mean gradient per step
    beta2: float = 0.95  # AdamW, of its square; short, as the run is
    adam_eps: float = 1e-8  # AdamW, floor of the root mean square gradient
    grad_clip_norm: float = 0.3  # global L2 norm; 0: no clipping
    # Schedule
    iterations: int = 20_000  # steps; whichever of this and the clock ends first
    max_wallclock_seconds: float = 600.0  # training clock; 0: no cap
    train_batch_tokens: int = 786_432  # per step, over all ranks
    train_seq_len: int = 2048  # tokens of context, in training and in evaluation
    micro_batch_tokens: int = 98_304  # most tokens one rank runs at once
    lr_warmup_steps: int = 30  # linear from 0; without, the tied table jumps in the first steps
    warmdown_fraction: float = 0.85  # of the run, in which lr falls linearly to 0
    warmdown_iters: int = 0  # the same in steps; 0: use the fraction
    swa_threshold: float = 0.2  # average the masters while the lr scale is below
    qat_threshold: float = 0.15  # round the working weights while the lr scale is below
    warmup_steps: int = 2  # untimed steps on random tokens for each graph, then undone
    # Export, evaluation and log
    artifact_bytes: int = 16_000_000  # code plus packed weights stay below
    int8_step_ratio: float = 0.7  # step of layers 0 and L-1 against the others'
    tok_emb_step_ratio: float = 0.0  # the same of the tied table; 0: each row by its own maximum
    ve_emb_step_ratio: float = 0.0  # of the value embedding
    zstd_level: int = 22  # the highest; packing takes seconds
    eval_stride: int = 64  # new tokens scored per sliding window; 0: plain windows only
    val_batch_size: int = 524_288  # tokens per evaluation batch, over all ranks
    eval_dump: str = ""  # path: per-token losses of the last evaluation (NumPy .npz)
    val_loss_every: int = 1000  # steps; 0: only at the end
    train_log_every: int = 200  # steps
    head_dim = property(lambda self: self.model_dim // self.num_heads)
    kv_dim = property(lambda self: self.num_kv_heads * self.head_dim)
    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Hyperparameters:
        """Preset plus overrides.  A name that looks like one but would be ignored is refused."""
        kinds = {f.name.upper(): str(f.type) for f in fields(cls)}
        preset = env.get("PRESET", "card")
        require(preset in PRESETS, f"PRESET={preset!r}: unknown; set one of {', '.join(PRESETS)}")
        values = dict(PRESETS[preset])
        for name, text in env.items():
            if name in kinds:
                values[name.lower()] = parse_override(name, text, kinds[name])
            elif name in RETIRED:
                raise RunError(f"{name}={text!r}: not a setting here; set {RETIRED[name]}")
            elif close := difflib.get_close_matches(name, kinds, n=1, cutoff=0.9):
                raise RunError(f"{name}={text!r}: unknown variable; did you mean {close[0]}?")
        return cls(**values)
    def __post_init__(self) -> None:
        """Raises RunError for the first combination that cannot run."""
        def check(holds: bool, name: str, remedy: str) -> None:
            require(holds, f"{name.upper()}={getattr(self, name)!r}: {remedy}")
        for low, high, names in (
            (2, math.inf, "vocab_size num_layers smear_dims"),
            (1, math.inf, "model_dim num_heads num_kv_heads mlp_hidden ve_layers ve_dim iterations "
             "train_seq_len train_batch_tokens val_batch_size train_log_every warmup_steps"),
            (1e-12, math.inf, "rope_base logit_softcap adam_eps warmdown_fraction"),
            (0, 1 - 1e-9, "beta1 beta2 muon_beta2 muon_momentum muon_momentum_warmup_start"),
            (0, 1, "warmdown_fraction key_shift mlp_slope"), (1, 22, "zstd_level")):
            for name in names.split():
                check(low <= getattr(self, name) <= high, name, f"set it within {low} to {high}")
        for must, pairs in {
            "divide": "num_heads:model_dim num_kv_heads:num_heads train_seq_len:train_batch_tokens",
            "not exceed": "train_seq_len:micro_batch_tokens eval_stride:train_seq_len "
                "rope_dims:head_dim gate_dims:model_dim smear_dims:model_dim xsa_layers:num_layers "
                "ve_layers:num_layers"}.items():
            for name, other in (pair.split(":") for pair in pairs.split()):
                mine, its = getattr(self, name), getattr(self, other)
                check(its % mine == 0 if must == "divide" else mine <= its, name,
                      f"must {must} {other.upper()}={its}")
        check(self.device in ("auto", "cpu", "cuda"), "device", "set auto, cpu or cuda")
        check(self.on_interrupt in ("save", "finish"), "on_interrupt", "set save or finish")
        check(self.rope_dims % 2 == 0, "rope_dims", "must be even")
        check(not (self.eval_only and self.resume_from), "eval_only", "unset it or RESUME_FROM")
        check(self.parameters() // 4 < self.artifact_bytes, "artifact_bytes",
              f"{self.parameters():,} weights need 2 bits each; raise it or lower MLP_HIDDEN")
    def parameters(self) -> int:
        """Number of trained parameters, from the shapes alone."""
        return sum(math.prod(shape) for shape in parameter_shapes(self).values())

PRESETS: dict[str, dict[str, Any]] = {
    "card": {},
    "frontier": dict(  # plus what pays but is none of the card's named techniques
        run_id="frontier", vocab_size=8192, data_path="./data/datasets/fineweb10B_sp8192",
        tokenizer_path="./data/tokenizers/fineweb_8192_bpe.model", mlp_hidden=1536, key_shift=1,
        gate_dims=12, tok_emb_step_ratio=0.5, ve_emb_step_ratio=2.0),
    "smoke": dict(  # the same code at a size that a CPU trains in two minutes
        run_id="smoke", data_path="sample", tokenizer_path="", output_dir="./smoke_run",
        num_layers=4, model_dim=128, num_heads=4, num_kv_heads=2, mlp_hidden=352, rope_dims=8,
        xsa_layers=2, ve_dim=32, iterations=300, max_wallclock_seconds=60.0, train_seq_len=256,
        train_batch_tokens=4096, val_batch_size=16_384, val_loss_every=100, train_log_every=20)}

def parse_override(name: str, text: str, kind: str) -> int | float | str:
    """`text` as int, float or str.  Raises RunError with the variable, the value and the fix."""
    with contextlib.suppress(ValueError):
        value = text if kind == "str" else int(text) if kind == "int" else float(text)
        if isinstance(value, str) or 0 <= value < math.inf:
            return value
    raise RunError(f"{name}={text!r}: expected a finite {kind} of at least 0; set one or unset it")

# ---- 3. Runtime: ranks and devices, log, clock --------------------------------------------------
@dataclass(frozen=True)
class Runtime:
    """Where this process stands, and the dtype of working weights and activations there."""
    device: torch.device
    rank: int = 0
    world_size: int = 1
    compile_backend: str = "none"
    @classmethod
    def start(cls, h: Hyperparameters, env: Mapping[str, str]) -> Runtime:
        """Joins torchrun's process group if there is one and claims the device."""
        rank, local = int(env.get("RANK", 0)), int(env.get("LOCAL_RANK", 0))
        world, gpus = int(env.get("WORLD_SIZE", 1)), torch.cuda.device_count()
        cuda = gpus > 0 if h.device == "auto" else h.device == "cuda"
        require(h.compile_backend in ("auto", "none", *torch.compiler.list_backends(())),
                f"COMPILE_BACKEND={h.compile_backend!r}: set auto, none or inductor")
        require(not cuda or local < gpus, f"DEVICE={h.device}, LOCAL_RANK={local}: found {gpus} "
                "GPUs; lower --nproc_per_node or set DEVICE=cpu")
        if cuda:
            torch.cuda.set_device(local)
        if world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        backend = {"auto": "inductor" if cuda else "none"}.get(h.compile_backend, h.compile_backend)
        return cls(torch.device(f"cuda:{local}" if cuda else "cpu"), rank, world, backend)
    dtype = property(lambda self: torch.bfloat16 if self.device.type == "cuda" else torch.float32)
    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """`function` as one graph per set of static shapes, or unchanged on a bare CPU."""
        if self.compile_backend == "none":
            return function
        # Inductor's mix_order_reduction makes RMS-norm backward 6 ms slower (pytorch #179494).
        torch._inductor.config.triton.mix_order_reduction = False
        torch._dynamo.config.recompile_limit = 64
        # Inductor learns of a custom operator when it first compiles one, and from then on fuses
        # what comes before it in another way: told now, every process builds the same kernels.
        from torch._inductor.lowering import add_needs_realized_inputs
        add_needs_realized_inputs(
            [torch.ops.golf.linear_relu2.default, torch.ops.golf.norm_rotate.default])
        return torch.compile(function, backend=self.compile_backend, dynamic=False, fullgraph=True,
                             options=options if self.compile_backend == "inductor" else None)
    def agree_on(self, value: Any) -> Any:
        """Rank 0's `value` on every rank; host-side, so the GPU's queue is not drained."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]
    def sum(self, tensor: Tensor) -> Tensor:  # in place, over ranks
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

class RunLog:
    """Lines to the terminal and to a file, by rank 0 alone; the file alone reproduces the run."""
    def __init__(self, path: Path | None, head: str = ""):
        self.path, self.tenth = path, -1
        self.terminal = path is not None and sys.stdout.isatty()
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(head)
    def __call__(self, line: str) -> None:
        if self.path:
            with self.path.open("a") as file:
                file.write(line + "\n")
            print("\033[K" * self.terminal + line, flush=True)  # clears what progress left
    def progress(self, line: str, share: float = 0.0) -> None:
        """On a terminal a line that the next one overwrites, elsewhere one each tenth of it all."""
        if self.terminal:
            print(f"\033[K{line}", end="\r", flush=True)
        elif int(10 * share) != self.tenth:
            self(line)
        self.tenth = int(10 * share)

def write_atomic(path: Path, content: bytes) -> None:
    """Either the whole new file or the old one: temporary file, fsync, rename."""
    with (temporary := path.with_name(path.name + ".tmp")).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

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
    require(whole, f"{path}: expected {expected} bytes of magic {SHARD_MAGIC}, version "
            f"{SHARD_VERSION}, found {len(pages)} of {[magic, version]}; {GET_DATA}")
    return np.frombuffer(pages, dtype="<u2", offset=SHARD_HEADER_BYTES)
def open_split(data_path: str, split: str) -> list[np.ndarray]:
    """All shards of `split` (train or val), in name order."""
    paths = sorted(Path(data_path).glob(f"fineweb_{split}_*.bin"))
    require(paths, f"DATA_PATH={data_path}: found no fineweb_{split}_*.bin; {GET_DATA}")
    return [read_shard(path) for path in paths]
def check_vocabulary(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    highest = int(tokens.max(initial=0))
    require(highest < vocab_size, f"{where}: token id {highest} found, expected less than "
            f"VOCAB_SIZE={vocab_size}; use the shards of this vocabulary")

class BatchPlan:
    """Windows of all shards, shuffled by the seed, each epoch from another offset in another order.
    Batch i is the same (batch_seqs, T+1) tokens for any number of ranks, which read their rows."""
    def __init__(self, shards: list[np.ndarray], seq_len: int, batch_seqs: int, seed: int):
        self.shards, self.seq_len, self.batch_seqs, self.seed = shards, seq_len, batch_seqs, seed
        self.starts = np.cumsum([0, *(max(0, len(shard) // seq_len - 1) for shard in shards)])
        self.windows_per_epoch, self.epoch = int(self.starts[-1]), -1
        require(self.windows_per_epoch, f"training shards: expected at least one of {2 * seq_len} "
                f"tokens, found {max(map(len, shards))}; lower TRAIN_SEQ_LEN or add text")
    def window(self, position: int) -> tuple[int, int]:
        """(shard, first token) of the window at `position` of the endless shuffled sequence."""
        epoch, index = divmod(position, self.windows_per_epoch)
        if epoch != self.epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self.epoch, self.offset = epoch, int(generator.integers(self.seq_len))
            self.order = generator.permutation(self.windows_per_epoch)
        shard = int(np.searchsorted(self.starts, self.order[index], side="right")) - 1
        return shard, self.offset + int(self.order[index] - self.starts[shard]) * self.seq_len
    def tokens(self, step: int, rows: range) -> np.ndarray:
        """Rows of batch `step`: (len(rows), T+1) int64, inputs and targets overlapping."""
        windows = (self.window(step * self.batch_seqs + row) for row in rows)
        return np.stack([self.shards[shard][first : first + self.seq_len + 1]
                         for shard, first in windows], dtype=np.int64)
def prefetch(plan: BatchPlan, rows: range, vocab_size: int, device: torch.device,
             depth: int = 4) -> Generator[Tensor]:
    """This rank's rows of batches 0, 1, 2 ... on `device`, read ahead by one thread."""
    def read(step: int) -> Tensor:
        batch = torch.from_numpy(plan.tokens(step, rows))
        check_vocabulary(batch.numpy(), vocab_size, f"training batch {step}")
        return batch.pin_memory() if device.type == "cuda" else batch
    with ThreadPoolExecutor(1) as reader:
        pending = collections.deque(reader.submit(read, step) for step in range(depth))
        for step in itertools.count(depth):
            pending.append(reader.submit(read, step))
            yield pending.popleft().result().to(device, non_blocking=True)

class ByteTable(NamedTuple):
    """UTF-8 bytes that a target token adds to the text, by the challenge's rule (arrays of V)."""
    base: np.ndarray  # int64, without the leading space; a byte-fallback token is 1
    leading_space: np.ndarray  # bool, counted unless the previous token is a boundary
    boundary: np.ndarray  # bool, control and unknown tokens
    def count(self, tokens: np.ndarray) -> int:
        """Bytes of tokens[1:], each given its predecessor."""
        counts = np.bincount(tokens[1:], minlength=len(self.base))
        no_space = self.leading_space[tokens[1:][self.boundary[tokens[:-1]]]].sum()
        return int(counts @ (self.base + self.leading_space) - no_space)
def load_byte_table(tokenizer_path: str, vocab_size: int) -> ByteTable:
    """From a SentencePiece model.  Raises RunError if missing or of another vocabulary."""
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(Path(tokenizer_path)))
    except (RuntimeError, OSError):
        raise RunError(f"TOKENIZER_PATH={tokenizer_path}: missing or not a SentencePiece model; "
                       f"{GET_DATA}") from None
    require(sp.vocab_size() == vocab_size, f"TOKENIZER_PATH={tokenizer_path}: expected VOCAB_SIZE="
            f"{vocab_size} pieces, found {sp.vocab_size()}; set both to the same vocabulary")
    ids = list(range(vocab_size))
    boundary = np.any([sp.is_control(ids), sp.is_unknown(ids), sp.is_unused(ids)], axis=0)
    pieces = sp.id_to_piece(ids)
    sizes = np.where(sp.is_byte(ids), 1, [len(p.removeprefix(SPACE).encode()) for p in pieces])
    spaced = np.array([piece.startswith(SPACE) for piece in pieces])
    return ByteTable(np.where(boundary, 0, sizes), spaced & ~boundary, boundary)

# ---- 5. Quantizer: one grid for late QAT and for export -----------------------------------------
# An entropy-coded uniform quantiser is near the rate-distortion bound if weights of one sensitivity
# share one step; the rate is then log2(sigma/step) + 2 bits.  So a row's scale is the common `step`
# that the byte budget decides, unless weights would leave the code range: then GPTQ-lite clips.
CLIP_RATIOS = (1.0, 0.92, 0.84, 0.75, 0.6)  # of the row's largest magnitude
ZSTD_OVERHEAD = 1.013  # bytes over the codes' entropy: what late QAT expects, the exporter measures

class Grid(NamedTuple):
    """How a tensor, seen as N matrices (N, R, C), is rounded."""
    qmax: tuple[int, ...]  # largest code per matrix: 31 for int6, 127 for int8
    step_ratio: tuple[float, ...]  # scale floor = ratio * step; 0: each row by its own maximum
    def tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """qmax and step_ratio as (N, 1, 1) float32 on the device of `like`."""
        both = torch.tensor(self, dtype=torch.float32, device=like.device)[:, :, None, None]
        return both[0], both[1]

def export_grids(h: Hyperparameters) -> dict[str, Grid]:
    """The grid of every rounded parameter; a parameter without one is stored in float16."""
    inner, ratio = h.num_layers - 2, h.int8_step_ratio  # layers 0 and L-1 are int8
    bank = Grid((127, *[31] * inner, 127) * 2, (ratio, *[1.0] * inner, ratio) * 2)
    return (dict.fromkeys(("qo_bank", "kv_bank", "mlp_bank"), bank)
            | {"tok_emb": Grid((127,), (h.tok_emb_step_ratio,)), "ve_proj": Grid((127,), (0.0,)),
               "ve_emb": Grid((127,), (h.ve_emb_step_ratio,))})

def matrices(w: Tensor) -> Tensor:
    """A parameter as (N, R, C); a table is one matrix."""
    return w.reshape(-1, *w.shape[-2:])
def short_scale(x: Tensor) -> Tensor:
    """`x` to 16 significant bits: code times scale is exact, so rounding again changes nothing."""
    return ((x.view(torch.int32) + 128) & -256).view(torch.float32)

def row_scales(w_NRC: Tensor, floor: Tensor, qmax: Tensor) -> Tensor:
    """(N, R, 1) float32 scales: the clip of least rate-distortion cost, never below `floor`.  The
    cost is squared error minus lambda * log2(scale) per weight, with the lambda at which `floor`
    itself is optimal: d(s^2/12)/ds = lambda * d(log2 s)/ds gives floor^2 * ln2 / 6."""
    widest = w_NRC.abs().amax(-1, keepdim=True) / qmax
    floor = short_scale(floor.clamp_min(1e-30))  # never 0, for rows of zeros
    price = floor.square() * (math.log(2) / 6 * w_NRC.shape[-1])
    scales = torch.stack([torch.maximum(short_scale(widest * clip), floor) for clip in CLIP_RATIOS])
    def cost(scale: Tensor) -> Tensor:
        error = (w_NRC - dequantize(encode(w_NRC, scale, qmax), scale)).square()
        return error.sum(-1, keepdim=True) - price * torch.log2(scale / floor)
    best = torch.stack([cost(scale) for scale in scales]).argmin(0, keepdim=True)
    return scales.gather(0, best)[0]

def encode(w_NRC: Tensor, scale_NR1: Tensor, qmax: Tensor) -> Tensor:
    """Integer codes in [-qmax, qmax], still float32."""
    return torch.clamp(torch.round(w_NRC / scale_NR1), -qmax, qmax)
def dequantize(codes_NRC: Tensor, scale_NR1: Tensor) -> Tensor:
    """float32 weights; one rounding, so the same on every device."""
    return codes_NRC.float() * scale_NR1
def quantize(w_NRC: Tensor, step: Tensor, qmax: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (N, R, C) and float32 row scales (N, R, 1) on the grid of `step` (0-d)."""
    scale = row_scales(w_NRC, step * ratio, qmax)
    return encode(w_NRC, scale, qmax).to(torch.int8), scale
def fake_quantize(w_NRC: Tensor, step: Tensor, qmax: Tensor, ratio: Tensor) -> Tensor:
    """Exactly the float32 weights that packing `w` and reading them back would give."""
    return dequantize(*quantize(w_NRC, step, qmax, ratio))

def entropy_bits(codes_NRC: Tensor) -> float:
    """Order-0 entropy of the codes in bits, each matrix with its own frequencies."""
    n = len(codes_NRC)
    zero = torch.arange(128, 256 * n, 256, device=codes_NRC.device).view(-1, 1, 1)  # bin of code 0
    counts = torch.bincount((codes_NRC + zero).flatten(), minlength=256 * n).view(n, 256).double()
    share = counts / counts.sum(1, keepdim=True)
    return float(-(counts * torch.log2(share.clamp_min(1e-300))).sum())
def fit_step(size_of: Callable[[float], float], target: float) -> float:
    """Smallest step whose size, falling in the step, is at most `target`; by bisection."""
    low, high = -80.0, 24.0  # log2: from where the code range decides, to all codes zero
    for _ in range(26):
        middle = (low + high) / 2
        low, high = (low, middle) if size_of(2.0**middle) <= target else (middle, high)
    return 2.0**high

# ---- 6. Kernels: attention backends, and Triton kernels with their plain-torch twins ------------
jit = triton.jit if triton else lambda function: function
PROCESSORS = 132  # of an H100 or H200; with more, some would idle
RELU2_TILE = 256, 128, 64  # rows, columns, depth: widths of n x 128 leave no partial tile
HEAD_ROWS = 16  # tokens a program of the kernels for heads
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B,T,H,E), k and v (B,T,K,E) -> (B,T,H,E)

def rms_norm(x: Tensor) -> Tensor:
    """Unit root mean square over the last dimension, statistics in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
def rotary_table(length: int, dims: int, base: float, device: torch.device) -> Tensor:
    """cos and sin, stacked: (2, T, 1, dims/2) float32."""
    frequency = base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()))[:, :, None, :]
def apply_rotary(x_BTHE: Tensor, table: Tensor) -> Tensor:
    """Rotates the first dims of every head, leaves the others: partial RoPE (pg#315)."""
    half = table.shape[-1]
    cos, sin = table.to(x_BTHE.dtype)
    a, b, rest = x_BTHE.split((half, half, x_BTHE.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), dim=-1)

def project_heads(x_BTD: Tensor, w_CD: Tensor, gain_H: Tensor,
                  rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and rotated q (B,T,H,E) and k (B,T,K,E), and v, from C = (H + 2K) E projections."""
    heads, width = len(gain_H), x_BTD.shape[-1] // len(gain_H)
    qkv = F.linear(x_BTD, w_CD).unflatten(-1, (-1, width))
    kv_heads = (qkv.shape[2] - heads) // 2
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
    return (apply_rotary(rms_norm(q), rotary) * gain_H[:, None],
            apply_rotary(rms_norm(k), rotary), v)

def exclude_self(y_BTHE: Tensor, v_BTKE: Tensor) -> Tensor:
    """XSA (pg#287): each head's output less its part along the token's own value."""
    y, v = y_BTHE.unflatten(2, (v_BTKE.shape[2], -1)).float(), v_BTKE[:, :, :, None].float()
    share = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp_min(1e-6)
    return (y - share * v).to(y_BTHE.dtype).view(y_BTHE.shape)

def sdpa(*backends: SDPBackend) -> Attend:
    """PyTorch's attention through one of `backends`; none named leaves the choice to PyTorch."""
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v, gqa = *(x.transpose(1, 2) for x in (q, k, v)), q.shape[2] != k.shape[2]
        with sdpa_kernel(list(backends)) if backends else contextlib.nullcontext():
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return y.transpose(1, 2)
    return attend
def attention_candidates() -> dict[str, Attend]:
    """Kernels for CUDA, on an H100 the fastest first; FlashAttention-3 only where it imports."""
    always = {"cudnn": sdpa(SDPBackend.CUDNN_ATTENTION), "flash": sdpa(SDPBackend.FLASH_ATTENTION)}
    with contextlib.suppress(ImportError):
        from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]
        return {"fa3": lambda q, k, v: flash_attn_func(q, k, v, causal=True)} | always
    return always

def relu2_mlp(x_BTD: Tensor, up_ND: Tensor, down_ND: Tensor, scale: float, slope: float) -> Tensor:
    """leaky_relu(scale norm(x) up^T)^2 down (So et al., Primer, 2021; the slope: pg#493)."""
    return F.leaky_relu(F.linear(rms_norm(x_BTD) * scale, up_ND), slope).square() @ down_ND

class Kernels(NamedTuple):
    """The functions that have more than one implementation, as chosen at start-up."""
    attend: Attend = sdpa()
    heads: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = project_heads
    mlp: Callable[[Tensor, Tensor, Tensor, float, float], Tensor] = relu2_mlp

@jit
def linear_relu2_kernel(a_desc, b_desc, scales, post_desc, out_desc,  # type: ignore[no-untyped-def]
                        SLOPE: tl.constexpr, BACKWARD: tl.constexpr):
    """leaky_relu(a b^T * scale)^2, its lowest bit the side of 0; BACKWARD: a b^T * scale times the
    derivative at `post`.  Tiles finish in quarters, which leaves memory for a fourth stage."""
    SIDE: tl.constexpr = 1 << 16 if out_desc.dtype == tl.bfloat16 else 1  # that bit, in float32
    BLOCK_M: tl.constexpr = a_desc.block_shape[0]
    BLOCK_N: tl.constexpr = b_desc.block_shape[0]
    QUARTER: tl.constexpr = BLOCK_N // 4
    columns = tl.cdiv(out_desc.shape[1], BLOCK_N)
    tiles = tl.cdiv(out_desc.shape[0], BLOCK_M) * columns
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m, n = (tile // columns) * BLOCK_M, (tile % columns) * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, a_desc.shape[1], a_desc.block_shape[1]):
            total = tl.dot(a_desc.load([m, k]), b_desc.load([n, k]).T, total)
        rows = m + tl.arange(0, BLOCK_M)
        scale = tl.load(scales + rows, mask=rows < out_desc.shape[0], other=0.0)[:, None]
        halves = tl.split(total.reshape(BLOCK_M, 2, 2 * QUARTER).permute(0, 2, 1))
        for i in tl.static_range(4):
            half = halves[i // 2].reshape(BLOCK_M, 2, QUARTER).permute(0, 2, 1)
            part, at = tl.split(half)[i % 2] * scale, n + i * QUARTER
            if BACKWARD:
                post = post_desc.load([m, at]).to(tl.float32)
                positive = (post.to(tl.int32, bitcast=True) & SIDE) != 0
                part *= tl.sqrt(post) * tl.where(positive, 2.0, -2 * SLOPE)
            else:  # cut, not rounded: a carry could turn NaN into a number
                side = ~(part.to(tl.int32, bitcast=True) >> 31) & SIDE
                part = tl.maximum(part, SLOPE * part)
                bits = (part * part).to(tl.int32, bitcast=True) & (-2 * SIDE)
                part = (bits | side).to(tl.float32, bitcast=True)
            out_desc.store([m, at], part.to(out_desc.dtype))

@torch.library.custom_op("golf::linear_relu2", mutates_args=())
def linear_relu2(a_MK: Tensor, b_NK: Tensor, scale_M: Tensor, slope: float,
                 post_MN: Tensor | None = None) -> Tensor:
    """leaky_relu(a b^T scale)^2; given that as `post`, instead a b^T scale times the derivative."""
    out_MN, (m, n, k) = a_MK.new_empty(len(a_MK), len(b_NK)), RELU2_TILE
    a, b, post, out = (TensorDescriptor.from_tensor(t.contiguous(), block) for t, block in (
        (a_MK, [m, k]), (b_NK, [n, k]), (out_MN if post_MN is None else post_MN, [m, n // 4]),
        (out_MN, [m, n // 4])))
    programs = min(-(-len(a_MK) // m) * -(-len(b_NK) // n), PROCESSORS)
    linear_relu2_kernel[(programs,)](a, b, scale_M, post, out, slope, post_MN is not None,
                                     num_warps=8, num_stages=4)
    return out_MN
linear_relu2.register_fake(lambda a, b, scale, slope, post=None: a.new_empty(len(a), len(b)))

class FusedMLP(torch.autograd.Function):
    """`relu2_mlp` that writes neither the normed input, as the products apply its scale per row,
    nor anything between them but the squares, which give the derivative too."""
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, up_ND: Tensor, down_ND: Tensor,  # type: ignore[override]
                depth: float, slope: float) -> Tensor:
        x_MD, ctx.depth, ctx.slope = x_BTD.flatten(0, 1), depth, slope
        scale_M = depth * torch.rsqrt(x_MD.float().square().mean(-1) + 1e-6)
        post_MN = linear_relu2(x_MD, up_ND, scale_M, slope)
        ctx.save_for_backward(x_MD, up_ND, down_ND, scale_M, post_MN)
        return (post_MN @ down_ND).view_as(x_BTD)
    @staticmethod
    def backward(ctx: Any, dy_BTD: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (x_MD, up_ND, down_ND, scale_M, post_MN), dy_MD = ctx.saved_tensors, dy_BTD.flatten(0, 1)
        du_MN = linear_relu2(dy_MD, down_ND, scale_M, ctx.slope, post_MN)  # times the norm's scale
        dx_MD, x32 = (du_MN @ up_ND).float(), x_MD.float()
        along = (dx_MD * x32).mean(-1, keepdim=True) * (scale_M / ctx.depth).square()[:, None]
        dx = (dx_MD - along * x32).to(x_MD.dtype).view_as(dy_BTD)
        return dx, du_MN.T @ x_MD, post_MN.T @ dy_MD, None, None

@jit
def heads_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913
        qkv, gain, rotary, q, k, v, dqkv, dgain, T, HALF: tl.constexpr, H: tl.constexpr,
        K: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr):
    """RMS norm, partial RoPE and gain for one head of ROWS tokens: from qkv to q and k.
    BACKWARD: from the gradients in q, k and v to dqkv and this program's part of dgain."""
    head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    dim = tl.arange(0, E)[None, :]
    raw = (token * (H + 2 * K) + head) * E
    if head >= H + K:  # values have a gradient, and nothing else to do
        tl.store(dqkv + raw + dim, tl.load(v + (token * K + head - H - K) * E + dim))
    else:
        side = k + (token * K + head - H) * E
        scale = 1.0
        if head < H:
            side = q + (token * H + head) * E
            scale = tl.load(gain + head).to(tl.float32)
        x = tl.load(qkv + raw + dim).to(tl.float32)
        square = tl.sum(x * x, 1, keep_dims=True) / E + 1e-6
        scale *= tl.rsqrt(square)
        source = side if BACKWARD else qkv + raw
        rotated = dim < 2 * HALF
        angle = rotary + token % T * HALF + dim % HALF
        sin = tl.load(angle + T * HALF, mask=rotated, other=0.0)
        sin = tl.where((dim < HALF) == BACKWARD, sin, -sin)  # the gradient turns back
        partner = source + tl.where(dim < HALF, dim + HALF, dim - HALF)
        turned = (tl.load(source + dim).to(tl.float32) * tl.load(angle, mask=rotated, other=1.0)
                  + tl.load(partner, mask=rotated, other=0.0).to(tl.float32) * sin)
        if BACKWARD:
            along = tl.sum(turned * x, 1, keep_dims=True)
            dx = (turned - x * (along / (E * square))) * scale
            tl.store(dqkv + raw + dim, dx.to(dqkv.dtype.element_ty))
            if head < H:
                tl.store(dgain + tl.program_id(0) * H + head, tl.sum(along * tl.rsqrt(square)))
        else:
            tl.store(side + dim, (turned * scale).to(q.dtype.element_ty))
def heads_outputs(qkv_MC: Tensor, gain_H: Tensor, rotary: Tensor, width: int,
                  grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    (M, C), H = qkv_MC.shape, len(gain_H)
    if grads:
        return torch.empty_like(qkv_MC), rotary.new_empty(M // HEAD_ROWS, H)
    return qkv_MC.new_empty(M, H * width), qkv_MC.new_empty(M, (C - H * width) // 2)

@torch.library.custom_op("golf::norm_rotate", mutates_args=())
def norm_rotate(qkv_MC: Tensor, gain_H: Tensor, rotary: Tensor, width: int,
                grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """q (M, H*E) and k (M, K*E) from raw projections; E is `width`.  With `grads` of q, k and v:
    instead dqkv (M, C) and parts (M / HEAD_ROWS, H) whose sum is dgain."""
    H, (_, T, _, half) = len(gain_H), rotary.shape
    K = (qkv_MC.shape[1] // width - H) // 2
    outputs = heads_outputs(qkv_MC, gain_H, rotary, width, grads)
    sides = [g.contiguous() for g in grads] or (*outputs, qkv_MC)
    heads_kernel[(len(qkv_MC) // HEAD_ROWS, H + K * (2 if grads else 1))](
        qkv_MC, gain_H, rotary, *sides, *outputs, T, half, H, K, width, HEAD_ROWS, bool(grads))
    return outputs
norm_rotate.register_fake(heads_outputs)

class FusedHeads(torch.autograd.Function):
    """`project_heads` with one product for the three projections, in backward too."""
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, w_CD: Tensor, gain_H: Tensor,
                rotary: Tensor) -> tuple[Tensor, ...]:
        x_MD, ctx.width = x_BTD.flatten(0, 1), x_BTD.shape[-1] // len(gain_H)
        qkv_MC = x_MD @ w_CD.T
        q, k = norm_rotate(qkv_MC, gain_H, rotary, ctx.width, [])
        ctx.save_for_backward(x_MD, w_CD, gain_H, rotary, qkv_MC)
        v = qkv_MC[:, -k.shape[1] :]
        return tuple(y.view(*x_BTD.shape[:2], -1, ctx.width) for y in (q, k, v))
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x_MD, w_CD, gain_H, rotary, qkv_MC = ctx.saved_tensors
        dqkv_MC, parts = norm_rotate(qkv_MC, gain_H, rotary, ctx.width, list(grads))
        dx_BTD = (dqkv_MC @ w_CD).view(*grads[0].shape[:2], -1)
        return dx_BTD, dqkv_MC.T @ x_MD, parts.sum(0).to(gain_H.dtype), None

def choose_kernels(h: Hyperparameters, runtime: Runtime, log: RunLog) -> Kernels:
    """The first attention that is right, fused layers on Hopper; nothing by timing: bits repeat."""
    if runtime.device.type != "cuda":
        log("attention:sdpa, plain layers (the only ones on a CPU)")
        return Kernels()
    for name, attend in attention_candidates().items():
        try:
            error = attention_error(h, attend, runtime.device)
            require(error < 2e-2, f"relative error {error:.1e}")  # bf16 lands near 3e-3
            break
        except Exception as problem:  # a kernel that this driver, GPU or version does not run
            log(f"attention:{name} refused ({type(problem).__name__}: {str(problem)[:120]})")
    else:
        raise RunError("attention: no kernel is correct on this GPU; set DEVICE=cpu")
    fused = torch.cuda.get_device_capability() >= (9, 0) and not (
        h.mlp_hidden % 8 or h.model_dim % 8 or h.train_seq_len % HEAD_ROWS
        or h.head_dim & (h.head_dim - 1))
    log(f"attention:{name} relative_error:{error:.1e}, {'fused' if fused else 'plain'} layers")
    return Kernels(attend, *((FusedHeads.apply, FusedMLP.apply) if fused else ()))
def attention_error(h: Hyperparameters, attend: Attend, device: torch.device) -> float:
    """Largest relative error of output and gradients on two random sequences."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = [torch.randn(2, h.train_seq_len, heads, h.head_dim, generator=generator,
                           device=device).bfloat16()
               for heads in (h.num_heads, h.num_kv_heads, h.num_kv_heads, h.num_heads)]
    def run(function: Attend, dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (t.to(dtype).requires_grad_() for t in tensors[:3])
        y = function(q, k, v)
        return [y.detach(), *torch.autograd.grad(y, (q, k, v), tensors[3].to(dtype))]
    exact = run(sdpa(SDPBackend.MATH), torch.float32)
    return max(float((a.float() - b).norm() / b.norm())
               for a, b in zip(run(attend, torch.bfloat16), exact, strict=True))

# ---- 7. Model -----------------------------------------------------------------------------------
def parameter_shapes(h: Hyperparameters) -> dict[str, tuple[int, ...]]:
    """Name -> shape.  Matrices of one shape form a bank: first one role for all layers, then the
    other.  `mlp_bank` holds the down-projections transposed, so that both halves agree."""
    layers, dim = h.num_layers, h.model_dim
    return {
        "tok_emb": (h.vocab_size, dim), "ve_emb": (h.vocab_size, h.ve_dim),
        "qo_bank": (2 * layers, dim, dim), "kv_bank": (2 * layers, h.kv_dim, dim),
        "mlp_bank": (2 * layers, h.mlp_hidden, dim), "ve_proj": (1, h.kv_dim, h.ve_dim),
        "attn_scale": (layers, dim), "mlp_scale": (layers, dim), "resid_mix": (layers, 2, dim),
        "skip_weight": (layers // 2, dim), "q_gain": (layers, h.num_heads),
        "smear_gate": (dim,), "smear_token": (h.smear_dims,), "ve_scale": (h.ve_layers,),
        **({"attn_gate": (layers, h.num_heads, h.gate_dims)} if h.gate_dims else {})}

def initial_weights(h: Hyperparameters) -> dict[str, Tensor]:
    """float32 starting point from the seed.  Orthogonal where a matrix reads the residual stream
    (every record since pg#198), zero where one writes to it, so that blocks start as identity."""
    generator, layers = torch.Generator().manual_seed(h.seed), h.num_layers
    w = {name: torch.zeros(shape) for name, shape in parameter_shapes(h).items()}
    w["tok_emb"].normal_(std=h.embed_init_std, generator=generator)
    w["ve_emb"].normal_(std=0.01, generator=generator)
    for matrix in (*w["qo_bank"][:layers], *w["kv_bank"], *w["mlp_bank"][:layers]):
        nn.init.orthogonal_(matrix, generator=generator)
    w["resid_mix"][:, 0] = 1.0
    for name, value in dict(attn_scale=1.0, mlp_scale=1.0, skip_weight=1.0, ve_scale=0.1,
                            q_gain=h.qk_gain_init).items():
        w[name].fill_(value)
    return w

def smear(x_BTD: Tensor, gate_D: Tensor, token_C: Tensor, inputs_BT: Tensor) -> Tensor:
    """SmearGate (pg#65): blends the previous token's embedding into each token's, by a share per
    dimension, times a factor from the token's first C dims, 1 at first (modded-nanogpt has that
    factor alone); never across the start of a document, nor from before the window."""
    first = torch.arange(inputs_BT.shape[1], device=inputs_BT.device) == 0
    has_previous = ((inputs_BT != BOS_ID) & ~first)[..., None]
    previous = F.pad(x_BTD, (0, 0, 1, 0))[:, :-1]
    factor_BT1 = 2 * torch.sigmoid(x_BTD[..., :len(token_C)] @ token_C)[..., None]
    return x_BTD + has_previous * torch.sigmoid(gate_D) * factor_BT1 * (previous - x_BTD)
def shift_keys(k_BTKE: Tensor, rotated: int) -> Tensor:
    """The dims after the first `rotated` come from the token before, so that a query finds what
    followed an earlier token like its own in one layer, not two (modded-nanogpt's key offset)."""
    now, before = k_BTKE.split((rotated, k_BTKE.shape[-1] - rotated), dim=-1)
    return torch.cat((now, F.pad(before, (0, 0, 0, 0, 1, 0))[:, :-1]), dim=-1)

class GPT(nn.Module):
    """Decoder of L blocks with U-Net skips.  Parameters are banks, named in parameter_shapes."""
    def __init__(self, h: Hyperparameters, weights: Mapping[str, Tensor], kernels: Kernels):
        super().__init__()
        self.h, self.kernels = h, kernels
        for name in parameter_shapes(h):
            self.register_parameter(name, nn.Parameter(weights[name].clone()))
    if TYPE_CHECKING:  # nn.Module declares attributes as Tensor or Module; ours are parameters
        def __getattr__(self, name: str) -> Any: ...
    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """float32 loss of each target in nats, (B, T)."""
        return self.losses(self.final_hidden(inputs_BT), targets_BT)
    def losses(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """The same from the final hidden states, of which the tied head makes logits."""
        logits = F.linear(rms_norm(x_BTD), self.tok_emb).float()
        logits = self.h.logit_softcap * torch.tanh(logits / self.h.logit_softcap)
        losses = F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="none")
        return losses.view(targets_BT.shape)
    def final_hidden(self, inputs_BT: Tensor) -> Tensor:
        """Residual stream after the last block, (B, T, D)."""
        h, layers = self.h, self.h.num_layers
        x = rms_norm(F.embedding(inputs_BT, self.tok_emb))
        x = smear(x, self.smear_gate, self.smear_token, inputs_BT)
        # Projecting the table before the look-up is the same value at V/(B*T) of the work.
        ve = F.embedding(inputs_BT, F.linear(self.ve_emb, self.ve_proj[0]))
        rotary = rotary_table(x.shape[1], h.rope_dims, h.rope_base, x.device)
        (w_q, w_o), (up, down) = self.qo_bank.chunk(2), self.mlp_bank.chunk(2)
        # Output scales fold into the matrices; unbind, unlike indexing, has one backward kernel.
        qkv = torch.cat((w_q, *self.kv_bank.chunk(2)), 1).unbind(0)
        out = (w_o * self.attn_scale[:, :, None]).unbind(0)
        up, down = up.unbind(0), (down * self.mlp_scale[:, None]).unbind(0)
        x0, skips = x, [x][:0]  # no skips yet
        for i in range(layers):
            keep, mixed = self.resid_mix[i, 0], self.resid_mix[i, 1] * x0
            if i >= layers - layers // 2:  # decoder half, mirrors the encoder half
                mixed += keep * self.skip_weight[i - (layers - layers // 2)] * skips.pop()
            x = keep * x + mixed
            ve_index, depth = i - (layers - h.ve_layers), (i + 1) ** -0.5  # pg#315 damps by depth
            normed = rms_norm(x) * depth
            q, k, v = self.kernels.heads(normed, qkv[i], self.q_gain[i], rotary)
            if h.key_shift:
                k = shift_keys(k, h.rope_dims)
            v = v if ve_index < 0 else v + (self.ve_scale[ve_index] * ve).view(v.shape)
            y = self.kernels.attend(q, k, v)
            if i >= layers - h.xsa_layers:
                y = exclude_self(y, v)
            if h.gate_dims:  # one factor a head from a few dims, 1 at first (modded-nanogpt)
                gate_BTH = 2 * torch.sigmoid(F.linear(normed[..., :h.gate_dims], self.attn_gate[i]))
                y = y * gate_BTH[..., None]
            x = x + F.linear(y.flatten(2), out[i])
            x = x + self.kernels.mlp(x, up[i], down[i], depth, h.mlp_slope)
            if i < layers // 2:
                skips.append(x)
        return x

# ---- 8. Optimizer and schedules -----------------------------------------------------------------
MATRICES = ("qo_bank", "kv_bank", "mlp_bank", "ve_proj")  # Muon
TABLES = ("tok_emb", "ve_emb")  # AdamW at embed_lr
VECTORS = ("smear_gate", "smear_token", "resid_mix", "attn_scale", "mlp_scale", "q_gain",
           "skip_weight", "ve_scale", "attn_gate")  # AdamW at scalar_lr
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # since 2.13
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

def progress_of(h: Hyperparameters, step: int, elapsed: float) -> float:
    """Share of the run that is over, in [0, 1]: of the steps or of the clock, the larger."""
    return min(1.0, max(step / h.iterations, elapsed / (h.max_wallclock_seconds or math.inf)))
def lr_scale(h: Hyperparameters, progress: float, total_steps: float = 0.0) -> float:
    """1, then linearly to 0 over the warm-down; `total_steps` turns warmdown_iters to a share."""
    share = h.warmdown_iters / (total_steps or h.iterations) or h.warmdown_fraction
    return min(1.0, (1.0 - progress) / min(1.0, share))

POLAR_EXPRESS = (  # a, b, c of each step x <- a x + b (x x^T) x + c (x x^T)^2 x; norm below 1/1.02
    (8.15656, -22.48329, 15.87877), (4.04293, -2.80892, 0.50002), (3.89167, -2.77248, 0.50607),
    (3.28575, -2.36813, 0.46449), (2.34654, -1.70978, 0.42324))

def orthogonalize(g_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """Batched Newton-Schulz iteration (Jordan et al., Muon, 2024) towards the polar factor U V^T of
    each matrix, with the steps of Polar Express (Amsel et al., 2025); zeros stay zero."""
    x = g_NRC.mT if g_NRC.shape[-2] > g_NRC.shape[-1] else g_NRC
    x = (x / (1.02 * x.square().sum((-2, -1), keepdim=True).sqrt() + 1e-7)).to(dtype)
    identity = torch.eye(x.shape[-2], dtype=dtype, device=x.device)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = (a * identity + b * gram + c * (gram @ gram)) @ x  # baddbmm would copy its addend
    return x.mT if g_NRC.shape[-2] > g_NRC.shape[-1] else x

def muon_update(grad: Tensor, bank: Bank, clip: Tensor, lr: Tensor, beta: Tensor, decay: Tensor,
                beta2: float, dtype: torch.dtype) -> None:
    """In-place Nesterov momentum, orthogonalisation and decoupled decay of a shard (n, R, C).  As
    in NorMuon (Li et al., 2025), each row of a tall update and column of a wide one (the others are
    even by now) is divided by its running root mean square; the norm of the whole stays."""
    g = grad.float().nan_to_num(0, 0, 0) * clip
    bank.momentum.lerp_(g, 1 - beta)
    update = orthogonalize(torch.lerp(g, bank.momentum, beta), dtype).float()
    along = -1 if bank.square.shape[-1] == 1 else -2
    bank.square.lerp_(update.square().mean(along, keepdim=True), 1 - beta2)
    even = update * bank.square.clamp_min(1e-12).rsqrt()
    before, after = (t.square().sum((-2, -1), keepdim=True) for t in (update, even))
    scale = (before / after.clamp_min(1e-12)).sqrt() * bank.update_scale  # padding stays 0
    bank.master.mul_(1 - lr * decay).sub_(lr * scale * even)
def adamw_update(grad: Tensor, mean: Tensor, square: Tensor, master: Tensor, clip: Tensor,
                 lr: Tensor, decay: Tensor, step: Tensor, h: Hyperparameters) -> None:
    """In-place AdamW (Loshchilov & Hutter, 2019) of a flat vector; `lr` per element."""
    g = grad.nan_to_num(0, 0, 0) * clip
    mean.lerp_(g, 1 - h.beta1)
    square.lerp_(g.square(), 1 - h.beta2)
    root = (square / (1 - h.beta2**step)).sqrt() + h.adam_eps
    master.mul_(1 - lr * decay).sub_(lr * mean / (1 - h.beta1**step) / root)

class Bank(NamedTuple):
    """One Muon bank on this rank: a slice of n = ceil(N / ranks) matrices of a padded bank."""
    name: str
    parameter: nn.Parameter  # (N, R, C) working weights, the first rows of `padded`
    padded: Tensor  # (n * ranks, R, C), receives the all-gather
    master: Tensor  # (n, R, C) float32
    momentum: Tensor  # (n, R, C) float32
    square: Tensor  # (n, R, 1), or (n, 1, C) if wide, float32: mean square update of each line
    update_scale: Tensor  # (n, 1, 1) float32: sqrt(max(1, fan_out / fan_in))

class Optimizer:
    """Muon on the banks, sharded over ranks; AdamW on the rest, replicated.  float32 masters live
    here; the model holds working weights, which `write_back` rounds from them: plainly, or late in
    the run on the export grid.  The straight-through gradient of rounding is the identity, so late
    QAT needs nothing in the model's graph.  Gradients are summed over ranks here."""
    def __init__(self, model: GPT, h: Hyperparameters, runtime: Runtime):
        self.model, self.h, self.runtime = model, h, runtime
        parameters = dict(model.named_parameters())
        self.names = list(parameters)
        assert parameters.keys() <= {*MATRICES, *TABLES, *VECTORS}, "a parameter is in no group"
        self.banks = [self._bank(name, parameters[name]) for name in MATRICES]
        self.small = {n: parameters[n] for n in (*TABLES, *VECTORS) if n in parameters}
        # All small gradients and the loss share one buffer, so they need one collective.
        self.flat_master = torch.cat([p.detach().float().flatten() for p in self.small.values()])
        self.flat = torch.zeros(len(self.flat_master) + 1, device=runtime.device)
        self.mean, self.square = (torch.zeros_like(self.flat_master) for _ in range(2))
        self.small_masters = self.split(self.flat_master)
        self.small_lr = torch.cat([torch.full_like(w.flatten(), h.embed_lr if name in TABLES
                                   else h.scalar_lr) for name, w in self.small_masters.items()])
        # On the device, where a CUDA graph finds what changed: the scale of every group's lr ...
        self.lr, self.decay, self.steps, self.grid_step = torch.zeros(4, device=runtime.device)
        # Of this rank's matrices; made once, as copying numbers stops the host until all is done.
        self.grids = dict[str, tuple[Tensor, Tensor]]()
        for name, grid in export_grids(h).items():
            n = len(matrices(self.masters()[name]))
            first = n * runtime.rank if name in MATRICES else 0
            own = ((*values, *[1] * n * runtime.world_size)[first : first + n] for values in grid)
            self.grids[name] = Grid(*own).tensors(self.flat)
        self.muon_update = runtime.compile(muon_update)
        self.adamw_update = runtime.compile(adamw_update)
        self.qat_step: Tensor | None = None  # 0-d step of the export grid; None: no rounding
    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a vector laid out like `flat_master`, by name of the small parameter."""
        pieces = flat.split([p.numel() for p in self.small.values()])
        return {name: piece.view(p.shape)
                for (name, p), piece in zip(self.small.items(), pieces, strict=True)}
    def _bank(self, name: str, parameter: nn.Parameter) -> Bank:
        world, device = self.runtime.world_size, self.runtime.device
        count, rows, columns = parameter.shape
        share = -(-count // world)
        padded = torch.zeros(share * world, rows, columns, device=device, dtype=parameter.dtype)
        padded[:count] = parameter.data
        parameter.data = padded[:count]
        mine = slice(self.runtime.rank * share, (self.runtime.rank + 1) * share)
        straight = count // 2 if name == "mlp_bank" else count  # the others are stored transposed
        fans = [rows / columns] * straight + [columns / rows] * (len(padded) - straight)
        scale = torch.tensor([max(1.0, fan) ** 0.5 for fan in fans[mine]], device=device)
        master = padded[mine].float().clone()  # float() alone would alias float32 weights
        square = torch.zeros_like(master[:, :, :1] if rows >= columns else master[:, :1])
        return Bank(name, parameter, padded, master, torch.zeros_like(master), square,
                    scale.view(-1, 1, 1))
    @torch.no_grad()
    def update(self, sums: list[Tensor]) -> Tensor:
        """One step, on the device alone.  `sums`: this rank's share of the global mean loss (0-d)
        and of its gradients, in `model.parameters()` order; returns the loss over all ranks."""
        by_name = dict(zip(self.names, sums[1:], strict=True))
        shards, pending = [], []  # this rank's matrices, summed over ranks when the work is done
        for bank in self.banks:
            shards.append(by_name[bank.name])
            if self.runtime.world_size > 1:
                whole = F.pad(shards[-1], (0, 0) * 2 + (0, len(bank.padded) - len(shards[-1])))
                shards[-1] = torch.empty_like(bank.master, dtype=whole.dtype)
                pending.append(reduce_scatter(shards[-1], whole, async_op=True))
        torch._foreach_copy_(list(self.split(self.flat[:-1]).values()),
                             [by_name[name] for name in self.small])
        self.flat[-1] = sums[0]
        self.runtime.sum(self.flat)
        for work in pending:
            work.wait()
        h, small, start = self.h, self.flat[:-1], self.h.muon_momentum_warmup_start
        norms = torch.stack(torch._foreach_norm(shards, 2, torch.float32))
        norm = (self.runtime.sum(norms.square().sum()) + small.square().sum()).sqrt()
        finite = norm.isfinite()  # if not, nothing moves, so that there are weights to save
        clip = ((h.grad_clip_norm or math.inf) / (norm + 1e-6)).clamp(max=1.0).nan_to_num()
        lr, warmth = self.lr * finite, self.steps / max(1, h.muon_momentum_warmup_steps)
        matrix_lr, beta = lr * h.matrix_lr, start + (h.muon_momentum - start) * warmth.clamp(max=1)
        for bank, shard in zip(self.banks, shards, strict=True):
            self.muon_update(shard, bank, clip, matrix_lr, beta, self.decay, h.muon_beta2,
                             self.runtime.dtype)
        self.steps += 1
        self.adamw_update(small, self.mean, self.square, self.flat_master, clip,
                          lr * self.small_lr, self.decay, self.steps, h)
        self.write_back()
        return self.flat[-1] + (norm - norm)  # nan unless all is finite: so the host learns of it
    @torch.no_grad()
    def write_back(self) -> None:
        """Working weights from the masters, on the export grid if late QAT is on."""
        new, pending = self.masters(), []
        for name, grid in self.grids.items() if self.qat_step is not None else ():
            new[name] = fake_quantize(matrices(new[name]), self.grid_step, *grid).view_as(new[name])
        for bank in self.banks:
            if self.runtime.world_size == 1:
                bank.padded.copy_(new[bank.name])
            else:
                mine = new[bank.name].to(bank.padded.dtype)
                pending.append(all_gather(bank.padded, mine, async_op=True))
        torch._foreach_copy_(list(self.small.values()), [new[name] for name in self.small])
        for work in pending:
            work.wait()
    def start_qat(self, weight_bytes: float) -> float:
        """Turns late QAT on, on the grid whose entropy fills `weight_bytes`; returns its step."""
        masters = self.masters()
        def size_of(step: float) -> float:
            bits = torch.zeros(2, dtype=torch.float64)  # of the tables, on all ranks; of banks
            for name, grid in self.grids.items():
                codes, _ = quantize(matrices(masters[name]), self.grid_step.fill_(step), *grid)
                bits[int(name in MATRICES)] += entropy_bits(codes)
            return float(bits[0] + self.runtime.sum(bits[1])) / 8
        step = self.runtime.agree_on(fit_step(size_of, weight_bytes))
        self.qat_step = self.grid_step.fill_(step)
        return step
    def masters(self) -> dict[str, Tensor]:
        """This rank's float32 masters by parameter name; of a bank, its slice."""
        return {bank.name: bank.master for bank in self.banks} | self.small_masters
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
        """Copies all state of model and optimizer; the returned function puts it back."""
        tensors = [self.flat_master, self.mean, self.square, self.steps]
        tensors += [p.data for p in self.model.parameters()]
        tensors += [t for bank in self.banks for t in bank[2:-1]]  # all but the constant scales
        saved, qat_step = [t.clone() for t in tensors], self.qat_step
        def restore() -> None:
            torch._foreach_copy_(tensors, saved)
            self.qat_step = qat_step
        return restore

# ---- 9. Weight averaging ------------------------------------------------------------------------
class RunningMean:
    """Tight SWA: the float32 mean of the masters over all steps late enough; one pass a step."""
    def __init__(self, tensors: Mapping[str, Tensor]):
        self.mean, self.count = {name: t.detach().clone() for name, t in tensors.items()}, 0
    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor]) -> None:
        self.count += 1
        torch._foreach_lerp_([*self.mean.values()], [tensors[n] for n in self.mean], 1 / self.count)

# ---- 10. Pack, unpack: float weights <-> artifact -----------------------------------------------
# Bytes: 8 magic, 4 version, 32 SHA-256 of what follows, 4 length of the header, the header (zstd of
# JSON: architecture; name, shape, kind and lengths of the frames of each tensor), the zstd frames
# in that order.  A rounded tensor has a frame of row scales and one of codes per matrix, so that
# the entropy coder adapts to each; any other has one of float16.  Values are little-endian.
ARCHITECTURE = ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_hidden",
                "mlp_slope", "rope_dims", "rope_base", "smear_dims", "key_shift", "gate_dims",
                "xsa_layers", "ve_layers", "ve_dim", "logit_softcap", "train_seq_len")
def rounded(state: Mapping[str, Tensor], h: Hyperparameters,
            step: float) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, int8 codes (N, R, C), float32 scales (N, R, 1)) of every tensor that has a grid."""
    for name, grid in export_grids(h).items():
        w = matrices(state[name])
        yield name, *quantize(w, torch.tensor(step, device=w.device), *grid.tensors(w))
def pack(state: Mapping[str, Tensor], h: Hyperparameters, step: float) -> bytes:
    """The artifact's bytes; the same input always gives the same bytes."""
    coded = {name: (scales, *codes) for name, codes, scales in rounded(state, h, step)}
    streams = {name: [part.cpu().numpy().tobytes() for part in coded.get(name, (w.half(),))]
               for name, w in state.items()}
    def compress(stream: bytes) -> bytes:
        return zstandard.ZstdCompressor(level=h.zstd_level).compress(stream)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        frames = {name: list(pool.map(compress, parts)) for name, parts in streams.items()}
    header = {
        "architecture": {name: getattr(h, name) for name in ARCHITECTURE},
        "tensors": [{"name": name, "shape": list(w.shape), "frames": [len(f) for f in frames[name]],
                     "kind": "codes" if name in coded else "float16"} for name, w in state.items()]}
    packed_header = compress(json.dumps(header, separators=(",", ":")).encode())
    body = struct.pack("<I", len(packed_header)) + packed_header
    body += b"".join(itertools.chain.from_iterable(frames.values()))
    digest = hashlib.sha256(body).digest()
    return ARTIFACT_MAGIC + struct.pack("<I", ARTIFACT_VERSION) + digest + body

def unpack(artifact: bytes, where: str = "artifact") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Architecture and float32 weights.  Raises RunError for anything but a whole artifact."""
    require(artifact[:8] == ARTIFACT_MAGIC, f"{where}: not an artifact of this program: expected "
            f"{ARTIFACT_MAGIC!r}, found {artifact[:8]!r}; name the final_model.ptz of a run")
    version = int.from_bytes(artifact[8:12], "little")
    require(version == ARTIFACT_VERSION or len(artifact) < 12, f"{where}: expected format version "
            f"{ARTIFACT_VERSION}, found {version}; use the train_gpt.py that wrote it")
    require(hashlib.sha256(artifact[44:]).digest() == artifact[12:44], f"{where}: truncated or "
            "damaged, its SHA-256 does not match; copy it again or repack with RESUME_FROM")
    body, state = io.BytesIO(artifact[44:]), dict[str, Tensor]()
    def read(length: int) -> bytearray:
        return bytearray(zstandard.ZstdDecompressor().decompress(body.read(length)))
    header = json.loads(read(*struct.unpack("<I", body.read(4))))
    for entry in header["tensors"]:
        shape, (first, *codes) = entry["shape"], map(read, entry["frames"])
        if entry["kind"] == "codes":
            scales = torch.frombuffer(first, dtype=torch.float32).view(-1, shape[-2], 1)
            w = torch.frombuffer(bytearray().join(codes), dtype=torch.int8).view(-1, *shape[-2:])
            w = dequantize(w, scales)
        else:
            w = torch.frombuffer(first, dtype=torch.float16).float()
        state[entry["name"]] = w.view(shape)
    return header["architecture"], state

def pack_to_budget(state: Mapping[str, Tensor], h: Hyperparameters, budget: int,
                   log: Callable[[str], None]) -> bytes:
    """The finest artifact of fewer than `budget` bytes, by at most twelve packings: the entropy
    predicts the size, each packing calibrates the prediction, and each that is too large doubles
    the margin.  Raises RunError if the weights are not finite or nothing fits."""
    def coded_bytes(step: float) -> float:
        return sum(entropy_bits(codes) for _, codes, _ in rounded(state, h, step)) / 8
    for name, w in state.items():
        highest = math.inf if name in export_grids(h) else 65504  # of float16
        require(torch.isfinite(w).all() and w.abs().max() <= highest,
                f"export: {name} is not finite in its format; set lower learning rates")
    best, overhead, margin = b"", (1 - 1 / ZSTD_OVERHEAD) * budget, 0.0005
    for _ in range(12):
        target = budget * (1 - margin) - overhead
        step = fit_step(coded_bytes, target)
        entropy, blob = coded_bytes(step), pack(state, h, step)
        log(f"pack step:{step:.6g} entropy_bytes:{entropy:.0f} packed_bytes:{len(blob)} "
            f"budget:{budget}")
        fits = len(blob) < budget
        best = max(best, blob if fits else b"", key=len)
        if fits and (len(blob) >= (0.997 - margin) * budget or entropy < 0.99 * target):
            return best  # full, or as fine as the code range allows
        overhead, margin = len(blob) - entropy, margin if fits else 2 * margin
    require(best, f"export: nothing fits {budget} bytes; RESUME_FROM with more ARTIFACT_BYTES")
    return best

# ---- 11. Evaluation -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Score:
    """Sum over a split: nats, tokens scored, UTF-8 bytes they stand for, seconds taken."""
    nats: float
    tokens: int
    text_bytes: int
    seconds: float
    loss = property(lambda self: self.nats / self.tokens)
    bpb = property(lambda self: self.nats / math.log(2) / self.text_bytes)
    def __str__(self) -> str:
        return f"val_loss:{self.loss:.8f} val_bpb:{self.bpb:.8f} eval_time:{self.seconds:.1f}s"

class Evaluator:
    """Scores every token after the first exactly once, from its past only.  Plain windows do not
    overlap.  Sliding windows start `stride` apart and score their last `stride` targets, the first
    all, so that T - stride tokens precede a target if there are so many.  Sums are float64."""
    def __init__(self, h: Hyperparameters, runtime: Runtime, tokens: np.ndarray, table: ByteTable):
        self.h, self.runtime, self.targets = h, runtime, len(tokens) - 1
        require(self.targets > 0, "validation split: expected at least 2 tokens; build it again")
        self.text_bytes = table.count(tokens)  # the same for all vocabularies but for a few kB
        official = abs(self.text_bytes / FINEWEB_VAL_BYTES - 1) < 1e-3
        self.dataset = ("sample" if "sample" in Path(h.data_path).name else
                        f"fineweb10B_sp{h.vocab_size}" if official else "proxy")
        self.tokens = torch.from_numpy(tokens.astype(np.int32)).to(runtime.device)
        batch = min(h.val_batch_size // runtime.world_size, h.micro_batch_tokens)
        self.rows, self.dump = max(1, batch // h.train_seq_len), dict[str, np.ndarray]()
        # Two graphs, the first for all windows; no kernel is chosen by timing: that changes sums.
        self.hidden, self.losses = (runtime.compile(function, deterministic=True)
                                    for function in (GPT.final_hidden, GPT.losses))
    def last_losses(self, model: GPT, starts: range, scored: int) -> tuple[Tensor, Tensor]:
        """Positions and losses (B, scored) of the last targets of the next B = `rows` windows."""
        device, T = self.tokens.device, self.h.train_seq_len
        first = starts.start + starts.step * torch.arange(self.rows, device=device)
        position = first[:, None] + torch.arange(T + 1, device=device)
        window = self.tokens[position.clamp(max=self.targets)].long()
        try:
            hidden = self.hidden(model, window[:, :-1])[:, -scored:]
            return position[:, -scored:], self.losses(model, hidden, window[:, -scored:])
        except torch.cuda.OutOfMemoryError:
            require(self.rows > 1, f"evaluation: one window of TRAIN_SEQ_LEN={T} needs more GPU "
                    "memory than is free; free some, set EVAL_ONLY or RESUME_FROM")
            self.rows //= 2
        return self.last_losses(model, starts, scored)  # here the exception holds no tensors
    @torch.no_grad()
    def score(self, model: GPT, stride: int = 0, log: RunLog | None = None) -> Score:
        """Plain (stride 0) or sliding windows over the whole split; with `log`, tells how far."""
        began, T, end = time.perf_counter(), self.h.train_seq_len, self.targets
        # Going on past the end of a range gives windows that score nothing: they fill a batch.
        groups = [(range(0, end, T), T)] if stride in (0, T) else [
            (range(0, end, end), T), (range(stride, max(end - T, 0) + stride, stride), stride)]
        # The loss of each token; before them how many were scored, after them what has no token.
        nats = torch.zeros(end + 2, dtype=torch.float64, device=self.tokens.device)
        for starts, scored in groups:
            left = mine = starts[self.runtime.rank :: self.runtime.world_size]
            while left:
                position, losses = self.last_losses(model, left, scored)
                nats[position.clamp(max=end + 1)] = losses.double()
                nats[0] += (position <= end).sum()
                left = left[len(losses) :]
                spent, share = time.perf_counter() - began, 1 - len(left) / len(mine)
                # Not for the first sliding window, a group by itself, nor in all of 10 s.
                if log and len(mine) > 1 and spent > max(2, 10 * share):
                    log.progress(f"eval:{share:.0%} seconds:{spent:.0f} "
                                 f"left:{spent / share - spent:.0f}", share)
        nats = self.runtime.sum(nats)
        assert int(nats[0]) == end, f"scored {nats[0]} tokens, expected {end}"
        if log and self.h.eval_dump:
            self.dump["sliding" if stride else "plain"] = nats[1:-1].to(torch.float32).cpu().numpy()
        return Score(float(nats[1:-1].sum()), end, self.text_bytes, time.perf_counter() - began)
    def warm_up(self, model: GPT) -> None:
        """Compiles the evaluation graphs: scores dummy tokens, of which every rank has windows."""
        dummy = copy.copy(self)
        dummy.targets = (self.runtime.world_size + 1) * self.h.train_seq_len
        dummy.tokens = self.tokens.new_zeros(dummy.targets + 1)
        for stride in {0, self.h.eval_stride}:
            dummy.score(model, stride)

# ---- 12. Training -------------------------------------------------------------------------------
def batch_layout(h: Hyperparameters, world_size: int) -> tuple[int, int, int]:
    """(sequences a step, sequences a rank, micro-batches a rank).  Raises RunError if uneven."""
    sequences = h.train_batch_tokens // h.train_seq_len
    require(sequences % world_size == 0, f"TRAIN_BATCH_TOKENS={h.train_batch_tokens}: {sequences} "
            f"sequences do not divide over {world_size} ranks; set a multiple of "
            f"{h.train_seq_len} x {world_size} or change --nproc_per_node")
    local, most = sequences // world_size, h.micro_batch_tokens // h.train_seq_len
    micro = next(n for n in range(1, local + 1) if local % n == 0 and local // n <= most)
    return sequences, local, micro

def capture(function: Callable[..., Any], *held: Tensor) -> Callable[..., Any]:
    """CUDA graph of `function(*held)`, run before; its calls overwrite arguments and results."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.empty_cache()  # the graph's temporaries get memory of their own
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's thread may run
        results = function(*held)
    def replay(*arguments: Tensor) -> Any:
        for tensor, new in zip(held, arguments, strict=True):
            tensor.copy_(new)
        graph.replay()
        return results
    return replay
def load_model(h: Hyperparameters, runtime: Runtime, state: Mapping[str, Tensor],
               kernels: Kernels) -> GPT:
    """A fresh model with the given float32 weights as working weights."""
    return GPT(h, {n: w.to(runtime.device, runtime.dtype) for n, w in state.items()}, kernels)

class Trainer:
    """Model, optimizer and averages, and the one `train_step` that warm-up and training share."""
    def __init__(self, h: Hyperparameters, runtime: Runtime, kernels: Kernels):
        self.h, self.runtime = h, runtime
        self.model = load_model(h, runtime, initial_weights(h), kernels)
        self.optimizer = Optimizer(self.model, h, runtime)
        self.average = RunningMean(self.optimizer.masters())
        _, self.local, self.micro = batch_layout(h, runtime.world_size)
        # Mean loss over a micro-batch (b, T+1), times its share of the global batch.
        self.loss = runtime.compile(
            lambda model, tokens, share: model(tokens[:, :-1], tokens[:, 1:]).mean() * share)
        self.gradients: Callable[[Tensor], list[Tensor]] = self.loss_and_gradients
        self.updates: dict[bool, Callable[[], Tensor]] = {}  # CUDA graphs, by late QAT on or off
    def loss_and_gradients(self, tokens: Tensor) -> list[Tensor]:
        """Share of the global mean loss of one micro-batch, then its gradient by parameter."""
        loss = self.loss(self.model, tokens, 1.0 / (self.micro * self.runtime.world_size))
        return [loss.detach(), *torch.autograd.grad(loss, list(self.model.parameters()))]
    def train_step(self, tokens: Tensor, lr: float, decay: float = 0.0) -> Tensor:
        """One optimizer step on this rank's (local, T+1) tokens; the global mean loss, 0-d."""
        sums: list[Tensor] = []
        for micro in tokens.chunk(self.micro):
            new = self.gradients(micro)
            if self.micro > 1:  # micro-batches add up in float32
                new = [g.to(torch.float32, copy=True) for g in new]
            sums = list(torch._foreach_add(sums, new)) if sums else new
        self.optimizer.lr.fill_(lr)
        self.optimizer.decay.fill_(decay)
        replay = self.updates.get(self.optimizer.qat_step is not None)
        return replay() if replay else self.optimizer.update(sums)
    def capture(self, tokens: Tensor) -> None:
        """CUDA graphs of what has run before: forward and backward of one micro-batch and, unless
        ranks or micro-batches share it, the update with or without late QAT as it is now."""
        if self.gradients == self.loss_and_gradients:
            self.gradients = capture(self.gradients, tokens.chunk(self.micro)[0].clone())
        if self.micro == self.runtime.world_size == 1:
            sums, late_qat = self.gradients(tokens), self.optimizer.qat_step is not None
            self.updates[late_qat] = capture(lambda: self.optimizer.update(sums))
    def warm_up(self, evaluator: Evaluator) -> None:
        """Compiles and runs every graph on random tokens, then undoes it bit for bit."""
        h, device = self.h, self.runtime.device
        restore = self.optimizer.snapshot()
        generator = torch.Generator(device).manual_seed(self.runtime.rank)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for step in range(2 * h.warmup_steps):
                if step == h.warmup_steps:
                    self.optimizer.start_qat(self.weight_bytes())
                tokens = torch.randint(h.vocab_size, (self.local, h.train_seq_len + 1),
                                       generator=generator, device=device)
                self.train_step(tokens, 1.0)
                if step % h.warmup_steps == 0 and device.type == "cuda":
                    self.capture(tokens)
            evaluator.warm_up(self.model)
        restore()
        self.average = RunningMean(self.optimizer.masters())
    def weight_bytes(self) -> float:
        """Entropy of codes that fills the cap."""
        floats = sum(2 * p.numel() for name, p in self.model.named_parameters()
                     if name not in self.optimizer.grids)
        return (self.h.artifact_bytes - SOURCE.stat().st_size - floats) / ZSTD_OVERHEAD

class StepQueue:
    """The training clock in seconds, and the steps in flight, at most two ahead of the device: it
    never waits for Python, and what is read here is of finished steps, so reading is free."""
    def __init__(self, evaluator: Evaluator, log: RunLog):
        self.h, self.log, self.runtime = evaluator.h, log, evaluator.runtime
        self.bpb_per_nat = evaluator.targets / evaluator.text_bytes / math.log(2)
        self.fault, self.losses = "", collections.deque[float](maxlen=5)  # the last finite ones
        self.total, self.began, self.pace = 0.0, math.inf, 0.0  # not begun; seconds a step
        self.flights = collections.deque[tuple[int, Tensor, Any]]()  # step, host loss, end event
        self.ends = collections.deque[float](maxlen=17)  # clock at the latest ends
    def start(self) -> None:
        self.stop()
        self.began = time.perf_counter()
    def stop(self) -> None:  # when the device has done everything
        self.land()
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        self.total, self.began = self.elapsed(), math.inf
    def elapsed(self) -> float:
        return self.total + max(0.0, time.perf_counter() - self.began)
    def push(self, step: int, loss: Tensor) -> None:
        done = torch.cuda.Event() if self.runtime.device.type == "cuda" else None
        if done:
            loss = torch.empty((), pin_memory=True).copy_(loss, non_blocking=True)
            done.record()
        self.flights.append((step, loss, done))
        self.land(in_flight=2 if done else 0)
    def land(self, in_flight: int = 0) -> None:
        """Waits until at most so many steps are queued; a loss that is not finite is a fault."""
        while len(self.flights) > in_flight:
            step, on_host, done = self.flights.popleft()
            if done:
                done.synchronize()
            loss = float(on_host)
            self.ends.append(self.elapsed())
            self.pace = (self.ends[-1] - self.ends[0]) / max(1, len(self.ends) - 1)
            if not math.isfinite(loss):
                before = ", ".join(f"{value:.4f}" for value in self.losses)
                self.fault = self.fault or f"step {step}: the loss is {loss} (before: {before})"
                continue
            self.losses.append(loss)
            if step <= 10 or step % self.h.train_log_every == 0:
                self.report(step, f"train_loss:{loss:.4f}", self.ends[-1])
            elif self.log.terminal and int(self.ends[-1]) > int(self.ends[-2]):  # each second
                self.log.progress(self.status(step, loss))
    def projected(self, more: int) -> float:
        """Clock at which the device will have finished what is queued and `more` steps."""
        return self.elapsed() + (len(self.flights) + more) * self.pace
    def status(self, step: int, loss: float) -> str:
        """For a terminal; bpb as if training tokens stood for as many bytes as validation's."""
        h, where, rate = self.h, self.runtime, self.h.train_batch_tokens / self.pace
        left = self.ends[-1] / progress_of(h, step, self.ends[-1]) - self.ends[-1]
        # Per token 6 a weight and attention's causal half; an H100 SXM does 989e12 in bfloat16.
        flops = 6 * rate * (h.parameters() + h.num_layers * h.train_seq_len * h.model_dim)
        mfu = f"MFU:{flops / 989e12 / where.world_size:.0%} " if where.device.type != "cpu" else ""
        return (f"step:{step}/{h.iterations} loss:{loss:.4f} bpb:{loss * self.bpb_per_nat:.3f} "
                f"{self.pace * 1e3:.1f}ms {rate:,.0f} tokens/s {mfu}left:{left:.0f}s")
    def report(self, step: int, what: str, clock: float) -> None:  # as the challenge prints it
        self.log(f"step:{step}/{self.h.iterations} {what} train_time:{clock * 1e3:.0f}ms "
                 f"step_avg:{clock * 1e3 / step:.2f}ms")

def train(h: Hyperparameters, runtime: Runtime, log: RunLog, evaluator: Evaluator,
          trainer: Trainer, plan: BatchPlan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Warm-up, then the loop under the clock: whole float32 weights by stage, facts to report."""
    began = time.perf_counter()
    trainer.warm_up(evaluator)
    stats = torch._dynamo.utils.counters["stats"]
    log(f"warm-up:{time.perf_counter() - began:.1f}s graphs:{(graphs := stats['unique_graphs'])}")
    first = runtime.rank * trainer.local
    loader = prefetch(plan, range(first, first + trainer.local), h.vocab_size, runtime.device)
    optimizer, average, step, qat_steps, progress = trainer.optimizer, trainer.average, 0, 0, 0.0
    queue = StepQueue(evaluator, log)
    signals: list[int] = []  # that came while training
    handlers = {number: signal.signal(number, lambda number, _: signals.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    runtime.agree_on(None)  # all ranks are ready
    queue.start()
    while step < h.iterations and not queue.fault:
        # Rank 0's clock is everybody's; the second step ahead is margin.
        ends, elapsed, stop = runtime.agree_on((queue.projected(2), queue.elapsed(), len(signals)))
        if step and (stop or 0 < h.max_wallclock_seconds < ends):
            break
        if h.val_loss_every and step and step % h.val_loss_every == 0:
            queue.stop()
            score = evaluator.score(trainer.model)
            queue.report(step, f"val_loss:{score.loss:.4f} val_bpb:{score.bpb:.4f}", queue.total)
            queue.start()
        before, progress = progress, progress_of(h, step, elapsed)
        lr = lr_scale(h, progress, min(h.iterations, step / (progress or math.inf)))
        step += 1
        if lr < h.qat_threshold:
            if not qat_steps:
                grid_step = optimizer.start_qat(trainer.weight_bytes())
                log(f"late_qat:on step:{step} lr_scale:{lr:.4f} grid_step:{grid_step:.6g}")
            qat_steps += 1
        loss = trainer.train_step(next(loader), lr * min(1.0, step / (h.lr_warmup_steps or 1)),
                                  h.decay_per_run * (progress - before))
        if lr < h.swa_threshold:
            average.update(optimizer.masters())
        queue.push(step, loss)
    queue.stop()
    loader.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    facts = dict[str, Any](
        step_stop=step, wallclock_seconds=round(queue.total, 3), seed=h.seed, qat_steps=qat_steps,
        step_avg_ms=round(queue.total * 1e3 / step, 3), swa_steps=average.count,
        train_shards=len(plan.shards), train_tokens=sum(map(len, plan.shards)),
        final_train_loss=queue.losses[-1] if queue.losses else None, interrupted=bool(stop),
        graphs_compiled_on_clock=stats["unique_graphs"] - graphs, fault=queue.fault)
    log("training " + " ".join(f"{k}:{v}" for k, v in facts.items() if v != ""))
    trained, mean = map(optimizer.gather, (optimizer.masters(), average.mean))
    return {"trained": trained, "averaged": mean if average.count else trained}, facts

# ---- 13. Report and main ------------------------------------------------------------------------
def environment_facts(runtime: Runtime) -> dict[str, Any]:
    """Versions and hardware, for the log and the submission."""
    cuda, modules = runtime.device.type == "cuda", (torch, np, zstandard, sentencepiece)
    device = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()}-core CPU"
    return {"hardware": f"{runtime.world_size} x {device}" if cuda else device,
            "python": sys.version.split()[0], **{m.__name__: m.__version__ for m in modules},
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if cuda else None}
def checked_state(h: Hyperparameters, architecture: Mapping[str, Any], where: str) -> None:
    """Raises RunError if an artifact or checkpoint is of another architecture than `h`."""
    other = [f"{name.upper()}={architecture.get(name)}" for name in ARCHITECTURE
             if architecture.get(name) != getattr(h, name)]
    require(not other, f"{where}: holds a model of another shape; set {' '.join(other)}")
def read_file(path: str | Path, variable: str, runtime: Runtime) -> bytes:
    """Read by rank 0 for all ranks: other nodes need no copy."""
    try:
        return runtime.agree_on(Path(path).read_bytes() if runtime.rank == 0 else b"")
    except OSError as error:
        raise RunError(f"{variable}={path}: cannot be read ({error.strerror}); name a file that "
                       "a run has written") from None

def obtain_weights(h: Hyperparameters, runtime: Runtime, log: RunLog, evaluator: Evaluator,
                   kernels: Kernels) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Float weights by stage, from training or from RESUME_FROM, and the facts of training."""
    if h.resume_from:
        content = io.BytesIO(read_file(h.resume_from, "RESUME_FROM", runtime))
        try:
            saved = torch.load(content, map_location=runtime.device, weights_only=True)
            architecture, stages, facts = (saved[n] for n in ("architecture", "stages", "facts"))
        except Exception:
            raise RunError(f"RESUME_FROM={h.resume_from}: not a run's final_model.pt") from None
        checked_state(h, architecture, h.resume_from)
        return stages, facts
    plan = BatchPlan(open_split(h.data_path, "train"), h.train_seq_len,
                     h.train_batch_tokens // h.train_seq_len, h.seed)
    stages, facts = train(h, runtime, log, evaluator, Trainer(h, runtime, kernels), plan)
    path = Path(h.output_dir) / "final_model.partial.pt"
    whole = all(bool(w.isfinite().all()) for w in stages["averaged"].values())
    if runtime.rank == 0 and whole:
        torch.save({"architecture": {n: getattr(h, n) for n in ARCHITECTURE}, "facts": facts,
                    "stages": stages}, content := io.BytesIO())
        write_atomic(path, content.getvalue())
    if fault := facts["fault"]:
        kept = f"RESUME_FROM={path} scores what it left" if whole else "no finite weights left"
        raise RunError(f"{fault}; lower MATRIX_LR, EMBED_LR or SCALAR_LR; {kept}")
    if facts["interrupted"] and h.on_interrupt == "save":
        raise RunError(f"interrupted at step {facts['step_stop']}: RESUME_FROM={path} scores it")
    return stages, facts

def run(h: Hyperparameters, runtime: Runtime) -> None:
    """The stages: data -> train -> save -> pack -> score what is on disk -> report."""
    batch_layout(h, runtime.world_size)  # refuses what does not divide
    require(not h.eval_dump or runtime.rank or Path(h.eval_dump).absolute().parent.is_dir(),
            f"EVAL_DUMP={h.eval_dump}: expected a file in a folder that exists; make it")
    tokens, out = np.concatenate(open_split(h.data_path, "val")), Path(h.output_dir)
    check_vocabulary(tokens, h.vocab_size, f"{h.data_path}/fineweb_val_*.bin")
    evaluator = Evaluator(h, runtime, tokens, load_byte_table(h.tokenizer_path, h.vocab_size))
    # Opened only now, so that a run which cannot start leaves the last one's log alone.
    kind = "eval" if h.eval_only else "resume" if h.resume_from else f"train_seed{h.seed}"
    log = RunLog(out / f"{kind}.partial.log" if runtime.rank == 0 else None,
                 f"{SOURCE.read_text()}\n{'=' * 80}\n{json.dumps(asdict(h), indent=1)}\n")
    environment = environment_facts(runtime)
    log(f"{json.dumps(environment)}\ndataset:{evaluator.dataset} val_tokens:{evaluator.targets} "
        f"val_bytes:{evaluator.text_bytes} model_params:{h.parameters()} "
        f"world_size:{runtime.world_size} seed:{h.seed}")
    kernels, scores, facts = choose_kernels(h, runtime, log), dict[str, Score](), dict[str, Any]()
    def score(stage: str, model: GPT, label: str, stride: int = 0) -> None:
        scores[stage] = evaluator.score(model, stride, log)
        log(f"{label} {scores[stage]}")
    artifact, partial = Path(h.eval_only or out / "final_model.partial.ptz"), [log.path]
    if not h.eval_only:
        stages, facts = obtain_weights(h, runtime, log, evaluator, kernels)
        for stage, state in stages.items():
            score(stage, load_model(h, runtime, state, kernels), f"stage:{stage}")
        if runtime.rank == 0:
            began, budget = time.perf_counter(), h.artifact_bytes - SOURCE.stat().st_size
            write_atomic(artifact, pack_to_budget(stages["averaged"], h, budget, log))
            log(f"pack_time:{time.perf_counter() - began:.1f}s")
        partial += [artifact] if h.resume_from else [artifact, artifact.with_suffix(".pt")]
    content = read_file(artifact, "EVAL_ONLY", runtime)
    architecture, state = unpack(content, str(artifact))
    checked_state(h, architecture, str(artifact))
    model = load_model(h, runtime, state, kernels)
    score("packed", model, "final_int6_zstd_roundtrip_exact")
    if stride := h.eval_stride:
        score("sliding", model, f"final_int6_zstd_sliding_exact stride:{stride}", stride)
    if h.eval_dump and runtime.rank == 0:
        np.savez(archive := io.BytesIO(), **evaluator.dump)  # type: ignore[arg-type]
        write_atomic(Path(h.eval_dump), archive.getvalue())
    if log.path and not h.eval_only:
        with contextlib.suppress(ModuleNotFoundError):  # this file alone trains and scores as well
            from record import add_result  # writes submission.json for all seeds of the folder
            add_result(out, log, write_atomic, evaluator, environment, facts, scores, len(content))
    code, size, best = SOURCE.stat().st_size, len(content), scores.get("sliding", scores["packed"])
    log(f"peak_gpu_memory:{torch.cuda.max_memory_reserved() / 2**30:.2f}GiB\n"
        f"val_bpb:{best.bpb:.8f} dataset:{evaluator.dataset} bytes_total:{code + size} "
        f"(code {code} + model {size}, cap {h.artifact_bytes})")
    if log.path and kind.startswith("train"):
        write_atomic(out / "train.log", log.path.read_bytes())
    for path in filter(None, partial if runtime.rank == 0 else ()):  # now it may replace older ones
        os.replace(path, path.with_name(path.name.replace(".partial", "")))

def main() -> None:
    """Exits with 0, or with 1 and one message on stderr."""
    try:
        h = Hyperparameters.from_env(os.environ)
        if h.data_path == "sample":
            from prepare_data import with_sample
            h = with_sample(h)  # the paths of the built-in corpus, which is built if missing
        run(h, Runtime.start(h, os.environ))
        if dist.is_initialized():
            dist.destroy_process_group()
    except (RunError, OSError, RuntimeError, KeyboardInterrupt) as error:
        if isinstance(error, RuntimeError) and "gloo" not in str(error).lower():
            raise  # a bug, not a collective whose peer has gone
        rank = int(os.environ.get("RANK", 0))
        time.sleep(2 if rank else 0)  # most faults meet all ranks: rank 0 speaks, then all end
        text = (f"{error}; give it space, or another OUTPUT_DIR" if isinstance(error, OSError) else
                str(error).splitlines()[0] if str(error) else "interrupted")
        kind = "lost a rank" if isinstance(error, RuntimeError) else "error"
        print(f"{kind} (rank {rank}): {text}", file=sys.stderr, flush=True)
        os._exit(1)  # at once: the other ranks may be inside collectives, and torchrun ends them

if __name__ == "__main__":
    main()
