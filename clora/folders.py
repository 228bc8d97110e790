"""The commands on saved adapters: inspect, verify, merge, export, import, diff. Output alone; the work is elsewhere."""

from __future__ import annotations

import fnmatch
import json as jsonlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

import clora_store as store
from clora_core.errors import CloraError, FormatError, OptionError, message

from . import anatomy
from .console import console, heat, messages, printable

DAMAGED, DIFFERENT, INTERRUPTED = 3, 4, 130
BARS = "▁▂▃▄▅▆▇█"
SHOWN_TASKS, MOST_TASKS = 20, 200  # of a heat map in a terminal; in JSON or a page
Folder = Annotated[Path, typer.Argument(help="Folder of an adapter.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TaskOption = Annotated[str | None, typer.Option(help="The function at the end of that task. Default: the present one.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (inspect, verify, merge, export, diff):
        app.command()(command)
    app.command("import")(import_)


@contextmanager
def _exit_codes(command: str) -> Iterator[None]:
    """Errors as one line and an exit code."""

    def say(text: str) -> None:
        messages.print(printable(text), style="red", markup=False, highlight=False, soft_wrap=True)

    try:
        yield
    except FormatError as error:
        say(str(error))
        raise typer.Exit(DAMAGED) from error
    except CloraError as error:
        say(str(error))
        raise typer.Exit(2) from error
    except OSError as error:
        say(f"clora {command}: {error.filename or ''} {error.strerror or error}".replace("  ", " "))
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def inspect(
    folder: Folder,
    layers: Annotated[str, typer.Option(help="Only layers of this name or glob.")] = "*",
    html: Annotated[Path | None, typer.Option(help="Also write a page to open in a browser.")] = None,
    json: Json = False,
) -> None:
    """Say what a saved adapter holds: layers, ranks, tasks, norms, spectra, and how much tasks overlap.

    The overlap of two tasks is the cosine of what they changed, over all layers: 1 the same change, 0 nothing in
    common, -1 one undoes the other. With many tasks, of the last 20 (200 in JSON and on the page).

    Exit codes: 0 done, 1 a file could not be read or written, 2 a wrong option, 3 no folder of an adapter, or damaged.
    """
    with _exit_codes("inspect"):
        state = store.load(folder, finite=False)
        named = [n for n in state.layers if n == layers] or fnmatch.filter(state.layers, layers)
        chosen = [layer for layer in anatomy.layers(state) if layer.name in named]
        if not chosen:
            raise _no_layers(layers, list(state.layers))
        shown = anatomy.comparable(state)
        shown = shown[-(MOST_TASKS if json or html is not None else SHOWN_TASKS) :]
        overlap = anatomy.overlap(state, shown)
        about = _about(state, folder)
        if html is not None:
            from . import folder_page

            html.parent.mkdir(parents=True, exist_ok=True)
            html.write_text(folder_page.page(about, chosen, shown, overlap), encoding="utf-8")
        if json:
            _print_json({**about, "layers": [x._asdict() for x in chosen], "overlap": _matrix(shown, overlap)})
            return
        facts = {key: value for key, value in about.items() if key != "provenance"} | about["provenance"]
        for key, value in facts.items():
            console.print(printable(f"{key:>12}  {_short(value)}"), markup=False, highlight=False, soft_wrap=True)
        console.print(_layers_table(chosen))
        last = shown[-SHOWN_TASKS:]
        if len(last) > 1:
            left = f" (the last {len(last)} of {len(state.tasks)})" if len(last) < len(state.tasks) else ""
            console.print(f"overlap of tasks{left}", markup=False)
            console.print(heat_map(last, overlap[-len(last) :, -len(last) :]))
        if html is not None:
            messages.print(f"Page: {html}", markup=False, soft_wrap=True)


def verify(
    folder: Folder,
    finite: Annotated[bool, typer.Option(help="Also refuse NaN and infinity.")] = True,
    vllm: Annotated[bool, typer.Option("--vllm", help="A PEFT folder: would vLLM take it?")] = False,
    json: Json = False,
) -> None:
    """Check every shape, dtype and hash of a saved adapter.

    Exit codes: 0 whole, 1 a file could not be read, 2 a wrong option, 3 no folder of an adapter, or damaged.
    """
    with _exit_codes("verify"):
        if vllm:
            try:
                problems = store.vllm_problems(folder)
            except FormatError as error:
                problems = [str(error)]
            if json:
                _print_json({"whole": not problems, "problems": problems})
            for problem in [] if json else problems:
                messages.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
            if problems:
                raise typer.Exit(DAMAGED)
        else:
            try:
                state = store.load(folder, finite=finite)
            except FormatError as error:
                if json:
                    _print_json({"whole": False, "problems": [str(error)]})
                raise
            arrays = dict(state.arrays())
            size = sum(array.nbytes for array in arrays.values())
            if json:
                _print_json({"whole": True, "problems": [], "tensors": len(arrays), "bytes": size})
                return
            console.print(
                f"whole: {len(state.layers)} layers, {len(state.tasks)} tasks, {len(arrays)} tensors, {size:,} bytes",
                highlight=False,
            )
            return
        if not json:
            console.print("vLLM would take it")


def merge(
    base: Annotated[Path, typer.Option(help="A .safetensors file, or a folder with one or with shards.")],
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    out: Annotated[Path, typer.Option(help="A new folder, or that of an interrupted merge: it goes on.")],
    task: TaskOption = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX=REPLACEMENT", help="Where the checkpoint names weights otherwise; repeatable."),
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="Of the checkpoint's linear weights: out,in or in,out. Default: as trained on.")
    ] = None,
    json: Json = False,
) -> None:
    """Merge an adapter into a checkpoint of any size, tensor by tensor, rounded once.

    Everything that no layer adapts is copied byte for byte. The table says what the checkpoint's precision kept of
    each layer's update. Ctrl-C, or worse, loses a few seconds of work: the same command goes on.

    Exit codes: 0 done, 1 a file could not be read or written, 2 a wrong option or a checkpoint that does not fit,
    3 a damaged adapter or checkpoint, 130 interrupted.
    """
    with _exit_codes("merge"):
        rules = [_rule(text) for text in rename or []]
        state = store.load(adapter)
        columns = (
            TextColumn("merging"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=messages, disable=json) as progress:
            bar = progress.add_task("merging", total=None)

            def show(done: int, total: int) -> None:
                progress.update(bar, completed=done, total=total)

            try:
                report = store.merge_checkpoint(base, state, out, task=task, rename=rules, layout=layout, progress=show)
            except KeyboardInterrupt:
                messages.print("Interrupted: the same command goes on from here.")
                raise
        if json:
            layers = {name: layer._asdict() for name, layer in report.layers.items()}
            _print_json({**report._asdict(), "layers": layers})
            return
        table = _table("layer", "kept", "error", "unchanged", "bound")
        for name, layer in report.layers.items():
            cells = (f"{layer.kept:.4f}", f"{layer.error:.2e}", f"{layer.unchanged:.1%}", f"{layer.bound:.1e}")
            table.add_row(Text(printable(name)), *cells, style=None if layer.error <= 0.1 else "red")
        console.print(table)
        lossy = [name for name, layer in report.layers.items() if not layer.error <= 0.1]
        if lossy:
            messages.print(
                f"{len(lossy)} of {len(report.layers)} layers lose more than 10 % of their update to the checkpoint's "
                "precision; merge into a float32 checkpoint to keep it",
                style="red",
            )
        heads = f", {len(report.heads)} classifiers replaced" if report.heads else ""
        messages.print(
            f"{out}: {report.bytes:,} bytes, {report.copied} tensors copied as they were{heads}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def export(
    folder: Folder,
    out: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    task: TaskOption = None,
    since: Annotated[str | None, typer.Option(help="Only what was learnt after that task ended.")] = None,
    rank: Annotated[int | None, typer.Option(help="Largest rank; the error of what is cut off is told.")] = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="As vLLM takes it: its ranks, no classifiers.")] = False,
    heads: Annotated[bool, typer.Option(help="Write classifiers, as modules_to_save.")] = True,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    json: Json = False,
) -> None:
    """Write an adapter's function as a PEFT LoRA folder, for PeftModel.from_pretrained, vLLM and others.

    Exit codes: 0 done, 1 a file could not be read or written, 2 a wrong option, 3 no folder of an adapter, or damaged.
    """
    with _exit_codes("export"):
        state = store.load(folder)
        done = store.export_peft(
            state, out, task=task, since=since, rank=rank, vllm=vllm, heads=heads and not vllm, dtype=dtype
        )
        if json:
            _print_json(done._asdict())
            return
        cut = {name: error / done.size[name] for name, error in done.error.items() if error and done.size[name]}
        worst = max(cut, key=cut.__getitem__, default=None)
        lost = "" if worst is None else f", cut off at most {cut[worst]:.2%} of an update ({worst})"
        left = [] if not vllm else [name for name, layer in state.layers.items() if layer.kind == "head"]
        lost += f"; classifiers left out: {', '.join(left)}" if left else ""
        text = f"{out}: {len(done.size)} modules at rank {done.rank}{lost}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def import_(
    peft: Annotated[Path, typer.Argument(help="A PEFT LoRA folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    task: Annotated[str | None, typer.Option(help="Count it as a finished task of that name.")] = None,
    orthonormal: Annotated[bool, typer.Option("--orthonormal", help="In orthonormal frames.")] = False,
) -> None:
    """Take a PEFT LoRA folder as the start of an adapter: the same function, its past.

    Exit codes: 0 done, 1 a file could not be read or written, 2 a wrong option or an untrained LoRA, 3 no LoRA folder,
    or damaged.
    """
    with _exit_codes("import"):
        state = store.import_peft(peft, task=task, orthonormal=orthonormal)
        store.save(out, state)
        console.print(f"{out}: {len(state.layers)} layers", markup=False, highlight=False, soft_wrap=True)


def diff(a: Folder, b: Folder, json: Json = False) -> None:
    """Say how two saved adapters differ: layers, tasks, and the distance of their updates.

    Exit codes: 0 the same bits, 4 different, 1 a file could not be read, 2 a wrong option, 3 a damaged folder.
    """
    with _exit_codes("diff"):
        found = anatomy.compare(store.load(a, finite=False), store.load(b, finite=False))
        if json:
            layers = {name: None if d is None else d._asdict() for name, d in found.layers.items()}
            _print_json({**found._asdict(), "layers": layers, "same": found.same})
        elif found.same:
            console.print("the same")
        else:
            _print_difference(found)
        if not found.same:
            raise typer.Exit(DIFFERENT)


# --- parts -------------------------------------------------------------------------------------------------------


def _about(state: store.State, folder: Path) -> dict[str, Any]:
    size = sum(entry.stat().st_size for entry in folder.iterdir() if entry.is_file())
    unobserved = len(state.unobserved)
    return {
        "folder": os.fspath(folder),
        "bytes": size,
        "factors": state.factors,
        "tasks": list(state.tasks),
        "open task": state.open,
        "unobserved": unobserved,
        "provenance": dict(state.provenance),
    }


def _short(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, list):
        return "none" if value is None else str(value)
    text = ", ".join(map(str, value[:8])) or "none"
    return f"{len(value)}: {text}, ..." if len(value) > 8 else text


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i == 0 else "right", overflow="fold")
    return table


def _layers_table(layers: Sequence[anatomy.LayerAnatomy]) -> Table:
    table = _table(*anatomy.CELLS, "spectrum")
    for layer in layers:
        table.add_row(*(Text(printable(cell)) for cell in layer.cells()), spark(layer.spectrum))
    return table


def spark(values: Sequence[float], width: int = 16) -> str:
    """Bars of values against the largest, at most ``width`` of them: every so many."""
    if not values or not values[0] > 0:
        return ""
    step = -(-len(values) // width)
    return "".join(BARS[min(7, int(8 * value / values[0]))] for value in values[::step])


def heat_map(tasks: Sequence[str], overlap: Any) -> Table:
    """A matrix in [-1, 1] as coloured cells: red for alike, blue for opposite, so dark as strong."""
    table = Table(box=None, pad_edge=False, padding=0, show_header=False)
    for i, (task, row) in enumerate(zip(tasks, overlap, strict=True)):
        cells = [Text(f"{value:+.2f}".rjust(6), style=f"black on {heat(value)}") for value in row[: i + 1]]
        table.add_row(Text(f"{printable(task)[:24]} "), *cells)
    return table


def _matrix(tasks: Sequence[str], overlap: Any) -> dict[str, Any]:
    return {"tasks": list(tasks), "cosine": [[float(value) for value in row] for row in overlap]}


def _print_difference(found: anatomy.Difference) -> None:
    table = _table("layer", "distance", "norm A", "norm B", "differs in")
    for name, layer in found.layers.items():
        if layer is None:
            table.add_row(Text(printable(name)), "", "", "", "size or kind")
            continue
        parts = {"factors": layer.same_factors, "routing": layer.same_routing, "memory": layer.same_memory}
        differs = ", ".join(part for part, same in parts.items() if not same) or "nothing"
        table.add_row(
            Text(printable(name)), f"{layer.distance:.3g}", f"{layer.norm_a:.3g}", f"{layer.norm_b:.3g}", differs
        )
    console.print(table)
    lines = {
        "also differ": found.otherwise,
        "layers only in A": found.only_a,
        "layers only in B": found.only_b,
        "tasks only in A": [task for task in found.tasks_a if task not in found.tasks_b],
        "tasks only in B": [task for task in found.tasks_b if task not in found.tasks_a],
    }
    for title, names in lines.items():
        if names:
            console.print(printable(f"{title}: {_short(names)}"), markup=False, highlight=False, soft_wrap=True)
    both = [task for task in found.tasks_a if task in found.tasks_b]
    if both != [task for task in found.tasks_b if task in found.tasks_a]:
        console.print("tasks in another order", markup=False)


def _rule(text: str) -> tuple[str, str]:
    pattern, sign, replacement = text.partition("=")
    if not sign or not pattern:
        raise OptionError(
            message(
                "clora merge",
                "a rule that is none",
                got=repr(text),
                needed="REGEX=REPLACEMENT",
                cause="a name without what it becomes",
                fix="for example --rename '^=model.'",
            )
        )
    return pattern, replacement


def _no_layers(pattern: str, names: list[str]) -> OptionError:
    return OptionError(
        message(
            "clora inspect",
            "no layer of that name",
            got=repr(pattern),
            needed=", ".join(map(repr, names[:8])),
            cause="a misspelt name",
            fix="pass a name or glob",
        )
    )


def _print_json(value: dict[str, Any]) -> None:
    """On standard output, NaN as null: JSON has none."""
    print(jsonlib.dumps(_plain(value), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
