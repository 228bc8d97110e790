"""What a bare install promises, run by ``nox -s wheel`` in an environment that holds nothing else."""

import subprocess
import sys
import tempfile

import numpy as np

import clora
import clora_core
import clora_numpy
import clora_store

assert clora.__doc__
assert not {"torch", "jax", "cupy", "typer", "rich"} & set(sys.modules), "a framework or an extra was imported"
adapter = clora_core.init_adapter(np.random.default_rng(0), 6, 8, 2)
layer = clora_numpy.Layer(np.ones((6, 8), np.float32), adapter=adapter)
assert layer.forward(np.ones((3, 8), np.float32)).shape == (3, 6)

network = clora_numpy.Network({"layer": clora_numpy.Layer(np.ones((6, 8), np.float32))})
with tempfile.TemporaryDirectory() as folder:
    clora_numpy.attach(network, rank=2, rng=0).save(folder)
    assert list(clora_store.load(folder).layers) == ["layer"]

command = subprocess.run([sys.executable, "-m", "clora", "demo"], capture_output=True, text=True, check=False)
assert command.returncode == 1, command
assert command.stderr.splitlines() == ["clora: typer is not installed; run: python -m pip install 'clora[cli]'"], (
    command.stderr
)
print("the bare wheel imports and says what is missing")
