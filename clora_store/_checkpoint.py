"""Merging an adapter into a checkpoint of any size: tensor by tensor, in blocks, from one folder into a new one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clora_core.errors import CloraError, InvalidValueError, message

from . import _safetensors as st
from ._base import JOURNAL, find_shards, match, other_files, read_small
from ._blocks import BLOCK, BLOCKS, Job, Piece, Shard, Sums, Work, add, jobs, pool
from ._errors import option_error, state_error
from ._folder import LOCK, locked, replace, sweep, sync
from ._state import LAYOUTS, State, check

FLUSH_SECONDS = 0.25


class LayerReport(NamedTuple):
    """What the merge of one layer stored of its update, see `clora_core.MergeReport`."""

    tensor: str
    kept: float
    error: float
    unchanged: float
    bound: float


class Merged(NamedTuple):
    """What `merge_checkpoint` returns.

    Attributes
    ----------
    layers : dict of layer to LayerReport
    heads : dict of layer to str
        Classifiers that took the place of a tensor.
    copied : int
        Tensors that were copied byte for byte.
    bytes : int
        Written in all, also by the runs that this one went on from.
    resumed : bool
    """

    layers: dict[str, LayerReport]
    heads: dict[str, str]
    copied: int
    bytes: int
    resumed: bool


def merge_checkpoint(
    base: str | os.PathLike[str],
    state: State,
    out: str | os.PathLike[str],
    *,
    task: str | None = None,
    rename: Sequence[tuple[str, str]] = (),
    layout: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Merge an adapter into a safetensors checkpoint: W + A R B, computed in float32 or wider, rounded once.

    Parameters
    ----------
    base : path
        A ``.safetensors`` file, or a folder with one or with shards and their index. Of a folder, its other small files
        (configuration, tokenizer) are copied, too; pickled weights never.
    state : State
    out : path
        A new folder, or one that an interrupted merge of the same things left: then it goes on from there.
    task : str, optional
        Merge the function as it was when that task ended.
    rename : sequence of (regex, replacement)
        Applied in order to the names of the adapter's weights where the checkpoint names them otherwise.
    layout : {"out,in", "in,out"}, optional
        Of the checkpoint's linear weights, where it is not the one the adapter was trained on.
    progress : callable(done, total), optional
        Bytes.

    Returns
    -------
    Merged

    Raises
    ------
    OptionError, ShapeError, DTypeError
        Weights that are not in the checkpoint (near names are listed), or of another shape, or of a dtype without a
        rounding of their own (integers, 8 bits). Found before anything is written.
    StateError
        ``out`` holds something else; too little space on the disk; a weight that is tied to one left unadapted.
    FormatError
        A damaged checkpoint.

    Notes
    -----
    Tensors that no layer adapts are copied byte for byte; headers, too. What has reached the disk is noted in
    ``clora-merge.json`` every few seconds, so that little is lost when the process dies. ``config.json`` and the index
    are written last: a folder that has them is complete.
    """
    where = f"clora_store.merge_checkpoint({os.fspath(base)!r})"
    if layout is not None and layout not in LAYOUTS:
        raise option_error(where, "unknown layout", repr(layout), " or ".join(map(repr, LAYOUTS)), "pass one of these")
    check(state, where)
    source, target = Path(base), Path(out)
    if target.exists() and source.exists() and target.resolve() in (source.resolve(), source.resolve().parent):
        raise state_error(where, "the output is the input", os.fspath(out), "a new folder", "choose another --out")
    shards, index = find_shards(source, where)
    tensors = {name: entry for shard in shards for name, entry in shard.header.entries.items()}
    pieces, heads = match(state, tensors, task, rename, layout, where)
    plan = _plan_digest(shards, state, task, rename, layout)
    total = sum(shard.header.total for shard in shards)
    others = other_files(source)
    target.mkdir(parents=True, exist_ok=True)
    with locked(target, where):
        sweep(target)
        journal = _resume(target, plan, where)
        resumed = bool(journal["done"])
        work = Work(shards, target, pieces, heads, where)
        _settle(journal, work)
        small = [*others, index] if index else others
        there = all((target / path.name).is_file() for path in small)
        if not (journal["complete"] and there and sum(journal["done"].values()) == total):
            left = total - sum(journal["done"].values()) + sum(path.stat().st_size for path in others)
            free = shutil.disk_usage(target).free
            if free < left:
                fix = "make room, or write to another disk"
                raise state_error(where, "the disk is too full", f"{free:,} bytes free", f"{left:,} bytes", fix)
            _write(work, journal, total, progress)
            last = [path for path in others if path.name == "config.json"]
            for path in [path for path in others if path not in last] + ([index] if index else []) + last:
                replace(target / path.name, read_small(path, where))
        layers = _reports(journal, pieces, tensors)
        journal |= {"complete": True, "layers": {name: layer._asdict() for name, layer in layers.items()}}
        replace(target / JOURNAL, (json.dumps(journal, indent=1) + "\n").encode())
    replaced = {name: tensor for tensor, (name, value) in heads.items() if value.ndim == 2}
    return Merged(layers, replaced, len(tensors) - len(pieces) - len(heads), total, resumed)


def _write(work: Work, journal: dict[str, Any], total: int, progress: Callable[[int, int], None] | None) -> None:
    """All that is not written yet."""
    replace(work.target / JOURNAL, json.dumps(journal).encode())
    written = sum(journal["done"].values())
    # The disk works on its own: data reach it, and only then the journal says so, while later blocks are merged.
    with pool(work) as (threads, do), ThreadPoolExecutor(1) as flusher:
        notes: list[Future[None]] = []
        try:
            for number in range(len(work.shards)):
                for count in _merge_shard(work, number, threads, do, journal, flusher, notes):
                    written += count
                    if progress is not None:
                        progress(written, total)
        finally:
            for note in notes:
                note.result()


# --- going on ----------------------------------------------------------------------------------------------------


def _plan_digest(
    shards: list[Shard], state: State, task: str | None, rename: Sequence[tuple[str, str]], layout: str | None
) -> str:
    """Names everything that the result depends on: a merge goes on only where all of it is the same."""
    places = [(name, layer.kind, layer.target) for name, layer in state.layers.items()]
    digest = hashlib.sha256(repr(("1", task, list(rename), layout, BLOCK, BLOCKS, places)).encode())
    for shard in shards:
        about = shard.source.stat()
        digest.update(repr((shard.name, about.st_size, about.st_mtime_ns, shard.header)).encode())
    for name, array in state.arrays():
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(st.as_bytes(np.ascontiguousarray(array)))
    return digest.hexdigest()


def _resume(target: Path, plan: str, where: str) -> dict[str, Any]:
    """The journal of an interrupted merge of the same things, or a new one."""
    if (target / JOURNAL).exists():
        try:
            journal = st.parse_json(read_small(target / JOURNAL, where), where)
        except CloraError:
            journal = {}
        if _is_journal(journal) and journal["plan"] == plan:
            return journal
        got = "a merge of other things" if _is_journal(journal) else f"a {JOURNAL} that is none"
        raise state_error(
            where, "the folder holds another merge", got, "a new folder", "choose another --out, or remove it"
        )
    if any(path.name != LOCK for path in target.iterdir()):
        raise state_error(
            where, "the folder is not new", "files in it", "a new or empty folder", "choose another --out"
        )
    return {"schema": "clora-merge/1", "plan": plan, "complete": False, "done": {}, "sums": {}}


def _is_journal(value: Any) -> bool:
    """Whether something is as `merge_checkpoint` notes it."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("plan"), str)
        and type(value.get("complete")) is bool
        and isinstance(value.get("done"), dict)
        and all(map(st.is_size, value["done"].values()))
        and isinstance(value.get("sums"), dict)
        and all(
            isinstance(sums, list) and len(sums) == 6 and all(isinstance(number, float) for number in sums)
            for sums in value["sums"].values()
        )
    )


def _settle(journal: dict[str, Any], work: Work) -> None:
    """Start a file again that is not there as the journal says; what it had added to the report goes, too."""
    journal["done"] = {shard.name: journal["done"].get(shard.name, 0) for shard in work.shards}
    for number, shard in enumerate(work.shards):
        total, done = shard.header.total, journal["done"][shard.name]
        whole = done == total and _size(work.target / shard.name) == total
        part = _size(work.partial(number)) == total and done in {job.start for job in jobs(work, number, 0)} | {total}
        sums = [journal["sums"].get(piece.layer) for piece in _begun(work, number, done)]
        if not (whole or part) or not all(one is not None and one[4] > 0 for one in sums):
            journal["done"][shard.name] = 0
            for piece in (piece for name in shard.header.entries for piece in work.pieces.get(name, ())):
                journal["sums"].pop(piece.layer, None)


def _begun(work: Work, number: int, done: int) -> Iterator[Piece]:
    """What the first ``done`` bytes of a file have taken a part of."""
    for name, entry in work.shards[number].header.entries.items():
        for piece in work.pieces.get(name, ()):
            if entry.start + piece.rows[0] * (entry.stop - entry.start) // entry.shape[0] < done:
                yield piece


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _merge_shard(
    work: Work,
    number: int,
    threads: ThreadPoolExecutor,
    do: Callable[[int, Job], Sums],
    journal: dict[str, Any],
    flusher: ThreadPoolExecutor,
    notes: list[Future[None]],
) -> Iterator[int]:
    """Write one file; yields the number of bytes of every job that is done, in order."""
    shard = work.shards[number]
    position = journal["done"][shard.name]
    final, partial = work.target / shard.name, work.partial(number)
    if position == shard.header.total and final.exists():
        return
    _reserve(partial, shard.header.total)
    waiting: deque[tuple[Job, Future[Sums]]] = deque()
    saved = time.monotonic()

    def note(text: bytes, last: bool) -> None:
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        replace(work.target / JOURNAL, text)
        if last:
            os.replace(partial, final)
            sync(work.target)

    try:
        todo = jobs(work, number, position)
        more = True
        while more or waiting:
            while more and len(waiting) < 4 * st.WORKERS:
                job = next(todo, None)
                more = job is not None
                if job is not None:
                    waiting.append((job, threads.submit(do, number, job)))
            if not waiting:
                break
            job, future = waiting.popleft()
            for layer, sums in future.result():
                _check_finite(layer, sums, work.where)
                add(journal["sums"].setdefault(layer, [0.0] * 6), sums)
            position = journal["done"][shard.name] = job.stop
            yield job.stop - job.start
            if time.monotonic() - saved > FLUSH_SECONDS and (not notes or notes[-1].done()):
                notes.append(flusher.submit(note, json.dumps(journal).encode(), False))
                saved = time.monotonic()
    finally:
        for _, future in waiting:
            future.cancel()
        notes.append(flusher.submit(note, json.dumps(journal).encode(), position == shard.header.total))


def _reserve(path: Path, size: int) -> None:
    """A file of that size, whose blocks the disk has set aside where it can."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        if hasattr(os, "posix_fallocate"):
            with contextlib.suppress(OSError):
                os.posix_fallocate(fd, 0, size)
        os.truncate(fd, size)
    finally:
        os.close(fd)


def _check_finite(layer: str, sums: list[float], where: str) -> None:
    if not all(map(math.isfinite, sums)):
        raise InvalidValueError(
            message(
                where,
                f"the merged weight of layer {layer!r} is not finite",
                got="NaN or infinity",
                needed="finite numbers",
                cause="an update too large for the checkpoint's half precision, or a checkpoint with NaN",
                fix="merge into a bfloat16 or float32 checkpoint",
            )
        )


def _reports(
    journal: dict[str, Any], pieces: dict[str, list[Piece]], tensors: dict[str, st.Entry]
) -> dict[str, LayerReport]:
    out = {}
    for tensor, parts in pieces.items():
        for piece in parts:
            size, lost, error, same, count, largest = journal["sums"][piece.layer]
            ratios = (1.0 + lost / size, (error / size) ** 0.5) if size else (0.0, 0.0)
            bound = piece.bound(largest, st.DTYPES[tensors[tensor].dtype])
            out[piece.layer] = LayerReport(tensor, *ratios, same / count, bound)
    return out
