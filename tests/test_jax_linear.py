"""clora_jax.linear is the core's layer under JAX's transformations: every order, layout, dtype, subset of gradients."""

import re
from itertools import combinations
from typing import Any

import kit
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clora_core as core
from clora_core.errors import DTypeError, OptionError, ShapeError, StateError

if kit.jax is None:
    pytest.skip(kit.NO_JAX, allow_module_level=True)
import jax
import jax.numpy as jnp

import clora_jax as clora
from clora_jax import _function

NAMES = ("x", "W", "bias", "A", "R_delta", "B")
SUBSETS = [subset for k in range(1, 7) for subset in combinations(NAMES, k)]
ORDERS = ("rows", "left", "right", "merged")
SIZES = [(2, 4, 5, 2), (7, 3, 4, 2), (6, 7, 3, 3), (0, 3, 4, 2), (40, 33, 17, 5)]


def masters(sizes: tuple[int, int, int, int], dtype: str, seed: int, lead: tuple[int, ...] = ()) -> dict[str, Any]:
    """Arrays of one layer, W (out, in), and the upstream gradient g."""
    n, d_out, d_in, r = sizes
    rng = np.random.default_rng(seed)
    shapes = {"x": (*lead, n, d_in), "W": (d_out, d_in), "bias": (d_out,), "A": (d_out, r), "R_old": (r, r)}
    shapes |= {"R_delta": (r, r), "B": (r, d_in), "g": (*lead, n, d_out)}
    return {k: rng.standard_normal(s).astype(dtype) for k, s in shapes.items()}


def call(arrays: dict[str, Any], layout: str = "out,in", **how: Any) -> Any:
    """The layer of these arrays, W turned as the layout wants it."""
    adapter = core.Adapter(*(arrays[k] for k in core.Adapter._fields))
    W = arrays["W"].T if layout == "in,out" else arrays["W"]
    return clora.linear(arrays["x"], W, adapter, arrays["bias"], layout=layout, **how)


def two_routes(arrays: dict[str, Any], stop_old: bool) -> Any:
    """x W^T + b + sg(A R_old B) x + A R_delta B x, by plain operations."""
    A, R_old, R_delta, B = (arrays[k] for k in core.Adapter._fields)
    x, stop = arrays["x"], jax.lax.stop_gradient if stop_old else (lambda a: a)
    return x @ arrays["W"].T + arrays["bias"] + x @ stop(B).T @ stop(R_old).T @ stop(A).T + x @ B.T @ R_delta.T @ A.T


def exact(m: dict[str, Any], names: tuple[str, ...], stop_old: bool) -> tuple[Any, Any, Any, Any]:
    """y and gradients in float64 from the core, and bounds on the error of the arrays' dtype."""
    rows = {k: m[k].reshape(-1, m[k].shape[-1]) for k in ("x", "g")}
    wide = {k: a.astype(np.float64) for k, a in {**m, **rows}.items()}
    narrow, adapter = (core.Adapter(*(a[k] for k in core.Adapter._fields)) for a in (m, wide))
    grads = core.linear_vjp(wide["x"], wide["W"], adapter, wide["g"], wrt=names, stop_old=stop_old)
    limits = core.bounds.linear_vjp(rows["x"], m["W"], narrow, rows["g"], wrt=names, stop_old=stop_old)
    y = core.linear(wide["x"], wide["W"], adapter, wide["bias"])
    return y, core.bounds.linear(rows["x"], m["W"], narrow, m["bias"]), grads, limits


def within(got: Any, want: Any, limit: Any) -> None:
    """|got - want| <= limit, which is twice the bound of one evaluation: the float64 reference has its own."""
    error = np.abs(np.asarray(got, np.float64).reshape(want.shape) - want)
    assert np.all(np.isfinite(np.asarray(got)))
    assert np.all(error <= 2 * np.asarray(limit, np.float64)), float(np.max(error / np.maximum(limit, 1e-300)))


@settings(max_examples=kit.examples(60))
@given(
    sizes=st.sampled_from(SIZES),
    lead=st.sampled_from([(), (3,)]),
    dtype=st.sampled_from(["float32", "float64"]),
    names=st.sampled_from(SUBSETS),
    order=st.sampled_from([None, *ORDERS]),
    layout=st.sampled_from(["in,out", "out,in"]),
    stop_old=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_value_and_gradients(
    sizes: Any, lead: Any, dtype: str, names: Any, order: str | None, layout: str, stop_old: bool, seed: int
) -> None:
    """Against the core in float64, for every order, layout, subset of what learns, in 32 and 64 bits, jitted or not."""
    m = masters(sizes, dtype, seed, lead)
    want_y, limit_y, want, limits = exact(m, names, stop_old)
    with jax.enable_x64(dtype == "float64"):
        arrays = {k: jnp.asarray(a) for k, a in m.items()}
        rest = {k: a for k, a in arrays.items() if k not in names}

        def value(learning: Any) -> Any:
            return call({**rest, **learning}, layout, stop_old=stop_old, order=order)

        y, back = jax.vjp(jax.jit(value) if seed % 2 else value, {k: arrays[k] for k in names})
        assert y.dtype == dtype
        within(y, want_y, limit_y)
        (grads,) = back(arrays["g"])
        for name in names:
            assert grads[name].dtype == dtype
            within(grads[name], getattr(want, name), getattr(limits, name))
        plain = call(arrays, layout, stop_old=stop_old, order=order)
        assert seed % 2 or np.array_equal(plain, y), "what learns changed the value"


@pytest.mark.parametrize("stop_old", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_forward_mode_is_the_transpose_of_reverse_mode(order: str, stop_old: bool) -> None:
    """<g, J t> = <J^T g, t> on dyadic numbers, every bit; and J^T is that of the two routes."""
    m = {k: np.round(2 * a) / 2 for k, a in masters((3, 2, 3, 2), "float32", 1).items()}
    arrays = {k: jnp.asarray(a) for k, a in m.items()}
    tangents = {k: jnp.round(a[::-1]) for k, a in arrays.items()}
    g, fixed = arrays["g"], {"R_old": arrays["R_old"]}
    learn = {k: arrays[k] for k in NAMES}
    _, out = jax.jvp(
        lambda a: call({**fixed, **a}, order=order, stop_old=stop_old), (learn,), ({k: tangents[k] for k in NAMES},)
    )
    _, back = jax.vjp(lambda a: call({**fixed, **a}, order=order, stop_old=stop_old), learn)
    _, want = jax.vjp(lambda a: two_routes({**fixed, **a}, stop_old), learn)
    assert float(jnp.sum(g * out)) == sum(float(jnp.sum(back(g)[0][k] * tangents[k])) for k in NAMES)
    for name in NAMES:
        assert np.array_equal(back(g)[0][name], want(g)[0][name]), name


@pytest.mark.parametrize("order", ORDERS)
def test_second_order_without_the_stop(order: str) -> None:
    """Hessians equal those of the plain formula, on dyadic numbers."""
    arrays = {k: jnp.round(2 * jnp.asarray(a)) / 2 for k, a in masters((3, 2, 3, 2), "float32", 1).items()}
    learn = {k: arrays[k] for k in ("x", "A", "R_delta", "B")}

    def loss(y: Any) -> Any:
        return jnp.sum(y * y * arrays["g"])

    got = jax.hessian(lambda a: loss(call({**arrays, **a}, order=order, stop_old=False)))(learn)
    want = jax.hessian(lambda a: loss(two_routes({**arrays, **a}, False)))(learn)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("order", ORDERS)
def test_second_order_with_the_stop(order: str) -> None:
    """Those by x and R_delta are those of two routes; those by A and B raise, and exist where asked for."""
    arrays = {k: jnp.round(2 * jnp.asarray(a)) / 2 for k, a in masters((3, 2, 3, 2), "float32", 1).items()}

    def loss(y: Any) -> Any:
        return jnp.sum(y * y * arrays["g"])

    def hessians(names: Any, **how: Any) -> Any:
        learn = {k: arrays[k] for k in names}
        got = jax.hessian(lambda a: loss(call({**arrays, **a}, order=order, **how)))(learn)
        return got, jax.hessian(lambda a: loss(two_routes({**arrays, **a}, True)))(learn)

    for names, how in [(("x", "R_delta"), {}), (("x", "A", "R_delta", "B"), {"second_order": True})]:
        for a, b in zip(*map(jax.tree.leaves, hessians(names, **how)), strict=True):
            assert np.array_equal(a, b)
    with pytest.raises(StateError, match=r"second derivatives by A or B.*second_order=True"):
        hessians(("x", "A", "B"))


def test_under_vmap_scan_checkpoint_and_a_loop_of_gradients() -> None:
    """Stacked layers by hand, by lax.scan, rematerialised; a batch by vmap: the same within bounds."""
    layers = [masters((4, 5, 5, 2), "float32", s) for s in range(3)]
    stack = {k: jnp.stack([jnp.asarray(m[k]) for m in layers]) for k in ("W", "bias", *core.Adapter._fields)}
    x, g = jnp.asarray(layers[0]["x"]), jnp.asarray(layers[0]["g"])

    def hand(stack: Any, x: Any) -> Any:
        for i in range(3):
            x = call({"x": x, **{k: a[i] for k, a in stack.items()}}, order="left") / 4
        return x

    def scanned(stack: Any, x: Any, wrap: Any = lambda f: f) -> Any:
        body = wrap(lambda x, layer: (call({"x": x, **layer}, order="left") / 4, None))
        return jax.lax.scan(body, x, stack)[0]

    ways = [
        hand,
        scanned,
        lambda s, x: scanned(s, x, jax.checkpoint),
        lambda s, x: jax.vmap(lambda row: hand(s, row))(x),
    ]
    results = [jax.jit(lambda s, x, way=way: jax.vjp(way, s, x)[1](g))(stack, x) for way in ways]
    sizes = jax.vjp(hand, jax.tree.map(jnp.abs, stack), jnp.abs(x))[1](jnp.abs(g))
    for other in results[1:]:
        for name in ("A", "R_delta", "B", "W"):
            # Sums of products through three layers, each of at most 60 roundings.
            limit = 2 * kit.gamma(180, "float32") * 1.0
            error = np.abs(np.asarray(other[0][name] - results[0][0][name], np.float64))
            assert np.all(error <= float(limit) * np.asarray(sizes[0][name], np.float64)), name


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_half_precision_base(half: str) -> None:
    """y is x W^T and the update of the same x, each rounded once; gradients of the adapter are float32."""
    m = masters((6, 5, 4, 2), "float32", 3)
    arrays = {k: jnp.asarray(a).astype(half) if k in ("x", "W", "bias") else jnp.asarray(a) for k, a in m.items()}
    y, back = jax.vjp(lambda a: call({**arrays, **a}), {k: arrays[k] for k in ("x", "A", "R_delta", "B")})
    assert y.dtype == half
    wide = {k: np.asarray(a.astype(jnp.float32), np.float64) for k, a in arrays.items()}
    adapter = core.Adapter(*(wide[k] for k in core.Adapter._fields))
    base, path = wide["x"] @ wide["W"].T, core.apply(wide["x"], adapter)
    size = np.abs(wide["x"]) @ np.abs(wide["W"]).T + core.bounds.apply(wide["x"], adapter) * 2.0**53
    u = core.bounds.unit_roundoff(half)
    # Three roundings to half (the product, the update's sum, the bias), the float32 arithmetic inside.
    limit = 4 * u * (size + np.abs(path) + np.abs(wide["bias"])) + core.bounds.apply(
        m["x"], core.Adapter(*(m[k] for k in core.Adapter._fields))
    )
    assert np.all(np.abs(np.asarray(y.astype(jnp.float32), np.float64) - base - path - wide["bias"]) <= limit)
    (grads,) = back(jnp.ones_like(y))
    assert grads["x"].dtype == half
    assert {grads[k].dtype.name for k in ("A", "R_delta", "B")} == {"float32"}
    text = str(jax.make_jaxpr(lambda a: call(a))(arrays))
    assert "f32[5,4]" not in text, "a product of the weight's size in half precision"


def test_rows_of_several_tasks() -> None:
    """A routing for each row: each row as alone."""
    m = masters((6, 5, 4, 2), "float32", 4)
    arrays = {k: jnp.asarray(a) for k, a in m.items()}
    R = jnp.asarray(np.random.default_rng(5).standard_normal((6, 2, 2)), jnp.float32)
    for stop_old in (False, True):
        together = call({**arrays, "R_old": R}, stop_old=stop_old)
        for i in range(6):
            alone = {**m, "x": m["x"][i : i + 1], "R_old": np.asarray(R[i])}
            want, limit, _, _ = exact(alone | {"g": m["g"][:1]}, ("x",), True)
            within(together[i : i + 1], want, limit)


def test_apply_and_delta_are_those_of_the_core() -> None:
    """Values within bounds, gradients those of the two routes on dyadic numbers."""
    m = {k: np.round(2 * a) / 2 for k, a in masters((3, 4, 5, 2), "float32", 6).items()}
    arrays = {k: jnp.asarray(a) for k, a in m.items()}
    adapter = core.Adapter(*(arrays[k] for k in core.Adapter._fields))
    nothing = {**arrays, "W": 0 * arrays["W"], "bias": 0 * arrays["bias"]}
    for stop_old in (False, True):
        for got in (
            lambda a, s=stop_old: clora.apply(arrays["x"], a, stop_old=s),
            lambda a, s=stop_old: arrays["x"] @ clora.delta(a, stop_old=s).T,
            lambda a, s=stop_old: arrays["x"] @ clora.delta(a, layout="in,out", stop_old=s),
        ):
            y, back = jax.vjp(got, adapter)
            want, want_back = jax.vjp(lambda a, s=stop_old: two_routes({**nothing, **a._asdict()}, s), adapter)
            assert np.array_equal(y, want)
            for name in ("A", "R_delta", "B"):
                assert np.array_equal(getattr(back(arrays["g"])[0], name), getattr(want_back(arrays["g"])[0], name)), (
                    name
                )


SHAPES = [
    (512, 768, 768, 16),
    (4096, 768, 768, 16),
    (2048, 768, 3072, 16),
    (2048, 2048, 2048, 64),
    (128, 2048, 2048, 16),
]


@pytest.mark.parametrize(("n", "d_in", "d_out", "r"), SHAPES)
@pytest.mark.parametrize("wrt", [("x", "A", "R_delta", "B"), ("x", "R_delta")])
def test_the_compiler_counts_the_planners_flops(n: int, d_in: int, d_out: int, r: int, wrt: Any) -> None:
    """Flops of a compiled step above the frozen layer's: within 5 % of the plan; no d x d product unless merged."""
    shapes = {"x": (n, d_in), "A": (d_out, r), "R_old": (r, r), "R_delta": (r, r), "B": (r, d_in)}
    structs = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    W, g = jax.ShapeDtypeStruct((d_in, d_out), jnp.float32), jax.ShapeDtypeStruct((n, d_out), jnp.float32)

    def step(arrays: Any, W: Any, g: Any) -> Any:
        def value(learning: Any) -> Any:
            a = {**arrays, **learning}
            return clora.linear(a["x"], W, core.Adapter(*(a[k] for k in core.Adapter._fields)), layout="in,out")

        y, back = jax.vjp(value, {k: arrays[k] for k in wrt})
        return y, back(g)

    def frozen(x: Any, W: Any, g: Any) -> Any:
        y, back = jax.vjp(lambda x: x @ W, x)
        return y, back(g)

    compiled = jax.jit(step).lower(structs, W, g).compile()
    base = jax.jit(frozen).lower(structs["x"], W, g).compile()
    ours = compiled.cost_analysis()["flops"] - base.cost_analysis()["flops"]
    order = _function.choose_order(n, d_out, d_in, r, "float32")
    plan = core.plan(n, d_out, d_in, r, wrt=wrt, order=order)
    # What XLA shares: the merged weight is built once, and kept; sums of matrices are counted by XLA alone.
    shared = [p for p in plan.backward if order == "merged" and p.label in ("R B", "A R", "A (R B)", "(A R) B")]
    want = plan.flops - sum(p.flops for p in shared)
    assert 0.95 * want <= ours <= 1.05 * want, ours / want
    if order != "merged" and n not in (d_in, d_out):
        products = re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\(", compiled.as_text())
        assert products
        assert not {(str(d_in), str(d_out)), (str(d_out), str(d_in))} & set(products)


@pytest.mark.parametrize(
    ("sizes", "float32", "bfloat16"),
    [
        ((1, 768, 768, 16), "rows", "rows"),  # one row: folding R would cost as much as the layer
        ((128, 2048, 2048, 16), "left", "left"),
        ((512, 768, 768, 16), "merged", "left"),
        ((4096, 768, 768, 16), "merged", "left"),
    ],
)
def test_the_order_of_contraction(sizes: Any, float32: str, bfloat16: str) -> None:
    """What was measured to be fastest in float32; never merged where the update would be rounded away."""
    assert _function.choose_order(*sizes, "float32") == float32
    assert _function.choose_order(*sizes, "bfloat16") == bfloat16


BAD = [
    ({"x": (3, 6)}, ShapeError, "x (3, 6)"),
    ({"W": (5, 4)}, ShapeError, "other layout"),
    ({"A": (3, 2)}, ShapeError, "A (3, 2)"),
    ({"R_delta": (3, 3)}, ShapeError, "R_delta (3, 3)"),
    ({"R_old": (7, 2, 2)}, ShapeError, "R_old (7, 2, 2)"),
    ({"bias": (5,)}, ShapeError, "bias (5,)"),
    ({"x": ()}, ShapeError, "x ()"),
]


@pytest.mark.parametrize(("changes", "error", "match"), BAD)
def test_shapes_that_do_not_fit_are_refused_while_tracing(changes: Any, error: Any, match: str) -> None:
    arrays = {k: jnp.asarray(a) for k, a in masters((3, 4, 5, 2), "float32", 7).items()}
    arrays |= {k: jnp.zeros(s) for k, s in changes.items()}
    with pytest.raises(error, match=re.escape(match)):
        jax.jit(call)(arrays)


def test_other_bad_input() -> None:
    arrays = {k: jnp.asarray(a) for k, a in masters((3, 4, 5, 2), "float32", 8).items()}
    with pytest.raises(DTypeError, match=r"float16.*cast the base alone"):
        call({**arrays, "B": arrays["B"].astype("float16")})
    with pytest.raises(OptionError, match=r"'out,in' or 'in,out'"):
        call(arrays, layout="io")
    with pytest.raises(OptionError, match="order"):
        call(arrays, order="middle")
