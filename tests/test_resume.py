"""Claims about RESUME_FROM: the record tells what the weights are, whatever is set beside it."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from small_run import check_one_error, completed_run, data_in, program, run_here, tokens_in
from support import REPO, completed, cpu_runtime, errors_of, refusal, train_gpt, write_shard

from train_gpt import OF_THIS_PROCESS, Hyperparameters, settings_of_process, settings_of_weights

SCRIPT = REPO / "train_gpt.py"
FIELDS = dataclasses.fields(Hyperparameters)
TRAINS = [field.name for field in FIELDS if field.metadata["trains"]]
AFTER = [f.name for f in FIELDS if f.name not in OF_THIS_PROCESS and not f.metadata["trains"]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return data_in(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def frontier(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the frontier in small, with a seed, a rate and late QAT of its own."""
    out = tmp_path_factory.mktemp("frontier")
    settings = dict(PRESET="frontier", SEED=7, MATRIX_LR=0.03, QAT_THRESHOLD=0.9)
    done = completed_run(SCRIPT, data, out, **settings)
    assert done.returncode == 0, done.stderr
    return out


def result_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("result_seed*.json")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def resume(weights: Path, out: Path, **env: object) -> dict[str, Any]:
    """What main does with RESUME_FROM, in this process; the result of its seed."""
    texts = {name: str(value) for name, value in env.items()}
    texts |= {"RESUME_FROM": str(weights), "OUTPUT_DIR": str(out), "DEVICE": "cpu"}
    runtime = cpu_runtime()
    h, checkpoint = train_gpt.load_checkpoint(settings_of_process(texts), runtime, texts)
    train_gpt.run(h, runtime, checkpoint)
    seed = checkpoint.facts.seed
    result: dict[str, Any] = json.loads((out / f"result_seed{seed}.json").read_text())
    return result


def of_weights(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in OF_THIS_PROCESS}


# The settings of the checkpoint


def test_a_bare_resume_of_a_frontier_run_repeats_its_record(frontier: Path, tmp_path: Path) -> None:
    """No PRESET, no paths, no sizes: the environment names the checkpoint alone."""
    weights = frontier / "final_model.pt"
    done = completed(SCRIPT, cwd=tmp_path, RESUME_FROM=weights, OUTPUT_DIR=tmp_path, DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    trained, again = result_in(frontier), result_in(tmp_path)
    assert again["recipe"] == trained["recipe"]
    assert of_weights(again["settings"]) == of_weights(trained["settings"])
    assert again["settings"]["preset"] == "frontier" and again["settings"]["key_shift"] == 1
    assert again["training"] == trained["training"] and again["training"]["seed"] == 7
    assert again["scores"]["packed"]["nats"] == trained["scores"]["packed"]["nats"]
    packed = (frontier / "final_model.ptz").read_bytes()
    assert (tmp_path / "final_model.ptz").read_bytes() == packed
    assert '"preset": "frontier"' in (tmp_path / "resume.log").read_text()


def test_two_ranks_pack_the_file_of_one(frontier: Path, tmp_path: Path) -> None:
    """From the same weights: the blend on late QAT's grid."""
    done = completed(
        SCRIPT,
        ranks=2,
        RESUME_FROM=frontier / "final_model.pt",
        OUTPUT_DIR=tmp_path,
        DEVICE="cpu",
        EVAL_STRIDE=0,
    )
    assert done.returncode == 0, done.stderr
    packed = (frontier / "final_model.ptz").read_bytes()
    assert (tmp_path / "final_model.ptz").read_bytes() == packed
    assert result_in(tmp_path)["training"]["grid_step"] > 0


def test_weights_are_trained_by_every_setting_but_these() -> None:
    """A new setting belongs to training until somebody says otherwise."""
    assert set(AFTER) == {
        "run_id", "data_path", "tokenizer_path", "micro_batch_tokens", "warmup_steps",
        "artifact_bytes", "swa_share", "int8_step_ratio", "tok_emb_step_ratio", "ve_emb_step_ratio",
        "zstd_level", "eval_stride", "val_batch_size", "val_loss_every", "train_log_every",
    }  # fmt: skip
    assert {"preset", "seed", "matrix_lr", "num_layers", "train_seq_len", "vocab_size",
            "iterations", "max_wallclock_seconds", "qat_threshold"} <= set(TRAINS)  # fmt: skip


def saved_settings() -> dict[str, Any]:
    return dataclasses.asdict(
        Hyperparameters(**train_gpt.PRESETS["frontier"], preset="frontier", seed=7)
    )


def other_text(name: str) -> str:
    """Of a value that is not the saved one."""
    if name == "preset":
        return "card"
    value = saved_settings()[name]
    return f"{value}x" if isinstance(value, str) else str(type(value)(value + 1))


@pytest.mark.parametrize("name", TRAINS)
def test_another_value_of_what_trained_is_refused_by_name(name: str) -> None:
    saved, text = saved_settings(), other_text(name)
    env = {name.upper(): text, "RESUME_FROM": "a.pt"}
    message = refusal(settings_of_weights, saved, env)
    assert message.startswith(f"{name.upper()}=") and text in message
    assert f"RESUME_FROM=a.pt was trained with {saved[name]!r}" in message
    assert f"set {name.upper()}={saved[name]}" in message


@pytest.mark.parametrize("name", TRAINS)
def test_the_value_that_trained_may_be_repeated(name: str) -> None:
    saved = saved_settings()
    env = {name.upper(): str(saved[name]), "RESUME_FROM": "a.pt"}
    assert of_weights(dataclasses.asdict(settings_of_weights(saved, env))) == of_weights(saved)


@pytest.mark.parametrize("name", AFTER)
def test_what_comes_after_training_may_be_set_anew(name: str) -> None:
    saved = saved_settings()
    value = {"eval_stride": 128, "zstd_level": 3, "swa_share": 1.0}.get(name, other_text(name))
    h = settings_of_weights(saved, {name.upper(): str(value), "RESUME_FROM": "a.pt"})
    assert str(getattr(h, name)) == str(value)
    others = {key: v for key, v in dataclasses.asdict(h).items() if key != name}
    assert of_weights(others) == of_weights({k: v for k, v in saved.items() if k != name})


def test_where_a_process_runs_is_its_own_affair() -> None:
    saved = saved_settings() | {"device": "cuda", "output_dir": "/old", "eval_dump": "/old/x"}
    h = settings_of_weights(saved, {"RESUME_FROM": "a.pt", "OUTPUT_DIR": "/new"})
    assert (h.device, h.output_dir, h.eval_dump) == ("auto", "/new", "")


@pytest.mark.parametrize(
    "conflict",
    [dict(PRESET="card"), dict(MATRIX_LR=0.025), dict(SEED=1337), dict(NUM_LAYERS=5),
     dict(NUM_LAYERS=1), dict(TRAIN_SEQ_LEN=32), dict(ITERATIONS=4), dict(PRESET="smoke")],
)  # fmt: skip
def test_a_resume_with_a_conflict_is_refused_before_it_starts(
    conflict: dict[str, Any], frontier: Path, tmp_path: Path
) -> None:
    weights = frontier / "final_model.pt"
    ((name, _),) = conflict.items()
    message = refusal(lambda: resume(weights, tmp_path, **conflict))
    assert message.startswith(f"{name}=") and f"RESUME_FROM={weights} was trained with" in message
    assert not list(tmp_path.iterdir())


def test_the_program_refuses_a_conflict_with_one_line(frontier: Path, tmp_path: Path) -> None:
    weights = frontier / "final_model.pt"
    done = completed(SCRIPT, RESUME_FROM=weights, OUTPUT_DIR=tmp_path, DEVICE="cpu", MATRIX_LR=0.5)
    check_one_error(done, "MATRIX_LR=0.5: ", f"RESUME_FROM={weights} was trained with 0.03")
    assert not list(tmp_path.iterdir())


def test_two_ranks_refuse_a_conflict_by_the_line_of_rank_0(frontier: Path, tmp_path: Path) -> None:
    weights = frontier / "final_model.pt"
    done = completed(
        SCRIPT, ranks=2, RESUME_FROM=weights, OUTPUT_DIR=tmp_path, DEVICE="cpu", SEED=8
    )
    line, *others = errors_of(done.stderr)
    assert line.startswith("error (rank 0): SEED=8: RESUME_FROM=")
    # torchrun may end rank 1 before it waits for rank 0.
    assert others in ([], ["error (rank 1): interrupted"]), done.stderr
    assert done.returncode == 1 and "[rank1]" not in done.stderr


def test_another_budget_and_stride_are_stated_as_they_are(frontier: Path, tmp_path: Path) -> None:
    """Also where the card, which is the preset of an empty environment, could not have them."""
    trained = result_in(frontier)["recipe"]
    again = resume(frontier / "final_model.pt", tmp_path, ARTIFACT_BYTES=500_000, EVAL_STRIDE=64,
                   MICRO_BATCH_TOKENS=64, ZSTD_LEVEL=3)["recipe"]  # fmt: skip
    changed = {name for name in trained if trained[name] != again[name]}
    assert changed == {"artifact_bytes", "eval_stride", "micro_batch_tokens", "zstd_level"}
    assert (again["artifact_bytes"], again["eval_stride"]) == (500_000, 64)
    size = SCRIPT.stat().st_size + (tmp_path / "final_model.ptz").stat().st_size
    assert size < 500_000


@pytest.mark.parametrize(
    ("env", "parts"),
    [
        ({"ITERATION": "5"}, ["ITERATION='5'", "did you mean ITERATIONS?"]),
        ({"MLP_MULT": "3"}, ["MLP_MULT='3'", "set MLP_HIDDEN"]),
        ({"EVAL_STRIDE": "many"}, ["EVAL_STRIDE='many'"]),
        ({"EVAL_STRIDE": "65"}, ["EVAL_STRIDE=65", "TRAIN_SEQ_LEN=64"]),
        ({"PRESET": "fast"}, ["PRESET='fast'"]),
        ({"EVAL_ONLY": "b.ptz"}, ["EVAL_ONLY='b.ptz'", "RESUME_FROM"]),
    ],
)
def test_a_mistake_is_refused_as_without_a_checkpoint(
    env: dict[str, str], parts: list[str], frontier: Path, tmp_path: Path
) -> None:
    message = refusal(lambda: resume(frontier / "final_model.pt", tmp_path, **env))
    assert [part for part in parts if part not in message] == [], message


# Code, data and seed


def test_the_record_states_the_code_that_trained(data: dict[str, Any], tmp_path: Path) -> None:
    older = program(tmp_path)  # another program, as an older version would be
    out, again = tmp_path / "out", tmp_path / "again"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "SOURCE", older)
        run_here(data, out)
    digest = hashlib.sha256(older.read_bytes()).hexdigest()
    result = resume(out / "final_model.pt", again)
    assert result["code_sha256"] == result["recipe"]["code"] == digest
    assert result["recipe"]["packing_code"] == train_gpt.file_digest(train_gpt.SOURCE) != digest
    assert result["bytes_code"] == SCRIPT.stat().st_size


@pytest.mark.parametrize("becomes", [None, b"edited = True\n"])
def test_a_program_that_is_edited_or_deleted_on_the_way_is_recorded_as_it_ran(
    becomes: bytes | None, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source.py"
    source.write_bytes(SCRIPT.read_bytes() + b"# one of its own\n")
    as_it_ran = source.read_bytes()
    step = train_gpt.Trainer.train_step

    def changes_it(self: train_gpt.Trainer, *arguments: Any, **options: Any) -> Any:
        source.write_bytes(becomes) if becomes else source.unlink(missing_ok=True)
        return step(self, *arguments, **options)

    monkeypatch.setattr(train_gpt, "SOURCE", source)
    monkeypatch.setattr(train_gpt.Trainer, "warm_up", lambda self, evaluator: None)
    monkeypatch.setattr(train_gpt.Trainer, "train_step", changes_it)
    run_here(data, tmp_path)
    result = result_in(tmp_path)
    digest = hashlib.sha256(as_it_ran).hexdigest()
    recipe = result["recipe"]
    assert result["code_sha256"] == recipe["code"] == recipe["packing_code"] == digest
    assert result["bytes_code"] == len(as_it_ran)
    assert (tmp_path / "train.log").read_bytes().startswith(as_it_ran)


def test_the_record_states_the_data_that_trained(data: dict[str, Any], tmp_path: Path) -> None:
    """And the validation split that was scored, which may be another one."""
    run_here(data, tmp_path / "out")
    trained = result_in(tmp_path / "out")["recipe"]
    other = tmp_path / "other"
    write_shard(other / "fineweb_val_000000.bin", tokens_in(tmp_path)[5000:6000])
    weights = tmp_path / "out/final_model.pt"
    again = resume(weights, tmp_path / "again", DATA_PATH=other)["recipe"]
    changed = {name for name in trained if trained[name] != again[name]}
    assert changed == {"val_digest"}
    assert again["val_tokens"] == trained["val_tokens"] == 999


def test_the_digest_in_the_record_is_that_of_the_split(
    data: dict[str, Any], tmp_path: Path
) -> None:
    run_here(data, tmp_path)
    recipe = result_in(tmp_path)["recipe"]
    train, val = (train_gpt.open_split(data["data_path"], split) for split in ("train", "val"))
    assert recipe["train_digest"] == train_gpt.digest_of(train)
    assert recipe["train_tokens"] == sum(map(len, train))
    assert recipe["val_digest"] == hashlib.sha256(np.concatenate(val).tobytes()).hexdigest()


# Seeds


def merged(folder: Path) -> tuple[list[int], str]:
    """The seeds of submission.json, and the lines on merging in the log of the last resume."""
    log = (folder / "resume.log").read_text().splitlines()
    lines = [line for line in log if line.startswith("seeds:")]
    return json.loads((folder / "submission.json").read_text())["seeds"], "\n".join(lines)


@pytest.mark.parametrize(
    ("changed", "key"),
    [(dict(matrix_lr=0.5), "matrix_lr"), (dict(iterations=5), "iterations"),
     (dict(mlp_hidden=64), "mlp_hidden"), ({}, "")],
    ids=["rate", "steps", "shape", "none"],
)  # fmt: skip
def test_two_resumes_are_merged_only_if_one_recipe_trained_both(
    changed: dict[str, Any], key: str, data: dict[str, Any], tmp_path: Path
) -> None:
    run_here(data, tmp_path / "1", seed=1)
    run_here(data, tmp_path / "2", seed=2, **changed)
    out = tmp_path / "out"
    for seed in "12":
        resume(tmp_path / seed / "final_model.pt", out)
    seeds, lines = merged(out)
    assert seeds == ([2] if key else [1, 2])
    expected = f"seeds: result_seed1.json is of another {key} and is not merged"
    assert lines == (expected if key else "")


def test_a_resume_beside_a_run_of_another_recipe_is_not_merged(
    data: dict[str, Any], frontier: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_here(data, out, seed=1)
    resume(frontier / "final_model.pt", out)
    seeds, lines = merged(out)
    assert seeds == [7] and "result_seed1.json is of another" in lines


# What is no checkpoint


@pytest.mark.parametrize("missing", ["settings", "facts", "stages", "train_digest", "code_sha256"])
def test_a_checkpoint_of_an_older_version_is_refused(
    missing: str, frontier: Path, tmp_path: Path
) -> None:
    saved = torch.load(frontier / "final_model.pt", weights_only=True)
    (saved["facts"] if missing in saved["facts"] else saved).pop(missing)
    torch.save(saved, tmp_path / "older.pt")
    message = refusal(lambda: resume(tmp_path / "older.pt", tmp_path / "out"))
    assert f"RESUME_FROM={tmp_path}/older.pt: not the final_model.pt" in message
    assert not (tmp_path / "out").exists()


class Opens(NamedTuple):
    """A pickle that makes a file of this name when it is read."""

    path: str

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def test_a_checkpoint_cannot_run_code(frontier: Path, tmp_path: Path) -> None:
    saved = torch.load(frontier / "final_model.pt", weights_only=True)
    torch.save(saved | {"more": Opens(str(tmp_path / "made"))}, tmp_path / "bad.pt")
    message = refusal(lambda: resume(tmp_path / "bad.pt", tmp_path / "out"))
    assert f"RESUME_FROM={tmp_path}/bad.pt: not the final_model.pt" in message
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "made").exists(), "what the test refuses is harmless"


@pytest.mark.parametrize("name", ["early_fraction", "matrix_lr", "later_setting"])
def test_a_checkpoint_that_lacks_or_adds_a_setting_of_training_is_refused(
    name: str, frontier: Path, tmp_path: Path
) -> None:
    """The default of this version would be recorded as what trained it."""
    saved = torch.load(frontier / "final_model.pt", weights_only=True)
    if saved["settings"].pop(name, None) is None:
        saved["settings"][name] = 1
    torch.save(saved, tmp_path / "older.pt")
    message = refusal(lambda: resume(tmp_path / "older.pt", tmp_path / "out"))
    assert f"RESUME_FROM={tmp_path}/older.pt: of another version" in message
    assert f"differs in {name.upper()}; use the train_gpt.py that wrote it" in message
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_from_before_a_setting_of_scoring_is_scored(
    frontier: Path, tmp_path: Path
) -> None:
    saved = torch.load(frontier / "final_model.pt", weights_only=True)
    del saved["settings"]["eval_stride"]
    torch.save(saved, tmp_path / "older.pt")
    result = resume(tmp_path / "older.pt", tmp_path / "out", EVAL_STRIDE=0)
    assert result["settings"]["eval_stride"] == 0


@pytest.mark.parametrize("stages", [{}, {"trained": {}}, [], {"trained": 1, "averaged": 2}])
def test_a_checkpoint_without_its_stages_is_refused(
    stages: Any, frontier: Path, tmp_path: Path
) -> None:
    saved = torch.load(frontier / "final_model.pt", weights_only=True)
    torch.save(saved | {"stages": stages}, tmp_path / "odd.pt")
    message = refusal(lambda: resume(tmp_path / "odd.pt", tmp_path / "out"))
    assert f"RESUME_FROM={tmp_path}/odd.pt: not the final_model.pt" in message


def test_weights_are_scored_on_ranks_that_could_not_have_trained_them(
    frontier: Path, tmp_path: Path
) -> None:
    """Three do not divide the batch of 8 sequences."""
    settings = dict(DEVICE="cpu", OMP_NUM_THREADS=1, OUTPUT_DIR=tmp_path)
    resumed = completed(SCRIPT, ranks=3, RESUME_FROM=frontier / "final_model.pt", **settings)
    assert resumed.returncode == 0, resumed.stderr
    scores, expected = result_in(tmp_path)["scores"], result_in(frontier)["scores"]
    assert scores.keys() == expected.keys()
    for stage, score in scores.items():
        assert score["nats"] == pytest.approx(expected[stage]["nats"], rel=1e-9), stage


def test_weights_that_its_settings_do_not_make_are_refused(frontier: Path, tmp_path: Path) -> None:
    saved = torch.load(frontier / "final_model.pt", weights_only=True)
    saved["settings"]["num_layers"] = 5
    torch.save(saved, tmp_path / "edited.pt")
    message = refusal(lambda: resume(tmp_path / "edited.pt", tmp_path / "out"))
    assert message == f"RESUME_FROM={tmp_path}/edited.pt: weights and settings disagree"


def test_a_checkpoint_can_be_moved(frontier: Path, tmp_path: Path) -> None:
    moved = tmp_path / "renamed.bin"
    shutil.copy(frontier / "final_model.pt", moved)
    assert resume(moved, tmp_path / "out")["recipe"] == result_in(frontier)["recipe"]
