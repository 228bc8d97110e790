"""clora_cupy on a real GPU: what the tests on the stand-in promise, on CuPy, cuBLAS, streams and DLPack themselves."""

import importlib.util
import json
import os
import subprocess
import sys
import warnings

import cupy_cases as cases
import kit
import numpy as np
import pytest
import test_cupy_kernels as common
import test_cupy_stage as staging

import clora_core as core
import clora_numpy
from clora_core import bounds
from clora_core.errors import DTypeError
from clora_numpy.optimizers import AdamNumbers, adam_arrays

pytestmark = pytest.mark.gpu

# The same tests as on the stand-in, with this module's fixtures: exact numbers, so cuBLAS must give them, too.
test_relu_is_its_formula = common.test_relu_is_its_formula
test_accumulate_is_its_formula = common.test_accumulate_is_its_formula
test_narrow_rounds_once = common.test_narrow_rounds_once
test_half_weights_have_a_float32_adapter = common.test_half_weights_have_a_float32_adapter
test_an_update_below_half_precision_counts = common.test_an_update_below_half_precision_counts
test_a_consumer_that_looks_late = staging.test_a_consumer_that_looks_late
test_any_layout = staging.test_any_layout


clora, kernels, stage = common.clora, common.kernels, staging.stage


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy", reason=kit.NO_CUPY)


def get(array):
    return array.get()


def gradients(put, n=32):
    rng = np.random.default_rng(1)
    return {name: put(rng.standard_normal((n, d)).astype(np.float32)) for name, d in (("one", 10), ("two", 8))}


# --- a life, step by step --------------------------------------------------------------------------------------


def check_life(clora, adapter, put):
    """Two tasks by SGD. Every layer's pass, step, fold, moment and meter against NumPy, each on CuPy's own inputs.

    Two whole lives would differ by more: rounding moves the inputs of the next step.
    """
    grads, rate, u = gradients(put), 1e-2, bounds.unit_roundoff(np.float32, np)
    optimizer = clora.Optimizer(adapter, clora.sgd(rate))
    compared = 0
    for t in range(2):
        x, y = map(put, cases.data(t))
        adapter.begin_task(f"t{t}")
        for _ in range(3):
            compared += _check_step(clora, adapter, optimizer, x, y, grads, rate, u)
        adapter.observe([x])
        compared += _check_end(adapter)
    adapter.begin_task("more")
    cases.step(clora, adapter, optimizer, x, y, weight=0.1)
    for name, layer in adapter.layers.items():
        arrays = core.Adapter(*(None if a is None else get(a).astype(np.float64) for a in layer.adapter))
        moments = core.Moments(*map(get, adapter.moments(name)))
        limit = bounds.drift(arrays, moments)
        assert abs(adapter.drift()[name] - core.drift(arrays, moments)) <= 2 * limit
    assert compared > 60


def _check_step(clora, adapter, optimizer, x, y, grads, rate, u):
    cases.step(clora, adapter, optimizer, x, y)
    adapter.network.forward(x)
    compared = cases.check_modules(clora, adapter, get, grads)
    before = {key: get(array) for key, array in adapter.parameters().items()}
    gradient = {f"{n}.{p}": get(g) for n, layer in adapter.layers.items() for p, g in layer.gradients.items()}
    assert gradient.keys() >= {"one.R_delta", "two.R_delta"}
    optimizer.step()
    for key, array in adapter.parameters().items():
        if key in gradient:
            # a product and a difference, rounded apart or by one fused operation
            limit = bounds.gamma(2, u) * (np.abs(before[key]) + rate * np.abs(gradient[key]))
            cases.within(get(array), before[key] - np.float32(rate) * gradient[key], limit)
            compared += 1
    return compared


def _check_end(adapter):
    routed = {name: get(layer.routed_input()).astype(np.float64) for name, layer in adapter.layers.items()}
    for name, layer in adapter.layers.items():
        cases.within(get(adapter._observed[name]), core.second_moment(routed[name]), bounds.second_moment(routed[name]))
        before = core.Adapter(*(None if a is None else get(a) for a in layer.adapter))
        layer.before = before, core.Moments(*map(get, adapter.moments(name))), get(adapter._observed[name])
    adapter.end_task()
    for name, layer in adapter.layers.items():
        before, moments, C = layer.before
        assert np.array_equal(get(layer.adapter.R_old), before.R_old + before.R_delta), "one sum, one rounding"
        wide = core.end_task(before)
        wide = core.Adapter(*(None if a is None else a.astype(np.float64) for a in wide))
        after, limits = core.record(moments, wide, C), bounds.record(moments, wide, C)
        for mine, theirs, limit in zip(adapter.moments(name), after, limits, strict=True):
            cases.within(get(mine), theirs, limit)
    return 3 * len(adapter.layers)


@pytest.mark.parametrize("factors", ["first-task", "never"])
def test_a_life_is_that_of_numpy_within_bounds(clora, cupy, factors):
    check_life(clora, cases.make(clora, cupy.asarray, factors=factors), cupy.asarray)


def test_learning_lowers_the_loss_and_protection_holds(clora, cupy):
    adapter = cases.make(clora, cupy.asarray)
    optimizer = clora.Optimizer(adapter, clora.adam(1e-2))
    adapter.protect(optimizer, energy=0.7)
    x, y = map(cupy.asarray, cases.data(0))
    first = float(clora.cross_entropy(adapter.network.forward(x), y)[0])
    cases.live(clora, adapter, optimizer, cupy.asarray, tasks=1, steps=60)
    assert float(clora.cross_entropy(adapter.network.forward(x), y)[0]) < first / 2
    other = map(cupy.asarray, cases.data(3))
    with adapter.task("second"):
        cases.step(clora, adapter, optimizer, *other)
        for name, layer in adapter.layers.items():
            basis = core.Basis(*(get(array).astype(np.float32) for array in optimizer._bases[name]))
            R = get(layer.adapter.R_delta)
            size = 2 * np.abs(R) + 0.1  # R_delta before it was projected: its own size, and a step of 1e-2 per entry
            assert (np.abs(core.project(R, basis) - R) <= 2 * bounds.project(size, basis)).all()
        adapter.observe([x])


def test_merging_restoring_and_saving(clora, cupy, tmp_path):
    adapter = cases.make(clora, cupy.asarray)
    cases.live(clora, adapter, clora.Optimizer(adapter, clora.adam(1e-2)), cupy.asarray)
    layer, x = adapter.layers["one"], cupy.asarray(cases.data(5)[0])
    pristine, arrays = get(layer.W), core.Adapter(*map(get, layer.adapter))
    adapter.merge()
    cases.within(get(layer.W), core.merge(pristine, arrays).weight, bounds.merge(pristine, arrays))
    adapter.unmerge()
    assert np.array_equal(get(layer.W), pristine)
    adapter.save(tmp_path / "cupy")
    modules = cases.make(clora_numpy).network.modules
    for name in ("one", "two"):
        modules[name].adapter = None
    cases.equal(cases.everything(clora_numpy.load(modules, tmp_path / "cupy")), cases.everything(adapter, get))
    now = get(adapter.network.forward(x))
    adapter.restore("t0")
    assert (get(adapter.network.forward(x)) != now).any()
    adapter.restore("t1")
    cases.within(get(adapter.network.forward(x)), now, np.zeros_like(now))


# --- waiting, devices, streams, memory -------------------------------------------------------------------------


@pytest.mark.parametrize("rule", cases.RULES)
@pytest.mark.parametrize("penalty", [{"weight": 0.1}, {"weight": 0.1, "kind": "orthogonality", "form": "output"}])
def test_a_step_does_not_wait(clora, cupy, rule, penalty):
    """CuPy's own detector, which knows of copies to the host; deprecated, but there in 13 and 14."""
    import cupyx

    adapter = cases.make(clora, cupy.asarray)
    optimizer = clora.Optimizer(adapter, cases.RULES[rule](clora))
    adapter.protect(optimizer, energy=0.7)
    cases.live(clora, adapter, optimizer, cupy.asarray, tasks=1)
    x, y = map(cupy.asarray, cases.data(1))
    with adapter.task("second"):
        cases.step(clora, adapter, optimizer, x, y, **penalty)  # compiles, and makes cuBLAS's workspace
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with cupyx.allow_synchronize(False):
                for _ in range(3):
                    cases.step(clora, adapter, optimizer, x, y, **penalty)
                adapter.observe([x])
                with pytest.raises(cupyx.DeviceSynchronized):
                    x.get()


def test_another_device(clora, cupy, tmp_path):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip(kit.NO_SECOND_GPU)

    def put(array):
        with cupy.cuda.Device(1):
            return cupy.asarray(array)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # CuPy's PerformanceWarning of peer access: something ran on device 0
        adapter = cases.make(clora, put)
        check_life(clora, adapter, put)
        adapter.end_task()
        adapter.save(tmp_path / "there")
        for layer in adapter.layers.values():
            assert all(array is None or array.device.id == 1 for array in layer.adapter)
        assert cupy.cuda.Device().id == 0


def test_another_stream(clora, cupy):
    """Behind a long wait on the null stream, which a non-blocking stream does not share."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        check_life(clora, cases.make(clora, cupy.asarray), cupy.asarray)
    stream.synchronize()
    assert cupy.cuda.get_current_stream() == cupy.cuda.Stream.null


def test_the_memory_pool_is_left_alone_and_does_not_grow(clora, cupy):
    adapter = cases.make(clora, cupy.asarray)
    optimizer = clora.Optimizer(adapter, clora.adam(1e-3))
    x, y = map(cupy.asarray, cases.data(0))
    allocator, pool = cupy.cuda.get_allocator(), cupy.get_default_memory_pool()
    with adapter.task("t"):
        for _ in range(5):
            cases.step(clora, adapter, optimizer, x, y)
        size = pool.total_bytes()
        for _ in range(50):
            cases.step(clora, adapter, optimizer, x, y)
        assert pool.total_bytes() == size
        adapter.observe([x])
    assert cupy.cuda.get_allocator() == allocator


def test_staging_beside_work(stage, cupy):
    """Large batches, a busy consumer on a stream of its own, an early break; sums tell whether all arrived."""
    rng = np.random.default_rng(0)
    sent = [rng.integers(-8, 9, (2000 + 100 * i, 256)).astype(np.float32) for i in range(8)]
    weight = cupy.asarray(rng.integers(-1, 2, (256, 256)).astype(np.float32))
    stream, sums = cupy.cuda.Stream(non_blocking=True), []
    cupy.cuda.Device().synchronize()
    with stream:
        for x in stage(sent, depth=3):
            busy = x @ weight @ weight @ weight
            sums += [cupy.sum(x + 0 * busy)]  # integers below 2^24: exact in any order
        for _ in stage(sent, depth=3):
            break
        for x, array in zip(stage(sent, depth=1), sent, strict=True):
            assert np.array_equal(x.get(), array)
    for total, array in zip(sums, sent, strict=True):
        assert float(total) == array.astype(np.float64).sum()


# --- kernels, half precision, exchange -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_adam_is_its_formula_within_roundings(kernels, cupy, dtype):
    """All terms positive: each side makes at most 16 roundings of the parts, and a device may fuse some of them."""
    rng = np.random.default_rng(0)
    p, g, m, v = (cupy.asarray(rng.uniform(0.5, 1, (64, 32)).astype(dtype)) for _ in range(4))
    numbers = AdamNumbers(0.9, 0.999, 0.25, 0.75, rate=0.02, scale=0.3, eps=1e-8)
    u = bounds.unit_roundoff(dtype, np)
    mine, theirs = kernels.adam(p, g, m, v, numbers), adam_arrays(*map(get, (p, g, m, v)), numbers)
    size = (theirs[0] + 2 * (0.75 * get(p) - theirs[0]), theirs[1], theirs[2])
    for a, b, s in zip(mine, theirs, size, strict=True):
        assert a.dtype == dtype
        cases.within(get(a), b, bounds.gamma(16, u) * np.abs(s))


def test_a_life_in_half_precision(clora, cupy):
    adapter = cases.make(clora, cupy.asarray, dtype=np.float16)
    optimizer = clora.Optimizer(adapter, clora.adam(1e-2))
    x, y = map(cupy.asarray, cases.data(0, dtype=np.float16))
    first = float(clora.cross_entropy(adapter.network.forward(x), y)[0])
    cases.live(clora, adapter, optimizer, cupy.asarray, dtype=np.float16, steps=40, weight=0.1)
    adapter.restore("t0")
    assert float(clora.cross_entropy(adapter.network.forward(x), y)[0]) < first
    layer = adapter.layers["one"]
    W, x, b = (get(array).astype(np.float64) for array in (layer.W, layer.input, layer.bias))
    arrays = core.Adapter(*(get(array).astype(np.float64) for array in layer.adapter))
    got, exact = get(layer.forward(layer.input)), core.linear(x, W, arrays, b)
    single, half = bounds.unit_roundoff(np.float32, np), bounds.unit_roundoff(np.float16, np)
    # sums of d_in + 2 r + 4 terms in float32; then x W^T and the whole are each rounded to half precision
    size = core.linear(np.abs(x), np.abs(W), core.Adapter(*map(np.abs, arrays)), np.abs(b))
    limit = (bounds.gamma(12 + 2 * 4 + 4, single) + bounds.gamma(2, half)) * size
    assert got.dtype == np.float16
    assert (np.abs(got - exact) <= 2 * limit).all()
    W = get(layer.W)
    adapter.merge()
    adapter.unmerge()
    assert np.array_equal(get(layer.W), W)


def test_arrays_are_shared_with_torch(clora, cupy):
    if kit.torch is None:
        pytest.skip(kit.NO_TORCH)
    torch = kit.torch
    if not torch.cuda.is_available():
        pytest.skip(kit.NO_GPU)  # a build of PyTorch without CUDA
    parameter = torch.nn.Parameter(torch.arange(6.0, device="cuda").reshape(2, 3))
    mine = clora.share(parameter)
    assert isinstance(mine, cupy.ndarray)
    assert mine.data.ptr == parameter.data_ptr()
    assert np.array_equal(get(mine), parameter.detach().cpu().numpy())
    adapter = cases.make(clora, cupy.asarray).layers["one"].adapter
    theirs = clora.share(adapter, "torch")
    assert isinstance(theirs, core.Adapter)
    for array, tensor in zip(adapter, theirs, strict=True):
        assert tensor.is_cuda
        assert tensor.data_ptr() == array.data.ptr
    back = clora.share(theirs)
    assert all(a.data.ptr == b.data.ptr for a, b in zip(adapter, back, strict=True))
    moments = clora.share(core.empty_moments(adapter), "torch")
    assert all((tensor == 0).all() for tensor in moments)
    with pytest.raises(DTypeError, match="bfloat16"):
        clora.share(torch.ones(2, device="cuda", dtype=torch.bfloat16))


def test_arrays_are_shared_with_jax(clora, cupy):
    if kit.jax is None:
        pytest.skip(kit.NO_JAX)
    jax = kit.jax
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        pytest.skip(kit.NO_GPU)  # a build of JAX without CUDA
    theirs = jax.device_put(np.arange(6, dtype=np.float32).reshape(2, 3), device)
    mine = clora.share(theirs)
    assert mine.data.ptr == theirs.unsafe_buffer_pointer()
    assert np.array_equal(get(mine), np.asarray(theirs))
    adapter = cases.make(clora, cupy.asarray).layers["one"].adapter
    for array, other in zip(adapter, clora.share(adapter, "jax"), strict=True):
        assert other.unsafe_buffer_pointer() == array.data.ptr
        assert np.array_equal(np.asarray(other), get(array))


# --- the command, and no device --------------------------------------------------------------------------------


def test_the_demo(cupy, tmp_path):
    if importlib.util.find_spec("mlxtend") is None or importlib.util.find_spec("typer") is None:
        pytest.skip(kit.NO_STUDY)
    arguments = ["--backend", "cupy", "--quick", "--tasks", "2", "--rank", "8", "--method", "c-lora", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "clora", "demo", *arguments, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["backend"] == "cupy"
    assert result["methods"]["c-lora"]["accuracy"][0][0] > 0.2


def test_hidden_devices_are_told(cupy):
    done = subprocess.run(
        [sys.executable, "-c", "import clora_cupy"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1
    assert "MissingDependencyError: clora_cupy: CuPy finds no device" in done.stderr
    assert "clora_numpy" in done.stderr
