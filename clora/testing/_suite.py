"""The suite as pytest classes: subclass one, name your backend or driver, and every test is yours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import hypothesis
import numpy as np
import pytest

import clora_core as core

from ._agreement import LEDGER, Ledger, agree
from ._backends import Backend
from ._calls import BUILDERS, strategy
from ._drivers import Driver, drivers
from ._life import lives
from ._lives import attach, live, machine

EXAMPLES = 200
STEPS = 12  # verbs in one run of the machine
QUIET: dict[str, Any] = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}


def settings(examples: int | None = None, **more: Any) -> hypothesis.settings:
    """As many examples as asked for, the same ones every time.

    A loaded Hypothesis profile of over 1000 asks for that many, always new ones; one of under 40 for no more.
    """
    chosen = hypothesis.settings().max_examples
    count = EXAMPLES if examples is None else examples
    if chosen > 1000:
        return hypothesis.settings(max_examples=max(count, chosen), **QUIET, **more)
    count = min(count, chosen) if chosen < 40 else count
    return hypothesis.settings(max_examples=count, derandomize=True, database=None, **QUIET, **more)


def check_function(
    name: str, backends: Sequence[Backend], *, examples: int | None = None, ledger: Ledger = LEDGER
) -> None:
    """One function of the core, on drawn cases, in all backends: each must agree with NumPy.

    Parameters
    ----------
    name : str
        Dotted name below ``clora_core``.
    backends : sequence of Backend
    examples : int, optional
        How many cases, 200 by default; a Hypothesis profile of more than 1000 counts instead.
    ledger : Ledger
        Takes the worst ratios of error to bound.

    Raises
    ------
    AssertionError
        With the smallest case that fails.
    """

    @settings(examples)
    @hypothesis.given(case=strategy(name))
    def property_of(case: Any) -> None:
        agree(name, case, backends, ledger=ledger)

    property_of()


def check_lives(fleet: Sequence[Driver], *, examples: int = 20, ledger: Ledger = LEDGER, protects: bool = True) -> None:
    """`attach`, and whole lives in all drivers, compared with the first throughout; see `lives` for ``protects``.

    Raises
    ------
    AssertionError
    """

    @settings(examples)
    @hypothesis.given(life=lives(protects=protects))
    def property_of(life: Any) -> None:
        attach(life, fleet, ledger=ledger)
        live(life, fleet, ledger=ledger)

    property_of()


def check_verbs(
    fleet: Sequence[Driver], *, examples: int | None = None, ledger: Ledger = LEDGER, protects: bool = True
) -> None:
    """Random verbs in all drivers, each judged by itself against the first driver; see `lives` for ``protects``.

    Raises
    ------
    AssertionError
        With the shortest sequence of verbs that fails.
    """
    case = machine(fleet, ledger=ledger, protects=protects).TestCase
    case.settings = settings(examples, stateful_step_count=STEPS)
    case("runTest").runTest()


class FunctionSuite:
    """Every public function of the core on one backend; skipped where it lacks linalg or the function can't compile.

    Attributes
    ----------
    backend : Backend
    unsupported : dict of function to reason
        What the backend cannot do: expected to fail, and a failure of the suite once it passes.
    examples : int
    """

    backend: ClassVar[Any]
    unsupported: ClassVar[dict[str, str]] = {}
    examples: ClassVar[int] = EXAMPLES

    @pytest.mark.parametrize("name", sorted(BUILDERS))
    def test_function(self, name: str) -> None:
        """Agrees with NumPy within its bound."""
        strange = set(self.unsupported) - set(BUILDERS)
        assert not strange, f"`unsupported` names no function: {sorted(strange)}"
        backend, own = self.backend, Ledger()
        with backend.scope():
            back = backend.get(backend.put(np.ones((2, 3), backend.dtypes[0])))
        assert np.array_equal(back, np.ones((2, 3))), f"put and get of {backend.name} do not give back an array"
        try:
            check_function(name, [backend], examples=self.examples, ledger=own)
        except Exception:
            if name not in self.unsupported:
                raise
            pytest.xfail(self.unsupported[name])
        LEDGER.merge(own)
        if not own.rows:
            pytest.skip(f"{backend.name} lacks what {name} needs: {core.capabilities()[name]}")
        if name in self.unsupported:
            pytest.fail(f"{name} passes on {backend.name}: take it off `unsupported`")


class LifeSuite:
    """The task life in one driver, beside clora_numpy on NumPy.

    Attributes
    ----------
    driver : Driver
        For an array library, ``ArrayDriver(backend)``.
    examples : int
        Runs of the machine; a tenth as many whole lives.
    protects : bool, optional
        False where the library has no symmetric eigenvalues, which `protect` needs; by default as the driver's backend
        says of ``linalg``.
    """

    driver: ClassVar[Any]
    protects: ClassVar[bool | None] = None
    examples: ClassVar[int] = EXAMPLES

    def test_lives(self) -> None:
        """Whole lives."""
        fleet = [*drivers("numpy"), self.driver]
        check_lives(fleet, examples=max(self.examples // 10, 1), protects=self._protects())

    def test_verbs(self) -> None:
        """Random verbs."""
        check_verbs([*drivers("numpy"), self.driver], examples=self.examples, protects=self._protects())

    def _protects(self) -> bool:
        return (
            getattr(getattr(self.driver, "backend", None), "linalg", True) if self.protects is None else self.protects
        )
