"""One table of what each public function needs and does; documentation, tests and the audit read it."""

from __future__ import annotations

from typing import Any, NamedTuple


class Capability(NamedTuple):
    """What one function needs and does.

    Attributes
    ----------
    linalg : bool
        Needs the ``linalg`` extension of the Array API standard (on some option at least).
    jit : bool
        Runs under jax.jit, jax.vmap, torch.compile(fullgraph=True) and torch.func; False: eager only.
    gradients : str
        What autodiff may differentiate: "all" array arguments, "R_delta" alone, "simple" (all, where singular or
        eigenvalues differ), or "none".
    """

    linalg: bool
    jit: bool
    gradients: str


_TABLE = {
    "init_adapter": Capability(linalg=True, jit=False, gradients="none"),
    "validate": Capability(linalg=True, jit=False, gradients="none"),
    "routing": Capability(linalg=False, jit=True, gradients="all"),
    "delta": Capability(linalg=False, jit=True, gradients="all"),
    "apply": Capability(linalg=False, jit=True, gradients="all"),
    "linear": Capability(linalg=False, jit=True, gradients="all"),
    "linear_vjp": Capability(linalg=False, jit=True, gradients="all"),
    "delta_vjp": Capability(linalg=False, jit=True, gradients="all"),
    "plan": Capability(linalg=False, jit=True, gradients="none"),
    "begin_task": Capability(linalg=False, jit=True, gradients="all"),
    "end_task": Capability(linalg=False, jit=True, gradients="all"),
    "expand": Capability(linalg=False, jit=True, gradients="all"),
    "compress": Capability(linalg=True, jit=True, gradients="simple"),
    "block_routing": Capability(linalg=False, jit=True, gradients="all"),
    "orthogonality": Capability(linalg=True, jit=True, gradients="R_delta"),
    "orthogonality_vjp": Capability(linalg=True, jit=True, gradients="R_delta"),
    "empty_moments": Capability(linalg=False, jit=True, gradients="none"),
    "second_moment": Capability(linalg=False, jit=True, gradients="all"),
    "record": Capability(linalg=False, jit=True, gradients="all"),
    "drift": Capability(linalg=False, jit=True, gradients="all"),
    "drift_vjp": Capability(linalg=False, jit=True, gradients="all"),
    "protected_basis": Capability(linalg=True, jit=True, gradients="none"),
    "project": Capability(linalg=False, jit=True, gradients="all"),
    "orthonormalize": Capability(linalg=True, jit=True, gradients="simple"),
    "orthonormality_defect": Capability(linalg=False, jit=True, gradients="all"),
    "merge": Capability(linalg=False, jit=True, gradients="all"),
    "capabilities": Capability(linalg=False, jit=True, gradients="none"),
}
_METRICS = (
    "last_accuracy",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "forward_transfer",
    "forgetting",
)
_BOUNDS = (
    "routing",
    "delta",
    "apply",
    "linear",
    "delta_vjp",
    "linear_vjp",
    "second_moment",
    "record",
    "drift",
    "drift_vjp",
    "orthogonality",
    "project",
    "merge",
)


def capabilities(*, xp: Any = None) -> dict[str, Capability]:
    """The table: dotted name below ``clora_core`` -> Capability. ``xp`` is taken for uniformity and ignored."""
    table = dict(_TABLE)
    table |= {f"metrics.{name}": Capability(linalg=False, jit=True, gradients="all") for name in _METRICS}
    table |= {f"bounds.{name}": Capability(linalg=False, jit=True, gradients="none") for name in _BOUNDS}
    table |= {
        f"bounds.{name}": Capability(linalg=False, jit=True, gradients="none")
        for name in ("unit_roundoff", "gamma", "orthonormal")
    }
    return table
