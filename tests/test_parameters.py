"""Claims about the two tables that a model is made from: its parameters and its layers."""

import math
from collections.abc import Sequence

import pytest
import torch
from support import in_float64, tiny, tiny_model, tiny_weights
from torch import Tensor, nn

import train_gpt
from train_gpt import Hyperparameters, LayerPlan, Role, layer_plan, parameter_table

# Shapes and groups

TINY_ROWS = {  # 4 layers of width 32, 4 heads and 2 for keys of 8, 64 tokens
    "tok_emb": ((64, 32), "embed"),
    "ve_emb": ((64, 8), "embed"),
    "qo_bank": ((8, 32, 32), "matrix"),
    "kv_bank": ((8, 16, 32), "matrix"),
    "mlp_bank": ((8, 48, 32), "matrix"),
    "ve_proj": ((1, 16, 8), "matrix"),
    "smear_gate": ((32,), "scalar"),
    "smear_token": ((12,), "scalar"),
    "resid_mix": ((4, 2, 32), "scalar"),
    "attn_scale": ((4, 32), "scalar"),
    "mlp_scale": ((4, 32), "scalar"),
    "q_gain": ((4, 4), "scalar"),
    "skip_weight": ((2, 32), "scalar"),
    "ve_scale": ((2,), "scalar"),
    "attn_gate": ((4, 4, 8), "scalar"),
}
CARD_ROWS = {  # 11 layers of width 512, 4 heads and 2 for keys of 128, 1024 tokens; no gates
    "tok_emb": ((1024, 512), "embed"),
    "ve_emb": ((1024, 128), "embed"),
    "qo_bank": ((22, 512, 512), "matrix"),
    "kv_bank": ((22, 256, 512), "matrix"),
    "mlp_bank": ((22, 2048, 512), "matrix"),
    "ve_proj": ((1, 256, 128), "matrix"),
    "smear_gate": ((512,), "scalar"),
    "smear_token": ((12,), "scalar"),
    "resid_mix": ((11, 2, 512), "scalar"),
    "attn_scale": ((11, 512), "scalar"),
    "mlp_scale": ((11, 512), "scalar"),
    "q_gain": ((11, 4), "scalar"),
    "skip_weight": ((5, 512), "scalar"),
    "ve_scale": ((2,), "scalar"),
}
ROLES = {
    "qo_bank": (Role("q", False, False), Role("o", True, False)),
    "kv_bank": (Role("k", False, False), Role("v", False, False)),
    "mlp_bank": (Role("up", False, False), Role("down", True, True)),
}
CASES = [(tiny(), TINY_ROWS), (Hyperparameters(), CARD_ROWS)]
each_case = pytest.mark.parametrize(("h", "rows"), CASES, ids=["tiny", "card"])
Rows = dict[str, tuple[tuple[int, ...], str]]


@each_case
def test_every_parameter_has_this_shape_and_group(h: Hyperparameters, rows: Rows) -> None:
    table = parameter_table(h)
    assert {name: (row.shape, row.group) for name, row in table.items()} == rows


@each_case
def test_banks_alone_have_roles(h: Hyperparameters, rows: Rows) -> None:
    table = parameter_table(h)
    assert {name: row.roles for name, row in table.items() if row.roles} == ROLES


@each_case
def test_scalars_alone_have_no_grid(h: Hyperparameters, rows: Rows) -> None:
    without = {name for name, row in parameter_table(h).items() if row.grid is None}
    assert without == {name for name, (_, group) in rows.items() if group == "scalar"}


@pytest.mark.parametrize("gate_dims", [0, 8])
def test_the_model_holds_the_table_and_nothing_else(gate_dims: int) -> None:
    h = tiny(gate_dims=gate_dims)
    held = {name: tuple(p.shape) for name, p in tiny_model(h).named_parameters()}
    assert held == {name: row.shape for name, row in parameter_table(h).items()}
    assert ("attn_gate" in held) == (gate_dims > 0)


def test_every_row_of_the_table_changes_the_losses() -> None:
    h = tiny()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, h.vocab_size, (4, h.train_seq_len + 1), generator=generator)
    weights = {name: w.double() for name, w in tiny_weights(h).items()}

    def losses(changed: str = "") -> Tensor:
        ours = {name: 1.1 * w if name == changed else w for name, w in weights.items()}
        model = train_gpt.GPT(h, ours, train_gpt.Kernels())
        with in_float64(), torch.no_grad():
            return model(tokens[:, :-1], tokens[:, 1:])

    before = losses()
    assert torch.equal(losses(), before)
    for name in parameter_table(h):
        assert float((losses(name) - before).abs().max()) > 1e-6, name


# Starting values

CONSTANTS = {  # every element; the smoke preset starts q_gain as the card does
    "smear_gate": 0.0, "smear_token": 0.0, "attn_scale": 1.0, "mlp_scale": 1.0, "q_gain": 4.0,
    "skip_weight": 1.0, "ve_scale": 0.1, "attn_gate": 0.0, "ve_proj": 0.0,
}  # fmt: skip


def test_vectors_and_the_value_projection_start_constant() -> None:
    w = train_gpt.initial_weights(tiny())
    for name, value in CONSTANTS.items():
        assert torch.equal(w[name], torch.full_like(w[name], value)), name


def test_the_gain_of_queries_starts_where_its_setting_says() -> None:
    assert train_gpt.initial_weights(tiny(qk_gain_init=1.5))["q_gain"].unique().tolist() == [1.5]


def test_the_residual_mix_starts_without_the_embedding() -> None:
    mix = train_gpt.initial_weights(tiny())["resid_mix"]
    assert bool((mix[:, 0] == 1).all()) and bool((mix[:, 1] == 0).all())


def test_random_starts_are_drawn_in_this_order_and_spread() -> None:
    """Tables, then the matrices that read the stream, layer by layer."""
    h = tiny(seed=5, embed_init_std=0.02)
    w = train_gpt.initial_weights(h)
    generator = torch.Generator().manual_seed(5)
    tok_emb = torch.empty(64, 32).normal_(std=0.02, generator=generator)
    ve_emb = torch.empty(64, 8).normal_(std=0.01, generator=generator)

    def orthogonal(count: int, rows: int) -> Tensor:
        drawn = [nn.init.orthogonal_(torch.empty(rows, 32), generator=generator)
                 for _ in range(count)]  # fmt: skip
        return torch.stack(drawn)

    q, k_and_v, up = orthogonal(4, 32), orthogonal(8, 16), orthogonal(4, 48)
    assert torch.equal(w["tok_emb"], tok_emb)
    assert torch.equal(w["ve_emb"], ve_emb)
    assert torch.equal(w["qo_bank"], torch.cat((q, torch.zeros(4, 32, 32))))
    assert torch.equal(w["kv_bank"], k_and_v)
    assert torch.equal(w["mlp_bank"], torch.cat((up, torch.zeros(4, 48, 32))))


def test_every_parameter_has_a_start_that_is_tested_here() -> None:
    drawn = {"tok_emb", "ve_emb", "qo_bank", "kv_bank", "mlp_bank"}
    assert CONSTANTS.keys() | drawn | {"resid_mix"} == parameter_table(tiny()).keys()


# Outputs a matrix has for each input


@pytest.mark.parametrize("padded", [8, 9])
@pytest.mark.parametrize(
    ("name", "first_role", "second_role"),
    [
        ("qo_bank", 1.0, 1.0),  # 32 -> 32
        ("kv_bank", 0.5, 0.5),  # 32 -> 16
        ("mlp_bank", 1.5, 1 / 1.5),  # 32 -> 48, and back again though stored as 48 x 32
    ],
)
def test_the_fan_ratio_of_a_matrix_is_that_of_its_role(
    name: str, first_role: float, second_role: float, padded: int
) -> None:
    ratios = train_gpt.fan_ratios(parameter_table(tiny())[name], padded)
    expected = [first_role] * 4 + [second_role] * 4 + [second_role] * (padded - 8)
    assert ratios == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("padded", [1, 2, 3])
def test_the_value_projection_has_one_fan_ratio(padded: int) -> None:
    ratios = train_gpt.fan_ratios(parameter_table(tiny())["ve_proj"], padded)
    assert ratios == [2.0] * padded  # 8 -> 16


# Layers

Layer = tuple[int, bool, int | None, int | None, bool]
CARD_LAYERS: list[Layer] = [  # number, saves skip, skip, value embedding, excludes self
    (0, True, None, None, False),
    (1, True, None, None, False),
    (2, True, None, None, False),
    (3, True, None, None, False),
    (4, True, None, None, False),
    (5, False, None, None, False),
    (6, False, 0, None, False),
    (7, False, 1, None, True),
    (8, False, 2, None, True),
    (9, False, 3, 0, True),
    (10, False, 4, 1, True),
]
TINY_LAYERS: list[Layer] = [
    (0, True, None, None, False),
    (1, True, None, None, False),
    (2, False, 0, 0, True),
    (3, False, 1, 1, True),
]
ODD_LAYERS: list[Layer] = [
    (0, True, None, None, False),
    (1, True, None, None, False),
    (2, False, None, 0, False),
    (3, False, 0, 1, False),
    (4, False, 1, 2, True),
]
TWO_LAYERS: list[Layer] = [(0, True, None, None, False), (1, False, 0, 0, False)]
DEPTH_SCALES = (  # 1 / sqrt(1), 1 / sqrt(2) ...
    1.0, 0.70710678, 0.57735027, 0.5, 0.44721360, 0.40824829, 0.37796447, 0.35355339, 0.33333333,
    0.31622777, 0.30151134,
)  # fmt: skip


@pytest.mark.parametrize(
    ("h", "layers"),
    [
        (Hyperparameters(), CARD_LAYERS),
        (tiny(), TINY_LAYERS),
        (tiny(num_layers=5, xsa_layers=1, ve_layers=3), ODD_LAYERS),
        (tiny(num_layers=2, xsa_layers=0, ve_layers=1), TWO_LAYERS),
    ],
    ids=["card", "tiny", "odd-depth", "two-layers"],
)
def test_the_plan_of_the_layers_is_this(h: Hyperparameters, layers: Sequence[Layer]) -> None:
    plan = layer_plan(h)
    scales = [layer.depth_scale for layer in plan]
    assert scales == pytest.approx(DEPTH_SCALES[: len(layers)], rel=1e-7)
    assert list(plan) == [
        LayerPlan(
            number=number,
            depth_scale=scale,
            saves_skip=saves_skip,
            skip=skip,
            value_embedding=value_embedding,
            excludes_self=excludes_self,
        )
        for scale, (number, saves_skip, skip, value_embedding, excludes_self) in zip(
            scales, layers, strict=True
        )
    ]


def test_no_layer_excludes_itself_and_all_add_the_value_embedding() -> None:
    """At the ends of both settings."""
    plan = layer_plan(tiny(xsa_layers=0, ve_layers=4))
    assert [layer.excludes_self for layer in plan] == [False] * 4
    assert [layer.value_embedding for layer in plan] == [0, 1, 2, 3]
    assert all(layer.excludes_self for layer in layer_plan(tiny(xsa_layers=4)))


def test_the_depth_scale_is_one_over_the_root_of_the_number() -> None:
    for number in range(1, 50):
        assert train_gpt.depth_scale(number - 1) == pytest.approx(1 / math.sqrt(number), rel=1e-12)
