"""Loads the float weights of a run (final_model.pt) with settings that fit them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_gpt as tg
from prepare_data import with_sample


def load(path: str | Path, env: Mapping[str, str]) -> tuple[tg.Hyperparameters, tg.Stages]:
    """Settings and, by stage, float32 weights on the CPU.

    The architecture is the checkpoint's; `env` overrides the other settings.  Raises RunError if
    the file is no checkpoint or if the settings do not go with it.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        architecture = {name: saved["architecture"][name] for name in tg.ARCHITECTURE}
        stages = {
            stage: {name: w.float() for name, w in state.items()}
            for stage, state in saved["stages"].items()
        }
    except Exception:
        raise tg.RunError(f"{path}: not a run's final_model.pt") from None
    h = dataclasses.replace(tg.Hyperparameters.from_env(env), **architecture)
    return with_sample(h), stages
