"""Trains one variant after another in one process and prints a table row for each.

    python bench/ablate.py "base" "qk 4: QK_GAIN_INIT=4" "low lr: MATRIX_LR=0.015 EMBED_LR=0.02"

Each argument is `name: KEY=VALUE ...`; the environment holds what all variants share (P-steps:
ITERATIONS=1600 TRAIN_BATCH_TOKENS=98304 MAX_WALLCLOCK_SECONDS=0).  Variants of one shape share
their compiled graphs.  EVAL_STRIDE=0 leaves out the sliding score.  Rows go to ABLATIONS.md by
hand, with the prediction that was made before the run.
"""
from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import train_gpt as tg

HEADER = ("| variant | trained | averaged | packed | sliding | ms/step | steps | bytes | seed |\n"
          "|---|---|---|---|---|---|---|---|---|")


def run_variant(argument: str) -> str:
    """Trains, packs and scores one variant; its table row."""
    name, _, overrides = argument.partition(":")
    pairs = dict(item.split("=", 1) for item in overrides.split())
    h = tg.with_sample(tg.Hyperparameters.from_env({**os.environ, **pairs}))

    runtime = tg.Runtime.start(h, {})
    log = tg.RunLog(Path(h.output_dir) / f"ablate_{name.strip().replace(' ', '_')}.log")
    tokens = np.concatenate(tg.open_split(h.data_path, "val"))
    table = tg.load_byte_table(h.tokenizer_path, h.vocab_size)
    evaluator = tg.Evaluator(h, runtime, tokens, table)
    kernels = choose_once(h, runtime, log)
    stages, facts = tg.obtain_weights(h, runtime, log, evaluator, kernels)
    scores = {stage: evaluator.score(tg.load_model(h, runtime, state, kernels)).bpb
              for stage, state in stages.items()}
    budget = h.artifact_bytes - tg.SOURCE.stat().st_size
    artifact = tg.pack_to_budget(stages["averaged"], h, budget, log)
    model = tg.load_model(h, runtime, tg.unpack(artifact)[1], kernels)
    packed = evaluator.score(model).bpb
    sliding = evaluator.score(model, h.eval_stride).bpb if h.eval_stride else float("nan")
    size = len(artifact) + tg.SOURCE.stat().st_size
    return (f"| {argument} | {scores['trained']:.4f} | {scores['averaged']:.4f} | {packed:.4f} | "
            f"{sliding:.4f} | {facts['step_avg_ms']:.1f} | {facts['step_stop']} | {size} | "
            f"{h.seed} |")


_chosen: list[tg.Kernels] = []


def choose_once(h: tg.Hyperparameters, runtime: tg.Runtime, log: tg.RunLog) -> tg.Kernels:
    """The same kernels for all variants, or their graphs could not be shared."""
    if not _chosen:
        _chosen.append(tg.choose_kernels(h, runtime, log))
    return _chosen[0]


if __name__ == "__main__":
    rows = []
    for variant in sys.argv[1:] or ["base"]:
        rows.append(run_variant(variant))
        print(rows[-1], flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(HEADER, *rows, sep="\n")
