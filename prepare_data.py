"""Make token shards and a SentencePiece model for train_gpt.py.

    python prepare_data.py sample                     built-in corpus, no download, seconds
    python prepare_data.py text FILE... --name NAME   your own text
    python prepare_data.py fineweb --vocab 1024       the challenge's published FineWeb shards

All three write the challenge's layout under --root:

    datasets/<name>_sp<vocab>/fineweb_{train,val}_NNNNNN.bin
    tokenizers/<name>_<vocab>_bpe.model

A shard is 256 little-endian int32 (magic 20240520, version 1, token count, zeros) followed by that
many uint16 token ids; every document starts with the BOS id 1. Beside the shards, manifest.json
states what they hold, of which tokenizer (describe() has its form). What exists is whole, because
it appears by a rename, and a lock per root makes concurrent commands take turns.

`text` reads UTF-8, and UTF-16 or UTF-32 that can be told for certain, plain or packed by gzip, xz,
bzip2 or zstd. A file is one document, or several between `<|endoftext|>` and its like or NUL bytes;
JSON lines and a JSON array are a document an item. Near-identical documents stay on one side of the
split. All text is held in memory.

With `--case-marks` the text is marked before it is encoded: mark_case() has the rules. Bytes stay
those of the original text. `fineweb` then decodes the published shards and writes its own.
"""

import sys

if sys.platform == "win32":  # where fcntl, the module of locks, is missing
    sys.exit("prepare_data: needs Linux or macOS, found win32; on Windows, run it under WSL")

import argparse
import ast
import bz2
import codecs
import dataclasses
import errno
import fcntl
import gzip
import hashlib
import importlib.util
import inspect
import io
import json
import lzma
import math
import os
import re
import shlex
import shutil
import sysconfig
import tempfile
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import zstandard
from numpy.typing import NDArray

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3  # as in the challenge's tokenizers
MAX_VOCAB = 65_535
SHARD_TOKENS = 100_000_000
ENCODE_BATCH = 512  # documents per SentencePiece call; bounds the Python lists of ids
ENCODE_BYTES = 4_000_000  # and their text
SPACE = "\u2581"  # how SentencePiece spells a space
MANIFEST_VERSION = 2

# Raise the number with every change of the recipe, lest an older sample pass for the new one. A
# package upgrade leaves a sample that is already built in place.
SAMPLE_SOURCE = "prepare_data built-in sample, recipe 1"
SAMPLE_PACKAGES = ("numpy", "networkx", "torch", "sentencepiece", "zstandard")
SAMPLE_SKIP = {  # tests, vendored copies, and folders slow to parse for little prose
    "site-packages", "dist-packages", "test", "tests", "testing", "_vendor", "idlelib", "lib2to3",
    "encodings", "ensurepip", "pydoc_data", "turtledemo", "_numpy", "_inductor", "_dynamo", "onnx",
    "ao", "distributed", "fx",
}  # fmt: skip
SAMPLE_BYTES, SAMPLE_VAL_BYTES = 8_000_000, (300_000, 500_000)  # val: 60k to 250k tokens
MIN_DOCSTRING = 200  # characters; most shorter ones are one-line summaries
SAMPLE_TOKENIZER_BYTES, TEXT_TOKENIZER_BYTES = 2_500_000, 128_000_000

REPO_ENV = "MATCHED_FINEWEB_REPO_ID"  # the variable that the challenge's own downloader reads
FINEWEB_REPOS = {  # 1024 is the challenge's export, the others a participant's in the same layout
    1024: "willdepueoai/parameter-golf",
    4096: "kevclark/parameter-golf",
    8192: "kevclark/parameter-golf",
}

# Raise the number with every change of what a text becomes: older datasets are then refused.
TEXT_SOURCE = "text recipe 3"
CASE_SOURCE = "case marks recipe 2"
TWIN_FACTS = ("copies", "documents", "groups")  # of the manifest's entry `twins`

# ---- Input: how a file is told and read
MARKS = (  # byte order marks; UTF-16's little-endian one begins UTF-32's, which comes first
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
UNMARKED = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")  # tried where UTF-8 cannot be
CONTROLS = bytes([*range(1, 9), *range(14, 28), 127])  # all but blanks and separators
CONTROL_SHARE = 1 / 1000  # of a file's bytes; UTF-16 of any script and binaries have far more
# No list of documents: ASCII letters in UTF-16 or UTF-32, a file system's padding.
NUL_PATTERN = re.compile(rb"\0[^\0]\0[^\0]\0|\0\0\0", re.DOTALL)
ASCII_RUN = re.compile(rb"[\t\n\r -~]{8,}")
PACKED = {  # suffix -> first bytes, name
    ".gz": (re.compile(rb"\x1f\x8b"), "gzip"),
    ".xz": (re.compile(rb"\xfd7zXZ\0"), "xz"),
    ".bz2": (re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), "bzip2"),
    ".zst": (re.compile(rb"\x28\xb5\x2f\xfd"), "zstd"),
}
CONTAINERS = (  # first bytes -> what holds text that must be taken out of it first
    (re.compile(rb"PK\x03\x04"), "a ZIP archive or office document"),
    (re.compile(rb"%PDF-"), "a PDF document"),
    (re.compile(rb"PAR1"), "a Parquet table"),
    (re.compile(rb"ARROW1"), "an Arrow table"),
    (re.compile(rb".{257}ustar", re.DOTALL), "a tar archive"),
)
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx")
JSON_LINES = (".jsonl", ".ndjson")
KNOWN_SEPARATOR = re.compile(  # of documents, in the exports of the usual tokenizers
    r"\0|<[|\uff5c](?:(?:end|start|begin)[_\u2581 ]?of[_\u2581 ]?(?:text|document|sentence)"
    r"|eos|bos|eod|eot|doc|document|sep|separator)[|\uff5c]>",
    re.IGNORECASE,
)
UNSURE = r"\f|[\x1c-\x1f]|</?s>|</doc>|<(?:eos|bos|eod|eot)>|\[(?:eos|bos|eod|sep|cls)\]"
UNSURE_SEPARATOR = re.compile(f"^(?:{UNSURE})|(?:{UNSURE})$", re.IGNORECASE | re.MULTILINE)
ESCAPE = r"\\(?:[0nrtf\\]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})"

# ---- Twins: what near-identical means
SHINGLE = 3  # words in a row
SIMILAR = 0.5  # Jaccard similarity of two documents' sets of shingles
CONTAINED = 0.8  # share of the shorter one's shingles that the longer one has too
CONTAINED_LEAST = 16  # sampled shingles: a shorter text is contained in others by chance
SKETCH = 128  # lowest shingle hashes kept of a document
SKETCH_CHARACTERS = 16_000_000  # of a document that are looked at
TWIN_CHUNK, TWIN_BLOCK = 4_000_000, 1 << 14  # characters hashed, pairs compared at a time
UNSPACED = (  # scripts that put no space between words: there a character is a word
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = re.compile(f"[{UNSPACED}]|[^\\W_{UNSPACED}]+")
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]+")
BYTE_HASHES: NDArray[np.uint64] = np.frombuffer(  # by offset in the word, modulo 64, and byte
    hashlib.shake_256(b"prepare_data twins").digest(64 * 256 * 8), dtype="<u8"
).reshape(64, 256)
ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)


# ---- Case marks: ASCII capitals become a mark and the small letter, so that words have no twins
CASE_LETTER, CASE_WORD, CASE_ESCAPE = "\ue001", "\ue002", "\ue004"  # of no bytes in train_gpt.py
# A run of capitals is a word unless a small letter follows, which belongs to the last of them.
CAPITALS = re.compile("[A-Z](?:[A-Z]+(?![a-z]))?")
CASE_ESCAPED = re.compile(f"[\ue001-\ue004{SPACE}]")  # U+E003 is a mark of other tokenizers
CASE_MARKED = re.compile(f"[{CASE_LETTER}{CASE_WORD}{CASE_ESCAPE}](?:[a-z]+|[0-9a-f]{{3}})?")
CASE_CODES = {f"{ord(c) & 0xFFF:03x}": c for c in f"\ue001\ue002\ue003\ue004{SPACE}"}


class DataError(SystemExit):
    """A problem the caller can fix: uncaught, it prints its one line and exits with status 1."""

    def __init__(self, message: str) -> None:
        super().__init__("prepare_data: " + re.sub(r"[\r\n]+", " ", message))


class Parts(NamedTuple):
    """What a corpus is made of."""

    train: Iterable[str]  # documents
    val: Iterable[str]
    model: bytes  # the serialised tokenizer
    given: Path | None = None  # the tokenizer's file, if it is the user's
    twins: dict[str, int] | None = None  # TWIN_FACTS, of a user's text


class Facts(NamedTuple):
    """What manifest.json states of a shard, its number of documents and largest token id."""

    file: str
    tokens: int
    sha256: str
    documents: int
    largest: int


@dataclass(frozen=True)
class Reading:
    """How files become documents."""

    format: str = "auto"  # auto | text | jsonl | json
    field: str = "text"  # of a JSON object
    separators: tuple[str, ...] | None = None  # None: the known ones


Check = Callable[[str, int, list[str], list[list[int]]], None]  # split, first, documents, ids


def note(line: str) -> None:
    """Tell what was recognised; standard output is for the summary and the export line."""
    with suppress(OSError):  # standard error may have gone with its terminal
        print(f"prepare_data: {line}", file=sys.stderr)


def digest(text: bytes | str) -> str:
    """Return 32 hex digits that identify `text`."""
    return blake2b(text.encode() if isinstance(text, str) else text, digest_size=16).hexdigest()


def utf8_len(text: str) -> int:
    return len(text.encode())


def mark_capitals(match: re.Match[str]) -> str:
    run = match[0]
    return (CASE_WORD if len(run) > 1 else CASE_LETTER) + run.lower()


def mark_case(text: str) -> str:
    """Return `text` without ASCII capitals, from which restore_case() returns it; never raises.

    CASE_LETTER stands for "the next letter is a capital", CASE_WORD for "the next letters are", as
    many as follow. A mark stands before the space of its word: " The" becomes a mark and " the",
    so one piece serves both. CASE_ESCAPE stands before a space that begins the text, and before
    three hexadecimal digits, which spell a mark of the text or U+2581: these have three bytes as
    well. So the UTF-8 bytes of `text` are those of the result without its marks.
    """
    if not text.isascii():
        text = CASE_ESCAPED.sub(lambda match: f"{CASE_ESCAPE}{ord(match[0]) & 0xFFF:03x}", text)
    marked = CAPITALS.sub(mark_capitals, text)
    for mark in (CASE_LETTER, CASE_WORD):
        marked = marked.replace(f" {mark}", f"{mark} ")
    return CASE_ESCAPE + marked if marked.startswith(" ") else marked


def restore_marked(match: re.Match[str]) -> str:
    mark, rest = match[0][0], match[0][1:]
    if mark == CASE_ESCAPE:
        return CASE_CODES.get(rest[:3], "") + rest[3:]
    return rest.upper() if mark == CASE_WORD else rest[:1].upper() + rest[1:]


def restore_case(marked: str) -> str:
    """Return the text of which `marked` is mark_case(); ValueError if there is none."""
    text = marked.removeprefix(CASE_ESCAPE) if marked.startswith(f"{CASE_ESCAPE} ") else marked
    for mark in (CASE_LETTER, CASE_WORD):
        text = text.replace(f"{mark} ", f" {mark}")
    text = CASE_MARKED.sub(restore_marked, text)
    if mark_case(text) != marked:
        raise ValueError(f"{marked[:40]!r}...: not the case-marked form of a text")
    return text


def open_model(path: Path) -> Any:
    """Return a processor; not by the path, which SentencePiece takes in UTF-8 alone."""
    return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())


def has_case_marks(processor: Any) -> bool:
    """Tell whether the marks are pieces of a tokenizer, as train_gpt.py does."""
    marks = [CASE_LETTER, CASE_WORD, CASE_ESCAPE]
    return bool(processor.id_to_piece(processor.piece_to_id(marks)) == marks)


def write_shard(path: Path, tokens: NDArray[np.uint16]) -> None:
    """Write `tokens`, shape (n,), behind the 256-int header."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def count_tokens(path: Path) -> int:
    """Return the token count in a shard's header; DataError unless magic and file size agree."""
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4")
    size, expected = path.stat().st_size, HEADER_BYTES + 2 * int(header[2])
    if tuple(header[:2]) != (MAGIC, VERSION) or size != expected:
        raise DataError(
            f"{path}: not a whole shard: expected magic {MAGIC}, version {VERSION}, {expected} "
            f"bytes, found {header[0]}, {header[1]}, {size}; delete it and run this again"
        )
    return int(header[2])


def shard_facts(path: Path) -> Facts:
    """Measure a shard; DataError or OSError unless it is a whole one."""
    count = count_tokens(path)
    content = path.read_bytes()
    tokens = np.frombuffer(content, dtype="<u2", offset=HEADER_BYTES)
    documents = int(np.count_nonzero(tokens == BOS_ID))
    largest = int(tokens.max(initial=0))
    return Facts(path.name, count, hashlib.sha256(content).hexdigest(), documents, largest)


def shard_paths(dataset: Path, split: str) -> list[Path]:
    """Return the shards of `split`, without fineweb_val_bytes_*.bin, which hold no tokens."""
    return sorted(dataset.glob(f"fineweb_{split}_{'[0-9]' * 6}.bin"))


def describe(
    dataset: Path,
    model: bytes,
    file: str,
    sizes: dict[str, int | None],
    known: dict[str, Facts] | None = None,
) -> dict[str, Any]:
    """Return the manifest of `dataset` but for its source, measured on the files.

    {"version": 2, "tokenizer": {"file", "sha256", "vocab_size"}, "splits": {"train" and "val":
    {"documents", "bytes", "tokens", "shards": [{"file", "tokens", "sha256"}]}}}

    `bytes` are the UTF-8 bytes of the split's text from `sizes`, None where nobody counted them;
    `tokens` include a BOS for each of the `documents`. `file` is the name of the tokenizer, `known`
    holds shards that were measured before, by name. A tokenizer of case-marked text has
    "case_marks": true; `bytes` are of the text before it was marked.
    """
    splits: dict[str, Any] = {}
    for split, size in sizes.items():
        paths = shard_paths(dataset, split)
        shards = [(known or {}).get(path.name) or shard_facts(path) for path in paths]
        splits[split] = {
            "documents": sum(shard.documents for shard in shards),
            "bytes": size,
            "tokens": sum(shard.tokens for shard in shards),
            "shards": [
                {"file": shard.file, "tokens": shard.tokens, "sha256": shard.sha256}
                for shard in shards
            ],
        }
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer: dict[str, Any] = {
        "file": file,
        "sha256": hashlib.sha256(model).hexdigest(),
        "vocab_size": processor.vocab_size(),
    }
    if has_case_marks(processor):
        tokenizer["case_marks"] = True
    return {"version": MANIFEST_VERSION, "tokenizer": tokenizer, "splits": splits}


def write_manifest(dataset: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json into `dataset`, whole or not at all."""
    temporary = dataset / "manifest.json.tmp"
    with open(temporary, "w") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, dataset / "manifest.json")


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yield `documents` in order, at most ENCODE_BATCH or some ENCODE_BYTES at a time."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if len(batch) == ENCODE_BATCH or size >= ENCODE_BYTES:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def write_split(
    folder: Path, split: str, documents: Iterable[str], processor: Any, check: Check | None = None
) -> int:
    """Encode `documents` into the shards of `split` in `folder`; return their UTF-8 bytes.

    Every shard but the last has SHARD_TOKENS tokens, so a document may continue in the next one.
    `check` sees all documents with their ids, which begin with BOS. A tokenizer with case marks
    encodes what mark_case() makes of them.
    """
    pending: list[NDArray[np.uint16]] = []
    held = shards = done = size = 0
    case_marked = has_case_marks(processor)

    def flush(tokens: NDArray[np.uint16]) -> None:
        nonlocal shards
        write_shard(folder / f"fineweb_{split}_{shards:06d}.bin", tokens)
        shards += 1

    for batch in batches(documents):
        texts = list(map(mark_case, batch)) if case_marked else batch
        ids = processor.encode(texts, add_bos=True)
        if check:
            check(split, done, batch, ids)
        done += len(batch)
        size += sum(map(utf8_len, batch))
        pending.append(np.fromiter(chain.from_iterable(ids), dtype=np.uint16))
        held += pending[-1].size
        if held >= SHARD_TOKENS:
            tokens = np.concatenate(pending)
            whole = held - held % SHARD_TOKENS
            for start in range(0, whole, SHARD_TOKENS):
                flush(tokens[start : start + SHARD_TOKENS])
            pending = [tokens[whole:]]
            held -= whole
    if held:
        flush(np.concatenate(pending))
    return size


def comes_back(processor: Any, documents: list[str], ids: list[list[int]]) -> bool:
    """Tell whether `ids`, each with BOS in front, decode to `documents`, their case restored."""
    texts = processor.decode([own[1:] for own in ids])
    if not has_case_marks(processor):
        return bool(texts == documents)
    try:
        return list(map(restore_case, texts)) == documents
    except ValueError:
        return False


def byte_table(tokenizer: Path, vocab_size: int) -> Any:
    """Return train_gpt.py's table of the bytes of each token; DataError if there is none."""
    try:  # late, because train_gpt.py imports this module and takes seconds
        from train_gpt import RunError, load_byte_table
    except ImportError as error:
        raise DataError(
            f"train_gpt.py, which counts bytes, cannot be imported: {error}; run: pip install -r "
            "requirements.txt"
        ) from error
    try:
        return load_byte_table(str(tokenizer), vocab_size)
    except RunError as error:
        raise DataError(f"{tokenizer}: its bytes cannot be counted: {error}") from error


def byte_check(tokenizer: Path, vocab_size: int) -> Check:
    """Return a check that train_gpt.py counts the bytes of each document, which ends bpb's errors.

    Validation documents must also decode to themselves: else another text would be scored.
    DataError if the tokenizer cannot be counted.
    """
    table = byte_table(tokenizer, vocab_size)
    processor = open_model(tokenizer)

    def fault(split: str, text: str, ids: list[int]) -> str:
        size = utf8_len(text)
        counted = table.count(np.array(ids, dtype=np.uint16))
        if counted != size:
            return f"of {size} bytes, train_gpt.py counts {counted}"
        if split == "val" and not comes_back(processor, [text], [ids]):
            return f"of {size} bytes, decodes to another text"
        return ""

    def check(split: str, first: int, documents: list[str], ids: list[list[int]]) -> None:
        tokens = np.fromiter(chain.from_iterable(ids), dtype=np.uint16)
        exact = table.count(tokens) == sum(map(utf8_len, documents))
        if exact and (split == "train" or comes_back(processor, documents, ids)):
            return
        for number, (text, own) in enumerate(zip(documents, ids, strict=True), first + 1):
            if found := fault(split, text, own):
                raise DataError(
                    f"{tokenizer}: {split} document {number} ({text[:40]!r}...), {found}; use a "
                    "tokenizer that neither normalises nor drops anything, or have one trained"
                )
        raise DataError(f"{tokenizer}: {split} documents from {first + 1} on: byte counts differ")

    return check


def clean(text: str) -> str:
    """Return `text` as a document that the tokenizers trained here decode back exactly.

    Outer whitespace goes because byte accounting has no token to charge a space right after BOS
    to. U+2581 is how SentencePiece spells a space, so it would come back as one anyway.
    """
    return text.replace("\u2581", " ").strip()


def in_hash_order(documents: list[str]) -> list[str]:
    """Return the distinct documents in an order that depends on their text alone."""
    return sorted(set(documents), key=digest)


def split_documents(
    documents: list[str], val_bytes: int, groups: list[list[int]] | None = None
) -> tuple[list[str], list[str]]:
    """Split distinct documents into (train, val), val at most `val_bytes` long if any fits.

    `groups` of indices, by default each document alone, stay on one side. Those that come first
    are tried first.
    """
    sizes = [utf8_len(text) for text in documents]
    groups = groups or [[i] for i in range(len(documents))]
    group_sizes = [sum(sizes[i] for i in group) for group in groups]
    chosen: set[int] = set()
    for group, size in zip(groups, group_sizes, strict=True):
        if size <= val_bytes:
            chosen.update(group)
            val_bytes -= size
    if not chosen:
        chosen.update(groups[int(np.argmin(group_sizes))])
    train = [text for i, text in enumerate(documents) if i not in chosen]
    val = [text for i, text in enumerate(documents) if i in chosen]
    return train, val


def docstrings(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings in a module or class, and the texts passed to its bare calls.

    The calls matter because torch and numpy document their C functions by add_docstr(name, text).
    """
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
        for child in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
            yield from docstrings(child)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        for part in chain.from_iterable(map(ast.walk, node.value.args)):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield inspect.cleandoc(part.value)


def module_texts() -> Iterator[list[str]]:
    """Yield the texts of each help topic and of each module, in a fixed order."""
    yield from ([text] for _, text in sorted(topics.items()))
    roots = [Path(sysconfig.get_path("stdlib"))]
    specs = map(importlib.util.find_spec, SAMPLE_PACKAGES)
    roots += [Path(spec.origin).parent for spec in specs if spec and spec.origin]
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if SAMPLE_SKIP.isdisjoint(path.relative_to(root).parts):
                try:
                    yield list(docstrings(ast.parse(path.read_bytes())))
                except (SyntaxError, ValueError):  # deliberately broken sources and templates
                    continue


def tidy(text: str) -> str:
    """Turn a docstring into running text: no indentation, aligned columns or runs of blank lines.

    Lone surrogates and NULs, which some docstrings hold, cannot be part of a UTF-8 document.
    """
    text = text.encode("utf-8", "ignore").decode().replace("\0", "")
    text = "\n".join(" ".join(line.split()) for line in text.splitlines())
    return clean(re.sub(r"\n{3,}", "\n\n", text))


def sample_parts(vocab_size: int) -> Parts:
    """Return the sample's parts: a document for each module, and no docstring twice."""
    seen: set[str] = set()
    documents: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in sources that are only read
        for texts in module_texts():
            tidied = dict.fromkeys(tidy(text) for text in texts if len(text) >= MIN_DOCSTRING)
            fresh = [text for text in tidied if len(text) >= MIN_DOCSTRING and text not in seen]
            seen.update(fresh)
            documents += ["\n\n".join(fresh)] if fresh else []
    ordered = in_hash_order(documents)
    ends = np.cumsum([utf8_len(text) for text in ordered])
    kept = int(np.searchsorted(ends, SAMPLE_BYTES, side="right"))
    val_bytes = int(np.clip(ends[kept - 1] // 20, *SAMPLE_VAL_BYTES))
    train, val = split_documents(ordered[:kept], val_bytes)
    # Its text has spaces enough: requiring their piece would change nothing but the model's bytes.
    model = train_tokenizer(train, vocab_size, SAMPLE_TOKENIZER_BYTES, required="")
    return Parts(train, val, model)


def unzstd(packed: bytes) -> bytes:
    """Return what all frames of a zstd file hold; EOFError if the last is cut."""
    texts = []
    while packed:
        frame = zstandard.ZstdDecompressor().decompressobj()
        texts.append(frame.decompress(packed))
        if not frame.eof:
            raise EOFError("it ends before its last frame does")
        packed = frame.unused_data
    return b"".join(texts)


def read_unpacked(path: Path) -> tuple[bytes, str]:
    """Return (content, suffix of the name), both without compression.

    The content tells how it is packed, whatever the name. DataError if it cannot be read.
    """
    unpack: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.decompress, ".xz": lzma.decompress, ".bz2": bz2.decompress, ".zst": unzstd,
    }  # fmt: skip
    suffixes = [suffix.lower() for suffix in path.suffixes]
    try:
        content = path.read_bytes()
        if suffixes and suffixes[-1] in PACKED:
            head, kind = PACKED[suffixes.pop()]
            if not head.match(content):
                raise ValueError(f"not a {kind} file")
        for suffix, (head, _) in PACKED.items():
            if head.match(content):
                content = unpack[suffix](content)
                break
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as e:
        reason = getattr(e, "strerror", None) or e
        raise DataError(f"{path}: cannot be read: {reason}; check the path and file") from e
    return content, suffixes[-1] if suffixes else ""


def check_container(path: Path, content: bytes, is_table: bool) -> None:
    """DataError if `content` is a format that holds text, or tokens, in its own way."""
    header = np.frombuffer(content[:HEADER_BYTES].ljust(8, b"\0")[:8], dtype="<i4")
    if tuple(header) == (MAGIC, VERSION):
        raise DataError(f"{path}: a token shard, not text; train_gpt.py reads it as it is")
    kinds = [kind for head, kind in CONTAINERS if head.match(content)]
    if is_table and not kinds:
        kinds = ["a table by its name"]
    if kinds:
        raise DataError(
            f"{path}: {kinds[0]}; take its texts out first, for instance into a .jsonl file of "
            'lines {"text": ...}' + ", or set --format text" * (kinds[0] == "a table by its name")
        )


def flaw(content: bytes) -> str:
    """Say where `content` shows that it is no UTF-8 text; "" if it does not."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"byte 0x{content[error.start]:02x} at offset {error.start}"
    controls = len(content) - len(content.translate(None, CONTROLS))
    if controls > CONTROL_SHARE * len(content):
        first = next(i for i, byte in enumerate(content) if byte in CONTROLS)
        return f"control character 0x{content[first]:02x} at offset {first}"
    if found := NUL_PATTERN.search(content):
        return f"NUL bytes at offset {found.start()}"
    return ""


def decode_unmarked(content: bytes, encoding: str) -> str | None:
    """Return the text if `content` is `encoding` beyond doubt, else None.

    Every character is assigned, one in twenty is ASCII (of the other byte order's, none is), and
    UTF-16 holds no stretch of plain ASCII bytes, which would be Chinese characters there.
    """
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        return None
    if "\0" in text or flaw(text.encode()) or 20 * len(text.encode("ascii", "ignore")) < len(text):
        return None
    if not {"Cn", "Co"}.isdisjoint(map(unicodedata.category, set(text))):
        return None
    if encoding.startswith("utf-16"):
        units = np.frombuffer(content, dtype="<u2" if encoding.endswith("le") else ">u2")
        wide = 2 * int(np.count_nonzero(units >= 256))
        runs = list(map(len, ASCII_RUN.findall(content)))
        if max(runs, default=0) >= 64 or sum(runs) > 0.8 * wide:
            return None
    return text


def decode(path: Path, content: bytes) -> tuple[str, str]:
    """Return (text, encoding) without a byte order mark; DataError unless both are certain."""
    remedy = "convert it: iconv -f ITS_ENCODING -t UTF-8"
    for mark, encoding in MARKS:
        if content.startswith(mark):
            try:
                text = content[len(mark) :].decode(encoding)
            except UnicodeDecodeError as error:
                start = error.start + len(mark)
                raise DataError(
                    f"{path}: expected {encoding.upper()} by its byte order mark, found byte "
                    f"0x{content[start]:02x} at offset {start}; {remedy}"
                ) from error
            if found := flaw(text.encode()):
                what = found.split(" at ")[0]
                raise DataError(f"{path}: expected text, found {what}; take out what is binary")
            return text, encoding
    if not (found := flaw(content)):
        return content.decode(), "utf-8"
    for encoding in UNMARKED:
        if (wide := decode_unmarked(content, encoding)) is not None:
            return wide, encoding
    raise DataError(f"{path}: expected UTF-8 text, found {found}; if it is text, {remedy}")


def line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def separators(options: list[str]) -> tuple[str, ...]:
    """Return what --separator names, its escapes resolved; DataError if an escape is unknown."""
    for option in options:
        if not re.fullmatch(rf"(?:[^\\]|{ESCAPE})+", option, re.DOTALL):
            raise DataError(
                f"--separator: expected text in which a backslash begins \\n, \\t, \\f, \\r, \\0, "
                f"\\\\, \\xNN or \\uNNNN, found {option!r}"
            )
    given = [option for option in options if option != "none"]
    plain = [re.sub(ESCAPE, lambda m: ast.literal_eval(f"'{m[0]}'"), option) for option in given]
    return tuple(map(line_feeds, plain))


def parse_json(text: bytes | str) -> Any:
    """Return the value; ValueError if there is none, or one too deep to read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error


def json_lines(path: Path, text: str) -> list[tuple[str, Any]]:
    """Return (place, value) of each line that is not blank; DataError if one is not JSON."""
    items = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                items.append((f"line {number}", parse_json(line)))
            except ValueError as error:
                reason = f"not JSON ({error})"
                raise DataError(f"{path}: line {number}: {reason}; or set --format text") from error
    return items


def json_items(path: Path, text: str, style: str) -> list[tuple[str, Any]] | None:
    """Return (place, value) of each item of a JSON file, None if `text` is none.

    `style` is jsonl, json or, to be told by the content, auto. DataError as for json_lines().
    """
    if style == "jsonl":
        return json_lines(path, text)
    start = text.lstrip()[:1]
    if style == "json" or start == "[":
        try:
            value = parse_json(text)
        except ValueError:
            value = None
        if isinstance(value, dict):
            value = [value]
        if isinstance(value, list) and (
            style == "json" or (value and all(isinstance(item, dict | str) for item in value))
        ):
            return [(f"item {number}", item) for number, item in enumerate(value, 1)]
    if style == "json":
        return json_lines(path, text)
    if start != "{":
        return None
    heads = [line for line in text.split("\n", 1000)[:1000] if line.strip()][:2]
    try:
        are_objects = all(isinstance(parse_json(line), dict) for line in heads)
    except ValueError:
        return None
    return json_lines(path, text) if are_objects else None


def json_text(path: Path, place: str, item: Any, field: str) -> str:
    """Return the text of one JSON item; DataError, with `place`, if it has none."""
    kinds = {dict: "an object", list: "an array", bool: "a truth value", type(None): "null"}
    if not isinstance(item, dict | str):
        found = kinds.get(type(item), "a number")
        raise DataError(f"{path}: {place}: expected an object with {field!r}, found {found}")
    if isinstance(item, dict) and field not in item:
        names = ", ".join(list(item)[:20]) or "none"
        raise DataError(f"{path}: {place}: no field {field!r}, found {names}; set --field")
    text = item[field] if isinstance(item, dict) else item
    if not isinstance(text, str):
        found = kinds.get(type(text), "a number")
        raise DataError(
            f"{path}: {place}: field {field!r} is {found}, expected a string; drop the line or set "
            "--field"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path}: {place}: half a surrogate pair, which is no text") from error
    return text


def check_unsure(path: Path, text: str) -> None:
    """DataError if `text` has marks at the ends of lines that may separate documents or not."""
    if found := UNSURE_SEPARATOR.search(text):
        mark = shlex.quote(repr(found[0])[1:-1])
        lines = len(UNSURE_SEPARATOR.findall(text))
        raise DataError(
            f"{path}: {mark} begins or ends a line {lines} times and may separate documents; set "
            f"--separator {mark} if so, else --separator none (or what does)"
        )


def read_documents(path: Path, reading: Reading = Reading()) -> list[str]:  # noqa: B008
    """Return the documents of a file that are not blank, with line feeds as line ends.

    What was recognised beyond plain UTF-8 is told. DataError if the file cannot be read, is no
    text, or may be read in two ways.
    """
    content, suffix = read_unpacked(path)
    check_container(path, content, is_table=suffix in TABLES and reading.format == "auto")
    text, encoding = decode(path, content)
    del content
    text = line_feeds(text)
    style = reading.format
    if style == "auto" and suffix in (".json", *JSON_LINES):
        style = "json" if suffix == ".json" else "jsonl"
    items = None if style == "text" else json_items(path, text, style)
    if reading.separators is None:
        pattern = KNOWN_SEPARATOR
    else:
        pattern = re.compile("|".join(map(re.escape, reading.separators)) or "(?!)")
    if items is not None:
        texts = [json_text(path, place, item, reading.field) for place, item in items]
    else:
        texts = [text]
        if reading.separators is None:
            check_unsure(path, text)
    marks = sorted({mark for text in texts for mark in pattern.findall(text)})
    parts = (part for text in texts for part in pattern.split(text))
    documents = [document for document in map(tidy_document, parts) if document]
    if any("\0" in document for document in documents):
        raise DataError(f"{path}: NUL characters in the text; take them out, or --separator '\\0'")
    told = [] if encoding == "utf-8" else [encoding.upper()]
    told += ["JSON"] if items is not None and style == "auto" else []
    told += [f"documents between {' '.join(map(repr, marks[:5]))}"] if marks else []
    if told:
        note(f"{path}: read as {', '.join(told)}: {plural(len(documents), 'document')}")
    if not documents:
        note(f"{path}: no text in it; left out")
    return documents


def tidy_document(text: str) -> str:
    """Return `text` with line feeds, without outer blanks and marks that joining files left."""
    return clean(line_feeds(text).strip().strip("\ufeff"))


def normal_form(text: str) -> str:
    """Return the words of `text`, or its signs if it has none, alike for all ways to write them.

    Letter case, compatibility forms, blanks, line ends, punctuation and invisible characters go.
    """
    folded = INVISIBLE.sub("", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(WORD.findall(folded)) or " ".join(folded.split())


def mixed(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit over all 64 (MurmurHash3's finaliser, its first half)."""
    hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    return hashes ^ (hashes >> np.uint64(33))


def first_of_run(*columns: NDArray[Any]) -> NDArray[np.bool_]:
    """Mark the rows of sorted `columns` that differ from the row before."""
    new = np.ones(len(columns[0]), dtype=bool)
    new[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return new


def sketch_chunk(forms: list[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return (hashes, index into `forms`) of the SKETCH lowest distinct shingles of each form.

    Rows are sorted by index, then hash.
    """
    data = np.frombuffer("\n".join(forms).encode(), dtype=np.uint8)
    gap = data <= ord(" ")
    head = ~gap
    head[1:] &= gap[:-1]
    starts = np.flatnonzero(head)
    if len(starts) < SHINGLE:
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    offsets = np.arange(len(data)) - starts[np.cumsum(head) - 1]
    hashes = BYTE_HASHES[offsets % 64, data]
    hashes[gap] = 0
    words = np.add.reduceat(hashes, starts)
    owners = np.cumsum(data == ord("\n"))[starts]
    count = len(words) - SHINGLE + 1
    shingles = np.zeros(count, dtype=np.uint64)
    for i in range(SHINGLE):
        shingles += ODD[i] * words[i : i + count]
    shingles = mixed(shingles)
    inside = owners[:count] == owners[SHINGLE - 1 :]
    shingles = shingles[inside]
    owners = owners[:count][inside]
    order = np.lexsort((shingles, owners))
    shingles = shingles[order]
    owners = owners[order]
    new = first_of_run(shingles, owners)
    shingles = shingles[new]
    owners = owners[new]
    kept = np.arange(len(owners)) - np.searchsorted(owners, owners) < SKETCH
    return shingles[kept], owners[kept]


def sketches(forms: list[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return sketch_chunk() of all `forms`, computed a chunk at a time."""
    parts = []
    chunk: list[str] = []
    size = first = 0
    for number, form in enumerate(forms):
        chunk.append(form[:SKETCH_CHARACTERS])
        size += len(chunk[-1])
        if size >= TWIN_CHUNK or number == len(forms) - 1:
            hashes, owners = sketch_chunk(chunk)
            parts.append((hashes, owners + first))
            chunk = []
            first = number + 1
            size = 0
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def neighbours(hashes: NDArray[np.uint64], owners: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a << 32 | b for each two owners, a < b, that are next to each other at one hash."""
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    owners = owners[order]
    same = hashes[1:] == hashes[:-1]
    return owners[:-1][same] << 32 | owners[1:][same]


def candidates(hashes: NDArray[np.uint64], owners: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return pairs that may be twins, shape (n, 2), the likeliest first.

    Their number is linear in the sketches: only neighbours at a hash are paired, and a pair must
    meet at several. Pairs of hashes in a row, which are rarer, find short texts of common phrases.
    """
    both = mixed(ODD[0] * hashes[:-1] + ODD[1] * hashes[1:])
    inside = owners[1:] == owners[:-1]
    met = [neighbours(hashes, owners), neighbours(both[inside], owners[:-1][inside])]
    keys, counts = np.unique(np.concatenate(met), return_counts=True)
    pairs = np.stack([keys >> 32, keys & 0xFFFFFFFF], axis=1)
    smaller = np.bincount(owners)[pairs].min(axis=1)
    enough = counts >= np.where(smaller < 4, 1, np.maximum(smaller // 16, 2))
    order = np.argsort(-counts[enough], kind="stable")
    return pairs[enough][order]


class Sketches:
    """The sketches of all documents, for comparing pairs of them."""

    def __init__(self, hashes: NDArray[np.uint64], owners: NDArray[np.int64], count: int) -> None:
        _, self.ranks = np.unique(hashes, return_inverse=True)
        self.keys = owners << 32 | self.ranks  # sorted
        self.first = np.searchsorted(owners, np.arange(count + 1))
        self.sizes = np.diff(self.first)
        # A full sketch is a fair sample of the document's shingles up to its highest hash.
        self.limits = np.full(count, 0xFFFFFFFF)
        full = self.sizes == SKETCH
        self.limits[full] = self.ranks[self.first[1:][full] - 1]

    def alike(self, pairs: NDArray[np.int64], similarity: float) -> NDArray[np.bool_]:
        """Tell which `pairs`, shape (n, 2), are twins."""
        one, other = pairs.T
        limits = self.limits[pairs].min(axis=1)
        sizes = self.sizes[one]
        pair = np.repeat(np.arange(len(pairs)), sizes)
        rows = np.arange(len(pair)) - np.repeat(np.cumsum(sizes) - sizes - self.first[one], sizes)
        ranks = self.ranks[rows]
        inside = ranks <= limits[pair]
        wanted = other[pair] << 32 | ranks
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        hit = inside & (self.keys[places] == wanted)
        shared = np.bincount(pair, hit, len(pairs))
        here = np.bincount(pair, inside, len(pairs))
        there = np.searchsorted(self.keys, other << 32 | limits, side="right") - self.first[other]
        least = np.minimum(here, there)
        jaccard = shared >= similarity * (here + there - shared)
        contained = shared >= max(CONTAINED, similarity) * least
        return jaccard | (contained & (least >= CONTAINED_LEAST))


class Forest:
    """Groups of numbered items, joined two at a time; a group is its smallest item's."""

    def __init__(self, count: int) -> None:
        self.parents = np.arange(count)

    def root(self, item: int) -> int:
        while self.parents[item] != item:
            self.parents[item] = self.parents[self.parents[item]]
            item = int(self.parents[item])
        return item

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.root(one), self.root(other)))
        self.parents[high] = low

    def roots(self) -> NDArray[np.int64]:
        """Return the root of every item."""
        while not np.array_equal(above := self.parents[self.parents], self.parents):
            self.parents = above
        return self.parents


def twin_groups(documents: list[str], similarity: float = SIMILAR) -> list[list[int]]:
    """Return groups of indices of near-identical documents; most are one document's alone.

    Twins have one normal form, or share `similarity` of all their shingles (Jaccard), or the
    longer one, at most some four times as long, has CONTAINED of the shorter one's; twins of twins
    are one group. Shares are estimated on SKETCH shingles, with a standard error below 0.05. The
    groups, in the order of a digest of their normal forms, depend on the texts alone.
    """
    index: dict[str, list[int]] = {}
    for number, text in enumerate(documents):
        index.setdefault(normal_form(text), []).append(number)
    forms = sorted(index)
    digests = {form: digest(form) for form in forms}
    forest = Forest(len(forms))
    if similarity < 1:
        hashes, owners = sketches(forms)
        compared = Sketches(hashes, owners, len(forms))
        pairs = candidates(hashes, owners)
        for start in range(0, len(pairs), TWIN_BLOCK):
            block = pairs[start : start + TWIN_BLOCK]
            roots = forest.roots()
            block = block[roots[block[:, 0]] != roots[block[:, 1]]]
            for one, other in block[compared.alike(block, similarity)].tolist():
                forest.join(one, other)
    groups: dict[int, list[str]] = {}
    for form, root in zip(forms, forest.roots().tolist(), strict=True):
        groups.setdefault(root, []).append(form)
    ordered = sorted(groups.values(), key=lambda group: min(digests[form] for form in group))
    return [sorted(i for form in group for i in index[form]) for group in ordered]


def check_vocab(vocab_size: int, what: str = "vocabulary") -> None:
    if not 1 <= vocab_size <= MAX_VOCAB:
        raise DataError(f"{what}: expected 1 to {MAX_VOCAB} (uint16 ids), found {vocab_size}")


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    max_bytes: int,
    required: str = SPACE,
    case_marks: bool = False,
) -> bytes:
    """Train a byte-fallback BPE model on the first `max_bytes` of text and return it serialised.

    It neither normalises nor drops anything, so byte counts of decoded text are those of the text.
    The characters of `required` have a piece even where they are rare: the three bytes that spell
    the space's mark would be counted for one. So have the case marks, if it is of case-marked text.
    They are ordinary characters, which BPE joins to punctuation but, being of no script, to no
    letter: 0.8% more tokens than plain text, where marks that join nothing take 5.3% (8192 pieces,
    30 MB of English).
    DataError if the text has too little, or too many characters, for `vocab_size`.
    """
    texts: list[str] = []
    size = 0
    for text in documents:
        texts.append(mark_case(text[:max_bytes]) if case_marks else text[:max_bytes])
        size += utf8_len(text)
        if size >= max_bytes:
            break
    if case_marks:
        required += CASE_LETTER + CASE_WORD + CASE_ESCAPE
    # SentencePiece 0.2.2 aborts the process where a required character does not occur.  Each is a
    # text of its own, so that no two become a pair: the model is the same as without.
    texts.extend(required)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model,
            model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=True, byte_fallback=True,
            character_coverage=0.9995, required_chars=required, split_digits=True,
            max_sentence_length=4 * max_bytes,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=False, pad_id=PAD_ID, bos_id=BOS_ID, eos_id=EOS_ID, unk_id=UNK_ID,
            num_threads=2, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        for bound, pattern in (("at most", r"value <= (\d+)"), ("at least", r"\d+ vs (\d+)")):
            if limit := re.search(pattern, str(error)):
                raise DataError(
                    f"vocabulary: this text allows {bound} {limit[1]}, found {vocab_size}; "
                    "change --vocab (train_gpt.py: VOCAB_SIZE) or the amount of text"
                ) from error
        raise DataError(f"SentencePiece cannot train on this text: {error}") from error
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    if has_case_marks(trained) and not case_marks:
        raise DataError(
            "the text holds U+E001, U+E002 and U+E004, which would be taken for case marks; add "
            "--case-marks, which tells them apart"
        )
    return model.getvalue()


def load_tokenizer(path: Path) -> tuple[bytes, int]:
    """Return (serialised model, vocabulary size); DataError unless it suits the shard format."""
    try:
        model = path.read_bytes() or b"no model"  # SentencePiece takes no bytes for one
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "not a SentencePiece model"
        raise DataError(f"{path}: cannot be used as tokenizer: {reason}") from error
    check_vocab(processor.vocab_size(), f"{path}: pieces")
    if processor.bos_id() != BOS_ID:
        raise DataError(f"{path}: expected BOS id {BOS_ID}, found {processor.bos_id()}; retrain it")
    return model, processor.vocab_size()


def chosen_tokenizer(args: argparse.Namespace) -> tuple[bytes, int]:
    """Return (serialised model, size) of --tokenizer, (b"", --vocab) if one is to be trained.

    DataError unless the model has pieces for the case marks just where they are asked for.
    """
    if not args.tokenizer:
        check_vocab(args.vocab)
        return b"", args.vocab
    model, vocab_size = load_tokenizer(args.tokenizer)
    marked = has_case_marks(sentencepiece.SentencePieceProcessor(model_proto=model))
    if marked and not args.case_marks:
        raise DataError(f"{args.tokenizer}: is of case-marked text; add --case-marks")
    if args.case_marks and not marked:
        raise DataError(
            f"{args.tokenizer}: expected pieces U+E001, U+E002 and U+E004 for --case-marks, found "
            "none; leave --tokenizer out, and one is trained"
        )
    return model, vocab_size


@contextmanager
def locked(root: Path) -> Iterator[Path]:
    """Hold the lock of `root`, which dies with its process; yield an empty scratch folder in it."""
    for folder in (root, root / "datasets", root / "tokenizers"):
        folder.mkdir(parents=True, exist_ok=True)
    scratch = root / ".prepare_data.tmp"
    with open(root / ".prepare_data.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        shutil.rmtree(scratch, ignore_errors=True)  # left by a command that was killed
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def move(source: Path, target: Path) -> None:
    """Rename; where a link leads to another disk, copy beside the target first."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".prepare_data.") as beside:
            os.replace(shutil.move(source, beside), target)


def recorded(dataset: Path, source: str) -> dict[str, Any]:
    """Return the manifest of `dataset`, {} if there is no such folder.

    DataError if it was not made from `source`: it may be another corpus, so it is left alone.
    """
    if not dataset.exists():
        return {}
    try:
        manifest = parse_json((dataset / "manifest.json").read_bytes())
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("source") != source:
        raise DataError(
            f"{dataset}: exists, made from other inputs or options, or by an older version; delete "
            "it, or choose another --name or --root"
        )
    return manifest


def text_sizes(manifest: dict[str, Any]) -> dict[str, int | None]:
    """Return the bytes of each split's text as `manifest` states them."""
    return {split: int(manifest["splits"][split]["bytes"]) for split in ("train", "val")}


def is_complete(dataset: Path, tokenizer: Path, source: str) -> bool:
    """Tell whether a build from `source` exists undamaged; DataError as for recorded()."""
    manifest = recorded(dataset, source)
    try:
        measured = describe(dataset, tokenizer.read_bytes(), tokenizer.name, text_sizes(manifest))
        if source.startswith(TEXT_SOURCE):
            measured["twins"] = {fact: int(manifest["twins"][fact]) for fact in TWIN_FACTS}
        if manifest != {"source": source, **measured}:
            return False
        if source == SAMPLE_SOURCE:  # of which train_gpt.py cannot be asked, as in build()
            return True
        vocab_size = measured["tokenizer"]["vocab_size"]
        val = [dataset / shard["file"] for shard in measured["splits"]["val"]["shards"]]
        return count_text(tokenizer, vocab_size, val) == measured["splits"]["val"]["bytes"]
    except (OSError, DataError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError):
        return False


def renew(dataset: Path, tokenizer: Path, source: str) -> bool:
    """Give an undamaged build by an older version today's manifest; tell whether it was one."""
    manifest = recorded(dataset, source)
    try:
        model = tokenizer.read_bytes()
        if manifest["tokenizer"] != digest(model):
            return False
        described = describe(dataset, model, tokenizer.name, text_sizes(manifest))
        for split, entry in described["splits"].items():
            if entry["tokens"] != manifest["splits"][split]["tokens"]:
                return False
    except (OSError, DataError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError):
        return False
    write_manifest(dataset, {"source": source, **described})
    return True


def build(
    root: Path, name: str, vocab_size: int, source: str, make: Callable[[], Parts]
) -> tuple[Path, Path]:
    """Return (dataset dir, tokenizer) of a corpus, made of the parts from make() if need be.

    `source` must differ whenever inputs or options do; DataError if `name` has another source.
    """
    dataset = root / "datasets" / f"{name}_sp{vocab_size}"
    tokenizer = root / "tokenizers" / f"{name}_{vocab_size}_bpe.model"
    if is_complete(dataset, tokenizer, source):
        return dataset, tokenizer
    with locked(root) as scratch:
        # Another process may have built it in the meantime.
        if is_complete(dataset, tokenizer, source) or renew(dataset, tokenizer, source):
            return dataset, tokenizer
        parts = make()
        (scratch / "model").write_bytes(parts.model)
        (scratch / "dataset").mkdir()
        processor = sentencepiece.SentencePieceProcessor(model_proto=parts.model)
        # Not for the sample: train_gpt.py builds it, and cannot be imported a second time.
        used = parts.given or scratch / "model"
        check = None if source == SAMPLE_SOURCE else byte_check(used, vocab_size)
        sides = {"train": parts.train, "val": parts.val}
        sizes: dict[str, int | None] = {}
        for split, documents in sides.items():
            sizes[split] = write_split(scratch / "dataset", split, documents, processor, check)
        described = describe(scratch / "dataset", parts.model, tokenizer.name, sizes)
        if parts.twins:
            described["twins"] = parts.twins
        write_manifest(scratch / "dataset", {"source": source, **described})
        if dataset.exists():  # a damaged build from this very source
            move(dataset, scratch / "damaged")
        move(scratch / "model", tokenizer)
        move(scratch / "dataset", dataset)
    return dataset, tokenizer


def build_sample(root: Path, vocab_size: int = 1024) -> tuple[Path, Path]:
    """Build the built-in sample under `root` unless it is there; return (dataset dir, tokenizer).

    Its text is the documentation that ships with Python and the installed dependencies, on which
    alone the bytes written depend. DataError if the text does not allow `vocab_size`.
    """
    check_vocab(vocab_size)
    return build(root, "sample", vocab_size, SAMPLE_SOURCE, lambda: sample_parts(vocab_size))


def with_sample(h: Any) -> Any:
    """DATA_PATH=sample becomes the paths of the built-in corpus, which is built if missing."""
    if h.data_path != "sample":
        return h
    data, tokenizer = build_sample(Path(__file__).resolve().parent / "data", h.vocab_size)
    return dataclasses.replace(h, data_path=str(data), tokenizer_path=str(tokenizer))


def check_text_options(args: argparse.Namespace) -> None:
    """DataError for an option of the text command that is out of its range."""
    if not re.fullmatch(r"[\w.-]+", args.name) or args.name.startswith(("sample", "fineweb")):
        raise DataError(
            "--name: expected letters, digits, '.', '_' or '-', and no name of the other commands "
            f"(sample..., fineweb...), found {args.name!r}"
        )
    if not 0 < args.val_fraction < 1:
        raise DataError(f"--val-fraction: expected between 0 and 1, found {args.val_fraction}")
    if not 0 < args.similarity <= 1:
        raise DataError(f"--similarity: expected above 0, at most 1, found {args.similarity}")


def fraction_for(size: int, total: int) -> float:
    """Return a short fraction that gives `size` of `total` bytes room and little more."""
    share = size / total
    for digits in range(2, 16):
        fraction = math.ceil(share * 10**digits) / 10**digits
        if fraction <= 1.05 * share and int(fraction * total) >= size:
            break
    return fraction


def check_share(train: list[str], val: list[str], fraction: float) -> None:
    """DataError if validation is not within half and twice the `fraction` of the text asked for."""
    smallest = min(map(utf8_len, train), default=0)
    size = sum(map(utf8_len, val))
    total = size + sum(map(utf8_len, train))
    if not fraction / 2 <= size / total <= 2 * fraction:
        share = size / total
        enough = fraction_for(size if share > fraction else size + smallest, total)
        if enough >= 1:  # some text must be left for training
            enough = fraction_for(size, total)
        raise DataError(
            f"validation would be {size:,} of {total:,} bytes, {share:.2g} of the text, for "
            f"--val-fraction {fraction}: its {len(train) + len(val)} documents, of which "
            "near-identical ones stay together, are too few or too long; tell where documents end "
            f"(--separator), add files, or set --val-fraction {enough}"
        )


def build_text(args: argparse.Namespace) -> tuple[Path, Path]:
    """Build a corpus from args.files; DataError for unusable files or options."""
    check_text_options(args)
    given = separators(args.separator) if args.separator else None
    reading = Reading(args.format, args.field, given)
    model, vocab_size = chosen_tokenizer(args)
    read = [text for path in args.files for text in read_documents(path, reading)]
    texts = in_hash_order(read)
    copies = len(read) - len(texts)
    del read
    if len(texts) < 2:
        raise DataError(
            f"{args.files[0]}: expected 2 or more distinct documents in all, one for each split, "
            f"found {len(texts)}; add files, or tell where documents end, for instance "
            "--separator '\\n\\n' for a blank line"
        )

    def make() -> Parts:
        groups = twin_groups(texts, args.similarity)
        if len(groups) < 2:
            raise DataError(
                f"all {len(texts)} documents are near-identical, so none can be kept for "
                "validation alone; add other text, or set --similarity 1"
            )
        size = sum(map(utf8_len, texts))
        train, val = split_documents(texts, int(args.val_fraction * size), groups)
        check_share(train, val, args.val_fraction)
        joined = [len(group) for group in groups if len(group) > 1]
        twins = {"copies": copies, "documents": sum(joined), "groups": len(joined)}
        tokenizer = model or train_tokenizer(
            train, vocab_size, TEXT_TOKENIZER_BYTES, case_marks=args.case_marks
        )
        return Parts(train, val, tokenizer, args.tokenizer, twins)

    # Copies count, since the manifest states them.
    options = [digest(model), str(args.val_fraction), str(args.similarity), str(copies)]
    options += [CASE_SOURCE] * args.case_marks
    source = digest("\0".join([*options, *map(digest, texts)]))
    return build(args.root, args.name, vocab_size, f"{TEXT_SOURCE} {source}", make)


def hub_fetcher(repo: str, staging: Path) -> Callable[[str], Path]:
    """Return a function that downloads one file of the export in `repo` to `staging`."""
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError as error:
        raise DataError(f"{error.name} is missing; run: pip install huggingface_hub") from error
    except ImportError as error:
        raise DataError(
            f"huggingface_hub cannot be imported: {error}; run: pip install -U huggingface_hub"
        ) from error

    def fetch(name: str) -> Path:
        remote = f"datasets/{name}"  # the export's folder in the repository
        try:
            path = hf_hub_download(repo, remote, repo_type="dataset", local_dir=staging)
            return Path(path).resolve()  # versions before 0.23 give a relative link to their cache
        except Exception as error:  # the hub's errors share no base class across its versions
            reason = (str(error).strip().splitlines() or [""])[0]
            raise DataError(
                f"{repo}: cannot fetch {remote}: {type(error).__name__}: {reason}; check the "
                "network, --repo and --vocab"
            ) from error

    return fetch


def published(manifest: Path, dataset: str, repo: str) -> dict[str, int]:
    """Return the shard counts of `dataset` per split, by the manifest of `repo`."""
    try:
        stated = parse_json(manifest.read_bytes())["datasets"]
        entries = {str(entry["name"]): entry for entry in stated}
        if dataset in entries:
            stats = entries[dataset]["stats"]
            counts = {split: int(stats[f"files_{split}"]) for split in ("train", "val")}
            if min(counts.values()) < 1:
                raise ValueError
            return counts
    except (ValueError, KeyError, TypeError, OverflowError) as error:  # the last of Infinity
        raise DataError(f"{repo}: unknown form of manifest.json; try another --repo") from error
    held = ", ".join(sorted(entries)) or "nothing"
    raise DataError(f"{repo}: no {dataset}, found {held}; choose another --vocab or --repo")


def place(
    path: Path, check: Callable[[Path], Any], fetch: Callable[[str], Path], name: str
) -> None:
    """Make `path` a file that passes `check`, fetching `name` if it is missing or damaged."""
    try:
        check(path)
    except (OSError, DataError):
        staged = fetch(name)
        check(staged)
        move(staged, path)


def stated(manifest: dict[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each file that `manifest` states, by name; {} if it is an older one."""
    try:
        entries = [manifest["tokenizer"]]
        for split in manifest["splits"].values():
            entries += split["shards"]
        return {entry["file"]: entry["sha256"] for entry in entries}
    except (LookupError, TypeError, AttributeError):
        return {}


def check_sha256(path: Path, found: str, expected: str | None) -> None:
    if expected not in (None, found):
        raise DataError(
            f"{path}: not the file of which manifest.json states the SHA-256; the export has "
            "changed: delete the dataset's folder and run this again"
        )


def count_text(tokenizer: Path, vocab_size: int, shards: list[Path]) -> int:
    """Return the UTF-8 bytes of the text in `shards`, as train_gpt.py counts them."""
    tokens = [np.fromfile(path, dtype="<u2", offset=HEADER_BYTES) for path in shards]
    return int(byte_table(tokenizer, vocab_size).count(np.concatenate(tokens)))


def download(
    dataset: Path,
    tokenizer: Path,
    vocab_size: int,
    counts: dict[str, int],
    expected: dict[str, str],
    fetch: Callable[[str], Path],
) -> dict[str, Facts]:
    """Fetch `counts` shards of each split and the tokenizer; return the facts of all shards.

    Files that are there stay if they have the SHA-256 of `expected`, which is stated()'s.
    """
    measured: dict[str, Facts] = {}

    def check_shard(path: Path) -> None:
        facts = shard_facts(path)
        check_sha256(path, facts.sha256, expected.get(path.name))
        if not facts.tokens or facts.largest >= vocab_size:
            found = f"{facts.largest}" if facts.tokens else "no tokens"
            raise DataError(
                f"{path}: expected token ids below {vocab_size}, found {found}; choose another "
                "--vocab or --repo"
            )
        measured[path.name] = facts

    def check_model(path: Path) -> None:
        content, _ = load_tokenizer(path)
        check_sha256(path, hashlib.sha256(content).hexdigest(), expected.get(tokenizer.name))

    for split, count in counts.items():
        for number in range(count):
            shard = f"fineweb_{split}_{number:06d}.bin"
            place(dataset / shard, check_shard, fetch, f"datasets/{dataset.name}/{shard}")
    if tokenizer.name not in expected:  # one that is there may be another export's
        tokenizer.unlink(missing_ok=True)
    place(tokenizer, check_model, fetch, f"tokenizers/{tokenizer.name}")
    for path in chain(*(shard_paths(dataset, split) for split in counts)):
        if path.name not in measured:  # of an earlier --shards
            check_shard(path)
    return measured


def published_documents(paths: list[Path], processor: Any, is_cut: bool) -> Iterator[str]:
    """Yield what the documents in the shards decode to, in their order.

    `is_cut`: the last one, of which the rest is in a shard that is not here, is left out.
    DataError unless the shards begin with a document.
    """
    rest = np.empty(0, dtype=np.uint16)
    for path in paths:
        tokens = np.concatenate([rest, np.fromfile(path, dtype="<u2", offset=HEADER_BYTES)])
        starts = np.flatnonzero(tokens == BOS_ID)
        if not starts.size or starts[0]:
            raise DataError(f"{path}: expected documents that begin with BOS id {BOS_ID}")
        *whole, rest = np.split(tokens, starts[1:])
        for first in range(0, len(whole), ENCODE_BATCH):
            batch = whole[first : first + ENCODE_BATCH]
            yield from processor.decode([document[1:].tolist() for document in batch])
    if rest.size and not is_cut:
        yield processor.decode(rest[1:].tolist())


def build_case_marked(
    args: argparse.Namespace, dataset: Path, tokenizer: Path, is_cut: bool
) -> tuple[Path, Path]:
    """Build case-marked shards of the documents in the published `dataset`, in the same order.

    DataError unless its tokens decode to a text of the bytes that the challenge counts.
    """
    model, vocab_size = chosen_tokenizer(args)
    splits = json.loads((dataset / "manifest.json").read_bytes())["splits"]
    shards = {split: entry["shards"] for split, entry in splits.items()}
    shards["train"] = shards["train"][: args.shards]
    processor = open_model(tokenizer)

    def documents(split: str) -> Iterator[str]:
        paths = [dataset / shard["file"] for shard in shards[split]]
        return published_documents(paths, processor, is_cut and split == "train")

    def make() -> Parts:
        stated = splits["val"]["bytes"]
        if stated is None:
            raise DataError(f"{dataset}: its text is case-marked already; leave --case-marks out")
        size = sum(map(utf8_len, documents("val")))
        if abs(size - stated) > stated / 1_000_000:
            raise DataError(
                f"{dataset}: the validation split decodes to {size:,} bytes, the challenge counts "
                f"{stated:,}: its tokenizer lacks characters of the text; choose --vocab 8192"
            )
        trained = model or train_tokenizer(
            documents("train"), vocab_size, TEXT_TOKENIZER_BYTES, case_marks=True
        )
        return Parts(documents("train"), documents("val"), trained, args.tokenizer)

    facts = [digest(model), digest(tokenizer.read_bytes())]
    facts += [shard["sha256"] for split in ("train", "val") for shard in shards[split]]
    source = f"{CASE_SOURCE} {digest(' '.join(facts))}"
    return build(args.root, "fineweb_case", vocab_size, source, make)


def build_fineweb(args: argparse.Namespace) -> tuple[Path, Path]:
    """Download the validation split, the first args.shards training shards and the tokenizer.

    With args.case_marks, build case-marked shards of them beside them.
    """
    if args.tokenizer and not args.case_marks:
        raise DataError("--tokenizer: the published shards have their own; add --case-marks")
    repo = args.repo or FINEWEB_REPOS.get(args.vocab)
    if not repo:
        known = ", ".join(map(str, FINEWEB_REPOS))
        raise DataError(f"--vocab: exports known for {known}, found {args.vocab}; name a --repo")
    staging = args.root / ".fineweb_download"  # outlives an interruption: the hub client resumes
    if args.case_marks:
        chosen_tokenizer(args)  # refused before the download, not after it
    fetch = hub_fetcher(repo, staging)
    dataset = args.root / "datasets" / f"fineweb10B_sp{args.vocab}"
    tokenizer = args.root / "tokenizers" / f"fineweb_{args.vocab}_bpe.model"
    with locked(args.root) as scratch:
        counts = published(fetch("manifest.json"), dataset.name, repo)
        if not 1 <= args.shards <= counts["train"]:
            raise DataError(
                f"--shards: expected 1 to {counts['train']} ({repo}), found {args.shards}"
            )
        manifest = recorded(dataset, repo)
        if not manifest:
            write_manifest(scratch, {"source": repo})
            move(scratch, dataset)
        wanted = {"val": counts["val"], "train": args.shards}
        measured = download(dataset, tokenizer, args.vocab, wanted, stated(manifest), fetch)
        val = shard_paths(dataset, "val")
        # A manifest's bytes prove those of a case-marked text, so none are stated by its pieces.
        is_plain = not has_case_marks(open_model(tokenizer))
        size = count_text(tokenizer, args.vocab, val) if is_plain else None
        sizes = {"train": None, "val": size}
        described = describe(dataset, tokenizer.read_bytes(), tokenizer.name, sizes, measured)
        write_manifest(dataset, {"source": repo, **described})
        shutil.rmtree(staging)
    if args.case_marks:
        return build_case_marked(args, dataset, tokenizer, args.shards < counts["train"])
    return dataset, tokenizer


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + "s" * (count != 1)


def report(dataset: Path, tokenizer: Path) -> None:
    """Print the size of each split, the twins of a user's text and the line for train_gpt."""
    manifest = json.loads((dataset / "manifest.json").read_bytes())
    for split, entry in manifest["splits"].items():
        line = f"{split:5}  {entry['tokens']:,} tokens in {len(entry['shards'])} shard(s), "
        line += plural(entry["documents"], "document")
        if entry["bytes"] is not None:
            line += f", {entry['bytes']:,} bytes"
            line += f", {entry['bytes'] / entry['tokens']:.3f} bytes/token"
        print(line)
    if twins := manifest.get("twins"):
        groups = plural(twins["groups"], "group")
        copies = "copy" if twins["copies"] == 1 else "copies"
        print(
            f"twins  {twins['copies']:,} {copies} dropped; {plural(twins['documents'], 'document')}"
            f" in {groups} of near-identical ones"
        )
    paths = shlex.quote(str(dataset)), shlex.quote(str(tokenizer))
    print("export DATA_PATH={} TOKENIZER_PATH={}".format(*paths))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--root", type=Path, default=Path("data"), help="default: %(default)s")
    commands = parser.add_subparsers(dest="command", required=True)
    sample = commands.add_parser("sample", parents=[shared], help="the built-in corpus")
    text = commands.add_parser("text", parents=[shared], help="your own text")
    fineweb = commands.add_parser("fineweb", parents=[shared], help="the published shards")
    text.add_argument("files", nargs="+", type=Path, metavar="FILE", help=(
        "text or JSON, also packed by gzip, xz, bzip2 or zstd"))  # fmt: skip
    text.add_argument("--name", default="text", help="of the dataset (default: %(default)s)")
    text.add_argument("--val-fraction", type=float, default=0.05, help="default: %(default)s")
    text.add_argument("--separator", action="append", metavar="TEXT", help=(
        "what stands between documents, instead of <|endoftext|>, its like and NUL bytes; \\n, "
        "\\f and \\x1e mean what they do in C; may be repeated; none: a file is a document"
        ))  # fmt: skip
    text.add_argument("--format", choices=("auto", "text", "jsonl", "json"), default="auto", help=(
        "of the files (default: told by name and content)"))  # fmt: skip
    text.add_argument("--field", default="text", help="of JSON objects (default: %(default)s)")
    text.add_argument("--similarity", type=float, default=SIMILAR, help=(
        "Jaccard similarity of two documents' runs of three words from which they stay on one side "
        "of the split; 1: only if all words are the same (default: %(default)s)"))  # fmt: skip
    tokenizer = text.add_mutually_exclusive_group()
    for command in (sample, tokenizer, fineweb):
        command.add_argument("--vocab", type=int, default=1024, help="default: %(default)s")
    for command in (tokenizer, fineweb):
        command.add_argument("--tokenizer", type=Path, help=(
            "use this model instead of training one"))  # fmt: skip
    for command in (text, fineweb):
        command.add_argument("--case-marks", action="store_true", help=(
            "replace capitals by marks and small letters, losslessly"))  # fmt: skip
    fineweb.add_argument("--shards", type=int, default=80, help=(
        "training shards of 100M tokens (default: %(default)s)"))  # fmt: skip
    fineweb.add_argument("--repo", default=os.environ.get(REPO_ENV), help=(
        f"Hugging Face dataset in the challenge's layout (default: ${REPO_ENV}, or by --vocab: "
        f"{', '.join(f'{size} {repo}' for size, repo in FINEWEB_REPOS.items())})"))  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack a letter of a file's name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if args.command == "sample":
            paths = build_sample(args.root, args.vocab)
        else:
            paths = {"text": build_text, "fineweb": build_fineweb}[args.command](args)
        report(*paths)
    except OSError as error:  # a full disk, a --root that cannot be written
        raise DataError(f"{error.filename or args.root}: {error.strerror or error}") from error
    except MemoryError as error:
        raise DataError("out of memory; use a larger machine or less text") from error
    except KeyboardInterrupt as error:
        raise DataError("interrupted; the same command begins anew") from error


if __name__ == "__main__":
    main()
