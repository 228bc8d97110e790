"""Which layers of a model a pattern means, and what to say where it means none."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

from torch import nn

from clora_core.errors import OptionError, message

from ._layers import kind_of, sizes, weight_name

THIRDS = {"q": 0, "k": 1, "v": 2}
SLICE = re.compile(r"(?P<name>.*)\[(?:(?P<third>[qkv])|(?P<start>\d+):(?P<stop>\d+))\]")
Pattern = str | re.Pattern[str]


class Target(NamedTuple):
    """One adapter to make: a module's name, the rows of its weight (None: all), and the rank."""

    name: str
    rows: tuple[int, int] | None
    rank: int

    def __str__(self) -> str:
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"


def listed(patterns: Pattern | Iterable[Pattern]) -> tuple[Pattern, ...]:
    """One pattern may stand alone."""
    return (patterns,) if isinstance(patterns, str | re.Pattern) else tuple(patterns)


def matches(name: str, pattern: Pattern) -> bool:
    """A compiled regex matches anywhere in the name; a name or glob matches all of it, or its end at a dot."""
    if isinstance(pattern, re.Pattern):
        return pattern.search(name) is not None
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def named(model: nn.Module, pattern: Pattern) -> list[str]:
    """Modules whose name matches; a fused projection of nn.MultiheadAttention goes by the name of its weight, too."""
    found = []
    for name, module in model.named_modules():
        own = f"{name}.{weight_name(module)}" if isinstance(module, nn.MultiheadAttention) else name
        if matches(name, pattern) or matches(own.removeprefix("."), pattern):
            found.append(name)
    return found


def all_linear(model: nn.Module) -> list[str]:
    """Every linear layer but the model's output layer and the projections nn.MultiheadAttention reads by itself."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    inside = {id(c) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for c in m.children()}
    return [
        name
        for name, module in model.named_modules()
        if kind_of(module) == "linear" and module is not head and id(module) not in inside
    ]


def find(
    model: nn.Module,
    patterns: Pattern | Iterable[Pattern],
    *,
    rank: int,
    ranks: Mapping[Pattern, int],
    exclude: Pattern | Iterable[Pattern],
    heads: set[str],
) -> list[Target]:
    """The adapters to make, in the model's order. Every pattern must match; an exclude may match nothing."""
    modules = dict(model.named_modules())
    excluded = listed(exclude)
    found: dict[tuple[str, tuple[int, int] | None], int] = {}
    for pattern in listed(patterns):
        part = SLICE.fullmatch(pattern) if isinstance(pattern, str) else None
        plain: Pattern = part["name"] if part else pattern
        names = all_linear(model) if pattern == "all-linear" else named(model, plain)
        if pattern != "all-linear" and len(names) > 1:  # a container may share its name's end with a layer
            names = [n for n in names if kind_of(modules[n]) is not None] or names
        names = [n for n in names if not any(matches(n, e) for e in excluded) and n not in heads]
        if not names:
            raise nothing(pattern, plain, [n for n, m in modules.items() if kind_of(m) is not None])
        for name in names:
            rows = _rows(name, modules[name], part) if part else None
            own = [r for p, r in ranks.items() if matches(name, p)]
            found[name, rows] = own[-1] if own else rank
    for pattern in ranks:
        if not any(matches(name, pattern) for name, _ in found):
            raise nothing(pattern, pattern, [name for name, _ in found])
    whole = {name for name, rows in found if rows is None}
    order = {name: i for i, name in enumerate(modules)}
    targets = [Target(name, rows, r) for (name, rows), r in found.items() if rows is None or name not in whole]
    targets = sorted(targets, key=lambda t: (order[t.name], t.rows or (0, 0)))
    for one, two in pairwise(targets):
        if one.rows and two.rows and one.name == two.name and two.rows[0] < one.rows[1]:
            raise OptionError(
                message(
                    "clora_torch.attach",
                    f"two slices of layer {one.name!r} overlap",
                    got=f"{one} and {two}",
                    needed="rows that belong to one adapter",
                    cause="a slice by letter and one by numbers, or a wrong end",
                    fix="give slices that do not share rows",
                )
            )
    return targets


def _rows(name: str, module: nn.Module, part: re.Match[str]) -> tuple[int, int]:
    d_out, _ = sizes(module) if kind_of(module) in ("linear", "attention") else (0, 0)
    if part["third"]:
        third = d_out // 3
        start, stop = THIRDS[part["third"]] * third, (THIRDS[part["third"]] + 1) * third
        good = d_out > 0 and d_out % 3 == 0
    else:
        start, stop = int(part["start"]), int(part["stop"])
        good = 0 <= start < stop <= d_out
    if not good:
        raise OptionError(
            message(
                "clora_torch.attach",
                f"{part[0]!r} is no slice of layer {name!r}",
                got=f"a layer with {d_out} outputs" if d_out else f"a {type(module).__name__}",
                needed="a linear layer or fused projection; [q], [k], [v] where its outputs are three equal parts, "
                "else [start:stop]",
                cause="grouped key and value heads, or a fused layer with other parts",
                fix="give the rows of the weight, for instance 'c_attn[0:768]'",
            )
        )
    return start, stop


def nothing(pattern: Pattern, plain: Pattern, names: list[str]) -> OptionError:
    text = plain.pattern if isinstance(plain, re.Pattern) else plain
    ends = {name.rpartition(".")[2] for name in names}
    near = difflib.get_close_matches(text, [*names, *sorted(ends)], n=5, cutoff=0.5)
    return OptionError(
        message(
            "clora_torch.attach",
            "a target matches no layer",
            got=repr(pattern) if isinstance(pattern, str) else f"re.compile({text!r})",
            needed="a name, its end at a dot, a glob, a compiled regex, or 'all-linear'; layers end in "
            + (", ".join(map(repr, sorted(ends)[:12])) or "nothing: the model has no layer to adapt"),
            cause="a misspelt name, or one that exclude takes out" + (f"; near: {', '.join(near)}" if near else ""),
            fix="pass names as model.named_modules() has them",
        )
    )
