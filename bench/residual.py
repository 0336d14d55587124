"""What happens between two layers as one Triton kernel a pass, beside what Inductor makes of it.

    python bench/residual.py [STREAM]        # one H100; STREAM is stored (the default) or summed

Between two layers the stream z = x + f (f: what the MLP adds) is mixed with the embedding e and, in
the decoder half, a skip s:  y = keep z + mix e + keep w s.  Attention reads n = rms_norm(y) scale.
Backward gets the gradients of y and n.  It adds the embedding's gradient to a running one, as all
layers share the embedding.  It needs z again: forward stores it, or (`summed`) backward adds x and
f once more.  Both ways move the same bytes, if nothing else needs z.

Times are microseconds, the median of calls in a row.  Shapes are the card's (98,304 tokens of width
512) unless environment variables override the hyperparameters.  There every tensor is twice the
size of the L2 cache, so that a call finds next to nothing in it.  The roofline is the bytes of all
tensors, each moved once, at 3.0 TB/s.  The error is the largest relative one of all outputs and
gradients, with a skip, against float32.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import timing
import train_gpt as tg

tl = tg.tl

BYTES_PER_SECOND = 3.0e12  # of the roofline
SHARED_BYTES = 227 * 1024  # of a processor of an H100, for all programs that it holds
OTHER_BYTES = 5 * 1024  # for the norm's sums, and what the GPU keeps for itself
TENSORS_LOADED = 7  # at most, for each row: by backward with a skip, where it adds x and f
STREAMS = ("stored", "summed")

Pass = Callable[..., tuple[Tensor, ...]]


class Tiling(NamedTuple):
    """How the rows are shared out among programs."""

    rows: int  # that a program takes at a time
    warps: int
    stages: int  # of loads under way; 1: a program waits for what it loads
    programs: int  # on each SM; they take rows until none is left


class Mixing(NamedTuple):
    """All that is mixed with the stream, and how much of each."""

    keep_D: Tensor
    mix_D: Tensor
    e_MD: Tensor
    w_D: Tensor | None = None  # None: no skip
    s_MD: Tensor | None = None

    @property
    def has_skip(self) -> bool:
        return self.s_MD is not None

    @property
    def of_kernel(self) -> tuple[Tensor, ...]:
        """e, s, keep, mix and w; without a skip, tensors that are not touched stand for s and w."""
        s_MD = self.e_MD if self.s_MD is None else self.s_MD
        w_D = self.keep_D if self.w_D is None else self.w_D
        return self.e_MD, s_MD, self.keep_D, self.mix_D, w_D


# ---- Plain twins --------------------------------------------------------------------------------
def mix(
    z_MD: Tensor,
    scale: float,
    keep_D: Tensor,
    mix_D: Tensor,
    e_MD: Tensor,
    w_D: Tensor | None = None,
    s_MD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y and n, as `GPT.mix_in` and `GPT.attention` have them."""
    mixed = mix_D * e_MD
    if w_D is not None and s_MD is not None:
        mixed = mixed + keep_D * w_D * s_MD
    y_MD = keep_D * z_MD + mixed
    return y_MD, tg.rms_norm(y_MD) * scale


def plain_forward(
    x_MD: Tensor, f_MD: Tensor, scale: float, mixing: Mixing, store: bool
) -> tuple[Tensor, ...]:
    """(y, n), and z if it is to be stored."""
    z_MD = x_MD + f_MD
    y_MD, n_MD = mix(z_MD, scale, *mixing)
    return (y_MD, n_MD, z_MD) if store else (y_MD, n_MD)


def plain_backward(
    upstream: tuple[Tensor, Tensor],
    stream: tuple[Tensor, ...],
    scale: float,
    mixing: Mixing,
    running_MD: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(dz, dkeep, dmix, de) and, with a skip, dw and ds.

    `upstream` is (dy, dn).  `stream` is (z,), or (x, f), whose gradients both are dz.  Given
    `running`, de is what is in it plus the layer's own.
    """
    z_MD = stream[0] + stream[1] if len(stream) == 2 else stream[0]
    given = tuple(tensor for tensor in mixing if tensor is not None)
    _, pull = torch.func.vjp(lambda z, *rest: mix(z, scale, *rest), z_MD, *given)
    dz, dkeep, dmix, de, *of_skip = pull(upstream)
    if running_MD is not None:
        de = running_MD + de
    return (dz, dkeep, dmix, de, *of_skip)


# ---- Kernels ------------------------------------------------------------------------------------
@tg.jit
def mix_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    x,
    f,
    e,
    s,
    keep,
    mix,
    w,
    y,
    n,
    z,
    SCALE,
    M,
    D: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    SKIP: tl.constexpr,
    STORE: tl.constexpr,
):
    """y, n and, if STORE, z of ROWS rows at a time; D is a power of 2.

    Without SKIP, s and w are not touched; without STORE, z is not.
    """
    column = tl.arange(0, D)[None, :]
    keep_D = tl.load(keep + column).to(tl.float32)
    mix_D = tl.load(mix + column).to(tl.float32)
    if SKIP:
        skip_D = keep_D * tl.load(w + column).to(tl.float32)

    turns = tl.cdiv(M, ROWS)
    for turn in tl.range(tl.program_id(0), turns, tl.num_programs(0), num_stages=STAGES):
        row = turn * ROWS + tl.arange(0, ROWS)[:, None]
        inside = row < M
        place = row.to(tl.int64) * D + column
        z_now = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        z_now += tl.load(f + place, mask=inside, other=0.0).to(tl.float32)
        e_now = tl.load(e + place, mask=inside, other=0.0).to(tl.float32)
        y_now = keep_D * z_now + mix_D * e_now
        if SKIP:
            s_now = tl.load(s + place, mask=inside, other=0.0).to(tl.float32)
            y_now += skip_D * s_now
        factor = tl.rsqrt(tl.sum(y_now * y_now, 1, keep_dims=True) / D + EPS) * SCALE
        tl.store(y + place, y_now.to(y.dtype.element_ty), mask=inside)
        tl.store(n + place, (y_now * factor).to(n.dtype.element_ty), mask=inside)
        if STORE:
            tl.store(z + place, z_now.to(z.dtype.element_ty), mask=inside)


@tg.jit
def mix_backward_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    dy,
    dn,
    x,
    f,
    e,
    s,
    keep,
    mix,
    w,
    dz,
    de,
    ds,
    parts,
    SCALE,
    M,
    D: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    SKIP: tl.constexpr,
    SUMMED: tl.constexpr,
    RUNNING: tl.constexpr,
):
    """Gradients of ROWS rows at a time, and this program's part of the sums over all rows.

    With SUMMED, z is x + f; else x is z, and f is not touched.  With RUNNING, de has a gradient to
    which this one is added; no two programs touch the same row.  y is computed again, since all
    that it takes is read for the sums anyway.  A row of `parts` is dkeep, dmix and, with SKIP, dw.
    """
    column = tl.arange(0, D)[None, :]
    keep_D = tl.load(keep + column).to(tl.float32)
    mix_D = tl.load(mix + column).to(tl.float32)
    # One sum for each row of a turn: they meet only once, at the end.
    dkeep = tl.zeros((ROWS, D), tl.float32)
    dmix = tl.zeros((ROWS, D), tl.float32)
    if SKIP:
        w_D = tl.load(w + column).to(tl.float32)
        dw = tl.zeros((ROWS, D), tl.float32)

    turns = tl.cdiv(M, ROWS)
    for turn in tl.range(tl.program_id(0), turns, tl.num_programs(0), num_stages=STAGES):
        row = turn * ROWS + tl.arange(0, ROWS)[:, None]
        inside = row < M
        place = row.to(tl.int64) * D + column
        kept = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if SUMMED:
            kept += tl.load(f + place, mask=inside, other=0.0).to(tl.float32)
        e_now = tl.load(e + place, mask=inside, other=0.0).to(tl.float32)
        if SKIP:
            s_now = tl.load(s + place, mask=inside, other=0.0).to(tl.float32)
            kept += w_D * s_now
        y = keep_D * kept + mix_D * e_now

        # The norm takes out the part of the gradient along y.
        inverse_square = 1 / (tl.sum(y * y, 1, keep_dims=True) / D + EPS)
        g = tl.load(dn + place, mask=inside, other=0.0).to(tl.float32)
        along = tl.sum(g * y, 1, keep_dims=True) / D * inverse_square
        g = (g - along * y) * (tl.sqrt(inverse_square) * SCALE)
        g += tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)

        dkeep += g * kept
        dmix += g * e_now
        dz_now = keep_D * g
        tl.store(dz + place, dz_now.to(dz.dtype.element_ty), mask=inside)
        de_now = mix_D * g
        if RUNNING:
            de_now += tl.load(de + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(de + place, de_now.to(de.dtype.element_ty), mask=inside)
        if SKIP:
            dw += dz_now * s_now
            tl.store(ds + place, (w_D * dz_now).to(ds.dtype.element_ty), mask=inside)

    part = parts + tl.program_id(0) * ((3 if SKIP else 2) * D) + tl.arange(0, D)
    tl.store(part, tl.sum(dkeep, 0))
    tl.store(part + D, tl.sum(dmix, 0))
    if SKIP:
        tl.store(part + 2 * D, tl.sum(dw, 0))


def programs_of(tiling: Tiling, rows: int) -> int:
    """How many programs share so many rows."""
    return min(-(-rows // tiling.rows), tiling.programs * tg.SM_COUNT)


def fused_forward(
    x_MD: Tensor, f_MD: Tensor, scale: float, mixing: Mixing, store: bool, tiling: Tiling
) -> tuple[Tensor, ...]:
    """`plain_forward` in one kernel."""
    outputs = [torch.empty_like(x_MD) for _ in range(3 if store else 2)]
    z_MD = outputs[-1]  # not touched where it is not stored
    mix_kernel[(programs_of(tiling, len(x_MD)),)](
        x_MD,
        f_MD,
        *mixing.of_kernel,
        *outputs[:2],
        z_MD,
        scale,
        *x_MD.shape,
        tg.RMS_EPS,
        tiling.rows,
        tiling.stages,
        mixing.has_skip,
        store,
        num_warps=tiling.warps,
    )
    return tuple(outputs)


def fused_backward(
    upstream: tuple[Tensor, Tensor],
    stream: tuple[Tensor, ...],
    scale: float,
    mixing: Mixing,
    running_MD: Tensor | None = None,
    *,
    tiling: Tiling,
) -> tuple[Tensor, ...]:
    """`plain_backward` in one kernel and a sum; `running` itself becomes de."""
    x_MD, f_MD = stream[0], stream[-1]
    dz_MD = torch.empty_like(x_MD)
    ds_MD = torch.empty_like(x_MD) if mixing.has_skip else dz_MD
    de_MD = torch.empty_like(x_MD) if running_MD is None else running_MD
    programs = programs_of(tiling, len(x_MD))
    sums = 3 if mixing.has_skip else 2
    parts = x_MD.new_empty(programs, sums, x_MD.shape[1], dtype=torch.float32)
    mix_backward_kernel[(programs,)](
        *upstream,
        x_MD,
        f_MD,
        *mixing.of_kernel,
        dz_MD,
        de_MD,
        ds_MD,
        parts,
        scale,
        *x_MD.shape,
        tg.RMS_EPS,
        tiling.rows,
        tiling.stages,
        mixing.has_skip,
        len(stream) == 2,
        running_MD is not None,
        num_warps=tiling.warps,
    )
    dkeep, dmix, *dw = parts.sum(0).to(mixing.keep_D.dtype).unbind(0)
    return (dz_MD, dkeep, dmix, de_MD, *dw, *([ds_MD] if mixing.has_skip else []))


# ---- Measurement --------------------------------------------------------------------------------
def tilings() -> Iterator[Tiling]:
    """Those whose sums fit the registers, and whose waiting loads fit an SM, at the card's width.

    Some have more programs than an SM can run at once in backward; forward needs fewer registers.
    """
    for rows, warps, stages, programs in itertools.product(
        (1, 2, 4, 8), (1, 2, 4, 8), (1, 3), (1, 2, 4, 8, 16)
    ):
        values = 512 * rows // (32 * warps)  # of each tensor in a thread; with 32, some spill
        waiting = (stages - 1) * rows * TENSORS_LOADED * 2 * 512  # bytes
        fits = values <= 16 and programs * (waiting + OTHER_BYTES) <= SHARED_BYTES
        # Below 8, loads are shorter than 16 bytes: tried once.
        worth = values >= 8 or (values == 4 and stages == 1)
        if fits and worth and programs * rows >= 4 and 4 <= programs * warps <= 32:
            yield Tiling(rows, warps, stages, programs)


class Problem(NamedTuple):
    """Inputs of both passes, with a skip or without one."""

    x_MD: Tensor
    f_MD: Tensor
    scale: float
    mixing: Mixing
    upstream: tuple[Tensor, Tensor]
    running_MD: Tensor  # the embedding's gradient by the layers behind this one

    def to(self, dtype: torch.dtype) -> Problem:
        mixing = Mixing(*(None if t is None else t.to(dtype) for t in self.mixing))
        dy, dn = self.upstream
        return Problem(self.x_MD.to(dtype), self.f_MD.to(dtype), self.scale, mixing,
                       (dy.to(dtype), dn.to(dtype)), self.running_MD.to(dtype))  # fmt: skip


def problem(rows: int, width: int, device: torch.device, skip: bool) -> Problem:
    """Random values that bfloat16 holds, in float32."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16().float()

    x, f, e, dy, dn, running = (normal(rows, width) for _ in range(6))
    keep, share = 1 + normal(width) / 8, normal(width) / 8
    of_skip = (normal(width), normal(rows, width)) if skip else ()
    mixing = Mixing(keep.bfloat16().float(), share, e, *of_skip)
    return Problem(x, f, 0.5, mixing, (dy, dn), running)


def both_passes(forward: Pass, backward: Pass, given: Problem, stored: bool) -> tuple[Tensor, ...]:
    """Outputs and gradients; what is stored is what backward reads."""
    x, f, scale, mixing, upstream, running = given
    outputs = forward(x, f, scale, mixing, stored)
    stream = outputs[2:] if stored else (x, f)
    return (*outputs, *backward(upstream, stream, scale, mixing, running.clone()))


def microseconds(
    forward: Pass, backward: Pass, given: Problem, stored: bool, on_cuda: bool
) -> list[float]:
    """Of forward and of backward."""
    x, f, scale, mixing, upstream, running = given
    stream = (x,) if stored else (x, f)  # values do not matter here
    passes = (
        functools.partial(forward, x, f, scale, mixing, stored),
        functools.partial(backward, upstream, stream, scale, mixing, running.clone()),
    )
    return [1e3 * timing.milliseconds(run, on_cuda, repeats=30) for run in passes]


def roofline(given: Problem, stored: bool) -> list[float]:
    """Microseconds of forward and of backward that moving the tensors of M rows takes."""
    skip = given.mixing.has_skip
    forward = 5 + stored + skip  # x, f, e, y, n
    backward = 8 - stored + 2 * skip  # dy, dn, x, f, e, dz, and de twice; z stands for x and f
    tensor = given.x_MD.numel() * given.x_MD.element_size()
    return [1e6 * count * tensor / BYTES_PER_SECOND for count in (forward, backward)]


def line(*cells: object) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def measured(
    forward: Pass, backward: Pass, given: list[Problem], exact: tuple[Tensor, ...],
    stored: bool,
) -> list[str]:  # fmt: skip
    """The cells of a row from its times on; `given` is without and with a skip."""
    on_cuda = exact[0].is_cuda
    try:
        error = tg.largest_error(both_passes(forward, backward, given[1], stored), exact)
        times = [microseconds(forward, backward, each, stored, on_cuda) for each in given]
    except Exception as fault:  # a tiling that does not fit is a row as well
        why = f"{type(fault).__name__}: {fault}".splitlines()[0][:80].replace("|", "/")
        return ["refused", why, "", "", ""]
    return [f"{us:.0f}" for us in itertools.chain(*times)] + [f"{error:.1e}"]


def measure(
    h: tg.Hyperparameters, runtime: tg.Runtime, stored: bool, tried: list[Tiling]
) -> Iterator[str]:
    """The lines of the table."""
    wide = [
        problem(h.micro_batch_tokens, h.model_dim, runtime.device, skip) for skip in (False, True)
    ]
    exact = both_passes(plain_forward, plain_backward, wide[1], stored)
    given = [each.to(runtime.dtype) for each in wide]
    yield line("rows", "warps", "stages", "programs an SM", "forward", "backward",
               "forward, skip", "backward, skip", "error")  # fmt: skip
    yield line(*["---:"] * 9)
    bounds = itertools.chain(*(roofline(each, stored) for each in given))
    yield line("roofline", "", "", "", *(f"{us:.0f}" for us in bounds), "")
    compiled = runtime.compile(plain_forward), runtime.compile(plain_backward)
    yield line("compiled", "", "", "", *measured(*compiled, given, exact, stored))
    for tiling in tried:
        fused = [functools.partial(f, tiling=tiling) for f in (fused_forward, fused_backward)]
        yield line(*tiling, *measured(*fused, given, exact, stored))


def main(stream: str) -> None:
    tg.require(torch.cuda.is_available(), "no GPU: there is nothing to time")
    h = tg.Hyperparameters.from_env(os.environ)
    runtime = tg.Runtime.start(h, {})
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, z is {stream}, us\n")
    for text in measure(h, runtime, stream == "stored", list(tilings())):
        print(text, flush=True)


if __name__ == "__main__":
    try:
        chosen = sys.argv[1] if len(sys.argv) > 1 else STREAMS[0]
        tg.require(chosen in STREAMS, f"STREAM={chosen}: expected {' or '.join(STREAMS)}")
        main(chosen)
    except tg.RunError as error:
        sys.exit(f"error: {error}")
