"""Claims about the optimizer, against hand-written loops, and for 1, 2 and 3 ranks alike."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from support import REPO, completed, cpu_runtime, normal, tiny, tiny_model, write_back
from torch import Tensor

import train_gpt
from train_gpt import Hyperparameters, Optimizer, parameter_table

MATRICES = ("qo_bank", "kv_bank", "mlp_bank", "ve_proj")
TABLES = ("tok_emb", "ve_emb")
VECTORS = (
    "smear_gate", "smear_token", "resid_mix", "attn_scale", "mlp_scale", "q_gain", "skip_weight",
    "ve_scale", "attn_gate",
)  # fmt: skip


def new_optimizer(h: Hyperparameters, seed: int = 0) -> Optimizer:
    return Optimizer(tiny_model(h, seed=seed), h, cpu_runtime())


def gradients_of(optimizer: Optimizer, size: float, seed: int = 0) -> list[Tensor]:
    return [
        size * normal(*p.shape, seed=seed + i) for i, p in enumerate(optimizer.model.parameters())
    ]


DECAY = 0.5  # of one step


def one_step(
    optimizer: Optimizer, loss: Tensor, lr: float, gradients: list[Tensor], decay: float = 0.0
) -> Tensor:
    optimizer.lr.fill_(lr)
    optimizer.decay.fill_(decay)
    return optimizer.update(loss, gradients)


def test_the_groups_of_these_tests_hold_every_parameter() -> None:
    table = parameter_table(tiny())
    of_group = {"matrix": MATRICES, "embed": TABLES, "scalar": VECTORS}
    for group, names in of_group.items():
        assert {name for name, row in table.items() if row.group == group} == set(names)
    assert sum(map(len, of_group.values())) == len(table)


# Muon


def ref_orthogonalize(g: Tensor) -> Tensor:
    """One matrix, float64, always iterated on the side that it comes in."""
    if g.shape[0] > g.shape[1]:
        return ref_orthogonalize(g.T).T
    x = g.double() / (1.02 * g.double().norm() + 1e-7)
    for a, b, c in train_gpt.POLAR_EXPRESS:
        gram = x @ x.T
        x = a * x + b * (gram @ x) + c * (gram @ gram @ x)
    return x


def ref_normuon(update: Tensor, square: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """(update with even neurons, mean squares): one matrix, by a loop over its longer side."""
    by_row = update.shape[0] >= update.shape[1]
    lines = update if by_row else update.T
    even, means = torch.empty_like(lines), square.flatten().clone()
    for i, line in enumerate(lines):
        means[i] = beta2 * means[i] + (1 - beta2) * line.square().mean()
        even[i] = line / means[i].sqrt()
    even *= lines.norm() / even.norm()
    return (even if by_row else even.T), means.view_as(square)


def spread(rows: int, columns: int, condition: float) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix of that condition number and its singular vectors."""
    rank = min(rows, columns)
    u, _ = torch.linalg.qr(normal(rows, rank))
    v, _ = torch.linalg.qr(normal(columns, rank, seed=1))
    values = torch.logspace(-math.log10(condition), 0, rank)
    return 37.0 * u @ torch.diag(values) @ v.T, u, v


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_orthogonalization_brings_singular_values_into_a_band(shape: tuple[int, int]) -> None:
    matrix, u, v = spread(*shape, condition=100)
    polar = train_gpt.orthogonalize(matrix[None], torch.float32)[0]
    values = torch.linalg.svdvals(polar)
    assert values.min() > 0.85 and values.max() < 1.15
    assert (u.T @ polar @ v).diagonal().min() > 0.8, "the singular vectors are not kept"


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (3, 16, 16)])
def test_orthogonalizing_a_bank_equals_a_loop_over_matrices(shape: tuple[int, int, int]) -> None:
    bank = normal(*shape) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1)
    out = train_gpt.orthogonalize(bank, torch.float32)
    for i in range(3):
        expected = ref_orthogonalize(bank[i])
        torch.testing.assert_close(out[i].double(), expected, rtol=0, atol=1e-4)


def test_orthogonalization_keeps_zero_matrices_zero() -> None:
    bank = normal(3, 8, 16)
    bank[1] = 0
    out = train_gpt.orthogonalize(bank, torch.float32)
    assert not out[1].any() and out[0].any() and torch.isfinite(out).all()


def test_orthogonalization_in_bfloat16_points_where_float32_does() -> None:
    """The large coefficients amplify rounding: single weights differ by a tenth of their size, the
    direction by less than a hundredth, and the singular values stay in their band."""
    bank = normal(2, 24, 48)
    out = train_gpt.orthogonalize(bank, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    exact = train_gpt.orthogonalize(bank, torch.float32)
    out = out.float()
    assert torch.cosine_similarity(out.flatten(1), exact.flatten(1)).min() > 0.99
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.8 and values.max() < 1.2


@pytest.mark.parametrize("shape", [(2, 12, 20), (2, 20, 12), (2, 12, 12)])
def test_muon_update_equals_its_four_steps_written_out(shape: tuple[int, int, int]) -> None:
    lr, beta, decay, clip, beta2 = 0.03, 0.9, 0.4, 0.25, 0.8
    master, momentum = normal(*shape), normal(*shape, seed=1)
    square = normal(*shape, seed=9)[:, :, :1].square()
    square = square if shape[1] >= shape[2] else normal(*shape, seed=9)[:, :1].square()
    scale = torch.tensor([1.0, 1.7]).view(2, 1, 1)
    parameter = torch.nn.Parameter(master.clone())
    bank = train_gpt.Bank("qo_bank", parameter, master.clone(), master, momentum, square, scale)
    expected, average, means = master.double(), momentum.double(), square.double()
    for step in range(3):
        grad = 5 * normal(*shape, seed=2 + step)
        numbers = (torch.tensor(x) for x in (clip, lr, beta, decay))
        train_gpt.muon_update(grad, bank, *numbers, beta2, torch.float32)
        g = clip * grad.double()
        average = beta * average + (1 - beta) * g
        direction = beta * average + (1 - beta) * g  # nesterov
        for i in range(2):
            update, means[i] = ref_normuon(ref_orthogonalize(direction[i]), means[i], beta2)
            expected[i] = (1 - lr * decay) * expected[i] - lr * float(scale[i]) * update
        torch.testing.assert_close(momentum.double(), average, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(square.double(), means, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(master.double(), expected, rtol=0, atol=1e-4)


def test_a_neuron_whose_updates_were_large_moves_less() -> None:
    """And its matrix moves as far as without."""
    h = tiny()
    optimizer = new_optimizer(h)
    bank = optimizer.banks[0]
    gradients = gradients_of(optimizer, 1.0)
    twin = new_optimizer(h)
    twin.banks[0].mean_square.fill_(1e-6)
    twin.banks[0].mean_square[:, 0] = 1.0  # as if row 0 had moved by far the most
    moved = []
    for one in (optimizer, twin):
        before = one.banks[0].master.clone()
        one_step(one, torch.tensor(0.0), 1.0, gradients)
        moved.append(one.banks[0].master - before)
    assert bank.mean_square.shape[-1] == 1
    torch.testing.assert_close(moved[1].norm(dim=(1, 2)), moved[0].norm(dim=(1, 2)))
    assert (moved[1][:, 0].norm(dim=-1) < 0.5 * moved[0][:, 0].norm(dim=-1)).all()


def fans(name: str, index: int, shape: torch.Size) -> tuple[int, int]:
    """(outputs, inputs) of the linear map that matrix `index` of a bank stands for."""
    count, rows, columns = shape
    transposed = name == "mlp_bank" and index >= count // 2  # down-projections
    return (columns, rows) if transposed else (rows, columns)


@pytest.mark.parametrize("mlp_hidden", [48, 20])  # wider and narrower than the model
def test_every_matrix_moves_by_its_own_update_scale(mlp_hidden: int) -> None:
    h = tiny(mlp_hidden=mlp_hidden)
    optimizer = new_optimizer(h)
    before = {n: t.clone() for n, t in optimizer.masters().items()}
    gradients = gradients_of(optimizer, 1.0)
    by_name = dict(zip([n for n, _ in optimizer.model.named_parameters()], gradients, strict=True))
    one_step(optimizer, torch.tensor(0.0), 0.5, gradients)
    scales = set()
    for name in MATRICES:
        for i, (old, new) in enumerate(zip(before[name], optimizer.masters()[name], strict=True)):
            outputs, inputs = fans(name, i, before[name].shape)
            scale = max(1.0, outputs / inputs) ** 0.5
            update = ref_orthogonalize(by_name[name][i])
            update, _ = ref_normuon(update, torch.zeros(max(update.shape)).double(), h.muon_beta2)
            step = 0.5 * h.matrix_lr * scale * update
            torch.testing.assert_close(old - new, step.float(), rtol=0, atol=2e-5)
            scales.add(round(scale, 3))
    assert len(scales) > 1, "all matrices share a scale: the test is blind"


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_bank_takes_its_ranks_slice_of_the_padded_matrices(rank: int) -> None:
    h = tiny()
    row = parameter_table(h)["mlp_bank"]
    whole = normal(8, 48, 32)
    parameter = torch.nn.Parameter(whole.clone())
    bank = train_gpt.Bank.create("mlp_bank", row, parameter, cpu_runtime(rank=rank, world_size=3))
    padded = torch.cat((whole, torch.zeros(1, 48, 32)))  # 8 matrices over 3 ranks
    assert torch.equal(bank.padded, padded)
    assert torch.equal(bank.master, padded[3 * rank : 3 * rank + 3])
    up, down = 1.5**0.5, 1.0
    scales = ([up] * 4 + [down] * 5)[3 * rank : 3 * rank + 3]
    assert bank.update_scale.flatten().tolist() == pytest.approx(scales)
    assert not bank.momentum.any() and bank.momentum.shape == (3, 48, 32)
    assert not bank.mean_square.any() and bank.mean_square.shape == (3, 48, 1)
    bank.padded[2] = 7.0
    assert bool((parameter[2] == 7.0).all()), "the working weights are rows of `padded`"
    bank.master.fill_(3.0)
    assert not bool((parameter == 3.0).any()), "the masters are the working weights"


# AdamW and the global clip


def ref_steps(
    optimizer: Optimizer, h: Hyperparameters, batches: list[list[Tensor]], lrs: list[float]
) -> dict[str, Tensor]:
    """Small parameters after AdamW with decoupled decay and global clipping, in float64."""
    names = [n for n, _ in optimizer.model.named_parameters()]
    rates = {n: h.embed_lr for n in TABLES} | {n: h.scalar_lr for n in VECTORS}
    weights = {n: optimizer.masters()[n].detach().double().clone() for n in rates}
    first = {n: torch.zeros_like(w) for n, w in weights.items()}
    second = {n: torch.zeros_like(w) for n, w in weights.items()}
    for t, (gradients, scale) in enumerate(zip(batches, lrs, strict=True), 1):
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        clip = min(1.0, h.grad_clip_norm / norm)
        for name, gradient in zip(names, gradients, strict=True):
            if name not in rates:
                continue
            g, lr = clip * gradient.double(), scale * rates[name]
            first[name] = h.beta1 * first[name] + (1 - h.beta1) * g
            second[name] = h.beta2 * second[name] + (1 - h.beta2) * g * g
            up = first[name] / (1 - h.beta1**t)
            down = (second[name] / (1 - h.beta2**t)).sqrt() + h.adam_eps
            weights[name] = weights[name] * (1 - lr * DECAY) - lr * up / down
    return weights


@pytest.mark.parametrize("size", [1e-5, 1.0], ids=["below-clip", "clipped"])
def test_small_parameters_follow_a_hand_written_adamw(size: float) -> None:
    h = tiny(adam_eps=1e-6)
    optimizer = new_optimizer(h)
    batches = [gradients_of(optimizer, size * 3**t, seed=100 * t) for t in range(3)]
    lrs = [1.0, 0.7, 0.2]
    expected = ref_steps(optimizer, h, batches, lrs)
    for gradients, lr in zip(batches, lrs, strict=True):
        one_step(optimizer, torch.tensor(0.0), lr, gradients, DECAY)
    for name, weight in expected.items():
        actual = optimizer.masters()[name].double()
        torch.testing.assert_close(actual, weight, rtol=1e-5, atol=2e-6, msg=name)


def test_weight_decay_shrinks_every_weight_by_lr_times_decay() -> None:
    h = tiny()
    optimizer = new_optimizer(h)
    before = {n: t.detach().clone() for n, t in optimizer.masters().items()}
    one_step(optimizer, torch.tensor(0.0), 1.0, gradients_of(optimizer, 0.0), DECAY)
    rates = dict.fromkeys(MATRICES, h.matrix_lr) | dict.fromkeys(TABLES, h.embed_lr)
    rates |= dict.fromkeys(VECTORS, h.scalar_lr)
    for name, lr in rates.items():
        torch.testing.assert_close(optimizer.masters()[name], before[name] * (1 - lr * DECAY))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["mlp_bank", "q_gain"])
@pytest.mark.parametrize("clip", [0.3, 0.0])
def test_a_gradient_that_is_not_finite_moves_no_weight(name: str, bad: float, clip: float) -> None:
    """The masters stay what the last good step made them, so that there is a state to save."""
    h = tiny(grad_clip_norm=clip)
    optimizer = new_optimizer(h)
    names = [n for n, _ in optimizer.model.named_parameters()]
    one_step(optimizer, torch.tensor(2.0), 1.0, gradients_of(optimizer, 1.0, seed=9), DECAY)
    before = {n: t.detach().clone() for n, t in optimizer.masters().items()}
    gradients = gradients_of(optimizer, 1.0)
    gradients[names.index(name)].view(-1)[3] = bad
    assert one_step(optimizer, torch.tensor(2.0), 1.0, gradients, DECAY).isnan()
    for n, master in optimizer.masters().items():
        assert torch.equal(master, before[n]), f"{n}: momentum or decay moved it"
    good = one_step(optimizer, torch.tensor(2.0), 1.0, gradients_of(optimizer, 1.0, seed=5))
    assert float(good) == 2.0
    for n, master in optimizer.masters().items():
        assert bool(master.isfinite().all()) and not torch.equal(master, before[n]), n


def test_the_clip_is_global_over_matrices_and_small_parameters() -> None:
    h = tiny(muon_momentum=0.9, muon_momentum_warmup_start=0.9)
    optimizer = new_optimizer(h)
    gradients = gradients_of(optimizer, 0.0)
    names = [n for n, _ in optimizer.model.named_parameters()]
    gradients[names.index("qo_bank")][0, 0, 0] = 3.0
    gradients[names.index("ve_scale")][0] = 4.0  # together of norm 5
    one_step(optimizer, torch.tensor(0.0), 1.0, gradients)
    bank = next(b for b in optimizer.banks if b.name == "qo_bank")
    assert float(bank.momentum[0, 0, 0]) == pytest.approx(0.1 * 3 * h.grad_clip_norm / 5, rel=1e-5)
    first_moment = optimizer.small.split(optimizer.small.mean)["ve_scale"][0]
    assert float(first_moment) == pytest.approx((1 - h.beta1) * 4 * h.grad_clip_norm / 5, rel=1e-5)


def test_a_clip_norm_of_zero_leaves_gradients_as_they_are() -> None:
    optimizer = new_optimizer(
        tiny(grad_clip_norm=0.0, muon_momentum=0.9, muon_momentum_warmup_start=0.9)
    )
    gradients = gradients_of(optimizer, 0.0)
    names = [n for n, _ in optimizer.model.named_parameters()]
    gradients[names.index("qo_bank")][0, 0, 0] = 3000.0
    one_step(optimizer, torch.tensor(0.0), 1.0, gradients)
    bank = next(b for b in optimizer.banks if b.name == "qo_bank")
    assert float(bank.momentum[0, 0, 0]) == pytest.approx(300.0, rel=1e-5)


def test_the_step_returns_the_loss_that_it_was_given() -> None:
    optimizer = new_optimizer(tiny())
    loss = one_step(optimizer, torch.tensor(2.5), 1.0, gradients_of(optimizer, 1.0))
    one_step(optimizer, torch.tensor(7.5), 1.0, gradients_of(optimizer, 1.0))
    assert float(loss) == 2.5, "the returned loss is overwritten by the next step"


# Schedules


@pytest.mark.parametrize(
    ("step", "elapsed", "cap", "expected"),
    [
        (0, 0.0, 600.0, 0.0),
        (250, 0.0, 600.0, 0.25),
        (250, 300.0, 600.0, 0.5),  # the clock is further
        (900, 300.0, 600.0, 0.9),  # the steps are further
        (1000, 0.0, 600.0, 1.0),
        (10, 601.0, 600.0, 1.0),
        (10, 1e6, 0.0, 0.01),  # no cap: the clock does not count
    ],
)
def test_progress_is_the_larger_share(
    step: int, elapsed: float, cap: float, expected: float
) -> None:
    h = tiny(iterations=1000, max_wallclock_seconds=cap)
    assert train_gpt.progress_of(h, step, elapsed) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("fraction", "iters", "total", "progress", "expected"),
    [
        (0.6, 0, 0.0, 0.0, 1.0),
        (0.6, 0, 0.0, 0.4, 1.0),
        (0.6, 0, 0.0, 0.7, 0.5),
        (0.6, 0, 0.0, 0.91, 0.15),
        (0.6, 0, 0.0, 1.0, 0.0),
        (1.0, 0, 0.0, 0.25, 0.75),
        (0.6, 100, 1000.0, 0.9, 1.0),  # the last 100 of 1000 steps
        (0.6, 100, 1000.0, 0.95, 0.5),
        (0.6, 100, 200.0, 0.75, 0.5),  # the clock allows 200 steps only
        (0.6, 500, 200.0, 0.25, 0.75),  # longer than the run: all of it
        (0.6, 100, 0.0, 0.95, 0.5),  # unknown total: ITERATIONS, 1000
    ],
)
def test_lr_scale_is_flat_then_falls_linearly_to_zero(
    fraction: float, iters: int, total: float, progress: float, expected: float
) -> None:
    h = tiny(iterations=1000, warmdown_fraction=fraction, warmdown_iters=iters)
    assert train_gpt.lr_scale(h, progress, total) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("steps_done", "elapsed", "before", "progress", "lr", "decay"),
    [
        (0, 0.0, 0.0, 0.0, 1.0, 0.0),
        (100, 60.0, 0.0875, 0.1, 1.0, 2.0),  # the clock and the steps agree
        (100, 300.0, 0.495, 0.5, 1.0, 0.8),  # of 200 steps: the last 80 are the warm-down
        (100, 480.0, 0.792, 0.8, 0.3125, 1.28),  # of 125 steps
        (900, 30.0, 0.899, 0.9, 1.0, 0.16),  # of 1000 steps
        (960, 30.0, 0.959, 0.96, 0.5, 0.16),
    ],
)
def test_the_plan_of_a_step_follows_steps_and_clock(
    steps_done: int, elapsed: float, before: float, progress: float, lr: float, decay: float
) -> None:
    h = tiny(iterations=1000, max_wallclock_seconds=600.0, warmdown_iters=80, decay_per_run=160.0)
    plan = train_gpt.plan_step(h, steps_done, elapsed, before)
    assert plan[:3] == pytest.approx((progress, lr, decay), abs=1e-9)


def test_the_decay_of_all_steps_sums_to_that_of_the_run() -> None:
    h = tiny(iterations=50, max_wallclock_seconds=0.0, decay_per_run=160.0)
    progress, total = 0.0, 0.0
    for steps_done in range(51):
        plan = train_gpt.plan_step(h, steps_done, 0.0, progress)
        progress, total = plan.progress, total + plan.decay
    assert total == pytest.approx(160.0)


def test_muon_momentum_rises_linearly_then_stays() -> None:
    h = tiny(muon_momentum=0.99, muon_momentum_warmup_start=0.9,
             muon_momentum_warmup_steps=3, grad_clip_norm=0.0)  # fmt: skip
    optimizer, average = new_optimizer(h), 0.0
    names = [n for n, _ in optimizer.model.named_parameters()]
    bank = next(b for b in optimizer.banks if b.name == "qo_bank")
    for beta in (0.9, 0.93, 0.96, 0.99, 0.99):
        gradients = gradients_of(optimizer, 0.0)
        gradients[names.index("qo_bank")][0, 0, 0] = 1.0
        one_step(optimizer, torch.tensor(0.0), 1.0, gradients)
        average = beta * average + (1 - beta)
        assert float(bank.momentum[0, 0, 0]) == pytest.approx(average, rel=1e-5)


# Weight averaging


def test_running_mean_equals_the_mean_of_the_states() -> None:
    states = [{"a": normal(5, 7, seed=i), "b": normal(3, seed=50 + i)} for i in range(9)]
    mean = train_gpt.RunningMean({"a": normal(5, 7, seed=99), "b": normal(3, seed=98)})
    for k, state in enumerate(states, 1):
        mean.update(state)
        assert mean.count == k
        for name in ("a", "b"):
            expected = torch.stack([s[name].double() for s in states[:k]]).mean(0)
            torch.testing.assert_close(mean.mean[name].double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(states[0]["a"], normal(5, 7), rtol=0, atol=0)


def test_running_mean_of_one_or_of_equal_states_is_exact() -> None:
    state = {"a": normal(100)}
    mean = train_gpt.RunningMean({"a": normal(100, seed=1)})
    for _ in range(7):
        mean.update(state)
        assert torch.equal(mean.mean["a"], state["a"])


def test_running_mean_of_whole_numbers_is_exact_at_powers_of_two() -> None:
    mean = train_gpt.RunningMean({"a": torch.zeros(3)})
    for value in (1.0, 3.0):
        mean.update({"a": torch.tensor([value, 8 * value, -value])})
    assert mean.mean["a"].tolist() == [2.0, 16.0, -2.0]


# Late QAT and the masters


def codes_and_scales(optimizer: Optimizer, name: str, w: Tensor, step: float) -> Any:
    """Integer codes (N, R, C) and row scales of one parameter on its export grid."""
    grid = train_gpt.export_grids(optimizer.h)[name]
    qmax, ratio = (
        torch.tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in (grid.qmax, grid.step_ratio)
    )
    return train_gpt.quantize(w.reshape(-1, *w.shape[-2:]), torch.tensor(step), qmax, ratio)


def rounded(optimizer: Optimizer, masters: Mapping[str, Tensor], step: float) -> dict[str, Tensor]:
    """Masters on the export grid where they have one."""
    out = dict(masters)
    for name in train_gpt.export_grids(optimizer.h):
        codes, scales = codes_and_scales(optimizer, name, masters[name], step)
        out[name] = (codes.float() * scales).view(masters[name].shape)
    return out


def entropy_bytes(optimizer: Optimizer, step: float) -> float:
    """What an ideal coder with one table of frequencies a matrix would need."""
    bits = 0.0
    for name in train_gpt.export_grids(optimizer.h):
        codes, _ = codes_and_scales(optimizer, name, optimizer.masters()[name], step)
        for matrix in codes:
            counts = torch.unique(matrix, return_counts=True)[1].tolist()
            bits += sum(n * math.log2(sum(counts) / n) for n in counts)
    return bits / 8


def test_without_qat_the_working_weights_are_the_masters() -> None:
    optimizer = new_optimizer(tiny())
    one_step(optimizer, torch.tensor(0.0), 1.0, gradients_of(optimizer, 1.0))
    for name, parameter in optimizer.model.named_parameters():
        assert torch.equal(parameter.detach(), optimizer.masters()[name]), name


def test_with_qat_the_working_weights_are_rounded_masters() -> None:
    optimizer = new_optimizer(tiny())
    step = optimizer.start_late_qat(5000.0)
    assert step > 0
    one_step(optimizer, torch.tensor(0.0), 1.0, gradients_of(optimizer, 1.0))
    masters = {n: t.detach().clone() for n, t in optimizer.masters().items()}
    expected = rounded(optimizer, masters, step)
    for name, parameter in optimizer.model.named_parameters():
        assert torch.equal(parameter.detach(), expected[name]), name


def test_on_a_cpu_qat_rounds_with_the_plain_function() -> None:
    """The one that packs; the start-up's choice of kernels has no other there."""
    h, runtime = tiny(), cpu_runtime()
    kernels = train_gpt.choose_kernels(h, runtime, train_gpt.RunLog(None))
    optimizer = train_gpt.Trainer(h, runtime, kernels).optimizer
    assert optimizer.late_qat.round is train_gpt.fake_quantize
    step = optimizer.start_late_qat(5000.0)
    expected = rounded(optimizer, optimizer.masters(), step)
    for name, w in optimizer.late_qat.rounded(optimizer.masters()).items():
        assert torch.equal(w, expected[name]), name


def test_qat_leaves_the_masters_unrounded() -> None:
    with_qat, without = new_optimizer(tiny()), new_optimizer(tiny())
    step = with_qat.start_late_qat(5000.0)
    for number in range(3):
        for optimizer in (with_qat, without):
            gradients = gradients_of(optimizer, 1.0, seed=100 * number)
            one_step(optimizer, torch.tensor(0.0), 1.0, gradients)
    grid = rounded(with_qat, without.masters(), step)
    for name, master in without.masters().items():
        assert torch.equal(with_qat.masters()[name], master), name
        if name in train_gpt.export_grids(with_qat.h):
            assert (grid[name] - master).abs().max() > 1e-5, "the grid is too fine to see"


def test_a_bank_goes_to_the_other_ranks_before_the_next_one_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So its all-gather runs meanwhile; and it goes as it is after its own move."""
    optimizer = new_optimizer(tiny())
    move, publish = optimizer.muon_update, train_gpt.Bank.publish
    order = []

    def noted_move(grad: Tensor, bank: train_gpt.Bank, *rest: Any) -> None:
        order.append(("move", bank.name))
        move(grad, bank, *rest)

    def noted_publish(bank: train_gpt.Bank, weights: Tensor, *rest: Any) -> Any:
        order.append(("publish", bank.name))
        assert torch.equal(weights, bank.master)
        return publish(bank, weights, *rest)

    monkeypatch.setattr(optimizer, "muon_update", noted_move)
    monkeypatch.setattr(train_gpt.Bank, "publish", noted_publish)
    one_step(optimizer, torch.tensor(0.0), 1.0, gradients_of(optimizer, 1.0))
    names = [bank.name for bank in optimizer.banks]
    assert order == [(what, name) for name in names for what in ("move", "publish")]
    for name, p in optimizer.model.named_parameters():
        assert torch.equal(p, optimizer.masters()[name]), name


def test_write_back_twice_changes_nothing() -> None:
    optimizer = new_optimizer(tiny())
    optimizer.start_late_qat(5000.0)
    write_back(optimizer)
    once = [p.detach().clone() for p in optimizer.model.parameters()]
    write_back(optimizer)
    assert all(map(torch.equal, once, optimizer.model.parameters()))


def test_the_qat_grid_fills_the_byte_budget() -> None:
    optimizer = new_optimizer(tiny())
    steps = [optimizer.start_late_qat(budget) for budget in (4000.0, 6000.0, 8000.0)]
    assert steps[0] > steps[1] > steps[2] > 0
    for budget, step in zip((4000.0, 6000.0, 8000.0), steps, strict=True):
        assert 0.97 * budget < entropy_bytes(optimizer, step) <= budget + 1e-6


# Snapshot


def everything(optimizer: Optimizer) -> list[Tensor]:
    """Copies of all that a step changes."""
    tensors = [*optimizer.model.parameters(), *optimizer.masters().values()]
    tensors += [
        t for bank in optimizer.banks for t in (bank.padded, bank.momentum, bank.mean_square)
    ]
    small = optimizer.small
    tensors += [small.mean, small.mean_square, optimizer.steps_done]
    return [t.detach().clone() for t in tensors]


@pytest.mark.parametrize("steps_before", [0, 2])
def test_restore_puts_every_bit_back(steps_before: int) -> None:
    optimizer = new_optimizer(tiny())
    for number in range(steps_before):
        gradients = gradients_of(optimizer, 1.0, seed=number)
        one_step(optimizer, torch.tensor(0.0), 1.0, gradients)
    before = everything(optimizer)
    restore = optimizer.snapshot()
    one_step(optimizer, torch.tensor(0.0), 1.0, gradients_of(optimizer, 1.0, seed=7))
    optimizer.start_late_qat(5000.0)
    one_step(optimizer, torch.tensor(0.0), 1.0, gradients_of(optimizer, 1.0, seed=8))
    assert not all(map(torch.equal, before, everything(optimizer)))
    restore()
    after = everything(optimizer)
    assert len(after) == len(before) and all(map(torch.equal, before, after))
    assert not optimizer.late_qat.on


def test_a_restored_run_repeats_itself_bit_for_bit() -> None:
    optimizer = new_optimizer(tiny())
    one_step(optimizer, torch.tensor(0.0), 1.0, gradients_of(optimizer, 1.0))
    restore = optimizer.snapshot()
    runs = []
    for _ in range(2):
        for number in range(3):
            gradients = gradients_of(optimizer, 1.0, seed=10 + number)
            one_step(optimizer, torch.tensor(0.0), 1.0, gradients)
        runs.append(everything(optimizer))
        restore()
    assert all(map(torch.equal, *runs))


# Ranks


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return ranks.results(cpu_runtime())


@pytest.fixture(scope="module", params=[2, 3])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same steps by several gloo processes."""
    out = tmp_path_factory.mktemp("ranks") / "result.pt"
    script = REPO / "tests/ranks.py"
    done = completed(script, out, ranks=request.param, cwd=Path("/"))
    assert done.returncode == 0, done.stderr
    return torch.load(out)


def test_ranks_change_no_loss(alone: dict[str, Any], together: dict[str, Any]) -> None:
    """Of short and of whole sequences."""
    assert set(alone["lengths"]) == {16, 32} and together["lengths"] == alone["lengths"]
    plain = slice(0, ranks.PLAIN_STEPS + 1)
    assert together["losses"][plain] == pytest.approx(alone["losses"][plain], rel=1e-5)
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    assert alone["losses"][-1] < 0.99 * alone["losses"][0], "nothing is learned"


def test_ranks_change_no_weight(alone: dict[str, Any], together: dict[str, Any]) -> None:
    for kind in ("masters", "averaged", "working"):
        assert together[kind].keys() == alone[kind].keys()
        for name, weight in alone[kind].items():
            torch.testing.assert_close(together[kind][name], weight, rtol=0, atol=1e-4, msg=name)


def test_ranks_choose_the_same_qat_grid(alone: dict[str, Any], together: dict[str, Any]) -> None:
    assert together["grid_step"] == pytest.approx(alone["grid_step"], rel=1e-3)
    for name, weight in alone["qat_masters"].items():
        difference = (together["qat_masters"][name] - weight).abs()
        assert difference.mean() < 1e-3, name


def test_padded_banks_are_restored_bit_for_bit(together: dict[str, Any]) -> None:
    assert together["padding"] > 0, "no bank is padded: the test is blind"
    assert together["restored"]


def test_ranks_change_no_score(alone: dict[str, Any], together: dict[str, Any]) -> None:
    assert together["nats"] == pytest.approx(alone["nats"], rel=1e-12)
    assert together["dump"].keys() == alone["dump"].keys() == {"plain", "sliding"}
    for (kind, whole), nats in zip(alone["dump"].items(), alone["nats"], strict=True):
        torch.testing.assert_close(together["dump"][kind], whole, rtol=2e-7, atol=0)
        assert float(whole.double().sum()) == pytest.approx(nats, rel=1e-7)
