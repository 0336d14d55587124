"""bench/ablate.py: what is asked for is run, and every run leaves a row."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from support import REPO, TINY, cpu_runtime, tiny, tiny_weights, write_shard

sys.path.insert(0, str(REPO / "bench"))
import ablate

BASE = ablate.Result({"trained": 1.21, "averaged": 1.2, "packed": 1.205}, 70.0, 10, 123_456, 1)


# Arguments and rows


def test_an_argument_is_name_prediction_and_settings() -> None:
    variant = ablate.parse("qk 4 (-0.004): QK_GAIN_INIT=4 SEED=7")
    assert variant == ("qk 4", "-0.004", {"QK_GAIN_INIT": "4", "SEED": "7"})
    assert ablate.parse("base") == ("base", "", {})
    assert ablate.off(ablate.parse("x: OFF=smear,normuon SEED=7")) == ["smear", "normuon"]


@pytest.mark.parametrize("argument", ["", ": A=1", "name: A", "name: =1", "name: OFF=smeer"])
def test_an_argument_that_is_none_is_refused(argument: str) -> None:
    with pytest.raises(ablate.Mistake, match="expected|unknown; choose of .*smear"):
        ablate.parse(argument)


@pytest.mark.parametrize("shared", [False, True])
def test_a_row_has_a_cell_for_every_column(shared: bool) -> None:
    columns = ablate.HEADER.splitlines()[0].count("|")
    other = BASE._replace(scores={**BASE.scores, "packed": 1.2, "sliding": 1.18})
    for result, base in ((BASE, None), (other, BASE), ("out of memory", BASE)):
        line = ablate.row(ablate.parse("a (0): SEED=1"), result, base, shared=shared)
        assert line.count("|") == columns, line
    line = ablate.row(ablate.parse("a"), other, BASE, shared=shared)
    assert "| -0.0050 | 1.1800 | " + ("- |" if shared else "70.0 |") in line


# Patches


def loaded(name: str, folder: Path) -> ModuleType:
    """The program without a technique, or whole if there is no name, as a module of its own."""
    module = ModuleType("patched")
    module.__file__ = str(folder / "train_gpt.py")
    source = ablate.patched((REPO / "train_gpt.py").read_text(), [name] if name else [])
    # A second definition of an operator would destroy the one that all other tests use.
    assert source.count('custom_op("golf::') == 2
    source = source.replace('custom_op("golf::', f'custom_op("golf_{name or "whole"}::')
    Path(module.__file__).write_text(source)
    sys.modules["patched"] = module  # its dataclasses look their module up
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    return module


def effects(tg: Any) -> dict[str, Any]:
    """What each part of the program computes on the same small inputs."""
    h, generator = tiny(), torch.Generator().manual_seed(0)
    model = tg.GPT(h, tiny_weights(h), tg.Kernels())
    tokens = torch.randint(2, h.vocab_size, (2, h.train_seq_len + 1), generator=generator)
    tokens[:, 9] = 1
    losses = model(tokens[:, :-1], tokens[:, 1:])
    gradients = torch.autograd.grad(losses.mean(), list(model.parameters()))
    optimizer = tg.Optimizer(model, h, cpu_runtime())
    optimizer.lr.fill_(1.0)
    optimizer.update([losses.mean().detach(), *gradients])
    w = torch.randn(1, 8, 1024, generator=generator)
    w[..., 0] = 9.0
    clipped = tg.quantize(w, torch.tensor(1e-6), torch.full((1, 1, 1), 31.0), torch.ones(1, 1, 1))
    mean = tg.RunningMean({"w": torch.zeros(1)})
    for i in range(400):
        mean.update({"w": torch.tensor([float(i > 100)])})
    plan = tg.BatchPlan([np.arange(4000, dtype=np.uint16)], 16, 4, 0)
    return {
        "losses": losses.detach(), "masters": optimizer.masters()["qo_bank"].clone(),
        "scales": clipped[1], "qmax": tg.export_grids(h)["qo_bank"], "mean": mean.mean["w"],
        "batch": torch.from_numpy(plan.tokens(0, range(4))),
    }  # fmt: skip


TOUCHED = {  # technique -> the parts that change without it; all others stay
    "smear": {"losses", "masters"}, "smear_bos_mask": {"losses", "masters"},
    "smear_by_token": {"losses", "masters"},
    "depth_scale": {"losses", "masters"}, "value_embedding": {"losses", "masters"},
    "unet_skips": {"losses", "masters"}, "normuon": {"masters"}, "polar_express": {"masters"},
    "gptq_lite": {"scales"}, "int8_layers": {"qmax"}, "shuffling": {"batch"},
    "plain_mean": {"mean"},
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return effects(loaded("", tmp_path_factory.mktemp("whole")))


def test_every_technique_that_can_be_left_out_is_tested() -> None:
    assert TOUCHED.keys() == ablate.PATCHES.keys()


@pytest.mark.parametrize("name", TOUCHED)
def test_leaving_a_technique_out_changes_its_part_alone(
    name: str, whole: dict[str, Any], tmp_path: Path
) -> None:
    changed = set()
    for part, value in effects(loaded(name, tmp_path)).items():
        same = torch.equal(value, whole[part]) if isinstance(value, torch.Tensor) else (
            tuple(value) == tuple(whole[part]))  # fmt: skip
        changed |= set() if same else {part}
    assert changed == TOUCHED[name]


def test_a_patch_whose_line_has_gone_is_refused() -> None:
    with pytest.raises(ablate.Mistake, match="OFF=smear.*0 times.*mend PATCHES"):
        ablate.patched("x = 1", ["smear"])


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
    assert torch.load(small / "out/longer/final_model.partial.pt", weights_only=True)


def test_sigterm_keeps_the_row_under_way_and_starts_no_other(small: Path) -> None:
    table = small / "TABLE.md"
    command = [sys.executable, str(ablate.REPO / "bench/ablate.py"), "endless: ITERATIONS=1000000",
               "never: ITERATIONS=1000000"]  # fmt: skip
    environment = {**os.environ, "TABLE": str(table), "WORKERS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        log = small / "out/endless/ablate.log"
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


def test_a_misspelt_setting_is_refused_before_any_run(tmp_path: Path) -> None:
    with pytest.raises(ablate.Mistake, match="ITERATIONS"):
        ablate.main(["base", "x: ITERATION=3"], tmp_path / "TABLE.md")
    assert not (tmp_path / "TABLE.md").exists()
