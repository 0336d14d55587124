"""Claims about case marks: the transform, its bytes, the commands that use it, and the score."""

import io
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sentencepiece
import support
from hypothesis import example, given
from hypothesis import strategies as st

import prepare_data
import train_gpt
from prepare_data import mark_case, restore_case

LETTER, WORD, ESCAPE = "\ue001", "\ue002", "\ue004"
MARKS = LETTER + WORD + "\ue003" + ESCAPE
SPACE = "\u2581"

# Texts in which the rules meet, and any other.
crowded = st.text(st.sampled_from("aZzAB0 1e\n.\u00c4\u00e9" + MARKS + SPACE))
any_text = st.one_of(st.text(st.characters()), crowded)


@given(any_text)
@example("")
@example("\ud800A")  # half a surrogate pair is a character of Python's texts
@example(f"A{WORD}bc {LETTER} B")
def test_any_text_comes_back_exactly(text: str) -> None:
    assert restore_case(mark_case(text)) == text


@given(any_text)
def test_no_capital_is_left_and_other_characters_stay(text: str) -> None:
    marked = mark_case(text)
    assert not re.search("[A-Z]", marked)
    plain = re.sub(f"[{MARKS}{SPACE}]", "", text)
    spelled = re.sub(f"{ESCAPE}[0-9a-f]{{3}}", "", marked)
    assert re.sub(f"[{MARKS}]", "", spelled).replace(" ", "") == re.sub(
        "[A-Z]", lambda match: match[0].lower(), plain
    ).replace(" ", "")


@given(st.one_of(st.text(st.characters(codec="utf-8")), crowded))
def test_the_bytes_are_those_of_the_text_without_its_marks(text: str) -> None:
    marked = mark_case(text)
    marks = sum(map(marked.count, MARKS))
    assert len(marked.encode()) - 3 * marks == len(text.encode())


@given(any_text)
def test_the_inverse_takes_nothing_but_what_the_transform_gives(text: str) -> None:
    """Any text is either refused or the one spelling of what it stands for."""
    try:
        restored = restore_case(text)
    except ValueError:
        return
    assert mark_case(restored) == text


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("The end", f"{LETTER}the end"),
        ("at The end", f"at{LETTER} the end"),
        (" The", f"{LETTER} the"),
        ("at  The", f"at {LETTER} the"),
        ("NASA", f"{WORD}nasa"),
        ("of NASA, US", f"of{WORD} nasa,{WORD} us"),
        ("HTMLElement", f"{WORD}html{LETTER}element"),
        ("PCs", f"{LETTER}p{LETTER}cs"),
        ("McDonald", f"{LETTER}mc{LETTER}donald"),
        ("U.S.", f"{LETTER}u.{LETTER}s."),
        ("COVID19", f"{WORD}covid19"),
        ("\nNew", f"\n{LETTER}new"),
        ("\u00c9A\u00c9", f"\u00c9{LETTER}a\u00c9"),  # only ASCII letters are marked
        (" a", f"{ESCAPE} a"),
        (f"x{LETTER}y", f"x{ESCAPE}001y"),
        (f"{SPACE}{ESCAPE}", f"{ESCAPE}581{ESCAPE}004"),
        ("", ""),
    ],
)
def test_a_text_has_the_documented_form(text: str, marked: str) -> None:
    assert mark_case(text) == marked
    assert restore_case(marked) == text


@pytest.mark.parametrize(
    "malformed",
    [
        "A", LETTER, f"{LETTER}A", f"{LETTER}.", f"{LETTER}{LETTER}a", f" {LETTER}a", " a",
        WORD, f"{WORD}a", f"{WORD}1", f"{WORD}ab{LETTER}c", f"{LETTER}a{LETTER}b{LETTER}c",
        ESCAPE, f"{ESCAPE}a", f"{ESCAPE}005", f"a{ESCAPE} b", f"{ESCAPE}{ESCAPE}001", "\ue003",
        f"{ESCAPE}00", f"{ESCAPE}E01", SPACE, f"{LETTER}  a", f"{ESCAPE}{LETTER} a",
    ],
)  # fmt: skip
def test_the_inverse_refuses_malformed_text(malformed: str) -> None:
    with pytest.raises(ValueError, match="not the case-marked form"):
        restore_case(malformed)


def test_a_megabyte_is_marked_and_restored_within_a_second() -> None:
    text = "The quick brown Fox of NASA met the lazy dog.\nIt was " * 20_000
    began = time.perf_counter()
    assert restore_case(mark_case(text)) == text
    assert time.perf_counter() - began < 1


# ---- Case-marked shards


WORDS = ["River", "stone", "Lantern", "quiet", "NASA", "seventeen", "McDonald", "violet", "U.S."]
DOCUMENTS = [
    f"Document {i}: The {WORDS[i % 9]} meets the {WORDS[i * 7 % 9]}.\n\nIn  {WORDS[i % 5]}, "
    f"{LETTER}caf\u00e9\ue003 \u00c9t\u00e9 \u6f22\u5b57 \U0001f600 the " + " ".join(WORDS[i % 7 :])
    for i in range(120)
]
STRANGE = [
    " the",
    " The",
    "  A",
    "\u2028 B",
    "\ufffd C",
    "\0Z",
    f"{MARKS}{SPACE} Q",
    "\ue005",
    "\t",
]
VOCAB = 400


class Shards(NamedTuple):
    data: Path
    tokenizer: Path

    def tokens(self, split: str) -> np.ndarray:
        return np.concatenate(train_gpt.open_split(str(self.data), split))

    def manifest(self) -> dict[str, Any]:
        stated: dict[str, Any] = json.loads((self.data / "manifest.json").read_text())
        return stated

    def texts(self, split: str) -> list[str]:
        """What the documents decode to."""
        decoder = sentencepiece.SentencePieceProcessor(model_file=str(self.tokenizer))
        tokens = self.tokens(split)
        parts = np.split(tokens, np.flatnonzero(tokens == 1)[1:])
        return [decoder.decode(part[1:].tolist()) for part in parts]

    def table(self) -> train_gpt.ByteTable:
        return train_gpt.load_byte_table(str(self.tokenizer), VOCAB)

    def copy(self, folder: Path) -> "Shards":
        shutil.copytree(self.data, folder)
        return Shards(folder, self.tokenizer)

    def settings(self, **more: Any) -> train_gpt.Hyperparameters:
        paths = dict(data_path=str(self.data), tokenizer_path=str(self.tokenizer))
        return support.tiny(vocab_size=VOCAB, **paths, **more)

    def evaluator(self) -> train_gpt.Evaluator:
        return train_gpt.Evaluator.open(self.settings(), support.cpu_runtime())


def text_command(root: Path, *arguments: object, documents: list[str] = DOCUMENTS) -> Shards:
    source = root / "documents.txt"
    source.write_bytes("<|endoftext|>".join(documents).encode())
    command = ["text", source, "--root", root, "--val-fraction", 0.2, *arguments]
    prepare_data.main(list(map(str, command)))
    return Shards(root / f"datasets/text_sp{VOCAB}", root / f"tokenizers/text_{VOCAB}_bpe.model")


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return text_command(tmp_path_factory.mktemp("marked"), "--vocab", VOCAB, "--case-marks")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return text_command(tmp_path_factory.mktemp("plain"), "--vocab", VOCAB)


def utf8_bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("split", ["train", "val"])
def test_marked_shards_hold_the_documents_of_plain_ones(
    marked: Shards, plain: Shards, split: str
) -> None:
    """The same ones in the same order, and no capital in their tokens."""
    texts = marked.texts(split)
    assert list(map(restore_case, texts)) == plain.texts(split)
    assert not re.search("[A-Z]", "".join(texts))
    stated = marked.manifest()["splits"][split]
    assert stated["bytes"] == utf8_bytes(plain.texts(split)) < utf8_bytes(texts)
    assert stated["documents"] == len(texts) > 10


def test_the_manifest_tells_a_case_marked_tokenizer(marked: Shards, plain: Shards) -> None:
    assert marked.manifest()["tokenizer"]["case_marks"] is True
    assert "case_marks" not in plain.manifest()["tokenizer"]
    assert marked.table().case_marked and not plain.table().case_marked


def test_each_mark_is_a_piece_and_joins_no_letter(marked: Shards) -> None:
    decoder = sentencepiece.SentencePieceProcessor(model_file=str(marked.tokenizer))
    pieces = decoder.id_to_piece(list(range(VOCAB)))
    with_marks = {piece for piece in pieces if re.search(f"[{MARKS}]", piece)}
    assert {LETTER, WORD, ESCAPE} < with_marks, "some punctuation has its mark within"
    assert not any(any(map(str.isalnum, piece)) for piece in with_marks)


def test_a_capital_costs_one_token_and_shares_its_word(marked: Shards) -> None:
    decoder = sentencepiece.SentencePieceProcessor(model_file=str(marked.tokenizer))
    small = decoder.encode("a the", out_type=str)
    assert small[-1] == f"{SPACE}the"
    assert decoder.encode(mark_case("a The"), out_type=str) == [*small[:-1], LETTER, small[-1]]
    assert decoder.encode(mark_case("a THE"), out_type=str) == [*small[:-1], WORD, small[-1]]


def encoded(shards: Shards, texts: list[str]) -> np.ndarray:
    decoder = shards.table().decoder
    ids = [token for text in texts for token in [1, *decoder.encode(mark_case(text))]]
    return np.array(ids, dtype=np.uint16)


@given(texts=st.lists(st.one_of(st.text(st.characters(codec="utf-8")), crowded), max_size=4))
@example(texts=STRANGE)
def test_the_table_counts_the_bytes_of_any_text(marked: Shards, texts: list[str]) -> None:
    """By the rule and by decoding, with nothing to note; the tokens give the text back."""
    table = marked.table()
    tokens = encoded(marked, [*texts, ""])
    assert table.count(tokens) == utf8_bytes(texts)
    assert train_gpt.count_text_bytes(tokens, table) == (utf8_bytes(texts), None)
    ids = [part.tolist() for part in np.split(tokens, np.flatnonzero(tokens == 1)[1:])]
    assert prepare_data.comes_back(table.decoder, [*texts, ""], ids)


def test_a_split_that_begins_with_a_mark_counts_what_follows(marked: Shards) -> None:
    tokens = encoded(marked, ["The end"])[1:]
    assert train_gpt.count_text_bytes(tokens, marked.table())[0] == len("The end")


def test_marks_within_pieces_count_no_bytes(marked: Shards) -> None:
    table = marked.table()
    pieces = table.decoder.id_to_piece(list(range(VOCAB)))
    joined = [i for i, piece in enumerate(pieces) if re.fullmatch(f"\\W+[{MARKS}]", piece)]
    assert joined
    for i in joined:
        text = pieces[i].removeprefix(SPACE)[:-1]
        assert table.base[i] == len(text.encode())
        assert table.leading_space[i] == pieces[i].startswith(SPACE)


def test_a_private_character_of_a_plain_text_counts_its_bytes(plain: Shards) -> None:
    table = plain.table()
    assert table.decoder.piece_to_id(LETTER) != 3, "the test must have it as a piece"
    ids = [1, *table.decoder.encode(f"a{LETTER} b")]
    tokens = np.array(ids, dtype=np.uint16)
    assert train_gpt.count_text_bytes(tokens, table) == (6, None)


def test_the_marks_of_published_tokenizers_count_no_bytes(tmp_path: Path) -> None:
    """They have four, each a symbol of its own, and set them behind the space."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(map(mark_case, DOCUMENTS)), model_writer=model, model_type="bpe",
        vocab_size=VOCAB, byte_fallback=True, user_defined_symbols=list(MARKS), pad_id=0, bos_id=1,
        eos_id=2, unk_id=3, minloglevel=2, num_threads=1,
    )  # fmt: skip
    (tmp_path / "published.model").write_bytes(model.getvalue())
    table = train_gpt.load_byte_table(str(tmp_path / "published.model"), VOCAB)
    assert table.case_marked
    assert [table.base[table.decoder.piece_to_id(mark)] for mark in MARKS] == [0] * 4
    text = f"{LETTER}the {WORD}nasa of {LETTER}mc\ue003donald"
    tokens = np.array([1, *table.decoder.encode(text)], dtype=np.uint16)
    assert train_gpt.count_text_bytes(tokens, table)[0] == len("The NASA of McDonald")


def test_both_programs_know_the_same_marks() -> None:
    assert set(train_gpt.CASE_MARKS) == set(MARKS)
    own = [prepare_data.CASE_LETTER, prepare_data.CASE_WORD, prepare_data.CASE_ESCAPE]
    assert own == [LETTER, WORD, ESCAPE]


# ---- The command's mistakes


def failure(root: Path, *arguments: object, documents: list[str] = DOCUMENTS) -> str:
    with pytest.raises(SystemExit) as caught:
        text_command(root, *arguments, documents=documents)
    message = str(caught.value)
    assert message.startswith("prepare_data: ") and "\n" not in message
    return message


def test_a_given_tokenizer_must_have_the_marks_asked_for(
    marked: Shards, plain: Shards, tmp_path: Path
) -> None:
    message = failure(tmp_path, "--case-marks", "--tokenizer", plain.tokenizer)
    assert str(plain.tokenizer) in message and "expected pieces U+E001" in message
    message = failure(tmp_path, "--tokenizer", marked.tokenizer)
    assert str(marked.tokenizer) in message and "add --case-marks" in message
    assert not list(tmp_path.glob("*/*")), "a failed command left output"
    again = text_command(tmp_path, "--case-marks", "--tokenizer", marked.tokenizer)
    assert (again.tokens("val") == marked.tokens("val")).all()


def test_plain_text_full_of_marks_asks_for_the_option(tmp_path: Path) -> None:
    """Its tokenizer would have them as pieces, and so be taken for a case-marked one."""
    documents = [text + MARKS * 9 for text in DOCUMENTS]
    message = failure(tmp_path, "--vocab", VOCAB, documents=documents)
    assert "the text holds U+E001" in message and "add --case-marks" in message
    shards = text_command(tmp_path, "--vocab", VOCAB, "--case-marks", documents=documents)
    assert shards.evaluator().text_bytes == shards.manifest()["splits"]["val"]["bytes"]


def test_plain_and_marked_shards_have_names_of_their_own(marked: Shards) -> None:
    root = marked.data.parents[1]
    before = marked.manifest()
    assert "choose another --name" in failure(root, "--vocab", VOCAB)
    again = text_command(root, "--vocab", VOCAB, "--case-marks")
    assert again.manifest() == before


@pytest.mark.parametrize("restored", ["another", "refused"])
def test_validation_text_that_does_not_come_back_is_refused(
    marked: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored: str
) -> None:
    def wrong(text: str) -> str:
        if restored == "refused":
            raise ValueError("not a case-marked form")
        return restore_case(text).lower()

    monkeypatch.setattr(prepare_data, "restore_case", wrong)
    message = failure(tmp_path, "--case-marks", "--tokenizer", marked.tokenizer)
    assert "val document 1" in message and "decodes to another text" in message
    assert not list(tmp_path.glob("*/*")), "a failed command left output"


def test_a_mark_that_counted_bytes_would_be_refused(
    marked: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_gpt, "CASE_MARKS", LETTER)
    message = failure(tmp_path, "--case-marks", "--tokenizer", marked.tokenizer)
    assert re.search(r"of \d+ bytes, train_gpt.py counts \d+", message)


# ---- The proof of the denominator


def test_the_manifest_proves_the_bytes_of_a_marked_split(marked: Shards) -> None:
    evaluator = marked.evaluator()
    size = utf8_bytes(list(map(restore_case, marked.texts("val"))))
    assert evaluator.text_bytes == size
    assert evaluator.notes == [
        f"the tokenizer is case-marked; manifest.json proves val_bytes {size:,} for these shards"
    ]


def test_a_plain_split_needs_no_proof(plain: Shards) -> None:
    assert plain.evaluator().notes == []


def test_fineweb_keeps_its_label_when_marked(
    marked: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = marked.manifest()["splits"]["val"]["bytes"]
    monkeypatch.setattr(train_gpt, "FINEWEB_VAL_BYTES", size)
    evaluator = marked.evaluator()
    assert (evaluator.dataset, evaluator.text_bytes) == (f"fineweb10B_sp{VOCAB}", size)


@pytest.mark.parametrize("change", ["bytes", "shard"])
def test_a_manifest_of_other_shards_or_bytes_is_refused(
    marked: Shards, tmp_path: Path, change: str
) -> None:
    shards = marked.copy(tmp_path / "shards")
    manifest = shards.manifest()
    size = manifest["splits"]["val"]["bytes"]
    if change == "bytes":
        manifest["splits"]["val"]["bytes"] += 1
        (shards.data / "manifest.json").write_text(json.dumps(manifest))
    else:  # the documents in another order
        tokens = shards.tokens("val")
        parts = np.split(tokens, np.flatnonzero(tokens == 1)[1:])
        support.write_shard(shards.data / "fineweb_val_000000.bin", np.concatenate(parts[::-1]))
    message = support.refusal(shards.evaluator)
    stated = size + (change == "bytes")
    assert f"manifest.json states {stated:,} bytes" in message and f"of {size:,} bytes" in message


@pytest.mark.parametrize(
    "manifest",
    ["", "{}", '{"splits": {}}', '{"splits": 7}', '{"splits": {"val": {"bytes": null}}}',
     '{"splits": {"val": {"bytes": "many", "shards": []}}}',
     '{"splits": {"val": {"bytes": 9, "shards": [7]}}}'],
)  # fmt: skip
def test_without_a_stated_size_the_log_warns(marked: Shards, tmp_path: Path, manifest: str) -> None:
    shards = marked.copy(tmp_path / "shards")
    (shards.data / "manifest.json").write_text(manifest)
    evaluator = shards.evaluator()
    assert evaluator.text_bytes == marked.evaluator().text_bytes
    (note,) = evaluator.notes
    assert "neither manifest.json nor fineweb_val_bytes_*.bin proves" in note


def published(marked: Shards, folder: Path, sizes: np.ndarray) -> Shards:
    """The shards as others publish them: bytes per token beside them, and no manifest."""
    shards = marked.copy(folder)
    (folder / "manifest.json").unlink()
    support.write_shard(folder / "fineweb_val_bytes_000000.bin", sizes)
    return shards


def bytes_of_tokens(shards: Shards) -> np.ndarray:
    tokens = shards.tokens("val")
    table = shards.table()
    counted = [table.count(tokens[i : i + 2]) for i in range(len(tokens) - 1)]
    return np.array([0, *counted])


@pytest.mark.parametrize("more", [0, 2, -2])
def test_bytes_beside_the_shards_are_read_and_the_smaller_divides(
    marked: Shards, tmp_path: Path, more: int
) -> None:
    sizes = bytes_of_tokens(marked)
    sizes[sizes.argmax()] += more
    shards = published(marked, tmp_path / "shards", sizes)
    evaluator = shards.evaluator()
    counted = marked.evaluator().text_bytes
    assert evaluator.text_bytes == counted + min(0, more)
    assert evaluator.targets == len(sizes) - 1, "bytes were scored as tokens"
    (note,) = evaluator.notes
    assert f"_bytes_*.bin state {counted + more:,} bytes" in note and f"count {counted:,}" in note


def test_bytes_of_a_long_split_are_summed_but_for_its_first(marked: Shards, tmp_path: Path) -> None:
    """More bytes than a number of 16 bits holds; the first token is no target."""
    shards = marked.copy(tmp_path / "long")
    tokens = np.tile(shards.tokens("val"), 30)
    support.write_shard(shards.data / "fineweb_val_000000.bin", tokens)
    sizes = np.tile(bytes_of_tokens(marked), 30)
    sizes[0] = 3
    evaluator = published(shards, tmp_path / "shards", sizes).evaluator()
    assert evaluator.text_bytes == 30 * marked.evaluator().text_bytes > 1 << 16
    assert f"state {evaluator.text_bytes:,} bytes" in evaluator.notes[0]


def test_bytes_beside_the_shards_do_not_change_the_proof(marked: Shards, tmp_path: Path) -> None:
    shards = marked.copy(tmp_path / "shards")
    support.write_shard(shards.data / "fineweb_val_bytes_000000.bin", bytes_of_tokens(marked))
    evaluator = shards.evaluator()
    assert evaluator.notes == marked.evaluator().notes
    assert evaluator.targets == marked.evaluator().targets


@pytest.mark.parametrize("fault", ["another text", "too short", "too long"])
def test_bytes_of_other_shards_are_refused(marked: Shards, tmp_path: Path, fault: str) -> None:
    sizes = bytes_of_tokens(marked)
    sizes = {"another text": sizes + 1, "too short": sizes[:-1], "too long": [*sizes, 0]}[fault]
    shards = published(marked, tmp_path / "shards", np.array(sizes))
    message = support.refusal(shards.evaluator)
    assert message.startswith(f"{shards.data}/fineweb_val_bytes_000000.bin: states ")
    assert "fetch shards and bytes again" in message


def test_damaged_bytes_beside_the_shards_are_named(marked: Shards, tmp_path: Path) -> None:
    shards = published(marked, tmp_path / "shards", bytes_of_tokens(marked))
    path = shards.data / "fineweb_val_bytes_000000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert support.refusal(shards.evaluator).startswith(f"{path}: expected ")


def test_the_log_of_a_run_holds_the_proof(
    marked: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise train_gpt.RunError("far enough")

    monkeypatch.setattr(train_gpt, "choose_kernels", stop)
    with pytest.raises(train_gpt.RunError, match="far enough"):
        train_gpt.run(marked.settings(output_dir=str(tmp_path)), support.cpu_runtime())
    (log,) = tmp_path.glob("*.log")
    (note,) = marked.evaluator().notes
    assert f"note: {note}\n" in log.read_text()
    assert f"val_bytes:{marked.evaluator().text_bytes} " in log.read_text()
