"""Loads the float weights of a run (final_model.pt) with settings that fit them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_gpt as tg
from prepare_data import with_sample


def load(path: str | Path, env: Mapping[str, str]) -> tuple[tg.Hyperparameters, tg.Checkpoint]:
    """Settings and the checkpoint, with float32 weights on the CPU.

    The settings are those of the training; `env` overrides what comes after it.  Raises RunError if
    the file is no checkpoint or if `env` contradicts it.
    """
    env = {**env, "RESUME_FROM": str(path)}
    runtime = tg.Runtime(torch.device("cpu"))
    h, checkpoint = tg.load_checkpoint(tg.settings_of_process(env), runtime, env)
    stages = {
        stage: {name: w.float() for name, w in state.items()}
        for stage, state in checkpoint.stages.items()
    }
    return with_sample(h), checkpoint._replace(stages=stages)
