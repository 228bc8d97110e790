"""Adapters on disk against what their files alone cost: saving, loading, and merging a checkpoint against copying it.

Every pair is done in turn and a figure is the median over rounds of the ratio within a round, since disks drift even
more than processors. ``python benchmarks/store.py --help``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

import clora_core as core
import clora_store as store

DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
MERGE = """
import os, sys, threading, time, clora_store as store

peaks = {}

def peak(pid):  # of this program alone: what the kernel hands on from before a process's exec is left out
    try:
        with open(f"/proc/{pid}/status") as file:
            peaks[pid] = next((int(line.split()[1]) for line in file if line.startswith("VmHWM")), 0)
    except OSError:
        pass

def watch():
    while not done.wait(0.05):
        peak("self")
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/children") as file:
                for pid in file.read().split():
                    peak(pid)

state = store.load(sys.argv[2])
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
store.merge_checkpoint(sys.argv[1], state, sys.argv[3])
seconds = time.perf_counter() - start
done.set()
watcher.join()
print(seconds, max(peaks.values()), sum(peaks.values()))
"""


def seconds(function: Callable[[], object]) -> float:
    """Of one call, when the disk has nothing left to do from before."""
    os.sync()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def flush(folder: Path) -> None:
    """All files of a folder onto the disk."""
    for path in folder.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def adapter_state(rng: np.random.Generator, megabytes: int) -> store.State:
    """Layers of 4096 x 4096 at rank 64, two tasks."""
    d, r = 4096, 64
    layers, snapshots = {}, {"a": {}, "b": {}}
    for i in range(max(1, megabytes // 2)):
        A, B = (rng.standard_normal(s).astype(np.float32) for s in ((d, r), (r, d)))
        R = rng.standard_normal((r, r)).astype(np.float32)
        S = R.astype(np.float64)
        target = store.Target(f"layers.{i}.weight", (d, d))
        adapter = core.Adapter(A, R, np.zeros_like(R), B)
        layers[f"layers.{i}"] = store.Layer("linear", target, adapter, moments=core.Moments(S, S, np.zeros(())))
        for task in snapshots.values():
            task[f"layers.{i}"] = store.Snapshot(R)
    return store.State(layers, tasks=("a", "b"), snapshots=snapshots)


def saving(scratch: Path, megabytes: int, rounds: int) -> dict[str, float]:
    """`save` and `load` against safetensors alone on the same arrays."""
    state = adapter_state(np.random.default_rng(0), megabytes)
    arrays = dict(state.arrays())
    plain, folder = scratch / "plain", scratch / "folder"
    plain.mkdir()
    ratios: dict[str, list[float]] = {"save": [], "load": []}
    times: dict[str, list[float]] = {name: [] for name in ("save", "safetensors save", "load", "safetensors load")}

    def save_plain() -> None:
        save_file(arrays, plain / "a.safetensors")
        flush(plain)

    def save_ours() -> None:
        store.save(folder, state)

    for _ in range(rounds):
        shutil.rmtree(folder, ignore_errors=True)
        (plain / "a.safetensors").unlink(missing_ok=True)
        times["save"].append(seconds(save_ours))
        times["safetensors save"].append(seconds(save_plain))
        times["load"].append(seconds(lambda: store.load(folder)))
        times["safetensors load"].append(seconds(lambda: load_file(plain / "a.safetensors")))
        for verb in ratios:
            ratios[verb].append(times[f"safetensors {verb}"][-1] / times[verb][-1])
    size = sum(array.nbytes for array in arrays.values())
    out = {f"{name}, GB/s": size / 1e9 / statistics.median(values) for name, values in times.items()}
    return out | {f"{verb}, speed against safetensors": statistics.median(values) for verb, values in ratios.items()}


def merging(scratch: Path, dtype: str, gibibytes: float, rounds: int) -> dict[str, float]:
    """`merge_checkpoint` of rank 16 on every matrix of a checkpoint in 4 shards, against a copy of its files."""
    rng = np.random.default_rng(0)
    d, shards = 4096, 4
    base, out, copy = scratch / "base", scratch / "out", scratch / "copy"
    base.mkdir()
    W = rng.standard_normal((d, d)).astype(DTYPES[dtype])
    each = max(1, round(gibibytes * 2**30 / W.nbytes / shards))
    layers, weight_map = {}, {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = [f"layers.{shard}.{i}.weight" for i in range(each)]
        save_file(dict.fromkeys(names, W), base / file)
        for name in names:
            weight_map[name] = file
            A, B = (rng.standard_normal(s).astype(np.float32) / 64 for s in ((d, 16), (16, d)))
            adapter = core.Adapter(A, np.eye(16, dtype=np.float32), np.zeros((16, 16), np.float32), B)
            layers[name] = store.Layer("linear", store.Target(name, (d, d)), adapter)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    store.save(scratch / "adapter", store.State(layers, factors="every-task"))
    merge, copied, synced, peaks = [], [], [], []
    for _ in range(rounds + 1):
        for folder in (out, copy):
            shutil.rmtree(folder, ignore_errors=True)
        os.sync()
        command = [sys.executable, "-c", MERGE, str(base), str(scratch / "adapter"), str(out)]
        words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        merge.append(float(words[0]))
        peaks.append([int(word) / 2**20 for word in words[1:]])
        shutil.rmtree(out)
        copied.append(seconds(lambda: shutil.copytree(base, copy)))
        start = time.perf_counter()
        flush(copy)
        synced.append(copied[-1] + time.perf_counter() - start)
    merge, copied, synced = (values[1:] for values in (merge, copied, synced))  # the first reads from the disk
    return {
        "merge, s": statistics.median(merge),
        "copy onto the disk, s": statistics.median(synced),
        "copy into the cache, s": statistics.median(copied),
        "merge / copy onto the disk": statistics.median(a / b for a, b in zip(merge, synced, strict=True)),
        "merge / copy into the cache": statistics.median(a / b for a, b in zip(merge, copied, strict=True)),
        "peak of a process, GiB": max(one for one, _ in peaks),
        "peak of all its processes, GiB": max(both for _, both in peaks),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["adapter", "checkpoint"], help="only this part")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gib", type=float, default=4.0, help="of the checkpoint; three times that is written")
    parser.add_argument("--adapter-mb", type=int, default=256)
    parser.add_argument("--smoke", action="store_true", help="small and once: that it runs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.gib, options.adapter_mb = 1, 0.3, 8
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        if options.part != "checkpoint":
            results[f"adapter of {options.adapter_mb} MB"] = saving(Path(scratch), options.adapter_mb, options.rounds)
    for dtype in DTYPES if options.part != "adapter" else ():
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            name = f"checkpoint of {options.gib:g} GiB, {dtype}"
            results[name] = merging(Path(scratch), dtype, options.gib, options.rounds)
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    if options.json:
        print(json.dumps({"results": results, "versions": versions}, indent=1))
        return
    for name, figures in results.items():
        print(name)
        for key, value in figures.items():
            print(f"  {key:34} {value:8.3f}")
    print(", ".join(f"{key} {value}" for key, value in versions.items()))


if __name__ == "__main__":
    main()
