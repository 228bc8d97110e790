"""Batches from NumPy to the device through pinned memory, on a stream of their own, while the last one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from clora_core.errors import DTypeError, NamespaceError, OptionError, message

from ._device import here
from ._library import cupy

ALIGNED = 256  # bytes; a multiple of every dtype's size


def stage(batches: Iterable[Any], *, device: Any = None, depth: int = 2) -> Iterator[Any]:
    """Copy batches to the device ahead of their use.

    Parameters
    ----------
    batches : iterable of batches
        A batch is a NumPy array, or a tuple, list or mapping of such. Their shapes may differ.
    device : int or cupy.cuda.Device, optional
        By default the one that is current at the call.
    depth : int
        How many batches may be under way; each has a pinned buffer, which is used again.

    Yields
    ------
    the batch, of cupy.ndarray
        Ready for work on the stream that is current when it is asked for. Its memory belongs to that stream: use
        another stream only after an event, as with any array of CuPy.

    Raises
    ------
    OptionError
        depth < 1.
    NamespaceError, DTypeError
        A batch that is not of NumPy arrays of numbers; when it is reached.

    Notes
    -----
    The host waits only for a buffer whose copy is not done, and, at the end or on an early ``break`` (when the iterator
    is closed), for copies that are still under way.
    """
    if depth < 1:
        raise OptionError(
            message(
                "clora_cupy.stage",
                "nothing could be under way",
                got=f"depth={depth}",
                needed="depth >= 1",
                cause="a depth of 0 to turn staging off",
                fix="pass 1, or cupy.asarray each batch",
            )
        )
    return _staged(iter(batches), cupy.cuda.Device(device), depth)


def _staged(source: Iterator[Any], device: Any, depth: int) -> Iterator[Any]:
    # The device is made current around each piece of work, never across a yield: there the caller's own is current.
    with here(device):
        copies = cupy.cuda.Stream(non_blocking=True)
        slots = [_Slot() for _ in range(depth)]
    ready: deque[tuple[Any, Any]] = deque()
    sent, more = 0, True
    try:
        while True:
            while more and len(ready) < depth:
                try:
                    batch = next(source)
                except StopIteration:
                    more = False
                    break
                with here(device):
                    ready.append(slots[sent % depth].send(batch, copies))
                sent += 1
            if not ready:
                return
            arrays, done = ready.popleft()
            with here(device):
                cupy.cuda.get_current_stream().wait_event(done)
            yield arrays
    finally:
        with here(device):
            copies.synchronize()  # the pinned buffers go back to CuPy's pool, the arrays' memory to the caller's stream


class _Slot:
    """One pinned buffer, and the event after which it may be written again."""

    def __init__(self) -> None:
        self.buffer: Any = None
        self.size = 0
        self.done: Any = None

    def send(self, batch: Any, copies: Any) -> tuple[Any, Any]:
        """Write the batch into the buffer and start its copy; the arrays, and the event of their being there."""
        leaves: list[np.ndarray] = []
        _map(lambda leaf: leaves.append(_checked(leaf)), batch)
        if self.done is not None:
            self.done.synchronize()  # the last copy out of this buffer
        offsets = np.cumsum([0, *(-(-leaf.nbytes // ALIGNED) * ALIGNED for leaf in leaves)])
        if self.buffer is None or offsets[-1] > self.size:
            self.size = int(offsets[-1])
            self.buffer = cupy.cuda.alloc_pinned_memory(max(self.size, 1))
        # Memory of the user's stream, where work on what was there before may still be under way: that comes first.
        arrays = [cupy.empty(leaf.shape, dtype=leaf.dtype) for leaf in leaves]
        copies.wait_event(cupy.cuda.get_current_stream().record(cupy.cuda.Event(disable_timing=True)))
        for leaf, array, offset in zip(leaves, arrays, offsets[:-1], strict=True):
            if leaf.size:
                pinned = np.frombuffer(self.buffer, leaf.dtype, leaf.size, int(offset)).reshape(leaf.shape)
                np.copyto(pinned, leaf)
                array.set(pinned, stream=copies)
        self.done = copies.record(cupy.cuda.Event(disable_timing=True))
        rest = iter(arrays)
        return _map(lambda _: next(rest), batch), self.done


def _map(function: Callable[[Any], Any], batch: Any) -> Any:
    """A batch of the same structure, of what the function gives for each array."""
    if isinstance(batch, Mapping):
        return {key: _map(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        items = [_map(function, value) for value in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return function(batch)


def _checked(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, np.ndarray):
        raise NamespaceError(
            message(
                "clora_cupy.stage",
                "a batch holds something that is no NumPy array",
                got=f"{type(leaf).__module__}.{type(leaf).__qualname__}",
                needed="numpy.ndarray, or tuples, lists, mappings of such",
                cause="tensors of another library, or numbers beside the arrays",
                fix="convert by numpy.asarray; arrays on the GPU need no staging, see clora_cupy.share",
            )
        )
    if leaf.dtype.kind not in "biufc":
        raise DTypeError(
            message(
                "clora_cupy.stage",
                "an array that CuPy cannot hold",
                got=f"dtype {leaf.dtype}",
                needed="numbers or booleans",
                cause="text, objects, dates or bfloat16 in the batch",
                fix="encode them as numbers, or leave them out",
            )
        )
    return leaf.astype(leaf.dtype.newbyteorder("="), copy=False)
