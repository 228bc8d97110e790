"""The arrays that attach puts beside a layer: one adapter, its memory, and the directions it may grow into."""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import clora_core as core
from clora_core.errors import StateError, message

from ._distributed import fingerprint, full, is_split

HALF = (torch.float16, torch.bfloat16)


class LayerAdapter(nn.Module):
    """The arrays of one adapter and of its memory; a child of the layer, so that they move and are saved with it.

    Attributes
    ----------
    A, R_delta, B : Parameter
        A and B are None for a head (identity factors).
    R_old : buffer
        The past.
    A_spare, B_spare : buffers or None
        Directions that `ContinualAdapter.expand` will use; they are observed from the start.
    S, P, q : buffers
        `clora_core.Moments` over all directions, the spare ones last; in float64 where the device has it.
    rows : (int, int) or None
        The rows of the weight that are adapted, for one part of a fused projection.
    """

    A: Any
    B: Any
    A_spare: Tensor | None
    B_spare: Tensor | None
    R_delta: nn.Parameter
    R_old: Tensor
    S: Tensor
    P: Tensor
    q: Tensor

    def __init__(
        self, adapter: core.Adapter, *, rows: tuple[int, int] | None = None, stop_old: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        A, R_old, R_delta, B = adapter
        # Row-major, as its gradient comes: autograd would copy the gradient at every step into another layout.
        self.A = None if A is None else nn.Parameter(A.contiguous())
        self.B = None if B is None else nn.Parameter(B.contiguous())
        self.R_delta = nn.Parameter(R_delta)
        self.register_buffer("R_old", R_old.clone())  # a start of zeros may be one array for both routings
        self.register_buffer("A_spare", None)
        self.register_buffer("B_spare", None)
        for name, array in zip(core.Moments._fields, core.empty_moments(wide(adapter), xp=xp), strict=True):
            self.register_buffer(name, array)
        self.rows, self.stop_old, self.dropout = rows, stop_old, dropout
        self.enabled = True
        self.R_rows: Tensor | None = None  # one routing for each row of the batch, while `rows(...)` is open
        self.seen: tuple[Tensor, Tensor] | None = None  # sum of u u^T and of weights, while observing
        self.mask: Tensor | None = None
        self.recorded: tuple[tuple[int, ...], int] | None = None  # versions and bits of the factors
        self.merged = False
        # nn.TransformerEncoderLayer's fused inference reads weights past their modules unless something has a hook.
        self.register_forward_pre_hook(_no_hook)

    @property
    def adapter(self) -> core.Adapter:
        """The four arrays in use."""
        return core.Adapter(full(self.A), self.R_old, full(self.R_delta), full(self.B))

    @property
    def whole(self) -> core.Adapter:
        """The same function at the highest rank, the spare directions included."""
        if self.A_spare is None:
            return self.adapter
        return core.expand(self.adapter, self.A_spare, self.B_spare, xp=xp)

    @property
    def rank(self) -> int:
        """Directions in use."""
        return self.R_old.shape[-1]

    @property
    def moments(self) -> core.Moments:
        """The memory of the directions in use."""
        if self.A_spare is None:
            return core.Moments(self.S, self.P, self.q)
        r = self.rank
        return core.Moments(self.S[:r, :r], self.P[:r, :r], self.q)

    def trained(self) -> list[nn.Parameter]:
        """Parameters that are not None."""
        return [p for p in (self.A, self.R_delta, self.B) if p is not None]

    def versions(self) -> tuple[int, ...]:
        """Changes whenever a factor is written to."""
        return tuple(factor._version for factor in (self.A, self.B) if factor is not None)

    def remember(self) -> None:
        """Note the factors that the memory belongs to."""
        self.recorded = (self.versions(), int(fingerprint((self.A, self.B))))

    def moved(self, *, thorough: bool = False) -> bool:
        """Whether the factors are others than those noted. DistributedDataParallel writes the same bits over them.

        Without ``thorough``, what is written past autograd (``A.data``) is not noticed.
        """
        if self.recorded is None or (self.recorded[0] == self.versions() and not thorough):
            return False
        if self.recorded[1] != int(fingerprint((self.A, self.B))):
            return True
        self.recorded = (self.versions(), self.recorded[1])
        return False

    def need_whole(self, verb: str) -> None:
        """Refuse what can't be done while fully_shard holds the Parameters."""
        if is_split(self.R_delta):
            raise StateError(
                message(
                    f"clora_torch.{verb}",
                    "the Parameters are split by fully_shard",
                    got="a DTensor",
                    needed="plain Parameters",
                    cause="a verb that exchanges Parameters, on a model that fully_shard manages",
                    fix="save adapter.state_dict(), load it into an attached model in one process, and do it there",
                )
            )

    # --- size --------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_rank(self, rank: int) -> None:
        """Move the border between directions in use and spare ones; the routing is cut, or padded with zeros.

        The Parameters stay the same objects, and every direction keeps its bits.
        """
        if rank == self.rank:
            return
        known = self.recorded is not None and not self.moved()
        self.need_whole("set_rank")
        A, _, _, B = (array.detach() for array in self.whole)
        more, kept = max(rank - self.rank, 0), min(rank, self.rank)
        spare = rank < A.shape[1]
        self.A_spare = A[:, rank:].contiguous() if spare else None
        self.B_spare = B[rank:].clone() if spare else None
        self.R_old = functional.pad(self.R_old[:kept, :kept], (0, more, 0, more))
        resize(self.A, A[:, :rank].contiguous())
        resize(self.B, B[:rank].clone())
        resize(self.R_delta, functional.pad(self.R_delta[:kept, :kept], (0, more, 0, more)))
        if known:
            self.remember()

    @torch.inference_mode(False)
    @torch.no_grad()
    def add_spare(self, count: int, rng: np.random.Generator, scale: float) -> None:
        """Draw directions, orthonormal up to ``scale`` and orthogonal to those there; the memory knows 0 of them."""
        A, _, _, B = self.whole
        for name, factor, size in (("A_spare", A, scale), ("B_spare", B.T, 1.0)):
            d, r = factor.shape
            # Drawn and made orthogonal in NumPy float64: the same directions on every device.
            joint = np.concatenate([factor.cpu().double().numpy(), rng.standard_normal((d, count))], axis=1)
            new = torch.from_numpy(size * core.orthonormalize(joint)[:, r:]).to(factor)
            old = getattr(self, name)
            if name == "B_spare":
                new = new.T
            setattr(self, name, new.contiguous() if old is None else torch.cat([old, new], dim=name == "A_spare"))
        self.S = functional.pad(self.S, (0, count, 0, count))
        self.P = functional.pad(self.P, (0, count, 0, count))

    @torch.inference_mode(False)
    @torch.no_grad()
    def add_outputs(self, count: int) -> None:
        """Rows of zeros for a head: new classes, whose logits are 0 until they learn."""
        self.need_whole("add_outputs")
        below = (0, 0, 0, count)
        self.R_old, self.P = functional.pad(self.R_old, below), functional.pad(self.P, below)
        resize(self.R_delta, functional.pad(self.R_delta, below))

    # --- memory ------------------------------------------------------------------------------------------------

    def observe(self, u: Tensor) -> None:
        """Add the rows u (..., r) to the open observation."""
        assert self.seen is not None
        total, count = self.seen
        flat = widen(u.reshape(-1, u.shape[-1]))
        weights = None
        if self.mask is not None and self.mask.shape == u.shape[:-1]:
            weights = self.mask.reshape(-1).to(flat.dtype)
        n = flat.new_tensor(float(flat.shape[0])) if weights is None else weights.sum()
        C = core.second_moment(flat, weights=weights, xp=xp)
        self.seen = (total + n * C, count + n)

    def record(self, C: Tensor) -> None:
        """Add a finished task, folded, to the memory."""
        new = core.record(core.Moments(self.S, self.P, self.q), wide(self.whole), C, xp=xp)
        self.S, self.P, self.q = new
        self.remember()

    # --- moving and saving -------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> LayerAdapter:
        """Moves follow the model; casts to half precision and casts of the memory do not."""
        memory = {id(self.S), id(self.P), id(self.q)}

        def move(t: Tensor) -> Tensor:
            out = fn(t)
            if out.dtype != t.dtype and (out.dtype in HALF or id(t) in memory):
                return t.to(out.device)
            return out

        return super()._apply(move, recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if not self.merged:  # a merged model's state is that of the plain model
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.merged:
            raise StateError(
                message(
                    "clora_torch.load_state_dict",
                    "the adapters are merged into the weights",
                    got="a load into a merged model",
                    needed="an unmerged model",
                    cause="merge() without unmerge()",
                    fix="call adapter.unmerge() first",
                )
            )
        super()._load_from_state_dict(*args, **kwargs)
        if self.recorded is not None:  # factors and memory came together
            self.remember()


def _no_hook(module: nn.Module, args: Any) -> None:
    """Only its presence matters."""


def resize(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a Parameter, the same object, a value of another shape.

    What accumulates its gradient knows its shape, and lives on in any graph that is still held (a loss, an output);
    torch makes a new one only where the dtype changes, so it is changed there and back.
    """
    parameter.grad = None
    parameter.data = value.new_empty(0, dtype=torch.float16)
    parameter.data = value


def widen(array: Tensor) -> Tensor:
    """float64, or the array itself on a device that has none."""
    return array if array.device.type == "mps" else array.to(torch.float64)


def wide(adapter: core.Adapter) -> core.Adapter:
    """The adapter's values in float64 where there is one, without their history."""
    return core.Adapter(*(None if array is None else widen(array.detach()) for array in adapter))
