"""DistributedDataParallel and fully_shard (FSDP2): two gloo processes give one process's numbers, and agree."""

import copy
import io
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kit
import pytest

import clora_core as core
from clora_core.errors import InvalidValueError, StateError

if kit.torch is None:
    pytest.skip(kit.NO_TORCH, allow_module_level=True)
torch: Any = kit.torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch_cases import adam, attach, data, network  # noqa: E402
from torch_processes import PROCESSES, equal_everywhere, together  # noqa: E402

import clora_torch as clora  # noqa: E402

nn, functional = torch.nn, torch.nn.functional
# Two processes add up gradients in another order than one. 3 tasks of 4 steps, each through sums of at most 24 rows, 32
# features and 25 routed directions in float64: less than 2^13 roundings, and nothing that amplifies them.
CLOSE = 2.0**-40
Wrap = Callable[[Any], Any]


def blocks_of_network() -> Any:
    """The shared network in two blocks, as fully_shard is used."""
    net = network().double()
    return nn.Sequential(net[:2], net[2:])


def adapted(**options: Any) -> tuple[Any, Any]:
    net = blocks_of_network()
    return net, attach(net, targets=["0.0", "1.2"], heads="1.4", **options)


def ddp(net: Any) -> Any:
    return DistributedDataParallel(net)


def fsdp(net: Any) -> Any:
    for block in net:
        fully_shard(block)
    return fully_shard(net)


def mine(batches: list[Any], rank: int | None) -> list[Any]:
    """Every other row of each batch, or all of them in a single process."""
    return [(x, y) if rank is None else (x[rank::PROCESSES], y[rank::PROCESSES]) for x, y in batches]


def sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def task_of(adapter: Any, forward: Any, optimizer: Any, task: int, rank: int | None, separate: bool) -> None:
    """Training and observation of an open task, the penalty in the loss or by itself."""
    for x, y in mine(data(task, dtype="float64"), rank):
        loss = functional.cross_entropy(forward(x), y)
        if separate:
            loss.backward()
            adapter.penalty(0.1).backward()
        else:
            (loss + adapter.penalty(0.1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter.observe(mine(data(task, dtype="float64"), rank))


def life(net: Any, adapter: Any, wrap: Wrap, rank: int | None, *, tasks: int = 3, separate: bool = True) -> None:
    optimizer: Any = None
    for task in range(tasks):
        with adapter.task(f"task-{task}"):
            forward = wrap(net)
            if optimizer is None:
                optimizer = sgd(adapter.parameters())
                adapter.protect(optimizer, energy=0.9)
            task_of(adapter, forward, optimizer, task, rank, separate)
            if task:
                nothing_leaks(adapter)


def nothing_leaks(adapter: Any) -> None:
    for part in adapter.layers.values():
        basis = core.protected_basis(part.S, energy=0.9)
        R = part.adapter.R_delta.detach()
        assert 0 < basis.weights.sum() < len(basis.weights)
        assert ((R @ basis.U) * basis.weights).norm() <= 1e-6 * R.norm()
        assert R.norm() > 0


def arrays(adapter: Any) -> dict[str, Any]:
    """All of an adapter's state by name."""
    state = adapter.state_dict()
    return {
        **{f"{n} {k}": t for n, fields in state["layers"].items() for k, t in fields.items()},
        **{f"{s} {n}": fields["R_old"] for s, layers in state["snapshots"].items() for n, fields in layers.items()},
    }


def close(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert list(got) == list(want)
    for name in want:
        assert (got[name] - want[name]).abs().max() <= CLOSE * want[name].abs().max(), name


def one_step_is_within_bounds(wrap: Wrap, rank: int) -> None:
    """Gradients of one step against the core's closed form: both sides within `bounds.linear_vjp` of the exact ones."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 32)).double()
    adapter = clora.attach(net, rank=8, seed=0)
    part = adapter.layers["0"]
    with torch.no_grad():
        part.R_delta.normal_(generator=generator)
        part.R_old.normal_(generator=generator)
    plain = core.Adapter(*(a.detach().clone() for a in part.adapter))
    W = net[0].weight.detach().clone()
    x = torch.randn(16, 20, generator=generator, dtype=torch.float64)
    G = torch.randn(16, 32, generator=generator, dtype=torch.float64)
    forward = wrap(net)  # it must live until the backward pass is over
    y = forward(x[rank::PROCESSES])
    ((y * G[rank::PROCESSES]).sum() / 8).backward()  # each process has half of 16 rows: / 16 for all, exactly
    wrt = ("A", "R_delta", "B")
    want = core.linear_vjp(x, W, plain, G / 16, wrt=wrt)
    bound = core.bounds.linear_vjp(x, W, plain, G / 16, wrt=wrt)
    for name in wrt:
        got = getattr(part, name).grad
        got = got.full_tensor() if isinstance(got, DTensor) else got
        assert ((got - getattr(want, name)).abs() <= 2 * getattr(bound, name)).all(), name


def several_tasks_are_those_of_one_process(wrap: Wrap, rank: int) -> Any:
    """Adapter, memory and snapshots; alike in all processes; saved by one, they give the same function elsewhere."""
    net, adapter = adapted()
    life(net, adapter, wrap, rank)
    alone, single = adapted()
    life(alone, single, lambda net: net, None)
    close(arrays(adapter), arrays(single))
    equal_everywhere(arrays(adapter))
    X = data(0, dtype="float64")[0][0]

    state = adapter.state_dict()  # a collective under fully_shard
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other, loaded = adapted()
    loaded.load_state_dict(torch.load(file))
    for name in ("task-0", "task-2"):
        adapter.restore(name)
        loaded.restore(name)
        assert torch.equal(net(X), other(X))
    assert loaded.drift() == adapter.drift()
    in_one_folder(adapter, rank)
    with adapter.rows(["task-0", None] * 12), loaded.rows(["task-0", None] * 12):
        assert torch.equal(net(X), other(X))
    return net, adapter


def in_one_folder(adapter: Any, rank: int) -> None:
    """Saved by the first process (under fully_shard all take part), loaded by all; what one refuses, all are told."""
    place = [tempfile.mkdtemp() if rank == 0 else None]
    torch.distributed.broadcast_object_list(place)
    collective = isinstance(adapter.layers["0.0"].R_delta, DTensor)
    for _ in range(2):  # and over what was saved before
        if collective or rank == 0:
            adapter.save(f"{place[0]}/folder")
        torch.distributed.barrier()
    other = clora.load(blocks_of_network(), f"{place[0]}/folder")
    assert other.tasks == adapter.tasks
    equal_everywhere(arrays(other))
    assert all(torch.equal(array, arrays(other)[name]) for name, array in arrays(adapter).items())
    if collective:
        _, stranger = adapted()
        stranger.save(f"{place[0]}/{rank}")
        adapter._saved.clear()
        with raises(StateError, "holds another adapter"):
            adapter.save(f"{place[0]}/folder")


@contextmanager
def raises(error: type[Exception], words: str) -> Any:
    """In every process."""
    with pytest.raises(error, match=words):
        yield


def observation_is_one_of_all_processes(wrap: Wrap, rank: int, *, empty: bool) -> None:
    """Unevenly spread batches; what some process can't use, all refuse, so that none waits for another."""
    net, adapter = adapted()
    _, single = adapted()
    batches = data(0, dtype="float64")
    wrap(net)
    spreads = [batches[:3] if rank == 0 else batches[3:], batches if rank == 0 else []]
    for number, own in enumerate(spreads if empty else spreads[:1]):
        adapter.begin_task(f"task-{number}")
        adapter.observe(own)
        single.begin_task(f"task-{number}")
        single.observe(batches)
        close(adapter._observed, single._observed)
        equal_everywhere(adapter._observed)
        adapter._open = single._open = None
    adapter.begin_task("refused")
    if not empty:
        with raises(StateError, "some processes have no batch"):
            adapter.observe(spreads[1])
    with raises(StateError, "no data"):
        adapter.observe([])
    nan = [(x * float("nan"), y) for x, y in batches[:1]]
    with raises(InvalidValueError, "not finite"):
        adapter.observe(batches[:1] if rank == 0 else nan)
    adapter.observe(batches[:1])


def a_failure_is_undone(wrap: Wrap, rank: int) -> None:
    """The adapter is as before the task, the optimizer has forgotten it, another attempt works."""
    net, adapter = adapted()
    optimizer: Any = None
    for task in range(2):
        before = {name: array.clone() for name, array in arrays(adapter).items()}
        try:
            with adapter.task(f"task-{task}"):
                forward = wrap(net)
                optimizer = adam(adapter.parameters()) if optimizer is None else optimizer
                task_of(adapter, forward, optimizer, task, rank, True)
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        after = arrays(adapter)
        assert all(torch.equal(after[name], array) for name, array in before.items())
        assert not optimizer.state
        with adapter.task(f"task-{task}"):
            task_of(adapter, wrap(net) if wrap is ddp else net, optimizer, task, rank, True)
        assert optimizer.state
    adapter.begin_task("task-2")
    assert not any(part.R_delta in optimizer.state for part in adapter.layers.values())


def the_documentation_runs(rank: int, words: str) -> None:
    """The block of docs/training.md that has those words; they stand for how the model is wrapped."""
    page = Path(__file__).parent.parent / "docs" / "training.md"
    blocks = re.findall(r"^```py\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if words in block]
    loaders = {f"task-{task}": mine(data(task, dtype="float64"), rank) for task in range(2)}
    names = {"torch": torch, "clora": clora, "make_model": blocks_of_network, "rank": rank}
    folder = Path.cwd()
    with tempfile.TemporaryDirectory() as there:
        os.chdir(there)
        exec(compile(block, page.name, "exec"), {**names, "own_loaders": loaders, "loss_fn": functional.cross_entropy})
        os.chdir(folder)
        assert Path(there, "my-adapter", "clora.json").exists() == (rank == 0)


def replicated(rank: int) -> None:
    the_documentation_runs(rank, "wrapped = DistributedDataParallel(model)")
    one_step_is_within_bounds(ddp, rank)
    net, adapter = several_tasks_are_those_of_one_process(ddp, rank)
    adapter.restore("task-2")
    wrapped, second = adapted()
    life(wrapped, second, ddp, rank, separate=False)
    close(arrays(second), arrays(adapter))

    # One wrapper for all tasks waits for gradients of factors that rest, and torch says so; unless it looks for them.
    wrapped, third = adapted()
    once = DistributedDataParallel(wrapped, find_unused_parameters=True)
    life(wrapped, third, lambda _: once, rank)
    close(arrays(third), arrays(adapter))
    wrapped, fourth = adapted()
    once = ddp(wrapped)
    with pytest.raises(RuntimeError, match=r"not used in producing loss|ready only once"):
        life(wrapped, fourth, lambda _: once, rank)

    observation_is_one_of_all_processes(ddp, rank, empty=True)
    a_failure_is_undone(ddp, rank)
    net, adapter = adapted()
    optimizer = sgd(adapter.parameters())
    with raises(StateError, "different adapters"), adapter.task("task-0"):  # the wrapper was never called
        task_of(adapter, net, optimizer, 0, rank, True)


def split(rank: int) -> None:
    the_documentation_runs(rank, "fully_shard(model)")
    one_step_is_within_bounds(lambda net: fully_shard(net), rank)
    net, adapter = several_tasks_are_those_of_one_process(Once(fsdp), rank)
    weight = net[0][0].weight
    assert isinstance(weight, DTensor)
    assert weight.to_local().numel() == weight.numel() // PROCESSES
    state, meter = copy.deepcopy(adapter.state_dict()), adapter.drift()
    for verb in (adapter.merge, adapter.detach, lambda: adapter.expand(1), lambda: adapter.grow_head("1.4", 1)):
        with raises(StateError, "load it into an attached model in one process"):
            verb()

    other, loaded = adapted()
    fsdp(other)
    loaded.load_state_dict(state)
    adapter.unprotect()
    optimizer, again = sgd(adapter.parameters()), sgd(loaded.parameters())
    for a, o in ((adapter, optimizer), (loaded, again)):
        with a.task("task-3"):
            task_of(a, a.model, o, 3, rank, True)
    one, two = arrays(adapter), arrays(loaded)
    assert all(torch.equal(one[name], two[name]) for name in one)
    loaded, third = adapted()
    third.load_state_dict(state)  # recorded before the Parameters become others
    fsdp(loaded)
    assert third.drift() == meter

    loaded, second = adapted()
    life(loaded, second, Once(fsdp), rank, separate=False)
    third.restore("task-2")
    close(arrays(second), arrays(third))
    observation_is_one_of_all_processes(fsdp, rank, empty=False)
    a_failure_is_undone(Once(fsdp), rank)

    moving, every = adapted(factors="every-task")
    fsdp(moving)
    optimizer = adam(every.parameters())
    X = data(0, dtype="float64")[0][0]
    ends = []
    for task in range(2):
        with every.task(f"task-{task}"):
            for x, y in mine(data(task, dtype="float64"), rank):
                functional.cross_entropy(moving(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append(moving(X).detach())
    for task in (0, 1):
        every.restore(f"task-{task}")
        assert torch.equal(moving(X), ends[task])

    half, _ = adapted()
    for block in half:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with raises(StateError, "another precision"):
        half(X)


class Once:
    """A wrapper that is put on before the first task."""

    def __init__(self, wrap: Wrap) -> None:
        self.wrap, self.done = wrap, False

    def __call__(self, net: Any) -> Any:
        if not self.done:
            self.wrap(net)
        self.done = True
        return net


@pytest.mark.parametrize("work", [replicated, split], ids=["ddp", "fsdp2"])
def test_two_processes(tmp_path: Path, work: Callable[[int], None]) -> None:
    """All of the above, in two processes."""
    together(work, tmp_path)
