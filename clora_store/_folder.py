"""Folders of adapters: saved so that a reader sees the old or the new, whole, whenever the writer dies."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from clora_core.errors import CloraError, FormatError, StateError, message

from . import _safetensors as st
from ._errors import bad
from ._schema import FILE, Book, Described, File, Group, assemble, decode, encode
from ._state import State, check

BOOK = "clora.json"
LARGEST_BOOK = 1 << 24  # JSON takes many times its size when it is parsed
GROUP_TASKS, GROUP_BYTES = 64, 16 << 20  # a group that is full is never written again
SCRATCH, LOCK = ".clora-", f"{BOOK}.lock"  # the lock is a file on Windows alone
Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]


def save(folder: str | os.PathLike[str], state: State, *, overwrite: bool = False) -> str:
    """Write an adapter into a folder, atomically.

    Parameters
    ----------
    folder : path
        Made where it does not exist. Other files in it are left alone.
    state : State
        Its ``digest`` says which save it continues: what is in the folder is replaced only where it is that one.
    overwrite : bool
        Replace whatever adapter is there.

    Returns
    -------
    str
        The digest of what was written, for the ``digest`` of the state that is saved next.

    Raises
    ------
    FormatError
        A state that does not fit together, or that is not finite; nothing was written.
    StateError
        The folder holds another adapter, or somebody else is writing to it; nothing was written.
    OSError
        The file system's own: no space, no permission. The folder is as before.

    Notes
    -----
    Files of tensors are named by their content and reach the disk before ``clora.json`` names them; ``clora.json`` is
    replaced in one step; files that it no longer names are removed after that.
    """
    where = f"clora_store.save({os.fspath(folder)!r})"
    check(state, where, finite=False)  # that numbers are finite is seen while they are hashed
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path, where):
        _may_replace(path, state.digest, overwrite, where)
        sweep(path)
        before = {entry.name for entry in path.iterdir()}
        files: dict[str, File] = {}
        try:
            text = _write_all(path, state, files, where)
            replace(path / BOOK, text)
        except BaseException:
            _undo(path, files.keys() - before)
            raise
        for file in path.iterdir():
            if FILE.fullmatch(file.name) and file.name not in files:
                with contextlib.suppress(OSError):  # in use elsewhere, or not ours: the next save tries again
                    file.unlink()
    return _digest(text)


def _undo(path: Path, made: Iterable[str]) -> None:
    """Remove files that no book names: an interrupt may come before the new book is in its place, or after."""
    try:
        text = _read_text(path, "")
    except FileNotFoundError:
        text = b""
    except (OSError, CloraError):
        return
    for name in made:
        if name.encode() not in text:
            (path / name).unlink(missing_ok=True)


def _write_all(path: Path, state: State, files: dict[str, File], where: str) -> bytes:
    """Every file of tensors, on the disk; returns the book that names them, seen to be one that can be read."""
    groups: list[Group] = []
    for first, count, tensors in _groups(state):
        groups.append(Group(first, count, _write(path, "snapshots", tensors, files, where)))
    tensors = {f"{name}.{f}": array for name, layer in state.layers.items() for f, array in layer.tensors().items()}
    text = encode(state, _write(path, "state", tensors, files, where), groups, files)
    if len(text) > LARGEST_BOOK:
        raise bad(where, "clora.json would be too large", len(text), LARGEST_BOOK, fix="save without snapshots")
    book = decode(text, where)  # what can't be read again must not take the place of what can
    layers = {name: (layer.kind, layer.target, layer.complete) for name, layer in state.layers.items()}
    read = {name: (fields["kind"], fields["target"], fields["complete"]) for name, fields in book.layers.items()}
    plain = {key: dict(value) if isinstance(value, Mapping) else value for key, value in state._asdict().items()}
    if read != layers or any(plain[key] != value for key, value in book.fields.items()):
        fix = "use texts for names, and plain values in options"
        raise bad(where, "the state would be read as another", "values that JSON has no type for", "its own", fix=fix)
    sync(path)  # the names of the files, before the book names them
    return text


def load(folder: str | os.PathLike[str], *, finite: bool = True) -> State:
    """Read an adapter, every shape, dtype and hash checked.

    Parameters
    ----------
    folder : path
    finite : bool
        Refuse NaN and infinity.

    Returns
    -------
    State
        Its ``digest`` names what was read.

    Raises
    ------
    FormatError
        A folder that is none, of a later version, or damaged; the message names the tensor, what it has and what it
        should have.
    OSError
        The file system's own.

    Notes
    -----
    A folder that is being saved to at the same time is read as it was before, or as it is after. Memory is taken for a
    tensor only after its file has been seen to hold it.
    """
    where = f"clora_store.load({os.fspath(folder)!r})"
    path = Path(folder)
    text, book = _read_book(path, where)
    while True:
        try:
            tensors = {name: _read(path, name, file, where) for name, file in book.files.items()}
        except FileNotFoundError as error:  # replaced while we read?
            before = text
            text, book = _read_book(path, where)
            if text == before:
                name = Path(error.filename).name
                raise bad(where, f"the file {name} is missing", "no such file", "all files clora.json names") from None
            continue
        state = assemble(book, tensors, where)._replace(digest=_digest(text))
        check(state, where, finite=finite)
        return state


def digest(folder: str | os.PathLike[str]) -> str | None:
    """The digest of the adapter in a folder, None where there is none."""
    try:
        return _digest(_read_text(Path(folder), "clora_store.digest"))
    except FileNotFoundError:
        return None


def _read_text(path: Path, where: str) -> bytes:
    with st.opened(path / BOOK, where) as fd:
        size = os.fstat(fd).st_size
        if size > LARGEST_BOOK:
            raise bad(where, "clora.json is too large", f"{size} bytes", f"at most {LARGEST_BOOK}")
        return st.read_exactly(fd, size, 0, where)


def _read_book(path: Path, where: str) -> tuple[bytes, Book]:
    try:
        text = _read_text(path, where)
    except (FileNotFoundError, NotADirectoryError):
        cause, fix = "another folder, or a path misspelt", "pass the folder that save() wrote to"
        raise bad(where, "this is no folder of an adapter", f"no {BOOK}", BOOK, cause=cause, fix=fix) from None
    return text, decode(text, where)


def _read(path: Path, name: str, file: File, where: str) -> Tensors:
    """The tensors of one file, when all is as the book says."""
    where = f"{where}, {name}"
    with st.opened(path / name, where) as fd:
        size = os.fstat(fd).st_size
        if size != file.bytes:
            raise bad(where, "the file has another size", f"{size} bytes", f"{file.bytes}")
        longest = 1024 + sum(6 * len(n) + 256 + 24 * len(t.shape) for n, t in file.tensors.items())
        header = st.read_header(fd, where, limit=longest)
        if set(header.entries) != set(file.tensors):
            strange = sorted(set(header.entries) ^ set(file.tensors))
            raise bad(where, "the file has other tensors", repr(strange[0])[:200], "those clora.json names")
        for tensor, entry in header.entries.items():
            told = file.tensors[tensor]
            if (entry.dtype, entry.shape) != (told.dtype, told.shape):
                got, needed = (f"{x.dtype} {x.shape}" for x in (entry, told))
                raise bad(where, f"tensor {tensor!r} is not as clora.json says", got, needed)
        read = st.read_tensors(fd, header, where)
    for tensor, (_, sha256) in read.items():
        if sha256 != file.tensors[tensor].sha256:
            needed = file.tensors[tensor].sha256[:80]
            raise bad(where, f"the content of tensor {tensor!r} has another hash", sha256, needed)
    return {tensor: array for tensor, (array, _) in read.items()}


def _write(path: Path, stem: str, tensors: Tensors, files: dict[str, File], where: str) -> str:
    """Write a file of tensors under the name of its content, unless it is there; add it to ``files``."""
    tensors = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    scratch = path / f"{SCRATCH}{os.getpid()}"
    try:
        if stem == "state" and sum(array.nbytes for array in tensors.values()) >= st.SMALL:
            with ThreadPoolExecutor(1) as pool:  # new at every save: written while it is hashed
                hashing = pool.submit(st.hashes, tensors, where)
                st.write_file(scratch, tensors)
                hashes = hashing.result()
        else:
            hashes = st.hashes(tensors, where)
        described = {n: Described(st.dtype_name(a.dtype) or "", a.shape, hashes[n]) for n, a in tensors.items()}
        content = repr(sorted((name, *about) for name, about in described.items())).encode()
        name = f"{stem}-{_digest(content)[:32]}.safetensors"
        if not _intact(path, name, described):
            if not scratch.exists():
                st.write_file(scratch, tensors)
            os.replace(scratch, path / name)
    finally:
        scratch.unlink(missing_ok=True)
    files[name] = File((path / name).stat().st_size, described)
    return name


def _intact(path: Path, name: str, described: dict[str, Described]) -> bool:
    """Whether that file is there, and is what its name says."""
    try:
        _read(path, name, File((path / name).stat().st_size, described), "")
    except (FileNotFoundError, FormatError):
        return False
    return True


def _groups(state: State) -> Iterator[tuple[int, int, Tensors]]:
    """Snapshots as stacks of consecutive tasks with the same shapes, cut at the same places at every save."""
    if not state.snapshots:
        return
    first, size, open_group = len(state.tasks) - len(state.snapshots), 0, list[Tensors]()

    def stacked() -> tuple[int, int, Tensors]:
        return first, len(open_group), {key: np.stack([t[key] for t in open_group]) for key in open_group[0]}

    for task in state.tasks[first:]:
        snapshots = state.snapshots[task].items()
        tensors = {f"{name}.{field}": array for name, s in snapshots for field, array in s.tensors().items()}
        fits = not open_group or all(
            array.shape == open_group[0][key].shape and array.dtype == open_group[0][key].dtype
            for key, array in tensors.items()
        )
        weight = sum(array.nbytes for array in tensors.values())
        if open_group and (not fits or len(open_group) == GROUP_TASKS or size + weight > GROUP_BYTES):
            yield stacked()
            first, size, open_group = first + len(open_group), 0, []
        open_group.append(tensors)
        size += weight
    yield stacked()


def _may_replace(path: Path, known: str | None, overwrite: bool, where: str) -> None:
    try:
        there = digest(path)
    except CloraError:
        there = "damaged"
    if there is None or overwrite or there == known:
        return
    raise StateError(
        message(
            where,
            "the folder holds another adapter, or another state of this one",
            got="a save over it",
            needed="a folder that is new, or that this adapter was last saved to or loaded from",
            cause="a second run with the same folder, or somebody else's save since",
            fix="save to another folder, load that one first, or pass overwrite=True to lose it",
        )
    )


def sweep(folder: Path) -> None:
    """Remove what a writer that died has left half-written; to be called by who holds the lock."""
    for file in folder.iterdir():
        if re.fullmatch(rf"{re.escape(SCRATCH)}\d+", file.name) and file.is_file():
            file.unlink(missing_ok=True)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sync(folder: Path) -> None:
    """Make names in a folder durable, where the system can."""
    if sys.platform == "win32":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace(path: Path, text: bytes) -> None:
    """Write a small file so that it is the old or the new at any moment, and durable on return."""
    scratch = path.with_name(f"{SCRATCH}{os.getpid()}")
    try:
        with open(scratch, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is in its place: to say that it is not would be wrong
        sync(path.parent)


@contextmanager
def locked(folder: Path, where: str) -> Iterator[None]:
    """One writer at a time; the lock goes with its process, however that ends."""
    busy = StateError(
        message(
            where,
            "another process or thread is saving to this folder",
            got="a second writer",
            needed="one at a time",
            cause="every process of a distributed run saves, or two runs share a folder",
            fix="save from one process, or to folders of their own",
        )
    )
    if sys.platform == "win32":
        import msvcrt

        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
        try:
            try:
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            except OSError:
                raise busy from None
            yield
        finally:
            os.close(fd)
        return
    import fcntl

    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise busy from None
            # A file system without locks: writers are then only as safe as the digest makes them.
        yield
    finally:
        os.close(fd)
