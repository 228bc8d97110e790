"""Killing a run at random moments: its folder loads as the old or the new, and the run goes on to the same end.

``python tests/test_store_kill.py --kills 200`` kills more often.
"""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import clora_numpy as clora
import clora_store as store

TASKS = 12
HERE = Path(__file__).parent


def network(rng):
    return clora.Network(
        {
            "hidden": clora.Layer(rng.standard_normal((192, 128)).astype(np.float32) / 11),
            "relu": clora.Relu(),
            "head": clora.Head(np.zeros((4, 192), np.float32)),
        }
    )


def train(folder):
    """A run as a user writes it: load what is there, learn the tasks that are left, save after each."""
    layers = network(np.random.default_rng(0))
    adapter = clora.attach(layers, rank=96, rng=1) if store.digest(folder) is None else clora.load(layers, folder)
    for task in range(len(adapter.tasks), TASKS):
        rng = np.random.default_rng(task)
        x = rng.standard_normal((64, 128)).astype(np.float32)
        labels = rng.integers(0, 4, 64)
        optimizer = clora.Optimizer(adapter, clora.adam(1e-3))
        with adapter.task(f"task-{task}"):
            for _ in range(3):
                _, grad = clora.cross_entropy(layers.forward(x), labels)
                layers.backward(grad)
                adapter.penalty(0.1)
                optimizer.step()
            adapter.observe([x])
        adapter.save(folder)


def content(folder):
    """A hash of everything the adapter holds."""
    digest = hashlib.sha256()
    for name, array in store.load(folder).arrays():
        digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()


def run(kills, seed, scratch):
    """Kill a run so often. Returns after how many finished tasks the kills came: tasks -> kills."""
    train(scratch / "whole")
    expected = content(scratch / "whole")
    rng = np.random.default_rng(seed)
    found, done = dict.fromkeys(range(TASKS + 1), 0), 0
    while done < kills:
        folder, before = scratch / f"killed-{done}", 0
        while done < kills:
            process = subprocess.Popen(
                [sys.executable, __file__, "--child", str(folder)],
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
            assert process.stdout is not None
            process.stdout.readline()  # it is about to train
            time.sleep(float(rng.uniform(0, 0.12)))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            if process.returncode != -signal.SIGKILL:
                break  # it had ended
            done += 1
            tasks = len(store.load(folder).tasks) if store.digest(folder) else 0
            assert tasks >= before, "tasks were lost"
            before = tasks
            found[tasks] += 1
        train(folder)  # and it goes on, to the same bits
        assert content(folder) == expected
        assert not list(folder.glob(".clora-*"))
    return found


def test_a_killed_run_is_never_lost(tmp_path):
    assert sum(run(12, 0, tmp_path).values()) == 12


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill runs that save, and look at what is left.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--child", help="train into this folder, for being killed")
    options = parser.parse_args()
    if options.child:
        print("ready", flush=True)
        train(Path(options.child))
    else:
        import tempfile

        with tempfile.TemporaryDirectory() as scratch:
            print("0 lost; kills by the number of finished tasks:", run(options.kills, 1, Path(scratch)))
