"""The mathematics of C-LoRA (arXiv:2502.17920), written once against the Python Array API standard.

Imports array-api-compat and nothing else: no framework, no input or output, no random state, no globals. Every function
takes ``xp=None`` last, the namespace to compute in; under a compiler pass it explicitly.
"""

from . import bounds, errors, metrics
from ._adapter import Adapter, init_adapter, validate
from ._capabilities import Capability, capabilities
from ._expansion import Compressed, block_routing, compress, expand
from ._frames import orthonormality_defect, orthonormalize
from ._layer import apply, delta, linear, routing
from ._merge import Merged, MergeReport, merge
from ._moments import (
    Basis,
    Moments,
    drift,
    drift_vjp,
    empty_moments,
    project,
    protected_basis,
    record,
    second_moment,
)
from ._orthogonality import orthogonality, orthogonality_vjp
from ._plan import Plan, Product, plan
from ._tasks import begin_task, end_task
from ._vjp import DeltaGradients, LinearGradients, delta_vjp, linear_vjp

__all__ = [
    "Adapter",
    "Basis",
    "Capability",
    "Compressed",
    "DeltaGradients",
    "LinearGradients",
    "MergeReport",
    "Merged",
    "Moments",
    "Plan",
    "Product",
    "apply",
    "begin_task",
    "block_routing",
    "bounds",
    "capabilities",
    "compress",
    "delta",
    "delta_vjp",
    "drift",
    "drift_vjp",
    "empty_moments",
    "end_task",
    "errors",
    "expand",
    "init_adapter",
    "linear",
    "linear_vjp",
    "merge",
    "metrics",
    "orthogonality",
    "orthogonality_vjp",
    "orthonormality_defect",
    "orthonormalize",
    "plan",
    "project",
    "protected_basis",
    "record",
    "routing",
    "second_moment",
    "validate",
]
