"""What users do to an adapted model that is not in any tutorial: each has gone wrong silently once."""

import copy
import pickle
import warnings
from typing import Any

import kit
import pytest

import clora_core as core
from clora_core.errors import MomentsIncomplete, OptionError, StateError

if kit.torch is None:
    pytest.skip(kit.NO_TORCH, allow_module_level=True)
torch: Any = kit.torch
from torch_cases import X, adam, attach, data, learn, network, train  # noqa: E402

import clora_torch as clora  # noqa: E402  (needs torch)

nn, functional = torch.nn, torch.nn.functional


def stir(adapter: Any) -> None:
    with torch.no_grad():
        for part in adapter.layers.values():
            part.R_delta.normal_()


def bits(adapter: Any) -> dict[str, Any]:
    return {name: array.clone() for name, array in adapter.model.state_dict().items()}


def equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)


# --- layers whose class is not what it seems


class Cosine(nn.Linear):
    def forward(self, x: Any) -> Any:
        return functional.linear(functional.normalize(x), functional.normalize(self.weight))


class Shouting(nn.Embedding):
    def forward(self, x: Any) -> Any:
        return 10 * super().forward(x)


def hooked() -> Any:
    layer = nn.Linear(4, 4)
    layer.forward = layer.forward
    return layer


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (hooked, "replaced on the object"),
        (lambda: Cosine(4, 4), "its forward is its own"),
        (lambda: Shouting(4, 4), "its forward is its own"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "computed from others"),
    ],
)
@pytest.mark.parametrize("role", ["targets", "heads"])
def test_layers_that_an_adapter_would_not_fit(make: Any, words: str, role: str) -> None:
    """Refused before anything is frozen."""
    net = nn.Sequential(make(), nn.Linear(4, 4))
    if role == "heads" and not isinstance(net[0], nn.Linear):
        return
    options = {"targets": "1", "heads": "0"} if role == "heads" else {"targets": ["0", "1"]}
    with pytest.raises(OptionError, match=words):
        clora.attach(net, rank=2, **options)
    assert all(p.requires_grad for p in net.parameters())
    assert type(net[1]) is nn.Linear


def test_a_forward_replaced_after_attaching_stops_detach() -> None:
    """It would go on calling what the class no longer has."""
    adapter = attach(network())
    layer = adapter.model[0]
    layer.forward = layer.forward
    with pytest.raises(OptionError, match="remove_hook_from_module"):
        adapter.detach()
    del layer.forward
    assert type(adapter.detach()[0]) is nn.Linear


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ["0[0:10]", "0[5:15]"]}, "overlap"),
        ({"heads": "clasifier"}, "'clasifier'"),
        ({"heads": iter(["clasifier"])}, "'clasifier'"),
        ({"ranks": {"qeury": 2}}, "'qeury'"),
        ({"targets": [], "heads": []}, "nothing to adapt"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], words: str) -> None:
    """A typo is not ignored."""
    with pytest.raises(OptionError, match=words):
        attach(network(), **options)


def test_one_adapter_for_a_model_at_a_time() -> None:
    """A second one would freeze the first and detach it; after detach the first does nothing any more."""
    net = network()
    first = attach(net, targets="0", heads=())
    with pytest.raises(StateError, match="adapters already"):
        attach(net, targets="2", heads=())
    assert first.parameters()
    first.detach()
    second = attach(net)
    verbs = [first.detach, first.merge, lambda: first.begin_task("a"), lambda: first.restore("a"), first.state_dict]
    for verb in verbs:
        with pytest.raises(StateError, match="detached"):
            verb()
    second.begin_task("a")


def test_nested_tensors_of_an_encoder() -> None:
    """torch's encoder packs padded batches in inference: adapted layers could not read their sizes."""
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    adapter = clora.attach(net, rank=2, targets=["linear1", "in_proj_weight"], factors="never", seed=0)
    with adapter.task("a"):
        stir(adapter)
        adapter.observe([x], forward=lambda m, b: m(b, src_key_padding_mask=padding))
    want = net(x, src_key_padding_mask=padding)
    with torch.no_grad():
        assert torch.equal(net(x, src_key_padding_mask=padding), want)
    assert adapter.detach().use_nested_tensor


# --- tasks that go wrong


def test_a_task_that_cannot_begin_is_not_open() -> None:
    """Protection without memory, a warning turned into an error: the next task can begin."""
    adapter = attach(network())
    optimizer = adam(adapter.parameters())
    adapter.protect(optimizer, energy=1.0)
    learn(adapter, optimizer, 0)
    before = bits(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for begin in (adapter.begin_task, lambda name: adapter.task(name).__enter__()):
            with pytest.raises(UserWarning, match="no direction is left"):
                begin("task-1")
    assert equal(bits(adapter), before)
    adapter.unprotect()
    with adapter.task("task-1"):
        train(adapter, optimizer, data(1))
    with pytest.raises(MomentsIncomplete):
        adapter.protect(optimizer)
    with adapter.task("task-2"):
        pass
    assert adapter.tasks == ["task-0", "task-1", "task-2"]


def test_a_failure_late_in_a_task_takes_back_all_of_it() -> None:
    """Names, snapshots and memory, too; ending the task by hand inside its block is such a failure."""
    adapter = attach(network())
    optimizer = adam(adapter.parameters())
    learn(adapter, optimizer, 0)
    before, meter = bits(adapter), adapter.drift()

    def twice() -> None:
        with adapter.task("task-1"):
            train(adapter, optimizer, data(1))
            adapter.observe(data(1))
            adapter.end_task()

    with pytest.raises(StateError, match="no task is open"):
        twice()
    assert equal(bits(adapter), before)
    assert (adapter.tasks, list(adapter._snapshots)) == (["task-0"], ["task-0"])
    assert adapter.drift() == meter
    learn(adapter, optimizer, 1)
    assert adapter.tasks == ["task-0", "task-1"]


@pytest.mark.parametrize("write", ["autograd", "data"])
def test_factors_that_moved_inside_a_task_are_not_recorded(write: str) -> None:
    """The memory would pass for that of other coordinates."""
    adapter = attach(network())
    optimizer = adam(adapter.parameters())
    learn(adapter, optimizer, 0)
    part = adapter.layers["0"]

    def spoilt() -> None:
        with adapter.task("task-1"), torch.no_grad():
            adapter.observe(data(1))
            (part.A if write == "autograd" else part.A.data).mul_(1.5)

    with pytest.raises(StateError, match="moved"):
        spoilt()
    assert adapter.drift()["0"] == 0.0


class Lbfgs(torch.optim.LBFGS):
    """LBFGS in a loop like that of other optimizers."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1, max_iter=3, history_size=4)


@pytest.mark.parametrize("kind", ["lbfgs", "zeros"])
def test_frozen_factors_under_optimizers_that_write_to_all(kind: str) -> None:
    """LBFGS steps along old directions; gradients of zero invite weight decay. Every bit stays."""
    adapter = attach(network())
    optimizer = Lbfgs(adapter.parameters()) if kind == "lbfgs" else adam(adapter.parameters())
    frozen = [p for part in adapter.layers.values() for p in (part.A, part.B) if p is not None]
    for task in range(2):
        before = [p.clone() for p in frozen]
        with adapter.task(f"task-{task}"):
            for x, y in data(task):

                def closure(x: Any = x, y: Any = y) -> Any:
                    optimizer.zero_grad()
                    loss = functional.cross_entropy(adapter.model(x), y)
                    loss.backward()
                    if kind == "zeros":
                        for p in frozen:
                            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    return loss

                optimizer.step(closure)
            adapter.observe(data(task))
        assert all(torch.equal(p, b) for p, b in zip(frozen, before, strict=True)) == (task == 1)


def test_lbfgs_that_steps_more_than_the_adapter() -> None:
    """It keeps the history of all parameters under the first one, here a stranger: a boundary clears it."""
    adapter, stranger = attach(network()), nn.Parameter(torch.zeros(3))
    optimizer = Lbfgs([stranger, *adapter.parameters()])

    def closure() -> Any:
        optimizer.zero_grad()
        loss = functional.cross_entropy(adapter.model(X), torch.arange(16) % 4) + (stranger - 1).square().sum()
        loss.backward()
        return loss

    with adapter.task("task-0"):
        optimizer.step(closure)
        adapter.observe(data(0))
    assert optimizer.state
    adapter.begin_task("task-1")
    assert not optimizer.state


# --- saving in between


def saved(adapter: Any, optimizer: Any) -> Any:
    return copy.deepcopy({"model": adapter.model.state_dict(), "a": adapter.state_dict(), "o": optimizer.state_dict()})


@pytest.mark.parametrize("optimizer_first", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_resuming_keeps_every_bit(inside: bool, optimizer_first: bool) -> None:
    """Between tasks and inside one, in either order of loading, with an optimizer that has stepped elsewhere or not."""
    adapter = attach(network())
    optimizer = adam(adapter.parameters())
    learn(adapter, optimizer, 0)
    if inside:
        adapter.begin_task("task-1")
        train(adapter, optimizer, data(1), epochs=1)
    state = saved(adapter, optimizer)

    other = attach(network(1))
    second = adam(other.parameters())
    if optimizer_first:  # one that was used before
        other.begin_task("task-0")
        train(other, second, data(3), epochs=1)
    other.model.load_state_dict(state["model"])
    for what in ("o", "a") if optimizer_first else ("a", "o"):
        {"a": other, "o": second}[what].load_state_dict(state[what])
    for a, o in ((adapter, optimizer), (other, second)):
        if not inside:
            a.begin_task("task-1")
        train(a, o, data(1))
        a.observe(data(1))
        a.end_task()
    assert equal(bits(adapter), bits(other))


def test_two_adapters_may_share_an_optimizer() -> None:
    """Each keeps its momentum, though they have finished different numbers of tasks: the bits of one optimizer each."""

    def pair() -> list[Any]:
        adapters = [attach(network(seed), rank=rank) for seed, rank in ((0, 8), (1, 4))]
        learn(adapters[0], torch.optim.SGD(adapters[0].parameters(), lr=0.1), 0)
        adapters[0].begin_task("task-1")
        adapters[1].begin_task("task-0")
        return adapters

    results = []
    for shared in (True, False):
        adapters = pair()
        optimizers = [adam([p for a in adapters for p in a.parameters()])] if shared else []
        optimizers = optimizers or [adam(a.parameters()) for a in adapters]
        for x, y in data(1):
            for a in adapters:
                functional.cross_entropy(a.model(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        results.append([bits(a) for a in adapters])
    assert all(equal(one, two) for one, two in zip(*results, strict=True))


def test_a_loaded_optimizer_steps_after_growing() -> None:
    """Its state has the old shapes."""
    adapter = attach(network(), rank=4)
    optimizer = adam(adapter.parameters())
    learn(adapter, optimizer, 0)
    fresh = adam(adapter._all())
    optimizer_state = adam(adapter._all())
    for p in adapter._all():
        p.grad = torch.zeros_like(p)
    optimizer_state.step()
    fresh.load_state_dict(copy.deepcopy(optimizer_state.state_dict()))
    adapter.expand(2)
    with adapter.task("task-1"):
        train(adapter, fresh, data(1))


def test_a_state_is_a_copy() -> None:
    """What is learned afterwards does not reach it."""
    adapter = attach(network())
    optimizer = adam(adapter.parameters())
    learn(adapter, optimizer, 0)
    state, want = adapter.state_dict(), adapter.model(X)
    learn(adapter, optimizer, 1)
    other = attach(network())
    other.load_state_dict(state)
    assert other.tasks == ["task-0"]
    assert torch.equal(other.model(X), want)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_adapter_and_model_are_copied_together(how: Any) -> None:
    """The copy goes on by itself, inside a task, too."""
    adapter = attach(network())
    optimizer = adam(adapter.parameters())
    adapter.protect(optimizer, energy=0.9)
    learn(adapter, optimizer, 0)
    adapter.begin_task("task-1")
    train(adapter, optimizer, data(1), epochs=1)
    model, other = how((adapter.model, adapter))
    assert other.model is model
    before = bits(adapter)
    train(other, adam(other.parameters()), data(1))
    assert equal(bits(adapter), before)
    other.observe(data(1))
    other.end_task()
    other.restore("task-0")
    adapter.observe(data(1))
    adapter.end_task()
    adapter.restore("task-0")
    assert torch.equal(other.model(X), adapter.model(X))


# --- protection


class Lookahead(torch.optim.Optimizer):
    """Looks like an optimizer, and is none."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def test_optimizers_that_cannot_be_seen_are_refused() -> None:
    """Their steps would leak."""
    adapter = attach(network())
    with pytest.raises(OptionError, match="can't be seen"):
        adapter.protect(Lookahead(adam(adapter.parameters())))


@pytest.mark.parametrize("autocast", [False, True])
def test_every_optimizer_of_the_adapter_is_projected(autocast: bool) -> None:
    """Two share the layers, one was named; a write past both is projected before it is recorded."""
    adapter = attach(network(), factors="never")
    first, second = adam(adapter.layers["0"].trained()), adam([*adapter.layers["2"].trained()])
    adapter.protect(first, energy=0.9)
    with adapter.task("task-0"):
        adapter.observe(data(0))
    spans = {name: core.protected_basis(part.S, energy=0.9) for name, part in adapter.layers.items()}

    def leak(name: str, R: Any) -> float:
        U, weights = spans[name]
        assert R.norm() > 0
        return float(((R.double() @ U) * weights).norm() / R.double().norm())

    with adapter.task("task-1"):
        for x, y in data(1):
            functional.cross_entropy(adapter.model(x), y).backward()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                first.step()
                second.step()
        # (I - P) and its use each round 2 r + 2 times, and R_delta is no larger than what it was before: 8 sqrt(r) u.
        for name in ("0", "2"):
            assert leak(name, adapter.layers[name].R_delta.detach()) <= (4 * 8 + 4) * 8**0.5 * 2.0**-24
        with torch.no_grad():
            adapter.layers["0"].R_delta.add_(torch.randn(8, 8))
        adapter.observe(data(1))
        assert leak("0", adapter.layers["0"].R_delta.detach()) <= (4 * 8 + 4) * 8**0.5 * 2.0**-24


def test_autocast_stays_out_of_the_adapters_own_sums() -> None:
    """Penalty, meter and merge have the same bits inside and outside."""
    adapter = attach(network())
    optimizer = adam(adapter.parameters())
    learn(adapter, optimizer, 0)
    adapter.begin_task("task-1")
    stir(adapter)

    def everything() -> list[Any]:
        penalties = [adapter.penalty(), adapter.penalty(kind="orthogonality", form="output")]
        return [*(p.detach() for p in penalties), torch.tensor(list(adapter.drift().values()))]

    want = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(everything(), want, strict=True))
    adapter.end_task()
    adapter.merge()
    weights = [p.clone() for p in adapter.model.parameters()]
    adapter.unmerge()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapter.merge()
    assert all(torch.equal(a, b) for a, b in zip(adapter.model.parameters(), weights, strict=True))


@pytest.mark.parametrize(
    "options", [{"since": "task-end"}, {"snce": "boundary"}, {"kind": "orthogonality", "form": "outputs"}]
)
def test_a_misspelt_penalty_is_refused_in_the_first_task(options: dict[str, Any]) -> None:
    """Where it would be 0, and raise only in the second."""
    adapter = attach(network())
    adapter.begin_task("task-0")
    with pytest.raises(OptionError, match=r"task-end|snce|outputs"):
        adapter.penalty(**options)


# --- contexts, casts


def test_contexts_nest() -> None:
    """Leaving the inner one leaves the outer one as it was; merging waits for both."""
    adapter = attach(network())
    optimizer = adam(adapter.parameters())
    for task in range(2):
        learn(adapter, optimizer, task)
    names = ["task-0"] * len(X)
    with adapter.disabled():
        base = adapter.model(X)
        with adapter.disabled():
            pass
        assert torch.equal(adapter.model(X), base)
        with pytest.raises(StateError, match="is open"):
            adapter.merge()
    with adapter.rows(names):
        first = adapter.model(X)
        with adapter.rows(["task-1"] * len(X)):
            assert not torch.equal(adapter.model(X), first)
        assert torch.equal(adapter.model(X), first)
        with pytest.raises(StateError, match="is open"):
            adapter.merge()
    for wrong in ("task-0", []):
        with pytest.raises(OptionError, match="for each row"):
            adapter.rows(wrong).__enter__()


def test_casts_between_verbs() -> None:
    """A model may be cast while merged, after tasks, and inside a protected task."""
    adapter = attach(network())
    net, optimizer = adapter.model, adam(adapter.parameters())
    learn(adapter, optimizer, 0)
    adapter.merge()
    net.double()
    adapter.unmerge()
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    x = X.double()
    want = net(x)
    with adapter.rows(["task-0"] * len(x)):
        assert (net(x) - want).abs().max() <= 2.0**-44 * want.abs().max()  # a few sums of float64, otherwise ordered
    adapter.protect(optimizer, energy=0.9)
    adapter.begin_task("task-1")
    adapter.penalty()
    net.float()
    stir(adapter)
    adapter.penalty().backward()
    optimizer.step()
    assert adapter.drift()


def test_going_back_in_inference_mode() -> None:
    """Arrays made there could not be trained afterwards."""
    adapter = attach(network(), rank=4, max_rank=8, factors="never")
    optimizer = adam(adapter.parameters())
    learn(adapter, optimizer, 0)
    adapter.expand(2)
    learn(adapter, optimizer, 1)
    with torch.inference_mode():
        adapter.restore("task-0")
        adapter.restore("task-1")
    learn(adapter, optimizer, 2)


def test_one_batch_is_not_batches() -> None:
    """A tensor would be taken apart row by row."""
    adapter = attach(network())
    adapter.begin_task("task-0")
    for batch in (X, {"x": X}):
        with pytest.raises(OptionError, match=r"\[batch\]"):
            adapter.observe(batch)


def test_a_compiled_model_follows_every_verb() -> None:
    """One compiled model over a life: each verb changes what it computes, as it does in eager mode."""
    adapter = attach(network().double(), rank=4, max_rank=6, factors="never")
    net, optimizer, x = adapter.model, adam(adapter.parameters()), X.double()
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")

    def same() -> Any:
        y = net(x).detach()
        assert (compiled(x) - y).abs().max() <= 2.0**-42 * y.abs().max()  # R is folded into A: other sums of float64
        return y

    seen = [same()]
    for task in range(2):
        learn(adapter, optimizer, task, dtype="float64")
        seen.append(same())
    adapter.restore("task-0")
    assert torch.equal(same(), seen[1])
    adapter.restore("task-1")
    with adapter.disabled():
        assert torch.equal(same(), seen[0])
    with adapter.rows(["task-0", "task-1"] * 8):
        same()
    adapter.merge()
    same()
    adapter.unmerge()
    adapter.expand(2)
    same()
    assert (net(x) - seen[2]).abs().max() <= 2.0**-42 * seen[2].abs().max()


@pytest.mark.parametrize("kind", ["linear", "slice", "embedding", "conv", "attention", "head"])
def test_rows_of_another_number_are_refused_by_every_kind_of_layer(kind: str) -> None:
    """Else a routing would be broadcast over rows of other tasks."""
    layers: dict[str, tuple[Any, dict[str, Any], Any]] = {
        "linear": (nn.Linear(8, 8), {"targets": "0"}, torch.randn(3, 8)),
        "slice": (nn.Linear(8, 24), {"targets": "0[q]"}, torch.randn(3, 8)),
        "embedding": (nn.Embedding(8, 8), {"targets": "0"}, torch.zeros(3, 2, dtype=torch.int64)),
        "conv": (nn.Conv1d(8, 8, 3), {"targets": "0"}, torch.randn(3, 8, 5)),
        "attention": (nn.MultiheadAttention(8, 2, batch_first=True), {"targets": "0"}, torch.randn(3, 4, 8)),
        "head": (nn.Linear(8, 8), {"targets": (), "heads": "0"}, torch.randn(3, 8)),
    }
    layer, options, x = layers[kind]
    adapter = clora.attach(nn.Sequential(layer), rank=2, factors="never", seed=0, **options)
    adapter.begin_task("a")
    adapter.end_task()
    inputs = (x, x, x) if kind == "attention" else (x,)
    with adapter.rows(["a"] * 3):
        layer(*inputs)
    with adapter.rows(["a"] * 2), pytest.raises(StateError, match="3 rows; needed 2"):
        layer(*inputs)
