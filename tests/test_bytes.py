"""Claims about the bytes of a split: the challenge's rule, and the text whatever the tokenizer."""

import functools
import hashlib
import io
import itertools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import support
from hypothesis import example, given
from hypothesis import strategies as st

import train_gpt
from prepare_data import train_tokenizer, with_sample
from train_gpt import ByteTable, Evaluator, RunError, count_text_bytes, load_byte_table, open_split

BOS, EOS = 1, 2

WORDS = ["river", "stone", "lantern", "quiet", "harbour", "violet", "engine", "winter", "theatre"]
DOCUMENTS = [
    f"The {WORDS[i % 9]} of {WORDS[i * 5 % 9]} {i}.\n\n  two  spaces\tand a tab, "
    + " ".join(WORDS[i % 5 :])
    for i in range(40)
]
STRANGE = [
    "caf\u00e9 \u6f22\u5b57 \U0001f600 and the river",  # pieces the vocabulary must spell in bytes
    "\u03b1\u03b2\u03b3  \u2028 quiet\u00a0harbour",
    "a", "\u00e9", "stone   ", "\nwinter\n",
]  # fmt: skip


@functools.cache
def trained_tokenizer() -> bytes:
    return train_tokenizer(DOCUMENTS, 320, 100_000)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.model"
    path.write_bytes(trained_tokenizer())
    return path


def encoded(path: Path, documents: list[str]) -> tuple[Any, np.ndarray]:
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = [i for text in documents for i in [BOS, *sp.encode(text)]]
    return sp, np.array(ids, dtype=np.uint16)


def bytes_by_the_rule(sp: Any, tokens: np.ndarray) -> int:
    """The challenge's rule, one token at a time."""
    total = 0
    for previous, target in itertools.pairwise(int(t) for t in tokens):
        if sp.is_control(target) or sp.is_unknown(target) or sp.is_unused(target):
            continue
        if sp.is_byte(target):
            total += 1
            continue
        piece = sp.id_to_piece(target)
        if piece.startswith("\u2581"):
            piece = piece[1:]
            boundary = sp.is_control(previous) or sp.is_unknown(previous) or sp.is_unused(previous)
            total += not boundary
        total += len(piece.encode())
    return total


def test_the_bytes_of_a_split_are_those_of_its_documents(tokenizer: Path) -> None:
    documents = DOCUMENTS + STRANGE
    sp, tokens = encoded(tokenizer, documents)
    table = load_byte_table(str(tokenizer), 320)
    expected = sum(len(text.encode()) for text in documents)
    assert table.count(tokens) == bytes_by_the_rule(sp, tokens) == expected


def test_the_bytes_follow_the_rule_for_any_sequence_of_tokens(tokenizer: Path) -> None:
    sp, _ = encoded(tokenizer, [])
    table = load_byte_table(str(tokenizer), 320)
    rng = np.random.default_rng(0)
    for size in (2, 3, 50, 3000):
        tokens = rng.integers(320, size=size).astype(np.uint16)
        assert table.count(tokens) == bytes_by_the_rule(sp, tokens)


def test_text_that_the_vocabulary_lacks_is_spelled_in_bytes(tokenizer: Path) -> None:
    sp, tokens = encoded(tokenizer, ["\U0001f600\u6f22"])
    table = load_byte_table(str(tokenizer), 320)
    fallback = [int(t) for t in tokens[1:] if sp.is_byte(int(t))]
    assert len(fallback) == 4 + 3, "the test must exercise byte fallback"
    assert all(table.base[t] == 1 and not table.leading_space[t] for t in fallback)
    assert table.count(tokens) == 7


def test_a_leading_space_counts_unless_after_a_boundary(tokenizer: Path) -> None:
    sp, _ = encoded(tokenizer, [])
    table = load_byte_table(str(tokenizer), 320)
    pieces = [sp.id_to_piece(i) for i in range(320)]
    spaced, plain, byte = map(pieces.index, ("\u2581s", "e", "<0x41>"))
    assert [sp.is_control(i) or sp.is_unknown(i) for i in range(5)] == [True] * 4 + [False]
    for previous in (plain, spaced, byte):
        assert table.count(np.array([previous, spaced])) == 2, previous
    for boundary in range(4):
        assert table.count(np.array([boundary, spaced])) == 1, boundary
    assert table.count(np.array([spaced, BOS])) == 0


def test_counting_in_pieces_gives_the_sum_of_a_whole(tokenizer: Path) -> None:
    _, tokens = encoded(tokenizer, DOCUMENTS + STRANGE)
    table = load_byte_table(str(tokenizer), 320)
    whole = table.count(tokens)
    for cut in (1, 2, 57, len(tokens) - 1):
        assert table.count(tokens[: cut + 1]) + table.count(tokens[cut:]) == whole
    # long enough to pass any internal bound on temporaries, and not a multiple of it
    long = np.tile(tokens, (1 << 22) // len(tokens) + 2)
    pairs = np.bincount(
        long[:-1].astype(np.int64) * 320 + long[1:], minlength=320 * 320
    ).reshape(320, 320)  # fmt: skip
    spaces = table.leading_space[None, :] & ~table.boundary[:, None]
    assert table.count(long) == int((pairs * (table.base[None, :] + spaces)).sum())


def test_a_split_of_one_token_has_no_bytes(tokenizer: Path) -> None:
    assert load_byte_table(str(tokenizer), 320).count(np.array([5], dtype=np.uint16)) == 0


def test_the_bytes_of_the_sample_are_those_of_its_documents() -> None:
    h = with_sample(train_gpt.Hyperparameters(data_path="sample"))  # built if missing
    (tokens,) = open_split(h.data_path, "val")
    sp = sentencepiece.SentencePieceProcessor(model_file=h.tokenizer_path)
    starts = np.flatnonzero(tokens == BOS)
    documents = [part[1:].tolist() for part in np.split(tokens, starts[1:])]
    expected = sum(len(text.encode()) for text in sp.decode(documents))
    table = load_byte_table(h.tokenizer_path, 1024)
    assert table.count(tokens) == expected
    head = tokens[:20_000]
    assert table.count(head) == bytes_by_the_rule(sp, head)


def tokenizer_refusal(path: object, vocab_size: int = 320) -> str:
    with pytest.raises(RunError) as caught:
        load_byte_table(str(path), vocab_size)
    message = str(caught.value)
    assert message.startswith(f"TOKENIZER_PATH={path}: ")
    return message


def test_a_missing_tokenizer_is_refused_with_the_remedy(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.model", tmp_path, ""):
        assert "prepare_data.py" in tokenizer_refusal(path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\0" * 1000])
def test_a_foreign_file_in_place_of_a_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.model"
    path.write_bytes(content)
    assert "not a SentencePiece model" in tokenizer_refusal(path)


def test_a_damaged_tokenizer_is_refused(tokenizer: Path) -> None:
    whole = tokenizer.read_bytes()
    tokenizer.write_bytes(whole[: len(whole) // 2])
    tokenizer_refusal(tokenizer)


def test_a_tokenizer_of_another_vocabulary_is_refused(tokenizer: Path) -> None:
    message = tokenizer_refusal(tokenizer, 1024)
    assert "VOCAB_SIZE=1024" in message and "found 320" in message


def test_a_tokenizer_that_starts_documents_otherwise_is_refused(tmp_path: Path) -> None:
    for bos_id, eos_id in ((2, 1), (-1, 2), (0, 1)):
        path = tmp_path / "foreign.model"
        path.write_bytes(model_of(bos_id=bos_id, eos_id=eos_id, unk_id=3, pad_id=-1))
        message = tokenizer_refusal(path, sentencepiece_of(path.read_bytes()).vocab_size())
        assert f"expected BOS id 1, found {bos_id}" in message and "train the tokenizer" in message


# The text of any tokenizer

PROSE = [" ".join(WORDS[i * k % 9] for k in range(2, 3 + i % 30)) for i in range(60)]
PROSE += ["caf\u00e9 \u6f22\u5b57 \U0001f600 of (violet) 1,024", "a", "\u00e9", "\u6f22", "to a b"]
SPACED = [
    *PROSE, *STRANGE, "", " ", "   ", "  in front", "behind  ", "  both  ",
    "a  run    of\t\tspaces ", "lines\n\n  indented\n",
    " \u6f22 \u5b57 ", "\ufffd and \ufffd\ufffd", "\u2028\u00a0\u3000",
    "no <|x|> of<|x|> <|x|> words",
]  # fmt: skip
ALONE = dict(normalization_rule_name="identity", add_dummy_prefix=False)
EXACT = dict(ALONE, remove_extra_whitespaces=False)  # such a tokenizer keeps any text
BYTES = dict(model_type="char", vocab_size=260)  # trained on one letter, which it then lacks
SUFFIX = dict(treat_whitespace_as_suffix=True)
ACROSS = dict(split_by_whitespace=False, vocab_size=400)


@functools.cache
def cached_model(options: str) -> bytes:
    model = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe", "vocab_size": 330, "hard_vocab_limit": False, "byte_fallback": True,
        "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "minloglevel": 3, "num_threads": 1,
    }  # fmt: skip
    settings.update(json.loads(options))
    letters = settings["vocab_size"] == BYTES["vocab_size"]
    corpus = ["e" * 50] * 50 if letters else PROSE
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, **settings
    )
    return model.getvalue()


def model_of(**options: Any) -> bytes:
    """A small model trained with these options of SentencePiece, its own defaults for the rest."""
    return cached_model(json.dumps(options, sort_keys=True))


def sentencepiece_of(model: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def table_of(model: bytes, folder: Path) -> ByteTable:
    path = folder / "kind.model"
    path.write_bytes(model)
    return load_byte_table(str(path), sentencepiece_of(model).vocab_size())


def split_of(sp: Any, documents: list[str]) -> np.ndarray:
    ids = [token for text in documents for token in [BOS, *sp.encode(text)]]
    return np.array(ids, dtype=np.uint16)


def utf8_bytes(documents: list[str]) -> int:
    return sum(len(text.encode()) for text in documents)


def decoded(sp: Any, documents: list[str]) -> list[str]:
    return [sp.decode(sp.encode(text)) for text in documents]


def check_note(note: str | None, size: int, by_rule: int) -> None:
    """The log holds both numbers and what makes the difference, or nothing if there is none."""
    if size == by_rule:
        assert note is None
        return
    assert note and f"decode to {size:,} bytes" in note and f"rule counts {by_rule:,} " in note
    reasons = re.findall(r"([+-][\d,]+) for ", note)
    assert sum(int(reason.replace(",", "")) for reason in reasons) == size - by_rule
    assert reasons and "are by the decoded text" in note


# Of prose, words with one space between them, each of these gives every byte back.
WHOLE = {
    "the defaults": {},
    "no dummy": dict(add_dummy_prefix=False),
    "identity": dict(normalization_rule_name="identity"),
    "unigram": dict(model_type="unigram"),
    "char": dict(model_type="char"),
    "word": dict(model_type="word"),
    "word, suffix": dict(model_type="word", **SUFFIX),
    "suffix": SUFFIX,
    "suffix, no dummy": dict(SUFFIX, add_dummy_prefix=False),
    "suffix, unigram": dict(SUFFIX, model_type="unigram"),
    "across words": ACROSS,
    "across words, unigram": dict(ACROSS, model_type="unigram"),
    "across words, suffix": dict(ACROSS, **SUFFIX),
    "bytes": BYTES,
    "bytes, no dummy": dict(BYTES, add_dummy_prefix=False),
    "bytes, suffix": dict(BYTES, **SUFFIX),
    "symbols": dict(user_defined_symbols=["<|x|>", "et", "\u2581of\u2581", "y  y", "t\u2581"]),
    "control": dict(control_symbols=["<|end|>", "\u2581ctrl"]),
    "few characters": dict(character_coverage=0.98),
}
UNLIKE_THE_RULE = {name for name in WHOLE if re.search("suffix|across|bytes|symbols|word", name)}
# Of any text at all, each of these does.
ANY_TEXT = {
    "alone": {},
    "unigram": dict(model_type="unigram"),
    "suffix": SUFFIX,
    "across words": ACROSS,
    "bytes": BYTES,
    "bytes, dummy": dict(BYTES, add_dummy_prefix=True),
    "bytes, suffix, dummy": dict(BYTES, add_dummy_prefix=True, **SUFFIX),
    "dummy": dict(add_dummy_prefix=True),
    "dummy, suffix": dict(SUFFIX, add_dummy_prefix=True),
    "word, dummy": dict(add_dummy_prefix=True, model_type="word"),
    "symbols": dict(user_defined_symbols=["\u2581\u2581", "\u2581\u2581\u2581\u2581", "<|x|>"]),
    "pieces of spaces": dict(allow_whitespace_only_pieces=True, split_by_whitespace=False),
}


@functools.cache
def exact_table(kind: str) -> ByteTable:
    with tempfile.TemporaryDirectory() as folder:
        return table_of(model_of(**{**EXACT, **ANY_TEXT[kind]}), Path(folder))


@pytest.mark.parametrize("kind", WHOLE)
def test_the_bytes_are_those_of_the_prose(kind: str, tmp_path: Path) -> None:
    table = table_of(model_of(**WHOLE[kind]), tmp_path)
    tokens = split_of(table.decoder, PROSE)
    size, note = count_text_bytes(tokens, table)
    assert size == utf8_bytes(PROSE)
    check_note(note, size, bytes_by_the_rule(table.decoder, tokens))
    assert bool(note) == (kind in UNLIKE_THE_RULE), "the test no longer means this kind"


@pytest.mark.parametrize("kind", ANY_TEXT)
def test_the_bytes_are_those_of_text_full_of_spaces(kind: str) -> None:
    table = exact_table(kind)
    tokens = split_of(table.decoder, SPACED)
    size, note = count_text_bytes(tokens, table)
    assert size == utf8_bytes(SPACED)
    check_note(note, size, bytes_by_the_rule(table.decoder, tokens))


TEXT = st.text(st.one_of(st.sampled_from(" \ufffd\u6f22ret"), st.characters(codec="utf-8")))


@pytest.mark.parametrize("kind", ANY_TEXT)
@given(documents=st.lists(TEXT, max_size=5))
@example(documents=["\u2580\u2582", "\u2585", "\0", " \ufffd ", "\u26811"])
def test_the_bytes_are_those_of_any_text(documents: list[str], kind: str) -> None:
    documents = [text.replace("\u2581", " ") for text in documents]  # the same to SentencePiece
    table = exact_table(kind)
    tokens = split_of(table.decoder, ["a", *documents])
    assert train_gpt.decoded_bytes(tokens, table) == (1 + utf8_bytes(documents), 0)


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf"])
@pytest.mark.parametrize("extra", [False, True])
def test_a_normalising_tokenizer_counts_what_it_decodes(
    rule: str, extra: bool, tmp_path: Path
) -> None:
    options = dict(normalization_rule_name=rule, remove_extra_whitespaces=not extra)
    table = table_of(model_of(**options), tmp_path)
    documents = [*SPACED, "\ufb01 \u2167 \u212b \uff21", "THE \u1e9e\u2581RIVER", "e\u0301 \u00bd"]
    size, note = count_text_bytes(split_of(table.decoder, documents), table)
    assert size == utf8_bytes(decoded(table.decoder, documents)) != utf8_bytes(documents)


def test_a_tokenizer_that_rewrites_what_it_decodes_counts_that(tmp_path: Path) -> None:
    rules = tmp_path / "rules.tsv"
    rules.write_text("72 69\t72 72 72 72 69\n")  # "ri" comes back as "rrrri"
    table = table_of(model_of(denormalization_rule_tsv=str(rules)), tmp_path)
    size, note = count_text_bytes(split_of(table.decoder, PROSE), table)
    expected = utf8_bytes([text.replace("ri", "rrrri") for text in PROSE])
    assert size == expected > utf8_bytes(PROSE) and note


def test_a_mark_in_the_text_counts_as_the_space_it_becomes(tmp_path: Path) -> None:
    for options in (EXACT, {**EXACT, **BYTES}, {**EXACT, **SUFFIX}):
        table = table_of(model_of(**options), tmp_path)
        tokens = split_of(table.decoder, ["quiet\u2581river", "\u2581\u2581 a"])
        assert count_text_bytes(tokens, table)[0] == len("quiet river") + len("   a")


@pytest.mark.parametrize("surface", [" \u2047 ", "?", "", "\ufffd"])
def test_unknown_text_counts_as_the_surface_it_decodes_to(surface: str, tmp_path: Path) -> None:
    table = table_of(model_of(byte_fallback=False, vocab_size=60, unk_surface=surface), tmp_path)
    tokens = split_of(table.decoder, SPACED)
    unknown = int((tokens == 3).sum())
    assert unknown > 15
    size, note = count_text_bytes(tokens, table)
    assert size == utf8_bytes(decoded(table.decoder, SPACED))
    check_note(note, size, bytes_by_the_rule(table.decoder, tokens))
    if surface:
        assert f"{unknown * len(surface.encode()):+,} for unknown tokens" in str(note)


def test_control_tokens_are_no_text_but_a_space_after_them_is(tmp_path: Path) -> None:
    table = table_of(model_of(control_symbols=["<|end|>", "<|a\u2581b|>"]), tmp_path)
    sp = table.decoder
    first, second = sp.encode("quiet river"), sp.encode("winter")
    assert sp.id_to_piece(second[0]).startswith("\u2581")
    for control in (EOS, 0, sp.piece_to_id("<|end|>"), sp.piece_to_id("<|a\u2581b|>")):
        assert sp.is_control(control)
        tokens = np.array([BOS, *first, control, *second, EOS, BOS, control, *second])
        size, note = count_text_bytes(tokens, table)
        assert size == len("quiet river winter" + "winter")
        check_note(note, size, size - 1)
        assert str(note).count(" for ") == 1


def test_unknown_tokens_in_a_row_are_no_spelling_of_a_space(tmp_path: Path) -> None:
    table = table_of(model_of(byte_fallback=False, vocab_size=60), tmp_path)
    size, note = count_text_bytes(np.array([BOS, 3, 3, 3, BOS, 3, 3, 3]), table)
    assert size == 6 * len(" \u2047 ".encode())
    check_note(note, size, 0)


def test_the_note_tells_the_causes_and_their_bytes(tmp_path: Path) -> None:
    documents = [f"{first} {second}" for first in WORDS for second in WORDS]
    spaces = len(documents)
    for options, reasons in (
        (dict(BYTES, add_dummy_prefix=False), [f"{-2 * spaces} for spaces in 3 byte tokens"]),
        (dict(SUFFIX, add_dummy_prefix=False), [f"{-2 * spaces} for spaces within or behind"]),
        (SUFFIX, [f"{-4 * spaces} for spaces within", f"{-spaces} for the dummy space of each"]),
    ):
        table = table_of(model_of(**options), tmp_path)
        _, note = count_text_bytes(split_of(table.decoder, documents), table)
        assert note and note.count(" for ") == len(reasons)
        assert all(reason in note for reason in reasons), note


def test_the_bytes_of_a_thousand_documents_are_all_counted(tmp_path: Path) -> None:
    table = table_of(model_of(**SUFFIX), tmp_path)
    documents = (PROSE * 20)[:1100]
    assert count_text_bytes(split_of(table.decoder, documents), table)[0] == utf8_bytes(documents)


def test_an_official_tokenizer_keeps_the_number_of_the_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(byte_fallback=False, vocab_size=60)
    assert not table_of(model, tmp_path).official
    digest = hashlib.sha256(model).hexdigest()
    monkeypatch.setattr(train_gpt, "OFFICIAL_TOKENIZERS", {digest})
    table = table_of(model, tmp_path)
    tokens = split_of(table.decoder, SPACED)
    by_rule = bytes_by_the_rule(table.decoder, tokens)
    size, note = count_text_bytes(tokens, table)
    other = utf8_bytes(decoded(table.decoder, SPACED))
    assert size == by_rule != other
    assert note and f"decode to {other:,} bytes" in note and f"rule counts {by_rule:,} " in note
    assert "are by the rule, as the tokenizer is official" in note


@pytest.mark.parametrize("vocab_size", [1024, 4096, 8192])
def test_the_official_tokenizers_are_known_by_their_content(vocab_size: int) -> None:
    path = support.REPO / f"data/tokenizers/fineweb_{vocab_size}_bpe.model"
    if not path.exists():
        pytest.skip("not downloaded: python prepare_data.py fineweb")
    assert load_byte_table(str(path), vocab_size).official


def test_a_byte_that_spells_no_character_counts_one_and_is_named(tmp_path: Path) -> None:
    table = table_of(model_of(**EXACT), tmp_path)
    text = "\ufffd quiet \U0001f680"
    ids = table.decoder.encode(text)
    assert all(table.decoder.is_byte(token) for token in ids[-4:])
    for cut in (1, 2, 3):  # of the last character's four bytes
        tokens = np.array([BOS, *ids, BOS, *ids[:-cut]])
        size, note = count_text_bytes(tokens, table)
        assert size == 2 * len(text.encode()) - cut
        assert note and note.startswith(f"{4 - cut} byte tokens spell no character and count 1")


@pytest.mark.parametrize("kind", ["the defaults", "no dummy", "unigram", "symbols", "across words"])
def test_the_first_token_is_no_target_wherever_a_split_begins(kind: str, tmp_path: Path) -> None:
    table = table_of(model_of(**WHOLE[kind]), tmp_path)
    tokens = split_of(table.decoder, PROSE)
    whole, _ = count_text_bytes(tokens, table)
    for cut in [*range(40), *range(40, len(tokens), 97), *range(len(tokens) - 40, len(tokens))]:
        parts = tokens[: cut + 1], tokens[cut:]
        assert sum(count_text_bytes(part, table)[0] for part in parts) == whole, cut


def test_a_table_without_a_tokenizer_counts_by_the_rule() -> None:
    ids = np.arange(10)
    table = ByteTable(ids, ids % 2 == 0, ids <= 3)
    tokens = np.array([1, 4, 5, 6, 1, 8])
    assert (
        count_text_bytes(tokens, table) == (table.count(tokens), None) == (4 + 5 + 7 + 1 + 8, None)
    )


def test_the_evaluator_divides_by_the_bytes_of_the_text(tmp_path: Path) -> None:
    table = table_of(model_of(**SUFFIX), tmp_path)
    tokens = split_of(table.decoder, PROSE)
    h = support.tiny(vocab_size=len(table.base))
    evaluator = Evaluator(h, support.cpu_runtime(), tokens, table)
    assert evaluator.text_bytes == utf8_bytes(PROSE)
    assert evaluator.notes == [count_text_bytes(tokens, table)[1]] != [None]


def test_a_split_without_text_is_refused(tmp_path: Path) -> None:
    table = table_of(model_of(), tmp_path)
    support.write_shard(tmp_path / "fineweb_val_000000.bin", [BOS] * 9)
    paths = dict(data_path=str(tmp_path), tokenizer_path=str(tmp_path / "kind.model"))
    h = support.tiny(vocab_size=len(table.base), output_dir=str(tmp_path), **paths)
    with pytest.raises(RunError, match=r"fineweb_val_\*.bin: no text"):
        train_gpt.run(h, support.cpu_runtime())
    assert not list(tmp_path.glob("*.log")), "it began"


def test_the_log_of_a_run_holds_both_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of(model_of(**SUFFIX), tmp_path)
    tokens = split_of(table.decoder, PROSE)
    support.write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    paths = dict(data_path=str(tmp_path), tokenizer_path=str(tmp_path / "kind.model"))
    h = support.tiny(vocab_size=len(table.base), output_dir=str(tmp_path), **paths)

    def stop(*_: object) -> None:
        raise RunError("far enough")

    monkeypatch.setattr(train_gpt, "choose_kernels", stop)
    with pytest.raises(RunError, match="far enough"):
        train_gpt.run(h, support.cpu_runtime())
    (log,) = tmp_path.glob("*.log")
    assert f"val_bytes:{utf8_bytes(PROSE)} " in log.read_text()
    assert f"note: {count_text_bytes(tokens, table)[1]}\n" in log.read_text()
