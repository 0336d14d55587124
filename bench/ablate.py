"""Trains one variant after another in one process and appends a table row for each.

    python bench/ablate.py "base" "qk 4 (-0.004): QK_GAIN_INIT=4" "low lr (0): MATRIX_LR=0.015"

Each argument is `name (prediction): KEY=VALUE ...`; the prediction, in packed bpb against the first
variant, is part of the row, so that it is made before the run.  The environment holds what all
variants share (P-steps: ITERATIONS=1600 TRAIN_BATCH_TOKENS=98304 MAX_WALLCLOCK_SECONDS=0).
Variants of one shape share their compiled graphs.  EVAL_STRIDE=0 leaves out the sliding score.
Rows are printed and appended to ABLATIONS.md, or to the file that the variable TABLE names, each as
soon as its run has ended; a run that fails gets a row too.
"""
from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import train_gpt as tg
from prepare_data import with_sample

REPO = Path(__file__).resolve().parents[1]
HEADER = ("| run | settings | prediction | trained | averaged | packed | against the first "
          "| sliding | ms/step | steps | bytes | seed |\n|" + "---|" * 12)


class Variant(NamedTuple):
    """One run to make: its name, the predicted change in packed bpb, what it overrides."""

    name: str
    prediction: str
    overrides: dict[str, str]


def parse(argument: str) -> Variant:
    """`name (prediction): KEY=VALUE ...`, of which all but the name may be missing."""
    head, _, settings = argument.partition(":")
    found = re.fullmatch(r"\s*(.*?)\s*(?:\((.*)\))?\s*", head)
    pairs = [item.partition("=") for item in settings.split()]
    if not found or not found[1] or not all(key and equals for key, equals, _ in pairs):
        raise tg.RunError(f"{argument!r}: expected 'name (prediction): KEY=VALUE ...'")
    return Variant(found[1], found[2] or "", {key: value for key, _, value in pairs})


class Result(NamedTuple):
    """What a run came to; scores in bpb by stage."""

    scores: dict[str, float]
    ms: float
    steps: int
    size: int
    seed: int


def run_variant(variant: Variant, kernels: list[tg.Kernels]) -> Result:
    """Trains, packs and scores one variant.  `kernels` keeps those of the first: with others, their
    graphs could not be shared."""
    h = with_sample(tg.Hyperparameters.from_env({**os.environ, **variant.overrides}))
    runtime = tg.Runtime.start(h, {})
    log = tg.RunLog(Path(h.output_dir) / f"ablate_{re.sub(r'[^a-z0-9]+', '_', variant.name)}.log")
    tokens = np.concatenate(tg.open_split(h.data_path, "val"))
    table = tg.load_byte_table(h.tokenizer_path, h.vocab_size)
    evaluator = tg.Evaluator(h, runtime, tokens, table)
    if not kernels:
        kernels.append(tg.choose_kernels(h, runtime, log))
    stages, facts = tg.obtain_weights(h, runtime, log, evaluator, kernels[0])
    scores = {stage: evaluator.score(tg.load_model(h, runtime, state, kernels[0])).bpb
              for stage, state in stages.items()}
    code = tg.SOURCE.stat().st_size
    artifact = tg.pack_to_budget(stages["averaged"], h, h.artifact_bytes - code, log)
    model = tg.load_model(h, runtime, tg.unpack(artifact)[1], kernels[0])
    scores["packed"] = evaluator.score(model).bpb
    if h.eval_stride:
        scores["sliding"] = evaluator.score(model, h.eval_stride).bpb
    return Result(scores, facts["step_avg_ms"], facts["step_stop"], len(artifact) + code, h.seed)


def row(variant: Variant, result: Result | str, base: Result | None) -> str:
    """A line of the table; `result` is the fault of a run that failed."""
    settings = " ".join(f"{key}={value}" for key, value in variant.overrides.items())
    start = f"| {variant.name} | {settings} | {variant.prediction} |"
    if isinstance(result, str):
        return f"{start} failed: {result} |" + " |" * 8
    s = {stage: f"{score:.4f}" for stage, score in result.scores.items()}
    against = f"{result.scores['packed'] - base.scores['packed']:+.4f}" if base else ""
    return (f"{start} {s['trained']} | {s['averaged']} | {s['packed']} | {against} | "
            f"{s.get('sliding', '-')} | {result.ms:.1f} | {result.steps} | {result.size:,} | "
            f"{result.seed} |")


def main(arguments: list[str], table: Path) -> None:
    variants = [parse(argument) for argument in arguments]  # mistakes show before the first run
    for variant in variants:
        tg.Hyperparameters.from_env({**os.environ, **variant.overrides})
    kernels: list[tg.Kernels] = []
    base: Result | None = None
    for i, variant in enumerate(variants):
        result: Result | str
        try:
            result = run_variant(variant, kernels)
        except (tg.RunError, torch.cuda.OutOfMemoryError) as error:
            result = str(error).splitlines()[0]
        line = row(variant, result, base)
        print(line, flush=True)
        with table.open("a") as file:
            file.write((f"\n{HEADER}\n" if i == 0 else "") + line + "\n")
        if isinstance(result, Result):
            base = base or result
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    try:
        main(sys.argv[1:] or ["base"], Path(os.environ.pop("TABLE", str(REPO / "ABLATIONS.md"))))
    except tg.RunError as error:
        sys.exit(f"error: {error}")
