"""Merging an adapter into a checkpoint of any size: tensor by tensor, in blocks, from one folder into a new one."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import array_api_compat.numpy as xp
import numpy as np

import clora_core as core
from clora_core.errors import CloraError, DTypeError, InvalidValueError, OptionError, ShapeError, StateError, message

from . import _safetensors as st
from ._blocks import BLOCK, BLOCKS, Job, Piece, Shard, Sums, Work, add, jobs, pool
from ._folder import BOOK, locked, replace, sweep, sync
from ._functions import adapter_at
from ._state import LAYOUTS, Array, Layer, State, check

JOURNAL = "clora-merge.json"
FLUSH_SECONDS = 0.25
PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".gguf", ".safetensors"}
SMALL = 1 << 28


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
        raise _option(where, "unknown layout", repr(layout), " or ".join(map(repr, LAYOUTS)), "pass one of these")
    check(state, where)
    source, target = Path(base), Path(out)
    if target.exists() and source.exists() and target.resolve() in (source.resolve(), source.resolve().parent):
        raise _state(where, "the output is the input", os.fspath(out), "a new folder", "choose another --out")
    shards, index = _shards(source, where)
    tensors = {name: entry for shard in shards for name, entry in shard.header.entries.items()}
    pieces, heads = _match(state, tensors, task, rename, layout, where)
    plan = _plan_digest(shards, state, task, rename, layout)
    total = sum(shard.header.total for shard in shards)
    others = _others(source)
    target.mkdir(parents=True, exist_ok=True)
    with locked(target, where):
        sweep(target)
        journal = _resume(target, plan, where)
        resumed = bool(journal["done"])
        work = Work(shards, target, pieces, heads, where)
        _settle(journal, work)
        if not journal["complete"] or sum(journal["done"].values()) < total:
            left = total - sum(journal["done"].values()) + sum(path.stat().st_size for path in others)
            free = shutil.disk_usage(target).free
            if free < left:
                fix = "make room, or write to another disk"
                raise _state(where, "the disk is too full", f"{free:,} bytes free", f"{left:,} bytes", fix)
            _write(work, journal, total, progress)
            last = [path for path in others if path.name == "config.json"]
            for path in [path for path in others if path not in last] + ([index] if index else []) + last:
                replace(target / path.name, _read_small(path, where))
        layers = _reports(journal, pieces, tensors)
        journal |= {"complete": True, "layers": {name: layer._asdict() for name, layer in layers.items()}}
        replace(target / JOURNAL, (json.dumps(journal, indent=1) + "\n").encode())
    replaced = {name: tensor for tensor, (name, value) in heads.items() if value.ndim == 2}
    return Merged(layers, replaced, len(tensors) - len(pieces) - len(heads), total, resumed)


def _write(work: Work, journal: dict[str, Any], total: int, progress: Callable[[int, int], None] | None) -> None:
    """All that is not written yet."""
    replace(work.target / JOURNAL, json.dumps(journal).encode())
    written = sum(journal["done"].values())
    with pool(work) as (threads, do):
        for number in range(len(work.shards)):
            for count in _merge_shard(work, number, threads, do, journal):
                written += count
                if progress is not None:
                    progress(written, total)


# --- what there is -----------------------------------------------------------------------------------------------


def _shards(source: Path, where: str) -> tuple[list[Shard], Path | None]:
    """The files of a checkpoint with their headers, and its index."""
    index: Path | None = None
    if source.is_dir():
        indices = sorted(source.glob("*.safetensors.index.json"))
        if len(indices) > 1:
            got = ", ".join(path.name for path in indices)
            raise _option(
                where, "several checkpoints in one folder", got, "one index", "pass a folder with one of them"
            )
        if indices:
            index = indices[0]
            files = _listed(index, where)
        else:
            files = sorted(source.glob("*.safetensors"))
        if len(files) > 1 and index is None:
            got = ", ".join(path.name for path in files[:8])
            raise _option(where, "several files and no index", got, "an index, or one file", "pass the file itself")
    else:
        files = [source]
    if not files or not all(path.exists() for path in files):
        missing = next((path.name for path in files if not path.exists()), "*.safetensors")
        fix = "pass the folder or file of a safetensors checkpoint; pickled weights are never read"
        raise _option(where, "there is no checkpoint", f"no {missing}", "safetensors files", fix)
    shards, seen = [], dict[str, str]()
    for path in files:
        with st.opened(path, f"{where}, {path.name}") as fd:
            shards.append(Shard(path, path.name, st.read_header(fd, f"{where}, {path.name}")))
        for name in shards[-1].header.entries:
            if name in seen:
                raise st.bad(where, f"tensor {name!r} is there twice", f"{seen[name]} and {path.name}", "once")
            seen[name] = path.name
    return shards, index


def _listed(index: Path, where: str) -> list[Path]:
    text = st.parse_json(_read_small(index, where), f"{where}, {index.name}")
    names = text.get("weight_map") if isinstance(text, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise st.bad(where, f"{index.name} has no weight_map of names", type(names).__name__, "an object of strings")
    files = sorted(set(names.values()))
    for name in files:
        if name != os.path.basename(name) or "\\" in name or not name.endswith(".safetensors"):
            raise st.bad(
                where, f"{index.name} names a file that is no shard beside it", repr(name)[:200], "a plain name"
            )
    return [index.parent / name for name in files]


def _others(source: Path) -> list[Path]:
    """Small files that belong to a model's folder."""
    if not source.is_dir():
        return []
    return sorted(
        path
        for path in source.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in (JOURNAL, BOOK)
        and path.suffix not in PICKLED
        and not path.name.endswith(".index.json")
        and path.stat().st_size <= SMALL
    )


def _match(
    state: State,
    tensors: dict[str, st.Entry],
    task: str | None,
    rename: Sequence[tuple[str, str]],
    layout: str | None,
    where: str,
) -> tuple[dict[str, list[Piece]], dict[str, tuple[str, Array]]]:
    """tensor -> what is added to it, and tensor -> (layer, what takes its place)."""

    def name_of(weight: str) -> str:
        for pattern, replacement in rename:
            try:
                weight = re.sub(pattern, replacement, weight)
            except (re.error, IndexError) as error:
                got = f"{pattern!r} -> {replacement!r}: {error}"
                raise _option(where, "a rule is no regular expression", got, "REGEX=REPLACEMENT", "escape it") from None
        return weight

    def entry_of(layer: str, weight: str) -> tuple[str, st.Entry]:
        name = name_of(weight)
        if name not in tensors:
            ends = [n for n in tensors if n.endswith(f".{name}")]
            near = ends or difflib.get_close_matches(name, tensors, n=3, cutoff=0.5)
            fix = "rename it: --rename 'REGEX=REPLACEMENT'"
            if len(ends) == 1:
                fix = f"the checkpoint has a prefix: --rename '^={ends[0].removesuffix(name)}'"
            what = f"the weight of layer {layer!r} is not in the checkpoint"
            raise _option(where, what, repr(name), f"one of its tensors (near: {', '.join(near) or 'none'})", fix)
        if tensors[name].dtype not in st.DTYPES:
            raise DTypeError(
                message(
                    where,
                    f"tensor {name!r} can't be merged into",
                    got=tensors[name].dtype,
                    needed=", ".join(st.DTYPES),
                    cause="a quantised checkpoint",
                    fix="merge into the unquantised one, and quantise the result",
                )
            )
        return name, tensors[name]

    pieces: dict[str, list[Piece]] = {}
    heads: dict[str, tuple[str, Array]] = {}
    for layer_name, layer in state.layers.items():
        target, adapter = layer.target, adapter_at(state, layer_name, task)
        name, entry = entry_of(layer_name, target.weight)
        if target.tied:  # also where both are stored: loading such a model ties them again
            fix = "untie the two in the model before attaching, or keep the adapter unmerged"
            raise _state(
                where,
                f"the weight of layer {layer_name!r} is tied to one that was not adapted",
                f"{', '.join(target.tied)} read the same tensor {name!r}",
                "a tensor of its own",
                fix,
            )
        if layer.kind == "head":
            V = core.routing(adapter, xp=xp)
            parts = {target.weight: V} if target.bias is None else {target.weight: V[:, :-1], target.bias: V[:, -1]}
            for weight, value in parts.items():
                name, entry = entry_of(layer_name, weight)
                _need_shape(name, entry.shape, value.shape, "a head that has grown; merge and save it in torch", where)
                if name in heads or name in pieces:
                    raise _option(where, "two layers on one tensor", repr(name), "one each", "look at --rename")
                heads[name] = (layer_name, value)
            continue
        piece = _piece(layer_name, layer, adapter, name, entry, layout, where)
        if name in heads or any(_overlap(piece, other) for other in pieces.get(name, [])):
            raise _option(where, "two layers on one tensor", repr(name), "one each", "look at --rename")
        pieces.setdefault(name, []).append(piece)
    return pieces, heads


def _piece(
    layer_name: str, layer: Layer, adapter: core.Adapter, name: str, entry: st.Entry, layout: str | None, where: str
) -> Piece:
    target, stored = layer.target, layer.target.layout
    shape = target.shape
    if layout is not None and layer.kind == "linear" and layout != stored:
        stored, shape = layout, shape[::-1]
    hint = "another model"
    if layer.kind == "linear" and entry.shape == shape[::-1]:
        hint = f"a checkpoint in the other layout: pass layout={LAYOUTS[stored == LAYOUTS[0]]!r}"
    _need_shape(name, entry.shape, shape, hint, where)
    wide = np.float64 if "F64" in (entry.dtype, st.dtype_name(adapter.R_old.dtype)) else np.float32
    A, R_old, R_delta, B = wide_adapter = core.Adapter(*(array.astype(wide) for array in adapter))
    R = core.routing(wide_adapter, xp=xp)
    rows = target.rows or (0, target._replace(rows=None).matrix[0])
    largest = core.Adapter(abs(A).max(0, keepdims=True), R_old, R_delta, abs(B).max(1, keepdims=True))
    left, right = (A, R @ B) if stored == "out,in" else (B.T, (A @ R).T)
    left, right = np.ascontiguousarray(left), np.ascontiguousarray(right)
    ranges = (rows, (0, B.shape[1])) if stored == "out,in" else ((0, B.shape[1]), rows)
    return Piece(layer_name, left, right, right @ right.T, *ranges, largest)


def _overlap(one: Piece, two: Piece) -> bool:
    def meet(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a[0] < b[1] and b[0] < a[1]

    return meet(one.rows, two.rows) and meet(one.columns, two.columns)


def _need_shape(name: str, got: tuple[int, ...], needed: tuple[int, ...], cause: str, where: str) -> None:
    if got != needed:
        fix = "pass the checkpoint the adapter was trained on"
        raise ShapeError(
            message(where, f"tensor {name!r} has another shape", got=got, needed=needed, cause=cause, fix=fix)
        )


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
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _resume(target: Path, plan: str, where: str) -> dict[str, Any]:
    """The journal of an interrupted merge of the same things, or a new one."""
    if (target / JOURNAL).exists():
        try:
            journal = st.parse_json(_read_small(target / JOURNAL, where), where)
        except CloraError:
            journal = {}
        if _is_journal(journal) and journal["plan"] == plan:
            return journal
        got = "a merge of other things" if _is_journal(journal) else f"a {JOURNAL} that is none"
        raise _state(where, "the folder holds another merge", got, "a new folder", "choose another --out, or remove it")
    if any(target.iterdir()):
        raise _state(where, "the folder is not new", "files in it", "a new or empty folder", "choose another --out")
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
        if not (whole or part):
            journal["done"][shard.name] = 0
            for piece in (piece for name in shard.header.entries for piece in work.pieces.get(name, ())):
                journal["sums"].pop(piece.layer, None)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _read_small(path: Path, where: str) -> bytes:
    with st.opened(path, f"{where}, {path.name}") as fd:
        size = os.fstat(fd).st_size
        if size > SMALL:
            raise st.bad(where, f"{path.name} is too large", size, f"at most {SMALL}")
        return st.read_exactly(fd, size, 0, where)


def _merge_shard(
    work: Work, number: int, threads: ThreadPoolExecutor, do: Callable[[int, Job], Sums], journal: dict[str, Any]
) -> Iterator[int]:
    """Write one file; yields the number of bytes of every job that is done, in order."""
    shard = work.shards[number]
    done = journal["done"][shard.name]
    final, partial = work.target / shard.name, work.partial(number)
    if done == shard.header.total and final.exists():
        return
    with ExitStack() as stack:
        to = os.open(partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        stack.callback(os.close, to)
        os.truncate(to, shard.header.total)
        waiting: deque[tuple[Job, Future[Sums]]] = deque()
        stack.callback(lambda: [future.cancel() for _, future in waiting])
        flusher = stack.enter_context(ThreadPoolExecutor(1))  # the disk works while the processor does
        flushing: Future[None] | None = None
        saved = time.monotonic()

        def note(text: bytes) -> None:
            os.fsync(to)
            replace(work.target / JOURNAL, text)

        def noted(position: int) -> bytes:
            journal["done"][shard.name] = position
            return json.dumps(journal).encode()

        position = done
        try:
            todo = jobs(work, number, done)
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
                position = job.stop
                yield job.stop - job.start
                if time.monotonic() - saved > FLUSH_SECONDS and (flushing is None or flushing.done()):
                    flushing = flusher.submit(note, noted(position))
                    saved = time.monotonic()
        finally:
            if flushing is not None:
                flushing.result()
            note(noted(position))
    os.replace(partial, final)
    sync(work.target)


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


def _option(where: str, what: str, got: str, needed: str, fix: str) -> OptionError:
    cause = "names or options of another model"
    return OptionError(message(where, what, got=got, needed=needed, cause=cause, fix=fix))


def _state(where: str, what: str, got: str, needed: str, fix: str) -> StateError:
    cause = "a folder or disk that is in use for something else"
    return StateError(message(where, what, got=got, needed=needed, cause=cause, fix=fix))
