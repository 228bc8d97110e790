"""One self-contained HTML page of a result: what it says in words, a table, and four figures."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

from . import study

COLOURS = {
    "sequential-lora": "#b0463c",
    "sequential-lora-slow": "#7d3c64",
    "c-lora-paper": "#c98a2b",
    "c-lora-paper-sgd": "#8a8a3a",
    "c-lora-projected": "#3f7fb5",
    "c-lora": "#2f8f5b",
}

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
body { color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; } img { max-width: 100%; height: auto; } small, figcaption { color: #555; }
figure { margin: 1rem 0; } code { overflow-wrap: anywhere; }
"""


def html(result: dict[str, Any]) -> str:
    """The page, text in and around inline pictures; needs nothing from the network."""
    figures = [
        (
            "Accuracy matrices",
            "Row: after learning that task. Column: evaluated on it. Left of the diagonal is memory, right of it are "
            "tasks not yet seen.",
            _matrices(result),
        ),
        (
            "Accuracy of each task over time",
            "One line a task, from the moment it is learned. A line that falls is forgetting.",
            _histories(result),
        ),
        (
            "The forgetting meter",
            "Mean squared change of each layer's output on everything recorded, summed over tasks. Known without old "
            "data, from second moments alone; only methods that keep them have it.",
            _meter(result),
        ),
        (
            "Spectrum of the routing",
            "Singular values of R after the last task: how much of the shared space is in use.",
            _spectrum(result),
        ),
    ]
    body = "".join(
        f"<h2>{escape(title)}</h2><figure><img alt='{escape(title)}' src='data:image/svg+xml;base64,{picture}'>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for title, caption, picture in figures
        if picture
    )
    words = "".join(f"<p>{escape(line)}</p>" for line in reading(result))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    machine = "{system} on {processor}, {cores} cores".format(**result["machine"])
    title = f"C-LoRA on {result['suite']}: {result['tasks']} tasks, rank {result['rank']}, seed {result['seed']}"
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"{words}{_table(result)}{body}"
        f"<p><small>Made by <code>{escape(result['command'])}</code>; {escape(versions)}; {escape(machine)}.</small>"
        "</p></body></html>\n"
    )


def reading(result: dict[str, Any]) -> list[str]:
    """What one sees, in sentences made from the numbers."""
    entries = result["methods"]
    if not entries:
        return []
    unfinished = [entry["title"] for entry in entries.values() if not entry["complete"]]
    whole = {name: entry for name, entry in entries.items() if entry["complete"]} or entries
    lines = []
    if unfinished:
        lines.append(
            f"Interrupted: {', '.join(unfinished)} stopped early, and its figures cover only its finished tasks."
        )
    best = max(whole.values(), key=lambda entry: entry["last_accuracy"])
    tasks = best["finished"]
    if tasks == 1:
        return [
            *lines,
            f"One task was learned; {best['title']} reaches {best['last_accuracy']:.1%}. Forgetting needs two.",
        ]
    lines.append(
        f"After {tasks} tasks, {best['title']} classifies {best['last_accuracy']:.1%} of the test images of all tasks "
        f"(guessing: 10.0%); on earlier tasks it {_change(best['backward_transfer'])} since learning them."
    )
    base = whole.get("sequential-lora")
    if base is not None and base is not best:
        lines.append(
            f"Sequential LoRA, with nothing to protect what it knows, ends at {base['last_accuracy']:.1%} and "
            f"{_change(base['backward_transfer'])}."
        )
    paper = whole.get("c-lora-paper")
    if paper is not None and paper is not best:
        lines.append(
            f"The paper's form ({paper['settings']['optimizer']}) ends at {paper['last_accuracy']:.1%} and "
            f"{_change(paper['backward_transfer'])}."
        )
    constant = [e for e in whole.values() if len(set(e["state_bytes_by_task"])) == 1]
    if len(constant) == len(whole):
        sizes = sorted({study.human_bytes(entry["state_bytes"]) for entry in whole.values()})
        lines.append(
            f"The state kept from task to task has the same size after task 1 and task {tasks}: {', '.join(sizes)}."
        )
    return lines


def _change(transfer: float) -> str:
    points = abs(100 * transfer)
    return f"{'lost' if transfer < 0 else 'gained'} {points:.1f} points on average"


def _table(result: dict[str, Any]) -> str:
    head = ["method", "Last-Acc", "Inc-Acc", "learned", "BWT", "FWT", "forgetting", "trained", "state", "seconds"]
    rows = ""
    for entry in result["methods"].values():
        note = "" if entry["complete"] else f" ({entry['finished']} of {result['tasks']} tasks)"
        cells = (
            entry["title"] + note,
            f"{entry['last_accuracy']:.3f}",
            f"{entry['average_incremental_accuracy']:.3f}",
            f"{entry['learned']:.3f}",
            f"{entry['backward_transfer']:+.3f}",
            f"{entry['forward_transfer']:+.3f}",
            f"{entry['forgetting']:.3f}",
            f"{entry['parameters']:,}",
            " to ".join(f"{size:,} B" for size in (entry["state_bytes_by_task"][0], entry["state_bytes"])),
            f"{entry['seconds']:.1f}",
        )
        rows += f"<tr title='{escape(entry['summary'], quote=True)}'>" + "".join(f"<td>{escape(c)}</td>" for c in cells)
        rows += "</tr>"
    header = "".join(f"<th>{escape(name)}</th>" for name in head)
    return (
        f"<div class='wide'><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>"
        "<p><small>Last-Acc: mean accuracy over all tasks at the end. Inc-Acc: the same after each task over the tasks "
        "so far, averaged. Learned: accuracy on each task just after learning it, averaged. BWT, FWT: Lopez-Paz and "
        "Ranzato 2017. Forgetting: Chaudhry et al. 2018. Trained: numbers that learn in the last task. State: bytes "
        "kept from task to task, after the first and after the last.</small></p>"
    )


def _axes(count: int) -> tuple[Any, list[Any]]:
    """A figure with ``count`` panels, three in a row, whole numbers along x."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns, rows = min(count, 3), -(-count // 3)
    figure = Figure(figsize=(3.5 * columns + 0.6, 2.7 * rows + 0.2), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[:count]:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, axes[:count]


def _svg(figure: Any) -> str:
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "clora"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue().encode()).decode()


def _matrices(result: dict[str, Any]) -> str:
    from matplotlib.ticker import MaxNLocator

    entries = result["methods"]
    figure, axes = _axes(len(entries))
    image = None
    for ax, entry in zip(axes, entries.values(), strict=True):
        matrix = entry["accuracy"]
        extent = (0.5, len(matrix[0]) + 0.5, len(matrix) + 0.5, 0.5)
        image = ax.imshow(matrix, vmin=0, vmax=1, cmap="viridis", extent=extent, aspect="auto")
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(title=entry["title"], xlabel="evaluated on task", ylabel="after task")
        ax.title.set_fontsize(9)
    figure.colorbar(image, ax=axes, label="accuracy")
    return _svg(figure)


def _histories(result: dict[str, Any]) -> str:
    entries = result["methods"]
    figure, axes = _axes(len(entries))
    for ax, (name, entry) in zip(axes, entries.items(), strict=True):
        matrix = entry["accuracy"]
        for j in range(len(matrix)):
            times = range(j + 1, len(matrix) + 1)
            values = [matrix[i][j] for i in range(j, len(matrix))]
            ax.plot(times, values, marker=".", color=COLOURS[name], alpha=0.35 + 0.6 * j / max(len(matrix) - 1, 1))
        ax.set(title=entry["title"], xlabel="after task", ylabel="accuracy", ylim=(0, 1))
        ax.title.set_fontsize(9)
        ax.grid(alpha=0.3)
    return _svg(figure)


def _meter(result: dict[str, Any]) -> str:
    entries = {name: e for name, e in result["methods"].items() if any(e["drift_by_task"])}
    layers = list(dict.fromkeys(layer for e in entries.values() for row in e["drift_by_task"] for layer in row))
    if not layers:
        return ""
    figure, axes = _axes(len(layers))
    for ax, layer in zip(axes, layers, strict=True):
        for name, entry in entries.items():
            values = [max(row[layer], 0.0) for row in entry["drift_by_task"]]
            ax.plot(range(1, len(values) + 1), values, marker=".", color=COLOURS[name], label=entry["title"])
        ax.set(title=layer, xlabel="after task", ylabel="drift (output units squared)")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    return _svg(figure)


def _spectrum(result: dict[str, Any]) -> str:
    entries = result["methods"]
    layers = list(dict.fromkeys(layer for e in entries.values() for layer in e["spectrum"]))
    figure, axes = _axes(len(layers))
    for ax, layer in zip(axes, layers, strict=True):
        for name, entry in entries.items():
            values = entry["spectrum"][layer]
            ax.plot(range(1, len(values) + 1), values, color=COLOURS[name], label=entry["title"])
        ax.set(title=layer, xlabel="index", ylabel="singular value of R")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    return _svg(figure)
