"""The command line: options, progress and tables. The work is in `study`, the drawing in `report`."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from clora_core.errors import CloraError, MissingDependencyError

from . import folders
from .console import console, messages

STUDY = {"sklearn": "scikit-learn", "mlxtend": "mlxtend", "matplotlib": "matplotlib", "platformdirs": "platformdirs"}

app = typer.Typer(
    help="C-LoRA: continual low-rank adaptation with one adapter.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(metadata.version("clora"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and leave.")
    ] = False,
) -> None:
    """C-LoRA: continual low-rank adaptation with one adapter."""


folders.register(app)


@app.command()
def demo(
    tasks: Annotated[int, typer.Option(min=1, help="Tasks in the stream.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of data split, permutations, start and batches.")] = 0,
    rank: Annotated[int, typer.Option(help="Rank r of the adapters, 1 to 256.")] = 64,
    backend: Annotated[str, typer.Option(help="Library that trains: numpy, cupy, torch or jax.")] = "numpy",
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method; repeat for several. Default: all.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html and result.json.")] = Path("clora-demo"),
    json: Annotated[bool, typer.Option("--json", help="Print result.json instead of the table.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="At most 4 tasks on a quarter of the data: a look, no measure.")
    ] = False,
) -> None:
    """Ten tasks, one adapter: what is remembered, and what is not.

    An MLP pre-trained on scikit-learn's digits learns Permuted-MNIST task after task (5000 real images, one shared
    head, no stored data) by six methods side by side: sequential LoRA and C-LoRA as in the paper (at two settings
    each), C-LoRA with projection, C-LoRA with the drift penalty. Writes a report to open in a browser. Ctrl-C keeps
    what is finished.

    Exit codes: 0 done, 1 something is not installed or there is no GPU for cupy, 2 a wrong option, 130 interrupted.
    """
    missing = [package for module, package in STUDY.items() if importlib.util.find_spec(module) is None]
    if missing:
        messages.print(
            f"clora demo: {', '.join(missing)} not installed; run: python -m pip install 'clora[study]'",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(1)
    try:
        code = _demo(tasks, seed, rank, backend, method, out, json, quick)
    except MissingDependencyError as error:
        messages.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except CloraError as error:
        messages.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    raise typer.Exit(code)


def _demo(
    tasks: int, seed: int, rank: int, backend: str, names: list[str] | None, out: Path, json: bool, quick: bool
) -> int:
    from . import methods, pages, report, study, suites, trainers

    chosen = {name: methods.get_method(name) for name in (names or methods.DEMO)}
    tasks, size = (min(tasks, 4), 1000) if quick else (tasks, 4000)
    stream = suites.load_suite("permuted-mnist", tasks=tasks, seed=seed, train_size=size)
    if not json:
        messages.print(f"Permuted-MNIST: {tasks} tasks of {size} images, rank {rank}, seed {seed}, {backend}.")
    backbone, cached = suites.load_backbone()
    if not cached and not json:
        messages.print("Pre-trained the backbone on scikit-learn's digits; it is kept for the next time.")
    for method in chosen.values():  # a rank that does not fit is told before anything is trained
        trainers.trainer(backend, method, backbone, rank=rank, seed=seed)
    result = study.new_result(
        suite="permuted-mnist",
        tasks=tasks,
        seed=seed,
        rank=rank,
        backend=backend,
        command=shlex.join(["clora", *sys.argv[1:]]),
        backbone=backbone,
    )
    interrupted = False
    try:
        _train_all(result, chosen, backbone, stream)
        result["complete"] = True
    except KeyboardInterrupt:
        interrupted = True
    if not any(entry["finished"] for entry in result["methods"].values()):
        messages.print("Interrupted before the first task was finished; nothing was written.")
        return 130
    try:
        pages.write(out / "result.json", study.to_json(result).encode())
        pages.write(out / "report.html", report.html(result).encode())
    except OSError as error:
        messages.print(f"clora demo: cannot write to {out}: {error.strerror}; the result follows on standard output.")
        print(study.to_json(result), end="")
        return 1
    if json:
        print(study.to_json(result), end="")
    else:
        console.print(_table(result))
        for line in report.reading(result):
            console.print(line, highlight=False)
    if interrupted:
        messages.print(f"Interrupted: the finished tasks are in {out}.", soft_wrap=True)
        return 130
    messages.print(f"Report: {out / 'report.html'}   Numbers: {out / 'result.json'}", soft_wrap=True)
    return 0


def _train_all(result: dict[str, Any], chosen: dict[str, Any], backbone: Any, stream: list[Any]) -> None:
    from . import methods, study

    total = sum(methods.steps_per_task(method, stream[0]) * len(stream) for method in chosen.values())
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=messages) as progress:
        overall = progress.add_task("all methods", total=total)
        for name, method in chosen.items():
            steps = methods.steps_per_task(method, stream[0]) * len(stream)
            bar = progress.add_task(method.title, total=steps)

            def on_step(bar: Any = bar) -> None:
                progress.advance(bar)
                progress.advance(overall)

            def on_task(name: str, row: list[float], bar: Any = bar, title: str = method.title) -> None:
                done = result["methods"][name]["finished"]
                mean = sum(row[:done]) / done
                progress.update(bar, description=f"{title[:24]} {mean:.3f}")

            study.run_method(result, name, backbone, stream, on_step=on_step, on_task=on_task)


def _table(result: dict[str, Any]) -> Table:
    title = f"{result['suite']}, {result['tasks']} tasks, rank {result['rank']}, seed {result['seed']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for header in ("Last-Acc", "learned", "BWT", "bytes after\ntask 1", "bytes after\nthe last", "s"):
        table.add_column(header, justify="right", min_width=9 if "bytes" in header else None)
    for name, entry in result["methods"].items():
        table.add_row(
            name if entry["complete"] else f"{name} ({entry['finished']} tasks)",
            f"{entry['last_accuracy']:.3f}",
            f"{entry['learned']:.3f}",
            f"{entry['backward_transfer']:+.3f}",
            f"{entry['state_bytes_by_task'][0]:,}",
            f"{entry['state_bytes']:,}",
            f"{entry['seconds']:.0f}",
        )
    return table
