"""nn.MultiheadAttention with adapted projections: torch's own attention with W + A R B for its weights."""

import copy
from typing import Any

import kit
import pytest

import clora_core as core
from clora_core.errors import OptionError

if kit.torch is None:
    pytest.skip(kit.NO_TORCH, allow_module_level=True)
torch: Any = kit.torch
import clora_torch as clora  # noqa: E402  (needs torch)

nn = torch.nn
WIDTH, HEADS, LENGTH, KEYS, BATCH = 8, 2, 5, 4, 3
SLICES = ["in_proj_weight[q]", "in_proj_weight[k]", "in_proj_weight[v]"]


class Attention(nn.Module):
    """Self or cross attention, as models hold it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)

    def forward(self, query: Any, memory: Any = None, **options: Any) -> Any:
        memory = query if memory is None else memory
        return self.attention(query, memory, memory, **options)


def attention(**options: Any) -> Any:
    torch.manual_seed(0)
    net = Attention(**options).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.5)
    return net


def stir(adapter: Any) -> None:
    with torch.no_grad():
        for part in adapter.layers.values():
            part.R_old.normal_(std=0.5)
            part.R_delta.normal_(std=0.5)


def inputs(kind: str, batch_first: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)
    lengths = (LENGTH,) if kind == "self" else (LENGTH, KEYS)
    shapes = [(BATCH, n, WIDTH) if batch_first else (n, BATCH, WIDTH) for n in lengths]
    shapes = [(n, WIDTH) for n in lengths] if kind == "unbatched" else shapes
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def masks(keys: int, batched: bool) -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    boolean = torch.rand(LENGTH, keys, generator=generator) > 0.7
    boolean[:, 0] = False
    padding = torch.rand(BATCH, keys, generator=generator) > 0.7
    padding[:, 0] = False
    padding = padding if batched else padding[0]
    as_float = torch.zeros(padding.shape, dtype=torch.float64).masked_fill(padding, -torch.inf)
    causal = torch.triu(torch.full((LENGTH, keys), -torch.inf, dtype=torch.float64), diagonal=1)
    by_head = torch.randn(BATCH * HEADS if batched else HEADS, LENGTH, keys, generator=generator, dtype=torch.float64)
    return {
        "none": {},
        "boolean": {"attn_mask": boolean},
        "additive by head": {"attn_mask": by_head},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": boolean, "key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal and padding": {"attn_mask": causal, "is_causal": True, "key_padding_mask": as_float},
    }


@pytest.mark.parametrize("mask", masks(1, True))
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["self", "cross", "unbatched"])
def test_it_is_the_attention_with_the_merged_weights(kind: str, batch_first: bool, mask: str) -> None:
    """Outputs and weights, under every mask, against torch's own code on merged weights: rounding of float64 apart."""
    net = attention(batch_first=batch_first)
    x = inputs(kind, batch_first)
    targets = [*SLICES, "out_proj"] if len(x) > 1 else ["in_proj_weight", "out_proj"]
    adapter = clora.attach(net, rank=3, targets=targets, seed=0)
    stir(adapter)
    keys, batched = (LENGTH if kind == "self" else KEYS), kind != "unbatched"
    options = masks(keys, batched)[mask]
    calls: list[dict[str, Any]] = [
        {"need_weights": False},
        {"need_weights": True},
        {"need_weights": True, "average_attn_weights": False},
    ]
    with torch.no_grad():
        got = [net(*x, **options, **call) for call in calls]
        adapter.merge()
        want = [net(*x, **options, **call) for call in calls]
    for (y, weights), (y_want, weights_want) in zip(got, want, strict=True):
        assert y.shape == y_want.shape
        assert (y - y_want).abs().max() <= 2.0**-44 * y_want.abs().max()
        assert (weights is None) == (weights_want is None)
        if weights is not None:
            assert weights.shape == weights_want.shape
            assert (weights - weights_want).abs().max() <= 2.0**-44
    assert (got[0][0] - attention(batch_first=batch_first)(*x, **options)[0]).abs().max() > 0.01


def test_causal_without_a_mask_is_refused() -> None:
    """As torch refuses it: is_causal is a hint about a mask."""
    net = attention()
    clora.attach(net, rank=2, targets="in_proj_weight", seed=0)
    with pytest.raises(OptionError, match="attn_mask"):
        net(*inputs("self", False), is_causal=True)


def test_attaching_changes_nothing() -> None:
    """Outputs within rounding of torch's; merged and detached the same bits; names of parameters stay."""
    net = attention(batch_first=True)
    (x,) = inputs("self", True)
    net.requires_grad_(False)  # as attach does: torch has a fused path for what needs no gradient
    want, names = net(x, need_weights=False)[0], set(net.state_dict())
    adapter = clora.attach(net, rank=2, targets=["in_proj_weight[v]", "out_proj"], seed=0)
    assert list(adapter.layers) == ["attention[16:24]", "attention.out_proj"]
    assert names < set(net.state_dict())
    assert (net(x, need_weights=False)[0] - want).abs().max() <= 2.0**-48 * want.abs().max()
    with adapter.disabled():
        assert torch.equal(net(x, need_weights=False)[0], want)
    adapter.detach()
    assert type(net.attention) is nn.MultiheadAttention
    assert torch.equal(net(x, need_weights=False)[0], want)


def test_gradients_of_a_slice_are_the_cores() -> None:
    """stop_old included, A and B through R_delta alone: the closed form on autograd's gradient of the weight."""
    net = attention(batch_first=True)
    (x,) = inputs("self", True)
    adapter = clora.attach(net, rank=3, targets=SLICES[:2], seed=0)
    stir(adapter)
    net(x, need_weights=False)[0].sin().sum().backward()
    merged = attention(batch_first=True)
    with torch.no_grad():
        for part in adapter.layers.values():
            merged.attention.in_proj_weight[slice(*part.rows)] += core.delta(part.adapter)
    merged(x, need_weights=False)[0].sin().sum().backward()
    for part in adapter.layers.values():
        G = merged.attention.in_proj_weight.grad[slice(*part.rows)]
        want = core.delta_vjp(core.Adapter(*(a.detach() for a in part.adapter)), G)
        for name in ("A", "R_delta", "B"):
            got, exact = getattr(part, name).grad, getattr(want, name)
            assert (got - exact).abs().max() <= 2.0**-42 * exact.abs().max()


def test_one_adapter_for_several_inputs_is_refused() -> None:
    """Cross attention has no common routed input: the message names the three slices."""
    net = attention()
    clora.attach(net, rank=2, targets="in_proj_weight", seed=0)
    with pytest.raises(OptionError, match=r"in_proj_weight\[q\]"):
        net(*inputs("cross", False))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"add_bias_kv": True}, "bias_k"),
        ({"add_zero_attn": True}, "add_zero_attn"),
        ({"kdim": 4}, "no fused projection"),
    ],
)
@pytest.mark.parametrize("target", ["attention", "out_proj"])
def test_rare_attentions_are_refused(options: dict[str, Any], words: str, target: str) -> None:
    """By what they have; out_proj of one with kdim is a layer like any other."""
    net = Attention(**options)
    if target == "out_proj" and "kdim" in options:
        clora.attach(net, rank=2, targets=target)
        return
    with pytest.raises(OptionError, match=words):
        clora.attach(net, rank=2, targets=target)


@pytest.mark.parametrize("batch_first", [True, False])
def test_observing_and_rows(batch_first: bool) -> None:
    """The memory sees each projection's own input, padding left out; a batch of several tasks is routed row by row."""
    net = attention(batch_first=batch_first)
    x, memory = inputs("cross", batch_first)
    adapter = clora.attach(net, rank=3, targets=[*SLICES[:2], "out_proj"], factors="never", seed=0)
    keep = torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(3)) > 0.3
    ends = {}
    for task in range(2):
        with adapter.task(str(task)):
            stir(adapter)
            adapter.observe([(x, memory)], forward=lambda m, b: m(*b), mask=lambda b: keep)
        ends[str(task)] = net(x, memory)[0].detach()
    q, k = (adapter.layers[name] for name in ("attention[0:8]", "attention[8:16]"))
    rows = x if batch_first else x.transpose(0, 1)
    for part, seen, weights in ((q, rows[keep], None), (k, memory.reshape(-1, WIDTH), None)):
        C = core.second_moment((seen @ part.B.T).detach(), weights=weights)
        assert (part.S - 2 * C).abs().max() <= 2.0**-44 * C.abs().max()
    names = ["1", "0", "1"]
    with adapter.rows(names):
        mixed = net(x, memory)[0]
    for i, name in enumerate(names):
        got, want = (y[i] if batch_first else y[:, i] for y in (mixed, ends[name]))
        assert (got - want).abs().max() <= 2.0**-42 * want.abs().max()


def test_encoder_layers_copies_and_compilers() -> None:
    """Inside nn.TransformerEncoder, whose fast path reads weights; deepcopy; compiled in one graph."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    (x,) = inputs("self", True)
    before = net(x)
    adapter = clora.attach(net, rank=2, targets=["in_proj_weight", "linear1"], seed=0)
    stir(adapter)
    want = net(x)
    assert (want - before).abs().max() > 0.01
    with torch.no_grad():
        assert torch.equal(net(x), want)
        assert torch.equal(copy.deepcopy(net)(x), want)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert (compiled(x) - want).abs().max() <= 2.0**-44 * want.abs().max()


def test_half_precision_keeps_the_update() -> None:
    """Under autocast the update is a product of its own, not rounded into the weight: small ones survive."""
    net = attention(batch_first=True).bfloat16()
    x = inputs("self", True)[0].bfloat16()
    adapter = clora.attach(net, rank=2, targets="in_proj_weight[v]", seed=0)
    part = adapter.layers["attention[16:24]"]
    seen = []
    net.attention.out_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for size in (0.0, 1.0):
            part.R_delta.copy_(size * torch.eye(2))
            net(x, need_weights=False)
    change = core.delta(part.adapter).norm()
    assert (seen[1] - seen[0]).float().norm() > 0.1 * change
