"""Trains variants of a run, each in a process of its own, and appends a table row for each.

    python bench/ablate.py "base" "qk 4 (-0.004): QK_GAIN_INIT=4" "no smear (+0.002): OFF=smear"
    python bench/ablate.py "base" "looped (-0.002): ON=loops LOOP_FROM=0.5"
    WORKERS=2 python bench/ablate.py ...   # with two GPUs, each run has one to itself
    WORKERS=3 python bench/ablate.py ...   # with one, they share it: bpb, no step times
    IN_TURN=1 WORKERS=2 python bench/ablate.py ...   # one warms up while another trains (turns.py)

Each argument is `name (prediction): KEY=VALUE ...`; the prediction, in packed bpb against the first
variant, is part of the row, so that it is made before the run.  OFF=a,b leaves out or replaces
techniques of the program: the names are those of TECHNIQUES.  ON=a,b adds candidates, which are
not in the program: bench/candidates.py has their names and options.  The environment holds what all
variants share (TRAIN_BATCH_TOKENS=98304 MUON_MOMENTUM=0.95 and, for P-steps, ITERATIONS=1600
MAX_WALLCLOCK_SECONDS=0, for P-time MAX_WALLCLOCK_SECONDS=180; docs/ABLATIONS.md says what older
rows had besides); EVAL_STRIDE=0 leaves out the sliding score; logs and weights are kept if
OUTPUT_DIR names a folder for them.  Graphs compiled once are found again in Inductor's
cache.  Rows are printed and appended to docs/ABLATIONS.md, or to the file that the variable TABLE
names, in the order of the arguments, each as soon as it can be; a run that fails gets a row too.
SIGTERM, which `timeout` sends, ends the runs under way and starts no other; the rows of both are
written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

import candidates
import train_gpt as tg
import turns
from candidates import Candidate, Mistake, Replacement
from prepare_data import with_sample

REPO = Path(__file__).resolve().parents[1]
HEADER = (
    "| run | settings | prediction | trained | averaged | packed | against the first "
    "| sliding | ms/step | steps | bytes | seed |\n|" + "---|" * 12
)


# Techniques.  A function here stands in for the function of train_gpt.py that it takes its
# arguments from.


def with_unused(x: Tensor, *unused: Tensor) -> Tensor:
    """`x`, whose graph holds tensors that it does not depend on.

    The optimizer needs a gradient of every parameter; so theirs is zero.
    """
    for tensor in unused:
        x = x + 0.0 * tensor.sum()
    return x


def no_smear(x_BTD: Tensor, gate_D: Tensor, token_C: Tensor, inputs_BT: Tensor) -> Tensor:
    return with_unused(x_BTD, gate_D, token_C)


def same_smear_factor(x_BTD: Tensor, token_C: Tensor) -> Tensor:
    return with_unused(torch.ones_like(x_BTD[..., :1]), token_C)


def has_previous_in_window(inputs_BT: Tensor) -> Tensor:
    """Of whichever document."""
    position = torch.arange(inputs_BT.shape[1], device=inputs_BT.device)
    return (position > 0).expand(inputs_BT.shape)[..., None]


def same_depth_scale(index: int) -> float:
    return 1.0


def no_value_embedding(v_BTKE: Tensor, ve_BTC: Tensor, scale: Tensor) -> Tensor:
    return with_unused(v_BTKE, ve_BTC, scale)


mix_in = tg.GPT.mix_in


def mix_in_no_skip(
    model: tg.GPT, x: Tensor, layer: tg.LayerPlan, shared: tg.Shared, skips: list[Tensor]
) -> Tensor:
    mixed = mix_in(model, x, layer._replace(skip=None), shared, skips)
    return with_unused(mixed, model.skip_weight)


def neurons_as_they_are(update: Tensor, mean_square: Tensor, beta2: float) -> Tensor:
    return update


parameter_table = tg.parameter_table


def table_of_int6_layers(h: tg.Hyperparameters) -> dict[str, tg.ParameterRow]:
    """First and last layer on the grid of the others."""
    table = parameter_table(h)
    for name, row in table.items():
        if row.roles:
            matrices = row.shape[0]
            table[name] = row._replace(grid=tg.Grid((31,) * matrices, (1.0,) * matrices))
    return table


epoch = tg.BatchPlan.epoch


def epoch_in_order(plan: tg.BatchPlan, number: int) -> tuple[int, np.ndarray]:
    offset, order = epoch(plan, number)
    return offset, np.sort(order)


def weight_of_ema(mean: tg.RunningMean) -> float:
    """An EMA takes the plain mean's place; with SWA_THRESHOLD=2 over the whole run."""
    return max(1 / mean.count, 0.0035)


muon_momentum = tg.muon_momentum
LOWEST_MOMENTUM = 0.90


def falling_momentum(h: tg.Hyperparameters, steps_done: Tensor) -> Tensor:
    """Falls to LOWEST_MOMENTUM with the lr; of runs that end by ITERATIONS."""
    left = 1 - steps_done / h.iterations
    share = (left / h.warmdown_fraction).clamp(max=1)
    return LOWEST_MOMENTUM + (muon_momentum(h, steps_done) - LOWEST_MOMENTUM) * share


MUON_COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 5  # Jordan et al., 2024

TECHNIQUES = {  # what each is left out by
    "smear": Replacement(tg, "smear", no_smear),
    "smear_by_token": Replacement(tg, "smear_factor", same_smear_factor),
    "smear_bos_mask": Replacement(tg, "has_previous", has_previous_in_window),
    "depth_scale": Replacement(tg, "depth_scale", same_depth_scale),
    "value_embedding": Replacement(tg, "add_value_embedding", no_value_embedding),
    "unet_skips": Replacement(tg.GPT, "mix_in", mix_in_no_skip),
    "normuon": Replacement(tg, "normalize_neurons", neurons_as_they_are),
    "polar_express": Replacement(tg, "POLAR_EXPRESS", MUON_COEFFICIENTS),
    "gptq_lite": Replacement(tg, "CLIP_RATIOS", (1.0,)),
    "int8_layers": Replacement(tg, "parameter_table", table_of_int6_layers),
    "shuffling": Replacement(tg.BatchPlan, "epoch", epoch_in_order),
    "steady_momentum": Replacement(tg, "muon_momentum", falling_momentum),
    "plain_mean": Replacement(tg.RunningMean, "weight_of_newest", weight_of_ema),
}


# Variants


class Variant(NamedTuple):
    """One run to make: its name, the predicted change in packed bpb, what it overrides."""

    name: str
    prediction: str
    overrides: dict[str, str]

    @property
    def off(self) -> list[str]:
        """Techniques that it leaves out."""
        return self.names("OFF")

    @property
    def on(self) -> list[Candidate]:
        """Candidates that it adds.  Raises Mistake for one or an option that there is not."""
        return candidates.chosen(self.names("ON"), self.overrides)

    def names(self, key: str) -> list[str]:
        return [name for name in self.overrides.get(key, "").split(",") if name]

    @property
    def environment(self) -> dict[str, str]:
        """The settings that all variants share, and those that this one overrides."""
        ours = {"OFF", "ON", *candidates.OPTIONS}
        return os.environ | {key: text for key, text in self.overrides.items() if key not in ours}


class Result(NamedTuple):
    """What a run came to; scores in bpb by stage."""

    scores: dict[str, float]
    ms: float
    steps: int
    size: int
    seed: int


def parse(argument: str) -> Variant:
    """`name (prediction): KEY=VALUE ...`, of which all but the name may be missing."""
    head, _, settings = argument.partition(":")
    found = re.fullmatch(r"\s*(.*?)\s*(?:\((.*)\))?\s*", head)
    pairs = [item.partition("=") for item in settings.split()]
    whole = all(key and equals for key, equals, _ in pairs)
    if not found or not found[1] or not whole or found[1].startswith("-"):
        raise Mistake(f"{argument!r}: expected 'name (prediction): KEY=VALUE ...'")
    return Variant(found[1], found[2] or "", {key: value for key, _, value in pairs})


def check(variant: Variant) -> None:
    """Raises Mistake for what would end its run at once or change nothing."""
    for name in variant.off:
        if name not in TECHNIQUES:
            raise Mistake(f"OFF={name}: unknown; choose of {', '.join(TECHNIQUES)}")
    added = variant.on
    try:
        h = tg.Hyperparameters.from_env(variant.environment)
    except tg.RunError as error:
        raise Mistake(str(error)) from None
    for name in ("EVAL_ONLY", "RESUME_FROM"):
        if getattr(h, name.lower()):
            raise Mistake(f"{name}={getattr(h, name.lower())}: a variant is trained; unset it")
    if "steady_momentum" in variant.off and h.max_wallclock_seconds > 0:
        raise Mistake(
            f"OFF=steady_momentum: it would fall towards step {h.iterations}, which the clock does "
            "not reach; set MAX_WALLCLOCK_SECONDS=0 and ITERATIONS"
        )
    for candidate in added:
        candidate.check(h)
    check_keys(variant)


def check_keys(variant: Variant) -> None:
    """Raises Mistake for a key that would change nothing."""
    settings = {field.name.upper() for field in dataclasses.fields(tg.Hyperparameters)}
    known = {"PRESET", "OFF", "ON"} | settings | candidates.OPTIONS.keys()
    for key, text in variant.overrides.items():
        if key not in known:
            options = ", ".join(candidates.OPTIONS)
            raise Mistake(f"{key}={text}: no setting; options of candidates are {options}")
    for key in ("OFF", "ON"):
        if os.environ.get(key):
            raise Mistake(f"{key} is in the environment; write it into the variants")
    for key, name in candidates.OPTIONS.items():
        if key in os.environ:
            raise Mistake(
                f"{key} is in the environment; write it into the variant: ON={name} {key}="
            )


def run_variant(variant: Variant) -> Result:
    """Trains, packs and scores, as train_gpt.py does.  This process is then of that variant."""
    for name in variant.off:
        replacement = TECHNIQUES[name]
        setattr(replacement.owner, replacement.attribute, replacement.value)
    candidates.install(variant.on)
    tg.write_result = lambda *_: None  # a variant is no seed of a submission
    h = with_sample(tg.Hyperparameters.from_env(variant.environment))
    if in_turn():
        turns.take_turns(turns.turn_files(os.environ))
    result = tg.run(h, tg.Runtime.start(h, {}))
    facts = result.facts
    assert facts, "a run that trains has facts of its training"
    scores = {stage: score.bpb for stage, score in result.scores.items()}
    size = result.bytes_code + result.bytes_model
    return Result(scores, facts.step_avg_ms, facts.step_stop, size, facts.seed)


def ends_by_the_clock(variant: Variant) -> bool:
    return tg.Hyperparameters.from_env(variant.environment).max_wallclock_seconds > 0


def in_turn() -> bool:
    """Whether runs that share a GPU are to train one after the other."""
    return os.environ.get("IN_TURN", "0") != "0"


def folder_of(variant: Variant) -> str:
    """Its name under OUTPUT_DIR."""
    return re.sub(r"\W+", "_", variant.name)


def check_together(variants: Sequence[Variant], table: Path, workers: int) -> None:
    """Raises Mistake for what would lose a result after its run."""
    if workers < 1:
        raise Mistake(f"WORKERS={workers}: expected 1 or more")
    if table.is_dir() or not table.parent.is_dir():
        raise Mistake(f"TABLE={table}: expected a file in a folder that exists")
    names: dict[str, str] = {}
    for variant in variants if "OUTPUT_DIR" in os.environ else ():
        folder = folder_of(variant)
        if folder in names:
            raise Mistake(
                f"{names[folder]!r}, {variant.name!r}: one folder of OUTPUT_DIR, {folder}; "
                "rename one"
            )
        names[folder] = variant.name


def gpus_of(env: Mapping[str, str]) -> tuple[list[str], str]:
    """Numbers of the GPUs at hand, and their name; one empty number where there is none."""
    listed: list[str] = []
    name = f"{os.cpu_count()}-core CPU"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=index,name", "--format=csv,noheader"]
        lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        pairs = [line.split(", ", 1) for line in lines if ", " in line]
        listed = [number for number, _ in pairs]
        name = pairs[0][1] if pairs else name
    chosen = env.get("CUDA_VISIBLE_DEVICES")
    if listed and chosen is not None:
        listed = [number for number in chosen.split(",") if number]
    return listed or [""], name


def in_a_process(
    variant: Variant, running: list[subprocess.Popen[str]], gpu: str = ""
) -> Result | str:
    """The result of the variant or, where it fails, the last line that it had to say.

    Its process joins those `running`; it sees `gpu` alone, if that is named.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(variant)]
    with tempfile.TemporaryDirectory() as folder:
        mine = Path(os.environ.get("OUTPUT_DIR", folder), folder_of(variant))
        environment = {**os.environ, "OUTPUT_DIR": str(mine)}
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
            # As torchrun sets it.  With a thread for each of 32 cores, four runs at once had not
            # compiled after 140 s.
            environment.setdefault("OMP_NUM_THREADS", "1")
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(
                command, stdout=pipe, stderr=pipe, text=True, env=environment
            )
        except OSError as error:  # no memory or no process is left; the other runs go on
            return f"cannot start: {error}"
        with process:
            running.append(process)
            out, said = process.communicate()

    if process.returncode:
        silent = f"ended with {process.returncode} and no message"
        return (said.strip().splitlines() or [silent])[-1].removeprefix("error: ")
    return Result(*json.loads(out.splitlines()[-1]))


def row(variant: Variant, result: Result | str, base: Result | None, *, shared: bool) -> str:
    """A line of the table.

    `result` is the fault of a run that failed; times of runs that `shared` the machine are left
    out.
    """
    settings = " ".join(f"{key}={value}" for key, value in variant.overrides.items())
    cells = [variant.name, settings, variant.prediction]
    if isinstance(result, str):
        return f"| {' | '.join(cells)} | failed: {result} |" + " |" * 8

    scores = {stage: f"{bpb:.4f}" for stage, bpb in result.scores.items()}
    cells += [scores["trained"], scores["averaged"], scores["packed"]]
    against = ""
    if base:
        against = f"{result.scores['packed'] - base.scores['packed']:+.4f}"
    ms = "-" if shared else f"{result.ms:.1f}"
    cells += [against, scores.get("sliding", "-"), ms]
    cells += [str(result.steps), f"{result.size:,}", str(result.seed)]
    return f"| {' | '.join(cells)} |"


@contextmanager
def ended_by_sigterm(
    pool: ThreadPoolExecutor, running: list[subprocess.Popen[str]]
) -> Iterator[None]:
    """SIGTERM ends what is `running` and starts nothing more."""

    def stop(*_: object) -> None:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.terminate()  # in training: it saves its weights first

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except CancelledError:
        raise Mistake("stopped by SIGTERM") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: list[str], table: Path, workers: int = 1) -> None:
    variants = [parse(argument) for argument in arguments]
    for variant in variants:  # mistakes show before the first run
        check(variant)
    check_together(variants, table, workers)
    base: Result | None = None
    head = f"\n{HEADER}\n"
    running: list[subprocess.Popen[str]] = []
    gpus, _ = gpus_of(os.environ)
    free: SimpleQueue[str] = SimpleQueue()
    for number in range(workers):
        free.put(gpus[number % len(gpus)])

    def measure(variant: Variant) -> Result | str:
        gpu = free.get()
        try:
            return in_a_process(variant, running, gpu)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(workers) as pool, ended_by_sigterm(pool, running):
        for variant, result in zip(variants, pool.map(measure, variants), strict=True):
            shared = workers > len(gpus) and not (in_turn() and ends_by_the_clock(variant))
            line = row(variant, result, base, shared=shared)
            print(line, flush=True)
            with table.open("a") as file:
                file.write(f"{head}{line}\n")
            head = ""
            if isinstance(result, Result) and variant is variants[0]:
                base = result


def one(variant: Variant) -> None:
    """What a process of its own does: the result as the last line, or an error."""
    try:
        print(json.dumps(run_variant(variant)), flush=True)
    except tg.RunError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--one"]:
            one(Variant(*json.loads(sys.argv[2])))
        else:
            file = Path(os.environ.pop("TABLE", str(REPO / "docs/ABLATIONS.md")))
            count = os.environ.pop("WORKERS", "1")
            if not count.isdecimal():
                raise Mistake(f"WORKERS={count}: expected a whole number")
            workers = int(count)
            main(sys.argv[1:] or ["base"], file, workers)
    except Mistake as error:
        sys.exit(f"error: {error}")
