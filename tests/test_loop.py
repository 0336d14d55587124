"""Claims about parts of a run by themselves: clock, pending losses, signals, plan, files."""

import dataclasses
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import EARLIER, FakeClock, cpu_runtime, tiny, train_gpt
from torch import Tensor

from train_gpt import Clock, PendingLosses, RunFiles, Runtime

CUDA = Runtime(torch.device("cuda"))  # named, never used: what would be asked of it stands in


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The program's clock, which moves when it is told."""
    fake = FakeClock(tick=0.0)
    monkeypatch.setattr(train_gpt, "time", fake)
    return fake


# The clock


def test_a_clock_that_has_not_started_stands_at_zero(time: FakeClock) -> None:
    clock = Clock(cpu_runtime())
    time.now += 5
    assert clock.elapsed() == clock.total == 0.0


def test_a_clock_counts_between_start_and_stop_alone(time: FakeClock) -> None:
    clock = Clock(cpu_runtime())
    for seconds in (3.0, 4.0):
        clock.start()
        time.now += seconds
        clock.stop()
        time.now += 60
    assert clock.elapsed() == clock.total == pytest.approx(7.0)


def test_a_running_clock_tells_the_time_up_to_now(time: FakeClock) -> None:
    clock = Clock(cpu_runtime())
    clock.start()
    time.now += 3
    clock.stop()
    clock.start()
    time.now += 2
    assert clock.elapsed() == pytest.approx(5.0)
    assert clock.total == pytest.approx(3.0), "up to the latest stop"


def test_a_clock_stops_when_the_device_has_finished(
    time: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", time.slow(lambda: None, 2.5))
    clock = Clock(CUDA)
    clock.start()
    time.now += 1
    clock.stop()
    assert clock.total == pytest.approx(3.5)


# Losses of queued steps


class Event:
    """Stands in for a CUDA event: comes, and makes the loss readable, when it is waited for."""

    def __init__(self, on_arrival: Callable[[], object] = lambda: None) -> None:
        self.on_arrival, self.recorded = on_arrival, False

    def record(self) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        self.on_arrival()


class Reported:
    """Pending losses with a list of what they reported."""

    def __init__(self, runtime: Runtime) -> None:
        self.clock = Clock(runtime)
        self.steps: list[tuple[int, float, float]] = []
        self.losses = PendingLosses(self.clock, lambda *step: self.steps.append(step[:3]))
        self.clock.start()

    @property
    def numbers(self) -> list[int]:
        return [number for number, _, _ in self.steps]

    def push(self, step: int, loss: float) -> None:
        self.losses.push(step, torch.tensor(loss))


@pytest.fixture
def pending(time: FakeClock) -> Reported:
    """On a CPU, whose steps have ended when they are pushed."""
    return Reported(cpu_runtime())


@pytest.fixture
def device(time: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Reported:
    """On a stand-in for a device, whose steps end when they are waited for, 0.1 s after another."""
    empty = torch.empty

    def pageable(*shape: tuple[int, ...], pin_memory: bool = False) -> Tensor:
        assert pin_memory, "a copy to other memory would stop the host"
        return empty(*shape)

    monkeypatch.setattr(torch, "empty", pageable)
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(time.slow(lambda: None, 0.1)))
    return Reported(CUDA)


def test_on_a_cpu_every_step_is_reported_at_once(pending: Reported, time: FakeClock) -> None:
    for step in (1, 2, 3):
        time.now += 0.5
        pending.push(step, 4.0 - step)
        assert len(pending.losses.queue) == 0
    assert pending.steps == [
        (1, 3.0, pytest.approx(0.5)), (2, 2.0, pytest.approx(1.0)), (3, 1.0, pytest.approx(1.5))
    ]  # fmt: skip


def test_the_host_stays_at_most_two_steps_ahead(device: Reported) -> None:
    for step in range(1, 8):
        device.push(step, 2.0)
        assert device.numbers == list(range(1, step - 1))
    assert all(isinstance(one.done, Event) and one.done.recorded for one in device.losses.queue)


def test_landing_waits_for_as_many_steps_as_it_is_told(device: Reported) -> None:
    device.push(1, 3.0)
    device.push(2, 2.0)
    device.losses.land(in_flight=1)
    assert device.numbers == [1]
    device.losses.land()
    assert device.steps == [(1, 3.0, pytest.approx(0.1)), (2, 2.0, pytest.approx(0.2))]


def test_a_loss_is_read_only_when_its_step_has_ended(pending: Reported) -> None:
    loss = torch.tensor(math.nan)
    event = Event(lambda: loss.fill_(2.5))
    step = train_gpt.QueuedStep(1, loss, event)  # type: ignore[arg-type]
    pending.losses.queue.append(step)
    pending.losses.land()
    assert [loss for _, loss, _ in pending.steps] == [2.5] and pending.losses.fault == ""


def test_a_queued_loss_is_a_copy_of_the_steps_own(device: Reported) -> None:
    """A captured graph writes the next step's loss to the same place."""
    loss = torch.tensor(3.0)
    device.losses.push(1, loss)
    loss.fill_(9.0)
    device.losses.land()
    assert [loss for _, loss, _ in device.steps] == [3.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_fault_names_the_first_bad_step_and_losses_before_it(
    bad: float, pending: Reported
) -> None:
    for step, loss in enumerate([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, bad, 1.0, bad], start=1):
        pending.push(step, loss)
    before = "6.0000, 5.0000, 4.0000, 3.0000, 2.0000"
    assert pending.losses.fault == (
        f"step 7: the loss is {bad} (before: {before}); lower MATRIX_LR, EMBED_LR or SCALAR_LR"
    )


def test_a_loss_that_is_not_finite_is_not_reported(pending: Reported) -> None:
    for step, loss in enumerate([3.0, math.nan, math.inf], start=1):
        pending.push(step, loss)
    assert pending.numbers == [1] and list(pending.losses.latest) == [3.0]


def test_without_a_bad_loss_there_is_no_fault(pending: Reported) -> None:
    for step in range(1, 9):
        pending.push(step, 9.0 - step)
    assert pending.losses.fault == ""
    assert list(pending.losses.latest) == [5.0, 4.0, 3.0, 2.0, 1.0], "the last five"


def test_the_duration_of_a_step_is_zero_until_two_have_ended(
    pending: Reported, time: FakeClock
) -> None:
    durations = []
    for step in (1, 2):
        durations.append(pending.losses.seconds_per_step())
        time.now += 0.5
        pending.push(step, 2.0)
    assert durations == [0.0, 0.0]
    assert pending.losses.seconds_per_step() == pytest.approx(0.5)


def test_the_duration_of_a_step_is_the_mean_of_sixteen(pending: Reported, time: FakeClock) -> None:
    durations = [9.0] * 5 + [0.1, 0.3] * 8
    for step, seconds in enumerate(durations, start=1):
        time.now += seconds
        pending.push(step, 2.0)
    assert pending.losses.seconds_per_step() == pytest.approx(0.2), "the slow ones are forgotten"


def test_the_projected_end_counts_queued_and_further_steps(device: Reported) -> None:
    for step in range(1, 8):
        device.push(step, 2.0)
    assert device.clock.elapsed() == pytest.approx(0.5), "seven steps, of which two are queued"
    assert device.losses.projected_end(2) == pytest.approx(0.5 + (2 + 2) * 0.1)
    device.losses.land()
    assert device.losses.projected_end(2) == pytest.approx(0.7 + 2 * 0.1)


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_up_in_the_list_and_not_the_process(number: signal.Signals) -> None:
    with train_gpt.received_signals() as received:
        assert received == []
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
    assert received == [number, number]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_handlers_are_put_back_also_after_an_error(number: signal.Signals) -> None:
    def handler(number: int, frame: object) -> None: ...

    before = signal.signal(number, handler)
    try:
        with train_gpt.received_signals():
            assert signal.getsignal(number) is not handler
        assert signal.getsignal(number) is handler
        with pytest.raises(ZeroDivisionError), train_gpt.received_signals():
            raise ZeroDivisionError
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


# The plan of a step


def test_the_first_step_has_the_whole_lr_and_no_decay() -> None:
    for cap in (0.0, 600.0):
        h = tiny(iterations=100, max_wallclock_seconds=cap)
        assert train_gpt.plan_step(h, 0, 0.0, 0.0) == (0.0, 1.0, 0.0, 32)


def test_progress_is_that_of_steps_or_clock_whichever_is_further() -> None:
    h = tiny(iterations=100, max_wallclock_seconds=50.0)
    assert train_gpt.plan_step(h, 20, 5.0, 0.0).progress == pytest.approx(0.2)
    assert train_gpt.plan_step(h, 20, 30.0, 0.0).progress == pytest.approx(0.6)
    assert train_gpt.plan_step(h, 20, 80.0, 0.0).progress == 1.0


def test_without_a_cap_the_clock_plans_nothing() -> None:
    h = tiny(iterations=100, max_wallclock_seconds=0.0)
    assert train_gpt.plan_step(h, 20, 1e9, 0.0) == train_gpt.plan_step(h, 20, 0.0, 0.0)


@pytest.mark.parametrize(("progress", "lr"), [(0.1, 1.0), (0.5, 1.0), (0.75, 0.5), (1.0, 0.0)])
def test_the_planned_lr_falls_over_the_warm_down(progress: float, lr: float) -> None:
    h = tiny(iterations=1000, max_wallclock_seconds=0.0, warmdown_fraction=0.5, lr_warmup_steps=9)
    plan = train_gpt.plan_step(h, round(1000 * progress), 0.0, progress)
    assert plan.lr == pytest.approx(lr)


@pytest.mark.parametrize(("steps", "lr"), [(200, 1.0), (300, 1.0), (350, 0.5), (400, 0.0)])
def test_a_warm_down_in_steps_ends_with_the_clock(steps: int, lr: float) -> None:
    """At 0.25 s a step 100 s hold 400 steps, not 10,000: the last 100 of them warm down."""
    h = tiny(iterations=10_000, max_wallclock_seconds=100.0, warmdown_iters=100)
    assert train_gpt.plan_step(h, steps, 0.25 * steps, 0.0).lr == pytest.approx(lr)


def test_a_warm_down_in_steps_is_never_of_more_than_iterations() -> None:
    h = tiny(iterations=400, max_wallclock_seconds=1e6, warmdown_iters=100)
    assert train_gpt.plan_step(h, 350, 1.0, 0.0).lr == pytest.approx(0.5)


def test_a_step_decays_by_its_share_of_the_run() -> None:
    h = tiny(iterations=100, max_wallclock_seconds=0.0, decay_per_run=40.0)
    assert train_gpt.plan_step(h, 30, 0.0, 0.25).decay == pytest.approx(40 * 0.05)
    assert train_gpt.plan_step(h, 30, 0.0, 0.3).decay == pytest.approx(0.0)


def decays(h: train_gpt.Hyperparameters, times: list[float]) -> list[float]:
    """Of the steps that begin at these times."""
    progress = 0.0
    found = []
    for steps_done, elapsed in enumerate(times):
        plan = train_gpt.plan_step(h, steps_done, elapsed, progress)
        progress = plan.progress
        found.append(plan.decay)
    return found


@pytest.mark.parametrize("steps", [20, 200, 2000])
def test_a_run_by_the_clock_decays_by_all_of_its_time(steps: int) -> None:
    """Up to the start of its last step."""
    h = tiny(iterations=10_000, max_wallclock_seconds=100.0, decay_per_run=40.0)
    found = decays(h, [100.0 * step / steps for step in range(steps)])
    assert found == pytest.approx([0.0] + [40 / steps] * (steps - 1))


def test_uneven_steps_at_the_start_decay_by_all_of_their_time() -> None:
    """The host launches some at once, then waits for the GPU."""
    h = tiny(iterations=10_000, max_wallclock_seconds=100.0, decay_per_run=40.0)
    times = [0.0, 0.001, 0.002, 0.003, 0.5, 0.6, 0.7]
    assert sum(decays(h, times)) == pytest.approx(40 * 0.7 / 100)


@pytest.mark.parametrize("steps", [50, 2000])
def test_a_pause_takes_no_more_off_the_weights_than_a_long_step(steps: int) -> None:
    """A hundredth of the run's decay, or two steps' of a run of few.

    Half of the run stood still: its share of the decay would turn the matrices' sign.
    """
    h = tiny(iterations=10_000, max_wallclock_seconds=100.0, decay_per_run=40.0)
    times = [100.0 * step / steps for step in range(steps // 2)]
    pause, after = decays(h, [*times, times[-1] + 50.0, times[-1] + 50.0 + 100.0 / steps])[-2:]
    assert pause == pytest.approx(40 * max(0.01, 2 / steps))
    assert after == pytest.approx(40 / steps)


@pytest.mark.parametrize("length", [1, 8, 16])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_sequences_are_short_until_a_share_of_the_run_is_over(fraction: float, length: int) -> None:
    h = tiny(early_seq_len=length, early_fraction=fraction)
    before = math.nextafter(fraction, 0.0)
    found = [train_gpt.seq_len_at(h, progress) for progress in (0.0, before, fraction, 1.0)]
    assert found == [length, length, 32, 32]
    assert train_gpt.seq_lens(h) == [length, 32]


WHOLE: list[dict[str, float]] = [  # settings with which no sequence is cut; one has 32 tokens
    dict(early_seq_len=0), dict(early_seq_len=32), dict(early_seq_len=64),
    dict(early_seq_len=1024), dict(early_seq_len=16, early_fraction=0.0),
]  # fmt: skip


@pytest.mark.parametrize("settings", WHOLE, ids=str)
def test_all_sequences_of_such_a_run_are_whole(settings: dict[str, float]) -> None:
    h = tiny(**settings)
    assert {train_gpt.seq_len_at(h, progress) for progress in (0.0, 0.4, 0.6, 1.0)} == {32}
    assert train_gpt.seq_lens(h) == [32]


@pytest.mark.parametrize(("preset", "lengths"), [("card", [1024, 2048]), ("smoke", [128, 256])])
def test_a_preset_has_two_lengths(preset: str, lengths: list[int]) -> None:
    assert train_gpt.seq_lens(train_gpt.Hyperparameters.from_env({"PRESET": preset})) == lengths


@pytest.mark.parametrize(
    ("steps", "elapsed", "length"),
    [(0, 0.0, 16), (29, 14.9, 16), (30, 0.0, 32), (1, 15.0, 32), (100, 50.0, 32)],
)
def test_the_planned_length_is_that_of_steps_or_clock_whichever_is_further(
    steps: int, elapsed: float, length: int
) -> None:
    h = tiny(iterations=100, max_wallclock_seconds=50.0, early_seq_len=16, early_fraction=0.3)
    assert train_gpt.plan_step(h, steps, elapsed, 0.0).seq_len == length


def test_the_facts_of_a_training_are_told_without_an_empty_fault() -> None:
    facts = train_gpt.TrainingFacts(
        step_stop=12, wallclock_seconds=1.5, seed=7, qat_steps=2, step_avg_ms=125.0, swa_steps=3,
        grid_step=0.01, train_shards=1, train_tokens=1000, train_digest="7a1e", code_sha256="c0de",
        final_train_loss=2.5, interrupted=False, graphs_compiled_on_clock=0, fault="",
    )  # fmt: skip
    assert str(facts).startswith("step_stop:12 wallclock_seconds:1.5 seed:7 ")
    assert str(facts).endswith(" interrupted:False graphs_compiled_on_clock:0")
    assert str(dataclasses.replace(facts, fault="step 9")).endswith(" fault:step 9")


# The files of a run


def files_of(folder: Path, **settings: object) -> RunFiles:
    return RunFiles(tiny(output_dir=str(folder), seed=7, **settings))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


KINDS: dict[str, dict[str, object]] = {  # of runs, by the name of their log
    "train_seed7": {},
    "resume": {"resume_from": "saved.pt"},
    "eval": {"eval_only": "given.ptz"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_until_a_run_has_finished_its_files_are_partial(kind: str, tmp_path: Path) -> None:
    files = files_of(tmp_path, **KINDS[kind])
    assert files.kind == kind and files.folder == tmp_path
    assert files.log == tmp_path / f"{kind}.partial.log"
    assert files.weights == tmp_path / "final_model.partial.pt"
    if kind != "eval":
        assert files.artifact == tmp_path / "final_model.partial.ptz"


def test_a_scored_artifact_is_the_file_that_was_named(tmp_path: Path) -> None:
    assert files_of(tmp_path, eval_only="x/given.ptz").artifact == Path("x/given.ptz")


def test_a_finished_training_gives_all_its_files_their_names(tmp_path: Path) -> None:
    finals = ("train.log", "train_seed7.log", "final_model.pt", "final_model.ptz")
    for name in finals:
        (tmp_path / name).write_text(EARLIER)
    files = files_of(tmp_path)
    for path in (files.log, files.weights, files.artifact):
        path.write_text(f"new {path.suffix}")
    assert all((tmp_path / name).read_text() == EARLIER for name in finals), "not yet"
    files.finish(train_gpt.RunLog(None))
    assert names(tmp_path) == set(finals)
    for name in finals:
        assert (tmp_path / name).read_text() == f"new {Path(name).suffix}", name


def test_a_finished_resumption_leaves_weights_and_training_log(tmp_path: Path) -> None:
    """The weights that it was made from may be an interrupted run's, which are partial."""
    files = files_of(tmp_path, resume_from=str(tmp_path / "final_model.partial.pt"))
    for path in (files.weights, tmp_path / "train.log", tmp_path / "final_model.ptz"):
        path.write_text(EARLIER)
    for path in (files.log, files.artifact):
        path.write_text("new")
    files.finish(train_gpt.RunLog(None))
    expected = {"resume.log", "train.log", "final_model.partial.pt", "final_model.ptz"}
    assert names(tmp_path) == expected
    assert files.weights.read_text() == (tmp_path / "train.log").read_text() == EARLIER
    assert (tmp_path / "final_model.ptz").read_text() == "new"


def test_a_finished_scoring_renames_its_log_alone(tmp_path: Path) -> None:
    artifact = tmp_path / "final_model.partial.ptz"
    files = files_of(tmp_path, eval_only=str(artifact))
    for path in (artifact, tmp_path / "train.log"):
        path.write_text(EARLIER)
    files.log.write_text("new")
    files.finish(train_gpt.RunLog(None))
    assert names(tmp_path) == {"eval.log", "train.log", "final_model.partial.ptz"}
    assert artifact.read_text() == (tmp_path / "train.log").read_text() == EARLIER


def test_a_folder_named_partial_keeps_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "my.partial.run"
    folder.mkdir()
    files = files_of(folder, eval_only="given.ptz")
    files.log.write_text("new")
    files.finish(train_gpt.RunLog(None))
    assert names(folder) == {"eval.log"} and names(tmp_path) == {folder.name}
