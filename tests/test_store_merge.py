"""Merging checkpoints in a stream: the right bits, the rest untouched; interrupted and gone on with; refused."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import types

import ml_dtypes
import numpy as np
import pytest
from folders import write_container
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import clora_core as core
import clora_store as store
from clora_core.errors import DTypeError, FormatError, InvalidValueError, OptionError, ShapeError, StateError
from clora_store import _blocks, _checkpoint, _safetensors

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of a few rows, so that small tensors have many; journals at once."""
    monkeypatch.setattr(_blocks, "BLOCK", 12)
    monkeypatch.setattr(_blocks, "BLOCKS", 2)
    monkeypatch.setattr(_blocks, "COLUMNS", 3)
    monkeypatch.setattr(_blocks, "COPY", 64)
    monkeypatch.setattr(_checkpoint, "FLUSH_SECONDS", 0.0)


def adapter_of(rng, d_out, d_in, r, dtype=np.float32, size=1.0):
    def draw(*shape):
        return (size * rng.standard_normal(shape)).astype(dtype)

    return core.Adapter(draw(d_out, r), draw(r, r), draw(r, r), draw(r, d_in))


def layer(target, adapter):
    return store.Layer("linear", target, adapter)


def dyadic(rng, *shape):
    return (rng.integers(-8, 9, shape) / 4).astype(np.float32)


SHAPES = {"q": (9, 7), "kernel": (5, 8), "fused": (12, 6), "conv": (4, 3, 2, 2), "other": (3, 3), "odd": (1,)}


def checkpoint(folder, rng, dtype, make=dyadic):
    """Two shards and an index, with a tensor of integers and files of a model; returns all tensors."""
    tensors = {f"m.{name}.weight": make(rng, *shape).astype(dtype) for name, shape in SHAPES.items()}
    tensors |= {"m.ids": np.arange(5), "m.head.weight": make(rng, 3, 4).astype(dtype)}
    tensors |= {"m.head.bias": make(rng, 3).astype(dtype), "m.empty": np.zeros((0, 4), dtype)}
    names = list(tensors)
    folder.mkdir()
    files = {"a-00001-of-00002.safetensors": names[::2], "a-00002-of-00002.safetensors": names[1::2]}
    for file, own in files.items():
        save_file({n: tensors[n] for n in own}, folder / file, metadata={"format": "pt", "note": file})
    weight_map = {name: file for file, own in files.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    return tensors


def dyadic_state(rng):
    """Every layout: (out, in), (in, out), two slices of one weight, a convolution, a head."""
    adapters = {}

    def add(name, target, kind="linear"):
        d_out, d_in = target.matrix
        A, R, D, B = (dyadic(rng, *s) for s in ((d_out, 2), (2, 2), (2, 2), (2, d_in)))
        adapters[name] = store.Layer(kind, target, core.Adapter(A, R, D, B))

    add("q", store.Target("m.q.weight", (9, 7)))
    add("kernel", store.Target("m.kernel.weight", (5, 8), "in,out"))
    add("fused[0:4]", store.Target("m.fused.weight", (12, 6), rows=(0, 4)))
    add("fused[7:12]", store.Target("m.fused.weight", (12, 6), rows=(7, 12)))
    add("conv", store.Target("m.conv.weight", (4, 3, 2, 2)), "conv")
    V = dyadic(rng, 3, 5)
    target = store.Target("m.head.weight", (3, 4), bias="m.head.bias")
    adapters["head"] = store.Layer("head", target, core.Adapter(None, V, 2 * V, None))
    return store.State(adapters)


def merged_by_hand(tensors, state):
    """In float64, rounded once: exact for dyadic numbers."""
    out = {name: array.astype(np.float64) for name, array in tensors.items()}
    for one in state.layers.values():
        target = one.target
        if one.kind == "head":
            V = core.routing(one.adapter).astype(np.float64)
            out[target.weight], out[target.bias] = V[:, :-1], V[:, -1]
            continue
        dW = core.delta(core.Adapter(*(array.astype(np.float64) for array in one.adapter)))
        if target.layout == "in,out":
            dW = dW.T
        W = out[target.weight].reshape(target.shape[0], -1)
        W[slice(*(target.rows or (None, None)))] += dW
        out[target.weight] = W.reshape(target.shape)
    return {
        name: (a.astype(np.float32) if tensors[name].dtype.itemsize == 2 else a).astype(tensors[name].dtype)
        for name, a in out.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("processes", [False, True])
def test_every_layout_is_merged_to_the_bit_and_the_rest_is_copied(tmp_path, monkeypatch, dtype, processes):
    if processes:
        monkeypatch.setattr(_blocks, "ALONE", 0)
    rng = np.random.default_rng(0)
    tensors = checkpoint(tmp_path / "base", rng, DTYPES[dtype])
    state = dyadic_state(rng)
    seen = []
    report = store.merge_checkpoint(tmp_path / "base", state, tmp_path / "out", progress=lambda *a: seen.append(a))
    expected = merged_by_hand(tensors, state)
    for file in sorted((tmp_path / "base").glob("*.safetensors")):
        got = load_file(tmp_path / "out" / file.name)
        assert list(got) == list(load_file(file))
        for name, array in got.items():
            assert array.dtype == tensors[name].dtype, name
            assert array.tobytes() == expected[name].tobytes(), name
        n = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert (tmp_path / "out" / file.name).read_bytes()[:n] == file.read_bytes()[:n]  # metadata, too
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (tmp_path / "base").iterdir()} - {"pytorch_model.bin"} | {"clora-merge.json"}
    assert set(report.layers) == {"q", "kernel", "fused[0:4]", "fused[7:12]", "conv"}
    assert report.heads == {"head": "m.head.weight"}
    assert report.copied == len(tensors) - 6
    assert seen[-1][0] == seen[-1][1] == report.bytes
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert not report.resumed


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    base=st.sampled_from(sorted(DTYPES)),
    adapter=st.sampled_from([np.float32, np.float64, np.float16, ml_dtypes.bfloat16]),
    turned=st.booleans(),
    exponent=st.integers(-12, 4),
)
def test_the_merge_is_that_of_the_core(tmp_path_factory, seed, base, adapter, turned, exponent):
    """Within its bound of exact, and the report is the core's within the rounding of float32 sums."""
    folder = tmp_path_factory.mktemp("merge")
    rng = np.random.default_rng(seed)
    d_out, d_in = (int(n) for n in rng.integers(1, 14, 2))
    r = int(rng.integers(1, min(d_out, d_in) + 1))
    given_adapter = adapter_of(rng, d_out, d_in, r, adapter, 2.0**exponent)
    W = rng.standard_normal((d_out, d_in)).astype(DTYPES[base])
    save_file({"w.weight": np.ascontiguousarray(W.T) if turned else W}, folder / "base.safetensors")
    target = store.Target("w.weight", W.T.shape if turned else W.shape, "in,out" if turned else "out,in")
    state = store.State({"w": layer(target, given_adapter)})
    exact = W.astype(np.float64) + core.delta(core.Adapter(*(array.astype(np.float64) for array in given_adapter)))
    if base == "F16" and abs(exact).max() > 2.0**15:  # within 2 of the largest: what overflows is refused
        with contextlib.suppress(InvalidValueError):
            store.merge_checkpoint(folder / "base.safetensors", state, folder / "out")
            assert abs(exact).max() < 2.0**16
        return
    report = store.merge_checkpoint(folder / "base.safetensors", state, folder / "out").layers["w"]
    got = load_file(folder / "out" / "base.safetensors")["w.weight"]
    got = got.T if turned else got
    wide = np.float64 if np.float64 in (DTYPES[base], adapter) else np.float32
    inputs = core.Adapter(*(array.astype(wide) for array in given_adapter))
    limit = core.bounds.merge(W.astype(wide), inputs, dtype=DTYPES[base])
    error = abs(got.astype(np.float64) - exact)
    # `exact` itself is rounded in float64; where the merge is, too, both are within the bound of the truth.
    assert (error <= limit * (2 if wide is np.float64 else 1 + 2.0**-20)).all()
    assert error.max() <= report.bound * (2 if wide is np.float64 else 1 + 2.0**-20)
    expected = core.merge(W.astype(wide), inputs, dtype=DTYPES[base]).report
    size = np.linalg.norm(exact - W.astype(np.float64))
    slack = (d_out * d_in + 8) * np.finfo(wide).eps * (1 + np.linalg.norm(W.astype(np.float64)) / max(size, 1e-300))
    assert abs(report.kept - float(expected.kept)) <= slack
    assert abs(report.error - float(expected.error)) <= slack
    assert report.bound >= float(expected.bound) * (1 - 2.0**-20)


def test_the_function_of_an_earlier_task_is_merged(tmp_path):
    rng = np.random.default_rng(1)
    A, R, D, B = adapter_of(rng, 4, 5, 2)
    state = store.State(
        {"w": layer(store.Target("w.weight", (4, 5)), core.Adapter(A, R, D, B))},
        tasks=("a",),
        snapshots={"a": {"w": store.Snapshot(2 * R)}},
    )
    save_file({"w.weight": np.zeros((4, 5), np.float32)}, tmp_path / "base.safetensors")
    store.merge_checkpoint(tmp_path / "base.safetensors", state, tmp_path / "now")
    store.merge_checkpoint(tmp_path / "base.safetensors", state, tmp_path / "then", task="a")
    for name, routing in (("now", R + D), ("then", 2 * R)):
        got = load_file(tmp_path / name / "base.safetensors")["w.weight"]
        adapter = core.Adapter(A, routing, np.zeros_like(R), B)
        exact = core.delta(core.Adapter(*(array.astype(np.float64) for array in adapter)))
        assert (abs(got - exact) <= core.bounds.delta(adapter) + 2.0**-24 * abs(exact)).all()


@pytest.mark.parametrize("layout", ["out,in", "in,out"])
def test_the_head_of_an_earlier_task_is_merged(tmp_path, layout):
    """In the layout of the checkpoint, a square one too."""
    for d_in in (4, 3):
        V = np.arange(3 * (d_in + 1), dtype=np.float32).reshape(3, d_in + 1)
        W = V[:, :-1] if layout == "out,in" else V[:, :-1].T
        target = store.Target("h.weight", W.shape, layout, bias="h.bias")
        head = store.Layer("head", target, core.Adapter(None, V, 0 * V, None))
        state = store.State({"h": head}, tasks=("a",), snapshots={"a": {"h": store.Snapshot(2 * V)}})
        save_file({"h.weight": W.copy(), "h.bias": V[:, -1].copy()}, tmp_path / "base.safetensors")
        store.save(tmp_path / f"folder-{d_in}", state)
        loaded = store.load(tmp_path / f"folder-{d_in}")
        store.merge_checkpoint(tmp_path / "base.safetensors", loaded, tmp_path / f"then-{d_in}", task="a")
        got = load_file(tmp_path / f"then-{d_in}" / "base.safetensors")
        assert (got["h.weight"] == 2 * W).all()
        assert (got["h.bias"] == 2 * V[:, -1]).all()


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_head_is_rounded_through_float32(tmp_path, dtype):
    """Just above a tie of the narrow dtype, by less than float32 sees: converting float64 at once may round up."""
    tie = 1 + np.asarray([2.0**-8, 3 * 2.0**-8, 2.0**-11, 3 * 2.0**-11])
    V = np.stack([tie + 2.0**-40, tie - 2.0**-40, tie])
    head = store.Layer("head", store.Target("h.weight", (3, 4)), core.Adapter(None, V, 0 * V, None))
    save_file({"h.weight": np.zeros((3, 4), DTYPES[dtype])}, tmp_path / "base.safetensors")
    store.merge_checkpoint(tmp_path / "base.safetensors", store.State({"h": head}), tmp_path / "out")
    got = load_file(tmp_path / "out" / "base.safetensors")["h.weight"]
    assert got.tobytes() == np.stack([tie] * 3).astype(np.float32).astype(DTYPES[dtype]).tobytes()
    assert len({row.tobytes() for row in got}) == 1


def test_the_share_of_unchanged_entries(tmp_path):
    """One row of a bfloat16 weight moves by a quarter, the other three by far too little."""
    W = np.ones((4, 6), ml_dtypes.bfloat16)
    save_file({"w.weight": W}, tmp_path / "base.safetensors")
    A = np.asarray([[0.25], [2.0**-12], [2.0**-12], [2.0**-12]], np.float32)
    one = np.ones((1, 1), np.float32)
    adapter = core.Adapter(A, one, 0 * one, np.ones((1, 6), np.float32))
    state = store.State({"w": layer(store.Target("w.weight", (4, 6)), adapter)})
    report = store.merge_checkpoint(tmp_path / "base.safetensors", state, tmp_path / "out").layers["w"]
    assert report.unchanged == 0.75
    assert abs(report.kept - 1.0) <= 2.0**-12


def test_a_report_does_not_cancel(tmp_path):
    """Columns that almost undo each other: Gram matrices would give a negative norm."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        a, b = rng.standard_normal((5, 1)).astype(np.float32), rng.standard_normal((1, 6)).astype(np.float32)
        A = np.concatenate([a, np.nextafter(a, np.float32(9))], axis=1)
        B = np.concatenate([b, -b])
        eye = np.eye(2, dtype=np.float32)
        W = rng.standard_normal((5, 6)).astype(np.float32) * np.float32(2.0**-22)
        path = tmp_path / f"{seed}.safetensors"
        save_file({"w.weight": W}, path)
        adapter = core.Adapter(A, eye, 0 * eye, B)
        state = store.State({"w": layer(store.Target("w.weight", (5, 6)), adapter)})
        report = store.merge_checkpoint(path, state, tmp_path / f"out-{seed}").layers["w"]
        expected = core.merge(W, adapter).report
        assert abs(report.kept - float(expected.kept)) <= 2.0**-16
        assert abs(report.error - float(expected.error)) <= 2.0**-16
        told = store.export_peft(state, tmp_path / f"peft-{seed}")
        exact = np.linalg.norm(core.delta(core.Adapter(*(x.astype(np.float64) for x in adapter))))
        assert abs(told.size["w"] - exact) <= 2.0**-40 * np.linalg.norm(a) * np.linalg.norm(b)


def test_a_head_that_overflows_is_refused_before_anything_is_written(tmp_path):
    V = np.full((3, 4), 1e5, np.float32)
    head = store.Layer("head", store.Target("h.weight", (3, 4)), core.Adapter(None, V, V, None))
    save_file({"h.weight": np.ones((3, 4), np.float16)}, tmp_path / "base.safetensors")
    with pytest.raises(InvalidValueError, match="head 'h' does not fit the checkpoint"):
        store.merge_checkpoint(tmp_path / "base.safetensors", store.State({"h": head}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_copies_where_the_system_has_no_call_for_them(tmp_path, monkeypatch):
    def none(*_):
        raise OSError

    monkeypatch.setattr(os, "copy_file_range", none, raising=False)
    rng = np.random.default_rng(17)
    tensors = checkpoint(tmp_path / "base", rng, np.float32)
    state = dyadic_state(rng)
    store.merge_checkpoint(tmp_path / "base", state, tmp_path / "out")
    expected = merged_by_hand(tensors, state)
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert all((array == expected[name]).all() for name, array in load_file(path).items())


def test_the_configuration_comes_last(tmp_path, monkeypatch):
    rng = np.random.default_rng(18)
    checkpoint(tmp_path / "base", rng, np.float32)
    names = []
    replace = _checkpoint.replace
    monkeypatch.setattr(_checkpoint, "replace", lambda path, text: (names.append(path.name), replace(path, text)))
    store.merge_checkpoint(tmp_path / "base", dyadic_state(rng), tmp_path / "out")
    small = [name for name in names if name != "clora-merge.json"]
    assert small == ["tokenizer.json", "model.safetensors.index.json", "config.json"]
    (tmp_path / "out" / "config.json").unlink()  # complete, but for this
    store.merge_checkpoint(tmp_path / "base", dyadic_state(np.random.default_rng(18)), tmp_path / "new")
    assert (tmp_path / "new" / "config.json").exists()


def test_data_are_on_the_disk_before_the_journal_says_so(tmp_path, monkeypatch):
    rng = np.random.default_rng(19)
    checkpoint(tmp_path / "base", rng, np.float32)
    events = []
    fsync, replace = os.fsync, _checkpoint.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd)))

    def note(path, text):
        partial = {p.stat().st_ino: p.name for p in path.parent.glob("*.partial")}
        if path.name == "clora-merge.json" and any(json.loads(text)["done"].values()):
            assert not partial or set(partial) & set(events)
        replace(path, text)
        events.clear()

    monkeypatch.setattr(_checkpoint, "replace", note)
    store.merge_checkpoint(tmp_path / "base", dyadic_state(rng), tmp_path / "out")


def test_no_file_stays_open(tmp_path):
    rng = np.random.default_rng(20)
    checkpoint(tmp_path / "base", rng, np.float32)
    state = dyadic_state(rng)
    before = len(os.listdir("/proc/self/fd"))
    for i in range(5):
        interrupted(tmp_path, state, f"out-{i}")
        store.merge_checkpoint(tmp_path / "base", state, tmp_path / f"out-{i}")
    assert len(os.listdir("/proc/self/fd")) <= before


def test_code_in_the_present_folder_is_never_run(tmp_path, monkeypatch):
    monkeypatch.setattr(_blocks, "ALONE", 0)
    rng = np.random.default_rng(21)
    checkpoint(tmp_path / "base", rng, np.float32)
    (tmp_path / "base" / "numpy.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    monkeypatch.chdir(tmp_path / "base")
    store.merge_checkpoint(tmp_path / "base", dyadic_state(rng), tmp_path / "out")
    assert not (tmp_path / "run").exists()


# --- interrupted -------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "clora-merge.json"}


def test_an_interrupted_merge_goes_on_wherever_it_was(tmp_path):
    rng = np.random.default_rng(2)
    checkpoint(tmp_path / "base", rng, np.float32)
    state = dyadic_state(rng)
    whole = store.merge_checkpoint(tmp_path / "base", state, tmp_path / "whole")
    steps = []
    store.merge_checkpoint(tmp_path / "base", state, tmp_path / "count", progress=lambda *a: steps.append(a))
    for stop_at in range(1, len(steps)):
        out = tmp_path / f"out-{stop_at}"
        calls = []

        def stop(done, total, calls=calls, stop_at=stop_at):
            calls.append(done)
            if len(calls) == stop_at:
                raise Stop

        with pytest.raises(Stop):
            store.merge_checkpoint(tmp_path / "base", state, out, progress=stop)
        assert not (out / "config.json").exists()
        assert not (out / "model.safetensors.index.json").exists()
        later = []
        report = store.merge_checkpoint(tmp_path / "base", state, out, progress=lambda *a, n=later: n.append(a))
        assert report.resumed
        assert report._replace(resumed=False) == whole
        assert files_of(out) == files_of(tmp_path / "whole")
        assert len(calls) + len(later) == len(steps)  # nothing is done twice
        assert later[-1] == steps[-1]


def test_a_killed_merge_goes_on(tmp_path):
    rng = np.random.default_rng(3)
    tensors = {f"{i}.weight": rng.standard_normal((512, 512)).astype(np.float32) for i in range(24)}
    save_file(tensors, tmp_path / "base.safetensors")
    layers = {f"{i}": layer(store.Target(f"{i}.weight", (512, 512)), adapter_of(rng, 512, 512, 8)) for i in range(24)}
    store.save(tmp_path / "adapter", store.State(layers))
    script = (
        "import sys, clora_store as store\n"
        "from clora_store import _blocks, _checkpoint\n"
        "_blocks.BLOCK, _checkpoint.FLUSH_SECONDS = 1 << 14, 0.0\n"
        "print('ready', flush=True)\n"
        "store.merge_checkpoint(sys.argv[1], store.load(sys.argv[2]), sys.argv[3])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "base.safetensors"), str(tmp_path / "adapter")]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
    killed = 0
    for _ in range(50):
        process = subprocess.Popen([*command, str(tmp_path / "out")], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 + 0.01 * killed)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            break
        killed += 1
    assert killed
    subprocess.run([*command, str(tmp_path / "out")], check=True, stdout=subprocess.DEVNULL)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert (tmp_path / "out" / "clora-merge.json").read_text() == (tmp_path / "whole" / "clora-merge.json").read_text()


def test_a_merge_goes_on_with_the_same_things_alone(tmp_path):
    rng = np.random.default_rng(4)
    checkpoint(tmp_path / "base", rng, np.float32)
    state = dyadic_state(rng)

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        store.merge_checkpoint(tmp_path / "base", state, tmp_path / "out", progress=stop)
    with pytest.raises(StateError, match="holds another merge"):
        store.merge_checkpoint(tmp_path / "base", dyadic_state(rng), tmp_path / "out")
    with pytest.raises(StateError, match="holds another merge"):
        store.merge_checkpoint(tmp_path / "base", state, tmp_path / "out", rename=[("x", "y")])
    store.merge_checkpoint(tmp_path / "base", state, tmp_path / "out")
    files = files_of(tmp_path / "out")
    again = store.merge_checkpoint(tmp_path / "base", state, tmp_path / "out")  # complete: nothing to do
    assert again.resumed
    assert files_of(tmp_path / "out") == files
    with pytest.raises(StateError, match="holds another merge"):
        store.merge_checkpoint(tmp_path / "base", dyadic_state(rng), tmp_path / "out")


def test_a_merge_goes_over_nothing(tmp_path):
    rng = np.random.default_rng(5)
    checkpoint(tmp_path / "base", rng, np.float32)
    state = dyadic_state(rng)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("")
    with pytest.raises(StateError, match="the folder is not new"):
        store.merge_checkpoint(tmp_path / "base", state, tmp_path / "used")
    with pytest.raises(StateError, match="the output is the input"):
        store.merge_checkpoint(tmp_path / "base", state, tmp_path / "base")
    assert not (tmp_path / "base" / "clora-merge.json").exists()


def test_the_disk_is_looked_at_first(tmp_path, monkeypatch):
    rng = np.random.default_rng(6)
    checkpoint(tmp_path / "base", rng, np.float32)
    monkeypatch.setattr(_checkpoint.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=100))
    with pytest.raises(StateError, match=r"the disk is too full. Got 100 bytes free"):
        store.merge_checkpoint(tmp_path / "base", dyadic_state(rng), tmp_path / "out")


# --- refused -----------------------------------------------------------------------------------------------------


def one_layer(weight="w.weight", shape=(4, 5), **options):
    target = store.Target(weight, shape, **options)
    return store.State({"w": layer(target, adapter_of(np.random.default_rng(7), *target.matrix, 2))})


def base_file(tmp_path, name="w.weight", shape=(4, 5), dtype=np.float32):
    save_file({name: np.ones(shape, dtype)}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


REFUSED = [
    (
        {"name": "model.w.weight"},
        {},
        {},
        OptionError,
        r"near: model.w.weight.*--rename '\^=model.'",
    ),
    ({"name": "w.wieght"}, {}, {}, OptionError, r"near: w.wieght"),
    ({"shape": (5, 4)}, {}, {}, ShapeError, r"other layout: pass layout='in,out'"),
    ({"shape": (4, 6)}, {}, {}, ShapeError, r"tensor 'w.weight' has another shape. Got \(4, 6\); needed \(4, 5\)"),
    ({"dtype": np.int8}, {}, {}, DTypeError, r"can't be merged into. Got I8.*unquantised"),
    ({}, {"tied": ("lm_head.weight",)}, {}, StateError, r"tied to one that was not adapted.*lm_head.weight"),
    ({}, {}, {"layout": "row"}, OptionError, "unknown layout"),
    ({}, {}, {"rename": [("(", "")]}, OptionError, "no regular expression"),
    ({}, {}, {"rename": [("w", r"\9")]}, OptionError, "no regular expression"),
    ({}, {}, {"task": "a"}, StateError, "no snapshot of task 'a'"),
]


@pytest.mark.parametrize(("base", "target", "options", "error", "match"), REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, base, target, options, error, match):
    path = base_file(tmp_path, **base)
    with pytest.raises(error, match=match):
        store.merge_checkpoint(path, one_layer(**target), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_rules_and_layouts_make_it_fit(tmp_path):
    state = one_layer()
    dW = core.delta(core.Adapter(*(a.astype(np.float64) for a in state.layers["w"].adapter)))
    path = base_file(tmp_path, name="model.layers.w.kernel", shape=(5, 4))
    rules = [("^", "model.layers."), (r"\.weight$", ".kernel")]
    store.merge_checkpoint(path, state, tmp_path / "out", rename=rules, layout="in,out")
    got = load_file(tmp_path / "out" / "base.safetensors")["model.layers.w.kernel"]
    limit = core.bounds.merge(np.ones((4, 5), np.float32), state.layers["w"].adapter)
    assert (abs(got.T - (1 + dW)) <= limit).all()


def test_a_weight_that_is_tied_is_refused_also_where_both_are_stored(tmp_path):
    both = {name: np.ones((4, 5), np.float32) for name in ("w.weight", "lm_head.weight")}
    save_file(both, tmp_path / "base.safetensors")
    with pytest.raises(StateError, match="is tied to one that was not adapted"):
        store.merge_checkpoint(tmp_path / "base.safetensors", one_layer(tied=("lm_head.weight",)), tmp_path / "out")


@pytest.mark.parametrize("kind", ["head and layer", "two heads", "two layers"])
def test_two_on_one_tensor_are_refused(tmp_path, kind):
    head = store.Layer(
        "head", store.Target("a.weight", (4, 5)), core.Adapter(None, *np.ones((2, 4, 5), np.float32), None)
    )
    linear = one_layer().layers["w"]
    other = head._replace(target=head.target._replace(weight="b.weight"))
    pair = {"head and layer": (head, linear), "two heads": (head, other)}.get(
        kind, (linear, linear._replace(target=linear.target._replace(weight="b.weight")))
    )
    state = store.State(dict(zip("ab", pair, strict=True)))
    with pytest.raises(OptionError, match="two layers on one tensor"):
        store.merge_checkpoint(base_file(tmp_path), state, tmp_path / "out", rename=[("^[ab].weight", "w.weight")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_an_overflow_is_no_silent_infinity(tmp_path, dtype):
    largest = float(ml_dtypes.finfo(dtype).max)
    save_file({"w.weight": np.full((4, 5), 0.75 * largest, dtype)}, tmp_path / "base.safetensors")
    A, R, D, B = (np.ones(s, np.float32) for s in ((4, 1), (1, 1), (1, 1), (1, 5)))
    adapter = core.Adapter(A, np.float32(0.75 * largest) * R, 0 * D, B)
    state = store.State({"w": layer(store.Target("w.weight", (4, 5)), adapter)})
    with pytest.raises(InvalidValueError, match="merged weight of layer 'w' is not finite"):
        store.merge_checkpoint(tmp_path / "base.safetensors", state, tmp_path / "out")
    nan = state.layers["w"]._replace(adapter=adapter._replace(A=np.float32(np.nan) * A))
    with pytest.raises(FormatError, match=r"tensor 'w.A' is not finite"):
        store.merge_checkpoint(tmp_path / "base.safetensors", store.State({"w": nan}), tmp_path / "nan")


def interrupted(tmp_path, state, folder="out"):
    def stop(done, total):
        if done > total // 2:
            raise Stop

    with pytest.raises(Stop):
        store.merge_checkpoint(tmp_path / "base", state, tmp_path / folder, progress=stop)
    return tmp_path / folder


def test_a_merge_goes_on_with_the_same_targets_alone(tmp_path):
    """The arrays alone do not make a plan: a square weight could be turned half way."""
    rng = np.random.default_rng(8)
    checkpoint(tmp_path / "base", rng, np.float32)
    state = store.State({"o": layer(store.Target("m.other.weight", (3, 3)), adapter_of(rng, 3, 3, 2))})
    interrupted(tmp_path, state)
    turned = state.layers["o"]._replace(target=state.layers["o"].target._replace(layout="in,out"))
    with pytest.raises(StateError, match="holds another merge"):
        store.merge_checkpoint(tmp_path / "base", store.State({"o": turned}), tmp_path / "out")


@pytest.mark.parametrize("harm", ["cut", "gone", "cut final", "gone final"])
def test_a_file_that_is_not_as_the_journal_says_starts_again(tmp_path, harm):
    rng = np.random.default_rng(9)
    checkpoint(tmp_path / "base", rng, np.float32)
    state = dyadic_state(rng)
    whole = store.merge_checkpoint(tmp_path / "base", state, tmp_path / "whole")
    out = interrupted(tmp_path, state)
    if "final" in harm:
        store.merge_checkpoint(tmp_path / "base", state, out)
    (path,) = sorted(out.glob("*.safetensors" if "final" in harm else "*.partial"))[:1]
    if "cut" in harm:
        path.write_bytes(path.read_bytes()[:8])
    else:
        path.unlink()
    report = store.merge_checkpoint(tmp_path / "base", state, out)
    assert report._replace(resumed=False) == whole
    assert files_of(out) == files_of(tmp_path / "whole")


JOURNALS = [
    lambda j: {},
    lambda j: [],
    lambda j: {**j, "done": 5},
    lambda j: {**j, "done": dict.fromkeys(j["done"], "x")},
    lambda j: {**j, "done": dict.fromkeys(j["done"], -1)},
    lambda j: {k: v for k, v in j.items() if k != "sums"},
    lambda j: {**j, "sums": {"q": [1.0, 2.0]}},
    lambda j: {**j, "sums": "x"},
    lambda j: {**j, "complete": 1},
]


@pytest.mark.parametrize("change", range(len(JOURNALS)))
def test_a_journal_that_is_none_is_refused(tmp_path, change):
    rng = np.random.default_rng(10)
    checkpoint(tmp_path / "base", rng, np.float32)
    state = dyadic_state(rng)
    out = interrupted(tmp_path, state)
    journal = json.loads((out / "clora-merge.json").read_text())
    (out / "clora-merge.json").write_text(json.dumps(JOURNALS[change](journal)))
    with pytest.raises(StateError, match=r"a clora-merge\.json that is none"):
        store.merge_checkpoint(tmp_path / "base", state, out)


@pytest.mark.parametrize("shift", [1, -1, 10**6])
def test_a_journal_that_is_wrong_about_a_place_costs_work_alone(tmp_path, shift):
    rng = np.random.default_rng(11)
    checkpoint(tmp_path / "base", rng, np.float32)
    state = dyadic_state(rng)
    whole = store.merge_checkpoint(tmp_path / "base", state, tmp_path / "whole")
    out = interrupted(tmp_path, state)
    journal = json.loads((out / "clora-merge.json").read_text())
    journal["done"] = {name: done + shift for name, done in journal["done"].items() if done}
    (out / "clora-merge.json").write_text(json.dumps(journal))
    assert store.merge_checkpoint(tmp_path / "base", state, out)._replace(resumed=False) == whole
    assert files_of(out) == files_of(tmp_path / "whole")


def test_pipes_are_no_files_to_wait_for(tmp_path):
    rng = np.random.default_rng(12)
    checkpoint(tmp_path / "base", rng, np.float32)
    state = dyadic_state(rng)
    out = interrupted(tmp_path, state)
    for path in (out / "clora-merge.json", tmp_path / "base" / "model.safetensors.index.json"):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises((FormatError, StateError)):
            store.merge_checkpoint(tmp_path / "base", state, out)
        path.unlink()
        if path.name == "clora-merge.json":
            break
    else:
        raise AssertionError
    os.mkfifo(tmp_path / "base" / "b.safetensors.index.json")
    (tmp_path / "base" / "model.safetensors.index.json").unlink()
    with pytest.raises(FormatError, match="no regular file"):
        store.merge_checkpoint(tmp_path / "base", state, tmp_path / "new")


def test_two_merges_into_one_folder(tmp_path):
    rng = np.random.default_rng(13)
    checkpoint(tmp_path / "base", rng, np.float32)
    state = dyadic_state(rng)
    told = []

    def again(done, total):
        if not told:
            with pytest.raises(StateError, match="another process or thread") as error:
                store.merge_checkpoint(tmp_path / "base", state, tmp_path / "out")
            told.append(error)

    store.merge_checkpoint(tmp_path / "base", state, tmp_path / "out", progress=again)
    assert told


def test_a_process_that_dies_is_told_and_the_merge_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(_blocks, "ALONE", 0)
    started = []
    start = _blocks._start

    def note(work):
        started[:] = start(work)
        return list(started)

    monkeypatch.setattr(_blocks, "_start", note)
    rng = np.random.default_rng(14)
    checkpoint(tmp_path / "base", rng, np.float32)
    state = dyadic_state(rng)

    def shoot(done, total):
        for process in started:
            process.kill()

    with pytest.raises(StateError, match=r"a process that merges has died.*run the same again"):
        store.merge_checkpoint(tmp_path / "base", state, tmp_path / "out", progress=shoot)
    assert all(process.poll() is not None for process in started)
    store.merge_checkpoint(tmp_path / "base", state, tmp_path / "out")
    assert len(started) == _safetensors.WORKERS
    assert all(process.poll() is not None for process in started)
    store.merge_checkpoint(tmp_path / "base", state, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("executable", ["", "/bin/true", "/bin/false", "/no/such/file"])
def test_where_no_processes_can_be_had_it_is_done_without(tmp_path, monkeypatch, executable):
    monkeypatch.setattr(_blocks, "ALONE", 0)
    monkeypatch.setattr(sys, "executable", executable)
    rng = np.random.default_rng(15)
    tensors = checkpoint(tmp_path / "base", rng, np.float32)
    state = dyadic_state(rng)
    store.merge_checkpoint(tmp_path / "base", state, tmp_path / "out")
    got = load_file(tmp_path / "out" / "a-00001-of-00002.safetensors")
    expected = merged_by_hand(tensors, state)
    assert all((got[name] == expected[name]).all() for name in got)


def test_an_error_in_a_process_is_the_same_error_here(tmp_path, monkeypatch):
    monkeypatch.setattr(_blocks, "ALONE", 0)
    rng = np.random.default_rng(16)
    checkpoint(tmp_path / "base", rng, np.float32)

    def cut(done, total):
        for path in (tmp_path / "base").glob("*.safetensors"):
            os.truncate(path, 10)

    with pytest.raises(FormatError, match="the file ended early"):
        store.merge_checkpoint(tmp_path / "base", dyadic_state(rng), tmp_path / "out", progress=cut)


def test_checkpoints_that_are_none_are_refused(tmp_path):
    state = one_layer()
    with pytest.raises(OptionError, match="there is no checkpoint"):
        store.merge_checkpoint(tmp_path / "nowhere", state, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="there is no checkpoint"):
        store.merge_checkpoint(tmp_path / "empty", state, tmp_path / "out")
    (tmp_path / "two").mkdir()
    for name in "ab":
        save_file({f"{name}.weight": np.ones((4, 5), np.float32)}, tmp_path / "two" / f"{name}.safetensors")
    with pytest.raises(OptionError, match="several files and no index"):
        store.merge_checkpoint(tmp_path / "two", state, tmp_path / "out")
    for shards, match in (
        ({"w.weight": "../secret.safetensors"}, "no shard beside it"),
        ({"w.weight": "/etc/passwd"}, "no shard beside it"),
        ({"w.weight": 3}, "no weight_map of names"),
        (None, "no weight_map of names"),
    ):
        (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(FormatError, match=match):
            store.merge_checkpoint(tmp_path / "two", state, tmp_path / "out")
    write_container(tmp_path / "bad.safetensors", {"w.weight": {}}, b"")
    with pytest.raises(FormatError, match="not described"):
        store.merge_checkpoint(tmp_path / "bad.safetensors", state, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_grown_head_is_refused_and_says_where_to_merge_it(tmp_path):
    V = np.ones((5, 4), np.float32)
    target = store.Target("head.weight", (3, 4))
    state = store.State({"head": store.Layer("head", target, core.Adapter(None, V, V, None))})
    with pytest.raises(ShapeError, match=r"another shape.*a head that has grown; merge and save it in torch"):
        store.merge_checkpoint(base_file(tmp_path, "head.weight", (3, 4)), state, tmp_path / "out")
