"""A stand-in for CuPy over NumPy, stricter than CuPy where that shows a mistake: two devices, streams that lag behind.

- An operand on another device than the current one raises (CuPy does so without peer access, else it is slow).
- NumPy arrays are refused in every function, and `__array__` is; `get`, bool, float, int and item work and are counted.
- Creation takes no ``device=``. `solve` wants equal batch shapes.
- `ndarray.set` on a stream happens when somebody waits for it and no sooner; until then the memory holds poison.
  Writing on a stream to memory of another stream, without waiting for that one, raises.
- ElementwiseKernel evaluates its C++ source, an expression at a time, with every value in its declared type.

The array is no subclass of NumPy's: array-api-compat would take it for NumPy.
"""

from __future__ import annotations

import re
import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from itertools import count
from typing import Any, ClassVar

import numpy as np

COUNT = 2  # devices
SYNCS: list[str] = []  # the host waited for a device
UPLOADS: list[str] = []  # an array was made of data of the host
WORK: Counter[tuple[int, Any]] = Counter()  # (device, stream) -> pieces of work
PINNED: list[int] = []  # sizes of pinned buffers that were made
_serial = count(1)
_current = [0]


class WrongDevice(ValueError, AssertionError):
    """CuPy's error; also what the stand-in is there to tell."""


class Race(AssertionError):
    """Nothing in CuPy would tell of this."""


def reset() -> None:
    """Forget what was counted."""
    for record in (SYNCS, UPLOADS, WORK, PINNED):
        record.clear()


class Device:
    """cupy.cuda.Device."""

    def __init__(self, device: Any = None) -> None:
        self.id = _current[-1] if device is None else int(device)
        assert 0 <= self.id < COUNT, "cudaErrorInvalidDevice"

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return self.id

    def __enter__(self) -> Device:
        _current.append(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        _current.pop()

    def use(self) -> Device:
        """Make it current for good."""
        _current[-1] = self.id
        return self

    def synchronize(self) -> None:
        """Wait for all of its streams."""
        SYNCS.append("Device.synchronize")
        for stream in Stream.all:
            if stream.device_id == self.id:
                stream.run()


class Stream:
    """cupy.cuda.Stream: a queue that runs when somebody waits for it."""

    all: ClassVar[list[Stream]] = []
    stacks: ClassVar[dict[int, list[Stream]]] = {}

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self.device_id, self.null, self.queue = _current[-1], null, []
        self.seen: dict[Stream, int] = {}
        Stream.all.append(self)

    def run(self, until: float = float("inf")) -> None:
        """Do what was asked for before the moment ``until``."""
        while self.queue and self.queue[0][0] <= until:
            self.queue.pop(0)[-1]()

    def record(self, event: Event | None = None) -> Event:
        """An event after all that was asked for so far."""
        event = Event() if event is None else event
        event.stream, event.serial = self, next(_serial)
        return event

    def wait_event(self, event: Event) -> None:
        """Later work comes after the event; the host does not wait."""
        self.queue.append((next(_serial), "wait", lambda: event.stream.run(event.serial)))
        self.seen[event.stream] = event.serial

    def synchronize(self) -> None:
        """The host waits."""
        SYNCS.append("Stream.synchronize")
        self.run()

    def __enter__(self) -> Stream:
        assert self.device_id == _current[-1], "a stream of another device"
        Stream.stacks[self.device_id].append(self)
        return self

    def __exit__(self, *_: object) -> None:
        Stream.stacks[self.device_id].pop()


class Event:
    """cupy.cuda.Event."""

    stream: Stream
    serial: int

    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        pass

    def synchronize(self) -> None:
        """The host waits."""
        SYNCS.append("Event.synchronize")
        self.stream.run(self.serial)


for _number in range(COUNT):
    with Device(_number):
        Stream.stacks[_number] = [Stream(null=True)]


def get_current_stream(device_id: int = -1) -> Stream:
    """Of the current device."""
    return Stream.stacks[_current[-1] if device_id < 0 else device_id][-1]


def pending() -> int:
    """Copies that were asked for and have not happened."""
    return sum(kind == "copy" for stream in Stream.all for _, kind, _ in stream.queue)


def alloc_pinned_memory(size: int) -> Any:
    """A buffer of the host."""
    PINNED.append(size)
    return np.full(size, 0x7F, np.uint8)


def _work() -> None:
    stream = get_current_stream()
    stream.run()
    WORK[_current[-1], stream] += 1


def _operand(value: Any) -> Any:
    if isinstance(value, ndarray):
        if value.device.id != _current[-1]:
            raise WrongDevice(f"The device where the array resides ({value.device.id}) is not the current device")
        return value._a
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, list | tuple):
        return type(value)(map(_operand, value))
    return value


def _wrap(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return ndarray(np.asarray(value))
    if isinstance(value, tuple | list):
        return tuple(map(_wrap, value))
    return value


def _lift(function: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument 'device'")
        args, kwargs = _operand(args), {key: _operand(value) for key, value in kwargs.items()}
        _work()
        with np.errstate(all="ignore"):  # a device sets no flags
            return _wrap(function(*args, **kwargs))

    run.__name__ = getattr(function, "__name__", "function")
    return run


class ndarray:  # noqa: N801
    """cupy.ndarray."""

    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, a: np.ndarray, device: Device | None = None, stream: Stream | None = None) -> None:
        self._a, self.device = a, device or Device()
        self._stream, self._born = stream or get_current_stream(), next(_serial)

    shape = property(lambda self: self._a.shape)
    ndim = property(lambda self: self._a.ndim)
    dtype = property(lambda self: self._a.dtype)
    size = property(lambda self: self._a.size)
    nbytes = property(lambda self: self._a.nbytes)
    T = property(lambda self: self._view(self._a.T))

    def _view(self, a: np.ndarray) -> ndarray:
        return ndarray(a, self.device, self._stream)

    def __len__(self) -> int:
        return len(self._a)

    def __getitem__(self, key: Any) -> ndarray:
        if any(isinstance(part, ndarray) for part in (key if isinstance(key, tuple) else (key,))):
            return _lift(lambda a, *k: a[k])(self, *(key if isinstance(key, tuple) else (key,)))
        return self._view(self._a[key] if np.ndim(self._a[key]) else self._a[(*np.atleast_1d(key), None)].reshape(()))

    def reshape(self, *shape: Any) -> ndarray:
        """A view where it can be one."""
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        out = self._a.reshape(shape)
        return self._view(out) if np.shares_memory(out, self._a) else _lift(np.reshape)(self, shape)

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        """The same object where nothing changes and no copy is asked for."""
        return self if not copy and self.dtype == dtype else _lift(np.ndarray.astype)(self, dtype)

    def copy(self) -> ndarray:
        """On the current device, as CuPy has it."""
        return cupy.array(self)

    def set(self, arr: np.ndarray, stream: Stream | None = None) -> None:
        """When the stream is waited for, and no sooner."""
        stream = stream or get_current_stream()
        assert isinstance(arr, np.ndarray), "Only numpy.ndarray can be set to cupy.ndarray"
        assert (self.dtype, self.shape) == (arr.dtype, arr.shape)
        if stream is not self._stream and stream.seen.get(self._stream, -1) < self._born:
            raise Race("memory of another stream is written without waiting for that stream")
        stream.queue.append((next(_serial), "copy", lambda: np.copyto(self._a, arr)))

    def get(self) -> np.ndarray:
        """To the host, after the current stream of the array's device."""
        SYNCS.append("get")
        get_current_stream(self.device.id).run()
        return self._a.copy()

    def item(self) -> Any:
        """To the host."""
        return self.get().item()

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device.id

    def __dlpack__(self, **_: Any) -> Any:
        return self._a.__dlpack__()

    def __iadd__(self, other: Any) -> ndarray:
        a, b = _operand(self), _operand(other)
        _work()
        a += b
        return self


def _operator(name: str, swap: bool) -> Any:
    function = _lift(getattr(np, name))
    return lambda self, other: function(other, self) if swap else function(self, other)


for _short, _name in {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "true_divide", "pow": "power", "matmul": "matmul",
}.items():  # fmt: skip
    setattr(ndarray, f"__{_short}__", _operator(_name, False))
    setattr(ndarray, f"__r{_short}__", _operator(_name, True))
for _short, _name in {
    "and": "bitwise_and",
    "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal", "ne": "not_equal",
}.items():  # fmt: skip
    setattr(ndarray, f"__{_short}__", _operator(_name, False))
for _name in ("bool", "float", "int", "index", "complex"):
    setattr(ndarray, f"__{_name}__", lambda self, kind=_name: getattr(self.get(), f"__{kind}__")())
ndarray.__neg__ = lambda self: _lift(np.negative)(self)


def _asarray(obj: Any, dtype: Any = None, copy: bool = False, order: str | None = None) -> ndarray:
    if isinstance(obj, ndarray):
        if copy or obj.device.id != _current[-1] or (dtype is not None and obj.dtype != dtype):
            get_current_stream(obj.device.id).run()
            return ndarray(np.array(obj._a, dtype=dtype))
        return obj
    UPLOADS.append(type(obj).__name__)
    return ndarray(np.array(obj, dtype=dtype))


def _empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    out = np.empty(shape, dtype)
    out.view(np.uint8 if out.ndim else out.dtype).fill(0xFF if out.ndim else -1)  # not a number, or -1
    return ndarray(out)


def _gemm(transa: str, transb: str, a: Any, b: Any, out: Any = None, alpha: float = 1.0, beta: float = 0.0) -> Any:
    """cupy.cublas.gemm."""
    assert a.ndim == b.ndim == 2
    assert a.dtype == b.dtype == out.dtype
    assert a.dtype.char in "fd", "invalid dtype"
    assert out._a.flags.c_contiguous or out._a.flags.f_contiguous, "slow: gemm would copy"
    A, B, C = _operand((a, b, out))
    _work()
    A, B = A.T if transa == "T" else A, B.T if transb == "T" else B
    assert C.shape == (A.shape[0], B.shape[1])
    C[...] = alpha * (A @ B) + (beta * C if beta else 0)
    return out


def _from_dlpack(array: Any) -> ndarray:
    kind, number = array.__dlpack_device__()
    assert kind == 2
    host = types.SimpleNamespace(__dlpack__=array.__dlpack__, __dlpack_device__=lambda: (1, 0))
    return ndarray(
        np.from_dlpack(type("Host", (), {k: staticmethod(v) for k, v in vars(host).items()})()), Device(number)
    )


class ElementwiseKernel:
    """cupy.ElementwiseKernel, for statements of sums, products, quotients, sqrt, casts and at most one `?:`."""

    def __init__(self, in_params: str, out_params: str, operation: str, name: str = "kernel") -> None:
        self.inputs, self.outputs = ([p.split() for p in params.split(",")] for params in (in_params, out_params))
        self.statements = [s.strip() for s in operation.split(";") if s.strip()]

    def __call__(self, *args: Any) -> Any:
        assert len(args) == len(self.inputs), "Wrong number of arguments"
        kinds = {"float16": np.float16, "float32": np.float32, "float": np.float32, "double": np.float64}
        for (kind, _), value in zip(self.inputs, args, strict=True):
            if isinstance(value, ndarray):
                found = kinds.setdefault(kind, value.dtype.type)
                assert found == value.dtype.type, f"Type is mismatched. {kind} {found} {value.dtype}"
        values: dict[str, Any] = {"sqrt": np.sqrt, "where": np.where}
        values |= {kind: lambda v, to=to: np.asarray(v, dtype=to) for kind, to in kinds.items()}
        for (kind, name), value in zip(self.inputs, args, strict=True):
            values[name] = np.asarray(_operand(value), dtype=kinds[kind])
        _work()
        types_of = {name: kind for kind, name in (*self.inputs, *self.outputs)}
        with np.errstate(all="ignore"):
            for statement in self.statements:
                target, expression = (part.strip() for part in statement.split("=", 1))
                if " " in target:
                    kind, target = target.split()
                    types_of[target] = kind
                expression = re.sub(r"^(.*)\?(.*):(.*)$", r"where(\1,\2,\3)", expression)
                result = eval(expression, {"__builtins__": {}}, values)
                assert result.dtype == kinds[types_of[target]], f"{target} of {result.dtype}"
                values[target] = result
        outs = tuple(ndarray(np.array(values[name])) for _, name in self.outputs)
        return outs if len(outs) > 1 else outs[0]


def _solve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.shape[:-2] != (b.shape[:-2] if b.ndim > 1 else b.shape[:-1]):
        raise ValueError("a must have the same batch shape as b")
    return np.linalg.solve(a, b)


def _module(name: str, **contents: Any) -> Any:
    module = types.ModuleType(name)
    vars(module).update(contents)
    return module


def _all_of(space: Any) -> dict[str, Any]:
    public = {name: value for name, value in vars(space).items() if not name.startswith("_")}
    plain = {"dtype", "finfo", "iinfo", "issubdtype", "isdtype", "result_type", "can_cast", "errstate"}
    functions = {n: _lift(v) for n, v in public.items() if callable(v) and not isinstance(v, type) and n not in plain}
    kept = {n: v for n, v in public.items() if n in plain or (isinstance(v, type) and issubclass(v, np.generic))}
    return functions | kept | {n: v for n, v in public.items() if isinstance(v, float) or v is None}


cupy: Any = _module("cupy", **_all_of(np))
cupy.__path__ = []  # a package
cupy.__spec__ = ModuleSpec("cupy", None)  # so that importlib finds it, too
cupy.__version__ = "14.0.0 (double)"
cupy.ndarray, cupy.ElementwiseKernel, cupy.from_dlpack = ndarray, ElementwiseKernel, _from_dlpack
cupy.asarray, cupy.empty = _asarray, _empty
cupy.array = lambda obj, dtype=None, copy=True, order=None: _asarray(obj, dtype, copy)
cupy.linalg = _module("cupy.linalg", **_all_of(np.linalg))
cupy.linalg.solve = _lift(_solve)
cupy.fft = _module("cupy.fft", **_all_of(np.fft))
cupy.cublas = _module("cupy.cublas", gemm=_gemm)
cupy.cuda = _module(
    "cupy.cuda",
    Device=Device,
    Stream=Stream,
    Event=Event,
    get_current_stream=get_current_stream,
    alloc_pinned_memory=alloc_pinned_memory,
    is_available=lambda: True,
    cusolver=_module("cupy.cuda.cusolver"),
    nvrtc=_module("cupy.cuda.nvrtc", getVersion=lambda: (13, 0)),
    device=_module("cupy.cuda.device", Device=Device),
    runtime=_module("cupy.cuda.runtime", getDeviceCount=lambda: COUNT, driverGetVersion=lambda: 13000),
)
_stash: dict[str, Any] = {"cupy": cupy, "cupy.cuda.device": cupy.cuda.device, "cupy.cuda.runtime": cupy.cuda.runtime}
for _name in ("linalg", "fft", "cublas", "cuda"):
    _stash[f"cupy.{_name}"] = getattr(cupy, _name)
    getattr(cupy, _name).__path__ = []


def _ours(name: str) -> bool:
    return name.split(".")[0] in ("cupy", "cupyx", "clora_cupy") or name.startswith("array_api_compat.cupy")


@contextmanager
def installed() -> Iterator[Any]:
    """``import cupy`` means the double, and clora_cupy is built on it; afterwards all is as it was."""
    import array_api_compat

    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _ours(name)}
    compat = vars(array_api_compat).pop("cupy", None)
    sys.modules.update(_stash)
    if "array_api_compat.cupy" in _stash:
        array_api_compat.cupy = _stash["array_api_compat.cupy"]  # type: ignore[attr-defined]
    reset()
    try:
        yield cupy
    finally:
        _stash.update({name: sys.modules.pop(name) for name in list(sys.modules) if _ours(name)})
        vars(array_api_compat).pop("cupy", None)
        if compat is not None:
            array_api_compat.cupy = compat  # type: ignore[attr-defined]
        sys.modules.update(before)
