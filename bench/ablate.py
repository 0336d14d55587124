"""Trains variants of a run, each in a process of its own, and appends a table row for each.

    python bench/ablate.py "base" "qk 4 (-0.004): QK_GAIN_INIT=4" "no smear (+0.002): OFF=smear"
    WORKERS=3 python bench/ablate.py ...   # one compiles while others train: bpb, no step times

Each argument is `name (prediction): KEY=VALUE ...`; the prediction, in packed bpb against the first
variant, is part of the row, so that it is made before the run.  OFF=a,b leaves out or replaces
techniques of the program: the names are those of PATCHES, which edits a copy of train_gpt.py.  The
environment holds what all variants share (P-steps: ITERATIONS=1600 TRAIN_BATCH_TOKENS=98304
MAX_WALLCLOCK_SECONDS=0); EVAL_STRIDE=0 leaves out the sliding score; logs and weights are kept if
OUTPUT_DIR names a folder for them.  Graphs compiled once are found again in Inductor's cache.  Rows
are printed and appended to docs/ABLATIONS.md, or to the file that the variable TABLE names, in the
order of the arguments, each as soon as it can be; a run that fails gets a row too.  SIGTERM, which
`timeout` sends, ends the runs under way and starts no other; the rows of both are written.
"""
from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

REPO = Path(__file__).resolve().parents[1]
sys.path.append(str(REPO))  # last: a patched train_gpt.py comes first
HEADER = ("| run | settings | prediction | trained | averaged | packed | against the first "
          "| sliding | ms/step | steps | bytes | seed |\n|" + "---|" * 12)
# Technique -> (text of train_gpt.py, its replacement).  Parameters stay and get zero gradients.
PATCHES: dict[str, list[tuple[str, str]]] = {
    "smear": [("return x_BTD + has_previous * torch.sigmoid(gate_D) * factor_BT1 *",
               "return x_BTD + 0.0 * torch.sigmoid(gate_D) * factor_BT1 *")],
    "smear_by_token": [("2 * torch.sigmoid(x_BTD[", "1 + 0.0 * torch.sigmoid(x_BTD[")],
    "smear_bos_mask": [("((inputs_BT != BOS_ID) & ~first)[..., None]", "~first[:, None]")],
    "depth_scale": [("(i + 1) ** -0.5", "1.0")],
    "value_embedding": [("v + (self.ve_scale[ve_index] *",
                         "v + (0.0 * self.ve_scale[ve_index] *")],
    "unet_skips": [("mixed += keep * self.skip_weight", "mixed += 0.0 * keep * self.skip_weight")],
    "normuon": [("even = update * bank.square.clamp_min(1e-12).rsqrt()", "even = update")],
    "polar_express": [("for a, b, c in POLAR_EXPRESS:",
                       "for a, b, c in [(3.4445, -4.7750, 2.0315)] * 5:")],
    "gptq_lite": [("CLIP_RATIOS = (1.0, 0.92, 0.84, 0.75, 0.6)", "CLIP_RATIOS = (1.0,)")],
    "int8_layers": [("Grid((127, *[31] * inner, 127) * 2, (ratio, *[1.0] * inner, ratio) * 2)",
                     "Grid((31, *[31] * inner, 31) * 2, (1.0, *[1.0] * inner, 1.0) * 2)")],
    "shuffling": [("generator.permutation(self.windows_per_epoch)",
                   "np.arange(self.windows_per_epoch)")],
    # An EMA takes its place; with SWA_THRESHOLD=2 over the whole run.
    "plain_mean": [("for n in self.mean], 1 / self.count)",
                      "for n in self.mean], max(1 / self.count, 0.0035))")],
}


class Variant(NamedTuple):
    """One run to make: its name, the predicted change in packed bpb, what it overrides."""

    name: str
    prediction: str
    overrides: dict[str, str]


class Result(NamedTuple):
    """What a run came to; scores in bpb by stage."""

    scores: dict[str, float]
    ms: float
    steps: int
    size: int
    seed: int


class Mistake(Exception):
    """Of the arguments, with the remedy."""


def parse(argument: str) -> Variant:
    """`name (prediction): KEY=VALUE ...`, of which all but the name may be missing."""
    head, _, settings = argument.partition(":")
    found = re.fullmatch(r"\s*(.*?)\s*(?:\((.*)\))?\s*", head)
    pairs = [item.partition("=") for item in settings.split()]
    if not found or not found[1] or not all(key and equals for key, equals, _ in pairs):
        raise Mistake(f"{argument!r}: expected 'name (prediction): KEY=VALUE ...'")
    variant = Variant(found[1], found[2] or "", {key: value for key, _, value in pairs})
    for name in off(variant):
        if name not in PATCHES:
            raise Mistake(f"OFF={name}: unknown; choose of {', '.join(PATCHES)}")
    return variant


def environment(variant: Variant) -> dict[str, str]:
    """Environment of the variant: what all share, and what it overrides."""
    return os.environ | {key: value for key, value in variant.overrides.items() if key != "OFF"}


def off(variant: Variant) -> list[str]:
    """Techniques that the variant leaves out."""
    return [name for name in variant.overrides.get("OFF", "").split(",") if name]


def patched(source: str, names: list[str]) -> str:
    """`source` without the techniques `names`.  Raises Mistake where the program has changed."""
    for name in names:
        for old, new in PATCHES[name]:
            if source.count(old) != 1:
                raise Mistake(f"OFF={name}: {old!r} stands {source.count(old)} times in "
                              "train_gpt.py, expected once; mend PATCHES")
            source = source.replace(old, new)
    return source


def program(names: list[str], folder: Path) -> Any:
    """train_gpt as a module, from a copy in `folder` if something is left out."""
    if names:
        (folder / "train_gpt.py").write_text(patched((REPO / "train_gpt.py").read_text(), names))
        sys.path.insert(0, str(folder))
    return importlib.import_module("train_gpt")


def run_variant(variant: Variant, tg: Any) -> Result:
    """Trains, packs and scores one variant by the functions that train_gpt.py uses itself."""
    import numpy as np

    from prepare_data import with_sample

    h = with_sample(tg.Hyperparameters.from_env(environment(variant)))
    runtime = tg.Runtime.start(h, {})
    log = tg.RunLog(Path(h.output_dir) / "ablate.log")
    tokens = np.concatenate(tg.open_split(h.data_path, "val"))
    table = tg.load_byte_table(h.tokenizer_path, h.vocab_size)
    evaluator, kernels = tg.Evaluator(h, runtime, tokens, table), tg.choose_kernels(h, runtime, log)
    stages, facts = tg.obtain_weights(h, runtime, log, evaluator, kernels)
    scores = {stage: evaluator.score(tg.load_model(h, runtime, state, kernels)).bpb
              for stage, state in stages.items()}
    code = (REPO / "train_gpt.py").stat().st_size
    artifact = tg.pack_to_budget(stages["averaged"], h, h.artifact_bytes - code, log)
    model = tg.load_model(h, runtime, tg.unpack(artifact)[1], kernels)
    scores["packed"] = evaluator.score(model).bpb
    if h.eval_stride:
        scores["sliding"] = evaluator.score(model, h.eval_stride).bpb
    return Result(scores, facts["step_avg_ms"], facts["step_stop"], len(artifact) + code, h.seed)


def in_a_process(variant: Variant, running: list[subprocess.Popen[str]]) -> Result | str:
    """The result of the variant or, where it fails, the last line that it had to say; its process
    joins those `running`."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(variant)]
    with tempfile.TemporaryDirectory() as folder:
        mine = Path(os.environ.get("OUTPUT_DIR", folder), re.sub(r"\W+", "_", variant.name))
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, "OUTPUT_DIR": str(mine)}) as process:
            running.append(process)
            out, said = process.communicate()
    if process.returncode:
        silent = f"ended with {process.returncode} and no message"
        return (said.strip().splitlines() or [silent])[-1].removeprefix("error: ")
    return Result(*json.loads(out.splitlines()[-1]))


def row(variant: Variant, result: Result | str, base: Result | None, *, shared: bool) -> str:
    """A line of the table; `result` is the fault of a run that failed, and times of runs that
    `shared` the machine are left out."""
    settings = " ".join(f"{key}={value}" for key, value in variant.overrides.items())
    start = f"| {variant.name} | {settings} | {variant.prediction} |"
    if isinstance(result, str):
        return f"{start} failed: {result} |" + " |" * 8
    s = {stage: f"{score:.4f}" for stage, score in result.scores.items()}
    against = f"{result.scores['packed'] - base.scores['packed']:+.4f}" if base else ""
    return (f"{start} {s['trained']} | {s['averaged']} | {s['packed']} | {against} | "
            f"{s.get('sliding', '-')} | {'-' if shared else f'{result.ms:.1f}'} | {result.steps} | "
            f"{result.size:,} | {result.seed} |")


def main(arguments: list[str], table: Path, workers: int = 1) -> None:
    variants = [parse(argument) for argument in arguments]  # mistakes show before the first run
    tg, source = importlib.import_module("train_gpt"), (REPO / "train_gpt.py").read_text()
    for variant in variants:
        patched(source, off(variant))
        try:
            tg.Hyperparameters.from_env(environment(variant))
        except tg.RunError as error:
            raise Mistake(str(error)) from None
    base: Result | None = None
    running: list[subprocess.Popen[str]] = []
    with ThreadPoolExecutor(workers) as pool:
        def stop(*_: object) -> None:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()  # in training: it saves its weights first

        before = signal.signal(signal.SIGTERM, stop)
        try:
            results = pool.map(lambda variant: in_a_process(variant, running), variants)
            for i, result in enumerate(results):
                line = row(variants[i], result, base, shared=workers > 1)
                print(line, flush=True)
                with table.open("a") as file:
                    file.write((f"\n{HEADER}\n" if i == 0 else "") + line + "\n")
                if isinstance(result, Result):
                    base = base or result
        except CancelledError:
            raise Mistake("stopped by SIGTERM") from None
        finally:
            signal.signal(signal.SIGTERM, before)


def one(variant: Variant) -> None:
    """What a process of its own does: the result as the last line, or an error."""
    with tempfile.TemporaryDirectory() as folder:
        tg = program(off(variant), Path(folder))
        try:
            print(json.dumps(run_variant(variant, tg)), flush=True)
        except tg.RunError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--one"]:
            one(Variant(*json.loads(sys.argv[2])))
        else:
            file = Path(os.environ.pop("TABLE", str(REPO / "docs/ABLATIONS.md")))
            main(sys.argv[1:] or ["base"], file, int(os.environ.pop("WORKERS", "1")))
    except Mistake as error:
        sys.exit(f"error: {error}")
