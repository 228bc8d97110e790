"""Every wrong call raises the right error, and its message says what, got, needed, the usual cause and the fix."""

from collections.abc import Callable
from typing import Any

import array_api_strict as strict
import kit
import numpy as np
import pytest

import clora_core as core
from clora_core import errors

if kit.torch is None or kit.jax is None:
    pytest.skip(kit.NO_FRAMEWORK, allow_module_level=True)
torch, jnp = kit.torch, kit.jax.numpy

F32 = np.float32
PROBE = 0.73519  # a value that no message may show


def full(*shape: int, dtype: Any = F32) -> np.ndarray:
    """An array of the probe."""
    return np.full(shape, PROBE, dtype=dtype)


GOOD = core.Adapter(full(4, 2), full(2, 2), full(2, 2), full(2, 3))
X, W, G, BIAS = full(5, 3), full(4, 3), full(5, 4), full(4)
MOMENTS = core.Moments(np.eye(2, dtype=F32), full(2, 2), np.asarray(PROBE, dtype=F32))
SWAPPED = core.Adapter(GOOD.B, GOOD.R_old, GOOD.R_delta, GOOD.A)
HEAD = core.Adapter(None, full(4, 3), full(4, 3), None)
RNG = np.random.default_rng(0)
NAN = GOOD._replace(R_old=np.full((2, 2), np.nan, dtype=F32))
Shape, Rank, DType = errors.ShapeError, errors.RankError, errors.DTypeError
Space, Option, Value = errors.NamespaceError, errors.OptionError, errors.InvalidValueError


def half(adapter: core.Adapter) -> core.Adapter:
    """In float16."""
    return core.Adapter(*(np.asarray(a, dtype=np.float16) for a in adapter))


TABLE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # shapes
    "factors swapped": (lambda: core.delta(SWAPPED), Shape, "do not chain|swapped"),
    "A transposed": (lambda: core.delta(GOOD._replace(A=full(2, 4))), Shape, r"A \(2, 4\)"),
    "ranks differ": (lambda: core.delta(GOOD._replace(B=full(3, 3))), Shape, r"B \(3, 3\)"),
    "R_old not square": (lambda: core.routing(GOOD._replace(R_old=full(2, 3))), Shape, r"R_old \(2, 3\)"),
    "A is a vector": (lambda: core.delta(GOOD._replace(A=full(2))), Shape, r"A \(2,\)"),
    "head of two shapes": (lambda: core.routing(HEAD._replace(R_old=full(4, 2))), Shape, r"R_old \(4, 2\)"),
    "head, leading axes": (
        lambda: core.routing(HEAD._replace(R_old=full(2, 4, 3), R_delta=full(3, 4, 3))),
        Shape,
        "leading axes do not broadcast",
    ),
    "one factor missing": (lambda: core.delta(GOOD._replace(A=None)), Shape, "A None, B given"),
    "head where factors are needed": (lambda: core.apply(X, HEAD), Shape, "a factor is missing"),
    "head in begin_task with A alone": (lambda: core.begin_task(GOOD._replace(B=None)), Shape, "None for both"),
    "x is a vector": (lambda: core.apply(full(3), GOOD), Shape, r"x\[None, :\]"),
    "x of another layer": (lambda: core.linear(full(5, 4), W, GOOD), Shape, r"x \(5, 4\)"),
    "W transposed": (lambda: core.linear(X, W.T, GOOD), Shape, "transpose W"),
    "bias of another layer": (lambda: core.linear(X, W, GOOD, full(3)), Shape, r"bias \(3,\)"),
    "leading axes": (lambda: core.delta(GOOD._replace(A=full(2, 4, 2), B=full(3, 2, 3))), Shape, "leading axes"),
    "leading axes of x": (lambda: core.apply(full(2, 5, 3), GOOD._replace(A=full(3, 4, 2))), Shape, "leading axes"),
    "leading axes of R_delta": (
        lambda: core.apply(full(2, 5, 3), GOOD._replace(R_delta=full(3, 2, 2))),
        Shape,
        "leading",
    ),
    "leading axes of bias": (lambda: core.linear(full(2, 5, 3), W, GOOD, full(3, 4)), Shape, "leading axes.*bias"),
    "leading axes of S": (
        lambda: core.drift(GOOD._replace(R_delta=full(3, 2, 2)), MOMENTS._replace(S=full(2, 2, 2))),
        Shape,
        "leading axes.*S",
    ),
    "leading axes of q": (
        lambda: core.drift(GOOD._replace(R_delta=full(3, 2, 2)), MOMENTS._replace(q=full(2))),
        Shape,
        "leading axes.*q",
    ),
    "leading axes of C": (
        lambda: core.record(MOMENTS, GOOD._replace(R_delta=full(3, 2, 2)), full(2, 2, 2)),
        Shape,
        "leading axes.*C",
    ),
    "leading axes of C against P": (
        lambda: core.record(MOMENTS._replace(P=full(2, 2, 2)), GOOD, full(3, 2, 2)),
        Shape,
        "leading axes.*P",
    ),
    "a weight without inputs": (lambda: core.merge(full(4, 0), GOOD._replace(B=full(2, 0))), Shape, r"W \(4, 0\)"),
    "the bound of a weight without inputs": (
        lambda: core.bounds.merge(full(4, 0), GOOD._replace(B=full(2, 0))),
        Shape,
        r"W \(4, 0\)",
    ),
    "the bound of a complex adapter": (
        lambda: core.bounds.delta(core.Adapter(*(array.astype(np.complex128) for array in GOOD))),
        DType,
        "A: complex128",
    ),
    "the bound of one complex factor": (
        lambda: core.bounds.drift(GOOD._replace(A=GOOD.A.astype(np.complex64)), MOMENTS),
        DType,
        "A: complex64",
    ),
    "a number for x": (lambda: core.apply(1.0, GOOD), Space, "builtins.float"),
    "a number for q": (lambda: core.drift(GOOD, MOMENTS._replace(q=0.0)), Space, "builtins.float"),
    "a number for grad": (lambda: core.drift_vjp(GOOD, MOMENTS, 1.0), Space, "builtins.float"),
    "a list for a baseline": (
        lambda: core.metrics.forward_transfer(full(3, 3), baseline=[0.1, 0.1, 0.1]),
        Space,
        "builtins.list",
    ),
    "a list for a bias, in a bound": (
        lambda: core.bounds.linear_vjp(X, W, GOOD, G, bias=[0.0] * 4),
        Space,
        "builtins.list",
    ),
    "another name of a dtype": (lambda: core.merge(W, GOOD, dtype="half"), DType, "'half'"),
    "another name of a dtype, in a bound": (lambda: core.bounds.merge(W, GOOD, dtype="float"), DType, "float"),
    "grad_y of another layer": (lambda: core.linear_vjp(X, W, GOOD, full(5, 3)), Shape, r"grad_y \(5, 3\)"),
    "rows of grad_y": (lambda: core.linear_vjp(X, W, GOOD, full(6, 4)), Shape, "n=6"),
    "grad_y of one matrix for two": (lambda: core.linear_vjp(full(2, 5, 3), W, GOOD, G), Shape, "grad_y"),
    "grad_delta of one matrix for two": (
        lambda: core.delta_vjp(GOOD._replace(A=full(2, 4, 2)), W),
        Shape,
        "grad_delta",
    ),
    "grad_delta transposed": (lambda: core.delta_vjp(GOOD, W.T), Shape, r"grad_delta \(3, 4\)"),
    "u of another rank": (lambda: core.linear_vjp(X, W, GOOD, G, u=full(5, 3)), Shape, r"u \(5, 3\)"),
    "A_new of another layer": (lambda: core.expand(GOOD, full(3, 1), full(1, 3)), Shape, "A_new"),
    "B_new of another count": (lambda: core.expand(GOOD, full(4, 1), full(2, 3)), Shape, "B_new"),
    "one size for two experts": (lambda: core.block_routing(full(2), (1,)), Shape, "do not match"),
    "moments of another rank": (lambda: core.drift(GOOD, MOMENTS._replace(S=full(3, 3))), Shape, r"S \(3, 3\)"),
    "P of another rank": (lambda: core.drift_vjp(GOOD, MOMENTS._replace(P=full(3, 3))), Shape, r"P \(3, 3\)"),
    "C of another rank": (lambda: core.record(MOMENTS, GOOD, full(3, 3)), Shape, r"C \(3, 3\)"),
    "u without rows": (lambda: core.second_moment(full(2)), Shape, r"u \(2,\)"),
    "weights of other rows": (lambda: core.second_moment(full(5, 2), weights=full(4)), Shape, r"weights \(4,\)"),
    "S not square": (lambda: core.protected_basis(full(2, 3)), Shape, r"S \(2, 3\)"),
    "S a vector": (lambda: core.protected_basis(full(2)), Shape, r"S \(2,\)"),
    "S a number": (lambda: core.protected_basis(full()), Shape, r"S \(\)"),
    "basis of another rank": (
        lambda: core.project(full(2, 2), core.Basis(full(3, 3), full(3))),
        Shape,
        r"U \(3, 3\)",
    ),
    "a wide frame": (lambda: core.orthonormalize(full(2, 3)), Shape, "transpose"),
    "a frame of one axis": (lambda: core.orthonormality_defect(full(3)), Shape, r"F \(3,\)"),
    "half an accuracy matrix": (lambda: core.metrics.forgetting(full(3, 2)), Shape, r"accuracy \(3, 2\)"),
    "a baseline of other tasks": (
        lambda: core.metrics.forward_transfer(full(3, 3), baseline=full(2)),
        Shape,
        "baseline",
    ),
    "a plan of nothing": (lambda: core.plan(4, 0, 3, 1), Shape, "d_out=0"),
    "negative rows": (lambda: core.plan(-1, 4, 3, 1), Shape, "n=-1"),
    "leading axes of grad": (
        lambda: core.drift_vjp(GOOD._replace(R_delta=full(3, 2, 2)), MOMENTS, full(2)),
        Shape,
        "leading axes.*grad",
    ),
    "leading axes of the penalty's grad": (
        lambda: core.orthogonality_vjp(GOOD._replace(R_delta=full(3, 2, 2)), full(2), form="routing"),
        Shape,
        "leading axes.*grad",
    ),
    "leading axes of weights": (
        lambda: core.second_moment(full(2, 5, 2), weights=full(3, 5)),
        Shape,
        "leading axes.*weights",
    ),
    "leading axes of a basis": (
        lambda: core.project(full(3, 2, 2), core.Basis(full(2, 2, 2), full(2, 2))),
        Shape,
        "leading axes.*U",
    ),
    "leading axes of a baseline": (
        lambda: core.metrics.forward_transfer(full(2, 3, 3), baseline=full(4, 3)),
        Shape,
        "leading axes.*baseline",
    ),
    "leading axes of bias, backward": (
        lambda: core.linear_vjp(X, W, GOOD, G, wrt=("bias",), bias=full(3, 4)),
        Shape,
        "grad_y lacks leading axes",
    ),
    "expand by factors of two stacks": (
        lambda: core.expand(GOOD, full(2, 4, 1), full(3, 1, 3)),
        Shape,
        "leading axes.*B_new",
    ),
    "a bound of a head": (lambda: core.bounds.delta(HEAD), Shape, "a factor is missing"),
    "a bound of one factor": (lambda: core.bounds.linear(X, W, GOOD._replace(A=None)), Shape, "A None"),
    "a bound of another W": (lambda: core.bounds.linear(X, W.T, GOOD), Shape, "transpose W"),
    "a bound of a merge of another W": (lambda: core.bounds.merge(W.T, GOOD), Shape, "transpose W"),
    "a bound of another basis": (
        lambda: core.bounds.project(full(2, 2), core.Basis(full(3, 3), full(3))),
        Shape,
        r"U \(3, 3\)",
    ),
    "a bound of no rows": (lambda: core.bounds.second_moment(full(2)), Shape, r"u \(2,\)"),
    # ranks
    "rank 0": (lambda: core.delta(core.Adapter(full(4, 0), full(0, 0), full(0, 0), full(0, 3))), Rank, "rank is 0"),
    "init with rank 0": (lambda: core.init_adapter(RNG, 4, 3, 0), Rank, "rank=0"),
    "init above the layer": (lambda: core.init_adapter(RNG, 4, 3, 4), Rank, "1 <= rank <= 3"),
    "validate above the layer": (
        lambda: core.validate(core.Adapter(full(2, 3), full(3, 3), full(3, 3), full(3, 4))),
        Rank,
        "rank=3",
    ),
    "compress to 0": (lambda: core.compress(GOOD, 0), Rank, "rank=0"),
    "compress to more": (lambda: core.compress(GOOD, 3), Rank, "1 <= rank <= 2"),
    "expand by nothing": (lambda: core.expand(GOOD, full(4, 0), full(0, 3)), Rank, "k >= 1"),
    "an expert of rank 0": (lambda: core.block_routing(full(2), (1, 0)), Rank, "every size >= 1"),
    "a plan of rank 0": (lambda: core.plan(4, 4, 3, 0), Rank, "rank=0"),
    # dtypes
    "two dtypes": (lambda: core.delta(GOOD._replace(B=full(2, 3, dtype=np.float64))), DType, "B: float64"),
    "x in float64": (lambda: core.apply(full(5, 3, dtype=np.float64), GOOD), DType, "x: float64"),
    "integers": (lambda: core.routing(core.Adapter(*(a.astype(np.int32) for a in GOOD))), DType, "int32"),
    "float16": (lambda: core.delta(half(GOOD)), DType, "border"),
    "integer moment": (lambda: core.protected_basis(np.eye(2, dtype=np.int64)), DType, "int64"),
    "an integer plan": (lambda: core.plan(4, 4, 3, 1, dtype="int32"), DType, "int32"),
    "init in float16": (lambda: core.init_adapter(RNG, 4, 3, 2, dtype=np.float16), DType, "border"),
    "roundoff of integers": (lambda: core.bounds.unit_roundoff(np.int32), DType, "int32"),
    "merge to integers": (lambda: core.merge(W, GOOD, dtype=np.int8), DType, "int8"),
    "merge to a dtype NumPy has not": (lambda: core.merge(W, GOOD, dtype="bfloat16"), DType, "'bfloat16'"),
    "init in a dtype that is none": (lambda: core.init_adapter(RNG, 4, 3, 2, dtype="float33"), DType, "'float33'"),
    "a bound of a merge of two dtypes": (lambda: core.bounds.merge(W.astype(np.float64), GOOD), DType, "W: float64"),
    # libraries
    "no routing": (lambda: core.delta(GOOD._replace(R_old=None)), Space, "R_old None, R_delta given"),
    "a bound of no routing": (lambda: core.bounds.routing(GOOD._replace(R_delta=None)), Space, "R_delta None"),
    "no routing in a head": (lambda: core.routing(HEAD._replace(R_delta=None)), Space, "R_old given, R_delta None"),
    "NumPy with torch": (lambda: core.apply(torch.ones(5, 3), GOOD), Space, "torch.Tensor"),
    "torch with JAX": (
        lambda: core.delta(core.Adapter(*(torch.tensor(a) for a in GOOD[:3]), jnp.asarray(GOOD.B))),
        Space,
        "single Array API library",
    ),
    "strict with NumPy": (lambda: core.linear(strict.asarray(X), W, GOOD), Space, "one library first"),
    "a list": (lambda: core.apply([[1.0, 2.0, 3.0]], GOOD), Space, "list"),
    "a number for a matrix": (lambda: core.linear(X, 1.0, GOOD), Space, "float"),
    "a list with xp": (lambda: core.second_moment([[1.0, 2.0]], xp=np), Space, "list"),
    "xp=torch": (lambda: core.delta(core.Adapter(*map(torch.tensor, GOOD)), xp=torch), Space, "array_api_compat.torch"),
    # options
    "scheme": (lambda: core.init_adapter(RNG, 4, 3, 2, scheme="zeros"), Option, "'zeros'.*'orthonormal'"),
    "svd without W": (lambda: core.init_adapter(RNG, 4, 3, 2, scheme="svd"), Option, "W=None"),
    "form": (lambda: core.orthogonality(GOOD, form="column"), Option, "'column'.*'basis'"),
    "form of the gradient": (lambda: core.orthogonality_vjp(GOOD, form="column"), Option, "'column'"),
    "form of the bound": (lambda: core.bounds.orthogonality(GOOD, form="basis"), Option, "'basis'"),
    "since": (lambda: core.drift(GOOD, MOMENTS, since="ever"), Option, "'ever'.*'boundary'"),
    "since of the gradient": (lambda: core.drift_vjp(GOOD, MOMENTS, since="ever"), Option, "'ever'"),
    "order": (lambda: core.plan(4, 4, 3, 1, order="best"), Option, "'best'.*'merged'"),
    "merged in bfloat16": (lambda: core.plan(4, 4, 3, 1, order="merged", dtype="bfloat16"), Option, "loses the delta"),
    "wrt": (lambda: core.linear_vjp(X, W, GOOD, G, wrt=("R",)), Option, "'R'.*'R_delta'"),
    "wrt of a frozen routing": (lambda: core.linear_vjp(X, W, GOOD, G, wrt=("R_old",)), Option, "'R_old'"),
    "wrt of the delta": (lambda: core.delta_vjp(GOOD, W, wrt=("x",)), Option, "'x'"),
    "wrt of the plan": (lambda: core.plan(4, 4, 3, 1, wrt=("R",)), Option, "'R'"),
    "B without x": (lambda: core.linear_vjp(None, W, GOOD, G, u=full(5, 2)), Option, "x None"),
    "R without x and u": (lambda: core.linear_vjp(None, W, GOOD, G, wrt=("R_delta",)), Option, "u None"),
    "a bound without x": (lambda: core.bounds.linear_vjp(None, W, GOOD, G), Option, "x"),
    "W without W": (lambda: core.linear_vjp(X, None, GOOD, G, wrt=("W",)), Option, "W None"),
    "method": (lambda: core.bounds.delta(GOOD, method="best"), Option, "'best'.*'worst'"),
    "energy 1.5": (lambda: core.protected_basis(np.eye(2, dtype=F32), energy=1.5), Option, "energy.*1.5"),
    "energy of the penalty": (lambda: core.orthogonality(GOOD, energy=-1.0), Option, "energy"),
    "energy nan": (lambda: core.protected_basis(np.eye(2, dtype=F32), energy=float("nan")), Option, "energy"),
    # values
    "NaN in an adapter": (lambda: core.validate(NAN, name="layer.7"), Value, r"validate\(layer.7\): R_old"),
    "infinity in a factor": (lambda: core.validate(GOOD._replace(B=np.full((2, 3), np.inf, F32))), Value, "B holds"),
    "NaN in a moment": (
        lambda: core.validate(GOOD, moments=MOMENTS._replace(S=np.full((2, 2), np.nan, F32))),
        Value,
        "S holds",
    ),
    "S indefinite": (
        lambda: core.validate(GOOD, moments=MOMENTS._replace(S=np.diag([PROBE, -PROBE]).astype(F32))),
        Value,
        "semidefinite",
    ),
    "S asymmetric": (
        lambda: core.validate(GOOD, moments=MOMENTS._replace(S=np.asarray([[1, PROBE], [0, 1]], dtype=F32))),
        Value,
        "symmetric",
    ),
    "q negative": (
        lambda: core.validate(GOOD, moments=MOMENTS._replace(q=np.asarray(-PROBE, dtype=F32))),
        Value,
        "q is negative",
    ),
    "moments of another adapter": (
        lambda: core.validate(GOOD, moments=MOMENTS._replace(S=np.eye(3, dtype=F32))),
        Shape,
        r"S \(3, 3\)",
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_message(case: str) -> None:
    """The type, the words, the five parts; and no value of any array."""
    call, kind, words = TABLE[case]
    with pytest.raises(kind, match=words) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is kind
    assert isinstance(caught.value, errors.CloraError)
    assert text.startswith("clora_core.")
    for part in ("Got ", "; needed ", "Usual cause: ", "Fix: "):
        assert part in text
    assert str(PROBE) not in text


def test_errors_are_also_the_builtin_ones() -> None:
    """So that code that knows nothing of clora catches them."""
    assert issubclass(errors.ShapeError, ValueError)
    assert issubclass(errors.RankError, errors.ShapeError)
    assert issubclass(errors.DTypeError, TypeError)
    assert issubclass(errors.NamespaceError, TypeError)
    assert issubclass(errors.DeviceError, ValueError)
    assert issubclass(errors.OptionError, ValueError)
    assert issubclass(errors.InvalidValueError, ValueError)
    assert issubclass(errors.MomentsIncomplete, errors.StateError)
    assert issubclass(errors.StateError, RuntimeError)
    assert issubclass(errors.MissingDependencyError, ImportError)
