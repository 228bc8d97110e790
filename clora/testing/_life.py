"""What a life is made of: sizes, options and numbers, all from one seed; and the strategy that draws it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

import clora_core as core
import clora_store as store

from ._drivers import LAYERS, Base


class Life(NamedTuple):
    """One life: sizes, options, and a seed for every number in it."""

    seed: int
    dtype: str
    widths: tuple[int, int, int, int]  # of x, after a, after b, of the outputs
    rank: int
    spare: int
    factors: str
    energy: float | None
    weight: float | None
    stop_old: bool = True
    rows: int = 4
    lr: float = 1 / 64  # and small numbers: what bounds the growth of differences must not outgrow them

    def draw(self, name: str, *shape: int, scale: float = 1.0) -> np.ndarray:
        """Normal numbers under a name."""
        rng = np.random.default_rng([self.seed, *name.encode()])
        return (scale * rng.standard_normal(shape)).astype(self.dtype)

    def base(self) -> Base:
        """The frozen network."""
        pairs = zip(LAYERS, self.widths, self.widths[1:], strict=False)
        return Base(
            *(
                (self.draw(name, o, i, scale=0.5 * i**-0.5), self.draw(f"{name}-bias", o, scale=0.25))
                for name, i, o in pairs
            )
        )

    def data(self, task: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of one step; each task has directions of its own."""
        x = self.draw(f"x-{task}-{step}", self.rows, self.widths[0], scale=0.25)
        x[:, task % self.widths[0]] *= 4
        return x, self.draw(f"t-{task}-{step}", self.rows, self.widths[-1])

    def start(self) -> store.State:
        """The adapter before the first task, as every framework's ``attach`` would make it."""
        base, rng = self.base(), np.random.default_rng(self.seed)
        layers = {}
        for name, (W, _) in zip(LAYERS[:2], base[:2], strict=True):
            d_out, d_in = W.shape
            adapter = core.init_adapter(rng, d_out, d_in, self.rank + self.spare, dtype=self.dtype)
            r = self.rank
            zero = np.zeros((r, r), self.dtype)
            spare = (adapter.A[:, r:].copy(), adapter.B[r:].copy()) if self.spare else None
            own = core.Adapter(adapter.A[:, :r].copy(), zero, zero.copy(), adapter.B[:r].copy())
            layers[name] = store.Layer(
                "linear", store.Target(f"{name}.weight", W.shape), own, spare, self._empty(adapter)
            )
        W, bias = base.head
        V = np.concatenate([W, bias[:, None]], axis=1)
        adapter = core.Adapter(None, V, np.zeros_like(V), None)
        target = store.Target("head.weight", W.shape, bias="head.bias")
        layers["head"] = store.Layer("head", target, adapter, None, self._empty(adapter))
        options = {"stop_old": self.stop_old, "train_routing": True, "scale": 1.0}
        return store.State(layers, factors=self.factors, options=options)

    def _empty(self, adapter: core.Adapter) -> core.Moments | None:
        if self.factors == "every-task":
            return None
        return core.Moments(*(np.asarray(a, np.float64) for a in core.empty_moments(adapter)))


# factors, energy, weight, stop_old: every value of each with and without the others, in few combinations, since some
# frameworks compile for each.
OPTIONS = (
    ("first-task", 0.5, 0.125, True),
    ("first-task", 0.9, None, False),
    ("first-task", None, 0.125, True),
    ("never", 0.5, None, True),
    ("never", None, 0.125, False),
    ("every-task", None, None, True),
    ("every-task", None, None, False),
)
# widths, rank, spare directions, rows: of six rows the planner merges first; of four it goes row by row.
SHAPES = (((5, 6, 4, 3), 2, 1, 4), ((4, 4, 4, 2), 1, 2, 6), ((6, 5, 5, 3), 3, 0, 4))


@st.composite
def lives(draw: Any, *, protects: bool = True) -> Life:
    """A life of one of a few shapes and sets of options, with any numbers.

    Parameters
    ----------
    protects : bool
        Some lives project what they learn, for which the library must have ``linalg.eigh``.
    """
    options = OPTIONS if protects else tuple(row for row in OPTIONS if row[1] is None)
    seed, dtype = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from(("float32", "float64")))
    widths, rank, spare, rows = draw(st.sampled_from(SHAPES))
    factors, energy, weight, stop_old = draw(st.sampled_from(options))
    return Life(seed, dtype, widths, rank, spare, factors, energy, weight, stop_old, rows)
