"""benchmarks/cupy_layer.py where there is no GPU: it says so, and runs on the stand-in, where both sides are equal."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import cupy_double
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def script(*arguments):
    """The benchmark as a person runs it, with every device hidden."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'backends'}"}
    command = [sys.executable, "benchmarks/cupy_layer.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)


def test_the_benchmark_without_cupy_says_what_is_missing():
    assert "--smoke" in script("--help").stdout
    done = script("--smoke")
    assert done.returncode == 1
    assert "clora_cupy" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_benchmark_runs_and_compares_equals(monkeypatch, capsys, dtype):
    """On the stand-in: its times mean nothing, its calls are the real ones; on small integers both sides are equal."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("cupy_layer")
    monkeypatch.setattr(sys, "argv", ["cupy_layer.py", "--smoke", "--json", "--dtype", dtype])
    with cupy_double.installed() as cupy:
        properties = {"name": b"stand-in"}
        monkeypatch.setattr(cupy.cuda.runtime, "getDeviceProperties", lambda _: properties, raising=False)
        bench.main()
        figures = json.loads(capsys.readouterr().out)
        assert "clora / formulas" in figures["layers"]["geometric mean"]
        assert "clora / formulas" in figures["steps"]["small"]
        monkeypatch.setattr(
            bench, "draw", lambda rng, kind, *shape: cupy.asarray(rng.integers(-2, 3, shape).astype(kind))
        )
        rng = np.random.default_rng(0)
        W, bias, x, g = (bench.draw(rng, dtype, *shape) for shape in ((5, 6), (5,), (7, 6), (7, 5)))
        made = [bench.clora.Layer(W, bias) for _ in range(2)]
        outputs = []
        for layer, forward, backward in (
            (made[0], bench.forward_by_formulas, bench.backward_by_formulas),
            (made[1], bench.clora.Layer.forward, bench.clora.Layer.backward),
        ):
            bench.clora.attach([layer], rank=2, rng=0).begin_task("now")
            shapes = {"A": (5, 2), "R_old": (2, 2), "R_delta": (2, 2), "B": (2, 6)}
            integers = np.random.default_rng(1)
            parts = {name: bench.draw(integers, "float32", *shape) for name, shape in shapes.items()}
            layer.adapter = layer.adapter._replace(**parts)
            outputs.append([forward(layer, x), backward(layer, g), *layer.gradients.values()])
        for one, other in zip(*outputs, strict=True):
            assert one.dtype == other.dtype
            assert np.array_equal(one.get(), other.get())
