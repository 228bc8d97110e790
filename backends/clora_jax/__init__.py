"""C-LoRA for JAX: pure functions over pytrees of layers, under jit, grad, vmap, scan and on a mesh.

`attach` makes adapters beside untouched params, `bind` puts both together for a forward pass. `clora_jax.nnx` and
`clora_jax.equinox` have layers for these libraries. Formulas are clora_core's.
"""

from ._missing import need

need("jax", "optax", where="clora_jax", extra="jax")

from ._attach import attach
from ._bind import Kernel, bind
from ._function import apply, delta, linear
from ._history import History, restore, rows
from ._layer import Info, Layer, layers, map_layers
from ._merge import Merged, merge, unmerge
from ._observe import masked, observe, second_moments
from ._protect import full, learning, protect
from ._store import export_peft, load, save
from ._tasks import begin_task, drift, end_task, expand, penalty

__all__ = [
    "History",
    "Info",
    "Kernel",
    "Layer",
    "Merged",
    "apply",
    "attach",
    "begin_task",
    "bind",
    "delta",
    "drift",
    "end_task",
    "expand",
    "export_peft",
    "full",
    "layers",
    "learning",
    "linear",
    "load",
    "map_layers",
    "masked",
    "merge",
    "observe",
    "penalty",
    "protect",
    "restore",
    "rows",
    "save",
    "second_moments",
    "unmerge",
]
