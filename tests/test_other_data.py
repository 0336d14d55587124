"""Claims about data that are not the ones meant: another text, another tokenizer of that size."""

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from small_run import PIECES, check_one_error, completed_run, data_in, run_here
from support import REPO, byte_table, cpu_runtime, refusal, tiny, train_gpt, write_shard

from prepare_data import with_sample
from train_gpt import Evaluator, check_tokenizer, foreign_tokenizer, load_byte_table

Data = dict[str, Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return data_in(tmp_path_factory.mktemp("data"))


# Another text of the same number of tokens


def with_text(data: Data, folder: Path, split: str) -> Data:
    """The data with another text in one split: its documents, in reverse order."""
    shutil.copytree(data["data_path"], folder)
    path = folder / f"fineweb_{split}_000000.bin"
    tokens = train_gpt.read_shard(path).tolist()
    write_shard(path, [1, *reversed(tokens[1:])])
    return data | {"data_path": str(folder)}


def merging_lines(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith("seeds:")]


@pytest.mark.parametrize("split", ["train", "val"])
def test_seeds_of_another_text_are_not_merged_for_its_digest(
    split: str, data: Data, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_here(data, out, seed=1)
    run_here(with_text(data, tmp_path / "other", split), out, seed=2)
    results = [json.loads((out / f"result_seed{seed}.json").read_text()) for seed in (1, 2)]
    for key in ("train_tokens", "val_tokens"):
        assert results[0]["recipe"][key] == results[1]["recipe"][key]
    expected = f"seeds: result_seed1.json is of another {split}_digest and is not merged"
    assert merging_lines(out / "train.log") == [expected]
    assert json.loads((out / "submission.json").read_text())["seeds"] == [2]


def test_seeds_of_one_text_in_two_places_are_merged(data: Data, tmp_path: Path) -> None:
    """Data are told apart by content alone."""
    out = tmp_path / "out"
    run_here(data, out, seed=1)
    shutil.copytree(data["data_path"], tmp_path / "copy")
    run_here(data | {"data_path": str(tmp_path / "copy")}, out, seed=2)
    assert merging_lines(out / "train.log") == []
    assert json.loads((out / "submission.json").read_text())["seeds"] == [1, 2]


def test_seeds_of_more_text_are_not_merged(data: Data, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_here(data, out, seed=1)
    shutil.copytree(data["data_path"], tmp_path / "more")
    shutil.copy(tmp_path / "more/fineweb_train_000000.bin",
                tmp_path / "more/fineweb_train_000001.bin")  # fmt: skip
    run_here(data | {"data_path": str(tmp_path / "more")}, out, seed=2)
    (line,) = merging_lines(out / "train.log")
    assert "of another train_tokens, train_digest and is not merged" in line


# The manifest


def train_other(path: Path) -> Path:
    """A tokenizer of the same size and another corpus."""
    letters = np.random.default_rng(1).choice(list("bcdfghjklmnpqstw"), (40, 2))
    words = ["u".join(pair) for pair in letters]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words[i % 7 :]) for i in range(200)]),
        model_prefix=str(path.with_suffix("")), vocab_size=PIECES, model_type="bpe",
        byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return path


def settings_with(data: Data, manifest: str | bytes, folder: Path) -> train_gpt.Hyperparameters:
    """Settings of the data in a copy that has this manifest.json."""
    shutil.copytree(data["data_path"], folder, dirs_exist_ok=True)
    content = manifest if isinstance(manifest, bytes) else manifest.encode()
    (folder / "manifest.json").write_bytes(content)
    return tiny(**data | {"data_path": str(folder)})


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def blake2b(path: str | Path) -> str:
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


def manifest_naming(path: str | Path, version: int) -> str:
    """As prepare_data.py writes it, now and before."""
    if version == 1:
        return json.dumps({"tokenizer": blake2b(path), "splits": {}})
    entry = {"name": Path(path).name, "sha256": sha256(path), "pieces": PIECES}
    return json.dumps({"version": 2, "tokenizer": entry, "splits": {}})


@pytest.mark.parametrize("version", [1, 2])
def test_the_tokenizer_of_the_manifest_is_accepted(
    version: int, data: Data, tmp_path: Path
) -> None:
    manifest = manifest_naming(data["tokenizer_path"], version)
    h = settings_with(data, manifest, tmp_path / "shards")
    assert Evaluator.open(h, cpu_runtime()).notes == []


@pytest.mark.parametrize("version", [1, 2])
def test_a_tokenizer_that_the_manifest_does_not_name_is_refused(
    version: int, data: Data, tmp_path: Path
) -> None:
    """Both digests are told, and it is refused before the log of the last run is touched."""
    other = train_other(tmp_path / "other.model")
    h = settings_with(data, manifest_naming(other, version), tmp_path / "shards")
    message = refusal(Evaluator.open, h, cpu_runtime())
    digest = blake2b if version == 1 else sha256
    assert message.startswith(f"TOKENIZER_PATH={data['tokenizer_path']}: its digest is ")
    assert digest(data["tokenizer_path"]) in message and digest(other) in message
    assert f"DATA_PATH={h.data_path}" in message
    with pytest.raises(train_gpt.RunError, match="TOKENIZER_PATH="):
        train_gpt.run(
            tiny(**data | {"data_path": h.data_path, "output_dir": str(tmp_path / "out")}),
            cpu_runtime(),
        )
    assert not list((tmp_path / "out").glob("*.log"))


def test_the_program_refuses_another_tokenizer_of_that_size(data: Data, tmp_path: Path) -> None:
    h = settings_with(data, manifest_naming(data["tokenizer_path"], 2), tmp_path / "shards")
    other = train_other(tmp_path / "other.model")
    foreign = data | {"data_path": h.data_path, "tokenizer_path": str(other)}
    foreign["vocab_size"] = sentencepiece.SentencePieceProcessor(str(other)).vocab_size()
    done = completed_run(REPO / "train_gpt.py", foreign, tmp_path, EVAL_STRIDE=0)
    check_one_error(done, f"TOKENIZER_PATH={other}", sha256(other), "manifest.json")


def test_one_changed_byte_of_a_tokenizer_is_refused(data: Data, tmp_path: Path) -> None:
    h = settings_with(data, manifest_naming(data["tokenizer_path"], 2), tmp_path / "shards")
    changed = tmp_path / "changed.model"
    changed.write_bytes(Path(data["tokenizer_path"]).read_bytes() + b"\0")
    other = tiny(**data | {"data_path": h.data_path, "tokenizer_path": str(changed)})
    assert sha256(changed) in refusal(check_tokenizer, other)


@pytest.mark.parametrize(
    "manifest",
    [
        "", "{", "[]", "[1, 2]", '"text"', "null", "7", "{}", '{"splits": {}}', "NaN",
        '{"tokenizer": null}', '{"tokenizer": {}}', '{"tokenizer": []}', '{"tokenizer": 5}',
        '{"tokenizer": "fineweb_1024_bpe.model"}', '{"tokenizer": {"name": "any.model"}}',
        '{"tokenizer": {"sha256": null}}', "[" * 100_000, b"\xff\xfe\x00", b"\0" * 64,
        '{"datasets": [{"name": "fineweb10B_sp1024"}]}',
    ],
)  # fmt: skip
def test_a_manifest_that_names_no_digest_refuses_nothing(
    manifest: str | bytes, data: Data, tmp_path: Path
) -> None:
    h = settings_with(data, manifest, tmp_path / "shards")
    assert Evaluator.open(h, cpu_runtime()).notes == []


@pytest.mark.parametrize("stated", [5, "", "abc", ["a"], {}])
def test_a_digest_that_none_has_is_refused_in_one_line(
    stated: object, data: Data, tmp_path: Path
) -> None:
    manifest = json.dumps({"tokenizer": {"sha256": stated}})
    message = refusal(check_tokenizer, settings_with(data, manifest, tmp_path / "shards"))
    assert f"names {stated}; set the tokenizer of these shards" in message


def test_a_folder_called_manifest_is_no_manifest(data: Data, tmp_path: Path) -> None:
    shutil.copytree(data["data_path"], tmp_path / "shards")
    (tmp_path / "shards/manifest.json").mkdir()
    check_tokenizer(tiny(**data | {"data_path": str(tmp_path / "shards")}))


def test_the_sample_has_the_tokenizer_of_its_manifest() -> None:
    """What prepare_data.py writes today is what is read here."""
    h = with_sample(train_gpt.Hyperparameters(data_path="sample"))
    stated = train_gpt.read_manifest(h.data_path)["tokenizer"]["sha256"]
    assert stated == sha256(h.tokenizer_path)
    check_tokenizer(h)


# Without a manifest


SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstv" for vowel in "aeiou"]
KINDS: dict[str, dict[str, Any]] = {
    "bpe": {},
    "unigram": dict(model_type="unigram"),
    "unigram without bytes": dict(model_type="unigram", byte_fallback=False),
    "suffix": dict(treat_whitespace_as_suffix=True),
    "across words": dict(model_type="unigram", split_by_whitespace=False),
    "spaces kept": dict(remove_extra_whitespaces=False, normalization_rule_name="identity"),
    "suffix, spaces kept": dict(treat_whitespace_as_suffix=True, remove_extra_whitespaces=False),
}


def texts_of(language: int, count: int = 60) -> list[str]:
    """Prose of a language: its words are made of 20 of the syllables."""
    generator = np.random.default_rng(language)
    syllables = generator.permutation(SYLLABLES)[:20]
    words = ["".join(generator.choice(syllables, generator.integers(1, 4))) for _ in range(300)]
    return [" ".join(generator.choice(words, 60)) + "." for i in range(count)]


def model_of(language: int, folder: Path, **options: Any) -> Path:
    """A tokenizer of a language with 200 to 350 pieces, as many as it has for both languages."""
    small = options.get("byte_fallback") is False
    settings = dict(model_type="bpe", vocab_size=120 if small else 350, byte_fallback=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts_of(language, 400)), model_writer=model, minloglevel=2,
        num_threads=1, **settings | options,
    )  # fmt: skip
    path = folder / f"{language}.model"
    path.write_bytes(model.getvalue())
    return path


FORMS = ["documents", "one document", "a cut document", "no BOS", "EOS as well", "cut both ends"]


def split_of(model: Path, form: str) -> np.ndarray:
    """Shards' tokens of the first language."""
    sp = sentencepiece.SentencePieceProcessor(str(model))
    documents = [sp.encode(text) for text in texts_of(1)]
    if form in ("one document", "a cut document"):
        ids = [1, *sp.encode(" ".join(texts_of(1)))]
        return np.array(ids if form == "one document" else ids[:-500], dtype=np.uint16)
    start = [] if form == "no BOS" else [1]
    end = [2] if form == "EOS as well" else []
    tokens = np.array([t for ids in documents for t in start + ids + end], dtype=np.uint16)
    return tokens[3:-3] if form == "cut both ends" else tokens


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_foreign_tokenizer_of_the_same_size_gets_a_note(kind: str, tmp_path: Path) -> None:
    right, foreign = (model_of(language, tmp_path, **KINDS[kind]) for language in (1, 2))
    pieces = sentencepiece.SentencePieceProcessor(str(right)).vocab_size()
    tables = [load_byte_table(str(model), pieces) for model in (right, foreign)]
    for form in FORMS:
        tokens = split_of(right, form)
        notes = [foreign_tokenizer(tokens, table) for table in tables]
        assert notes[0] is None, form
        assert notes[1] and notes[1].startswith("only "), form
        assert "is encoded with TOKENIZER_PATH; if the shards are of another" in notes[1]


@pytest.mark.parametrize("dummy", [True, False])
@pytest.mark.parametrize("suffix", [True, False])
def test_a_tokenizer_of_bytes_gets_no_note_for_its_own_shards(
    dummy: bool, suffix: bool, tmp_path: Path
) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["e" * 50] * 50), model_writer=model, model_type="char",
        vocab_size=260, byte_fallback=True, add_dummy_prefix=dummy, minloglevel=3,
        treat_whitespace_as_suffix=suffix, remove_extra_whitespaces=False, hard_vocab_limit=False,
    )  # fmt: skip
    path = tmp_path / "bytes.model"
    path.write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(str(path)).vocab_size()
    table = load_byte_table(str(path), pieces)
    for form in FORMS:
        assert foreign_tokenizer(split_of(path, form), table) is None, form
    noise = np.random.default_rng(0).integers(3, pieces, 3000).astype(np.uint16)
    noise[::200] = 1
    assert foreign_tokenizer(noise, table), "bytes at random spell no text"


def test_documents_full_of_unknown_text_get_no_note(tmp_path: Path) -> None:
    """Unknown text cannot be encoded again; what lies between is not judged by its ends."""
    model = model_of(1, tmp_path, model_type="unigram", byte_fallback=False)
    sp = sentencepiece.SentencePieceProcessor(str(model))
    texts = [text.replace("a ", "\u6f22 ") for text in texts_of(1)]
    tokens = np.array([t for text in texts for t in (1, *sp.encode(text))], dtype=np.uint16)
    table = load_byte_table(str(model), sp.vocab_size())
    assert table.boundary[tokens].sum() > 3 * len(texts)
    assert foreign_tokenizer(tokens, table) is None


@pytest.mark.parametrize("tokens", [[1, 5], [1], [5, 6], [1, 1, 1], [1, 2, 1, 2], [0, 3]])
def test_a_split_too_short_to_tell_gets_no_note(tokens: list[int], tmp_path: Path) -> None:
    model = model_of(1, tmp_path)
    table = load_byte_table(str(model), 350)
    assert foreign_tokenizer(np.array(tokens, dtype=np.uint16), table) is None
    assert foreign_tokenizer(np.array([1, 5], dtype=np.uint16), byte_table(64)) is None


def test_the_log_of_a_run_warns_of_a_foreign_tokenizer(tmp_path: Path) -> None:
    """And of the right one it does not."""
    right, foreign = (model_of(language, tmp_path) for language in (1, 2))
    for split in ("train", "val"):
        write_shard(tmp_path / f"shards/fineweb_{split}_000000.bin", split_of(right, "documents"))
    warnings = []
    for model in (right, foreign):
        out = tmp_path / model.stem
        data = dict(vocab_size=350, data_path=str(tmp_path / "shards"), tokenizer_path=str(model))
        run_here(data, out, iterations=2)
        log = (out / "train.log").read_text().splitlines()
        warnings.append([line for line in log if line.startswith("note: only ")])
    assert warnings[0] == [] and len(warnings[1]) == 1
    assert warnings[1][0].endswith("if the shards are of another tokenizer, val_bpb is wrong")
