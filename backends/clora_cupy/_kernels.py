"""Element-wise kernels and one product that save passes over arrays, each beside the formula that it computes.

Nothing here synchronises, and only `accumulate` writes into an argument.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from clora_numpy.optimizers import AdamNumbers

from ._library import cupy

Array = Any

# name: (inputs, outputs, what is done for one element). C++ of CuPy's ElementwiseKernel, compiled at first use.
SOURCES = {
    "relu": ("T x", "T y", "y = x > T(0) ? x : T(0)"),
    "relu_backward": ("T y, T g", "T dx", "dx = y > T(0) ? g : T(0)"),
    "narrow": ("float16 y, float32 u", "float16 z", "z = float16(float(y) + u)"),
    "narrow_bias": ("float16 y, float32 u, float16 b", "float16 z", "z = float16(float(y) + u + float(b))"),
    "adam": (
        "T p, T g, T m, T v, T b1, T c1, T b2, T c2, T decay, T shrink, T rate, T scale, T eps",
        "T p_new, T m_new, T v_new",
        "T d = g + decay * p;"
        "m_new = b1 * m + c1 * d;"
        "v_new = b2 * v + c2 * (d * d);"
        "p_new = shrink * p - rate * (m_new / (sqrt(v_new) / scale + eps))",
    ),
}


_gemm: Any = importlib.import_module("cupy.cublas").gemm


@cache
def _kernel(name: str) -> Any:
    inputs, outputs, operation = SOURCES[name]
    return cupy.ElementwiseKernel(inputs, outputs, operation, f"clora_{name}")


def relu(x: Array) -> Array:
    """``where(x > 0, x, 0)``."""
    return _kernel("relu")(x)


def relu_backward(output: Array, grad: Array) -> Array:
    """``where(output > 0, grad, 0)``."""
    return _kernel("relu_backward")(output, grad)


def narrow(y: Array, update: Array, bias: Array | None = None) -> Array:
    """``astype(astype(y, float32) + update + astype(bias, float32), float16)``: one rounding to half precision."""
    return _kernel("narrow")(y, update) if bias is None else _kernel("narrow_bias")(y, update, bias)


def adam(
    parameter: Array, gradient: Array, mean: Array, square: Array, numbers: AdamNumbers
) -> tuple[Array, Array, Array]:
    """`clora_numpy.optimizers.adam_arrays` in one pass."""
    first, second, *rest = map(float, numbers)
    return _kernel("adam")(parameter, gradient, mean, square, first, 1.0 - first, second, 1.0 - second, *rest)


def accumulate(y: Array, a: Array, b: Array) -> Array:
    """``y + a @ b``, into y itself, which must be new and contiguous: the sum is the product's epilogue (beta = 1).

    float32 or float64; a (n, k), b (k, m), y (n, m). By `cupy.cublas.gemm`, the same function in CuPy 13 and 14.
    """
    if y.size and a.size:
        _gemm("N", "N", a, b, out=y, alpha=1.0, beta=1.0)
    return y
