"""C-LoRA inside nnx and equinox modules: layers exchanged, the function unchanged, the verbs on the whole model."""

import subprocess
import sys
from typing import Any

import kit
import numpy as np
import pytest

import clora_core as core
from clora_core.errors import OptionError, RankError, StateError

if kit.jax is None:
    pytest.skip(kit.NO_JAX, allow_module_level=True)
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import clora_jax as clora
import clora_jax.equinox as clora_eqx
import clora_jax.nnx as clora_nnx

ADAM = optax.adamw(1e-2, weight_decay=0.1)
X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 5, 8)), jnp.float32)
LABELS = jnp.asarray(np.random.default_rng(1).integers(0, 3, 6))


class Block(nnx.Module):
    """Attention, a layer, and a classifier over the mean."""

    def __init__(self, rngs: nnx.Rngs, **options: Any) -> None:
        how = {"num_heads": 2, "in_features": 8, "qkv_features": 12, "out_features": 8, "decode": False}
        self.attention = nnx.MultiHeadAttention(**how, rngs=rngs, **options)
        self.up = nnx.Linear(8, 16, rngs=rngs, **options)
        self.head = nnx.Linear(16, 3, rngs=rngs, **options)

    def __call__(self, x: Any) -> Any:
        return self.head(jax.nn.relu(self.up(self.attention(x))).mean(axis=-2))


def near(a: Any, b: Any, roundings: int = 300) -> None:
    """Sums of at most that many roundings, of numbers of that size."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.all(np.abs(a - b) <= float(kit.gamma(roundings, "float32")) * (np.abs(b).max() + 1) * 16)


def ce(logits: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def test_nnx_exchange_changes_no_function_and_can_be_undone() -> None:
    model = Block(nnx.Rngs(0))
    kernels = jax.tree.leaves(nnx.state(model, nnx.Param))
    y, layer = model(X), model.attention.query
    adapters = clora_nnx.attach(model, rank=3, heads="head", targets="all-linear")
    assert set(adapters) == {"attention.query", "attention.key", "attention.value", "attention.out", "up", "head"}
    assert model.attention.query is layer
    near(model(X), y)
    assert all(a is b for a, b in zip(kernels, jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True))
    assert adapters["attention.out"].adapter.B.shape == (3, 12)
    assert set(clora_nnx.adapters(model)) == set(adapters)
    with pytest.raises(StateError, match="has an adapter already"):
        clora_nnx.attach(model, rank=3)
    clora_nnx.detach(model)
    assert type(model.up) is nnx.Linear
    assert np.array_equal(model(X), y)


def test_nnx_projections_are_matrices() -> None:
    """Attention with adapters equals attention whose kernels have A R B added, query and output projections alike."""
    model = Block(nnx.Rngs(0))
    plain = Block(nnx.Rngs(0))
    adapters = clora_nnx.attach(model, rank=3, targets=["attention.*", "up"])
    rng = np.random.default_rng(0)
    adapters = clora.map_layers(
        lambda layer: clora.Layer(
            layer.adapter._replace(R_delta=jnp.asarray(rng.standard_normal((3, 3)), jnp.float32)),
            layer.moments,
            layer.spare,
            layer.info,
        ),
        adapters,
    )
    clora_nnx.update(model, adapters)
    for name, layer in adapters.items():
        module: Any = plain
        for part in name.split("."):
            module = getattr(module, part)
        dW = np.asarray(core.delta(layer.adapter, xp=jnp)).T.reshape(module.kernel.shape)
        module.kernel.set_value(module.kernel.get_value() + dW)
    near(model(X), plain(X))


def test_nnx_trains_by_optimizer_and_by_pure_functions_alike() -> None:
    """nnx.Optimizer over the model's Variables, and loss(adapters, state, batch): the same numbers after five steps."""
    model = Block(nnx.Rngs(0))
    start = clora_nnx.attach(model, rank=3, targets=["query", "up"], heads="head")
    graphdef, state = nnx.split(model)
    tx = clora.protect(ADAM)

    def loss(adapters: Any, state: Any, x: Any) -> Any:
        return ce(clora_nnx.bind(graphdef, state, adapters)(x))

    @jax.jit
    def pure(adapters: Any, opt: Any, state: Any) -> Any:
        updates, opt = tx.update(jax.grad(loss)(adapters, state, X), opt, adapters)
        return optax.apply_updates(adapters, updates), opt

    adapters, opt = start, tx.init(start)
    optimizer = nnx.Optimizer(model, tx, wrt=clora_nnx.CLoRAVariable)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        grads = nnx.grad(lambda m: ce(m(X)), argnums=nnx.DiffState(0, clora_nnx.CLoRAVariable))(model)
        optimizer.update(model, grads)

    for _ in range(5):
        adapters, opt = pure(adapters, opt, state)
        step(model, optimizer)
    after = clora_nnx.adapters(model)
    for name, layer in clora.layers(adapters).items():
        for a, b in zip(layer.adapter, after[name].adapter, strict=True):
            # Adam divides by a root of squares: what differs by rounding may differ by a share of a step, five times.
            assert a is None or np.all(np.abs(a - b) <= 1e-2 * 0.05), name
        assert not np.array_equal(layer.adapter.R_delta, start[name].adapter.R_delta)
        assert np.array_equal(layer.adapter.R_old, start[name].adapter.R_old)
    fresh, now = (jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (Block(nnx.Rngs(0)), model))
    assert all(np.array_equal(a, b) for a, b in zip(fresh, now, strict=True))


def test_nnx_task_life_and_observing() -> None:
    """Two tasks on a model: second moments by hand of what the layer was given; saved, loaded, restored."""
    model = Block(nnx.Rngs(0))
    adapters = clora_nnx.attach(model, rank=3, targets=["up"], heads="head", factors="never")
    graphdef, state = nnx.split(model)

    def forward(adapters: Any, state: Any, x: Any) -> Any:
        return clora_nnx.bind(graphdef, state, adapters)(x)

    C = clora.observe(forward, adapters, state, [X, X])
    u = np.asarray(model.attention(X), np.float64).reshape(-1, 8) @ np.asarray(adapters["up"].adapter.B, np.float64).T
    near(C["up"], u.T @ u / len(u), 4000)
    hidden = np.asarray(jax.nn.relu(model.up(model.attention(X))).mean(axis=1), np.float64)
    v = np.hstack([hidden, np.ones((6, 1))])
    near(C["head"], v.T @ v / 6, 4000)
    adapters, _ = clora.end_task(clora.begin_task(adapters), C)
    clora_nnx.update(model, adapters)
    assert clora_nnx.adapters(model)["up"].info.started
    near(model(X), forward(adapters, state, X))


def test_nnx_layer_of_its_own() -> None:
    """CLoRALinear in the place of nnx.Linear: options, reproducible, float32 adapters beside a bfloat16 kernel."""
    layer = clora_nnx.CLoRALinear(8, 5, rank=2, rngs=nnx.Rngs(3), adapter={"factors": "never", "seed": 4})
    plain = nnx.Linear(8, 5, rngs=nnx.Rngs(3))
    near(layer(X), plain(X))
    assert layer.clora.get_value().learns == ("R_delta",)
    half = clora_nnx.CLoRALinear(8, 5, rank=2, rngs=nnx.Rngs(3), param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    assert half(X).dtype == jnp.bfloat16
    assert half.clora.get_value().adapter.A.dtype == jnp.float32
    with pytest.raises(RankError, match="rank=6"):
        clora_nnx.CLoRALinear(8, 5, rank=6, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="factor"):
        clora_nnx.CLoRALinear(8, 5, rank=2, rngs=nnx.Rngs(0), adapter={"factor": "never"})
    with pytest.raises(OptionError, match="unknown factors mode"):
        clora_nnx.CLoRALinear(8, 5, rank=2, rngs=nnx.Rngs(0), adapter={"factors": "ever"})


def own_dot(*args: Any, **options: Any) -> Any:
    return jax.lax.dot_general(*args, **options)


class Own(nnx.Linear):
    def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
        return super().__call__(inputs) * 2


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: Own(8, 8, rngs=nnx.Rngs(0)), "an? Own"),
        (
            lambda: nnx.Linear(8, 8, rngs=nnx.Rngs(0), dot_general=own_dot),
            "dot_general",
        ),
        (lambda: nnx.Linear(8, 8, rngs=nnx.Rngs(0), preferred_element_type=jnp.float32), "preferred_element_type"),
        (lambda: nnx.LinearGeneral(8, 8, axis=0, rngs=nnx.Rngs(0)), "other axes"),
        (lambda: nnx.LinearGeneral((2, 4), 8, axis=(-1, -2), rngs=nnx.Rngs(0)), "other axes"),
        (lambda: nnx.LinearGeneral(8, 8, batch_axis={0: 3}, rngs=nnx.Rngs(0)), "batch axes"),
    ],
)
def test_nnx_layers_that_are_refused(layer: Any, reason: str) -> None:
    model = Block(nnx.Rngs(0))
    model.up = layer()
    with pytest.raises(OptionError, match=f"'up' can't be adapted.*{reason}"):
        clora_nnx.attach(model, rank=2)
    assert type(model.attention.query) is nnx.LinearGeneral, "nothing was exchanged"
    with pytest.raises(OptionError, match=r"targets matches no weight.*near: .*'up"):
        clora_nnx.attach(model, rank=2, targets="upp")


class Net(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    layers: list[eqx.nn.Linear]

    def __init__(self, key: Any) -> None:
        keys = jax.random.split(key, 3)
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[0])
        self.layers = [eqx.nn.Linear(8, 16, key=keys[1]), eqx.nn.Linear(16, 3, key=keys[2])]

    def __call__(self, x: Any) -> Any:
        x = self.attention(x, x, x)
        return self.layers[1](jax.nn.relu(jax.vmap(self.layers[0])(x)).mean(axis=0))


def test_equinox_exchange_and_bind_agree() -> None:
    """Modules exchanged, or weights bound in the untouched module: the same function and gradients; and undone."""
    model = Net(jax.random.key(0))
    y = jax.vmap(model)(X)
    adapted = clora_eqx.attach(model, rank=3, heads="layers.1")
    adapters = clora.layers(adapted)
    assert {"attention.query_proj", "layers.0", "layers.1"} < set(adapters)
    near(jax.vmap(adapted)(X), y)
    grads = eqx.filter_grad(lambda m: ce(jax.vmap(m)(X)))(adapted)
    bound = jax.grad(lambda a: ce(jax.vmap(clora.bind(model, a))(X)))(adapters)
    for name, layer in clora.layers(grads).items():
        for a, b in zip(layer.adapter, bound[name].adapter, strict=True):
            assert a is None or near(a, b) is None
    assert not np.any(grads.layers[0].linear.weight), "the base has no gradient"
    assert eqx.tree_equal(clora_eqx.detach(adapted), model)


def test_equinox_model_lives_through_tasks() -> None:
    """The model itself is the tree of adapters: optimizer, boundary, memory, saving."""
    model = clora_eqx.attach(Net(jax.random.key(0)), rank=3, heads="layers.1", factors="never")
    base = clora_eqx.detach(model)
    tx, history = clora.protect(ADAM, energy=0.5), clora.History()

    def forward(model: Any, _: Any, x: Any) -> Any:
        return jax.vmap(model)(x)

    @eqx.filter_jit
    def step(model: Any, state: Any) -> Any:
        grads = eqx.filter_grad(lambda m: ce(jax.vmap(m)(X)) + clora.penalty(m, 0.1))(model)
        updates, state = tx.update(grads, state, model)
        return eqx.apply_updates(model, updates), state

    for task in range(2):
        model = clora.begin_task(model)
        state = tx.init(model)
        for _ in range(3):
            model, state = step(model, state)
        observed = clora.observe(forward, model, None, [X])
        model, history = clora.end_task(model, observed, history=history, name=str(task))
    assert eqx.tree_equal(clora_eqx.detach(model), base)
    assert max(clora.drift(model).values()) > 0.0
    near(jax.vmap(clora.restore(model, history, "1"))(X), jax.vmap(model)(X))
    with pytest.raises(OptionError, match="is no linear layer of equinox"):
        clora_eqx.put(base, {"x": clora.attach({"x": jnp.ones((3, 3))}, rank=1, targets="x")["x"]})


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("clora_jax", "optax", "jax"), ("clora_jax.nnx", "flax", "flax"), ("clora_jax.equinox", "equinox", "equinox")],
)
def test_a_package_that_is_not_installed_is_named(module: str, package: str, extra: str) -> None:
    """In a fresh interpreter that can't find it: what is missing, and the command that helps."""
    code = f"""
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else real(name, *rest)
import {module}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{package} not installed" in done.stderr
    assert f"python -m pip install 'clora[{extra}]'" in done.stderr


def test_importing_the_package_loads_neither_flax_nor_equinox() -> None:
    code = "import sys, clora_jax; print(sorted({'flax', 'equinox', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Scalar(eqx.Module):
    mlp: eqx.nn.MLP
    table: eqx.nn.Embedding
    shift: Any

    def __init__(self) -> None:
        self.mlp = eqx.nn.MLP(4, "scalar", 8, 1, key=jax.random.key(0))
        self.table = eqx.nn.Embedding(5, 4, key=jax.random.key(1))
        self.shift = jnp.ones(())

    def __call__(self, i: Any) -> Any:
        return self.mlp(self.table(i)) + self.shift


def test_equinox_scalars_embeddings_and_what_is_not_adapted() -> None:
    """Shapes stay, an embedding is left alone, and an optimizer moves nothing outside of the adapters."""
    model = Scalar()
    adapted = clora_eqx.attach(model, rank=1)
    assert set(clora.layers(adapted)) == {"mlp.layers.0", "mlp.layers.1"}
    ids = jnp.arange(5)
    assert jax.vmap(adapted)(ids).shape == jax.vmap(model)(ids).shape == (5,)
    near(jax.vmap(adapted)(ids), jax.vmap(model)(ids))
    grads = eqx.filter_grad(lambda m: jnp.sum(jax.vmap(m)(ids) ** 2))(adapted)
    assert float(grads.shift) != 0.0
    tx = clora.learning(ADAM)
    updates, _ = tx.update(grads, tx.init(adapted), adapted)
    assert float(updates.shift) == 0.0
    assert not np.any(updates.table.weight)
    assert np.any(updates.mlp.layers[0].clora.adapter.A)


class Loud(eqx.nn.Linear):
    def __call__(self, x: Any, *, key: Any = None) -> Any:
        return 10 * super().__call__(x)


def test_equinox_subclasses_are_not_exchanged() -> None:
    with pytest.raises(OptionError, match="is no linear layer of equinox"):
        clora_eqx.attach({"l": Loud(4, 4, key=jax.random.key(0))}, rank=2, targets="l")


def test_nnx_layers_built_by_hand_go_by_their_place() -> None:
    """Two of one model learn apart; one that is not named yet is told by what names it."""

    class Two(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.a = clora_nnx.CLoRALinear(6, 6, rank=2, rngs=rngs)
            self.b = clora_nnx.CLoRALinear(6, 6, rank=2, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.b(jnp.tanh(self.a(x)))

    model, x = Two(nnx.Rngs(0)), X[..., :6]
    assert list(clora_nnx.adapters(model)) == ["a", "b"]
    assert not np.array_equal(model.a.clora.get_value().adapter.A, model.b.clora.get_value().adapter.A)
    optimizer = nnx.Optimizer(model, clora.learning(optax.sgd(1.0)), wrt=clora_nnx.CLoRAVariable)
    before = clora_nnx.adapters(model)
    grads = nnx.grad(lambda m: jnp.sum(m(x) ** 2), argnums=nnx.DiffState(0, clora_nnx.CLoRAVariable))(model)
    wanted = {n: getattr(grads, n).clora.get_value().adapter.R_delta for n in ("a", "b")}
    optimizer.update(model, grads)
    for name, layer in clora_nnx.adapters(model).items():
        near(layer.adapter.R_delta, before[name].adapter.R_delta - wanted[name])
    graphdef, state = nnx.split(model)
    with pytest.raises(OptionError, match="no adapter for layer 'b'"):
        clora_nnx.bind(graphdef, state, {"a": before["a"]})


def test_nnx_models_with_dropout_and_statistics() -> None:
    """Observed and differentiated through bind, counters and all."""

    class Noisy(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.up = nnx.Linear(8, 4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.dropout(self.up(self.norm(x)))

    model = Noisy(nnx.Rngs(0))
    adapters = clora_nnx.attach(model, rank=2)
    graphdef, state = nnx.split(model)

    def forward(adapters: Any, state: Any, x: Any) -> Any:
        return clora_nnx.bind(graphdef, state, adapters)(x)

    assert np.all(np.isfinite(clora.observe(forward, adapters, state, [X])["up"]))
    grads = jax.grad(lambda a: jnp.sum(forward(a, state, X) ** 2))(adapters)
    assert np.any(grads["up"].adapter.R_delta)


def test_nnx_stacks_are_refused() -> None:
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> Any:
        return nnx.Linear(6, 6, rngs=rngs)

    class Stack(nnx.Module):
        def __init__(self) -> None:
            self.blocks = make(nnx.Rngs(0))

    with pytest.raises(OptionError, match="a stack of layers"):
        clora_nnx.attach(Stack(), rank=2)
