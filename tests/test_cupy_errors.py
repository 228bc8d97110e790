"""What clora_cupy says where CuPy, a driver or a device is missing, or arrays are in the wrong place."""

import importlib
import subprocess
import sys
import types

import cupy_cases as cases
import cupy_double as double
import kit
import numpy as np
import pytest

import clora_core as core
from clora_core.errors import (
    CloraError,
    DeviceError,
    DTypeError,
    MissingDependencyError,
    NamespaceError,
    OptionError,
    ShapeError,
    StateError,
)

PARTS = ("Got ", "needed ", "Usual cause: ", "Fix: ")


@pytest.fixture
def cupy():
    with double.installed() as module:
        yield module


@pytest.fixture
def clora(cupy):
    import clora_cupy

    return clora_cupy


def put(array, device=1):
    with double.Device(device):
        return double.cupy.asarray(array)


# --- nothing to run on -----------------------------------------------------------------------------------------


def fake(version="14.2.0", count=None, driver=0, lacks=None):
    """A CuPy that imports, as the real wheels do without a GPU; the real error is a RuntimeError."""

    def get_count():
        if count is None:
            raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")
        return count

    runtime = types.SimpleNamespace(getDeviceCount=get_count, driverGetVersion=lambda: driver)
    module = types.ModuleType("cupy")
    module.__version__ = version
    module.cuda = types.ModuleType("cupy.cuda")
    module.cuda.runtime = runtime

    def get_version():
        if lacks == "nvrtc":
            raise RuntimeError("CuPy failed to load libnvrtc.so.12")

    def library(name):
        raise ImportError(f"lib{name}.so.12: cannot open shared object file")

    module.cuda.nvrtc = types.SimpleNamespace(getVersion=get_version)
    module.cuda.__getattr__ = library if lacks == "cusolver" else lambda name: None
    module.__path__ = []  # where no cublas is found
    return module


MISSING = {
    "no driver": (fake(), ["CuPy 14.2.0, no NVIDIA driver", "cudaErrorInsufficientDriver", "install the driver"]),
    "an old driver": (fake(driver=12040), ["a driver for CUDA 12.4", "cudaErrorInsufficientDriver", "cupy12"]),
    "hidden devices": (fake(count=0, driver=13000), ["0 devices", "CUDA_VISIBLE_DEVICES"]),
    "no cuBLAS": (fake(count=1), ["a library of CUDA is not there", "cublas", "cupy-cuda12x[ctk]", "toolkit"]),
    "no cuSOLVER": (fake(count=1, lacks="cusolver"), ["libcusolver.so.12", "cupy-cuda13x[ctk]"]),
    "no NVRTC": (fake(count=1, lacks="nvrtc"), ["libnvrtc.so.12", "[ctk]"]),
    "an old CuPy": (fake(version="12.3.0", count=1), ["CuPy 12.3.0", "cupy12", "cupy13"]),
    "no CuPy": (None, ["not installed", "clora[cupy12]", "cupy-cuda12x", "clora[cupy13]", "cupy-cuda13x"]),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_told_at_import(case):
    module, words = MISSING[case]
    with double.installed(), pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] in ("cupy", "clora_cupy")]:
            patch.delitem(sys.modules, name)
        if module is None:
            patch.setattr(importlib, "import_module", _no_cupy(importlib.import_module))
        else:
            patch.setitem(sys.modules, "cupy", module)
            if case in ("no cuSOLVER", "no NVRTC"):
                patch.setitem(sys.modules, "cupy.cublas", types.ModuleType("cupy.cublas"))
        with pytest.raises(MissingDependencyError) as caught:
            import clora_cupy  # noqa: F401
        for name in [name for name in sys.modules if name.split(".")[0] == "clora_cupy"]:
            del sys.modules[name]
    assert isinstance(caught.value, ImportError)
    for part in (*PARTS, *words, "clora_numpy", "CuPy 13 or newer with CUDA's libraries"):
        assert part in str(caught.value)


def _no_cupy(importer):
    def run(name, package=None):
        if name == "cupy":
            raise ModuleNotFoundError("No module named 'cupy'", name="cupy")
        return importer(name, package)

    return run


def test_a_broken_install_is_told():
    with double.installed(), pytest.MonkeyPatch.context() as patch:
        from clora_cupy import _library

        def broken(name):
            raise ImportError("libcublas.so.12: cannot open shared object file\nmany lines")

        patch.setattr(_library.importlib, "import_module", broken)
        with pytest.raises(MissingDependencyError, match=r"does not import\. Got libcublas.so.12[^\n]*uninstall every"):
            _library.load()


def test_nothing_else_imports_cupy():
    """The base packages, and the command, load neither CuPy nor clora_cupy."""
    code = (
        "import sys, clora_core, clora_store, clora_numpy, clora, clora.trainers;"
        "print([m for m in ('cupy', 'clora_cupy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- arrays in the wrong place ---------------------------------------------------------------------------------

X = np.ones((4, 12), np.float32)
W = np.ones((10, 12), np.float32)

WRONG = {
    "layers on two devices": (
        lambda c: c.attach({"a": c.Layer(put(W, 0)), "b": c.Layer(put(W, 1))}, rank=1, rng=0),
        DeviceError,
        "a on device 0, b on device 1",
    ),
    "a head elsewhere": (
        lambda c: c.Network({"where": c.Layer(put(W, 0)), "device": c.Head(put(W, 1))}),
        DeviceError,
        "where on device 0, device on device 1",
    ),
    "a bias elsewhere": (lambda c: c.Layer(put(W, 0), put(W[:, 0], 1)), DeviceError, "bias on device 1"),
    "inputs elsewhere": (lambda c: c.Network([c.Layer(put(W, 1))]).forward(put(X, 0)), DeviceError, "needed device 1"),
    "inputs of a layer": (lambda c: c.Layer(put(W, 1)).forward(put(X, 0)), DeviceError, "x on device 0"),
    "inputs of a head": (lambda c: c.Head(put(W, 1)).forward(put(X, 0)), DeviceError, "x on device 0"),
    "labels elsewhere": (
        lambda c: c.cross_entropy(put(X, 1), put(np.zeros(4, int), 0)),
        DeviceError,
        "labels on device 0",
    ),
    "a NumPy weight": (lambda c: c.Layer(W), NamespaceError, "numpy.ndarray"),
    "NumPy inputs": (lambda c: c.Layer(put(W)).forward(X), NamespaceError, "stage"),
    "NumPy labels": (lambda c: c.cross_entropy(put(X), np.zeros(4, int)), NamespaceError, "labels"),
    "NumPy into a network": (lambda c: c.Network([c.Relu()]).forward(X), NamespaceError, "numpy.ndarray"),
    "another width": (lambda c: c.Layer(put(W)).forward(put(X[:, :5])), ShapeError, "needed x (..., n, 12)"),
    "one vector": (lambda c: c.Layer(put(W)).forward(put(X[0])), ShapeError, "x[None, :]"),
    "a kernel": (lambda c: c.Layer(put(W), put(W[0])), ShapeError, "transpose"),
    "backward first": (lambda c: c.Layer(put(W)).backward(put(W.T)), StateError, "forward"),
    "observe NumPy": (lambda c: observe(c, X), NamespaceError, "x is no array of CuPy"),
}


def observe(clora, x):
    adapter = cases.make(clora, put)
    with adapter.task("t"):
        adapter.observe([x])


@pytest.mark.parametrize("case", WRONG)
def test_arrays_in_the_wrong_place_are_told(clora, case):
    call, kind, words = WRONG[case]
    with pytest.raises(kind) as caught:
        call(clora)
    assert type(caught.value) is kind
    for part in (*PARTS, words):
        assert part in str(caught.value)


def test_options_are_checked_as_in_numpy(clora):
    with pytest.raises(OptionError, match="near: one"):
        cases.make(clora, put, targets=["onee"])


# --- exchange --------------------------------------------------------------------------------------------------


class OnDevice:
    """An array of another library on device 1: it speaks DLPack and requires grad, as a parameter of torch does."""

    def __init__(self, array, grad=True):
        self.array, self.requires_grad, self.dtype = array, grad, array.dtype

    def detach(self):
        return OnDevice(self.array, grad=False)

    def __dlpack_device__(self):
        return 2, 1

    def __dlpack__(self, **_):
        assert not self.requires_grad, "Can't export tensors that require gradient"
        return self.array.__dlpack__()


def test_sharing_is_of_memory(clora):
    arrays = [np.ones((3, 2)), np.zeros((2, 2)), np.ones((2, 2)), np.ones((2, 4))]
    shared = clora.share(core.Adapter(*map(OnDevice, arrays)))
    assert isinstance(shared, core.Adapter)
    for mine, theirs in zip(shared, arrays, strict=True):
        assert isinstance(mine, double.ndarray)
        assert mine.device.id == 1
        assert np.shares_memory(mine._a, theirs)
    head = core.Adapter(None, OnDevice(arrays[0]), OnDevice(arrays[0]), None)
    assert clora.share({"head": [head]})["head"][0].A is None
    assert clora.share(shared) == shared
    assert double.UPLOADS == []


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_to_another_library_goes_by_its_own_function(clora, cupy, library, monkeypatch):
    """With a stand-in for the library: the real ones need a device."""
    got = []

    def receive(array):
        got.append((array, cupy.cuda.Device().id))
        return "theirs"

    name = {"torch": "torch", "jax": "jax.dlpack"}[library]
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(from_dlpack=receive))
    array = put(np.ones(3))
    assert clora.share((array, None), library) == ("theirs", None)
    assert got[0][0] is array
    assert got[0][1] == 1


def test_what_can_not_be_shared_is_told(clora, cupy):
    def refuse(**_):
        raise BufferError("strides are not supported")

    class Sharded(OnDevice):
        def __dlpack_device__(self):
            raise ValueError("the array is on 8 devices")

    stubborn, brain = OnDevice(np.ones(2)), OnDevice(np.ones(2))
    stubborn.detach = lambda: types.SimpleNamespace(__dlpack__=refuse, __dlpack_device__=lambda: (2, 1))
    brain.detach, brain.dtype, brain.requires_grad = None, "torch.bfloat16", False
    table = [
        (lambda: clora.share(np.ones(3)), DeviceError, "numpy.ndarray on DLPack device 1"),
        (lambda: clora.share([1.0]), NamespaceError, "builtins.float"),
        (lambda: clora.share(put(np.ones(3)), "tensorflow"), OptionError, "'torch'"),
        (lambda: clora.share(stubborn), NamespaceError, "strides are not supported"),
        (lambda: clora.share(Sharded(np.ones(2), False)), NamespaceError, "no one device"),
        (lambda: clora.share(brain), DTypeError, "bfloat16"),
    ]
    if kit.torch is not None:
        parameter = kit.torch.nn.Parameter(kit.torch.ones(2))
        table.append((lambda: clora.share(parameter), DeviceError, "tensor.cuda()"))
    if kit.jax is not None:
        table.append((lambda: clora.share(kit.jax.numpy.ones(2)), DeviceError, "jax.device_put"))
    for call, kind, words in table:
        with pytest.raises(kind) as caught:
            call()
        assert type(caught.value) is kind
        assert isinstance(caught.value, CloraError)
        for part in (*PARTS, words):
            assert part in str(caught.value)
