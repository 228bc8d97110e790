"""clora_torch against the frozen layer and against PEFT's LoRA of equal rank: time, memory kept, many tasks.

Everything is timed in turn, A B C A B C ..., and reported as the median over rounds of ratios within a round, so that a
machine whose speed drifts slows all alike. ``python benchmarks/torch_lora.py --help``. Needs torch and peft.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
from collections.abc import Callable
from importlib import metadata
from typing import Any

import peft
import torch
from timing import ratio, readable
from timing import timed as in_turn
from torch import nn

import clora_torch as clora

SHAPES = [
    (512, 768, 768, 16),
    (4096, 768, 768, 16),
    (2048, 768, 3072, 16),
    (2048, 2048, 2048, 64),
    (128, 2048, 2048, 16),
]
GPU_SHAPES = [(8192, 4096, 4096, 16), *SHAPES]


def timed(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in every round."""
    return in_turn(functions, rounds, settle=lambda _: torch.cuda.synchronize() if torch.cuda.is_available() else None)


def lora(model: nn.Module, rank: int, targets: list[str]) -> nn.Module:
    """The model with PEFT's LoRA, its B started away from zero as training would have it."""
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, lora_dropout=0.0)
    model = peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def stir(adapter: clora.ContinualAdapter) -> None:
    """Routings away from zero."""
    with torch.no_grad():
        for part in adapter.layers.values():
            part.R_old.normal_(std=0.02)
            part.R_delta.normal_(std=0.02)


def variants(
    n: int, d_in: int, d_out: int, r: int, device: str, dtype: torch.dtype
) -> dict[str, tuple[nn.Module, Any]]:
    """One layer four times: frozen, PEFT, ours with all factors learning, ours with the routing alone."""
    base = nn.Sequential(nn.Linear(d_in, d_out)).to(device, dtype).requires_grad_(False)
    x = torch.randn(n, d_in, device=device, dtype=dtype)
    layers = {"frozen": base, "peft": lora(copy.deepcopy(base), r, ["0"])}
    for name, factors in (("clora", "first-task"), ("clora-routing", "never")):
        layers[name] = copy.deepcopy(base)
        stir(clora.attach(layers[name], rank=r, targets="0", factors=factors, seed=0))
    return {name: (layer, x.clone().requires_grad_()) for name, layer in layers.items()}


def kept(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes of the storages that the graph keeps, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    del y
    return sum(sizes.values())


def layers(rounds: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Forward and backward of one layer, the input's gradient included."""
    rows = {}
    for shape in GPU_SHAPES if device == "cuda" else SHAPES:
        n, _, d_out, _ = shape
        cases = variants(*shape, device, dtype)
        g = torch.randn(n, d_out, device=device, dtype=dtype)

        def step(layer: nn.Module, x: torch.Tensor, g: torch.Tensor = g) -> None:
            layer(x).backward(g)
            x.grad = None
            for parameter in layer.parameters():
                parameter.grad = None

        times = timed({name: lambda case=case, step=step: step(*case) for name, case in cases.items()}, rounds)
        rows[",".join(map(str, shape))] = {
            "frozen_ms": 1e3 * statistics.median(times["frozen"]),
            **{f"{name} / frozen": ratio(times, name, "frozen") for name in ("peft", "clora", "clora-routing")},
            "clora / peft": ratio(times, "clora", "peft"),
            "clora-routing / peft": ratio(times, "clora-routing", "peft"),
            "kept": {name: kept(*case) for name, case in cases.items()},
        }
    names = [key for key in next(iter(rows.values())) if " / " in key]
    mean = {k: math.exp(statistics.fmean(math.log(row[k]) for row in rows.values())) for k in names}
    return {"shapes (n, d_in, d_out, r)": rows, "geometric mean": mean}


class Encoder(nn.Module):
    """A pre-norm transformer encoder of a given shape with projections of their own."""

    def __init__(self, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    **{name: nn.Linear(width, width) for name in ("query", "key", "value", "output")},
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                    "norm1": nn.LayerNorm(width),
                    "norm2": nn.LayerNorm(width),
                }
            )
            for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, width) -> the same."""
        for block in self.blocks:
            h = block["norm1"](x)
            q, k, v = (block[n](h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in ("query", "key", "value"))
            h = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + block["output"](h)
            x = x + block["down"](nn.functional.gelu(block["up"](block["norm2"](x))))
        return x


MODELS = {"MiniLM-L6 shape, 16 x 128": (6, 384, 12, 16, 128), "ViT-B/16 shape, 4 x 197": (12, 768, 12, 4, 197)}


def models(rounds: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """A whole train step, AdamW included, query, key and value adapted at rank 16."""
    rows = {}
    targets = ["query", "key", "value"]
    for label, (depth, width, heads, batch, length) in MODELS.items():
        base = Encoder(depth, width, heads).to(device, dtype)
        x = torch.randn(batch, length, width, device=device, dtype=dtype)
        cases: dict[str, Callable[[], object]] = {}
        for name in ("peft", "clora", "clora-routing"):
            model = copy.deepcopy(base)
            if name == "peft":
                lora(model, 16, targets)
            else:
                factors = "never" if name == "clora-routing" else "first-task"
                stir(clora.attach(model, rank=16, targets=targets, factors=factors, seed=0))
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

            def step(model: nn.Module = model, optimizer: Any = optimizer, x: torch.Tensor = x) -> None:
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

            cases[name] = step
        times = timed(cases, rounds)
        rows[label] = {
            "peft_ms": 1e3 * statistics.median(times["peft"]),
            **{f"{name} / peft": ratio(times, name, "peft") for name in ("clora", "clora-routing")},
        }
    return rows


def after(count: int) -> tuple[clora.ContinualAdapter, Callable[[], object]]:
    """An adapter that has learned ``count`` tasks and is in one more; and a protected, penalised step of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    adapter = clora.attach(model, rank=16, factors="never", seed=0)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4)
    adapter.protect(optimizer, energy=0.5)
    x = torch.randn(64, 256)

    def step() -> None:
        (model(x).square().mean() + adapter.penalty(0.1)).backward()
        optimizer.step()
        optimizer.zero_grad()

    for task in range(count):
        with adapter.task(str(task)):
            step()
            adapter.observe([x])
    adapter.begin_task("now")
    return adapter, step


def tasks(counts: list[int], rounds: int) -> dict[str, Any]:
    """A step and the state after many tasks, relative to the fewest."""
    adapters = {str(count): after(count) for count in counts}
    first, *_ = adapters
    times = timed({name: step for name, (_, step) in adapters.items()}, rounds)
    snapshot = adapters[first][0]._snapshots["0"]
    return {
        f"step_ms after {first}": 1e3 * statistics.median(times[first]),
        **{f"step after {name} / {first}": ratio(times, name, first) for name in adapters},
        **{f"state_bytes after {name}": adapter.state_bytes() for name, (adapter, _) in adapters.items()},
        "snapshot_bytes": sum(t.nbytes for fields in snapshot.values() for t in fields.values()),
    }


def mixed(rounds: int) -> dict[str, Any]:
    """A batch of 64 x 16 rows of 768 that mixes tasks, against PEFT's adapter_names; inference."""
    base = nn.Sequential(nn.Linear(768, 768))
    model = copy.deepcopy(base)
    adapter = clora.attach(model, rank=16, factors="never", seed=0)
    for task in range(64):
        adapter.begin_task(str(task))
        with torch.no_grad():
            adapter.layers["0"].R_delta.normal_()
        adapter.end_task()
    other = copy.deepcopy(base)
    config = peft.LoraConfig(r=16, target_modules=["0"])
    wrapped = peft.get_peft_model(other, config, adapter_name="0")
    for task in range(1, 64):
        wrapped.add_adapter(str(task), config)
    wrapped.eval()
    x = torch.randn(64, 16, 768)
    cases: dict[str, Callable[[], object]] = {}
    for count in (1, 8, 64):
        names = [str(i % count) for i in range(64)]

        def ours(names: list[str] = names) -> None:
            with torch.no_grad(), adapter.rows(names):
                model(x)

        def theirs(names: list[str] = names) -> None:
            with torch.no_grad():
                wrapped(x, adapter_names=names)

        cases |= {f"clora {count}": ours, f"peft {count}": theirs}
    times = timed(cases, rounds)
    return {
        "clora 1 ms": 1e3 * statistics.median(times["clora 1"]),
        **{f"clora {count} / clora 1": ratio(times, f"clora {count}", "clora 1") for count in (8, 64)},
        **{f"clora {count} / peft {count}": ratio(times, f"clora {count}", f"peft {count}") for count in (1, 8, 64)},
    }


PARTS = ("layers", "models", "tasks", "mixed")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--rounds", type=int, default=31, help="interleaved rounds (31)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads on the CPU")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the frozen base")
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 100, 1000, 10000], help="counts for 'tasks'")
    parser.add_argument("--smoke", action="store_true", help="run everything briefly: no measurement")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    torch.set_num_threads(options.threads)
    rounds, counts = (1, [2, 4]) if options.smoke else (options.rounds, options.tasks)
    dtype = getattr(torch, options.dtype)
    run: dict[str, Callable[[], Any]] = {
        "layers": lambda: layers(rounds, options.device, dtype),
        "models": lambda: models(rounds, options.device, dtype),
        "tasks": lambda: tasks(counts, rounds),
        "mixed": lambda: mixed(rounds),
    }
    result: dict[str, Any] = {
        "machine": {
            "processor": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
            "threads": options.threads,
            "dtype": options.dtype,
            "versions": {name: metadata.version(name) for name in ("torch", "peft")},
        },
        **{part: run[part]() for part in options.parts or PARTS},
    }
    print(json.dumps(result, indent=1) if options.json else readable(result))


if __name__ == "__main__":
    main()
