"""The Triton kernels against their plain-torch twins; without a GPU Triton interprets them."""

import importlib
import os
import subprocess
import sys
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


# The last two leave partial tiles in rows, columns and depth.
@pytest.mark.parametrize("rows, width, hidden", [(256, 128, 384), (90, 72, 200), (300, 128, 352)])
def test_fused_mlp_agrees_with_its_twin(rows: int, width: int, hidden: int) -> None:
    arguments = tensors((2, rows // 2, width), (hidden, width), (hidden, width))
    fused = outputs_and_gradients(tg.fused_mlp, arguments)
    plain = outputs_and_gradients(tg.relu2_mlp, arguments)
    for name, a, b in zip(("y", "dx", "dup", "ddown"), fused, plain, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert float((a.float() - b.float()).norm() / b.float().norm()) < TOLERANCE, name


def test_the_candidate_kernel_for_heads_agrees_with_project_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(support.REPO / "bench"))
    heads = importlib.import_module("heads")
    rows, length, width, count, kv_heads = 2, 64, 128, 4, 2
    x, w = tensors((rows, length, width), (width + 2 * kv_heads * 32, width))
    gain = tensors((count,))[0].abs() + 0.5
    rotary = tg.rotary_table(length, 8, 1e4, x.device)

    def flat(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
        return lambda *leaves: torch.cat([y.flatten() for y in function(*leaves, rotary)])

    fused = outputs_and_gradients(flat(heads.fused_heads), [x, w, gain])
    plain = outputs_and_gradients(flat(tg.project_heads), [x, w, gain])
    for name, a, b in zip(("qkv", "dx", "dw", "dgain"), fused, plain, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert float((a.float() - b.float()).norm() / b.float().norm()) < TOLERANCE, name


def test_a_negative_input_has_neither_output_nor_gradient() -> None:
    a, b = tensors((64, 32), (48, 32))
    post = tg.linear_relu2(a, b)
    slope = tg.linear_relu2(a, b, post)
    negative = a @ b.T < -0.1
    assert 0.2 < float(negative.float().mean()) < 0.8
    assert float(post[negative].abs().max()) == float(slope[negative].abs().max()) == 0.0
    assert float(post[a @ b.T > 0.1].min()) > 0


def test_the_operator_describes_itself_truthfully_to_the_compiler() -> None:
    a, b, post = tensors((64, 32), (48, 32), (64, 48))
    torch.library.opcheck(tg.linear_relu2, (a, b))
    torch.library.opcheck(tg.linear_relu2, (a, b, post.square()))


def test_on_a_cpu_the_plain_mlp_is_chosen_and_the_log_says_why() -> None:
    lines: list[str] = []
    kernels = tg.choose_kernels(support.tiny(), support.cpu_runtime(), lines.append)  # type: ignore[arg-type]
    assert kernels.mlp is tg.relu2_mlp
    assert any("mlp:plain" in line and "CPU" in line for line in lines)


COMPILE_FOR_HOPPER = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import train_gpt as tg

m, n, k = tg.RELU2_TILE
blocks = {"a_desc": (m, k), "b_desc": (n, k), "post_desc": (m, n // 4), "out_desc": (m, n // 4)}
signature = {name: f"tensordesc<bf16[{r}, {c}]>" for name, (r, c) in blocks.items()}
for backward in (False, True):
    source = ASTSource(tg.linear_relu2_kernel, {**signature, "BACKWARD": "constexpr"},
                       {"BACKWARD": backward})
    binary = compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 8, "num_stages": 4})
    print(binary.metadata.shared, "wgmma.mma_async" in binary.asm["ptx"], len(binary.asm["cubin"]))
"""


def test_the_kernel_compiles_for_a_hopper_gpu_and_fits_its_shared_memory() -> None:
    environment = {**os.environ, "PYTHONPATH": str(support.REPO)}
    environment.pop("TRITON_INTERPRET", None)  # the interpreter accepts what the compiler refuses
    done = subprocess.run([sys.executable, "-c", COMPILE_FOR_HOPPER], env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        shared, tensor_cores, size = line.split()
        assert 100_000 < int(shared) <= 232_448
        assert tensor_cores == "True" and int(size) > 1000
    assert len(done.stdout.splitlines()) == 2
