"""Turns the log of a run into one picture: losses, learning rate and step time against the clock.

    python bench/plot_log.py train.log [PICTURE.png]          (needs matplotlib)

Reads what every log holds: the settings, the `step:` lines, where late QAT began, the final scores.
The learning rate is recomputed from the settings; averaging is shaded from where it began.
"""
from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import train_gpt as tg


class Curves(NamedTuple):
    """What a log says of a run; points are (step, seconds of training clock, value)."""

    h: tg.Hyperparameters
    train_loss: list[tuple[int, float, float]]  # nats per token
    val_bpb: list[tuple[int, float, float]]
    qat_step: int | None  # first step with late QAT
    scores: dict[str, float]  # bpb by stage


def read_log(text: str) -> Curves:
    """Raises RunError if `text` holds no settings or no steps."""
    found = re.search(r"^={80}\n(?=\{)", text, re.M)
    if not found:
        raise tg.RunError("no log of this program: expected its settings after a line of 80 '='")
    settings = json.JSONDecoder().raw_decode(text[found.end():])[0]
    known = {field.name for field in dataclasses.fields(tg.Hyperparameters)}
    h = tg.Hyperparameters(**{name: value for name, value in settings.items() if name in known})
    text = text[found.end():]

    def points(label: str) -> list[tuple[int, float, float]]:
        pattern = rf"^step:(\d+)/\d+ .*\b{label}:(\S+) train_time:(\d+)ms"
        return [(int(step), int(ms) / 1e3, float(value))
                for step, value, ms in re.findall(pattern, text, re.M)]

    qat = re.search(r"^late_qat:on step:(\d+)", text, re.M)
    stages = {"trained": "stage:trained", "averaged": "stage:averaged",
              "packed": "final_int6_zstd_roundtrip_exact",
              "sliding": "final_int6_zstd_sliding_exact"}
    scores = {name: float(score[1]) for name, start in stages.items()
              if (score := re.search(rf"^{start} .*val_bpb:(\S+)", text, re.M))}
    if not (losses := points("train_loss")):
        raise tg.RunError("the log ends before the first step")
    end = re.search(r"^training step_stop:(\d+) wallclock_seconds:(\S+) .*"
                    r"final_train_loss:([\d.]+)", text, re.M)
    if end and int(end[1]) > losses[-1][0]:  # a run that the clock ends stops between two lines
        losses.append((int(end[1]), float(end[2]), float(end[3])))
    return Curves(h, losses, points("val_bpb"), int(qat[1]) if qat else None, scores)


def lr_at(curves: Curves) -> list[float]:
    """Scale of the learning rate at each logged step, by the schedule of the run."""
    h, total = curves.h, curves.train_loss[-1][0]
    shares = [tg.progress_of(h, step - 1, seconds) for step, seconds, _ in curves.train_loss]
    return [tg.lr_scale(h, share, total) for share in shares]


def step_times(curves: Curves) -> list[tuple[float, float]]:
    """(seconds, mean ms a step since the point before), from the second point on."""
    rows = curves.train_loss
    return [(now[1], (now[1] - old[1]) * 1e3 / (now[0] - old[0]))
            for old, now in zip(rows, rows[1:], strict=False)]


def averaging_began(curves: Curves) -> float:
    """Second at which the lr scale fell below the run's `swa_threshold`, between logged steps."""
    seconds = [point[1] for point in curves.train_loss]
    return float(np.interp(-curves.h.swa_threshold, [-scale for scale in lr_at(curves)], seconds))


def draw(curves: Curves, picture: Path) -> None:
    import matplotlib as mpl
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (loss, lr, speed) = pyplot.subplots(
        3, 1, sharex=True, figsize=(9, 8), height_ratios=[3, 1, 1], layout="constrained")
    seconds = [point[1] for point in curves.train_loss]
    loss.plot(seconds, [point[2] for point in curves.train_loss], label="training loss, one batch")
    loss.set(ylabel="nats per token", ylim=(None, min(4.0, curves.train_loss[0][2])))
    bits = loss.twinx()
    bits.set_ylabel("bits per byte")
    validation = [(point[1], point[2]) for point in curves.val_bpb]
    if "trained" in curves.scores:
        validation.append((seconds[-1], curves.scores["trained"]))
    bits.plot(*zip(*validation, strict=True), "o-", color="tab:orange", label="validation bpb")
    loss.annotate("\n".join(f"{name} {score:.4f} bpb" for name, score in curves.scores.items()),
                  (0.98, 0.85), xycoords="axes fraction", va="top", ha="right", family="monospace",
                  bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8})
    handles = loss.get_lines() + bits.get_lines()[:1]
    loss.legend(handles, [line.get_label() for line in handles], loc="upper right")

    scales = lr_at(curves)
    lr.plot(seconds, scales, color="tab:green")
    lr.set(ylabel="lr scale", ylim=(0, 1.05))
    times = step_times(curves)
    speed.plot(*zip(*times, strict=True), ".-", color="tab:red")
    speed.set(ylabel="ms per step", xlabel="training clock, s",
              ylim=(0, 1.15 * max(ms for _, ms in times)))
    for axis in (loss, lr, speed):
        axis.grid(alpha=0.3)
        axis.axvspan(averaging_began(curves), seconds[-1], alpha=0.12, color="tab:blue")
        if curves.qat_step:
            steps = [point[0] for point in curves.train_loss]
            start = float(np.interp(curves.qat_step, steps, seconds))
            axis.axvline(start, linestyle="--", color="black", linewidth=1)
    lr.annotate("shaded: averaging; dashed: late QAT", (0.02, 0.1), xycoords="axes fraction",
                fontsize=8)
    figure.suptitle(f"{curves.h.run_id}, seed {curves.h.seed}, {curves.train_loss[-1][0]} steps of "
                    f"{curves.h.train_batch_tokens:,} tokens")
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".png")
    try:
        draw(read_log(source.read_text()), target)
    except tg.RunError as error:
        sys.exit(f"{source}: {error}")
    print(target)
