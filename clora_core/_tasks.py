"""The routing's life cycle: at a task's boundary what was learned joins what is kept."""

from __future__ import annotations

from typing import Any

from . import _array as arr
from ._adapter import Adapter


def begin_task(adapter: Adapter, *, xp: Any = None) -> Adapter:
    r"""Start a task: fold what is left in R_delta, then learn from zero.

    :math:`R_{old} \leftarrow R_{old} + R_\delta,\ R_\delta \leftarrow 0`

    Parameters
    ----------
    adapter : Adapter

    Returns
    -------
    Adapter
        The same function, not one bit different: R was summed before use, and is now stored summed.

    Notes
    -----
    The sum is one rounding whether taken here or in `routing`, and adding zero is exact (a routing entry of -0 may
    turn into +0, which compares equal). Source: roll-over of arXiv:2502.17920, section 3 (inferred by its readers).
    """
    return _fold("clora_core.begin_task", adapter, xp)


def end_task(adapter: Adapter, *, xp: Any = None) -> Adapter:
    r"""Finish a task: fold R_delta into R_old. The function does not change, not by one bit; see `begin_task`."""
    return _fold("clora_core.end_task", adapter, xp)


def _fold(where: str, adapter: Adapter, xp: Any) -> Adapter:
    xp = arr.namespace(where, xp, *adapter)
    arr.check_adapter(where, xp, adapter, identity=True)
    R = adapter.R_old + adapter.R_delta
    return Adapter(adapter.A, R, xp.zeros_like(R), adapter.B)
