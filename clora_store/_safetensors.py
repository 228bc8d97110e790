"""The safetensors container: headers that are checked before anything is allocated, tensors hashed as they are read.

Files are written by the safetensors library. They are read here, because its readers map the file (a file that shrinks
kills the process), know nothing of hashes, and can neither write nor read a checkpoint in pieces.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ._errors import bad

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "C64": 64} | {
    name: 8 * dtype.itemsize for name, dtype in DTYPES.items()
}  # other types (8 bits and below) are moved as bytes, their size unchecked
LARGEST_HEADER = 100_000_000  # the limit of the safetensors library
MOST_AXES = 64
SMALL = 1 << 20  # bytes that are not worth a thread
CHUNK = 1 << 20  # read and hashed while it is in the cache
WORKERS = min(4, os.cpu_count() or 1)

_SEEKING = threading.Lock()


class Entry(NamedTuple):
    """One tensor of a file: its dtype by the format's name, its shape, and where in the file its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """What a file holds, in the order of the bytes."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    size: int  # bytes before the data
    total: int  # bytes of the whole file


def parse_json(text: bytes, where: str) -> Any:
    """Strict JSON: no duplicate keys, no NaN, nothing that exhausts the stack."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a key that occurs twice")
        return out

    def constant(name: str) -> Any:
        raise ValueError(f"the number {name}")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise bad(where, "this is no valid JSON", reason, "one JSON object in UTF-8") from None


def is_size(value: object) -> bool:
    """A whole number that JSON wrote as one, not negative, as large as a file can be at most."""
    return type(value) is int and 0 <= value < 2**63


@contextmanager
def opened(path: Path, where: str) -> Iterator[int]:
    """A regular file, open for reading; never waits for a pipe or a device."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise bad(where, "this is no regular file", stat.filemode(mode), "a regular file")
        yield fd
    finally:
        os.close(fd)


def write_file(path: Path, tensors: dict[str, np.ndarray[Any, Any]], metadata: dict[str, str] | None = None) -> None:
    """Write a file and flush it to the disk, readable by whom new files are (the library makes its own private)."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def read_header(fd: int, where: str, *, limit: int = LARGEST_HEADER) -> Header:
    """Parse and check the header of an open file: every range lies in the file, none overlap, none leave holes.

    Raises
    ------
    FormatError
        Anything that is not so. At most ``limit`` bytes are read.
    """
    total = os.fstat(fd).st_size
    if total < 10:
        raise bad(where, "too short for a safetensors file", f"{total} bytes", "at least 10")
    n = int.from_bytes(read_exactly(fd, 8, 0, where), "little")
    if not 2 <= n <= min(limit, total - 8):
        raise bad(where, "the header does not fit", f"{n} bytes", f"2 to {min(limit, total - 8)}")
    text = read_exactly(fd, n, 8, where)
    if text[:1] != b"{":
        raise bad(where, "the header does not begin with a brace", repr(text[:1]), "'{'")
    raw = parse_json(text, where)
    if not isinstance(raw, dict):
        raise bad(where, "the header is no JSON object", type(raw).__name__, "an object")
    metadata = raw.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise bad(where, "the metadata are no strings", type(metadata).__name__, "an object of strings")
    entries = {name: _entry(name, value, 8 + n, where) for name, value in raw.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    position = 8 + n
    for name, entry in ordered.items():
        if entry.start != position:
            raise bad(
                where, f"the bytes of tensor {name!r} overlap others or leave a hole", f"start {entry.start}", position
            )
        position = entry.stop
    if position != total:
        raise bad(where, "the tensors do not fill the file", f"{total} bytes", f"{position}")
    return Header(ordered, metadata, 8 + n, total)


def _entry(name: str, value: Any, base: int, where: str) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise bad(where, f"tensor {name!r} is not described", "other keys", "dtype, shape, data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    good = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= MOST_AXES and all(map(is_size, shape))
    if not (good and isinstance(offsets, list) and len(offsets) == 2 and all(map(is_size, offsets))):
        raise bad(where, f"tensor {name!r} has no valid dtype, shape or offsets", "other types", "text and sizes")
    start, stop = offsets
    if start > stop:
        raise bad(where, f"tensor {name!r} ends before it begins", f"{start} to {stop}", "start <= stop")
    if dtype in BITS and math.prod(shape) * BITS[dtype] != 8 * (stop - start):
        raise bad(where, f"tensor {name!r} has another size", f"{stop - start} bytes", f"{dtype} {tuple(shape)}")
    return Entry(dtype, tuple(shape), base + start, base + stop)


def read_exactly(fd: int, count: int, offset: int, where: str) -> bytes:
    """That many bytes from that place."""
    out = bytearray(count)
    read_into(fd, memoryview(out), offset, where)
    return bytes(out)


def read_into(fd: int, view: memoryview, offset: int, where: str, digest: Any = None) -> None:
    """Fill the view with bytes from that place, and hash them where asked."""
    position = 0
    while position < len(view):
        part = view[position : position + CHUNK]
        count = _read_some(fd, part, offset + position)
        if count == 0:
            raise bad(where, "the file ended early", f"{offset + position} bytes", f"{offset + len(view)}")
        if digest is not None:
            digest.update(part[:count])
        position += count


def _read_some(fd: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    with _SEEKING:  # Windows
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(view))
    view[: len(data)] = data
    return len(data)


def write_some(fd: int, view: memoryview, offset: int) -> int:
    """Write at that place; returns how many bytes were."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, view, offset)
    with _SEEKING:  # Windows
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, view)


def as_bytes(array: np.ndarray[Any, Any]) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def check_finite(name: str, array: np.ndarray[Any, Any], where: str) -> None:
    """Refuse NaN and infinity."""
    if not np.isfinite(array).all():
        cause, fix = "a training run that diverged", "go back to an earlier save; load with finite=False to look at it"
        raise bad(where, f"tensor {name!r} is not finite", "NaN or infinity", "finite numbers", cause=cause, fix=fix)


def sha256(array: np.ndarray[Any, Any]) -> str:
    """Of a tensor's bytes, in hexadecimal."""
    return hashlib.sha256(as_bytes(array)).hexdigest()


def hashes(tensors: dict[str, np.ndarray[Any, Any]], where: str) -> dict[str, str]:
    """The hash of every tensor, several at a time; FormatError where one is not finite."""

    def one(name: str) -> str:
        check_finite(name, tensors[name], where)
        return sha256(tensors[name])

    return _each(one, tensors, sum(array.nbytes for array in tensors.values()))


def read_tensors(fd: int, header: Header, where: str) -> dict[str, tuple[np.ndarray[Any, Any], str]]:
    """Every tensor and the hash of its bytes, several at a time.

    They share one piece of memory: to take a large one costs half of what many small ones cost.
    """
    memory = np.empty(header.total - header.size, np.uint8)
    view = memory.data

    def read(name: str) -> tuple[np.ndarray[Any, Any], str]:
        entry = header.entries[name]
        start, stop, dtype = entry.start - header.size, entry.stop - header.size, DTYPES[entry.dtype]
        digest = hashlib.sha256()
        read_into(fd, view[start:stop], entry.start, where, digest)
        part = memory[start:stop]
        array = (part if start % dtype.itemsize == 0 else part.copy()).view(dtype)
        return array.reshape(entry.shape), digest.hexdigest()

    return _each(read, header.entries, len(memory))


def _each(function: Callable[[str], Any], names: Iterable[str], size: int) -> dict[str, Any]:
    """name -> function(name); several at a time, where the bytes are worth it."""
    names = list(names)
    if size < SMALL:
        return {name: function(name) for name in names}
    with ThreadPoolExecutor(WORKERS) as pool:
        return dict(zip(names, pool.map(function, names), strict=True))


def round_once(array: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """In that dtype and contiguous, by one rounding, half precision through float32. Overflow gives infinity."""
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32) if dtype.itemsize < 4 < array.dtype.itemsize else array
        return np.ascontiguousarray(narrow.astype(dtype))


def dtype_name(dtype: Any) -> str | None:
    """The format's name of a dtype, or None for one that no adapter has."""
    return next((name for name, known in DTYPES.items() if known == dtype), None)
