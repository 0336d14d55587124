"""The picture of a run is drawn from numbers that its log really holds."""

import json
import sys
from pathlib import Path

import pytest
from support import REPO, train_gpt

sys.path.insert(0, str(REPO / "bench"))
import plot_log

LOG = (REPO / "train.log").read_text()


def made_log(**settings: object) -> str:
    steps = "".join(
        f"step:{step}/100 train_loss:{5 - step / 50:.4f} train_time:{step * 70}ms step_avg:70ms\n"
        for step in range(10, 101, 10)
    )
    middle = "step:50/100 val_loss:3.1 val_bpb:1.5000 train_time:3500ms step_avg:70.00ms\n"
    return (
        f"source\n{'=' * 80}\n{json.dumps(settings)}\n{steps}{middle}"
        "late_qat:on step:86 lr_scale:0.1500 grid_step:0.01\n"
        "stage:trained val_loss:2.0 val_bpb:1.20000000 eval_time:0.6s\n"
        "final_int6_zstd_sliding_exact stride:64 val_loss:2.0 val_bpb:1.18000000 eval_time:9s\n"
    )


def test_the_points_are_those_of_the_log() -> None:
    curves = plot_log.read_log(made_log(iterations=100, seed=7, a_setting_of_old=1))
    assert curves.h.iterations == 100 and curves.h.seed == 7
    assert curves.train_loss[0] == (10, 0.7, 4.8) and curves.train_loss[-1] == (100, 7.0, 3.0)
    assert curves.val_bpb == [(50, 3.5, 1.5)]
    assert curves.first_qat_step == 86
    assert curves.scores == {"trained": 1.2, "sliding": 1.18}


def test_a_run_that_the_clock_ended_is_drawn_to_its_last_step() -> None:
    end = "training step_stop:{} wallclock_seconds:7.4 seed:1 final_train_loss:2.75 fault:\n"
    assert plot_log.read_log(made_log() + end.format(106)).train_loss[-1] == (106, 7.4, 2.75)
    assert plot_log.read_log(made_log() + end.format(100)).train_loss[-1] == (100, 7.0, 3.0)


def test_the_lr_and_where_averaging_began_follow_the_schedule() -> None:
    curves = plot_log.read_log(
        made_log(iterations=100, warmdown_fraction=0.5, swa_threshold=0.2, max_wallclock_seconds=0)
    )
    assert plot_log.lr_at(curves)[:5] == [1.0] * 5
    assert plot_log.lr_at(curves)[-1] == pytest.approx(0.02)
    assert plot_log.averaging_began(curves) == pytest.approx(0.91 * 7.0)
    assert [ms for _, ms in plot_log.step_times(curves)] == pytest.approx([70.0] * 9)


def test_the_settings_of_the_committed_log_are_read() -> None:
    h, lines = plot_log.read_settings(LOG)
    assert (h.preset, h.max_wallclock_seconds, h.num_layers) == ("card", 180.0, 11)
    assert "def " in LOG and "def " not in lines, "the source is no part of the lines"


def test_the_committed_log_makes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curves = plot_log.read_log(LOG)
    submission = json.loads((REPO / "submission.json").read_text())
    assert curves.train_loss[-1][0] == submission["step_stop"]
    newest = submission["seed_results"][str(submission["seeds"][-1])]
    assert curves.scores["sliding"] == pytest.approx(newest["val_bpb"], abs=1e-8)
    plot_log.draw(curves, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


NO_LOGS = ["", "no settings", f"{'=' * 80}\n{{}}\nno steps", f'{"=" * 80}\n{{"seed": 1']
ONE_STEP = "step:1/9 train_loss:5.0 train_time:70ms step_avg:70ms\n"


@pytest.mark.parametrize("text", [*NO_LOGS, f"{'=' * 80}\n{{}}\n{ONE_STEP}"])
def test_a_text_that_is_no_log_is_refused(text: str) -> None:
    with pytest.raises(train_gpt.RunError, match="log"):
        plot_log.read_log(text)
