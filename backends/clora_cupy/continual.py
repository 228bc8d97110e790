"""The task life of clora_numpy on CuPy: the same verbs, run on the device of the network's arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from clora_numpy import continual as base
from clora_numpy import folders

from ._device import here, on_device
from ._library import cupy
from .layers import Network


class ContinualAdapter(base.ContinualAdapter):
    """`clora_numpy.ContinualAdapter` on CuPy; made by `attach`.

    Every verb makes ``device`` the current device for as long as it runs, and works on its current stream. What
    `task` and `disabled` enclose runs on the device that was current before.
    """

    framework = f"cupy {cupy.__version__}"

    @property
    def device(self) -> Any:
        """The network's device."""
        return self.network.device  # type: ignore[attr-defined]

    moments = on_device(base.ContinualAdapter.moments)
    begin_task = on_device(base.ContinualAdapter.begin_task)
    end_task = on_device(base.ContinualAdapter.end_task)
    observe = on_device(base.ContinualAdapter.observe)
    penalty = on_device(base.ContinualAdapter.penalty)
    protect = on_device(base.ContinualAdapter.protect)
    expand = on_device(base.ContinualAdapter.expand)
    drift = on_device(base.ContinualAdapter.drift)
    restore = on_device(base.ContinualAdapter.restore)
    merge = on_device(base.ContinualAdapter.merge)
    save = on_device(base.ContinualAdapter.save)
    export_peft = on_device(base.ContinualAdapter.export_peft)


class Optimizer(base.Optimizer):
    """`clora_numpy.Optimizer` on CuPy.

    Parameters
    ----------
    adapter : ContinualAdapter
    rule : Rule
        From `sgd`, `adam` or `adamw`.
    """

    @property
    def device(self) -> Any:
        """The network's device."""
        return self.adapter.network.device  # type: ignore[attr-defined]

    step = on_device(base.Optimizer.step)
    protect = on_device(base.Optimizer.protect)
    at_boundary = on_device(base.Optimizer.at_boundary)


def attach(
    network: Network | Mapping[str, Any] | Sequence[Any], *, rank: int, rng: Any, **options: Any
) -> ContinualAdapter:
    """Give layers a C-LoRA adapter each, on the network's device. The function does not change.

    Parameters
    ----------
    network : Network, or mapping or sequence of modules
        Its arrays are on one device.
    rank : int
    rng : numpy.random.Generator or int
        Factors are drawn in NumPy, so that they are those of every other library.
    options
        ``targets``, ``factors``, ``max_rank``, ``scheme``, ``scale``, ``stop_old``, ``train_routing``, as in
        `clora_numpy.attach`, which also says what is raised.

    Returns
    -------
    ContinualAdapter

    Raises
    ------
    DeviceError
        Layers on several devices.
    """
    network = network if isinstance(network, Network) else Network(_modules(network))
    with here(network.device):
        return base.attach_as(ContinualAdapter, network, rank=rank, rng=rng, **options)


def load(
    network: Network | Mapping[str, Any] | Sequence[Any], folder: str | os.PathLike[str] | Any, **options: Any
) -> ContinualAdapter:
    """Attach a saved adapter, of any framework, to a network, on its device.

    Parameters
    ----------
    network : Network, or mapping or sequence of modules
    folder : path or clora_store.State
    options
        ``finite``, ``names``, as in `clora_numpy.load`, which also says what is raised.

    Returns
    -------
    ContinualAdapter
    """
    network = network if isinstance(network, Network) else Network(_modules(network))
    with here(network.device):
        return folders.load_as(ContinualAdapter, network, folder, **options)


def _modules(network: Any) -> Any:
    return network.modules if isinstance(network, base.Network) else network
