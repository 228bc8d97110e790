"""The GPU lane where there is no GPU: what it says then, what it does with parts that fail, and how it writes its page.

The parts here are small real processes; only the devices that they are said to run on are made up.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clora.testing._agreement import Ledger

ROOT = Path(__file__).parent.parent
DEVICE = {"device": "made up", "version": "1", "CUDA runtime": "12.9"}
PAGE = b"# Caf\xc3\xa9\r\n\r\nbefore \xff\r\n<!-- figures -->\r\nold\r\n<!-- end of figures -->\r\nafter, no newline"
FEW = """
import time, pytest
def test_passes(): pass
@pytest.mark.parametrize("n", [1, 2])
def test_fails(n): assert n == 1
@pytest.fixture
def broken(): raise OSError("no")
def test_error(broken): pass
@pytest.fixture
def down():
    yield
    raise OSError("no")
def test_twice(down): assert 0
@pytest.mark.skip(reason="a CUDA device is needed")
def test_skipped(): pass
@pytest.mark.xfail
def test_expected(): assert 0
"""


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


@pytest.fixture
def page(gpu):
    return gpu.gpu_page


@pytest.fixture
def run(gpu):
    return importlib.import_module("gpu_run")


def command_over(folder, text):
    """A pytest part's command over one file."""
    file = folder / "test_few.py"
    file.write_text(text)
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(file))


def script(*arguments):
    """A benchmark as a person runs it, with every device hidden."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'backends'}"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)


# --- no device -------------------------------------------------------------------------------------------------


def test_without_a_device_nothing_is_written(tmp_path):
    file = tmp_path / "page.md"
    file.write_bytes(PAGE)
    done = script("benchmarks/gpu.py", "--out", file, "--logs", tmp_path / "logs")
    assert done.returncode == 2, done.stderr
    (line,) = done.stdout.splitlines()
    for word in ("no CUDA device", "docs/gpu.md", "CuPy: ", "PyTorch: ", "JAX: "):
        assert word in line
    assert file.read_bytes() == PAGE
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_the_commands_name_what_exists(gpu):
    assert "tests/test_cupy_gpu.py" in gpu.marked()
    parts = gpu.parts("quick", 4)
    assert [part.name for part in parts][-1] == "agreement"
    for part in parts:
        file = next(word for word in part.command if word.endswith(".py"))
        source = (ROOT / file).read_text(encoding="utf-8")
        if not part.tests:
            assert all(f'"{word}"' in source for word in part.command[1:]), part.name


def test_a_part_without_its_device_or_its_packages_says_so(gpu):
    part = gpu.Part("a", "A", ("-c", ""), ("torch", "jax"), ("no_such_package", "json"))
    assert gpu.why_not(part, ["cupy"]) == "no device for PyTorch or JAX"
    assert gpu.why_not(part, ["jax"]) == "not installed: no_such_package (python -m pip install no-such-package)"
    assert gpu.environment(["cupy"])["JAX_PLATFORMS"] == "cpu"
    assert gpu.environment(["jax"])["JAX_PLATFORMS"] == "cuda,cpu"


# --- parts -----------------------------------------------------------------------------------------------------


def lane(gpu, monkeypatch, folder, parts, *arguments):
    """The whole command over these parts, on a device that is made up; its exit code."""
    monkeypatch.setattr(gpu, "probe", lambda name: DEVICE if name == "torch" else {"error": "not installed"})
    monkeypatch.setattr(gpu, "parts", lambda profile, jobs: parts)
    return gpu.main(["--out", str(folder / "page.md"), "--logs", str(folder / "logs"), "--budget", "90", *arguments])


def test_a_failing_part_is_told_and_the_others_run(gpu, monkeypatch, tmp_path):
    (tmp_path / "page.md").write_bytes(PAGE)
    say = 'print(\'{"machine": {"device": "d"}, "layers": {"one": {"ratio": 1.25}}}\')'
    parts = [
        gpu.Part(
            "fails", "Fails", ("-c", f"{say}; import sys; print('why', file=sys.stderr); sys.exit(3)"), ("torch",)
        ),
        gpu.Part("silent", "Silent", ("-c", "print('no JSON')"), ("torch",)),
        gpu.Part("other", "Other", ("-c", "1 / 0"), ("cupy",)),
        gpu.Part("works", "Works", ("-c", say), ("torch",)),
        gpu.Part(
            "tests", "Tests", (*command_over(tmp_path, FEW), "--junitxml={logs}/tests.xml"), ("torch",), tests=True
        ),
    ]
    assert lane(gpu, monkeypatch, tmp_path, parts) == 1
    results = {result["name"]: result for result in json.loads((tmp_path / "logs" / "results.json").read_text())}
    assert [results[part.name]["status"] for part in parts] == ["failed", "failed", "could not run", "passed", "failed"]
    assert results["fails"]["reason"] == "why"
    assert "printed no JSON" in results["silent"]["reason"]
    assert results["other"]["reason"] == "no device for CuPy"
    assert results["tests"]["reason"] == "2 passed, 3 failed, 2 skipped"
    text = (tmp_path / "page.md").read_bytes().decode("latin-1")
    for word in ("| Fails | failed |", "| Works | passed |", "| Other | could not run |", "| one | 1.250 |", "why"):
        assert word in text
    assert "2 passed, 3 failed, 2 skipped." in text
    assert "- skipped, 1: a CUDA device is needed" in text
    assert "test_few.test_fails[2]`" in text
    assert str(ROOT) not in text


def test_parts_that_work_are_success_though_others_cannot_run(gpu, monkeypatch, tmp_path, capsys):
    parts = [
        gpu.Part("other", "Other", ("-c", "1 / 0"), ("cupy",)),
        gpu.Part("works", "Works", ("-c", "print('{}')"), ("torch",)),
        gpu.Part("third", "Third", ("-c", "1 / 0"), ("torch",)),
    ]
    assert lane(gpu, monkeypatch, tmp_path, parts, "--only", "other", "--only", "works") == 0
    assert "Not asked for, so not run: third." in (tmp_path / "page.md").read_text()
    capsys.readouterr()
    assert gpu.main(["--only", "works", "--logs", str(tmp_path / "logs")]) == 0
    assert "| Works | passed |" in capsys.readouterr().out, "printed, since no page was named"


def test_a_page_without_marks_is_refused_before_anything_runs(gpu, monkeypatch, tmp_path, capsys):
    (tmp_path / "page.md").write_text("# A page\n")
    with pytest.raises(SystemExit):
        lane(gpu, monkeypatch, tmp_path, [gpu.Part("works", "Works", ("-c", "print('{}')"), ("torch",))])
    assert "<!-- end of figures -->" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_skipping_every_test_is_no_success(gpu, monkeypatch, tmp_path):
    text = "import pytest\n@pytest.mark.skip(reason='why')\ndef test_a(): pass\n"
    part = gpu.Part("tests", "T", (*command_over(tmp_path, text), "--junitxml={logs}/tests.xml"), tests=True)
    for found, status in ((["torch"], "could not run"), (["torch", "cupy"], "failed")):
        (result,) = gpu.lane([part], found, tmp_path, time.monotonic() + 60)
        assert (result.status, result.reason) == (status, "every test was skipped: why")


def test_a_part_that_runs_out_of_time_says_what_passed(run, tmp_path):
    text = "import time\ndef test_first(): pass\ndef test_long(): time.sleep(600)\n"
    command = [*command_over(tmp_path, text), f"--junitxml={tmp_path}/late.xml"]
    result = run.execute("late", "Late", command, tmp_path, 10.0, env={}, tests=True)
    assert result.status == "out of time"
    assert result.reason == "stopped after 10 s; 1 passed, 0 failed, 0 skipped until then"
    assert result.seconds < 10 + run.GRACE + 5


def test_what_does_not_stop_is_ended_with_what_it_started(run, tmp_path):
    text = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    result = run.execute("stubborn", "Stubborn", ["-c", text], tmp_path, 3.0, env={}, grace=0.1)
    assert result.status == "out of time"
    child = Path("/proc", (tmp_path / "stubborn.json").read_text().strip(), "stat")
    time.sleep(0.5)
    assert not child.exists() or child.read_text().split()[2] == "Z", "its child still runs"


def test_an_earlier_report_does_not_pass_for_this_one(run, tmp_path):
    (tmp_path / "tests.xml").write_text('<testsuites><testsuite><testcase name="a"/></testsuite></testsuites>')
    result = run.execute("tests", "Tests", ["-c", "import sys; sys.exit(4)"], tmp_path, 30, env={}, tests=True)
    assert (result.status, result.counts) == ("failed", {})
    assert result.reason == "pytest ended with 4 and left no report of its tests"


# --- the page --------------------------------------------------------------------------------------------------


def test_nested_figures_become_one_table(page):
    kept = {"clora": 1234567, "peft": 2}
    figures = {"shapes": {"512,16": {"ms": 0.5, "kept": kept}, "128,16": {"ms": 1.0}}, "geometric mean": {"ms": 0.25}}
    assert page.table(page.rows(figures)) == [
        "| | ms | kept, clora | kept, peft |",
        "|---|---|---|---|",
        "| 512,16 | 0.500 | 1,234,567 | 2 |",
        "| 128,16 | 1.000 |  |  |",
        "| geometric mean | 0.250 |  |  |",
    ]


def test_the_agreement_is_one_row_a_backend(page, tmp_path):
    ledger = Ledger()
    for subject, kind, ratio in (("delta", "to 8", 0.25), ("apply", "to 64", 0.5), ("merge", "exact", 0.0)):
        ledger.note(subject, "cupy", kind, ratio)
    ledger.note("merge", "torch, cuda", "exact")
    (tmp_path / "report.json").write_text(json.dumps(ledger.dump()))
    _, _, *rows = page.agreement(str(tmp_path / "report.json"))
    assert rows == ["| cupy | 3 | 0.500 | apply |", "| torch, cuda | 1 | 0.000 | all equal |"]
    (tmp_path / "report.json").write_text("{}")
    assert page.agreement(str(tmp_path / "report.json")) == ["The report of the agreement could not be read: 'rows'."]
