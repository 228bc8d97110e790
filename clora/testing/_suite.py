"""The suite as pytest classes: subclass one, name your backend or driver, and every test is yours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import hypothesis
import pytest

from ._agreement import LEDGER, Ledger, agree
from ._backends import Backend
from ._calls import BUILDERS, strategy
from ._drivers import Driver, drivers
from ._lives import attach, live, lives, machine

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


def check_lives(fleet: Sequence[Driver], *, examples: int = 20, ledger: Ledger = LEDGER) -> None:
    """`attach`, and whole lives in all drivers, compared with the first throughout.

    Raises
    ------
    AssertionError
    """

    @settings(examples)
    @hypothesis.given(life=lives(memory=False))
    def property_of(life: Any) -> None:
        attach(life, fleet, ledger=ledger)
        live(life, fleet, ledger=ledger)

    property_of()


def check_verbs(fleet: Sequence[Driver], *, examples: int | None = None, ledger: Ledger = LEDGER) -> None:
    """Random verbs in all drivers, each judged by itself against the first driver.

    Raises
    ------
    AssertionError
        With the shortest sequence of verbs that fails.
    """
    case = machine(fleet, ledger=ledger).TestCase
    case.settings = settings(examples, stateful_step_count=STEPS)
    case("runTest").runTest()


class FunctionSuite:
    """Every public function of the core on one backend.

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
        if name not in self.unsupported:
            check_function(name, [self.backend], examples=self.examples)
            return
        try:
            check_function(name, [self.backend], examples=self.examples, ledger=Ledger())
        except Exception:
            pytest.xfail(self.unsupported[name])
        pytest.fail(f"{name} passes on {self.backend.name}: take it off `unsupported`")


class LifeSuite:
    """The task life in one driver, beside clora_numpy on NumPy.

    Attributes
    ----------
    driver : Driver
        For an array library, ``ArrayDriver(backend)``.
    examples : int
        Runs of the machine; a tenth as many whole lives.
    """

    driver: ClassVar[Any]
    examples: ClassVar[int] = EXAMPLES

    def test_lives(self) -> None:
        """Whole lives."""
        check_lives([*drivers("numpy"), self.driver], examples=max(self.examples // 10, 1))

    def test_verbs(self) -> None:
        """Random verbs."""
        check_verbs([*drivers("numpy"), self.driver], examples=self.examples)
