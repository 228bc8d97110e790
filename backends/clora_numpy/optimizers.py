"""Functional optimizers over the Array API, one parameter at a time. No array is written to, so any library can."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from array_api_compat import array_namespace

Array = Any
Schedule = float | Callable[[int], float]


class Rule(NamedTuple):
    """An update rule for one parameter.

    Attributes
    ----------
    init : callable
        ``init(parameter) -> state``: the state before the first step.
    update : callable
        ``update(parameter, gradient, state) -> (parameter, state)``: new arrays, the old ones untouched.
    """

    init: Callable[[Array], Any]
    update: Callable[[Array, Array, Any], tuple[Array, Any]]


class MomentumState(NamedTuple):
    """Steps taken, and the momentum buffer (None before the first step, or without momentum)."""

    step: int
    buffer: Array | None


class AdamState(NamedTuple):
    """Steps taken, and the running means of the gradient and of its square."""

    step: int
    mean: Array
    square: Array


def cosine(lr: float, steps: int) -> Callable[[int], float]:
    r"""Learning rate falling from ``lr`` to 0 over ``steps`` along half a cosine: :math:`\eta\,(1+\cos(\pi t/T))/2`.

    Counted by each parameter's own state, so it restarts where that state is cleared: at a task's boundary.
    Source: Loshchilov and Hutter, SGDR, ICLR 2017, eq. 5.
    """
    return lambda step: lr * 0.5 * (1.0 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))


def sgd(lr: Schedule, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> Rule:
    r"""Stochastic gradient descent: :math:`b \leftarrow \mu b + g,\ p \leftarrow p - \eta b`.

    Parameters
    ----------
    lr : float or callable
        Learning rate, or a function from the number of steps taken to one.
    momentum : float
        mu; the first step sets b = g. 0 keeps no buffer.
    nesterov : bool
        Step along g + mu b instead of b.
    weight_decay : float
        Adds weight_decay * p to the gradient (L2 penalty).

    Notes
    -----
    Momentum without dampening, as PyTorch and Sutskever et al., ICML 2013, up to the place of the learning rate.
    """

    def update(parameter: Array, gradient: Array, state: MomentumState) -> tuple[Array, MomentumState]:
        gradient = gradient + weight_decay * parameter if weight_decay else gradient
        buffer, direction = None, gradient
        if momentum:
            buffer = gradient if state.buffer is None else momentum * state.buffer + gradient
            direction = gradient + momentum * buffer if nesterov else buffer
        return parameter - _rate(lr, state.step) * direction, MomentumState(state.step + 1, buffer)

    return Rule(lambda _: MomentumState(0, None), update)


def adam(
    lr: Schedule = 1e-3, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
) -> Rule:
    r"""Adam: :math:`p \leftarrow p - \eta\, \hat m / (\sqrt{\hat v} + \epsilon)` with bias-corrected means.

    ``weight_decay`` adds weight_decay * p to the gradient (L2 penalty). Source: Kingma and Ba, ICLR 2015, algorithm 1.
    """
    return adam_rule(lr, betas, eps, weight_decay, decoupled=False)


def adamw(
    lr: Schedule = 1e-3, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2
) -> Rule:
    r"""AdamW: :math:`p \leftarrow (1 - \eta\lambda)\,p`, then Adam's step on the bare gradient.

    Source: Loshchilov and Hutter, ICLR 2019, algorithm 2, with the decay multiplied by the learning rate as in PyTorch.
    """
    return adam_rule(lr, betas, eps, weight_decay, decoupled=True)


class AdamNumbers(NamedTuple):
    """Numbers of one step: decay rates of both means; L2 and decoupled decay; step size; the root's scale; epsilon."""

    first: float
    second: float
    decay: float
    shrink: float
    rate: float
    scale: float
    eps: float


def adam_arrays(
    parameter: Array, gradient: Array, mean: Array, square: Array, numbers: AdamNumbers
) -> tuple[Array, Array, Array]:
    """One step as a formula over whole arrays: the new parameter, mean and square."""
    xp = array_namespace(parameter, gradient)
    first, second, decay, shrink, rate, scale, eps = numbers
    gradient = gradient + decay * parameter if decay else gradient
    mean = first * mean + (1.0 - first) * gradient
    square = second * square + (1.0 - second) * (gradient * gradient)
    parameter = shrink * parameter if shrink != 1.0 else parameter
    return parameter - rate * (mean / (xp.sqrt(square) / scale + eps)), mean, square


def adam_rule(
    lr: Schedule,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    *,
    decoupled: bool,
    arrays: Callable[..., tuple[Array, Array, Array]] = adam_arrays,
) -> Rule:
    """The rule of `adam` and `adamw`; ``arrays`` does the arithmetic, as `adam_arrays` does."""
    first, second = betas

    def init(parameter: Array) -> AdamState:
        zero = array_namespace(parameter).zeros_like(parameter)
        return AdamState(0, zero, zero)

    def update(parameter: Array, gradient: Array, state: AdamState) -> tuple[Array, AdamState]:
        lr_now, step = _rate(lr, state.step), state.step + 1
        numbers = AdamNumbers(
            first,
            second,
            decay=0.0 if decoupled else weight_decay,
            shrink=1.0 - lr_now * weight_decay if decoupled else 1.0,
            rate=lr_now / (1.0 - first**step),
            scale=math.sqrt(1.0 - second**step),
            eps=eps,
        )
        parameter, mean, square = arrays(parameter, gradient, state.mean, state.square, numbers)
        return parameter, AdamState(step, mean, square)

    return Rule(init, update)


def _rate(lr: Schedule, step: int) -> float:
    return lr(step) if callable(lr) else lr
