"""Claims about the grid: what rounding does to weights, and that training and export share it."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import support
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train_gpt
from train_gpt import (
    dequantize,
    encode,
    entropy_bits,
    fake_quantize,
    fit_grid_step,
    quantize,
    row_scales,
)

QMAX = (31, 127)
STEPS = (0.0, 1e-9, 1e-4, 0.003, 0.02, 0.3, 5.0, 1e4)
RATIOS = (0.0, 0.7, 1.0)
EVERY_GRID = list(itertools.product(QMAX, STEPS, RATIOS))

some_weights = st.builds(
    lambda seed, scale, heavy, rows: weights(seed, scale, heavy, rows),
    seed=st.integers(0, 2**31), scale=st.sampled_from([1e-8, 1e-3, 0.02, 1.0, 300.0]),
    heavy=st.booleans(), rows=st.integers(1, 40),
)  # fmt: skip
some_grid = st.sampled_from(EVERY_GRID)


def weights(
    seed: int, scale: float = 1.0, heavy: bool = False, rows: int = 40, columns: int = 24
) -> Tensor:
    """(2, rows, columns) float32 whose rows differ in spread, with a heavy tail if asked."""
    rng, shape = np.random.default_rng(seed), (2, rows, columns)
    w = rng.standard_t(3, shape) if heavy else rng.standard_normal(shape)
    return torch.from_numpy(w * rng.uniform(0.05, 2, (2, rows, 1)) * scale).float()


def grid(qmax: float, step: float, ratio: float, n: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """(step, qmax, ratio) as quantize takes them."""
    return (torch.tensor(step), torch.full((n, 1, 1), float(qmax)),
            torch.full((n, 1, 1), float(ratio)))  # fmt: skip


# Rounding


@settings(max_examples=60)
@given(some_weights, some_grid)
def test_codes_are_whole_numbers_within_the_range_of_the_grid(
    w: Tensor, g: tuple[int, float, float]
) -> None:
    codes, scale = quantize(w, *grid(*g))
    assert codes.dtype == torch.int8
    assert codes.shape == w.shape
    assert scale.shape == (*w.shape[:2], 1)
    assert scale.dtype == torch.float32
    assert int(codes.to(torch.int16).abs().max()) <= g[0]
    assert bool((scale > 0).all())
    assert bool(torch.isfinite(scale).all())


@settings(max_examples=60)
@given(some_weights, some_grid)
def test_a_weight_inside_the_range_moves_by_at_most_half_a_scale(
    w: Tensor, g: tuple[int, float, float]
) -> None:
    _, scale = quantize(w, *grid(*g))
    moved = (fake_quantize(w, *grid(*g)).double() - w.double()).abs()
    inside = w.double().abs() <= g[0] * scale.double()
    half = scale.double() / 2 + w.double().abs() * 2.0**-22  # float32 rounds the product
    assert bool((moved <= half)[inside].all())


@settings(max_examples=60)
@given(some_weights, some_grid)
def test_a_weight_past_the_range_becomes_the_end_of_the_range(
    w: Tensor, g: tuple[int, float, float]
) -> None:
    codes, scale = quantize(w, *grid(*g))
    past = w.double().abs() > (g[0] + 0.5) * scale.double() * (1 + 1e-6)
    assert torch.equal(codes[past].float(), g[0] * torch.sign(w[past]))


@settings(max_examples=60)
@given(some_weights, some_grid)
def test_rounding_is_the_nearest_code_of_a_plain_loop(
    w: Tensor, g: tuple[int, float, float]
) -> None:
    codes, scale = quantize(w[:, :3], *grid(*g))
    for n, r, c in np.ndindex(2, min(3, w.shape[1]), 24):
        exact = float(w[n, r, c]) / float(scale[n, r, 0])
        if abs(exact % 1 - 0.5) < 1e-4:  # a tie in one precision need not be one in another
            continue
        expected = max(-g[0], min(g[0], math.floor(exact + 0.5)))
        assert int(codes[n, r, c]) == expected
        assert float(dequantize(codes, scale)[n, r, c]) == np.float32(expected) * np.float32(
            float(scale[n, r, 0])
        )


@pytest.mark.parametrize("qmax", QMAX)
def test_quantize_is_encode_with_the_row_scales(qmax: int) -> None:
    w = weights(5)
    step, high, ratio = grid(qmax, 0.01, 0.7)
    codes, scale = quantize(w, step, high, ratio)
    assert torch.equal(scale, row_scales(w, step * ratio, high))
    assert torch.equal(codes.float(), encode(w, scale, high))
    assert torch.equal(fake_quantize(w, step, high, ratio), dequantize(codes, scale))


@pytest.mark.parametrize(("qmax", "step", "ratio"), EVERY_GRID)
def test_rounding_twice_is_rounding_once_bit_for_bit(qmax: int, step: float, ratio: float) -> None:
    for seed, (scale, heavy) in enumerate([(0.05, False), (1.0, False), (1.0, True)]):
        w = weights(seed, scale, heavy, rows=200, columns=512)
        once = fake_quantize(w, *grid(qmax, step, ratio))
        twice = fake_quantize(once, *grid(qmax, step, ratio))
        rows = int((once != twice).any(-1).sum())
        assert rows == 0, f"{rows} of 400 rows moved (scale {scale}, heavy {heavy})"


@pytest.mark.parametrize(("qmax", "step", "ratio"), EVERY_GRID)
def test_a_row_of_zeros_stays_zeros(qmax: int, step: float, ratio: float) -> None:
    w = weights(0)
    w[:, 3] = 0
    codes, scale = quantize(w, *grid(qmax, step, ratio))
    assert not codes[:, 3].any()
    assert not dequantize(codes, scale)[:, 3].any()
    assert bool((scale > 0).all()), "0 / 0 is no code"
    assert bool(torch.isfinite(scale).all())


@pytest.mark.parametrize("step", [0.0, 1e-4, 0.01])
@pytest.mark.parametrize("qmax", QMAX)
def test_one_huge_weight_spoils_its_own_row_only(qmax: int, step: float) -> None:
    w = weights(1)
    spoilt = w.clone()
    spoilt[1, 7, 2] = 1e6
    before, after = (fake_quantize(x, *grid(qmax, step, 1.0)) for x in (w, spoilt))
    different = (before != after).any(-1)
    assert different.nonzero().tolist() in ([[1, 7]], [])
    assert bool(torch.isfinite(after).all())
    assert float(after[1, 7, 2]) >= 0.5e6 * (1 - 1e-6)


@pytest.mark.parametrize("qmax", QMAX)
def test_the_scale_of_a_row_depends_on_no_other_row(qmax: int) -> None:
    w = weights(2, heavy=True)
    whole = row_scales(w, *grid(qmax, 0.02, 1.0)[:2])
    for n, r in ((0, 0), (1, 17), (0, 39)):
        alone = row_scales(w[n : n + 1, r : r + 1], *grid(qmax, 0.02, 1.0, n=1)[:2])
        assert float(alone) == float(whole[n, r])


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.15])
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("qmax", QMAX)
def test_the_scale_is_the_candidate_of_least_cost(qmax: int, heavy: bool, share: float) -> None:
    """In rate and distortion, at the price at which the floor itself is optimal."""
    w = weights(8, 0.02, heavy, rows=30, columns=512)
    floor = share * float(w.std()) * 31 / qmax
    scale = row_scales(w, torch.full((2, 1, 1), floor), torch.full((2, 1, 1), float(qmax)))
    floor = float(np.float32(floor))
    # The price at which `floor` is the optimum of s^2 / 12 - price * log2(s), by differentiation.
    price = (floor / 6) / (1 / (floor * math.log(2)))
    for n, r in itertools.product(range(2), range(30)):
        row = w[n, r].double().numpy()

        def error(s: float, row: np.ndarray = row) -> float:
            return float(((row - np.clip(np.rint(row / s), -qmax, qmax) * s) ** 2).sum())

        def cost(s: float, row: np.ndarray = row) -> float:
            return error(s) - len(row) * price * math.log2(s / floor)

        widest = np.abs(row).max() / qmax
        candidates = [max(widest * ratio, floor) for ratio in train_gpt.CLIP_RATIOS]
        chosen = float(scale[n, r, 0])
        stored = 2.0**-8  # a stored scale may have as few as 8 bits
        assert min(abs(chosen / c - 1) for c in candidates) <= stored, "not one of the candidates"
        best = min(candidates, key=cost)
        assert cost(chosen) <= cost(best) + 0.01 * error(best) + stored * len(row) * price


@pytest.mark.parametrize("qmax", QMAX)
def test_a_row_that_fits_has_the_common_step_as_its_scale(qmax: int) -> None:
    w = weights(4)
    step = float(w.abs().max()) / qmax * 1.01
    for ratio in (0.7, 1.0):
        scale = row_scales(w, *grid(qmax, step, 1.0)[:2])
        assert scale.unique().tolist() == pytest.approx([step], rel=2.0**-8)
        _, scale = quantize(w, *grid(qmax, step / ratio, ratio))
        assert scale.unique().tolist() == pytest.approx([step], rel=2.0**-8)


@pytest.mark.parametrize("qmax", QMAX)
@pytest.mark.parametrize("step", [0.0, 0.01, 100.0])
def test_a_step_ratio_of_zero_scales_rows_by_their_maximum(qmax: int, step: float) -> None:
    rows = []
    for spread in (1e-4, 0.1, 1.0, 50.0):  # values that no clip rounds better
        codes = torch.arange(-qmax, qmax + 1).float()
        rows.append(codes * spread)
    w = torch.stack(rows)[None]
    _, scale = quantize(w, *grid(qmax, step, 0.0, n=1))
    expected = w.abs().amax(-1, keepdim=True) / qmax
    assert torch.allclose(scale, expected, rtol=2.0**-8, atol=0)
    one = torch.full((1, 1, 1), float(qmax))
    assert torch.equal(scale, quantize(w, torch.tensor(0.0), one, one)[1]), "the step has no say"


def test_a_finer_step_never_rounds_worse_without_clipping() -> None:
    w = weights(6, 0.1)
    errors = []
    for step in (0.2, 0.1, 0.05, 0.02, 0.01, 0.005):
        errors.append(float((fake_quantize(w, *grid(127, step, 1.0)) - w).square().mean()))
    assert errors == sorted(errors, reverse=True)


# Which grid a parameter is on


def test_every_matrix_has_a_grid_and_no_gain_has_one() -> None:
    h = support.tiny()
    shapes = {name: row.shape for name, row in train_gpt.parameter_table(h).items()}
    grids = train_gpt.export_grids(h)
    kinds = ("_scale", "_gate", "_token", "_mix", "_gain", "_weight")
    vectors = {name for name in shapes if name.endswith(kinds)}
    assert grids.keys() == shapes.keys() - vectors
    for name, g in grids.items():
        matrices = math.prod(shapes[name][:-2])
        assert len(g.qmax) == len(g.step_ratio) == matrices, name


def test_the_first_and_last_layer_are_int8_the_others_int6() -> None:
    h = support.tiny(num_layers=5, int8_step_ratio=0.6)
    for name in ("qo_bank", "kv_bank", "mlp_bank"):
        g = train_gpt.export_grids(h)[name]
        assert g.qmax == (127, 31, 31, 31, 127) * 2
        assert g.step_ratio == (0.6, 1.0, 1.0, 1.0, 0.6) * 2
        qmax, ratio = g.tensors(torch.device("cpu"))
        assert qmax.shape == ratio.shape == (10, 1, 1)
        assert qmax.flatten().tolist() == list(g.qmax)
        assert np.allclose(ratio.flatten().tolist(), g.step_ratio)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 2.0])
def test_tables_have_the_step_that_their_ratio_says(ratio: float) -> None:
    h = support.tiny(tok_emb_step_ratio=ratio, ve_emb_step_ratio=2 * ratio)
    grids = train_gpt.export_grids(h)
    for name, expected in (("tok_emb", ratio), ("ve_emb", 2 * ratio), ("ve_proj", 0.0)):
        assert grids[name].qmax == (127,) and grids[name].step_ratio == (expected,), name
    w = support.tiny_weights(h)["ve_emb"][None]
    step = float(w.abs().max()) / 40  # coarser than any row's own
    _, scale = quantize(w, torch.tensor(step), *grids["ve_emb"].tensors(w.device))
    own = w.abs().amax(-1, keepdim=True) / 127
    if ratio:
        assert np.allclose(scale, 2 * ratio * step, rtol=1e-4)
    else:
        assert bool((scale <= 1.001 * own).all())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 11])
def test_a_shard_of_a_grid_is_a_slice_by_hand(world_size: int) -> None:
    n = 8
    whole = train_gpt.Grid((127, 31, 31, 5, 6, 7, 8, 9), (0.6, 1.0, 1.0, 0.1, 0.2, 0.3, 0.4, 0.5))
    shards = [whole.shard(rank, world_size) for rank in range(world_size)]
    count = {1: 8, 2: 4, 3: 3, 4: 2, 8: 1, 11: 1}[world_size]
    for rank, shard in enumerate(shards):
        for i in range(count):
            matrix = rank * count + i
            padding = matrix >= n
            assert shard.qmax[i] == (1 if padding else whole.qmax[matrix])
            assert shard.step_ratio[i] == (1 if padding else whole.step_ratio[matrix])
        assert len(shard.qmax) == len(shard.step_ratio) == count


def test_a_grid_of_one_matrix_is_whole_on_the_first_rank_alone() -> None:
    one = train_gpt.Grid((127,), (0.0,))
    assert one.shard(0, 3) == one
    assert one.shard(1, 3) == one.shard(2, 3) == train_gpt.Grid((1,), (1,))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_shards_of_a_bank_round_as_the_whole_bank(rank: int) -> None:
    h = support.tiny()
    w = support.tiny_weights(h)["mlp_bank"]
    grid = train_gpt.export_grids(h)["mlp_bank"]
    step = torch.tensor(0.02)
    whole = fake_quantize(w, step, *grid.tensors(w.device))
    mine = torch.cat((w, torch.zeros_like(w[:1])))[3 * rank : 3 * rank + 3]  # 8 padded to 9
    part = fake_quantize(mine, step, *grid.shard(rank, 3).tensors(w.device))
    expected = torch.cat((whole, torch.zeros_like(w[:1])))[3 * rank : 3 * rank + 3]
    assert torch.equal(part, expected)


# Size


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 4), st.sampled_from([1, 2, 40, 127]))
def test_the_entropy_is_that_of_a_plain_count(seed: int, n: int, top: int) -> None:
    rng = np.random.default_rng(seed)
    codes = np.rint(rng.standard_normal((n, 7, 11)) * top / 2).clip(-top, top).astype(np.int8)
    bits = 0.0
    for matrix in codes:
        counts = Counter(matrix.flatten().tolist())
        total = sum(counts.values())
        bits -= sum(c * math.log2(c / total) for c in counts.values())
    assert entropy_bits(torch.from_numpy(codes)) == pytest.approx(bits, rel=1e-12, abs=1e-9)


def test_entropy_is_0_for_equal_codes_and_8_bits_for_all() -> None:
    assert entropy_bits(torch.full((3, 8, 8), -7, dtype=torch.int8)) == 0
    every = torch.arange(-128, 128).to(torch.int8).view(1, 16, 16)
    assert entropy_bits(every) == pytest.approx(8 * 256)


def test_the_entropy_falls_as_the_step_grows() -> None:
    w = weights(7, 0.05)
    steps = [0.002 * 1.3**i for i in range(18)]
    bits = [entropy_bits(quantize(w, *grid(127, step, 1.0))[0]) for step in steps]
    assert bits == sorted(bits, reverse=True)


@settings(max_examples=60)
@given(st.floats(-20, 6), st.sampled_from([0.5, 1.0, 3.0]))
def test_fit_grid_step_finds_the_smallest_that_meets_the_target(where: float, power: float) -> None:
    def size_of(step: float) -> float:
        return 1000.0 * step**-power

    exact = 2.0**where
    step = fit_grid_step(size_of, size_of(exact))
    assert size_of(step) <= size_of(exact)
    assert exact <= step <= exact * 1.0001


@settings(max_examples=60)
@given(st.floats(-20, 6))
def test_fit_grid_step_meets_the_target_of_a_size_with_jumps(where: float) -> None:
    def size_of(step: float) -> float:
        return 10.0 if step < 2.0**where else 5.0

    step = fit_grid_step(size_of, 7.0)
    assert 2.0**where <= step <= 2.0**where * 1.0001
    assert size_of(fit_grid_step(size_of, 20.0)) == 10.0  # a target that anything meets


# Training and export


def test_packed_weights_read_back_are_the_fake_quantised_ones() -> None:
    """Bit for bit."""
    h = support.tiny()
    masters = support.tiny_weights(h)
    for step in (0.001, 0.0371, 0.3):
        _, read = train_gpt.unpack(train_gpt.pack(masters, h, step))
        for name, g in train_gpt.export_grids(h).items():
            qmax, ratio = (torch.tensor(x).float().view(-1, 1, 1) for x in (g.qmax, g.step_ratio))
            w = masters[name].reshape(-1, *masters[name].shape[-2:])
            expected = fake_quantize(w, torch.tensor(step), qmax, ratio).view(masters[name].shape)
            assert torch.equal(read[name], expected), name
            assert not torch.equal(read[name], masters[name]), "the step must matter"


def test_the_working_weights_of_late_qat_are_the_exported_ones() -> None:
    """Bit for bit."""
    h = support.tiny()
    model = support.tiny_model(h)
    optimizer = train_gpt.Optimizer(model, h, support.cpu_runtime())
    step = optimizer.start_late_qat(9_000)
    support.write_back(optimizer)
    masters = optimizer.gather(optimizer.masters())
    _, read = train_gpt.unpack(train_gpt.pack(masters, h, step))
    for name, working in model.named_parameters():
        stored = read[name]
        if name in train_gpt.export_grids(h):
            assert torch.equal(working.detach(), stored), name
            assert not torch.equal(working.detach(), masters[name]), name
        else:
            assert torch.equal(masters[name].half().float(), stored), name


def test_packing_weights_that_are_on_the_grid_moves_none_of_them() -> None:
    h = support.tiny()
    for seed, step in enumerate((0.002, 0.01, 0.0371, 0.1, 0.3)):
        _, once = train_gpt.unpack(train_gpt.pack(support.tiny_weights(h, seed), h, step))
        _, twice = train_gpt.unpack(train_gpt.pack(once, h, step))
        for name, w in once.items():
            assert torch.equal(w, twice[name]), (name, step)
