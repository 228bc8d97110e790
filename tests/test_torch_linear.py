"""clora_torch.adapted_linear is the core's layer: every order, dtype and subset of gradients, first and second."""

from itertools import combinations
from typing import Any

import kit
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clora_core as core

if kit.torch is None:
    pytest.skip(kit.NO_TORCH, allow_module_level=True)
torch: Any = kit.torch
import clora_torch as clora  # noqa: E402  (needs torch)

NAMES = ("x", "W", "bias", "A", "R_delta", "B")
SUBSETS = [subset for k in range(1, 7) for subset in combinations(NAMES, k)]
ORDERS = ("rows", "left", "right", "merged")
SIZES = [(1, 1, 1, 1), (2, 4, 5, 2), (7, 3, 4, 2), (6, 7, 3, 3), (9, 2, 2, 1), (0, 3, 4, 2), (40, 33, 17, 5)]


class Case:
    """Tensors of one layer, float64 copies of the same numbers, and the upstream gradient."""

    def __init__(self, sizes: tuple[int, int, int, int], dtype: str, seed: int, lead: tuple[int, ...] = ()) -> None:
        n, d_out, d_in, r = sizes
        rng = np.random.default_rng(seed)
        shapes = {"x": (*lead, n, d_in), "W": (d_out, d_in), "bias": (d_out,), "g": (*lead, n, d_out)}
        shapes |= {"A": (d_out, r), "R_old": (r, r), "R_delta": (r, r), "B": (r, d_in)}
        self.masters = {k: rng.standard_normal(s).astype(dtype) for k, s in shapes.items()}
        self.t = {k: torch.from_numpy(a.copy()) for k, a in self.masters.items()}

    def learn(self, names: tuple[str, ...]) -> list[Any]:
        """The named tensors, as leaves that require a gradient."""
        return [self.t[name].requires_grad_() for name in names]

    def adapter(self) -> Any:
        return core.Adapter(*(self.t[k] for k in ("A", "R_old", "R_delta", "B")))

    def y(self, **how: Any) -> Any:
        return clora.adapted_linear(self.t["x"], self.t["W"], self.t["bias"], self.adapter(), **how)

    def two_routes(self, stop_old: bool) -> Any:
        """x W^T + b + sg(A R_old B) x + A R_delta B x, by plain operations."""
        A, R_old, R_delta, B = self.adapter()
        y = self.t["x"] @ self.t["W"].T + self.t["bias"]
        stop = (lambda a: a.detach()) if stop_old else (lambda a: a)
        return y + self.t["x"] @ stop(B).T @ R_old.T @ stop(A).T + self.t["x"] @ B.T @ R_delta.T @ A.T

    def exact(self, names: tuple[str, ...], stop_old: bool) -> tuple[Any, Any, Any, Any]:
        """y and gradients in float64 from the core, and bounds on the error of the case's dtype."""
        W, bias = (self.masters[k].astype(np.float64) for k in ("W", "bias"))
        narrow = core.Adapter(*(self.masters[k] for k in core.Adapter._fields))
        adapter = core.Adapter(*(a.astype(np.float64) for a in narrow))
        rows = {k: self.masters[k].reshape(-1, self.masters[k].shape[-1]) for k in ("x", "g")}
        wide = {k: a.astype(np.float64) for k, a in rows.items()}
        grads = core.linear_vjp(wide["x"], W, adapter, wide["g"], wrt=names, stop_old=stop_old)
        how = {"wrt": names, "stop_old": stop_old}
        limits = core.bounds.linear_vjp(rows["x"], self.masters["W"], narrow, rows["g"], **how)
        y = core.linear(wide["x"], W, adapter, bias)
        return y, core.bounds.linear(rows["x"], self.masters["W"], narrow, self.masters["bias"]), grads, limits


def within(got: Any, want: np.ndarray, limit: Any) -> None:
    """|got - want| <= limit, which is twice the bound of one evaluation: the float64 reference has its own."""
    assert got.dtype == torch.float64 or got.dtype == torch.float32
    error = np.abs(got.detach().numpy().astype(np.float64).reshape(want.shape) - want)
    assert np.all(error <= 2 * np.asarray(limit, np.float64)), float(np.max(error / np.maximum(limit, 1e-300)))


@given(
    sizes=st.sampled_from(SIZES),
    lead=st.sampled_from([(), (3,), (2, 2)]),
    dtype=st.sampled_from(["float32", "float64"]),
    names=st.sampled_from(SUBSETS),
    order=st.sampled_from([None, *ORDERS]),
    stop_old=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_value_and_gradients(
    sizes: Any, lead: Any, dtype: str, names: tuple[str, ...], order: str | None, stop_old: bool, seed: int
) -> None:
    """Against the core in float64, for every order of contraction, subset of what learns, and leading axes."""
    case = Case(sizes, dtype, seed, lead)
    leaves = case.learn(names)
    y = case.y(stop_old=stop_old, order=order)
    want_y, limit_y, want, limits = case.exact(names, stop_old)
    within(y, want_y, limit_y)
    grads = torch.autograd.grad(y, leaves, case.t["g"])
    for name, grad in zip(names, grads, strict=True):
        assert grad.shape == case.t[name].shape
        within(grad, getattr(want, name), getattr(limits, name))
    with torch.no_grad():
        assert torch.equal(case.y(stop_old=stop_old, order=order), y), "what learns changed the value"


@pytest.mark.parametrize("names", [("x", "A", "R_delta", "B"), ("x", "R_delta"), ("A", "R_delta"), NAMES])
@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck(order: str, names: tuple[str, ...]) -> None:
    """Without the stop-gradient all derivatives are those of the value: first and second order, by differences."""
    case = Case((5, 4, 6, 3), "float64", 0)
    leaves = case.learn(names)

    def value(*_: Any) -> Any:
        return case.y(stop_old=False, order=order)

    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradgradcheck(value, leaves)


@pytest.mark.parametrize("stop_old", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("names", [s for s in SUBSETS if len(s) in (1, 2, 6)])
def test_second_order(names: tuple[str, ...], order: str, stop_old: bool) -> None:
    """Gradients of gradients equal those of the two routes with detach, on dyadic numbers, every bit."""
    case = Case((3, 2, 3, 2), "float64", 1)
    for key, a in case.t.items():
        case.t[key] = torch.round(2 * a) / 2
    leaves = case.learn(names)
    weights = [torch.arange(a.numel(), dtype=a.dtype).reshape(a.shape) - 2 for a in leaves]

    def twice(y: Any) -> list[Any]:
        grads = torch.autograd.grad((y * y * case.t["g"]).sum(), leaves, create_graph=True)
        total = sum((g * w).sum() for g, w in zip(grads, weights, strict=True))
        return [*grads, *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]

    got, want = twice(case.y(stop_old=stop_old, order=order)), twice(case.two_routes(stop_old))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stop_old", [False, True])
def test_other_layers_path(stop_old: bool) -> None:
    """`routed`, which Embedding and Conv use: value of one route, first and second derivatives of two."""
    case = Case((3, 2, 3, 2), "float64", 2)
    for key, a in case.t.items():
        case.t[key] = torch.round(2 * a) / 2
    names = ("x", "A", "R_delta", "B")
    leaves = case.learn(names)
    base = case.t["x"] @ case.t["W"].T + case.t["bias"]

    def derivatives(y: Any) -> list[Any]:
        grads = torch.autograd.grad((y * y * case.t["g"]).sum(), leaves, create_graph=True)
        return [*grads, *torch.autograd.grad(sum((g * g).sum() for g in grads), leaves)]

    y = base + clora.routed(torch.nn.functional.linear, case.t["x"], case.adapter(), stop_old=stop_old)
    assert torch.equal(y, case.y(stop_old=stop_old))
    for a, b in zip(derivatives(y), derivatives(case.two_routes(stop_old)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("order", ORDERS)
def test_kept_for_backward(order: str) -> None:
    """Frozen factors: n x r numbers. B learning: x once, and u where it was made. Never d_out x d_in."""
    n, d_out, d_in, r = 64, 24, 32, 4
    learning = {("x", "R_delta"): n * r, ("x", "A", "R_delta"): n * r, ("x", "R_delta", "B"): n * (d_in + r)}
    for names, most in learning.items():
        packed: dict[int, int] = {}
        case = Case((n, d_out, d_in, r), "float32", 3)
        case.learn(names)
        own = {a.untyped_storage().data_ptr() for k, a in case.t.items() if k != "x"}

        def pack(tensor: Any, packed: dict[int, int] = packed, own: set[int] = own) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                packed[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = case.y(order=order)
        assert sum(packed.values()) <= 4 * most, (names, packed)
        y.sum().backward()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("names", [("x", "A", "R_delta", "B"), ("x", "R_delta")])
def test_half_precision_base(dtype: str, names: tuple[str, ...]) -> None:
    """A half base with a float32 adapter: one cast at the border, so that each gradient has its own dtype."""
    case = Case((40, 33, 17, 5), "float32", 4)
    half = getattr(torch, dtype)
    for key in ("x", "W", "bias", "g"):
        case.t[key] = case.t[key].to(half)
        case.masters[key] = case.t[key].double().numpy()
    leaves = case.learn(names)
    y = case.y()
    assert y.dtype == half
    grads = torch.autograd.grad(y, leaves, case.t["g"])
    x, W, g = (case.masters[k] for k in ("x", "W", "g"))
    adapter = core.Adapter(*(case.masters[k].astype(np.float64) for k in ("A", "R_old", "R_delta", "B")))
    want = core.linear_vjp(x, W, adapter, g, wrt=names)
    size = core.linear_vjp(np.abs(x), np.abs(W), core.Adapter(*map(np.abs, adapter)), np.abs(g), wrt=names)
    u = core.bounds.unit_roundoff(dtype)
    for name, grad in zip(names, grads, strict=True):
        assert grad.dtype == case.t[name].dtype
        # factors are made in float32 from rows that are exact; x takes three roundings to half precision
        steps = 4 * u if name == "x" else core.bounds.gamma(200, 2.0**-24)
        within(grad.float(), getattr(want, name), steps * getattr(size, name))


def test_autocast() -> None:
    """Under autocast the base is multiplied in bfloat16 and the adapter in float32; gradients arrive in float32."""
    case = Case((40, 33, 17, 5), "float32", 5)
    leaves = case.learn(("x", "A", "R_delta", "B"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.y()
        base = torch.nn.functional.linear(case.t["x"], case.t["W"], case.t["bias"])
    assert y.dtype == base.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sum(), leaves)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)
    plain = torch.autograd.grad(case.y().sum(), leaves[1:])
    for a, b in zip(grads[1:], plain, strict=True):
        assert torch.equal(a, b), "factors learn from the same rows, in the same precision"


def test_transforms_of_torch_func() -> None:
    """vmap, jvp, grad and hessian agree with the plain operations, on dyadic numbers, every bit."""
    case = Case((4, 2, 3, 2), "float64", 6)
    for key, a in case.t.items():
        case.t[key] = torch.round(2 * a) / 2
    t, func = case.t, torch.func

    def layer(x: Any, A: Any, R: Any, B: Any) -> Any:
        return clora.adapted_linear(x, t["W"], t["bias"], core.Adapter(A, t["R_old"], R, B))

    def plain(x: Any, A: Any, R: Any, B: Any) -> Any:
        y = x @ t["W"].T + t["bias"] + x @ B.detach().T @ t["R_old"].T @ A.detach().T
        return y + x @ B.T @ R.T @ A.T

    args = (t["x"], t["A"], t["R_delta"], t["B"])
    stacked = tuple(torch.stack([a, 2 * a]) for a in args)
    assert torch.equal(func.vmap(layer)(*stacked), func.vmap(plain)(*stacked))
    rows_only = func.vmap(layer, in_dims=(0, None, None, None))(stacked[0], *args[1:])
    assert torch.equal(rows_only, torch.stack([layer(x, *args[1:]) for x in stacked[0]]))
    for one, two in zip(func.jvp(layer, args, args), func.jvp(plain, args, args), strict=True):
        assert torch.equal(one, two)
    for i in range(4):
        both = [func.hessian(lambda *a, f=f: (f(*a) * t["g"]).sum(), argnums=i)(*args) for f in (layer, plain)]
        assert torch.equal(*both)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(t["x"], t["x"])
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual, *args[1:])).tangent
    assert torch.equal(tangent, func.jvp(lambda x: layer(x, *args[1:]), (t["x"],), (t["x"],))[1])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_any_number_of_rows(backend: str) -> None:
    """One graph for all n, no breaks, and the eager numbers within bounds."""
    names = ("x", "A", "R_delta", "B")

    def layer(x: Any, W: Any, bias: Any, *factors: Any) -> Any:
        return clora.adapted_linear(x, W, bias, core.Adapter(*factors))

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for n in (5, 7, 64, 300):
        case = Case((n, 9, 12, 3), "float32", n)
        leaves = case.learn(names)
        torch._dynamo.mark_dynamic(case.t["x"], 0)
        y = compiled(case.t["x"], case.t["W"], case.t["bias"], *case.adapter())
        want_y, limit_y, want, limits = case.exact(names, True)
        within(y, want_y, limit_y)
        for name, grad in zip(names, torch.autograd.grad(y, leaves, case.t["g"]), strict=True):
            within(grad, getattr(want, name), getattr(limits, name))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_dropout_on_the_routed_inputs() -> None:
    """Entries of u are zeroed or doubled at p = 1/2, with one mask for both routes; in the mean nothing changes."""
    case = Case((4000, 2, 3, 2), "float64", 7)
    torch.manual_seed(0)
    base, dropped = (case.y(dropout=p) - case.t["x"] @ case.t["W"].T - case.t["bias"] for p in (0.0, 0.5))
    A, R_old, R_delta, B = case.adapter()
    u = case.t["x"] @ B.T
    masks = torch.tensor([[0.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 2.0]], dtype=torch.float64)
    options = ((u[None] * masks[:, None]) @ (R_old + R_delta).T) @ A.T
    nearest, which = (options - dropped).abs().amax(dim=2).min(dim=0)
    assert float(nearest.max()) <= 1e-12 * float(base.abs().max())
    assert torch.bincount(which, minlength=4).min() > 800  # each of four equally likely, sd 27
