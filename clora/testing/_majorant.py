r"""How far two correct implementations of the task life may be apart, verb by verb.

The network has no nonlinearity and the loss is quadratic, so every verb maps a state to sums of products p of it. Let
:math:`\bar p` be p with every minus turned to plus, s the exact state, and e a bound of how far each implementation is
from it. Then after the verb each is within

.. math:: \bar p(|s| + e) - \bar p(|s|) + \gamma_k\,\bar p(|s| + e)

of the exact result: what the verb makes of the earlier difference, and its own k roundings (the theorem of
`clora_core.bounds`). Both terms are evaluated, in float64, with the verbs written once more on absolute values below.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import clora_core as core
import clora_store as store

from ._calls import decomposition, gamma, leading, turned
from ._drivers import LAYERS, Base

Fields = dict[str, dict[str, np.ndarray]]
MEMORY = {"S", "P", "q", "drift"}  # in float64 whatever the layers are in


class Verb(NamedTuple):
    """What a verb makes of absolute values, of what it changes alone, and the roundings along any product."""

    after: Fields
    roundings: int
    alike: tuple[str, ...] = ()  # fields that every library gives the same bits of, from the same, without protection


def absolute(state: store.State) -> Fields:
    """Absolute values of a state in float64, every layer with the projector Q that protection multiplies by: none."""
    return {
        name: {
            **{field: np.abs(np.asarray(a, np.float64)) for field, a in layer.tensors().items()},
            "Q": np.eye(layer.adapter.R_delta.shape[-1]),
        }
        for name, layer in state.layers.items()
    }


def protected(state: store.State, errors: Fields, energy: float | None) -> tuple[Fields, Fields]:
    """`absolute` values and errors, with Q as protection makes it, and how far two of them may be apart.

    Raises
    ------
    NearTie
        An eigenvalue or share of the energy is so close to the next that the choice of directions may differ.
    """
    fields, errors = absolute(state), {name: dict(own) for name, own in errors.items()}
    for name, layer in state.layers.items():
        r = layer.adapter.R_delta.shape[-1]
        errors[name]["Q"] = np.zeros((r, r))
        if energy is None or not state.tasks or layer.moments is None:
            continue
        S = np.asarray(layer.moments.S[:r, :r], np.float64)
        own = 2 * decomposition(r, r, "float64")
        noise = np.linalg.norm(S) * own + np.linalg.norm(errors[name]["S"][:r, :r])
        values, U = np.linalg.eigh(S)
        values, U = np.clip(values[::-1], 0.0, None), np.abs(U[:, ::-1])
        weights, gap = leading(values, energy, values, noise, noise)
        fields[name]["Q"] = np.eye(r) + (U * weights) @ U.T
        errors[name]["Q"] += turned(noise, gap) + own
    return fields, errors


def zeros(fields: Fields) -> Fields:
    """No error yet."""
    return {name: {field: np.zeros_like(a) for field, a in own.items()} for name, own in fields.items()}


def plus(one: Fields, other: Fields) -> Fields:
    """Field by field; what the other lacks is zero."""
    return {
        name: {field: a + other.get(name, {}).get(field, 0.0) for field, a in own.items()} for name, own in one.items()
    }


def errors(verb: Any, fields: Fields, before: Fields, dtype: str) -> Fields:
    """The bound of the module's docstring for what ``verb(fields) -> Verb`` changes, given the errors before it."""
    size = plus(fields, before)  # the exact state is within the errors of the master's
    near, far = verb(size), verb(plus(size, before))

    def error(name: str, field: str, a: np.ndarray) -> np.ndarray:
        steps = near.roundings
        Q = fields[name]["Q"] if name in fields else np.eye(1)
        protected = bool((np.eye(len(Q)) != Q).any())  # then R may be projected once more, in its own dtype
        moved = name in before and any(before[name][f].any() for f in ("R_old", "R_delta"))
        if field in near.alike and not protected and not moved:
            return np.zeros_like(a)
        here = "float64" if field in MEMORY and not protected else dtype
        own = gamma(steps, here) + 2 * gamma(steps, "float64")  # the latter for this evaluation
        return (far.after[name][field] - a) + own * far.after[name][field]

    return {name: {f: error(name, f, a) for f, a in after.items()} for name, after in near.after.items()}


# --- the verbs on absolute values ------------------------------------------------------------------------------


def _adapter(fields: dict[str, np.ndarray]) -> core.Adapter:
    return core.Adapter(*(fields.get(name) for name in ("A", "R_old", "R_delta", "B")))  # type: ignore[arg-type]


def _forward(base: Base, fields: Fields, x: np.ndarray) -> tuple[list[np.ndarray], int]:
    """Inputs of each layer and the outputs, and the roundings of the outputs."""
    rows, roundings = [np.abs(np.asarray(x, np.float64))], 0
    for name, (W, bias) in zip(LAYERS[:2], base[:2], strict=True):
        own = fields[name]
        W, bias = (np.abs(np.asarray(a, np.float64)) for a in (W, bias))
        rows.append(core.linear(rows[-1], W, _adapter(own), bias))
        roundings += W.shape[1] + 2 * own["A"].shape[1] + 4
    V = fields["head"]["R_old"] + fields["head"]["R_delta"]
    rows.append(rows[-1] @ V[:, :-1].T + V[:, -1])
    return rows, roundings + V.shape[1] + 3


def forward(base: Base, fields: Fields, x: np.ndarray) -> Verb:
    """Outputs, merged or not: two roundings more a layer for the merged weight."""
    rows, roundings = _forward(base, fields, x)
    return Verb({"y": {"y": rows[-1]}}, roundings + 8)


def step(
    base: Base,
    fields: Fields,
    x: np.ndarray,
    target: np.ndarray,
    *,
    lr: float,
    weight: float | None,
    factors: bool,
    stop_old: bool,
) -> Verb:
    """One step of gradient descent; ``factors``: A and B learn, through the whole routing unless ``stop_old``."""
    rows, roundings = _forward(base, fields, x)
    n, classes = target.shape
    g = (rows[-1] + np.abs(np.asarray(target, np.float64))) / n
    out: Fields = {name: {} for name in fields}
    head = fields["head"]
    gradients = {"head": {"R_delta": g.T @ np.concatenate([rows[2], np.ones((n, 1))], axis=1)}}
    g = g @ (head["R_old"] + head["R_delta"])[:, :-1]
    count = 2 * roundings + classes + n + 8
    wrt = ("A", "R_delta", "B") if factors else ("R_delta",)
    for i, name in reversed(list(enumerate(LAYERS[:2]))):
        W = np.abs(np.asarray(base[i][0], np.float64))
        got = core.linear_vjp(rows[i], W, _adapter(fields[name]), g, wrt=("x", *wrt), stop_old=stop_old)
        gradients[name] = {field: getattr(got, field) for field in wrt}
        g = got.x
        d_out, d_in = W.shape
        count += d_out + d_in + 2 * fields[name]["A"].shape[1] + 8
    for name, own in gradients.items():
        if weight is not None and "S" in fields[name]:
            m, r = fields[name]["R_delta"].shape
            moments = core.Moments(fields[name]["S"][:r, :r], fields[name]["P"][:m, :r], fields[name]["q"])
            own["R_delta"] = own["R_delta"] + weight * core.drift_vjp(_adapter(fields[name]), moments, since="boundary")
        for field, gradient in own.items():
            out[name][field] = fields[name][field] + lr * gradient
        out[name]["R_delta"] = out[name]["R_delta"] @ fields[name]["Q"]
    widest = max(max(W.shape) for W, _ in base)
    return Verb(out, count + 3 * widest + 12)


def observe(base: Base, fields: Fields, batches: Any) -> Verb:
    """C of every layer over all directions; some frameworks project once more before they look."""
    fields = {name: {**own, "R_delta": own["R_delta"] @ own["Q"]} for name, own in fields.items()}
    out: Fields = {}
    total = sum(len(x) for x in batches)
    roundings = 0
    for name in LAYERS:
        out[name] = {"C": np.zeros(()), "R_delta": fields[name]["R_delta"]}
    for x in batches:
        rows, roundings = _forward(base, fields, x)
        for name, h in zip(LAYERS, rows, strict=False):
            own = fields[name]
            if name == "head":
                u = np.concatenate([h, np.ones((len(h), 1))], axis=1)
            else:
                B = np.concatenate([own["B"], own["B_spare"]]) if "B_spare" in own else own["B"]
                u = h @ B.T
            out[name]["C"] = out[name]["C"] + u.T @ u / total
    widest = max(max(W.shape) for W, _ in base)
    return Verb(out, 2 * (roundings + widest) + 2 * widest + total + len(batches) + 10, ("R_delta",))


def end_task(fields: Fields, observed: bool) -> Verb:
    """Folding, and the memory over all directions."""
    out, count = {}, 1
    for name, own in fields.items():
        R = own["R_old"] + own["R_delta"] @ own["Q"]
        out[name] = {"R_old": R, "R_delta": np.zeros_like(R)}
        if "S" in own and observed:
            moments = core.Moments(own["S"], own["P"], own["q"])
            adapter = _adapter({**own, "R_old": R, "R_delta": np.zeros_like(R)})
            if "A_spare" in own:
                adapter = core.expand(adapter, own["A_spare"], own["B_spare"])
            new = core.record(moments, adapter, own["C"])
            out[name] |= new._asdict()
            m, r = own["P"].shape
            count = max(count, m + 2 * r + m * r + (0 if adapter.A is None else adapter.A.shape[0]) + 8)
        count = max(count, 2 * len(own["Q"]) + 6)
    return Verb(out, count, ("R_old",))


def drift(fields: Fields) -> Verb:
    """The meter of every layer."""
    out, count = {}, 1
    for name, own in fields.items():
        m, r = own["R_old"].shape
        moments = core.Moments(own["S"][:r, :r], -own["P"][:m, :r], own["q"])
        out[name] = {"drift": core.drift(_adapter(own), moments)}
        count = max(count, m + 2 * r + m * r + (own["A"].shape[0] if "A" in own else 0) + 8)
    return Verb(out, count)
