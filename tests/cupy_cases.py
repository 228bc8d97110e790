"""The same small network, data and life for clora_cupy and clora_numpy; drawn in NumPy, put where a test wants them."""

import numpy as np

import clora_core as core
from clora_core import bounds

RULES = {
    "sgd": lambda clora: clora.sgd(1e-2),
    "momentum": lambda clora: clora.sgd(1e-2, momentum=0.9, weight_decay=1e-2),
    "adam": lambda clora: clora.adam(1e-2, weight_decay=1e-2),
    "adamw": lambda clora: clora.adamw(1e-2, weight_decay=0.1),
}


def same(array):
    """For NumPy there is nothing to put."""
    return array


def make(clora, put=same, *, rank=4, dtype=np.float32, seed=0, **options):
    """Two adapted layers and a head; put() makes an array of the library."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: put((rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(dtype))  # noqa: E731
    modules = {
        "one": clora.Layer(draw(10, 12), draw(10)),
        "relu": clora.Relu(),
        "two": clora.Layer(draw(8, 10)),
        "relu-2": clora.Relu(),
        "head": clora.Head(draw(3, 8), draw(3)),
    }
    return clora.attach(clora.Network(modules), rank=rank, rng=seed, **options)


def data(t, n=32, dtype=np.float32):
    """Inputs that differ from task to task, and labels that depend on them."""
    rng = np.random.default_rng(100 + t)
    x = rng.standard_normal((n, 12)).astype(dtype)
    x[:, t] *= 3
    return x, np.argmax(x[:, [t, (t + 1) % 12, (t + 5) % 12]], axis=1)


def step(clora, adapter, optimizer, x, y, **penalty):
    """One step of training; nothing in it may wait for a device."""
    loss, grad = clora.cross_entropy(adapter.network.forward(x), y, smoothing=0.1)
    adapter.network.backward(grad)
    extra = adapter.penalty(**penalty) if penalty else loss
    optimizer.step()
    return loss, extra


def live(clora, adapter, optimizer, put=same, tasks=2, steps=4, dtype=np.float32, **penalty):
    """Tasks one after another, each observed."""
    for t in range(tasks):
        x, y = map(put, data(t, dtype=dtype))
        with adapter.task(f"t{t}"):
            for _ in range(steps):
                step(clora, adapter, optimizer, x, y, **penalty)
            if adapter.factors != "every-task":
                adapter.observe([(x[:20, :], y[:20]), (x[20:, :], y[20:])])


def second_task(clora, put, rule, factors, penalty):
    """An adapter that is about to begin its second task, where all that can be at work is; its optimizer, and data."""
    adapter = make(clora, put, factors=factors)
    optimizer = clora.Optimizer(adapter, RULES[rule](clora))
    if factors != "every-task":
        adapter.protect(optimizer, energy=0.7)
    live(clora, adapter, optimizer, put, tasks=1, **penalty)
    return adapter, optimizer, *map(put, data(1))


def everything(adapter, get=same):
    """All arrays of an adapter: name -> NumPy."""
    out = {}
    for name, layer in adapter.layers.items():
        arrays = {**layer.adapter._asdict(), **adapter.moments(name)._asdict()}
        out |= {f"{name}.{field}": get(array) for field, array in arrays.items() if array is not None}
    return out


def equal(mine, theirs):
    """Every array of `everything` has the same dtype and bits."""
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        assert array.dtype == theirs[name].dtype, name
        assert np.array_equal(array, theirs[name]), name


def check_modules(clora, adapter, get, grad):
    """Each module's last pass against clora_numpy on the same inputs and the same gradient of its output, in bounds.

    Returns how many arrays were compared. Both sides round, so each may be off by one bound.
    """
    compared = 0
    for name, module in adapter.network.modules.items():
        if not isinstance(module, clora.Layer):
            continue
        x, W, bias = get(module.input), get(module.W), None if module.bias is None else get(module.bias)
        arrays = core.Adapter(*map(get, module.adapter))
        within(get(module.forward(module.input)), core.linear(x, W, arrays, bias), bounds.linear(x, W, arrays, bias))
        module.gradients = {}
        g = grad[name]
        dx = get(module.backward(g))
        wrt = ("x", *module.trained)
        exact = core.linear_vjp(x, W, arrays, get(g), wrt=wrt)
        limit = bounds.linear_vjp(x, W, arrays, get(g), wrt=wrt)
        within(dx, exact.x, limit.x)
        for field in module.trained:
            within(get(module.gradients[field]), getattr(exact, field), getattr(limit, field))
        compared += 2 + len(module.trained)
    return compared


def within(got, other, bound):
    """Two roundings of one exact value: each within the bound, so no further apart than twice that."""
    assert got.shape == other.shape
    assert np.isfinite(got).all()
    assert (np.abs(got.astype(np.float64) - other) <= 2 * np.asarray(bound, np.float64)).all()
