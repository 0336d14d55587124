"""Claims about whole runs, as a user starts them: files, log, errors, by 1 and by 2 ranks."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    EARLIER,
    REPO,
    RESULTS,
    errors_of,
    launch,
    train_tokenizer,
    wait_for,
    write_shard,
)

PIECES = 300  # of the tokenizer
# fmt: off
WORDS = ["river", "stone", "lantern", "quiet", "harbour", "seven", "violet", "engine", "winter",
         "caf\u00e9", "and", "the", "of"]
SMOKE_IN_SMALL = dict(
    PRESET="smoke", VOCAB_SIZE=PIECES, TRAIN_SEQ_LEN=64, TRAIN_BATCH_TOKENS=512,
    MICRO_BATCH_TOKENS=256, VAL_BATCH_SIZE=1024, EVAL_STRIDE=16, MODEL_DIM=64, MLP_HIDDEN=96,
    VE_DIM=16, ITERATIONS=12, VAL_LOSS_EVERY=6, TRAIN_LOG_EVERY=2, WARMUP_STEPS=1,
    MAX_WALLCLOCK_SECONDS=0, SWA_THRESHOLD=0.5, QAT_THRESHOLD=0.3, OMP_NUM_THREADS=1,
)
SUBMISSION_KEYS = [
    "author", "github_id", "name", "blurb", "date", "track", "dataset", "hardware",
    "pytorch_version", "model_params", "val_loss", "val_bpb", "val_bpb_roundtrip",
    "averaged_val_bpb", "trained_val_bpb", "eval_stride", "bytes_total", "bytes_code",
    "bytes_model_int6_zstd", "step_stop", "step_avg_ms", "wallclock_seconds",
    "eval_time_seconds", "seeds", "seed_results",
]
SEED_KEYS = ["val_loss", "val_bpb", "val_bpb_roundtrip", "artifact_bytes", "steps", "step_avg_ms"]
# fmt: on


def documents(count: int, seed: int) -> list[str]:
    generator = np.random.Generator(np.random.PCG64(seed))
    return [" ".join(generator.choice(WORDS, 30).tolist()) + f" {i}." for i in range(count)]


@dataclass
class Finished:
    """A run that has ended."""

    status: int
    stdout: str
    stderr: str
    folder: Path  # its OUTPUT_DIR
    log: list[str]  # lines of its train.log, with `report` as they were when it ended
    report: dict[str, Any]  # its submission.json
    artifact: bytes

    @property
    def errors(self) -> list[str]:
        return errors_of(self.stderr)

    def score(self, start: str) -> float:
        """val_bpb of the one output line that starts so."""
        lines = [line for line in self.stdout.splitlines() if line.startswith(start)]
        assert len(lines) == 1, (start, lines)
        return float(re.search(r"val_bpb:(\d+\.\d{8})", lines[0])[1])  # type: ignore


Strike = Callable[[int], None]  # gets a process number


class Runs:
    """Runs of the program, two at a time, each started once and waited for where it is needed."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder, folder / "data"
        self.tokenizer = self.data / "tiny.model"
        self.pool = ThreadPoolExecutor(2)
        self.queued: dict[str, Future[Finished]] = {}
        processor = train_tokenizer(self.tokenizer, documents(300, 0), PIECES)
        assert processor.vocab_size() == PIECES
        self.tokens = {
            split: [t for text in documents(count, seed) for t in (1, *processor.encode(text))]
            for split, count, seed in (("train", 200, 1), ("val", 20, 2))
        }
        self.dataset("good", **self.tokens)

    def dataset(self, name: str, train: list[int], val: list[int]) -> Path:
        for split, tokens in (("train", train), ("val", val)):
            write_shard(self.data / name / f"fineweb_{split}_000000.bin", tokens)
        return self.data / name

    def start(
        self,
        name: str,
        ranks: int = 1,
        after: str = "",
        script: Path = REPO / "train_gpt.py",
        strike: Strike | None = None,
        bare: bool = False,
        **settings: object,
    ) -> None:
        """Queues a run; `after` names one, queued before, whose files it needs, and `strike` gets
        the process number when step 4 has been logged.  A `bare` run has these settings alone."""
        mine: dict[str, object] = {"OUTPUT_DIR": self.folder / name, "OMP_NUM_THREADS": 1}
        if not bare:
            mine |= SMOKE_IN_SMALL
            mine |= {"DATA_PATH": self.data / "good", "TOKENIZER_PATH": self.tokenizer}
        mine |= settings

        def wait_and_run() -> Finished:
            if after:
                self.queued[after].result()
            fresh = strike is not None  # a strike needs the process number of the run itself
            process = launch(script, ranks=ranks, cwd=self.folder, fresh=fresh, **mine)
            begun = strike_at_step_4(process, strike) if strike else ""
            return outcome(wait_for(process), begun, Path(str(mine["OUTPUT_DIR"])))

        self.queued[name] = self.pool.submit(wait_and_run)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def strike_at_step_4(process: subprocess.Popen[str], strike: Strike) -> str:
    """What the process has printed until then."""
    lines = []
    assert process.stdout
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step:4/"):
            strike(process.pid)
            break
    return "".join(lines)


def outcome(done: subprocess.CompletedProcess[str], begun: str, out: Path) -> Finished:
    """The process and what it left in its OUTPUT_DIR; it had printed `begun` before."""
    log, report, packed = (out / n for n in ("train.log", "submission.json", "final_model.ptz"))
    return Finished(
        status=done.returncode,
        stdout=begun + done.stdout,
        stderr=done.stderr,
        folder=out,
        log=log.read_text().splitlines() if log.exists() else [],
        report=json.loads(report.read_text()) if report.exists() else {},
        artifact=packed.read_bytes() if packed.exists() else b"",
    )


def terminate(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


def kill_rank_1(torchrun: int) -> None:
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {  # settings, pattern of the message
    "missing data": (dict(DATA_PATH="/nowhere"), r"DATA_PATH=/nowhere.*fineweb_"),
    "short shard": (dict(DATA_PATH="SHORT"), r"fineweb_val_000000\.bin.*bytes"),
    "foreign train token": (dict(DATA_PATH="TRAIN_TOKEN"), r"token id 999.*VOCAB_SIZE=300"),
    "missing tokenizer": (dict(TOKENIZER_PATH="/no.model"), r"TOKENIZER_PATH=/no\.model"),
    "bad override": (dict(ITERATIONS="many"), r"ITERATIONS='many'"),
    "zero length": (dict(TRAIN_SEQ_LEN=0), r"TRAIN_SEQ_LEN=0"),
    "unwritable output": (dict(OUTPUT_DIR="/dev/null/out"), r"/dev/null/out"),
    "dump to no folder": (dict(EVAL_DUMP="/nowhere/x.npz"), r"EVAL_DUMP=/nowhere/x\.npz.*folder"),
    "no checkpoint": (dict(RESUME_FROM="FOREIGN"), r"RESUME_FROM=.*foreign\.pt"),
}
SHARED_MISTAKES = ["missing data", "bad override"]  # also by 2 ranks


# Rank 0 starts after the others, which then wait for it to speak however slow the machine is.
LATE = """
import os, time
if os.environ.get("RANK") == "0":
    time.sleep(1)
elif "RANK" in os.environ:
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(30 * seconds)
"""
# A clock by which every look takes 10 ms, so that a step takes the same on every machine.
TICKING = """
import itertools, time
looks = itertools.count()
time.perf_counter = lambda: next(looks) / 100
"""


def python_hook(folder: Path, source: str) -> Path:
    """A PYTHONPATH with which every process runs `source` first."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(source)
    return folder


def start_mistakes(runs: Runs) -> None:
    short = runs.dataset("short", **runs.tokens)
    shard = short / "fineweb_val_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-10])
    foreign = runs.folder / "foreign.pt"
    torch.save({"weights": torch.zeros(3)}, foreign)
    train, val = runs.tokens["train"] + [999] * 700, runs.tokens["val"]
    unknown = runs.dataset("train_token", train, val)
    made = {"SHORT": short, "TRAIN_TOKEN": unknown, "FOREIGN": foreign}
    late = python_hook(runs.folder / "late", LATE)
    runs.start("foreign train token 2", ranks=2, DATA_PATH=unknown, VAL_LOSS_EVERY=0)
    runs.start("indivisible 2", ranks=2, PYTHONPATH=late, TRAIN_BATCH_TOKENS=7 * 64)
    for name, (settings, _) in MISTAKES.items():
        mine = {key: made.get(str(value), value) for key, value in settings.items()}
        runs.start(name, **mine)
        if name in SHARED_MISTAKES:
            runs.start(f"{name} 2", ranks=2, PYTHONPATH=late, **mine)


def start_on_what_was_trained(runs: Runs) -> None:
    artifact, two = runs.folder / "one/final_model.ptz", runs.folder / "two"
    runs.start("eval", after="one", EVAL_ONLY=artifact)
    runs.start("resume", after="two", OUTPUT_DIR=two, RESUME_FROM=two / "final_model.pt")
    runs.start("no git", after="one", EVAL_ONLY=artifact, PATH="/nowhere")
    runs.start("other", after="one", EVAL_ONLY=artifact, NUM_LAYERS=5, KEY_SHIFT=1)
    val_only = runs.dataset("val_only", **runs.tokens)
    (val_only / "fineweb_train_000000.bin").unlink()
    script = runs.folder / "script/train_gpt.py"  # the program by itself
    script.parent.mkdir()
    shutil.copy(REPO / "train_gpt.py", script)
    runs.start("alone", after="one", script=script, DATA_PATH=val_only, EVAL_ONLY=artifact)


def start_seeds(runs: Runs) -> None:
    seeds: dict[str, Any] = dict(
        OUTPUT_DIR=runs.folder / "seeds", ITERATIONS=6, BASELINE_LOSS="9.1,9.2,9.15"
    )
    runs.start("seed 1", SEED=1, **seeds)
    runs.start("seed 2", after="seed 1", SEED=2, **seeds)
    twice = seeds | dict(TRAIN_BATCH_TOKENS=1024)
    runs.start("seed 3, another batch", after="seed 2", SEED=3, **twice)


def start_struck(runs: Runs) -> None:
    long: dict[str, Any] = dict(ITERATIONS=100_000, VAL_LOSS_EVERY=0)
    runs.start("interrupted", strike=terminate, **long)
    saved = runs.folder / "interrupted/final_model.partial.pt"
    runs.start("resumed", after="interrupted", bare=True, RESUME_FROM=saved)
    runs.start("finished early", strike=terminate, ON_INTERRUPT="finish", **long)
    runs.start("interrupted 2", ranks=2, strike=terminate, **long)
    runs.start("widowed", ranks=2, strike=kill_rank_1, **long)
    full = runs.folder / "full disk"
    full.mkdir()
    for file in RESULTS:
        (full / file).write_text(EARLIER)
    (full / "final_model.partial.ptz.tmp").symlink_to("/dev/full")
    runs.start("full disk")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Every run of this file."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    runs.start("one")
    runs.start("two", ranks=2, EVAL_DUMP=runs.folder / "losses.npz")
    start_mistakes(runs)
    start_on_what_was_trained(runs)
    start_seeds(runs)
    start_struck(runs)
    ticking = python_hook(runs.folder / "ticking", TICKING)
    capped: dict[str, Any] = dict(MAX_WALLCLOCK_SECONDS=2, ITERATIONS=1000, VAL_LOSS_EVERY=0)
    runs.start("capped", PYTHONPATH=ticking, **capped)
    yield runs
    runs.close()


Get = Callable[[str], Finished]


@pytest.fixture
def finished(runs: Runs) -> Get:
    return lambda name: runs.queued[name].result()


# Runs that succeed


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_run_ends_well_and_leaves_its_files(finished: Get, name: str) -> None:
    run = finished(name)
    assert run.status == 0, run.stderr
    assert run.errors == [] and "Traceback" not in run.stderr
    for file in (*RESULTS, "train_seed1337.log", "result_seed1337.json"):
        assert (run.folder / file).stat().st_size > 0, file
    assert not list(run.folder.glob("*.tmp"))


@pytest.mark.parametrize("name", ["one", "two"])
def test_submission_holds_every_field(finished: Get, name: str) -> None:
    report = finished(name).report
    assert [key for key in SUBMISSION_KEYS if report.get(key) is None] == []
    seed = report["seed_results"][str(report["seeds"][0])]
    assert [key for key in SEED_KEYS if seed.get(key) is None] == []
    assert report["track"] == "10min_16mb"


@pytest.mark.parametrize("name", ["one", "two"])
def test_submission_states_the_sizes_of_the_files(finished: Get, name: str) -> None:
    run = finished(name)
    code, artifact = REPO / "train_gpt.py", run.folder / "final_model.ptz"
    assert run.report["bytes_code"] == code.stat().st_size
    assert run.report["bytes_model_int6_zstd"] == artifact.stat().st_size
    assert run.report["bytes_total"] == code.stat().st_size + artifact.stat().st_size < 16_000_000


@pytest.mark.parametrize("name", ["one", "two"])
def test_submission_states_what_was_set_and_trained(finished: Get, name: str) -> None:
    report = finished(name).report
    assert report["eval_stride"] == 16 and report["step_stop"] == 12
    assert report["wallclock_seconds"] * 1e3 == pytest.approx(12 * report["step_avg_ms"], rel=0.01)


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_only_seed_has_the_numbers_of_the_submission(finished: Get, name: str) -> None:
    report = finished(name).report
    (seed,) = report["seed_results"].values()
    assert seed["steps"] == report["step_stop"] and seed["artifact_bytes"] == report["bytes_total"]
    assert seed["val_bpb"] == report["val_bpb"] and seed["val_loss"] == report["val_loss"]


def test_submission_repeats_the_scores_of_the_log(finished: Get) -> None:
    run = finished("one")
    report = run.report
    for key, line in (
        ("val_bpb", "final_int6_zstd_sliding_exact"),
        ("val_bpb_roundtrip", "final_int6_zstd_roundtrip_exact"),
        ("trained_val_bpb", "stage:trained"),
        ("averaged_val_bpb", "stage:averaged"),
        ("blended_val_bpb", "stage:blended"),
    ):
        assert run.score(line) == pytest.approx(report[key], abs=1e-8), key
    floats = {report[f"{stage}_val_bpb"] for stage in ("trained", "averaged", "blended")}
    scores = floats | {report["val_bpb"], report["val_bpb_roundtrip"]}
    assert len(scores) == 5, "two stages share one number"
    assert report["trained_val_bpb"] == pytest.approx(report["val_bpb_roundtrip"], rel=0.05)


def test_bits_per_byte_follow_from_the_loss_and_the_text(finished: Get, runs: Runs) -> None:
    run = finished("one")
    report = run.report
    text_bytes = sum(len(text.encode()) + 1 for text in documents(20, 2))  # + the dummy space
    tokens = len(runs.tokens["val"])
    assert runs.tokens["val"].count(1) == 20
    # A space after a BOS is no text: the challenge's rule counts it not.
    expected = report["val_loss"] * (tokens - 1) / np.log(2) / (text_bytes - 20)
    assert report["val_bpb"] == pytest.approx(expected, rel=1e-6)


def test_the_log_has_the_lines_of_the_challenge(finished: Get) -> None:
    log = finished("one").log
    train = r"step:(\d+)/12 train_loss:\d+\.\d{4} train_time:(\d+)ms step_avg:(\d+\.\d\d)ms"
    steps = [m for line in log if (m := re.fullmatch(train, line))]
    assert [int(step[1]) for step in steps] == [*range(1, 11), 12]
    for step in steps:  # train_time is rounded to a millisecond
        assert float(step[3]) * int(step[1]) == pytest.approx(int(step[2]), abs=0.6)
    val = (
        r"step:(\d+)/12 val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} "
        r"train_time:\d+ms step_avg:\d+\.\d\dms"
    )
    assert [m[1] for line in log if (m := re.fullmatch(val, line))][:1] == ["6"]
    final = r"final_int6_zstd_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}.*"
    assert sum(bool(re.fullmatch(final, line)) for line in log) == 1
    packing = r"pack_time:\d+\.\ds, from the weights alone: no token was read"
    assert sum(bool(re.fullmatch(packing, line)) for line in log) == 1
    assert sum(bool(re.fullmatch(r"peak_gpu_memory:\d+\.\d\dGiB", line)) for line in log) == 1


def test_the_log_tells_what_was_trained(finished: Get) -> None:
    """By it alone a maintainer sees seconds, data, program and that nothing was compiled."""
    run = finished("one")
    (line,) = (line for line in run.log if line.startswith("training "))
    facts = dict(field.split(":") for field in line.split()[1:])
    keys = ("step_stop", "wallclock_seconds", "qat_steps", "swa_steps", "train_tokens",
            "train_digest", "code_sha256", "graphs_compiled_on_clock", "interrupted")  # fmt: skip
    assert {key: facts[key] for key in keys} == {key: str(run.report[key]) for key in keys}
    assert facts["seed"] == "1337" and facts["graphs_compiled_on_clock"] == "0"


def test_the_last_line_holds_score_and_size(finished: Get) -> None:
    run = finished("one")
    report = run.report
    assert run.log[-1] == run.stdout.splitlines()[-1]
    assert f"{report['val_bpb']:.8f}" in run.log[-1]
    assert str(report["bytes_total"]) in run.log[-1]


def test_the_log_holds_the_source_and_the_settings(finished: Get) -> None:
    log = "\n".join(finished("one").log)
    assert (REPO / "train_gpt.py").read_text().strip() in log
    assert '"train_seq_len": 64' in log and '"seed": 1337' in log
    assert torch.__version__ in log


def losses(run: Finished) -> list[float]:
    found = [re.match(r"step:\d+/\d+ train_loss:(\d+\.\d{4}) ", line) for line in run.log]
    return [float(m[1]) for m in found if m]


def test_one_and_two_ranks_print_the_same_losses(finished: Get) -> None:
    """At full precision: test_optim.py::test_ranks_change_no_loss."""
    one, two = losses(finished("one")), losses(finished("two"))
    assert len(one) == 11 and one[-1] < 0.98 * one[0]
    assert two[:5] == pytest.approx(one[:5], abs=1.01e-4)
    assert two == pytest.approx(one, rel=5e-3)


def test_one_and_two_ranks_score_the_same(finished: Get) -> None:
    reports = [finished(name).report for name in ("one", "two")]
    assert reports[0]["val_tokens"] == reports[1]["val_tokens"]
    for key in ("trained_val_bpb", "averaged_val_bpb", "val_bpb_roundtrip", "val_bpb"):
        assert reports[0][key] == pytest.approx(reports[1][key], rel=2e-3), key


def test_eval_only_repeats_the_score(finished: Get) -> None:
    trained, again = finished("one"), finished("eval")
    assert again.status == 0, again.stderr
    for line in ("final_int6_zstd_roundtrip_exact", "final_int6_zstd_sliding_exact"):
        assert again.score(line) == pytest.approx(trained.score(line), abs=1e-6)
    assert "train_loss" not in again.stdout
    assert not again.report, "submission.json was written"


def test_artifact_script_and_val_split_suffice_for_the_score(finished: Get) -> None:
    trained, alone = finished("one"), finished("alone")
    assert alone.status == 0, alone.stderr
    for line in ("final_int6_zstd_roundtrip_exact", "final_int6_zstd_sliding_exact", "val_bpb"):
        assert alone.score(line) == pytest.approx(trained.score(line), abs=1e-6)


def test_the_dump_of_two_ranks_holds_the_losses_of_the_scores(finished: Get, runs: Runs) -> None:
    report = finished("two").report
    text_bytes = sum(len(text.encode()) for text in documents(20, 2))
    with np.load(runs.folder / "losses.npz") as dump:
        assert set(dump.files) == {"plain", "sliding"}
        for name, key in (("plain", "val_bpb_roundtrip"), ("sliding", "val_bpb")):
            assert dump[name].dtype == np.float32
            assert dump[name].shape == (len(runs.tokens["val"]) - 1,) == (report["val_tokens"],)
            bpb = dump[name].sum(dtype=np.float64) / np.log(2) / text_bytes
            assert bpb == pytest.approx(report[key], rel=1e-6)
    assert not list(runs.folder.glob("*.tmp"))


def test_a_machine_without_git_runs_as_well(finished: Get) -> None:
    run = finished("no git")
    assert run.status == 0, run.stderr


def test_resume_repeats_packing_bit_for_bit(finished: Get) -> None:
    trained, again = finished("two"), finished("resume")
    assert again.status == 0, again.stderr
    assert trained.artifact and trained.artifact == again.artifact
    for line in ("stage:averaged", "final_int6_zstd_sliding_exact"):
        assert again.score(line) == pytest.approx(trained.score(line), abs=1e-6)
    for key in ("step_stop", "step_avg_ms", "wallclock_seconds", "bytes_total"):
        assert trained.report[key] == again.report[key], key


def test_resume_in_the_same_folder_keeps_the_log_of_the_training(finished: Get) -> None:
    run = finished("resume")
    assert run.status == 0, run.stderr
    assert len(losses(run)) == 11, "train.log was overwritten"


def test_a_capped_run_ends_inside_its_cap(finished: Get) -> None:
    run = finished("capped")
    assert run.status == 0, run.stderr
    report = run.report
    assert 12 < report["step_stop"] < 1000
    assert 2.0 - 5 * report["step_avg_ms"] / 1e3 < report["wallclock_seconds"] <= 2.0


# Several seeds


def test_a_second_seed_is_merged_into_the_submission(finished: Get) -> None:
    first, second = finished("seed 1"), finished("seed 2")
    assert second.status == 0, second.stderr
    assert first.report["seeds"] == [1] and second.report["seeds"] == [1, 2]
    assert second.report["seed_results"]["1"] == first.report["seed_results"]["1"]


@pytest.mark.parametrize("key", ["val_loss", "val_bpb"])
def test_the_score_of_two_seeds_is_their_mean(finished: Get, key: str) -> None:
    report = finished("seed 2").report
    values = [report["seed_results"][seed][key] for seed in "12"]
    assert len(set(values)) == 2, "both seeds gave the same model"
    assert report[key] == pytest.approx(np.mean(values))
    assert report[f"{key}_std"] == pytest.approx(np.std(values, ddof=1))


def test_the_sizes_of_two_seeds_are_told_by_mean_and_largest(finished: Get) -> None:
    report = finished("seed 2").report
    sizes = [report["seed_results"][seed]["artifact_bytes"] for seed in "12"]
    assert report["artifact_bytes_mean"] == np.mean(sizes)
    assert report["artifact_bytes_max"] == max(sizes)


def test_two_seeds_are_tested_against_the_baseline(finished: Get) -> None:
    report = finished("seed 2").report
    assert report["record"] is True and report["p_value"] < 0.01


def test_the_last_line_of_a_second_seed_is_its_own_score(finished: Get) -> None:
    run = finished("seed 2")
    expected = run.report["seed_results"]["2"]["val_bpb"]
    assert run.score("val_bpb:") == pytest.approx(expected, abs=1e-8)


def test_every_seed_keeps_its_log_and_train_log_is_the_latest(finished: Get) -> None:
    last = finished("seed 3, another batch")
    logs = {n: (last.folder / f"train_seed{n}.log").read_text() for n in (1, 2, 3)}
    for seed, log in logs.items():
        assert f'"seed": {seed},' in log and "final_int6_zstd_sliding_exact" in log
    assert logs[3] == (last.folder / "train.log").read_text()
    assert not list(last.folder.glob("*.partial.*"))


def test_a_run_with_other_settings_is_not_merged_and_says_so(finished: Get) -> None:
    run = finished("seed 3, another batch")
    assert run.status == 0, run.stderr
    assert run.report["seeds"] == [3] and "val_bpb_std" not in run.report
    refused = [line for line in run.log if line.startswith("seeds:")]
    why = "is of another train_batch_tokens and is not merged"
    assert refused == [f"seeds: result_seed{n}.json {why}" for n in (1, 2)]


def test_the_log_says_what_the_rules_ask_for_and_the_bytes_once(finished: Get) -> None:
    run = finished("one")
    (line,) = [line for line in run.log if line.startswith("compliance ")]
    seed = run.report["seed_results"]["1337"]
    assert f"train_seconds:{seed['train_seconds']} (<= 600: true)" in line
    assert f"eval_seconds:{seed['eval_seconds']} (<= 600: true)" in line
    assert "seeds:1 (>= 3: false)" in line and "train_shards:1 " in line
    assert f"val_tokens:{run.report['val_tokens']} (FineWeb: false)" in line
    fits = {name: rule["fits"] for name, rule in run.report["compliance"].items()}
    assert fits == dict(train_seconds=True, eval_seconds=True, artifact_bytes=True, seeds=False,
                        val_tokens=False, hardware=False)  # fmt: skip
    total = str(run.report["bytes_total"])
    assert [line.startswith("val_bpb:") for line in run.log if total in line] == [True]


# Runs that are struck


def test_an_interrupted_run_says_how_to_go_on(finished: Get) -> None:
    run = finished("interrupted")
    check_failure(run, r"interrupted at step \d+: RESUME_FROM=\S+final_model\.partial\.pt")
    assert "Traceback" not in run.stderr
    assert not run.report and not run.artifact


def test_an_interrupted_run_saves_what_it_trained(finished: Get) -> None:
    again = finished("resumed")
    assert again.status == 0, again.stderr
    assert again.report["interrupted"] and 4 <= again.report["step_stop"] < 100_000


def test_a_resumed_run_states_settings_and_code_of_the_weights(finished: Get, runs: Runs) -> None:
    """Of an interrupted run too, and where the environment names nothing but the checkpoint."""
    recipe = finished("resumed").report["recipe"]
    trained = torch.load(
        finished("interrupted").folder / "final_model.partial.pt", weights_only=True
    )
    assert recipe["whole_run"] is False
    assert (recipe["iterations"], recipe["model_dim"], recipe["eval_stride"]) == (100_000, 64, 16)
    assert recipe["code"] == recipe["packing_code"] == trained["facts"]["code_sha256"]
    assert recipe["train_digest"] == trained["facts"]["train_digest"]
    assert recipe["train_tokens"] == len(runs.tokens["train"])


def test_two_interrupted_ranks_save_one_state(finished: Get) -> None:
    run = finished("interrupted 2")
    assert run.status != 0
    assert any("interrupted at step" in line for line in run.errors), run.stderr
    saved = torch.load(run.folder / "final_model.partial.pt", weights_only=True)
    assert set(saved["stages"]) == {"trained", "averaged"} and saved["facts"]["interrupted"]


def test_an_interrupted_run_may_finish_packed_and_scored(finished: Get) -> None:
    run = finished("finished early")
    assert run.status == 0, run.stderr
    assert run.report["interrupted"] and 4 <= run.report["step_stop"] < 100_000
    assert run.score("final_int6_zstd_sliding_exact") == pytest.approx(run.report["val_bpb"])
    assert all((run.folder / file).exists() for file in RESULTS)


def test_a_rank_that_is_killed_ends_the_other(finished: Get) -> None:
    """Within HANG; by itself a rank waits half an hour for another."""
    run = finished("widowed")
    assert run.status != 0
    assert re.search(r"SIGKILL|Signal 9", run.stderr), run.stderr
    assert not run.report


def test_a_full_disk_at_export_keeps_every_earlier_result(finished: Get) -> None:
    run = finished("full disk")
    check_failure(run, r"No space left on device.*OUTPUT_DIR")
    assert "Traceback" not in run.stderr
    for file in RESULTS:
        assert (run.folder / file).read_text() == EARLIER, file
    saved = torch.load(run.folder / "final_model.partial.pt", weights_only=True)
    assert set(saved["stages"]) == {"trained", "averaged"} and saved["facts"]["step_stop"] == 12


# Runs that must fail


def check_failure(run: Finished, pattern: str) -> None:
    assert run.status != 0
    assert len(run.errors) == 1, run.stderr
    assert re.search(pattern, run.errors[0]), run.errors


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_the_run_with_one_message(finished: Get, name: str) -> None:
    run = finished(name)
    check_failure(run, MISTAKES[name][1])
    assert "Traceback" not in run.stderr


def test_an_artifact_of_another_architecture_is_refused(finished: Get) -> None:
    run = finished("other")
    check_failure(run, r"\.ptz: holds a model of another shape; set NUM_LAYERS=4 KEY_SHIFT=0$")
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("name", SHARED_MISTAKES)
def test_a_mistake_ends_both_ranks_with_one_message(finished: Get, name: str) -> None:
    """Also where rank 0, which prints it, is the last to meet it."""
    run = finished(f"{name} 2")
    check_failure(run, MISTAKES[name][1])


def test_a_batch_that_two_ranks_cannot_share_is_refused(finished: Get) -> None:
    run = finished("indivisible 2")
    check_failure(run, r"TRAIN_BATCH_TOKENS=448.*2 ranks")


def test_a_fault_that_one_rank_meets_ends_both(finished: Get) -> None:
    run = finished("foreign train token 2")
    assert run.status != 0
    assert run.errors and all(re.search("token id 999", line) for line in run.errors)
