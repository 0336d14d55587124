"""Claims about scoring: each token once, from its past only, equal to a loop over tokens."""

import dataclasses
import functools
import itertools
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import support
import torch
from support import FakeClock
from torch import Tensor

import train_gpt
from train_gpt import Evaluator, Score

T, V = 16, 64
H = support.tiny(train_seq_len=T, train_batch_tokens=8 * T, eval_stride=4, val_batch_size=3 * T)
LENGTHS = (2, 3, T, T + 1, T + 2, 2 * T, 2 * T + 1, 5 * T + 7)
STRIDES = (0, 1, 3, 4, 5, 8, 15, 16)  # dividing the window and not, one token to the whole window


@pytest.fixture(autouse=True)
def float64_throughout() -> Iterator[None]:
    with support.in_float64():
        yield


@functools.cache
def model() -> train_gpt.GPT:
    return support.tiny_model(H, torch.float64)


def random_tokens(length: int, seed: int = 0) -> np.ndarray:
    """Tokens with a document start (id 1) now and then."""
    tokens = np.random.default_rng(seed).integers(4, V, length)
    tokens[::11] = 1
    return tokens.astype(np.uint16)


TABLE = support.uneven_byte_table(200)


def evaluator(tokens: np.ndarray, h: train_gpt.Hyperparameters = H, **runtime: int) -> Evaluator:
    return Evaluator(h, support.cpu_runtime(**runtime), tokens, TABLE)


def next_token_nats(context: np.ndarray) -> Tensor:
    """-log p of every possible next token after `context`, by one call for each: (V,) float64."""
    inputs = torch.from_numpy(context.astype(np.int64)).repeat(V, 1)
    targets = torch.zeros_like(inputs)
    targets[:, -1] = torch.arange(V)
    with torch.no_grad():
        return model()(inputs, targets)[:, -1].clone()


def context_start(target: int, stride: int) -> int:
    """First token that the prediction of tokens[target] may see, by the definition in words.

    Plain: windows of T inputs that follow each other.  Sliding: windows start every `stride`
    tokens; the first scores all its T predictions, each later one the last `stride` of its own."""
    if stride in (0, T):
        return (target - 1) // T * T
    if target <= T:
        return 0
    return math.ceil((target - T) / stride) * stride


@functools.cache
def nats_by_loop(length: int, stride: int, seed: int = 0) -> tuple[float, ...]:
    """Loss of tokens 1 ... length - 1, one at a time, each from a call that sees only its past."""
    tokens, losses = random_tokens(length, seed), []
    for target in range(1, length):
        start = context_start(target, stride)
        inputs = torch.from_numpy(tokens[start:target].astype(np.int64))[None]
        targets = torch.from_numpy(tokens[start + 1 : target + 1].astype(np.int64))[None]
        with torch.no_grad():
            losses.append(float(model()(inputs, targets)[0, -1]))
    return tuple(losses)


Calls = list[tuple[Tensor, Tensor]]  # (targets, losses) of the scored places of each call


def spied_score(
    tokens: np.ndarray, stride: int, monkeypatch: pytest.MonkeyPatch, *, places: bool = False
) -> tuple[Score, Calls]:
    """The score, and what the model returned for it; `places` replaces the model by a stand-in
    for tokens 0, 1, 2 ... whose loss at a place that is no continuation of its past is NaN."""
    calls: Calls = []
    real_hidden, real_losses = train_gpt.GPT.final_hidden, train_gpt.GPT.losses

    def hidden(gpt: train_gpt.GPT, inputs: Tensor) -> Tensor:
        assert inputs.shape == (inputs.shape[0], T)
        return inputs[:, :, None] if places else real_hidden(gpt, inputs)

    def losses(gpt: train_gpt.GPT, x: Tensor, targets: Tensor) -> Tensor:
        assert x.shape[:2] == targets.shape
        nats = place_losses(x[:, :, 0], targets) if places else real_losses(gpt, x, targets)
        calls.append((targets.clone(), nats.clone()))
        return nats

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt.GPT, "final_hidden", hidden)
        patch.setattr(train_gpt.GPT, "losses", losses)
        return evaluator(tokens).score(model(), stride), calls


def place_losses(inputs: Tensor, targets: Tensor) -> Tensor:
    """At each place its number; NaN where the window runs past the end of the text."""
    return torch.where(inputs + 1 == targets, targets.double(), math.nan)


def losses_by_place(
    tokens: np.ndarray, stride: int, monkeypatch: pytest.MonkeyPatch
) -> dict[int, float]:
    """The loss that evaluation of the whole text gives each token, by the token's place."""
    _, numbers = spied_score(np.arange(len(tokens)), stride, monkeypatch, places=True)
    _, losses = spied_score(tokens, stride, monkeypatch)
    places, nats = (torch.cat([x.flatten() for _, x in c]).tolist() for c in (numbers, losses))
    pairs = zip(places, nats, strict=True)
    return {int(place): loss for place, loss in pairs if not math.isnan(place)}


# Against a loop over tokens


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_score_is_that_of_a_loop_over_tokens(length: int, stride: int) -> None:
    score = evaluator(random_tokens(length)).score(model(), stride)
    losses = nats_by_loop(length, stride)
    assert score.nats == pytest.approx(math.fsum(losses), rel=1e-9)
    assert score.tokens == len(losses) == length - 1


@pytest.mark.parametrize("stride", [0, 3, 4])
def test_each_token_has_the_loss_that_a_loop_gives_it(
    stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = 5 * T + 7
    by_place = losses_by_place(random_tokens(length), stride, monkeypatch)
    assert [by_place[place] for place in range(1, length)] == pytest.approx(
        list(nats_by_loop(length, stride)), rel=1e-9)  # fmt: skip


def test_the_loop_itself_depends_on_stride_and_text() -> None:
    length = 5 * T + 7
    sums = {math.fsum(nats_by_loop(length, stride)) for stride in (0, 1, 4)}
    assert len(sums) == 3
    assert math.fsum(nats_by_loop(length, 0, seed=1)) not in sums


def test_sliding_by_a_whole_window_is_plain_evaluation() -> None:
    tokens = random_tokens(5 * T + 7)
    plain, sliding = (evaluator(tokens).score(model(), stride) for stride in (0, T))
    assert plain.nats == sliding.nats


def test_the_loss_is_minus_the_log_of_a_probability() -> None:
    tokens = random_tokens(40)
    for context in (tokens[:1], tokens[:7], tokens[3 : 3 + T]):
        nats = next_token_nats(context)
        assert float(torch.exp(-nats).sum()) == pytest.approx(1, abs=1e-12)
        assert float(nats.min()) > 0
        assert float(nats.std()) > 0.01, "the model must prefer some tokens"


# Which windows


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("length", [*LENGTHS, 97, 128])
def test_every_token_is_scored_once_with_enough_context(
    length: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, calls = spied_score(np.arange(length), stride, monkeypatch, places=True)
    scored = []
    for _, losses in calls:
        for row in losses.tolist():
            for column, place in enumerate(row, start=T - len(row) + 1):
                if not math.isnan(place):
                    scored.append(int(place))
                    assert column >= min(place, T - stride if stride else 1), (place, column)
    assert scored == list(range(1, length)), "each once, from left to right"
    assert score.nats == sum(scored), "and what lies past the end adds nothing"


@pytest.mark.parametrize("stride", [0, 3, 4])
def test_no_score_depends_on_later_tokens(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random_tokens(5 * T + 7)
    before = losses_by_place(whole, stride, monkeypatch)
    for cut in (1, T - 1, T, T + 1, 3 * T + 5):
        changed = whole.copy()
        changed[cut + 1 :] = (changed[cut + 1 :] + 13) % V
        after = losses_by_place(changed, stride, monkeypatch)
        for place in range(1, cut + 1):
            assert after[place] == pytest.approx(before[place], rel=1e-12), place
        assert all(after[place] != before[place] for place in range(cut + 1, len(whole)))


# Batches and ranks


@pytest.mark.parametrize("stride", [0, 3, 4])
@pytest.mark.parametrize("val_batch_size", [1, T, 2 * T, 5 * T + 3, 100 * T])
def test_the_batch_size_does_not_change_the_score(val_batch_size: int, stride: int) -> None:
    h = dataclasses.replace(H, val_batch_size=val_batch_size)
    tokens = random_tokens(5 * T + 7)
    score = evaluator(tokens, h).score(model(), stride)
    assert score.nats == pytest.approx(evaluator(tokens).score(model(), stride).nats, rel=1e-12)
    reference = nats_by_loop(len(tokens), stride)
    assert score.nats == pytest.approx(math.fsum(reference), rel=1e-9)


class Gathered(Exception):
    """Ends `Evaluator.score` of a rank that has handed over its sums."""


def score_by_ranks(
    tokens: np.ndarray, stride: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> list[Score]:
    """The score that each of `world` ranks returns, their sums added by hand."""
    ranks = [evaluator(tokens, rank=rank, world_size=world) for rank in range(world)]
    parts: list[list[Tensor]] = []  # of each rank the nats of each token, and how many it scored

    def hand_over(self: train_gpt.Runtime, sums: Tensor) -> Tensor:
        parts[self.rank].append(sums.clone())
        if len(parts[self.rank]) == 2:
            raise Gathered
        return sums

    monkeypatch.setattr(train_gpt.Runtime, "sum", hand_over)
    for rank in ranks:
        parts.append([])
        with pytest.raises(Gathered):
            rank.score(model(), stride)
    totals = [torch.stack(of_all_ranks).sum(0) for of_all_ranks in zip(*parts, strict=True)]
    assert {total.dtype for total in totals} == {torch.float64}
    by_shape = {total.shape: total for total in totals}
    monkeypatch.setattr(train_gpt.Runtime, "sum", lambda self, sums: by_shape[sums.shape].clone())
    return [rank.score(model(), stride) for rank in ranks]


@pytest.mark.parametrize("stride", [0, 3, 4])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [3, 5 * T + 7])
def test_the_number_of_ranks_does_not_change_the_score(
    world: int, length: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(length)
    one = evaluator(tokens).score(model(), stride)
    for score in score_by_ranks(tokens, stride, world, monkeypatch):
        assert score.nats == pytest.approx(one.nats, rel=1e-12)
        assert (score.tokens, score.text_bytes) == (one.tokens, one.text_bytes)


def test_a_rank_without_a_window_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(3)  # one window, eight ranks
    scores = score_by_ranks(tokens, 0, 8, monkeypatch)
    assert {score.nats for score in scores} == {scores[0].nats}
    assert scores[0].nats == pytest.approx(math.fsum(nats_by_loop(3, 0)), rel=1e-9)


# Bits per byte


def test_the_denominator_is_the_bytes_of_every_scored_token() -> None:
    for length in LENGTHS:
        tokens = random_tokens(length).tolist()
        expected = 0
        for previous, target in itertools.pairwise(tokens):
            expected += int(TABLE.base[target])
            expected += bool(TABLE.leading_space[target]) and not TABLE.boundary[previous]
        scores = [evaluator(random_tokens(length)).score(model(), stride) for stride in (0, 4)]
        assert [score.text_bytes for score in scores] == [expected] * 2


@pytest.mark.parametrize(
    ("share", "name"), [(1.0, "fineweb10B_sp64"), (1.0005, "fineweb10B_sp64"), (0.95, "proxy")]
)
def test_the_published_split_is_known_by_its_bytes(share: float, name: str) -> None:
    tokens = np.full(1001, 7, np.uint16)
    table = support.byte_table(V, size=round(share * train_gpt.FINEWEB_VAL_BYTES / 1000))
    h = dataclasses.replace(H, data_path="elsewhere")
    assert Evaluator(h, support.cpu_runtime(), tokens, table).dataset == name


def test_bits_per_byte_and_loss_follow_from_the_sums() -> None:
    score = Score(nats=math.log(2) * 300, tokens=75, text_bytes=200, seconds=1.5)
    assert score.bpb == pytest.approx(1.5, rel=1e-12)
    assert score.loss == pytest.approx(4 * math.log(2), rel=1e-12)
    assert str(score).startswith("val_loss:2.77258872 val_bpb:1.50000000 ")


def test_bits_per_byte_are_loss_in_bits_times_tokens_per_byte() -> None:
    score = evaluator(random_tokens(5 * T + 7)).score(model(), 4)
    bits = math.fsum(nats_by_loop(5 * T + 7, 4)) / math.log(2)
    assert score.bpb == pytest.approx(bits / score.text_bytes, rel=1e-9)


# No side effects


def test_scoring_changes_nothing_and_leaves_no_gradient() -> None:
    gpt = support.tiny_model(H, torch.float64)
    gpt.register_buffer("canary", torch.ones(3))
    before = {name: t.clone() for name, t in gpt.state_dict().items()}
    state = torch.get_rng_state()
    for stride in (0, 4):
        evaluator(random_tokens(5 * T + 7)).score(gpt, stride)
    after = gpt.state_dict()
    assert before.keys() == after.keys()
    for name, t in before.items():
        assert torch.equal(t, after[name]), name
    for p in gpt.parameters():
        assert p.grad is None
        assert p.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_scoring_twice_gives_the_same_number() -> None:
    one = evaluator(random_tokens(5 * T + 7))
    assert one.score(model(), 4).nats == one.score(model(), 4).nats


def test_the_tokens_given_are_not_changed() -> None:
    tokens = random_tokens(5 * T + 7)
    copy = tokens.copy()
    evaluator(tokens).score(model(), 4)
    assert np.array_equal(tokens, copy)


@pytest.mark.parametrize("length", [0, 1])
def test_a_split_with_nothing_to_score_is_refused(length: int) -> None:
    assert "at least 2 tokens" in support.refusal(evaluator, random_tokens(2)[:length])


# Per-token losses


SILENT = train_gpt.RunLog(None)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_dump_holds_the_loss_of_every_token_in_order(length: int) -> None:
    one = evaluator(random_tokens(length), dataclasses.replace(H, eval_dump="losses.npz"))
    for name, stride in (("plain", 0), ("sliding", 4)):
        one.score(model(), stride, SILENT)
        assert one.dump[name].shape == (length - 1,) and one.dump[name].dtype == np.float32
        assert one.dump[name] == pytest.approx(nats_by_loop(length, stride), rel=1e-7)


def test_without_eval_dump_no_losses_are_kept() -> None:
    one = evaluator(random_tokens(3 * T))
    one.score(model(), 0, SILENT)
    assert one.dump == {}


def test_validation_during_training_keeps_no_losses() -> None:
    one = evaluator(random_tokens(3 * T), dataclasses.replace(H, eval_dump="losses.npz"))
    one.score(model(), 0)  # as training does
    assert one.dump == {}


# Out of memory


def memory_for(rows: int, monkeypatch: pytest.MonkeyPatch, after: int = 0) -> list[int]:
    """Windows of more than `rows` at once fail from the call number `after`; rows of each call."""
    real, calls = train_gpt.GPT.final_hidden, list[int]()

    def hidden(gpt: train_gpt.GPT, inputs: Tensor) -> Tensor:
        calls.append(len(inputs))
        if len(inputs) > rows and len(calls) > after:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return real(gpt, inputs)

    monkeypatch.setattr(train_gpt.GPT, "final_hidden", hidden)
    return calls


@pytest.mark.parametrize("stride", [0, 4])
@pytest.mark.parametrize(("rows", "after"), [(1, 0), (2, 0), (5, 0), (5, 2), (1, 3)])
def test_out_of_memory_makes_the_batches_smaller(
    rows: int, after: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = dataclasses.replace(H, val_batch_size=16 * T, micro_batch_tokens=16 * T)
    tokens = random_tokens(60 * T + 7)
    expected = evaluator(tokens, h).score(model(), stride)
    calls = memory_for(rows, monkeypatch, after)
    one = evaluator(tokens, h)
    score = one.score(model(), stride)
    assert score.nats == pytest.approx(expected.nats, rel=1e-12)
    assert score.tokens == expected.tokens
    failed = [n for n in calls[after:] if n > rows]
    assert calls[0] == 16 and failed == [16, 8, 4, 2][: len(failed)], "each size fails only once"
    assert one.rows == calls[-1] <= rows
    assert one.rows * 2 > rows


def test_a_window_that_does_not_fit_alone_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = memory_for(0, monkeypatch)
    message = support.refusal(evaluator(random_tokens(9 * T)).score, model())
    assert re.search(rf"TRAIN_SEQ_LEN={T}\b.*memory.*EVAL_ONLY or RESUME_FROM", message)
    assert calls == [3, 1]


# Progress


def batches_take(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """So long by the clock of the program."""
    clock = FakeClock(tick=0.0)
    monkeypatch.setattr(train_gpt, "time", clock)
    slow = clock.slow(train_gpt.GPT.final_hidden, seconds)
    monkeypatch.setattr(train_gpt.GPT, "final_hidden", slow)


def progress_lines(path: Path, batches: int, stride: int = 0) -> list[str]:
    """What an evaluation of so many batches of one window writes to the log at `path`."""
    h = dataclasses.replace(H, val_batch_size=T)
    length = 1 + batches * T if stride == 0 else 1 + T + (batches - 1) * stride
    evaluator(random_tokens(length), h).score(model(), stride, train_gpt.RunLog(path))
    return path.read_text().splitlines()


@pytest.mark.parametrize("stride", [0, 4])
def test_a_long_evaluation_tells_its_time_and_each_tenth(
    stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches_take(1.0, monkeypatch)
    lines = progress_lines(tmp_path / "log", 200, stride)
    matches = [re.fullmatch(r"eval:(\d+)% seconds:(\d+) left:(\d+)", line) for line in lines]
    share, seconds, left = zip(*[[int(x) for x in m.groups()] for m in matches if m], strict=True)
    assert len(share) == len(lines) and 10 <= len(lines) <= 11
    assert share[0] <= 2 and seconds[0] <= 4, "the estimate comes first"
    assert all(8 <= b - a <= 11 for a, b in itertools.pairwise(share)), "8 after the estimate"
    totals = [spent + rest for spent, rest in zip(seconds, left, strict=True)]
    assert totals[0] == pytest.approx(200, rel=0.5), "the first sliding window counts as time only"
    assert totals[1:] == pytest.approx([200] * (len(totals) - 1), rel=0.05)


def test_few_batches_are_told_of_at_most_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches_take(7.0, monkeypatch)
    assert [line.split()[0] for line in progress_lines(tmp_path / "log", 4)] == [
        "eval:25%", "eval:50%", "eval:75%", "eval:100%"]  # fmt: skip


def test_a_short_evaluation_and_those_of_training_are_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches_take(0.04, monkeypatch)
    assert progress_lines(tmp_path / "log", 200) == []
    batches_take(1.0, monkeypatch)
    evaluator(random_tokens(200 * T)).score(model())
    evaluator(random_tokens(200 * T)).score(model(), 0, SILENT)  # another rank than 0
    assert capsys.readouterr().out == ""


def test_on_a_terminal_one_line_is_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches_take(1.0, monkeypatch)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert progress_lines(tmp_path / "log", 200) == [], "the log is no terminal"
    shown = capsys.readouterr().out.split("\r")
    assert len(shown) > 190 and shown.pop() == "" and not any("\n" in line for line in shown)
    assert all(line.startswith("\033[K") for line in shown), "each clears what it overwrites"
    assert shown[-1] == "\033[Keval:100% seconds:200 left:0"


KERNELS = train_gpt.Kernels(support.plain_attention)


def test_an_artifact_scores_as_the_weights_it_holds() -> None:
    weights = {n: p.detach().to(torch.float32) for n, p in model().named_parameters()}
    _, read = train_gpt.unpack(train_gpt.pack(weights, H, 0.01))
    loaded = train_gpt.load_model(H, support.cpu_runtime(), read, KERNELS)
    by_hand = train_gpt.GPT(H, {n: w.to(torch.float32) for n, w in read.items()}, loaded.kernels)
    tokens = random_tokens(5 * T + 7)
    scores = [evaluator(tokens).score(m, 4).nats for m in (loaded, by_hand, model())]
    assert scores[0] == scores[1]
    assert scores[0] != scores[2]
    assert scores[0] == pytest.approx(scores[2], rel=0.05)
