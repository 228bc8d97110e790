"""clora.json: what a State says of itself, and back, every value checked for its type before it is used."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

import clora_core as core

from ._errors import bad
from ._safetensors import DTYPES, MOST_AXES, is_size, parse_json
from ._state import Layer, Snapshot, State, Target

SCHEMA = "clora-adapter/1"
FILE = re.compile(r"(?:state|snapshots)-[0-9a-f]{32}\.safetensors")
FIELDS = ("A", "R_old", "R_delta", "B", "A_spare", "B_spare", "S", "P", "q", "C")
Array = np.ndarray[Any, Any]


class Described(NamedTuple):
    """What clora.json says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


class File(NamedTuple):
    """What clora.json says of one file of tensors."""

    bytes: int
    tensors: dict[str, Described]


class Group(NamedTuple):
    """Snapshots of consecutive tasks, stacked along the first axis of each tensor of a file."""

    first: int
    tasks: int
    file: str


class Book(NamedTuple):
    """clora.json, read and checked, without the tensors."""

    fields: dict[str, Any]  # of a State, but for layers, snapshots and digest
    layers: dict[str, dict[str, Any]]  # of a Layer, but for its arrays
    state: str  # name of the file that holds the layers' tensors
    groups: list[Group]
    files: dict[str, File]


def encode(state: State, file: str, groups: list[Group], files: Mapping[str, File]) -> bytes:
    """The text of clora.json."""
    unobserved = set(state.unobserved)
    book = {
        "schema": SCHEMA,
        "requires": [],
        "factors": state.factors,
        "tasks": [{"name": name, "observed": name not in unobserved} for name in state.tasks],
        "open": state.open,
        "options": dict(state.options),
        "provenance": dict(state.provenance),
        "layers": {
            name: {
                "kind": layer.kind,
                "rank": layer.adapter.R_old.shape[-1],
                "complete": layer.complete,
                **layer.target._asdict(),
            }
            for name, layer in state.layers.items()
        },
        "state": file,
        "snapshots": [group._asdict() for group in groups],
        "files": {
            name: {"bytes": file.bytes, "tensors": {n: t._asdict() for n, t in file.tensors.items()}}
            for name, file in files.items()
        },
    }
    return (json.dumps(book, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode()


def decode(text: bytes, where: str) -> Book:
    """The book of a folder; FormatError where it is none, or of another version."""

    def no(what: str, got: object, needed: object, fix: str = "") -> Exception:
        return bad(where, what, got, needed, cause="a file edited by hand, or cut off", fix=fix)

    def get(owner: dict[str, Any], key: str, kind: type, what: str) -> Any:
        value = owner.get(key)
        if type(value) is not kind:
            raise no(f"{what}: {key!r} is missing or of another type", type(value).__name__, kind.__name__)
        return value

    def texts(values: Any, what: str) -> tuple[str, ...]:
        if type(values) is not list or not all(type(value) is str for value in values):
            raise no(f"{what} is no list of names", type(values).__name__, "a list of strings")
        return tuple(values)

    def sizes(values: Any, what: str) -> tuple[int, ...]:
        if type(values) is not list or len(values) > MOST_AXES or not all(map(is_size, values)):
            raise no(f"{what} is no list of sizes", type(values).__name__, "whole numbers, not negative")
        return tuple(values)

    def target(name: str, raw: dict[str, Any]) -> Target:
        what = f"layer {name!r}"
        rows, bias = raw.get("rows"), raw.get("bias")
        if rows is not None and len(sizes(rows, f"rows of {what}")) != 2:
            raise no(f"{what}: rows are no pair", len(rows), 2)
        if bias is not None:
            get(raw, "bias", str, what)
        return Target(
            weight=get(raw, "weight", str, what),
            shape=sizes(raw.get("shape"), f"shape of {what}"),
            layout=get(raw, "layout", str, what),
            rows=None if rows is None else (rows[0], rows[1]),
            bias=bias,
            tied=texts(raw.get("tied"), f"tied of {what}"),
        )

    def described(name: str, raw: Any) -> Described:
        what = f"tensor {name!r}"
        if type(raw) is not dict:
            raise no(f"{what} is not described", type(raw).__name__, "an object")
        out = Described(get(raw, "dtype", str, what), sizes(raw.get("shape"), what), get(raw, "sha256", str, what))
        if 0 in out.shape:
            raise no(f"{what} is empty", out.shape, "at least one number")
        if out.dtype not in DTYPES:
            raise no(f"{what} has a dtype that no adapter has", repr(out.dtype), ", ".join(DTYPES))
        return out

    raw = parse_json(text, where)
    if type(raw) is not dict:
        raise no("this is no JSON object", type(raw).__name__, "an object")
    if raw.get("schema") != SCHEMA:
        newer = isinstance(raw.get("schema"), str) and raw["schema"].startswith("clora-adapter/")
        fix = "update clora: the folder is of a later version" if newer else "pass the folder of an adapter"
        raise no("the schema is another", repr(raw.get("schema"))[:80], repr(SCHEMA), fix)
    requires = texts(raw.get("requires"), "requires")
    if requires:
        fix = "update clora: the folder says that reading it takes more than this version knows"
        raise no("the folder needs features that are unknown here", repr(requires)[:200], "none", fix)

    tasks = get(raw, "tasks", list, "clora.json")
    for task in tasks:
        if type(task) is not dict:
            raise no("a task is no object", type(task).__name__, "an object")
        get(task, "name", str, "a task")
        get(task, "observed", bool, "a task")
    provenance = get(raw, "provenance", dict, "clora.json")
    texts(list(provenance.values()), "provenance")
    fields = {
        "factors": get(raw, "factors", str, "clora.json"),
        "tasks": tuple(task["name"] for task in tasks),
        "unobserved": tuple(task["name"] for task in tasks if not task["observed"]),
        "open": None if raw.get("open") is None else get(raw, "open", str, "clora.json"),
        "options": get(raw, "options", dict, "clora.json"),
        "provenance": provenance,
    }
    layers, ranks = {}, {}
    for name, layer in get(raw, "layers", dict, "clora.json").items():
        if type(layer) is not dict:
            raise no(f"layer {name!r} is not described", type(layer).__name__, "an object")
        layers[name] = {
            "kind": get(layer, "kind", str, f"layer {name!r}"),
            "complete": get(layer, "complete", bool, f"layer {name!r}"),
            "target": target(name, layer),
        }
        ranks[name] = layer.get("rank")
    files = {}
    for name, file in get(raw, "files", dict, "clora.json").items():
        if not FILE.fullmatch(name):
            raise no("a file's name is none that clora writes", repr(name)[:200], FILE.pattern)
        if type(file) is not dict or not is_size(file.get("bytes")):
            raise no(f"file {name} is not described", "no size", "bytes and tensors")
        tensors = get(file, "tensors", dict, f"file {name}").items()
        files[name] = File(file["bytes"], {tensor: described(tensor, value) for tensor, value in tensors})
    groups = []
    for group in get(raw, "snapshots", list, "clora.json"):
        if type(group) is not dict or not (is_size(group.get("first")) and is_size(group.get("tasks"))):
            raise no("a group of snapshots is not described", type(group).__name__, "first, tasks and file")
        groups.append(Group(group["first"], group["tasks"], get(group, "file", str, "a group of snapshots")))
    end = groups[0].first if groups else len(tasks)
    for group in groups:
        if group.first != end or group.tasks < 1:
            raise no("groups of snapshots do not follow each other", f"{group.first}, {group.tasks}", f"first {end}")
        end += group.tasks
    if end != len(tasks):
        raise no("snapshots are not those of the last tasks", end, len(tasks))
    state = get(raw, "state", str, "clora.json")
    used = {state, *(group.file for group in groups)}  # groups of the same content share a file
    if used != set(files):
        raise no("the files listed are not those used", f"{len(used)} used", f"{len(files)} listed")
    for name, rank in ranks.items():
        told = files[state].tensors.get(f"{name}.R_old")
        if told is not None and (not told.shape or not is_size(rank) or rank != told.shape[-1]):
            raise no(f"layer {name!r} has another rank than its routing", repr(rank), told.shape)
    return Book(fields, layers, state, groups, files)


def split(
    tensors: Mapping[str, Array], layers: Mapping[str, Any], known: tuple[str, ...], where: str
) -> dict[str, Any]:
    """Layer -> field -> array, of "layer.field" -> array; fields that a later version has added are left out."""
    out: dict[str, dict[str, Array]] = {name: {} for name in layers}
    for key, array in tensors.items():
        name, _, field = key.rpartition(".")
        if name not in out:
            raise bad(where, "a tensor of a layer that is not listed", repr(key)[:200], "a layer of clora.json")
        if field in known:
            out[name][field] = array
    return out


def assemble(book: Book, tensors: Mapping[str, Mapping[str, Array]], where: str) -> State:
    """The State of a book and of the tensors of its files."""
    layers = {}
    for name, fields in split(tensors[book.state], book.layers, FIELDS, where).items():
        for needed in ("R_old", "R_delta"):
            if needed not in fields:
                raise bad(where, f"layer {name!r} has no routing", ", ".join(fields) or "nothing", needed)
        pair, triple = (fields.get("A_spare"), fields.get("B_spare")), [fields.get(f) for f in ("S", "P", "q")]
        for what, arrays in (("spare directions", pair), ("moments", triple)):
            if any(array is None for array in arrays) != all(array is None for array in arrays):
                raise bad(where, f"layer {name!r} has half of its {what}", ", ".join(fields), "all, or none")
        spare: Any = None if pair[0] is None else pair
        moments = None if triple[0] is None else core.Moments(*triple)
        adapter = core.Adapter(fields.get("A"), fields["R_old"], fields["R_delta"], fields.get("B"))
        layers[name] = Layer(
            adapter=adapter, spare=spare, moments=moments, observed=fields.get("C"), **book.layers[name]
        )
    stacks = []
    for group in book.groups:
        parts = split(tensors[group.file], layers, Snapshot._fields, where)
        for name, fields in parts.items():
            for field, array in fields.items():
                if array.ndim < 1 or array.shape[0] != group.tasks:
                    got = f"{array.shape}"
                    raise bad(where, f"tensor {name}.{field} of {group.file}", got, f"{group.tasks} snapshots")
            if "R" not in fields:
                raise bad(where, f"layer {name!r} has no routing in {group.file}", ", ".join(fields) or "nothing", "R")
        stacks.append((group, parts))
    return State(layers=layers, snapshots=Stacked(book.fields["tasks"], stacks), **book.fields)


class Stacked(Mapping[str, Mapping[str, Snapshot]]):
    """Snapshots by task, cut from their stacks when they are asked for: thousands of tasks are a few arrays."""

    def __init__(self, tasks: tuple[str, ...], stacks: list[tuple[Group, dict[str, dict[str, Array]]]]) -> None:
        self._where = {
            name: (parts, i)
            for group, parts in stacks
            for i, name in enumerate(tasks[group.first : group.first + group.tasks])
        }

    def __getitem__(self, task: str) -> dict[str, Snapshot]:
        parts, i = self._where[task]
        return {name: Snapshot(**{f: array[i] for f, array in fields.items()}) for name, fields in parts.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
