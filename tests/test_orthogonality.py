"""Equation 26 in its three readings, its normalised form, and their gradients."""

from fractions import Fraction
from typing import Any

import kit
import numpy as np
import oracle
import pytest
from hypothesis import assume, event, example, given
from hypothesis import strategies as st

import clora_core as core
from clora.testing import Case, cases

SMALL = {"top": 1, "unit": 1}
FORMS = ("routing", "output")


def parts(adapter: core.Adapter, form: str, R_delta: Any) -> tuple[Any, Any]:
    """The penalty, and the divisor of its normalised form."""
    old = oracle.exact(adapter.R_old)
    if form == "output":
        past, new = oracle.mul(adapter.A, old), oracle.mul(adapter.A, R_delta)
    else:
        past, new = old, oracle.exact(R_delta)
    penalty, size = oracle.square(oracle.mul(oracle.t(past), new)), oracle.square(past) * oracle.square(new)
    return oracle.exact(penalty), oracle.exact(size)


def quotient(a: Any, b: Any) -> Any:
    """a / b, and 0 where b is 0."""
    return np.where(b == 0, Fraction(0), a / np.where(b == 0, Fraction(1), b))


@pytest.mark.parametrize("form", FORMS)
@given(case=cases())
def test_value(form: str, case: Case) -> None:
    """||R_old^T R_delta||^2 and ||(A R_old)^T A R_delta||^2; divided by the sizes of both where asked."""
    adapter = case.adapter(**SMALL)
    penalty, size = parts(adapter, form, adapter.R_delta)
    for lane in kit.fit(case):
        ran = kit.run("orthogonality", lane, adapter, form=form)
        kit.bounded(ran, penalty, kit.run("bounds.orthogonality", lane, adapter, form=form).value)
        if case.dyadic:
            kit.exact(ran, penalty)
            share = quotient(penalty, size)
            ran = kit.run("orthogonality", lane, adapter, form=form, normalize=True)
            kit.bounded(ran, share, share * kit.gamma(2, case.dtype))  # the only rounding is the division


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("form", FORMS)
@given(case=cases(dyadic=True, widest=4))
def test_gradient(form: str, normalize: bool, case: Case) -> None:
    """Against central differences of numerator and divisor, both quadratic, and the quotient rule."""
    adapter = case.adapter(**SMALL)
    f, size = parts(adapter, form, adapter.R_delta)
    grad = case.draw("grad", *f.shape, **SMALL)
    g = oracle.exact(grad)

    def slope(weight: Any, which: int) -> Any:
        return oracle.differences(lambda R: np.sum(weight * parts(adapter, form, R)[which]), adapter.R_delta)

    assume(adapter.R_delta.size <= 18)
    if normalize:
        up, down = quotient(g, size), quotient(g * f, size * size)
        expected = slope(up, 0) - slope(down, 1)
        # The two terms are exact but for the share f / h: 8 roundings on their sizes, summed over leading axes.
        scale = sum(oracle.norm(a) for a in (slope(np.abs(up), 0), slope(np.abs(down), 1)))
        batch = int(np.prod(f.shape, dtype=int))
        scale += sum(
            np.sum(np.abs(w) * parts(adapter, form, np.abs(adapter.R_delta))[i]) for i, w in ((0, up), (1, down))
        )
        bound = np.full(expected.shape, scale * kit.gamma(8 + batch, case.dtype))
    else:
        expected = slope(g, 0)
    for lane in kit.fit(case):
        ran = kit.run("orthogonality_vjp", lane, adapter, grad, form=form, normalize=normalize)
        if normalize:
            kit.bounded(ran, expected, bound)
        else:
            kit.exact(ran, expected)


@given(case=cases(), energy=st.sampled_from((0.0, 0.5, 0.9, 1.0)))
def test_basis_form(case: Case, energy: float) -> None:
    """||Q^T R_delta||^2, Q the fewest leading left singular vectors with the energy of R_old; by projectors and gap."""
    adapter = case.adapter()
    assume(case.leads.R_old == ())
    r, e = case.sizes.r, kit.spectral(case.sizes.r, case.sizes.r, case.dtype)
    U, s, _ = np.linalg.svd(adapter.R_old.astype(np.float64))
    share = np.concatenate([[0.0], np.cumsum(s * s)]) / max((s * s).sum(), 1e-300)
    k = int(np.sum((share[:-1] < energy) & (s > 0)))
    noise, gap = e * oracle.norm(adapter.R_old), Fraction(s[k - 1] - (s[k] if k < r else 0.0)) if k else Fraction(1)
    clear = gap > 8 * noise and (energy in (0.0, 1.0) or np.min(np.abs(share - energy)) > 8 * r * float(e))
    clear = clear and not (energy == 1.0 and k < r)
    event("clear gap" if clear else "near-tie")
    assume(clear)
    P = oracle.exact(U[:, :k] @ U[:, :k].T)
    R = oracle.exact(adapter.R_delta)
    penalty = oracle.trace(oracle.mul(oracle.t(R), P, R))
    leak = (3 * noise / gap + 3 * e + kit.gamma(4 * r + r * r + 4, case.dtype)) * r
    grad = case.draw("grad", *np.shape(adapter.R_delta)[:-2], **SMALL)
    for lane in kit.fit(case, linalg=True):
        ran = kit.run("orthogonality", lane, adapter, energy=energy)
        kit.bounded(ran, penalty, leak * oracle.square(R))
        ran = kit.run("orthogonality", lane, adapter, energy=energy, normalize=True)
        kit.bounded(ran, quotient(penalty, oracle.square(R)), np.full(np.shape(penalty), 2 * leak))
        ran = kit.run("orthogonality_vjp", lane, adapter, grad, energy=energy)
        expected = 2 * oracle.exact(grad)[..., None, None] * oracle.mul(P, R)
        kit.bounded(ran, expected, np.full(expected.shape, 2 * leak * oracle.norm(R) * (1 + oracle.norm(grad))))


@example(values=[4, 3], percent=60)  # unsquared, it would take both to hold three fifths
@given(values=st.lists(st.integers(0, 8), min_size=1, max_size=4), percent=st.integers(1, 99))
def test_basis_energy_on_diagonals(values: list[int], percent: int) -> None:
    """With R_delta = I the penalty counts the directions: the fewest whose squared singular values hold the energy."""
    squares = sorted((value * value for value in values), reverse=True)
    assume(all(100 * sum(squares[:k]) != percent * sum(squares) for k in range(1, len(squares))))
    count = sum(100 * sum(squares[:k]) < percent * sum(squares) for k in range(len(squares)))
    eye = np.eye(len(values), dtype=np.float32)
    adapter = core.Adapter(eye, np.diag(np.asarray(values, dtype=np.float32)), eye, eye)
    for lane in kit.lanes("NUMPY", "STRICT_DEVICE1", "TORCH"):
        ran = kit.run("orthogonality", lane, adapter, energy=percent / 100)
        kit.bounded(ran, Fraction(count), 2 * len(values) * kit.spectral(len(values), len(values), "float32"))


@given(case=cases(), normalize=st.booleans())
def test_nothing_old_costs_nothing(case: Case, normalize: bool) -> None:
    """While R_old = 0 every form and its gradient are 0: the first task is free."""
    adapter = case.adapter()
    adapter = adapter._replace(R_old=np.zeros_like(adapter.R_old))
    for lane in kit.fit(case, linalg=True):
        for form in core._orthogonality.FORMS:
            ran = kit.run("orthogonality", lane, adapter, form=form, normalize=normalize)
            kit.exact(ran, np.zeros_like(ran.value))
            ran = kit.run("orthogonality_vjp", lane, adapter, form=form, normalize=normalize)
            kit.exact(ran, np.zeros_like(adapter.R_delta))
