"""Run by test_jax_mesh.py in a process of its own, which has eight virtual devices: prints what it found as JSON."""

import json
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import clora_jax as clora

D, HIDDEN, CLASSES, ROWS = 24, 40, 5, 16


def params() -> Any:
    rng = np.random.default_rng(0)

    def kernel(*shape: int) -> Any:
        return (rng.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32)

    return {
        "up": {"kernel": kernel(D, HIDDEN)},
        "down": {"kernel": kernel(HIDDEN, D)},
        "head": {"kernel": kernel(D, 8)},
    }


def model(params: Any, x: Any) -> Any:
    x = jax.nn.relu(x @ params["up"]["kernel"])
    return jax.nn.relu(x @ params["down"]["kernel"]) @ params["head"]["kernel"]


def forward(adapters: Any, params: Any, batch: Any) -> Any:
    return model(clora.bind(params, adapters), batch[0])


def loss(adapters: Any, params: Any, batch: Any) -> Any:
    logits = forward(adapters, params, batch)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean() + clora.penalty(adapters, 0.1)


def life(base: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """Two tasks of three steps; adapters, and the compiled programs' text."""
    adapters = clora.attach(base, rank=4, max_rank=6, targets=["up", "down"], heads="head", seed=0)
    tx = clora.protect(optax.sgd(0.05, momentum=0.9), energy=0.5)

    @jax.jit
    def step(adapters: Any, state: Any, base: Any, batch: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(adapters, base, batch), state, adapters)
        return optax.apply_updates(adapters, updates), state

    history, texts = None, {}
    for _ in range(2):
        adapters = clora.begin_task(adapters)
        state = tx.init(adapters)
        texts["step"] = step.lower(adapters, state, base, batch).compile().as_text()
        for _ in range(3):
            adapters, state = step(adapters, state, base, batch)
        sums = jax.jit(lambda a, b, x: clora.second_moments(forward, a, b, x))
        texts["observe"] = sums.lower(adapters, base, batch).compile().as_text()
        observed = clora.observe(forward, adapters, base, [batch])
        adapters, history = clora.end_task(adapters, observed, history=history)
    return adapters, texts


def shapes_of(text: str, operation: str) -> list[str]:
    """Of the results of a collective operation in a compiled program, which may be tuples."""
    lines = re.findall(rf"= (\(.*?\)|\S+) {operation}(?:-start)?\(", text)
    return [shape for line in lines for shape in re.findall(r"\[[\d,]*\]", line)]


def whole_kernels(text: str, operation: str) -> list[str]:
    return [shape for shape in shapes_of(text, operation) if shape in (f"[{D},{HIDDEN}]", f"[{HIDDEN},{D}]")]


def by_shard_map(base: Any, batch: Any, adapters: Any) -> Any:
    """Second moments of shards of a batch, which shard_map adds."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def share(adapters: Any, base: Any, batch: Any) -> Any:
        return clora.second_moments(forward, adapters, base, batch)

    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P()}
    return jax.jit(jax.shard_map(share, mesh=mesh, **specs))(adapters, base, batch)


def gradients_by_shard_map(base: Any, batch: Any, adapters: Any) -> float:
    """Gradients of a sharded batch's mean loss, replicated adapters: how far from those of the whole batch."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def share(adapters: Any, base: Any, batch: Any) -> Any:
        return jax.grad(lambda a: jax.lax.pmean(loss(a, base, batch), "data"))(adapters)

    shared = jax.jit(jax.shard_map(share, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P()))
    pairs = zip(
        jax.tree.leaves(jax.grad(loss)(adapters, base, batch)),
        jax.tree.leaves(shared(adapters, base, batch)),
        strict=True,
    )
    return max(float(np.max(np.abs(np.asarray(a) - np.asarray(b))) / (np.max(np.abs(a)) + 1e-3)) for a, b in pairs)


def main() -> None:
    rng = np.random.default_rng(1)
    batch = (rng.standard_normal((ROWS, D)).astype(np.float32), rng.integers(0, CLASSES, ROWS))
    alone, _ = life(jax.tree.map(jnp.asarray, params()), batch)
    out: dict[str, Any] = {}
    for name, (data, tensor) in {"data": (8, 1), "tensor": (1, 8), "both": (4, 2)}.items():
        mesh = jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        specs = {"up": P(None, "tensor"), "down": P("tensor", None), "head": P()}
        base = {n: {"kernel": jax.device_put(p["kernel"], NamedSharding(mesh, specs[n]))} for n, p in params().items()}
        there = tuple(jax.device_put(a, NamedSharding(mesh, P("data"))) for a in batch)
        adapters, texts = life(base, there)
        worst = 0.0
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(adapters), strict=True):
            worst = max(worst, float(np.max(np.abs(np.asarray(a) - np.asarray(b)) / (np.max(np.abs(a)) + 1e-6))))
        program, whole = "\n".join(texts.values()), NamedSharding(mesh, P())
        gather = jax.jit(lambda p, whole=whole: jax.lax.with_sharding_constraint(p["up"]["kernel"], whole) * 2)
        out[name] = {
            "worst": worst,
            "devices": len(adapters["up"].adapter.A.sharding.device_set),
            "A of up": str(adapters["up"].adapter.A.sharding.spec),
            "B of down": str(adapters["down"].adapter.B.sharding.spec),
            "spare A of up": str(adapters["up"].spare[0].sharding.spec),
            "whole kernels gathered": whole_kernels(program, "all-gather"),
            "gathered where it should be": whole_kernels(gather.lower(base).compile().as_text(), "all-gather"),
            "reduced": shapes_of(program, "all-reduce"),
        }
    whole = clora.second_moments(forward, alone, params(), batch)
    shared = by_shard_map(params(), batch, jax.tree.map(np.asarray, alone))
    pairs = zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (whole, shared)), strict=True)
    out["shard_map"] = max(float(np.max(np.abs(a - b)) / np.max(np.abs(a))) for a, b in pairs)
    out["gradients in shard_map"] = gradients_by_shard_map(params(), batch, jax.tree.map(np.asarray, alone))
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
