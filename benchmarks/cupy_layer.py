"""clora_cupy's fused passes against the same formulas array by array, and against the frozen layer: time on a GPU.

Everything is timed in turn, A B C A B C ..., and reported as the median over rounds of ratios within a round; the
device has done all its work before every reading of the clock. ``python benchmarks/cupy_layer.py --help``. Needs CuPy
and a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from timing import ratio, readable
from timing import timed as in_turn

import clora_core as core
import clora_numpy

SHAPES = [
    (8192, 4096, 4096, 16),
    (512, 768, 768, 16),
    (4096, 768, 768, 16),
    (2048, 768, 3072, 16),
    (2048, 2048, 2048, 64),
    (128, 2048, 2048, 16),
]
NETWORKS = {
    "8192 x 1024 -> 4096 -> 1024, r 16": (8192, 1024, 4096, 16),
    "512 x 256 -> 1024 -> 256, r 16": (512, 256, 1024, 16),
}
SMALL = [(8, 12, 10, 4)]  # that it runs
cupy: Any = None
clora: Any = None


def timed(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in every round."""
    return in_turn(functions, rounds, settle=lambda _: cupy.cuda.Device().synchronize())


def draw(rng: np.random.Generator, dtype: Any, *shape: int) -> Any:
    """Numbers of about the size that a layer has, on the device."""
    return cupy.asarray((rng.standard_normal(shape) / shape[-1] ** 0.5).astype(dtype))


def stir(layers: Any, rng: np.random.Generator) -> None:
    """Routings away from zero."""
    for layer in layers:
        R_old, R_delta = (draw(rng, layer.adapter.R_old.dtype, *layer.adapter.R_old.shape) for _ in range(2))
        layer.adapter = layer.adapter._replace(R_old=R_old, R_delta=R_delta)


def forward_by_formulas(layer: Any, x: Any) -> Any:
    """``Layer.forward`` with every sum and cast a pass of its own: what the fused passes are measured against."""
    layer.input, wide = x, x.astype(layer.adapter_dtype, copy=False)
    y = (x @ layer.W.T).astype(wide.dtype, copy=False) + core.apply(wide, layer.adapter) + layer.bias
    return y.astype(x.dtype, copy=False)


def backward_by_formulas(layer: Any, g: Any) -> Any:
    """``Layer.backward``, likewise."""
    x, wide = layer.wide_input(), g.astype(layer.adapter_dtype, copy=False)
    out = core.linear_vjp(x, None, layer.adapter, wide, wrt=("x", *layer.trained), stop_old=layer.stop_old)
    for name in layer.trained:
        layer.add_gradient(name, getattr(out, name))
    return ((g @ layer.W).astype(wide.dtype, copy=False) + out.x).astype(g.dtype, copy=False)


def layers(rounds: int, dtype: Any, shapes: list[tuple[int, int, int, int]]) -> dict[str, Any]:
    """Forward and backward of one layer, the input's gradient included."""
    rows: dict[str, Any] = {}
    for n, d_in, d_out, r in shapes:
        rng = np.random.default_rng(0)
        W, bias = draw(rng, dtype, d_out, d_in), draw(rng, dtype, d_out)
        x, g = draw(rng, dtype, n, d_in), draw(rng, dtype, n, d_out)
        made = {name: clora.Layer(W, bias) for name in ("frozen", "formulas", "clora", "clora-routing")}
        for name in ("formulas", "clora", "clora-routing"):
            factors = "never" if name == "clora-routing" else "first-task"
            adapter = clora.attach([made[name]], rank=r, rng=0, factors=factors)
            adapter.begin_task("now")
            stir([made[name]], np.random.default_rng(1))

        def fused(layer: Any, x: Any = x, g: Any = g) -> None:
            layer.forward(x)
            layer.backward(g)
            layer.gradients = {}

        def plain(layer: Any = made["formulas"], x: Any = x, g: Any = g) -> None:
            forward_by_formulas(layer, x)
            backward_by_formulas(layer, g)
            layer.gradients = {}

        cases = {name: plain if name == "formulas" else lambda f=fused, o=layer: f(o) for name, layer in made.items()}
        times = timed(cases, rounds)
        rows[f"{n} x {d_in} -> {d_out}, r {r}"] = {
            "frozen_ms": 1e3 * statistics.median(times["frozen"]),
            **{f"{name} / frozen": ratio(times, name, "frozen") for name in ("formulas", "clora", "clora-routing")},
            "clora / formulas": ratio(times, "clora", "formulas"),
        }
    names = [name for name in next(iter(rows.values())) if " / " in name]
    means = {name: math.exp(statistics.mean(math.log(row[name]) for row in rows.values())) for name in names}
    return {**rows, "geometric mean": means}


def network(library: Any, dtype: Any, d: int, width: int) -> Any:
    """Two layers, rectifiers and a head, of clora_cupy or of clora_numpy, on CuPy's arrays."""
    rng = np.random.default_rng(0)
    return library.Network(
        {
            "up": library.Layer(draw(rng, dtype, width, d), draw(rng, dtype, width)),
            "relu": library.Relu(),
            "down": library.Layer(draw(rng, dtype, d, width), draw(rng, dtype, d)),
            "relu-2": library.Relu(),
            "head": library.Head(draw(rng, dtype, 10, d), draw(rng, dtype, 10)),
        }
    )


def steps(rounds: int, shapes: dict[str, tuple[int, int, int, int]]) -> dict[str, Any]:
    """A train step in float32, Adam and loss included, against clora_numpy's code on the same arrays."""
    rows = {}
    for label, (n, d, width, r) in shapes.items():
        rng = np.random.default_rng(1)
        x, labels = draw(rng, np.float32, n, d), cupy.asarray(rng.integers(0, 10, n))
        g = draw(rng, np.float32, n, 10)
        cases: dict[str, Callable[[], object]] = {}
        for name, library in (("formulas", clora_numpy), ("clora", clora), ("clora-routing", clora)):
            model = network(library, np.float32, d, width)
            factors = "never" if name == "clora-routing" else "first-task"
            adapter = library.attach(model, rank=r, rng=0, factors=factors)
            optimizer = library.Optimizer(adapter, library.adam(1e-4))
            adapter.begin_task("now")

            def step(library: Any = library, model: Any = model, optimizer: Any = optimizer) -> None:
                _, grad = library.cross_entropy(model.forward(x), labels)  # noqa: B023  # run before the next shape
                model.backward(grad)
                optimizer.step()

            cases[name] = step
        modules = list(network(clora, np.float32, d, width).modules.values())

        def frozen(modules: list[Any] = modules, x: Any = x, grad: Any = g) -> None:
            for module in modules:
                x = module.forward(x)
            for module in reversed(modules[1:]):
                grad = module.backward(grad)
            modules[-1].gradients = {}

        times = timed({"frozen": frozen, **cases}, rounds)
        rows[label] = {
            "frozen_ms": 1e3 * statistics.median(times["frozen"]),
            **{f"{name} / frozen": ratio(times, name, "frozen") for name in cases},
            "clora / formulas": ratio(times, "clora", "formulas"),
        }
    return rows


PARTS = ("layers", "steps")


def main() -> None:
    """Command line."""
    global cupy, clora
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--rounds", type=int, default=31, help="interleaved rounds (31)")
    parser.add_argument("--dtype", default="float32", choices=["float16", "float32", "float64"], help="for 'layers'")
    parser.add_argument("--smoke", action="store_true", help="run everything briefly: no measurement")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    try:
        clora, cupy = import_module("clora_cupy"), import_module("cupy")
    except ImportError as error:  # clora_cupy's own names what is missing and what brings it
        sys.exit(str(error))
    rounds = 1 if options.smoke else options.rounds
    run: dict[str, Callable[[], Any]] = {
        "layers": lambda: layers(rounds, np.dtype(options.dtype), SMALL if options.smoke else SHAPES),
        "steps": lambda: steps(rounds, {"small": (8, 12, 16, 4)} if options.smoke else NETWORKS),
    }
    result: dict[str, Any] = {
        "machine": {
            "device": cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode(),
            "dtype of the layers": options.dtype,
            "versions": {"cupy": cupy.__version__, "numpy": np.__version__},
        },
        **{part: run[part]() for part in options.parts or PARTS},
    }
    print(json.dumps(result, indent=1) if options.json else readable(result))


if __name__ == "__main__":
    main()
