"""bench/ablate.py: what is asked for is run, and every run leaves a row."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from support import REPO, TINY, cpu_runtime, normal, tiny, tiny_weights, write_shard
from support import train_gpt as tg
from torch import Tensor

sys.path.insert(0, str(REPO / "bench"))
import ablate
import turns

BASE = ablate.Result({"trained": 1.21, "averaged": 1.2, "packed": 1.205}, 70.0, 10, 123_456, 1)


# Arguments and rows


def test_an_argument_is_name_prediction_and_settings() -> None:
    variant = ablate.parse("qk 4 (-0.004): QK_GAIN_INIT=4 SEED=7")
    assert variant == ("qk 4", "-0.004", {"QK_GAIN_INIT": "4", "SEED": "7"})
    assert ablate.parse("base") == ("base", "", {})
    assert ablate.parse("x: OFF=smear,normuon SEED=7").off == ["smear", "normuon"]


@pytest.mark.parametrize("argument", ["", ": A=1", "name: A", "name: =1", "--help"])
def test_an_argument_that_is_none_is_refused(argument: str) -> None:
    with pytest.raises(ablate.Mistake, match="expected 'name"):
        ablate.parse(argument)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("x: OFF=smeer", "unknown; choose of .*smear"),
        ("x: ITERATION=3", "ITERATIONS"),
        ("x: EVAL_ONLY=final_model.ptz", "a variant is trained"),
        ("x: RESUME_FROM=final_model.pt", "a variant is trained"),
        ("x: OFF=steady_momentum MAX_WALLCLOCK_SECONDS=180", "set MAX_WALLCLOCK_SECONDS=0"),
    ],
)
def test_what_cannot_run_is_refused_before_any_run(
    argument: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ablate.Mistake, match=message):
        ablate.main(["base", argument], tmp_path / "TABLE.md")
    assert not (tmp_path / "TABLE.md").exists()


@pytest.mark.parametrize(("key", "names"), [("OFF", "smear"), ("ON", "loops")])
def test_what_all_variants_would_seem_to_share_is_refused(
    key: str, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No variant reads it: it would be a run of the base."""
    monkeypatch.setenv(key, names)
    with pytest.raises(ablate.Mistake, match=f"{key} is in the environment"):
        ablate.check(ablate.parse("base"))


def test_what_would_lose_a_row_is_refused_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablate, "in_a_process", lambda *_: pytest.fail("a run began"))
    for table in (tmp_path, tmp_path / "none/TABLE.md"):
        with pytest.raises(ablate.Mistake, match="expected a file in a folder"):
            ablate.main(["base"], table)
    with pytest.raises(ablate.Mistake, match="WORKERS=0"):
        ablate.main(["base"], tmp_path / "TABLE.md", 0)
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    for names in (["qk 4", "qk-4"], ["a", "a"]):
        with pytest.raises(ablate.Mistake, match="rename one"):
            ablate.main(names, tmp_path / "TABLE.md")


@pytest.mark.parametrize("shared", [False, True])
def test_a_row_has_a_cell_for_every_column(shared: bool) -> None:
    columns = ablate.HEADER.splitlines()[0].count("|")
    other = BASE._replace(scores={**BASE.scores, "packed": 1.2, "sliding": 1.18})
    for result, base in ((BASE, None), (other, BASE), ("out of memory", BASE)):
        line = ablate.row(ablate.parse("a (0): SEED=1"), result, base, shared=shared)
        assert line.count("|") == columns, line
    line = ablate.row(ablate.parse("a"), other, BASE, shared=shared)
    assert "| -0.0050 | 1.1800 | " + ("- |" if shared else "70.0 |") in line


# Techniques


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Leaves a technique out until the test ends."""

    def leave_out(name: str) -> None:
        monkeypatch.setattr(*ablate.TECHNIQUES[name])

    return leave_out


def batch(h: tg.Hyperparameters) -> Tensor:
    """(2, T+1) tokens with a start of a document amid the first window."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, h.vocab_size, (2, h.train_seq_len + 1), generator=generator)
    tokens[0, 9] = tg.BOS_ID
    return tokens


def losses_and_gradients(**neutral: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a tiny model in which every parameter matters, but for those set to a `neutral` value."""
    h = tiny()
    weights = tiny_weights(h)
    for name, value in neutral.items():
        weights[name].fill_(value)
    model = tg.GPT(h, weights, tg.Kernels())
    tokens = batch(h)
    losses = model(tokens[:, :-1], tokens[:, 1:])
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(losses.mean(), parameters)
    return losses.detach(), dict(zip(names, gradients, strict=True))


def effects() -> dict[str, Any]:
    """What each part of the program computes on the same small inputs."""
    h = tiny()
    losses, gradients = losses_and_gradients()
    optimizer = tg.Optimizer(tg.GPT(h, tiny_weights(h), tg.Kernels()), h, cpu_runtime())
    optimizer.lr.fill_(1.0)
    optimizer.update(losses.mean(), list(gradients.values()))
    w = normal(1, 8, 1024)
    w[..., 0] = 9.0
    mean = tg.RunningMean({"w": torch.zeros(1)})
    for i in range(400):
        mean.update({"w": torch.tensor([float(i > 100)])})
    plan = tg.BatchPlan([np.arange(4000, dtype=np.uint16)], 16, 4, 0)
    return {
        "losses": losses,
        "masters": optimizer.masters()["qo_bank"].clone(),
        "scales": tg.row_scales(w, torch.tensor(1e-6), torch.tensor(31.0)),
        "grids": tg.export_grids(h),
        "momentum": tg.muon_momentum(h, torch.tensor(0.9 * h.iterations)),
        "mean": mean.mean["w"],
        "batch": torch.from_numpy(plan.tokens(0, range(4))),
    }


MODEL = {"losses", "masters"}
TOUCHED = {  # technique -> the parts that change without it; all others stay
    "smear": MODEL,
    "smear_by_token": MODEL,
    "smear_bos_mask": MODEL,
    "depth_scale": MODEL,
    "value_embedding": MODEL,
    "unet_skips": MODEL,
    "normuon": {"masters"},
    "polar_express": {"masters"},
    "gptq_lite": {"scales"},
    "int8_layers": {"grids"},
    "shuffling": {"batch"},
    "steady_momentum": {"momentum"},
    "plain_mean": {"mean"},
}


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return effects()


def test_every_technique_that_can_be_left_out_is_tested() -> None:
    assert TOUCHED.keys() == ablate.TECHNIQUES.keys()


@pytest.mark.parametrize("name", TOUCHED)
def test_leaving_a_technique_out_changes_its_part_alone(
    name: str, whole: dict[str, Any], without: Callable[[str], None]
) -> None:
    without(name)
    changed = set()
    for part, value in effects().items():
        same = value == whole[part]
        if isinstance(value, Tensor):
            same = torch.equal(value, whole[part])
        if not same:
            changed.add(part)
    assert changed == TOUCHED[name]


@pytest.mark.parametrize(
    ("name", "neutral", "unused"),
    [
        ("smear", {"smear_gate": -1e4}, {"smear_gate", "smear_token"}),
        ("smear_by_token", {"smear_token": 0.0}, {"smear_token"}),
        ("value_embedding", {"ve_scale": 0.0}, {"ve_emb", "ve_proj", "ve_scale"}),
        ("unet_skips", {"skip_weight": 0.0}, {"skip_weight"}),
    ],
)
def test_the_model_is_as_if_its_weights_did_nothing(
    name: str, neutral: dict[str, float], unused: set[str], without: Callable[[str], None]
) -> None:
    expected, expected_gradients = losses_and_gradients(**neutral)
    without(name)
    losses, gradients = losses_and_gradients()
    torch.testing.assert_close(losses, expected)
    assert {name for name, gradient in gradients.items() if not gradient.any()} == unused
    for other in gradients.keys() - unused:
        torch.testing.assert_close(gradients[other], expected_gradients[other])


def test_without_the_mask_smear_crosses_documents(without: Callable[[str], None]) -> None:
    without("smear_bos_mask")
    h = tiny()
    inputs = batch(h)[:, :-1]
    x = normal(*inputs.shape, h.model_dim)
    gate = normal(h.model_dim, seed=1)
    token = normal(h.smear_dims, seed=2)
    expected = x.clone()
    for row in range(len(x)):
        for t in range(1, h.train_seq_len):
            factor = 2 * torch.sigmoid(x[row, t, : h.smear_dims] @ token)
            share = factor * torch.sigmoid(gate)
            expected[row, t] = (1 - share) * x[row, t] + share * x[row, t - 1]
    torch.testing.assert_close(tg.smear(x, gate, token, inputs), expected)


def test_without_depth_scale_all_layers_read_the_whole_norm(without: Callable[[str], None]) -> None:
    h = tiny()
    model = tg.GPT(h, tiny_weights(h), tg.Kernels())
    model.plan = [layer._replace(depth_scale=1.0) for layer in model.plan]
    tokens = batch(h)
    expected = model(tokens[:, :-1], tokens[:, 1:])
    without("depth_scale")
    losses, gradients = losses_and_gradients()
    torch.testing.assert_close(losses, expected)
    assert all(gradient.any() for gradient in gradients.values())


def muon_bank(master: Tensor) -> tg.Bank:
    parameter = torch.nn.Parameter(master.clone())
    neurons = torch.zeros_like(master[:, :, :1])
    scale = torch.full((len(master), 1, 1), 1.5)
    return tg.Bank(
        "bank", parameter, master.clone(), master.clone(), torch.zeros_like(master), neurons, scale
    )


def test_without_normuon_an_update_is_muon_as_published(without: Callable[[str], None]) -> None:
    without("normuon")
    grad = normal(2, 12, 8)
    master = normal(2, 12, 8, seed=1)
    bank = muon_bank(master)
    one, lr, momentum, decay = map(torch.tensor, (1.0, 0.1, 0.9, 0.5))
    tg.muon_update(grad, bank, one, lr, momentum, decay, 0.95, torch.float32)
    nesterov = 0.1 * grad + 0.9 * (0.1 * grad)  # the momentum was zero
    expected = master * (1 - 0.1 * 0.5) - 0.1 * 1.5 * tg.orthogonalize(nesterov, torch.float32)
    torch.testing.assert_close(bank.master, expected)


def test_without_polar_express_it_is_muons_iteration(without: Callable[[str], None]) -> None:
    without("polar_express")
    g = normal(1, 6, 10, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    s = s / (1.02 * g.norm())
    for _ in range(5):  # Newton-Schulz acts on singular values alone
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = u @ torch.diag_embed(s) @ vh
    torch.testing.assert_close(tg.orthogonalize(g, torch.float64), expected, rtol=1e-5, atol=1e-6)


def test_without_gptq_lite_no_weight_is_clipped(without: Callable[[str], None]) -> None:
    without("gptq_lite")
    w = normal(1, 8, 1024)
    w[..., 0] = 9.0
    scales = tg.row_scales(w, torch.tensor(1e-6), torch.tensor(31.0))
    torch.testing.assert_close(scales, w.abs().amax(-1, keepdim=True) / 31, rtol=2e-5, atol=0)


def test_without_int8_layers_all_layers_have_one_grid(without: Callable[[str], None]) -> None:
    h = tiny()
    before = tg.export_grids(h)
    without("int8_layers")
    grids = tg.export_grids(h)
    assert grids.keys() == before.keys()
    for name in ("qo_bank", "kv_bank", "mlp_bank"):
        assert grids.pop(name) == tg.Grid((31,) * 2 * h.num_layers, (1.0,) * 2 * h.num_layers)
    assert all(grid == before[name] for name, grid in grids.items())


def test_without_shuffling_windows_come_in_order(without: Callable[[str], None]) -> None:
    without("shuffling")
    plan = tg.BatchPlan([np.arange(4000, dtype=np.uint16)], 16, 4, 0)
    tokens = np.concatenate([plan.tokens(step, range(4)) for step in range(3)])
    first = tokens[0, 0]
    assert 0 <= first < 16
    assert tokens.tolist() == [list(range(s, s + 17)) for s in range(first, first + 192, 16)]


def test_without_the_plain_mean_old_weights_are_forgotten(without: Callable[[str], None]) -> None:
    without("plain_mean")
    values = normal(600).tolist()
    mean = tg.RunningMean({"w": torch.zeros(1)})
    for value in values:
        mean.update({"w": torch.tensor([value])})
    expected = sum(values[:285]) / 285  # up to there 1 / count is larger than 0.0035
    for value in values[285:]:
        expected += 0.0035 * (value - expected)
    assert float(mean.mean["w"]) == pytest.approx(expected, abs=1e-5)


def test_without_steady_momentum_it_falls_with_the_lr(without: Callable[[str], None]) -> None:
    without("steady_momentum")
    h = tiny(muon_momentum=0.97, muon_momentum_warmup_steps=20, iterations=1000)
    found = [float(tg.muon_momentum(h, torch.tensor(float(done)))) for done in (20, 150, 575, 1000)]
    assert found == pytest.approx([0.97, 0.97, 0.935, 0.90])


def test_without_any_technique_a_step_is_still_one_graph(without: Callable[[str], None]) -> None:
    for name in ablate.TECHNIQUES:
        without(name)
    h = tiny()
    losses = []
    for backend in ("none", "aot_eager"):  # the latter refuses what does not go into a graph
        runtime = cpu_runtime(compile_backend=backend)
        trainer = tg.Trainer(h, runtime, tg.Kernels())
        tokens = batch(h).repeat(trainer.layout.local // 2, 1)
        losses.append([float(trainer.train_step(tokens, 1.0)) for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


# Runs


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tokens, and the environment that trains on them for three steps."""
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"river stone {i} lantern quiet harbour" for i in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(texts), model_prefix=str(tmp_path / "tiny"), vocab_size=TINY["vocab_size"],
        model_type="bpe", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    generator = np.random.Generator(np.random.PCG64(0))
    for split, count in (("train", 2000), ("val", 400)):
        tokens = generator.integers(3, 30, count)
        write_shard(tmp_path / f"data/fineweb_{split}_000000.bin", tokens)
    model = str(tmp_path / "tiny.model")
    size = sentencepiece.SentencePieceProcessor(model_file=model).vocab_size()
    settings: dict[str, Any] = {
        **TINY, "preset": "smoke", "iterations": 3, "eval_stride": 0, "vocab_size": size,
        "data_path": tmp_path / "data", "tokenizer_path": model,
        "output_dir": tmp_path / "out", "omp_num_threads": 1,
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name.upper(), str(value))
    return tmp_path


def test_rows_come_in_order_and_a_failure_stops_nothing(small: Path) -> None:
    table = small / "TABLE.md"
    table.write_text("# Before\n")
    arguments = ["base", "longer (-0.1): ITERATIONS=6", "no budget (0): ARTIFACT_BYTES=95000",
                 "no smear: OFF=smear"]  # fmt: skip
    ablate.main(arguments, table, workers=2)
    lines = table.read_text().splitlines()
    assert lines[0] == "# Before" and lines[2] == ablate.HEADER.splitlines()[0]
    base, longer, failed, smear = (line.split(" | ") for line in lines[4:])
    assert base[0] == "| base" and base[9] == smear[9] == "3" and longer[9] == "6"
    packed, longer_packed = float(base[5]), float(longer[5])
    assert float(longer[6]) == pytest.approx(longer_packed - packed, abs=2e-4)
    assert "failed: export" in failed[3]
    assert smear[:2] == ["| no smear", "OFF=smear"]
    assert torch.load(small / "out/longer/final_model.pt", weights_only=True)
    assert not list((small / "out").glob("*/*.json")), "a variant is no seed of a submission"


def test_nothing_is_against_a_first_run_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {"trained": 1.2, "averaged": 1.2, "packed": 1.2}
    result = ablate.Result(scores, 72.0, 800, 15_900_000, 1337)
    found = {"first": "out of memory", "second": result, "third": result}
    monkeypatch.setattr(ablate, "in_a_process", lambda variant, *_: found[variant.name])
    ablate.main(list(found), tmp_path / "TABLE.md")
    for line in (tmp_path / "TABLE.md").read_text().splitlines()[-2:]:
        assert line.split(" | ")[6] == ""


NVIDIA_SMI = "#!/bin/sh\necho '0, NVIDIA H100'\necho '1, NVIDIA H100'\n"


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, ["0", "1"]), ("1", ["1"]), ("3,5", ["3", "5"]), ("", [""])]
)
def test_the_gpus_are_those_of_the_machine_that_are_visible(
    visible: str | None, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert ablate.gpus_of(env) == (expected, "NVIDIA H100")


def test_runs_at_the_same_time_have_a_gpu_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run takes the GPU that is free; times count, as nobody shares."""
    monkeypatch.setattr(ablate, "gpus_of", lambda env: (["0", "1"], "a GPU"))
    used: list[tuple[str, str]] = []
    together = threading.Barrier(2)

    def run(variant: ablate.Variant, running: object, gpu: str) -> ablate.Result:
        together.wait(timeout=20)
        used.append((variant.name, gpu))
        scores = {"trained": 1.2, "averaged": 1.2, "packed": 1.2}
        return ablate.Result(scores, ms=72.25, steps=3, size=9, seed=1)

    monkeypatch.setattr(ablate, "in_a_process", run)
    ablate.main(["a", "b", "c", "d"], tmp_path / "TABLE.md", workers=2)
    names, gpus = zip(*used, strict=True)
    assert sorted(names) == ["a", "b", "c", "d"] and sorted(gpus) == ["0", "0", "1", "1"]
    assert {gpu for name, gpu in used if name in "ab"} == {"0", "1"}
    assert (tmp_path / "TABLE.md").read_text().count("| 72.2 | 3 |") == 4


@pytest.mark.parametrize(
    ("gpu", "chosen", "threads"), [("1", None, "1"), ("1", "4", "4"), ("", None, None)]
)
def test_runs_on_gpus_do_not_take_all_cores_each(
    gpu: str, chosen: str | None, threads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Started(Exception):
        pass

    def start(command: object, env: dict[str, str], **_: object) -> None:
        assert env.get("OMP_NUM_THREADS") == threads
        assert env.get("CUDA_VISIBLE_DEVICES") == (gpu or None)
        raise Started

    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    monkeypatch.setattr(ablate.subprocess, "Popen", start)
    with pytest.raises(Started):
        ablate.in_a_process(ablate.parse("base"), [], gpu)


def test_a_run_that_cannot_start_fails_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would take the rows of those that run beside it with it."""

    def start(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(ablate.subprocess, "Popen", start)
    result = ablate.in_a_process(ablate.parse("base"), [])
    assert isinstance(result, str) and "temporarily unavailable" in result


@pytest.mark.parametrize("asked", ["1", "0", None])
def test_runs_take_turns_on_their_gpu_where_that_is_asked_for(
    asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Started(Exception):
        pass

    def start(h: tg.Hyperparameters, runtime: tg.Runtime) -> None:
        raise Started

    locked: list[Path] = []
    monkeypatch.setattr(turns, "take_turns", locked.extend)
    monkeypatch.setattr(ablate, "with_sample", lambda h: h)
    monkeypatch.setattr(tg, "run", start)
    monkeypatch.setattr(tg, "write_result", tg.write_result)  # put back after the test
    monkeypatch.delenv("IN_TURN", raising=False)
    if asked:
        monkeypatch.setenv("IN_TURN", asked)
    for gpu in ("0", "1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpu)
        with pytest.raises(Started):
            ablate.run_variant(ablate.parse("base"))
    assert len(set(locked)) == (2 if asked == "1" else 0), "a file for each GPU"


@pytest.mark.parametrize(
    ("seconds", "asked", "shown"), [("0", "1", "-"), ("60", "0", "-"), ("60", "1", "72.0")]
)
def test_step_times_are_shown_where_a_run_trained_alone(
    seconds: str, asked: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {"trained": 1.2, "averaged": 1.2, "packed": 1.2}
    result = ablate.Result(scores, 72.0, 800, 15_900_000, 1337)
    monkeypatch.setattr(ablate, "in_a_process", lambda *_: result)
    monkeypatch.setattr(ablate, "gpus_of", lambda env: (["0"], "a GPU"))
    monkeypatch.setenv("IN_TURN", asked)
    ablate.main([f"base: MAX_WALLCLOCK_SECONDS={seconds}"], tmp_path / "TABLE.md", workers=2)
    cells = (tmp_path / "TABLE.md").read_text().splitlines()[-1].split(" | ")
    assert cells[-4] == shown


def test_sigterm_keeps_the_row_under_way_and_starts_no_other(small: Path) -> None:
    table = small / "TABLE.md"
    command = [sys.executable, str(ablate.REPO / "bench/ablate.py"), "endless: ITERATIONS=1000000",
               "never: ITERATIONS=1000000"]  # fmt: skip
    environment = {**os.environ, "TABLE": str(table), "WORKERS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        log = small / "out/endless/train_seed1337.partial.log"
        for _ in range(600):
            if log.exists() and "step:10/" in log.read_text():
                break
            time.sleep(0.1)
        process.terminate()
        assert process.stderr
        assert "stopped by SIGTERM" in process.stderr.read()
    assert process.returncode == 1
    (line,) = table.read_text().splitlines()[3:]
    assert line.startswith("| endless |") and "failed: interrupted at step" in line
    assert (small / "out/endless/final_model.partial.pt").exists()
    assert not (small / "out/never").exists()
