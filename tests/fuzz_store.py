"""Coverage-guided fuzzing of the reader of folders, by atheris: ``nox -s fuzz``, or ``-- -max_total_time=60``.

An input is a text for clora.json and how the files of tensors are made to go with it. Whatever it is, `load` gives a
State that fits together, or raises an error of clora's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["clora_store"]):
    import clora_store as store

import numpy as np
from folders import damage, make_state, write_container

from clora_core.errors import CloraError

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
MOST = 1 << 16  # bytes of a tensor that is made


def make_corpus(folder: Path) -> None:
    """Books of real adapters, as first inputs of each kind."""
    for i, options in enumerate(({}, {"factors": "every-task"}, {"spare": 2, "begun": True}, {"head": False})):
        store.save(folder / "real", make_state(i, tasks=2, **options), overwrite=True)
        book = (folder / "real" / "clora.json").read_bytes()
        for kind in range(3):
            (folder / f"{i}-{kind}").write_bytes(bytes([kind]) + json.dumps(json.loads(book)).encode())


def write_files(folder: Path, text: bytes) -> bytes:
    """Files that are as the book says, hashes and sizes included, as far as it says anything. Returns the book."""
    book = json.loads(text)
    for name, file in book["files"].items():
        header, data = {}, b""
        for tensor, told in file["tensors"].items():
            size = int(np.prod(told["shape"], dtype=object)) * SIZES[told["dtype"]]
            if not 0 <= size <= MOST:
                return text
            told["sha256"] = hashlib.sha256(bytes(size)).hexdigest()
            header[tensor] = {
                "dtype": told["dtype"],
                "shape": told["shape"],
                "data_offsets": [len(data), len(data) + size],
            }
            data += bytes(size)
        if "/" not in name and "\0" not in name:
            write_container(folder / name, header, data)
            file["bytes"] = (folder / name).stat().st_size
    return json.dumps(book).encode()


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Change one value of the JSON, or else some bytes."""
    rng = np.random.default_rng(seed)
    if rng.random() < 0.6:
        with contextlib.suppress(Exception):
            value = json.loads(data[1:])
            damage(value, rng)
            return (data[:1] + json.dumps(value).encode())[:most]
    return atheris.Mutate(data, most)


def main() -> None:
    """Fuzz until told otherwise."""
    scratch = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    (scratch / "corpus").mkdir()
    make_corpus(scratch / "corpus")
    real = scratch / "corpus" / "real"
    fixed = {path.name: path.read_bytes() for path in real.iterdir()}
    folder = scratch / "folder"
    folder.mkdir()

    def one(data: bytes) -> None:
        for path in folder.iterdir():
            path.unlink()
        kind, text = data[:1], data[1:]
        if kind == b"\1":  # the files of a real adapter, whatever the book says
            for name, content in fixed.items():
                (folder / name).write_bytes(content)
        elif kind == b"\2":  # any header in the place of the state's file
            for name, content in fixed.items():
                (folder / name).write_bytes(content)
            name = json.loads(fixed["clora.json"])["state"]
            (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
            book = json.loads(fixed["clora.json"])
            book["files"][name]["bytes"] = 8 + len(text) + 64
            text = json.dumps(book).encode()
        else:
            with contextlib.suppress(Exception):
                text = write_files(folder, text)
        (folder / "clora.json").write_bytes(text)
        try:
            store.check(store.load(folder), "fuzz")
        except CloraError as error:
            str(error).encode()

    atheris.Setup([*sys.argv, str(scratch / "corpus")], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
