"""C-LoRA in PyTorch: one adapter for all tasks inside any torch model. ``import clora_torch as clora``.

The mathematics is clora_core's; here it meets nn.Module, autograd and torch's optimizers.
"""

from ._adapter import ContinualAdapter
from ._attach import attach
from ._function import adapted_linear, routed
from ._part import LayerAdapter
from ._store import load

__all__ = ["ContinualAdapter", "LayerAdapter", "adapted_linear", "attach", "load", "routed"]
