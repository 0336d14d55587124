"""What only a CUDA device can show; run with `python -m pytest -m gpu` on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import REPO, tiny, write_back

import train_gpt as tg

pytestmark = pytest.mark.gpu


def cuda_runtime(backend: str = "none") -> tg.Runtime:
    return tg.Runtime(torch.device("cuda"), compile_backend=backend)


ROUNDING = [tg.Kernels(), tg.Kernels(round=tg.round_rows)]  # late QAT's, plain and as one kernel


def test_every_attention_agrees_with_float32_math() -> None:
    """In output and gradients."""
    h = tg.Hyperparameters(micro_batch_tokens=8192)
    for name, attend in tg.attention_candidates().items():
        assert tg.attention_error(h, attend, torch.device("cuda")) < 2e-2, name


@pytest.mark.parametrize("vocabulary", [1000, 1024, 8192, 20_000])
def test_the_fused_loss_agrees_with_its_twin(vocabulary: int) -> None:
    """Together with the other fused layers."""
    h = tg.Hyperparameters(micro_batch_tokens=8192, vocab_size=vocabulary)
    assert tg.fused_error(h, torch.device("cuda")) < 1e-2


def test_the_fused_loss_reaches_rows_beyond_two_billion_logits() -> None:
    vocabulary, rows = 8192, 2**31 // 8192 + 1000
    cap = tg.Softcap(11.5, 5.0, 15.0)
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, 64, generator=generator, device="cuda").bfloat16()
    table = torch.randn(vocabulary, 64, generator=generator, device="cuda").bfloat16() / 8
    targets = torch.randint(vocabulary, (rows,), generator=generator, device="cuda")
    losses, dx, _ = tg.softcap_loss(x, table, targets, *cap)
    last = x[-1000:].float().requires_grad_()
    expected = tg.token_losses(last[None], table.float(), targets[None, -1000:], cap)[0]
    torch.testing.assert_close(losses[-1000:], expected.detach(), rtol=1e-2, atol=1e-2)
    [gradient] = torch.autograd.grad(expected.sum() / rows, last)
    assert float((dx[-1000:].float() - gradient).norm() / gradient.norm()) < 1e-2


def test_a_captured_step_with_the_fused_loss_follows_the_plain_one() -> None:
    """Compiled, with two micro-batches: each has its own part of the upstream gradient."""
    h = tiny(vocab_size=1000, train_seq_len=128, train_batch_tokens=1024, micro_batch_tokens=512)
    generator = torch.Generator("cuda").manual_seed(2)
    tokens = torch.randint(h.vocab_size, (8, 129), device="cuda", generator=generator)
    losses = []
    for kernels in (tg.Kernels(), tg.Kernels(mean_loss=tg.FusedLoss.apply)):
        trainer = tg.Trainer(h, cuda_runtime("inductor"), kernels)
        restore = trainer.optimizer.snapshot()
        trainer.train_step(tokens, 1.0)
        trainer.capture(tokens)
        restore()
        losses.append([float(trainer.train_step(tokens, 1.0)) for _ in range(5)])
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert losses[1][-1] < losses[1][0]


@pytest.mark.parametrize("kernels", ROUNDING, ids=["plain", "fused"])
def test_late_qat_on_cuda_writes_the_bits_of_the_artifact(kernels: tg.Kernels) -> None:
    h, runtime = tiny(artifact_bytes=100_000), cuda_runtime()
    trainer = tg.Trainer(h, runtime, kernels)
    generator = torch.Generator("cuda").manual_seed(1)
    for master in trainer.optimizer.masters().values():
        master.add_(torch.randn(master.shape, generator=generator, device="cuda"), alpha=0.05)
    step = trainer.optimizer.start_late_qat(10_000)
    write_back(trainer.optimizer)
    _, state = tg.unpack(tg.pack(trainer.optimizer.gather(trainer.optimizer.masters()), h, step))
    parameters = dict(trainer.model.named_parameters())
    grids = tg.export_grids(h)
    assert grids.keys() == trainer.optimizer.late_qat.grids.keys() and len(grids) > 3
    for name in grids:
        assert torch.equal(parameters[name].cpu(), state[name].bfloat16()), name


def test_a_compiled_training_step_follows_the_eager_one() -> None:
    h = tiny(train_seq_len=128, train_batch_tokens=1024, micro_batch_tokens=1024)
    losses = []
    for backend in ("none", "inductor"):
        trainer = tg.Trainer(h, cuda_runtime(backend), tg.Kernels())
        tokens = torch.randint(
            h.vocab_size, (8, 129), device="cuda", generator=torch.Generator("cuda").manual_seed(2)
        )
        losses.append([float(trainer.train_step(tokens, 1.0)) for _ in range(5)])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1][-1] < losses[1][0]


@pytest.mark.parametrize("kernels", ROUNDING, ids=["plain", "fused"])
@pytest.mark.parametrize("micro", [512, 1024])  # with one micro-batch the update is captured too
@pytest.mark.parametrize("early", [0, 64])  # with short sequences at first all graphs are twofold
def test_the_step_as_cuda_graphs_follows_the_launched_one(
    early: int, micro: int, kernels: tg.Kernels
) -> None:
    """Launched kernel by kernel."""
    h = tiny(train_seq_len=128, early_seq_len=early, train_batch_tokens=1024,
             micro_batch_tokens=micro)  # fmt: skip
    losses, masters = [], []
    for graph in (False, True):
        trainer = tg.Trainer(h, cuda_runtime(), kernels)
        generator = torch.Generator("cuda").manual_seed(2)
        batches = [
            torch.randint(h.vocab_size, (8, 129), device="cuda", generator=generator)
            for _ in range(6)
        ]
        restore = trainer.optimizer.snapshot()
        for late_qat in (False, True):
            if late_qat:
                trainer.optimizer.start_late_qat(9_000)
            for length in tg.seq_lens(h):
                trainer.seq_len = length
                trainer.train_step(batches[0], 1.0)
                if graph:
                    trainer.capture(batches[0])
        for length in tg.seq_lens(h):
            graphs = trainer.graphs[trainer.model.plan, length]
            updates = [graphs.update, graphs.update_late_qat]
            assert bool(graphs.gradients) == graph
            assert [bool(update) for update in updates] == [graph and micro == 1024] * 2
        assert len(trainer.graphs) == (2 if early else 1)
        restore()
        steps = []
        for i, batch in enumerate(batches):
            trainer.seq_len = tg.seq_len_at(h, i / len(batches))
            if i == 4:
                trainer.optimizer.start_late_qat(
                    7_000
                )  # another grid than the graph was captured with
            steps.append(float(trainer.train_step(batch, 1.0 - i / 6)))
        losses.append(steps)
        masters.append({n: w.clone() for n, w in trainer.optimizer.masters().items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # some reductions use atomics
    assert len(set(losses[1])) == 6
    for name, w in masters[0].items():
        assert float((masters[1][name] - w).norm() / w.norm()) < 2e-2, name


@pytest.mark.parametrize("kernels", ROUNDING, ids=["plain", "fused"])
@pytest.mark.parametrize("late_qat", [False, True])
def test_a_step_never_makes_the_host_wait(late_qat: bool, kernels: tg.Kernels) -> None:
    trainer = tg.Trainer(tiny(), cuda_runtime(), kernels)
    tokens = torch.randint(
        trainer.h.vocab_size, (trainer.layout.local, trainer.h.train_seq_len + 1), device="cuda"
    )
    if late_qat:
        trainer.optimizer.start_late_qat(10_000)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            loss = trainer.train_step(tokens, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


def test_losses_of_a_device_are_reported_in_order() -> None:
    runtime, reports = cuda_runtime(), list[tuple[int, float]]()
    clock = tg.Clock(runtime)
    losses = tg.PendingLosses(clock, lambda step, loss, *_: reports.append((step, loss)))
    clock.start()
    loss = torch.zeros((), device="cuda")  # each step overwrites it, as a captured graph does
    for step in range(1, 11):
        loss.fill_(step / 2)
        losses.push(step, loss)
        assert len(reports) == max(0, step - losses.AHEAD)
    losses.land()
    assert reports == [(step, step / 2) for step in range(1, 11)]


SCORE = """
import sys
import torch
sys.path.insert(0, "tests")
from support import tiny, tiny_weights
import train_gpt as tg
h = tiny(train_seq_len=128, model_dim=256, num_heads=4, num_kv_heads=2, mlp_hidden=256,
         rope_dims=16, micro_batch_tokens=1024)
runtime = tg.Runtime(torch.device("cuda"), compile_backend="inductor")
fused = (tg.FusedHeads.apply, tg.FusedMLP.apply, tg.FusedLoss.apply)
kernels = tg.Kernels(tg.attention_candidates()["cudnn"], *fused)
model = tg.load_model(h, runtime, tiny_weights(h), kernels)
tokens = torch.randint(h.vocab_size, (8, 129), generator=torch.Generator().manual_seed(0)).cuda()
if sys.argv[1] == "trained":  # its graph is compiled first, as in a run
    loss = runtime.compile(tg.loss_share)(model, tokens, 1.0, 128)
    torch.autograd.grad(loss, list(model.parameters()))
with torch.no_grad():
    hidden = runtime.compile(tg.GPT.final_hidden, deterministic=True)(model, tokens[:, :-1])
print("sum", hidden.double().sum().item(), hidden.double().square().sum().item())
"""


def test_a_process_that_only_scores_has_the_bits_of_training(tmp_path: Path) -> None:
    """Each with a compile cache of its own; Inductor once fused them differently."""
    lines = []
    for what in ("trained", "scored"):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / what)}
        result = subprocess.run(
            [sys.executable, "-c", SCORE, what],
            cwd=REPO,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-2000:]
        lines.append(result.stdout.splitlines()[-1])
    assert lines[0].startswith("sum ") and lines[0] == lines[1]
