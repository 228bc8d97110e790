"""The demo's network on each backend: the same arrays to start from, one step, one look. The loop is in `methods`."""

from __future__ import annotations

import importlib
import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np

import clora_core as core
import clora_numpy
from clora_core.errors import MissingDependencyError, OptionError, message

from .suites import Backbone

CLASSES = 10
# clora_cupy itself says what it misses: the package has other names, and a device is needed, too.
PACKAGES = {"numpy": ("numpy",), "cupy": (), "torch": ("torch",), "jax": ("jax", "optax")}


class Trainer(Protocol):
    """What the loop needs of a backend."""

    def begin(self, steps: int) -> None:
        """A task comes: start the optimizer and its schedule afresh."""
        ...

    def task(self, name: str) -> AbstractContextManager[Any]:
        """The adapter's own `task`."""
        ...

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        """One step on a batch."""
        ...

    def observe(self, x: np.ndarray) -> None:
        """Take the task's second moments."""
        ...

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Logits."""
        ...

    def parameters(self) -> int:
        """How many numbers learn now."""
        ...

    def state_bytes(self) -> int:
        """Of adapter and memory."""
        ...

    def drift(self) -> dict[str, float]:
        """The forgetting meter."""
        ...

    def routings(self) -> dict[str, np.ndarray]:
        """R of every adapted layer."""
        ...


def trainer(backend: str, method: Any, backbone: Backbone, *, rank: int, seed: int) -> Trainer:
    """The backbone with adapters on both hidden layers and a shared head that starts at zero.

    Raises
    ------
    OptionError
        An unknown backend.
    MissingDependencyError
        Its library is not installed, or finds no device.
    """
    if backend not in PACKAGES:
        raise OptionError(
            message(
                "clora demo",
                "no such backend",
                got=repr(backend),
                needed="one of " + ", ".join(map(repr, PACKAGES)),
                cause="a backend of a later version, or a misspelt name",
                fix="--backend numpy",
            )
        )
    missing = [package for package in PACKAGES[backend] if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            message(
                "clora demo",
                f"{' and '.join(missing)} not installed",
                got=f"--backend {backend}",
                needed=", ".join(PACKAGES[backend]),
                cause="an install without the extra",
                fix=f"python -m pip install 'clora[{backend}]'",
            )
        )
    kinds = {"numpy": NumpyTrainer, "cupy": CupyTrainer, "torch": TorchTrainer, "jax": JaxTrainer}
    return kinds[backend](method, backbone, rank=rank, seed=seed)


def _start(method: Any) -> dict[str, Any]:
    names = ("factors", "scheme", "scale", "stop_old", "train_routing")
    return {name: getattr(method, name) for name in names}


class NumpyTrainer:
    """`clora_numpy`, or another package of its verbs."""

    def __init__(self, method: Any, backbone: Backbone, *, rank: int, seed: int, clora: Any = clora_numpy) -> None:
        self.method, self.clora, put = method, clora, self.put
        self.network = clora.Network(
            {
                "hidden-1": clora.Layer(put(backbone.W1), put(backbone.b1)),
                "relu-1": clora.Relu(),
                "hidden-2": clora.Layer(put(backbone.W2), put(backbone.b2)),
                "relu-2": clora.Relu(),
                "head": clora.Head(put(np.zeros((CLASSES, backbone.W2.shape[0]), backbone.W2.dtype))),
            }
        )
        rng = np.random.default_rng([seed, 2])
        self.adapter = clora.attach(self.network, rank=rank, rng=rng, **_start(method))
        self.task, self.state_bytes, self.drift = self.adapter.task, self.adapter.state_bytes, self.adapter.drift
        self.optimizer: Any = None

    def put(self, array: np.ndarray) -> Any:
        """An array of the library."""
        return array

    def get(self, array: Any) -> np.ndarray:
        """And back."""
        return array

    def begin(self, steps: int) -> None:
        """See `Trainer`."""
        method, clora = self.method, self.clora
        if self.optimizer is None:
            lr = clora.cosine(method.lr, steps)
            rule = clora.adam(lr) if method.optimizer == "adam" else clora.sgd(lr, momentum=0.9)
            self.optimizer = clora.Optimizer(self.adapter, rule)
            if method.energy is not None:
                self.adapter.protect(self.optimizer, energy=method.energy, head_energy=method.head_energy)
        self.optimizer.state = {}

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        """See `Trainer`."""
        logits = self.network.forward(self.put(x))
        _, grad = self.clora.cross_entropy(logits, self.put(y), smoothing=self.method.smoothing)
        self.network.backward(grad)
        if self.method.penalty is not None:
            self.adapter.penalty(self.method.weight, kind=self.method.penalty, head_weight=self.method.head_weight)
        self.optimizer.step()

    def observe(self, x: np.ndarray) -> None:
        """See `Trainer`."""
        self.adapter.observe([self.put(x)])

    def predict(self, x: np.ndarray) -> np.ndarray:
        """See `Trainer`."""
        return self.get(self.network.forward(self.put(x)))

    def parameters(self) -> int:
        """See `Trainer`."""
        return sum(array.size for array in self.adapter.parameters().values())

    def routings(self) -> dict[str, np.ndarray]:
        """See `Trainer`."""
        layers = self.adapter.layers.items()
        return {name: self.get(core.routing(layer.adapter)) for name, layer in layers if layer.adapter.A is not None}


class CupyTrainer(NumpyTrainer):
    """`clora_cupy`, on the current device."""

    def __init__(self, method: Any, backbone: Backbone, *, rank: int, seed: int) -> None:
        import clora_cupy  # before CuPy itself: it says what is missing

        self.cupy: Any = importlib.import_module("cupy")
        super().__init__(method, backbone, rank=rank, seed=seed, clora=clora_cupy)

    def put(self, array: np.ndarray) -> Any:
        """To the current device."""
        return self.cupy.asarray(array)

    def get(self, array: Any) -> np.ndarray:
        """To the host."""
        return array.get()


class TorchTrainer:
    """`clora_torch`, on the CPU."""

    def __init__(self, method: Any, backbone: Backbone, *, rank: int, seed: int) -> None:
        import torch

        import clora_torch

        self.torch, self.method = torch, method
        width, inputs = backbone.W1.shape
        self.network = torch.nn.Sequential(
            OrderedDict(
                [
                    ("hidden-1", torch.nn.Linear(inputs, width)),
                    ("relu-1", torch.nn.ReLU()),
                    ("hidden-2", torch.nn.Linear(width, width)),
                    ("relu-2", torch.nn.ReLU()),
                    ("head", torch.nn.Linear(width, CLASSES)),
                ]
            )
        )
        start = {"hidden-1.weight": backbone.W1, "hidden-1.bias": backbone.b1}
        start |= {"hidden-2.weight": backbone.W2, "hidden-2.bias": backbone.b2}
        start |= {"head.weight": np.zeros((CLASSES, width)), "head.bias": np.zeros(CLASSES)}
        self.network.to(torch.from_numpy(backbone.W1).dtype)
        self.network.load_state_dict({name: torch.from_numpy(array) for name, array in start.items()})
        rng = np.random.default_rng([seed, 2])
        self.adapter = clora_torch.attach(
            self.network, rank=rank, targets="hidden-*", heads="head", seed=rng, **_start(method)
        )
        self.task, self.state_bytes, self.drift = self.adapter.task, self.adapter.state_bytes, self.adapter.drift
        self.optimizer: Any = None
        self.lr: Callable[[int], float] = clora_numpy.cosine(method.lr, 1)
        self.count = 0

    def begin(self, steps: int) -> None:
        """See `Trainer`."""
        method, optim = self.method, self.torch.optim
        if self.optimizer is None:
            learning = self.adapter.parameters()
            if method.optimizer == "adam":
                self.optimizer = optim.Adam(learning, lr=method.lr)
            else:
                self.optimizer = optim.SGD(learning, lr=method.lr, momentum=0.9)
            if method.energy is not None:
                self.adapter.protect(self.optimizer, energy=method.energy, head_energy=method.head_energy)
        self.optimizer.state.clear()
        self.lr, self.count = clora_numpy.cosine(method.lr, steps), 0

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        """See `Trainer`."""
        from_numpy, method = self.torch.from_numpy, self.method
        loss = self.torch.nn.functional.cross_entropy(
            self.network(from_numpy(x)), from_numpy(y), label_smoothing=method.smoothing
        )
        if method.penalty is not None:
            loss = loss + self.adapter.penalty(method.weight, kind=method.penalty, head_weight=method.head_weight)
        loss.backward()
        self.optimizer.param_groups[0]["lr"] = self.lr(self.count)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1

    def observe(self, x: np.ndarray) -> None:
        """See `Trainer`."""
        self.adapter.observe([self.torch.from_numpy(x)])

    def predict(self, x: np.ndarray) -> np.ndarray:
        """See `Trainer`."""
        with self.torch.no_grad():
            return self.network(self.torch.from_numpy(x)).numpy()

    def parameters(self) -> int:
        """See `Trainer`."""
        return sum(parameter.numel() for parameter in self.adapter.parameters())

    def routings(self) -> dict[str, np.ndarray]:
        """See `Trainer`."""
        layers = self.adapter.layers.items()
        return {name: core.routing(part.adapter).detach().numpy() for name, part in layers if part.A is not None}


class JaxTrainer:
    """`clora_jax`, jitted."""

    def __init__(self, method: Any, backbone: Backbone, *, rank: int, seed: int) -> None:
        import jax
        import jax.numpy as jnp
        import optax

        import clora_jax

        self.jax, self.optax, self.clora, self.method = jax, optax, clora_jax, method
        width = backbone.W2.shape[0]
        layers = {"hidden-1": (backbone.W1, backbone.b1), "hidden-2": (backbone.W2, backbone.b2)}
        layers["head"] = (np.zeros((CLASSES, width), backbone.W2.dtype), np.zeros(CLASSES, backbone.W2.dtype))
        self.params = {n: {"weight": jnp.asarray(W), "bias": jnp.asarray(b)} for n, (W, b) in layers.items()}
        rng = np.random.default_rng([seed, 2])
        self.adapters: Any = clora_jax.attach(
            self.params, rank=rank, targets="hidden-*", heads="head", seed=rng, **_start(method)
        )
        self.history = clora_jax.History()
        self.observed: Any = None
        self.tx: Any = None
        self.steps = 0

        def forward(adapters: Any, params: Any, x: Any) -> Any:
            bound = clora_jax.bind(params, adapters)
            for name in ("hidden-1", "hidden-2"):
                x = jax.nn.relu(x @ bound[name]["weight"].T + bound[name]["bias"])
            return x @ bound["head"]["weight"].T + bound["head"]["bias"]

        def loss(adapters: Any, params: Any, x: Any, y: Any) -> Any:
            target = optax.smooth_labels(jax.nn.one_hot(y, CLASSES), method.smoothing)
            value = optax.softmax_cross_entropy(forward(adapters, params, x), target).mean()
            if method.penalty is None:
                return value
            how = {"kind": method.penalty, "head_weight": method.head_weight}
            return value + clora_jax.penalty(adapters, method.weight, **how)

        def update(tx: Any, adapters: Any, state: Any, params: Any, x: Any, y: Any) -> Any:
            updates, state = tx.update(jax.grad(loss)(adapters, params, x, y), state, adapters)
            return optax.apply_updates(adapters, updates), state

        self.forward, self.update, self.logits = forward, jax.jit(update, static_argnums=0), jax.jit(forward)

    def begin(self, steps: int) -> None:
        """See `Trainer`."""
        if steps == self.steps:  # a new transformation would be traced anew; `task` starts its state afresh
            return
        method, optax, self.steps = self.method, self.optax, steps
        lr = optax.cosine_decay_schedule(method.lr, steps)
        tx = optax.adam(lr) if method.optimizer == "adam" else optax.sgd(lr, momentum=0.9)
        if method.energy is None:
            self.tx = self.clora.learning(tx)
        else:
            self.tx = self.clora.protect(tx, energy=method.energy, head_energy=method.head_energy)

    @contextmanager
    def task(self, name: str) -> Iterator[None]:
        """See `Trainer`."""
        self.adapters, self.observed = self.clora.begin_task(self.adapters), None
        self.state = self.tx.init(self.adapters)
        yield
        self.adapters, self.history = self.clora.end_task(self.adapters, self.observed, history=self.history, name=name)

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        """See `Trainer`."""
        self.adapters, self.state = self.update(self.tx, self.adapters, self.state, self.params, x, y)

    def observe(self, x: np.ndarray) -> None:
        """See `Trainer`."""
        self.observed = self.clora.observe(self.forward, self.adapters, self.params, [x])

    def predict(self, x: np.ndarray) -> np.ndarray:
        """See `Trainer`."""
        return np.asarray(self.logits(self.adapters, self.params, x))

    def parameters(self) -> int:
        """See `Trainer`."""
        layers = self.clora.layers(self.adapters).values()
        return sum(getattr(layer.adapter, field).size for layer in layers for field in layer.learns)

    def state_bytes(self) -> int:
        """See `Trainer`."""
        layers = self.clora.layers(self.adapters).values()
        kept = [(layer.adapter._replace(R_delta=None), layer.moments) for layer in layers]
        return sum(array.nbytes for array in self.jax.tree.leaves(kept))

    def drift(self) -> dict[str, float]:
        """See `Trainer`."""
        return self.clora.drift(self.adapters)

    def routings(self) -> dict[str, np.ndarray]:
        """See `Trainer`."""
        layers = self.clora.layers(self.adapters).items()
        return {n: np.asarray(core.routing(layer.adapter)) for n, layer in layers if layer.adapter.A is not None}
