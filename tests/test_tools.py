"""A mistake in calling a tool of bench/ ends in one line that says what was expected."""

import pytest
from support import REPO, completed

MISTAKES = {
    "pack.py nope": "No such file or directory: 'nope'",
    "pack.py final_model.pt much": "invalid float value: 'much'",
    "plot_log.py train.png": "train.png: 'utf-8' codec can't decode",
    "plot_log.py train.log train.txt": "train.txt: Format 'txt' is not supported",
    "eval_table.py /dev/null": "/dev/null: not a file that EVAL_DUMP has written",
    "eval_table.py train.log": "train.log: not a file that EVAL_DUMP has written",
    "scaling.py many": "TIMED_STEPS=many: expected a whole number",
    "scaling.py -1": "TIMED_STEPS=-1: expected a whole number",
    "ladder.py fit --rows bench": "bench: cannot be read",
    "ladder.py fit --noise nan": "--noise: expected more than 0",
    "ladder.py fit --corpus=": "--corpus: expected one word",
    "ladder.py plot --picture none/x.png": "--picture none/x.png: make its folder first",
    "ladder.py plot --picture x.txt": "--picture x.txt: Format 'txt' is not supported",
    "ladder.py run --seconds 0 --only [": "--only [: no regular expression",
    "ablate.py --help": "expected 'name (prediction): KEY=VALUE ...'",
    "pack.py final_model.pt nan": "budgets: expected numbers of 10^6 bytes above 0",
    "pack.py final_model.pt inf": "budgets: expected numbers of 10^6 bytes above 0",
    "rounding.py final_model.pt nearest 0": "'0': expected grid steps above 0",
    "rounding.py final_model.pt nearest 0.01 0": "'0': expected 1 or more windows",
    "rounding.py final_model.pt nearest 0.01 16 0": "'0': expected 1 or more windows",
    "rounding.py final_model.pt nearby 0.01": "'nearby': choose of nearest, gptq, fisher",
}


@pytest.mark.parametrize("call", MISTAKES)
def test_a_mistake_in_a_call_is_one_line(call: str) -> None:
    script, *arguments = call.split()
    done = completed(REPO / "bench" / script, *arguments, PRESET="smoke", OMP_NUM_THREADS=1)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    assert MISTAKES[call] in done.stderr.splitlines()[-1]
