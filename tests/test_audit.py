"""Claims about the code that the code itself can answer: what is public, imported, created, written down."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kit
import pytest

import clora_core as core

ROOT = Path(core.__file__).parent
SOURCES = sorted(ROOT.glob("*.py"))
CREATION = {"zeros", "ones", "eye", "empty", "full", "arange", "asarray", "linspace"}
IMPORTS = {"__future__", "array_api_compat", "math", "types", "typing"}
FRAMEWORKS = ("torch", "jax", "cupy", "tensorflow", "dask", "ndonnx", "sparse")


def nodes(source: Path, *kinds: type[ast.AST]) -> Iterator[Any]:
    """Syntax of those kinds."""
    return (node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, kinds))


def public() -> dict[str, Any]:
    """Dotted names of the public functions."""
    spaces = {"": core, "metrics.": core.metrics, "bounds.": core.bounds}
    return {
        prefix + name: value
        for prefix, space in spaces.items()
        for name, value in vars(space).items()
        if inspect.isfunction(value)
        and not name.startswith("_")
        and value.__module__.startswith("clora_core")
        and (value.__module__ == space.__name__ or (prefix == "" and name in core.__all__))
    }


def test_capabilities_are_exactly_the_public_functions() -> None:
    """None missing from the table, none in it that does not exist; the values are of the documented kinds."""
    assert set(core.capabilities()) == set(public())
    for needs in core.capabilities(xp=kit.Lane.STRICT.value.xp).values():
        assert needs.gradients in {"all", "R_delta", "simple", "none"}


@pytest.mark.parametrize("name", sorted(core.capabilities()))
def test_linalg_is_needed_where_the_table_says(name: str) -> None:
    """Functions without ``linalg`` ran in the lane that has none, or take no arrays."""
    import test_transforms

    if name not in test_transforms.CALLS:
        return
    for args, kwargs in test_transforms.CALLS[name]:
        if core.capabilities()[name].linalg:
            kit.run(name, kit.Lane.STRICT, *args, **kwargs)
        else:
            kit.run(name, kit.Lane.STRICT_BARE, *args, **kwargs)
    if core.capabilities()[name].linalg:
        with pytest.raises(AttributeError, match="linalg"):
            kit.run(name, kit.Lane.STRICT_BARE, *test_transforms.CALLS[name][0][0])


def test_all_is_what_is_imported() -> None:
    """__all__ is sorted by ruff and names what exists."""
    assert all(hasattr(core, name) for name in core.__all__)


@pytest.mark.parametrize("name", sorted(public()))
def test_docstrings(name: str) -> None:
    """Each says what it returns: numpydoc sections, or one sentence that gives the shape or names what it bounds."""
    doc = inspect.getdoc(public()[name]) or ""
    parameters = [p for p in inspect.signature(public()[name]).parameters if p not in ("xp", "adapter")]
    first_paragraph = doc.split("\n\n")[0]
    assert first_paragraph.rstrip()[-1:] in ".,:", name
    short = name.startswith(("bounds.", "metrics.")) or len(parameters) <= 1
    if not short:
        assert "Returns\n-------" in doc, name
        assert "Parameters\n----------" in doc or name.endswith("_vjp"), name
    assert len(doc) > 40, name


@pytest.mark.parametrize("name", sorted(public()))
def test_xp_is_the_last_keyword(name: str) -> None:
    """Every function takes ``xp=None`` last."""
    last = list(inspect.signature(public()[name]).parameters.values())[-1]
    assert (last.name, last.default) == ("xp", None)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_imports(source: Path) -> None:
    """array-api-compat, a few modules of the standard library, and the package itself."""
    for node in nodes(source, ast.Import):
        assert {alias.name.split(".")[0] for alias in node.names} <= IMPORTS
    for node in nodes(source, ast.ImportFrom):
        assert node.level == 1 or node.module.split(".")[0] in IMPORTS


def test_importing_the_core_loads_no_framework() -> None:
    """In a fresh interpreter."""
    code = f"import sys, clora_core; print([m for m in {FRAMEWORKS} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_arrays_are_created_with_dtype_and_device(source: Path) -> None:
    """Else a float32 model gets float64 parts, on another device. ``**like`` stands for both."""
    for call in nodes(source, ast.Call):
        if isinstance(call.func, ast.Attribute) and call.func.attr in CREATION:
            given = {keyword.arg for keyword in call.keywords}
            assert {"dtype", "device"} <= given or None in given, f"{source.name}:{call.lineno}"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nothing_that_some_library_lacks(source: Path) -> None:
    """No einsum, no writing into arrays, no value read outside `validate`, no negative steps, no sign, no norm at 0."""
    forbidden = {"einsum", "at", "item", "tolist", "numpy", "sign", "vector_norm", "matrix_norm", "nonzero", "unique"}
    for node in nodes(source, ast.Attribute):
        assert node.attr not in forbidden, f"{source.name}:{node.lineno} {node.attr}"
    for node in nodes(source, ast.Assign, ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        assert not any(isinstance(target, ast.Subscript) for target in targets), f"{source.name}:{node.lineno}"
    for node in nodes(source, ast.Slice):
        assert not isinstance(node.step, ast.UnaryOp), f"{source.name}:{node.lineno}"
    allowed = {"validate", "_check_finite"}
    for function in nodes(source, ast.FunctionDef):
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in {"bool", "float"}:
                static = function.name == "linear_vjp"  # bool() of a tuple of sizes
                assert function.name in allowed or static, f"{source.name}:{call.lineno}"


@pytest.mark.parametrize("source", sorted(Path(__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_no_test_has_a_tolerance_of_its_own(source: Path) -> None:
    """Equal, or within `bounds`: no allclose, no approx."""
    for node in nodes(source, ast.Attribute):
        assert node.attr not in {"allclose", "isclose", "approx", "assert_allclose"}, f"{source.name}:{node.lineno}"


def test_the_audit_of_a_run_sees_what_is_missing() -> None:
    """With nothing recorded, every function is reported twice."""
    ran, compared = kit.RAN.copy(), kit.COMPARED.copy()
    try:
        kit.RAN.clear()
        kit.COMPARED.clear()
        assert len(kit.uncovered()) == 2 * (len(core.capabilities()) - 1)
    finally:
        kit.RAN.update(ran)
        kit.COMPARED.update(compared)
