"""The mathematics again, in exact rational arithmetic and from the formulas alone; imports nothing that it judges.

Arrays are NumPy arrays of `fractions.Fraction`; leading axes broadcast.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import isqrt
from typing import Any

import numpy as np

Exact = np.ndarray


def exact(array: Any) -> Exact:
    """The same numbers as fractions; every finite float is one."""
    array = np.asarray(array)
    if array.dtype == object:
        return array
    out = np.empty(array.shape, dtype=object)
    out.flat = [Fraction(float(number)) for number in array.flat]
    return out


def t(a: Exact) -> Exact:
    """Last two axes swapped."""
    return np.swapaxes(a, -1, -2)


def mul(*factors: Any) -> Exact:
    """Product of matrices, from the left: c_ij = sum_k a_ik b_kj."""
    out = exact(factors[0])
    for factor in factors[1:]:
        right = exact(factor)
        out = (out[..., :, :, None] * right[..., None, :, :]).sum(axis=-2)
        out = out + Fraction(0)
    return out


def sum_to(a: Exact, shape: tuple[int, ...]) -> Exact:
    """Sum over the axes along which an array of ``shape`` was repeated."""
    while a.ndim > len(shape):
        a = a.sum(axis=0)
    for axis, size in enumerate(shape):
        if size == 1 and a.shape[axis] != 1:
            a = a.sum(axis=axis, keepdims=True)
    return a


def trace(a: Exact) -> Exact:
    """Sum of the diagonal."""
    return np.asarray(np.trace(a, axis1=-2, axis2=-1), dtype=object)


def square(a: Exact) -> Exact:
    """Sum of squares of each matrix."""
    return np.asarray((a * a).sum(axis=(-2, -1)), dtype=object)


def routing(adapter: Any) -> Exact:
    """R = R_old + R_delta."""
    return exact(adapter.R_old) + exact(adapter.R_delta)


def delta(adapter: Any) -> Exact:
    """A R B."""
    return mul(adapter.A, routing(adapter), adapter.B)


def apply(x: Any, adapter: Any) -> Exact:
    """x (A R B)^T."""
    return mul(x, t(delta(adapter)))


def linear(x: Any, W: Any, adapter: Any, bias: Any = None) -> Exact:
    """x (W + A R B)^T + b."""
    y = mul(x, t(exact(W) + delta(adapter)))
    return y if bias is None else y + exact(bias)[..., None, :]


def delta_gradients(adapter: Any, G: Any, stop_old: bool) -> dict[str, Exact]:
    """Equations 11-12: with G = dL/d(delta), each summed to its own shape."""
    A, B = exact(adapter.A), exact(adapter.B)
    R = exact(adapter.R_delta) if stop_old else routing(adapter)
    full = {"A": mul(G, t(mul(R, B))), "R_delta": mul(t(A), G, t(B)), "B": mul(t(mul(A, R)), G)}
    return {name: sum_to(value, np.shape(getattr(adapter, name))) for name, value in full.items()}


def linear_gradients(
    x: Any, W: Any, adapter: Any, g: Any, stop_old: bool, bias_shape: tuple[int, ...]
) -> dict[str, Exact]:
    """Gradients of sum(g * y): through the weight's own gradient g^T x, which has every leading axis."""
    G = mul(t(exact(g)), x)
    weight = delta(adapter) if W is None else exact(W) + delta(adapter)
    out = {"x": sum_to(mul(g, weight), np.shape(x)), **delta_gradients(adapter, G, stop_old)}
    out["bias"] = sum_to(exact(g).sum(axis=-2) + Fraction(0), bias_shape)
    if W is not None:
        out["W"] = sum_to(G, np.shape(W))
    return out


def differences(loss: Callable[[Exact], Fraction], at: Any) -> Exact:
    """Central differences, one entry after the other; without error where the loss is at most quadratic in ``at``."""
    at = exact(at)
    out = np.empty(at.shape, dtype=object)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += 1
        down[index] -= 1
        out[index] = (loss(up) - loss(down)) / 2
    return out


def second_moment(u: Any, weights: Any = None) -> Exact:
    """Weighted mean of u u^T over the rows; zero where nothing has weight."""
    u = exact(u)
    w = np.full(u.shape[:-1], Fraction(1), dtype=object) if weights is None else exact(weights)
    total = np.asarray(w.sum(axis=-1), dtype=object)[..., None, None]
    sums = mul(t(u * w[..., None]), u)
    safe = np.where(total == 0, Fraction(1), total)
    return np.where(total == 0, Fraction(0), sums / safe)


def gram(A: Any, size: int) -> Exact:
    """K = A^T A, or the identity."""
    return exact(np.eye(size)) if A is None else mul(t(exact(A)), A)


def output_change(adapter: Any, C: Any, change: Any) -> Exact:
    """tr(K D C D^T): mean squared output of a routing D on inputs with second moment C."""
    D = exact(change)
    return trace(mul(gram(adapter.A, D.shape[-2]), D, C, t(D)))


def magnitude(tree: Any) -> Any:
    """Absolute values of an adapter or another tuple of arrays."""
    return type(tree)(*(None if a is None else np.abs(exact(a)) for a in tree))


def root(number: Fraction) -> Fraction:
    """Square root of a non-negative fraction, to 200 binary places."""
    return Fraction(isqrt((number.numerator << 400) // number.denominator), 1 << 200)


def norm(a: Any) -> Fraction:
    """Frobenius norm of everything in an array."""
    return root(Fraction(sum(number * number for number in exact(a).flat)))
