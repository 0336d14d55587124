"""What the words say is what the files hold: numbers, commands, sizes, defaults, links."""

import ast
import dataclasses
import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from support import REPO, train_gpt

import record

SOURCE = (REPO / "train_gpt.py").read_text()
DOCSTRING = ast.get_docstring(ast.parse(SOURCE)) or ""
README = (REPO / "README.md").read_text()
USAGE = (REPO / "docs/USAGE.md").read_text()
PAGES = sorted([REPO / "README.md", *(REPO / "docs").glob("*.md")])
LOG = (REPO / "train.log").read_text()
SUBMISSION: dict[str, Any] = json.loads((REPO / "submission.json").read_text())
RECORDS = [REPO, REPO / "runs/frontier"]  # folders of several seeds
OLDER = [
    REPO / f"runs/{name}"
    for name in ("card_whole", "card_plain_cap", "frontier_whole", "frontier_rope_32")
]
# What that run overrides
P_TIME = {
    "train_batch_tokens": 98_304,
    "max_wallclock_seconds": 180.0,
    "muon_momentum": 0.95,
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def logged_settings() -> dict[str, Any]:
    """The resolved hyperparameters in the committed log, which follow its copy of the source."""
    text = LOG.split("=" * 80 + "\n", 1)[1]
    settings: dict[str, Any] = json.JSONDecoder().raw_decode(text)[0]
    return settings


def section(page: str, heading: str) -> str:
    """The text under a heading of the second level, up to the next one."""
    return page.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def table_rows(text: str) -> list[list[str]]:
    """Cells of every row of the tables in `text`, without head and rule."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = [i for i, row in enumerate(rows) if all(set(cell) <= set("-:") for cell in row)]
    return [row for i, row in enumerate(rows) if i not in rules and i + 1 not in rules]


def without_code(markdown: str) -> str:
    """`markdown` without fenced blocks and code spans, where brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S))


def anchors(page: Path) -> list[str]:
    """The anchors that GitHub gives the headings of a page."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings]


def broken_links(page: Path) -> list[str]:
    """Relative links of a page whose file or anchor does not exist."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if link.startswith(("http://", "https://")):
            continue

        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def literals(source: str) -> list[str]:
    """Every string of a program as its reader sees it, with `...` where a value is filled in."""

    class Collector(ast.NodeVisitor):
        def __init__(self) -> None:
            self.found: list[str] = []

        def visit_Expr(self, node: ast.Expr) -> None:
            if not isinstance(node.value, ast.Constant):  # docstrings are no messages
                self.visit(node.value)

        def visit_Constant(self, node: ast.Constant) -> None:
            if isinstance(node.value, str):
                self.found.append(node.value)

        def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
            parts = [p.value if isinstance(p, ast.Constant) else "..." for p in node.values]
            self.found.append("".join(map(str, parts)))
            for part in node.values:
                if isinstance(part, ast.FormattedValue):
                    self.visit(part)

    collector = Collector()
    collector.visit(ast.parse(source))
    return collector.found


# ---- The committed run ---------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_committed_run() -> None:
    """But for P-time's settings, which README's command sets."""
    settings = logged_settings()
    fields = dataclasses.fields(train_gpt.Hyperparameters)
    defaults = {field.name: field.default for field in fields} | P_TIME
    assert settings == defaults | {"seed": settings["seed"]}
    command = README.split("export TRAIN_BATCH_TOKENS=")[1].split(" torchrun")[0]
    for name, value in P_TIME.items():
        assert f"{name.upper()}={value:g}" in f"TRAIN_BATCH_TOKENS={command}"


@pytest.mark.parametrize("folder", RECORDS + OLDER, ids=lambda folder: folder.name)
def test_the_committed_submission_is_that_of_the_committed_results(folder: Path) -> None:
    """Byte for byte: `python record.py FOLDER` writes it again, on any day."""
    found = record.submission(folder, env={}, log=lambda line: None)
    assert found == (folder / "submission.json").read_text()


@pytest.mark.parametrize("folder", RECORDS, ids=["card", "frontier"])
def test_each_seed_has_the_log_of_its_result(folder: Path) -> None:
    """train.log is that of the newest seed, as the program leaves it."""
    report = json.loads((folder / "submission.json").read_text())
    for seed, row in report["seed_results"].items():
        log = (folder / f"train_seed{seed}.log").read_text()
        sliding = re.search(r"^final_int6_zstd_sliding_exact .*val_bpb:(\S+)", log, re.M)
        plain = re.search(r"^final_int6_zstd_roundtrip_exact .*val_bpb:(\S+)", log, re.M)
        assert sliding and float(sliding[1]) == pytest.approx(row["val_bpb"], abs=1e-8)
        assert plain and float(plain[1]) == pytest.approx(row["val_bpb_roundtrip"], abs=1e-8)
        assert f"bytes_total:{row['artifact_bytes']} " in log
        assert f" seed:{seed} " in log and " graphs_compiled_on_clock:0" in log
    newest = folder / f"train_seed{report['seeds'][-1]}.log"
    assert (folder / "train.log").read_text() == newest.read_text()
    assert report["artifact_bytes_max"] < 16_000_000
    assert report["dataset"] in ("proxy", "fineweb10B_sp1024")


def test_the_logs_hold_the_source_that_ran() -> None:
    for folder in RECORDS:
        report = json.loads((folder / "submission.json").read_text())
        source = (folder / "train.log").read_text().split("\n" + "=" * 80, 1)[0]
        assert hashlib.sha256(source.encode()).hexdigest() == report["code_sha256"]


@pytest.mark.parametrize("text", [README, DOCSTRING], ids=["README", "docstring"])
def test_the_result_in_words_is_the_submission(text: str) -> None:
    for key in ("val_bpb", "val_bpb_roundtrip"):
        assert f"{SUBMISSION[key]:.4f}" in text, key
    assert f"{SUBMISSION['artifact_bytes_max']:,}" in text
    assert SUBMISSION["dataset"] in text


def test_the_picture_of_the_readme_is_there_and_small() -> None:
    (picture,) = re.findall(r"!\[[^\]]*\]\((\S+)\)", README)
    assert 10_000 < (REPO / picture).stat().st_size < 150_000


# ---- Commands, names, settings and messages ------------------------------------------------------


def test_ci_calls_the_test_command_of_the_readme() -> None:
    command = next(line for line in README.splitlines() if "pytest" in line)
    assert command in (REPO / ".ci" / "run").read_text().splitlines()


def test_ci_checks_format_lint_and_types() -> None:
    lines = (REPO / ".ci" / "run").read_text().splitlines()
    assert {"ruff format --check .", "ruff check .", "mypy"} <= set(lines)


def test_every_name_in_the_table_of_techniques_exists() -> None:
    rows = table_rows(section(USAGE, "Where each technique is"))
    names = [name for _, cell, _ in rows for name in re.findall(r"`([\w.]+)`", cell)]
    assert len(names) > 25

    absent = []
    for name in names:
        value: Any = train_gpt
        for attribute in name.split("."):
            value = getattr(value, attribute, None)
        if value is None:
            absent.append(name)
    assert absent == []


def test_every_default_in_the_table_of_settings_holds() -> None:
    fields = dataclasses.fields(train_gpt.Hyperparameters)
    defaults: dict[str, Any] = {field.name.upper(): field.default for field in fields}
    named: dict[str, str] = {}
    for variables, values, _ in table_rows(section(USAGE, "Settings")):
        names = re.findall(r"`([A-Z_]+)`", variables)
        named |= dict(zip(names, values.split(", "), strict=True))
    assert len(named) > 15

    wrong = {}
    for name, text in named.items():
        kind = type(defaults[name])
        if kind(text) != defaults[name]:
            wrong[name] = text
    assert wrong == {}


def test_every_message_in_the_table_is_one_of_the_program() -> None:
    system = {os.strerror(errno.ENOSPC), os.strerror(errno.EACCES), "CUDA out of memory"}
    rows = table_rows(section(USAGE, "Messages and remedies"))
    messages = [message for cell, _ in rows for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 20

    texts = literals(SOURCE) + literals((REPO / "record.py").read_text())
    absent = []
    for message in messages:
        pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.S)
        if message not in system and not any(map(pattern.search, texts)):
            absent.append(message)
    assert absent == []


# ---- Pages ---------------------------------------------------------------------------------------


@each_page
def test_every_relative_link_and_anchor_resolves(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_or_anchor_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One, `two`: it's 3\n[a](#one-two-its-3) [b](#two) [c](none.md) [d](page.md#one)\n"
        "`[code](none.md)` [e](page.md) [web](https://example.org/none)\n"
        "```\n# no heading\n[f](none.md)\n```\n[g](#no-heading)\n"
    )
    assert broken_links(page) == ["#two", "none.md", "page.md#one", "#no-heading"]


@each_page
def test_no_two_headings_of_a_page_share_an_anchor(page: Path) -> None:
    found = anchors(page)
    assert len(found) == len(set(found)) > 3


@each_page
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    pattern = r"\b(?:bench|tests|docs|runs)/[\w./]*\w\.(?:py|md|log|json|txt)\b"
    named = set(re.findall(pattern, page.read_text()))
    assert [name for name in sorted(named) if not (REPO / name).exists()] == []


@each_page
def test_every_table_is_one_to_a_renderer(page: Path) -> None:
    lines = [line.strip() for line in page.read_text().splitlines()]
    starts = [i for i, line in enumerate(lines) if line.startswith("|---")]
    assert len(starts) > 0
    for rule in starts:
        assert lines[rule - 2] == "", f"no blank line before: {lines[rule - 1]}"
        cells = lines[rule].count("|")
        for line in lines[rule - 1 :]:
            if not line.startswith("|"):
                break
            assert line.count("|") == cells, line


def test_every_technique_of_the_summary_links_to_its_screen() -> None:
    rows = table_rows(section((REPO / "docs/ABLATIONS.md").read_text(), "Summary"))
    techniques = [row for row in rows if any(row[1:])]  # the others are titles within the table
    assert len(techniques) > 40
    for name, effect, _, _, verdict, screen in techniques:
        assert name and effect and verdict, name
        assert re.search(r"\]\((RESULTS\.md|LADDER\.md)?#[\w-]+\)", screen), name


# ---- The program ---------------------------------------------------------------------------------


def test_no_line_of_the_program_is_over_100_characters() -> None:
    assert max(map(len, SOURCE.splitlines())) <= 100


def test_the_docstring_maps_every_section_in_order() -> None:
    banners = re.findall(r"^# ---- (\d+)\. (.+?) -+$", SOURCE, re.M)
    numbers = [int(number) for number, _ in banners]
    assert len(numbers) > 10
    assert numbers[0] in (0, 1)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))

    section_map = re.split(r"\bSections\b[^:]*:", DOCSTRING)[1].split("Shapes:")[0]
    mapped = re.findall(r"\b(\d+)\.?\s+(\w+)", section_map)
    assert [n for n, _ in mapped] == [n for n, _ in banners]
    for (number, banner), (_, word) in zip(banners, mapped, strict=True):
        words = re.findall(r"\w+", banner.lower())
        assert word.lower() in words, f"section {number}: {banner}, in the map: {word}"
