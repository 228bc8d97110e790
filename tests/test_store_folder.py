"""Folders of adapters: what is saved is what is loaded, and at any moment the old or the new is there, whole."""

import builtins
import contextlib
import errno
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from folders import DTYPES, make_state, read_by_hand, same, states
from hypothesis import given

import clora_core as core
import clora_store as store
from clora_core.errors import FormatError, StateError
from clora_store import _folder, _safetensors

DATA = Path(__file__).parent / "data"


@given(states())
def test_what_is_saved_is_loaded(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("folder")
    digest = store.save(folder, state)
    loaded = store.load(folder)
    same(state, loaded)
    assert loaded.digest == digest == store.digest(folder)
    assert store.save(folder, loaded) == digest  # the same content is the same text, and changes no file


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_folder_takes_json_and_safetensors_alone(tmp_path, dtype):
    state = make_state(1, dtype=dtype, spare=2)
    store.save(tmp_path, state)
    book = json.loads((tmp_path / "clora.json").read_text(encoding="utf-8"))
    by_hand = read_by_hand(tmp_path)
    for name, layer in state.layers.items():
        for field, array in layer.tensors().items():
            assert by_hand[f"{book['state']}/{name}.{field}"] == array.tobytes()
    for group in book["snapshots"]:
        for i, task in enumerate(state.tasks[group["first"] : group["first"] + group["tasks"]]):
            for name, snapshot in state.snapshots[task].items():
                size = snapshot.R.nbytes
                assert by_hand[f"{group['file']}/{name}.R"][i * size : (i + 1) * size] == snapshot.R.tobytes()
    for name in book["files"]:  # and the library reads what it wrote
        assert set(safetensors.numpy.load_file(tmp_path / name)) == set(book["files"][name]["tensors"])
    assert {p.name for p in tmp_path.iterdir()} == {"clora.json", *book["files"]}


def test_old_folders_load():
    """Written by the first version of the format; the folder is never written again."""
    same(store.load(DATA / "adapter-v1"), make_state(20261125, layers=3, spare=2, begun=True))
    same(store.load(DATA / "adapter-v1-every-task"), make_state(20261126, layers=3, factors="every-task"))


def edit(folder, **changes):
    book = json.loads((folder / "clora.json").read_text(encoding="utf-8"))
    (folder / "clora.json").write_text(json.dumps({**book, **changes}), encoding="utf-8")


def test_fields_that_later_versions_add_are_ignored_and_layers_are_not(tmp_path):
    state = make_state(2)
    store.save(tmp_path, state)
    book = json.loads((tmp_path / "clora.json").read_text(encoding="utf-8"))
    tensors = safetensors.numpy.load_file(tmp_path / book["state"])
    for name, error in (("block.0.proj.mask", None), ("block.9.proj.A", "a tensor of a layer that is not listed")):
        safetensors.numpy.save_file({**tensors, name: np.ones(3, np.float32)}, tmp_path / book["state"])
        about = {"dtype": "F32", "shape": [3], "sha256": _safetensors.sha256(np.ones(3, np.float32))}
        file = {**book["files"][book["state"]], "bytes": (tmp_path / book["state"]).stat().st_size}
        file["tensors"] = {**file["tensors"], name: about}
        edit(tmp_path, files={**book["files"], book["state"]: file})
        if error is None:
            same(store.load(tmp_path), state)
        else:
            with pytest.raises(FormatError, match=error):
                store.load(tmp_path)


def test_what_later_versions_add_is_ignored_unless_they_say_it_matters(tmp_path):
    state = make_state(2)
    store.save(tmp_path, state)
    edit(tmp_path, comment="of a later version", more={"a": [1, 2.5, None]})
    same(store.load(tmp_path), state)
    edit(tmp_path, requires=["sparse routings"])
    with pytest.raises(FormatError, match=r"needs features that are unknown here.*sparse routings.*update clora"):
        store.load(tmp_path)
    edit(tmp_path, requires=[], schema="clora-adapter/2")
    with pytest.raises(FormatError, match=r"the schema is another.*clora-adapter/2.*update clora"):
        store.load(tmp_path)


def test_snapshots_of_finished_tasks_are_written_once(tmp_path):
    state = make_state(3, layers=1, tasks=200)
    shapes = {name: snapshot.R.shape for name, snapshot in state.snapshots[state.tasks[0]].items()}
    snapshots = {
        task: {name: store.Snapshot(np.full(shape, i, np.float32)) for name, shape in shapes.items()}
        for i, task in enumerate(state.tasks)
    }

    def first(n):
        tasks = state.tasks[:n]
        return state._replace(tasks=tasks, unobserved=(), snapshots={task: snapshots[task] for task in tasks})

    digest, kept = None, {}
    for n in range(1, 201):
        digest = store.save(tmp_path, first(n)._replace(digest=digest))
        files = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("snapshots-*")}
        assert len(files) == -(-n // _folder.GROUP_TASKS)
        full = json.loads((tmp_path / "clora.json").read_text(encoding="utf-8"))["snapshots"][:-1]
        for group in full:
            assert files[group["file"]] == kept.setdefault(group["file"], files[group["file"]])
    assert len(kept) == 3
    same(store.load(tmp_path), first(200))


def test_groups_of_the_same_content_share_a_file(tmp_path):
    state = make_state(3, layers=1, tasks=130)
    state = state._replace(snapshots=dict.fromkeys(state.tasks, state.snapshots[state.tasks[0]]))
    store.save(tmp_path, state)
    assert len(list(tmp_path.glob("snapshots-*"))) == 2
    same(store.load(tmp_path), state)


def test_a_save_goes_over_nothing_but_what_it_continues(tmp_path):
    first, second = make_state(4), make_state(5)
    digest = store.save(tmp_path, first)
    for stranger in (second, second._replace(digest="0" * 64)):
        with pytest.raises(StateError, match=r"holds another adapter.*overwrite=True"):
            store.save(tmp_path, stranger)
    same(store.load(tmp_path), first)
    store.save(tmp_path, second._replace(digest=digest))
    with pytest.raises(StateError, match="another state of this one"):
        store.save(tmp_path, first._replace(digest=digest))  # somebody saved since
    store.save(tmp_path, first, overwrite=True)
    same(store.load(tmp_path), first)
    (tmp_path / "clora.json").write_text("damaged")
    with pytest.raises(StateError, match="holds another adapter"):
        store.save(tmp_path, first._replace(digest=digest))
    store.save(tmp_path, first, overwrite=True)
    same(store.load(tmp_path), first)


def test_other_files_of_the_folder_are_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "state-mine.safetensors").write_text("mine, too")
    digest = store.save(tmp_path, make_state(6))
    store.save(tmp_path, make_state(7)._replace(digest=digest))
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "state-mine.safetensors").read_text() == "mine, too"
    assert len(list(tmp_path.glob("state-*"))) == 2


def test_a_damaged_file_under_the_name_of_the_content_is_written_again(tmp_path):
    state = make_state(8)
    digest = store.save(tmp_path, state)
    for path in tmp_path.glob("*.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(FormatError, match="another hash"):
        store.load(tmp_path)
    store.save(tmp_path, state._replace(digest=digest))
    same(store.load(tmp_path), state)


def test_the_second_writer_is_told(tmp_path, monkeypatch):
    state = make_state(9)
    store.save(tmp_path, state)
    reached, go = threading.Event(), threading.Event()
    write = _folder._write

    def slow(*args):
        reached.set()
        assert go.wait(60)
        return write(*args)

    monkeypatch.setattr(_folder, "_write", slow)
    first = threading.Thread(target=store.save, args=(tmp_path, make_state(10)), kwargs={"overwrite": True})
    first.start()
    assert reached.wait(60)
    with pytest.raises(StateError, match="another process or thread is saving"):
        store.save(tmp_path, state, overwrite=True)
    same(store.load(tmp_path), state)  # readers are not disturbed
    go.set()
    first.join()
    same(store.load(tmp_path), make_state(10))


CALLS = [(os, "replace"), (os, "fsync"), (_safetensors, "save_file"), (builtins, "open"), (_folder, "sync")]


@pytest.mark.parametrize(("owner", "name"), CALLS, ids=[name for _, name in CALLS])
@pytest.mark.parametrize("which", range(8))
def test_a_save_that_fails_leaves_the_old(tmp_path, monkeypatch, owner, name, which):
    """The disk is full at the n-th call: the folder is as before or, once the book is replaced, as after."""
    old, new = make_state(11), make_state(12)
    digest = store.save(tmp_path, old)
    real, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == which + 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    raised: list[OSError] = []
    try:
        store.save(tmp_path, new._replace(digest=digest))
    except OSError as error:
        raised.append(error)
    monkeypatch.undo()
    assert len(calls) > which or not raised
    assert [error.errno for error in raised] == [errno.ENOSPC][: len(raised)]
    loaded = store.load(tmp_path)
    same(loaded, new if loaded.digest != digest else old)
    assert raised or loaded.digest != digest
    names = json.loads((tmp_path / "clora.json").read_text(encoding="utf-8"))["files"]
    if loaded.digest == digest:  # nothing of the attempt stays, on a disk that may be full
        assert {p.name for p in tmp_path.iterdir()} == {"clora.json", *names}
    store.save(tmp_path, new._replace(digest=loaded.digest))
    same(store.load(tmp_path), new)
    book = json.loads((tmp_path / "clora.json").read_text(encoding="utf-8"))
    assert {p.name for p in tmp_path.iterdir()} == {"clora.json", *book["files"]}


@pytest.mark.parametrize(("owner", "name"), CALLS, ids=[name for _, name in CALLS])
@pytest.mark.parametrize("which", range(8))
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_save_leaves_the_old_or_the_new(tmp_path, monkeypatch, owner, name, which, when):
    """Ctrl-C at the n-th call, or right after it: also when the new book is in its place already."""
    old, new = make_state(11), make_state(12)
    digest = store.save(tmp_path, old)
    real, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if when == "before" and len(calls) == which + 1:
            raise KeyboardInterrupt
        result = real(*args, **kwargs)
        if len(calls) == which + 1:
            if result is not None:
                result.close()
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        store.save(tmp_path, new._replace(digest=digest))
    monkeypatch.undo()
    loaded = store.load(tmp_path)
    same(loaded, new if loaded.digest != digest else old)
    store.save(tmp_path, new._replace(digest=loaded.digest))


def test_everything_is_on_the_disk_before_it_is_named(tmp_path, monkeypatch):
    """Each file is flushed before it gets its name; the folder, before the book names what is in it, and after."""
    events = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(fd):
        events.append(("flush", os.fstat(fd).st_ino))
        fsync(fd)

    def note_replace(source, target):
        events.append(("name", os.stat(source).st_ino, os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    store.save(tmp_path, make_state(13))
    named = [(i, event) for i, event in enumerate(events) if event[0] == "name"]
    for i, (_, inode, _) in named:
        assert ("flush", inode) in events[:i]
    book = next(i for i, event in named if event[2] == "clora.json")
    files = [i for i, event in named if event[2] != "clora.json"]
    folder = ("flush", os.stat(tmp_path).st_ino)
    assert folder in events[max(files) : book]
    assert events[-1] == folder


def test_a_reader_sees_the_old_or_the_new(tmp_path):
    one, two = make_state(13), make_state(14)
    store.save(tmp_path, one)
    stop, seen, errors = threading.Event(), set(), []

    def read():
        while not stop.is_set():
            try:
                loaded = store.load(tmp_path)
                same(loaded, one if loaded.provenance == one.provenance else two)
                seen.add(loaded.provenance["made from"])
            except Exception as error:
                errors.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for i in range(60):
        store.save(tmp_path, (two, one)[i % 2], overwrite=True)
    stop.set()
    for reader in readers:
        reader.join()
    assert not errors
    assert seen == {"seed 13", "seed 14"}


def test_a_missing_file_is_named(tmp_path):
    store.save(tmp_path, make_state(15))
    (gone,) = tmp_path.glob("state-*")
    gone.unlink()
    with pytest.raises(FormatError, match=f"the file {gone.name} is missing"):
        store.load(tmp_path)


def test_damage_is_named_with_both_values(tmp_path):
    state = make_state(16)
    store.save(tmp_path, state)
    book = json.loads((tmp_path / "clora.json").read_text(encoding="utf-8"))
    tensors = safetensors.numpy.load_file(tmp_path / book["state"])
    changed = {**tensors, "block.0.proj.A": tensors["block.0.proj.A"] + 1}
    safetensors.numpy.save_file(changed, tmp_path / book["state"])
    told = book["files"][book["state"]]["tensors"]["block.0.proj.A"]["sha256"]
    with pytest.raises(FormatError, match=f"the content of tensor 'block.0.proj.A' has another hash.*needed {told}"):
        store.load(tmp_path)
    short = {**tensors, "block.0.proj.A": tensors["block.0.proj.A"][:-1]}
    safetensors.numpy.save_file(short, tmp_path / book["state"])
    book["files"][book["state"]]["bytes"] = (tmp_path / book["state"]).stat().st_size
    edit(tmp_path, files=book["files"])
    with pytest.raises(
        FormatError, match=r"tensor 'block.0.proj.A' is not as clora.json says. Got F32 \(.*; needed F32"
    ):
        store.load(tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_unless_asked_for(tmp_path, bad):
    state = make_state(17)
    state.layers["block.0.proj"].adapter.A[0, 0] = bad
    with pytest.raises(FormatError, match=r"tensor 'block.0.proj.A' is not finite"):
        store.save(tmp_path, state)
    assert not list(tmp_path.iterdir())


BROKEN = {
    "another shape": lambda s: s.layers["head"]._replace(
        adapter=s.layers["head"].adapter._replace(R_delta=np.zeros((4, 5), np.float32))
    ),
    "several dtypes": lambda s: s.layers["block.0.proj"]._replace(
        adapter=s.layers["block.0.proj"].adapter._replace(A=s.layers["block.0.proj"].adapter.A.astype(np.float64))
    ),
    "a dtype that no adapter has": lambda s: s.layers["head"]._replace(
        moments=s.layers["head"].moments._replace(q=np.zeros((), np.int32))
    ),
    "unknown kind": lambda s: s.layers["head"]._replace(kind="lstm"),
    "a factor is missing": lambda s: s.layers["block.0.proj"]._replace(
        adapter=s.layers["block.0.proj"].adapter._replace(B=None)
    ),
    "rows outside": lambda s: s.layers["block.0.proj"]._replace(
        target=s.layers["block.0.proj"].target._replace(rows=(1, 9))
    ),
    "a head has rows": lambda s: s.layers["head"]._replace(target=s.layers["head"].target._replace(rows=(0, 3))),
    "a bias, which heads alone have": lambda s: s.layers["block.0.proj"]._replace(
        target=s.layers["block.0.proj"].target._replace(bias="b")
    ),
    "was observed in no task": lambda s: s.layers["head"]._replace(observed=np.zeros((6, 6))),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_state_that_does_not_fit_together_is_not_saved(tmp_path, what):
    state = make_state(18)
    layer = BROKEN[what](state)
    name = "head" if layer.target.weight == "head.weight" else "block.0.proj"
    with pytest.raises(FormatError, match=what):
        store.save(tmp_path / "new", state._replace(layers={**state.layers, name: layer}))
    assert not (tmp_path / "new").exists()


def head_with(**changes):
    return lambda s: {**s.layers, "head": s.layers["head"]._replace(**changes)}


def target_with(**changes):
    def change(state):
        layer = state.layers["block.0.proj"]
        return {**state.layers, "block.0.proj": layer._replace(target=layer.target._replace(**changes))}

    return change


UNREADABLE = {
    "a task that is a number": lambda s: s._replace(tasks=(0, 1, 2), unobserved=(), snapshots={}),
    "provenance that is a number": lambda s: s._replace(provenance={"a": 1}),
    "options with a number as key": lambda s: s._replace(options={1: 2}),
    "options with a tuple": lambda s: s._replace(options={"a": (1, 2)}),
    "complete as a number": lambda s: s._replace(layers=head_with(complete=1)(s)),
    "complete of NumPy": lambda s: s._replace(layers=head_with(complete=np.bool_(True))(s)),
    "three rows": lambda s: s._replace(layers=target_with(rows=(0, 2, 3))(s)),
    "tied as a text": lambda s: s._replace(layers=target_with(tied="abc")(s)),
    "a shape of floats": lambda s: s._replace(layers=target_with(shape=(4.0, 5.0))(s)),
    "a weight that is a number": lambda s: s._replace(layers=target_with(weight=5)(s)),
    "half of the moments": lambda s: s._replace(layers=head_with(moments=s.layers["head"].moments._replace(S=None))(s)),
    "no routing": lambda s: s._replace(layers=head_with(adapter=s.layers["head"].adapter._replace(R_old=None))(s)),
    "a list as routing": lambda s: s._replace(
        layers=head_with(adapter=s.layers["head"].adapter._replace(R_old=[[1.0]]))(s)
    ),
    "half of the spare directions": lambda s: s._replace(layers=head_with(spare=(np.ones((4, 1)), None))(s)),
    "two layers on one weight": lambda s: s._replace(layers={**s.layers, "more": s.layers["block.0.proj"]}),
    "snapshots in another order": lambda s: s._replace(snapshots=dict(reversed(s.snapshots.items()))),
    "a name without bytes": lambda s: s._replace(layers={**s.layers, "\ud800": s.layers["head"]}),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_could_not_be_read_again_is_not_saved(tmp_path, what):
    """Or the good save before it would be gone."""
    state = make_state(18)
    digest = store.save(tmp_path, state)
    files = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(FormatError):
        store.save(tmp_path, UNREADABLE[what](state)._replace(digest=digest))
    assert {path.name for path in tmp_path.iterdir()} == files
    same(store.load(tmp_path), state)


def test_arrays_of_any_layout_are_saved(tmp_path):
    state = make_state(18)
    layer = state.layers["block.0.proj"]
    odd = core.Adapter(*(np.asfortranarray(array)[::1] for array in layer.adapter))
    big = odd._replace(A=odd.A.astype(">f4").astype("<f4"))
    big.A.flags.writeable = False
    store.save(tmp_path, state._replace(layers={**state.layers, "block.0.proj": layer._replace(adapter=big)}))
    same(store.load(tmp_path), state)


def test_trouble_after_the_book_is_replaced_is_no_failed_save(tmp_path):
    """A folder by the name of an old file can't be removed; the save is done all the same."""
    digest = store.save(tmp_path, make_state(18))
    (tmp_path / f"state-{'0' * 32}.safetensors").mkdir()
    state = make_state(19)
    digest = store.save(tmp_path, state._replace(digest=digest))
    same(store.load(tmp_path), state)
    store.save(tmp_path, state._replace(digest=digest))


def test_files_of_others_that_begin_like_ours_stay(tmp_path):
    (tmp_path / ".clora-notes.txt").write_text("mine")
    (tmp_path / ".clora-cache").mkdir()
    store.save(tmp_path, make_state(18))
    assert (tmp_path / ".clora-notes.txt").exists()


@pytest.mark.parametrize("make", ["mkdir", "mkfifo", "symlink"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path, make):
    store.save(tmp_path, make_state(19))
    (path,) = tmp_path.glob("state-*")
    path.unlink()
    if make == "mkdir":
        path.mkdir()
    elif make == "mkfifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(FormatError, match="no regular file"):
        store.load(tmp_path)


def test_files_are_as_readable_as_others(tmp_path):
    (tmp_path / "other").touch()
    store.save(tmp_path / "a", make_state(20))
    store.export_peft(make_state(20), tmp_path / "b")
    modes = {path.name: path.stat().st_mode for folder in "ab" for path in (tmp_path / folder).iterdir()}
    assert set(modes.values()) == {(tmp_path / "other").stat().st_mode}


def test_a_folder_moves_and_copies(tmp_path):
    state = make_state(20)
    store.save(tmp_path / "a", state)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.rename(tmp_path / "a", tmp_path / "c")
    same(store.load(tmp_path / "b"), state)
    same(store.load(tmp_path / "c"), state)
    with pytest.raises(FormatError, match="no folder of an adapter"):
        store.load(tmp_path / "a")
    with pytest.raises(FormatError, match="no folder of an adapter"):
        store.load(tmp_path / "c" / "clora.json")
