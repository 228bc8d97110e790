"""What a saved adapter is made of: sizes, spectra, how much tasks overlap, how two adapters differ. No output here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import clora_core as core
import clora_store as store

Array = Any


class LayerAnatomy(NamedTuple):
    """One layer in numbers.

    Attributes
    ----------
    name, kind, weight : str
    d_out, d_in, rank, spare : int
        ``rank`` and ``spare`` are 0 for a head.
    norm : float
        Frobenius norm of A R B; of a head, of what has been learnt since the first finished task (0 without one).
    spectrum : list of float
        Singular values of A R B, descending; empty for a head.
    effective_rank : float
        (sum of s^2)^2 / sum of s^4 over the spectrum: how many directions carry it.
    """

    name: str
    kind: str
    weight: str
    d_out: int
    d_in: int
    rank: int
    spare: int
    norm: float
    spectrum: list[float]
    effective_rank: float

    def cells(self) -> tuple[str, ...]:
        """The row of a table, up to the spectrum."""
        rank = "" if self.kind == "head" else f"{self.rank}" + (f" + {self.spare}" if self.spare else "")
        effective = f"{self.effective_rank:.1f}" if self.spectrum else ""
        return self.name, self.kind, f"{self.d_out} x {self.d_in}", rank, f"{self.norm:.3g}", effective


CELLS = ("layer", "kind", "d_out x d_in", "rank", "norm", "effective rank")


def layers(state: store.State) -> list[LayerAnatomy]:
    """Every layer in numbers."""
    out = []
    for name, layer in state.layers.items():
        adapter = _wide(store.adapter_at(state, name))
        d_out, d_in = layer.target.matrix
        about = (name, layer.kind, layer.target.weight, d_out, d_in)
        if layer.kind == "head":
            first = next(iter(state.snapshots), None)
            V = core.routing(adapter)
            before = V if first is None else _wide(store.adapter_at(state, name, first)).R_old
            out.append(LayerAnatomy(*about, 0, 0, float(np.linalg.norm(V - before)), [], 0.0))
            continue
        s = _spectrum(adapter)
        energy = float(np.sum(s**2))
        effective = energy**2 / float(np.sum(s**4)) if energy else 0.0
        spare = 0 if layer.spare is None else layer.spare[1].shape[0]
        rank = adapter.R_old.shape[0]
        out.append(LayerAnatomy(*about, rank, spare, energy**0.5, [float(v) for v in s], effective))
    return out


def _spectrum(adapter: core.Adapter) -> Array:
    """Singular values of A R B; NaN where an adapter is not finite."""
    r = adapter.R_old.shape[0]
    if not all(np.isfinite(array).all() for array in adapter if array is not None):
        return np.full(r, np.nan)
    return np.diagonal(core.compress(adapter, r).adapter.R_old)


def overlap(state: store.State, tasks: Sequence[str]) -> Array:
    r"""How alike what tasks have learnt is: :math:`\langle D_i, D_j\rangle / (\|D_i\| \|D_j\|)`, summed over layers.

    :math:`D_t` is the change of all updates in task t. 1: the same change; 0: changes that do not touch each other; -1:
    one undoes the other. A task that changed nothing has 0 with all. Heads are left out.

    Parameters
    ----------
    tasks : sequence of str
        From `comparable`.

    Returns
    -------
    array, shape (tasks, tasks)
    """
    before = {task: state.tasks[i - 1] if i else None for i, task in enumerate(state.tasks)}
    needed = {name for task in tasks for name in (task, before[task]) if name is not None}
    snapshots = {task: state.snapshots[task] for task in needed}
    total = np.zeros((len(tasks), len(tasks)))
    for name, layer in state.layers.items():
        if layer.kind == "head" or not tasks:
            continue
        if state.factors == "every-task":
            at = {task: _wide(store.adapter_at(state, name, task)) for task in needed}
            pairs = [store.difference(at[task], at[old] if (old := before[task]) else None) for task in tasks]
            total += [[float(np.sum((a.T @ c) * (b @ d.T))) for c, d in pairs] for a, b in pairs]
            continue
        # Factors are shared: D = A C B with a small C, whose products in orthonormal frames are those of D.
        A, B = (np.asarray(factor, dtype=np.float64) for factor in layer.factors())
        T_A, T_B = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (A, B.T))
        r = A.shape[1]
        routing = {task: _at_rank(snapshots[task][name].R, r) for task in needed}
        changes = [routing[task] - (routing[old] if (old := before[task]) else 0.0) for task in tasks]
        flat = np.stack([(T_A @ change @ T_B.T).reshape(-1) for change in changes])
        total += flat @ flat.T
    size = np.sqrt(np.maximum(np.diagonal(total), 0.0))
    scale = size[:, None] * size[None, :]
    return np.divide(total, scale, out=np.zeros_like(total), where=scale > 0)


def comparable(state: store.State) -> list[str]:
    """Tasks whose own change is known: they and the task before have a snapshot."""
    known = [True, *(task in state.snapshots for task in state.tasks)]
    return [task for i, task in enumerate(state.tasks) if known[i] and known[i + 1]]


class LayerDifference(NamedTuple):
    """One layer of two adapters: norms of both updates and of their difference, and what has the same bits."""

    name: str
    norm_a: float
    norm_b: float
    distance: float
    same_factors: bool
    same_routing: bool
    same_memory: bool


class Difference(NamedTuple):
    """Two adapters: what only one has, and every layer that both have (None where their sizes differ)."""

    layers: dict[str, LayerDifference | None]
    only_a: list[str]
    only_b: list[str]
    tasks_a: list[str]
    tasks_b: list[str]
    otherwise: list[str]  # what else differs: snapshots, options, ...

    @property
    def same(self) -> bool:
        """Whether all that makes the function, the memory and the past is the same to the bit."""
        both = [d for d in self.layers.values() if d is not None]
        equal = len(both) == len(self.layers) and all(d.same_factors and d.same_routing and d.same_memory for d in both)
        return equal and not (self.only_a or self.only_b or self.otherwise) and self.tasks_a == self.tasks_b


def compare(a: store.State, b: store.State) -> Difference:
    """How two adapters differ."""
    out: dict[str, LayerDifference | None] = {}
    for name in a.layers.keys() & b.layers.keys():
        one, two = a.layers[name], b.layers[name]
        if one.kind != two.kind or one.target.matrix != two.target.matrix:
            out[name] = None
            continue
        now, other = _wide(store.adapter_at(a, name)), _wide(store.adapter_at(b, name))
        if one.kind == "head":
            if now.R_old.shape != other.R_old.shape:
                out[name] = None
                continue
            V, V_other = core.routing(now), core.routing(other)
            norms = [float(np.linalg.norm(x)) for x in (V, V_other, V - V_other)]
        else:
            norms = [_norm(x, y) for x, y in ((now, None), (other, None), (now, other))]
        factors = _same((one.adapter.A, one.adapter.B), (two.adapter.A, two.adapter.B))
        routing = _same(one.adapter[1:3], two.adapter[1:3])
        memory = _same(one.moments or (), two.moments or ())
        out[name] = LayerDifference(name, norms[0], norms[1], norms[2], factors, routing, memory)
    ordered = {name: out[name] for name in a.layers if name in out}
    only_a, only_b = ([n for n in x.layers if n not in y.layers] for x, y in ((a, b), (b, a)))
    return Difference(ordered, only_a, only_b, list(a.tasks), list(b.tasks), _otherwise(a, b))


def _otherwise(a: store.State, b: store.State) -> list[str]:
    """What differs beside layers that one has alone, tasks, factors, routings and memory. Provenance does not count."""
    out = [field for field in ("factors", "unobserved", "open", "options") if getattr(a, field) != getattr(b, field)]
    for name in a.layers.keys() & b.layers.keys():
        one, two = a.layers[name], b.layers[name]
        if (one.kind, one.target, one.complete) != (two.kind, two.target, two.complete):
            out.append(f"target of {name}")
        if not _same([*(one.spare or ()), one.observed], [*(two.spare or ()), two.observed]):
            out.append(f"spare or observed directions of {name}")
    for task in [task for task in a.tasks if task in b.tasks]:
        pair = a.snapshots.get(task, {}), b.snapshots.get(task, {})
        names = pair[0].keys() & pair[1].keys()
        if (task in a.snapshots) != (task in b.snapshots) or not all(_same(pair[0][n], pair[1][n]) for n in names):
            out.append(f"snapshot of task {task}")
    return out


def _at_rank(R: Array, r: int) -> Array:
    """A routing at a higher rank, in float64."""
    return np.pad(np.asarray(R, dtype=np.float64), ((0, r - R.shape[0]), (0, r - R.shape[0])))


def _norm(now: core.Adapter, before: core.Adapter | None) -> float:
    """Of what an adapter has more than another; NaN where one is not finite."""
    arrays = [array for adapter in (now, before or now) for array in adapter if array is not None]
    if not all(np.isfinite(array).all() for array in arrays):
        return float("nan")
    return store.difference(now, before).norm()


def _bits(array: Array) -> tuple[Any, ...]:
    return array.dtype, array.shape, array.tobytes()


def _same(one: Sequence[Array | None], two: Sequence[Array | None]) -> bool:
    return len(one) == len(two) and all(
        (x is None and y is None) or (x is not None and y is not None and _bits(x) == _bits(y))
        for x, y in zip(one, two, strict=True)
    )


def _wide(adapter: core.Adapter) -> core.Adapter:
    return core.Adapter(*(None if array is None else np.asarray(array, dtype=np.float64) for array in adapter))
