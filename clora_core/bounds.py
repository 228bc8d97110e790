r"""Forward error bounds of every function that only adds and multiplies, with one derivation for all of them.

Theorem (spec, section 10). Let p be a sum of products of the inputs, evaluated in floating point with unit roundoff u
in any order, such that each product passes through at most k roundings. Barring overflow and underflow,

.. math:: |\mathrm{fl}(p(x)) - p(x)| \le \gamma_k\, \bar p(|x|),\qquad \gamma_k = \frac{k u}{1 - k u},

where :math:`\bar p` is p with every subtraction turned into an addition. So a bound is the function itself, evaluated
on absolute values, times a number that only depends on the sizes. Source: Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., lemma 3.1 and section 3.1. The computed :math:`\bar p` may itself be too small by the same
relative error, hence the division by :math:`1 - \gamma_k`.

``method="probabilistic"`` replaces k u by :math:`\lambda \sqrt{k}\, u` (Higham and Mary, SIAM J. Sci. Comput. 41, 2019,
theorem 2.4: roundings that are independent with mean zero satisfy it with probability at least
:math:`1 - 2\exp(-\lambda^2 (1-u)^2/2)` a product); meant for long inner sizes, where the worst case never comes.

Every function takes the arguments of the function it bounds, and returns an array (or a tuple of arrays) of the shape
of that function's result.
"""

from __future__ import annotations

import math
from typing import Any

from . import _array as arr
from ._adapter import Adapter
from .errors import DTypeError, OptionError, message

Array = arr.Array
METHODS = ("worst", "probabilistic")
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
CONFIDENCE = 4.0  # lambda: a product fails with probability below 7e-4, were errors as large as u throughout


def unit_roundoff(dtype: Any, xp: Any = None) -> float:
    """Half the distance from 1 to the next number: 2^-53, 2^-24, 2^-11 (float16), 2^-8 (bfloat16).

    ``dtype`` is a library's dtype or its name; ``xp`` is taken for uniformity and ignored.
    """
    for name, roundoff in ROUNDOFF.items():
        if dtype == name or (name in str(dtype) and not isinstance(dtype, str)):
            return roundoff
    raise DTypeError(
        message(
            "clora_core.bounds.unit_roundoff",
            "unknown dtype",
            got=str(dtype),
            needed="one of " + ", ".join(ROUNDOFF),
            cause="an integer dtype",
            fix="pass the dtype of the arithmetic",
        )
    )


def gamma(k: int, u: float, *, method: str = "worst", confidence: float = CONFIDENCE, xp: Any = None) -> float:
    r"""Relative error bound of k roundings: :math:`ku/(1-ku)`, or with :math:`\lambda\sqrt k` for k if probabilistic.

    Infinite where ku >= 1, that is where no such bound exists.
    """
    arr.check_option("clora_core.bounds.gamma", "method", method, METHODS)
    steps = k * u if method == "worst" else min(confidence * math.sqrt(k), k) * u
    return steps / (1.0 - steps) if steps < 1.0 else math.inf


def _factor(k: int, dtype: Any, xp: Any, method: str) -> float:
    g = gamma(k, unit_roundoff(dtype, xp), method=method)
    return g / (1.0 - g) if g < 1.0 else math.inf


def _abs(array: Array, xp: Any) -> Array:
    """Absolute values; of a dtype that the core refuses nothing, so that the function which is bounded refuses it."""
    real = array.dtype == xp.float32 or array.dtype == xp.float64
    return xp.abs(array) if real else array


def _absolute(adapter: Adapter, xp: Any) -> Adapter:
    return Adapter(*(None if array is None else _abs(array, xp) for array in adapter))


def routing(adapter: Adapter, *, method: str = "worst", xp: Any = None) -> Array:
    """Bound for `clora_core.routing`: one rounding."""
    from . import _layer

    xp = arr.namespace("clora_core.bounds.routing", xp, *adapter)
    size = _layer.routing(_absolute(adapter, xp), xp=xp)
    return _factor(1, size.dtype, xp, method) * size


def delta(adapter: Adapter, *, method: str = "worst", xp: Any = None) -> Array:
    """Bound for `clora_core.delta` in either association: 1 + r + r roundings."""
    from . import _layer

    xp = arr.namespace("clora_core.bounds.delta", xp, *adapter)
    size = _layer.delta(_absolute(adapter, xp), xp=xp)
    return _factor(_routed(adapter), size.dtype, xp, method) * size


def apply(x: Array, adapter: Adapter, *, method: str = "worst", xp: Any = None) -> Array:
    """Bound for `clora_core.apply`, whatever the association or folding: d_in + 2 r + 1 roundings."""
    from . import _layer

    xp = arr.namespace("clora_core.bounds.apply", xp, x, *adapter)
    size = _layer.apply(_abs(x, xp), _absolute(adapter, xp), xp=xp)
    return _factor(adapter.B.shape[-1] + _routed(adapter), size.dtype, xp, method) * size


def linear(
    x: Array, W: Array, adapter: Adapter, bias: Array | None = None, *, method: str = "worst", xp: Any = None
) -> Array:
    """Bound for `clora_core.linear` under any plan, merged included.

    d_in + 3 roundings for x W^T and the bias, 2 r + 1 more for the low-rank path.
    """
    from . import _layer

    where = "clora_core.bounds.linear"
    xp = arr.namespace(where, xp, x, W, *adapter, bias)
    _layer.check_input(where, xp, x, adapter, W, bias)
    d_in = adapter.B.shape[-1]
    absolute = _abs(x, xp)
    base = absolute @ arr.transpose(_abs(W, xp), xp)
    if bias is not None:
        base = base + _abs(bias, xp)[..., None, :]
    path = _layer.apply(absolute, _absolute(adapter, xp), xp=xp)
    return (
        _factor(d_in + 3, x.dtype, xp, method) * base + _factor(d_in + _routed(adapter) + 3, x.dtype, xp, method) * path
    )


def delta_vjp(
    adapter: Adapter,
    grad_delta: Array,
    *,
    wrt: tuple[str, ...] = ("A", "R_delta", "B"),
    stop_old: bool = True,
    method: str = "worst",
    xp: Any = None,
) -> Any:
    """Bounds for `clora_core.delta_vjp`.

    d_in + r + 1, d_in + d_out and d_out + r + 1 roundings for A, R_delta and B, plus sums over leading axes.
    """
    from . import _vjp

    xp = arr.namespace("clora_core.bounds.delta_vjp", xp, *adapter, grad_delta)
    size = _vjp.delta_vjp(_absolute(adapter, xp), _abs(grad_delta, xp), wrt=wrt, stop_old=stop_old, xp=xp)
    d_out, d_in, r = adapter.A.shape[-2], adapter.B.shape[-1], adapter.A.shape[-1]
    counts = {"A": d_in + r + 1, "R_delta": d_in + d_out, "B": d_out + r + 1}
    lead = _leading(*adapter, grad_delta)
    return _scale(size, counts, lead, adapter.A.dtype, method, xp)


def linear_vjp(
    x: Array,
    W: Array | None,
    adapter: Adapter,
    grad_y: Array,
    *,
    wrt: tuple[str, ...] = ("x", "A", "R_delta", "B"),
    stop_old: bool = True,
    bias: Array | None = None,
    method: str = "worst",
    xp: Any = None,
) -> Any:
    """Bounds for `clora_core.linear_vjp` under any plan.

    The rows of x and the leading axes are N = n * (number of matrices) terms of one sum, whether they are flattened to
    rows or summed matrix by matrix. Roundings: x d_out + 2 r + 3 plus the sum over its broadcast axes; W and bias N;
    A N + d_in + r + 1; R_delta N + d_in + d_out; B N + d_out + r + 1.
    """
    from . import _vjp

    where = "clora_core.bounds.linear_vjp"
    if x is None:
        raise OptionError(
            message(
                where,
                "the bound is made from x",
                got="x=None",
                needed="x (..., n, d_in)",
                cause="x dropped after the forward pass",
                fix="keep x where bounds are checked",
            )
        )
    xp = arr.namespace(where, xp, x, W, *adapter, grad_y, bias)
    size = _vjp.linear_vjp(
        _abs(x, xp),
        None if W is None else _abs(W, xp),
        _absolute(adapter, xp),
        _abs(grad_y, xp),
        wrt=wrt,
        stop_old=stop_old,
        bias=bias,
        xp=xp,
    )
    d_out, d_in, r = adapter.A.shape[-2], adapter.B.shape[-1], adapter.A.shape[-1]
    lead = _leading(x, W, *adapter, grad_y)
    rows = max(grad_y.shape[-2], 1) * lead
    counts = {
        "x": d_out + 2 * r + 3 + lead,
        "W": rows,
        "bias": rows,
        "A": rows + d_in + r + 1,
        "R_delta": rows + d_in + d_out,
        "B": rows + d_out + r + 1,
    }
    return _scale(size, counts, 0, x.dtype, method, xp)


def second_moment(u: Array, *, weights: Array | None = None, method: str = "worst", xp: Any = None) -> Array:
    """Bound for `clora_core.second_moment`: n + 3 roundings, with weights 2 n + 4 (all terms of the divisor positive).

    n for the products and their sum (and one more for a weight), 1 for the symmetric part, n - 1 for the sum of the
    weights, and 2 for the division, which a compiler may turn into a product with the rounded reciprocal of n.
    """
    from . import _moments

    xp = arr.namespace("clora_core.bounds.second_moment", xp, u, weights)
    size = _moments.second_moment(_abs(u, xp), weights=weights, xp=xp)
    n = max(u.shape[-2], 1)
    return _factor(n + 3 if weights is None else 2 * n + 4, u.dtype, xp, method) * size


def record(moments: Any, adapter: Adapter, C: Array, *, method: str = "worst", xp: Any = None) -> Any:
    """Bounds for `clora_core.record`, a Moments of bounds: 1, r + 2 and d_out + 2 r + r^2 + 5 roundings."""
    from . import _moments

    xp = arr.namespace("clora_core.bounds.record", xp, *moments, *adapter, C)
    size = _moments.record(
        _moments.Moments(*(_abs(m, xp) for m in moments)), _absolute(adapter, xp), _abs(C, xp), xp=xp
    )
    dtype = C.dtype
    m, r = adapter.R_delta.shape[-2:]
    return _moments.Moments(
        _factor(1, dtype, xp, method) * size.S,
        _factor(r + 2, dtype, xp, method) * size.P,
        _factor(_trace_roundings(adapter, m, r), dtype, xp, method) * size.q,
    )


def drift(adapter: Adapter, moments: Any, *, since: str = "task-ends", method: str = "worst", xp: Any = None) -> Array:
    """Bound for `clora_core.drift`: its three terms with positive signs, d_out + 2 r + r^2 + 6 roundings."""
    from . import _moments

    xp = arr.namespace("clora_core.bounds.drift", xp, *adapter, *moments)
    S, P, q = (_abs(m, xp) for m in moments)
    size = _moments.drift(_absolute(adapter, xp), _moments.Moments(S, -P, q), since=since, xp=xp)
    m, r = adapter.R_delta.shape[-2:]
    return _factor(_trace_roundings(adapter, m, r) + 1, q.dtype, xp, method) * size


def drift_vjp(
    adapter: Adapter,
    moments: Any,
    grad: Array | None = None,
    *,
    since: str = "task-ends",
    method: str = "worst",
    xp: Any = None,
) -> Array:
    """Bound for `clora_core.drift_vjp`: d_out + 2 r + 3 roundings, plus sums over leading axes."""
    from . import _moments

    xp = arr.namespace("clora_core.bounds.drift_vjp", xp, *adapter, *moments, grad)
    S, P, q = (_abs(m, xp) for m in moments)
    absolute = _absolute(adapter, xp)
    grad = None if grad is None else _abs(grad, xp)
    size = _moments.drift_vjp(absolute, _moments.Moments(S, -P, q), grad, since=since, xp=xp)
    m, r = adapter.R_delta.shape[-2:]
    k = _outer(adapter) + m + r + 3 + _leading(*adapter, *moments[:2], None if grad is None else grad[..., None, None])
    return _factor(k, q.dtype, xp, method) * size


def orthogonality(adapter: Adapter, *, form: str, method: str = "worst", xp: Any = None) -> Array:
    """Bound for `clora_core.orthogonality`, not normalised, in the forms "routing" and "output" (sums of products).

    2 k + r^2 + 1 roundings, k = r for "routing" and 2 r + d_out for "output".
    """
    from . import _orthogonality

    where = "clora_core.bounds.orthogonality"
    arr.check_option(where, "form", form, ("routing", "output"))
    xp = arr.namespace(where, xp, *adapter)
    size = _orthogonality.orthogonality(_absolute(adapter, xp), form=form, xp=xp)
    r = adapter.R_delta.shape[-1]
    inner = r if form == "routing" else 2 * r + adapter.A.shape[-2]
    return _factor(2 * inner + r * r + 1, adapter.R_delta.dtype, xp, method) * size


def project(R_delta: Array, basis: Any, *, method: str = "worst", xp: Any = None) -> Array:
    """Bound for `clora_core.project` with U taken as given: 2 r + 2 roundings."""
    from . import _moments

    where = "clora_core.bounds.project"
    xp = arr.namespace(where, xp, R_delta, *basis)
    _moments.check_basis(where, xp, R_delta, basis)
    U, weights = basis
    absolute, frame = _abs(R_delta, xp), _abs(U, xp)
    size = absolute + ((absolute @ frame) * weights[..., None, :]) @ arr.transpose(frame, xp)
    return _factor(2 * R_delta.shape[-1] + 2, R_delta.dtype, xp, method) * size


def merge(W: Array, adapter: Adapter, *, dtype: Any = None, method: str = "worst", xp: Any = None) -> Array:
    r"""Bound for the weight of `clora_core.merge`: the delta's error, one sum, and the rounding to ``dtype``.

    The last adds :math:`u_t |W'|` and, for a float64 weight that goes through float32, :math:`u_{32} |W'|`; in float16
    also half the spacing of its subnormals, :math:`2^{-25}`. Barring overflow of the target.
    """
    from . import _layer, _merge

    where = "clora_core.bounds.merge"
    xp = arr.namespace(where, xp, W, *adapter)
    _merge.check_weight(where, xp, W, adapter)
    size = _layer.delta(_absolute(adapter, xp), xp=xp)
    magnitude = _abs(W, xp) + size
    limit = _factor(1, W.dtype, xp, method) * _abs(W, xp) + _factor(_routed(adapter) + 1, W.dtype, xp, method) * size
    u = unit_roundoff(W.dtype if dtype is None else dtype, xp)
    if dtype is None or u <= unit_roundoff(W.dtype, xp):
        return limit
    steps = u + 2.0**-24 * (1.0 + u) if W.dtype == xp.float64 and u > 2.0**-24 else u
    return limit * (1.0 + steps) + steps * magnitude + (2.0**-25 if u == ROUNDOFF["float16"] else 0.0)


def orthonormal(d: int, r: int, dtype: Any, *, xp: Any = None) -> float:
    r"""Bound for the `orthonormality_defect` of a frame by QR: :math:`2e + e^2`, :math:`e = \sqrt r\,\gamma_{8dr}`.

    Householder QR gives :math:`\|\hat Q - Q\|_F \le \sqrt r\,\tilde\gamma_{dr}` for an exactly orthonormal Q (Higham,
    theorem 19.4 and eq. 19.13; the constant in the tilde is at most 8 by counting the roundings of one reflection), so
    the Gram matrix is off by at most twice that plus its square, plus its own evaluation, gamma_d r.
    """
    u = unit_roundoff(dtype, xp)
    e = math.sqrt(r) * gamma(8 * d * r, u)
    return 2.0 * e + e * e + (1.0 + e) ** 2 * gamma(d + 1, u) * r


def _routed(adapter: Adapter) -> int:
    """Roundings of A (R_old + R_delta) B along one product."""
    return 2 * adapter.A.shape[-1] + 1


def _outer(adapter: Adapter) -> int:
    """Roundings of K = A^T A."""
    return 0 if adapter.A is None else adapter.A.shape[-2]


def _trace_roundings(adapter: Adapter, m: int, r: int) -> int:
    """Roundings of a trace tr(K R M R^T) evaluated as sum((K R) * (R M))."""
    return _outer(adapter) + m + r + m * r + 5


def _leading(*arrays: Array | None) -> int:
    """How many terms a sum over leading axes can have at most."""
    shapes = {str(i): tuple(a.shape[:-2]) for i, a in enumerate(arrays) if a is not None}
    count = 1
    for size in arr.broadcast_shapes("clora_core.bounds", **shapes):
        count *= max(size, 1)
    return count


def _scale(size: Any, counts: dict[str, int], lead: int, dtype: Any, method: str, xp: Any) -> Any:
    return type(size)(
        *(
            None if value is None else _factor(counts[name] + lead, dtype, xp, method) * value
            for name, value in zip(size._fields, size, strict=True)
        )
    )
