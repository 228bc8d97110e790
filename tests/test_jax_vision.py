"""examples/jax_vision.py: a stream of angles, a base that stays as it was pre-trained, whole runs of a tiny model."""

import json
import sys
from pathlib import Path

import kit
import numpy as np
import pytest

if kit.jax is None:
    pytest.skip(kit.NO_JAX, allow_module_level=True)
for _module in ("rich", "matplotlib", "mlxtend", "sklearn"):
    pytest.importorskip(_module, reason=kit.NO_STUDY)
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import jax  # noqa: E402  (needs what is checked above)
import jax_vision as example  # noqa: E402
from flax import nnx  # noqa: E402


@pytest.fixture
def tiny(monkeypatch) -> None:
    """A model of one narrow block, hardly trained."""
    for name, value in {"WIDTH": 16, "BLOCKS": 1, "HEADS": 2, "PRE_EPOCHS": 2}.items():
        monkeypatch.setattr(example, name, value)


def test_the_stream_is_deterministic_and_keeps_train_and_test_apart() -> None:
    stream = example.build_stream(3, 2)
    for task, again, other in zip(stream, example.build_stream(3, 2), example.build_stream(4, 2), strict=True):
        assert task.name == again.name
        assert all(np.array_equal(a, b) for a, b in zip(task[1:], again[1:], strict=True))
        assert not np.array_equal(task.x_train, other.x_train)
    for task in stream:
        assert (len(task.x_train), len(task.x_test)) == (4000, 1000)
        assert np.bincount(task.y_test).tolist() == [100] * 10
        assert task.x_train.dtype == np.float32
        assert 0 <= task.x_train.min() < task.x_train.max() <= 1
    rows = {image.tobytes() for image in stream[0].x_test}
    assert not rows & {image.tobytes() for image in stream[0].x_train}


def test_tasks_are_the_same_images_at_other_angles() -> None:
    stream = example.build_stream(0, 4, 100)
    assert [task.name for task in stream] == ["0 degrees", "90 degrees", "180 degrees", "270 degrees"]
    for turns, task in enumerate(stream):
        upright = np.rot90(stream[0].x_train, turns, axes=(1, 2))
        assert np.array_equal(task.y_train, stream[0].y_train)
        assert np.abs(task.x_train - upright).max() < 1e-3, "rotate interpolates, at right angles by rounding alone"
        assert turns == 0 or np.abs(task.x_train - stream[0].x_train).max() > 0.5


@pytest.mark.parametrize("name", example.METHODS)
def test_attach_keeps_the_function_and_only_adapters_learn(tiny, name) -> None:
    base, (task,) = example.pretrain(), example.build_stream(0, 1, 100)
    learner = example.Learner(example.METHODS[name], base, rank=4, seed=0, epochs=1, train_size=100)
    assert {path.rpartition(".")[2] for path in learner.adapters} == {
        *("query", "key", "value", "out", "up", "down", "classifier")
    }
    x, start = task.x_test[:50], learner.adapters
    want = np.asarray(nnx.merge(base.graphdef, base.state)(x), np.float64)
    got = np.asarray(learner.logits(start, learner.state, x), np.float64)
    # Rounding of a shallow network: sums of at most some hundred numbers, each not far above the logits in size.
    assert np.all(np.abs(got - want) <= float(kit.gamma(1000, "float32")) * (np.abs(want).max() + 1))
    learner.learn(task, 0, lambda: None)
    assert learner.history.tasks == (task.name,)
    learned = np.asarray(learner.logits(learner.adapters, learner.state, x), np.float64)
    assert np.abs(learned - want).max() > 100 * np.abs(got - want).max()
    params = nnx.filter_state(learner.state, nnx.Param)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(base.state), jax.tree.leaves(params), strict=True))


def test_a_whole_run_is_written(tiny, tmp_path, monkeypatch, capsys) -> None:
    pretrain, bases = example.pretrain, []

    def kept() -> example.Base:
        base = pretrain()
        bases.append((base, [np.array(leaf) for leaf in jax.tree.leaves(base.state)]))
        return base

    monkeypatch.setattr(example, "pretrain", kept)
    assert example.main(["--quick", "--rank", "4", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["complete"] is True
    assert [run["method"] for run in result["runs"]] == ["sequential-lora", "c-lora"]
    for run in result["runs"]:
        assert run["method"] in shown
        assert run["complete"] is True
        assert [len(row) for row in run["accuracy"]] == [2, 2]
        numbers = [*run["before"], *run["accuracy"][0], *run["accuracy"][1], run["last_accuracy"], run["learned"]]
        assert all(0 <= number <= 1 for number in numbers)
        assert 1 <= run["traces"] <= 2
    one, two = (np.asarray(run["before"]) for run in result["runs"])
    assert np.all(np.abs(one - two) <= 2 / 1000), "one function at first, up to an image whose two best classes tie"
    ((base, before),) = bases
    assert all(np.array_equal(a, b) for a, b in zip(before, jax.tree.leaves(base.state), strict=True))
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_the_file(tiny, tmp_path, capsys) -> None:
    arguments = ["--quick", "--tasks", "1", "--methods", "c-lora-projected", "--rank", "4", "--json"]
    assert example.main([*arguments, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "result.json").read_text()
    (run,) = json.loads(shown)["runs"]
    assert (run["method"], run["traces"], run["backward_transfer"]) == ("c-lora-projected", 1, 0.0)


def test_interrupt_keeps_what_is_finished(tiny, tmp_path, monkeypatch, capsys) -> None:
    learn, calls = example.Learner.learn, []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        learn(self, *arguments)

    monkeypatch.setattr(example.Learner, "learn", interrupted)
    arguments = ["--quick", "--methods", "c-lora", "--rank", "4", "--out", str(tmp_path)]
    assert example.main(arguments) == 130
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["complete"] is False
    (run,) = result["runs"]
    assert (run["finished"], run["complete"]) == (1, False)
    assert "Interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--tasks", "0"], ["--tasks", "37"], ["--rank", "65"], ["--seed", "1", "1"], ["--methods", "no"]]
)
def test_wrong_options_are_refused(wrong) -> None:
    with pytest.raises(SystemExit) as left:
        example.main(wrong)
    assert left.value.code == 2
