"""Claims about Hyperparameters: what is refused and how, and that every field matters."""

import ast
import dataclasses
import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support
import torch

import train_gpt
from train_gpt import Hyperparameters

FIELDS = {field.name: field for field in dataclasses.fields(Hyperparameters)}


def settings_refusal(**env: object) -> str:
    """The message with which an environment is refused."""
    values = {name: str(value) for name, value in env.items()}
    return support.refusal(Hyperparameters.from_env, values)


# Overrides


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MATRIX_LRS", "MATRIX_LR"),
        ("NUM_LAYER", "NUM_LAYERS"),
        ("TRAIN_SEQLEN", "TRAIN_SEQ_LEN"),
        ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"),
        ("ITERATION", "ITERATIONS"),
        ("iterations", "ITERATIONS"),
        ("Seed", "SEED"),
    ],
)
def test_a_misspelt_override_is_told_the_name_that_was_meant(name: str, meant: str) -> None:
    message = settings_refusal(**{name: "7"})
    assert f"{name}='7'" in message
    assert message.endswith(f"{meant}?")


@pytest.mark.parametrize("name", sorted(train_gpt.RETIRED))
def test_a_retired_name_is_refused_with_its_successor(name: str) -> None:
    message = settings_refusal(**{name: "2"})
    assert f"{name}='2'" in message
    assert train_gpt.RETIRED[name] in message


def test_every_successor_of_a_retired_name_exists() -> None:
    for successor in train_gpt.RETIRED.values():
        assert successor.lower() in FIELDS or successor.startswith("nothing"), successor


def test_a_retired_name_is_not_also_a_field() -> None:
    assert not {name.lower() for name in train_gpt.RETIRED} & FIELDS.keys()


def test_unrelated_environment_variables_are_ignored() -> None:
    env = {"PATH": "/bin", "HOME": "/root", "RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0",
           "MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1",
           "LANG": "C", "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    assert Hyperparameters.from_env(env) == Hyperparameters()


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("NUM_LAYERS", "eleven", "int"),
        ("NUM_LAYERS", "11.5", "int"),
        ("NUM_LAYERS", "", "int"),
        ("ITERATIONS", "1e3", "int"),
        ("MATRIX_LR", "0,025", "float"),
        ("MATRIX_LR", "fast", "float"),
    ],
)
def test_a_value_that_does_not_parse_is_refused_with_the_fix(
    name: str, text: str, kind: str
) -> None:
    message = settings_refusal(**{name: text})
    assert f"{name}={text!r}" in message
    assert kind in message
    assert "set" in message.partition(";")[2]


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "-inf", "1e999"])
def test_a_number_below_zero_or_not_finite_is_refused(text: str) -> None:
    assert f"MATRIX_LR={text!r}" in settings_refusal(MATRIX_LR=text)


@pytest.mark.parametrize("name", ["NUM_LAYERS", "SEED", "WARMUP_STEPS"])
def test_a_negative_count_is_refused(name: str) -> None:
    assert f"{name}='-3'" in settings_refusal(**{name: "-3"})


def test_every_field_can_be_overridden_by_its_name_in_capitals() -> None:
    values = {"int": ("6", 6), "float": ("0.5", 0.5), "str": ("text", "text")}
    for name, field in FIELDS.items():
        if name == "preset":
            continue
        text, value = values[str(field.type)]
        parsed = train_gpt.parse_override(name.upper(), text, str(field.type))
        assert parsed == value
        assert type(parsed) is type(field.default), name


def test_an_override_reaches_its_field_and_changes_no_other() -> None:
    h = Hyperparameters.from_env({"SEED": "7", "MATRIX_LR": "0.5", "RUN_ID": "mine"})
    changed = {"seed": 7, "matrix_lr": 0.5, "run_id": "mine"}
    assert dataclasses.asdict(h) == dataclasses.asdict(Hyperparameters()) | changed


# Presets


def test_the_defaults_are_the_card_preset() -> None:
    assert Hyperparameters.from_env({}) == Hyperparameters()
    assert Hyperparameters.from_env({"PRESET": "card"}) == Hyperparameters()
    assert Hyperparameters().preset == "card"


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    message = settings_refusal(PRESET="crad")
    assert "PRESET='crad'" in message
    for known in train_gpt.PRESETS:
        assert known in message


@pytest.mark.parametrize("preset", sorted(train_gpt.PRESETS))
def test_every_preset_is_valid_and_names_only_fields(preset: str) -> None:
    assert train_gpt.PRESETS[preset].keys() <= FIELDS.keys()
    h = Hyperparameters.from_env({"PRESET": preset})
    assert h.preset == preset
    for name, value in train_gpt.PRESETS[preset].items():
        assert getattr(h, name) == value
        assert type(value) is type(FIELDS[name].default), name


def test_the_plain_frontier_differs_in_its_data_alone() -> None:
    plain, marked = (train_gpt.PRESETS[name] for name in ("frontier_plain", "frontier"))
    changed = {name for name in marked if plain[name] != marked[name]}
    assert changed == {"run_id", "data_path", "tokenizer_path"}
    assert "_case" in marked["data_path"] and "_case" not in plain["data_path"]


def test_an_override_wins_over_the_preset() -> None:
    h = Hyperparameters.from_env({"PRESET": "smoke", "ITERATIONS": "17"})
    assert h.iterations == 17 != train_gpt.PRESETS["smoke"]["iterations"]


def test_the_card_is_the_submitted_architecture() -> None:
    h = Hyperparameters()
    got = (h.num_layers, h.model_dim, h.num_heads, h.num_kv_heads, h.mlp_hidden, h.vocab_size)
    assert got == (11, 512, 4, 2, 2048, 1024)
    assert (h.train_batch_tokens, h.train_seq_len) == (786_432, 2048)
    assert (h.artifact_bytes, h.max_wallclock_seconds) == (16_000_000, 600.0)


def test_hyperparameters_cannot_change_after_they_were_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Hyperparameters().seed = 1  # type: ignore[misc]


# Combinations

NONSENSE = [
    ("NUM_LAYERS", {"NUM_LAYERS": 1}),
    ("NUM_LAYERS", {"NUM_LAYERS": 0}),
    ("VOCAB_SIZE", {"VOCAB_SIZE": 1}),
    ("NUM_HEADS", {"NUM_HEADS": 7}),
    ("NUM_KV_HEADS", {"NUM_KV_HEADS": 3}),
    ("NUM_KV_HEADS", {"NUM_KV_HEADS": 16}),
    ("ROPE_DIMS", {"ROPE_DIMS": 15}),
    ("ROPE_DIMS", {"ROPE_DIMS": 130}),
    ("XSA_LAYERS", {"XSA_LAYERS": 12}),
    ("VE_LAYERS", {"VE_LAYERS": 12}),
    ("VE_LAYERS", {"VE_LAYERS": 0}),
    ("TRAIN_BATCH_TOKENS", {"TRAIN_BATCH_TOKENS": 2049}),
    ("EARLY_SEQ_LEN", {"EARLY_SEQ_LEN": 768}),
    ("EARLY_SEQ_LEN", {"EARLY_SEQ_LEN": 2047}),
    ("EARLY_SEQ_LEN", {"TRAIN_SEQ_LEN": 1536}),  # which the default does not divide
    ("MICRO_BATCH_TOKENS", {"MICRO_BATCH_TOKENS": 2047}),
    ("EVAL_STRIDE", {"EVAL_STRIDE": 2049}),
    ("WARMDOWN_FRACTION", {"WARMDOWN_FRACTION": 0}),
    ("WARMDOWN_FRACTION", {"WARMDOWN_FRACTION": 1.01}),
    ("ITERATIONS", {"ITERATIONS": 0}),
    ("TRAIN_LOG_EVERY", {"TRAIN_LOG_EVERY": 0}),
    ("EVAL_ONLY", {"EVAL_ONLY": "a.ptz", "RESUME_FROM": "b.pt"}),
    ("ARTIFACT_BYTES", {"ARTIFACT_BYTES": 1_000_000}),
    ("MLP_HIDDEN", {"MLP_HIDDEN": 100_000}),
    # zero where a size, a divisor or a scale is meant
    ("NUM_HEADS", {"NUM_HEADS": 0}),
    ("NUM_KV_HEADS", {"NUM_KV_HEADS": 0}),
    ("TRAIN_SEQ_LEN", {"TRAIN_SEQ_LEN": 0}),
    ("TRAIN_BATCH_TOKENS", {"TRAIN_BATCH_TOKENS": 0}),
    ("MODEL_DIM", {"MODEL_DIM": 0}),
    ("MLP_HIDDEN", {"MLP_HIDDEN": 0}),
    ("VE_DIM", {"VE_DIM": 0}),
    ("LOGIT_SOFTCAP", {"LOGIT_SOFTCAP": 0}),
    ("LOGIT_WIDTH", {"LOGIT_WIDTH": 0}),
    ("ROPE_BASE", {"ROPE_BASE": 0}),
    # values that AdamW or zstd would refuse later, with a traceback
    ("BETA1", {"BETA1": 1.5}),
    ("BETA2", {"BETA2": 1.0}),
    ("ZSTD_LEVEL", {"ZSTD_LEVEL": 23}),
]


@pytest.mark.parametrize(
    ("name", "env"), NONSENSE, ids=["-".join(f"{k}={v}" for k, v in e.items()) for _, e in NONSENSE]
)
def test_a_nonsensical_combination_is_refused_by_name(name: str, env: dict[str, object]) -> None:
    message = settings_refusal(**env)
    assert name in message
    assert len(message) > len(name) + 10, "the message must say what to set"


@pytest.mark.parametrize(
    "env",
    [
        {"NUM_LAYERS": 2, "XSA_LAYERS": 0, "VE_LAYERS": 2},
        {"NUM_KV_HEADS": 4},
        {"NUM_KV_HEADS": 1},
        {"ROPE_DIMS": 0},
        {"ROPE_DIMS": 128},
        {"XSA_LAYERS": 11, "VE_LAYERS": 11},
        {"EVAL_STRIDE": 0},
        {"EVAL_STRIDE": 2048},
        {"EARLY_SEQ_LEN": 0},
        {"EARLY_SEQ_LEN": 1},
        {"EARLY_SEQ_LEN": 2048},
        {"EARLY_SEQ_LEN": 3000},  # all sequences are whole
        {"EARLY_FRACTION": 0, "TRAIN_SEQ_LEN": 1536},
        {"EARLY_FRACTION": 0},
        {"EARLY_FRACTION": 1},
        {"MICRO_BATCH_TOKENS": 2048},
        {"WARMDOWN_FRACTION": 1},
        {"EVAL_ONLY": "a.ptz"},
        {"RESUME_FROM": "b.pt"},
        {"MAX_WALLCLOCK_SECONDS": 0},
        {"VAL_LOSS_EVERY": 0},
        {"DECAY_PER_RUN": 0},
        {"GRAD_CLIP_NORM": 0},
    ],
)
def test_values_at_the_edge_of_what_makes_sense_are_accepted(env: dict[str, object]) -> None:
    h = Hyperparameters.from_env({name: str(value) for name, value in env.items()})
    for name, value in env.items():
        assert getattr(h, name.lower()) == value


@pytest.mark.parametrize("length", [3, 768, 2047])
def test_a_short_length_that_does_not_divide_the_whole_one_is_told_both_remedies(
    length: int,
) -> None:
    message = settings_refusal(EARLY_SEQ_LEN=length)
    assert message == f"EARLY_SEQ_LEN={length}: must divide TRAIN_SEQ_LEN=2048, or set 0 for none"


# What a field declares

UP = torch.finfo(torch.float32).max  # torch would refuse more with a traceback
BOUNDS = {  # lowest and highest value of every number that is not just 0 or more
    "vocab_size": (2, UP), "num_layers": (2, UP), "smear_dims": (2, UP),
    "model_dim": (1, UP), "num_heads": (1, UP), "num_kv_heads": (1, UP), "mlp_hidden": (1, UP),
    "ve_layers": (1, UP), "ve_dim": (1, UP), "iterations": (1, UP), "train_seq_len": (1, UP),
    "train_batch_tokens": (1, UP), "val_batch_size": (1, UP), "train_log_every": (1, UP),
    "warmup_steps": (1, UP),
    "rope_base": (1e-12, UP), "logit_softcap": (1e-12, UP),
    "logit_shift": (-UP, UP), "logit_width": (1e-12, UP), "adam_eps": (1e-12, UP),
    "beta1": (0, 1 - 1e-9), "beta2": (0, 1 - 1e-9), "muon_beta2": (0, 1 - 1e-9),
    "muon_momentum": (0, 1 - 1e-9), "muon_momentum_warmup_start": (0, 1 - 1e-9),
    "warmdown_fraction": (1e-12, 1), "key_shift": (0, 1), "mlp_slope": (0, 1), "swa_share": (0, 1),
    "early_fraction": (0, 1),
    "zstd_level": (1, 22), "seed": (0, 2**63 - 1),
}  # fmt: skip
NUMBERS = sorted(name for name, field in FIELDS.items() if field.type != "str")
CHOICES = {"device": ("auto", "cpu", "cuda"), "on_interrupt": ("save", "finish")}
ARCHITECTURE = frozenset({
    "vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_hidden", "mlp_slope",
    "rope_dims", "rope_base", "smear_dims", "key_shift", "gate_dims", "xsa_layers", "ve_layers",
    "ve_dim", "logit_softcap", "logit_shift", "logit_width", "train_seq_len",
})  # fmt: skip
PER_RUN = frozenset({
    "preset", "run_id", "seed", "device", "compile_backend", "data_path", "tokenizer_path",
    "output_dir", "eval_only", "resume_from", "on_interrupt", "eval_dump", "val_loss_every",
    "train_log_every",
})  # fmt: skip


def marked(fact: str) -> set[str]:
    return {name for name, field in FIELDS.items() if field.metadata[fact]}


def test_every_field_declares_the_same_facts() -> None:
    facts = {"low", "high", "choices", "architecture", "per_run", "trains", "of_process"}
    assert all(field.metadata.keys() == facts for field in FIELDS.values())


def test_every_number_has_its_bounds() -> None:
    assert len(NUMBERS) > 40
    declared = {name: (FIELDS[name].metadata["low"], FIELDS[name].metadata["high"])
                for name in NUMBERS}  # fmt: skip
    assert declared == dict.fromkeys(NUMBERS, (0, UP)) | BOUNDS


def card_with(values: dict[str, Any]) -> Hyperparameters:
    return Hyperparameters(**values)


def numbers_out_of_bounds() -> Iterator[Any]:
    """(field, value): the nearest below its least and above its greatest value."""
    for name in NUMBERS:
        low, high = BOUNDS.get(name, (0, UP))
        whole = FIELDS[name].type == "int"
        below = low - 1 if whole else math.nextafter(low, -math.inf)
        above = high + 1 if whole and high < UP else math.nextafter(high, math.inf)
        yield pytest.param(name, below, id=f"{name}-low")
        yield pytest.param(name, above, id=f"{name}-high")


@pytest.mark.parametrize(("name", "value"), numbers_out_of_bounds())
def test_a_number_past_its_bounds_is_refused_by_name(name: str, value: float) -> None:
    low, high = BOUNDS.get(name, (0, UP))
    message = support.refusal(card_with, {name: value})
    assert message == f"{name.upper()}={value!r}: set it within {low} to {high}"


@pytest.mark.parametrize("name", NUMBERS)
def test_nan_is_refused_for_every_number(name: str) -> None:
    assert f"{name.upper()}=nan" in support.refusal(card_with, {name: math.nan})


def test_only_these_strings_have_choices() -> None:
    declared = {name: FIELDS[name].metadata["choices"] for name in marked("choices")}
    assert declared == CHOICES


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_that_there_is_not_is_refused_with_those(name: str) -> None:
    message = settings_refusal(**{name.upper(): "maybe"})
    assert message == f"{name.upper()}='maybe': set {' or '.join(CHOICES[name])}"
    for choice in CHOICES[name]:
        assert getattr(Hyperparameters.from_env({name.upper(): choice}), name) == choice


def test_the_architecture_is_exactly_these_fields() -> None:
    assert len(train_gpt.ARCHITECTURE) == len(ARCHITECTURE)
    assert set(train_gpt.ARCHITECTURE) == marked("architecture") == ARCHITECTURE


def test_merged_seeds_may_differ_in_exactly_these_fields() -> None:
    assert marked("per_run") == PER_RUN


def test_no_field_of_the_architecture_may_differ_by_run() -> None:
    assert not marked("per_run") & marked("architecture")


# Every field matters


def fields_read_by_the_program() -> set[str]:
    """Fields read as h.<field>, <object>.h.<field> or self.<field>, other than to validate them."""
    tree = ast.parse(Path(train_gpt.__file__).read_text())
    found = set()
    for top in tree.body:
        own = isinstance(top, ast.ClassDef) and top.name == "Hyperparameters"
        for part in top.body if own else [top]:
            if own and getattr(part, "name", "") == "__post_init__":
                continue
            for node in ast.walk(part):
                if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)):
                    continue
                owner = node.value
                holder = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
                if holder == "h" or (own and holder == "self"):
                    found.add(node.attr)
    return found


def test_every_field_is_read_by_the_program() -> None:
    unread = FIELDS.keys() - fields_read_by_the_program() - set(train_gpt.ARCHITECTURE)
    # the preset's name selects the others and is in the log with them; record.py reads the run's
    assert unread <= {"preset", "run_id"}, sorted(unread)
    assert 'h["run_id"]' in Path(train_gpt.__file__).with_name("record.py").read_text()


def test_the_search_for_read_fields_does_not_find_everything() -> None:
    assert "no_such_field" not in fields_read_by_the_program()
    assert "iterations" in fields_read_by_the_program()


def shapes(h: Hyperparameters) -> dict[str, tuple[int, ...]]:
    return {name: row.shape for name, row in train_gpt.parameter_table(h).items()}


def test_the_architecture_lists_what_scoring_depends_on() -> None:
    assert set(train_gpt.ARCHITECTURE) <= FIELDS.keys()
    base = support.tiny()
    names = set(shapes(base))
    for name in ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads",
                 "mlp_hidden", "ve_layers", "ve_dim"):  # fmt: skip
        changed = dataclasses.replace(base, **{name: 2 * getattr(base, name)})
        assert shapes(changed) != shapes(base), name
        assert set(shapes(changed)) == names
        assert name in train_gpt.ARCHITECTURE
    assert {"rope_dims", "rope_base", "xsa_layers", "logit_softcap"} <= set(train_gpt.ARCHITECTURE)


# Import and size

IMPORT_UNDER_WATCH = """
import builtins, importlib.util, os, sys
import train_gpt  # loads the libraries, which may read what they like
path = train_gpt.__file__
import torch

class Poisoned(dict):
    def refuse(self, *args, **kwargs):
        raise AssertionError("the environment was touched")
    __getitem__ = __setitem__ = __contains__ = __iter__ = refuse
    get = keys = items = values = copy = refuse

def refuse(*args, **kwargs):
    raise AssertionError("the GPU was touched")

for name in ("is_available", "device_count", "current_device", "get_device_properties", "init",
             "_lazy_init", "set_device"):
    setattr(torch.cuda, name, refuse)
opened = []
sys.addaudithook(lambda event, args: opened.append((event, args[0])) if event in (
    "open", "os.mkdir", "os.remove", "os.rename", "subprocess.Popen", "os.system") else None)
spec = importlib.util.spec_from_file_location("again", path)
module = importlib.util.module_from_spec(spec)
sys.modules["again"] = module
os.environ, environ = Poisoned(), os.environ
os.getenv = os.environ.refuse
try:
    spec.loader.exec_module(module)
finally:
    os.environ = environ
allowed = os.path.dirname(path)
foreign = [x for x in opened if x[0] != "open" or "train_gpt" not in str(x[1])]
assert not foreign, foreign
assert not torch.cuda.is_initialized()
assert module.Hyperparameters().model_dim == 512
print("imported")
"""


def test_importing_touches_no_file_no_environment_and_no_gpu(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT_UNDER_WATCH],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(support.REPO),
             "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.stdout == "imported\n", result.stderr
    assert list(tmp_path.iterdir()) == []


def parameters_by_hand(h: Hyperparameters) -> int:
    """The card's parameters, matrix by matrix."""
    head = h.model_dim // h.num_heads
    attention = 2 * h.model_dim * h.model_dim + 2 * h.num_kv_heads * head * h.model_dim
    mlp = 2 * h.mlp_hidden * h.model_dim
    gains = 4 * h.model_dim + h.num_heads * (1 + h.gate_dims)  # mix, attn, mlp; q and gates
    tables = h.vocab_size * (h.model_dim + h.ve_dim) + h.num_kv_heads * head * h.ve_dim
    skips = h.num_layers // 2 * h.model_dim
    smear = h.model_dim + h.smear_dims
    return h.num_layers * (attention + mlp + gains) + tables + skips + smear + h.ve_layers


def test_the_card_counts_the_parameters_that_its_model_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """32.4 million."""
    h = Hyperparameters()
    # orthogonalising 44 matrices takes seconds and changes no shape
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda w, **_: w)
    weights = {name: w.to("meta") for name, w in train_gpt.initial_weights(h).items()}
    model = train_gpt.GPT(h, weights, train_gpt.Kernels())
    held = sum(p.numel() for p in model.parameters())
    assert h.parameters() == held == parameters_by_hand(h)
    assert round(held / 1e6, 1) == 32.4


def test_the_count_follows_the_shape_of_any_model() -> None:
    for layers, kv, hidden in itertools.product((2, 5), (1, 4), (16, 48)):
        h = support.tiny(num_layers=layers, num_kv_heads=kv, mlp_hidden=hidden)
        held = sum(p.numel() for p in support.tiny_model(h).parameters())
        assert h.parameters() == held == parameters_by_hand(h)


@pytest.mark.parametrize("preset", ["card", "frontier"])
def test_three_to_five_bits_a_weight_fill_the_budget(preset: str) -> None:
    h = Hyperparameters.from_env({"PRESET": preset})
    assert 3 < h.artifact_bytes * 8 / h.parameters() < 5
