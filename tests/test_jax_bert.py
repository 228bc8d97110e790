"""examples/jax_bert.py: MiniLM in nnx and in torch are one function, plain and with an adapter that torch saved."""

import sys
from pathlib import Path
from typing import Any

import kit
import numpy as np
import pytest

if kit.jax is None or kit.torch is None:
    pytest.skip(kit.NO_FRAMEWORK, allow_module_level=True)
pytest.importorskip("transformers", reason=kit.NO_PEERS)
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import jax
import jax_bert as example
from flax import nnx

import clora_jax as clora
import clora_jax.nnx as clora_nnx


def batch(vocabulary: int, length: int = 9) -> dict[str, Any]:
    """Three rows, two of them padded."""
    rng = np.random.default_rng(0)
    mask = np.arange(length)[None] < np.asarray([[length], [4], [1]])
    return {"input_ids": rng.integers(0, vocabulary, (3, length)), "attention_mask": mask.astype(np.int64)}


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 2.0**-14), ("float64", 2.0**-40)])
def test_minilm_is_the_same_function_in_both(dtype: str, limit: float) -> None:
    """2^-14 in float32 (six layers, each within 2^-17 or so), and 2^-40 in float64, which rounding alone explains."""
    with jax.enable_x64(dtype == "float64"):
        found = example.compare(example.weights(), batch(30000), dtype=dtype)
    assert found["plain"] <= limit
    assert found["adapted"] <= limit
    assert found["moved"] > 0.05


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).save_pretrained(folder)
    return folder


def test_a_weight_that_is_missing_or_of_another_shape_is_told(tiny: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    tensors = load_file(tiny / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(KeyError, match=name):
        example.load(tmp_path)
    save_file({**tensors, name: np.zeros((3, 3), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.dense\.kernel: \(3, 3\)"):
        example.load(tmp_path)


def test_observing_leaves_padding_out(tiny: Path) -> None:
    """Second moments of a masked batch equal those of its rows alone, each without padding."""
    model = example.load(tiny)
    adapters = clora_nnx.attach(model, rank=3, targets=example.TARGETS)
    graphdef, state = nnx.split(model)
    whole = batch(50)

    def forward(adapters: Any, state: Any, batch: Any) -> Any:
        return clora_nnx.bind(graphdef, state, adapters)(**batch)

    rows = []
    for i, length in enumerate((9, 4, 1)):
        rows.append({name: array[i : i + 1, :length] for name, array in whole.items()})
    one = clora.observe(forward, adapters, state, [whole], mask=lambda b: b["attention_mask"])
    two = clora.observe(forward, adapters, state, rows)
    blind = clora.observe(forward, adapters, state, [whole])
    for name, C in one.items():
        # Layer norm keeps inputs of the size of one: both are means over 14 rows, rounded some hundred times.
        limit = float(kit.gamma(2000, "float32")) * float(np.trace(C))
        assert np.all(np.abs(C - two[name]) <= limit), name
        assert np.any(np.abs(C - blind[name]) > 4 * limit), name


def test_nnx_load_and_update_refuse_what_does_not_fit(tiny: Path, tmp_path: Path) -> None:
    from clora_core.errors import OptionError

    model = example.load(tiny)
    adapters, history = clora.end_task(clora_nnx.attach(model, rank=3, targets="query", factors="every-task"))
    clora.save(tmp_path, adapters, history)
    fresh = example.load(tiny)
    loaded, past = clora_nnx.load(fresh, tmp_path)
    assert set(loaded) == set(adapters)
    assert past.tasks == ("task-0",)
    near = np.abs(fresh(**batch(50)) - model(**batch(50))).max()
    assert near <= 2.0**-16, near
    small = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(OptionError, match="no such layer"):
        clora_nnx.update(small, adapters)
    with pytest.raises(OptionError, match="no weight for layer"):
        clora_nnx.load(small, tmp_path)


def test_command_line(tiny: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(example, "compare", lambda folder, batch: {"plain": 1e-6, "adapted": 2e-6, "moved": 0.5})
    assert example.main(["a sentence"]) == 0
    assert "adapted  JAX and torch differ by 2.0e-06" in capsys.readouterr().out
