"""clora_jax against the frozen layer, flax.nnx's LoRA and qwix's LoRA of equal rank: jitted, time and flops.

Everything is timed in turn, A B C A B C ..., and reported as the median over rounds of ratios within a round, so that a
machine whose speed drifts slows all alike. ``python benchmarks/jax_lora.py --help``. Needs jax, optax, flax and qwix.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from timing import ratio, readable
from timing import timed as in_turn

import clora_jax as clora
import clora_jax.nnx as clora_nnx

SHAPES = [
    (512, 768, 768, 16),
    (4096, 768, 768, 16),
    (2048, 768, 3072, 16),
    (2048, 2048, 2048, 64),
    (128, 2048, 2048, 16),
]


def timed(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in every round."""
    return in_turn(functions, rounds, settle=jax.block_until_ready)


def compiled(model: nnx.Module, what: Any, x: jax.Array, g: jax.Array) -> tuple[Callable[[], object], float]:
    """A jitted step, y and the gradients of x and of Variables of that kind; and its flops."""
    graphdef, learning, rest = nnx.split(model, what, ...)

    def step(learning: Any, rest: Any, x: jax.Array, g: jax.Array) -> Any:
        y, back = jax.vjp(lambda learning, x: nnx.merge(graphdef, learning, rest)(x), learning, x)
        return y, back(g)

    program = jax.jit(step).lower(learning, rest, x, g).compile()
    return lambda: program(learning, rest, x, g), program.cost_analysis()["flops"]


def variants(n: int, d_in: int, d_out: int, r: int, dtype: Any) -> dict[str, tuple[nnx.Module, Any]]:
    """One layer five times; LoRA's second factor and the routings stand away from zero, as training would have them."""
    rng = np.random.default_rng(0)

    def plain() -> nnx.Linear:
        return nnx.Linear(d_in, d_out, param_dtype=dtype, dtype=dtype, rngs=nnx.Rngs(0))

    lora = nnx.LoRALinear(d_in, d_out, lora_rank=r, param_dtype=dtype, dtype=dtype, rngs=nnx.Rngs(0))
    lora.lora.lora_b.set_value(jnp.asarray(rng.standard_normal((r, d_out)), dtype))
    rule = qwix.LoraRule(module_path=".*", rank=r, alpha=float(r))
    x = jnp.zeros((n, d_in), dtype)
    out: dict[str, tuple[nnx.Module, Any]] = {
        "frozen": (plain(), nnx.RngState),
        "nnx": (lora, nnx.LoRAParam),
        "qwix": (qwix.apply_lora_to_model(plain(), qwix.LoraProvider([rule]), x, rngs=nnx.Rngs(1)), nnx.LoRAParam),
    }
    for name, factors in (("clora", "first-task"), ("clora-routing", "never")):
        model = Wrapped(plain())
        adapters = clora_nnx.attach(model, rank=r, factors=factors)
        stirred = clora.map_layers(lambda layer: stir(layer, rng), adapters)
        clora_nnx.update(model, stirred)
        out[name] = (model, clora_nnx.CLoRAVariable)
    return out


class Wrapped(nnx.Module):
    """A model of one layer."""

    def __init__(self, layer: nnx.Linear) -> None:
        self.layer = layer

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x)


def stir(layer: clora.Layer, rng: np.random.Generator) -> clora.Layer:
    """Routings away from zero."""
    shape, dtype = layer.adapter.R_old.shape, layer.adapter.R_old.dtype
    R_old, R_delta = (jnp.asarray(0.02 * rng.standard_normal(shape), dtype) for _ in range(2))
    return clora.Layer(layer.adapter._replace(R_old=R_old, R_delta=R_delta), layer.moments, layer.spare, layer.info)


@jax.jit
def infer(params: Any, x: jax.Array) -> jax.Array:
    """The layer without any adapter."""
    return x @ params["kernel"] + params["bias"]


def layers(rounds: int, dtype: Any) -> dict[str, Any]:
    """Forward and backward of one layer, with the gradient of its input, and inference after merging."""
    rows: dict[str, Any] = {}
    for n, d_in, d_out, r in SHAPES:
        rng = np.random.default_rng(0)
        x, g = (jnp.asarray(rng.standard_normal((n, d)), dtype) for d in (d_in, d_out))
        cases, flops = {}, {}
        made = variants(n, d_in, d_out, r, dtype)
        for name, (model, what) in made.items():
            cases[name], flops[name] = compiled(model, what, x, g)
        ours: Any = made["clora"][0]
        kernel = {"kernel": ours.layer.kernel.get_value(), "bias": ours.layer.bias.get_value()}
        adapters = clora.attach({"layer": kernel}, rank=r)
        merged = clora.merge({"layer": kernel}, adapters, on_loss="ignore").params["layer"]
        cases |= {"plain": partial(infer, kernel, x), "merged": partial(infer, merged, x)}
        times = timed(cases, rounds)
        rows[f"{n} x {d_in} -> {d_out}, r {r}"] = {
            "frozen_ms": 1e3 * statistics.median(times["frozen"]),
            **{f"{name} / frozen": ratio(times, name, "frozen") for name in ("nnx", "qwix", "clora", "clora-routing")},
            **{f"clora / {name}": ratio(times, "clora", name) for name in ("nnx", "qwix")},
            "clora-routing / nnx": ratio(times, "clora-routing", "nnx"),
            "flops clora / nnx, above frozen": (flops["clora"] - flops["frozen"]) / (flops["nnx"] - flops["frozen"]),
            "merged / plain, inference": ratio(times, "merged", "plain"),
        }
    names = [name for name in next(iter(rows.values())) if " / " in name]
    means = {name: math.exp(statistics.mean(math.log(row[name]) for row in rows.values())) for name in names}
    return {**rows, "geometric mean": means}


def tasks(counts: list[int], rounds: int) -> dict[str, Any]:
    """A protected, penalised step after many tasks, relative to the fewest; how often it was traced."""
    rng = np.random.default_rng(0)
    params = {str(i): {"kernel": jnp.asarray(rng.standard_normal((256, 256)) / 16, jnp.float32)} for i in range(2)}
    x = jnp.asarray(rng.standard_normal((64, 256)), jnp.float32)
    tx, traces = clora.protect(optax.adamw(1e-4), energy=0.5), 0

    def forward(adapters: Any, params: Any, x: Any) -> Any:
        bound = clora.bind(params, adapters)
        return jax.nn.relu(x @ bound["0"]["kernel"]) @ bound["1"]["kernel"]

    def loss(adapters: Any, params: Any, x: Any) -> Any:
        nonlocal traces
        traces += 1
        return jnp.mean(forward(adapters, params, x) ** 2) + clora.penalty(adapters, 0.1)

    @jax.jit
    def step(adapters: Any, state: Any, params: Any, x: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(adapters, params, x), state, adapters)
        return optax.apply_updates(adapters, updates), state

    init = jax.jit(tx.init)
    adapters, history = clora.attach(params, rank=16, factors="never"), clora.History()
    cases: dict[str, Callable[[], object]] = {}
    bytes_after: dict[str, int] = {}
    for task in range(max(counts)):
        adapters = clora.begin_task(adapters)
        adapters, _ = step(adapters, init(adapters), params, x)
        adapters, history = clora.end_task(adapters, clora.observe(forward, adapters, params, [x]), history=history)
        if task + 1 in counts:
            begun = clora.begin_task(adapters)
            cases[str(task + 1)] = partial(step, begun, init(begun), params, x)
            bytes_after[str(task + 1)] = sum(leaf.nbytes for leaf in jax.tree.leaves(begun))
    first = str(min(counts))
    times = timed(cases, rounds)
    return {
        f"step_ms after {first}": 1e3 * statistics.median(times[first]),
        **{f"step after {name} / {first}": ratio(times, name, first) for name in cases},
        **{f"state_bytes after {name}": count for name, count in bytes_after.items()},
        "traces": traces,
    }


PARTS = ("layers", "tasks")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--rounds", type=int, default=31, help="interleaved rounds (31)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of layer and input")
    parser.add_argument(
        "--precision", choices=["default", "highest", "tensorfloat32"], default="default", help="of matrix products"
    )
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 100, 1000], help="counts for 'tasks'")
    parser.add_argument("--smoke", action="store_true", help="run everything briefly: no measurement")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    rounds, counts = (1, [2, 4]) if options.smoke else (options.rounds, options.tasks)
    run: dict[str, Callable[[], Any]] = {
        "layers": lambda: layers(rounds, jnp.dtype(options.dtype)),
        "tasks": lambda: tasks(counts, rounds),
    }
    device = jax.devices()[0]
    with jax.default_matmul_precision(None if options.precision == "default" else options.precision):
        result: dict[str, Any] = {
            "machine": {
                "device": platform.machine() if device.platform == "cpu" else device.device_kind,
                "cores": os.cpu_count() or 0,
                "dtype": options.dtype,
                "precision of float32 products": options.precision,
                "versions": {name: metadata.version(name) for name in ("jax", "flax", "qwix", "optax")},
            },
            **{part: run[part]() for part in options.parts or PARTS},
        }
    print(json.dumps(result, indent=1) if options.json else readable(result))


if __name__ == "__main__":
    main()
