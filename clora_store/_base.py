"""A checkpoint: its files, and which of its tensors an adapter's layers mean. Nothing is written here."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import clora_core as core
from clora_core.errors import DTypeError, InvalidValueError, ShapeError, message

from . import _safetensors as st
from ._blocks import Piece, Shard
from ._errors import bad, option_error, state_error
from ._folder import BOOK
from ._functions import adapter_at
from ._state import LAYOUTS, Array, Layer, State

JOURNAL = "clora-merge.json"
PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".gguf", ".safetensors"}
SMALL = 1 << 28


def find_shards(source: Path, where: str) -> tuple[list[Shard], Path | None]:
    """The files of a checkpoint with their headers, and its index."""
    index: Path | None = None
    if source.is_dir():
        indices = sorted(source.glob("*.safetensors.index.json"))
        if len(indices) > 1:
            got = ", ".join(path.name for path in indices)
            raise option_error(
                where, "several checkpoints in one folder", got, "one index", "pass a folder with one of them"
            )
        if indices:
            index = indices[0]
            files = _listed(index, where)
        else:
            files = sorted(source.glob("*.safetensors"))
        if len(files) > 1 and index is None:
            got = ", ".join(path.name for path in files[:8])
            raise option_error(
                where, "several files and no index", got, "an index, or one file", "pass the file itself"
            )
    else:
        files = [source]
    if not files or not all(path.exists() for path in files):
        missing = next((path.name for path in files if not path.exists()), "*.safetensors")
        fix = "pass the folder or file of a safetensors checkpoint; pickled weights are never read"
        raise option_error(where, "there is no checkpoint", f"no {missing}", "safetensors files", fix)
    shards, seen = [], dict[str, str]()
    for path in files:
        with st.opened(path, f"{where}, {path.name}") as fd:
            shards.append(Shard(path, path.name, st.read_header(fd, f"{where}, {path.name}")))
        for name in shards[-1].header.entries:
            if name in seen:
                raise bad(where, f"tensor {name!r} is there twice", f"{seen[name]} and {path.name}", "once")
            seen[name] = path.name
    return shards, index


def _listed(index: Path, where: str) -> list[Path]:
    text = st.parse_json(read_small(index, where), f"{where}, {index.name}")
    names = text.get("weight_map") if isinstance(text, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise bad(where, f"{index.name} has no weight_map of names", type(names).__name__, "an object of strings")
    files = sorted(set(names.values()))
    for name in files:
        if name != os.path.basename(name) or "\\" in name or not name.endswith(".safetensors"):
            raise bad(where, f"{index.name} names a file that is no shard beside it", repr(name)[:200], "a plain name")
    return [index.parent / name for name in files]


def other_files(source: Path) -> list[Path]:
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


def match(
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
                raise option_error(
                    where, "a rule is no regular expression", got, "REGEX=REPLACEMENT", "escape it"
                ) from None
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
            raise option_error(where, what, repr(name), f"one of its tensors (near: {', '.join(near) or 'none'})", fix)
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
            raise state_error(
                where,
                f"the weight of layer {layer_name!r} is tied to one that was not adapted",
                f"{', '.join(target.tied)} read the same tensor {name!r}",
                "a tensor of its own",
                fix,
            )
        if layer.kind == "head":
            for weight, value in target.replaced(core.routing(adapter)).items():
                name, entry = entry_of(layer_name, weight)
                _need_shape(name, entry.shape, value.shape, "a head that has grown; merge and save it in torch", where)
                rounded = st.round_once(value, st.DTYPES[entry.dtype])
                if not np.isfinite(rounded).all():
                    raise InvalidValueError(
                        message(
                            where,
                            f"head {layer_name!r} does not fit the checkpoint",
                            got=f"infinity in {entry.dtype}",
                            needed="finite numbers",
                            cause="a classifier too large for the checkpoint's half precision",
                            fix="merge into a bfloat16 or float32 checkpoint",
                        )
                    )
                if name in heads or name in pieces:
                    raise option_error(where, "two layers on one tensor", repr(name), "one each", "look at --rename")
                heads[name] = (layer_name, rounded)
            continue
        piece = _piece(layer_name, layer, adapter, name, entry, layout, where)
        if name in heads or any(_overlap(piece, other) for other in pieces.get(name, [])):
            raise option_error(where, "two layers on one tensor", repr(name), "one each", "look at --rename")
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
    R = core.routing(wide_adapter)
    rows = target.rows or (0, target.whole[0])
    largest = core.Adapter(abs(A).max(0, keepdims=True), R_old, R_delta, abs(B).max(1, keepdims=True))
    left, right = (A, R @ B) if stored == "out,in" else (B.T, (A @ R).T)
    left, right = np.ascontiguousarray(left), np.ascontiguousarray(right)
    ranges = (rows, (0, B.shape[1])) if stored == "out,in" else ((0, B.shape[1]), rows)
    return Piece(layer_name, left, right, *ranges, largest)


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


def read_small(path: Path, where: str) -> bytes:
    with st.opened(path, f"{where}, {path.name}") as fd:
        size = os.fstat(fd).st_size
        if size > SMALL:
            raise bad(where, f"{path.name} is too large", size, f"at most {SMALL}")
        return st.read_exactly(fd, size, 0, where)
