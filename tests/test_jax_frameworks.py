"""Folders between NumPy, PyTorch and JAX, and ten steps from the same start: the same function, the same numbers."""

from typing import Any

import kit
import numpy as np
import pytest

import clora_core as core
import clora_numpy
import clora_store as store
from clora_core.errors import FormatError, OptionError, ShapeError

if kit.jax is None or kit.torch is None:
    pytest.skip(kit.NO_FRAMEWORK, allow_module_level=True)
import jax
import jax.numpy as jnp
import optax
import torch
from folders import same
from test_store_frameworks import CLASSES, D_IN, HIDDEN, base, bound, data, numpy_network, torch_model

import clora_jax
import clora_torch
from clora_jax import _store as jax_store
from clora_numpy import folders as numpy_folders
from clora_torch import _store as torch_store

NAMES = ("0", "2", "4")


def jax_params(dtype: Any = np.float32) -> Any:
    """The network of test_store_frameworks as a pytree, kernels (in, out)."""
    W, V, H = (array.astype(dtype) for array in base())
    kernels = {"0": W.T, "2": V.T, "4": H.T}
    return {name: {"kernel": jnp.asarray(kernel)} for name, kernel in kernels.items()} | {
        "4": {"kernel": jnp.asarray(H.T), "bias": jnp.zeros(CLASSES, dtype)}
    }


def jax_model(params: Any, x: Any) -> Any:
    x = jax.nn.relu(x @ params["0"]["kernel"])
    x = jax.nn.relu(x @ params["2"]["kernel"])
    return x @ params["4"]["kernel"] + params["4"]["bias"]


def forward(adapters: Any, params: Any, batch: Any) -> Any:
    return jax_model(clora_jax.bind(params, adapters), batch[0])


def loss(adapters: Any, params: Any, batch: Any, penalty: float = 0.0) -> Any:
    value = optax.softmax_cross_entropy_with_integer_labels(forward(adapters, params, batch), batch[1]).mean()
    return value + clora_jax.penalty(adapters, penalty) if penalty else value


def jax_life(factors: str, tasks: int = 2, **options: Any) -> Any:
    params = jax_params()
    how = {"rank": 4, "targets": ["0", "2"], "heads": "4", "factors": factors, "seed": 0, **options}
    adapters, history = clora_jax.attach(params, **how), clora_jax.History()
    for task in range(tasks):
        adapters, history = jax_task(adapters, params, history, task)
    return params, adapters, history


def jax_task(adapters: Any, params: Any, history: Any, task: int) -> Any:
    moving = adapters["0"].info.factors == "every-task"
    tx = optax.sgd(0.05, momentum=0.5)
    tx = clora_jax.learning(tx) if moving else clora_jax.protect(tx, energy=0.6)
    batch = tuple(map(jnp.asarray, data(task)))
    adapters = clora_jax.begin_task(adapters)
    state = tx.init(adapters)
    for _ in range(4):
        updates, state = tx.update(jax.grad(loss)(adapters, params, batch), state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    observed = None if moving else clora_jax.observe(forward, adapters, params, [batch])
    return clora_jax.end_task(adapters, observed, history=history, name=f"task-{task}")


def outputs(kind: str, model: Any, x: Any) -> Any:
    if kind == "numpy":
        return model.forward(x)
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize("factors", ["first-task", "every-task", "never"])
@pytest.mark.parametrize("other", ["numpy", "torch"])
def test_what_jax_saves_loads_elsewhere(tmp_path: Any, other: str, factors: str) -> None:
    params, adapters, history = jax_life(factors)
    clora_jax.save(tmp_path, adapters, history)
    state = store.load(tmp_path)
    model = numpy_network() if other == "numpy" else torch_model()
    loaded = {"numpy": clora_numpy, "torch": clora_torch}[other].load(model, tmp_path)
    assert tuple(loaded.tasks) == history.tasks == ("task-0", "task-1")
    x, _ = data(9)
    for task in history.tasks:
        loaded.restore(task)
        mine = np.asarray(forward(clora_jax.restore(adapters, history, task), params, (x,)))
        assert np.all(np.abs(mine - outputs(other, model, x)) <= 2 * bound(state, x, task))
    if factors != "every-task":
        for name, value in loaded.drift().items():
            wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (adapters[name].adapter, adapters[name].used()))
            assert abs(value - clora_jax.drift(adapters)[name]) <= 2 * float(core.bounds.drift(*wide))


@pytest.mark.parametrize("factors", ["first-task", "every-task", "never"])
@pytest.mark.parametrize("other", ["numpy", "torch"])
def test_what_others_save_loads_in_jax(tmp_path: Any, other: str, factors: str) -> None:
    """And goes on: another task, saved again into the same folder."""
    from test_store_frameworks import STEPS, fresh

    moving = factors == "every-task"
    model, adapter = fresh(other, factors=factors)
    for task in range(2):
        with adapter.task(f"task-{task}"):
            STEPS[other](model, adapter, task, observe=not moving, protect=not moving)
    adapter.save(tmp_path)
    state, params = store.load(tmp_path), jax_params()
    adapters, history = clora_jax.load(tmp_path, params)
    assert history.tasks == ("task-0", "task-1")
    assert {layer.info.started for layer in adapters.values()} == {True}
    x, _ = data(9)
    for task in history.tasks:
        adapter.restore(task)
        mine = np.asarray(forward(clora_jax.restore(adapters, history, task), params, (x,)))
        assert np.all(np.abs(mine - outputs(other, model, x)) <= 2 * bound(state, x, task))
    again = jax_store.to_state(adapters, history)
    for name, layer in state.layers.items():
        for field, array in layer.adapter._asdict().items():
            mine = getattr(again.layers[name].adapter, field)
            assert (mine is None and array is None) or np.array_equal(mine, array), (name, field)
    assert again.factors == state.factors
    adapters, history = jax_task(adapters, params, history, 2)
    history = clora_jax.save(tmp_path, adapters, history)
    assert store.load(tmp_path).tasks == ("task-0", "task-1", "task-2")
    clora_jax.save(tmp_path, adapters, history)


@pytest.mark.parametrize("factors", ["first-task", "every-task", "never"])
def test_a_folder_of_jax_comes_back_to_the_bit(tmp_path: Any, factors: str) -> None:
    options = {} if factors == "every-task" else {"max_rank": 6}
    params, adapters, history = jax_life(factors, **options)
    saved = clora_jax.save(tmp_path, adapters, history)
    loaded, past = clora_jax.load(tmp_path, params)
    same(jax_store.to_state(loaded, past), jax_store.to_state(adapters, history))
    assert jax.tree.structure(loaded["0"]) == jax.tree.structure(adapters["0"])
    assert past.digest == saved.digest
    if factors != "every-task":
        assert clora_jax.drift(loaded) == clora_jax.drift(adapters)
    exported = clora_jax.export_peft(tmp_path / "peft", adapters, history, task="task-0", heads=False)
    assert exported.rank == 4


def test_an_open_task_goes_on(tmp_path: Any) -> None:
    """Saved by torch in the middle of its second task; JAX ends it under its name."""
    from test_store_frameworks import fresh, torch_steps

    model, adapter = fresh("torch", factors="first-task")
    with adapter.task("task-0"):
        torch_steps(model, adapter, 0, protect=False)
    adapter.begin_task("half")
    torch_steps(model, adapter, 1, observe=False)
    adapter.save(tmp_path)
    params = jax_params()
    adapters, history = clora_jax.load(tmp_path, params)
    assert history.open == "half"
    assert np.any(adapters["0"].adapter.R_delta)
    state = store.load(tmp_path)
    same(
        jax_store.to_state(adapters, history)._replace(options={}, provenance={}),
        state._replace(options={}, provenance={}, layers=jax_store.to_state(adapters, history).layers),
    )
    x, _ = data(9)
    mine = np.asarray(forward(adapters, params, (x,)))
    assert np.all(np.abs(mine - outputs("torch", model, x)) <= 2 * bound(state, x))
    observed = clora_jax.observe(forward, adapters, params, [(x,)])
    adapters, history = clora_jax.end_task(adapters, observed, history=history)
    assert (history.tasks, history.open) == (("task-0", "half"), None)


def test_a_folder_without_snapshots_keeps_its_tasks(tmp_path: Any) -> None:
    """Names alone are known of them; what is saved again still has them."""
    params, adapters, history = jax_life("never")
    state = jax_store.to_state(adapters, history)._replace(snapshots={})
    loaded, past = clora_jax.load(state, params)
    assert past.tasks == ("task-0", "task-1")
    loaded, past = jax_task(loaded, params, past, 2)
    clora_jax.save(tmp_path, loaded, past)
    assert store.load(tmp_path).tasks == ("task-0", "task-1", "task-2")
    assert list(store.load(tmp_path).snapshots) == ["task-2"]


def test_a_head_is_exported_and_merged_in_its_own_layout(tmp_path: Any) -> None:
    """flax's (in, out) classifier: PEFT's folder has it (out, in), a merged checkpoint (in, out)."""
    from safetensors.numpy import load_file, save_file

    params, adapters, history = jax_life("never")
    flat = {f"{n}.{k}": np.asarray(a) for n, leaves in params.items() for k, a in leaves.items()}
    save_file({k: np.ascontiguousarray(a) for k, a in flat.items()}, tmp_path / "base.safetensors")
    store.merge_checkpoint(tmp_path / "base.safetensors", jax_store.to_state(adapters, history), tmp_path / "out")
    got = load_file(tmp_path / "out" / "base.safetensors")
    merged = clora_jax.merge(params, adapters).params
    V = np.asarray(core.routing(adapters["4"].adapter, xp=jnp))
    assert np.array_equal(got["4.kernel"], V[:, :-1].T)
    assert np.array_equal(got["4.kernel"], merged["4"]["kernel"])
    assert np.array_equal(got["4.bias"], V[:, -1])
    for name in ("0", "2"):
        narrow = core.Adapter(*(np.asarray(a) for a in adapters[name].adapter))
        limit = 2 * core.bounds.merge(flat[f"{name}.kernel"].T, narrow, dtype="float32")
        assert np.all(np.abs(got[f"{name}.kernel"] - np.asarray(merged[name]["kernel"])) <= limit.T)
    clora_jax.export_peft(tmp_path / "peft", adapters, history)
    peft = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert np.array_equal(peft["base_model.model.4.weight"], V[:, :-1])
    assert np.array_equal(peft["base_model.model.4.bias"], V[:, -1])


def test_ten_steps_from_the_same_start_agree() -> None:
    """SGD with momentum, float64, two tasks with penalty: NumPy, torch and JAX within 1e-12 of the largest entry."""
    with jax.enable_x64(True):
        how: dict[str, Any] = {"rank": 4, "targets": ["0", "2"]}
        network, model, params = numpy_network(np.float64), torch_model(torch.float64), jax_params(np.float64)
        one = clora_numpy.attach(network, rng=0, **how)
        two = clora_torch.attach(model, heads="4", seed=0, **how)
        three, history = clora_jax.attach(params, heads="4", seed=0, **how), None
        rule = clora_numpy.Optimizer(one, clora_numpy.sgd(0.05, momentum=0.5))
        sgd = torch.optim.SGD(two.parameters(), lr=0.05, momentum=0.5)
        tx = clora_jax.learning(optax.sgd(0.05, momentum=0.5))
        for task in range(2):
            x, labels = data(task)
            x = x.astype(np.float64)
            batch = (jnp.asarray(x), jnp.asarray(labels))
            three = clora_jax.begin_task(three)
            state = tx.init(three)
            with one.task(str(task)), two.task(str(task)):
                for _ in range(10):
                    _, grad = clora_numpy.cross_entropy(network.forward(x), labels)
                    network.backward(grad)
                    one.penalty(0.1)
                    rule.step()
                    value = torch.nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(labels))
                    (value + two.penalty(0.1)).backward()
                    sgd.step()
                    sgd.zero_grad()
                    updates, state = tx.update(jax.grad(loss)(three, params, batch, 0.1), state, three)
                    three = optax.apply_updates(three, updates)
                one.observe([x])
                two.observe([torch.from_numpy(x)])
            observed = clora_jax.observe(forward, three, params, [batch])
            three, history = clora_jax.end_task(three, observed, history=history, name=str(task))
        states = [numpy_folders.to_state(one), torch_store.to_state(two), jax_store.to_state(three, history)]
        compared = 0
        for name in NAMES:
            fields = [{**s.layers[name].adapter._asdict(), **s.layers[name].moments._asdict()} for s in states]
            for field, array in fields[0].items():
                if array is None:
                    continue
                for other in (fields[1][field], fields[2][field]):
                    assert other.dtype == np.float64
                    assert np.max(np.abs(other - array)) <= 1e-12 * np.max(np.abs(array)), (name, field)
                    compared += bool(np.any(array))
        assert compared > 20
        assert np.any(states[0].layers["0"].adapter.R_old)


def test_folders_that_do_not_fit_are_refused(tmp_path: Any) -> None:
    params, adapters, history = jax_life("never", tasks=1)
    clora_jax.save(tmp_path, adapters, history)
    with pytest.raises(OptionError, match=r"no weight for layer '0'.*near: .*'deep\.0'"):
        clora_jax.load(tmp_path, {"deep": params})
    renamed, _ = clora_jax.load(tmp_path, {"deep": params}, names={n: f"deep.{n}" for n in NAMES})
    assert set(renamed) == {f"deep.{n}" for n in NAMES}
    with pytest.raises(ShapeError, match=r"d_out, d_in.*another model"):
        clora_jax.load(tmp_path, {**params, "0": {"kernel": jnp.ones((3, 5))}})
    with pytest.raises(ShapeError, match="read as 'out,in'"):
        clora_jax.load(tmp_path, params, layout="out,in")
    with pytest.raises(ShapeError, match="a bias in one of the two only"):
        clora_jax.load(tmp_path, {**params, "4": {"kernel": params["4"]["kernel"]}})
    state = store.load(tmp_path)
    conv = state.layers["0"]._replace(kind="conv", target=store.Target("0.weight", (HIDDEN, D_IN, 1)))
    with pytest.raises(OptionError, match="of a kind that is not adapted here"):
        clora_jax.load(state._replace(layers={**state.layers, "0": conv}, digest=None), params)
    (tmp_path / "clora.json").write_text("{")
    with pytest.raises(FormatError):
        clora_jax.load(tmp_path, params)
