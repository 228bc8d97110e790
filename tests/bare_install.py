"""What a bare install promises, run by ``nox -s wheel`` in an environment that holds nothing else."""

import sys

import numpy as np

import clora_core

assert not {"torch", "jax", "cupy"} & set(sys.modules), "a framework was imported"
adapter = clora_core.init_adapter(np.random.default_rng(0), 6, 8, 2)
delta = clora_core.delta(adapter)
assert delta.shape == (6, 8)
print("the bare wheel imports and computes")
