"""The commands on saved adapters: what they print, what they leave, and their exit codes, for good and bad input."""

import json
import os
import subprocess
import sys

import kit
import numpy as np
import pytest
from folders import make_state
from safetensors.numpy import load_file, save_file

import clora_core as core
import clora_store as store
from clora_core.errors import FormatError

for _module in ("typer", "rich"):
    pytest.importorskip(_module, reason=kit.NO_STUDY)
from typer.testing import CliRunner  # noqa: E402

from clora.cli import app  # noqa: E402
from clora_store import _safetensors  # noqa: E402

ODD = "[red]a[/red] :smile: \x1b[31m\n日本"


def run(*arguments, code=0):
    """A command in this process; what it printed on standard output and on standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.stderr, result.exception)
    return result.stdout, result.stderr


@pytest.fixture
def folder(tmp_path):
    store.save(tmp_path / "folder", make_state(1, layers=3, spare=1))
    return tmp_path / "folder"


def test_inspect_shows_layers_tasks_and_overlap(folder, tmp_path):
    out, _ = run("inspect", folder, "--html", tmp_path / "deep" / "page.html")
    for text in ("block.0.proj", "block.2.proj", "head", "task-0", "first-task", "overlap of tasks", "+1.00", "█"):
        assert text in out
    page = (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "block.1.proj" in page
    assert "http" not in page  # nothing from the network
    told = json.loads(run("inspect", folder, "--json")[0])
    assert [layer["name"] for layer in told["layers"]] == [*(f"block.{i}.proj" for i in range(3)), "head"]
    assert told["tasks"] == told["overlap"]["tasks"] == ["task-0", "task-1", "task-2"]
    assert told["provenance"]["made from"] == "seed 1"


def test_the_spectrum_and_the_overlap_are_those_of_the_updates(folder):
    state = store.load(folder)
    told = json.loads(run("inspect", folder, "--json")[0])
    deltas = {}
    for layer in told["layers"][:3]:
        name = layer["name"]

        def delta(task=None, name=name):
            adapter = store.adapter_at(state, name, task)
            return core.delta(core.Adapter(*(array.astype(np.float64) for array in adapter)))

        s = np.linalg.svd(delta(), compute_uv=False)[: len(layer["spectrum"])]
        assert abs(np.asarray(layer["spectrum"]) - s).max() <= 2.0**-44 * s[0]  # both by Golub-Kahan in float64
        assert abs(layer["norm"] - np.linalg.norm(delta())) <= 2.0**-44 * layer["norm"]
        before = 0.0
        for task in state.tasks:
            now = delta(task)
            deltas.setdefault(task, []).append((now - before).reshape(-1))
            before = now
    D = np.stack([np.concatenate(deltas[task]) for task in state.tasks])
    D /= np.linalg.norm(D, axis=1, keepdims=True)
    assert abs(np.asarray(told["overlap"]["cosine"]) - D @ D.T).max() <= 2.0**-42


def test_the_overlap_where_factors_learn_in_every_task(tmp_path):
    state = make_state(2, layers=2, factors="every-task")
    store.save(tmp_path / "f", state)
    told = json.loads(run("inspect", tmp_path / "f", "--json")[0])["overlap"]["cosine"]
    deltas = []
    for task in state.tasks:
        parts = [core.delta(store.adapter_at(state, n, task)).reshape(-1) for n in state.layers if n != "head"]
        deltas.append(np.concatenate(parts).astype(np.float64))
    D = np.diff([0 * deltas[0], *deltas], axis=0)
    D /= np.linalg.norm(D, axis=1, keepdims=True)
    assert abs(np.asarray(told) - D @ D.T).max() <= 2.0**-18  # the expected values are of float32 products


def test_layers_are_chosen_by_name_or_glob(tmp_path):
    state = make_state(3, names=["attn.qkv[0:8]", "mlp", "head"], layers=2)
    store.save(tmp_path, state)
    for pattern, names in (("attn.qkv[0:8]", ["attn.qkv[0:8]"]), ("m*", ["mlp"]), ("*", list(state.layers))):
        told = json.loads(run("inspect", tmp_path, "--layers", pattern, "--json")[0])
        assert [layer["name"] for layer in told["layers"]] == names
    assert "no layer of that name" in run("inspect", tmp_path, "--layers", "nothing", code=2)[1]


def test_many_tasks_are_shown_in_part(tmp_path):
    state = make_state(4, layers=1, tasks=300)
    store.save(tmp_path, state)
    out, _ = run("inspect", tmp_path)
    assert "the last 20 of 300" in out
    assert len(json.loads(run("inspect", tmp_path, "--json")[0])["overlap"]["tasks"]) == 200


@pytest.mark.parametrize("command", ["inspect", "verify", "diff"])
def test_odd_names_are_printed_as_they_are(tmp_path, command):
    state = make_state(5, layers=1, names=[ODD, "head"], task_names=[ODD + "1", ODD + "2"])
    store.save(tmp_path / "a", state._replace(provenance={"tasks": "not these", ODD: ODD}))
    store.save(tmp_path / "b", make_state(6, layers=1, names=[ODD, "head"]))
    options = [tmp_path / "b"] if command == "diff" else []
    out, _ = run(command, tmp_path / "a", *options, code=4 if command == "diff" else 0)
    assert "\x1b" not in out
    assert "😄" not in out
    if command == "inspect":
        assert r"[red]a[/red] :smile: \x1b[31m\n日本" in out
        assert json.loads(run("inspect", tmp_path / "a", "--json")[0])["tasks"] == list(state.tasks)
        run("inspect", tmp_path / "a", "--html", tmp_path / "page.html")
        assert "[red]a[/red]" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_what_is_not_finite_can_be_looked_at(tmp_path, monkeypatch):
    state = make_state(7)
    folder = tmp_path / "f"
    store.save(folder, state)
    state.layers["block.0.proj"].adapter.A[0, 0] = np.nan
    with monkeypatch.context() as patch:
        patch.setattr(_safetensors, "check_finite", lambda *_: None)
        store.save(folder, state, overwrite=True)
    assert "nan" in run("inspect", folder)[0]
    told = json.loads(run("inspect", folder, "--json")[0])
    assert told["layers"][0]["norm"] is None
    assert "not finite" in run("verify", folder, code=3)[1]
    run("verify", folder, "--no-finite")
    assert run("diff", folder, folder)[0] == "the same\n"


def test_verify(folder):
    assert "whole: 4 layers, 3 tasks" in run("verify", folder)[0]
    told = json.loads(run("verify", folder, "--json")[0])
    assert told["whole"]
    assert told["tensors"] == len(dict(store.load(folder).arrays()))
    (path,) = folder.glob("state-*")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "another hash" in run("verify", folder, code=3)[1]
    told = json.loads(run("verify", folder, "--json", code=3)[0])
    assert not told["whole"]
    assert "another hash" in told["problems"][0]
    assert "no folder of an adapter" in run("verify", folder.parent / "nowhere", code=3)[1]


def test_export_verify_import(folder, tmp_path):
    out, _ = run("export", folder, tmp_path / "peft", "--task", "task-1", "--vllm")
    assert "3 modules at rank 8; classifiers left out: head" in out
    assert run("verify", tmp_path / "peft", "--vllm")[0] == "vLLM would take it\n"
    run("import", tmp_path / "peft", tmp_path / "back", "--task", "theirs")
    assert store.load(tmp_path / "back").tasks == ("theirs",)
    told = json.loads(run("export", folder, tmp_path / "low", "--rank", "1", "--json")[0])
    assert told["rank"] == 1
    assert told["error"]["block.0.proj"] >= 0
    assert "cut off at most" in run("export", folder, tmp_path / "lower", "--rank", "1")[0]
    assert "the folder is not new" in run("export", folder, tmp_path / "low", code=2)[1]
    assert "no snapshot of task 'x'" in run("export", folder, tmp_path / "x", "--task", "x", code=2)[1]
    assert "this is no PEFT folder" in run("import", folder, tmp_path / "y", code=3)[1]
    assert "no adapter_config.json" in run("verify", folder, "--vllm", code=3)[1]
    assert json.loads(run("verify", folder, "--vllm", "--json", code=3)[0])["problems"]


def test_every_option_reaches_its_function(tmp_path, monkeypatch):
    """What the functions do is tested with them."""
    from clora import folders

    seen = {}

    def spy(name):
        def function(*arguments, **options):
            seen[name] = options
            raise FormatError("stop")

        return function

    for name in ("export_peft", "merge_checkpoint", "import_peft"):
        monkeypatch.setattr(folders.store, name, spy(name))
    store.save(tmp_path / "f", make_state(12))
    options = ["--task", "t", "--since", "s", "--rank", "3", "--vllm", "--dtype", "float16"]
    run("export", tmp_path / "f", tmp_path / "o", *options, code=3)
    asked = {"task": "t", "since": "s", "rank": 3, "vllm": True, "heads": False, "dtype": "float16"}
    assert seen["export_peft"] == asked
    run("export", tmp_path / "f", tmp_path / "o", "--no-heads", code=3)
    assert seen["export_peft"] == dict.fromkeys(asked) | {"vllm": False, "heads": False, "dtype": "float32"}
    options = ["--task", "t", "--rename", "a=b", "--rename", "c=d=e", "--layout", "in,out"]
    run("merge", "--base", "b", "--adapter", tmp_path / "f", "--out", "o", *options, code=3)
    del seen["merge_checkpoint"]["progress"]
    assert seen["merge_checkpoint"] == {"task": "t", "rename": [("a", "b"), ("c", "d=e")], "layout": "in,out"}
    run("import", tmp_path / "f", tmp_path / "o", "--task", "t", "--orthonormal", code=3)
    assert seen["import_peft"] == {"task": "t", "orthonormal": True}


def test_tasks_without_snapshots_are_left_out_of_the_overlap(tmp_path):
    for factors in ("first-task", "every-task"):
        state = make_state(13, tasks=4, factors=factors)
        known = {task: state.snapshots[task] for task in state.tasks[2:]}
        store.save(tmp_path / factors, state._replace(snapshots=known))
        told = json.loads(run("inspect", tmp_path / factors, "--json")[0])
        assert told["overlap"]["tasks"] == ["task-3"]


def test_merge(tmp_path):
    rng = np.random.default_rng(0)
    W = rng.standard_normal((6, 5)).astype(np.float32)
    draw = [rng.standard_normal(s).astype(np.float32) for s in ((6, 2), (2, 2), (2, 2), (2, 5))]
    state = store.State({"q": store.Layer("linear", store.Target("q.weight", (6, 5)), core.Adapter(*draw))})
    store.save(tmp_path / "adapter", state)
    save_file({"model.q.weight": W, "rest": W}, tmp_path / "base.safetensors")
    command = ["merge", "--base", tmp_path / "base.safetensors", "--adapter", tmp_path / "adapter", "--out"]
    assert "--rename '^=model.'" in run(*command, tmp_path / "out", code=2)[1]
    assert not (tmp_path / "out").exists()
    out, err = run(*command, tmp_path / "out", "--rename", "^=model.")
    assert "q" in out
    assert "1.0000" in out
    assert "1 tensors copied as they were" in err
    got = load_file(tmp_path / "out" / "base.safetensors")
    expected = core.merge(W, state.layers["q"].adapter)
    assert (abs(got["model.q.weight"] - expected.weight) <= 2 * core.bounds.merge(W, state.layers["q"].adapter)).all()
    assert (got["rest"] == W).all()
    told = json.loads(run(*command, tmp_path / "json", "--rename", "^=model.", "--json")[0])
    assert told["layers"]["q"]["tensor"] == "model.q.weight"
    assert "REGEX=REPLACEMENT" in run(*command, tmp_path / "z", "--rename", "nothing", code=2)[1]
    half = tmp_path / "half.safetensors"
    save_file({"q.weight": (1000 * W).astype(np.float16)}, half)
    small = state.layers["q"]._replace(adapter=core.Adapter(draw[0] / 1000, *draw[1:]))
    store.save(tmp_path / "small", store.State({"q": small}))
    _, err = run("merge", "--base", half, "--adapter", tmp_path / "small", "--out", tmp_path / "lossy")
    assert "1 of 1 layers lose more than 10 % of their update" in err


def test_diff(folder, tmp_path):
    assert run("diff", folder, folder)[0] == "the same\n"
    assert json.loads(run("diff", folder, folder, "--json")[0])["same"]
    state = store.load(folder)
    layer = state.layers["block.0.proj"]

    def differs(name, **changes):
        store.save(tmp_path / name, state._replace(**changes))
        out, _ = run("diff", folder, tmp_path / name, code=4)
        assert not json.loads(run("diff", folder, tmp_path / name, "--json", code=4)[0])["same"]
        return out

    def with_layer(**changes):
        return {**state.layers, "block.0.proj": layer._replace(**changes)}

    adapter = layer.adapter._replace(R_delta=layer.adapter.R_delta + 1)
    assert "routing" in differs("routing", layers=with_layer(adapter=adapter))
    renamed = layer.target._replace(weight="other.weight")
    assert "target of block.0.proj" in differs("target", layers=with_layer(target=renamed))
    assert "target of block.0.proj" in differs("complete", layers=with_layer(complete=not layer.complete))
    moments = layer.moments._replace(S=layer.moments.S + 1)
    assert "memory" in differs("memory", layers=with_layer(moments=moments))
    times = {t: {n: s._replace(R=5 * s.R) for n, s in state.snapshots[t].items()} for t in state.tasks}
    assert "snapshot of task task-0" in differs("snapshots", snapshots=times)
    assert "options" in differs("options", options={})
    assert "open" in differs("open", open="now")
    fewer = {n: layer for n, layer in state.layers.items() if n != "head"}
    snapshots = {t: {n: state.snapshots[t][n] for n in fewer} for t in state.tasks}
    assert "layers only in A: head" in differs("fewer", layers=fewer, snapshots=snapshots)
    assert "no folder of an adapter" in run("diff", folder, tmp_path / "nowhere", code=3)[1]


def test_help_says_the_exit_codes():
    for command in ("inspect", "verify", "merge", "export", "import", "diff"):
        assert "Exit codes" in run(command, "--help")[0]
    assert "--install-completion" in run("--help")[0]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_encoding_of_standard_output_will_do(tmp_path, encoding):
    store.save(tmp_path / "f", make_state(8, names=[ODD, "日本", "head"], layers=2))
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "clora", "inspect", str(tmp_path / "f")]
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert b"Traceback" not in done.stderr
    assert b"head" in done.stdout


def test_a_folder_that_can_not_be_written_is_one_line(folder, tmp_path):
    (tmp_path / "file").write_text("")
    _, err = run("export", folder, tmp_path / "file" / "x", code=1)
    assert err.startswith("clora export: ")
    assert "Traceback" not in err
