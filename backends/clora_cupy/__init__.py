"""C-LoRA in CuPy: clora_numpy's verbs on an NVIDIA GPU, on the device and stream of the user.

``import clora_cupy as clora``. Formulas and training code are clora_core's and clora_numpy's; here stand the device,
fused kernels, half precision, pinned staging and the exchange with other libraries. Needs CuPy 13 or newer and a GPU.
"""

from clora_numpy import AdamState, MomentumState, Rule, cosine, sgd

from ._share import share
from ._stage import stage
from .continual import ContinualAdapter, Optimizer, attach, load
from .layers import Head, Layer, Network, Relu, cross_entropy
from .optimizers import adam, adamw

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
    "share",
    "stage",
]
