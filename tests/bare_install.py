"""What a bare install promises, run by ``nox -s wheel`` in an environment that holds nothing else."""

import sys

import numpy as np

import clora_core
import clora_numpy

assert not {"torch", "jax", "cupy"} & set(sys.modules), "a framework was imported"
adapter = clora_core.init_adapter(np.random.default_rng(0), 6, 8, 2)
layer = clora_numpy.Layer(np.ones((6, 8), np.float32), adapter=adapter)
assert layer.forward(np.ones((3, 8), np.float32)).shape == (3, 6)
print("the bare wheel imports and computes")
