"""The test kit notices what is wrong, says so by name, counts what says nothing, and writes its report whole."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clora_core as core
import clora_numpy
from clora import testing
from clora.testing import _report as report
from clora.testing._agreement import Ledger
from clora.testing._backends import tree_map
from clora_core.errors import DTypeError

NUMPY = testing.backends("numpy")[0]
CASE = testing.Case(testing.Sizes(3, 4, 5, 2), testing.Leads(), "float64", 5, dyadic=False, tabled=True)


def skewed(name: str, by: float) -> testing.Backend:
    """NumPy, whose results come back off by a share."""

    def skew(function: Any) -> Any:
        return lambda *arrays: tree_map(lambda a: (a * (1.0 + by)).astype(a.dtype), function(*arrays))

    return dataclasses.replace(NUMPY, name=name, compile=skew)


def test_a_result_beyond_its_bound_is_told() -> None:
    ledger = Ledger()
    testing.agree("linear", CASE._replace(dtype="float32"), [NUMPY], ledger=ledger)
    assert 0 < ledger.worst("linear")["to 8"] <= 1
    with pytest.raises(AssertionError, match=r"linear in skewed is off by \d.* times its bound"):
        testing.agree("linear", CASE, [skewed("skewed", 1e-12)], ledger=ledger)
    with pytest.raises(AssertionError, match="expand in skewed is not equal"):
        testing.agree("expand", CASE, [skewed("skewed", 1e-15)], ledger=ledger)


@pytest.mark.parametrize(
    ("got", "words"),
    [
        (np.ones(2), "not \\(3,\\)"),
        (np.array([1.0, np.nan, 1.0]), "is not finite"),
        (np.array([1.0, 1.5, 1.0]), "off by 5 times"),
        ([np.ones(3), np.ones(3)], "2 arrays, not 1"),
    ],
)
def test_a_comparison_says_what_differs(got: object, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        testing.compare("verb", "there", got, np.ones(3), np.full(3, 0.1), ledger=None)


def test_a_bound_that_is_none_is_told() -> None:
    for limit in (np.inf, np.nan, -1.0):
        with pytest.raises(AssertionError, match="its bound is none"):
            testing.compare("verb", "there", np.ones(3), np.ones(3), np.full(3, limit), ledger=None)
    with pytest.raises(AssertionError, match="what is expected is not finite"):
        testing.compare("verb", "there", np.ones(3), np.full(3, np.nan), np.ones(3), ledger=None)


def test_a_result_that_leaves_its_library_dtype_or_device_is_told() -> None:
    strict = next(b for b in testing.backends("strict") if b.name == "strict, device 1")
    assert testing.run("delta", strict, CASE.adapter()).shape == (4, 5)
    lost = dataclasses.replace(NUMPY, name="lost", kind=str)
    with pytest.raises(AssertionError, match="delta in lost left the library"):
        testing.run("delta", lost, CASE.adapter())
    wide = dataclasses.replace(NUMPY, name="wide", put=lambda a: a.astype(np.float64))
    with pytest.raises(AssertionError, match="delta in wide gave float64, not"):
        testing.run("delta", wide, CASE._replace(dtype="float32").adapter())
    elsewhere = dataclasses.replace(strict, name="elsewhere", device=testing.backends("strict")[0].device)
    with pytest.raises(AssertionError, match="delta in elsewhere left the device"):
        testing.run("delta", elsewhere, CASE.adapter())


@pytest.mark.parametrize(
    ("seed", "diagonal"),
    [(2, (1.0, 1.0)), (8, (3.0, 1.0))],
    ids=["equal singular values at energy 0.3", "a share of 0.9 at energy 0.9"],
)
def test_a_near_tie_says_nothing_and_is_counted(seed: int, diagonal: tuple[float, float]) -> None:
    ledger = Ledger()

    class Tie(testing.Case):
        def adapter(self, **how: int) -> core.Adapter:
            return super().adapter()._replace(R_old=np.diag(diagonal))

    testing.agree("orthogonality", Tie(*CASE._replace(seed=seed)), [skewed("any", 1.0)], ledger=ledger)
    assert sum(ledger.skipped.values()) == 1
    assert not ledger.rows


class Off(testing.ArrayDriver):
    """clora_numpy, but for one verb."""

    def __init__(self, verb: str) -> None:
        super().__init__(NUMPY)
        self.verb, self.name = verb, f"off at {verb}"

    def step(self, x: np.ndarray, target: np.ndarray, weight: float | None) -> None:
        super().step(x, target, None if self.verb == "penalty" else weight)
        if self.verb == "step":
            layer = self.adapter.layers["b"]
            layer.adapter = layer.adapter._replace(R_delta=layer.adapter.R_delta + 1e-4)

    def observe(self, batches: list[np.ndarray]) -> None:  # type: ignore[override]
        super().observe(batches[:1] if self.verb == "observe" else batches)

    def expand(self, by: int, seed: int) -> None:
        super().expand(by, seed + (self.verb == "expand"))

    def merged(self, x: np.ndarray) -> np.ndarray:
        return super().merged(x) + (1e-3 if self.verb == "merge" else 0.0)

    def drift(self) -> dict[str, float]:
        return {name: value * (1.1 if self.verb == "drift" else 1.0) for name, value in self.adapter.drift().items()}


LIFE = testing.Life(1, "float64", (6, 5, 5, 3), 3, 0, "first-task", None, 0.125)


@pytest.mark.parametrize("verb", ["step", "penalty", "observe", "merge"])
def test_a_verb_that_is_wrong_is_found_in_a_life(verb: str) -> None:
    testing.live(LIFE, [testing.ArrayDriver(NUMPY), Off("nothing")], ledger=Ledger())
    with pytest.raises(AssertionError, match=f"off at {verb}"):
        testing.live(LIFE, [testing.ArrayDriver(NUMPY), Off(verb)], ledger=Ledger())


def test_a_meter_that_is_wrong_is_found() -> None:
    fleet = testing.Fleet(LIFE, [testing.ArrayDriver(NUMPY), Off("drift")], resync=True, ledger=Ledger())
    for _ in range(2):
        fleet.begin_task()
        fleet.step()
        fleet.observe()
        fleet.end_task()
    with pytest.raises(AssertionError, match="verb: drift in off at drift"):
        fleet.drift()
    fleet.close()


def test_directions_drawn_otherwise_are_found() -> None:
    fleet = testing.Fleet(
        LIFE._replace(rank=2), [testing.ArrayDriver(NUMPY), Off("expand")], resync=True, ledger=Ledger()
    )
    with pytest.raises(AssertionError, match="verb: expand, A in off at expand is not equal"):
        fleet.expand()
    fleet.close()


def test_the_machine_finds_a_wrong_verb() -> None:
    with pytest.raises(AssertionError, match="off at step"):
        testing.check_verbs([testing.ArrayDriver(NUMPY), Off("step")], examples=20, ledger=Ledger())


def test_what_is_unsupported_must_fail() -> None:
    class Suite(testing.FunctionSuite):
        backend = NUMPY
        unsupported = {"delta": "no products"}  # noqa: RUF012
        examples = 2

    with pytest.raises(pytest.fail.Exception, match="take it off"):
        Suite().test_function("delta")
    Suite.backend = dataclasses.replace(skewed("wrong", 1.0), few_shapes=True)
    with pytest.raises(pytest.xfail.Exception, match="no products"):
        Suite().test_function("delta")
    Suite.backend = dataclasses.replace(NUMPY, put=lambda array: array[None])
    with pytest.raises(AssertionError, match="put and get of numpy"):
        Suite().test_function("delta")
    Suite.unsupported = {"dleta": "a misspelt name"}
    with pytest.raises(AssertionError, match="dleta"):
        Suite().test_function("delta")


def test_what_a_backend_lacks_is_skipped_and_not_passed() -> None:
    class Suite(testing.FunctionSuite):
        backend = next(b for b in testing.backends("strict") if not b.linalg)
        examples = 2

    with pytest.raises(pytest.skip.Exception, match="lacks what compress needs"):
        Suite().test_function("compress")


def test_a_number_that_left_its_library_is_told() -> None:
    lost = dataclasses.replace(NUMPY, name="lost", compile=lambda function: lambda *arrays: float(function(*arrays)))
    with pytest.raises(AssertionError, match="drift in lost left the library"):
        testing.run("drift", lost, CASE.adapter(), core.empty_moments(CASE.adapter()))


def test_a_driver_that_does_not_load_leaves_no_scope_behind() -> None:
    bare = next(b for b in testing.backends("strict") if not b.linalg)

    class Broken(testing.ArrayDriver):
        def load(self, *args: object, **how: object) -> None:  # type: ignore[override]
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        testing.Fleet(LIFE, [testing.ArrayDriver(NUMPY), Broken(bare)], resync=True, ledger=Ledger())
    assert bare.xp.get_array_api_strict_flags()["enabled_extensions"] == ("linalg", "fft")


def test_a_library_of_single_precision_is_told() -> None:
    single = next(b for b in testing.backends("strict") if b.dtypes == ("float32",))
    with pytest.raises(DTypeError, match="FunctionSuite alone"):
        testing.ArrayDriver(single)


def test_an_option_lost_in_a_folder_is_found() -> None:
    class Forgets(testing.ArrayDriver):
        name = "forgets"

        def state(self) -> Any:
            state = super().state()
            return state._replace(options={**state.options, "stop_old": False})

    pair = [testing.ArrayDriver(NUMPY), Forgets(NUMPY)]
    with pytest.raises(AssertionError, match="stop_old"):
        testing.live(LIFE, pair, ledger=Ledger())


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("page.md", "no marks", "once each"),
        ("page.md", "<!-- figures -->", "once each"),
        ("page.txt", "", "neither"),
        ("there/page.md", None, "no folder"),
    ],
)
def test_a_report_that_could_not_be_written_is_refused_at_once(
    tmp_path: Path, name: str, text: str | None, words: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert words in str(report.fault(tmp_path / name))
    assert report.fault(tmp_path / "new.md") is None


def test_ledgers_add_up() -> None:
    one, two = Ledger(), Ledger()
    one.note("delta", "a", "to 8", 0.25)
    two.note("delta", "a", "to 8", 0.5)
    two.note("expand", "b", "exact")
    two.skip("compress", "a tie")
    one.merge(Ledger.load(json.loads(json.dumps(two.dump()))))
    assert one.rows["delta", "a", "to 8"] == (2, 0.5)
    assert one.worst("delta") == {"to 8": 0.5}
    assert one.worst("expand") == {}
    assert one.skipped == {("compress", "a tie"): 1}


def test_the_report_goes_between_the_marks_of_a_page(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.note("delta", "torch", "to 8", 0.125)
    ledger.note("expand", "torch", "exact")
    page = tmp_path / "page.md"
    page.write_text("# Title\n<!-- figures -->\nold\n<!-- end of figures -->\nend\n")
    report.write(ledger, page)
    text = page.read_text()
    assert text.startswith("# Title\n<!-- figures -->\n")
    assert text.endswith("<!-- end of figures -->\nend\n")
    assert "old" not in text
    assert "| delta | 0.12 |" in text
    assert "| expand | = |" in text
    report.write(ledger, page)
    assert page.read_text() == text
    report.write(ledger, tmp_path / "new.json")
    assert Ledger.load(json.loads((tmp_path / "new.json").read_text())).rows == ledger.rows


def test_a_run_with_workers_reports_once(tmp_path: Path) -> None:
    """The plugin, as a user's own test file has it."""
    (tmp_path / "test_mine.py").write_text(
        "from clora import testing\n\n"
        "class TestMine(testing.FunctionSuite):\n"
        "    backend, examples = testing.backends('numpy')[0], 2\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "--clora-report=out.json"]
    done = subprocess.run([*command, "-k", "delta or merge"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agreement with NumPy" in done.stdout
    subjects = {subject for subject, _, _ in Ledger.load(json.loads((tmp_path / "out.json").read_text())).rows}
    done = subprocess.run([*command, "-k", "nothing"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "nothing was compared, so out.json was not written" in done.stdout
    assert subjects == {"delta", "delta_vjp", "merge", "bounds.delta", "bounds.delta_vjp", "bounds.merge"}


def test_without_the_extra_the_fix_is_named() -> None:
    code = "import importlib.util as u; u.find_spec = lambda name: None; import clora.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingDependencyError" in done.stderr
    assert "clora[testing]" in done.stderr


def test_drivers_begin_with_the_master() -> None:
    assert testing.drivers("numpy", "strict")[0].name == f"{clora_numpy.__name__} on numpy"
