"""routing, delta, apply and linear are their formulas: equal on dyadic numbers, within `bounds` on real ones."""

import kit
import oracle
import pytest
from hypothesis import given

from clora.testing import Case, cases

CALLS = {
    "routing": lambda case: (case.adapter(),),
    "delta": lambda case: (case.adapter(),),
    "apply": lambda case: (case.x, case.adapter()),
    "linear": lambda case: (case.x, case.W, case.adapter()),
    "linear with bias": lambda case: (case.x, case.W, case.adapter(), case.bias),
}


@pytest.mark.parametrize("call", CALLS)
@given(case=cases())
def test_value(call: str, case: Case) -> None:
    """The value of the formula, in every lane."""
    name, args = call.split()[0], CALLS[call](case)
    expected = getattr(oracle, name)(*args)
    for lane in kit.fit(case):
        ran = kit.run(name, lane, *args)
        if case.dyadic:
            kit.exact(ran, expected)
        else:
            kit.bounded(ran, expected, kit.run(f"bounds.{name}", lane, *args).value)
