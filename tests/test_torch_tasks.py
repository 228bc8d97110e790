"""The life of a task in torch: exact boundaries, protection that survives optimizers, the meter, going back."""

import copy
import io
from typing import Any

import kit
import numpy as np
import pytest

import clora_core as core
from clora_core.errors import InvalidValueError, MomentsIncomplete, OptionError, StateError

if kit.torch is None:
    pytest.skip(kit.NO_TORCH, allow_module_level=True)
torch: Any = kit.torch
from torch_cases import X, adam, attach, data, learn, network, train  # noqa: E402

import clora_torch as clora  # noqa: E402  (needs torch)

nn, functional = torch.nn, torch.nn.functional


@pytest.mark.parametrize("factors", ["first-task", "never", "every-task"])
def test_boundaries_and_restore_keep_every_bit(factors: str) -> None:
    """Beginning and ending a task changes no output; restore brings back what each task's end gave."""
    net = network()
    adapter = attach(net, factors=factors)
    optimizer = adam([p for part in adapter.layers.values() for p in part.trained()])
    ends = {}
    for task in range(3):
        before = net(X)
        adapter.begin_task(f"task-{task}")
        assert torch.equal(net(X), before)
        train(adapter, optimizer, data(task))
        if factors != "every-task":
            adapter.observe(data(task))
        before = net(X)
        adapter.end_task()
        assert torch.equal(net(X), before)
        assert torch.equal(net.eval()(X), before)
        ends[f"task-{task}"] = before.detach()
    for name in (*ends, "task-0", "task-2"):
        adapter.restore(name)
        assert torch.equal(net(X), ends[name])


def test_parameter_objects_persist_and_frozen_factors_stay() -> None:
    """One optimizer for all tasks; A and B's bits stay after the first, whatever the optimizer holds."""
    for make in (adam, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1)):
        net = network()
        adapter = attach(net)
        own, optimizer = adapter.parameters(), make(adapter.parameters())
        learn(adapter, optimizer, 0)
        factors = [p.clone() for part in adapter.layers.values() for p in (part.A, part.B) if p is not None]
        kept = adapter.parameters()
        assert {id(p) for p in kept} < {id(p) for p in own}
        with adapter.task("task-1"):
            for x, y in data(1):
                functional.cross_entropy(net(x), y).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
            adapter.observe(data(1))
        assert [id(p) for p in adapter.parameters()] == [id(p) for p in kept]
        now = [p for part in adapter.layers.values() for p in (part.A, part.B) if p is not None]
        assert all(torch.equal(a, b) for a, b in zip(factors, now, strict=True))


def test_optimizer_state_of_the_routing_starts_afresh() -> None:
    """Else Adam moves the zeroed R_delta by .7 lr on a zero gradient."""
    net = network()
    adapter = attach(net)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    learn(adapter, optimizer, 0)
    adapter.begin_task("task-1")
    for part in adapter.layers.values():
        part.R_delta.grad = torch.zeros_like(part.R_delta)
    optimizer.step()
    assert all(not part.R_delta.any() for part in adapter.layers.values())


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_protection_survives_the_optimizer(name: str) -> None:
    """After 300 steps, heads included, what an update holds in protected directions is rounding: below 1e-6 of it."""
    net = network()
    adapter = attach(net)
    optimizer = OPTIMIZERS[name](adapter.parameters())
    adapter.protect(optimizer, energy=0.9)
    for task in range(2):
        learn(adapter, optimizer, task)
    bases = {n: core.protected_basis(part.S, energy=0.9) for n, part in adapter.layers.items()}
    adapter.begin_task("task-2")
    train(adapter, optimizer, data(2, batches=10), epochs=30)
    for n, part in adapter.layers.items():
        k = int(bases[n].weights.sum())
        assert 0 < k < part.R_delta.shape[-1], "room must be left for the test to say anything"
        R = part.R_delta.detach().double()
        inside = (R @ bases[n].U) * bases[n].weights
        assert R.norm() > 0
        assert inside.norm() <= 1e-6 * R.norm()


def test_protection_survives_scaler_accumulation_wrappers_and_new_groups() -> None:
    """GradScaler's skipped step changes nothing; accumulated, wrapped and later added parameters are protected."""

    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    net = network()
    adapter = attach(net, factors="never")
    first, *rest = adapter.parameters()
    optimizer = torch.optim.AdamW([first], lr=1e-2)
    adapter.protect(Wrapper(optimizer), energy=0.9)
    learn(adapter, optimizer, 0)
    optimizer.add_param_group({"params": rest, "lr": 2e-2})
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    adapter.begin_task("task-1")
    for i, (x, y) in enumerate(data(1, batches=8)):
        loss = functional.cross_entropy(net(x), y) / 2
        scaler.scale(loss * (float("inf") if i == 3 else 1.0)).backward()
        if i % 2:
            before = [p.clone() for p in adapter.parameters()]
            scaler.step(optimizer)
            scaler.update()
            if i == 3:
                assert all(torch.equal(a, b) for a, b in zip(before, adapter.parameters(), strict=True))
            optimizer.zero_grad()
    for part in adapter.layers.values():
        basis = core.protected_basis(part.S, energy=0.9)
        R = part.R_delta.detach().double()
        assert ((R @ basis.U) * basis.weights).norm() <= 1e-6 * R.norm()
        assert R.norm() > 0


def test_no_direction_left_is_said() -> None:
    """The user is told, by layer."""
    net = network()
    adapter = attach(net)
    optimizer = adam(adapter.parameters())
    adapter.protect(optimizer, energy=1.0)
    learn(adapter, optimizer, 0)
    with pytest.warns(UserWarning, match="no direction is left to learn in for 0, 2"):
        adapter.begin_task("task-1")


def test_the_meter_is_the_true_change() -> None:
    """drift equals the mean squared change of the layer's outputs on the recorded inputs, summed over tasks."""
    net = network().double()
    adapter = attach(net)
    optimizer = adam(adapter.parameters())
    ends = []
    for task in range(3):
        learn(adapter, optimizer, task, dtype="float64")
        ends.append({n: core.routing(part.adapter).detach().clone() for n, part in adapter.layers.items()})
    first = adapter.layers["0"]
    want = 0.0
    for task, routings in enumerate(ends):
        x = torch.cat([x for x, _ in data(task, dtype="float64")])
        change = (x @ first.B.T) @ (core.routing(first.adapter) - routings["0"]).T @ first.A.T
        want += float(change.detach().square().sum(1).mean())
    got = adapter.drift()
    assert got["0"] > 0
    assert abs(got["0"] - want) <= 2.0**-40 * float(first.q)
    assert list(got) == ["0", "2", "4"]
    assert all(abs(value) <= 2.0**-40 for value in adapter.drift(since="boundary").values())


BASIS: dict[str, Any] = {"form": "basis", "energy": 0.7}


def test_penalty_is_the_cores_and_has_its_gradient() -> None:
    """The stacked penalty against clora_core.drift and drift_vjp layer by layer; and the three forms of eq. 26."""
    net = network().double()
    adapter = attach(net)
    optimizer = adam(adapter.parameters())
    learn(adapter, optimizer, 0, dtype="float64")
    adapter.begin_task("task-1")
    with torch.no_grad():
        for part in adapter.layers.values():
            part.R_delta.normal_()
    for since in ("boundary", "task-ends"):
        adapter.model.zero_grad()
        adapter.penalty(0.5, head_weight=0.25, since=since).backward()
        total = 0.0
        for part in adapter.layers.values():
            arrays = core.Adapter(*(None if a is None else a.detach() for a in part.adapter))
            scale = 0.25 if part.A is None else 0.5
            total += scale * float(core.drift(arrays, part.moments, since=since))
            want = scale * core.drift_vjp(arrays, part.moments, since=since)
            assert (part.R_delta.grad - want).abs().max() <= 2.0**-40 * want.abs().max()
        assert abs(float(adapter.penalty(0.5, head_weight=0.25, since=since).detach()) - total) <= 2.0**-40 * abs(total)
    for form in (
        {"form": "basis", "energy": 0.7},
        {"form": "basis", "normalize": True},
        {"form": "routing"},
        {"form": "output"},
    ):
        adapter.model.zero_grad()
        adapter.penalty(0.5, kind="orthogonality", **form).backward()
        for part in (adapter.layers["0"], adapter.layers["2"]):
            want = 0.5 * core.orthogonality_vjp(core.Adapter(*(a.detach() for a in part.adapter)), **form)
            assert (part.R_delta.grad - want).abs().max() <= 2.0**-36 * want.abs().max()


def test_first_task_has_no_penalty() -> None:
    """There is nothing to forget; the value is a tensor all the same."""
    adapter = attach(network())
    adapter.begin_task("task-0")
    assert float(adapter.penalty().detach()) == 0.0
    adapter.penalty().backward()


def test_an_exception_leaves_everything_as_before_the_task() -> None:
    """Arrays, memory, tasks, requires_grad; the optimizer forgets what may have been spoilt. A retry works."""
    for factors in ("first-task", "every-task"):
        net = network()
        adapter = attach(net, factors=factors)
        optimizer = adam(adapter.parameters())
        for task in range(2):
            before = {k: v.clone() for k, v in net.state_dict().items()}
            with pytest.raises(InvalidValueError, match="not finite"), adapter.task(f"task-{task}"):
                train(adapter, optimizer, [*data(task), (X * float("nan"), data(task)[0][1][:16])], epochs=1)
            after = net.state_dict()
            assert all(torch.equal(after[k], v) for k, v in before.items())
            assert len(adapter.tasks) == task
            learn(adapter, optimizer, task)
            assert all(torch.isfinite(p).all() for p in adapter.parameters())


def test_observe_counts_what_it_should() -> None:
    """Forms of batches; padding left out; modes kept; sums in float64 equal one big batch."""
    torch.manual_seed(0)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.drop, self.norm = nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6)

        def forward(self, x: Any, attention_mask: Any = None) -> Any:
            return self.norm(self.drop(self.project(x)).mean(1))

    net = Encoder()
    net.norm.eval()
    x, mask = torch.randn(8, 5, 6), torch.rand(8, 5) > 0.3
    adapter = clora.attach(net, rank=3, targets="project", seed=0)
    part = adapter.layers["project"]
    running = net.norm.running_mean.clone()

    def seen(batches: Any, **how: Any) -> Any:
        adapter.begin_task(f"task-{len(adapter.tasks)}")
        adapter.observe(batches, **how)
        C = adapter._observed["project"]
        adapter._open = None
        return C

    u = (x.reshape(-1, 6).double() @ part.B.double().T).detach()
    whole, kept = core.second_moment(u), core.second_moment(u, weights=mask.reshape(-1).double())
    halves = [x[:3], x[3:]]
    limit = 2.0**-20 * whole.abs().max()  # u is rounded to float32 once
    for batches in (halves, [(h, "label") for h in halves], iter(halves), [{"x": h} for h in halves]):
        assert (seen(batches) - whole).abs().max() <= limit
    masked = [{"x": x[:3], "attention_mask": mask[:3]}, {"x": x[3:], "attention_mask": mask[3:]}]
    assert (seen(masked) - kept).abs().max() <= limit
    assert (seen(halves, mask=lambda h: mask[: len(h)] if len(h) == 3 else mask[3:]) - kept).abs().max() <= limit
    assert (seen([(h, 0) for h in halves], forward=lambda m, b: m(b[0])) - whole).abs().max() <= limit
    assert (net.training, net.drop.training, net.norm.training) == (True, True, False)
    assert torch.equal(net.norm.running_mean, running)
    assert part.seen is None
    assert part.mask is None


def test_rows_of_several_tasks_in_one_batch() -> None:
    """Each row as restore would give it, within bounds; None is the base model."""
    net = network().double()
    base = copy.deepcopy(net)
    adapter = attach(net)
    optimizer = adam(adapter.parameters())
    ends: dict[Any, Any] = {None: base(X.double())}
    for task in range(3):
        learn(adapter, optimizer, task, dtype="float64")
        ends[f"task-{task}"] = net(X.double())
    names = [None, "task-2", "task-0", "task-1"] * 4
    with adapter.rows(names):
        mixed = net(X.double())
    assert torch.equal(net(X.double()), ends["task-2"])
    for i, name in enumerate(names):
        assert (mixed[i] - ends[name][i]).abs().max() <= 2.0**-42 * ends[name].abs().max()
    with adapter.disabled():
        assert torch.equal(net(X.double()), ends[None])


def test_resuming_in_the_middle_of_a_task() -> None:
    """State of adapter and optimizer through torch.save: the rest of the run has the same bits."""

    def start() -> tuple[Any, Any]:
        adapter = attach(network())
        optimizer = adam(adapter.parameters())
        return adapter, optimizer

    adapter, optimizer = start()
    adapter.protect(optimizer, energy=0.9)
    learn(adapter, optimizer, 0, penalty=0.1)
    adapter.begin_task("task-1")
    train(adapter, optimizer, data(1), epochs=1, penalty=0.1)
    file = io.BytesIO()
    torch.save({"adapter": adapter.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)

    other, second = start()
    other.load_state_dict(saved["adapter"])
    second.load_state_dict(saved["optimizer"])
    other.protect(second, energy=0.9)
    for a, o in ((adapter, optimizer), (other, second)):
        train(a, o, data(1), epochs=1, penalty=0.1)
        a.observe(data(1))
        a.end_task()
    assert other.tasks == adapter.tasks == ["task-0", "task-1"]
    assert all(
        torch.equal(a, b)
        for a, b in zip(adapter.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    )
    adapter.restore("task-0")
    other.restore("task-0")
    assert torch.equal(adapter.model(X), other.model(X))


def test_a_task_that_was_loaded_open_goes_on() -> None:
    """In a block of its own name; after an exception it is open as it was loaded. Another name is refused."""
    adapter = attach(network())
    adapter.begin_task("task-0")
    train(adapter, adam(adapter.parameters()), data(0))
    net = network()
    other = attach(net)
    other.load_state_dict(adapter.state_dict())
    loaded = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(StateError, match="'task-0' is still open"), other.task("task-1"):
        pass
    with pytest.raises(InvalidValueError), other.task("task-0"):
        train(other, adam(other.parameters()), [(X * float("nan"), data(0)[0][1][:16])])
    assert all(torch.equal(net.state_dict()[k], v) for k, v in loaded.items())
    assert not other.tasks
    with other.task("task-0"):
        other.observe(data(0))
    assert other.tasks == ["task-0"]
    assert torch.equal(net(X), adapter.model(X))


def test_factors_written_with_the_same_bits_have_not_moved() -> None:
    """As DistributedDataParallel does when it wraps a model; the memory stays valid."""
    adapter = attach(network())
    learn(adapter, adam(adapter.parameters()), 0)
    before = adapter.drift()
    with torch.no_grad():
        for part in adapter.layers.values():
            for factor in (part.A, part.B) if part.A is not None else ():
                factor.copy_(factor.clone())
    assert adapter.drift() == before


def test_the_numpy_package_agrees() -> None:
    """One step of SGD through two tasks from the same arrays, in float64: parameters, memory and meter."""
    import clora_numpy

    net = network().double()
    adapter = attach(net)
    weights = {k: v.detach().numpy().copy() for k, v in net.state_dict().items() if "clora" not in k}
    plain = clora_numpy.Network(
        {
            "0": clora_numpy.Layer(weights["0.weight"], weights["0.bias"]),
            "1": clora_numpy.Relu(),
            "2": clora_numpy.Layer(weights["2.weight"], weights["2.bias"]),
            "3": clora_numpy.Relu(),
            "4": clora_numpy.Head(weights["4.weight"], weights["4.bias"]),
        }
    )
    other = clora_numpy.attach(plain, rank=8, rng=0)
    for name, part in adapter.layers.items():  # both draw from seed 0
        for mine, theirs in zip(part.adapter, plain.modules[name].adapter, strict=True):
            assert mine is None or np.array_equal(mine.detach().numpy(), theirs)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1, momentum=0.9)
    theirs = clora_numpy.Optimizer(other, clora_numpy.sgd(0.1, momentum=0.9))
    for task in range(2):
        batches = data(task, dtype="float64")
        with adapter.task(f"task-{task}"):
            train(adapter, optimizer, batches, epochs=1, penalty=0.1)
            adapter.observe(batches)
        with other.task(f"task-{task}"):
            for x, y in batches:
                _, grad = clora_numpy.cross_entropy(plain.forward(x.numpy()), y.numpy())
                plain.backward(grad)
                other.penalty(0.1)
                theirs.step()
            other.observe([x.numpy() for x, _ in batches])
        if task == 0:
            optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1, momentum=0.9)
            theirs.state = {}
    for name, part in adapter.layers.items():
        pairs = [*zip(part.adapter, plain.modules[name].adapter, strict=True)]
        pairs += [*zip(part.moments, other.moments(name), strict=True)]
        for mine, wanted in pairs:
            if mine is not None:  # a few hundred roundings of float64, and nothing that amplifies them
                assert np.abs(mine.detach().numpy() - wanted).max() <= 2.0**-40 * np.abs(wanted).max()
    assert adapter.state_bytes() == other.state_bytes()


def test_state_and_snapshots_do_not_grow() -> None:
    """The state keeps its size over tasks; a snapshot is r x r for each layer."""
    adapter = attach(network())
    optimizer = adam(adapter.parameters())
    sizes = []
    for task in range(4):
        learn(adapter, optimizer, task, epochs=1)
        sizes.append(adapter.state_bytes())
    assert len(set(sizes)) == 1
    for name, part in adapter.layers.items():
        for snapshot in adapter._snapshots.values():
            assert [t.shape for t in snapshot[name].values()] == [part.R_delta.shape]


def open_task(adapter: Any) -> None:
    adapter.begin_task("open")


def finished(adapter: Any, observed: bool = True) -> None:
    adapter.begin_task("done")
    if observed:
        adapter.observe(data(0))
    adapter.end_task()


def stepped(adapter: Any) -> None:
    adapter.begin_task("done")
    adapter.observe(data(0))
    train(adapter, adam(adapter.parameters()), data(0), epochs=1)
    adapter.end_task()


def moved(adapter: Any) -> None:
    finished(adapter)
    with torch.no_grad():
        adapter.layers["0"].B.mul_(2)


ERRORS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "end without begin": (lambda a: None, lambda a: a.end_task(), StateError, "no task is open"),
    "two tasks open": (open_task, lambda a: a.begin_task("b"), StateError, "'open' is still open"),
    "a name again": (finished, lambda a: a.begin_task("done"), StateError, "another name"),
    "observe outside": (lambda a: None, lambda a: a.observe(data(0)), StateError, "no task is open"),
    "observe nothing": (open_task, lambda a: a.observe(iter([])), StateError, "no data"),
    "observe no row": (open_task, lambda a: a.observe([torch.zeros(0, 20)]), StateError, "saw no data"),
    "observe NaN": (open_task, lambda a: a.observe([X * float("nan")]), InvalidValueError, "not finite"),
    "mask unknown": (open_task, lambda a: a.observe([X], mask="pad"), OptionError, "mask='pad'"),
    "penalty outside": (lambda a: None, lambda a: a.penalty(), StateError, "no task is open"),
    "penalty unknown": (open_task, lambda a: a.penalty(kind="l2"), OptionError, "'l2'"),
    "restore unknown": (finished, lambda a: a.restore("nope"), StateError, "finished: 'done'"),
    "restore in a task": (open_task, lambda a: a.restore("x"), StateError, "'open' is open"),
    "rows unknown": (finished, lambda a: a.rows(["done", "nope"]).__enter__(), StateError, "'nope'"),
    "not observed": (lambda a: finished(a, False), lambda a: a.drift(), MomentsIncomplete, "'done'"),
    "trained after observing": (stepped, lambda a: a.drift(), MomentsIncomplete, "a training step after it"),
    "factors moved": (moved, lambda a: a.drift(), StateError, "'0' moved"),
    "protect, factors moved": (moved, lambda a: a.protect(adam(a.parameters())), StateError, "'0' moved"),
    "protect a scheduler": (lambda a: None, lambda a: a.protect(object()), OptionError, "no torch optimizer"),
    "protect a stranger": (
        lambda a: None,
        lambda a: a.protect(adam([nn.Parameter(X)])),
        StateError,
        "adapter.parameters()",
    ),
    "protect by percent": (lambda a: None, lambda a: a.protect(adam(a.parameters()), energy=95), OptionError, "95"),
    "merge in a task": (open_task, lambda a: a.merge(), StateError, "'open' is open"),
    "unmerge unmerged": (lambda a: None, lambda a: a.unmerge(), StateError, "not merged"),
    "merge twice": (lambda a: a.merge(), lambda a: a.merge(), StateError, "already"),
    "begin merged": (lambda a: a.merge(), lambda a: a.begin_task("b"), StateError, "unmerge() first"),
    "disabled merged": (lambda a: a.merge(), lambda a: a.disabled().__enter__(), StateError, "unmerge() first"),
    "load what is no state": (lambda a: None, lambda a: a.load_state_dict({}), StateError, "no state of an adapter"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_verbs_out_of_order(name: str) -> None:
    """A typed error that says what to do instead; the adapter still works afterwards."""
    prepare, call, error, words = ERRORS[name]
    adapter = attach(network())
    prepare(adapter)
    before = {k: v.clone() for k, v in adapter.model.state_dict().items()}
    with pytest.raises(error) as caught:
        call(adapter)
    assert words in str(caught.value), str(caught.value)
    assert "Fix: " in str(caught.value)
    after = adapter.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    adapter.model(X)


@pytest.mark.parametrize("verb", ["drift", "protect", "penalty", "rows"])
def test_stale_moments_are_not_used(verb: str) -> None:
    """Where factors learn in every task, the verbs that need second moments raise and name the option."""
    adapter = attach(network(), factors="every-task")
    adapter.begin_task("task-0")
    calls = {
        "drift": adapter.drift,
        "protect": lambda: adapter.protect(adam(adapter.parameters())),
        "penalty": adapter.penalty,
        "rows": lambda: adapter.rows(["task-0"]).__enter__(),
    }
    with pytest.raises(StateError, match="factors='first-task'"):
        calls[verb]()


def test_load_refuses_another_adapter() -> None:
    """Other layers, ranks and modes are named, and nothing is loaded."""
    state = attach(network()).state_dict()
    for options, words in (
        ({"rank": 4}, "'0' has another size"),
        ({"max_rank": 12}, "'S': (8, 8)"),
        ({"targets": ["0"]}, "Got 2 in one of the two only"),
        ({"factors": "never"}, "Got 'first-task'; needed 'never'"),
    ):
        adapter = attach(network(), **options)
        before = {k: v.clone() for k, v in adapter.model.state_dict().items()}
        with pytest.raises(StateError) as caught:
            adapter.load_state_dict(state)
        assert words in str(caught.value)
        assert all(torch.equal(adapter.model.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize("where", [("layers",), ("snapshots", "done"), ("layers", "0", "P"), ("tasks",), ("blind",)])
def test_load_refuses_a_state_with_something_missing(where: tuple[str, ...]) -> None:
    """A damaged state is refused before anything is loaded."""
    adapter = attach(network())
    finished(adapter)
    state = copy.deepcopy(adapter.state_dict())
    *path, last = where
    inner = state
    for key in path:
        inner = inner[key]
    del inner[last]
    other = attach(network(1))
    before = {k: v.clone() for k, v in other.model.state_dict().items()}
    with pytest.raises(StateError, match="load_state_dict"):
        other.load_state_dict(state)
    assert all(torch.equal(other.model.state_dict()[k], v) for k, v in before.items())
    assert other.tasks == []


def test_rows_wants_a_name_for_each_row() -> None:
    """A batch of another size is refused, by every kind of layer."""
    adapter = attach(network())
    finished(adapter)
    with pytest.raises(StateError, match="16 rows; needed 2"), adapter.rows(["done", None]):
        adapter.model(X)


def test_devices_are_checked() -> None:
    """An input elsewhere than the adapter names both."""
    adapter = attach(network())
    with pytest.raises(StateError, match="input on meta, adapter on cpu"):
        adapter.model(X.to("meta"))
