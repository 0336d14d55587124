"""Claims about bench/step_time.py and bench/attention.py, as far as a CPU can tell."""

import dataclasses
import functools
import itertools
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import REPO, TINY, completed, cpu_runtime, refusal, train_gpt

sys.path.insert(0, str(REPO / "bench"))
import step_time
import timing


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("linear_relu2_kernel", "products with relu^2"),
        ("heads_kernel", "heads"),
        ("softcap_loss_kernel", "elementwise and norms"),
        ("nvjet_tst_128x256", "matrix products"),
        ("triton_red_fused_mean", "elementwise and norms"),
        ("Memcpy DtoD", "memory"),
        ("something", "other"),
    ],
)
def test_a_kernel_belongs_to_one_group(kernel: str, group: str) -> None:
    assert step_time.group_of(kernel) == group


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The measurement on a CPU: nothing is traced, and a graph runs what it was captured from."""

    def capture(function: Any, pool: Any, *held: Any) -> Any:
        function(*held)
        return function

    def trace(function: Any) -> dict[str, Any]:
        function()
        kernels = {"linear_relu2_kernel": 2.0, "heads_kernel": 1.0}
        return {"kernels": kernels, "launches": 9, "span": 4.0, "idle": 1.0}

    milliseconds = functools.partial(timing.milliseconds, on_cuda=False, repeats=2, warm=0)
    monkeypatch.setattr(step_time, "gpu_ms", milliseconds)
    monkeypatch.setattr(step_time, "kernel_times", trace)
    monkeypatch.setattr(train_gpt, "capture", capture)
    monkeypatch.setattr(train_gpt.Runtime, "start", lambda h, env: cpu_runtime())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2**30)
    monkeypatch.setenv("PRESET", "smoke")
    for name, value in {**TINY, "early_seq_len": 16}.items():
        monkeypatch.setenv(name.upper(), str(value))
    lengths = []

    def loss_share(model: Any, tokens: Any, share: float, seq_len: int) -> Any:
        lengths.append(seq_len)
        return plain_loss_share(model, tokens, share, seq_len)

    plain_loss_share = train_gpt.loss_share
    monkeypatch.setattr(train_gpt, "loss_share", loss_share)
    return {**step_time.measure(), "lengths": lengths}


def test_every_phase_is_measured_and_printed(measured: dict[str, Any]) -> None:
    for name in ("forward", "forward_backward", "eval_forward", "graph", "step", "step_with_qat"):
        assert measured[name] > 0
    assert measured["step_short"] > 0
    assert [length for length, _ in itertools.groupby(measured["lengths"])] == [32, 16]
    table = step_time.table(measured)
    assert table.startswith(f"a GPU, torch {torch.__version__}, {TINY['train_batch_tokens']} ")
    phases = re.findall(r"^([a-z][\w ,+]+?) +(-?[\d.]+) ms$", table, re.M)
    found = {name: float(ms) for name, ms in phases}
    assert found["step"] == pytest.approx(measured["step"], abs=0.006)
    optimizer = measured["step"] - measured["graph"]
    assert found["optimizer"] == pytest.approx(optimizer, abs=0.006)
    assert found["host gap"] == 1.0
    assert re.search(r"^products with relu\^2 +2.00 ms +roofline 0.0$", table, re.M)


def test_the_work_of_a_step_is_that_of_its_shape() -> None:
    h = train_gpt.Hyperparameters()
    card = step_time.Work.of(h)
    dense = sum(
        math.prod(row.shape)
        for name, row in train_gpt.parameter_table(h).items()
        if name in ("qo_bank", "kv_bank", "mlp_bank", "tok_emb")
    )
    assert card.products + card.relu2_products == 6 * dense
    rooflines = card.rooflines(98_304)
    assert list(rooflines) == list(step_time.GROUPS)
    assert rooflines["attention"] == pytest.approx(9.9, abs=0.05)  # worked out by hand
    assert rooflines["heads"] == pytest.approx(3.14, abs=0.01)
    assert card.rooflines(2 * 98_304)["heads"] == pytest.approx(2 * rooflines["heads"])
    larger = step_time.Work.of(dataclasses.replace(h, vocab_size=8192))
    assert larger.operations - card.operations == 6 * 7168 * h.model_dim
    assert larger.elementwise - card.elementwise == 4 * 7168


def test_without_a_gpu_step_time_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in refusal(step_time.main, [])


def test_what_cannot_be_written_is_refused_before_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(step_time, "measure", lambda: {})
    assert "make its folder first" in refusal(step_time.main, [str(tmp_path / "none/times.json")])


def test_attention_prints_a_row_for_each_kernel() -> None:
    settings = dict(PRESET="smoke", TRAIN_SEQ_LEN=64, DEVICE="cpu", OMP_NUM_THREADS=1)
    done = completed(REPO / "bench/attention.py", 2, **settings)
    assert done.returncode == 0, done.stderr
    _, sdpa, flex = done.stdout.splitlines()
    name, error, forward, _, both, *_ = sdpa.split()
    assert name == "sdpa" and 0 < float(error) < 2e-2
    assert 0 < float(forward) < float(both)
    assert flex.startswith("flex ")


@pytest.mark.parametrize("count", ["--help", "0"])
def test_attention_refuses_what_is_no_number_of_sequences(count: str) -> None:
    done = completed(REPO / "bench/attention.py", count, PRESET="smoke", DEVICE="cpu")
    assert done.returncode == 1
    assert done.stderr == f"error: SEQUENCES={count}: expected 1 or more\n"
