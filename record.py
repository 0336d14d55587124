"""Writes submission.json for the runs of a folder: seeds, statistics, the challenge's limits.

    python record.py [FOLDER]      (train_gpt.py calls `write_submission` after every complete run)

Every complete run leaves a result_seed<N>.json.  Those whose recipe (settings, code, data and
hardware) equals the newest one's are merged: means, sample standard deviations, what the worst seed
needed.

With BASELINE_LOSS (nats of the seeds to beat, comma-separated) or BASELINE_BPB (the same in bits
per byte), and two seeds or more, it adds Welch's test for the rule of records: better by at least
0.005 nats at p < 0.01.  AUTHOR, GITHUB_ID and BLURB fill the fields of that name.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Result = dict[str, Any]  # a result_seed<N>.json as train_gpt.py wrote it
Log = Callable[[str], None]
FLOAT_STAGES = ("trained", "averaged", "blended")  # scored before packing
CAPS = {"train_seconds": 600, "eval_seconds": 600, "artifact_bytes": 16_000_000}
RECORD_NATS, RECORD_P, RECORD_SEEDS = 0.005, 0.01, 3


def recipe_of(result: Result) -> dict[str, Any]:
    """All that merged seeds have in common."""
    return dict(result["recipe"])


def load_results(folder: Path, log: Log) -> list[Result]:
    """Results that can be merged, oldest first; of the others the log says why not."""
    found = []
    for path in sorted(folder.glob("result_seed*.json")):
        try:
            result = json.loads(path.read_text())
            # Whole is what makes a submission by itself; an edited or older one may not.
            text_of([result], env={}, log=lambda line: None)
            check_numbers({"time": result["time"], **seed_result(result)})
            found.append((result["time"], path.name, result))
        except Exception as problem:  # a file that was edited may hold anything
            log(
                f"seeds: {path.name} is not a whole result of this train_gpt.py and is not merged "
                f"({type(problem).__name__}: {problem})"
            )
    if not found:
        raise FileNotFoundError(f"{folder}: no result_seed*.json of a complete run")
    found.sort(key=lambda row: row[:2])
    wanted = recipe_of(found[-1][2])
    merged: dict[int, tuple[str, Result]] = {}
    for _, name, result in found:
        recipe = recipe_of(result)
        other = [key for key in recipe | wanted if recipe.get(key) != wanted.get(key)]
        if other:
            log(f"seeds: {name} is of another {', '.join(other[:5])} and is not merged")
            continue
        seed = int(result["training"]["seed"])
        if seed in merged:
            older, _ = merged.pop(seed)
            log(f"seeds: {older} is an older result of seed {seed} and is not merged")
        merged[seed] = (name, result)
    return [result for _, result in merged.values()]


def bits_per_byte(score: Mapping[str, float]) -> float:
    return score["nats"] / math.log(2) / score["text_bytes"]


def seed_result(result: Result) -> dict[str, Any]:
    """One seed's row of submission.json."""
    scores, training = result["scores"], result["training"]
    best = scores.get("sliding", scores["packed"])
    return {
        "val_loss": best["nats"] / best["tokens"],
        "val_bpb": bits_per_byte(best),
        "val_bpb_roundtrip": bits_per_byte(scores["packed"]),
        "artifact_bytes": result["bytes_code"] + result["bytes_model"],
        "steps": training["step_stop"],
        "step_avg_ms": training["step_avg_ms"],
        "train_seconds": training["wallclock_seconds"],
        "eval_seconds": round(sum(score["seconds"] for score in scores.values()), 3),
    }


def check_numbers(row: Mapping[str, Any]) -> None:
    """Raises ValueError for what no run has: no number, not finite, below 0, a score of 0."""
    for name, value in row.items():
        least = 1e-9 if name.startswith("val_") else 0
        if type(value) not in (int, float) or not least <= value < 1e15:
            raise ValueError(f"{name} is {value!r}")


def student_tail(t: float, df: float) -> float:
    """P(T > t) of Student's t.  With x = sqrt(df) tan(a) its density becomes cos(a)^(df - 1)."""

    def integral(low: float, high: float) -> float:
        width = (high - low) / 200_000
        return float((np.cos(low + width * (np.arange(200_000) + 0.5)) ** (df - 1)).sum() * width)

    return integral(math.atan(t / math.sqrt(df)), math.pi / 2) / integral(-math.pi / 2, math.pi / 2)


def welch(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """One-sided test that our mean is lower by more than RECORD_NATS; one baseline is exact."""
    groups = [(np.var(x, ddof=1) / len(x), len(x) - 1) for x in (ours, theirs) if len(x) > 1]
    variance = sum(square for square, _ in groups)
    gain = float(np.mean(theirs) - np.mean(ours))
    row = {"gain_nats": gain, "required_nats": RECORD_NATS}
    if variance == 0:  # all seeds alike: nothing to test with
        return row
    t = (gain - RECORD_NATS) / math.sqrt(variance)
    df = float(variance**2 / sum(square**2 / rest for square, rest in groups))
    p = student_tail(t, df)
    return row | {"t_statistic": float(t), "welch_df": df, "p_value": p, "record": p < RECORD_P}


def baseline(env: Mapping[str, str], nats_per_bpb: float) -> list[float]:
    """Losses of the seeds to beat, in nats.  Raises ValueError for what is no loss."""
    for name, scale in (("BASELINE_LOSS", 1.0), ("BASELINE_BPB", nats_per_bpb)):
        if env.get(name):
            try:
                values = [float(part) for part in env[name].split(",")]
                if not all(1e-3 < value < 1e3 for value in values):  # nor nan
                    raise ValueError
                return [value * scale for value in values]
            except ValueError:
                raise ValueError(
                    f"{name}={env[name]!r}: expected losses with commas between "
                    "them; no test was made, `python record.py` repeats it"
                ) from None
    return []


def compliance(results: list[Result], seeds: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the challenge limits: found, in the worst seed, the rule, whether it is kept."""
    worst = {name: max(seed[name] for seed in seeds) for name in CAPS}
    new, tokens = results[-1], results[-1]["scores"]["packed"]["tokens"]
    hardware = new["environment"]["hardware"]
    rows = [(name, worst[name], f"<= {cap}", worst[name] <= cap) for name, cap in CAPS.items()]
    rows += [
        ("seeds", len(seeds), f">= {RECORD_SEEDS}", len(seeds) >= RECORD_SEEDS),
        ("val_tokens", tokens, "FineWeb", new["dataset"].startswith("fineweb")),
        ("hardware", hardware, "8 x H100", hardware.startswith("8 x NVIDIA H100")),
    ]
    return {name: {"found": found, "rule": rule, "fits": fits} for name, found, rule, fits in rows}


def submission(folder: Path, env: Mapping[str, str], log: Log) -> str:
    """The text of submission.json; logs statistics and compliance, one line each."""
    return text_of(load_results(folder, log), env, log)


def text_of(results: list[Result], env: Mapping[str, str], log: Log) -> str:
    """The same of results that belong together, the newest last.

    Raises ValueError, LookupError, TypeError, AttributeError or ArithmeticError if one lacks a
    field, or holds what is no number where one is due.
    """
    new = results[-1]
    rows = {str(int(result["training"]["seed"])): seed_result(result) for result in results}
    hardware = new["environment"]["hardware"]
    column = {name: [row[name] for row in rows.values()] for name in next(iter(rows.values()))}
    means = ("val_loss", "val_bpb", "val_bpb_roundtrip")
    over = {name: float(np.mean(column[name])) for name in means}
    if len(rows) > 1:
        over |= {f"{name}_std": float(np.std(column[name], ddof=1)) for name in means[:2]}
        try:
            theirs = baseline(env, over["val_loss"] / over["val_bpb"])
            over |= welch(column["val_loss"], theirs) if theirs else {}
        except ValueError as error:
            log(f"seeds: {error}")
    h, training, scores = new["settings"], new["training"], new["scores"]
    rules = compliance(results, list(rows.values()))
    log(
        "submission seeds:"
        + ",".join(rows)
        + "".join(f" {name}:{value:.6g}" for name, value in over.items())
    )
    parts = [
        f"{name}:{row['found']} ({row['rule']}: {str(row['fits']).lower()})"
        for name, row in rules.items()
        if name != "artifact_bytes"
    ]  # the last line has them
    parts += [f"{name}:{training.get(name)}" for name in ("train_shards", "train_tokens")]
    log("compliance " + " ".join(parts))
    blurb = f"{h['num_layers']}L x {h['model_dim']}, XSA, VE, SmearGate, Muon, SWA, late QAT, int6"
    content = {
        "author": env.get("AUTHOR", "Parameter Golf maintainers"),
        "github_id": env.get("GITHUB_ID", ""),
        "name": h["run_id"],
        "blurb": env.get("BLURB", blurb),
        "date": time.strftime("%Y-%m-%d", time.gmtime(new["time"])),  # UTC, of the newest seed
        "track": "10min_16mb",
        "dataset": new["dataset"],
        "hardware": hardware,
        "pytorch_version": new["environment"]["torch"],
        "model_params": new["model_params"],
        **over,
        **{f"{s}_val_bpb": bits_per_byte(scores[s]) for s in FLOAT_STAGES if s in scores},
        "eval_stride": h["eval_stride"],
        "val_tokens": scores["packed"]["tokens"],
        "bytes_total": new["bytes_code"] + new["bytes_model"],
        "bytes_code": new["bytes_code"],
        "bytes_model_int6_zstd": new["bytes_model"],
        "artifact_bytes_mean": float(np.mean(column["artifact_bytes"])),
        "artifact_bytes_max": max(column["artifact_bytes"]),
        **{name: value for name, value in training.items() if name not in ("seed", "fault")},
        "eval_time_seconds": column["eval_seconds"][-1],
        "compliance": rules,
        "seeds": [int(seed) for seed in rows],
        "seed_results": rows,
        "recipe": recipe_of(new),
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"  # NaN is not JSON


def write_submission(folder: Path, env: Mapping[str, str], log: Log) -> None:
    """Writes submission.json of the folder's results, whole or not at all."""
    text = submission(folder, env, log)
    temporary = folder / "submission.json.tmp"
    temporary.write_text(text)
    os.replace(temporary, folder / "submission.json")


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack a letter of a file's name
        sys.stdout.reconfigure(errors="backslashreplace")
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    try:
        write_submission(folder, os.environ, print)
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
