"""The life of a task in clora_jax: what stays to the bit, what is remembered, what learns, and what is refused."""

from typing import Any

import kit
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clora_core as core
import clora_store as store
from clora_core.errors import (
    DTypeError,
    InvalidValueError,
    MomentsIncomplete,
    OptionError,
    RankError,
    ShapeError,
    StateError,
)

if kit.jax is None:
    pytest.skip(kit.NO_JAX, allow_module_level=True)
import jax
import jax.numpy as jnp
import optax
from jax_cases import Run, attach, data, forward, model, params

import clora_jax as clora

ADAM = optax.adamw(1e-2, weight_decay=0.1)


def wide(tree: Any) -> Any:
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def lived(count: int = 3, tx: Any = None, **options: Any) -> Any:
    base = params()
    adapters, history = attach(base, **options), clora.History()
    run = Run(tx or clora.learning(ADAM))
    for task in range(count):
        adapters, history = run.learn(adapters, base, history, task)
    return base, adapters, history


def routed_inputs(adapters: Any, base: Any, batch: Any) -> dict[str, Any]:
    """u of every layer by hand, in float64, and the same of absolute values: their sizes."""
    out, sizes = {}, {}
    x = size = np.asarray(batch[0], np.float64)
    size = abs(size)
    for i, layer in enumerate(base["encoder"]):
        a = adapters[f"encoder.{i}"]
        whole = core.Adapter(*(np.asarray(v, np.float64) for v in a.whole()))
        out[f"encoder.{i}"], sizes[f"encoder.{i}"] = x @ whole.B.T, size @ abs(whole.B).T
        W, b = (np.asarray(layer[k], np.float64) for k in ("kernel", "bias"))
        size = size @ (abs(W.T) + core.delta(core.Adapter(*map(abs, whole)))).T + abs(b)
        x = np.maximum(core.linear(x, W.T, whole, b), 0)
    one = np.ones((len(x), 1))
    return {**out, "head": np.hstack([x, one])}, {**sizes, "head": np.hstack([size, one])}


@pytest.mark.parametrize("factors", ["first-task", "every-task", "never"])
@pytest.mark.parametrize("scheme", ["orthonormal", "svd", "lora"])
def test_attach_and_the_boundary_change_no_bit(factors: str, scheme: str) -> None:
    base = params()
    if factors == "never" and scheme == "lora":
        return
    adapters = attach(base, factors=factors, scheme=scheme, max_rank=10)
    x = data(0)[0]
    jitted = jax.jit(forward)
    if scheme == "lora":
        assert all(np.array_equal(layer.adapter.R_delta, np.eye(8)) for n, layer in adapters.items() if n != "head")
        begun = clora.begin_task(adapters)["encoder.0"].adapter
        assert np.array_equal(begun.R_delta, np.eye(8)), "the start must stay learnable"
    within(jitted(adapters, base, x), model(base, x[0]), adapters, base, x)
    run, history = Run(clora.learning(ADAM)), None
    for task in range(2):
        begun = clora.begin_task(adapters)
        assert np.array_equal(jitted(begun, base, x), jitted(adapters, base, x))
        state = run.tx.init(begun)
        trained, _ = run.step(begun, state, base, x)
        adapters, history = clora.end_task(trained, history=history)
        assert np.array_equal(jitted(adapters, base, x), jitted(trained, base, x)), task
        assert not any(np.any(layer.adapter.R_delta) for layer in clora.layers(adapters).values())


def within(got: Any, want: Any, adapters: Any, base: Any, batch: Any) -> None:
    """Of outputs: float32 rounding through three layers, of at most 100 roundings each, of sums of absolute values."""
    _, sizes = routed_inputs(adapters, base, batch)
    last = sizes["head"] @ abs(np.asarray(core.routing(adapters["head"].adapter, xp=jnp), np.float64)).T
    limit = 2 * float(kit.gamma(300, "float32")) * last
    assert np.all(np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64)) <= limit)


@pytest.mark.parametrize("factors", ["first-task", "never", "every-task"])
def test_exactly_what_learns_is_changed(factors: str) -> None:
    """AdamW with weight decay: bits of everything else stay, the base and the memory included."""
    base = params()
    adapters, history, run = attach(base, factors=factors, max_rank=9), None, Run(clora.learning(ADAM))
    for task in range(2):
        after, history = run.learn(adapters, base, history, task, observe=factors != "every-task")
        moving = factors == "every-task" or (factors == "first-task" and task == 0)
        for name, layer in adapters.items():
            for field in ("A", "B"):
                before, now = getattr(layer.adapter, field), getattr(after[name].adapter, field)
                assert before is None or np.array_equal(before, now) != moving, (name, field)
            assert not np.array_equal(layer.adapter.R_old, after[name].adapter.R_old)
            if layer.spare is not None:
                assert all(np.array_equal(a, b) for a, b in zip(layer.spare, after[name].spare, strict=True))
        adapters = after
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(params()), strict=True))


def test_plain_lora_is_a_setting() -> None:
    base = params()
    lora = {"factors": "every-task", "scheme": "lora", "stop_old": False, "train_routing": False}
    adapters, run, history = attach(base, heads=(), **lora), Run(clora.learning(optax.sgd(1e-2))), None
    for task in range(2):
        adapters, history = run.learn(adapters, base, history, task, observe=False)
        for layer in adapters.values():
            assert np.array_equal(core.routing(layer.adapter, xp=jnp), np.eye(8))
    assert np.any(adapters["encoder.0"].adapter.A)
    # A and B learn through the whole R: none of their gradient is zero, though R_delta is.
    grads = jax.grad(lambda a: jnp.sum(forward(a, base, data(0)[0]) ** 2))(adapters)
    assert all(np.any(g.adapter.A) and np.any(g.adapter.B) and not np.any(g.adapter.R_delta) for g in grads.values())


@settings(max_examples=kit.examples(12))
@given(seed=st.integers(0, 2**32 - 1), x64=st.booleans())
def test_observed_moments_are_those_of_the_inputs(seed: int, x64: bool) -> None:
    """Mean of u u^T over all batches, of every layer, spare directions and the head's constant included."""
    with jax.enable_x64(x64):
        base = params(seed % 7)
        adapters = attach(base, max_rank=11, seed=seed)
        batches = data(seed % 5, batches=3, rows=7)
        got = clora.observe(forward, adapters, base, batches)
        rows = [routed_inputs(adapters, base, batch) for batch in batches]
        for name, C in got.items():
            assert C.dtype == (np.float64 if x64 else np.float32)
            u, size = (np.concatenate([r[i][name] for r in rows]) for i in (0, 1))
            limit = 2 * float(kit.gamma(400, "float32")) * (size.T @ size) / len(u)
            assert np.all(np.abs(np.asarray(C, np.float64) - u.T @ u / len(u)) <= limit)
            assert np.array_equal(C, C.T)


def test_moments_through_scan_vmap_and_checkpoint() -> None:
    """Layers inside of transformations are observed like others: stacked ones by a leading axis of their own."""
    base = params()
    adapters = attach(base, heads=())
    batch = data(0)[0]
    want = clora.observe(forward, adapters, base, [batch])

    def by_row(adapters: Any, base: Any, batch: Any) -> Any:
        return jax.vmap(lambda x: forward(adapters, base, (x,)))(batch[0])

    def rematerialised(adapters: Any, base: Any, batch: Any) -> Any:
        return jax.checkpoint(forward)(adapters, base, batch)

    sizes = routed_inputs(adapters, base, batch)[1]
    for way in (by_row, rematerialised):
        got = clora.observe(way, adapters, base, [batch])
        for name, C in got.items():
            size = sizes[name]
            assert np.all(np.abs(C - want[name]) <= 2 * float(kit.gamma(400, "float32")) * (size.T @ size) / len(size))

    square = {"kernel": jnp.stack([base["encoder"][0]["kernel"][:16, :16]] * 3)}
    stacked = clora.attach(square, rank=3, targets=(), stacked="kernel", seed=1)

    def scanned(adapters: Any, base: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, pair: (jnp.tanh(x @ clora.bind(*pair)["kernel"]), None), x, (base, adapters))[0]

    def unrolled(adapters: Any, base: Any, x: Any) -> Any:
        inputs = []
        for i in range(3):
            inputs.append(x @ adapters["kernel"].adapter.B[i].T)
            one = jax.tree.map(lambda a, i=i: a[i], (base, adapters))
            x = jnp.tanh(x @ clora.bind(*one)["kernel"])
        return inputs

    x = batch[0][:, :16]
    sums = clora.second_moments(scanned, stacked, square, x)["kernel"]
    for i, u in enumerate(unrolled(stacked, square, x)):
        assert float(sums[1][i]) == len(x)
        limit = float(kit.gamma(300, "float32")) * (abs(u).T @ abs(u))
        # Layer i has seen i layers before it, each within the rounding of 80 terms of its own size, tanh below 1.
        assert np.all(np.abs(sums[0][i] - u.T @ u) <= limit + 2.0**-16 * len(x))


def test_padding_is_left_out() -> None:
    base = {"q": {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((5, 6)), jnp.float32)}}
    adapters = clora.attach(base, rank=2)
    x = np.random.default_rng(1).standard_normal((3, 4, 5)).astype(np.float32)
    mask = np.asarray([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])

    def run(adapters: Any, base: Any, batch: Any) -> Any:
        return batch["x"] @ clora.bind(base, adapters)["q"]["kernel"]

    def by_row(adapters: Any, base: Any, batch: Any) -> Any:
        def one(x: Any, mask: Any) -> Any:
            return run(clora.masked(adapters, mask), base, {"x": x})

        return jax.vmap(one)(batch["x"], batch["mask"])

    batch = {"x": jnp.asarray(x), "mask": jnp.asarray(mask)}
    u = np.asarray(x[mask > 0], np.float64) @ np.asarray(adapters["q"].adapter.B, np.float64).T
    for got in (
        clora.observe(run, adapters, base, [batch], mask=lambda b: b["mask"]),
        clora.observe(by_row, adapters, base, [batch]),
    ):
        assert np.all(np.abs(got["q"] - u.T @ u / 7) <= float(kit.gamma(40, "float32")) * (abs(u).T @ abs(u)))
    with pytest.raises(OptionError, match="mask fits no layer"):
        clora.observe(run, adapters, base, [batch], mask=lambda b: b["mask"][0])


def test_drift_is_the_change_on_what_was_observed() -> None:
    """With one layer, whose inputs stay, the meter is the mean squared change of outputs, summed over tasks."""
    with jax.enable_x64(True):
        W = jnp.asarray(np.random.default_rng(0).standard_normal((6, 5)))
        base = {"q": {"kernel": W}}
        adapters, history = clora.attach(base, rank=3, factors="never"), None
        rng = np.random.default_rng(1)
        seen: list[Any] = []

        def run(adapters: Any, base: Any, x: Any) -> Any:
            return x @ clora.bind(base, adapters)["q"]["kernel"]

        def moved(adapters: Any) -> Any:
            layer = adapters["q"]
            step = jnp.asarray(rng.standard_normal((3, 3)))
            return {"q": clora.Layer(layer.adapter._replace(R_delta=step), layer.moments, layer.spare, layer.info)}

        for _ in range(3):
            adapters = moved(clora.begin_task(adapters))
            x = jnp.asarray(rng.standard_normal((8, 6)))
            seen.append((x, run(adapters, base, x)))
            adapters, history = clora.end_task(adapters, clora.observe(run, adapters, base, [x]), history=history)
        now = moved(clora.begin_task(adapters))
        for since, then in (("task-ends", None), ("boundary", adapters)):
            want = 0.0
            for x, y in seen:
                before = y if then is None else run(then, base, x)
                want += float(jnp.mean(jnp.sum((run(now, base, x) - before) ** 2, axis=1)))
            size = float(core.bounds.drift(*wide((now["q"].adapter, now["q"].used())), since="task-ends")) * 2.0**10
            assert abs(clora.drift(now, since=since)["q"] - want) <= size


@pytest.mark.parametrize(
    "kind", [("drift", {}), ("drift", {"since": "task-ends"}), ("orthogonality", {"form": "output"})]
)
def test_the_penalty_is_the_meters(kind: Any) -> None:
    """Value and gradient of the core, weighted; nothing but R_delta has one; 0 in the first task."""
    name, options = kind
    _, adapters, _ = lived(2)
    adapters = jax.tree.map(lambda a: a, clora.begin_task(adapters))
    rng = np.random.default_rng(0)
    adapters = clora.map_layers(
        lambda layer: clora.Layer(
            layer.adapter._replace(R_delta=jnp.asarray(rng.standard_normal(layer.adapter.R_delta.shape), jnp.float32)),
            layer.moments,
            layer.spare,
            layer.info,
        ),
        adapters,
    )
    how = {"kind": name, "head_weight": 0.25, **options}
    value, grads = jax.jit(jax.value_and_grad(lambda a: clora.penalty(a, 0.5, **how)))(adapters)
    since = {"since": "boundary", **options} if name == "drift" else {}
    want = limit = 0.0
    for layer_name, layer in adapters.items():
        narrow = jax.tree.map(np.asarray, (layer.adapter, layer.used()))
        adapter, moments = wide(narrow)
        scale, grad = 0.25 if layer.info.kind == "head" else 0.5, grads[layer_name].adapter
        if name == "drift":
            want += scale * float(core.drift(adapter, moments, **since))
            limit += 2 * scale * float(core.bounds.drift(*narrow, **since))
            expected = scale * core.drift_vjp(adapter, moments, **since)
            error = 2 * scale * core.bounds.drift_vjp(*narrow, **since)
        elif layer.info.kind == "head":
            expected = error = np.zeros_like(adapter.R_delta)
        else:
            want += scale * float(core.orthogonality(adapter, **options))
            limit += 2 * scale * float(core.bounds.orthogonality(narrow[0], **options))
            expected = scale * core.orthogonality_vjp(adapter, **options)
            # Five products, each a sum of at most 32 terms, all of them positive here.
            positive = core.Adapter(*(abs(array) for array in adapter))
            error = 2 * float(kit.gamma(200, "float32")) * scale * core.orthogonality_vjp(positive, **options)
        assert np.all(np.abs(np.asarray(grad.R_delta, np.float64) - expected) <= error), layer_name
        for other in (grad.A, grad.R_old, grad.B):
            assert other is None or not np.any(other)
    # and the sum over layers
    assert abs(float(value) - want) <= limit + float(kit.gamma(8, "float32")) * (abs(want) + limit)
    assert float(clora.penalty(attach(params()), 1.0)) == 0.0
    basis = jax.grad(lambda a: clora.penalty(a, kind="orthogonality"))(adapters)["encoder.0"].adapter
    assert np.all(np.isfinite(basis.R_delta))
    assert np.any(basis.R_delta)
    assert not np.any(basis.R_old)


def test_the_applied_update_does_not_leak() -> None:
    """300 steps of AdamW with weight decay: what R_delta has in protected directions stays below 1e-6."""
    base, adapters, _ = lived(2)
    leaks = {}
    for name, tx in {"protected": clora.protect(ADAM, energy=0.9), "plain": clora.learning(ADAM)}.items():
        run = Run(tx)
        bases = dict(zip(adapters, clora.protect(ADAM, energy=0.9).init(adapters).bases, strict=True))
        now = clora.begin_task(adapters)
        state = tx.init(now)
        batches = data(2)
        for i in range(300):
            now, state = run.step(now, state, base, batches[i % 4])
        worst = 0.0
        for layer_name, layer in now.items():
            U, weights = (np.asarray(a, np.float64) for a in bases[layer_name])
            R = np.asarray(layer.adapter.R_delta, np.float64)
            assert 0 < weights.sum() < len(weights)
            assert np.linalg.norm(R) > 0.01
            worst = max(worst, np.linalg.norm((R @ U) * weights) / np.linalg.norm(R))
        leaks[name] = worst
    assert leaks["protected"] < 1e-6, leaks
    assert leaks["plain"] > 0.1, leaks
    assert clora.full(clora.protect(ADAM, energy=1.0).init(adapters), adapters)[:2] == ["encoder.0", "encoder.1"]
    assert clora.full(clora.protect(ADAM, energy=0.5).init(adapters), adapters) == []
    bases = clora.protect(ADAM, energy=0.2, head_energy=0.999).init(adapters).bases
    counts = dict(zip(adapters, (int(basis.weights.sum()) for basis in bases), strict=True))
    assert counts["head"] > 5 > counts["encoder.0"]


@pytest.mark.parametrize("factors", ["first-task", "never"])
def test_nothing_is_traced_anew_from_task_to_task(factors: str) -> None:
    """20 tasks: one trace, and one more where factors stop to learn; observing and initialising included."""
    base = params()
    adapters, history = attach(base, factors=factors), None
    run = Run(clora.protect(ADAM, energy=0.5), penalty=0.1)
    seen = 0

    def counted(adapters: Any, base: Any, batch: Any) -> Any:
        nonlocal seen
        seen += 1
        return forward(adapters, base, batch)

    run.forward = counted
    counts = []
    for task in range(20):
        adapters, history = run.learn(adapters, base, history, task, epochs=1)
        counts.append((run.traces, seen))
    # In the first task nothing is finished yet: the rules of a layer change once, with its end.
    assert counts[1:] == [counts[1]] * 19, counts
    assert max(counts[1]) <= 2


def test_restore_rows_and_coming_back() -> None:
    base, adapters, history = lived(3, max_rank=12)
    batch = data(7)[0]
    jitted = jax.jit(forward)
    then = {name: jitted(clora.restore(adapters, history, name), base, batch) for name in history.tasks}
    assert np.array_equal(then["task-2"], jitted(adapters, base, batch))
    assert not np.array_equal(then["task-0"], then["task-1"])
    grown = clora.expand(adapters, 3)
    assert np.array_equal(jitted(clora.restore(grown, history, "task-0"), base, batch), then["task-0"])
    names = [history.tasks[i % 3] for i in range(24)]
    mixed = jitted(clora.rows(grown, history, names), base, batch)
    for i, name in enumerate(names):
        old = clora.restore(grown, history, name)
        within(mixed[i], then[name][i], {**old}, base, (batch[0][i : i + 1],))
    no_heads = attach(base, heads=())
    linear, past = clora.end_task(no_heads, clora.observe(forward, no_heads, base, [batch]))
    plain = forward(clora.rows(linear, past, [None] * 24), base, batch)
    within(plain, model(base, batch[0]), attach(base), base, batch)
    with pytest.raises(StateError, match=r"no base.*name of a task"):
        clora.rows(adapters, history, [None])
    with pytest.raises(StateError, match=r"no snapshot of task 'x'.*'task-0', 'task-1', 'task-2'"):
        clora.restore(adapters, history, "x")
    with pytest.raises(StateError, match="higher rank"):
        clora.rows(clora.restore(grown, history, "task-0"), clora.end_task(grown, history=history)[1], ["task-3"])
    mixed = clora.rows(adapters, history, ["task-0"] * 24)
    grads = jax.grad(lambda a: jnp.sum(forward(a, base, batch) ** 2))(mixed)
    assert not any(np.any(g.adapter.R_old) for g in grads.values()), "nothing learns in rows"
    # The base, B, R and A for each of two layers, and the head: no second route.
    assert str(jax.make_jaxpr(forward)(mixed, base, batch)).count("dot_general") == 2 * 4 + 1
    other = {
        name: clora.Layer(layer.adapter, layer.moments, layer.spare, layer.info._replace(name=f"x.{name}"))
        for name, layer in adapters.items()
    }
    with pytest.raises(StateError, match=r"knows no layer 'x\.encoder"):
        clora.restore(other, history, "task-0")


def test_growing() -> None:
    """Within max_rank the meter stays exact; beyond it it raises; an option that is missing is asked for."""
    base, adapters, _ = lived(2, max_rank=10)
    batch = data(3)[0]
    grown = clora.expand(adapters, 2)
    assert grown["encoder.0"].rank == 10
    assert grown["encoder.0"].spare is None
    within(forward(grown, base, batch), forward(adapters, base, batch), grown, base, batch)
    for name, value in clora.drift(grown).items():
        layer = wide((grown[name].adapter, grown[name].used()))
        assert abs(value - clora.drift(adapters)[name]) <= 2 * float(core.bounds.drift(*layer))
    with pytest.raises(OptionError, match=r"seed=None.*max_rank"):
        clora.expand(grown, 1)
    beyond = clora.expand(grown, 1, seed=0)
    within(forward(beyond, base, batch), forward(adapters, base, batch), beyond, base, batch)
    for verb in (clora.drift, clora.penalty, clora.protect(ADAM).init):
        with pytest.raises(MomentsIncomplete, match=r"max_rank"):
            verb(beyond)
    assert clora.drift(clora.expand(attach(base), 1, seed=0))["encoder.0"] == 0.0
    with pytest.raises(RankError, match=r"rank 10 \+ 15"):
        clora.expand(grown, 15, seed=0)
    with pytest.raises(RankError, match="by=0"):
        clora.expand(grown, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_and_unmerge(dtype: str) -> None:
    base, adapters, _ = lived(2)
    base = jax.tree.map(lambda a: a.astype(dtype), base)
    merged = clora.merge(base, adapters, on_loss="ignore")
    assert clora.unmerge(merged) is base
    for i in range(2):
        W, layer = base["encoder"][i]["kernel"], adapters[f"encoder.{i}"]
        exact = np.asarray(W, np.float64).T + core.delta(wide(layer.adapter))
        narrow = core.Adapter(*(np.asarray(a) for a in layer.adapter))
        limit = core.bounds.merge(np.asarray(W.astype(jnp.float32)).T, narrow, dtype=dtype)
        got = merged.params["encoder"][i]["kernel"]
        assert got.dtype == dtype
        assert np.all(np.abs(np.asarray(got.astype(jnp.float32), np.float64).T - exact) <= limit * (1 + 2.0**-20))
    V = np.asarray(core.routing(adapters["head"].adapter, xp=jnp))
    assert np.array_equal(merged.params["head"]["kernel"].astype(jnp.float32), jnp.asarray(V[:, :-1].T).astype(dtype))
    assert np.array_equal(merged.params["head"]["bias"], jnp.asarray(V[:, -1]).astype(dtype))
    assert set(merged.reports) == {"encoder.0", "encoder.1"}
    tiny = clora.map_layers(
        lambda layer: clora.Layer(layer.adapter._replace(R_old=2.0**-12 * layer.adapter.R_old), None, None, layer.info),
        adapters,
    )
    if dtype == "bfloat16":
        with pytest.raises(InvalidValueError, match=r"loses more than 10%.*encoder\.0"):
            clora.merge(base, tiny, on_loss="raise")
        with pytest.warns(UserWarning, match="loses more than 10%"):
            clora.merge(base, tiny)


def test_materialised_weights_are_the_same_function() -> None:
    """For code that wants arrays: value and gradients within bounds of the kernels'."""
    base, adapters, _ = lived(2)
    batch = data(5)[0]

    def loss(adapters: Any, materialize: bool) -> Any:
        return model(clora.bind(base, adapters, materialize=materialize), batch[0])

    within(loss(adapters, True), loss(adapters, False), adapters, base, batch)
    one, two = (jax.grad(lambda a, m=m: jnp.sum(loss(a, m)))(adapters) for m in (True, False))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert np.all(np.abs(a - b) <= float(kit.gamma(600, "float32")) * 24 * (np.abs(b).max() + 1))
    with pytest.raises(StateError, match="arrays can't be observed"):
        clora.observe(lambda a, p, b: model(clora.bind(p, a, materialize=True), b[0]), adapters, base, [batch])


def test_a_task_without_observing_is_told() -> None:
    base, adapters, history = lived(1)
    adapters, history = clora.end_task(clora.begin_task(adapters), history=history, name="blind")
    assert history.unobserved == ("blind",)
    with pytest.raises(MomentsIncomplete, match="observe"):
        clora.drift(adapters)
    with pytest.raises(MomentsIncomplete, match="observe"):
        jax.jit(clora.penalty)(adapters)
    moving = attach(base, factors="every-task")
    for verb in (clora.drift, clora.penalty, clora.protect(ADAM).init, lambda a: clora.observe(forward, a, base, [])):
        with pytest.raises(StateError, match="factors='first-task' or 'never'"):
            verb(moving)
    moving, past = clora.end_task(moving)
    assert past.unobserved == ("task-0",)  # as in every framework
    with pytest.raises(StateError, match="stale"):
        clora.rows(moving, past, ["task-0"])


def test_wrong_calls_are_refused_and_nothing_is_lost() -> None:
    base, adapters, history = lived(1)
    with pytest.raises(StateError, match=r"finished already.*'task-0'"):
        clora.end_task(adapters, history=history, name="task-0")
    with pytest.raises(StateError, match="no text"):
        clora.end_task(adapters, history=history, name=3)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="other layers were observed"):
        clora.end_task(adapters, {"x": jnp.zeros((2, 2))}, history=history)
    spoiled = clora.map_layers(
        lambda layer: clora.Layer(
            layer.adapter._replace(R_delta=layer.adapter.R_delta.at[0, 0].set(jnp.nan)),
            layer.moments,
            layer.spare,
            layer.info,
        ),
        adapters,
    )
    with pytest.raises(InvalidValueError, match=r"R_delta of layer 'encoder\.0' is not finite"):
        clora.end_task(spoiled, history=history)
    with pytest.raises(StateError, match="no data to observe"):
        clora.observe(forward, adapters, base, [])
    with pytest.raises(OptionError, match="no floating point array"):
        clora.observe(lambda a, p, b: forward(a, p, b).argmax(1), adapters, base, data(0))
    with pytest.raises(StateError, match=r"nothing reached layer 'encoder\.1'"):
        clora.observe(lambda a, p, b: b[0] @ clora.bind(p, a)["encoder"][0]["kernel"], adapters, base, data(0))
    with pytest.raises(OptionError, match="no adapter in this tree"):
        clora.begin_task(base)
    with pytest.raises(OptionError, match="unknown kind"):
        clora.penalty(adapters, kind="both")
    with pytest.raises(OptionError, match=r"unknown option.*form"):
        clora.penalty(adapters, form="basis")
    with pytest.raises(OptionError, match="between 0 and 1"):
        clora.protect(ADAM, energy=1.5)
    tx = clora.protect(ADAM)
    with pytest.raises(OptionError, match="the adapters"):
        tx.update(adapters, tx.init(adapters))
    with pytest.raises(OptionError, match="unknown on_loss"):
        clora.merge(base, adapters, on_loss="no")
    with pytest.raises(OptionError, match=r"no place for layer 'encoder\.0'"):
        clora.bind({"other": base["head"]}, adapters)


def test_shapes_are_refused_while_tracing_by_the_leafs_path() -> None:
    base, adapters, history = lived(1)
    batch = data(0)[0]
    with pytest.raises(ShapeError, match=r"layer 'encoder\.0\.kernel'.*x \(24, 19\)"):
        jax.jit(forward)(adapters, base, (batch[0][:, :19],))
    bound = clora.bind(base, adapters)
    with pytest.raises(ShapeError, match=r"head 'head\.kernel'.*x \(24, 20\).*d_in=24"):
        jax.jit(lambda x: x @ bound["head"]["kernel"])(batch[0])
    mixed = clora.rows(adapters, history, ["task-0"] * 3)
    with pytest.raises(ShapeError, match=r"layer 'encoder\.0\.kernel'"):
        jax.jit(forward)(mixed, base, batch)
    half = clora.map_layers(lambda layer: jax.tree.map(lambda a: a.astype(jnp.bfloat16), layer), adapters)
    with pytest.raises(DTypeError, match=r"layer 'encoder\.0\.kernel'.*bfloat16"):
        jax.jit(forward)(half, base, batch)


@pytest.mark.parametrize("factors", ["first-task", "every-task"])
def test_buffers_may_be_donated(factors: str) -> None:
    """A step that gives its adapters and state to the compiler: the same numbers, and snapshots that stay readable."""
    base = params()
    tx = clora.learning(ADAM)

    def step(adapters: Any, state: Any, batch: Any) -> Any:
        def loss(adapters: Any) -> Any:
            return jnp.mean(forward(adapters, base, batch) ** 2)

        updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    results = []
    for donate in ((), (0, 1)):
        run, history, adapters = jax.jit(step, donate_argnums=donate), None, attach(base, factors=factors)
        for task in range(3):
            adapters = clora.begin_task(adapters)
            state = tx.init(adapters)
            for batch in data(task):
                adapters, state = run(adapters, state, batch)
            adapters, history = clora.end_task(adapters, history=history)
        results.append((adapters, history.snapshots))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"targets": "encodr.0"}, OptionError, r"near: .*'encoder\.0"),
        ({"targets": "encoder.0.bias"}, ShapeError, r"'encoder\.0\.bias' is no matrix"),
        ({"targets": (), "heads": ()}, OptionError, "nothing to adapt"),
        ({"rank": 0}, RankError, "rank=0"),
        ({"rank": 25}, RankError, r"'encoder\.0'. Got rank=25, d_out=32, d_in=20; needed 1 <= rank <= 20"),
        ({"ranks": {"hea": 2}}, OptionError, "ranks matches no weight"),
        ({"factors": "sometimes"}, OptionError, "'every-task' or 'first-task' or 'never'"),
        ({"layout": "io"}, OptionError, "unknown layout"),
        ({"scheme": "zero"}, OptionError, "scheme"),
        ({"scheme": "lora", "factors": "never"}, OptionError, "nothing could ever learn"),
        ({"train_routing": False}, OptionError, "nothing would learn after the first task"),
        ({"max_rank": 3}, OptionError, "max_rank is below rank"),
    ],
)
def test_attach_refuses(options: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        attach(params(), **options)


def test_patterns() -> None:
    import re

    base = params()
    for targets, names in [
        ("all-linear", ["encoder.0", "encoder.1"]),
        ("encoder/1", ["encoder.1"]),
        ("encoder.1.kernel", ["encoder.1"]),
        ("*.0", ["encoder.0"]),
        (re.compile(r"encoder/\d"), ["encoder.0", "encoder.1"]),
        (["0", "1"], ["encoder.0", "encoder.1"]),
    ]:
        assert list(attach(base, targets=targets, heads="head")) == [*names, "head"], targets
    assert list(attach(base, targets="all-linear", exclude="1", heads=(), rank=2)) == ["encoder.0", "head"]
    ranks = attach(base, ranks={"1": 3})
    assert [ranks[n].rank for n in ("encoder.0", "encoder.1")] == [8, 3]
    named = clora.attach({"w": jnp.ones((3, 5))}, rank=1, targets="w", layout="out,in")
    assert named["w"].adapter.A.shape == (3, 1)


def test_kernels_from_either_side() -> None:
    """x @ kernel, kernel @ x, kernel.T, NumPy inputs and casts; anything else is refused with the way out."""
    W = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)), jnp.float32)
    x = np.random.default_rng(1).standard_normal((4, 5)).astype(np.float32)
    adapters = clora.attach({"kernel": W}, rank=2, seed=3)
    kernel = clora.bind({"kernel": W}, adapters)["kernel"]
    out = clora.bind({"weight": W.T}, clora.attach({"weight": W.T}, rank=2, seed=3))["weight"]
    want = np.asarray(jnp.asarray(x) @ W)
    for got in (x @ kernel, jnp.asarray(x) @ kernel, x @ out.T, (kernel.T @ x.T).T, (out @ x.T).T, (out @ x[0])[None]):
        assert np.all(
            np.abs(got - want[: len(got)])
            <= float(kit.gamma(20, "float32")) * (abs(x) @ abs(np.asarray(W)))[: len(got)]
        )
    assert kernel.shape == (5, 3)
    assert kernel.T.shape == (3, 5)
    assert (x.astype(jnp.bfloat16) @ kernel.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    for wrong in (lambda: kernel @ x, lambda: x[:, :3] @ kernel.T):
        with pytest.raises(StateError, match="from its other side"):
            wrong()
    with pytest.raises(AttributeError, match="materialize=True"):
        kernel.reshape(15)
    with pytest.raises(TypeError):
        jnp.dot(x, kernel)


# --- what a hostile reader found ---------------------------------------------------------------------------------


def single(dtype: Any = jnp.float32, **options: Any) -> Any:
    """One layer q (5, 6), its adapter away from zero, and a batch."""
    rng = np.random.default_rng(0)
    base = {"q": {"kernel": jnp.asarray(rng.standard_normal((6, 5)), dtype)}}
    adapters = clora.attach(base, **{"rank": 2, "seed": 1, **options})
    R = jnp.asarray(rng.standard_normal((2, 2)), jnp.float32)
    q = adapters["q"]
    moved = {"q": clora.Layer(q.adapter._replace(R_old=R, R_delta=R[::-1]), q.moments, q.spare, q.info)}
    return base, moved, jnp.asarray(rng.standard_normal((8, 6)), jnp.float32)


def through(adapters: Any, base: Any, x: Any) -> Any:
    return x @ clora.bind(base, adapters)["q"]["kernel"]


@pytest.mark.parametrize("stop_old", [False, True])
@pytest.mark.parametrize("materialize", [False, True])
def test_bound_weights_follow_the_layers_rules(stop_old: bool, materialize: bool) -> None:
    """stop_old through bind: gradients of A and B are those of `linear` by that rule; scale is folded into A."""
    base, adapters, x = single(stop_old=stop_old, scale=2.0)
    plain = clora.attach(base, rank=2, seed=1)
    assert np.array_equal(adapters["q"].adapter.A, 2 * plain["q"].adapter.A)
    assert np.array_equal(adapters["q"].adapter.B, plain["q"].adapter.B)
    grads = jax.grad(lambda a: jnp.sum(x @ clora.bind(base, a, materialize=materialize)["q"]["kernel"]))(adapters)
    A, R_old, R_delta, B = wide(adapters["q"].adapter)
    R = R_delta if stop_old else R_old + R_delta
    g, rows = np.ones((8, 5)), np.asarray(x, np.float64)
    for name, want, size in (
        ("A", g.T @ rows @ B.T @ R.T, abs(g).T @ abs(rows) @ abs(B).T @ abs(R).T),
        ("B", R.T @ A.T @ g.T @ rows, abs(R).T @ abs(A).T @ abs(g).T @ abs(rows)),
    ):
        got = np.asarray(getattr(grads["q"].adapter, name), np.float64)
        assert np.all(np.abs(got - want) <= float(kit.gamma(100, "float32")) * size), name


def test_what_does_not_learn_has_no_gradient() -> None:
    base, adapters, x = single(factors="never")
    grads = jax.grad(lambda a: jnp.sum(through(a, base, x)))(adapters)["q"]
    assert np.any(grads.adapter.R_delta)
    assert not any(np.any(a) for a in (grads.adapter.A, grads.adapter.R_old, grads.adapter.B))


def test_second_order_by_an_option_of_attach() -> None:
    """A gradient penalty while A and B learn."""

    def twice(adapters: Any, base: Any, x: Any) -> Any:
        return jax.grad(lambda a: jnp.sum(jax.grad(lambda x: jnp.sum(through(a, base, x) ** 2))(x) ** 2))(adapters)

    base, adapters, x = single()
    with pytest.raises(StateError, match="second_order=True"):
        twice(adapters, base, x)
    base, adapters, x = single(second_order=True)
    assert np.any(twice(adapters, base, x)["q"].adapter.A)


def test_layers_of_one_name_are_told_and_ensembles_learn_apart() -> None:
    base, _, x = single()
    members = [clora.attach(base, rank=2, seed=i) for i in range(3)]
    tx = clora.learning(optax.sgd(1.0))
    grads = jax.grad(lambda ms: sum(jnp.sum(through(m, base, x) ** 2) for m in ms))(members)
    updates, _ = tx.update(grads, tx.init(members), members)
    for update, grad in zip(updates, grads, strict=True):
        assert np.array_equal(update["q"].adapter.R_delta, -grad["q"].adapter.R_delta)
    with pytest.raises(OptionError, match=r"two layers have one name.*'q'"):
        clora.drift(members)
    with pytest.raises(OptionError, match=r"two arrays have one path.*'a\.b\.kernel'"):
        clora.attach({"a.b": {"kernel": jnp.ones((3, 3))}, "a": {"b": {"kernel": jnp.ones((3, 3))}}}, rank=1)
    both = clora.attach({"q": {"kernel": jnp.ones((3, 3)), "weight": jnp.ones((3, 3))}}, rank=1)
    assert set(both) == {"q", "q.weight"}
    odd = {"mlp/~/linear_0": {"w": jnp.ones((3, 4))}, "layer[0]": {"w": jnp.ones((3, 4))}}
    names = ["mlp/~/linear_0.w", "layer[0].w"]
    assert set(clora.attach(odd, rank=1, targets=names)) == set(names)


def test_masks_reach_what_jax_has_compiled_before() -> None:
    """A jitted model inside: another mask is no constant of it, nor is none."""
    base, adapters, x = single(factors="never")
    inner = jax.jit(through)

    def run(adapters: Any, base: Any, batch: Any) -> Any:
        return inner(adapters, base, batch["x"])

    u = np.asarray(x, np.float64) @ np.asarray(adapters["q"].adapter.B, np.float64).T
    size = float(kit.gamma(60, "float32")) * (abs(u).T @ abs(u))
    for mask in (None, np.arange(8) < 3, np.arange(8) >= 3, None):
        how = {} if mask is None else {"mask": lambda b: b["mask"]}
        batch = {"x": x, "mask": jnp.asarray(np.ones(8, bool) if mask is None else mask)}
        rows = u if mask is None else u[mask]
        got = clora.observe(run, adapters, base, [batch], **how)["q"]
        assert np.all(np.abs(got - rows.T @ rows / len(rows)) <= size)
    spoiled = {"x": x.at[0].set(jnp.nan), "mask": jnp.arange(8) > 0}
    assert np.all(np.isfinite(clora.observe(run, adapters, base, [spoiled], mask=lambda b: b["mask"])["q"]))
    with pytest.raises(InvalidValueError, match=r"second moment of layer 'q' is none"):
        clora.observe(run, adapters, base, [spoiled])
    for wrong in (-np.eye(2), np.asarray([[1.0, 2.0], [0.0, 1.0]]), np.full((2, 2), np.nan)):
        with pytest.raises(InvalidValueError, match=r"second moment of layer 'q' is none"):
            clora.end_task(adapters, {"q": jnp.asarray(wrong, jnp.float32)})


def test_heads_take_the_dtype_of_the_base() -> None:
    base = {"h": {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((6, 3)), jnp.float32)}}
    bound = clora.bind(base, clora.attach(base, rank=1, targets=(), heads="h"))
    whole = jnp.arange(12).reshape(2, 6)
    assert np.array_equal(whole @ bound["h"]["kernel"], whole @ base["h"]["kernel"])
    half = whole.astype(jnp.bfloat16)
    assert (half @ bound["h"]["kernel"]).dtype == (half @ base["h"]["kernel"]).dtype == jnp.float32
    with jax.enable_x64(True):
        base, adapters, _ = single()
        x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 6)))
        exact = np.asarray(x) @ wide(base["q"]["kernel"]) + core.apply(np.asarray(x), wide(adapters["q"].adapter))
        assert np.all(np.abs(through(adapters, base, x) - exact) <= 2.0**-20)
        still = jax.tree.map(jnp.zeros_like, adapters["q"].adapter.R_old)
        q = adapters["q"]
        zero = {"q": clora.Layer(q.adapter._replace(R_old=still, R_delta=still), q.moments, q.spare, q.info)}
        assert np.array_equal(through(zero, base, x), x @ base["q"]["kernel"])


def test_materialised_half_precision_keeps_the_update() -> None:
    base, adapters, _ = single(jnp.bfloat16)
    q = adapters["q"]
    tiny = {"q": clora.Layer(jax.tree.map(lambda a: a * 2.0**-4, q.adapter), q.moments, q.spare, q.info)}
    W = clora.bind(base, tiny, materialize=True)["q"]["kernel"]
    dW = core.delta(wide(tiny["q"].adapter)).T
    assert np.all(np.abs(np.asarray(W, np.float64) - wide(base["q"]["kernel"].astype(jnp.float32)) - dW) <= 2.0**-22)


def test_histories_that_are_forgotten_or_wrong_are_told(tmp_path: Any) -> None:
    base, adapters, history = lived(2)
    with pytest.raises(StateError, match=r"history of earlier tasks is missing"):
        clora.end_task(clora.begin_task(adapters))
    with pytest.raises(StateError, match=r"the history is missing"):
        clora.save(tmp_path / "a", adapters)
    with pytest.raises(StateError, match=r"those of an earlier task.*restore the last task first"):
        clora.save(tmp_path / "a", clora.restore(adapters, history, "task-0"), history)
    mixed = {**attach(base, factors="never", heads=()), "z": attach(base, heads=())["encoder.0"].with_info(name="z")}
    with pytest.raises(StateError, match="one set of rules"):
        clora.save(tmp_path / "a", mixed)
    assert not (tmp_path / "a").exists()
    grown = clora.expand(adapters, 1, seed=0)
    clora.save(tmp_path / "a", grown, history)
    loaded, _ = clora.load(tmp_path / "a", base)
    assert [layer.info.complete for layer in loaded.values()] == [False, False, True]
    with pytest.raises(StateError, match="under jit"):
        jax.jit(lambda a: clora.end_task(a, history=history)[0])(adapters)
    tx = clora.learning(ADAM)
    first = attach(base)
    state = tx.init(first)
    later = clora.end_task(first)[0]
    with pytest.raises(StateError, match=r"tx.init\(adapters\)"):
        tx.update(later, state, later)
    with pytest.raises(StateError, match="different trees"):
        tx.update({"head": first["head"]}, state, first)


def test_a_saved_layout_is_kept(tmp_path: Any) -> None:
    """A square weight under a name that says nothing."""
    base = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((5, 5)), jnp.float32)}
    adapters = clora.attach(base, rank=2, targets="w", layout="out,in")
    clora.save(tmp_path, adapters)
    loaded, _ = clora.load(tmp_path, base)
    assert loaded["w"].info.layout == "out,in"


def test_donated_restorations_and_heads_leave_the_rest_alone() -> None:
    _, adapters, history = lived(2)
    eat = jax.jit(lambda a: jax.tree.map(lambda leaf: leaf + 1, a), donate_argnums=0)
    eat(clora.restore(adapters, history, "task-0"))
    assert np.all(np.isfinite(clora.restore(adapters, history, "task-0")["encoder.0"].adapter.R_old))
    assert np.all(np.isfinite(adapters["encoder.0"].adapter.A))
    alone = {"head": {"weight": jnp.ones((3, 6))}}
    eat(clora.attach(alone, rank=1, targets=(), heads="head"))
    assert np.array_equal(alone["head"]["weight"], np.ones((3, 6)))


def test_a_folder_tells_unseen_directions_from_unseen_tasks(tmp_path: Any) -> None:
    """Either keeps the meter from being read; only the first is a fact of the layers."""
    _, adapters, history = lived(1)
    for by, complete in ((0, True), (1, False)):
        grown = clora.expand(adapters, by, seed=0) if by else adapters
        grown, past = clora.end_task(clora.begin_task(grown), history=history, name="unseen")
        clora.save(tmp_path / str(by), grown, past)
        state = store.load(tmp_path / str(by))
        assert state.unobserved == ("unseen",)
        assert state.layers["encoder.0"].complete is complete


def test_going_back_to_a_lower_rank_leaves_the_later_directions_spare() -> None:
    adapters, history = attach(params(), factors="every-task", max_rank=10), clora.History()
    adapters, history = clora.end_task(clora.begin_task(adapters), history=history)
    grown = clora.expand(adapters, 1)
    grown, history = clora.end_task(clora.begin_task(grown), history=history)
    back = clora.restore(grown, history, "task-0")["encoder.0"]
    assert back.rank == 8
    assert np.array_equal(back.spare[0][:, :1], grown["encoder.0"].adapter.A[:, 8:])
    assert np.array_equal(back.spare[1][1:], grown["encoder.0"].spare[1])
    assert clora.restore(grown, history, "task-1")["encoder.0"].spare[0].shape == (32, 1)


def test_directions_to_grow_into_are_alive() -> None:
    """Also where LoRA's start has A = 0; orthogonal to those in use; those that torch draws."""
    base = params()
    lora = attach(base, heads=(), factors="every-task", scheme="lora", max_rank=12)
    assert np.any(lora["encoder.0"].spare[0])
    layer = attach(base, max_rank=12)["encoder.0"]
    for factor in (layer.whole().A, layer.whole().B.T):
        gram = np.asarray(factor, np.float64).T @ np.asarray(factor, np.float64)
        assert np.all(np.abs(gram - np.eye(12)) <= float(core.bounds.orthonormal(32, 12, np.float32, xp=np)))


def test_stacked_layers_live_through_tasks() -> None:
    """A stack trained by scan equals its layers one by one: steps, moments, meter, penalty, growth, merging."""
    rng = np.random.default_rng(0)
    stack = {"block": {"kernel": jnp.asarray(rng.standard_normal((3, 8, 8)) / 3, jnp.float32)}}
    x = jnp.asarray(rng.standard_normal((10, 8)), jnp.float32)
    adapters = clora.attach(stack, rank=2, max_rank=3, targets=(), stacked="block", factors="never", seed=0)
    assert adapters["block"].adapter.A.shape == (3, 8, 2)
    assert not np.array_equal(adapters["block"].adapter.A[0], adapters["block"].adapter.A[1])

    def scanned(adapters: Any, stack: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, p: (jnp.tanh(x @ clora.bind(*p)["block"]["kernel"]), None), x, (stack, adapters))[
            0
        ]

    def one(tree: Any, i: int) -> Any:
        return jax.tree.map(lambda a: a[i], tree)

    def unrolled(adapters: Any, stack: Any, x: Any) -> Any:
        for i in range(3):
            x = jnp.tanh(x @ clora.bind(one(stack, i), one(adapters, i))["block"]["kernel"])
        return x

    def loss(adapters: Any) -> Any:
        return jnp.sum(scanned(adapters, stack, x) ** 2) + clora.penalty(adapters, 0.1)

    tx, history = clora.protect(optax.sgd(0.1), energy=0.5), None
    for _ in range(2):
        adapters = clora.begin_task(adapters)
        state = tx.init(adapters)
        for _ in range(3):
            updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
            adapters = optax.apply_updates(adapters, updates)
        observed = clora.observe(scanned, adapters, stack, [x])
        assert observed["block"].shape == (3, 3, 3)
        adapters, history = clora.end_task(adapters, observed, history=history)
    error = np.abs(scanned(adapters, stack, x) - unrolled(adapters, stack, x))
    assert np.all(error <= float(kit.gamma(200, "float32")) * 10)
    parts = [wide((one(adapters["block"].adapter, i), one(adapters["block"].used(), i))) for i in range(3)]
    assert clora.drift(adapters)["block"] == float(np.sum([core.drift(*part) for part in parts]))
    assert np.any(adapters["block"].adapter.R_old)
    back = clora.restore(clora.expand(adapters, 1), history, "task-1")
    assert np.array_equal(scanned(back, stack, x), scanned(adapters, stack, x))
    grown = clora.expand(adapters, 1)
    assert grown["block"].adapter.B.shape == (3, 3, 8)
    assert np.all(
        np.abs(scanned(grown, stack, x) - scanned(adapters, stack, x)) <= float(kit.gamma(200, "float32")) * 10
    )
    merged = clora.merge(stack, adapters).params["block"]["kernel"]
    dW = np.asarray(core.delta(wide(adapters["block"].adapter))).swapaxes(-1, -2)
    assert np.all(np.abs(wide(merged) - wide(stack["block"]["kernel"]) - dW) <= 2.0**-20)
    for verb in (lambda: clora.rows(adapters, history, ["task-0"]), lambda: clora.save("nowhere", adapters, history)):
        with pytest.raises(StateError, match="is a stack of layers"):
            verb()


def test_kernels_refuse_what_only_arrays_can() -> None:
    base, adapters, x = single()
    kernel = clora.bind(base, adapters)["q"]["kernel"]
    for wrong in (lambda: kernel[0], lambda: kernel + 1, lambda: 2 * kernel):
        with pytest.raises(TypeError, match="materialize=True"):
            wrong()
    batch = jnp.stack([x, x + 1])
    turned = clora.bind(
        {"q": {"weight": base["q"]["kernel"].T}}, clora.attach({"q": {"weight": base["q"]["kernel"].T}}, rank=2)
    )
    left = turned["q"]["weight"] @ batch.mT
    want = np.asarray(base["q"]["kernel"].T @ batch.mT)
    assert left.shape == want.shape
    assert np.all(np.abs(left - want) <= float(kit.gamma(30, "float32")) * 30)
    with pytest.raises(OptionError, match="no place for layer"):
        clora.bind(clora.bind(base, adapters), adapters)
    q = adapters["q"]
    huge = {"q": clora.Layer(q.adapter._replace(R_old=q.adapter.R_old * 1e6), q.moments, q.spare, q.info)}
    half = jax.tree.map(lambda a: a.astype(jnp.float16), base)
    with pytest.raises(InvalidValueError, match="merged weight of layer 'q' is not finite"):
        clora.merge(half, huge)
    V = {"h": {"kernel": jnp.ones((3, 2), jnp.float16)}}
    head = clora.attach(V, rank=1, targets=(), heads="h")["h"]
    loud = {"h": clora.Layer(head.adapter._replace(R_delta=1e6 + head.adapter.R_delta), head.moments, None, head.info)}
    with pytest.raises(InvalidValueError, match="merged weight of layer 'h' is not finite"):
        clora.merge(V, loud)
