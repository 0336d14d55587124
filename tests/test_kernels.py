"""The Triton kernels against their plain-torch twins; without a GPU Triton interprets them."""

import os
import re
import subprocess
import sys
import types
from collections.abc import Callable

import pytest
import support  # sets TRITON_INTERPRET where there is no GPU
import torch
from torch import Tensor

import train_gpt as tg

triton = pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
if not CUDA and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    pytest.skip("Triton before 3.7 does not interpret loops", allow_module_level=True)
sys.path.insert(0, str(support.REPO / "bench"))
import products  # noqa: E402

DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
TOLERANCE = 1e-2 if CUDA else 1e-5  # of the norm


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(DEVICE, DTYPE) for s in shapes]


def outputs_and_gradients(function: Callable[..., Tensor], arguments: list[Tensor]) -> list[Tensor]:
    leaves = [a.detach().requires_grad_() for a in arguments]
    y = function(*leaves)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def compare(
    names: str, fused: Callable[..., Tensor], plain: Callable[..., Tensor], arguments: list[Tensor]
) -> None:
    """The output and the gradients of two functions, by the norm of their difference."""
    results = (outputs_and_gradients(function, arguments) for function in (fused, plain))
    for name, a, b in zip(names.split(), *results, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert float((a.float() - b.float()).norm() / b.float().norm()) < TOLERANCE, name


# The last two leave partial tiles in rows, columns and depth.
@pytest.mark.parametrize("rows, width, hidden", [(256, 128, 384), (90, 72, 200), (300, 128, 352)])
def test_fused_mlp_agrees_with_its_twin(rows: int, width: int, hidden: int) -> None:
    x, up, down = tensors((2, rows // 2, width), (hidden, width), (hidden, width))
    size = torch.linspace(0.2, 5.0, rows).to(x).view(2, rows // 2, 1)  # every row its own norm
    for s in ((1.0, 0.0), (0.3, 0.5), (1.0, 0.9)):  # scale, slope
        compare("y dx dup ddown", lambda *t, s=s: tg.FusedMLP.apply(*t, *s),
                lambda *t, s=s: tg.relu2_mlp(*t, *s), [x * size, up, down])  # fmt: skip


def test_fused_heads_agree_with_their_twin() -> None:
    rows, length, width, count, kv_heads = 2, 64, 128, 4, 2
    x, w = tensors((rows, length, width), (width + 2 * kv_heads * 32, width))
    gain = tensors((count,))[0].abs() + 0.5
    rotary = tg.rotary_table(length, 8, 1e4, x.device)

    def flat(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
        return lambda *leaves: torch.cat([y.flatten() for y in function(*leaves, rotary)])

    compare("qkv dx dw dgain", flat(tg.FusedHeads.apply), flat(tg.project_heads), [x, w, gain])


def turned_heads(
    qkv_MC: Tensor, gain_H: Tensor, length: int, kv_heads: int, rotated: int, base: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (M, heads, E) by complex rotation of one pair of dims at a time, in float64."""
    heads, half = len(gain_H), rotated // 2
    x = qkv_MC.unflatten(1, (heads + 2 * kv_heads, -1))
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    position = torch.arange(len(x), device=x.device).double() % length
    turned = list(normed.unbind(-1))
    for j in range(half):
        angle = position[:, None] * base ** (-2 * j / rotated)
        pair = torch.complex(normed[..., j], normed[..., half + j])
        pair = pair * torch.polar(torch.ones_like(angle), angle)
        turned[j], turned[half + j] = pair.real, pair.imag
    y = torch.stack(turned, -1)
    q = y[:, :heads] * gain_H[:, None]
    return q, y[:, heads : heads + kv_heads], x[:, heads + kv_heads :]


HEADS, KV_HEADS, WIDTH, LENGTH, ROTATED = 4, 2, 32, 64, 8


def heads_arguments() -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(projections of two sequences and gain, gradients of q, k and v, rotary table)."""
    tokens = 2 * LENGTH
    qkv, dq, dk, dv, gain = tensors(
        (tokens, (HEADS + 2 * KV_HEADS) * WIDTH), (tokens, HEADS, WIDTH),
        (tokens, KV_HEADS, WIDTH), (tokens, KV_HEADS, WIDTH), (HEADS,))  # fmt: skip
    rotary = tg.rotary_table(LENGTH, ROTATED, 1e4, qkv.device)
    return [qkv, gain.abs() + 0.5], [dq, dk, dv], rotary


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    difference = (found.double() - expected).norm() / expected.norm()
    assert float(difference) < TOLERANCE


def test_norm_rotate_equals_complex_rotation_of_pairs() -> None:
    arguments, _, rotary = heads_arguments()
    q, k = tg.norm_rotate(*arguments, rotary, WIDTH)
    qkv, gain = (a.double() for a in arguments)
    q_expected, k_expected, _ = turned_heads(qkv, gain, LENGTH, KV_HEADS, ROTATED, 1e4)
    assert_near(q, q_expected.flatten(1))
    assert_near(k, k_expected.flatten(1))


def test_norm_rotate_backward_equals_float64_autograd() -> None:
    arguments, upstream, rotary = heads_arguments()
    dqkv, parts = tg.norm_rotate_backward(*arguments, rotary, WIDTH, *upstream)
    qkv, gain = (a.double().requires_grad_() for a in arguments)
    outputs = turned_heads(qkv, gain, LENGTH, KV_HEADS, ROTATED, 1e4)
    expected = torch.autograd.grad(outputs, (qkv, gain), [d.double() for d in upstream])
    assert dqkv.dtype == arguments[0].dtype
    assert_near(dqkv, expected[0])
    assert_near(parts.double().sum(0), expected[1])


def test_norm_rotate_backward_hands_values_gradient_through() -> None:
    arguments, upstream, rotary = heads_arguments()
    dqkv, _ = tg.norm_rotate_backward(*arguments, rotary, WIDTH, *upstream)
    assert torch.equal(dqkv[:, -KV_HEADS * WIDTH :], upstream[2].flatten(1))


def test_each_part_of_the_gain_gradient_is_of_its_own_tokens() -> None:
    arguments, (dq, dk, dv), rotary = heads_arguments()
    whole = tg.norm_rotate_backward(*arguments, rotary, WIDTH, dq, dk, dv)[1]
    assert whole.shape == (2 * LENGTH // tg.HEAD_ROWS, HEADS)
    only = torch.zeros_like(dq)
    only[3 * tg.HEAD_ROWS : 4 * tg.HEAD_ROWS] = dq[3 * tg.HEAD_ROWS : 4 * tg.HEAD_ROWS]
    parts = tg.norm_rotate_backward(*arguments, rotary, WIDTH, only, dk, dv)[1]
    assert torch.equal(parts[3], whole[3]) and bool(whole[3].all())
    parts[3] = 0
    assert not parts.any()


CAP = tg.Softcap(30.0, 0.0, 30.0)


def loss_arguments(rows: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, a table that makes some tokens likely, and targets, the first and last token first."""
    x, table = tensors((rows, width), (vocabulary, width))
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(2))
    targets[:2] = torch.tensor([0, vocabulary - 1])[:rows]
    return x, table * (3 * width**-0.5), targets.to(DEVICE)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("vocabulary", [2, 64, 1000, 2049])  # two no power of 2, one of many warps
def test_fused_loss_agrees_with_its_twin(rows: int, vocabulary: int) -> None:
    """The upstream gradient is a random number, as it is where a step has micro-batches."""
    x, table, targets = loss_arguments(rows * 20, 16, vocabulary)
    x, targets = x.view(rows, 20, 16), targets.view(rows, 20)
    for softcap in (CAP, tg.Softcap(2.0, 0.5, 3.0)):
        compare("loss dx dtable", lambda *t, s=softcap: tg.FusedLoss.apply(*t, targets, s),
                lambda *t, s=softcap: tg.mean_token_loss(*t, targets, s), [x, table])  # fmt: skip


@pytest.mark.parametrize("softcap", [CAP, (2.0, 0.0, 2.0), (2.0, 0.5, 3.0), (2.0, -0.5, 1.5)])
def test_softcap_loss_equals_float64_autograd(softcap: tuple[float, float, float]) -> None:
    x, table, targets = loss_arguments(50, 16, 300)
    losses, dx, dtable = tg.softcap_loss(x, table, targets, *softcap)
    leaves = [t.double().requires_grad_() for t in (x, table)]
    height, shift, width = softcap
    likelihood = (height * torch.tanh((leaves[0] @ leaves[1].T + shift) / width)).exp()
    expected = (likelihood.sum(1) / likelihood[torch.arange(50), targets]).log()
    assert losses.dtype == torch.float32 and (dx.dtype, dtable.dtype) == (x.dtype, table.dtype)
    assert_near(losses, expected.detach())
    dx_expected, dtable_expected = torch.autograd.grad(expected.mean(), leaves)
    assert_near(dx, dx_expected)
    assert_near(dtable, dtable_expected)


def test_the_fused_loss_in_bfloat16_has_only_its_error() -> None:
    """Of a model on a GPU; the bound is a tenth of the one that refuses the kernel."""
    x, table, targets = loss_arguments(256, 32, 1000)
    x, targets = x.view(4, 64, 32), targets.view(4, 64)
    error = tg.twin_error(lambda *t: tg.FusedLoss.apply(*t, targets, CAP),
                          lambda *t: tg.mean_token_loss(*t, targets, CAP), [x, table])  # fmt: skip
    assert 1e-4 < error < 1e-2


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_logits_far_beyond_the_softcap_lose_nothing_but_their_gradient() -> None:
    """exp overflows or vanishes there."""
    table = torch.tensor([[1e4], [-1e4], [0.0], [0.0]], device=DEVICE, dtype=DTYPE)
    x = torch.ones(4, 1, device=DEVICE, dtype=DTYPE)
    losses, dx, dtable = tg.softcap_loss(x, table, torch.arange(4, device=DEVICE), *CAP)
    torch.testing.assert_close(losses.cpu(), torch.tensor([0.0, 60.0, 30.0, 30.0]))
    assert not dx.any() and not dtable[:2].any()
    torch.testing.assert_close(dtable[2:].float().cpu(), torch.full((2, 1), -0.25))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_that_is_no_number_spoils_the_loss_of_no_other() -> None:
    x, table, targets = loss_arguments(8, 16, 40)
    x[3, 5] = float("nan")
    losses, dx, _ = tg.softcap_loss(x, table, targets, *CAP)
    assert losses.isnan().nonzero().tolist() == [[3]]
    assert dx.isnan().any(1).nonzero().tolist() == [[3]]


@pytest.mark.parametrize("seq_len", [16, 32])
def test_a_compiled_step_takes_the_fused_loss(seq_len: int) -> None:
    """In one graph, with the loss and the gradients of the plain one."""
    h = support.tiny(vocab_size=72)
    tokens = torch.randint(72, (2, 33), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    runtime = tg.Runtime(torch.device(DEVICE), compile_backend="aot_eager")
    results = []
    for kernels in (tg.Kernels(mean_loss=tg.FusedLoss.apply), tg.Kernels()):
        model = tg.load_model(h, runtime, support.tiny_weights(h), kernels)
        loss = runtime.compile(tg.loss_share)(model, tokens, 0.5, seq_len)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_the_lowest_bit_of_the_square_tells_its_side(slope: float) -> None:
    a, b = tensors((64, 32), (48, 32))
    ones, x = torch.ones(64, device=DEVICE), (a @ b.T).float()
    post = tg.linear_relu2(a, b, ones, slope)
    grad = tg.linear_relu2(a, b, ones, slope, post).float()  # x times the derivative at x
    integers = post.view(torch.int16 if CUDA else torch.int32)
    for side, factor in ((x < -0.1, slope), (x > 0.1, 1.0)):
        assert 0.2 < float(side.float().mean()) < 0.8
        assert bool(((integers[side] & 1) == int(factor == 1.0)).all())
        square = (factor * x[side]).square()
        torch.testing.assert_close(post[side].float(), square, rtol=2e-2, atol=0)
        torch.testing.assert_close(grad[side], 2 * square, rtol=3e-2, atol=0)
    # Positive squares are not rounded one way.
    bias = (post[x > 0.1].float() / x[x > 0.1].square()).log().mean()
    assert abs(float(bias)) < (2e-3 if CUDA else 1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_product_that_is_no_number_stays_none(sign: float) -> None:
    a, b = tensors((64, 32), (48, 32))
    a[3] = sign * float("nan")
    a[5, 0] = sign * float("inf")
    post = tg.linear_relu2(a, b, torch.ones(64, device=DEVICE), 0.5)
    assert not bool(post[[3, 5]].isfinite().any())
    assert bool(post[[2, 4, 6]].isfinite().all())


ROWS = 40 if torch.cuda.is_available() else 12  # the interpreter takes 20 ms for each


def rows_of(width: int, size: float = 0.05, seed: int = 0) -> Tensor:
    """(3, ROWS, width) float32 rows that differ in spread; one of zeros, one with an outlier."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(3, ROWS, width, generator=generator)
    w *= size * torch.logspace(-1, 1, ROWS)[:, None]
    w[0, 3] = 0
    w[1, 5, width // 2] = 500 * size
    return w.to(DEVICE)


# The matrices differ in largest code and in floor; the third has no floor but the smallest scale.
MIXED = tg.Grid((31, 127, 31), (1.0, 0.7, 0.0))


def grid_of(step: float) -> tuple[Tensor, Tensor, Tensor]:
    """What `round_rows` and its twin take after the weights."""
    device = torch.device(DEVICE)
    return torch.tensor(step, device=device), *MIXED.tensors(device)


def assert_same_rows(found: Tensor, expected: Tensor) -> None:
    """In bits, the sign of zero included; but of 1000 rows, one may be a near tie of two clips."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    differ = (found.view(torch.int32) != expected.view(torch.int32)).any(-1)
    assert int(differ.sum()) <= differ.numel() // 1000


@pytest.mark.parametrize("width", [1, 24, 300, 512, 1408])
@pytest.mark.parametrize("step", [0.0, 1e-9, 1e-3, 0.02, 0.5, 1e4])
def test_round_rows_writes_the_bits_of_its_twin(width: int, step: float) -> None:
    w, grid = rows_of(width), grid_of(step)
    found = tg.round_rows(w, *grid)
    assert_same_rows(found, tg.fake_quantize(w, *grid))
    assert torch.equal(w, rows_of(width)), "the masters stay"


@pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-6, 300.0, 1e12])
def test_round_rows_takes_weights_of_any_size(size: float) -> None:
    w = rows_of(96, size)
    for step in (0.0, size / 10, size):
        found = tg.round_rows(w, *grid_of(step))
        assert_same_rows(found, tg.fake_quantize(w, *grid_of(step)))
        assert bool(found.isfinite().all())


def test_round_rows_takes_every_clip() -> None:
    """The more outliers a row has, the more of its largest magnitude is kept."""
    generator = torch.Generator().manual_seed(1)
    outliers = (1, 2, 4, 8, 200)
    w = 1.1 * torch.rand(1, len(outliers), 8192, generator=generator) - 0.55
    for row, count in enumerate(outliers):
        w[0, row, :count] = 1.0
    w = w.to(DEVICE)
    step, (qmax, ratio) = (
        torch.tensor(1e-3, device=DEVICE),
        tg.Grid((31,), (1.0,)).tensors(w.device),
    )
    found = tg.round_rows(w, step, qmax, ratio)
    kept = found.abs().amax(-1)[0].tolist()
    assert kept == pytest.approx(sorted(tg.CLIP_RATIOS), rel=1e-4)
    assert torch.equal(found, tg.fake_quantize(w, step, qmax, ratio))


def test_round_rows_rounds_halves_to_even() -> None:
    halves = torch.arange(-31, 31, device=DEVICE) + 0.5
    w = torch.cat([halves, torch.tensor([31.0, -0.25], device=DEVICE)]).expand(3, 4, -1)
    found = tg.round_rows(w, *grid_of(1.0))[0, 0]
    assert torch.equal(found[:62], halves.round()) and found[62:].tolist() == [31.0, 0.0]
    assert not bool(torch.signbit(found[found == 0]).any())  # an int8 code has no -0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("step", [1e-3, 1e4])  # the range decides the scale, the floor does
def test_a_master_that_is_no_number_is_not_rounded_to_one(step: float, value: float) -> None:
    w = rows_of(96)
    w[1, 7, 11] = value
    found = tg.round_rows(w, *grid_of(step))
    assert not bool(found[1, 7, 11].isfinite())
    w[1, 7], found[1, 7] = 0, 0
    assert torch.equal(found, tg.fake_quantize(w, *grid_of(step)))


@pytest.mark.parametrize("step", [0.0, 1e-3, 0.02, 0.5])
def test_what_round_rows_wrote_comes_back_from_quantize(step: float) -> None:
    for seed in range(4):
        grid = grid_of(step)
        once = tg.round_rows(rows_of(384, seed=seed), *grid)
        assert torch.equal(tg.dequantize(*tg.quantize(once, *grid)), once)
        assert torch.equal(tg.round_rows(once, *grid), once)


def test_a_shard_is_rounded_as_in_the_whole() -> None:
    """Its matrices, with padding behind them."""
    w, (step, *grid) = rows_of(300), grid_of(0.02)
    whole = tg.round_rows(w, step, *grid)
    second = MIXED.shard(1, 2).tensors(w.device)
    mine = torch.cat([w[2:], torch.zeros_like(w[:1])])
    found = tg.round_rows(mine, step, *second)
    assert torch.equal(found[0], whole[2]) and not bool(found[1].any())


def test_late_qat_rounds_with_the_kernel_that_it_is_given() -> None:
    h = support.tiny()
    kernels = tg.Kernels(support.plain_attention, round=tg.round_rows)
    weights = {name: w.to(DEVICE) for name, w in support.tiny_weights(h).items()}
    runtime = tg.Runtime(torch.device(DEVICE))
    optimizers = [
        tg.Optimizer(tg.GPT(h, weights, k), h, runtime) for k in (kernels, tg.Kernels(round=None))
    ]
    results = []
    for optimizer in optimizers:
        optimizer.start_late_qat(9_000)
        results.append(optimizer.late_qat.rounded(optimizer.masters()))
    assert optimizers[0].late_qat.round is tg.round_rows
    for name, w in results[0].items():
        assert w.shape == results[1][name].shape
        assert torch.equal(w, results[1][name]), name


def test_the_operators_tell_the_compiler_what_they_do() -> None:
    a, b, post = tensors((64, 32), (48, 32), (64, 48))
    scale = torch.rand(64, device=DEVICE)
    torch.library.opcheck(tg.linear_relu2, (a, b, scale, 0.5))
    torch.library.opcheck(tg.linear_relu2, (a, b, scale, 0.5, post.square()))
    qkv, dq, dk, dv, gain = tensors((64, 128), (64, 64), (64, 32), (64, 32), (2,))
    rotary = tg.rotary_table(32, 8, 1e4, qkv.device)
    torch.library.opcheck(tg.norm_rotate, (qkv, gain, rotary, 32))
    torch.library.opcheck(tg.norm_rotate_backward, (qkv, gain, rotary, 32, dq, dk, dv))
    x, table, targets = loss_arguments(12, 16, 40)
    torch.library.opcheck(tg.softcap_loss, (x, table, targets, *CAP))


def test_on_a_cpu_plain_layers_are_chosen_and_logged() -> None:
    """With the reason."""
    lines: list[str] = []
    kernels = tg.choose_kernels(support.tiny(), support.cpu_runtime(), lines.append)  # type: ignore[arg-type]
    assert kernels[1:] == (tg.project_heads, tg.relu2_mlp, tg.mean_token_loss, None)
    assert any("plain layers" in line and "CPU" in line for line in lines)


@pytest.mark.parametrize(
    ("capability", "changes", "run"),
    [
        ((9, 0), {}, True),
        ((10, 0), {}, True),
        ((8, 9), {}, False),
        ((9, 0), dict(mlp_hidden=44), False),
        ((9, 0), dict(model_dim=36, num_heads=9, num_kv_heads=3), False),  # heads of 4
        ((9, 0), dict(model_dim=48), False),  # heads of 12
        ((9, 0), dict(train_seq_len=24, train_batch_tokens=240), False),
        ((9, 0), dict(train_seq_len=48, train_batch_tokens=240), True),
        ((9, 0), dict(early_seq_len=8), False),
        ((9, 0), dict(early_seq_len=16), True),
        ((9, 0), dict(early_seq_len=8, early_fraction=0), True),  # no sequence is that short
    ],
)
def test_fused_layers_run_on_hopper_with_sizes_that_they_take(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], changes: dict[str, int], run: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(tg, "fused_error", lambda *_: 0.004)  # as on an H100
    lines: list[str] = []
    h = support.tiny(**changes)
    assert tg.fused_layers_run(h, torch.device("cuda"), lines.append) is run  # type: ignore[arg-type]


def test_flash_attention_3_comes_first_and_is_causal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it imports."""
    assert list(tg.attention_candidates()) == ["cudnn", "flash"]
    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_func = lambda q, k, v, causal=False: (q, causal)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    found = tg.attention_candidates()
    assert list(found) == ["fa3", "cudnn", "flash"]
    q, k, v = tensors(*[(1, 4, 2, 8)] * 3)
    assert found["fa3"](q, k, v)[1] is True


def test_on_cuda_the_first_attention_that_is_correct_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("No available kernel")

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return tg.sdpa()(q, k, v) * 1.05

    h, lines, right = support.tiny(), list[str](), tg.sdpa()
    error, cpu = tg.attention_error, torch.device("cpu")
    monkeypatch.setattr(tg, "attention_error", lambda h, f, device: error(h, f, cpu))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    runtime = tg.Runtime(torch.device("cuda"))
    found = {"refused": refuse, "wrong": wrong, "right": right, "next": tg.sdpa()}
    monkeypatch.setattr(tg, "attention_candidates", lambda: found)
    kernels = tg.choose_kernels(h, runtime, lines.append)  # type: ignore[arg-type]
    assert kernels == tg.Kernels(right)
    assert "refused (RuntimeError: No available kernel)" in lines[0]
    assert "refused (RunError: relative error" in lines[1]
    assert re.fullmatch(r"attention:right relative_error:\S+, plain layers", lines[2])
    assert len(lines) == 3  # `next` was not tried
    del found["right"], found["next"]
    with pytest.raises(tg.RunError, match="no kernel is correct.*DEVICE=cpu"):
        tg.choose_kernels(h, runtime, lines.append)  # type: ignore[arg-type]


COMPILE_FOR_HOPPER = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import train_gpt as tg

def report(kernel, signature, constants, **options):
    signature = dict.fromkeys(kernel.arg_names, "*bf16") | signature
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    binary = compile(source, GPUTarget("cuda", 90, 32), options)
    ptx = binary.asm["ptx"]
    if kernel is tg.round_rows_kernel:  # every division is exact, and nothing is fused into one
        assert "div.rn.f32" in ptx and "div.full" not in ptx
        assert "fma.rn.f32" not in ptx  # those of log2 flush denormals: fma.rn.ftz
    print(kernel.__name__, binary.metadata.shared, "wgmma.mma_async" in ptx)

m, n, k = tg.RELU2_TILING[:3]
blocks = {"a_desc": (m, k), "b_desc": (n, k), "post_desc": (m, n // 4), "out_desc": (m, n // 4)}
products = {name: f"tensordesc<bf16[{r}, {c}]>" for name, (r, c) in blocks.items()}
losses = {"targets": "*i64", "losses": "*fp32"}
heads = dict(HALF=16, HEADS=4, KV_HEADS=2, WIDTH=128, ROWS=tg.HEAD_ROWS)
for BACKWARD in (False, True):
    report(tg.linear_relu2_kernel, products | {"scales": "*fp32"},
           dict(SLOPE=0.5, BACKWARD=BACKWARD), num_warps=8, num_stages=4)
    report(tg.heads_kernel, {"rotary": "*fp32", "dgain": "*fp32" if BACKWARD else "*bf16",
                             "T": "i32"}, heads | dict(BACKWARD=BACKWARD))
for V, BLOCK in ((1000, 1024), (8192, 8192)):
    report(tg.softcap_loss_kernel, losses,
           dict(HEIGHT=11.5, SHIFT=5.0, WIDTH=15.0, V=V, BLOCK=BLOCK),
           num_warps=BLOCK // (32 * tg.LOSS_VALUES), maxnreg=tg.LOSS_REGISTERS)
rows = dict.fromkeys(tg.round_rows_kernel.arg_names, "*fp32")
rows |= {"price_of_square": "fp32", "ROWS": "i32"}
for width, block, warps in ((512, 512, 1), (1408, 2048, 4)):
    report(tg.round_rows_kernel, rows, dict(WIDTH=width, BLOCK=block, CLIPS=tg.CLIP_RATIOS),
           num_warps=warps, enable_fp_fusion=False)
"""


def test_the_kernels_compile_and_fit_a_hopper_gpus_memory() -> None:
    path = os.pathsep.join([str(support.REPO), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)  # the interpreter accepts what the compiler refuses
    done = subprocess.run([sys.executable, "-c", COMPILE_FOR_HOPPER], env=environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    names = ["linear_relu2_kernel", "heads_kernel"] * 2
    names += ["softcap_loss_kernel"] * 2 + ["round_rows_kernel"] * 2
    assert [name for name, *_ in lines] == names
    for name, shared, tensor_cores in lines:
        assert int(shared) <= 232_448
        assert (tensor_cores == "True") == (name == "linear_relu2_kernel")


@pytest.mark.parametrize("tiling", products.TILINGS, ids=lambda t: "x".join(map(str, t)))
def test_any_tiling_of_the_products_gives_the_result_of_the_chosen_one(
    tiling: tg.Tiling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and columns leave partial tiles."""
    a, b = tensors((300, 128), (200, 128))
    scale = torch.linspace(0.5, 2.0, 300, device=DEVICE)
    post = tg.linear_relu2(a, b, scale, 0.5)
    du = tg.linear_relu2(a, b, scale, 0.5, post)
    monkeypatch.setattr(tg, "RELU2_TILING", tiling)
    assert_near(tg.linear_relu2(a, b, scale, 0.5), post)
    assert_near(tg.linear_relu2(a, b, scale, 0.5, post), du)


def test_the_tilings_fit_a_processor_of_an_h100() -> None:
    assert products.TILINGS[0] == tg.RELU2_TILING
    for tiling in products.TILINGS:
        needed = tiling.programs * products.shared_bytes(tiling)
        assert needed <= products.SHARED_BYTES, tiling
        assert tiling.programs * 32 * tiling.warps <= 2048


def test_without_a_gpu_the_products_end_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in support.refusal(products.main)
