"""Adapters on disk: the folder every framework loads, PEFT export and import, checkpoints merged in a stream.

NumPy arrays in, NumPy arrays out; the frameworks' packages convert. The format is described in docs/format.md.
"""

from ._checkpoint import LayerReport, Merged, merge_checkpoint
from ._folder import digest, load, save
from ._functions import Update, adapter_at, difference
from ._peft_export import VLLM_RANKS, Exported, export_peft, vllm_problems
from ._peft_import import import_peft
from ._state import Layer, Snapshot, State, Target, check, places

__all__ = [
    "VLLM_RANKS",
    "Exported",
    "Layer",
    "LayerReport",
    "Merged",
    "Snapshot",
    "State",
    "Target",
    "Update",
    "adapter_at",
    "check",
    "difference",
    "digest",
    "export_peft",
    "import_peft",
    "load",
    "merge_checkpoint",
    "places",
    "save",
    "vllm_problems",
]
