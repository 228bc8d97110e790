"""Whole lives in several frameworks at once, and a machine that takes random verbs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from ._agreement import LEDGER, Ledger
from ._calls import NearTie
from ._drivers import Driver
from ._fleet import Fleet, same
from ._life import Life, lives

STEPS = 5  # of gradient descent a task


STARTS: tuple[dict[str, Any], ...] = (
    {},
    {"max_rank": 4},
    {"scale": 0.5, "max_rank": 3, "stop_old": False},
    {"scheme": "lora"},
    {"factors": "never"},
    {"factors": "every-task", "max_rank": 3},
    {"factors": "every-task", "scheme": "lora", "stop_old": False, "train_routing": False},
)


def attach(life: Life, drivers: Sequence[Driver], *, ledger: Ledger = LEDGER) -> None:
    """``attach`` with the same seed and options gives every framework the same bits.

    Raises
    ------
    AssertionError
    """
    with ExitStack() as stack:
        for driver in drivers:
            stack.enter_context(driver.scope())
        for options in STARTS:
            for driver in drivers:
                driver.attach(life.base(), rank=life.rank, seed=life.seed, **options)
            want = drivers[0].state()
            for driver in drivers[1:]:
                got = driver.state()
                same(f"attach with {options} in {driver.name}", got, want)
                ledger.note("verb: attach", driver.name, "exact")


def live(life: Life, drivers: Sequence[Driver], *, tasks: int = 2, ledger: Ledger = LEDGER) -> None:
    """One whole life, not synchronised: what a user does, in every framework, each compared with the master throughout.

    Raises
    ------
    AssertionError
        Which verb, in which driver, off by how many times its bound.
    """
    fleet = Fleet(life, drivers, resync=False, ledger=ledger)
    try:
        _live(fleet, tasks)
    except NearTie as tie:
        ledger.skip("life", str(tie))
    finally:
        fleet.close()


def _live(fleet: Fleet, tasks: int) -> None:
    for _ in range(tasks):
        fleet.begin_task()
        for _ in range(STEPS):
            fleet.step()
        fleet.observe()
        fleet.end_task()
        fleet.forward()
    if fleet.life.spare:
        fleet.expand()
    if fleet.remembers and fleet.life.dtype == "float64":  # in float32 the bound is above the meter by then
        fleet.drift()
    fleet.merged()
    fleet.exchange()
    fleet.begin_task()
    fleet.step()
    fleet.end_task()
    fleet.restore("task-0")
    fleet.forward()


def machine(
    drivers: Sequence[Driver], *, ledger: Ledger = LEDGER, protects: bool = True
) -> type[RuleBasedStateMachine]:
    """A state machine of Hypothesis: random verbs in any order that is allowed, every driver compared after each.

    After each verb all are loaded with the master's state, so every verb is judged by itself. Use
    ``machine(drivers()).TestCase`` as a test.
    """

    class Verbs(RuleBasedStateMachine):
        fleet: Any = None

        @initialize(life=lives(protects=protects))
        def start(self, life: Life) -> None:
            self.fleet = Fleet(life, drivers, resync=True, ledger=ledger)

        def teardown(self) -> None:
            if self.fleet is not None:
                self.fleet.close()

        def _is_open(self) -> bool:
            return self.fleet is not None and self.fleet.known.open is not None

        def _between(self) -> bool:
            return self.fleet is not None and self.fleet.known.open is None

        def _finished(self) -> bool:
            return self._between() and bool(self.fleet.known.tasks)

        def _present(self) -> bool:
            """Finished tasks, at the last one."""
            if not self._finished():
                return False
            last = self.fleet.known.snapshots[self.fleet.known.tasks[-1]]
            layers = self.fleet.known.layers
            return all(
                last[n].R.shape == layer.adapter.R_old.shape and np.array_equal(last[n].R, layer.adapter.R_old)
                for n, layer in layers.items()
            )

        @precondition(_between)
        @rule()
        def begin_task(self) -> None:
            try:
                self.fleet.begin_task()
            except NearTie as tie:
                ledger.skip("begin_task", str(tie))

        @precondition(_is_open)
        @rule()
        def step(self) -> None:
            try:
                self.fleet.step()
            except NearTie as tie:
                ledger.skip("step", str(tie))

        @precondition(_is_open)
        @rule()
        def observe(self) -> None:
            self.fleet.observe()

        @precondition(_is_open)
        @rule()
        def end_task(self) -> None:
            self.fleet.end_task()

        @precondition(_between)
        @rule(steps=st.integers(1, 3))
        def whole_task(self, steps: int) -> None:
            """Random verbs alone seldom finish a task that taught anything."""
            try:
                self.fleet.begin_task()
                for _ in range(steps):
                    self.fleet.step()
            except NearTie as tie:
                ledger.skip("whole task", str(tie))
                if self.fleet.known.open is None:
                    return
            self.fleet.observe()
            self.fleet.end_task()

        @precondition(_present)
        @rule(seed=st.integers(0, 3))
        def expand(self, seed: int) -> None:
            self.fleet.expand(seed)

        @precondition(lambda self: self.fleet is not None)
        @rule()
        def forward(self) -> None:
            self.fleet.forward()

        @precondition(_between)
        @rule()
        def merge(self) -> None:
            self.fleet.merged()

        @precondition(lambda self: self._between() and self.fleet.remembers)
        @rule()
        def drift(self) -> None:
            self.fleet.drift()

        @precondition(_finished)
        @rule(data=st.data())
        def restore(self, data: Any) -> None:
            self.fleet.restore(data.draw(st.sampled_from(self.fleet.known.tasks)))

        @precondition(lambda self: self._present() and self.fleet.life.factors != "every-task")
        @rule(data=st.data())
        def rows(self, data: Any) -> None:
            self.fleet.rows(data.draw(st.lists(st.sampled_from(self.fleet.known.tasks), min_size=1, max_size=4)))

        @precondition(_present)
        @rule()
        def save_and_load(self) -> None:
            self.fleet.exchange()

        @precondition(_present)
        @rule()
        def export(self) -> None:
            self.fleet.export_peft()

    return Verbs
