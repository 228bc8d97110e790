"""clora_cupy on a stand-in for CuPy: the same bits as clora_numpy, on its own device, without waiting for it."""

import inspect

import cupy_cases as cases
import cupy_double as double
import numpy as np
import pytest

import clora_core as core
import clora_numpy

MODES = [
    ("first-task", {"weight": 0.1}),
    ("first-task", {"weight": 0.1, "head_weight": 0.5, "since": "task-ends"}),
    ("never", {}),
    ("every-task", {"weight": 0.1, "kind": "orthogonality"}),
    ("every-task", {"weight": 0.1, "kind": "orthogonality", "form": "output"}),
]


@pytest.fixture(autouse=True)
def cupy():
    """Arrays live on device 1, and device 0 is current throughout."""
    with double.installed() as module:
        assert module.cuda.Device().id == 0
        yield module
        assert module.cuda.Device().id == 0, "a verb left another device behind"


@pytest.fixture
def clora(cupy):
    import clora_cupy

    return clora_cupy


def put(array):
    with double.Device(1):
        return double.cupy.asarray(array)


def get(array):
    return array.get()


@pytest.mark.parametrize("rule", cases.RULES)
@pytest.mark.parametrize(("factors", "penalty"), MODES)
def test_a_whole_life_has_the_bits_of_numpy(clora, rule, factors, penalty):
    pair = []
    for library, where, back in ((clora_numpy, cases.same, cases.same), (clora, put, get)):
        adapter = cases.make(library, where, factors=factors)
        optimizer = library.Optimizer(adapter, cases.RULES[rule](library))
        if factors != "every-task":
            adapter.protect(optimizer, energy=0.7)
        cases.live(library, adapter, optimizer, where, **penalty)
        pair.append((adapter, cases.everything(adapter, back), where, back))
    (mine, arrays, _, _), (theirs, other, _, _) = pair
    cases.equal(arrays, other)
    x = cases.data(7)[0]
    for change in (lambda a: None, lambda a: a.restore("t0"), lambda a: a.restore("t1"), lambda a: a.merge()):
        change(mine)
        change(theirs)
        assert np.array_equal(mine.network.forward(x), theirs.network.forward(put(x)).get())
    with mine.disabled(), theirs.disabled():  # the pristine weight, though merged
        assert np.array_equal(mine.network.forward(x), theirs.network.forward(put(x)).get())
    mine.unmerge()
    theirs.unmerge()
    with mine.disabled(), theirs.disabled():
        assert np.array_equal(mine.network.forward(x), theirs.network.forward(put(x)).get())
    if factors != "every-task":
        assert mine.drift() == theirs.drift()
    assert mine.state_bytes() == theirs.state_bytes()


@pytest.mark.parametrize("rule", cases.RULES)
@pytest.mark.parametrize(("factors", "penalty"), MODES)
def test_a_step_neither_waits_nor_copies(clora, rule, factors, penalty):
    """In the second task, where all that can be at work is; the first step of a task may prepare things."""
    adapter, optimizer, x, y = cases.second_task(clora, put, rule, factors, penalty)
    double.reset()
    adapter.begin_task("second")
    assert len(double.SYNCS) == (1 if factors != "every-task" else 0), "one look for a full space, if protected"
    losses = []
    for _ in range(3):
        double.reset()
        losses.extend(cases.step(clora, adapter, optimizer, x, y, **penalty))
        assert double.SYNCS == []
        assert double.UPLOADS == []
        assert {device for device, _ in double.WORK} == {1}
    assert all(isinstance(loss, double.ndarray) and loss.shape == () for loss in losses)
    double.reset()
    if factors != "every-task":
        adapter.observe([x])
    assert double.SYNCS == []
    adapter.end_task()
    assert len(double.SYNCS) == 1, "one look for what is not finite"
    assert double.UPLOADS == []


def test_the_current_stream_of_the_device_does_all_of_it(clora, cupy):
    with cupy.cuda.Device(1):
        stream = cupy.cuda.Stream(non_blocking=True)
        other = cupy.asarray(np.ones((4, 12), np.float32))
    adapter = cases.make(clora, put)
    optimizer = clora.Optimizer(adapter, clora.adam(1e-2))
    with cupy.cuda.Device(1), stream, cupy.cuda.Device(0):  # current on device 1 while device 0 is current
        x, y = map(put, cases.data(0))
        double.reset()
        with adapter.task("t"):
            cases.step(clora, adapter, optimizer, x, y)
            adapter.observe([x])
        assert set(double.WORK) == {(1, stream)}
    double.reset()
    adapter.network.forward(other)
    assert all(s.null for _, s in double.WORK)


def test_what_the_context_managers_enclose_is_the_users(clora, cupy):
    adapter = cases.make(clora, put)
    with adapter.task("t"):
        assert cupy.cuda.Device().id == 0
        adapter.observe([put(cases.data(0)[0])])
    with adapter.disabled():
        assert cupy.cuda.Device().id == 0


def test_every_verb_is_run_on_the_device_or_needs_none(clora):
    needs_none = {"parameters", "state_bytes", "task", "disabled", "unmerge"}
    for kind in ("ContinualAdapter", "Optimizer", "Layer", "Head"):
        mine, base = getattr(clora, kind), getattr(clora_numpy, kind)
        for name, _ in inspect.getmembers(base, inspect.isfunction):
            if not name.startswith("_") and name not in needs_none:
                own = vars(mine).get(name)
                assert hasattr(own, "__wrapped__"), f"{kind}.{name} runs wherever it is called"
    assert set(clora_numpy.__all__) <= set(clora.__all__)


def test_protection_holds_after_steps(clora):
    adapter = cases.make(clora, put, factors="never")
    optimizer = clora.Optimizer(adapter, clora.adamw(1e-2))
    adapter.protect(optimizer, energy=0.7)
    cases.live(clora, adapter, optimizer, put, tasks=1)
    x, y = map(put, cases.data(3))
    with adapter.task("second"):
        for _ in range(10):
            before = {n: layer.adapter.R_delta.get() for n, layer in adapter.layers.items()}
            cases.step(clora, adapter, optimizer, x, y)
        for name, layer in adapter.layers.items():
            basis = core.protected_basis(adapter.moments(name).S.get(), energy=0.7)
            U, weights = (array.astype(np.float32) for array in basis)
            assert 0 < weights.sum() < len(weights)
            R = layer.adapter.R_delta.get()
            again = core.project(R, core.Basis(U, weights))
            # R came out of project once: of its own size before that, at most 2 |R| + a step of 1e-2 per entry
            size = 2 * (np.abs(R) + np.abs(before[name]) + 0.1)
            assert (np.abs(again - R) <= core.bounds.project(size, core.Basis(U, weights))).all()
            assert (R != 0).any()
        adapter.observe([x])


def test_a_folder_goes_to_numpy_and_back(clora, tmp_path):
    adapter = cases.make(clora, put)
    cases.live(clora, adapter, clora.Optimizer(adapter, clora.sgd(1e-2)), put)
    adapter.save(tmp_path / "one")
    fresh = cases.make(clora_numpy).network.modules
    for layer in ("one", "two"):
        fresh[layer].adapter = None
    loaded = clora_numpy.load(fresh, tmp_path / "one")
    cases.equal(cases.everything(loaded), cases.everything(adapter, get))
    assert loaded._kept[1]["framework"] == f"cupy {double.cupy.__version__}"
    loaded.save(tmp_path / "two")
    modules = cases.make(clora, put).network.modules
    for layer in ("one", "two"):
        modules[layer].adapter = None
    back = clora.load(modules, tmp_path / "two")
    cases.equal(cases.everything(back, get), cases.everything(adapter, get))
    assert all(array.device.id == 1 for layer in back.layers.values() for array in layer.adapter if array is not None)
    x = put(cases.data(7)[0])
    for name in ("t0", "t1"):
        back.restore(name)
        adapter.restore(name)
        assert np.array_equal(back.network.forward(x).get(), adapter.network.forward(x).get())
    assert type(back) is clora.ContinualAdapter
    adapter.export_peft(tmp_path / "peft", heads=False)
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()


def test_modules_alone_go_to_their_arrays_device(clora):
    """Without a network around them; gradients and routed inputs, too."""
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((5, 12)).astype(np.float32), rng.standard_normal((5, 10)).astype(np.float32)
    W = rng.standard_normal((10, 12)).astype(np.float32)
    pairs = [(clora_numpy.Relu(), clora.Relu(), x), (clora_numpy.Head(W), clora.Head(put(W)), g)]
    pairs.append((cases.make(clora_numpy).layers["one"], cases.make(clora, put).layers["one"], g))
    for mine, theirs, grad in pairs:
        assert np.array_equal(mine.forward(x), theirs.forward(put(x)).get())
        assert np.array_equal(mine.backward(grad), theirs.backward(put(grad)).get())
        if not isinstance(mine, clora_numpy.Relu):
            assert np.array_equal(mine.routed_input(), theirs.routed_input().get())
            assert np.array_equal(mine.gradients["R_delta"], theirs.gradients["R_delta"].get())


def test_growing_has_the_bits_of_numpy(clora):
    pair = []
    for library, where, back in ((clora_numpy, cases.same, cases.same), (clora, put, get)):
        adapter = cases.make(library, where, rank=3, max_rank=5)
        optimizer = library.Optimizer(adapter, library.sgd(1e-2))
        cases.live(library, adapter, optimizer, where)
        adapter.expand(1)
        adapter.expand(2, seed=4)
        pair.append(cases.everything(adapter, back))
    cases.equal(*pair)
    assert pair[0]["one.A"].shape == (10, 6)


def test_leading_axes_and_no_rows(clora):
    adapter, other = cases.make(clora, put), cases.make(clora_numpy)
    layer, twin = adapter.layers["one"], other.layers["one"]
    for shape in ((2, 5, 12), (2, 0, 12), (0, 12), (1, 12)):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        g = np.random.default_rng(1).standard_normal((*shape[:-1], 10)).astype(np.float32)
        layer.gradients, twin.gradients = {}, {}
        y, dx = layer.forward(put(x)), layer.backward(put(g))
        assert y.shape == g.shape
        assert dx.shape == x.shape
        cases.within(y.get(), twin.forward(x), core.bounds.linear(x, twin.W, twin.adapter, twin.bias))
        limit = core.bounds.linear_vjp(x, twin.W, twin.adapter, g, wrt=("x", "R_delta"))
        cases.within(dx.get(), twin.backward(g), limit.x)
        cases.within(layer.gradients["R_delta"].get(), twin.gradients["R_delta"], limit.R_delta)


@pytest.mark.parametrize("n", [3, 400])
def test_every_order_of_contraction_is_within_bounds(clora, n):
    """Few rows: the weight's share is accumulated; many: the plan merges, and the weight goes into the product."""
    adapter = cases.make(clora, put, rank=8)
    x = put(np.random.default_rng(0).standard_normal((n, 12)).astype(np.float32))
    orders = {core.plan(n, *shape, 8, dtype="float32", wrt=("x", "R_delta")).order for shape in ((10, 12), (8, 10))}
    assert ("merged" in orders) == (n == 400)
    adapter.network.forward(x)
    rng = np.random.default_rng(1)
    grads = {name: put(rng.standard_normal((n, d)).astype(np.float32)) for name, d in (("one", 10), ("two", 8))}
    assert cases.check_modules(clora, adapter, get, grads) == 10


def test_the_double_is_strict(cupy):
    """What the tests above rely on."""
    there, here = put(np.ones(3)), cupy.asarray(np.ones(3))
    for call in (lambda: there + here, lambda: cupy.sum(there), lambda: there.astype(np.float32), lambda: there > 0):
        with pytest.raises(ValueError, match="not the current device"):
            call()
    for call in (lambda: here + np.ones(3), lambda: np.ones(3) + here, lambda: np.asarray(here), lambda: np.sum(here)):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(TypeError, match="device"):
        cupy.zeros(3, device=cupy.cuda.Device(1))
    with pytest.raises(ValueError, match="batch"):
        cupy.linalg.solve(cupy.ones((2, 3, 3)), cupy.ones((3, 3)))
    double.reset()
    for call in (here.get, lambda: bool(here[0]), lambda: float(here[0]), lambda: int(here[0]), here[0].item):
        call()
    assert len(double.SYNCS) == 5
    assert there.T.device.id == there[1:].device.id == there.reshape(3, 1).device.id == 1


def test_the_double_leaves_nothing_behind():
    import sys

    import array_api_compat

    import clora_cupy

    assert clora_cupy is sys.modules["clora_cupy"]
    with double.installed():
        assert sys.modules["cupy"] is double.cupy
    assert sys.modules["cupy"] is double.cupy  # the outer one's
    assert "clora_cupy" in sys.modules
    names = [name for name in sys.modules if name.startswith("array_api_compat.cupy")]
    assert names
    assert array_api_compat.cupy.ndarray is double.ndarray
