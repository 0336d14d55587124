"""Claims about case marks: the transform, its bytes, the commands that use it, and the score."""

import re
import time

import pytest
import support  # noqa: F401
from hypothesis import example, given
from hypothesis import strategies as st

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
