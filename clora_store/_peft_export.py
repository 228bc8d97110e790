"""Any state of an adapter as a PEFT LoRA folder.

Names: PEFT's ``lora_A`` is R B here, its ``lora_B`` is A; ``lora_alpha == r``, so that PEFT's scale is 1.
"""

from __future__ import annotations

import json
import operator
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import clora_core as core
from clora_core.errors import InvalidValueError, RankError, StateError, message

from . import _safetensors as st
from ._errors import option_error
from ._folder import replace, sync
from ._functions import Update, adapter_at, difference
from ._peft_import import CONFIG, PREFIX, WEIGHTS, read_config
from ._state import Array, Layer, State, Target, check

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank can be


class Exported(NamedTuple):
    """What `export_peft` wrote.

    Attributes
    ----------
    rank : int
        Of every layer.
    error : dict of module to float
        Frobenius norm of what a lower rank cut off of that module's update.
    size : dict of module to float
        Frobenius norm of the update itself.
    heads : tuple of str
        Classifiers written as ``modules_to_save``.
    """

    rank: int
    error: dict[str, float]
    size: dict[str, float]
    heads: tuple[str, ...]


def export_peft(
    state: State,
    folder: str | os.PathLike[str],
    *,
    task: str | None = None,
    since: str | None = None,
    rank: int | None = None,
    vllm: bool = False,
    heads: bool = True,
    dtype: str = "float32",
) -> Exported:
    """Write an adapter's function as a PEFT LoRA folder, one rank for all layers.

    Parameters
    ----------
    state : State
    folder : path
        New, or empty.
    task : str, optional
        The function at the end of that task; by default the present one.
    since : str, optional
        Only what was learnt after that task ended: the difference of two routings, of rank at most r (2 r where
        factors learn in every task). Heads, which PEFT replaces as a whole, are left out.
    rank : int, optional
        The largest rank to write; where an update has more, the best approximation, its error in the result.
    vllm : bool
        Pad the rank with zeros to one that vLLM's ``max_lora_rank`` can be, and refuse what vLLM refuses.
    heads : bool
        Write classifiers, as ``modules_to_save``.
    dtype : {"float32", "bfloat16", "float16"}

    Returns
    -------
    Exported

    Raises
    ------
    StateError
        A folder that is not empty, or a task without snapshot.
    OptionError
        A layer that PEFT (or vLLM) has no LoRA for; the message says what to do instead.
    RankError
        A rank below 1, or above vLLM's largest.

    Notes
    -----
    Without ``rank``, ``lora_A`` is one r x r product, computed in float64 and rounded once: with float32 the update is
    within ``|A| |R B| u`` of exact, u = 2^-24, plus the rounding of float64. The weights are on disk before the
    configuration, which PEFT looks for, is there.
    """
    where = f"clora_store.export_peft({os.fspath(folder)!r})"
    narrow = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    if dtype not in narrow:
        raise option_error(where, "unknown dtype", repr(dtype), " or ".join(map(repr, narrow)), "pass one of these")
    check(state, where)
    rank = None if rank is None else operator.index(rank)
    if rank is not None and rank < 1:
        raise _rank(where, rank, "rank >= 1")
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StateError(
            message(
                where,
                "the folder is not new",
                got="a folder with files in it",
                needed="a new or empty one",
                cause="an export from before",
                fix="choose another name, or remove it",
            )
        )
    updates, whole = _updates(state, task, since, heads, vllm, where)
    error, size = dict.fromkeys(updates, 0.0), {}
    for module, update in updates.items():
        size[module] = update.norm()
        if rank is not None and update.left.shape[1] > rank:
            updates[module], error[module] = _truncated(update, rank)
    common = max((update.left.shape[1] for update in updates.values()), default=1)
    if vllm:
        common = next((r for r in VLLM_RANKS if r >= common), common)
        if common > VLLM_RANKS[-1]:
            raise _rank(where, common, f"at most {VLLM_RANKS[-1]} for vLLM: pass rank=")
    targets = {layer.target.module: layer for layer in state.layers.values()}
    tensors: dict[str, Array] = {}
    for module, update in updates.items():
        tensors |= _lora(module, targets[module], update, common)
    for module, head in whole.items():
        target = Target(
            f"{module}.weight", head.shape, bias=targets[module].target.bias and f"{module}.bias"
        )  # as in torch
        tensors |= target.replaced(head)
    written = {PREFIX + key: st.round_once(array, st.DTYPES[narrow[dtype]]) for key, array in tensors.items()}
    stored = [targets[module] for module in updates]
    in_out = any(
        x.kind == "linear" and x.target.layout == "in,out" and x.target.weight.endswith(".weight") for x in stored
    )
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": state.provenance.get("base"),
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "target_modules": sorted(updates),
        "modules_to_save": sorted(whole) or None,
        "bias": "none",
        "fan_in_fan_out": in_out,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    for key, array in written.items():
        if not np.isfinite(array).all():
            raise InvalidValueError(
                message(
                    where,
                    f"tensor {key!r} does not fit its dtype",
                    got=f"infinity in {dtype}",
                    needed="finite numbers",
                    cause="an update too large for half precision",
                    fix="pass dtype='bfloat16' or 'float32'",
                )
            )
    path.mkdir(parents=True, exist_ok=True)
    try:
        st.write_file(path / WEIGHTS, written, {"format": "pt"})
        sync(path)
        replace(path / CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    except BaseException:
        for name in (WEIGHTS, CONFIG):
            (path / name).unlink(missing_ok=True)
        raise
    return Exported(common, error, size, tuple(sorted(whole)))


def vllm_problems(folder: str | os.PathLike[str], *, max_lora_rank: int = VLLM_RANKS[-1]) -> list[str]:
    """What vLLM would refuse, or silently ignore, in a PEFT LoRA folder; an empty list where it would load.

    Notes
    -----
    The rules of vLLM's configuration check: ``r``, ``lora_alpha``, ``target_modules`` present; no ``modules_to_save``,
    no DoRA, no bias; ``r`` at most ``max_lora_rank``, which is one of `VLLM_RANKS`. ``rank_pattern`` and
    ``alpha_pattern`` are ignored by some of its versions. Whether a model has LoRA for the modules named is for vLLM.
    """
    where = f"clora_store.vllm_problems({os.fspath(folder)!r})"
    config = read_config(Path(folder), where)
    problems = [f"{key} is missing" for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]
    if not st.is_size(config.get("r", 1)) or not isinstance(config.get("lora_alpha", 1), int | float):
        problems.append("r or lora_alpha is no number")
    if config.get("peft_type") != "LORA":
        problems.append("peft_type is not LORA")
    if config.get("modules_to_save"):
        problems.append("modules_to_save is not empty")
    if config.get("use_dora"):
        problems.append("use_dora is set")
    if config.get("bias", "none") != "none":
        problems.append("bias is not 'none'")
    patterns = [pattern for pattern in ("rank_pattern", "alpha_pattern") if config.get(pattern)]
    problems += [f"{pattern} is set: some versions ignore it" for pattern in patterns]
    if max_lora_rank not in VLLM_RANKS:
        problems.append(f"max_lora_rank={max_lora_rank} is none of {VLLM_RANKS}")
    if st.is_size(config.get("r")) and config["r"] > max_lora_rank:
        problems.append(f"r={config['r']} is above max_lora_rank={max_lora_rank}")
    with st.opened(Path(folder) / WEIGHTS, where) as fd:
        entries = st.read_header(fd, where).entries
    for key, entry in entries.items():
        if not re.fullmatch(re.escape(PREFIX) + r".+\.(lora_[AB]\.weight|lora_embedding_[AB])", key):
            problems.append(f"tensor {key!r} is no LoRA weight")
        elif len(entry.shape) != 2:
            problems.append(f"tensor {key!r} is no matrix")
    return problems


def _updates(
    state: State, task: str | None, since: str | None, heads: bool, vllm: bool, where: str
) -> tuple[dict[str, Update], dict[str, Array]]:
    """The update of every module, slices of a fused projection side by side, and every head."""
    parts: dict[str, list[tuple[Layer, Update]]] = {}
    whole: dict[str, Array] = {}
    for name, layer in state.layers.items():
        if layer.kind == "head":
            if heads and since is None:
                whole[layer.target.module] = core.routing(adapter_at(state, name, task))
            continue
        if not layer.target.weight.endswith((".weight", ".kernel")):  # torch's name, and flax's
            raise option_error(
                where,
                f"PEFT has no LoRA for {layer.target.weight!r} that others read",
                "a projection of nn.MultiheadAttention",
                "linear layers, embeddings, convolutions",
                "merge the adapter into the model instead",
            )
        if vllm and layer.kind not in ("linear", "embedding"):
            raise option_error(where, f"vLLM has no LoRA for {name!r}", layer.kind, "linear layers", "merge it instead")
        update = difference(adapter_at(state, name, task), None if since is None else adapter_at(state, name, since))
        parts.setdefault(layer.target.module, []).append((layer, update))
    if vllm and whole:
        raise option_error(where, "vLLM takes no classifiers", ", ".join(whole), "LoRA alone", "pass heads=False")
    if not parts:
        fix = "save the classifier as the model's own, or adapt a layer, too"
        raise option_error(where, "PEFT loads no folder without LoRA", "classifiers alone", "an adapted layer", fix)
    for head in whole:
        same = next((module for module in parts if module.endswith(f".{head}")), None)
        if same is not None:
            got, fix = f"classifier {head!r}, adapted {same!r}", "pass heads=False, or merge the adapter instead"
            raise option_error(
                where, "PEFT tells modules by the end of their names", got, "names that differ there", fix
            )
    return {module: _fused(pieces) for module, pieces in parts.items()}, whole


def _fused(pieces: Iterable[tuple[Layer, Update]]) -> Update:
    lefts, rights = [], []
    for layer, update in pieces:
        target = layer.target
        left = update.left
        if target.rows is not None:
            start, stop = target.rows
            left = np.zeros((target.whole[0], left.shape[1]))
            left[start:stop] = update.left
        lefts.append(left)
        rights.append(update.right)
    return Update(np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0))


def _truncated(update: Update, rank: int) -> tuple[Update, float]:
    r = update.left.shape[1]
    # More directions than the matrix has are first expressed in those it has.
    if r > min(update.left.shape[0], update.right.shape[1]):
        U, s, Vt = np.linalg.svd(update.left @ update.right, full_matrices=False)
        k = min(rank, s.size)
        return Update(U[:, :k] * s[:k], Vt[:k]), float(np.sqrt(np.sum(s[k:] ** 2)))
    adapter = core.Adapter(update.left, np.eye(r), np.zeros((r, r)), update.right)
    small, error = core.compress(adapter, rank)
    return Update(small.A, small.R_old @ small.B), float(error)


def _lora(module: str, layer: Layer, update: Update, rank: int) -> dict[str, Array]:
    missing = rank - update.left.shape[1]
    left, right = np.pad(update.left, ((0, 0), (0, missing))), np.pad(update.right, ((0, missing), (0, 0)))
    if layer.kind == "embedding":
        return {f"{module}.lora_embedding_A": right, f"{module}.lora_embedding_B": left}
    if layer.kind == "conv":
        kernel = layer.target.shape[1:]
        right = right.reshape(rank, *kernel)
        left = left.reshape(*left.shape, *(1 for _ in kernel[1:]))
    return {f"{module}.lora_A.weight": right, f"{module}.lora_B.weight": left}


def _rank(where: str, rank: int, needed: str) -> RankError:
    cause, fix = "a rank for another model", "pass a rank that fits"
    return RankError(message(where, "the rank does not fit", got=f"rank {rank}", needed=needed, cause=cause, fix=fix))
