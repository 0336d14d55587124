"""The Triton kernels against their plain-torch twins; without a GPU Triton interprets them."""

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
