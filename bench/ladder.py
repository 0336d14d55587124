"""Measures how the best settings move with batch and length, towards the official run.

    python bench/ladder.py run --seconds 540 --workers 2       # the next rows that fit in the time
    IN_TURN=1 python bench/ladder.py run ...    # of those on a GPU, one trains while others start
    python bench/ladder.py fit                                 # optima, and what they say of 8 GPUs
    python bench/ladder.py fit --change MUON_MOMENTUM=0.97     # what the law says of one value
    python bench/ladder.py plot                                # the same as a picture

DESIGN holds the rows in order of value: a rung (batch x steps), what a row changes, and the change
in averaged bpb that was predicted before the run.  `run` takes the rows without a result.  Each
adds a line of JSON to the rows file when it ends, so a later call goes on where one stopped.
`run --seconds 0` checks and lists what is left.  DATA_PATH and TOKENIZER_PATH name the corpus.
docs/LADDER.md explains the choice of rows and how to read the fit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import importlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "bench")]
import ablate  # noqa: E402

ROWS_FILE = REPO / "docs/ladder.jsonl"
PICTURE = REPO / "docs/ladder.png"
SHARD_HEADER_BYTES = 1024

# ---- Design --------------------------------------------------------------------------------------


class Rung(NamedTuple):
    """A size of run."""

    batch: int  # tokens a step
    steps: int

    @property
    def tokens(self) -> int:
        return self.batch * self.steps

    def __str__(self) -> str:
        return f"{self.batch:,} x {self.steps:,}"


RUNGS = {
    "A": Rung(98_304, 800),
    "B": Rung(98_304, 3_200),
    "C": Rung(393_216, 800),
    "D": Rung(98_304, 1_600),
    "E": Rung(196_608, 800),
    "F": Rung(393_216, 1_600),
    "G": Rung(98_304, 6_400),
}
P_TIME = Rung(98_304, 2_600)  # what the card does in 180 s on one GPU
VERIFICATION = Rung(393_216, 3_200)  # the largest run that two GPUs do in 10 minutes
OFFICIAL = Rung(786_432, 8_300)

# Every row starts from these, so that a later change of the defaults moves no row.
BASE = {
    "MUON_MOMENTUM": "0.95",
    "MUON_MOMENTUM_WARMUP_START": "0.92",
    "MUON_MOMENTUM_WARMUP_STEPS": "320",
    "LR_WARMUP_STEPS": "30",
    "MATRIX_LR": "0.03",
    "EMBED_LR": "0.02",
    "SCALAR_LR": "0.01",
    "DECAY_PER_RUN": "160",
    "MUON_BETA2": "0.95",
    "BETA2": "0.95",
    "WARMDOWN_FRACTION": "0.85",
    "ROPE_BASE": "10000",
    "ROPE_DIMS": "32",
    "LOGIT_SOFTCAP": "30",
    "LOGIT_SHIFT": "0",
    "LOGIT_WIDTH": "30",
    "NUM_HEADS": "4",
    "NUM_KV_HEADS": "2",
    "XSA_LAYERS": "4",
    "MLP_SLOPE": "0.5",
    "SWA_THRESHOLD": "0.2",
    "QAT_THRESHOLD": "0.15",
    "SWA_SHARE": "0.3",
    "EARLY_SEQ_LEN": "1024",
    "EARLY_FRACTION": "0",
    "SEED": "1337",
}
# What makes a run end at its last step, whatever it shares its GPU with, and scores it plainly.
BY_STEPS = {"PRESET": "card", "MAX_WALLCLOCK_SECONDS": "0", "EVAL_STRIDE": "0"}
BY_STEPS |= {"VAL_LOSS_EVERY": "0"}


class Row(NamedTuple):
    """One run of the design."""

    rung: str
    changes: str  # KEY=VALUE ..., against BASE; empty: the base of its rung
    prediction: float  # averaged bpb minus that of the rung's base
    reason: str

    @property
    def id(self) -> str:
        return f"{self.rung} {self.changes or 'base'}"

    @property
    def size(self) -> Rung:
        return RUNGS[self.rung]

    @property
    def overrides(self) -> dict[str, str]:
        return dict(item.split("=") for item in self.changes.split())

    @property
    def variant(self) -> ablate.Variant:
        size = {"TRAIN_BATCH_TOKENS": str(self.size.batch), "ITERATIONS": str(self.size.steps)}
        settings = BY_STEPS | BASE | size | self.overrides
        return ablate.Variant(self.id, f"{self.prediction:+.4f}", settings)


HEADS_8X64 = "NUM_HEADS=8 NUM_KV_HEADS=4 ROPE_DIMS=16"
CAP = "LOGIT_SOFTCAP=11.5 LOGIT_SHIFT=5 LOGIT_WIDTH=15"
EMA = "OFF=plain_mean SWA_THRESHOLD=2"

# In order of value.
DESIGN = [
    # All sides at the cheapest size
    Row("A", "", 0, "base"),
    Row("A", "MUON_MOMENTUM=0.97", 0.002, "P-time +0.0027; here the warm-up hides half"),
    Row("A", "MUON_MOMENTUM=0.985", 0.008, "0.99 cost 0.03 and more after 700 steps"),
    Row("A", "MATRIX_LR=0.021", 0.004, "0.02: +0.0107 after 300 steps"),
    Row("A", "MATRIX_LR=0.042", 0.001, "0.045: -0.0009 after 300 steps; longer wants less"),
    Row("A", "DECAY_PER_RUN=80", 0.004, "110: +0.0046 after 300 steps"),
    Row("A", "DECAY_PER_RUN=320", 0.012, "230: +0.0072 after 300 steps"),
    # Batch at one length, and length at one batch
    Row("E", "", 0, "base"),
    Row("E", "MUON_MOMENTUM=0.97", 0.004, "between A and C"),
    Row("D", "", 0, "base"),
    Row("D", "MUON_MOMENTUM=0.97", 0.002, "as A and B"),
    Row("D", "DECAY_PER_RUN=80", 0.001, "between A and B"),
    Row("E", "MATRIX_LR=0.042", 0.001, "between A and C"),
    Row("D", "MATRIX_LR=0.021", 0.001, "between A and B"),
    Row("E", "DECAY_PER_RUN=80", -0.001, "as A"),
    Row("C", "", 0, "base"),
    Row("C", "MUON_MOMENTUM=0.97", 0.003, "A +0.0046; published runs at full batch take 0.97"),
    Row("C", "DECAY_PER_RUN=80", 0.004, "the law of 15 rows"),
    Row("C", "MATRIX_LR=0.042", -0.004, "the law of 15 rows"),
    Row("B", "", 0, "base"),
    Row("B", "DECAY_PER_RUN=80", 0.001, "the law of 15 rows"),
    Row("B", "MUON_MOMENTUM=0.97", 0.002, "P-time +0.0027; longer forgives"),
    Row("B", "MATRIX_LR=0.021", 0.002, "the law of 15 rows"),
    # The other sides of the optima
    Row("D", "MUON_MOMENTUM=0.92", -0.002, "A -0.0032; longer wants more"),
    Row("C", "MUON_MOMENTUM=0.92", -0.002, "A -0.0032; larger batch averages less"),
    Row("B", "MUON_MOMENTUM=0.92", -0.0005, "the law of 23 rows"),
    Row("E", "MUON_MOMENTUM=0.92", -0.003, "A -0.0032; 0.97 cost both the same"),
    Row("D", "DECAY_PER_RUN=320", 0.01, "P-time +0.0067, A +0.0180"),
    Row("E", "DECAY_PER_RUN=320", 0.015, "between A and C"),
    Row("A", "MUON_MOMENTUM=0.92", -0.001, "A's quadratic has its optimum at 0.89"),
    Row("D", "MATRIX_LR=0.042", 0.003, "A +0.0031; 0.04: +0.0029 before NorMuon"),
    Row("E", "MATRIX_LR=0.021", 0.004, "the law of 23 rows"),
    Row("B", "DECAY_PER_RUN=320", 0.005, "P-time +0.0067; longer forgives"),
    Row("C", "DECAY_PER_RUN=320", 0.012, "as A; more tokens forgive a little"),
    Row("B", "MATRIX_LR=0.042", 0.003, "longer wants less"),
    Row("C", "MATRIX_LR=0.059", -0.004, "the law of 15 rows"),
    Row("D", "OFF=steady_momentum", -0.0005, "a fall to 0.90, as fits the end's noise"),
    Row("D", "MUON_MOMENTUM=0.97 OFF=steady_momentum", 0.002, "half of 0.97's loss is at the end"),
    Row("C", "MUON_MOMENTUM=0.97 OFF=steady_momentum", 0.001, "as D"),
    Row("D", "MUON_MOMENTUM=0.985", 0.010, "A +0.0144; longer forgives"),
    Row("E", "MUON_MOMENTUM=0.985", 0.012, "as A"),
    Row("C", "MUON_MOMENTUM=0.985", 0.010, "less than A: less noise"),
    Row("B", "MUON_MOMENTUM=0.985", 0.006, "less than A: the warm-up is short there"),
    # Techniques that may be artefacts of the start or of small batches
    Row("D", "ROPE_DIMS=128", 0, "-0.0089 after 300 steps, the start's speed"),
    Row("D", "OFF=depth_scale", 0, "-0.0080 after 300 steps, the start's speed"),
    Row("C", "ROPE_DIMS=128", -0.003, "800 steps are still the start"),
    Row("C", "OFF=depth_scale", -0.003, "800 steps are still the start"),
    Row("D", "OFF=normuon", 0.012, "half of +0.0237 after 300 steps"),
    Row("C", "OFF=normuon", 0.01, "less noise to equalise"),
    Row("D", "MLP_SLOPE=0", 0.005, "half of +0.0104 after 300 steps"),
    Row("C", "MLP_SLOPE=0", 0.005, "published +0.002 to +0.003 after 7,000"),
    Row("D", "ROPE_DIMS=64", -0.0015, "half of 128's -0.0032"),
    Row("A", "ROPE_DIMS=64", -0.002, "D -0.0015; 128 dims -0.0089 after 300 steps"),
    Row("D", "ROPE_DIMS=96", -0.0025, "between 64 and 128"),
    Row("A", "ROPE_DIMS=96", -0.003, "between D -0.0032 and 300 steps -0.0089, of 128"),
    Row("A", "ROPE_BASE=100000", 0.001, "D +0.0014"),
    Row("A", "BETA2=0.99", -0.0005, "as D"),
    Row("A", "MUON_MOMENTUM_WARMUP_STEPS=80", 0.001, "without any +0.002 after 1,600 steps"),
    Row("A", "MUON_MOMENTUM=0.97 MUON_MOMENTUM_WARMUP_STEPS=80", 0.004, "more steps at 0.97"),
    Row("C", "MUON_MOMENTUM=0.97 MATRIX_LR=0.042", 0, "sum of +0.001 and -0.002, and a bit"),
    Row("C", "EMBED_LR=0.03", -0.0005, "larger batch wants more"),
    Row("C", "BETA2=0.99", 0, "published neutral"),
    Row("C", "WARMDOWN_FRACTION=0.65", 0.001, "0.6: +0.0016 after 300 steps"),
    Row("C", "ROPE_BASE=100000", -0.0005, "published -0.001 to -0.003 on weak bases"),
    Row("D", "EMBED_LR=0.03", 0.001, "0.035: +0.0033 after 700 steps"),
    Row("D", "BETA2=0.99", -0.0005, "small batches want long memory"),
    Row("D", "WARMDOWN_FRACTION=0.65", 0.001, "0.6: +0.0016 after 300 steps"),
    Row("D", "ROPE_BASE=100000", -0.0005, "published -0.001 to -0.003 on weak bases"),
    Row("D", "OFF=smear_by_token", 0.003, "+0.0044 after 300 steps, +0.0019 P-time"),
    Row("D", HEADS_8X64, 0.004, "+0.0052 after 350 steps"),
    Row("D", "OFF=polar_express", 0.002, "+0.0037 after 300 steps, published 0"),
    Row("D", "OFF=shuffling", 0.004, "+0.0084 after 300 steps; read once here"),
    Row("D", EMA, 0.001, "its memory of 286 steps is as long as the mean's"),
    Row("D", "SWA_THRESHOLD=0.4", 0.0005, "older iterates"),
    Row("D", "SWA_THRESHOLD=0.1", 0.0002, "averaging gains 0.0006 at P-time"),
    Row("D", "QAT_THRESHOLD=0.3", 0.001, "+0.0017 after 350 steps, packed"),
    Row("D", "QAT_THRESHOLD=0", -0.001, "rounding costs the float model"),
    # Candidates, at equal steps: at equal time each takes or leaves 0.0008 a percent of the step
    Row("D", "XSA_LAYERS=11", -0.002, "+0.0008 after 350 steps; published -0.0016; + 4 %"),
    Row("D", "EARLY_FRACTION=0.5", 0.001, "less context seen early; - 6 % a step"),
    Row("B", "EARLY_FRACTION=0.5", -0.001, "D -0.0029; longer forgives"),
    Row("C", "EARLY_FRACTION=0.5", -0.003, "D -0.0029; 800 steps are the start"),
    Row("D", "EARLY_FRACTION=0.5 XSA_LAYERS=11", -0.004, "as with lanes"),
    Row("D", "EARLY_FRACTION=0.8", -0.002, "0.5 -0.0029; less time for 2,048; - 9 % a step"),
    Row("D", CAP, -0.001, "published 2 % of the steps, at another bound"),
    Row("D", "ON=loops", -0.004, "published -0.002 to -0.003 at equal time; + 13 % a step"),
    Row("A", "XSA_LAYERS=11", -0.002, "D -0.0033, but +0.0008 after 350 steps"),
    Row("A", "ON=loops", -0.003, "less than D: 520 looped steps"),
    Row("A", "EARLY_FRACTION=0.5", -0.002, "D -0.0029, B -0.0032"),
    Row("B", CAP, -0.001, "A -0.0025, D -0.0017: it fades"),
    Row("C", CAP, -0.0015, "as A and D"),
    Row("C", "ON=loops", -0.005, "A -0.0037, D -0.0062"),
    Row("B", "ON=loops", -0.007, "A -0.0037, D -0.0062: it grows with the run"),
    Row("A", CAP, -0.001, "as D"),
    Row("A", "EARLY_FRACTION=0.8", -0.0015, "0.5 -0.002; less time for 2,048"),
    Row("A", "ON=soap MUON_BETA2=0.99", -0.003, "published 15 % fewer steps at a batch of 524k"),
    Row("C", "ON=soap MUON_BETA2=0.99", -0.005, "as A; a larger batch is less noisy"),
    # The far ends, which also test what the rest extrapolates
    Row("F", "", 0, "base"),
    Row("F", "MUON_MOMENTUM=0.97", 0, "towards the full batch"),
    Row("F", "MATRIX_LR=0.042", 0.0005, "the law of 23 rows"),
    Row("F", "DECAY_PER_RUN=320", 0.007, "as E"),
    Row("G", "", 0, "base"),
    Row("G", "MUON_MOMENTUM=0.97", 0.001, "less than B"),
    Row("G", "MATRIX_LR=0.021", -0.002, "longer wants less"),
    Row("G", "DECAY_PER_RUN=320", 0.003, "less than B"),
    Row("F", "MATRIX_LR=0.059", 0.003, "the law of 23 rows"),
    Row("F", "DECAY_PER_RUN=80", 0.004, "as E"),
    Row("F", "MUON_MOMENTUM=0.985", 0.003, "less than E"),
    Row("F", "MUON_MOMENTUM=0.92", 0.001, "as E"),
    Row("G", "ROPE_DIMS=128", 0.001, "published 0.002 together with the next"),
    Row("G", "OFF=depth_scale", 0.001, "published 0.002 together with the one before"),
    Row("G", "MATRIX_LR=0.042", 0.005, "longer wants less"),
    Row("G", "DECAY_PER_RUN=80", 0.005, "as B"),
    Row("G", "MUON_MOMENTUM=0.92", 0.001, "as B"),
    Row("G", EMA, 0, "published as good as the mean"),
]

# ---- The rows file -------------------------------------------------------------------------------
Record = dict[str, Any]  # a line of the rows file: a result, or a failure with its message


def read_records(path: Path) -> list[Record]:
    """All whole lines; a last line that a kill cut off is none.

    Raises Mistake for any other broken line.
    """
    records: list[Record] = []
    if not path.exists():
        return records

    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ablate.Mistake(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            if number < len(lines):
                raise ablate.Mistake(f"{path}: line {number} is not JSON; mend it") from None
            continue
        if not isinstance(record, dict) or not {"id", "corpus"} <= record.keys():
            raise ablate.Mistake(f"{path}: line {number} is no row of `run`; mend it")
        records.append(record)
    return records


def append_record(path: Path, record: Record) -> None:
    """Adds a line, in the place of one that a kill cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = "".join(json.dumps(old) + "\n" for old in read_records(path))
    if not path.exists() or path.read_text() != whole:
        path.write_text(whole)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def newest(records: Iterable[Record], corpus: str) -> dict[str, Record]:
    """By id, on the corpus of that name; a failure never hides a result."""
    found: dict[str, Record] = {}
    for record in records:
        known = found.get(record["id"])
        hides = known is not None and "failed" not in known and "failed" in record
        if corpus_name(record) == corpus and not hides:
            found[record["id"]] = record
    return found


def results(records: Iterable[Record], corpus: str) -> dict[str, Record]:
    rows = newest(records, corpus)
    return {key: record for key, record in rows.items() if "failed" not in record}


def corpus_name(record: Record) -> str:
    return str(record["corpus"]).split()[0]


def open_rows(known: Mapping[str, Record], pattern: str, again: bool) -> list[Row]:
    """Rows of the design that have no result; those that failed count as done unless `again`."""
    try:
        rows = [row for row in DESIGN if re.search(pattern, row.id)]
    except re.error as error:
        raise ablate.Mistake(f"--only {pattern}: no regular expression ({error})") from None
    if not rows:
        raise ablate.Mistake(f"--only {pattern}: no row of the design has such an id")
    return [row for row in rows if row.id not in known or (again and "failed" in known[row.id])]


# ---- Runs ----------------------------------------------------------------------------------------


class Pace(NamedTuple):
    """What a row takes on this hardware."""

    tokens_per_second: float  # of a GPU, over all that share it
    overhead: float  # seconds a row around its training: start, graphs, scores, packing

    def seconds(self, row: Row, sharing: int) -> float:
        return sharing * row.size.tokens / self.tokens_per_second + self.overhead


FIRST_PACE = Pace(13.9 * 98_304, 60.0)  # the card on an H100


def pace_of(records: Iterable[Record], hardware: str) -> Pace:
    """The median rate and the least overhead of the rows that ran on it, or FIRST_PACE.

    The first rows on a machine compile their kernels, which the others find.
    """
    rates = []
    overheads = []
    for record in records:
        if record.get("hardware") == hardware and "failed" not in record:
            rates.append(record["sharing"] * record["batch"] / record["ms"] * 1e3)
            overheads.append(record["wall"] - record["ms"] * record["steps"] / 1e3)
    if not rates:
        return FIRST_PACE
    overhead = min(*overheads, FIRST_PACE.overhead)
    return Pace(statistics.median(rates), overhead)


def run_rows(
    todo: Sequence[Row],
    seconds: float,
    slots: Sequence[str],
    measure: Callable[[Row, str], Record],
    keep: Callable[[Record], None],
    estimate: Callable[[Row], float],
    stopped: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> list[Row]:
    """Runs rows in their order, on one slot each, as long as one fits into the time.

    measure(row, slot) makes a record, in a thread; keep(record) stores it, in this one, unless the
    call has been `stopped`.  A row that does not fit gives way to later ones that do.  Returns the
    rows that were not started.
    """
    end = clock() + seconds
    left = list(todo)
    free = list(slots)
    running: dict[Future[Record], str] = {}
    with ThreadPoolExecutor(len(slots)) as pool:
        while True:
            while free and not stopped():
                fitting = [row for row in left if clock() + estimate(row) <= end]
                if not fitting:
                    break
                left.remove(fitting[0])
                slot = free.pop(0)
                running[pool.submit(measure, fitting[0], slot)] = slot
            if not running:
                return left

            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                free.append(running.pop(future))
                if not stopped():
                    keep(future.result())


def record_of(row: Row, result: ablate.Result | str, facts: Record) -> Record:
    """A line of the rows file; `facts` says where and when."""
    record: Record = {
        "id": row.id,
        "rung": row.rung,
        "batch": row.size.batch,
        "steps": row.size.steps,
        "overrides": row.overrides,
        "prediction": row.prediction,
        "reason": row.reason,
    }
    if isinstance(result, str):
        return record | {"failed": result} | facts
    if result.steps != row.size.steps:
        message = f"ended at step {result.steps} of {row.size.steps}"
        return record | {"failed": message} | facts
    scores = {stage: result.scores[stage] for stage in ("trained", "averaged", "packed")}
    record |= scores | {"ms": result.ms, "bytes": result.size, "seed": result.seed}
    return record | facts


def corpus_label(name: str, data_path: str) -> str:
    """The corpus's name and the tokens that its folder holds, e.g. `larger 254.5M+3.1M`.

    Raises Mistake if it holds none of a split.
    """
    counts = []
    for split in ("train", "val"):
        sizes = [path.stat().st_size for path in Path(data_path).glob(f"fineweb_{split}_*.bin")]
        tokens = sum((size - SHARD_HEADER_BYTES) // 2 for size in sizes)
        if not tokens:
            raise ablate.Mistake(f"DATA_PATH={data_path}: found no fineweb_{split}_*.bin; set it")
        counts.append(f"{tokens / 1e6:.1f}M")
    return f"{name} {'+'.join(counts)}"


def check_corpus(label: str, records: Iterable[Record]) -> None:
    """Raises Mistake if rows of that corpus's name are of other text: a fit would mix them."""
    name = label.split()[0]
    for other in {str(r["corpus"]) for r in records if corpus_name(r) == name} - {label}:
        raise ablate.Mistake(
            f"--corpus {name}: the rows are of {other}, DATA_PATH holds {label}; set DATA_PATH, or "
            "another name"
        )


def check_rows(rows: Iterable[Row], tg: Any, env: Mapping[str, str]) -> None:
    """Raises Mistake for a row that cannot run, and for a setting that rows would not show."""
    fields = dataclasses.fields(tg.Hyperparameters)
    hidden = [field.name.upper() for field in fields if not field.metadata["per_run"]]
    speed = {"MICRO_BATCH_TOKENS", "VAL_BATCH_SIZE", "WARMUP_STEPS", "VOCAB_SIZE"}
    strays = [name for name in hidden if name in env and name not in speed]
    if strays:
        raise ablate.Mistake(f"{', '.join(strays)} would change rows unseen; unset it")

    for row in rows:
        try:
            ablate.check(row.variant)
        except ablate.Mistake as error:
            raise ablate.Mistake(f"{row.id}: {error}") from None


def facts_of_call(options: argparse.Namespace, hardware: str, tg: Any, sharing: int) -> Record:
    """What all rows of a call share.  A call without time trains nothing and needs no corpus."""
    if ablate.in_turn():
        sharing = 1
    corpus = options.corpus
    if options.seconds:
        data_path = os.environ.get("DATA_PATH", tg.Hyperparameters.data_path)
        corpus = corpus_label(corpus, data_path)
    digest = hashlib.sha256((REPO / "train_gpt.py").read_bytes()).hexdigest()[:12]
    today = datetime.date.today().isoformat()
    facts = {"corpus": corpus, "code": digest, "hardware": hardware, "date": today}
    return {**facts, "sharing": sharing}


def run(options: argparse.Namespace) -> None:
    tg = importlib.import_module("train_gpt")
    records = read_records(options.rows)
    todo = open_rows(newest(records, options.corpus), options.only, options.again)
    check_rows(todo, tg, os.environ)
    gpus, hardware = ablate.gpus_of(os.environ)
    slots = [gpus[i % len(gpus)] for i in range(options.workers)]
    sharing = math.ceil(options.workers / len(gpus))
    facts = facts_of_call(options, hardware, tg, sharing)
    if options.seconds:
        check_corpus(facts["corpus"], records)
    files = [path for path in (options.rows, options.out) if path]
    running: list[subprocess.Popen[str]] = []
    signals: list[int] = []

    def stop(number: int, _: object) -> None:
        signals.append(number)
        for process in list(running):
            process.terminate()

    def measure(row: Row, gpu: str) -> Record:
        began = time.monotonic()
        result = ablate.in_a_process(row.variant, running, gpu)
        wall = round(time.monotonic() - began, 1)
        return record_of(row, result, facts | {"wall": wall})

    def keep(record: Record) -> None:
        records.append(record)
        for path in files:
            append_record(path, record)
        print(told(record), flush=True)

    def estimate(row: Row) -> float:
        return pace_of(records, hardware).seconds(row, sharing)

    signal.signal(signal.SIGTERM, stop)
    left = run_rows(todo, options.seconds, slots, measure, keep, estimate, lambda: bool(signals))
    for row in left:
        print(f"left: {row.id}, about {estimate(row):.0f} s")
    total = sum(row.size.tokens for row in left) / pace_of(records, hardware).tokens_per_second
    print(f"{len(left)} rows left, {total:.0f} s of training on one GPU ({hardware})")
    if signals:
        raise ablate.Mistake("stopped by SIGTERM; rows under way are not kept")


def told(record: Record) -> str:
    if "failed" in record:
        return f"{record['id']}: failed: {record['failed']}"
    scores = " / ".join(f"{record[stage]:.4f}" for stage in ("trained", "averaged", "packed"))
    pace = f"{record['ms']:.1f} ms a step, {record['wall']:.0f} s"
    return f"{record['id']}: {scores} bpb, {pace}, prediction {record['prediction']:+.4f}"


# ---- Fit -----------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """How a setting becomes the number whose logarithm the fit runs over."""

    label: str
    to_log: Callable[[float], float]
    from_log: Callable[[float], float]


SCALES = {
    "MUON_MOMENTUM": Scale(
        "1 - Muon momentum", lambda x: math.log(1 - x), lambda x: 1 - math.exp(x)
    ),
    "MATRIX_LR": Scale("matrix lr", math.log, math.exp),
    "DECAY_PER_RUN": Scale("decay per run", math.log, math.exp),
}


def base_log(name: str) -> float:
    """Of the value that every row has unless it changes it."""
    return SCALES[name].to_log(float(BASE[name]))


CERTAIN = 0.975  # least share of the resamples that must curve upwards


class Optimum(NamedTuple):
    """Of one setting on one rung."""

    log: float
    sd: float
    doubt: str  # why it is not determined; empty: it is
    curve: tuple[float, ...]  # coefficients of numpy.polyval over the logarithm
    lowest: float  # logarithm of the row of the lowest bpb
    common: tuple[float, float] | None = None  # log and sd with the curvature of all rungs

    @property
    def known(self) -> tuple[float, float] | None:
        """Logarithm and deviation, by its own rows or by the common curvature."""
        return self.common if self.doubt else (self.log, self.sd)

    def told(self, scale: Scale) -> str:
        if self.known is None:
            row = scale.from_log(self.lowest)
            return f"not determined: {self.doubt}, of which {row:.4g} is the best"
        log, sd = self.known
        low, high = interval(log, sd, scale)
        mark = " *" if self.doubt else ""
        return f"{scale.from_log(log):.4g} ({low:.4g} to {high:.4g}){mark}"


class Law(NamedTuple):
    """log-optimum = at_target + by_batch log(batch / target's) + by_steps log(steps / target's)."""

    coefficients: tuple[float, float, float]
    sds: tuple[float, float, float]

    def at(self, size: Rung) -> float:
        at_target, by_batch, by_steps = self.coefficients
        return at_target + by_batch * size_logs(size)[0] + by_steps * size_logs(size)[1]


def size_logs(size: Rung) -> tuple[float, float]:
    """Logarithms of batch and steps, as shares of the official run's."""
    return math.log(size.batch / OFFICIAL.batch), math.log(size.steps / OFFICIAL.steps)


def interval(log: float, sd: float, scale: Scale) -> tuple[float, float]:
    """95 %, in the setting's own units, the lower end first."""
    ends = sorted(scale.from_log(log + side * 1.96 * sd) for side in (-1, 1))
    return ends[0], ends[1]


def points(done: Mapping[str, Record], rung: str, name: str, score: str) -> list[list[float]]:
    """[log of the setting, bpb] of the rung's base and of the rows that change it alone."""
    found = []
    for record in done.values():
        overrides = record["overrides"]
        if record["rung"] == rung and not overrides.keys() - {name}:
            value = float(overrides.get(name, BASE[name]))
            found.append([SCALES[name].to_log(value), record[score]])
    return sorted(found)


def fit_optimum(rows: Sequence[Sequence[float]], noise: float, draws: int = 1000) -> Optimum:
    """Lowest point of the least-squares quadratic through 3 or more [log, bpb].

    noise: standard deviation of a bpb when its run is repeated.  The optimum's is half of the
    middle 68 % over `draws` resamples of that noise.
    """
    x, y = np.array(rows).T
    lowest = float(x[y.argmin()])
    if len(rows) < 3:
        return Optimum(math.nan, math.nan, f"{len(rows)} of 3 rows", (), lowest)
    centre = x.mean()
    solve = np.linalg.pinv(np.vander(x - centre, 3))
    curve = solve @ y
    generator = np.random.default_rng(0)
    resampled = solve @ (y[:, None] + noise * generator.standard_normal((len(x), draws)))
    upwards = resampled[0] > 0
    best = math.nan
    sd = math.nan
    doubt = ""
    if curve[0] > 0:
        best = float(centre - curve[1] / (2 * curve[0]))
        bests = centre - resampled[1, upwards] / (2 * resampled[0, upwards])
        sd = float(np.diff(np.quantile(bests, [0.16, 0.84]))[0]) / 2
    if curve[0] <= 0:
        doubt = "curvature not positive over the rows"
    elif upwards.mean() < CERTAIN:
        doubt = "curvature within the noise of the rows"
    elif not x.min() <= best <= x.max():
        doubt = "optimum outside the rows"
    shifted = np.poly1d(curve)(np.poly1d([1.0, -centre]))
    return Optimum(best, sd, doubt, tuple(shifted.coefficients), lowest)


class Resampled(NamedTuple):
    """A linear least-squares fit: its coefficients, and those of `draws` resamples of the noise."""

    best: np.ndarray  # (columns,)
    draws: np.ndarray  # (columns, draws)

    def ratio(self, column: int) -> tuple[float, float]:
        """-coefficient / (2 curvature), where the curvature is column 0, and its deviation.

        The deviation is half of the middle 68 % of the resamples.
        """
        upwards = self.draws[0] > 0
        bests = -self.draws[column, upwards] / (2 * self.draws[0, upwards])
        sd = float(np.diff(np.quantile(bests, [0.16, 0.84]))[0]) / 2
        return float(-self.best[column] / (2 * self.best[0])), sd


def resampled_fit(design: np.ndarray, y: np.ndarray, noise: float) -> Resampled | str:
    """Column 0 is the square of the setting's logarithm; or why the rows do not determine it.

    Where the rows scatter around the fit more than their noise, the noise grows to match.
    """
    rows, columns = design.shape
    if np.linalg.matrix_rank(design) < columns:
        return "too few rows"
    solve = np.linalg.pinv(design)
    best = solve @ y
    if rows > columns:
        misfit = float(np.sum((y - design @ best) ** 2)) / (rows - columns)
        noise = max(noise, math.sqrt(misfit))
    errors = noise * np.random.default_rng(0).standard_normal((rows, 1000))
    draws = solve @ (y[:, None] + errors)
    if np.mean(draws[0] > 0) < CERTAIN:
        return "common curvature not certain to be positive"
    return Resampled(best, draws)


class Samples(NamedTuple):
    """All rows of one setting: rung, logarithm against the base's, bpb."""

    rungs: list[str]
    x: np.ndarray
    y: np.ndarray

    @classmethod
    def of(cls, done: Mapping[str, Record], name: str, score: str) -> Samples:
        """Rungs where the setting has two values or more."""
        rungs: list[str] = []
        rows: list[list[float]] = []
        for rung in RUNGS:
            found = points(done, rung, name, score)
            if len(found) >= 2:
                rungs += [rung] * len(found)
                rows += found
        x, y = np.array(rows).reshape(-1, 2).T
        return cls(rungs, x - base_log(name), y)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(self.rungs))

    @property
    def levels(self) -> list[np.ndarray]:
        """A column a rung: 1 on its rows."""
        rungs = np.array(self.rungs)
        return [(rungs == name).astype(float) for name in self.names]


def fit_common(samples: Samples, noise: float) -> dict[str, tuple[float, float]] | str:
    """[log against the base's, deviation] of each rung's optimum, all of one curvature.

    A rung then needs two rows.
    """
    if not samples.rungs:
        return "too few rows"
    slopes = [samples.x * level for level in samples.levels]
    design = np.stack([samples.x**2, *slopes, *samples.levels], axis=1)
    fit = resampled_fit(design, samples.y, noise)
    if isinstance(fit, str):
        return fit
    return {rung: fit.ratio(1 + i) for i, rung in enumerate(samples.names)}


def law_fit(samples: Samples, noise: float) -> Resampled | str:
    """Least squares over all rows of all rungs: one curvature, and an optimum that follows the law.

    bpb = rung + k (x - best)^2 with best = a + b log(batch) + c log(steps) is linear in k, -2 k a,
    -2 k b and -2 k c, the first columns, since the rung's own term takes up k best^2.  No rung is
    left out for being in doubt.
    """
    sizes = [size_logs(RUNGS[rung]) for rung in samples.rungs]
    if len(samples.names) < 3 or np.linalg.matrix_rank([(1.0, *size) for size in sizes]) < 3:
        rungs = len(samples.names)
        return f"too few rungs: {rungs} with two rows, expected 3 of two batches and two lengths"
    x = samples.x
    by_batch, by_steps = np.array(sizes).T
    design = np.stack([x**2, x, x * by_batch, x * by_steps, *samples.levels], axis=1)
    return resampled_fit(design, samples.y, noise)


def fit_law(samples: Samples, name: str, noise: float) -> Law | str:
    """How the optimum of `name` moves with batch and length, or why the rows do not say."""
    fit = law_fit(samples, noise)
    if isinstance(fit, str):
        return fit
    (a, sd_a), (b, sd_b), (c, sd_c) = fit.ratio(1), fit.ratio(2), fit.ratio(3)
    return Law((base_log(name) + a, b, c), (sd_a, sd_b, sd_c))


class Change(NamedTuple):
    """bpb against the base, with its 95 % interval."""

    best: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.best:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


def change_by_law(fit: Resampled, x: float, size: Rung) -> Change:
    """Of a setting whose logarithm is `x` above the base's, in a run of that size."""
    terms = np.array([x**2, x, *(x * log for log in size_logs(size))])
    low, high = np.quantile(terms @ fit.draws[:4], [0.025, 0.975])
    return Change(float(terms @ fit.best[:4]), float(low), float(high))


def fit_setting(
    done: Mapping[str, Record], name: str, score: str, noise: float
) -> tuple[dict[str, Optimum], Law | str]:
    """Optima of the rungs, with the common curvature where their own rows do not determine one."""
    samples = Samples.of(done, name, score)
    common = fit_common(samples, noise)
    optima = {}
    for rung in RUNGS:
        rows = points(done, rung, name, score)
        if not rows:
            continue
        optima[rung] = fit_optimum(rows, noise)
        if optima[rung].doubt and isinstance(common, dict) and rung in common:
            log, sd = common[rung]
            optima[rung] = optima[rung]._replace(common=(base_log(name) + log, sd))
    return optima, fit_law(samples, name, noise)


def official_line(name: str, law: Law | str) -> str:
    """What the ladder says of the official run."""
    if isinstance(law, str):
        return f"**{name} at {OFFICIAL}: not determined: {law}.**"
    scale = SCALES[name]
    low, high = interval(law.coefficients[0], law.sds[0], scale)
    holds = "inside" if low <= float(BASE[name]) <= high else "outside"
    slopes = ", ".join(
        f"{label} to the {slope:+.2f} ± {1.96 * sd:.2f}"
        for label, slope, sd in zip(
            ("batch", "steps"), law.coefficients[1:], law.sds[1:], strict=True
        )
    )
    best = f"{scale.from_log(law.coefficients[0]):.4g} ({low:.4g} to {high:.4g})"
    return (
        f"**{name} at {OFFICIAL}: {best}**; the base's {BASE[name]} lies {holds}. "
        f"{scale.label} goes as {slopes}."
    )


def effect_of(done: Mapping[str, Record], record: Record, score: str) -> float | None:
    """Against the base of its rung, if that has run."""
    base = done.get(f"{record['rung']} base")
    if base is None:
        return None
    return float(record[score] - base[score])


def effects_table(done: Mapping[str, Record], score: str, noise: float) -> list[str]:
    """Measured effect and, in brackets, prediction of every change on every rung.

    Changes of the design come first, in its order; others had a row there once.
    """
    rungs = [rung for rung in RUNGS if any(record["rung"] == rung for record in done.values())]
    cells: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys([row.id for row in DESIGN] + list(done)):
        record = done.get(name)
        if record is None or not record["overrides"]:
            continue
        effect = effect_of(done, record, score)
        if effect is not None:
            mark = " ~" if abs(effect) < 2 * math.sqrt(2) * noise else ""
            text = f"{effect:+.4f}{mark} ({record['prediction']:+.4f})"
            cells.setdefault(name.split(" ", 1)[1], {})[record["rung"]] = text
    heads = [f"{rung}: {RUNGS[rung]}" for rung in rungs]
    lines = [f"| change | {' | '.join(heads)} |", "|" + "---|" * (len(rungs) + 1)]
    for changes, by_rung in cells.items():
        lines.append(f"| {changes} | {' | '.join(by_rung.get(rung, '') for rung in rungs)} |")
    return lines


def prediction_line(done: Mapping[str, Record], score: str) -> str:
    """How good the predictions were."""
    pairs = []
    for record in done.values():
        effect = effect_of(done, record, score)
        if effect is not None and record["overrides"]:
            pairs.append((record["prediction"], effect))
    if not pairs:
        return "No row stands beside its base yet."
    miss = math.sqrt(statistics.fmean((told - found) ** 2 for told, found in pairs))
    size = math.sqrt(statistics.fmean(found**2 for _, found in pairs))
    same = sum(told * found > 0 for told, found in pairs)
    signed = sum(told != 0 for told, _ in pairs)
    return (
        f"{len(pairs)} effects of {size:.4f} bpb (root mean square) were predicted with an error "
        f"of {miss:.4f}, {same} of {signed} with the right sign."
    )


def fit_report(done: Mapping[str, Record], score: str, noise: float) -> str:
    """The whole fit, in Markdown."""
    codes = sorted({record["code"] for record in done.values()})
    lines = [f"{len(done)} rows, {score} bpb, noise {noise} bpb, code {', '.join(codes)}.", ""]
    if not done:
        return "No results yet: `run` comes first."
    lines += effects_table(done, score, noise)
    lines += ["", "~: less than twice the noise of a difference.", prediction_line(done, score)]
    lines += ["", f"| optimum | {' | '.join(SCALES)} |", "|" + "---|" * (len(SCALES) + 1)]
    fits = {name: fit_setting(done, name, score, noise) for name in SCALES}
    for rung, size in RUNGS.items():
        cells = []
        for name, (optima, _) in fits.items():
            cells.append(optima[rung].told(SCALES[name]) if rung in optima else "")
        if any(cells):
            lines.append(f"| {rung}: {size} | {' | '.join(cells)} |")
    lines += ["", "*: by the curvature that all rungs have in common."]
    for name, (_, law) in fits.items():
        lines += ["", official_line(name, law)]
    return "\n".join(lines)


def change_report(
    done: Mapping[str, Record], name: str, value: float, score: str, noise: float
) -> str:
    """What the law says of one value of a setting, in Markdown.

    The last rows do without one rung each: a claim that hangs on one of them shows there.
    """
    x = SCALES[name].to_log(value) - base_log(name)
    samples = Samples.of(done, name, score)
    lines = [f"| {name}={value:g} against {BASE[name]} | by the law | measured |", "|---|---|---|"]
    fit = law_fit(samples, noise)
    if isinstance(fit, str):
        return f"{name}: {fit}"
    for rung in samples.names:
        record = done.get(f"{rung} {name}={value:g}")
        effect = effect_of(done, record, score) if record else None
        measured = "" if effect is None else f"{effect:+.4f}"
        law = change_by_law(fit, x, RUNGS[rung])
        lines.append(f"| {rung}: {RUNGS[rung]} | {law} | {measured} |")
    sizes = {"P-time": P_TIME, "verification": VERIFICATION, "official": OFFICIAL}
    for label, size in sizes.items():
        lines.append(f"| {label}, {size} | {change_by_law(fit, x, size)} | |")
    for rung in samples.names:
        others = {key: record for key, record in done.items() if record["rung"] != rung}
        fit = law_fit(Samples.of(others, name, score), noise)
        said = fit if isinstance(fit, str) else str(change_by_law(fit, x, OFFICIAL))
        lines.append(f"| official, without {rung} | {said} | |")
    return "\n".join(lines)


# ---- Picture -------------------------------------------------------------------------------------


def mark_sizes(axis: Any, along: str, values: Iterable[float]) -> None:
    """A logarithmic axis (x or y) whose only marks are these values."""
    marks = sorted(set(values))
    side = getattr(axis, f"{along}axis")
    getattr(axis, f"set_{along}scale")("log")
    side.set_ticks(marks, [f"{mark:,.4g}" if mark < 1000 else f"{mark:,.0f}" for mark in marks])
    side.set_ticks([], minor=True)
    side.set_tick_params(labelsize=7)


def draw_effects(
    axis: Any, done: Mapping[str, Record], name: str, score: str, noise: float
) -> None:
    """Effect against the setting, a colour a rung, with the fitted curves."""
    scale = SCALES[name]
    marks: list[float] = []
    for i, rung in enumerate(RUNGS):
        rows = points(done, rung, name, score)
        base = done.get(f"{rung} base")
        if base is None or len(rows) < 2:
            continue
        x, y = np.array(rows).T
        colour = f"C{i}"
        shown = np.exp(x)
        marks += [float(f"{value:.4g}") for value in shown]
        label = f"{rung}: {RUNGS[rung]}"
        axis.errorbar(shown, y - base[score], noise, fmt="o", color=colour, label=label)
        optimum = fit_optimum(rows, noise)
        if optimum.curve:
            line = np.linspace(x.min(), x.max(), 50)
            style = "--" if optimum.doubt else "-"
            values = np.polyval(optimum.curve, line) - base[score]
            axis.plot(np.exp(line), values, style, color=colour)
    mark_sizes(axis, "x", marks)
    axis.set(xlabel=scale.label, ylabel=f"{score} bpb against the base")
    axis.axhline(0, color="grey", linewidth=0.5)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=6)


def draw_law(axis: Any, along: str, law: Law, colours: Mapping[int, str]) -> None:
    """A dotted line for each value of the other size, and the official run as a star."""
    other = "steps" if along == "batch" else "batch"
    ends = [min(getattr(size, along) for size in RUNGS.values()), getattr(OFFICIAL, along)]
    for fixed, colour in colours.items():
        sizes = [Rung(**{along: end, other: fixed}) for end in ends]
        axis.plot(ends, [math.exp(law.at(size)) for size in sizes], ":", color=colour)
    best = math.exp(law.coefficients[0])
    spread = math.exp(1.96 * law.sds[0])
    bars = [[best - best / spread], [best * spread - best]]
    axis.errorbar(ends[1], best, bars, fmt="*", color="black", label="official run, 95 %")


def draw_optima(
    axis: Any, name: str, along: str, optima: Mapping[str, Optimum], law: Law | str
) -> None:
    """Optimum against batch or steps, with the law towards the official run."""
    other = "steps" if along == "batch" else "batch"
    unit = {"steps": "steps", "batch": "tokens a step"}
    every = sorted({getattr(size, other) for size in RUNGS.values()})
    colours: dict[int, str] = {}  # of the sizes that have an optimum; hollow: common curvature
    for rung, optimum in optima.items():
        if optimum.known is None:
            continue
        log, sd = optimum.known
        fixed = getattr(RUNGS[rung], other)
        label = "" if fixed in colours else f"{fixed:,} {unit[other]}"
        colours[fixed] = f"C{every.index(fixed)}"
        best = math.exp(log)
        spread = math.exp(sd)
        bars = [[best - best / spread], [best * spread - best]]
        place = getattr(RUNGS[rung], along)
        fill = "none" if optimum.doubt else "full"
        axis.errorbar(place, best, bars, fmt="o", fillstyle=fill, color=colours[fixed], label=label)
    if isinstance(law, Law):
        draw_law(axis, along, law, colours | {getattr(OFFICIAL, other): "black"})
    else:
        axis.text(0.5, 0.5, "not determined", ha="center", transform=axis.transAxes)

    base = math.exp(base_log(name))
    axis.axhline(base, color="grey", linewidth=0.5)
    mark_sizes(axis, "x", [getattr(size, along) for size in (*RUNGS.values(), OFFICIAL)])
    low, high = axis.get_ylim()
    round_marks = [float(f"{mark:.2g}") for mark in np.geomspace(max(low, base / 30), high, 6)]
    mark_sizes(axis, "y", round_marks)
    axis.set(xlabel=unit[along], ylabel=f"best {SCALES[name].label}")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=6, framealpha=0.5)


def draw(done: Mapping[str, Record], score: str, noise: float, picture: Path) -> None:
    """A column a setting: effects, optimum against batch, optimum against steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, len(SCALES), figsize=(13, 11), layout="constrained")
    for column, name in enumerate(SCALES):
        optima, law = fit_setting(done, name, score, noise)
        draw_effects(axes[0, column], done, name, score, noise)
        draw_optima(axes[1, column], name, "batch", optima, law)
        draw_optima(axes[2, column], name, "steps", optima, law)
    title = "bars: one standard deviation; hollow: by the common curvature; grey: the base"
    figure.suptitle(f"{len(done)} rows; {title}", fontsize=9)
    try:
        figure.savefig(picture, dpi=100)
    except ValueError as error:  # a format that matplotlib does not write
        raise ablate.Mistake(f"--picture {picture}: {error}") from None
    pyplot.close(figure)


# ---- Command line --------------------------------------------------------------------------------


def setting_and_value(text: str) -> tuple[str, float]:
    """Raises what argparse turns into a usage error."""
    name, _, value = text.partition("=")
    if name not in SCALES:
        raise argparse.ArgumentTypeError(f"{text}: fitted are {', '.join(SCALES)}")
    with contextlib.suppress(ValueError):
        if math.isfinite(SCALES[name].to_log(float(value))):
            return name, float(value)
    raise argparse.ArgumentTypeError(f"{text}: {value!r} is no value of {name}")


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("run", "fit", "plot"):
        sub = verbs.add_parser(verb)
        sub.add_argument("--rows", type=Path, default=ROWS_FILE, help="the rows file")
        sub.add_argument("--corpus", default="larger", help="name of the corpus")
        if verb == "run":
            sub.add_argument(
                "--seconds", type=float, required=True, help="start no row that would end later"
            )
            sub.add_argument("--workers", type=int, default=1, help="rows at once, over all GPUs")
            sub.add_argument("--only", default="", help="regular expression over the ids")
            sub.add_argument("--again", action="store_true", help="try failed rows again")
            sub.add_argument("--out", type=Path, help="new rows go to this file too")
            continue

        sub.add_argument("--score", default="averaged", choices=("trained", "averaged", "packed"))
        sub.add_argument(
            "--noise", type=float, default=0.0004, help="bpb by which a repeat differs"
        )
        if verb == "fit":
            change = "what the law says of this value, size by size"
            sub.add_argument(
                "--change", type=setting_and_value, metavar="SETTING=VALUE", help=change
            )
        if verb == "plot":
            sub.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    if options.verb == "run" and options.workers < 1:
        parser.error("--workers: expected 1 or more")
    if len(options.corpus.split()) != 1:
        parser.error("--corpus: expected one word")
    if options.verb != "run" and not 0 < options.noise < math.inf:
        parser.error("--noise: expected more than 0")
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse_options(arguments)
    if options.verb == "run":
        run(options)
        return
    done = results(read_records(options.rows), options.corpus)
    if options.verb == "fit" and options.change:
        print(change_report(done, *options.change, options.score, options.noise))
        return
    if options.verb == "fit":
        print(fit_report(done, options.score, options.noise))
        return
    if not done:
        raise ablate.Mistake(f"{options.rows}: holds no results; `run` comes first")
    if not options.picture.absolute().parent.is_dir():
        raise ablate.Mistake(f"--picture {options.picture}: make its folder first")
    draw(done, options.score, options.noise, options.picture)
    print(options.picture)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ablate.Mistake as error:
        sys.exit(f"error: {error}")
