"""What `prepare_data.py text` makes of a user's files: encodings, documents, twins, the split."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import random
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from test_prepare_data import DOCUMENTS, failure, read_texts, text_command

import prepare_data
from prepare_data import Reading, read_documents, twin_groups

ENGLISH = "The harbour was quiet.\nA lantern moved on the water, slowly.\n" * 8
CYRILLIC = "Гавань была тихой.\nПо воде медленно двигался фонарь.\n" * 8
GREEK = "Το λιμάνι ήταν ήσυχο.\nΈνα φανάρι κινήθηκε στο νερό.\n" * 8
CHINESE = "港口很安静。\n一盏灯笼在水面上慢慢移动。 1984\n" * 8
HINDI = "बंदरगाह शांत था।\nपानी पर एक लालटेन धीरे-धीरे चली।\n" * 8
TEXTS = [ENGLISH, CYRILLIC, GREEK, CHINESE, HINDI, "Emoji \U0001f600 and\ttabs\n" * 8]
MARKED = [
    ("utf-8", codecs.BOM_UTF8), ("utf-16-le", codecs.BOM_UTF16_LE),
    ("utf-16-be", codecs.BOM_UTF16_BE), ("utf-32-le", codecs.BOM_UTF32_LE),
    ("utf-32-be", codecs.BOM_UTF32_BE),
]  # fmt: skip
WIDE = ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    def write(content: bytes | str, name: str = "input.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refusal(path: Path, reading: Reading | None = None) -> str:
    """The one line that refuses `path`, which it names."""
    with pytest.raises(prepare_data.DataError) as caught:
        read_documents(path, reading or Reading())
    message = str(caught.value)
    assert message.startswith(f"prepare_data: {path}: ") and "\n" not in message
    return message


# ---- Encodings ----------------------------------------------------------------------------------
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("encoding", "mark"), MARKED)
def test_a_byte_order_mark_names_the_encoding(
    file: Callable[..., Path], text: str, encoding: str, mark: bytes
) -> None:
    path = file(mark + text.encode(encoding))
    assert read_documents(path) == [text.strip()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("encoding", WIDE)
def test_utf16_and_utf32_without_a_mark_are_recognised(
    file: Callable[..., Path], text: str, encoding: str
) -> None:
    assert read_documents(file(text.encode(encoding))) == [text.strip()]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", [CHINESE.replace("\n", "").replace(" 1984", ""), "港口很安静"])
def test_utf16_without_evidence_is_refused_not_guessed(
    file: Callable[..., Path], text: str, encoding: str
) -> None:
    assert "iconv" in refusal(file(text.encode(encoding)))


@pytest.mark.parametrize("encoding", WIDE)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("mark", [True, False])
def test_a_wide_encoding_cut_inside_a_unit_is_refused(
    file: Callable[..., Path], text: str, encoding: str, mark: bool
) -> None:
    start = dict(MARKED)[encoding] if mark else b""
    assert "at offset" in refusal(file(start + text.encode(encoding)[:-1]))


@pytest.mark.parametrize("text", TEXTS)
def test_utf8_followed_by_utf16_is_refused(file: Callable[..., Path], text: str) -> None:
    """What `>>` of another shell appends to a file."""
    refusal(file(ENGLISH.encode() * 20 + text.encode("utf-16-le")))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_followed_by_letters_of_one_byte_is_refused(
    file: Callable[..., Path], encoding: str
) -> None:
    """Any two small letters of ASCII are one Chinese character of UTF-16."""
    assert read_documents(file(ENGLISH.encode(encoding))) == [ENGLISH.strip()]
    assert "iconv" in refusal(file(ENGLISH.encode(encoding) + b"lantern" * 10))


def test_an_invalid_byte_is_named_with_offset_and_remedy(file: Callable[..., Path]) -> None:
    for lead in (b"", codecs.BOM_UTF8):
        message = refusal(file(lead + b"twelve bytes\xe9 more"))
        assert f"0xe9 at offset {12 + len(lead)}" in message and "iconv" in message


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "iso2022_jp", "shift_jis", "gb18030"])
def test_other_encodings_are_refused(file: Callable[..., Path], encoding: str) -> None:
    text = {"latin-1": "caf\u00e9 au lait", "cp1252": "\u201cquoted\u201d"}
    content = (text.get(encoding, "\u6f22\u5b57\u3068\u6587\u7ae0\n") * 9).encode(encoding)
    assert "iconv" in refusal(file(content))


@pytest.mark.parametrize(
    "content",
    [
        bytes(range(256)) * 4,  # any binary
        b"\x7fELF\x02\x01\x01" + b"\0" * 500,
        b"words\0\0\0\0\0\0words",  # a file system's padding
        b"\1\2\3\4 four control characters",
    ],
)
def test_binary_files_are_refused(file: Callable[..., Path], content: bytes) -> None:
    assert "at offset" in refusal(file(content))


def test_a_token_shard_is_refused_as_text(tmp_path: Path) -> None:
    import numpy as np

    path = tmp_path / "fineweb_val_000000.bin"
    prepare_data.write_shard(path, np.arange(32, 2000, dtype=np.uint16))
    assert "token shard" in refusal(path)


@pytest.mark.parametrize(
    ("head", "kind"),
    [(b"PK\x03\x04", "ZIP"), (b"%PDF-1.7", "PDF"), (b"PAR1", "Parquet"), (b"ARROW1", "Arrow")],
)
def test_known_containers_are_refused_by_content(
    file: Callable[..., Path], head: bytes, kind: str
) -> None:
    message = refusal(file(head + b" readable text follows", "plain.txt"))
    assert kind in message and ".jsonl" in message


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".arrow", ".xlsx"])
def test_tables_are_refused_with_a_remedy(file: Callable[..., Path], suffix: str) -> None:
    message = refusal(file("text,label\nhello world,1\n", f"table{suffix}"))
    assert ".jsonl" in message


def test_a_table_is_read_as_text_when_that_is_asked_for(file: Callable[..., Path]) -> None:
    path = file("text,label\nhello,1\n", "table.csv")
    assert read_documents(path, Reading(format="text")) == ["text,label\nhello,1"]


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}  # fmt: skip


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_are_read_whatever_their_name(
    file: Callable[..., Path], suffix: str, named: bool
) -> None:
    packed = PACKERS[suffix](ENGLISH.encode())
    path = file(packed, f"input.txt{suffix}" if named else "input.txt")
    assert read_documents(path) == [ENGLISH.strip()]


def test_a_stream_of_zstd_frames_is_read_whole(file: Callable[..., Path]) -> None:
    stream = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(stream, closefd=False) as writer:
        writer.write(b"first half, ")
    frames = stream.getvalue() + zstandard.ZstdCompressor().compress(b"second half")
    assert read_documents(file(frames, "input.zst")) == ["first half, second half"]


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_damaged_or_misnamed_archive_is_refused(file: Callable[..., Path], suffix: str) -> None:
    words = random.Random(0).choices(ENGLISH.split(), k=100_000)  # several blocks: some stay whole
    packed = PACKERS[suffix](" ".join(words).encode())
    assert "cannot be read" in refusal(file(packed[:-9], f"cut{suffix}"))
    assert "not" in refusal(file(b"plain text", f"plain{suffix}"))


def test_a_tar_archive_is_refused_packed_or_not(file: Callable[..., Path]) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("inside.txt")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"words"))
    assert "tar" in refusal(file(stream.getvalue(), "texts.tar"))
    assert "tar" in refusal(file(gzip.compress(stream.getvalue()), "texts.tar.gz"))


# ---- Line ends and blanks -----------------------------------------------------------------------
@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
@pytest.mark.parametrize("encoding", ["utf-8", *WIDE])
def test_line_ends_become_line_feeds(file: Callable[..., Path], end: str, encoding: str) -> None:
    text = ENGLISH.replace("\n", end).encode(encoding)
    assert read_documents(file(text)) == [ENGLISH.strip()]


def test_line_ends_in_json_strings_become_line_feeds(file: Callable[..., Path]) -> None:
    path = file(json.dumps({"text": "a\r\nb\rc"}) + "\r\n", "a.jsonl")
    assert read_documents(path) == ["a\nb\nc"]


def test_marks_inside_joined_files_are_dropped(file: Callable[..., Path]) -> None:
    mark = codecs.BOM_UTF8
    joined = mark + b"one" + b"<|endoftext|>\n" + mark + b"two\n" + mark
    assert read_documents(file(joined)) == ["one", "two"]


@pytest.mark.parametrize("content", [b"", codecs.BOM_UTF8, b" \n\r\n ", codecs.BOM_UTF16_LE])
def test_an_empty_file_is_named_and_left_out(
    tmp_path: Path, file: Callable[..., Path], content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file(content, "empty.txt")
    assert "found 0" in failure("text", path, "--root", tmp_path / "data")
    assert f"{path}: no text" in capsys.readouterr().err


# ---- Documents ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "mark",
    ["<|endoftext|>", "<|end_of_text|>", "<|startoftext|>", "<|begin_of_text|>", "<|eos|>",
     "<|ENDOFTEXT|>", "<|eod|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "\0"],
)  # fmt: skip
@pytest.mark.parametrize("around", ["", "\n", "\r\n"])
def test_known_separators_separate_documents(
    file: Callable[..., Path], mark: str, around: str
) -> None:
    joined = f"{around}{mark}{around}".join(["one story", "two", "three"])
    assert read_documents(file(joined + mark)) == ["one story", "two", "three"]


def test_other_special_tokens_stay_text(file: Callable[..., Path]) -> None:
    text = "<|im_start|>user\nhello<|im_end|>\n<|assistant|> a<|b|>c x</s>y"
    assert read_documents(file(text)) == [text]


@pytest.mark.parametrize(
    "mark", ["\f", "</s>", "<s>", "<eos>", "<EOD>", "[SEP]", "[EOS]", "</doc>", "\x1e"]
)
def test_marks_that_may_separate_are_refused_with_the_option(
    file: Callable[..., Path], mark: str
) -> None:
    path = file(f"one story\n{mark}\ntwo\n{mark}three")
    message = refusal(path)
    option = repr(mark).strip("'")
    assert f"--separator '{option}'" in message and "--separator none" in message
    separated = Reading(separators=prepare_data.separators([option]))
    assert read_documents(path, separated) == ["one story", "two", "three"]
    whole = Reading(separators=prepare_data.separators(["none"]))
    assert read_documents(path, whole) == [path.read_text()]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["\\n"], ["a", "b</s>c", "<|endoftext|>d"]),
        (["\\n\\n"], ["a", "b</s>c\n<|endoftext|>d"]),
        (["</s>", "<|endoftext|>"], ["a\n\nb", "c", "d"]),
        (["none"], ["a\n\nb</s>c\n<|endoftext|>d"]),
    ],
)
def test_given_separators_replace_the_known_ones(
    file: Callable[..., Path], option: list[str], expected: list[str]
) -> None:
    path = file("a\r\n\r\nb</s>c\r\n<|endoftext|>d")
    assert read_documents(path, Reading(separators=prepare_data.separators(option))) == expected


def test_a_nul_byte_that_separates_nothing_is_refused(file: Callable[..., Path]) -> None:
    reading = Reading(separators=prepare_data.separators(["\\n"]))
    assert "NUL" in refusal(file("one\0two\nthree"), reading)


@pytest.mark.parametrize("option", ["", "\\", "\\x4", "\\q"])
def test_a_separator_that_means_nothing_is_refused(tmp_path: Path, option: str) -> None:
    message = failure("text", tmp_path, "--root", tmp_path, "--separator", option)
    assert "--separator" in message


LINES = [{"text": "first\nstory", "id": 1}, {"id": 2, "text": "second"}, {"text": " "}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.txt", "A.JSONL", "a.json", "a"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_json_lines_are_read_by_their_text_field(
    file: Callable[..., Path], name: str, end: str
) -> None:
    path = file(end.join(map(json.dumps, LINES)) + end, name)
    assert read_documents(path) == ["first\nstory", "second"]


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a.json.gz"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_by_its_text_field(
    file: Callable[..., Path], name: str, indent: int | None
) -> None:
    content = json.dumps(LINES, indent=indent).encode()
    path = file(gzip.compress(content) if name.endswith("gz") else content, name)
    assert read_documents(path) == ["first\nstory", "second"]


def test_json_strings_are_documents(file: Callable[..., Path]) -> None:
    assert read_documents(file('["one", "two"]', "a.json")) == ["one", "two"]
    assert read_documents(file('"one"\n"two"\n', "a.jsonl")) == ["one", "two"]


def test_another_field_can_be_named(file: Callable[..., Path]) -> None:
    path = file('{"content": "words", "text": "no"}\n', "a.jsonl")
    assert read_documents(path, Reading(field="content")) == ["words"]


def test_json_lines_keep_other_unicode_line_ends(file: Callable[..., Path]) -> None:
    path = file(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", "a.jsonl")
    assert read_documents(path) == ["a\u2028b\x85c"]


def test_separators_inside_json_text_separate_too(file: Callable[..., Path]) -> None:
    path = file(json.dumps({"text": "one<|endoftext|>two"}), "a.jsonl")
    assert read_documents(path) == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        ('{"text": "a"}\n{"content": "b", "id": 2}', "a.jsonl", "line 2: no field 'text', found"),
        ('{"text": "a"}\n{"content": "b", "id": 2}', "a.jsonl", "content, id"),
        ('{"text": "a"}\n{}', "a.jsonl", "found none"),
        ('{"text": null}', "a.jsonl", "line 1: field 'text' is null"),
        ('{"text": 7}', "a.jsonl", "line 1: field 'text' is a number"),
        ('{"text": ["a"]}', "a.jsonl", "line 1: field 'text' is an array"),
        ('{"text": "a"}\n\nplain words', "a.jsonl", "line 3: not JSON"),
        ('{"text": "a"}\n{"text": "b"}\nplain', "a.txt", "--format text"),
        ('{"text": "a"}\n7', "a.jsonl", "line 2: expected an object"),
        ('{"text": "\\ud800"}', "a.jsonl", "line 1: half a surrogate pair"),
        ("[" * 100_000, "a.jsonl", "line 1: not JSON"),
        ("[" * 100_000, "a.json", "not JSON"),
        ('[{"text": "a"}, {"body": "b"}]', "a.json", "item 2: no field 'text', found body"),
        ('[{"text": "a"}, 7]', "a.json", "item 2: expected an object"),
        ('{"rows": [{"text": "a"}],\n "n": 1}', "a.json", "rows, n"),
        ("plain words", "a.json", "not JSON"),
    ],
)
def test_json_mistakes_are_named_with_their_place(
    file: Callable[..., Path], content: str, name: str, expected: str
) -> None:
    assert expected in refusal(file(content, name))


def test_format_text_keeps_json_as_text(file: Callable[..., Path]) -> None:
    content = '{"text": "a"}\n{"text": "b"}'
    assert read_documents(file(content, "a.jsonl"), Reading(format="text")) == [content]


def test_text_in_brackets_is_no_json(file: Callable[..., Path]) -> None:
    for content in ('[Verse 1]\n"Hello"', '{"a": 1} is what it printed', '"Quoted," he said.', "7"):
        assert read_documents(file(content)) == [content]


def test_what_was_recognised_is_told(
    file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    read_documents(file("one<|endoftext|>two".encode("utf-16-le")))
    told = capsys.readouterr().err
    assert "UTF-16-LE" in told and "2 documents" in told and "<|endoftext|>" in told
    read_documents(file("one\ntwo"))
    assert capsys.readouterr().err == ""


# ---- Twins --------------------------------------------------------------------------------------
def story(seed: int, words: int = 120) -> str:
    """Words at random, so that two stories share no more than chance."""
    rng = random.Random(seed)
    return " ".join(f"{rng.choice('bdfglmnprst')}{rng.choice('aeiou')}{rng.randrange(900)}"
                    for _ in range(words))  # fmt: skip


def wrapped(text: str) -> str:
    words = text.split()
    return "\n".join(" ".join(words[i : i + 9]) for i in range(0, len(words), 9))


VARIANTS: dict[str, Callable[[str], str]] = {
    "letter case": str.upper,
    "repeated blanks": lambda text: text.replace(" ", "   "),
    "other line breaks": wrapped,
    "tabs": lambda text: text.replace(" ", "\t"),
    "no-break spaces": lambda text: text.replace(" ", "\u00a0"),
    "zero-width spaces": lambda text: text.replace("a", "a\u200b"),
    "punctuation": lambda text: text.replace(" ", ", ") + "!",
    "compatibility forms": lambda text: text.replace("fi", "\ufb01").replace("0", "\uff10"),
}


def together(*texts: str) -> bool:
    """Whether the first two texts are in one group among 50 others, which are alone."""
    documents = [*texts, *(story(1000 + i) for i in range(50))]
    groups = twin_groups(documents)
    assert sorted(i for group in groups for i in group) == list(range(len(documents)))
    assert all(len(group) == 1 for group in groups if min(group) > 1)
    return any({0, 1} <= set(group) for group in groups)


@pytest.mark.parametrize("words", [1, 2, 7, 120, 4000])
@pytest.mark.parametrize("change", VARIANTS)
def test_texts_of_the_same_words_are_twins(change: str, words: int) -> None:
    text = "fi10 " + story(1, words)
    assert together(text, VARIANTS[change](text))


def test_composed_and_decomposed_letters_are_twins() -> None:
    text = "caf\u00e9 na\u00efve"
    assert together(text, unicodedata.normalize("NFD", text))


def test_texts_without_words_are_twins_by_their_signs() -> None:
    assert together("\u2660 \u2663", "\u2660\n\u2663 ")
    assert not together("\u2660 \u2663", "\u2660 \u2661")


def replaced(text: str, share: float) -> str:
    rng = random.Random(5)
    words = text.split()
    for i in rng.sample(range(len(words)), int(share * len(words))):
        words[i] = f"w{i}"
    return " ".join(words)


@pytest.mark.parametrize("words", [60, 300, 5000])
def test_nearly_identical_texts_are_twins(words: int) -> None:
    text = story(1, words)
    assert together(text, replaced(text, 0.05))
    assert together(text, text + " " + story(2, words // 5))
    assert together(text, story(2, words // 5) + " " + text)
    assert together(text, " ".join(text.split()[: words // 2]))
    assert together(text, story(2, words) + " " + text)


@pytest.mark.parametrize("words", [60, 300, 5000])
def test_texts_that_share_a_part_are_no_twins(words: int) -> None:
    text = story(1, words)
    assert not together(text, story(2, words))
    assert not together(text, replaced(text, 0.5))
    shared = text.split()[: words // 4]
    assert not together(text, " ".join(shared) + " " + story(2, 3 * words // 4))


def test_twins_are_found_in_scripts_without_spaces() -> None:
    rng = random.Random(3)
    text = "".join(chr(rng.randrange(0x4E00, 0x9F00)) for _ in range(300))
    assert together(text, text[:150] + "\u4e00" + text[151:])
    assert not together(text, text[:60] + "".join(map(chr, range(0x5000, 0x5100))))


def test_twins_of_twins_are_one_group() -> None:
    texts = [story(1)]
    for i in range(12):
        words = texts[-1].split()
        texts.append(" ".join(words[6:] + story(100 + i, 6).split()))
    groups = twin_groups(texts + [story(50 + i) for i in range(20)])
    assert sorted(len(group) for group in groups) == [1] * 20 + [13]


def test_similarity_one_joins_only_the_same_words() -> None:
    text = story(1)
    groups = twin_groups([text, replaced(text, 0.05), text.upper()], similarity=1.0)
    assert sorted(map(sorted, groups)) == [[0, 2], [1]]


def test_a_thousand_copies_of_a_template_are_one_group() -> None:
    texts = [f"{story(1)} number {i}" for i in range(1000)] + [story(2)]
    assert sorted(map(len, twin_groups(texts))) == [1, 1000]


def test_groups_are_the_same_in_any_order() -> None:
    texts = [replaced(story(i // 3), 0.03 * (i % 3)) for i in range(60)]
    shuffled = random.Random(0).sample(texts, len(texts))
    parts = [
        {frozenset(g[i] for i in group) for group in twin_groups(g)} for g in (texts, shuffled)
    ]
    assert parts[0] == parts[1] and len(parts[0]) == 20


# ---- The split ----------------------------------------------------------------------------------
def split_texts(root: Path, *arguments: object) -> tuple[list[str], list[str]]:
    dataset, tokenizer = text_command(root, *arguments)
    return read_texts(dataset, "train", tokenizer), read_texts(dataset, "val", tokenizer)


def test_line_end_and_mark_twins_are_read_as_one_text(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(DOCUMENTS):
        (folder / f"{number}.txt").write_text(text, "utf-8", newline="\n")
        (folder / f"{number}_dos.txt").write_text(text, "utf-8-sig", newline="\r\n")
        (folder / f"{number}_wide.txt").write_text(text, "utf-16", newline="\r\n")
    train, val = split_texts(tmp_path, *folder.iterdir(), "--val-fraction", 0.2)
    assert sorted(train + val) == sorted(DOCUMENTS)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3])
def test_twins_land_on_one_side_of_the_split(
    tmp_path: Path, file: Callable[..., Path], fraction: float
) -> None:
    texts = [story(i, 40) for i in range(80)]
    changed = [text.upper() for text in texts] + [replaced(text, 0.05) for text in texts]
    path = file("\0".join(texts + changed))
    train, val = split_texts(tmp_path, path, "--val-fraction", fraction)
    first = {text: text.upper().split()[0] for text in train + val}
    sides = {first[text] for text in train} & {first[text] for text in val}
    assert not {side for side in sides if not side.startswith("W")}
    assert len(train) + len(val) == 240
    size = sum(map(len, val)) / sum(map(len, train + val))
    assert fraction / 2 < size <= fraction


def test_the_split_depends_on_the_texts_alone(tmp_path: Path, file: Callable[..., Path]) -> None:
    texts = [story(i, 40) for i in range(60)]
    one = file("\0".join(texts), "one.txt")
    two = [file(text, f"{i}.txt") for i, text in enumerate(reversed(texts))]
    assert split_texts(tmp_path / "a", one) == split_texts(tmp_path / "b", *two)


def test_the_summary_tells_copies_and_twins(
    tmp_path: Path, file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [story(i, 40) for i in range(60)]
    path = file("\0".join([*texts, texts[0], texts[1], texts[2].upper(), texts[2].title()]))
    split_texts(tmp_path, path)
    out = capsys.readouterr().out
    assert "twins  2 copies dropped; 3 documents in 1 group of near-identical ones" in out


def test_a_split_far_from_the_share_asked_is_refused(
    tmp_path: Path, file: Callable[..., Path]
) -> None:
    two = file(story(1, 300) + "\0" + story(2, 100))
    message = failure("text", two, "--root", tmp_path / "data", "--vocab", 300)
    assert "--val-fraction 0.05" in message and "0.26" in message and "--separator" in message
    tiny = file("\0".join([story(i, 500) for i in range(3)] + ["tiny"]))
    message = failure("text", tiny, "--root", tmp_path / "data", "--vocab", 300)
    assert "--val-fraction 0.34" in message
    assert not list((tmp_path / "data").glob("*/*")), "a failed command left output"


@pytest.mark.parametrize(
    ("sizes", "fraction"),
    [((13, 1717), 0.2), ((274, 435, 642, 5990, 26265), 0.5), ((554, 65342, 78138), 0.001),
     ((29, 71), 0.05), ((3, 900_000), 0.05), ((4, 42), 0.9)],
)  # fmt: skip
def test_the_share_that_a_refusal_names_is_accepted(
    sizes: tuple[int, ...], fraction: float
) -> None:
    documents = ["x" * size for size in sizes]

    def build(fraction: float) -> None:
        sides = prepare_data.split_documents(documents, int(fraction * sum(sizes)))
        prepare_data.check_share(*sides, fraction)

    with pytest.raises(prepare_data.DataError) as caught:
        build(fraction)
    named = float(str(caught.value).split("--val-fraction ")[-1])
    assert 0 < named < 1
    build(named)


def test_texts_that_are_all_twins_are_refused(tmp_path: Path, file: Callable[..., Path]) -> None:
    path = file("\0".join(f"{story(1)} number {i}" for i in range(50)))
    message = failure("text", path, "--root", tmp_path / "data", "--vocab", 300)
    assert "near-identical" in message and "--similarity 1" in message
    dataset, _ = text_command(tmp_path / "data", path, "--similarity", 1)
    assert dataset.exists()


@pytest.mark.parametrize("value", ["0", "1.01", "nan", "-1"])
def test_a_similarity_out_of_range_is_refused(tmp_path: Path, value: str) -> None:
    message = failure("text", tmp_path, "--root", tmp_path, f"--similarity={value}")
    assert "--similarity" in message
