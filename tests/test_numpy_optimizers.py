"""The functional optimizers follow their published update equations: exactly for SGD, within a bound for Adam."""

from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import clora_numpy as clora
from clora_core.bounds import gamma

DYADIC = st.integers(-8, 8).map(lambda k: k / 4)


@given(
    p=DYADIC,
    gradients=st.lists(DYADIC, min_size=1, max_size=4),
    momentum=st.sampled_from([0.0, 0.5, 0.25]),
    nesterov=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.25]),
)
def test_sgd_is_exact_on_dyadic_numbers(p, gradients, momentum, nesterov, weight_decay):
    rule = clora.sgd(0.5, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    value = np.array([p])
    state = rule.init(value)
    exact, buffer = Fraction(p), None
    for gradient in gradients:
        value, state = rule.update(value, np.array([gradient]), state)
        g = Fraction(gradient) + Fraction(weight_decay) * exact
        step = g
        if momentum:
            buffer = g if buffer is None else Fraction(momentum) * buffer + g
            step = g + Fraction(momentum) * buffer if nesterov else buffer
        exact -= step / 2
    assert Fraction(float(value[0])) == exact
    assert state.step == len(gradients)


@given(
    p=st.floats(-4, 4, width=32),
    gradients=st.lists(st.floats(-4, 4, width=32).filter(lambda g: abs(g) > 1e-3), min_size=1, max_size=6),
    decay=st.sampled_from([("none", 0.0), ("decoupled", 0.125), ("L2", 0.125)]),
)
def test_adam_and_adamw_follow_the_algorithm(p, gradients, decay):
    kind, weight_decay = decay
    decoupled = kind == "decoupled"
    if kind == "L2":
        gradients = gradients[:1]  # later gradients would carry the error of the parameter
    lr, b1, b2, eps = 2.0**-6, 0.875, 0.984375, 2.0**-20  # exact in binary, so the oracle uses the same numbers
    make = clora.adamw if decoupled else clora.adam
    rule = make(lr, betas=(b1, b2), eps=eps, weight_decay=weight_decay)
    value = np.array([p], np.float32)
    state = rule.init(value)
    with mpmath.workdps(40):
        exact, mean, mean_size, square = mpmath.mpf(float(value[0])), mpmath.mpf(0), mpmath.mpf(0), mpmath.mpf(0)
        slack, u = mpmath.mpf(0), 2.0**-24
        for t, gradient in enumerate(gradients, 1):
            g32 = np.array([gradient], np.float32)
            value, state = rule.update(value, g32, state)
            g = mpmath.mpf(float(g32[0]))
            size = abs(g)
            if decoupled:
                exact *= 1 - mpmath.mpf(lr) * weight_decay
            else:
                size += weight_decay * abs(exact)
                g += weight_decay * exact
            mean = b1 * mean + (1 - b1) * g
            mean_size = b1 * mean_size + (1 - b1) * size
            square = b2 * square + (1 - b2) * g * g
            assume(kind != "L2" or abs(g) > size / 4)  # no cancellation in the decayed gradient's square
            denominator = mpmath.sqrt(square / (1 - mpmath.mpf(b2) ** t)) + eps
            step = lr / (1 - mpmath.mpf(b1) ** t)
            exact -= step * mean / denominator
            # 3 roundings a step in the mean, 4 in the square (halved by the root), 8 for the rest; a decayed gradient
            # is off by 2 roundings of at most 4 times its size, twice that in its square
            slack += gamma(5 * t + 16, u) * step * mean_size / denominator + gamma(3, u) * (abs(exact) + slack)
        assert abs(mpmath.mpf(float(value[0])) - exact) <= slack


@pytest.mark.parametrize("rule", [clora.sgd(0.1, momentum=0.9), clora.adam(0.1), clora.adamw(0.1)])
def test_nothing_is_written_in_place(rule):
    value, gradient = np.ones(3), np.full(3, 0.5)
    value.flags.writeable = gradient.flags.writeable = False
    state = rule.init(value)
    first, state = rule.update(value, gradient, state)
    first.flags.writeable = False
    second, _ = rule.update(first, gradient, state)
    assert (first != value).all()
    assert (second != first).all()


def test_cosine_starts_at_lr_and_ends_at_zero():
    schedule = clora.cosine(0.5, 10)
    assert schedule(0) == 0.5
    assert schedule(5) == 0.25
    assert schedule(10) == schedule(11) == 0.0
    rule = clora.sgd(schedule)
    value = np.array([1.0])
    moved, _ = rule.update(value, value, rule.init(value))
    assert moved[0] == 0.5
