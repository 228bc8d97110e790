"""clora_numpy's layers on CuPy: on the device of their arrays, in fewer passes, half precision at the border."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import clora_core as core
from clora_core.errors import ShapeError, message
from clora_numpy import layers as base

from . import _kernels as kernels
from ._device import check_dtype, here, is_half, on_device, place
from ._library import cupy

Array = Any


class Layer(base.Layer):
    r"""`clora_numpy.Layer` on CuPy: :math:`y = x W^T + x (A R B)^T + b`.

    Parameters
    ----------
    W : cupy.ndarray, shape (d_out, d_in)
        Frozen weight, float16, float32 or float64. Beside a float16 weight the adapter is float32: x is cast up for
        its part, and the sum is rounded to float16 once.
    bias : cupy.ndarray, shape (d_out,), optional
        Of the weight's dtype.

    Raises
    ------
    NamespaceError, DeviceError, DTypeError, ShapeError
        Arrays of another library, on two devices, of a dtype that does not fit, or of shapes that do not.
    """

    def __init__(self, W: Array, bias: Array | None = None, *, adapter: core.Adapter | None = None) -> None:
        where = "clora_cupy.Layer"
        self.device = place(where, {"W": W, "bias": bias})
        check_dtype(where, W.dtype, name="W")
        if bias is not None:
            check_dtype(where, bias.dtype, name="bias", like=W.dtype)
        super().__init__(W, bias, adapter=adapter)

    @property
    def adapter_dtype(self) -> Any:
        """Of the adapter: the weight's, or float32 beside half precision."""
        return cupy.dtype(cupy.float32) if is_half(self.W.dtype) else self.W.dtype

    @on_device
    def wide_weight(self) -> Array:
        """The weight in the adapter's dtype."""
        return self.W.astype(self.adapter_dtype, copy=False)

    @on_device
    def wide_input(self) -> Array:
        """x of the last forward pass in the adapter's dtype."""
        return super().wide_input().astype(self.adapter_dtype, copy=False)

    @on_device
    def forward(self, x: Array) -> Array:
        """The layer's output (..., n, d_out) for x (..., n, d_in) of the weight's dtype; x is kept for `backward`."""
        self._check("forward", "x", x, self.W.shape[1])
        self.input = x
        W = self.W if self.enabled or self._pristine is None else self._pristine
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ W.T  # new, so it may be added to
        if self.adapter is None or self.merged or not self.enabled:
            if self.bias is not None:
                y += self.bias
        else:
            R, wide = core.routing(self.adapter), rows.astype(self.adapter_dtype, copy=False)
            h = (wide @ self.adapter.B.T) @ R.T
            if is_half(y.dtype):
                y = kernels.narrow(y, h @ self.adapter.A.T, self.bias)
            else:
                y = kernels.accumulate(y, h, self.adapter.A.T)
                if self.bias is not None:
                    y += self.bias
        return y.reshape(*x.shape[:-1], W.shape[0])

    @on_device
    def backward(self, grad_y: Array, *, need_input: bool = True) -> Array | None:
        """Add to `gradients` and return the gradient of x (None unless ``need_input``)."""
        self._check("backward", "grad_y", grad_y, self.W.shape[0])
        if self.input is None or self.adapter is None or self.merged or not self.enabled:
            return super().backward(grad_y, need_input=need_input)
        half, (d_out, d_in) = is_half(self.W.dtype), self.W.shape
        x, g = self.wide_input().reshape(-1, d_in), grad_y.reshape(-1, d_out)
        wide_g = g.astype(self.adapter_dtype, copy=False)
        wrt = (("x",) if need_input else ()) + self.trained
        # A merged weight is of the adapter's dtype: in half precision it would have to be made wide, so none is made.
        dtype = "float16" if half else str(g.dtype)
        rank = self.adapter.R_delta.shape[-1]
        plan = core.plan(g.shape[0], d_out, d_in, rank, dtype=dtype, wrt=wrt, stop_old=self.stop_old)
        merged = plan.order == "merged" and need_input
        out = core.linear_vjp(
            x, self.W if merged else None, self.adapter, wide_g, wrt=wrt, stop_old=self.stop_old, plan=plan
        )
        for name in self.trained:
            self.add_gradient(name, getattr(out, name))
        if not need_input:
            return None
        dx: Any = out.x
        if half:
            dx = kernels.narrow(g @ self.W, dx)
        elif not merged:
            dx = kernels.accumulate(dx, g, self.W)
        return dx.reshape(*grad_y.shape[:-1], d_in)

    add_gradient = on_device(base.Layer.add_gradient)
    routed_input = on_device(base.Layer.routed_input)

    @on_device
    def merge(self) -> core.MergeReport:
        """Put W + A R B, rounded once to the weight's dtype, in the weight's place, the pristine weight aside."""
        assert self.adapter is not None
        merged = core.merge(self.wide_weight(), self.adapter, dtype=self.W.dtype)
        self._pristine, self.W = self.W, merged.weight
        return merged.report

    def _check(self, verb: str, name: str, array: Array, columns: int) -> None:
        where = f"clora_cupy.Layer.{verb}"
        place(where, {name: array}, self.device)
        check_dtype(where, array.dtype, name=name, like=self.W.dtype)
        if len(array.shape) < 2 or array.shape[-1] != columns:
            raise ShapeError(
                message(
                    where,
                    f"{name} does not fit the weight",
                    got=f"{name} {tuple(array.shape)}",
                    needed=f"{name} (..., n, {columns})",
                    cause="a transposed array, a missing row axis, or another layer's",
                    fix="pass rows (x[None, :] for one vector)",
                )
            )


class Head(base.Head):
    r"""`clora_numpy.Head` on CuPy: :math:`y = [x, 1]\,(V + D)^T`, in float32 where W or x is float16.

    Parameters
    ----------
    W : cupy.ndarray, shape (classes, d_in)
    bias : cupy.ndarray, shape (classes,), optional
    """

    def __init__(self, W: Array, bias: Array | None = None) -> None:
        self.device = place("clora_cupy.Head", {"W": W, "bias": bias})
        check_dtype("clora_cupy.Head", W.dtype, name="W")
        with here(self.device):
            super().__init__(_up(W), None if bias is None else _up(bias))
        self._given: Any = None

    @on_device
    def forward(self, x: Array) -> Array:
        """Logits (..., n, classes), float32 or wider, for x (..., n, d_in); x is kept for `backward`."""
        place("clora_cupy.Head.forward", {"x": x}, self.device)
        self._given = x.dtype
        wide = _up(x)
        check_dtype("clora_cupy.Head.forward", wide.dtype, name="x", like=self._start.dtype)
        return super().forward(wide)

    @on_device
    def backward(self, grad_y: Array, *, need_input: bool = True) -> Array | None:
        """Add to `gradients` and return the gradient of x (None unless ``need_input``), of the dtype that x had."""
        place("clora_cupy.Head.backward", {"grad_y": grad_y}, self.device)
        out = super().backward(grad_y, need_input=need_input)
        return None if out is None else out.astype(self._given, copy=False)

    add_gradient = on_device(base.Layer.add_gradient)
    routed_input = on_device(base.Head.routed_input)


class Relu(base.Relu):
    """max(x, 0) in one pass, and its derivative in one; at 0 that is 0."""

    def forward(self, x: Array) -> Array:
        """Positive part of x."""
        with here(place("clora_cupy.Relu.forward", {"x": x})):
            self.output = kernels.relu(x)
        return self.output

    def backward(self, grad_y: Array, *, need_input: bool = True) -> Array | None:
        """grad_y where x was positive."""
        if self.output is None or not need_input:
            return super().backward(grad_y, need_input=need_input)
        with here(place("clora_cupy.Relu.backward", {"output": self.output, "grad_y": grad_y})):
            return kernels.relu_backward(self.output, grad_y)


class Network(base.Network):
    """`clora_numpy.Network` with all of its arrays on one device, which its passes make the current one.

    Parameters
    ----------
    modules : mapping of name to module, or sequence of modules (named "0", "1", ...)
        Anything with ``forward(x)`` and ``backward(grad, need_input=)`` can stand between layers.

    Attributes
    ----------
    device : cupy.cuda.Device
        Of its layers' arrays; the current one where it has none.

    Raises
    ------
    DeviceError
        Layers on several devices.
    """

    def __init__(self, modules: Mapping[str, Any] | Sequence[Any]) -> None:
        super().__init__(modules)
        weights: dict[str, Array] = {}
        for name, module in self.modules.items():
            if isinstance(module, base.Layer):
                weights[name] = module.W
            elif isinstance(module, base.Head):
                weights[name] = module.adapter.R_old
        self.device = place("clora_cupy.Network", weights)
        if self.device is None:
            self.device = cupy.cuda.Device()

    @on_device
    def forward(self, x: Array) -> Array:
        """All modules in order."""
        place("clora_cupy.Network.forward", {"x": x}, self.device)
        return super().forward(x)

    @on_device
    def backward(self, grad: Array) -> None:
        """All modules in reverse; stops where nothing before can learn."""
        place("clora_cupy.Network.backward", {"grad": grad}, self.device)
        super().backward(grad)


def cross_entropy(logits: Array, labels: Array, *, smoothing: float = 0.0) -> tuple[Array, Array]:
    """`clora_numpy.cross_entropy` on the logits' device: loss () and its gradient (n, classes), both left there.

    Parameters
    ----------
    logits : cupy.ndarray, shape (n, classes)
    labels : integer cupy.ndarray, shape (n,)
    smoothing : float in [0, 1)
    """
    with here(place("clora_cupy.cross_entropy", {"logits": logits, "labels": labels})):
        return base.cross_entropy(logits, labels, smoothing=smoothing)


def _up(array: Array) -> Array:
    return array.astype(cupy.float32) if is_half(array.dtype) else array
