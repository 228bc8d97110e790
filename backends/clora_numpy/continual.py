"""The task life over layers: one adapter for all tasks, its memory, its protection, and going back."""

from __future__ import annotations

import difflib
import fnmatch
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from array_api_compat import array_namespace, device

import clora_core as core
from clora_core.errors import InvalidValueError, MomentsIncomplete, OptionError, StateError, message

from . import growth
from .layers import Head, Layer, Network
from .optimizers import Rule

Array = Any
Kind = TypeVar("Kind", bound="ContinualAdapter")
FACTORS = ("every-task", "first-task", "never")


def attach(
    network: Network | Mapping[str, Any] | Sequence[Any],
    *,
    rank: int,
    rng: Any,
    targets: Sequence[str] = ("*",),
    factors: str = "first-task",
    max_rank: int | None = None,
    scheme: str = "orthonormal",
    scale: float = 1.0,
    stop_old: bool = True,
    train_routing: bool = True,
) -> ContinualAdapter:
    """Give layers a C-LoRA adapter each. The function does not change; base weights stay frozen.

    Parameters
    ----------
    network : Network, or mapping or sequence of modules
        Its `Layer` objects get adapters; its `Head` objects are protected with them; the rest is left alone.
    rank : int
        1 <= rank <= min(d_out, d_in) of every matched layer.
    rng : numpy.random.Generator or int
        Source of the factors; an int is a seed.
    targets : sequence of str
        Names or glob patterns of the layers to adapt.
    factors : {"first-task", "every-task", "never"}
        When A and B learn. "every-task" is the paper; then second moments would be stale, so `drift`, `protect` and the
        drift penalty raise.
    max_rank : int, optional
        Directions up to this rank (or a layer's own limit) are drawn now and observed in every task, so that `expand`
        keeps meter and protection exact. They cost a product with x in `observe`, nothing in training.
    scheme : {"orthonormal", "lora", "svd"}
        Start of the factors, see `clora_core.init_adapter`.
    scale : float
        alpha / r in LoRA's terms, folded into A: the step that R takes in function space is multiplied by its square
        under gradient descent, and by itself under Adam.
    stop_old : bool
        A and B learn through R_delta alone (eqs. 11-12).
    train_routing : bool
        False with ``factors="every-task", scheme="lora", stop_old=False`` is plain LoRA: R stays the identity.

    Returns
    -------
    ContinualAdapter

    Raises
    ------
    OptionError
        An unknown option, or targets that match no layer (near names are listed).
    StateError
        A matched layer has an adapter already.
    RankError
        The rank does not fit a layer.
    """
    options = {"factors": factors, "max_rank": max_rank, "scheme": scheme, "scale": scale, "stop_old": stop_old}
    return attach_as(
        ContinualAdapter, network, rank=rank, rng=rng, targets=targets, **options, train_routing=train_routing
    )


def attach_as(
    kind: type[Kind],
    network: Network | Mapping[str, Any] | Sequence[Any],
    *,
    rank: int,
    rng: Any,
    targets: Sequence[str] = ("*",),
    factors: str = "first-task",
    max_rank: int | None = None,
    scheme: str = "orthonormal",
    scale: float = 1.0,
    stop_old: bool = True,
    train_routing: bool = True,
) -> Kind:
    """`attach`, for a package whose ContinualAdapter is a subclass of this one."""
    where = "clora_numpy.attach"
    network = network if isinstance(network, Network) else Network(network)
    if max_rank is not None and max_rank < rank:
        raise OptionError(
            message(
                where,
                "max_rank is below the rank",
                got=f"rank={rank}, max_rank={max_rank}",
                needed="max_rank >= rank",
                cause="the growth passed for the final rank",
                fix="pass the rank to grow to at most",
            )
        )
    if factors not in FACTORS:
        raise OptionError(
            message(
                where,
                "unknown factors mode",
                got=repr(factors),
                needed="one of " + ", ".join(map(repr, FACTORS)),
                cause="a misspelt name",
                fix="pass one of the names listed",
            )
        )
    if not train_routing and factors != "every-task":
        raise OptionError(
            message(
                where,
                "nothing would learn after the first task",
                got=f"train_routing=False, factors={factors!r}",
                needed="factors='every-task' where the routing does not learn",
                cause="plain LoRA asked for with frozen factors",
                fix="pass factors='every-task', or let the routing learn",
            )
        )
    if scheme == "lora" and factors == "never":
        raise OptionError(
            message(
                where,
                "nothing could ever learn",
                got="scheme='lora', factors='never'",
                needed="factors that are not zero",
                cause="A = 0 stays 0 where factors do not learn, and R_delta has no gradient through it",
                fix="pass scheme='orthonormal' or 'svd', or let the factors learn",
            )
        )
    layers = {name: module for name, module in network.modules.items() if isinstance(module, Layer)}
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    for pattern in targets:
        if not fnmatch.filter(layers, pattern):
            near = difflib.get_close_matches(pattern, layers, n=3, cutoff=0.4)
            raise OptionError(
                message(
                    where,
                    "a target matches no layer",
                    got=repr(pattern),
                    needed="a name or glob of " + ", ".join(map(repr, layers)),
                    cause="a misspelt name" + (f"; near: {', '.join(near)}" if near else ""),
                    fix="pass names as the network has them",
                )
            )
    chosen = {name: layer for name, layer in layers.items() if any(fnmatch.fnmatch(name, p) for p in targets)}
    for name, layer in chosen.items():
        if layer.adapter is not None:
            raise StateError(
                message(
                    where,
                    f"layer {name!r} has an adapter already",
                    got="a second attach",
                    needed="a layer without adapter",
                    cause="attach called twice",
                    fix="use the adapter that the first attach returned",
                )
            )
    if isinstance(rng, int):
        rng = np.random.default_rng(rng)
    adapters, spares = dict[str, core.Adapter](), dict[str, tuple[Array, Array]]()
    for name, layer in chosen.items():
        d_out, d_in = layer.W.shape
        drawn = core.init_adapter(rng, d_out, d_in, rank, scheme=scheme, W=layer.wide_weight())
        adapters[name] = drawn._replace(A=scale * drawn.A)
        more = 0 if max_rank is None else min(max_rank, d_out, d_in) - rank
        if more > 0:
            spares[name] = growth.draw_spare(adapters[name], more, rng, scale)
    for name, layer in chosen.items():
        layer.adapter, layer.stop_old = adapters[name], stop_old
    heads = {name: module for name, module in network.modules.items() if isinstance(module, Head)}
    adapter = kind(network, {**chosen, **heads}, factors, train_routing)
    adapter.scale = scale
    for name, directions in spares.items():
        growth.add_spare(adapter, name, *directions)
    return adapter


class ContinualAdapter:
    """All adapters of a network and what they remember; made by `attach`.

    Attributes
    ----------
    network : Network
    layers : dict of name to Layer or Head
        What learns.
    factors : str
        When A and B learn.
    tasks : list of str
        Finished tasks, in order.
    framework : str
        Name and version of the library, for what is saved.
    """

    framework = f"numpy {np.__version__}"

    def __init__(self, network: Network, layers: dict[str, Any], factors: str, train_routing: bool) -> None:
        self.network, self.layers, self.factors, self.train_routing = network, layers, factors, train_routing
        self.tasks: list[str] = []
        self.scale = 1.0
        self._open: str | None = None
        self._observed: dict[str, Array] | None = None
        self._unobserved: list[str] = []
        self._snapshots: dict[str, dict[str, Any]] = {}
        self._optimizers: list[Optimizer] = []
        self._moments = {name: core.empty_moments(_wide(layer.adapter)) for name, layer in layers.items()}
        self._fast: dict[str, core.Moments] = {}
        # Directions beyond those in use, the last of the memory; layers that were not observed in all they use; from a
        # folder, where a layer belongs.
        self._spare: dict[str, tuple[Array, Array]] = {}
        self._blind: list[str] = []
        self._targets: dict[str, Any] = {}
        # Also from a folder, not used here but by other libraries: options and provenance.
        self._kept: tuple[dict[str, Any], dict[str, str]] = ({}, {})
        self._resumed: str | None = None
        self._saved: dict[str, str] = {}  # folder -> digest of what was last saved there, or loaded
        self._spans: dict[tuple[str, float], Array] = {}
        self._choose_trained()

    # --- what learns -------------------------------------------------------------------------------------------

    def _choose_trained(self) -> None:
        moving = self.factors == "every-task" or (self.factors == "first-task" and not self.tasks)
        for layer in self.layers.values():
            if isinstance(layer, Layer):
                routing = ("R_delta",) if self.train_routing else ()
                layer.trained = ("A", *routing, "B") if moving else routing

    def parameters(self) -> dict[str, Array]:
        """What learns now: "layer.A", "layer.R_delta", "layer.B" -> array."""
        return {f"{n}.{p}": getattr(layer.adapter, p) for n, layer in self.layers.items() for p in layer.trained}

    def state_bytes(self) -> int:
        """Bytes to keep from task to task: adapters and second moments, base weights and snapshots left out."""
        kept: list[Array] = []
        for name, layer in self.layers.items():
            A, R_old, _, B = layer.adapter
            kept += [array for array in (A, R_old, B, *self._spare.get(name, ())) if array is not None]
            kept += list(self._moments[name]) if self.factors != "every-task" else []
        return sum(_bytes(array) for array in kept)

    # --- life of a task ----------------------------------------------------------------------------------------

    @contextmanager
    def task(self, name: str) -> Iterator[ContinualAdapter]:
        """Begin a task, and end it on leaving; an exception inside leaves the adapter as it was before the task.

        A task that is open in a folder that was loaded goes on.
        """
        before = {n: layer.adapter for n, layer in self.layers.items()}
        states = [dict(optimizer.state) for optimizer in self._optimizers]
        was = self._open, self._observed, self._resumed
        if self._resumed is None or self._resumed != name:  # else it goes on with a task that was open in a folder
            self.begin_task(name)
        self._resumed = None
        try:
            yield self
            self.end_task()
        except BaseException:
            for n, layer in self.layers.items():
                layer.adapter, layer.gradients = before[n], {}
            for optimizer, state in zip(self._optimizers, states, strict=False):
                optimizer.state = state
            self._open, self._observed, self._resumed = was
            raise

    def begin_task(self, name: str) -> None:
        """Fold what is in R_delta, start it from zero, clear its optimizer state, choose the protected directions."""
        if self._open is not None:
            raise _state("begin_task", f"task {self._open!r} is still open", "end_task() first")
        if not isinstance(name, str):
            raise _state("begin_task", f"the name of a task is a {type(name).__name__}", "pass str(name)")
        if name in self.tasks:
            raise _state("begin_task", f"a task named {name!r} is finished already", "choose another name")
        if any(isinstance(layer, Layer) and layer.merged for layer in self.layers.values()):
            raise _state("begin_task", "the adapters are merged into the weights", "unmerge() first")
        self._open, self._observed, self._spans = name, None, {}
        self._choose_trained()
        for n, layer in self.layers.items():
            if self.tasks:  # before the first task R_delta may hold the start itself, which must stay learnable
                layer.adapter = core.begin_task(layer.adapter)
            layer.gradients = {}
            self._fast[n] = _like(self.moments(n), layer.adapter.R_delta)
        for optimizer in self._optimizers:
            optimizer.at_boundary()

    def end_task(self) -> None:
        """Fold R_delta, add what was observed to the memory, and keep a snapshot of the routing for `restore`."""
        if self._open is None:
            raise _state("end_task", "no task is open", "begin_task(name) first, or use `with adapter.task(name)`")
        self._check_finite()
        for name, layer in self.layers.items():
            layer.adapter, layer.gradients = core.end_task(layer.adapter), {}
            # Folded first: the memory holds the sum as rounded. Where factors go on learning it would be stale.
            if self._observed is not None and self.factors != "every-task":
                self._moments[name] = core.record(self._moments[name], _wide(self._whole(name)), self._observed[name])
        if self._observed is None:
            self._unobserved.append(self._open)
        self._snapshots[self._open] = {name: layer.adapter for name, layer in self.layers.items()}
        self.tasks.append(self._open)
        self._open, self._observed = None, None
        self._choose_trained()

    def _check_finite(self) -> None:
        arrays = {
            (name, field): array
            for name, layer in self.layers.items()
            for field, array in zip(layer.adapter._fields, layer.adapter, strict=True)
            if array is not None
        }
        arrays |= {(name, "what was observed"): C for name, C in (self._observed or {}).items()}
        for name, field in _false({key: _finite(array) for key, array in arrays.items()}):
            raise InvalidValueError(
                message(
                    "clora_numpy.end_task",
                    f"{field} of layer {name!r} is not finite",
                    got="NaN or infinity",
                    needed="finite numbers",
                    cause="a diverged training step",
                    fix="lower the learning rate, check the data; `with adapter.task(...)` puts the state back",
                )
            )

    def observe(self, batches: Iterable[Any]) -> None:
        """Take the second moments of the open task's routed inputs, once, when its training is over.

        Parameters
        ----------
        batches : iterable of arrays (n, d_in), or of tuples or lists whose first item is one
            A pass over the task's inputs. Sums are taken in float64 where the device has it. A training step after this
            makes it void.
        """
        if self._open is None:
            raise _state("observe", "no task is open", "observe inside `with adapter.task(name)`, after training")
        rows, sums = 0, dict[str, Array]()
        for batch in batches:
            x = batch[0] if isinstance(batch, tuple | list) else batch
            self.network.forward(x)
            n = x.shape[0]
            for name in self.layers:
                C = n * core.second_moment(_wide_array(self._routed_input(name)))
                sums[name] = sums[name] + C if name in sums else C
            rows += n
        if rows == 0:
            raise _state(
                "observe", "there was no data to observe", "pass the task's inputs (a generator runs only once)"
            )
        self._observed = {name: C / rows for name, C in sums.items()}

    # --- memory ------------------------------------------------------------------------------------------------

    def moments(self, name: str) -> core.Moments:
        """The memory of one layer, of the directions in use."""
        S, P, q = self._moments[name]
        if name not in self._spare:
            return core.Moments(S, P, q)
        r = self.layers[name].adapter.R_old.shape[-1]
        return core.Moments(S[:r, :r], P[:r, :r], q)

    def _whole(self, name: str) -> core.Adapter:
        """The same function with the spare directions included, which no routing uses."""
        adapter = self.layers[name].adapter
        return core.expand(adapter, *self._spare[name]) if name in self._spare else adapter

    def _routed_input(self, name: str) -> Array:
        """Of all directions, (rows, r + spare)."""
        layer = self.layers[name]
        u = layer.routed_input()
        if name not in self._spare:
            return u
        xp = array_namespace(u)
        more = layer.wide_input() @ xp.matrix_transpose(self._spare[name][1])
        return xp.concat([u, xp.reshape(more, (-1, more.shape[-1]))], axis=1)

    def _need_moments(self, verb: str) -> None:
        if self.factors == "every-task":
            raise _state(
                verb,
                "the factors learn in every task (factors='every-task'), so second moments are stale",
                "attach with factors='first-task' or 'never'",
            )
        if self._unobserved:
            raise MomentsIncomplete(
                message(
                    f"clora_numpy.{verb}",
                    "tasks were finished without being observed",
                    got=f"no second moments of {', '.join(map(repr, self._unobserved))}",
                    needed="observe(batches) before the end of every task",
                    cause="observe left out, or a training step after it",
                    fix="call adapter.observe(loader) as the last thing in the task",
                )
            )
        if self._blind:
            raise MomentsIncomplete(
                message(
                    f"clora_numpy.{verb}",
                    "earlier tasks were not observed in all directions that are now in use",
                    got=f"ranks that had been expanded beyond max_rank in {', '.join(self._blind)}",
                    needed="directions that were drawn before the first task",
                    cause="expand() without max_rank, before the adapter was saved",
                    fix="attach with max_rank=, the rank to grow to at most",
                )
            )

    def drift(self, *, since: str = "task-ends") -> dict[str, float]:
        """The forgetting meter of each layer, see `clora_core.drift`; in float64."""
        self._need_moments("drift")
        return {
            name: float(core.drift(_wide(layer.adapter), self.moments(name), since=since))
            for name, layer in self.layers.items()
        }

    def penalty(
        self, weight: float = 1.0, *, kind: str = "drift", head_weight: float | None = None, **options: Any
    ) -> Array:
        """Add a penalty's gradient to the layers' gradients, and return its value; call between backward and step.

        Parameters
        ----------
        weight : float
        kind : {"drift", "orthogonality"}
            "drift": `clora_core.drift` with ``since="boundary"`` by default, heads included. "orthogonality": eq. 26,
            `clora_core.orthogonality`, which says nothing of heads.
        head_weight : float, optional
            Weight for heads, by default ``weight``.
        options
            ``since`` for "drift"; ``form``, ``energy``, ``normalize`` for "orthogonality".

        Returns
        -------
        array, shape ()
            The weighted sum over layers, of the layers' library, dtype and device: ``float(...)`` prints it, which on a
            GPU waits for everything before it. 0 before a first task is finished.
        """
        if kind not in ("drift", "orthogonality"):
            raise OptionError(
                message(
                    "clora_numpy.penalty",
                    "unknown kind",
                    got=repr(kind),
                    needed="'drift' or 'orthogonality'",
                    cause="a misspelt name",
                    fix="pass one of the two",
                )
            )
        if self._open is None:
            raise _state("penalty", "no task is open", "call it inside `with adapter.task(name)`")
        if kind == "drift":
            self._need_moments("penalty")
            if not self.tasks:
                return self._zero()
            options = {"since": "boundary", **options}
        total = self._zero()
        for name, layer in self.layers.items():
            if isinstance(layer, Head) and kind == "orthogonality":
                continue
            scale = weight if head_weight is None or not isinstance(layer, Head) else head_weight
            if kind == "drift":
                value = core.drift(layer.adapter, self._fast[name], **options)
                gradient = core.drift_vjp(layer.adapter, self._fast[name], **options)
            else:
                adapter, form = self._old_span(name, layer.adapter, **options)
                value = core.orthogonality(adapter, **form)
                gradient = core.orthogonality_vjp(adapter, **form)
            layer.add_gradient("R_delta", scale * gradient)
            total = total + scale * value
        return total

    def _zero(self) -> Array:
        R = next(iter(self.layers.values())).adapter.R_delta
        return array_namespace(R).zeros((), dtype=R.dtype, device=device(R))

    def _old_span(
        self, name: str, adapter: core.Adapter, *, form: str = "basis", energy: float = 0.9, normalize: bool = False
    ) -> tuple[core.Adapter, dict[str, Any]]:
        """An adapter and options of equal penalty that need no decomposition at every step: R_old stays within a task.

        ||Q^T R_delta||^2 with Q = U diag(w) is form "routing" of an adapter whose R_old is Q. U and w come from
        R_old R_old^T, whose eigenvalues are the squared singular values of R_old.
        """
        if form != "basis" or normalize:
            return adapter, {"form": form, "energy": energy, "normalize": normalize}
        if (name, energy) not in self._spans:
            R_old = _wide_array(adapter.R_old)
            xp = array_namespace(R_old)
            basis = core.protected_basis(R_old @ xp.matrix_transpose(R_old), energy=energy)
            self._spans[name, energy] = xp.astype(basis.U * basis.weights[None, :], adapter.R_old.dtype)
        return adapter._replace(R_old=self._spans[name, energy]), {"form": "routing"}

    def protect(self, optimizer: Optimizer, *, energy: float = 0.95, head_energy: float | None = None) -> None:
        """Keep R_delta (and the heads' difference) out of the protected directions after every step of ``optimizer``.

        The value is projected, R_delta (I - U diag(w) U^T), so nothing leaks whatever the optimizer does (momentum,
        Adam, weight decay). The directions hold ``energy`` of all recorded inputs (heads: ``head_energy``, by default
        the same), see `clora_core.protected_basis`.
        A layer with no direction left is reported by a warning when a task begins.
        """
        self._need_moments("protect")
        optimizer.protect(energy, energy if head_energy is None else head_energy)

    # --- growing -----------------------------------------------------------------------------------------------

    def expand(self, by: int, *, seed: int | np.random.Generator | None = None) -> None:
        """Raise every layer's rank between tasks, the function unchanged: routing expansion, see `clora_core.expand`.

        Parameters
        ----------
        by : int >= 1
            New directions for each layer, of those drawn at the start (``max_rank``) first. Beyond these new ones are
            drawn, of which earlier tasks know nothing: `drift`, `penalty` and `protect` then raise
            `MomentsIncomplete`.
        seed : int or numpy.random.Generator, optional
            For what is drawn.

        Raises
        ------
        RankError
            A rank above min(d_out, d_in) of a layer; nothing has changed.
        OptionError
            New directions are needed, and no seed is given.
        """
        growth.expand(self, by, seed)

    # --- going back --------------------------------------------------------------------------------------------

    def restore(self, name: str) -> None:
        """The function as it was when task ``name`` ended. ``restore(adapter.tasks[-1])`` comes back to the present."""
        if self._open is not None:
            raise _state("restore", f"task {self._open!r} is open", "end the task first")
        if name not in self._snapshots:
            raise _state(
                "restore",
                f"there is no finished task {name!r} (finished: {', '.join(map(repr, self.tasks)) or 'none'})",
                "pass the name of a finished task",
            )
        if any(isinstance(layer, Layer) and layer.merged for layer in self.layers.values()):
            raise _state("restore", "the adapters are merged into the weights", "unmerge() first")
        for n, layer in self.layers.items():
            before = self._snapshots[name][n]
            r = before.R_old.shape[-1]
            if before.A is not None and r != layer.adapter.R_old.shape[-1]:
                A, _, _, B = self._whole(n)  # of the highest rank
                self._spare.pop(n, None)
                if r < A.shape[-1]:
                    self._spare[n] = A[:, r:], B[r:, :]
                growth.forget(self, n)
            layer.adapter = before

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model: no adapter, heads as they were at the start."""
        try:
            for layer in self.layers.values():
                layer.enabled = False
            yield
        finally:
            for layer in self.layers.values():
                layer.enabled = True

    def merge(self) -> dict[str, core.MergeReport]:
        """Merge every adapter into its weight, from the pristine weight; the pristine one is kept. Heads need none."""
        layers = {n: layer for n, layer in self.layers.items() if isinstance(layer, Layer)}
        if self._open is not None or any(layer.merged for layer in layers.values()):
            raise _state(
                "merge", "a task is open, or the adapters are merged already", "end the task, or unmerge() first"
            )
        return {name: layer.merge() for name, layer in layers.items()}

    def unmerge(self) -> None:
        """Put every pristine weight back: the same bits as before `merge`."""
        layers = [layer for layer in self.layers.values() if isinstance(layer, Layer)]
        if not all(layer.merged for layer in layers):
            raise _state("unmerge", "the adapters are not merged", "merge() first")
        for layer in layers:
            layer.unmerge()

    # --- saving ------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write all of the adapter into a folder that `load`, and every other framework of clora, reads.

        Parameters
        ----------
        folder : path
            Made where it does not exist. Saving to it again replaces what is there in one step; see
            `clora_store.save`, which also says what it raises.
        overwrite : bool
            Replace the adapter of another run.

        Notes
        -----
        Base weights and optimizers are not in it.
        """
        from . import folders

        folders.save(self, folder, overwrite=overwrite)

    def export_peft(self, folder: str | os.PathLike[str], **options: Any) -> Any:
        """Write the present function, or that of ``task=``, as a PEFT LoRA folder; see `clora_store.export_peft`."""
        from . import folders

        return folders.export_peft(self, folder, **options)


class Optimizer:
    """A functional rule bound to an adapter: its state per parameter, and the projection after every step.

    Parameters
    ----------
    adapter : ContinualAdapter
    rule : Rule
        From `sgd`, `adam` or `adamw`.

    Attributes
    ----------
    state : dict
        "layer.parameter" -> the rule's state. Assign ``{}`` between tasks to start everything afresh.
    """

    def __init__(self, adapter: ContinualAdapter, rule: Rule) -> None:
        self.adapter, self.rule = adapter, rule
        self.state: dict[str, Any] = {}
        self._energies: dict[str, float] = {}
        self._bases: dict[str, core.Basis] = {}
        adapter._optimizers.append(self)

    def step(self) -> None:
        """Update every parameter that has a gradient, project what is protected, clear the gradients."""
        adapter = self.adapter
        if adapter._open is None:
            raise _state("Optimizer.step", "no task is open", "train inside `with adapter.task(name)`")
        adapter._observed = None
        for n, layer in adapter.layers.items():
            new = {}
            for name in layer.trained:
                if name not in layer.gradients:
                    continue
                key, value = f"{n}.{name}", getattr(layer.adapter, name)
                state = self.state[key] if key in self.state else self.rule.init(value)
                new[name], self.state[key] = self.rule.update(value, layer.gradients[name], state)
                if name == "R_delta" and n in self._bases:
                    new[name] = core.project(new[name], self._bases[n])
            layer.adapter, layer.gradients = layer.adapter._replace(**new), {}

    def protect(self, energy: float, head_energy: float) -> None:
        """See `ContinualAdapter.protect`."""
        layers = self.adapter.layers.items()
        energies = {n: head_energy if isinstance(layer, Head) else energy for n, layer in layers}
        for n, value in energies.items():
            core.protected_basis(self.adapter.moments(n).S, energy=value)  # refuses a wrong energy now, not in a task
        self._energies = energies
        if self.adapter._open is not None:
            self._choose_bases()

    def at_boundary(self) -> None:
        """A task begins: R_delta is new, so its state is, too."""
        for key in [key for key in self.state if key.endswith(".R_delta")]:
            del self.state[key]
        self._choose_bases()

    def _choose_bases(self) -> None:
        self._bases = {}
        if not self._energies or not self.adapter.tasks:
            return
        self.adapter._need_moments("protect")
        free = {}
        for n, layer in self.adapter.layers.items():
            basis = core.protected_basis(self.adapter.moments(n).S, energy=self._energies[n])
            self._bases[n] = _like(basis, layer.adapter.R_delta)
            free[n] = array_namespace(basis.weights).any(basis.weights == 0)
        full = _false(free)
        if full:
            warnings.warn(
                f"no direction is left to learn in for {', '.join(full)}: all are needed to hold the protected share "
                "of the recorded inputs; lower the energy or raise the rank",
                stacklevel=4,
            )


def _state(verb: str, what: str, fix: str) -> StateError:
    return StateError(
        message(
            f"clora_numpy.{verb}",
            what,
            got="a call out of order",
            needed="begin_task, train, observe, end_task, in this order",
            cause="a verb at the wrong moment of a task's life",
            fix=fix,
        )
    )


def _false(flags: Mapping[Any, Array]) -> list[Any]:
    """The keys whose flag is false. Where all are true that costs one wait for the device, however many there are."""
    if not flags:
        return []
    xp = array_namespace(*flags.values())
    if bool(xp.all(xp.stack(list(flags.values())))):
        return []
    return [key for key, flag in flags.items() if not bool(flag)]


def _finite(array: Array) -> Array:
    xp = array_namespace(array)
    return xp.all(xp.isfinite(array))


def _wide_array(array: Array | None) -> Array | None:
    """float64 where the array's device has it."""
    if array is None:
        return None
    xp = array_namespace(array)
    info = xp.__array_namespace_info__()
    wide = info.dtypes(device=device(array), kind="real floating").get("float64", array.dtype)
    return array if array.dtype == wide else xp.astype(array, wide)


def _wide(adapter: core.Adapter) -> core.Adapter:
    return core.Adapter(*(_wide_array(array) for array in adapter))


def _like(arrays: Any, other: Array) -> Any:
    """The NamedTuple of arrays in the dtype of ``other``."""
    xp = array_namespace(other)
    return type(arrays)(*(xp.astype(array, other.dtype) for array in arrays))


def _bytes(array: Array) -> int:
    size = 1
    for length in array.shape:
        size *= length
    bits = str(array.dtype)
    return size * (8 if "64" in bits else 4)
