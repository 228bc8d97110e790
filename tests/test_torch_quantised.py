"""Frozen bases that bitsandbytes has quantised: the adapter works beside them, in float32, and is never merged."""

from typing import Any

import kit
import pytest

import clora_core as core
from clora_core.errors import DTypeError

if kit.torch is None:
    pytest.skip(kit.NO_TORCH, allow_module_level=True)
torch: Any = kit.torch
bitsandbytes = pytest.importorskip("bitsandbytes", reason=kit.NO_PEERS)
import clora_torch as clora  # noqa: E402  (needs torch)

nn = torch.nn
LAYERS = {
    "8 bit": lambda: bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
    "4 bit": lambda: bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4"),
}
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")


@pytest.mark.parametrize("bits", LAYERS)
def test_the_adapter_adds_to_what_the_layer_gives(bits: str) -> None:
    """Output and gradients are the base's plus those of the low-rank path, within its bound and one sum's rounding."""
    torch.manual_seed(0)
    net = nn.Sequential(LAYERS[bits]()).to("cpu")  # moving quantises
    x = torch.randn(5, 64)
    base = net(x)
    adapter = clora.attach(net, rank=4, targets="0", factors="never", seed=0)
    part = adapter.layers["0"]
    assert not net[0].weight.is_floating_point()
    assert torch.equal(net(x), base)
    with torch.no_grad():
        part.R_delta.normal_()
    y = net(x)
    arrays = core.Adapter(*(a.detach() for a in part.adapter))
    limit = core.bounds.apply(x, arrays) + 2.0**-23 * y.abs()
    assert torch.all((y - base - core.apply(x, arrays)).abs() <= limit)
    y.sum().backward()
    want = core.linear_vjp(x, None, arrays, torch.ones_like(y), wrt=("R_delta",))
    limit = core.bounds.linear_vjp(x, None, arrays, torch.ones_like(y), wrt=("R_delta",))
    assert torch.all((part.R_delta.grad - want.R_delta).abs() <= 2 * limit.R_delta)
    with adapter.task("first"):
        adapter.observe([x])
    weight = net[0].weight
    with pytest.raises(DTypeError, match="quantised base"):
        adapter.merge()
    assert net[0].weight is weight
    assert type(adapter.detach()[0]).__module__.startswith("bitsandbytes")
