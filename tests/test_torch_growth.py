"""Growing in torch: ranks with directions that were observed from the start, heads with new classes."""

import io
from typing import Any

import kit
import pytest

import clora_core as core
from clora_core.errors import MomentsIncomplete, OptionError, RankError, StateError

if kit.torch is None:
    pytest.skip(kit.NO_TORCH, allow_module_level=True)
torch: Any = kit.torch
from torch_cases import X, adam, attach, data, learn, network, train  # noqa: E402

nn = torch.nn
FACTORS = ["first-task", "never", "every-task"]


def restart(adapter: Any) -> Any:
    return adam([p for part in adapter.layers.values() for p in part.trained()])


def grown(factors: str = "first-task", **options: Any) -> tuple[Any, dict[str, Any], Any]:
    """Three tasks, the rank raised from 4 to 7 after the first and to 8 after the second; outputs at their ends."""
    net = network().double()
    adapter = attach(net, rank=4, factors=factors, **options)
    optimizer = restart(adapter)
    ends = {}
    for task, by in enumerate((0, 3, 1)):
        if by:
            adapter.expand(by, seed=task)
        adapter.begin_task(f"task-{task}")
        train(adapter, optimizer, data(task, dtype="float64"))
        adapter.observe(data(task, dtype="float64"))
        adapter.end_task()
        ends[f"task-{task}"] = net(X.double()).detach()
    return adapter, ends, optimizer


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("options", [{}, {"max_rank": 8}, {"max_rank": 30}, {"max_rank": 8, "scheme": "lora"}])
def test_expanding_keeps_the_function(factors: str, options: dict[str, Any]) -> None:
    """Within the bound, learnable at once, the same Parameter objects; directions are orthogonal to those there."""
    if factors == "never" and "scheme" in options:
        factors = "first-task"
    net = network().double()
    adapter = attach(net, rank=4, factors=factors, **options)
    optimizer = restart(adapter)
    learn(adapter, optimizer, 0, dtype="float64")
    objects, part, x = [id(p) for p in adapter._all()], adapter.layers["0"], X.double()
    limit = core.bounds.linear(x, net[0].weight, core.Adapter(*(a.detach() for a in part.adapter)), net[0].bias)
    before, old = net[0](x).detach(), [f.detach().clone() for f in (part.A, part.B)]
    adapter.expand(3, seed=0)
    assert part.rank == 7
    assert [id(p) for p in adapter._all()] == objects
    assert torch.all((net[0](x) - before).abs() <= 2 * limit)
    A, B = part.A.detach(), part.B.detach()
    assert torch.equal(A[:, :4], old[0])
    assert torch.equal(B[:4], old[1])
    defect = core.orthonormality_defect(A[:, 4:])
    assert defect <= core.bounds.orthonormal(32, 7, torch.float64)
    assert core.orthonormality_defect(B[4:].T) <= core.bounds.orthonormal(20, 7, torch.float64)
    if factors == "never" and options.get("max_rank") != 30:  # both frames are as drawn, and so orthogonal
        assert core.orthonormality_defect(A) <= core.bounds.orthonormal(32, 8, torch.float64)
    with adapter.task("task-1"):
        train(adapter, optimizer, data(1, dtype="float64"), epochs=1)
        assert part.R_delta.detach()[:, 4:].abs().sum() > 0
        assert part.R_delta.detach()[4:].abs().sum() > 0
        adapter.observe(data(1, dtype="float64"))


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("options", [{}, {"max_rank": 8}])
def test_restore_goes_back_over_expansions(factors: str, options: dict[str, Any]) -> None:
    """Every task's outputs, the same bits, in any order; and rows mixes tasks of several ranks."""
    adapter, ends, _ = grown(factors, **options)
    x = X.double()
    for name in (*ends, "task-1", "task-0", "task-2"):
        adapter.restore(name)
        assert torch.equal(adapter.model(x), ends[name])
    if factors == "every-task":
        return
    names = ["task-0", "task-1", "task-2", None] * 4
    with adapter.rows(names):
        mixed = adapter.model(x)
    for i, name in enumerate(names[:3]):
        assert (mixed[i] - ends[name][i]).abs().max() <= 2.0**-42 * ends[name].abs().max()
    adapter.restore("task-0")
    with pytest.raises(StateError, match=r"restore\(adapter.tasks\[-1\]\) first"), adapter.rows(names):
        pass


def test_the_meter_stays_exact_with_max_rank() -> None:
    """drift over expansions is the true mean squared change; the first task's inputs were seen in all directions."""
    adapter, _, _ = grown("never", max_rank=8)
    part = adapter.layers["0"]
    x = {task: torch.cat([x for x, _ in data(task, dtype="float64")]) for task in range(3)}

    def outputs() -> dict[int, Any]:
        return {task: core.apply(x[task], part.adapter).detach() for task in x}

    ends = {}
    for task in range(3):
        adapter.restore(f"task-{task}")
        ends[task] = outputs()[task]
    now = outputs()
    want = sum(float((now[task] - ends[task]).square().sum(1).mean()) for task in x)
    assert want > 0
    assert abs(adapter.drift()["0"] - want) <= 2.0**-40 * float(part.q)
    optimizer = adam(adapter.parameters())
    adapter.protect(optimizer, energy=0.8)
    basis = core.protected_basis(part.S, energy=0.8)
    assert int(basis.weights.sum()) < 8
    adapter.begin_task("task-3")
    train(adapter, optimizer, data(3, dtype="float64"), penalty=0.1)
    R = part.R_delta.detach()
    assert ((R @ basis.U) * basis.weights).norm() <= 2.0**-40 * R.norm()
    assert R.norm() > 0


@pytest.mark.parametrize("rank", [3, 5])
def test_spare_directions_stay_out_of_the_meter(rank: int) -> None:
    """Below max_rank the memory that is used is that of the directions in use: what max_rank left out would give."""
    meters = []
    for max_rank in (None, 8):
        adapter = attach(network().double(), rank=rank, max_rank=max_rank, factors="never", seed=None)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # the spare ones are drawn in between, so the factors would differ
            for part in adapter.layers.values():
                for factor in (part.A, part.B):
                    if factor is not None:
                        factor.copy_(torch.randn(factor.shape, generator=generator, dtype=torch.float64))
        optimizer = adam(adapter.parameters())
        for task in range(2):
            with adapter.task(f"task-{task}"):
                train(adapter, optimizer, data(task, dtype="float64"), epochs=1, penalty=0.1)
                adapter.observe(data(task, dtype="float64"))
        meters.append(adapter.drift())
        part = adapter.layers["0"]
        assert part.moments.S.shape == (rank, rank)
    assert meters[0]["0"] > 0
    for name, want in meters[0].items():  # the same sums over r x r numbers, padded with zeros in between
        assert abs(meters[1][name] - want) <= 2.0**-36 * float(adapter.layers[name].q)


@pytest.mark.parametrize("verb", ["drift", "protect", "penalty"])
def test_without_max_rank_the_memory_is_incomplete(verb: str) -> None:
    """Directions drawn after a task were not observed in it: the meter would read 0, so it raises."""
    adapter, _, optimizer = grown("never")
    adapter.begin_task("task-3")
    calls = {"drift": adapter.drift, "protect": lambda: adapter.protect(optimizer), "penalty": adapter.penalty}
    with pytest.raises(MomentsIncomplete, match="max_rank"):
        calls[verb]()


def test_expanding_before_the_first_task_loses_nothing() -> None:
    """No task was missed, so the memory is complete."""
    adapter = attach(network(), rank=4)
    adapter.expand(4)
    optimizer = adam(adapter.parameters())
    learn(adapter, optimizer, 0)
    assert set(adapter.drift()) == {"0", "2", "4"}


@pytest.mark.parametrize("options", [{}, {"max_rank": 8}])
def test_saving_and_loading_over_expansions(options: dict[str, Any]) -> None:
    """A state of a higher rank loads into an adapter attached at the first rank, if that has room for it."""
    adapter, ends, _ = grown("never", **options)
    file = io.BytesIO()
    torch.save(adapter.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    other = attach(network().double(), rank=4, factors="never", **options)
    if not options:
        with pytest.raises(StateError, match=r"'S': \(8, 8\)"):
            other.load_state_dict(state)
        other = attach(network().double(), rank=4, max_rank=8, factors="never")
    other.load_state_dict(state)
    for name in ("task-2", "task-0", "task-1"):
        other.restore(name)
        assert torch.equal(other.model(X.double()), ends[name])
    if not options:
        with pytest.raises(MomentsIncomplete):
            other.drift()


@pytest.mark.parametrize("by", [0, -1, 17])
def test_ranks_that_do_not_fit(by: Any) -> None:
    """Nothing changes in any layer."""
    adapter = attach(network(), rank=4)
    before = {k: v.clone() for k, v in adapter.model.state_dict().items()}
    with pytest.raises(RankError, match="1 <= by <= 16"):
        adapter.expand(by)
    assert all(torch.equal(v, adapter.model.state_dict()[k]) for k, v in before.items())


def test_expanding_in_a_task_is_refused() -> None:
    """Leaving the task by an exception could not take it back."""
    adapter = attach(network(), rank=4)
    adapter.begin_task("open")
    for call in (lambda: adapter.expand(1), lambda: adapter.grow_head("4", 1)):
        with pytest.raises(StateError, match="'open' is open"):
            call()


def test_a_growing_head() -> None:
    """New classes start at logit 0, old logits keep their bits; tasks, meter, rows, merge and saving know of them."""
    net = network().double()
    adapter = attach(net, factors="never")
    optimizer = adam(adapter.parameters())
    x, ends = X.double(), {}
    for task, by in enumerate((0, 2, 1)):
        if by:
            before, state = net(x).detach(), adapter.state_dict()
            held = state["snapshots"]["task-0"]["4"]["R_old"].shape[0]
            adapter.grow_head("4", by)
            assert state["snapshots"]["task-0"]["4"]["R_old"].shape[0] == held
            now = net(x)
            assert torch.equal(now[:, :-by], before)
            assert not now[:, -by:].any()
        assert net[4].out_features == net(x).shape[1]
        with adapter.task(f"task-{task}"):
            classes = net[4].out_features
            batches = [(x, torch.arange(len(y)) % classes) for x, y in data(task, dtype="float64")]
            train(adapter, optimizer, batches)
            adapter.observe(batches)
        ends[f"task-{task}"] = net(x).detach()
    head = adapter.layers["4"]
    assert head.R_delta.shape == (7, 25)
    want = 0.0
    for task in range(3):
        adapter.restore(f"task-{task}")
        then, end = net(x), ends[f"task-{task}"]
        assert torch.equal(then[:, : end.shape[1]], end)
        assert not then[:, end.shape[1] :].any()
        inputs = torch.cat([net[:4](x) for x, _ in data(task, dtype="float64")]).detach()
        rows = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
        value = head.R_old.clone()
        adapter.restore("task-2")
        want += float((rows @ (head.R_old - value).T).square().sum(1).mean())
    assert abs(adapter.drift()["4"] - want) <= 2.0**-38 * float(head.q)
    with adapter.rows(["task-0", None] * 8):
        mixed = net(x)
    assert (mixed[0, :4] - ends["task-0"][0]).abs().max() <= 2.0**-42 * ends["task-0"].abs().max()
    assert not mixed[:2, 4:].any()
    adapter.merge()
    assert net[4].weight.shape == (7, 24)
    assert (net(x) - ends["task-2"]).abs().max() <= 2.0**-42 * ends["task-2"].abs().max()
    adapter.unmerge()
    other = attach(network().double(), factors="never")
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(other.model(x), net(x))
    assert adapter.detach()[4].out_features == 4


def test_heads_that_cannot_grow() -> None:
    """A layer that is no head, and a growth of nothing."""
    adapter = attach(network())
    with pytest.raises(StateError, match="heads: '4'"):
        adapter.grow_head("0", 1)
    with pytest.raises(OptionError, match="by=0"):
        adapter.grow_head("4", 0)
