"""Claims about the model, against loops over sequences, heads and positions in float64."""

import math
from collections.abc import Mapping

import pytest
import torch
from support import cpu_runtime, in_float64, normal, tiny, tiny_model, tiny_weights
from torch import Tensor

import train_gpt
from train_gpt import BOS_ID, Hyperparameters, parameter_table


def normal64(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed, dtype=torch.float64)


def batch(h: Hyperparameters, rows: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs with documents starting inside the rows, and targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, h.vocab_size, (rows, h.train_seq_len + 1), generator=generator)
    tokens[0, h.train_seq_len // 3] = BOS_ID
    tokens[-1, 0] = BOS_ID
    return tokens[:, :-1], tokens[:, 1:]


# The reference: the card's model, one sequence, one head and one position at a time.


def ref_norm(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def ref_rotate(x_E: Tensor, position: int, dims: int, base: float) -> Tensor:
    """The first `dims` numbers as dims/2 complex ones (real parts first), each turned."""
    out, half = x_E.clone(), dims // 2
    for j in range(half):
        angle = position * base ** (-2 * j / dims)
        turned = complex(x_E[j], x_E[half + j]) * complex(math.cos(angle), math.sin(angle))
        out[j], out[half + j] = turned.real, turned.imag
    return out


def ref_attention(
    h: Hyperparameters, q_TE: Tensor, k_TE: Tensor, v_TE: Tensor, gain: float, xsa: bool
) -> Tensor:
    """One head: QK-norm, partial rotary, key shift, gain, causal softmax, XSA."""
    length, out = len(q_TE), torch.zeros_like(q_TE)
    turn = [ref_rotate(ref_norm(q_TE[t]), t, h.rope_dims, h.rope_base) for t in range(length)]
    keys = [ref_rotate(ref_norm(k_TE[t]), t, h.rope_dims, h.rope_base) for t in range(length)]
    for t in reversed(range(length)) if h.key_shift else ():
        keys[t][h.rope_dims :] = keys[t - 1][h.rope_dims :] if t else 0
    for t in range(length):
        scores = torch.stack(
            [gain * (turn[t] @ keys[s]) / q_TE.shape[1] ** 0.5 for s in range(t + 1)]
        )
        weights = torch.exp(scores - scores.max())
        weights = weights / weights.sum()
        for s in range(t + 1):
            out[t] += weights[s] * v_TE[s]
        if xsa:
            own = v_TE[t]
            out[t] = out[t] - (out[t] @ own) / (own @ own) * own
    return out


def ref_losses(
    w: Mapping[str, Tensor], h: Hyperparameters, inputs: Tensor, targets: Tensor
) -> Tensor:
    """Loss of each target of one sequence, (T,)."""
    layers, width, length = h.num_layers, h.model_dim // h.num_heads, len(inputs)
    half, group = layers // 2, h.num_heads // h.num_kv_heads
    embedded = ref_norm(w["tok_emb"][inputs])
    gate = 1 / (1 + torch.exp(-w["smear_gate"]))
    x = embedded.clone()
    for t in range(1, length):
        if inputs[t] != BOS_ID:
            own = embedded[t, : h.smear_dims] @ w["smear_token"]
            share = gate * 2 / (1 + torch.exp(-own))
            x[t] = (1 - share) * embedded[t] + share * embedded[t - 1]
    x0 = x
    outputs: list[Tensor] = []
    value_embedding = w["ve_emb"][inputs] @ w["ve_proj"][0].T
    for i in range(layers):
        if i >= layers - half:
            number = i - (layers - half)
            x = x + w["skip_weight"][number] * outputs[half - 1 - number]
        x = w["resid_mix"][i, 0] * x + w["resid_mix"][i, 1] * x0
        seen = ref_norm(x) / math.sqrt(i + 1)
        q, k = seen @ w["qo_bank"][i].T, seen @ w["kv_bank"][i].T
        v = seen @ w["kv_bank"][layers + i].T
        if i >= layers - h.ve_layers:
            v = v + w["ve_scale"][i - (layers - h.ve_layers)] * value_embedding
        heads = []
        for head in range(h.num_heads):
            mine = slice(head * width, (head + 1) * width)
            theirs = slice(head // group * width, (head // group + 1) * width)
            gain, xsa = float(w["q_gain"][i, head]), i >= layers - h.xsa_layers
            y = ref_attention(h, q[:, mine], k[:, theirs], v[:, theirs], gain, xsa)
            if h.gate_dims:
                sensed = seen[:, : h.gate_dims] @ w["attn_gate"][i, head]
                y = y * (2 / (1 + torch.exp(-sensed)))[:, None]
            heads.append(y)
        x = x + w["attn_scale"][i] * (torch.cat(heads, dim=1) @ w["qo_bank"][layers + i].T)
        up = (ref_norm(x) / math.sqrt(i + 1)) @ w["mlp_bank"][i].T
        down = w["mlp_bank"][layers + i].T  # stored transposed
        up = torch.where(up > 0, up, h.mlp_slope * up)
        x = x + w["mlp_scale"][i] * ((up**2) @ down.T)
        outputs.append(x)
    logits = ref_norm(x) @ w["tok_emb"].T
    logits = h.logit_softcap * torch.tanh((logits + h.logit_shift) / h.logit_width)
    losses = torch.zeros(length, dtype=torch.float64)
    for t in range(length):
        losses[t] = torch.log(torch.exp(logits[t]).sum()) - logits[t, targets[t]]
    return losses


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(num_layers=5, xsa_layers=1, ve_layers=3),
        dict(num_heads=2, num_kv_heads=2),
        dict(num_heads=4, num_kv_heads=1, rope_dims=8, xsa_layers=0),
        dict(num_layers=2, xsa_layers=2),
        dict(key_shift=0, gate_dims=0),
    ],
    ids=["gqa", "odd-depth", "mha", "mqa-full-rope", "two-layers", "card"],
)
def test_whole_forward_equals_the_reference(changes: dict[str, int]) -> None:
    h = tiny(
        train_seq_len=12, train_batch_tokens=24, micro_batch_tokens=24, logit_softcap=5.0,
        logit_shift=0.7, logit_width=4.0, **changes,
    )  # fmt: skip
    model = tiny_model(h, torch.float64, seed=1)
    inputs, targets = batch(h)
    with in_float64(), torch.no_grad():
        losses = model(inputs, targets)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for row in range(2):
        expected = ref_losses(weights, h, inputs[row], targets[row])
        torch.testing.assert_close(losses[row], expected, rtol=0, atol=1e-9)


def test_float32_forward_is_near_the_float64_reference() -> None:
    h = tiny(train_seq_len=12, train_batch_tokens=24, micro_batch_tokens=24)
    model = tiny_model(h)
    inputs, targets = batch(h)
    losses = model(inputs, targets)
    assert losses.dtype == torch.float32
    weights = {name: w.double() for name, w in tiny_weights(h).items()}
    expected = ref_losses(weights, h, inputs[0], targets[0])
    torch.testing.assert_close(losses[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_losses_of_the_last_states_are_the_tail_of_all() -> None:
    h = tiny()
    model = tiny_model(h, torch.float64)
    inputs, targets = batch(h)
    with in_float64(), torch.no_grad():
        losses = model(inputs, targets)
        for scored in (1, 8, h.train_seq_len - 1):
            hidden = model.final_hidden(inputs)[:, -scored:]
            tail = model.losses(hidden, targets[:, -scored:])
            assert tail.shape == (2, scored)
            torch.testing.assert_close(tail, losses[:, -scored:], rtol=0, atol=1e-12)


def test_a_token_changes_no_loss_before_it() -> None:
    h = tiny()
    model = tiny_model(h, torch.float64)
    inputs, targets = batch(h)
    with in_float64(), torch.no_grad():
        before = model(inputs, targets)
        for t in range(h.train_seq_len):
            for replacement in (BOS_ID, 2 if inputs[0, t] != 2 else 3):
                if inputs[0, t] == replacement:
                    continue
                changed = inputs.clone()
                changed[0, t] = replacement
                after = model(changed, targets)
                torch.testing.assert_close(after[0, :t], before[0, :t], rtol=0, atol=1e-12)
                torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-12)
                assert abs(after[0, t] - before[0, t]) > 1e-6


def test_a_target_changes_only_its_own_loss() -> None:
    h = tiny()
    model = tiny_model(h, torch.float64)
    inputs, targets = batch(h)
    changed = targets.clone()
    changed[0, 5] = (changed[0, 5] + 1) % h.vocab_size
    with in_float64(), torch.no_grad():
        difference = (model(inputs, changed) - model(inputs, targets)).abs() > 1e-9
    assert difference.nonzero().tolist() == [[0, 5]]


# Exclusive self-attention


def test_xsa_output_is_orthogonal_to_the_own_value_of_the_group() -> None:
    y, v = normal64(2, 5, 6, 8), normal64(2, 5, 3, 8, seed=1)
    with in_float64():
        out = train_gpt.exclude_self(y, v)
    for head in range(6):
        assert (out[:, :, head] * v[:, :, head // 2]).sum(-1).abs().max() < 1e-12
    other = (out[:, :, 0] * v[:, :, 1]).sum(-1).abs().min()
    assert other > 1e-6, "orthogonal to a value of another group as well: the test is blind"


def test_xsa_equals_a_loop_over_heads() -> None:
    y, v = normal64(2, 5, 6, 8), normal64(2, 5, 3, 8, seed=1)
    with in_float64():
        out = train_gpt.exclude_self(y, v)
    assert out.shape == y.shape
    for b in range(2):
        for t in range(5):
            for head in range(6):
                own = v[b, t, head // 2]
                expected = y[b, t, head] - (y[b, t, head] @ own) / (own @ own) * own
                torch.testing.assert_close(out[b, t, head], expected, rtol=0, atol=1e-12)


def test_xsa_of_a_zero_value_is_the_output_itself() -> None:
    y = torch.randn(1, 3, 4, 8)
    out = train_gpt.exclude_self(y, torch.zeros(1, 3, 2, 8))
    assert torch.equal(out, y)


# Partial rotary embedding


def test_rotary_leaves_the_other_dims_untouched() -> None:
    x = torch.randn(2, 7, 3, 16)
    table = train_gpt.rotary_table(7, 4, 10_000.0, x.device)
    out = train_gpt.apply_rotary(x, table)
    assert torch.equal(out[..., 4:], x[..., 4:])
    assert (out[:, 1:, :, :4] != x[:, 1:, :, :4]).any(-1).all()
    assert torch.equal(out[:, 0], x[:, 0]), "position 0 is not turned"


def test_rotary_turns_the_first_dims_like_a_complex_rotation() -> None:
    x, base = normal64(2, 40, 3, 16), 100.0
    with in_float64():
        out = train_gpt.apply_rotary(x, train_gpt.rotary_table(40, 6, base, x.device))
    pairs = torch.complex(x[..., :3], x[..., 3:6])
    for t in range(40):
        for j in range(3):
            turn = torch.polar(
                torch.ones((), dtype=torch.float64),
                torch.tensor(t * base ** (-j / 3), dtype=torch.float64),
            )
            expected = pairs[:, t, :, j] * turn
            torch.testing.assert_close(out[:, t, :, j], expected.real, rtol=0, atol=1e-12)
            torch.testing.assert_close(out[:, t, :, 3 + j], expected.imag, rtol=0, atol=1e-12)


def test_rotary_scores_depend_only_on_the_distance() -> None:
    q, k = normal64(1, 1, 1, 16), normal64(1, 1, 1, 16, seed=1)
    with in_float64():
        table = train_gpt.rotary_table(30, 8, 10_000.0, q.device)
        q, k = (train_gpt.apply_rotary(x.expand(1, 30, 1, 16), table)[0, :, 0] for x in (q, k))
    scores = q @ k.T
    for distance in range(-20, 21):
        diagonal = torch.diagonal(scores, distance)
        assert diagonal.max() - diagonal.min() < 1e-12
    assert abs(scores[0, 0] - scores[0, 5]) > 1e-3


# SmearGate


def test_smear_changes_neither_position_0_nor_a_document_start() -> None:
    x = torch.randn(2, 6, 4)
    inputs = torch.tensor([[7, 5, BOS_ID, 5, BOS_ID, BOS_ID], [BOS_ID, 5, 6, 7, 8, 9]])
    out = train_gpt.smear(x, torch.randn(4), torch.randn(3), inputs)
    assert torch.equal(out[:, 0], x[:, 0])
    assert torch.equal(out[inputs == BOS_ID], x[inputs == BOS_ID])


def test_smear_elsewhere_mixes_in_the_previous_token() -> None:
    x, gate = normal64(2, 6, 4), normal64(4, seed=1)
    inputs = torch.tensor([[7, 5, BOS_ID, 5, 6, 7], [BOS_ID, 5, 6, 7, 8, 9]])
    token = normal64(3, seed=2)
    out = train_gpt.smear(x, gate, token, inputs)
    for b in range(2):
        for t in range(1, 6):
            if inputs[b, t] != BOS_ID:
                share = 2 / (1 + torch.exp(-gate)) / (1 + torch.exp(-x[b, t, :3] @ token))
                expected = (1 - share) * x[b, t] + share * x[b, t - 1]
                torch.testing.assert_close(out[b, t], expected, rtol=0, atol=1e-12)


def test_rms_norm_gives_unit_root_mean_square_in_the_input_dtype() -> None:
    x = 3 * torch.randn(4, 64)
    torch.testing.assert_close(train_gpt.rms_norm(x).square().mean(-1), torch.ones(4))
    half = (50 * torch.randn(4, 64)).bfloat16()
    out = train_gpt.rms_norm(half)
    assert out.dtype == torch.bfloat16
    expected = ref_norm(half.double())
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-6)


# Gradients


def gradients(model: train_gpt.GPT, h: Hyperparameters) -> dict[str, Tensor | None]:
    inputs, targets = batch(h, rows=8)
    model(inputs, targets).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_every_parameter_has_a_gradient_after_one_backward() -> None:
    h = tiny()
    for name, grad in gradients(tiny_model(h), h).items():
        assert grad is not None and grad.abs().max() > 0, name
    fresh = train_gpt.GPT(h, train_gpt.initial_weights(h), train_gpt.Kernels())
    assert all(grad is not None for grad in gradients(fresh, h).values())


def test_the_mean_loss_is_the_mean_of_the_losses_bit_for_bit() -> None:
    h = tiny()
    plain = gradients(tiny_model(h), h)
    model = tiny_model(h)
    inputs, targets = batch(h, rows=8)
    mean = model.mean_loss(inputs, targets)
    mean.backward()
    assert mean.dim() == 0 and torch.equal(mean, model(inputs, targets).mean())
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.equal(p.grad, plain[name]), name


def test_only_the_mean_loss_takes_the_kernel_for_it() -> None:
    """Scores come from `losses`, which has one implementation."""
    h, calls = tiny(), []

    def spy(x: Tensor, table: Tensor, targets: Tensor, softcap: train_gpt.Softcap) -> Tensor:
        calls.append((x, table, targets, softcap))
        return train_gpt.mean_token_loss(x, table, targets, softcap)

    kernels = train_gpt.Kernels(mean_loss=spy)
    trainer = train_gpt.Trainer(h, cpu_runtime(), kernels)
    inputs, targets = batch(h, rows=h.train_batch_tokens // h.train_seq_len)
    trainer.model(inputs, targets)
    assert not calls
    trainer.train_step(torch.cat((inputs, targets[:, -1:]), dim=1), 1.0)
    [(x, table, given, softcap)] = calls
    assert table is trainer.model.tok_emb and softcap == h.softcap
    assert torch.equal(given, targets)
    torch.testing.assert_close(x.square().mean(-1), torch.ones(x.shape[:2]), rtol=1e-3, atol=0)


def test_every_layer_has_its_own_part_of_each_gradient() -> None:
    h = tiny()
    grads = gradients(tiny_model(h), h)
    for name in set(grads) - {"tok_emb", "ve_emb", "smear_gate", "smear_token"}:
        grad = grads[name]
        assert grad is not None
        assert (grad.flatten(1) if grad.dim() > 1 else grad[:, None]).abs().amax(1).min() > 0, name


def test_gradients_equal_finite_differences_of_the_reference() -> None:
    h = tiny(train_seq_len=8, train_batch_tokens=16, micro_batch_tokens=16, num_layers=2)
    model = tiny_model(h, torch.float64)
    inputs, targets = batch(h, rows=1)
    with in_float64():
        model(inputs, targets).sum().backward()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        assert p.grad is not None
        index = int(p.grad.abs().argmax())
        values = []
        for shift in (1e-5, -1e-5):
            weights[name].view(-1)[index] += shift
            values.append(ref_losses(weights, h, inputs[0], targets[0]).sum())
            weights[name].view(-1)[index] -= shift
        slope = float(values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(float(p.grad.view(-1)[index]), rel=1e-5), name


def test_the_value_embedding_is_trained() -> None:
    h = tiny()
    trainer = train_gpt.Trainer(h, cpu_runtime(), train_gpt.Kernels())
    names = ("ve_emb", "ve_proj", "ve_scale")
    before = {name: getattr(trainer.model, name).detach().clone() for name in names}
    inputs, targets = batch(h, rows=h.train_batch_tokens // h.train_seq_len)
    tokens = torch.cat((inputs, targets[:, -1:]), dim=1)
    for _ in range(4):  # outputs start at zero, so its gradient needs two steps to arrive
        trainer.train_step(tokens, 1.0)
    for name in names:
        moved = (getattr(trainer.model, name).detach() - before[name]).abs()
        assert moved.max() > 1e-4, name
        assert torch.isfinite(moved).all()
    seen = torch.zeros(h.vocab_size, dtype=torch.bool)
    seen[inputs] = True
    moved = (trainer.model.ve_emb.detach() - before["ve_emb"]).abs().amax(1)
    assert (moved[seen] > 1e-5).all() and (moved[~seen] == 0).all()


# Initial weights and the partition


def test_initial_output_projections_are_zero() -> None:
    h = tiny()
    w = train_gpt.initial_weights(h)
    assert not w["qo_bank"][h.num_layers :].any()
    assert not w["mlp_bank"][h.num_layers :].any()


def test_initial_readers_are_orthogonal() -> None:
    h = tiny()
    w = train_gpt.initial_weights(h)
    for matrix in (*w["qo_bank"][: h.num_layers], *w["kv_bank"], *w["mlp_bank"][: h.num_layers]):
        small = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        torch.testing.assert_close(small, torch.eye(len(small)), rtol=0, atol=1e-5)


def test_an_untrained_model_scores_near_the_uniform_loss() -> None:
    h = tiny()
    model = train_gpt.GPT(h, train_gpt.initial_weights(h), train_gpt.Kernels())
    assert float(model(*batch(h)).detach().mean()) == pytest.approx(
        math.log(h.vocab_size), rel=0.02
    )


def test_initial_weights_follow_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = train_gpt.initial_weights(tiny(seed=3))
    torch.manual_seed(6)
    state = torch.get_rng_state()
    second = train_gpt.initial_weights(tiny(seed=3))
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    assert first.keys() == second.keys() == parameter_table(tiny()).keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train_gpt.initial_weights(tiny(seed=4))
    for name in ("tok_emb", "ve_emb", "qo_bank", "kv_bank", "mlp_bank"):
        assert not torch.equal(first[name], other[name]), name


def test_optimizer_groups_partition_the_parameters() -> None:
    h = tiny()
    model = tiny_model(h)
    optimizer = train_gpt.Optimizer(model, h, cpu_runtime())
    names = [*(bank.name for bank in optimizer.banks), *optimizer.small.parameters]
    assert len(set(names)) == len(names)
    assert set(names) == {name for name, _ in model.named_parameters()}


def test_the_reference_runs_shape_has_its_parameter_count() -> None:
    h = Hyperparameters(mlp_hidden=1408, num_heads=8, num_kv_heads=4, rope_dims=16)
    counted = sum(math.prod(row.shape) for row in parameter_table(h).values())
    assert h.parameters() == counted
    assert abs(counted - 25_224_291) < 20_000
