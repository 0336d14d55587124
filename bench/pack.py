"""What an artifact holds, and what other budgets would cost.

    python bench/pack.py final_model.ptz                    # inspect: a table by tensor group
    python bench/pack.py final_model.pt [MB ...]            # the same for a checkpoint, packed now
    DATA_PATH=... TOKENIZER_PATH=... python bench/pack.py final_model.pt 8 10 12 14 16   # with bpb

Bits and entropy are per weight of the group; entropy is of order 0 with each matrix's own
frequencies; overhead is zstd's bytes (codes alone) over it; the relative error is the squared error
over the squared weights of the float average, and needs the checkpoint.  Budgets count code and
weights, in 10^6 bytes; those that hold late QAT's own grid get the same file on it.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import Tensor

import checkpoint
import timing
import train_gpt as tg

HEAD = (
    f"{'tensor':12s} {'weights':>10s} {'bits':>6s} {'entropy':>8s} {'bytes':>10s} "
    f"{'overhead':>9s} {'error':>9s} {'share':>7s}"
)


def over(coded_bytes: float, entropy_bytes: float) -> str:
    """What the coder takes more than the entropy."""
    return f"{100 * (coded_bytes / entropy_bytes - 1):+.2f} %"


def relative_error(w: Tensor, trained: Tensor) -> float:
    return float((w - trained).square().sum() / trained.square().sum())


def table(artifact: bytes, trained: Mapping[str, Tensor] | None = None) -> str:
    """Rows by tensor group; `trained` is the float average, on the CPU."""
    header, frames = tg.read_frames(artifact, "artifact")
    _, state = tg.unpack(artifact)
    lines = [HEAD]
    entropy_of_all = 0.0
    coded_in_all = 0
    for entry in header["tensors"]:
        name = entry["name"]
        w = state[name]
        packed = sum(entry["frames"])
        entropy = ""
        overhead = ""
        if entry["kind"] == "codes":
            codes, _ = tg.decode_codes(frames[name], entry["shape"])
            entropy_bytes = tg.entropy_bits(codes) / 8
            _, *code_frames = entry["frames"]  # the first one holds the scales
            coded = sum(code_frames)
            entropy = f"{8 * entropy_bytes / w.numel():.3f}"
            overhead = over(coded, entropy_bytes)
            entropy_of_all += entropy_bytes
            coded_in_all += coded
        error = f"{relative_error(w, trained[name]):.1e}" if trained else ""
        lines.append(
            f"{name:12s} {w.numel():10,d} {8 * packed / w.numel():6.3f} {entropy:>8s} "
            f"{packed:10,d} {overhead:>9s} {error:>9s} {100 * packed / len(artifact):6.2f} %"
        )
    lines.append(
        f"{len(artifact):,} bytes; all codes: zstd {coded_in_all:,} bytes, entropy "
        f"{entropy_of_all:,.0f}, overhead {over(coded_in_all, entropy_of_all)}"
    )
    return "\n".join(lines)


def inspect(path: str, artifact: bytes) -> None:
    header, _ = tg.read_frames(artifact, path)
    digest = hashlib.sha256(artifact[tg.HASHED_FROM :]).hexdigest()
    print(f"{path}: format {tg.ARTIFACT_VERSION}, SHA-256 {digest}")
    print(" ".join(f"{name}:{value}" for name, value in header["architecture"].items()))
    print(table(artifact))


def scorer(h: tg.Hyperparameters, runtime: tg.Runtime) -> Callable[[Mapping[str, Tensor]], str]:
    """A function from weights to their bpb, in words; to nothing if there is no validation data."""
    if not Path(h.data_path).is_dir():
        return lambda state: ""
    evaluator = tg.Evaluator.open(h, runtime)
    kernels = tg.choose_kernels(h, runtime, tg.RunLog(None))

    def score(state: Mapping[str, Tensor]) -> str:
        model = tg.load_model(h, runtime, state, kernels)
        return f" val_bpb {evaluator.score(model).bpb:.5f}"

    return score


def pack(path: str, budgets: list[float]) -> None:
    """A checkpoint at each budget, in 10^6 bytes."""
    h, (loaded, facts) = checkpoint.load(path, os.environ)
    stages = tg.with_blend(loaded, h, facts.grid_step)
    runtime = tg.Runtime.start(h, {})
    averaged = stages["averaged"]
    on_device = {
        stage: {name: w.to(runtime.device) for name, w in state.items()}
        for stage, state in stages.items()
    }
    score = scorer(h, runtime)
    bpb = score(averaged)
    if bpb:
        print(f"float average:{bpb}")

    code = tg.SOURCE.stat().st_size
    for megabytes in budgets:
        budget = int(megabytes * 1e6) - code

        def packed(budget: int = budget) -> bytes:
            return tg.pack_stages(on_device, h, facts.grid_step, budget, lambda line: None)

        artifact, seconds = timing.seconds(packed)
        _, state = tg.unpack(artifact)
        total = len(artifact) + code
        fits = "within" if total < megabytes * 1e6 else "OVER"
        print(
            f"\nbudget {megabytes} MB: bytes_total {total:,} ({fits}), "
            f"{seconds:.1f} s{score(state)}"
        )
        print(table(artifact, averaged))


def main(path: str, budgets: list[float]) -> None:
    content = Path(path).read_bytes()
    if content.startswith(tg.ARTIFACT_MAGIC):
        inspect(path, content)
    else:
        pack(path, budgets)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="final_model.ptz or final_model.pt")
    parser.add_argument("budgets", nargs="*", type=float, default=[16.0], help="10^6 bytes")
    arguments = parser.parse_args()
    if not all(0 < budget < math.inf for budget in arguments.budgets):
        parser.error("budgets: expected numbers of 10^6 bytes above 0")
    try:
        main(arguments.path, arguments.budgets)
    except (tg.RunError, OSError) as error:
        sys.exit(f"error: {error}")
