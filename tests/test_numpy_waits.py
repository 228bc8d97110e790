"""clora_numpy's training code on array-api-strict: no step turns an array into a Python number, or moves one.

On a GPU each of these would make the host wait. Counted in the library's own methods, on its second device.
"""

from collections import Counter

import array_api_strict as strict
import cupy_cases as cases
import numpy as np
import pytest

import clora_numpy as clora

STRICT = type(strict.asarray(0.0))
DEVICE = strict.Device("device1")
CONVERSIONS = ("__bool__", "__float__", "__int__", "__index__", "__complex__", "__array__", "to_device", "__dlpack__")
MODES = [
    ("first-task", {"weight": 0.1}),
    ("never", {"weight": 0.1, "since": "task-ends"}),
    ("every-task", {"weight": 0.1, "kind": "orthogonality"}),
    ("every-task", {"weight": 0.1, "kind": "orthogonality", "form": "output"}),
]


def put(array):
    return strict.asarray(array, device=DEVICE)


def get(array):
    return np.asarray(array.to_device(strict.Device("CPU_DEVICE")))


@pytest.fixture
def counted(monkeypatch):
    """How often each conversion was asked for."""
    calls = Counter()
    for name in CONVERSIONS:
        original = getattr(STRICT, name, None)
        if original is not None:
            monkeypatch.setattr(STRICT, name, _counting(calls, name, original))
    return calls


def _counting(calls, name, original):
    def run(*args, **kwargs):
        calls[name] += 1
        return original(*args, **kwargs)

    return run


@pytest.mark.parametrize("rule", cases.RULES)
@pytest.mark.parametrize(("factors", "penalty"), MODES)
def test_a_step_converts_nothing(counted, rule, factors, penalty):
    adapter, optimizer, x, y = cases.second_task(clora, put, rule, factors, penalty)
    adapter.begin_task("second")
    counted.clear()
    for _ in range(2):
        losses = cases.step(clora, adapter, optimizer, x, y, **penalty)
    if factors != "every-task":
        adapter.observe([x])
    assert counted == {}
    assert all(loss.device == DEVICE for loss in losses)
    adapter.end_task()
    assert counted == {"__bool__": 1}


def test_what_is_not_finite_is_found_by_name(counted):
    adapter = cases.make(clora, put)
    adapter.begin_task("t")
    layer = adapter.layers["two"]
    layer.adapter = layer.adapter._replace(B=layer.adapter.B * float("nan"))
    with pytest.raises(clora.continual.InvalidValueError, match="B of layer 'two' is not finite"):
        adapter.end_task()


def test_a_life_on_the_second_device_is_saved_and_loaded(tmp_path):
    """The same numbers as on NumPy, and back on the device they are to be on."""
    adapter, twin = cases.make(clora, put), cases.make(clora)
    for one, where in ((adapter, put), (twin, cases.same)):
        cases.live(clora, one, clora.Optimizer(one, clora.sgd(1e-2, momentum=0.9)), where, weight=0.1)
    cases.equal(cases.everything(adapter, get), cases.everything(twin))
    adapter.save(tmp_path / "strict")
    modules = cases.make(clora, put).network.modules
    for name in ("one", "two"):
        modules[name].adapter = None
    loaded = clora.load(modules, tmp_path / "strict")
    cases.equal(cases.everything(loaded, get), cases.everything(twin))
    for layer in loaded.layers.values():
        assert all(array is None or array.device == DEVICE for array in layer.adapter)
    loaded.restore("t0")
    twin.restore("t0")
    x = cases.data(5)[0]
    assert np.array_equal(get(loaded.network.forward(put(x))), twin.network.forward(x))
