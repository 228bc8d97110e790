"""The task life in each framework, by the same verbs on the same small network: what a `Driver` must be able to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

import clora_numpy
import clora_store as store
from clora_core.errors import DTypeError, message
from clora_numpy import folders

from ._backends import Backend, backends, installed

LAYERS = ("a", "b", "head")


class Base(NamedTuple):
    """Frozen weights of the network y = head(b(a(x))), without anything between: every state is a polynomial of it.

    Attributes
    ----------
    a, b, head : (W (d_out, d_in), bias (d_out,))
    """

    a: tuple[np.ndarray, np.ndarray]
    b: tuple[np.ndarray, np.ndarray]
    head: tuple[np.ndarray, np.ndarray]


class Driver(Protocol):
    """A framework's adapter under test. Arrays come and go as NumPy; the state is `clora_store.State`."""

    name: str

    def attach(self, base: Base, *, rank: int, seed: int, **options: Any) -> None:
        """A fresh network with a new adapter on "a" and "b" and its head protected."""
        ...

    def load(self, base: Base, state: Any, *, lr: float = 0.0, energy: float | None = None) -> None:
        """A fresh network with the adapter of a state or folder, gradient descent, and protection if asked for."""
        ...

    def state(self) -> store.State:
        """All of it."""
        ...

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Outputs (n, classes)."""
        ...

    def begin_task(self, name: str) -> None:
        """The verb."""
        ...

    def step(self, x: np.ndarray, target: np.ndarray, weight: float | None) -> None:
        """One step of gradient descent on ||y - target||^2 / (2 n) + weight * penalty."""
        ...

    def observe(self, batches: Sequence[np.ndarray]) -> None:
        """The verb."""
        ...

    def end_task(self) -> None:
        """The verb."""
        ...

    def expand(self, by: int, seed: int) -> None:
        """The verb."""
        ...

    def drift(self) -> dict[str, float]:
        """The verb."""
        ...

    def restore(self, name: str) -> None:
        """The verb."""
        ...

    def merged(self, x: np.ndarray) -> np.ndarray:
        """Outputs while merged; unmerged again afterwards."""
        ...

    def save(self, folder: str) -> None:
        """The verb."""
        ...

    def export_peft(self, folder: str) -> None:
        """The verb."""
        ...

    def scope(self) -> Any:
        """A context manager around all of it."""
        ...


def drivers(*libraries: str) -> list[Driver]:
    """Those of the frameworks that are installed; the first is the master.

    clora_numpy on NumPy and on a second device of array-api-strict, clora_torch, clora_jax, clora_cupy.
    """
    wanted = libraries or ("numpy", "strict", "torch", "jax", "cupy")
    out: list[Driver] = []
    for library in wanted:
        if not installed(library):
            continue
        if library in ("numpy", "strict", "cupy"):
            names = {"numpy": "numpy", "strict": "strict, device 1", "cupy": "cupy"}
            backend = next(b for b in backends(library) if b.name == names[library])
            module: Any = clora_numpy
            if library == "cupy":
                import clora_cupy as module
            out.append(ArrayDriver(backend, module))
        elif library == "torch":
            import torch

            out += [TorchDriver("cpu"), *([TorchDriver("cuda")] if torch.cuda.is_available() else [])]
        else:
            out.append(JaxDriver())
    return out


class _Verbs:
    """The verbs of a ``self.adapter`` that has them all under their names."""

    adapter: Any

    def begin_task(self, name: str) -> None:
        """See `Driver`."""
        self.adapter.begin_task(name)

    def end_task(self) -> None:
        """See `Driver`."""
        self.adapter.end_task()

    def expand(self, by: int, seed: int) -> None:
        """See `Driver`."""
        self.adapter.expand(by, seed=seed)

    def drift(self) -> dict[str, float]:
        """See `Driver`."""
        return self.adapter.drift()

    def restore(self, name: str) -> None:
        """See `Driver`."""
        self.adapter.restore(name)

    def merged(self, x: np.ndarray) -> np.ndarray:
        """See `Driver`."""
        self.adapter.merge()
        y = self.forward(x)
        self.adapter.unmerge()
        return y

    def forward(self, x: np.ndarray) -> np.ndarray:
        """See `Driver`."""
        raise NotImplementedError

    def save(self, folder: str) -> None:
        """See `Driver`."""
        self.adapter.save(folder)

    def export_peft(self, folder: str) -> None:
        """See `Driver`."""
        self.adapter.export_peft(folder)


class ArrayDriver(_Verbs):
    """`clora_numpy` on any array library, or a package with its names.

    Parameters
    ----------
    backend : Backend
    module
        `clora_numpy`, or what stands in for it.
    """

    def __init__(self, backend: Backend, module: Any = clora_numpy) -> None:
        if "float64" not in backend.dtypes:
            raise DTypeError(
                message(
                    "clora.testing.ArrayDriver",
                    f"{backend.name} has no float64",
                    got=f"dtypes={backend.dtypes}",
                    needed="float64, in which lives keep and compare their memory",
                    cause="a device or library of single precision",
                    fix="use FunctionSuite alone",
                )
            )
        self.backend, self.module = backend, module
        self.name = f"{module.__name__} on {backend.name}"

    def scope(self) -> Any:
        """See `Driver`."""
        return self.backend.scope()

    def attach(self, base: Base, *, rank: int, seed: int, **options: Any) -> None:
        """See `Driver`."""
        self._start(base)
        adapter = self.module.attach(self.network, rank=rank, rng=seed, targets=("a", "b"), **options)
        self._use(adapter, 0.0, None)

    def load(self, base: Base, state: Any, *, lr: float = 0.0, energy: float | None = None) -> None:
        """See `Driver`."""
        self._start(base)
        self._use(self.module.load(self.network, state), lr, energy)

    def _start(self, base: Base) -> None:
        put, clora = self.backend.put, self.module
        a, b, head = ((put(W), put(bias)) for W, bias in base)
        self.network = clora.Network({"a": clora.Layer(*a), "b": clora.Layer(*b), "head": clora.Head(*head)})

    def _use(self, adapter: Any, lr: float, energy: float | None) -> None:
        self.adapter, self.optimizer = adapter, self.module.Optimizer(adapter, self.module.sgd(lr))
        if energy is not None:
            self.adapter.protect(self.optimizer, energy=energy)

    def state(self) -> store.State:
        """See `Driver`."""
        return folders.to_state(self.adapter)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """See `Driver`."""
        return self.backend.get(self.network.forward(self.backend.put(x)))

    def step(self, x: np.ndarray, target: np.ndarray, weight: float | None) -> None:
        """See `Driver`."""
        y = self.network.forward(self.backend.put(x))
        self.network.backward((y - self.backend.put(target)) / x.shape[0])
        if weight is not None:
            self.adapter.penalty(weight)
        self.optimizer.step()

    def observe(self, batches: Sequence[np.ndarray]) -> None:
        """See `Driver`."""
        self.adapter.observe([self.backend.put(x) for x in batches])


class TorchDriver(_Verbs):
    """`clora_torch` in an nn.Sequential."""

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.name = device, "clora_torch" + ("" if device == "cpu" else f" on {device}")

    def scope(self) -> Any:
        """See `Driver`."""
        from contextlib import nullcontext

        return nullcontext()

    def attach(self, base: Base, *, rank: int, seed: int, **options: Any) -> None:
        """See `Driver`."""
        import clora_torch

        self._start(base)
        adapter = clora_torch.attach(self.model, rank=rank, targets=["a", "b"], heads="head", seed=seed, **options)
        self._use(adapter, 0.0, None)

    def load(self, base: Base, state: Any, *, lr: float = 0.0, energy: float | None = None) -> None:
        """See `Driver`."""
        import clora_torch

        self._start(base)
        self._use(clora_torch.load(self.model, state), lr, energy)

    def _start(self, base: Base) -> None:
        from collections import OrderedDict

        import torch

        modules = OrderedDict()
        for name, (W, bias) in zip(LAYERS, base, strict=True):
            modules[name] = torch.nn.Linear(*W.shape[::-1], dtype=getattr(torch, W.dtype.name))
            modules[name].load_state_dict({"weight": torch.tensor(W), "bias": torch.tensor(bias)})
        self.model = torch.nn.Sequential(modules).to(self.device)

    def _use(self, adapter: Any, lr: float, energy: float | None) -> None:
        import torch

        self.adapter, self.optimizer = adapter, torch.optim.SGD(adapter.parameters(), lr=lr)
        if energy is not None:
            self.adapter.protect(self.optimizer, energy=energy)

    def _put(self, array: np.ndarray) -> Any:
        import torch

        return torch.tensor(array, device=self.device)

    def state(self) -> store.State:
        """See `Driver`."""
        from clora_torch._store import to_state

        return to_state(self.adapter)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """See `Driver`."""
        return self.model(self._put(x)).detach().cpu().numpy()

    def step(self, x: np.ndarray, target: np.ndarray, weight: float | None) -> None:
        """See `Driver`."""
        loss = ((self.model(self._put(x)) - self._put(target)) ** 2).sum() / (2 * x.shape[0])
        if weight is not None:
            loss = loss + self.adapter.penalty(weight)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def observe(self, batches: Sequence[np.ndarray]) -> None:
        """See `Driver`."""
        self.adapter.observe([self._put(x) for x in batches])

    def rows(self, x: np.ndarray, tasks: Sequence[str]) -> np.ndarray:
        """Row i by task i."""
        with self.adapter.rows(tasks):
            return self.forward(x)


class JaxDriver:
    """`clora_jax` over a dict of arrays, in 64 bits, jitted."""

    name = "clora_jax"

    def scope(self) -> Any:
        """See `Driver`."""
        return backends("jax")[0].scope()  # 64 bits

    def attach(self, base: Base, *, rank: int, seed: int, **options: Any) -> None:
        """See `Driver`."""
        self._params(base)
        self.adapters = self.clora.attach(
            self.params, rank=rank, targets=["a", "b"], heads="head", seed=seed, layout="out,in", **options
        )
        self.history, self.open, self.observed = self.clora.History(), None, None
        self.lr, self.energy, self.optimizer = 0.0, None, None

    def _params(self, base: Base) -> None:
        import jax.numpy as jnp

        import clora_jax

        self.clora = clora_jax
        self.params = {
            name: {"weight": jnp.asarray(W), "bias": jnp.asarray(bias)}
            for name, (W, bias) in zip(LAYERS, base, strict=True)
        }

    def load(self, base: Base, state: Any, *, lr: float = 0.0, energy: float | None = None) -> None:
        """See `Driver`."""
        import jax.numpy as jnp

        self._params(base)
        self.adapters, self.history = self.clora.load(state, self.params, layout="out,in")
        found = state if isinstance(state, store.State) else store.load(state)
        self.open = self.history.open
        self.observed: Any = None
        if all(layer.observed is not None for layer in found.layers.values()):
            self.observed = {name: jnp.asarray(layer.observed) for name, layer in found.layers.items()}
        self.lr, self.energy = lr, energy
        self.optimizer = None if energy is None or self.open is None else self._start()

    def _start(self) -> Any:
        return _jax_functions(self.lr, self.energy, None)[0].init(self.adapters)

    def state(self) -> store.State:
        """See `Driver`."""
        from clora_jax._store import to_state

        # With a task open, an earlier task's adapters are taken, too, which `save` refuses beside a later history.
        state = to_state(self.adapters, dataclasses.replace(self.history, open=self.open or "-"))
        state = state._replace(open=self.open)
        if self.observed is None:
            return state
        layers = {n: layer._replace(observed=np.asarray(self.observed[n])) for n, layer in state.layers.items()}
        return state._replace(layers=layers)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """See `Driver`."""
        return np.asarray(_jax_forward(self.adapters, self.params, x))

    def begin_task(self, name: str) -> None:
        """See `Driver`."""
        self.adapters, self.observed, self.open = self.clora.begin_task(self.adapters), None, name
        self.optimizer = self._start()

    def step(self, x: np.ndarray, target: np.ndarray, weight: float | None) -> None:
        """See `Driver`."""
        self.optimizer = self._start() if self.optimizer is None else self.optimizer
        update = _jax_functions(self.lr, self.energy, weight)[1]
        self.observed = None
        self.adapters, self.optimizer = update(self.adapters, self.optimizer, self.params, x, target)

    def observe(self, batches: Sequence[np.ndarray]) -> None:
        """See `Driver`."""
        self.observed = self.clora.observe(_jax_forward, self.adapters, self.params, batches)

    def end_task(self) -> None:
        """See `Driver`."""
        self.adapters, self.history = self.clora.end_task(
            self.adapters, self.observed, history=self.history, name=self.open
        )
        self.open = self.observed = None

    def expand(self, by: int, seed: int) -> None:
        """See `Driver`."""
        self.adapters = self.clora.expand(self.adapters, by, seed=seed)

    def drift(self) -> dict[str, float]:
        """See `Driver`."""
        return self.clora.drift(self.adapters)

    def restore(self, name: str) -> None:
        """See `Driver`."""
        self.adapters = self.clora.restore(self.adapters, self.history, name)

    def merged(self, x: np.ndarray) -> np.ndarray:
        """See `Driver`."""
        merged = self.clora.merge(self.params, self.adapters)
        W, bias = ([merged.params[name][part] for name in LAYERS] for part in ("weight", "bias"))
        for i in range(3):
            x = x @ W[i].T + bias[i]
        self.params = self.clora.unmerge(merged)
        return np.asarray(x)

    def save(self, folder: str) -> None:
        """See `Driver`."""
        self.history = self.clora.save(folder, self.adapters, dataclasses.replace(self.history, open=self.open))

    def export_peft(self, folder: str) -> None:
        """See `Driver`."""
        self.clora.export_peft(folder, self.adapters, self.history)

    def rows(self, x: np.ndarray, tasks: Sequence[str]) -> np.ndarray:
        """Row i by task i."""
        return np.asarray(_jax_forward(self.clora.rows(self.adapters, self.history, tasks), self.params, x))


def _jax_forward(adapters: Any, params: Any, x: Any) -> Any:
    import clora_jax

    bound = clora_jax.bind(params, adapters)
    for name in LAYERS:
        x = x @ bound[name]["weight"].T + bound[name]["bias"]
    return x


@lru_cache(maxsize=64)
def _jax_functions(lr: float, energy: float | None, weight: float | None) -> Any:
    """The transformation, and a step; cached, so that each is traced once a shape."""
    import jax
    import optax

    import clora_jax

    tx = clora_jax.learning(optax.sgd(lr)) if energy is None else clora_jax.protect(optax.sgd(lr), energy=energy)

    def loss(adapters: Any, params: Any, x: Any, target: Any) -> Any:
        value = ((_jax_forward(adapters, params, x) - target) ** 2).sum() / (2 * x.shape[0])
        return value if weight is None else value + clora_jax.penalty(adapters, weight)

    @jax.jit
    def update(adapters: Any, state: Any, params: Any, x: Any, target: Any) -> Any:
        gradients = jax.grad(loss)(adapters, params, x, target)
        updates, state = tx.update(gradients, state, adapters)
        return optax.apply_updates(adapters, updates), state

    return tx, update
