"""Claims about prepare_data.py, checked on the real sample (built once) and on small texts."""

import errno
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import prepare_data  # noqa: E402

REPO = Path(prepare_data.__file__).parent
HEADER_BYTES = 1024
WORDS = ["river", "stone", "lantern", "quiet", "harbour", "seventeen", "violet", "engine", "winter"]
DOCUMENTS = [
    f"Document {i}: the {WORDS[i % 9]} meets the {WORDS[i * 7 % 9]}.\n\n"
    f"  indented\tline {i * i}, caf\u00e9 \u6f22\u5b57 \U0001f600 " + " ".join(WORDS[i % 7 :])
    for i in range(60)
]


def read_shard(path: Path) -> np.ndarray:
    return np.fromfile(path, dtype="<u2", offset=HEADER_BYTES)


def read_texts(dataset: Path, split: str, tokenizer: Path) -> list[str]:
    """Decode a split document by document, cutting at BOS as a consumer of the format would."""
    tokens = np.concatenate([read_shard(p) for p in sorted(dataset.glob(f"fineweb_{split}_*"))])
    starts = np.flatnonzero(tokens == 1)
    assert starts[0] == 0
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    return [processor.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


def files_in(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def blake2b(text: bytes, size: int) -> str:
    return hashlib.blake2b(text, digest_size=size).hexdigest()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_manifest(dataset: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((dataset / "manifest.json").read_text())
    return manifest


def text_command(root: Path, *arguments: object, vocab: int = 400) -> tuple[Path, Path]:
    prepare_data.main(["text", "--root", str(root), f"--vocab={vocab}", *map(str, arguments)])
    return root / f"datasets/text_sp{vocab}", root / f"tokenizers/text_{vocab}_bpe.model"


def failure(*arguments: object) -> str:
    """Run a command that must fail and return its message, which must be a single line."""
    with pytest.raises(SystemExit) as caught:
        prepare_data.main([str(argument) for argument in arguments])
    message = str(caught.value)
    assert message.startswith("prepare_data: ") and "\n" not in message
    return message


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The real sample, with the documents that went into it recorded on the way."""
    root = tmp_path_factory.mktemp("sample")
    parts: list[tuple[list[str], list[str], bytes]] = []
    make = prepare_data.sample_parts

    def recording(vocab_size: int) -> tuple[list[str], list[str], bytes]:
        parts.append(make(vocab_size))
        return parts[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "sample_parts", recording)
        dataset, tokenizer = prepare_data.build_sample(root)
    return SimpleNamespace(
        root=root, dataset=dataset, tokenizer=tokenizer, train=parts[0][0], val=parts[0][1]
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "documents.txt"
    path.write_bytes("\0".join(DOCUMENTS).encode())
    return path


def test_sample_lands_at_the_documented_paths(sample: SimpleNamespace) -> None:
    assert sample.dataset == sample.root / "datasets/sample_sp1024"
    assert sample.tokenizer == sample.root / "tokenizers/sample_1024_bpe.model"
    assert {p.name for p in sample.dataset.iterdir()} == {
        "fineweb_train_000000.bin", "fineweb_val_000000.bin", "manifest.json",
    }  # fmt: skip


@pytest.mark.parametrize("split", ["train", "val"])
def test_shard_header_is_exact(sample: SimpleNamespace, split: str) -> None:
    path = sample.dataset / f"fineweb_{split}_000000.bin"
    header = np.frombuffer(path.read_bytes()[:HEADER_BYTES], dtype="<i4")
    count = (path.stat().st_size - HEADER_BYTES) // 2
    assert header.tolist() == [20240520, 1, count] + [0] * 253


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_bos_per_document_and_ids_below_vocab(sample: SimpleNamespace, split: str) -> None:
    tokens = read_shard(sample.dataset / f"fineweb_{split}_000000.bin")
    assert tokens[0] == 1
    assert np.count_nonzero(tokens == 1) == len(getattr(sample, split))
    assert tokens.max() < 1024
    assert not np.isin(tokens, (0, 2, 3)).any(), "padding, EOS or unknown tokens in the data"


@pytest.mark.parametrize("split", ["train", "val"])
def test_sample_decodes_to_its_source_byte_for_byte(sample: SimpleNamespace, split: str) -> None:
    documents = getattr(sample, split)
    assert read_texts(sample.dataset, split, sample.tokenizer) == documents
    manifest = json.loads((sample.dataset / "manifest.json").read_text())["splits"][split]
    assert manifest["bytes"] == sum(len(text.encode()) for text in documents)
    assert manifest["documents"] == len(documents)


def test_leading_space_appears_at_most_once_and_first_in_a_piece(sample: SimpleNamespace) -> None:
    """Byte accounting charges one byte for a leading U+2581 and UTF-8 bytes for the rest."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sample.tokenizer))
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    assert len(pieces) == 1024
    assert not [piece for piece in pieces if "\u2581" in piece[1:]]
    texts = read_texts(sample.dataset, "val", sample.tokenizer)
    assert not [text for text in texts if text != text.strip()]


def test_sample_val_has_60k_to_250k_tokens(sample: SimpleNamespace) -> None:
    assert 60_000 <= prepare_data.count_tokens(sample.dataset / "fineweb_val_000000.bin") <= 250_000


def test_no_val_document_is_in_train(sample: SimpleNamespace) -> None:
    train = "\0".join(sample.train)
    assert not set(sample.val) & set(sample.train)
    assert len(set(sample.train)) == len(sample.train)
    assert not [text for text in sample.val if text in train]


def test_the_sample_keeps_the_split_of_recipe_1(sample: SimpleNamespace) -> None:
    """Documents in the order of their digests, each into validation while it fits."""
    documents = sorted(sample.train + sample.val, key=lambda t: blake2b(t.encode(), 16))
    room = int(np.clip(sum(len(t.encode()) for t in documents) // 20, 300_000, 500_000))
    sides: dict[bool, list[str]] = {True: [], False: []}
    for text in documents:
        fits = len(text.encode()) <= room
        sides[fits].append(text)
        room -= len(text.encode()) * fits
    assert sides == {True: sample.val, False: sample.train}


def test_the_sample_has_near_twins_that_its_rule_ignores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule for a user's text must not reach the sample, whose bytes are the smoke run's."""
    words = " ".join(f"word{i}" for i in range(300))
    texts = [f"{words} number {i}" for i in range(400)]
    monkeypatch.setattr(prepare_data, "module_texts", lambda: iter([text] for text in texts))
    monkeypatch.setattr(prepare_data, "train_tokenizer", lambda *a, **options: b"")
    train, val = prepare_data.sample_parts(1024)[:2]
    assert sorted(train + val) == sorted(texts) and len(val) > 50


def test_second_sample_call_changes_nothing(sample: SimpleNamespace) -> None:
    before = {p: p.stat().st_mtime_ns for p in sample.root.rglob("*")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "sample_parts", lambda vocab: pytest.fail("built again"))
        assert prepare_data.build_sample(sample.root) == (sample.dataset, sample.tokenizer)
    assert {p: p.stat().st_mtime_ns for p in sample.root.rglob("*")} == before


def test_sample_is_byte_identical_under_another_hash_seed(tmp_path: Path) -> None:
    script = (
        "import sys, itertools, pathlib, prepare_data as p\n"
        "texts = p.module_texts\n"
        "p.module_texts = lambda: itertools.islice(texts(), 200)\n"
        "p.build_sample(pathlib.Path(sys.argv[1]))\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / seed)], cwd=REPO,
                         env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]  # fmt: skip
    assert [run.wait() for run in runs] == [0, 0]
    first, second = files_in(tmp_path / "1"), files_in(tmp_path / "2")
    assert first == second and len(first) == 5


def test_text_round_trips_and_splits_all_documents(tmp_path: Path, source: Path) -> None:
    dataset, tokenizer = text_command(tmp_path, source, "--val-fraction", 0.2)
    train, val = (read_texts(dataset, split, tokenizer) for split in ("train", "val"))
    assert sorted(train + val) == sorted(DOCUMENTS)
    total = sum(len(text.encode()) for text in DOCUMENTS)
    assert 0.15 * total < sum(len(text.encode()) for text in val) <= 0.2 * total


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_text_gives_the_same_tokens(
    tmp_path: Path, source: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    packed = tmp_path / f"packed{suffix}"
    packed.write_bytes(pack(source.read_bytes()))
    plain, _ = text_command(tmp_path / "plain", source)
    unpacked, _ = text_command(tmp_path / "packed", packed)
    assert files_in(plain) == files_in(unpacked)


def test_text_drops_duplicate_and_blank_documents(tmp_path: Path, source: Path) -> None:
    repeated = tmp_path / "repeated.txt"
    repeated.write_bytes("\0".join([DOCUMENTS[0], " \n ", "", DOCUMENTS[1]]).encode())
    dataset, tokenizer = text_command(tmp_path, source, repeated)
    texts = [text for split in ("train", "val") for text in read_texts(dataset, split, tokenizer)]
    assert sorted(texts) == sorted(DOCUMENTS)


def test_the_space_mark_of_sentencepiece_becomes_a_space(tmp_path: Path, source: Path) -> None:
    marked = tmp_path / "marked.txt"
    marked.write_text("a bar \u2581 in a chart", encoding="utf-8")
    dataset, tokenizer = text_command(tmp_path, source, marked)
    texts = read_texts(dataset, "train", tokenizer) + read_texts(dataset, "val", tokenizer)
    assert "a bar   in a chart" in texts


def test_given_tokenizer_is_used_unchanged(tmp_path: Path, source: Path) -> None:
    _, tokenizer = text_command(tmp_path / "first", source, vocab=420)
    arguments = ["text", source, "--root", tmp_path, "--name", "mine", "--tokenizer", tokenizer]
    prepare_data.main(list(map(str, arguments)))
    stored = tmp_path / "tokenizers/mine_420_bpe.model"
    assert stored.read_bytes() == tokenizer.read_bytes()
    assert read_texts(tmp_path / "datasets/mine_sp420", "val", stored)[0] in DOCUMENTS


def test_shards_are_cut_at_the_limit_without_losing_tokens(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = text_command(tmp_path / "whole", source)
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 500)
    monkeypatch.setattr(prepare_data, "ENCODE_BATCH", 7)
    cut, _ = text_command(tmp_path / "cut", source)
    shards = [read_shard(path) for path in sorted(cut.glob("fineweb_train_*"))]
    assert len(shards) > 2 and {shard.size for shard in shards[:-1]} == {500}
    expected = read_shard(whole / "fineweb_train_000000.bin")
    assert np.array_equal(np.concatenate(shards), expected)


def check_manifest(dataset: Path, tokenizer: Path) -> dict[str, Any]:
    """Every fact of the manifest, measured again from the files alone."""
    manifest = read_manifest(dataset)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    assert manifest["version"] == 2
    pieces = processor.id_to_piece(list(range(processor.vocab_size())))
    assert manifest["tokenizer"] == {
        "file": tokenizer.name, "sha256": sha256(tokenizer), "vocab_size": len(pieces),
        **({"case_marks": True} if "\ue001" in pieces else {}),
    }  # fmt: skip
    assert set(manifest["splits"]) == {"train", "val"}
    for split, entry in manifest["splits"].items():
        paths = sorted(dataset.glob(f"fineweb_{split}_*.bin"))
        assert entry["shards"] == [
            {"file": path.name, "tokens": read_shard(path).size, "sha256": sha256(path)}
            for path in paths
        ]
        texts = read_texts(dataset, split, tokenizer)
        assert entry["tokens"] == sum(read_shard(path).size for path in paths)
        assert entry["documents"] == len(texts)
    return manifest


def test_the_manifest_states_every_file_and_split(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 500)
    dataset, tokenizer = text_command(tmp_path, source, "--val-fraction", 0.3)
    manifest = check_manifest(dataset, tokenizer)
    assert len(manifest["splits"]["val"]["shards"]) > 1
    for split, entry in manifest["splits"].items():
        texts = read_texts(dataset, split, tokenizer)
        assert entry["bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest["twins"] == {"copies": 0, "documents": 0, "groups": 0}


def test_the_manifest_of_the_sample_states_the_same(sample: SimpleNamespace) -> None:
    check_manifest(sample.dataset, sample.tokenizer)


def test_a_sample_of_an_older_version_gets_a_new_manifest(
    sample: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sample.root, tmp_path, dirs_exist_ok=True)
    dataset, tokenizer = tmp_path / "datasets/sample_sp1024", tmp_path / "tokenizers"
    tokenizer /= sample.tokenizer.name
    new = read_manifest(dataset)
    splits = {
        split: {**entry, "shards": [shard["file"] for shard in entry["shards"]]}
        for split, entry in new["splits"].items()
    }
    digest = blake2b(tokenizer.read_bytes(), 16)
    old = {"source": new["source"], "tokenizer": digest, "splits": splits}
    (dataset / "manifest.json").write_text(json.dumps(old))
    before = files_in(sample.root)
    monkeypatch.setattr(prepare_data, "sample_parts", lambda vocab: pytest.fail("built again"))
    prepare_data.build_sample(tmp_path)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    "content", ["[]", "{}", "7", '{"source": 1}', "\0", '{"splits": 1}', "[" * 100_000]
)
def test_a_manifest_of_another_form_is_refused_in_one_line(
    tmp_path: Path, source: Path, content: str
) -> None:
    dataset, _ = text_command(tmp_path, source)
    (dataset / "manifest.json").write_text(content)
    assert "delete it" in failure("text", source, "--root", tmp_path, "--vocab", 400)


@pytest.mark.parametrize("part", ["version", "tokenizer", "splits", "twins"])
def test_a_manifest_that_lacks_a_part_is_built_again(
    tmp_path: Path, source: Path, part: str
) -> None:
    dataset, tokenizer = text_command(tmp_path, source)
    manifest = read_manifest(dataset)
    for value in (None, {}, [], "x"):
        broken = {**manifest, part: value}
        (dataset / "manifest.json").write_text(json.dumps(broken))
        text_command(tmp_path, source)
        assert read_manifest(dataset) == manifest


@pytest.mark.parametrize("size", [7, -1, "many", None, float("inf"), [], True])
def test_a_manifest_of_other_bytes_than_the_text_is_built_again(
    tmp_path: Path, source: Path, size: object
) -> None:
    """train_gpt.py refuses them for case-marked shards, and says to build these again."""
    dataset, _ = text_command(tmp_path, source)
    manifest = read_manifest(dataset)
    broken = json.loads(json.dumps(manifest))
    broken["splits"]["val"]["bytes"] = size
    (dataset / "manifest.json").write_text(json.dumps(broken))
    text_command(tmp_path, source)
    assert read_manifest(dataset) == manifest


def test_a_changed_byte_in_a_shard_is_built_again(tmp_path: Path, source: Path) -> None:
    dataset, _ = text_command(tmp_path, source)
    shard = dataset / "fineweb_val_000000.bin"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    text_command(tmp_path, source)
    assert shard.read_bytes() == good


def test_changed_input_is_refused_and_the_old_data_kept(tmp_path: Path, source: Path) -> None:
    dataset, _ = text_command(tmp_path, source)
    before = files_in(dataset)
    source.write_bytes(source.read_bytes() + b" changed")
    message = failure("text", source, "--root", tmp_path, "--vocab", 400)
    assert str(dataset) in message and "delete it" in message
    assert files_in(dataset) == before


def test_a_truncated_shard_is_built_again(tmp_path: Path, source: Path) -> None:
    dataset, _ = text_command(tmp_path, source)
    shard = dataset / "fineweb_train_000000.bin"
    good = shard.read_bytes()
    shard.write_bytes(good[:-2])
    text_command(tmp_path, source)
    assert shard.read_bytes() == good


@pytest.mark.parametrize(
    "stage", ["second write_split", "first replace", "second replace", "third replace"]
)
def test_a_killed_build_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, source: Path, stage: str
) -> None:
    """The process dies without cleanup (os._exit) at `stage`; a later run must recover."""
    script = (
        "import os, sys, prepare_data as p\n"
        "stage, calls, replace, write = sys.argv[1], [], os.replace, p.write_split\n"
        "def die_at(name, then):\n"
        "    def call(*a):\n"
        "        calls.append(name)\n"
        "        order = ('first ', 'second ', 'third ')[calls.count(name) - 1]\n"
        "        return os._exit(9) if order + name == stage else then(*a)\n"
        "    return call\n"
        "os.replace, p.write_split = die_at('replace', replace), die_at('write_split', write)\n"
        "p.main(sys.argv[2:])\n"
    )
    arguments = ["text", str(source), "--root", str(tmp_path), "--vocab", "400"]
    died = subprocess.run([sys.executable, "-c", script, stage, *arguments], cwd=REPO)
    assert died.returncode == 9
    assert not list((tmp_path / "datasets").glob("*"))
    dataset, tokenizer = text_command(tmp_path, source)
    assert read_texts(dataset, "val", tokenizer)[0] in DOCUMENTS
    assert not (tmp_path / ".prepare_data.tmp").exists()


def test_two_processes_building_at_once_both_succeed(tmp_path: Path, source: Path) -> None:
    command = [sys.executable, str(REPO / "prepare_data.py"), "text", str(source)]
    command += ["--root", str(tmp_path / "both"), "--vocab", "400"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert outputs[0] == outputs[1] and "export DATA_PATH=" in outputs[0]
    alone, _ = text_command(tmp_path / "alone", source)
    assert files_in(tmp_path / "both/datasets/text_sp400") == files_in(alone)


def test_paths_need_not_be_utf8(tmp_path: Path, source: Path) -> None:
    """SentencePiece takes no such path."""
    root, given = tmp_path / "data\udcff", tmp_path / "given\udcff.model"
    dataset, tokenizer = text_command(root, source)
    assert read_manifest(dataset)["splits"]["val"]["documents"] == 3
    shutil.copy(tokenizer, given)
    arguments = ["text", source, "--root", root, "--name", "mine", "--tokenizer", given]
    prepare_data.main(list(map(str, arguments)))
    assert (root / "datasets/mine_sp400/manifest.json").exists()


def test_summary_states_sizes_and_the_export_line(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, tokenizer = text_command(tmp_path, source)
    train, val, twins, export = capsys.readouterr().out.splitlines()
    tokens = read_shard(dataset / "fineweb_val_000000.bin").size
    assert val.startswith("val ") and f" {tokens:,} tokens in 1 shard(s)" in val
    assert train.startswith("train ") and "bytes/token" in train
    assert twins == "twins  0 copies dropped; 0 documents in 0 groups of near-identical ones"
    assert export == f"export DATA_PATH={dataset} TOKENIZER_PATH={tokenizer}"


def test_non_utf8_error_names_file_and_byte_offset(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"twelve bytes\xe9 more")
    message = failure("text", path, "--root", tmp_path)
    assert str(path) in message and "0xe9 at offset 12" in message


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        (None, [], "No such file"),
        (b"", [], "found 0"),
        (b"one document", [], "found 1"),
        (b"too\0little", ["--val-fraction", 0.5], "allows at most"),
        ("\0".join(DOCUMENTS).encode(), ["--vocab", 200], "allows at least"),
        (b"a\0b", ["--vocab", 65536], "expected 1 to 65535"),
        (b"a\0b", ["--val-fraction", 1.5], "found 1.5"),
        (b"a\0b", ["--name", "../up"], "found '../up'"),
        (b"a\0b", ["--name", "fineweb10B"], "fineweb..."),
    ],
)
def test_text_mistakes_are_named_in_one_line(
    tmp_path: Path, content: bytes | None, arguments: list[object], expected: str
) -> None:
    path = tmp_path / "input.txt"
    if content is not None:
        path.write_bytes(content)
    assert expected in failure("text", path, "--root", tmp_path / "data", *arguments)
    assert not list((tmp_path / "data").glob("*/*")), "a failed command left output"


@pytest.mark.parametrize("name", ["some/shard.bin", None])
def test_a_full_disk_is_named_by_the_file_or_else_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", name)

    monkeypatch.setattr(prepare_data, "build_text", full)
    message = failure("text", "--root", tmp_path, "input.txt")
    assert message == f"prepare_data: {name or tmp_path}: No space left on device"


def test_damaged_archive_and_tokenizer_are_named(tmp_path: Path, source: Path) -> None:
    broken = tmp_path / "broken.gz"
    broken.write_bytes(gzip.compress(b"x" * 999)[:-9])
    assert str(broken) in failure("text", broken, "--root", tmp_path)
    message = failure("text", source, "--root", tmp_path, "--tokenizer", source)
    assert str(source) in message and "not a SentencePiece model" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "not a SentencePiece model"), (None, "pieces: expected 1 to 300 (uint16 ids), found")],
)
def test_a_tokenizer_that_no_shard_can_have_is_named(
    tmp_path: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | None,
    expected: str,
) -> None:
    given = tmp_path / "given.model"
    if content is None:  # of too many pieces for the limit below
        spm(plain_words(200), given)
        monkeypatch.setattr(prepare_data, "MAX_VOCAB", 300)
    else:
        given.write_bytes(content)
    message = failure("text", source, "--root", tmp_path, "--tokenizer", given)
    assert message.startswith(f"prepare_data: {given}: ") and expected in message


def test_missing_huggingface_hub_names_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in failure("fineweb", "--root", tmp_path)


def test_another_huggingface_hub_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip would say that it is there already."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", ModuleType("huggingface_hub"))
    message = failure("fineweb", "--root", tmp_path)
    assert "cannot import name 'hf_hub_download'" in message
    assert message.endswith("pip install -U huggingface_hub")


def spm(texts: list[str], path: Path, **options: Any) -> Path:
    """A SentencePiece model of 400 pieces with the challenge's ids; the rest is default."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=400,
        byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2, **options,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


def plain_words(count: int) -> list[str]:
    """Documents that every normaliser leaves as they are."""
    return [
        " ".join(WORDS[(i * k + k * k) % 9] for k in range(1, 30)) + f" {i}" for i in range(count)
    ]


@pytest.mark.parametrize(
    ("options", "odd"),
    [
        ({}, "two  spaces"),  # the default normaliser keeps one
        ({"normalization_rule_name": "nmt_nfkc"}, "wide \uff21\uff22"),
        ({"normalization_rule_name": "nmt_nfkc_cf"}, "An Upper case letter"),  # of as many bytes
        ({"normalization_rule_name": "nmt_nfkc"}, "\uff71 and \u30a2"),  # of as many bytes
    ],
)
def test_a_tokenizer_that_changes_the_text_is_refused(
    tmp_path: Path, options: dict[str, Any], odd: str
) -> None:
    documents = plain_words(200)
    model = spm(documents, tmp_path / "given.model", **options)
    arguments = ["--tokenizer", model, "--similarity", 1, "--val-fraction", 0.5, "--root"]
    good = tmp_path / "good.txt"
    good.write_text("\0".join(documents), encoding="utf-8")
    prepare_data.main(["text", *map(str, [good, *arguments, tmp_path / "good"])])
    (tmp_path / "bad.txt").write_text("\0".join([odd + f" {i}" for i in range(100)]), "utf-8")
    root = tmp_path / "data"
    message = failure("text", tmp_path / "bad.txt", *arguments, root)
    assert odd in message
    assert str(model) in message
    assert not list(root.glob("*/*")), "a failed command left output"


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_byte_count_unlike_the_text_names_its_document(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    """The command trusts the count of train_gpt.py alone, whatever the tokenizer."""
    import train_gpt

    dataset, tokenizer = text_command(tmp_path / "good", source)
    documents = read_texts(dataset, split, tokenizer)
    victim = documents[len(documents) // 2]
    load = train_gpt.load_byte_table
    ids = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).encode(victim)

    def wrong(path: str, vocab_size: int) -> Any:
        table = load(path, vocab_size)

        def count(tokens: np.ndarray) -> int:
            starts = np.flatnonzero(tokens == 1)[1:]
            parts = np.split(tokens, starts)
            return sum(table.count(p) + (p[1:].tolist() == ids) for p in parts)

        return SimpleNamespace(count=count)

    monkeypatch.setattr(train_gpt, "load_byte_table", wrong)
    root = tmp_path / "data"
    message = failure("text", source, "--root", root, "--vocab", 400)
    size = len(victim.encode())
    assert f"{size} bytes" in message and f"counts {size + 1}" in message
    assert victim[:12] in message and split in message
    assert not list(root.glob("*/*")), "a failed command left output"


def test_a_tokenizer_that_cannot_be_counted_is_refused(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_gpt

    def refuse(path: str, vocab_size: int) -> None:
        raise train_gpt.RunError("TOKENIZER_PATH=x: cannot be counted")

    monkeypatch.setattr(train_gpt, "load_byte_table", refuse)
    message = failure("text", source, "--root", tmp_path / "data", "--vocab", 400)
    assert "cannot be counted" in message
    assert not list((tmp_path / "data").glob("*/*")), "a failed command left output"


@pytest.mark.parametrize("command", ["text", "fineweb"])
def test_a_program_that_cannot_be_imported_is_one_line(
    hub: SimpleNamespace, source: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """As without torch, which the download alone does without."""
    arguments = {
        "text": ["text", source, "--root", hub.root, "--vocab", 400],
        "fineweb": fineweb_arguments(hub, "--shards", 1),
    }
    monkeypatch.setitem(sys.modules, "train_gpt", None)
    message = failure(*arguments[command])
    assert "cannot be imported" in message and "pip install -r requirements.txt" in message


@pytest.mark.parametrize("spaces", [0, 1, 3])
def test_a_trained_tokenizer_has_pieces_for_space_and_bytes(spaces: int) -> None:
    rare = "\u6e2f\u53e3\u5f88\u5b89\u9759\u3002" * 3000 + " \u706f" * spaces
    processor = sentencepiece.SentencePieceProcessor(
        model_proto=prepare_data.train_tokenizer([rare, rare[:99]], 270, 1_000_000)
    )
    space = processor.piece_to_id("\u2581")
    assert space != processor.unk_id() and not processor.is_byte(space)
    assert processor.encode("a  b", out_type=str) == ["<0x61>", "\u2581", "\u2581", "<0x62>"]
    assert sum(processor.is_byte(i) for i in range(270)) == 256


@pytest.mark.parametrize("case_marks", [False, True])
def test_every_required_character_is_in_the_text_that_trains(
    monkeypatch: pytest.MonkeyPatch, case_marks: bool
) -> None:
    """Else SentencePiece 0.2.2 aborts the process, of which Python learns nothing."""
    given: dict[str, Any] = {}
    model = prepare_data.train_tokenizer(DOCUMENTS, 400, 10_000)

    def train(sentence_iterator: Iterator[str], model_writer: io.BytesIO, **options: Any) -> None:
        given.update(options, text="".join(sentence_iterator))
        model_writer.write(model)

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", train)
    prepare_data.train_tokenizer(["no_space_and_no_capital"], 400, 1_000, case_marks=case_marks)
    assert len(given["required_chars"]) == (4 if case_marks else 1)
    assert set(given["required_chars"]) <= set(given["text"])


def test_text_with_rare_spaces_is_counted_exactly(tmp_path: Path) -> None:
    line = "\u6e2f\u53e3\u5f88\u5b89\u9759\u3002"
    texts = [line[i % 6 :] * (40 + i) + " \u706f" * (i % 30 == 0) for i in range(60)]
    path = tmp_path / "rare.txt"
    path.write_text("\0".join(texts), encoding="utf-8")
    dataset, tokenizer = text_command(tmp_path, path, "--similarity", 1, vocab=280)
    both = itertools.chain(*(read_texts(dataset, split, tokenizer) for split in ("train", "val")))
    assert sorted(both) == sorted(texts)


def test_windows_is_refused_in_one_line() -> None:
    script = (
        "import runpy, sys\n"
        "sys.platform, sys.modules['fcntl'] = 'win32', None\n"
        "sys.argv = ['prepare_data.py', 'sample']\n"
        "runpy.run_path('prepare_data.py', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("prepare_data: ") and done.stderr.count("\n") == 1
    assert "Linux or macOS" in done.stderr


@pytest.mark.parametrize(
    ("error", "expected"), [(KeyboardInterrupt, "interrupted"), (MemoryError, "memory")]
)
def test_an_interrupted_command_ends_in_one_line(
    tmp_path: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    expected: str,
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(prepare_data, "write_split", fail)
    assert expected in failure("text", source, "--root", tmp_path, "--vocab", 400)
    assert not list(tmp_path.glob("datasets/*")), "a failed command left output"


def test_a_folder_as_file_or_a_file_as_root_is_one_line(tmp_path: Path, source: Path) -> None:
    assert str(tmp_path) in failure("text", tmp_path, "--root", tmp_path / "data")
    assert str(source) in failure("text", source, "--root", source / "data")
    assert str(source) in failure("sample", "--root", source)


@pytest.mark.parametrize(
    "arguments",
    [["sample", "--vocab", 200], ["sample", "--vocab", 0], ["sample", "--vocab", 70000]],
)
def test_an_impossible_vocabulary_is_one_line(
    tmp_path: Path, arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_data, "module_texts", lambda: iter([[d * 300] for d in DOCUMENTS]))
    assert "vocabulary" in failure(*arguments, "--root", tmp_path)


@pytest.fixture
def hub(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A stand-in huggingface_hub serving a published export of 3 training shards from disk."""
    dataset, tokenizer = text_command(tmp_path / "made", source)
    remote = tmp_path / "remote/datasets"
    export = remote / "datasets/fineweb10B_sp400"
    export.mkdir(parents=True)
    train = dataset / "fineweb_train_000000.bin"
    for number in range(3):
        shutil.copy(train, export / f"fineweb_train_{number:06d}.bin")
    shutil.copy(dataset / "fineweb_val_000000.bin", export)
    (remote / "tokenizers").mkdir()
    shutil.copy(tokenizer, remote / "tokenizers/fineweb_400_bpe.model")
    entry = {"name": "fineweb10B_sp400", "stats": {"files_train": 3, "files_val": 1}}
    (remote / "manifest.json").write_text(json.dumps({"datasets": [entry]}))
    state = SimpleNamespace(root=tmp_path / "data", export=export, requests=[])

    def hf_hub_download(
        repo_id: str, filename: str, *, repo_type: str, local_dir: str | Path
    ) -> str:
        assert repo_type == "dataset"
        state.requests.append((repo_id, filename))
        if not (tmp_path / "remote" / filename).exists():
            raise FileNotFoundError(f"404 for {filename}\nsecond line")
        local = Path(local_dir) / filename
        local.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "remote" / filename, local)
        return str(local)

    fake = SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    yield state


def fineweb_arguments(hub: SimpleNamespace, *more: object) -> list[str]:
    arguments = ["fineweb", "--root", hub.root, "--vocab", 400, "--repo", "me/export", *more]
    return list(map(str, arguments))


def test_fineweb_is_the_published_80_shards_unless_told_otherwise() -> None:
    assert prepare_data.parse_args(["fineweb"]).shards == 80


def test_fineweb_downloads_val_and_only_the_shards_asked_for(hub: SimpleNamespace) -> None:
    prepare_data.main(fineweb_arguments(hub, "--shards", 2))
    dataset = hub.root / "datasets/fineweb10B_sp400"
    names = {"fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"}
    assert {path.name for path in dataset.glob("*.bin")} == names
    assert all((dataset / n).read_bytes() == (hub.export / n).read_bytes() for n in names)
    tokenizer = hub.root / "tokenizers/fineweb_400_bpe.model"
    assert read_texts(dataset, "val", tokenizer)[0] in DOCUMENTS
    assert {repo for repo, _ in hub.requests} == {"me/export"}


def test_the_root_of_fineweb_need_not_be_utf8(hub: SimpleNamespace) -> None:
    hub.root = hub.root.with_name("data\udcff")
    prepare_data.main(fineweb_arguments(hub, "--shards", 1, "--case-marks"))
    assert (hub.root / "datasets/fineweb_case_sp400/manifest.json").exists()


def test_fineweb_writes_the_manifest_of_what_is_there(hub: SimpleNamespace) -> None:
    prepare_data.main(fineweb_arguments(hub, "--shards", 3))
    dataset = hub.root / "datasets/fineweb10B_sp400"
    tokenizer = hub.root / "tokenizers/fineweb_400_bpe.model"
    manifest = check_manifest(dataset, tokenizer)
    assert manifest["source"] == "me/export"
    texts = read_texts(dataset, "val", tokenizer)
    assert manifest["splits"]["val"]["bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest["splits"]["train"]["bytes"] is None, "not counted, lest 16 GB be read for it"
    prepare_data.main(fineweb_arguments(hub, "--shards", 1))
    assert read_manifest(dataset) == manifest, "the other shards are still there"


def test_fineweb_replaces_shards_unlike_the_manifest(hub: SimpleNamespace) -> None:
    prepare_data.main(fineweb_arguments(hub, "--shards", 1))
    shard = hub.root / "datasets/fineweb10B_sp400/fineweb_train_000000.bin"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    prepare_data.main(fineweb_arguments(hub, "--shards", 1))
    assert shard.read_bytes() == good


def test_fineweb_replaces_a_tokenizer_of_another_export(
    hub: SimpleNamespace, tmp_path: Path
) -> None:
    """Of the same size and name, it passes for the right one everywhere else."""
    tokenizer = hub.root / "tokenizers/fineweb_400_bpe.model"
    tokenizer.parent.mkdir(parents=True)
    good = (tmp_path / "remote/datasets/tokenizers" / tokenizer.name).read_bytes()
    other = spm(plain_words(200), tmp_path / "other.model")
    for _ in range(2):  # before the first download, and after it
        shutil.copy(other, tokenizer)
        prepare_data.main(fineweb_arguments(hub, "--shards", 1))
        assert tokenizer.read_bytes() == good


def test_fineweb_fetches_only_what_is_missing_or_damaged(hub: SimpleNamespace) -> None:
    prepare_data.main(fineweb_arguments(hub, "--shards", 2))
    damaged = hub.root / "datasets/fineweb10B_sp400/fineweb_train_000001.bin"
    good = damaged.read_bytes()
    damaged.write_bytes(good[:100])
    hub.requests.clear()
    prepare_data.main(fineweb_arguments(hub, "--shards", 3))
    fetched = [Path(name).name for _, name in hub.requests]
    assert fetched == ["manifest.json", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert damaged.read_bytes() == good


def test_links_to_a_cache_of_downloads_are_not_moved(
    hub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub before 0.23 gives relative ones for large files, which lead nowhere then."""
    download = sys.modules["huggingface_hub"].hf_hub_download

    def linked(repo_id: str, filename: str, *, repo_type: str, local_dir: Path) -> str:
        local = Path(download(repo_id, filename, repo_type=repo_type, local_dir=local_dir))
        blob = tmp_path / "cache" / local.name
        blob.parent.mkdir(exist_ok=True)
        local.replace(blob)
        local.symlink_to(os.path.relpath(blob, local.parent))
        return str(local)

    monkeypatch.setattr(sys.modules["huggingface_hub"], "hf_hub_download", linked)
    prepare_data.main(fineweb_arguments(hub, "--shards", 1))
    check_manifest(
        hub.root / "datasets/fineweb10B_sp400", hub.root / "tokenizers/fineweb_400_bpe.model"
    )
    assert not any(path.is_symlink() for path in hub.root.rglob("*"))


def test_fineweb_never_mixes_repositories_or_foreign_shards(hub: SimpleNamespace) -> None:
    foreign = hub.root / "datasets/fineweb10B_sp400"
    foreign.mkdir(parents=True)
    shutil.copy(hub.export / "fineweb_val_000000.bin", foreign)
    assert str(foreign) in failure(*fineweb_arguments(hub, "--shards", 1))
    shutil.rmtree(foreign)
    prepare_data.main(fineweb_arguments(hub, "--shards", 1))
    message = failure(*fineweb_arguments(hub, "--shards", 1, "--repo", "other/export"))
    assert "made from other inputs" in message


def test_a_damaged_download_is_not_put_in_place(hub: SimpleNamespace) -> None:
    shard = hub.export / "fineweb_train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert "not a whole shard" in failure(*fineweb_arguments(hub, "--shards", 1))
    assert not (hub.root / "datasets/fineweb10B_sp400/fineweb_train_000000.bin").exists()


@pytest.mark.parametrize("more", [[], ["--case-marks"]])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("tokens", "found"), [([1, 400, 7], "400"), ([], "no tokens")])
def test_published_tokens_of_no_piece_are_refused(
    hub: SimpleNamespace, split: str, tokens: list[int], found: str, more: list[str]
) -> None:
    shard = hub.export / f"fineweb_{split}_000000.bin"
    prepare_data.write_shard(shard, np.array(tokens, dtype=np.uint16))
    message = failure(*fineweb_arguments(hub, "--shards", 1, *more))
    assert f"{shard.name}: expected token ids below 400, found {found}; choose" in message
    assert not (hub.root / "datasets/fineweb10B_sp400" / shard.name).exists()


def test_bytes_beside_published_shards_are_not_counted_as_tokens(hub: SimpleNamespace) -> None:
    prepare_data.main(fineweb_arguments(hub, "--shards", 1))
    dataset = hub.root / "datasets/fineweb10B_sp400"
    manifest = read_manifest(dataset)
    beside = dataset / "fineweb_val_bytes_000000.bin"
    prepare_data.write_shard(beside, np.array([0, 50, 60], dtype=np.uint16))
    prepare_data.main(fineweb_arguments(hub, "--shards", 1))
    assert read_manifest(dataset) == manifest


def test_fineweb_mistakes_are_named_in_one_line(hub: SimpleNamespace) -> None:
    message = failure(*fineweb_arguments(hub, "--shards", 4))
    assert "expected 1 to 3" in message and "found 4" in message
    message = failure(*fineweb_arguments(hub, "--vocab", 512))
    assert "no fineweb10B_sp512, found fineweb10B_sp400" in message
    (hub.export / "fineweb_val_000000.bin").unlink()
    message = failure(*fineweb_arguments(hub, "--shards", 1))
    assert "me/export" in message and "404 for datasets/datasets/fineweb10B_sp400" in message


def test_an_export_without_validation_shards_is_refused(hub: SimpleNamespace) -> None:
    manifest = hub.export.parents[1] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"files_val": 1', '"files_val": 0'))
    assert "unknown form of manifest.json" in failure(*fineweb_arguments(hub, "--shards", 1))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[" * 100_000, "unknown form of manifest.json"),
        ('{"datasets": [{"name": "fineweb10B_sp400", "stats": {"files_train": 1, "files_val": '
         "Infinity}}]}", "unknown form of manifest.json"),
        ('{"datasets": [{"name": 7}, {"name": null}]}', "no fineweb10B_sp400, found 7, None"),
    ],
)  # fmt: skip
def test_a_published_manifest_of_odd_values_is_refused_in_one_line(
    hub: SimpleNamespace, content: str, expected: str
) -> None:
    (hub.export.parents[1] / "manifest.json").write_text(content)
    assert expected in failure(*fineweb_arguments(hub, "--shards", 1))


def test_data_may_lie_on_another_disk_than_their_root(
    hub: SimpleNamespace, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the folder of datasets, or of one, is a link."""
    disk = tmp_path / "disk"
    disk.mkdir()
    hub.root.mkdir()
    (hub.root / "datasets").symlink_to(disk)
    replace = os.replace

    def on_one_disk(old: Path, new: Path) -> None:
        sides = [disk in Path(os.path.realpath(path)).parents for path in (old, new)]
        if sides[0] != sides[1]:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(old))
        replace(old, new)

    monkeypatch.setattr(os, "replace", on_one_disk)
    prepare_data.main(fineweb_arguments(hub, "--shards", 1))
    prepare_data.main(fineweb_arguments(hub, "--shards", 2))
    dataset, tokenizer = text_command(hub.root, source)
    assert {path.name for path in disk.iterdir()} == {"fineweb10B_sp400", "text_sp400"}
    assert len(list(disk.glob("fineweb10B_sp400/*.bin"))) == 3
    assert read_texts(dataset, "val", tokenizer)[0] in DOCUMENTS
    shard = dataset / "fineweb_val_000000.bin"
    good = shard.read_bytes()
    shard.write_bytes(good[:-2])
    text_command(hub.root, source)
    assert shard.read_bytes() == good


def test_vocab_without_a_known_export_asks_for_a_repo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(prepare_data.REPO_ENV, raising=False)
    assert "name a --repo" in failure("fineweb", "--root", tmp_path, "--vocab", 777)


def recut(hub: SimpleNamespace) -> list[str]:
    """Cut the published training tokens within documents, as the real ones are; the documents."""
    paths = [hub.export / f"fineweb_train_{number:06d}.bin" for number in range(3)]
    tokens = np.concatenate([read_shard(path) for path in paths])
    starts = np.flatnonzero(tokens == 1)
    cuts = [int(starts[20]) + 5, int(starts[50]) + 1]
    for path, part in zip(paths, np.split(tokens, cuts), strict=True):
        prepare_data.write_shard(path, part)
    tokenizer = hub.export.parents[1] / "tokenizers/fineweb_400_bpe.model"
    return read_texts(hub.export, "train", tokenizer)


def case_marked(hub: SimpleNamespace, *more: object) -> dict[str, list[str]]:
    """The documents of the case-marked shards by split, their case restored."""
    prepare_data.main(fineweb_arguments(hub, "--case-marks", *more))
    dataset = hub.root / "datasets/fineweb_case_sp400"
    tokenizer = hub.root / "tokenizers/fineweb_case_400_bpe.model"
    assert check_manifest(dataset, tokenizer)["tokenizer"]["case_marks"] is True
    texts = {split: read_texts(dataset, split, tokenizer) for split in ("train", "val")}
    assert "d" in "".join(texts["val"]) and "D" not in "".join(texts["val"])
    return {split: list(map(prepare_data.restore_case, texts[split])) for split in texts}


def test_fineweb_with_case_marks_keeps_documents_and_order(hub: SimpleNamespace) -> None:
    documents = recut(hub)
    marked = case_marked(hub, "--shards", 3)
    assert marked["train"] == documents
    plain = hub.root / "datasets/fineweb10B_sp400"
    tokenizer = hub.root / "tokenizers/fineweb_400_bpe.model"
    assert marked["val"] == read_texts(plain, "val", tokenizer)
    stated = [
        read_manifest(dataset)["splits"]["val"]["bytes"]
        for dataset in (plain, plain.with_name("fineweb_case_sp400"))
    ]
    assert stated == [sum(len(text.encode()) for text in marked["val"])] * 2


def test_a_document_that_goes_on_elsewhere_is_left_out(hub: SimpleNamespace) -> None:
    documents = recut(hub)
    assert case_marked(hub, "--shards", 2)["train"] == documents[:50]
    message = failure(*fineweb_arguments(hub, "--case-marks", "--shards", 1))
    assert "made from other inputs" in message


def test_fineweb_takes_a_given_case_marked_tokenizer(hub: SimpleNamespace, tmp_path: Path) -> None:
    given = tmp_path / "given.model"
    given.write_bytes(prepare_data.train_tokenizer(DOCUMENTS, 400, 10_000, case_marks=True))
    case_marked(hub, "--shards", 1, "--tokenizer", given)
    assert (hub.root / "tokenizers/fineweb_case_400_bpe.model").read_bytes() == given.read_bytes()
    message = failure(*fineweb_arguments(hub, "--shards", 1, "--tokenizer", given))
    assert "add --case-marks" in message


def test_a_tokenizer_without_marks_is_refused_before_the_download(
    hub: SimpleNamespace, tmp_path: Path
) -> None:
    given = spm(plain_words(200), tmp_path / "given.model")
    message = failure(*fineweb_arguments(hub, "--case-marks", "--tokenizer", given))
    assert str(given) in message and "expected pieces U+E001" in message
    assert not hub.requests


def test_published_tokens_that_lack_characters_are_refused(hub: SimpleNamespace) -> None:
    shard = hub.export / "fineweb_val_000000.bin"
    prepare_data.write_shard(shard, np.append(read_shard(shard), np.uint16(3)))
    message = failure(*fineweb_arguments(hub, "--shards", 1, "--case-marks"))
    assert "the challenge counts" in message and "choose --vocab 8192" in message
    assert not (hub.root / "datasets/fineweb_case_sp400").exists()


def test_published_shards_must_begin_with_a_document(hub: SimpleNamespace) -> None:
    shard = hub.export / "fineweb_train_000000.bin"
    prepare_data.write_shard(shard, read_shard(shard)[1:])
    message = failure(*fineweb_arguments(hub, "--shards", 1, "--case-marks"))
    assert "fineweb_train_000000.bin: expected documents that begin with BOS" in message


def test_published_case_marked_shards_state_no_bytes(hub: SimpleNamespace) -> None:
    """Counted by pieces they would prove nothing; and they are not marked twice."""
    model = prepare_data.train_tokenizer(DOCUMENTS, 400, 10_000, case_marks=True)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    (hub.export.parents[1] / "tokenizers/fineweb_400_bpe.model").write_bytes(model)
    for path in hub.export.iterdir():
        split = path.name.split("_")[1]
        path.unlink()
        prepare_data.write_split(hub.export, split, DOCUMENTS, processor)
    shutil.copy(hub.export / "fineweb_train_000000.bin", hub.export / "fineweb_train_000001.bin")
    arguments = fineweb_arguments(hub, "--shards", 1)
    prepare_data.main(arguments)
    splits = read_manifest(hub.root / "datasets/fineweb10B_sp400")["splits"]
    assert splits["val"]["documents"] == 60 and splits["val"]["bytes"] is None
    assert "case-marked already" in failure(*arguments, "--case-marks")
