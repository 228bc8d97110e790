"""A small network that learns tasks in JAX: what the tests of clora_jax share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import clora_jax as clora


def params(seed: int = 0, dtype: Any = np.float32) -> Any:
    """Two layers in nested dicts, (in, out), and a classifier."""
    rng = np.random.default_rng(seed)

    def kernel(*shape: int) -> Any:
        return jnp.asarray((rng.standard_normal(shape) / shape[0] ** 0.5).astype(dtype))

    return {
        "encoder": [{"kernel": kernel(20, 32), "bias": kernel(32)}, {"kernel": kernel(32, 24), "bias": kernel(24)}],
        "head": {"kernel": kernel(24, 4), "bias": jnp.zeros(4, dtype)},
    }


def model(params: Any, x: Any) -> Any:
    for layer in params["encoder"]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def forward(adapters: Any, params: Any, batch: Any) -> Any:
    return model(clora.bind(params, adapters), batch[0])


def attach(tree: Any, **options: Any) -> Any:
    return clora.attach(tree, **{"rank": 8, "targets": "encoder.*", "heads": "head", "seed": 0, **options})


def data(task: int, batches: int = 4, rows: int = 24, dtype: Any = np.float32) -> list[Any]:
    """Inputs of a task live in five directions of their own, and a little in all."""
    rng = np.random.default_rng(100 + task)
    out = []
    for _ in range(batches):
        x = rng.standard_normal((rows, 20))
        x[:, 5 * (task % 4) : 5 * (task % 4) + 5] *= 10
        out.append((jnp.asarray((x / 10).astype(dtype)), jnp.asarray(rng.integers(0, 4, rows))))
    return out


class Run:
    """The loop a user writes: a jitted step, and how often it was traced."""

    def __init__(self, tx: Any, *, penalty: float = 0.0, forward: Any = forward) -> None:
        self.tx, self.traces, self.forward = tx, 0, forward

        def loss(adapters: Any, params: Any, batch: Any) -> Any:
            self.traces += 1
            logits = forward(adapters, params, batch)
            value = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
            return value + clora.penalty(adapters, penalty) if penalty else value

        @jax.jit
        def step(adapters: Any, state: Any, params: Any, batch: Any) -> Any:
            grads = jax.grad(loss)(adapters, params, batch)
            updates, state = self.tx.update(grads, state, adapters)
            return optax.apply_updates(adapters, updates), state

        self.step = step

    def learn(self, adapters: Any, params: Any, history: Any, task: int, *, epochs: int = 2, **how: Any) -> Any:
        batches = data(task, dtype=how.pop("dtype", np.float32))
        adapters = clora.begin_task(adapters)
        state = self.tx.init(adapters)
        for _ in range(epochs):
            for batch in batches:
                adapters, state = self.step(adapters, state, params, batch)
        observed = clora.observe(self.forward, adapters, params, batches) if how.pop("observe", True) else None
        return clora.end_task(adapters, observed, history=history, name=f"task-{task}")
