"""Staging: what arrives is what was sent, however late copies run and whatever the consumer does."""

from typing import NamedTuple

import cupy_double as double
import numpy as np
import pytest

from clora_core.errors import DTypeError, NamespaceError, OptionError


class Batch(NamedTuple):
    x: object
    y: object


@pytest.fixture(autouse=True)
def cupy():
    with double.installed() as module:
        yield module
        assert module.cuda.Device().id == 0


@pytest.fixture
def stage(cupy):
    from clora_cupy import stage

    return stage


def batches(count=7, seed=0):
    """Of changing shapes and dtypes; one without rows."""
    rng = np.random.default_rng(seed)
    sizes = [5, 3, 0, 64, 2, 31, 1, 300][:count]
    return [(rng.standard_normal((n, 6)).astype(np.float32), rng.integers(0, 9, n)) for n in sizes]


def check(got, sent):
    for mine, theirs in zip(got, sent, strict=True):
        assert mine.dtype == theirs.dtype
        assert np.array_equal(mine.get(), theirs)


@pytest.mark.parametrize("depth", [1, 2, 3, 20])
@pytest.mark.parametrize("device", [0, 1])
def test_a_consumer_that_looks_at_once(stage, depth, device):
    seen = 0
    for got, sent in zip(stage(batches(), device=device, depth=depth), batches(), strict=True):
        assert all(array.device.id == device for array in got)
        check(got, sent)
        seen += 1
    assert seen == 7


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_consumer_that_looks_late(stage, depth):
    """Nothing runs before it must: a buffer that is written while its copy is under way would show in the numbers."""
    got = list(stage(batches(), depth=depth))
    for mine, theirs in zip(got, batches(), strict=True):
        check(mine, theirs)


def test_work_on_the_callers_stream_comes_after_the_copy(stage, cupy):
    """Only that stream's work is asked for, nothing waits on the host."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for got, sent in zip(stage(batches(), depth=2), batches(), strict=True):
            syncs = len(double.SYNCS)
            doubled = got[0] + got[0]
            assert len(double.SYNCS) == syncs
            assert np.array_equal(doubled.get(), 2 * sent[0])
    assert (0, stream) in double.WORK


def test_the_copies_have_a_stream_of_their_own(stage, cupy):
    source = stage(batches(), depth=2)
    assert next(source) is not None
    busy = [s for s in double.Stream.all if any(kind == "copy" for _, kind, _ in s.queue)]
    assert len(busy) == 1
    assert not busy[0].null
    source.close()


def test_a_broken_loop_leaves_nothing_under_way(stage):
    for got in stage(batches(), depth=3):
        check(got, batches()[0])
        break
    assert double.pending() == 0


def test_a_source_that_fails_leaves_nothing_under_way(stage):
    def source():
        yield from batches(3)
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        list(stage(source(), depth=2))
    assert double.pending() == 0


def test_buffers_are_used_again(stage):
    same = [np.full((100, 6), i, np.float32) for i in range(50)]
    for i, got in enumerate(stage(same, depth=3)):
        assert (got.get() == i).all()
    assert len(double.PINNED) == 3


def test_the_host_waits_for_buffers_only(stage):
    """One wait for every batch after the first two, one at the end: none for batches in flight."""
    double.reset()
    for _ in stage(batches(6), depth=2):
        pass
    assert double.SYNCS == ["Event.synchronize"] * 4 + ["Stream.synchronize"]


def test_structures_stay(stage):
    x, y = np.ones((2, 3)), np.arange(2)
    for batch in (x, (x, y), [x, [y]], {"x": x, "more": {"y": y}}, Batch(x, y)):
        (got,) = stage([batch])
        assert type(got) is (double.ndarray if batch is x else type(batch))
    assert (got.y.get() == y).all()


LAYOUTS = [
    np.arange(12.0).reshape(3, 4).T,
    np.arange(10)[::-2],
    np.array(3.5),
    np.arange(3, dtype=">f8"),
    np.eye(2) > 0,
]


@pytest.mark.parametrize("array", LAYOUTS)
def test_any_layout(stage, array):
    (got,) = stage([array])
    assert got.shape == array.shape
    assert np.array_equal(got.get(), array)


def test_the_caller_keeps_its_device(stage, cupy):
    for _ in stage(batches(2), device=1):
        assert cupy.cuda.Device().id == 0


def test_the_device_is_the_one_at_the_call(stage, cupy):
    with cupy.cuda.Device(1):
        source = stage(batches(1))
    (got,) = source
    assert got[0].device.id == 1


def test_what_can_not_be_staged_is_told(stage, cupy):
    cases = {
        "depth=0": (OptionError, lambda: stage([], depth=0)),
        "builtins.float": (NamespaceError, lambda: next(stage([(np.ones(3), 1.0)]))),
        "cupy_double.ndarray": (NamespaceError, lambda: next(stage([cupy.ones(3)]))),
        "dtype object": (DTypeError, lambda: next(stage([np.array([None])]))),
        "dtype datetime64": (DTypeError, lambda: next(stage([np.array(["2025-01-01"], "M8[D]")]))),
    }
    for words, (kind, call) in cases.items():
        with pytest.raises(kind) as caught:
            call()
        assert words in str(caught.value)
        assert type(caught.value) is kind
