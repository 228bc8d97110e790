"""On a mesh of eight devices: the numbers of one device, adapters split as their kernels are, no kernel gathered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import kit
import pytest

if kit.jax is None:
    pytest.skip(kit.NO_JAX, allow_module_level=True)


@pytest.fixture(scope="module")
def found() -> dict:
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).with_name("jax_mesh.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("how", ["data", "tensor", "both"])
def test_the_same_numbers_and_no_kernel_gathered(found: dict, how: str) -> None:
    got = found[how]
    # Two tasks of three steps of SGD, relative to the largest entry of each array: sums over devices in another order.
    assert got["worst"] <= 2.0**-12, got
    assert got["devices"] == 8
    assert got["whole kernels gathered"] == []
    assert bool(got["gathered where it should be"]) == (how != "data"), "a program that does gather is seen to"
    assert "[6,6]" in got["reduced"] or how == "tensor", "second moments are summed over the data axis"
    for place in ("A of up", "B of down", "spare A of up"):
        assert ("tensor" in got[place]) == (how != "data")


def test_second_moments_in_shard_map(found: dict) -> None:
    assert found["shard_map"] <= 2.0**-18


def test_gradients_in_shard_map(found: dict) -> None:
    assert found["gradients in shard_map"] <= 2.0**-18
