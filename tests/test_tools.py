"""A mistake in calling a tool of bench/ ends in one line that says what was expected."""

import pytest
from support import REPO, completed

MISTAKES = {
    "pack.py nope": "No such file or directory: 'nope'",
    "pack.py final_model.pt much": "invalid float value: 'much'",
    "plot_log.py train.png": "train.png: 'utf-8' codec can't decode",
    "eval_table.py train.log": "train.log: not a file that EVAL_DUMP has written",
    "rounding.py final_model.pt nearby 0.01": "'nearby': choose of nearest, gptq, fisher",
}


@pytest.mark.parametrize("call", MISTAKES)
def test_a_mistake_in_a_call_is_one_line(call: str) -> None:
    script, *arguments = call.split()
    done = completed(REPO / "bench" / script, *arguments, PRESET="smoke", OMP_NUM_THREADS=1)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    assert MISTAKES[call] in done.stderr.splitlines()[-1]
