"""bench/ladder.py: rows run once within the time, and a fit finds what was planted, or says no."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import REPO, train_gpt

sys.path.insert(0, str(REPO / "bench"))
import ladder

import ablate
import candidates

NOISE = 0.0004
FACTS = {"corpus": "larger 254.5M+3.1M", "code": "0123", "hardware": "H100", "sharing": 1}
FACTS |= {"wall": 100.0, "date": "2026-01-01"}


def record(row: ladder.Row, averaged: float = 1.2, **facts: Any) -> ladder.Record:
    scores = {"trained": averaged + 0.001, "averaged": averaged, "packed": averaged + 0.004}
    result = ablate.Result(scores, 72.0, row.size.steps, 15_900_000, 1337)
    return ladder.record_of(row, result, {**FACTS, **facts})


def row_of(name: str) -> ladder.Row:
    return next(row for row in ladder.DESIGN if row.id == name)


def failure(row: ladder.Row, message: str = "out of memory") -> ladder.Record:
    return ladder.record_of(row, message, dict(FACTS))


# ---- Design --------------------------------------------------------------------------------------


def test_the_design_has_45_rows_of_different_ids() -> None:
    ids = {row.id for row in ladder.DESIGN}
    assert len(ids) == len(ladder.DESIGN) >= 45


def test_every_row_has_a_base_that_stands_before_it() -> None:
    seen = set()
    for row in ladder.DESIGN:
        if row.changes:
            assert row.rung in seen, row.id
        seen.add(row.rung)


def test_the_first_19_rows_take_31_200_steps_of_one_rank() -> None:
    """Three batches and two lengths, at the price of six long rows."""
    first = ladder.DESIGN[:19]
    assert sum(row.size.tokens for row in first) == 31_200 * 98_304
    assert {row.rung for row in first} == set("ACDE")


@pytest.mark.parametrize("row", ladder.DESIGN, ids=lambda row: row.id)
def test_every_row_is_one_that_the_program_takes(row: ladder.Row) -> None:
    ablate.check(row.variant)
    h = train_gpt.Hyperparameters.from_env(row.variant.overrides)
    assert (h.train_batch_tokens, h.iterations) == row.size
    assert h.max_wallclock_seconds == h.eval_stride == h.val_loss_every == 0
    for key, value in row.overrides.items():
        assert ladder.BASE.get(key) != value, f"{key} changes nothing"
        assert key in {"OFF", "ON", *candidates.OPTIONS, *ladder.BASE}, f"{key} is not pinned"


@pytest.mark.parametrize("name", ladder.SCALES)
def test_each_number_has_three_values_at_three_sizes(name: str) -> None:
    fitted = []
    for rung in ladder.RUNGS:
        rows = [row for row in ladder.DESIGN if row.rung == rung]
        if sum(row.overrides.keys() == {name} for row in rows) >= 2:
            fitted.append(ladder.RUNGS[rung])
    assert len({size.batch for size in fitted}) >= 3
    assert len({size.steps for size in fitted}) >= 3


# ---- The rows file -------------------------------------------------------------------------------


def test_a_row_with_a_result_is_not_run_again() -> None:
    first, second, *_ = ladder.DESIGN
    known = ladder.newest([record(first)], "larger")
    assert ladder.open_rows(known, "", again=False) == ladder.DESIGN[1:]
    assert ladder.open_rows(known, "^A MUON", again=False)[0] == second


def test_a_result_of_another_corpus_does_not_count() -> None:
    known = ladder.newest([record(ladder.DESIGN[0], corpus="older 72.6M+3.1M")], "larger")
    assert ladder.open_rows(known, "", again=False) == ladder.DESIGN


def test_a_failed_row_is_kept_and_run_again_only_if_asked(tmp_path: Path) -> None:
    row = ladder.DESIGN[2]
    file = tmp_path / "rows.jsonl"
    ladder.append_record(file, failure(row))
    known = ladder.newest(ladder.read_records(file), "larger")
    assert known[row.id]["failed"] == "out of memory"
    assert row not in ladder.open_rows(known, "", again=False)
    assert row in ladder.open_rows(known, "", again=True)
    assert ladder.results(known.values(), "larger") == {}


def test_a_failure_does_not_hide_a_result() -> None:
    row = ladder.DESIGN[0]
    for order in ([record(row), failure(row)], [failure(row), record(row)]):
        assert ladder.results(order, "larger")[row.id]["averaged"] == 1.2


def test_a_run_that_ended_early_is_a_failure() -> None:
    row = ladder.DESIGN[0]
    short = ablate.Result({"trained": 1.3, "averaged": 1.3, "packed": 1.3}, 72.0, 12, 1, 1337)
    assert ladder.record_of(row, short, dict(FACTS))["failed"] == "ended at step 12 of 800"


def test_a_pattern_that_meets_no_row_is_refused() -> None:
    with pytest.raises(ablate.Mistake, match="--only Z: no row"):
        ladder.open_rows({}, "Z", again=False)


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_line_cut_off_at_the_end_costs_only_itself(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "rows.jsonl"
    for row in ladder.DESIGN[:2]:
        ladder.append_record(file, record(row))
    file.write_text(file.read_text()[:-cut])
    kept = ladder.DESIGN[: 2 if cut == 1 else 1]  # all but the line's end is a whole record
    assert [old["id"] for old in ladder.read_records(file)] == [row.id for row in kept]

    ladder.append_record(file, record(ladder.DESIGN[2]))
    lines = file.read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [r.id for r in (*kept, ladder.DESIGN[2])]


def test_a_broken_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"id": \n{json.dumps(record(ladder.DESIGN[0]))}\n')
    with pytest.raises(ablate.Mistake, match="line 1 is not JSON"):
        ladder.read_records(file)


# ---- Runs ----------------------------------------------------------------------------------------


class FakeMachine:
    """Runs rows in no time: a clock that each row moves by what it takes."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale  # of a row's time to its estimate
        self.now = 0.0
        self.started: list[str] = []
        self.kept: list[ladder.Record] = []

    def estimate(self, row: ladder.Row) -> float:
        return ladder.FIRST_PACE.seconds(row, 1)

    def measure(self, row: ladder.Row, slot: str) -> ladder.Record:
        self.started.append(row.id)
        self.now += self.scale * self.estimate(row)
        return record(row, gpu=slot)

    def run(self, rows: list[ladder.Row], seconds: float, **options: Any) -> list[ladder.Row]:
        slots = options.pop("slots", ["0"])
        keep = self.kept.append
        return ladder.run_rows(
            rows, seconds, slots, self.measure, keep, self.estimate, clock=self.clock, **options
        )

    def clock(self) -> float:
        return self.now


def test_no_row_starts_that_would_end_after_the_time() -> None:
    machine = FakeMachine()
    left = machine.run(ladder.DESIGN, 500.0)
    assert machine.now <= 500
    assert machine.started == [row.id for row in ladder.DESIGN[:4]]
    assert min(map(machine.estimate, left)) > 500 - machine.now
    assert [old["id"] for old in machine.kept] == machine.started


def test_rows_that_take_longer_than_thought_stop_the_rest() -> None:
    machine = FakeMachine(scale=3.0)
    machine.run(ladder.DESIGN, 500.0)
    assert len(machine.started) == 2


def test_a_shorter_row_takes_the_place_of_one_that_does_not_fit() -> None:
    long, short = row_of("B base"), row_of("A base")
    machine = FakeMachine()
    assert machine.run([long, short], 200.0) == [long]
    assert machine.started == [short.id]


def test_without_time_nothing_starts() -> None:
    machine = FakeMachine()
    assert machine.run(ladder.DESIGN, 0.0) == ladder.DESIGN
    assert machine.started == []


def test_every_gpu_gets_rows() -> None:
    machine = FakeMachine()
    assert machine.run(ladder.DESIGN[:6], 1e6, slots=["0", "1"]) == []
    assert {old["gpu"] for old in machine.kept} == {"0", "1"}
    assert sorted(machine.started) == sorted(row.id for row in ladder.DESIGN[:6])


def test_a_stopped_call_keeps_no_row_under_way() -> None:
    machine = FakeMachine()
    left = machine.run(ladder.DESIGN, 1e6, stopped=lambda: len(machine.started) == 2)
    assert [old["id"] for old in machine.kept] == [ladder.DESIGN[0].id]
    assert left == ladder.DESIGN[2:]


def test_the_pace_follows_the_rows_of_the_same_hardware() -> None:
    row = ladder.DESIGN[0]
    here = record(row, sharing=2, wall=100.0)
    elsewhere = record(row, hardware="CPU", wall=1e6)
    pace = ladder.pace_of([here, elsewhere, failure(row)], "H100")
    assert pace.tokens_per_second == pytest.approx(2 * 98_304 / 0.072)
    assert pace.overhead == pytest.approx(100 - 0.072 * 800)
    assert pace.seconds(row, 2) == pytest.approx(100)
    assert ladder.pace_of([elsewhere], "H100") == ladder.FIRST_PACE


def test_a_run_that_fails_says_why() -> None:
    variant = ablate.Variant("wrong", "", {"PRESET": "smoke", "MLP_HIDDEN": "wide"})
    said = ablate.in_a_process(variant, [])
    assert isinstance(said, str) and said.startswith("MLP_HIDDEN='wide': expected a finite int")


def test_a_call_writes_rows_to_both_files_and_then_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fake(variant: ablate.Variant, running: object, gpu: str) -> ablate.Result | str:
        asked.append(variant.name)
        if "0.985" in variant.name:
            return "out of memory"
        return ablate.Result({"trained": 1.2, "averaged": 1.1, "packed": 1.3}, 72.0, 800, 5, 1337)

    for split in ("train", "val"):
        (tmp_path / f"fineweb_{split}_000000.bin").write_bytes(bytes(1024 + 2_000_000))
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    monkeypatch.setattr(ablate, "in_a_process", fake)
    monkeypatch.setattr(ladder.signal, "signal", lambda *_: None)
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    files = ["--rows", str(rows), "--out", str(out)]
    call = ["run", "--seconds", "1000", "--only", "^A (base|MUON_MOMENTUM=[^ ]*$)", *files]
    ladder.main(call)
    records = ladder.read_records(rows)
    names = ["A base", "A MUON_MOMENTUM=0.97", "A MUON_MOMENTUM=0.985", "A MUON_MOMENTUM=0.92"]
    assert [old["id"] for old in records] == asked == names
    assert records == ladder.read_records(out)
    assert records[2]["failed"] == "out of memory"
    wanted = {"averaged": 1.1, "corpus": "larger 1.0M+1.0M", "batch": 98_304, "seed": 1337}
    assert wanted.items() <= records[1].items()
    assert records[1]["overrides"] == {"MUON_MOMENTUM": "0.97"}

    ladder.main(call)
    assert len(asked) == 4
    monkeypatch.setenv("IN_TURN", "1")
    ladder.main([*call, "--again", "--workers", "3"])
    assert asked[4:] == ["A MUON_MOMENTUM=0.985"]
    assert ladder.read_records(rows)[-1]["sharing"] == 1, "no two train at once"


def test_a_setting_in_the_environment_is_refused() -> None:
    rows = ladder.DESIGN[:1]
    ladder.check_rows(rows, train_gpt, {"DATA_PATH": "x", "MICRO_BATCH_TOKENS": "98304"})
    with pytest.raises(ablate.Mistake, match="MATRIX_LR would change rows unseen"):
        ladder.check_rows(rows, train_gpt, {"MATRIX_LR": "0.1"})


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ablate.Mistake, match="found no fineweb_train"):
        ladder.corpus_label("larger", str(tmp_path))


def test_rows_of_other_text_under_the_same_name_are_refused() -> None:
    """The default name and another DATA_PATH: a fit would mix both."""
    done = [record(ladder.DESIGN[0]), record(ladder.DESIGN[1], corpus="older 72.6M+3.1M")]
    ladder.check_corpus("larger 254.5M+3.1M", done)
    ladder.check_corpus("other 1.0M+1.0M", done)
    with pytest.raises(ablate.Mistake, match=r"of larger 254.5M\+3.1M, DATA_PATH holds larger 8"):
        ladder.check_corpus("larger 8000.0M+62.0M", done)


@pytest.mark.parametrize("line", ["7", "null", "[]", '{"id": "A base"}'])
def test_a_line_that_is_no_row_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ablate.Mistake, match="line 1 is no row"):
        ladder.read_records(path)


# ---- Fit -----------------------------------------------------------------------------------------


def bowl(best: float, curvature: float, seed: int, places: int = 3) -> list[list[float]]:
    """Points of a noisy parabola around log 0.03."""
    noise = NOISE * np.random.default_rng(seed).standard_normal(places)
    x = np.log(0.03) + np.linspace(-0.35, 0.35, places)
    return [[a, 1.2 + curvature * (a - best) ** 2 + e] for a, e in zip(x, noise, strict=True)]


def test_a_planted_optimum_lies_within_its_uncertainty() -> None:
    misses = []
    for seed in range(100):
        best = math.log(0.03) + 0.2 * math.sin(seed)
        found = ladder.fit_optimum(bowl(best, 0.03, seed), NOISE)
        assert not found.doubt
        misses.append(abs(found.log - best) / found.sd)
    within = sum(miss < 1 for miss in misses)
    assert 55 <= within <= 80  # 68 expected
    assert sum(miss < 2 for miss in misses) >= 90


def test_half_the_noise_halves_the_uncertainty() -> None:
    rows = bowl(math.log(0.03), 0.05, 0)
    sds = [ladder.fit_optimum(rows, noise).sd for noise in (NOISE, NOISE / 2)]
    assert sds[1] == pytest.approx(sds[0] / 2, rel=0.05)


def test_the_curve_of_a_fit_goes_through_three_points() -> None:
    rows = bowl(math.log(0.03), 0.05, 0)
    found = ladder.fit_optimum(rows, NOISE)
    assert np.polyval(found.curve, [x for x, _ in rows]) == pytest.approx([y for _, y in rows])


@pytest.mark.parametrize(
    "values, doubt",
    [
        ([1.20, 1.21, 1.22], "curvature within the noise|curvature not positive"),
        ([1.20, 1.22, 1.25], "outside the rows"),
        ([1.25, 1.22, 1.20], "outside the rows"),
        ([1.20, 1.22, 1.20], "curvature not positive"),
        ([1.2001, 1.2, 1.2001], "curvature within the noise"),
        ([1.21, 1.2], "2 of 3 rows"),
    ],
)
def test_what_the_rows_do_not_determine_is_said(values: list[float], doubt: str) -> None:
    rows = [[math.log(0.02 * 1.4**i), value] for i, value in enumerate(values)]
    found = ladder.fit_optimum(rows, NOISE)
    told = found.told(ladder.SCALES["MATRIX_LR"])
    assert told.startswith("not determined: ")
    assert any(part in found.doubt for part in doubt.split("|"))
    best = 0.02 * 1.4 ** int(np.argmin(values))
    assert f"{best:.4g} is the best" in told


def planted_samples(
    law: tuple[float, float, float], rungs: str, sd: float, places: int = 3
) -> ladder.Samples:
    """Rows on rungs whose optima follow a law, of curvature 0.05, with noise of that size."""
    generator = np.random.default_rng(1)
    place = np.linspace(-0.35, 0.35, places)
    names: list[str] = []
    bpb = []
    for rung in rungs:
        best = ladder.Law(law, (0.0, 0.0, 0.0)).at(ladder.RUNGS[rung]) - math.log(0.03)
        names += [rung] * places
        bpb += list(1.2 + 0.05 * (place - best) ** 2 + sd * generator.standard_normal(places))
    return ladder.Samples(names, np.tile(place, len(rungs)), np.array(bpb))


TRUTH = (math.log(0.02), 0.3, -0.4)


@pytest.mark.parametrize("places", [2, 3])
def test_a_planted_law_is_found_within_its_uncertainty(places: int) -> None:
    samples = planted_samples(TRUTH, "ABCDEFG", NOISE, places)
    if places == 2:  # one rung has the three rows that determine the curvature
        whole = planted_samples(TRUTH, "A", NOISE)
        joined = (np.append(old, new) for old, new in zip(samples[1:], whole[1:], strict=True))
        samples = ladder.Samples(samples.rungs + whole.rungs, *joined)
    law = ladder.fit_law(samples, "MATRIX_LR", NOISE)
    assert isinstance(law, ladder.Law)
    for found, sd, planted in zip(law.coefficients, law.sds, TRUTH, strict=True):
        assert abs(found - planted) < 2 * sd
        assert 0 < sd < 0.1
    assert law.at(ladder.OFFICIAL) == law.coefficients[0]


def test_scatter_beyond_the_noise_widens_the_law() -> None:
    samples = planted_samples(TRUTH, "ABCDEFG", 10 * NOISE)
    honest = ladder.fit_law(samples, "MATRIX_LR", 10 * NOISE)
    proud = ladder.fit_law(samples, "MATRIX_LR", NOISE)
    assert isinstance(honest, ladder.Law) and isinstance(proud, ladder.Law)
    assert proud.sds[0] > 0.3 * honest.sds[0]


@pytest.mark.parametrize("rungs", ["", "AB", "ABD"])
def test_too_few_sizes_give_no_law(rungs: str) -> None:
    law = ladder.fit_law(planted_samples(TRUTH, rungs, NOISE), "MATRIX_LR", NOISE)
    assert isinstance(law, str) and "too few rungs" in law
    assert "not determined: too few rungs" in ladder.official_line("MATRIX_LR", law)


def test_two_rows_a_rung_alone_determine_no_curvature() -> None:
    samples = planted_samples(TRUTH, "ABC", NOISE, places=2)
    assert ladder.fit_law(samples, "MATRIX_LR", NOISE) == "too few rows"
    assert ladder.fit_common(samples, NOISE) == "too few rows"


def test_a_ridge_in_place_of_a_bowl_gives_no_law() -> None:
    samples = planted_samples(TRUTH, "ABCD", NOISE)
    ridge = samples._replace(y=2.4 - samples.y)
    assert "curvature" in str(ladder.fit_law(ridge, "MATRIX_LR", NOISE))


def test_a_rung_of_two_rows_takes_the_common_curvature() -> None:
    law = (math.log(0.03), 0.05, -0.05)
    found = ladder.fit_common(planted_samples(law, "ABC", NOISE), NOISE)
    assert isinstance(found, dict)
    for rung, (log, sd) in found.items():
        planted = ladder.Law(law, (0.0, 0.0, 0.0)).at(ladder.RUNGS[rung]) - math.log(0.03)
        assert abs(log - planted) < 3 * sd
    rows = {row.id: record(row) for row in ladder.DESIGN}
    change = {"MATRIX_LR=0.021": 1.203, "MATRIX_LR=0.042": 1.202}
    ids = ["A base", "D base", *(f"A {key}" for key in change), "D MATRIX_LR=0.021"]
    done = {key: rows[key] | {"averaged": change.get(key[2:], 1.2)} for key in ids}
    optima, _ = ladder.fit_setting(done, "MATRIX_LR", "averaged", NOISE)
    assert optima["A"].common is None and not optima["A"].doubt
    assert optima["D"].doubt == "2 of 3 rows"
    assert optima["D"].known is not None
    assert optima["D"].known[0] == pytest.approx(optima["A"].log, abs=0.01)
    assert optima["A"].sd < optima["D"].known[1] < 0.1
    assert optima["D"].told(ladder.SCALES["MATRIX_LR"]).endswith("*")


# The planted optimum of each setting at the official size, its slopes in batch and steps, curvature
PLANTED = {
    "MUON_MOMENTUM": (math.log(0.035), 0.0, 0.05, 0.02),
    "MATRIX_LR": (math.log(0.029), 0.1, -0.1, 0.05),
    "DECAY_PER_RUN": (math.log(170), 0.0, 0.03, 0.02),
}


def planted_records(
    planted: Mapping[str, tuple[float, ...]] = PLANTED, seed: int = 2
) -> list[ladder.Record]:
    """The whole design, measured in a world of planted optima, where nothing else matters."""
    generator = np.random.default_rng(seed)
    records = []
    for row in ladder.DESIGN:
        settings = ladder.BASE | row.overrides
        bpb = 1.2 + NOISE * generator.normal()
        for name, (*law, curvature) in planted.items():
            best = ladder.Law((law[0], law[1], law[2]), (0.0, 0.0, 0.0)).at(row.size)
            bpb += curvature * (ladder.SCALES[name].to_log(float(settings[name])) - best) ** 2
        records.append(record(row, float(bpb)))
    return records


@pytest.mark.parametrize("name", PLANTED)
def test_the_design_finds_planted_optima_at_the_official_size(name: str) -> None:
    """Within the interval of 95 % in at least 17 of 20 worlds, which differ in their noise."""
    scale = ladder.SCALES[name]
    within = 0
    for seed in range(20):
        done = ladder.results(planted_records(seed=seed), "larger")
        _, law = ladder.fit_setting(done, name, "averaged", NOISE)
        assert isinstance(law, ladder.Law) and law.sds[0] < 0.5
        low, high = ladder.interval(law.coefficients[0], law.sds[0], scale)
        within += low < scale.from_log(PLANTED[name][0]) < high
    assert within >= 17


def planted_change(name: str, value: float, size: ladder.Rung) -> float:
    """bpb against the base, without noise."""
    *law, curvature = PLANTED[name]
    best = ladder.Law((law[0], law[1], law[2]), (0.0, 0.0, 0.0)).at(size)
    log = ladder.SCALES[name].to_log(value)
    return curvature * ((log - best) ** 2 - (ladder.base_log(name) - best) ** 2)


@pytest.mark.parametrize(
    ("name", "value"), [("MUON_MOMENTUM", 0.97), ("MATRIX_LR", 0.042), ("DECAY_PER_RUN", 80.0)]
)
def test_a_planted_change_lies_in_its_interval(name: str, value: float) -> None:
    """Within that of 95 % in at least 17 of 20 worlds, at a measured size and at the official."""
    sizes = (ladder.RUNGS["B"], ladder.OFFICIAL)
    within = dict.fromkeys(sizes, 0)
    x = ladder.SCALES[name].to_log(value) - ladder.base_log(name)
    for seed in range(20):
        done = ladder.results(planted_records(seed=seed), "larger")
        fit = ladder.law_fit(ladder.Samples.of(done, name, "averaged"), NOISE)
        assert isinstance(fit, ladder.Resampled)
        for size in sizes:
            change = ladder.change_by_law(fit, x, size)
            assert change.low < change.best < change.high < change.low + 0.02
            within[size] += change.low < planted_change(name, value, size) < change.high
    assert min(within.values()) >= 17


def table_cells(report: str) -> dict[str, list[str]]:
    """By the first cell of a line; the head is the first."""
    lines = [line.strip("| ").split(" | ") for line in report.splitlines() if "---" not in line]
    return {first: [cell.strip(" |") for cell in rest] for first, *rest in lines}


def test_the_law_of_one_value_is_told_for_every_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = planted_records()
    (row,) = (row for row in rows if row["id"] == "G MUON_MOMENTUM=0.97")
    row["averaged"] += 0.001  # beyond its noise, so that the law without G is another one
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(old) + "\n" for old in rows))
    ladder.main(["fit", "--rows", str(file), "--change", "MUON_MOMENTUM=0.97"])
    cells = table_cells(capsys.readouterr().out)
    assert next(iter(cells)) == "MUON_MOMENTUM=0.97 against 0.95"
    done = ladder.results(rows, "larger")
    for rung, size in ladder.RUNGS.items():
        effect = done[f"{rung} MUON_MOMENTUM=0.97"]["averaged"] - done[f"{rung} base"]["averaged"]
        law, measured = cells[f"{rung}: {size}"]
        assert measured == f"{effect:+.4f}"
        assert abs(float(law.split()[0]) - effect) < 5 * NOISE
        assert f"official, without {rung}" in cells
    others = {key: row for key, row in done.items() if row["rung"] != "G"}
    fit = ladder.law_fit(ladder.Samples.of(others, "MUON_MOMENTUM", "averaged"), NOISE)
    assert isinstance(fit, ladder.Resampled)
    without = ladder.change_by_law(fit, math.log(0.03 / 0.05), ladder.OFFICIAL)
    assert cells["official, without G"][0] == str(without)
    assert cells["official, 786,432 x 8,300"][0] != str(without)
    assert {"P-time, 98,304 x 2,600", "verification, 393,216 x 3,200"} <= cells.keys()


def test_a_law_that_hangs_on_one_rung_says_so() -> None:
    rows = [row for row in planted_records() if row["rung"] in "ABC"]
    report = ladder.change_report(
        ladder.results(rows, "larger"), "MATRIX_LR", 0.042, "averaged", NOISE
    )
    assert report.count("too few rungs: 2") == 3
    two = ladder.results([row for row in rows if row["rung"] != "A"], "larger")
    report = ladder.change_report(two, "MATRIX_LR", 0.042, "averaged", NOISE)
    assert report.startswith("MATRIX_LR: too few rungs: 2")


@pytest.mark.parametrize(
    "text", ["LR=1", "MATRIX_LR", "MATRIX_LR=0", "MUON_MOMENTUM=1", "MATRIX_LR=inf"]
)
def test_a_value_that_no_law_covers_is_refused(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        ladder.parse_options(["fit", "--change", text])
    assert text in capsys.readouterr().err


def test_the_report_says_what_is_determined_and_what_is_not() -> None:
    flat = {**PLANTED, "DECAY_PER_RUN": (math.log(160), 0.0, 0.0, -0.01)}
    report = ladder.fit_report(ladder.results(planted_records(flat), "larger"), "averaged", NOISE)
    assert "**DECAY_PER_RUN at 786,432 x 8,300: not determined: common curvature" in report
    assert "curvature not positive over the rows, of which 320 is the best" in report
    assert "**MATRIX_LR at 786,432 x 8,300: 0.0" in report
    assert "| OFF=normuon |" in report
    assert f"{len(ladder.DESIGN) - 7} effects" in report


def test_an_effect_is_against_the_base_of_its_own_rung() -> None:
    short, long, change = map(row_of, ("A base", "B base", "B MATRIX_LR=0.042"))
    records = [record(short, 1.3), record(long, 1.2), record(change, 1.2063)]
    table = ladder.effects_table(ladder.results(records, "larger"), "averaged", NOISE)
    assert table[-1] == "| MATRIX_LR=0.042 |  | +0.0063 (+0.0030) |"
    noisy = [record(short, 1.3), record(long, 1.2), record(change, 1.2003)]
    table = ladder.effects_table(ladder.results(noisy, "larger"), "averaged", NOISE)
    assert table[-1] == "| MATRIX_LR=0.042 |  | +0.0003 ~ (+0.0030) |"


def test_a_row_that_left_the_design_keeps_its_effect() -> None:
    gone = record(row_of("B base")._replace(changes="ON=gone", prediction=-0.001), 1.198)
    done = ladder.results([record(row_of("B base"), 1.2), gone], "larger")
    table = ladder.effects_table(done, "averaged", NOISE)
    assert table[2:] == ["| ON=gone | -0.0020 (-0.0010) |"]


def test_two_changes_in_one_row_are_no_point_of_a_curve() -> None:
    done = ladder.results(planted_records(), "larger")
    alone = [
        row for row in ladder.DESIGN if row.rung == "C" and row.overrides.keys() <= {"MATRIX_LR"}
    ]
    assert len(ladder.points(done, "C", "MATRIX_LR", "averaged")) == len(alone) == 3


def test_a_fit_of_no_rows_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = ["--rows", str(tmp_path / "none.jsonl")]
    ladder.main(["fit", *empty])
    assert "No results yet" in capsys.readouterr().out
    with pytest.raises(ablate.Mistake, match="holds no results"):
        ladder.main(["plot", *empty])


# ---- Picture -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, len(ladder.DESIGN)])
def test_the_picture_is_drawn_from_few_rows_and_from_all(tmp_path: Path, rows: int) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(old) + "\n" for old in planted_records()[:rows]))
    picture = tmp_path / "ladder.png"
    ladder.main(["plot", "--rows", str(file), "--picture", str(picture)])
    height, width, _ = pyplot.imread(picture).shape
    assert (width, height) == (1300, 1100)
    assert len(np.unique(pyplot.imread(picture).reshape(-1, 4), axis=0)) > 20
