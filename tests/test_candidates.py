"""bench/candidates.py: what each candidate computes, and that a run with it keeps the contracts.

torchrun --standalone --nproc_per_node=N tests/test_candidates.py OUT.pt     (the part of one rank)
"""

import itertools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from support import (
    REPO,
    FakeClock,
    completed,
    cpu_runtime,
    in_float64,
    normal,
    plain_attention,
    tiny,
    tiny_model,
    tiny_weights,
)
from support import train_gpt as tg
from test_optim import ref_orthogonalize
from test_training import (
    SCHEDULED,
    CapturedRun,
    Kind,
    Run,
    check_alone,
    compiled,
    new_evaluator,
    new_trainer,
    state_of,
)
from torch import Tensor

sys.path.insert(0, str(REPO / "bench"))
import ablate  # noqa: E402
import candidates  # noqa: E402
from candidates import Loops, Soap  # noqa: E402

LOOPS = Loops(loop_first=1, loop_last=2)  # of the tiny model's 4 layers, 2 in each half
SOAP = Soap(soap_sides=2)
ALL = [LOOPS, SOAP]  # the one changes the model, the other the optimizer
Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs candidates until the test ends."""

    def with_these(*chosen: Any) -> None:
        for candidate in chosen:
            for replacement in candidate.replacements():
                monkeypatch.setattr(*replacement)

    return with_these


def batch(h: tg.Hyperparameters) -> tuple[Tensor, Tensor]:
    """(2, T) inputs with a start of a document amid the first window, and targets."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, h.vocab_size, (2, h.train_seq_len + 1), generator=generator)
    tokens[0, 9] = tg.BOS_ID
    return tokens[:, :-1], tokens[:, 1:]


# The reference: one pass of a layer at a time, each with weights of its own

Weights = Mapping[str, Tensor]


class Reference:
    """The plain parts of the tiny model, in float64."""

    def __init__(self, h: tg.Hyperparameters, w: Weights, inputs: Tensor):
        self.h = h
        self.half = h.num_layers // 2
        x = tg.rms_norm(w["tok_emb"][inputs])
        self.embedded = tg.smear(x, w["smear_gate"], w["smear_token"], inputs)
        self.value_embedding = w["ve_emb"][inputs] @ w["ve_proj"][0].T
        self.outputs: dict[int, Tensor] = {}  # of layers, by number

    def enter(self, w: Weights, x: Tensor, number: int, skips: bool = True) -> Tensor:
        row = number - (self.h.num_layers - self.half)
        if skips and row >= 0:
            x = x + w["skip_weight"][row] * self.outputs[self.half - 1 - row]
        return w["resid_mix"][number, 0] * x + w["resid_mix"][number, 1] * self.embedded

    def attention(self, w: Weights, x: Tensor, number: int) -> Tensor:
        h = self.h
        layers = h.num_layers
        seen = tg.rms_norm(x) / math.sqrt(number + 1)

        def heads(y: Tensor, matrix: Tensor) -> Tensor:
            return (y @ matrix.T).unflatten(-1, (-1, h.head_dim))

        table = tg.rotary_table(x.shape[1], h.rope_dims, h.rope_base, x.device)
        q = tg.apply_rotary(tg.rms_norm(heads(seen, w["qo_bank"][number])), table)
        k = tg.apply_rotary(tg.rms_norm(heads(seen, w["kv_bank"][number])), table)
        k = tg.shift_keys(k, h.rope_dims)
        v = heads(seen, w["kv_bank"][layers + number])
        if number >= layers - h.ve_layers:
            scale = w["ve_scale"][number - (layers - h.ve_layers)]
            v = v + scale * self.value_embedding.view(v.shape)
        y = plain_attention(q * w["q_gain"][number][:, None], k, v)
        if number >= layers - h.xsa_layers:
            y = tg.exclude_self(y, v)
        y = tg.gate_heads(y, seen, w["attn_gate"][number])
        return w["attn_scale"][number] * (y.flatten(2) @ w["qo_bank"][layers + number].T)

    def feed_forward(self, w: Weights, x: Tensor, number: int) -> Tensor:
        up, down = w["mlp_bank"][number], w["mlp_bank"][self.h.num_layers + number]
        y = tg.relu2_mlp(x, up, down, 1 / math.sqrt(number + 1), self.h.mlp_slope)
        return w["mlp_scale"][number] * y

    def layer(self, w: Weights, x: Tensor, number: int, skips: bool = True) -> Tensor:
        x = self.enter(w, x, number, skips)
        x = x + self.attention(w, x, number)
        x = x + self.feed_forward(w, x, number)
        self.outputs[number] = x
        return x


def looped_stream(
    h: tg.Hyperparameters, passes: Sequence[Weights], order: Sequence[int], inputs: Tensor
) -> Tensor:
    """The final stream of layers in this order, pass i with weights `passes[i]`."""
    reference = Reference(h, passes[0], inputs)
    x = reference.embedded
    for i, (w, number) in enumerate(zip(passes, order, strict=True)):
        x = reference.layer(w, x, number, skips=number not in order[i + 1 :])
    return x


def weights_of(model: tg.GPT) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def numbers(plan: tg.Plan) -> list[int]:
    return [layer.number for layer in plan]


# Loops


def test_the_cards_middle_runs_twice_and_no_other_layer() -> None:
    plan = Loops().looped(tg.layer_plan(tg.Hyperparameters()))
    assert numbers(plan) == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    saving = [i for i, layer in enumerate(plan) if layer.saves_skip]
    assert saving == [0, 1, 2, 6, 7], "3 and 4 on their last pass"
    assert [layer.skip for layer in plan[9:]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("loops", "order"),
    [
        (Loops(loop_first=1, loop_last=2), [0, 1, 2, 1, 2, 3]),  # across the middle of the U-Net
        (Loops(loop_first=0, loop_last=0, loop_repeats=2), [0, 0, 0, 1, 2, 3]),
        (Loops(loop_first=2, loop_last=3), [0, 1, 2, 3, 2, 3]),
    ],
)
def test_looped_layers_run_in_order_with_their_own_weights(
    loops: Loops, order: list[int], install: Install
) -> None:
    h = tiny()
    install(loops)
    model = tiny_model(h, torch.float64)
    inputs, _ = batch(h)
    with in_float64(), torch.no_grad():
        expected = looped_stream(h, [weights_of(model)] * len(order), order, inputs)
        torch.testing.assert_close(model.final_hidden(inputs), expected, rtol=0, atol=1e-9)


def test_a_shared_weights_gradient_is_the_sum_over_its_passes(install: Install) -> None:
    h = tiny()
    install(LOOPS)
    model = tiny_model(h, torch.float64)
    inputs, _ = batch(h)
    order = [0, 1, 2, 1, 2, 3]
    passes = [{n: w.clone().requires_grad_() for n, w in weights_of(model).items()} for _ in order]
    with in_float64():
        upstream = torch.linspace(-1, 1, h.model_dim, dtype=torch.float64)
        (model.final_hidden(inputs) * upstream).sum().backward()
        (looped_stream(h, passes, order, inputs) * upstream).sum().backward()
    for name, parameter in model.named_parameters():
        shares = [w[name].grad for w in passes if w[name].grad is not None]
        torch.testing.assert_close(parameter.grad, sum(shares), rtol=1e-9, atol=1e-9, msg=name)
    both = [passes[i]["mlp_bank"].grad for i in (1, 3)]  # of layer 1
    assert all(gradient is not None and gradient[1].any() for gradient in both)


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Number of layers in every training step and every score from now on; no warm-up."""
    seen: dict[str, list[int]] = {"steps": [], "scores": []}
    step, score = tg.Trainer.train_step, tg.Evaluator.score

    def counted_step(trainer: tg.Trainer, *args: Any, **options: Any) -> Tensor:
        seen["steps"].append(len(trainer.model.plan))
        return step(trainer, *args, **options)

    def counted_score(
        evaluator: tg.Evaluator, model: tg.GPT, *rest: Any, **options: Any
    ) -> tg.Score:
        seen["scores"].append(len(model.plan))
        return score(evaluator, model, *rest, **options)

    monkeypatch.setattr(tg.Trainer, "train_step", counted_step)
    monkeypatch.setattr(tg.Evaluator, "score", counted_score)
    monkeypatch.setattr(tg.Trainer, "warm_up", lambda trainer, evaluator: None)
    return seen


@pytest.fixture(params=["steps", "time"])
def length(
    request: pytest.FixtureRequest, orders: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Settings of a run of 10 steps, or of as many as its time allows, which is one fewer or so."""
    clock = FakeClock()
    monkeypatch.setattr(tg, "time", clock)
    monkeypatch.setattr(tg.Trainer, "train_step", clock.slow(tg.Trainer.train_step, 0.1))
    if request.param == "steps":
        return dict(iterations=10)
    return dict(iterations=10**6, max_wallclock_seconds=1.0)


def test_loops_begin_at_a_progress_whatever_bounds_the_run(
    length: dict[str, Any], tmp_path: Path, install: Install, orders: dict[str, list[int]]
) -> None:
    install(LOOPS)
    run = Run(tiny(val_loss_every=2, **length), tmp_path)
    steps = orders["steps"]
    assert len(steps) >= 8 and steps == [4] * 4 + [6] * (len(steps) - 4), "of 0.4 of the run on"
    assert orders["scores"][:3] == [4, 4, 6], "after 2, 4 and 6 steps: those before them decide"
    assert sum(line.startswith("loops:on step:5 progress:0.40") for line in run.lines) == 1
    fresh = tg.load_model(run.trainer.h, cpu_runtime(), run.stages["trained"], tg.Kernels())
    assert numbers(fresh.plan) == [0, 1, 2, 1, 2, 3], "what is scored at the end"


def test_until_they_begin_a_run_is_the_one_without(tmp_path: Path, install: Install) -> None:
    h = tiny(iterations=4)
    plain = Run(h, tmp_path).stages["trained"]
    install(LOOPS._replace(loop_from=1.0))
    never = Run(h, tmp_path).stages["trained"]
    assert all(torch.equal(never[name], weight) for name, weight in plain.items())
    install(LOOPS._replace(loop_from=0.75))
    looped = Run(h, tmp_path).stages["trained"]
    assert not torch.equal(looped["qo_bank"], plain["qo_bank"])


@pytest.mark.parametrize(
    ("early", "lengths", "replayed"),
    [(0, [32], {(4, 32), (6, 32)}), (16, [16, 32], {(4, 16), (6, 16), (6, 32)})],
)
def test_graphs_of_one_order_are_not_used_for_another(
    early: int,
    lengths: list[int],
    replayed: set[Kind],
    tmp_path: Path,
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor for another length.  Captured, the update reads gradients from where the graph of its
    own kind left them."""
    h = tiny(iterations=8, warmdown_fraction=1.0, qat_threshold=0.4, early_seq_len=early)
    install(LOOPS)
    plain = Run(h, tmp_path / "plain")
    run = CapturedRun(h, tmp_path / "graphs", monkeypatch)
    run.check(plain, set(itertools.product((4, 6), lengths)), replayed)


# SOAP-Muon


def off_diagonal(basis: Tensor, covariance: Tensor) -> float:
    """Share of the covariance, in the basis, that lies off its diagonal; 0 for eigenvectors."""
    seen = basis.double().mT @ covariance.double() @ basis.double()
    rest = seen - torch.diag_embed(seen.diagonal(dim1=-2, dim2=-1))
    return float(rest.norm() / seen.norm())


def gradients(rows: int, columns: int, steps: int, condition: float = 1e3) -> list[Tensor]:
    """(2, rows, columns) each, noise of one covariance whose eigenvectors are random."""
    vectors = torch.linalg.qr(normal(2, rows, rows, seed=99))[0]
    sizes = 1e-4 * torch.logspace(0, -math.log10(condition), rows)
    return [vectors @ (sizes[:, None] * normal(2, rows, columns, seed=t)) for t in range(steps)]


def test_bases_turn_to_the_eigenvectors_as_a_power_iteration_with_qr_does() -> None:
    """Of a covariance that every step changes."""
    covariance = torch.zeros(2, 24, 24)
    basis = torch.eye(24).repeat(2, 1, 1)
    by_qr = basis.double()
    for g in gradients(24, 40, 80):
        covariance.lerp_(g @ g.mT, 0.05)
        basis = candidates.turned(basis, covariance)
        by_qr = torch.linalg.qr(covariance.double() @ by_qr)[0]
        error = basis.double().mT @ basis.double() - torch.eye(24, dtype=torch.float64)
        assert error.abs().max() < 1e-5, "no basis is orthonormal any more"
    assert off_diagonal(torch.eye(24).repeat(2, 1, 1), covariance) > 0.5
    assert off_diagonal(basis, covariance) < max(0.02, 1.5 * off_diagonal(by_qr, covariance))


def test_bases_come_to_the_eigenvectors_of_a_covariance_and_stay() -> None:
    (g,) = gradients(24, 40, 1)
    covariance = g @ g.mT
    basis = torch.eye(24).repeat(2, 1, 1)
    for _ in range(300):
        basis = candidates.turned(basis, covariance)
    assert off_diagonal(basis, covariance) < 1e-5
    variances = (basis.mT @ covariance @ basis).diagonal(dim1=-2, dim2=-1).sort()[0]
    expected = torch.linalg.eigvalsh(covariance.double())
    largest = expected.amax().float()
    torch.testing.assert_close(variances / largest, (expected / largest).float())
    again = candidates.turned(basis, covariance)
    overlap = (again * basis).sum(-2)  # of each vector with itself
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-5)


@pytest.mark.parametrize("covariance", [0.0, 1.0], ids=["zero", "identity"])
def test_a_basis_stays_where_no_turn_is_better(covariance: float) -> None:
    eye = torch.eye(16)[None]
    torch.testing.assert_close(candidates.turned(eye, covariance * eye), eye)
    everything = torch.ones(1, 16, 16)  # of rank 1: all pairs are equally far from its vectors
    assert candidates.turned(eye, everything).isfinite().all()


def bank_of(master: Tensor, scale: Tensor) -> tg.Bank:
    parameter = torch.nn.Parameter(master.clone())
    square = torch.zeros_like(master[:, :, :1])
    return tg.Bank(
        "qo_bank", parameter, master.clone(), master, torch.zeros_like(master), square, scale
    )


class SoapReference:
    """One matrix, in float64, with eigenvectors from torch.linalg."""

    def __init__(self, master: Tensor, scale: float, sides: Sequence[str]):
        self.master = master.double()
        self.scale = scale
        self.momentum = torch.zeros_like(self.master)
        # Not zero: of one gradient, all but the diagonal would be zero in the bases of both sides.
        sizes = dict(zip(("rows", "columns"), master.shape, strict=True))
        earlier = {side: 0.2 * normal(sizes[side], 40, seed=7).double() for side in sides}
        self.covariances = {side: g @ g.T for side, g in earlier.items()}
        self.squares = torch.zeros_like(self.master)
        self.steps = 0

    def bases(self, g: Tensor) -> dict[str, Tensor]:
        """After the covariances have taken `g` in; the identity where there is no covariance."""
        rows, columns = (torch.eye(size).double() for size in g.shape)
        vectors = {"rows": rows, "columns": columns}
        for side in self.covariances:
            new = g @ g.T if side == "rows" else g.T @ g
            self.covariances[side] = 0.9 * self.covariances[side] + 0.1 * new
            vectors[side] = torch.linalg.eigh(self.covariances[side])[1]
        return vectors

    def step(self, g: Tensor, bases: Mapping[str, Tensor], lr: float, decay: float) -> None:
        beta, beta2 = 0.8, 0.7
        rows, columns = bases["rows"], bases["columns"]
        self.steps += 1
        self.momentum = beta * self.momentum + (1 - beta) * g
        nesterov = beta * self.momentum + (1 - beta) * g
        self.squares = beta2 * self.squares + (1 - beta2) * (rows.T @ g @ columns) ** 2
        adam = (rows.T @ nesterov @ columns) / (self.squares / (1 - beta2**self.steps)).sqrt()
        update = ref_orthogonalize(rows @ adam @ columns.T)
        self.master = (1 - lr * decay) * self.master - lr * self.scale * update


@pytest.mark.parametrize(
    ("shape", "sides", "expected"),
    [
        ((2, 12, 20), 1, ["rows"]),
        ((2, 20, 12), 2, ["columns"]),
        ((2, 12, 12), 1, ["rows"]),
        ((2, 12, 12), 2, ["rows", "columns"]),
    ],
)
def test_an_update_is_adam_in_the_eigenbasis_then_orthogonalised(
    shape: tuple[int, int, int], sides: int, expected: list[str]
) -> None:
    """From the reference's eigenvectors: a turn from there changes nothing that is seen."""
    lr, clip, decay = 0.03, 0.25, 0.4
    scale = torch.tensor([1.0, 1.7]).view(2, 1, 1)
    bank = bank_of(normal(*shape), scale)
    soap = Soap(soap_beta=0.9, soap_sides=sides)
    state = soap.state(bank.master)
    references = [SoapReference(bank.master[i], float(scale[i]), expected) for i in range(2)]
    dims = ["rows" if side.dim == -2 else "columns" for side in state.sides]
    assert dims == expected
    for i, reference in enumerate(references):
        for side, name in zip(state.sides, dims, strict=True):
            side.covariance[i] = reference.covariances[name]
    rows, columns = (torch.logspace(0, -0.7, size) for size in shape[1:])  # variances differ
    for step in range(4):
        grad = normal(*shape, seed=2 + step) * rows[:, None] * columns
        for i, reference in enumerate(references):
            g = clip * grad[i].double()
            bases = reference.bases(g)
            reference.step(g, bases, lr, decay)
            for side, name in zip(state.sides, dims, strict=True):
                side.basis[i] = bases[name]
        numbers = (torch.tensor(x) for x in (clip, lr, 0.8, decay))
        soap.update(grad, bank, state, *numbers, 0.7, torch.float32)
        for i, reference in enumerate(references):
            torch.testing.assert_close(
                bank.master[i].double(), reference.master, rtol=0, atol=lr * 1e-2
            )
            for side, name in zip(state.sides, dims, strict=True):
                torch.testing.assert_close(
                    side.covariance[i].double(), reference.covariances[name], rtol=1e-5, atol=1e-7
                )


def test_an_update_in_bfloat16_points_where_float32_does() -> None:
    soap = Soap()
    moves = []
    for dtype in (torch.float32, torch.bfloat16):
        bank = bank_of(torch.zeros(2, 24, 40), torch.ones(2, 1, 1))
        state = soap.state(bank.master)
        for g in gradients(24, 40, 5, condition=30):
            numbers = (torch.tensor(x) for x in (1.0, 1.0, 0.9, 0.0))
            soap.update(g.bfloat16(), bank, state, *numbers, 0.95, dtype)
        moves.append(bank.master.flatten(1))
    assert torch.cosine_similarity(*moves).min() > 0.99


def soap_state(trainer: tg.Trainer) -> dict[str, Tensor]:
    """Copies of what the candidate adds."""
    state = {}
    for name, of_bank in trainer.optimizer.soap.items():  # type: ignore[attr-defined]
        state[f"square {name}"] = of_bank.mean_square.clone()
        for side in of_bank.sides:
            state[f"covariance {side.dim} {name}"] = side.covariance.clone()
            state[f"basis {side.dim} {name}"] = side.basis.clone()
    return state


def random_tokens(seed: int = 0) -> Tensor:
    return torch.randint(64, (8, 33), generator=torch.Generator().manual_seed(seed))


def test_a_warm_up_leaves_every_basis_bit_equal(install: Install) -> None:
    """Also one after some steps, in which everything has moved."""
    h = tiny()
    install(SOAP)
    trainer = new_trainer(h)
    fresh = soap_state(trainer)
    for steps in (0, 3):
        for seed in range(steps):
            trainer.train_step(random_tokens(seed), 1.0)
        trainer.average = tg.RunningMean(trainer.optimizer.masters())
        before = state_of(trainer) | soap_state(trainer)
        trainer.warm_up(new_evaluator(h, cpu_runtime()))
        after = state_of(trainer) | soap_state(trainer)
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert [name for name in fresh if torch.equal(fresh[name], after[name])] == []


def test_a_step_reads_no_number_back_from_the_device(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captured graph could not."""
    install(SOAP)
    trainer = new_trainer(tiny())
    sums = trainer.gradients(random_tokens())
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("the host waits"))
    trainer.optimizer.update(sums[0], sums[1:])


def test_a_captured_update_follows_the_steps(
    tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = tiny(iterations=8, warmdown_fraction=1.0, qat_threshold=0.4, early_seq_len=16)
    install(SOAP)
    plain = Run(h, tmp_path / "plain")
    run = CapturedRun(h, tmp_path / "graphs", monkeypatch)
    kinds = {(4, 16), (4, 32)}
    run.check(plain, kinds, kinds)


def test_what_is_not_finite_leaves_weights_and_bases_whole(install: Install) -> None:
    """And matrices of zeros, as those that pad a bank, stay zero."""
    install(SOAP)
    trainer = new_trainer(tiny())
    for seed in range(2):  # then every matrix has a gradient
        trainer.train_step(random_tokens(seed), 1.0)
    sums = trainer.gradients(random_tokens(2))
    trainer.optimizer = tg.Optimizer(trainer.model, trainer.h, trainer.runtime)
    trainer.optimizer.banks[0].master[3] = 0
    names = ["loss", *trainer.optimizer.names]
    qo, up = names.index("qo_bank"), names.index("mlp_bank")
    sums[qo][3] = 0
    trainer.optimizer.lr.fill_(1.0)
    trainer.optimizer.update(sums[0], sums[1:])
    before = {name: master.clone() for name, master in trainer.optimizer.masters().items()}
    spoiled = sums[up].clone()
    spoiled[0, 0, 0] = math.inf
    bad = [*sums[1:up], spoiled, *sums[up + 1 :]]
    assert trainer.optimizer.update(sums[0], bad).isnan()
    for name, master in trainer.optimizer.masters().items():
        assert torch.equal(master, before[name]), name
    assert trainer.optimizer.update(sums[0], sums[1:]).isfinite()
    assert all(tensor.isfinite().all() for tensor in soap_state(trainer).values())
    assert not trainer.optimizer.banks[0].master[3].any()
    moved = [n for n, m in trainer.optimizer.masters().items() if not torch.equal(m, before[n])]
    assert {"qo_bank", "kv_bank", "mlp_bank"} <= set(moved)


# All of them


def test_before_its_loops_begin_a_trainer_has_the_model_without(install: Install) -> None:
    h = tiny()
    weights = tiny_weights(h)
    inputs, targets = batch(h)
    expected = tg.GPT(h, weights, tg.Kernels())(inputs, targets)
    install(LOOPS)
    model = new_trainer(h).model
    model.load_state_dict(weights)
    torch.testing.assert_close(model(inputs, targets), expected, rtol=0, atol=1e-6)


def test_short_sequences_stay_alone(install: Install) -> None:
    install(LOOPS)
    check_alone(tiny_model(tiny(), torch.float64), 8)


def test_a_token_changes_no_loss_before_it(install: Install) -> None:
    h = tiny()
    install(LOOPS)
    model = tiny_model(h, torch.float64)
    inputs, targets = batch(h)
    with in_float64(), torch.no_grad():
        before = model(inputs, targets)
        for t in range(0, h.train_seq_len, 5):
            changed = inputs.clone()
            changed[0, t] = 2 if inputs[0, t] != 2 else 3
            after = model(changed, targets)
            torch.testing.assert_close(after[0, :t], before[0, :t], rtol=0, atol=1e-12)
            torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-12)
            assert abs(after[0, t] - before[0, t]) > 1e-6


@pytest.mark.parametrize("added", [ALL, ALL[::-1]], ids=["all", "in another order"])
def test_every_parameter_is_trained(added: list[Any], install: Install) -> None:
    install(*added)
    trainer = new_trainer(tiny())
    before = trainer.stages()["trained"]
    for _ in range(3):  # what feeds a weight that starts at 0 moves a step later
        trainer.train_step(random_tokens(), 1.0)
    after = trainer.stages()["trained"]
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_no_graph_is_compiled_on_the_clock(
    tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With validations before and after the loops begin and the sequences grow, and late QAT."""
    h = tiny(**SCHEDULED | dict(val_loss_every=2, eval_stride=0, early_seq_len=16))
    install(Loops(0, 0), SOAP)
    plain = Run(h, tmp_path / "plain")
    warm_up = tg.Trainer.warm_up
    with ExitStack() as stack:

        def then_forbid(trainer: tg.Trainer, evaluator: tg.Evaluator) -> None:
            warm_up(trainer, evaluator)
            stack.enter_context(torch.compiler.set_stance("fail_on_recompile"))

        monkeypatch.setattr(tg.Trainer, "warm_up", then_forbid)
        run = Run(h, tmp_path / "graphs", compiled())
    assert run.trainer.graphs_warmed_up > 0, "nothing was compiled at all"
    assert run.facts.graphs_compiled_on_clock == 0
    for change in ("loops:on step:4 ", "sequence_length:32 step:5 "):
        assert any(line.startswith(change) for line in run.lines)
    assert run.facts.qat_steps >= 2
    losses = [r.facts.final_train_loss for r in (plain, run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("added", [ALL, ALL[::-1]], ids=["all", "in another order"])
def test_warm_up_leaves_every_state_bit_equal(added: list[Any], install: Install) -> None:
    h = tiny(early_seq_len=16)
    install(*added)
    trainer = new_trainer(h)
    before, plan = state_of(trainer), trainer.model.plan
    kinds = set()
    inner = trainer.train_step

    def recording(*args: Any) -> Tensor:
        late_qat = trainer.optimizer.late_qat.on
        kinds.add((len(trainer.model.plan), trainer.seq_len, late_qat))
        return inner(*args)

    trainer.train_step = recording  # type: ignore[method-assign]
    trainer.warm_up(new_evaluator(h, cpu_runtime()))
    assert kinds == set(itertools.product((4, 6), (16, 32), (False, True)))
    after = state_of(trainer)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert trainer.model.plan == plan and not trainer.optimizer.late_qat.on
    assert trainer.seq_len == 32


def steps_of(runtime: tg.Runtime) -> dict[str, Tensor]:
    """Losses of two steps without loops and two with them, and the weights that they leave.

    All but the last step's sequences are short.
    """
    h = tiny()
    trainer = tg.Trainer(h, runtime, tg.Kernels())
    tokens = torch.randint(h.vocab_size, (8, 33), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(4):
        if step == 2:
            trainer.model.plan = tg.layer_plan(h)
        trainer.seq_len = 16 if step < 3 else 32
        mine = slice(trainer.rows.start, trainer.rows.stop)
        losses.append(trainer.train_step(tokens[mine], 0.5))
    return trainer.stages()["trained"] | {"losses": torch.stack(losses)}


def test_two_ranks_train_what_one_does(tmp_path: Path, install: Install) -> None:
    done = completed(Path(__file__), tmp_path / "two.pt", ranks=2, OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stderr
    install(*ALL)
    one, two = steps_of(cpu_runtime()), torch.load(tmp_path / "two.pt", weights_only=True)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=2e-5, msg=name)


# bench/ablate.py


def test_candidates_and_their_options_are_read_from_a_variant() -> None:
    variant = ablate.parse("x: ON=soap,loops LOOP_FROM=0.5 SOAP_SIDES=2 SEED=7 OFF=smear")
    ablate.check(variant)
    assert variant.on == [Soap(soap_sides=2), Loops(loop_from=0.5)]
    assert variant.off == ["smear"]
    assert variant.environment["SEED"] == "7"
    read = {"ON", "OFF", "LOOP_FROM", "SOAP_SIDES"}
    assert not read & variant.environment.keys()
    assert ablate.parse("base").on == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("ON=loop", "unknown; choose of loops, soap"),
        ("ON=loops,loops", "loops twice"),
        ("ON=loops LOOP_FROM=half", "expected a number; its default is 0.35"),
        ("ON=loops LOOP_FIRST=1.5", "expected a whole number; its default is 3"),
        ("ON=soap LOOP_FROM=0.5", "an option of loops, which is off; add ON=loops"),
        ("SOAP_SIDES=2", "an option of soap, which is off"),
        ("ON=loops LOOP_FORM=0.5", "LOOP_FORM=0.5: no setting; .* LOOP_FROM"),
        ("ON=loops LOOP_LAST=11", "expected layers of 0 to 10"),
        ("ON=loops LOOP_FIRST=5 LOOP_LAST=4", "expected layers of 0 to 10, in this order"),
        ("ON=loops LOOP_REPEATS=0", "expected 1 or more"),
        ("ON=loops LOOP_FROM=nan", "set it within 0 to 1"),
        ("ON=soap SOAP_BETA=1", "SOAP_BETA=1.0: expected a decay between 0 and 1"),
        ("ON=soap SOAP_SIDES=3", "expected 1 or 2"),
    ],
)
def test_what_cannot_run_is_refused_before_any_run(
    settings: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ablate.Mistake, match=message):
        ablate.main(["base", f"x: {settings}"], tmp_path / "TABLE.md")
    assert not (tmp_path / "TABLE.md").exists()


def test_an_option_that_all_variants_would_share_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOOP_FROM", "0.5")
    with pytest.raises(ablate.Mistake, match="write it into the variant: ON=loops LOOP_FROM="):
        ablate.check(ablate.parse("x: ON=loops"))


def test_a_run_with_all_candidates_leaves_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_run.environment(
        small_run.data_in(tmp_path), tmp_path / "out", PRESET="smoke", EVAL_STRIDE=0
    )
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    settings_of_all = "ON=loops,soap LOOP_FIRST=1 LOOP_LAST=2 EARLY_SEQ_LEN=32"
    table = tmp_path / "TABLE.md"
    ablate.main([f"all (-0.01): {settings_of_all}"], table)
    (row,) = (line for line in table.read_text().splitlines() if line.startswith("| all"))
    assert "failed" not in row and f"| {settings_of_all} | -0.01 |" in row
    log = (tmp_path / "out/all/train.log").read_text()
    assert "\nloops:on step:3 " in log and "\nsequence_length:64 step:3 " in log


if __name__ == "__main__":  # one of the ranks
    candidates.install(ALL)
    this = tg.Runtime.start(tiny(), os.environ)
    results = steps_of(this)
    if this.rank == 0:
        torch.save(results, sys.argv[1])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
