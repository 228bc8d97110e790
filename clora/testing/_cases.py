"""What Hypothesis draws: sizes, leading axes, a seed, a dtype, dyadic or real numbers. NumPy makes the arrays of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

import clora_core as core

from ._backends import Backend


class Sizes(NamedTuple):
    """Rows, outputs, inputs, rank."""

    n: int
    d_out: int
    d_in: int
    r: int


class Leads(NamedTuple):
    """Leading axes of each array; they broadcast with one another."""

    x: tuple[int, ...] = ()
    W: tuple[int, ...] = ()
    A: tuple[int, ...] = ()
    R_old: tuple[int, ...] = ()
    R_delta: tuple[int, ...] = ()
    B: tuple[int, ...] = ()

    @property
    def all(self) -> tuple[int, ...]:
        """The common broadcast."""
        return np.broadcast_shapes(*self)

    @property
    def adapter(self) -> tuple[int, ...]:
        """The broadcast of the adapter's four arrays."""
        return np.broadcast_shapes(*self[2:])


# A compiler takes long for every shape: JAX runs on these alone.
TABLE = (
    (Sizes(3, 4, 5, 2), Leads()),
    (Sizes(4, 3, 2, 2), Leads(x=(2,))),
    (Sizes(2, 2, 4, 1), Leads(x=(2, 1), W=(1,), A=(3,), R_old=(2, 1), R_delta=(3,), B=())),
    (Sizes(0, 3, 4, 3), Leads()),
)
LONG = (Sizes(4, 16, 64, 8), Sizes(16, 64, 48, 16), Sizes(3, 5, 768, 4))


class Case(NamedTuple):
    """One example; every array is drawn from its seed, under its own name."""

    sizes: Sizes
    leads: Leads
    dtype: str
    seed: int
    dyadic: bool
    tabled: bool
    positive: bool = False

    def fits(self, backend: Backend, *, linalg: bool = False) -> bool:
        """Whether a backend can run it: has the dtype, the ``linalg`` extension if asked for, and takes the shape."""
        return (
            self.dtype in backend.dtypes and (self.tabled or not backend.few_shapes) and (backend.linalg or not linalg)
        )

    def draw(self, name: str, *shape: int, top: int = 8, unit: int = 4) -> np.ndarray:
        """An array of k/unit, |k| <= top, or of normal numbers; read-only."""
        rng = np.random.default_rng([self.seed, *name.encode()])
        numbers = rng.integers(-top, top + 1, shape) / unit if self.dyadic else rng.standard_normal(shape)
        numbers = np.abs(numbers) if self.positive else numbers
        out = np.asarray(numbers, dtype=self.dtype)
        out.setflags(write=False)
        return out

    def adapter(self, **how: int) -> core.Adapter:
        """Four arrays with their leading axes."""
        _, d_out, d_in, r = self.sizes
        ends = {"A": (d_out, r), "R_old": (r, r), "R_delta": (r, r), "B": (r, d_in)}
        return core.Adapter(**{k: self.draw(k, *getattr(self.leads, k), *end, **how) for k, end in ends.items()})

    @property
    def x(self) -> np.ndarray:
        return self.draw("x", *self.leads.x, self.sizes.n, self.sizes.d_in)

    @property
    def W(self) -> np.ndarray:
        return self.draw("W", *self.leads.W, self.sizes.d_out, self.sizes.d_in)

    @property
    def bias(self) -> np.ndarray:
        return self.draw("bias", *self.leads.W, self.sizes.d_out)

    @property
    def grad_y(self) -> np.ndarray:
        return self.draw("g", *self.leads.all, self.sizes.n, self.sizes.d_out)


@st.composite
def leading(draw: Any) -> Leads:
    """Up to three leading axes, each absent, 1 or repeated in each array."""
    base = draw(st.lists(st.integers(1, 2), max_size=3))
    shapes = []
    for _ in range(6):
        depth = draw(st.integers(0, len(base)))
        ones = [draw(st.booleans()) for _ in range(depth)]
        shapes.append(tuple(1 if one else size for one, size in zip(ones, base[len(base) - depth :], strict=True)))
    return Leads(*shapes)


@st.composite
def cases(
    draw: Any,
    *,
    dyadic: bool | None = None,
    rows: int = 0,
    widest: int = 5,
    batched: bool = True,
    long: bool = False,
) -> Case:
    """A case; about one in four from the table that JAX runs.

    Parameters
    ----------
    dyadic : bool, optional
        Numbers k/4, whose sums of products have no rounding in float32; or normal numbers; None draws which.
    rows : int
        The fewest rows of x.
    widest : int
        The largest of d_out and d_in, off the table.
    batched : bool
        With leading axes, now and then.
    long : bool
        Also inner sizes up to 768, about one in four; never dyadic.
    """
    kind = draw(st.booleans()) if dyadic is None else dyadic
    dtype, seed = draw(st.sampled_from(("float32", "float64"))), draw(st.integers(0, 2**32 - 1))
    if long and not kind and draw(st.integers(0, 2)) == 0:
        positive = draw(st.booleans())  # nothing cancels: where errors come nearest to their bounds
        return Case(draw(st.sampled_from(LONG)), Leads(), dtype, seed, False, True, positive)
    tabled = draw(st.integers(0, 3)) == 0
    if tabled:
        usable = [entry for entry in TABLE if entry[0].n >= rows and (batched or entry[1] == Leads())]
        sizes, leads = draw(st.sampled_from(usable))
    else:
        d_out, d_in = draw(st.integers(1, widest)), draw(st.integers(1, widest))
        r = draw(st.one_of(st.integers(1, min(d_out, d_in)), st.just(min(d_out, d_in))))
        sizes = Sizes(draw(st.integers(rows, 6)), d_out, d_in, r)
        leads = draw(leading()) if batched and draw(st.booleans()) else Leads()
    return Case(sizes, leads, dtype, seed, kind, tabled)
