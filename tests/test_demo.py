"""`clora demo`: what it writes, what it says, and that nothing finished is lost."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import sys

import cupy_double
import kit
import numpy as np
import pytest

from clora import methods, study, suites, trainers
from clora_core.errors import OptionError

for _module in ("sklearn", "mlxtend", "matplotlib", "platformdirs", "rich"):
    pytest.importorskip(_module, reason=kit.NO_STUDY)
CliRunner = pytest.importorskip("typer.testing", reason=kit.NO_STUDY).CliRunner
cli = pytest.importorskip("clora.cli", reason=kit.NO_STUDY)

KEYS = {
    "accuracy",
    "last_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "forgetting",
    "parameters",
    "state_bytes",
    "seconds",
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache of its own, so that neither the user's is used nor written to; pre-trained once."""
    folder = tmp_path_factory.mktemp("cache")
    suites.load_backbone(folder)
    return folder


@pytest.fixture
def demo(cache, tmp_path, monkeypatch):
    """Run the command in this process on the cached backbone."""
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(cache))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        return CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "out"), *arguments])

    run.out = tmp_path / "out"
    return run


def test_the_four_methods_side_by_side(demo):
    done = demo("--quick", "--tasks", "2", "--rank", "8", "--seed", "11")
    assert done.exit_code == 0, done.output
    result = json.loads((demo.out / "result.json").read_text())
    assert result["schema"] == "clora-study/1"
    assert (result["suite"], result["tasks"], result["seed"], result["backend"]) == ("permuted-mnist", 2, 11, "numpy")
    assert result["complete"] is True
    assert {"clora", "numpy", "python"} <= set(result["versions"])
    assert {"sequential-lora", "c-lora-paper", "c-lora-projected", "c-lora"} <= set(result["methods"])
    for name, entry in result["methods"].items():
        assert set(entry) >= KEYS
        accuracy = np.array(entry["accuracy"])
        assert accuracy.shape == (2, 2)
        assert entry["last_accuracy"] == accuracy[1].mean()
        assert entry["backward_transfer"] == accuracy[1, 0] - accuracy[0, 0]
        assert entry["state_bytes_by_task"] == [entry["state_bytes"]] * 2
        assert accuracy[0, 0] > 0.2, f"{name} learned nothing"
        for word in (name, f"{entry['last_accuracy']:.3f}", f"{entry['state_bytes']:,}"):
            assert word in done.stdout
    page = (demo.out / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 4
    assert "http" not in page.replace("http-equiv", ""), "the page must not need the network"
    for entry in result["methods"].values():
        assert entry["title"] in page
    assert sorted(path.name for path in demo.out.iterdir()) == ["report.html", "result.json"]


OTHERS = [
    "cupy",  # its stand-in; tests/test_cupy_gpu.py has the real one
    pytest.param("torch", marks=pytest.mark.skipif(kit.torch is None, reason=kit.NO_TORCH)),
    pytest.param("jax", marks=pytest.mark.skipif(kit.jax is None, reason=kit.NO_JAX)),
]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", methods.METHODS)
def test_others_start_from_the_same_arrays_and_take_the_same_steps(name, other, cache):
    """Bit for bit the same start; after steps of SGD in float64, the routings agree to rounding."""
    scopes = {"jax": lambda: kit.jax.enable_x64(True), "cupy": cupy_double.installed}
    with scopes.get(other, contextlib.nullcontext)():
        _same_steps(name, other, cache)


def _same_steps(name, other, cache):
    method = dataclasses.replace(methods.METHODS[name], optimizer="sgd", lr=0.1)
    backbone, _ = suites.load_backbone(cache)
    backbone = suites.Backbone(*(array.astype(np.float64) for array in backbone))
    (task,) = suites.load_suite("permuted-mnist", tasks=1, seed=11)
    both = [trainers.trainer(backend, method, backbone, rank=8, seed=11) for backend in ("numpy", other)]
    for trained in both:
        trained.begin(10)
    assert both[0].parameters() == both[1].parameters()
    assert both[0].state_bytes() == both[1].state_bytes()
    x, y = task.x_train[:32].astype(np.float64), task.y_train[:32]

    def compare(limit):
        pairs = [(mine, both[1].routings()[key]) for key, mine in both[0].routings().items()]
        for mine, theirs in (*pairs, (both[0].predict(x), both[1].predict(x))):
            assert np.abs(mine - theirs).max() <= limit * max(np.abs(mine).max(), 1.0)

    compare(2.0**-48)
    with both[0].task("task-1"), both[1].task("task-1"):
        for _ in range(3):  # the head starts at zero, so that the layers below move from the second step on
            for trained in both:
                trained.step(x, y)
            compare(2.0**-40)
        for trained in both if method.factors != "every-task" else ():
            trained.observe(x)
    assert any(R.any() for R in both[0].routings().values())


@pytest.mark.parametrize("other", OTHERS)
def test_the_demo_on_others(demo, other):
    """The whole command, with the library named in the result, and the numbers of NumPy up to a few test images."""
    results = {}
    for backend in ("numpy", other):
        arguments = ("--quick", "--tasks", "2", "--rank", "8", "--method", "c-lora", "--method", "c-lora-projected")
        with cupy_double.installed() if backend == "cupy" else contextlib.nullcontext():
            assert demo(*arguments, "--backend", backend).exit_code == 0
        results[backend] = json.loads((demo.out / "result.json").read_text())
    assert results[other]["backend"] == other
    assert other in results[other]["versions"]
    for name, entry in results["numpy"]["methods"].items():
        theirs = results[other]["methods"][name]
        # JAX remembers in float32, unless told to have float64.
        assert entry["state_bytes"] == theirs["state_bytes"] or (other == "jax" and theirs["state_bytes"] > 0)
        assert entry["parameters"] == theirs["parameters"]
        assert np.abs(np.array(entry["accuracy"]) - np.array(theirs["accuracy"])).max() <= 0.02  # 20 of 1000 images


def test_a_missing_library_is_one_line(demo, monkeypatch):
    """--backend torch without torch names the extra and leaves with 1."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else real(name, *rest))
    done = demo("--quick", "--backend", "torch")
    assert done.exit_code == 1
    assert "python -m pip install 'clora[torch]'" in done.stderr


def test_the_same_seed_gives_the_same_numbers(demo):
    arguments = ("--quick", "--tasks", "2", "--rank", "4", "--method", "c-lora", "--json")
    first, second = (json.loads(demo(*arguments).stdout) for _ in range(2))
    assert first["methods"]["c-lora"]["accuracy"] == second["methods"]["c-lora"]["accuracy"]
    other = json.loads(demo(*arguments, "--seed", "1").stdout)
    assert other["methods"]["c-lora"]["accuracy"] != first["methods"]["c-lora"]["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "lora"), "'c-lora-projected'"),
        (("--backend", "tensorflow"), "'numpy'"),
        (("--rank", "0"), "1 <= rank <= 256"),
        (("--rank", "257"), "1 <= rank <= 256"),
        (("--tasks", "0"), "--tasks"),
    ],
)
def test_a_wrong_option_is_told_and_nothing_is_written(demo, arguments, words):
    done = demo("--quick", *arguments)
    assert done.exit_code == 2
    assert words in done.output
    assert "Traceback" not in done.output
    assert not demo.out.exists()


def test_an_interrupt_keeps_what_is_finished(demo, monkeypatch):
    real = methods.train

    def interrupted(*args, **kwargs):
        rows = real(*args, **kwargs)
        yield next(rows)
        yield next(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(methods, "train", interrupted)
    done = demo("--quick", "--tasks", "3", "--rank", "4", "--method", "c-lora", "--method", "sequential-lora")
    assert done.exit_code == 130
    assert "Interrupted" in done.output
    result = json.loads((demo.out / "result.json").read_text())
    assert result["complete"] is False
    assert list(result["methods"]) == ["c-lora"]
    entry = result["methods"]["c-lora"]
    assert (entry["finished"], entry["complete"]) == (2, False)
    assert np.array(entry["accuracy"]).shape == (2, 3)
    assert "stopped early" in (demo.out / "report.html").read_text()


def test_an_interrupt_before_the_first_task_writes_nothing(demo, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(methods, "train", interrupted)
    done = demo("--quick", "--tasks", "2", "--rank", "4")
    assert done.exit_code == 130
    assert "nothing was written" in done.output
    assert not demo.out.exists()


def test_a_missing_extra_is_one_line_with_the_command(demo, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlxtend" else real(name))
    done = demo("--quick")
    assert done.exit_code == 1
    assert done.stderr.splitlines() == ["clora demo: mlxtend not installed; run: python -m pip install 'clora[study]'"]


def test_a_missing_cli_is_one_line_with_the_command(monkeypatch, capsys):
    from clora.__main__ import main

    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "clora.cli")
    assert main() == 1
    assert capsys.readouterr().err == "clora: typer is not installed; run: python -m pip install 'clora[cli]'\n"


def test_help_names_every_option():
    text = CliRunner().invoke(cli.app, ["demo", "--help"], env={"COLUMNS": "200"}).output
    for option in ("--tasks", "--seed", "--rank", "--backend", "--method", "--out", "--json", "--quick"):
        assert option in text
    assert "130 interrupted" in text


def test_a_folder_that_cannot_be_written_to_is_told(demo):
    demo.out.write_text("a file where the folder should be")
    done = demo("--quick", "--tasks", "1", "--rank", "4", "--method", "c-lora")
    assert done.exit_code == 1
    assert "cannot write" in done.output
    assert demo.out.read_text() == "a file where the folder should be"


def test_the_demo_without_a_gpu_says_so(demo, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("cupy", "clora_cupy")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cupy", None)  # which makes its import fail, installed or not
    done = demo("--backend", "cupy", "--quick")
    assert done.exit_code == 1
    assert not demo.out.exists()
    for part in ("clora_cupy: CuPy is not installed. Got ", "clora[cupy12]", "clora[cupy13]", "import clora_numpy"):
        assert part in done.output
    assert "Traceback" not in done.output


# --- suites ----------------------------------------------------------------------------------------------------


def test_permuted_mnist_is_a_stream_of_permutations():
    stream = suites.load_suite("permuted-mnist", tasks=3, seed=5)
    for task in stream:
        assert task.x_train.shape == (4000, 784)
        assert task.x_test.shape == (1000, 784)
        assert task.x_train.dtype == np.float32
        assert (task.x_train.min(), task.x_train.max()) == (0.0, 1.0)
        assert (np.bincount(task.y_test) == 100).all()
        assert (np.sort(task.x_test, axis=1) == np.sort(stream[0].x_test, axis=1)).all(), "not a permutation"
    assert (stream[0].x_test != stream[1].x_test).any()
    again = suites.load_suite("permuted-mnist", tasks=2, seed=5)
    assert (again[1].x_train == stream[1].x_train).all(), "a shorter stream is the start of a longer one"
    train = {row.tobytes() for row in stream[0].x_train}
    assert len(train) == 4000
    assert not train & {row.tobytes() for row in stream[0].x_test}, "test images were trained on"


def test_an_unknown_suite_is_told():
    with pytest.raises(OptionError, match="'permuted-mnist'"):
        suites.load_suite("permuted-mnits")
    with pytest.raises(OptionError, match="at least 1"):
        suites.load_suite("permuted-mnist", tasks=0)


@pytest.mark.parametrize("damage", ["truncated", "empty", "other shapes", "not finite", "absent"])
def test_a_damaged_cache_is_made_anew(cache, tmp_path, monkeypatch, damage):
    good, cached = suites.load_backbone(cache)
    assert cached
    monkeypatch.setattr(suites, "_pretrain", lambda: good)
    path = tmp_path / "mlp-digits-2.npz"
    whole = (cache / path.name).read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other shapes":
        np.savez(path, **good._replace(W1=good.W1.T)._asdict())
    elif damage == "not finite":
        np.savez(path, **good._replace(b1=good.b1 * np.nan)._asdict())
    assert suites.load_backbone(tmp_path)[1] is False
    again, cached = suites.load_backbone(tmp_path)
    assert cached
    assert all((a == b).all() for a, b in zip(again, good, strict=True))
    assert os.listdir(tmp_path) == [path.name]


def test_the_backbone_learned_its_digits(cache):
    assert suites.load_backbone(cache)[0].accuracy > 0.8


def test_json_refuses_what_json_has_not():
    with pytest.raises(ValueError, match="Out of range"):
        study.to_json({"accuracy": float("nan")})
