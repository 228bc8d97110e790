"""PEFT's LoRA folders as the start of an adapter: plain LoRA alone, and nothing that is pickled."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

import clora_core as core
from clora_core.errors import InvalidValueError, message

from . import _safetensors as st
from ._errors import bad
from ._state import Array, Layer, Snapshot, State, Target, check

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STARTS = (True, "gaussian", "orthogonal", "eva")  # of lora_A and lora_B; others change the base weights, too
# Settings that leave it W + scale * lora_B lora_A; any other that is set may not.
PLAIN = re.findall(
    r"\w+",
    """
    peft_type auto_mapping peft_version base_model_name_or_path revision task_type inference_mode r target_modules
    exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save layers_to_transform
    layers_pattern rank_pattern alpha_pattern eva_config megatron_config megatron_core qalora_group_size
    runtime_config ensure_weight_tying
    """,
)
PREFIX = "base_model.model."
LARGEST_CONFIG, LONGEST_NAME = 1 << 24, 1000
PATTERN = re.compile(r"\^?(?:\w|-|\\?\.|(?<=\.)\*)*\$?")  # regular expressions beyond that could run for ever


def import_peft(folder: str | os.PathLike[str], *, task: str | None = None, orthonormal: bool = False) -> State:
    """A PEFT LoRA folder as the start of an adapter: the same function, its past.

    Parameters
    ----------
    folder : path
        With ``adapter_config.json`` and ``adapter_model.safetensors``; pickled weights are never read.
    task : str, optional
        Count it as a finished task of that name. It was not observed, so the memory does not cover it.
    orthonormal : bool
        Choose the frames that `clora_core.compress` gives (A and B orthonormal, R diagonal; the same function within
        rounding). By default A is scale * lora_B, B is lora_A, R_old the identity.

    Returns
    -------
    State
        In float32. Layouts are (out, in), and (in, out) where ``fan_in_fan_out`` is set; a framework's ``load`` takes
        its model's own.

    Raises
    ------
    FormatError
        A folder that is none, damaged, or of a kind that is no plain LoRA (DoRA, trained biases, other PEFT types).
    InvalidValueError
        NaN, infinity, or a layer whose lora_B is zero (a start that no routing could learn from).
    """
    where = f"clora_store.import_peft({os.fspath(folder)!r})"
    path = Path(folder)
    config = read_config(path, where)
    _refuse_config(config, where)
    if not (path / WEIGHTS).exists():
        cause, fix = "pickled weights (.bin), which are never read", "save it again with safetensors, by PEFT"
        raise bad(where, f"there is no {WEIGHTS}", "no such file", WEIGHTS, cause=cause, fix=fix)
    with st.opened(path / WEIGHTS, where) as fd:
        header = st.read_header(fd, where)
        for key, entry in header.entries.items():
            if 0 in entry.shape:
                raise bad(where, f"tensor {key!r} is empty", entry.shape, "at least one number")
            if entry.dtype not in st.DTYPES:
                raise bad(where, f"tensor {key!r} has a dtype that no adapter has", entry.dtype, ", ".join(st.DTYPES))
        tensors = {key: array for key, (array, _) in st.read_tensors(fd, header, where).items()}
    pairs, heads = _pairs(tensors, config, where)
    layers = {}
    for module, (kind, first, second) in pairs.items():
        r = first.shape[0]
        A = (_scale(module, r, config, where) * second.reshape(second.shape[0], r).astype(np.float64)).astype(
            np.float32
        )
        B = np.ascontiguousarray(first.reshape(r, -1).astype(np.float32))
        if not (np.isfinite(A).all() and np.isfinite(B).all()):
            raise _value(where, module, "NaN or infinity", "finite numbers", "take an earlier checkpoint")
        used = A.any(axis=0) & B.any(axis=1)  # the rest pads the rank
        if not used.any():
            raise _value(where, module, "lora_B = 0", "a LoRA that has learnt", "attach a fresh adapter instead")
        A, B = np.ascontiguousarray(A[:, used]), np.ascontiguousarray(B[used])
        r = A.shape[1]
        adapter = core.Adapter(A, np.eye(r, dtype=np.float32), np.zeros((r, r), np.float32), B)
        most = min(r, A.shape[0], B.shape[1])  # PEFT allows more directions than the layer has
        if orthonormal or r > most:
            adapter = core.compress(adapter, most).adapter
        in_out = kind == "embedding" or (kind == "linear" and bool(config.get("fan_in_fan_out")))
        shape = (A.shape[0], *first.shape[1:])
        target = Target(
            f"{module}.weight", (shape[1], shape[0]) if in_out else shape, layout="in,out" if in_out else "out,in"
        )
        wide = core.Adapter(*(array.astype(np.float64) for array in adapter))
        layers[module] = Layer(kind, target, adapter, moments=core.empty_moments(wide))
    for module, (weight, bias) in heads.items():
        columns = [weight] if bias is None else [weight, bias[:, None]]
        V = np.concatenate(columns, axis=1).astype(np.float32)
        head = core.Adapter(None, V, np.zeros_like(V), None)
        target = Target(f"{module}.weight", weight.shape, bias=None if bias is None else f"{module}.bias")
        wide = core.Adapter(None, V.astype(np.float64), np.zeros(V.shape), None)
        layers[module] = Layer("head", target, head, moments=core.empty_moments(wide))
    snapshots = {} if task is None else {task: {n: Snapshot(layer.adapter.R_old) for n, layer in layers.items()}}
    base = config.get("base_model_name_or_path")
    state = State(
        layers=layers,
        tasks=() if task is None else (task,),
        unobserved=() if task is None else (task,),
        snapshots=snapshots,
        provenance={"source": "PEFT LoRA"} | ({"base": base} if isinstance(base, str) else {}),
    )
    check(state, where)
    return state


def read_config(path: Path, where: str) -> dict[str, Any]:
    """adapter_config.json, an object; nothing more is known of it."""
    try:
        with st.opened(path / CONFIG, where) as fd:
            size = os.fstat(fd).st_size
            if size > LARGEST_CONFIG:
                raise bad(where, f"{CONFIG} is too large", size, f"at most {LARGEST_CONFIG}")
            config = st.parse_json(st.read_exactly(fd, size, 0, where), where)
    except (FileNotFoundError, NotADirectoryError):
        cause, fix = "another folder, or a path misspelt", "pass the folder that save_pretrained() wrote"
        raise bad(where, "this is no PEFT folder", f"no {CONFIG}", CONFIG, cause=cause, fix=fix) from None
    if not isinstance(config, dict):
        raise bad(where, f"{CONFIG} is no JSON object", type(config).__name__, "an object")
    return config


def _refuse_config(config: dict[str, Any], where: str) -> None:
    cause, fix = "an adapter of another kind", "merge it with PEFT, and attach a fresh adapter to the merged model"
    if config.get("peft_type") != "LORA":
        raise bad(where, "this is no LoRA", repr(config.get("peft_type"))[:80], "'LORA'", cause=cause, fix=fix)
    for key, value in config.items():
        if value and key not in PLAIN and not (key == "init_lora_weights" and value in STARTS):
            raise bad(where, "this is no plain LoRA", f"{key} is set", "A and B alone", cause=cause, fix=fix)
    if config.get("bias", "none") != "none":
        raise bad(where, "biases were trained, too", repr(config["bias"])[:80], "'none'", cause=cause, fix=fix)
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key) or {}
        if not isinstance(value, dict):
            raise bad(where, f"{key} is no object", type(value).__name__, "an object")
        strange = [p for p in value if not PATTERN.fullmatch(p) or len(p) > 512 or p.count("*") > 1]
        if strange:
            fix = "load and save it with PEFT after writing the pattern as a name"
            raise bad(where, f"a pattern in {key} is more than a name", repr(strange[0])[:80], "names and .*", fix=fix)


def _pairs(
    tensors: dict[str, Array], config: dict[str, Any], where: str
) -> tuple[dict[str, tuple[str, Array, Array]], dict[str, tuple[Array, Array | None]]]:
    """module -> (kind, lora_A, lora_B), and module -> (weight, bias) of what was saved whole."""
    halves: dict[tuple[str, str], dict[str, Array]] = {}
    rest: dict[str, dict[str, Array]] = {}
    for key, array in tensors.items():
        name = key.removeprefix(PREFIX)
        match = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?", name)
        if match:
            half = halves.setdefault((match[1], "embedding" if match[2] else "linear"), {})
            if match[3] in half or len(match[1]) > LONGEST_NAME:
                raise bad(where, f"tensor {key[:200]!r} is there twice", "two names of one, or an endless one", "one")
            half[match[3]] = array
            continue
        module, _, leaf = name.rpartition(".")
        saved = config.get("modules_to_save")
        listed = isinstance(saved, list) and any(module == m or module.endswith(f".{m}") for m in saved)
        if leaf not in ("weight", "bias") or not listed:
            raise bad(where, f"tensor {key!r} is no part of a LoRA", "another name", "lora_A, lora_B")
        rest.setdefault(module, {})[leaf] = array
    out: dict[str, tuple[str, Array, Array]] = {}
    for (module, kind), half in halves.items():
        if set(half) != {"A", "B"} or module in out or module in rest:
            raise bad(where, f"module {module!r} has half a LoRA, or two", ", ".join(sorted(half)), "A and B")
        first, second = half["A"], half["B"]
        plain = first.ndim == 2 and second.ndim == 2
        conv = kind == "linear" and 3 <= first.ndim <= 5 and second.ndim == first.ndim and set(second.shape[2:]) == {1}
        if not (plain or conv) or second.shape[1] != first.shape[0] or 0 in (*first.shape, *second.shape):
            got = f"lora_A {first.shape}, lora_B {second.shape}"
            raise bad(where, f"the shapes of {module!r} do not chain", got, "(r, d_in) and (d_out, r)")
        out[module] = ("conv" if conv else kind, first, second)
    heads: dict[str, tuple[Array, Array | None]] = {}
    for module, leaves in rest.items():
        weight, bias = leaves.get("weight"), leaves.get("bias")
        if weight is None or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise bad(
                where, f"module {module!r} was saved whole and is no linear layer", "other shapes", "a classifier"
            )
        heads[module] = (weight, bias)
    return out, heads


def _scale(module: str, r: int, config: dict[str, Any], where: str) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA, patterns included."""
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT matches them
            alpha = value
            break
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < 2.0**100:
        raise bad(where, "lora_alpha is no number", type(alpha).__name__, "a number")
    return float(alpha) / (math.sqrt(r) if config.get("use_rslora") else r)


def _value(where: str, module: str, got: str, needed: str, fix: str) -> InvalidValueError:
    cause = "a checkpoint from before training, or from a run that diverged"
    return InvalidValueError(
        message(where, f"module {module!r} has no usable LoRA", got=got, needed=needed, cause=cause, fix=fix)
    )
