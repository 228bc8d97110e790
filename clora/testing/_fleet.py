"""Drivers side by side: every verb is taken in all of them, and all are compared with the first."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import clora_store as store

from . import _majorant as majorant
from ._agreement import LEDGER, Ledger, compare
from ._drivers import Driver
from ._life import Life


class Fleet:
    """Drivers side by side, the first being the master; after every verb all are compared with it.

    Parameters
    ----------
    life : Life
    drivers : sequence of Driver
    resync : bool
        Load the master's state into all after every verb, so that each is judged by itself. Otherwise differences grow
        as they may, and the bound with them.
    ledger : Ledger
    """

    def __init__(self, life: Life, drivers: Sequence[Driver], *, resync: bool, ledger: Ledger = LEDGER) -> None:
        self.life, self.drivers, self.resync, self.ledger = life, list(drivers), resync, ledger
        self.base, self.master = life.base(), drivers[0]
        self.task, self.taken = -1, 0
        self.leak: dict[str, np.ndarray] = {}  # what the last step may have left in protected directions
        with ExitStack() as stack:  # left at once where a driver does not load
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="no direction is left")
            for driver in self.drivers:
                stack.enter_context(driver.scope())
            self.load(life.start())
            self.stack = stack.pop_all()

    def close(self) -> None:
        """Leave the drivers' scopes."""
        self.stack.close()

    # --- the state and how far it may be off ---------------------------------------------------------------------

    def load(self, state: Any) -> None:
        """The same state into every driver."""
        self.loaded = self.energy
        for driver in self.drivers:
            self.load_one(driver, state)
        self.known = self.master.state()
        self.errors = majorant.zeros(majorant.absolute(self.known))

    def load_one(self, driver: Driver, state: Any) -> None:
        """One driver alone."""
        driver.load(self.base, state, lr=self.life.lr, energy=self.loaded)

    @property
    def energy(self) -> float | None:
        """Protection as it can be had: after factors moved for good and every task was observed."""
        known = getattr(self, "known", None)
        if known is not None and (known.unobserved or not all(layer.complete for layer in known.layers.values())):
            return None
        return self.life.energy

    @property
    def remembers(self) -> bool:
        """The meter can be read."""
        whole = all(layer.complete for layer in self.known.layers.values())
        return self.life.factors != "every-task" and not self.known.unobserved and whole

    def after(self, verb: str, bound: Any = None, *, projects: bool = False) -> None:
        """Compare all states with the master's: equal where there is no bound of the verb, and no error before it.

        ``projects``: some frameworks project once more, which takes out what the last step left.
        """
        before, self.known = self.known, self.master.state()
        changed = {}
        if bound is not None:
            fields, errors = self._sizes(before)
            if projects:
                errors = majorant.plus(errors, {name: {"R_delta": leak} for name, leak in self.leak.items()})
            changed = majorant.errors(bound, fields, errors, self.life.dtype)
        if verb == "step":
            protected = self.loaded is not None and bool(before.tasks)
            self.leak = {name: own["R_delta"] for name, own in changed.items()} if protected else {}
        self.errors = self._reshaped()
        for name, own in changed.items():
            self.errors[name] |= own
        for driver in self.drivers[1:]:
            self._compare(verb, driver.name, driver.state(), changed)
        if self.resync and self.loaded != self.energy:  # a task was not observed: nothing can be protected any more
            self.load(self.known)
        elif self.resync:
            for driver in self.drivers[1:]:
                self.load_one(driver, self.known)
            self.errors = majorant.zeros(majorant.absolute(self.known))

    def _sizes(self, state: store.State) -> tuple[Any, Any]:
        return majorant.protected(state, self.errors, self.loaded if state.open is not None else None)

    def _reshaped(self) -> Any:
        """Errors of before, for a state whose arrays only moved: those of the largest entry, where shapes changed."""
        fields, out = majorant.absolute(self.known), {}
        for name, own in fields.items():
            old = self.errors.get(name, {})
            worst = max((float(e.max(initial=0.0)) for field, e in old.items() if field != "Q"), default=0.0)
            out[name] = {
                field: old[field] if field in old and old[field].shape == a.shape else np.full(a.shape, worst)
                for field, a in own.items()
            }
        return out

    def _compare(self, verb: str, name: str, got: store.State, changed: Any) -> None:
        want = self.known
        for field in ("factors", "tasks", "unobserved", "open"):
            mine, theirs = getattr(got, field), getattr(want, field)
            assert mine == theirs, f"{verb} in {name}: {field} {mine}, not {theirs}"
        assert set(got.layers) == set(want.layers), f"{verb} in {name}: layers {sorted(got.layers)}"
        for layer, there in want.layers.items():
            here = got.layers[layer]
            assert here.complete == there.complete, f"{verb} in {name}: {layer} complete {here.complete}"
            mine, theirs = here.tensors(), there.tensors()
            assert set(mine) == set(theirs), f"{verb} in {name}: {layer} has {sorted(mine)}, not {sorted(theirs)}"
            for field, array in theirs.items():
                assert mine[field].dtype == array.dtype, f"{verb} in {name}: {layer}.{field} is {mine[field].dtype}"
                allowed = 2 * self.errors[layer].get(field, np.zeros(array.shape))
                allowed = allowed if allowed.any() else None
                ledger = self.ledger if not changed or field in changed[layer] else None
                compare(self._subject(verb, field), name, mine[field], array, allowed, ledger=ledger)
        assert list(got.snapshots) == list(want.snapshots), f"{verb} in {name}: snapshots {list(got.snapshots)}"
        if self.resync:
            for task, snapshots in want.snapshots.items():
                for layer, snapshot in snapshots.items():
                    theirs = snapshot.tensors()
                    mine = got.snapshots[task][layer].tensors()
                    assert set(mine) == set(theirs), f"{verb} in {name}: snapshot of {layer} in {task}"
                    fresh = verb == "end_task" and task == want.tasks[-1]  # taken just now, of what was just folded
                    for field, array in theirs.items():
                        error = self.errors[layer]["R_old"] if fresh and field == "R" else np.zeros(array.shape)
                        where = f"{verb}, snapshot of {layer} in {task}"
                        compare(where, name, mine[field], array, 2 * error if error.any() else None, ledger=None)

    def _subject(self, verb: str, field: str = "") -> str:
        """What the ledger calls it: verbs judged by themselves, or at their place in a life."""
        return ("verb: " if self.resync else "life: ") + verb + (f", {field}" if field else "")

    def measure(self, verb: str, ask: Any, bound: Any) -> None:
        """Compare what all drivers answer, ``ask(driver) -> array``, with the master's answer."""
        want = ask(self.master)
        allowed = majorant.errors(bound, *self._sizes(self.known), self.life.dtype)
        limit = next(iter(allowed.values())) if "y" in allowed else {k: v["drift"] for k, v in allowed.items()}
        verb = self._subject(verb)
        for driver in self.drivers[1:]:
            got = ask(driver)
            if isinstance(want, dict):
                names = sorted(want)
                compare(verb, driver.name, [got[n] for n in names], [want[n] for n in names],
                        [2 * limit[n] for n in names], ledger=self.ledger)  # fmt: skip
            else:
                compare(verb, driver.name, got, want, 2 * limit["y"], ledger=self.ledger)

    # --- verbs ---------------------------------------------------------------------------------------------------

    def begin_task(self) -> None:
        """The next task."""
        majorant.protected(self.known, self.errors, self.energy)  # a near-tie is told before anything happens
        self.task, self.taken, self.leak = self.task + 1, 0, {}
        for driver in self.drivers:
            driver.begin_task(f"task-{self.task}")
        self.after("begin_task")

    def step(self) -> None:
        """One step of gradient descent."""
        life, known = self.life, self.known
        x, target = life.data(self.task, self.taken)
        weight = life.weight if self.remembers else None
        self.taken += 1
        for driver in self.drivers:
            driver.step(x, target, weight)
        factors = life.factors == "every-task" or (life.factors == "first-task" and not known.tasks)
        how = {"lr": life.lr, "weight": weight if known.tasks else None, "factors": factors, "stop_old": life.stop_old}
        self.after("step", lambda fields: majorant.step(self.base, fields, x, target, **how))

    def observe(self) -> None:
        """Two batches; nothing where the factors learn in every task, when there is nothing to take."""
        if self.life.factors == "every-task":
            return
        batches = [self.life.data(self.task, 100 + i)[0] for i in range(2)]
        for driver in self.drivers:
            driver.observe(batches)
        self.after("observe", lambda fields: majorant.observe(self.base, fields, batches), projects=True)

    def end_task(self) -> None:
        """Fold and remember."""
        observed = all(layer.observed is not None for layer in self.known.layers.values())
        for driver in self.drivers:
            driver.end_task()
        self.after("end_task", lambda fields: majorant.end_task(fields, observed), projects=True)

    def expand(self, seed: int = 0) -> bool:
        """Raise the rank by one, where every layer has room. Whether it had."""
        room = min(min(layer.target.shape) - layer.adapter.A.shape[1] for layer in list(self.known.layers.values())[:2])
        if room < 1:
            return False
        for driver in self.drivers:
            driver.expand(1, seed)
        self.after("expand")
        return True

    def forward(self, x: np.ndarray | None = None) -> None:
        """Outputs."""
        x = self.life.data(9, 0)[0] if x is None else x
        self.measure("forward", lambda driver: driver.forward(x), lambda f: majorant.forward(self.base, f, x))

    def merged(self) -> None:
        """Outputs while merged; afterwards the outputs of before, to the bit."""
        x = self.life.data(9, 0)[0]
        before = [driver.forward(x) for driver in self.drivers]
        self.measure("merge", lambda driver: driver.merged(x), lambda f: majorant.forward(self.base, f, x))
        for driver, y in zip(self.drivers, before, strict=True):
            assert np.array_equal(driver.forward(x), y), f"unmerge in {driver.name} does not give back the outputs"
            self.ledger.note(self._subject("unmerge"), driver.name, "exact")

    def drift(self) -> None:
        """The meter."""
        self.measure("drift", lambda driver: driver.drift(), majorant.drift)

    def restore(self, name: str) -> None:
        """Back to a finished task."""
        for driver in self.drivers:
            driver.restore(name)
        self.after("restore")

    def rows(self, tasks: Sequence[str]) -> None:
        """A batch that mixes tasks, in the drivers that can, against going back to each task in the master."""
        x = self.life.data(9, 1)[0][: len(tasks)]
        able = [driver for driver in self.drivers if hasattr(driver, "rows")]
        if not able:
            return
        want, limits = np.zeros((len(tasks), self.life.widths[-1])), np.zeros((len(tasks), self.life.widths[-1]))
        for task in dict.fromkeys(tasks):
            own = [i for i, name in enumerate(tasks) if name == task]
            self.master.restore(task)
            want[own] = self.master.forward(x)[own]
            fields = majorant.absolute(self.master.state())
            bound = partial(majorant.forward, self.base, x=x)
            limits[own] = majorant.errors(bound, fields, majorant.zeros(fields), self.life.dtype)["y"]["y"][own]
        self.master.restore(self.known.tasks[-1])
        for driver in able:
            got = driver.rows(x, list(tasks))  # type: ignore[attr-defined]
            compare(self._subject("rows"), driver.name, got, want, 2 * limits, ledger=self.ledger)

    def exchange(self) -> None:
        """Every driver saves; every folder is the state; every driver goes on from the folder of the next one."""
        with tempfile.TemporaryDirectory() as place:
            folders = [str(Path(place) / str(i)) for i in range(len(self.drivers))]
            states = [driver.state() for driver in self.drivers]
            for driver, folder in zip(self.drivers, folders, strict=True):
                driver.save(folder)
            for i, driver in enumerate(self.drivers):
                j = (i + 1) % len(self.drivers)
                self.load_one(driver, folders[j])
                same(f"save in {self.drivers[j].name}, load in {driver.name}", driver.state(), states[j])
                self.ledger.note(self._subject("save and load"), driver.name, "exact")
        if self.resync:
            self.load(self.known)
        else:
            self.known = self.master.state()

    def export_peft(self) -> None:
        """The same folder of PEFT's from every driver's state."""
        with tempfile.TemporaryDirectory() as place:
            found = []
            for i, driver in enumerate(self.drivers):
                driver.export_peft(str(Path(place) / str(i)))
                found.append(load_file(Path(place) / str(i) / "adapter_model.safetensors"))
            for driver, tensors in zip(self.drivers[1:], found[1:], strict=True):
                assert set(tensors) == set(found[0]), f"export_peft in {driver.name}: {sorted(tensors)}"
                for name, tensor in found[0].items():
                    assert np.array_equal(tensors[name], tensor), f"export_peft in {driver.name}: {name}"
                self.ledger.note(self._subject("export_peft"), driver.name, "exact")


def same(where: str, got: store.State, want: store.State) -> None:
    mine, theirs = dict(got.arrays()), dict(want.arrays())
    assert set(mine) == set(theirs), f"{where}: arrays {sorted(set(mine) ^ set(theirs))} on one side only"
    for name, array in theirs.items():
        assert mine[name].dtype == array.dtype, f"{where}: {name} is {mine[name].dtype}, not {array.dtype}"
        assert np.array_equal(mine[name], array), f"{where}: {name} is not equal"
    for field in ("factors", "tasks", "unobserved", "open"):
        assert getattr(got, field) == getattr(want, field), f"{where}: {field}"
    for option in ("stop_old", "train_routing", "scale"):
        assert got.options[option] == want.options[option], f"{where}: {option}"
