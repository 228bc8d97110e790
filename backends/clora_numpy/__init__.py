"""C-LoRA in NumPy: training without autodiff, by closed-form gradients from clora_core and functional optimizers.

``import clora_numpy as clora``. Written against the Array API, so the same code runs on every library of the standard.
"""

from .continual import ContinualAdapter, Optimizer, attach
from .folders import load
from .layers import Head, Layer, Network, Relu, cross_entropy
from .optimizers import AdamState, MomentumState, Rule, adam, adamw, cosine, sgd

__all__ = [
    "AdamState",
    "ContinualAdapter",
    "Head",
    "Layer",
    "MomentumState",
    "Network",
    "Optimizer",
    "Relu",
    "Rule",
    "adam",
    "adamw",
    "attach",
    "cosine",
    "cross_entropy",
    "load",
    "sgd",
]
