"""Turns the log of a run into one picture: losses, learning rate and step time against the clock.

    python bench/plot_log.py train.log [PICTURE.png]          (needs matplotlib)

Reads what every log holds: the settings, the `step:` lines, where late QAT began, the final scores.
The learning rate is recomputed from the settings; averaging is shaded from where it began.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import train_gpt as tg

SCORES = {  # stage -> how its line begins
    "trained": "stage:trained",
    "averaged": "stage:averaged",
    "blended": "stage:blended",
    "packed": "final_int6_zstd_roundtrip_exact",
    "sliding": "final_int6_zstd_sliding_exact",
}


class Point(NamedTuple):
    step: int
    seconds: float  # of the training clock
    value: float


class Curves(NamedTuple):
    """What a log says of a run."""

    h: tg.Hyperparameters
    train_loss: list[Point]  # nats per token
    val_bpb: list[Point]
    first_qat_step: int | None
    scores: dict[str, float]  # bpb by stage


def read_log(text: str) -> Curves:
    """Raises RunError if `text` holds no settings or no two steps."""
    h, lines = read_settings(text)
    losses = points(lines, "train_loss")
    tg.require(losses, "the log ends before the first step")
    last = last_step(lines)
    if last and last.step > losses[-1].step:  # a run that the clock ends stops between two lines
        losses.append(last)
    tg.require(len(losses) > 1, "the log holds one step, and a curve needs two")

    qat = re.search(r"^late_qat:on step:(\d+)", lines, re.M)
    scores = {}
    for stage, start in SCORES.items():
        score = re.search(rf"^{start} .*val_bpb:(\S+)", lines, re.M)
        if score:
            scores[stage] = float(score[1])
    return Curves(h, losses, points(lines, "val_bpb"), int(qat[1]) if qat else None, scores)


def read_settings(text: str) -> tuple[tg.Hyperparameters, str]:
    """The settings, which follow the run's source, and all that comes after them.

    A setting that has gone since the run is left out, and one that was not there has its default.
    """
    found = re.search(r"^={80}\n(?=\{)", text, re.M)
    if not found:
        raise tg.RunError("no log of this program: expected its settings after a line of 80 '='")
    rest = text[found.end() :]
    try:
        logged, end = json.JSONDecoder().raw_decode(rest)
    except ValueError:
        raise tg.RunError("the log ends within its settings") from None
    known = {field.name for field in dataclasses.fields(tg.Hyperparameters)}
    settings = {name: value for name, value in logged.items() if name in known}
    return tg.Hyperparameters(**settings), rest[end:]


def points(lines: str, label: str) -> list[Point]:
    pattern = rf"^step:(\d+)/\d+ .*\b{label}:(\S+) train_time:(\d+)ms"
    found = re.findall(pattern, lines, re.M)
    return [Point(int(step), int(ms) / 1e3, float(value)) for step, value, ms in found]


def last_step(lines: str) -> Point | None:
    """Of the training loss, from the line with the facts of the training."""
    pattern = r"^training step_stop:(\d+) wallclock_seconds:(\S+) .*final_train_loss:([\d.]+)"
    found = re.search(pattern, lines, re.M)
    return Point(int(found[1]), float(found[2]), float(found[3])) if found else None


def lr_at(curves: Curves) -> list[float]:
    """Scale of the learning rate at each logged step, by the schedule of the run."""
    h = curves.h
    total = curves.train_loss[-1].step
    shares = [tg.progress_of(h, point.step - 1, point.seconds) for point in curves.train_loss]
    return [tg.lr_scale(h, share, total) for share in shares]


def step_times(curves: Curves) -> list[tuple[float, float]]:
    """(seconds, mean ms a step since the point before), from the second point on."""
    rows = curves.train_loss
    return [
        (now.seconds, (now.seconds - before.seconds) * 1e3 / (now.step - before.step))
        for before, now in zip(rows, rows[1:], strict=False)
    ]


def averaging_began(curves: Curves) -> float:
    """Second at which the lr scale fell below the run's `swa_threshold`, between logged steps."""
    seconds = [point.seconds for point in curves.train_loss]
    falling = [-scale for scale in lr_at(curves)]
    return float(np.interp(-curves.h.swa_threshold, falling, seconds))


def draw(curves: Curves, picture: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (loss, lr, speed) = pyplot.subplots(
        3, 1, sharex=True, figsize=(9, 8), height_ratios=[3, 1, 1], layout="constrained"
    )
    seconds = [point.seconds for point in curves.train_loss]
    draw_losses(curves, loss)
    lr.plot(seconds, lr_at(curves), color="tab:green")
    lr.set(ylabel="lr scale", ylim=(0, 1.05))
    times = step_times(curves)
    speed.plot(*zip(*times, strict=True), ".-", color="tab:red")
    slowest = max(ms for _, ms in times)
    speed.set(ylabel="ms per step", xlabel="training clock, s", ylim=(0, 1.15 * slowest))

    for axis in (loss, lr, speed):
        axis.grid(alpha=0.3)
        axis.axvspan(averaging_began(curves), seconds[-1], alpha=0.12, color="tab:blue")
        if curves.first_qat_step:
            steps = [point.step for point in curves.train_loss]
            start = float(np.interp(curves.first_qat_step, steps, seconds))
            axis.axvline(start, linestyle="--", color="black", linewidth=1)
    note = "shaded: averaging; dashed: late QAT"
    lr.annotate(note, (0.02, 0.1), xycoords="axes fraction", fontsize=8)
    h = curves.h
    figure.suptitle(
        f"{h.run_id}, seed {h.seed}, {curves.train_loss[-1].step} steps of "
        f"{h.train_batch_tokens:,} tokens"
    )
    try:
        figure.savefig(picture, dpi=120)
    except ValueError as error:  # a format that matplotlib does not write
        raise tg.RunError(f"{picture}: {error}") from None
    pyplot.close(figure)


def draw_losses(curves: Curves, loss: Any) -> None:
    """Training loss in nats and validation in bits per byte, on one pair of axes."""
    seconds = [point.seconds for point in curves.train_loss]
    values = [point.value for point in curves.train_loss]
    loss.plot(seconds, values, label="training loss, one batch")
    loss.set(ylabel="nats per token", ylim=(None, min(4.0, values[0])))

    bits = loss.twinx()
    bits.set_ylabel("bits per byte")
    validation = [(point.seconds, point.value) for point in curves.val_bpb]
    if "trained" in curves.scores:
        validation.append((seconds[-1], curves.scores["trained"]))
    bits.plot(*zip(*validation, strict=True), "o-", color="tab:orange", label="validation bpb")
    loss.annotate(
        "\n".join(f"{name} {score:.4f} bpb" for name, score in curves.scores.items()),
        (0.98, 0.85),
        xycoords="axes fraction",
        va="top",
        ha="right",
        family="monospace",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )
    handles = loss.get_lines() + bits.get_lines()[:1]
    loss.legend(handles, [line.get_label() for line in handles], loc="upper right")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path, help="train.log")
    parser.add_argument("picture", type=Path, nargs="?", help="by default beside the log, .png")
    arguments = parser.parse_args()
    source = arguments.log
    target = arguments.picture or source.with_suffix(".png")
    try:
        draw(read_log(source.read_text()), target)
    except (tg.RunError, OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: {source}: {error}")
    print(target)
