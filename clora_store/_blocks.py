"""Writing a merged checkpoint block by block: what one block takes, and processes that share the blocks."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import clora_core as core
from clora_core.errors import StateError, message

from . import _safetensors as st
from ._errors import bad
from ._state import Array

PARTIAL = ".partial"
BLOCK = 1 << 18  # entries of a weight at a time: they stay in the cache for the dozen passes over them
BLOCKS = 16  # of a job: what is asked of another process at a time
COLUMNS = 512  # of a product at a time: twice as fast as all at once where rows are long (OpenBLAS 0.3.31)
COPY = 1 << 26  # bytes that are copied at a time
READY = b"ready"
ALONE = 1 << 28  # bytes of a checkpoint that is not worth the start of other processes
Sums = list[tuple[str, list[float]]]
_LOCAL = threading.local()


class Piece(NamedTuple):
    """One layer's update of a stored tensor: rows of the matrix that the layer adapts, oriented as stored."""

    layer: str
    left: Array  # (rows, r): A, or B^T where the weight is stored (in, out)
    right: Array  # (r, columns): R B, or (A R)^T
    rows: tuple[int, int]
    columns: tuple[int, int]
    largest: core.Adapter  # one entry, in every factor at least as large as any: its bound is one for all

    def bound(self, weight: float, dtype: np.dtype[Any]) -> float:
        """No merged entry is further from exact than this, where no entry of the weight is larger than ``weight``."""
        W = np.full((1, 1), weight, self.left.dtype)
        return float(core.bounds.merge(W, self.largest, dtype=dtype)[0, 0])


class Job(NamedTuple):
    """A range of a file, by absolute offsets, and how its bytes come about."""

    start: int
    stop: int
    tensor: str | None = None  # None: copied
    first: int = 0  # row of the tensor


class Shard(NamedTuple):
    source: Path
    name: str
    header: st.Header


class Work(NamedTuple):
    """All that writing takes."""

    shards: list[Shard]
    target: Path
    pieces: dict[str, list[Piece]]  # tensor -> what is added to it
    heads: dict[str, tuple[str, Array]]  # tensor -> the layer, and what takes its place
    where: str

    def partial(self, number: int) -> Path:
        """The file that is being written."""
        return self.target / (self.shards[number].name + PARTIAL)


def jobs(work: Work, number: int, start: int) -> Iterator[Job]:
    """The bytes of a file in order, from ``start``, which lies between two jobs."""
    shard, pieces, heads = work.shards[number], work.pieces, work.heads
    copy_from = 0

    def copies(stop: int) -> Iterator[Job]:
        for first in range(copy_from, stop, COPY):
            yield Job(first, min(first + COPY, stop))

    def all_jobs() -> Iterator[Job]:
        nonlocal copy_from
        for name, entry in shard.header.entries.items():
            if name not in pieces and name not in heads:
                continue
            yield from copies(entry.start)
            if name in heads:
                yield Job(entry.start, entry.stop, name)
            else:
                rows = entry.shape[0]
                width = (entry.stop - entry.start) // rows
                step = BLOCKS * _rows(entry)
                for row in range(0, rows, step):
                    first, last = entry.start + row * width, entry.start + min(row + step, rows) * width
                    yield Job(first, last, name, row)
            copy_from = entry.stop
        yield from copies(shard.header.total)

    for job in all_jobs():
        if job.start >= start:
            yield job


def do(work: Work, number: int, job: Job) -> Sums:
    """Write the bytes of one job. Returns sums for the report, of each layer that it touched."""
    shard = work.shards[number]
    where = f"{work.where}, {shard.name}"
    fd, to = _files(shard.source, work.partial(number))
    if job.tensor is None:
        _copy_range(fd, to, job.start, job.stop, where)
        return []
    entry = shard.header.entries[job.tensor]
    dtype = st.DTYPES[entry.dtype]
    if job.tensor in work.heads:
        _write_all(to, st.as_bytes(work.heads[job.tensor][1]), job.start)
        return []
    width = (entry.stop - entry.start) // entry.shape[0]
    end = job.first + (job.stop - job.start) // width
    sums: dict[str, list[float]] = {}
    for first in range(job.first, end, _rows(entry)):
        count = min(_rows(entry), end - first)
        W = _scratch(0, dtype, (count, width // dtype.itemsize))
        st.read_into(fd, st.as_bytes(W), entry.start + first * width, where)
        for piece in work.pieces[job.tensor]:
            top, bottom = max(piece.rows[0], first), min(piece.rows[1], first + count)
            if top < bottom:
                left = piece.left[top - piece.rows[0] : bottom - piece.rows[0]]
                block = W[top - first : bottom - first, slice(*piece.columns)]
                with np.errstate(over="ignore", invalid="ignore"):  # the sums show it
                    new = _merge_block(block, left, piece.right)
                add(sums.setdefault(piece.layer, [0.0] * 6), new)
        _write_all(to, st.as_bytes(W), entry.start + first * width)
    return list(sums.items())


def _rows(entry: st.Entry) -> int:
    """Rows of a tensor that make a block."""
    return max(1, BLOCK * entry.shape[0] // math.prod(entry.shape))


def add(total: list[float], new: list[float]) -> None:
    """Sums of `_merge_block`, and the largest entry last."""
    total[:5] = [a + b for a, b in zip(total[:5], new[:5], strict=True)]
    total[5] = max(total[5], new[5])


def _merge_block(W: Array, left: Array, right: Array) -> list[float]:
    r"""W += left @ right in place: computed in the dtype of the factors, rounded once. Sums for the report.

    As `clora_core.merge`, in a third of its passes over memory and without taking any: what limits a checkpoint's merge
    are those. Returns :math:`\|\Delta W\|^2`,
    :math:`\langle W' - W - \Delta W, \Delta W\rangle`, :math:`\|W' - W - \Delta W\|^2`, the number of entries that came
    out unchanged and of all, and the largest of :math:`|W|`.
    """
    pristine, update, stored = (_scratch(i, left.dtype, W.shape) for i in (1, 2, 3))
    np.copyto(pristine, W)
    for column in range(0, W.shape[1], COLUMNS):
        columns = slice(column, column + COLUMNS)
        np.matmul(left, right[:, columns], out=update[:, columns])
    np.add(pristine, update, out=stored)
    if W.dtype.itemsize < 4 < stored.dtype.itemsize:
        np.copyto(stored, stored.astype(np.float32))  # float64 rounds to half precision through float32
    np.copyto(W, stored, casting="same_kind")
    np.copyto(stored, W)
    np.subtract(stored, pristine, out=stored)
    changed = np.count_nonzero(stored.view(f"i{stored.itemsize}"))  # x - x is +0; counting floats would hold the GIL
    np.subtract(stored, update, out=stored)
    pairs = ((update, update), (stored, update), (stored, stored))
    size, lost, error = (float(np.dot(a.reshape(-1), b.reshape(-1))) for a, b in pairs)
    return [size, lost, error, float(W.size - changed), float(W.size), _largest(pristine)]


def _largest(array: Array) -> float:
    """The largest absolute value; destroys the array. Folded first, since a reduction would hold the GIL."""
    np.abs(array, out=array)
    rows = array.shape[0]
    while rows > 8:
        half = rows // 2
        np.maximum(array[:half], array[rows - half : rows], out=array[:half])
        rows -= half
    return float(array[:rows].max())


def _files(source: Path, partial: Path) -> tuple[int, int]:
    """Both files, open; kept open for the thread's next block."""
    held: dict[str, Any] = _LOCAL.__dict__
    if held.get("partial") != partial:
        _close()
        binary = getattr(os, "O_BINARY", 0)
        held["files"] = os.open(source, os.O_RDONLY | binary), os.open(partial, os.O_WRONLY | binary)
        held["partial"] = partial
    return held["files"]


def _scratch(which: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """An array of the thread's own that lasts: taking and giving back memory would cost more than the arithmetic."""
    held: dict[Any, Array] = _LOCAL.__dict__.setdefault("arrays", {})
    count = int(np.prod(shape))
    if (which, dtype) not in held or held[which, dtype].size < count:
        held[which, dtype] = np.empty(count, dtype)
    return held[which, dtype][:count].reshape(shape)


def _copy_range(fd: int, to: int, start: int, stop: int, where: str) -> None:
    position = start
    while position < stop:
        try:
            count = os.copy_file_range(fd, to, stop - position, position, position)
        except (AttributeError, OSError):  # no such call here, or not between these file systems
            view = memoryview(bytearray(min(st.CHUNK, stop - position)))
            st.read_into(fd, view, position, where)
            _write_all(to, view, position)
            count = len(view)
        if count == 0:
            raise bad(where, "the file ended early", f"{position} bytes", f"{stop}")
        position += count


def _write_all(to: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += st.write_some(to, view[done:], offset + done)


# --- several at a time -------------------------------------------------------------------------------------------


@contextmanager
def pool(work: Work) -> Iterator[tuple[ThreadPoolExecutor, Callable[[int, Job], Sums]]]:
    """Threads, and what they call for a block.

    Each has a process of its own: NumPy's calls are so short here that threads wait for the interpreter's lock half of
    the time. A process ends with its parent, however that ends: its standard input closes.
    """
    large = sum(shard.header.total for shard in work.shards) > ALONE
    processes = _start(work) if large and sys.executable else []
    free: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for process in processes:
        free.put(process)

    def ask(number: int, job: Job) -> Sums:
        process = free.get()
        try:
            pickle.dump((number, job), process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise _died(work.where) from error
        finally:
            free.put(process)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def alone(number: int, job: Job) -> Sums:
        return do(work, number, job)

    try:
        with ThreadPoolExecutor(max(1, len(processes))) as threads:
            try:
                yield threads, ask if processes else alone
            except BaseException:
                for process in processes:
                    process.kill()  # or who waits for one that hangs would wait for ever
                raise
            finally:
                threads.submit(_close).result()
    finally:
        for process in processes:
            _stop(process)


def _start(work: Work) -> list[Any]:
    """Processes that have the work, or none where they can't be had: an interpreter inside another program, say."""
    import subprocess

    text = pickle.dumps(work)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # The same code as here, and never what lies in the present folder: that may be a checkpoint of somebody's.
    code = "import sys; sys.path[:] = sys.argv[1:]; from clora_store._blocks import serve; serve()"
    command = [sys.executable, "-c", code, *(entry for entry in sys.path if entry)]
    processes: list[Any] = []
    try:
        for _ in range(st.WORKERS):  # in a session of their own: Ctrl-C is the parent's
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, start_new_session=True)
            processes.append(process)
        for process in processes:
            process.stdin.write(text)
            process.stdin.flush()
            if process.stdout.read(len(READY)) != READY:
                raise EOFError
    except (OSError, EOFError):
        for process in processes:
            _stop(process)
        return []
    except BaseException:
        for process in processes:
            _stop(process)
        raise
    return processes


def _stop(process: Any) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not sent is not wanted
            pipe.close()


def _died(where: str) -> StateError:
    return StateError(
        message(
            where,
            "a process that merges has died",
            got="the end of its output",
            needed="an answer",
            cause="the system took it for want of memory",
            fix="run the same again: it goes on from what is on the disk",
        )
    )


def serve() -> None:
    """A process of `pool`: the work, then one block after the other, from standard input."""
    source, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not reach the parent
    try:
        work = pickle.load(source)
        out.write(READY)
        out.flush()
        while True:
            number, job = pickle.load(source)
            try:
                answer: Any = do(work, number, job)
            except Exception as error:
                answer = error
            pickle.dump(answer, out)
            out.flush()
    except (EOFError, OSError, pickle.UnpicklingError):
        os._exit(0)


def _close() -> None:
    for fd in _LOCAL.__dict__.pop("files", ()):
        os.close(fd)
    _LOCAL.__dict__.clear()
