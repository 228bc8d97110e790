"""clora_numpy and clora_torch save and load through clora_store, and read each other's folders."""

import copy
import json
import sys
import types
import warnings
from pathlib import Path

import kit
import numpy as np
import pytest
from folders import same

import clora_core as core
import clora_numpy
import clora_store as store
from clora_core.errors import FormatError, MomentsIncomplete, OptionError, ShapeError, StateError

if kit.torch is None:
    pytest.skip(kit.NO_TORCH, allow_module_level=True)
import torch
from torch import nn

import clora_torch
from clora_numpy import folders as numpy_folders
from clora_torch import _store as torch_store

D_IN, HIDDEN, CLASSES = 10, 12, 3


def base(seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal(s).astype(np.float32) / 3 for s in ((HIDDEN, D_IN), (HIDDEN, HIDDEN), (CLASSES, HIDDEN))
    ]


def numpy_network(dtype=np.float32):
    W, V, H = (array.astype(dtype) for array in base())
    return clora_numpy.Network(
        {
            "0": clora_numpy.Layer(W),
            "1": clora_numpy.Relu(),
            "2": clora_numpy.Layer(V),
            "3": clora_numpy.Relu(),
            "4": clora_numpy.Head(H),
        }
    )


def torch_model(dtype=torch.float32):
    W, V, H = base()
    model = nn.Sequential(
        nn.Linear(D_IN, HIDDEN, bias=False),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN, bias=False),
        nn.ReLU(),
        nn.Linear(HIDDEN, CLASSES),
    )
    with torch.no_grad():
        for i, weight in ((0, W), (2, V), (4, H)):
            model[i].weight.copy_(torch.from_numpy(weight))
        model[4].bias.zero_()
    return model.to(dtype)


def data(task, n=40):
    rng = np.random.default_rng(100 + task)
    return rng.standard_normal((n, D_IN)).astype(np.float32), rng.integers(0, CLASSES, n)


def numpy_steps(network, adapter, task, *, observe=True, protect=True):
    optimizer = clora_numpy.Optimizer(adapter, clora_numpy.sgd(0.05, momentum=0.5))
    if protect:
        adapter.protect(optimizer, energy=0.6)
    x, labels = data(task)
    for _ in range(4):
        _, grad = clora_numpy.cross_entropy(network.forward(x), labels)
        network.backward(grad)
        optimizer.step()
    if observe:
        adapter.observe([x])


def torch_steps(model, adapter, task, *, observe=True, protect=True):
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05, momentum=0.5)
    if protect:
        adapter.protect(optimizer, energy=0.6)
    x, labels = (torch.from_numpy(a) for a in data(task))
    for _ in range(4):
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    if observe:
        adapter.observe([x])


def bound(state, x, task=None):
    """Of |output - exact|, layer by layer, from `clora_core.bounds`: each layer's own rounding, and the input's error
    through it."""
    W, V, _ = base()
    error, y = np.zeros_like(x, dtype=np.float64), x.astype(np.float64)
    for name, weight in (("0", W), ("2", V)):
        adapter = core.Adapter(*(a.astype(np.float64) for a in store.adapter_at(state, name, task)))
        fine = core.Adapter(*(a.astype(np.float32) for a in adapter))
        own = core.bounds.linear(y.astype(np.float32), weight, fine).astype(np.float64)
        whole = abs(weight.astype(np.float64)) + core.delta(core.Adapter(*(abs(a) for a in adapter)))
        error = error @ whole.T + 2 * own + 2.0**-22 * (abs(y) @ whole.T)
        y = np.maximum(core.linear(y, weight.astype(np.float64), adapter), 0)
    head = core.routing(store.adapter_at(state, "4", task)).astype(np.float64)
    size = abs(y) @ abs(head[:, :-1]).T + abs(head[:, -1])
    return error @ abs(head[:, :-1]).T + (HIDDEN + 4) * 2.0**-23 * size


def outputs(kind, model, x):
    if kind == "numpy":
        return model.forward(x)
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


def fresh(kind, folder=None, **options):
    """A base model of that framework, attached to or loaded onto."""
    model = numpy_network() if kind == "numpy" else torch_model()
    package = clora_numpy if kind == "numpy" else clora_torch
    if folder is not None:
        return model, package.load(model, folder)
    if kind == "numpy":
        return model, clora_numpy.attach(model, rank=4, rng=0, **options)
    return model, clora_torch.attach(model, rank=4, targets=["0", "2"], heads="4", seed=0, **options)


def same_adapter(one, two):
    """But for what a framework says of itself."""
    same(*(state._replace(options={}, provenance={}) for state in (one, two)))


STEPS = {"numpy": numpy_steps, "torch": torch_steps}
STATE = {"numpy": numpy_folders.to_state, "torch": torch_store.to_state}


@pytest.mark.parametrize(
    ("name", "base"), [("/srv/models/tiny", "tiny"), ("org/tiny", "org/tiny"), (None, "Sequential")]
)
def test_of_a_base_model_on_this_disk_only_the_last_name_is_kept(tmp_path, name, base):
    model = torch_model()
    if name is not None:
        model.config = types.SimpleNamespace(_name_or_path=name)
    clora_torch.attach(model, rank=2, targets=["0"]).save(tmp_path)
    assert store.load(tmp_path).provenance["base"] == base
    assert "srv" not in (tmp_path / "clora.json").read_text()


@pytest.mark.parametrize("factors", ["first-task", "every-task", "never"])
@pytest.mark.parametrize("first", ["numpy", "torch"])
@pytest.mark.parametrize("second", ["numpy", "torch"])
def test_a_folder_means_the_same_in_every_framework(tmp_path, first, second, factors):
    moving = factors == "every-task"
    model, adapter = fresh(first, factors=factors)
    for task in range(2):
        with adapter.task(f"task-{task}"):
            STEPS[first](model, adapter, task, observe=not moving, protect=not moving)
        adapter.save(tmp_path)
    state = store.load(tmp_path)
    other, loaded = fresh(second, tmp_path)
    assert loaded.tasks == ["task-0", "task-1"]
    assert loaded.factors == factors
    x, _ = data(9)
    for task in ("task-0", "task-1"):
        adapter.restore(task)
        loaded.restore(task)
        a, b = outputs(first, model, x), outputs(second, other, x)
        assert (abs(a - b) <= 2 * bound(state, x, task)).all()
        if first == second:
            assert (a == b).all()
    if not moving:
        one, two = adapter.drift(), loaded.drift()
        for name in one:
            moments = core.Moments(*state.layers[name].moments)
            wide = core.Adapter(*(a if a is None else a.astype(np.float64) for a in state.layers[name].adapter))
            assert abs(one[name] - two[name]) <= 2 * core.bounds.drift(wide, moments)
    same(
        STATE[second](loaded)._replace(options={}, provenance={}),
        state._replace(options={}, provenance={}, digest=None),
    )
    with loaded.task("task-2"):  # and it goes on
        STEPS[second](other, loaded, 2, observe=not moving, protect=not moving)
    loaded.save(tmp_path)
    assert store.load(tmp_path).tasks == ("task-0", "task-1", "task-2")


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_run_that_is_saved_and_loaded_in_every_task_ends_with_the_same_bits(tmp_path, kind):
    model, adapter = fresh(kind)
    for task in range(3):
        with adapter.task(f"task-{task}"):
            STEPS[kind](model, adapter, task)
    for task in range(3):
        other, again = fresh(kind, tmp_path if task else None)
        with again.task(f"task-{task}"):
            STEPS[kind](other, again, task)
        again.save(tmp_path)
    same(store.load(tmp_path)._replace(digest=None), STATE[kind](adapter))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("other", ["numpy", "torch"])
def test_an_open_task_goes_on(tmp_path, kind, other):
    model, adapter = fresh(kind)
    with adapter.task("task-0"):
        STEPS[kind](model, adapter, 0)
    adapter.begin_task("task-1")
    STEPS[kind](model, adapter, 1)
    adapter.save(tmp_path)
    loaded_model, loaded = fresh(other, tmp_path)
    with pytest.raises(StateError, match="'task-1' is still open"):
        loaded.begin_task("task-2")
    x, _ = data(9)
    before = outputs(other, loaded_model, x)
    with loaded.task("task-1"):
        assert (outputs(other, loaded_model, x) == before).all()
    adapter.end_task()
    loaded.save(tmp_path)
    one, two = STATE[kind](adapter), store.load(tmp_path)
    if kind == other:
        same_adapter(one, two)
    else:  # the memory is summed in another order
        for name, layer in one.layers.items():
            S, P, q = two.layers[name].moments
            exact = core.Moments(*layer.moments)
            wide = core.Adapter(*(a if a is None else a.astype(np.float64) for a in layer.adapter))
            sizes = core.bounds.record(core.Moments(abs(S), abs(P), abs(q)), wide, S)
            for got, expected, limit in zip((S, P, q), exact, sizes, strict=True):
                assert (abs(got - expected) <= 2 * limit).all()


def test_spare_directions_and_grown_ranks_and_heads_travel(tmp_path):
    model, adapter = fresh("torch", max_rank=8, scale=0.5)
    with adapter.task("a"):
        torch_steps(model, adapter, 0)
    adapter.expand(2, seed=1)
    adapter.grow_head("4", 2)
    with adapter.task("b"):
        torch_steps(model, adapter, 1, protect=False)
    adapter.save(tmp_path)
    before = store.load(tmp_path)
    network, loaded = fresh("numpy", tmp_path)
    same_adapter(numpy_folders.to_state(loaded), before)
    assert numpy_folders.to_state(loaded).options == before.options
    x, _ = data(9)
    for task, classes in (("a", CLASSES + 2), ("b", CLASSES + 2)):
        adapter.restore(task)
        loaded.restore(task)
        assert outputs("numpy", network, x).shape[1] == classes
        assert (
            abs(outputs("torch", model, x) - outputs("numpy", network, x)) <= 2 * bound(store.load(tmp_path), x, task)
        ).all()
    with loaded.disabled():
        assert network.forward(x).shape[1] == CLASSES + 2
    with loaded.task("c"):
        numpy_steps(network, loaded, 2, protect=False)
    loaded.save(tmp_path)
    again, back = fresh("torch", tmp_path)
    assert back.layers["0"].rank == 6
    back.expand(1)  # the last spare direction, observed in all three tasks, one of them by numpy
    back.drift()
    back.restore("a")
    adapter.restore("a")
    assert torch.equal(again(torch.from_numpy(x)), model(torch.from_numpy(x)))


def test_directions_that_were_not_observed_stay_so(tmp_path):
    model, adapter = fresh("torch")
    with adapter.task("a"):
        torch_steps(model, adapter, 0)
    adapter.expand(1)
    adapter.save(tmp_path)
    for kind in ("numpy", "torch"):
        _, loaded = fresh(kind, tmp_path)
        loaded.save(tmp_path)
        _, loaded = fresh(kind, tmp_path)
        with pytest.raises(MomentsIncomplete, match="not observed in all directions"):
            loaded.drift()


def test_an_adapter_saves_over_its_own_folder_alone(tmp_path):
    for kind in ("numpy", "torch"):
        _, one = fresh(kind)
        model, two = fresh(kind)
        with two.task("another"):
            STEPS[kind](model, two, 0)
        folder = tmp_path / kind
        one.save(folder)
        one.save(folder)
        with pytest.raises(StateError, match="holds another adapter"):
            two.save(folder)
        two.save(folder, overwrite=True)
        with pytest.raises(StateError, match="another state of this one"):
            one.save(folder)
        _, three = fresh(kind, folder)
        three.save(folder)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_the_name_of_a_task_is_a_text(kind):
    _, adapter = fresh(kind)
    with pytest.raises(StateError, match=r"the name of a task is a int.*str\(name\)"):
        adapter.begin_task(2)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_folder_without_snapshots_goes_on(tmp_path, kind):
    model, adapter = fresh(kind)
    with adapter.task("a"):
        STEPS[kind](model, adapter, 0)
    store.save(tmp_path, STATE[kind](adapter)._replace(snapshots={}))
    for task in ("b", "c"):
        model, loaded = fresh(kind, tmp_path)
        with pytest.raises(StateError, match="no finished task 'a'"):
            loaded.restore("a")
        with pytest.raises(StateError, match="a task named 'a' is finished already"):
            loaded.begin_task("a")
        with loaded.task(task):
            STEPS[kind](model, loaded, 1)
        loaded.save(tmp_path)
    assert list(store.load(tmp_path).snapshots) == ["b", "c"]
    if kind == "torch":
        _, other = fresh(kind, tmp_path)
        other.load_state_dict(loaded.state_dict())
        assert list(other._snapshots) == ["b", "c"]


@pytest.mark.parametrize("factors", ["first-task", "every-task"])
def test_restoring_other_ranks_after_a_load_breaks_nothing(tmp_path, factors):
    moving = factors == "every-task"
    model, adapter = fresh("torch", max_rank=5, factors=factors)
    for task in "ab":
        with adapter.task(task):
            torch_steps(model, adapter, 0, observe=not moving, protect=False)
        if task == "a":
            adapter.expand(1)  # to the highest rank: nothing is spare
    adapter.save(tmp_path)
    network, loaded = fresh("numpy", tmp_path)
    x, _ = data(9)
    for task in ("a", "b", "a", "a", "b"):
        loaded.restore(task)
        adapter.restore(task)
        limit = 2 * bound(STATE["torch"](adapter), x)
        assert (abs(outputs("numpy", network, x) - outputs("torch", model, x)) <= limit).all()
        if not moving:
            loaded.drift()
        loaded.save(tmp_path)
        again, back = fresh("torch", tmp_path)
        for other in ("a", "b"):
            back.restore(other)
            adapter.restore(other)
            assert (abs(outputs("torch", again, x) - outputs("torch", model, x)) == 0).all()
    loaded.restore("a")
    with loaded.task("c"):
        numpy_steps(network, loaded, 1, protect=False)  # observed, of which nothing comes where factors move
    loaded.save(tmp_path)
    assert store.load(tmp_path).tasks == ("a", "b", "c")


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_spare_directions_beyond_those_of_any_snapshot_are_kept(tmp_path, kind):
    """Grown twice, gone back to the first task, saved: the direction that no task has used yet is there."""
    model, adapter = fresh(kind, factors="every-task", max_rank=5)
    steps = numpy_steps if kind == "numpy" else torch_steps
    for task in range(2):
        with adapter.task(f"task-{task}"):
            steps(model, adapter, task, observe=False, protect=False)
        adapter.expand(1, seed=0)
    adapter.restore("task-0")
    adapter.save(tmp_path / "folder")
    want = store.load(tmp_path / "folder")
    for other in ("numpy", "torch"):
        loaded = fresh(other, tmp_path / "folder")[1]
        state = (numpy_folders if other == "numpy" else torch_store).to_state(loaded)
        for name, layer in want.layers.items():
            if layer.spare is not None:
                assert layer.spare[1].shape[0] == 2
                assert np.array_equal(state.layers[name].spare[1], layer.spare[1])


def test_a_model_that_changes_its_dtype_is_saved(tmp_path):
    model, adapter = fresh("torch")
    with adapter.task("a"):
        torch_steps(model, adapter, 0)
    model.double()
    adapter.save(tmp_path)
    loaded = clora_torch.load(torch_model(torch.float64), tmp_path)
    assert loaded.layers["0"].R_old.dtype == torch.float64
    loaded.restore("a")


@pytest.mark.parametrize(
    "options", [{"dropout": "x"}, {"dropout": 7.0}, {"scale": [1]}, {"scale": 10**400}, {"stop_old": "false"}]
)
def test_options_that_attach_would_refuse_are_refused(tmp_path, options):
    _, adapter = fresh("torch")
    adapter.save(tmp_path)
    book = json.loads((tmp_path / "clora.json").read_text(encoding="utf-8"))
    (tmp_path / "clora.json").write_text(json.dumps({**book, "options": {**book["options"], **options}}))
    for kind in ("torch", "numpy"):
        with pytest.raises(FormatError, match="options that no adapter has"):
            fresh(kind, tmp_path)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_name_that_no_layer_has_is_refused(tmp_path, kind):
    _, adapter = fresh(kind)
    adapter.save(tmp_path)
    package, model = (clora_numpy, numpy_network()) if kind == "numpy" else (clora_torch, torch_model())
    with pytest.raises(OptionError, match=r"names= names no layer. Got 'nonsense'"):
        package.load(model, tmp_path, names={"nonsense": "0"})


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_state_by_hand_is_checked(kind):
    _, adapter = fresh(kind)
    state = STATE[kind](adapter)
    layer = state.layers["0"]
    broken = layer._replace(adapter=layer.adapter._replace(B=layer.adapter.B[:, :3]))
    package, model = (clora_numpy, numpy_network()) if kind == "numpy" else (clora_torch, torch_model())
    with pytest.raises(FormatError, match=r"tensor 0.B has another shape"):
        package.load(model, state._replace(layers={**state.layers, "0": broken}))


def test_two_layers_do_not_land_on_one(tmp_path):
    _, adapter = fresh("torch")
    adapter.save(tmp_path)
    with pytest.raises(OptionError, match="two saved layers belong to one module"):
        clora_torch.load(torch_model(), tmp_path, names={"2": "0"})
    with pytest.raises(OptionError, match="two layers on one"):
        clora_numpy.load(numpy_network(), tmp_path, names={"2": "0"})


def test_what_is_merged_is_not_saved(tmp_path):
    for kind in ("numpy", "torch"):
        model, adapter = fresh(kind)
        with adapter.task("a"):
            STEPS[kind](model, adapter, 0)
        adapter.merge()
        with pytest.raises(StateError, match="merged into the weights"):
            adapter.save(tmp_path / kind)
        assert not (tmp_path / kind).exists()


def test_a_folder_for_another_model_is_refused_and_nothing_changes(tmp_path):
    _, adapter = fresh("torch")
    adapter.save(tmp_path)
    cases = [
        (nn.Sequential(nn.Linear(D_IN, HIDDEN)), OptionError, r"no module for layer '2'"),
        (nn.Sequential(*torch_model()[:4], nn.Linear(HIDDEN, CLASSES + 1)), ShapeError, "module '4' is not the one"),
        (
            nn.Sequential(*torch_model()[:4], nn.Linear(HIDDEN, CLASSES, bias=False)),
            ShapeError,
            "a bias in one of the two",
        ),
        (nn.Sequential(*torch_model()[:2], nn.ReLU(), *torch_model()[3:]), OptionError, "layer '2' can't be adapted"),
        (nn.ModuleDict({"encoder": torch_model()}), OptionError, r"near: 'encoder.0'"),
    ]
    for model, error, match in cases:
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(error, match=match):
            clora_torch.load(model, tmp_path)
        assert {name: type(module) for name, module in model.named_modules()} == before
        assert all(parameter.requires_grad for parameter in model.parameters())
    model, _ = fresh("torch", tmp_path)
    with pytest.raises(StateError, match="has adapters already"):
        clora_torch.load(model, tmp_path)
    network = numpy_network()
    del network.modules["2"]
    with pytest.raises(OptionError, match="no Layer for layer '2'"):
        clora_numpy.load(network, tmp_path)
    network = numpy_network()
    network.modules["2"] = clora_numpy.Layer(np.zeros((HIDDEN, D_IN), np.float32))
    with pytest.raises(ShapeError, match="layer '2' has another size here"):
        clora_numpy.load(network, tmp_path)
    assert network.modules["0"].adapter is None


def test_names_of_another_model_can_be_given(tmp_path):
    model, adapter = fresh("torch")
    adapter.save(tmp_path)
    wrapped = nn.ModuleDict({"encoder": torch_model()})
    clora_torch.load(wrapped, tmp_path, names={n: f"encoder.{n}" for n in ("0", "2", "4")})
    x = torch.from_numpy(data(9)[0])
    assert torch.equal(wrapped["encoder"](x), model(x))


def test_half_precision_in_a_folder_becomes_float32(tmp_path):
    model, adapter = fresh("torch")
    with adapter.task("a"):
        torch_steps(model, adapter, 0)
    state = torch_store.to_state(adapter)

    def half(array):
        return array if array is None or array.dtype != np.float32 else array.astype(np.float16)

    layers = {
        name: layer._replace(adapter=core.Adapter(*map(half, layer.adapter))) for name, layer in state.layers.items()
    }
    snapshots = {"a": {name: store.Snapshot(half(s.R)) for name, s in state.snapshots["a"].items()}}
    store.save(tmp_path, state._replace(layers=layers, snapshots=snapshots))
    x, _ = data(9)
    one, loaded = fresh("torch", tmp_path)
    two, _ = fresh("numpy", tmp_path)
    assert loaded.layers["0"].R_old.dtype == torch.float32
    assert (abs(outputs("torch", one, x) - outputs("numpy", two, x)) <= 2 * bound(store.load(tmp_path), x)).all()


def test_bf16_models_and_other_layers(tmp_path):
    """A bf16 base, an embedding, a convolution, slices of fused projections, tied weights."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.conv = nn.Conv1d(8, 8, 3, padding=1)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.Linear(8, 11, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids):
            x = self.conv(self.embed(ids).mT).mT
            return self.out(self.attention(x, x, x, need_weights=False)[0])

    model = Model().bfloat16()
    clone = copy.deepcopy(model)
    adapter = clora_torch.attach(
        model, rank=2, targets=["embed", "conv", "in_proj_weight[q]", "in_proj_weight[v]", "out_proj"], seed=0
    )
    ids = torch.arange(12).reshape(2, 6) % 11
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    with adapter.task("a"):
        model(ids).float().square().mean().backward()
        optimizer.step()
    adapter.save(tmp_path)
    state = store.load(tmp_path)
    targets = {name: layer.target for name, layer in state.layers.items()}
    assert targets["embed"] == store.Target("embed.weight", (11, 8), "in,out", tied=("out.weight",))
    assert targets["conv"] == store.Target("conv.weight", (8, 8, 3))
    assert targets["attention[16:24]"] == store.Target("attention.in_proj_weight", (24, 8), rows=(16, 24))
    loaded = clora_torch.load(clone, tmp_path)
    assert set(loaded.layers) == set(adapter.layers)
    assert torch.equal(clone(ids), model(ids))
    assert clone.embed.clora.A.dtype == torch.float32


def test_a_conv1d_of_transformers_is_saved_in_its_layout(tmp_path):
    transformers = pytest.importorskip("transformers", reason=kit.NO_PEERS)
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=13, n_positions=8)
    torch.manual_seed(0)
    model = transformers.GPT2Model(config).eval()
    clone = copy.deepcopy(model)
    adapter = clora_torch.attach(model, rank=2, targets=["c_attn[q]", "c_attn[v]", "c_fc"], seed=0)
    with torch.no_grad():
        for part in adapter.layers.values():
            part.R_delta.normal_()
    with adapter.task("a"):
        pass
    adapter.save(tmp_path / "folder")
    target = store.load(tmp_path / "folder").layers["h.0.attn.c_attn[0:8]"].target
    assert target == store.Target("h.0.attn.c_attn.weight", (8, 24), "in,out", rows=(0, 8))
    ids = torch.arange(6)[None]
    loaded = clora_torch.load(clone, tmp_path / "folder")
    assert torch.equal(clone(ids).last_hidden_state, model(ids).last_hidden_state)
    loaded.detach()
    clone.save_pretrained(tmp_path / "base")
    store.merge_checkpoint(tmp_path / "base", store.load(tmp_path / "folder"), tmp_path / "merged")
    merged = transformers.GPT2Model.from_pretrained(tmp_path / "merged").eval()
    adapter.merge()
    for name, weight in model.state_dict().items():
        got = merged.state_dict()[name]
        limit = 2.0**-20 * (1 + weight.abs())  # two roundings of float32 sums of rank 2; entries are of order 1
        assert ((got - weight).abs() <= limit).all(), name


def by_peft(model, folder):
    """PEFT's own loader, without the deprecations that it meets in transformers."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.fixture(scope="module")
def minilm():
    for module in ("transformers", "peft"):
        pytest.importorskip(module, reason=kit.NO_PEERS)
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    import torch_text

    return torch_text.weights()


def test_peft_gives_the_outputs_of_a_real_transformer(minilm, tmp_path):
    """all-MiniLM-L6-v2: present state, an earlier task, and a difference, through PeftModel.from_pretrained."""
    import transformers

    torch.manual_seed(0)

    def encoder():
        return transformers.AutoModel.from_pretrained(minilm).eval()

    model = encoder()
    adapter = clora_torch.attach(model, rank=8, targets=["query", "key", "value", "intermediate.dense"], seed=0)
    tokens = torch.randint(1000, 20000, (4, 16))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    for task in ("a", "b"):
        with adapter.task(task):
            for _ in range(3):
                model(tokens).last_hidden_state.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            adapter.observe([{"input_ids": tokens}])
    adapter.save(tmp_path / "folder")
    outs = {}
    for task in ("a", "b"):
        adapter.restore(task)
        with torch.no_grad():
            outs[task] = model(tokens).last_hidden_state
    with adapter.disabled(), torch.no_grad():
        plain = model(tokens).last_hidden_state

    def with_peft(folder):
        with torch.no_grad():
            return by_peft(encoder(), folder)(tokens).last_hidden_state

    for task in ("a", "b"):
        adapter.export_peft(tmp_path / task, task=task)
        got = with_peft(tmp_path / task)
        change = (outs[task] - plain).norm()
        assert change > 0.1
        # Six layers amplify the rounding of float32 (2^-24); the change that the adapter makes stands far above it.
        assert (got - outs[task]).norm() <= 2.0**-14 * outs[task].norm()
        assert (got - outs[task]).norm() <= 2.0**-8 * change
    store.export_peft(store.load(tmp_path / "folder"), tmp_path / "vllm", vllm=True)
    assert store.vllm_problems(tmp_path / "vllm", max_lora_rank=8) == []
    assert torch.equal(with_peft(tmp_path / "vllm"), with_peft(tmp_path / "b"))
    back = store.import_peft(tmp_path / "b", task="theirs")
    again = encoder()
    clora_torch.load(again, back)
    with torch.no_grad():
        assert (again(tokens).last_hidden_state - outs["b"]).norm() <= 2.0**-14 * outs["b"].norm()


def test_a_classifier_travels_through_peft_and_merging(tmp_path):
    for module in ("transformers", "peft"):
        pytest.importorskip(module, reason=kit.NO_PEERS)
    import transformers

    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "base")
    adapter = clora_torch.attach(model, rank=4, targets=["query", "word_embeddings"], heads="classifier", seed=0)
    ids = torch.randint(0, 30, (5, 7))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    with adapter.task("a"):
        for _ in range(3):
            model(ids).logits.square().mean().backward()
            optimizer.step()
    expected = model(ids).logits.detach()
    adapter.export_peft(tmp_path / "peft")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    theirs = by_peft(again, tmp_path / "peft")
    adapter.save(tmp_path / "folder")
    state = store.load(tmp_path / "folder")
    store.merge_checkpoint(tmp_path / "base", state, tmp_path / "merged")
    merged = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    for other in (theirs, merged):
        with torch.no_grad():
            got = other(ids).logits
        assert (got - expected).norm() <= 2.0**-16 * expected.norm()
    assert (model(ids).logits == expected).all()
