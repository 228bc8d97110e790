"""examples/torch_text.py: a deterministic stream whose labels conflict, and a whole run on a tiny BERT."""

import json
import re
import sys
from pathlib import Path

import kit
import pytest

if kit.torch is None:
    pytest.skip(kit.NO_TORCH, allow_module_level=True)
for _module in ("transformers", "peft"):
    pytest.importorskip(_module, reason=kit.NO_PEERS)
for _module in ("rich", "matplotlib"):
    pytest.importorskip(_module, reason=kit.NO_STUDY)
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import torch_text as example  # noqa: E402  (needs what is checked above)


def test_the_stream_is_deterministic_and_keeps_train_and_test_apart() -> None:
    stream = example.build_stream(3)
    assert stream == example.build_stream(3)
    assert stream != example.build_stream(4)
    assert sorted(task.name for task in stream) == sorted(example.SCRIPTS)
    for task in stream:
        assert (len(task.train), len(task.test)) == (example.TRAIN, example.TEST)
        assert len({*task.train, *task.test}) == example.TRAIN + example.TEST
        assert set(task.y_train) == set(range(example.OUTPUTS))
    names = [name for task in stream for name in (*task.train, *task.test)]
    assert len(set(names)) == len(names)


def test_labels_conflict_between_scripts() -> None:
    """No two scripts have the same order, and no vowel but A the same place in all."""
    orders = [order.split() for _, order in example.SCRIPTS.values()]
    assert all(len(set(order)) == example.OUTPUTS for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)
    for vowel in "EIOU":
        assert len({order.index(vowel) for order in orders if vowel in order}) > 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A BERT of one layer with random weights, and a tokenizer of single letters."""
    import transformers

    folder = tmp_path_factory.mktemp("tiny")
    letters = "abcdefghijklmnopqrstuvwxyz-"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_all_methods_run_and_are_written(tiny, tmp_path, monkeypatch, capsys) -> None:
    arguments = ["--model", str(tiny), "--out", str(tmp_path), "--rank", "8", "--tasks", "2", "--seed", "0", "1"]
    monkeypatch.setattr(example, "EPOCHS", 1)
    assert example.main(arguments) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["complete"] is True
    assert [(run["seed"], run["method"]) for run in result["runs"]] == [
        (seed, name) for seed in (0, 1) for name in example.METHODS
    ]
    for run in result["runs"]:
        assert run["method"] in shown
        rows = 1 if example.METHODS[run["method"]].joint else 2
        assert [len(row) for row in run["accuracy"]] == [2] * rows
        assert 0 <= run["last_accuracy"] <= 1
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_interrupt_keeps_what_is_finished(tiny, tmp_path, monkeypatch, capsys) -> None:
    learn, calls = example.Trainer.learn, []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        learn(self, *arguments)

    monkeypatch.setattr(example.Trainer, "learn", interrupted)
    monkeypatch.setattr(example, "EPOCHS", 1)
    arguments = ["--model", str(tiny), "--out", str(tmp_path), "--rank", "2", "--tasks", "3", "--methods", "c-lora"]
    assert example.main(arguments) == 130
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["complete"] is False
    (run,) = result["runs"]
    assert (run["finished"], run["complete"]) == (2, False)
    assert "Interrupted" in capsys.readouterr().err


def test_a_wrong_file_of_weights_is_refused(tmp_path, monkeypatch) -> None:
    package = tmp_path / example.PACKAGE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('the example must not import this')")
    (package / "model" / "model.safetensors").write_bytes(b"something else")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit, match="is not the file this example knows"):
        example.weights()


def test_missing_weights_name_the_command(monkeypatch) -> None:
    monkeypatch.setattr(example, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(SystemExit, match=re.escape(example.INSTALL)):
        example.weights()


@pytest.mark.parametrize(
    "wrong", [["--tasks", "7"], ["--rank", "0"], ["--seed", "1", "1"], ["--methods", "no"], ["--model", "no"]]
)
def test_wrong_options_are_refused(wrong) -> None:
    with pytest.raises(SystemExit) as left:
        example.main(wrong)
    assert left.value.code == 2
