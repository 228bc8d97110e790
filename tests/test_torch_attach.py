"""clora_torch.attach: what it matches and refuses, and that the model stays the model it was."""

import copy
import io
import pickle
import re
from typing import Any

import kit
import numpy as np
import pytest

import clora_core as core
from clora_core.errors import OptionError, RankError, StateError

if kit.torch is None:
    pytest.skip(kit.NO_TORCH, allow_module_level=True)
torch: Any = kit.torch
import clora_torch as clora  # noqa: E402  (needs torch)

nn = torch.nn


class Block(nn.Module):
    """Two projections and a fused one, named as models name them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.qkv = nn.Linear(12, 12), nn.Linear(12, 12, bias=False), nn.Linear(12, 36)

    def forward(self, x: Any) -> Any:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.query(q) + self.value(v) + k


class Model(nn.Module):
    """Embedding, two blocks, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.layers = nn.ModuleList([Block(), Block()])
        self.classifier = nn.Linear(12, 3)

    def forward(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.classifier(x.mean(1))


TOKENS = torch.arange(24).reshape(4, 6) % 20


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Model()


def stir(adapter: Any, seed: int = 0) -> None:
    """Give every trained array some value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in adapter.layers.values():
            part.R_delta.add_(torch.randn(part.R_delta.shape, generator=generator) / 4)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("query", ["layers.0.query", "layers.1.query"]),
        (["query", "value"], ["layers.0.query", "layers.0.value", "layers.1.query", "layers.1.value"]),
        ("layers.0.query", ["layers.0.query"]),
        ("layers.1.*", ["layers.1.query", "layers.1.value", "layers.1.qkv"]),
        (re.compile(r"\.0\.(query|qkv)$"), ["layers.0.query", "layers.0.qkv"]),
        (["embed", "classifier"], ["embed", "classifier"]),
        ("qkv[q]", ["layers.0.qkv[0:12]", "layers.1.qkv[0:12]"]),
        (["layers.0.qkv[v]", "layers.0.qkv[0:5]"], ["layers.0.qkv[0:5]", "layers.0.qkv[24:36]"]),
        ("all-linear", [f"layers.{i}.{n}" for i in (0, 1) for n in ("query", "value", "qkv")] + ["classifier"]),
    ],
)
def test_matching(targets: Any, expected: list[str]) -> None:
    """Names, their ends, globs, regexes, slices, all; each adapted layer is named, none else is touched."""
    net = model()
    before = {n: type(m) for n, m in net.named_modules()}
    adapter = clora.attach(net, rank=2, targets=targets, seed=0)
    assert list(adapter.layers) == expected
    assert all(f"  {name}: rank 2" in str(adapter) for name in expected)
    touched = {name.partition("[")[0] for name in expected}
    assert {n for n, m in net.named_modules() if n in before and type(m) is not before[n]} == touched


def test_ranks_and_exclude() -> None:
    """The last pattern that matches gives the rank; exclude takes layers out."""
    net = model()
    adapter = clora.attach(net, rank=4, ranks={"query": 2, "layers.1.*": 3}, exclude=["classifier", "value"], seed=0)
    found = {name: part.R_delta.shape[-1] for name, part in adapter.layers.items()}
    assert found == {"layers.0.query": 2, "layers.0.qkv": 4, "layers.1.query": 3, "layers.1.qkv": 3}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"targets": "qeury"}, OptionError, ["'qeury'", "near: ", "query", "named_modules"]),
        ({"targets": ["query", re.compile("xyz")]}, OptionError, ["re.compile('xyz')", "matches no layer"]),
        ({"targets": "query", "exclude": "query"}, OptionError, ["exclude"]),
        ({"targets": "layers.0"}, OptionError, ["layers.0", "another type"]),
        ({"targets": "qkv[0:99]"}, OptionError, ["no slice", "36 outputs"]),
        ({"targets": "embed[q]"}, OptionError, ["no slice", "Embedding"]),
        ({"targets": "classifier"}, RankError, ["'classifier'", "rank=4", "heads="]),
        ({"rank": 0, "targets": "query"}, RankError, ["rank=0"]),
        ({"rank": 13, "targets": "query"}, RankError, ["1 <= rank <= 12"]),
        ({"factors": "sometimes"}, OptionError, ["'sometimes'", "'first-task'"]),
        ({"factors": "never", "scheme": "lora"}, OptionError, ["nothing could ever learn"]),
        ({"train_routing": False}, OptionError, ["nothing would learn"]),
        ({"scheme": "magic", "targets": "query"}, OptionError, ["magic"]),
        ({"dropout": 50}, OptionError, ["50", "dropout"]),
        ({"max_rank": 3}, OptionError, ["max_rank=3, rank=4"]),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    """A typed error says what, why and how to mend it, and the model is untouched."""
    net = model()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(error) as caught:
        clora.attach(net, **{"rank": 4, **options})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert type(net.layers[0].query) is nn.Linear
    assert all(p.requires_grad for p in net.parameters())
    assert list(net.state_dict()) == list(state)


class Quantised(torch.Tensor):
    """A tensor subclass, as torchao and DTensor have."""


@pytest.mark.parametrize(
    ("layer", "error", "words"),
    [
        (lambda: nn.Conv2d(4, 4, 3, groups=2), OptionError, ["grouped"]),
        (lambda: nn.Embedding(8, 4, max_norm=1.0), OptionError, ["max_norm"]),
        (lambda: nn.Linear(4, 4, device="meta"), StateError, ["meta"]),
        (lambda: nn.LayerNorm(4), OptionError, ["LayerNorm"]),
        (lambda: _quantised(nn.Linear(4, 4)), OptionError, ["Quantised", "before quantising"]),
    ],
)
def test_layers_that_cannot_be_adapted(layer: Any, error: type[Exception], words: list[str]) -> None:
    """Refused by type, with the reason."""
    with pytest.raises(error) as caught:
        clora.attach(nn.Sequential(layer()), rank=2, targets="0")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def _quantised(layer: Any) -> Any:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised))
    return layer


def test_all_linear_leaves_multihead_attention_alone() -> None:
    """Its projections are asked for by name; tests/test_torch_attention.py has them."""
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert list(clora.attach(net, rank=2, seed=0).layers) == ["linear1", "linear2"]


def test_the_fused_inference_of_an_encoder_does_not_bypass_the_adapter() -> None:
    """nn.TransformerEncoderLayer has a fast path in eval mode that reads linear1.weight directly."""
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    adapter = clora.attach(net, rank=2, seed=0)
    stir(adapter)
    slow = net(x)  # gradients are on, so no fast path
    with torch.no_grad():
        assert torch.equal(net(x), slow)


def test_attaching_twice_is_refused() -> None:
    """And the first adapter stays."""
    net = model()
    first = clora.attach(net, rank=2, targets="query", seed=0)
    with pytest.raises(StateError, match="already"):
        clora.attach(net, rank=2, targets="query")
    assert list(first.layers) == ["layers.0.query", "layers.1.query"]


@pytest.mark.parametrize("scheme", ["orthonormal", "lora", "svd"])
@pytest.mark.parametrize("targets", ["all-linear", ["embed", "query", "qkv[q]", "qkv[20:30]"]])
def test_function_and_weights_stay(scheme: str, targets: Any) -> None:
    """Attaching changes no output; base weights stay the same objects, frozen, under the same names."""
    net = model()
    weights, state, want = dict(net.named_parameters()), net.state_dict(), net(TOKENS)
    clora.attach(net, rank=2, targets=targets, heads="classifier", scheme=scheme, seed=0)
    limit = 2.0**-20 * want.abs().max()  # slices add their zeros by other operations
    assert (net(TOKENS) - want).abs().max() <= (0 if targets == "all-linear" else limit)
    after = dict(net.named_parameters())
    for name, weight in weights.items():
        assert after[name] is weight
        assert not weight.requires_grad
        assert torch.equal(weight, state[name])


def test_detach_puts_the_model_back() -> None:
    """Classes, parameter names, requires_grad, outputs; merged or not; and a second attach is possible."""
    for merge in (False, True):
        net = model()
        net.classifier.weight.requires_grad_(False)
        kinds, names, want = [type(m) for m in net.modules()], list(net.state_dict()), net(TOKENS)
        adapter = clora.attach(net, rank=2, targets=["embed", "query", "qkv[k]"], heads="classifier", seed=0)
        stir(adapter)
        if merge:
            adapter.merge()
        assert adapter.detach() is net
        assert [type(m) for m in net.modules()] == kinds
        assert list(net.state_dict()) == names
        assert torch.equal(net(TOKENS), want)
        assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["classifier.weight"]
        clora.attach(net, rank=2, targets="query", seed=0)


def adapted() -> tuple[Any, Any]:
    net = model()
    targets = ["embed", "query", "value", "layers.0.qkv[v]"]
    adapter = clora.attach(net, rank=2, targets=targets, heads="classifier", seed=0)
    stir(adapter)
    return net, adapter


def test_deepcopy_and_pickle() -> None:
    """A copy computes the same bits and shares nothing; the adapter travels with the model."""
    net, adapter = adapted()
    want = net(TOKENS)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(buffer, weights_only=False)]
    stir(adapter, 1)
    for other in copies:
        assert torch.equal(other(TOKENS), want)
        assert isinstance(other.layers[0].query, nn.Linear)


def test_state_dict_round_trip() -> None:
    """Base names stay; a second model attached in the same way loads it all, and gives the same bits."""
    net, _ = adapted()
    names = set(model().state_dict())
    assert names < set(net.state_dict())
    assert all(".clora." in name for name in set(net.state_dict()) - names)
    other = model(1)
    clora.attach(other, rank=2, targets=["embed", "query", "value", "layers.0.qkv[v]"], heads="classifier", seed=9)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(TOKENS), net(TOKENS))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_casts(dtype: str) -> None:
    """A half base keeps float32 adapters, to the bit; float64 widens them; the memory stays float64."""
    net, adapter = adapted()
    before = {n: part.R_delta.clone() for n, part in adapter.layers.items()}
    net.to(getattr(torch, dtype))
    for name, part in adapter.layers.items():
        assert part.R_delta.dtype == (torch.float64 if dtype == "float64" else torch.float32)
        assert torch.equal(part.R_delta.float(), before[name])
        assert part.S.dtype == torch.float64
    y = net(TOKENS)
    assert y.dtype == getattr(torch, dtype)
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """Both kinds give the same gradients, every bit."""
    net, adapter = adapted()
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    block = net.layers[0]

    def gradients(y: Any) -> list[Any]:
        adapter.model.zero_grad()
        x.grad = None
        y.square().sum().backward()
        return [x.grad, *(p.grad.clone() for n, p in block.named_parameters() if p.grad is not None)]

    plain = gradients(block(x))
    checkpointed = gradients(torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant))
    assert len(plain) > 5
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_and_export_whole_models(backend: str) -> None:
    """fullgraph with any batch size, one graph; export with a dynamic batch."""
    net, adapter = adapted()
    net.double()  # so that a wrong formula stands out from another order of summation by far
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    for n in (4, 3, 2):
        tokens = TOKENS[:n].clone()
        torch._dynamo.mark_dynamic(tokens, 0)
        net.zero_grad()
        compiled(tokens).square().sum().backward()
        got = [p.grad.clone() for p in adapter.parameters()]
        net.zero_grad()
        net(tokens).square().sum().backward()
        for a, p in zip(got, adapter.parameters(), strict=True):
            assert (a - p.grad).abs().max() <= 2.0**-40 * p.grad.abs().max()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    if backend == "aot_eager":
        dynamic = ({0: torch.export.Dim.DYNAMIC},)
        program = torch.export.export(net.eval(), (TOKENS,), dynamic_shapes=dynamic)
        assert (program.module()(TOKENS[:3]) - net(TOKENS[:3])).abs().max() <= 2.0**-40


def test_conv_and_embedding_are_their_weight_matrices() -> None:
    """The adapted layer is the layer with W + A R B for its weight: every conv and the embedding, by merging."""
    torch.manual_seed(0)
    for layer, x in (
        (nn.Conv1d(3, 5, 3, padding=1, stride=2), torch.randn(2, 3, 9)),
        (nn.Conv2d(3, 5, (3, 2), padding=1, dilation=2), torch.randn(2, 3, 9, 8)),
        (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), torch.randn(2, 3, 9, 8)),
        (nn.Conv2d(3, 5, 3), torch.randn(3, 9, 8)),
        (nn.Conv3d(2, 5, 2), torch.randn(2, 2, 4, 5, 3)),
        (nn.Embedding(9, 7, padding_idx=0), torch.arange(12).reshape(3, 4) % 9),
    ):
        net = nn.Sequential(layer.double())
        x = x.double() if x.is_floating_point() else x
        adapter = clora.attach(net, rank=2, targets="0", seed=0)
        stir(adapter)
        want = net(x)
        adapter.merge()
        assert (net(x) - want).abs().max() <= 2.0**-44 * want.abs().max()


def test_tied_weights() -> None:
    """The adapter belongs to the matched layer alone; merging unties, unmerging ties again."""
    net = nn.ModuleDict({"embed": nn.Embedding(7, 4), "output": nn.Linear(4, 7, bias=False)})
    net["output"].weight = net["embed"].weight
    adapter = clora.attach(net, rank=2, targets="output", seed=0)
    stir(adapter)
    tokens, x = torch.arange(7), torch.eye(4)
    want = net["output"](x)
    adapter.merge()
    assert torch.equal(net["embed"](tokens), net["embed"].weight)
    assert net["embed"].weight is not net["output"].weight
    assert (net["output"](x) - want).abs().max() <= 2.0**-20
    adapter.unmerge()
    assert net["embed"].weight is net["output"].weight


def test_one_seed_one_start_in_every_library() -> None:
    """The factors are those of clora_core.init_adapter for the same generator; torch.manual_seed rules without one."""
    net = model()
    adapter = clora.attach(net, rank=3, targets="layers.0.query", seed=5)
    want = core.init_adapter(np.random.default_rng(5), 12, 12, 3)
    part = adapter.layers["layers.0.query"]
    assert np.array_equal(part.A.detach().numpy(), want.A)
    assert np.array_equal(part.B.detach().numpy(), want.B)
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(clora.attach(Model(), rank=3, targets="query").layers["layers.0.query"].A)
    assert torch.equal(*drawn)


def test_conv1d_of_transformers() -> None:
    """GPT-2's weight is stored (in, out): the whole of it, and the query rows of its fused projection."""
    transformers = pytest.importorskip("transformers", reason=kit.NO_PEERS)
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=12, vocab_size=30, n_positions=16)
    tokens = torch.arange(8)[None]
    for targets in ("c_fc", "c_attn[q]", ["c_attn[v]", "c_proj"], "all-linear"):
        net = transformers.GPT2LMHeadModel(config).double().eval()
        adapter = clora.attach(net, rank=3, targets=targets, seed=0)
        assert not any("lm_head" in name for name in adapter.layers)
        stir(adapter)
        want = net(tokens).logits
        adapter.merge()
        assert (net(tokens).logits - want).abs().max() <= 2.0**-40
        adapter.unmerge()
        loss = net(tokens, labels=tokens).loss
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in adapter.parameters())
