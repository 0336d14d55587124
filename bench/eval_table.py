"""Where the loss is: bpb by position in the window and by length of the document.

    EVAL_ONLY=final_model.ptz EVAL_DUMP=losses.npz python train_gpt.py
    DATA_PATH=... TOKENIZER_PATH=... python bench/eval_table.py losses.npz

The dump holds the loss of every token after the first, in nats: `plain` and, if it was run,
`sliding`.  Position counts from the start of the plain window (TRAIN_SEQ_LEN tokens), so sliding
shows what the same tokens gain from more context.  A document reaches from its BOS to the token
before the next one, and its length counts both; the BOS itself is a target of no bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import train_gpt as tg
from prepare_data import with_sample


def bytes_of(tokens: np.ndarray, table: tg.ByteTable) -> np.ndarray:
    """UTF-8 bytes of every token after the first; they sum to `table.count(tokens)`."""
    previous = tokens[:-1].astype(np.int64)
    target = tokens[1:].astype(np.int64)
    return table.base[target] + (table.leading_space[target] & ~table.boundary[previous])


def document_lengths(tokens: np.ndarray) -> np.ndarray:
    """Tokens of the document that each token after the first belongs to."""
    document = np.cumsum(tokens == tg.BOS_ID)  # 0: before the first BOS
    return np.bincount(document)[document][1:]


def table_by(
    title: str, groups: np.ndarray, nats: Mapping[str, np.ndarray], text_bytes: np.ndarray
) -> str:
    """A row for each power of two that bounds `groups` from below, and one for all."""
    exponents = np.log2(np.maximum(groups, 1)).astype(int)
    names = [f"{name} bpb" for name in nats]
    rows = [["", title, "tokens", "bytes", *names, ""], ["", *["---"] * (3 + len(nats)), ""]]

    def add(label: str, chosen: np.ndarray) -> None:
        size = int(text_bytes[chosen].sum())
        if size:
            sums = [losses[chosen].sum(dtype=np.float64) for losses in nats.values()]
            scores = [f"{total / np.log(2) / size:.4f}" for total in sums]
            rows.append(["", label, f"{chosen.sum():,}", f"{size:,}", *scores, ""])

    for e in range(exponents.min(), exponents.max() + 1):
        add(f"{2**e:,} to {2 ** (e + 1) - 1:,}", exponents == e)
    add("all", np.ones(len(exponents), dtype=bool))
    return "\n".join(" | ".join(row).strip() for row in rows)


def load_dump(path: str, targets: int, h: tg.Hyperparameters) -> dict[str, np.ndarray]:
    """Nats of each target by kind of window.  Raises RunError for no dump or another split's."""
    try:
        with np.load(path) as saved:
            nats = {name: saved[name] for name in saved.files}
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        problem = f"{path}: not a file that EVAL_DUMP has written ({error})"
        raise tg.RunError(problem) from None
    for name, losses in nats.items():
        tg.require(
            len(losses) == targets,
            f"{path}: {name} holds {len(losses):,} losses, expected {targets:,}, one for each "
            f"target of DATA_PATH={h.data_path}; set the one it was made of",
        )
    return nats


def main(path: str) -> None:
    h = with_sample(tg.Hyperparameters.from_env(os.environ))
    evaluator = tg.Evaluator.open(h, tg.Runtime(torch.device("cpu")))
    tokens = evaluator.tokens.numpy()
    nats = load_dump(path, evaluator.targets, h)
    text_bytes = bytes_of(tokens, tg.load_byte_table(h.tokenizer_path, h.vocab_size))
    position = np.arange(evaluator.targets) % h.train_seq_len + 1
    print(table_by("position in the plain window", position, nats, text_bytes), end="\n\n")
    print(table_by("tokens of the document", document_lengths(tokens), nats, text_bytes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dump", help="the file that EVAL_DUMP named")
    try:
        main(parser.parse_args().dump)
    except tg.RunError as error:
        sys.exit(f"error: {error}")
