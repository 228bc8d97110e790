"""Saved adapters for the tests: any State, made from a seed and a few choices, and ways to spoil a folder of one."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

import clora_core as core
import clora_store as store

DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


def make_state(
    seed: int,
    *,
    layers: int = 2,
    head: bool = True,
    tasks: int = 3,
    factors: str = "first-task",
    dtype: Any = np.float32,
    spare: int = 0,
    snapshots: bool = True,
    begun: bool = False,
    names: list[str] | None = None,
    task_names: list[str] | None = None,
) -> store.State:
    """An adapter with everything drawn from the seed; sizes differ from layer to layer."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int, dtype: Any = dtype) -> Any:
        return np.asarray(rng.standard_normal(shape)).astype(dtype)

    names = names or [f"block.{i}.proj" for i in range(layers)] + ["head"]
    task_names = task_names or [f"task-{i}" for i in range(tasks)]
    out: dict[str, store.Layer] = {}
    for i, name in enumerate(names[:-1]):
        d_out, d_in, r = int(rng.integers(4, 8)), int(rng.integers(4, 9)), int(rng.integers(1, 4))
        k = min(spare, min(d_out, d_in) - r)
        target = [
            store.Target(f"{name}.weight", (d_out, d_in)),
            store.Target(f"{name}.weight", (d_in, d_out), "in,out"),
            store.Target(f"{name}.weight", (3 * d_out, d_in), rows=(d_out, 2 * d_out), tied=("other.weight",)),
        ][i % 3]
        S = draw(r + k, r + k, dtype=np.float64)
        out[name] = store.Layer(
            kind="linear",
            target=target,
            adapter=core.Adapter(draw(d_out, r), draw(r, r), draw(r, r), draw(r, d_in)),
            spare=(draw(d_out, k), draw(k, d_in)) if k else None,
            moments=None if factors == "every-task" else core.Moments(S, S.T.copy(), draw(dtype=np.float64)),
            observed=S if begun and factors != "every-task" else None,
            complete=i % 2 == 0,
        )
    if head:
        target = store.Target(f"{names[-1]}.weight", (3, 5), bias=f"{names[-1]}.bias")
        S, P = draw(6, 6, dtype=np.float64), draw(4, 6, dtype=np.float64)
        moments = None if factors == "every-task" else core.Moments(S, P, draw(dtype=np.float64))
        V = core.Adapter(None, draw(4, 6), draw(4, 6), None)  # grown by one class
        observed = S if begun and factors != "every-task" else None
        out[names[-1]] = store.Layer("head", target, V, moments=moments, observed=observed)

    def snapshot(layer: store.Layer) -> store.Snapshot:
        if layer.kind == "head":
            return store.Snapshot(draw(4, 6))
        d_out, d_in = layer.target.matrix
        most = layer.adapter.R_old.shape[0] + (0 if layer.spare is None else layer.spare[1].shape[0])
        r = int(rng.integers(1, most + 1))
        return store.Snapshot(draw(r, r), *((draw(d_out, r), draw(r, d_in)) if factors == "every-task" else ()))

    return store.State(
        layers=out,
        factors=factors,
        tasks=tuple(task_names),
        unobserved=tuple(task_names[1:2]),
        open="the open one" if begun else None,
        snapshots={task: {n: snapshot(layer) for n, layer in out.items()} for task in task_names} if snapshots else {},
        options={"stop_old": True, "scale": 0.5},
        provenance={"framework": "none", "made from": f"seed {seed}"},
    )


@st.composite
def states(draw: Any) -> store.State:
    """Any State that fits together."""
    layers = draw(st.integers(0, 4))
    names = draw(st.lists(NAMES, min_size=layers + 1, max_size=layers + 1, unique=True))
    task_names = draw(st.lists(NAMES.filter(lambda name: name != "the open one"), max_size=4, unique=True))
    return make_state(
        draw(st.integers(0, 2**32)),
        head=layers == 0 or draw(st.booleans()),
        factors=draw(st.sampled_from(["first-task", "every-task", "never"])),
        dtype=draw(st.sampled_from(DTYPES)),
        spare=draw(st.integers(0, 3)),
        snapshots=draw(st.booleans()),
        begun=draw(st.booleans()),
        names=names,
        task_names=task_names or None,
    )


def same(one: store.State, two: store.State) -> None:
    """Every name and every bit."""
    assert one._replace(layers={}, snapshots={}, digest=None) == two._replace(layers={}, snapshots={}, digest=None)
    assert list(one.layers) == list(two.layers)
    assert list(one.snapshots) == list(two.snapshots)
    for name, layer in one.layers.items():
        other = two.layers[name]
        assert (layer.kind, layer.target, layer.complete) == (other.kind, other.target, other.complete)
    a, b = dict(one.arrays()), dict(two.arrays())
    assert list(a) == list(b)
    for name, array in a.items():
        assert array.dtype == b[name].dtype, name
        assert array.shape == b[name].shape, name
        assert array.tobytes() == b[name].tobytes(), name


def read_by_hand(folder: Path) -> dict[str, bytes]:
    """A reader that knows nothing but JSON and the safetensors container: "file/tensor" -> its bytes."""
    out = {}
    for name in json.loads((folder / "clora.json").read_text(encoding="utf-8"))["files"]:
        data = (folder / name).read_bytes()
        (n,) = struct.unpack("<Q", data[:8])
        for tensor, entry in json.loads(data[8 : 8 + n]).items():
            start, stop = entry["data_offsets"]
            out[f"{name}/{tensor}"] = data[8 + n + start : 8 + n + stop]
    return out


def write_container(path: Path, header: Any, data: bytes) -> None:
    """A safetensors file with any header: an object, or text as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


# --- spoiling ----------------------------------------------------------------------------------------------------

WRONG = [
    None,
    True,
    False,
    0,
    1,
    -1,
    1.0,
    0.5,
    2**63,
    10**400,
    "",
    "x",
    "../../x",
    "\ud800",
    [],
    [[]],
    [0],
    [-1],
    {},
    [{}],
]


def spoil(folder: Path, rng: np.random.Generator) -> str:
    """Damage one thing in a folder, chosen at random; says what."""
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors")
    kind = rng.choice(["flip", "cut", "grow", "json", "json", "json", "header", "header", "header", "swap", "text"])
    book = folder / "clora.json"
    path = files[rng.integers(len(files))] if rng.random() < 0.7 or kind == "header" else book
    data = path.read_bytes()
    if kind == "flip":
        i = int(rng.integers(len(data)))
        path.write_bytes(data[:i] + bytes([data[i] ^ (1 << int(rng.integers(8)))]) + data[i + 1 :])
    elif kind == "cut":
        path.write_bytes(data[: int(rng.integers(len(data)))])
    elif kind == "grow":
        path.write_bytes(data + rng.bytes(int(rng.integers(1, 64))))
    elif kind == "swap":
        path.write_bytes(files[rng.integers(len(files))].read_bytes())
    elif kind == "text":
        texts = [
            b"",
            b"{",
            b"[" * 100_000,
            b"null",
            b'{"schema": NaN}',
            b"\xff\xfe",
            data.replace(b"{", b'{"tasks": 1,', 1),
        ]
        book.write_bytes(texts[rng.integers(len(texts))])
    elif kind == "json":
        value = json.loads(book.read_bytes())
        where = damage(value, rng)
        book.write_text(json.dumps(value, ensure_ascii=True), encoding="utf-8")
        return f"{kind} {where}"
    else:
        (n,) = struct.unpack("<Q", data[:8])
        value = json.loads(data[8 : 8 + n])
        where = damage(value, rng)
        text = json.dumps(value).encode()
        lies = [0, 1, 2**31, 2**63 - 1, 2**64 - 1, n + 1]
        length = len(text) if rng.random() < 0.8 else lies[rng.integers(len(lies))]
        path.write_bytes(struct.pack("<Q", length) + text + data[8 + n :])
        if rng.random() < 0.7:  # the book agrees about the size, so that the reader comes to the header
            told = json.loads(book.read_bytes())
            if path.name in told["files"]:
                told["files"][path.name]["bytes"] = path.stat().st_size
                book.write_text(json.dumps(told), encoding="utf-8")
        return f"{kind} {where}"
    return f"{kind} {path.name}"


def damage(value: Any, rng: np.random.Generator) -> str:
    """Change, drop or double one thing somewhere in a JSON value."""
    path = []
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return f"{path} empty"
        key = keys[rng.integers(len(keys))]
        path.append(key)
        if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.8:
            value = value[key]
            continue
        how = rng.integers(4)
        if how == 0:
            value[key] = WRONG[rng.integers(len(WRONG))]
        elif how == 1:
            del value[key]
        elif how == 2 and isinstance(value, dict):
            value[str(WRONG[rng.integers(len(WRONG))])] = value[key]
        elif isinstance(value[key], int) and not isinstance(value[key], bool):
            value[key] += int(rng.choice([-1, 1, 8, -8, 2**40]))
        else:
            value[key] = WRONG[rng.integers(len(WRONG))]
        return f"{path} {how}"
