"""Merging in torch: from the pristine weight, one rounding, a report; unmerging gives back the same bits."""

from typing import Any

import kit
import pytest

import clora_core as core
from clora_core.errors import InvalidValueError, OptionError, StateError

if kit.torch is None:
    pytest.skip(kit.NO_TORCH, allow_module_level=True)
torch: Any = kit.torch
import torch_cases as tasks  # noqa: E402

import clora_torch as clora  # noqa: E402  (needs torch)

nn = torch.nn
DTYPES = ("float32", "bfloat16", "float16", "float64")


def learned(dtype: str = "float32", size: float = 1.0) -> tuple[Any, Any]:
    """A network with two layers, a slice and a head that all hold something."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))
    net.to(getattr(torch, dtype))
    adapter = clora.attach(net, rank=6, targets=["0", "2[4:20]"], heads="4", seed=0)
    with torch.no_grad():
        for part in adapter.layers.values():
            part.R_delta.normal_(std=size)
    return net, adapter


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_cycles_keep_every_bit(dtype: str) -> None:
    """Weights are the same Parameters as before, outputs the same bits, merged and not."""
    net, adapter = learned(dtype)
    x = tasks.X.to(getattr(torch, dtype))
    weights, values = list(net.parameters()), [p.clone() for p in net.parameters()]
    plain, merged = net(x), None
    for _ in range(100):
        adapter.merge(on_loss="ignore")
        y = net(x)
        assert merged is None or torch.equal(y, merged)
        merged = y
        adapter.unmerge()
    assert torch.equal(net(x), plain)
    assert all(a is b for a, b in zip(net.parameters(), weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), values, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_merged_weight_is_the_cores(dtype: str) -> None:
    """One rounding of the pristine weight plus A R B, slices included; the report, too."""
    net, adapter = learned(dtype)
    pristine = {"0": net[0].weight, "2": net[2].weight}
    reports = adapter.merge(on_loss="ignore")
    assert list(reports) == ["0", "2[4:20]"]
    for name, key, rows in (("0", "0", slice(None)), ("2[4:20]", "2", slice(4, 20))):
        arrays = core.Adapter(*(a.detach() for a in adapter.layers[name].adapter))
        W = pristine[key][rows].detach().to(arrays.A.dtype)
        want = core.merge(W, arrays, dtype=getattr(torch, dtype))
        assert torch.equal(net.get_submodule(key).weight[rows], want.weight)
        assert all(torch.equal(a, b) for a, b in zip(reports[name], want.report, strict=True))
        assert float(reports[name].unchanged) < 1
    assert torch.equal(net[2].weight[:4], pristine["2"][:4])
    assert torch.equal(net[2].weight[20:], pristine["2"][20:])


def test_outputs_within_the_bound() -> None:
    """A merged layer's output is within the bounds of the unmerged one's: both of the exact one."""
    net, adapter = learned()
    layer, part, x = net[0], adapter.layers["0"], tasks.X
    arrays = core.Adapter(*(a.detach() for a in part.adapter))
    limit = core.bounds.linear(x, layer.weight, arrays, layer.bias)
    y = layer(x)
    adapter.merge()
    assert torch.all((layer(x) - y).abs() <= 2 * limit)
    assert torch.any(layer(x) != y)


def test_merged_state_is_the_plain_models() -> None:
    """While merged, state_dict has the plain model's names and loads into one; loading into it is refused."""
    net, adapter = learned()
    before, x = net.state_dict(), tasks.X
    adapter.merge()
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))
    plain.load_state_dict(net.state_dict())
    assert torch.equal(plain(x), net(x))
    with pytest.raises(StateError, match="unmerge"):
        net.load_state_dict(before)
    with pytest.raises(StateError, match="unmerge"):
        adapter.state_dict()
    adapter.unmerge()
    net.load_state_dict(before)


def test_loss_is_said_and_a_failed_merge_changes_nothing() -> None:
    """A small update beside bfloat16 weights: warn, raise or ignore; after raising, everything is as before."""
    net, adapter = learned("bfloat16", size=1e-3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    weights, y = list(net.parameters()), net(tasks.X.bfloat16())
    with pytest.raises(InvalidValueError, match="2 of 2 layers lose more than 10%"):
        adapter.merge(on_loss="raise")
    assert not adapter.merged
    assert all(a is b for a, b in zip(net.parameters(), weights, strict=True))
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())
    assert torch.equal(net(tasks.X.bfloat16()), y)
    with pytest.raises(OptionError, match="'shout'"):
        adapter.merge(on_loss="shout")
    with pytest.warns(UserWarning, match="lose more than 10%"):
        reports = adapter.merge()
    assert all(float(report.error) > 0.1 for report in reports.values())
    adapter.unmerge()
    adapter.merge(on_loss="raise", max_loss=1.0)


def test_merging_after_restore() -> None:
    """A past task can be merged: its outputs within bounds of restore's."""
    net = tasks.network().double()
    adapter, x = tasks.attach(net), tasks.X.double()
    optimizer = tasks.adam(adapter.parameters())
    for task in range(2):
        tasks.learn(adapter, optimizer, task, dtype="float64")
    adapter.restore("task-0")
    with torch.no_grad():
        y = net(x)
        adapter.merge()
        assert (net(x) - y).abs().max() <= 2.0**-40 * y.abs().max()
        adapter.unmerge()
        assert torch.equal(net(x), y)
