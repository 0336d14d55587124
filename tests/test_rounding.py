"""bench/rounding.py: GPTQ's error feedback, and the moments and gradients it is fed."""

import importlib
from types import ModuleType

import pytest
import support
import torch
from torch import Tensor

import train_gpt as tg


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(support.REPO / "bench"))
    return importlib.import_module("rounding")


def problem(columns: int = 160) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, scales, code range and the moments of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(2, 12, columns, generator=generator)
    mixing = torch.randn(2, columns, columns // 4, generator=generator)
    inputs = mixing @ torch.randn(2, columns // 4, 500, generator=generator)
    inputs += 0.1 * torch.randn(2, columns, 500, generator=generator)
    return w, torch.full_like(w, 0.4), torch.full((2, 1, 1), 31.0), inputs @ inputs.mT


def output_error(w: Tensor, codes: Tensor, scale: Tensor, moments: Tensor) -> float:
    d = codes * scale - w
    return float((d @ moments * d).sum())


def test_gptq_makes_outputs_far_better_than_nearest_rounding(rounding: ModuleType) -> None:
    w, scale, qmax, moments = problem()
    codes = rounding.gptq(w, scale, qmax, moments)
    plain = output_error(w, tg.encode(w, scale, qmax), scale, moments)
    assert output_error(w, codes, scale, moments) < 0.4 * plain
    assert torch.equal(codes, codes.round()) and float(codes.abs().max()) <= 31


def test_gptq_of_uncorrelated_inputs_is_nearest_rounding(rounding: ModuleType) -> None:
    w, scale, qmax, _ = problem()
    identity = torch.eye(w.shape[-1]).expand(2, -1, -1)
    assert torch.equal(rounding.gptq(w, scale, qmax, identity), tg.encode(w, scale, qmax))


def test_the_moments_are_those_of_what_the_products_read(rounding: ModuleType) -> None:
    h = support.tiny()
    weights = support.tiny_weights(h)
    windows = torch.randint(2, h.vocab_size, (3, h.train_seq_len + 1))
    real = tg.project_heads
    moments = rounding.input_moments(h, weights, windows)
    assert tg.project_heads is real, "the model is left as it was"
    tokens = 3 * h.train_seq_len
    assert {name: tuple(m.shape) for name, m in moments.items()} == {
        "heads": (4, 32, 32),
        "out": (4, 32, 32),
        "up": (4, 32, 32),
        "down": (4, 48, 48),
    }
    for layer in range(h.num_layers):  # normed inputs have unit mean squares, scaled by depth
        for name in ("heads", "up"):
            mean = float(moments[name][layer].trace()) / tokens / h.model_dim
            assert mean == pytest.approx(1 / (layer + 1), rel=1e-3)
    assert all(torch.equal(m, m.mT) for m in moments.values())


def test_all_ways_round_every_weight_and_tell_the_size(rounding: ModuleType) -> None:
    h = support.tiny()
    weights = support.tiny_weights(h)
    windows = torch.randint(2, h.vocab_size, (2, h.train_seq_len + 1))
    state, size = rounding.nearest(h, weights, 0.02)
    moments = rounding.input_moments(h, weights, windows)
    fisher = rounding.squared_gradients(h, weights, windows)
    for other, bytes_of_other in (
        rounding.by_gptq(h, weights, 0.02, moments),
        rounding.by_fisher(h, weights, size, fisher),
    ):
        assert set(other) == set(state) == set(tg.export_grids(h))
        assert bytes_of_other == pytest.approx(size, rel=0.03)
        for name in ("qo_bank", "kv_bank", "mlp_bank"):
            assert not torch.equal(other[name], state[name])
            assert float((other[name] - weights[name]).abs().max()) < 0.5
