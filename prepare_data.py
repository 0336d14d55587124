"""Make token shards and a SentencePiece model for train_gpt.py.

    python prepare_data.py sample                     built-in corpus, no download, seconds
    python prepare_data.py text FILE... --name NAME   your own UTF-8 text
    python prepare_data.py fineweb --vocab 1024       the challenge's published FineWeb shards

All three write the challenge's layout under --root:

    datasets/<name>_sp<vocab>/fineweb_{train,val}_NNNNNN.bin
    tokenizers/<name>_<vocab>_bpe.model

A shard is 256 little-endian int32 (magic 20240520, version 1, token count, zeros) followed by that
many uint16 token ids; every document starts with the BOS id 1. What exists is whole, because it
appears by a rename, and a lock per root makes concurrent commands take turns.
"""

import argparse
import ast
import dataclasses
import fcntl
import gzip
import importlib.util
import inspect
import io
import json
import lzma
import os
import re
import shlex
import shutil
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3  # as in the challenge's tokenizers
MAX_VOCAB = 65_535
SHARD_TOKENS = 100_000_000
ENCODE_BATCH = 512  # documents per SentencePiece call; bounds the Python lists of ids

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
SAMPLE_TOKENIZER_BYTES, TEXT_TOKENIZER_BYTES = 2_500_000, 32_000_000

REPO_ENV = "MATCHED_FINEWEB_REPO_ID"  # the variable that the challenge's own downloader reads
FINEWEB_REPOS = {  # 1024 is the challenge's export, the others a participant's in the same layout
    1024: "willdepueoai/parameter-golf",
    4096: "kevclark/parameter-golf",
    8192: "kevclark/parameter-golf",
}

Parts = tuple[list[str], list[str], bytes]  # train documents, val documents, serialised tokenizer


class DataError(SystemExit):
    """A problem the caller can fix: uncaught, it prints its one line and exits with status 1."""

    def __init__(self, message: str) -> None:
        super().__init__(f"prepare_data: {message}")


def digest(text: bytes | str) -> str:
    """Return 32 hex digits that identify `text`."""
    return blake2b(text.encode() if isinstance(text, str) else text, digest_size=16).hexdigest()


def utf8_len(text: str) -> int:
    return len(text.encode())


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


def write_split(folder: Path, split: str, documents: list[str], processor: Any) -> dict[str, Any]:
    """Encode `documents` into shards in `folder` and return the split's manifest entry.

    Every shard but the last has SHARD_TOKENS tokens, so a document may continue in the next one.
    """
    pending = np.empty(0, dtype=np.uint16)
    shards: list[str] = []
    tokens = 0
    starts = range(0, len(documents), ENCODE_BATCH)
    for start in starts:
        ids = processor.encode(documents[start : start + ENCODE_BATCH], add_bos=True)
        fresh = np.fromiter(chain.from_iterable(ids), dtype=np.uint16)
        tokens += fresh.size
        pending = np.concatenate([pending, fresh])
        while pending.size >= SHARD_TOKENS or (start == starts[-1] and pending.size):
            shards.append(f"fineweb_{split}_{len(shards):06d}.bin")
            write_shard(folder / shards[-1], pending[:SHARD_TOKENS])
            pending = pending[SHARD_TOKENS:]
    size = sum(map(utf8_len, documents))
    return {"documents": len(documents), "bytes": size, "tokens": tokens, "shards": shards}


def clean(text: str) -> str:
    """Return `text` as a document that the tokenizers trained here decode back exactly.

    Outer whitespace goes because byte accounting has no token to charge a space right after BOS
    to. U+2581 is how SentencePiece spells a space, so it would come back as one anyway.
    """
    return text.replace("\u2581", " ").strip()


def in_hash_order(documents: list[str]) -> list[str]:
    """Return the distinct documents in an order that depends on their text alone."""
    return sorted(set(documents), key=digest)


def split_documents(documents: list[str], val_bytes: int) -> tuple[list[str], list[str]]:
    """Split distinct documents into (train, val), val at most `val_bytes` long if any fits."""
    train: list[str] = []
    val: list[str] = []
    for text in documents:
        fits = utf8_len(text) <= val_bytes
        (val if fits else train).append(text)
        val_bytes -= utf8_len(text) if fits else 0
    if not val:
        val.append(min(train, key=utf8_len))
        train.remove(val[0])
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
    return train, val, train_tokenizer(train, vocab_size, SAMPLE_TOKENIZER_BYTES)


def read_documents(path: Path) -> list[str]:
    """Return the non-blank documents of a UTF-8 file, which NUL bytes separate.

    `.gz` and `.xz` files are decompressed. DataError if the file is unreadable or not UTF-8.
    """
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix, open)(path, "rb") as file:
            texts = file.read().decode().split("\0")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise DataError(f"{path}: expected UTF-8, found {found}; convert it first") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}; check the path and file") from error
    return [document for document in map(clean, texts) if document]


def check_vocab(vocab_size: int) -> None:
    if not 1 <= vocab_size <= MAX_VOCAB:
        raise DataError(f"vocabulary: expected 1 to {MAX_VOCAB} (uint16 ids), found {vocab_size}")


def train_tokenizer(documents: list[str], vocab_size: int, max_bytes: int) -> bytes:
    """Train a byte-fallback BPE model on the first `max_bytes` of text and return it serialised.

    It neither normalises nor drops anything, so byte counts of decoded text are those of the text.
    DataError if the text has too little, or too many characters, for `vocab_size`.
    """
    ends = np.cumsum([utf8_len(text) for text in documents])
    texts = documents[: int(np.searchsorted(ends, max_bytes)) + 1]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text[:max_bytes] for text in texts), model_writer=model,
            model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=True, byte_fallback=True,
            character_coverage=0.9995, split_digits=True, max_sentence_length=4 * max_bytes,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=False, pad_id=PAD_ID, bos_id=BOS_ID, eos_id=EOS_ID, unk_id=UNK_ID,
            num_threads=2, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        for bound, pattern in (("at most", r"value <= (\d+)"), ("at least", r"\d+ vs (\d+)")):
            if limit := re.search(pattern, str(error)):
                raise DataError(
                    f"vocabulary: this text allows {bound} {limit[1]}, found {vocab_size}; "
                    "change --vocab or the amount of text"
                ) from error
        raise DataError(f"SentencePiece cannot train on this text: {error}") from error
    return model.getvalue()


def load_tokenizer(path: Path) -> tuple[bytes, int]:
    """Return (serialised model, vocabulary size); DataError unless it suits the shard format."""
    try:
        model = path.read_bytes()
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "not a SentencePiece model"
        raise DataError(f"{path}: cannot be used as tokenizer: {reason}") from error
    check_vocab(processor.vocab_size())
    if processor.bos_id() != BOS_ID:
        raise DataError(f"{path}: expected BOS id {BOS_ID}, found {processor.bos_id()}; retrain it")
    return model, processor.vocab_size()


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


def recorded(dataset: Path, source: str) -> dict[str, Any]:
    """Return the manifest of `dataset`, {} if there is no such folder.

    DataError if it was not made from `source`: it may be another corpus, so it is left alone.
    """
    if not dataset.exists():
        return {}
    try:
        manifest: dict[str, Any] = json.loads((dataset / "manifest.json").read_bytes())
    except (OSError, ValueError):
        manifest = {}
    if manifest.get("source") != source:
        raise DataError(
            f"{dataset}: exists, made from other inputs or options; delete it, or choose another "
            "--name or --root"
        )
    return manifest


def is_complete(dataset: Path, tokenizer: Path, source: str) -> bool:
    """Tell whether a build from `source` exists undamaged; DataError as for recorded()."""
    if not (manifest := recorded(dataset, source)):
        return False
    try:
        return manifest["tokenizer"] == digest(tokenizer.read_bytes()) and all(
            split["tokens"] == sum(count_tokens(dataset / shard) for shard in split["shards"])
            for split in manifest["splits"].values()
        )
    except (OSError, DataError):
        return False


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
        if is_complete(dataset, tokenizer, source):  # built by another process in the meantime
            return dataset, tokenizer
        train, val, model = make()
        (scratch / "model").write_bytes(model)
        (scratch / "dataset").mkdir()
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        splits = {
            split: write_split(scratch / "dataset", split, documents, processor)
            for split, documents in (("train", train), ("val", val))
        }
        manifest = {"source": source, "tokenizer": digest(model), "splits": splits}
        (scratch / "dataset/manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        if dataset.exists():  # a damaged build from this very source
            dataset.rename(scratch / "damaged")
        os.replace(scratch / "model", tokenizer)
        os.replace(scratch / "dataset", dataset)
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


def build_text(args: argparse.Namespace) -> tuple[Path, Path]:
    """Build a corpus from args.files; DataError for unusable files or options."""
    if not re.fullmatch(r"[\w.-]+", args.name) or args.name.startswith(("sample", "fineweb")):
        raise DataError(
            "--name: expected letters, digits, '.', '_' or '-', and no name of the other commands "
            f"(sample..., fineweb...), found {args.name!r}"
        )
    if not 0 < args.val_fraction < 1:
        raise DataError(f"--val-fraction: expected between 0 and 1, found {args.val_fraction}")
    model, vocab_size = load_tokenizer(args.tokenizer) if args.tokenizer else (b"", args.vocab)
    check_vocab(vocab_size)
    texts = in_hash_order([text for path in args.files for text in read_documents(path)])
    if len(texts) < 2:
        raise DataError(
            f"{args.files[0]}: expected 2 or more distinct documents in all, one for each split, "
            f"found {len(texts)}; add files, or separate documents by a NUL byte"
        )

    def make() -> Parts:
        train, val = split_documents(texts, int(args.val_fraction * sum(map(utf8_len, texts))))
        return train, val, model or train_tokenizer(train, vocab_size, TEXT_TOKENIZER_BYTES)

    source = digest("\0".join([digest(model), str(args.val_fraction), *texts]))
    return build(args.root, args.name, vocab_size, f"text {source}", make)


def hub_fetcher(repo: str, staging: Path) -> Callable[[str], Path]:
    """Return a function that downloads one file of the export in `repo` to `staging`."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise DataError("huggingface_hub is missing; run: pip install huggingface_hub") from error

    def fetch(name: str) -> Path:
        remote = f"datasets/{name}"  # the export's folder in the repository
        try:
            return Path(hf_hub_download(repo, remote, repo_type="dataset", local_dir=staging))
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
        entries = {entry["name"]: entry for entry in json.loads(manifest.read_bytes())["datasets"]}
        if dataset in entries:
            stats = entries[dataset]["stats"]
            return {split: int(stats[f"files_{split}"]) for split in ("train", "val")}
    except (ValueError, KeyError, TypeError) as error:
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
        os.replace(staged, path)


def build_fineweb(args: argparse.Namespace) -> tuple[Path, Path]:
    """Download the validation split, the first args.shards training shards and the tokenizer."""
    if not (repo := args.repo or FINEWEB_REPOS.get(args.vocab)):
        known = ", ".join(map(str, FINEWEB_REPOS))
        raise DataError(f"--vocab: exports known for {known}, found {args.vocab}; name a --repo")
    staging = args.root / ".fineweb_download"  # outlives an interruption: the hub client resumes
    fetch = hub_fetcher(repo, staging)
    name, model = f"fineweb10B_sp{args.vocab}", f"fineweb_{args.vocab}_bpe.model"
    dataset, tokenizer = args.root / "datasets" / name, args.root / "tokenizers" / model
    with locked(args.root) as scratch:
        counts = published(fetch("manifest.json"), name, repo)
        if not 1 <= args.shards <= counts["train"]:
            raise DataError(
                f"--shards: expected 1 to {counts['train']} ({repo}), found {args.shards}"
            )
        if not recorded(dataset, repo):
            (scratch / "manifest.json").write_text(json.dumps({"source": repo}))
            scratch.rename(dataset)
        for split, count in (("val", counts["val"]), ("train", args.shards)):
            for number in range(count):
                shard = f"fineweb_{split}_{number:06d}.bin"
                place(dataset / shard, count_tokens, fetch, f"datasets/{name}/{shard}")
        place(tokenizer, load_tokenizer, fetch, f"tokenizers/{model}")
        shutil.rmtree(staging)
    return dataset, tokenizer


def report(dataset: Path, tokenizer: Path) -> None:
    """Print the size of each split (text sizes only if built here) and the line for train_gpt."""
    counted = json.loads((dataset / "manifest.json").read_bytes()).get("splits", {})
    for split in ("train", "val"):
        shards = sorted(dataset.glob(f"fineweb_{split}_*.bin"))
        tokens = sum(map(count_tokens, shards))
        line = f"{split:5}  {tokens:,} tokens in {len(shards)} shard(s)"
        if entry := counted.get(split):
            line += f", {entry['documents']:,} documents, {entry['bytes']:,} bytes"
            line += f", {entry['bytes'] / tokens:.3f} bytes/token"
        print(line)
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
        "UTF-8, also .gz or .xz; one document, or several separated by NUL bytes"))  # fmt: skip
    text.add_argument("--name", default="text", help="of the dataset (default: %(default)s)")
    text.add_argument("--val-fraction", type=float, default=0.05, help="default: %(default)s")
    tokenizer = text.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer", type=Path, help="use this model instead of training one")
    for command in (sample, tokenizer, fineweb):
        command.add_argument("--vocab", type=int, default=1024, help="default: %(default)s")
    fineweb.add_argument("--shards", type=int, default=80, help=(
        "training shards of 100M tokens (default: %(default)s)"))  # fmt: skip
    fineweb.add_argument("--repo", default=os.environ.get(REPO_ENV), help=(
        f"Hugging Face dataset in the challenge's layout (default: ${REPO_ENV}, or by --vocab: "
        f"{', '.join(f'{size} {repo}' for size, repo in FINEWEB_REPOS.items())})"))  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.command == "sample":
            paths = build_sample(args.root, args.vocab)
        else:
            paths = {"text": build_text, "fineweb": build_fineweb}[args.command](args)
    except OSError as error:  # a full disk, a --root that cannot be written
        raise DataError(f"{error.filename or args.root}: {error.strerror or error}") from error
    report(*paths)


if __name__ == "__main__":
    main()
