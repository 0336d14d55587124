"""Results that were edited, are older or are none: named, left out, and no harm to a new run."""

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import check_whole, data_in, run_here
from support import REPO, completed

import record

Result = dict[str, Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return data_in(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUTPUT_DIR of a finished run."""
    out = tmp_path_factory.mktemp("finished")
    run_here(data, out)
    return out


@pytest.fixture(scope="module")
def whole(finished: Path) -> Result:
    """The result of that run."""
    result: Result = json.loads((finished / "result_seed1337.json").read_text())
    return result


def strict(text: str) -> dict[str, Any]:
    """JSON as its standard has it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    content: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return content


def changed(result: Result, path: str, value: Any = None, *, remove: bool = False) -> Result:
    """A copy in which the field at `path`, with dots between names, has another value or none."""
    result = copy.deepcopy(result)
    *parents, last = path.split(".")
    owner = result
    for name in parents:
        owner = owner[name]
    if remove:
        del owner[last]
    else:
        owner[last] = value
    return result


def seeded(result: Result, seed: int, **changes: Any) -> Result:
    return changed(result, "training.seed", seed) | changes


def merged(folder: Path, whole: Result, odd: str | Result, **env: str) -> tuple[Result, list[str]]:
    """submission.json of a whole result beside an odd one of seed 5, and the lines of the log."""
    text = odd if isinstance(odd, str) else json.dumps(odd)
    (folder / "result_seed5.json").write_text(text)
    (folder / "result_seed1337.json").write_text(json.dumps(whole))
    lines: list[str] = []
    record.write_submission(folder, env, lines.append)
    return strict((folder / "submission.json").read_text()), lines


def check_left_out(report: Result, lines: list[str]) -> None:
    assert report["seeds"] == [1337]
    refused = [line for line in lines if "is not merged" in line]
    assert len(refused) == 1 and refused[0].startswith("seeds: result_seed5.json"), lines


FIELDS = [
    "settings", "settings.num_layers", "settings.run_id", "recipe", "dataset", "model_params",
    "environment", "environment.hardware", "environment.torch", "training", "training.seed",
    "training.step_stop", "training.step_avg_ms", "training.wallclock_seconds", "bytes_code",
    "bytes_model", "time", "scores", "scores.packed", "scores.packed.nats",
    "scores.packed.text_bytes", "scores.sliding.tokens", "scores.sliding.seconds",
]  # fmt: skip


@pytest.mark.parametrize("path", FIELDS)
def test_a_result_without_a_field_is_named_and_left_out(
    path: str, whole: Result, tmp_path: Path
) -> None:
    odd = changed(seeded(whole, 5), path, remove=True)
    check_left_out(*merged(tmp_path, whole, odd))


NUMBERS = [
    "training.step_stop", "training.step_avg_ms", "training.wallclock_seconds", "bytes_code",
    "bytes_model", "time", "scores.packed.nats", "scores.packed.text_bytes",
    "scores.sliding.nats", "scores.sliding.tokens", "scores.sliding.text_bytes",
    "scores.sliding.seconds",
]  # fmt: skip
NO_NUMBERS: list[Any] = ["12", None, [1], {}, math.nan, math.inf, -1e9]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("path", NUMBERS)
def test_a_result_with_an_odd_number_is_named_and_left_out(
    path: str, value: Any, whole: Result, tmp_path: Path
) -> None:
    odd = changed(seeded(whole, 5), path, value)
    check_left_out(*merged(tmp_path, whole, odd))


def test_a_recipe_that_is_no_json_is_named_and_left_out(whole: Result, tmp_path: Path) -> None:
    odd = changed(seeded(whole, 5), "recipe.matrix_lr", math.nan)
    check_left_out(*merged(tmp_path, whole, odd))


@pytest.mark.parametrize("path", ["scores.sliding.text_bytes", "scores.sliding.tokens"])
def test_a_result_of_no_text_is_named_and_left_out(
    path: str, whole: Result, tmp_path: Path
) -> None:
    check_left_out(*merged(tmp_path, whole, changed(seeded(whole, 5), path, 0)))


@pytest.mark.parametrize("path", ["settings", "training", "scores", "environment", "recipe"])
@pytest.mark.parametrize("value", [None, 3, "text", [1, 2]], ids=repr)
def test_a_part_of_another_type_is_named_and_left_out(
    path: str, value: Any, whole: Result, tmp_path: Path
) -> None:
    check_left_out(*merged(tmp_path, whole, changed(seeded(whole, 5), path, value)))


TEXTS = {
    "empty": "", "list": "[]", "list of results": "[{}]", "null": "null", "number": "7",
    "text": '"result"', "cut": '{"settings": {', "no JSON": "seed 5: 1.1", "deep": "[" * 100_000,
    "byte order mark": "\ufeff{}", "object": "{}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_that_is_no_result_is_named_and_left_out(
    name: str, whole: Result, tmp_path: Path
) -> None:
    check_left_out(*merged(tmp_path, whole, TEXTS[name]))


def make_folder(path: Path) -> None:
    path.mkdir()


def make_lost_link(path: Path) -> None:
    path.symlink_to(path.parent / "gone")


def make_no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00{")


@pytest.mark.parametrize("make", [make_folder, make_lost_link, make_no_text])
def test_a_name_that_cannot_be_read_is_left_out(
    make: Callable[[Path], None], whole: Result, tmp_path: Path
) -> None:
    make(tmp_path / "result_seed5.json")
    (tmp_path / "result_seed1337.json").write_text(json.dumps(whole))
    lines: list[str] = []
    report = strict(record.submission(tmp_path, {}, lines.append))
    check_left_out(report, lines)


def test_an_unreadable_result_is_named_and_left_out(
    whole: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_text = Path.read_text

    def refuse(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name == "result_seed5.json":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *arguments, **options)

    (tmp_path / "result_seed5.json").write_text(json.dumps(seeded(whole, 5)))
    (tmp_path / "result_seed1337.json").write_text(json.dumps(whole))
    monkeypatch.setattr(Path, "read_text", refuse)
    lines: list[str] = []
    report = strict(record.submission(tmp_path, {}, lines.append))
    check_left_out(report, lines)
    assert any("Permission denied" in line for line in lines)


def test_a_result_from_the_future_does_not_decide_if_it_is_odd(
    whole: Result, tmp_path: Path
) -> None:
    odd = changed(seeded(whole, 5, time=whole["time"] + 1e6), "scores", {})
    check_left_out(*merged(tmp_path, whole, odd))


def test_a_whole_result_beside_odd_ones_is_still_merged(whole: Result, tmp_path: Path) -> None:
    other = seeded(whole, 7, time=whole["time"] - 1)
    (tmp_path / "result_seed7.json").write_text(json.dumps(other))
    report, lines = merged(tmp_path, whole, "{}")
    assert report["seeds"] == [7, 1337]
    assert sum("is not merged" in line for line in lines) == 1


# The baseline


def two_seeds(folder: Path, whole: Result, **env: str) -> tuple[Result, list[str]]:
    """The second one is a little better."""
    other = seeded(whole, 5, time=whole["time"] - 1)
    for stage in ("packed", "sliding"):
        other["scores"][stage]["nats"] *= 1.01
    report, lines = merged(folder, whole, other, **env)
    assert report["seeds"] == [5, 1337]
    return report, lines


ODD_BASELINES = ["nan", "inf", "-inf", "1,nan", "inf,2", ",", "1,,2", " ", "-3", "0", "1e308,1e308",
                 "1e-300,2", "1e400", "two", "1;2"]  # fmt: skip


@pytest.mark.parametrize("name", ["BASELINE_LOSS", "BASELINE_BPB"])
@pytest.mark.parametrize("value", ODD_BASELINES)
def test_an_odd_baseline_is_named_and_tests_nothing(
    name: str, value: str, whole: Result, tmp_path: Path
) -> None:
    report, lines = two_seeds(tmp_path, whole, **{name: value})
    assert not {"t_statistic", "p_value", "gain_nats", "record"} & report.keys()
    assert any(f"{name}={value!r}" in line for line in lines), lines


def test_an_empty_baseline_is_none(whole: Result, tmp_path: Path) -> None:
    report, lines = two_seeds(tmp_path, whole, BASELINE_LOSS="", BASELINE_BPB="")
    assert "gain_nats" not in report
    assert not any("BASELINE" in line for line in lines)


def test_a_good_baseline_is_tested_against(whole: Result, tmp_path: Path) -> None:
    report, _ = two_seeds(tmp_path, whole, BASELINE_LOSS="9.1,9.2")
    assert report["gain_nats"] > 0 and 0 <= report["p_value"] <= 1


def test_equal_seeds_and_an_equal_baseline_are_strict_json(whole: Result, tmp_path: Path) -> None:
    other = seeded(whole, 5, time=whole["time"] - 1)
    report, _ = merged(tmp_path, whole, other, BASELINE_LOSS="9,9")
    assert report["val_loss_std"] == 0 and "t_statistic" not in report


# Whole runs


ODD_FILES = {"empty": "", "list": "[]", "older": '{"seed": 5, "val_loss": 1.2}', "nan": "NaN"}


@pytest.mark.parametrize("name", ODD_FILES)
def test_a_run_beside_an_odd_result_ends_whole(
    name: str, data: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "result_seed5.json").write_text(ODD_FILES[name])
    run_here(data, tmp_path)
    check_whole(tmp_path)
    assert strict((tmp_path / "submission.json").read_text())["seeds"] == [1337]
    assert "seeds: result_seed5.json is not a whole" in (tmp_path / "train.log").read_text()
    assert (tmp_path / "result_seed5.json").read_text() == ODD_FILES[name]


def test_a_run_beside_a_folder_of_that_name_ends_whole(
    data: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "result_seed5.json").mkdir()
    run_here(data, tmp_path)
    check_whole(tmp_path)


@pytest.mark.parametrize("problem", [ValueError("odd"), OSError("full"), RuntimeError("bug")])
def test_whatever_record_raises_the_run_ends_whole(
    problem: Exception, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise problem

    (tmp_path / "submission.json").write_text("{}")
    monkeypatch.setattr(record, "write_submission", fail)
    run_here(data, tmp_path)
    check_whole(tmp_path)
    log = (tmp_path / "train.log").read_text()
    assert f"note: submission.json was not written ({type(problem).__name__}: {problem})" in log


def test_record_alone_says_in_one_line_that_nothing_is_whole(tmp_path: Path) -> None:
    (tmp_path / "result_seed5.json").write_text("{}")
    done = completed(REPO / "record.py", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert "result_seed5.json is not a whole result" in done.stdout
    assert os.listdir(tmp_path) == ["result_seed5.json"]
