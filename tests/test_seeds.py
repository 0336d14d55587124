"""Claims about record.py: which runs it merges, their statistics, what it says of the rules."""

import dataclasses
import json
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import REPO, completed, train_gpt

import record

CARD = train_gpt.Hyperparameters()
FIELDS = dataclasses.fields(CARD)
PER_RUN = {field.name for field in FIELDS if field.metadata["per_run"]}
TOKENS = 10**9  # of the validation split
GPUS = "8 x NVIDIA H100 80GB HBM3"


def facts_of(seed: int, **changes: Any) -> train_gpt.TrainingFacts:
    facts = train_gpt.TrainingFacts(
        step_stop=4000 + seed,
        wallclock_seconds=598.0 + seed,
        seed=seed,
        qat_steps=600,
        step_avg_ms=150.0,
        swa_steps=800,
        grid_step=0.01,
        train_shards=80,
        train_tokens=10**10,
        train_digest="7a1e",
        code_sha256=train_gpt.file_digest(train_gpt.SOURCE),
        final_train_loss=2.0,
        interrupted=False,
        graphs_compiled_on_clock=0,
        fault="",
    )
    return dataclasses.replace(facts, **changes)


def scores_of(seed: int, loss: float) -> dict[str, train_gpt.Score]:
    """With 0.4 bpb a nat; before sliding, 0.01 nats worse."""
    text_bytes = round(TOKENS / math.log(2) / 0.4)
    sliding = train_gpt.Score(loss * TOKENS, TOKENS, text_bytes, seconds=5.0 + seed)
    packed = dataclasses.replace(sliding, nats=(loss + 0.01) * TOKENS)
    return {"trained": packed, "averaged": packed, "packed": packed, "sliding": sliding}


def result(
    seed: int,
    loss: float,
    *,
    settings: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    dataset: str = "fineweb10B_sp1024",
    val_digest: str = "fa11",
    hardware: str = GPUS,
    source: Path = train_gpt.SOURCE,
    **changes: Any,
) -> dict[str, Any]:
    """What `train_gpt.write_result` leaves of a run, with `changes` of what is no recipe."""
    mine: dict[str, Any] = {"seed": seed, "output_dir": f"/runs/{seed}"} | (settings or {})
    h = dataclasses.replace(CARD, **mine)
    training = facts_of(seed, **facts or {})
    outcome = train_gpt.RunResult(scores_of(seed, loss), training, 90_000, 15_000_000 + seed)
    evaluator = SimpleNamespace(dataset=dataset, val_digest=val_digest)
    environment = {"hardware": hardware, "torch": "2.11.0"}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "SOURCE", source)
        patch.setattr(record, "write_submission", lambda folder, env, log: None)
        session = SimpleNamespace(
            h=h,
            files=SimpleNamespace(folder=Path(folder)),
            log=train_gpt.RunLog(None),
            evaluator=evaluator,
            environment=environment,
        )
        train_gpt.write_result(session, outcome, training)  # type: ignore[arg-type]
        (path,) = Path(folder).iterdir()
        assert path.name == f"result_seed{seed}.json"
        made: dict[str, Any] = json.loads(path.read_text())
    return made | {"time": 1000.0 + seed} | changes


def merge(folder: Path, *results: dict[str, Any], **env: str) -> tuple[dict[str, Any], list[str]]:
    """submission.json of these results, and the lines that were logged."""
    for one in results:
        path = folder / f"result_seed{one['training']['seed']}.json"
        path.write_text(json.dumps(one))
    lines: list[str] = []
    return json.loads(record.submission(folder, env, lines.append)), lines


Merged = tuple[dict[str, Any], list[str]]


@pytest.fixture(scope="module")
def three_seeds(tmp_path_factory: pytest.TempPathFactory) -> Merged:
    folder = tmp_path_factory.mktemp("seeds")
    return merge(folder, result(1, 2.0), result(2, 2.01), result(3, 2.05))


def test_seeds_of_one_recipe_are_merged(three_seeds: Merged) -> None:
    report, lines = three_seeds
    assert report["seeds"] == [1, 2, 3] and list(report["seed_results"]) == ["1", "2", "3"]
    assert lines[0].startswith("submission seeds:1,2,3 val_loss:2.02 ")


def test_merged_scores_are_means_and_sample_deviations(three_seeds: Merged) -> None:
    report, _ = three_seeds
    assert report["val_loss"] == pytest.approx(2.02)
    assert report["val_loss_std"] == pytest.approx(math.sqrt((4 + 1 + 9) / 2) / 100)
    assert report["val_bpb"] == pytest.approx(0.4 * 2.02)
    assert report["val_bpb_std"] == pytest.approx(0.4 * report["val_loss_std"])
    assert report["val_bpb_roundtrip"] == pytest.approx(0.4 * 2.03)


def test_merged_sizes_are_the_mean_and_the_largest(three_seeds: Merged) -> None:
    report, _ = three_seeds
    assert report["artifact_bytes_mean"] == 15_090_002
    assert report["artifact_bytes_max"] == report["bytes_total"] == 15_090_003


def test_every_merged_seed_keeps_its_own_numbers(three_seeds: Merged) -> None:
    report, _ = three_seeds
    assert report["seed_results"]["2"] == pytest.approx(
        {
            "val_loss": 2.01,
            "val_bpb": 0.804,
            "val_bpb_roundtrip": 0.808,
            "steps": 4002,
            "artifact_bytes": 15_090_002,
            "step_avg_ms": 150.0,
            "train_seconds": 600.0,
            "eval_seconds": 28.0,
        }
    )


def test_one_seed_has_no_deviation_and_its_own_numbers(tmp_path: Path) -> None:
    report, _ = merge(tmp_path, result(1, 2.0), BASELINE_LOSS="2.1,2.2")
    assert report["val_loss"] == 2.0
    assert not {"val_loss_std", "val_bpb_std", "t_statistic"} & report.keys()


def test_a_second_run_of_a_seed_replaces_the_first(tmp_path: Path) -> None:
    merge(tmp_path, result(1, 2.0), result(2, 2.2))
    report, _ = merge(tmp_path, result(1, 1.8, time=2000.0))
    assert report["val_loss"] == pytest.approx(2.0) and report["seeds"] == [2, 1]


def test_an_older_result_of_a_seed_is_left_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "result_seed1 (copy).json").write_text(json.dumps(result(1, 3.0, time=500.0)))
    report, lines = merge(tmp_path, result(1, 2.0), result(2, 2.2))
    assert report["seeds"] == [1, 2] and report["val_loss"] == pytest.approx(2.1)
    assert "result_seed1 (copy).json is an older result of seed 1" in lines[0]


OTHER: list[tuple[dict[str, Any], str]] = [  # what may not differ, and how the log calls it
    ({"settings": {"matrix_lr": 0.5}}, "matrix_lr"),
    ({"facts": {"code_sha256": "0ld"}}, "code"),
    ({"source": REPO / "record.py"}, "packing_code"),
    ({"dataset": "proxy"}, "dataset"),
    ({"facts": {"train_tokens": 10**9}}, "train_tokens"),
    ({"facts": {"train_digest": "07e4"}}, "train_digest"),
    ({"val_digest": "07e4"}, "val_digest"),
    ({"hardware": "1 x NVIDIA H100 80GB HBM3"}, "hardware"),
    ({"facts": {"interrupted": True}}, "whole_run"),
    ({"facts": {"fault": "step 9: nan"}}, "whole_run"),
]


@pytest.mark.parametrize(("changes", "name"), OTHER, ids=[name for _, name in OTHER])
def test_another_recipe_is_not_merged_and_the_log_says_why(
    changes: dict[str, Any], name: str, tmp_path: Path
) -> None:
    for newest in (False, True):  # the newest run decides, whichever it is
        odd = result(1, 9.0, **changes, time=2000.0 if newest else 500.0)
        report, lines = merge(tmp_path, odd, result(2, 2.0), result(3, 2.0))
        assert report["seeds"] == ([1] if newest else [2, 3])
        refused = [line for line in lines if line.startswith("seeds:")]
        assert len(refused) == (2 if newest else 1)
        assert all(f"of another {name} and" in line for line in refused), lines


def other_value(field: dataclasses.Field[Any]) -> Any:
    """A value of a setting that is allowed and not the card's."""
    value = getattr(CARD, field.name)
    if isinstance(value, str):
        return field.metadata["choices"][-1] if field.metadata["choices"] else "other"
    return value + 1


@pytest.mark.parametrize("name", sorted(PER_RUN))
def test_a_setting_of_a_run_alone_is_no_part_of_its_recipe(name: str, tmp_path: Path) -> None:
    (field,) = [field for field in FIELDS if field.name == name]
    changed = {name: other_value(field)}
    assert changed[name] != getattr(CARD, name)
    report, _ = merge(tmp_path, result(1, 2.0), result(2, 2.2, settings=changed))
    assert report["seeds"] == [1, 2]


def test_only_paths_names_and_two_intervals_are_per_run() -> None:
    numbers = {field.name for field in FIELDS if not isinstance(getattr(CARD, field.name), str)}
    assert numbers & PER_RUN == {"seed", "val_loss_every", "train_log_every"}
    assert PER_RUN - numbers == {
        "preset", "run_id", "device", "compile_backend", "data_path", "tokenizer_path",
        "output_dir", "eval_only", "resume_from", "on_interrupt", "eval_dump",
    }  # fmt: skip


def test_a_recipe_holds_every_other_setting_and_nine_facts() -> None:
    facts = {
        "code", "packing_code", "dataset", "train_tokens", "train_digest", "val_tokens",
        "val_digest", "hardware", "whole_run",
    }  # fmt: skip
    settings = {field.name for field in FIELDS} - PER_RUN
    recipe = record.recipe_of(result(1, 2.0))
    assert set(recipe) == settings | facts
    assert {name: recipe[name] for name in settings} == {n: getattr(CARD, n) for n in settings}
    assert recipe["val_tokens"] == TOKENS and recipe["whole_run"] is True
    assert (recipe["train_digest"], recipe["val_digest"]) == ("7a1e", "fa11")
    assert recipe["code"] == recipe["packing_code"] == train_gpt.file_digest(train_gpt.SOURCE)


def test_a_recipe_with_fewer_keys_is_another_one(tmp_path: Path) -> None:
    """An older version may not have told data apart; neither order merges the two."""
    for newest in (False, True):
        older = result(1, 2.0, time=2000.0 if newest else 500.0)
        del older["recipe"]["train_digest"]
        report, lines = merge(tmp_path, older, result(2, 2.0))
        assert report["seeds"] == ([1] if newest else [2])
        assert "of another train_digest and is not merged" in lines[0]


def test_a_result_has_the_seed_of_its_training(tmp_path: Path) -> None:
    """Whatever SEED is where RESUME_FROM goes on with it; `result` checks the file's name."""
    report, _ = merge(tmp_path, result(3, 2.0, settings={"seed": 9, "resume_from": "a.pt"}))
    assert report["seeds"] == [3]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"time": 1}', '{"recipe": {}}', '{"recipe": 1, "time": 1}']
)
def test_a_damaged_result_is_left_out_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "result_seed9.json").write_text(text)
    report, lines = merge(tmp_path, result(1, 2.0))
    assert report["seeds"] == [1]
    assert "result_seed9.json" in lines[0]


# Statistics


@pytest.mark.parametrize(  # one-sided critical values from a printed table of Student's t
    ("t", "df", "p"),
    [
        (0.0, 3, 0.5), (6.314, 1, 0.05), (63.657, 1, 0.005), (2.920, 2, 0.05), (6.965, 2, 0.01),
        (2.776, 4, 0.025), (3.747, 4, 0.01), (7.173, 4, 0.001), (1.812, 10, 0.05),
        (2.764, 10, 0.01), (4.144, 10, 0.001), (1.697, 30, 0.05), (-1.812, 10, 0.95),
    ],
)  # fmt: skip
def test_the_tail_of_students_t_is_that_of_the_table(t: float, df: int, p: float) -> None:
    assert record.student_tail(t, df) == pytest.approx(p, rel=2e-3)


def test_the_tail_between_whole_degrees_of_freedom_lies_between() -> None:
    low, middle, high = (record.student_tail(2.0, df) for df in (4, 3.5, 3))
    assert low < middle < high


def test_welch_of_two_equal_spreads_is_students_test() -> None:
    row = record.welch([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert row["gain_nats"] == 3.0
    assert row["t_statistic"] == pytest.approx((3 - 0.005) / math.sqrt(2 / 3))
    assert row["welch_df"] == pytest.approx(4)
    assert 0.01 < row["p_value"] < 0.025 and row["record"] is False


def test_a_record_needs_the_margin_and_the_significance() -> None:
    theirs = [1.1150, 1.1160, 1.1155]
    gains = [0.004, 0.0055, 0.006, 0.01]
    rows = [record.welch([loss - gain for loss in theirs], theirs) for gain in gains]
    assert [row["record"] for row in rows] == [False, False, False, True]
    ps = [row["p_value"] for row in rows]
    assert ps == sorted(ps, reverse=True) and ps[0] > 0.5


def test_p_is_the_share_of_false_alarms_at_the_margin() -> None:
    """Where the true gain is exactly 0.005 nats, p below 0.1 comes in a tenth of the cases."""
    generator = np.random.default_rng(0)
    alarms = [
        record.welch((2 - 0.005 + generator.normal(0, 0.002, 3)).tolist(),
                     (2 + generator.normal(0, 0.002, 3)).tolist())["p_value"] < 0.1
        for _ in range(400)
    ]  # fmt: skip
    assert 0.06 < np.mean(alarms) < 0.14


def test_a_single_baseline_is_exact() -> None:
    ours = [1.99, 2.0, 2.01]
    row = record.welch(ours, [2.05])
    assert row["welch_df"] == pytest.approx(2)
    assert row["t_statistic"] == pytest.approx((0.05 - 0.005) / (0.01 / math.sqrt(3)))


def test_seeds_without_any_spread_are_not_tested() -> None:
    assert "p_value" not in record.welch([2.0, 2.0], [2.1])


def test_a_baseline_in_bits_is_one_in_nats(tmp_path: Path) -> None:
    seeds = [result(seed, loss) for seed, loss in enumerate([1.99, 2.0, 2.01])]
    nats, _ = merge(tmp_path, *seeds, BASELINE_LOSS="2.05,2.06")
    bits, _ = merge(tmp_path, *seeds, BASELINE_BPB="0.82,0.824")
    for key in ("gain_nats", "t_statistic", "welch_df", "p_value"):
        assert nats[key] == pytest.approx(bits[key], rel=1e-6), key
    assert nats["gain_nats"] == pytest.approx(0.055)


def test_a_baseline_that_is_no_number_costs_the_test_alone(tmp_path: Path) -> None:
    report, lines = merge(tmp_path, result(1, 2.0), result(2, 2.1), BASELINE_LOSS="2,0x")
    assert "BASELINE_LOSS='2,0x'" in lines[0] and "t_statistic" not in report
    assert report["val_loss"] == pytest.approx(2.05)


# Compliance


def fits(report: dict[str, Any]) -> dict[str, bool]:
    return {name: row["fits"] for name, row in report["compliance"].items()}


def test_three_seeds_within_every_limit_comply(tmp_path: Path) -> None:
    report, lines = merge(tmp_path, *(result(seed, 2.0) for seed in (0, 1, 2)))
    rules = ["train_seconds", "eval_seconds", "artifact_bytes", "seeds", "val_tokens", "hardware"]
    assert list(fits(report)) == rules
    assert all(fits(report).values())
    assert report["compliance"]["train_seconds"]["found"] == 600.0, "the slowest seed"
    line = lines[-1]
    assert "train_seconds:600.0 (<= 600: true)" in line and "seeds:3 (>= 3: true)" in line
    assert "train_shards:80 train_tokens:10000000000" in line
    assert str(report["bytes_total"]) not in line, "the last line of a run has them"


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"facts": {"wallclock_seconds": 600.1}}, "train_seconds"),
        ({"scores": {"packed": result(2, 2.0)["scores"]["packed"] | {"seconds": 601.0}}},
         "eval_seconds"),
        ({"bytes_model": 15_910_001}, "artifact_bytes"),
    ],
)  # fmt: skip
def test_one_seed_beyond_a_limit_breaks_its_rule(
    changes: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    seeds = [result(0, 2.0), result(1, 2.0), result(2, 2.0, **changes)]
    report, lines = merge(tmp_path, *seeds)
    assert [name for name, held in fits(report).items() if not held] == [rule]
    assert rule == "artifact_bytes" or re_line(rule) in lines[-1]


def re_line(rule: str) -> str:
    return f"(<= {record.CAPS[rule]}: false)"


def test_a_proxy_run_on_one_gpu_breaks_data_and_hardware_rules(tmp_path: Path) -> None:
    proxy = result(1, 2.0, dataset="proxy", hardware="1 x NVIDIA H100 80GB HBM3")
    report, _ = merge(tmp_path, proxy)
    broken = [name for name, held in fits(report).items() if not held]
    assert broken == ["seeds", "val_tokens", "hardware"]


def test_by_hand_it_writes_the_same_file_or_says_what_is_missing(tmp_path: Path) -> None:
    nothing = completed(REPO / "record.py", tmp_path)
    assert nothing.returncode == 1 and nothing.stderr.startswith(f"error: {tmp_path}: no result_")
    expected, _ = merge(tmp_path, result(1, 2.0), result(2, 2.1))
    done = completed(REPO / "record.py", tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("submission seeds:1,2"), done.stderr
    assert json.loads((tmp_path / "submission.json").read_text()) == expected
    (tmp_path / "submission.json").unlink()
    here = completed(REPO / "record.py", cwd=tmp_path)  # without a folder it takes its own
    assert here.returncode == 0, here.stderr
    assert json.loads((tmp_path / "submission.json").read_text()) == expected
