"""Two processes of torch.distributed on one machine: what the tests of DDP and FSDP2 share."""

import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

PROCESSES = 2
PATIENCE = datetime.timedelta(seconds=120)  # a collective that some process never comes to


def together(work: Callable[[int], None], folder: Path) -> None:
    """Run ``work(rank)`` in two processes; an exception or assertion in either fails the test, and so does a hang."""
    lanes = os.environ.get("CLORA_LANES")
    os.environ["CLORA_LANES"] = "torch"  # the processes need no other library
    try:
        context: Any = multiprocessing.spawn(_process, (work, str(folder / "meeting")), PROCESSES, join=False)
    finally:
        os.environ.pop("CLORA_LANES") if lanes is None else os.environ.update(CLORA_LANES=lanes)
    end = time.monotonic() + 2 * PATIENCE.total_seconds()
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise AssertionError("the processes hang")


def _process(rank: int, work: Callable[[int], None], meeting: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=PROCESSES, timeout=PATIENCE
    )
    work(rank)
    distributed.barrier()
    distributed.destroy_process_group()


def equal_everywhere(tensors: dict[str, Any]) -> None:
    """Every process holds the same bits."""
    for name, tensor in tensors.items():
        copies = [torch.empty_like(tensor) for _ in range(PROCESSES)]
        distributed.all_gather(copies, tensor.contiguous())
        assert all(torch.equal(copy, copies[0]) for copy in copies), name
