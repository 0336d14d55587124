"""Claims about the artifact: exact, deterministic, refused when damaged, never over its budget."""

import functools
import hashlib
import math
import pickle
import struct
import zlib

import pytest
import support
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import train_gpt
from train_gpt import RunError, pack, pack_to_budget, unpack

H = support.tiny()
STEP = 0.02


@functools.cache
def state(seed: int = 0) -> dict[str, Tensor]:
    return support.tiny_weights(H, seed)


@functools.cache
def artifact() -> bytes:
    return pack(state(), H, STEP)


def artifact_refusal(content: bytes) -> str:
    """The message with which an artifact is refused, which must name the file."""
    message = support.refusal(unpack, content, "folder/final_model.ptz")
    assert message.startswith("folder/final_model.ptz: ")
    return message


# Round trip


def test_what_is_read_back_has_all_names_and_shapes() -> None:
    """And the architecture."""
    architecture, read = unpack(artifact())
    assert list(read) == list(state())
    for name, w in state().items():
        assert read[name].shape == w.shape
        assert read[name].dtype == torch.float32
    assert architecture == {name: getattr(H, name) for name in train_gpt.ARCHITECTURE}


def test_a_rounded_row_holds_multiples_of_one_scale() -> None:
    _, read = unpack(artifact())
    for name, g in train_gpt.export_grids(H).items():
        rows = read[name].reshape(len(g.qmax), -1, read[name].shape[-1]).double()
        original = state()[name].reshape(rows.shape)
        for matrix, before, qmax, ratio in zip(rows, original, g.qmax, g.step_ratio, strict=True):
            for row, row_before in zip(matrix[:5], before[:5], strict=True):
                own = float(row_before.abs().max()) / qmax
                scale = max(own, STEP * ratio) if ratio else own
                if ratio and own < STEP * ratio:  # not clipped: the scale is the common step
                    codes = row / scale
                    assert float((codes - codes.round()).abs().max()) < 0.01
                assert float((row - row_before).abs().max()) <= own * qmax
                assert len(row.abs().unique()) <= qmax + 1


def test_gains_are_stored_in_float16() -> None:
    _, read = unpack(artifact())
    gains = state().keys() - train_gpt.export_grids(H).keys()
    assert gains == {
        "smear_gate", "smear_token", "resid_mix", "attn_scale", "mlp_scale", "q_gain",
        "skip_weight", "ve_scale", "attn_gate",
    }  # fmt: skip
    for name in gains:
        assert torch.equal(read[name], state()[name].to(torch.float16).to(torch.float32)), name


def test_frames_decode_to_the_codes_that_were_packed() -> None:
    header, frames = train_gpt.read_frames(artifact(), "a.ptz")
    assert [entry["name"] for entry in header["tensors"]] == list(frames) == list(state())
    grids = train_gpt.export_grids(H)
    for entry in header["tensors"]:
        name, w = entry["name"], state()[entry["name"]]
        assert entry["shape"] == list(w.shape)
        assert entry["kind"] == ("codes" if name in grids else "float16")
        if name not in grids:
            assert frames[name] == [w.half().numpy().tobytes()]
            continue
        grid = [
            torch.tensor(x).float().view(-1, 1, 1)
            for x in (grids[name].qmax, grids[name].step_ratio)
        ]
        codes, scales = train_gpt.decode_codes(frames[name], entry["shape"])
        expected = train_gpt.quantize(w.reshape(-1, *w.shape[-2:]), torch.tensor(STEP), *grid)
        assert len(frames[name]) == 1 + len(codes), "one frame of scales, then one a matrix"
        assert torch.equal(codes, expected[0]) and codes.dtype == torch.int8
        assert torch.equal(scales, expected[1]) and scales.dtype == torch.float32


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1e-3, 1.0, 30.0]),
       st.sampled_from([1e-5, 0.003, 0.1, 10.0]))  # fmt: skip
def test_the_model_read_back_is_the_one_that_the_grid_gives(
    seed: int, scale: float, step: float
) -> None:
    weights = {name: w * scale for name, w in state(seed % 5).items()}
    _, read = unpack(pack(weights, H, step))
    grids = train_gpt.export_grids(H)
    for name, w in weights.items():
        if name not in grids:
            assert torch.equal(read[name], w.half().float()), name
            continue
        g = [torch.tensor(x).float().view(-1, 1, 1) for x in (grids[name].qmax,
                                                             grids[name].step_ratio)]  # fmt: skip
        expected = train_gpt.fake_quantize(w.reshape(-1, *w.shape[-2:]), torch.tensor(step), *g)
        assert torch.equal(read[name], expected.view(w.shape)), name


def test_subnormal_gains_and_negative_zero_survive() -> None:
    weights = dict(state())
    weights["ve_scale"] = torch.tensor([6e-8, -0.0])
    _, read = unpack(pack(weights, H, STEP))
    assert read["ve_scale"].tolist() == weights["ve_scale"].half().tolist()
    assert math.copysign(1, read["ve_scale"][1]) == -1


def test_the_same_weights_give_the_same_bytes() -> None:
    assert pack(state(), H, STEP) == artifact()
    copies = {name: w.clone() for name, w in state().items()}
    assert pack(copies, H, STEP) == artifact()


def test_other_weights_or_another_step_give_other_bytes() -> None:
    assert pack(state(1), H, STEP) != artifact()
    assert pack(state(), H, STEP * 1.5) != artifact()


def test_packing_takes_strided_weights_and_changes_none() -> None:
    before = {name: w.clone() for name, w in state().items()}
    strided = dict(state())
    strided["qo_bank"] = state()["qo_bank"].mT.contiguous().mT
    assert not strided["qo_bank"].is_contiguous()
    assert pack(strided, H, STEP) == artifact()
    assert all(torch.equal(w, before[name]) for name, w in state().items())


def test_weights_cut_from_their_gradients_can_be_packed() -> None:
    grad = {name: torch.nn.Parameter(w.clone()) for name, w in state().items()}
    detached = {name: p.detach() for name, p in grad.items()}
    assert pack(detached, H, STEP) == artifact()


def test_reading_unpickles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"),
                         (torch, "load")):  # fmt: skip
        monkeypatch.setattr(module, name, refuse)
    _, read = unpack(artifact())
    assert read.keys() == state().keys()


# Damage


@settings(max_examples=150)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
@example(0.0, 1)
@example(8 / 40_000, 3)
def test_any_changed_byte_is_refused(where: float, mask: int) -> None:
    damaged = bytearray(artifact())
    damaged[int(where * len(damaged))] ^= mask
    artifact_refusal(bytes(damaged))


def test_any_changed_byte_of_the_fixed_fields_is_refused() -> None:
    for position in range(64):
        damaged = bytearray(artifact())
        damaged[position] ^= 1
        artifact_refusal(bytes(damaged))


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 11, 12, 40, 43, 44, 47, 48, 49, 200, -100, -1])
def test_a_truncated_artifact_is_refused(kept: int) -> None:
    artifact_refusal(artifact()[:kept])


def test_bytes_after_the_end_are_refused() -> None:
    artifact_refusal(artifact() + b"\0")


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00.", zlib.compress(bytes(1000)),
     b"#!/usr/bin/env python\n" * 10, bytes(5000)],
    ids=["empty", "zip", "pickle", "zlib", "text", "zeros"],
)  # fmt: skip
def test_a_foreign_file_is_refused_as_no_artifact(content: bytes) -> None:
    message = artifact_refusal(content)
    assert "not an artifact" in message
    assert "final_model.ptz of a run" in message


def test_another_version_is_refused_by_its_number() -> None:
    other = bytearray(artifact())
    struct.pack_into("<I", other, 8, 77)
    assert "version 1, found 77" in artifact_refusal(bytes(other))


def test_a_damaged_body_is_told_from_a_foreign_file() -> None:
    damaged = artifact()[:-50] + bytes(50)
    message = artifact_refusal(damaged)
    assert "damaged" in message
    assert "not an artifact" not in message


def test_the_checksum_is_that_of_the_body() -> None:
    assert artifact()[12:44] == hashlib.sha256(artifact()[44:]).digest()


@pytest.mark.parametrize("name", train_gpt.ARCHITECTURE)
def test_another_architecture_is_refused_with_what_to_set(
    name: str,
) -> None:
    architecture, _ = unpack(artifact())
    train_gpt.check_architecture(H, architecture, "a.ptz")
    architecture[name] = architecture[name] + 2
    message = support.refusal(train_gpt.check_architecture, H, architecture, "a.ptz")
    assert message.startswith("a.ptz: ")
    assert f"{name.upper()}={architecture[name]}" in message


@pytest.mark.parametrize("name", ["rope_base", "later"])
def test_an_architecture_that_lacks_or_adds_a_field_is_of_another_version(name: str) -> None:
    """No setting helps, and what is unknown here would change the scores in silence."""
    architecture, _ = unpack(artifact())
    if architecture.pop(name, None) is None:
        architecture[name] = 1
    message = support.refusal(train_gpt.check_architecture, H, architecture, "a.ptz")
    assert message.startswith("a.ptz: of another version of this program")
    assert f"{name.upper()}; use the train_gpt.py that wrote it" in message


# Budget


def packed(weights: dict[str, Tensor], budget: int) -> bytes:
    return pack_to_budget(weights, H, budget, lambda line: None)


@pytest.mark.parametrize(
    ("scale", "budget"),
    [(1e-7, 12_345), (1e-3, 9_000), (0.05, 16_000), (1.0, 15_500), (40.0, 16_000), (1000.0, 20_000),
     (1.0, 26_000)],
)  # fmt: skip
def test_an_artifact_never_reaches_its_budget(scale: float, budget: int) -> None:
    weights = {name: w * scale for name, w in state(2).items()}
    blob = packed(weights, budget)
    assert len(blob) < budget
    _, read = unpack(blob)
    assert all(bool(torch.isfinite(w).all()) for w in read.values())


@settings(max_examples=8)
@given(st.integers(0, 4), st.floats(-8, 3), st.floats(0, 1), st.floats(0, 6),
       st.integers(9_000, 40_000))  # fmt: skip
def test_any_finite_weights_fit_below_any_budget_and_come_back(
    seed: int, log_scale: float, zeros: float, log_outlier: float, budget: int
) -> None:
    """Weights of any scale, with rows of zeros and one huge outlier in every matrix."""
    generator = torch.Generator().manual_seed(seed)
    weights = dict(state(seed))
    for name in train_gpt.export_grids(H):
        w = weights[name] * 10.0**log_scale
        w = w * (torch.rand(*w.shape[:-1], 1, generator=generator) >= zeros)
        w[..., 1, 2] = 10.0 ** (log_scale + log_outlier)
        weights[name] = w
    blob = packed(weights, budget)
    assert len(blob) < budget
    assert blob == packed(weights, budget)
    _, read = unpack(blob)
    for name, w in weights.items():
        assert read[name].shape == w.shape and bool(torch.isfinite(read[name]).all()), name
        if name not in train_gpt.export_grids(H):
            assert torch.equal(read[name], w.half().float()), name
            continue
        # A weight that rounds to a code other than zero is at least half of what it becomes.
        assert bool((read[name].abs() <= 2.0001 * weights[name].abs()).all()), name


@pytest.mark.parametrize("budget", [12_000, 16_000, 20_000])
def test_a_budget_that_binds_is_used_to_within_a_percent(budget: int) -> None:
    assert 0.99 * budget < len(packed(state(), budget)) < budget


def test_a_larger_budget_gives_weights_nearer_the_trained() -> None:
    errors = []
    for budget in (9_000, 13_000, 20_000):
        _, read = unpack(packed(state(), budget))
        trained = state()["mlp_bank"]
        errors.append(float((read["mlp_bank"] - trained).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 3 * errors[-1]


def test_a_budget_beyond_the_codes_gives_the_finest_weights() -> None:
    """The rest of the budget is left unused."""
    blob = packed(state(), 10**7)
    assert len(blob) < 40_000
    _, read = unpack(blob)
    for name in train_gpt.export_grids(H):
        w = state()[name]
        widest = w.abs().amax(-1, keepdim=True) / 31
        assert bool(((read[name] - w).abs() <= 0.5 * w.abs().amax()).all())
        error = (read[name] - w).square().mean()
        assert float(error) <= float((widest.square() / 12).mean()) * 1.5, name


def test_a_budget_that_nothing_fits_is_refused_with_the_remedy() -> None:
    for budget in (1, 1_500):
        with pytest.raises(RunError, match=rf"{budget} bytes.*ARTIFACT_BYTES"):
            packed(state(), budget)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["qo_bank", "tok_emb", "ve_scale"])
def test_weights_that_are_not_finite_are_refused_by_name(name: str, value: float) -> None:
    weights = {n: w.clone() for n, w in state().items()}
    weights[name].view(-1)[1] = value
    with pytest.raises(RunError, match=rf"{name}.*lower learning rate"):
        packed(weights, 20_000)


def test_a_gain_past_float16_is_refused() -> None:
    weights = {n: w.clone() for n, w in state().items()}
    weights["ve_scale"][0] = 65_600.0
    with pytest.raises(RunError, match="ve_scale"):
        packed(weights, 20_000)


def test_a_matrix_past_float16_is_packed() -> None:
    weights = {n: w.clone() for n, w in state().items()}
    weights["qo_bank"][0, 0, 0] = 1e6
    _, read = unpack(packed(weights, 20_000))
    assert float(read["qo_bank"][0, 0, 0]) >= 0.5e6 * (1 - 1e-6)


def test_an_artifact_of_exactly_the_budget_is_refused() -> None:
    """As the challenge's cap is: weights of zeros take the same bytes at every grid step."""
    zeros = {name: torch.zeros_like(w) for name, w in state().items()}
    size = len(packed(zeros, 20_000))
    assert len(packed(zeros, size + 1)) == size
    with pytest.raises(RunError, match=f"nothing fits {size} bytes"):
        packed(zeros, size)


def test_weights_of_zeros_can_be_packed() -> None:
    weights = {name: torch.zeros_like(w) for name, w in state().items()}
    _, read = unpack(packed(weights, 20_000))
    assert not any(w.any() for w in read.values())


def test_each_attempt_is_logged_with_its_size() -> None:
    lines: list[str] = []
    blob = pack_to_budget(state(), H, 16_000, lines.append)
    assert 1 <= len(lines) <= 12
    assert any(f"packed_bytes:{len(blob)} " in line for line in lines)


@pytest.mark.parametrize(("budget", "most"), [(16_000, 5), (20_000, 5), (60_000, 1)])
def test_the_attempts_end_with_the_first_that_is_full_or_the_finest(budget: int, most: int) -> None:
    """At full size one takes seconds."""
    lines: list[str] = []
    pack_to_budget(state(), H, budget, lines.append)
    assert len(lines) <= most


def test_every_attempt_that_is_too_large_doubles_what_stays_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets: list[float] = []

    def grid_step(size_of: object, target: float) -> float:
        targets.append(target)
        return 0.01

    monkeypatch.setattr(train_gpt, "fit_grid_step", grid_step)
    monkeypatch.setattr(train_gpt, "pack_trial", lambda *_: (bytes(16_000), 15_000.0))
    message = support.refusal(pack_to_budget, state(), H, 16_000, print)
    assert "nothing fits 16000 bytes" in message
    free = [15_000 - target for target in targets[1:]]  # the first one guesses zstd's overhead
    assert free == pytest.approx([8.0 * 2**attempt for attempt in range(1, 12)])


def test_the_entropy_in_the_log_is_that_of_the_codes() -> None:
    lines: list[str] = []
    pack_to_budget(state(), H, 20_000, lines.append)
    fields = dict(field.split(":") for field in lines[-1].split() if ":" in field)
    step, bits = float(fields["grid_step"]), 0.0
    for name, g in train_gpt.export_grids(H).items():
        w = state()[name].reshape(len(g.qmax), -1, state()[name].shape[-1])
        for matrix, qmax, ratio in zip(w, g.qmax, g.step_ratio, strict=True):
            one = [torch.full((1, 1, 1), float(x)) for x in (qmax, ratio)]
            codes, _ = train_gpt.quantize(matrix[None], torch.tensor(step), *one)
            counts = codes.flatten().unique(return_counts=True)[1].double()
            bits -= float((counts * torch.log2(counts / counts.sum())).sum())
    assert float(fields["entropy_bytes"]) == pytest.approx(bits / 8, rel=1e-3)


# The last iterate and its average on late QAT's grid

STAGES = {"trained": state(1), "averaged": state(2)}


def packed_stages(grid_step: float, budget: int, share: float = 0.3) -> tuple[bytes, list[str]]:
    lines: list[str] = []
    h = support.tiny(swa_share=share)
    stages = train_gpt.with_blend(STAGES, h, grid_step)
    return train_gpt.pack_stages(stages, h, grid_step, budget, lines.append), lines


@pytest.mark.parametrize("share, stage", [(0.0, "trained"), (1.0, "averaged")])
def test_a_share_of_none_or_all_ships_one_stage(share: float, stage: str) -> None:
    blob, lines = packed_stages(STEP, 10**6, share)
    assert blob == pack(STAGES[stage], H, STEP)
    assert len(lines) == 1 and f"grid_step:{STEP} " in lines[0]


def test_a_share_between_ships_weights_between() -> None:
    """On the very grid: no other grid step is looked for, whatever bytes are left."""
    blob, _ = packed_stages(STEP, 10**6, 0.25)
    middle = {
        name: w + 0.25 * (STAGES["averaged"][name] - w) for name, w in STAGES["trained"].items()
    }
    _, read = unpack(blob)
    _, expected = unpack(pack(middle, H, STEP))
    for name, w in expected.items():
        assert float((read[name] != w).float().mean()) < 1e-3, name  # but for ties


def test_what_late_qat_has_rounded_is_shipped_bit_for_bit() -> None:
    """Of its last iterate, as the model has run with it in training."""
    late_qat = train_gpt.LateQAT(H, support.cpu_runtime())
    late_qat.grid_step.fill_(STEP)
    working = late_qat.rounded(STAGES["trained"])
    late_qat.on = True
    blob, _ = packed_stages(late_qat.step_or_zero(), 10**6, share=0.0)
    _, read = unpack(blob)
    for name in train_gpt.export_grids(H):
        assert torch.equal(read[name], working[name]), name


def test_a_grid_that_does_not_fit_gives_way_to_the_average_on_another() -> None:
    whole, _ = packed_stages(STEP, 10**6)
    budget = len(whole) - 1
    blob, lines = packed_stages(STEP, budget)
    assert blob == packed(STAGES["averaged"], budget) and len(blob) < budget
    assert any("does not fit" in line for line in lines)
    fitting, _ = packed_stages(STEP, len(whole) + 1)
    assert fitting == whole


def test_without_late_qat_the_average_fills_the_budget() -> None:
    assert train_gpt.with_blend(STAGES, H, 0.0) == STAGES, "there is no blend to score"
    blob, lines = packed_stages(0.0, 20_000)
    assert blob == packed(STAGES["averaged"], 20_000)
    assert not any("does not fit" in line for line in lines)


def test_a_last_iterate_that_is_not_finite_is_refused() -> None:
    trained = {name: w.clone() for name, w in STAGES["trained"].items()}
    trained["mlp_bank"][0, 0, 0] = math.nan
    stages = train_gpt.with_blend(STAGES | {"trained": trained}, H, STEP)
    message = support.refusal(train_gpt.pack_stages, stages, H, STEP, 10**6, print)
    assert "mlp_bank is not finite" in message


def test_a_blend_of_exactly_the_budget_does_not_fit() -> None:
    """The cap is a size that a submission must stay below."""
    blob, _ = packed_stages(STEP, 10**6)
    assert packed_stages(STEP, len(blob) + 1)[0] == blob
    smaller, lines = packed_stages(STEP, len(blob))
    assert len(smaller) < len(blob) and any("does not fit" in line for line in lines)


@given(share=st.floats(0, 1), budget=st.integers(9_000, 60_000))
@settings(max_examples=15, deadline=None)
def test_no_blend_is_over_its_budget(share: float, budget: int) -> None:
    blob, _ = packed_stages(STEP, budget, share)
    assert len(blob) < budget
