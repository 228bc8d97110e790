"""A small network that learns tasks in torch: what the tests of clora_torch share."""

from typing import Any

import torch

import clora_torch as clora

nn, functional = torch.nn, torch.nn.functional
X = torch.randn(16, 20, generator=torch.Generator().manual_seed(0))


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))


def attach(net: Any, **options: Any) -> Any:
    return clora.attach(net, **{"rank": 8, "targets": ["0", "2"], "heads": "4", "seed": 0, **options})


def data(task: int, batches: int = 4, rows: int = 24, dtype: str = "float32") -> list[Any]:
    """Inputs of a task live in five directions of their own, and a little in all."""
    generator = torch.Generator().manual_seed(task)
    out = []
    for _ in range(batches):
        x = torch.randn(rows, 20, generator=generator)
        x[:, 5 * (task % 4) : 5 * (task % 4) + 5] *= 10
        out.append((x.to(getattr(torch, dtype)) / 10, torch.randint(0, 4, (rows,), generator=generator)))
    return out


def adam(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def train(adapter: Any, optimizer: Any, batches: list[Any], *, epochs: int = 2, penalty: float | None = None) -> None:
    for _ in range(epochs):
        for x, y in batches:
            loss = functional.cross_entropy(adapter.model(x), y)
            if penalty is not None:
                loss = loss + adapter.penalty(penalty)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def learn(adapter: Any, optimizer: Any, task: int, *, dtype: str = "float32", **how: Any) -> None:
    with adapter.task(f"task-{task}"):
        train(adapter, optimizer, data(task, dtype=dtype), **how)
        adapter.observe(data(task, dtype=dtype))
