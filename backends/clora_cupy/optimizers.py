"""Adam and AdamW with the update as one kernel; `sgd` and `cosine` are clora_numpy's."""

from __future__ import annotations

from clora_numpy.optimizers import Rule, Schedule, adam_rule

from . import _kernels as kernels


def adam(
    lr: Schedule = 1e-3, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
) -> Rule:
    """`clora_numpy.adam`, one kernel a parameter. ``weight_decay`` adds weight_decay * p to the gradient."""
    return adam_rule(lr, betas, eps, weight_decay, decoupled=False, arrays=kernels.adam)


def adamw(
    lr: Schedule = 1e-3, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2
) -> Rule:
    """`clora_numpy.adamw`, one kernel a parameter."""
    return adam_rule(lr, betas, eps, weight_decay, decoupled=True, arrays=kernels.adam)
