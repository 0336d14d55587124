"""Which layers a GPU gets: fused ones only where they ran and were right; if not, with a note."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import cpu_runtime, normal, tiny, train_gpt
from torch import Tensor

CUDA = torch.device("cuda")
PLAIN = train_gpt.Kernels(train_gpt.sdpa())[1:]
FUSED = (
    train_gpt.FusedHeads.apply,
    train_gpt.FusedMLP.apply,
    train_gpt.FusedLoss.apply,
    train_gpt.round_rows,
)
RIGHT = 3e-3  # what bfloat16 itself loses


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the capability of a GPU that is not there, and what the trial of the kernels gives."""

    def set_up(capability: tuple[int, int], error: float | Exception = RIGHT) -> None:
        def trial(*arguments: Any) -> float:
            if isinstance(error, Exception):
                raise error
            return error

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(train_gpt, "fused_error", trial)
        monkeypatch.setattr(train_gpt, "triton", train_gpt.triton or object())
        monkeypatch.setattr(train_gpt, "attention_error", lambda *arguments: RIGHT)

    return set_up


def chosen(**sizes: Any) -> tuple[Any, list[str]]:
    """The layers and the lines of the log."""
    lines: list[str] = []
    runtime = train_gpt.Runtime(CUDA)
    kernels = train_gpt.choose_kernels(tiny(**sizes), runtime, lines.append)  # type: ignore[arg-type]
    return kernels[1:], lines


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3), (12, 0), (12, 1)])
def test_fused_layers_that_are_right_are_chosen(
    capability: tuple[int, int], gpu: Callable[..., None]
) -> None:
    gpu(capability)
    layers, lines = chosen()
    assert layers == FUSED
    assert len(lines) == 1 and lines[0].endswith(", fused layers")


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9)])
def test_gpus_before_hopper_get_plain_layers_untried(
    capability: tuple[int, int], gpu: Callable[..., None]
) -> None:
    """A100, RTX 3090 and 4090."""
    gpu(capability, AssertionError("tried"))
    layers, lines = chosen()
    assert layers == PLAIN
    assert len(lines) == 1 and lines[0].endswith(", plain layers")


PROBLEMS = [
    RuntimeError("out of resource: shared memory, Required: 196608, Hardware limit: 101376"),
    NotImplementedError("tensor descriptors"),
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    ImportError("no compiler"),
    AssertionError(),
    KeyError("sm_120"),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: type(problem).__name__)
@pytest.mark.parametrize("capability", [(9, 0), (12, 0)])
def test_fused_layers_that_do_not_run_leave_plain_ones_noted(
    capability: tuple[int, int], problem: Exception, gpu: Callable[..., None]
) -> None:
    gpu(capability, problem)
    layers, lines = chosen()
    assert layers == PLAIN
    assert lines[0].startswith(f"fused layers refused ({type(problem).__name__}: ")
    assert str(problem)[:120] in lines[0]
    assert len(lines) == 2 and lines[1].endswith(", plain layers")


@pytest.mark.parametrize("error", [0.03, 0.5, 1e9, math.inf, math.nan])
def test_fused_layers_that_are_wrong_leave_plain_ones_and_a_note(
    error: float, gpu: Callable[..., None]
) -> None:
    gpu((10, 0), error)
    layers, lines = chosen()
    assert layers == PLAIN
    assert lines[0] == f"fused layers refused (RunError: relative error {error:.1e})"


def test_without_triton_plain_layers_are_chosen_with_a_note(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu((9, 0))
    monkeypatch.setattr(train_gpt, "triton", None)
    layers, lines = chosen()
    assert layers == PLAIN
    assert lines[0] == "fused layers refused (RunError: Triton is not installed)"


NO_MULTIPLE = "a width or a sequence's length is no multiple"
SIZES: list[tuple[dict[str, int], str]] = [
    (dict(mlp_hidden=44), NO_MULTIPLE),
    (dict(model_dim=36, num_heads=9, num_kv_heads=3), NO_MULTIPLE),
    (dict(train_seq_len=24, train_batch_tokens=240), NO_MULTIPLE),
    (dict(early_seq_len=8), NO_MULTIPLE),
    (dict(model_dim=48), "a head of 12 dims is no power of 2"),
]


@pytest.mark.parametrize(("sizes", "reason"), SIZES)
def test_sizes_that_no_tile_takes_are_not_tried(
    sizes: dict[str, int], reason: str, gpu: Callable[..., None]
) -> None:
    gpu((9, 0), AssertionError("tried"))
    layers, lines = chosen(**sizes)
    assert layers == PLAIN
    assert lines[0].startswith(f"fused layers refused (RunError: {reason}")


def test_plain_layers_of_a_gpu_train_on_a_cpu_as_well() -> None:
    """What an A100 gets is what the tests run."""
    assert train_gpt.choose_kernels(tiny(), cpu_runtime(), train_gpt.RunLog(None))[1:] == PLAIN


# The error itself


class Planted(torch.autograd.Function):
    """x * w, with the factors `planted` on output, dx and dw."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, planted: tuple[float, ...]) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, w)
        ctx.planted = planted
        return x * w * planted[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return dy * w * ctx.planted[1], dy * x * ctx.planted[2], None


def planted_error(*planted: float) -> float:
    inputs = [normal(64, 32, seed=1), normal(64, 32, seed=2)]
    return train_gpt.twin_error(
        lambda x, w: Planted.apply(x, w, planted), lambda x, w: x * w, inputs
    )


def test_a_right_twin_has_the_error_of_bfloat16() -> None:
    assert 1e-4 < planted_error(1, 1, 1) < 5e-3


@pytest.mark.parametrize("size", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["output", "dx", "dw"])
def test_an_error_in_any_result_is_measured(place: int, size: float) -> None:
    planted = [1.0, 1.0, 1.0]
    planted[place] += size
    assert planted_error(*planted) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["output", "dx", "dw"])
def test_what_is_not_finite_in_any_result_is_no_small_error(place: int, value: float) -> None:
    planted = [1.0, 1.0, 1.0]
    planted[place] = value
    assert not planted_error(*planted) < 3e-2


def test_one_wrong_row_of_many_is_over_the_bound() -> None:
    """A tile that is left out shows, though most of the output is right."""

    def without_last_tile(x: Tensor, w: Tensor) -> Tensor:
        y = x * w
        return torch.cat([y[:-2], torch.zeros_like(y[-2:])])

    inputs = [normal(64, 32, seed=1), normal(64, 32, seed=2)]
    assert train_gpt.twin_error(without_last_tile, lambda x, w: x * w, inputs) > 3e-2


@pytest.mark.parametrize("wrong", ["heads", "mlp", "loss", "round", "none"])
@pytest.mark.parametrize("value", [2.0, math.nan])
def test_an_error_in_any_fused_kernel_counts(
    wrong: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nan also in those after the first."""

    def heads(x: Tensor, qkv: Tensor, gain: Tensor, rotary: Tensor) -> tuple[Tensor, ...]:
        factor = value if wrong == "heads" else 1.0
        q, k, v = train_gpt.project_heads(x, qkv, gain, rotary)
        return q, factor * k, v

    def mlp(x: Tensor, up: Tensor, down: Tensor, scale: float, slope: float) -> Tensor:
        factor = value if wrong == "mlp" else 1.0
        return factor * train_gpt.relu2_mlp(x, up, down, scale, slope)

    def loss(x: Tensor, table: Tensor, targets: Tensor, softcap: train_gpt.Softcap) -> Tensor:
        factor = value if wrong == "loss" else 1.0
        return factor * train_gpt.mean_token_loss(x, table, targets, softcap)

    def round_rows(w: Tensor, *grid: Tensor) -> Tensor:
        return (value if wrong == "round" else 1.0) * train_gpt.fake_quantize(w, *grid)

    monkeypatch.setattr(train_gpt.FusedHeads, "apply", heads)
    monkeypatch.setattr(train_gpt.FusedMLP, "apply", mlp)
    monkeypatch.setattr(train_gpt.FusedLoss, "apply", loss)
    monkeypatch.setattr(train_gpt, "round_rows", round_rows)
    error = train_gpt.fused_error(tiny(), torch.device("cpu"))
    assert (error < 3e-2) is (wrong == "none"), error


def rounding_error_of(change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> float:
    """The error of a kernel that spoils its twin's result, on 200 rows."""

    def spoilt(w: Tensor, *grid: Tensor) -> Tensor:
        return change(train_gpt.fake_quantize(w, *grid))

    monkeypatch.setattr(train_gpt, "round_rows", spoilt)
    return train_gpt.rounding_error(torch.stack([normal(100, 64), 9 * normal(100, 64)]))


def test_a_rounding_that_is_right_has_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rounding_error_of(lambda w: w, monkeypatch) == 0


def test_a_row_that_is_rounded_to_another_grid_point_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It lasts, so it may be a near tie of two clips."""
    error = rounding_error_of(lambda w: w.index_fill(1, torch.tensor([7]), 0.0), monkeypatch)
    assert error == pytest.approx(0.01)


def test_one_weight_off_the_grid_is_over_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a last bit: the packed weights would not be the trained ones."""

    def off_grid(w: Tensor) -> Tensor:
        w = w.clone()
        place = w[1, 7].abs().argmax()
        w[1, 7, place] = torch.nextafter(w[1, 7, place], torch.tensor(0.0))
        return w

    assert rounding_error_of(off_grid, monkeypatch) > 1


def right_but_at(lengths: list[int], factor: float) -> train_gpt.Attend:
    """An attention whose output at these lengths is off by a factor."""
    right = train_gpt.sdpa()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return right(q, k, v) * (factor if q.shape[1] in lengths else 1.0)

    return attend


@pytest.mark.parametrize("factor", [1.5, math.nan])
@pytest.mark.parametrize(
    ("wrong", "settings", "refused"),
    [
        ([32], dict(early_seq_len=0), True),
        ([32], dict(early_seq_len=16), True),
        ([16], dict(early_seq_len=16), True),
        ([16], dict(early_seq_len=0), False),
        ([16], dict(early_seq_len=16, early_fraction=0.0), False),
        ([8, 64], dict(early_seq_len=16), False),
    ],
)
def test_an_attention_must_be_right_at_every_length_of_the_run(
    wrong: list[int], settings: dict[str, Any], refused: bool, factor: float
) -> None:
    """nan also at a length that is not the last one checked."""
    attend = right_but_at(wrong, factor)
    error = train_gpt.attention_error(tiny(**settings), attend, torch.device("cpu"))
    assert (error < 2e-2) is not refused, error


@pytest.mark.parametrize(
    "settings",
    [dict(early_seq_len=1), dict(train_seq_len=1, early_seq_len=0, eval_stride=0)],
    ids=str,
)
def test_a_right_attention_is_taken_for_sequences_of_one_token(settings: dict[str, Any]) -> None:
    error = train_gpt.attention_error(tiny(**settings), train_gpt.sdpa(), torch.device("cpu"))
    assert error < 2e-2


def test_an_attention_that_gives_nan_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is right, and so is the gradient of q."""

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
            return dy * math.nan

    right = train_gpt.sdpa()
    broken = {"broken": lambda q, k, v: right(q, k, NoGradient.apply(v)), "right": right}
    monkeypatch.setattr(train_gpt, "attention_candidates", lambda: broken)
    lines: list[str] = []
    name, _, _ = train_gpt.first_correct_attention(tiny(), torch.device("cpu"), lines.append)  # type: ignore[arg-type]
    assert name == "right"
    assert lines == ["attention:broken refused (RunError: relative error nan)"]
