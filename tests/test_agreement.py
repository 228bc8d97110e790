"""All libraries and frameworks agree: every function, every verb, whole lives; and every public name is among them.

One NumPy master goes to every backend inside one example. `nox -s agreement -- --clora-report docs/agreement.md`
publishes how near each came to its bound.
"""

import ast
import importlib
import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import kit
import pytest

import clora_core as core
from clora import testing
from clora.testing._agreement import LEDGER
from clora.testing._backends import installed
from clora.testing._calls import BUILDERS
from clora.testing._drivers import _jax_functions

LIBRARIES = [name for name in (*kit.LIBRARIES, "cupy") if installed(name)]
BACKENDS = testing.backends(*LIBRARIES)
FLEET = testing.drivers(*LIBRARIES)
LOOSEST = {"to 8": 200, "to 64": 200, "above": 250}  # how many times the worst error a bound may be


def test_whole_lives() -> None:
    """Begin, five steps, observe, end, expand, merge, save, load elsewhere, restore, without synchronising."""
    testing.check_lives(FLEET, examples=20)


def test_random_verbs() -> None:
    """Verbs in any order, each judged by itself."""
    testing.check_verbs(FLEET)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_function(name: str) -> None:
    """Every backend gives what NumPy gives, within a bound that is no looser than it must be."""
    testing.check_function(name, BACKENDS)
    others = {backend.library for backend in BACKENDS} - {"numpy", "strict"}  # strict computes with NumPy
    if others and hypothesis.settings().max_examples >= 40:  # fewer do not find how near an error can come
        for kind, worst in LEDGER.worst(name).items():
            assert worst * LOOSEST[kind] >= 1, f"the worst error of {name} ({kind}) is {worst:.2g} of its bound"


def test_every_function_of_the_core_has_a_call() -> None:
    """The suite and the table of capabilities name the same functions."""
    assert set(BUILDERS) | {"capabilities"} == set(core.capabilities())


# --- every public name -----------------------------------------------------------------------------------------

# clora_jax.nnx, clora_jax.equinox and clora_torch.huggingface are layers over these verbs for one library each:
# tests/test_jax_frameworks.py, tests/test_torch_trainer.py. `clora` is commands: tests/test_commands.py.
PACKAGES = ("clora_core", "clora_store", "clora_numpy", "clora_torch", "clora_jax")
# What lives and functions do not reach, and why.
ELSEWHERE = {
    "clora_core.capabilities": "a table, read by tests/test_audit.py",
    "clora_store.VLLM_RANKS": "numbers of vLLM's",
    "clora_store.vllm_problems": "reads configurations alone: tests/test_store_peft.py",
    "clora_store.merge_checkpoint": "works on files, without a framework: tests/test_store_merge.py",
    "clora_store.import_peft": "makes a State of a folder of PEFT's, without a framework: tests/test_store_peft.py",
    "clora_numpy.Relu": "no nonlinearity here, so that every state is a polynomial: tests/test_numpy_training.py",
    "clora_numpy.cross_entropy": "the same reason: tests/test_numpy_training.py, against the definition",
    "clora_numpy.adam": "Adam amplifies rounding without bound: tests/test_numpy_optimizers.py, against torch's",
    "clora_numpy.adamw": "as adam",
    "clora_numpy.cosine": "a Python function of a number: tests/test_numpy_optimizers.py",
    "clora_numpy.ContinualAdapter.disabled": "a switch: tests/test_numpy_training.py",
    "clora_numpy.ContinualAdapter.parameters": "lists arrays that are compared here",
    "clora_numpy.ContinualAdapter.state_bytes": "a count: tests/test_numpy_training.py",
    "clora_numpy.ContinualAdapter.task": "begin_task and end_task, which are here, and a way back from an exception",
    "clora_torch.ContinualAdapter.detach": "takes the adapter off: tests/test_torch_attach.py",
    "clora_torch.ContinualAdapter.disabled": "a switch: tests/test_torch_tasks.py",
    "clora_torch.ContinualAdapter.grow_head": "clora_torch alone has it: tests/test_torch_growth.py",
    "clora_torch.ContinualAdapter.load_state_dict": "torch's own checkpoints: tests/test_torch_tasks.py",
    "clora_torch.ContinualAdapter.state_dict": "as load_state_dict",
    "clora_torch.ContinualAdapter.state_bytes": "a count: tests/test_torch_tasks.py",
    "clora_torch.ContinualAdapter.task": "begin_task and end_task, which are here, and a way back from an exception",
    "clora_torch.ContinualAdapter.unprotect": "a switch: tests/test_torch_traps.py",
    "clora_jax.apply": "a part of linear: tests/test_jax_linear.py, against the core",
    "clora_jax.delta": "as apply",
    "clora_jax.full": "names layers without room: tests/test_jax_tasks.py",
    "clora_jax.masked": "padding: tests/test_jax_tasks.py",
}


def public() -> Iterator[tuple[str, Any]]:
    """Dotted names of all that packages export, and of the methods of their adapters."""
    for package in PACKAGES:
        if (library := {"clora_torch": "torch", "clora_jax": "jax"}.get(package)) and library not in LIBRARIES:
            continue
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, types.ModuleType):
                continue
            yield f"{package}.{name}", value
            if name == "ContinualAdapter":
                for method, body in vars(value).items():
                    if not method.startswith("_") and callable(body):
                        yield f"{package}.{name}.{method}", body


def codes(value: Any) -> set[types.CodeType]:
    """The code of a function, or of any method of a class."""
    if inspect.isclass(value):
        return {code for body in vars(value).values() if inspect.isfunction(body) for code in codes(body)}
    value = inspect.unwrap(value)
    value = getattr(value, "fun", value)  # jax.custom_jvp
    return {value.__code__} if hasattr(value, "__code__") else set()


def test_every_public_name_takes_part() -> None:
    """The body of every public function, and of some method of every class, ran in a life; or a reason is listed."""
    ran: set[types.CodeType] = set()
    fleet = testing.drivers(*LIBRARIES)
    if kit.jax is not None:
        kit.jax.clear_caches()
        _jax_functions.cache_clear()

    def watch(frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "call":
            ran.add(frame.f_code)

    sys.setprofile(watch)
    try:
        # Of two tasks, grown in between, under protection and penalty; then what a life does not need of itself.
        life = testing.Life(1, "float32", (5, 6, 4, 3), 2, 1, "first-task", 0.5, 0.125)
        testing.attach(life, fleet)
        testing.live(life, fleet)
        verbs = testing.Fleet(life, fleet, resync=True)
        verbs.begin_task()
        verbs.step()
        verbs.observe()
        verbs.end_task()
        verbs.rows(["task-0", "task-0"])
        verbs.export_peft()
        verbs.drift()
        verbs.restore("task-0")
        verbs.close()
    finally:
        sys.setprofile(None)
    missing, needless = [], set(ELSEWHERE)
    for name, value in public():
        covered = name.removeprefix("clora_core.") in BUILDERS or bool(codes(value) & ran)
        tuples = inspect.isclass(value) and issubclass(value, tuple)  # arrays by name: they hold what is compared
        if not covered and not tuples and name not in ELSEWHERE:
            missing.append(name)
        if not covered:
            needless.discard(name)
    assert not missing, f"neither compared here nor listed with a reason: {missing}"
    present = {name.partition(".")[0] for name, _ in public()}
    assert not {name for name in needless if name.partition(".")[0] in present}, f"reasons without need: {needless}"


def test_clora_cupy_has_the_names_of_clora_numpy() -> None:
    """Where a GPU is, the same lives run through it; what it has of its own is tested by tests/test_cupy_*.py."""
    source = Path(__file__).parent.parent / "backends" / "clora_cupy" / "__init__.py"
    assigned = next(node for node in ast.parse(source.read_text()).body if isinstance(node, ast.Assign))
    names = set(ast.literal_eval(assigned.value))
    assert names - {"share", "stage"} == set(importlib.import_module("clora_numpy").__all__)
