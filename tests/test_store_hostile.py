"""Folders that are damaged or hostile: each is a typed error or a correct load, quickly and in little memory.

``python tests/test_store_hostile.py --count 20000`` runs more of them; ``nox -s fuzz`` is guided by coverage.
"""

import argparse
import contextlib
import json
import shutil
import time
import tracemalloc

import numpy as np
import pytest
from folders import make_state, same, spoil, write_container

import clora_store as store
from clora_core.errors import CloraError, FormatError

ROOM = 4 << 20  # bytes for JSON, messages, buffers, and tables of the interpreter that grow now and then


def spoiled(folder, pristine, state, seed):
    """Damage a copy of a folder and load it. Returns what came of it, and its peak of memory over the folder's size."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pristine, folder)
    rng = np.random.default_rng(seed)
    what = [spoil(folder, rng)]
    if rng.random() < 0.5:
        with contextlib.suppress(Exception):  # what is spoiled may be past a second blow
            what.append(spoil(folder, rng))
    size = sum(path.stat().st_size for path in folder.iterdir())
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    start = time.perf_counter()
    try:
        loaded = store.load(folder)
        same(loaded._replace(options={}, provenance={}, open=None, unobserved=()), loaded_as(state, loaded))
        outcome = "loaded"
    except CloraError as error:
        str(error).encode()  # a message that can be printed
        outcome = type(error).__name__
    except Exception as error:
        raise AssertionError(f"seed {seed}: {what}") from error
    peak = tracemalloc.get_traced_memory()[1] - before
    assert time.perf_counter() - start < 10, (seed, what)
    assert peak <= 2 * size + ROOM, (seed, what, peak, size)
    return outcome


def loaded_as(state, loaded):
    """What was saved, with what a folder may say otherwise without contradicting itself: names and their order."""
    renamed = {
        name: state.layers.get(name, layer)._replace(
            target=layer.target, kind=layer.kind, complete=layer.complete, observed=layer.observed
        )
        for name, layer in loaded.layers.items()
    }
    snapshots = dict(loaded.snapshots) if loaded.tasks != state.tasks else state.snapshots
    return state._replace(
        layers=renamed,
        snapshots=snapshots if loaded.snapshots else {},
        tasks=loaded.tasks,
        factors=loaded.factors,
        options={},
        provenance={},
        open=None,
        unobserved=(),
    )


def run(count, first, folder):
    """Spoil so many folders; how often each thing came of it."""
    outcomes = {}
    states = [
        make_state(1),
        make_state(2, factors="every-task", tasks=2),
        make_state(3, spare=2, begun=True, dtype=np.float16),
    ]
    pristine = []
    for i, state in enumerate(states):
        pristine.append(folder / f"pristine-{i}")
        store.save(pristine[-1], state)
    tracemalloc.start()
    try:
        for seed in range(first, first + count):
            i = seed % len(states)
            outcome = spoiled(folder / "spoiled", pristine[i], states[i], seed)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    finally:
        tracemalloc.stop()
    return outcomes


def test_damaged_folders_are_refused_or_read_right(tmp_path):
    outcomes = run(600, 0, tmp_path)
    assert outcomes["FormatError"] > 400
    assert set(outcomes) <= {"FormatError", "loaded"}


def entry(dtype="F32", shape=(2, 2), start=0, stop=16):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


HEADERS = {
    "overlap": {"a": entry(), "b": entry(start=8, stop=24)},
    "hole": {"a": entry(), "b": entry(start=20, stop=36)},
    "beyond the end": {"a": entry(stop=2**62, shape=(2**60,))},
    "negative": {"a": entry(start=-16, stop=0)},
    "huge shape of nothing": {"a": entry(shape=(2**62, 0), stop=0)},
    "number of more than a file": b'{"a":{"dtype":"F32","shape":[' + b"9" * 4000 + b',0],"data_offsets":[0,0]}}',
    "number of too many digits": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 4300 + b"]}}",
    "shape that overflows": {"a": entry(shape=(2**32, 2**32, 2**32))},
    "many axes": {"a": entry(shape=[1] * 10_000)},
    "bool as size": {"a": {"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]}},
    "float as size": {"a": {"dtype": "F32", "shape": [2.0, 2], "data_offsets": [0, 16]}},
    "unknown dtype": {"a": entry(dtype="F4_E9")},
    "dtype that no adapter has": {"a": entry(dtype="I32")},
    "extra key": {"a": {**entry(), "more": 1}},
    "metadata of numbers": {"__metadata__": {"x": 1}, "a": entry()},
    "text": b"not json at all",
    "duplicate": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
    b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "deep": b'{"a":' * 100_000,
    "list": [],
    "number": b"1" * 5000,
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_refused(tmp_path, name):
    state = make_state(4)
    store.save(tmp_path, state)
    (path,) = tmp_path.glob("state-*")
    write_container(path, HEADERS[name], b"\0" * 16)
    book = json.loads((tmp_path / "clora.json").read_text(encoding="utf-8"))
    book["files"][path.name]["bytes"] = path.stat().st_size
    (tmp_path / "clora.json").write_text(json.dumps(book), encoding="utf-8")
    with pytest.raises(FormatError):
        store.load(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../state-00000000000000000000000000000000.safetensors",
        "/etc/passwd",
        "state-0.safetensors",
        "sub/state-00000000000000000000000000000000.safetensors",
        "state-00000000000000000000000000000000.safetensors\0",
        "state-00000000000000000000000000000000.safetensors\n",
        "STATE-00000000000000000000000000000000.safetensors",
    ],
)
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, name):
    folder = tmp_path / "folder"
    store.save(folder, make_state(5))
    book = json.loads((folder / "clora.json").read_text(encoding="utf-8"))
    outside = tmp_path / "state-00000000000000000000000000000000.safetensors"
    shutil.copy(folder / book["state"], outside)
    book["files"][name] = book["files"].pop(book["state"])
    book["state"] = name
    (folder / "clora.json").write_text(json.dumps(book), encoding="utf-8")
    with pytest.raises(FormatError, match="a file's name is none that clora writes"):
        store.load(folder)


def test_a_declared_size_takes_no_memory_before_it_is_there(tmp_path):
    """clora.json and the header agree about 64 GiB; the file holds nothing of it."""
    store.save(tmp_path, make_state(6))
    book = json.loads((tmp_path / "clora.json").read_text(encoding="utf-8"))
    told = book["files"][book["state"]]
    huge = 1 << 36
    for name in ("block.0.proj.A",):
        told["tensors"][name]["shape"] = [huge // 4, 1]
    write_container(
        tmp_path / book["state"], {n: entry(shape=t["shape"], stop=huge) for n, t in told["tensors"].items()}, b""
    )
    told["bytes"] = (tmp_path / book["state"]).stat().st_size
    (tmp_path / "clora.json").write_text(json.dumps(book), encoding="utf-8")
    tracemalloc.start()
    with pytest.raises(FormatError):
        store.load(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < ROOM


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    parser = argparse.ArgumentParser(description="Spoil folders at random and load them.")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        print(run(options.count, options.first, Path(scratch)), f"{time.perf_counter() - began:.0f} s")
