"""Claims about bench/residual.py: its kernels equal their plain twins, and what its table says."""

import dataclasses
import re
import sys

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
import residual  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
ROWS, WIDTH = 37, 64  # rows: a multiple of no tile
TILINGS = [residual.Tiling(1, 1, 1, 4), residual.Tiling(2, 2, 3, 2), residual.Tiling(8, 8, 1, 1)]


@pytest.fixture(autouse=True)
def few_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every program takes more than one turn."""
    monkeypatch.setattr(tg, "SM_COUNT", 3)


def fused(tiling: residual.Tiling) -> tuple[residual.Pass, residual.Pass]:
    return (
        lambda *arguments: residual.fused_forward(*arguments, tiling),
        lambda *arguments: residual.fused_backward(*arguments, tiling=tiling),
    )


def near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, i
        assert torch.linalg.norm(a.double() - b) < tolerance * torch.linalg.norm(b.double()), i


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("tiling", TILINGS, ids=lambda t: "x".join(map(str, t)))
def test_the_kernels_agree_with_their_twins(
    tiling: residual.Tiling, stored: bool, skip: bool
) -> None:
    """With a running gradient; backward reads the stream that forward has stored, or x and f."""
    given = residual.problem(ROWS, WIDTH, DEVICE, skip)
    plain = (residual.plain_forward, residual.plain_backward)
    found, expected = (
        residual.both_passes(*passes, given, stored) for passes in (fused(tiling), plain)
    )
    assert len(found) == 2 + stored + 4 + 2 * skip
    near(found, expected, 2e-6)


def test_twins_in_float32_equal_float64_autograd_by_hand() -> None:
    """Every gradient of the function that maps x, f and what is mixed to y and n."""
    given = residual.problem(ROWS, WIDTH, DEVICE, skip=True)
    leaves = [t.double().requires_grad_() for t in (given.x_MD, given.f_MD, *given.mixing)]
    x, f, keep, mix, e, w, s = leaves
    y = keep * (x + f + w * s) + mix * e
    n = given.scale * y / (y.square().mean(1, keepdim=True) + 1e-6).sqrt()
    dx, df, dkeep, dmix, de, dw, ds = torch.autograd.grad(
        (y, n), leaves, [t.double() for t in given.upstream]
    )
    assert torch.equal(dx, df)
    expected = (y.detach(), n.detach(), dx, dkeep, dmix, given.running_MD + de, dw, ds)
    for passes in ((residual.plain_forward, residual.plain_backward), fused(TILINGS[1])):
        near(residual.both_passes(*passes, given, False), expected, 2e-6)


@pytest.mark.parametrize("skip", [False, True])
def test_the_twin_is_what_the_model_does_between_layers(skip: bool) -> None:
    h = support.tiny()
    model = support.tiny_model(h)
    layer = next(each for each in model.plan if (each.skip is not None) == skip)
    z, e, s = (support.normal(2, 8, h.model_dim, seed=seed) for seed in range(3))
    shared = model.shared(torch.zeros(2, 8, dtype=torch.long))._replace(embedded_BTD=e)
    expected = model.mix_in(z, layer, shared, [s])
    of_skip = (model.skip_weight[layer.skip], s) if skip else ()
    keep, mix = model.resid_mix[layer.number]
    y, n = residual.mix(z, layer.depth_scale, keep, mix, e, *of_skip)
    assert torch.equal(y, expected)
    assert torch.equal(n, tg.rms_norm(expected) * layer.depth_scale)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_in_bfloat16_the_kernels_have_only_its_error(stored: bool, skip: bool) -> None:
    wide = residual.problem(ROWS, WIDTH, DEVICE, skip)
    exact = residual.both_passes(residual.plain_forward, residual.plain_backward, wide, stored)
    narrow = wide.to(torch.bfloat16)
    found = residual.both_passes(*fused(TILINGS[1]), narrow, stored)
    assert all(t.dtype == torch.bfloat16 for t in found)
    assert 1e-4 < tg.largest_error(found, exact) < 6e-3


def test_the_running_gradient_is_added_to_in_place_and_only_in_the_given_rows() -> None:
    given = residual.problem(ROWS, WIDTH, DEVICE, skip=False)
    x, f, scale, mixing, upstream, running = given
    for tiling in TILINGS:
        buffer = torch.cat([running, torch.full_like(running, 7.0)])
        arguments = (upstream, (x, f), scale, mixing)
        own = residual.fused_backward(*arguments, tiling=tiling)[3]
        de = residual.fused_backward(*arguments, buffer[:ROWS], tiling=tiling)[3]
        assert de.data_ptr() == buffer.data_ptr()
        torch.testing.assert_close(buffer[:ROWS], running + own, rtol=1e-6, atol=1e-6)
        assert bool((buffer[ROWS:] == 7).all())
        near((own,), (residual.plain_backward(*arguments)[3],), 2e-6)


def test_one_row_takes_one_program() -> None:
    given = residual.problem(1, WIDTH, DEVICE, skip=True)
    found = residual.both_passes(*fused(TILINGS[2]), given, True)
    plain = (residual.plain_forward, residual.plain_backward)
    near(found, residual.both_passes(*plain, given, True), 2e-6)
    assert residual.programs_of(TILINGS[2], 1) == 1


def test_more_programs_than_turns_are_not_started() -> None:
    tiling = residual.Tiling(4, 4, 1, 2)
    assert [residual.programs_of(tiling, rows) for rows in (3, 4, 5, 24, 1000)] == [1, 1, 2, 6, 6]


@pytest.mark.parametrize("stored", [False, True])
def test_the_twins_compile_to_one_graph(stored: bool) -> None:
    runtime = dataclasses.replace(tg.Runtime(DEVICE), compile_backend="aot_eager")
    given = residual.problem(ROWS, WIDTH, DEVICE, skip=True)
    plain = (residual.plain_forward, residual.plain_backward)
    compiled = tuple(runtime.compile(function) for function in plain)
    expected = residual.both_passes(*plain, given, stored)
    near(residual.both_passes(*compiled, given, stored), expected, 1e-6)


@pytest.mark.parametrize("stored", [False, True])
def test_the_table_has_a_row_for_each_way(stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A way that fails has one too."""
    calls = []

    def clock(function: residual.Pass, on_cuda: bool, repeats: int) -> float:
        function()
        calls.append(on_cuda)
        return len(calls) / 1e3

    monkeypatch.setattr(residual.timing, "milliseconds", clock)
    h = support.tiny(train_batch_tokens=64, micro_batch_tokens=64)
    runtime = tg.Runtime(DEVICE)
    tried = [TILINGS[2], residual.Tiling(3, 1, 1, 1)]  # 3 is no power of 2
    table = list(residual.measure(h, runtime, stored, tried))
    assert len({line.count("|") for line in table}) == 1
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [row[0] for row in rows] == ["rows", "---:", "roofline", "compiled", "8", "3"]
    assert rows[3][4:8] == ["1", "2", "3", "4"] and rows[4][4:8] == ["5", "6", "7", "8"]
    assert 0 <= float(rows[4][8]) < (2e-2 if CUDA else 1e-5)
    assert rows[5][:5] == ["3", "1", "1", "1", "refused"]


def test_the_roofline_counts_every_tensor_once() -> None:
    for skip, stored, forward, backward in (
        (False, True, 6, 7),  # x f | y n z;  dy dn z e de | dz de
        (True, True, 7, 9),
        (False, False, 5, 8),
        (True, False, 6, 10),
    ):
        given = residual.problem(ROWS, WIDTH, DEVICE, skip).to(torch.bfloat16)
        tensor = ROWS * WIDTH * 2 / 3.0e12 * 1e6
        assert residual.roofline(given, stored) == pytest.approx(
            [forward * tensor, backward * tensor]
        )


def test_nan_is_no_small_error() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert tg.largest_error((good, good), (good, good)) == 0
    assert not tg.largest_error((good, bad), (good, good)) < 1


def test_the_tilings_fit_a_processor_of_an_h100() -> None:
    tried = list(residual.tilings())
    assert len(set(tried)) == len(tried)
    assert {t.rows for t in tried} == {1, 2, 4, 8} and {2, 4, 8} <= {t.warps for t in tried}
    assert {1, 2, 4} <= {t.programs for t in tried}
    assert all(t.programs * 32 * t.warps <= 2048 for t in tried)


COMPILE_FOR_HOPPER = """
import re, subprocess, tempfile
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import residual

def report(kernel, tiling, **constants):
    constants |= dict(D=512, EPS=1e-6, ROWS=tiling.rows, STAGES=tiling.stages, SKIP=True)
    signature = dict.fromkeys(kernel.arg_names, "*bf16") | {"SCALE": "fp32", "M": "i32"}
    if "parts" in signature:
        signature["parts"] = "*fp32"
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]]
               for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*"}
    source = ASTSource(kernel, signature, constants, aligned)
    binary = compile(source, GPUTarget("cuda", 90, 32), dict(num_warps=tiling.warps))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
                               capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups()
    pipelined = "cp.async" in binary.asm["ptx"]
    print(kernel.__name__, tiling.stages, registers, stack, binary.metadata.shared, pipelined)

# Of the tilings, those with the most values in a thread.
for n in (1, 2, 4, 8):
    for stages in (1, 3):
        tiling = residual.Tiling(n, n, stages, 1)
        assert any(tiling[:3] == each[:3] for each in residual.tilings())
        report(residual.mix_kernel, tiling, STORE=True)
        report(residual.mix_backward_kernel, tiling, SUMMED=True, RUNNING=True)
"""


def test_the_kernels_compile_for_hopper_and_nothing_spills() -> None:
    """What spills is on the stack."""
    lines = support.printed_by_compiler(COMPILE_FOR_HOPPER, support.REPO / "bench")
    assert [name for name, *_ in lines] == ["mix_kernel", "mix_backward_kernel"] * 8
    for _, stages, registers, stack, shared, pipelined in lines:
        assert int(registers) < 255 and stack == "0" and int(shared) <= 232_448
        assert (pipelined == "True") == (stages == "3")


def test_without_a_gpu_it_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in support.refusal(residual.main, "stored")


def test_an_unknown_stream_is_one_line_that_says_what_is_expected() -> None:
    done = support.completed(support.REPO / "bench" / "residual.py", "both", OMP_NUM_THREADS=1)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch("error: STREAM=both: expected stored or summed", last)
