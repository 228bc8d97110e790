"""clora_numpy: gradients of a network, the life of a task, and what protection promises after real optimizer steps."""

import warnings

import array_api_strict as strict
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import clora_core as core
import clora_numpy as clora
from clora_core import bounds
from clora_core.errors import InvalidValueError, MomentsIncomplete, OptionError, RankError, ShapeError, StateError

OPTIMIZERS = {
    "sgd": lambda: clora.sgd(1e-2),
    "momentum": lambda: clora.sgd(1e-2, momentum=0.9, weight_decay=1e-2),
    "adam": lambda: clora.adam(1e-2),
    "adamw": lambda: clora.adamw(1e-2, weight_decay=0.1),
}


def make(factors="first-task", *, seed=0, rank=6, d_in=12, dtype=np.float32, **options):
    """A network of two adapted layers and a head, and its adapter."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(dtype)  # noqa: E731
    modules = {
        "one": clora.Layer(draw(10, d_in), draw(10)),
        "relu": clora.Relu(),
        "two": clora.Layer(draw(8, 10), draw(8)),
        "relu-2": clora.Relu(),
        "head": clora.Head(draw(3, 8), draw(3)),
    }
    return clora.attach(clora.Network(modules), rank=rank, rng=seed, factors=factors, **options)


def data(t, n=64, d_in=12, dtype=np.float32):
    """Inputs that differ from task to task, and labels that depend on them."""
    rng = np.random.default_rng(100 + t)
    x = rng.standard_normal((n, d_in)).astype(dtype)
    x[:, t % d_in] *= 3
    return x, np.argmax(x[:, [t % d_in, (t + 1) % d_in, (t + 5) % d_in]], axis=1)


def learn(adapter, optimizer, x, y, steps=20, **penalty):
    for _ in range(steps):
        loss, grad = clora.cross_entropy(adapter.network.forward(x), y)
        adapter.network.backward(grad)
        if penalty:
            adapter.penalty(**penalty)
        optimizer.step()
    return loss


def live(adapter, optimizer, tasks=3, **penalty):
    for t in range(tasks):
        x, y = data(t)
        with adapter.task(f"t{t}"):
            learn(adapter, optimizer, x, y, **penalty)
            adapter.observe([(x[:40], y[:40]), (x[40:], y[40:])])


# --- gradients -------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), stop_old=st.booleans())
def test_backward_is_the_exact_derivative_of_forward(seed, stop_old):
    """On small dyadic numbers every difference quotient is exact, and a ReLU network is linear between its kinks."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.integers(-4, 5, shape) / 2  # noqa: E731
    network = clora.Network([clora.Layer(draw(3, 4), draw(3)), clora.Relu(), clora.Head(draw(2, 3), draw(2))])
    adapter = clora.attach(network, rank=2, rng=0, factors="every-task", stop_old=stop_old)
    layer, head = network.modules["0"], network.modules["2"]
    layer.adapter = core.Adapter(draw(3, 2), np.zeros((2, 2)) if stop_old else draw(2, 2), draw(2, 2), draw(2, 4))
    head.adapter = head.adapter._replace(R_delta=draw(2, 4))
    x, grad = draw(5, 4), draw(5, 2)
    network.forward(x)
    network.backward(grad)
    step = 2.0**-10
    for module, name in ((layer, "A"), (layer, "R_delta"), (layer, "B"), (head, "R_delta")):
        start, gradient = module.adapter, module.gradients[name]
        for index in np.ndindex(gradient.shape):
            quotients = []
            for sign in (1, -1):
                moved = getattr(start, name).copy()
                moved[index] += sign * step
                module.adapter = start._replace(**{name: moved})
                plus = float(np.sum(grad * network.forward(x)))
                module.adapter = start
                quotients.append(sign * (plus - float(np.sum(grad * network.forward(x)))) / step)
            assume(quotients[0] == quotients[1])  # no kink in between
            assert gradient[index] == quotients[0], (name, index)
    assert adapter.factors == "every-task"


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_cross_entropy_matches_the_definition(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((7, 4)), rng.integers(0, 4, 7)
    loss, grad = clora.cross_entropy(logits, labels, smoothing=smoothing)
    probabilities = np.exp(logits) / np.sum(np.exp(logits), axis=1, keepdims=True)
    target = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
    # quotients and logarithms of sums of 4 exponentials, each good to a few units in the last place: 64 roundings
    limit = bounds.gamma(64, 2.0**-53)
    assert (np.abs(grad - (probabilities - target) / 7) <= limit * (probabilities + target) / 7).all()
    exact = -np.sum(target * np.log(probabilities)) / 7
    assert abs(loss - exact) <= limit * np.mean(np.abs(logits).max(axis=1) + 4)


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_scale_is_folded_into_a(scale):
    plain, scaled = make(), make(scale=scale)
    for name in ("one", "two"):
        assert (scale * plain.layers[name].adapter.A == scaled.layers[name].adapter.A).all()
        assert (scaled.layers[name].adapter.B == plain.layers[name].adapter.B).all()


def test_learning_lowers_the_loss():
    adapter = make()
    optimizer = clora.Optimizer(adapter, clora.adam(1e-2))
    x, y = data(0)
    before, _ = clora.cross_entropy(adapter.network.forward(x), y)
    with adapter.task("t"):
        after = learn(adapter, optimizer, x, y, steps=60)
        adapter.observe([x])
    assert after < before / 2


# --- protection ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("factors", ["first-task", "never"])
def test_nothing_leaks_into_the_protected_directions(rule, factors):
    adapter = make(factors)
    optimizer = clora.Optimizer(adapter, OPTIMIZERS[rule]())
    adapter.protect(optimizer, energy=0.8)
    live(adapter, optimizer, tasks=1)
    with adapter.task("second"):
        x, y = data(5)
        learn(adapter, optimizer, x, y, steps=100)
        for name, layer in adapter.layers.items():
            U, weights = (m.astype(np.float32) for m in core.protected_basis(adapter.moments(name).S, energy=0.8))
            assert 0 < weights.sum() < len(weights), "the test needs protected and free directions"
            R = layer.adapter.R_delta
            assert np.abs(R).max() > 0
            protected = U * weights
            # what project may leave: its own rounding, and what rounding U to float32 costs orthonormality
            defect = np.abs(np.eye(len(U)) - U.astype(np.float64).T @ U.astype(np.float64))
            allowed = bounds.project(R, core.Basis(U, weights)) @ np.abs(protected)
            # R_delta before projection is larger than after: bounded by twice the free part plus one step
            size = 2 * np.abs(R) + 0.1
            allowed = (
                allowed
                + size @ np.abs(U) @ defect
                + bounds.gamma(2 * len(U) + 4, 2.0**-24) * (size @ np.abs(U) @ np.abs(U).T @ np.abs(protected))
            )
            assert (np.abs(R.astype(np.float64) @ protected) <= allowed).all(), name


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_frozen_factors_keep_their_bits(rule):
    adapter = make("first-task")
    optimizer = clora.Optimizer(adapter, OPTIMIZERS[rule]())
    x, y = data(0)
    start = adapter.layers["one"].adapter
    with adapter.task("first"):
        assert set(adapter.parameters()) == {f"{n}.{p}" for n in ("one", "two") for p in ("A", "R_delta", "B")} | {
            "head.R_delta"
        }
        learn(adapter, optimizer, x, y)
        adapter.observe([x])
    kept = adapter.layers["one"].adapter
    assert (kept.A != start.A).any()
    assert (kept.B != start.B).any()
    with adapter.task("second"):
        learn(adapter, optimizer, *data(1))
        adapter.observe([data(1)[0]])
    now = adapter.layers["one"].adapter
    assert (now.A == kept.A).all()
    assert (now.B == kept.B).all()
    assert (now.R_old != kept.R_old).any()


def test_the_drift_penalty_forgets_less():
    final = {}
    for weight in (0.0, 10.0):
        adapter = make()
        optimizer = clora.Optimizer(adapter, clora.adam(1e-2))
        live(adapter, optimizer, weight=weight)
        final[weight] = sum(adapter.drift().values())
    assert final[10.0] < final[0.0] / 4


def test_penalty_adds_the_core_gradient_and_returns_the_value():
    adapter = make(dtype=np.float64)
    optimizer = clora.Optimizer(adapter, clora.sgd(1e-2))
    x, y = (np.asarray(a, np.float64) if a.dtype == np.float32 else a for a in data(0))
    with adapter.task("first"):
        learn(adapter, optimizer, x, y)
        assert adapter.penalty(3.0) == 0.0, "nothing to forget in the first task"
        adapter.observe([x])
    with adapter.task("second"):
        learn(adapter, optimizer, x, y, steps=2)
        value = adapter.penalty(2.0, head_weight=0.5)
        expected = 0.0
        for name, layer in adapter.layers.items():
            weight = 0.5 if name == "head" else 2.0
            moments = adapter.moments(name)
            expected += weight * float(core.drift(layer.adapter, moments, since="boundary"))
            gradient = weight * core.drift_vjp(layer.adapter, moments, since="boundary")
            assert (layer.gradients["R_delta"] == gradient).all()
        assert value == expected
        layer = adapter.layers["one"]
        for form in ("routing", "output"):
            before = layer.gradients["R_delta"]
            adapter.penalty(0.5, kind="orthogonality", form=form)
            gradient = 0.5 * core.orthogonality_vjp(layer.adapter, form=form)
            assert (layer.gradients["R_delta"] == before + gradient).all()
        adapter.observe([x])


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_the_basis_penalty_is_that_of_the_core(energy):
    """R_old = diag(2, 1, 1/2, 0) has the unit vectors as singular vectors, so both ways to the penalty are exact."""
    adapter = make("every-task", dtype=np.float64, rank=4)
    with adapter.task("first"):
        for name in ("one", "two"):
            R = np.diag([2.0, 1.0, 0.5, 0.0])
            adapter.layers[name].adapter = adapter.layers[name].adapter._replace(R_delta=R)
    rng = np.random.default_rng(0)
    with adapter.task("second"):
        for _ in range(2):  # the second call reads what the first prepared
            expected = 0.0
            for name in ("one", "two"):
                layer = adapter.layers[name]
                layer.gradients = {}
                layer.adapter = layer.adapter._replace(R_delta=rng.integers(-4, 5, (4, 4)) / 4)
                expected += 0.25 * core.orthogonality(layer.adapter, energy=energy)
            assert adapter.penalty(0.25, kind="orthogonality", energy=energy) == expected
            for name in ("one", "two"):
                gradient = 0.25 * core.orthogonality_vjp(adapter.layers[name].adapter, energy=energy)
                assert (adapter.layers[name].gradients["R_delta"] == gradient).all()
    assert expected > 0


def test_the_meter_reads_the_true_change_of_the_first_layer():
    """Dyadic routings and a power of two of rows: both sides are exact in float64, so they are equal."""
    rng = np.random.default_rng(0)
    adapter = make("never", dtype=np.float64, rank=4)
    layer = adapter.layers["one"]
    dyadic = lambda *shape: rng.integers(-4, 5, shape) / 4  # noqa: E731
    layer.adapter = core.Adapter(dyadic(10, 4), np.zeros((4, 4)), np.zeros((4, 4)), dyadic(4, 12))
    seen = []
    for t in range(3):
        x = dyadic(16, 12)
        with adapter.task(f"t{t}"):
            layer.adapter = layer.adapter._replace(R_delta=dyadic(4, 4))
            adapter.observe([x[:8], x[8:]])
        seen.append((x, core.apply(x, layer.adapter)))
    truth = sum(np.sum((core.apply(x, layer.adapter) - y) ** 2) / 16 for x, y in seen)
    assert adapter.drift()["one"] == truth
    assert truth > 0


def test_a_full_space_is_told():
    adapter = make("never", rank=2)
    optimizer = clora.Optimizer(adapter, clora.sgd(1e-2))
    adapter.protect(optimizer, energy=1.0)
    live(adapter, optimizer, tasks=1)
    with pytest.warns(UserWarning, match="no direction is left to learn in for one"):
        adapter.begin_task("second")


# --- the life of a task ----------------------------------------------------------------------------------------


def test_boundaries_do_not_change_the_function():
    adapter = make()
    optimizer = clora.Optimizer(adapter, clora.adam(1e-2))
    x, y = data(0)
    adapter.begin_task("t")
    learn(adapter, optimizer, x, y)
    trained = adapter.network.forward(x)
    adapter.observe([x])
    adapter.end_task()
    assert (adapter.network.forward(x) == trained).all()
    adapter.begin_task("u")
    assert (adapter.network.forward(x) == trained).all()


def test_restore_gives_the_same_bits():
    adapter = make("every-task")
    optimizer = clora.Optimizer(adapter, clora.adam(1e-2))
    outputs = {}
    probe = data(9)[0]
    for t in range(3):
        with adapter.task(f"t{t}"):
            learn(adapter, optimizer, *data(t))
        outputs[f"t{t}"] = adapter.network.forward(probe)
    for name in ("t1", "t0", "t2"):
        adapter.restore(name)
        assert (adapter.network.forward(probe) == outputs[name]).all()
    assert (outputs["t0"] != outputs["t1"]).any()
    with adapter.disabled():
        base = adapter.network.forward(probe)
    assert (base == make("every-task").network.forward(probe)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_merge_and_unmerge_a_hundred_times(dtype):
    adapter = make(dtype=dtype)
    optimizer = clora.Optimizer(adapter, clora.adam(1e-2))
    x, y = data(0, dtype=dtype)
    with adapter.task("t"):
        learn(adapter, optimizer, x, y)
        adapter.observe([x])
    layer = adapter.layers["one"]
    pristine, adapted = layer.W.copy(), layer.forward(x)
    for _ in range(100):
        report = adapter.merge()
        merged = layer.forward(x)
        adapter.unmerge()
    assert (pristine == layer.W).all()
    assert (layer.forward(x) == adapted).all()
    limit = 2 * bounds.linear(x, layer.W, layer.adapter, layer.bias)  # two evaluations of the same function
    assert (np.abs(merged - adapted) <= limit).all()
    assert report["one"].unchanged < 1


def test_an_exception_leaves_everything_as_it_was():
    adapter = make()
    optimizer = clora.Optimizer(adapter, clora.adam(1e-2))
    live(adapter, optimizer, tasks=1)
    probe = data(9)[0]
    before, state, drift = adapter.network.forward(probe), dict(optimizer.state), adapter.drift()

    def interrupted():
        with adapter.task("broken"):
            learn(adapter, optimizer, *data(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (adapter.network.forward(probe) == before).all()
    assert optimizer.state == state
    assert adapter.drift() == drift
    assert adapter.tasks == ["t0"]
    live_on = data(2)
    with adapter.task("broken"):  # the name is free again
        learn(adapter, optimizer, *live_on)
        adapter.observe([live_on[0]])


def test_a_diverged_task_is_refused_and_undone():
    adapter = make()
    live(adapter, clora.Optimizer(adapter, clora.sgd(1e-2)), tasks=1)
    probe = data(9)[0]
    before = adapter.network.forward(probe)

    def diverged():
        with adapter.task("nan"):
            layer = adapter.layers["one"]
            layer.adapter = layer.adapter._replace(R_delta=layer.adapter.R_delta * np.nan)

    with pytest.raises(InvalidValueError, match="R_delta of layer 'one' is not finite"):
        diverged()
    assert (adapter.network.forward(probe) == before).all()


def test_state_has_a_constant_size():
    adapter = make()
    optimizer = clora.Optimizer(adapter, clora.adam(1e-2))
    sizes = []
    for t in range(4):
        x, y = data(t)
        with adapter.task(f"t{t}"):
            learn(adapter, optimizer, x, y, steps=1)
            adapter.observe([x])
        sizes.append(adapter.state_bytes())
    one, two, head = 6 * (10 + 12) + 36, 6 * (8 + 10) + 36, 27
    moments = 8 * (36 * 2 + 1) * 2 + 8 * (81 + 27 + 1)
    assert sizes == [4 * (one + two + head) + moments] * 4
    wider = make(max_rank=8).state_bytes() - make().state_bytes()  # two directions more, and what is known of them
    assert wider == 4 * 2 * (10 + 12 + 8 + 10) + 8 * 2 * 2 * (64 - 36)


def test_the_optimizer_state_of_the_routing_is_cleared_at_a_boundary():
    adapter = make("every-task")
    optimizer = clora.Optimizer(adapter, clora.adam(1e-2))
    with adapter.task("a"):
        learn(adapter, optimizer, *data(0), steps=3)
    adapter.begin_task("b")
    assert sorted(optimizer.state) == ["one.A", "one.B", "two.A", "two.B"]
    assert all(state.step == 3 for state in optimizer.state.values())


def test_plain_lora_trains_the_factors_alone():
    adapter = make("every-task", scheme="lora", stop_old=False, train_routing=False)
    optimizer = clora.Optimizer(adapter, clora.adam(1e-2))
    with adapter.task("a"):
        assert set(adapter.parameters()) == {"one.A", "one.B", "two.A", "two.B", "head.R_delta"}
        learn(adapter, optimizer, *data(0))
    for name in ("one", "two"):
        assert (core.routing(adapter.layers[name].adapter) == np.eye(6)).all()
        assert (adapter.layers[name].adapter.A != 0).any()


@pytest.mark.parametrize("train_routing", [True, False])
def test_the_lora_start_is_alive_in_the_first_task(train_routing):
    """A = 0 learns through R_delta = I; folding that before the first task would stop every gradient for good."""
    adapter = make("every-task", scheme="lora", stop_old=train_routing, train_routing=train_routing)
    optimizer = clora.Optimizer(adapter, clora.sgd(1e-2))
    with adapter.task("a"):
        learn(adapter, optimizer, *data(0), steps=1)
    assert (adapter.layers["two"].adapter.A != 0).any()


def test_the_routing_recorded_is_the_routing_used():
    """In float32 the sum R_old + R_delta is rounded; the memory holds that sum, not the exact one."""
    adapter = make("never")
    rng = np.random.default_rng(0)
    x = data(0)[0]
    for t in range(2):
        adapter.begin_task(f"t{t}")
        layer = adapter.layers["one"]
        layer.adapter = layer.adapter._replace(R_delta=rng.standard_normal((6, 6)).astype(np.float32))
        adapter.observe([x])
        C = adapter._observed["one"]
        before = adapter.moments("one")
        adapter.end_task()
        R = layer.adapter.R_old.astype(np.float64)
        assert (adapter.moments("one").P == before.P + R @ C).all()


# --- the same code on another library --------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["CPU_DEVICE", "device1", "no_float64"])
def test_a_whole_life_on_the_strict_namespace(device):
    where = strict.Device(device)
    put = lambda a, dtype=None: strict.asarray(a, dtype=dtype, device=where)  # noqa: E731
    rng = np.random.default_rng(0)
    draw = lambda *shape: put((rng.standard_normal(shape) / 3).astype(np.float32))  # noqa: E731
    modules = [clora.Layer(draw(10, 12), draw(10)), clora.Relu(), clora.Head(draw(3, 10))]
    adapter = clora.attach(clora.Network(modules), rank=4, rng=0)
    optimizer = clora.Optimizer(adapter, clora.adamw(1e-2))
    adapter.protect(optimizer, energy=0.6)
    for t in range(2):
        x, y = data(t)
        x, y = put(x), put(y)
        with adapter.task(f"t{t}"):
            first = clora.cross_entropy(adapter.network.forward(x), y)[0]
            last = learn(adapter, optimizer, x, y, weight=0.1)
            adapter.observe([x])
        assert float(last) < float(first)
    for name, layer in adapter.layers.items():
        for array in (*layer.adapter, *adapter.moments(name)):
            assert array is None or array.device == where
        expected = strict.float32 if device == "no_float64" else strict.float64
        assert adapter.moments(name).S.dtype == expected
        assert layer.adapter.R_old.dtype == strict.float32
    assert all(np.isfinite(value) for value in adapter.drift().values())
    adapter.restore("t0")
    adapter.merge()
    adapter.unmerge()


# --- growing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", ["first-task", "never", "every-task"])
def test_spare_directions_keep_the_meter_exact(factors):
    """Drawn at the start and always observed: expand changes neither the outputs (zeros are added) nor the meter."""
    adapter = make(factors, rank=3, max_rank=5)
    optimizer = clora.Optimizer(adapter, clora.sgd(1e-2))
    live(adapter, optimizer, tasks=2)
    x, _ = data(0)
    one, frames = adapter.layers["one"], {n: layer.adapter for n, layer in adapter.layers.items()}
    before = one.forward(x)
    meter = adapter.drift() if factors != "every-task" else None
    adapter.expand(1)
    for name, layer in adapter.layers.items():
        if frames[name].A is not None:
            assert layer.adapter.A.shape[1] == 4
            assert (layer.adapter.A[:, :3] == frames[name].A).all()
            assert not layer.adapter.R_old[3:].any()
            assert not layer.adapter.R_old[:, 3:].any()
    room = sum(bounds.linear(x, one.W, frame, one.bias) for frame in (frames["one"], one.adapter))
    assert (np.abs(one.forward(x) - before) <= room).all()
    if meter is not None:
        for name, value in adapter.drift().items():
            layer = adapter.layers[name]
            wide = core.Adapter(*(a if a is None else a.astype(np.float64) for a in layer.adapter))
            assert abs(value - meter[name]) <= 2 * bounds.drift(wide, adapter.moments(name))
        live_on(adapter, optimizer, 2)
    adapter.restore("t0")
    assert adapter.layers["one"].adapter.A.shape[1] == 3


def live_on(adapter, optimizer, t):
    x, y = data(t)
    with adapter.task(f"t{t}"):
        learn(adapter, optimizer, x, y, steps=3)
        adapter.observe([x])


def test_directions_drawn_later_are_unknown_to_earlier_tasks():
    """The meter would be wrong, so it raises; before the first task nothing is lost."""
    adapter = make(rank=3)
    adapter.expand(1, seed=1)
    live(adapter, clora.Optimizer(adapter, clora.sgd(1e-2)), tasks=1)
    assert adapter.drift()
    adapter.expand(1, seed=2)
    with pytest.raises(MomentsIncomplete, match="max_rank"):
        adapter.drift()
    assert np.isfinite(adapter.network.forward(data(0)[0])).all()


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("rule", [clora.adam(1e-2), clora.sgd(1e-2, momentum=0.9)])
def test_optimizers_start_afresh_at_another_rank(rank, rule):
    """What they held of the old shape would be added to the new one, or broadcast over it."""
    adapter = make("every-task", rank=rank)
    optimizer = clora.Optimizer(adapter, rule)
    live(adapter, optimizer, tasks=1)
    for grown in (True, False):
        adapter.expand(1, seed=0) if grown else adapter.restore("t0")
        assert not any(key.startswith(("one.", "two.")) for key in optimizer.state)
        live_on(adapter, optimizer, 1 + grown)
        shapes = {field: getattr(adapter.layers["one"].adapter, field).shape for field in ("A", "B")}
        for field, shape in shapes.items():
            state = optimizer.state[f"one.{field}"]
            assert (state.mean if hasattr(state, "mean") else state.buffer).shape == shape


def test_inputs_that_are_not_finite_are_not_recorded():
    adapter = make()
    adapter.begin_task("t0")
    x, _ = data(0)
    x[3, 2] = np.nan
    adapter.observe([x])
    with pytest.raises(InvalidValueError, match="what was observed of layer 'one' is not finite"):
        adapter.end_task()
    assert adapter.tasks == []
    assert np.isfinite(adapter.moments("one").S).all()


def test_a_folder_loads_where_there_is_no_float64(tmp_path):
    adapter = make()
    live(adapter, clora.Optimizer(adapter, clora.sgd(1e-2)), tasks=1)
    adapter.save(tmp_path / "folder")
    place = strict.Device("no_float64")
    there = lambda array: strict.asarray(np.array(array), device=place)  # noqa: E731
    modules = {
        name: clora.Layer(there(m.W), there(m.bias)) if isinstance(m, clora.Layer) else clora.Relu()
        for name, m in adapter.network.modules.items()
        if name != "head"
    }
    start = adapter.layers["head"]._start
    modules["head"] = clora.Head(there(start[:, :-1]), there(start[:, -1]))
    loaded = clora.load(modules, tmp_path / "folder")
    assert loaded.moments("one").S.dtype == strict.float32
    assert np.isfinite(loaded.drift()["one"])


def test_growth_out_of_order_is_told_and_changes_nothing():
    adapter = make(rank=3)
    before = [layer.adapter for layer in adapter.layers.values()]
    for by, seed, error, words in (
        (0, 0, RankError, "1 <= by"),
        (9, 0, RankError, "by=9 at rank 3"),
        (1, None, OptionError, "seed=None"),
    ):
        with pytest.raises(error, match=words):
            adapter.expand(by, seed=seed)
    adapter.merge()
    with pytest.raises(StateError, match="unmerge"):
        adapter.expand(1, seed=0)
    adapter.unmerge()
    adapter.begin_task("t0")
    with pytest.raises(StateError, match="end the task"):
        adapter.expand(1, seed=0)
    assert all(a is b for a, b in zip(before, [layer.adapter for layer in adapter.layers.values()], strict=True))


# --- bad input -------------------------------------------------------------------------------------------------


def network():
    return clora.Network(
        {"encoder": clora.Layer(np.ones((4, 5), np.float32)), "head": clora.Head(np.ones((2, 4), np.float32))}
    )


BAD = {
    "rank 0": (lambda: clora.attach(network(), rank=0, rng=0), RankError, "rank=0"),
    "rank too high": (lambda: clora.attach(network(), rank=5, rng=0), RankError, "1 <= rank <= 4"),
    "unknown factors": (lambda: clora.attach(network(), rank=1, rng=0, factors="second"), OptionError, "'first-task'"),
    "no match": (lambda: clora.attach(network(), rank=1, rng=0, targets=["encodr"]), OptionError, "near: encoder"),
    "integer weight": (lambda: clora.attach([clora.Layer(np.ones((4, 5), int))], rank=1, rng=0), TypeError, "int64"),
    "bias of another layer": (
        lambda: clora.Layer(np.ones((4, 5)), np.ones(5)),
        ShapeError,
        "needed W (d_out, d_in), bias (d_out,)",
    ),
    "nothing would learn": (
        lambda: clora.attach(network(), rank=1, rng=0, train_routing=False),
        OptionError,
        "every-task",
    ),
    "max_rank below the rank": (
        lambda: clora.attach(network(), rank=2, rng=0, max_rank=1),
        OptionError,
        "max_rank >= rank",
    ),
    "dead start": (
        lambda: clora.attach(network(), rank=1, rng=0, scheme="lora", factors="never"),
        OptionError,
        "A = 0",
    ),
    "backward first": (lambda: network().modules["head"].backward(np.ones((1, 2))), StateError, "forward"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case):
    call, error, words = BAD[case]
    with pytest.raises(error) as caught:
        call()
    for part in ("Got ", "needed ", "Usual cause: ", "Fix: "):
        assert part in str(caught.value)
    assert words in str(caught.value)


def test_verbs_out_of_order_are_told():
    adapter = make()
    optimizer = clora.Optimizer(adapter, clora.sgd(1e-2))
    x, y = data(0)
    calls = {
        "observe": lambda: adapter.observe([x]),
        "end_task": adapter.end_task,
        "penalty": adapter.penalty,
        "step": optimizer.step,
        "restore": lambda: adapter.restore("nothing"),
        "unmerge": adapter.unmerge,
        "attach": lambda: clora.attach(adapter.network, rank=1, rng=0),
    }
    for call in calls.values():
        with pytest.raises(StateError):
            call()
    with adapter.task("t"):
        inside = {
            "begin_task": lambda: adapter.begin_task("u"),
            "restore": lambda: adapter.restore("t"),
            "merge": adapter.merge,
            "observe nothing": lambda: adapter.observe([]),
        }
        for call in inside.values():
            with pytest.raises(StateError):
                call()
        with pytest.raises(OptionError):
            adapter.penalty(kind="orthogonal")
        adapter.observe([x])
    with pytest.raises(StateError, match="finished already"):
        adapter.begin_task("t")
    adapter.merge()
    for call in (adapter.merge, lambda: adapter.begin_task("u"), lambda: adapter.restore("t")):
        with pytest.raises(StateError):
            call()
    assert y.shape == (64,)


def test_a_task_without_memory_is_told():
    adapter = make()
    optimizer = clora.Optimizer(adapter, clora.sgd(1e-2))
    x, y = data(0)
    with adapter.task("seen"):
        adapter.observe([x])
        learn(adapter, optimizer, x, y, steps=1)  # makes the observation void
    for call in (adapter.drift, lambda: adapter.protect(optimizer)):
        with pytest.raises(MomentsIncomplete, match="'seen'"):
            call()


def test_factors_that_move_have_no_meter():
    adapter = make("every-task")
    optimizer = clora.Optimizer(adapter, clora.sgd(1e-2))
    with adapter.task("t"):
        learn(adapter, optimizer, *data(0), steps=1)
    for call in (adapter.drift, lambda: adapter.protect(optimizer)):
        with pytest.raises(StateError, match="every-task"):
            call()


def test_observe_averages_over_rows_not_over_batches():
    adapter = make("never", dtype=np.float64)
    x = np.random.default_rng(0).integers(-4, 5, (16, 12)) / 4
    adapter.layers["one"].adapter = adapter.layers["one"].adapter._replace(B=np.eye(6, 12))
    for batches in ([x], [x[:4], x[4:]], [x[:4], x[4:8], x[8:]]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapter.begin_task(f"t{len(batches)}")
            adapter.observe(batches)
            C = adapter._observed["one"]
            adapter.end_task()
        assert (x[:, :6].T @ x[:, :6] / 16 == C).all()
