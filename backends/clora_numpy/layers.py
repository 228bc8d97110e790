"""Layers with explicit forward and backward. A layer holds arrays and never writes into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from array_api_compat import array_namespace, device

import clora_core as core
from clora_core.errors import ShapeError, StateError, message

Array = Any


class Layer:
    r"""A frozen linear layer that can carry a C-LoRA adapter: :math:`y = x W^T + x (A R B)^T + b`.

    Parameters
    ----------
    W : array, shape (d_out, d_in)
        Frozen weight, float32 or float64, of any Array API library.
    bias : array, shape (d_out,), optional
        Frozen bias.
    adapter : clora_core.Adapter, optional
        Normally given by `attach`.

    Attributes
    ----------
    trained : tuple of {"A", "R_delta", "B"}
        What `backward` makes gradients for.
    stop_old : bool
        A and B learn through R_delta alone (eqs. 11-12).
    gradients : dict
        Name -> array, summed over calls of `backward` until an optimizer's step clears it.
    """

    def __init__(self, W: Array, bias: Array | None = None, *, adapter: core.Adapter | None = None) -> None:
        if len(W.shape) != 2 or (bias is not None and tuple(bias.shape) != (W.shape[0],)):
            raise ShapeError(
                message(
                    "clora_numpy.Layer",
                    "the weight and bias are no layer's",
                    got=f"W {tuple(W.shape)}, bias {None if bias is None else tuple(bias.shape)}",
                    needed="W (d_out, d_in), bias (d_out,)",
                    cause="a kernel in (in, out) layout",
                    fix="transpose the weight",
                )
            )
        self.W, self.bias, self.adapter = W, bias, adapter
        self.trained: tuple[str, ...] = ("R_delta",)
        self.stop_old = True
        self.enabled = True
        self.gradients: dict[str, Array] = {}
        self.input: Array | None = None
        self._pristine: Array | None = None

    @property
    def merged(self) -> bool:
        """True between `merge` and `unmerge`."""
        return self._pristine is not None

    @property
    def adapter_dtype(self) -> Any:
        """Of the adapter: the weight's own."""
        return self.W.dtype

    def wide_weight(self) -> Array:
        """The weight in the adapter's dtype."""
        return self.W

    def wide_input(self) -> Array:
        """x of the last forward pass in the adapter's dtype."""
        if self.input is None:
            raise _no_forward("Layer")
        return self.input

    def forward(self, x: Array) -> Array:
        """The layer's output (..., n, d_out) for x (..., n, d_in); x is kept for `backward`."""
        self.input = x
        if self.adapter is None or self.merged or not self.enabled:
            W = self.W if self.enabled or self._pristine is None else self._pristine
            xp = array_namespace(x, W)
            y = x @ xp.matrix_transpose(W)
            return y if self.bias is None else y + self.bias
        return core.linear(x, self.W, self.adapter, self.bias)

    def backward(self, grad_y: Array, *, need_input: bool = True) -> Array | None:
        """Add to `gradients` and return the gradient of x (None unless ``need_input``)."""
        if self.input is None:
            raise _no_forward("Layer")
        if self.adapter is None or self.merged or not self.enabled:
            return grad_y @ self.W if need_input else None
        wrt = (("x",) if need_input else ()) + self.trained
        out = core.linear_vjp(self.input, self.W, self.adapter, grad_y, wrt=wrt, stop_old=self.stop_old)
        for name in self.trained:
            self.add_gradient(name, getattr(out, name))
        return out.x

    def add_gradient(self, name: str, gradient: Array) -> None:
        """Sum a gradient (a penalty's, say) into `gradients`."""
        self.gradients[name] = self.gradients[name] + gradient if name in self.gradients else gradient

    def routed_input(self) -> Array:
        """u = x B^T, (rows, r), of the last forward pass."""
        x = self.wide_input()
        assert self.adapter is not None
        return _rows(x) @ array_namespace(x).matrix_transpose(self.adapter.B)

    def merge(self) -> core.MergeReport:
        """Put W + A R B in the weight's place, the pristine weight aside. Returns what was kept of the delta."""
        assert self.adapter is not None
        merged = core.merge(self.W, self.adapter)
        self._pristine, self.W = self.W, merged.weight
        return merged.report

    def unmerge(self) -> None:
        """Put the pristine weight back: the same array, so the same bits."""
        assert self._pristine is not None
        self.W, self._pristine = self._pristine, None


class Head:
    r"""A classifier head that remembers: frozen value plus trained difference, :math:`y = [x, 1]\,(V + D)^T`.

    The adapter is ``Adapter(None, V, D, None)``, identity factors: what protects a routing protects a head.

    Parameters
    ----------
    W : array, shape (classes, d_in)
    bias : array, shape (classes,), optional
        Start of the head; zero where left out. Weight and bias are stored side by side, (classes, d_in + 1).
    """

    def __init__(self, W: Array, bias: Array | None = None) -> None:
        xp = array_namespace(W, bias)
        column = xp.zeros((W.shape[0],), dtype=W.dtype, device=device(W)) if bias is None else bias
        V = xp.concat([W, column[:, None]], axis=1)
        self.adapter = core.Adapter(None, V, xp.zeros_like(V), None)
        self.trained: tuple[str, ...] = ("R_delta",)
        self.enabled = True
        self.gradients: dict[str, Array] = {}
        self.input: Array | None = None
        self._start = V

    def forward(self, x: Array) -> Array:
        """Logits (..., n, classes) for x (..., n, d_in); x is kept for `backward`."""
        self.input = x
        xp = array_namespace(x)
        V = core.routing(self.adapter) if self.enabled else self._start
        return x @ xp.matrix_transpose(V[:, :-1]) + V[:, -1]

    def backward(self, grad_y: Array, *, need_input: bool = True) -> Array | None:
        """Add to `gradients` and return the gradient of x (None unless ``need_input``)."""
        rows = self.routed_input()
        xp = array_namespace(grad_y)
        if self.enabled:
            self.add_gradient("R_delta", xp.matrix_transpose(_rows(grad_y)) @ rows)
        return grad_y @ core.routing(self.adapter)[:, :-1] if need_input else None

    add_gradient = Layer.add_gradient

    def routed_input(self) -> Array:
        """[x, 1], (rows, d_in + 1), of the last forward pass."""
        if self.input is None:
            raise _no_forward("Head")
        x = _rows(self.input)
        xp = array_namespace(x)
        return xp.concat([x, xp.ones((x.shape[0], 1), dtype=x.dtype, device=device(x))], axis=1)


class Relu:
    """max(x, 0); its derivative at 0 is 0."""

    def __init__(self) -> None:
        self.output: Array | None = None

    def forward(self, x: Array) -> Array:
        """Positive part of x."""
        xp = array_namespace(x)
        self.output = xp.where(x > 0, x, xp.zeros_like(x))
        return self.output

    def backward(self, grad_y: Array, *, need_input: bool = True) -> Array | None:
        """grad_y where x was positive."""
        if self.output is None:
            raise _no_forward("Relu")
        xp = array_namespace(grad_y)
        return xp.where(self.output > 0, grad_y, xp.zeros_like(grad_y)) if need_input else None


class Network:
    """Modules in sequence. A module has ``forward(x)`` and ``backward(grad, need_input=)``.

    Parameters
    ----------
    modules : mapping of name to module, or sequence of modules (named "0", "1", ...)
    """

    def __init__(self, modules: Mapping[str, Any] | Sequence[Any]) -> None:
        named = modules.items() if isinstance(modules, Mapping) else ((str(i), m) for i, m in enumerate(modules))
        self.modules: dict[str, Any] = dict(named)

    def forward(self, x: Array) -> Array:
        """All modules in order."""
        for module in self.modules.values():
            x = module.forward(x)
        return x

    def backward(self, grad: Array) -> None:
        """All modules in reverse; stops where nothing before can learn."""
        order = list(self.modules.values())
        learning = [i for i, module in enumerate(order) if getattr(module, "adapter", None) is not None]
        first = learning[0] if learning else len(order)
        for i in reversed(range(first, len(order))):
            grad = order[i].backward(grad, need_input=i > first)


def cross_entropy(logits: Array, labels: Array, *, smoothing: float = 0.0) -> tuple[Array, Array]:
    r"""Mean softmax cross-entropy and its gradient, :math:`(\mathrm{softmax}(z) - t)/n`.

    Parameters
    ----------
    logits : array, shape (n, classes)
    labels : integer array, shape (n,)
    smoothing : float in [0, 1)
        Share of the target t spread evenly over all classes (Szegedy et al., CVPR 2016, section 7); the rest is the
        label's.

    Returns
    -------
    loss, gradient : arrays, shapes () and (n, classes)
    """
    xp = array_namespace(logits, labels)
    n, classes = logits.shape
    shifted = logits - xp.max(logits, axis=1, keepdims=True)
    log_total = xp.log(xp.sum(xp.exp(shifted), axis=1, keepdims=True))
    names = xp.arange(classes, dtype=labels.dtype, device=device(labels))
    target = xp.astype(labels[:, None] == names[None, :], logits.dtype)
    if smoothing:
        target = (1.0 - smoothing) * target + smoothing / classes
    loss = xp.sum(target * (log_total - shifted)) / n
    return loss, (xp.exp(shifted - log_total) - target) / n


def _rows(x: Array) -> Array:
    return x if len(x.shape) == 2 else array_namespace(x).reshape(x, (-1, x.shape[-1]))


def _no_forward(name: str) -> StateError:
    return StateError(
        message(
            f"clora_numpy.{name}.backward",
            "there is no forward pass to go back through",
            got="backward before forward",
            needed="forward(x), then backward(grad_y)",
            cause="a layer left out of the forward pass",
            fix="call forward first",
        )
    )
