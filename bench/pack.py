"""What an artifact holds, and what other budgets would cost.

    python bench/pack.py final_model.ptz                    # inspect: a table by tensor group
    python bench/pack.py final_model.pt [MB ...]            # the same for a checkpoint, packed now
    DATA_PATH=... TOKENIZER_PATH=... python bench/pack.py final_model.pt 8 10 12 14 16   # with bpb

Bits and entropy are per weight of the group; entropy is of order 0 with each matrix's own
frequencies; overhead is zstd's bytes (codes alone) over it; the relative error is the squared error
over the squared weights, and needs the checkpoint.  Budgets count code and weights, in 10^6 bytes.
"""
from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import zstandard
from torch import Tensor

import train_gpt as tg
from prepare_data import with_sample


def header_of(artifact: bytes) -> dict[str, Any]:
    """Architecture and, per tensor, the lengths of its frames."""
    length = int.from_bytes(artifact[44:48], "little")
    return json.loads(zstandard.ZstdDecompressor().decompress(artifact[48 : 48 + length]))


def codes_of(artifact: bytes) -> dict[str, Tensor]:
    """int8 codes (N, R, C) of every rounded tensor, from its frames."""
    position, codes = 48 + int.from_bytes(artifact[44:48], "little"), {}
    for entry in header_of(artifact)["tensors"]:
        frames = []
        for length in entry["frames"]:
            frame = artifact[position : position + length]
            frames.append(zstandard.ZstdDecompressor().decompress(frame))
            position += length
        if entry["kind"] == "codes":
            flat = np.frombuffer(b"".join(frames[1:]), np.int8).copy()
            codes[entry["name"]] = torch.from_numpy(flat).view(-1, *entry["shape"][-2:])
    return codes


def table(artifact: bytes, trained: Mapping[str, Tensor] | None = None) -> str:
    """Rows by tensor group; `trained` are the float weights that were packed."""
    _, state = tg.unpack(artifact)
    codes, lines = codes_of(artifact), []
    lines.append(f"{'tensor':12s} {'weights':>10s} {'bits':>6s} {'entropy':>8s} {'bytes':>10s} "
                 f"{'overhead':>9s} {'error':>9s} {'share':>7s}")
    total_entropy = total_codes = 0.0
    for entry in header_of(artifact)["tensors"]:
        name, size = entry["name"], sum(entry["frames"])
        w, entropy, overhead, error = state[name], "", "", ""
        if name in codes:
            bytes_of_entropy = tg.entropy_bits(codes[name]) / 8
            coded = sum(entry["frames"][1:])
            total_entropy, total_codes = total_entropy + bytes_of_entropy, total_codes + coded
            entropy = f"{8 * bytes_of_entropy / w.numel():.3f}"
            overhead = f"{100 * (coded / bytes_of_entropy - 1):+.2f} %"
        if trained:
            difference = (w - trained[name].float().cpu()).square().sum()
            error = f"{float(difference / trained[name].float().square().sum()):.1e}"
        lines.append(f"{name:12s} {w.numel():10,d} {8 * size / w.numel():6.3f} {entropy:>8s} "
                     f"{size:10,d} {overhead:>9s} {error:>9s} {100 * size / len(artifact):6.2f} %")
    lines.append(f"{len(artifact):,} bytes; all codes: zstd {total_codes:,.0f} bytes, entropy "
                 f"{total_entropy:,.0f}, overhead {100 * (total_codes / total_entropy - 1):+.2f} %")
    return "\n".join(lines)


def main(path: str, budgets: list[float]) -> None:
    content = Path(path).read_bytes()
    if content[:8] == tg.ARTIFACT_MAGIC:
        header = header_of(content)
        print(f"{path}: format {tg.ARTIFACT_VERSION}, SHA-256 {content[12:44].hex()}")
        print(" ".join(f"{k}:{v}" for k, v in header["architecture"].items()))
        print(table(content))
        return
    saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    h = dataclasses.replace(with_sample(tg.Hyperparameters.from_env(os.environ)),
                            **saved["architecture"])
    runtime = tg.Runtime.start(h, {})
    trained = {name: w.to(runtime.device).float()
               for name, w in saved["stages"]["averaged"].items()}
    evaluator = kernels = None
    if Path(h.data_path).is_dir():
        tokens = np.concatenate(tg.open_split(h.data_path, "val"))
        bytes_of = tg.load_byte_table(h.tokenizer_path, h.vocab_size)
        evaluator = tg.Evaluator(h, runtime, tokens, bytes_of)
        kernels = tg.choose_kernels(h, runtime, tg.RunLog(None))
        score = evaluator.score(tg.load_model(h, runtime, trained, kernels))
        print(f"float weights: val_bpb {score.bpb:.5f}")
    code = tg.SOURCE.stat().st_size
    for megabytes in budgets:
        began = time.perf_counter()
        artifact = tg.pack_to_budget(trained, h, int(megabytes * 1e6) - code, lambda line: None)
        seconds, bpb = time.perf_counter() - began, ""
        if evaluator and kernels:
            model = tg.load_model(h, runtime, tg.unpack(artifact)[1], kernels)
            bpb = f" val_bpb {evaluator.score(model).bpb:.5f}"
        print(f"\nbudget {megabytes} MB: bytes_total {len(artifact) + code:,} "
              f"({'within' if len(artifact) + code < megabytes * 1e6 else 'OVER'}), "
              f"{seconds:.1f} s{bpb}")
        print(table(artifact, {name: w.cpu() for name, w in trained.items()}))


if __name__ == "__main__":
    main(sys.argv[1], [float(x) for x in sys.argv[2:]] or [16.0])
