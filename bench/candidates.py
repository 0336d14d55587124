"""Candidates: techniques that are measured before they may enter train_gpt.py.

bench/ablate.py installs them in a run's own process: ON=loops,soap and, as further KEY=VALUE of the
variant, their options, which are the fields of the classes here.  A candidate is a patch of
train_gpt.py: other values for some attributes.  Each value calls the one that it takes the place
of, so candidates add up, in any order.  All of a candidate's numbers stay constant within a graph:
only a change of the model's plan asks for another, which the warm-up compiles.

What a candidate packs can be scored in its own process alone: train_gpt.py would take the artifact
for one of its own and leave out what it does not know.  Its lines here are not in the bytes of the
table; they would be 4 to 7 kB.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import train_gpt as tg


class Mistake(Exception):
    """Of the arguments, with the remedy."""


class Replacement(NamedTuple):
    """Another value of an attribute."""

    owner: object  # train_gpt or a class of it
    attribute: str
    value: object


class Candidate(Protocol):
    """A technique with the values of its options."""

    def check(self, h: tg.Hyperparameters) -> None:
        """Raises Mistake for options that cannot run."""

    def replacements(self) -> list[Replacement]:
        """The patch, of train_gpt.py as it is at the time of the call."""


def require(holds: bool, message: str) -> None:
    if not holds:
        raise Mistake(message)


# Depth recurrence


class Loops(NamedTuple):
    """Depth recurrence: some layers in the middle run again in sequence, with the same weights.

    With the defaults the order becomes 0 1 2 3 4 5 3 4 5 6 ... 10, from 35 % of the run on
    (pg#1204, pg#1331).  The pairs of the U-Net stay: a looped layer leaves or takes its skip on its
    last pass.  Scores after the training are those of the looped order; validations on the way are
    those of the order that trains then.
    """

    loop_first: int = 3
    loop_last: int = 5  # inclusive
    loop_repeats: int = 1  # passes beyond the first
    loop_from: float = 0.35  # progress of the run, as `progress_of` defines it

    def check(self, h: tg.Hyperparameters) -> None:
        layers = h.num_layers
        require(
            0 <= self.loop_first <= self.loop_last < layers,
            f"LOOP_FIRST={self.loop_first} LOOP_LAST={self.loop_last}: expected layers of 0 to "
            f"{layers - 1}, in this order; set both",
        )
        require(
            self.loop_repeats >= 1,
            f"LOOP_REPEATS={self.loop_repeats}: expected 1 or more; leave out ON=loops for none",
        )
        require(
            0 <= self.loop_from <= 1,
            f"LOOP_FROM={self.loop_from}: expected a share of the run; set it within 0 to 1",
        )

    def looped(self, plan: tg.Plan) -> tg.Plan:
        """`plan`, which has each layer once, with the loops."""
        stop = self.loop_last + 1
        section = plan[self.loop_first : stop]
        early = tuple(layer._replace(saves_skip=False, skip=None) for layer in section)
        return plan[: self.loop_first] + early * self.loop_repeats + plan[self.loop_first :]

    def replacements(self) -> list[Replacement]:
        """The trainer's model begins without loops; all others have them from the start.

        The warm-up runs, and on CUDA captures, the steps and the evaluation of both orders.
        """
        plain_plan = tg.layer_plan
        new_trainer = tg.Trainer.__init__
        warm_up_steps = tg.Trainer.warm_up_steps
        warm_up = tg.Evaluator.warm_up
        switch_on = tg.switch_on

        def looped_plan(h: tg.Hyperparameters) -> tg.Plan:
            return self.looped(plain_plan(h))

        def trainer_without(trainer: tg.Trainer, h: tg.Hyperparameters, *rest: Any) -> None:
            new_trainer(trainer, h, *rest)
            trainer.model.plan = plain_plan(h)

        def in_each_order(model: tg.GPT, run: Callable[[], None]) -> None:
            before = model.plan
            for plan in (plain_plan(model.h), looped_plan(model.h)):
                model.plan = plan
                run()
            model.plan = before

        def warm_up_steps_of_both(trainer: tg.Trainer, generator: torch.Generator) -> None:
            in_each_order(trainer.model, lambda: warm_up_steps(trainer, generator))

        def warm_up_both(evaluator: tg.Evaluator, model: tg.GPT) -> None:
            in_each_order(model, lambda: warm_up(evaluator, model))

        def switch_on_loops(
            trainer: tg.Trainer, now: tg.StepPlan, step: int, log: tg.RunLog
        ) -> None:
            looped = looped_plan(trainer.h)
            if now.progress >= self.loop_from and trainer.model.plan != looped:
                trainer.model.plan = looped
                log(f"loops:on step:{step} progress:{now.progress:.4f} layers:{len(looped)}")
            switch_on(trainer, now, step, log)

        return [
            Replacement(tg, "layer_plan", looped_plan),
            Replacement(tg.Trainer, "__init__", trainer_without),
            Replacement(tg.Trainer, "warm_up_steps", warm_up_steps_of_both),
            Replacement(tg.Evaluator, "warm_up", warm_up_both),
            Replacement(tg, "switch_on", switch_on_loops),
        ]


# SOAP-Muon


class Side(NamedTuple):
    """Rows or columns of a share of a bank: their covariance, and nearly its eigenvectors."""

    dim: int  # -2: rows, -1: columns
    covariance: Tensor  # (n, D, D) float32, running mean of G G^T or G^T G
    basis: Tensor  # (n, D, D) float32, orthonormal columns


class SoapState(NamedTuple):
    """What SOAP-Muon remembers of one rank's share (n, R, C) of a bank beside Muon's momentum."""

    sides: tuple[Side, ...]
    mean_square: Tensor  # (n, R, C) float32, running mean: of the gradient in the bases


POLAR_STEPS = 4  # of Newton-Schulz: singular values of 0.7 to 1 come within 1e-6 of 1


def turned(basis: Tensor, covariance: Tensor) -> Tensor:
    """`basis` one step closer to the eigenvectors of `covariance`; both (n, D, D).

    One power iteration, the Q of the QR decomposition of covariance @ basis, in first order: in the
    plane of two vectors it turns them by their covariance over the larger of their variances.  So
    it takes products of matrices alone, which batch well and wait for nothing.  Newton-Schulz makes
    the result orthonormal again.  No turn is larger than 45 degrees, so the first 60 steps or so
    lag behind QR.
    """
    seen = basis.mT @ covariance @ basis
    variance = seen.diagonal(dim1=-2, dim2=-1)
    row, column = variance[..., :, None], variance[..., None, :]
    turn = seen / torch.maximum(row, column).clamp_min(1e-30) * torch.sign(column - row)
    turn = (turn - turn.mT) / 2  # skew, up to rounding as it is
    bound = (turn @ turn.mT).square().sum((-2, -1), keepdim=True).sqrt().sqrt()  # of its norm
    x = (basis + basis @ (turn / bound.clamp_min(1))) / math.sqrt(2)
    for _ in range(POLAR_STEPS):
        x = 1.5 * x - 0.5 * (x @ (x.mT @ x))
    return x


def into_bases(x: Tensor, sides: Sequence[Side]) -> Tensor:
    """x (n, R, C) in the bases, in its own dtype."""
    for side in sides:
        basis = side.basis.to(x.dtype)
        x = basis.mT @ x if side.dim == -2 else x @ basis
    return x


def out_of_bases(x: Tensor, sides: Sequence[Side]) -> Tensor:
    for side in sides:
        basis = side.basis.to(x.dtype)
        x = basis @ x if side.dim == -2 else x @ basis.mT
    return x


class Soap(NamedTuple):
    """SOAP (Vyas et al., 2024) before Muon's orthogonalisation, in place of NorMuon.

    The momentum is divided by the root of the gradient's mean square, as Adam does it, in the
    eigenbasis of the covariance of each matrix's smaller side, then orthogonalised.  Decay of the
    mean squares is MUON_BETA2.  Reported at modded-nanogpt's track 3: 2,750 steps instead of 3,250.
    An update has Muon's norm, so MATRIX_LR keeps its meaning.
    """

    soap_beta: float = 0.95  # decay per step of the covariances
    soap_sides: int = 1  # 2: square matrices have a basis on both sides

    def check(self, h: tg.Hyperparameters) -> None:
        require(
            0 < self.soap_beta < 1,
            f"SOAP_BETA={self.soap_beta}: expected a decay between 0 and 1, such as 0.95",
        )
        require(self.soap_sides in (1, 2), f"SOAP_SIDES={self.soap_sides}: expected 1 or 2")

    def state(self, master: Tensor) -> SoapState:
        """Of a share of a bank before its first step."""
        rows, columns = master.shape[-2:]
        dims = (-2, -1) if rows == columns else (-2,) if rows < columns else (-1,)

        def side(dim: int) -> Side:
            eye = torch.eye(master.shape[dim], device=master.device)
            basis = eye.repeat(len(master), 1, 1)
            return Side(dim, torch.zeros_like(basis), basis)

        sides = tuple(side(dim) for dim in dims[: self.soap_sides])
        return SoapState(sides, torch.zeros_like(master))

    def update(
        self,
        grad: Tensor,
        bank: tg.Bank,
        state: SoapState,
        clip: Tensor,
        lr: Tensor,
        momentum: Tensor,
        decay: Tensor,
        beta2: float,
        dtype: torch.dtype,
    ) -> None:
        """In place of `muon_update`: a step of a share (n, R, C) of a bank.

        Covariances and bases are float32.  What goes into the bases and comes out of them does so
        in `dtype`, in which it is orthogonalised.  Adam's bias correction is one factor of a whole
        bank, which the orthogonalisation takes out: so there is none.
        """
        g = grad.float().nan_to_num(0, 0, 0) * clip
        bank.momentum.lerp_(g, 1 - momentum)
        for side in state.sides:
            lines = g if side.dim == -2 else g.mT
            side.covariance.lerp_(lines @ lines.mT, 1 - self.soap_beta)
            side.basis.copy_(turned(side.basis, side.covariance))

        square = into_bases(g.to(dtype), state.sides).float().square()
        state.mean_square.lerp_(square, 1 - beta2)
        direction = torch.lerp(g, bank.momentum, momentum)
        even = into_bases(direction.to(dtype), state.sides).float()
        even /= state.mean_square.sqrt() + 1e-12
        update = out_of_bases(even.to(dtype), state.sides).float()
        update = tg.orthogonalize(update, dtype).float()
        bank.master.mul_(1 - lr * decay).sub_(lr * bank.update_scale * update)

    def replacements(self) -> list[Replacement]:
        """The optimizer gets a state of each bank, which its snapshots hold too."""
        new_optimizer = tg.Optimizer.__init__
        snapshot = tg.Optimizer.snapshot

        def optimizer_with_bases(optimizer: Any, *arguments: Any) -> None:
            new_optimizer(optimizer, *arguments)
            update = optimizer.runtime.compile(self.update)
            optimizer.soap = {bank.name: self.state(bank.master) for bank in optimizer.banks}

            def update_of_bank(grad: Tensor, bank: tg.Bank, *rest: Any) -> None:
                update(grad, bank, optimizer.soap[bank.name], *rest)

            optimizer.muon_update = update_of_bank

        def snapshot_with_bases(optimizer: Any) -> Callable[[], None]:
            tensors = [
                tensor
                for state in optimizer.soap.values()
                for tensor in (state.mean_square, *(t for side in state.sides for t in side[1:]))
            ]
            saved = [tensor.clone() for tensor in tensors]
            restore_others = snapshot(optimizer)

            def restore() -> None:
                restore_others()
                torch._foreach_copy_(tensors, saved)

            return restore

        return [
            Replacement(tg.Optimizer, "__init__", optimizer_with_bases),
            Replacement(tg.Optimizer, "snapshot", snapshot_with_bases),
        ]


# Choice

CANDIDATES: dict[str, Any] = {"loops": Loops, "soap": Soap}
OPTIONS = {  # variable -> the candidate whose option it is
    field.upper(): name for name, kind in CANDIDATES.items() for field in kind._fields
}


def parse_option(key: str, text: str, default: Any) -> Any:
    """`text` as what the default is.  Raises Mistake with the remedy."""
    with contextlib.suppress(ValueError):
        return type(default)(text)
    names = {int: "a whole number", float: "a number"}
    raise Mistake(f"{key}={text}: expected {names[type(default)]}; its default is {default}")


def chosen(names: Sequence[str], overrides: Mapping[str, str]) -> list[Candidate]:
    """The candidates `names`, with their options from `overrides`.  Raises Mistake."""
    for name in names:
        require(name in CANDIDATES, f"ON={name}: unknown; choose of {', '.join(CANDIDATES)}")
        require(names.count(name) == 1, f"ON={','.join(names)}: {name} twice; name it once")
    values: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, text in overrides.items():
        if key not in OPTIONS:
            continue
        name = OPTIONS[key]
        require(name in names, f"{key}={text}: an option of {name}, which is off; add ON={name}")
        default = CANDIDATES[name]._field_defaults[key.lower()]
        values[name][key.lower()] = parse_option(key, text, default)
    return [CANDIDATES[name](**values[name]) for name in names]


def install(candidates: Sequence[Candidate]) -> None:
    """This process is then one that trains and scores with them."""
    for candidate in candidates:
        for owner, attribute, value in candidate.replacements():
            setattr(owner, attribute, value)
