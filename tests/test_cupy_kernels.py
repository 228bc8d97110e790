"""Fused kernels against the formulas beside them, and half precision at the border, on a stand-in for CuPy."""

import cupy_cases as cases
import cupy_double as double
import numpy as np
import pytest

import clora_core as core
import clora_numpy
from clora_core import bounds
from clora_core.errors import DTypeError
from clora_numpy.optimizers import AdamNumbers, adam_arrays

SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 2.0**-140, -(2.0**-20)]


@pytest.fixture(autouse=True)
def cupy():
    with double.installed() as module, module.cuda.Device(1):
        yield module


@pytest.fixture
def clora(cupy):
    import clora_cupy

    return clora_cupy


@pytest.fixture
def kernels(cupy):
    from clora_cupy import _kernels

    return _kernels


def bits(array):
    return array.get().tobytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_relu_is_its_formula(kernels, cupy, dtype):
    with np.errstate(over="ignore"):
        x, g = cupy.asarray(np.array(SPECIAL, dtype)), cupy.asarray(np.array(SPECIAL[::-1], dtype))
    assert bits(kernels.relu(x)) == bits(cupy.where(x > 0, x, cupy.zeros_like(x)))
    assert bits(kernels.relu_backward(x, g)) == bits(cupy.where(x > 0, g, cupy.zeros_like(g)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("decay", ["none", "L2", "decoupled"])
def test_adam_is_its_formula(kernels, cupy, dtype, decay):
    rng = np.random.default_rng(0)
    p, g, m = (cupy.asarray(rng.standard_normal((5, 4)).astype(dtype)) for _ in range(3))
    v = cupy.asarray((rng.standard_normal((5, 4)) ** 2).astype(dtype))
    more = {"none": (0.0, 1.0), "L2": (0.25, 1.0), "decoupled": (0.0, 0.75)}[decay]
    numbers = AdamNumbers(0.9, 0.999, *more, rate=0.02, scale=0.3, eps=1e-8)
    for mine, formula in zip(kernels.adam(p, g, m, v, numbers), adam_arrays(p, g, m, v, numbers), strict=True):
        assert mine.dtype == dtype
        assert bits(mine) == bits(formula)


def test_adam_writes_into_nothing_and_is_one_kernel(clora, cupy):
    for rule in (clora.adam(0.1), clora.adamw(0.1)):
        value, gradient = cupy.asarray(np.ones(3, np.float32)), cupy.asarray(np.full(3, 0.5, np.float32))
        state = rule.init(value)
        double.reset()
        moved, after = rule.update(value, gradient, state)
        assert sum(double.WORK.values()) == 1
        assert (value.get() == 1).all()
        assert (state.mean.get() == 0).all()
        assert (moved.get() < 1).all()
        assert after.step == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_accumulate_is_its_formula(kernels, cupy, dtype):
    rng = np.random.default_rng(0)
    draw = lambda *shape: cupy.asarray((rng.integers(-8, 9, shape) / 4).astype(dtype))  # noqa: E731
    for n in (0, 1, 7):
        y, a, b = draw(n, 5), draw(n, 3), draw(5, 3)
        formula = bits(y + a @ b.T)
        assert kernels.accumulate(y, a, b.T) is y
        assert bits(y) == formula


def test_narrow_rounds_once(kernels, cupy):
    """Sums that lie between two numbers of float16: rounding bias and update apart would give others."""
    y, u, b = (np.array(v) for v in ([1.0, 1.0, 2048.0], [0.75 * 2.0**-11, -(2.0**-13), 0.75], [2.0**-12, 0, 0.75]))
    mine = kernels.narrow(*(cupy.asarray(v.astype(t)) for v, t in ((y, "f2"), (u, "f4"), (b, "f2"))))
    assert mine.dtype == np.float16
    assert (mine.get() == (y + u + b).astype(np.float32).astype(np.float16)).all()
    assert (mine.get() != ((y + u).astype(np.float16) + b).astype(np.float16)).any(), "numbers that tell the two apart"
    without = kernels.narrow(cupy.asarray(y.astype("f2")), cupy.asarray(u.astype("f4")))
    assert (without.get() == (y + u).astype(np.float32).astype(np.float16)).all()


# --- half precision --------------------------------------------------------------------------------------------


def dyadic(seed, *shape, dtype=np.float16):
    return (np.random.default_rng(seed).integers(-4, 5, shape) / 2).astype(dtype)


def test_half_weights_have_a_float32_adapter(clora, cupy):
    """Small dyadic numbers: float16, float32 and float64 all hold every value, so all are equal."""
    W, b, x, g = dyadic(0, 5, 6), dyadic(1, 5), dyadic(2, 4, 6), dyadic(3, 4, 5)
    layer = clora.Layer(cupy.asarray(W), cupy.asarray(b))
    clora.attach([layer], rank=2, rng=0, factors="every-task")
    assert all(array.dtype == np.float32 for array in layer.adapter)
    shapes = ((5, 2), (2, 2), (2, 2), (2, 6))
    arrays = core.Adapter(*(dyadic(4 + i, *shape, dtype=np.float32) for i, shape in enumerate(shapes)))
    layer.adapter = core.Adapter(*map(cupy.asarray, arrays))
    y = layer.forward(cupy.asarray(x))
    assert y.dtype == np.float16
    wide = core.Adapter(*(array.astype(np.float64) for array in arrays))
    exact = core.linear(x.astype(np.float64), W.astype(np.float64), wide, b.astype(np.float64))
    assert np.array_equal(y.get(), exact.astype(np.float16))
    dx = layer.backward(cupy.asarray(g))
    out = core.linear_vjp(x.astype(np.float64), W.astype(np.float64), wide, g.astype(np.float64))
    assert dx.dtype == np.float16
    assert np.array_equal(dx.get(), out.x.astype(np.float16))
    for name in ("A", "R_delta", "B"):
        assert layer.gradients[name].dtype == np.float32
        assert np.array_equal(layer.gradients[name].get(), getattr(out, name))


def test_an_update_below_half_precision_counts(clora, cupy):
    """1 + 2^-11 + 2^-23 is above the middle of two numbers of float16; the update rounded before is in the middle."""
    layer = clora.Layer(cupy.asarray(np.eye(4, dtype=np.float16)))
    eye = np.eye(4, dtype=np.float32)
    layer.adapter = core.Adapter(*map(cupy.asarray, (eye, 0 * eye, np.float32(2.0**-11 + 2.0**-23) * eye, eye)))
    x = np.ones((1, 4), np.float16)
    assert np.array_equal(layer.forward(cupy.asarray(x)).get(), np.full((1, 4), np.float16(1 + 2.0**-10)))
    layer.adapter = core.Adapter(*map(cupy.asarray, (eye, 0 * eye, 2.0**-20 * eye, 2.0**10 * eye)))
    layer.trained = ("R_delta",)
    layer.backward(cupy.asarray(np.full((1, 4), 2.0**-20, np.float16)))
    assert (layer.gradients["R_delta"].get() == 2.0**-10).all()


def test_a_life_in_half_precision(clora, cupy, tmp_path):
    adapter = cases.make(clora, cupy.asarray, dtype=np.float16)
    twin = cases.make(clora_numpy, lambda array: array.astype(np.float32), dtype=np.float16)
    for mine, theirs in zip(adapter.layers.values(), twin.layers.values(), strict=True):
        for a, b in zip(mine.adapter, theirs.adapter, strict=True):
            assert a is None or np.array_equal(a.get(), b)
    optimizer = clora.Optimizer(adapter, clora.adam(1e-2))
    adapter.protect(optimizer, energy=0.7)
    x, y = map(cupy.asarray, cases.data(0, dtype=np.float16))
    first = float(clora.cross_entropy(adapter.network.forward(x), y)[0])
    cases.live(clora, adapter, optimizer, cupy.asarray, dtype=np.float16, steps=15, weight=0.1)
    adapter.restore("t0")
    logits = adapter.network.forward(x)
    assert logits.dtype == np.float32
    assert float(clora.cross_entropy(logits, y)[0]) < first
    adapter.restore("t1")
    assert all(array.dtype == np.float64 for name in adapter.layers for array in adapter.moments(name))
    layer = adapter.layers["one"]
    pristine, before = bits(layer.W), bits(layer.forward(x))
    wide, arrays = layer.W.get().astype(np.float32), core.Adapter(*(a.get() for a in layer.adapter))
    report = adapter.merge()
    merged = layer.W.get()
    assert merged.dtype == np.float16
    assert np.array_equal(merged, core.merge(wide, arrays, dtype=np.float16).weight)
    assert (np.abs(merged - (wide + core.delta(arrays))) <= 2 * bounds.merge(wide, arrays, dtype=np.float16)).all()
    assert float(report["one"].kept) > 0
    adapter.unmerge()
    assert bits(layer.W) == pristine
    assert bits(layer.forward(x)) == before
    adapter.save(tmp_path / "half")
    modules = cases.make(clora, cupy.asarray, dtype=np.float16).network.modules
    for name in ("one", "two"):
        modules[name].adapter = None
    loaded = clora.load(modules, tmp_path / "half")
    cases.equal(cases.everything(loaded, lambda a: a.get()), cases.everything(adapter, lambda a: a.get()))
    assert np.array_equal(loaded.network.forward(x).get(), adapter.network.forward(x).get())


def test_dtypes_that_do_not_fit_are_told(clora, cupy):
    half, single = cupy.asarray(np.ones((4, 4), np.float16)), cupy.asarray(np.ones((4, 4), np.float32))
    whole = cupy.asarray(np.ones((4, 4), np.int64))
    import ml_dtypes

    brain = cupy.asarray(np.ones((4, 4), ml_dtypes.bfloat16))
    calls = {
        "bfloat16": lambda: clora.Layer(brain),
        "int64": lambda: clora.Head(whole),
        "float32": lambda: clora.Layer(half).forward(single),
        "float16, as the weight": lambda: clora.Layer(half, single[0]),
        "float32, as the weight": lambda: clora.Head(single).forward(cupy.asarray(np.ones((2, 4)))),
    }
    for words, call in calls.items():
        with pytest.raises(DTypeError, match=words) as caught:
            call()
        for part in ("Got ", "needed ", "Usual cause: ", "Fix: "):
            assert part in str(caught.value)
